//! Gated linear units: a = act(gate) * up, with act SiLU (SwiGLU) or GELU by tanh (GeGLU).
//!
//! Source: Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202; Hendrycks and Gimpel, "Gaussian Error Linear Units",
//! arXiv:1606.08415, for the approximation by tanh.

use rayon::prelude::*;

use super::{exp, simd, tanh};
use crate::model::family::Activation;

/// `gate_up` is tokens x 2 width, the gate first in each row; `a` is tokens x width.
pub(crate) fn forward(activation: Activation, gate_up: &[f32], a: &mut [f32], width: usize) {
    (
        gate_up.par_chunks_exact(2 * width),
        a.par_chunks_exact_mut(width),
    )
        .into_par_iter()
        .for_each(|(gate_up, a)| {
            simd(
                #[inline(always)]
                || {
                    let (gate, up) = gate_up.split_at(width);
                    let rows = a.iter_mut().zip(gate).zip(up);
                    match activation {
                        Activation::Silu => rows.for_each(|((a, &z), up)| *a = silu(z).0 * up),
                        Activation::GeluTanh => rows.for_each(|((a, &z), up)| *a = gelu(z).0 * up),
                    }
                },
            );
        });
}

/// Overwrites `gate_up` with the gradient with respect to it, given `da`: d gate = da up act'(z), d up = da act(z).
pub(crate) fn backward(activation: Activation, da: &[f32], gate_up: &mut [f32], width: usize) {
    (
        da.par_chunks_exact(width),
        gate_up.par_chunks_exact_mut(2 * width),
    )
        .into_par_iter()
        .for_each(|(da, gate_up)| {
            simd(
                #[inline(always)]
                || {
                    let (gate, up) = gate_up.split_at_mut(width);
                    let rows = gate.iter_mut().zip(up).zip(da);
                    match activation {
                        Activation::Silu => {
                            rows.for_each(|((z, up), &da)| back(z, up, da, silu(*z)))
                        }
                        Activation::GeluTanh => {
                            rows.for_each(|((z, up), &da)| back(z, up, da, gelu(*z)))
                        }
                    }
                },
            );
        });
}

/// One element of [`backward`], given the activation and its derivative at `z`.
#[inline(always)]
fn back(z: &mut f32, up: &mut f32, da: f32, (value, slope): (f32, f32)) {
    *z = da * *up * slope;
    *up = da * value;
}

/// z s and its derivative s (1 + z (1 - s)), with s = 1 / (1 + e^-z).
#[inline(always)]
fn silu(z: f32) -> (f32, f32) {
    let s = 1.0 / (1.0 + exp(-z));
    (z * s, s * (1.0 + z * (1.0 - s)))
}

/// z / 2 (1 + t) with t = tanh(u), u = sqrt(2 / pi) (z + 0.044715 z^3), and its derivative (1 + t) / 2 + z / 2 (1 - t^2) u'.
#[inline(always)]
fn gelu(z: f32) -> (f32, f32) {
    const SQRT_2_OVER_PI: f32 = 0.797_884_6;
    const CUBIC: f32 = 0.044_715;
    let t = tanh(SQRT_2_OVER_PI * (z + CUBIC * z * z * z));
    let slope = SQRT_2_OVER_PI * (1.0 + 3.0 * CUBIC * z * z);
    (
        0.5 * z * (1.0 + t),
        0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * slope,
    )
}
