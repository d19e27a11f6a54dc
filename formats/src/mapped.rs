//! The bytes of a file from which tensors are borrowed: mapped, or in memory.

use std::fs::File;
use std::io;
use std::path::Path;

use memmap2::{Mmap, UncheckedAdvice};

use crate::error::{FormatError, FormatErrorKind};

/// All bytes of one file.
#[derive(Debug)]
pub(crate) enum FileBytes {
    Mapped(Mmap, File),
    Owned(Vec<u8>),
}

impl FileBytes {
    /// Maps a regular file. A pipe or device would block or never end, so they are refused.
    pub(crate) fn map(path: &Path) -> io::Result<Self> {
        let metadata = std::fs::metadata(path)?;
        if metadata.is_dir() {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        if !metadata.is_file() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "it is not a regular file",
            ));
        }
        let file = File::open(path)?;
        #[expect(
            unsafe_code,
            reason = "a memory map is how weights larger than memory are read"
        )]
        // SAFETY: the map is read-only and private to this value. The bytes are only ever read as plain integers, for which any
        // content is valid; a concurrent writer can make us read a mixture, and a truncation ends the process with SIGBUS, both of
        // which the documentation of the types that hold it tells the user.
        let map = unsafe { Mmap::map(&file)? };
        Ok(Self::Mapped(map, file))
    }

    pub(crate) fn all(&self) -> &[u8] {
        match self {
            Self::Mapped(map, _) => map,
            Self::Owned(bytes) => bytes,
        }
    }

    /// Whether the file, which `path` names in errors, still has the length at which it was mapped.
    pub(crate) fn check_unchanged(&self, path: &Path) -> Result<(), FormatError> {
        let Self::Mapped(map, file) = self else {
            return Ok(());
        };
        let found = file
            .metadata()
            .map_err(|error| FormatError::new(path, error))?
            .len();
        let opened = map.len() as u64;
        if found == opened {
            Ok(())
        } else {
            Err(FormatError::new(
                path,
                FormatErrorKind::Changed { opened, found },
            ))
        }
    }

    /// Gives the pages back to the system; whoever reads them again finds them in its cache, or on disk.
    pub(crate) fn release(&self) {
        let Self::Mapped(map, _) = self else {
            return;
        };
        #[expect(unsafe_code, reason = "the advice could change what other maps hold")]
        // SAFETY: the map is of a file and read-only, so that a page that is dropped comes back with the file's bytes, as every
        // page of it did at its first use.
        let released = unsafe { map.unchecked_advise(UncheckedAdvice::DontNeed) };
        // It is advice: a system that does not take it keeps the pages.
        drop(released);
    }
}
