//! A checkpoint's tensors under their roles, checked against the config and widened on demand.
//!
//! In: a config and named tensor views. Out: [`Weights`]. Matrices stay in their stored dtype where they are (usually a
//! memory map) and are made operands of products block by block in reused buffers, so memory holds one block's,
//! not the model's; norms and biases, a few kilobytes, are widened once.

use std::collections::{HashMap, HashSet};

use panacea_formats::Dtype;
use panacea_formats::TensorView;
use rayon::prelude::*;
use thiserror::Error;

use super::adapter::AdapterModule;
use super::config::{BlockConfig, Config, Experts};
use super::family::{HeadNormSpan, NormPlacement};
use super::linear::{Factor, Linear, Loaded, Lora, Part, Products, Role, widen};
use super::point::Point;
use super::targets::{Target, TargetSelection, place_of_module};

/// The tensors of a decoder.
#[derive(Debug)]
pub(crate) struct Weights<'c> {
    /// vocab x hidden.
    pub(crate) embedding: TensorView<'c>,
    /// vocab x hidden, the embedding when they are tied; of a classifier labels x hidden.
    pub(crate) head: TensorView<'c>,
    /// hidden.
    pub(crate) final_norm: Vec<f32>,
    pub(crate) blocks: Vec<Block<'c>>,
    pub(crate) targets: Vec<Target>,
    /// The stored tensor of each target.
    stored: Vec<TensorView<'c>>,
}

/// The tensors of one block. The weights of norms are as they are multiplied with, offsets and factors included.
#[derive(Debug)]
pub(crate) struct Block<'c> {
    /// Query, key and value projection.
    pub(crate) qkv: Linear<'c>,
    /// Output projection.
    pub(crate) output: Linear<'c>,
    pub(crate) feed_forward: FeedForward<'c>,
    /// Before attention.
    pub(crate) attention_in: Option<Vec<f32>>,
    /// Of query and key heads.
    pub(crate) head_norm: Option<[Vec<f32>; 2]>,
    /// After attention.
    pub(crate) attention_out: Option<Vec<f32>>,
    /// Before the feed-forward layer.
    pub(crate) feed_forward_in: Option<Vec<f32>>,
    /// After the feed-forward layer.
    pub(crate) feed_forward_out: Option<Vec<f32>>,
}

/// The feed-forward layer of a block.
#[derive(Debug)]
pub(crate) enum FeedForward<'c> {
    /// One for all tokens.
    Dense(GatedLinear<'c>),
    /// Several, of which each token passes some.
    Mixture {
        /// Experts x hidden.
        router: TensorView<'c>,
        experts: Vec<GatedLinear<'c>>,
    },
}

/// down(act(gate(x)) * up(x)).
#[derive(Debug)]
pub(crate) struct GatedLinear<'c> {
    /// Gate rows, then up rows.
    pub(crate) gate_up: Linear<'c>,
    pub(crate) down: Linear<'c>,
}

impl<'c> Block<'c> {
    /// All layers.
    fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear<'c>> {
        let gated: &mut [GatedLinear<'c>] = match &mut self.feed_forward {
            FeedForward::Dense(gated) => std::slice::from_mut(gated),
            FeedForward::Mixture { experts, .. } => experts,
        };
        let gated = gated
            .iter_mut()
            .flat_map(|gated| [&mut gated.gate_up, &mut gated.down]);
        [&mut self.qkv, &mut self.output].into_iter().chain(gated)
    }
}

impl FeedForward<'_> {
    /// Whether any of it is optimized.
    pub(crate) fn has_targets(&self) -> bool {
        let any = |gated: &GatedLinear<'_>| gated.gate_up.has_targets() || gated.down.has_targets();
        match self {
            Self::Dense(gated) => any(gated),
            Self::Mixture { experts, .. } => experts.iter().any(any),
        }
    }
}

/// What of a model is optimized.
#[derive(Debug)]
pub(crate) enum Space<'s, 'c> {
    /// The matrices that are selected.
    Weights(&'s TargetSelection),
    /// The factors of an adapter: over the matrices that are selected, or all.
    Adapter(Vec<AdapterModule<'c>>, Option<&'s TargetSelection>),
}

/// What the final norm's output is multiplied with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Output {
    /// The output matrix, vocab x hidden, or the embedding where they are tied.
    Vocabulary,
    /// The matrix of a classifier of so many labels, labels x hidden, under transformers' name for it.
    Labels(usize),
}

