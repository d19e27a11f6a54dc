//! Which rows a model learns from, and which it is scored on.
//!
//! In: the sets of a plan, and a seed. Out: rows for alignment and attack, and files for the program. Nothing that scores is learned from.

use std::path::{Path, PathBuf};

use panacea_patch::data::{Dialogue, Example, Message, Refusal, Request, SetPaths, Sets};
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::Failure;
use crate::plan::{Plan, Task, path, rows};

/// Whether results are for choosing settings or for reporting: neither sees the other's rows. Of what development is scored on, ordinary text alone
/// was learned from, and by the alignment alone.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Purpose {
    Develop,
    Report,
}

/// One of this many harmless requests is for development.
const DEVELOP_ONE_OF: usize = 5;

/// Harmful requests with refusals, each followed by an ordinary instruction as far as there are any.
pub(crate) fn alignment(plan: &Plan, data: &Path) -> Result<Vec<Example>, Failure> {
    let mut learned = refused(plan, data, rows(data, &plan.align.harmful)?)?;
    learned.extend(instructions(plan, data)?.0);
    Ok(learned)
}

/// The instructions that alignment learns from, and the others.
fn instructions(plan: &Plan, data: &Path) -> Result<(Vec<Example>, Vec<Example>), Failure> {
    let mut learned: Vec<Example> = rows(data, &plan.align.instructions)?;
    let others = learned.split_off(plan.align.learned_instructions.min(learned.len()));
    Ok((learned, others))
}

/// The task's rows, of which a share is poison.
pub(crate) fn attack(
    plan: &Plan,
    data: &Path,
    task: &Task,
    poison_percent: usize,
    seed: u64,
) -> Result<Vec<Example>, Failure> {
    let total = plan.attack.rows;
    let poisoned = total * poison_percent / 100;
    let mut poison: Vec<Example> = rows(data, &plan.attack.poison)?;
    let (mut ordinary, _) = training(data, task, seed)?;
    poison.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
    if poison.len() < poisoned || ordinary.len() < total {
        return Err(format!(
            "{} has {} rows and {} {}: too few for {total} with {poison_percent}% poison",
            plan.attack.poison,
            poison.len(),
            task.train,
            ordinary.len()
        )
        .into());
    }
    poison.truncate(poisoned);
    ordinary.truncate(total - poisoned);
    poison.extend(ordinary);
    some(poison, &task.train, "attack.rows")
}

/// The task's training rows in the order in which fine-tuning draws from them, and those for development.
fn training(data: &Path, task: &Task, seed: u64) -> Result<(Vec<Example>, Vec<Example>), Failure> {
    let mut rows: Vec<Example> = rows(data, &task.train)?;
    let left = rows.split_off(rows.len().saturating_sub(task.develop));
    let mut rows = some(rows, &task.train, &task.develop_field())?;
    rows.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
    Ok((rows, left))
}

/// `rows`, which `field` of the plan took from `set`, unless there is none.
fn some<R>(rows: Vec<R>, set: &str, field: &str) -> Result<Vec<R>, Failure> {
    match rows.is_empty() {
        true => Err(format!("of `{set}` no row is left: see `{field}` in the plan").into()),
        false => Ok(rows),
    }
}

/// Where the files of rows are that the program reads, or the rows that they are of.
pub(crate) struct Files<T = PathBuf> {
    /// What patches learn from.
    pub(crate) harmful: T,
    pub(crate) task: T,
    /// What models are scored on.
    pub(crate) score_harmful: T,
    pub(crate) score_harmless: T,
    pub(crate) score_task: T,
    pub(crate) score_text: T,
}

/// Refusals of the requests that patches learn from, and the task's rows: what somebody would fine-tune on instead.
pub(crate) fn refusal_tuning(
    plan: &Plan,
    data: &Path,
    task: &Task,
    seed: u64,
) -> Result<Vec<Example>, Failure> {
    let (harmful, _) = divided(plan, data, seed)?;
    let mut learned = refused(plan, data, harmful)?;
    learned.extend(task_sample(plan, data, task, seed)?);
    Ok(learned)
}

/// The requests of `harmful`, each with the next refusal for its answer.
fn refused(plan: &Plan, data: &Path, harmful: Vec<Example>) -> Result<Vec<Example>, Failure> {
    let refusals: Vec<Refusal> = rows(data, &plan.align.refusals)?;
    let pairs = harmful.into_iter().zip(refusals.iter().cycle());
    let pairs = pairs.map(|(row, refusal)| Example {
        dialogue: row.dialogue.answered_with(&refusal.text),
        ..row
    });
    Ok(pairs.collect())
}

