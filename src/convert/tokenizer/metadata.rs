//! A GGUF's metadata, written from a tokenizer's files.

use panacea_formats::gguf::{Array, Metadata, Value as Stored};
use serde_json::{Map, Value};
use tokenizers::{AddedToken, Tokenizer};

use super::error::TokenizerError;
use super::folder::{Read, TokenizerFolder};
use super::pre::Pre;
use super::sentencepiece::{self, Kind};
use super::special::{SpecialTokens, content};
use super::{known, vocabulary};

/// What is known about the model that a tokenizer belongs to.
#[derive(Clone, Copy, Debug)]
pub struct TokenizerOptions<'a> {
    /// The GGUF's `general.architecture`: a few have special tokens of their own.
    pub architecture: &'a str,
    /// Rows of the model's embedding. There will be as many tokens; those that the tokenizer does not have are called `[PAD5]` and are unused.
    pub vocabulary: usize,
    /// What to write as `tokenizer.ggml.pre`, in place of what the tokenizer itself gives away.
    pub pre: Option<&'a str>,
    /// Metadata to take every `tokenizer.*` key from, in place of reading any file.
    pub from: Option<&'a Metadata>,
}

/// Adds the keys `tokenizer.*` to `metadata`: those that llama.cpp's converter writes, with its types and values, in its order.
///
/// Three kinds of directories are told apart, as there. One with a `tokenizer.model` has a SentencePiece tokenizer. Without that, byte
/// fallback in `tokenizer.json` means the same. Everything else is merges of bytes, whose way to cut text must be a known one.
///
/// In three things it goes beyond the converter, each time where that writes a file that does not work. Without a `tokenizer.model`, tokens are scored
/// by their merges, where the converter gives them all one score and their order is lost; this also serves Gemma and Phi-3, which
/// it refuses then. Padding is added there, too. And tokens that only `tokenizer.json` adds are seen beside a `tokenizer.model`.
///
/// # Errors
/// [`TokenizerError`] when there is no tokenizer, it is not understood, does not fit the model, or cuts text in a way that has no name.
pub fn to_metadata(
    folder: &TokenizerFolder,
    options: &TokenizerOptions<'_>,
    metadata: &mut Metadata,
) -> Result<(), TokenizerError> {
    if let Some(base) = options.from {
        return copy(base, options.vocabulary, metadata);
    }
    let llama = ["llama", "granite"].contains(&options.architecture);
    if llama
        && let Some(prefix) = folder
            .tokenizer_config
            .get("add_prefix_space")
            .and_then(Value::as_bool)
    {
        metadata.set(vocabulary::ADD_SPACE_PREFIX, Stored::Bool(prefix));
    }
    let reads_pieces = !["olmo2", "olmo"].contains(&options.architecture);
    let pieces = match &folder.pieces {
        Some(model) if reads_pieces => Some(Tokens::of_pieces(model, folder, options)?),
        _ if reads_pieces && has_byte_fallback(folder) => {
            Some(Tokens::of_merged_pieces(folder, options.vocabulary)?)
        }
        _ => None,
    };
    let text = |text: &str| Stored::Text(text.to_owned());
    match pieces {
        Some(tokens) => {
            metadata.set(vocabulary::MODEL, text("llama"));
            metadata.set(vocabulary::PRE, text("default"));
            tokens.write(metadata);
            SpecialTokens::find(folder, Some(options.vocabulary))?.write(metadata)?;
            write_family(options, metadata)?;
        }
        None => {
            let (tokens, pre) = Tokens::of_bytes(folder, options)?;
            metadata.set(vocabulary::MODEL, text("gpt2"));
            metadata.set(vocabulary::PRE, Stored::Text(pre));
            tokens.write(metadata);
            metadata.set(
                vocabulary::MERGES,
                Stored::Array(Array::Text(merges(folder)?)),
            );
            SpecialTokens::find(folder, None)?.write(metadata)?;
        }
    }
    if llama && options.vocabulary == CODE_LLAMA {
        metadata.set(EOT, Stored::U32(32010));
    }
    if llama && options.vocabulary == GRANITE_SMALL {
        metadata.set(vocabulary::ADD_BOS, Stored::Bool(false));
    }
    Ok(())
}

