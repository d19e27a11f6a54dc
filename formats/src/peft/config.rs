//! `adapter_config.json`: every field read, known to be inert, or refused by name.
//!
//! In: the text. Out: an [`AdapterConfig`] that says which modules are adapted, with which rank and scale. A field is *inert*
//! when it changes nothing in what a loaded adapter computes, such as dropout; anything else that is not understood is refused,
//! unless it is null, false or empty.

use std::fmt;
use std::fs::File;
use std::io::Read as _;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::{Map, Value};

use super::PeftError;
use super::modules::{Modules, Pattern, Selected, Selection};
use crate::checkpoint::{ADAPTER_CONFIG_FILE, Checkpoint};
use crate::error::{FormatError, FormatErrorKind};
use crate::json::{JsonError, parse_strict};

/// The settings of a LoRA adapter that change what it computes.
#[derive(Clone, Debug)]
pub struct AdapterConfig {
    /// Where the base is: a path, or a name on the Hugging Face Hub.
    pub base_model_name_or_path: Option<String>,
    /// The base's revision on the Hub.
    pub revision: Option<String>,
    /// Modules that are stored whole, by the ends of their paths.
    pub modules_to_save: Vec<String>,
    rank: usize,
    alpha: f64,
    rank_stabilized: bool,
    /// In the order of the file: the first that matches counts.
    rank_pattern: Vec<(Pattern, usize)>,
    alpha_pattern: Vec<(Pattern, f64)>,
    selection: Selection,
}

impl AdapterConfig {
    /// Reads the config of `checkpoint`, a [`Layout::Adapter`](crate::Layout::Adapter).
    ///
    /// # Errors
    /// When there is none, it cannot be read, or [`AdapterConfig::parse`] refuses it.
    pub fn read(checkpoint: &Checkpoint) -> Result<Self, FormatError> {
        let path = checkpoint.path().join(ADAPTER_CONFIG_FILE);
        let refused = |kind: FormatErrorKind| FormatError::new(&path, kind);
        let mut bytes = Vec::new();
        File::open(&path)
            .and_then(|file| {
                file.take(MAX_ADAPTER_CONFIG_BYTES + 1)
                    .read_to_end(&mut bytes)
            })
            .map_err(|error| refused(error.into()))?;
        if bytes.len() as u64 > MAX_ADAPTER_CONFIG_BYTES {
            let found = bytes.len() as u64;
            return Err(refused(PeftError::ConfigTooLong { found }.into()));
        }
        // What is not UTF-8 is no JSON either, and the parser says where.
        Self::parse(&String::from_utf8_lossy(&bytes)).map_err(|error| refused(error.into()))
    }

    /// Reads the text of a config.
    ///
    /// # Errors
    /// When it is not JSON, a field is of another kind than it should be, or a setting is not implemented.
    pub fn parse(text: &str) -> Result<Self, PeftError> {
        let syntax = |source: JsonError| PeftError::ConfigSyntax { source };
        let value = parse_strict(text).map_err(syntax)?;
        let Value::Object(object) = value else {
            return Err(PeftError::Field {
                field: "the whole",
                wanted: "an object",
                found: kind_of(&value).to_owned(),
            });
        };
        refuse_other_arithmetic(&object)?;
        let fields = Fields(&object);
        let ordered: Ordered =
            serde_json::from_str(text).map_err(|error| syntax(JsonError::from(error)))?;
        let rank = fields.positive("r")?.ok_or(PeftError::Field {
            field: "r",
            wanted: "a whole number of 1 or above",
            found: "missing".to_owned(),
        })?;
        let layers = fields.blocks("layers_to_transform")?;
        let targets = fields.names("target_modules")?;
        if matches!(targets, Some(Names::One(_))) && !layers.is_empty() {
            return Err(fields.misfit(
                "layers_to_transform",
                "nothing beside a `target_modules` that is a text",
            ));
        }
        let none = Modules::Named(Vec::new());
        let layers_patterns = fields.list("layers_pattern")?;
        let layers_patterns = layers_patterns
            .iter()
            .map(|text| Pattern::before_number("layers_pattern", text));
        let selection = Selection {
            // Without any, PEFT knows them by the family of the base.
            targets: targets.map_or(Modules::Unknown, |it| it.modules("target_modules")),
            excluded: fields
                .names("exclude_modules")?
                .map_or(none, |it| it.modules("exclude_modules")),
            layers,
            layers_patterns: layers_patterns.collect::<Result<_, _>>()?,
        };
        Ok(Self {
            base_model_name_or_path: fields.text("base_model_name_or_path")?,
            revision: fields.text("revision")?,
            modules_to_save: fields.list("modules_to_save")?,
            rank,
            alpha: fields.number("lora_alpha")?.ok_or(PeftError::Field {
                field: "lora_alpha",
                wanted: A_NUMBER,
                found: "missing".to_owned(),
            })?,
            rank_stabilized: fields.flag("use_rslora")?,
            rank_pattern: ordered.ranks()?,
            alpha_pattern: ordered.alphas()?,
            selection,
        })
    }

