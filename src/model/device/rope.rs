//! Rotary position embedding on a device, with the change of layout that attention wants.
//!
//! The function of the CPU's kernel of the same name, by a kernel of the device or as operations of candle.

use candle_core::{D, Result, Tensor};

use super::kernels::{Call, Scalar};
use super::place::Device;
use crate::model::kernels::rope::{Heads, Pairs, Rotations};

/// Cosine and sine of each pair's angle at each token of a pack: tokens x pairs, f32.
#[derive(Clone, Debug)]
pub(super) struct Angles {
    cos: Tensor,
    sin: Tensor,
    /// 1, or -1 on the way back.
    sign: f32,
    device: Device,
}

impl Angles {
    /// Those that `rotations` holds for its pack.
    pub(super) fn upload(rotations: &Rotations, device: &Device) -> Result<Self> {
        let (cos, sin) = rotations.of_tokens();
        let shape = [rotations.tokens(), rotations.pairs()];
        Ok(Self {
            cos: device.upload(&cos, &shape)?,
            sin: device.upload(&sin, &shape)?,
            sign: 1.0,
            device: device.clone(),
        })
    }

    /// `x` (heads x tokens x dim) with its first pairs turned, and the rest as it is.
    fn turn(&self, x: &Tensor, pairs: Pairs) -> Result<Tensor> {
        let half = self.cos.dim(1)?;
        let (heads, tokens, dim) = x.dims3()?;
        if let Some(kernels) = self.device.kernels() {
            let [turned] = kernels.launch(Call {
                name: "turn",
                blocks: heads * tokens,
                inputs: &[x, &self.cos, &self.sin],
                scalars: &[
                    Scalar::Float(self.sign),
                    Scalar::flag(pairs == Pairs::Neighbors),
                    Scalar::length(tokens),
                    Scalar::length(half),
                    Scalar::length(dim),
                ],
                outputs: [&[heads, tokens, dim]],
            })?;
            return Ok(turned);
        }
        let turning = x.narrow(D::Minus1, 0, 2 * half)?;
        let (a, b) = match pairs {
            Pairs::Halves => (turning.narrow(2, 0, half)?, turning.narrow(2, half, half)?),
            Pairs::Neighbors => {
                let pairs = turning.contiguous()?.reshape((heads, tokens, half, 2))?;
                let of = |side| pairs.narrow(3, side, 1)?.squeeze(3);
                (of(0)?, of(1)?)
            }
        };
        let (cos, sin) = (&self.cos, &self.sin.affine(f64::from(self.sign), 0.0)?);
        let turned_a = (a.broadcast_mul(cos)? - b.broadcast_mul(sin)?)?;
        let turned_b = (b.broadcast_mul(cos)? + a.broadcast_mul(sin)?)?;
        let turned = match pairs {
            Pairs::Halves => Tensor::cat(&[turned_a, turned_b], 2)?,
            Pairs::Neighbors => {
                Tensor::stack(&[turned_a, turned_b], 3)?.reshape((heads, tokens, 2 * half))?
            }
        };
        match dim - 2 * half {
            0 => Ok(turned),
            still => Tensor::cat(&[turned, x.narrow(2, 2 * half, still)?.contiguous()?], 2),
        }
    }

    /// The angles of the way back.
    fn reversed(&self) -> Self {
        Self {
            sign: -self.sign,
            ..self.clone()
        }
    }
}

/// Query, key and value heads, each heads x tokens x dim.
#[derive(Clone, Debug)]
pub(super) struct HeadTensors {
    pub(super) query: Tensor,
    pub(super) key: Tensor,
    pub(super) value: Tensor,
}

/// Splits `qkv` (tokens x row, f32) into heads, rotating queries and keys.
pub(super) fn forward(qkv: &Tensor, heads: Heads, angles: &Angles) -> Result<HeadTensors> {
    let tokens = qkv.dim(0)?;
    let split = |first: usize, count: usize| {
        let part = qkv.narrow(1, first * heads.dim, count * heads.dim)?;
        let part = part.contiguous()?.reshape((tokens, count, heads.dim))?;
        part.transpose(0, 1)?.contiguous()
    };
    let keys = heads.query;
    let values = keys + heads.key_value;
    Ok(HeadTensors {
        query: angles.turn(&split(0, heads.query)?, heads.pairs)?,
        key: angles.turn(&split(keys, heads.key_value)?, heads.pairs)?,
        value: split(values, heads.key_value)?,
    })
}

/// The transpose of [`forward`]: gathers gradients of heads into tokens x row, rotating back.
pub(super) fn backward(d: &HeadTensors, heads: Heads, angles: &Angles) -> Result<Tensor> {
    let back = angles.reversed();
    let join = |part: Tensor| {
        let (count, tokens, dim) = part.dims3()?;
        let rows = part.transpose(0, 1)?.contiguous()?;
        rows.reshape((tokens, count * dim))
    };
    let rows = [
        join(back.turn(&d.query, heads.pairs)?)?,
        join(back.turn(&d.key, heads.pairs)?)?,
        join(d.value.clone())?,
    ];
    Tensor::cat(&rows, 1)
}

#[cfg(test)]
mod tests {
    use super::super::place::DeviceName;
    use super::*;
    use crate::model::frequencies::Frequencies;
    use crate::model::kernels::rope;

    #[test]
    fn heads_turn_as_on_the_processor_whichever_dimensions_are_pairs() {
        let device = Device::open(DeviceName::Candle).unwrap();
        for (pairs, turning) in [
            (Pairs::Halves, 3),
            (Pairs::Halves, 2),
            (Pairs::Neighbors, 3),
            (Pairs::Neighbors, 1),
        ] {
            let heads = Heads {
                query: 4,
                key_value: 2,
                dim: 6,
                pairs,
            };
            let frequencies = Frequencies {
                inverse: vec![1.0, 0.3, 0.09][..turning].to_vec(),
                long: None,
                attention_factor: 1.5,
            };
            let mut rotations = Rotations::default();
            rotations.prepare(&frequencies, &[2, 5, 9]);
            let x: Vec<f32> = (0u16..9 * 48).map(|i| (f32::from(i) * 0.7).sin()).collect();
            let mut wanted = vec![0.0; x.len()];
            rope::forward(&x, heads, &rotations, &mut wanted);
            let angles = Angles::upload(&rotations, &device).unwrap();
            let turned = forward(&device.upload(&x, &[9, 48]).unwrap(), heads, &angles).unwrap();
            let flat = |x: &Tensor| -> Vec<f32> { x.flatten_all().unwrap().to_vec1().unwrap() };
            let found = [&turned.query, &turned.key, &turned.value]
                .map(flat)
                .concat();
            let near = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-6);
            assert!(near(&found, &wanted), "{pairs:?} {turning}");
            let mut back = vec![0.0; x.len()];
            rope::backward(&wanted, heads, &rotations, &mut back);
            assert!(near(
                &flat(&backward(&turned, heads, &angles).unwrap()),
                &back
            ));
        }
    }
}
