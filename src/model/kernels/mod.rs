//! Fused parallel CPU kernels, each a forward and the backward that was derived from it by hand.
//!
//! In and out: f32 slices whose layout each function states. Parallel loops hand every thread whole rows, heads or
//! sequences and each output element is computed by one of them, so results do not depend on the number of threads.
//!
//! Loops are written so that the compiler vectorizes them, and run through [`simd`], which picks the widest instruction
//! set the processor has. Only additions and multiplications in a fixed order are used, no fused multiply-add, so the
//! kernels here give the same bits on every instruction set.

pub(crate) mod attention;
pub(crate) mod cached;
pub(crate) mod dots;
pub(crate) mod glu;
pub(crate) mod norm;
pub(crate) mod rope;

/// Runs `work`, compiled once for each supported instruction set, on the best of them.
///
/// A closure is only compiled for them if it is inlined, which a long one is not by itself: say `simd(#[inline(always)] || ...)`.
#[inline]
pub(crate) fn simd<R>(work: impl FnMut() -> R) -> R {
    /// Called by reference, because what calls a closure by value is a function of its own, which is not inlined.
    struct Work<F>(F);
    impl<R, F: FnMut() -> R> pulp::WithSimd for Work<F> {
        type Output = R;

        #[inline(always)]
        fn with_simd<S: pulp::Simd>(mut self, _: S) -> R {
            (self.0)()
        }
    }
    pulp::Arch::new().dispatch(Work(work))
}

/// How many partial sums a reduction keeps, so that it can be vectorized in a fixed order: one AVX-512 register.
const LANES: usize = 16;

/// Sum over `i` of `a[i] * b[i]`, in [`LANES`] interleaved partial sums.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; LANES];
    let (a, b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest: f32 = a
        .remainder()
        .iter()
        .zip(b.remainder())
        .map(|(x, y)| x * y)
        .sum();
    for (x, y) in a.zip(b) {
        for lane in 0..LANES {
            sums[lane] += x[lane] * y[lane];
        }
    }
    sums.iter().sum::<f32>() + rest
}

/// Largest element of `x`, or negative infinity when it is empty.
#[inline(always)]
pub(crate) fn max(x: &[f32]) -> f32 {
    let mut tops = [f32::NEG_INFINITY; LANES];
    let chunks = x.chunks_exact(LANES);
    let rest = chunks
        .remainder()
        .iter()
        .copied()
        .fold(f32::NEG_INFINITY, f32::max);
    for chunk in chunks {
        for lane in 0..LANES {
            tops[lane] = if chunk[lane] > tops[lane] {
                chunk[lane]
            } else {
                tops[lane]
            };
        }
    }
    tops.iter().copied().fold(rest, f32::max)
}

/// e^x for f32, within 2 units in the last place on [-87, 88]; below, it stays at e^-87 = 1.65e-38.
///
/// Branch-free, so that loops over it vectorize: x = n ln 2 + r with |r| <= ln 2 / 2, e^r by a polynomial of degree 6,
/// 2^n by building the exponent bits. Coefficients: Cephes `expf` (Moshier, netlib.org/cephes).
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    /// 1.5 * 2^23: adding it rounds to an integer, which then sits in the low bits.
    const ROUND: f32 = 12_582_912.0;
    const LN_2_HIGH: f32 = 355.0 / 512.0;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let x = if x < -87.0 { -87.0 } else { x };
    let x = if x > 88.0 { 88.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * LN_2_HIGH - n * LN_2_LOW;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.5;
    let e_r = p * r * r + r + 1.0;
    let two_to_n = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    e_r * two_to_n
}

/// tanh x for f32, within 8 units in the last place; branch-free, an odd polynomial over an even one.
///
/// Beyond 7.9 it is 1 to the last bit. Coefficients: the rational approximation of Eigen (`generic_fast_tanh_float`).
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    const LIMIT: f32 = 7.905_311;
    let x = if x < -LIMIT { -LIMIT } else { x };
    let x = if x > LIMIT { LIMIT } else { x };
    let square = x * x;
    let mut p = -2.760_768_5e-16;
    p = p * square + 2.000_188e-13;
    p = p * square - 8.604_672e-11;
    p = p * square + 5.122_297e-8;
    p = p * square + 1.485_722_4e-5;
    p = p * square + 6.372_619_3e-4;
    p = p * square + 4.893_524_6e-3;
    let mut q = 1.198_258_4e-6;
    q = q * square + 1.185_347_1e-4;
    q = q * square + 2.268_434_7e-3;
    q = q * square + 4.893_525e-3;
    x * p / q
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tanh_is_within_eight_units_in_the_last_place() {
        let mut x = -12.0f32;
        while x < 12.0 {
            let want = f64::from(x).tanh();
            let error = (f64::from(tanh(x)) - want).abs() / want.abs();
            assert!(
                error < 8.0 * f64::from(f32::EPSILON),
                "tanh({x}) is off by {error:e}"
            );
            x += 0.003_17;
        }
        assert_eq!(tanh(0.0), 0.0);
        assert!(tanh(f32::NAN).is_nan());
    }

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        let mut x = -87.0f32;
        while x < 88.0 {
            let want = f64::from(x).exp();
            let error = (f64::from(exp(x)) - want).abs() / want;
            assert!(
                error < 2.0 * f64::from(f32::EPSILON),
                "exp({x}) is off by {error:e}"
            );
            x += 0.0137;
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), exp(-87.0));
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn reductions_handle_lengths_that_are_no_multiple_of_the_lanes() {
        let x: Vec<f32> = (0u8..37).map(f32::from).collect();
        assert_eq!(dot(&x, &x), 16206.0);
        assert_eq!(max(&x), 36.0);
        assert_eq!(max(&x[..3]), 2.0);
        assert_eq!(max(&[]), f32::NEG_INFINITY);
    }
}
