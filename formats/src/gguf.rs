//! The GGUF container: ordered typed metadata and named typed tensors.

mod value;

pub use value::{Array, Metadata, Value};
