//! The header of a safetensors file: bytes of the whole file in, a checked table of tensors out.
//!
//! JSON is walked once with visitors that keep every entry they meet, repeated ones too, because `serde_json`'s own maps drop
//! repetitions silently. Names, sizes and offsets are judged afterwards, with checked arithmetic, against the file's length.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use thiserror::Error;

use crate::dtype::{Dtype, UnknownDtype};
use crate::error::shown;
use crate::json::JsonError;

/// Longest header in bytes that is parsed. The `safetensors` crate has the same limit (`MAX_HEADER_SIZE`).
pub const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Most dimensions of one tensor; `NumPy` has 64 and PyTorch's kernels fewer.
pub const MAX_DIMENSIONS: usize = 64;

/// The checked table of one file.
#[derive(Debug)]
pub(super) struct Header {
    /// In the order of their bytes. They tile `data_start..` of the file exactly.
    pub(super) entries: Vec<Entry>,
    /// Positions in `entries`, in the order of the JSON.
    pub(super) listed: Vec<usize>,
    /// Positions in `entries`, by name.
    by_name: Vec<usize>,
    /// `__metadata__`, in the order of the JSON.
    pub(super) metadata: Vec<(String, String)>,
    /// Where the tensors' bytes start in the file.
    pub(super) data_start: usize,
}

/// One tensor.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) dtype: Dtype,
    /// The product of the dimensions does not overflow, nor does its size in bits.
    pub(super) shape: Vec<usize>,
    /// Offsets from `data_start`; `begin <= end`.
    pub(super) begin: usize,
    pub(super) end: usize,
}

impl Header {
    /// Reads and checks the header of the file whose bytes are `file`. Touches no byte behind the header.
    pub(super) fn parse(file: &[u8]) -> Result<Self, SafetensorsError> {
        let json = header_text(file)?;
        let data_start = PREFIX_BYTES + json.len();
        let mut parser = serde_json::Deserializer::from_str(json);
        let raw = parser
            .deserialize_map(HeaderVisitor)
            .and_then(|raw| parser.end().map(|()| raw))
            .map_err(|error| SafetensorsError::HeaderSyntax {
                source: JsonError::from(error),
            })?;
        if let Some(fault) = raw.fault {
            return Err(fault);
        }

        let mut entries = raw
            .entries
            .into_iter()
            .map(|(name, entry)| entry.checked(name))
            .collect::<Result<Vec<_>, _>>()?;
        let mut order: Vec<usize> = (0..entries.len()).collect();
        order.sort_by_key(|&listed| (entries[listed].begin, entries[listed].end, listed));
        let mut listed = vec![0; order.len()];
        for (position, &from) in order.iter().enumerate() {
            listed[from] = position;
        }
        // A stable sort by the same key puts the entries where `order` says.
        entries.sort_by_key(|entry| (entry.begin, entry.end));

        let mut by_name: Vec<usize> = (0..entries.len()).collect();
        by_name.sort_by(|&a, &b| entries[a].name.cmp(&entries[b].name));
        refuse_repeated(
            by_name
                .iter()
                .map(|&position| entries[position].name.as_str()),
        )
        .map_err(|name| SafetensorsError::DuplicateTensor { name })?;
        let mut keys: Vec<&str> = raw.metadata.iter().map(|(key, _)| key.as_str()).collect();
        keys.sort_unstable();
        refuse_repeated(keys.into_iter())
            .map_err(|key| SafetensorsError::DuplicateMetadata { key })?;

        let end = tiled(&entries)?;
        let found = file.len() - data_start;
        if end > found {
            return Err(SafetensorsError::DataTooShort {
                claimed: end,
                found,
            });
        }
        if end < found {
            return Err(SafetensorsError::DataTooLong {
                claimed: end,
                found,
            });
        }
        Ok(Self {
            entries,
            listed,
            by_name,
            metadata: raw.metadata,
            data_start,
        })
    }

    /// The position in `entries` of the tensor called `name`.
    pub(super) fn position(&self, name: &str) -> Option<usize> {
        self.by_name
            .binary_search_by(|&position| self.entries[position].name.as_str().cmp(name))
            .ok()
            .and_then(|found| self.by_name.get(found).copied())
    }
}

