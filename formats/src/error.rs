//! Why a file was refused: its path, and a kind that carries what was claimed, what was found, and where.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::checkpoint::CheckpointError;
use crate::gguf::GgufError;
use crate::peft::PeftError;
use crate::perturbation::PerturbationError;
use crate::safetensors::SafetensorsError;

/// An input that cannot be read, or must not be trusted.
#[derive(Debug, Error)]
#[error("cannot read `{}`", path.display())]
pub struct FormatError {
    /// The file or directory that was refused.
    pub path: PathBuf,
    /// The reason.
    #[source]
    pub kind: FormatErrorKind,
}

impl FormatError {
    /// An error about `path`.
    pub fn new(path: &Path, kind: impl Into<FormatErrorKind>) -> Self {
        Self {
            path: path.to_owned(),
            kind: kind.into(),
        }
    }

    /// Whether the machine is to blame (permissions, a failing disk) rather than the input. A path that does not exist is the
    /// input's fault.
    pub fn is_environment(&self) -> bool {
        matches!(&self.kind, FormatErrorKind::Io(error) if is_environment(error))
    }
}

/// Whether an I/O error speaks of the machine rather than of the path that was named.
pub(crate) fn is_environment(error: &io::Error) -> bool {
    !matches!(
        error.kind(),
        io::ErrorKind::NotFound
            | io::ErrorKind::NotADirectory
            | io::ErrorKind::IsADirectory
            | io::ErrorKind::InvalidInput
            | io::ErrorKind::InvalidFilename
    )
}

/// Why an input was refused.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum FormatErrorKind {
    /// The length is no longer the one at opening.
    #[error("the file had {opened} bytes when it was opened and has {found} now")]
    Changed {
        /// Length at opening.
        opened: u64,
        /// Length now.
        found: u64,
    },
    /// The files of the checkpoint do not fit together.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Not a sound GGUF file, or not all of a split one.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// The operating system said no.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// A PEFT directory that is no adapter that can be computed with.
    #[error(transparent)]
    Peft(#[from] PeftError),
    /// A sound safetensors file, and not a perturbation that can be applied.
    #[error(transparent)]
    Perturbation(#[from] PerturbationError),
    /// Not a sound safetensors file.
    #[error(transparent)]
    Safetensors(#[from] SafetensorsError),
}

/// One or more problems of one kind, in the order in which they were found. `Display` shows the first ten and counts the rest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problems<T>(Vec<T>);

impl<T> Problems<T> {
    /// `Ok` when nothing was found.
    ///
    /// # Errors
    /// The problems, when there are any.
    pub fn none_of(found: Vec<T>) -> Result<(), Self> {
        if found.is_empty() {
            Ok(())
        } else {
            Err(Self(found))
        }
    }

    /// All of them.
    pub fn all(&self) -> &[T] {
        &self.0
    }
}

impl<T: fmt::Display> fmt::Display for Problems<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, problem) in self.0.iter().take(SHOWN_PROBLEMS).enumerate() {
            let separator = if i == 0 { "" } else { "; " };
            write!(f, "{separator}{problem}")?;
        }
        match self.0.len().saturating_sub(SHOWN_PROBLEMS) {
            0 => Ok(()),
            more => write!(f, "; and {more} more"),
        }
    }
}

impl<T: fmt::Debug + fmt::Display> std::error::Error for Problems<T> {}

/// Problems that a message spells out; more scroll the first one off a terminal.
const SHOWN_PROBLEMS: usize = 10;

/// A name out of a file as a message may show it: control characters escaped, because they could steer a terminal, and cut.
pub fn shown(name: &str) -> impl fmt::Display + '_ {
    struct Shown<'a>(&'a str);
    impl fmt::Display for Shown<'_> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            let mut characters = self.0.chars();
            for character in characters.by_ref().take(SHOWN_CHARACTERS) {
                if character == '\'' || character == '"' {
                    write!(f, "{character}")?;
                } else {
                    write!(f, "{}", character.escape_debug())?;
                }
            }
            if characters.next().is_some() {
                f.write_str("...")?;
            }
            Ok(())
        }
    }
    Shown(name)
}

/// Tensor names in use are below 100 characters; a hostile one may have millions.
const SHOWN_CHARACTERS: usize = 200;

/// Of `names`, the one that most resembles `wanted`, if any is near enough to be a likely slip: at most a third of the
/// characters edited.
pub fn nearest<'a>(wanted: &str, names: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let wanted: Vec<char> = wanted.chars().take(SHOWN_CHARACTERS).collect();
    names
        .into_iter()
        .map(|name| (edits(&wanted, name), name))
        .filter(|&(edits, name)| edits * 3 <= wanted.len().max(name.len()))
        .min()
        .map(|(_, name)| name)
}

/// The Levenshtein distance between `a` and the first characters of `b`.
fn edits(a: &[char], b: &str) -> usize {
    let mut row: Vec<usize> = (0..=a.len()).collect();
    for (i, other) in b.chars().take(SHOWN_CHARACTERS).enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, &character) in a.iter().enumerate() {
            let replaced = diagonal + usize::from(character != other);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[a.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_steer_a_terminal_or_fill_it() {
        assert_eq!(shown("a\u{1b}[2J\n").to_string(), "a\\u{1b}[2J\\n");
        assert_eq!(shown(&"x".repeat(200)).to_string().len(), 200);
        assert_eq!(
            shown(&"x".repeat(201)).to_string(),
            format!("{}...", "x".repeat(200))
        );
    }

    #[test]
    fn ten_problems_are_spelled_out_and_the_rest_counted() {
        let ten = Problems((0..10).collect::<Vec<_>>());
        assert_eq!(ten.to_string(), "0; 1; 2; 3; 4; 5; 6; 7; 8; 9");
        let twelve = Problems((0..12).collect::<Vec<_>>());
        assert!(twelve.to_string().ends_with("8; 9; and 2 more"));
        assert!(Problems::<u8>::none_of(Vec::new()).is_ok());
    }

    #[test]
    fn a_slip_finds_its_neighbor_and_a_stranger_finds_none() {
        let names = ["lm_head.weight", "model.norm.weight"];
        assert_eq!(nearest("lmhead.weight", names), Some("lm_head.weight"));
        assert_eq!(
            nearest("model.norm.weights", names),
            Some("model.norm.weight")
        );
        assert_eq!(nearest("q", names), None);
    }
}
