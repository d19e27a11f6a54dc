//! Low-rank and sparse perturbations from the command line: what is applied is their expansion, what is told of them is so, and
//! every input that is refused of dense ones is refused of them.

#![expect(clippy::unwrap_used, reason = "a test may fail loudly")]

#[path = "common/sandbox.rs"]
mod sandbox;

use std::fs;
use std::path::Path;

use panacea_formats::{
    DeltaTensor, Form, OutputFile, Overwrite, Perturbation, PerturbationRecord, write_perturbation,
};
use sandbox::Sandbox;
use serde_json::Value;

/// Flags of a form, by the name of the file that is written in it.
const FORMS: [(&str, &str); 3] = [
    ("rank-3", "--as-lora 3"),
    ("full", "--as-lora 9999"),
    ("sparse", "--sparse 0.7"),
];

const NOISE: &str = "--method random --rho 2 --targets q_proj,k_proj,down_proj";

/// A perturbation file of noise in the given form, and the same noise dense.
fn made(sandbox: &Sandbox, name: &str, flags: &str) -> (Perturbation, Perturbation) {
    let open = |name: &str| Perturbation::open(&sandbox.path(name)).expect("a perturbation");
    let file = format!("{name}.safetensors");
    sandbox.run(&format!(
        "optimize my-finetune {NOISE} {flags} -o {file} --quiet"
    ));
    sandbox.run(&format!(
        "optimize my-finetune {NOISE} -o {name}-noise.safetensors --quiet"
    ));
    (open(&file), open(&format!("{name}-noise.safetensors")))
}

fn values(delta: &DeltaTensor<'_>) -> Vec<f32> {
    let mut values = vec![f32::NAN; delta.elements()];
    delta.read_into(0..values.len(), &mut values).expect("all");
    values
}

/// Writes the expansion of `perturbation`.
fn expand(sandbox: &Sandbox, perturbation: &Perturbation, file: &str) {
    let expanded: Vec<Vec<f32>> = perturbation.deltas().map(|it| values(&it)).collect();
    let deltas: Vec<DeltaTensor<'_>> = perturbation
        .deltas()
        .zip(&expanded)
        .map(|(delta, values)| DeltaTensor::new(delta.name(), delta.shape(), values).unwrap())
        .collect();
    let mut output = OutputFile::create(&sandbox.path(file), Overwrite::Never, &[]).unwrap();
    write_perturbation(&mut output, perturbation.record(), &deltas).unwrap();
    let _ = output.commit().unwrap();
}

#[test]
fn a_compact_file_is_applied_as_the_dense_file_of_its_expansion() {
    let sandbox = Sandbox::new();
    for (name, flags) in FORMS {
        let (compact, _) = made(&sandbox, name, flags);
        expand(&sandbox, &compact, &format!("{name}-dense.safetensors"));
        for (number, how) in [
            "",
            "--strength 0.37 --rounding nearest",
            "--strength 1.5 --seed 4",
        ]
        .iter()
        .enumerate()
        {
            let (first, second) = (format!("{name}-{number}-a"), format!("{name}-{number}-b"));
            sandbox.run(&format!(
                "apply my-finetune --perturbation {name}.safetensors {how} -o {first} --threads 1"
            ));
            // Sharded, by the whole job, and on other threads.
            sandbox.run(&format!(
                "sharded --perturbation {name}-dense.safetensors {how} -o {second} --threads 2"
            ));
            let lone = fs::read(sandbox.path(&first).join("model.safetensors")).unwrap();
            let lone = safetensors::SafeTensors::deserialize(&lone).unwrap();
            let mut seen = 0;
            for (file, bytes) in sandbox.files(&second) {
                if !file.ends_with(".safetensors") {
                    continue;
                }
                for (tensor, view) in safetensors::SafeTensors::deserialize(&bytes)
                    .unwrap()
                    .iter()
                {
                    let found = lone.tensor(tensor).unwrap();
                    assert_eq!(found.data(), view.data(), "{name} {how} {tensor}");
                    seen += 1;
                }
            }
            assert_eq!(seen, lone.len());
            let before = fs::read(sandbox.path("my-finetune/model.safetensors")).unwrap();
            assert_ne!(
                before,
                fs::read(sandbox.path(&first).join("model.safetensors")).unwrap()
            );
        }
    }
}

#[test]
fn the_energy_that_is_said_to_be_kept_is_kept() {
    let sandbox = Sandbox::new();
    for (name, flags) in FORMS {
        let (compact, dense) = made(&sandbox, name, flags);
        let (mut energy, mut lost) = (0.0, 0.0);
        for compact in compact.deltas() {
            let dense = dense
                .deltas()
                .find(|it| it.name() == compact.name())
                .unwrap();
            for (dense, compact) in values(&dense).into_iter().zip(values(&compact)) {
                energy += f64::from(dense).powi(2);
                lost += (f64::from(dense) - f64::from(compact)).powi(2);
            }
        }
        let parameters = &compact.record().parameters;
        let said = parameters["energy_kept"].as_f64().unwrap();
        assert!(
            (said - (1.0 - lost / energy)).abs() < 1e-12,
            "{name}: {said}"
        );
        match name {
            // Noise is spread evenly, so three of at least 32 directions hold little of it.
            "rank-3" => assert!((0.05..0.3).contains(&said), "{said}"),
            "full" => assert!(said > 1.0 - 1e-10, "{said}"),
            _ => assert!((0.7..0.7001).contains(&said), "{said}"),
        }
        assert_eq!(without_form(compact.record()), *dense.record());
    }
}

