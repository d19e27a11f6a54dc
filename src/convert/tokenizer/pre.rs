//! How text is cut before byte-pair merges, by the names that GGUF files give it.

use super::error::TokenizerError;

/// A way of cutting text, and what llama.cpp takes to go with it.
#[derive(Debug)]
pub(super) struct Pre {
    /// Its names, in `tokenizer.ggml.pre`.
    pub(super) names: &'static [&'static str],
    /// Expressions that cut one after the other: each match is a piece of its own, and so is what lies between two.
    pub(super) patterns: &'static [&'static str],
    /// Whether a piece that is a token as a whole becomes that token, whatever the merges say.
    pub(super) ignore_merges: bool,
    /// Whether texts begin with the beginning-of-sequence token where `tokenizer.ggml.add_bos_token` says nothing.
    pub(super) adds_bos: bool,
}

impl Pre {
    /// The way called `name`.
    ///
    /// # Errors
    /// [`TokenizerError::UnknownPre`].
    pub(super) fn named(name: &str) -> Result<&'static Self, TokenizerError> {
        TABLE
            .iter()
            .find(|pre| pre.names.contains(&name))
            .ok_or_else(|| TokenizerError::UnknownPre {
                found: name.to_owned(),
            })
    }

    /// All names.
    pub(super) fn names() -> impl Iterator<Item = &'static str> {
        TABLE.iter().flat_map(|pre| pre.names.iter().copied())
    }
}

/// What a file means that names no way.
pub(super) const DEFAULT: &str = "default";

/// Source: llama.cpp, `llm_tokenizer_bpe` for the expressions and `llama_vocab::impl::load` for names and what goes with them. Names
/// that llama.cpp cuts alike share a row.
static TABLE: [Pre; 9] = [
    Pre {
        names: &[DEFAULT],
        patterns: &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
        ignore_merges: false,
        adds_bos: false,
    },
    Pre {
        names: &[
            "llama-bpe",
            "llama3",
            "llama-v3",
            "falcon3",
            "falcon-h1",
            "pixtral",
            "midm-2.0",
            "lfm2",
        ],
        patterns: &[LLAMA3],
        ignore_merges: true,
        adds_bos: true,
    },
    Pre {
        names: &["dbrx", "smaug-bpe"],
        patterns: &[LLAMA3],
        ignore_merges: false,
        adds_bos: false,
    },
    Pre {
        names: &[
            "qwen2",
            "deepseek-r1-qwen",
            "megrez",
            "kormo",
            "stablelm2",
            "hunyuan",
        ],
        patterns: &[QWEN2],
        ignore_merges: false,
        adds_bos: false,
    },
    Pre {
        names: &[
            "smollm",
            "refact",
            "starcoder",
            "command-r",
            "codeshell",
            "exaone",
            "minerva-7b",
        ],
        patterns: &[r"\p{N}", GPT2],
        ignore_merges: false,
        adds_bos: false,
    },
    Pre {
        names: &[
            "gpt-2", "phi-2", "olmo", "mpt", "jais", "trillion", "exaone4", "gigachat", "a.x-4.0",
            "mellum",
        ],
        patterns: &[GPT2],
        ignore_merges: false,
        adds_bos: false,
    },
    Pre {
        names: &["tekken"],
        patterns: &[TEKKEN],
        ignore_merges: true,
        adds_bos: true,
    },
    Pre {
        names: &["gpt-4o", "llama4", "kanana2"],
        patterns: &[GPT4O],
        ignore_merges: false,
        adds_bos: false,
    },
    Pre {
        names: &["falcon"],
        patterns: &[r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"],
        ignore_merges: false,
        adds_bos: false,
    },
];

/// llama.cpp's expression lacks the last alternative; a single white space that nothing matches is a piece of its own all the same.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

const LLAMA3: &str = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const QWEN2: &str = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Letters but for a to z, then letters but for A to Z: as near as llama.cpp comes to upper and lower case.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?(?:(?=\p{L})[^a-z])*(?:(?=\p{L})[^A-Z])+|[^\r\n\p{L}\p{N}]?(?:(?=\p{L})[^a-z])+(?:(?=\p{L})[^A-Z])*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?(?:(?=\p{L})[^a-z])*(?:(?=\p{L})[^A-Z])+(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])?|[^\r\n\p{L}\p{N}]?(?:(?=\p{L})[^a-z])+(?:(?=\p{L})[^A-Z])*(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_name_stands_in_two_rows() {
        let mut names: Vec<_> = Pre::names().collect();
        names.sort_unstable();
        let before = names.len();
        names.dedup();
        assert_eq!(names.len(), before);
    }

    #[test]
    fn every_expression_compiles() {
        for pattern in TABLE.iter().flat_map(|pre| pre.patterns) {
            assert!(fancy_regex::Regex::new(pattern).is_ok(), "{pattern}");
        }
    }
}
