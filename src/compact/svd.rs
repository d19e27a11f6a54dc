//! The largest singular values of a matrix, and their vectors.
//!
//! Subspace iteration from random vectors: a few more vectors than wanted are multiplied by the matrix and its transpose in turn,
//! and made orthogonal in between, until the energy of the matrix inside their span stops growing. What is left is small, and
//! decomposed exactly. Sources: Halko, Martinsson and Tropp, "Finding structure with randomness", SIAM Review 53 (2011),
//! algorithm 4.4; for the small part, one-sided Jacobi rotations, Golub and Van Loan, "Matrix Computations", section 8.6.3.
//!
//! The products, which are nearly all of the work, are this crate's own in `f32`. The small part is written out here, in `f64`:
//! it takes no more lines than to convert to and from a linear algebra crate and to see that its result does not depend on
//! threads, and such a crate brings a dozen others. nalgebra is the second opinion in the tests.

use std::borrow::Cow;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use rand_distr::{Distribution, StandardNormal};

use crate::model::matmul::{Matrix, MatrixMut, Output, Threads, matmul};

/// Singular values, descending, with as many vectors of either side.
#[derive(Clone, Debug)]
pub(super) struct Svd {
    singular: Vec<f64>,
    /// Of the rows: each as long as there are rows.
    left: Vec<Vec<f64>>,
    /// Of the columns.
    right: Vec<Vec<f64>>,
}

/// A matrix of `rows` x `columns`, as it is held.
#[derive(Clone, Copy, Debug)]
pub(super) enum Operand<'a> {
    /// By all values, row-major.
    Dense(&'a [f32]),
    /// As the product `b a`: `a` of any number of rows, `b` of as many columns.
    Product { a: &'a [f32], b: &'a [f32] },
}

/// The `rank` largest singular values of `matrix`, rows x columns, or all when there are fewer. On the calling thread.
pub(super) fn truncated(matrix: Operand<'_>, rows: usize, columns: usize, rank: usize) -> Svd {
    let rank = rank.min(rows).min(columns);
    let width = (rank + SPARE_VECTORS).min(rows).min(columns);
    if width == 0 {
        return Svd {
            singular: Vec::new(),
            left: Vec::new(),
            right: Vec::new(),
        };
    }
    let (factors, scale) = scaled_factors(matrix);
    let matrix = Chain::new(&factors, rows, columns);

    let generator = ChaCha8Rng::seed_from_u64(SEED);
    let random: Vec<f32> = StandardNormal
        .sample_iter(generator)
        .take(width * columns)
        .collect();
    let mut left = Span::orthogonal(&matrix.transposed_times(&random, width), rows).0;
    let mut images = matrix.times(&left.narrow(), width);
    let mut inside = squared(&images);
    for _ in 0..MOST_ROUNDS {
        let right = Span::orthogonal(&images, columns).0;
        left = Span::orthogonal(&matrix.transposed_times(&right.narrow(), width), rows).0;
        images = matrix.times(&left.narrow(), width);
        let gained = squared(&images) - inside;
        inside += gained;
        if gained <= ENOUGH * inside {
            break;
        }
    }

    // images = triangle right, and so matrix = left images = left (turned small)^T right.
    let (right, triangle) = Span::orthogonal(&images, columns);
    let (small, turned) = jacobi(triangle);
    let mut order: Vec<usize> = (0..width).collect();
    let lengths: Vec<f64> = small.iter().map(|x| dot(x, x).sqrt()).collect();
    order.sort_by(|&a, &b| lengths[b].total_cmp(&lengths[a]));
    order.truncate(rank);
    Svd {
        singular: order.iter().map(|&place| lengths[place] * scale).collect(),
        left: order
            .iter()
            .map(|&place| left.combined(&turned[place], 1.0))
            .collect(),
        right: order
            .iter()
            .map(|&place| right.combined(&small[place], lengths[place]))
            .collect(),
    }
}

