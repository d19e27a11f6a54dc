//! The files of a directory by name and digest: what a signature and a manifest speak about.
//!
//! In: a directory, and the names in it to leave out. Out: every other regular file with its SHA-256, sorted. Anything that is
//! neither a file nor a directory is refused, above all a symbolic link: what it leads to can change without a signed byte changing.
//!
//! Names taken from a signature or a manifest are compared with names found on disk and never joined to a path, so none of them
//! can make this program read outside the directory.

use std::cmp::Ordering;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use panacea_formats::{Sha256, shown};
use rayon::prelude::*;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use thiserror::Error;

/// The name of a file inside a checkpoint: relative, its parts joined by `/`, no part empty, `.` or `..`.
///
/// Names are ordered part by part, as the Model Signing format asks: `sub/b.json` comes before `sub.txt`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct FileName(String);

impl FileName {
    /// The name as a string.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether this is `other`, or lies in the directory `other`.
    pub fn is_within(&self, other: &Self) -> bool {
        self.0
            .strip_prefix(other.as_str())
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    }

    fn child(&self, part: &str) -> Result<Self, FileNameError> {
        format!("{self}/{part}").parse()
    }
}

impl FromStr for FileName {
    type Err = FileNameError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let refuse = |why| {
            Err(FileNameError {
                name: name.to_owned(),
                why,
            })
        };
        if name.contains('\\') {
            return refuse("it contains a backslash");
        }
        if name.chars().any(char::is_control) {
            return refuse("it contains a control character");
        }
        if name.starts_with('/') {
            return refuse("it is absolute");
        }
        for part in name.split('/') {
            match part {
                "" => return refuse("a part of it is empty"),
                "." | ".." => return refuse("a part of it is `.` or `..`"),
                _ => {}
            }
        }
        Ok(Self(name.to_owned()))
    }
}

impl Ord for FileName {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.split('/').cmp(other.0.split('/'))
    }
}

impl PartialOrd for FileName {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Display for FileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Serialize for FileName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for FileName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

/// Why a text is not a [`FileName`].
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("`{}` is not the name of a file in a checkpoint: {why}", shown(name))]
pub struct FileNameError {
    name: String,
    why: &'static str,
}

/// A file by name and content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileDigest {
    /// Its name, relative to the checkpoint.
    pub name: FileName,
    /// The SHA-256 of its bytes.
    pub digest: Sha256,
}

/// Hashes every regular file under `root` but those within a name in `ignored`; the result is sorted by name.
///
/// Files are hashed on rayon's threads, each read while it is hashed, and the result does not depend on how many there are.
/// `root` itself may be a symbolic link, as it is what the user named; nothing under it may. Ignored directories are not looked
/// into.
///
/// A file that another process changes meanwhile has the digest of whatever was read.
///
/// # Errors
/// [`TreeError`] when something under `root` cannot be read, is not a file or directory, or has a name that no [`FileName`] can hold.
pub fn hash_directory(root: &Path, ignored: &[FileName]) -> Result<Vec<FileDigest>, TreeError> {
    let mut names = Vec::new();
    list(root, None, ignored, &mut names)?;
    names.sort();
    let files: Vec<Result<FileDigest, TreeError>> = names
        .into_par_iter()
        // Any of them may take longer than all others together.
        .with_max_len(1)
        .map(|name| {
            let digest = hash_file(&root.join(name.as_str()))?;
            Ok(FileDigest { name, digest })
        })
        .collect();
    // Of several failures the first by name, whichever came first.
    files.into_iter().collect()
}

/// The SHA-256 of the file at `path`.
///
/// # Errors
/// [`TreeError::Io`] when it cannot be read.
pub(super) fn hash_file(path: &Path) -> Result<Sha256, TreeError> {
    Sha256::of_file(path).map_err(|source| TreeError::io(path, source))
}

/// Why the files of a checkpoint cannot be listed and hashed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TreeError {
    /// The operating system refused.
    #[error("cannot read `{}`", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// Its answer.
        #[source]
        source: io::Error,
    },
    /// A symbolic link in the tree.
    #[error("`{}` is a symbolic link, whose target no signature binds", path.display())]
    Symlink {
        /// The link.
        path: PathBuf,
    },
    /// A device, pipe or socket in the tree.
    #[error("`{}` is neither a file nor a directory", path.display())]
    Special {
        /// Where it is.
        path: PathBuf,
    },
    /// A name that is not UTF-8.
    #[error("the name of `{}` is not UTF-8", path.display())]
    NotUtf8 {
        /// The path, as far as it can be shown.
        path: PathBuf,
    },
    /// A name that a signature cannot hold on every system.
    #[error("a name under `{}` cannot be signed", directory.display())]
    Name {
        /// The directory it is in.
        directory: PathBuf,
        /// What is wrong with the name.
        #[source]
        source: FileNameError,
    },
}

impl TreeError {
    fn io(path: &Path, source: io::Error) -> Self {
        Self::Io {
            path: path.to_owned(),
            source,
        }
    }
}

