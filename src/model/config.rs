//! `config.json` resolved into the numbers a decoder needs.
//!
//! In: the JSON of a Hugging Face `config.json`. Out: a [`Config`] whose sizes fit together, or a refusal that names the
//! setting. A setting of another family that would change numbers is refused, never ignored.

use serde_json::{Map, Value};
use thiserror::Error;

use super::frequencies::Frequencies;
use super::kernels::rope::Heads;

/// The `model_type`s this decoder computes exactly.
pub const MODEL_TYPES: [&str; 2] = ["llama", "mistral"];

/// A decoder's shape and constants.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// `model_type`.
    pub model_type: String,
    /// Rows of the embedding: token ids are below this.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Number of query heads.
    pub num_attention_heads: usize,
    /// Number of key heads and of value heads; divides `num_attention_heads`.
    pub num_key_value_heads: usize,
    /// Elements of one head; even.
    pub head_dim: usize,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f32,
    /// Rotary embedding, scaling applied.
    pub frequencies: Frequencies,
    /// How many tokens a token looks back on, itself included; `None` is all.
    pub sliding_window: Option<usize>,
    /// Whether q, k, v and o projections have biases.
    pub attention_bias: bool,
    /// Whether gate, up and down projections have biases.
    pub mlp_bias: bool,
    /// Whether the output head is the embedding.
    pub tie_word_embeddings: bool,
    /// Longest sequence the model was made for, in tokens.
    pub max_position_embeddings: usize,
}

impl Config {
    /// Reads the text of a `config.json`.
    ///
    /// # Errors
    /// [`ConfigError`] when it is no JSON object, a needed setting is missing or of the wrong kind, the sizes do not fit
    /// together, or a setting asks for arithmetic that this decoder does not do.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let settings: Map<String, Value> = serde_json::from_str(text).map_err(ConfigError::Json)?;
        Settings(&settings).resolve()
    }

    /// How query, key and value heads lie in a projection's row.
    pub(crate) fn heads(&self) -> Heads {
        Heads {
            query: self.num_attention_heads,
            key_value: self.num_key_value_heads,
            dim: self.head_dim,
        }
    }
}

/// Why a `config.json` was refused.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// Not a JSON object.
    #[error("it is not a JSON object")]
    Json(#[source] serde_json::Error),
    /// A setting that is needed is not there.
    #[error("`{setting}` is missing")]
    Missing {
        /// The setting's key.
        setting: &'static str,
    },
    /// A setting has another kind of value.
    #[error("`{setting}` is {found}, where {wanted} belongs")]
    Kind {
        /// The setting's key.
        setting: &'static str,
        /// Its value as JSON.
        found: String,
        /// What belongs there.
        wanted: &'static str,
    },
    /// A model family without a decoder here.
    #[error("model type `{found}` is not supported; supported are {}", MODEL_TYPES.join(", "))]
    ModelType {
        /// The family.
        found: String,
    },
    /// A setting whose arithmetic is not implemented.
    #[error("`{setting}` is {found}, which this decoder cannot compute")]
    Unsupported {
        /// The setting's key.
        setting: String,
        /// Its value as JSON.
        found: String,
    },
    /// Sizes that contradict each other.
    #[error("{0}")]
    Sizes(
        /// What does not divide or fit, in words.
        String,
    ),
}

/// Settings of other families, each with the value that leaves the arithmetic alone.
const NEUTRAL: [(&str, f64); 8] = [
    ("attention_multiplier", f64::NAN),
    ("attn_logit_softcapping", f64::NAN),
    ("embedding_multiplier", 1.0),
    ("final_logit_softcapping", f64::NAN),
    ("logits_scaling", 1.0),
    ("partial_rotary_factor", 1.0),
    ("pretraining_tp", 1.0),
    ("residual_multiplier", 1.0),
];

/// Settings of other families that must be absent, null or false.
const ABSENT: [&str; 9] = [
    "clip_qkv",
    "layer_types",
    "no_rope_layers",
    "num_experts",
    "num_local_experts",
    "quantization_config",
    "query_pre_attn_scalar",
    "use_qk_norm",
    "use_sliding_window",
];