/// Takes every key of a tokenizer over as it is.
fn copy(base: &Metadata, vocabulary: usize, metadata: &mut Metadata) -> Result<(), TokenizerError> {
    let tokens = vocabulary::texts(base, vocabulary::TOKENS)?;
    let tokens = tokens.ok_or(TokenizerError::Missing {
        key: vocabulary::TOKENS,
    })?;
    if tokens.len() != vocabulary {
        return Err(TokenizerError::BaseDoesNotFit {
            tokens: tokens.len(),
            vocabulary,
        });
    }
    for (key, value) in base.iter() {
        if key.starts_with("tokenizer.") {
            metadata.set(key, value.clone());
        }
    }
    Ok(())
}

/// Gemma never puts a space before a text, and the first Gemma's end of a turn is known by its id alone.
fn write_family(
    options: &TokenizerOptions<'_>,
    metadata: &mut Metadata,
) -> Result<(), TokenizerError> {
    if options.architecture == "gemma" {
        metadata.set(EOT, Stored::U32(107));
    }
    if ["gemma", "gemma2", "gemma3"].contains(&options.architecture) {
        metadata.set(vocabulary::ADD_SPACE_PREFIX, Stored::Bool(false));
    }
    Ok(())
}

/// What there is of each token.
#[derive(Debug)]
struct Tokens {
    texts: Vec<String>,
    types: Vec<i32>,
    /// Of SentencePiece's tokens only.
    scores: Option<Vec<f32>>,
}

impl Tokens {
    /// As many as `vocabulary`, none of them known yet.
    fn unused(vocabulary: usize, score: Option<f32>) -> Self {
        Self {
            texts: (0..vocabulary).map(|id| format!("[PAD{id}]")).collect(),
            types: vec![UNUSED; vocabulary],
            scores: score.map(|score| vec![score; vocabulary]),
        }
    }

    /// Does nothing if `id` is not below the size of the vocabulary: such a token could not be looked up in the model.
    fn put(&mut self, id: usize, text: impl Into<String>, kind: i32, score: f32) {
        if let (Some(old_text), Some(old_kind)) = (self.texts.get_mut(id), self.types.get_mut(id)) {
            *old_text = text.into();
            *old_kind = kind;
        }
        if let Some(old) = self.scores.as_mut().and_then(|scores| scores.get_mut(id)) {
            *old = score;
        }
    }

    fn write(self, metadata: &mut Metadata) {
        let arrays = [
            (vocabulary::TOKENS, Some(Array::Text(self.texts))),
            (vocabulary::SCORES, self.scores.map(Array::F32)),
            (vocabulary::TOKEN_TYPE, Some(Array::I32(self.types))),
        ];
        for (key, array) in arrays {
            if let Some(array) = array {
                metadata.set(key, Stored::Array(array));
            }
        }
    }

