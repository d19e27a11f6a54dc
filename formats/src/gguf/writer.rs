//! Writes what stands around the tensors of a GGUF file, in version 3: the same metadata and descriptions give the same bytes.
//!
//! In: metadata and a description of each tensor, in order. Out: the header with its padding, and where each tensor's bytes and the
//! padding behind them go. The caller streams the bytes.

use std::ops::Range;

use thiserror::Error;

use super::decode::MAX_ARRAY_DEPTH;
use super::error::GgufError;
use super::header::{
    MAGIC, MAX_TENSOR_DIMENSIONS, MAX_TENSOR_NAME, Unsized, VERSION, alignment, padded, size,
};
use super::value::{Array, Metadata, Value, ValueType};
use crate::dtype::Dtype;
use crate::error::shown;

/// A tensor that is to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    name: String,
    type_number: u32,
    shape: Vec<usize>,
    bytes: usize,
}

impl TensorInfo {
    /// A tensor called `name`, of `shape`, outermost dimension first.
    ///
    /// # Errors
    /// When the name or the number of dimensions is above the format's limit, or rows are no whole blocks of `dtype`, or `dtype` is
    /// no type of GGUF.
    pub fn new(name: &str, dtype: Dtype, shape: &[usize]) -> Result<Self, GgufWriteError> {
        let tensor = || name.to_owned();
        let type_number = dtype.gguf_type().ok_or_else(|| GgufWriteError::Dtype {
            tensor: tensor(),
            dtype,
        })?;
        let bytes = size(shape, Some(dtype)).map_err(|reason| match reason {
            Unsized::Overflow => GgufWriteError::TooLong,
            Unsized::TornBlock { dtype, row } => GgufWriteError::TornBlock {
                tensor: tensor(),
                dtype,
                row,
            },
        })?;
        Self::raw(name, type_number, shape, bytes)
    }

    /// As [`Self::new`], of a type that may be unknown here, in `bytes` bytes.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn raw(
        name: &str,
        type_number: u32,
        shape: &[usize],
        bytes: usize,
    ) -> Result<Self, GgufWriteError> {
        if name.len() > MAX_TENSOR_NAME {
            return Err(GgufWriteError::NameTooLong {
                name: name.to_owned(),
            });
        }
        if shape.len() > MAX_TENSOR_DIMENSIONS {
            return Err(GgufWriteError::TooManyDimensions {
                tensor: name.to_owned(),
                found: shape.len(),
            });
        }
        // Of no type nothing but an overflow of the elements can be wrong.
        size(shape, None).map_err(|_| GgufWriteError::TooLong)?;
        Ok(Self {
            name: name.to_owned(),
            type_number,
            shape: shape.to_vec(),
            bytes,
        })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How many bytes its elements take.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

/// Where everything of a file goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GgufLayout {
    header: Vec<u8>,
    /// Of each tensor's bytes in the file.
    places: Vec<Range<usize>>,
    length: usize,
}

