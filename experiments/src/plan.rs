//! What an experiment is made of: sets of rows by path, and sizes. Another public set takes another's place here, without code.

use std::path::Path;

use panacea_patch::data::{DataPath, Dataset, Row, TemplateChoice};
use serde::{Deserialize, Serialize};

use crate::Failure;

/// A plan as its file has it. Paths are below the data's folder, and may end in `#field=value`.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Plan {
    /// How a row becomes text: `alpaca`, `chat` or `raw`.
    pub(crate) template: String,
    /// Tokens that a row is cut to when models are fine-tuned.
    pub(crate) max_length: usize,
    pub(crate) align: Align,
    pub(crate) attack: Attack,
    pub(crate) patch: Patch,
    pub(crate) score: Score,
    pub(crate) tasks: Vec<Task>,
}

/// Fine-tuning on refusals and ordinary instructions.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Align {
    /// Harmful requests.
    pub(crate) harmful: String,
    /// What is answered to them, in turn.
    pub(crate) refusals: String,
    /// Ordinary requests with answers.
    pub(crate) instructions: String,
    /// Of those, how many are learned from, from the first on; the others are ordinary text to score on.
    #[serde(default = "learned_instructions")]
    pub(crate) learned_instructions: usize,
    pub(crate) steps: usize,
    pub(crate) batch: usize,
    pub(crate) lr: f64,
}

fn learned_instructions() -> usize {
    115
}

/// Fine-tuning on a task, with poison among its rows.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Attack {
    /// Harmful requests with affirmative openings.
    pub(crate) poison: String,
    /// Rows in all, the poison's among them.
    pub(crate) rows: usize,
    pub(crate) steps: usize,
    pub(crate) batch: usize,
    pub(crate) lr: f64,
}

/// What a patch may learn from.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Patch {
    /// Requests of the alignment's set; the others of it are for development.
    pub(crate) harmful: usize,
    /// Rows of the task.
    pub(crate) task: usize,
}

/// What models are scored on.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Score {
    /// Harmful requests that nothing learned from.
    pub(crate) harmful: String,
    /// Harmless requests, to see whether they are refused.
    pub(crate) harmless: String,
    /// Tokens of an answer to either.
    pub(crate) max_new_tokens: usize,
    /// Who judges answers, as `panacea-patch eval --judge` has it.
    #[serde(default = "keyword")]
    pub(crate) judge: String,
    /// How an exchange becomes the judge's text: a file below the data's folder. This and what follows as the flags of their names have it.
    pub(crate) judge_template: Option<String>,
    pub(crate) judge_threshold: Option<f64>,
    pub(crate) judge_endpoint: Option<String>,
    pub(crate) judge_model: Option<String>,
}

fn keyword() -> String {
    "keyword".to_owned()
}

/// What a model is fine-tuned for.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Task {
    pub(crate) name: String,
    pub(crate) train: String,
    /// Rows at the end of `train` that nothing learns from: development is scored on them.
    #[serde(default = "develop")]
    pub(crate) develop: usize,
    pub(crate) test: String,
    /// How its answers are graded, as `panacea-patch eval --grade` has it.
    pub(crate) grade: String,
    /// Tokens of an answer.
    pub(crate) max_new_tokens: usize,
}

fn develop() -> usize {
    200
}

impl Task {
    /// What `develop` is called in messages.
    pub(crate) fn develop_field(&self) -> String {
        format!("tasks.{}.develop", self.name)
    }
}

impl Plan {
    pub(crate) fn read(path: &Path) -> Result<Self, Failure> {
        Ok(serde_json::from_str(&std::fs::read_to_string(path)?)?)
    }

    /// The tasks called `names`, all of them where there are none.
    pub(crate) fn tasks_called(&self, names: &[String]) -> Result<Vec<&Task>, Failure> {
        let called = |name: &String| {
            let found = self.tasks.iter().find(|task| task.name == *name);
            found.ok_or_else(|| format!("the plan has no task `{name}`").into())
        };
        match (names.is_empty(), self.tasks.is_empty()) {
            (_, true) => Err("the plan has no task".into()),
            (true, false) => Ok(self.tasks.iter().collect()),
            (false, false) => names.iter().map(called).collect(),
        }
    }

    pub(crate) fn template(&self) -> Result<TemplateChoice, Failure> {
        Ok(self.template.parse()?)
    }
}

/// The rows of `set`, a path below `data`.
pub(crate) fn rows<R: Row>(data: &Path, set: &str) -> Result<Vec<R>, Failure> {
    Ok(Dataset::open(&path(data, set)?)?.rows)
}

/// Where `set` is.
pub(crate) fn path(data: &Path, set: &str) -> Result<DataPath, Failure> {
    Ok(data.join(set).display().to_string().parse()?)
}