/// The record as it is of a dense perturbation.
fn without_form(record: &PerturbationRecord) -> PerturbationRecord {
    let mut record = record.clone();
    for name in ["as_lora", "sparse", "energy_kept"] {
        record.parameters.remove(name);
    }
    record
}

#[test]
fn threads_change_no_byte_of_a_compact_file() {
    let sandbox = Sandbox::new();
    for (_, flags) in FORMS {
        let bytes = |threads: usize| {
            let file = format!("{threads}.safetensors");
            sandbox.run(&format!(
                "optimize my-finetune {NOISE} {flags} -o {file} --force --threads {threads}"
            ));
            fs::read(sandbox.path(&file)).unwrap()
        };
        assert_eq!(bytes(1), bytes(3), "{flags}");
    }
}

#[test]
fn a_dry_run_foretells_the_size() {
    let sandbox = Sandbox::new();
    for (flags, least) in [("", 0.9), ("--as-lora 3", 0.6), ("--sparse 0.7", 0.3)] {
        let report = |more: &str| -> Value {
            let words = format!(
                "optimize my-finetune {NOISE} {flags} -o p.safetensors --force --json {more}"
            );
            let words: Vec<&str> = words.split_whitespace().collect();
            let output = sandbox.program(&words).output().unwrap();
            assert!(output.status.success());
            serde_json::from_slice(&output.stdout).unwrap()
        };
        let foretold = report("--dry-run")["plan"]["written_bytes"]
            .as_f64()
            .unwrap();
        let written = report("")["files"][0]["bytes"].as_f64().unwrap();
        assert!(
            (least..=1.0).contains(&(written / foretold)),
            "{flags}: {written} of {foretold}"
        );
    }
}

#[test]
fn modules_that_peft_calls_otherwise_make_no_adapter() {
    let sandbox = Sandbox::new();
    let oracle = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/oracle");
    let mixture = oracle.join("mixtral");
    let mixture = mixture.to_str().unwrap();
    let run = |targets: &str| {
        let words = format!(
            "optimize {mixture} --method random --rho 1 --targets {targets} --as-lora 2 -o p.safetensors --peft adapter --dry-run"
        );
        let words: Vec<&str> = words.split_whitespace().collect();
        let output = sandbox.program(&words).output().unwrap();
        (
            output.status.code(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    let (code, said) = run("w1,q_proj");
    assert_eq!(code, Some(3), "{said}");
    assert!(
        said.contains(".experts.0.w1.weight` is no projection"),
        "{said}"
    );
    assert_eq!(run("q_proj").0, Some(0));
}

#[test]
fn the_ranks_of_an_adapter_are_those_that_its_matrices_can_use() {
    let sandbox = Sandbox::new();
    let (compact, _) = made(&sandbox, "full", "--as-lora 9999 --peft adapter");
    for delta in compact.deltas() {
        let most = delta.shape().iter().copied().min().unwrap();
        assert_eq!(delta.form(), Form::LowRank { rank: most });
    }
    let config = fs::read(sandbox.path("adapter/adapter_config.json")).unwrap();
    let config: Value = serde_json::from_slice(&config).unwrap();
    let largest = compact.deltas().map(|delta| match delta.form() {
        Form::LowRank { rank } => rank,
        _ => 0,
    });
    assert_eq!(config["r"].as_u64(), largest.max().map(|rank| rank as u64));
    assert_eq!(config["rank_pattern"], config["alpha_pattern"]);
    assert_eq!(config["base_model_name_or_path"], "my-finetune");
    let weights = fs::read(sandbox.path("adapter/adapter_model.safetensors")).unwrap();
    let weights = safetensors::SafeTensors::deserialize(&weights).unwrap();
    assert_eq!(weights.len(), 2 * compact.deltas().len());
    for delta in compact.deltas() {
        let module = delta.name().strip_suffix(".weight").unwrap();
        let (a, b) = delta.factors().unwrap();
        for (end, factor) in [("lora_A", a), ("lora_B", b)] {
            let name = format!("base_model.model.{module}.{end}.weight");
            let bytes: Vec<u8> = factor.iter().flat_map(|it| it.to_le_bytes()).collect();
            assert_eq!(weights.tensor(&name).unwrap().data(), bytes);
        }
    }
    assert_eq!(sandbox.leavings(), Vec::<String>::new());
}
