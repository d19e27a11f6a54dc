//! Attention of one new token of each sequence over the tokens before it, whose keys and values are kept.
//!
//! The same function as [`super::attention`]: softmax(scale q k^T) v, windowed or soft-capped. Each sequence is computed by itself, in an
//! order that depends on its own length alone.

use std::ops::Range;

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::attention::{Scores, soft_cap, softmax};
use super::dots::dots;
use super::rope::Heads;

/// The keys, already rotated, and values of one sequence in one block: tokens x (key heads x dim) each.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cache {
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl Cache {
    /// Appends the keys and values of the tokens `range`, the next ones of this sequence, out of `heads_in`, which is (query + 2
    /// key_value heads) x `tokens` x dim. With a `window`, what no token to come will see may be left out or given up.
    pub(crate) fn extend(
        &mut self,
        heads_in: &[f32],
        tokens: usize,
        range: Range<usize>,
        heads: Heads,
        window: Option<usize>,
    ) {
        let width = heads.key_value * heads.dim;
        let most = window.unwrap_or(usize::MAX);
        let range = range.start.max(range.end.saturating_sub(most))..range.end;
        let more = range.len() * width;
        let is_full = self.keys.len() + more > self.keys.capacity();
        // Whole windows at a time, so that a token costs one move.
        let of_no_use = match window {
            Some(window) if is_full && self.keys.len() >= 2 * window * width => {
                self.keys.len() - window * width
            }
            _ => 0,
        };
        for (kept, first_head) in [
            (&mut self.keys, heads.query),
            (&mut self.values, heads.query + heads.key_value),
        ] {
            kept.drain(..of_no_use);
            if kept.len() + more > kept.capacity() {
                kept.reserve_exact(more.next_multiple_of(ROOM * width));
            }
            for token in range.clone() {
                for head in first_head..first_head + heads.key_value {
                    let at = (head * tokens + token) * heads.dim;
                    kept.extend_from_slice(&heads_in[at..at + heads.dim]);
                }
            }
        }
    }
}

/// Tokens that room is made for at once.
const ROOM: usize = 64;

/// Attends: `heads_in` is (query + 2 key_value heads) x sequences x dim, the last token of each sequence, which is already in its cache;
/// `attended` is sequences x (query heads x dim).
pub(crate) fn forward(
    heads_in: &[f32],
    caches: &[&mut Cache],
    window: Option<usize>,
    heads: Heads,
    scores_of: Scores,
    attended: &mut [f32],
) {
    let (dim, width) = (heads.dim, heads.key_value * heads.dim);
    attended
        .par_chunks_exact_mut(dim)
        .enumerate()
        .for_each_init(Vec::new, |scores, (index, out)| {
            let (sequence, head) = (index / heads.query, index % heads.query);
            let shared = head / (heads.query / heads.key_value) * dim;
            let Cache { keys, values } = &*caches[sequence];
            let seen = (keys.len() / width).min(window.unwrap_or(usize::MAX));
            let seen = keys.len() - seen * width;
            let last = Last {
                query: &heads_in[(head * caches.len() + sequence) * dim..][..dim],
                keys: &keys[seen..],
                values: &values[seen..],
                width,
                first: shared,
                scores_of,
                scores,
                out,
            };
            pulp::Arch::new().dispatch(last);
        });
}

/// One head of one token.
struct Last<'a> {
    query: &'a [f32],
    /// All that is seen, tokens x `width`.
    keys: &'a [f32],
    values: &'a [f32],
    width: usize,
    /// Where in a row the head begins.
    first: usize,
    scores_of: Scores,
    /// A buffer.
    scores: &'a mut Vec<f32>,
    out: &'a mut [f32],
}

impl WithSimd for Last<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self {
            query,
            keys,
            values,
            width,
            first,
            scores_of,
            scores,
            out,
        } = self;
        scores.clear();
        for keys in keys.chunks(4 * width) {
            let key = |i: usize| &keys[i * width + first..][..query.len()];
            if keys.len() == 4 * width {
                let four = dots(simd, [key(0), key(1), key(2), key(3)], [query]);
                scores.extend(four.map(|[score]| score));
            } else {
                let rest = 0..keys.len() / width;
                scores.extend(rest.map(|i| dots(simd, [key(i)], [query])[0][0]));
            }
        }
        scores
            .iter_mut()
            .for_each(|score| *score *= scores_of.scale);
        if let Some(cap) = scores_of.softcap {
            soft_cap(scores, cap);
        }
        let all = 0..scores.len();
        softmax(scores, all);
        out.fill(0.0);
        for (p, value) in scores.iter().zip(values.chunks_exact(width)) {
            let value = &value[first..first + out.len()];
            out.iter_mut().zip(value).for_each(|(out, v)| *out += p * v);
        }
    }
}
