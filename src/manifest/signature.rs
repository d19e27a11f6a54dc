//! The signature: which files are there, signed with a key.
//!
//! In: the digests of a directory's files, or of a single file and the manifest beside it, and a private key. Out: the bytes of
//! `model.sig`, an OpenSSF Model Signing v1.0 signature that `model_signing verify key` accepts.
//!
//! A single file is signed under the name `.`, as model-signing does, so renaming it breaks nothing. Its manifest cannot be a
//! resource of that signature; its digest stands in a field `panacea` of the predicate, which other verifiers pass over.
//!
//! Source: `docs/model_signing_format.md` of <https://github.com/sigstore/model-transparency>, and model-signing 1.1.1.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use panacea_formats::json::JsonError;
use panacea_formats::{Hasher, Sha256, shown};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::bundle::Bundle;
use super::json;
use super::keys::PrivateKey;
use super::statement::STATEMENT_TYPE;
use super::tree::{self, FileDigest, FileName, FileNameError, TreeError};
use super::verify::{self, VerifyError};

/// A signature just made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signature(Bundle);

impl Signature {
    /// Hashes and signs what is at `target`: every file of a directory, or one file with the manifest beside it, if there is one.
    ///
    /// `signature_path` is where the signature will be; inside a directory it is left out of what is signed, and so are the
    /// repository's own files (`.git`, `.gitattributes`, `.github`, `.gitignore`).
    ///
    /// # Errors
    /// [`SignError`] when the files cannot be hashed, there are none, or they are not as the manifest says: verification would
    /// refuse such a signature.
    pub fn of(target: &Path, signature_path: &Path, key: &PrivateKey) -> Result<Self, SignError> {
        let unreadable = |source| TreeError::Io {
            path: target.to_owned(),
            source,
        };
        let resolved = target.canonicalize().map_err(unreadable)?;
        let name = resolved
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if fs::metadata(target).map_err(unreadable)?.is_dir() {
            let ignored = ignored_by_default(name_inside(target, signature_path));
            let files = tree::hash_directory(target, &ignored)?;
            verify::manifest_among(target, &files)?;
            Self::of_directory(&name, files, ignored, key)
        } else {
            let digest = tree::hash_file(target)?;
            let manifest = verify::manifest_beside(target, digest)?;
            Ok(Self::of_file(&name, digest, manifest, key))
        }
    }

    /// Signs a directory whose files have been hashed already; `name` tells people which checkpoint it is.
    ///
    /// `files` are all its files but those within `ignored`, the manifest included. For a signature that stands at `model.sig`
    /// in it, [`ignored_by_default`] gives the names to leave out.
    ///
    /// # Errors
    /// [`SignError::NoFiles`] or [`SignError::DuplicateName`].
    pub fn of_directory(
        name: &str,
        mut files: Vec<FileDigest>,
        ignored: Vec<FileName>,
        key: &PrivateKey,
    ) -> Result<Self, SignError> {
        if files.is_empty() {
            return Err(SignError::NoFiles {
                name: name.to_owned(),
            });
        }
        files.sort_by(|a, b| a.name.cmp(&b.name));
        if let Some(pair) = files.windows(2).find(|pair| pair[0].name == pair[1].name) {
            return Err(SignError::DuplicateName {
                name: pair[0].name.clone(),
            });
        }
        let claim = Claim {
            name: name.to_owned(),
            contents: Contents::Directory { files, ignored },
        };
        Ok(Self(Bundle::seal(claim.to_json().into_bytes(), key)))
    }

    /// Signs a single file that has been hashed already; `manifest` is the digest of the manifest beside it.
    pub fn of_file(name: &str, digest: Sha256, manifest: Option<Sha256>, key: &PrivateKey) -> Self {
        let claim = Claim {
            name: name.to_owned(),
            contents: Contents::File { digest, manifest },
        };
        Self(Bundle::seal(claim.to_json().into_bytes(), key))
    }

