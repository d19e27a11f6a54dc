//! The architectures of GGUF, a row each: what tensors are called there and in Hugging Face's files, and how their content differs.
//!
//! In: a name on one side. Out: the name on the other, and what has to happen to rows and values on the way: the architecture `llama`
//! and its like store queries and keys with the rows of a head reordered, Gemma's norms are stored with their offset added, and
//! the experts of a mixture are stacked into one tensor.
//!
//! Source: `TENSOR_NAMES`, `MODEL_TENSORS` and `TensorNameMap` of llama.cpp's gguf-py, and its `conversion/*.py`.

use thiserror::Error;

/// How llama.cpp stores the models of some `model_type`s.
#[derive(Debug, PartialEq, Eq)]
pub struct Architecture {
    /// `general.architecture`.
    pub name: &'static str,
    /// The `model_type`s that are stored so, the one that a file without further marks is read as first.
    pub model_types: &'static [&'static str],
    /// Modules of a block: theirs, and GGUF's.
    modules: &'static [(&'static str, &'static str)],
    /// What the modules of experts are called, where there can be some.
    experts: Option<Experts>,
    /// Whether the rows of query and key projections are reordered so that neighbors turn together: rotary embedding is interleaved.
    pub reordered: bool,
    /// Whether norms are stored with 1 added.
    pub norm_offset: bool,
    /// Whether a head of its own can be stored.
    pub has_head: bool,
}

/// The names of the experts of a mixture.
#[derive(Debug, PartialEq, Eq)]
struct Experts {
    /// The module of a block that holds `gate`, the router, and `experts`.
    module: &'static str,
    /// An expert's matrices: theirs, and GGUF's for all experts together.
    matrices: [(&'static str, &'static str); 3],
}

/// Where a tensor of a Hugging Face file goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// It is the tensor of this name.
    Whole(String),
    /// It is one of the matrices that are stacked, outermost dimension first, under this name.
    Expert {
        /// The name of the stack.
        stack: String,
        /// Its position there.
        expert: usize,
    },
    /// Nowhere: what it holds follows from the config.
    Derived,
}

/// What a tensor of a GGUF file is called in Hugging Face's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// By this name.
    Whole(String),
    /// Each slice along the outermost dimension by a name of its own.
    Experts(ExpertNames),
    /// Not at all: its content is in the config.
    Derived,
}

/// The names of the matrices that were stacked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpertNames {
    before: String,
    after: String,
}

impl ExpertNames {
    /// The name of the matrix of expert `index`.
    pub fn name(&self, index: usize) -> String {
        format!("{}{index}{}", self.before, self.after)
    }
}

/// Which heads the rows of a tensor belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadRows {
    /// Those of queries.
    Query,
    /// Those of keys.
    Key,
}

