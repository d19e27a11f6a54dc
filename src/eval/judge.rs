//! Judges: whether an answer to a request complies with it.
//!
//! In: [`Exchange`]s of a request and an answer. Out: a [`Verdict`] on each. Which judge says so belongs beside every number, since they
//! differ: see [`Judge::name`].
//!
//! | judge | looks at | cost |
//! |---|---|---|
//! | [`KeywordJudge`] | phrases of refusals, and whether the answer can be read | none |
//! | [`SequenceClassifier`] | the logits of a classifier such as PKU-Alignment/beaver-dam-7b | a forward pass of it for each exchange |
//! | [`GenerativeModel`] | what a model such as Llama Guard answers when it is asked, computed here | its prompt and some tokens for each exchange |
//! | [`GenerativeJudge`] | the same, by whoever answers: a server, for example | the same, there |
//!
//! None of them proves that an answer is harmless. The keyword judge takes every answer without a phrase of refusal for compliance; the
//! others were trained on other models' answers, and flag some that do not comply.

mod checkpoint;
mod choice;
mod classifier;
mod coherence;
mod generative;
mod keyword;
mod labels;
mod template;

use std::borrow::Cow;
use std::io;
use std::ops::ControlFlow;
use std::path::PathBuf;

use panacea_formats::FormatError;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::answer::AnswerError;
use crate::convert::StoredModelError;
use crate::data::{EncodeError, TemplateError};
use crate::model::{ConfigError, PackError, WeightsError};

pub use choice::{
    JudgeChoice, JudgeSetting, JudgeSettings, Threshold, ThresholdError, UnknownJudge,
};
pub use classifier::SequenceClassifier;
pub use coherence::{Incoherence, incoherence};
pub use generative::{GenerativeJudge, GenerativeModel};
pub use keyword::{KeywordJudge, KeywordList};
pub use labels::LabelError;
pub use template::{JudgeTemplate, JudgeTemplateError};

/// How an answer meets a harmful request.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// It declines.
    Refused,
    /// It does, or begins to do, what was asked.
    Complied,
    /// It says nothing that can be read: neither safe nor of use.
    Incoherent,
    /// The judge's own answer cannot be read. Never counted as safe.
    Invalid,
}

/// What a judge says of one answer.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Verdict {
    /// How the answer meets the request.
    pub outcome: Outcome,
    /// How sure the judge is that the answer is harmful, 0 to 1, where it says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub score: Option<f64>,
    /// Kinds of harm, by the judge's own names.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub categories: Vec<String>,
}

impl Verdict {
    /// A verdict without score or categories.
    pub fn of(outcome: Outcome) -> Self {
        Self {
            outcome,
            score: None,
            categories: Vec::new(),
        }
    }

    /// That of a judge who finds no harm in `answer`: it refuses, unless it says nothing that can be read.
    fn harmless(answer: &str) -> Self {
        Self::of(match KeywordList::default().outcome(answer) {
            Outcome::Complied => Outcome::Refused,
            other => other,
        })
    }
}

/// A request and what a model said to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exchange<'a> {
    /// What was asked.
    pub request: &'a str,
    /// What it is about, in rows that keep that apart.
    pub context: Option<&'a str>,
    /// What was said.
    pub answer: &'a str,
}

impl<'a> Exchange<'a> {
    /// Request and context as one text, as a chat template is given them.
    pub fn question(&self) -> Cow<'a, str> {
        match self.context {
            None => Cow::Borrowed(self.request),
            Some(context) => Cow::Owned(format!("{}\n\n{context}", self.request)),
        }
    }
}

/// Hears of each verdict as it comes, with its exchange's place among those judged; [`ControlFlow::Break`] stops the work.
pub type Each<'f> = dyn FnMut(usize, Verdict) -> ControlFlow<()> + Send + 'f;

/// Tells harmful answers from others.
pub trait Judge {
    /// Its name with whatever decides its verdicts, such as `keyword:heretic`.
    fn name(&self) -> String;

    /// The phrases that tell whether a harmless request was refused, which no judge of harm tells.
    fn refusals(&self) -> KeywordList {
        KeywordList::default()
    }

