//! Verification: whether files are those that the owner of a key signed.
//!
//! In: a directory or a file, its signature, and a public key that the user trusts. Out: a [`Verified`], which nothing else
//! makes, or every file that is missing, extra or changed. Without a key, [`check_manifest`] compares files with the manifest
//! beside them; that finds damage, not deceit, as whoever changed the files could have changed the manifest.
//!
//! Nothing in a signature is believed before the key has verified it, and then only what a verifier must check anyway: names
//! that stay inside, one digest per name, a list of ignored names no longer than the usual one. Signatures by model-signing's
//! `sign key` verify too.
//!
//! What is verified is what was read. A file changed afterwards is no longer verified, and nothing here says that a signed
//! checkpoint is safe to use: a signature proves origin.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use panacea_formats::Sha256;
use thiserror::Error;

use super::bundle::{Bundle, BundleError, OpenError};
use super::keys::PublicKey;
use super::signature::{
    Claim, ClaimError, Contents, MANIFEST_NAME, SIGNATURE_NAME, ignored_by_default, manifest_path,
    name_inside, signature_path,
};
use super::statement::{Statement, StatementError};
use super::tree::{self, FileDigest, FileName, TreeError};

/// Verifies `target`, a directory or a file, with `key`; `signature` is where its signature is, if not at its usual place.
///
/// Reads every file once. Where there is a manifest, its subjects are compared with the files, too.
///
/// # Errors
/// [`VerifyError`]; [`VerifyError::FilesDiffer`] lists all files that differ, not just the first.
pub fn verify(
    target: &Path,
    signature: Option<&Path>,
    key: &PublicKey,
) -> Result<Verified, VerifyError> {
    let is_directory = is_directory(target)?;
    let usual_place = signature_path(target);
    let path = signature.unwrap_or(&usual_place);
    let claim = open_signature(path, target, key)?;
    let other_kind = |signed, given| VerifyError::OtherKind {
        path: path.to_owned(),
        signed,
        given,
    };
    let found = match claim.contents {
        Contents::Directory { files, ignored } if is_directory => {
            verify_directory(target, path, &files, ignored)?
        }
        Contents::File { digest, manifest } if !is_directory => {
            verify_file(target, digest, manifest)?
        }
        Contents::Directory { .. } => return Err(other_kind("a directory", "a file")),
        Contents::File { .. } => return Err(other_kind("a single file", "a directory")),
    };
    Ok(Verified {
        key: key.hint(),
        name: claim.name,
        files: found.files,
        manifest: found.manifest,
        unsigned_manifest: found.unsigned_manifest,
    })
}

/// A checkpoint whose every file is as the owner of a key signed it, when it was read.
#[derive(Debug)]
pub struct Verified {
    key: Sha256,
    name: String,
    files: Vec<FileDigest>,
    manifest: Option<Statement>,
    unsigned_manifest: bool,
}

impl Verified {
    /// The digest that names the key, as in [`PublicKey::hint`].
    pub fn key(&self) -> Sha256 {
        self.key
    }

    /// What the checkpoint was called when it was signed; it may have been renamed since.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Every file signed, by its name on disk.
    pub fn files(&self) -> &[FileDigest] {
        &self.files
    }

    /// The manifest, if there is one and the signature covers it.
    pub fn manifest(&self) -> Option<&Statement> {
        self.manifest.as_ref()
    }

    /// Whether a manifest stands beside the file that agrees with it, but that the signature does not cover: anyone may have written it.
    pub fn has_unsigned_manifest(&self) -> bool {
        self.unsigned_manifest
    }

    /// The signed files, besides the manifest itself, that the manifest does not speak of: added between patching and signing.
    pub fn beyond_manifest(&self) -> Vec<&FileName> {
        let Some(manifest) = &self.manifest else {
            return Vec::new();
        };
        if let ([_], [_]) = (self.files.as_slice(), manifest.subjects()) {
            // One file, one subject: they agree whatever they are called.
            return Vec::new();
        }
        self.files
            .iter()
            .map(|file| &file.name)
            .filter(|name| name.as_str() != MANIFEST_NAME)
            .filter(|name| !manifest.subjects().iter().any(|s| s.name == **name))
            .collect()
    }
}

/// A checkpoint whose files agree with a manifest that nobody has vouched for.
#[derive(Debug)]
pub struct OriginUnproven {
    manifest: Statement,
}

impl OriginUnproven {
    /// What the manifest says; anyone may have written it.
    pub fn manifest(&self) -> &Statement {
        &self.manifest
    }
}

