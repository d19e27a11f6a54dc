//! The search for scales and minimums, for 16 sub-blocks side by side.
//!
//! In: 16 sub-blocks of `N` values. Out: for each a scale, perhaps a minimum, and the levels that gave the least error. Every lane does
//! what llama.cpp does for one sub-block, operation by operation; where that branches, a lane keeps or takes the new values by a mask.
//! Names in the paragraphs below are those of `ggml-quants.c`.
//!
//! No closures here: a closure is a function of its own, and one that the compiler does not inline is compiled without the vector
//! instructions of its caller, twenty times slower.

use pulp::Simd;

use super::lanes::Lanes;

/// Sub-blocks that are searched at once: as many lanes as the widest registers have.
pub(super) const GROUP: usize = 16;

/// `N` values of each of 16 sub-blocks: the first of all, then the second of all, and so on.
pub(super) type Columns<const N: usize> = [[f32; GROUP]; N];

/// What was found for 16 sub-blocks.
pub(super) struct Found<const N: usize> {
    pub(super) scales: [f32; GROUP],
    /// By how much the values were raised so that levels start at 0, not negative. 0 in the searches without minimums.
    pub(super) minimums: [f32; GROUP],
    /// Integers.
    pub(super) levels: Columns<N>,
}

/// The candidates of a search with minimums: scales that spread the range over `levels - 1 + first + step * k` steps, `k` in `0..=last`.
pub(super) struct Candidates {
    pub(super) most: f32,
    pub(super) first: f32,
    pub(super) step: f32,
    pub(super) last: u8,
}

/// How a value's error is weighed against those of its neighbors, and measured.
pub(super) trait Loss {
    /// The weight of each value.
    fn weights<S: Simd, const N: usize>(simd: S, x: &[Lanes<S>; N]) -> [Lanes<S>; N];
    /// What counts of a difference.
    fn of<S: Simd>(difference: Lanes<S>) -> Lanes<S>;
}

/// Q2_K: the value's magnitude, times the error's.
pub(super) struct Absolute;

impl Loss for Absolute {
    #[inline(always)]
    fn weights<S: Simd, const N: usize>(_: S, x: &[Lanes<S>; N]) -> [Lanes<S>; N] {
        let mut weights = *x;
        for weight in &mut weights {
            *weight = weight.abs();
        }
        weights
    }

    #[inline(always)]
    fn of<S: Simd>(difference: Lanes<S>) -> Lanes<S> {
        difference.abs()
    }
}

/// Q4_K and Q5_K: the value's magnitude plus the sub-block's root mean square, times the error squared.
pub(super) struct Squared;

impl Loss for Squared {
    #[inline(always)]
    fn weights<S: Simd, const N: usize>(simd: S, x: &[Lanes<S>; N]) -> [Lanes<S>; N] {
        let mut sum = Lanes::all(simd, 0.0);
        for &x in x {
            sum = sum + x * x;
        }
        #[expect(clippy::cast_precision_loss, reason = "16 or 32")]
        let mean = (sum / Lanes::all(simd, N as f32)).sqrt();
        let mut weights = *x;
        for weight in &mut weights {
            *weight = mean + weight.abs();
        }
        weights
    }

    #[inline(always)]
    fn of<S: Simd>(difference: Lanes<S>) -> Lanes<S> {
        difference * difference
    }
}

