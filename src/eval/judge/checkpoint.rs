//! A judge's own checkpoint, opened: weights, config and tokenizer in one value, with a name that no other has.
//!
//! A decoder borrows the tensors it computes with, so that one is made for each piece of work and not kept.

use std::path::{Path, PathBuf};

use panacea_formats::{Checkpoint, Layout, Sha256, TensorView};
use rayon::prelude::*;

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
    digest: Sha256,
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
        let digest = digest(&checkpoint, &files)?;
        Ok(Self {
            digest,
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

    /// What it is called, and a digest of all that decides its verdicts: another checkpoint in its place is another judge, and the same one
    /// elsewhere is the same.
    pub(super) fn name(&self) -> String {
        let path = self.path();
        let name = path.file_name().map_or(path.as_os_str(), |name| name);
        let digest = self.digest.to_string();
        format!("{} sha256={}", name.display(), &digest[..12])
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

/// That of weights, config and the tokenizer's files.
fn digest(checkpoint: &Checkpoint, files: &TokenizerFiles) -> Result<Sha256, JudgeError> {
    let shards = checkpoint.files().par_iter();
    let mut digests: Vec<Sha256> = shards.map(|shard| shard.file.digest()).collect();
    let config = checkpoint.side_file("config.json");
    for path in files.files().chain(config.as_deref()) {
        digests.push(Sha256::of_file(path).map_err(|source| JudgeError::Io {
            path: path.to_owned(),
            source,
        })?);
    }
    let text: String = digests.iter().map(|it| format!("{it}\n")).collect();
    Ok(Sha256::of(text.as_bytes()))
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