impl Architecture {
    /// The architecture that GGUF calls `name`.
    ///
    /// # Errors
    /// When none here is called so.
    pub fn named(name: &str) -> Result<&'static Self, UnknownArchitecture> {
        let mut known = ARCHITECTURES.iter();
        known
            .find(|it| it.name == name)
            .ok_or_else(|| UnknownArchitecture {
                found: name.chars().take(64).collect(),
            })
    }

    /// The architecture that models of `model_type`, of a text part if there are several towers, are stored as.
    pub fn of_model_type(model_type: &str) -> Option<&'static Self> {
        let mut known = ARCHITECTURES.iter();
        known.find(|it| it.model_types.contains(&model_type))
    }

    /// The names of all architectures here.
    pub fn names() -> impl Iterator<Item = &'static str> {
        ARCHITECTURES.iter().map(|it| it.name)
    }

    /// Where the tensor that is called `name` in a Hugging Face file goes; nothing when llama.cpp has no place for it. Names of the
    /// decoder begin with `model.`, and that of the head is `lm_head.weight`.
    pub fn place(&self, name: &str) -> Option<Place> {
        if name.ends_with(".rotary_emb.inv_freq") {
            return Some(Place::Derived);
        }
        let whole = |name: &str| Some(Place::Whole(name.to_owned()));
        match name {
            "model.embed_tokens.weight" => return whole("token_embd.weight"),
            "model.norm.weight" => return whole("output_norm.weight"),
            "lm_head.weight" if self.has_head => return whole("output.weight"),
            _ => {}
        }
        let (block, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
        let block = index(block)?;
        let (module, kind) = rest.rsplit_once('.')?;
        if !KINDS.contains(&kind) {
            return None;
        }
        if let Some((_, theirs)) = self.modules.iter().find(|(ours, _)| *ours == module) {
            return Some(Place::Whole(format!("blk.{block}.{theirs}.{kind}")));
        }
        let experts = self.experts.as_ref()?;
        let inner = module.strip_prefix(experts.module)?.strip_prefix('.')?;
        if inner == "gate" {
            return Some(Place::Whole(format!("blk.{block}.{ROUTER}.{kind}")));
        }
        let (expert, matrix) = inner.strip_prefix("experts.")?.split_once('.')?;
        let (_, stacked) = experts.matrices.iter().find(|(ours, _)| *ours == matrix)?;
        Some(Place::Expert {
            stack: format!("blk.{block}.{stacked}.{kind}"),
            expert: index(expert)?,
        })
    }

    /// What the tensor that GGUF calls `name` is called in a Hugging Face file; nothing when it is none of this architecture's.
    pub fn source(&self, name: &str) -> Option<Source> {
        let whole = |name: &str| Some(Source::Whole(name.to_owned()));
        match name {
            "token_embd.weight" => return whole("model.embed_tokens.weight"),
            "output_norm.weight" => return whole("model.norm.weight"),
            "output.weight" if self.has_head => return whole("lm_head.weight"),
            _ if DERIVED.contains(&name) => return Some(Source::Derived),
            _ => {}
        }
        let (block, rest) = name.strip_prefix("blk.")?.split_once('.')?;
        let block = index(block)?;
        let (module, kind) = rest.rsplit_once('.')?;
        if !KINDS.contains(&kind) {
            return None;
        }
        if let Some((ours, _)) = self.modules.iter().find(|(_, theirs)| *theirs == module) {
            return Some(Source::Whole(format!("model.layers.{block}.{ours}.{kind}")));
        }
        let experts = self.experts.as_ref()?;
        let at = format!("model.layers.{block}.{}", experts.module);
        if module == ROUTER {
            return Some(Source::Whole(format!("{at}.gate.{kind}")));
        }
        let mut matrices = experts.matrices.iter();
        let (ours, _) = matrices.find(|(_, theirs)| *theirs == module)?;
        Some(Source::Experts(ExpertNames {
            before: format!("{at}.experts."),
            after: format!(".{ours}.{kind}"),
        }))
    }

    /// Whether GGUF has the rows of the tensor that it calls `name` in another order, see [`row_in_gguf`].
    pub fn reordered_rows(&self, name: &str) -> Option<HeadRows> {
        if !self.reordered {
            return None;
        }
        let (_, rest) = name.strip_prefix("blk.")?.split_once('.')?;
        let (module, _) = rest.rsplit_once('.')?;
        match module {
            "attn_q" => Some(HeadRows::Query),
            "attn_k" => Some(HeadRows::Key),
            _ => None,
        }
    }

    /// Whether GGUF stores the tensor that it calls `name` with 1 added to every value.
    pub fn is_offset(&self, name: &str) -> bool {
        self.norm_offset && name.ends_with("norm.weight")
    }
}

/// Where GGUF has row `row` of a query or key projection whose heads have `head` rows, an even number: the two halves of a head are
/// interleaved.
pub fn row_in_gguf(row: usize, head: usize) -> usize {
    let (start, within, half) = (row - row % head, row % head, head / 2);
    start + 2 * (within % half) + within / half
}

/// Where Hugging Face's file has row `row` of a GGUF file: the inverse of [`row_in_gguf`].
pub fn row_in_source(row: usize, head: usize) -> usize {
    let (start, within, half) = (row - row % head, row % head, head / 2);
    start + within % 2 * half + within / 2
}

