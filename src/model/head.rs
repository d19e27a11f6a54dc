//! From the last block's output to a loss, and back.
//!
//! In: tokens x hidden. Out: the loss summed over the predicted positions and, if wanted, its gradient with respect to
//! the input. Logits exist only for positions whose next token is predicted, a chunk of them at a time, and the output
//! matrix is widened tile by tile, so neither the tokens x vocabulary nor the f32 vocabulary x hidden matrix ever exists.

use std::ops::Range;

use panacea_formats::TensorView;
use rayon::prelude::*;

use super::config::Logits;
use super::kernels::{dot, exp, max, norm, simd, tanh};
use super::linear::{Loaded, Products};
use super::matmul::{Matrix, MatrixMut, Output, Threads, matmul};
use super::pack::{Pack, Prediction};

/// Bytes of logits that exist at once.
pub const LOGITS_BYTES: usize = 24 << 20;

/// Bytes of the output matrix that are widened at once.
pub const TILE_BYTES: usize = 16 << 20;

/// A loss summed over predicted tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct LossSum {
    /// Sum over the predicted tokens, in nats.
    pub sum: f64,
    /// How many were predicted.
    pub count: usize,
}

impl LossSum {
    /// Mean per predicted token, in nats.
    #[expect(
        clippy::cast_precision_loss,
        reason = "token counts are far below 2^53"
    )]
    pub fn mean(self) -> f64 {
        self.sum / self.count as f64
    }
}

impl LossSum {
    /// The sum of these tokens' losses.
    pub(crate) fn of_tokens(losses: &[f64]) -> Self {
        Self {
            sum: losses.iter().sum(),
            count: losses.len(),
        }
    }

    /// The loss of one token.
    pub(crate) fn of_token(loss: f64) -> Self {
        Self {
            sum: loss,
            count: 1,
        }
    }
}

impl std::iter::Sum for LossSum {
    fn sum<I: Iterator<Item = Self>>(parts: I) -> Self {
        parts.fold(Self::default(), |mut sum, part| {
            sum += part;
            sum
        })
    }
}

impl std::ops::AddAssign for LossSum {
    fn add_assign(&mut self, other: Self) {
        self.sum += other.sum;
        self.count += other.count;
    }
}

/// What the logits are compared with.
#[derive(Clone, Copy, Debug)]
pub enum Objective<'a> {
    /// The next token: -ln p(token). Tokens whose loss is above `cap` have no gradient, as under min(loss, cap).
    NextToken {
        /// In nats; infinity is none.
        cap: f64,
    },
    /// The distribution that other hidden states give: KL(other || this).
    Divergence {
        /// Predictions x hidden, already normalized.
        reference: &'a [f32],
    },
}

/// What is wanted beside losses.
#[derive(Debug)]
pub(crate) enum Wanted<'d> {
    /// Nothing.
    Losses,
    /// The most probable token of each predicted position ([`HeadScratch::predicted`]).
    Likeliest,
    /// The gradient of their sum with respect to the input, tokens x hidden, which takes the place of what is there.
    Gradient(&'d mut Vec<f32>),
}

/// The final norm and the output matrix.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Head<'a> {
    pub(crate) norm: &'a [f32],
    pub(crate) epsilon: f32,
    /// vocab x hidden.
    pub(crate) matrix: &'a TensorView<'a>,
    /// What follows the matrix.
    pub(crate) finish: Logits,
}

/// Buffers that are kept between calls.
#[derive(Debug, Default)]
pub(crate) struct HeadScratch {
    rows: Vec<f32>,
    scales: Vec<f32>,
    normed: Vec<f32>,
    d_normed: Vec<f32>,
    logits: Vec<f32>,
    reference_logits: Vec<f32>,
    /// d logits / d (their value before the cap); empty without a cap.
    slopes: Vec<f32>,
    tile: Loaded,
    losses: Vec<f64>,
    likeliest: Vec<u32>,
}

