//! Perturbation files: what is to be added to the weights of one particular checkpoint.
//!
//! A perturbation file is a safetensors file with one `F32` tensor for each patched tensor, of the same name and shape. Its
//! metadata has one key, `panacea`, whose value is a JSON object, written canonically (see [`crate::json`]):
//!
//! ```text
//! format_version  1
//! method          how it was found
//! parameters      an object: the settings of the method
//! direction       "restores-safety"; nothing else is read, so that no file can be applied that was made to weaken a model
//! seed            of every random choice
//! space           "weights": the tensors are added to the weights themselves
//! base            {tensor: {dtype, shape, sha256}}: the tensors it is for; the digest is of the stored bytes
//! data            [{role, name, sha256, rows}]: what it was found from
//! tool            what wrote it
//! ```
//!
//! Reading refuses what it does not know rather than guessing: another version, an unknown field, a tensor that `base` does not
//! describe. Values that are not finite are refused in both directions.

mod base;
mod record;
mod writer;

use std::path::Path;

use rayon::prelude::*;
use thiserror::Error;

use crate::dtype::Dtype;
use crate::error::{FormatError, Problems, shown};
use crate::json::JsonError;
use crate::safetensors::SafetensorsFile;
use crate::tensor::{TensorView, WidenError};

pub use base::{BaseProblem, check_base, describe_base};
pub use record::{BaseTensor, DIRECTION, DataSource, FORMAT_VERSION, PerturbationRecord, Space};
pub use writer::{PerturbationWriteError, write_perturbation};

/// An open perturbation file, whose tensors are known to match its record and to be finite.
#[derive(Debug)]
pub struct Perturbation {
    file: SafetensorsFile,
    record: PerturbationRecord,
}

impl Perturbation {
    /// Opens and checks the file at `path`. Reads all of it once, in parallel, to see that every value is finite.
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
        match Self::record_of(&file) {
            Ok(record) => Ok(Self { file, record }),
            Err(error) => Err(FormatError::new(file.path(), error)),
        }
    }

    fn record_of(file: &SafetensorsFile) -> Result<PerturbationRecord, PerturbationError> {
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
        let stored: Vec<TensorView<'_>> = file.tensors().collect();
        for tensor in &stored {
            if !record.base.contains_key(tensor.name)
                && let Some(form) = OTHER_FORMS
                    .iter()
                    .find(|form| tensor.name.ends_with(**form))
            {
                return Err(PerturbationError::UnsupportedForm {
                    tensor: tensor.name.to_owned(),
                    form,
                });
            }
        }
        // Collected in the order of the tensors, so that the message does not depend on threads.
        let mut problems: Vec<TensorProblem> = stored
            .par_iter()
            .flat_map_iter(|tensor| problem_of(tensor, &record))
            .collect();
        problems.extend(
            record
                .base
                .keys()
                .filter(|name| file.tensor(name).is_none())
                .map(|name| TensorProblem::Absent {
                    tensor: name.clone(),
                }),
        );
        Problems::none_of(problems).map_err(PerturbationError::Tensors)?;
        Ok(record)
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

    /// The tensors, in the order of the file.
    pub fn deltas(&self) -> impl ExactSizeIterator<Item = DeltaTensor<'_>> {
        self.file.tensors().map(|tensor| DeltaTensor {
            name: tensor.name,
            shape: tensor.shape,
            values: Values::Stored(tensor),
        })
    }
}

/// The problem with one stored tensor, if there is one.
fn problem_of(tensor: &TensorView<'_>, record: &PerturbationRecord) -> Option<TensorProblem> {
    let name = || tensor.name.to_owned();
    let Some(base) = record.base.get(tensor.name) else {
        return Some(TensorProblem::Undescribed { tensor: name() });
    };
    if tensor.dtype != Dtype::F32 {
        return Some(TensorProblem::Dtype {
            tensor: name(),
            found: tensor.dtype,
        });
    }
    if tensor.shape != base.shape {
        return Some(TensorProblem::Shape {
            tensor: name(),
            found: tensor.shape.to_vec(),
            base: base.shape.clone(),
        });
    }
    if !base.dtype.is_patchable() {
        return Some(TensorProblem::BaseDtype {
            tensor: name(),
            dtype: base.dtype,
        });
    }
    let (values, _) = tensor.bytes.as_chunks();
    values
        .iter()
        .position(|&bytes| !f32::from_le_bytes(bytes).is_finite())
        .map(|element| TensorProblem::NotFinite {
            tensor: name(),
            element,
        })
}

