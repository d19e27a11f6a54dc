//! The header of a GGUF file: bytes of the whole file in, metadata and a checked table of tensors out.

use super::cursor::{Cursor, Reading};
use super::decode::{self, LEAST_PAIR};
use super::error::GgufError;
use super::value::{Metadata, Value};
use crate::dtype::Dtype;

/// Most dimensions of one tensor; llama.cpp's `GGML_MAX_DIMS`.
pub const MAX_TENSOR_DIMENSIONS: usize = 4;

/// Most bytes in the name of a tensor; llama.cpp's `GGML_MAX_NAME` counts a zero byte behind it.
pub const MAX_TENSOR_NAME: usize = 63;

/// What tensors are aligned to where the metadata does not say.
pub const DEFAULT_ALIGNMENT: u32 = 32;

/// The key of another alignment.
pub const ALIGNMENT: &str = "general.alignment";

pub(super) const MAGIC: [u8; 4] = *b"GGUF";

/// The newest version, which is written.
pub(super) const VERSION: u32 = 3;

/// The fewest bytes of a tensor's description: its name's length, its number of dimensions, its type and its offset.
const LEAST_TENSOR: usize = 8 + 4 + 4 + 8;

/// The checked table of one file.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) version: u32,
    pub(super) alignment: u32,
    pub(super) metadata: Metadata,
    /// In the order of the header, which is that of their bytes.
    pub(super) entries: Vec<Entry>,
    /// Positions in `entries`, by name.
    by_name: Vec<usize>,
    /// Where the tensors' bytes start in the file; at most its length.
    pub(super) data_start: usize,
}

/// One tensor.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) name: Box<str>,
    pub(super) type_number: u32,
    /// What `type_number` is, if it is known here.
    pub(super) dtype: Option<Dtype>,
    dimensions: u8,
    /// Outermost first; those from `dimensions` on do not exist.
    shape: [usize; MAX_TENSOR_DIMENSIONS],
    /// Offsets from `data_start`; `begin <= end`, and not behind the file's end.
    pub(super) begin: usize,
    pub(super) end: usize,
}

impl Header {
    /// Reads and checks the header of the file whose bytes are `file`. Touches no byte behind the header.
    pub(super) fn parse(file: &[u8]) -> Result<Self, GgufError> {
        let mut cursor = Cursor::new(file);
        let version = version(&mut cursor)?;
        let (claimed_tensors, claimed_pairs) = (cursor.u64()?, cursor.u64()?);
        let pairs = cursor.fits(claimed_pairs, "keys", LEAST_PAIR)?;
        cursor.fits(claimed_tensors, "tensors", LEAST_TENSOR)?;
        let metadata = decode::metadata(&mut cursor, pairs)?;
        let alignment = alignment(&metadata)?;

        let count = cursor.fits(claimed_tensors, "tensors", LEAST_TENSOR)?;
        let mut entries = Vec::with_capacity(count);
        for _ in 0..count {
            cursor.place = Reading::Header;
            entries.push(Entry::read(&mut cursor)?);
        }
        let mut by_name: Vec<usize> = (0..count).collect();
        by_name.sort_unstable_by(|&a, &b| entries[a].name.cmp(&entries[b].name));
        for pair in by_name.windows(2) {
            let name = &entries[pair[0]].name;
            if *name == entries[pair[1]].name {
                return Err(GgufError::DuplicateTensor {
                    name: name.to_string(),
                });
            }
        }

        let data_start = match padded(cursor.at(), alignment) {
            // Padding behind the header is only there to align something.
            Some(start) if count == 0 && start >= file.len() => file.len(),
            Some(start) if start <= file.len() => start,
            _ => {
                return Err(GgufError::NoRoomForPadding {
                    header: cursor.at(),
                    alignment,
                    found: file.len(),
                });
            }
        };
        lay_out(&mut entries, alignment, file.len() - data_start)?;
        Ok(Self {
            version,
            alignment,
            metadata,
            entries,
            by_name,
            data_start,
        })
    }

    /// The position in `entries` of the tensor called `name`.
    pub(super) fn position(&self, name: &str) -> Option<usize> {
        self.by_name
            .binary_search_by(|&position| (*self.entries[position].name).cmp(name))
            .ok()
            .map(|at| self.by_name[at])
    }
}

/// The version, which is 2 or 3. They differ only in that 3 may be big-endian.
fn version(cursor: &mut Cursor<'_>) -> Result<u32, GgufError> {
    let found = cursor.array()?;
    if found != MAGIC {
        return Err(GgufError::Magic { found });
    }
    match cursor.u32()? {
        1 => Err(GgufError::Version1),
        found @ 2..=VERSION => Ok(found),
        // The small numbers of the other byte order end in zeros; llama.cpp tells it by this, too.
        found if found != 0 && found.trailing_zeros() >= 16 => Err(GgufError::BigEndian {
            version: found.swap_bytes(),
        }),
        found => Err(GgufError::UnknownVersion { found }),
    }
}

/// What `metadata` says about the alignment of tensors: a power of two.
pub(super) fn alignment(metadata: &Metadata) -> Result<u32, GgufError> {
    match metadata.value(ALIGNMENT) {
        None => Ok(DEFAULT_ALIGNMENT),
        Some(&Value::U32(alignment)) if alignment.is_power_of_two() => Ok(alignment),
        Some(&Value::U32(found)) => Err(GgufError::Alignment { found }),
        Some(other) => Err(GgufError::WrongType {
            key: ALIGNMENT,
            wanted: "u32",
            found: other.type_name(),
        }),
    }
}