impl Svd {
    /// The singular values, descending.
    pub(super) fn singular(&self) -> &[f64] {
        &self.singular
    }

    /// `A`, rank x columns, and `B`, rows x rank, whose product `B A` is the matrix of these singular values.
    pub(super) fn factors(&self) -> (Vec<f32>, Vec<f32>) {
        let roots: Vec<f64> = self.singular.iter().map(|it| it.sqrt()).collect();
        let a = roots
            .iter()
            .zip(&self.right)
            .flat_map(|(root, right)| right.iter().map(move |x| narrow(root * x)))
            .collect();
        let rows = self.left.first().map_or(0, Vec::len);
        let b = (0..rows)
            .flat_map(|row| {
                let columns = roots.iter().zip(&self.left);
                columns.map(move |(root, left)| narrow(root * left[row]))
            })
            .collect();
        (a, b)
    }
}

/// Orthogonal vectors of length 1, or of length 0 where there are not enough directions.
struct Span {
    vectors: Vec<Vec<f64>>,
}

impl Span {
    /// The span of `vectors`, each `length` long, and the triangle that makes them of it: vector `j` is the sum over `i` of
    /// `triangle[j][i]` times the span's vector `i`. Gram and Schmidt's method, twice over, which makes up for rounding.
    fn orthogonal(vectors: &[f32], length: usize) -> (Self, Vec<Vec<f64>>) {
        let count = vectors.len() / length;
        let mut done: Vec<Vec<f64>> = Vec::with_capacity(count);
        let mut triangle = Vec::with_capacity(count);
        for vector in vectors.chunks(length) {
            let mut vector: Vec<f64> = vector.iter().map(|&x| f64::from(x)).collect();
            let before = dot(&vector, &vector).sqrt();
            let mut parts = vec![0.0; count];
            for _ in 0..2 {
                for (part, other) in parts.iter_mut().zip(&done) {
                    let along = dot(&vector, other);
                    *part += along;
                    add(&mut vector, -along, other);
                }
            }
            let after = dot(&vector, &vector).sqrt();
            let kept = after > NOTHING * before;
            if kept {
                parts[done.len()] = after;
            }
            let factor = if kept { 1.0 / after } else { 0.0 };
            vector.iter_mut().for_each(|x| *x *= factor);
            done.push(vector);
            triangle.push(parts);
        }
        (Self { vectors: done }, triangle)
    }

    /// The vectors one after the other, as products take them.
    fn narrow(&self) -> Vec<f32> {
        self.vectors.iter().flatten().map(|&x| narrow(x)).collect()
    }

    /// The sum of the vectors, each times its part, over `length`; zero where that is.
    fn combined(&self, parts: &[f64], length: f64) -> Vec<f64> {
        let mut sum = vec![0.0; self.vectors.first().map_or(0, Vec::len)];
        if length > 0.0 {
            for (vector, part) in self.vectors.iter().zip(parts) {
                add(&mut sum, part / length, vector);
            }
        }
        sum
    }
}

/// Turns `vectors`, as many as they are long, until they are orthogonal. Returns them and the turn, whose vectors are orthogonal and
/// of length 1: turned vector `j` is the sum over `i` of `turn[j][i]` times vector `i`.
fn jacobi(mut vectors: Vec<Vec<f64>>) -> (Vec<Vec<f64>>, Vec<Vec<f64>>) {
    let count = vectors.len();
    let mut turn: Vec<Vec<f64>> = (0..count)
        .map(|place| {
            let mut unit = vec![0.0; count];
            unit[place] = 1.0;
            unit
        })
        .collect();
    for _ in 0..MOST_SWEEPS {
        let mut turned = false;
        for second in 1..count {
            let (before, after) = vectors.split_at_mut(second);
            let (turn_before, turn_after) = turn.split_at_mut(second);
            for first in 0..second {
                let (x, y) = (&mut before[first], &mut after[0]);
                let (of_x, of_y, both) = (dot(x, x), dot(y, y), dot(x, y));
                if both.abs() <= ORTHOGONAL * (of_x * of_y).sqrt() {
                    continue;
                }
                turned = true;
                let cotangent = (of_y - of_x) / (2.0 * both);
                let tangent = cotangent.signum() / (cotangent.abs() + cotangent.hypot(1.0));
                let cosine = 1.0 / tangent.hypot(1.0);
                rotate(x, y, cosine, cosine * tangent);
                rotate(
                    &mut turn_before[first],
                    &mut turn_after[0],
                    cosine,
                    cosine * tangent,
                );
            }
        }
        if !turned {
            break;
        }
    }
    (vectors, turn)
}

