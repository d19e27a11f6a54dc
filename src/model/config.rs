//! `config.json` resolved into the numbers a decoder needs.
//!
//! In: the JSON of a Hugging Face `config.json`. Out: a [`Config`] whose sizes fit together, or a refusal that names the
//! setting. A setting that its [`Family`] does not read and that is not known to change no number is refused, never ignored.

use serde_json::{Map, Value};
use thiserror::Error;

use super::family::{
    Activation, AttentionBias, COMMON, EmbeddingScale, ExpertNames, Family, HeadNormSpan, INERT,
    INERT_AFFIXES, MODEL_TYPES, NEUTRAL, NormPlacement, Windows,
};
use super::frequencies::Frequencies;
use super::kernels::attention::Scores;
use super::kernels::rope::{Heads, Pairs};
use super::kernels::tanh;
use super::settings::{Settings, narrowed};

/// A decoder's shape and constants.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Config {
    /// `model_type`; of a model with several towers, that of its text part.
    pub model_type: &'static str,
    /// Rows of the embedding: token ids are below this.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Number of query heads.
    pub num_attention_heads: usize,
    /// Number of key heads and of value heads; divides `num_attention_heads`.
    pub num_key_value_heads: usize,
    /// Elements of one head; even.
    pub head_dim: usize,
    /// Whether the output head is the embedding.
    pub tie_word_embeddings: bool,
    /// What is particular to each block, in order.
    pub(crate) blocks: Vec<BlockConfig>,
    /// Rotary embeddings, scaling applied; each block names its own.
    pub(crate) rotary: Vec<Frequencies>,
    /// Added to the mean square in RMSNorm.
    pub(crate) rms_norm_eps: f32,
    /// Where norms stand in a block.
    pub(crate) norms: NormPlacement,
    /// Added to the stored weights of norms.
    pub(crate) norm_offset: f32,
    /// Norms of queries and keys.
    pub(crate) head_norm: Option<HeadNormSpan>,
    /// Whether query, key and value projection have biases.
    pub(crate) qkv_bias: bool,
    /// Whether the output projection has one.
    pub(crate) output_bias: bool,
    /// Whether gate, up and down projections have biases.
    pub(crate) mlp_bias: bool,
    /// Whether query, key and value are one stored matrix, and gate and up another.
    pub(crate) fused: bool,
    /// The gate's nonlinearity.
    pub(crate) activation: Activation,
    /// How products of queries and keys become scores.
    pub(crate) scores: Scores,
    /// Factor on the embedding.
    pub(crate) embedding_multiplier: f32,
    /// Factor on what attention and feed-forward layer add to the residual stream.
    pub(crate) residual_multiplier: f32,
    /// What follows the output matrix.
    pub(crate) logits: Logits,
    /// The experts of those blocks that have some.
    pub(crate) experts: Option<Experts>,
    /// Which dimensions of a query or key head turn together.
    pub(crate) pairs: Pairs,
}

/// What is particular to one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BlockConfig {
    /// How many tokens a token looks back on, itself included; `None` is all.
    pub(crate) window: Option<usize>,
    /// Index into [`Config::rotary`].
    pub(crate) rotary: usize,
    /// Width of the feed-forward layer, of one expert where there are several.
    pub(crate) width: usize,
    /// Whether the feed-forward layer is a mixture of experts.
    pub(crate) is_mixture: bool,
}

/// From the output matrix to logits: times `scale`, then `softcap` tanh(x / `softcap`).
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Logits {
    pub(crate) scale: f32,
    pub(crate) softcap: Option<f32>,
}

impl Logits {
    /// The logit of what the output matrix gave.
    #[inline(always)]
    pub(crate) fn of(self, product: f32) -> f32 {
        let scaled = self.scale * product;
        self.softcap.map_or(scaled, |cap| cap * tanh(scaled / cap))
    }
}