impl HeadScratch {
    /// The loss of each predicted position in the last call of [`Head::losses`].
    pub(crate) fn losses(&self) -> &[f64] {
        &self.losses
    }

    /// Each predicted position in the last call of [`Head::losses`], of which [`Wanted::Likeliest`] was wanted.
    pub(crate) fn predicted(&self) -> Vec<Predicted> {
        let each = self.losses.iter().zip(&self.likeliest);
        each.map(|(&loss, &likeliest)| Predicted { loss, likeliest })
            .collect()
    }
}

/// What the model says at one predicted position.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Predicted {
    /// -ln p(token), in nats.
    pub loss: f64,
    /// The most probable token, which greedy decoding takes; of equally probable ones the first.
    pub likeliest: u32,
}

impl Head<'_> {
    /// The losses of `x` (tokens x hidden), in [`HeadScratch::losses`], and what is wanted beside them.
    pub(crate) fn losses(
        self,
        x: &[f32],
        pack: &Pack,
        objective: Objective<'_>,
        wanted: Wanted<'_>,
        scratch: &mut HeadScratch,
    ) {
        let wants_likeliest = matches!(wanted, Wanted::Likeliest);
        let d = match wanted {
            Wanted::Gradient(d) => Some(d),
            Wanted::Losses | Wanted::Likeliest => None,
        };
        let (hidden, vocab) = (self.norm.len(), self.vocab());
        self.normalize(x, pack, scratch);
        let HeadScratch {
            rows,
            scales,
            normed,
            d_normed,
            logits,
            reference_logits,
            slopes,
            tile,
            losses,
            likeliest,
        } = scratch;
        let predictions = &pack.predictions;
        let chunk = (LOGITS_BYTES / 4 / vocab).max(8);
        d_normed.clear();
        d_normed.resize(if d.is_some() { normed.len() } else { 0 }, 0.0);
        losses.clear();
        losses.resize(predictions.len(), 0.0);
        likeliest.clear();
        for first in (0..predictions.len()).step_by(chunk) {
            let range = first..predictions.len().min(first + chunk);
            let elements = range.start * hidden..range.end * hidden;
            let want_gradient = d.is_some();
            self.logits(&normed[elements.clone()], logits, tile);
            if let Objective::Divergence { reference } = objective {
                self.logits(&reference[elements.clone()], reference_logits, tile);
            }
            if let Some(cap) = self.finish.softcap.filter(|_| want_gradient) {
                slopes.resize(logits.len(), 0.0);
                slopes
                    .par_chunks_exact_mut(vocab)
                    .zip(logits.par_chunks_exact(vocab))
                    .for_each(|(slopes, logits)| {
                        simd(
                            #[inline(always)]
                            || slopes_of_cap(logits, cap, slopes),
                        )
                    });
            }
            if wants_likeliest {
                likeliest.par_extend(logits.par_chunks_exact(vocab).map(first_of_largest));
            }
            let losses = &mut losses[range.clone()];
            match objective {
                Objective::NextToken { cap } => (
                    logits.par_chunks_exact_mut(vocab),
                    &predictions[range],
                    losses,
                )
                    .into_par_iter()
                    .for_each(|(row, prediction, loss)| {
                        *loss = simd(
                            #[inline(always)]
                            || next_token(row, *prediction, want_gradient.then_some(cap)),
                        )
                    }),
                Objective::Divergence { .. } => {
                    (
                        logits.par_chunks_exact_mut(vocab),
                        reference_logits.par_chunks_exact_mut(vocab),
                        losses,
                    )
                        .into_par_iter()
                        .for_each(|(row, reference, loss)| {
                            *loss = simd(
                                #[inline(always)]
                                || divergence(row, reference),
                            )
                        });
                }
            }
            if want_gradient {
                if self.finish.softcap.is_some() {
                    logits
                        .par_chunks_exact_mut(vocab)
                        .zip(slopes.par_chunks_exact(vocab))
                        .for_each(|(d, slopes)| {
                            d.iter_mut().zip(slopes).for_each(|(d, s)| *d *= s)
                        });
                }
                self.back_to_hidden(logits, &mut d_normed[elements], tile);
            }
        }
        if let Some(d) = d {
            d.clear();
            d.resize(x.len(), 0.0);
            // Rows of `normed` are no longer needed: they take the gradient before the norm.
            normed.fill(0.0);
            norm::backward(d_normed, rows, self.norm, scales, normed);
            for (prediction, row) in predictions.iter().zip(normed.chunks_exact(hidden)) {
                let at = prediction.position * hidden;
                d[at..at + hidden].copy_from_slice(row);
            }
        }
    }

    /// The final norm's output at each predicted position, predictions x hidden: all that the logits depend on.
    pub(crate) fn hidden(self, x: &[f32], pack: &Pack, scratch: &mut HeadScratch) -> Vec<f32> {
        self.normalize(x, pack, scratch);
        scratch.normed.clone()
    }

    /// The logits at each predicted position, predictions x vocab: for tests and for looking at small models.
    pub(crate) fn all_logits(self, x: &[f32], pack: &Pack, scratch: &mut HeadScratch) -> Vec<f32> {
        self.normalize(x, pack, scratch);
        let mut logits = Vec::new();
        self.logits(&scratch.normed, &mut logits, &mut scratch.tile);
        logits
    }

    fn vocab(self) -> usize {
        self.matrix.shape[0]
    }

    /// Gathers the predicted positions' rows of `x` and normalizes them.
    fn normalize(self, x: &[f32], pack: &Pack, scratch: &mut HeadScratch) {
        let hidden = self.norm.len();
        let HeadScratch {
            rows,
            scales,
            normed,
            ..
        } = scratch;
        rows.clear();
        for prediction in &pack.predictions {
            let at = prediction.position * hidden;
            rows.extend_from_slice(&x[at..at + hidden]);
        }
        normed.resize(rows.len(), 0.0);
        scales.resize(pack.predictions.len(), 0.0);
        norm::forward(rows, self.norm, self.epsilon, normed, scales);
    }

    /// `logits = finish(normed matrix^T)`, predictions x vocab.
    fn logits(self, normed: &[f32], logits: &mut Vec<f32>, tile: &mut Loaded) {
        let (hidden, vocab) = (self.norm.len(), self.vocab());
        let n = normed.len() / hidden;
        logits.resize(n * vocab, 0.0);
        self.for_each_tile(tile, Products::Forward, |rows, tile| {
            matmul(
                MatrixMut::strided(&mut logits[rows.start..], n, rows.len(), vocab),
                Output::Overwrite,
                self.finish.scale,
                Matrix::new(normed, n, hidden),
                tile.transposed(),
                Threads::All,
            );
        });
        if let Some(cap) = self.finish.softcap {
            logits.par_chunks_exact_mut(vocab).for_each(|row| {
                simd(
                    #[inline(always)]
                    || row.iter_mut().for_each(|x| *x = cap * tanh(*x / cap)),
                )
            });
        }
    }

    /// `d_normed += scale d_logits matrix`, with `d_logits` with respect to what goes into the cap.
    fn back_to_hidden(self, d_logits: &[f32], d_normed: &mut [f32], tile: &mut Loaded) {
        let (hidden, vocab) = (self.norm.len(), self.vocab());
        let n = d_normed.len() / hidden;
        self.for_each_tile(tile, Products::Backward, |rows, tile| {
            matmul(
                MatrixMut::new(d_normed, n, hidden),
                Output::Add,
                self.finish.scale,
                Matrix::strided(&d_logits[rows.start..], n, rows.len(), vocab),
                tile.plain(),
                Threads::All,
            );
        });
    }

    /// Calls `work` with the rows of each tile of the output matrix.
    fn for_each_tile(
        self,
        tile: &mut Loaded,
        products: Products,
        mut work: impl FnMut(Range<usize>, &Loaded),
    ) {
        let (hidden, vocab) = (self.norm.len(), self.vocab());
        let rows = (TILE_BYTES / 4 / hidden).max(1);
        for first in (0..vocab).step_by(rows) {
            let rows = first..vocab.min(first + rows);
            tile.load_rows(self.matrix, rows.clone(), products);
            work(rows, tile);
        }
    }
}