fn rotate(x: &mut [f64], y: &mut [f64], cosine: f64, sine: f64) {
    for (x, y) in x.iter_mut().zip(y) {
        (*x, *y) = (cosine * *x - sine * *y, sine * *x + cosine * *y);
    }
}

/// A matrix as the product of one or two, left to right.
struct Chain<'a> {
    rows: usize,
    columns: usize,
    first: Matrix<'a>,
    /// With the number of its rows.
    second: Option<(Matrix<'a>, usize)>,
}

impl<'a> Chain<'a> {
    fn new(factors: &'a [Cow<'_, [f32]>], rows: usize, columns: usize) -> Self {
        match factors {
            [b, a] => {
                let inner = a.len() / columns;
                Self {
                    rows,
                    columns,
                    first: Matrix::new(b, rows, inner),
                    second: Some((Matrix::new(a, inner, columns), inner)),
                }
            }
            _ => Self {
                rows,
                columns,
                first: Matrix::new(&factors[0], rows, columns),
                second: None,
            },
        }
    }

    /// `count` vectors, one after the other, each as long as there are rows, times the matrix.
    fn times(&self, vectors: &[f32], count: usize) -> Vec<f32> {
        match self.second {
            None => product(vectors, count, self.first, self.columns),
            Some((second, inner)) => {
                let between = product(vectors, count, self.first, inner);
                product(&between, count, second, self.columns)
            }
        }
    }

    /// `count` vectors, each as long as there are columns, times the matrix's transpose.
    fn transposed_times(&self, vectors: &[f32], count: usize) -> Vec<f32> {
        match self.second {
            None => product(vectors, count, self.first.t(), self.rows),
            Some((second, inner)) => {
                let between = product(vectors, count, second.t(), inner);
                product(&between, count, self.first.t(), self.rows)
            }
        }
    }
}

/// `count` vectors, one after the other, each times `matrix` of `columns`.
fn product(vectors: &[f32], count: usize, matrix: Matrix<'_>, columns: usize) -> Vec<f32> {
    let mut images = vec![0.0; count * columns];
    matmul(
        MatrixMut::new(&mut images, count, columns),
        Output::Overwrite,
        1.0,
        Matrix::new(vectors, count, vectors.len() / count),
        matrix,
        Threads::One,
    );
    images
}

/// The factors of the matrix from left to right, of sizes whose products stay in `f32`, and what their product was divided by.
fn scaled_factors(matrix: Operand<'_>) -> (Vec<Cow<'_, [f32]>>, f64) {
    let factors = match matrix {
        Operand::Dense(values) => vec![values],
        Operand::Product { a, b } => vec![b, a],
    };
    let mut scale = 1.0;
    let factors = factors
        .into_iter()
        .map(|factor| {
            let (factor, divisor) = scaled(factor);
            scale *= divisor;
            factor
        })
        .collect();
    (factors, scale)
}

/// Runs `work` compiled for the best instruction set that the processor has.
fn simd<R>(work: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(work)
}

/// The values, divided by a power of two where products of them could leave `f32`, and that power.
fn scaled(values: &[f32]) -> (Cow<'_, [f32]>, f64) {
    let largest = values.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
    if largest == 0.0 || (1e-15..1e15).contains(&largest) {
        return (Cow::Borrowed(values), 1.0);
    }
    let scale = f64::from(largest).log2().floor().exp2();
    let scaled = values.iter().map(|&x| narrow(f64::from(x) / scale));
    (scaled.collect(), scale)
}

