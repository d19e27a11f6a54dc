//! Merges of a SentencePiece vocabulary, from its scores.
//!
//! SentencePiece (and llama.cpp) merge the two neighbors that together make the token of the highest score, of several such the leftmost. A
//! `tokenizer.json` lists merges instead, one for each way to make a token from two, in the order in which they are made.

use std::collections::HashMap;

use super::error::TokenizerError;
use super::vocabulary::Token;

/// Every way to make an ordinary token from two others, the highest score first; of one token, the longest left part first.
///
/// # Errors
/// [`TokenizerError::TokenTooLong`].
pub(super) fn merges<'a>(
    tokens: &'a [Token<'_>],
    scores: &[f32],
) -> Result<Vec<(&'a str, &'a str)>, TokenizerError> {
    let ordinary = || {
        tokens
            .iter()
            .enumerate()
            .filter(|(_, token)| !token.role.is_found())
    };
    let ids: HashMap<&str, usize> = ordinary()
        .map(|(id, token)| (token.text.as_ref(), id))
        .collect();
    let mut merges = Vec::new();
    for (id, token) in ordinary() {
        let text = token.text.as_ref();
        if text.len() > LONGEST {
            return Err(TokenizerError::TokenTooLong {
                id,
                length: text.len(),
                limit: LONGEST,
            });
        }
        let Some(&score) = scores.get(id) else {
            continue;
        };
        let middles = text.char_indices().skip(1);
        let ways = middles.filter_map(|(middle, _)| text.split_at_checked(middle));
        merges.extend(
            ways.filter(|(left, right)| ids.contains_key(left) && ids.contains_key(right))
                .map(|(left, right)| (score, id, left, right)),
        );
    }
    merges.sort_by(|a, b| {
        let by_score = b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
        by_score.then(b.2.len().cmp(&a.2.len()))
    });
    Ok(merges
        .into_iter()
        .map(|(_, _, left, right)| (left, right))
        .collect())
}

/// Bytes of a token that may be merged. Ways to split a token grow with its length, and so does the cost of looking each up; models in use
/// have at most some 50 bytes.
const LONGEST: usize = 1024;
