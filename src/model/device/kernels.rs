//! What lies between matrix products in one pass over its rows, where a device has kernels for it.
//!
//! In: a [`Call`] of a kernel of `kernels.cu`, by its name. Out: its outputs. On an NVIDIA GPU [`super::cuda`] launches them; a test runs
//! the same source on the processor. Candle's operations do the same in several passes: they compute where there are no kernels, and
//! they are what the kernels of a device are held against ([`check`]) before they are used.

use std::fmt;
use std::sync::Arc;

use candle_core::{Result, Tensor};

use super::attention::{Attention, Stretch};
use super::place::Device;
use super::rope::{self, Angles, HeadTensors};
use super::{glu, head, norm};
use crate::model::family::Activation;
use crate::model::frequencies::Frequencies;
use crate::model::head::Objective;
use crate::model::kernels::attention::{Pattern, Scores};
use crate::model::kernels::rope::{Heads, Pairs, Rotations};
use crate::model::pack::{Pack, Prediction};

/// A kernel with what it is given, in the order of its parameters: inputs, scalars, outputs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Call<'a, const OUTPUTS: usize> {
    pub(super) name: &'static str,
    /// Blocks of threads: one for each row.
    pub(super) blocks: usize,
    /// f32, but for token ids, which are u32.
    pub(super) inputs: &'a [&'a Tensor],
    pub(super) scalars: &'a [Scalar],
    /// Their shapes; all f32.
    pub(super) outputs: [&'a [usize]; OUTPUTS],
}

/// A parameter that is no matrix.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(
    not(any(feature = "cuda", test)),
    expect(dead_code, reason = "only kernels read it")
)]
pub(super) enum Scalar {
    Float(f32),
    Int(i32),
}

impl Scalar {
    /// Of a row or a pack, which is far below 2^31.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_possible_wrap,
        reason = "sizes in a config are below 2^31, and those of packs are smaller"
    )]
    pub(super) fn length(length: usize) -> Self {
        Self::Int(length as i32)
    }

    pub(super) fn flag(flag: bool) -> Self {
        Self::Int(flag.into())
    }
}

/// Who runs kernels. Inputs are on its device and without gaps, and no output is empty.
pub(super) trait Launch: fmt::Debug + Send + Sync {
    fn launch(
        &self,
        name: &'static str,
        blocks: usize,
        inputs: &[Tensor],
        scalars: &[Scalar],
        outputs: &[&[usize]],
    ) -> Result<Vec<Tensor>>;
}

/// The kernels of a device.
#[derive(Clone, Debug)]
pub(super) struct Kernels(Arc<dyn Launch>);

impl Kernels {
    #[cfg_attr(
        not(any(feature = "cuda", test)),
        expect(dead_code, reason = "other devices have none")
    )]
    pub(super) fn new(launch: impl Launch + 'static) -> Self {
        Self(Arc::new(launch))
    }

    /// Runs one.
    pub(super) fn launch<const OUTPUTS: usize>(
        &self,
        call: Call<'_, OUTPUTS>,
    ) -> Result<[Tensor; OUTPUTS]> {
        let inputs = call.inputs.iter().map(|input| input.contiguous());
        let inputs = inputs.collect::<Result<Vec<_>>>()?;
        let Call {
            name,
            blocks,
            scalars,
            outputs,
            ..
        } = call;
        self.0
            .launch(name, blocks, &inputs, scalars, &outputs)?
            .try_into()
            .map_err(|_| candle_core::Error::msg("a kernel with other outputs"))
    }
}

/// Whether the kernels of `device` compute what candle's operations do there, on small examples.
///
/// # Errors
/// What differs, or what failed.
pub(super) fn check(device: &Device) -> std::result::Result<(), String> {
    let plain = device.clone().without_kernels();
    for (name, example) in EXAMPLES {
        let failed = |error| format!("kernels of `{name}` failed: {error}");
        let found = example(device).map_err(failed)?;
        let wanted = example(&plain).map_err(failed)?;
        for (found, wanted) in found.iter().zip(&wanted) {
            let scale = wanted.iter().fold(0.0f32, |top, x| top.max(x.abs()));
            let near = |(a, b): (&f32, &f32)| (a - b).abs() <= TOLERANCE * scale;
            if found.len() != wanted.len() || !found.iter().zip(wanted).all(near) {
                return Err(format!(
                    "kernels of `{name}` do not give what candle's operations do"
                ));
            }
        }
    }
    Ok(())
}

