//! Rotary position embedding, fused with the change of layout that attention wants.
//!
//! A projection leaves tokens x (query heads | key heads | value heads), token after token; attention reads each head
//! as one contiguous tokens x head_dim matrix. Both happen in one pass over the data, in either direction.
//!
//! Source: Su et al., "RoFormer", arXiv:2104.09864; which dimensions make a pair is [`Pairs`].

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
    /// Makes room for the sequences whose own tokens begin at `starts` (the last one is where the last sequence ends) behind a beginning that they
    /// share, and notes where in its sequence each token stands. The angles are `position * inverse[i]`, computed in f32 as transformers does.
    ///
    /// A beginning takes the frequencies of its own length: [`Frequencies::switches_above`] and sharing do not go together.
    pub(crate) fn prepare(&mut self, frequencies: &Frequencies, starts: &[usize]) {
        let shared = starts.first().copied().unwrap_or(0);
        let own = starts
            .windows(2)
            .map(|pair| shared..shared + pair[1] - pair[0]);
        let sequences = std::iter::once(0..shared).chain(own);
        let longest = sequences.clone().map(|positions| positions.end).max();
        let places =
            sequences.flat_map(|positions| positions.clone().map(move |at| (at, positions.end)));
        self.place(frequencies, longest, places);
    }

    /// As [`Self::prepare`], for the last token alone of sequences of these `lengths`.
    pub(crate) fn prepare_last(&mut self, frequencies: &Frequencies, lengths: &[usize]) {
        let places = lengths.iter().map(|&length| (length - 1, length));
        self.place(frequencies, lengths.iter().copied().max(), places);
    }

    /// Notes each token's row, given its position and its sequence's length.
    fn place(
        &mut self,
        frequencies: &Frequencies,
        longest: Option<usize>,
        places: impl Iterator<Item = (usize, usize)>,
    ) {
        let longest = longest.unwrap_or(0);
        if self.positions < longest {
            self.fill(frequencies, longest.next_multiple_of(128));
        }
        let first_of_long = self.positions;
        self.rows.clear();
        self.rows.extend(places.map(|(position, length)| {
            let first = match frequencies.switches_above() {
                Some(above) if length > above => first_of_long,
                _ => 0,
            };
            first + position
        }));
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
    pub(crate) fn tokens(&self) -> usize {
        self.rows.len()
    }

    /// Pairs of dimensions that turn.
    pub(crate) fn pairs(&self) -> usize {
        self.half
    }

    /// Cosines and sines of the pack's tokens: tokens x pairs.
    pub(crate) fn of_tokens(&self) -> (Vec<f32>, Vec<f32>) {
        let of = |table: &[f32]| -> Vec<f32> {
            let rows = self.rows.iter().map(|row| row * self.half);
            rows.flat_map(|at| table[at..at + self.half].iter().copied())
                .collect()
        };
        (of(&self.cos), of(&self.sin))
    }

    #[inline(always)]
    fn at(&self, row: usize) -> (&[f32], &[f32]) {
        let range = row * self.half..(row + 1) * self.half;
        (&self.cos[range.clone()], &self.sin[range])
    }
}

/// Which dimensions of a head turn together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pairs {
    /// i and i + half of those that turn, as in transformers.
    Halves,
    /// 2 i and 2 i + 1, as in GGUF files of the `llama` architecture, whose rows are reordered for it.
    Neighbors,
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
    /// Which of them turn together.
    pub pairs: Pairs,
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

    /// `out` is `x` with its first pairs turned by the angles of `cos` and `sin`, and the rest as it is.
    #[inline(always)]
    fn turn(self, x: &[f32], (cos, sin): (&[f32], impl Fn(usize) -> f32), out: &mut [f32]) {
        let half = cos.len();
        let (out, still) = out.split_at_mut(2 * half);
        let (x, x_still) = x.split_at(2 * half);
        match self.pairs {
            Pairs::Halves => {
                let ((out_a, out_b), (a, b)) = (out.split_at_mut(half), x.split_at(half));
                for i in 0..half {
                    out_a[i] = a[i] * cos[i] - b[i] * sin(i);
                    out_b[i] = b[i] * cos[i] + a[i] * sin(i);
                }
            }
            Pairs::Neighbors => {
                let pairs = out.as_chunks_mut().0.iter_mut().zip(x.as_chunks().0);
                for (i, (out, &[a, b])) in pairs.enumerate() {
                    *out = [a * cos[i] - b * sin(i), b * cos[i] + a * sin(i)];
                }
            }
        }
        still.copy_from_slice(x_still);
    }
}

/// Splits `qkv` (tokens x row) into `heads_out` (head after head, each tokens x dim), rotating queries and keys.
pub(crate) fn forward(qkv: &[f32], heads: Heads, table: &Rotations, heads_out: &mut [f32]) {
    let dim = heads.dim;
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
                            heads.turn(
                                x,
                                (
                                    cos,
                                    #[inline(always)]
                                    |i| sin[i],
                                ),
                                out,
                            );
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
    let (dim, tokens) = (heads.dim, table.tokens());
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
                            heads.turn(
                                d,
                                (
                                    cos,
                                    #[inline(always)]
                                    |i| -sin[i],
                                ),
                                out,
                            );
                        } else {
                            out.copy_from_slice(d);
                        }
                    }
                },
            );
        });
}
