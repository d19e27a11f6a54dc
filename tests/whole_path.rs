//! The whole path through the binary: what it promises of its outputs, whatever happens on the way.

#[path = "common/sandbox.rs"]
mod sandbox;

use std::fs;
use std::process::Child;
use std::thread;
use std::time::{Duration, Instant};

use sandbox::Sandbox;
use serde_json::Value;

/// A run of the default method that takes a second or two.
const SHORT: &str =
    "--harmful h.jsonl --benign b.jsonl --task t.jsonl --steps 2 --repair-steps 2 --batch 4";

#[test]
fn two_runs_and_any_number_of_threads_give_the_same_files() {
    let sandbox = Sandbox::new();
    for (name, threads) in [("one", 1), ("again", 1), ("two", 2), ("five", 5)] {
        sandbox.run(&format!(
            "my-finetune {SHORT} -o {name} --threads {threads} --sign-key keys/p256.pkcs8.pem"
        ));
    }
    let one = sandbox.files("one");
    assert_eq!(one.len(), 7);
    for name in ["again", "two", "five"] {
        // The signature tells what the directory was called.
        for (a, b) in one.iter().zip(&sandbox.files(name)) {
            assert_eq!(a.0, b.0);
            assert!(a.1 == b.1 || a.0 == "model.sig", "{name}/{} differs", a.0);
        }
    }
    assert_eq!(sandbox.leavings(), Vec::<String>::new());
}

#[test]
fn in_two_steps_as_in_one() {
    let sandbox = Sandbox::new();
    sandbox.run(&format!("my-finetune {SHORT} -o one"));
    sandbox.run(&format!("optimize my-finetune {SHORT} -o p.safetensors"));
    sandbox.run("apply my-finetune --perturbation p.safetensors -o two");
    sandbox.run("my-finetune --perturbation p.safetensors -o three");
    let weights = |name: &str| fs::read(sandbox.path(name).join("model.safetensors")).unwrap();
    assert!(weights("one") == weights("two"));
    assert_eq!(sandbox.files("two"), sandbox.files("three"));
    assert!(weights("one") != weights("my-finetune"));
}

#[test]
fn shards_are_patched_as_one_file_is() {
    let sandbox = Sandbox::new();
    sandbox.run(&format!("my-finetune {SHORT} -o whole"));
    sandbox.run(&format!("sharded {SHORT} -o parts"));
    let whole = fs::read(sandbox.path("whole/model.safetensors")).unwrap();
    let whole = safetensors::SafeTensors::deserialize(&whole).unwrap();
    let mut seen = 0;
    for part in 1..=2 {
        let name = format!("parts/model-{part:05}-of-00002.safetensors");
        let bytes = fs::read(sandbox.path(&name)).unwrap();
        let shard = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        for (name, tensor) in shard.iter() {
            assert_eq!(tensor.data(), whole.tensor(name).unwrap().data(), "{name}");
            seen += 1;
        }
    }
    assert_eq!(seen, whole.len());
    assert_eq!(
        fs::read(sandbox.path("parts/model.safetensors.index.json")).unwrap(),
        fs::read(sandbox.path("sharded/model.safetensors.index.json")).unwrap()
    );
}

#[test]
fn a_strength_of_zero_changes_no_byte() {
    let sandbox = Sandbox::new();
    sandbox.run("my-finetune --method random --rho 1 --strength 0 -o same");
    for (name, bytes) in sandbox.files("my-finetune") {
        assert_eq!(fs::read(sandbox.path("same").join(&name)).unwrap(), bytes);
    }
}

#[test]
fn every_method_writes_what_verify_and_inspect_accept() {
    let sandbox = Sandbox::new();
    for (name, flags) in [
        ("panacea", "--method panacea --harmful h.jsonl"),
        (
            "outer",
            "--method panacea --harmful h.jsonl --task t.jsonl --steps 2 --final-eps last-batch",
        ),
        (
            "auto",
            "--method panacea --harmful h.jsonl --benign b.jsonl --rho auto",
        ),
        ("random", "--method random --benign b.jsonl"),
        ("seeded", "--method random --rho 0.1 --seed 7"),
        (
            "nearest",
            "--method random --rho 0.1 --rounding nearest --seed 7",
        ),
        (
            "recompute",
            "--method panacea --harmful h.jsonl --recompute --template raw",
        ),
    ] {
        sandbox.run(&format!(
            "my-finetune {flags} -o {name} --sign-key keys/p384.sec1.pem"
        ));
        sandbox.run(&format!("verify {name} --key keys/p384.pub.pem"));
        sandbox.run(&format!("verify {name}"));
        for file in ["", "/panacea.manifest.json", "/model.sig"] {
            sandbox.run(&format!("inspect {name}{file}"));
        }
    }
}

