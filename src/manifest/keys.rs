//! ECDSA keys on the curves P-256 and P-384, as PEM files.
//!
//! In: a private key in PKCS#8 or SEC1, a public key as SubjectPublicKeyInfo; anything else is refused by the name of what it is.
//! Out: keys that sign and verify, and new pairs of key files that never replace an existing file. These are the keys that the
//! ecosystem's `model_signing` accepts; its third curve, P-521, is left out.
//!
//! A private key's text and bytes are wiped from memory when dropped, where this program holds them; copies that the operating
//! system makes (page cache, swap) are out of its reach. Neither kind of key shows its secret in `Debug`.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use p256::elliptic_curve::Generate;
use p256::elliptic_curve::zeroize::Zeroizing;
use p256::pkcs8::der::{Decode, SecretDocument};
use p256::pkcs8::spki::{AlgorithmIdentifierRef, SubjectPublicKeyInfoRef};
use p256::pkcs8::{
    EncodePrivateKey, EncodePublicKey, LineEnding, ObjectIdentifier, PrivateKeyInfoRef,
};
use p384::ecdsa::signature::{Signer, Verifier};
use panacea_formats::{Sha256, shown};
use sec1::{EcParameters, EcPrivateKey};
use thiserror::Error;

/// The elliptic curve a key lies on; it settles the hash that is signed, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Curve {
    /// NIST P-256 (secp256r1), signing SHA-256.
    P256,
    /// NIST P-384 (secp384r1), signing SHA-384.
    P384,
}

impl fmt::Display for Curve {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::P256 => "P-256",
            Self::P384 => "P-384",
        })
    }
}

/// A key that signs.
#[derive(Clone)]
pub struct PrivateKey(PrivateKind);

#[derive(Clone)]
enum PrivateKind {
    P256(p256::ecdsa::SigningKey),
    P384(p384::ecdsa::SigningKey),
}

impl PrivateKey {
    /// A new key from the operating system's randomness.
    ///
    /// # Errors
    /// [`KeyError::NoRandomness`] when the operating system has none to give.
    pub fn generate(curve: Curve) -> Result<Self, KeyError> {
        let no_randomness = |error: getrandom::Error| KeyError::NoRandomness {
            source: io::Error::from(error),
        };
        Ok(Self(match curve {
            Curve::P256 => {
                PrivateKind::P256(p256::ecdsa::SigningKey::try_generate().map_err(no_randomness)?)
            }
            Curve::P384 => {
                PrivateKind::P384(p384::ecdsa::SigningKey::try_generate().map_err(no_randomness)?)
            }
        }))
    }

    /// Reads the PEM file at `path`.
    ///
    /// # Errors
    /// [`KeyError::Io`] when it cannot be read, else as [`PrivateKey::from_pem`].
    pub fn read(path: &Path) -> Result<Self, KeyError> {
        Self::from_pem(&read_text(path)?).map_err(|error| error.at(path))
    }

    /// Reads an unencrypted key in PKCS#8 (`PRIVATE KEY`) or SEC1 (`EC PRIVATE KEY`).
    ///
    /// Text around the key is passed over, and so are the `EC PARAMETERS` that `openssl ecparam -genkey` writes before it.
    ///
    /// # Errors
    /// [`KeyError::Refused`] naming what was found, when that is not such a key; [`KeyError::Malformed`] when it should be but cannot be decoded.
    pub fn from_pem(text: &str) -> Result<Self, KeyError> {
        let block = key_block(text)?;
        match block.label {
            PKCS8_LABEL => {}
            SEC1_LABEL if block.text.contains("4,ENCRYPTED") => {
                return Err(refused("an encrypted private key"));
            }
            SEC1_LABEL => {}
            "ENCRYPTED PRIVATE KEY" => return Err(refused("an encrypted private key")),
            "PUBLIC KEY" => return Err(refused("a public key, where the private one is needed")),
            other => return Err(refused(label_in_words(other))),
        }
        let (_, document) = SecretDocument::from_pem(block.text).map_err(malformed)?;
        let curve = if block.label == PKCS8_LABEL {
            let key = PrivateKeyInfoRef::from_der(document.as_bytes()).map_err(malformed)?;
            curve_of(&key.algorithm)?
        } else {
            let key = EcPrivateKey::from_der(document.as_bytes()).map_err(malformed)?;
            match key.parameters {
                Some(EcParameters::NamedCurve(oid)) => curve_named(oid)?,
                _ => return Err(refused("an EC private key that does not name its curve")),
            }
        };
        // `from_der` takes both encodings; it also checks the public key inside, where there is one.
        Ok(Self(match curve {
            Curve::P256 => PrivateKind::P256(
                p256::SecretKey::from_der(document.as_bytes())
                    .map_err(malformed)?
                    .into(),
            ),
            Curve::P384 => PrivateKind::P384(
                p384::SecretKey::from_der(document.as_bytes())
                    .map_err(malformed)?
                    .into(),
            ),
        }))
    }