/// Why a checkpoint's tensors do not make the decoder that its config describes.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum WeightsError {
    /// An adapter is over something that this decoder does not compute with.
    #[error("the adapter is over `{path}`, which is no projection of a `{model_type}` block")]
    Adapter {
        /// The module.
        path: String,
        /// The family.
        model_type: &'static str,
    },
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
    #[error("tensor `{name}` is {found}, which cannot be read as numbers")]
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
        model_type: &'static str,
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

/// Whether `tensors` make the decoder that `config` describes: all are there, in the shapes that it asks for, and none is too many.
///
/// # Errors
/// [`WeightsError`] naming the first that does not fit.
pub fn check_tensors<'c>(
    config: &Config,
    tensors: impl IntoIterator<Item = TensorView<'c>>,
) -> Result<(), WeightsError> {
    let tensors = tensors.into_iter().map(|tensor| (tensor.name, tensor));
    let selection = TargetSelection::default();
    let space = Space::Weights(&selection);
    Weights::resolve(config, tensors.collect(), space, Output::Vocabulary).map(|_| ())
}

/// What the names of the text decoder's tensors begin with, given whether a tensor of some name exists. In a model with several
/// towers, tensors without this beginning belong to the others.
pub fn decoder_prefix(exists: impl Fn(&str) -> bool) -> Option<&'static str> {
    let prefixes = PREFIXES.iter().map(|(prefix, _)| *prefix);
    prefixes
        .into_iter()
        .find(|prefix| exists(&format!("{prefix}embed_tokens.weight")))
}

/// Beginnings of the decoder's names, with the name of the output matrix beside them.
const PREFIXES: [(&str, &str); 4] = [
    ("model.", "lm_head.weight"),
    ("model.language_model.", "lm_head.weight"),
    ("language_model.model.", "language_model.lm_head.weight"),
    ("", "lm_head.weight"),
];

/// The matrix of a classifier, in every family.
const SCORE: &str = "score.weight";

impl<'c> Weights<'c> {
    /// Finds every tensor that `config` asks for among `tensors`, and what `space` names.
    pub(crate) fn resolve(
        config: &Config,
        tensors: HashMap<&str, TensorView<'c>>,
        space: Space<'_, 'c>,
        output: Output,
    ) -> Result<Self, WeightsError> {
        let prefix = decoder_prefix(|name| tensors.contains_key(name)).unwrap_or("model.");
        let head_name = PREFIXES
            .iter()
            .find(|(known, _)| *known == prefix)
            .map_or("lm_head.weight", |(_, head)| head);
        let mut finder = Finder {
            config,
            tensors,
            prefix,
            used: HashSet::new(),
        };
        let shape = [config.vocab_size, config.hidden_size];
        let embedding = finder.matrix(format!("{prefix}embed_tokens.weight"), shape)?;
        let head = match (output, config.tie_word_embeddings) {
            (Output::Vocabulary, true) => embedding,
            (Output::Vocabulary, false) => finder.matrix(head_name.to_owned(), shape)?,
            (Output::Labels(labels), _) => {
                finder.matrix(SCORE.to_owned(), [labels, config.hidden_size])?
            }
        };
        let final_norm = finder.norm(format!("{prefix}norm"), config.hidden_size)?;
        let blocks = (0..config.blocks.len())
            .map(|index| finder.block(index))
            .collect::<Result<Vec<_>, _>>()?;
        finder.refuse_unused()?;
        let mut weights = Self {
            embedding,
            head,
            final_norm,
            blocks,
            targets: Vec::new(),
            stored: Vec::new(),
        };
        match space {
            Space::Weights(selection) => weights.select(selection)?,
            Space::Adapter(modules, selection) => weights.adapt(config, modules, selection)?,
        }
        Ok(weights)
    }

    /// The stored values of one target, which are finite.
    pub(crate) fn stored_target(&self, index: usize) -> Result<Vec<f32>, WeightsError> {
        let view = &self.stored[index];
        let mut values = vec![0.0; view.elements()];
        widen(view, 0, &mut values);
        match values.par_iter().all(|x| x.is_finite()) {
            true => Ok(values),
            false => Err(WeightsError::NotFinite {
                name: self.targets[index].name.clone(),
            }),
        }
    }

    /// Makes the selected matrices targets.
    fn select(&mut self, selection: &TargetSelection) -> Result<(), WeightsError> {
        self.for_each_part(|weights, block, part, inputs| {
            if selection.selects(&part.path) {
                let name = format!("{}.weight", part.path);
                let shape = [part.view.elements() / inputs, inputs];
                part.role = Role::Target(weights.add_target(name, shape, block, part.view));
            }
            Ok(())
        })?;
        self.check_selection(selection)
    }

