//! Greedy decoding: prompts in, the tokens that the model finds most probable after them out.
//!
//! Prompts are computed end to end in packs, as for a loss, what all of them begin with once,
//! and each block's keys and values are kept. From then on all sequences that are not at their end advance together, one token each: a row of each through every matrix, which is read once for all of them.
//!
//! The longest prompts come first, and others enter when half of the places are free, so that there are rows enough for the machine
//! until the last prompts run out.

use std::ops::ControlFlow;

use rayon::prelude::*;

use super::decoder::{Decoder, PackError};
use super::head::first_of_largest;
use super::kernels::cached::Cache;
use super::kernels::norm;
use super::pack::{Pack, shared_length};
use super::point::Point;
use super::step::{Step, StepScratch};
use super::stream::stream_matrix;

/// Where continuations end, and what they cost.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Generation {
    /// Tokens of a continuation at most.
    pub max_new_tokens: usize,
    /// Tokens that end a continuation, such as the end-of-sequence token. It holds the one that ended it, as its last.
    pub stop: Vec<u32>,
    /// Sequences that advance together, at least 1. Each needs [`Decoder::cache_bytes`], and 4 bytes for each token of the vocabulary.
    pub at_once: usize,
}

impl Generation {
    /// So many tokens at most, 16 sequences at once, and no token that ends one.
    pub fn of(max_new_tokens: usize) -> Self {
        Self {
            max_new_tokens,
            stop: Vec::new(),
            at_once: 16,
        }
    }
}

/// A prompt and what follows.
#[derive(Debug)]
struct Sequence {
    /// The prompt's place among all.
    index: usize,
    /// The prompt, and what was found so far.
    tokens: Vec<u32>,
    /// How many of them are the prompt.
    prompt: usize,
    /// Of each block, for all tokens but the last; empty before the first pass over them.
    caches: Vec<Cache>,
}

