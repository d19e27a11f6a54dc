//! What a checkpoint's side files say about text: special tokens, the end of a sequence, the chat template.
//!
//! In: paths, or contents. Out: typed answers, in transformers' order of precedence. Files that are not there say nothing; files that are there and
//! make no sense are refused.

use std::borrow::Cow;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tokenizers::Tokenizer;

use super::chat::{ChatError, ChatTemplate};
use super::encode::EncodeError;

/// Where a checkpoint keeps what is needed to turn text into tokens. All but the tokenizer may be missing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenizerFiles {
    /// `tokenizer.json`.
    pub tokenizer: Text,
    /// `tokenizer_config.json`: special tokens, and in most checkpoints the chat template.
    pub tokenizer_config: Option<Text>,
    /// `special_tokens_map.json`: special tokens, in older checkpoints.
    pub special_tokens_map: Option<Text>,
    /// `chat_template.jinja`: goes before the one in `tokenizer_config.json`.
    pub chat_template: Option<Text>,
    /// `generation_config.json`: the ids that end an answer; the first is the end-of-sequence token, where no special token says it.
    pub generation_config: Option<Text>,
    /// `config.json`: likewise.
    pub config: Option<Text>,
}

/// A file, or what would stand in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Text {
    /// To be read.
    File(PathBuf),
    /// At hand already.
    Held {
        /// What errors call it.
        name: PathBuf,
        /// The content.
        bytes: Vec<u8>,
    },
}

impl Text {
    /// Where the file is, if it is one.
    pub fn file(&self) -> Option<&Path> {
        match self {
            Self::File(path) => Some(path),
            Self::Held { .. } => None,
        }
    }

    /// What errors call it.
    pub(super) fn name(&self) -> &Path {
        match self {
            Self::File(path) | Self::Held { name: path, .. } => path,
        }
    }

    pub(super) fn read(&self) -> Result<Cow<'_, [u8]>, EncodeError> {
        match self {
            Self::Held { bytes, .. } => Ok(Cow::Borrowed(bytes)),
            Self::File(path) => fs::read(path)
                .map(Cow::Owned)
                .map_err(|source| EncodeError::Io {
                    path: path.clone(),
                    source,
                }),
        }
    }
}

impl TokenizerFiles {
    /// What the files are called, in the order of the fields.
    pub const NAMES: [&str; 6] = [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "generation_config.json",
        "config.json",
    ];

    /// Asks `side_file` for each file by its name.
    ///
    /// # Errors
    /// [`EncodeError::NoTokenizer`] when there is no `tokenizer.json`.
    pub fn find(side_file: impl Fn(&str) -> Option<PathBuf>) -> Result<Self, EncodeError> {
        let [
            tokenizer,
            tokenizer_config,
            special_tokens_map,
            chat_template,
            generation_config,
            config,
        ] = Self::NAMES.map(|name| side_file(name).map(Text::File));
        Ok(Self {
            tokenizer: tokenizer.ok_or(EncodeError::NoTokenizer)?,
            tokenizer_config,
            special_tokens_map,
            chat_template,
            generation_config,
            config,
        })
    }

    /// Those that are files, but for `config.json`, which is the model's.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        let texts = [
            &self.tokenizer_config,
            &self.special_tokens_map,
            &self.chat_template,
            &self.generation_config,
        ];
        let texts = [&self.tokenizer]
            .into_iter()
            .chain(texts.into_iter().flatten());
        texts.filter_map(Text::file)
    }

    /// Looks for each file in `directory`.
    ///
    /// # Errors
    /// [`EncodeError::NoTokenizer`] when there is no `tokenizer.json`.
    pub fn in_directory(directory: &Path) -> Result<Self, EncodeError> {
        Self::find(|name| Some(directory.join(name)).filter(|path| path.is_file()))
    }
}

/// What the side files say, those that there are.
pub(super) struct SideFiles {
    tokenizer_config: Option<Value>,
    special_tokens_map: Option<Value>,
    generation_config: Option<Value>,
    config: Option<Value>,
    chat_template: Option<String>,
}

