//! What is to be added to one tensor, in any of three forms, from a file or from memory.
//!
//! | form | is | value of element `i` |
//! |---|---|---|
//! | dense | all values, row-major | the `i`-th |
//! | low rank | `A`, rank x inputs, and `B`, outputs x rank, of an outputs x inputs matrix | that of the product `B A` |
//! | sparse | the indices of some elements, ascending, and as many values | its value where listed, else 0 |
//!
//! In: slices, or stored tensors that were checked. Out: [`DeltaTensor`], whose elements can be read from any range and any
//! thread without the whole ever being expanded. A value depends on its element alone, never on the range it was read in.

use std::ops::Range;

use thiserror::Error;

use super::numbers::Numbers;
use crate::tensor::WidenError;

/// What is to be added to one tensor: a finite `f32` for each element of its shape.
#[derive(Clone, Copy, Debug)]
pub struct DeltaTensor<'a> {
    name: &'a str,
    shape: &'a [usize],
    values: Values<'a>,
}

/// How the values of a delta are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Form {
    /// All values.
    Dense,
    /// The factors of a product of matrices.
    LowRank {
        /// Columns of `B` and rows of `A`.
        rank: usize,
    },
    /// The values that are not zero.
    Sparse {
        /// How many they are.
        entries: usize,
    },
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Values<'a> {
    Dense(Numbers<'a, f32>),
    /// `inputs` and `rank` are positive, and the lengths those of the shapes.
    LowRank {
        a: Numbers<'a, f32>,
        b: Numbers<'a, f32>,
        inputs: usize,
        rank: usize,
    },
    /// As many indices as values, strictly ascending, each of an element.
    Sparse {
        indices: Numbers<'a, u32>,
        values: Numbers<'a, f32>,
    },
}

impl<'a> DeltaTensor<'a> {
    /// `values` for the tensor `name` of `shape`, row-major; nothing when their number is not that of the shape.
    pub fn new(name: &'a str, shape: &'a [usize], values: &'a [f32]) -> Option<Self> {
        let fits = elements_of(shape)? == values.len();
        fits.then_some(Self::of(name, shape, Values::Dense(values.into())))
    }

    /// The product `b a` for the matrix `name` of `shape` outputs x inputs: `a` is rank x inputs, `b` outputs x rank, both
    /// row-major. Nothing when `shape` is not that of a matrix with elements, or the lengths give no rank of at least 1.
    ///
    /// An element is the sum of its products over the rank, from the first to the last, each product and each sum rounded to
    /// `f32`. A factor on the product, such as LoRA's alpha / rank, belongs into `b`. Ranks above what the shape can use are
    /// computed like others, but [`super::write_perturbation`] refuses them.
    pub fn low_rank(name: &'a str, shape: &'a [usize], a: &'a [f32], b: &'a [f32]) -> Option<Self> {
        let values = Values::low_rank(shape, a.into(), b.into())?;
        Some(Self::of(name, shape, values))
    }

    /// `values` at the elements `indices` of the tensor `name` of `shape`, counted row-major, and zero elsewhere. Nothing when
    /// the indices are not strictly ascending, one lies outside of the shape, there are not as many of them as values, or the
    /// shape has more than 2^32 elements.
    pub fn sparse(
        name: &'a str,
        shape: &'a [usize],
        indices: &'a [u32],
        values: &'a [f32],
    ) -> Option<Self> {
        let elements = elements_of(shape).filter(|&it| it as u64 <= MAX_SPARSE_ELEMENTS)?;
        let indices = Numbers::from(indices);
        let sound = indices.len() == values.len() && indices.misplaced(elements).is_none();
        let values = values.into();
        sound.then_some(Self::of(name, shape, Values::Sparse { indices, values }))
    }

    pub(super) fn of(name: &'a str, shape: &'a [usize], values: Values<'a>) -> Self {
        Self {
            name,
            shape,
            values,
        }
    }

