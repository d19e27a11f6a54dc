//! The whole decoder: losses, and their gradients with respect to the targets.
//!
//! In: values for the target matrices and a [`Pack`]. Out: a [`LossSum`], with its gradient added to a
//! [`TargetTensors`]. There is no tape: each block has its hand-written backward ([`super::block`]), which runs from the
//! last block to the first that holds a target, and stops there.

use panacea_formats::{Checkpoint, TensorView};
use thiserror::Error;

use super::adapter::AdapterModule;
use super::block::{Below, Layer, Saved, Scratch, Tokens};
use super::config::{BlockConfig, Config};
use super::device::DeviceError;
use super::differentiable::Differentiable;
use super::head::{Head, HeadScratch, LossSum, Objective, Predicted, Wanted};
use super::kernels::attention::Pattern;
use super::kernels::rope::Rotations;
use super::linear::{Linear, Products, widen};
use super::pack::{EncodedRow, Pack, common_beginning};
use super::point::Point;
use super::targets::{Target, TargetSelection};
use super::tensors::TargetTensors;
use super::weights::{
    Block, BlockMatrices, FeedForward, GatedLinear, Output, Space, Weights, WeightsError,
};

/// Whether the forward keeps each block's activations for the backward.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activations {
    /// They are kept: fastest.
    #[default]
    Keep,
    /// Only each block's input is kept and the rest computed again: a third more work, one block's memory.
    Recompute,
}

/// A decoder over a checkpoint's tensors, with a selection of them as targets.
#[derive(Debug)]
pub struct Decoder<'c> {
    pub(super) config: Config,
    pub(super) weights: Weights<'c>,
    activations: Activations,
    /// Whose pages are given back after each block.
    pub(super) released: Option<&'c Checkpoint>,
    pub(super) workspace: Workspace,
}

/// Why a pack cannot be computed.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum PackError {
    /// A token outside of the vocabulary.
    #[error("token {token} is outside of the model's vocabulary of {vocab_size}")]
    Token {
        /// The token id.
        token: u32,
        /// Number of embeddings.
        vocab_size: usize,
    },
    /// The device that computes it failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A prompt without a token, which nothing can follow.
    #[error("prompt number {index} holds no token")]
    EmptyPrompt {
        /// Its place among the prompts, from 0.
        index: usize,
    },
}

/// Buffers kept between calls, so that a step allocates nothing that the one before did not.
#[derive(Debug, Default)]
pub(super) struct Workspace {
    matrices: BlockMatrices,
    /// The input of each block and, last, the output of the last one; two of them, in turn, without a backward.
    pub(super) inputs: Vec<Vec<f32>>,
    /// What each block kept; one for all with [`Activations::Recompute`] or without a backward.
    saved: Vec<Saved>,
    scratch: Scratch,
    head: HeadScratch,
    d: Vec<f32>,
    /// One for each rotary embedding.
    pub(super) rotations: Vec<Rotations>,
}

impl<'c> Decoder<'c> {
    /// Resolves the tensors of `config` among `tensors`, and the targets among its matrices.
    ///
    /// # Errors
    /// [`WeightsError`] when a tensor is missing, has another shape or a dtype that cannot be computed with, when a block holds
    /// a tensor that would go unused, or when no matrix is selected.
    pub fn new<I>(
        config: Config,
        tensors: I,
        selection: &TargetSelection,
    ) -> Result<Self, WeightsError>
    where
        I: IntoIterator<Item = TensorView<'c>>,
    {
        Self::in_space(
            config,
            tensors,
            Space::Weights(selection),
            Output::Vocabulary,
        )
    }

    /// As [`Self::new`], with LoRA factors over some matrices, and these factors as the targets: A, then B, for each module that
    /// `selection` picks by its path in the checkpoint, or for all.
    ///
    /// # Errors
    /// [`WeightsError`] as for [`Self::new`], and when a module is over no matrix of the decoder or its factors do not fit.
    pub fn with_adapter<I>(
        config: Config,
        tensors: I,
        modules: Vec<AdapterModule<'c>>,
        selection: Option<&TargetSelection>,
    ) -> Result<Self, WeightsError>
    where
        I: IntoIterator<Item = TensorView<'c>>,
    {
        let space = Space::Adapter(modules, selection);
        Self::in_space(config, tensors, space, Output::Vocabulary)
    }

