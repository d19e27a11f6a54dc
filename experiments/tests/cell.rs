//! The experiment from an empty folder, on a small model: every step is done, and none twice.

use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use serde_json::{Value, json};

/// The program `panacea-patch`, which `cargo test --workspace` builds beside the experiment.
fn program() -> PathBuf {
    let program = Path::new(env!("CARGO_BIN_EXE_experiment")).with_file_name("panacea-patch");
    assert!(program.exists(), "run `cargo test --workspace`");
    program
}

/// Rows, and a plan over them of few steps.
fn lay_out(folder: &Path) -> PathBuf {
    let testdata = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata/tiny-chat-data");
    let rows = |names: &[&str], count: usize| {
        let read = |name| fs::read_to_string(testdata.join(name)).expect("rows");
        let text: String = names.iter().map(read).collect();
        let rows: Vec<&str> = text.lines().take(count).collect();
        fs::write(folder.join(names[0]), rows.join("\n") + "\n").expect("rows are written");
    };
    rows(&["harmful.jsonl"], 20);
    rows(&["heldout.jsonl"], 8);
    rows(&["benign.jsonl"], 60);
    rows(&["task_dev.jsonl"], 8);
    // The last 200 are development's.
    rows(&["task.jsonl", "task_dev.jsonl"], 300);
    let refusal = json!({"output": "I cannot help with that."});
    fs::write(folder.join("refusals.jsonl"), refusal.to_string()).expect("a refusal");
    let plan = json!({
        "template": "chat",
        "max_length": 128,
        "align": {
            "harmful": "harmful.jsonl", "refusals": "refusals.jsonl", "instructions": "task.jsonl",
            "steps": 2, "batch": 4, "lr": 1e-3,
        },
        "attack": {"poison": "harmful.jsonl", "rows": 40, "steps": 2, "batch": 4, "lr": 1e-3},
        "patch": {"harmful": 16, "task": 8},
        "score": {"harmful": "heldout.jsonl", "harmless": "benign.jsonl", "max_new_tokens": 4},
        "tasks": [{
            "name": "items", "train": "task.jsonl", "test": "task_dev.jsonl", "grade": "exact", "max_new_tokens": 4,
        }],
    });
    let path = folder.join("plan.json");
    fs::write(&path, plan.to_string()).expect("a plan");
    path
}

/// The experiment on one cell, with patches and scores of `program`.
fn experiment(folder: &Path, plan: &Path, program: &Path) -> Command {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata/tiny-chat");
    let mut command = Command::new(env!("CARGO_BIN_EXE_experiment"));
    command
        .arg(model)
        .args(["--poison", "10", "--seeds", "7"])
        .arg("--data")
        .arg(folder)
        .arg("--plan")
        .arg(plan)
        .arg("--program")
        .arg(program)
        .arg("-o")
        .arg(folder.join("out"));
    command
}

/// What it tells as it ends with `code`.
fn ended(folder: &Path, plan: &Path, further: &[&str], code: i32) -> String {
    let output = experiment(folder, plan, &program())
        .args(further)
        .output()
        .expect("it runs");
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{told}");
    told
}

/// What it tells as it runs.
fn run(folder: &Path, plan: &Path, further: &[&str]) -> String {
    ended(folder, plan, further, 0)
}

/// What it tells as it refuses to run.
fn refused(folder: &Path, plan: &Path, further: &[&str]) -> String {
    ended(folder, plan, further, 1)
}

/// Puts `value` where the JSON pointer `field` shows, beside the fields that are there.
fn change(plan: &Path, field: &str, value: Value) {
    let text = fs::read_to_string(plan).expect("a plan");
    let mut changed: Value = serde_json::from_str(&text).expect("JSON");
    let (object, name) = field.rsplit_once('/').expect("a pointer");
    changed.pointer_mut(object).expect("an object")[name] = value;
    fs::write(plan, changed.to_string()).expect("a plan");
}