impl GgufLayout {
    /// Lays out a file with `metadata` and `tensors`, aligned as `general.alignment` says, or to 32 bytes.
    ///
    /// # Errors
    /// When the alignment is none, a key is empty, a value is inside of more than [`MAX_ARRAY_DEPTH`] arrays, a tensor comes twice,
    /// or the file is longer than can be addressed.
    pub fn new(metadata: &Metadata, tensors: &[TensorInfo]) -> Result<Self, GgufWriteError> {
        let alignment = alignment(metadata).map_err(GgufWriteError::Alignment)?;
        let mut names: Vec<&str> = tensors.iter().map(TensorInfo::name).collect();
        names.sort_unstable();
        if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(GgufWriteError::DuplicateTensor {
                name: pair[0].to_owned(),
            });
        }
        let mut header = MAGIC.to_vec();
        header.extend(VERSION.to_le_bytes());
        put_length(tensors.len(), &mut header);
        put_length(metadata.iter().len(), &mut header);
        for (key, value) in metadata.iter() {
            if key.is_empty() {
                return Err(GgufWriteError::EmptyKey);
            }
            if value
                .as_array()
                .is_some_and(|it| depth(it) > MAX_ARRAY_DEPTH)
            {
                return Err(GgufWriteError::TooDeep {
                    key: key.to_owned(),
                });
            }
            put_text(key, &mut header);
            header.extend(value.value_type().number().to_le_bytes());
            put_value(value, &mut header);
        }
        let too_long = || GgufWriteError::TooLong;
        let mut offset = 0_usize;
        let mut offsets = Vec::with_capacity(tensors.len());
        for tensor in tensors {
            put_text(&tensor.name, &mut header);
            let dimensions = u32::try_from(tensor.shape.len()).map_err(|_| too_long())?;
            header.extend(dimensions.to_le_bytes());
            for &dimension in tensor.shape.iter().rev() {
                put_length(dimension, &mut header);
            }
            header.extend(tensor.type_number.to_le_bytes());
            put_length(offset, &mut header);
            offsets.push(offset);
            let end = offset.checked_add(tensor.bytes);
            offset = end
                .and_then(|end| padded(end, alignment))
                .ok_or_else(too_long)?;
        }
        let start = padded(header.len(), alignment).ok_or_else(too_long)?;
        header.resize(start, 0);
        let length = start.checked_add(offset).ok_or_else(too_long)?;
        let places = offsets.iter().zip(tensors);
        Ok(Self {
            places: places
                .map(|(offset, tensor)| start + offset..start + offset + tensor.bytes)
                .collect(),
            header,
            length,
        })
    }

    /// Everything before the tensors' bytes, padding included.
    pub fn header(&self) -> &[u8] {
        &self.header
    }

    /// Where the bytes of each tensor go, in the order in which they were given.
    pub fn places(&self) -> &[Range<usize>] {
        &self.places
    }

    /// How many zeros follow the bytes of tensor number `index`.
    pub fn padding(&self, index: usize) -> usize {
        let next = self.places.get(index + 1).map(|next| next.start);
        let end = self.places.get(index).map_or(0, |place| place.end);
        next.unwrap_or(self.length) - end
    }

    /// The length of the file.
    pub fn length(&self) -> usize {
        self.length
    }
}

/// How many arrays are around the innermost value.
fn depth(array: &Array) -> usize {
    match array {
        Array::Array(arrays) => 1 + arrays.iter().map(depth).max().unwrap_or(0),
        _ => 1,
    }
}

/// The bytes of a value, without its type.
fn put_value(value: &Value, out: &mut Vec<u8>) {
    match value {
        Value::U8(it) => out.push(*it),
        Value::I8(it) => out.extend(it.to_le_bytes()),
        Value::U16(it) => out.extend(it.to_le_bytes()),
        Value::I16(it) => out.extend(it.to_le_bytes()),
        Value::U32(it) => out.extend(it.to_le_bytes()),
        Value::I32(it) => out.extend(it.to_le_bytes()),
        Value::F32(it) => out.extend(it.to_le_bytes()),
        Value::Bool(it) => out.push(u8::from(*it)),
        Value::Text(it) => put_text(it, out),
        Value::Array(it) => put_array(it, out),
        Value::U64(it) => out.extend(it.to_le_bytes()),
        Value::I64(it) => out.extend(it.to_le_bytes()),
        Value::F64(it) => out.extend(it.to_le_bytes()),
    }
}

