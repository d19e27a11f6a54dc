//! x
mod json;
mod keys;
mod tree;
pub use keys::{Curve, KeyError, KeyPairPaths, PrivateKey, PublicKey};
pub use tree::{FileDigest, FileName, FileNameError, TreeError, hash_directory};
