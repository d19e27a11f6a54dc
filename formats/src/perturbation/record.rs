//! The record in a perturbation's metadata: text in, a typed value out, and back.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::PerturbationError;
use crate::checkpoint::{Checkpoint, Layout};
use crate::digest::Sha256;
use crate::dtype::Dtype;
use crate::json::{JsonError, canonical, parse_strict};
use crate::tensor::TensorView;

/// The version of the record that is written, and the only one that is read.
pub const FORMAT_VERSION: u64 = 1;

/// The direction that is written, and the only one that is read.
pub const DIRECTION: &str = "restores-safety";

/// How a perturbation was made, and for which tensors.
#[derive(Clone, Debug, PartialEq)]
pub struct PerturbationRecord {
    /// How it was found.
    pub method: String,
    /// The settings of the method.
    pub parameters: Map<String, Value>,
    /// Of every random choice.
    pub seed: u64,
    /// What the tensors are added to.
    pub space: Space,
    /// The tensors that it is for, by name.
    pub base: BTreeMap<String, BaseTensor>,
    /// What it was found from.
    pub data: Vec<DataSource>,
    /// What wrote it, with its version.
    pub tool: String,
}

/// What the tensors of a perturbation are added to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Space {
    /// The A and B of a LoRA adapter, under the adapter's own names for them.
    Adapter,
    /// The weights themselves.
    Weights,
}

impl Space {
    /// What perturbations of `checkpoint` are added to.
    pub fn of(checkpoint: &Checkpoint) -> Self {
        match checkpoint.layout() {
            Layout::Adapter => Self::Adapter,
            Layout::Directory
            | Layout::Gguf
            | Layout::LoneFile
            | Layout::Sharded
            | Layout::SplitGguf => Self::Weights,
        }
    }
}

impl fmt::Display for Space {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Adapter => "adapter",
            Self::Weights => "weights",
        })
    }
}

/// A tensor that a perturbation was made for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BaseTensor {
    /// Its element type.
    #[serde(with = "dtype_name")]
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
    /// The digest of its stored bytes.
    pub sha256: Sha256,
}

impl BaseTensor {
    /// Describes `tensor`. Costs one pass over its bytes.
    pub fn of(tensor: &TensorView<'_>) -> Self {
        Self {
            dtype: tensor.dtype,
            shape: tensor.shape.to_vec(),
            sha256: tensor.digest(),
        }
    }
}

/// A data set that a perturbation was found from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataSource {
    /// `harmful`, `task`, `benign` or `refusals`.
    pub role: String,
    /// The file's name, without its folders.
    pub name: String,
    /// The file's digest.
    pub sha256: Sha256,
    /// How many of its rows were used.
    pub rows: usize,
}

/// The fields whose meaning the version fixes, as they are stored.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    format_version: u64,
    method: String,
    parameters: Map<String, Value>,
    direction: String,
    seed: u64,
    space: Space,
    base: BTreeMap<String, BaseTensor>,
    data: Vec<DataSource>,
    tool: String,
}

impl PerturbationRecord {
    pub(super) fn parse(text: &str) -> Result<Self, PerturbationError> {
        let syntax = |source: JsonError| PerturbationError::RecordSyntax { source };
        let value = parse_strict(text).map_err(syntax)?;
        // These first: of a record from a later version, nothing else can be judged.
        let version = &value["format_version"];
        if version != &json!(FORMAT_VERSION) {
            return Err(PerturbationError::Version {
                found: version.to_string(),
            });
        }
        let said = |field: &str| match &value[field] {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        if said("direction") != DIRECTION {
            return Err(PerturbationError::Direction {
                found: said("direction"),
            });
        }
        let spaces = [Space::Adapter, Space::Weights];
        if !spaces
            .iter()
            .any(|space| said("space") == space.to_string())
        {
            return Err(PerturbationError::Space {
                found: said("space"),
            });
        }
        let stored: Stored =
            serde_json::from_value(value).map_err(|error| syntax(JsonError::from(error)))?;
        Ok(Self {
            method: stored.method,
            parameters: stored.parameters,
            seed: stored.seed,
            space: stored.space,
            base: stored.base,
            data: stored.data,
            tool: stored.tool,
        })
    }

    /// The record as it is stored: canonical JSON, the same bytes for the same record.
    pub fn to_json(&self) -> String {
        canonical(&json!({
            "format_version": FORMAT_VERSION,
            "method": self.method,
            "parameters": self.parameters,
            "direction": DIRECTION,
            "seed": self.seed,
            "space": self.space,
            "base": self.base,
            "data": self.data,
            "tool": self.tool,
        }))
    }
}

/// Element types by the names that safetensors gives them.
mod dtype_name {
    use std::borrow::Cow;

    use serde::{Deserialize, Deserializer, Serializer};

    use crate::dtype::Dtype;

    #[expect(
        clippy::trivially_copy_pass_by_ref,
        reason = "the signature is serde's"
    )]
    pub(super) fn serialize<S: Serializer>(
        dtype: &Dtype,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(dtype.name())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Dtype, D::Error> {
        Cow::<'de, str>::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}
