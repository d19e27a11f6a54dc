//! Output that is complete or absent: a file, or a directory of files.
//!
//! Everything is written to a sibling of the target whose name starts with `.` and holds `.partial-`, flushed to the disk
//! (`fsync` of each file and folder), and renamed. Until [`OutputFile::commit`] or [`OutputDir::commit`] the target is as it was.
//! A value that is dropped before takes its sibling with it; only a killed process or a power cut leaves one behind, which can
//! be deleted.
//!
//! Costs and limits: the disk holds old and new output at once, and `fsync` waits for it. Files of weights go past the page cache
//! where the file system lets them, so whoever reads them next reads them from the disk. The rename is atomic on Linux and macOS
//! on a local file system. Where the file system knows neither "rename without replacing" nor "exchange", as some network ones,
//! there is a moment in which another process can create the target unseen, or in which a replaced one is absent. Permissions
//! come from the umask; those of a replaced target, its owner and its extended attributes are not carried over.

mod hashed;
mod rename;

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use thiserror::Error;

use crate::digest::Sha256;
use crate::error::shown;

pub(crate) use hashed::Block;
pub use hashed::HashedFile;

/// What to do when the target exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Overwrite {
    /// Refuse.
    #[default]
    Never,
    /// Replace a regular file; replace a directory that is empty, or that looks like a checkpoint (it has weights or our
    /// manifest at its top level) and is not under version control, in use as home or working directory, or above those.
    Replace,
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrittenFile {
    /// The name relative to the output directory with `/` between folders, or of the file itself.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// Its digest, computed from the bytes as they were written.
    pub sha256: Sha256,
}

/// The end of a commit that succeeded.
#[derive(Debug)]
#[must_use]
pub struct Committed {
    /// What was replaced, when it could not be deleted: where it lies now, and why.
    pub left_behind: Option<(PathBuf, io::Error)>,
}

/// A directory in the making.
#[derive(Debug)]
pub struct OutputDir {
    target: Target,
    partial: Partial,
    /// Folders created below the directory, so that each can be flushed.
    folders: BTreeSet<PathBuf>,
}

impl OutputDir {
    /// Prepares to write the directory `target`. `inputs` are what it will be made from: `target` may be none of them, nor in
    /// one, nor hold one.
    ///
    /// # Errors
    /// When the target may not be written, or the sibling cannot be created. Nothing is left behind.
    pub fn create(
        target: &Path,
        overwrite: Overwrite,
        inputs: &[&Path],
    ) -> Result<Self, OutputError> {
        let target = Target::resolve(target, overwrite, inputs, Kind::Directory)?;
        let partial = Partial::create(&target, |path| {
            fs::create_dir(path).map(|()| Kind::Directory)
        })?;
        Ok(Self {
            target,
            partial,
            folders: BTreeSet::new(),
        })
    }

    /// Whether [`OutputDir::create`] would succeed and `bytes` would fit, as things are now. Writes nothing.
    ///
    /// # Errors
    /// As [`OutputDir::create`] and [`OutputDir::require_space`].
    pub fn check(
        target: &Path,
        overwrite: Overwrite,
        inputs: &[&Path],
        bytes: u64,
    ) -> Result<(), OutputError> {
        Target::resolve(target, overwrite, inputs, Kind::Directory)?.check(bytes)
    }

    /// The directory as it grows. Files that others write here are committed too, but not flushed.
    pub fn partial_path(&self) -> &Path {
        &self.partial.path
    }

    /// The directory that will be.
    pub fn target(&self) -> &Path {
        &self.target.path
    }

    /// Starts the file `name`, relative with `/` between folders, which are created.
    ///
    /// # Errors
    /// When the name leads out of the directory or exists, or the file cannot be created.
    pub fn create_file(&mut self, name: &str) -> Result<HashedFile, OutputError> {
        let relative = Path::new(name);
        let inside = !name.is_empty()
            && relative
                .components()
                .all(|part| matches!(part, Component::Normal(_)));
        if !inside {
            return Err(self.target.refused(OutputErrorKind::NameLeadsOut {
                name: name.to_owned(),
            }));
        }
        let path = self.partial.path.join(relative);
        for folder in relative.ancestors().skip(1) {
            if !folder.as_os_str().is_empty() {
                self.folders.insert(self.partial.path.join(folder));
            }
        }
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(|error| self.target.refused(error))?;
        }
        let file = create_new(&path).map_err(|error| self.target.refused(error))?;
        Ok(HashedFile::new(
            file,
            name.to_owned(),
            self.target.path.clone(),
        ))
    }

    /// Writes `bytes` as the file `name`.
    ///
    /// # Errors
    /// As [`OutputDir::create_file`], or when the bytes cannot be written.
    pub fn write_file(&mut self, name: &str, bytes: &[u8]) -> Result<WrittenFile, OutputError> {
        let mut file = self.create_file(name)?;
        file.write_all(bytes)?;
        file.finish()
    }

    /// Whether `bytes` more fit on the file system of the target, as far as it says. Others may take the room meanwhile.
    ///
    /// # Errors
    /// [`OutputErrorKind::NotEnoughSpace`] when they do not.
    pub fn require_space(&self, bytes: u64) -> Result<(), OutputError> {
        self.target.require_space(bytes)
    }

    /// Flushes the directory and moves it to its target.
    ///
    /// # Errors
    /// When flushing or renaming fails, or the target appeared meanwhile. The target is then as it was.
    pub fn commit(self) -> Result<Committed, OutputError> {
        for folder in self.folders.iter().rev() {
            flush_folder(folder).map_err(|error| self.target.refused(error))?;
        }
        flush_folder(&self.partial.path).map_err(|error| self.target.refused(error))?;
        self.target.commit(self.partial)
    }
}