/// The header's JSON, after its length was checked.
fn header_text(file: &[u8]) -> Result<&str, SafetensorsError> {
    let Some((prefix, rest)) = file.split_first_chunk::<PREFIX_BYTES>() else {
        return Err(SafetensorsError::TooShort { found: file.len() });
    };
    let claimed = u64::from_le_bytes(*prefix);
    if claimed > MAX_HEADER_BYTES {
        return Err(SafetensorsError::HeaderTooLong { claimed });
    }
    let header = usize::try_from(claimed)
        .ok()
        .and_then(|length| rest.get(..length))
        .ok_or(SafetensorsError::HeaderPastEnd {
            claimed,
            remaining: rest.len(),
        })?;
    match header.first() {
        Some(b'{') => {}
        first => {
            return Err(SafetensorsError::HeaderStart {
                found: first.copied(),
            });
        }
    }
    std::str::from_utf8(header).map_err(|error| SafetensorsError::HeaderNotUtf8 {
        offset: PREFIX_BYTES + error.valid_up_to(),
    })
}

/// The first name of an ordered sequence that comes twice, as an error.
fn refuse_repeated<'a>(mut ordered: impl Iterator<Item = &'a str>) -> Result<(), String> {
    let Some(mut last) = ordered.next() else {
        return Ok(());
    };
    for name in ordered {
        if name == last {
            return Err(name.to_owned());
        }
        last = name;
    }
    Ok(())
}

/// Checks that entries, in the order of their bytes, leave no hole and do not overlap. Returns where they end.
fn tiled(entries: &[Entry]) -> Result<usize, SafetensorsError> {
    let mut end = 0;
    for entry in entries {
        if entry.begin > end {
            return Err(SafetensorsError::Hole {
                tensor: entry.name.clone(),
                begin: entry.begin,
                expected: end,
            });
        }
        if entry.begin < end {
            return Err(SafetensorsError::Overlap {
                tensor: entry.name.clone(),
                begin: entry.begin,
                expected: end,
            });
        }
        end = entry.end;
    }
    Ok(end)
}

/// The 8 bytes that hold the header's length.
pub(super) const PREFIX_BYTES: usize = 8;

/// The one name in a header that is no tensor.
const METADATA: &str = "__metadata__";

/// What the JSON says, repetitions included.
struct RawHeader {
    entries: Vec<(String, RawEntry)>,
    metadata: Vec<(String, String)>,
    fault: Option<SafetensorsError>,
}

#[derive(Default)]
struct RawEntry {
    dtype: Option<String>,
    shape: Option<RawShape>,
    data_offsets: Option<[u64; 2]>,
    fault: Option<EntryFault>,
}

enum EntryFault {
    Duplicate(&'static str),
    Unknown(String),
}

/// The first dimensions, and how many there are.
struct RawShape {
    dimensions: Vec<u64>,
    count: usize,
}

impl RawEntry {
    /// Judges the entry called `tensor` by itself.
    fn checked(self, tensor: String) -> Result<Entry, SafetensorsError> {
        match self.fault {
            Some(EntryFault::Duplicate(field)) => {
                return Err(SafetensorsError::DuplicateField { tensor, field });
            }
            Some(EntryFault::Unknown(field)) => {
                return Err(SafetensorsError::UnknownField { tensor, field });
            }
            None => {}
        }
        let missing = |field| SafetensorsError::MissingField {
            tensor: tensor.clone(),
            field,
        };
        let dtype = self.dtype.ok_or_else(|| missing(DTYPE))?;
        let shape = self.shape.ok_or_else(|| missing(SHAPE))?;
        let [claimed_begin, claimed_end] =
            self.data_offsets.ok_or_else(|| missing(DATA_OFFSETS))?;

        let dtype = match Dtype::in_safetensors(&dtype) {
            Ok(dtype) => dtype,
            Err(source) => return Err(SafetensorsError::UnknownDtype { tensor, source }),
        };
        if shape.count > MAX_DIMENSIONS {
            return Err(SafetensorsError::TooManyDimensions {
                tensor,
                found: shape.count,
            });
        }
        let Some((dimensions, elements)) = sized(&shape.dimensions, dtype) else {
            return Err(SafetensorsError::ShapeOverflow {
                tensor,
                dtype,
                shape: shape.dimensions,
            });
        };
        let Some(needed) = dtype.bytes_of(elements) else {
            return Err(SafetensorsError::TornByte {
                tensor,
                dtype,
                elements,
            });
        };
        let offsets = usize::try_from(claimed_begin)
            .ok()
            .zip(usize::try_from(claimed_end).ok())
            .and_then(|(begin, end)| Some((begin, end, end.checked_sub(begin)?)));
        let Some((begin, end, given)) = offsets else {
            return Err(SafetensorsError::OffsetsReversed {
                tensor,
                begin: claimed_begin,
                end: claimed_end,
            });
        };
        if given != needed {
            return Err(SafetensorsError::SizeMismatch {
                tensor,
                dtype,
                shape: dimensions,
                needed,
                given,
            });
        }
        Ok(Entry {
            name: tensor,
            dtype,
            shape: dimensions,
            begin,
            end,
        })
    }
}

/// The dimensions as `usize`, and the number of elements, unless a number does not fit, that of the bits included. A dimension of
/// 0 does not hide an overflow of the others: they are multiplied in their order.
fn sized(dimensions: &[u64], dtype: Dtype) -> Option<(Vec<usize>, usize)> {
    let dimensions = dimensions
        .iter()
        .map(|&dimension| usize::try_from(dimension).ok())
        .collect::<Option<Vec<_>>>()?;
    let elements = dimensions.iter().try_fold(1_usize, |product, &dimension| {
        product.checked_mul(dimension)
    })?;
    // The `safetensors` crate counts bits.
    elements.checked_mul(8 * dtype.block().bytes)?;
    Some((dimensions, elements))
}

const DTYPE: &str = "dtype";
const SHAPE: &str = "shape";
const DATA_OFFSETS: &str = "data_offsets";

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = RawHeader;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
        let mut header = RawHeader {
            entries: Vec::new(),
            metadata: Vec::new(),
            fault: None,
        };
        let mut seen_metadata = false;
        while let Some(name) = map.next_key::<String>()? {
            if name == METADATA {
                if seen_metadata {
                    header.fault = Some(SafetensorsError::DuplicateTensor { name });
                }
                seen_metadata = true;
                header.metadata = map.next_value_seed(MetadataSeed)?;
            } else {
                let entry = map.next_value_seed(EntrySeed)?;
                header.entries.push((name, entry));
            }
        }
        Ok(header)
    }
}

