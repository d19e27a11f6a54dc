//! The decoder on a GPU, or on several: the same losses and gradients as [`Decoder`]'s, by operations of candle.
//!
//! In: a [`Decoder`], which holds the checkpoint's tensors and what is optimized of them, and [`Device`]s. Out: a [`DeviceDecoder`], whose
//! weights lie on the devices. Forward and backward are written by hand here too, on tensors without a tape: candle's autograd computes a
//! gradient for every frozen matrix. The same code runs on candle's own processor backend, in f32, which is how it is tested.
//!
//! Blocks go on devices in order, as many on each as fit its free memory; activations pass from one to the next. Values and gradients of
//! the targets are the caller's, in f32, on the host: values are copied to the devices where they changed since the last pack, gradients are
//! copied back as soon as a block has them.

mod attention;
mod block;
#[cfg(feature = "cuda")]
mod cuda;
mod error;
mod footprint;
mod glu;
mod head;
#[cfg(test)]
mod host;
mod kernels;
mod linear;
mod mixture;
mod norm;
mod place;
mod rope;

use candle_core::Tensor;

pub use error::{DeviceError, DeviceErrorKind};
pub use footprint::footprint;
pub use place::{Device, DeviceName, DeviceNameError, Precision};

use super::decoder::{Activations, Decoder, PackError};
use super::differentiable::Differentiable;
use super::head::{Objective, Predicted};
use super::kernels::attention::Pattern;
use super::kernels::rope::Rotations;
use super::linear::add_scaled;
use super::pack::Pack;
use super::point::{Point, PointContent};
use super::targets::Target;
use super::tensors::TargetTensors;
use super::weights::WeightsError;
use attention::{STRETCH, Stretch};
use block::{Below, Kept, Layer, PlacedBlock};
use head::PlacedHead;
use rope::Angles;

/// A decoder whose matrices are on devices.
#[derive(Debug)]
pub struct DeviceDecoder<'c> {
    /// The same one on the host, whose tensors stay where they are.
    host: Decoder<'c>,
    devices: Vec<Device>,
    /// The block, with the number of its device.
    blocks: Vec<(usize, PlacedBlock)>,
    head: PlacedHead,
    activations: Activations,
    /// Where the targets on the devices are; `None` in between.
    placed_at: Option<PointContent>,
    rotations: Vec<Rotations>,
}

impl<'c> DeviceDecoder<'c> {
    /// Copies the matrices of `host` to `devices`, of which there is at least one: blocks in order, the output matrix on the last. Pages of a
    /// checkpoint that `host` [gives back](Decoder::releasing) are given back after each block.
    ///
    /// # Errors
    /// [`DeviceError`] when a device fails or has not enough memory.
    pub fn upload(
        host: Decoder<'c>,
        devices: Vec<Device>,
        activations: Activations,
    ) -> Result<Self, DeviceError> {
        let places = footprint::places(&host, &devices);
        let mut blocks = Vec::with_capacity(places.len());
        for (block, &place) in host.weights.blocks.iter().zip(&places) {
            let device = &devices[place];
            let placed = PlacedBlock::upload(block, &host.config, device);
            blocks.push((place, placed.map_err(|error| device.failed(&error))?));
            if let Some(checkpoint) = host.released {
                checkpoint.release();
            }
        }
        let last = &devices[devices.len() - 1];
        let head = PlacedHead::upload(&host, last).map_err(|error| last.failed(&error))?;
        Ok(Self {
            rotations: vec![Rotations::default(); host.config.rotary.len()],
            placed_at: Some(Point::stored().content()),
            blocks,
            head,
            activations,
            devices,
            host,
        })
    }

    /// Copies what the targets at `point` add to the stored weights, unless it is there.
    fn place(&mut self, point: Point<'_>) -> Result<(), DeviceError> {
        if self.placed_at == Some(point.content()) {
            return Ok(());
        }
        self.placed_at = None;
        for ((place, placed), block) in self.blocks.iter_mut().zip(&self.host.weights.blocks) {
            let device = &self.devices[*place];
            let done = placed.place(block, point, device);
            done.map_err(|error| device.failed(&error))?;
        }
        self.placed_at = Some(point.content());
        Ok(())
    }

