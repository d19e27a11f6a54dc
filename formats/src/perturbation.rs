//! Perturbation files: what is to be added to the weights of one particular checkpoint.
//!
//! A perturbation file is a safetensors file with the delta of each patched tensor in one of three forms. `NAME` is the tensor's
//! name in the checkpoint, and all numbers are little-endian:
//!
//! ```text
//! form      tensor         type  shape                       the tensor's shape is
//! dense     NAME           F32   that of the tensor          any
//! low rank  NAME.lora_A    F32   [rank, inputs]              [outputs, inputs], and 1 <= rank <= the smaller of both
//!           NAME.lora_B    F32   [outputs, rank]
//! sparse    NAME.indices   U32   [entries]                   any of at most 2^32 elements
//!           NAME.values    F32   [entries]
//! ```
//!
//! A low-rank delta is the matrix product `lora_B lora_A`. A sparse one has `values` at the elements `indices`, counted row-major
//! and strictly ascending, and zero elsewhere; there may be no entries. Which form a tensor has is read off the names alone: a
//! stored name that the record describes is that tensor's dense form, even one that ends in `.lora_A` or the like, and any other
//! is a described name with one of the four ends. Tensors of one file may have different forms.
//!
//! The metadata has one key, `panacea`, whose value is a JSON object, written canonically (see [`crate::json`]):
//!
//! ```text
//! format_version  1
//! method          how it was found
//! parameters      an object: the settings of the method
//! direction       "restores-safety"; nothing else is read, so that no file can be applied that was made to weaken a model
//! seed            of every random choice
//! space           "weights": the deltas are added to the weights of a model; "adapter": to A and B of a LoRA adapter
//! base            {tensor: {dtype, shape, sha256}}: the tensors it is for; the digest is of the stored bytes
//! data            [{role, name, sha256, rows}]: what it was found from
//! tool            what wrote it
//! ```
//!
//! Reading refuses what it does not know rather than guessing: another version, an unknown field, a tensor that `base` does not
//! describe, half of a form, or two for one tensor. Values that are not finite are refused in both directions, and so are factors
//! whose product might not be.

mod adapter;
mod base;
mod delta;
mod numbers;
mod record;
mod stored;
mod writer;

use std::path::Path;

use thiserror::Error;

use crate::dtype::Dtype;
use crate::error::{FormatError, Problems, shown};
use crate::json::JsonError;
use crate::safetensors::SafetensorsFile;

use stored::StoredDelta;

pub use adapter::{AdapterWriteError, write_adapter};
pub use base::{BaseProblem, check_base, describe_base};
pub use delta::{DeltaTensor, Form, NotFinite};
pub use record::{BaseTensor, DIRECTION, DataSource, FORMAT_VERSION, PerturbationRecord, Space};
pub use writer::{PerturbationWriteError, write_perturbation};

/// An open perturbation file, whose tensors are known to match its record and to be finite.
#[derive(Debug)]
pub struct Perturbation {
    file: SafetensorsFile,
    record: PerturbationRecord,
    deltas: Vec<StoredDelta>,
}

impl Perturbation {
    /// Opens and checks the file at `path`. Reads all of it once, in parallel, to see that every value is finite and every index
    /// in its place.
    ///
    /// # Errors
    /// When it is not a sound safetensors file, or not a perturbation that can be applied.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        Self::of(SafetensorsFile::open(path)?)
    }

    /// Checks `bytes` as if they were the file at `path`, which names them in errors.
    ///
    /// # Errors
    /// As [`Perturbation::open`].
    pub fn from_bytes(path: &Path, bytes: Vec<u8>) -> Result<Self, FormatError> {
        Self::of(SafetensorsFile::from_bytes(path, bytes)?)
    }

    fn of(file: SafetensorsFile) -> Result<Self, FormatError> {
        match Self::checked(&file) {
            Ok((record, deltas)) => Ok(Self {
                file,
                record,
                deltas,
            }),
            Err(error) => Err(FormatError::new(file.path(), error)),
        }
    }

    fn checked(
        file: &SafetensorsFile,
    ) -> Result<(PerturbationRecord, Vec<StoredDelta>), PerturbationError> {
        let [(key, text)] = file.metadata() else {
            return Err(PerturbationError::NoRecord {
                keys: file.metadata().len(),
            });
        };
        if key != METADATA_KEY {
            return Err(PerturbationError::NoRecord { keys: 1 });
        }
        let record = PerturbationRecord::parse(text)?;
        if file.tensors().len() == 0 {
            return Err(PerturbationError::Empty);
        }
        let deltas = stored::deltas_of(file, &record.base).map_err(PerturbationError::Tensors)?;
        Ok((record, deltas))
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// The file itself.
    pub fn file(&self) -> &SafetensorsFile {
        &self.file
    }

    /// How it was made, and for what.
    pub fn record(&self) -> &PerturbationRecord {
        &self.record
    }

    /// The deltas, in the order of the file.
    pub fn deltas(&self) -> impl ExactSizeIterator<Item = DeltaTensor<'_>> {
        self.deltas.iter().map(|delta| delta.of_file(&self.file))
    }
}

/// The one key of the metadata.
const METADATA_KEY: &str = "panacea";