    /// The rank that `module` should have.
    ///
    /// # Errors
    /// When a pattern takes too long.
    pub fn rank_of(&self, module: &str) -> Result<usize, PeftError> {
        Ok(first_match(&self.rank_pattern, module)?.unwrap_or(self.rank))
    }

    /// The factor on B A of `module`; not finite when the config's alpha is too large for f32.
    ///
    /// # Errors
    /// When a pattern takes too long.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_precision_loss,
        reason = "a factor on f32 values, computed in f64 as Python does"
    )]
    pub fn scale_of(&self, module: &str) -> Result<f32, PeftError> {
        let alpha = first_match(&self.alpha_pattern, module)?.unwrap_or(self.alpha);
        let rank = self.rank_of(module)? as f64;
        let scale = match self.rank_stabilized {
            true => alpha / rank.sqrt(),
            false => alpha / rank,
        };
        Ok(scale as f32)
    }

    /// Whether PEFT adapts `module` when it loads this config.
    ///
    /// # Errors
    /// When a pattern takes too long.
    pub fn selects(&self, module: &str) -> Result<Selected, PeftError> {
        self.selection.selects(module)
    }
}

/// The value of the first pattern that matches the end of `module`.
fn first_match<T: Copy>(patterns: &[(Pattern, T)], module: &str) -> Result<Option<T>, PeftError> {
    for (pattern, value) in patterns {
        if pattern.matches(module)? {
            return Ok(Some(*value));
        }
    }
    Ok(None)
}

/// Refuses every field that would have the adapter compute something else than W + scale B A.
fn refuse_other_arithmetic(object: &Map<String, Value>) -> Result<(), PeftError> {
    let fields = Fields(object);
    let unsupported = |field, found: &Value, reason| PeftError::Unsupported {
        field,
        found: found.to_string(),
        reason,
    };
    let text_is = |field, wanted: &str| {
        fields
            .text(field)
            .map(|text| text.is_none_or(|it| it == wanted))
    };
    let found = |field| object.get(field).unwrap_or(&Value::Null);
    if found("peft_type") != "LORA" {
        return Err(unsupported(
            "peft_type",
            found("peft_type"),
            "only LORA adapters are read",
        ));
    }
    if !text_is("task_type", "CAUSAL_LM")? {
        return Err(unsupported(
            "task_type",
            found("task_type"),
            "only adapters of causal language models are read",
        ));
    }
    if !text_is("bias", "none")? {
        return Err(unsupported(
            "bias",
            found("bias"),
            "biases of the base would be changed too",
        ));
    }
    for &(field, reason) in REFUSED {
        if let Some(value) = object.get(field)
            && !is_empty(value)
        {
            return Err(unsupported(field, value, reason));
        }
    }
    if let Value::String(init) = found("init_lora_weights")
        && INITS_THAT_CHANGE_THE_BASE
            .iter()
            .any(|it| init.to_ascii_lowercase().starts_with(it))
    {
        return Err(unsupported(
            "init_lora_weights",
            found("init_lora_weights"),
            "PEFT changes the base's weights when it loads such an adapter; convert it to a plain one with \
             `save_pretrained(..., path_initial_model_for_weight_conversion=...)`",
        ));
    }
    let known = |field: &str| {
        READ.contains(&field) || INERT.contains(&field) || REFUSED.iter().any(|it| it.0 == field)
    };
    // By name, so that the message does not depend on the map's order.
    let unknown = object
        .iter()
        .filter(|(field, value)| !known(field) && !is_empty(value))
        .min_by_key(|(field, _)| *field);
    match unknown {
        None => Ok(()),
        Some((field, value)) => Err(PeftError::UnknownField {
            field: field.clone(),
            found: value.to_string(),
        }),
    }
}

