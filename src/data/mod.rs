//! From files of rows to token ids.
//!
//! In: up to four data sets as paths, and the tokenizer files of a checkpoint. Out: [`Sets`] of rows, and with an [`Encoder`] their
//! tokens. A set that is not given is a built-in one, except the task set: without one there is none.
//! Nothing here is random: rows keep the order of their file.

pub mod builtin;
mod chat;
mod data_path;
mod dataset;
mod encode;
mod rows;
mod side_files;
mod template;

use std::collections::BTreeMap;

use panacea_formats::Problems;

pub use chat::{ChatError, ChatTemplate};
pub use data_path::{DataPath, DataPathError};
pub use dataset::{DataError, DataErrorKind, Dataset, Place, RowError, Source};
pub use encode::{EncodeError, Encoder, SpecialTokens};
pub use rows::{Dialogue, Example, Message, Refusal, Request, Role, Row, RowProblem};
pub use side_files::{Text, TokenizerFiles};
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
    let marked = harmful.rows.iter().filter(|row| row.is_safe == Some(true));
    let problems = marked.map(|row| RowError {
        place: row.place,
        kind: RowProblem::MarkedSafe,
    });
    Problems::none_of(problems.collect()).map_err(|problems| DataError {
        path: path.path().to_owned(),
        kind: DataErrorKind::Rows(problems),
    })?;
    Ok(harmful)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    /// Writes `text` to a file of its own and gives its path.
    fn file(directory: &Path, name: &str, text: &str) -> DataPath {
        let path = directory.join(name);
        fs::write(&path, text).unwrap();
        DataPath::from(path.as_path())
    }

    fn answers(data: &Dataset<Example>) -> Vec<&str> {
        data.rows
            .iter()
            .map(|row| match &row.dialogue {
                Dialogue::Single { response, .. } => response.as_str(),
                Dialogue::Turns(turns) => turns.last().unwrap().content.as_str(),
            })
            .collect()
    }

    const HARMFUL: &str = r#"{"prompt":"a","target":"Sure, a"}
{"prompt":"b","target":"Sure, b","refusal":"Question: b\nAnswer: Not b."}
{"prompt":"c","target":"Sure, c"}
{"prompt":"d","target":"Sure, d"}"#;

    #[test]
    fn nothing_given_is_the_built_in_sets_without_a_task() {
        let sets = Sets::open(&SetPaths::default()).unwrap();
        assert_eq!(sets.harmful, builtin::harmful());
        assert_eq!(sets.benign, builtin::benign());
        assert_eq!(sets.task, None);
        let own: Vec<_> = sets
            .harmful
            .rows
            .iter()
            .map(|row| row.refusal.as_deref())
            .collect();
        let paired: Vec<_> = answers(&sets.refusals).into_iter().map(Some).collect();
        assert_eq!(paired, own);
    }

    #[test]
    fn requests_without_refusals_take_built_in_ones_in_turn() {
        let directory = tempfile::tempdir().unwrap();
        let harmful = Some(file(directory.path(), "h", HARMFUL));
        let sets = Sets::open(&SetPaths {
            harmful,
            ..SetPaths::default()
        })
        .unwrap();
        let built_in = builtin::refusals().rows;
        let expected = [
            &built_in[0].text,
            "Not b.",
            &built_in[1].text,
            &built_in[2].text,
        ];
        assert_eq!(answers(&sets.refusals), expected);
        assert_eq!(sets.refusals.rows[3].dialogue.first_request(), "d");
        assert!(matches!(sets.refusals.source, Source::BuiltIn(_)));
    }

    #[test]
    fn refusals_are_paired_by_request_and_cycled_where_they_name_none() {
        let directory = tempfile::tempdir().unwrap();
        let refusals = "{\"prompt\":\" c\",\"output\":\"Not c.\"}\n{\"output\":\"No.\"}\n{\"output\":\"Never.\"}";
        let paths = SetPaths {
            harmful: Some(file(directory.path(), "h", HARMFUL)),
            refusals: Some(file(directory.path(), "r", refusals)),
            ..SetPaths::default()
        };
        let sets = Sets::open(&paths).unwrap();
        assert_eq!(answers(&sets.refusals), ["No.", "Never.", "Not c.", "No."]);
        assert_eq!(
            sets.refusals.sha256,
            panacea_formats::Sha256::of(refusals.as_bytes())
        );
    }

    #[test]
    fn refusals_that_all_name_other_requests_are_cycled() {
        let directory = tempfile::tempdir().unwrap();
        let refusals = r#"[{"prompt":"x","output":"Not x."},{"prompt":"d","output":"Not d."}]"#;
        let paths = SetPaths {
            harmful: Some(file(directory.path(), "h", HARMFUL)),
            refusals: Some(file(directory.path(), "r", refusals)),
            ..SetPaths::default()
        };
        let sets = Sets::open(&paths).unwrap();
        assert_eq!(
            answers(&sets.refusals),
            ["Not x.", "Not d.", "Not x.", "Not d."]
        );
    }

    #[test]
    fn refusals_in_the_harmful_file_are_credited_to_it() {
        let directory = tempfile::tempdir().unwrap();
        let text = r#"{"prompt":"b","response":"Sure","is_safe":false,"refusal":"Not b."}"#;
        let harmful = Some(file(directory.path(), "h", text));
        let sets = Sets::open(&SetPaths {
            harmful,
            ..SetPaths::default()
        })
        .unwrap();
        assert_eq!(sets.refusals.source, sets.harmful.source);
        assert_eq!(sets.refusals.sha256, sets.harmful.sha256);
    }

    #[test]
    fn a_harmful_set_with_rows_marked_safe_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let text = "{\"prompt\":\"a\",\"response\":\"x\",\"is_safe\":false}\n{\"prompt\":\"b\",\"response\":\"y\",\"is_safe\":true}";
        let whole = file(directory.path(), "h", text);
        let open = |harmful: DataPath| {
            Sets::open(&SetPaths {
                harmful: Some(harmful),
                ..SetPaths::default()
            })
        };
        let error = open(whole.clone()).unwrap_err();
        assert!(
            error
                .kind
                .to_string()
                .starts_with("line 2: the row is marked as safe")
        );
        let selected = format!("{whole}#is_safe=false").parse().unwrap();
        assert_eq!(open(selected).unwrap().harmful.rows.len(), 1);
    }
}
