//! From an `f32` sum to the stored type: to the nearest value, or to one of the two neighbors by chance.
//!
//! Rounding by chance keeps the mean: a step of a tenth of the distance to the next value is taken in a tenth of the cases,
//! where rounding to nearest would never take it. Most steps of a patch are that small, and it acts through their sum: to nearest, an
//! eighth to a quarter of what it did to openings was gone (docs/experiments.md), while the noise that chance adds does nothing that
//! shows. The chance is a function of seed, tensor name and element index.
//!
//! Source: Croci et al., "Stochastic rounding: implementation, error analysis and applications", 2022 (mode 1).

use panacea_formats::{Dtype, Sha256};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// How a sum is rounded to the stored type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Rounding {
    /// To the nearest value, ties to the even one.
    Nearest,
    /// To a neighbor, with a chance proportional to the nearness of the other's. `F32` tensors are rounded to nearest, since the
    /// sum itself is in `f32`.
    Stochastic {
        /// Of the chances.
        seed: u64,
    },
}

impl Default for Rounding {
    fn default() -> Self {
        Self::Stochastic { seed: 0 }
    }
}

impl Rounding {
    /// The randomness of the elements of `tensor` from `element` on.
    pub(super) fn dice(self, tensor: &str, element: usize) -> Dice {
        let Self::Stochastic { seed } = self else {
            return Dice(None);
        };
        let mut generator =
            ChaCha8Rng::from_seed(*Sha256::of(&[DOMAIN, &seed.to_le_bytes()].concat()).as_bytes());
        let [a, b, c, d, e, f, g, h, ..] = *Sha256::of(tensor.as_bytes()).as_bytes();
        generator.set_stream(u64::from_le_bytes([a, b, c, d, e, f, g, h]));
        generator.set_word_pos(element as u128);
        Dice(Some(generator))
    }
}

/// Gives one random word for each element in turn, or none when rounding to nearest.
pub(super) struct Dice(Option<ChaCha8Rng>);

impl Dice {
    /// Whether there is any chance.
    pub(super) fn is_thrown(&self) -> bool {
        self.0.is_some()
    }

    pub(super) fn roll(&mut self) -> Option<u32> {
        self.0.as_mut().map(Rng::next_u32)
    }
}

/// The bits of the BF16 value nearest to `sum`, ties to the even one. `sum` is not NaN; [`half`]'s conversion asks, by a branch that
/// keeps loops from vectorizing.
#[inline(always)]
pub(super) fn to_bf16(sum: f32) -> u16 {
    let bits = sum.to_bits();
    let (upper, even) = (bits >> 16, (bits >> 16) & 1);
    // The lower half's carry: above a half always, at a half when the upper half is odd.
    let carry = ((bits & 0xFFFF) + 0x7FFF + even) >> 16;
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the upper half of 32 bits, and no carry out of infinity"
    )]
    let rounded = (upper + carry) as u16;
    rounded
}

/// `sum` as a value of `dtype`, by chance when there is a `random` word. Without one it is returned as it is, and the conversion
/// to the stored type rounds it.
pub(super) fn round(sum: f32, dtype: Dtype, random: Option<u32>) -> f32 {
    let Some(random) = random else {
        return sum;
    };
    // Fraction bits, and the exponent below which values are evenly spaced.
    let (fraction, least) = match dtype {
        Dtype::F16 => (10, -14),
        Dtype::BF16 => (7, -126),
        _ => return sum,
    };
    if !sum.is_finite() {
        return sum;
    }
    let exponent = ((sum.to_bits() >> 23) & 0xFF).cast_signed() - 127;
    let exponent = exponent.max(least) - fraction;
    // Exact, since the factor is a power of two; below 2^(fraction + 1), so the conversion cuts the fraction off and no more.
    let scaled = f64::from(sum.abs()) * power_of_two(-exponent);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "not negative and below 2^11"
    )]
    let below = f64::from(scaled as u32);
    let up = f64::from(random) < (scaled - below) * WORDS;
    let rounded = (below + f64::from(u8::from(up))) * power_of_two(exponent);
    #[expect(
        clippy::cast_possible_truncation,
        reason = "exact, but for an overflow to infinity, which the caller refuses"
    )]
    let rounded = rounded as f32;
    rounded.copysign(sum)
}

