//! Whether a task item is answered right.
//!
//! In: the item's expected answer and the model's. Out: right or wrong, by one of three rules, which are those of the paper's
//! tasks: SST-2 and AG News by their labels, GSM8K by its number.

use std::fmt;
use std::str::FromStr;
use std::sync::LazyLock;

use regex::Regex;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Which rule is asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GradingChoice {
    /// By number where every expected answer marks one, exactly otherwise.
    #[default]
    Auto,
    /// This one.
    Rule(Grading),
}

impl GradingChoice {
    /// The rule for a task with these expected answers.
    pub fn settle<'a>(self, expected: impl IntoIterator<Item = &'a str>) -> Grading {
        match self {
            Self::Rule(grading) => grading,
            Self::Auto => {
                let mut expected = expected.into_iter().peekable();
                let marked = |answer: &str| MARKERS.iter().any(|marker| answer.contains(marker));
                if expected.peek().is_some() && expected.all(marked) {
                    Grading::Number
                } else {
                    Grading::Exact
                }
            }
        }
    }
}

impl FromStr for GradingChoice {
    type Err = UnknownGrading;

    fn from_str(text: &str) -> Result<Self, UnknownGrading> {
        let rules = [Grading::Exact, Grading::FirstWord, Grading::Number].map(Self::Rule);
        ([Self::Auto].into_iter().chain(rules))
            .find(|choice| choice.to_string() == text)
            .ok_or_else(|| UnknownGrading(text.chars().take(64).collect()))
    }
}

impl fmt::Display for GradingChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Rule(grading) => grading.fmt(f),
        }
    }
}

/// Not the name of a rule.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error(
    "`{}` is none of `auto`, `exact`, `first-word` and `number`",
    panacea_formats::shown(.0)
)]
pub struct UnknownGrading(String);

/// The rule by which answers are right or wrong.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Grading {
    /// The whole text, without blanks around it, is the expected one; the case of its first letter does not matter. Of AG News' `Sci/Tech`,
    /// `sci` is enough, as in the paper's evaluation.
    Exact,
    /// The first word is the expected answer's, in any case and without punctuation around it. For models that go on talking.
    FirstWord,
    /// The number is the expected one. The number of a text is the first after `The final answer is:` or `####`, else the last one;
    /// commas are left out of it before.
    Number,
}

impl fmt::Display for Grading {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Exact => "exact",
            Self::FirstWord => "first-word",
            Self::Number => "number",
        })
    }
}

/// Whether `answer` is right where `expected` was, by the rule `grading`.
///
/// An expected answer that holds nothing to compare, no word or no number, makes every answer wrong.
pub fn right(grading: Grading, expected: &str, answer: &str) -> bool {
    match grading {
        Grading::Exact => {
            let (expected, answer) = (uncapitalized(expected), uncapitalized(answer));
            expected == answer || (expected == "sci/Tech" && answer == "sci")
        }
        Grading::FirstWord => {
            let expected = first_word(expected);
            expected.is_some() && expected == first_word(answer)
        }
        Grading::Number => {
            let expected = number(expected);
            expected.is_some() && expected == number(answer)
        }
    }
}

/// `text` without blanks around it, and with a small first letter if it is one of ASCII.
fn uncapitalized(text: &str) -> String {
    let mut text = text.trim().to_owned();
    if let Some(first) = text.get_mut(..1) {
        first.make_ascii_lowercase();
    }
    text
}

/// The first of the words of `text` that has a letter or digit, in small letters, without what stands around it; a number keeps its sign.
fn first_word(text: &str) -> Option<String> {
    let word = (text.split_whitespace()).find(|word| word.contains(char::is_alphanumeric))?;
    let inside = word.trim_matches(|c: char| !c.is_alphanumeric());
    let before = word.len()
        - word
            .trim_start_matches(|c: char| !c.is_alphanumeric())
            .len();
    let negative =
        word[..before].ends_with('-') && inside.starts_with(|c: char| c.is_ascii_digit());
    let sign = if negative { "-" } else { "" };
    Some(format!("{sign}{}", inside.to_lowercase()))
}

