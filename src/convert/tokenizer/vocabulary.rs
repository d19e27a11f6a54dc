//! The tokenizer that a GGUF's metadata describes, checked.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};

use panacea_formats::gguf::{Array, Metadata, Value};

use super::error::TokenizerError;
use super::pre::{self, Pre};

/// Tokens in the order of their ids, and how text becomes them.
#[derive(Debug)]
pub(super) struct Vocabulary<'a> {
    pub(super) tokens: Vec<Token<'a>>,
    pub(super) scheme: Scheme<'a>,
    pub(super) special: Special,
    /// Whether texts begin with the beginning-of-sequence token.
    pub(super) adds_bos: bool,
    /// Whether texts end with the end-of-sequence token.
    pub(super) adds_eos: bool,
}

/// A token's text and part.
#[derive(Debug)]
pub(super) struct Token<'a> {
    pub(super) text: Cow<'a, str>,
    pub(super) role: Role,
    /// Whether white space behind it in a text goes with it.
    pub(super) swallows_space: bool,
}

/// What a token is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// Made from text by merges, or a single byte.
    Ordinary,
    /// Not meant to be used, though merges may make it: most are there to fill up the model's embedding.
    Unused,
    /// Found in texts as it stands, before anything else; nothing to say.
    Control,
    /// Found in texts likewise; a text like others.
    UserDefined,
}

impl Role {
    /// Whether the token is found in texts as it stands, before anything else.
    pub(super) fn is_found(self) -> bool {
        matches!(self, Self::Control | Self::UserDefined)
    }
}

/// How text becomes tokens.
#[derive(Debug)]
pub(super) enum Scheme<'a> {
    /// Pieces that `pre` cuts, as bytes that are spelled as letters; `merges` in the order in which they are made.
    Bytes {
        pre: &'static Pre,
        merges: Vec<(&'a str, &'a str)>,
    },
    /// Characters, a space as U+2581; two neighbors that are a token together are merged, the highest of `scores` first.
    Pieces {
        scores: Vec<f32>,
        /// Whether a space is put before a text.
        space_prefix: bool,
    },
}

/// Ids of special tokens.
#[derive(Debug, Default)]
pub(super) struct Special {
    pub(super) bos: Option<u32>,
    pub(super) eos: Option<u32>,
    pub(super) unknown: Option<u32>,
    pub(super) separator: Option<u32>,
    pub(super) padding: Option<u32>,
    pub(super) mask: Option<u32>,
}

impl<'a> Vocabulary<'a> {
    /// Reads the keys `tokenizer.ggml.*`.
    ///
    /// # Errors
    /// [`TokenizerError`] for the first thing that is missing, of a wrong type, or contradicts another.
    pub(super) fn read(metadata: &'a Metadata) -> Result<Self, TokenizerError> {
        let model = text(metadata, MODEL)?.ok_or(TokenizerError::Missing { key: MODEL })?;
        let texts = texts(metadata, TOKENS)?.ok_or(TokenizerError::Missing { key: TOKENS })?;
        if u32::try_from(texts.len()).is_err() {
            return Err(TokenizerError::TooManyTokens {
                tokens: texts.len(),
            });
        }
        let texts: Vec<Cow<'_, str>> = texts.iter().enumerate().map(name_empty).collect();
        let ids = ids(&texts)?;
        let scheme = match model {
            "gpt2" => Scheme::Bytes {
                pre: Pre::named(text(metadata, PRE)?.unwrap_or(pre::DEFAULT))?,
                merges: merges(metadata, &ids)?,
            },
            "llama" => Scheme::Pieces {
                scores: scores(metadata, texts.len())?,
                space_prefix: truth(metadata, ADD_SPACE_PREFIX)?.unwrap_or(true),
            },
            other => {
                return Err(TokenizerError::UnknownModel {
                    found: other.to_owned(),
                });
            }
        };
        let roles = roles(metadata, &texts)?;
        let (adds_bos, defaults) = match &scheme {
            Scheme::Bytes { pre, .. } => (pre.adds_bos, Special::default()),
            Scheme::Pieces { .. } => (true, Special::of_pieces(texts.len())),
        };
        let special = Special::read(metadata, texts.len(), defaults)?;
        let phi3 = text(metadata, NAME)?.is_some_and(is_phi3);
        let token = |(text, role): (Cow<'a, str>, Role)| Token {
            swallows_space: phi3 && role.is_found() && !PHI3_KEEPS.contains(&text.as_ref()),
            text,
            role,
        };
        let tokens = texts.into_iter().zip(roles).map(token).collect();
        Ok(Self {
            tokens,
            scheme,
            special,
            adds_bos: truth(metadata, ADD_BOS)?.unwrap_or(adds_bos),
            adds_eos: truth(metadata, ADD_EOS)?.unwrap_or(false),
        })
    }

    /// The text of a token.
    pub(super) fn text(&self, id: u32) -> Option<&str> {
        Some(self.tokens.get(id as usize)?.text.as_ref())
    }
}

