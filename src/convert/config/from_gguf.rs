//! A `config.json` out of the keys of a GGUF file and the tensors beside them.
//!
//! A key of the architecture that is not known here is refused, never passed over: it would change what is computed. Keys with other
//! beginnings say nothing about the computation.

use panacea_formats::gguf::{Array, Metadata, Value};
use panacea_formats::{TensorView, shown};
use serde_json::{Map, Value as Json, json};
use thiserror::Error;

use super::super::names::{Architecture, ROPE_FREQS, ROPE_LONG, ROPE_SHORT, UnknownArchitecture};
use super::rope::Llama3;

/// Makes the config that transformers would write of a model whose file has these keys, and whose tensors `tensor` finds by name.
///
/// # Errors
/// When a key is missing or of the wrong kind, or asks for what no config of the family can say.
pub fn from_gguf<'a>(
    metadata: &Metadata,
    tensor: &dyn Fn(&str) -> Option<TensorView<'a>>,
) -> Result<Map<String, Json>, GgufConfigError> {
    let name = metadata.value("general.architecture");
    let name = name
        .and_then(Value::as_text)
        .ok_or_else(|| GgufConfigError::Missing {
            key: "general.architecture".to_owned(),
        })?;
    let architecture = Architecture::named(name)?;
    let reader = Reader {
        architecture,
        metadata,
        tensor,
    };
    reader.refuse_unknown()?;
    reader.config()
}

/// The `generation_config.json` of a model: the tokens that begin and end a text, and how its makers sample.
///
/// # Errors
/// When a token's id is none.
pub fn generation_config(metadata: &Metadata) -> Result<Json, GgufConfigError> {
    let mut config = Map::new();
    for (key, setting) in TOKEN_IDS {
        config.insert(setting.to_owned(), token_id(metadata, key)?);
    }
    // A turn may end otherwise than a text.
    let end_of_turn = token_id(metadata, "tokenizer.ggml.eot_token_id")?;
    if !end_of_turn.is_null() && end_of_turn != config["eos_token_id"] {
        let end = config["eos_token_id"].clone();
        let ends = [end, end_of_turn];
        let ends: Vec<&Json> = ends.iter().filter(|it| !it.is_null()).collect();
        config.insert("eos_token_id".to_owned(), json!(ends));
    }
    for (key, setting) in [
        ("top_k", "top_k"),
        ("top_p", "top_p"),
        ("min_p", "min_p"),
        ("temp", "temperature"),
        ("penalty_repeat", "repetition_penalty"),
    ] {
        let value = metadata.value(&format!("general.sampling.{key}"));
        let number = value.and_then(|value| match value.as_u64() {
            Some(number) => Some(json!(number)),
            None => value
                .as_f64()
                .filter(|it| it.is_finite())
                .map(|it| json!(it)),
        });
        if let Some(number) = number {
            config.insert(setting.to_owned(), number);
            config.insert("do_sample".to_owned(), json!(true));
        }
    }
    Ok(Json::Object(config))
}

/// The id of a token with a role, or null.
fn token_id(metadata: &Metadata, key: &str) -> Result<Json, GgufConfigError> {
    let Some(value) = metadata.value(key) else {
        return Ok(Json::Null);
    };
    let id = value.as_u64().filter(|&id| id < 1 << 31);
    Ok(json!(id.ok_or_else(|| GgufConfigError::Kind {
        key: key.to_owned(),
        found: short(value),
        wanted: "a token's id",
    })?))
}

/// Keys and tensors of a file.
struct Reader<'m, 't, 'a> {
    architecture: &'static Architecture,
    metadata: &'m Metadata,
    tensor: &'t dyn Fn(&str) -> Option<TensorView<'a>>,
}

