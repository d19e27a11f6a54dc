//! Rotary position embedding, fused with the change of layout that attention wants.
//!
//! A projection leaves tokens x (query heads | key heads | value heads), token after token; attention reads each head
//! as one contiguous tokens x head_dim matrix. Both happen in one pass over the data, in either direction.
//!
//! Source: Su et al., "RoFormer", arXiv:2104.09864; dimension i is paired with i + head_dim / 2, as in transformers.

use rayon::prelude::*;

use super::simd;
use crate::model::frequencies::Frequencies;

/// Cosines and sines of the rotation angles: positions x half the head dimension each.
#[derive(Clone, Debug, Default)]
pub(crate) struct Rotations {
    half: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Rotations {
    /// The angles `position * inverse[i]`, computed in f32 as transformers does, for `positions` positions.
    pub(crate) fn new(frequencies: &Frequencies, positions: usize) -> Self {
        let Frequencies {
            inverse,
            attention_factor,
        } = frequencies;
        #[expect(clippy::cast_precision_loss, reason = "positions are far below 2^24")]
        let angles = (0..positions).flat_map(|p| inverse.iter().map(move |f| p as f32 * f));
        let scaled = |(sin, cos): (f32, f32)| (sin * attention_factor, cos * attention_factor);
        let (sin, cos) = angles.map(f32::sin_cos).map(scaled).unzip();
        Self {
            half: inverse.len(),
            cos,
            sin,
        }
    }

    /// How many positions the table holds.
    pub(crate) fn positions(&self) -> usize {
        self.cos.len() / self.half.max(1)
    }

    #[inline(always)]
    fn at(&self, position: usize) -> (&[f32], &[f32]) {
        let range = position * self.half..(position + 1) * self.half;
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
///
/// `positions`: each token's place in its own sequence.
pub(crate) fn forward(
    qkv: &[f32],
    positions: &[usize],
    heads: Heads,
    table: &Rotations,
    heads_out: &mut [f32],
) {
    let (dim, half) = (heads.dim, heads.dim / 2);
    heads_out
        .par_chunks_exact_mut(positions.len() * dim)
        .enumerate()
        .for_each(|(head, out)| {
            simd(|| {
                for ((out, row), &position) in out
                    .chunks_exact_mut(dim)
                    .zip(qkv.chunks_exact(heads.row()))
                    .zip(positions)
                {
                    let x = &row[head * dim..(head + 1) * dim];
                    if heads.rotated(head) {
                        let (cos, sin) = table.at(position);
                        let ((out_a, out_b), (a, b)) = (out.split_at_mut(half), x.split_at(half));
                        for i in 0..half {
                            out_a[i] = a[i] * cos[i] - b[i] * sin[i];
                            out_b[i] = b[i] * cos[i] + a[i] * sin[i];
                        }
                    } else {
                        out.copy_from_slice(x);
                    }
                }
            });
        });
}

/// The transpose of [`forward`]: gathers gradients head by head (`d_heads`) into rows of `d_qkv`, rotating back.
pub(crate) fn backward(
    d_heads: &[f32],
    positions: &[usize],
    heads: Heads,
    table: &Rotations,
    d_qkv: &mut [f32],
) {
    let (dim, half, tokens) = (heads.dim, heads.dim / 2, positions.len());
    d_qkv
        .par_chunks_exact_mut(heads.row())
        .zip(positions.par_iter())
        .enumerate()
        .for_each(|(token, (row, &position))| {
            simd(|| {
                let (cos, sin) = table.at(position);
                for (head, out) in row.chunks_exact_mut(dim).enumerate() {
                    let d = &d_heads[(head * tokens + token) * dim..][..dim];
                    if heads.rotated(head) {
                        let ((out_a, out_b), (a, b)) = (out.split_at_mut(half), d.split_at(half));
                        for i in 0..half {
                            out_a[i] = a[i] * cos[i] + b[i] * sin[i];
                            out_b[i] = b[i] * cos[i] - a[i] * sin[i];
                        }
                    } else {
                        out.copy_from_slice(d);
                    }
                }
            });
        });
}