/// The number that `text` gives as its answer.
fn number(text: &str) -> Option<f64> {
    let text = text.replace(',', "");
    let marked = (MARKERS.iter())
        .filter_map(|marker| text.find(marker).map(|start| start + marker.len()))
        .min();
    let first_marked = marked.and_then(|start| NUMBER.find(&text[start..]));
    let found = first_marked.or_else(|| NUMBER.find_iter(&text).last())?;
    let number: f64 = found.as_str().parse().ok()?;
    // Beyond what f64 holds, all numbers would be equal.
    number.is_finite().then_some(number)
}

/// What stands before the number of an answer: in the paper's form of GSM8K, and in its own.
const MARKERS: [&str; 2] = ["The final answer is:", "####"];

static NUMBER: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"-?[0-9]+\.?[0-9]*").expect("a pattern of this file"));

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_rules_are_read_back() {
        for name in ["auto", "exact", "first-word", "number"] {
            assert_eq!(name.parse::<GradingChoice>().unwrap().to_string(), name);
        }
        assert!("f1".parse::<GradingChoice>().is_err());
        let json = serde_json::to_value(Grading::FirstWord).unwrap();
        assert_eq!(json, Grading::FirstWord.to_string());
    }

    #[test]
    fn a_label_is_right_with_a_large_or_small_first_letter() {
        for (expected, answer, is_right) in [
            ("positive", " Positive\n", true),
            ("Positive", "positive", true),
            ("positive", "POSITIVE", false),
            ("positive", "positive.", false),
            ("positive", "negative", false),
            ("Sci/Tech", "sci", true),
            ("Sci/Tech", "Sci/Tech", true),
            ("Sci/Tech", "Science", false),
            ("sci", "Sci/Tech", false),
            ("World", "world", true),
            ("\u{e4}", "\u{c4}", false),
            ("positive", "", false),
        ] {
            let found = right(Grading::Exact, expected, answer);
            assert_eq!(found, is_right, "{answer:?} for {expected:?}");
        }
    }

    #[test]
    fn a_first_word_is_right_whatever_follows() {
        for (expected, answer, is_right) in [
            ("positive", "**Positive**, because it praises.", true),
            ("positive", "- positive", true),
            ("Sci/Tech", "sci/tech.", true),
            ("positive", "The sentiment is positive", false),
            ("5", "-5", false),
            ("-5", "(-5)", true),
            ("positive", "...", false),
            ("...", "...", false),
            ("\u{e4}rger", "\u{c4}RGER!", true),
        ] {
            let found = right(Grading::FirstWord, expected, answer);
            assert_eq!(found, is_right, "{answer:?} for {expected:?}");
        }
    }

    #[test]
    fn a_number_is_found_behind_its_marker_or_last() {
        for (expected, answer, is_right) in [
            (
                "So it is 2.\nThe final answer is:  72",
                "The final answer is: 72",
                true,
            ),
            ("#### 1,072", "That makes 1072.", true),
            ("#### 72", "The final answer is: 72.00 apples of 80", true),
            ("#### 72", "#### 72\n\nQuestion: 3 more?\n#### 5", true),
            ("#### 72", "The final answer is: 72\n#### 5", true),
            ("#### 72", "#### 72\nThe final answer is: 5", true),
            ("#### 72", "The final answer is: 70. No, 72", false),
            ("#### 72", "It is 72. The final answer is: as above", true),
            ("#### 72", "first 72, then 80", false),
            ("#### -3", "it falls to -3", true),
            ("#### 3", "it falls to -3", false),
            ("#### 0.5", "0.50", true),
            ("#### 72", "seventy-two", false),
            ("none", "none", false),
        ] {
            let found = right(Grading::Number, expected, answer);
            assert_eq!(found, is_right, "{answer:?} for {expected:?}");
        }
        let (long, longer) = ("9".repeat(400), "9".repeat(401));
        assert!(!right(Grading::Number, &long, &longer));
    }

    #[test]
    fn auto_grades_by_number_only_where_every_answer_marks_one() {
        let settle = |answers: &[&str]| GradingChoice::Auto.settle(answers.iter().copied());
        assert_eq!(
            settle(&["#### 1", "The final answer is: 2"]),
            Grading::Number
        );
        assert_eq!(settle(&["#### 1", "2"]), Grading::Exact);
        assert_eq!(settle(&[]), Grading::Exact);
        let chosen = GradingChoice::Rule(Grading::FirstWord);
        assert_eq!(chosen.settle(["#### 1"]), Grading::FirstWord);
    }
}