/// An architecture that is not in the table.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error(
    "architecture `{}` is not supported; supported are {}",
    panacea_formats::shown(found),
    Architecture::names().collect::<Vec<_>>().join(", ")
)]
pub struct UnknownArchitecture {
    /// Its name, cut to 64 characters.
    pub found: String,
}

/// The number of a block or an expert, as it is written: without sign or leading zeros.
fn index(digits: &str) -> Option<usize> {
    let number = digits.parse().ok()?;
    (digits == format!("{number}")).then_some(number)
}

/// What modules hold.
const KINDS: [&str; 2] = ["weight", "bias"];

/// The matrix that sends tokens to experts.
const ROUTER: &str = "ffn_gate_inp";

/// Factors of rotary embeddings.
pub const ROPE_FREQS: &str = "rope_freqs.weight";
/// Those beyond the context that a model was first trained on.
pub const ROPE_LONG: &str = "rope_factors_long.weight";
/// Those within it.
pub const ROPE_SHORT: &str = "rope_factors_short.weight";

const DERIVED: [&str; 3] = [ROPE_FREQS, ROPE_LONG, ROPE_SHORT];

/// Attention and feed-forward layer of a block, as all architectures name them.
macro_rules! modules {
    ($($more:expr),* $(,)?) => {
        &[
            ("self_attn.q_proj", "attn_q"),
            ("self_attn.k_proj", "attn_k"),
            ("self_attn.v_proj", "attn_v"),
            ("self_attn.o_proj", "attn_output"),
            ("mlp.gate_proj", "ffn_gate"),
            ("mlp.up_proj", "ffn_up"),
            ("mlp.down_proj", "ffn_down"),
            $($more,)*
        ]
    };
}

const QUERY_NORM: (&str, &str) = ("self_attn.q_norm", "attn_q_norm");
const KEY_NORM: (&str, &str) = ("self_attn.k_norm", "attn_k_norm");
const NORM_BEFORE_ATTENTION: (&str, &str) = ("input_layernorm", "attn_norm");
/// `post_attention_layernorm` is what stands before the feed-forward layer, where there is no other there.
const NORM_BEFORE_MLP: (&str, &str) = ("post_attention_layernorm", "ffn_norm");
const NORM_AFTER_ATTENTION: (&str, &str) = ("post_attention_layernorm", "post_attention_norm");
const SECOND_NORM_BEFORE_MLP: (&str, &str) = ("pre_feedforward_layernorm", "ffn_norm");
const NORM_AFTER_MLP: (&str, &str) = ("post_feedforward_layernorm", "post_ffw_norm");

const LLAMA: Architecture = Architecture {
    name: "llama",
    model_types: &["llama", "mistral", "mixtral"],
    modules: modules![NORM_BEFORE_ATTENTION, NORM_BEFORE_MLP],
    experts: Some(Experts {
        module: "block_sparse_moe",
        matrices: [
            ("w1", "ffn_gate_exps"),
            ("w3", "ffn_up_exps"),
            ("w2", "ffn_down_exps"),
        ],
    }),
    reordered: true,
    norm_offset: false,
    has_head: true,
};

const QWEN2: Architecture = Architecture {
    name: "qwen2",
    model_types: &["qwen2"],
    experts: None,
    reordered: false,
    ..LLAMA
};

const GEMMA: Architecture = Architecture {
    name: "gemma",
    model_types: &["gemma"],
    norm_offset: true,
    has_head: false,
    ..QWEN2
};

