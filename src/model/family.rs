//! The model families, a row each: how one decoder's arithmetic differs between them.
//!
//! A row holds what the family's code in transformers fixes and its `config.json` does not say. What a config may say is in
//! `settings`, and a config that says anything else is refused (see [`super::Config`]), because a setting that is passed over
//! would give wrong numbers without a word.

/// What all models of one `model_type` have in common.
#[derive(Clone, Copy, Debug)]
pub(super) struct Family {
    /// `model_type` in a `config.json`; of a model with several towers, that of its text part.
    pub(super) model_type: &'static str,
    /// The settings it reads besides [`COMMON`].
    pub(super) settings: &'static [&'static str],
    /// What absent settings stand at in transformers, where that is not the same for all families.
    pub(super) defaults: &'static [(&'static str, f64)],
    /// Where the norms of a block stand.
    pub(super) norms: NormPlacement,
    /// What is added to the stored weights of every norm.
    pub(super) norm_offset: f32,
    /// Norms of queries and keys.
    pub(super) head_norm: Option<HeadNormSpan>,
    /// Which attention projections have biases.
    pub(super) attention_bias: AttentionBias,
    /// The gate's nonlinearity.
    pub(super) activation: Activation,
    /// Whether query, key and value are one stored matrix, and gate and up another.
    pub(super) fused: bool,
    /// Which blocks look back on a window only.
    pub(super) windows: Windows,
    /// Whether the head is the embedding where the config does not say.
    pub(super) tied: bool,
    /// How the embedding is scaled.
    pub(super) embedding: EmbeddingScale,
    /// Where the blocks with experts keep them.
    pub(super) experts: Option<ExpertNames>,
}

/// Where norms stand around attention and feed-forward layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NormPlacement {
    /// Before each.
    Before,
    /// Before and after each.
    Around,
    /// After each.
    After,
}

/// Over what a norm of queries and keys runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HeadNormSpan {
    /// Each head by itself; all share one weight.
    Head,
    /// All heads of a token together.
    Token,
}

/// Which attention projections have biases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AttentionBias {
    /// None.
    Never,
    /// Query, key and value.
    Inputs,
    /// All four, if `attention_bias` says so.
    Setting,
}

/// The nonlinearity of the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Activation {
    /// z / (1 + e^-z).
    Silu,
    /// z / 2 (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))).
    GeluTanh,
}

/// Which blocks have a window, when the config has no `layer_types`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Windows {
    /// None, ever.
    Never,
    /// All, if `sliding_window` has a value.
    All,
    /// All, if `use_sliding_window` and `sliding_window` say so.
    AllIfUsed,
    /// Those from `max_window_layers` on, if `use_sliding_window` and `sliding_window` say so.
    UpperIfUsed,
    /// All but each n-th, n being `sliding_window_pattern` or this.
    AllBut(usize),
}

/// How the embedding is scaled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum EmbeddingScale {
    /// By `embedding_multiplier`, or not at all.
    Setting,
    /// By the square root of the width.
    RootOfWidth,
}

/// What the tensors of a mixture of experts are called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ExpertNames {
    /// The module inside a block that holds `gate`, the router, and `experts`.
    pub(crate) module: &'static str,
    /// Gate, up and down matrix of an expert.
    pub(crate) matrices: [&'static str; 3],
    /// An expert's width, by this setting.
    pub(super) width: &'static str,
}

impl Family {
    /// The family called `model_type`.
    pub(super) fn named(model_type: &str) -> Option<&'static Self> {
        FAMILIES
            .iter()
            .find(|family| family.model_type == model_type)
    }
}

/// Settings that every family reads.
pub(super) const COMMON: &[&str] = &[
    "head_dim",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "original_max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "tie_word_embeddings",
    "vocab_size",
];

/// A decoder of the first Llama: what the other rows differ from.
const LLAMA: Family = Family {
    model_type: "llama",
    settings: &["attention_bias", "mlp_bias"],
    defaults: &[],
    norms: NormPlacement::Before,
    norm_offset: 0.0,
    head_norm: None,
    attention_bias: AttentionBias::Setting,
    activation: Activation::Silu,
    fused: false,
    windows: Windows::Never,
    tied: false,
    embedding: EmbeddingScale::Setting,
    experts: None,
};