/// The largest logit's token. One that is no number is never taken, unless there is no other.
#[expect(
    clippy::cast_possible_truncation,
    reason = "a vocabulary is counted in u32"
)]
pub(super) fn first_of_largest(logits: &[f32]) -> u32 {
    let mut best = (0, f32::NEG_INFINITY);
    for (token, &logit) in logits.iter().enumerate() {
        if logit > best.1 {
            best = (token, logit);
        }
    }
    best.0 as u32
}

/// -ln softmax(row)\[token]; where a gradient is wanted, `row` becomes softmax(row) - onehot(token), or 0 above the cap.
#[inline(always)]
fn next_token(row: &mut [f32], prediction: Prediction, gradient_up_to: Option<f64>) -> f64 {
    let token = prediction.token as usize;
    let score = row[token];
    let (top, sum) = exponentials(row);
    let loss = f64::from(top) + f64::from(sum).ln() - f64::from(score);
    match gradient_up_to {
        Some(cap) if loss > cap => row.fill(0.0),
        Some(_) => {
            let share = 1.0 / sum;
            for p in row.iter_mut() {
                *p *= share;
            }
            row[token] -= 1.0;
        }
        None => {}
    }
    loss
}

/// KL(softmax(reference) || softmax(row)); `row` becomes the gradient softmax(row) - softmax(reference).
#[inline(always)]
fn divergence(row: &mut [f32], reference: &mut [f32]) -> f64 {
    let (top, sum) = log_sum_exp(row);
    let (reference_top, reference_sum) = log_sum_exp(reference);
    let (lse, reference_lse) = (top + sum.ln(), reference_top + reference_sum.ln());
    // p ln(p / q) is reference_p * (difference of log-probabilities); the latter replaces `reference` for one dot product.
    for (x, r) in row.iter_mut().zip(reference.iter_mut()) {
        let log_q = *x - lse;
        let log_p = *r - reference_lse;
        let p = exp(log_p);
        *x = exp(log_q) - p;
        *r = p * (log_p - log_q);
    }
    reference
        .chunks(1024)
        .map(|part| f64::from(part.iter().sum::<f32>()))
        .sum()
}

