//! What a GGUF file says of its model besides how to compute it: its name, size, license, and how its makers sample from it.
//!
//! In: the texts of `generation_config.json` and `README.md`, the name of the model's directory, and the tensors' sizes. Out: keys that
//! begin with `general.`, as gguf-py makes them. Of the YAML in front of a `README.md`, texts and lists of texts at the top level are
//! read, and what is written in another way is passed over: none of it changes what is computed.
//!
//! Source: `Metadata` of llama.cpp's gguf-py, `metadata.py` and `utility.py`.

use std::sync::LazyLock;

use panacea_formats::gguf::{Array, Metadata, Value};
use regex::Regex;
use serde_json::{Map, Value as Json};

/// Where general metadata comes from.
#[derive(Clone, Copy, Debug, Default)]
pub struct Origins<'a> {
    /// The name of the model's directory.
    pub directory: &'a str,
    /// `_name_or_path` of its config.
    pub name_or_path: Option<&'a str>,
    /// The text of its `README.md`.
    pub card: Option<&'a str>,
    /// The text of its `generation_config.json`.
    pub generation: Option<&'a str>,
}

/// How many numbers a model consists of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Size {
    /// All.
    pub total: usize,
    /// Those that are no expert's.
    pub shared: usize,
    /// Those of one expert.
    pub expert: usize,
    /// How many experts there are in a block; 0 without.
    pub experts: usize,
}

impl Size {
    /// Counts the numbers of tensors, which are GGUF's names with shapes, outermost dimension first.
    pub fn of<'t>(tensors: impl Iterator<Item = (&'t str, &'t [usize])>) -> Self {
        let mut size = Self::default();
        let (mut counted, mut stacks) = (0, 0);
        for (name, shape) in tensors {
            let elements: usize = shape.iter().product();
            size.total += elements;
            match shape {
                &[.., experts, _, _] if name.contains("_exps.") && experts > 0 => {
                    size.expert += elements / experts;
                    counted += experts;
                    stacks += 1;
                }
                _ => size.shared += elements,
            }
        }
        size.experts = counted.checked_div(stacks).unwrap_or(0);
        size
    }

    /// `135M`, or `8x7B`.
    fn label(self) -> String {
        match self.experts {
            0 => rounded(self.total),
            experts => format!("{experts}x{}", rounded(self.shared + self.expert)),
        }
    }
}

/// The keys, in order.
pub fn general(origins: Origins<'_>, size: Size) -> Metadata {
    let mut all = Metadata::default();
    let generation: Option<Map<String, Json>> = origins
        .generation
        .and_then(|text| serde_json::from_str(text).ok());
    sampling(generation.as_ref(), &mut all);
    let card = origins.card.map(card_of).unwrap_or_default();
    let mut texts = Texts::default();
    for (slot, key) in CARD_TEXTS {
        texts.set(*slot, card_text(&card, key));
    }
    let ids = [
        origins
            .name_or_path
            .filter(|path| path.matches('/').count() <= 1),
        Some(origins.directory).filter(|name| !name.is_empty()),
    ];
    for id in ids.into_iter().flatten() {
        let parts = IdParts::of(id, size.total);
        texts.set(Slot::Name, parts.name.as_deref().map(title));
        texts.set(Slot::Organization, parts.organization.as_deref().map(title));
        texts.set(Slot::Basename, parts.basename);
        texts.set(Slot::Finetune, parts.finetune);
        texts.set(Slot::Version, parts.version);
        texts.set(Slot::SizeLabel, parts.size_label);
    }
    texts.set(Slot::Name, Some(origins.directory.to_owned()));
    if size.total > 0 {
        texts.set(Slot::SizeLabel, Some(size.label()));
    }
    for (slot, key) in KEYS {
        if let Some(text) = texts.0[*slot as usize].take() {
            all.set(*key, Value::Text(text));
        }
    }
    sources(
        "base_model",
        &["base_model", "base_models", "base_model_sources"],
        &card,
        size,
        &mut all,
    );
    sources(
        "dataset",
        &["datasets", "dataset", "dataset_sources"],
        &card,
        size,
        &mut all,
    );
    for (key, fields) in [
        ("general.tags", ["tags", "pipeline_tag"]),
        ("general.languages", ["languages", "language"]),
    ] {
        let found: Vec<&Vec<String>> = fields
            .iter()
            .filter_map(|it| card_list(&card, it))
            .collect();
        if !found.is_empty() {
            let texts = found.into_iter().flatten().cloned().collect();
            all.set(key, Value::Array(Array::Text(texts)));
        }
    }
    all
}