impl SideFiles {
    pub(super) fn read(files: &TokenizerFiles) -> Result<Self, EncodeError> {
        let chat_template = match &files.chat_template {
            None => None,
            Some(text) => {
                let bytes = text.read()?.into_owned();
                let content = String::from_utf8(bytes).map_err(|source| EncodeError::NotText {
                    path: text.name().to_owned(),
                    source,
                })?;
                Some(content)
            }
        };
        Ok(Self {
            tokenizer_config: object(files.tokenizer_config.as_ref())?,
            special_tokens_map: object(files.special_tokens_map.as_ref())?,
            generation_config: object(files.generation_config.as_ref())?,
            config: object(files.config.as_ref())?,
            chat_template,
        })
    }

    /// The text of a special token, which stands there as a string or as an object with its `content`.
    fn special_token(&self, name: &str) -> Option<&str> {
        [&self.tokenizer_config, &self.special_tokens_map]
            .into_iter()
            .flatten()
            .find_map(|config| {
                let token = config.get(name)?;
                token.as_str().or_else(|| token.get("content")?.as_str())
            })
    }

    /// The ids that `generation_config.json` names as ends of a text, else those of `config.json`: one, or a list.
    fn end_ids(&self) -> Vec<u32> {
        let id = |value: &Value| u32::try_from(value.as_u64()?).ok();
        let ids = |config: &Value| -> Option<Vec<u32>> {
            match config.get("eos_token_id")? {
                Value::Array(ids) => Some(ids.iter().filter_map(id).collect()),
                one => id(one).map(|it| vec![it]),
            }
        };
        let configs = [&self.generation_config, &self.config];
        let mut named = configs.into_iter().flatten().filter_map(ids);
        named.find(|ids| !ids.is_empty()).unwrap_or_default()
    }

    /// From `chat_template.jinja`, else from `tokenizer_config.json`: a string, or a list of named templates of which the one called
    /// `default` is meant.
    pub(super) fn chat_template(&self) -> Result<Option<Box<ChatTemplate>>, ChatError> {
        let in_config = || {
            let template = self.tokenizer_config.as_ref()?.get("chat_template")?;
            let named_default = |templates: &Value| {
                let default = templates.as_array()?.iter().find(|template| {
                    template.get("name").and_then(Value::as_str) == Some("default")
                })?;
                Some(default.get("template")?.as_str()?.to_owned())
            };
            template
                .as_str()
                .map(str::to_owned)
                .or_else(|| named_default(template))
        };
        let Some(source) = self.chat_template.clone().or_else(in_config) else {
            return Ok(None);
        };
        let special_tokens = SPECIAL_TOKENS.into_iter().filter_map(|name| {
            let text = self.special_token(name)?;
            Some((name.to_owned(), text.to_owned()))
        });
        ChatTemplate::compile(&source, special_tokens).map(|template| Some(Box::new(template)))
    }
}

/// The end-of-sequence token: its id, and its text, which is empty if the tokenizer does not know it.
#[derive(Clone, Debug)]
pub(super) struct Eos {
    pub(super) id: u32,
    pub(super) text: String,
}

impl Eos {
    /// The special token first, as transformers has it; then the first of the ids.
    pub(super) fn find(side: &SideFiles, tokenizer: &Tokenizer) -> Result<Self, EncodeError> {
        if let Some(text) = side.special_token("eos_token")
            && let Some(id) = tokenizer.token_to_id(text)
        {
            return Ok(Self {
                id,
                text: text.to_owned(),
            });
        }
        let ids = side.end_ids();
        let id = *ids.first().ok_or(EncodeError::NoEos)?;
        Ok(Self {
            id,
            text: tokenizer.id_to_token(id).unwrap_or_default(),
        })
    }

    /// All that end an answer: this one, and those that the side files name beside it, such as the end of a turn.
    pub(super) fn with_others(&self, side: &SideFiles) -> Vec<u32> {
        let mut ends = vec![self.id];
        ends.extend(side.end_ids().into_iter().filter(|&id| id != self.id));
        ends
    }
}

/// The special tokens that transformers hands to a chat template.
const SPECIAL_TOKENS: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

fn object(text: Option<&Text>) -> Result<Option<Value>, EncodeError> {
    let Some(text) = text else {
        return Ok(None);
    };
    let wrong = |source| EncodeError::SideFile {
        path: text.name().to_owned(),
        source,
    };
    match serde_json::from_slice(&text.read()?) {
        Ok(value @ Value::Object(_)) => Ok(Some(value)),
        Ok(_) => Err(wrong(None)),
        Err(error) => Err(wrong(Some(error))),
    }
}