/// A mixture of experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Experts {
    /// How many there are in a block.
    pub(crate) count: usize,
    /// How many a token is sent to; at most `count`.
    pub(crate) per_token: usize,
    /// Whether a token's weights are scaled to a sum of 1.
    pub(crate) normalized: bool,
    /// What their tensors are called.
    pub(crate) names: ExpertNames,
}

impl Config {
    /// Reads the text of a `config.json`.
    ///
    /// # Errors
    /// [`ConfigError`] when it is no JSON object, a needed setting is missing or of the wrong kind, the sizes do not fit
    /// together, or a setting asks for arithmetic that this decoder does not do.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let whole: Map<String, Value> = serde_json::from_str(text).map_err(ConfigError::Json)?;
        let TextPart {
            family,
            settings,
            outer,
        } = TextPart::of(&whole)?;
        if let Some(outer) = outer {
            if let Some(found) = outer
                .text("model_type")?
                .filter(|outer| !SEVERAL_TOWERS.contains(outer))
            {
                return Err(ConfigError::SeveralTowers {
                    found: found.to_owned(),
                });
            }
            refuse_quantized(outer)?;
        }
        let tied = match (
            settings.optional_flag("tie_word_embeddings")?,
            outer
                .map(|outer| outer.optional_flag("tie_word_embeddings"))
                .transpose()?
                .flatten(),
        ) {
            (Some(inner), Some(outer)) if inner != outer => {
                return Err(ConfigError::Sizes(format!(
                    "`tie_word_embeddings` is {outer}, and {inner} in `text_config`"
                )));
            }
            (Some(tied), _) | (None, Some(tied)) => tied,
            (None, None) => family.tied,
        };
        resolve(family, settings, tied)
    }

    /// The same model over tensors as GGUF stores them: the weights of norms are what is multiplied with, a family's offset
    /// included, and where `reordered`, the rows of query and key projections stand so that neighbors turn together.
    #[must_use]
    pub fn over_gguf(self, reordered: bool) -> Self {
        Self {
            norm_offset: 0.0,
            pairs: match reordered {
                true => Pairs::Neighbors,
                false => Pairs::Halves,
            },
            ..self
        }
    }

    /// Number of blocks.
    pub fn num_hidden_layers(&self) -> usize {
        self.blocks.len()
    }

    /// Whether there are norms between the layers and the residual stream.
    pub(crate) fn has_out_norms(&self) -> bool {
        self.norms != NormPlacement::Before
    }

    /// How query, key and value heads lie in a projection's row.
    pub(crate) fn heads(&self) -> Heads {
        Heads {
            query: self.num_attention_heads,
            key_value: self.num_key_value_heads,
            dim: self.head_dim,
            pairs: self.pairs,
        }
    }
}

/// The settings of a model's decoder of text, with its family's defaults.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TextPart<'a> {
    pub(super) family: &'static Family,
    /// The settings.
    pub(crate) settings: Settings<'a>,
    /// Those of the whole, where there are several towers.
    outer: Option<Settings<'a>>,
}

impl<'a> TextPart<'a> {
    /// Finds them in a config.
    pub(crate) fn of(whole: &'a Map<String, Value>) -> Result<Self, ConfigError> {
        let whole = Settings::of(whole);
        // Of a model with several towers, only the text part is computed.
        let text_part = whole.object("text_config")?;
        let settings = text_part.map_or(whole, Settings::of);
        let model_type = match (settings.text("model_type")?, whole.text("model_type")?) {
            (None, Some("gemma3")) => "gemma3_text",
            (Some(model_type), _) | (None, Some(model_type)) => model_type,
            (None, None) => {
                return Err(ConfigError::Missing {
                    setting: "model_type",
                });
            }
        };
        let Some(family) = Family::named(model_type) else {
            return Err(ConfigError::ModelType {
                found: model_type.to_owned(),
            });
        };
        Ok(Self {
            family,
            settings: settings.with_defaults(family.defaults),
            outer: text_part.map(|_| whole),
        })
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
    /// A model with several towers whose text part may not be computed as it is alone.
    #[error(
        "model type `{found}` has several towers, and only of {} is the text part known to be computed as it is alone",
        SEVERAL_TOWERS.join(", ")
    )]
    SeveralTowers {
        /// The type of the whole.
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
    /// A setting that nothing here knows.
    #[error("`{setting}` is {found}, and what that does to a `{model_type}` model is not known")]
    Unknown {
        /// The setting's key.
        setting: String,
        /// Its value as JSON.
        found: String,
        /// The family.
        model_type: &'static str,
    },
    /// Sizes that contradict each other.
    #[error("{0}")]
    Sizes(
        /// What does not divide or fit, in words.
        String,
    ),
}