    /// The text of the signature file: one line of JSON. The same files and key give the same text.
    pub fn to_json(&self) -> String {
        self.0.to_json()
    }
}

/// Why something cannot be signed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SignError {
    /// Its files cannot be listed and hashed.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// There is nothing to sign.
    #[error("`{}` has no files to sign", shown(name))]
    NoFiles {
        /// The directory.
        name: String,
    },
    /// Two digests are given for one file.
    #[error("`{name}` would be signed twice")]
    DuplicateName {
        /// The file.
        name: FileName,
    },
    /// The manifest cannot be read, or the files are not as it says.
    #[error(transparent)]
    Manifest(#[from] VerifyError),
}

/// Where the manifest of the checkpoint at `target` is: in a directory, or beside a file.
pub fn manifest_path(target: &Path) -> PathBuf {
    if target.is_dir() {
        target.join(MANIFEST_NAME)
    } else {
        beside(target, ".manifest.json")
    }
}

/// Where the signature of the checkpoint at `target` is unless the user says otherwise: in a directory, or beside a file.
pub fn signature_path(target: &Path) -> PathBuf {
    if target.is_dir() {
        target.join(SIGNATURE_NAME)
    } else {
        beside(target, ".sig")
    }
}

/// The names that a signature of a directory leaves out: the repository's own files, and the signature itself where it is inside.
pub fn ignored_by_default(signature: Option<FileName>) -> Vec<FileName> {
    let mut ignored: Vec<FileName> = IGNORED
        .iter()
        .map(|name| name.parse().expect("the names are fixed and plain"))
        .chain(signature)
        .collect();
    ignored.sort();
    ignored.dedup();
    ignored
}

/// What a signature says about a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Claim {
    /// The checkpoint's name when it was signed; nothing depends on it.
    pub(super) name: String,
    pub(super) contents: Contents,
}

/// The files a signature covers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Contents {
    /// All files of a directory but those within the ignored names; not empty, no name twice.
    Directory {
        files: Vec<FileDigest>,
        ignored: Vec<FileName>,
    },
    /// One file, whatever its name, and the manifest that stood beside it.
    File {
        digest: Sha256,
        manifest: Option<Sha256>,
    },
}

impl Claim {
    fn to_json(&self) -> String {
        let resource = |name: &str, digest| ResourceText {
            name: name.to_owned(),
            algorithm: HASH.to_owned(),
            digest,
        };
        let (resources, ignored, panacea) = match &self.contents {
            Contents::Directory { files, ignored } => (
                files
                    .iter()
                    .map(|file| resource(file.name.as_str(), file.digest))
                    .collect(),
                ignored.clone(),
                None,
            ),
            Contents::File { digest, manifest } => (
                vec![resource(SINGLE_FILE, *digest)],
                ignored_by_default(None),
                manifest.map(|sha256| PanaceaText {
                    manifest: DigestText { sha256 },
                }),
            ),
        };
        let text = ClaimText {
            statement_type: STATEMENT_TYPE.to_owned(),
            subject: vec![SubjectText {
                name: self.name.clone(),
                digest: DigestText {
                    sha256: root(&resources),
                },
            }],
            predicate_type: PREDICATE_TYPE.to_owned(),
            predicate: PredicateText {
                serialization: SerializationText {
                    method: METHOD.to_owned(),
                    hash_type: HASH.to_owned(),
                    allow_symlinks: false,
                    ignore_paths: ignored.iter().map(ToString::to_string).collect(),
                },
                resources,
                panacea,
            },
        };
        serde_json::to_string(&text).expect("strings and lists of strings are always JSON")
    }

