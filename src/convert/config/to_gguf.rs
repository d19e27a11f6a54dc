//! The keys of a GGUF file out of a `config.json`.
//!
//! Source: `set_gguf_parameters` and `generate_extra_tensors` of llama.cpp's `conversion/{base,llama,qwen,gemma,phi,granite}.py`, over
//! configs as transformers 5.23 reads them, with its defaults for what is left out.

use panacea_formats::gguf::{Metadata, Value};
use serde_json::{Map, Value as Json};

use super::super::names::{Architecture, ROPE_FREQS, ROPE_LONG, ROPE_SHORT};
use super::rope::{Llama3, Scaling, long_attention_factor};
use crate::model::Config;
use crate::model::ConfigError;
use crate::model::config::TextPart;
use crate::model::settings::{Settings, narrowed};

/// What a `config.json` becomes in a GGUF file.
#[derive(Debug)]
pub struct GgufConfig {
    /// How the model is stored.
    pub architecture: &'static Architecture,
    /// The config itself.
    pub config: Config,
    /// Tensors that are made of the config alone.
    pub derived: Vec<Derived>,
    /// What the config says and the file cannot, in words: llama.cpp computes the model without it.
    pub losses: Vec<String>,
    early: Metadata,
    keys: Metadata,
}

/// A tensor of one dimension, F32, that is made of the config alone.
#[derive(Clone, Debug, PartialEq)]
pub struct Derived {
    /// Its name.
    pub name: &'static str,
    /// Its values.
    pub values: Vec<f32>,
}

impl GgufConfig {
    /// Reads the text of a `config.json`.
    ///
    /// # Errors
    /// When [`Config::parse`] refuses it, or it asks for what llama.cpp has no place for.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let config = Config::parse(text)?;
        let whole: Map<String, Json> = serde_json::from_str(text).map_err(ConfigError::Json)?;
        let settings = TextPart::of(&whole)?.settings;
        let Some(architecture) = Architecture::of_model_type(config.model_type) else {
            return Err(ConfigError::ModelType {
                found: config.model_type.to_owned(),
            });
        };
        let mut keys = Keys {
            architecture,
            config: &config,
            settings,
            early: Metadata::default(),
            keys: Metadata::default(),
            derived: Vec::new(),
            losses: Vec::new(),
        };
        keys.fill()?;
        let Keys {
            early,
            keys,
            derived,
            losses,
            ..
        } = keys;
        Ok(Self {
            architecture,
            config,
            derived,
            losses,
            early,
            keys,
        })
    }

    /// The metadata up to the tokenizer: of a file whose `general.file_type` is `file_type`, and whose name and the like are `general`.
    pub fn metadata(&self, general: &Metadata, file_type: u32) -> Metadata {
        let mut all = Metadata::default();
        let architecture = self.architecture.name.to_owned();
        all.set("general.architecture", Value::Text(architecture));
        for (key, value) in self.early.iter() {
            all.set(key, value.clone());
        }
        all.set("general.type", Value::Text("model".to_owned()));
        for (key, value) in general.iter().chain(self.keys.iter()) {
            all.set(key, value.clone());
        }
        all.set(FILE_TYPE, Value::U32(file_type));
        all.set(
            "general.quantization_version",
            Value::U32(QUANTIZATION_VERSION),
        );
        all
    }
}

/// `GGML_QNT_VERSION`.
const QUANTIZATION_VERSION: u32 = 2;

const FILE_TYPE: &str = "general.file_type";

/// Keys in the making.
struct Keys<'a> {
    architecture: &'static Architecture,
    config: &'a Config,
    settings: Settings<'a>,
    /// What the converter sets while it still names tensors, so that it stands before everything else.
    early: Metadata,
    keys: Metadata,
    derived: Vec<Derived>,
    losses: Vec<String>,
}