/// Models with several towers that give text alone to a decoder as it is. Others change its mask or its layers, as PaliGemma does.
const SEVERAL_TOWERS: [&str; 7] = [
    "gemma3",
    "internvl",
    "llava",
    "llava_next",
    "llava_onevision",
    "mistral3",
    "vipllava",
];

fn resolve(
    family: &'static Family,
    settings: Settings<'_>,
    tie_word_embeddings: bool,
) -> Result<Config, ConfigError> {
    refuse_unknown(family, settings)?;
    let hidden_size = settings.needed_size("hidden_size")?;
    let num_attention_heads = settings.needed_size("num_attention_heads")?;
    let head_dim = match settings.size("head_dim")? {
        Some(dim) => dim,
        None if hidden_size % num_attention_heads == 0 => hidden_size / num_attention_heads,
        None => {
            return Err(ConfigError::Sizes(format!(
                "`hidden_size` {hidden_size} is no multiple of `num_attention_heads` {num_attention_heads}"
            )));
        }
    };
    let num_key_value_heads = settings
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
    let num_hidden_layers = settings.needed_size("num_hidden_layers")?;
    for (size, most, what) in [
        (head_dim, MAX_HEAD_DIM, "elements of a head"),
        (num_hidden_layers, MAX_BLOCKS, "blocks"),
    ] {
        if size > most {
            return Err(ConfigError::Sizes(format!(
                "it asks for {size} {what}, above the limit of {most}"
            )));
        }
    }
    check_activation(family, settings)?;
    let bias = settings.flag("attention_bias")?;
    let (qkv_bias, output_bias) = match family.attention_bias {
        AttentionBias::Never => (false, false),
        AttentionBias::Inputs => (true, false),
        AttentionBias::Setting => (bias, bias),
    };
    let experts = experts(family, settings)?;
    let blocks = blocks(family, settings, num_hidden_layers, experts)?;
    Ok(Config {
        model_type: family.model_type,
        vocab_size: settings.needed_size("vocab_size")?,
        hidden_size,
        num_attention_heads,
        num_key_value_heads,
        head_dim,
        tie_word_embeddings,
        rotary: Frequencies::resolve(family, settings, head_dim)?,
        blocks,
        rms_norm_eps: settings.positive("rms_norm_eps")?.map_or(1e-6, narrowed),
        norms: family.norms,
        norm_offset: family.norm_offset,
        head_norm: family.head_norm,
        qkv_bias,
        output_bias,
        mlp_bias: settings.flag("mlp_bias")?,
        fused: family.fused,
        activation: family.activation,
        scores: Scores {
            scale: score_scale(settings, head_dim)?,
            softcap: settings.positive("attn_logit_softcapping")?.map(narrowed),
        },
        embedding_multiplier: match family.embedding {
            EmbeddingScale::RootOfWidth => root(hidden_size),
            EmbeddingScale::Setting => settings
                .number("embedding_multiplier")?
                .map_or(1.0, narrowed),
        },
        residual_multiplier: settings
            .number("residual_multiplier")?
            .map_or(1.0, narrowed),
        logits: Logits {
            scale: settings
                .positive("logits_scaling")?
                .map_or(1.0, |scaling| narrowed(1.0 / scaling)),
            softcap: settings.positive("final_logit_softcapping")?.map(narrowed),
        },
        experts,
        pairs: Pairs::Halves,
    })
}