    /// Everything before the first block: the targets' values, and what depends on the pack alone.
    fn prepare(&mut self, point: Point<'_>, pack: &Pack) -> Result<Context, PackError> {
        let predicted = pack.predictions.iter().map(|it| &it.token);
        self.host
            .check_tokens(pack.tokens.iter().chain(predicted))?;
        self.place(point)?;
        for (rotations, frequencies) in self.rotations.iter_mut().zip(&self.host.config.rotary) {
            rotations.prepare(frequencies, &pack.starts);
        }
        let mut context = Context::default();
        for ((place, _), config) in self.blocks.iter().zip(&self.host.config.blocks) {
            let device = &self.devices[*place];
            let pattern = Pattern {
                starts: &pack.starts,
                window: config.window,
            };
            context
                .add(
                    (*place, config.rotary, config.window),
                    || Angles::upload(&self.rotations[config.rotary], device),
                    || Stretch::cut(pattern, STRETCH, device),
                )
                .map_err(|error| device.failed(&error))?;
        }
        Ok(context)
    }

    fn layer<'a>(&'a self, index: usize, context: &'a Context, point: Point<'a>) -> Layer<'a> {
        let (place, placed) = &self.blocks[index];
        let config = &self.host.config.blocks[index];
        let (angles, stretches) = context.of((*place, config.rotary, config.window));
        Layer {
            config: &self.host.config,
            block: &self.host.weights.blocks[index],
            placed,
            device: &self.devices[*place],
            angles,
            stretches,
            point,
        }
    }

    /// Runs all blocks; keeps what a backward wants, if one will follow.
    fn forward(
        &self,
        context: &Context,
        point: Point<'_>,
        pack: &Pack,
        pass: Pass,
    ) -> Result<Forward, DeviceError> {
        let mut values = Vec::new();
        self.host.embed_into(&pack.tokens, &mut values);
        let shape = [pack.tokens.len(), self.host.config.hidden_size];
        let first = &self.devices[self.blocks.first().map_or(0, |(place, _)| *place)];
        let x = first.upload(&values, &shape);
        let mut x = x.map_err(|error| first.failed(&error))?;
        let (mut inputs, mut kept) = (Vec::new(), Vec::new());
        for index in 0..self.blocks.len() {
            let layer = self.layer(index, context, point);
            let failed = |error| layer.device.failed(&error);
            x = layer.device.take(&x).map_err(failed)?;
            let (out, of_block) = layer.forward(&x).map_err(failed)?;
            if pass == Pass::ForwardAndBackward {
                inputs.push(x);
                let is_kept = self.activations == Activations::Keep;
                kept.push(is_kept.then_some(of_block));
            }
            x = out;
        }
        let head = &self.head.device;
        let out = head.take(&x);
        Ok(Forward {
            inputs,
            kept,
            out: out.map_err(|error| head.failed(&error))?,
        })
    }

    /// Runs the blocks back from the last to the first that holds a target; `d` is the gradient of the last one's output. Returns the
    /// targets' gradients, by their numbers.
    fn backward(
        &self,
        context: &Context,
        point: Point<'_>,
        forward: Forward,
        d: Tensor,
    ) -> Result<Vec<(usize, Vec<f32>)>, DeviceError> {
        let mut gradients = Vec::new();
        let lowest = self.host.weights.targets.iter().map(|target| target.block);
        let Some(lowest) = lowest.min() else {
            return Ok(gradients);
        };
        let mut d = Some(d);
        let Forward { inputs, kept, .. } = forward;
        let kept = inputs.into_iter().zip(kept).enumerate();
        for (index, (x, kept)) in kept.skip(lowest).rev() {
            let layer = self.layer(index, context, point);
            let failed = |error| layer.device.failed(&error);
            let Some(d_out) = d.take() else {
                break;
            };
            let kept = match kept {
                Some(kept) => kept,
                None => layer.forward(&x).map_err(failed)?.1,
            };
            let d_out = layer.device.take(&d_out).map_err(failed)?;
            let below = match index == lowest {
                true => Below::Nothing,
                false => Below::Targets,
            };
            let mut sink = |target: usize, gradient: &Tensor| {
                gradients.push((target, gradient.flatten_all()?.to_vec1()?));
                Ok(())
            };
            let back = layer.backward(&x, &kept, below, d_out, &mut sink);
            d = back.map_err(failed)?;
        }
        Ok(gradients)
    }

    /// What the last block gives for the tokens of `pack`, where no backward will follow.
    fn last_states(&mut self, point: Point<'_>, pack: &Pack) -> Result<Tensor, PackError> {
        let context = self.prepare(point, pack)?;
        Ok(self.forward(&context, point, pack, Pass::Forward)?.out)
    }
}

