//! The largest elements of several tensors together.
//!
//! Found by counting, not by sorting: a histogram of leading bits gives the bin in which the wanted energy is reached, a second
//! one of the remaining bits the magnitude, and then each element is larger, smaller, or one of those that equal it.

use std::cmp::Ordering;

use rayon::prelude::*;

use super::histogram::{Histogram, SHIFT, bin_of};
use crate::model::TargetTensors;

/// For each tensor the places of its chosen elements, ascending, and their values: the fewest that hold `share` of the energy of
/// all. Of a tensor with more than 2^32 elements, which no sparse form holds, the rest is left out.
pub(super) fn largest(delta: &TargetTensors, share: f64) -> Vec<(Vec<u32>, Vec<f32>)> {
    let threshold = Threshold::holding(delta, share);
    // How many of the equal ones earlier tensors have.
    let equal: Vec<u64> = delta
        .iter()
        .collect::<Vec<_>>()
        .par_iter()
        .map(|values| {
            let equal = values.iter().filter(|value| threshold.is_equal(**value));
            equal.count() as u64
        })
        .collect();
    let mut room = threshold.equal;
    let rooms: Vec<u64> = equal
        .iter()
        .map(|count| {
            let before = room;
            room = room.saturating_sub(*count);
            before
        })
        .collect();
    let tensors: Vec<(&[f32], u64)> = delta.iter().zip(rooms).collect();
    tensors
        .into_par_iter()
        .map(|(values, mut room)| {
            let (mut indices, mut chosen) = (Vec::new(), Vec::new());
            for (index, &value) in (0..=u32::MAX).zip(values) {
                let keep = match threshold.compare(value) {
                    Ordering::Greater => true,
                    Ordering::Equal if room > 0 => {
                        room -= 1;
                        true
                    }
                    _ => false,
                };
                if keep {
                    indices.push(index);
                    chosen.push(value);
                }
            }
            (indices, chosen)
        })
        .collect()
}

/// What the chosen elements have in common.
#[derive(Clone, Copy, Debug)]
struct Threshold {
    /// The bits of a magnitude: larger elements are chosen.
    magnitude: u32,
    /// How many elements of this magnitude are chosen too.
    equal: u64,
}

impl Threshold {
    /// The highest threshold above which `share` of the energy of `delta` is held.
    fn holding(delta: &TargetTensors, share: f64) -> Self {
        // By rounding, the sum of all might miss what was summed in another order.
        let all_but_zeros = Self {
            magnitude: 0,
            equal: 0,
        };
        if share >= 1.0 {
            return all_but_zeros;
        }
        let mut histogram = Histogram::new();
        let chunks: Vec<&[f32]> = delta
            .iter()
            .flat_map(|values| values.chunks(CHUNK))
            .collect();
        // A few chunks at a time, since each has a histogram of its own.
        for chunks in chunks.chunks(16) {
            let parts: Vec<Histogram> = chunks.par_iter().map(|it| Histogram::of(it)).collect();
            for part in &parts {
                histogram.add(part);
            }
        }
        let wanted = share * histogram.squared();
        let Some((bin, mut held)) = histogram.reaching(wanted) else {
            return all_but_zeros;
        };
        let counts = counts_in(bin, &chunks);
        let mut smallest = all_but_zeros;
        for (rest, &count) in counts.iter().enumerate().rev() {
            if count == 0 {
                continue;
            }
            #[expect(clippy::cast_possible_truncation, reason = "31 bits in all")]
            let magnitude = (bin << SHIFT | rest) as u32;
            let value = f64::from(f32::from_bits(magnitude));
            let missing = (wanted - held) / (value * value);
            #[expect(
                clippy::cast_precision_loss,
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "a count below 2^53, and at least 1"
            )]
            if missing <= count as f64 {
                let equal = (missing.ceil().max(1.0) as u64).min(count);
                return Self { magnitude, equal };
            }
            #[expect(clippy::cast_precision_loss, reason = "a count below 2^53")]
            {
                held += count as f64 * value * value;
            }
            smallest = Self {
                magnitude,
                equal: count,
            };
        }
        smallest
    }

    fn compare(&self, value: f32) -> Ordering {
        value.abs().to_bits().cmp(&self.magnitude)
    }

    fn is_equal(&self, value: f32) -> bool {
        self.compare(value) == Ordering::Equal
    }
}

/// How many elements of `bin` there are of each magnitude.
fn counts_in(bin: usize, chunks: &[&[f32]]) -> Vec<u64> {
    let mask = (1_u32 << SHIFT) - 1;
    let zeros = || vec![0_u64; 1 << SHIFT];
    chunks
        .par_iter()
        .fold(zeros, |mut counts, chunk| {
            for &value in chunk.iter().filter(|value| bin_of(**value) == bin) {
                counts[(value.abs().to_bits() & mask) as usize] += 1;
            }
            counts
        })
        .reduce(zeros, |mut counts, more| {
            for (count, more) in counts.iter_mut().zip(more) {
                *count += more;
            }
            counts
        })
}

/// Elements of a chunk; fixed, so that sums are always taken in the same order.
const CHUNK: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optimize::gaussian;

    #[test]
    fn the_choice_is_that_of_a_sorted_list() {
        let delta = gaussian(&[5000, 1, 3000], 3, 1.0);
        // Some of a few magnitudes only, so that many are equal.
        let mut tensors: Vec<Vec<f32>> = delta.iter().map(<[f32]>::to_vec).collect();
        for value in &mut tensors[2] {
            *value = (*value * 100.0).round() / 100.0;
        }
        let delta = TargetTensors::new(tensors);
        let mut sorted: Vec<(usize, usize, f32)> = delta
            .iter()
            .enumerate()
            .flat_map(|(tensor, values)| {
                values
                    .iter()
                    .enumerate()
                    .map(move |(place, &value)| (tensor, place, value))
            })
            .collect();
        sorted.sort_by(|a, b| b.2.abs().total_cmp(&a.2.abs()));
        let square = |value: f32| f64::from(value) * f64::from(value);
        let all: f64 = sorted.iter().map(|(.., value)| square(*value)).sum();
        for share in [1e-9, 0.1, 0.5, 0.8, 0.95, 0.999] {
            let mut held = 0.0;
            let enough = sorted.iter().position(|(.., value)| {
                held += square(*value);
                held >= share * all
            });
            let mut wanted = sorted[..=enough.unwrap()].to_vec();
            wanted.sort_by_key(|&(tensor, place, _)| (tensor, place));
            let found: Vec<(usize, usize, f32)> = largest(&delta, share)
                .into_iter()
                .enumerate()
                .flat_map(|(tensor, (indices, values))| {
                    let entries = indices.into_iter().zip(values);
                    entries.map(move |(index, value)| (tensor, index as usize, value))
                })
                .collect();
            assert_eq!(found, wanted, "{share}");
        }
    }
}
