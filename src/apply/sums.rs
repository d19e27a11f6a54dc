//! What became of a perturbation, summed element by element.
//!
//! In: old values, wanted steps and new values, a block at a time. Out: a [`Change`]. What depends on no order is counted in loops
//! that the compiler vectorizes; the sums run in the elements' order, one after the other, and every digit is theirs.

use pulp::{Simd, WithSimd};

use super::Change;

/// A [`Change`] in the making: everything that can be summed chunk by chunk.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sums {
    elements: u64,
    moved: u64,
    not_finite: u64,
    wanted_squared: f64,
    realized_squared: f64,
    dot: f64,
    weight_squared: f64,
    largest_weight: f32,
    largest_wanted: f32,
    largest_realized: f32,
}

impl Sums {
    /// Takes in elements: old values, wanted steps, new values, of which there are equally many. No step is NaN.
    pub(super) fn measure(&mut self, weights: &[f32], steps: &[f32], stored: &[f32]) {
        pulp::Arch::new().dispatch(Measured {
            sums: self,
            weights,
            steps,
            stored,
        });
    }

    #[inline(always)]
    fn sum(&mut self, weights: &[f32], steps: &[f32], stored: &[f32]) {
        for ((&weight, &step), &stored) in weights.iter().zip(steps).zip(stored) {
            let wanted = f64::from(step);
            // An element that is left alone adds zeros, which change no sum.
            let finite = weight.is_finite();
            let weight = if finite { f64::from(weight) } else { 0.0 };
            let stored = if finite { f64::from(stored) } else { 0.0 };
            let realized = stored - weight;
            self.wanted_squared += wanted * wanted;
            self.realized_squared += realized * realized;
            self.dot += wanted * realized;
            self.weight_squared += weight * weight;
        }
    }

    /// Counts, and the largest.
    #[inline(always)]
    fn count(&mut self, weights: &[f32], steps: &[f32], stored: &[f32]) {
        let (mut moved, mut not_finite) = (0_u32, 0_u32);
        // Numbers without a sign are ordered as their bits are, and integers have a maximum that vectorizes.
        let (mut weight_bits, mut wanted_bits, mut realized_bits) = (0_u32, 0_u32, 0_u32);
        for ((&weight, &step), &stored) in weights.iter().zip(steps).zip(stored) {
            let finite = weight.is_finite();
            let if_finite = u32::from(finite).wrapping_neg();
            not_finite += u32::from(!finite);
            moved += u32::from(finite & (stored != weight));
            #[expect(clippy::cast_possible_truncation, reason = "a figure for a report")]
            let realized = (f64::from(stored) - f64::from(weight)).abs() as f32;
            weight_bits = weight_bits.max(weight.abs().to_bits() & if_finite);
            wanted_bits = wanted_bits.max(step.abs().to_bits());
            realized_bits = realized_bits.max(realized.to_bits() & if_finite);
        }
        self.elements += weights.len() as u64;
        self.moved += u64::from(moved);
        self.not_finite += u64::from(not_finite);
        self.largest_weight = self.largest_weight.max(f32::from_bits(weight_bits));
        self.largest_wanted = self.largest_wanted.max(f32::from_bits(wanted_bits));
        self.largest_realized = self.largest_realized.max(f32::from_bits(realized_bits));
    }

    /// Takes in the sums of later elements.
    pub(super) fn add(&mut self, later: &Self) {
        self.elements += later.elements;
        self.moved += later.moved;
        self.not_finite += later.not_finite;
        self.wanted_squared += later.wanted_squared;
        self.realized_squared += later.realized_squared;
        self.dot += later.dot;
        self.weight_squared += later.weight_squared;
        self.largest_weight = self.largest_weight.max(later.largest_weight);
        self.largest_wanted = self.largest_wanted.max(later.largest_wanted);
        self.largest_realized = self.largest_realized.max(later.largest_realized);
    }

    pub(super) fn change(&self) -> Change {
        let (wanted_norm, realized_norm) =
            (self.wanted_squared.sqrt(), self.realized_squared.sqrt());
        let product = wanted_norm * realized_norm;
        Change {
            elements: self.elements,
            moved: self.moved,
            not_finite: self.not_finite,
            wanted_norm,
            realized_norm,
            cosine: (product > 0.0).then(|| self.dot / product),
            weight_norm: self.weight_squared.sqrt(),
            largest_weight: self.largest_weight,
            largest_wanted: self.largest_wanted,
            largest_realized: self.largest_realized,
        }
    }
}

/// Elements to be taken in, by loops that are compiled for each instruction set, to the same bits.
struct Measured<'b> {
    sums: &'b mut Sums,
    weights: &'b [f32],
    steps: &'b [f32],
    stored: &'b [f32],
}

impl WithSimd for Measured<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        self.sums.count(self.weights, self.steps, self.stored);
        self.sums.sum(self.weights, self.steps, self.stored);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One element after the other, by the definitions in [`Change`].
    fn plainly(weights: &[f32], steps: &[f32], stored: &[f32]) -> Change {
        let triples = || weights.iter().zip(steps).zip(stored);
        let finite = || triples().filter(|((weight, _), _)| weight.is_finite());
        let realized = |weight: f32, stored: f32| f64::from(stored) - f64::from(weight);
        let wanted_norm = triples()
            .fold(0.0, |sum, ((_, step), _)| sum + f64::from(*step).powi(2))
            .sqrt();
        let realized_norm = finite()
            .fold(0.0, |sum, ((w, _), n)| sum + realized(*w, *n).powi(2))
            .sqrt();
        let dot = finite().fold(0.0, |sum, ((w, step), n)| {
            sum + f64::from(*step) * realized(*w, *n)
        });
        #[expect(clippy::cast_possible_truncation, reason = "as the figure is defined")]
        let largest_realized = finite()
            .map(|((w, _), n)| realized(*w, *n).abs())
            .fold(0.0, f64::max) as f32;
        Change {
            elements: weights.len() as u64,
            moved: finite().filter(|((w, _), n)| w != n).count() as u64,
            not_finite: (weights.len() - finite().count()) as u64,
            wanted_norm,
            realized_norm,
            cosine: (wanted_norm * realized_norm > 0.0)
                .then(|| dot / (wanted_norm * realized_norm)),
            weight_norm: finite()
                .fold(0.0, |sum, ((w, _), _)| sum + f64::from(*w).powi(2))
                .sqrt(),
            largest_weight: finite().map(|((w, _), _)| w.abs()).fold(0.0, f32::max),
            largest_wanted: steps.iter().map(|step| step.abs()).fold(0.0, f32::max),
            largest_realized,
        }
    }

    #[test]
    fn every_digit_is_that_of_the_plain_sums() {
        let mut state = 1_u32;
        let mut random = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            f32::from_bits(state & 0x83FF_FFFF | 0x3C00_0000)
        };
        for length in [0, 1, 7, 16, 1024] {
            let mut weights: Vec<f32> = (0..length).map(|_| random()).collect();
            let steps: Vec<f32> = (0..length).map(|_| random() * 1e-3).collect();
            let mut stored: Vec<f32> = weights.iter().zip(&steps).map(|(w, s)| w + s).collect();
            for (place, weight) in [(3, f32::NAN), (4, f32::INFINITY), (5, -0.0)] {
                if place < length {
                    weights[place] = weight;
                    stored[place] = weight;
                }
            }
            let mut sums = Sums::default();
            sums.measure(&weights, &steps, &stored);
            assert_eq!(
                sums.change(),
                plainly(&weights, &steps, &stored),
                "{length}"
            );
        }
    }
}