/// A file in the making.
#[derive(Debug)]
pub struct OutputFile {
    target: Target,
    partial: Partial,
    file: Option<HashedFile>,
    written: Option<WrittenFile>,
}

impl OutputFile {
    /// Prepares to write the file `target`; the rules are those of [`OutputDir::create`].
    ///
    /// # Errors
    /// When the target may not be written, or the sibling cannot be created. Nothing is left behind.
    pub fn create(
        target: &Path,
        overwrite: Overwrite,
        inputs: &[&Path],
    ) -> Result<Self, OutputError> {
        let target = Target::resolve(target, overwrite, inputs, Kind::File)?;
        let mut created = None;
        let partial = Partial::create(&target, |path| {
            created = Some(create_new(path)?);
            Ok(Kind::File)
        })?;
        let name = target.name.to_string_lossy().into_owned();
        let file = created.map(|file| HashedFile::new(file, name, target.path.clone()));
        Ok(Self {
            target,
            partial,
            file,
            written: None,
        })
    }

    /// Whether [`OutputFile::create`] would succeed and `bytes` would fit, as things are now. Writes nothing.
    ///
    /// # Errors
    /// As [`OutputFile::create`] and [`OutputFile::require_space`].
    pub fn check(
        target: &Path,
        overwrite: Overwrite,
        inputs: &[&Path],
        bytes: u64,
    ) -> Result<(), OutputError> {
        Target::resolve(target, overwrite, inputs, Kind::File)?.check(bytes)
    }

    /// The file that will be.
    pub fn target(&self) -> &Path {
        &self.target.path
    }

    /// The file as it grows.
    pub fn partial_path(&self) -> &Path {
        &self.partial.path
    }

    /// Appends `bytes`.
    ///
    /// # Errors
    /// When they cannot be written, or [`OutputFile::finish`] was called before.
    pub fn write_all(&mut self, bytes: &[u8]) -> Result<(), OutputError> {
        self.growing()?.write_all(bytes)
    }

    /// The file, as long as it was not finished.
    pub(crate) fn growing(&mut self) -> Result<&mut HashedFile, OutputError> {
        self.file
            .as_mut()
            .ok_or_else(|| self.target.refused(OutputErrorKind::Finished))
    }

    /// Flushes the file and tells what is in it; nothing can be appended afterwards. The target is still as it was.
    ///
    /// # Errors
    /// When flushing fails.
    pub fn finish(&mut self) -> Result<WrittenFile, OutputError> {
        if let Some(file) = self.file.take() {
            self.written = Some(file.finish()?);
        }
        self.written
            .clone()
            .ok_or_else(|| self.target.refused(OutputErrorKind::Finished))
    }

    /// Whether `bytes` more fit on the file system of the target; see [`OutputDir::require_space`].
    ///
    /// # Errors
    /// [`OutputErrorKind::NotEnoughSpace`] when they do not.
    pub fn require_space(&self, bytes: u64) -> Result<(), OutputError> {
        self.target.require_space(bytes)
    }