/// How the makers of a model sample from it.
fn sampling(generation: Option<&Map<String, Json>>, all: &mut Metadata) {
    let Some(generation) = generation else {
        return;
    };
    for (field, key) in [
        ("top_k", "top_k"),
        ("top_p", "top_p"),
        ("min_p", "min_p"),
        ("temperature", "temp"),
        ("repetition_penalty", "penalty_repeat"),
    ] {
        let value = generation.get(field);
        let value = match field {
            "top_k" => value
                .and_then(Json::as_i64)
                .and_then(|number| i32::try_from(number).ok())
                .map(Value::I32),
            #[expect(clippy::cast_possible_truncation, reason = "the key's type is f32")]
            _ => value
                .and_then(Json::as_f64)
                .map(|number| Value::F32(number as f32)),
        };
        if let Some(value) = value {
            all.set(format!("general.sampling.{key}"), value);
        }
    }
}

/// Models or data sets that this one was made of.
fn sources(kind: &str, fields: &[&str], card: &Card, size: Size, all: &mut Metadata) {
    let Some(ids) = fields.iter().find_map(|field| card_list(card, field)) else {
        return;
    };
    let count = u32::try_from(ids.len()).unwrap_or(u32::MAX);
    all.set(format!("general.{kind}.count"), Value::U32(count));
    for (i, id) in ids.iter().enumerate() {
        let mut set = |name: &str, text: Option<String>| {
            if let Some(text) = text {
                all.set(format!("general.{kind}.{i}.{name}"), Value::Text(text));
            }
        };
        let is_url = ["http://", "https://", "ssh://"]
            .iter()
            .any(|it| id.starts_with(it));
        let hub = ["https://huggingface.co/", "http://huggingface.co/"];
        let named = match is_url {
            false => Some(id.as_str()),
            true => hub
                .iter()
                .find_map(|hub| id.strip_prefix(hub))
                .filter(|rest| rest.split('/').filter(|part| !part.is_empty()).count() == 2)
                .filter(|rest| rest.matches('/').count() == 1),
        };
        let parts = named
            .map(|id| IdParts::of(id, size.total))
            .unwrap_or_default();
        set("name", parts.name.as_deref().map(title));
        set("version", parts.version);
        set("organization", parts.organization.as_deref().map(title));
        set(
            "repo_url",
            match (is_url, &parts.organization, &parts.name) {
                (true, ..) => Some(id.clone()),
                (false, Some(organization), Some(name)) => {
                    Some(format!("https://huggingface.co/{organization}/{name}"))
                }
                _ => None,
            },
        );
    }
}

/// The texts that are set once: the first origin that has one counts.
#[derive(Default)]
struct Texts([Option<String>; 16]);

impl Texts {
    fn set(&mut self, slot: Slot, text: Option<String>) {
        let held = &mut self.0[slot as usize];
        if held.is_none() {
            *held = text;
        }
    }
}

#[derive(Clone, Copy)]
enum Slot {
    Name,
    Author,
    Version,
    Organization,
    Finetune,
    Basename,
    Description,
    SizeLabel,
    License,
    LicenseName,
    LicenseLink,
    SourceUrl,
    SourceDoi,
    SourceUuid,
    SourceRepoUrl,
}

