//! The frequencies of rotary position embedding, with the scalings that stretch a model's context.
//!
//! In: the rope settings of a `config.json`, as transformers 5 writes them (`rope_parameters`) or as it did before (`rope_theta`
//! and `rope_scaling`). Out: one inverse frequency for each rotated pair of dimensions. All arithmetic is f32, in the order
//! of transformers' `modeling_rope_utils.py`, since an angle is a frequency times a position of thousands.

use serde_json::{Map, Value};

use super::config::ConfigError;
use super::family::Family;
use super::settings::{Settings, narrowed};

/// How far each pair of dimensions turns from one token to the next.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Frequencies {
    /// Radians per token of each pair: at most `head_dim / 2` values. Dimensions beyond twice that many do not turn.
    pub(crate) inverse: Vec<f32>,
    /// What takes the place of `inverse` in sequences longer than a number of tokens.
    pub(crate) long: Option<(usize, Vec<f32>)>,
    /// What cosines and sines are multiplied by; 1 but for YaRN and LongRoPE.
    pub(crate) attention_factor: f32,
}

impl Frequencies {
    /// Reads the rope settings of a config: one rotary embedding for all blocks, or that of the blocks that see everything and that
    /// of those with a window.
    pub(super) fn resolve(
        family: &Family,
        config: Settings<'_>,
        head_dim: usize,
    ) -> Result<Vec<Self>, ConfigError> {
        let object = |setting| -> Result<_, ConfigError> {
            Ok(config.object(setting)?.filter(|it| !it.is_empty()))
        };
        let nested = match (object("rope_parameters")?, object("rope_scaling")?) {
            // transformers 5 would read the old spelling, others the new one.
            (Some(new), Some(old)) if new != old => {
                return Err(ConfigError::Sizes(
                    "`rope_parameters` and `rope_scaling` are both there, and say different things"
                        .to_owned(),
                ));
            }
            (new, old) => new.or(old),
        };
        let empty = Map::new();
        let rope = Settings::of(nested.unwrap_or(&empty));
        let theta = |setting| Ok(config.positive(setting)?.unwrap_or(10_000.0));
        let rotary = |rope, default| Rope::new(family, config, rope, head_dim, default)?.resolve();
        if !family.settings.contains(&"rope_local_base_freq") {
            return Ok(vec![rotary(rope, theta("rope_theta")?)?]);
        }
        let part = |kind| Ok(Settings::of(rope.object(kind)?.unwrap_or(&empty)));
        let parts = ["full_attention", "sliding_attention"];
        let (global, local) = match parts.map(|kind| rope.value(kind)) {
            [None, None] => (rope, Settings::of(&empty)),
            _ => match rope.active().find(|(name, _)| !parts.contains(name)) {
                None => (part(parts[0])?, part(parts[1])?),
                Some(beside) => return Err(unsupported(beside)),
            },
        };
        Ok(vec![
            rotary(global, theta("rope_theta")?)?,
            rotary(local, theta("rope_local_base_freq")?)?,
        ])
    }

    /// The length above which a sequence has other frequencies, if there is one.
    pub(crate) fn switches_above(&self) -> Option<usize> {
        self.long.as_ref().map(|(above, _)| *above)
    }

    /// Sound settings can still divide by 0, such as by the logarithm of a context of 1.
    fn are_finite(&self) -> bool {
        let long = self.long.iter().flat_map(|(_, inverse)| inverse);
        let mut all = self.inverse.iter().chain(long);
        self.attention_factor.is_finite() && all.all(|it| it.is_finite())
    }

    fn unscaled(inverse: Vec<f32>) -> Self {
        Self {
            inverse,
            long: None,
            attention_factor: 1.0,
        }
    }
}

/// The settings of one rotary embedding.
struct Rope<'a> {
    /// Those of the whole model.
    config: Settings<'a>,
    /// Its own.
    own: Settings<'a>,
    kind: &'a str,
    theta: f64,
    /// The wavelength of each pair over 2 pi, in tokens.
    periods: Vec<f32>,
}