/// Compares the files at `target` with the manifest in or beside it, with no signature and no key.
///
/// In a directory every file must be a subject of the manifest, but the manifest itself, `model.sig` and the repository's own files.
///
/// # Errors
/// [`VerifyError`]; [`VerifyError::FilesDiffer`] lists all files that differ, not just the first.
pub fn check_manifest(target: &Path) -> Result<OriginUnproven, VerifyError> {
    let is_directory = is_directory(target)?;
    let path = manifest_path(target);
    let Some(bytes) = read_bounded(&path)? else {
        return Err(VerifyError::NoManifest { path });
    };
    if !is_directory {
        let file = FileDigest {
            name: name_of(target),
            digest: tree::hash_file(target)?,
        };
        let manifest = parse_single(&path, &bytes, &file)?;
        return Ok(OriginUnproven { manifest });
    }
    let manifest = parse_manifest(&path, &bytes)?;
    let mut ignored = ignored_by_default(Some(fixed(SIGNATURE_NAME)));
    ignored.push(fixed(MANIFEST_NAME));
    let found = tree::hash_directory(target, &ignored)?;
    Differences::between(manifest.subjects(), &found).or_refuse(Against::Manifest)?;
    Ok(OriginUnproven { manifest })
}

/// What of the files at hand is not as it should be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Differences {
    /// Files that should be there and are not.
    pub missing: Vec<FileName>,
    /// Files that are there and should not.
    pub extra: Vec<FileName>,
    /// Files with other bytes than they should have.
    pub changed: Vec<Changed>,
}

/// A file with other bytes than it should have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Changed {
    /// The file.
    pub name: FileName,
    /// The digest it should have.
    pub expected: Sha256,
    /// The digest it has.
    pub found: Sha256,
}

impl Differences {
    /// Compares `found` with `expected`; each names no file twice. The lists are sorted by name.
    fn between(expected: &[FileDigest], found: &[FileDigest]) -> Self {
        let mut unmatched: BTreeMap<_, _> = found.iter().map(|f| (&f.name, f.digest)).collect();
        let mut differences = Self::default();
        for FileDigest { name, digest } in expected {
            match unmatched.remove(name) {
                None => differences.missing.push(name.clone()),
                Some(found) if found != *digest => differences.changed.push(Changed {
                    name: name.clone(),
                    expected: *digest,
                    found,
                }),
                Some(_) => {}
            }
        }
        differences.extra = unmatched.into_keys().cloned().collect();
        differences.missing.sort();
        differences.changed.sort_by(|a, b| a.name.cmp(&b.name));
        differences
    }

    fn or_refuse(self, against: Against) -> Result<(), VerifyError> {
        if self == Self::default() {
            return Ok(());
        }
        Err(VerifyError::FilesDiffer {
            against,
            differences: self,
        })
    }
}

impl fmt::Display for Differences {
    /// `changed: `a`, `b`; missing: `c``, every file by its name.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let changed: Vec<_> = self.changed.iter().map(|changed| &changed.name).collect();
        let missing: Vec<_> = self.missing.iter().collect();
        let extra: Vec<_> = self.extra.iter().collect();
        let mut separator = "";
        for (what, names) in [("changed", changed), ("missing", missing), ("extra", extra)] {
            if names.is_empty() {
                continue;
            }
            write!(f, "{separator}{what}: ")?;
            for (index, name) in names.iter().enumerate() {
                let comma = if index == 0 { "" } else { ", " };
                write!(f, "{comma}`{name}`")?;
            }
            separator = "; ";
        }
        Ok(())
    }
}

/// What files were compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Against {
    /// A signature, which the key verifies.
    Signature,
    /// The manifest in or beside the checkpoint.
    Manifest,
}

impl fmt::Display for Against {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Signature => "signature",
            Self::Manifest => "manifest",
        })
    }
}