    /// Reads the payload of a signature that has been verified.
    ///
    /// Nothing here knows where the signature came from, so `may_ignore` decides which names it may leave out.
    ///
    /// # Errors
    /// [`ClaimError`] saying what is not as the format, or this program, has it.
    pub(super) fn parse(bytes: &[u8], may_ignore: &[FileName]) -> Result<Self, ClaimError> {
        let not_json = |source| ClaimError::Json { source };
        let text = json::Text::parse(bytes).map_err(not_json)?;
        for (field, expected) in [("_type", STATEMENT_TYPE), ("predicateType", PREDICATE_TYPE)] {
            let found = text.value.get(field).and_then(|found| found.as_str());
            if found != Some(expected) {
                return Err(ClaimError::Type {
                    field,
                    expected,
                    found: found.unwrap_or("none").to_owned(),
                });
            }
        }
        let text: ClaimText = text.decode().map_err(not_json)?;
        let [subject] = text.subject.as_slice() else {
            return Err(ClaimError::Subjects {
                found: text.subject.len(),
            });
        };
        let serialization = text.predicate.serialization;
        for (field, found, expected) in [
            ("method", &serialization.method, METHOD),
            ("hash_type", &serialization.hash_type, HASH),
        ] {
            if found != expected {
                return Err(ClaimError::Method {
                    field,
                    expected,
                    found: found.clone(),
                });
            }
        }
        if serialization.allow_symlinks {
            return Err(ClaimError::Symlinks);
        }
        let resources = text.predicate.resources;
        for resource in &resources {
            if resource.algorithm != HASH {
                return Err(ClaimError::Method {
                    field: "algorithm",
                    expected: HASH,
                    found: resource.algorithm.clone(),
                });
            }
        }
        let computed = root(&resources);
        if subject.digest.sha256 != computed {
            return Err(ClaimError::Root {
                claimed: subject.digest.sha256,
                computed,
            });
        }
        let ignored = serialization
            .ignore_paths
            .into_iter()
            .map(|name| {
                name.parse()
                    .ok()
                    .filter(|name| may_ignore.contains(name))
                    .ok_or(ClaimError::Ignored { name })
            })
            .collect::<Result<_, _>>()?;
        let contents = match resources.as_slice() {
            [] => return Err(ClaimError::NoResource),
            [only] if only.name == SINGLE_FILE => Contents::File {
                digest: only.digest,
                manifest: text.predicate.panacea.map(|bound| bound.manifest.sha256),
            },
            _ => Contents::Directory {
                files: named(resources)?,
                ignored,
            },
        };
        Ok(Self {
            name: subject.name.clone(),
            contents,
        })
    }
}

/// Why the payload of a valid signature is refused all the same.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ClaimError {
    /// It is not JSON, names a key twice, or a field is missing or of the wrong kind.
    #[error("what is signed is not the JSON it should be")]
    Json {
        /// What is wrong, and where.
        #[source]
        source: JsonError,
    },
    /// It is signed, but not as a model's signature.
    #[error(
        "the signed `{field}` is `{}`, and only `{expected}` is understood",
        shown(found)
    )]
    Type {
        /// The field.
        field: &'static str,
        /// What it should be.
        expected: &'static str,
        /// What it is.
        found: String,
    },
    /// It speaks of no model, or of several.
    #[error("{found} subjects are signed, and there must be exactly one")]
    Subjects {
        /// How many.
        found: usize,
    },
    /// The files were hashed in a way that this program does not know.
    #[error(
        "the files were hashed with the {field} `{}`, and only `{expected}` is understood",
        shown(found)
    )]
    Method {
        /// The field.
        field: &'static str,
        /// What it should be.
        expected: &'static str,
        /// What it is.
        found: String,
    },
    /// Symbolic links were followed.
    #[error("symbolic links were followed when it was signed, and their targets are not bound")]
    Symlinks,
    /// The digest of the whole is not that of its parts.
    #[error("the signed root digest is {claimed}, and the listed files hash to {computed}")]
    Root {
        /// What it says.
        claimed: Sha256,
        /// What its files come to.
        computed: Sha256,
    },
    /// It covers no file.
    #[error("no file is signed")]
    NoResource,
    /// A file is listed under a name that could lead out of the directory.
    #[error("a signed name is refused")]
    Name {
        /// The name, and what is wrong with it.
        #[source]
        source: FileNameError,
    },
    /// A file is listed twice.
    #[error("`{name}` is signed twice")]
    DuplicateName {
        /// The file.
        name: FileName,
    },
    /// It leaves out more than the signature itself and the repository's own files.
    #[error(
        "the signature leaves out `{}`, which could hold anything",
        shown(name)
    )]
    Ignored {
        /// What it leaves out.
        name: String,
    },
}