impl Keys<'_> {
    fn fill(&mut self) -> Result<(), ConfigError> {
        match self.architecture.name {
            "gemma" | "gemma2" => self.gemma()?,
            "phi3" => self.phi3()?,
            _ => self.common()?,
        }
        match self.architecture.name {
            "llama" => self.sizes_of_llama()?,
            "granite" => self.granite()?,
            "gemma2" => {
                let scores = self.config.scores.softcap.unwrap_or(0.0);
                let logits = self.config.logits.softcap.unwrap_or(0.0);
                self.float("attn_logit_softcapping", scores);
                self.float("final_logit_softcapping", logits);
                self.window()?;
            }
            "gemma3" => {
                if let Some(softcap) = self.config.logits.softcap {
                    self.float("final_logit_softcapping", softcap);
                }
                // A pattern of 1 leaves no block with a window.
                if self.settings.size("sliding_window_pattern")? != Some(1) {
                    self.window()?;
                }
            }
            "qwen3moe" => {
                let width = self.settings.needed_size("moe_intermediate_size")?;
                self.size("expert_feed_forward_length", width);
            }
            _ => {}
        }
        self.tell_losses();
        Ok(())
    }

    /// `TextModel.set_gguf_parameters`.
    fn common(&mut self) -> Result<(), ConfigError> {
        let config = self.config;
        self.size("block_count", config.num_hidden_layers());
        self.context()?;
        self.size("embedding_length", config.hidden_size);
        self.feed_forward()?;
        self.size("attention.head_count", config.num_attention_heads);
        self.size("attention.head_count_kv", config.num_key_value_heads);
        self.rope()?;
        self.epsilon();
        if let Some(experts) = config.experts {
            self.size("expert_count", experts.count);
            self.size("expert_used_count", experts.per_token);
        }
        if self.has_head_dim()? {
            self.head_dim();
        }
        self.file_type();
        Ok(())
    }

    fn gemma(&mut self) -> Result<(), ConfigError> {
        let config = self.config;
        self.context()?;
        self.size("embedding_length", config.hidden_size);
        self.size("block_count", config.num_hidden_layers());
        self.feed_forward()?;
        self.size("attention.head_count", config.num_attention_heads);
        self.size("attention.head_count_kv", config.num_key_value_heads);
        self.epsilon();
        self.head_dim();
        self.file_type();
        let scaling = Scaling::of(self.settings, None)?;
        if scaling.theta != 10_000.0 || scaling.kind != "default" {
            self.losses.push(format!(
                "rotary embedding of type `{}` with a theta of {}: llama.cpp has one of 10000, unscaled, in this architecture",
                scaling.kind, scaling.theta
            ));
        }
        Ok(())
    }

    fn phi3(&mut self) -> Result<(), ConfigError> {
        let config = self.config;
        let context = self.context()?;
        let scaling = Scaling::of(self.settings, None)?;
        let original = self.original_context(&scaling)?;
        self.size("rope.scaling.original_context_length", original);
        self.size("embedding_length", config.hidden_size);
        self.feed_forward()?;
        self.size("block_count", config.num_hidden_layers());
        self.size("attention.head_count", config.num_attention_heads);
        self.size("attention.head_count_kv", config.num_key_value_heads);
        self.epsilon();
        let turning = config.rotary.first().map_or(0, |it| it.inverse.len());
        self.size("rope.dimension_count", 2 * turning);
        self.float("rope.freq_base", narrowed(scaling.theta));
        self.file_type();
        let window = self.settings.size("sliding_window")?.unwrap_or(0);
        self.size("attention.sliding_window", window);
        if let (Some(long), Some(short)) = (
            scaling.own.numbers("long_factor")?,
            scaling.own.numbers("short_factor")?,
        ) {
            let factor = long_attention_factor(context, original);
            let key = self.key("rope.scaling.attn_factor");
            self.early.set(key, Value::F32(factor));
            if let Some(given) = scaling.own.number("attention_factor")?
                && narrowed(given) != factor
            {
                self.losses.push(format!(
                    "`attention_factor` {given}: llama.cpp's converter makes it {factor}"
                ));
            }
            let factors = |values: Vec<f64>| values.into_iter().map(narrowed).collect();
            for (name, values) in [(ROPE_LONG, factors(long)), (ROPE_SHORT, factors(short))] {
                self.derived.push(Derived { name, values });
            }
        }
        Ok(())
    }

    fn granite(&mut self) -> Result<(), ConfigError> {
        self.sizes_of_llama()?;
        for (setting, key) in [
            ("attention_multiplier", "attention.scale"),
            ("embedding_multiplier", "embedding_scale"),
            ("residual_multiplier", "residual_scale"),
            ("logits_scaling", "logit_scale"),
        ] {
            let value = self.settings.number(setting)?.unwrap_or(1.0);
            if value != 0.0 {
                self.float(key, narrowed(value));
            }
        }
        Ok(())
    }

    fn sizes_of_llama(&mut self) -> Result<(), ConfigError> {
        self.size("vocab_size", self.config.vocab_size);
        // Of Granite, the converter passes over a width of heads that is given.
        let dim = match self.architecture.name {
            "granite" => self.config.hidden_size / self.config.num_attention_heads,
            _ => self.config.head_dim,
        };
        if dim != self.config.head_dim {
            return Err(ConfigError::Unsupported {
                setting: "head_dim".to_owned(),
                found: self.config.head_dim.to_string(),
            });
        }
        self.size("rope.dimension_count", dim);
        Ok(())
    }

    /// The rotary embedding, and that of the blocks with a window where it is another one.
    fn rope(&mut self) -> Result<(), ConfigError> {
        let is_gemma = self.architecture.name == "gemma3";
        let scaling = Scaling::of(self.settings, is_gemma.then_some("full_attention"))?;
        let unsupported = || ConfigError::Unsupported {
            setting: "rope_type".to_owned(),
            found: format!("\"{}\"", scaling.kind),
        };
        match scaling.kind {
            "linear" => {
                self.text("rope.scaling.type", "linear");
                self.needed_factor(&scaling)?;
            }
            "yarn" => {
                self.text("rope.scaling.type", "yarn");
                self.needed_factor(&scaling)?;
                let original = self.original_context(&scaling)?;
                self.size("rope.scaling.original_context_length", original);
                for (setting, key) in [
                    ("attention_factor", "rope.scaling.yarn_attn_factor"),
                    ("beta_fast", "rope.scaling.yarn_beta_fast"),
                    ("beta_slow", "rope.scaling.yarn_beta_slow"),
                ] {
                    if let Some(value) = scaling.own.number(setting)? {
                        self.float(key, narrowed(value));
                    }
                }
                for setting in ["mscale", "mscale_all_dim", "truncate"] {
                    if let Some(value) = scaling.own.value(setting) {
                        self.losses.push(format!("`{setting}` {value} of YaRN"));
                    }
                }
            }
            "llama3" if self.architecture.name == "llama" => {
                let original = self.original_context(&scaling)?;
                let values =
                    Llama3::of(scaling.own, original)?.factors(scaling.theta, self.config.head_dim);
                let name = ROPE_FREQS;
                self.derived.push(Derived { name, values });
            }
            "default" => {}
            _ => return Err(unsupported()),
        }
        self.float("rope.freq_base", narrowed(scaling.theta));
        if is_gemma {
            let local = Scaling::of(self.settings, Some("sliding_attention"))?;
            self.float("rope.freq_base_swa", narrowed(local.theta));
            if local.kind != "default" {
                self.losses.push(format!(
                    "rotary embedding of type `{}` in blocks with a window",
                    local.kind
                ));
            }
        }
        Ok(())
    }

    fn needed_factor(&mut self, scaling: &Scaling<'_>) -> Result<(), ConfigError> {
        let setting = "factor";
        let factor = scaling.own.positive(setting)?;
        let factor = factor.ok_or(ConfigError::Missing { setting })?;
        self.float("rope.scaling.factor", narrowed(factor));
        Ok(())
    }

    /// The context that a model was first trained on: the model's own setting before that of its rotary embedding.
    fn original_context(&self, scaling: &Scaling<'_>) -> Result<usize, ConfigError> {
        const SETTING: &str = "original_max_position_embeddings";
        for settings in [self.settings, scaling.own] {
            if let Some(context) = settings.size(SETTING)? {
                return Ok(context);
            }
        }
        self.longest()
    }

    fn longest(&self) -> Result<usize, ConfigError> {
        let setting = "max_position_embeddings";
        if let Some(longest) = self.settings.size(setting)? {
            return Ok(longest);
        }
        let known = LONGEST.iter().find(|it| it.0 == self.config.model_type);
        known
            .map(|&(_, longest)| longest)
            .ok_or(ConfigError::Missing { setting })
    }

    fn context(&mut self) -> Result<usize, ConfigError> {
        let longest = self.longest()?;
        self.size("context_length", longest);
        Ok(longest)
    }

    fn feed_forward(&mut self) -> Result<(), ConfigError> {
        let width = self.settings.needed_size("intermediate_size")?;
        self.size("feed_forward_length", width);
        Ok(())
    }

    fn epsilon(&mut self) {
        self.float("attention.layer_norm_rms_epsilon", self.config.rms_norm_eps);
    }

    /// Whether transformers' config says how wide a head is. Some of its classes always do, others repeat what they are given.
    fn has_head_dim(&self) -> Result<bool, ConfigError> {
        Ok(match self.config.model_type {
            "llama" | "mistral" | "qwen3" | "gemma3_text" => true,
            "granite" => false,
            _ => self.settings.size("head_dim")?.is_some(),
        })
    }

    fn head_dim(&mut self) {
        self.size("attention.key_length", self.config.head_dim);
        self.size("attention.value_length", self.config.head_dim);
    }

    fn window(&mut self) -> Result<(), ConfigError> {
        let window = self.settings.needed_size("sliding_window")?;
        self.size("attention.sliding_window", window);
        Ok(())
    }

    /// Takes a place for the type of the file.
    fn file_type(&mut self) {
        self.keys.set(FILE_TYPE, Value::U32(0));
    }

    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture.name)
    }

    fn size(&mut self, name: &str, value: usize) {
        // Settings are below 2^31, see `Settings::size`.
        let value = u32::try_from(value).unwrap_or(u32::MAX);
        self.keys.set(self.key(name), Value::U32(value));
    }

    fn float(&mut self, name: &str, value: f32) {
        self.keys.set(self.key(name), Value::F32(value));
    }

    fn text(&mut self, name: &str, value: &str) {
        self.keys.set(self.key(name), Value::Text(value.to_owned()));
    }

    /// What llama.cpp computes otherwise, and no key can change.
    fn tell_losses(&mut self) {
        let config = self.config;
        let windows = || config.blocks.iter().map(|block| block.window);
        match self.architecture.name {
            // Phi's is stored, and llama.cpp passes over it.
            "llama" | "qwen2" | "qwen3" | "qwen3moe" | "phi3" => {
                if let Some(window) = windows().flatten().next() {
                    self.losses.push(format!(
                        "a window of {window} tokens: llama.cpp lets every token see all before it"
                    ));
                }
            }
            "gemma2" | "gemma3" => {
                let each = if self.architecture.name == "gemma2" {
                    2
                } else {
                    6
                };
                let has_windows = windows().any(|window| window.is_some());
                let as_theirs =
                    |(i, window): (usize, Option<usize>)| window.is_some() != ((i + 1) % each == 0);
                if has_windows && !windows().enumerate().all(as_theirs) {
                    self.losses.push(format!(
                        "which blocks have a window: llama.cpp gives one to all but each {each}th"
                    ));
                }
                let wanted = theirs_of_gemma(self.architecture.name, config);
                if (config.scores.scale - wanted).abs() > 1e-6 * wanted {
                    self.losses.push(format!(
                        "`query_pre_attn_scalar`, a factor of {} on scores: llama.cpp's is {wanted}",
                        config.scores.scale
                    ));
                }
            }
            _ => {}
        }
        if self.architecture.name == "qwen3moe" && config.experts.is_some_and(|it| !it.normalized) {
            self.losses.push(
                "`norm_topk_prob` false: llama.cpp scales the experts' weights to a sum of 1"
                    .to_owned(),
            );
        }
    }
}

