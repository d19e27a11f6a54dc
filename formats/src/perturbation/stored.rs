//! The tensors of a perturbation file put together as deltas.
//!
//! In: an open file and the base tensors that its record describes. Out: for each of them its form, checked, or the problem.
//! A stored name that the record describes is that tensor's dense form, whatever it ends in. Any other must be a described name
//! and the end of a part, so a file can be read in one way only.

use std::collections::{BTreeMap, HashMap};

use rayon::prelude::*;

use super::TensorProblem;
use super::delta::{
    DeltaTensor, Form, INDICES, LORA_A, LORA_B, MAX_SPARSE_ELEMENTS, NotFinite, VALUES, Values,
    elements_of,
};
use super::numbers::Numbers;
use super::record::BaseTensor;
use crate::dtype::Dtype;
use crate::error::Problems;
use crate::safetensors::SafetensorsFile;
use crate::tensor::TensorView;

/// One delta as a file holds it: checked, and made of the file's tensors number so and so.
#[derive(Debug)]
pub(super) struct StoredDelta {
    tensor: String,
    shape: Vec<usize>,
    parts: Parts,
}

#[derive(Debug)]
enum Parts {
    Dense {
        values: usize,
    },
    LowRank {
        a: usize,
        b: usize,
        inputs: usize,
        rank: usize,
    },
    Sparse {
        indices: usize,
        values: usize,
    },
}

/// The deltas of `file` in the order of their first tensors. Reads all of it once, in parallel.
pub(super) fn deltas_of(
    file: &SafetensorsFile,
    base: &BTreeMap<String, BaseTensor>,
) -> Result<Vec<StoredDelta>, Problems<TensorProblem>> {
    let mut problems = Vec::new();
    let mut groups: Vec<Group<'_>> = Vec::new();
    let mut by_tensor: HashMap<&str, usize> = HashMap::new();
    for (position, view) in file.tensors().enumerate() {
        let Some((tensor, base, part)) = described(view.name, base) else {
            problems.push(TensorProblem::Undescribed {
                tensor: view.name.to_owned(),
            });
            continue;
        };
        let group = *by_tensor.entry(tensor).or_insert(groups.len());
        if group == groups.len() {
            groups.push(Group {
                tensor,
                base,
                parts: BTreeMap::new(),
            });
        }
        groups[group].parts.insert(part, (position, view));
    }
    // Collected in the order of the file, so that the message does not depend on threads.
    let read: Vec<Result<StoredDelta, TensorProblem>> =
        groups.par_iter().map(|group| group.read(file)).collect();
    let mut deltas = Vec::with_capacity(read.len());
    for delta in read {
        match delta {
            Ok(delta) => deltas.push(delta),
            Err(problem) => problems.push(problem),
        }
    }
    problems.extend(
        base.keys()
            .filter(|name| !by_tensor.contains_key(name.as_str()))
            .map(|name| TensorProblem::Absent {
                tensor: name.clone(),
            }),
    );
    Problems::none_of(problems)?;
    Ok(deltas)
}

/// The base tensor that the stored name `name` speaks of, and the end that makes it a part.
fn described<'a, 'b>(
    name: &'a str,
    base: &'b BTreeMap<String, BaseTensor>,
) -> Option<(&'a str, &'b BaseTensor, &'static str)> {
    ["", LORA_A, LORA_B, INDICES, VALUES]
        .into_iter()
        .find_map(|part| {
            let tensor = name.strip_suffix(part)?;
            Some((tensor, base.get(tensor)?, part))
        })
}

/// The problem of a delta with the tensor that it is for, if there is one; for reading and for writing.
pub(super) fn problem_of(delta: &DeltaTensor<'_>, base: &BaseTensor) -> Option<TensorProblem> {
    let tensor = || delta.name().to_owned();
    if delta.shape() != base.shape {
        return Some(TensorProblem::Shape {
            tensor: tensor(),
            found: delta.shape().to_vec(),
            base: base.shape.clone(),
        });
    }
    if !base.dtype.is_patchable() {
        return Some(TensorProblem::BaseDtype {
            tensor: tensor(),
            dtype: base.dtype,
        });
    }
    if let Form::LowRank { rank } = delta.form() {
        let most = base.shape.iter().copied().min().unwrap_or(0);
        if rank > most {
            return Some(TensorProblem::Rank {
                tensor: tensor(),
                rank,
                most,
            });
        }
    }
    delta.first_not_finite().map(|reason| match reason {
        NotFinite::Value { part, element } => TensorProblem::NotFinite {
            tensor: format!("{}{part}", delta.name()),
            element,
        },
        NotFinite::Product { at_most } => TensorProblem::Product {
            tensor: tensor(),
            at_most,
        },
    })
}

/// What a file holds for one tensor, by the ends of the names.
struct Group<'a> {
    tensor: &'a str,
    base: &'a BaseTensor,
    parts: BTreeMap<&'static str, (usize, TensorView<'a>)>,
}

