//! How much of a perturbation's energy low-rank forms of it keep.
//!
//! From the same decomposition as `optimize --as-lora`. Of sparse tensors nothing is told: they are made where ranks are high.

use std::num::NonZeroUsize;

use panacea_formats::{DeltaTensor, Perturbation, shown};
use panacea_patch::compact::spectrum;
use rayon::prelude::*;
use serde_json::{Map, Value, json};

use super::energy::Energy;
use crate::cli::error::{Exit, Failure};
use crate::cli::report::percent;
use crate::cli::targets::block_and_projection;

/// The energy inside the largest singular values of each projection's matrices.
#[derive(Debug, Default)]
pub(super) struct Ranks {
    /// By projection, in the order of their first tensor.
    projections: Vec<(String, Sums)>,
    all: Sums,
}

/// Sums over matrices.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    energy: f64,
    /// What each of [`RANKS`] keeps.
    kept: [f64; RANKS.len()],
}

impl Ranks {
    /// Decomposes the matrices of `perturbation`, in parallel.
    pub(super) fn of(perturbation: &Perturbation, energy: &Energy) -> Result<Self, Failure> {
        let deltas: Vec<DeltaTensor<'_>> = perturbation.deltas().collect();
        let spectra: Vec<Option<Vec<f64>>> = deltas
            .par_iter()
            .map(|delta| spectrum(delta, MOST))
            .collect::<Result<_, _>>()
            .map_err(|error| Failure::doing(Exit::Refused, "a tensor cannot be read", &error))?;
        let mut ranks = Self::default();
        for ((delta, squares), tensor) in deltas.iter().zip(&spectra).zip(&energy.tensors) {
            let Some(squares) = squares else {
                continue;
            };
            let (_, projection) = block_and_projection(delta.name());
            let place = ranks
                .projections
                .iter()
                .position(|(it, _)| it == projection);
            let place = place.unwrap_or_else(|| {
                let sums = Sums::default();
                ranks.projections.push((projection.to_owned(), sums));
                ranks.projections.len() - 1
            });
            for sums in [&mut ranks.projections[place].1, &mut ranks.all] {
                sums.add(tensor.squared, squares);
            }
        }
        Ok(ranks)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.projections.is_empty()
    }

    /// The table: a line for each rank, a column for each projection.
    pub(super) fn lines(&self) -> Vec<Vec<String>> {
        let mut head = vec!["rank".to_owned()];
        let names = self
            .projections
            .iter()
            .map(|(name, _)| shown(name).to_string());
        head.extend(names.chain(["all".to_owned()]));
        let mut lines = vec![head];
        for (place, rank) in RANKS.iter().enumerate() {
            let projections = self.projections.iter().map(|(_, sums)| sums);
            let shares = projections
                .chain([&self.all])
                .map(|sums| percent(sums.share(place)));
            lines.push([rank.to_string()].into_iter().chain(shares).collect());
        }
        lines
    }

    pub(super) fn to_json(&self) -> Vec<Value> {
        if self.is_empty() {
            return Vec::new();
        }
        RANKS
            .iter()
            .enumerate()
            .map(|(place, rank)| {
                let projections: Map<String, Value> = self
                    .projections
                    .iter()
                    .map(|(name, sums)| (name.clone(), json!(sums.share(place))))
                    .collect();
                json!({
                    "rank": rank,
                    "energy": self.all.share(place),
                    "projections": projections,
                })
            })
            .collect()
    }
}

impl Sums {
    /// Takes in a matrix of some energy, and the squares of its singular values, descending.
    fn add(&mut self, energy: f64, squares: &[f64]) {
        self.energy += energy;
        for (kept, rank) in self.kept.iter_mut().zip(RANKS) {
            *kept += squares.iter().take(rank).sum::<f64>();
        }
    }

    /// The share that the rank at `place` keeps; by rounding, the sum of all singular values may come out above the energy.
    fn share(&self, place: usize) -> f64 {
        match self.energy > 0.0 {
            true => (self.kept[place] / self.energy).min(1.0),
            false => 1.0,
        }
    }
}

/// The ranks that are told of.
const RANKS: [usize; 6] = [1, 2, 4, 8, 16, 32];

/// The largest of them.
const MOST: NonZeroUsize = NonZeroUsize::new(32).unwrap();