/// The digest of a whole model: over the raw digests of its files, in the order listed.
fn root(resources: &[ResourceText]) -> Sha256 {
    let mut hasher = Hasher::new();
    for resource in resources {
        hasher.update(resource.digest.as_bytes());
    }
    hasher.finish()
}

/// The files listed, once their names are known to be proper and different.
fn named(resources: Vec<ResourceText>) -> Result<Vec<FileDigest>, ClaimError> {
    let mut seen = HashSet::new();
    let mut files = Vec::new();
    for resource in resources {
        let name: FileName = resource
            .name
            .parse()
            .map_err(|source| ClaimError::Name { source })?;
        if !seen.insert(name.clone()) {
            return Err(ClaimError::DuplicateName { name });
        }
        files.push(FileDigest {
            name,
            digest: resource.digest,
        });
    }
    Ok(files)
}

/// The name of `path` relative to the directory `root`, if it lies in it.
///
/// `path` need not exist, the directory it is in must: a signature's own name is needed before it is written.
pub(super) fn name_inside(root: &Path, path: &Path) -> Option<FileName> {
    let root = root.canonicalize().ok()?;
    let directory = match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => return None,
    };
    let path = directory.canonicalize().ok()?.join(path.file_name()?);
    let relative = path.strip_prefix(&root).ok()?;
    let parts: Option<Vec<_>> = relative.iter().map(|part| part.to_str()).collect();
    parts?.join("/").parse().ok()
}

/// `path` with `suffix` after its whole name.
fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ClaimText {
    #[serde(rename = "_type")]
    statement_type: String,
    subject: Vec<SubjectText>,
    predicate_type: String,
    predicate: PredicateText,
}

#[derive(Serialize, Deserialize)]
struct SubjectText {
    name: String,
    digest: DigestText,
}

#[derive(Serialize, Deserialize)]
struct DigestText {
    sha256: Sha256,
}

#[derive(Serialize, Deserialize)]
struct PredicateText {
    serialization: SerializationText,
    resources: Vec<ResourceText>,
    #[serde(skip_serializing_if = "Option::is_none")]
    panacea: Option<PanaceaText>,
}

#[derive(Serialize, Deserialize)]
struct SerializationText {
    method: String,
    hash_type: String,
    allow_symlinks: bool,
    /// Left out by signers that ignore nothing.
    #[serde(default)]
    ignore_paths: Vec<String>,
}

#[derive(Serialize, Deserialize)]
struct ResourceText {
    name: String,
    algorithm: String,
    digest: Sha256,
}

#[derive(Serialize, Deserialize)]
struct PanaceaText {
    manifest: DigestText,
}

/// The manifest's name in a directory.
pub const MANIFEST_NAME: &str = "panacea.manifest.json";

/// The signature's name in a directory; model-signing's own default.
pub const SIGNATURE_NAME: &str = "model.sig";

/// What model-signing leaves out unless told otherwise, besides the signature.
const IGNORED: [&str; 4] = [".git", ".gitattributes", ".github", ".gitignore"];

/// The name model-signing gives a model that is a single file.
const SINGLE_FILE: &str = ".";

/// One digest per file, rather than per piece of a file.
const METHOD: &str = "files";

const HASH: &str = "sha256";

/// `predicateType` of a Model Signing v1.0 signature.
const PREDICATE_TYPE: &str = "https://model_signing/signature/v1.0";

#[cfg(test)]
#[path = "signature_tests.rs"]
mod tests;
