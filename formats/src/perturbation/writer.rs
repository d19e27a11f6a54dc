//! Writes a perturbation file: the same record and values give the same bytes.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};
use thiserror::Error;

use super::delta::Part;
use super::record::PerturbationRecord;
use super::stored::problem_of;
use super::{DeltaTensor, METADATA_KEY, TensorProblem};
use crate::atomic::{OutputError, OutputFile, WrittenFile};
use crate::dtype::Dtype;
use crate::error::Problems;

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
    output.write_all(&header(record, &tensors))?;
    let mut bytes = Vec::with_capacity(4 * BLOCK);
    for tensor in tensors.values() {
        let length = tensor.numbers();
        for start in (0..length).step_by(BLOCK) {
            let range = start..length.min(start + BLOCK);
            bytes.clear();
            match tensor.part {
                Part::Values(values) => values.append_to(range, &mut bytes),
                Part::Indices(indices) => indices.append_to(range, &mut bytes),
            }
            output.write_all(&bytes)?;
        }
    }
    Ok(output.finish()?)
}

/// A tensor to be stored.
struct Stored<'a> {
    shape: Vec<usize>,
    part: Part<'a>,
}

impl Stored<'_> {
    fn dtype(&self) -> Dtype {
        match self.part {
            Part::Values(_) => Dtype::F32,
            Part::Indices(_) => Dtype::U32,
        }
    }

    /// How many numbers of four bytes it has.
    fn numbers(&self) -> usize {
        match self.part {
            Part::Values(values) => values.len(),
            Part::Indices(indices) => indices.len(),
        }
    }
}

/// What is stored by name, when the deltas are what the record says.
fn matched<'a>(
    record: &PerturbationRecord,
    deltas: &[DeltaTensor<'a>],
) -> Result<BTreeMap<String, Stored<'a>>, Problems<TensorProblem>> {
    let mut stored = BTreeMap::new();
    let mut problems = Vec::new();
    let mut seen = BTreeSet::new();
    for delta in deltas {
        let tensor = delta.name().to_owned();
        match record.base.get(delta.name()) {
            Some(base) if seen.insert(delta.name()) => problems.extend(problem_of(delta, base)),
            _ => problems.push(TensorProblem::Undescribed { tensor }),
        }
        for (end, shape, part) in delta.parts() {
            let name = format!("{}{end}", delta.name());
            if !end.is_empty() && record.base.contains_key(&name) {
                problems.push(TensorProblem::NameTaken {
                    tensor: delta.name().to_owned(),
                    stored: name.clone(),
                });
            }
            stored.insert(name, Stored { shape, part });
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

/// The header with its length before it: metadata first, then the tensors in order, then spaces up to a multiple of 8 bytes,
/// which keeps the values aligned for readers that care.
fn header(record: &PerturbationRecord, tensors: &BTreeMap<String, Stored<'_>>) -> Vec<u8> {
    let text = |value: &Value| value.to_string();
    let mut json = format!(
        "{{\"__metadata__\":{{{}:{}}}",
        text(&METADATA_KEY.into()),
        text(&record.to_json().into())
    );
    let mut begin = 0;
    for (name, tensor) in tensors {
        let end = begin + 4 * tensor.numbers();
        json.push_str(&format!(
            ",{}:{{\"dtype\":\"{}\",\"shape\":{},\"data_offsets\":[{begin},{end}]}}",
            text(&Value::from(name.as_str())),
            tensor.dtype(),
            json!(tensor.shape),
        ));
        begin = end;
    }
    json.push('}');
    while json.len() % 8 != 0 {
        json.push(' ');
    }
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.extend_from_slice(json.as_bytes());
    header
}

/// Numbers written at once.
const BLOCK: usize = 1 << 18;

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
