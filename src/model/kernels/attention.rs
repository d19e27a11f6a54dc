//! Causal attention over packed sequences: softmax(scale q k^T) v, block-diagonal, optionally windowed or soft-capped.
//!
//! Queries, keys and values come head by head (see [`super::rope`]); several query heads share a key-value head
//! (grouped-query attention). Sequences may have a beginning in common, which stands before all of them once. Work is cut into blocks
//! of queries that see only the keys they may: what lies above the diagonal, outside the window or in another sequence is never
//! multiplied, and no tokens x tokens matrix is kept. The backward makes the probabilities of a block again from the kept log-sum-exp.
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
///
/// Tokens before the first start are the beginning of every sequence: computed once, and seen by all of them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pattern<'a> {
    /// Where the own tokens of each sequence begin, and, last, where the last ones end.
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

    /// How many tokens all sequences begin with.
    fn shared(&self) -> usize {
        self.starts.first().copied().unwrap_or(0)
    }

    /// The shared beginning, and the own tokens of each sequence.
    fn segments(&self) -> impl Iterator<Item = Segment> {
        let shared = self.shared();
        let beginning = Segment {
            before: 0,
            tokens: 0..shared,
        };
        let own = self.starts.windows(2).map(move |pair| Segment {
            before: shared,
            tokens: pair[0]..pair[1],
        });
        std::iter::once(beginning).chain(own)
    }

    /// The first position that the one at `position` of the same sequence sees.
    #[inline(always)]
    fn first_seen(&self, position: usize) -> usize {
        let reach = self.window.unwrap_or(usize::MAX);
        (position + 1).saturating_sub(reach)
    }

    /// The tokens that `token` sees: shared ones, and own ones of its sequence.
    pub(crate) fn seen(&self, token: usize) -> [Range<usize>; 2] {
        let all = self.segments();
        let mut with = all.filter(|segment| segment.tokens.contains(&token));
        match with.next() {
            Some(segment) => self.keys(&segment, &(token..token + 1)).parts,
            None => [0..0, 0..0],
        }
    }

    /// The keys that the tokens `queries` of `segment` see, all together.
    fn keys(&self, segment: &Segment, queries: &Range<usize>) -> Keys {
        let first = self.first_seen(segment.position(queries.start));
        let own = first.saturating_sub(segment.before) + segment.tokens.start;
        Keys {
            first,
            parts: [first.min(segment.before)..segment.before, own..queries.end],
        }
    }
}

/// Tokens that are computed as one sequence, which may begin with the shared ones.
#[derive(Clone, Debug)]
struct Segment {
    /// How many shared tokens come before: those from the pack's first on.
    before: usize,
    /// Its own.
    tokens: Range<usize>,
}

impl Segment {
    /// Where in the sequence the own token `token` stands.
    #[inline(always)]
    fn position(&self, token: usize) -> usize {
        self.before + token - self.tokens.start
    }
}

/// Keys of a block of queries: positions of one sequence without a gap, which are two runs of tokens.
#[derive(Clone, Debug)]
struct Keys {
    /// The first one's position.
    first: usize,
    /// Shared tokens, and own ones.
    parts: [Range<usize>; 2],
}

impl Keys {
    fn len(&self) -> usize {
        self.parts[0].len() + self.parts[1].len()
    }

    /// Each run that is not empty, with its place among the keys and whether it is of shared tokens.
    fn runs(&self) -> impl Iterator<Item = (usize, Range<usize>, bool)> {
        let [shared, own] = self.parts.clone();
        let runs = [(0, shared.clone(), true), (shared.len(), own, false)];
        runs.into_iter().filter(|(_, tokens, _)| !tokens.is_empty())
    }

