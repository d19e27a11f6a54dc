//! From a finished checkpoint to proof of where it came from.
//!
//! In: the files written, the options and inputs they were made with, a private key. Out: a manifest that says how they were made
//! ([`Statement`]), a signature that binds them all ([`Signature`]), and, on the other side, [`Verified`]: the only type that says
//! that files are as a key's owner signed them. Both formats are the ecosystem's (in-toto, SLSA, OpenSSF Model Signing); what each
//! must hold is written down in `docs/manifest.md`.
//!
//! Nothing here writes but [`PrivateKey::write_pair`]; manifests and signatures come out as text, for whoever writes the checkpoint.

mod bundle;
pub(crate) mod json;
mod keys;
mod signature;
mod statement;
mod timestamp;
mod tree;
mod verify;

pub use bundle::BundleError;
pub use keys::{Curve, KeyError, KeyPairPaths, PrivateKey, PublicKey};
pub use signature::{
    ClaimError, MANIFEST_NAME, SIGNATURE_NAME, SignError, Signature, ignored_by_default,
    manifest_path, signature_path,
};
pub use statement::{Byproduct, Dependency, Provenance, Role, Statement, StatementError};
pub use timestamp::{Timestamp, TimestampError};
pub use tree::{FileDigest, FileName, FileNameError, TreeError, hash_directory};
pub use verify::{
    Against, Changed, Differences, OriginUnproven, Verified, VerifyError, check_manifest, verify,
};
