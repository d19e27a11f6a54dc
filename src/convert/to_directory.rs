//! A GGUF file as a Hugging Face directory.

use panacea_formats::{
    Checkpoint, Dtype, INDEX_FILE, TensorView, WEIGHTS_FILE, safetensors_header,
};
use serde_json::{Map, Value, json};

use super::config::{from_gguf, generation_config};
use super::conversion::{Conversion, PlannedFile, divided};
use super::names::{Architecture, HeadRows, Source};
use super::tokenizer;
use super::write::{Content, Planned, RowOrder};
use super::{ConvertError, StoredModel};
use crate::manifest::json::pretty;
use crate::model::{Config, check_tensors};

impl<'c> Conversion<'c> {
    /// Plans the directory that `checkpoint`, a GGUF file, becomes: with tensors of the float type `dtype`, in files of at most
    /// `max_shard_bytes` or one tensor each, or in one.
    ///
    /// # Errors
    /// When the metadata makes no config or tokenizer, or tensors are not what the config asks for.
    pub fn to_directory(
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
        let weights = files(tensors, max_shard_bytes);
        if weights.len() > 1 {
            texts.push((INDEX_FILE.to_owned(), index(&weights)));
        }
        texts.sort();
        Ok(Self {
            checkpoint,
            weights,
            texts,
            losses: Vec::new(),
            left_out: 0,
        })
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

/// Divides tensors into files, in order.
fn files<'c>(tensors: Vec<Planned<'c>>, most: Option<u64>) -> Vec<PlannedFile<'c>> {
    let parts = divided(tensors, most, Planned::bytes);
    let count = parts.len();
    let name = |i: usize| match count {
        1 => WEIGHTS_FILE.to_owned(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
    };
    let file = |(i, tensors): (usize, Vec<Planned<'c>>)| {
        let described = tensors
            .iter()
            .map(|it| (it.name.as_str(), it.dtype, it.shape.as_slice(), it.bytes()));
        let header = safetensors_header(("format", "pt"), described);
        let mut length = header.len();
        let mut places = Vec::with_capacity(tensors.len());
        for tensor in &tensors {
            places.push(length);
            length += tensor.bytes();
        }
        PlannedFile {
            name: name(i),
            header,
            places,
            length,
            tensors,
        }
    };
    parts.into_iter().enumerate().map(file).collect()
}

/// The index of several files of weights, as transformers writes it.
fn index(weights: &[PlannedFile<'_>]) -> String {
    let mut map = Map::new();
    let (mut bytes, mut elements) = (0, 0);
    for file in weights {
        for tensor in &file.tensors {
            map.insert(tensor.name.clone(), json!(file.name));
            bytes += tensor.bytes();
            elements += tensor.rows() * tensor.columns();
        }
    }
    let metadata = json!({"total_parameters": elements, "total_size": bytes});
    pretty(&json!({"metadata": metadata, "weight_map": map}))
}

/// What a config calls a float type.
fn name_in_config(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F16 => "float16",
        Dtype::BF16 => "bfloat16",
        _ => "float32",
    }
}
