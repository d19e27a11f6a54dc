//! A checkpoint's tensors under their roles, checked against the config and widened on demand.
//!
//! In: a config and named tensor views. Out: [`Weights`]. Matrices stay in their stored dtype where they are (usually a
//! memory map) and are widened to f32 block by block into one reused buffer, so memory holds one block's f32 weights,
//! not the model's; norms and biases, a few kilobytes, are widened once.

use panacea_formats::Dtype;
use panacea_formats::TensorView;
use rayon::prelude::*;
use thiserror::Error;

use super::config::Config;
use super::targets::{Projection, Target, TargetSelection};
use super::tensors::TargetTensors;

/// Elements widened by one task.
const CHUNK: usize = 1 << 16;

/// The tensors of a decoder.
#[derive(Debug)]
pub(crate) struct Weights<'c> {
    /// vocab x hidden.
    pub(crate) embedding: TensorView<'c>,
    /// vocab x hidden; the embedding when they are tied.
    pub(crate) head: TensorView<'c>,
    /// hidden.
    pub(crate) final_norm: Vec<f32>,
    pub(crate) blocks: Vec<Block<'c>>,
    pub(crate) targets: Vec<Target>,
}

/// The tensors of one block.
#[derive(Debug)]
pub(crate) struct Block<'c> {
    /// One matrix for each of [`Projection::ALL`], outputs x inputs.
    matrices: [TensorView<'c>; 7],
    /// The index of each matrix among the targets, where it is one.
    pub(crate) targets: [Option<usize>; 7],
    /// Bias of the joined query, key and value projection; empty without.
    pub(crate) qkv_bias: Vec<f32>,
    /// Bias of the output projection; empty without.
    pub(crate) output_bias: Vec<f32>,
    /// Bias of the joined gate and up projection; empty without.
    pub(crate) gate_up_bias: Vec<f32>,
    /// Bias of the down projection; empty without.
    pub(crate) down_bias: Vec<f32>,
    pub(crate) input_norm: Vec<f32>,
    pub(crate) post_attention_norm: Vec<f32>,
}

impl Block<'_> {
    /// The target index of `projection`, if it is one.
    pub(crate) fn target(&self, projection: Projection) -> Option<usize> {
        self.targets[projection as usize]
    }
}

/// Why a checkpoint's tensors do not make the decoder that its config describes.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum WeightsError {
    /// A tensor is missing.
    #[error("tensor `{name}` is missing")]
    Missing {
        /// Its name.
        name: String,
    },
    /// A tensor has another shape.
    #[error("tensor `{name}` has shape {found:?}, where the config asks for {wanted:?}")]
    Shape {
        /// Its name.
        name: String,
        /// Its shape.
        found: Vec<usize>,
        /// The config's.
        wanted: Vec<usize>,
    },
    /// A tensor has a dtype that cannot be computed with.
    #[error("tensor `{name}` is {found}, and only F32, F16 and BF16 can be computed with")]
    Dtype {
        /// Its name.
        name: String,
        /// Its dtype.
        found: Dtype,
    },
    /// A tensor inside a block that this decoder would not use.
    #[error("tensor `{name}` has no place in a `{model_type}` block, so its effect would be lost")]
    Unused {
        /// Its name.
        name: String,
        /// The family.
        model_type: String,
    },
    /// The selection of targets matches no matrix.
    #[error(
        "targets `{selection}` match none of the {candidates} projection matrices, such as `{example}`"
    )]
    NoTarget {
        /// What was asked for.
        selection: String,
        /// How many matrices there are.
        candidates: usize,
        /// One of their paths.
        example: String,
    },
    /// A weight is NaN or infinite.
    #[error("tensor `{name}` holds a value that is not finite")]
    NotFinite {
        /// Its name.
        name: String,
    },
}

