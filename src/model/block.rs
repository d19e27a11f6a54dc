//! One decoder block: forward, and the backward derived from it by hand.
//!
//! ```text
//! x2  = x  + out_norm(o_proj(attention(rope(head_norm(qkv_proj(in_norm(x)))))))
//! out = x2 + out_norm(feed_forward(in_norm(x2)))        feed_forward: down_proj(glu(gate_up_proj(y))), or experts
//! ```
//!
//! Each norm is there or not, by family. All activations are tokens x width, row-major, f32. The forward keeps what the backward reads
//! and nothing else; normalized inputs and the gated products are made again, since that costs no matrix product.

use super::config::{BlockConfig, Config};
use super::kernels::attention::{self, Kept, Pattern};
use super::kernels::norm::Groups;
use super::kernels::rope::{self, Rotations};
use super::kernels::{glu, norm};
use super::linear::{Gradients, add_scaled, copy};
use super::mixture::{Mixture, Routing};
use super::point::Point;
use super::tensors::TargetTensors;
use super::weights::{Block, BlockMatrices, FeedForward, GatedLinear};

/// What the backward of a block reads, besides its input.
#[derive(Debug, Default)]
pub(crate) struct Saved {
    attention_in_scales: Vec<f32>,
    /// Queries and keys before their norms; empty without.
    before_head_norm: Vec<f32>,
    head_scales: Vec<f32>,
    heads: Vec<f32>,
    attended: Vec<f32>,
    lse: Vec<f32>,
    attention_out: Branch,
    x2: Vec<f32>,
    feed_forward_in_scales: Vec<f32>,
    gate_up: Vec<f32>,
    routing: Routing,
    feed_forward_out: Branch,
}

/// What goes into a norm before the residual stream, with the scale of each row; empty where there is no norm.
#[derive(Debug, Default)]
struct Branch {
    rows: Vec<f32>,
    scales: Vec<f32>,
}

impl Saved {
    /// Query, key and value heads, rotated, as attention read them: heads x tokens x dim.
    pub(crate) fn heads(&self) -> &[f32] {
        &self.heads
    }

    /// Floats kept for each token of a block.
    pub(crate) fn floats_per_token(config: &Config, place: &BlockConfig) -> usize {
        let heads = config.heads();
        let normed = heads.row() - heads.key_value * heads.dim;
        let (head_norm, branches) = (config.head_norm.is_some(), config.has_out_norms());
        let experts = config.experts.filter(|_| place.is_mixture);
        2 + heads.row()
            + usize::from(head_norm) * (normed + heads.query + heads.key_value)
            + heads.query * (heads.dim + 1)
            + config.hidden_size
            + usize::from(branches) * 2 * (config.hidden_size + 1)
            + experts.map_or(1, |it| it.per_token) * 2 * place.width
            + experts.map_or(0, |it| it.count + 4 * it.per_token)
    }
}

/// Buffers that hold nothing between two calls.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    narrow: Vec<f32>,
    branch: Vec<f32>,
    qkv: Vec<f32>,
    d_heads: Vec<f32>,
    attended: Vec<f32>,
    wide: Vec<f32>,
    mixture: Mixture,
}

/// Which tokens are computed, and how they see each other.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tokens<'a> {
    pub(crate) pattern: Pattern<'a>,
    pub(crate) rotations: &'a Rotations,
}

/// How far down a block's backward has to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Below {
    /// There are targets in blocks below: the gradient with respect to the input is needed.
    Targets,
    /// There are none: the backward ends at this block's last target.
    Nothing,
}

/// A block with its f32 matrices at hand.
#[derive(Debug)]
pub(crate) struct Layer<'a> {
    pub(crate) config: &'a Config,
    pub(crate) block: &'a Block<'a>,
    pub(crate) tokens: Tokens<'a>,
    /// Where the targets are.
    pub(crate) point: Point<'a>,
    /// As [`BlockMatrices::load`] left them for this block.
    pub(crate) matrices: &'a mut BlockMatrices,
}

