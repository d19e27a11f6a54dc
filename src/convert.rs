//! Checkpoints between Hugging Face's directories and GGUF files.

pub mod tokenizer;