impl<'c> Weights<'c> {
    /// Finds every tensor that `config` asks for through `find`, and the targets that `selection` names among the matrices.
    pub(crate) fn resolve(
        config: &Config,
        find: &dyn Fn(&str) -> Option<TensorView<'c>>,
        names: &mut dyn Iterator<Item = &str>,
        selection: &TargetSelection,
    ) -> Result<Self, WeightsError> {
        let tensors = Tensors { find };
        let (hidden, vocab) = (config.hidden_size, config.vocab_size);
        let embedding = tensors.matrix("model.embed_tokens.weight", [vocab, hidden])?;
        let head = if config.tie_word_embeddings {
            embedding
        } else {
            tensors.matrix("lm_head.weight", [vocab, hidden])?
        };
        let mut targets = Vec::new();
        let mut used = Vec::new();
        let blocks = (0..config.num_hidden_layers)
            .map(|index| tensors.block(config, index, selection, &mut targets, &mut used))
            .collect::<Result<Vec<_>, _>>()?;
        used.sort_unstable();
        for name in names {
            let in_block = name.strip_prefix("model.layers.").is_some();
            let computed = name.ends_with(".rotary_emb.inv_freq");
            if in_block
                && !computed
                && used
                    .binary_search_by(|known| known.as_str().cmp(name))
                    .is_err()
            {
                return Err(WeightsError::Unused {
                    name: name.to_owned(),
                    model_type: config.model_type.clone(),
                });
            }
        }
        if targets.is_empty() {
            return Err(WeightsError::NoTarget {
                selection: selection.to_string(),
                candidates: config.num_hidden_layers * Projection::ALL.len(),
                example: module_path(0, Projection::Query),
            });
        }
        Ok(Self {
            embedding,
            head,
            final_norm: tensors.vector("model.norm.weight", hidden)?,
            blocks,
            targets,
        })
    }

    /// The stored values of the targets.
    pub(crate) fn target_values(&self) -> Result<TargetTensors, WeightsError> {
        let mut values = Vec::with_capacity(self.targets.len());
        for target in &self.targets {
            let mut tensor = vec![0.0; target.shape[0] * target.shape[1]];
            widen(
                &self.blocks[target.block].matrices[target.projection as usize],
                0,
                &mut tensor,
            );
            if !tensor.par_iter().all(|x| x.is_finite()) {
                return Err(WeightsError::NotFinite {
                    name: target.name.clone(),
                });
            }
            values.push(tensor);
        }
        Ok(TargetTensors::new(values))
    }
}

/// The f32 matrices of one block: outputs x inputs each, with those that read the same input joined.
#[derive(Debug, Default)]
pub(crate) struct BlockMatrices {
    /// Query, key and value rows.
    pub(crate) qkv: Vec<f32>,
    /// Output projection.
    pub(crate) output: Vec<f32>,
    /// Gate rows, then up rows.
    pub(crate) gate_up: Vec<f32>,
    /// Down projection.
    pub(crate) down: Vec<f32>,
}

impl BlockMatrices {
    /// Widens `block`'s matrices, taking those that are targets from `values`.
    pub(crate) fn load(&mut self, block: &Block<'_>, values: &TargetTensors) {
        use Projection::{Down, Gate, Key, Output, Query, Up, Value};
        let joined: [(&mut Vec<f32>, &[Projection]); 4] = [
            (&mut self.qkv, &[Query, Key, Value]),
            (&mut self.output, &[Output]),
            (&mut self.gate_up, &[Gate, Up]),
            (&mut self.down, &[Down]),
        ];
        for (buffer, projections) in joined {
            let sizes = projections
                .iter()
                .map(|&p| block.matrices[p as usize].elements());
            buffer.resize(sizes.sum(), 0.0);
            let mut rest = buffer.as_mut_slice();
            for &projection in projections {
                let matrix = &block.matrices[projection as usize];
                let (part, left) = rest.split_at_mut(matrix.elements());
                match block.target(projection) {
                    Some(index) => copy(values.tensor(index), part),
                    None => widen(matrix, 0, part),
                }
                rest = left;
            }
        }
    }
}

/// Widens the elements of `view` from number `first` on into `out`, in parallel.
pub(crate) fn widen(view: &TensorView<'_>, first: usize, out: &mut [f32]) {
    out.par_chunks_mut(CHUNK).enumerate().for_each(|(i, out)| {
        let start = first + i * CHUNK;
        view.widen_into(start..start + out.len(), out)
            .expect("dtype and shape were checked when the weights were resolved");
    });
}

