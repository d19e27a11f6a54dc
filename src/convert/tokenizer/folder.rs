//! The files of a Hugging Face directory that say how a model reads text.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::error::TokenizerError;

/// Their contents, of those that there are.
#[derive(Debug, Default)]
pub struct TokenizerFolder {
    /// `tokenizer.json`.
    pub(super) tokenizer: Option<Read<Map<String, Value>>>,
    /// The same, as it stands there.
    pub(super) tokenizer_bytes: Vec<u8>,
    /// `tokenizer.model`: SentencePiece's own file.
    pub(super) pieces: Option<Read<Vec<u8>>>,
    /// `tokenizer_config.json`: special tokens, chat templates.
    pub(super) tokenizer_config: Map<String, Value>,
    /// `added_tokens.json`: texts to ids, in older directories.
    pub(super) added_tokens: Map<String, Value>,
    /// `config.json`: ids of special tokens.
    pub(super) config: Map<String, Value>,
    /// `chat_template.jinja`, or `chat_template.json`.
    pub(super) chat_template: Option<Value>,
}

/// A file's content, and where it was.
#[derive(Debug)]
pub(super) struct Read<T> {
    pub(super) path: PathBuf,
    pub(super) content: T,
}

impl TokenizerFolder {
    /// Asks `side_file` where each file is, and reads those that there are.
    ///
    /// # Errors
    /// [`TokenizerError::Io`] and [`TokenizerError::NotJson`].
    pub fn find(side_file: impl Fn(&str) -> Option<PathBuf>) -> Result<Self, TokenizerError> {
        let bytes = |name: &str| side_file(name).map(read).transpose();
        let json = |name: &str| bytes(name)?.map(|file| object(&file)).transpose();
        let tokenizer = bytes("tokenizer.json")?;
        Ok(Self {
            tokenizer: match &tokenizer {
                None => None,
                Some(file) => Some(Read {
                    content: object(file)?,
                    path: file.path.clone(),
                }),
            },
            tokenizer_bytes: tokenizer.map(|file| file.content).unwrap_or_default(),
            pieces: bytes("tokenizer.model")?,
            tokenizer_config: json("tokenizer_config.json")?.unwrap_or_default(),
            added_tokens: json("added_tokens.json")?.unwrap_or_default(),
            config: json("config.json")?.unwrap_or_default(),
            chat_template: match bytes("chat_template.jinja")? {
                Some(file) => Some(templates(file)?),
                None => json("chat_template.json")?.and_then(|mut it| it.remove("chat_template")),
            },
        })
    }

    /// The same in a directory.
    ///
    /// # Errors
    /// As [`TokenizerFolder::find`].
    pub fn open(directory: &Path) -> Result<Self, TokenizerError> {
        Self::find(|name| Some(directory.join(name)).filter(|path| path.is_file()))
    }
}

/// The default template, and those of the folder beside it, by their names.
fn templates(file: Read<Vec<u8>>) -> Result<Value, TokenizerError> {
    let folder = file.path.with_file_name("additional_chat_templates");
    let default = text(file)?;
    let mut others = Vec::new();
    if folder.is_dir() {
        let entries = fs::read_dir(&folder).and_then(Iterator::collect::<Result<Vec<_>, _>>);
        let entries = entries.map_err(|source| TokenizerError::Io {
            path: folder,
            source,
        })?;
        let mut paths: Vec<PathBuf> = entries.into_iter().map(|entry| entry.path()).collect();
        paths.retain(|path| path.extension().is_some_and(|it| it == "jinja"));
        paths.sort();
        for path in paths {
            let name = path
                .file_stem()
                .map(|name| name.to_string_lossy().into_owned());
            others.push((name.unwrap_or_default(), text(read(path)?)?));
        }
    }
    if others.is_empty() {
        return Ok(Value::String(default));
    }
    let all = [("default".to_owned(), default)].into_iter().chain(others);
    Ok(all
        .map(|(name, template)| serde_json::json!({"name": name, "template": template}))
        .collect())
}

fn read(path: PathBuf) -> Result<Read<Vec<u8>>, TokenizerError> {
    match fs::read(&path) {
        Ok(content) => Ok(Read { path, content }),
        Err(source) => Err(TokenizerError::Io { path, source }),
    }
}

fn text(file: Read<Vec<u8>>) -> Result<String, TokenizerError> {
    String::from_utf8(file.content).map_err(|source| TokenizerError::NotText {
        path: file.path,
        source,
    })
}

fn object(file: &Read<Vec<u8>>) -> Result<Map<String, Value>, TokenizerError> {
    serde_json::from_slice(&file.content).map_err(|source| TokenizerError::NotJson {
        path: file.path.clone(),
        source,
    })
}