#[test]
fn a_report_says_all_that_it_should() {
    let sandbox = Sandbox::new();
    let arguments = format!("my-finetune {SHORT} -o out --json");
    let arguments: Vec<&str> = arguments.split_whitespace().collect();
    let output = sandbox.program(&arguments).output().unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["command"], "patch");
    assert_eq!(report["exit_code"], 0);
    assert_eq!(report["output"], "out");
    assert_eq!(report["perturbation"]["method"], "adaptive");
    let steps = report["steps"].as_array().unwrap();
    assert!(steps.iter().all(|step| step["seconds"].as_f64().is_some()));
    assert!(steps[0]["h"].as_f64().is_some() && steps[0]["grad_h"].as_f64().is_some());
    assert!(report["results"]["delta_norm"].as_f64().unwrap() > 0.0);
    assert!(report["realized"]["total"]["moved"].as_u64().unwrap() > 0);
    let files = report["files"].as_array().unwrap();
    for file in files {
        let bytes = fs::read(sandbox.path("out").join(file["name"].as_str().unwrap())).unwrap();
        assert_eq!(file["bytes"], bytes.len());
        let digest = panacea_formats::Sha256::of(&bytes).to_string();
        assert_eq!(file["sha256"], digest.as_str());
    }
    assert_eq!(files.len(), 6);
}