/// Why a checkpoint is not verified.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum VerifyError {
    /// There is no signature.
    #[error("there is no signature at `{}`", path.display())]
    NoSignature {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// There is no manifest.
    #[error("there is no manifest at `{}`", path.display())]
    NoManifest {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// The checkpoint, its signature or its manifest cannot be read.
    #[error("cannot read `{}`", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The operating system's answer.
        #[source]
        source: io::Error,
    },
    /// A signature or manifest is too long to be one.
    #[error("`{}` is longer than {LONGEST_FILE} bytes, the most that is read", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
    },
    /// The checkpoint's files cannot be listed and hashed.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// The signature file is not one that this program understands.
    #[error("`{}` is not a signature that can be verified", path.display())]
    MalformedSignature {
        /// The signature's file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: BundleError,
    },
    /// The signature was made with another key.
    #[error("`{}` names the key {named}, and the key given is {given}", path.display())]
    ForeignKey {
        /// The signature's file.
        path: PathBuf,
        /// The key that the signature says made it.
        named: Sha256,
        /// The key given.
        given: Sha256,
    },
    /// The key given did not make this signature over this content.
    #[error("the signature in `{}` is invalid for the key {key}", path.display())]
    InvalidSignature {
        /// The signature's file.
        path: PathBuf,
        /// The key given.
        key: Sha256,
    },
    /// The key's owner signed something that is refused all the same.
    #[error("the statement signed in `{}` is refused", path.display())]
    MalformedClaim {
        /// The signature's file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: ClaimError,
    },
    /// A file's signature was given for a directory, or the other way round.
    #[error("`{}` signs {signed}, and {given} is given", path.display())]
    OtherKind {
        /// The signature's file.
        path: PathBuf,
        /// What it signs.
        signed: &'static str,
        /// What is given.
        given: &'static str,
    },
    /// The manifest is not one that this program understands.
    #[error("the manifest `{}` is refused", path.display())]
    MalformedManifest {
        /// The manifest's file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: StatementError,
    },
    /// The manifest of a single file speaks of several.
    #[error("`{}` stands beside a single file and names {found} files", path.display())]
    ManifestOfMany {
        /// The manifest's file.
        path: PathBuf,
        /// How many files the manifest names.
        found: usize,
    },
    /// The files are not those that were signed, or that the manifest names.
    #[error("the files are not as the {against} has them: {differences}")]
    FilesDiffer {
        /// What they were compared with.
        against: Against,
        /// Every file that differs.
        differences: Differences,
    },
}

/// What verification found at a target, for [`Verified`].
struct Files {
    files: Vec<FileDigest>,
    manifest: Option<Statement>,
    unsigned_manifest: bool,
}

/// What the signature at `path` says about `target`, once `key` has verified it.
fn open_signature(path: &Path, target: &Path, key: &PublicKey) -> Result<Claim, VerifyError> {
    let bytes = read_bounded(path)?.ok_or_else(|| VerifyError::NoSignature {
        path: path.to_owned(),
    })?;
    let bundle = Bundle::parse(&bytes).map_err(|source| VerifyError::MalformedSignature {
        path: path.to_owned(),
        source,
    })?;
    let payload = bundle.open(key).map_err(|error| match error {
        OpenError::ForeignKey { named, given } => VerifyError::ForeignKey {
            path: path.to_owned(),
            named,
            given,
        },
        OpenError::Invalid { given } => VerifyError::InvalidSignature {
            path: path.to_owned(),
            key: given,
        },
    })?;
    // A signature copied out of its directory still leaves its old name out.
    let mut may_ignore = ignored_by_default(Some(fixed(SIGNATURE_NAME)));
    may_ignore.extend(name_inside(target, path));
    Claim::parse(payload, &may_ignore).map_err(|source| VerifyError::MalformedClaim {
        path: path.to_owned(),
        source,
    })
}

fn verify_directory(
    target: &Path,
    signature: &Path,
    signed: &[FileDigest],
    mut ignored: Vec<FileName>,
) -> Result<Files, VerifyError> {
    ignored.extend(name_inside(target, signature));
    let found = tree::hash_directory(target, &ignored)?;
    Differences::between(signed, &found).or_refuse(Against::Signature)?;
    Ok(Files {
        manifest: manifest_among(target, &found)?,
        files: found,
        unsigned_manifest: false,
    })
}

fn verify_file(
    target: &Path,
    signed: Sha256,
    signed_manifest: Option<Sha256>,
) -> Result<Files, VerifyError> {
    let file = FileDigest {
        name: name_of(target),
        digest: tree::hash_file(target)?,
    };
    let path = manifest_path(target);
    let manifest = read_bounded(&path)?;
    let manifest_file = |digest| FileDigest {
        name: name_of(&path),
        digest,
    };
    let mut expected = vec![FileDigest {
        digest: signed,
        ..file.clone()
    }];
    let mut found = vec![file.clone()];
    if let Some(digest) = signed_manifest {
        expected.push(manifest_file(digest));
        found.extend(
            manifest
                .as_deref()
                .map(|bytes| manifest_file(Sha256::of(bytes))),
        );
    }
    Differences::between(&expected, &found).or_refuse(Against::Signature)?;
    let manifest = manifest
        .map(|bytes| parse_single(&path, &bytes, &file))
        .transpose()?;
    let is_signed = signed_manifest.is_some();
    Ok(Files {
        files: vec![file],
        unsigned_manifest: manifest.is_some() && !is_signed,
        manifest: manifest.filter(|_| is_signed),
    })
}

