//! Which element type each tensor of a GGUF file gets.
//!
//! In: the type of the file that was asked for, and names and shapes of its tensors. Out: a [`Dtype`] for each. The float types and
//! `q8_0` follow `prepare_tensors` of llama.cpp's `conversion/base.py`; the others `src/llama-quant.cpp`, which gives tensors that
//! matter more finer types, by rules that count tensors in its own order, and falls back to other types where rows are no whole blocks.

use std::fmt;
use std::str::FromStr;

use panacea_formats::Dtype;
use thiserror::Error;

/// The type of a file as `general.file_type` has it: that of most of its tensors, and which mixture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(
    non_camel_case_types,
    reason = "the variants are spelled as llama.cpp spells them"
)]
#[non_exhaustive]
pub enum FileType {
    /// All F32.
    F32,
    /// F16, norms and the like F32.
    F16,
    /// BF16, norms and the like F32.
    BF16,
    /// Q8_0, norms and the like F32.
    Q8_0,
    /// Q4_0.
    Q4_0,
    /// Q4_1.
    Q4_1,
    /// Q5_0.
    Q5_0,
    /// Q5_1.
    Q5_1,
    /// Q2_K with Q3_K and Q4_K.
    Q2_K,
    /// Q3_K.
    Q3_K_S,
    /// Q3_K with Q4_K and Q5_K.
    Q3_K_M,
    /// Q3_K with Q5_K.
    Q3_K_L,
    /// Q4_K with some Q5_K.
    Q4_K_S,
    /// Q4_K with Q6_K.
    Q4_K_M,
    /// Q5_K.
    Q5_K_S,
    /// Q5_K with Q6_K.
    Q5_K_M,
    /// Q6_K.
    Q6_K,
}

use FileType::{Q2_K, Q3_K_L, Q3_K_M, Q3_K_S, Q4_K_M, Q4_K_S, Q5_K_M};

impl FileType {
    /// Every type, with its name, its number in `enum llama_ftype`, and what most tensors get (`llama_ftype_get_default_type`).
    const TABLE: &'static [(Self, &'static str, u32, Dtype)] = &[
        (Self::F32, "f32", 0, Dtype::F32),
        (Self::F16, "f16", 1, Dtype::F16),
        (Self::BF16, "bf16", 32, Dtype::BF16),
        (Self::Q8_0, "q8_0", 7, Dtype::Q8_0),
        (Self::Q4_0, "q4_0", 2, Dtype::Q4_0),
        (Self::Q4_1, "q4_1", 3, Dtype::Q4_1),
        (Self::Q5_0, "q5_0", 8, Dtype::Q5_0),
        (Self::Q5_1, "q5_1", 9, Dtype::Q5_1),
        (Self::Q2_K, "q2_k", 10, Dtype::Q2_K),
        (Self::Q3_K_S, "q3_k_s", 11, Dtype::Q3_K),
        (Self::Q3_K_M, "q3_k_m", 12, Dtype::Q3_K),
        (Self::Q3_K_L, "q3_k_l", 13, Dtype::Q3_K),
        (Self::Q4_K_S, "q4_k_s", 14, Dtype::Q4_K),
        (Self::Q4_K_M, "q4_k_m", 15, Dtype::Q4_K),
        (Self::Q5_K_S, "q5_k_s", 16, Dtype::Q5_K),
        (Self::Q5_K_M, "q5_k_m", 17, Dtype::Q5_K),
        (Self::Q6_K, "q6_k", 18, Dtype::Q6_K),
    ];

    /// The names of all types.
    pub fn names() -> impl Iterator<Item = &'static str> {
        Self::TABLE.iter().map(|row| row.1)
    }

    /// As it is spelled.
    pub fn name(self) -> &'static str {
        self.row().1
    }

    /// `general.file_type`.
    pub fn number(self) -> u32 {
        self.row().2
    }

    /// What most tensors get.
    pub fn dtype(self) -> Dtype {
        self.row().3
    }

    /// Whether the converter writes it; the others are llama-quantize's.
    pub(super) fn is_converters(self) -> bool {
        matches!(self, Self::F32 | Self::F16 | Self::BF16 | Self::Q8_0)
    }

    fn row(self) -> &'static (Self, &'static str, u32, Dtype) {
        let mut rows = Self::TABLE.iter();
        // Every variant has a row, which a test holds.
        rows.find(|row| row.0 == self).unwrap_or(&Self::TABLE[0])
    }
}