impl Reader<'_, '_, '_> {
    fn config(&self) -> Result<Map<String, Json>, GgufConfigError> {
        let experts = self.size("expert_count")?.filter(|&count| count > 0);
        let family = family(self.architecture.name, experts.is_some());
        let heads = self.needed("attention.head_count")?;
        let hidden = self.needed("embedding_length")?;
        let head_dim = match self.size("attention.key_length")? {
            Some(dim) => dim,
            None if heads > 0 && hidden % heads == 0 => hidden / heads,
            None => return Err(self.unsupported("attention.head_count")),
        };
        self.same("attention.value_length", head_dim)?;
        let blocks = self.needed("block_count")?;
        let context = self.needed("context_length")?;
        let head = (self.tensor)("output.weight").is_some();
        let mut config = Map::new();
        let mut set = |name: &str, value: Json| {
            config.insert(name.to_owned(), value);
        };
        set("architectures", json!([family.class]));
        set("model_type", json!(family.model_type));
        set("attention_dropout", json!(0.0));
        set("dtype", json!("bfloat16"));
        set("hidden_act", json!(family.activation));
        set("hidden_size", json!(hidden));
        set("initializer_range", json!(0.02));
        set(
            "intermediate_size",
            json!(self.needed("feed_forward_length")?),
        );
        set("max_position_embeddings", json!(context));
        set("num_attention_heads", json!(heads));
        set("num_hidden_layers", json!(blocks));
        let of_keys = self.size("attention.head_count_kv")?.unwrap_or(heads);
        set("num_key_value_heads", json!(of_keys));
        set(
            "rms_norm_eps",
            json!(self.needed_float("attention.layer_norm_rms_epsilon")?),
        );
        set("tie_word_embeddings", json!(!head));
        set("use_cache", json!(true));
        set("vocab_size", json!(self.rows("token_embd.weight")?));
        for (key, setting) in TOKEN_IDS {
            set(setting, token_id(self.metadata, key)?);
        }
        match self.architecture.name {
            "phi3" if heads * head_dim != hidden => {
                return Err(self.unsupported("attention.key_length"));
            }
            "phi3" => {}
            _ => set("head_dim", json!(head_dim)),
        }
        let has_bias = |module: &str| (self.tensor)(&format!("blk.0.{module}.bias")).is_some();
        match self.architecture.name {
            "llama" | "granite" => {
                set("attention_bias", json!(has_bias("attn_q")));
                set("mlp_bias", json!(has_bias("ffn_up")));
            }
            "qwen2" => {
                set("use_sliding_window", json!(false));
                set("sliding_window", Json::Null);
            }
            "qwen3" | "qwen3moe" => {
                set("attention_bias", json!(has_bias("attn_q")));
                set("use_sliding_window", json!(false));
                set("sliding_window", Json::Null);
            }
            "olmo2" | "gemma" | "gemma2" | "gemma3" => set("attention_bias", json!(false)),
            _ => {}
        }
        if let Some(count) = experts {
            set("num_local_experts", json!(count));
            set(
                "num_experts_per_tok",
                json!(self.needed("expert_used_count")?),
            );
        }
        match self.architecture.name {
            "llama" if experts.is_some() => {
                // Fixed in Mixtral's code.
                for fixed in ["attention_bias", "mlp_bias"] {
                    set(fixed, json!(false));
                }
                set("sliding_window", Json::Null);
            }
            "qwen3moe" => {
                set("decoder_sparse_step", json!(1));
                set("mlp_only_layers", json!([]));
                set("norm_topk_prob", json!(true));
                let width = self.size("expert_feed_forward_length")?;
                let width = width.map_or_else(|| self.width_of_experts(), Ok)?;
                set("moe_intermediate_size", json!(width));
            }
            "granite" => {
                let known = [
                    (
                        "attention_multiplier",
                        "attention.scale",
                        1.0 / root(head_dim),
                    ),
                    ("embedding_multiplier", "embedding_scale", 1.0),
                    ("residual_multiplier", "residual_scale", 1.0),
                    ("logits_scaling", "logit_scale", 1.0),
                ];
                for (setting, key, absent) in known {
                    let value = self.float(key)?.filter(|&value| value != 0.0);
                    set(setting, json!(value.unwrap_or(absent)));
                }
            }
            "gemma" => set("hidden_activation", json!(family.activation)),
            "gemma2" | "gemma3" => {
                set("hidden_activation", json!(family.activation));
                let scores = self.float("attn_logit_softcapping")?;
                let logits = self.float("final_logit_softcapping")?;
                let some = |cap: Option<f64>| cap.filter(|&cap| cap != 0.0);
                set("final_logit_softcapping", json!(some(logits)));
                set("attn_logit_softcapping", json!(some(scores)));
                // llama.cpp knows the largest models by the number of their blocks.
                let scalar = match (self.architecture.name, blocks) {
                    ("gemma2", 46) | ("gemma3", 62) => hidden / heads.max(1),
                    _ => head_dim,
                };
                set("query_pre_attn_scalar", json!(scalar));
                let (window, types) = self.windows(blocks)?;
                set("sliding_window", json!(window));
                set("layer_types", json!(types));
            }
            "phi3" => {
                let window = self.size("attention.sliding_window")?;
                set("sliding_window", json!(window.filter(|&window| window > 0)));
                let original = self.size("rope.scaling.original_context_length")?;
                set(
                    "original_max_position_embeddings",
                    json!(original.unwrap_or(context)),
                );
            }
            _ => {}
        }
        set("rope_parameters", self.rope(context, head_dim)?);
        Ok(config)
    }

    /// The settings of the rotary embedding, as transformers 5 writes them.
    fn rope(&self, context: usize, head_dim: usize) -> Result<Json, GgufConfigError> {
        let theta = self.float("rope.freq_base")?.unwrap_or(10_000.0);
        let mut own = Map::new();
        own.insert("rope_theta".to_owned(), json!(theta));
        let mut set = |name: &str, value: Json| {
            own.insert(name.to_owned(), value);
        };
        let kind = match self.text("rope.scaling.type")? {
            Some("none") | None => None,
            Some(kind) => Some(kind),
        };
        let original = self.size("rope.scaling.original_context_length")?;
        let kind = match kind {
            // The key that there was before.
            None if self.float("rope.scale_linear")?.is_some_and(|it| it != 1.0) => Some("linear"),
            kind => kind,
        };
        let is_phi = self.architecture.name == "phi3";
        if is_phi {
            let turning = self.size("rope.dimension_count")?.unwrap_or(head_dim);
            set("partial_rotary_factor", json!(share(turning, head_dim)));
        } else {
            self.same("rope.dimension_count", head_dim)?;
        }
        match (kind, self.factors(ROPE_FREQS)?) {
            (None, Some(factors)) => {
                if factors.len() != head_dim / 2 {
                    return Err(self.tensor_error(ROPE_FREQS));
                }
                match Llama3::recovered(&factors, theta) {
                    Some(found) => {
                        set("rope_type", json!("llama3"));
                        set("factor", json!(found.factor));
                        set("low_freq_factor", json!(found.low));
                        set("high_freq_factor", json!(found.high));
                        set("original_max_position_embeddings", json!(found.original));
                    }
                    None => {
                        set("rope_type", json!("longrope"));
                        set("attention_factor", json!(1.0));
                        set("factor", json!(1.0));
                        set("original_max_position_embeddings", json!(context));
                        set("short_factor", json!(factors));
                        set("long_factor", json!(factors));
                    }
                }
            }
            (None | Some("longrope"), None) if self.factors(ROPE_LONG)?.is_some() => {
                let factor = self.float("rope.scaling.attn_factor")?.unwrap_or(1.0);
                set("rope_type", json!("longrope"));
                set("attention_factor", json!(factor));
                set(
                    "original_max_position_embeddings",
                    json!(original.unwrap_or(context)),
                );
                for (setting, name) in [("short_factor", ROPE_SHORT), ("long_factor", ROPE_LONG)] {
                    let factors = self.factors(name)?;
                    set(
                        setting,
                        json!(factors.ok_or_else(|| self.tensor_error(name))?),
                    );
                }
            }
            (None, None) => set("rope_type", json!("default")),
            (Some("linear"), None) => {
                let factor = match self.float("rope.scaling.factor")? {
                    Some(factor) => Some(factor),
                    None => self.float("rope.scale_linear")?,
                };
                set("rope_type", json!("linear"));
                set(
                    "factor",
                    json!(factor.ok_or_else(|| self.missing("rope.scaling.factor"))?),
                );
            }
            (Some("yarn"), None) => {
                set("rope_type", json!("yarn"));
                set("factor", json!(self.needed_float("rope.scaling.factor")?));
                set(
                    "original_max_position_embeddings",
                    json!(original.unwrap_or(context)),
                );
                for (setting, key) in [
                    ("attention_factor", "rope.scaling.yarn_attn_factor"),
                    ("beta_fast", "rope.scaling.yarn_beta_fast"),
                    ("beta_slow", "rope.scaling.yarn_beta_slow"),
                ] {
                    if let Some(value) = self.float(key)? {
                        set(setting, json!(value));
                    }
                }
            }
            _ => return Err(self.unsupported("rope.scaling.type")),
        }
        if self.architecture.name != "gemma3" {
            return Ok(Json::Object(own));
        }
        let local = self.float("rope.freq_base_swa")?.unwrap_or(10_000.0);
        Ok(json!({
            "full_attention": own,
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        }))
    }

    /// The window of Gemma's blocks, and which of them have it.
    fn windows(
        &self,
        blocks: usize,
    ) -> Result<(Option<usize>, Vec<&'static str>), GgufConfigError> {
        let key = "attention.sliding_window_pattern";
        let absent = match self.architecture.name {
            "gemma2" => (4096, 2),
            _ => (0, 6),
        };
        let window = self.size("attention.sliding_window")?.unwrap_or(absent.0);
        let local: Vec<bool> = match self.value(key) {
            Some(Value::Array(Array::Bool(local))) if local.len() == blocks => local.clone(),
            Some(_) => {
                let each = self.needed(key)?;
                (1..=blocks)
                    .map(|block| each > 0 && block % each != 0)
                    .collect()
            }
            None => (1..=blocks).map(|block| block % absent.1 != 0).collect(),
        };
        let types = local.iter().map(|&local| match local && window > 0 {
            true => "sliding_attention",
            false => "full_attention",
        });
        // Without a window there is nothing that a number could say; transformers wants one.
        let window = if window > 0 { window } else { 4096 };
        Ok((Some(window), types.collect()))
    }

    /// Refuses keys that ask for something that is not done here.
    fn refuse_unknown(&self) -> Result<(), GgufConfigError> {
        for (key, value) in self.metadata.iter() {
            let Some(name) = key
                .strip_prefix(self.architecture.name)
                .and_then(|rest| rest.strip_prefix('.'))
            else {
                continue;
            };
            let own = OWN.iter().any(|(architecture, names)| {
                *architecture == self.architecture.name && names.contains(&name)
            });
            let neutral = match value {
                Value::Bool(flag) => NEUTRAL_FLAGS.contains(&(name, *flag)),
                Value::F32(number) => NEUTRAL_NUMBERS.contains(&(name, *number)),
                _ => value.as_u64() == Some(0) && ABSENT_AT_ZERO.contains(&name),
            };
            if !(KNOWN.contains(&name) || own || neutral) {
                return Err(GgufConfigError::Unknown {
                    key: key.to_owned(),
                    found: short(value),
                });
            }
        }
        Ok(())
    }

    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture.name)
    }

    fn value(&self, name: &str) -> Option<&Value> {
        self.metadata.value(&self.key(name))
    }

    /// A whole number, or one that an array has for every block alike.
    fn size(&self, name: &str) -> Result<Option<usize>, GgufConfigError> {
        let Some(value) = self.value(name) else {
            return Ok(None);
        };
        let number = match value.as_array() {
            None => value.as_u64(),
            Some(array) => uniform(array),
        };
        let number = number.filter(|&number| number < 1 << 31);
        match number.and_then(|number| usize::try_from(number).ok()) {
            Some(number) => Ok(Some(number)),
            None => Err(self.kind(
                name,
                value,
                "a whole number below 2^31, the same for all blocks",
            )),
        }
    }

    fn needed(&self, name: &str) -> Result<usize, GgufConfigError> {
        self.size(name)?.ok_or_else(|| self.missing(name))
    }

    /// Refuses another value of a size than `wanted`.
    fn same(&self, name: &str, wanted: usize) -> Result<(), GgufConfigError> {
        match self.size(name)? {
            Some(found) if found != wanted => Err(self.unsupported(name)),
            _ => Ok(()),
        }
    }

    fn float(&self, name: &str) -> Result<Option<f64>, GgufConfigError> {
        let Some(value) = self.value(name) else {
            return Ok(None);
        };
        match value.as_f64().filter(|number| number.is_finite()) {
            Some(number) => Ok(Some(number)),
            None => Err(self.kind(name, value, "a finite float")),
        }
    }

    fn needed_float(&self, name: &str) -> Result<f64, GgufConfigError> {
        self.float(name)?.ok_or_else(|| self.missing(name))
    }

    fn text(&self, name: &str) -> Result<Option<&str>, GgufConfigError> {
        let Some(value) = self.value(name) else {
            return Ok(None);
        };
        match value.as_text() {
            Some(text) => Ok(Some(text)),
            None => Err(self.kind(name, value, "a text")),
        }
    }

    /// Rows of a matrix.
    fn rows(&self, name: &'static str) -> Result<usize, GgufConfigError> {
        match (self.tensor)(name).map(|tensor| tensor.shape) {
            Some(&[rows, _]) => Ok(rows),
            _ => Err(self.tensor_error(name)),
        }
    }

    /// The width of an expert, from the matrices themselves.
    fn width_of_experts(&self) -> Result<usize, GgufConfigError> {
        let name = "blk.0.ffn_gate_exps.weight";
        match (self.tensor)(name).map(|tensor| tensor.shape) {
            Some(&[_, width, _]) => Ok(width),
            _ => Err(self.tensor_error(name)),
        }
    }

    /// Factors of a rotary embedding: finite numbers above 0.
    fn factors(&self, name: &'static str) -> Result<Option<Vec<f32>>, GgufConfigError> {
        let Some(tensor) = (self.tensor)(name) else {
            return Ok(None);
        };
        let refused = || self.tensor_error(name);
        if tensor.shape.len() != 1 || tensor.elements() > MAX_FACTORS {
            return Err(refused());
        }
        let mut factors = vec![0.0; tensor.elements()];
        let read = tensor.widen_into(0..factors.len(), &mut factors);
        let sound = factors.iter().all(|it| it.is_finite() && *it > 0.0);
        match read.is_ok() && sound && !factors.is_empty() {
            true => Ok(Some(factors)),
            false => Err(refused()),
        }
    }

    fn missing(&self, name: &str) -> GgufConfigError {
        let key = self.key(name);
        GgufConfigError::Missing { key }
    }

    fn kind(&self, name: &str, value: &Value, wanted: &'static str) -> GgufConfigError {
        GgufConfigError::Kind {
            key: self.key(name),
            found: short(value),
            wanted,
        }
    }

    fn unsupported(&self, name: &str) -> GgufConfigError {
        GgufConfigError::Unsupported {
            key: self.key(name),
            found: self.value(name).map_or("absent".to_owned(), short),
        }
    }

    fn tensor_error(&self, name: &'static str) -> GgufConfigError {
        let found = (self.tensor)(name);
        GgufConfigError::Tensor {
            name,
            found: found.map(|it| format!("{} of shape {:?}", it.dtype, it.shape)),
        }
    }
}

