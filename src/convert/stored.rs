//! A GGUF checkpoint as the model that it holds, without converting it.
//!
//! In: an open checkpoint in GGUF. Out: its tensors under the names that the decoder asks for, each still where it is and in its own
//! type, and the config to compute with them as they are: queries and keys whose neighbors turn together, norms that include their
//! offset. A perturbation found so is one of the stored tensors, in the order of their rows.

use panacea_formats::{Checkpoint, TensorView, gguf::Metadata};
use serde_json::Value;
use thiserror::Error;

use super::config::{GgufConfigError, from_gguf, generation_config};
use super::names::{Architecture, Source, UnknownArchitecture};
use super::tokenizer::{self, TokenizerError};
use crate::data::{Text, TokenizerFiles};
use crate::model::{Config, ConfigError};

/// The tensors of a GGUF checkpoint under the decoder's names.
#[derive(Debug)]
pub struct StoredModel {
    architecture: &'static Architecture,
    tensors: Vec<Renamed>,
}

/// A tensor, or one of the matrices that are stacked in it.
#[derive(Debug)]
struct Renamed {
    /// What the decoder calls it.
    name: String,
    /// What the file calls it.
    stored: String,
    /// Which of how many in the stack.
    expert: Option<(usize, usize)>,
}

impl StoredModel {
    /// The model in `checkpoint`.
    ///
    /// # Errors
    /// When it is no GGUF checkpoint of a known architecture, or holds a tensor that this architecture does not have.
    pub fn of(checkpoint: &Checkpoint) -> Result<Self, StoredModelError> {
        let architecture = architecture(checkpoint.gguf_metadata())?;
        let mut tensors = Vec::new();
        for tensor in checkpoint.tensors() {
            let stored = tensor.name.to_owned();
            match architecture.source(&stored) {
                Some(Source::Whole(name)) => tensors.push(Renamed {
                    name,
                    stored,
                    expert: None,
                }),
                Some(Source::Experts(names)) => {
                    let count = tensor.shape.first().copied().unwrap_or(0);
                    tensors.extend((0..count).map(|expert| Renamed {
                        name: names.name(expert),
                        stored: stored.clone(),
                        expert: Some((expert, count)),
                    }));
                }
                Some(Source::Derived) => {}
                None => {
                    return Err(StoredModelError::Tensor {
                        name: stored,
                        architecture: architecture.name,
                    });
                }
            }
        }
        Ok(Self {
            architecture,
            tensors,
        })
    }

    /// How the file names its tensors.
    pub fn architecture(&self) -> &'static Architecture {
        self.architecture
    }

    /// The config to compute with the tensors of `checkpoint`, which is the one that `self` was made of.
    ///
    /// # Errors
    /// When the metadata asks for what this decoder cannot do, or does not make a model.
    pub fn config(&self, checkpoint: &Checkpoint) -> Result<Config, StoredModelError> {
        let metadata = checkpoint
            .gguf_metadata()
            .ok_or(StoredModelError::NoArchitecture)?;
        let config = from_gguf(metadata, &|name| checkpoint.tensor(name))?;
        let config = Config::parse(&Value::Object(config).to_string())?;
        Ok(config.over_gguf(self.architecture.reordered))
    }

    /// The tokenizer of `checkpoint`, which is the one that `self` was made of, in a tokenizer's files.
    ///
    /// # Errors
    /// When the metadata makes no tokenizer, or one whose splitting of texts is not known.
    pub fn tokenizer(&self, checkpoint: &Checkpoint) -> Result<TokenizerFiles, StoredModelError> {
        let metadata = checkpoint
            .gguf_metadata()
            .ok_or(StoredModelError::NoArchitecture)?;
        let texts = tokenizer::from_metadata(metadata)?;
        let held = |name: &str, text: String| Text::Held {
            name: checkpoint.path().join(name),
            bytes: text.into_bytes(),
        };
        Ok(TokenizerFiles {
            tokenizer: held("tokenizer.json", texts.tokenizer),
            tokenizer_config: Some(held(
                "tokenizer_config.json",
                texts.tokenizer_config.to_string(),
            )),
            special_tokens_map: None,
            chat_template: texts
                .chat_template
                .map(|template| held("chat_template.jinja", template)),
            generation_config: Some(held(
                "generation_config.json",
                generation_config(metadata)?.to_string(),
            )),
            config: None,
        })
    }

    /// The tensors of `checkpoint`, which is the one that `self` was made of, under the decoder's names.
    pub fn tensors<'c>(
        &'c self,
        checkpoint: &'c Checkpoint,
    ) -> impl Iterator<Item = TensorView<'c>> {
        self.tensors.iter().filter_map(|renamed| {
            let whole = checkpoint.tensor(&renamed.stored)?;
            let view = match renamed.expert {
                None => whole,
                Some((expert, count)) => {
                    let bytes = whole.bytes.len() / count;
                    TensorView {
                        shape: whole.shape.get(1..)?,
                        bytes: whole.bytes.get(expert * bytes..)?.get(..bytes)?,
                        ..whole
                    }
                }
            };
            Some(TensorView {
                name: &renamed.name,
                ..view
            })
        })
    }

    /// What the file calls the tensor that the decoder calls `name`; nothing for one that is a part of a stack.
    pub fn stored_name(&self, name: &str) -> Option<&str> {
        let renamed = self.tensors.iter().find(|it| it.name == name)?;
        renamed.expert.is_none().then_some(renamed.stored.as_str())
    }
}

fn architecture(metadata: Option<&Metadata>) -> Result<&'static Architecture, StoredModelError> {
    let name = metadata
        .and_then(|metadata| metadata.value(ARCHITECTURE)?.as_text())
        .ok_or(StoredModelError::NoArchitecture)?;
    Ok(Architecture::named(name)?)
}

const ARCHITECTURE: &str = "general.architecture";

/// Why the decoder cannot compute with a GGUF checkpoint.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StoredModelError {
    /// Metadata that says what no config of the family can say.
    #[error(transparent)]
    Metadata(#[from] GgufConfigError),
    /// Metadata that makes no tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// Metadata that makes a model which this decoder cannot compute.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Metadata without the architecture, or no metadata.
    #[error("`{ARCHITECTURE}` is missing, or no text")]
    NoArchitecture,
    /// A tensor that nothing is known of.
    #[error(
        "tensor `{}` has no place in a model of architecture `{architecture}`",
        panacea_formats::shown(name)
    )]
    Tensor {
        /// Its name.
        name: String,
        /// The architecture.
        architecture: &'static str,
    },
    /// An architecture without a decoder here.
    #[error(transparent)]
    Architecture(#[from] UnknownArchitecture),
}
