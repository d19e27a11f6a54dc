//! RMSNorm: y = w * x / sqrt(mean(x^2) + epsilon), over the last dimension.
//!
//! Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467, equation 4.

use rayon::prelude::*;

use super::{dot, simd};

/// Normalizes each row of `x` (tokens x width) into `y` and keeps 1 / sqrt(mean(x^2) + epsilon) of each in `scales`.
pub(crate) fn forward(x: &[f32], weight: &[f32], epsilon: f32, y: &mut [f32], scales: &mut [f32]) {
    let width = weight.len();
    (
        x.par_chunks_exact(width),
        y.par_chunks_exact_mut(width),
        scales.par_iter_mut(),
    )
        .into_par_iter()
        .for_each(|(x, y, scale)| {
            simd(|| {
                *scale = 1.0 / (dot(x, x) / width_as_f32(width) + epsilon).sqrt();
                normalize(x, weight, *scale, y);
            });
        });
}

/// Repeats a forward whose `scales` are known: the normalized rows are cheaper to make again than to keep.
pub(crate) fn again(x: &[f32], weight: &[f32], scales: &[f32], y: &mut [f32]) {
    let width = weight.len();
    (
        x.par_chunks_exact(width),
        y.par_chunks_exact_mut(width),
        scales.par_iter(),
    )
        .into_par_iter()
        .for_each(|(x, y, scale)| simd(|| normalize(x, weight, *scale, y)));
}

/// Adds the gradient with respect to x to `dx`, given `dy` and what the forward kept.
///
/// With s the row's scale and g = w * dy: dx = s g - s^3 x mean(g x).
pub(crate) fn backward(dy: &[f32], x: &[f32], weight: &[f32], scales: &[f32], dx: &mut [f32]) {
    let width = weight.len();
    (
        dy.par_chunks_exact(width),
        x.par_chunks_exact(width),
        dx.par_chunks_exact_mut(width),
        scales.par_iter(),
    )
        .into_par_iter()
        .for_each_init(
            || vec![0.0; width],
            |g, (dy, x, dx, &scale)| {
                simd(|| {
                    for i in 0..width {
                        g[i] = weight[i] * dy[i];
                    }
                    let pull = scale * scale * scale * (dot(g, x) / width_as_f32(width));
                    for i in 0..width {
                        dx[i] += scale * g[i] - pull * x[i];
                    }
                });
            },
        );
}

#[inline(always)]
fn normalize(x: &[f32], weight: &[f32], scale: f32, y: &mut [f32]) {
    for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
        *y = w * (x * scale);
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "a model's width is far below 2^24"
)]
fn width_as_f32(width: usize) -> f32 {
    width as f32
}
