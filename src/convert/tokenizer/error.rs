//! Why a tokenizer is not carried over.

use std::io;
use std::path::PathBuf;

use panacea_formats::shown;
use thiserror::Error;

use super::pre::Pre;
use super::sentencepiece::PiecesError;

/// What is wrong with a tokenizer, on either side.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// A key that every tokenizer of this kind has.
    #[error("the metadata has no `{key}`")]
    Missing {
        /// The key.
        key: &'static str,
    },
    /// A value of another type than llama.cpp reads there.
    #[error("`{key}` is not {expected}")]
    WrongType {
        /// The key.
        key: String,
        /// What it should be.
        expected: &'static str,
    },
    /// A kind of tokenizer other than the two of the model families that are read.
    #[error(
        "`tokenizer.ggml.model` is `{}`; known are `gpt2` (byte-pair merges) and `llama` (SentencePiece)",
        shown(found)
    )]
    UnknownModel {
        /// What the file says.
        found: String,
    },
    /// A way of cutting text that is not in the table.
    #[error(
        "`tokenizer.ggml.pre` is `{}`; known are {}",
        shown(found),
        Pre::names().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
    )]
    UnknownPre {
        /// What the file says.
        found: String,
    },
    /// An array that should have an element for each token.
    #[error("`{key}` has {found} elements for {tokens} tokens")]
    Length {
        /// The array's key.
        key: &'static str,
        /// How many elements it has.
        found: usize,
        /// How many tokens there are.
        tokens: usize,
    },
    /// Two tokens with one text: a text would have two ids.
    #[error("tokens {first} and {second} are both `{}`", shown(text))]
    DuplicateToken {
        /// The text.
        text: String,
        /// The id of the first.
        first: usize,
        /// The id of the second.
        second: usize,
    },
    /// More tokens than ids.
    #[error("{tokens} tokens, but ids have 32 bits")]
    TooManyTokens {
        /// How many tokens there are.
        tokens: usize,
    },
    /// An id of no token.
    #[error("`{key}` is {id}, but there are {tokens} tokens")]
    IdOutOfRange {
        /// The key.
        key: String,
        /// The id.
        id: u64,
        /// How many tokens there are.
        tokens: usize,
    },
    /// A merge that is not two texts with a space between them.
    #[error(
        "merge {index} is `{}`, which is not two tokens with a space between them",
        shown(merge)
    )]
    MalformedMerge {
        /// Which merge.
        index: usize,
        /// What it says.
        merge: String,
    },
    /// A merge that reads or makes a text that is no token.
    #[error(
        "merge {index}, `{}`, needs the token `{}`, which there is not",
        shown(merge),
        shown(token)
    )]
    MergeOfUnknown {
        /// Which merge.
        index: usize,
        /// What it says.
        merge: String,
        /// The text that is no token.
        token: String,
    },
    /// A token too long for its ways of being merged to be tried.
    #[error("token {id} has {length} bytes, more than {limit}")]
    TokenTooLong {
        /// The token's id.
        id: usize,
        /// Its bytes.
        length: usize,
        /// How many may be.
        limit: usize,
    },
    /// Tokens that can be made in too many ways.
    #[error("its tokens can be merged in more than {limit} ways")]
    TooManyMerges {
        /// How many may be.
        limit: usize,
    },
    /// The tokenizer cannot be written as JSON.
    #[error("the tokenizer cannot be written")]
    Unwritable(#[source] serde_json::Error),
    /// A file that cannot be read.
    #[error("cannot read `{}`", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file that is not the JSON object it should be.
    #[error("`{}` is not a JSON object", path.display())]
    NotJson {
        /// The file.
        path: PathBuf,
        /// Where it goes wrong.
        source: serde_json::Error,
    },
    /// A chat template in a file that is not UTF-8.
    #[error("`{}` is not UTF-8 text", path.display())]
    NotText {
        /// The file.
        path: PathBuf,
        /// Where it goes wrong.
        source: std::string::FromUtf8Error,
    },
    /// A `tokenizer.model` that is not SentencePiece's.
    #[error("`{}` is not a SentencePiece model", path.display())]
    Pieces {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: PiecesError,
    },
    /// Neither `tokenizer.json` nor `tokenizer.model`.
    #[error(
        "there is no tokenizer: neither `tokenizer.json` nor a `tokenizer.model` that this kind of model uses"
    )]
    NoTokenizer,
    /// A tokenizer that the `tokenizers` crate does not take.
    #[error("cannot use the tokenizer `{}`", path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What it says.
        source: tokenizers::Error,
    },
    /// A text that the tokenizer gives up on.
    #[error("the tokenizer fails on a text")]
    Tokenize(#[source] tokenizers::Error),
    /// A tokenizer without merges.
    #[error("the tokenizer has no merges, and is none of SentencePiece's")]
    NoMerges,
    /// A way of cutting text that no name is known for.
    #[error(
        "the tokenizer cuts text in a way that llama.cpp has no name for: the hash of its probe is {hash}"
    )]
    UnknownCut {
        /// The hash, in hexadecimal.
        hash: String,
    },
    /// A token that the model has no row for.
    #[error(
        "token {id}, `{}`, does not fit a model of {vocabulary} tokens",
        shown(text)
    )]
    TokenBeyondVocabulary {
        /// The token's text.
        text: String,
        /// Its id.
        id: u32,
        /// How many tokens the model knows.
        vocabulary: usize,
    },
    /// An added token without an id or a text.
    #[error("the added token `{}` has no id, or no text", shown(text))]
    BadAddedToken {
        /// Its text, as far as there is one.
        text: String,
    },
    /// The id of a special token is below 0.
    #[error("the special token `{kind}` has the id {id}")]
    NegativeId {
        /// Which special token.
        kind: &'static str,
        /// The id.
        id: i64,
    },
    /// The id of a special token is too large for a GGUF.
    #[error("the special token `{kind}` has the id {id}, which does not fit 32 bits")]
    IdTooLarge {
        /// Which special token.
        kind: &'static str,
        /// The id.
        id: u64,
    },
    /// Another GGUF's tokenizer, for a model with another number of tokens.
    #[error("its tokenizer has {tokens} tokens, but the model knows {vocabulary}")]
    BaseDoesNotFit {
        /// Tokens of the other file.
        tokens: usize,
        /// How many tokens the model knows.
        vocabulary: usize,
    },
}