impl fmt::Display for FileType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for FileType {
    type Err = UnknownFileType;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let lower = name.to_ascii_lowercase();
        let row = Self::TABLE.iter().find(|row| row.1 == lower);
        row.map(|row| row.0).ok_or_else(|| UnknownFileType {
            found: name.chars().take(32).collect(),
        })
    }
}

/// A name of no type of file.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error(
    "`{}` is no type of a GGUF file that is written here; there are {}",
    panacea_formats::shown(found),
    FileType::names().collect::<Vec<_>>().join(", ")
)]
pub struct UnknownFileType {
    /// The name, cut to 32 characters.
    pub found: String,
}

/// What the rules ask of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModelFacts<'a> {
    /// `general.architecture`.
    pub architecture: &'a str,
    /// Number of blocks.
    pub blocks: usize,
    /// Number of query heads.
    pub heads: usize,
    /// Number of key heads.
    pub key_heads: usize,
    /// Number of experts; 0 without.
    pub experts: usize,
}

/// The type of each of `tensors`, which are names with shapes, outermost dimension first, in any order.
pub fn choose(file: FileType, model: ModelFacts<'_>, tensors: &[(&str, &[usize])]) -> Vec<Dtype> {
    if file.is_converters() {
        let types = tensors
            .iter()
            .map(|&(name, shape)| by_converter(file.dtype(), name, shape));
        return types.collect();
    }
    // In the order of `llama_model_loader::weight_name_comparer`, in which llama-quantize counts.
    let mut order: Vec<usize> = (0..tensors.len()).collect();
    order.sort_by_key(|&i| (block_of(tensors[i].0), tensors[i].0));
    let categories: Vec<Category> = tensors.iter().map(|it| Category::of(it.0)).collect();
    let like_values = categories.iter().filter(|&&it| it == Category::Value);
    let mut counting = Counting {
        file,
        model,
        values: like_values.count(),
        is_tied: !categories.contains(&Category::Output),
        values_seen: 0,
        downs_seen: 0,
    };
    let mut types = vec![Dtype::F32; tensors.len()];
    for i in order {
        let (name, shape) = tensors[i];
        types[i] = match may_be_quantized(name, shape) {
            true => fitting(counting.next(categories[i], name, shape), shape),
            // As the file has it that would be quantized.
            false => by_converter(Dtype::F16, name, shape),
        };
    }
    types
}

/// `prepare_tensors` of `conversion/base.py`.
fn by_converter(wanted: Dtype, name: &str, shape: &[usize]) -> Dtype {
    let is_f32 = shape.len() <= 1
        || name.ends_with("_norm.weight")
        || name.ends_with(".ffn_gate_inp.weight")
        || !name.ends_with(".weight");
    match is_f32 {
        true => Dtype::F32,
        false if fits(wanted, shape) => wanted,
        false => Dtype::F16,
    }
}

/// `tensor_allows_quantization`, as far as it concerns tensors that are written here.
fn may_be_quantized(name: &str, shape: &[usize]) -> bool {
    shape.len() >= 2
        && name.ends_with("weight")
        && !name.contains("_norm.weight")
        && !name.contains("ffn_gate_inp.weight")
}

