//! What the results in a folder are of: those of two purposes, plans or bases do not belong in one table.
//!
//! In: what is to be run. Out: `run.json` in the folder, or a refusal that says what differs from the runs before.

use std::path::{Path, PathBuf};

use panacea_formats::Sha256;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::arms::write_whole;
use crate::mix::Purpose;
use crate::plan::Plan;
use crate::{Failure, say};

/// All on which results depend, but for the contents of data sets and the program that patches and scores.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Run {
    pub(crate) purpose: Purpose,
    /// As [`crate::lora::Base::digest`] has it.
    pub(crate) base: Sha256,
    /// With the tasks that are run alone.
    pub(crate) plan: Plan,
}

impl Run {
    /// Notes the run in `folder`, beside those that went before.
    ///
    /// # Errors
    /// When one of them had another purpose, base or plan, defaults filled in. Of tasks, those count that both have.
    pub(crate) fn begin(mut self, folder: &Path) -> Result<(), Failure> {
        std::fs::create_dir_all(folder)?;
        let path = folder.join("run.json");
        if path.exists() {
            let before: Self =
                serde_json::from_str(&std::fs::read_to_string(&path)?).map_err(|error| {
                    format!("`{}` is not what a run writes: {error}", path.display())
                })?;
            let found = differences("", &before.by_name(), &self.by_name());
            if !found.is_empty() {
                return Err(format!(
                    "`{}` holds results of another run, name another folder with -o:\n  {}",
                    folder.display(),
                    found.join("\n  ")
                )
                .into());
            }
            let tasks = before.plan.tasks.into_iter();
            let others = tasks.filter(|task| self.plan.tasks.iter().all(|it| it.name != task.name));
            let others: Vec<_> = others.collect();
            self.plan.tasks.extend(others);
        } else if !cells(folder)?.is_empty() {
            say(&format!(
                "note: results in `{}` do not say what they are of; they are taken for results of this purpose, plan and base",
                folder.display()
            ));
        }
        write_whole(&path, &json!(self))
    }

    /// With tasks by their names.
    fn by_name(&self) -> Value {
        let mut run = json!(self);
        let tasks = self.plan.tasks.iter();
        run["plan"]["tasks"] = tasks
            .map(|task| (task.name.as_str(), json!(task)))
            .collect();
        run
    }
}

/// The folders of cells in `folder`.
pub(crate) fn cells(folder: &Path) -> Result<Vec<PathBuf>, Failure> {
    let mut cells = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.join("rows").is_dir() {
            cells.push(path);
        }
    }
    Ok(cells)
}

/// What both have and is not the same, by its path from `at` on.
fn differences(at: &str, before: &Value, now: &Value) -> Vec<String> {
    match (before, now) {
        (Value::Object(before), Value::Object(now)) => before
            .iter()
            .filter_map(|(key, before)| Some((key, before, now.get(key)?)))
            .flat_map(|(key, before, now)| differences(&format!("{at}.{key}"), before, now))
            .collect(),
        _ if before == now => Vec::new(),
        _ => vec![format!("`{}` was {before} and is {now}", &at[1..])],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(change: impl FnOnce(&mut Run)) -> Run {
        let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("public.json");
        let mut run = Run {
            purpose: Purpose::Report,
            base: Sha256::of(b"base"),
            plan: Plan::read(&beside).expect("the plan is read"),
        };
        change(&mut run);
        run
    }

    /// Arms that were there were kept whatever they were of, and pooled with the others.
    #[test]
    fn a_folder_is_gone_on_with_by_the_same_run_alone() {
        let folder = tempfile::tempdir().expect("a folder");
        type Change = fn(&mut Run);
        let begin = |change: Change| {
            let begun = run(change).begin(folder.path());
            begun.err().map(|error| error.to_string())
        };
        assert_eq!(begin(|run| run.plan.tasks.truncate(1)), None);
        let cases: [(Change, &str); 6] = [
            (
                |run| run.purpose = Purpose::Develop,
                "`purpose` was \"report\" and is \"develop\"",
            ),
            (|run| run.base = Sha256::of(b"other"), "`base` was"),
            (
                |run| run.plan.score.judge = "keyword:gcg".to_owned(),
                "`plan.score.judge` was",
            ),
            (
                |run| run.plan.align.harmful += "#split=eval",
                "`plan.align.harmful` was",
            ),
            (
                |run| run.plan.tasks[0].max_new_tokens = 9,
                "`plan.tasks.sst2.max_new_tokens` was 8 and is 9",
            ),
            (
                |run| run.plan.attack.lr = 0.1,
                "`plan.attack.lr` was 0.0005 and is 0.1",
            ),
        ];
        for (change, expected) in cases {
            let error = begin(change).expect(expected);
            assert!(error.contains(expected), "{error}");
        }
        // A task that was not run may change until it is, and stays noted by a run without it.
        assert_eq!(begin(|run| run.plan.tasks[1].max_new_tokens = 100), None);
        assert_eq!(begin(|run| run.plan.tasks.truncate(1)), None);
        let error = begin(|_| ()).expect("the other task is another");
        assert!(
            error.contains("`plan.tasks.gsm8k.max_new_tokens`"),
            "{error}"
        );
    }

    #[test]
    fn a_plan_is_the_same_however_it_is_written() {
        let folder = tempfile::tempdir().expect("a folder");
        run(|_| ()).begin(folder.path()).expect("it is noted");
        // A file that says less, as one of an older program does.
        let path = folder.path().join("run.json");
        let text = std::fs::read_to_string(&path).expect("it is there");
        let mut noted: Value = serde_json::from_str(&text).expect("JSON");
        let align = noted["plan"]["align"].as_object_mut().expect("an object");
        assert_eq!(align.remove("learned_instructions"), Some(json!(115)));
        std::fs::write(&path, noted.to_string()).expect("it is written");
        run(|_| ()).begin(folder.path()).expect("nothing differs");
    }
}
