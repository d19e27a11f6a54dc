//! A Hugging Face checkpoint as a GGUF file.

use std::collections::{BTreeMap, HashMap};

use panacea_formats::gguf::{
    GgufLayout, GgufWriteError, Metadata, SPLIT_COUNT, SPLIT_NUMBER, SPLIT_TENSORS, TensorInfo,
    Value,
};
use panacea_formats::{Checkpoint, Layout, TensorView};

use super::config::GgufConfig;
use super::conversion::{Conversion, PlannedFile, divided};
use super::general::{Origins, Size, general};
use super::names::{HeadRows, Place};
use super::types::{FileType, ModelFacts, choose};
use super::write::{Content, Planned, RowOrder};
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

/// What a GGUF file is to be.
#[derive(Clone, Copy, Debug)]
pub struct GgufSettings<'a> {
    /// The type of most of its tensors.
    pub file_type: FileType,
    /// The type that patched ones have at least.
    pub patched: Option<&'a PatchedType>,
    /// The file's name without its extension.
    pub stem: &'a str,
    /// What a part may have; one file without.
    pub max_shard_bytes: Option<u64>,
}

impl<'c> Conversion<'c> {
    /// Plans the GGUF file that `checkpoint`, a whole model, becomes.
    ///
    /// # Errors
    /// When config, tensors and tokenizer do not make one model, or one that GGUF has no place for.
    pub fn to_gguf(
        checkpoint: &'c Checkpoint,
        texts: Texts<'_>,
        settings: GgufSettings<'_>,
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
        let file_type = settings.file_type;
        let mut types = choose(file_type, facts, &shapes);
        for (slot, dtype) in slots.iter().zip(&mut types) {
            if let Some(patched) = settings.patched
                && slot.sources.iter().any(|name| patched.was_patched(name))
            {
                *dtype = patched.at_least(*dtype, &slot.name, &slot.shape)?;
            }
        }
        let size = Size::of(shapes.iter().copied());
        let general = general(texts.origins, size);
        let mut metadata = config.metadata(&general, file_type.number());
        for (key, value) in texts.tokenizer.iter() {
            metadata.set(key, value.clone());
        }
        if !file_type.is_converters() {
            // llama-quantize sets these two anew, and so they come last.
            for key in ["general.quantization_version", "general.file_type"] {
                if let Some(value) = metadata.value(key).cloned() {
                    metadata.remove(key);
                    metadata.set(key, value);
                }
            }
        }
        let tensors = slots.into_iter().zip(types).map(|(slot, dtype)| Planned {
            name: slot.name,
            dtype,
            shape: slot.shape,
            content: slot.content,
        });
        Ok(Self {
            checkpoint,
            weights: files(tensors, &metadata, settings.stem, settings.max_shard_bytes)?,
            texts: Vec::new(),
            losses: config.losses,
            left_out,
        })
    }
}

/// Divides tensors into the parts of a file, of which the first has all keys, and each which part it is.
pub(super) fn files<'c>(
    tensors: impl ExactSizeIterator<Item = Planned<'c>>,
    metadata: &Metadata,
    stem: &str,
    max_shard_bytes: Option<u64>,
) -> Result<Vec<PlannedFile<'c>>, ConvertError> {
    let total = tensors.len();
    let parts = divided(tensors, max_shard_bytes, Planned::bytes);
    let count = parts.len();
    let mut files = Vec::with_capacity(count);
    for (i, tensors) in parts.into_iter().enumerate() {
        let mut keys = match i {
            0 => metadata.clone(),
            _ => Metadata::default(),
        };
        let mut name = format!("{stem}.gguf");
        if count > 1 {
            let (Ok(part), Ok(parts), Ok(total)) =
                (u16::try_from(i), u16::try_from(count), i32::try_from(total))
            else {
                return Err(ConvertError::TooManyParts { parts: count });
            };
            keys.set(SPLIT_NUMBER, Value::U16(part));
            keys.set(SPLIT_COUNT, Value::U16(parts));
            keys.set(SPLIT_TENSORS, Value::I32(total));
            name = format!("{stem}-{:05}-of-{count:05}.gguf", i + 1);
        }
        let infos: Result<Vec<TensorInfo>, GgufWriteError> = tensors
            .iter()
            .map(|it| TensorInfo::new(&it.name, it.dtype, &it.shape))
            .collect();
        let layout = GgufLayout::new(&keys, &infos?)?;
        files.push(PlannedFile {
            name,
            header: layout.header().to_vec(),
            places: layout.places().iter().map(|place| place.start).collect(),
            length: layout.length(),
            tensors,
        });
    }
    Ok(files)
}

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