    /// The name of the tensor that it is added to.
    pub fn name(&self) -> &'a str {
        self.name
    }

    /// Its shape.
    pub fn shape(&self) -> &'a [usize] {
        self.shape
    }

    /// How many values it has, those that are zero included.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// How the values are held.
    pub fn form(&self) -> Form {
        match self.values {
            Values::Dense(_) => Form::Dense,
            Values::LowRank { rank, .. } => Form::LowRank { rank },
            Values::Sparse { values, .. } => Form::Sparse {
                entries: values.len(),
            },
        }
    }

    /// Bytes of its tensors in a file, without their part of the header.
    pub fn stored_bytes(&self) -> u64 {
        let numbers = match self.values {
            Values::Dense(values) => values.len(),
            Values::LowRank { a, b, .. } => a.len() + b.len(),
            Values::Sparse { indices, values } => indices.len() + values.len(),
        };
        4 * numbers as u64
    }

    /// Writes the values in `range` to `out`, which is as long as `range`. Costs a copy where the form is dense, `rank` products
    /// for each element where it is low rank, and a search and the entries in the range where it is sparse.
    ///
    /// # Errors
    /// When the range is not within the tensor or not as long as `out`.
    pub fn read_into(&self, range: Range<usize>, out: &mut [f32]) -> Result<(), WidenError> {
        let elements = self.elements();
        if range.end > elements || range.end.checked_sub(range.start) != Some(out.len()) {
            return Err(WidenError::Range {
                start: range.start,
                end: range.end,
                elements,
                room: out.len(),
            });
        }
        match self.values {
            Values::Dense(values) => values.copy_to(range.start, out),
            Values::LowRank { a, b, inputs, rank } => {
                let mut element = range.start;
                let mut rest = out;
                while !rest.is_empty() {
                    let (row, column) = (element / inputs, element % inputs);
                    let (segment, after) = rest.split_at_mut(rest.len().min(inputs - column));
                    segment.fill(0.0);
                    for term in 0..rank {
                        a.add_to(term * inputs + column, b.number(row * rank + term), segment);
                    }
                    element += segment.len();
                    rest = after;
                }
            }
            Values::Sparse { indices, values } => {
                out.fill(0.0);
                let first = indices.first_from(range.start);
                for entry in first..indices.len() {
                    let element = indices.number(entry) as usize;
                    let Some(value) = out.get_mut(element - range.start) else {
                        break;
                    };
                    *value = values.number(entry);
                }
            }
        }
        Ok(())
    }

    /// The factors of the low-rank form: `A`, rank x inputs, and `B`, outputs x rank. Nothing for other forms.
    pub fn factors(&self) -> Option<(Vec<f32>, Vec<f32>)> {
        match self.values {
            Values::LowRank { a, b, .. } => Some((a.to_vec(), b.to_vec())),
            _ => None,
        }
    }

    /// The entries of the sparse form: elements, ascending, and their values. Nothing for other forms.
    pub fn entries(&self) -> Option<impl ExactSizeIterator<Item = (usize, f32)> + use<'a>> {
        match self.values {
            Values::Sparse { indices, values } => Some(
                (0..values.len())
                    .map(move |entry| (indices.number(entry) as usize, values.number(entry))),
            ),
            _ => None,
        }
    }

    /// The first reason why a value is not finite, or, of a low-rank form, could come out as such.
    ///
    /// A product is not computed for that: refused are factors that are not finite, and such whose largest magnitudes allow an
    /// element beyond half of the largest `f32`, a bound that no perturbation of a model comes near. It holds for the sums of
    /// the first terms too, and the other half is more than rounding adds at any rank below five million.
    pub fn first_not_finite(&self) -> Option<NotFinite> {
        let value = |part| move |element| NotFinite::Value { part, element };
        match self.values {
            Values::Dense(values) => values.first_not_finite().map(value("")),
            Values::LowRank { a, b, inputs, rank } => a
                .first_not_finite()
                .map(value(LORA_A))
                .or_else(|| b.first_not_finite().map(value(LORA_B)))
                .or_else(|| {
                    let at_most = largest_product(a, b, inputs, rank);
                    (at_most > f64::from(f32::MAX) / 2.0).then_some(NotFinite::Product { at_most })
                }),
            Values::Sparse { values, .. } => values.first_not_finite().map(value(VALUES)),
        }
    }

    /// What is stored of it: the end of the tensor's name, its shape and its numbers.
    pub(super) fn parts(&self) -> Vec<(&'static str, Vec<usize>, Part<'a>)> {
        match self.values {
            Values::Dense(values) => vec![("", self.shape.to_vec(), Part::Values(values))],
            Values::LowRank { a, b, inputs, rank } => vec![
                (LORA_A, vec![rank, inputs], Part::Values(a)),
                (LORA_B, vec![b.len() / rank, rank], Part::Values(b)),
            ],
            Values::Sparse { indices, values } => vec![
                (INDICES, vec![indices.len()], Part::Indices(indices)),
                (VALUES, vec![values.len()], Part::Values(values)),
            ],
        }
    }
}

