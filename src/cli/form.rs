//! `--as-lora`, `--sparse`: the form in which `optimize` writes a perturbation.
//!
//! In: a dense perturbation and what was asked for. Out: the deltas that are written, and how much of the energy they keep. What
//! the search measured, it measured of the dense one.

use std::num::NonZeroUsize;

use panacea_formats::{DeltaTensor, Form, shown};
use panacea_patch::compact::{Compact, CompactError, EnergyShare};
use serde_json::{Map, Value, json};

use super::args::FormArgs;
use super::error::{Exit, Failure};
use super::find::Found;
use super::report::{Reporter, Table, bytes, number, percent};

/// The form that was asked for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum FormChoice {
    /// All values.
    Dense,
    /// Products of this rank, or of as much as a matrix can use.
    LowRank(NonZeroUsize),
    /// The largest elements that hold this share of the energy.
    Sparse(EnergyShare),
}

impl FormChoice {
    pub(super) fn of(args: &FormArgs) -> Self {
        match (args.as_lora, args.sparse) {
            (Some(rank), _) => Self::LowRank(rank),
            (None, Some(share)) => Self::Sparse(share),
            (None, None) => Self::Dense,
        }
    }

    /// Bytes of the tensors of a perturbation of `targets`, without the header. Of the sparse form at most: the largest elements
    /// hold at least their share of the energy, so at most so many are needed.
    pub(super) fn bytes(self, targets: &[(String, Vec<usize>)]) -> u64 {
        let elements = |shape: &[usize]| shape.iter().product::<usize>() as u64;
        let shapes = targets.iter().map(|(_, shape)| shape.as_slice());
        match self {
            Self::Dense => shapes.map(|shape| 4 * elements(shape)).sum(),
            Self::LowRank(rank) => shapes
                .map(|shape| {
                    let rank = shape
                        .iter()
                        .fold(rank.get(), |rank, &length| rank.min(length));
                    4 * rank as u64 * shape.iter().sum::<usize>() as u64
                })
                .sum(),
            Self::Sparse(share) => {
                let all: u64 = shapes.map(elements).sum();
                #[expect(
                    clippy::cast_precision_loss,
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "a bound for a plan, of a product that is not negative"
                )]
                let most = (all as f64 * share.value()).ceil() as u64;
                8 * most
            }
        }
    }

    /// Brings the perturbation that was found into this form.
    ///
    /// # Errors
    /// When the form cannot hold a tensor.
    pub(super) fn make(self, found: &Found, reporter: &Reporter) -> Result<Made, Failure> {
        let shapes: Vec<&[usize]> = found
            .targets
            .iter()
            .map(|(_, shape)| shape.as_slice())
            .collect();
        let compact = match self {
            Self::Dense => None,
            Self::LowRank(rank) => {
                reporter.stage(format!("decomposing {} tensors", shapes.len()));
                Some(Compact::low_rank(&found.delta, &shapes, rank))
            }
            Self::Sparse(share) => {
                reporter.stage(format!("sorting out {} elements", found.delta.elements()));
                Some(Compact::sparse(&found.delta, &shapes, share))
            }
        };
        let compact = compact
            .transpose()
            .map_err(|error| cannot_hold(found, &error))?;
        Ok(Made {
            choice: self,
            compact,
        })
    }
}

/// A perturbation in the form that was asked for.
#[derive(Debug)]
pub(super) struct Made {
    choice: FormChoice,
    /// Nothing where the form is dense.
    compact: Option<Compact>,
}

impl Made {
    /// The deltas that are written.
    pub(super) fn deltas<'a>(&'a self, found: &'a Found) -> Vec<DeltaTensor<'a>> {
        match &self.compact {
            None => found.deltas(),
            Some(compact) => compact.deltas(found.targets.iter().map(|(name, _)| name.as_str())),
        }
    }

    /// What was asked for and what it kept, as records have it. Nothing where the form is dense.
    pub(super) fn parameters(&self) -> Map<String, Value> {
        let mut parameters = Map::new();
        let Some(compact) = &self.compact else {
            return parameters;
        };
        let asked = match self.choice {
            FormChoice::Dense => return parameters,
            FormChoice::LowRank(rank) => ("as_lora", json!(rank)),
            FormChoice::Sparse(share) => ("sparse", json!(share.value())),
        };
        parameters.insert(asked.0.to_owned(), asked.1);
        parameters.insert("energy_kept".to_owned(), json!(compact.energy_kept()));
        parameters
    }

    /// Adds the form to `perturbation`, which a report has of `found`.
    pub(super) fn add_to(&self, perturbation: &mut Value, found: &Found) {
        let deltas = self.deltas(found);
        let stored: u64 = deltas.iter().map(DeltaTensor::stored_bytes).sum();
        perturbation["form"] = json!(self.name());
        perturbation["stored_bytes"] = json!(stored);
        let Some(compact) = &self.compact else {
            return;
        };
        perturbation["energy_kept"] = json!(compact.energy_kept());
        perturbation["norm_kept"] = json!(compact.norm());
        if let Some((place, share)) = compact.worst() {
            let tensor = found.targets.get(place).map(|(name, _)| name);
            perturbation["least_kept"] = json!({"tensor": tensor, "energy": share});
        }
    }

    /// What people read of a form that is not dense.
    pub(super) fn describe(&self, found: &Found, table: &mut Table) {
        let Some(compact) = &self.compact else {
            return;
        };
        let deltas = self.deltas(found);
        let stored: u64 = deltas.iter().map(DeltaTensor::stored_bytes).sum();
        let dense = FormChoice::Dense.bytes(&found.targets);
        let what = match self.choice {
            FormChoice::LowRank(rank) => format!("rank {rank}"),
            _ => {
                let entries = deltas.iter().map(|delta| match delta.form() {
                    Form::Sparse { entries } => entries,
                    _ => 0,
                });
                format!("sparse, {} elements", entries.sum::<usize>())
            }
        };
        table.row(
            "form",
            format!(
                "{what}: {} instead of {}; the figures above are of the dense one",
                bytes(stored),
                bytes(dense)
            ),
        );
        let least = compact.worst().and_then(|(place, share)| {
            let (name, _) = found.targets.get(place)?;
            Some(format!("; least of `{}`, {}", shown(name), percent(share)))
        });
        table.row(
            "energy kept",
            format!(
                "{}, norm {}{}",
                percent(compact.energy_kept()),
                number(compact.norm()),
                least.unwrap_or_default()
            ),
        );
    }

    fn name(&self) -> &'static str {
        match self.choice {
            FormChoice::Dense => "dense",
            FormChoice::LowRank(_) => "low-rank",
            FormChoice::Sparse(_) => "sparse",
        }
    }
}

fn cannot_hold(found: &Found, error: &CompactError) -> Failure {
    let tensor = match error {
        CompactError::Shape { place, .. } => found.targets.get(*place),
        _ => None,
    };
    let what = match tensor {
        Some((name, _)) => format!(
            "the perturbation of `{}` cannot be made compact",
            shown(name)
        ),
        None => "the perturbation cannot be made compact".to_owned(),
    };
    Failure::doing(Exit::Refused, what, error).hint("leave out --as-lora or --sparse")
}