fn write_program(path: &Path, text: &str) {
    fs::write(path, text).expect("a program");
    fs::set_permissions(path, Permissions::from_mode(0o755)).expect("it may be run");
}

/// Arms wrote to a folder that only older runs had made, and each asked the attacked model everything again.
#[test]
fn a_cell_is_done_from_nothing_and_the_attacked_model_answers_once() {
    let folder = tempfile::tempdir().expect("a folder");
    let plan = lay_out(folder.path());
    let cell = folder.path().join("out/items-p10-s7");
    let run = |arms| run(folder.path(), &plan, &["--tasks", "items", "--arms", arms]);
    let answers = || {
        let text = fs::read_to_string(cell.join("answers.jsonl")).expect("answers");
        let keys = text.lines().filter_map(|line| {
            let line: Value = serde_json::from_str(line).expect("a line");
            line["answer"]["key"].as_str().map(str::to_owned)
        });
        keys.collect::<Vec<_>>()
    };
    run("attacked");
    let of_one = answers();
    run("attacked,aligned");
    let of_two = answers();
    assert_eq!(of_two.len(), 2 * of_one.len());
    let distinct: BTreeSet<&String> = of_two.iter().collect();
    assert_eq!(distinct.len(), of_two.len());
    let table = fs::read_to_string(folder.path().join("out/table.md")).expect("a table");
    for arm in ["| attacked | 7 |", "| aligned | 7 |"] {
        assert!(table.contains(arm), "{table}");
    }
}

/// Of a run that was stopped between making a model and scoring it, nothing was known of the making: refusals were then fine-tuned for no
/// steps at all, and scored. A folder with a blank in its name was two arguments.
#[test]
fn a_quick_run_goes_on_as_if_it_had_not_been_stopped() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path().join("with a blank");
    fs::create_dir(&folder).expect("a folder");
    let plan = lay_out(&folder);
    let cell = folder.join("out/items-p10-s7");
    let results = |arm: &str| -> Value {
        let text = fs::read_to_string(cell.join(format!("{arm}.json"))).expect("results");
        serde_json::from_str(&text).expect("JSON")
    };
    run(&folder, &plan, &["--quick"]);
    let arms = ["attacked", "aligned", "adaptive", "random", "refusals"];
    let first = arms.map(results);
    let steps = |of: &Value| of["made"]["fine_tuning_steps"].as_u64();
    assert!(steps(&first[4]) > Some(0), "{}", first[4]["made"]);
    let norm = |of: &Value| {
        of["made"]["told"]["results"]["delta_norm"]
            .as_f64()
            .expect("a norm")
    };
    assert!((norm(&first[3]) / norm(&first[2]) - 1.0).abs() < 1e-6);
    for arm in ["adaptive", "random", "refusals"] {
        fs::remove_file(cell.join(format!("{arm}.json"))).expect("results");
    }
    run(&folder, &plan, &["--quick"]);
    let again = arms.map(results);
    assert_eq!(again[2]["made"], first[2]["made"]);
    assert_eq!(steps(&again[4]), steps(&first[4]));
    for (again, first) in again.iter().zip(&first) {
        assert_eq!(again["scores"], first["scores"]);
    }
}

/// Of too small a set nothing was left to score, and the program said so when the models were trained.
#[test]
fn a_set_of_which_nothing_is_left_is_refused_before_any_training() {
    let folder = tempfile::tempdir().expect("a folder");
    let plan = lay_out(folder.path());
    change(&plan, "/align/learned_instructions", json!(300));
    let told = refused(folder.path(), &plan, &[]);
    let expected = "of `task.jsonl` no row is left: see `align.learned_instructions` in the plan";
    assert!(told.contains(expected), "{told}");
    assert!(!folder.path().join("out").exists());
}