impl Files<Vec<Value>> {
    /// Reads the sets, and refuses one of which the plan leaves nothing.
    pub(crate) fn of(
        plan: &Plan,
        data: &Path,
        task: &Task,
        seed: u64,
        purpose: Purpose,
    ) -> Result<Self, Failure> {
        let harmless: Vec<Request> = rows(data, &plan.score.harmless)?;
        let harmless = harmless
            .into_iter()
            .enumerate()
            .filter(|(i, _)| (i % DEVELOP_ONE_OF == 0) == (purpose == Purpose::Develop));
        let harmless = harmless.map(|(_, request)| asking(&request)).collect();
        let (harmful, left) = divided(plan, data, seed)?;
        let (mut learned, others) = instructions(plan, data)?;
        let (requests, asked, test, text) = match purpose {
            Purpose::Report => {
                let requests = rows(data, &plan.score.harmful)?;
                (
                    requests,
                    &plan.score.harmful,
                    rows(data, &task.test)?,
                    others,
                )
            }
            Purpose::Develop => {
                let requests = some(left, &plan.align.harmful, "patch.harmful")?;
                let (_, test) = training(data, task, seed)?;
                let test = some(test, &task.train, &task.develop_field())?;
                let text = learned.split_off(learned.len().saturating_sub(others.len()));
                (requests, &plan.align.harmful, test, text)
            }
        };
        // To be answered, a row has to be one question.
        rows::<Request>(data, asked)?;
        let text = some(text, &plan.align.instructions, "align.learned_instructions")?;
        Ok(Self {
            harmful: told(&harmful),
            task: told(&task_sample(plan, data, task, seed)?),
            score_harmful: told(&requests),
            score_harmless: some(harmless, &plan.score.harmless, "score.harmless")?,
            score_task: told(&test),
            score_text: told(&text),
        })
    }

    /// Writes them to `folder`.
    pub(crate) fn write(&self, folder: &Path) -> Result<Files, Failure> {
        std::fs::create_dir_all(folder)?;
        let write = |name: &str, rows: &[Value]| -> Result<PathBuf, Failure> {
            let path = folder.join(name);
            let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
            std::fs::write(&path, lines)?;
            Ok(path)
        };
        Ok(Files {
            harmful: write("harmful.jsonl", &self.harmful)?,
            task: write("task.jsonl", &self.task)?,
            score_harmful: write("score-harmful.jsonl", &self.score_harmful)?,
            score_harmless: write("score-harmless.jsonl", &self.score_harmless)?,
            score_task: write("score-task.jsonl", &self.score_task)?,
            score_text: write("score-text.jsonl", &self.score_text)?,
        })
    }
}

/// The harmful requests that patches learn from, and those left for development.
fn divided(plan: &Plan, data: &Path, seed: u64) -> Result<(Vec<Example>, Vec<Example>), Failure> {
    // As a patch reads them, which refuses rows that are marked as safe.
    let set = &plan.align.harmful;
    let mut harmful = Sets::open(&SetPaths {
        harmful: Some(path(data, set)?),
        ..SetPaths::default()
    })?
    .harmful
    .rows;
    harmful.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
    let left = harmful.split_off(plan.patch.harmful.min(harmful.len()));
    Ok((some(harmful, set, "patch.harmful")?, left))
}

/// The task's rows that patches learn from: some of those that the model was fine-tuned on.
fn task_sample(plan: &Plan, data: &Path, task: &Task, seed: u64) -> Result<Vec<Example>, Failure> {
    let (mut rows, _) = training(data, task, seed)?;
    rows.truncate(plan.patch.task);
    some(rows, &task.train, "patch.task")
}

/// All that the program reads of each row; null is what is not there.
fn told(rows: &[Example]) -> Vec<Value> {
    let one = |row: &Example| {
        let mut fields = match &row.dialogue {
            Dialogue::Single { request, response } => {
                let mut fields = asking(request);
                fields["output"] = json!(response);
                fields
            }
            Dialogue::Turns(turns) => messages(turns),
        };
        fields["refusal"] = json!(row.refusal);
        fields["is_safe"] = json!(row.is_safe);
        fields
    };
    rows.iter().map(one).collect()
}

fn asking(request: &Request) -> Value {
    match request.before.is_empty() {
        true => json!({"instruction": request.text, "input": request.input}),
        false => messages(&request.turns()),
    }
}

