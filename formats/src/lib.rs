//! x

mod digest;

pub use digest::{DigestParseError, Hasher, Sha256};
