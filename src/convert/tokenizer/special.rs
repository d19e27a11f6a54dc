//! What llama.cpp's converter finds out about special tokens and chat templates, in its order.
//!
//! Source: llama.cpp, `gguf-py/gguf/vocab.py` (`SpecialVocab`), whose steps these are. It judges a tokenizer by the form of its
//! post-processor, so that the answers may surprise; that they are the same is the point.

use panacea_formats::gguf::{Array, Metadata, Value as Stored};
use serde_json::{Map, Value};

use super::error::TokenizerError;
use super::folder::TokenizerFolder;

/// Ids of special tokens, which of them texts begin and end with, chat templates, and normalizers.
#[derive(Debug, Default)]
pub(super) struct SpecialTokens {
    /// Kinds of special tokens that are looked for.
    kinds: Vec<&'static str>,
    ids: Vec<(&'static str, u64)>,
    added: Vec<(&'static str, bool)>,
    chat_template: Option<Value>,
    normalizer: Vec<(&'static str, bool)>,
}

impl SpecialTokens {
    /// What `folder` says. Ids from `limit` on are passed over, where there is one.
    ///
    /// # Errors
    /// [`TokenizerError::NegativeId`].
    pub(super) fn find(
        folder: &TokenizerFolder,
        limit: Option<usize>,
    ) -> Result<Self, TokenizerError> {
        let mut found = Self {
            kinds: KINDS.to_vec(),
            ..Self::default()
        };
        let mut config = folder.tokenizer_config.clone();
        let tokenizer = folder.tokenizer.as_ref().map(|file| &file.content);
        if let Some(tokenizer) = tokenizer {
            found.read_normalizer(tokenizer.get("normalizer"));
            for (kind, instead) in [("bos_token", "cls_token"), ("eos_token", "sep_token")] {
                if is_empty(config.get(kind))
                    && let Some(other) = config.get(instead).filter(|it| !is_empty(Some(it)))
                {
                    config.insert(kind.to_owned(), other.clone());
                }
            }
            found.read_post_processor(tokenizer.get("post_processor"), &mut config);
        }
        if !config.is_empty() {
            let beside = folder.chat_template.as_ref();
            let template = config.get("chat_template").or(beside);
            found.chat_template = template
                .filter(|template| template.is_string() || template.is_array())
                .cloned();
            found.read_config(&config, tokenizer, limit)?;
        }
        found.read_model_config(&folder.config, limit)?;
        Ok(found)
    }

    /// Gives the token of `kind` an id, unless it has one.
    pub(super) fn set(&mut self, kind: &'static str, id: u64) {
        if !self.ids.iter().any(|(it, _)| *it == kind) {
            self.ids.push((kind, id));
        }
    }

    /// Writes the keys.
    pub(super) fn write(&self, metadata: &mut Metadata) -> Result<(), TokenizerError> {
        for &(kind, id) in &self.ids {
            if let Some((_, key)) = ID_KEYS.iter().find(|(it, _)| *it == kind) {
                let narrow =
                    u32::try_from(id).map_err(|_| TokenizerError::IdTooLarge { kind, id })?;
                metadata.set(*key, Stored::U32(narrow));
            }
        }
        for &(kind, added) in &self.added {
            if ["bos", "eos", "sep"].contains(&kind) {
                let key = format!("tokenizer.ggml.add_{kind}_token");
                metadata.set(key, Stored::Bool(added));
            }
        }
        self.write_chat_template(metadata);
        for &(name, applies) in &self.normalizer {
            metadata.set(
                format!("tokenizer.ggml.normalizer.{name}"),
                Stored::Bool(applies),
            );
        }
        Ok(())
    }

    fn write_chat_template(&self, metadata: &mut Metadata) {
        let mut default = self.chat_template.as_ref().and_then(Value::as_str);
        let mut names = Vec::new();
        for template in self
            .chat_template
            .iter()
            .filter_map(Value::as_array)
            .flatten()
        {
            let text = |name| template.get(name).and_then(Value::as_str);
            let (Some(name), Some(source)) = (text("name"), text("template")) else {
                continue;
            };
            let plain = |letter: char| {
                if letter.is_ascii_alphanumeric() {
                    letter
                } else {
                    '_'
                }
            };
            let name: String = name.chars().map(plain).collect();
            match name.as_str() {
                "" => {}
                "default" => default = Some(source),
                _ => {
                    let key = format!("tokenizer.chat_template.{name}");
                    metadata.set(key, Stored::Text(source.to_owned()));
                    if !names.contains(&name) {
                        names.push(name);
                    }
                }
            }
        }
        if !names.is_empty() {
            let names = Stored::Array(Array::Text(names));
            metadata.set("tokenizer.chat_templates", names);
        }
        if let Some(source) = default {
            metadata.set("tokenizer.chat_template", Stored::Text(source.to_owned()));
        }
    }

    fn read_normalizer(&mut self, normalizer: Option<&Value>) {
        let Some(normalizer) = normalizer else {
            return;
        };
        let kind = normalizer.get("type").and_then(Value::as_str);
        match kind {
            Some("Lowercase") => put(&mut self.normalizer, "lowercase", true),
            Some("StripAccents") => put(&mut self.normalizer, "strip_accents", true),
            Some("BertNormalizer") => {
                for name in ["lowercase", "strip_accents"] {
                    if let Some(applies) = normalizer.get(name).and_then(Value::as_bool) {
                        put(&mut self.normalizer, name, applies);
                    }
                }
            }
            Some("Sequence") => {
                for step in array(normalizer.get("normalizers")) {
                    // Nothing that is read nests twice.
                    if step.get("type").and_then(Value::as_str) != Some("Sequence") {
                        self.read_normalizer(Some(step));
                    }
                }
            }
            _ => {}
        }
        // In the order of the converter's fields, not of what it met first.
        self.normalizer.sort_unstable();
    }

    fn read_post_processor(&mut self, processor: Option<&Value>, config: &mut Map<String, Value>) {
        let Some(processor) = processor.filter(|it| it.is_object()) else {
            return;
        };
        let steps = match processor.get("processors").and_then(Value::as_array) {
            Some(steps) => steps.as_slice(),
            None => std::slice::from_ref(processor),
        };
        for step in steps {
            match step.get("type").and_then(Value::as_str) {
                Some("ByteLevel") => {
                    for kind in ["bos", "eos"] {
                        if !self.added.iter().any(|(it, _)| *it == kind) {
                            self.added.push((kind, false));
                        }
                    }
                }
                Some("RobertaProcessing") => {
                    for kind in ["bos", "eos", "sep"] {
                        put(&mut self.added, kind, true);
                    }
                }
                Some("TemplateProcessing") => self.read_template(step, config),
                _ => {}
            }
        }
    }

    /// A template of special tokens around one text or two, of which only the first and the last of the first text count, and what stands
    /// between the two.
    fn read_template(&mut self, template: &Value, config: &mut Map<String, Value>) {
        // Without a tokenizer_config.json there is nothing to compare with: what the template says is right.
        let compare = !config.is_empty();
        let mut bos = config.get("bos_token").cloned();
        let mut cls = config.get("cls_token").cloned();
        let mut eos = config.get("eos_token").cloned();
        let separator = config.get("sep_token").cloned();
        let single = array(template.get("single"));
        let (mut first, mut last) = (None, None);
        if single.len() > 1 {
            first = single.first().and_then(special_token);
            if let Some(first) = first {
                if !compare {
                    bos = Some(first.clone());
                } else if ![&bos, &cls].contains(&&Some(first.clone())) {
                    for (kind, known) in [("bos_token", &mut bos), ("cls_token", &mut cls)] {
                        if is_empty(known.as_ref()) {
                            config.insert(kind.to_owned(), first.clone());
                            *known = Some(first.clone());
                        }
                    }
                }
                let known = [&bos, &cls].contains(&&Some(first.clone()));
                put(&mut self.added, "bos", known);
            }
            last = single.last().and_then(special_token);
            if let Some(last) = last {
                if !compare {
                    eos = Some(last.clone());
                } else if eos.as_ref() != Some(last) {
                    self.move_eos(eos.take(), config);
                    config.insert("eos_token".to_owned(), last.clone());
                    eos = Some(last.clone());
                }
                put(&mut self.added, "eos", eos.as_ref() == Some(last));
            }
        }
        let pair = array(template.get("pair"));
        let begins = first.is_some() && pair.first().and_then(special_token) == first;
        let ends = last.is_some() && pair.last().and_then(special_token) == last;
        let inner = pair.get(usize::from(begins)..pair.len().saturating_sub(usize::from(ends)));
        let [a, between @ .., b] = inner.unwrap_or_default() else {
            return;
        };
        if sequence(a) != Some("A") || sequence(b) != Some("B") || between.is_empty() {
            return;
        }
        let separates = |token: &Value| {
            let token = special_token(token).cloned();
            token.is_some() && [&separator, &eos].contains(&&token)
        };
        let mut added = separates(&between[0]) && last.is_none();
        if let [_, second] = between {
            added |= separates(second);
        }
        put(&mut self.added, "sep", added);
        if added && is_empty(separator.as_ref()) && compare {
            config.insert("sep_token".to_owned(), eos.unwrap_or_default());
        }
    }

    /// What was called the end of a sequence ends a turn if the template ends with something else.
    fn move_eos(&mut self, eos: Option<Value>, config: &mut Map<String, Value>) {
        let free = ["eot", "eom"]
            .into_iter()
            .find(|kind| !self.kinds.contains(kind));
        if let Some(kind) = free {
            self.kinds.push(kind);
            config.insert(format!("{kind}_token"), eos.unwrap_or_default());
        }
    }

    fn read_config(
        &mut self,
        config: &Map<String, Value>,
        tokenizer: Option<&Map<String, Value>>,
        limit: Option<usize>,
    ) -> Result<(), TokenizerError> {
        for kind in self.kinds.clone() {
            if let Some(added) = config
                .get(&format!("add_{kind}_token"))
                .and_then(Value::as_bool)
                && !self.added.iter().any(|(it, _)| *it == kind)
            {
                self.added.push((kind, added));
            }
            let Some(text) = config.get(&format!("{kind}_token")).and_then(content) else {
                continue;
            };
            let tokens = array(tokenizer.and_then(|tokenizer| tokenizer.get("added_tokens")));
            let token = tokens
                .iter()
                .find(|token| token.get("content").and_then(Value::as_str) == Some(text));
            self.set_from(kind, token.and_then(|token| token.get("id")), limit)?;
        }
        Ok(())
    }

    fn read_model_config(
        &mut self,
        config: &Map<String, Value>,
        limit: Option<usize>,
    ) -> Result<(), TokenizerError> {
        for kind in self.kinds.clone() {
            let key = format!("{kind}_token_id");
            let inner = || config.get("text_config")?.get(&key);
            let id = config.get(&key).filter(|id| !id.is_null()).or_else(inner);
            self.set_from(kind, id, limit)?;
        }
        Ok(())
    }

    fn set_from(
        &mut self,
        kind: &'static str,
        id: Option<&Value>,
        limit: Option<usize>,
    ) -> Result<(), TokenizerError> {
        if let Some(id) = id.and_then(Value::as_i64).filter(|id| *id < 0) {
            return Err(TokenizerError::NegativeId { kind, id });
        }
        if let Some(id) = id.and_then(Value::as_u64)
            && limit.is_none_or(|limit| id < limit as u64)
        {
            self.set(kind, id);
        }
        Ok(())
    }
}

/// The text of a special token, which stands there as a string or as an object with its `content`.
pub(super) fn content(token: &Value) -> Option<&str> {
    token.as_str().or_else(|| token.get("content")?.as_str())
}

/// What Python takes for false.
fn is_empty(value: Option<&Value>) -> bool {
    match value {
        None | Some(Value::Null | Value::Bool(false)) => true,
        Some(Value::String(text)) => text.is_empty(),
        Some(_) => false,
    }
}

fn array(value: Option<&Value>) -> &[Value] {
    value.and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

fn special_token(part: &Value) -> Option<&Value> {
    let id = part.get("SpecialToken")?.get("id")?;
    Some(id).filter(|id| !is_empty(Some(id)))
}

fn sequence(part: &Value) -> Option<&str> {
    part.get("Sequence")?.get("id")?.as_str()
}

fn put<T>(list: &mut Vec<(&'static str, T)>, name: &'static str, value: T) {
    match list.iter_mut().find(|(it, _)| *it == name) {
        Some((_, old)) => *old = value,
        None => list.push((name, value)),
    }
}

const KINDS: [&str; 7] = ["bos", "eos", "unk", "sep", "pad", "cls", "mask"];

/// The keys of those kinds that have one.
const ID_KEYS: [(&str, &str); 8] = [
    ("bos", "tokenizer.ggml.bos_token_id"),
    ("eos", "tokenizer.ggml.eos_token_id"),
    ("unk", "tokenizer.ggml.unknown_token_id"),
    ("sep", "tokenizer.ggml.seperator_token_id"),
    ("pad", "tokenizer.ggml.padding_token_id"),
    ("mask", "tokenizer.ggml.mask_token_id"),
    ("eot", "tokenizer.ggml.eot_token_id"),
    ("eom", "tokenizer.ggml.eom_token_id"),
];