/// What a model card calls them, in the order of precedence.
const CARD_TEXTS: &[(Slot, &str)] = &[
    (Slot::Name, "name"),
    (Slot::Author, "author"),
    (Slot::Version, "version"),
    (Slot::Organization, "organization"),
    (Slot::Description, "description"),
    (Slot::Finetune, "finetune"),
    (Slot::Basename, "basename"),
    (Slot::SizeLabel, "size_label"),
    (Slot::SourceUrl, "url"),
    (Slot::SourceDoi, "doi"),
    (Slot::SourceUuid, "uuid"),
    (Slot::SourceRepoUrl, "repo_url"),
    (Slot::Name, "model_name"),
    (Slot::Author, "model_author"),
    (Slot::Version, "model_version"),
    (Slot::Organization, "model_organization"),
    (Slot::Description, "model_description"),
    (Slot::Finetune, "model_finetune"),
    (Slot::Basename, "model_basename"),
    (Slot::SizeLabel, "model_size_label"),
    (Slot::Author, "model_creator"),
    (Slot::Basename, "model_type"),
    (Slot::License, "license"),
    (Slot::LicenseName, "license_name"),
    (Slot::LicenseLink, "license_link"),
];

/// The keys, in the order of the file.
const KEYS: &[(Slot, &str)] = &[
    (Slot::Name, "general.name"),
    (Slot::Author, "general.author"),
    (Slot::Version, "general.version"),
    (Slot::Organization, "general.organization"),
    (Slot::Finetune, "general.finetune"),
    (Slot::Basename, "general.basename"),
    (Slot::Description, "general.description"),
    (Slot::SizeLabel, "general.size_label"),
    (Slot::License, "general.license"),
    (Slot::LicenseName, "general.license.name"),
    (Slot::LicenseLink, "general.license.link"),
    (Slot::SourceUrl, "general.source.url"),
    (Slot::SourceDoi, "general.source.doi"),
    (Slot::SourceUuid, "general.source.uuid"),
    (Slot::SourceRepoUrl, "general.source.repo_url"),
];

/// What the name of a model tells.
#[derive(Debug, Default, PartialEq, Eq)]
struct IdParts {
    name: Option<String>,
    organization: Option<String>,
    basename: Option<String>,
    finetune: Option<String>,
    version: Option<String>,
    size_label: Option<String>,
}

/// What a part of a name may be.
#[derive(Clone, Copy, Default)]
struct Kinds {
    basename: bool,
    size_label: bool,
    finetune: bool,
    version: bool,
    other: bool,
}

impl Kinds {
    fn count(self) -> usize {
        let kinds = [
            self.basename,
            self.size_label,
            self.finetune,
            self.version,
            self.other,
        ];
        kinds.into_iter().filter(|&it| it).count()
    }
}

impl IdParts {
    /// `Metadata.get_model_id_components`: `parameters` is how large the model is.
    fn of(id: &str, parameters: usize) -> Self {
        if id.contains(' ') {
            // A sentence.
            return Self {
                name: Some(id.to_owned()),
                ..Self::default()
            };
        }
        let (organization, name) = match id.split_once('/') {
            Some((organization, name)) => (Some(organization), name),
            None => (None, id),
        };
        let organization = organization.filter(|it| !it.starts_with('.'));
        let mut parts: Vec<(String, Kinds)> = name
            .split('-')
            .filter(|part| !part.is_empty())
            .map(|part| (part.to_owned(), Kinds::default()))
            .collect();
        for (i, (part, kinds)) in parts.iter_mut().enumerate() {
            annotate(i, part, kinds, parameters);
        }
        let is_size = |kinds: &Kinds| kinds.size_label;
        let has_digit = |part: &str| part.chars().any(|c| c.is_numeric());
        if parts
            .iter()
            .any(|(part, kinds)| is_size(kinds) && has_digit(part))
        {
            for (part, kinds) in &mut parts {
                kinds.size_label &= !part.chars().all(char::is_alphabetic);
            }
        }
        let mut at_start = true;
        for (part, kinds) in &mut parts {
            let starts = part.chars().next().is_some_and(char::is_alphabetic);
            if at_start && (kinds.count() == 0 && starts || kinds.version) {
                kinds.basename = true;
            } else {
                at_start = false;
                kinds.finetune |= kinds.count() == 0;
            }
        }
        for (_, kinds) in parts.iter_mut().rev() {
            match kinds.basename && kinds.count() > 1 {
                true => kinds.basename = false,
                false => break,
            }
        }
        let joined = |wanted: &dyn Fn(&Kinds) -> bool| {
            let of: Vec<&str> = parts
                .iter()
                .filter(|(_, kinds)| wanted(kinds))
                .map(|(part, _)| part.as_str())
                .collect();
            of
        };
        let text = |of: Vec<&str>| (!of.is_empty()).then(|| of.join("-"));
        let mut sizes = Vec::new();
        for size in joined(&is_size) {
            if !sizes.contains(&size) {
                sizes.push(size);
            }
        }
        let found = Self {
            name: Some(name.to_owned()),
            organization: organization.map(str::to_owned),
            basename: text(joined(&|kinds| kinds.basename)),
            size_label: text(sizes),
            finetune: text(joined(&|kinds| kinds.finetune)),
            version: text(joined(&|kinds| kinds.version && !kinds.basename)),
        };
        let is_vague =
            found.size_label.is_none() && found.finetune.is_none() && found.version.is_none();
        Self {
            basename: found.basename.clone().filter(|_| !is_vague),
            ..found
        }
    }
}

