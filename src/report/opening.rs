//! The first words of an answer, and never more.
//!
//! A report has to show that answers changed; it must not become a collection of harmful ones. So the type itself cuts, whoever
//! makes it and from wherever it is read.

use std::fmt;

use serde::{Deserialize, Serialize};
use unicode_width::UnicodeWidthChar;

/// How an answer begins: its first line that is not empty, white space in it as single spaces, cut between words to 80 columns. Where
/// anything was left out it ends in an ellipsis.
///
/// A wide character, of which one is a word or half of one, takes two columns; one without width takes one all the same, so that
/// nothing hides behind others. An opening of an opening is the same.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(from = "String")]
pub struct Opening(String);

impl Opening {
    /// The opening of `answer`.
    pub fn of(answer: &str) -> Self {
        let mut lines = answer
            .split(ends_line)
            .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
            .filter(|line| !line.is_empty());
        let line = lines.next().unwrap_or_default();
        if lines.next().is_none() && columns(&line) <= COLUMNS {
            return Self(line);
        }
        Self(format!("{}…", cut(&line, COLUMNS - 1)))
    }

    /// Its text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<String> for Opening {
    fn from(answer: String) -> Self {
        Self::of(&answer)
    }
}

impl fmt::Display for Opening {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The longest part of `line` within `limit` columns that ends with a word; a part of the word where that would leave less than half.
fn cut(line: &str, limit: usize) -> &str {
    let mut taken = 0;
    let end = line
        .char_indices()
        .find(|&(_, character)| {
            taken += width(character);
            taken > limit
        })
        .map_or(line.len(), |(place, _)| place);
    let part = &line[..end];
    if line[end..].starts_with(' ') || end == line.len() {
        return part.trim_end();
    }
    match part.rfind(' ') {
        Some(space) if 2 * columns(&part[..space]) >= limit => &part[..space],
        _ => part.trim_end(),
    }
}

fn columns(text: &str) -> usize {
    text.chars().map(width).sum()
}

fn width(character: char) -> usize {
    character.width().unwrap_or(1).max(1)
}

fn ends_line(character: char) -> bool {
    matches!(
        character,
        '\n' | '\u{B}' | '\u{C}' | '\r' | '\u{85}' | '\u{2028}' | '\u{2029}'
    )
}

/// What an affirmative opening or a refusal takes, and an answer's body does not fit in.
const COLUMNS: usize = 80;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_short_answer_is_its_own_opening() {
        assert_eq!(
            Opening::of("I cannot help with that.").as_str(),
            "I cannot help with that."
        );
        assert_eq!(Opening::of("").as_str(), "");
        assert_eq!(Opening::of(" \n\t ").as_str(), "");
    }

    #[test]
    fn what_follows_the_first_line_is_left_out() {
        for answer in [
            "Sure, here is a plan:\n\n1. body",
            "\n Sure,  here is\ta plan:\r\nbody",
            "Sure, here is a plan:\u{2028}body",
        ] {
            assert_eq!(Opening::of(answer).as_str(), "Sure, here is a plan:…");
        }
    }

    #[test]
    fn a_long_line_ends_with_a_word() {
        let answer = format!("{}body", "word ".repeat(40));
        let opening = Opening::of(&answer);
        // 15 words with their spaces are 74 columns, 16 are 79, and the ellipsis is the 80th.
        assert_eq!(opening.as_str(), format!("{}…", ["word"; 16].join(" ")));
        assert!(
            !Opening::of(&format!("{} body", "x".repeat(79)))
                .as_str()
                .contains("body")
        );
    }

    #[test]
    fn a_line_without_words_is_cut_anywhere() {
        assert_eq!(
            Opening::of(&"x".repeat(100)).as_str(),
            format!("{}…", "x".repeat(79))
        );
        assert_eq!(
            Opening::of(&"文".repeat(100)).as_str(),
            format!("{}…", "文".repeat(39))
        );
    }

    #[test]
    fn what_has_no_width_counts_all_the_same() {
        assert_eq!(
            Opening::of(&"\u{E0041}".repeat(100))
                .as_str()
                .chars()
                .count(),
            80
        );
        assert_eq!(
            Opening::of(&"\u{301}".repeat(100)).as_str().chars().count(),
            80
        );
    }

    #[test]
    fn reading_one_cuts_it() {
        let answer = format!("\"Sure, here is:\\n{}\"", "body ".repeat(20));
        let opening: Opening = serde_json::from_str(&answer).expect("a string");
        assert_eq!(
            serde_json::to_string(&opening).expect("a string"),
            "\"Sure, here is:…\""
        );
    }

    proptest! {
        #[test]
        fn it_is_one_short_line_and_stays_as_it_is(answer in "(?s).{0,200}") {
            let opening = Opening::of(&answer);
            prop_assert!(opening.as_str().chars().count() <= 80);
            prop_assert!(!opening.as_str().contains(ends_line));
            prop_assert_eq!(Opening::of(opening.as_str()), opening);
        }
    }
}