    /// As [`Self::new`], but `output` is what follows the final norm: what is called logits here are then its outputs.
    pub(super) fn in_space<I>(
        config: Config,
        tensors: I,
        space: Space<'_, 'c>,
        output: Output,
    ) -> Result<Self, WeightsError>
    where
        I: IntoIterator<Item = TensorView<'c>>,
    {
        let by_name = tensors.into_iter().map(|view| (view.name, view)).collect();
        Ok(Self {
            weights: Weights::resolve(&config, by_name, space, output)?,
            activations: Activations::default(),
            released: None,
            workspace: Workspace {
                rotations: vec![Rotations::default(); config.rotary.len()],
                ..Workspace::default()
            },
            config,
        })
    }

    /// Chooses between memory and work.
    #[must_use]
    pub fn with_activations(self, activations: Activations) -> Self {
        Self {
            activations,
            ..self
        }
    }

    /// Gives the pages of `checkpoint`, which the tensors are from, back to the system after each block, so that the weights of one
    /// block are resident and not the model's.
    #[must_use]
    pub fn releasing(self, checkpoint: &'c Checkpoint) -> Self {
        Self {
            released: Some(checkpoint),
            ..self
        }
    }

    /// The resolved `config.json`.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The selected matrices, in the order of every [`TargetTensors`].
    pub fn targets(&self) -> &[Target] {
        &self.weights.targets
    }

    /// The targets' stored values, widened to f32.
    ///
    /// # Errors
    /// [`WeightsError::NotFinite`] when one of them is NaN or infinite.
    pub fn target_values(&self) -> Result<TargetTensors, WeightsError> {
        Differentiable::target_values(self)
    }