    /// Puts factors over the matrices that have some, and makes those over selected ones targets.
    fn adapt(
        &mut self,
        config: &Config,
        modules: Vec<AdapterModule<'c>>,
        selection: Option<&TargetSelection>,
    ) -> Result<(), WeightsError> {
        let mut modules: HashMap<String, AdapterModule<'c>> = modules
            .into_iter()
            .map(|module| (module.path.clone(), module))
            .collect();
        self.for_each_part(|weights, block, part, inputs| {
            let Some(module) = modules.remove(&part.path) else {
                return Ok(());
            };
            let outputs = part.view.elements() / inputs;
            let rank = module.a.shape.first().copied().unwrap_or(0);
            let selected = selection.is_none_or(|selection| selection.selects(&part.path));
            let mut factor = |view: TensorView<'c>, shape: [usize; 2]| {
                check(&view, &shape)?;
                if selected {
                    let name = view.name.to_owned();
                    let index = weights.add_target(name, shape, block, view);
                    return Ok(Factor::Target(index, view));
                }
                let mut values = vec![0.0; view.elements()];
                widen(&view, 0, &mut values);
                Ok(Factor::Frozen(values))
            };
            part.role = Role::Adapted(Lora {
                rank,
                scale: module.scale,
                a: factor(module.a, [rank, inputs])?,
                b: factor(module.b, [outputs, rank])?,
            });
            Ok(())
        })?;
        // The first by name, so that the message does not depend on a map's order.
        if let Some(path) = modules.into_keys().min() {
            return Err(WeightsError::Adapter {
                path,
                model_type: config.model_type,
            });
        }
        match selection {
            Some(selection) => self.check_selection(selection),
            None => Ok(()),
        }
    }

    /// Calls `work` with every matrix, its block and its inputs, in the order of targets.
    fn for_each_part(
        &mut self,
        mut work: impl FnMut(&mut Self, usize, &mut Part<'c>, usize) -> Result<(), WeightsError>,
    ) -> Result<(), WeightsError> {
        let mut blocks = std::mem::take(&mut self.blocks);
        for (index, block) in blocks.iter_mut().enumerate() {
            let mut parts: Vec<(usize, &mut Part<'c>)> = block
                .linears_mut()
                .flat_map(|linear| {
                    let inputs = linear.inputs;
                    linear.parts.iter_mut().map(move |part| (inputs, part))
                })
                .collect();
            parts.sort_by(|(_, a), (_, b)| place_of_module(&a.path).cmp(&place_of_module(&b.path)));
            for (inputs, part) in parts {
                work(self, index, part, inputs)?;
            }
        }
        self.blocks = blocks;
        Ok(())
    }

    fn add_target(
        &mut self,
        name: String,
        shape: [usize; 2],
        block: usize,
        view: TensorView<'c>,
    ) -> usize {
        self.targets.push(Target { name, shape, block });
        self.stored.push(view);
        self.targets.len() - 1
    }

    fn check_selection(&self, selection: &TargetSelection) -> Result<(), WeightsError> {
        if !self.targets.is_empty() {
            return Ok(());
        }
        let linears = |block: &Block<'_>| match &block.feed_forward {
            FeedForward::Dense(gated) => gated.gate_up.parts.len() + 1,
            FeedForward::Mixture { experts, .. } => 3 * experts.len(),
        };
        let of_block = |block: &Block<'_>| linears(block) + block.qkv.parts.len() + 1;
        Err(WeightsError::NoTarget {
            selection: selection.to_string(),
            candidates: self.blocks.iter().map(of_block).sum(),
            example: self
                .blocks
                .first()
                .and_then(|block| block.qkv.parts.first())
                .map(|part| part.path.clone())
                .unwrap_or_default(),
        })
    }
}

/// The matrices of one block, and of one expert at a time, as operands.
#[derive(Debug, Default)]
pub(crate) struct BlockMatrices {
    pub(crate) qkv: Loaded,
    pub(crate) output: Loaded,
    pub(crate) gate_up: Loaded,
    pub(crate) down: Loaded,
    /// Experts x hidden.
    pub(crate) router: Vec<f32>,
}