/// Whether a field is set to nothing.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::Bool(true) | Value::Number(_) => false,
    }
}

/// Access to fields with the checks that each needs. A field that is null counts as missing.
struct Fields<'o>(&'o Map<String, Value>);

impl Fields<'_> {
    fn given(&self, field: &str) -> Option<&Value> {
        self.0.get(field).filter(|value| !value.is_null())
    }

    fn misfit(&self, field: &'static str, wanted: &'static str) -> PeftError {
        PeftError::Field {
            field,
            wanted,
            found: self
                .given(field)
                .map_or_else(|| "missing".to_owned(), Value::to_string),
        }
    }

    fn flag(&self, field: &'static str) -> Result<bool, PeftError> {
        match self.given(field) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(_) => Err(self.misfit(field, "true or false")),
        }
    }

    fn text(&self, field: &'static str) -> Result<Option<String>, PeftError> {
        match self.given(field) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(_) => Err(self.misfit(field, "a text")),
        }
    }

    fn number(&self, field: &'static str) -> Result<Option<f64>, PeftError> {
        match self.given(field) {
            None => Ok(None),
            Some(value) => value
                .as_f64()
                .map(Some)
                .ok_or_else(|| self.misfit(field, A_NUMBER)),
        }
    }

    fn positive(&self, field: &'static str) -> Result<Option<usize>, PeftError> {
        match self.given(field) {
            None => Ok(None),
            Some(value) => positive(value)
                .map(Some)
                .ok_or_else(|| self.misfit(field, A_RANK)),
        }
    }

    /// A list of whole numbers, or one.
    fn blocks(&self, field: &'static str) -> Result<Vec<u64>, PeftError> {
        let numbers = match self.given(field) {
            None => Some(Vec::new()),
            Some(Value::Array(several)) => several.iter().map(Value::as_u64).collect(),
            Some(one) => one.as_u64().map(|one| vec![one]),
        };
        numbers.ok_or_else(|| self.misfit(field, "a block's number, or a list of them"))
    }

    /// A list of texts; one counts as a list of it.
    fn list(&self, field: &'static str) -> Result<Vec<String>, PeftError> {
        Ok(match self.names(field)? {
            None => Vec::new(),
            Some(Names::One(name)) => vec![name],
            Some(Names::Several(names)) => names,
        })
    }

    fn names(&self, field: &'static str) -> Result<Option<Names>, PeftError> {
        let name = |item: &Value| item.as_str().filter(|it| !it.is_empty()).map(str::to_owned);
        let names = match self.given(field) {
            None => return Ok(None),
            Some(Value::String(text)) if text.is_empty() => return Ok(None),
            Some(Value::Array(items)) => items
                .iter()
                .map(name)
                .collect::<Option<_>>()
                .map(Names::Several),
            Some(one) => name(one).map(Names::One),
        };
        let wanted = "a text, or a list of texts";
        names.map(Some).ok_or_else(|| self.misfit(field, wanted))
    }
}

/// One text or several, which mean different things of modules.
enum Names {
    One(String),
    Several(Vec<String>),
}

impl Names {
    fn modules(self, field: &'static str) -> Modules {
        match self {
            Self::One(text) => Modules::of_text(field, &text),
            Self::Several(names) => Modules::Named(names),
        }
    }
}

fn positive(value: &Value) -> Option<usize> {
    value
        .as_u64()
        .and_then(|it| usize::try_from(it).ok())
        .filter(|&it| it > 0)
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// The two fields whose order counts, which a parsed object does not keep.
#[derive(Deserialize)]
struct Ordered {
    #[serde(default)]
    rank_pattern: Option<Pairs>,
    #[serde(default)]
    alpha_pattern: Option<Pairs>,
}

impl Ordered {
    fn ranks(&self) -> Result<Vec<(Pattern, usize)>, PeftError> {
        values("rank_pattern", self.rank_pattern.as_ref(), A_RANK, positive)
    }

    fn alphas(&self) -> Result<Vec<(Pattern, f64)>, PeftError> {
        values(
            "alpha_pattern",
            self.alpha_pattern.as_ref(),
            A_NUMBER,
            Value::as_f64,
        )
    }
}

fn values<T>(
    field: &'static str,
    pairs: Option<&Pairs>,
    wanted: &'static str,
    read: impl Fn(&Value) -> Option<T>,
) -> Result<Vec<(Pattern, T)>, PeftError> {
    pairs
        .into_iter()
        .flat_map(|Pairs(pairs)| pairs)
        .map(|(pattern, value)| match read(value) {
            Some(value) => Ok((Pattern::of_end(field, pattern)?, value)),
            None => Err(PeftError::Field {
                field,
                wanted,
                found: value.to_string(),
            }),
        })
        .collect()
}

/// The members of an object in the order of the text.
struct Pairs(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Pairs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(PairsVisitor)
    }
}

