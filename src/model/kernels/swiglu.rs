//! SwiGLU: a = silu(gate) * up with silu(z) = z / (1 + e^-z).
//!
//! Source: Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202.

use rayon::prelude::*;

use super::{exp, simd};

/// `gate_up` is tokens x 2 width, the gate first in each row; `a` is tokens x width.
pub(crate) fn forward(gate_up: &[f32], a: &mut [f32], width: usize) {
    (
        gate_up.par_chunks_exact(2 * width),
        a.par_chunks_exact_mut(width),
    )
        .into_par_iter()
        .for_each(|(gate_up, a)| {
            simd(|| {
                let (gate, up) = gate_up.split_at(width);
                for ((a, z), up) in a.iter_mut().zip(gate).zip(up) {
                    *a = z / (1.0 + exp(-z)) * up;
                }
            });
        });
}

/// Overwrites `gate_up` with the gradient with respect to it, given `da`.
///
/// With s = sigmoid(z): d gate = da up s (1 + z (1 - s)), d up = da z s.
pub(crate) fn backward(da: &[f32], gate_up: &mut [f32], width: usize) {
    (
        da.par_chunks_exact(width),
        gate_up.par_chunks_exact_mut(2 * width),
    )
        .into_par_iter()
        .for_each(|(da, gate_up)| {
            simd(|| {
                let (gate, up) = gate_up.split_at_mut(width);
                for ((z, up), da) in gate.iter_mut().zip(up).zip(da) {
                    let s = 1.0 / (1.0 + exp(-*z));
                    let d_gate = da * *up * s * (1.0 + *z * (1.0 - s));
                    *up = da * *z * s;
                    *z = d_gate;
                }
            });
        });
}