impl Layer<'_> {
    /// Computes `out` from `x`, both tokens x hidden.
    pub(crate) fn forward(
        &mut self,
        x: &[f32],
        saved: &mut Saved,
        scratch: &mut Scratch,
        out: &mut Vec<f32>,
    ) {
        self.attention_forward(x, saved, scratch);
        self.feed_forward_forward(saved, scratch, out);
    }

    /// Turns `d`, the gradient with respect to the output, into the one with respect to the input `x`, and adds to
    /// `targets` that of this block's. `saved` is used up. Where `below` is [`Below::Nothing`], `d` is left unfinished.
    pub(crate) fn backward(
        &mut self,
        x: &[f32],
        saved: &mut Saved,
        below: Below,
        scratch: &mut Scratch,
        d: &mut [f32],
        targets: &mut TargetTensors,
    ) {
        let mut gradients = Gradients {
            point: self.point,
            targets,
        };
        let block = self.block;
        let attention = block.qkv.has_targets() || block.output.has_targets();
        let further = attention || below == Below::Targets;
        if further || block.feed_forward.has_targets() {
            self.feed_forward_backward(saved, further, scratch, d, &mut gradients);
        }
        if further {
            self.attention_backward(x, saved, below, scratch, d, &mut gradients);
        }
    }

    /// Computes `saved.x2`.
    fn attention_forward(&mut self, x: &[f32], saved: &mut Saved, scratch: &mut Scratch) {
        let (config, block, tokens) = (self.config, self.block, self.tokens);
        let matrices = &*self.matrices;
        let (heads, epsilon) = (config.heads(), config.rms_norm_eps);
        let n = tokens.pattern.tokens();
        let Scratch {
            narrow,
            branch,
            qkv,
            ..
        } = scratch;
        let entering = match &block.attention_in {
            None => x,
            Some(weight) => {
                narrow.resize(x.len(), 0.0);
                saved.attention_in_scales.resize(n, 0.0);
                norm::forward(x, weight, epsilon, narrow, &mut saved.attention_in_scales);
                narrow
            }
        };
        block.qkv.forward(entering, &matrices.qkv, qkv);
        if let Some(weights) = &block.head_norm {
            let groups = head_groups(config, weights);
            let count: usize = groups.iter().map(|it| it.width / it.weight.len()).sum();
            let width: usize = groups.iter().map(|it| it.width).sum();
            saved.before_head_norm.resize(n * width, 0.0);
            saved.head_scales.resize(n * count, 0.0);
            norm::heads_forward(
                qkv,
                heads.row(),
                groups,
                epsilon,
                &mut saved.before_head_norm,
                &mut saved.head_scales,
            );
        }
        saved.heads.resize(qkv.len(), 0.0);
        rope::forward(qkv, heads, tokens.rotations, &mut saved.heads);
        saved.attended.resize(n * heads.query * heads.dim, 0.0);
        saved.lse.resize(n * heads.query, 0.0);
        attention::forward(
            &saved.heads,
            tokens.pattern,
            heads,
            config.scores,
            &mut saved.attended,
            &mut saved.lse,
        );
        match &block.attention_out {
            None => block.output.forward_onto(
                x,
                &saved.attended,
                &matrices.output,
                config.residual_multiplier,
                &mut saved.x2,
            ),
            Some(weight) => {
                let Branch { rows, scales } = &mut saved.attention_out;
                block
                    .output
                    .forward(&saved.attended, &matrices.output, rows);
                branch.resize(rows.len(), 0.0);
                scales.resize(n, 0.0);
                norm::forward(rows, weight, epsilon, branch, scales);
                saved.x2.resize(x.len(), 0.0);
                copy(x, &mut saved.x2);
                add_scaled(1.0, branch, &mut saved.x2);
            }
        }
    }

    /// Computes `out` from `saved.x2`.
    fn feed_forward_forward(
        &mut self,
        saved: &mut Saved,
        scratch: &mut Scratch,
        out: &mut Vec<f32>,
    ) {
        let (config, block) = (self.config, self.block);
        let (n, epsilon) = (self.tokens.pattern.tokens(), config.rms_norm_eps);
        let Scratch {
            narrow,
            branch,
            wide,
            mixture,
            ..
        } = scratch;
        let entering = match &block.feed_forward_in {
            None => &saved.x2,
            Some(weight) => {
                narrow.resize(saved.x2.len(), 0.0);
                saved.feed_forward_in_scales.resize(n, 0.0);
                let scales = &mut saved.feed_forward_in_scales;
                norm::forward(&saved.x2, weight, epsilon, narrow, scales);
                narrow
            }
        };
        match &block.feed_forward {
            FeedForward::Dense(GatedLinear { gate_up, down }) => {
                gate_up.forward(entering, &self.matrices.gate_up, &mut saved.gate_up);
                wide.resize(n * down.inputs, 0.0);
                glu::forward(config.activation, &saved.gate_up, wide, down.inputs);
                match &block.feed_forward_out {
                    None => down.forward_onto(
                        &saved.x2,
                        wide,
                        &self.matrices.down,
                        config.residual_multiplier,
                        out,
                    ),
                    Some(_) => {
                        let rows = &mut saved.feed_forward_out.rows;
                        down.forward(wide, &self.matrices.down, rows);
                    }
                }
            }
            FeedForward::Mixture { experts, .. } => {
                // No family has experts and a norm behind them.
                out.clear();
                out.extend_from_slice(&saved.x2);
                mixture.forward(
                    config,
                    experts,
                    self.point,
                    self.matrices,
                    entering,
                    &mut saved.routing,
                    &mut saved.gate_up,
                    out,
                );
            }
        }
        if let Some(weight) = &block.feed_forward_out {
            let Branch { rows, scales } = &mut saved.feed_forward_out;
            branch.resize(rows.len(), 0.0);
            scales.resize(n, 0.0);
            norm::forward(rows, weight, epsilon, branch, scales);
            out.resize(branch.len(), 0.0);
            copy(&saved.x2, out);
            add_scaled(1.0, branch, out);
        }
    }

    /// Turns `d` into the gradient with respect to `saved.x2`, if that is `further` needed.
    fn feed_forward_backward(
        &mut self,
        saved: &mut Saved,
        further: bool,
        scratch: &mut Scratch,
        d: &mut [f32],
        gradients: &mut Gradients<'_>,
    ) {
        let (config, block) = (self.config, self.block);
        let Scratch {
            narrow,
            branch,
            wide,
            mixture,
            ..
        } = scratch;
        let (branch, scale) = before_norm(
            &block.feed_forward_out,
            &saved.feed_forward_out,
            config,
            d,
            branch,
        );
        // What entered the layer, where anybody reads it.
        let entering = |narrow: &mut Vec<f32>| match &block.feed_forward_in {
            None => narrow.clone_from(&saved.x2),
            Some(weight) => {
                narrow.resize(saved.x2.len(), 0.0);
                let scales = &saved.feed_forward_in_scales;
                norm::again(&saved.x2, weight, scales, narrow);
            }
        };
        match &block.feed_forward {
            FeedForward::Dense(GatedLinear { gate_up, down }) => {
                let width = down.inputs;
                if down.has_targets() {
                    wide.resize(saved.gate_up.len() / 2, 0.0);
                    glu::forward(config.activation, &saved.gate_up, wide, width);
                    down.add_gradients(branch, wide, scale, gradients);
                }
                if !further && !gate_up.has_targets() {
                    return;
                }
                down.backward(branch, &self.matrices.down, scale, wide);
                glu::backward(config.activation, wide, &mut saved.gate_up, width);
                if gate_up.has_targets() {
                    entering(narrow);
                    gate_up.add_gradients(&saved.gate_up, narrow, 1.0, gradients);
                }
                if !further {
                    return;
                }
                gate_up.backward(&saved.gate_up, &self.matrices.gate_up, 1.0, narrow);
            }
            FeedForward::Mixture { experts, .. } => {
                entering(narrow);
                mixture.backward(
                    config,
                    experts,
                    self.matrices,
                    branch,
                    &saved.routing,
                    &mut saved.gate_up,
                    narrow,
                    gradients,
                );
            }
        }
        match &block.feed_forward_in {
            None => add_scaled(1.0, narrow, d),
            Some(weight) => {
                norm::backward(narrow, &saved.x2, weight, &saved.feed_forward_in_scales, d);
            }
        }
    }

    /// Turns `d`, the gradient with respect to `saved.x2`, into that with respect to `x`, if targets below need it.
    fn attention_backward(
        &mut self,
        x: &[f32],
        saved: &mut Saved,
        below: Below,
        scratch: &mut Scratch,
        d: &mut [f32],
        gradients: &mut Gradients<'_>,
    ) {
        let (config, block, tokens) = (self.config, self.block, self.tokens);
        let matrices = &*self.matrices;
        let heads = config.heads();
        let Scratch {
            narrow,
            branch,
            qkv,
            d_heads,
            attended,
            ..
        } = scratch;
        let (branch, scale) = before_norm(
            &block.attention_out,
            &saved.attention_out,
            config,
            d,
            branch,
        );
        if block.output.has_targets() {
            block
                .output
                .add_gradients(branch, &saved.attended, scale, gradients);
        }
        if below == Below::Nothing && !block.qkv.has_targets() {
            return;
        }
        block
            .output
            .backward(branch, &matrices.output, scale, attended);
        let kept = Kept {
            heads_in: &saved.heads,
            attended: &saved.attended,
            lse: &saved.lse,
        };
        d_heads.resize(saved.heads.len(), 0.0);
        attention::backward(
            attended,
            kept,
            tokens.pattern,
            heads,
            config.scores,
            d_heads,
        );
        qkv.resize(saved.heads.len(), 0.0);
        rope::backward(d_heads, heads, tokens.rotations, qkv);
        if let Some(weights) = &block.head_norm {
            norm::heads_backward(
                qkv,
                heads.row(),
                head_groups(config, weights),
                &saved.before_head_norm,
                &saved.head_scales,
            );
        }
        if block.qkv.has_targets() {
            let entered = match &block.attention_in {
                None => x,
                Some(weight) => {
                    narrow.resize(x.len(), 0.0);
                    norm::again(x, weight, &saved.attention_in_scales, narrow);
                    &*narrow
                }
            };
            block.qkv.add_gradients(qkv, entered, 1.0, gradients);
        }
        if below == Below::Nothing {
            return;
        }
        block.qkv.backward(qkv, &matrices.qkv, 1.0, narrow);
        match &block.attention_in {
            None => add_scaled(1.0, narrow, d),
            Some(weight) => norm::backward(narrow, x, weight, &saved.attention_in_scales, d),
        }
    }
}

/// The gradient with respect to what came out of a layer, before the norm if there is one, given `d`, that with respect to the
/// residual stream behind it; and the factor that is still to be put on it.
fn before_norm<'d>(
    weight: &Option<Vec<f32>>,
    kept: &Branch,
    config: &Config,
    d: &'d [f32],
    buffer: &'d mut Vec<f32>,
) -> (&'d [f32], f32) {
    match weight {
        None => (d, config.residual_multiplier),
        Some(weight) => {
            buffer.clear();
            buffer.resize(d.len(), 0.0);
            norm::backward(d, &kept.rows, weight, &kept.scales, buffer);
            (buffer, 1.0)
        }
    }
}

/// The query and key heads of a row, with the weights of their norms.
pub(super) fn head_groups<'w>(config: &Config, [query, key]: &'w [Vec<f32>; 2]) -> [Groups<'w>; 2] {
    let heads = config.heads();
    [
        Groups {
            width: heads.query * heads.dim,
            weight: query,
        },
        Groups {
            width: heads.key_value * heads.dim,
            weight: key,
        },
    ]
}
