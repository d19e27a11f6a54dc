//! A Hugging Face checkpoint as a GGUF file.

use std::collections::{BTreeMap, HashMap};

use panacea_formats::gguf::{Metadata, Value};
use panacea_formats::{Checkpoint, Dtype, Layout, Observer, OutputError, TensorView};

use super::config::GgufConfig;
use super::general::{Origins, Size, general};
use super::header::header;
use super::names::{HeadRows, Place};
use super::types::{FileType, ModelFacts, choose};
use super::write::{Content, Planned, RowOrder, stream};
use super::{ConvertError, PatchedType};
use crate::model::{check_tensors, decoder_prefix};

/// What a GGUF file is made of besides tensors.
#[derive(Clone, Copy, Debug)]
pub struct Texts<'a> {
    /// The text of `config.json`.
    pub config: &'a str,
    /// Name, license and the like.
    pub origins: Origins<'a>,
    /// The keys of the tokenizer.
    pub tokenizer: &'a Metadata,
}

/// A GGUF file, or the parts of one, ready to be written.
#[derive(Debug)]
pub struct ToGguf<'c> {
    checkpoint: &'c Checkpoint,
    metadata: Metadata,
    tensors: Vec<Planned<'c>>,
    /// What the checkpoint says and the file cannot, in words.
    pub losses: Vec<String>,
    /// How many tensors belong to other towers than the decoder, and are left out.
    pub left_out: usize,
}

impl<'c> ToGguf<'c> {
    /// Plans the file of type `file` that `checkpoint` becomes. Tensors that `patched` names get a type as fine as it says.
    ///
    /// # Errors
    /// When config, tensors and tokenizer do not make one model, or one that GGUF has no place for.
    pub fn plan(
        checkpoint: &'c Checkpoint,
        texts: Texts<'_>,
        file: FileType,
        patched: Option<&PatchedType>,
    ) -> Result<Self, ConvertError> {
        if !matches!(
            checkpoint.layout(),
            Layout::Directory | Layout::LoneFile | Layout::Sharded
        ) {
            return Err(ConvertError::Layout);
        }
        let GgufPlan {
            config,
            mut slots,
            left_out,
        } = GgufPlan::of(checkpoint, texts.config)?;
        cut_vocabulary(&config, texts.tokenizer, &mut slots)?;
        let shapes: Vec<(&str, &[usize])> = slots
            .iter()
            .map(|slot| (slot.name.as_str(), slot.shape.as_slice()))
            .collect();
        let model = &config.config;
        let facts = ModelFacts {
            architecture: config.architecture.name,
            blocks: model.num_hidden_layers(),
            heads: model.num_attention_heads,
            key_heads: model.num_key_value_heads,
            experts: model.experts.map_or(0, |experts| experts.count),
        };
        let mut types = choose(file, facts, &shapes);
        for (slot, dtype) in slots.iter().zip(&mut types) {
            if let Some(patched) = patched
                && slot.sources.iter().any(|name| patched.was_patched(name))
            {
                *dtype = patched.at_least(*dtype, &slot.name, &slot.shape)?;
            }
        }
        let size = Size::of(shapes.iter().copied());
        let general = general(texts.origins, size);
        let mut metadata = config.metadata(&general, file.number());
        for (key, value) in texts.tokenizer.iter() {
            metadata.set(key, value.clone());
        }
        let tensors = slots.into_iter().zip(types).map(|(slot, dtype)| Planned {
            name: slot.name,
            dtype,
            shape: slot.shape,
            content: slot.content,
        });
        Ok(Self {
            checkpoint,
            metadata,
            tensors: tensors.collect(),
            losses: config.losses,
            left_out,
        })
    }

    /// Names, types and shapes, outermost dimension first, in the order of the file.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = (&str, Dtype, &[usize])> {
        self.tensors
            .iter()
            .map(|it| (it.name.as_str(), it.dtype, it.shape.as_slice()))
    }

    /// The keys and values.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// How long the file will be.
    pub fn bytes(&self) -> u64 {
        let (header, offsets) = self.header();
        let last = offsets.last().zip(self.tensors.last());
        let data = last.map_or(0, |(offset, tensor)| offset + tensor.bytes());
        (header.len() + data.next_multiple_of(ALIGNMENT)) as u64
    }

    fn header(&self) -> (Vec<u8>, Vec<usize>) {
        let described: Vec<_> = self
            .tensors
            .iter()
            .map(|it| (it.name.as_str(), it.dtype, it.shape.as_slice(), it.bytes()))
            .collect();
        header(&self.metadata, &described)
    }

    /// Hands the file to `write`, piece by piece.
    ///
    /// # Errors
    /// When a value cannot be held by its type, the source changed, or `write` fails.
    pub fn write(
        &self,
        observer: &impl Observer,
        mut write: impl FnMut(&[u8]) -> Result<(), OutputError> + Send,
    ) -> Result<(), ConvertError> {
        let (header, offsets) = self.header();
        write(&header)?;
        stream(
            &self.tensors,
            &offsets,
            self.checkpoint,
            observer,
            &mut write,
        )?;
        if let Some((offset, tensor)) = offsets.last().zip(self.tensors.last()) {
            let end = offset + tensor.bytes();
            write(&vec![0; end.next_multiple_of(ALIGNMENT) - end])?;
        }
        self.checkpoint.check_unchanged()?;
        Ok(())
    }
}