struct MetadataSeed;

impl<'de> DeserializeSeed<'de> for MetadataSeed {
    type Value = Vec<(String, String)>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for MetadataSeed {
    type Value = Vec<(String, String)>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("`__metadata__` as an object of strings")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut pairs = Vec::new();
        while let Some(pair) = map.next_entry()? {
            pairs.push(pair);
        }
        Ok(pairs)
    }
}

struct EntrySeed;

impl<'de> DeserializeSeed<'de> for EntrySeed {
    type Value = RawEntry;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<RawEntry, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for EntrySeed {
    type Value = RawEntry;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with `dtype`, `shape` and `data_offsets`")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawEntry, A::Error> {
        let mut entry = RawEntry::default();
        while let Some(field) = map.next_key::<String>()? {
            let repeated = match field.as_str() {
                DTYPE => entry.dtype.replace(map.next_value()?).map(|_| DTYPE),
                SHAPE => entry
                    .shape
                    .replace(map.next_value_seed(ShapeSeed)?)
                    .map(|_| SHAPE),
                DATA_OFFSETS => entry
                    .data_offsets
                    .replace(map.next_value()?)
                    .map(|_| DATA_OFFSETS),
                _ => {
                    map.next_value::<IgnoredAny>()?;
                    entry.fault = Some(EntryFault::Unknown(field));
                    None
                }
            };
            if let Some(field) = repeated {
                entry.fault = Some(EntryFault::Duplicate(field));
            }
        }
        Ok(entry)
    }
}

struct ShapeSeed;

impl<'de> DeserializeSeed<'de> for ShapeSeed {
    type Value = RawShape;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<RawShape, D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for ShapeSeed {
    type Value = RawShape;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("`shape` as an array of unsigned integers")
    }

    /// Keeps only as many dimensions as a tensor may have, since eight bytes for each "0," of a hostile header add up.
    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<RawShape, A::Error> {
        let mut shape = RawShape {
            dimensions: Vec::new(),
            count: 0,
        };
        while let Some(dimension) = sequence.next_element()? {
            shape.count += 1;
            if shape.dimensions.len() < MAX_DIMENSIONS {
                shape.dimensions.push(dimension);
            }
        }
        Ok(shape)
    }
}

