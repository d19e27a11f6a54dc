//! One decoder block on a device: forward, and the backward derived from it by hand.
//!
//! The function of [`crate::model::block`]. The residual stream and its gradient are f32; what enters a matrix product, and what is kept
//! for the backward, is in the device's precision. Norms, rotations, gates and attention are f32 in between.

use candle_core::{DType, Result, Tensor};

use super::attention::{Attention, Stretch};
use super::linear::{PlacedLinear, Sink, gradients};
use super::mixture::{self, Mixture, PlacedGated};
use super::place::Device;
use super::rope::{self, Angles, HeadTensors};
use super::{glu, norm};
use crate::model::config::Config;
use crate::model::linear::Linear;
use crate::model::point::Point;
use crate::model::weights::{Block, FeedForward};

/// The tensors of one block on a device. Weights of norms are f32.
#[derive(Debug)]
pub(super) struct PlacedBlock {
    qkv: PlacedLinear,
    output: PlacedLinear,
    feed_forward: PlacedFeedForward,
    attention_in: Option<Tensor>,
    /// Of query and key heads.
    head_norm: Option<[Tensor; 2]>,
    attention_out: Option<Tensor>,
    feed_forward_in: Option<Tensor>,
    feed_forward_out: Option<Tensor>,
}

#[derive(Debug)]
enum PlacedFeedForward {
    Dense(PlacedGated),
    Mixture {
        /// Experts x hidden, f32.
        router: Tensor,
        experts: Vec<PlacedGated>,
    },
}

impl PlacedBlock {
    /// Copies `block` to `device`.
    pub(super) fn upload(block: &Block<'_>, config: &Config, device: &Device) -> Result<Self> {
        let linear = |linear: &Linear<'_>| PlacedLinear::upload(linear, device);
        let norm = |weight: &Option<Vec<f32>>| {
            let weight = weight.as_ref();
            weight
                .map(|weight| device.upload(weight, &[weight.len()]))
                .transpose()
        };
        let head_norm = match &block.head_norm {
            None => None,
            Some([query, key]) => Some([
                device.upload(query, &[query.len()])?,
                device.upload(key, &[key.len()])?,
            ]),
        };
        let feed_forward = match &block.feed_forward {
            FeedForward::Dense(gated) => PlacedFeedForward::Dense(PlacedGated {
                gate_up: linear(&gated.gate_up)?,
                down: linear(&gated.down)?,
            }),
            FeedForward::Mixture { router, experts } => {
                let mut values = vec![0.0; router.elements()];
                crate::model::linear::widen(router, 0, &mut values);
                let shape = [experts.len(), config.hidden_size];
                let gated = experts.iter().map(|gated| {
                    Ok(PlacedGated {
                        gate_up: linear(&gated.gate_up)?,
                        down: linear(&gated.down)?,
                    })
                });
                PlacedFeedForward::Mixture {
                    router: device.upload(&values, &shape)?,
                    experts: gated.collect::<Result<_>>()?,
                }
            }
        };
        Ok(Self {
            qkv: linear(&block.qkv)?,
            output: linear(&block.output)?,
            feed_forward,
            attention_in: norm(&block.attention_in)?,
            head_norm,
            attention_out: norm(&block.attention_out)?,
            feed_forward_in: norm(&block.feed_forward_in)?,
            feed_forward_out: norm(&block.feed_forward_out)?,
        })
    }

    /// Makes it compute with its targets at `point`.
    pub(super) fn place(
        &mut self,
        block: &Block<'_>,
        point: Point<'_>,
        device: &Device,
    ) -> Result<()> {
        self.qkv.place(&block.qkv, point, device)?;
        self.output.place(&block.output, point, device)?;
        let (placed, gated) = match (&mut self.feed_forward, &block.feed_forward) {
            (PlacedFeedForward::Dense(placed), FeedForward::Dense(gated)) => {
                (std::slice::from_mut(placed), std::slice::from_ref(gated))
            }
            (
                PlacedFeedForward::Mixture { experts, .. },
                FeedForward::Mixture { experts: gated, .. },
            ) => (&mut experts[..], &gated[..]),
            _ => unreachable!("the block was copied from this one"),
        };
        for (placed, gated) in placed.iter_mut().zip(gated) {
            placed.gate_up.place(&gated.gate_up, point, device)?;
            placed.down.place(&gated.down, point, device)?;
        }
        Ok(())
    }
}