/// The digest of the manifest beside the file `target`, whose own digest is `digest`, if there is one and it speaks of this file.
///
/// # Errors
/// [`VerifyError::FilesDiffer`] when it speaks of another file; when it cannot be read.
pub(super) fn manifest_beside(
    target: &Path,
    digest: Sha256,
) -> Result<Option<Sha256>, VerifyError> {
    let path = manifest_path(target);
    let Some(bytes) = read_bounded(&path)? else {
        return Ok(None);
    };
    let name = name_of(target);
    parse_single(&path, &bytes, &FileDigest { name, digest })?;
    Ok(Some(Sha256::of(&bytes)))
}

/// The manifest among `files`, which were found in the directory `target`, if there is one and they are as it says.
///
/// Files that it does not name are no contradiction: they can have been added before the signature was made.
///
/// # Errors
/// [`VerifyError::FilesDiffer`] when a file it names is missing or changed; when the manifest itself cannot be read.
pub(super) fn manifest_among(
    target: &Path,
    files: &[FileDigest],
) -> Result<Option<Statement>, VerifyError> {
    let Some(listed) = files.iter().find(|f| f.name.as_str() == MANIFEST_NAME) else {
        return Ok(None);
    };
    let path = manifest_path(target);
    let bytes = read_bounded(&path)?.unwrap_or_default();
    // It was hashed a while ago: what is parsed must be what was hashed.
    let read = FileDigest {
        name: listed.name.clone(),
        digest: Sha256::of(&bytes),
    };
    let listed = std::slice::from_ref(listed);
    Differences::between(listed, &[read]).or_refuse(Against::Signature)?;
    let manifest = parse_manifest(&path, &bytes)?;
    let mut differences = Differences::between(manifest.subjects(), files);
    differences.extra.clear();
    differences.or_refuse(Against::Manifest)?;
    Ok(Some(manifest))
}

/// The manifest at `path` with these `bytes`, if it speaks of `file` alone, under whatever name.
fn parse_single(path: &Path, bytes: &[u8], file: &FileDigest) -> Result<Statement, VerifyError> {
    let manifest = parse_manifest(path, bytes)?;
    let [subject] = manifest.subjects() else {
        return Err(VerifyError::ManifestOfMany {
            path: path.to_owned(),
            found: manifest.subjects().len(),
        });
    };
    let expected = FileDigest {
        name: file.name.clone(),
        digest: subject.digest,
    };
    Differences::between(&[expected], std::slice::from_ref(file)).or_refuse(Against::Manifest)?;
    Ok(manifest)
}

fn parse_manifest(path: &Path, bytes: &[u8]) -> Result<Statement, VerifyError> {
    Statement::parse(bytes).map_err(|source| VerifyError::MalformedManifest {
        path: path.to_owned(),
        source,
    })
}

/// The bytes of a signature or manifest; `None` when there is no file at `path`.
fn read_bounded(path: &Path) -> Result<Option<Vec<u8>>, VerifyError> {
    let io_error = |source| VerifyError::Io {
        path: path.to_owned(),
        source,
    };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io_error(error)),
    };
    let mut bytes = Vec::new();
    file.take(LONGEST_FILE + 1)
        .read_to_end(&mut bytes)
        .map_err(io_error)?;
    if bytes.len() as u64 > LONGEST_FILE {
        return Err(VerifyError::TooLong {
            path: path.to_owned(),
        });
    }
    Ok(Some(bytes))
}

fn is_directory(target: &Path) -> Result<bool, VerifyError> {
    fs::metadata(target)
        .map(|metadata| metadata.is_dir())
        .map_err(|source| VerifyError::Io {
            path: target.to_owned(),
            source,
        })
}

/// The last part of `path`, made showable where it is not: nothing is looked up by it.
fn name_of(path: &Path) -> FileName {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let showable: String = name
        .chars()
        .map(|c| if c.is_control() || c == '\\' { '_' } else { c })
        .collect();
    showable.parse().unwrap_or_else(|_| fixed("file"))
}

fn fixed(name: &str) -> FileName {
    name.parse().expect("the names are fixed and plain")
}

/// Longest signature or manifest read, in bytes: room for half a million files, some hundred bytes each.
const LONGEST_FILE: u64 = 1 << 27;

#[cfg(test)]
#[path = "verify_tests.rs"]
mod tests;
