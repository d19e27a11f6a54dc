//! From files of rows to token ids.
//!
//! In: up to four data sets as paths, and the tokenizer files of a checkpoint. Out: [`Sets`] of rows, and with an [`Encoder`] their
//! tokens. A set that is not given is a built-in one, except the task set: without one there is none.
//! Nothing here is random: rows keep the order of their file.

pub mod builtin;
mod chat;
mod dataset;
mod encode;
mod rows;
mod template;

use std::collections::BTreeMap;

pub use chat::{ChatError, ChatTemplate};
pub use dataset::{
    DataError, DataErrorKind, DataPath, DataPathError, Dataset, Place, Problems, RowError, Source,
};
pub use encode::{EncodeError, Encoder, TokenizerFiles};
pub use rows::{Dialogue, Example, Message, Refusal, Request, Role, Row, RowProblem};
pub use template::{Segment, Template, TemplateChoice, TemplateError, UnknownTemplate};

/// The data sets that the user gives; all may be left out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SetPaths {
    /// Requests with compliant answers, or with just their openings.
    pub harmful: Option<DataPath>,
    /// Rows of the data that the checkpoint was fine-tuned on.
    pub task: Option<DataPath>,
    /// Harmless requests with answers.
    pub benign: Option<DataPath>,
    /// Refusals: of the same requests, or of any.
    pub refusals: Option<DataPath>,
}

/// The data sets of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sets {
    /// Requests with compliant answers: h.
    pub harmful: Dataset<Example>,
    /// The user's task: g. None means that no task is watched.
    pub task: Option<Dataset<Example>>,
    /// What the model must go on saying as it does.
    pub benign: Dataset<Example>,
    /// For each row of `harmful`, at the same index, the same request refused: r.
    pub refusals: Dataset<Example>,
}

impl Sets {
    /// Reads what is given and fills in what is not.
    ///
    /// The refusal of a harmful request is, in this order: with `refusals` given, the one for the same request, else the next of those
    /// that name no request (of all of them, if all do); without, the row's own `refusal`, else the next built-in one.
    ///
    /// # Errors
    /// [`DataError`] for the first file that is not taken. A row of the harmful set that is marked as safe refuses that file:
    /// `h.jsonl#is_safe=false` leaves such rows out.
    pub fn open(paths: &SetPaths) -> Result<Self, DataError> {
        let harmful = match &paths.harmful {
            Some(path) => marked_safe_refused(Dataset::open(path)?, path)?,
            None => builtin::harmful(),
        };
        let refusals = match &paths.refusals {
            Some(path) => paired(&harmful, Dataset::open(path)?, Own::Ignored),
            None => paired(&harmful, builtin::refusals(), Own::First),
        };
        Ok(Self {
            refusals,
            task: paths.task.as_ref().map(Dataset::open).transpose()?,
            benign: match &paths.benign {
                Some(path) => Dataset::open(path)?,
                None => builtin::benign(),
            },
            harmful,
        })
    }
}

/// What a row's own refusal counts for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Own {
    First,
    Ignored,
}

fn paired(harmful: &Dataset<Example>, refusals: Dataset<Refusal>, own: Own) -> Dataset<Example> {
    let mut by_request: BTreeMap<&str, &str> = BTreeMap::new();
    for refusal in &refusals.rows {
        if let Some(request) = &refusal.request {
            by_request.entry(request.trim()).or_insert(&refusal.text);
        }
    }
    let mut free: Vec<&Refusal> = refusals
        .rows
        .iter()
        .filter(|refusal| refusal.request.is_none())
        .collect();
    if free.is_empty() {
        free = refusals.rows.iter().collect();
    }
    // A data set has at least one row, so this never runs dry.
    let mut next = free.iter().cycle();
    let mut only_own = true;
    let rows = harmful
        .rows
        .iter()
        .filter_map(|row| {
            let text = match &row.refusal {
                Some(text) if own == Own::First => text,
                _ => {
                    only_own = false;
                    let request = row.dialogue.first_request().trim();
                    match by_request.get(request) {
                        Some(text) => *text,
                        None => &next.next()?.text,
                    }
                }
            };
            Some(Example {
                place: row.place,
                dialogue: row.dialogue.answered_with(text),
                refusal: None,
                is_safe: None,
            })
        })
        .collect();
    let (source, sha256, skipped) = if only_own {
        (harmful.source.clone(), harmful.sha256, harmful.skipped)
    } else {
        (refusals.source.clone(), refusals.sha256, refusals.skipped)
    };
    Dataset {
        source,
        sha256,
        rows,
        skipped,
    }
}

fn marked_safe_refused(
    harmful: Dataset<Example>,
    path: &DataPath,
) -> Result<Dataset<Example>, DataError> {
    let mut problems = Problems::default();
    for row in harmful.rows.iter().filter(|row| row.is_safe == Some(true)) {
        problems.push(RowError {
            place: row.place,
            kind: RowProblem::MarkedSafe,
        });
    }
    if problems.total > 0 {
        return Err(DataError {
            path: path.path().to_owned(),
            kind: DataErrorKind::Rows(problems),
        });
    }
    Ok(harmful)
}