    /// The key as unencrypted PKCS#8 PEM, lines ended by LF.
    fn to_pem(&self) -> Zeroizing<String> {
        match &self.0 {
            PrivateKind::P256(key) => key.to_pkcs8_pem(LineEnding::LF),
            PrivateKind::P384(key) => key.to_pkcs8_pem(LineEnding::LF),
        }
        .expect("a key of fixed size fits its encoding")
    }

    /// The curve it lies on.
    pub fn curve(&self) -> Curve {
        match self.0 {
            PrivateKind::P256(_) => Curve::P256,
            PrivateKind::P384(_) => Curve::P384,
        }
    }

    /// The key that verifies what this one signs.
    pub fn public_key(&self) -> PublicKey {
        match &self.0 {
            PrivateKind::P256(key) => PublicKey(PublicKind::P256(*key.verifying_key())),
            PrivateKind::P384(key) => PublicKey(PublicKind::P384(*key.verifying_key())),
        }
    }

    /// Signs `message`: an ASN.1 DER ECDSA signature with the nonce of RFC 6979, so the same message has the same signature.
    pub fn sign(&self, message: &[u8]) -> Vec<u8> {
        match &self.0 {
            PrivateKind::P256(key) => {
                let signature: p256::ecdsa::DerSignature = key.sign(message);
                signature.as_bytes().to_vec()
            }
            PrivateKind::P384(key) => {
                let signature: p384::ecdsa::DerSignature = key.sign(message);
                signature.as_bytes().to_vec()
            }
        }
    }

    /// Writes the key to `paths.private`, readable by its owner alone, and its public half to `paths.public`.
    ///
    /// Either both files are new and complete or neither is left; the directory must exist. On systems without Unix permissions
    /// the private file has those of its directory.
    ///
    /// # Errors
    /// [`KeyError::Exists`] when either file is there already, [`KeyError::Io`] when writing fails.
    pub fn write_pair(&self, paths: &KeyPairPaths) -> Result<(), KeyError> {
        write_new(&paths.private, self.to_pem().as_bytes(), 0o600)?;
        write_new(&paths.public, self.public_key().to_pem().as_bytes(), 0o644).inspect_err(|_| {
            // This call made the file, so nobody's key is lost; if it stays, the first error is still the one to report.
            let _ = fs::remove_file(&paths.private);
        })
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PrivateKey({}, ..)", self.curve())
    }
}

/// A key that verifies.
#[derive(Clone, PartialEq, Eq)]
pub struct PublicKey(PublicKind);

#[derive(Clone, PartialEq, Eq)]
enum PublicKind {
    P256(p256::ecdsa::VerifyingKey),
    P384(p384::ecdsa::VerifyingKey),
}

impl PublicKey {
    /// Reads the PEM file at `path`.
    ///
    /// # Errors
    /// [`KeyError::Io`] when it cannot be read, else as [`PublicKey::from_pem`].
    pub fn read(path: &Path) -> Result<Self, KeyError> {
        Self::from_pem(&read_text(path)?).map_err(|error| error.at(path))
    }

    /// Reads a SubjectPublicKeyInfo (`PUBLIC KEY`).
    ///
    /// # Errors
    /// [`KeyError::Refused`] naming what was found, when that is not such a key; [`KeyError::Malformed`] when it should be but cannot be decoded.
    pub fn from_pem(text: &str) -> Result<Self, KeyError> {
        let block = key_block(text)?;
        match block.label {
            "PUBLIC KEY" => {}
            PKCS8_LABEL | SEC1_LABEL | "ENCRYPTED PRIVATE KEY" => {
                return Err(refused("a private key, where the public one is needed"));
            }
            other => return Err(refused(label_in_words(other))),
        }
        // Not a secret, but the same decoder serves.
        let (_, document) = SecretDocument::from_pem(block.text).map_err(malformed)?;
        let info = SubjectPublicKeyInfoRef::from_der(document.as_bytes()).map_err(malformed)?;
        Ok(Self(match curve_of(&info.algorithm)? {
            Curve::P256 => PublicKind::P256(info.try_into().map_err(malformed)?),
            Curve::P384 => PublicKind::P384(info.try_into().map_err(malformed)?),
        }))
    }

