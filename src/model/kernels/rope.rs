//! Rotary position embedding, fused with the change of layout that attention wants.
//!
//! A projection leaves tokens x (query heads | key heads | value heads), token after token; attention reads each head
//! as one contiguous tokens x head_dim matrix. Both happen in one pass over the data, in either direction.
//!
//! Source: Su et al., "RoFormer", arXiv:2104.09864; dimension i is paired with i + half of those that turn, as in
//! transformers.

use rayon::prelude::*;

use super::simd;
use crate::model::frequencies::Frequencies;

/// Cosines and sines of the rotation angles, and which of them each token of a pack takes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Rotations {
    /// Pairs of dimensions that turn.
    half: usize,
    /// How many positions the tables hold.
    positions: usize,
    /// Positions x half; where long sequences have frequencies of their own, theirs follow in as many rows again.
    cos: Vec<f32>,
    sin: Vec<f32>,
    /// The row of each token.
    rows: Vec<usize>,
}

impl Rotations {
    /// Makes room for the sequences that begin at `starts` (the last one is where the last sequence ends), and notes where in its
    /// own sequence each token stands. The angles are `position * inverse[i]`, computed in f32 as transformers does.
    pub(crate) fn prepare(&mut self, frequencies: &Frequencies, starts: &[usize]) {
        let lengths = || starts.windows(2).map(|pair| pair[1] - pair[0]);
        let longest = lengths().max().unwrap_or(0);
        if self.positions < longest {
            self.fill(frequencies, longest.next_multiple_of(128));
        }
        self.rows.clear();
        for length in lengths() {
            let first = match &frequencies.long {
                Some((above, _)) if length > *above => self.positions,
                _ => 0,
            };
            self.rows.extend(first..first + length);
        }
    }

    fn fill(&mut self, frequencies: &Frequencies, positions: usize) {
        let Frequencies {
            inverse,
            long,
            attention_factor,
        } = frequencies;
        #[expect(clippy::cast_precision_loss, reason = "positions are far below 2^24")]
        let angles = |inverse: &[f32]| -> Vec<f32> {
            (0..positions)
                .flat_map(|p| inverse.iter().map(move |f| p as f32 * f))
                .collect()
        };
        let mut all = angles(inverse);
        if let Some((_, inverse)) = long {
            all.extend(angles(inverse));
        }
        self.half = inverse.len();
        self.positions = positions;
        (self.sin, self.cos) = all
            .into_iter()
            .map(f32::sin_cos)
            .map(|(sin, cos)| (sin * attention_factor, cos * attention_factor))
            .unzip();
    }

    /// How many tokens the pack has.
    fn tokens(&self) -> usize {
        self.rows.len()
    }

    #[inline(always)]
    fn at(&self, row: usize) -> (&[f32], &[f32]) {
        let range = row * self.half..(row + 1) * self.half;
        (&self.cos[range.clone()], &self.sin[range])
    }
}

/// Which heads lie side by side in a token's row of the projection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Heads {
    /// Number of query heads.
    pub query: usize,
    /// Number of key heads, and of value heads.
    pub key_value: usize,
    /// Elements of one head.
    pub dim: usize,
}

impl Heads {
    /// Elements of a token's row: all query, key and value heads.
    pub(crate) fn row(self) -> usize {
        (self.query + 2 * self.key_value) * self.dim
    }

    /// Whether head number `head` of a row (queries, keys, values) is rotated.
    fn rotated(self, head: usize) -> bool {
        head < self.query + self.key_value
    }
}

/// Splits `qkv` (tokens x row) into `heads_out` (head after head, each tokens x dim), rotating queries and keys.
pub(crate) fn forward(qkv: &[f32], heads: Heads, table: &Rotations, heads_out: &mut [f32]) {
    let (dim, half) = (heads.dim, table.half);
    heads_out
        .par_chunks_exact_mut(table.tokens() * dim)
        .enumerate()
        .for_each(|(head, out)| {
            simd(
                #[inline(always)]
                || {
                    for ((out, row), &place) in out
                        .chunks_exact_mut(dim)
                        .zip(qkv.chunks_exact(heads.row()))
                        .zip(&table.rows)
                    {
                        let x = &row[head * dim..(head + 1) * dim];
                        if heads.rotated(head) {
                            let (cos, sin) = table.at(place);
                            let (out, still) = out.split_at_mut(2 * half);
                            let (x, x_still) = x.split_at(2 * half);
                            let ((out_a, out_b), (a, b)) =
                                (out.split_at_mut(half), x.split_at(half));
                            for i in 0..half {
                                out_a[i] = a[i] * cos[i] - b[i] * sin[i];
                                out_b[i] = b[i] * cos[i] + a[i] * sin[i];
                            }
                            still.copy_from_slice(x_still);
                        } else {
                            out.copy_from_slice(x);
                        }
                    }
                },
            );
        });
}

/// The transpose of [`forward`]: gathers gradients head by head (`d_heads`) into rows of `d_qkv`, rotating back.
pub(crate) fn backward(d_heads: &[f32], heads: Heads, table: &Rotations, d_qkv: &mut [f32]) {
    let (dim, half, tokens) = (heads.dim, table.half, table.tokens());
    d_qkv
        .par_chunks_exact_mut(heads.row())
        .zip(table.rows.par_iter())
        .enumerate()
        .for_each(|(token, (row, &place))| {
            simd(
                #[inline(always)]
                || {
                    let (cos, sin) = table.at(place);
                    for (head, out) in row.chunks_exact_mut(dim).enumerate() {
                        let d = &d_heads[(head * tokens + token) * dim..][..dim];
                        if heads.rotated(head) {
                            let (out, still) = out.split_at_mut(2 * half);
                            let (d, d_still) = d.split_at(2 * half);
                            let ((out_a, out_b), (a, b)) =
                                (out.split_at_mut(half), d.split_at(half));
                            for i in 0..half {
                                out_a[i] = a[i] * cos[i] + b[i] * sin[i];
                                out_b[i] = b[i] * cos[i] - a[i] * sin[i];
                            }
                            still.copy_from_slice(d_still);
                        } else {
                            out.copy_from_slice(d);
                        }
                    }
                },
            );
        });
}