/// What the backward of a block reads, besides its input. Matrices are in the device's precision, scales f32.
#[derive(Debug)]
pub(super) struct Kept {
    attention_in_scale: Option<Tensor>,
    /// Queries and keys before their norms, as groups x width, with the groups' scales.
    head_norm: Option<[(Tensor, Tensor); 2]>,
    heads: HeadTensors,
    /// Tokens x (query heads x dim).
    attended: Tensor,
    attention_out: Option<(Tensor, Tensor)>,
    /// Tokens x hidden, f32.
    x2: Tensor,
    feed_forward_in_scale: Option<Tensor>,
    feed_forward: KeptFeedForward,
    feed_forward_out: Option<(Tensor, Tensor)>,
}

#[derive(Debug)]
enum KeptFeedForward {
    /// What the first matrices gave, tokens x 2 width.
    Dense(Tensor),
    Mixture(mixture::Kept),
}

/// How far down a block's backward has to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Below {
    Targets,
    Nothing,
}

/// A block with what it is computed from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layer<'a> {
    pub(super) config: &'a Config,
    pub(super) block: &'a Block<'a>,
    pub(super) placed: &'a PlacedBlock,
    pub(super) device: &'a Device,
    pub(super) angles: &'a Angles,
    pub(super) stretches: &'a [Stretch],
    pub(super) point: Point<'a>,
}