/// What transformers calls the models of an architecture.
struct FamilyName {
    model_type: &'static str,
    class: &'static str,
    activation: &'static str,
}

fn family(architecture: &str, has_experts: bool) -> FamilyName {
    let (model_type, class) = match architecture {
        "qwen2" => ("qwen2", "Qwen2ForCausalLM"),
        "qwen3" => ("qwen3", "Qwen3ForCausalLM"),
        "qwen3moe" => ("qwen3_moe", "Qwen3MoeForCausalLM"),
        "gemma" => ("gemma", "GemmaForCausalLM"),
        "gemma2" => ("gemma2", "Gemma2ForCausalLM"),
        "gemma3" => ("gemma3_text", "Gemma3ForCausalLM"),
        "phi3" => ("phi3", "Phi3ForCausalLM"),
        "olmo2" => ("olmo2", "Olmo2ForCausalLM"),
        "granite" => ("granite", "GraniteForCausalLM"),
        _ if has_experts => ("mixtral", "MixtralForCausalLM"),
        _ => ("llama", "LlamaForCausalLM"),
    };
    FamilyName {
        model_type,
        class,
        activation: match architecture {
            "gemma" | "gemma2" | "gemma3" => "gelu_pytorch_tanh",
            _ => "silu",
        },
    }
}