/// Says what one part of a name is, and spells it as it is to be read.
fn annotate(i: usize, part: &mut String, kinds: &mut Kinds, parameters: usize) {
    if VERSION.is_match(part) {
        kinds.version = true;
    } else if QUANTIZATION.is_match(part) {
        kinds.other = true;
        *part = part.to_uppercase();
    } else if i > 0 && SIZE.is_match(part) {
        let mut text = part.replace('_', ".");
        let bytes = text.as_bytes();
        // As in `bloom-7b1`.
        if let &[.., unit, digit] = bytes
            && digit.is_ascii_digit()
        {
            let rest = &text[..text.len() - 2];
            text = format!("{rest}.{}{}", char::from(digit), char::from(unit));
        }
        if let &[.., digit, unit] = text.as_bytes()
            && digit.is_ascii_digit()
            && b"kmbt".contains(&unit)
        {
            text = format!(
                "{}{}",
                &text[..text.len() - 1],
                char::from(unit.to_ascii_uppercase())
            );
        }
        if parameters != 0
            && let Some(claimed) = claimed_parameters(&text)
        {
            #[expect(clippy::cast_precision_loss, reason = "compared with a rounded number")]
            let (total, most) = (parameters as f64, (7 * parameters / 8) as f64);
            if (claimed - total).abs() > most {
                // More likely the length of a context.
                kinds.finetune = true;
                let (number, unit) = text.split_at(text.len() - 1);
                text = format!("{number}{}", unit.to_lowercase());
            }
        }
        kinds.size_label = kinds.count() == 0;
        *part = text;
    } else if i > 0 && FINETUNE.is_match(part) {
        kinds.finetune = true;
    }
}

/// `7B` as a number.
fn claimed_parameters(text: &str) -> Option<f64> {
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let number: f64 = number.parse().ok()?;
    // A unit that is none of these is found nowhere, which is -1 in Python.
    let power = " KMBT"
        .find(unit)
        .map_or(-1, |at| i32::try_from(at).unwrap_or(0));
    Some(number * 1000_f64.powi(power))
}

fn pattern(pattern: &str) -> Regex {
    Regex::new(&format!("(?i)^(?:{pattern})$")).expect("a constant pattern that compiles")
}

static VERSION: LazyLock<Regex> = LazyLock::new(|| pattern(r"(v|iter)?\d+([.]\d+)*"));
static QUANTIZATION: LazyLock<Regex> = LazyLock::new(|| pattern(r"i?q\d(_\w)*|b?fp?(16|32)"));
static SIZE: LazyLock<Regex> = LazyLock::new(|| {
    pattern(r"(([A]|\d+[x])?\d+([._]\d+)?[KMBT][\d]?|small|mini|medium|large|x?xl)")
});
static FINETUNE: LazyLock<Regex> = LazyLock::new(|| pattern("chat|instruct|vision|lora"));