impl<'a> Rope<'a> {
    fn new(
        family: &Family,
        config: Settings<'a>,
        own: Settings<'a>,
        head_dim: usize,
        default_theta: f64,
    ) -> Result<Self, ConfigError> {
        if let Some(unknown) = own.active().find(|(name, _)| !KNOWN.contains(name)) {
            return Err(unsupported(unknown));
        }
        let kind = match own.text("rope_type")? {
            Some(kind) => kind,
            None => own.text("type")?.unwrap_or("default"),
        };
        // Phi 3 came with two earlier names for it.
        let kind = match (family.model_type, kind) {
            ("phi3", "su" | "yarn") => "longrope",
            (_, kind) => kind,
        };
        let is_partial = family.settings.contains(&PARTIAL);
        let share = match own.positive(PARTIAL)? {
            None if is_partial => config.positive(PARTIAL)?.unwrap_or(1.0),
            share => share.unwrap_or(1.0),
        };
        if share > 1.0 || (share != 1.0 && !is_partial) {
            return Err(ConfigError::Unsupported {
                setting: PARTIAL.to_owned(),
                found: share.to_string(),
            });
        }
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_precision_loss,
            clippy::cast_sign_loss,
            reason = "a positive share of a head, cut to a whole number as transformers does"
        )]
        let dimensions = (head_dim as f64 * share) as usize;
        if !dimensions.is_multiple_of(2) || dimensions == 0 {
            return Err(ConfigError::Sizes(format!(
                "`{PARTIAL}` {share} rotates {dimensions} of {head_dim} dimensions, which are no pairs"
            )));
        }
        let theta = own.positive("rope_theta")?.unwrap_or(default_theta);
        Ok(Self {
            config,
            own,
            kind,
            theta,
            periods: periods(narrowed(theta), dimensions),
        })
    }

    fn resolve(&self) -> Result<Frequencies, ConfigError> {
        let frequencies = match self.kind {
            "default" => Frequencies::unscaled(self.inverse()),
            "linear" => {
                let factor = narrowed(self.needed("factor")?);
                let inverse = self.inverse().into_iter().map(|f| f / factor);
                Frequencies::unscaled(inverse.collect())
            }
            "llama3" => self.llama3()?,
            "longrope" => self.longrope()?,
            "yarn" => self.yarn()?,
            other => {
                return Err(ConfigError::Unsupported {
                    setting: "rope_type".to_owned(),
                    found: format!("\"{other}\""),
                });
            }
        };
        match frequencies.are_finite() {
            true => Ok(frequencies),
            false => Err(ConfigError::Sizes(format!(
                "the rope settings, of type `{}` with a theta of {}, give frequencies that are not finite",
                self.kind, self.theta
            ))),
        }
    }

    /// The frequencies without any scaling.
    fn inverse(&self) -> Vec<f32> {
        self.periods.iter().map(|period| 1.0 / period).collect()
    }

    fn needed(&self, setting: &'static str) -> Result<f64, ConfigError> {
        self.own
            .positive(setting)?
            .ok_or(ConfigError::Missing { setting })
    }

    /// The context that the model was first trained on, in tokens. Where it is given twice, the model's own counts.
    fn original_context(&self) -> Result<f64, ConfigError> {
        const SETTING: &str = "original_max_position_embeddings";
        for (settings, name) in [
            (self.config, SETTING),
            (self.own, SETTING),
            (self.config, "max_position_embeddings"),
        ] {
            if let Some(context) = settings.positive(name)? {
                return Ok(context);
            }
        }
        Err(ConfigError::Missing { setting: SETTING })
    }

    /// Llama 3: long waves are slowed by `factor`, short ones kept, those between interpolated.
    fn llama3(&self) -> Result<Frequencies, ConfigError> {
        let factor = narrowed(self.needed("factor")?);
        let low = narrowed(self.needed("low_freq_factor")?);
        let high = narrowed(self.needed("high_freq_factor")?);
        let context = narrowed(self.original_context()?);
        if high <= low {
            return Err(ConfigError::Sizes(format!(
                "`high_freq_factor` {high} is not above `low_freq_factor` {low}"
            )));
        }
        let scaled = self.inverse().into_iter().map(|f| {
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
    fn yarn(&self) -> Result<Frequencies, ConfigError> {
        let (rope, theta, periods) = (self.own, self.theta, &self.periods);
        let factor = self.needed("factor")?;
        let context = self.original_context()?;
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
        let mut low = pair(rope.positive("beta_fast")?.unwrap_or(32.0));
        let mut high = pair(rope.positive("beta_slow")?.unwrap_or(1.0));
        if rope.optional_flag("truncate")? != Some(false) {
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
            long: None,
            attention_factor: narrowed(attention_factor),
        })
    }

    /// LongRoPE (Ding et al., arXiv:2402.13753): each pair has a factor of its own, and another in sequences longer than the original
    /// context. Which one a row gets depends on its own length, as if it ran alone.
    fn longrope(&self) -> Result<Frequencies, ConfigError> {
        let context = self.original_context()?;
        let factors = |setting| -> Result<Vec<f32>, ConfigError> {
            let factors = self
                .own
                .numbers(setting)?
                .ok_or(ConfigError::Missing { setting })?;
            if factors.len() != self.periods.len() {
                return Err(ConfigError::Sizes(format!(
                    "`{setting}` has {} factors for {} pairs of dimensions",
                    factors.len(),
                    self.periods.len()
                )));
            }
            if factors.iter().any(|&factor| factor <= 0.0) {
                return Err(ConfigError::Sizes(format!(
                    "`{setting}` has a factor that is not above 0"
                )));
            }
            let pairs = factors.iter().zip(&self.periods);
            Ok(pairs
                .map(|(&factor, period)| 1.0 / (narrowed(factor) * period))
                .collect())
        };
        let factor = match self.own.positive("factor")? {
            Some(factor) => factor,
            None => {
                let setting = "max_position_embeddings";
                let longest = self.config.positive(setting)?;
                longest.ok_or(ConfigError::Missing { setting })? / context
            }
        };
        let attention_factor = match self.own.positive("attention_factor")? {
            Some(given) => given,
            None if factor <= 1.0 => 1.0,
            None => (1.0 + factor.ln() / context.ln()).sqrt(),
        };
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a number of tokens"
        )]
        let above = context as usize;
        Ok(Frequencies {
            inverse: factors("short_factor")?,
            long: Some((above, factors("long_factor")?)),
            attention_factor: narrowed(attention_factor),
        })
    }
}