/// The derivative 1 - (logit / cap)^2 of c tanh(x / c), from its value.
#[inline(always)]
fn slopes_of_cap(logits: &[f32], cap: f32, slopes: &mut [f32]) {
    for (slope, logit) in slopes.iter_mut().zip(logits) {
        let t = logit / cap;
        *slope = 1.0 - t * t;
    }
}

/// Replaces `row` with e^(x - top); returns top and the sum.
#[inline(always)]
fn exponentials(row: &mut [f32]) -> (f32, f32) {
    let top = max(row);
    for x in row.iter_mut() {
        *x = exp(*x - top);
    }
    (top, lane_sum(row))
}

/// The largest element, and the sum of e^(x - top), leaving `row` alone.
#[inline(always)]
fn log_sum_exp(row: &[f32]) -> (f32, f32) {
    let top = max(row);
    let mut sum = 0.0;
    let mut block = [0.0; 512];
    for part in row.chunks(512) {
        let block = &mut block[..part.len()];
        for (e, x) in block.iter_mut().zip(part) {
            *e = exp(*x - top);
        }
        sum += lane_sum(block);
    }
    (top, sum)
}

/// A sum in a fixed order that vectorizes.
#[inline(always)]
fn lane_sum(x: &[f32]) -> f32 {
    const ONES: [f32; 512] = [1.0; 512];
    x.chunks(512)
        .map(|part| dot(part, &ONES[..part.len()]))
        .sum()
}