struct PairsVisitor;

impl<'de> Visitor<'de> for PairsVisitor {
    type Value = Pairs;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object from patterns to numbers")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Pairs, M::Error> {
        let mut pairs = Vec::new();
        while let Some(pair) = map.next_entry()? {
            pairs.push(pair);
        }
        Ok(Pairs(pairs))
    }
}

/// Longest config in bytes that is read; one with a pattern for each of a thousand modules takes about 100 kB.
pub const MAX_ADAPTER_CONFIG_BYTES: u64 = 1 << 20;

const A_NUMBER: &str = "a number";
const A_RANK: &str = "a whole number of 1 or above";

/// Fields that are read.
const READ: &[&str] = &[
    "alpha_pattern",
    "base_model_name_or_path",
    "bias",
    "exclude_modules",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "modules_to_save",
    "peft_type",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
    "use_rslora",
];

/// Fields that change nothing once the adapter is trained: notes, training, settings of initializations and of features that
/// have a switch of their own.
const INERT: &[&str] = &[
    "auto_mapping",
    "corda_config",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "runtime_config",
];

/// Fields that change what is computed, and are not implemented: refused unless null, false or empty.
const REFUSED: &[(&str, &str)] = &[
    (
        "alora_invocation_tokens",
        "the adapter would act after these tokens only",
    ),
    (
        "arrow_config",
        "several adapters would be mixed by a router",
    ),
    (
        "ensure_weight_tying",
        "tied modules would be adapted together",
    ),
    ("fan_in_fan_out", "the base's weights would be transposed"),
    ("kasa_config", "the base's weights would be changed too"),
    (
        "layer_replication",
        "the model would have more layers than the base",
    ),
    ("lora_bias", "biases would be added"),
    ("megatron_config", "the layers would be another library's"),
    (
        "monteclora_config",
        "the weights would be samples of a distribution",
    ),
    (
        "target_parameters",
        "parameters that are no modules would be adapted",
    ),
    (
        "trainable_token_indices",
        "embeddings of some tokens would be changed too",
    ),
    ("use_bdlora", "A or B would be block-diagonal"),
    ("use_dora", "the weights would be normalized (DoRA)"),
    ("use_qalora", "the inputs would be pooled in groups"),
    ("velora_config", "another variant of LoRA would compute"),
];

/// Beginnings of `init_lora_weights` with which PEFT 0.21.2 changes the base's weights, or fails, when it loads an adapter that
/// was not converted. Others (`gaussian`, `eva`, `orthogonal`, ...) leave them alone.
const INITS_THAT_CHANGE_THE_BASE: &[&str] = &["corda", "loftq", "olora", "pissa"];

#[cfg(test)]
mod tests {
    use super::*;

    /// A config with `more` fields, as JSON without the outer braces.
    fn parse(more: &str) -> Result<AdapterConfig, PeftError> {
        let comma = if more.is_empty() { "" } else { "," };
        AdapterConfig::parse(&format!(
            r#"{{"peft_type":"LORA","r":8,"lora_alpha":16{comma}{more}}}"#
        ))
    }

    fn fixture(name: &str) -> String {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata/peft");
        std::fs::read_to_string(path.join(name)).unwrap()
    }

    #[test]
    fn every_field_of_peft_is_read_inert_or_refused() {
        let mut known: Vec<&str> = READ.iter().chain(INERT).copied().collect();
        known.extend(REFUSED.iter().map(|(field, _)| *field));
        known.sort_unstable();
        let theirs: Vec<String> = serde_json::from_str(&fixture("fields.json")).unwrap();
        assert_eq!(known, theirs);
    }