/// The value that all elements of an array of whole numbers have.
fn uniform(array: &Array) -> Option<u64> {
    fn all<T: Copy + PartialEq + TryInto<u64>>(numbers: &[T]) -> Option<u64> {
        let (&first, rest) = numbers.split_first()?;
        let same = rest.iter().all(|&number| number == first);
        same.then_some(first)?.try_into().ok()
    }
    match array {
        Array::U32(numbers) => all(numbers),
        Array::I32(numbers) => all(numbers),
        Array::U64(numbers) => all(numbers),
        Array::I64(numbers) => all(numbers),
        _ => None,
    }
}

/// The share that `part` is of `whole`, such that the product of the two, cut to a whole number, is `part` again.
#[expect(clippy::cast_precision_loss, reason = "a head is far below 2^53 wide")]
fn share(part: usize, whole: usize) -> f64 {
    let (part, whole) = (part as f64, whole.max(1) as f64);
    let share = part / whole;
    match whole * share < part {
        true => share.next_up(),
        false => share,
    }
}

#[expect(clippy::cast_precision_loss, reason = "a head is far below 2^53 wide")]
fn root(width: usize) -> f64 {
    (width as f64).sqrt()
}

/// A value in a message.
fn short(value: &Value) -> String {
    match value {
        Value::Text(text) => format!("\"{}\"", shown(text)),
        Value::Array(_) => "an array".to_owned(),
        Value::Bool(flag) => flag.to_string(),
        _ => match (value.as_u64(), value.as_f64()) {
            (Some(number), _) => number.to_string(),
            (None, Some(number)) => number.to_string(),
            (None, None) => "a negative number".to_owned(),
        },
    }
}