/// The raw settings, with typed access.
pub(super) struct Settings<'a>(pub(super) &'a Map<String, Value>);

impl Settings<'_> {
    fn resolve(&self) -> Result<Config, ConfigError> {
        let model_type = self.text("model_type")?.ok_or(ConfigError::Missing {
            setting: "model_type",
        })?;
        if !MODEL_TYPES.contains(&model_type) {
            return Err(ConfigError::ModelType {
                found: model_type.to_owned(),
            });
        }
        self.refuse_foreign_arithmetic(model_type)?;
        let hidden_size = self.needed("hidden_size")?;
        let num_attention_heads = self.needed("num_attention_heads")?;
        let head_dim = match self.size("head_dim")? {
            Some(dim) => dim,
            None if hidden_size % num_attention_heads == 0 => hidden_size / num_attention_heads,
            None => {
                return Err(ConfigError::Sizes(format!(
                    "`hidden_size` {hidden_size} is no multiple of `num_attention_heads` {num_attention_heads}"
                )));
            }
        };
        let num_key_value_heads = self
            .size("num_key_value_heads")?
            .unwrap_or(num_attention_heads);
        if num_attention_heads % num_key_value_heads != 0 {
            return Err(ConfigError::Sizes(format!(
                "`num_attention_heads` {num_attention_heads} is no multiple of `num_key_value_heads` {num_key_value_heads}"
            )));
        }
        if head_dim % 2 != 0 {
            return Err(ConfigError::Sizes(format!(
                "`head_dim` {head_dim} is odd, and rotary embedding rotates pairs"
            )));
        }
        let max_position_embeddings = self.size("max_position_embeddings")?.unwrap_or(2048);
        Ok(Config {
            vocab_size: self.needed("vocab_size")?,
            hidden_size,
            intermediate_size: self.needed("intermediate_size")?,
            num_hidden_layers: self.needed("num_hidden_layers")?,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            rms_norm_eps: self.number("rms_norm_eps")?.map_or(1e-6, narrowed),
            frequencies: Frequencies::resolve(self, head_dim)?,
            sliding_window: match model_type {
                "mistral" => self.size("sliding_window")?,
                _ => None,
            },
            attention_bias: self.flag("attention_bias")?,
            mlp_bias: self.flag("mlp_bias")?,
            tie_word_embeddings: self.flag("tie_word_embeddings")?,
            max_position_embeddings,
            model_type: model_type.to_owned(),
        })
    }

    /// Refuses settings that would change numbers and that nothing here reads.
    fn refuse_foreign_arithmetic(&self, model_type: &str) -> Result<(), ConfigError> {
        let unsupported = |setting: &str, value: &Value| ConfigError::Unsupported {
            setting: setting.to_owned(),
            found: value.to_string(),
        };
        if let Some(act) = self
            .0
            .get("hidden_act")
            .filter(|act| act.as_str() != Some("silu"))
        {
            return Err(unsupported("hidden_act", act));
        }
        for (setting, neutral) in NEUTRAL {
            match self.0.get(setting) {
                None | Some(Value::Null) => {}
                Some(value) if value.as_f64() == Some(neutral) => {}
                Some(value) => return Err(unsupported(setting, value)),
            }
        }
        for setting in ABSENT {
            match self.0.get(setting) {
                None | Some(Value::Null | Value::Bool(false)) => {}
                Some(value) => return Err(unsupported(setting, value)),
            }
        }
        if model_type == "llama"
            && let Some(value) = self
                .0
                .get("sliding_window")
                .filter(|value| !value.is_null())
        {
            return Err(unsupported("sliding_window", value));
        }
        Ok(())
    }

    fn value(&self, setting: &str) -> Option<&Value> {
        self.0.get(setting).filter(|value| !value.is_null())
    }

    pub(super) fn text(&self, setting: &'static str) -> Result<Option<&str>, ConfigError> {
        self.typed(setting, "a string", Value::as_str)
    }

    pub(super) fn number(&self, setting: &'static str) -> Result<Option<f64>, ConfigError> {
        self.typed(setting, "a number", Value::as_f64)
    }

    pub(super) fn flag(&self, setting: &'static str) -> Result<bool, ConfigError> {
        Ok(self
            .typed(setting, "true or false", Value::as_bool)?
            .unwrap_or(false))
    }

    /// A positive number that must be there.
    pub(super) fn positive(&self, setting: &'static str) -> Result<f64, ConfigError> {
        self.typed(setting, "a number above 0", |value| {
            value.as_f64().filter(|&x| x > 0.0)
        })?
        .ok_or(ConfigError::Missing { setting })
    }

    /// A size of at least 1 and below 2^31, so that products of two fit u64 everywhere.
    fn size(&self, setting: &'static str) -> Result<Option<usize>, ConfigError> {
        self.typed(setting, "a whole number from 1 to 2147483647", |value| {
            let size = value.as_u64().filter(|size| (1..1 << 31).contains(size))?;
            usize::try_from(size).ok()
        })
    }

    fn needed(&self, setting: &'static str) -> Result<usize, ConfigError> {
        self.size(setting)?.ok_or(ConfigError::Missing { setting })
    }

    fn typed<'v, T>(
        &'v self,
        setting: &'static str,
        wanted: &'static str,
        read: impl Fn(&'v Value) -> Option<T>,
    ) -> Result<Option<T>, ConfigError> {
        self.value(setting)
            .map(|value| {
                read(value).ok_or_else(|| ConfigError::Kind {
                    setting,
                    found: value.to_string(),
                    wanted,
                })
            })
            .transpose()
    }
}

