//! Requests that no step learns from, to see whether the aim is reached.
//!
//! In: weights. Out: the share of these requests whose refusal the model finds likelier than the opening that complies, and how much.

use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use super::super::Rows;
use super::super::engine::{Batch, Engine, OptimizeError, Set};
use crate::model::{EncodedRow, LossSum, Point};

/// One of this many harmful rows is held back.
const ONE_OF: usize = 4;

/// Most rows that are held back: each step's measurement computes them.
const MOST: usize = 24;

/// Predicted tokens that decide whether an answer refuses: the rest of a refusal follows from them, and its low loss would
/// hide theirs.
const DECIDING: usize = 3;

/// Requests that no step learns from.
pub(in crate::optimize) struct HeldBack<'r> {
    openings: Batch<'r>,
    refusals: Batch<'r>,
}

/// What held-back requests say. Losses are means over rows, in nats per token.
pub(in crate::optimize) struct Measured {
    /// How many there are.
    pub(in crate::optimize) rows: f64,
    /// Share of them whose refusal is likelier than the opening.
    pub(in crate::optimize) refusing: f64,
    /// Mean of ln(1 + exp(r - h)), in nats: -ln of the chance of the refusal, had the model to choose between it and the opening with
    /// a token's odds. It goes on falling where all refuse, and what one request gains beyond doubt outweighs no other.
    pub(in crate::optimize) doubt: f64,
    /// Loss of the openings.
    pub(in crate::optimize) h: f64,
    /// Loss of the refusals.
    pub(in crate::optimize) r: f64,
}

impl<'r> HeldBack<'r> {
    /// The places to learn from, in a seeded order, and the rest. A set too small to spare rows is looked at whole.
    pub(in crate::optimize) fn split(
        openings: &'r [EncodedRow],
        refusals: &'r [EncodedRow],
        seed: u64,
    ) -> (Vec<usize>, Self) {
        let mut order: Vec<usize> = (0..openings.len()).collect();
        order.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
        let (looked_at, learn) = match (order.len() / ONE_OF).min(MOST) {
            0 => (order.clone(), order),
            held => (order[..held].to_vec(), order[held..].to_vec()),
        };
        let held_back = Self {
            openings: Batch::new(Set::Harmful, openings, looked_at.clone()),
            refusals: Batch::new(Set::Refusals, refusals, looked_at),
        };
        (learn, held_back)
    }

    /// All of the rows, which somebody else set apart.
    pub(in crate::optimize) fn whole(
        openings: &'r [EncodedRow],
        refusals: &'r [EncodedRow],
    ) -> Self {
        Self {
            openings: Batch::whole(Set::Harmful, openings),
            refusals: Batch::whole(Set::Refusals, refusals),
        }
    }

    pub(in crate::optimize) fn measure(
        &self,
        engine: &mut Engine<'_, '_>,
        point: Point<'_>,
    ) -> Result<Measured, OptimizeError> {
        let [h, r] = self.losses(engine, point)?;
        let refusing = h.iter().zip(&r).filter(|(h, r)| r < h).count();
        #[expect(clippy::cast_precision_loss, reason = "a handful of rows")]
        let (n, refusing) = (h.len() as f64, refusing as f64);
        Ok(Measured {
            rows: n,
            refusing: refusing / n,
            doubt: h.iter().zip(&r).map(|(h, r)| doubt(r - h)).sum::<f64>() / n,
            h: h.iter().sum::<f64>() / n,
            r: r.iter().sum::<f64>() / n,
        })
    }

    /// r - h of each request: below 0, it would rather be refused.
    pub(in crate::optimize) fn distances(
        &self,
        engine: &mut Engine<'_, '_>,
        point: Point<'_>,
    ) -> Result<Vec<f64>, OptimizeError> {
        let [h, r] = self.losses(engine, point)?;
        Ok(h.iter().zip(&r).map(|(h, r)| r - h).collect())
    }

    /// The mean loss of each opening, and of each refusal.
    fn losses(
        &self,
        engine: &mut Engine<'_, '_>,
        point: Point<'_>,
    ) -> Result<[Vec<f64>; 2], OptimizeError> {
        let mut means = |batch: &Batch<'_>| -> Result<Vec<f64>, OptimizeError> {
            let losses = engine.row_losses(point, batch)?;
            Ok(losses.into_iter().map(LossSum::mean).collect())
        };
        Ok([means(&self.openings)?, means(&self.refusals)?])
    }
}

/// ln(1 + e^x), also where e^x is not finite.
fn doubt(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

/// Openings and refusals up to the token that decides which of the two an answer is; no further than steps look.
pub(in crate::optimize) fn deciding(rows: &Rows, first_tokens: usize) -> [Vec<EncodedRow>; 2] {
    [&rows.harmful, &rows.refusals].map(|rows| beginnings(rows, DECIDING.min(first_tokens)))
}

/// Each row up to its `tokens`th predicted token.
pub(in crate::optimize) fn beginnings(rows: &[EncodedRow], tokens: usize) -> Vec<EncodedRow> {
    let beginning = |row: &EncodedRow| {
        let predicted = (1..row.tokens.len()).filter(|&i| row.in_loss[i]);
        let end = predicted
            .take(tokens)
            .last()
            .map_or(row.tokens.len(), |last| last + 1);
        EncodedRow {
            tokens: row.tokens[..end].to_vec(),
            in_loss: row.in_loss[..end].to_vec(),
        }
    };
    rows.iter().map(beginning).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_beginning_ends_after_its_last_predicted_token() {
        let row = EncodedRow {
            tokens: vec![1, 2, 3, 4, 5],
            in_loss: vec![true, false, true, true, true],
        };
        assert_eq!(
            beginnings(std::slice::from_ref(&row), 2)[0].tokens,
            [1, 2, 3, 4]
        );
        assert_eq!(beginnings(std::slice::from_ref(&row), 9)[0], row);
    }

    #[test]
    fn doubt_is_the_loss_of_choosing_the_refusal() {
        assert_eq!(doubt(0.0), 2f64.ln());
        assert!((doubt(1.0) - (1.0 + 1f64.exp()).ln()).abs() < 1e-15);
        assert_eq!(doubt(1e4), 1e4);
        assert_eq!(doubt(-1e4), 0.0);
    }

    #[test]
    fn rows_are_either_learned_from_or_held_back() {
        let rows = vec![
            EncodedRow {
                tokens: vec![1, 2],
                in_loss: vec![false, true]
            };
            200
        ];
        let (learn, held_back) = HeldBack::split(&rows, &rows, 3);
        assert_eq!((learn.len(), held_back.openings.len()), (176, 24));
        let (learn, held_back) = HeldBack::split(&rows[..3], &rows[..3], 3);
        assert_eq!((learn.len(), held_back.openings.len()), (3, 3));
    }
}