/// Most factors of a rotary embedding: half of the widest head that a config may have.
const MAX_FACTORS: usize = 1 << 15;

/// Roles of tokens, there and in a config.
const TOKEN_IDS: [(&str, &str); 3] = [
    ("tokenizer.ggml.bos_token_id", "bos_token_id"),
    ("tokenizer.ggml.eos_token_id", "eos_token_id"),
    ("tokenizer.ggml.padding_token_id", "pad_token_id"),
];

/// Keys of all architectures, without its name: those that are read, and those that repeat what tensors say.
const KNOWN: &[&str] = &[
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "vocab_size",
];

/// Keys of some.
const OWN: &[(&str, &[&str])] = &[
    (
        "llama",
        &["expert_count", "expert_used_count", "tensor_data_layout"],
    ),
    (
        "qwen3moe",
        &[
            "expert_count",
            "expert_used_count",
            "expert_feed_forward_length",
        ],
    ),
    (
        "gemma2",
        &[
            "attn_logit_softcapping",
            "final_logit_softcapping",
            "attention.sliding_window",
            "attention.sliding_window_pattern",
        ],
    ),
    (
        "gemma3",
        &[
            "attn_logit_softcapping",
            "final_logit_softcapping",
            "attention.sliding_window",
            "attention.sliding_window_pattern",
            "rope.freq_base_swa",
        ],
    ),
    (
        "phi3",
        &["attention.sliding_window", "rope.scaling.attn_factor"],
    ),
    (
        "granite",
        &[
            "attention.scale",
            "embedding_scale",
            "residual_scale",
            "logit_scale",
        ],
    ),
];