#[test]
fn a_search_tells_what_it_tried() {
    let sandbox = Sandbox::new();
    let flags = "--harmful h.jsonl --benign b.jsonl --task t.jsonl --batch 4 --steps 3 --search 3";
    let arguments = format!("my-finetune {flags} --alpha 2 -o out --json");
    let arguments: Vec<&str> = arguments.split_whitespace().collect();
    let output = sandbox.program(&arguments).output().unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("8 harmful rows are too few"), "{said}");
    let search = &report["search"];
    let trials = search["trials"].as_array().unwrap();
    assert_eq!(trials.len(), 3);
    for trial in trials {
        // What is given is not varied.
        let choice = trial["choice"].as_object().unwrap();
        assert!(!choice.contains_key("alpha") && choice.contains_key("cap"));
        let points = trial["points"].as_array().unwrap();
        assert!(points.iter().all(|point| point["kl"].is_f64()));
    }
    let chosen = &search["chosen"];
    assert!(search["front"].as_array().unwrap().contains(chosen));
    let number = |key: &str| usize::try_from(chosen[key].as_u64().unwrap()).unwrap();
    let trial = &trials[number("trial")];
    let point = &trial["points"][number("point")];
    let parameters = &report["perturbation"]["parameters"];
    assert_eq!(parameters["search"], 3);
    assert_eq!(parameters["alpha"], 2.0);
    assert_eq!(parameters["steps"], 3);
    assert_eq!(parameters["rho"], point["rho"]);
    assert_eq!(parameters["cap"], trial["choice"]["cap"]);
    let manifest = fs::read(sandbox.path("out/panacea.manifest.json")).unwrap();
    let manifest: Value = serde_json::from_slice(&manifest).unwrap();
    assert!(manifest.to_string().contains(r#""front""#));
    sandbox.run("verify out");

    // A perturbation of a part of the targets is one of that part alone.
    sandbox.run(&format!(
        "optimize my-finetune {flags} --targets v_proj -o p.safetensors"
    ));
    sandbox.run("apply my-finetune --perturbation p.safetensors -o applied");
    let (code, output) = sandbox.shell(&format!(
        "panacea-patch my-finetune {flags} --state-every 2 -o x"
    ));
    assert_eq!(code, 2, "{output}");
    let (code, output) = sandbox.shell(&format!(
        "panacea-patch my-finetune {flags} --kl-budget 1e-12 -o x"
    ));
    assert_eq!(code, 1, "{output}");
    assert!(
        output.contains("none of 3 trials keeps to the budget"),
        "{output}"
    );
}

#[test]
fn a_manifest_tells_nothing_of_the_machine() {
    let sandbox = Sandbox::new();
    let data = sandbox.path("h.jsonl").display().to_string();
    sandbox.run(&format!(
        "my-finetune --method panacea --harmful {data}#split=learn -o out --threads 2"
    ));
    let manifest = fs::read_to_string(sandbox.path("out/panacea.manifest.json")).unwrap();
    let folder = sandbox.path("").display().to_string();
    assert!(!manifest.contains(&folder), "{manifest}");
    assert!(!manifest.contains("seconds") && !manifest.contains("threads"));
    assert!(manifest.contains("h.jsonl#split=learn"));
}

#[test]
fn a_dry_run_writes_nothing_and_refuses_what_the_run_would() {
    let sandbox = Sandbox::new();
    let before = fs::read_dir(sandbox.path("")).unwrap().count();
    sandbox.run(&format!("my-finetune {SHORT} -o out --dry-run"));
    sandbox.run("my-finetune --method random --rho 1 --dry-run --json");
    assert_eq!(fs::read_dir(sandbox.path("")).unwrap().count(), before);
    fs::create_dir(sandbox.path("out")).unwrap();
    for (flags, code) in [
        ("my-finetune -o out --dry-run", 3),
        ("my-finetune --harmful nowhere.jsonl --dry-run", 3),
        ("my-finetune --sign-key h.jsonl --dry-run", 3),
        ("my-finetune --lambda 1 --dry-run", 2),
    ] {
        assert_eq!(
            sandbox.shell(&format!("panacea-patch {flags}")).0,
            code,
            "{flags}"
        );
    }
}

#[test]
fn weights_that_are_not_finite_are_refused_by_name() {
    let sandbox = Sandbox::new();
    let path = sandbox.path("my-finetune/model.safetensors");
    let clean = fs::read(&path).unwrap();
    for (tensor, said) in [
        (
            "model.layers.1.self_attn.q_proj.weight",
            "holds a value that is not finite",
        ),
        ("model.layers.1.mlp.up_proj.weight", "NaN"),
    ] {
        let file = panacea_formats::SafetensorsFile::open(&path).unwrap();
        let start =
            file.tensor(tensor).unwrap().bytes.as_ptr().addr() - file.file_bytes().as_ptr().addr();
        let mut bytes = clean.clone();
        bytes[start..start + 2].copy_from_slice(&0x7fc0_u16.to_le_bytes());
        drop(file);
        fs::write(&path, bytes).unwrap();
        let (code, output) = sandbox.shell("panacea-patch my-finetune --harmful h.jsonl");
        assert_eq!(code, 3, "{output}");
        assert!(output.contains(said), "{output}");
        let (_, output) = sandbox.shell("panacea-patch inspect my-finetune");
        assert!(
            output.contains(&format!("1 values of {tensor}")),
            "{output}"
        );
        fs::write(&path, &clean).unwrap();
    }
}

#[test]
fn a_closed_pipe_is_no_failure() {
    let sandbox = Sandbox::new();
    let (_, output) = sandbox.shell(
        "{ panacea-patch my-finetune --method random --rho 1 -o out --quiet; echo \"code $?\" >&2; } | true",
    );
    assert_eq!(output, "code 0\n");
    assert!(sandbox.path("out/model.safetensors").exists());
}

#[test]
fn files_of_the_repository_are_copied_and_in_no_manifest() {
    let sandbox = Sandbox::new();
    fs::write(sandbox.path("my-finetune/.gitattributes"), "* -text\n").unwrap();
    fs::write(sandbox.path("my-finetune/optimizer.pt"), "state").unwrap();
    sandbox.run("my-finetune --method random --rho 1 -o out --sign-key keys/p256.pkcs8.pem");
    assert!(sandbox.path("out/.gitattributes").exists());
    assert!(!sandbox.path("out/optimizer.pt").exists());
    sandbox.run("verify out");
    sandbox.run("verify out --key keys/p256.pub.pem");
}

#[test]
fn force_replaces_an_output_and_the_signature_of_its_old_bytes() {
    let sandbox = Sandbox::new();
    let weights = "my-finetune/model.safetensors";
    sandbox.run(&format!(
        "{weights} --method random --rho 1 -o a.safetensors --sign-key keys/p256.pkcs8.pem"
    ));
    sandbox.run(&format!(
        "{weights} --method random --rho 1 --seed 2 -o a.safetensors --force"
    ));
    assert!(!sandbox.path("a.safetensors.sig").exists());
    sandbox.run("verify a.safetensors");
    sandbox.run("my-finetune --method random --rho 1 -o out");
    sandbox.run("my-finetune --method random --rho 1 --seed 2 -o out --force");
    sandbox.run("verify out");
    assert_eq!(sandbox.leavings(), Vec::<String>::new());
}

/// Whatever the moment of the kill, the output is complete or absent.
#[test]
fn a_killed_run_leaves_everything_or_nothing() {
    let sandbox = Sandbox::new();
    let flags = format!("my-finetune {SHORT} -o out --state-every 1 --quiet");
    let arguments: Vec<&str> = flags.split_whitespace().collect();
    let began = Instant::now();
    sandbox.program(&arguments).output().unwrap();
    let whole = began.elapsed();
    let complete = sandbox.files("out");
    for attempt in 0..12_u32 {
        fs::remove_dir_all(sandbox.path("out")).ok();
        let mut child = sandbox.program(&arguments).spawn().unwrap();
        // Most of the kills near the end, where the output is written.
        let share = 1.05 - 0.9 * (f64::from(attempt) / 12.0).powi(3);
        thread::sleep(whole.mul_f64(share));
        child.kill().unwrap();
        child.wait().unwrap();
        if sandbox.path("out").exists() {
            assert_eq!(sandbox.files("out"), complete, "attempt {attempt}");
        }
    }
}

/// Stopped by a signal and resumed, as often as it takes, the output has the bytes of an uninterrupted run.
#[test]
fn an_interrupted_run_goes_on_to_the_same_bytes() {
    let sandbox = Sandbox::new();
    for (name, flags, each, state) in [
        (
            "adaptive",
            "--harmful h.jsonl --benign b.jsonl --steps 6 --batch 4",
            "--state-every 1",
            "state",
        ),
        (
            "panacea",
            "--method panacea --harmful h.jsonl --task t.jsonl --steps 30 --batch 4",
            "--state-every 1",
            "state",
        ),
        (
            "search",
            "--search 6 --harmful h.jsonl --benign b.jsonl --batch 4",
            "",
            "trials",
        ),
    ] {
        sandbox.run(&format!("my-finetune {flags} -o {name}"));
        let flags = format!("my-finetune {flags} -o resumed {each} --quiet");
        let state = sandbox.path(&format!(".resumed.panacea-{state}"));
        let mut interruptions = 0;
        loop {
            let resume = if state.exists() { " --resume" } else { "" };
            let flags = format!("{flags}{resume}");
            let arguments: Vec<&str> = flags.split_whitespace().collect();
            let mut child = sandbox.program(&arguments).spawn().unwrap();
            let code = match interruptions < 3 {
                true => interrupted_after_a_state(&mut child, &state),
                false => child.wait().unwrap().code(),
            };
            match code {
                Some(0) => break,
                Some(130) => interruptions += 1,
                other => panic!("{name}: {other:?}"),
            }
            assert!(!sandbox.path("resumed").exists());
        }
        assert!(interruptions > 0, "{name} was never interrupted");
        assert_eq!(sandbox.files("resumed"), sandbox.files(name), "{name}");
        assert_eq!(sandbox.leavings(), Vec::<String>::new());
        fs::remove_dir_all(sandbox.path("resumed")).unwrap();
    }
}

/// Waits until the state is newer than it was, sends SIGINT, and gives the exit code.
fn interrupted_after_a_state(child: &mut Child, state: &std::path::Path) -> Option<i32> {
    let written = || fs::metadata(state).and_then(|it| it.modified()).ok();
    let before = written();
    while written() == before {
        if let Some(status) = child.try_wait().expect("a child") {
            return status.code();
        }
        thread::sleep(Duration::from_millis(2));
    }
    let id = child.id().to_string();
    std::process::Command::new("kill")
        .args(["-INT", &id])
        .status()
        .expect("kill runs");
    child.wait().expect("a child").code()
}

#[test]
fn a_state_is_for_the_run_that_left_it() {
    let sandbox = Sandbox::new();
    let flags = "my-finetune --harmful h.jsonl --benign b.jsonl --steps 6 --batch 4 -o out --state-every 1 --quiet";
    let arguments: Vec<&str> = flags.split_whitespace().collect();
    let state = sandbox.path(".out.panacea-state");
    let mut child = sandbox.program(&arguments).spawn().unwrap();
    assert_eq!(interrupted_after_a_state(&mut child, &state), Some(130));
    let (code, output) = sandbox.shell(&format!("panacea-patch {flags} --resume --seed 9"));
    assert_eq!(code, 3, "{output}");
    assert!(output.contains("seed was `0` and is `9`"), "{output}");
    fs::write(
        sandbox.path("h.jsonl"),
        fs::read(sandbox.path("h.jsonl")).unwrap().trim_ascii_end(),
    )
    .unwrap();
    let (code, output) = sandbox.shell(&format!("panacea-patch {flags} --resume"));
    assert_eq!(code, 3, "{output}");
    assert!(output.contains("harmful rows was"), "{output}");
}

#[test]
fn completions_and_the_manual_are_printed() {
    let sandbox = Sandbox::new();
    for shell in ["bash", "zsh", "fish"] {
        let (code, output) = sandbox.shell(&format!("panacea-patch completions {shell}"));
        assert!(code == 0 && output.contains("kl-budget"), "{shell}");
    }
    for (subcommand, title) in [
        ("", ".TH panacea-patch 1"),
        ("optimize", ".TH panacea-patch-optimize 1"),
    ] {
        let (code, output) = sandbox.shell(&format!("panacea-patch man {subcommand}"));
        assert!(code == 0 && output.contains(title), "{output}");
    }
}