/// Refuses whatever the family does not read, unless it is known to change no number.
fn refuse_unknown(family: &'static Family, settings: Settings<'_>) -> Result<(), ConfigError> {
    refuse_quantized(settings)?;
    let (starts, ends) = INERT_AFFIXES;
    for (setting, value) in settings.active() {
        let known = COMMON.contains(&setting)
            || family.settings.contains(&setting)
            || INERT.contains(&setting)
            || starts.iter().any(|start| setting.starts_with(start))
            || ends.iter().any(|end| setting.ends_with(end));
        let neutral = NEUTRAL
            .iter()
            .any(|&(name, neutral)| name == setting && value.as_f64() == Some(neutral));
        if !known && !neutral {
            return Err(ConfigError::Unknown {
                setting: setting.to_owned(),
                found: shortened(value),
                model_type: family.model_type,
            });
        }
    }
    Ok(())
}

fn refuse_quantized(settings: Settings<'_>) -> Result<(), ConfigError> {
    const SETTING: &str = "quantization_config";
    match settings.value(SETTING) {
        Some(value) => Err(ConfigError::Unsupported {
            setting: SETTING.to_owned(),
            found: shortened(value),
        }),
        None => Ok(()),
    }
}

/// A value as JSON, cut where it would fill a screen.
fn shortened(value: &Value) -> String {
    const LONGEST: usize = 200;
    let text = value.to_string();
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

/// Whether the config names the family's own nonlinearity.
fn check_activation(family: &Family, settings: Settings<'_>) -> Result<(), ConfigError> {
    for setting in ["hidden_act", "hidden_activation"] {
        let fits = |name: &str| match family.activation {
            Activation::Silu => matches!(name, "silu" | "swish"),
            Activation::GeluTanh => match name {
                "gelu_pytorch_tanh" | "gelu_new" | "gelu_fast" => true,
                // There the first configs of Gemma mean the approximation by tanh, and later families do not read it.
                "gelu" => setting == "hidden_act",
                _ => false,
            },
        };
        if let Some(name) = settings.text(setting)?.filter(|name| !fits(name)) {
            return Err(ConfigError::Unsupported {
                setting: setting.to_owned(),
                found: format!("\"{name}\""),
            });
        }
    }
    Ok(())
}

/// What products of queries and keys are multiplied by.
fn score_scale(settings: Settings<'_>, head_dim: usize) -> Result<f32, ConfigError> {
    if let Some(multiplier) = settings.positive("attention_multiplier")? {
        return Ok(narrowed(multiplier));
    }
    Ok(match settings.positive("query_pre_attn_scalar")? {
        Some(scalar) => narrowed(1.0 / scalar.sqrt()),
        None => reciprocal_root(head_dim),
    })
}

fn experts(family: &Family, settings: Settings<'_>) -> Result<Option<Experts>, ConfigError> {
    let Some(names) = family.experts else {
        return Ok(None);
    };
    // Both names are in use for the same number.
    let count = match settings.size("num_experts")? {
        Some(count) => count,
        None => settings.needed_size("num_local_experts")?,
    };
    let per_token = settings.needed_size("num_experts_per_tok")?;
    if per_token > count {
        return Err(ConfigError::Sizes(format!(
            "`num_experts_per_tok` {per_token} is above the number of experts, {count}"
        )));
    }
    Ok(Some(Experts {
        count,
        per_token,
        normalized: match names.module {
            "block_sparse_moe" => true,
            _ => settings.flag("norm_topk_prob")?,
        },
        names,
    }))
}

fn blocks(
    family: &Family,
    settings: Settings<'_>,
    count: usize,
    experts: Option<Experts>,
) -> Result<Vec<BlockConfig>, ConfigError> {
    let reads = |setting| family.settings.contains(&setting);
    let size = |setting| match reads(setting) {
        true => settings.size(setting),
        false => Ok(None),
    };
    let window = size("sliding_window")?;
    let used = settings.flag("use_sliding_window")?;
    let types = match reads("layer_types") {
        true => settings.texts("layer_types")?,
        false => None,
    };
    if let Some(types) = types.as_ref().filter(|types| types.len() != count) {
        return Err(ConfigError::Sizes(format!(
            "`layer_types` has {} entries for {count} blocks",
            types.len()
        )));
    }
    let upper = match family.windows {
        Windows::UpperIfUsed => settings.number("max_window_layers")?,
        _ => None,
    };
    let pattern = match size("sliding_window_pattern")? {
        Some(pattern) => Some(pattern),
        None => size("_sliding_window_pattern")?,
    };
    let is_local = |block: usize| -> Result<bool, ConfigError> {
        if let Some(types) = &types {
            return match types[block] {
                "full_attention" => Ok(false),
                "sliding_attention" => Ok(true),
                other => Err(ConfigError::Unsupported {
                    setting: "layer_types".to_owned(),
                    found: format!("\"{other}\""),
                }),
            };
        }
        #[expect(clippy::cast_precision_loss, reason = "a number of blocks")]
        Ok(match family.windows {
            Windows::Never => false,
            Windows::All => true,
            Windows::AllIfUsed => used,
            Windows::UpperIfUsed => used && upper.is_some_and(|first| block as f64 >= first),
            Windows::AllBut(each) => !(block + 1).is_multiple_of(pattern.unwrap_or(each)),
        })
    };
    // transformers drops the window of these families when it is not used, whatever `layer_types` says.
    let window = match family.windows {
        Windows::AllIfUsed | Windows::UpperIfUsed => window.filter(|_| used),
        _ => window,
    };
    let dense_only = settings.indices("mlp_only_layers")?;
    let sparse_step = size("decoder_sparse_step")?.unwrap_or(1);
    let dense_width = settings.needed_size("intermediate_size")?;
    let expert_width = match experts {
        Some(experts) => settings.needed_size(experts.names.width)?,
        None => dense_width,
    };
    (0..count)
        .map(|block| {
            let local = is_local(block)?;
            let is_mixture =
                experts.is_some() && !dense_only.contains(&block) && (block + 1) % sparse_step == 0;
            Ok(BlockConfig {
                window: window.filter(|_| local),
                // The second rotary embedding, where there are two, is that of the blocks with a window.
                rotary: usize::from(local && family.settings.contains(&"rope_local_base_freq")),
                width: match is_mixture {
                    true => expert_width,
                    false => dense_width,
                },
                is_mixture,
            })
        })
        .collect()
}

/// Widest head. What is made of its width alone, before any tensor is seen, stays small; published heads have 256 elements at most.
const MAX_HEAD_DIM: usize = 1 << 16;

/// Most blocks, for the same reason; published models have some hundred.
const MAX_BLOCKS: usize = 1 << 16;

/// One over the square root of a width, as f32.
#[expect(
    clippy::cast_precision_loss,
    reason = "a head is far below 2^53 elements wide"
)]
fn reciprocal_root(width: usize) -> f32 {
    narrowed(1.0 / (width as f64).sqrt())
}