    /// The key as SubjectPublicKeyInfo PEM: lines of 64 columns ended by LF, the point uncompressed.
    ///
    /// Equal keys have equal text, whatever the file they were read from looked like: [`PublicKey::hint`] is the digest of it.
    pub fn to_pem(&self) -> String {
        match &self.0 {
            PublicKind::P256(key) => key.to_public_key_pem(LineEnding::LF),
            PublicKind::P384(key) => key.to_public_key_pem(LineEnding::LF),
        }
        .expect("a key of fixed size fits its encoding")
    }

    /// The curve it lies on.
    pub fn curve(&self) -> Curve {
        match self.0 {
            PublicKind::P256(_) => Curve::P256,
            PublicKind::P384(_) => Curve::P384,
        }
    }

    /// The digest by which a signature names its key: SHA-256 of [`PublicKey::to_pem`].
    pub fn hint(&self) -> Sha256 {
        Sha256::of(self.to_pem().as_bytes())
    }

    /// Whether `signature`, ASN.1 DER, was made over `message` by this key's private half.
    pub fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
        match &self.0 {
            PublicKind::P256(key) => p256::ecdsa::DerSignature::from_bytes(signature)
                .is_ok_and(|signature| key.verify(message, &signature).is_ok()),
            PublicKind::P384(key) => p384::ecdsa::DerSignature::from_bytes(signature)
                .is_ok_and(|signature| key.verify(message, &signature).is_ok()),
        }
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({}, {})", self.curve(), self.hint())
    }
}

/// Where a pair of keys is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyPairPaths {
    /// The private key's file.
    pub private: PathBuf,
    /// The public key's file.
    pub public: PathBuf,
}

impl KeyPairPaths {
    /// `<name>.pem` and `<name>.pub.pem`; a `name` that ends in `.pem` already is taken without it.
    pub fn named(name: &Path) -> Self {
        let stem = match name.extension() {
            Some(extension) if extension == "pem" => name.with_extension(""),
            _ => name.to_owned(),
        };
        let with = |suffix: &str| {
            let mut path = stem.clone().into_os_string();
            path.push(suffix);
            PathBuf::from(path)
        };
        Self {
            private: with(".pem"),
            public: with(".pub.pem"),
        }
    }
}

/// Why a key cannot be read, made or written.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum KeyError {
    /// A file cannot be read or written.
    #[error("cannot read or write `{}`", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The operating system's answer.
        #[source]
        source: io::Error,
    },
    /// A key file is already there, and may be the only copy of a key.
    #[error("`{}` exists, and a key is never overwritten", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// Something else than an unencrypted ECDSA key on P-256 or P-384.
    #[error(
        "{}found {found}; only unencrypted ECDSA keys on P-256 or P-384 can be used",
        at(path)
    )]
    Refused {
        /// The file, when it came from one.
        path: Option<PathBuf>,
        /// What it holds.
        found: String,
    },
    /// A key of the right kind that cannot be decoded.
    #[error("{}the key cannot be decoded: {problem}", at(path))]
    Malformed {
        /// The file, when it came from one.
        path: Option<PathBuf>,
        /// The decoder's words.
        problem: String,
    },
    /// The operating system's random number generator failed.
    #[error("the operating system has no randomness to make a key from")]
    NoRandomness {
        /// Its answer.
        #[source]
        source: io::Error,
    },
}

impl KeyError {
    /// The same error, with the file it was found in.
    fn at(mut self, file: &Path) -> Self {
        if let Self::Refused { path, .. } | Self::Malformed { path, .. } = &mut self {
            *path = Some(file.to_owned());
        }
        self
    }
}

fn at(path: &Option<PathBuf>) -> String {
    path.as_ref()
        .map_or_else(String::new, |path| format!("`{}`: ", path.display()))
}

fn refused(found: impl Into<String>) -> KeyError {
    KeyError::Refused {
        path: None,
        found: found.into(),
    }
}

fn malformed(problem: impl fmt::Display) -> KeyError {
    KeyError::Malformed {
        path: None,
        problem: problem.to_string(),
    }
}

/// One PEM block and its label.
struct Block<'a> {
    label: &'a str,
    text: &'a str,
}

