//! Plain fine-tuning of the targets: AdamW down the mean loss of batches of rows.
//!
//! In: rows, and where to start. Out: the targets' values after some steps. It is what experiments align and attack models with, and, on
//! refusals, what somebody would do who has no perturbation: no method of this program uses it.

use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use super::adamw::{AdamW, Rates};
use super::engine::{Batch, Engine, OptimizeError, Set, factor};
use super::step::{Phase, StepRecord};
use super::{CLIP, Observer};
use crate::model::{Differentiable, EncodedRow, Point, TargetTensors};

/// How far to go.
#[derive(Clone, Debug, PartialEq)]
pub struct FineTuning {
    /// AdamW's learning rate, constant.
    pub lr: f64,
    /// AdamW's weight decay.
    pub weight_decay: f64,
    /// Steps.
    pub steps: usize,
    /// Rows of a step.
    pub batch: usize,
    /// Of the order of rows, which is drawn anew for each pass over them.
    pub seed: u64,
}

/// The targets' values after `settings.steps` steps from `start`, and what each step measured; gradients are clipped to norm 1.
///
/// # Errors
/// [`OptimizeError`] when there is no row, when a loss or gradient is not finite or is zero, or when the observer stops the work.
pub fn fine_tune(
    decoder: &mut dyn Differentiable,
    start: TargetTensors,
    rows: &[EncodedRow],
    settings: &FineTuning,
    observer: &mut dyn Observer,
) -> Result<(TargetTensors, Vec<StepRecord>), OptimizeError> {
    if rows.is_empty() {
        return Err(OptimizeError::NoRows {
            method: "fine-tuning",
            set: Set::Task,
        });
    }
    let mut engine = Engine::new(decoder, observer);
    let mut w = start;
    let mut adam = AdamW::new(&w);
    let mut gradient = engine.zeros();
    let mut order = Order::new(rows.len(), settings.seed);
    let mut steps = Vec::with_capacity(settings.steps);
    for step in 0..settings.steps {
        engine.step = step;
        let batch = Batch::new(Set::Task, rows, order.next(settings.batch));
        let found = engine.gradient(Point::at(&w), &batch, &mut gradient)?;
        let clip = (CLIP / (found.norm + 1e-6)).min(1.0);
        gradient.scale(factor(clip));
        let rates = Rates {
            lr: settings.lr,
            weight_decay: settings.weight_decay,
        };
        let count = i32::try_from(step + 1).unwrap_or(i32::MAX);
        adam.step(&mut w, &mut gradient, rates, count);
        let record = StepRecord {
            g: Some(found.loss),
            clip: Some(clip),
            norm: w.norm(),
            ..StepRecord::new(step, Phase::Outer)
        };
        engine.observer.step(&record);
        steps.push(record);
    }
    Ok((w, steps))
}

/// Places in a seeded order, again and again.
struct Order {
    generator: ChaCha8Rng,
    places: Vec<usize>,
    next: usize,
}

impl Order {
    fn new(len: usize, seed: u64) -> Self {
        Self {
            generator: ChaCha8Rng::seed_from_u64(seed),
            places: (0..len).collect(),
            next: len,
        }
    }

    /// The next `count` places; a new order begins where one is used up.
    fn next(&mut self, count: usize) -> Vec<usize> {
        let mut taken = Vec::with_capacity(count);
        while taken.len() < count {
            if self.next == self.places.len() {
                self.places.shuffle(&mut self.generator);
                self.next = 0;
            }
            taken.push(self.places[self.next]);
            self.next += 1;
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_comes_once_in_each_pass_and_the_seed_decides_the_order() {
        let passes = |seed| {
            let mut order = Order::new(5, seed);
            (0..4).flat_map(|_| order.next(5)).collect::<Vec<_>>()
        };
        let drawn = passes(1);
        for pass in drawn.chunks(5) {
            let mut sorted = pass.to_vec();
            sorted.sort_unstable();
            assert_eq!(sorted, [0, 1, 2, 3, 4]);
        }
        assert_eq!(drawn, passes(1));
        assert_ne!(drawn, passes(2));
        assert_ne!(drawn[..5], drawn[5..10]);
    }
}
