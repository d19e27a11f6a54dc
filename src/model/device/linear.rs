//! A linear layer of a block on a device: y = x W^T + bias.
//!
//! In: a [`Linear`] of the checkpoint. Out: products in f32, and gradients with respect to its targets. W is on the device as it is
//! stored, in the device's precision, once for all; what a point of the search adds to it follows as a second matrix. In BF16 both together
//! have 16 bits, where one alone would swallow a perturbation below its own last one.

use candle_core::{DType, Result, Tensor};
use half::bf16;
use rayon::prelude::*;

use super::place::{Device, Precision};
use crate::model::linear::{Factor, Linear, Role};
use crate::model::point::Point;

/// A layer's matrices, one above the other.
#[derive(Debug)]
pub(super) struct PlacedLinear {
    /// Outputs x inputs, rounded to the device's precision.
    stored: Tensor,
    /// What is to be added for the present point, rounded by itself; `None` where that is nothing.
    moved: Option<Tensor>,
    /// Outputs, f32.
    bias: Option<Tensor>,
}

/// What a target's gradient is handed to, with the target's number.
pub(super) type Sink<'s> = &'s mut dyn FnMut(usize, &Tensor) -> Result<()>;

impl PlacedLinear {
    /// Copies `linear` to `device`.
    pub(super) fn upload(linear: &Linear<'_>, device: &Device) -> Result<Self> {
        let mut w = Vec::new();
        linear.widen(Point::stored(), &mut w);
        let bias = match linear.bias.is_empty() {
            true => None,
            false => Some(device.upload(&linear.bias, &[linear.outputs])?),
        };
        Ok(Self {
            stored: matrix(&w, linear, device)?,
            moved: None,
            bias,
        })
    }

    /// Makes it compute with its targets at `point`.
    pub(super) fn place(
        &mut self,
        linear: &Linear<'_>,
        point: Point<'_>,
        device: &Device,
    ) -> Result<()> {
        let is_frozen = |role: &Role<'_>| matches!(role, Role::Frozen);
        if linear.parts.iter().all(|part| is_frozen(&part.role)) {
            return Ok(());
        }
        // Before the next takes its memory.
        self.moved = None;
        let (mut w, mut stored) = (Vec::new(), Vec::new());
        linear.widen(point, &mut w);
        linear.widen(Point::stored(), &mut stored);
        w.par_iter_mut().zip(&stored).for_each(|(w, stored)| {
            *w -= match device.precision() {
                Precision::Bf16 => bf16::from_f32(*stored).to_f32(),
                Precision::F32 => *stored,
            };
        });
        if w.par_iter().any(|&x| x != 0.0) {
            self.moved = Some(matrix(&w, linear, device)?);
        }
        Ok(())
    }

    /// Tokens x outputs, f32, of `x`, tokens x inputs in the device's precision.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let product = |w: &Tensor| x.matmul(&w.t()?)?.to_dtype(DType::F32);
        let y = sum(product(&self.stored)?, self.moved.as_ref(), product)?;
        match &self.bias {
            None => Ok(y),
            Some(bias) => y.broadcast_add(bias),
        }
    }

    /// The gradient with respect to `x`, f32, of `dy`, tokens x outputs in the device's precision.
    pub(super) fn backward(&self, dy: &Tensor) -> Result<Tensor> {
        let product = |w: &Tensor| dy.matmul(w)?.to_dtype(DType::F32);
        sum(product(&self.stored)?, self.moved.as_ref(), product)
    }
}

/// Hands the gradients of `linear`'s targets to `sink`: dW = dy^T x of a matrix, and of factors over one, with s their scale,
/// dB = s dy^T (x A^T) and dA = s (dy B)^T x. All products are f32.
pub(super) fn gradients(
    linear: &Linear<'_>,
    dy: &Tensor,
    x: &Tensor,
    point: Point<'_>,
    device: &Device,
    sink: Sink<'_>,
) -> Result<()> {
    let x = x.to_dtype(DType::F32)?;
    let mut first = 0;
    for part in &linear.parts {
        let rows = part.view.elements() / linear.inputs;
        let dy = || {
            dy.narrow(1, first, rows)?
                .contiguous()?
                .to_dtype(DType::F32)
        };
        match &part.role {
            Role::Frozen => {}
            Role::Target(index) => sink(*index, &dy()?.t()?.matmul(&x)?)?,
            Role::Adapted(lora) => {
                let dy = dy()?.affine(f64::from(lora.scale), 0.0)?;
                let factor = |factor: &Factor<'_>, shape: [usize; 2]| {
                    device.upload(&factor.values(point), &shape)
                };
                if let Factor::Target(index, _) = lora.b {
                    let a = factor(&lora.a, [lora.rank, linear.inputs])?;
                    sink(index, &dy.t()?.matmul(&x.matmul(&a.t()?)?)?)?;
                }
                if let Factor::Target(index, _) = lora.a {
                    let b = factor(&lora.b, [rows, lora.rank])?;
                    sink(index, &dy.matmul(&b)?.t()?.matmul(&x)?)?;
                }
            }
        }
        first += rows;
    }
    Ok(())
}

/// `first`, and the product with `moved` if there is one.
fn sum(
    first: Tensor,
    moved: Option<&Tensor>,
    product: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    match moved {
        None => Ok(first),
        Some(moved) => first + product(moved)?,
    }
}

/// `w`, outputs x inputs, in the device's precision.
fn matrix(w: &[f32], linear: &Linear<'_>, device: &Device) -> Result<Tensor> {
    in_precision(w, [linear.outputs, linear.inputs], device)
}

/// `values` in the device's precision.
pub(super) fn in_precision(values: &[f32], shape: [usize; 2], device: &Device) -> Result<Tensor> {
    match device.precision() {
        Precision::F32 => device.upload(values, &shape),
        Precision::Bf16 => {
            let rounded: Vec<bf16> = values.par_iter().map(|&x| bf16::from_f32(x)).collect();
            Tensor::from_vec(rounded, &shape, &device.handle)
        }
    }
}