/// The first PEM block of `text` that is not `EC PARAMETERS`.
fn key_block(text: &str) -> Result<Block<'_>, KeyError> {
    const BEGIN: &str = "-----BEGIN ";
    const DASHES: &str = "-----";
    let mut rest = text;
    while let Some(begin) = rest.find(BEGIN) {
        let block = &rest[begin..];
        let Some((label, _)) = block[BEGIN.len()..].split_once(DASHES) else {
            break;
        };
        let end = format!("-----END {label}-----");
        let Some(length) = block.find(&end).map(|at| at + end.len()) else {
            return Err(malformed(format_args!("`{label}` has no end line")));
        };
        if label != "EC PARAMETERS" {
            return Ok(Block {
                label,
                text: &block[..length],
            });
        }
        rest = &block[length..];
    }
    Err(refused("no PEM block"))
}

/// What a PEM block of this label holds, for a reader who may have given the wrong file.
fn label_in_words(label: &str) -> String {
    match label {
        "RSA PRIVATE KEY" | "RSA PUBLIC KEY" => "an RSA key".to_owned(),
        "DSA PRIVATE KEY" => "a DSA key".to_owned(),
        "OPENSSH PRIVATE KEY" => "an OpenSSH key".to_owned(),
        "CERTIFICATE" => "a certificate".to_owned(),
        other => format!("a PEM block `{}`", shown(other)),
    }
}

/// The curve that a PKCS#8 or SPKI key claims to lie on.
fn curve_of(algorithm: &AlgorithmIdentifierRef<'_>) -> Result<Curve, KeyError> {
    match algorithm.oid.to_string().as_str() {
        "1.2.840.10045.2.1" => match algorithm.parameters_oid() {
            Ok(oid) => curve_named(oid),
            Err(_) => Err(refused("an EC key that does not name its curve")),
        },
        "1.3.101.112" => Err(refused("an Ed25519 key")),
        "1.3.101.113" => Err(refused("an Ed448 key")),
        "1.3.101.110" | "1.3.101.111" => Err(refused("a key for key agreement, X25519 or X448")),
        "1.2.840.113549.1.1.1" | "1.2.840.113549.1.1.10" => Err(refused("an RSA key")),
        "1.2.840.10040.4.1" => Err(refused("a DSA key")),
        other => Err(refused(format!("a key of algorithm {other}"))),
    }
}

/// The curve of a named-curve identifier.
fn curve_named(oid: ObjectIdentifier) -> Result<Curve, KeyError> {
    match oid.to_string().as_str() {
        "1.2.840.10045.3.1.7" => Ok(Curve::P256),
        "1.3.132.0.34" => Ok(Curve::P384),
        "1.3.132.0.35" => Err(refused("a key on the curve P-521")),
        "1.3.132.0.33" => Err(refused("a key on the curve P-224")),
        "1.3.132.0.10" => Err(refused("a key on the curve secp256k1")),
        other => Err(refused(format!("a key on the curve {other}"))),
    }
}

fn read_text(path: &Path) -> Result<Zeroizing<String>, KeyError> {
    let io_error = |source| KeyError::Io {
        path: path.to_owned(),
        source,
    };
    // Room for all of it at once: a growing buffer would leave copies of the secret behind.
    let mut text = Zeroizing::new(String::with_capacity(LONGEST_FILE + 1));
    File::open(path)
        .map_err(io_error)?
        .take(LONGEST_FILE as u64 + 1)
        .read_to_string(&mut text)
        .map_err(|error| match error.kind() {
            io::ErrorKind::InvalidData => refused("a file that is not text").at(path),
            _ => io_error(error),
        })?;
    if text.len() > LONGEST_FILE {
        return Err(refused("a file too long for a key").at(path));
    }
    Ok(text)
}

/// Creates `path` with `bytes`; the umask may take bits off `mode`, and never adds any.
fn write_new(path: &Path, bytes: &[u8], mode: u32) -> Result<(), KeyError> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, mode);
    #[cfg(not(unix))]
    let _ = mode;
    let mut file = options.open(path).map_err(|source| match source.kind() {
        io::ErrorKind::AlreadyExists => KeyError::Exists {
            path: path.to_owned(),
        },
        _ => KeyError::Io {
            path: path.to_owned(),
            source,
        },
    })?;
    file.write_all(bytes)
        .and_then(|()| file.sync_all())
        .map_err(|source| {
            // Half a key is of no use, and it is this call's own.
            let _ = fs::remove_file(path);
            KeyError::Io {
                path: path.to_owned(),
                source,
            }
        })
}

const PKCS8_LABEL: &str = "PRIVATE KEY";
const SEC1_LABEL: &str = "EC PRIVATE KEY";

/// Longest key file read, in bytes: a P-384 key with its parameters and remarks has well under 4 KiB.
const LONGEST_FILE: usize = 1 << 16;

#[cfg(test)]
#[path = "keys_tests.rs"]
mod tests;