impl Decoder<'_> {
    /// The most probable continuation of each of `prompts`, token by token, with the targets at `point`.
    ///
    /// Of equally probable tokens the first is taken. A prompt is given as it is: no token is put before it.
    ///
    /// The tokens are those that computing the whole sequence anew for each of them would give, but for sums in another order: where
    /// two logits are within some units in the last place, either may be taken. The number of threads changes nothing. Nor do other
    /// prompts, once a prompt itself is computed: that is a pack's forward pass, whose products are summed in an order that depends on
    /// their inner dimension, except of no more than 64 x 64 elements, and in which attention sums what the prompts of the pack begin with apart
    /// from the rest. A sequence that grows beyond the length at which a model takes
    /// other rotary frequencies is computed anew there, since its keys are; transformers does so too, though for all of a batch.
    ///
    /// Every token reads all weights, so that with [`Decoder::releasing`] their pages are given back at the end, not block by block.
    ///
    /// # Errors
    /// [`PackError`] when a prompt is empty, or a token is outside of the vocabulary.
    pub fn generate<'v>(
        &mut self,
        point: impl Into<Point<'v>>,
        prompts: &[Vec<u32>],
        generation: &Generation,
    ) -> Result<Vec<Vec<u32>>, PackError> {
        let mut found = vec![Vec::new(); prompts.len()];
        let mut keep = |index: usize, tokens: &[u32]| {
            found[index] = tokens.to_vec();
            ControlFlow::Continue(())
        };
        // Nothing breaks.
        let _ = self.generate_each(point, prompts, generation, &mut keep)?;
        Ok(found)
    }

    /// As [`Self::generate`], but each continuation is handed to `each` with its prompt's place as soon as it is at its end, so that none is
    /// lost when the work is stopped: it ends where `each` breaks, and says so.
    ///
    /// # Errors
    /// As for [`Self::generate`].
    pub fn generate_each<'v>(
        &mut self,
        point: impl Into<Point<'v>>,
        prompts: &[Vec<u32>],
        generation: &Generation,
        each: &mut (dyn FnMut(usize, &[u32]) -> ControlFlow<()> + Send),
    ) -> Result<ControlFlow<()>, PackError> {
        if let Some(index) = prompts.iter().position(Vec::is_empty) {
            return Err(PackError::EmptyPrompt { index });
        }
        self.check_tokens(prompts.iter().flatten())?;
        let point = point.into();
        // Inside of the pool, where a parallel loop of a few rows does not wait for another thread to wake up.
        let flow = rayon::scope(|_| self.advance_all(point, prompts, generation, each));
        if let Some(checkpoint) = self.released {
            checkpoint.release();
        }
        flow
    }

    /// Bytes that the keys and values of a sequence of `tokens` tokens take, in f32.
    ///
    /// Of a block with a window, no more than twice the window is kept.
    pub fn cache_bytes(&self, tokens: usize) -> usize {
        let config = self.config();
        let width = 2 * config.num_key_value_heads * config.head_dim;
        let kept = config.blocks.iter().map(|block| match block.window {
            Some(window) => tokens.min(window.saturating_mul(2)),
            None => tokens,
        });
        4 * width * kept.sum::<usize>()
    }

    fn advance_all(
        &mut self,
        point: Point<'_>,
        prompts: &[Vec<u32>],
        generation: &Generation,
        each: &mut (dyn FnMut(usize, &[u32]) -> ControlFlow<()> + Send),
    ) -> Result<ControlFlow<()>, PackError> {
        if generation.max_new_tokens == 0 {
            return Ok((0..prompts.len()).try_for_each(|index| each(index, &[])));
        }
        let mut waiting: Vec<usize> = (0..prompts.len()).collect();
        waiting.sort_by_key(|&index| (prompts[index].len(), std::cmp::Reverse(index)));
        let at_once = generation.at_once.max(1);
        let mut scratch = Scratch::default();
        let mut running: Vec<Sequence> = Vec::new();
        loop {
            if running.len() <= at_once / 2 {
                let entering =
                    waiting.split_off(waiting.len().saturating_sub(at_once - running.len()));
                running.extend(entering.into_iter().rev().map(|index| Sequence {
                    index,
                    tokens: prompts[index].clone(),
                    prompt: prompts[index].len(),
                    caches: Vec::new(),
                }));
            }
            if running.is_empty() {
                return Ok(ControlFlow::Continue(()));
            }
            let (mut new, mut known): (Vec<_>, Vec<_>) =
                running.iter_mut().partition(|it| it.caches.is_empty());
            let shared = match self.shares_beginnings() {
                // Each keeps a token of its own.
                true => shared_length(new.iter().map(|it| &it.tokens[..it.tokens.len() - 1])),
                false => 0,
            };
            for pack in packs(&mut new, shared) {
                self.enter(point, pack, shared, &mut scratch)?;
            }
            if !known.is_empty() {
                self.step(point, &mut known, &mut scratch);
            }
            let mut flow = ControlFlow::Continue(());
            running.retain_mut(|sequence| {
                let added = &sequence.tokens[sequence.prompt..];
                let ends = |token| generation.stop.contains(token);
                if added.len() == generation.max_new_tokens || added.last().is_some_and(ends) {
                    if flow.is_continue() {
                        flow = each(sequence.index, added);
                    }
                    return false;
                }
                // Its next pass would be its first with other frequencies.
                let switches = |above| sequence.tokens.len() == above + 1;
                let rotary = &self.config.rotary;
                if rotary
                    .iter()
                    .filter_map(|it| it.switches_above())
                    .any(switches)
                {
                    sequence.caches.clear();
                }
                true
            });
            if flow.is_break() {
                return Ok(flow);
            }
        }
    }

    /// Computes whole sequences, which begin with the same `shared` tokens, keeps their keys and values, and appends a token to each.
    fn enter(
        &mut self,
        point: Point<'_>,
        sequences: &mut [&mut Sequence],
        shared: usize,
        scratch: &mut Scratch,
    ) -> Result<(), PackError> {
        let beginning = sequences.first().map(|it| it.tokens[..shared].to_vec());
        let mut pack = Pack {
            tokens: beginning.unwrap_or_default(),
            starts: vec![shared],
            ..Pack::default()
        };
        for sequence in &*sequences {
            pack.tokens.extend_from_slice(&sequence.tokens[shared..]);
            pack.starts.push(pack.tokens.len());
        }
        let (heads, hidden) = (self.config.heads(), self.config.hidden_size);
        let windows: Vec<_> = self.config.blocks.iter().map(|it| it.window).collect();
        let x = self.visit_heads(point, &pack, |block, rotated| {
            for (sequence, range) in sequences.iter_mut().zip(pack.starts.windows(2)) {
                let mut cache = Cache::default();
                for range in [0..shared, range[0]..range[1]] {
                    cache.extend(rotated, pack.tokens.len(), range, heads, windows[block]);
                }
                sequence.caches.push(cache);
            }
        })?;
        scratch.x.clear();
        for end in &pack.starts[1..] {
            scratch
                .x
                .extend_from_slice(&x[(end - 1) * hidden..end * hidden]);
        }
        self.append_most_probable(sequences, scratch);
        Ok(())
    }

    /// Computes the last token of each sequence, and appends another.
    fn step(&mut self, point: Point<'_>, sequences: &mut [&mut Sequence], scratch: &mut Scratch) {
        let last = sequences.iter().filter_map(|it| it.tokens.last().copied());
        let last: Vec<u32> = last.collect();
        self.embed_into(&last, &mut scratch.x);
        let lengths: Vec<usize> = sequences.iter().map(|it| it.tokens.len()).collect();
        let rotations = &mut self.workspace.rotations;
        for (rotations, frequencies) in rotations.iter_mut().zip(&self.config.rotary) {
            rotations.prepare_last(frequencies, &lengths);
        }
        let blocks = self.weights.blocks.iter().zip(&self.config.blocks);
        for (index, (block, place)) in blocks.enumerate() {
            let mut caches: Vec<&mut Cache> = sequences
                .iter_mut()
                .map(|it| &mut it.caches[index])
                .collect();
            Step {
                config: &self.config,
                block,
                place,
                point,
                rotations: &self.workspace.rotations[place.rotary],
            }
            .forward(&mut scratch.x, &mut caches, &mut scratch.step);
        }
        self.append_most_probable(sequences, scratch);
    }

    /// Appends the most probable token to each sequence, given the last block's output for its last one in `scratch.x`.
    fn append_most_probable(&self, sequences: &mut [&mut Sequence], scratch: &mut Scratch) {
        let Scratch {
            x,
            normed,
            scales,
            logits,
            ..
        } = scratch;
        normed.resize(x.len(), 0.0);
        scales.resize(sequences.len(), 0.0);
        let epsilon = self.config.rms_norm_eps;
        norm::forward(x, &self.weights.final_norm, epsilon, normed, scales);
        let finish = self.config.logits;
        let (head, hidden) = (&self.weights.head, self.config.hidden_size);
        stream_matrix(normed, head, hidden, |x| finish.of(x), logits);
        sequences
            .par_iter_mut()
            .zip(logits.par_chunks_exact(self.config.vocab_size))
            .for_each(|(sequence, logits)| sequence.tokens.push(first_of_largest(logits)));
    }
}

/// Buffers kept from token to token.
#[derive(Debug, Default)]
struct Scratch {
    /// The residual stream, sequences x hidden.
    x: Vec<f32>,
    step: StepScratch,
    normed: Vec<f32>,
    scales: Vec<f32>,
    /// Sequences x vocabulary.
    logits: Vec<f32>,
}

/// Cuts sequences, which begin with the same `shared` tokens, into runs of about [`PACK_TOKENS`] tokens.
fn packs<'p, 's>(
    sequences: &'p mut [&'s mut Sequence],
    shared: usize,
) -> impl Iterator<Item = &'p mut [&'s mut Sequence]> {
    let mut rest = sequences;
    std::iter::from_fn(move || {
        let mut tokens = shared;
        let fits = rest.iter().take_while(|it| {
            tokens += it.tokens.len() - shared;
            tokens <= PACK_TOKENS
        });
        let count = fits.count().max(1).min(rest.len());
        let (pack, left) = std::mem::take(&mut rest).split_at_mut(count);
        rest = left;
        (!pack.is_empty()).then_some(pack)
    })
}

/// Tokens of prompts that are computed together, if there are several: enough to make reading the weights cheap beside the products.
const PACK_TOKENS: usize = 1024;
