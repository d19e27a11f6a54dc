//! The parts of one GGUF file, which lie beside each other.
//!
//! In: the first part, open. Out: all of them, in order. What all parts say is compared, also what llama.cpp does not look at (that
//! later parts count as many parts and tensors as the first): a part that a copy went wrong with should not be patched.

use std::collections::HashMap;
use std::path::Path;

use thiserror::Error;

use super::{CheckpointError, Shard};
use crate::error::{FormatError, Problems, shown};
use crate::gguf::{GgufFile, Split};
use crate::weights_file::WeightsFile;

/// Opens all parts of which `first`, the file called `name` at `path`, says by `split` that it is one.
///
/// # Errors
/// When it is not the first, a part is missing or unsound, or they do not fit together; all disagreements are listed.
pub(super) fn open(
    path: &Path,
    name: &str,
    first: GgufFile,
    split: Split,
) -> Result<Vec<Shard>, FormatError> {
    let refused = |error: CheckpointError| FormatError::new(path, error);
    let Some(stem) = split.stem(name) else {
        return Err(refused(CheckpointError::PartName {
            part: u32::from(split.number) + 1,
            wanted: split.file_name("NAME", split.number),
        }));
    };
    if split.number > 0 {
        return Err(refused(CheckpointError::LaterPart {
            first: split.file_name(stem, 0),
        }));
    }
    let others: Vec<String> = (1..split.count)
        .map(|number| split.file_name(stem, number))
        .collect();
    let missing = others
        .iter()
        .filter(|name| !path.with_file_name(name).exists())
        .map(|name| PartProblem::Missing { part: name.clone() });
    Problems::none_of(missing.collect()).map_err(|problems| refused(problems.into()))?;

    let mut parts = vec![(name.to_owned(), first)];
    for name in others {
        let file = GgufFile::open(&path.with_file_name(&name))?;
        parts.push((name, file));
    }
    Problems::none_of(problems(&parts, split)?).map_err(|problems| refused(problems.into()))?;
    let shards = parts.into_iter().map(|(name, file)| Shard {
        name,
        file: WeightsFile::Gguf(file),
    });
    Ok(shards.collect())
}

/// Where `parts` and what the first says by `first` disagree.
fn problems(parts: &[(String, GgufFile)], first: Split) -> Result<Vec<PartProblem>, FormatError> {
    let mut problems = Vec::new();
    // Of every type, also of those that are not known here.
    let mut holders: HashMap<&str, &str> = HashMap::new();
    let mut found = 0_usize;
    for (number, (name, file)) in (0..first.count).zip(parts) {
        let wanted = Split { number, ..first };
        let claimed =
            Split::of(file.metadata()).map_err(|error| FormatError::new(file.path(), error))?;
        if claimed != Some(wanted) {
            problems.push(PartProblem::Claim {
                part: name.clone(),
                wanted,
                claimed,
            });
        }
        found += file.tensors().len();
        for tensor in file.tensors() {
            if let Some(other) = holders.insert(tensor.name, name) {
                problems.push(PartProblem::TensorTwice {
                    tensor: tensor.name.to_owned(),
                    parts: [other.to_owned(), name.clone()],
                });
            }
        }
    }
    if usize::try_from(first.tensors) != Ok(found) {
        problems.push(PartProblem::TensorCount {
            claimed: first.tensors,
            found,
        });
    }
    Ok(problems)
}

/// A disagreement between the parts of a GGUF file.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum PartProblem {
    /// A part that says of itself that it is another, or of another file.
    #[error("`{}` says that it is {}, not {}", shown(part), told(claimed.as_ref()), told(Some(wanted)))]
    Claim {
        /// The part's file name.
        part: String,
        /// What it must be, by its name and what the first part says.
        wanted: Split,
        /// What it says; nothing when it says to be a whole file.
        claimed: Option<Split>,
    },
    /// A part that is not there.
    #[error("part `{}` is missing", shown(part))]
    Missing {
        /// Its file name.
        part: String,
    },
    /// More or fewer tensors than the parts say.
    #[error("the parts say that they have {claimed} tensors together, and have {found}")]
    TensorCount {
        /// What they say.
        claimed: i32,
        /// How many there are.
        found: usize,
    },
    /// A tensor that two parts have.
    #[error("tensor `{}` is in both `{}` and `{}`", shown(tensor), shown(&parts[0]), shown(&parts[1]))]
    TensorTwice {
        /// The tensor.
        tensor: String,
        /// The file names of two parts that have it.
        parts: [String; 2],
    },
}

/// What a part says of itself.
fn told(split: Option<&Split>) -> String {
    match split {
        None => "a whole file".to_owned(),
        Some(split) => format!(
            "part {} of {} with {} tensors",
            u32::from(split.number) + 1,
            split.count,
            split.tensors
        ),
    }
}