    /// From `tokenizer.model`, and what the other files add to it.
    fn of_pieces(
        model: &Read<Vec<u8>>,
        folder: &TokenizerFolder,
        options: &TokenizerOptions<'_>,
    ) -> Result<Self, TokenizerError> {
        let pieces = sentencepiece::pieces(&model.content);
        let pieces = pieces.map_err(|source| TokenizerError::Pieces {
            path: model.path.clone(),
            source,
        })?;
        let mut tokens = Self::unused(options.vocabulary, Some(-10000.0));
        let known = pieces.len();
        for (id, piece) in pieces.into_iter().enumerate() {
            let kind = match piece.kind {
                Kind::Normal | Kind::UserDefined => NORMAL,
                Kind::Unknown => UNKNOWN,
                Kind::Control => CONTROL,
                Kind::Unused => UNUSED,
                Kind::Byte => BYTE,
            };
            tokens.put(id, piece.text, kind, piece.score);
        }
        for (text, id) in &folder.added_tokens {
            let id = id.as_u64().and_then(|id| usize::try_from(id).ok());
            let id = id.ok_or_else(|| TokenizerError::BadAddedToken { text: text.clone() })?;
            tokens.put(id, text.as_str(), USER_DEFINED, ADDED_SCORE);
        }
        // Phi-3's tokens are taken at their word.
        let literal = options.architecture == "phi3";
        let decoder = folder.tokenizer_config.get("added_tokens_decoder");
        for (id, token) in decoder.and_then(Value::as_object).into_iter().flatten() {
            tokens.put_added(id.parse().ok(), token, literal)?;
        }
        for token in added_tokens(folder) {
            let id = token.get("id").and_then(Value::as_u64);
            let id = id.and_then(|id| usize::try_from(id).ok());
            if literal || (decoder.is_none() && id.is_some_and(|id| id >= known)) {
                tokens.put_added(id, token, literal)?;
            }
        }
        Ok(tokens)
    }

    fn put_added(
        &mut self,
        id: Option<usize>,
        token: &Value,
        literal: bool,
    ) -> Result<(), TokenizerError> {
        let text = content(token).unwrap_or_default();
        let id = id.filter(|_| !text.is_empty());
        let id = id.ok_or_else(|| TokenizerError::BadAddedToken {
            text: text.to_owned(),
        })?;
        let special = token.get("special").and_then(Value::as_bool) == Some(true);
        if special || (!literal && looks_special(text)) {
            self.put(id, text, CONTROL, ADDED_SCORE);
        } else if literal {
            self.put(id, text, USER_DEFINED, ADDED_SCORE);
        } else {
            self.put(id, text.replace('▁', " "), USER_DEFINED, ADDED_SCORE);
        }
        Ok(())
    }

    /// From a `tokenizer.json` with byte fallback, which was a SentencePiece model once: of the tokens that merges make, the sooner one is made the
    /// higher it scores.
    fn of_merged_pieces(
        folder: &TokenizerFolder,
        vocabulary: usize,
    ) -> Result<Self, TokenizerError> {
        let tokenizer = open(folder)?;
        let pairs = merge_pairs(folder)?;
        #[expect(
            clippy::cast_precision_loss,
            reason = "ranks keep their order up to 2^24"
        )]
        let score = |rank: usize| -(rank as f32);
        let mut tokens = Self::unused(vocabulary, Some(-10000.0));
        let texts = ids(&tokenizer, vocabulary)?;
        for (text, id) in &texts {
            let byte = text.len() == 6 && text.starts_with("<0x") && text.ends_with('>');
            let byte = byte
                && text
                    .bytes()
                    .skip(3)
                    .take(2)
                    .all(|it| it.is_ascii_hexdigit());
            let (kind, score) = if byte {
                (BYTE, 0.0)
            } else {
                (NORMAL, score(pairs.len()))
            };
            tokens.put(*id, text.as_str(), kind, score);
        }
        let scores = tokens.scores.as_mut();
        let by_text: std::collections::HashMap<_, _> = texts.into_iter().collect();
        if let Some(scores) = scores {
            // Backwards, so that the first way to make a token is what counts.
            for (rank, (left, right)) in pairs.iter().enumerate().rev() {
                let made = by_text.get(&[*left, *right].concat());
                if let Some(it) = made.and_then(|&id| scores.get_mut(id)) {
                    *it = score(rank);
                }
            }
        }
        for (id, token) in tokenizer.get_added_tokens_decoder() {
            let text = &token.content;
            if token.special || looks_special(text) {
                tokens.put(id as usize, text.as_str(), CONTROL, ADDED_SCORE);
            } else {
                let text = text.replace('▁', " ");
                tokens.put(id as usize, text, USER_DEFINED, ADDED_SCORE);
            }
        }
        Ok(tokens)
    }

    /// From a `tokenizer.json` of merges of bytes; and the name of its way to cut text.
    fn of_bytes(
        folder: &TokenizerFolder,
        options: &TokenizerOptions<'_>,
    ) -> Result<(Self, String), TokenizerError> {
        let tokenizer = open(folder)?;
        let pre = match options.pre {
            Some(name) if known::names(name) => name.to_owned(),
            Some(name) => {
                Pre::named(name)?;
                name.to_owned()
            }
            None => cut(&tokenizer)?.to_owned(),
        };
        let mut tokens = Self::unused(options.vocabulary, None);
        for (text, id) in ids(&tokenizer, options.vocabulary)? {
            tokens.put(id, text, NORMAL, 0.0);
        }
        for (id, token) in tokenizer.get_added_tokens_decoder() {
            // llama.cpp looks for these tokens in texts as they are, so that they must be as the tokenizer has made them.
            let text = if token.normalized {
                token.content.clone()
            } else {
                let encoding = tokenizer.encode_fast(token.content.as_str(), false);
                encoding
                    .and_then(|encoding| tokenizer.decode(encoding.get_ids(), false))
                    .map_err(TokenizerError::Tokenize)?
            };
            if token.special || looks_special(&text) {
                tokens.put(id as usize, text, CONTROL, 0.0);
            } else {
                tokens.put(id as usize, text.replace('▁', " "), USER_DEFINED, 0.0);
            }
        }
        Ok((tokens, pre))
    }
}

