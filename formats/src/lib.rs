//! x

mod digest;
pub mod dtype;
mod tensor;

pub use digest::{DigestParseError, Hasher, Sha256};
pub use tensor::{TensorView, WidenError};