impl Layer<'_> {
    /// The output for `x`, both tokens x hidden, f32.
    pub(super) fn forward(self, x: &Tensor) -> Result<(Tensor, Kept)> {
        let (config, placed) = (self.config, self.placed);
        let epsilon = config.rms_norm_eps;
        let (entering, attention_in_scale) =
            normalized(x, &placed.attention_in, epsilon, self.device)?;
        let mut qkv = placed.qkv.forward(&self.rounded(&entering)?)?;
        let mut head_norm = None;
        if let Some(weights) = &placed.head_norm {
            let [query, key, value] = self.parts(&qkv)?;
            let one = |x: &Tensor, weight: &Tensor| {
                let groups = x.reshape(((), weight.dim(0)?))?;
                let (y, scale) = norm::forward(&groups, weight, epsilon, self.device)?;
                Ok::<_, candle_core::Error>((
                    y.reshape(x.shape())?,
                    (self.rounded(&groups)?, scale),
                ))
            };
            let (query, of_query) = one(&query, &weights[0])?;
            let (key, of_key) = one(&key, &weights[1])?;
            qkv = Tensor::cat(&[query, key, value], 1)?;
            head_norm = Some([of_query, of_key]);
        }
        let heads = rope::forward(&qkv, config.heads(), self.angles)?;
        let heads = HeadTensors {
            query: self.rounded(&heads.query)?,
            key: self.rounded(&heads.key)?,
            value: self.rounded(&heads.value)?,
        };
        let attended = self.rounded(&self.attention().forward(&heads)?)?;
        let branch = placed.output.forward(&attended)?;
        let (x2, attention_out) = self.joined(x, branch, &placed.attention_out)?;
        let (entering, feed_forward_in_scale) =
            normalized(&x2, &placed.feed_forward_in, epsilon, self.device)?;
        let (out, feed_forward, feed_forward_out) = match &placed.feed_forward {
            PlacedFeedForward::Dense(PlacedGated { gate_up, down }) => {
                let gate_up = gate_up.forward(&self.rounded(&entering)?)?;
                let wide = glu::forward(config.activation, &gate_up, self.device)?;
                let branch = down.forward(&self.rounded(&wide)?)?;
                let (out, kept) = self.joined(&x2, branch, &placed.feed_forward_out)?;
                let gate_up = KeptFeedForward::Dense(self.rounded(&gate_up)?);
                (out, gate_up, kept)
            }
            // No family has experts and a norm behind them.
            PlacedFeedForward::Mixture { router, experts } => {
                let mixture = self.mixture(router, experts);
                let (out, kept) = mixture.forward(&entering, x2.clone())?;
                (out, KeptFeedForward::Mixture(kept), None)
            }
        };
        let kept = Kept {
            attention_in_scale,
            head_norm,
            heads,
            attended,
            attention_out,
            x2,
            feed_forward_in_scale,
            feed_forward,
            feed_forward_out,
        };
        Ok((out, kept))
    }

    /// The gradient with respect to the input `x`, given `d`, that with respect to the output, where `below` needs it. Hands the gradients
    /// of this block's targets to `sink`.
    pub(super) fn backward(
        self,
        x: &Tensor,
        kept: &Kept,
        below: Below,
        d: Tensor,
        sink: Sink<'_>,
    ) -> Result<Option<Tensor>> {
        let block = self.block;
        let attention = block.qkv.has_targets() || block.output.has_targets();
        let further = attention || below == Below::Targets;
        let d = match further || block.feed_forward.has_targets() {
            true => self.feed_forward_backward(kept, further, d, sink)?,
            false => Some(d),
        };
        match d {
            Some(d) if further => self.attention_backward(x, kept, below, d, sink),
            _ => Ok(None),
        }
    }

    /// The gradient with respect to `kept.x2`, if that is `further` needed.
    fn feed_forward_backward(
        self,
        kept: &Kept,
        further: bool,
        d: Tensor,
        sink: Sink<'_>,
    ) -> Result<Option<Tensor>> {
        let (config, block, placed) = (self.config, self.block, self.placed);
        let weight = &placed.feed_forward_in;
        let entering = || match (weight, &kept.feed_forward_in_scale) {
            (Some(weight), Some(scale)) => norm::again(&kept.x2, weight, scale),
            _ => Ok(kept.x2.clone()),
        };
        let d_entering = match (
            &placed.feed_forward,
            &block.feed_forward,
            &kept.feed_forward,
        ) {
            (
                PlacedFeedForward::Mixture { router, experts },
                FeedForward::Mixture { .. },
                KeptFeedForward::Mixture(kept),
            ) => {
                let mixture = self.mixture(router, experts);
                mixture.backward(&d, &entering()?, kept, self.point, sink)?
            }
            (
                PlacedFeedForward::Dense(placed),
                FeedForward::Dense(gated),
                KeptFeedForward::Dense(gate_up),
            ) => {
                let weight = &self.placed.feed_forward_out;
                let branch = self.before_norm(&d, weight, &kept.feed_forward_out)?;
                let branch = self.rounded(&branch)?;
                let gate_up = gate_up.to_dtype(DType::F32)?;
                if gated.down.has_targets() {
                    let wide =
                        self.rounded(&glu::forward(config.activation, &gate_up, self.device)?)?;
                    self.gradients(&gated.down, &branch, &wide, sink)?;
                }
                if !further && !gated.gate_up.has_targets() {
                    return Ok(None);
                }
                let d_wide = placed.down.backward(&branch)?;
                let d_gate_up = glu::backward(config.activation, &d_wide, &gate_up, self.device)?;
                let d_gate_up = self.rounded(&d_gate_up)?;
                if gated.gate_up.has_targets() {
                    let entered = self.rounded(&entering()?)?;
                    self.gradients(&gated.gate_up, &d_gate_up, &entered, sink)?;
                }
                if !further {
                    return Ok(None);
                }
                placed.gate_up.backward(&d_gate_up)?
            }
            _ => unreachable!("the block was copied from this one, and kept by it"),
        };
        let scale = &kept.feed_forward_in_scale;
        Ok(Some(
            (d + through_norm(d_entering, &kept.x2, weight, scale, self.device)?)?,
        ))
    }

    /// Given `d`, the gradient with respect to `kept.x2`, that with respect to `x`, if targets below need it.
    fn attention_backward(
        self,
        x: &Tensor,
        kept: &Kept,
        below: Below,
        d: Tensor,
        sink: Sink<'_>,
    ) -> Result<Option<Tensor>> {
        let (config, block, placed) = (self.config, self.block, self.placed);
        let branch = self.before_norm(&d, &placed.attention_out, &kept.attention_out)?;
        let branch = self.rounded(&branch)?;
        if block.output.has_targets() {
            self.gradients(&block.output, &branch, &kept.attended, sink)?;
        }
        if below == Below::Nothing && !block.qkv.has_targets() {
            return Ok(None);
        }
        let d_attended = placed.output.backward(&branch)?;
        let d_heads = self.attention().backward(&d_attended, &kept.heads)?;
        let mut d_qkv = rope::backward(&d_heads, config.heads(), self.angles)?;
        if let (Some(weights), Some(norms)) = (&placed.head_norm, &kept.head_norm) {
            let [query, key, value] = self.parts(&d_qkv)?;
            let one = |d: &Tensor, weight: &Tensor, (groups, scale): &(Tensor, Tensor)| {
                let groups = groups.to_dtype(DType::F32)?;
                let d_groups = d.reshape(groups.shape())?;
                norm::backward(&d_groups, &groups, weight, scale, self.device)?.reshape(d.shape())
            };
            let query = one(&query, &weights[0], &norms[0])?;
            let key = one(&key, &weights[1], &norms[1])?;
            d_qkv = Tensor::cat(&[query, key, value], 1)?;
        }
        let d_qkv = self.rounded(&d_qkv)?;
        if block.qkv.has_targets() {
            let entered = match (&placed.attention_in, &kept.attention_in_scale) {
                (Some(weight), Some(scale)) => norm::again(x, weight, scale)?,
                _ => x.clone(),
            };
            self.gradients(&block.qkv, &d_qkv, &self.rounded(&entered)?, sink)?;
        }
        if below == Below::Nothing {
            return Ok(None);
        }
        let d_entering = placed.qkv.backward(&d_qkv)?;
        let scale = &kept.attention_in_scale;
        Ok(Some(
            (d + through_norm(d_entering, x, &placed.attention_in, scale, self.device)?)?,
        ))
    }

    /// `x` and a layer's `branch`, behind its norm if there is one, together; with what the norm's backward reads.
    fn joined(
        self,
        x: &Tensor,
        branch: Tensor,
        weight: &Option<Tensor>,
    ) -> Result<(Tensor, Option<(Tensor, Tensor)>)> {
        let Some(weight) = weight else {
            let branch = branch.affine(f64::from(self.config.residual_multiplier), 0.0)?;
            return Ok(((x + branch)?, None));
        };
        // The forward takes what the backward will read.
        let rows = self.rounded(&branch)?;
        let (y, scale) = norm::forward(
            &rows.to_dtype(DType::F32)?,
            weight,
            self.config.rms_norm_eps,
            self.device,
        )?;
        Ok(((x + y)?, Some((rows, scale))))
    }

    /// The transpose of [`Self::joined`]: the gradient with respect to the branch, given `d`, that with respect to the sum.
    fn before_norm(
        self,
        d: &Tensor,
        weight: &Option<Tensor>,
        kept: &Option<(Tensor, Tensor)>,
    ) -> Result<Tensor> {
        match (weight, kept) {
            (Some(weight), Some((rows, scale))) => {
                norm::backward(d, &rows.to_dtype(DType::F32)?, weight, scale, self.device)
            }
            _ => d.affine(f64::from(self.config.residual_multiplier), 0.0),
        }
    }

    fn gradients(self, linear: &Linear<'_>, dy: &Tensor, x: &Tensor, sink: Sink<'_>) -> Result<()> {
        gradients(linear, dy, x, self.point, self.device, sink)
    }

    fn attention(&self) -> Attention<'_> {
        Attention {
            heads: self.config.heads(),
            scores: self.config.scores,
            stretches: self.stretches,
            device: self.device,
        }
    }

    fn mixture<'m>(&'m self, router: &'m Tensor, placed: &'m [PlacedGated]) -> Mixture<'m> {
        let (Some(settings), FeedForward::Mixture { experts, .. }) =
            (self.config.experts, &self.block.feed_forward)
        else {
            unreachable!("the block was copied from one with experts");
        };
        Mixture {
            config: self.config,
            settings,
            device: self.device,
            router,
            experts,
            placed,
        }
    }

    /// Query, key and value columns of `qkv`.
    fn parts(self, qkv: &Tensor) -> Result<[Tensor; 3]> {
        let heads = self.config.heads();
        let (queries, keys) = (heads.query * heads.dim, heads.key_value * heads.dim);
        let part = |first, width| qkv.narrow(1, first, width)?.contiguous();
        Ok([
            part(0, queries)?,
            part(queries, keys)?,
            part(queries + keys, keys)?,
        ])
    }

    fn rounded(self, x: &Tensor) -> Result<Tensor> {
        x.to_dtype(self.device.precision().dtype())
    }
}

/// `x` behind a norm, if there is one, with the rows' scales.
fn normalized(
    x: &Tensor,
    weight: &Option<Tensor>,
    epsilon: f32,
    device: &Device,
) -> Result<(Tensor, Option<Tensor>)> {
    match weight {
        None => Ok((x.clone(), None)),
        Some(weight) => {
            let (y, scale) = norm::forward(x, weight, epsilon, device)?;
            Ok((y, Some(scale)))
        }
    }
}

/// The transpose of [`normalized`].
fn through_norm(
    d: Tensor,
    x: &Tensor,
    weight: &Option<Tensor>,
    scale: &Option<Tensor>,
    device: &Device,
) -> Result<Tensor> {
    match (weight, scale) {
        (Some(weight), Some(scale)) => norm::backward(&d, x, weight, scale, device),
        _ => Ok(d),
    }
}
