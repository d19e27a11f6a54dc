//! Requests that no step learns from, to see whether the aim is reached.
//!
//! In: weights. Out: the share of these requests that would be refused, and how much likelier their refusal is than the opening that complies.
//! Neither the choice between these two nor greedy decoding is enough by itself to tell when to stop: openings that hardly anything is likelier
//! than are said, and refusals that are said by a hair are not said of the next request (docs/experiments.md has both, measured).

use std::collections::HashMap;

use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use super::super::Rows;
use super::super::engine::{Batch, Engine, OptimizeError, Set};
use crate::model::{EncodedRow, LossSum, Point, Predicted};

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
    beginnings: Beginnings<'r>,
}

/// What held-back requests say. Losses are means over rows, in nats per token.
pub(in crate::optimize) struct Measured {
    /// How many there are.
    pub(in crate::optimize) rows: f64,
    /// Share of them that would be refused: their refusal is likelier than their opening, and greedy decoding begins an answer in the
    /// words of this or of another refusal.
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
            beginnings: Beginnings::of(refusals),
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
            beginnings: Beginnings::of(refusals),
        }
    }

    pub(in crate::optimize) fn measure(
        &self,
        engine: &mut Engine<'_, '_>,
        point: Point<'_>,
    ) -> Result<Measured, OptimizeError> {
        let h = means(&engine.row_predictions(point, &self.openings)?);
        let of_refusals = engine.row_predictions(point, &self.refusals)?;
        let r = means(&of_refusals);
        let answers = self.refusals.rows().zip(&of_refusals);
        let begun = answers
            .zip(h.iter().zip(&r))
            .filter(|(_, (h, r))| r < h)
            .filter_map(|((row, predicted), _)| Begun::by(row, predicted));
        let refusing = self.refused(engine, point, begun.collect())?;
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

    /// How many of the answers that are begun greedy decoding goes on with as some refusal does.
    fn refused(
        &self,
        engine: &mut Engine<'_, '_>,
        point: Point<'_>,
        mut begun: Vec<Begun<'_>>,
    ) -> Result<usize, OptimizeError> {
        let mut refused = 0;
        loop {
            begun.retain(|it| match self.beginnings.0.get(it.taken.as_slice()) {
                Some(Extent::Whole) => {
                    refused += 1;
                    false
                }
                Some(Extent::Part) => true,
                None => false,
            });
            if begun.is_empty() {
                return Ok(refused);
            }
            let open: Vec<EncodedRow> = begun.iter().map(Begun::open).collect();
            let next = engine.row_predictions(point, &Batch::whole(Set::Refusals, &open))?;
            for (it, predicted) in begun.iter_mut().zip(&next) {
                it.taken.push(predicted[0].likeliest);
            }
        }
    }

    /// r - h of each request: below 0, it would rather be refused.
    pub(in crate::optimize) fn distances(
        &self,
        engine: &mut Engine<'_, '_>,
        point: Point<'_>,
    ) -> Result<Vec<f64>, OptimizeError> {
        let h = means(&engine.row_predictions(point, &self.openings)?);
        let r = means(&engine.row_predictions(point, &self.refusals)?);
        Ok(h.iter().zip(&r).map(|(h, r)| r - h).collect())
    }
}

/// The mean loss of each row, in nats per token.
fn means(rows: &[Vec<Predicted>]) -> Vec<f64> {
    let mean =
        |row: &Vec<Predicted>| -> LossSum { row.iter().map(|it| LossSum::of_token(it.loss)).sum() };
    rows.iter().map(|row| mean(row).mean()).collect()
}

/// A request and the first tokens that greedy decoding answers it with.
struct Begun<'r> {
    prompt: &'r [u32],
    taken: Vec<u32>,
}

impl<'r> Begun<'r> {
    /// The request of `row`, and the first of what is predicted along it; none for a row without a response.
    fn by(row: &'r EncodedRow, predicted: &[Predicted]) -> Option<Self> {
        let first = predicted.first()?;
        Some(Self {
            prompt: &row.tokens[..row.tokens.len() - response(row).len()],
            taken: vec![first.likeliest],
        })
    }

    /// A row whose one prediction is of the token to come. Which one it is said to be changes no probability.
    fn open(&self) -> EncodedRow {
        let tokens = [self.prompt, &self.taken, &[0]].concat();
        let mut in_loss = vec![false; tokens.len()];
        in_loss[tokens.len() - 1] = true;
        EncodedRow { tokens, in_loss }
    }
}

/// What the refusals of a set begin with, up to where it is decided what an answer is.
struct Beginnings<'r>(HashMap<&'r [u32], Extent>);

/// How much of the beginning of a refusal some tokens are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Extent {
    Part,
    Whole,
}

impl<'r> Beginnings<'r> {
    fn of(refusals: &'r [EncodedRow]) -> Self {
        let mut found = HashMap::new();
        for whole in refusals.iter().map(response) {
            for length in 1..whole.len() {
                found.entry(&whole[..length]).or_insert(Extent::Part);
            }
            found.insert(whole, Extent::Whole);
        }
        Self(found)
    }
}

/// The predicted tokens of a row, which are its last.
fn response(row: &EncodedRow) -> &[u32] {
    let predicted = (1..row.tokens.len()).find(|&i| row.in_loss[i]);
    &row.tokens[predicted.unwrap_or(row.tokens.len())..]
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
    fn a_refusal_begins_with_any_of_the_sets_words() {
        let row = |tokens: &[u32]| EncodedRow {
            tokens: tokens.to_vec(),
            in_loss: tokens.iter().map(|&token| token < 50).collect(),
        };
        // One of them ends where another goes on.
        let refusals = [
            row(&[99, 1, 2, 3]),
            row(&[98, 97, 1, 2]),
            row(&[99, 1, 4, 5]),
        ];
        let beginnings = Beginnings::of(&refusals);
        let of = |tokens: &[u32]| beginnings.0.get(tokens).copied();
        assert_eq!(of(&[1]), Some(Extent::Part));
        assert_eq!(of(&[1, 2]), Some(Extent::Whole));
        assert_eq!(of(&[1, 2, 3]), Some(Extent::Whole));
        assert_eq!(of(&[1, 4]), Some(Extent::Part));
        assert_eq!(of(&[2]), None);
        assert_eq!(of(&[1, 4, 3]), None);
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