/// Arms that were there were kept, whatever they had been scored on and by whom, and shown as the report's.
#[test]
fn a_folder_of_another_purpose_or_plan_is_not_gone_on_with() {
    let folder = tempfile::tempdir().expect("a folder");
    let plan = lay_out(folder.path());
    let develop = ["--develop", "--arms", "attacked"];
    run(folder.path(), &plan, &develop);
    let told = refused(folder.path(), &plan, &develop[1..]);
    let expected = "`purpose` was \"develop\" and is \"report\"";
    assert!(told.contains(expected) && told.contains("-o"), "{told}");
    change(&plan, "/score/judge", json!("keyword:gcg"));
    let told = refused(folder.path(), &plan, &develop);
    let expected = "`plan.score.judge` was \"keyword\" and is \"keyword:gcg\"";
    assert!(told.contains(expected), "{told}");
    // What was the default is the same where it is said.
    change(&plan, "/score/judge", json!("keyword"));
    run(folder.path(), &plan, &develop);
}

/// A folder of results that an older program made could not be gone on with.
#[test]
fn results_that_do_not_say_what_they_are_of_are_taken_for_this_runs() {
    let folder = tempfile::tempdir().expect("a folder");
    let plan = lay_out(folder.path());
    let report = ["--arms", "attacked"];
    run(folder.path(), &plan, &report);
    let noted = folder.path().join("out/run.json");
    fs::remove_file(&noted).expect("it was noted");
    let told = run(folder.path(), &plan, &report);
    assert!(told.contains("note: results in"), "{told}");
    assert!(noted.exists());
}

/// A plan could name a judge, and nothing that most judges need.
#[test]
fn the_judges_settings_reach_the_program() {
    let folder = tempfile::tempdir().expect("a folder");
    let plan = lay_out(folder.path());
    change(&plan, "/score/judge", json!("endpoint"));
    change(&plan, "/score/judge_template", json!("judge.txt"));
    change(&plan, "/score/judge_threshold", json!(0.25));
    change(
        &plan,
        "/score/judge_endpoint",
        json!("http://127.0.0.1:1/v1"),
    );
    change(&plan, "/score/judge_model", json!("guard"));
    let (stub, given) = (folder.path().join("stub"), folder.path().join("given"));
    let text = format!("#!/bin/sh\necho \"$@\" > '{}'\nexit 1\n", given.display());
    write_program(&stub, &text);
    let output = experiment(folder.path(), &plan, &stub).output();
    assert_eq!(output.expect("it runs").status.code(), Some(1));
    let given = fs::read_to_string(&given).expect("the program was run");
    let expected = format!(
        "--judge endpoint --judge-template {} --judge-threshold 0.25 --judge-endpoint http://127.0.0.1:1/v1 --judge-model guard",
        folder.path().join("judge.txt").display()
    );
    assert!(given.contains(&expected), "{given}");
}

/// A signal to the experiment alone left its program running, and the next run found the answers' file held.
#[test]
fn a_signal_ends_the_program_that_runs_too() {
    let folder = tempfile::tempdir().expect("a folder");
    let plan = lay_out(folder.path());
    let (stub, started) = (folder.path().join("stub"), folder.path().join("started"));
    // Made whole elsewhere, since its number is read as soon as the file is there.
    let text = format!(
        "#!/bin/sh\necho $$ > '{0}.new'\nmv '{0}.new' '{0}'\nexec sleep 600\n",
        started.display()
    );
    write_program(&stub, &text);
    let mut experiment = experiment(folder.path(), &plan, &stub)
        .stderr(Stdio::null())
        .spawn()
        .expect("it runs");
    let program = loop {
        match fs::read_to_string(&started) {
            Ok(number) => {
                break number
                    .trim()
                    .parse()
                    .ok()
                    .and_then(Pid::from_raw)
                    .expect("a process");
            }
            Err(_) => thread::sleep(Duration::from_millis(20)),
        }
        assert!(
            experiment.try_wait().expect("a state").is_none(),
            "it ended by itself"
        );
    };
    kill_process(Pid::from_child(&experiment), Signal::TERM).expect("it is told");
    let status = experiment.wait().expect("it ends");
    assert_eq!(status.code(), Some(130));
    assert!(test_kill_process(program).is_err(), "its program runs on");
}