    /// Bytes of the largest block's matrices in f32, of one expert where it has several.
    pub fn block_bytes(&self) -> usize {
        let of_gated = |gated: &GatedLinear<'_>| elements(&gated.gate_up) + elements(&gated.down);
        let of_block = |block: &Block<'_>| {
            let gated = match &block.feed_forward {
                FeedForward::Dense(gated) => Some(gated),
                FeedForward::Mixture { experts, .. } => experts.first(),
            };
            elements(&block.qkv) + elements(&block.output) + gated.map_or(0, of_gated)
        };
        4 * self.weights.blocks.iter().map(of_block).max().unwrap_or(0)
    }

    /// Bytes of the output matrix in f32.
    pub fn head_bytes(&self) -> usize {
        4 * self.weights.head.elements()
    }

    /// Bytes of the largest block's matrices as operands of products, of one expert where it has several. What is in BF16 takes no more than
    /// in f32; the rest is in f32 and, where there is a matrix unit, in pieces as well.
    pub fn operand_bytes(&self, activations: Activations) -> usize {
        let arranged = match activations {
            Activations::Keep => 1,
            Activations::Recompute => 2,
        };
        let of_linear = |linear: &Linear<'_>| {
            elements(linear)
                * match linear.is_stored_bf16() {
                    true => 4,
                    false => 4 + 6 * arranged,
                }
        };
        let of_gated = |gated: &GatedLinear<'_>| of_linear(&gated.gate_up) + of_linear(&gated.down);
        let of_block = |block: &Block<'_>| {
            let gated = match &block.feed_forward {
                FeedForward::Dense(gated) => Some(gated),
                FeedForward::Mixture { experts, .. } => experts.first(),
            };
            of_linear(&block.qkv) + of_linear(&block.output) + gated.map_or(0, of_gated)
        };
        self.weights.blocks.iter().map(of_block).max().unwrap_or(0)
    }

    /// Whether packs may hold what their rows begin with once ([`Pack::sharing`]): not where the length of a row decides how its beginning is
    /// rotated.
    pub fn shares_beginnings(&self) -> bool {
        let mut rotary = self.config.rotary.iter();
        rotary.all(|frequencies| frequencies.switches_above().is_none())
    }

    /// How many tokens packs of `rows` hold once for all of them.
    pub fn common_beginning(&self, rows: &[EncodedRow]) -> usize {
        match self.shares_beginnings() {
            true => common_beginning(rows),
            false => 0,
        }
    }

    /// Bytes of activations that a pack of `tokens` tokens needs at most, besides weights and gradients.
    pub fn activation_bytes(&self, activations: Activations, tokens: usize) -> usize {
        let config = &self.config;
        let of_block = |place| Saved::floats_per_token(config, place);
        let blocks = config.blocks.iter().map(of_block);
        let kept: usize = match activations {
            Activations::Keep => blocks.sum(),
            Activations::Recompute => blocks.max().unwrap_or(0),
        };
        let widest = config.blocks.iter().map(|place| place.width).max();
        let widest = widest.unwrap_or(0);
        // The last: what the gradient of a matrix is a product of, in pieces of 6 bytes.
        let scratch = 2 * config.heads().row() + 3 * config.hidden_size + widest + 3 * widest / 2;
        let floats = kept + (config.blocks.len() + 2) * config.hidden_size + scratch;
        4 * tokens * floats
    }

    /// The next-token loss of `pack` with the targets at `point`.
    ///
    /// # Errors
    /// [`PackError`] when a token is outside of the vocabulary.
    pub fn loss<'v>(
        &mut self,
        point: impl Into<Point<'v>>,
        pack: &Pack,
    ) -> Result<LossSum, PackError> {
        Differentiable::loss(self, point.into(), pack)
    }

    /// What is predicted at each position by itself, in the order of [`Pack::predictions`].
    ///
    /// # Errors
    /// [`PackError`] when a token is outside of the vocabulary.
    pub fn predicted<'v>(
        &mut self,
        point: impl Into<Point<'v>>,
        pack: &Pack,
    ) -> Result<Vec<Predicted>, PackError> {
        Differentiable::predicted(self, point.into(), pack)
    }

    /// As [`Self::loss`]; adds the gradient of the *sum* over predicted tokens to `gradient`.
    ///
    /// # Errors
    /// [`PackError`] when a token is outside of the vocabulary.
    pub fn loss_and_gradient<'v>(
        &mut self,
        point: impl Into<Point<'v>>,
        pack: &Pack,
        gradient: &mut TargetTensors,
    ) -> Result<LossSum, PackError> {
        self.capped_loss_and_gradient(point, pack, f64::INFINITY, gradient)
    }

    /// As [`Self::loss_and_gradient`], but the gradient is that of the sum of min(loss, `cap`): tokens above the cap have none.
    ///
    /// # Errors
    /// [`PackError`] when a token is outside of the vocabulary.
    pub fn capped_loss_and_gradient<'v>(
        &mut self,
        point: impl Into<Point<'v>>,
        pack: &Pack,
        cap: f64,
        gradient: &mut TargetTensors,
    ) -> Result<LossSum, PackError> {
        Differentiable::capped_loss_and_gradient(self, point.into(), pack, cap, gradient)
    }

    /// What [`Self::divergence`] compares with: the final hidden states at the predicted positions, predictions x hidden.
    ///
    /// # Errors
    /// [`PackError`] when a token is outside of the vocabulary.
    pub fn reference<'v>(
        &mut self,
        point: impl Into<Point<'v>>,
        pack: &Pack,
    ) -> Result<Vec<f32>, PackError> {
        let x = self.forward(point.into(), pack, Pass::Forward)?;
        let (head, workspace) = self.head();
        Ok(head.hidden(&workspace.inputs[x], pack, &mut workspace.head))
    }

    /// KL(reference || this) over the next token, summed over the predicted positions of `pack`, in nats.
    ///
    /// `reference`: what [`Self::reference`] gave for the same pack with other values.
    ///
    /// # Errors
    /// [`PackError`] when a token is outside of the vocabulary.
    pub fn divergence<'v>(
        &mut self,
        point: impl Into<Point<'v>>,
        pack: &Pack,
        reference: &[f32],
    ) -> Result<LossSum, PackError> {
        Differentiable::divergence(self, point.into(), pack, reference)
    }

    /// As [`Self::divergence`]; adds the gradient of the sum to `gradient`.
    ///
    /// # Errors
    /// [`PackError`] when a token is outside of the vocabulary.
    pub fn divergence_and_gradient<'v>(
        &mut self,
        point: impl Into<Point<'v>>,
        pack: &Pack,
        reference: &[f32],
        gradient: &mut TargetTensors,
    ) -> Result<LossSum, PackError> {
        Differentiable::divergence_and_gradient(self, point.into(), pack, reference, gradient)
    }

    /// The logits at each predicted position, predictions x vocab: for tests and for looking at small models.
    ///
    /// # Errors
    /// [`PackError`] when a token is outside of the vocabulary.
    pub fn logits<'v>(
        &mut self,
        point: impl Into<Point<'v>>,
        pack: &Pack,
    ) -> Result<Vec<f32>, PackError> {
        let x = self.forward(point.into(), pack, Pass::Forward)?;
        let (head, workspace) = self.head();
        Ok(head.all_logits(&workspace.inputs[x], pack, &mut workspace.head))
    }

    /// Runs all blocks; returns which of the workspace's `inputs` holds the last block's output.
    fn forward(&mut self, point: Point<'_>, pack: &Pack, pass: Pass) -> Result<usize, PackError> {
        self.forward_past(point, pack, pass, |_, _| ())
    }

    /// As [`Self::forward`] without a backward; hands each block's index, and the heads that it attended with, to `visit`.
    pub(super) fn visit_heads(
        &mut self,
        point: Point<'_>,
        pack: &Pack,
        mut visit: impl FnMut(usize, &[f32]),
    ) -> Result<&[f32], PackError> {
        let x = self.forward_past(point, pack, Pass::Forward, |block, saved| {
            visit(block, saved.heads());
        })?;
        Ok(&self.workspace.inputs[x])
    }

    /// As [`Self::forward`]; hands each block's index, and what it kept, to `visit`.
    fn forward_past(
        &mut self,
        point: Point<'_>,
        pack: &Pack,
        pass: Pass,
        mut visit: impl FnMut(usize, &Saved),
    ) -> Result<usize, PackError> {
        self.prepare(pack, pass);
        self.embed(pack)?;
        let Self {
            config,
            weights,
            activations,
            released,
            workspace,
        } = self;
        let Workspace {
            matrices,
            inputs,
            saved,
            scratch,
            rotations,
            ..
        } = workspace;
        let mut current = 0;
        for (index, (block, place)) in weights.blocks.iter().zip(&config.blocks).enumerate() {
            matrices.load(block, point, Products::Forward);
            let (next, slot) = match (pass, *activations) {
                (Pass::Forward, _) => (1 - current, 0),
                (Pass::ForwardAndBackward, Activations::Recompute) => (index + 1, 0),
                (Pass::ForwardAndBackward, Activations::Keep) => (index + 1, index),
            };
            let mut out = std::mem::take(&mut inputs[next]);
            Layer {
                config,
                block,
                tokens: tokens(place, pack, rotations),
                point,
                matrices,
            }
            .forward(&inputs[current], &mut saved[slot], scratch, &mut out);
            visit(index, &saved[slot]);
            inputs[next] = out;
            current = next;
            if let Some(checkpoint) = released {
                checkpoint.release();
            }
        }
        Ok(current)
    }

    /// Runs the blocks back from the last to the first that holds a target; `d` is the gradient of the last one's output.
    fn backward(
        &mut self,
        point: Point<'_>,
        pack: &Pack,
        d: &mut [f32],
        gradient: &mut TargetTensors,
    ) {
        let Self {
            config,
            weights,
            activations,
            released,
            workspace,
        } = self;
        let Workspace {
            matrices,
            inputs,
            saved,
            scratch,
            rotations,
            ..
        } = workspace;
        let Some(lowest) = weights.targets.iter().map(|target| target.block).min() else {
            return;
        };
        let blocks = weights.blocks.iter().zip(&config.blocks).enumerate();
        for (index, (block, place)) in blocks.skip(lowest).rev() {
            let products = match activations {
                Activations::Keep => Products::Backward,
                Activations::Recompute => Products::Both,
            };
            matrices.load(block, point, products);
            let mut layer = Layer {
                config,
                block,
                tokens: tokens(place, pack, rotations),
                point,
                matrices,
            };
            let slot = match activations {
                Activations::Keep => index,
                Activations::Recompute => {
                    let mut out = std::mem::take(&mut inputs[index + 1]);
                    layer.forward(&inputs[index], &mut saved[0], scratch, &mut out);
                    inputs[index + 1] = out;
                    0
                }
            };
            let below = if index == lowest {
                Below::Nothing
            } else {
                Below::Targets
            };
            layer.backward(
                &inputs[index],
                &mut saved[slot],
                below,
                scratch,
                d,
                gradient,
            );
            if let Some(checkpoint) = released {
                checkpoint.release();
            }
        }
    }

    /// Makes room, and the tables of rotations.
    fn prepare(&mut self, pack: &Pack, pass: Pass) {
        let blocks = self.config.blocks.len();
        let (inputs, saved) = match (pass, self.activations) {
            (Pass::Forward, _) => (2, 1),
            (Pass::ForwardAndBackward, Activations::Recompute) => (blocks + 1, 1),
            (Pass::ForwardAndBackward, Activations::Keep) => (blocks + 1, blocks),
        };
        let workspace = &mut self.workspace;
        if workspace.inputs.len() < inputs {
            workspace.inputs.resize_with(inputs, Vec::new);
        }
        if workspace.saved.len() < saved {
            workspace.saved.resize_with(saved, Saved::default);
        }
        for (rotations, frequencies) in workspace.rotations.iter_mut().zip(&self.config.rotary) {
            rotations.prepare(frequencies, &pack.starts);
        }
    }

    /// Looks up the tokens' embeddings into the first block's input.
    fn embed(&mut self, pack: &Pack) -> Result<(), PackError> {
        let predicted = pack.predictions.iter().map(|p| &p.token);
        self.check_tokens(pack.tokens.iter().chain(predicted))?;
        let mut x = std::mem::take(&mut self.workspace.inputs[0]);
        self.embed_into(&pack.tokens, &mut x);
        self.workspace.inputs[0] = x;
        Ok(())
    }

    /// Refuses tokens that the model has no embedding of.
    pub(super) fn check_tokens<'t>(
        &self,
        mut tokens: impl Iterator<Item = &'t u32>,
    ) -> Result<(), PackError> {
        let vocab_size = self.config.vocab_size;
        match tokens.find(|&&token| token as usize >= vocab_size) {
            Some(&token) => Err(PackError::Token { token, vocab_size }),
            None => Ok(()),
        }
    }

    /// The embeddings of `tokens`, which were checked.
    pub(super) fn embed_into(&self, tokens: &[u32], x: &mut Vec<f32>) {
        let hidden = self.config.hidden_size;
        x.resize(tokens.len() * hidden, 0.0);
        let factor = self.config.embedding_multiplier;
        for (row, &token) in x.chunks_exact_mut(hidden).zip(tokens) {
            widen(&self.weights.embedding, token as usize * hidden, row);
            row.iter_mut().for_each(|x| *x *= factor);
        }
    }

    fn head(&mut self) -> (Head<'_>, &mut Workspace) {
        let head = Head {
            norm: &self.weights.final_norm,
            epsilon: self.config.rms_norm_eps,
            matrix: &self.weights.head,
            finish: self.config.logits,
        };
        (head, &mut self.workspace)
    }
}