impl Group<'_> {
    fn read(&self, file: &SafetensorsFile) -> Result<StoredDelta, TensorProblem> {
        let parts: Vec<_> = self.parts.iter().map(|(part, it)| (*part, it)).collect();
        let (shape, parts) = match parts[..] {
            [("", &(position, view))] => {
                typed(&view, Dtype::F32)?;
                (view.shape.to_vec(), Parts::Dense { values: position })
            }
            [(LORA_A, (a, a_view)), (LORA_B, (b, b_view))] => {
                let (inputs, rank) = self.factors(a_view, b_view)?;
                let (a, b) = (*a, *b);
                let parts = Parts::LowRank { a, b, inputs, rank };
                (self.base.shape.clone(), parts)
            }
            [
                (INDICES, (indices, indices_view)),
                (VALUES, (values, values_view)),
            ] => {
                self.entries(indices_view, values_view)?;
                let (indices, values) = (*indices, *values);
                (self.base.shape.clone(), Parts::Sparse { indices, values })
            }
            _ => {
                return Err(TensorProblem::Form {
                    tensor: self.tensor.to_owned(),
                    parts: self.parts.keys().copied().collect(),
                });
            }
        };
        let delta = StoredDelta {
            tensor: self.tensor.to_owned(),
            shape,
            parts,
        };
        match problem_of(&delta.of_file(file), self.base) {
            None => Ok(delta),
            Some(problem) => Err(problem),
        }
    }

    /// Inputs and rank of the factors `a` and `b`, when their product has the shape of the base.
    fn factors(
        &self,
        a: &TensorView<'_>,
        b: &TensorView<'_>,
    ) -> Result<(usize, usize), TensorProblem> {
        typed(a, Dtype::F32)?;
        typed(b, Dtype::F32)?;
        match (&*self.base.shape, a.shape, b.shape) {
            (&[outputs, inputs], &[rank, of_a], &[of_b, columns])
                if (of_a, of_b, columns) == (inputs, outputs, rank)
                    && Values::low_rank(&self.base.shape, numbers(a), numbers(b)).is_some() =>
            {
                Ok((inputs, rank))
            }
            _ => Err(TensorProblem::Factors {
                tensor: self.tensor.to_owned(),
                a: a.shape.to_vec(),
                b: b.shape.to_vec(),
                base: self.base.shape.clone(),
            }),
        }
    }

    /// Checks the list of elements and their values.
    fn entries(
        &self,
        indices: &TensorView<'_>,
        values: &TensorView<'_>,
    ) -> Result<(), TensorProblem> {
        typed(indices, Dtype::U32)?;
        typed(values, Dtype::F32)?;
        let tensor = || self.tensor.to_owned();
        if indices.shape.len() != 1 || indices.shape != values.shape {
            return Err(TensorProblem::Entries {
                tensor: tensor(),
                indices: indices.shape.to_vec(),
                values: values.shape.to_vec(),
            });
        }
        let elements = elements_of(&self.base.shape)
            .filter(|&elements| elements as u64 <= MAX_SPARSE_ELEMENTS)
            .ok_or_else(|| TensorProblem::TooLarge {
                tensor: tensor(),
                base: self.base.shape.clone(),
            })?;
        match numbers::<u32>(indices).misplaced(elements) {
            None => Ok(()),
            Some(found) => Err(TensorProblem::Index {
                tensor: tensor(),
                entry: found.place,
                index: found.index,
                after: found.after,
                elements,
            }),
        }
    }
}

impl StoredDelta {
    /// The delta, from the `file` that it was found in.
    pub(super) fn of_file<'a>(&'a self, file: &'a SafetensorsFile) -> DeltaTensor<'a> {
        let values = match self.parts {
            Parts::Dense { values } => Values::Dense(numbers(&file.view(values))),
            Parts::LowRank { a, b, inputs, rank } => Values::LowRank {
                a: numbers(&file.view(a)),
                b: numbers(&file.view(b)),
                inputs,
                rank,
            },
            Parts::Sparse { indices, values } => Values::Sparse {
                indices: numbers(&file.view(indices)),
                values: numbers(&file.view(values)),
            },
        };
        DeltaTensor::of(&self.tensor, &self.shape, values)
    }
}

/// The numbers of a tensor whose elements have four bytes.
fn numbers<'a, T>(tensor: &TensorView<'a>) -> Numbers<'a, T> {
    Numbers::Stored(tensor.bytes.as_chunks().0)
}

fn typed(tensor: &TensorView<'_>, wanted: Dtype) -> Result<(), TensorProblem> {
    if tensor.dtype == wanted {
        Ok(())
    } else {
        Err(TensorProblem::Dtype {
            tensor: tensor.name.to_owned(),
            found: tensor.dtype,
            wanted,
        })
    }
}
