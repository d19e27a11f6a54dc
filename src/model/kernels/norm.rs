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
            simd(
                #[inline(always)]
                || {
                    *scale = 1.0 / (dot(x, x) / width_as_f32(width) + epsilon).sqrt();
                    normalize(x, weight, *scale, y);
                },
            );
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
        .for_each(|(x, y, scale)| {
            simd(
                #[inline(always)]
                || normalize(x, weight, *scale, y),
            )
        });
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
                simd(
                    #[inline(always)]
                    || {
                        for i in 0..width {
                            g[i] = weight[i] * dy[i];
                        }
                        let pull = scale * scale * scale * (dot(g, x) / width_as_f32(width));
                        for i in 0..width {
                            dx[i] += scale * g[i] - pull * x[i];
                        }
                    },
                );
            },
        );
}

/// Normalizes the first elements of each row of `x` (tokens x `row`) in place, cut into groups as long as each norm's weight: the
/// query heads by `norms[0]`, the key heads behind them by `norms[1]`. What they were goes to `kept` (tokens x both widths), and
/// each group's scale to `scales`.
pub(crate) fn heads_forward(
    x: &mut [f32],
    row: usize,
    norms: [Groups<'_>; 2],
    epsilon: f32,
    kept: &mut [f32],
    scales: &mut [f32],
) {
    let (width, groups) = (norms[0].width + norms[1].width, count(norms));
    (
        x.par_chunks_exact_mut(row),
        kept.par_chunks_exact_mut(width),
        scales.par_chunks_exact_mut(groups),
    )
        .into_par_iter()
        .for_each(|(x, kept, scales)| {
            simd(
                #[inline(always)]
                || {
                    let x = &mut x[..width];
                    kept.copy_from_slice(x);
                    for_each_group(norms, |at, group, weight| {
                        let (y, x) = (&mut x[at.clone()], &kept[at]);
                        let mean = dot(x, x) / width_as_f32(weight.len());
                        scales[group] = 1.0 / (mean + epsilon).sqrt();
                        normalize(x, weight, scales[group], y);
                    });
                },
            );
        });
}

/// Turns the gradient with respect to the normalized elements, in the first elements of each row of `d` (tokens x `row`), into that
/// with respect to those before.
pub(crate) fn heads_backward(
    d: &mut [f32],
    row: usize,
    norms: [Groups<'_>; 2],
    kept: &[f32],
    scales: &[f32],
) {
    let (width, groups) = (norms[0].width + norms[1].width, count(norms));
    (
        d.par_chunks_exact_mut(row),
        kept.par_chunks_exact(width),
        scales.par_chunks_exact(groups),
    )
        .into_par_iter()
        .for_each(|(d, kept, scales)| {
            simd(
                #[inline(always)]
                || {
                    for_each_group(norms, |at, group, weight| {
                        let (d, x, scale) = (&mut d[at.clone()], &kept[at], scales[group]);
                        for (d, w) in d.iter_mut().zip(weight) {
                            *d *= w;
                        }
                        let mean = dot(d, x) / width_as_f32(weight.len());
                        let pull = scale * scale * scale * mean;
                        for (d, x) in d.iter_mut().zip(x) {
                            *d = scale * *d - pull * x;
                        }
                    });
                },
            );
        });
}

/// A run of elements that is normalized in groups.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Groups<'a> {
    /// Elements, a multiple of the weight's.
    pub(crate) width: usize,
    /// One for each element of a group.
    pub(crate) weight: &'a [f32],
}

fn count(norms: [Groups<'_>; 2]) -> usize {
    norms.iter().map(|it| it.width / it.weight.len()).sum()
}

#[inline(always)]
fn for_each_group(
    norms: [Groups<'_>; 2],
    mut work: impl FnMut(std::ops::Range<usize>, usize, &[f32]),
) {
    let (mut at, mut group) = (0, 0);
    for Groups { width, weight } in norms {
        for _ in 0..width / weight.len() {
            work(at..at + weight.len(), group, weight);
            at += weight.len();
            group += 1;
        }
    }
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