impl Special {
    /// What SentencePiece's own programs take for granted.
    fn of_pieces(tokens: usize) -> Self {
        let known = |id: u32| Some(id).filter(|&id| (id as usize) < tokens);
        Self {
            unknown: known(0),
            bos: known(1),
            eos: known(2),
            ..Self::default()
        }
    }

    fn read(metadata: &Metadata, tokens: usize, defaults: Self) -> Result<Self, TokenizerError> {
        let id = |name: &str, default| {
            let key = format!("tokenizer.ggml.{name}_token_id");
            let Some(value) = metadata.value(&key) else {
                return Ok(default);
            };
            let id = value.as_u64().ok_or(TokenizerError::WrongType {
                key: key.clone(),
                expected: "a whole number that is not negative",
            })?;
            match u32::try_from(id) {
                Ok(narrow) if (narrow as usize) < tokens => Ok(Some(narrow)),
                _ => Err(TokenizerError::IdOutOfRange { key, id, tokens }),
            }
        };
        Ok(Self {
            bos: id("bos", defaults.bos)?,
            eos: id("eos", defaults.eos)?,
            unknown: id("unknown", defaults.unknown)?,
            // So llama.cpp spells it.
            separator: id("seperator", defaults.separator)?,
            padding: id("padding", defaults.padding)?,
            mask: id("mask", defaults.mask)?,
        })
    }
}

/// llama.cpp's way to know models of which control tokens swallow the white space behind them.
fn is_phi3(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    name.contains("phi-3") || name.contains("phi3")
}

/// A token without a text gets the one that llama.cpp gives it: nothing could be told from nothing.
fn name_empty((id, text): (usize, &String)) -> Cow<'_, str> {
    if text.is_empty() {
        Cow::Owned(format!("[EMPTY_{id}]"))
    } else {
        Cow::Borrowed(text)
    }
}

fn ids<'t>(texts: &'t [Cow<'_, str>]) -> Result<HashMap<&'t str, usize>, TokenizerError> {
    let mut ids = HashMap::with_capacity(texts.len());
    for (second, text) in texts.iter().enumerate() {
        if let Some(first) = ids.insert(text.as_ref(), second) {
            return Err(TokenizerError::DuplicateToken {
                text: text.to_string(),
                first,
                second,
            });
        }
    }
    Ok(ids)
}

/// Each merge once, where it stands first: llama.cpp takes no notice of it later.
fn merges<'a>(
    metadata: &'a Metadata,
    ids: &HashMap<&str, usize>,
) -> Result<Vec<(&'a str, &'a str)>, TokenizerError> {
    let merges = texts(metadata, MERGES)?.ok_or(TokenizerError::Missing { key: MERGES })?;
    let mut pairs = Vec::with_capacity(merges.len());
    let mut seen = HashSet::with_capacity(merges.len());
    for (index, merge) in merges.iter().enumerate() {
        // A merge may begin with the token that is a space.
        let middle = merge.bytes().skip(1).position(|byte| byte == b' ');
        let pair = middle.and_then(|middle| {
            let (left, right) = merge.split_at_checked(middle + 1)?;
            Some((left, right.strip_prefix(' ')?))
        });
        let Some((left, right)) = pair else {
            return Err(TokenizerError::MalformedMerge {
                index,
                merge: merge.clone(),
            });
        };
        let whole = [left, right].concat();
        if let Some(token) = [left, right, &whole]
            .into_iter()
            .find(|token| !ids.contains_key(token))
        {
            return Err(TokenizerError::MergeOfUnknown {
                index,
                merge: merge.clone(),
                token: token.to_owned(),
            });
        }
        if seen.insert((left, right)) {
            pairs.push((left, right));
        }
    }
    Ok(pairs)
}

fn scores(metadata: &Metadata, tokens: usize) -> Result<Vec<f32>, TokenizerError> {
    let scores = match metadata.value(SCORES) {
        None => return Ok(vec![0.0; tokens]),
        Some(Value::Array(Array::F32(scores))) => scores.clone(),
        Some(_) => {
            return Err(TokenizerError::WrongType {
                key: SCORES.to_owned(),
                expected: "an array of 32-bit floats",
            });
        }
    };
    of_each_token(SCORES, scores, tokens)
}