/// `tensor_type_fallback`.
fn fitting(wanted: Dtype, shape: &[usize]) -> Dtype {
    if fits(wanted, shape) {
        return wanted;
    }
    let instead = match wanted {
        Dtype::Q2_K | Dtype::Q3_K => Dtype::Q4_0,
        Dtype::Q4_K => Dtype::Q5_0,
        Dtype::Q5_K => Dtype::Q5_1,
        Dtype::Q6_K => Dtype::Q8_0,
        other => other,
    };
    match fits(instead, shape) {
        true => instead,
        false => Dtype::F16,
    }
}

/// Whether rows are whole blocks.
fn fits(dtype: Dtype, shape: &[usize]) -> bool {
    shape
        .last()
        .is_some_and(|&columns| dtype.bytes_of(columns).is_some())
}

/// The number of a tensor's block; -1 of those outside.
fn block_of(name: &str) -> i64 {
    let digits = name
        .strip_prefix("blk.")
        .and_then(|rest| rest.split('.').next());
    digits.and_then(|digits| digits.parse().ok()).unwrap_or(-1)
}

/// `tensor_category`, of which those that no rule speaks of are one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Category {
    Embedding,
    Output,
    Key,
    /// Of values, or of queries, keys and values in one.
    Value,
    AttentionOutput,
    Down,
    Other,
}

impl Category {
    /// `tensor_get_category`.
    fn of(name: &str) -> Self {
        match name {
            "output.weight" => Self::Output,
            "token_embd.weight" => Self::Embedding,
            _ if name.contains("attn_qkv.weight") || name.contains("attn_v.weight") => Self::Value,
            _ if name.contains("attn_k.weight") => Self::Key,
            _ if name.contains("attn_output.weight") => Self::AttentionOutput,
            _ if name.contains("ffn_down") => Self::Down,
            _ => Self::Other,
        }
    }
}

/// When a rule holds.
#[derive(Clone, Copy)]
enum When {
    Always,
    /// Of the first so many tensors.
    First(usize),
    /// Of the first tensors, one in so many of all.
    FirstOf(usize),
    /// `use_more_bits`: of the first and the last eighth, and of each third between.
    MoreBits,
    /// With four query heads or more for a key head.
    ManyQueries,
}

/// In files of one of some types, tensors of a category get a type.
struct Rule {
    files: &'static [FileType],
    when: When,
    becomes: Dtype,
}

const fn rule(files: &'static [FileType], when: When, becomes: Dtype) -> Rule {
    Rule {
        files,
        when,
        becomes,
    }
}

use When::{Always, First, FirstOf, ManyQueries, MoreBits};

/// `llama_tensor_get_type_impl`, `category_is_attn_v`. The first that holds counts; where none does, tensors get what most do.
const OF_VALUES: &[Rule] = &[
    rule(&[Q2_K], ManyQueries, Dtype::Q4_K),
    rule(&[Q2_K], Always, Dtype::Q3_K),
    rule(&[Q3_K_M], First(2), Dtype::Q5_K),
    rule(&[Q3_K_M], Always, Dtype::Q4_K),
    rule(&[Q3_K_L], Always, Dtype::Q5_K),
    rule(&[Q4_K_M, Q5_K_M], MoreBits, Dtype::Q6_K),
    rule(&[Q4_K_S], First(4), Dtype::Q5_K),
];

/// The same, `FFN_DOWN`.
const OF_DOWN: &[Rule] = &[
    rule(&[Q2_K], Always, Dtype::Q3_K),
    rule(&[Q3_K_M], FirstOf(16), Dtype::Q5_K),
    rule(&[Q3_K_M], Always, Dtype::Q4_K),
    rule(&[Q3_K_L], Always, Dtype::Q5_K),
    rule(&[Q4_K_M, Q5_K_M], MoreBits, Dtype::Q6_K),
    rule(&[Q4_K_S], FirstOf(8), Dtype::Q5_K),
];

