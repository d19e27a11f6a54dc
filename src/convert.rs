//! From a Hugging Face directory to a GGUF file, and back.
//!
//! In: an open checkpoint of one kind, and the texts of its side files. Out: the other kind, through the outputs of
//! `panacea_formats`; nothing here opens a file. What comes out is what llama.cpp's own programs make of the same input:
//! `convert_hf_to_gguf.py` for the float types and `q8_0`, and `llama-quantize` for the others.
//!
//! 1. [`names`]: what the tensors are called on either side, and how their rows and values differ.
//! 2. [`config`]: what a config says in GGUF's keys, and back; [`general`]: what is known of a model besides.
//! 3. [`tokenizer`]: the same of a tokenizer.
//! 4. [`types`]: which element type each tensor gets.
//! 5. [`Conversion`]: all of it together, planned first and then written in a stream.

pub mod config;
mod conversion;
pub mod general;
pub mod names;
mod patched;
mod stored;
mod to_adapter;
mod to_directory;
mod to_gguf;
pub mod tokenizer;
pub mod types;
mod write;

use panacea_formats::gguf::GgufWriteError;
use panacea_formats::{Dtype, FormatError, OutputError, WidenError, shown};
use thiserror::Error;

pub use conversion::Conversion;
pub use patched::PatchedType;
pub use stored::{StoredModel, StoredModelError};
pub use to_adapter::{AdapterBase, AdapterSettings};
pub use to_gguf::{GgufSettings, Texts};
pub use write::CONVERSION_BYTES;

use crate::model::{ConfigError, WeightsError};
use config::GgufConfigError;
use tokenizer::TokenizerError;

/// Why a checkpoint is not converted.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ConvertError {
    /// A `config.json` that was refused.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// It was stopped.
    #[error("interrupted")]
    Interrupted,
    /// Not of the kind that is converted this way.
    #[error("it is neither a whole model nor a GGUF file")]
    Layout,
    /// Metadata of a GGUF file that makes no config.
    #[error(transparent)]
    Metadata(#[from] GgufConfigError),
    /// Experts of several types, which cannot be stacked.
    #[error(
        "tensor `{}` of an expert is {dtype}, and others in its block are not",
        shown(tensor)
    )]
    MixedExperts {
        /// The first that is not as the others are.
        tensor: String,
        /// Its type.
        dtype: Dtype,
    },
    /// A tensor that is not known on the other side.
    #[error(
        "tensor `{}` has no place in a GGUF file of architecture `{architecture}`",
        shown(tensor)
    )]
    NoPlace {
        /// Its name.
        tensor: String,
        /// The architecture.
        architecture: &'static str,
    },
    /// A manifest that does not say what was patched.
    #[error("the manifest does not say which tensors were patched")]
    NoTargets,
    /// Metadata of a tokenizer without tokens.
    #[error("the tokenizer has no tokens")]
    NoTokens,
    /// A value that its new type cannot hold.
    #[error(
        "element {element} of tensor `{}` is {value}, which {dtype} cannot hold",
        shown(tensor)
    )]
    NotHeld {
        /// The tensor.
        tensor: String,
        /// Where in it.
        element: usize,
        /// The value.
        value: f32,
        /// The type.
        dtype: Dtype,
    },
    /// The output cannot be written.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// A type whose blocks do not fit a tensor's rows.
    #[error(
        "tensor `{}` has rows of {columns} elements, and {dtype} stores {} at a time",
        shown(tensor),
        dtype.block().elements
    )]
    PatchedType {
        /// The tensor.
        tensor: String,
        /// The type that was asked for.
        dtype: Dtype,
        /// The length of a row.
        columns: usize,
    },
    /// The source changed while it was read.
    #[error(transparent)]
    Source(#[from] FormatError),
    /// A GGUF file that is no model that is known here.
    #[error(transparent)]
    Stored(#[from] StoredModelError),
    /// Metadata of a GGUF file that makes no tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// More parts than their numbers can count.
    #[error("the file would have {parts} parts, and 65535 are the most")]
    TooManyParts {
        /// How many.
        parts: usize,
    },
    /// A perturbation that is not of low rank.
    #[error("the perturbation of tensor `{}` is not of low rank", shown(tensor))]
    NotLowRank {
        /// The tensor.
        tensor: String,
    },
    /// A tensor of the base that an adapter replaces.
    #[error(
        "the adapter replaces tensor `{}` of its base, which a GGUF adapter cannot",
        shown(tensor)
    )]
    SavedTensor {
        /// The tensor.
        tensor: String,
    },
    /// What the container cannot hold.
    #[error(transparent)]
    Unwritable(#[from] GgufWriteError),
    /// A tensor of a type that is not read.
    #[error("tensor `{}` cannot be read", shown(tensor))]
    Unreadable {
        /// Its name.
        tensor: String,
        /// Why.
        source: WidenError,
    },
    /// Tensors that do not make the model that the config describes.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// A tokenizer that is not the embedding's.
    #[error("the tokenizer has {tokens} tokens, and the embedding {rows} rows")]
    Vocabulary {
        /// Tokens.
        tokens: usize,
        /// Rows.
        rows: usize,
    },
}