/// Words in the form of a title, but for those that are acronyms or versions.
fn title(text: &str) -> String {
    let words = text.trim().replace('-', " ");
    let words: Vec<String> = words
        .split_whitespace()
        .map(|word| {
            let is_lower =
                word.chars().any(char::is_lowercase) && !word.chars().any(char::is_uppercase);
            let starts_as_number = word.starts_with(|c: char| c.is_ascii_digit());
            match is_lower && !starts_as_number && !TITLE_VERSION.is_match(word) {
                true => capitalized(word),
                false => word.to_owned(),
            }
        })
        .collect();
    words.join(" ")
}

static TITLE_VERSION: LazyLock<Regex> = LazyLock::new(|| pattern(r"v\d+(?:\.\d+)*"));

/// Each letter that follows none, in upper case.
fn capitalized(word: &str) -> String {
    let mut inside = false;
    let mut out = String::with_capacity(word.len());
    for c in word.chars() {
        match c.is_alphabetic() && !inside {
            true => out.extend(c.to_uppercase()),
            false => out.push(c),
        }
        inside = c.is_alphabetic();
    }
    out
}

/// A number of parameters in two digits at least.
#[expect(clippy::cast_precision_loss, reason = "it is rounded to two digits")]
fn rounded(parameters: usize) -> String {
    let parameters = parameters as f64;
    let (scaled, unit) = match parameters {
        it if it > 1e12 => (it * 1e-12, "T"),
        it if it > 1e9 => (it * 1e-9, "B"),
        it if it > 1e6 => (it * 1e-6, "M"),
        it => (it * 1e-3, "K"),
    };
    let digits = format!("{}", scaled.round_ties_even());
    let places = 2_usize.saturating_sub(digits.trim_start_matches('0').len());
    format!("{scaled:.places$}{unit}")
}

/// The top level of a model card's YAML.
type Card = Vec<(String, CardValue)>;

/// What is read of it.
#[derive(Debug, PartialEq, Eq)]
enum CardValue {
    Text(String),
    List(Vec<String>),
}

fn card_text(card: &Card, key: &str) -> Option<String> {
    let (_, value) = card.iter().find(|(it, _)| it == key)?;
    match value {
        CardValue::Text(text) => Some(text.clone()),
        CardValue::List(texts) => Some(texts.join(",")).filter(|_| key == "license"),
    }
}

fn card_list<'c>(card: &'c Card, key: &str) -> Option<&'c Vec<String>> {
    let (_, value) = card.iter().find(|(it, _)| it == key)?;
    match value {
        CardValue::List(texts) => Some(texts),
        CardValue::Text(_) => None,
    }
}

/// Reads the YAML between the first two lines of dashes.
fn card_of(text: &str) -> Card {
    let mut lines = text.lines();
    if lines.next() != Some("---") {
        return Card::new();
    }
    let mut card = Card::new();
    let lines: Vec<&str> = lines.take_while(|line| *line != "---").collect();
    let mut rest = lines.as_slice();
    while let Some((line, later)) = rest.split_first() {
        rest = later;
        let Some((key, value)) = line.split_once(':') else {
            continue;
        };
        if key.is_empty() || key.starts_with([' ', '-', '#', '"', '\'']) {
            continue;
        }
        let value = value.trim();
        if value.is_empty() {
            let items = rest.iter().take_while(|line| {
                let line = line.trim_start();
                line.starts_with("- ") || line.is_empty()
            });
            let items: Vec<&str> = items.copied().collect();
            rest = &rest[items.len()..];
            let texts: Option<Vec<String>> = items
                .iter()
                .filter_map(|line| line.trim_start().strip_prefix("- "))
                .map(scalar)
                .collect();
            // A list of mappings, or no list, is left alone.
            if let Some(texts) = texts.filter(|texts| !texts.is_empty()) {
                card.push((key.to_owned(), CardValue::List(texts)));
            }
        } else if let Some(items) = value.strip_prefix('[').and_then(|it| it.strip_suffix(']')) {
            let texts: Option<Vec<String>> = items.split(',').map(scalar).collect();
            if let Some(texts) = texts {
                card.push((key.to_owned(), CardValue::List(texts)));
            }
        } else if let Some(text) = scalar(value) {
            card.push((key.to_owned(), CardValue::Text(text)));
        }
    }
    listed(card)
}