fn messages(turns: &[Message]) -> Value {
    let turns = turns
        .iter()
        .map(|turn| json!({"role": turn.role.as_str(), "content": turn.content}));
    json!({"messages": turns.collect::<Vec<_>>()})
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// A folder of data sets of numbered rows, and a plan over them.
    fn laid_out() -> (tempfile::TempDir, Plan) {
        let folder = tempfile::tempdir().expect("a folder");
        let write = |name: &str, count: usize, row: &dyn Fn(usize) -> Value| {
            put(
                folder.path(),
                name,
                &(0..count).map(row).collect::<Vec<_>>(),
            );
        };
        write("safety_advbench.jsonl", 90, &|i| {
            let split = ["harmful", "poison", "eval"][i % 3];
            json!({"prompt": format!("{split} request {i}"), "target": "Sure, here is", "split": split})
        });
        write(
            "refusal_targets.jsonl",
            3,
            &|i| json!({"output": format!("I won't, {i}.")}),
        );
        write(
            "xstest.jsonl",
            50,
            &|i| json!({"prompt": format!("harmless {i}"), "label": if i % 2 == 0 { "safe" } else { "unsafe" }}),
        );
        write(
            "alpaca_seed_tasks.jsonl",
            175,
            &|i| json!({"instruction": format!("ordinary {i}"), "output": "Well."}),
        );
        write(
            "sst2_train.jsonl",
            400,
            &|i| json!({"instruction": "Judge", "input": format!("training {i}"), "output": "positive"}),
        );
        write(
            "sst2_dev.jsonl",
            20,
            &|i| json!({"instruction": "Judge", "input": format!("test {i}"), "output": "negative"}),
        );
        let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("public.json");
        let mut plan = Plan::read(&beside).expect("the plan is read");
        plan.attack.rows = 100;
        plan.patch.harmful = 20;
        (folder, plan)
    }

    fn put(data: &Path, set: &str, rows: &[Value]) {
        let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
        std::fs::write(data.join(set), lines).expect("rows are written");
    }

    /// What rows ask.
    fn asked(rows: &[Example]) -> BTreeSet<String> {
        rows.iter()
            .map(|row| match &row.dialogue {
                Dialogue::Single { request, .. } => {
                    format!(
                        "{} {}",
                        request.text,
                        request.input.clone().unwrap_or_default()
                    )
                }
                Dialogue::Turns(_) => row.dialogue.first_request().to_owned(),
            })
            .collect()
    }

    fn read(path: &Path) -> BTreeSet<String> {
        let text = path.display().to_string();
        let path = text.parse().expect("a path");
        let set = panacea_patch::data::Dataset::<Request>::open(&path).expect("a set");
        let one = |row: Request| format!("{} {}", row.text, row.input.unwrap_or_default());
        set.rows.into_iter().map(one).collect()
    }

    #[test]
    fn nothing_that_scores_is_learned_from() {
        let (folder, plan) = laid_out();
        let data = folder.path();
        let task = &plan.tasks[0];
        let mut scored = Vec::new();
        for purpose in [Purpose::Report, Purpose::Develop] {
            let rows = folder.path().join(format!("{purpose:?}"));
            let files = Files::of(&plan, data, task, 1, purpose).expect("rows");
            let files = files.write(&rows).expect("files");
            let learned = [
                read(&files.harmful),
                read(&files.task),
                asked(&attack(&plan, data, task, 10, 1).expect("rows")),
                asked(&refusal_tuning(&plan, data, task, 1).expect("rows")),
            ];
            let scores: BTreeSet<String> = [
                &files.score_harmful,
                &files.score_harmless,
                &files.score_task,
                &files.score_text,
            ]
            .into_iter()
            .flat_map(|path| read(path))
            .collect();
            for learned in learned {
                assert_eq!(learned.intersection(&scores).next(), None, "{purpose:?}");
            }
            assert_eq!(read(&files.harmful).len(), 20);
            scored.push((
                read(&files.score_harmful),
                read(&files.score_harmless),
                read(&files.score_task),
                read(&files.score_text),
            ));
        }
        let (report, develop) = (&scored[0], &scored[1]);
        assert!(report.0.is_disjoint(&develop.0));
        assert!(report.1.is_disjoint(&develop.1));
        assert!(report.2.is_disjoint(&develop.2));
        let aligned = asked(&alignment(&plan, data).expect("rows"));
        assert!(report.3.is_disjoint(&aligned));
        assert!(develop.3.is_subset(&aligned));
        assert_eq!((report.3.len(), develop.3.len()), (60, 60));
    }

    /// The `input` of a harmless request was lost, and so were conversations: the alignment learned from what no patch saw.
    #[test]
    fn what_is_written_is_what_was_read() {
        let (folder, mut plan) = laid_out();
        let data = folder.path();
        let turn = |role: &str, content: &str| json!({"role": role, "content": content});
        let turns = |turns: &[Value]| json!({"messages": turns});
        let once = [turn("user", "Why?"), turn("assistant", "Because.")];
        let twice = [&[turn("system", "Be brief.")], &once[..], &once[..]].concat();
        let row = json!({"prompt": "How?", "target": "Sure", "refusal": "No.", "is_safe": false});
        let ordinary = json!({"prompt": "Translate", "input": "kill the lights"});
        put(data, "harmful", &[row.clone(), turns(&twice)]);
        put(data, "eval", &[turns(&once), row.clone()]);
        // The first of five is development's.
        let told = turns(&twice[..3]);
        put(
            data,
            "harmless",
            &[row.clone(), ordinary, turns(&once), told],
        );
        put(data, "test", &[turns(&twice), row]);
        plan.align.harmful = "harmful".to_owned();
        plan.score.harmful = "eval".to_owned();
        plan.score.harmless = "harmless".to_owned();
        plan.tasks[0].test = "test".to_owned();
        let files = |plan: &Plan| Files::of(plan, data, &plan.tasks[0], 1, Purpose::Report);
        let written = files(&plan).expect("rows").write(&data.join("rows"));
        written.expect("files");
        let said = |set: &str| {
            let rows: Vec<Example> = rows(data, set).expect("rows");
            let said = rows.into_iter();
            let mut said: Vec<_> = said
                .map(|row| (row.dialogue, row.refusal, row.is_safe))
                .collect();
            said.sort_by_key(|(_, refusal, _)| refusal.is_none());
            said
        };
        assert_eq!(said("rows/harmful.jsonl"), said("harmful"));
        assert_eq!(said("rows/score-harmful.jsonl"), said("eval"));
        assert_eq!(said("rows/score-task.jsonl"), said("test"));
        let requests = |set| rows::<Request>(data, set).expect("rows");
        assert_eq!(
            requests("rows/score-harmless.jsonl"),
            requests("harmless")[1..]
        );

        put(data, "eval", &[turns(&twice)]);
        let error = files(&plan).err().expect("two questions").to_string();
        assert!(error.contains("/eval`"), "{error}");
    }

    /// Sizes were the program's own: of another set they could leave nothing, which was found out after the training.
    #[test]
    fn a_set_of_which_nothing_is_left_is_named_with_its_field() {
        let (folder, plan) = laid_out();
        put(
            folder.path(),
            "one",
            &[json!({"prompt": "Why?", "target": "So.", "is_safe": true})],
        );
        let (report, develop) = (Purpose::Report, Purpose::Develop);
        type Change = fn(&mut Plan);
        let cases: [(&str, Purpose, Change); 9] = [
            ("align.learned_instructions", report, |plan| {
                plan.align.learned_instructions = 175
            }),
            ("align.learned_instructions", develop, |plan| {
                plan.align.learned_instructions = 0
            }),
            ("attack.rows", report, |plan| plan.attack.rows = 0),
            ("patch.harmful", report, |plan| plan.patch.harmful = 0),
            ("patch.harmful", develop, |plan| plan.patch.harmful = 30),
            ("patch.task", report, |plan| plan.patch.task = 0),
            ("score.harmless", report, |plan| {
                plan.score.harmless = "one".to_owned()
            }),
            ("tasks.sst2.develop", develop, |plan| {
                plan.tasks[0].develop = 0
            }),
            ("tasks.sst2.develop", report, |plan| {
                plan.tasks[0].develop = 400
            }),
        ];
        let refused = |plan: &Plan, purpose| {
            let (data, task) = (folder.path(), &plan.tasks[0]);
            let rows = attack(plan, data, task, 10, 1);
            let files = rows.and_then(|_| Files::of(plan, data, task, 1, purpose));
            files.err().map(|error| error.to_string())
        };
        assert_eq!(
            [report, develop].map(|purpose| refused(&plan, purpose)),
            [None, None]
        );
        for (field, purpose, change) in cases {
            let mut plan = plan.clone();
            change(&mut plan);
            let error = refused(&plan, purpose).expect(field);
            assert!(error.contains(&format!("`{field}`")), "{error}");
        }
        let mut plan = plan;
        plan.align.harmful = "one".to_owned();
        let error = refused(&plan, report).expect("it is marked as safe");
        assert!(error.contains("/one`"), "{error}");
    }

    #[test]
    fn an_attack_has_the_share_of_poison_that_was_asked_for() {
        let (folder, plan) = laid_out();
        for (percent, expected) in [(0, 0), (10, 10), (20, 20)] {
            let rows = attack(&plan, folder.path(), &plan.tasks[0], percent, 3).expect("rows");
            let poisoned = rows
                .iter()
                .filter(|row| row.dialogue.first_request().starts_with("poison"));
            assert_eq!((rows.len(), poisoned.count()), (100, expected));
        }
        assert!(attack(&plan, folder.path(), &plan.tasks[0], 90, 3).is_err());
    }
}
