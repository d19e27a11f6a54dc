//! How the energy of a perturbation, the sum of its squares, is spread over tensors and elements.
//!
//! The share of a layer, |eps_l|^2 / |eps|^2, is this program's definition of the paper's safety affinity.

use panacea_formats::{DeltaTensor, Perturbation};
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

/// Elements by magnitude: how many, and their energy. Magnitudes in a bin differ by less than 1/256.
#[derive(Clone, Debug)]
struct Histogram {
    counts: Vec<u64>,
    squared: Vec<f64>,
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
                    .map(|&start| Histogram::of(&delta, start, elements.min(start + CHUNK)))
                    .collect::<Result<_, _>>()?;
                for chunk in &chunks {
                    squared += chunk.squared.iter().sum::<f64>();
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

impl Histogram {
    fn new() -> Self {
        Self {
            counts: vec![0; BINS],
            squared: vec![0.0; BINS],
        }
    }

    fn of(delta: &DeltaTensor<'_>, start: usize, end: usize) -> Result<Self, Failure> {
        let mut values = vec![0.0_f32; end - start];
        delta
            .read_into(start..end, &mut values)
            .map_err(|error| Failure::doing(Exit::Refused, "a tensor cannot be read", &error))?;
        Ok(Self::of_values(&values))
    }

    fn of_values(values: &[f32]) -> Self {
        let mut histogram = Self::new();
        for &value in values {
            let bin = (value.abs().to_bits() >> SHIFT) as usize;
            histogram.counts[bin] += 1;
            histogram.squared[bin] += f64::from(value) * f64::from(value);
        }
        histogram
    }

    fn add(&mut self, other: &Self) {
        for (count, more) in self.counts.iter_mut().zip(&other.counts) {
            *count += more;
        }
        for (squared, more) in self.squared.iter_mut().zip(&other.squared) {
            *squared += more;
        }
    }

    #[expect(clippy::cast_precision_loss, reason = "a share for a table")]
    fn elements_holding(&self, share: f64) -> f64 {
        let all: f64 = self.squared.iter().sum();
        let elements: u64 = self.counts.iter().sum();
        if all == 0.0 {
            return 0.0;
        }
        let (mut held, mut count) = (0.0, 0.0);
        for (&of_bin, &squared) in self.counts.iter().zip(&self.squared).rev() {
            let wanted = share * all - held;
            if squared >= wanted && squared > 0.0 {
                count += of_bin as f64 * wanted / squared;
                break;
            }
            held += squared;
            count += of_bin as f64;
        }
        count / elements as f64
    }
}

/// Elements of a chunk; fixed, so that sums are always taken in the same order.
const CHUNK: usize = 1 << 20;

/// Bits of a magnitude that a bin does not tell apart: 8 of 23 of the fraction remain.
const SHIFT: u32 = 15;

/// As many as there are magnitudes without these bits.
const BINS: usize = 1 << (31 - SHIFT);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_of_elements_agree_with_a_sorted_list() {
        #[expect(clippy::cast_precision_loss, reason = "small indices")]
        let values: Vec<f32> = (1..5000)
            .map(|i| (i as f32 * 0.37).sin().powi(5) * if i % 2 == 0 { -1.0 } else { 1.0 })
            .collect();
        let mut squares: Vec<f64> = values.iter().map(|&x| f64::from(x).powi(2)).collect();
        squares.sort_by(|a, b| b.total_cmp(a));
        let all: f64 = squares.iter().sum();
        let histogram = Histogram::of_values(&values);
        for share in [0.5, 0.8, 0.9, 0.99] {
            let mut held = 0.0;
            let count = squares
                .iter()
                .take_while(|&&square| {
                    held += square;
                    held < share * all
                })
                .count();
            #[expect(clippy::cast_precision_loss, reason = "a count below 5000")]
            let expected = count as f64 / values.len() as f64;
            let found = histogram.elements_holding(share);
            assert!(
                (found - expected).abs() < 2e-3,
                "{share}: {found} {expected}"
            );
        }
    }

    #[test]
    fn equal_elements_hold_energy_by_their_number_and_zeros_none() {
        assert!((Histogram::of_values(&[2.0; 100]).elements_holding(0.8) - 0.8).abs() < 1e-12);
        assert!(
            (Histogram::of_values(&[0.0, 1.0, 0.0, -1.0]).elements_holding(1.0) - 0.5).abs()
                < 1e-12
        );
        assert_eq!(Histogram::of_values(&[0.0; 4]).elements_holding(0.8), 0.0);
    }
}