fn roles(metadata: &Metadata, texts: &[Cow<'_, str>]) -> Result<Vec<Role>, TokenizerError> {
    let types = match metadata.value(TOKEN_TYPE) {
        None => vec![0; texts.len()],
        Some(Value::Array(Array::I32(types))) => {
            of_each_token(TOKEN_TYPE, types.clone(), texts.len())?
        }
        Some(_) => {
            return Err(TokenizerError::WrongType {
                key: TOKEN_TYPE.to_owned(),
                expected: "an array of signed 32-bit integers",
            });
        }
    };
    let infilling = INFILLING
        .iter()
        .filter(|(keys, _)| keys.iter().all(|key| metadata.value(key).is_none()))
        .flat_map(|(_, texts)| *texts);
    let control: Vec<&str> = END_OF_GENERATION.iter().chain(infilling).copied().collect();
    let role = |(text, kind): (&Cow<'_, str>, i32)| match kind {
        // The unknown token is found in texts as control tokens are.
        2 | 3 => Role::Control,
        4 => Role::UserDefined,
        _ if control.contains(&text.as_ref()) => Role::Control,
        5 => Role::Unused,
        _ => Role::Ordinary,
    };
    Ok(texts.iter().zip(types).map(role).collect())
}

fn of_each_token<T>(
    key: &'static str,
    elements: Vec<T>,
    tokens: usize,
) -> Result<Vec<T>, TokenizerError> {
    if elements.len() == tokens {
        Ok(elements)
    } else {
        Err(TokenizerError::Length {
            key,
            found: elements.len(),
            tokens,
        })
    }
}

pub(super) fn text<'a>(
    metadata: &'a Metadata,
    key: &str,
) -> Result<Option<&'a str>, TokenizerError> {
    typed(metadata, key, "a text", Value::as_text)
}

pub(super) fn texts<'a>(
    metadata: &'a Metadata,
    key: &str,
) -> Result<Option<&'a [String]>, TokenizerError> {
    typed(metadata, key, "an array of texts", |value| {
        value.as_array()?.as_texts()
    })
}

fn truth(metadata: &Metadata, key: &str) -> Result<Option<bool>, TokenizerError> {
    typed(metadata, key, "true or false", Value::as_bool)
}

fn typed<'a, T>(
    metadata: &'a Metadata,
    key: &str,
    expected: &'static str,
    read: impl FnOnce(&'a Value) -> Option<T>,
) -> Result<Option<T>, TokenizerError> {
    let Some(value) = metadata.value(key) else {
        return Ok(None);
    };
    match read(value) {
        Some(read) => Ok(Some(read)),
        None => Err(TokenizerError::WrongType {
            key: key.to_owned(),
            expected,
        }),
    }
}

const NAME: &str = "general.name";
pub(super) const MODEL: &str = "tokenizer.ggml.model";
pub(super) const PRE: &str = "tokenizer.ggml.pre";
pub(super) const TOKENS: &str = "tokenizer.ggml.tokens";
pub(super) const TOKEN_TYPE: &str = "tokenizer.ggml.token_type";
pub(super) const SCORES: &str = "tokenizer.ggml.scores";
pub(super) const MERGES: &str = "tokenizer.ggml.merges";
pub(super) const ADD_BOS: &str = "tokenizer.ggml.add_bos_token";
pub(super) const ADD_EOS: &str = "tokenizer.ggml.add_eos_token";
pub(super) const ADD_SPACE_PREFIX: &str = "tokenizer.ggml.add_space_prefix";

/// Of those models, the tokens that swallow nothing.
const PHI3_KEEPS: [&str; 3] = ["<unk>", "<s>", "<|endoftext|>"];

/// Texts that llama.cpp takes for control tokens whatever their type: they end an answer.
const END_OF_GENERATION: [&str; 22] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
];

/// Texts that llama.cpp takes for control tokens unless one of the keys before them names another token: marks for filling gaps in code.
const INFILLING: [(&[&str], &[&str]); 6] = [
    (
        &[
            "tokenizer.ggml.fim_pre_token_id",
            "tokenizer.ggml.prefix_token_id",
        ],
        &[
            "<|fim_prefix|>",
            "<fim-prefix>",
            "<fim_prefix>",
            "<｜fim▁begin｜>",
            "<PRE>",
            "▁<PRE>",
            "<|code_prefix|>",
            "<|prefix|>",
        ],
    ),
    (
        &[
            "tokenizer.ggml.fim_suf_token_id",
            "tokenizer.ggml.suffix_token_id",
        ],
        &[
            "<|fim_suffix|>",
            "<fim-suffix>",
            "<fim_suffix>",
            "<｜fim▁hole｜>",
            "<SUF>",
            "▁<SUF>",
            "<|code_suffix|>",
            "<|suffix|>",
        ],
    ),
    (
        &[
            "tokenizer.ggml.fim_mid_token_id",
            "tokenizer.ggml.middle_token_id",
        ],
        &[
            "<|fim_middle|>",
            "<fim-middle>",
            "<fim_middle>",
            "<｜fim▁end｜>",
            "<MID>",
            "▁<MID>",
            "<|code_middle|>",
            "<|middle|>",
        ],
    ),
    (
        &["tokenizer.ggml.fim_pad_token_id"],
        &["<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"],
    ),
    (
        &["tokenizer.ggml.fim_rep_token_id"],
        &[
            "<|fim_repo|>",
            "<|repo_name|>",
            "<fim-repo>",
            "<REPO>",
            "<reponame>",
        ],
    ),
    (&["tokenizer.ggml.fim_sep_token_id"], &["<|file_sep|>"]),
];