/// 2 to the power of `exponent`, which is that of a normal `f64`. (`powi` is a call, and takes longer than all the rest.)
fn power_of_two(exponent: i32) -> f64 {
    f64::from_bits((i64::from(exponent) + 1023).cast_unsigned() << 52)
}

/// Separates these chances from other uses of the same seed.
const DOMAIN: &[u8] = b"panacea-patch stochastic rounding 1";

/// How many values a random word has.
const WORDS: f64 = 4_294_967_296.0;

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;

    /// The neighbors of `value` among the halves of a type, by walking their bit patterns.
    fn neighbors(value: f32, widen: impl Fn(u16) -> f32) -> (f32, f32) {
        let finite: Vec<f32> = (0..=u16::MAX)
            .map(widen)
            .filter(|half| half.is_finite())
            .collect();
        let below = finite
            .iter()
            .copied()
            .filter(|&half| half <= value)
            .fold(f32::NEG_INFINITY, f32::max);
        let above = finite
            .iter()
            .copied()
            .filter(|&half| half >= value)
            .fold(f32::INFINITY, f32::min);
        (below, above)
    }

    #[test]
    fn chance_takes_one_of_the_two_neighbors_and_keeps_what_is_a_value_already() {
        let samples = [
            1.0, 1.003, -1.003, 0.333, -2.7e-6, 5.9e-8, 3.0e-8, 1.0e-39, 65_503.0, 1234.56, 0.0,
        ];
        for (dtype, widen) in [
            (
                Dtype::F16,
                (|bits| f16::from_bits(bits).to_f32()) as fn(u16) -> f32,
            ),
            (Dtype::BF16, |bits| bf16::from_bits(bits).to_f32()),
        ] {
            for sample in samples {
                let (below, above) = neighbors(sample, widen);
                let low = round(sample, dtype, Some(u32::MAX));
                let high = round(sample, dtype, Some(0));
                let (toward_zero, away) = if sample < 0.0 {
                    (above, below)
                } else {
                    (below, above)
                };
                assert_eq!((low, high), (toward_zero, away), "{dtype} {sample}");
            }
        }
    }

    #[test]
    fn nearest_bf16_values_are_those_of_half_in_every_exponent() {
        for upper in 0..=u16::MAX {
            for lower in [0_u16, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF] {
                let sum = f32::from_bits(u32::from(upper) << 16 | u32::from(lower));
                if !sum.is_nan() {
                    assert_eq!(to_bf16(sum), bf16::from_f32(sum).to_bits(), "{sum:e}");
                }
            }
        }
    }

    #[test]
    fn the_chance_is_proportional_to_nearness() {
        // A quarter of the way from 1 to the next BF16 value, 1 + 1/128.
        let sum = 1.0 + 0.25 / 128.0;
        let mut dice = Rounding::Stochastic { seed: 1 }.dice("t", 0);
        let ups = (0..40_000)
            .filter(|_| round(sum, Dtype::BF16, dice.roll()) > 1.0)
            .count();
        // Five standard deviations, sqrt(40000 * 0.25 * 0.75), are 433.
        assert!((9_567..=10_433).contains(&ups), "{ups}");
        assert_eq!(
            round(sum, Dtype::BF16, Some((1 << 30) - 1)),
            1.0 + 1.0 / 128.0
        );
        assert_eq!(round(sum, Dtype::BF16, Some(1 << 30)), 1.0);
    }

    #[test]
    fn the_chance_depends_on_seed_name_and_element_only() {
        let words = |seed, name: &str, start: usize| -> Vec<_> {
            let mut dice = Rounding::Stochastic { seed }.dice(name, start);
            (0..64).map(|_| dice.roll()).collect()
        };
        assert_eq!(words(1, "a", 0)[37..], words(1, "a", 37)[..27]);
        assert_ne!(words(1, "a", 0), words(2, "a", 0));
        assert_ne!(words(1, "a", 0), words(1, "b", 0));
    }
}