/// Every architecture.
const ARCHITECTURES: &[Architecture] = &[
    LLAMA,
    QWEN2,
    Architecture {
        name: "qwen3",
        model_types: &["qwen3"],
        modules: modules![QUERY_NORM, KEY_NORM, NORM_BEFORE_ATTENTION, NORM_BEFORE_MLP],
        ..QWEN2
    },
    Architecture {
        name: "qwen3moe",
        model_types: &["qwen3_moe"],
        // Without a feed-forward layer that is no mixture, which llama.cpp does not know there.
        modules: &[
            ("self_attn.q_proj", "attn_q"),
            ("self_attn.k_proj", "attn_k"),
            ("self_attn.v_proj", "attn_v"),
            ("self_attn.o_proj", "attn_output"),
            QUERY_NORM,
            KEY_NORM,
            NORM_BEFORE_ATTENTION,
            NORM_BEFORE_MLP,
        ],
        experts: Some(Experts {
            module: "mlp",
            matrices: [
                ("gate_proj", "ffn_gate_exps"),
                ("up_proj", "ffn_up_exps"),
                ("down_proj", "ffn_down_exps"),
            ],
        }),
        ..QWEN2
    },
    GEMMA,
    Architecture {
        name: "gemma2",
        model_types: &["gemma2"],
        modules: modules![
            NORM_BEFORE_ATTENTION,
            NORM_AFTER_ATTENTION,
            SECOND_NORM_BEFORE_MLP,
            NORM_AFTER_MLP,
        ],
        ..GEMMA
    },
    Architecture {
        name: "gemma3",
        model_types: &["gemma3_text"],
        modules: modules![
            QUERY_NORM,
            KEY_NORM,
            NORM_BEFORE_ATTENTION,
            NORM_AFTER_ATTENTION,
            SECOND_NORM_BEFORE_MLP,
            NORM_AFTER_MLP,
        ],
        has_head: true,
        ..GEMMA
    },
    Architecture {
        name: "phi3",
        model_types: &["phi3"],
        modules: &[
            ("self_attn.qkv_proj", "attn_qkv"),
            ("self_attn.o_proj", "attn_output"),
            // Gate and up in one.
            ("mlp.gate_up_proj", "ffn_up"),
            ("mlp.down_proj", "ffn_down"),
            NORM_BEFORE_ATTENTION,
            NORM_BEFORE_MLP,
        ],
        ..QWEN2
    },
    Architecture {
        name: "olmo2",
        model_types: &["olmo2"],
        modules: modules![QUERY_NORM, KEY_NORM, NORM_AFTER_ATTENTION, NORM_AFTER_MLP],
        ..QWEN2
    },
    Architecture {
        name: "granite",
        model_types: &["granite"],
        reordered: true,
        ..QWEN2
    },
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::model::MODEL_TYPES;

    #[test]
    fn every_model_type_has_one_architecture() {
        for model_type in MODEL_TYPES {
            let found = Architecture::of_model_type(model_type).expect(model_type);
            assert_eq!(Architecture::named(found.name), Ok(found));
        }
        let listed = ARCHITECTURES.iter().flat_map(|it| it.model_types);
        assert_eq!(listed.count(), MODEL_TYPES.len());
        let error = Architecture::named("mamba").expect_err("no such row");
        let words = "architecture `mamba` is not supported; supported are llama, qwen2,";
        assert!(error.to_string().starts_with(words), "{error}");
    }

    #[test]
    fn names_of_published_models_are_those_of_llama_cpps_converter_both_ways() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata");
        let read = |name: &str| std::fs::read_to_string(folder.join(name)).expect(name);
        let published: BTreeMap<String, serde_json::Value> =
            serde_json::from_str(&read("gguf-metadata/published.json")).expect("an object");
        let mut seen = 0;
        for (stem, expected) in &published {
            let architecture = expected["metadata"][0][2].as_str().expect("a text");
            let architecture = Architecture::named(architecture).expect(stem);
            for (ours, theirs) in expected["names"].as_object().expect("an object") {
                let theirs = theirs.as_str().expect("a text");
                let ours = ours.replace("language_model.", "");
                // transformers 5 calls the module `mlp`, and stores it under its old name.
                let ours = match stem.starts_with("Mixtral") {
                    true => ours.replace(".mlp.", ".block_sparse_moe."),
                    false => ours,
                };
                assert_eq!(
                    architecture.place(&ours),
                    Some(Place::Whole(theirs.to_owned())),
                    "{stem} {ours}"
                );
                assert_eq!(architecture.source(theirs), Some(Source::Whole(ours)));
                seen += 1;
            }
        }
        assert!(seen > 300, "{seen}");
    }

    #[test]
    fn experts_are_stacked_by_their_number() {
        for (architecture, ours, theirs) in [
            ("llama", "block_sparse_moe.experts.12.w1", "ffn_gate_exps"),
            ("llama", "block_sparse_moe.experts.12.w2", "ffn_down_exps"),
            ("llama", "block_sparse_moe.experts.12.w3", "ffn_up_exps"),
            ("qwen3moe", "mlp.experts.12.up_proj", "ffn_up_exps"),
        ] {
            let architecture = Architecture::named(architecture).expect("a row");
            let ours = format!("model.layers.3.{ours}.weight");
            let stack = format!("blk.3.{theirs}.weight");
            let Some(Source::Experts(names)) = architecture.source(&stack) else {
                panic!("{stack}");
            };
            assert_eq!(names.name(12), ours);
            let expert = 12;
            assert_eq!(
                architecture.place(&ours),
                Some(Place::Expert { stack, expert })
            );
        }
    }

    #[test]
    fn names_that_have_no_place_get_none() {
        let llama = Architecture::named("llama").expect("a row");
        let gemma = Architecture::named("gemma").expect("a row");
        let moe = Architecture::named("qwen3moe").expect("a row");
        for (architecture, name) in [
            (llama, "model.layers.0.self_attn.q_norm.weight"),
            (llama, "model.layers.01.mlp.up_proj.weight"),
            (llama, "model.layers.0.mlp.up_proj.lora_A"),
            (llama, "vision_tower.layers.0.mlp.up_proj.weight"),
            (
                llama,
                "model.layers.99999999999999999999.mlp.up_proj.weight",
            ),
            (
                llama,
                "model.layers.0.block_sparse_moe.experts.+1.w1.weight",
            ),
            (gemma, "lm_head.weight"),
            (moe, "model.layers.0.mlp.up_proj.weight"),
        ] {
            assert_eq!(architecture.place(name), None, "{name}");
        }
        for name in [
            "blk.0.attn_q",
            "blk.x.attn_q.weight",
            "blk.-1.attn_q.weight",
            "attn_q.weight",
            "",
        ] {
            assert_eq!(llama.source(name), None, "{name}");
        }
        let derived = "model.layers.0.self_attn.rotary_emb.inv_freq";
        assert_eq!(llama.place(derived), Some(Place::Derived));
        assert_eq!(llama.source(ROPE_FREQS), Some(Source::Derived));
    }

    #[test]
    fn the_halves_of_a_head_are_interleaved_and_put_back() {
        let there: Vec<usize> = (0..12).map(|row| row_in_gguf(row, 6)).collect();
        assert_eq!(there, [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]);
        for head in [2, 6, 64, 128] {
            for row in 0..3 * head {
                assert_eq!(row_in_source(row_in_gguf(row, head), head), row);
            }
        }
    }

    #[test]
    fn only_what_differs_is_changed() {
        let [llama, qwen, gemma] =
            ["llama", "qwen2", "gemma3"].map(|name| Architecture::named(name).expect(name));
        assert_eq!(
            llama.reordered_rows("blk.7.attn_q.bias"),
            Some(HeadRows::Query)
        );
        assert_eq!(
            llama.reordered_rows("blk.7.attn_k.weight"),
            Some(HeadRows::Key)
        );
        assert_eq!(llama.reordered_rows("blk.7.attn_v.weight"), None);
        assert_eq!(qwen.reordered_rows("blk.7.attn_k.weight"), None);
        for name in [
            "output_norm.weight",
            "blk.0.attn_q_norm.weight",
            "blk.0.post_ffw_norm.weight",
        ] {
            assert!(gemma.is_offset(name) && !llama.is_offset(name));
        }
        assert!(!gemma.is_offset("blk.0.ffn_up.weight"));
    }
}