const ALIGNMENT: usize = 32;

/// A tensor of the file before its type is chosen.
struct Slot<'c> {
    name: String,
    shape: Vec<usize>,
    content: Content<'c>,
    /// What the checkpoint calls what is in it.
    sources: Vec<String>,
}

struct GgufPlan<'c> {
    config: GgufConfig,
    slots: Vec<Slot<'c>>,
    left_out: usize,
}

impl<'c> GgufPlan<'c> {
    fn of(checkpoint: &'c Checkpoint, config: &str) -> Result<Self, ConvertError> {
        let config = GgufConfig::parse(config)?;
        check_tensors(&config.config, checkpoint.tensors())?;
        let architecture = config.architecture;
        let prefix = decoder_prefix(|name| checkpoint.tensor(name).is_some()).unwrap_or("model.");
        let derived = config.derived.iter().map(|derived| Slot {
            name: derived.name.to_owned(),
            shape: vec![derived.values.len()],
            content: Content::Made(derived.values.clone()),
            sources: Vec::new(),
        });
        let mut slots: Vec<Slot<'c>> = derived.collect();
        let mut stacks: HashMap<String, usize> = HashMap::new();
        // Of each stack, the expert and the matrix.
        let mut members: BTreeMap<usize, BTreeMap<usize, TensorView<'c>>> = BTreeMap::new();
        let mut left_out = 0;
        for tensor in checkpoint.tensors() {
            let Some(name) = of_decoder(tensor.name, prefix) else {
                left_out += 1;
                continue;
            };
            if name == "lm_head.weight" && config.config.tie_word_embeddings {
                // What loaders do not read, either.
                continue;
            }
            match architecture.place(&name) {
                Some(Place::Whole(place)) => {
                    let dim = config.config.head_dim;
                    let order = match architecture.reordered_rows(&place) {
                        Some(HeadRows::Query | HeadRows::Key) => RowOrder::Interleaved(dim),
                        None => RowOrder::Same,
                    };
                    let offset = if architecture.is_offset(&place) {
                        1.0
                    } else {
                        0.0
                    };
                    slots.push(Slot {
                        name: place,
                        shape: tensor.shape.to_vec(),
                        content: Content::Stored {
                            parts: vec![tensor],
                            order,
                            offset,
                        },
                        sources: vec![tensor.name.to_owned()],
                    });
                }
                Some(Place::Expert { stack, expert }) => {
                    let at = *stacks.entry(stack.clone()).or_insert_with(|| {
                        slots.push(Slot {
                            name: stack,
                            shape: Vec::new(),
                            content: Content::Made(Vec::new()),
                            sources: Vec::new(),
                        });
                        slots.len() - 1
                    });
                    slots[at].sources.push(tensor.name.to_owned());
                    members.entry(at).or_default().insert(expert, tensor);
                }
                Some(Place::Derived) => {}
                None => {
                    return Err(ConvertError::NoPlace {
                        tensor: tensor.name.to_owned(),
                        architecture: architecture.name,
                    });
                }
            }
        }
        for (at, experts) in members {
            let slot = &mut slots[at];
            let parts: Vec<TensorView<'c>> = experts.into_values().collect();
            let shape = parts.first().map_or(&[][..], |part| part.shape);
            // That all are there and of one shape was checked against the config; that they are of one type was not.
            let dtype = parts.first().map(|part| part.dtype);
            if let Some(other) = parts.iter().find(|part| Some(part.dtype) != dtype) {
                return Err(ConvertError::MixedExperts {
                    tensor: other.name.to_owned(),
                    dtype: other.dtype,
                });
            }
            slot.shape = std::iter::once(parts.len())
                .chain(shape.iter().copied())
                .collect();
            slot.content = Content::Stored {
                parts,
                order: RowOrder::Same,
                offset: 0.0,
            };
        }
        Ok(Self {
            config,
            slots,
            left_out,
        })
    }
}

/// The name that a tensor of the decoder has in a model with one tower.
fn of_decoder(name: &str, prefix: &str) -> Option<String> {
    let head = "lm_head.weight";
    if name == head || name == "language_model.lm_head.weight" {
        return Some(head.to_owned());
    }
    let rest = name.strip_prefix(prefix)?;
    Some(format!("model.{rest}"))
}

/// Cuts rows of the embedding for which there is no token, as the converter does for Gemma 3; of other models they must be as many.
fn cut_vocabulary(
    config: &GgufConfig,
    tokenizer: &Metadata,
    slots: &mut [Slot<'_>],
) -> Result<(), ConvertError> {
    let tokens = tokenizer.value("tokenizer.ggml.tokens");
    let Some(tokens) = tokens
        .and_then(Value::as_array)
        .and_then(|it| it.as_texts())
    else {
        return Err(ConvertError::NoTokens);
    };
    let rows = config.config.vocab_size;
    let may_cut = config.architecture.name == "gemma3" && tokens.len() < rows;
    if !may_cut && tokens.len() != rows {
        return Err(ConvertError::Vocabulary {
            tokens: tokens.len(),
            rows,
        });
    }
    for slot in slots {
        if ["token_embd.weight", "output.weight"].contains(&slot.name.as_str())
            && let Some(rows) = slot.shape.first_mut()
        {
            *rows = tokens.len();
        }
    }
    Ok(())
}
