//! A judge's own checkpoint, opened: weights, config and tokenizer in one value.
//!
//! A decoder borrows the tensors it computes with, so that one is made for each piece of work and not kept.

use std::path::{Path, PathBuf};

use panacea_formats::{Checkpoint, Layout, TensorView};

use super::JudgeError;
use crate::convert::StoredModel;
use crate::data::{Encoder, SpecialTokens, Template, TemplateChoice, TokenizerFiles};
use crate::model::{Config, Decoder, TargetSelection};

/// An open checkpoint that is not yet known to make a decoder.
#[derive(Debug)]
pub(super) struct Opened {
    checkpoint: Checkpoint,
    /// Where it is a GGUF file.
    stored: Option<StoredModel>,
    config: Config,
    encoder: Encoder,
}

impl Opened {
    /// Opens the directory or the GGUF file at `path`. Texts are cut to their last `max_length` tokens.
    pub(super) fn open(
        path: &Path,
        template: TemplateChoice,
        max_length: usize,
    ) -> Result<Self, JudgeError> {
        let checkpoint = Checkpoint::open(path)?;
        if checkpoint.layout() == Layout::Adapter {
            return Err(JudgeError::Adapter {
                path: path.to_owned(),
            });
        }
        let in_metadata = |source| JudgeError::Stored {
            path: path.to_owned(),
            source,
        };
        let stored = match checkpoint.layout().is_gguf() {
            true => Some(StoredModel::of(&checkpoint).map_err(in_metadata)?),
            false => None,
        };
        let (config, files) = match &stored {
            Some(stored) => (
                stored.config(&checkpoint).map_err(in_metadata)?,
                stored.tokenizer(&checkpoint).map_err(in_metadata)?,
            ),
            None => {
                let (path, text) = config_text(&checkpoint)?;
                (
                    Config::parse(&text).map_err(|source| JudgeError::Config { path, source })?,
                    TokenizerFiles::find(|name| checkpoint.side_file(name))?,
                )
            }
        };
        let encoder = Encoder::open(&files, template, max_length, config.vocab_size)?;
        Ok(Self {
            checkpoint,
            stored,
            config,
            encoder,
        })
    }

    /// Where it was opened.
    pub(super) fn path(&self) -> &Path {
        self.checkpoint.path()
    }

    /// The path and the text of its `config.json`.
    pub(super) fn config_text(&self) -> Result<(PathBuf, String), JudgeError> {
        config_text(&self.checkpoint)
    }

    /// The resolved config.
    pub(super) fn config(&self) -> &Config {
        &self.config
    }

    pub(super) fn encoder(&self) -> &Encoder {
        &self.encoder
    }

    /// Takes finished texts from now on, with these special tokens.
    pub(super) fn taking_texts(self, special_tokens: SpecialTokens) -> Self {
        Self {
            encoder: self
                .encoder
                .with_template(Template::Raw)
                .with_special_tokens(special_tokens),
            ..self
        }
    }

    /// Its tensors under the decoder's names.
    pub(super) fn tensors(&self) -> Vec<TensorView<'_>> {
        match &self.stored {
            Some(stored) => stored.tensors(&self.checkpoint).collect(),
            None => self.checkpoint.tensors().collect(),
        }
    }

    /// A decoder over them.
    pub(super) fn decoder(&self) -> Result<Decoder<'_>, JudgeError> {
        let selection = TargetSelection::default();
        Decoder::new(self.config.clone(), self.tensors(), &selection).map_err(|source| {
            JudgeError::Weights {
                path: self.path().to_owned(),
                source,
            }
        })
    }
}

fn config_text(checkpoint: &Checkpoint) -> Result<(PathBuf, String), JudgeError> {
    let path = checkpoint
        .side_file("config.json")
        .ok_or_else(|| JudgeError::NoConfig {
            path: checkpoint.path().to_owned(),
        })?;
    match std::fs::read_to_string(&path) {
        Ok(text) => Ok((path, text)),
        Err(source) => Err(JudgeError::Io { path, source }),
    }
}
