//! Tokenizers between `tokenizer.json` and the metadata of a GGUF file.
//!
//! In: one of the two. Out: the other, so that text has the same token ids on both sides.
//!
//! A GGUF file says less than a `tokenizer.json`: it names the way text is cut before merges instead of spelling it out, and it has no
//! place for a normalizer. [`from_metadata`] therefore follows llama.cpp, the program that such files are for: what it returns gives the ids
//! that llama.cpp gives, with special tokens read in the text. Where llama.cpp itself departs from the tokenizer that a
//! model was trained with, so does the result:
//!
//! - no Unicode normalization, where Qwen's tokenizers have NFC;
//! - `tekken` and `gpt-4o` do not keep combining marks with their letters, and know no case beyond ASCII.
//!
//! Two differences from llama.cpp are left. Special tokens whose texts overlap in a text are read from left to right, as transformers does,
//! and not the longest first. And of equal merges in one row of equal characters, the one that is made first may
//! be another: of 60,000 texts of such rows, over three vocabularies, none was.
//!
//! Source: llama.cpp, `src/llama-vocab.cpp` (`llama_vocab::impl::load`, `tokenize`) and `src/unicode.cpp`, of llama-cpp-python 0.3.36.

mod error;
mod folder;
mod json;
mod known;
mod metadata;
mod pieces;
mod pre;
mod sentencepiece;
mod special;
mod vocabulary;

pub use error::TokenizerError;
pub use folder::TokenizerFolder;
pub use json::{TokenizerTexts, from_metadata};
pub use metadata::{TokenizerOptions, to_metadata};
pub use sentencepiece::PiecesError;
