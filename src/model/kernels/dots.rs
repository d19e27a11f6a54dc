//! Dot products of a few rows with a few others, side by side so that each row is loaded once for several products.
//!
//! Each product is summed in an order that depends on the rows' length alone, so it has the same bits whatever is computed beside it.

use pulp::Simd;

use super::LANES;

/// The products of rows of one length, `w` with `x`.
///
/// By `simd`'s own registers, and plain loops, which the compiler unrolls: of several sums side by side it makes no vectors itself. Where a register is narrower than [`LANES`],
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
    let count = even / S::F32_LANES;
    let mut w_registers: [&[S::f32s]; W] = [&[]; W];
    let mut x_registers: [&[S::f32s]; X] = [&[]; X];
    for j in 0..W {
        w_registers[j] = &S::as_simd_f32s(&w[j][..even]).0[..count];
    }
    for i in 0..X {
        x_registers[i] = &S::as_simd_f32s(&x[i][..even]).0[..count];
    }
    let mut lanes = [[[0.0f32; LANES]; X]; W];
    for part in 0..parts {
        let mut sums = [[simd.splat_f32s(0.0); X]; W];
        let mut at = part;
        while at < count {
            for j in 0..W {
                for i in 0..X {
                    let product = simd.mul_f32s(w_registers[j][at], x_registers[i][at]);
                    sums[j][i] = simd.add_f32s(sums[j][i], product);
                }
            }
            at += parts;
        }
        for j in 0..W {
            for i in 0..X {
                S::as_mut_simd_f32s(&mut lanes[j][i]).0[part] = sums[j][i];
            }
        }
    }
    let mut products = [[0.0; X]; W];
    for j in 0..W {
        for i in 0..X {
            let rest = w[j][even..].iter().zip(&x[i][even..length]);
            products[j][i] = folded(&lanes[j][i]) + rest.map(|(w, x)| w * x).sum::<f32>();
        }
    }
    products
}

/// The sum of all lanes, by halves, which are added as vectors.
#[inline(always)]
fn folded(lanes: &[f32; LANES]) -> f32 {
    let mut eight = [0.0; 8];
    let mut four = [0.0; 4];
    for i in 0..8 {
        eight[i] = lanes[i] + lanes[i + 8];
    }
    for i in 0..4 {
        four[i] = eight[i] + eight[i + 4];
    }
    (four[0] + four[2]) + (four[1] + four[3])
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
