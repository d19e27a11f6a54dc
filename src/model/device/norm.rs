//! RMSNorm on a device: y = w x / sqrt(mean(x^2) + epsilon), over the last dimension, in f32.
//!
//! The function of the CPU's kernel of the same name, by a kernel of the device or as operations of candle.

use candle_core::{D, Result, Tensor};

use super::kernels::{Call, Scalar};
use super::place::Device;

/// Normalizes the rows of `x` (any x width, f32) by `weight` (width); returns them and 1 / sqrt(mean(x^2) + epsilon) of each, any x 1.
pub(super) fn forward(
    x: &Tensor,
    weight: &Tensor,
    epsilon: f32,
    device: &Device,
) -> Result<(Tensor, Tensor)> {
    if let Some(kernels) = device.kernels() {
        let (rows, width) = x.dims2()?;
        let [y, scale] = kernels.launch(Call {
            name: "norm_forward",
            blocks: rows,
            inputs: &[x, weight],
            scalars: &[Scalar::Float(epsilon), Scalar::length(width)],
            outputs: [&[rows, width], &[rows, 1]],
        })?;
        return Ok((y, scale));
    }
    let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
    let scale = mean.affine(1.0, f64::from(epsilon))?.sqrt()?.recip()?;
    Ok((again(x, weight, &scale)?, scale))
}

/// Repeats a forward whose scales are known.
pub(super) fn again(x: &Tensor, weight: &Tensor, scale: &Tensor) -> Result<Tensor> {
    x.broadcast_mul(scale)?.broadcast_mul(weight)
}

/// The gradient with respect to `x`, given `dy`: with s the row's scale and g = w dy, s g - s^3 x mean(g x).
pub(super) fn backward(
    dy: &Tensor,
    x: &Tensor,
    weight: &Tensor,
    scale: &Tensor,
    device: &Device,
) -> Result<Tensor> {
    if let Some(kernels) = device.kernels() {
        let (rows, width) = x.dims2()?;
        let [dx] = kernels.launch(Call {
            name: "norm_backward",
            blocks: rows,
            inputs: &[dy, x, weight, scale],
            scalars: &[Scalar::length(width)],
            outputs: [&[rows, width]],
        })?;
        return Ok(dx);
    }
    let g = dy.broadcast_mul(weight)?;
    let mean = (&g * x)?.mean_keepdim(D::Minus1)?;
    let pull = ((scale.sqr()? * scale)? * mean)?;
    g.broadcast_mul(scale)? - x.broadcast_mul(&pull)?
}
