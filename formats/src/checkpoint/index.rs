//! `model.safetensors.index.json`: which tensor is in which shard.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde_json::Value;
use thiserror::Error;

use super::{CheckpointError, Shard};
use crate::error::{FormatError, Problems, shown};
use crate::json::parse_strict;

/// Longest index in bytes that is read; one of a million tensors takes about 100 MB.
pub const MAX_INDEX_BYTES: u64 = 100_000_000;

/// Tensor name -> file name, as the index claims.
pub(super) struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Index {
    pub(super) fn read(path: &Path) -> Result<Self, FormatError> {
        let mut bytes = Vec::new();
        File::open(path)
            .and_then(|file| file.take(MAX_INDEX_BYTES + 1).read_to_end(&mut bytes))
            .map_err(|error| FormatError::new(path, error))?;
        Self::parse(&bytes).map_err(|error| FormatError::new(path, error))
    }

    pub(super) fn parse(bytes: &[u8]) -> Result<Self, CheckpointError> {
        if bytes.len() as u64 > MAX_INDEX_BYTES {
            return Err(CheckpointError::IndexTooLong {
                found: bytes.len() as u64,
            });
        }
        let text = std::str::from_utf8(bytes).map_err(|_| CheckpointError::NoWeightMap)?;
        let value = parse_strict(text).map_err(|source| CheckpointError::IndexSyntax { source })?;
        let Value::Object(mut object) = value else {
            return Err(CheckpointError::NoWeightMap);
        };
        let Some(Value::Object(map)) = object.remove("weight_map") else {
            return Err(CheckpointError::NoWeightMap);
        };
        let weight_map = map
            .into_iter()
            .map(|(tensor, shard)| match shard {
                Value::String(shard) => Ok((tensor, shard)),
                _ => Err(CheckpointError::NoWeightMap),
            })
            .collect::<Result<BTreeMap<_, _>, _>>()?;
        if weight_map.is_empty() {
            return Err(CheckpointError::NoWeightMap);
        }
        Ok(Self { weight_map })
    }

    /// The files that the index names, each once, in the order of their names; none of them leads out of the directory.
    pub(super) fn shard_names(&self) -> Result<Vec<&str>, CheckpointError> {
        let mut names: Vec<&str> = self.weight_map.values().map(String::as_str).collect();
        names.sort_unstable();
        names.dedup();
        let outside: Vec<_> = names
            .iter()
            .filter(|name| !is_plain_file_name(name))
            .map(|name| IndexProblem::ShardName {
                shard: (*name).to_owned(),
            })
            .collect();
        Problems::none_of(outside)?;
        Ok(names)
    }

    /// Compares the claims with what the shards hold.
    pub(super) fn check_against(&self, shards: &[Shard]) -> Result<(), CheckpointError> {
        let mut holders: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for shard in shards {
            for tensor in shard.file.tensors() {
                holders.entry(tensor.name).or_default().push(&shard.name);
            }
        }
        let mut problems = Vec::new();
        for (tensor, claimed) in &self.weight_map {
            match holders.get(tensor.as_str()).map(Vec::as_slice) {
                None => problems.push(IndexProblem::TensorMissing {
                    tensor: tensor.clone(),
                    shard: claimed.clone(),
                }),
                Some([holder]) if holder != claimed => {
                    problems.push(IndexProblem::TensorElsewhere {
                        tensor: tensor.clone(),
                        claimed: claimed.clone(),
                        found: (*holder).to_owned(),
                    })
                }
                Some(_) => {}
            }
        }
        for (tensor, holders) in holders {
            if let [first, second, ..] = holders[..] {
                problems.push(IndexProblem::TensorTwice {
                    tensor: tensor.to_owned(),
                    shards: [first.to_owned(), second.to_owned()],
                });
            } else if !self.weight_map.contains_key(tensor) {
                problems.push(IndexProblem::TensorUnlisted {
                    tensor: tensor.to_owned(),
                    shard: holders.concat(),
                });
            }
        }
        Ok(Problems::none_of(problems)?)
    }
}

/// Whether `name` stays in its directory on every platform: no separator, no drive, not `.` or `..`, and safetensors by its end.
fn is_plain_file_name(name: &str) -> bool {
    !name.contains(['/', '\\', ':', '\0'])
        && !name.starts_with('.')
        && Path::new(name)
            .extension()
            .is_some_and(|it| it == "safetensors")
}

/// A disagreement between the index and the shards.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum IndexProblem {
    /// A shard that is not there.
    #[error("shard `{}` is missing", shown(shard))]
    ShardMissing {
        /// Its name in the index.
        shard: String,
    },
    /// A shard whose name leads elsewhere, or is not that of a safetensors file.
    #[error("`{}` is not the plain name of a `.safetensors` file", shown(shard))]
    ShardName {
        /// Its name in the index.
        shard: String,
    },
    /// A tensor that is in another shard.
    #[error(
        "tensor `{}` is said to be in `{}` and is in `{}`",
        shown(tensor),
        shown(claimed),
        shown(found)
    )]
    TensorElsewhere {
        /// The tensor.
        tensor: String,
        /// The shard in the index.
        claimed: String,
        /// The shard that has it.
        found: String,
    },
    /// A tensor that no shard has.
    #[error("tensor `{}` is missing from `{}`", shown(tensor), shown(shard))]
    TensorMissing {
        /// The tensor.
        tensor: String,
        /// The shard in the index.
        shard: String,
    },
    /// A tensor that two shards have.
    #[error("tensor `{}` is in both `{}` and `{}`", shown(tensor), shown(&shards[0]), shown(&shards[1]))]
    TensorTwice {
        /// The tensor.
        tensor: String,
        /// The first two shards that have it.
        shards: [String; 2],
    },
    /// A tensor that the index does not know.
    #[error("tensor `{}` in `{}` is not in the index", shown(tensor), shown(shard))]
    TensorUnlisted {
        /// The tensor.
        tensor: String,
        /// The shard that has it.
        shard: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shard_names_stay_in_their_directory() {
        assert!(is_plain_file_name("model-00001-of-00002.safetensors"));
        for name in [
            "",
            ".",
            "..",
            "../model.safetensors",
            "/etc/model.safetensors",
            "sub/model.safetensors",
            "sub\\model.safetensors",
            "C:model.safetensors",
            ".safetensors",
            ".hidden.safetensors",
            "model.bin",
            "model.safetensors\0",
        ] {
            assert!(!is_plain_file_name(name), "{name:?}");
        }
    }
}