/// Flags with the value at which they change nothing.
const NEUTRAL_FLAGS: &[(&str, bool)] =
    &[("attention.causal", true), ("use_parallel_residual", false)];

/// Numbers with the value at which they change nothing.
const NEUTRAL_NUMBERS: &[(&str, f32)] = &[
    ("rope.scaling.attn_factor", 1.0),
    ("rope.scaling.yarn_ext_factor", 1.0),
];

/// Numbers that say of something that there is none of it.
const ABSENT_AT_ZERO: &[&str] = &[
    "attention.sliding_window",
    "expert_count",
    "expert_shared_count",
    "expert_used_count",
    "pooling_type",
];

/// Why no config can be made of a file's keys.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum GgufConfigError {
    /// An architecture that is not supported.
    #[error(transparent)]
    Architecture(#[from] UnknownArchitecture),
    /// A key has another kind of value.
    #[error("`{key}` is {found}, where {wanted} belongs")]
    Kind {
        /// The key.
        key: String,
        /// Its value.
        found: String,
        /// What belongs there.
        wanted: &'static str,
    },
    /// A key that is needed is not there.
    #[error("`{key}` is missing")]
    Missing {
        /// The key.
        key: String,
    },
    /// A tensor that is needed for the config is not there, or not what it should be.
    #[error("tensor `{name}` is {}", found.as_deref().unwrap_or("missing"))]
    Tensor {
        /// Its name.
        name: &'static str,
        /// Its type and shape.
        found: Option<String>,
    },
    /// A key that nothing here knows.
    #[error("`{}` is {found}, and what that does is not known", shown(key))]
    Unknown {
        /// The key.
        key: String,
        /// Its value.
        found: String,
    },
    /// A value that no config can say.
    #[error("`{key}` is {found}, which no config of this family can say")]
    Unsupported {
        /// The key.
        key: String,
        /// Its value.
        found: String,
    },
}