impl Differentiable for DeviceDecoder<'_> {
    fn targets(&self) -> &[Target] {
        self.host.targets()
    }

    fn stored_target(&self, index: usize) -> Result<Vec<f32>, WeightsError> {
        self.host.stored_target(index)
    }

    fn shares_beginnings(&self) -> bool {
        self.host.shares_beginnings()
    }

    fn losses(
        &mut self,
        point: Point<'_>,
        pack: &Pack,
        objective: Objective<'_>,
    ) -> Result<Vec<f64>, PackError> {
        let out = self.last_states(point, pack)?;
        let losses = self.head.losses(&out, pack, objective, false);
        Ok(losses.map_err(|error| self.head.device.failed(&error))?.0)
    }

    fn predicted(&mut self, point: Point<'_>, pack: &Pack) -> Result<Vec<Predicted>, PackError> {
        let out = self.last_states(point, pack)?;
        let predicted = self.head.predicted(&out, pack);
        Ok(predicted.map_err(|error| self.head.device.failed(&error))?)
    }

    fn losses_and_gradient(
        &mut self,
        point: Point<'_>,
        pack: &Pack,
        objective: Objective<'_>,
        gradient: &mut TargetTensors,
    ) -> Result<Vec<f64>, PackError> {
        let context = self.prepare(point, pack)?;
        let forward = self.forward(&context, point, pack, Pass::ForwardAndBackward)?;
        let losses = self.head.losses(&forward.out, pack, objective, true);
        let (losses, d) = losses.map_err(|error| self.head.device.failed(&error))?;
        if let Some(d) = d {
            for (target, found) in self.backward(&context, point, forward, d)? {
                add_scaled(1.0, &found, gradient.tensor_mut(target));
            }
        }
        Ok(losses)
    }

    fn reference(&mut self, point: Point<'_>, pack: &Pack) -> Result<Vec<f32>, PackError> {
        let out = self.last_states(point, pack)?;
        let hidden = self.head.hidden(&out, pack);
        Ok(hidden.map_err(|error| self.head.device.failed(&error))?)
    }

    fn save_memory(&mut self) -> bool {
        let before = std::mem::replace(&mut self.activations, Activations::Recompute);
        before == Activations::Keep
    }
}

/// Whether a backward will follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pass {
    Forward,
    ForwardAndBackward,
}

/// What a forward leaves.
struct Forward {
    /// Of each block; none without a backward.
    inputs: Vec<Tensor>,
    /// Of each block; `None` is computed again.
    kept: Vec<Option<Kept>>,
    /// The last block's output, where the head is.
    out: Tensor,
}

/// A device's number, a rotary embedding's, and a window.
type Kind = (usize, usize, Option<usize>);

/// What depends on the pack alone, for each kind of block.
#[derive(Debug, Default)]
struct Context(Vec<(Kind, Angles, Vec<Stretch>)>);

impl Context {
    fn add(
        &mut self,
        kind: Kind,
        angles: impl FnOnce() -> candle_core::Result<Angles>,
        stretches: impl FnOnce() -> candle_core::Result<Vec<Stretch>>,
    ) -> candle_core::Result<()> {
        if self.0.iter().all(|(known, ..)| *known != kind) {
            self.0.push((kind, angles()?, stretches()?));
        }
        Ok(())
    }

    fn of(&self, kind: Kind) -> (&Angles, &[Stretch]) {
        let found = self.0.iter().find(|(known, ..)| *known == kind);
        let (_, angles, stretches) = found.expect("each block's kind was added");
        (angles, stretches)
    }
}