/// The tokenizer of `tokenizer.json`, with the special tokens that `tokenizer_config.json` makes of its tokens, as transformers opens it.
fn open(folder: &TokenizerFolder) -> Result<Tokenizer, TokenizerError> {
    let file = folder
        .tokenizer
        .as_ref()
        .ok_or(TokenizerError::NoTokenizer)?;
    let unusable = |source| TokenizerError::Tokenizer {
        path: file.path.clone(),
        source,
    };
    let mut tokenizer = Tokenizer::from_bytes(&folder.tokenizer_bytes).map_err(unusable)?;
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).map_err(unusable)?;
    let config = &folder.tokenizer_config;
    let decoder = config
        .get("added_tokens_decoder")
        .and_then(Value::as_object);
    let mut described: Vec<(u32, &Value)> = decoder
        .into_iter()
        .flatten()
        .filter_map(|(id, token)| Some((id.parse().ok()?, token)))
        .collect();
    described.sort_unstable_by_key(|(id, _)| *id);
    let mut wanted: Vec<AddedToken> = described
        .into_iter()
        .filter_map(|(_, token)| serde_json::from_value(token.clone()).ok())
        .collect();
    let known = tokenizer.get_added_tokens_decoder();
    for text in named_special_tokens(config) {
        let seen = |token: &AddedToken| token.content == text;
        if !known.values().any(seen) && !wanted.iter().any(seen) {
            wanted.push(AddedToken::from(text, true));
        }
    }
    tokenizer.add_tokens(&wanted);
    Ok(tokenizer)
}

fn named_special_tokens(config: &Map<String, Value>) -> impl Iterator<Item = &str> {
    let named = NAMED.iter().filter_map(|name| config.get(*name));
    let lists = ["additional_special_tokens", "extra_special_tokens"];
    let listed = lists
        .into_iter()
        .filter_map(|name| config.get(name)?.as_array());
    named.chain(listed.flatten()).filter_map(content)
}

/// Texts and ids of all tokens.
fn ids(tokenizer: &Tokenizer, vocabulary: usize) -> Result<Vec<(String, usize)>, TokenizerError> {
    let mut texts = Vec::new();
    for (text, id) in tokenizer.get_vocab(true) {
        if id as usize >= vocabulary {
            return Err(TokenizerError::TokenBeyondVocabulary {
                text,
                id,
                vocabulary,
            });
        }
        texts.push((text, id as usize));
    }
    Ok(texts)
}