impl BlockMatrices {
    /// Loads `block`'s matrices, but those of experts, with the targets at `point`.
    pub(crate) fn load(&mut self, block: &Block<'_>, point: Point<'_>, products: Products) {
        block.qkv.load(point, products, &mut self.qkv);
        block.output.load(point, products, &mut self.output);
        match &block.feed_forward {
            FeedForward::Dense(gated) => self.load_gated(gated, point, products),
            FeedForward::Mixture { router, .. } => {
                self.router.resize(router.elements(), 0.0);
                widen(router, 0, &mut self.router);
            }
        }
    }

    /// Loads the matrices of one feed-forward layer.
    pub(crate) fn load_gated(
        &mut self,
        gated: &GatedLinear<'_>,
        point: Point<'_>,
        products: Products,
    ) {
        gated.gate_up.load(point, products, &mut self.gate_up);
        gated.down.load(point, products, &mut self.down);
    }
}

/// Access to named tensors with the checks that each needs.
struct Finder<'f, 't, 'c> {
    config: &'f Config,
    tensors: HashMap<&'t str, TensorView<'c>>,
    prefix: &'static str,
    used: HashSet<String>,
}

impl<'c> Finder<'_, '_, 'c> {
    fn matrix(&mut self, name: String, shape: [usize; 2]) -> Result<TensorView<'c>, WeightsError> {
        self.checked(name, &shape)
    }

    fn vector(&mut self, name: String, length: usize) -> Result<Vec<f32>, WeightsError> {
        let view = self.checked(name, &[length])?;
        let mut values = vec![0.0; length];
        widen(&view, 0, &mut values);
        Ok(values)
    }

    /// The weight of a norm, with the family's offset.
    fn norm(&mut self, module: String, width: usize) -> Result<Vec<f32>, WeightsError> {
        let mut weight = self.vector(format!("{module}.weight"), width)?;
        let offset = self.config.norm_offset;
        weight.iter_mut().for_each(|w| *w += offset);
        Ok(weight)
    }

    fn checked(&mut self, name: String, shape: &[usize]) -> Result<TensorView<'c>, WeightsError> {
        let Some(view) = self.tensors.get(name.as_str()).copied() else {
            return Err(WeightsError::Missing { name });
        };
        check(&view, shape)?;
        self.used.insert(name);
        Ok(view)
    }

    /// Refuses a tensor inside of a block that nobody asked for; the first by name.
    fn refuse_unused(&self) -> Result<(), WeightsError> {
        let blocks = format!("{}layers.", self.prefix);
        // Older checkpoints hold the rotary frequencies, which are computed from the config.
        let computed = |name: &str| name.ends_with(".rotary_emb.inv_freq");
        let unused = self.tensors.keys().filter(|name| {
            name.starts_with(&blocks) && !computed(name) && !self.used.contains(**name)
        });
        match unused.min() {
            Some(name) => Err(WeightsError::Unused {
                name: (*name).to_owned(),
                model_type: self.config.model_type,
            }),
            None => Ok(()),
        }
    }

    /// A layer of the modules at `paths` of so many outputs each, with a bias for each or for none.
    fn linear(
        &mut self,
        paths: &[(String, usize)],
        inputs: usize,
        has_bias: bool,
    ) -> Result<Linear<'c>, WeightsError> {
        let mut linear = Linear {
            inputs,
            outputs: 0,
            parts: Vec::with_capacity(paths.len()),
            bias: Vec::new(),
        };
        for (path, outputs) in paths {
            linear.outputs += outputs;
            linear.parts.push(Part {
                path: path.clone(),
                view: self.matrix(format!("{path}.weight"), [*outputs, inputs])?,
                role: Role::Frozen,
            });
            if has_bias {
                let bias = self.vector(format!("{path}.bias"), *outputs)?;
                linear.bias.extend(bias);
            }
        }
        Ok(linear)
    }

    fn block(&mut self, index: usize) -> Result<Block<'c>, WeightsError> {
        let config = self.config;
        let at = |module: &str| format!("{}layers.{index}.{module}", self.prefix);
        let (hidden, dim) = (config.hidden_size, config.head_dim);
        let queries = config.num_attention_heads * dim;
        let keys = config.num_key_value_heads * dim;
        let qkv = match config.fused {
            true => vec![(at("self_attn.qkv_proj"), queries + 2 * keys)],
            false => vec![
                (at("self_attn.q_proj"), queries),
                (at("self_attn.k_proj"), keys),
                (at("self_attn.v_proj"), keys),
            ],
        };
        let output = [(at("self_attn.o_proj"), hidden)];
        let (attention_in, attention_out, feed_forward_in, feed_forward_out) = match config.norms {
            NormPlacement::Before => (
                Some("input_layernorm"),
                None,
                Some("post_attention_layernorm"),
                None,
            ),
            NormPlacement::Around => (
                Some("input_layernorm"),
                Some("post_attention_layernorm"),
                Some("pre_feedforward_layernorm"),
                Some("post_feedforward_layernorm"),
            ),
            NormPlacement::After => (
                None,
                Some("post_attention_layernorm"),
                None,
                Some("post_feedforward_layernorm"),
            ),
        };
        let mut norm = |module: Option<&str>, factor: f32| {
            let weight =
                module.map(|module| self.norm(at_block(self.prefix, index, module), hidden));
            let weight = weight.transpose()?;
            Ok(weight.map(|weight| weight.into_iter().map(|w| w * factor).collect()))
        };
        let factor = config.residual_multiplier;
        let norms = [
            norm(attention_in, 1.0)?,
            norm(attention_out, factor)?,
            norm(feed_forward_in, 1.0)?,
            norm(feed_forward_out, factor)?,
        ];
        let [
            attention_in,
            attention_out,
            feed_forward_in,
            feed_forward_out,
        ] = norms;
        let head_norm = match config.head_norm {
            None => None,
            Some(span) => {
                let (of_query, of_key) = match span {
                    HeadNormSpan::Head => (dim, dim),
                    HeadNormSpan::Token => (queries, keys),
                };
                let query = at_block(self.prefix, index, "self_attn.q_norm");
                let key = at_block(self.prefix, index, "self_attn.k_norm");
                Some([self.norm(query, of_query)?, self.norm(key, of_key)?])
            }
        };
        let block = &config.blocks[index];
        Ok(Block {
            qkv: self.linear(&qkv, hidden, config.qkv_bias)?,
            output: self.linear(&output, queries, config.output_bias)?,
            feed_forward: match config.experts.filter(|_| block.is_mixture) {
                None => FeedForward::Dense(self.dense(index, block)?),
                Some(experts) => self.mixture(index, block, experts)?,
            },
            attention_in,
            head_norm,
            attention_out,
            feed_forward_in,
            feed_forward_out,
        })
    }

    fn dense(
        &mut self,
        index: usize,
        block: &BlockConfig,
    ) -> Result<GatedLinear<'c>, WeightsError> {
        let config = self.config;
        let at = |module: &str| at_block(self.prefix, index, module);
        let gate_up = match config.fused {
            true => vec![(at("mlp.gate_up_proj"), 2 * block.width)],
            false => vec![
                (at("mlp.gate_proj"), block.width),
                (at("mlp.up_proj"), block.width),
            ],
        };
        let down = [(at("mlp.down_proj"), config.hidden_size)];
        Ok(GatedLinear {
            gate_up: self.linear(&gate_up, config.hidden_size, config.mlp_bias)?,
            down: self.linear(&down, block.width, config.mlp_bias)?,
        })
    }

    fn mixture(
        &mut self,
        index: usize,
        block: &BlockConfig,
        experts: Experts,
    ) -> Result<FeedForward<'c>, WeightsError> {
        let hidden = self.config.hidden_size;
        let module = at_block(self.prefix, index, experts.names.module);
        let [gate, up, down] = experts.names.matrices;
        let router = self.matrix(format!("{module}.gate.weight"), [experts.count, hidden])?;
        let experts = (0..experts.count)
            .map(|expert| {
                let at = |matrix: &str| format!("{module}.experts.{expert}.{matrix}");
                let gate_up = [(at(gate), block.width), (at(up), block.width)];
                Ok(GatedLinear {
                    gate_up: self.linear(&gate_up, hidden, false)?,
                    down: self.linear(&[(at(down), hidden)], block.width, false)?,
                })
            })
            .collect::<Result<Vec<_>, _>>()?;
        Ok(FeedForward::Mixture { router, experts })
    }
}

fn at_block(prefix: &str, index: usize, module: &str) -> String {
    format!("{prefix}layers.{index}.{module}")
}

fn check(view: &TensorView<'_>, shape: &[usize]) -> Result<(), WeightsError> {
    let name = || view.name.to_owned();
    if view.shape != shape {
        return Err(WeightsError::Shape {
            name: name(),
            found: view.shape.to_vec(),
            wanted: shape.to_vec(),
        });
    }
    if !view.dtype.is_readable() {
        return Err(WeightsError::Dtype {
            name: name(),
            found: view.dtype,
        });
    }
    Ok(())
}