/// The same, `ATTENTION_OUTPUT`.
const OF_ATTENTION_OUTPUT: &[Rule] = &[
    rule(&[Q2_K], Always, Dtype::Q3_K),
    rule(&[Q3_K_M], Always, Dtype::Q4_K),
    rule(&[Q3_K_L], Always, Dtype::Q5_K),
];

/// The same, with eight experts.
const OF_ATTENTION_OUTPUT_WITH_EIGHT: &[Rule] = &[rule(
    &[Q2_K, Q3_K_S, Q3_K_M, Q4_K_S, Q4_K_M],
    Always,
    Dtype::Q5_K,
)];

/// `quantize_state_impl`: what was seen so far.
struct Counting<'a> {
    file: FileType,
    model: ModelFacts<'a>,
    /// Tensors of values there are.
    values: usize,
    /// Whether the embedding is the head, too.
    is_tied: bool,
    values_seen: usize,
    downs_seen: usize,
}

impl Counting<'_> {
    /// `llama_tensor_get_type_impl`, for the next tensor in order.
    fn next(&mut self, category: Category, name: &str, shape: &[usize]) -> Dtype {
        let base = self.file.dtype();
        let has_eight = self.model.experts == 8;
        match category {
            Category::Output => Self::of_head(base, shape),
            Category::Embedding if self.is_tied => Self::of_head(base, shape),
            Category::Value => {
                let place = (self.values_seen, self.values);
                self.values_seen += 1;
                let found = self.first(OF_VALUES, place).unwrap_or(base);
                match found {
                    _ if has_eight => Dtype::Q8_0,
                    Dtype::Q3_K | Dtype::Q4_K if self.is_70b() => Dtype::Q5_K,
                    found => found,
                }
            }
            Category::Key if has_eight => Dtype::Q8_0,
            Category::Down => {
                // Those of experts do not come in the order of the blocks.
                let seen = match self.model.experts > 1 {
                    true => usize::try_from(block_of(name)).unwrap_or(0),
                    false => self.downs_seen,
                };
                self.downs_seen += 1;
                self.first(OF_DOWN, (seen, self.model.blocks))
                    .unwrap_or(base)
            }
            Category::AttentionOutput => {
                let rules = match has_eight {
                    true => OF_ATTENTION_OUTPUT_WITH_EIGHT,
                    false => OF_ATTENTION_OUTPUT,
                };
                self.first(rules, (0, 0)).unwrap_or(base)
            }
            Category::Embedding | Category::Key | Category::Other => base,
        }
    }

    /// The head, or an embedding that is one, too.
    fn of_head(base: Dtype, shape: &[usize]) -> Dtype {
        match base {
            Dtype::Q8_0 => base,
            _ if !fits(base, shape) => Dtype::Q8_0,
            _ => Dtype::Q6_K,
        }
    }

    /// What the first rule that holds for the tensor at a place among all of its kind says.
    fn first(&self, rules: &[Rule], (i, of): (usize, usize)) -> Option<Dtype> {
        let holds = |rule: &&Rule| {
            rule.files.contains(&self.file)
                && match rule.when {
                    Always => true,
                    First(count) => i < count,
                    FirstOf(share) => i < of / share,
                    MoreBits => i < of / 8 || i >= 7 * of / 8 || (i - of / 8) % 3 == 2,
                    // `n_gqa`, a whole number.
                    ManyQueries => self.model.heads / self.model.key_heads.max(1) >= 4,
                }
        };
        rules.iter().find(holds).map(|rule| rule.becomes)
    }

    /// Whether llama.cpp takes it for `LLM_TYPE_70B`.
    fn is_70b(&self) -> bool {
        let has_groups = self.model.heads != self.model.key_heads;
        match self.model.architecture {
            "llama" => self.model.blocks == 80 && has_groups,
            "qwen2" => self.model.blocks == 80,
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::Value as Json;

    use super::*;

    fn number(metadata: &Json, key: &str) -> usize {
        let number = metadata[key].as_u64().unwrap_or(0);
        usize::try_from(number).expect("a small number")
    }

    #[test]
    fn types_are_those_that_llama_quantize_chooses() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata");
        let text =
            std::fs::read_to_string(folder.join("gguf-metadata/types.json")).expect("a file");
        let cases: BTreeMap<String, Json> = serde_json::from_str(&text).expect("an object");
        let mut compared = 0;
        for (name, case) in &cases {
            let metadata = &case["metadata"];
            let model = ModelFacts {
                architecture: case["architecture"].as_str().expect("a text"),
                blocks: number(metadata, "block_count"),
                heads: number(metadata, "attention.head_count"),
                key_heads: number(metadata, "attention.head_count_kv"),
                experts: number(metadata, "expert_count"),
            };
            let tensors: Vec<(String, Vec<usize>)> =
                serde_json::from_value(case["tensors"].clone()).expect("tensors");
            let mut all = Vec::new();
            for (pattern, shape) in &tensors {
                let blocks = if pattern.contains("{}") {
                    model.blocks
                } else {
                    1
                };
                for block in 0..blocks {
                    let tensor = pattern.replace("{}", &block.to_string());
                    all.push((pattern, tensor, shape.as_slice()));
                }
            }
            // In another order than theirs, which must not matter.
            all.reverse();
            let given: Vec<_> = all.iter().map(|it| (it.1.as_str(), it.2)).collect();
            for (file, expected) in case["types"].as_object().expect("an object") {
                let file: FileType = file.parse().expect("a type");
                let found = choose(file, model, &given);
                for (pattern, _) in &tensors {
                    let wanted: Vec<&str> = expected[pattern]
                        .as_str()
                        .expect("a text")
                        .split(' ')
                        .flat_map(|run| {
                            let (dtype, times) = run.split_once('*').expect("a run");
                            vec![dtype; times.parse().expect("a number")]
                        })
                        .collect();
                    let found = all.iter().zip(&found).rev();
                    let found = found.filter(|(it, _)| it.0 == pattern);
                    let found: Vec<&str> = found.map(|(_, dtype)| dtype.name()).collect();
                    assert_eq!(found, wanted, "{name} {file} {pattern}");
                    compared += found.len();
                }
            }
        }
        assert!(compared > 40_000, "{compared}");
    }

    #[test]
    fn the_float_types_and_q8_0_spare_what_the_converter_spares() {
        let tensors: [(&str, &[usize]); 7] = [
            ("token_embd.weight", &[9, 64]),
            ("blk.0.attn_q.weight", &[64, 48]),
            ("blk.0.attn_q.bias", &[64]),
            ("blk.0.attn_norm.weight", &[64]),
            ("blk.0.ffn_gate_inp.weight", &[4, 64]),
            ("blk.0.ffn_up_exps.weight", &[4, 32, 64]),
            ("rope_freqs.weight", &[32]),
        ];
        let model = ModelFacts {
            architecture: "llama",
            blocks: 1,
            heads: 1,
            key_heads: 1,
            experts: 4,
        };
        use Dtype::{BF16, F16, F32, Q8_0};
        let of = |file| choose(file, model, &tensors);
        assert_eq!(of(FileType::F32), [F32; 7]);
        assert_eq!(of(FileType::BF16), [BF16, BF16, F32, F32, F32, BF16, F32]);
        assert_eq!(of(FileType::Q8_0), [Q8_0, F16, F32, F32, F32, Q8_0, F32]);
    }

    #[test]
    fn names_lead_to_types_and_back() {
        for name in FileType::names() {
            let file: FileType = name.to_uppercase().parse().expect(name);
            assert_eq!(file.name(), name);
        }
        assert_eq!(FileType::TABLE.len(), 17);
        let error = "iq4_xs".parse::<FileType>().expect_err("not written");
        assert!(error.to_string().contains("there are f32, f16,"), "{error}");
    }
}