    /// Which of them the query at `position` sees.
    #[inline(always)]
    fn seen(&self, pattern: &Pattern<'_>, position: usize) -> Range<usize> {
        pattern.first_seen(position) - self.first..position + 1 - self.first
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
    for segment in pattern.segments() {
        for queries in blocks_of(segment.tokens.clone()) {
            let (rows, rest) = attended.split_at_mut(queries.len() * heads.query * dim);
            let (row_lse, rest_lse) = lse.split_at_mut(queries.len() * heads.query);
            (attended, lse) = (rest, rest_lse);
            blocks.push((segment.clone(), queries, rows, row_lse));
        }
    }
    blocks
        .into_par_iter()
        .for_each_init(Vec::new, |scores, (segment, queries, rows, lse)| {
            let keys = pattern.keys(&segment, &queries);
            let cols = keys.len();
            for head in 0..heads.query {
                let key_head = heads.query + head / (heads.query / heads.key_value);
                scores.resize(queries.len() * cols, 0.0);
                for (at, tokens, _) in keys.runs() {
                    let len = tokens.len();
                    matmul(
                        MatrixMut::strided(&mut scores[at..], queries.len(), len, cols),
                        Output::Overwrite,
                        scores_of.scale,
                        view(head, queries.clone()),
                        view(key_head, tokens).t(),
                        Threads::One,
                    );
                }
                simd(
                    #[inline(always)]
                    || {
                        for (i, row) in scores.chunks_exact_mut(cols).enumerate() {
                            let seen = keys.seen(&pattern, segment.position(queries.start + i));
                            if let Some(cap) = scores_of.softcap {
                                soft_cap(&mut row[seen.clone()], cap);
                            }
                            lse[i * heads.query + head] = softmax(row, seen);
                        }
                    },
                );
                let mut output = Output::Overwrite;
                for (at, tokens, _) in keys.runs() {
                    let out = &mut rows[head * dim..];
                    matmul(
                        MatrixMut::strided(out, queries.len(), dim, heads.query * dim),
                        output,
                        1.0,
                        Matrix::strided(&scores[at..], queries.len(), tokens.len(), cols),
                        view(key_head + heads.key_value, tokens),
                        Threads::One,
                    );
                    output = Output::Add;
                }
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
    // What each sequence adds to the gradients of shared keys and values: keys, then values.
    let (shared, sequences) = (pattern.shared() * dim, pattern.starts.len() - 1);
    let mut of_shared = vec![0.0; heads.key_value * sequences * 2 * shared];
    let mut left = &mut of_shared[..];
    let mut tasks = Vec::new();
    let per_head = d_queries
        .chunks_exact_mut(group * tokens * dim)
        .zip(d_keys.chunks_exact_mut(tokens * dim))
        .zip(d_values.chunks_exact_mut(tokens * dim));
    for (index, ((d_queries, d_keys), d_values)) in per_head.enumerate() {
        let mut queries_of_heads: Vec<&mut [f32]> =
            d_queries.chunks_exact_mut(tokens * dim).collect();
        let (mut d_keys, mut d_values) = (d_keys, d_values);
        for segment in pattern.segments() {
            let size = segment.tokens.len() * dim;
            let d_queries = queries_of_heads
                .iter_mut()
                .map(|rest| split_off(rest, size))
                .collect();
            let before = segment.before * dim;
            tasks.push(Task {
                key_value: index,
                segment,
                d_queries,
                d_keys: [split_off(&mut left, before), split_off(&mut d_keys, size)],
                d_values: [split_off(&mut left, before), split_off(&mut d_values, size)],
            });
        }
    }
    tasks
        .into_par_iter()
        .for_each_init(Scratch::default, |scratch, task| {
            task.run(d_attended, kept, pattern, heads, scores_of, scratch)
        });
    if of_shared.is_empty() {
        return;
    }
    // One sequence after the other, whoever computed them.
    let of_heads = of_shared.chunks_exact(sequences * 2 * shared);
    for (index, of_head) in of_heads.enumerate() {
        let at = index * tokens * dim..index * tokens * dim + shared;
        for of_sequence in of_head.chunks_exact(2 * shared) {
            let (keys, values) = of_sequence.split_at(shared);
            for (sum, more) in [(&mut *d_keys, keys), (&mut *d_values, values)] {
                let sum = sum[at.clone()].iter_mut();
                sum.zip(more).for_each(|(sum, more)| *sum += more);
            }
        }
    }
}

/// The backward of one key-value head, with the query heads that share it, over one segment.
struct Task<'a> {
    key_value: usize,
    segment: Segment,
    d_queries: Vec<&'a mut [f32]>,
    /// Of the shared tokens before the segment, and of its own.
    d_keys: [&'a mut [f32]; 2],
    d_values: [&'a mut [f32]; 2],
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
        let (segment, width) = (self.segment, heads.query * dim);
        let start = segment.tokens.start;
        let key_head = heads.query + self.key_value;
        let view =
            |head: usize, range: Range<usize>| head_matrix(kept.heads_in, head, tokens, dim, range);
        let (mut d_keys, mut d_values) = (self.d_keys, self.d_values);
        for gradient in d_keys.iter_mut().chain(&mut d_values) {
            gradient.fill(0.0);
        }
        let group = self.d_queries.len();
        for (member, d_queries) in self.d_queries.into_iter().enumerate() {
            let head = self.key_value * group + member;
            for queries in blocks_of(segment.tokens.clone()) {
                let keys = pattern.keys(&segment, &queries);
                let (rows, cols) = (queries.len(), keys.len());
                let d_rows = Matrix::strided(
                    &d_attended[queries.start * width + head * dim..],
                    rows,
                    dim,
                    width,
                );
                p.resize(rows * cols, 0.0);
                ds.resize(rows * cols, 0.0);
                for (at, tokens, _) in keys.runs() {
                    let len = tokens.len();
                    matmul(
                        MatrixMut::strided(&mut p[at..], rows, len, cols),
                        Output::Overwrite,
                        scale,
                        view(head, queries.clone()),
                        view(key_head, tokens.clone()).t(),
                        Threads::One,
                    );
                    matmul(
                        MatrixMut::strided(&mut ds[at..], rows, len, cols),
                        Output::Overwrite,
                        1.0,
                        d_rows,
                        view(key_head + heads.key_value, tokens).t(),
                        Threads::One,
                    );
                }
                simd(
                    #[inline(always)]
                    || {
                        for (i, (p, ds)) in p
                            .chunks_exact_mut(cols)
                            .zip(ds.chunks_exact_mut(cols))
                            .enumerate()
                        {
                            let query = queries.start + i;
                            let seen = keys.seen(&pattern, segment.position(query));
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
                let d_block = &mut d_queries[(queries.start - start) * dim..][..rows * dim];
                let mut output = Output::Overwrite;
                for (at, tokens, is_shared) in keys.runs() {
                    // Where the run's gradients are: shared tokens are the first of all.
                    let (part, from) = if is_shared { (0, 0) } else { (1, start) };
                    let len = tokens.len();
                    let local = (tokens.start - from) * dim..(tokens.end - from) * dim;
                    matmul(
                        MatrixMut::new(&mut d_values[part][local.clone()], len, dim),
                        Output::Add,
                        1.0,
                        Matrix::strided(&p[at..], rows, len, cols).t(),
                        d_rows,
                        Threads::One,
                    );
                    let ds = Matrix::strided(&ds[at..], rows, len, cols);
                    matmul(
                        MatrixMut::new(&mut d_keys[part][local], len, dim),
                        Output::Add,
                        scale,
                        ds.t(),
                        view(head, queries.clone()),
                        Threads::One,
                    );
                    matmul(
                        MatrixMut::new(d_block, rows, dim),
                        output,
                        scale,
                        ds,
                        view(key_head, tokens),
                        Threads::One,
                    );
                    output = Output::Add;
                }
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