#[cfg(test)]
mod tests {
    use panacea_formats::Dtype;
    use panacea_formats::gguf::Metadata;

    use super::super::GgufConfig;
    use super::*;
    use crate::model::Config;

    fn testdata(name: &str) -> String {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata");
        std::fs::read_to_string(folder.join(name)).expect(name)
    }

    /// A tensor by its name, shape and values, of which a matrix that is only looked at has none.
    struct Tensor(&'static str, Vec<usize>, Vec<u8>);

    /// What a file made of `config` would hold, as far as a config depends on it.
    fn tensors(config: &GgufConfig, has_biases: bool) -> Vec<Tensor> {
        let rows = config.config.vocab_size;
        let mut tensors = vec![Tensor("token_embd.weight", vec![rows, 1], Vec::new())];
        if !config.config.tie_word_embeddings {
            tensors.push(Tensor("output.weight", vec![rows, 1], Vec::new()));
        }
        if has_biases {
            for name in ["blk.0.attn_q.bias", "blk.0.ffn_up.bias"] {
                tensors.push(Tensor(name, vec![1], Vec::new()));
            }
        }
        for derived in &config.derived {
            let bytes = derived.values.iter().flat_map(|it| it.to_le_bytes());
            tensors.push(Tensor(
                derived.name,
                vec![derived.values.len()],
                bytes.collect(),
            ));
        }
        tensors
    }

    fn read(metadata: &Metadata, tensors: &[Tensor]) -> Result<Map<String, Json>, GgufConfigError> {
        from_gguf(metadata, &|name: &str| {
            let tensor = tensors.iter().find(|it| it.0 == name)?;
            Some(TensorView {
                name: tensor.0,
                dtype: Dtype::F32,
                shape: &tensor.1,
                bytes: &tensor.2,
            })
        })
    }

    fn there_and_back(text: &str, has_biases: bool) -> Config {
        let there = GgufConfig::parse(text).expect("a config");
        let metadata = there.metadata(&Metadata::default(), 1);
        let back = read(&metadata, &tensors(&there, has_biases)).expect("a config");
        Config::parse(&Json::Object(back).to_string()).expect("a config")
    }

    #[test]
    fn published_configs_come_back_as_what_they_compute() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/configs");
        let mut seen = 0;
        for entry in std::fs::read_dir(folder).expect("configs") {
            let path = entry.expect("an entry").path();
            if path.extension().is_none_or(|it| it != "json") {
                continue;
            }
            let text = std::fs::read_to_string(&path).expect("a config");
            let mut wanted = Config::parse(&text).expect("a config");
            let found = there_and_back(&text, false);
            // Stored as `llama`, which Mistral's models are but for their window.
            if wanted.model_type == "mistral" {
                wanted.model_type = "llama";
                wanted
                    .blocks
                    .iter_mut()
                    .for_each(|block| block.window = None);
            }
            assert_eq!(
                format!("{found:?}"),
                format!("{wanted:?}"),
                "{}",
                path.display()
            );
            seen += 1;
        }
        assert_eq!(seen, 30);
    }

