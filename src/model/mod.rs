//! The differentiable decoder: `config.json` and named tensors in, losses and gradients of the target matrices out.
//!
//! One decoder computes every family: a family is a row of a table in `family.rs`, which [`Config`] resolves together with what
//! `config.json` says. [`MODEL_TYPES`] lists them.
//!
//! Explicit backpropagation in the spirit of llm.c: each layer is a forward and a backward written by hand, with no tape
//! between them. It runs on plain f32 slices and products of its own door (`matmul`: AMX tiles, or the `gemm` crate, candle's own), instead of candle's
//! tensors: candle 0.11 computes a weight gradient for every frozen matrix, gives each intermediate result fresh pages, and
//! its fused operations have no backward, which together cost 2.7 to 3.6 times the time and 4 times the memory on a
//! 135M-parameter model. Candle's autograd remains as a second opinion in `tests/candle.rs`. On GPUs the same decoder runs on
//! candle's tensors, without its tape ([`device`]); [`Differentiable`] is what both have in common.

mod adapter;
mod block;
mod classifier;
pub(crate) mod config;
mod decoder;
pub mod device;
mod differentiable;
mod family;
mod frequencies;
mod generate;
mod head;
mod in_parts;
mod kernels;
mod linear;
pub(crate) mod matmul;
mod mixture;
mod pack;
mod point;
pub(crate) mod settings;
mod step;
mod stream;
mod targets;
mod tensors;
mod weights;

pub use adapter::AdapterModule;
pub use classifier::Classifier;
pub use config::{Config, ConfigError};
pub use decoder::{Activations, Decoder, PackError};
pub use differentiable::Differentiable;
pub use family::MODEL_TYPES;
pub use generate::Generation;
pub use head::{LOGITS_BYTES, LossSum, Objective, Predicted, TILE_BYTES};
pub use in_parts::InParts;
pub use pack::{EncodedRow, Pack, Prediction, common_beginning};
pub use point::Point;
pub use targets::{SelectionError, Target, TargetSelection, place_of_module};
pub use tensors::TargetTensors;
pub use weights::{WeightsError, check_tensors, decoder_prefix};
