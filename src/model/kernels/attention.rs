//! Causal attention over packed sequences: softmax(scale q k^T) v, block-diagonal, optionally windowed or soft-capped.
//!
//! Queries, keys and values come head by head (see [`super::rope`]); several query heads share a key-value head
//! (grouped-query attention). Work is cut into blocks of queries that see only the keys they may: what lies above the
//! diagonal, outside the window or in another sequence is never multiplied, and no tokens x tokens matrix is kept. The
//! backward makes the probabilities of a block again from the kept log-sum-exp.
//!
//! Source: Dao et al., "FlashAttention", arXiv:2205.14135 (the backward of algorithm 4, with whole key rows per block).

use std::ops::Range;

use rayon::prelude::*;

use super::rope::Heads;
use super::{dot, exp, max, simd, tanh};
use crate::model::matmul::{Matrix, MatrixMut, Output, Threads, matmul};

/// Queries that are handled together: large enough for a matrix product, small enough for scores to stay in cache.
const BLOCK: usize = 64;

/// What a token may attend to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pattern<'a> {
    /// Where each sequence begins among the tokens, and, last, where the last one ends.
    pub starts: &'a [usize],
    /// How many tokens, itself included, a token looks back on; `None` is all of its sequence.
    pub window: Option<usize>,
}

/// How products of queries and keys become scores: s = scale q k, and then, with a cap c, c tanh(s / c).
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Scores {
    pub(crate) scale: f32,
    pub(crate) softcap: Option<f32>,
}

impl Pattern<'_> {
    /// How many tokens all sequences have together.
    pub(crate) fn tokens(&self) -> usize {
        self.starts.last().copied().unwrap_or(0)
    }

    /// The tokens of each sequence.
    fn sequences(&self) -> impl Iterator<Item = Range<usize>> {
        self.starts.windows(2).map(|pair| pair[0]..pair[1])
    }

    /// The first token that token `query` of the sequence beginning at `start` sees.
    #[inline(always)]
    fn first_key(&self, query: usize, start: usize) -> usize {
        let reach = self.window.unwrap_or(usize::MAX);
        start.max((query + 1).saturating_sub(reach))
    }
}

/// Attends: `heads_in` is (query + 2 key_value heads) x tokens x dim, `attended` tokens x (query heads x dim), `lse` tokens
/// x query heads: the logarithm of each softmax's denominator.
pub(crate) fn forward(
    heads_in: &[f32],
    pattern: Pattern<'_>,
    heads: Heads,
    scores_of: Scores,
    attended: &mut [f32],
    lse: &mut [f32],
) {
    let (dim, tokens) = (heads.dim, pattern.tokens());
    let view = |head: usize, range: Range<usize>| head_matrix(heads_in, head, tokens, dim, range);
    let mut blocks = Vec::new();
    let (mut attended, mut lse) = (attended, lse);
    for sequence in pattern.sequences() {
        for queries in blocks_of(sequence.clone()) {
            let (rows, rest) = attended.split_at_mut(queries.len() * heads.query * dim);
            let (row_lse, rest_lse) = lse.split_at_mut(queries.len() * heads.query);
            (attended, lse) = (rest, rest_lse);
            blocks.push((sequence.start, queries, rows, row_lse));
        }
    }
    blocks
        .into_par_iter()
        .for_each_init(Vec::new, |scores, (start, queries, rows, lse)| {
            let keys = pattern.first_key(queries.start, start)..queries.end;
            for head in 0..heads.query {
                let shared = heads.query + head / (heads.query / heads.key_value);
                scores.resize(queries.len() * keys.len(), 0.0);
                matmul(
                    MatrixMut::new(scores, queries.len(), keys.len()),
                    Output::Overwrite,
                    scores_of.scale,
                    view(head, queries.clone()),
                    view(shared, keys.clone()).t(),
                    Threads::One,
                );
                simd(
                    #[inline(always)]
                    || {
                        for (i, row) in scores.chunks_exact_mut(keys.len()).enumerate() {
                            let query = queries.start + i;
                            let seen = pattern.first_key(query, start) - keys.start
                                ..query + 1 - keys.start;
                            if let Some(cap) = scores_of.softcap {
                                soft_cap(&mut row[seen.clone()], cap);
                            }
                            lse[i * heads.query + head] = softmax(row, seen);
                        }
                    },
                );
                matmul(
                    MatrixMut::strided(
                        &mut rows[head * dim..],
                        queries.len(),
                        dim,
                        heads.query * dim,
                    ),
                    Output::Overwrite,
                    1.0,
                    Matrix::new(scores, queries.len(), keys.len()),
                    view(shared + heads.key_value, keys.clone()),
                    Threads::One,
                );
            }
        });
}

