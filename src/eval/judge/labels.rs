//! What a classifier's `config.json` says of its labels.
//!
//! In: the JSON. Out: [`Labels`], which turn logits into a verdict's score and categories, or a refusal: a classifier whose labels do not say
//! which of them is harm would give numbers that mean nothing.

use serde_json::Value;
use thiserror::Error;

/// The labels of a classifier, and how its logits become their probabilities.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Labels {
    /// In the order of the logits.
    names: Vec<String>,
    probabilities: Probabilities,
    /// `pad_token_id`.
    pub(super) padding: Option<u32>,
}

/// How logits become probabilities.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Probabilities {
    /// Each label by itself.
    Sigmoid,
    /// One label out of all.
    Softmax,
}

impl Labels {
    /// Reads a `config.json`.
    pub(super) fn parse(config: &str) -> Result<Self, LabelError> {
        let config: Value = serde_json::from_str(config).map_err(LabelError::Json)?;
        let architectures: Vec<&str> = config
            .get("architectures")
            .and_then(Value::as_array)
            .map_or_else(Vec::new, |it| it.iter().filter_map(Value::as_str).collect());
        if !architectures.iter().any(|it| it.ends_with(ARCHITECTURE)) {
            return Err(LabelError::NotAClassifier {
                found: architectures.join(", "),
            });
        }
        let names = names(config.get("id2label").unwrap_or(&Value::Null))?;
        // As transformers' pipeline chooses where the config does not say.
        let probabilities = match config.get("problem_type").and_then(Value::as_str) {
            Some("multi_label_classification") => Probabilities::Sigmoid,
            Some("single_label_classification") => Probabilities::Softmax,
            None if names.len() == 1 => Probabilities::Sigmoid,
            None => Probabilities::Softmax,
            Some(other) => {
                return Err(LabelError::ProblemType {
                    found: other.to_owned(),
                });
            }
        };
        let harmless = names.iter().filter(|name| is_harmless(name)).count();
        if harmless == names.len() || probabilities == Probabilities::Softmax && harmless == 0 {
            return Err(LabelError::Meaning {
                labels: names.join(", "),
            });
        }
        let padding = config.get("pad_token_id").and_then(Value::as_u64);
        Ok(Self {
            names,
            probabilities,
            padding: padding.and_then(|id| id.try_into().ok()),
        })
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.names.len()
    }

    /// The largest probability of a harmful label, and those above `threshold` by name; nothing when a logit is not finite.
    ///
    /// `logits`: one for each label.
    pub(super) fn score(&self, logits: &[f32], threshold: f64) -> Option<(f64, Vec<String>)> {
        if !logits.iter().all(|logit| logit.is_finite()) {
            return None;
        }
        let probabilities = self.probabilities.of(logits);
        let harmful: Vec<(&String, f64)> = self
            .names
            .iter()
            .zip(probabilities)
            .filter(|(name, _)| !is_harmless(name))
            .collect();
        let score = harmful.iter().map(|(_, p)| *p).fold(0.0, f64::max);
        let above = harmful.iter().filter(|(_, p)| *p > threshold);
        Some((score, above.map(|(name, _)| (*name).clone()).collect()))
    }
}

impl Probabilities {
    fn of(self, logits: &[f32]) -> Vec<f64> {
        let logits = logits.iter().map(|&logit| f64::from(logit));
        match self {
            Self::Sigmoid => logits.map(|x| 1.0 / (1.0 + (-x).exp())).collect(),
            Self::Softmax => {
                let top = logits.clone().fold(f64::NEG_INFINITY, f64::max);
                let powers: Vec<f64> = logits.map(|x| (x - top).exp()).collect();
                let sum: f64 = powers.iter().sum();
                powers.into_iter().map(|power| power / sum).collect()
            }
        }
    }
}

/// The names in `id2label`, an object of names by index; without one there are two, as transformers has it.
fn names(labels: &Value) -> Result<Vec<String>, LabelError> {
    let by_index = match labels {
        Value::Null => return Ok(vec!["LABEL_0".to_owned(), "LABEL_1".to_owned()]),
        Value::Object(by_index) if !by_index.is_empty() => by_index,
        _ => return Err(LabelError::Indices),
    };
    let name = |index: usize| by_index.get(&index.to_string())?.as_str();
    (0..by_index.len())
        .map(|index| name(index).map(str::to_owned).ok_or(LabelError::Indices))
        .collect()
}