/// Relative to the largest number of a result: products of matrices between kernels may be rounded to 11 bits, twice.
const TOLERANCE: f32 = 2e-3;

type Example = fn(&Device) -> Result<Vec<Vec<f32>>>;

/// Rows that are no multiple of a block's threads, shorter and longer than it, and each branch of each kernel.
const EXAMPLES: [(&str, Example); 4] = [
    ("norm", |device| {
        let mut found = Vec::new();
        for width in [3, 700] {
            let (x, dy) = (
                wave(device, &[5, width], 0.7)?,
                wave(device, &[5, width], 1.9)?,
            );
            let weight = wave(device, &[width], 0.4)?;
            let (y, scale) = norm::forward(&x, &weight, 1e-5, device)?;
            let dx = norm::backward(&dy, &x, &weight, &scale, device)?;
            found.extend([flat(&y)?, flat(&scale)?, flat(&dx)?]);
        }
        Ok(found)
    }),
    ("glu", |device| {
        let mut found = Vec::new();
        for activation in [Activation::Silu, Activation::GeluTanh] {
            let gate_up = wave(device, &[4, 2 * 300], 0.3)?.affine(4.0, 0.0)?;
            let da = wave(device, &[4, 300], 1.1)?;
            found.push(flat(&glu::forward(activation, &gate_up, device)?)?);
            found.push(flat(&glu::backward(activation, &da, &gate_up, device)?)?);
        }
        Ok(found)
    }),
    ("attention", |device| {
        let mut found = Vec::new();
        for (pairs, window, softcap) in [
            (Pairs::Halves, None, None),
            (Pairs::Neighbors, Some(3), Some(2.0)),
        ] {
            let heads = Heads {
                query: 4,
                key_value: 2,
                dim: 6,
                pairs,
            };
            let frequencies = Frequencies {
                inverse: vec![1.0, 0.1],
                long: None,
                attention_factor: 1.0,
            };
            let starts = [2, 9, 11];
            let mut rotations = Rotations::default();
            rotations.prepare(&frequencies, &starts);
            let angles = Angles::upload(&rotations, device)?;
            let pattern = Pattern {
                starts: &starts,
                window,
            };
            let attention = Attention {
                heads,
                scores: Scores {
                    scale: 0.7,
                    softcap,
                },
                stretches: &Stretch::cut(pattern, 8, device)?,
                device,
            };
            let turned = rope::forward(&wave(device, &[11, heads.row()], 1.3)?, heads, &angles)?;
            let HeadTensors { query, key, value } = &turned;
            found.extend([flat(query)?, flat(key)?, flat(value)?]);
            found.push(flat(&attention.forward(&turned)?)?);
            let d = wave(device, &[11, 24], 2.1)?;
            let d = attention.backward(&d, &turned)?;
            // Each by itself: what is largest of one may be small beside another.
            found.extend([flat(&d.query)?, flat(&d.key)?, flat(&d.value)?]);
            found.push(flat(&rope::backward(&d, heads, &angles)?)?);
        }
        Ok(found)
    }),
    ("head", |device| {
        let (vocab, hidden) = (900, 5);
        let head = head::PlacedHead::example(
            wave(device, &[hidden], 0.9)?,
            wave(device, &[vocab, hidden], 0.17)?.to_dtype(device.precision().dtype())?,
            device,
        );
        let predictions = [(0, 3), (2, 899), (3, 256)];
        let pack = Pack {
            predictions: predictions
                .map(|(position, token)| Prediction { position, token })
                .to_vec(),
            ..Pack::default()
        };
        let x = wave(device, &[4, hidden], 0.6)?;
        let objective = Objective::NextToken { cap: 6.8 };
        let (losses, d) = head.losses(&x, &pack, objective, true)?;
        #[expect(clippy::cast_possible_truncation, reason = "compared to a few digits")]
        let losses = losses.into_iter().map(|loss| loss as f32).collect();
        let d = d.map(|d| flat(&d)).transpose()?;
        Ok(vec![losses, d.unwrap_or_default()])
    }),
];

/// Numbers from -1 to 1 that repeat nowhere.
fn wave(device: &Device, shape: &[usize], step: f32) -> Result<Tensor> {
    let elements = u16::try_from(shape.iter().product::<usize>()).unwrap_or(u16::MAX);
    let values: Vec<f32> = (0..elements)
        .map(|i| (f32::from(i) * step + 0.2).sin())
        .collect();
    device.upload(&values, shape)
}

fn flat(x: &Tensor) -> Result<Vec<f32>> {
    x.flatten_all()?.to_vec1()
}
