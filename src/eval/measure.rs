//! What a checkpoint's loss tells, row by row: no word is generated.
//!
//! In: a decoder and encoded rows. Out: for each row a sum over its predicted tokens, in nats.

use rayon::prelude::*;
use thiserror::Error;

use crate::model::{Decoder, EncodedRow, LossSum, Pack, PackError, Point, TargetTensors};
use crate::optimize::engine::{Batch, Engine};
use crate::optimize::{Observer, OptimizeError, Set};

/// The next-token loss of each of `rows`, with `delta` added to the targets where one is given.
///
/// # Errors
/// [`OptimizeError`] when a loss is not finite, a token is unknown, or the observer stops the work.
pub fn losses(
    decoder: &mut Decoder<'_>,
    delta: Option<&TargetTensors>,
    set: Set,
    rows: &[EncodedRow],
    observer: &mut dyn Observer,
) -> Result<Vec<LossSum>, OptimizeError> {
    Engine::new(decoder, observer).row_losses(point(delta), &Batch::whole(set, rows))
}

/// The stored values, with `delta` added where one is given.
pub(super) fn point(delta: Option<&TargetTensors>) -> Point<'_> {
    match delta {
        None => Point::stored(),
        Some(delta) => Point::stored().moved(1.0, delta),
    }
}

/// KL(`from` || `of`) over the next token on each of `rows`: what ordinary text notices when `of` takes the place of `from`. Each is a decoder with
/// what is added to its targets.
///
/// Any two checkpoints of one vocabulary can be compared, since it is computed from the logits of both. Memory: those of
/// [`POSITIONS`] positions, twice.
///
/// # Errors
/// [`DivergenceError`] when the vocabularies differ in size or a token is unknown.
pub fn divergences(
    (of, of_delta): (&mut Decoder<'_>, Option<&TargetTensors>),
    (from, from_delta): (&mut Decoder<'_>, Option<&TargetTensors>),
    rows: &[EncodedRow],
) -> Result<Vec<LossSum>, DivergenceError> {
    let (size, other) = (of.config().vocab_size, from.config().vocab_size);
    if size != other {
        return Err(DivergenceError::Vocabularies {
            of: size,
            from: other,
        });
    }
    let mut sums = Vec::with_capacity(rows.len());
    for row in rows {
        let mut sum = LossSum::default();
        // All of a row is before each stretch of its predictions, and no more logits than these are held.
        let pack = Pack::of([row]);
        for stretch in pack.predictions.chunks(POSITIONS) {
            let pack = Pack {
                predictions: stretch.to_vec(),
                ..pack.clone()
            };
            let p = from.logits(point(from_delta), &pack)?;
            let q = of.logits(point(of_delta), &pack)?;
            let positions = p.par_chunks_exact(size).zip(q.par_chunks_exact(size));
            let of_each: Vec<f64> = positions.map(|(p, q)| divergence(p, q)).collect();
            sum += of_each.into_iter().map(LossSum::of_token).sum();
        }
        sums.push(sum);
    }
    Ok(sums)
}

/// KL(softmax p || softmax q), in nats, summed in f64. Not below 0, which rounding alone could do.
fn divergence(p: &[f32], q: &[f32]) -> f64 {
    let normalizer = |logits: &[f32]| {
        let largest = logits.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
        let sum: f64 = logits.iter().map(|&x| f64::from(x - largest).exp()).sum();
        f64::from(largest) + sum.ln()
    };
    let (of_p, of_q) = (normalizer(p), normalizer(q));
    let term = |(&p, &q): (&f32, &f32)| {
        let (p, q) = (f64::from(p) - of_p, f64::from(q) - of_q);
        p.exp() * (p - q)
    };
    // NaN stays what it is.
    let sum: f64 = p.iter().zip(q).map(term).sum();
    sum.clamp(0.0, f64::INFINITY)
}

/// Positions whose logits are held at once.
pub const POSITIONS: usize = 256;

/// Why two checkpoints cannot be compared on text.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DivergenceError {
    /// They do not speak of the same tokens.
    #[error("the vocabularies have {of} and {from} tokens")]
    Vocabularies {
        /// Of the checkpoint that is measured.
        of: usize,
        /// Of the one it is compared with.
        from: usize,
    },
    /// A row does not fit the model.
    #[error(transparent)]
    Pack(#[from] PackError),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergence_is_that_of_the_two_distributions() {
        // p = (1/2, 1/2), q = (1/4, 3/4): ln 2 / 2 + ln(2/3) / 2.
        let (p, q) = ([5.0f32, 5.0], [0.0f32, 3.0f32.ln()]);
        let expected = 0.5 * 2.0f64.ln() + 0.5 * (2.0f64 / 3.0).ln();
        assert!((divergence(&p, &q) - expected).abs() < 1e-7);
        assert_eq!(divergence(&p, &[1.0, 1.0]), 0.0);
        // It was 0, which meets every gate.
        assert!(divergence(&p, &[f32::NAN, 1.0]).is_nan());
    }
}