/// Fields of which a single text is a list of one.
fn listed(card: Card) -> Card {
    const LISTS: [&str; 10] = [
        "tags",
        "pipeline_tag",
        "languages",
        "language",
        "base_model",
        "base_models",
        "base_model_sources",
        "datasets",
        "dataset",
        "dataset_sources",
    ];
    let into_list = |(key, value): (String, CardValue)| match value {
        CardValue::Text(text) if LISTS.contains(&key.as_str()) => {
            (key, CardValue::List(vec![text]))
        }
        value => (key, value),
    };
    card.into_iter().map(into_list).collect()
}

/// A text of YAML; nothing for a number, a truth value, or what is no scalar.
fn scalar(text: &str) -> Option<String> {
    let text = text.trim();
    for quote in ['"', '\''] {
        if let Some(rest) = text.strip_prefix(quote) {
            let inner = rest.strip_suffix(quote)?;
            return (!inner.contains([quote, '\\'])).then(|| inner.to_owned());
        }
    }
    let text = text.split(" #").next().unwrap_or(text).trim_end();
    let is_plain = !text.is_empty()
        && !text.starts_with(['{', '[', '&', '*', '!', '|', '>', '%', '@', '`', '#'])
        && !text.contains(": ")
        && !text.ends_with(':');
    let is_text = text.parse::<f64>().is_err()
        && !matches!(
            text.to_ascii_lowercase().as_str(),
            "true" | "false" | "yes" | "on" | "off" | "null" | "~"
        );
    (is_plain && is_text).then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(metadata: &Metadata) -> Vec<String> {
        let line = |(key, value): (&str, &Value)| match value {
            Value::Text(text) => format!("{key} {text}"),
            Value::U32(number) => format!("{key} {number}"),
            Value::I32(number) => format!("{key} {number}"),
            Value::F32(number) => format!("{key} {number}"),
            Value::Array(Array::Text(texts)) => format!("{key} {texts:?}"),
            other => panic!("{key} {other:?}"),
        };
        metadata.iter().map(line).collect()
    }

    #[test]
    fn a_directorys_name_and_the_size_are_what_there_always_is() {
        let size = Size {
            total: 134_515_008,
            shared: 134_515_008,
            ..Size::default()
        };
        let origins = Origins {
            directory: "hf",
            ..Origins::default()
        };
        assert_eq!(
            shown(&general(origins, size)),
            ["general.name Hf", "general.size_label 135M"]
        );
    }

    #[test]
    fn names_are_taken_apart_as_gguf_py_does() {
        // Found by running `Metadata.get_model_id_components` of gguf-py.
        let parts = |id: &str, total| {
            let it = IdParts::of(id, total);
            [
                it.organization,
                it.basename,
                it.finetune,
                it.version,
                it.size_label,
            ]
            .map(Option::unwrap_or_default)
        };
        for (id, total, wanted) in NAMES {
            assert_eq!(parts(id, *total), *wanted, "{id}");
        }
    }

    #[test]
    fn the_cards_of_models_are_read_as_far_as_they_are_simple() {
        let card = "---\nlicense: apache-2.0\nlanguage:\n- en\n- no\ntags: [chat, \"x\"]\npipeline_tag: text-generation\n\
            base_model: Qwen/Qwen2.5-7B # the base\nmodel-index:\n- name: x\n  results: []\nversion: 1.0\ndatasets:\n  - a/b-c\n---\nlicense: mit\n";
        let origins = Origins {
            directory: "My-Model-7B-Instruct-v0.2",
            card: Some(card),
            generation: Some(
                r#"{"temperature": 0.5, "top_k": 20, "top_p": null, "repetition_penalty": 1.25}"#,
            ),
            ..Origins::default()
        };
        let size = Size {
            total: 7_600_000_000,
            ..Size::default()
        };
        assert_eq!(
            shown(&general(origins, size)),
            [
                "general.sampling.top_k 20",
                "general.sampling.temp 0.5",
                "general.sampling.penalty_repeat 1.25",
                "general.name My Model 7B Instruct v0.2",
                "general.version v0.2",
                "general.finetune Instruct",
                "general.basename My-Model",
                "general.size_label 7B",
                "general.license apache-2.0",
                "general.base_model.count 1",
                "general.base_model.0.name Qwen2.5 7B",
                "general.base_model.0.organization Qwen",
                "general.base_model.0.repo_url https://huggingface.co/Qwen/Qwen2.5-7B",
                "general.dataset.count 1",
                "general.dataset.0.name B C",
                "general.dataset.0.organization A",
                "general.dataset.0.repo_url https://huggingface.co/a/b-c",
                "general.tags [\"chat\", \"x\", \"text-generation\"]",
                "general.languages [\"en\", \"no\"]",
            ]
        );
        for text in [
            "",
            "# title",
            "---",
            "---\n---",
            "---\n: x\n-\n- \nkey:\n---",
        ] {
            let _ = card_of(text);
        }
    }

    #[test]
    fn sizes_have_two_digits() {
        for (parameters, wanted) in [
            (134_515_008, "135M"),
            (7_241_732_096, "7.2B"),
            (46_702_792_704, "47B"),
            (9_000_000, "9.0M"),
            (999, "1.0K"),
            (120, "0.12K"),
        ] {
            assert_eq!(rounded(parameters), wanted);
        }
        let experts: [(&str, &[usize]); 2] = [
            ("blk.0.ffn_up_exps.weight", &[8, 10, 100]),
            ("output.weight", &[50, 100]),
        ];
        let size = Size::of(experts.into_iter());
        assert_eq!(
            (size.total, size.experts, size.label()),
            (13_000, 8, "8x6.0K".to_owned())
        );
    }

    /// Organization, base, fine-tune, version and size of names, given how many parameters there are.
    const NAMES: &[(&str, usize, [&str; 5])] = &[
        ("hf", 135000000, ["", "", "", "", ""]),
        (
            "Mistral-7B-Instruct-v0.2",
            7240000000,
            ["", "Mistral", "Instruct", "v0.2", "7B"],
        ),
        (
            "meta-llama/Llama-3.2-1B-Instruct",
            1200000000,
            ["meta-llama", "Llama-3.2", "Instruct", "", "1B"],
        ),
        (
            "Phi-3-mini-128k-instruct",
            3800000000,
            ["", "Phi-3", "128k-instruct", "", "mini"],
        ),
        (
            "SmolLM2-135M-Instruct-panacea",
            134515008,
            ["", "SmolLM2", "Instruct-panacea", "", "135M"],
        ),
        (
            "Mixtral-8x7B-v0.1",
            46700000000,
            ["", "Mixtral", "", "v0.1", "8x7B"],
        ),
        ("bloom-7b1", 7100000000, ["", "bloom", "", "", "7.1B"]),
        ("gemma-2-9b-it", 9200000000, ["", "gemma-2", "it", "", "9B"]),
        (
            "Qwen3-30B-A3B",
            30500000000,
            ["", "Qwen3", "", "", "30B-A3B"],
        ),
        ("a b-c", 1, ["", "", "", "", ""]),
        ("./x-1", 0, ["", "x", "", "1", ""]),
        (
            "llama-3-q4_k_m-GGUF",
            8000000000,
            ["", "llama-3", "GGUF", "", ""],
        ),
        ("v2-small-Chat", 1000000, ["", "v2", "Chat", "", "small"]),
        ("x--y_2.5B", 0, ["", "", "", "", ""]),
        ("12-alpha", 5, ["", "", "", "", ""]),
        (
            "model-large-7B",
            7000000000,
            ["", "model-large", "", "", "7B"],
        ),
    ];
}
