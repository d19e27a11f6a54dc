//! A dense perturbation made small: low rank or sparse, with the share of its energy that is left.
//!
//! In: what is added to each target, and its shape. Out: a [`Compact`], whose tensors are [`DeltaTensor`]s like dense ones, so
//! that they are written, read and applied by the same code. *Energy* is the sum of squares; the energy kept of delta by
//! delta' is 1 - |delta - delta'|^2 / |delta|^2, computed from the compact numbers as they are stored, in `f32`, expanded as
//! they are when applied. It says how much of the perturbation is left, and not what that does to the model.
//!
//! - Low rank: for each matrix by itself, the rank that keeps most energy for its numbers, by a truncated singular value
//!   decomposition. One rank for all keeps more of some than of others: [`Compact::worst`] tells.
//! - Sparse: the largest elements of all tensors together, as few as hold the share of the energy that was asked for.
//!
//! The same inputs give the same bits on any number of threads.

mod histogram;
mod sparse;
mod svd;

use std::num::NonZeroUsize;

use panacea_formats::{DeltaTensor, Form, WidenError};
use rayon::prelude::*;
use thiserror::Error;

use crate::model::TargetTensors;

use svd::Operand;

pub use histogram::Histogram;

/// A perturbation whose tensors hold fewer numbers than they have elements.
#[derive(Clone, Debug, PartialEq)]
pub struct Compact {
    tensors: Vec<Numbers>,
    shapes: Vec<Vec<usize>>,
    kept: Vec<Kept>,
}

#[derive(Clone, Debug, PartialEq)]
enum Numbers {
    /// `a` is rank x inputs, `b` outputs x rank.
    LowRank { a: Vec<f32>, b: Vec<f32> },
    /// Elements, ascending, and their values.
    Sparse { indices: Vec<u32>, values: Vec<f32> },
}

impl Compact {
    /// The matrices of `delta`, whose shapes are `shapes`, as products of `rank` columns and rows, or of as many as a matrix can
    /// use. Each singular value goes half into either factor, by its square root, so that both are of one size.
    ///
    /// Costs some 10 products of each matrix with `rank` + 16 vectors, and memory for as many vectors of its rows and columns in
    /// `f64` on each thread. The factors come from an iteration, so a little more energy might be kept by others where singular
    /// values decay slowly; what is kept is measured, not inferred.
    ///
    /// # Errors
    /// When a tensor is no matrix with elements, or not of its shape.
    pub fn low_rank(
        delta: &TargetTensors,
        shapes: &[&[usize]],
        rank: NonZeroUsize,
    ) -> Result<Self, CompactError> {
        let matrices = matrices(delta, shapes)?;
        let tensors = matrices
            .into_par_iter()
            .map(|(values, [outputs, inputs])| {
                let (a, b) =
                    svd::truncated(Operand::Dense(values), outputs, inputs, rank.get()).factors();
                Numbers::LowRank { a, b }
            })
            .collect();
        Self::measured(delta, shapes, tensors)
    }

    /// The fewest elements of `delta`, whose shapes are `shapes`, that together hold `share` of its energy: all that are larger
    /// in magnitude than some element, and of those that equal it the first ones. A share of 1 keeps all that are not zero.
    ///
    /// # Errors
    /// When a tensor has more than 2^32 elements, or is not of its shape.
    pub fn sparse(
        delta: &TargetTensors,
        shapes: &[&[usize]],
        share: EnergyShare,
    ) -> Result<Self, CompactError> {
        let tensors = sparse::largest(delta, share.value())
            .into_iter()
            .map(|(indices, values)| Numbers::Sparse { indices, values })
            .collect();
        Self::measured(delta, shapes, tensors)
    }

    fn measured(
        delta: &TargetTensors,
        shapes: &[&[usize]],
        tensors: Vec<Numbers>,
    ) -> Result<Self, CompactError> {
        let dense: Vec<&[f32]> = delta.iter().collect();
        if dense.len() != shapes.len() {
            return Err(CompactError::Count {
                tensors: dense.len(),
                shapes: shapes.len(),
            });
        }
        let kept = (0..dense.len())
            .into_par_iter()
            .map(|place| {
                let compact = tensors
                    .get(place)
                    .and_then(|numbers| numbers.delta("", shapes[place]));
                compact
                    .and_then(|compact| Kept::of(&compact, dense[place]))
                    .ok_or_else(|| CompactError::Shape {
                        place,
                        elements: dense[place].len(),
                        shape: shapes[place].to_vec(),
                    })
            })
            .collect::<Result<_, _>>()?;
        Ok(Self {
            tensors,
            shapes: shapes.iter().map(|shape| shape.to_vec()).collect(),
            kept,
        })
    }