impl Differentiable for Decoder<'_> {
    fn targets(&self) -> &[Target] {
        &self.weights.targets
    }

    fn stored_target(&self, index: usize) -> Result<Vec<f32>, WeightsError> {
        self.weights.stored_target(index)
    }

    fn shares_beginnings(&self) -> bool {
        Decoder::shares_beginnings(self)
    }

    fn losses(
        &mut self,
        point: Point<'_>,
        pack: &Pack,
        objective: Objective<'_>,
    ) -> Result<Vec<f64>, PackError> {
        let x = self.forward(point, pack, Pass::Forward)?;
        let (head, workspace) = self.head();
        let input = &workspace.inputs[x];
        head.losses(input, pack, objective, Wanted::Losses, &mut workspace.head);
        Ok(workspace.head.losses().to_vec())
    }

    fn predicted(&mut self, point: Point<'_>, pack: &Pack) -> Result<Vec<Predicted>, PackError> {
        let x = self.forward(point, pack, Pass::Forward)?;
        let (head, workspace) = self.head();
        let (input, objective) = (
            &workspace.inputs[x],
            Objective::NextToken { cap: f64::INFINITY },
        );
        head.losses(
            input,
            pack,
            objective,
            Wanted::Likeliest,
            &mut workspace.head,
        );
        Ok(workspace.head.predicted())
    }

    fn losses_and_gradient(
        &mut self,
        point: Point<'_>,
        pack: &Pack,
        objective: Objective<'_>,
        gradient: &mut TargetTensors,
    ) -> Result<Vec<f64>, PackError> {
        let x = self.forward(point, pack, Pass::ForwardAndBackward)?;
        let mut d = std::mem::take(&mut self.workspace.d);
        let (head, workspace) = self.head();
        let (input, wanted) = (&workspace.inputs[x], Wanted::Gradient(&mut d));
        head.losses(input, pack, objective, wanted, &mut workspace.head);
        self.backward(point, pack, &mut d, gradient);
        self.workspace.d = d;
        Ok(self.workspace.head.losses().to_vec())
    }

    fn reference(&mut self, point: Point<'_>, pack: &Pack) -> Result<Vec<f32>, PackError> {
        Decoder::reference(self, point, pack)
    }
}

/// Whether a backward will follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pass {
    Forward,
    ForwardAndBackward,
}

/// Elements of a layer's matrices.
fn elements(linear: &Linear<'_>) -> usize {
    linear.inputs * linear.outputs
}

fn tokens<'a>(place: &BlockConfig, pack: &'a Pack, rotations: &'a [Rotations]) -> Tokens<'a> {
    Tokens {
        pattern: Pattern {
            starts: &pack.starts,
            window: place.window,
        },
        rotations: &rotations[place.rotary],
    }
}
