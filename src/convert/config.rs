//! `config.json` to the keys of a GGUF file, and back.
//!
//! In: the text of a `config.json`, or [`Metadata`](panacea_formats::gguf::Metadata) with the tensors beside it. Out: the same in the
//! other form, with keys, types, values and order as llama.cpp's converter writes them, and a config that transformers and
//! [`crate::model::Config`] read. What cannot be said on the other side and would change what is computed is refused, or told as a loss
//! where llama.cpp's own converter drops it, too.

mod from_gguf;
mod rope;
mod to_gguf;

pub use from_gguf::{GgufConfigError, from_gguf, generation_config};
pub use to_gguf::{Derived, GgufConfig};
