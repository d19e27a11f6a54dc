//! Whether a checkpoint is the one that a perturbation was made for.

use std::collections::BTreeMap;

use rayon::prelude::*;
use thiserror::Error;

use super::record::BaseTensor;
use crate::checkpoint::Checkpoint;
use crate::digest::Sha256;
use crate::dtype::Dtype;
use crate::error::{Problems, shown};

/// Describes the tensors `names` of `checkpoint`, hashing them in parallel.
///
/// # Errors
/// The names that the checkpoint does not have, or whose element type cannot be patched.
pub fn describe_base<'a>(
    checkpoint: &Checkpoint,
    names: impl IntoIterator<Item = &'a str>,
) -> Result<BTreeMap<String, BaseTensor>, Problems<BaseProblem>> {
    let mut problems = Vec::new();
    let mut tensors = Vec::new();
    for name in names {
        match checkpoint.tensor(name) {
            None => problems.push(missing(checkpoint, name)),
            Some(tensor) if !tensor.dtype.is_patchable() => {
                problems.push(BaseProblem::NotPatchable {
                    tensor: name.to_owned(),
                    dtype: tensor.dtype,
                })
            }
            Some(tensor) => tensors.push(tensor),
        }
    }
    Problems::none_of(problems)?;
    Ok(tensors
        .par_iter()
        .map(|tensor| (tensor.name.to_owned(), BaseTensor::of(tensor)))
        .collect())
}

/// Compares the tensors of `checkpoint` with `base`, hashing them in parallel.
///
/// # Errors
/// Every tensor that is missing or differs, in the order of the names.
pub fn check_base(
    base: &BTreeMap<String, BaseTensor>,
    checkpoint: &Checkpoint,
) -> Result<(), Problems<BaseProblem>> {
    let entries: Vec<(&String, &BaseTensor)> = base.iter().collect();
    let problems = entries
        .into_par_iter()
        .filter_map(|(name, wanted)| problem_of(name, wanted, checkpoint))
        .collect();
    Problems::none_of(problems)
}

fn problem_of(name: &str, wanted: &BaseTensor, checkpoint: &Checkpoint) -> Option<BaseProblem> {
    let Some(found) = checkpoint.tensor(name) else {
        return Some(missing(checkpoint, name));
    };
    let tensor = || name.to_owned();
    if found.dtype != wanted.dtype {
        return Some(BaseProblem::Dtype {
            tensor: tensor(),
            wanted: wanted.dtype,
            found: found.dtype,
        });
    }
    if found.shape != wanted.shape {
        return Some(BaseProblem::Shape {
            tensor: tensor(),
            wanted: wanted.shape.clone(),
            found: found.shape.to_vec(),
        });
    }
    if !found.dtype.is_patchable() {
        return Some(BaseProblem::NotPatchable {
            tensor: tensor(),
            dtype: found.dtype,
        });
    }
    let digest = found.digest();
    (digest != wanted.sha256).then(|| BaseProblem::Digest {
        tensor: tensor(),
        wanted: wanted.sha256,
        found: digest,
    })
}

fn missing(checkpoint: &Checkpoint, name: &str) -> BaseProblem {
    BaseProblem::Missing {
        tensor: name.to_owned(),
        nearest: checkpoint.nearest_name(name).map(str::to_owned),
    }
}

/// A tensor of a checkpoint that is not the one wanted.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum BaseProblem {
    /// Other bytes.
    #[error("tensor `{}` has the digest {found}, not {wanted}", shown(tensor))]
    Digest {
        /// The tensor.
        tensor: String,
        /// The digest it should have.
        wanted: Sha256,
        /// The digest it has.
        found: Sha256,
    },
    /// Another element type.
    #[error("tensor `{}` is {found}, not {wanted}", shown(tensor))]
    Dtype {
        /// The tensor.
        tensor: String,
        /// The type it should have.
        wanted: Dtype,
        /// The type it has.
        found: Dtype,
    },
    /// Not there.
    #[error("there is no tensor `{}`{}", shown(tensor), match nearest {
        Some(nearest) => format!(" (did you mean `{}`?)", shown(nearest)),
        None => String::new(),
    })]
    Missing {
        /// The tensor.
        tensor: String,
        /// A name that is there and resembles it.
        nearest: Option<String>,
    },
    /// An element type that cannot be patched.
    #[error("tensor `{}` is {dtype}, which cannot be patched", shown(tensor))]
    NotPatchable {
        /// The tensor.
        tensor: String,
        /// Its element type.
        dtype: Dtype,
    },
    /// Another shape.
    #[error("tensor `{}` has shape {found:?}, not {wanted:?}", shown(tensor))]
    Shape {
        /// The tensor.
        tensor: String,
        /// The shape it should have.
        wanted: Vec<usize>,
        /// The shape it has.
        found: Vec<usize>,
    },
}
