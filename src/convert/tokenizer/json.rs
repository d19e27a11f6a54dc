//! A tokenizer's files, written from the metadata of a GGUF file.

use panacea_formats::gguf::Metadata;
use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::{Value, json};

use super::error::TokenizerError;
use super::pieces;
use super::pre::Pre;
use super::vocabulary::{self, Role, Scheme, Token, Vocabulary};

/// The files that say how a model reads text, as a Hugging Face directory has them.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenizerTexts {
    /// `tokenizer.json`.
    pub tokenizer: String,
    /// `tokenizer_config.json`: special tokens; named chat templates, if there are others than the default.
    pub tokenizer_config: Value,
    /// `chat_template.jinja`.
    pub chat_template: Option<String>,
}

/// Writes a tokenizer that gives the ids that llama.cpp gives with `metadata`.
///
/// Those that llama.cpp finds in texts as they stand (control tokens, the unknown token, user-defined ones) are added tokens. Tokens that fill up
/// the model's embedding, the last ones and called `[PAD5]`, are left out.
///
/// # Errors
/// [`TokenizerError`] when a key is missing, of a wrong type, contradicts another, or names what is not known here.
pub fn from_metadata(metadata: &Metadata) -> Result<TokenizerTexts, TokenizerError> {
    let vocabulary = Vocabulary::read(metadata)?;
    let templates = Templates::read(metadata)?;
    Ok(TokenizerTexts {
        tokenizer: tokenizer(&vocabulary)?,
        tokenizer_config: tokenizer_config(&vocabulary, &templates),
        chat_template: templates.default.map(str::to_owned),
    })
}

/// `tokenizer.json` as the `tokenizers` crate reads it, its fields in the crate's order.
#[derive(serde::Serialize)]
struct TokenizerJson<'a> {
    version: &'static str,
    truncation: (),
    padding: (),
    added_tokens: Vec<AddedToken<'a>>,
    normalizer: Value,
    pre_tokenizer: Value,
    post_processor: Value,
    decoder: Value,
    model: Model<'a>,
}

#[derive(serde::Serialize)]
struct AddedToken<'a> {
    id: usize,
    content: &'a str,
    single_word: bool,
    lstrip: bool,
    rstrip: bool,
    normalized: bool,
    special: bool,
}

#[derive(serde::Serialize)]
struct Model<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    dropout: (),
    unk_token: Option<&'a str>,
    continuing_subword_prefix: (),
    end_of_word_suffix: (),
    fuse_unk: bool,
    byte_fallback: bool,
    ignore_merges: bool,
    vocab: Ids<'a>,
    merges: Vec<(&'a str, &'a str)>,
}

/// Texts to ids, in the order of ids.
struct Ids<'a>(&'a [Token<'a>]);

impl Serialize for Ids<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (id, token) in self.0.iter().enumerate() {
            map.serialize_entry(&token.text, &id)?;
        }
        map.end()
    }
}

fn tokenizer(vocabulary: &Vocabulary<'_>) -> Result<String, TokenizerError> {
    let parts = match &vocabulary.scheme {
        Scheme::Bytes { pre, merges } => Parts::of_bytes(pre, merges.clone()),
        Scheme::Pieces {
            scores,
            space_prefix,
        } => Parts::of_pieces(pieces::merges(&vocabulary.tokens, scores)?, *space_prefix),
    };
    let unknown = vocabulary.special.unknown;
    let tokenizer = TokenizerJson {
        version: "1.0",
        truncation: (),
        padding: (),
        added_tokens: added_tokens(vocabulary),
        normalizer: parts.normalizer,
        pre_tokenizer: parts.pre_tokenizer,
        post_processor: post_processor(vocabulary),
        decoder: parts.decoder,
        model: Model {
            kind: "BPE",
            dropout: (),
            unk_token: unknown
                .filter(|_| parts.pieces)
                .and_then(|id| vocabulary.text(id)),
            continuing_subword_prefix: (),
            end_of_word_suffix: (),
            fuse_unk: parts.pieces,
            byte_fallback: parts.pieces,
            ignore_merges: parts.ignore_merges,
            vocab: Ids(of_model(&vocabulary.tokens)),
            merges: parts.merges,
        },
    };
    serde_json::to_string(&tokenizer).map_err(TokenizerError::Unwritable)
}

/// Tokens that the model itself has to know: not those that only fill up the embedding, nor added ones behind all others, which get the ids
/// that follow.
fn of_model<'v, 'a>(tokens: &'v [Token<'a>]) -> &'v [Token<'a>] {
    let filling = |id: usize, token: &Token<'_>| {
        token.role == Role::Unused && token.text == format!("[PAD{id}]")
    };
    let used = tokens.iter().enumerate().rev();
    let used = used.skip_while(|(id, token)| filling(*id, token));
    let known = used.skip_while(|(_, token)| token.role.is_found()).count();
    tokens.get(..known).unwrap_or(tokens)
}

/// What a scheme decides.
struct Parts<'a> {
    pieces: bool,
    ignore_merges: bool,
    normalizer: Value,
    pre_tokenizer: Value,
    decoder: Value,
    merges: Vec<(&'a str, &'a str)>,
}

impl<'a> Parts<'a> {
    fn of_bytes(pre: &Pre, merges: Vec<(&'a str, &'a str)>) -> Self {
        let bytes = json!({
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false
        });
        let split = |pattern: &&str| {
            json!({
                "type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false
            })
        };
        let steps: Vec<Value> = pre
            .patterns
            .iter()
            .map(split)
            .chain([bytes.clone()])
            .collect();
        Self {
            pieces: false,
            ignore_merges: pre.ignore_merges,
            normalizer: Value::Null,
            pre_tokenizer: json!({"type": "Sequence", "pretokenizers": steps}),
            decoder: bytes,
            merges,
        }
    }