/// What the backward reads of the forward.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kept<'a> {
    /// The forward's `heads_in`.
    pub heads_in: &'a [f32],
    /// The forward's output.
    pub attended: &'a [f32],
    /// The forward's log-sum-exp.
    pub lse: &'a [f32],
}

/// Overwrites `d_heads` (as `heads_in`) with the gradient, given `d_attended` (as `attended`).
pub(crate) fn backward(
    d_attended: &[f32],
    kept: Kept<'_>,
    pattern: Pattern<'_>,
    heads: Heads,
    scores_of: Scores,
    d_heads: &mut [f32],
) {
    let (dim, tokens) = (heads.dim, pattern.tokens());
    if tokens == 0 {
        return;
    }
    let group = heads.query / heads.key_value;
    let (d_queries, rest) = d_heads.split_at_mut(heads.query * tokens * dim);
    let (d_keys, d_values) = rest.split_at_mut(heads.key_value * tokens * dim);
    let mut tasks = Vec::new();
    let per_head = d_queries
        .chunks_exact_mut(group * tokens * dim)
        .zip(d_keys.chunks_exact_mut(tokens * dim))
        .zip(d_values.chunks_exact_mut(tokens * dim));
    for (shared, ((d_queries, d_keys), d_values)) in per_head.enumerate() {
        let mut queries_of_heads: Vec<&mut [f32]> =
            d_queries.chunks_exact_mut(tokens * dim).collect();
        let (mut d_keys, mut d_values) = (d_keys, d_values);
        for sequence in pattern.sequences() {
            let size = sequence.len() * dim;
            let d_queries = queries_of_heads
                .iter_mut()
                .map(|rest| split_off(rest, size))
                .collect();
            tasks.push(Task {
                shared,
                sequence,
                d_queries,
                d_keys: split_off(&mut d_keys, size),
                d_values: split_off(&mut d_values, size),
            });
        }
    }
    tasks
        .into_par_iter()
        .for_each_init(Scratch::default, |scratch, task| {
            task.run(d_attended, kept, pattern, heads, scores_of, scratch)
        });
}

/// The backward of one key-value head, with the query heads that share it, over one sequence.
struct Task<'a> {
    shared: usize,
    sequence: Range<usize>,
    d_queries: Vec<&'a mut [f32]>,
    d_keys: &'a mut [f32],
    d_values: &'a mut [f32],
}

/// Buffers of one thread.
#[derive(Default)]
struct Scratch {
    p: Vec<f32>,
    ds: Vec<f32>,
}