fn squared(values: &[f32]) -> f64 {
    values.iter().map(|&x| f64::from(x) * f64::from(x)).sum()
}

/// In interleaved partial sums, so that it can be vectorized in a fixed order.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    simd(
        #[inline(always)]
        || {
            let mut sums = [0.0; LANES];
            let (a, b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
            let rest = a.remainder().iter().zip(b.remainder());
            let rest: f64 = rest.map(|(x, y)| x * y).sum();
            for (x, y) in a.zip(b) {
                for lane in 0..LANES {
                    sums[lane] += x[lane] * y[lane];
                }
            }
            sums.iter().sum::<f64>() + rest
        },
    )
}

/// Adds `factor` times `other` to `sum`.
fn add(sum: &mut [f64], factor: f64, other: &[f64]) {
    simd(
        #[inline(always)]
        || {
            for (sum, other) in sum.iter_mut().zip(other) {
                *sum += factor * other;
            }
        },
    );
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "a perturbation is stored in f32"
)]
fn narrow(value: f64) -> f32 {
    value as f32
}

/// Vectors beyond those wanted. Halko et al. advise 5 to 10; with 16 the wanted ones settle in fewer rounds.
const SPARE_VECTORS: usize = 16;

/// Rounds of two products at most; only where singular values hardly decay are they used up, and there little is lost.
const MOST_ROUNDS: usize = 20;

/// A round that gains less than this share of the energy inside the span is the last.
const ENOUGH: f64 = 1e-6;

/// What is left of a vector when only the rounding of `f64` is.
const NOTHING: f64 = 1e-12;

/// A cosine that counts as a right angle.
const ORTHOGONAL: f64 = 1e-13;

/// Sweeps over all pairs at most; they converge quadratically, in 6 to 10.
const MOST_SWEEPS: usize = 40;

/// Partial sums of a reduction: two AVX-512 registers.
const LANES: usize = 16;