    #[test]
    fn ranks_and_scales_are_those_of_peft() {
        for case in ["patterns", "rank-stabilized", "one-layer", "saved-head"] {
            let config =
                AdapterConfig::parse(&fixture(&format!("{case}/adapter/adapter_config.json")))
                    .unwrap();
            let expected: Value =
                serde_json::from_str(&fixture(&format!("{case}/expected.json"))).unwrap();
            for (module, rank) in expected["ranks"].as_object().unwrap() {
                let found = config.rank_of(module).unwrap();
                assert_eq!(Some(found as u64), rank.as_u64(), "{case}: {module}");
                let scale = expected["scales"][module].as_f64().unwrap();
                let found = f64::from(config.scale_of(module).unwrap());
                // Half a unit in the last place of f32.
                assert!((found / scale - 1.0).abs() < 6e-8, "{case}: {module}");
                assert_ne!(
                    config.selects(module).unwrap(),
                    Selected::No,
                    "{case}: {module}"
                );
            }
        }
    }

    #[test]
    fn the_first_pattern_in_the_file_counts_and_matches_from_a_dot_to_the_end() {
        let config = parse(
            r#""rank_pattern":{"z.v_proj":1,"v_proj":2,"a.v_proj":3,"[ko]_proj":4,"(?!x)up":5}"#,
        )
        .unwrap();
        for (module, rank) in [
            ("a.z.v_proj", 1),
            ("a.v_proj", 2),
            ("v_proj", 2),
            ("a.uv_proj", 8),
            ("a.v_proj.inner", 8),
            ("a.k_proj", 4),
            ("a.zxv_proj", 1), // the dot of a pattern is any character
            ("mlp.up", 5),
        ] {
            assert_eq!(config.rank_of(module).unwrap(), rank, "{module}");
        }
    }

