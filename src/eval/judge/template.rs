//! The text that a judge is given, from a file of the user's.
//!
//! In: a text with placeholders. Out: that text with an exchange in their places. HarmBench's names of placeholders are taken as well as
//! this program's own, so that its templates can be used as they are. Other braces are text.
//!
//! | placeholder | stands for |
//! |---|---|
//! | `{request}`, `{behavior}`, `{question}`, `{prompt}` | the request; together with what it is about, unless that has a place of its own |
//! | `{context}` | what the request is about; nothing where the row does not say |
//! | `{answer}`, `{generation}`, `{response}` | the answer |
//!
//! What is put in is not searched again: an answer that spells a placeholder stays as it is.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use panacea_formats::{Sha256, nearest};
use thiserror::Error;

use super::Exchange;

/// A text with places for an exchange.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JudgeTemplate {
    pieces: Vec<Piece>,
    sha256: Sha256,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece {
    Text(String),
    Request,
    Context,
    Answer,
}

impl JudgeTemplate {
    /// Reads the file at `path`. Its last line break is the editor's, and left out.
    ///
    /// # Errors
    /// [`JudgeTemplateError`] when it cannot be read, is not UTF-8, or has no place for the answer.
    pub fn read(path: &Path) -> Result<Self, JudgeTemplateError> {
        let text = fs::read_to_string(path).map_err(|source| JudgeTemplateError::Io {
            path: path.to_owned(),
            source,
        })?;
        let text = text.strip_suffix('\n').unwrap_or(&text);
        text.strip_suffix('\r').unwrap_or(text).parse()
    }

    /// The digest of the text.
    pub fn sha256(&self) -> Sha256 {
        self.sha256
    }

    /// The text with `exchange` in its places.
    pub fn fill(&self, exchange: &Exchange<'_>) -> String {
        let request = match self.pieces.contains(&Piece::Context) {
            true => exchange.request.into(),
            false => exchange.question(),
        };
        let filled = self.pieces.iter().map(|piece| match piece {
            Piece::Text(text) => text,
            Piece::Request => &*request,
            Piece::Context => exchange.context.unwrap_or_default(),
            Piece::Answer => exchange.answer,
        });
        filled.collect()
    }
}

impl FromStr for JudgeTemplate {
    type Err = JudgeTemplateError;

    fn from_str(text: &str) -> Result<Self, JudgeTemplateError> {
        let mut pieces = Vec::new();
        let mut unknown = Vec::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once('{') {
            push(&mut pieces, before);
            let (name, behind) = after.split_once('}').unwrap_or(("", ""));
            rest = match piece(name) {
                Some(piece) => {
                    pieces.push(piece);
                    behind
                }
                None => {
                    unknown.push(name);
                    push(&mut pieces, "{");
                    after
                }
            };
        }
        push(&mut pieces, rest);
        if !pieces.contains(&Piece::Answer) {
            let meant = |name: &str| nearest(name, ANSWER).map(|_| name.to_owned());
            return Err(JudgeTemplateError::NoAnswer {
                found: unknown.into_iter().find_map(meant),
            });
        }
        Ok(Self {
            pieces,
            sha256: Sha256::of(text.as_bytes()),
        })
    }
}

/// Puts `text` behind the pieces so far.
fn push(pieces: &mut Vec<Piece>, text: &str) {
    match pieces.last_mut() {
        Some(Piece::Text(last)) => last.push_str(text),
        _ if text.is_empty() => {}
        _ => pieces.push(Piece::Text(text.to_owned())),
    }
}

fn piece(name: &str) -> Option<Piece> {
    match name {
        "context" => Some(Piece::Context),
        name if REQUEST.contains(&name) => Some(Piece::Request),
        name if ANSWER.contains(&name) => Some(Piece::Answer),
        _ => None,
    }
}

const REQUEST: [&str; 4] = ["request", "behavior", "question", "prompt"];
const ANSWER: [&str; 3] = ["answer", "generation", "response"];

/// Why a text is no template.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum JudgeTemplateError {
    /// The file cannot be read, or is not UTF-8.
    #[error("cannot read the judge's template `{}`", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Nothing says where the answer belongs.
    #[error(
        "the judge's template has no place for the answer: none of `{{answer}}`, `{{generation}}` and `{{response}}` is in it{}",
        found.as_ref().map_or_else(String::new, |name| format!(", but `{{{name}}}`"))
    )]
    NoAnswer {
        /// What stands in braces and is spelled almost so.
        found: Option<String>,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(template: &str, context: Option<&str>) -> String {
        template.parse::<JudgeTemplate>().unwrap().fill(&Exchange {
            request: "Why {answer}?",
            context,
            answer: "Because {request}.",
        })
    }

    #[test]
    fn placeholders_are_filled_once() {
        assert_eq!(
            fill("<{request}|{answer}|{generation}>", None),
            "<Why {answer}?|Because {request}.|Because {request}.>"
        );
    }

    #[test]
    fn context_is_part_of_the_request_unless_it_has_a_place() {
        assert_eq!(
            fill("{behavior}: {response}", Some("A text.")),
            "Why {answer}?\n\nA text.: Because {request}."
        );
        assert_eq!(
            fill("{context}/{question}/{answer}", Some("A text.")),
            "A text./Why {answer}?/Because {request}."
        );
        assert_eq!(fill("[{context}]{answer}", None), "[]Because {request}.");
    }

    #[test]
    fn other_braces_are_text() {
        assert_eq!(
            fill("{{answer}} {\"score\": {x}} { {answer", None).replace("Because {request}.", "A"),
            "{A} {\"score\": {x}} { {answer"
        );
    }

    #[test]
    fn a_template_without_the_answer_is_refused() {
        let error = |text: &str| text.parse::<JudgeTemplate>().unwrap_err().to_string();
        assert_eq!(
            error("{request}"),
            "the judge's template has no place for the answer: none of `{answer}`, `{generation}` and `{response}` is in it"
        );
        assert!(error("{x} {anwser}").ends_with("is in it, but `{anwser}`"));
    }

    #[test]
    fn the_last_line_break_of_a_file_is_no_text() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("template.txt");
        for (content, text) in [
            ("a {answer}\n\n", "a {answer}\n"),
            ("{answer}:\r\n", "{answer}:"),
        ] {
            fs::write(&path, content).unwrap();
            let read = JudgeTemplate::read(&path).unwrap();
            assert_eq!(read, text.parse().unwrap());
        }
        let missing = JudgeTemplate::read(&directory.path().join("none"));
        assert!(matches!(missing, Err(JudgeTemplateError::Io { .. })));
    }
}