/// The factor on scores that llama.cpp takes for a model of Gemma 2 or 3, whose largest it knows by the number of blocks.
#[expect(clippy::cast_precision_loss, reason = "a head is far below 2^24 wide")]
pub(super) fn theirs_of_gemma(architecture: &str, config: &Config) -> f32 {
    let blocks = config.num_hidden_layers();
    let dim = match (architecture, blocks) {
        ("gemma2", 46) | ("gemma3", 62) => config.hidden_size / config.num_attention_heads,
        _ => config.head_dim,
    };
    1.0 / (dim as f32).sqrt()
}

/// `max_position_embeddings` where a config does not say it.
const LONGEST: &[(&str, usize)] = &[
    ("gemma", 8192),
    ("gemma2", 8192),
    ("gemma3_text", 131_072),
    ("granite", 2048),
    ("llama", 2048),
    ("mistral", 131_072),
    ("mixtral", 131_072),
    ("olmo2", 2048),
    ("phi3", 4096),
    ("qwen2", 32_768),
    ("qwen3", 32_768),
    ("qwen3_moe", 32_768),
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn testdata(name: &str) -> String {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata");
        std::fs::read_to_string(folder.join(name)).expect(name)
    }

    #[test]
    fn published_configs_give_the_keys_and_tensors_of_llama_cpps_converter() {
        let published: BTreeMap<String, Json> =
            serde_json::from_str(&testdata("gguf-metadata/published.json")).expect("an object");
        for (stem, expected) in &published {
            let found = GgufConfig::parse(&testdata(&format!("configs/{stem}.json")));
            let found = found.unwrap_or_else(|error| panic!("{stem}: {error}"));
            let mut metadata = found.metadata(&Metadata::default(), 1);
            metadata.remove("general.quantization_version");
            let keys: Vec<Json> = metadata
                .iter()
                .map(|(key, value)| match value {
                    Value::U32(it) => serde_json::json!([key, "UINT32", it]),
                    Value::F32(it) => serde_json::json!([key, "FLOAT32", it.to_bits()]),
                    Value::Text(it) => serde_json::json!([key, "STRING", it]),
                    other => panic!("{key}: {other:?}"),
                })
                .collect();
            assert_eq!(Json::Array(keys), expected["metadata"], "{stem}");
            let tensors: Map<String, Json> = found
                .derived
                .iter()
                .map(|it| {
                    let bits: Vec<u32> = it.values.iter().map(|value| value.to_bits()).collect();
                    (it.name.to_owned(), serde_json::json!(bits))
                })
                .collect();
            assert_eq!(Json::Object(tensors), expected["tensors"], "{stem}");
        }
        assert_eq!(published.len(), 30);
    }

    #[test]
    fn losses_are_told_and_of_published_models_few() {
        let losses = |stem: &str| {
            let text = testdata(&format!("configs/{stem}.json"));
            GgufConfig::parse(&text).expect(stem).losses
        };
        assert_eq!(losses("Llama-3.1-8B"), [""; 0]);
        assert_eq!(losses("gemma-2-9b"), [""; 0]);
        assert_eq!(losses("gemma-3-27b-it"), [""; 0]);
        let mistral = losses("Mistral-7B-v0.1");
        assert!(
            mistral[0].starts_with("a window of 4096 tokens"),
            "{mistral:?}"
        );
        let tiny = testdata("oracle/qwen3-moe-plain/config.json");
        let tiny = GgufConfig::parse(&tiny).expect("a config").losses;
        assert!(tiny[0].starts_with("`norm_topk_prob` false"), "{tiny:?}");
        let tiny = testdata("oracle/gemma/config.json");
        let tiny = GgufConfig::parse(&tiny).expect("a config").losses;
        assert!(tiny[0].contains("theta of 500"), "{tiny:?}");
    }

    #[test]
    fn rotary_embeddings_that_have_no_place_are_refused() {
        let mut config: Map<String, Json> =
            serde_json::from_str(&testdata("configs/Qwen2-7B.json")).expect("an object");
        let scaling = r#"{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}"#;
        let scaling = serde_json::from_str(scaling).expect("an object");
        config.insert("rope_scaling".to_owned(), scaling);
        let error = GgufConfig::parse(&Json::Object(config).to_string()).expect_err("no place");
        assert!(
            error.to_string().contains("`rope_type` is \"llama3\""),
            "{error}"
        );
    }
}