/// Scales and minimums for which levels from 0 to `candidates.most` have the least loss: `make_qkx2_quants`.
///
/// Each candidate rounds the values to levels, then takes the scale and minimum that fit those levels best (weighted least squares). A
/// candidate that is better gives the next ones the minimum to start from.
#[inline(always)]
pub(super) fn with_minimums<S: Simd, L: Loss, const N: usize>(
    simd: S,
    columns: &Columns<N>,
    candidates: &Candidates,
) -> Found<N> {
    let mut found = Found {
        scales: [0.0; GROUP],
        minimums: [0.0; GROUP],
        levels: [[0.0; GROUP]; N],
    };
    for register in 0..GROUP / S::F32_LANES {
        let zero = Lanes::all(simd, 0.0);
        let most = Lanes::all(simd, candidates.most);
        let x = load(simd, columns, register);
        let weights = L::weights(simd, &x);

        let (mut least, mut greatest) = (x[0], x[0]);
        let (mut sum_w, mut sum_x) = (weights[0], weights[0] * x[0]);
        for (&x, &w) in x.iter().zip(&weights).skip(1) {
            least = x.less(least).select(x, least);
            greatest = x.greater(greatest).select(x, greatest);
            sum_w = sum_w + w;
            sum_x = sum_x + w * x;
        }
        let mut min = least.greater(zero).select(zero, least);
        let flat = greatest.equal(min);
        let flat_min = min;

        let mut inverse = most / (greatest - min);
        let mut scale = Lanes::all(simd, 1.0) / inverse;
        let mut error = zero;
        for (&x, &w) in x.iter().zip(&weights) {
            let l = (inverse * (x - min)).nearest(zero, most);
            error = error + w * L::of(scale * l + min - x);
        }
        // What the levels of the best candidate were rounded with.
        let mut rounded_with = (inverse, min);
        for k in 0..=candidates.last {
            let steps = candidates.first + candidates.step * f32::from(k) + candidates.most;
            inverse = Lanes::all(simd, steps) / (greatest - min);
            let (mut sum_l, mut sum_l2, mut sum_xl) = (zero, zero, zero);
            let mut levels = [zero; N];
            for ((&x, &w), level) in x.iter().zip(&weights).zip(&mut levels) {
                let l = (inverse * (x - min)).nearest(zero, most);
                let wl = w * l;
                sum_l = sum_l + wl;
                sum_l2 = sum_l2 + wl * l;
                sum_xl = sum_xl + wl * x;
                *level = l;
            }
            let determinant = sum_w * sum_l2 - sum_l * sum_l;
            let this_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant;
            let this_min = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
            let above = this_min.greater(zero);
            let this_scale = above.select(sum_xl / sum_l2, this_scale);
            let this_min = above.select(zero, this_min);
            let mut this_error = zero;
            for ((&x, &w), &l) in x.iter().zip(&weights).zip(&levels) {
                this_error = this_error + w * L::of(this_scale * l + this_min - x);
            }
            let better = determinant.greater(zero).and(this_error.less(error));
            rounded_with.0 = better.select(inverse, rounded_with.0);
            rounded_with.1 = better.select(min, rounded_with.1);
            error = better.select(this_error, error);
            scale = better.select(this_scale, scale);
            min = better.select(this_min, min);
        }
        flat.select(zero, scale).store(&mut found.scales, register);
        (-flat.select(flat_min, min)).store(&mut found.minimums, register);
        for (&x, row) in x.iter().zip(&mut found.levels) {
            let l = (rounded_with.0 * (x - rounded_with.1)).nearest(zero, most);
            flat.select(zero, l).store(row, register);
        }
    }
    found
}

/// Scales for which levels from -32 to 31 have the least squared error, weighted by the squared value: `make_qx_quants` as Q6_K calls
/// it. Levels are given with 32 added, or 0 for a sub-block of zeros.
///
/// Candidates map the value that is farthest from 0 to -31.1 to -32.9; each takes the scale that fits its levels best.
#[inline(always)]
pub(super) fn of_q6<S: Simd>(simd: S, columns: &Columns<16>) -> Found<16> {
    let mut found = Found {
        scales: [0.0; GROUP],
        minimums: [0.0; GROUP],
        levels: [[0.0; GROUP]; 16],
    };
    for register in 0..GROUP / S::F32_LANES {
        let zero = Lanes::all(simd, 0.0);
        let (least, most) = (Lanes::all(simd, -32.0), Lanes::all(simd, 31.0));
        let x = load(simd, columns, register);
        let (magnitude, farthest) = farthest(simd, &x);
        let zeros = magnitude.less(Lanes::all(simd, ALL_ZERO));
        let mut rounded_with = Lanes::all(simd, -32.0) / farthest;
        let (sum_lx, sum_l2) = weighted_sums(simd, &x, rounded_with, least, most);
        let mut scale = sum_l2.equal(zero).select(zero, sum_lx / sum_l2);
        let mut best = scale * sum_lx;
        for k in (-9_i8..=9).filter(|&k| k != 0) {
            let inverse = Lanes::all(simd, -(32.0 + 0.1 * f32::from(k))) / farthest;
            let (sum_lx, sum_l2) = weighted_sums(simd, &x, inverse, least, most);
            let more = (sum_lx * sum_lx).greater(best * sum_l2);
            let better = sum_l2.greater(zero).and(more);
            rounded_with = better.select(inverse, rounded_with);
            scale = better.select(sum_lx / sum_l2, scale);
            best = better.select(scale * sum_lx, best);
        }
        zeros.select(zero, scale).store(&mut found.scales, register);
        for (&x, row) in x.iter().zip(&mut found.levels) {
            let l = (rounded_with * x).nearest(least, most) - least;
            zeros.select(zero, l).store(row, register);
        }
    }
    found
}