/// The square root of a width, as f32.
#[expect(
    clippy::cast_precision_loss,
    reason = "a model's width is far below 2^53"
)]
fn root(width: usize) -> f32 {
    narrowed((width as f64).sqrt())
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

    fn windows(changes: &str) -> Vec<Option<usize>> {
        let config = parse(changes).expect(changes);
        config.blocks.iter().map(|block| block.window).collect()
    }

    #[test]
    fn defaults_are_those_of_transformers() {
        let config = parse("{}").expect("a config");
        assert_eq!((config.head_dim, config.rms_norm_eps), (8, 1e-6));
        assert!(!config.tie_word_embeddings && !config.qkv_bias);
        assert_eq!(windows("{}"), [None, None]);
        assert_eq!(windows(r#"{"model_type": "mistral"}"#), [Some(4096); 2]);
        assert_eq!(
            windows(r#"{"model_type": "mistral", "sliding_window": null}"#),
            [None; 2]
        );
    }

    #[test]
    fn windows_follow_the_rules_of_the_family() {
        let qwen = |more: &str| {
            windows(&format!(
                r#"{{"model_type": "qwen2", "sliding_window": 5, {more}}}"#
            ))
        };
        assert_eq!(qwen(r#""use_sliding_window": false"#), [None, None]);
        assert_eq!(
            qwen(r#""use_sliding_window": true, "max_window_layers": 1"#),
            [None, Some(5)]
        );
        assert_eq!(
            qwen(
                r#""use_sliding_window": true, "layer_types": ["sliding_attention", "full_attention"]"#
            ),
            [Some(5), None]
        );
        assert_eq!(
            windows(r#"{"model_type": "gemma2", "hidden_act": "gelu_pytorch_tanh"}"#),
            [Some(4096), None]
        );
    }

    #[test]
    fn a_text_part_is_read_with_its_familys_defaults() {
        let config = Config::parse(
            r#"{"model_type": "gemma3", "vision_config": {"hidden_size": 1}, "mm_tokens_per_image": 4,
                "text_config": {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240,
                "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}}"#,
        )
        .expect("a config");
        assert_eq!((config.vocab_size, config.head_dim), (262_208, 256));
        assert_eq!(
            (config.num_attention_heads, config.num_key_value_heads),
            (8, 4)
        );
        assert!(config.tie_word_embeddings);
        let local: Vec<usize> = config.blocks.iter().map(|block| block.rotary).collect();
        assert_eq!(local[..7], [1, 1, 1, 1, 1, 0, 1]);
        assert_eq!(config.rotary[0].inverse[0], 0.125);
        assert_eq!(config.rotary[1].inverse[0], 1.0);
    }

    /// Configs as they are published, in every spelling that is met; where they come from is in `testdata/configs/README.md`.
    fn published(name: &str) -> Config {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/configs");
        let text = std::fs::read_to_string(folder.join(format!("{name}.json"))).expect(name);
        Config::parse(&text).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    #[test]
    fn published_configs_are_accepted() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/configs");
        let mut seen = std::collections::BTreeSet::new();
        for entry in std::fs::read_dir(folder).expect("configs") {
            let path = entry.expect("an entry").path();
            if path.extension().is_some_and(|it| it == "json") {
                let text = std::fs::read_to_string(&path).expect("a config");
                let config = Config::parse(&text)
                    .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
                assert_eq!(config.blocks.len(), config.num_hidden_layers());
                seen.insert(config.model_type);
            }
        }
        assert_eq!(seen.into_iter().collect::<Vec<_>>(), MODEL_TYPES);
    }

    #[test]
    fn published_configs_mean_what_their_authors_say() {
        let windows = |config: &Config| {
            let windows = config.blocks.iter().filter_map(|block| block.window);
            (windows.clone().count(), windows.max())
        };
        let phi = published("Phi-4-mini-instruct");
        assert_eq!((phi.rotary[0].inverse.len(), phi.head_dim), (48, 128));
        assert_eq!(
            phi.rotary[0].long.as_ref().map(|(above, _)| *above),
            Some(4096)
        );
        let gemma = published("gemma-2-9b");
        assert_eq!(windows(&gemma), (21, Some(4096)));
        assert_eq!(
            (gemma.scores.softcap, gemma.logits.softcap),
            (Some(50.0), Some(30.0))
        );
        assert_eq!(gemma.scores.scale, 1.0 / 16.0);
        let gemma = published("gemma-3-27b-it");
        assert_eq!(windows(&gemma), (52, Some(1024)));
        assert!((gemma.scores.scale - 168f32.sqrt().recip()).abs() < 1e-8);
        assert_eq!(gemma.rotary[0].inverse[0], 0.125);
        let qwen = published("Qwen3-30B-A3B");
        let experts = qwen.experts.expect("experts");
        assert_eq!((experts.count, experts.per_token), (128, 8));
        assert!(experts.normalized && qwen.blocks.iter().all(|block| block.is_mixture));
        assert_eq!(windows(&published("Qwen2-7B")), (0, None));
        assert_eq!(windows(&published("Mistral-7B-v0.1")), (32, Some(4096)));
        let granite = published("granite-3.3-8b-instruct");
        assert_eq!(
            (granite.logits.scale, granite.embedding_multiplier),
            (0.0625, 12.0)
        );
        assert!(!published("Llama-3.1-8B").tie_word_embeddings);
        assert!(published("gemma-2b").tie_word_embeddings);
    }

    #[test]
    fn other_towers_must_be_known() {
        let text = |outer: &str| {
            format!(
                r#"{{"model_type": "{outer}", "text_config": {{"model_type": "llama", "vocab_size": 10, "hidden_size": 32,
                    "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}}}}"#
            )
        };
        Config::parse(&text("llava")).expect("a config");
        let error = Config::parse(&text("paligemma")).expect_err("another mask");
        assert!(error.to_string().starts_with("model type `paligemma` has"));
    }

    #[test]
    fn refusals_name_the_setting() {
        for (changes, words) in [
            (
                r#"{"model_type": "gpt2"}"#,
                "model type `gpt2` is not supported; supported are gemma, gemma2,",
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
                r#"{"head_dim": 65538}"#,
                "65538 elements of a head, above the limit of 65536",
            ),
            (
                r#"{"num_hidden_layers": 65537}"#,
                "65537 blocks, above the limit of 65536",
            ),
            (
                r#"{"rms_norm_eps": -1e-6}"#,
                "`rms_norm_eps` is -1e-6, where a number above 0",
            ),
            (
                r#"{"model_type": "granite", "residual_multiplier": 1e39}"#,
                "`residual_multiplier` is 1e+39, where a number that f32 holds",
            ),
            (
                r#"{"model_type": "gemma3_text", "hidden_act": null, "hidden_activation": "gelu"}"#,
                "`hidden_activation` is \"gelu\"",
            ),
            (
                r#"{"final_logit_softcapping": 30.0}"#,
                "`final_logit_softcapping` is 30.0, and what that does to a `llama` model",
            ),
            (
                r#"{"quantization_config": {"bits": 4}}"#,
                "`quantization_config` is {\"bits\":4}",
            ),
            (r#"{"sliding_window": 4}"#, "`sliding_window` is 4"),
            (
                r#"{"rope_interleaved": true}"#,
                "`rope_interleaved` is true",
            ),
            (
                r#"{"attention_bias": "yes"}"#,
                "`attention_bias` is \"yes\", where true or false",
            ),
            (
                r#"{"model_type": "qwen2", "layer_types": ["full_attention"]}"#,
                "`layer_types` has 1 entries for 2 blocks",
            ),
            (
                r#"{"model_type": "qwen3", "layer_types": ["full_attention", "chunked_attention"]}"#,
                "`layer_types` is \"chunked_attention\"",
            ),
            (
                r#"{"model_type": "mixtral", "num_local_experts": 1}"#,
                "`num_experts_per_tok` 2 is above the number of experts, 1",
            ),
        ] {
            let error = parse(changes).expect_err(changes).to_string();
            assert!(error.contains(words), "{changes}: {error}");
        }
        assert!(matches!(Config::parse("[1]"), Err(ConfigError::Json(_))));
    }

    #[test]
    fn the_largest_sizes_are_accepted() {
        let config = parse(r#"{"head_dim": 65536, "num_hidden_layers": 65536}"#).expect("a config");
        assert_eq!(
            (config.head_dim, config.num_hidden_layers()),
            (65536, 65536)
        );
    }

    #[test]
    fn settings_that_change_no_number_are_passed_over() {
        parse(
            r#"{"pretraining_tp": 2, "is_llama_config": true, "rope_interleaved": false, "unsloth_version": "2025.1",
                "eos_token_id": [1, 2], "transformers.js_config": {"a": 1}, "residual_multiplier": 1.0}"#,
        )
        .expect("a config");
    }
}