const GEMMA: Family = Family {
    model_type: "gemma",
    settings: &["attention_bias", "hidden_activation"],
    defaults: &[("head_dim", 256.0)],
    norm_offset: 1.0,
    activation: Activation::GeluTanh,
    tied: true,
    embedding: EmbeddingScale::RootOfWidth,
    ..LLAMA
};

const QWEN3: Family = Family {
    model_type: "qwen3",
    settings: &[
        "attention_bias",
        "layer_types",
        "max_window_layers",
        "sliding_window",
        "use_sliding_window",
    ],
    defaults: &[
        ("head_dim", 128.0),
        ("max_window_layers", 28.0),
        ("sliding_window", 4096.0),
    ],
    head_norm: Some(HeadNormSpan::Head),
    windows: Windows::UpperIfUsed,
    ..LLAMA
};

const MIXTRAL: Family = Family {
    model_type: "mixtral",
    settings: &["num_experts_per_tok", "num_local_experts", "sliding_window"],
    defaults: &[
        ("num_experts_per_tok", 2.0),
        ("num_key_value_heads", 8.0),
        ("num_local_experts", 8.0),
        ("rms_norm_eps", 1e-5),
        ("rope_theta", 1e6),
    ],
    attention_bias: AttentionBias::Never,
    windows: Windows::All,
    experts: Some(ExpertNames {
        module: "block_sparse_moe",
        matrices: ["w1", "w3", "w2"],
        width: "intermediate_size",
    }),
    ..LLAMA
};

/// Every family, by name.
///
/// Source: the configuration and modeling files of transformers 5.23.
const FAMILIES: &[Family] = &[
    GEMMA,
    Family {
        model_type: "gemma2",
        settings: &[
            "attention_bias",
            "attn_logit_softcapping",
            "final_logit_softcapping",
            "hidden_activation",
            "layer_types",
            "query_pre_attn_scalar",
            "sliding_window",
            // In the first configs, the same number again; transformers reads the other one.
            "sliding_window_size",
        ],
        defaults: &[
            ("attn_logit_softcapping", 50.0),
            ("final_logit_softcapping", 30.0),
            ("head_dim", 256.0),
            ("query_pre_attn_scalar", 256.0),
            ("sliding_window", 4096.0),
        ],
        norms: NormPlacement::Around,
        windows: Windows::AllBut(2),
        ..GEMMA
    },
    Family {
        model_type: "gemma3_text",
        settings: &[
            "_sliding_window_pattern",
            "attention_bias",
            "final_logit_softcapping",
            "hidden_activation",
            "layer_types",
            "query_pre_attn_scalar",
            "rope_local_base_freq",
            "sliding_window",
            "sliding_window_pattern",
        ],
        // The published configs of larger models leave nearly everything out.
        defaults: &[
            ("head_dim", 256.0),
            ("hidden_size", 2304.0),
            ("intermediate_size", 9216.0),
            ("num_attention_heads", 8.0),
            ("num_hidden_layers", 26.0),
            ("num_key_value_heads", 4.0),
            ("query_pre_attn_scalar", 256.0),
            ("rope_local_base_freq", 1e4),
            ("rope_theta", 1e6),
            ("sliding_window", 4096.0),
            ("vocab_size", 262_208.0),
        ],
        norms: NormPlacement::Around,
        head_norm: Some(HeadNormSpan::Head),
        windows: Windows::AllBut(6),
        ..GEMMA
    },
    Family {
        model_type: "granite",
        settings: &[
            "attention_bias",
            "attention_multiplier",
            "embedding_multiplier",
            "logits_scaling",
            "mlp_bias",
            "residual_multiplier",
        ],
        // Where others divide by the root of the head's width.
        defaults: &[("attention_multiplier", 1.0)],
        ..LLAMA
    },
    LLAMA,
    Family {
        model_type: "mistral",
        settings: &["sliding_window"],
        defaults: &[("num_key_value_heads", 8.0), ("sliding_window", 4096.0)],
        attention_bias: AttentionBias::Never,
        windows: Windows::All,
        ..LLAMA
    },
    MIXTRAL,
    Family {
        model_type: "olmo2",
        settings: &["attention_bias"],
        defaults: &[("rms_norm_eps", 1e-5)],
        norms: NormPlacement::After,
        head_norm: Some(HeadNormSpan::Token),
        ..LLAMA
    },
    Family {
        model_type: "phi3",
        settings: &["partial_rotary_factor", "sliding_window"],
        defaults: &[
            ("max_position_embeddings", 4096.0),
            ("original_max_position_embeddings", 4096.0),
            ("rms_norm_eps", 1e-5),
        ],
        attention_bias: AttentionBias::Never,
        fused: true,
        windows: Windows::All,
        ..LLAMA
    },
    Family {
        model_type: "qwen2",
        settings: &[
            "layer_types",
            "max_window_layers",
            "sliding_window",
            "use_sliding_window",
        ],
        defaults: &[("max_window_layers", 28.0), ("sliding_window", 4096.0)],
        attention_bias: AttentionBias::Inputs,
        windows: Windows::UpperIfUsed,
        ..LLAMA
    },
    QWEN3,
    Family {
        model_type: "qwen3_moe",
        settings: &[
            "attention_bias",
            "decoder_sparse_step",
            "mlp_only_layers",
            "moe_intermediate_size",
            "norm_topk_prob",
            "num_experts",
            "num_experts_per_tok",
            "num_local_experts",
            "sliding_window",
            "use_sliding_window",
        ],
        defaults: &[
            ("decoder_sparse_step", 1.0),
            ("moe_intermediate_size", 768.0),
            ("num_local_experts", 128.0),
            ("num_experts_per_tok", 8.0),
            ("num_key_value_heads", 4.0),
            ("sliding_window", 4096.0),
        ],
        windows: Windows::AllIfUsed,
        experts: Some(ExpertNames {
            module: "mlp",
            matrices: ["gate_proj", "up_proj", "down_proj"],
            width: "moe_intermediate_size",
        }),
        ..QWEN3
    },
];

