//! Dot products of a few rows with a few others, side by side so that each row is loaded once for several products.
//!
//! Each product is summed in an order that depends on the rows' length alone, so it has the same bits whatever is computed beside it.

use super::LANES;

/// The products of rows of one length, `w` with `x`.
#[inline(always)]
pub(crate) fn dots<const W: usize, const X: usize>(
    w: [&[f32]; W],
    x: [&[f32]; X],
) -> [[f32; X]; W] {
    let length = w[0].len();
    let w = w.map(|row| row[..length].as_chunks::<LANES>());
    let x = x.map(|row| row[..length].as_chunks::<LANES>());
    let chunks = length / LANES;
    let (w_chunks, x_chunks) = (w.map(|row| &row.0[..chunks]), x.map(|row| &row.0[..chunks]));
    let mut lanes = [[[0.0f32; LANES]; X]; W];
    for i in 0..chunks {
        let x = x_chunks.map(|row| row[i]);
        for (w, lanes) in w_chunks.iter().zip(&mut lanes) {
            let w = w[i];
            for (x, lanes) in x.iter().zip(lanes) {
                for lane in 0..LANES {
                    lanes[lane] += w[lane] * x[lane];
                }
            }
        }
    }
    let mut products = [[0.0; X]; W];
    for (j, products) in products.iter_mut().enumerate() {
        for (i, product) in products.iter_mut().enumerate() {
            let rest = w[j].1.iter().zip(x[i].1);
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

    #[test]
    fn a_product_has_the_same_bits_whatever_is_computed_beside_it() {
        for length in [1, 15, 16, 37, 576] {
            let row = |seed: usize| -> Vec<f32> {
                let of = |i: usize| u8::try_from((i * 37 + seed * 11) % 251).expect("below 251");
                (0..length).map(|i| f32::from(of(i)) * 0.01 - 1.0).collect()
            };
            let rows: Vec<Vec<f32>> = (0..8).map(row).collect();
            let w: [&[f32]; 4] = std::array::from_fn(|i| rows[i].as_slice());
            let x: [&[f32]; 4] = std::array::from_fn(|i| rows[4 + i].as_slice());
            let together = dots(w, x);
            for j in 0..4 {
                for i in 0..4 {
                    let [[alone]] = dots([w[j]], [x[i]]);
                    assert_eq!(alone.to_bits(), together[j][i].to_bits(), "{length}");
                    let wanted: f64 = w[j]
                        .iter()
                        .zip(x[i])
                        .map(|(w, x)| f64::from(*w) * f64::from(*x))
                        .sum();
                    assert!((f64::from(alone) - wanted).abs() < 1e-3, "{length}");
                }
            }
        }
    }
}
