//! The frequencies of rotary position embedding, with the scalings that stretch a model's context.
//!
//! In: the rope settings of a `config.json`, as transformers 5 writes them (`rope_parameters`) or as it did before (`rope_theta`
//! and `rope_scaling`). Out: one inverse frequency for each rotated pair of dimensions. All arithmetic is f32, in the order
//! of transformers' `modeling_rope_utils.py`, since an angle is a frequency times a position of thousands.

use serde_json::{Map, Value};

use super::config::{ConfigError, Settings, narrowed};

/// How far each pair of dimensions turns from one token to the next.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Frequencies {
    /// Radians per token of each pair: `head_dim / 2` values.
    pub inverse: Vec<f32>,
    /// What cosines and sines are multiplied by; 1 but for YaRN.
    pub attention_factor: f32,
}

impl Frequencies {
    /// Reads the rope settings of a config.
    pub(super) fn resolve(config: &Settings<'_>, head_dim: usize) -> Result<Self, ConfigError> {
        let nested = ["rope_parameters", "rope_scaling"]
            .into_iter()
            .find_map(|key| config.0.get(key).filter(|value| !value.is_null()));
        let empty = Map::new();
        let rope = match nested {
            None => Settings(&empty),
            Some(Value::Object(rope)) => Settings(rope),
            Some(other) => {
                return Err(ConfigError::Kind {
                    setting: "rope_parameters",
                    found: other.to_string(),
                    wanted: "an object",
                });
            }
        };
        if let Some(value) = rope
            .0
            .get("partial_rotary_factor")
            .filter(|v| v.as_f64() != Some(1.0))
        {
            return Err(ConfigError::Unsupported {
                setting: "partial_rotary_factor".to_owned(),
                found: value.to_string(),
            });
        }
        let theta = match rope.number("rope_theta")? {
            Some(theta) => theta,
            None => config.number("rope_theta")?.unwrap_or(10_000.0),
        };
        let kind = match rope.text("rope_type")? {
            Some(kind) => kind,
            None => rope.text("type")?.unwrap_or("default"),
        };
        let periods = periods(narrowed(theta), head_dim);
        let inverse: Vec<f32> = periods.iter().map(|period| 1.0 / period).collect();
        match kind {
            "default" => Ok(Self::unscaled(inverse)),
            "linear" => {
                let factor = narrowed(rope.positive("factor")?);
                Ok(Self::unscaled(
                    inverse.into_iter().map(|f| f / factor).collect(),
                ))
            }
            "llama3" => llama3(&rope, inverse),
            "yarn" => yarn(&rope, theta, &periods),
            other => Err(ConfigError::Unsupported {
                setting: "rope_type".to_owned(),
                found: format!("\"{other}\""),
            }),
        }
    }

    fn unscaled(inverse: Vec<f32>) -> Self {
        Self {
            inverse,
            attention_factor: 1.0,
        }
    }
}

/// Llama 3: long waves are slowed by `factor`, short ones kept, those between interpolated.
fn llama3(rope: &Settings<'_>, inverse: Vec<f32>) -> Result<Frequencies, ConfigError> {
    let factor = narrowed(rope.positive("factor")?);
    let low = narrowed(rope.positive("low_freq_factor")?);
    let high = narrowed(rope.positive("high_freq_factor")?);
    let context = narrowed(rope.positive("original_max_position_embeddings")?);
    if high <= low {
        return Err(ConfigError::Sizes(format!(
            "`high_freq_factor` {high} is not above `low_freq_factor` {low}"
        )));
    }
    let scaled = inverse.into_iter().map(|f| {
        let wavelength = 2.0 * std::f32::consts::PI / f;
        if wavelength < context / high {
            f
        } else if wavelength > context / low {
            f / factor
        } else {
            let smooth = (context / wavelength - low) / (high - low);
            (1.0 - smooth) * f / factor + smooth * f
        }
    });
    Ok(Frequencies::unscaled(scaled.collect()))
}