/// Why a delta cannot be added: the result would not be finite.
#[derive(Clone, Copy, Debug, Error, PartialEq)]
#[non_exhaustive]
pub enum NotFinite {
    /// A low-rank product can exceed `f32`.
    #[error("its factors' product may reach {at_most:e}, beyond what F32 holds")]
    Product {
        /// What no element exceeds.
        at_most: f64,
    },
    /// A value that is infinite or not a number.
    #[error("element {element}{}{part}", if part.is_empty() { "" } else { " of its " })]
    Value {
        /// The end of its tensor's name in a file; empty for the dense form.
        part: &'static str,
        /// Its place in that tensor.
        element: usize,
    },
}

/// What is stored under one name.
#[derive(Clone, Copy, Debug)]
pub(super) enum Part<'a> {
    Values(Numbers<'a, f32>),
    Indices(Numbers<'a, u32>),
}

impl<'a> Values<'a> {
    /// The low-rank form, when the shapes give a rank.
    pub(super) fn low_rank(
        shape: &[usize],
        a: Numbers<'a, f32>,
        b: Numbers<'a, f32>,
    ) -> Option<Self> {
        let &[outputs, inputs] = shape else {
            return None;
        };
        elements_of(shape)?;
        let rank = a.len().checked_div(inputs)?;
        let fits = outputs > 0
            && rank > 0
            && rank.checked_mul(inputs) == Some(a.len())
            && rank.checked_mul(outputs) == Some(b.len());
        fits.then_some(Self::LowRank { a, b, inputs, rank })
    }
}

/// What no element of the product exceeds: the sum over the rank of the largest magnitudes of both factors.
fn largest_product(a: Numbers<'_, f32>, b: Numbers<'_, f32>, inputs: usize, rank: usize) -> f64 {
    let mut of_columns = vec![0.0_f32; rank];
    for row in 0..b.len() / rank {
        for (term, largest) in of_columns.iter_mut().enumerate() {
            *largest = largest.max(b.number(row * rank + term).abs());
        }
    }
    let mut at_most = 0.0;
    for (term, &of_column) in of_columns.iter().enumerate() {
        let of_row = (term * inputs..(term + 1) * inputs)
            .map(|place| a.number(place).abs())
            .fold(0.0, f32::max);
        at_most += f64::from(of_column) * f64::from(of_row);
    }
    at_most
}

pub(super) fn elements_of(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1_usize, |product, &dimension| {
        product.checked_mul(dimension)
    })
}

/// As many elements as indices of 32 bits can tell apart.
pub(super) const MAX_SPARSE_ELEMENTS: u64 = 1 << 32;