    /// Flushes the file if that was not done, and moves it to its target.
    ///
    /// # Errors
    /// When flushing or renaming fails, or the target appeared meanwhile. The target is then as it was.
    pub fn commit(mut self) -> Result<Committed, OutputError> {
        self.finish()?;
        self.target.commit(self.partial)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Directory,
    File,
}

/// Where output goes, after everything that forbids it was ruled out.
#[derive(Debug)]
struct Target {
    /// With its parent resolved.
    path: PathBuf,
    parent: PathBuf,
    name: OsString,
    kind: Kind,
    /// Whether something is there that is to be replaced.
    replaces: bool,
}

impl Target {
    fn resolve(
        target: &Path,
        overwrite: Overwrite,
        inputs: &[&Path],
        kind: Kind,
    ) -> Result<Self, OutputError> {
        let refused = |kind: OutputErrorKind| OutputError::new(target, kind);
        let name = target
            .file_name()
            .ok_or_else(|| refused(OutputErrorKind::NoName))?
            .to_owned();
        let parent = match target.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let parent = fs::canonicalize(parent).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
                refused(OutputErrorKind::NoParent {
                    parent: parent.to_owned(),
                })
            }
            _ => refused(error.into()),
        })?;
        let path = parent.join(&name);
        for &input in inputs {
            let resolved =
                fs::canonicalize(input).map_err(|error| OutputError::new(input, error))?;
            if path.starts_with(&resolved) || resolved.starts_with(&path) {
                return Err(refused(OutputErrorKind::OverlapsInput {
                    input: input.to_owned(),
                }));
            }
        }
        let mut resolved = Self {
            path,
            parent,
            name,
            kind,
            replaces: false,
        };
        resolved.replaces = resolved.occupied(overwrite).map_err(refused)?;
        Ok(resolved)
    }

    /// Whether something is at the target, which then may be replaced.
    fn occupied(&self, overwrite: Overwrite) -> Result<bool, OutputErrorKind> {
        let found = match fs::symlink_metadata(&self.path) {
            Ok(metadata) => metadata.file_type(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        if overwrite == Overwrite::Never {
            return Err(OutputErrorKind::Exists);
        }
        match self.kind {
            Kind::File if found.is_file() => Ok(true),
            Kind::Directory if found.is_dir() => {
                refuse_precious(&self.path)?;
                Ok(true)
            }
            _ if found.is_symlink() => Err(OutputErrorKind::NotReplaced {
                reason: "it is a symbolic link",
            }),
            Kind::File => Err(OutputErrorKind::NotReplaced {
                reason: "it is not a regular file",
            }),
            Kind::Directory => Err(OutputErrorKind::NotReplaced {
                reason: "it is not a directory",
            }),
        }
    }

    fn commit(&self, mut partial: Partial) -> Result<Committed, OutputError> {
        let mut left_behind = None;
        if self.replaces {
            // Again, since hours may have passed and the directory may have become something else.
            if self
                .occupied(Overwrite::Replace)
                .map_err(|kind| self.refused(kind))?
            {
                rename::replacing(&partial.path, &self.path)
                    .map_err(|error| self.refused(error))?;
                // What was replaced now lies where the new output was made.
                left_behind = partial
                    .remove()
                    .err()
                    .map(|error| (partial.path.clone(), error));
            } else {
                rename::without_replacing(&partial.path, &self.path)
                    .map_err(|error| self.appeared(error))?;
            }
        } else {
            rename::without_replacing(&partial.path, &self.path)
                .map_err(|error| self.appeared(error))?;
        }
        partial.disarm();
        flush_folder(&self.parent).map_err(|error| self.refused(error))?;
        Ok(Committed { left_behind })
    }

    fn appeared(&self, error: io::Error) -> OutputError {
        match error.kind() {
            io::ErrorKind::AlreadyExists | io::ErrorKind::DirectoryNotEmpty => {
                self.refused(OutputErrorKind::Exists)
            }
            _ => self.refused(error),
        }
    }

    /// Whether the parent can be written to and has room for `bytes`.
    fn check(&self, bytes: u64) -> Result<(), OutputError> {
        use rustix::fs::Access;
        rustix::fs::access(&self.parent, Access::WRITE_OK | Access::EXEC_OK)
            .map_err(|error| self.refused(io::Error::from(error)))?;
        self.require_space(bytes)
    }

    fn require_space(&self, bytes: u64) -> Result<(), OutputError> {
        let volume = rustix::fs::statvfs(&self.parent)
            .map_err(|error| self.refused(io::Error::from(error)))?;
        let available = volume.f_bavail.saturating_mul(volume.f_frsize);
        if bytes > available {
            return Err(self.refused(OutputErrorKind::NotEnoughSpace {
                needed: bytes,
                available,
            }));
        }
        Ok(())
    }

    fn refused(&self, kind: impl Into<OutputErrorKind>) -> OutputError {
        OutputError::new(&self.path, kind)
    }
}

/// Refuses to have `directory` replaced when it may hold what cannot be made again.
fn refuse_precious(directory: &Path) -> Result<(), OutputErrorKind> {
    let precious = |reason| Err(OutputErrorKind::NotReplaced { reason });
    let home = std::env::var_os("HOME").and_then(|home| fs::canonicalize(home).ok());
    let working = std::env::current_dir().and_then(fs::canonicalize).ok();
    if home.is_some_and(|home| home.starts_with(directory)) {
        return precious("it holds the home directory");
    }
    if working.is_some_and(|working| working.starts_with(directory)) {
        return precious("it holds the working directory");
    }
    let mut empty = true;
    let mut ours = false;
    for entry in fs::read_dir(directory)? {
        let name = entry?.file_name();
        let name = Path::new(&name);
        if name == Path::new(".git") {
            return precious("it is under version control");
        }
        empty = false;
        ours |= name == Path::new("panacea.manifest.json")
            || name
                .extension()
                .is_some_and(|it| it == "safetensors" || it == "gguf");
    }
    if empty || ours {
        Ok(())
    } else {
        precious("it is neither empty nor a checkpoint")
    }
}

/// The sibling that output is made in, deleted when dropped unless disarmed.
#[derive(Debug)]
struct Partial {
    path: PathBuf,
    kind: Kind,
    armed: bool,
}

impl Partial {
    /// `make` creates the sibling and fails with `AlreadyExists` when there is one of that name.
    fn create(
        target: &Target,
        mut make: impl FnMut(&Path) -> io::Result<Kind>,
    ) -> Result<Self, OutputError> {
        for _ in 0..PARTIAL_NAMES {
            let mut name = OsString::from(".");
            name.push(&target.name);
            name.push(format!(
                ".partial-{:x}-{:x}",
                std::process::id(),
                PARTIALS.fetch_add(1, Ordering::Relaxed)
            ));
            let path = target.parent.join(name);
            match make(&path) {
                Ok(kind) => {
                    return Ok(Self {
                        path,
                        kind,
                        armed: true,
                    });
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(target.refused(error)),
            }
        }
        Err(target.refused(io::Error::from(io::ErrorKind::AlreadyExists)))
    }

    fn remove(&self) -> io::Result<()> {
        match self.kind {
            Kind::Directory => fs::remove_dir_all(&self.path),
            Kind::File => match fs::remove_file(&self.path) {
                // A file is replaced by a plain rename, which leaves nothing.
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                result => result,
            },
        }
    }

    fn disarm(&mut self) {
        self.armed = false;
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if self.armed {
            // Nothing can be done about a failure here; the name says that it may be deleted.
            let _ = self.remove();
        }
    }
}

/// Distinguishes the siblings of one process. Never seen in a finished output.
static PARTIALS: AtomicU32 = AtomicU32::new(0);

/// How many names are tried beside the leavings of killed processes.
const PARTIAL_NAMES: usize = 1000;

/// A new file, readable and writable as the umask says; never an existing one, nor one through a link.
fn create_new(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create_new(true).open(path)
}

fn flush_folder(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Output that could not be written, or must not be.
#[derive(Debug, Error)]
#[error("cannot write `{}`", path.display())]
pub struct OutputError {
    /// The output.
    pub path: PathBuf,
    /// The reason.
    #[source]
    pub kind: OutputErrorKind,
}

impl OutputError {
    /// An error about `path`.
    pub fn new(path: &Path, kind: impl Into<OutputErrorKind>) -> Self {
        Self {
            path: path.to_owned(),
            kind: kind.into(),
        }
    }

    /// Whether the machine is to blame (a full disk, permissions) rather than the choice of the target.
    pub fn is_environment(&self) -> bool {
        matches!(
            self.kind,
            OutputErrorKind::Io(_) | OutputErrorKind::NotEnoughSpace { .. }
        )
    }
}

/// Why output was not written.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OutputErrorKind {
    /// Something is there.
    #[error("it exists")]
    Exists,
    /// The file was finished before.
    #[error("it was finished before")]
    Finished,
    /// The operating system said no.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// A file whose name leads out of its directory.
    #[error("the name `{}` leads out of it", shown(name))]
    NameLeadsOut {
        /// The name.
        name: String,
    },
    /// A path that ends in no name.
    #[error("the path ends in no name")]
    NoName,
    /// The directory to write in does not exist.
    #[error("`{}` is not a directory", parent.display())]
    NoParent {
        /// That directory.
        parent: PathBuf,
    },
    /// Less room than needed.
    #[error("{needed} bytes are needed and {available} are free")]
    NotEnoughSpace {
        /// Bytes to be written.
        needed: u64,
        /// Bytes free.
        available: u64,
    },
    /// Something is there that is not replaced, whatever was asked for.
    #[error("it exists and is never replaced: {reason}")]
    NotReplaced {
        /// What it is.
        reason: &'static str,
    },
    /// The output is an input, or lies in one, or holds one.
    #[error("it overlaps the input `{}`", input.display())]
    OverlapsInput {
        /// That input.
        input: PathBuf,
    },
}
