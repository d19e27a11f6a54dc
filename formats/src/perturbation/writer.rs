//! Writes a perturbation file: the same record and values give the same bytes.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use thiserror::Error;

use super::delta::Part;
use super::record::PerturbationRecord;
use super::stored::problem_of;
use super::{DeltaTensor, METADATA_KEY, TensorProblem};
use crate::atomic::{OutputError, OutputFile, WrittenFile};
use crate::dtype::Dtype;
use crate::error::Problems;
use crate::safetensors::{Stored, write_tensors};

/// Writes `record` and `deltas`, each in its form, to `output` and finishes it; the caller commits. Tensors are stored in the
/// order of their names.
///
/// # Errors
/// When the deltas are not exactly the tensors of `record.base` or would not be read back, or when writing fails.
pub fn write_perturbation(
    output: &mut OutputFile,
    record: &PerturbationRecord,
    deltas: &[DeltaTensor<'_>],
) -> Result<WrittenFile, PerturbationWriteError> {
    let tensors = matched(record, deltas).map_err(PerturbationWriteError::Tensors)?;
    write_tensors((METADATA_KEY, &record.to_json()), tensors.iter(), |bytes| {
        output.write_all(bytes)
    })?;
    Ok(output.finish()?)
}

/// A part of a delta, as a file stores it.
pub(super) struct StoredPart<'a> {
    shape: Vec<usize>,
    part: Part<'a>,
}

impl<'a> StoredPart<'a> {
    /// The parts of `delta`, with what follows its tensor's name in theirs.
    pub(super) fn of(delta: &DeltaTensor<'a>) -> impl Iterator<Item = (&'static str, Self)> {
        let parts = delta.parts().into_iter();
        parts.map(|(end, shape, part)| (end, Self { shape, part }))
    }
}

impl Stored for StoredPart<'_> {
    fn dtype(&self) -> Dtype {
        match self.part {
            Part::Values(_) => Dtype::F32,
            Part::Indices(_) => Dtype::U32,
        }
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn numbers(&self) -> usize {
        match self.part {
            Part::Values(values) => values.len(),
            Part::Indices(indices) => indices.len(),
        }
    }

    fn append_to(&self, range: Range<usize>, bytes: &mut Vec<u8>) {
        match self.part {
            Part::Values(values) => values.append_to(range, bytes),
            Part::Indices(indices) => indices.append_to(range, bytes),
        }
    }
}

/// What is stored by name, when the deltas are what the record says.
fn matched<'a>(
    record: &PerturbationRecord,
    deltas: &[DeltaTensor<'a>],
) -> Result<BTreeMap<String, StoredPart<'a>>, Problems<TensorProblem>> {
    let mut stored = BTreeMap::new();
    let mut problems = Vec::new();
    let mut seen = BTreeSet::new();
    for delta in deltas {
        let tensor = delta.name().to_owned();
        match record.base.get(delta.name()) {
            Some(base) if seen.insert(delta.name()) => problems.extend(problem_of(delta, base)),
            _ => problems.push(TensorProblem::Undescribed { tensor }),
        }
        for (end, part) in StoredPart::of(delta) {
            let name = format!("{}{end}", delta.name());
            if !end.is_empty() && record.base.contains_key(&name) {
                problems.push(TensorProblem::NameTaken {
                    tensor: delta.name().to_owned(),
                    stored: name.clone(),
                });
            }
            stored.insert(name, part);
        }
    }
    problems.extend(
        record
            .base
            .keys()
            .filter(|name| !seen.contains(name.as_str()))
            .map(|name| TensorProblem::Absent {
                tensor: name.clone(),
            }),
    );
    Problems::none_of(problems)?;
    Ok(stored)
}

/// Why a perturbation was not written.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PerturbationWriteError {
    /// The output failed.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// The tensors are not those of the record.
    #[error("{0}")]
    Tensors(Problems<TensorProblem>),
}