/// A setting as the f32 that the arithmetic runs in.
#[expect(
    clippy::cast_possible_truncation,
    reason = "rounding to f32 is what PyTorch does with these constants"
)]
pub(super) fn narrowed(x: f64) -> f32 {
    x as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A config with the given settings added to, or replacing, the needed ones.
    fn parse(changes: &str) -> Result<Config, ConfigError> {
        let mut settings: Map<String, Value> = serde_json::from_str(
            r#"{"model_type": "llama", "vocab_size": 10, "hidden_size": 32, "intermediate_size": 64,
                "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu"}"#,
        )
        .expect("an object");
        settings.extend(serde_json::from_str::<Map<String, Value>>(changes).expect("an object"));
        Config::parse(&Value::Object(settings).to_string())
    }

    #[test]
    fn defaults_are_those_of_transformers() {
        let config = parse("{}").expect("a config");
        assert_eq!((config.head_dim, config.rms_norm_eps), (8, 1e-6));
        assert!(
            !config.tie_word_embeddings
                && !config.attention_bias
                && config.sliding_window.is_none()
        );
    }

    #[test]
    fn refusals_name_the_setting() {
        for (changes, words) in [
            (
                r#"{"model_type": "gpt2"}"#,
                "model type `gpt2` is not supported; supported are llama, mistral",
            ),
            (r#"{"hidden_act": "gelu"}"#, "`hidden_act` is \"gelu\""),
            (r#"{"vocab_size": null}"#, "`vocab_size` is missing"),
            (
                r#"{"vocab_size": -1}"#,
                "`vocab_size` is -1, where a whole number",
            ),
            (r#"{"hidden_size": 30}"#, "`hidden_size` 30 is no multiple"),
            (
                r#"{"num_key_value_heads": 3}"#,
                "is no multiple of `num_key_value_heads` 3",
            ),
            (r#"{"head_dim": 7}"#, "`head_dim` 7 is odd"),
            (
                r#"{"final_logit_softcapping": 30.0}"#,
                "`final_logit_softcapping` is 30.0",
            ),
            (
                r#"{"quantization_config": {"bits": 4}}"#,
                "`quantization_config` is {\"bits\":4}",
            ),
            (r#"{"sliding_window": 4}"#, "`sliding_window` is 4"),
            (
                r#"{"attention_bias": "yes"}"#,
                "`attention_bias` is \"yes\", where true or false",
            ),
        ] {
            let error = parse(changes).expect_err(changes).to_string();
            assert!(error.contains(words), "{changes}: {error}");
        }
        assert!(matches!(Config::parse("[1]"), Err(ConfigError::Json(_))));
    }
}