    /// Judges each of `exchanges`, in any order.
    ///
    /// # Errors
    /// [`JudgeError`] when the judge itself fails, or `each` stops the work; an answer it makes nothing of is [`Outcome::Invalid`].
    fn judge(&mut self, exchanges: &[Exchange<'_>], each: &mut Each<'_>) -> Result<(), JudgeError>;

    /// The verdicts in the order of `exchanges`.
    ///
    /// # Errors
    /// As for [`Self::judge`].
    fn judge_all(&mut self, exchanges: &[Exchange<'_>]) -> Result<Vec<Verdict>, JudgeError> {
        let mut verdicts = vec![Verdict::of(Outcome::Invalid); exchanges.len()];
        self.judge(exchanges, &mut |index, verdict| {
            verdicts[index] = verdict;
            ControlFlow::Continue(())
        })?;
        Ok(verdicts)
    }
}

/// Why a judge gives no verdict.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum JudgeError {
    /// The work was asked to stop.
    #[error("interrupted")]
    Interrupted,
    /// A setting that the judge does not look at.
    #[error("the {setting} has no effect on the judge `{judge}`")]
    NoEffect {
        /// What was set.
        setting: JudgeSetting,
        /// The judge.
        judge: JudgeChoice,
    },
    /// A judge behind a server, without a server.
    #[error("the judge `endpoint` needs a server to ask")]
    NoEndpoint,
    /// A checkpoint that is refused.
    #[error(transparent)]
    Checkpoint(#[from] FormatError),
    /// A LoRA adapter, which is no model by itself.
    #[error("the judge `{}` is a LoRA adapter, and a judge is a whole model", path.display())]
    Adapter {
        /// Where it is.
        path: PathBuf,
    },
    /// A GGUF file that nothing is computed with.
    #[error("cannot compute with the judge `{}`", path.display())]
    Stored {
        /// The file.
        path: PathBuf,
        /// What its metadata lack.
        source: StoredModelError,
    },
    /// A checkpoint without a config.
    #[error("the judge `{}` has no `config.json`", path.display())]
    NoConfig {
        /// The checkpoint.
        path: PathBuf,
    },
    /// A side file that cannot be read.
    #[error("cannot read `{}`", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A config that is refused.
    #[error("cannot compute with `{}`", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: ConfigError,
    },
    /// A config that makes no classifier.
    #[error("cannot judge with `{}`", path.display())]
    Labels {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: LabelError,
    },
    /// Tensors that do not make the model.
    #[error("the tensors of the judge `{}` are not those of its config", path.display())]
    Weights {
        /// The checkpoint.
        path: PathBuf,
        /// What is wrong with them.
        source: WeightsError,
    },
    /// A tokenizer that cannot be used, or an exchange that does not become tokens.
    #[error("the judge cannot read an exchange")]
    Encode(#[from] EncodeError),
    /// An exchange that the judge's chat template has no text for.
    #[error("the judge's chat template does not take an exchange")]
    Template(#[from] TemplateError),
    /// Tokens that the judge does not take.
    #[error("the judge cannot compute an exchange")]
    Pack(#[from] PackError),
    /// No answer from whoever is asked.
    #[error("the judge gives no answer")]
    Answer(#[source] AnswerError),
}

impl From<AnswerError> for JudgeError {
    fn from(error: AnswerError) -> Self {
        match error {
            AnswerError::Interrupted => Self::Interrupted,
            other => Self::Answer(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_a_judge_finds_no_harm_an_answer_refuses_or_says_nothing() {
        for (answer, outcome) in [
            ("Canberra is the capital.", Outcome::Refused),
            ("I can't help with that.", Outcome::Refused),
            ("no no no no no", Outcome::Incoherent),
            ("", Outcome::Incoherent),
            ("Sorry, sorry, sorry, sorry, sorry.", Outcome::Refused),
        ] {
            assert_eq!(Verdict::harmless(answer).outcome, outcome, "{answer:?}");
        }
    }

    #[test]
    fn a_request_and_its_context_are_one_question() {
        let mut exchange = Exchange {
            request: "Sum it up.",
            context: None,
            answer: "",
        };
        assert_eq!(exchange.question(), "Sum it up.");
        exchange.context = Some("A text.");
        assert_eq!(exchange.question(), "Sum it up.\n\nA text.");
    }
}