    fn of_pieces(merges: Vec<(&'a str, &'a str)>, space_prefix: bool) -> Self {
        let prefix = space_prefix.then(|| json!({"type": "Prepend", "prepend": SPACE}));
        let escape = json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE});
        let unescape = json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "});
        let strip =
            space_prefix.then(|| json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        let decoders = [
            unescape,
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        Self {
            pieces: true,
            ignore_merges: false,
            normalizer: sequence("normalizers", prefix.into_iter().chain([escape])),
            pre_tokenizer: Value::Null,
            decoder: sequence("decoders", decoders.into_iter().chain(strip)),
            merges,
        }
    }
}

fn sequence(of: &str, steps: impl Iterator<Item = Value>) -> Value {
    json!({"type": "Sequence", of: steps.collect::<Vec<_>>()})
}

fn added_tokens<'a>(vocabulary: &'a Vocabulary<'_>) -> Vec<AddedToken<'a>> {
    let tokens = vocabulary.tokens.iter().enumerate();
    tokens
        .filter(|(_, token)| token.role.is_found())
        .map(|(id, token)| AddedToken {
            id,
            content: &token.text,
            single_word: false,
            lstrip: false,
            rstrip: token.swallows_space,
            normalized: false,
            special: token.role == Role::Control,
        })
        .collect()
}

/// Puts the beginning-of-sequence token before a text and the end-of-sequence token behind it, where the file says so. Nothing in this program
/// asks for either: chat templates spell them out.
fn post_processor(vocabulary: &Vocabulary<'_>) -> Value {
    let special = &vocabulary.special;
    let wanted = |wanted: bool, id: Option<u32>| {
        let id = id.filter(|_| wanted)?;
        Some((id, vocabulary.text(id)?))
    };
    let bos = wanted(vocabulary.adds_bos, special.bos);
    let eos = wanted(vocabulary.adds_eos, special.eos);
    let bytes = json!({
        "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true
    });
    let pieces = matches!(vocabulary.scheme, Scheme::Pieces { .. });
    if bos.is_none() && eos.is_none() {
        return if pieces { Value::Null } else { bytes };
    }
    let around = |sequence: &str, segment: u8| {
        let token =
            |(_, text): (u32, &str)| json!({"SpecialToken": {"id": text, "type_id": segment}});
        let text = json!({"Sequence": {"id": sequence, "type_id": segment}});
        let parts = bos.map(token).into_iter().chain([text]);
        parts.chain(eos.map(token)).collect::<Vec<_>>()
    };
    let tokens: serde_json::Map<String, Value> = bos
        .into_iter()
        .chain(eos)
        .map(|(id, text)| {
            (
                text.to_owned(),
                json!({"id": text, "ids": [id], "tokens": [text]}),
            )
        })
        .collect();
    let template = json!({
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": Value::Array([around("A", 0), around("B", 1)].concat()),
        "special_tokens": tokens,
    });
    if pieces {
        template
    } else {
        json!({"type": "Sequence", "processors": [bytes, template]})
    }
}

fn tokenizer_config(vocabulary: &Vocabulary<'_>, templates: &Templates<'_>) -> Value {
    let special = &vocabulary.special;
    let mut config = serde_json::Map::new();
    config.insert(
        "tokenizer_class".to_owned(),
        json!("PreTrainedTokenizerFast"),
    );
    config.insert("clean_up_tokenization_spaces".to_owned(), json!(false));
    config.insert("add_bos_token".to_owned(), json!(vocabulary.adds_bos));
    config.insert("add_eos_token".to_owned(), json!(vocabulary.adds_eos));
    let tokens = [
        ("bos_token", special.bos),
        ("eos_token", special.eos),
        ("unk_token", special.unknown),
        ("sep_token", special.separator),
        ("pad_token", special.padding),
        ("mask_token", special.mask),
    ];
    for (name, id) in tokens {
        if let Some(text) = id.and_then(|id| vocabulary.text(id)) {
            config.insert(name.to_owned(), json!(text));
        }
    }
    if !templates.named.is_empty() {
        let default = templates.default.map(|template| ("default", template));
        let all = default.into_iter().chain(templates.named.iter().copied());
        let all = all.map(|(name, template)| json!({"name": name, "template": template}));
        config.insert("chat_template".to_owned(), all.collect());
    }
    Value::Object(config)
}

/// Chat templates: the one that is used unless another is asked for, and others by their names.
struct Templates<'a> {
    default: Option<&'a str>,
    named: Vec<(&'a str, &'a str)>,
}

impl<'a> Templates<'a> {
    fn read(metadata: &'a Metadata) -> Result<Self, TokenizerError> {
        let named = metadata.iter().filter_map(|(key, value)| {
            let name = key.strip_prefix(CHAT_TEMPLATE)?.strip_prefix('.')?;
            Some(
                value
                    .as_text()
                    .map(|template| (name, template))
                    .ok_or_else(|| TokenizerError::WrongType {
                        key: key.to_owned(),
                        expected: "a text",
                    }),
            )
        });
        Ok(Self {
            default: vocabulary::text(metadata, CHAT_TEMPLATE)?,
            named: named.collect::<Result<_, _>>()?,
        })
    }
}

const CHAT_TEMPLATE: &str = "tokenizer.chat_template";

/// What SentencePiece writes for a space: U+2581.
const SPACE: &str = "▁";
