//! Elements by magnitude.

/// How many elements there are of each magnitude, and their energy. Magnitudes in a bin differ by less than 1/256.
#[derive(Clone, Debug)]
pub struct Histogram {
    counts: Vec<u64>,
    squared: Vec<f64>,
}

impl Histogram {
    /// Of no elements.
    #[expect(
        clippy::new_without_default,
        reason = "a megabyte is not made by default"
    )]
    pub fn new() -> Self {
        Self {
            counts: vec![0; BINS],
            squared: vec![0.0; BINS],
        }
    }

    /// Of `values`.
    pub fn of(values: &[f32]) -> Self {
        let mut histogram = Self::new();
        for &value in values {
            let bin = bin_of(value);
            histogram.counts[bin] += 1;
            histogram.squared[bin] += f64::from(value) * f64::from(value);
        }
        histogram
    }

    /// Takes in the elements of `other`.
    pub fn add(&mut self, other: &Self) {
        for (count, more) in self.counts.iter_mut().zip(&other.counts) {
            *count += more;
        }
        for (squared, more) in self.squared.iter_mut().zip(&other.squared) {
            *squared += more;
        }
    }

    /// The sum of all squares.
    pub fn squared(&self) -> f64 {
        self.squared.iter().sum()
    }

    /// The smallest share of the elements that holds `share` of the energy, as if energy were spread evenly within a bin.
    #[expect(clippy::cast_precision_loss, reason = "a share for a table")]
    pub fn elements_holding(&self, share: f64) -> f64 {
        let elements: u64 = self.counts.iter().sum();
        let wanted = share * self.squared();
        let (mut held, mut count) = (0.0, 0.0);
        for (&of_bin, &squared) in self.counts.iter().zip(&self.squared).rev() {
            if squared > 0.0 && held + squared >= wanted {
                count += of_bin as f64 * (wanted - held) / squared;
                break;
            }
            if squared > 0.0 {
                held += squared;
                count += of_bin as f64;
            }
        }
        match elements {
            0 => 0.0,
            _ => count / elements as f64,
        }
    }

    /// The bin with which the elements from the largest down reach the energy `wanted`, and the energy of those above it;
    /// nothing when all of them do not.
    pub(super) fn reaching(&self, wanted: f64) -> Option<(usize, f64)> {
        let mut held = 0.0;
        for (bin, &squared) in self.squared.iter().enumerate().rev() {
            if squared > 0.0 && held + squared >= wanted {
                return Some((bin, held));
            }
            held += squared;
        }
        None
    }
}

/// The bin of an element: its magnitude's leading bits.
pub(super) fn bin_of(value: f32) -> usize {
    (value.abs().to_bits() >> SHIFT) as usize
}

/// Bits of a magnitude that a bin does not tell apart: 8 of 23 of the fraction remain.
pub(super) const SHIFT: u32 = 15;

/// As many as there are magnitudes without these bits.
const BINS: usize = 1 << (31 - SHIFT);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_of_elements_agree_with_a_sorted_list() {
        #[expect(clippy::cast_precision_loss, reason = "small indices")]
        let values: Vec<f32> = (1..5000)
            .map(|i| (i as f32 * 0.37).sin().powi(5) * if i % 2 == 0 { -1.0 } else { 1.0 })
            .collect();
        let mut squares: Vec<f64> = values.iter().map(|&x| f64::from(x).powi(2)).collect();
        squares.sort_by(|a, b| b.total_cmp(a));
        let all: f64 = squares.iter().sum();
        let histogram = Histogram::of(&values);
        for share in [0.5, 0.8, 0.9, 0.99] {
            let mut held = 0.0;
            let count = squares
                .iter()
                .take_while(|&&square| {
                    held += square;
                    held < share * all
                })
                .count();
            #[expect(clippy::cast_precision_loss, reason = "a count below 5000")]
            let expected = count as f64 / values.len() as f64;
            let found = histogram.elements_holding(share);
            assert!(
                (found - expected).abs() < 2e-3,
                "{share}: {found} {expected}"
            );
        }
    }

    #[test]
    fn equal_elements_hold_energy_by_their_number_and_zeros_none() {
        assert!((Histogram::of(&[2.0; 100]).elements_holding(0.8) - 0.8).abs() < 1e-12);
        let half_zero = Histogram::of(&[0.0, 1.0, 0.0, -1.0]);
        assert!((half_zero.elements_holding(1.0) - 0.5).abs() < 1e-12);
        assert_eq!(Histogram::of(&[0.0; 4]).elements_holding(0.8), 0.0);
        assert_eq!(Histogram::new().elements_holding(0.8), 0.0);
    }
}
