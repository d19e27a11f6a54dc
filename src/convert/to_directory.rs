//! A GGUF file as a Hugging Face directory.

use panacea_formats::{
    Checkpoint, Dtype, INDEX_FILE, Observer, OutputError, TensorView, WEIGHTS_FILE,
    safetensors_header,
};
use serde_json::{Map, Value, json};

use super::config::{from_gguf, generation_config};
use super::names::{Architecture, HeadRows, Source};
use super::tokenizer;
use super::write::{Content, Planned, RowOrder, stream};
use super::{ConvertError, StoredModel};
use crate::model::{Config, check_tensors};

/// A directory, ready to be written.
#[derive(Debug)]
pub struct ToDirectory<'c> {
    checkpoint: &'c Checkpoint,
    /// Files of weights with their tensors, each sorted by name.
    weights: Vec<(String, Vec<Planned<'c>>)>,
    /// The other files, by name, with their contents.
    texts: Vec<(String, String)>,
}

impl<'c> ToDirectory<'c> {
    /// Plans the directory that `checkpoint`, a GGUF file, becomes: with tensors of type `dtype`, in files of at most `max_shard_bytes` or
    /// one tensor each, or in one.
    ///
    /// # Errors
    /// When the metadata makes no config or tokenizer, or tensors are not what the config asks for.
    pub fn plan(
        checkpoint: &'c Checkpoint,
        dtype: Dtype,
        max_shard_bytes: Option<u64>,
    ) -> Result<Self, ConvertError> {
        let metadata = checkpoint.gguf_metadata().ok_or(ConvertError::Layout)?;
        let stored = StoredModel::of(checkpoint)?;
        let architecture = stored.architecture();
        let mut config = from_gguf(metadata, &|name| checkpoint.tensor(name))?;
        config.insert("dtype".to_owned(), json!(name_in_config(dtype)));
        let generation = generation_config(metadata)?;
        let config = Value::Object(config);
        let parsed = Config::parse(&config.to_string())?;
        check_tensors(&parsed, stored.tensors(checkpoint))?;
        let mut tensors = planned(checkpoint, architecture, parsed.head_dim, dtype)?;
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        let found = tokenizer::from_metadata(metadata)?;
        let mut texts = vec![
            ("config.json".to_owned(), pretty(&config)),
            ("generation_config.json".to_owned(), pretty(&generation)),
            ("tokenizer.json".to_owned(), found.tokenizer),
            (
                "tokenizer_config.json".to_owned(),
                pretty(&found.tokenizer_config),
            ),
        ];
        if let Some(template) = found.chat_template {
            texts.push(("chat_template.jinja".to_owned(), template));
        }
        let weights = shards(tensors, max_shard_bytes);
        if weights.len() > 1 {
            texts.push((INDEX_FILE.to_owned(), index(&weights)));
        }
        texts.sort();
        Ok(Self {
            checkpoint,
            weights,
            texts,
        })
    }

    /// Files that are no weights, by name, with their contents.
    pub fn texts(&self) -> impl Iterator<Item = (&str, &str)> {
        let texts = self.texts.iter();
        texts.map(|(name, text)| (name.as_str(), text.as_str()))
    }

    /// How many tensors there are.
    pub fn tensors(&self) -> usize {
        self.weights.iter().map(|(_, tensors)| tensors.len()).sum()
    }

    /// The files of weights, with how long each will be.
    pub fn weights(&self) -> impl ExactSizeIterator<Item = (&str, u64)> {
        self.weights.iter().map(|(name, tensors)| {
            let data: usize = tensors.iter().map(Planned::bytes).sum();
            (name.as_str(), (header(tensors).len() + data) as u64)
        })
    }

    /// Hands the bytes of file number `file` of [`Self::weights`] to `write`, piece by piece.
    ///
    /// # Errors
    /// When a value cannot be held by its type, the source changed, or `write` fails.
    pub fn write(
        &self,
        file: usize,
        observer: &impl Observer,
        mut write: impl FnMut(&[u8]) -> Result<(), OutputError> + Send,
    ) -> Result<(), ConvertError> {
        let Some((_, tensors)) = self.weights.get(file) else {
            return Ok(());
        };
        write(&header(tensors))?;
        let mut end = 0;
        let offsets: Vec<usize> = tensors
            .iter()
            .map(|tensor| {
                let begin = end;
                end += tensor.bytes();
                begin
            })
            .collect();
        stream(tensors, &offsets, self.checkpoint, observer, &mut write)?;
        self.checkpoint.check_unchanged()?;
        Ok(())
    }
}