/// The type of an array's elements, how many there are, and these.
fn put_array(array: &Array, out: &mut Vec<u8>) {
    fn numbers<T: Copy, const N: usize>(
        (element, numbers): (ValueType, &[T]),
        bytes: impl Fn(T) -> [u8; N],
        out: &mut Vec<u8>,
    ) {
        put_start(element, numbers.len(), out);
        out.extend(numbers.iter().flat_map(|&number| bytes(number)));
    }
    match array {
        Array::U8(it) => numbers((ValueType::U8, it), u8::to_le_bytes, out),
        Array::I8(it) => numbers((ValueType::I8, it), i8::to_le_bytes, out),
        Array::U16(it) => numbers((ValueType::U16, it), u16::to_le_bytes, out),
        Array::I16(it) => numbers((ValueType::I16, it), i16::to_le_bytes, out),
        Array::U32(it) => numbers((ValueType::U32, it), u32::to_le_bytes, out),
        Array::I32(it) => numbers((ValueType::I32, it), i32::to_le_bytes, out),
        Array::F32(it) => numbers((ValueType::F32, it), f32::to_le_bytes, out),
        Array::Bool(it) => numbers((ValueType::Bool, it), |it| [u8::from(it)], out),
        Array::U64(it) => numbers((ValueType::U64, it), u64::to_le_bytes, out),
        Array::I64(it) => numbers((ValueType::I64, it), i64::to_le_bytes, out),
        Array::F64(it) => numbers((ValueType::F64, it), f64::to_le_bytes, out),
        Array::Text(it) => {
            put_start(ValueType::Text, it.len(), out);
            it.iter().for_each(|text| put_text(text, out));
        }
        Array::Array(it) => {
            put_start(ValueType::Array, it.len(), out);
            it.iter().for_each(|array| put_array(array, out));
        }
    }
}

fn put_start(element: ValueType, count: usize, out: &mut Vec<u8>) {
    out.extend(element.number().to_le_bytes());
    put_length(count, out);
}

fn put_text(text: &str, out: &mut Vec<u8>) {
    put_length(text.len(), out);
    out.extend(text.as_bytes());
}

fn put_length(length: usize, out: &mut Vec<u8>) {
    out.extend((length as u64).to_le_bytes());
}

