//! Why bytes are not a sound GGUF file.

use std::fmt;

use thiserror::Error;

use super::decode::MAX_ARRAY_DEPTH;
use super::header::{ALIGNMENT, MAX_TENSOR_DIMENSIONS, MAX_TENSOR_NAME};
use super::split::{SPLIT_COUNT, SPLIT_NUMBER};
use crate::dtype::Dtype;
use crate::error::shown;

/// Why bytes are not a sound GGUF file. Offsets are in bytes, from the start of the file, or of the data where it is said.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum GgufError {
    /// An alignment to which nothing can be aligned.
    #[error("`{ALIGNMENT}` is {found}, which is no power of two")]
    Alignment {
        /// The alignment.
        found: u32,
    },
    /// A file for machines of the other byte order.
    #[error("it is a big-endian file of version {version}, and only little-endian ones are read")]
    BigEndian {
        /// Its version.
        version: u32,
    },
    /// More things than the rest of the file has room for.
    #[error(
        "{place} says that {claimed} {things} follow, for which the {remaining} bytes that remain are too few"
    )]
    CountPastEnd {
        /// Where the number is.
        place: Place,
        /// What is counted.
        things: &'static str,
        /// How many are claimed.
        claimed: u64,
        /// Bytes behind the number.
        remaining: usize,
    },
    /// A key comes twice.
    #[error("the metadata has the key `{}` twice", shown(key))]
    DuplicateKey {
        /// The key.
        key: String,
    },
    /// A name comes twice.
    #[error("the header names the tensor `{}` twice", shown(name))]
    DuplicateTensor {
        /// The name.
        name: String,
    },
    /// A key without a character.
    #[error("the key at offset {offset} is empty")]
    EmptyKey {
        /// Where it is.
        offset: usize,
    },
    /// Bytes that belong to no tensor, and are no padding.
    #[error(
        "tensor `{}` starts at data offset {begin}, leaving a hole from {expected}",
        shown(tensor)
    )]
    Hole {
        /// The tensor behind the hole.
        tensor: String,
        /// Where it starts.
        begin: usize,
        /// Where the padding behind the one before ends.
        expected: usize,
    },
    /// Another file.
    #[error("it starts with the bytes {found:02x?} instead of `GGUF`")]
    Magic {
        /// The first four bytes.
        found: [u8; 4],
    },
    /// A tensor that is not where the alignment asks for it.
    #[error(
        "tensor `{}` starts at data offset {begin}, which is no multiple of the alignment {alignment}",
        shown(tensor)
    )]
    Misaligned {
        /// The tensor.
        tensor: String,
        /// Where it starts.
        begin: usize,
        /// The alignment.
        alignment: u32,
    },
    /// A name that llama.cpp has no room for.
    #[error(
        "the tensor name at offset {offset} has {found} bytes, above the limit of {MAX_TENSOR_NAME}"
    )]
    NameTooLong {
        /// Where it is.
        offset: usize,
        /// Its length.
        found: usize,
    },
    /// The file ends before the place where its data would begin.
    #[error(
        "the header ends at {header}, and the file at {found}, before the next multiple of the alignment {alignment}"
    )]
    NoRoomForPadding {
        /// Where the header ends.
        header: usize,
        /// The alignment.
        alignment: u32,
        /// Length of the file.
        found: usize,
    },
    /// A part that does not say which it is, or how many tensors there are in all.
    #[error("it has `{SPLIT_COUNT}` and no `{key}`")]
    NoSplitKey {
        /// The key.
        key: &'static str,
    },
    /// A byte that is neither of the two that a truth value can be.
    #[error("{place} has a truth value of {found}, neither 0 nor 1")]
    NoTruthValue {
        /// Where it is.
        place: Place,
        /// The byte.
        found: u8,
    },
    /// A text that is none.
    #[error("{place} is not UTF-8 at offset {offset}")]
    NotUtf8 {
        /// Where it is.
        place: Place,
        /// Offset of the first bad byte in the file.
        offset: usize,
    },
    /// Bytes that belong to two tensors, or tensors that are not in the order of their bytes.
    #[error(
        "tensor `{}` starts at data offset {begin}, and the one before it ends at {expected}",
        shown(tensor)
    )]
    Overlap {
        /// The later tensor.
        tensor: String,
        /// Where it starts.
        begin: usize,
        /// Where the one before ends, with its padding.
        expected: usize,
    },
    /// The file ends too early.
    #[error("{place} needs {needed} bytes at offset {offset}, and {remaining} remain")]
    PastEnd {
        /// What is cut off.
        place: Place,
        /// Where the bytes would be.
        offset: usize,
        /// How many are claimed.
        needed: u64,
        /// How many there are.
        remaining: usize,
    },
    /// The size of a tensor overflows.
    #[error(
        "tensor `{}` of shape {shape:?} is larger than any memory",
        shown(tensor)
    )]
    ShapeOverflow {
        /// The tensor.
        tensor: String,
        /// Its dimensions, outermost first.
        shape: Vec<u64>,
    },
    /// A part behind the last.
    #[error("`{SPLIT_NUMBER}` is {number}, and there are {count} parts, counted from 0")]
    SplitNumber {
        /// Its number.
        number: u16,
        /// How many there are.
        count: u16,
    },
    /// A tensor that ends behind the file.
    #[error(
        "tensor `{}` has {bytes} bytes at data offset {begin}, and the file has {found} bytes of data",
        shown(tensor)
    )]
    TensorPastEnd {
        /// The tensor.
        tensor: String,
        /// Where it starts.
        begin: u64,
        /// Bytes by shape and type.
        bytes: usize,
        /// Bytes of data in the file, or, where that was not known yet, of header and data.
        found: usize,
    },
    /// Arrays in arrays beyond [`MAX_ARRAY_DEPTH`].
    #[error("{place} has more than {MAX_ARRAY_DEPTH} arrays in each other")]
    TooDeep {
        /// Where they are.
        place: Place,
    },
    /// More dimensions than [`MAX_TENSOR_DIMENSIONS`].
    #[error(
        "tensor `{}` has {found} dimensions, above the limit of {MAX_TENSOR_DIMENSIONS}",
        shown(tensor)
    )]
    TooManyDimensions {
        /// The tensor.
        tensor: String,
        /// How many.
        found: u32,
    },
    /// A row that ends within a block.
    #[error(
        "tensor `{}` has rows of {row} elements, which are no whole blocks of {dtype}",
        shown(tensor)
    )]
    TornBlock {
        /// The tensor.
        tensor: String,
        /// Its element type.
        dtype: Dtype,
        /// Its innermost dimension.
        row: usize,
    },
    /// Bytes behind the last tensor and its padding.
    #[error("the tensors end after {expected} bytes of data, and {} bytes follow", found - expected)]
    TrailingBytes {
        /// Bytes of data that the header describes, padding included.
        expected: usize,
        /// Bytes of data in the file.
        found: usize,
    },
    /// A type that values do not have.
    #[error("{place} is of type {found}, which is unknown")]
    UnknownValueType {
        /// Where it is.
        place: Place,
        /// The type's number.
        found: u32,
    },
    /// A version that did not exist when this was written.
    #[error("it is of version {found}, and 2 and 3 are read")]
    UnknownVersion {
        /// The version.
        found: u32,
    },
    /// The first version, whose lengths were of another width. llama.cpp reads it no more.
    #[error("it is of version 1, and 2 and 3 are read")]
    Version1,
    /// A value of another type than its key asks for.
    #[error("`{key}` is of type {found}, not {wanted}")]
    WrongType {
        /// The key.
        key: &'static str,
        /// The type that it must be of.
        wanted: &'static str,
        /// The type that it is of.
        found: &'static str,
    },
}

/// A part of the header.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Place {
    /// Neither a value nor a tensor's description: counts, a key, a name.
    Header,
    /// The value of a key.
    Key(String),
    /// The description of a tensor.
    Tensor(String),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Header => f.write_str("the header"),
            Self::Key(key) => write!(f, "the value of `{}`", shown(key)),
            Self::Tensor(name) => write!(f, "the description of tensor `{}`", shown(name)),
        }
    }
}
