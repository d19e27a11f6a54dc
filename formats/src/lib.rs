//! Checkpoints as named typed tensors: bounds-checked reading, streamed atomic writing.
//!
//! Bytes on one side, names, element types and shapes on the other. No mathematics on weights, no keys, no printing; the crate
//! can be used alone. The path through it:
//!
//! 1. [`Checkpoint::open`] reads headers, checks them against the files' lengths, and maps the tensors.
//! 2. [`Perturbation::open`] does the same for what is to be added, and [`check_base`] tells whether it was made for that
//!    checkpoint.
//! 3. [`Adapter`] gives the tensors of a PEFT directory their roles, in agreement with its [`AdapterConfig`].
//! 4. [`write_checkpoint`] streams a copy with chosen tensors changed into an [`OutputDir`] or [`OutputFile`], which is complete
//!    after its `commit`, and absent before.
//!
//! ```no_run
//! use std::path::Path;
//! use panacea_formats::Checkpoint;
//!
//! let checkpoint = Checkpoint::open(Path::new("my-finetune"))?;
//! for tensor in checkpoint.tensors() {
//!     let (name, dtype, shape) = (tensor.name, tensor.dtype, tensor.shape);
//! }
//! # Ok::<(), panacea_formats::FormatError>(())
//! ```
//!
//! # Distrust
//!
//! Files come from strangers. No length is believed before it was compared with the file's, no product is taken unchecked, no
//! buffer is sized by a number from a file, and a name that is given twice is refused. Limits: [`MAX_HEADER_BYTES`],
//! [`MAX_INDEX_BYTES`], [`MAX_ADAPTER_CONFIG_BYTES`], [`MAX_DIMENSIONS`], [`MAX_DEPTH`].
//!
//! # Platforms
//!
//! Unix, because outputs are made with its renames. Big-endian machines read and write the same files.

mod atomic;
mod blocks;
mod checkpoint;
mod copy;
mod digest;
mod dtype;
mod error;
pub mod gguf;
pub mod json;
mod mapped;
mod peft;
mod perturbation;
mod safetensors;
mod tensor;
mod weights_file;

pub use atomic::{
    Committed, HashedFile, OutputDir, OutputError, OutputErrorKind, OutputFile, Overwrite,
    WrittenFile,
};
pub use blocks::{dequantize, quantize};
pub use checkpoint::{
    ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, Checkpoint, CheckpointError, INDEX_FILE,
    IndexProblem, Layout, LeftOut, MAX_DEPTH, MAX_INDEX_BYTES, PartProblem, Shard, SideFile,
    SideFiles, WEIGHTS_FILE,
};
pub use copy::{
    CHUNK_BYTES, Destination, Observer, Patch, WriteError, WrittenCheckpoint, copied_bytes,
    write_checkpoint,
};
pub use digest::{DigestParseError, Hasher, Sha256};
pub use dtype::{Block, Dtype, UnknownDtype};
pub use error::{FormatError, FormatErrorKind, Problems, nearest, shown};
pub use peft::{
    Adapter, AdapterBaseProblem, AdapterConfig, AdapterProblem, LoraModule,
    MAX_ADAPTER_CONFIG_BYTES, PeftError, SavedTensor, Selected,
};
pub use perturbation::{
    AdapterWriteError, BaseProblem, BaseTensor, DIRECTION, DataSource, DeltaTensor, FORMAT_VERSION,
    Form, NotFinite, Perturbation, PerturbationError, PerturbationRecord, PerturbationWriteError,
    Space, TensorProblem, check_base, describe_base, write_adapter, write_perturbation,
};
pub use safetensors::{
    MAX_DIMENSIONS, MAX_HEADER_BYTES, SafetensorsError, SafetensorsFile, Stored, StoredFloats,
    safetensors_header, write_tensors,
};
pub use tensor::{TensorView, WidenError, narrow};
pub use weights_file::WeightsFile;
