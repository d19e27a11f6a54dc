//! Reads a safetensors file without trusting it.
//!
//! ```text
//! offset 0        8 bytes       length N of the header, unsigned, little-endian
//! offset 8        N bytes       JSON object, `{` first, spaces at its end: name -> {dtype, shape, data_offsets}
//! offset 8 + N    to the end    the tensors' bytes, each at its data_offsets, without hole or overlap
//! ```
//!
//! In: a path. Out: named [`TensorView`]s over a memory map, and the header's own bytes, so that a writer can repeat them.
//! Everything is checked against the file's length before a view exists.
//!
//! The `safetensors` crate is not the reader, because it takes a header that names a tensor twice with the same offsets and
//! silently keeps the last entry (0.8.0), and keeps neither the header's order nor its metadata's. It is the second opinion in
//! the tests.

mod header;
mod writer;

use std::path::{Path, PathBuf};

use crate::digest::Sha256;
use crate::error::FormatError;
use crate::mapped::FileBytes;
use crate::tensor::TensorView;

use header::Header;
pub use header::{MAX_DIMENSIONS, MAX_HEADER_BYTES, SafetensorsError};
pub use writer::{Stored, StoredFloats, safetensors_header, write_tensors};

/// A safetensors file, open and checked.
///
/// The file is mapped, not read. If another process *truncates* it while it is open, touching the lost part kills this process
/// with SIGBUS; nothing in user space prevents that. [`SafetensorsFile::check_unchanged`] tells afterwards whether the length
/// still is what it was. A file that is *replaced* (renamed over) does no harm: the map keeps the old one.
#[derive(Debug)]
pub struct SafetensorsFile {
    path: PathBuf,
    bytes: FileBytes,
    header: Header,
}

impl SafetensorsFile {
    /// Opens and maps `path`, and checks its header.
    ///
    /// # Errors
    /// When the file cannot be opened, is no regular file, or is not a sound safetensors file.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        let bytes = FileBytes::map(path).map_err(|error| FormatError::new(path, error))?;
        Self::checked(path, bytes)
    }

    /// Checks `bytes` as if they were the file at `path`, which names them in errors.
    ///
    /// # Errors
    /// When they are not a sound safetensors file.
    pub fn from_bytes(path: &Path, bytes: Vec<u8>) -> Result<Self, FormatError> {
        Self::checked(path, FileBytes::Owned(bytes))
    }

    fn checked(path: &Path, bytes: FileBytes) -> Result<Self, FormatError> {
        let header = Header::parse(bytes.all()).map_err(|error| FormatError::new(path, error))?;
        Ok(Self {
            path: path.to_owned(),
            bytes,
            header,
        })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The length of the whole file in bytes.
    pub fn length(&self) -> usize {
        self.bytes.all().len()
    }

    /// Everything before the tensors, as stored: the 8 bytes of the header's length and the header.
    pub fn header_bytes(&self) -> &[u8] {
        &self.bytes.all()[..self.header.data_start]
    }

    /// The whole file.
    pub fn file_bytes(&self) -> &[u8] {
        self.bytes.all()
    }

    /// `__metadata__`, in the order of the header.
    pub fn metadata(&self) -> &[(String, String)] {
        &self.header.metadata
    }

    /// The tensors in the order of their bytes.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = TensorView<'_>> {
        (0..self.header.entries.len()).map(|position| self.view(position))
    }

    /// The names of the tensors in the order in which the header lists them.
    pub fn names_in_header_order(&self) -> impl ExactSizeIterator<Item = &str> {
        let entries = &self.header.entries;
        self.header
            .listed
            .iter()
            .map(|&position| entries[position].name.as_str())
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<TensorView<'_>> {
        self.header
            .position(name)
            .map(|position| self.view(position))
    }

    /// The digest of the whole file. Costs one pass over it.
    pub fn digest(&self) -> Sha256 {
        Sha256::of(self.bytes.all())
    }

    /// Whether the file still has the length it was opened with. Say so after the last byte was read.
    ///
    /// # Errors
    /// [`FormatErrorKind::Changed`](crate::FormatErrorKind::Changed) when it has another.
    pub fn check_unchanged(&self) -> Result<(), FormatError> {
        self.bytes.check_unchanged(&self.path)
    }

    /// Gives the file's pages back to the system; whoever reads them again finds them in its cache, or on disk. For files that are
    /// larger than the memory a process may hold. Does nothing for bytes that are in memory anyway.
    pub fn release(&self) {
        self.bytes.release();
    }

    /// The tensor number `position` in the order of the bytes.
    pub(crate) fn view(&self, position: usize) -> TensorView<'_> {
        let entry = &self.header.entries[position];
        TensorView {
            name: &entry.name,
            dtype: entry.dtype,
            shape: &entry.shape,
            // In bounds: `Header::parse` checked that the entries tile the file's data exactly.
            bytes: &self.bytes.all()[self.header.data_start..][entry.begin..entry.end],
        }
    }
}