/// The `model_type`s this decoder computes exactly. `gemma3` is `gemma3_text` with a vision tower, which is left alone.
pub const MODEL_TYPES: [&str; FAMILIES.len()] = {
    let mut names = [""; FAMILIES.len()];
    let mut at = 0;
    while at < names.len() {
        names[at] = FAMILIES[at].model_type;
        at += 1;
    }
    names
};

/// Settings that change no number here: what transformers writes into every config, training, generation, loss and caching, and
/// what tools leave behind.
pub(super) const INERT: &[&str] = &[
    "architectures",
    "attention_dropout",
    "attn_implementation",
    "attn_pdrop",
    "auto_map",
    "bad_words_ids",
    "begin_suppress_tokens",
    "cache_implementation",
    "chunk_size_feed_forward",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "dropout",
    "dtype",
    "early_stopping",
    "embd_pdrop",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "hidden_dropout",
    "hidden_dropout_prob",
    "id2label",
    "initializer_range",
    "is_llama_config",
    "keys_to_ignore_at_inference",
    "label2id",
    "length_penalty",
    "max_length",
    "max_new_tokens",
    // In the first configs of Llama, beside or in place of `max_position_embeddings`.
    "max_sequence_length",
    "max_window_layers",
    "min_length",
    "model_name",
    "name_or_path",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_labels",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "output_scores",
    "prefix",
    "pretraining_tp",
    "problem_type",
    "repetition_penalty",
    "resid_pdrop",
    "residual_dropout",
    "return_dict",
    "return_dict_in_generate",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "typical_p",
    "use_cache",
    "use_mambapy",
];

/// Settings that are a switch or a factor in some family, each with the value at which it changes nothing.
pub(super) const NEUTRAL: &[(&str, f64)] = &[
    ("embedding_multiplier", 1.0),
    ("full_attn_mod", 1.0),
    ("interpolate_factor", 1.0),
    ("logits_scaling", 1.0),
    ("partial_rotary_factor", 1.0),
    ("residual_multiplier", 1.0),
];

/// Starts and ends of the names of settings that change no number.
pub(super) const INERT_AFFIXES: (&[&str], &[&str]) =
    (&["_", "unsloth_"], &["_token_id", "_token_ids"]);