    #[test]
    fn tiny_configs_come_back_as_what_they_compute_where_nothing_was_lost() {
        let mut same = Vec::new();
        for case in [
            "llama-tied",
            "llama3-rope",
            "llama-biases",
            "llama-linear-rope",
            "llama-yarn-rope",
            "qwen2-yarn",
            "qwen3",
            "phi3-longrope-short",
            "phi3-longrope-mixed",
            "olmo2",
            "granite",
        ] {
            let text = testdata(&format!("oracle/{case}/config.json"));
            let losses = GgufConfig::parse(&text).expect(case).losses;
            let wanted = Config::parse(&text).expect(case);
            let found = there_and_back(&text, matches!(case, "llama-biases" | "granite"));
            assert_eq!(losses, [""; 0], "{case}");
            assert_eq!(format!("{found:?}"), format!("{wanted:?}"), "{case}");
            same.push(case);
        }
        assert_eq!(same.len(), 11);
    }

    #[test]
    fn factors_that_are_no_published_ones_are_kept_as_they_are() {
        let text = testdata("configs/Llama-3.1-8B.json");
        let there = GgufConfig::parse(&text).expect("a config");
        let metadata = there.metadata(&Metadata::default(), 1);
        let mut tensors = tensors(&there, false);
        let factors = tensors.last_mut().expect("factors");
        factors.2[..4].copy_from_slice(&1.5_f32.to_le_bytes());
        let back = read(&metadata, &tensors).expect("a config");
        assert_eq!(back["rope_parameters"]["rope_type"], "longrope");
        let config = Config::parse(&Json::Object(back).to_string()).expect("a config");
        assert_eq!(config.rotary[0].inverse[0], 1.0 / 1.5);
        assert_eq!(config.rotary[0].attention_factor, 1.0);
    }

    #[test]
    fn what_no_config_can_say_is_refused_by_its_key() {
        let there = GgufConfig::parse(&testdata("configs/Llama-3.1-8B.json")).expect("a config");
        let metadata = there.metadata(&Metadata::default(), 1);
        let tensors = tensors(&there, false);
        let refused = |key: &str, value: Option<Value>| {
            let mut metadata = metadata.clone();
            match value {
                Some(value) => metadata.set(key, value),
                None => metadata.remove(key),
            }
            read(&metadata, &tensors).expect_err(key).to_string()
        };
        let heads = Array::U32(vec![8, 4]);
        for (key, value, words) in [
            (
                "general.architecture",
                None,
                "`general.architecture` is missing",
            ),
            ("llama.block_count", None, "`llama.block_count` is missing"),
            (
                "llama.attention.head_count_kv",
                Some(Value::Array(heads)),
                "`llama.attention.head_count_kv` is an array, where a whole number",
            ),
            (
                "llama.block_count",
                Some(Value::I32(-1)),
                "is a negative number, where a whole number",
            ),
            (
                "llama.attention.sliding_window",
                Some(Value::U32(5)),
                "`llama.attention.sliding_window` is 5, and what that does is not known",
            ),
            (
                "llama.rope.scaling.type",
                Some(Value::Text("dynamic".into())),
                "`llama.rope.scaling.type` is \"dynamic\", which no config",
            ),
            (
                "llama.rope.dimension_count",
                Some(Value::U32(64)),
                "`llama.rope.dimension_count` is 64, which no config",
            ),
            (
                "llama.rope.freq_base",
                Some(Value::F32(f32::NAN)),
                "`llama.rope.freq_base` is NaN, where a finite float",
            ),
            (
                "tokenizer.ggml.bos_token_id",
                Some(Value::Text("x".into())),
                "`tokenizer.ggml.bos_token_id` is \"x\", where a token's id",
            ),
        ] {
            let error = refused(key, value);
            assert!(error.contains(words), "{key}: {error}");
        }
        let error = read(&metadata, &[]).expect_err("no tensors").to_string();
        assert_eq!(error, "tensor `token_embd.weight` is missing");
    }

    #[test]
    fn a_share_of_a_head_gives_its_dimensions_again() {
        for whole in 2..400 {
            for part in 1..=whole {
                #[expect(
                    clippy::cast_possible_truncation,
                    clippy::cast_precision_loss,
                    clippy::cast_sign_loss,
                    reason = "as the config's reader cuts it"
                )]
                let cut = (whole as f64 * share(part, whole)) as usize;
                assert_eq!(cut, part);
            }
        }
    }
}
