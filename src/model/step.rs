//! One block for the next token of each of several sequences, given the keys and values of the tokens before.
//!
//! The function of [`super::block`], one row for each sequence instead of one for each token. Matrices are read where they are stored
//! ([`super::stream`]), and nothing is kept for a backward. Every row is computed by itself, so a sequence gets the same bits whatever
//! is computed beside it; of a mixture, too, since each row of an expert is computed by itself.

use super::block::head_groups;
use super::config::{BlockConfig, Config};
use super::kernels::cached::{self, Cache};
use super::kernels::rope::{self, Rotations};
use super::kernels::{glu, norm};
use super::mixture::{Mixture, Routing};
use super::point::Point;
use super::weights::{Block, FeedForward, GatedLinear};

/// A block and where it is computed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Step<'a> {
    pub(crate) config: &'a Config,
    pub(crate) block: &'a Block<'a>,
    pub(crate) place: &'a BlockConfig,
    pub(crate) point: Point<'a>,
    /// Those of the new tokens.
    pub(crate) rotations: &'a Rotations,
}

/// Buffers that hold nothing between two calls.
#[derive(Debug, Default)]
pub(crate) struct StepScratch {
    narrow: Vec<f32>,
    scales: Vec<f32>,
    kept: Vec<f32>,
    qkv: Vec<f32>,
    heads: Vec<f32>,
    attended: Vec<f32>,
    x2: Vec<f32>,
    gate_up: Vec<f32>,
    wide: Vec<f32>,
    mixture: Mixture,
    routing: Routing,
}

impl Step<'_> {
    /// Turns the rows of `x` (sequences x hidden) into the block's output, and adds the new tokens to `caches`, one for each row.
    pub(crate) fn forward(
        &self,
        x: &mut Vec<f32>,
        caches: &mut [&mut Cache],
        scratch: &mut StepScratch,
    ) {
        self.attend(x, caches, scratch);
        self.feed_forward(x, scratch);
    }

    /// Computes `scratch.x2`.
    fn attend(&self, x: &[f32], caches: &mut [&mut Cache], scratch: &mut StepScratch) {
        let (config, block) = (self.config, self.block);
        let (heads, epsilon) = (config.heads(), config.rms_norm_eps);
        let n = caches.len();
        let StepScratch {
            narrow,
            scales,
            kept,
            qkv,
            heads: rotated,
            attended,
            x2,
            ..
        } = scratch;
        let entering = normalized(x, &block.attention_in, epsilon, narrow, scales);
        block.qkv.stream(entering, self.point, qkv);
        if let Some(weights) = &block.head_norm {
            let groups = head_groups(config, weights);
            let count: usize = groups.iter().map(|it| it.width / it.weight.len()).sum();
            let width: usize = groups.iter().map(|it| it.width).sum();
            kept.resize(n * width, 0.0);
            scales.resize(n * count, 0.0);
            norm::heads_forward(qkv, heads.row(), groups, epsilon, kept, scales);
        }
        rotated.resize(qkv.len(), 0.0);
        rope::forward(qkv, heads, self.rotations, rotated);
        let window = self.place.window;
        for (row, cache) in caches.iter_mut().enumerate() {
            cache.extend(rotated, n, row..row + 1, heads, window);
        }
        attended.resize(n * heads.query * heads.dim, 0.0);
        cached::forward(rotated, caches, window, heads, config.scores, attended);
        match &block.attention_out {
            None => {
                let scale = config.residual_multiplier;
                block.output.stream_onto(x, attended, self.point, scale, x2);
            }
            Some(_) => {
                block.output.stream(attended, self.point, qkv);
                sum_normalized(x, qkv, &block.attention_out, epsilon, narrow, scales, x2);
            }
        }
    }

    /// Computes `out` from `scratch.x2`.
    fn feed_forward(&self, out: &mut Vec<f32>, scratch: &mut StepScratch) {
        let (config, block) = (self.config, self.block);
        let epsilon = config.rms_norm_eps;
        let StepScratch {
            narrow,
            scales,
            qkv: rows,
            x2,
            gate_up,
            wide,
            mixture,
            routing,
            ..
        } = scratch;
        let entering = normalized(x2, &block.feed_forward_in, epsilon, narrow, scales);
        match &block.feed_forward {
            FeedForward::Dense(gated) => {
                gated.stream(config, entering, self.point, gate_up, wide);
                match &block.feed_forward_out {
                    None => {
                        let scale = config.residual_multiplier;
                        gated.down.stream_onto(x2, wide, self.point, scale, out);
                    }
                    Some(_) => {
                        gated.down.stream(wide, self.point, rows);
                        let weight = &block.feed_forward_out;
                        sum_normalized(x2, rows, weight, epsilon, narrow, scales, out);
                    }
                }
            }
            FeedForward::Mixture { router, experts } => {
                // No family has experts and a norm behind them.
                out.clone_from(x2);
                mixture.stream(
                    config,
                    (router, experts),
                    self.point,
                    entering,
                    routing,
                    out,
                );
            }
        }
    }
}

impl GatedLinear<'_> {
    /// `wide = act(gate(x)) * up(x)`, for a few rows.
    pub(crate) fn stream(
        &self,
        config: &Config,
        x: &[f32],
        point: Point<'_>,
        gate_up: &mut Vec<f32>,
        wide: &mut Vec<f32>,
    ) {
        self.gate_up.stream(x, point, gate_up);
        wide.resize(gate_up.len() / 2, 0.0);
        glu::forward(config.activation, gate_up, wide, self.down.inputs);
    }
}

/// The rows of `x` behind a norm, if there is one.
fn normalized<'b>(
    x: &'b [f32],
    weight: &Option<Vec<f32>>,
    epsilon: f32,
    out: &'b mut Vec<f32>,
    scales: &mut Vec<f32>,
) -> &'b [f32] {
    let Some(weight) = weight else {
        return x;
    };
    out.resize(x.len(), 0.0);
    scales.resize(x.len() / weight.len(), 0.0);
    norm::forward(x, weight, epsilon, out, scales);
    out
}

/// `out` is `residual` and the rows of `x` behind a norm.
fn sum_normalized(
    residual: &[f32],
    x: &[f32],
    weight: &Option<Vec<f32>>,
    epsilon: f32,
    narrow: &mut Vec<f32>,
    scales: &mut Vec<f32>,
    out: &mut Vec<f32>,
) {
    let more = normalized(x, weight, epsilon, narrow, scales);
    out.clear();
    out.extend(residual.iter().zip(more).map(|(x, y)| x + y));
}