/// Scales for which levels from -4 to 3 have the least squared error, weighted by the squared value: `make_q3_quants`. Levels are given
/// with 4 added, or 0 for a sub-block of zeros.
///
/// Starts from the scale that maps the value farthest from 0 to -4, then moves one value after the other to the level that is best for
/// the scale that the others ask for, up to five times round. A round that changes nothing in a lane is followed by others like it, so
/// all lanes may go on until none changes.
#[inline(always)]
pub(super) fn of_q3<S: Simd>(simd: S, columns: &Columns<16>) -> Found<16> {
    let mut found = Found {
        scales: [0.0; GROUP],
        minimums: [0.0; GROUP],
        levels: [[0.0; GROUP]; 16],
    };
    for register in 0..GROUP / S::F32_LANES {
        let zero = Lanes::all(simd, 0.0);
        let (least, most) = (Lanes::all(simd, -4.0), Lanes::all(simd, 3.0));
        let x = load(simd, columns, register);
        let (magnitude, farthest) = farthest(simd, &x);
        let zeros = magnitude.less(Lanes::all(simd, ALL_ZERO));

        let inverse = least / farthest;
        let mut levels = [zero; 16];
        let (mut sum_lx, mut sum_l2) = (zero, zero);
        for (&x, level) in x.iter().zip(&mut levels) {
            let l = (inverse * x).nearest(least, most);
            *level = l;
            let w = x * x;
            sum_lx = sum_lx + w * x * l;
            sum_l2 = sum_l2 + w * l * l;
        }
        for _ in 0..5 {
            let mut changed = false;
            for (&x, level) in x.iter().zip(&mut levels) {
                let (w, l) = (x * x, *level);
                let others_lx = sum_lx - w * x * l;
                let others_l2 = sum_l2 - w * l * l;
                let new = (x * others_l2 / others_lx).nearest(least, most);
                let other = others_lx.greater(zero).and_not(new.equal(l));
                if !other.any() {
                    continue;
                }
                let new_lx = others_lx + w * x * new;
                let new_l2 = others_l2 + w * new * new;
                let more = (new_lx * new_lx * sum_l2).greater(sum_lx * sum_lx * new_l2);
                let better = other.and(new_l2.greater(zero)).and(more);
                changed |= better.any();
                *level = better.select(new, l);
                sum_lx = better.select(new_lx, sum_lx);
                sum_l2 = better.select(new_l2, sum_l2);
            }
            if !changed {
                break;
            }
        }
        let scale = sum_l2.greater(zero).select(sum_lx / sum_l2, zero);
        zeros.select(zero, scale).store(&mut found.scales, register);
        for (&l, row) in levels.iter().zip(&mut found.levels) {
            zeros.select(zero, l - least).store(row, register);
        }
    }
    found
}

/// The lanes of one register.
#[inline(always)]
fn load<S: Simd, const N: usize>(simd: S, columns: &Columns<N>, register: usize) -> [Lanes<S>; N] {
    let mut x = [Lanes::all(simd, 0.0); N];
    for (x, row) in x.iter_mut().zip(columns) {
        *x = Lanes::load(simd, row, register);
    }
    x
}

/// Sums of `x * level` and of `level * level` over the values, weighted by their squares, where levels are `inverse * x` rounded.
#[inline(always)]
fn weighted_sums<S: Simd>(
    simd: S,
    x: &[Lanes<S>; 16],
    inverse: Lanes<S>,
    least: Lanes<S>,
    most: Lanes<S>,
) -> (Lanes<S>, Lanes<S>) {
    let (mut sum_lx, mut sum_l2) = (Lanes::all(simd, 0.0), Lanes::all(simd, 0.0));
    for &x in x {
        let l = (inverse * x).nearest(least, most);
        let w = x * x;
        sum_lx = sum_lx + w * x * l;
        sum_l2 = sum_l2 + w * l * l;
    }
    (sum_lx, sum_l2)
}

/// The largest magnitude, and the first value that has it, with its sign.
#[inline(always)]
fn farthest<S: Simd, const N: usize>(simd: S, x: &[Lanes<S>; N]) -> (Lanes<S>, Lanes<S>) {
    let (mut magnitude, mut farthest) = (Lanes::all(simd, 0.0), Lanes::all(simd, 0.0));
    for &x in x {
        let farther = x.abs().greater(magnitude);
        magnitude = farther.select(x.abs(), magnitude);
        farthest = farther.select(x, farthest);
    }
    (magnitude, farthest)
}

/// Magnitudes below this are taken for zeros: llama.cpp's `GROUP_MAX_EPS`.
pub(super) const ALL_ZERO: f32 = 1e-15;