/// Why bytes are not a sound safetensors file. Offsets are in bytes.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SafetensorsError {
    /// Bytes behind the last tensor.
    #[error("the tensors end after {claimed} bytes of data, and {} bytes follow", found - claimed)]
    DataTooLong {
        /// Bytes of data that the header describes.
        claimed: usize,
        /// Bytes of data in the file.
        found: usize,
    },
    /// The file ends before its last tensor does.
    #[error("the tensors need {claimed} bytes of data, and the file has {found}")]
    DataTooShort {
        /// Bytes of data that the header describes.
        claimed: usize,
        /// Bytes of data in the file.
        found: usize,
    },
    /// A field of an entry comes twice.
    #[error(
        "the header gives tensor `{}` the field `{field}` twice",
        shown(tensor)
    )]
    DuplicateField {
        /// The entry.
        tensor: String,
        /// The field.
        field: &'static str,
    },
    /// A metadata key comes twice.
    #[error("the header's metadata has the key `{}` twice", shown(key))]
    DuplicateMetadata {
        /// The key.
        key: String,
    },
    /// A name comes twice.
    #[error("the header names `{}` twice", shown(name))]
    DuplicateTensor {
        /// The name.
        name: String,
    },
    /// The JSON is not UTF-8.
    #[error("the header is not UTF-8 at offset {offset}")]
    HeaderNotUtf8 {
        /// Offset of the first bad byte in the file.
        offset: usize,
    },
    /// The header does not fit in the file.
    #[error("the header says {claimed} bytes, but {remaining} bytes remain after offset 8")]
    HeaderPastEnd {
        /// The length that the file claims.
        claimed: u64,
        /// Bytes behind the length.
        remaining: usize,
    },
    /// The JSON does not start with a brace.
    #[error("the header must start with `{{`, and {}", match found {
        Some(byte) => format!("starts with byte {byte:#04x}"),
        None => "is empty".to_owned(),
    })]
    HeaderStart {
        /// The first byte, if there is one.
        found: Option<u8>,
    },
    /// Not the JSON that a header is.
    #[error("the header is not the JSON that the format asks for")]
    HeaderSyntax {
        /// What was expected, with line and column in the header.
        source: JsonError,
    },
    /// The header is longer than any sound one.
    #[error("the header says {claimed} bytes, above the limit of {MAX_HEADER_BYTES}")]
    HeaderTooLong {
        /// The length that the file claims.
        claimed: u64,
    },
    /// Bytes that belong to no tensor.
    #[error(
        "tensor `{}` starts at data offset {begin}, leaving a hole from {expected}",
        shown(tensor)
    )]
    Hole {
        /// The tensor behind the hole.
        tensor: String,
        /// Where it starts.
        begin: usize,
        /// Where the one before ends.
        expected: usize,
    },
    /// An entry lacks a field.
    #[error("the header gives tensor `{}` no `{field}`", shown(tensor))]
    MissingField {
        /// The entry.
        tensor: String,
        /// The field.
        field: &'static str,
    },
    /// Offsets run backwards.
    #[error("tensor `{}` has the data offsets {begin} to {end}", shown(tensor))]
    OffsetsReversed {
        /// The tensor.
        tensor: String,
        /// Its start.
        begin: u64,
        /// Its end.
        end: u64,
    },
    /// Bytes that belong to two tensors.
    #[error(
        "tensor `{}` starts at data offset {begin}, inside another that ends at {expected}",
        shown(tensor)
    )]
    Overlap {
        /// The later tensor.
        tensor: String,
        /// Where it starts.
        begin: usize,
        /// Where the earlier one ends.
        expected: usize,
    },
    /// The size of a tensor overflows.
    #[error(
        "tensor `{}` of {dtype} and shape {shape:?} is larger than any memory",
        shown(tensor)
    )]
    ShapeOverflow {
        /// The tensor.
        tensor: String,
        /// Its element type.
        dtype: Dtype,
        /// Its dimensions.
        shape: Vec<u64>,
    },
    /// Shape and element type ask for another size than the offsets give.
    #[error(
        "tensor `{}` of {dtype} and shape {shape:?} needs {needed} bytes, and its offsets give it {given}",
        shown(tensor)
    )]
    SizeMismatch {
        /// The tensor.
        tensor: String,
        /// Its element type.
        dtype: Dtype,
        /// Its dimensions.
        shape: Vec<usize>,
        /// Bytes by shape and element type.
        needed: usize,
        /// Bytes by offsets.
        given: usize,
    },
    /// More dimensions than [`MAX_DIMENSIONS`].
    #[error(
        "tensor `{}` has {found} dimensions, above the limit of {MAX_DIMENSIONS}",
        shown(tensor)
    )]
    TooManyDimensions {
        /// The tensor.
        tensor: String,
        /// How many.
        found: usize,
    },
    /// Not even room for the header's length.
    #[error("the file has {found} bytes, and the header's length alone takes 8")]
    TooShort {
        /// Length of the file.
        found: usize,
    },
    /// Packed elements that end within a byte.
    #[error(
        "tensor `{}` has {elements} elements of {dtype}, which take no whole number of bytes",
        shown(tensor)
    )]
    TornByte {
        /// The tensor.
        tensor: String,
        /// Its element type.
        dtype: Dtype,
        /// How many it claims.
        elements: usize,
    },
    /// An element type that the format does not have.
    #[error("the element type of tensor `{}` is unknown", shown(tensor))]
    UnknownDtype {
        /// The tensor.
        tensor: String,
        /// The name found.
        source: UnknownDtype,
    },
    /// A field that entries do not have.
    #[error(
        "the header gives tensor `{}` the unknown field `{}`",
        shown(tensor),
        shown(field)
    )]
    UnknownField {
        /// The entry.
        tensor: String,
        /// The field.
        field: String,
    },
}
