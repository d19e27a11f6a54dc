//! Dot products of a few rows with a few others, side by side so that each row is loaded once for several products.
//!
//! Each product is summed in an order that depends on the rows' length alone, so it has the same bits whatever is computed beside it.

use pulp::Simd;

use super::LANES;

/// The products of rows of one length, `w` with `x`.
///
/// By `simd`'s own registers: of several sums side by side the compiler makes no vectors. Where a register is narrower than [`LANES`],
/// the rows are passed several times, so that the sums are the same.
#[inline(always)]
pub(crate) fn dots<S: Simd, const W: usize, const X: usize>(
    simd: S,
    w: [&[f32]; W],
    x: [&[f32]; X],
) -> [[f32; X]; W] {
    let length = w[0].len();
    let even = length - length % LANES;
    let parts = LANES / S::F32_LANES;
    let w_registers = w.map(|row| S::as_simd_f32s(&row[..even]).0);
    let x_registers = x.map(|row| S::as_simd_f32s(&row[..even]).0);
    let mut lanes = [[[0.0f32; LANES]; X]; W];
    for part in 0..parts {
        let mut sums = [[simd.splat_f32s(0.0); X]; W];
        for at in (part..even / S::F32_LANES).step_by(parts) {
            let x = x_registers.map(|row| row[at]);
            for (w, sums) in w_registers.iter().zip(&mut sums) {
                for (sum, x) in sums.iter_mut().zip(x) {
                    *sum = simd.add_f32s(*sum, simd.mul_f32s(w[at], x));
                }
            }
        }
        for (sums, lanes) in sums.iter().zip(&mut lanes) {
            for (sum, lanes) in sums.iter().zip(lanes) {
                S::as_mut_simd_f32s(lanes).0[part] = *sum;
            }
        }
    }
    let mut products = [[0.0; X]; W];
    for (j, products) in products.iter_mut().enumerate() {
        for (i, product) in products.iter_mut().enumerate() {
            let rest = w[j][even..].iter().zip(&x[i][even..length]);
            *product = folded(lanes[j][i]) + rest.map(|(w, x)| w * x).sum::<f32>();
        }
    }
    products
}

/// The sum of all lanes, by halves, which are added as vectors.
#[inline(always)]
fn folded(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All products of `rows`, together or each by itself, on the instruction set that is found or with no vectors at all.
    struct Products<'r> {
        rows: &'r [Vec<f32>],
        together: bool,
    }

    impl pulp::WithSimd for Products<'_> {
        type Output = [[f32; 4]; 4];

        fn with_simd<S: Simd>(self, simd: S) -> Self::Output {
            let row = |i: usize| self.rows[i].as_slice();
            if self.together {
                let w: [&[f32]; 4] = std::array::from_fn(row);
                return dots(simd, w, std::array::from_fn::<_, 4, _>(|i| row(4 + i)));
            }
            let alone = |j: usize, i: usize| dots(simd, [row(j)], [row(4 + i)])[0][0];
            std::array::from_fn(|j| std::array::from_fn(|i| alone(j, i)))
        }
    }

    #[test]
    fn a_product_has_the_same_bits_beside_others_and_on_every_instruction_set() {
        for length in [1, 15, 16, 37, 576] {
            let row = |seed: usize| -> Vec<f32> {
                let of = |i: usize| u8::try_from((i * 37 + seed * 11) % 251).expect("below 251");
                (0..length).map(|i| f32::from(of(i)) * 0.01 - 1.0).collect()
            };
            let rows: Vec<Vec<f32>> = (0..8).map(row).collect();
            let products = |together| Products {
                rows: &rows,
                together,
            };
            let found = pulp::Arch::new().dispatch(products(true));
            assert_eq!(
                found,
                pulp::Arch::new().dispatch(products(false)),
                "{length}"
            );
            assert_eq!(found, pulp::Scalar.vectorize(products(true)), "{length}");
            for (w, found) in rows[..4].iter().zip(found) {
                for (x, found) in rows[4..].iter().zip(found) {
                    let terms = w.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x));
                    let wanted: f64 = terms.sum();
                    assert!((f64::from(found) - wanted).abs() < 1e-3, "{length}");
                }
            }
        }
    }
}
