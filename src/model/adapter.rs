//! LoRA adapters as the parameter space, as in the paper: the factors of every adapted projection are optimized, and the matrices
//! under them stay as they are.

use panacea_formats::TensorView;

/// A LoRA over one projection: the decoder computes with W + scale B A in place of W.
///
/// Source: Hu et al., "LoRA", arXiv:2106.09685.
#[derive(Clone, Debug)]
pub struct AdapterModule<'c> {
    /// The projection's path in the checkpoint, such as `model.layers.0.self_attn.q_proj`.
    pub path: String,
    /// Rank x inputs.
    pub a: TensorView<'c>,
    /// Outputs x rank.
    pub b: TensorView<'c>,
    /// alpha / rank, or what the adapter's settings make of it.
    pub scale: f32,
}
