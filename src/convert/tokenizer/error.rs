//! Why a tokenizer is not carried over.

use panacea_formats::shown;
use thiserror::Error;

use super::pre::Pre;

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
    /// The tokenizer cannot be written as JSON.
    #[error("the tokenizer cannot be written")]
    Unwritable(#[source] serde_json::Error),
}