    /// The tensors under `names`, in the order of the shapes that they were made with.
    pub fn deltas<'a>(&'a self, names: impl IntoIterator<Item = &'a str>) -> Vec<DeltaTensor<'a>> {
        names
            .into_iter()
            .zip(self.tensors.iter().zip(&self.shapes))
            .filter_map(|(name, (numbers, shape))| numbers.delta(name, shape))
            .collect()
    }

    /// The share of the dense perturbation's energy that is kept, over all tensors.
    pub fn energy_kept(&self) -> f64 {
        let all = self.kept.iter().fold(Kept::default(), |mut all, kept| {
            all.energy += kept.energy;
            all.lost += kept.lost;
            all
        });
        all.share()
    }

    /// The place of the tensor that keeps the smallest share of its energy, and that share; nothing of no tensors.
    pub fn worst(&self) -> Option<(usize, f64)> {
        self.kept
            .iter()
            .map(Kept::share)
            .enumerate()
            .min_by(|(_, a), (_, b)| a.total_cmp(b))
    }

    /// The norm of the compact perturbation over all tensors.
    pub fn norm(&self) -> f64 {
        let squared: f64 = self.kept.iter().map(|kept| kept.squared).sum();
        squared.sqrt()
    }
}

impl Numbers {
    fn delta<'a>(&'a self, name: &'a str, shape: &'a [usize]) -> Option<DeltaTensor<'a>> {
        match self {
            Self::LowRank { a, b } => DeltaTensor::low_rank(name, shape, a, b),
            Self::Sparse { indices, values } => DeltaTensor::sparse(name, shape, indices, values),
        }
    }
}

/// The largest squared singular values of a matrix, at most `count`, descending: their running sums over the sum of squares are
/// the energy that a low-rank form of each rank would keep. Nothing of what is no matrix, and of sparse forms, which are made
/// where ranks are high.
///
/// # Errors
/// When the values cannot be read, which the types rule out.
pub fn spectrum(
    delta: &DeltaTensor<'_>,
    count: NonZeroUsize,
) -> Result<Option<Vec<f64>>, WidenError> {
    let &[rows, columns] = delta.shape() else {
        return Ok(None);
    };
    let of = |matrix| svd::truncated(matrix, rows, columns, count.get());
    let svd = match (delta.form(), delta.factors()) {
        (_, Some((a, b))) => of(Operand::Product { a: &a, b: &b }),
        (Form::Dense, None) => {
            let mut values = vec![0.0; delta.elements()];
            delta.read_into(0..values.len(), &mut values)?;
            of(Operand::Dense(&values))
        }
        _ => return Ok(None),
    };
    Ok(Some(svd.singular().iter().map(|it| it * it).collect()))
}

/// The share of the energy that a sparse form is to keep: above 0 and at most 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EnergyShare(f64);

impl EnergyShare {
    /// The share `value`; nothing when it is not above 0 and at most 1.
    pub fn new(value: f64) -> Option<Self> {
        (value > 0.0 && value <= 1.0).then_some(Self(value))
    }

    /// The share.
    pub fn value(self) -> f64 {
        self.0
    }
}

/// Sums over one tensor.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Kept {
    /// Of the dense values' squares.
    energy: f64,
    /// Of the squares of what the compact values differ by.
    lost: f64,
    /// Of the compact values' squares.
    squared: f64,
}

impl Kept {
    /// Compares `compact` with the `dense` values; nothing when they are not as many.
    fn of(compact: &DeltaTensor<'_>, dense: &[f32]) -> Option<Self> {
        if compact.elements() != dense.len() {
            return None;
        }
        let mut sums = Self::default();
        let mut block = vec![0.0; BLOCK.min(dense.len())];
        for (number, dense) in dense.chunks(BLOCK).enumerate() {
            let block = &mut block[..dense.len()];
            let start = number * BLOCK;
            compact.read_into(start..start + dense.len(), block).ok()?;
            for (&dense, &compact) in dense.iter().zip(&*block) {
                let (dense, compact) = (f64::from(dense), f64::from(compact));
                sums.energy += dense * dense;
                sums.lost += (dense - compact) * (dense - compact);
                sums.squared += compact * compact;
            }
        }
        Some(sums)
    }