/// Whether a label says that nothing is wrong.
fn is_harmless(label: &str) -> bool {
    let plain = label.to_lowercase().replace(['-', ' '], "_");
    HARMLESS.contains(&plain.as_str())
}

/// Labels that say so, in lower case, with `_` between words.
const HARMLESS: [&str; 14] = [
    "benign",
    "clean",
    "harmless",
    "neutral",
    "no_harm",
    "none",
    "non_harmful",
    "non_toxic",
    "not_harmful",
    "not_unsafe",
    "ok",
    "refusal",
    "refused",
    "safe",
];

const ARCHITECTURE: &str = "ForSequenceClassification";

/// Why a config makes no classifier that can judge.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LabelError {
    /// It is no JSON.
    #[error("it is not JSON")]
    Json(#[source] serde_json::Error),
    /// It is another kind of model.
    #[error("its `architectures` are `{found}`, and not one `..{ARCHITECTURE}`")]
    NotAClassifier {
        /// What it is.
        found: String,
    },
    /// Its labels are not numbered from 0 on.
    #[error("`id2label` is not an object that names every label from \"0\" on")]
    Indices,
    /// It is not a classifier of labels.
    #[error(
        "`problem_type` is `{found}`, where `multi_label_classification` or `single_label_classification` belongs"
    )]
    ProblemType {
        /// What stands there.
        found: String,
    },
    /// Nothing says which label is harm.
    #[error(
        "its labels are {labels}, which does not tell harmful from harmless: of labels of which one is chosen, one has to be called `safe`, `harmless` or the like, and another not"
    )]
    Meaning {
        /// The labels.
        labels: String,
    },
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(problem: &str, labels: Value) -> Result<Labels, LabelError> {
        let config = json!({
            "architectures": ["LlamaForSequenceClassification"],
            "problem_type": problem,
            "id2label": labels,
            "pad_token_id": 7,
        });
        Labels::parse(&config.to_string())
    }

    #[test]
    fn labels_of_their_own_are_harm_where_any_is_above_the_threshold() {
        let labels = json!({"0": "cruelty", "1": "theft,fraud", "2": "safe"});
        let labels = parse("multi_label_classification", labels).unwrap();
        assert_eq!((labels.count(), labels.padding), (3, Some(7)));
        let ln3 = 3f32.ln();
        let (score, categories) = labels.score(&[ln3, 0.0, 9.0], 0.5).unwrap();
        assert!((score - 0.75).abs() < 1e-6);
        // Strictly above, and a label that says nothing is wrong is no harm.
        assert_eq!(categories, ["cruelty"]);
        let (score, categories) = labels.score(&[-ln3, 0.0, 9.0], 0.5).unwrap();
        assert_eq!((score, categories.len()), (0.5, 0));
        assert_eq!(labels.score(&[f32::NAN, 0.0, 0.0], 0.5), None);
    }

    #[test]
    fn one_label_of_several_is_harm_unless_it_is_the_harmless_one() {
        let labels = json!({"1": "Not-Harmful", "0": "harmful"});
        let labels = parse("single_label_classification", labels).unwrap();
        let ln3 = 3f32.ln();
        let (score, categories) = labels.score(&[100.0, 100.0 + ln3], 0.5).unwrap();
        assert!((score - 0.25).abs() < 1e-5);
        assert!(categories.is_empty());
        let (score, categories) = labels.score(&[ln3, 0.0], 0.5).unwrap();
        assert!((score - 0.75).abs() < 1e-6);
        assert_eq!(categories, ["harmful"]);
    }

    #[test]
    fn labels_without_a_meaning_are_refused() {
        for (problem, labels, words) in [
            (
                "single_label_classification",
                json!({"0": "LABEL_0", "1": "LABEL_1"}),
                "LABEL_0, LABEL_1",
            ),
            (
                "single_label_classification",
                Value::Null,
                "LABEL_0, LABEL_1",
            ),
            (
                "multi_label_classification",
                json!({"0": "safe"}),
                "are safe,",
            ),
            ("regression", json!({"0": "harm"}), "`regression`"),
            (
                "multi_label_classification",
                json!({"0": "a", "2": "b"}),
                "`id2label`",
            ),
            ("multi_label_classification", json!(["a"]), "`id2label`"),
        ] {
            let error = parse(problem, labels).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
        let other = json!({"architectures": ["LlamaForCausalLM"]});
        let error = Labels::parse(&other.to_string()).unwrap_err().to_string();
        assert!(error.contains("`LlamaForCausalLM`"), "{error}");
    }
}
