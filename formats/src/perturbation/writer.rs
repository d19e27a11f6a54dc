//! Writes a perturbation file: the same record and values give the same bytes.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use thiserror::Error;

use super::record::PerturbationRecord;
use super::{DeltaTensor, METADATA_KEY, TensorProblem};
use crate::atomic::{OutputError, OutputFile, WrittenFile};
use crate::error::Problems;
use crate::tensor::WidenError;

/// Writes `record` and `deltas` to `output` and finishes it; the caller commits. Tensors are stored in the order of their names.
///
/// # Errors
/// When the deltas are not exactly the tensors of `record.base` or not finite, or when writing fails.
pub fn write_perturbation(
    output: &mut OutputFile,
    record: &PerturbationRecord,
    deltas: &[DeltaTensor<'_>],
) -> Result<WrittenFile, PerturbationWriteError> {
    let by_name = matched(record, deltas).map_err(PerturbationWriteError::Tensors)?;
    output.write_all(&header(record, &by_name))?;
    let mut values = vec![0.0_f32; BLOCK];
    let mut bytes = Vec::with_capacity(4 * BLOCK);
    for delta in by_name.values() {
        let elements = delta.elements();
        for start in (0..elements).step_by(BLOCK) {
            let end = elements.min(start + BLOCK);
            let values = &mut values[..end - start];
            delta.read_into(start..end, values)?;
            bytes.clear();
            bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
            output.write_all(&bytes)?;
        }
    }
    Ok(output.finish()?)
}

/// The deltas by name, when they are what the record says.
fn matched<'a, 'b>(
    record: &PerturbationRecord,
    deltas: &'a [DeltaTensor<'b>],
) -> Result<BTreeMap<&'b str, &'a DeltaTensor<'b>>, Problems<TensorProblem>> {
    let mut by_name = BTreeMap::new();
    let mut problems = Vec::new();
    for delta in deltas {
        let tensor = delta.name().to_owned();
        match record.base.get(delta.name()) {
            Some(_) if by_name.contains_key(delta.name()) => {
                problems.push(TensorProblem::Undescribed { tensor });
            }
            Some(base) if base.shape != delta.shape() => problems.push(TensorProblem::Shape {
                tensor,
                found: delta.shape().to_vec(),
                base: base.shape.clone(),
            }),
            Some(base) if !base.dtype.is_patchable() => problems.push(TensorProblem::BaseDtype {
                tensor,
                dtype: base.dtype,
            }),
            Some(_) => {
                if let Some(element) = delta.first_not_finite() {
                    problems.push(TensorProblem::NotFinite { tensor, element });
                }
            }
            None => problems.push(TensorProblem::Undescribed { tensor }),
        }
        by_name.insert(delta.name(), delta);
    }
    problems.extend(
        record
            .base
            .keys()
            .filter(|name| !by_name.contains_key(name.as_str()))
            .map(|name| TensorProblem::Absent {
                tensor: name.clone(),
            }),
    );
    Problems::none_of(problems)?;
    Ok(by_name)
}

/// The header with its length before it: metadata first, then the tensors in order, then spaces up to a multiple of 8 bytes,
/// which keeps the values aligned for readers that care.
fn header(record: &PerturbationRecord, deltas: &BTreeMap<&str, &DeltaTensor<'_>>) -> Vec<u8> {
    let text = |value: &Value| value.to_string();
    let mut json = format!(
        "{{\"__metadata__\":{{{}:{}}}",
        text(&METADATA_KEY.into()),
        text(&record.to_json().into())
    );
    let mut begin = 0;
    for (name, delta) in deltas {
        let end = begin + 4 * delta.elements();
        json.push_str(&format!(
            ",{}:{{\"dtype\":\"F32\",\"shape\":{},\"data_offsets\":[{begin},{end}]}}",
            text(&Value::from(*name)),
            json!(delta.shape()),
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

/// Values written at once.
const BLOCK: usize = 1 << 18;

/// Why a perturbation was not written.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PerturbationWriteError {
    /// The output failed.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// A delta shorter than it says, which the types rule out.
    #[error(transparent)]
    Read(#[from] WidenError),
    /// The tensors are not those of the record.
    #[error("{0}")]
    Tensors(Problems<TensorProblem>),
}
