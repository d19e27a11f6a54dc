//! The control of every result: a Gaussian perturbation of a given norm, from a seed.
//!
//! In: the number of elements of each target. Out: a perturbation whose direction knows nothing of the model. The paper
//! reports that noise alone already restores some safety; at the norm of an optimized perturbation it should not.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use rand_distr::{Distribution, StandardNormal};
use rayon::prelude::*;

use super::engine::{Engine, OptimizeError, factor};
use super::radius::{Radius, Search};
use super::{Outcome, Rows};
use crate::model::TargetTensors;

/// Settings of the control.
#[derive(Clone, Debug, PartialEq)]
pub struct Random {
    /// The norm.
    pub rho: Radius,
    /// Of the generator.
    pub seed: u64,
}

pub(super) fn run(
    engine: &mut Engine<'_, '_>,
    rows: &Rows,
    settings: &Random,
) -> Result<Outcome, OptimizeError> {
    let mut unit = gaussian(&engine.decoder.target_sizes(), settings.seed, 1.0);
    let (rho, radii) = match settings.rho {
        Radius::Fixed(rho) => (rho, Vec::new()),
        Radius::Auto(budget) => {
            let found = Search::new(engine, rows, budget)?.largest(engine, &unit, None)?;
            (found.radius, found.tried)
        }
    };
    unit.scale(factor(rho));
    Ok(Outcome {
        results: vec![("rho", rho), ("delta_norm", unit.norm())],
        delta: unit,
        steps: Vec::new(),
        radii,
    })
}

/// Independent normal elements, scaled together to the norm `rho`; needs no model.
///
/// `sizes`: elements of each target. Each target has a ChaCha8 stream of its own, so threads do not matter.
pub fn gaussian(sizes: &[usize], seed: u64, rho: f64) -> TargetTensors {
    let tensors: Vec<Vec<f32>> = sizes
        .par_iter()
        .enumerate()
        .map(|(stream, &size)| {
            let mut generator = ChaCha8Rng::seed_from_u64(seed);
            generator.set_stream(stream as u64);
            StandardNormal.sample_iter(generator).take(size).collect()
        })
        .collect();
    let mut noise = TargetTensors::new(tensors);
    noise.scale(factor(rho / noise.norm()));
    noise
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_has_the_norm_and_spread_of_a_gaussian_and_depends_on_the_seed() {
        let noise = gaussian(&[100_000, 50_000], 7, 2.0);
        assert!((noise.norm() - 2.0).abs() < 1e-5);
        // Each element is N(0, rho^2 / n): two thirds lie within one deviation, and targets share the energy by size.
        let deviation = 2.0 / 150_000f32.sqrt();
        let inside = noise
            .iter()
            .flatten()
            .filter(|x| x.abs() < deviation)
            .count();
        assert!((100_900..103_900).contains(&inside), "{inside}");
        let share = noise.norms()[0].powi(2) / 4.0;
        assert!((share - 2.0 / 3.0).abs() < 0.01, "{share}");
        assert_eq!(noise, gaussian(&[100_000, 50_000], 7, 2.0));
        assert_ne!(noise, gaussian(&[100_000, 50_000], 8, 2.0));
        assert_ne!(noise.tensor(0)[..50_000], *noise.tensor(1));
    }
}