/// The next multiple of the alignment.
pub(super) fn padded(offset: usize, alignment: u32) -> Option<usize> {
    offset.checked_next_multiple_of(usize::try_from(alignment).ok()?)
}

impl Entry {
    /// Reads and judges a description by itself. Where the bytes end is not known yet for a type that is not known here.
    fn read(cursor: &mut Cursor<'_>) -> Result<Self, GgufError> {
        let offset = cursor.at();
        let name = cursor.text()?;
        if name.len() > MAX_TENSOR_NAME {
            return Err(GgufError::NameTooLong {
                offset,
                found: name.len(),
            });
        }
        cursor.place = Reading::Tensor(name);
        let claimed_dimensions = cursor.u32()?;
        let dimensions = match u8::try_from(claimed_dimensions) {
            Ok(few) if usize::from(few) <= MAX_TENSOR_DIMENSIONS => few,
            _ => {
                return Err(GgufError::TooManyDimensions {
                    tensor: name.to_owned(),
                    found: claimed_dimensions,
                });
            }
        };
        let mut claimed_shape = [0; MAX_TENSOR_DIMENSIONS];
        let claimed_shape = &mut claimed_shape[..usize::from(dimensions)];
        // The file has them innermost first.
        for dimension in claimed_shape.iter_mut().rev() {
            *dimension = cursor.u64()?;
        }
        let type_number = cursor.u32()?;
        let begin = cursor.u64()?;

        let dtype = Dtype::of_gguf_type(type_number);
        let overflow = || GgufError::ShapeOverflow {
            tensor: name.to_owned(),
            shape: claimed_shape.to_vec(),
        };
        let mut shape = [0; MAX_TENSOR_DIMENSIONS];
        for (dimension, &claimed) in shape.iter_mut().zip(&*claimed_shape) {
            *dimension = usize::try_from(claimed).map_err(|_| overflow())?;
        }
        let bytes = match size(&shape[..usize::from(dimensions)], dtype) {
            Ok(bytes) => bytes,
            Err(Unsized::Overflow) => return Err(overflow()),
            Err(Unsized::TornBlock { dtype, row }) => {
                return Err(GgufError::TornBlock {
                    tensor: name.to_owned(),
                    dtype,
                    row,
                });
            }
        };
        let offsets = usize::try_from(begin)
            .ok()
            .and_then(|begin| Some((begin, begin.checked_add(bytes)?)));
        let Some((begin, end)) = offsets else {
            return Err(GgufError::TensorPastEnd {
                tensor: name.to_owned(),
                begin,
                bytes,
                found: cursor.remaining(),
            });
        };
        Ok(Self {
            name: Box::from(name),
            type_number,
            dtype,
            dimensions,
            shape,
            begin,
            end,
        })
    }

    pub(super) fn shape(&self) -> &[usize] {
        &self.shape[..usize::from(self.dimensions)]
    }
}

/// Why a shape has no size.
pub(super) enum Unsized {
    Overflow,
    TornBlock { dtype: Dtype, row: usize },
}

/// How many bytes `shape`, outermost dimension first, takes of `dtype`; 0 when that is not known. A dimension of 0 does not hide an
/// overflow of the others.
pub(super) fn size(shape: &[usize], dtype: Option<Dtype>) -> Result<usize, Unsized> {
    let whole = shape
        .iter()
        .try_fold(1_usize, |product, &dimension| {
            product.checked_mul(dimension.max(1))
        })
        .ok_or(Unsized::Overflow)?;
    let Some(dtype) = dtype else {
        return Ok(0);
    };
    // A scalar is a row of one.
    let row = shape.last().copied().unwrap_or(1);
    if !row.is_multiple_of(dtype.block().elements) {
        return Err(Unsized::TornBlock { dtype, row });
    }
    whole
        .checked_mul(dtype.block().bytes)
        .ok_or(Unsized::Overflow)?;
    let elements = shape.iter().product();
    dtype.bytes_of(elements).ok_or(Unsized::Overflow)
}

/// Checks that each tensor begins where the one before ends with its padding, as llama.cpp asks, and that the last ends in the
/// `found` bytes of data, with nothing but padding behind it. Gives tensors of unknown types the bytes up to the next.
fn lay_out(entries: &mut [Entry], alignment: u32, found: usize) -> Result<(), GgufError> {
    // Where the next must begin, or may begin at the earliest.
    let mut expected = 0;
    let mut exact = true;
    for at in 0..entries.len() {
        let entry = &entries[at];
        let begin = entry.begin;
        let tensor = || entry.name.to_string();
        if padded(begin, alignment) != Some(begin) {
            return Err(GgufError::Misaligned {
                tensor: tensor(),
                begin,
                alignment,
            });
        }
        if begin < expected {
            return Err(GgufError::Overlap {
                tensor: tensor(),
                begin,
                expected,
            });
        }
        if begin > expected && exact {
            return Err(GgufError::Hole {
                tensor: tensor(),
                begin,
                expected,
            });
        }
        if entry.end > found {
            return Err(GgufError::TensorPastEnd {
                tensor: tensor(),
                begin: begin as u64,
                bytes: entry.end - begin,
                found,
            });
        }
        exact = entry.dtype.is_some();
        // What does not fit is behind the end of the file, where no tensor and no byte is.
        expected = padded(entry.end, alignment).unwrap_or(usize::MAX);
        if let Some(before) = at.checked_sub(1).and_then(|at| entries.get_mut(at))
            && before.dtype.is_none()
        {
            before.end = begin;
        }
    }
    match entries.last_mut() {
        Some(last) if last.dtype.is_none() => last.end = found,
        _ if found > expected => {
            return Err(GgufError::TrailingBytes { expected, found });
        }
        _ => {}
    }
    Ok(())
}
