//! Rotary embeddings: the settings of a config, and the factors that GGUF has for some of them.

use serde_json::Map;

use crate::model::ConfigError;
use crate::model::settings::{Settings, narrowed};

/// The settings of one rotary embedding, in whichever spelling a config has them.
pub(super) struct Scaling<'a> {
    /// Those that belong to its kind.
    pub(super) own: Settings<'a>,
    /// `rope_type`.
    pub(super) kind: &'a str,
    /// The base of the frequencies.
    pub(super) theta: f64,
}

impl<'a> Scaling<'a> {
    /// That of all blocks, or that of one kind of blocks where there are two.
    pub(super) fn of(
        config: Settings<'a>,
        part: Option<&'static str>,
    ) -> Result<Self, ConfigError> {
        let object = |settings: Settings<'a>, name| -> Result<_, ConfigError> {
            Ok(settings.object(name)?.filter(|it| !it.is_empty()))
        };
        let nested = match object(config, "rope_parameters")? {
            Some(new) => Some(new),
            None => object(config, "rope_scaling")?,
        };
        let is_local = part == Some("sliding_attention");
        let own = match (nested, part) {
            (Some(nested), Some(part)) => {
                let parts = ["full_attention", "sliding_attention"];
                match parts.iter().any(|part| nested.contains_key(*part)) {
                    true => object(Settings::of(nested), part)?,
                    // The older spelling is of the blocks that see everything.
                    false => Some(nested).filter(|_| !is_local),
                }
            }
            (nested, None) => nested,
            (None, Some(_)) => None,
        };
        let own = Settings::of(own.unwrap_or(&EMPTY));
        let theta = match is_local {
            true => config.positive("rope_local_base_freq")?,
            false => config.positive("rope_theta")?,
        };
        let kind = match own.text("rope_type")? {
            Some(kind) => kind,
            None => own.text("type")?.unwrap_or("default"),
        };
        Ok(Self {
            own,
            kind,
            theta: own.positive("rope_theta")?.or(theta).unwrap_or(10_000.0),
        })
    }
}

/// Settings of nothing.
static EMPTY: std::sync::LazyLock<Map<String, serde_json::Value>> =
    std::sync::LazyLock::new(Map::new);

/// The settings of Llama 3's scaling.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Llama3 {
    pub(super) factor: f32,
    pub(super) low: f32,
    pub(super) high: f32,
    /// The context that the model was first trained on, in tokens.
    pub(super) original: usize,
}

impl Llama3 {
    /// Reads the settings of a rotary embedding.
    pub(super) fn of(own: Settings<'_>, original: usize) -> Result<Self, ConfigError> {
        let needed = |setting: &'static str| -> Result<f32, ConfigError> {
            let value = own.positive(setting)?;
            Ok(narrowed(value.ok_or(ConfigError::Missing { setting })?))
        };
        Ok(Self {
            factor: needed("factor")?,
            low: needed("low_freq_factor")?,
            high: needed("high_freq_factor")?,
            original,
        })
    }

    /// What the wavelength of each pair of a head of `dim` elements is multiplied by: 1 for short ones, `factor` for long ones, and
    /// between. In f32 and in the order of llama.cpp's converter, whose divisions of numbers by tensors are PyTorch's: products with
    /// the reciprocal.
    #[expect(
        clippy::cast_precision_loss,
        reason = "numbers of tokens, as PyTorch rounds them, and a head is far below 2^24 wide"
    )]
    pub(super) fn factors(self, theta: f64, dim: usize) -> Vec<f32> {
        let original = self.original as f32;
        let (longest, shortest) = (original / self.low, original / self.high);
        let theta = narrowed(theta);
        (0..dim / 2)
            .map(|pair| {
                let period = theta.powf((2 * pair) as f32 / dim as f32);
                let frequency = period.recip();
                let wavelength = frequency.recip() * (2.0 * std::f32::consts::PI);
                if wavelength < shortest {
                    1.0
                } else if wavelength > longest {
                    self.factor
                } else {
                    let turns = wavelength.recip() * original;
                    let smooth = (turns - self.low) / (self.high - self.low);
                    ((1.0 - smooth) / self.factor + smooth).recip()
                }
            })
            .collect()
    }

    /// The settings that give exactly `factors`, if those are of a kind that is published: parts of 1 and 4, a factor that the longest
    /// wave has, and a context that is a power of two.
    pub(super) fn recovered(factors: &[f32], theta: f64) -> Option<Self> {
        let &factor = factors.last()?;
        let contexts = (4..=20).map(|power| 1 << power);
        contexts
            .map(|original| Self {
                factor,
                low: 1.0,
                high: 4.0,
                original,
            })
            .find(|it| it.factors(theta, 2 * factors.len()) == factors)
    }
}

/// What LongRoPE multiplies cosines and sines by, if the config does not say it.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    reason = "numbers of tokens; the result is stored as f32"
)]
pub(super) fn long_attention_factor(context: usize, original: usize) -> f32 {
    let scale = context as f64 / original as f64;
    match scale > 1.0 {
        true => (1.0 + scale.ln() / (original as f64).ln()).sqrt() as f32,
        false => 1.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_settings_are_recovered_from_their_factors_and_others_are_not() {
        for (factor, original, theta, dim) in [
            (8.0, 8192, 5e5, 128),
            (32.0, 8192, 5e5, 64),
            (8.0, 32, 5e4, 16),
        ] {
            let settings = Llama3 {
                factor,
                low: 1.0,
                high: 4.0,
                original,
            };
            let mut factors = settings.factors(theta, dim);
            let found = Llama3::recovered(&factors, theta).expect("settings");
            assert_eq!(found.factors(theta, dim), factors);
            assert_eq!(found.factor, factor);
            let middle = factors
                .iter()
                .position(|&it| it != 1.0)
                .expect("a long wave");
            factors[middle] *= 1.000_001;
            assert_eq!(Llama3::recovered(&factors, theta), None);
        }
        assert_eq!(Llama3::recovered(&[], 1e4), None);
    }
}
