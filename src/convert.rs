//! From a Hugging Face directory to a GGUF file, and back.
//!
//! In: an open checkpoint of one kind, and the texts of its side files. Out: the other kind, through the outputs of
//! `panacea_formats`; nothing here opens a file. What comes out is what llama.cpp's own programs make of the same input:
//! `convert_hf_to_gguf.py` for the float types and `q8_0`, and `llama-quantize` for the others.
//!
//! 1. [`names`]: what the tensors are called on either side, and how their rows and values differ.
//! 2. [`config`]: what a config says in GGUF's keys, and back.
//! 3. [`tokenizer`]: the same of a tokenizer.

pub mod config;
pub mod names;
mod stored;
pub mod tokenizer;
pub mod types;

pub use stored::{StoredModel, StoredModelError};
