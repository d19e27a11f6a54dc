//! What the user reads when an evaluation fails.

use panacea_patch::eval::answer::AnswerError;
use panacea_patch::eval::journal::JournalError;
use panacea_patch::eval::judge::{JudgeError, JudgeTemplateError};
use panacea_patch::eval::suite::SuiteError;
use panacea_patch::optimize::OptimizeError;

use super::{Exit, Failure, exit_of};

impl From<SuiteError> for Failure {
    fn from(error: SuiteError) -> Self {
        match error {
            SuiteError::Encode(error) => error.into(),
            SuiteError::Journal(error) => error.into(),
            SuiteError::Loss(OptimizeError::Interrupted) => Self::interrupted(),
            other => Self::doing(Exit::Refused, "the model cannot be evaluated", &other),
        }
    }
}

impl From<JournalError> for Failure {
    fn from(error: JournalError) -> Self {
        let what = "the model cannot be evaluated";
        match error {
            JournalError::Interrupted
            | JournalError::Answer(AnswerError::Interrupted)
            | JournalError::Judge(JudgeError::Interrupted) => Self::interrupted(),
            JournalError::Answer(AnswerError::Encode(error)) => error.into(),
            JournalError::Answer(error @ AnswerError::Server { .. }) => {
                Self::doing(Exit::Environment, "the server does not answer", &error)
                    .hint("with --journal, answers that it gave are kept for the next run")
            }
            JournalError::Judge(error) => error.into(),
            JournalError::Io { ref source, .. } => Self::of(exit_of(source), &error),
            JournalError::Locked { .. } => {
                Self::of(Exit::Environment, &error).hint("wait for it, or name another --journal")
            }
            JournalError::Malformed { .. } | JournalError::NoJournal { .. } => {
                Self::of(Exit::Refused, &error)
                    .hint("name another file with --journal, or delete this one")
            }
            other => Self::doing(Exit::Refused, what, &other),
        }
    }
}

impl From<JudgeError> for Failure {
    fn from(error: JudgeError) -> Self {
        match error {
            JudgeError::Interrupted => Self::interrupted(),
            JudgeError::Checkpoint(error) => error.into(),
            JudgeError::NoEndpoint => {
                Self::of(Exit::Usage, &error).hint("name the server with --judge-endpoint")
            }
            JudgeError::NoEffect { .. } => {
                Self::of(Exit::Usage, &error).hint("leave it out, or choose another --judge")
            }
            other => Self::doing(Exit::Refused, "the judge cannot be used", &other),
        }
    }
}

impl From<JudgeTemplateError> for Failure {
    fn from(error: JudgeTemplateError) -> Self {
        Self::doing(Exit::Refused, "the judge's template cannot be used", &error)
    }
}