/// YaRN (Peng et al., arXiv:2309.00071): frequencies that turn often are kept, those that turn seldom interpolated, with a ramp
/// between, and attention is sharpened.
#[expect(clippy::cast_precision_loss, reason = "a head is far below 2^24 wide")]
fn yarn(rope: &Settings<'_>, theta: f64, periods: &[f32]) -> Result<Frequencies, ConfigError> {
    let factor = rope.positive("factor")?;
    let context = rope.positive("original_max_position_embeddings")?;
    let sharpness = |weight: f64| {
        if factor > 1.0 {
            0.1 * weight * factor.ln() + 1.0
        } else {
            1.0
        }
    };
    let attention_factor = match (
        rope.number("attention_factor")?,
        rope.number("mscale")?.filter(|&m| m != 0.0),
        rope.number("mscale_all_dim")?.filter(|&m| m != 0.0),
    ) {
        (Some(given), ..) => given,
        (None, Some(mscale), Some(all)) => sharpness(mscale) / sharpness(all),
        _ => sharpness(1.0),
    };
    // The pair that turns `turns` times over the original context.
    let dimensions = 2 * periods.len();
    let pair = |turns: f64| {
        dimensions as f64 * (context / (turns * 2.0 * std::f64::consts::PI)).ln()
            / (2.0 * theta.ln())
    };
    let mut low = pair(rope.number("beta_fast")?.unwrap_or(32.0));
    let mut high = pair(rope.number("beta_slow")?.unwrap_or(1.0));
    if rope.0.get("truncate") != Some(&Value::Bool(false)) {
        (low, high) = (low.floor(), high.ceil());
    }
    let low = low.max(0.0);
    let mut high = high.min((dimensions - 1) as f64);
    if low == high {
        high += 0.001;
    }
    let (low, span, factor) = (narrowed(low), narrowed(high - low), narrowed(factor));
    let inverse = periods.iter().enumerate().map(|(i, period)| {
        let keep = 1.0 - ((i as f32 - low) / span).clamp(0.0, 1.0);
        1.0 / (factor * period) * (1.0 - keep) + 1.0 / period * keep
    });
    Ok(Frequencies {
        inverse: inverse.collect(),
        attention_factor: narrowed(attention_factor),
    })
}

/// theta^(2i / head_dim) for each rotated pair i: its wavelength over 2 pi, in tokens.
#[expect(clippy::cast_precision_loss, reason = "a head is far below 2^24 wide")]
fn periods(theta: f32, head_dim: usize) -> Vec<f32> {
    (0..head_dim / 2)
        .map(|i| theta.powf((2 * i) as f32 / head_dim as f32))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(config: &str) -> Result<Frequencies, ConfigError> {
        let settings = serde_json::from_str(config).expect("an object");
        Frequencies::resolve(&Settings(&settings), 8)
    }

    #[test]
    fn old_and_new_settings_mean_the_same() {
        let old = resolve(
            r#"{"rope_theta": 500000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}"#,
        );
        let new = resolve(
            r#"{"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500000.0}}"#,
        );
        let old = old.expect("frequencies");
        assert_eq!(old, new.expect("frequencies"));
        assert_eq!(old.inverse[0], 0.5);
        assert_eq!(resolve("{}").expect("frequencies").inverse[2], 0.01);
    }

    #[test]
    fn refusals_name_the_setting() {
        for (config, words) in [
            (
                r#"{"rope_scaling": {"rope_type": "longrope"}}"#,
                "`rope_type` is \"longrope\"",
            ),
            (
                r#"{"rope_scaling": {"rope_type": "linear"}}"#,
                "`factor` is missing",
            ),
            (
                r#"{"rope_parameters": 3}"#,
                "`rope_parameters` is 3, where an object",
            ),
            (
                r#"{"rope_parameters": {"partial_rotary_factor": 0.5}}"#,
                "`partial_rotary_factor` is 0.5",
            ),
        ] {
            let error = resolve(config).expect_err(config).to_string();
            assert!(error.contains(words), "{config}: {error}");
        }
    }
}