/// Ends of the names under which the parts of compact forms are stored.
pub(super) const LORA_A: &str = ".lora_A";
pub(super) const LORA_B: &str = ".lora_B";
pub(super) const INDICES: &str = ".indices";
pub(super) const VALUES: &str = ".values";

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers without a pattern that an error in indexing could hide in.
    fn ramp(length: usize) -> Vec<f32> {
        #[expect(clippy::cast_precision_loss, reason = "small indices")]
        (0..length).map(|i| (i as f32 * 0.7).sin()).collect()
    }

    #[test]
    fn any_range_of_a_form_holds_the_same_bits_as_the_whole() {
        let shape = [5, 7];
        let (a, b) = (ramp(3 * 7), ramp(5 * 3));
        let (indices, values) = ([0, 6, 7, 20, 34], ramp(5));
        for delta in [
            DeltaTensor::low_rank("w", &shape, &a, &b).unwrap(),
            DeltaTensor::sparse("w", &shape, &indices, &values).unwrap(),
        ] {
            let mut whole = [f32::NAN; 35];
            delta.read_into(0..35, &mut whole).unwrap();
            for start in 0..35 {
                for end in start..=35 {
                    let mut part = vec![f32::NAN; end - start];
                    delta.read_into(start..end, &mut part).unwrap();
                    let bits = |values: &[f32]| values.iter().map(|it| it.to_bits()).collect();
                    let (found, wanted): (Vec<u32>, Vec<u32>) =
                        (bits(&part), bits(&whole[start..end]));
                    assert_eq!(found, wanted, "{start}..{end}");
                }
            }
            let mut room = [0.0; 2];
            assert!(delta.read_into(34..36, &mut room).is_err());
            assert!(delta.read_into(0..1, &mut room).is_err());
            #[expect(clippy::reversed_empty_ranges, reason = "the range under test")]
            let backwards = 2..0;
            assert!(delta.read_into(backwards, &mut []).is_err());
        }
    }

    #[test]
    fn a_low_rank_element_is_the_sum_over_the_rank_from_first_to_last() {
        // Large terms that cancel, so that another order would give another sum.
        let a = [1e8, 1.0, -1e8, 2.0, 3.0, 1.0];
        let b = [1.0, 1.0, 1.0, 0.5, 2.0, 0.25];
        let shape = [2, 2];
        let delta = DeltaTensor::low_rank("w", &shape, &a, &b).unwrap();
        let mut found = [0.0; 4];
        delta.read_into(0..4, &mut found).unwrap();
        assert_eq!(
            found,
            [1e8 - 1e8 + 3.0, 4.0, -1.5e8 + 0.75, 0.5 + 4.0 + 0.25]
        );
        let late = [3.0, 1.0, 1e8, 1.0, -1e8, 1.0];
        let delta = DeltaTensor::low_rank("w", &shape, &late, &[1.0; 6]).unwrap();
        delta.read_into(0..1, &mut found[..1]).unwrap();
        assert_eq!(found[0], 0.0, "3 is lost beside 1e8");
        assert_eq!(delta.form(), Form::LowRank { rank: 3 });
        assert_eq!(delta.stored_bytes(), 48);
        assert_eq!(delta.factors(), Some((late.to_vec(), vec![1.0; 6])));
        assert!(delta.entries().is_none());
    }

    #[test]
    fn a_sparse_delta_is_zero_where_it_has_no_entry() {
        let delta = DeltaTensor::sparse("w", &[2, 2], &[1, 2], &[0.5, -1.0]).unwrap();
        let mut found = [f32::NAN; 4];
        delta.read_into(0..4, &mut found).unwrap();
        assert_eq!(found, [0.0, 0.5, -1.0, 0.0]);
        assert_eq!(delta.form(), Form::Sparse { entries: 2 });
        assert_eq!(delta.stored_bytes(), 16);
        let entries: Vec<_> = delta.entries().unwrap().collect();
        assert_eq!(entries, [(1, 0.5), (2, -1.0)]);
        assert_eq!(delta.factors(), None);
    }

    #[test]
    fn numbers_that_fit_no_form_make_no_delta() {
        let low_rank = |shape: &[usize], a, b| {
            DeltaTensor::low_rank("w", shape, &vec![0.0; a], &vec![0.0; b]).is_some()
        };
        assert!(low_rank(&[2, 3], 6, 4));
        assert!(low_rank(&[2, 3], 15, 10), "more than the shape can use");
        for (shape, a, b) in [
            (&[2, 3][..], 6, 2),
            (&[2, 3], 7, 4),
            (&[2, 3], 0, 0),
            (&[0, 3], 3, 0),
            (&[3, 0], 0, 3),
            (&[6], 6, 1),
            (&[1, 2, 3], 3, 2),
            (&[usize::MAX, 2], 2, 0),
        ] {
            assert!(!low_rank(shape, a, b), "{shape:?} {a} {b}");
        }
        let sparse = |indices: &[u32], values| {
            DeltaTensor::sparse("w", &[2, 3], indices, &vec![0.0; values]).is_some()
        };
        assert!(sparse(&[], 0));
        assert!(sparse(&[0, 5], 2));
        for (indices, values) in [(&[0, 6][..], 2), (&[1, 1], 2), (&[2, 1], 2), (&[1], 2)] {
            assert!(!sparse(indices, values), "{indices:?} {values}");
        }
    }

    #[test]
    fn what_is_not_finite_is_found_in_every_form() {
        let shape = [2, 2];
        let (good, bad) = ([1.0, 2.0], [1.0, f32::INFINITY]);
        let low_rank = |a, b| DeltaTensor::low_rank("w", &shape, a, b).unwrap();
        let value = |part, element| Some(NotFinite::Value { part, element });
        assert_eq!(low_rank(&good, &good).first_not_finite(), None);
        assert_eq!(
            low_rank(&bad, &good).first_not_finite(),
            value(".lora_A", 1)
        );
        assert_eq!(
            low_rank(&good, &bad).first_not_finite(),
            value(".lora_B", 1)
        );
        let sparse = DeltaTensor::sparse("w", &shape, &[1, 2], &bad).unwrap();
        assert_eq!(sparse.first_not_finite(), value(".values", 1));
        let dense = DeltaTensor::new("w", &[2], &bad).unwrap();
        assert_eq!(dense.first_not_finite(), value("", 1));
        // Finite factors of a product that is not.
        let large = [1e20, 1e19];
        assert!(matches!(
            low_rank(&large, &large).first_not_finite(),
            Some(NotFinite::Product { at_most }) if at_most > 9e39
        ));
        let mut product = [0.0];
        low_rank(&large, &large)
            .read_into(0..1, &mut product)
            .unwrap();
        assert_eq!(product, [f32::INFINITY]);
    }
}