/// The refusal of a setting of a rotary embedding.
fn unsupported((setting, value): (&str, &Value)) -> ConfigError {
    ConfigError::Unsupported {
        setting: format!("rope_parameters.{setting}"),
        found: value.to_string(),
    }
}

/// What the settings of a rotary embedding may be called.
const KNOWN: &[&str] = &[
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "factor",
    // Of the first YaRN models, and read by nothing since.
    "finetuned",
    "high_freq_factor",
    "long_factor",
    "low_freq_factor",
    "mscale",
    "mscale_all_dim",
    "original_max_position_embeddings",
    PARTIAL,
    "rope_theta",
    "rope_type",
    "short_factor",
    "truncate",
    "type",
];

/// The share of a head that is rotated.
const PARTIAL: &str = "partial_rotary_factor";

/// theta^(2i / dimensions) for each rotated pair i: its wavelength over 2 pi, in tokens.
#[expect(clippy::cast_precision_loss, reason = "a head is far below 2^24 wide")]
fn periods(theta: f32, dimensions: usize) -> Vec<f32> {
    (0..dimensions / 2)
        .map(|i| theta.powf((2 * i) as f32 / dimensions as f32))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve_as(model_type: &str, config: &str) -> Result<Frequencies, ConfigError> {
        let settings = serde_json::from_str(config).expect("an object");
        let family = Family::named(model_type).expect("a family");
        let mut rotary = Frequencies::resolve(family, Settings::of(&settings), 8)?;
        assert_eq!(rotary.len(), 1);
        Ok(rotary.remove(0))
    }

    fn resolve(config: &str) -> Result<Frequencies, ConfigError> {
        resolve_as("llama", config)
    }

    #[test]
    fn long_contexts_have_factors_of_their_own() {
        let found = resolve_as(
            "phi3",
            r#"{"max_position_embeddings": 4096, "original_max_position_embeddings": 64, "partial_rotary_factor": 0.5,
                "rope_theta": 100.0, "rope_scaling": {"type": "su", "short_factor": [1.0, 2.0], "long_factor": [4.0, 5.0]}}"#,
        )
        .expect("frequencies");
        assert_eq!(found.inverse, [1.0, 0.05]);
        assert_eq!(found.long, Some((64, vec![0.25, 0.02])));
        // sqrt(1 + ln 64 / ln 64)
        assert_eq!(found.attention_factor, 2f32.sqrt());
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
        let both = resolve(
            r#"{"rope_theta": 500000.0, "rope_parameters": {}, "rope_scaling": {"type": "linear", "factor": 2.0}}"#,
        );
        assert_eq!(old, both.expect("frequencies"));
        assert_eq!(resolve("{}").expect("frequencies").inverse[2], 0.01);
    }

    #[test]
    fn refusals_name_the_setting() {
        for (config, words) in [
            (
                r#"{"rope_scaling": {"rope_type": "dynamic"}}"#,
                "`rope_type` is \"dynamic\"",
            ),
            (
                r#"{"rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]}}"#,
                "`rope_parameters.mrope_section` is [1,1,2]",
            ),
            (
                r#"{"max_position_embeddings": 8, "rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}"#,
                "`short_factor` has 1 factors for 4 pairs",
            ),
            (
                r#"{"rope_scaling": {"rope_type": "linear"}}"#,
                "`factor` is missing",
            ),
            (
                r#"{"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}"#,
                "`rope_parameters` and `rope_scaling` are both there, and say different things",
            ),
            (
                r#"{"rope_parameters": 3}"#,
                "`rope_parameters` is 3, where an object",
            ),
            (
                r#"{"rope_parameters": {"partial_rotary_factor": 0.5}}"#,
                "`partial_rotary_factor` is 0.5",
            ),
            (
                r#"{"rope_scaling": {"rope_type": "linear", "factor": 0}}"#,
                "`factor` is 0, where a number above 0",
            ),
            (
                r#"{"rope_scaling": {"rope_type": "linear", "factor": 1e-50}}"#,
                "where a number above 0 that f32 holds",
            ),
            (
                r#"{"rope_scaling": {"rope_type": "yarn", "factor": 4, "beta_fast": -32, "original_max_position_embeddings": 64}}"#,
                "`beta_fast` is -32, where a number above 0",
            ),
            (
                r#"{"max_position_embeddings": 8, "original_max_position_embeddings": 1, "rope_scaling": {"rope_type": "longrope",
                    "short_factor": [1, 1, 1, 1], "long_factor": [1, 1, 1, 1]}}"#,
                "of type `longrope` with a theta of 10000, give frequencies that are not finite",
            ),
        ] {
            let error = resolve(config).expect_err(config).to_string();
            assert!(error.contains(words), "{config}: {error}");
        }
        let beside = resolve_as(
            "gemma3_text",
            r#"{"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "factor": 8.0}}"#,
        );
        let error = beside.expect_err("a factor of neither").to_string();
        assert!(error.contains("`rope_parameters.factor` is 8.0"), "{error}");
    }
}