/// What is to be added to one tensor: as many `f32` values as the shape holds, in a file or in memory.
#[derive(Clone, Copy, Debug)]
pub struct DeltaTensor<'a> {
    name: &'a str,
    shape: &'a [usize],
    values: Values<'a>,
}

#[derive(Clone, Copy, Debug)]
enum Values<'a> {
    Memory(&'a [f32]),
    Stored(TensorView<'a>),
}

impl<'a> DeltaTensor<'a> {
    /// `values` for the tensor `name` of `shape`, row-major; nothing when their number is not that of the shape.
    pub fn new(name: &'a str, shape: &'a [usize], values: &'a [f32]) -> Option<Self> {
        let elements = shape.iter().try_fold(1_usize, |product, &dimension| {
            product.checked_mul(dimension)
        })?;
        (elements == values.len()).then_some(Self {
            name,
            shape,
            values: Values::Memory(values),
        })
    }

    /// The name of the tensor that it is added to.
    pub fn name(&self) -> &'a str {
        self.name
    }

    /// Its shape.
    pub fn shape(&self) -> &'a [usize] {
        self.shape
    }

    /// How many values it has.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Copies the values in `range` to `out`, which is as long as `range`.
    ///
    /// # Errors
    /// When the range is not within the tensor or not as long as `out`.
    pub fn read_into(
        &self,
        range: std::ops::Range<usize>,
        out: &mut [f32],
    ) -> Result<(), WidenError> {
        match self.values {
            Values::Stored(tensor) => tensor.widen_into(range, out),
            Values::Memory(values) => {
                let misfit = WidenError::Range {
                    start: range.start,
                    end: range.end,
                    elements: values.len(),
                    room: out.len(),
                };
                match values.get(range) {
                    Some(values) if values.len() == out.len() => {
                        out.copy_from_slice(values);
                        Ok(())
                    }
                    _ => Err(misfit),
                }
            }
        }
    }

    /// The first value that is not finite.
    pub fn first_not_finite(&self) -> Option<usize> {
        match self.values {
            Values::Memory(values) => values.iter().position(|value| !value.is_finite()),
            Values::Stored(tensor) => {
                let (values, _) = tensor.bytes.as_chunks();
                values
                    .iter()
                    .position(|&bytes| !f32::from_le_bytes(bytes).is_finite())
            }
        }
    }
}

/// The one key of the metadata.
const METADATA_KEY: &str = "panacea";

/// Ends of names that stand for low-rank and sparse forms.
const OTHER_FORMS: &[&str] = &[".lora_A", ".lora_B", ".indices", ".values"];

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
        "its parameter space is `{}`, and only `weights` is supported",
        shown(found)
    )]
    Space {
        /// What it says.
        found: String,
    },
    /// Tensors that do not fit the record.
    #[error("{0}")]
    Tensors(Problems<TensorProblem>),
    /// A low-rank or sparse form.
    #[error(
        "tensor `{}` is in the form `{form}`, which is not supported yet; dense tensors are",
        shown(tensor)
    )]
    UnsupportedForm {
        /// The tensor.
        tensor: String,
        /// The end of its name.
        form: &'static str,
    },
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
#[derive(Clone, Debug, Error, PartialEq, Eq)]
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
    /// Not `F32`.
    #[error("tensor `{}` is {found}, and a perturbation is F32", shown(tensor))]
    Dtype {
        /// The tensor.
        tensor: String,
        /// Its element type.
        found: Dtype,
    },
    /// A value that is infinite or not a number.
    #[error("tensor `{}` is not finite at element {element}", shown(tensor))]
    NotFinite {
        /// The tensor.
        tensor: String,
        /// The first such element.
        element: usize,
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
    /// There and not described.
    #[error("tensor `{}` is not in the record", shown(tensor))]
    Undescribed {
        /// The tensor.
        tensor: String,
    },
}