/// The name of the way in which `tokenizer` cuts text.
fn cut(tokenizer: &Tokenizer) -> Result<&'static str, TokenizerError> {
    let encoding = tokenizer.encode_fast(known::PROBE, true);
    let hash = known::hash(encoding.map_err(TokenizerError::Tokenize)?.get_ids());
    known::name(&hash).ok_or(TokenizerError::UnknownCut { hash })
}

fn has_byte_fallback(folder: &TokenizerFolder) -> bool {
    let Some(tokenizer) = folder.tokenizer.as_ref().map(|file| &file.content) else {
        return false;
    };
    let field = |part: &str, name: &str| tokenizer.get(part).and_then(|part| part.get(name));
    field("model", "type").and_then(Value::as_str) == Some("BPE")
        && field("model", "byte_fallback").and_then(Value::as_bool) == Some(true)
        && field("decoder", "type").and_then(Value::as_str) == Some("Sequence")
}

fn added_tokens(folder: &TokenizerFolder) -> &[Value] {
    let tokens = folder
        .tokenizer
        .as_ref()
        .and_then(|file| file.content.get("added_tokens"));
    tokens.and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// Merges as they are written today, or as they were, with a space between the two.
fn merge_pairs(folder: &TokenizerFolder) -> Result<Vec<(&str, &str)>, TokenizerError> {
    let file = folder
        .tokenizer
        .as_ref()
        .ok_or(TokenizerError::NoTokenizer)?;
    let merges = file
        .content
        .get("model")
        .and_then(|model| model.get("merges"));
    let merges = merges
        .and_then(Value::as_array)
        .map_or(&[][..], Vec::as_slice);
    let pairs = merges.iter().enumerate().map(|(index, merge)| {
        pair(merge).ok_or_else(|| TokenizerError::MalformedMerge {
            index,
            merge: merge.to_string(),
        })
    });
    pairs.collect()
}

fn pair(merge: &Value) -> Option<(&str, &str)> {
    match merge {
        Value::String(pair) => pair.split_once(' '),
        Value::Array(pair) => match pair.as_slice() {
            [left, right] => Some((left.as_str()?, right.as_str()?)),
            _ => None,
        },
        _ => None,
    }
}

/// A space in a token is spelled as the byte that it is, for a space is what separates two tokens.
fn merges(folder: &TokenizerFolder) -> Result<Vec<String>, TokenizerError> {
    let pairs = merge_pairs(folder)?;
    if pairs.is_empty() {
        return Err(TokenizerError::NoMerges);
    }
    let spell = |token: &str| token.replace(' ', "Ġ");
    Ok(pairs
        .into_iter()
        .map(|(left, right)| format!("{} {}", spell(left), spell(right)))
        .collect())
}

/// Tokens that are special whatever the tokenizer says of them.
fn looks_special(text: &str) -> bool {
    let between = |open: &str, close: &str| {
        // The converter does not mind if the two overlap.
        text.starts_with(open) && text.ends_with(close)
    };
    ["<pad>", "<mask>", "<2mass>", "[@BOS@]"].contains(&text)
        || between("<|", "|>")
        || between("<｜", "｜>")
        || between("<unused", ">")
}

const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// What the converter gives a token that is not SentencePiece's own.
const ADDED_SCORE: f32 = -1000.0;

const EOT: &str = "tokenizer.ggml.eot_token_id";

/// Embeddings of this size are those of Code Llama, whose end of a turn has an id of its own.
const CODE_LLAMA: usize = 32016;

/// Embeddings of this size are those of small Granite models (and SmolLM's), whose texts begin with no special token.
const GRANITE_SMALL: usize = 49152;

const NAMED: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];