/// Every tensor under its name, with what has to happen to it.
fn planned<'c>(
    checkpoint: &'c Checkpoint,
    architecture: &'static Architecture,
    head_dim: usize,
    dtype: Dtype,
) -> Result<Vec<Planned<'c>>, ConvertError> {
    let mut planned = Vec::new();
    for tensor in checkpoint.tensors() {
        let mut add = |name: String, part: TensorView<'c>, shape: &[usize]| {
            let order = match architecture.reordered_rows(tensor.name) {
                Some(HeadRows::Query | HeadRows::Key) => RowOrder::Halved(head_dim),
                None => RowOrder::Same,
            };
            let offset = match architecture.is_offset(tensor.name) {
                true => -1.0,
                false => 0.0,
            };
            planned.push(Planned {
                name,
                dtype,
                shape: shape.to_vec(),
                content: Content::Stored {
                    parts: vec![part],
                    order,
                    offset,
                },
            });
        };
        match architecture.source(tensor.name) {
            Some(Source::Whole(name)) => add(name, tensor, tensor.shape),
            Some(Source::Experts(names)) => {
                // A stack has three dimensions: that of the experts, and those of a matrix.
                let [experts, matrix @ ..] = tensor.shape else {
                    continue;
                };
                let bytes = tensor.bytes.len() / (*experts).max(1);
                for (expert, bytes) in tensor.bytes.chunks(bytes.max(1)).enumerate() {
                    let part = TensorView {
                        shape: matrix,
                        bytes,
                        ..tensor
                    };
                    add(names.name(expert), part, matrix);
                }
            }
            Some(Source::Derived) => {}
            None => {
                return Err(ConvertError::NoPlace {
                    tensor: tensor.name.to_owned(),
                    architecture: architecture.name,
                });
            }
        }
    }
    Ok(planned)
}

/// Divides tensors into files, in order, each filled as far as it goes.
fn shards(tensors: Vec<Planned<'_>>, most: Option<u64>) -> Vec<(String, Vec<Planned<'_>>)> {
    let mut files: Vec<Vec<Planned<'_>>> = Vec::new();
    let mut filled = 0;
    for tensor in tensors {
        let bytes = tensor.bytes() as u64;
        match files.last_mut() {
            Some(file) if most.is_none_or(|most| filled + bytes <= most) => {
                filled += bytes;
                file.push(tensor);
            }
            _ => {
                filled = bytes;
                files.push(vec![tensor]);
            }
        }
    }
    let count = files.len();
    let name = |i: usize| match count {
        1 => WEIGHTS_FILE.to_owned(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
    };
    let named = files.into_iter().enumerate();
    named.map(|(i, tensors)| (name(i), tensors)).collect()
}

/// The index of several files of weights, as transformers writes it.
fn index(weights: &[(String, Vec<Planned<'_>>)]) -> String {
    let mut map = Map::new();
    let (mut bytes, mut elements) = (0, 0);
    for (file, tensors) in weights {
        for tensor in tensors {
            map.insert(tensor.name.clone(), json!(file));
            bytes += tensor.bytes();
            elements += tensor.rows() * tensor.columns();
        }
    }
    let metadata = json!({"total_parameters": elements, "total_size": bytes});
    pretty(&json!({"metadata": metadata, "weight_map": map}))
}

fn header(tensors: &[Planned<'_>]) -> Vec<u8> {
    let described = tensors
        .iter()
        .map(|it| (it.name.as_str(), it.dtype, it.shape.as_slice(), it.bytes()));
    safetensors_header(("format", "pt"), described)
}

/// JSON as transformers writes it: keys sorted, two spaces for each level, a newline at the end.
fn pretty(value: &Value) -> String {
    format!("{:#}\n", sorted(value))
}

/// The same with the keys of every object sorted.
fn sorted(value: &Value) -> Value {
    match value {
        Value::Object(members) => {
            let mut members: Vec<_> = members.iter().collect();
            members.sort_by_key(|(key, _)| key.as_str());
            let members = members.into_iter();
            Value::Object(
                members
                    .map(|(key, value)| (key.clone(), sorted(value)))
                    .collect(),
            )
        }
        Value::Array(items) => Value::Array(items.iter().map(sorted).collect()),
        other => other.clone(),
    }
}

/// What a config calls a float type.
fn name_in_config(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F16 => "float16",
        Dtype::BF16 => "bfloat16",
        _ => "float32",
    }
}