impl Task<'_> {
    /// With p the probabilities: dv = p^T do; dp = do v^T; ds = p * (dp - rowsum(do * o)), times 1 - tanh^2 under a cap; dq = ds k;
    /// dk = ds^T q.
    fn run(
        self,
        d_attended: &[f32],
        kept: Kept<'_>,
        pattern: Pattern<'_>,
        heads: Heads,
        Scores { scale, softcap }: Scores,
        Scratch { p, ds }: &mut Scratch,
    ) {
        let (dim, tokens) = (heads.dim, pattern.tokens());
        let (start, width) = (self.sequence.start, heads.query * dim);
        let key_head = heads.query + self.shared;
        let view =
            |head: usize, range: Range<usize>| head_matrix(kept.heads_in, head, tokens, dim, range);
        self.d_keys.fill(0.0);
        self.d_values.fill(0.0);
        let group = self.d_queries.len();
        for (member, d_queries) in self.d_queries.into_iter().enumerate() {
            let head = self.shared * group + member;
            for queries in blocks_of(self.sequence.clone()) {
                let keys = pattern.first_key(queries.start, start)..queries.end;
                let (rows, cols) = (queries.len(), keys.len());
                let d_rows = Matrix::strided(
                    &d_attended[queries.start * width + head * dim..],
                    rows,
                    dim,
                    width,
                );
                let local =
                    |range: &Range<usize>| (range.start - start) * dim..(range.end - start) * dim;
                p.resize(rows * cols, 0.0);
                ds.resize(rows * cols, 0.0);
                matmul(
                    MatrixMut::new(p, rows, cols),
                    Output::Overwrite,
                    scale,
                    view(head, queries.clone()),
                    view(key_head, keys.clone()).t(),
                    Threads::One,
                );
                matmul(
                    MatrixMut::new(ds, rows, cols),
                    Output::Overwrite,
                    1.0,
                    d_rows,
                    view(key_head + heads.key_value, keys.clone()).t(),
                    Threads::One,
                );
                simd(
                    #[inline(always)]
                    || {
                        for (i, (p, ds)) in p
                            .chunks_exact_mut(cols)
                            .zip(ds.chunks_exact_mut(cols))
                            .enumerate()
                        {
                            let query = queries.start + i;
                            let seen = pattern.first_key(query, start) - keys.start
                                ..query + 1 - keys.start;
                            let at = query * width + head * dim..query * width + (head + 1) * dim;
                            let drift = dot(&d_attended[at.clone()], &kept.attended[at]);
                            let lse = kept.lse[query * heads.query + head];
                            let Some(cap) = softcap else {
                                probabilities(p, seen, lse);
                                for (ds, p) in ds.iter_mut().zip(p) {
                                    *ds = *p * (*ds - drift);
                                }
                                continue;
                            };
                            for (p, ds) in p[seen.clone()].iter_mut().zip(&mut ds[seen.clone()]) {
                                let t = tanh(*p / cap);
                                *p = cap * t;
                                *ds = (*ds - drift) * (1.0 - t * t);
                            }
                            probabilities(p, seen, lse);
                            for (ds, p) in ds.iter_mut().zip(p) {
                                *ds *= *p;
                            }
                        }
                    },
                );
                matmul(
                    MatrixMut::new(&mut self.d_values[local(&keys)], cols, dim),
                    Output::Add,
                    1.0,
                    Matrix::new(p, rows, cols).t(),
                    d_rows,
                    Threads::One,
                );
                matmul(
                    MatrixMut::new(&mut self.d_keys[local(&keys)], cols, dim),
                    Output::Add,
                    scale,
                    Matrix::new(ds, rows, cols).t(),
                    view(head, queries.clone()),
                    Threads::One,
                );
                matmul(
                    MatrixMut::new(&mut d_queries[local(&queries)], rows, dim),
                    Output::Overwrite,
                    scale,
                    Matrix::new(ds, rows, cols),
                    view(key_head, keys),
                    Threads::One,
                );
            }
        }
    }
}

/// Cuts a sequence into blocks of at most [`BLOCK`] queries.
fn blocks_of(sequence: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let end = sequence.end;
    sequence
        .step_by(BLOCK)
        .map(move |start| start..end.min(start + BLOCK))
}

/// The tokens `range` of one head, as tokens x dim.
fn head_matrix(
    heads_in: &[f32],
    head: usize,
    tokens: usize,
    dim: usize,
    range: Range<usize>,
) -> Matrix<'_> {
    let at = (head * tokens + range.start) * dim;
    Matrix::new(&heads_in[at..at + range.len() * dim], range.len(), dim)
}

#[inline(always)]
pub(super) fn soft_cap(scores: &mut [f32], cap: f32) {
    for s in scores {
        *s = cap * tanh(*s / cap);
    }
}

/// Turns the scores in `seen` into probabilities, the others into 0; returns the log-sum-exp.
#[inline(always)]
pub(super) fn softmax(row: &mut [f32], seen: Range<usize>) -> f32 {
    let scores = &mut row[seen.clone()];
    let top = max(scores);
    let mut sum = 0.0;
    for s in scores.iter_mut() {
        *s = exp(*s - top);
    }
    for s in scores.iter() {
        sum += s;
    }
    let share = 1.0 / sum;
    for s in scores.iter_mut() {
        *s *= share;
    }
    row[..seen.start].fill(0.0);
    row[seen.end..].fill(0.0);
    top + sum.ln()
}

/// As [`softmax`], from a known log-sum-exp.
#[inline(always)]
fn probabilities(row: &mut [f32], seen: Range<usize>, lse: f32) {
    for s in &mut row[seen.clone()] {
        *s = exp(*s - lse);
    }
    row[..seen.start].fill(0.0);
    row[seen.end..].fill(0.0);
}

/// Takes the first `size` elements out of `rest`.
fn split_off<'a>(rest: &mut &'a mut [f32], size: usize) -> &'a mut [f32] {
    let (first, left) = std::mem::take(rest).split_at_mut(size);
    *rest = left;
    first
}
