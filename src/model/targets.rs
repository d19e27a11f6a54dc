//! Which weight matrices a perturbation may touch.
//!
//! In: what the user asked for, as module names or a regular expression. Out: the list of [`Target`]s in a fixed order
//! ([`place_of_module`]), which every [`super::TargetTensors`] follows.

use std::fmt;
use std::str::FromStr;

use regex::Regex;
use thiserror::Error;

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
}

/// Where the module at `path` stands in the order of all targets: block by block; in a block those that all tokens pass before those
/// of experts, one expert after the other; there in the order of the computation; and by name what is called otherwise.
pub fn place_of_module(path: &str) -> (Option<usize>, Option<usize>, usize, &str) {
    let number = |part: &str| part.parse::<usize>().ok();
    let block = path.split('.').find_map(number);
    let expert = path.split('.').skip_while(|part| *part != "experts").nth(1);
    let last = path.rsplit('.').next().unwrap_or(path);
    let rank = MODULES.iter().position(|module| *module == last);
    let rank = rank.unwrap_or(MODULES.len());
    (block, expert.and_then(number), rank, path)
}

/// What the matrices of a block are called, in the order of the computation.
const MODULES: [&str; 12] = [
    "q_proj",
    "k_proj",
    "v_proj",
    "qkv_proj",
    "o_proj",
    "gate_proj",
    "w1",
    "up_proj",
    "w3",
    "gate_up_proj",
    "down_proj",
    "w2",
];

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
    /// `q_proj,k_proj,v_proj,qkv_proj`: the paper's, and what some models have in place of them.
    fn default() -> Self {
        let names = ["q_proj", "k_proj", "v_proj", "qkv_proj"];
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
    fn modules_are_ordered_by_block_expert_and_computation() {
        let ordered = [
            "model.layers.2.self_attn.q_proj",
            "model.layers.2.self_attn.v_proj",
            "model.layers.2.mlp.down_proj",
            "model.layers.2.mlp.gate",
            "model.layers.2.mlp.experts.2.down_proj",
            "model.layers.2.mlp.experts.10.gate_proj",
            "model.layers.10.self_attn.k_proj",
        ];
        assert!(ordered.is_sorted_by_key(|path| place_of_module(path)));
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