    /// The share that is kept. Of a tensor of zeros nothing is lost.
    fn share(&self) -> f64 {
        match self.energy > 0.0 {
            true => 1.0 - self.lost / self.energy,
            false => 1.0,
        }
    }
}

/// Row-major values with rows and columns.
type ShapedMatrix<'a> = (&'a [f32], [usize; 2]);

/// The tensors of `delta` with their shapes, when all are matrices.
fn matrices<'a>(
    delta: &'a TargetTensors,
    shapes: &[&[usize]],
) -> Result<Vec<ShapedMatrix<'a>>, CompactError> {
    delta
        .iter()
        .zip(shapes)
        .enumerate()
        .map(|(place, (values, &shape))| match *shape {
            [rows, columns]
                if rows.checked_mul(columns) == Some(values.len()) && !values.is_empty() =>
            {
                Ok((values, [rows, columns]))
            }
            _ => Err(CompactError::Shape {
                place,
                elements: values.len(),
                shape: shape.to_vec(),
            }),
        })
        .collect()
}

/// Elements compared at once.
const BLOCK: usize = 1 << 14;

/// Why a perturbation was not made compact.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum CompactError {
    /// Not one shape for each tensor.
    #[error("there are {shapes} shapes for {tensors} tensors")]
    Count {
        /// How many tensors there are.
        tensors: usize,
        /// How many shapes there are.
        shapes: usize,
    },
    /// A tensor that the form cannot hold.
    #[error("tensor {place} has {elements} elements, and the form cannot hold the shape {shape:?}")]
    Shape {
        /// Its place among the tensors.
        place: usize,
        /// How many elements it has.
        elements: usize,
        /// Its shape.
        shape: Vec<usize>,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optimize::gaussian;

    /// A 6 x 4 matrix whose singular values are 2, 1 and 0.5: three products of orthogonal vectors of length 1.
    fn known() -> Vec<f32> {
        let left = [
            [0.5, 0.5, 0.5, 0.5, 0.0, 0.0],
            [0.5, -0.5, 0.5, -0.5, 0.0, 0.0],
            [0.0, 0.0, 0.0, 0.0, 0.6, 0.8],
        ];
        let right = [
            [0.5, 0.5, 0.5, 0.5],
            [0.5, -0.5, -0.5, 0.5],
            [0.5, 0.5, -0.5, -0.5],
        ];
        let mut matrix = vec![0.0; 24];
        for (k, singular) in [2.0, 1.0, 0.5].into_iter().enumerate() {
            for row in 0..6 {
                for column in 0..4 {
                    matrix[row * 4 + column] += singular * left[k][row] * right[k][column];
                }
            }
        }
        matrix
    }

    fn rank(rank: usize) -> NonZeroUsize {
        NonZeroUsize::new(rank).unwrap()
    }

    #[test]
    fn a_rank_keeps_the_energy_of_as_many_singular_values() {
        let delta = TargetTensors::new(vec![known()]);
        for (k, wanted) in [(1, 4.0 / 5.25), (2, 5.0 / 5.25), (3, 1.0), (9, 1.0)] {
            let compact = Compact::low_rank(&delta, &[&[6, 4]], rank(k)).unwrap();
            assert!((compact.energy_kept() - wanted).abs() < 1e-6, "rank {k}");
            assert!((compact.norm() - (5.25 * wanted).sqrt()).abs() < 1e-6);
            let stored: u64 = compact
                .deltas(["w"])
                .iter()
                .map(|it| it.stored_bytes())
                .sum();
            assert_eq!(stored, 4 * 10 * k.min(4) as u64);
        }
        let values = known();
        let dense = DeltaTensor::new("w", &[6, 4], &values).unwrap();
        let compact = Compact::low_rank(&delta, &[&[6, 4]], rank(3)).unwrap();
        for matrix in [dense, compact.deltas(["w"])[0]] {
            let squares = spectrum(&matrix, rank(9)).unwrap().unwrap();
            assert_eq!(squares.len(), 4);
            for (found, wanted) in squares.iter().zip([4.0, 1.0, 0.25, 0.0]) {
                assert!((found - wanted).abs() < 1e-6, "{squares:?}");
            }
        }
        let sparse = DeltaTensor::sparse("w", &[6, 4], &[], &[]).unwrap();
        assert_eq!(spectrum(&sparse, rank(9)), Ok(None));
        let list = DeltaTensor::new("w", &[24], &values).unwrap();
        assert_eq!(spectrum(&list, rank(9)), Ok(None));
    }

    #[test]
    fn factors_share_the_singular_value_evenly() {
        let delta = TargetTensors::new(vec![known()]);
        let compact = Compact::low_rank(&delta, &[&[6, 4]], rank(1)).unwrap();
        let (a, b) = compact.deltas(["w"])[0].factors().unwrap();
        let norm = |x: &[f32]| x.iter().map(|x| x * x).sum::<f32>().sqrt();
        assert!((norm(&a) - 2_f32.sqrt()).abs() < 1e-6);
        assert!((norm(&b) - 2_f32.sqrt()).abs() < 1e-6);
    }

    #[test]
    fn the_largest_elements_of_all_tensors_are_kept() {
        let delta = TargetTensors::new(vec![vec![3.0, 0.0, -1.0, 2.0], vec![-4.0, 1.0]]);
        let shapes: [&[usize]; 2] = [&[2, 2], &[2]];
        let entries = |share| {
            let compact =
                Compact::sparse(&delta, &shapes, EnergyShare::new(share).unwrap()).unwrap();
            let deltas = compact.deltas(["v", "w"]);
            let entries: Vec<Vec<_>> = deltas
                .iter()
                .map(|delta| delta.entries().unwrap().collect())
                .collect();
            (entries, compact.energy_kept(), compact.worst().unwrap())
        };
        // Squares: 9, 0, 1, 4 and 16, 1; 31 in all.
        let (found, kept, worst) = entries(16.0 / 31.0);
        assert_eq!(found, [vec![], vec![(0, -4.0)]]);
        assert_eq!((kept, worst), (1.0 - 15.0 / 31.0, (0, 0.0)));
        let (found, ..) = entries(16.5 / 31.0);
        assert_eq!(found, [vec![(0, 3.0)], vec![(0, -4.0)]]);
        // Of the two elements of magnitude 1, the first suffices.
        let (found, kept, worst) = entries(29.5 / 31.0);
        assert_eq!(found[0], [(0, 3.0), (2, -1.0), (3, 2.0)]);
        assert_eq!(found[1], [(0, -4.0)]);
        assert_eq!((kept, worst), (1.0 - 1.0 / 31.0, (1, 1.0 - 1.0 / 17.0)));
        let (found, kept, _) = entries(1.0);
        assert_eq!(found[1], [(0, -4.0), (1, 1.0)]);
        assert_eq!(
            (found[0].len(), kept),
            (3, 1.0),
            "only the zero is left out"
        );
    }

    #[test]
    fn a_perturbation_of_zeros_loses_nothing() {
        let delta = TargetTensors::new(vec![vec![0.0; 12]]);
        let all = EnergyShare::new(1.0).unwrap();
        for compact in [
            Compact::low_rank(&delta, &[&[3, 4]], rank(2)).unwrap(),
            Compact::sparse(&delta, &[&[3, 4]], all).unwrap(),
        ] {
            assert_eq!((compact.energy_kept(), compact.norm()), (1.0, 0.0));
            assert_eq!(compact.deltas(["w"])[0].first_not_finite(), None);
        }
    }

    #[test]
    fn the_number_of_threads_does_not_change_a_bit() {
        let sizes = [300 * 200, 64 * 500, 7 * 7];
        let shapes: [&[usize]; 3] = [&[300, 200], &[64, 500], &[7, 7]];
        let delta = gaussian(&sizes, 5, 1.0);
        let compact = |threads| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            pool.install(|| {
                let half = EnergyShare::new(0.5).unwrap();
                (
                    Compact::low_rank(&delta, &shapes, rank(6)).unwrap(),
                    Compact::sparse(&delta, &shapes, half).unwrap(),
                )
            })
        };
        let one = compact(1);
        assert_eq!(one, compact(3));
        assert!((one.1.energy_kept() - 0.5).abs() < 1e-4);
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let delta = TargetTensors::new(vec![vec![1.0; 6]]);
        let half = EnergyShare::new(0.5).unwrap();
        for shape in [&[6][..], &[2, 2], &[1, 2, 3], &[usize::MAX, 2]] {
            assert!(Compact::low_rank(&delta, &[shape], rank(1)).is_err());
        }
        assert!(Compact::low_rank(&delta, &[], rank(1)).is_err());
        assert!(Compact::sparse(&delta, &[&[2, 2]], half).is_err());
        assert!(Compact::sparse(&delta, &[], half).is_err());
        assert!(Compact::sparse(&delta, &[&[6]], half).is_ok());
        for share in [0.0, -0.5, 1.1, f64::NAN] {
            assert_eq!(EnergyShare::new(share), None);
        }
    }
}
