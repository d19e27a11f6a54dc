//! How the energy of a perturbation, the sum of its squares, is spread over tensors and elements.
//!
//! The share of a layer, |eps_l|^2 / |eps|^2, is this program's definition of the paper's safety affinity.

use panacea_formats::{DeltaTensor, Perturbation};
use panacea_patch::compact::Histogram;
use rayon::prelude::*;

use crate::cli::error::{Exit, Failure};

/// The energy of a perturbation.
#[derive(Clone, Debug)]
pub(super) struct Energy {
    pub(super) tensors: Vec<TensorEnergy>,
    /// Over all elements, by magnitude.
    histogram: Histogram,
}

/// The energy of one tensor.
#[derive(Clone, Debug)]
pub(super) struct TensorEnergy {
    pub(super) name: String,
    pub(super) elements: usize,
    /// The sum of its squares.
    pub(super) squared: f64,
}

impl Energy {
    /// Reads all of `perturbation` once. The sums do not depend on the number of threads.
    pub(super) fn of(perturbation: &Perturbation) -> Result<Self, Failure> {
        let mut energy = Self {
            tensors: Vec::new(),
            histogram: Histogram::new(),
        };
        for delta in perturbation.deltas() {
            let elements = delta.elements();
            let starts: Vec<usize> = (0..elements).step_by(CHUNK).collect();
            let mut squared = 0.0;
            // A few chunks at a time, since each has a histogram of its own.
            for starts in starts.chunks(16) {
                let chunks: Vec<Histogram> = starts
                    .par_iter()
                    .map(|&start| histogram(&delta, start, elements.min(start + CHUNK)))
                    .collect::<Result<_, _>>()?;
                for chunk in &chunks {
                    squared += chunk.squared();
                    energy.histogram.add(chunk);
                }
            }
            energy.tensors.push(TensorEnergy {
                name: delta.name().to_owned(),
                elements,
                squared,
            });
        }
        Ok(energy)
    }

    pub(super) fn norm(&self) -> f64 {
        self.squared().sqrt()
    }

    pub(super) fn elements(&self) -> usize {
        self.tensors.iter().map(|tensor| tensor.elements).sum()
    }

    /// The part of all energy that `squared` is.
    pub(super) fn share(&self, squared: f64) -> f64 {
        let all = self.squared();
        if all > 0.0 { squared / all } else { 0.0 }
    }

    /// The smallest share of elements that hold `share` of the energy together.
    pub(super) fn elements_holding(&self, share: f64) -> f64 {
        self.histogram.elements_holding(share)
    }

    fn squared(&self) -> f64 {
        self.tensors.iter().map(|tensor| tensor.squared).sum()
    }
}

/// The elements from `start` to `end` of `delta`.
fn histogram(delta: &DeltaTensor<'_>, start: usize, end: usize) -> Result<Histogram, Failure> {
    let mut values = vec![0.0_f32; end - start];
    delta
        .read_into(start..end, &mut values)
        .map_err(|error| Failure::doing(Exit::Refused, "a tensor cannot be read", &error))?;
    Ok(Histogram::of(&values))
}

/// Elements of a chunk; fixed, so that sums are always taken in the same order.
const CHUNK: usize = 1 << 20;