/// Why a sound safetensors file is not a perturbation that can be applied.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PerturbationError {
    /// It was not made to restore safety.
    #[error(
        "its direction is `{}`, and only `{DIRECTION}` is applied",
        shown(found)
    )]
    Direction {
        /// What it says.
        found: String,
    },
    /// It perturbs nothing.
    #[error("it has no tensors")]
    Empty,
    /// No record, or something beside it.
    #[error(
        "it is not a perturbation: its metadata has {keys} keys, and a perturbation has the one key `{METADATA_KEY}`"
    )]
    NoRecord {
        /// How many keys there are.
        keys: usize,
    },
    /// The record lacks a field, or has one of another type, or one that is not known.
    #[error("its record is not the JSON that it should be")]
    RecordSyntax {
        /// What is wrong.
        source: JsonError,
    },
    /// A parameter space that is not known.
    #[error(
        "its parameter space is `{}`, and only `adapter` and `weights` are supported",
        shown(found)
    )]
    Space {
        /// What it says.
        found: String,
    },
    /// Tensors that do not fit the record.
    #[error("{0}")]
    Tensors(Problems<TensorProblem>),
    /// Another version of the record.
    #[error(
        "its format version is {}, and only {FORMAT_VERSION} is supported",
        shown(found)
    )]
    Version {
        /// What it says, as JSON.
        found: String,
    },
}

/// A tensor that does not fit the record.
#[derive(Clone, Debug, Error, PartialEq)]
#[non_exhaustive]
pub enum TensorProblem {
    /// Described and not there.
    #[error("tensor `{}` is in the record and not in the file", shown(tensor))]
    Absent {
        /// The tensor.
        tensor: String,
    },
    /// For a base tensor that cannot be patched.
    #[error(
        "tensor `{}` is for a base of {dtype}, which cannot be patched",
        shown(tensor)
    )]
    BaseDtype {
        /// The tensor.
        tensor: String,
        /// The element type of the base.
        dtype: Dtype,
    },
    /// Of another element type than its form has.
    #[error(
        "tensor `{}` is {found}, and its form has {wanted} there",
        shown(tensor)
    )]
    Dtype {
        /// The tensor.
        tensor: String,
        /// Its element type.
        found: Dtype,
        /// The element type of the form.
        wanted: Dtype,
    },
    /// Indices and values that are not two lists of one length.
    #[error(
        "tensor `{}` has indices of shape {indices:?} and values of shape {values:?}, not two lists of one length",
        shown(tensor)
    )]
    Entries {
        /// The tensor.
        tensor: String,
        /// The shape of the indices.
        indices: Vec<usize>,
        /// The shape of the values.
        values: Vec<usize>,
    },
    /// Factors whose product has not the shape of the base.
    #[error(
        "tensor `{}` has factors A of shape {a:?} and B of shape {b:?}, whose product is not of its base's shape {base:?}",
        shown(tensor)
    )]
    Factors {
        /// The tensor.
        tensor: String,
        /// The shape of `A`, which should be rank x inputs.
        a: Vec<usize>,
        /// The shape of `B`, which should be outputs x rank.
        b: Vec<usize>,
        /// The shape of the base.
        base: Vec<usize>,
    },
    /// Half of a form, or more than one.
    #[error(
        "tensor `{}` is there as {}, and one form is wanted: itself, `.lora_A` and `.lora_B`, or `.indices` and `.values`",
        shown(tensor),
        parts.iter().map(|part| if part.is_empty() { "itself".to_owned() } else { format!("`{part}`") }).collect::<Vec<_>>().join(", ")
    )]
    Form {
        /// The tensor.
        tensor: String,
        /// The ends of the names that are there; an empty one is the name itself.
        parts: Vec<&'static str>,
    },
    /// An index that does not ascend, or is of no element.
    #[error(
        "tensor `{}` has index {index} at entry {entry}{}, which must ascend and stay below {elements}",
        shown(tensor),
        after.map_or(String::new(), |after| format!(" after {after}"))
    )]
    Index {
        /// The tensor.
        tensor: String,
        /// The place in the list.
        entry: usize,
        /// The index.
        index: u32,
        /// The one before it.
        after: Option<u32>,
        /// How many elements the tensor has.
        elements: usize,
    },
    /// A part under the name of another tensor of the record, as which it would be read.
    #[error(
        "tensor `{}` would be stored as `{}`, which is the name of another",
        shown(tensor),
        shown(stored)
    )]
    NameTaken {
        /// The tensor.
        tensor: String,
        /// The name of the part.
        stored: String,
    },
    /// A value that is infinite or not a number.
    #[error("tensor `{}` is not finite at element {element}", shown(tensor))]
    NotFinite {
        /// The tensor.
        tensor: String,
        /// The first such element.
        element: usize,
    },
    /// Finite factors of a product that may not be finite.
    #[error(
        "tensor `{}` has factors whose product may reach {at_most:e}, beyond what F32 holds",
        shown(tensor)
    )]
    Product {
        /// The tensor.
        tensor: String,
        /// What no element exceeds.
        at_most: f64,
    },
    /// A rank above that of any matrix of the shape.
    #[error(
        "tensor `{}` is of rank {rank}, and its shape allows {most}",
        shown(tensor)
    )]
    Rank {
        /// The tensor.
        tensor: String,
        /// The rank of the factors.
        rank: usize,
        /// The smaller dimension of the base.
        most: usize,
    },
    /// Not of the shape of its base.
    #[error(
        "tensor `{}` has shape {found:?}, and its base {base:?}",
        shown(tensor)
    )]
    Shape {
        /// The tensor.
        tensor: String,
        /// Its shape.
        found: Vec<usize>,
        /// The shape of the base.
        base: Vec<usize>,
    },
    /// Sparse, with more elements than indices tell apart.
    #[error(
        "tensor `{}` is sparse, and its base's shape {base:?} has more than 2^32 elements",
        shown(tensor)
    )]
    TooLarge {
        /// The tensor.
        tensor: String,
        /// The shape of the base.
        base: Vec<usize>,
    },
    /// There and not described.
    #[error("tensor `{}` is not in the record", shown(tensor))]
    Undescribed {
        /// The tensor.
        tensor: String,
    },
}