fn copy(from: &[f32], to: &mut [f32]) {
    to.par_chunks_mut(CHUNK)
        .zip(from.par_chunks(CHUNK))
        .for_each(|(to, from)| to.copy_from_slice(from));
}

fn module_path(block: usize, projection: Projection) -> String {
    format!("model.layers.{block}.{}", projection.module())
}

/// Access to named tensors with the checks that each needs.
struct Tensors<'f, 'c> {
    find: &'f dyn Fn(&str) -> Option<TensorView<'c>>,
}

impl<'c> Tensors<'_, 'c> {
    fn matrix(&self, name: &str, shape: [usize; 2]) -> Result<TensorView<'c>, WeightsError> {
        self.checked(name, &shape)
    }

    fn vector(&self, name: &str, length: usize) -> Result<Vec<f32>, WeightsError> {
        let view = self.checked(name, &[length])?;
        let mut values = vec![0.0; length];
        widen(&view, 0, &mut values);
        Ok(values)
    }

    fn checked(&self, name: &str, shape: &[usize]) -> Result<TensorView<'c>, WeightsError> {
        let name = name.to_owned();
        let Some(view) = (self.find)(&name) else {
            return Err(WeightsError::Missing { name });
        };
        if view.shape != shape {
            return Err(WeightsError::Shape {
                name,
                found: view.shape.to_vec(),
                wanted: shape.to_vec(),
            });
        }
        if !view.dtype.is_patchable() {
            return Err(WeightsError::Dtype {
                name,
                found: view.dtype,
            });
        }
        Ok(view)
    }

    fn block(
        &self,
        config: &Config,
        index: usize,
        selection: &TargetSelection,
        targets: &mut Vec<Target>,
        used: &mut Vec<String>,
    ) -> Result<Block<'c>, WeightsError> {
        let mut block_targets = [None; 7];
        let mut find = |projection: Projection| {
            let path = module_path(index, projection);
            let name = format!("{path}.weight");
            let shape = shape_of(config, projection);
            let view = self.matrix(&name, shape)?;
            if selection.selects(&path) {
                block_targets[projection as usize] = Some(targets.len());
                targets.push(Target {
                    name: name.clone(),
                    shape,
                    block: index,
                    projection,
                });
            }
            used.push(name);
            Ok(view)
        };
        let [q, k, v, o, gate, up, down] = Projection::ALL;
        let matrices = [
            find(q)?,
            find(k)?,
            find(v)?,
            find(o)?,
            find(gate)?,
            find(up)?,
            find(down)?,
        ];
        let mut bias = |projections: &[Projection], present: bool| {
            let mut joined = Vec::new();
            for &projection in projections.iter().filter(|_| present) {
                let name = format!("{}.bias", module_path(index, projection));
                joined.extend(self.vector(&name, shape_of(config, projection)[0])?);
                used.push(name);
            }
            Ok(joined)
        };
        let qkv_bias = bias(&[q, k, v], config.attention_bias)?;
        let output_bias = bias(&[o], config.attention_bias)?;
        let gate_up_bias = bias(&[gate, up], config.mlp_bias)?;
        let down_bias = bias(&[down], config.mlp_bias)?;
        let mut norm = |module: &str| {
            let name = format!("model.layers.{index}.{module}.weight");
            let values = self.vector(&name, config.hidden_size);
            used.push(name);
            values
        };
        Ok(Block {
            matrices,
            targets: block_targets,
            qkv_bias,
            output_bias,
            gate_up_bias,
            down_bias,
            input_norm: norm("input_layernorm")?,
            post_attention_norm: norm("post_attention_layernorm")?,
        })
    }
}

/// Outputs and inputs of a projection.
fn shape_of(config: &Config, projection: Projection) -> [usize; 2] {
    let (hidden, intermediate) = (config.hidden_size, config.intermediate_size);
    let queries = config.num_attention_heads * config.head_dim;
    let keys = config.num_key_value_heads * config.head_dim;
    match projection {
        Projection::Query => [queries, hidden],
        Projection::Key | Projection::Value => [keys, hidden],
        Projection::Output => [hidden, queries],
        Projection::Gate | Projection::Up => [intermediate, hidden],
        Projection::Down => [hidden, intermediate],
    }
}
