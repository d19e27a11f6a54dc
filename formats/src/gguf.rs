//! The GGUF container: ordered typed metadata and named typed tensors.
//!
//! ```text
//! "GGUF", u32 version, u64 number of tensors, u64 number of keys
//! keys        u64 length and text of the key, u32 type, value; an array is u32 type and u64 number of its elements, then these
//! tensors     u64 length and text of the name, u32 number of dimensions, u64 each (innermost first), u32 type, u64 offset
//! padding     to a multiple of the alignment: `general.alignment`, or 32
//! data        each tensor at its offset from here, with padding behind it
//! ```
//!
//! In: a path. Out: [`Metadata`] that keeps order and types, and tensors over a memory map. Everything is checked against the file's
//! length before it is allocated or can be borrowed, and what opening allocates is less than four times the file's length.
//!
//! # What is read
//!
//! Versions 2 and 3, little-endian. Tensors lie in the order of the header, each where the one before ends with its padding, as
//! llama.cpp (`gguf_init_from_reader`) asks and as its programs and gguf-py write; holes, overlaps and other orders are refused.
//! Behind the last tensor its padding may be there, in part, or not; anything longer is refused. What padding holds is not looked
//! at. Two things are read that llama.cpp refuses: arrays in arrays, up to [`MAX_ARRAY_DEPTH`], and tensors of types that are not in
//! [`Dtype`]'s table. Two that it takes are refused, since they would not be written as they were: texts that are not UTF-8, and
//! truth values that are neither 0 nor 1.
//!
//! A [`GgufFile`] is one file, also where that is one part of several: [`Split`] is what it says about that, and
//! [`Checkpoint`](crate::Checkpoint) opens all of them.
//!
//! The size of a tensor of an unknown type is not known: it is given all bytes up to the next tensor or the end of the file, padding
//! included.
//!
//! There is a reader of its own here because those of candle-core 0.11 and gguf-rs 0.1.8 take overlapping tensors and keys given
//! twice, lose the order of keys or the widths of integers, and panic on an alignment of 0 or on newer types. candle's is the second
//! opinion in the tests. gguf-rs is not, because it turns on `serde_json/arbitrary_precision` in the whole dependency graph, and so
//! in what is tested.

mod cursor;
mod decode;
mod error;
mod header;
mod split;
mod value;
mod writer;

use std::path::{Path, PathBuf};

use crate::digest::Sha256;
use crate::dtype::Dtype;
use crate::error::FormatError;
use crate::mapped::FileBytes;
use crate::tensor::TensorView;

pub use decode::MAX_ARRAY_DEPTH;
pub use error::{GgufError, Place};
pub use header::{ALIGNMENT, DEFAULT_ALIGNMENT, MAX_TENSOR_DIMENSIONS, MAX_TENSOR_NAME};
pub use split::{SPLIT_COUNT, SPLIT_NUMBER, SPLIT_TENSORS, Split};
pub use value::{Array, Metadata, Value};
pub use writer::{GgufLayout, GgufWriteError, TensorInfo};

use header::{Entry, Header};

/// A GGUF file, open and checked.
///
/// The file is mapped, not read. If another process *truncates* it while it is open, touching the lost part kills this process
/// with SIGBUS; nothing in user space prevents that. [`GgufFile::check_unchanged`] tells afterwards whether the length still is
/// what it was. A file that is *replaced* (renamed over) does no harm: the map keeps the old one.
#[derive(Debug)]
pub struct GgufFile {
    path: PathBuf,
    bytes: FileBytes,
    header: Header,
}

/// A stored tensor, borrowed from its file.
#[derive(Clone, Copy, Debug)]
pub struct GgufTensor<'a> {
    /// The name in its file.
    pub name: &'a str,
    /// The number of its element type.
    pub type_number: u32,
    /// Outermost dimension first, row-major, which is the reverse of the file's order; empty for a scalar.
    pub shape: &'a [usize],
    /// Where its bytes start in the file.
    pub offset: usize,
    /// The elements. Of a known type as many bytes as shape and type say; of another all up to the next tensor.
    pub bytes: &'a [u8],
}

impl GgufFile {
    /// Opens and maps `path`, and checks its header.
    ///
    /// # Errors
    /// When the file cannot be opened, is no regular file, or is not a sound GGUF file.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        let bytes = FileBytes::map(path).map_err(|error| FormatError::new(path, error))?;
        Self::checked(path, bytes)
    }

    /// Checks `bytes` as if they were the file at `path`, which names them in errors.
    ///
    /// # Errors
    /// When they are not a sound GGUF file.
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

    /// The whole file.
    pub fn file_bytes(&self) -> &[u8] {
        self.bytes.all()
    }

    /// Everything before the tensors' bytes, as stored, padding included.
    pub fn header_bytes(&self) -> &[u8] {
        &self.bytes.all()[..self.header.data_start]
    }

    /// 2 or 3.
    pub fn version(&self) -> u32 {
        self.header.version
    }

    /// What offsets of tensors are multiples of: a power of two.
    pub fn alignment(&self) -> u32 {
        self.header.alignment
    }

    /// Keys and values.
    pub fn metadata(&self) -> &Metadata {
        &self.header.metadata
    }

    /// The tensors in the order of the header, which is that of their bytes.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = GgufTensor<'_>> {
        self.header.entries.iter().map(|entry| self.of(entry))
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<GgufTensor<'_>> {
        let position = self.header.position(name)?;
        Some(self.of(&self.header.entries[position]))
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

    fn of<'a>(&'a self, entry: &'a Entry) -> GgufTensor<'a> {
        GgufTensor {
            name: &entry.name,
            type_number: entry.type_number,
            shape: entry.shape(),
            offset: self.header.data_start + entry.begin,
            // In bounds: `Header::parse` checked the offsets against the file's length.
            bytes: &self.bytes.all()[self.header.data_start..][entry.begin..entry.end],
        }
    }
}

impl<'a> GgufTensor<'a> {
    /// The element type, if it is known here.
    pub fn dtype(&self) -> Option<Dtype> {
        Dtype::of_gguf_type(self.type_number)
    }

    /// The tensor as one of a known element type.
    pub fn view(&self) -> Option<TensorView<'a>> {
        Some(TensorView {
            name: self.name,
            dtype: self.dtype()?,
            shape: self.shape,
            bytes: self.bytes,
        })
    }
}