/// Of the first vectors. Any will do; the same every time gives the same bits.
const SEED: u64 = 0;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optimize::gaussian;

    /// Singular values by nalgebra, in `f64`.
    fn second_opinion(values: &[f32], rows: usize, columns: usize) -> Vec<f64> {
        let values = values.iter().map(|&x| f64::from(x));
        let matrix = nalgebra::DMatrix::from_row_iterator(rows, columns, values);
        matrix.singular_values().iter().copied().collect()
    }

    fn random(rows: usize, columns: usize, seed: u64) -> Vec<f32> {
        gaussian(&[rows * columns], seed, 1.0).tensor(0).to_vec()
    }

    /// A matrix whose singular values fall by half from one to the next, about: a sum of products of random vectors.
    fn decaying(rows: usize, columns: usize) -> Vec<f32> {
        let mut matrix = vec![0.0; rows * columns];
        let mut size = 1.0;
        for seed in 0..24 {
            let (left, right) = (random(rows, 1, seed), random(columns, 1, 100 + seed));
            for (row, left) in matrix.chunks_mut(columns).zip(&left) {
                for (value, right) in row.iter_mut().zip(&right) {
                    *value += size * left * right;
                }
            }
            size /= 2.0;
        }
        matrix
    }

    #[test]
    fn singular_values_agree_with_nalgebra() {
        for (rows, columns, rank) in [
            (90, 60, 12),
            (60, 90, 12),
            (200, 5, 5),
            (1, 40, 3),
            (33, 33, 33),
        ] {
            let values = decaying(rows, columns);
            let wanted = second_opinion(&values, rows, columns);
            let found = truncated(Operand::Dense(&values), rows, columns, rank);
            assert_eq!(found.singular.len(), rank.min(rows).min(columns));
            for (place, (found, wanted)) in found.singular.iter().zip(&wanted).enumerate() {
                // Products are in f32, whose rounding is relative to the largest value.
                let error = (found - wanted).abs();
                assert!(
                    error < 1e-6 * wanted.max(1.0),
                    "{rows} x {columns}, {place}: {found} {wanted}"
                );
            }
        }
    }

    #[test]
    fn a_flat_spectrum_is_found_within_a_hundredth_of_its_energy() {
        let values = random(160, 120, 9);
        let wanted: f64 = second_opinion(&values, 160, 120)[..8]
            .iter()
            .map(|s| s * s)
            .sum();
        let found: f64 = truncated(Operand::Dense(&values), 160, 120, 8)
            .singular
            .iter()
            .map(|s| s * s)
            .sum();
        assert!(found <= wanted * (1.0 + 1e-6), "{found} {wanted}");
        assert!(found >= 0.99 * wanted, "{found} {wanted}");
    }

    #[test]
    fn vectors_are_orthogonal_and_give_the_matrix_back() {
        let (rows, columns) = (40, 30);
        let values = random(rows, columns, 4);
        let svd = truncated(Operand::Dense(&values), rows, columns, 30);
        for vectors in [&svd.left, &svd.right] {
            for (i, x) in vectors.iter().enumerate() {
                for (j, y) in vectors.iter().enumerate() {
                    let wanted = if i == j { 1.0 } else { 0.0 };
                    assert!((dot(x, y) - wanted).abs() < 1e-6, "{i} {j}");
                }
            }
        }
        let (a, b) = svd.factors();
        for row in 0..rows {
            for column in 0..columns {
                let found: f32 = (0..30)
                    .map(|k| b[row * 30 + k] * a[k * columns + column])
                    .sum();
                assert!((found - values[row * columns + column]).abs() < 1e-6);
            }
        }
    }

    #[test]
    fn a_matrix_of_lower_rank_has_zeros_behind_it() {
        let (left, right) = (random(50, 1, 1), random(20, 1, 2));
        let values: Vec<f32> = left
            .iter()
            .flat_map(|x| right.iter().map(move |y| x * y))
            .collect();
        let svd = truncated(Operand::Dense(&values), 50, 20, 4);
        assert!((svd.singular[0] - 1.0).abs() < 1e-6, "{:?}", svd.singular);
        assert!(svd.singular[1] < 1e-6, "{:?}", svd.singular);
        let (a, b) = svd.factors();
        assert!(a.iter().chain(&b).all(|x| x.is_finite()));
    }

    #[test]
    fn a_product_has_the_singular_values_of_its_expansion() {
        let (rows, columns, inner) = (30, 50, 7);
        let (a, b) = (random(inner, columns, 1), random(rows, inner, 2));
        let mut values = vec![0.0; rows * columns];
        for (place, value) in values.iter_mut().enumerate() {
            let (row, column) = (place / columns, place % columns);
            *value = (0..inner)
                .map(|k| b[row * inner + k] * a[k * columns + column])
                .sum();
        }
        let wanted = second_opinion(&values, rows, columns);
        let found = truncated(Operand::Product { a: &a, b: &b }, rows, columns, 9);
        for (found, wanted) in found.singular.iter().zip(&wanted) {
            assert!((found - wanted).abs() < 1e-6, "{found} {wanted}");
        }
    }

    #[test]
    fn sizes_at_the_ends_of_f32_are_scaled() {
        for size in [1e-44_f32, 1e-30, 3e37] {
            let values: Vec<f32> = (0..12_u8)
                .map(|i| if i % 5 == 0 { size } else { 0.0 })
                .collect();
            let svd = truncated(Operand::Dense(&values), 3, 4, 3);
            for singular in &svd.singular {
                assert!(
                    (singular / f64::from(size) - 1.0).abs() < 1e-6,
                    "{size:e}: {svd:?}"
                );
            }
        }
        assert_eq!(
            truncated(Operand::Dense(&[0.0; 6]), 2, 3, 2).singular,
            [0.0, 0.0]
        );
        assert!(truncated(Operand::Dense(&[]), 0, 3, 2).singular.is_empty());
    }
}