/// Adds the names of the files under `directory`, which is `prefix` relative to the root.
///
/// The depth of the recursion is that of the directory tree, which the operating system's longest path bounds.
fn list(
    directory: &Path,
    prefix: Option<&FileName>,
    ignored: &[FileName],
    names: &mut Vec<FileName>,
) -> Result<(), TreeError> {
    let entries = fs::read_dir(directory).map_err(|source| TreeError::io(directory, source))?;
    for entry in entries {
        let entry = entry.map_err(|source| TreeError::io(directory, source))?;
        let path = entry.path();
        let part = entry.file_name();
        let part = part
            .to_str()
            .ok_or_else(|| TreeError::NotUtf8 { path: path.clone() })?;
        let name = prefix
            .map_or_else(|| part.parse(), |prefix| prefix.child(part))
            .map_err(|source| TreeError::Name {
                directory: directory.to_owned(),
                source,
            })?;
        if ignored.iter().any(|ignored| name.is_within(ignored)) {
            continue;
        }
        // Not followed: this is the entry's own type.
        let kind = entry
            .file_type()
            .map_err(|source| TreeError::io(&path, source))?;
        if kind.is_symlink() {
            return Err(TreeError::Symlink { path });
        } else if kind.is_dir() {
            list(&path, Some(&name), ignored, names)?;
        } else if kind.is_file() {
            names.push(name);
        } else {
            return Err(TreeError::Special { path });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> FileName {
        text.parse().unwrap()
    }

    #[test]
    fn names_that_could_leave_the_directory_are_refused() {
        for bad in [
            "",
            "/etc/passwd",
            "..",
            "../a",
            "a/../b",
            "a/..",
            ".",
            "./a",
            "a//b",
            "a/",
            "a\\b",
            "a\0b",
            "a\x1b[2Jb",
        ] {
            assert!(bad.parse::<FileName>().is_err(), "{bad:?}");
        }
        for good in ["a", ".gitignore", "a/b.c", "..a", "a..", "é/ñ", "a b"] {
            assert_eq!(name(good).as_str(), good);
        }
    }

    #[test]
    fn names_sort_part_by_part() {
        let mut names = ["sub.txt", "sub/b.json", "sub/a/z", "a.bin"].map(name);
        names.sort();
        assert_eq!(
            names.each_ref().map(FileName::as_str),
            ["a.bin", "sub/a/z", "sub/b.json", "sub.txt"]
        );
        // The standard library orders paths by component too: an independent witness.
        let mut paths = ["sub.txt", "sub/b.json", "sub/a/z", "a.bin"].map(PathBuf::from);
        paths.sort();
        assert_eq!(names.map(|name| PathBuf::from(name.as_str())), paths);
    }

    #[test]
    fn a_sibling_that_begins_like_an_ignored_directory_is_not_within_it() {
        assert!(name(".git/x").is_within(&name(".git")));
        assert!(name(".git").is_within(&name(".git")));
        assert!(!name(".gitignore").is_within(&name(".git")));
        assert!(!name("a/.git/x").is_within(&name(".git")));
    }

    #[test]
    fn hashes_every_file_but_the_ignored() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        for (path, bytes) in [
            ("b", "abc"),
            ("a/x", ""),
            (".git/x", "no"),
            ("a/.git/x", "yes"),
        ] {
            fs::create_dir_all(root.join(path).parent().unwrap()).unwrap();
            fs::write(root.join(path), bytes).unwrap();
        }
        fs::create_dir(root.join("empty")).unwrap();
        let files = hash_directory(root, &[name(".git")]).unwrap();
        let found: Vec<_> = files.iter().map(|file| file.name.as_str()).collect();
        assert_eq!(found, ["a/.git/x", "a/x", "b"]);
        assert_eq!(files[2].digest, Sha256::of(b"abc"));
    }

    #[cfg(unix)]
    #[test]
    fn refuses_symbolic_links_but_follows_the_root() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("model");
        fs::create_dir(&root).unwrap();
        fs::write(root.join("a"), "a").unwrap();
        let alias = directory.path().join("current");
        std::os::unix::fs::symlink(&root, &alias).unwrap();
        assert_eq!(hash_directory(&alias, &[]).unwrap().len(), 1);
        std::os::unix::fs::symlink(root.join("a"), root.join("b")).unwrap();
        assert!(matches!(
            hash_directory(&root, &[]),
            Err(TreeError::Symlink { path }) if path.ends_with("b")
        ));
    }

    #[cfg(unix)]
    #[test]
    fn refuses_sockets_and_names_it_cannot_write_down() {
        use std::os::unix::ffi::OsStrExt;
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        let socket = root.join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        assert!(matches!(
            hash_directory(root, &[]),
            Err(TreeError::Special { .. })
        ));
        fs::remove_file(&socket).unwrap();
        fs::write(root.join("a\\b"), "").unwrap();
        assert!(matches!(
            hash_directory(root, &[]),
            Err(TreeError::Name { .. })
        ));
        fs::remove_file(root.join("a\\b")).unwrap();
        fs::write(root.join(std::ffi::OsStr::from_bytes(b"a\xff")), "").unwrap();
        assert!(matches!(
            hash_directory(root, &[]),
            Err(TreeError::NotUtf8 { .. })
        ));
    }
}