/// Why a GGUF file cannot be written as it was described.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum GgufWriteError {
    /// `general.alignment` is none.
    #[error(transparent)]
    Alignment(GgufError),
    /// An element type that the format does not have.
    #[error("tensor `{}` is {dtype}, which GGUF does not have", shown(tensor))]
    Dtype {
        /// The tensor.
        tensor: String,
        /// Its element type.
        dtype: Dtype,
    },
    /// A name comes twice.
    #[error("there are two tensors called `{}`", shown(name))]
    DuplicateTensor {
        /// The name.
        name: String,
    },
    /// A key without a character.
    #[error("a key of the metadata is empty")]
    EmptyKey,
    /// A name that no reader takes.
    #[error(
        "the name `{}` has {} bytes, and {MAX_TENSOR_NAME} are the most",
        shown(name),
        name.len()
    )]
    NameTooLong {
        /// The name.
        name: String,
    },
    /// Arrays in arrays beyond [`MAX_ARRAY_DEPTH`].
    #[error(
        "the value of `{}` has more than {MAX_ARRAY_DEPTH} arrays in each other",
        shown(key)
    )]
    TooDeep {
        /// The key.
        key: String,
    },
    /// A file longer than can be addressed.
    #[error("the file would be longer than can be addressed")]
    TooLong,
    /// More dimensions than a reader takes.
    #[error(
        "tensor `{}` has {found} dimensions, and {MAX_TENSOR_DIMENSIONS} are the most",
        shown(tensor)
    )]
    TooManyDimensions {
        /// The tensor.
        tensor: String,
        /// How many.
        found: usize,
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
        /// Elements of a row.
        row: usize,
    },
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::gguf::GgufFile;

    fn every_type() -> Metadata {
        let mut metadata = Metadata::default();
        let array = |it| Value::Array(it);
        let values = [
            Value::U8(1),
            Value::I8(-2),
            Value::U16(3),
            Value::I16(-4),
            Value::U32(5),
            Value::I32(-6),
            Value::F32(0.5),
            Value::Bool(true),
            Value::Text("s\u{e9}".to_owned()),
            Value::U64(1 << 40),
            Value::I64(-7),
            Value::F64(0.1),
            array(Array::Text(vec![String::new(), "b".to_owned()])),
            array(Array::Bool(vec![false, true])),
            array(Array::I16(Vec::new())),
            array(Array::Array(vec![
                Array::F64(vec![1.0]),
                Array::Array(Vec::new()),
            ])),
        ];
        for (index, value) in values.into_iter().enumerate() {
            metadata.set(format!("key.{index}"), value);
        }
        metadata
    }

    #[test]
    fn what_is_written_is_read_again_with_every_type_and_alignment() {
        for alignment in [None, Some(8), Some(64)] {
            let mut metadata = every_type();
            if let Some(alignment) = alignment {
                metadata.set("general.alignment", Value::U32(alignment));
            }
            let infos = [
                TensorInfo::new("scalar", Dtype::F32, &[]).unwrap(),
                TensorInfo::new("q", Dtype::Q4_0, &[3, 64]).unwrap(),
                TensorInfo::new("none", Dtype::F16, &[0, 5]).unwrap(),
                TensorInfo::raw("strange", 999, &[7], 100).unwrap(),
            ];
            let layout = GgufLayout::new(&metadata, &infos).unwrap();
            let mut file = layout.header().to_vec();
            for (index, info) in infos.iter().enumerate() {
                assert_eq!(file.len(), layout.places()[index].start);
                file.extend(std::iter::repeat_n(
                    b'a' + u8::try_from(index).unwrap(),
                    info.bytes(),
                ));
                file.resize(file.len() + layout.padding(index), 0);
            }
            assert_eq!(file.len(), layout.length());
            let read = GgufFile::from_bytes(Path::new("written"), file.clone()).unwrap();
            assert_eq!(read.metadata(), &metadata);
            assert_eq!(read.header_bytes(), layout.header());
            let names: Vec<&str> = read.tensors().map(|tensor| tensor.name).collect();
            assert_eq!(names, ["scalar", "q", "none", "strange"]);
            let strange = read.tensor("strange").unwrap();
            assert!(strange.dtype().is_none() && strange.bytes.starts_with(&[b'd'; 100]));
            let q = read.tensor("q").unwrap().view().unwrap();
            assert_eq!(
                (q.dtype, q.shape, q.bytes),
                (Dtype::Q4_0, &[3, 64][..], &[b'b'; 108][..])
            );
        }
    }

    #[test]
    fn what_no_reader_takes_is_refused() {
        let long = "n".repeat(64);
        assert!(TensorInfo::new(&long[1..], Dtype::F32, &[1]).is_ok());
        for (name, dtype, shape) in [
            (&*long, Dtype::F32, &[1][..]),
            ("a", Dtype::U8, &[1]),
            ("a", Dtype::Q8_0, &[2, 33]),
            ("a", Dtype::F32, &[1; 5]),
            ("a", Dtype::F32, &[usize::MAX, 2]),
        ] {
            assert!(
                TensorInfo::new(name, dtype, shape).is_err(),
                "{name} {shape:?}"
            );
        }
        let twice = [(); 2].map(|()| TensorInfo::new("a", Dtype::F32, &[1]).unwrap());
        assert!(GgufLayout::new(&Metadata::default(), &twice).is_err());
        let mut metadata = Metadata::default();
        metadata.set("general.alignment", Value::U32(33));
        assert!(GgufLayout::new(&metadata, &[]).is_err());
    }

    #[test]
    fn metadata_is_written_if_and_only_if_it_is_read_again() {
        let nested = |depth: usize| {
            let innermost = Array::U8(vec![1]);
            Value::Array((1..depth).fold(innermost, |it, _| Array::Array(vec![it])))
        };
        for (key, value, written) in [
            ("k", nested(MAX_ARRAY_DEPTH), true),
            ("k", nested(MAX_ARRAY_DEPTH + 1), false),
            ("k", Value::U8(1), true),
            ("", Value::U8(1), false),
        ] {
            let mut metadata = Metadata::default();
            metadata.set(key, value);
            let layout = GgufLayout::new(&metadata, &[]);
            assert_eq!(layout.is_ok(), written, "{metadata:?}");
            if let Ok(layout) = layout {
                let read = GgufFile::from_bytes(Path::new("written"), layout.header().to_vec());
                assert_eq!(read.unwrap().metadata(), &metadata);
            }
        }
        assert!(TensorInfo::raw("a", 999, &[usize::MAX, 2], 0).is_err());
        assert!(TensorInfo::raw("a", 999, &[usize::MAX, 2, 0], 0).is_err());
    }
}
