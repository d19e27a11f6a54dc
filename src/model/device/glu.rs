//! Gated linear units on a device: a = act(gate) up, in f32.
//!
//! The functions of the CPU's kernel of the same name, by a kernel of the device or as operations of candle.

use candle_core::{D, Result, Tensor};

use super::kernels::{Call, Scalar};
use super::place::Device;
use crate::model::family::Activation;

/// `gate_up` is tokens x 2 width, the gate first in each row; the result tokens x width.
pub(super) fn forward(activation: Activation, gate_up: &Tensor, device: &Device) -> Result<Tensor> {
    if let Some(kernels) = device.kernels() {
        let (rows, width) = (gate_up.dim(0)?, gate_up.dim(1)? / 2);
        let [a] = kernels.launch(Call {
            name: "glu_forward",
            blocks: rows,
            inputs: &[gate_up],
            scalars: &[is_gelu(activation), Scalar::length(width)],
            outputs: [&[rows, width]],
        })?;
        return Ok(a);
    }
    let (gate, up) = halves(gate_up)?;
    let share = match activation {
        Activation::Silu => sigmoid(&gate)?,
        Activation::GeluTanh => half_of_one_plus(&tanh(&gate)?)?,
    };
    (gate * share)? * up
}

/// The gradient with respect to `gate_up`, given `da`: d gate = da up act'(z), d up = da act(z).
pub(super) fn backward(
    activation: Activation,
    da: &Tensor,
    gate_up: &Tensor,
    device: &Device,
) -> Result<Tensor> {
    if let Some(kernels) = device.kernels() {
        let (rows, width) = da.dims2()?;
        let [d] = kernels.launch(Call {
            name: "glu_backward",
            blocks: rows,
            inputs: &[da, gate_up],
            scalars: &[is_gelu(activation), Scalar::length(width)],
            outputs: [&[rows, 2 * width]],
        })?;
        return Ok(d);
    }
    let (z, up) = halves(gate_up)?;
    let (value, slope) = match activation {
        // z s and s (1 + z (1 - s)).
        Activation::Silu => {
            let s = sigmoid(&z)?;
            let rest = (&z * s.affine(-1.0, 1.0)?)?.affine(1.0, 1.0)?;
            ((&z * &s)?, (s * rest)?)
        }
        // z (1 + t) / 2 and (1 + t) / 2 + z (1 - t^2) u' / 2.
        Activation::GeluTanh => {
            let t = tanh(&z)?;
            let half = half_of_one_plus(&t)?;
            let u = z
                .sqr()?
                .affine(3.0 * CUBIC * SQRT_2_OVER_PI, SQRT_2_OVER_PI)?;
            let bend = (t.sqr()?.affine(-0.5, 0.5)? * u)?;
            ((&z * &half)?, (half + (&z * bend)?)?)
        }
    };
    let d_gate = ((da * up)? * slope)?;
    let d_up = (da * value)?;
    Tensor::cat(&[d_gate, d_up], D::Minus1)
}

fn is_gelu(activation: Activation) -> Scalar {
    Scalar::flag(activation == Activation::GeluTanh)
}

fn halves(gate_up: &Tensor) -> Result<(Tensor, Tensor)> {
    let width = gate_up.dim(D::Minus1)? / 2;
    let half = |first| gate_up.narrow(D::Minus1, first, width)?.contiguous();
    Ok((half(0)?, half(width)?))
}

/// 1 / (1 + e^-z).
fn sigmoid(z: &Tensor) -> Result<Tensor> {
    z.neg()?.exp()?.affine(1.0, 1.0)?.recip()
}

/// tanh(sqrt(2 / pi) (z + 0.044715 z^3)).
fn tanh(z: &Tensor) -> Result<Tensor> {
    let inner = z.sqr()?.affine(CUBIC * SQRT_2_OVER_PI, SQRT_2_OVER_PI)?;
    (z * inner)?.tanh()
}

fn half_of_one_plus(t: &Tensor) -> Result<Tensor> {
    t.affine(0.5, 0.5)
}

const SQRT_2_OVER_PI: f64 = 0.797_884_560_802_865_4;
const CUBIC: f64 = 0.044_715;