    #[test]
    fn modules_are_selected_as_peft_selects_them() {
        use Selected::{No, Unknown, Yes};
        let block = "model.layers.3.self_attn.q_proj";
        for (more, module, wanted) in [
            (r#""target_modules":["q_proj"]"#, block, Yes),
            (r#""target_modules":["proj"]"#, block, No),
            (r#""target_modules":".*q_proj""#, block, Yes),
            (r#""target_modules":"q_proj""#, block, No),
            (r#""target_modules":"(?!.*k_).*proj""#, block, Yes),
            (r#""target_modules":"(?P=python).*""#, block, Unknown),
            (r#""target_modules":"all-linear""#, block, Unknown),
            (r#""target_modules":null"#, block, Unknown),
            (
                r#""target_modules":["q_proj"],"exclude_modules":["q_proj"]"#,
                block,
                No,
            ),
            (
                r#""target_modules":["q_proj"],"exclude_modules":".*\\.3\\..*""#,
                block,
                No,
            ),
            (
                r#""target_modules":["q_proj"],"exclude_modules":".*\\.4\\..*""#,
                block,
                Yes,
            ),
            (
                r#""target_modules":["q_proj"],"layers_to_transform":3"#,
                block,
                Yes,
            ),
            (
                r#""target_modules":["q_proj"],"layers_to_transform":[1,3]"#,
                block,
                Yes,
            ),
            (
                r#""target_modules":["q_proj"],"layers_to_transform":[0]"#,
                block,
                No,
            ),
            (
                r#""target_modules":["q_proj"],"layers_to_transform":[0]"#,
                "x.y.experts.0.b.3.q_proj",
                Yes,
            ),
            (
                r#""target_modules":["q_proj"],"layers_to_transform":[3],"layers_pattern":"layers""#,
                block,
                Yes,
            ),
            (
                r#""target_modules":["q_proj"],"layers_to_transform":[3],"layers_pattern":["h","blocks"]"#,
                block,
                No,
            ),
            (
                r#""target_modules":["model.layers.3.self_attn.q_proj"],"layers_to_transform":[0]"#,
                block,
                Yes,
            ),
        ] {
            assert_eq!(
                parse(more).unwrap().selects(module).unwrap(),
                wanted,
                "{more} {module}"
            );
        }
    }

    #[test]
    fn whatever_would_compute_something_else_is_refused_by_name() {
        for (field, value) in [
            ("use_dora", "true"),
            ("use_qalora", "true"),
            ("lora_bias", "true"),
            ("bias", "\"all\""),
            ("bias", "\"lora_only\""),
            ("fan_in_fan_out", "true"),
            ("layer_replication", "[[0,2]]"),
            ("trainable_token_indices", "[1]"),
            ("target_parameters", "[\"w\"]"),
            ("megatron_config", "{\"a\":1}"),
            ("alora_invocation_tokens", "[1]"),
            ("arrow_config", "{\"top_k\":3}"),
            ("velora_config", "{\"scale\":1.0}"),
            ("kasa_config", "{\"beta\":1}"),
            ("monteclora_config", "{\"num_samples\":8}"),
            ("use_bdlora", "{\"nblocks\":2}"),
            ("ensure_weight_tying", "true"),
            ("task_type", "\"SEQ_CLS\""),
            ("init_lora_weights", "\"pissa_niter_4\""),
            ("init_lora_weights", "\"olora\""),
            ("init_lora_weights", "\"corda\""),
            ("init_lora_weights", "\"loftq\""),
        ] {
            match parse(&format!("\"{field}\":{value}")) {
                Err(PeftError::Unsupported { field: found, .. }) => assert_eq!(found, field),
                other => panic!("{field}: {other:?}"),
            }
        }
        let other = AdapterConfig::parse(r#"{"peft_type":"IA3","r":8,"lora_alpha":16}"#);
        assert!(matches!(
            other,
            Err(PeftError::Unsupported {
                field: "peft_type",
                ..
            })
        ));
        assert!(AdapterConfig::parse(r#"{"r":8,"lora_alpha":16}"#).is_err());
    }

    #[test]
    fn unknown_fields_are_refused_unless_they_are_set_to_nothing() {
        for nothing in ["null", "false", "\"\"", "[]", "{}"] {
            assert!(
                parse(&format!("\"use_novelty\":{nothing}")).is_ok(),
                "{nothing}"
            );
        }
        for something in ["true", "0", "\"x\"", "[0]", "{\"a\":null}"] {
            match parse(&format!("\"use_novelty\":{something}")) {
                Err(PeftError::UnknownField { field, .. }) => assert_eq!(field, "use_novelty"),
                other => panic!("{something}: {other:?}"),
            }
        }
    }

    #[test]
    fn fields_of_another_kind_are_refused() {
        for more in [
            "\"use_rslora\":1",
            "\"modules_to_save\":{\"a\":1}",
            "\"modules_to_save\":[1]",
            "\"target_modules\":[\"\"]",
            "\"rank_pattern\":[]",
            "\"rank_pattern\":{\"a\":0}",
            "\"rank_pattern\":{\"a\":1.5}",
            "\"rank_pattern\":{\"a\":1,\"a\":2}",
            "\"alpha_pattern\":{\"a\":\"1\"}",
            "\"layers_to_transform\":[-1]",
            "\"layers_to_transform\":\"1\"",
            "\"layers_to_transform\":[1],\"target_modules\":\"q\"",
            "\"base_model_name_or_path\":7",
            "\"r\":8",
        ] {
            assert!(parse(more).is_err(), "{more}");
        }
        for text in [
            "",
            "[]",
            "{\"peft_type\":\"LORA\",\"lora_alpha\":16}",
            "{\"peft_type\":\"LORA\",\"r\":8}",
            "{\"peft_type\":\"LORA\",\"r\":0,\"lora_alpha\":16}",
            "{\"peft_type\":\"LORA\",\"r\":-8,\"lora_alpha\":16}",
            "{\"peft_type\":\"LORA\",\"r\":8,\"lora_alpha\":null}",
        ] {
            assert!(AdapterConfig::parse(text).is_err(), "{text}");
        }
        assert!(parse("\"rank_pattern\":null,\"alpha_pattern\":{\"a\":0.5},\"bias\":null").is_ok());
    }

    #[test]
    fn a_pattern_that_takes_too_long_is_refused() {
        let config = parse(r#""rank_pattern":{"(?:(?!x)(a|a)*)*\\1b":1}"#).unwrap();
        let long = "a".repeat(40);
        let field = "rank_pattern";
        match config.rank_of(&long) {
            Err(PeftError::Pattern { field: found, .. }) => assert_eq!(found, field),
            other => panic!("{other:?}"),
        }
        assert!(matches!(
            parse(r#""rank_pattern":{"(":2}"#),
            Err(PeftError::Pattern { .. })
        ));
    }
}
