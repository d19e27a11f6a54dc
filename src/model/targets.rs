//! Which weight matrices a perturbation may touch.
//!
//! In: what the user asked for, as module names or a regular expression. Out: the list of [`Target`]s in a fixed order
//! (block by block, then by [`Projection`]), which every [`super::TargetTensors`] follows.

use std::fmt;
use std::str::FromStr;

use regex::Regex;
use thiserror::Error;

/// The weight matrices of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Projection {
    /// `self_attn.q_proj`
    Query,
    /// `self_attn.k_proj`
    Key,
    /// `self_attn.v_proj`
    Value,
    /// `self_attn.o_proj`
    Output,
    /// `mlp.gate_proj`
    Gate,
    /// `mlp.up_proj`
    Up,
    /// `mlp.down_proj`
    Down,
}

impl Projection {
    /// All of them, in the order of [`Target`]s.
    pub const ALL: [Self; 7] = [
        Self::Query,
        Self::Key,
        Self::Value,
        Self::Output,
        Self::Gate,
        Self::Up,
        Self::Down,
    ];

    /// The module's path inside its block.
    pub fn module(self) -> &'static str {
        match self {
            Self::Query => "self_attn.q_proj",
            Self::Key => "self_attn.k_proj",
            Self::Value => "self_attn.v_proj",
            Self::Output => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
        }
    }
}

/// A weight matrix that is optimized.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Target {
    /// The tensor's name in the checkpoint.
    pub name: String,
    /// Outputs and inputs of the projection.
    pub shape: [usize; 2],
    /// Index of the block it belongs to.
    pub block: usize,
    /// Its role there.
    pub projection: Projection,
}

/// What the user asked for: names of modules, or one regular expression, as in PEFT's `target_modules`.
#[derive(Clone, Debug)]
pub struct TargetSelection {
    text: String,
    rule: Rule,
}

#[derive(Clone, Debug)]
enum Rule {
    /// A module whose path is, or ends in `.` and, one of these.
    Names(Vec<String>),
    /// A module whose whole path matches.
    Pattern(Regex),
}

impl TargetSelection {
    /// Whether the module at `path`, such as `model.layers.0.self_attn.q_proj`, is selected.
    pub fn selects(&self, path: &str) -> bool {
        match &self.rule {
            Rule::Names(names) => names.iter().any(|name| {
                path.strip_suffix(name.as_str())
                    .is_some_and(|before| before.is_empty() || before.ends_with('.'))
            }),
            Rule::Pattern(regex) => regex.is_match(path),
        }
    }
}

impl Default for TargetSelection {
    /// `q_proj,k_proj,v_proj`, the paper's.
    fn default() -> Self {
        let names = ["q_proj", "k_proj", "v_proj"];
        Self {
            text: names.join(","),
            rule: Rule::Names(names.map(str::to_owned).into()),
        }
    }
}

impl fmt::Display for TargetSelection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for TargetSelection {
    type Err = SelectionError;

    /// Names separated by commas; a text with any character that no name holds is a regular expression for whole paths.
    fn from_str(text: &str) -> Result<Self, SelectionError> {
        let name_like = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | ',');
        let rule = if text.chars().all(name_like) {
            let names: Vec<String> = text.split(',').map(str::to_owned).collect();
            if names.iter().any(String::is_empty) {
                return Err(SelectionError::EmptyName {
                    text: text.to_owned(),
                });
            }
            Rule::Names(names)
        } else {
            Rule::Pattern(Regex::new(&format!("^(?:{text})$"))?)
        };
        Ok(Self {
            text: text.to_owned(),
            rule,
        })
    }
}

/// Why a selection of targets could not be read.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SelectionError {
    /// Nothing between two commas, or nothing at all.
    #[error("`{text}` holds an empty name")]
    EmptyName {
        /// What was given.
        text: String,
    },
    /// Not a regular expression.
    #[error("it is not a valid regular expression")]
    Pattern(#[from] regex::Error),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_match_whole_components_from_the_end() {
        let selection: TargetSelection = "q_proj,mlp.up_proj".parse().expect("names");
        assert!(selection.selects("model.layers.3.self_attn.q_proj"));
        assert!(selection.selects("model.layers.3.mlp.up_proj"));
        assert!(!selection.selects("model.layers.3.self_attn.uq_proj"));
        assert!(!selection.selects("model.layers.3.mlp.gate_proj"));
    }

    #[test]
    fn a_pattern_matches_the_whole_path() {
        let selection: TargetSelection =
            r"model\.layers\.(1|2)\..*_proj".parse().expect("a pattern");
        assert!(selection.selects("model.layers.2.mlp.down_proj"));
        assert!(!selection.selects("model.layers.12.mlp.down_proj"));
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(matches!(
            "".parse::<TargetSelection>(),
            Err(SelectionError::EmptyName { .. })
        ));
        assert!(matches!(
            "q_proj,,v".parse::<TargetSelection>(),
            Err(SelectionError::EmptyName { .. })
        ));
        assert!(matches!(
            "(".parse::<TargetSelection>(),
            Err(SelectionError::Pattern(_))
        ));
    }
}
