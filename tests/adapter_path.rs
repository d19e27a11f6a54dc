//! The whole path through the binary for a LoRA adapter: what holds for whole models holds for it, and what is its own.

#[path = "common/sandbox.rs"]
mod sandbox;

use std::fs;
use std::path::Path;

use panacea_formats::{Perturbation, Space};
use safetensors::SafeTensors;
use sandbox::Sandbox;
use serde_json::Value;

const SHORT: &str =
    "--harmful h.jsonl --benign b.jsonl --task t.jsonl --steps 2 --repair-steps 2 --batch 4";

#[test]
fn every_method_patches_an_adapter_and_verify_and_inspect_accept_it() {
    let sandbox = Sandbox::new();
    for (name, flags) in [
        ("adaptive", SHORT),
        ("panacea", "--method panacea --harmful h.jsonl"),
        (
            "outer",
            "--method panacea --harmful h.jsonl --task t.jsonl --steps 2 --final-eps last-batch --targets q_proj",
        ),
        (
            "auto",
            "--method panacea --harmful h.jsonl --benign b.jsonl --rho auto",
        ),
        ("random", "--method random --benign b.jsonl"),
        ("control", "--method random --rho 0.5"),
        ("merged", "--method panacea --harmful h.jsonl --merge"),
        (
            "merged-control",
            "--method random --rho 0.5 --merge --seed 3",
        ),
    ] {
        sandbox.run(&format!(
            "my-adapter {flags} -o {name} --sign-key keys/p256.pkcs8.pem"
        ));
        sandbox.run(&format!("verify {name} --key keys/p256.pub.pem"));
        sandbox.run(&format!("verify {name}"));
        for file in ["", "/panacea.manifest.json", "/model.sig"] {
            sandbox.run(&format!("inspect {name}{file}"));
        }
    }
    assert_eq!(sandbox.leavings(), Vec::<String>::new());
}

#[test]
fn a_patched_adapter_differs_in_its_targets_alone() {
    let sandbox = Sandbox::new();
    sandbox.run("my-adapter --method panacea --harmful h.jsonl --targets v_proj -o out");
    let read = |name: &str| fs::read(sandbox.path(name).join("adapter_model.safetensors")).unwrap();
    let (before, after) = (read("my-adapter"), read("out"));
    let (before, after) = (
        SafeTensors::deserialize(&before).unwrap(),
        SafeTensors::deserialize(&after).unwrap(),
    );
    let mut changed = 0;
    for (name, tensor) in before.iter() {
        let same = tensor.data() == after.tensor(name).unwrap().data();
        assert_eq!(same, !name.contains("v_proj"), "{name}");
        changed += usize::from(!same);
    }
    assert_eq!(changed, 8);
    let config = |name: &str| fs::read(sandbox.path(name).join("adapter_config.json")).unwrap();
    assert_eq!(config("my-adapter"), config("out"));
}

#[test]
fn in_two_steps_as_in_one_and_merged_as_well() {
    let sandbox = Sandbox::new();
    sandbox.run(&format!("my-adapter {SHORT} -o one"));
    sandbox.run(&format!("my-adapter {SHORT} --merge -o one-merged"));
    sandbox.run(&format!("optimize my-adapter {SHORT}"));
    let file = "my-adapter.perturbation.safetensors";
    let perturbation = Perturbation::open(&sandbox.path(file)).unwrap();
    assert_eq!(perturbation.record().space, Space::Adapter);
    assert_eq!(perturbation.record().parameters["targets"], "all");
    sandbox.run(&format!("apply my-adapter --perturbation {file} -o two"));
    sandbox.run(&format!("my-adapter --perturbation {file} -o three"));
    sandbox.run(&format!(
        "apply my-adapter --perturbation {file} --merge -o two-merged"
    ));
    sandbox.run(&format!(
        "my-adapter --perturbation {file} --merge -o three-merged"
    ));
    let weights = |name: &str| fs::read(sandbox.path(name)).unwrap();
    // Compact forms are of A and B as of any matrices.
    for form in ["--as-lora 2", "--sparse 0.9"] {
        sandbox.run(&format!(
            "optimize my-adapter {SHORT} {form} -o c.safetensors --force"
        ));
        sandbox.run("apply my-adapter --perturbation c.safetensors --merge -o compact --force");
        sandbox.run("inspect c.safetensors");
    }
    assert!(weights("one/adapter_model.safetensors") == weights("two/adapter_model.safetensors"));
    assert!(weights("one-merged/model.safetensors") == weights("two-merged/model.safetensors"));
    assert_eq!(sandbox.files("two"), sandbox.files("three"));
    assert_eq!(sandbox.files("two-merged"), sandbox.files("three-merged"));
    // The tensors of the merged model are those of the base, in its order and types.
    let header = |name: &str| {
        let bytes = weights(name);
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap());
        bytes[8..][..usize::try_from(length).unwrap()].to_vec()
    };
    assert!(header("one-merged/model.safetensors") == header("my-finetune/model.safetensors"));
}

#[test]
fn a_sharded_base_is_merged_as_one_file_is() {
    let sandbox = Sandbox::new();
    sandbox.run("my-adapter --method random --rho 1 --merge -o whole");
    sandbox.run("my-adapter --base sharded --method random --rho 1 --merge -o parts");
    sandbox.run("my-adapter --base my-finetune/model.safetensors --method random --rho 1 --merge");
    let whole = fs::read(sandbox.path("whole/model.safetensors")).unwrap();
    assert!(whole == fs::read(sandbox.path("my-adapter-panacea.safetensors")).unwrap());
    let whole = SafeTensors::deserialize(&whole).unwrap();
    let mut seen = 0;
    for part in 1..=2 {
        let name = format!("parts/model-{part:05}-of-00002.safetensors");
        let bytes = fs::read(sandbox.path(&name)).unwrap();
        let shard = SafeTensors::deserialize(&bytes).unwrap();
        for (name, tensor) in shard.iter() {
            assert_eq!(tensor.data(), whole.tensor(name).unwrap().data(), "{name}");
            seen += 1;
        }
    }
    assert_eq!(seen, whole.len());
}

#[test]
fn two_runs_on_any_number_of_threads_and_a_resumed_one_give_the_same_files() {
    let sandbox = Sandbox::new();
    for (name, threads) in [("one", 1), ("two", 2), ("five", 5)] {
        sandbox.run(&format!("my-adapter {SHORT} -o {name} --threads {threads}"));
        sandbox.run(&format!(
            "my-adapter {SHORT} --merge -o {name}-merged --threads {threads}"
        ));
    }
    for name in ["two", "five"] {
        assert_eq!(sandbox.files("one"), sandbox.files(name));
        assert_eq!(
            sandbox.files("one-merged"),
            sandbox.files(&format!("{name}-merged"))
        );
    }
    // Stopped where its output has no room to go, with every step saved.
    let flags = format!("my-adapter {SHORT} -o resumed --state-every 1");
    let arguments: Vec<&str> = flags.split_whitespace().collect();
    let mut child = sandbox.program(&arguments).spawn().unwrap();
    let state = sandbox.path(".resumed.panacea-state");
    while !state.exists() && child.try_wait().unwrap().is_none() {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(
        state.exists(),
        "the run was over before it could be stopped"
    );
    // A state of another base is refused.
    let (code, output) = sandbox.shell(&format!("panacea-patch {flags} --resume --base sharded"));
    assert_eq!(code, 3, "{output}");
    assert!(output.contains("base file model.safetensors"), "{output}");
    sandbox.run(&format!("{flags} --resume"));
    assert_eq!(sandbox.files("one"), sandbox.files("resumed"));
}

/// What `optimize --peft` writes is read, and merging it is applying the perturbation.
#[test]
fn a_perturbation_written_as_an_adapter_is_one() {
    let sandbox = Sandbox::new();
    sandbox.run(
        "optimize my-finetune --method random --rho 1 --as-lora 2 --peft made -o p.safetensors",
    );
    sandbox.run("apply my-finetune --perturbation p.safetensors -o applied");
    sandbox.run("made --method random --rho 1 --strength 0 --merge -o merged");
    let weights = |name: &str| fs::read(sandbox.path(name).join("model.safetensors")).unwrap();
    assert!(weights("applied") == weights("merged"));
}

#[test]
fn a_manifest_names_adapter_and_base_by_role() {
    let sandbox = Sandbox::new();
    sandbox.run("my-adapter --method panacea --harmful h.jsonl -o patched");
    sandbox.run("my-adapter --method panacea --harmful h.jsonl --merge -o merged");
    for (name, merge) in [("patched", false), ("merged", true)] {
        let text = fs::read_to_string(sandbox.path(name).join("panacea.manifest.json")).unwrap();
        let manifest: Value = serde_json::from_str(&text).unwrap();
        let definition = &manifest["predicate"]["buildDefinition"];
        assert_eq!(
            definition["externalParameters"]["merge"].as_bool(),
            merge.then_some(true)
        );
        assert_eq!(definition["externalParameters"]["weight_decay"], 0.1);
        let of_role = |role: &str| -> Vec<(String, String)> {
            let dependencies = definition["resolvedDependencies"].as_array().unwrap();
            let of_role = dependencies
                .iter()
                .filter(|it| it["annotations"]["role"] == role);
            let text = |value: &Value| value.as_str().unwrap().to_owned();
            of_role
                .map(|it| (text(&it["name"]), text(&it["digest"]["sha256"])))
                .collect()
        };
        let digest = |path: &str| {
            let bytes = fs::read(sandbox.path(path)).unwrap();
            panacea_formats::Sha256::of(&bytes).to_string()
        };
        for (role, folder, file) in [
            ("checkpoint", "my-adapter", "adapter_model.safetensors"),
            ("checkpoint", "my-adapter", "adapter_config.json"),
            ("base", "my-finetune", "model.safetensors"),
            ("base", "my-finetune", "config.json"),
            ("base", "my-finetune", "tokenizer.json"),
        ] {
            let wanted = (file.to_owned(), digest(&format!("{folder}/{file}")));
            assert!(of_role(role).contains(&wanted), "{name}: {role} {file}");
        }
        assert_eq!(of_role("checkpoint").len(), 2, "{name}");
    }
}

#[test]
fn the_tokenizer_of_the_adapter_goes_before_the_bases() {
    let sandbox = Sandbox::new();
    let run = |name: &str| {
        sandbox.run(&format!(
            "my-adapter --method panacea --harmful h.jsonl -o {name}"
        ));
        fs::read(sandbox.path(name).join("adapter_model.safetensors")).unwrap()
    };
    let plain = run("plain");
    // The same vocabulary without the chat template: rows are rendered in Alpaca's way.
    let tokenizer = sandbox.path("my-finetune/tokenizer.json");
    fs::copy(tokenizer, sandbox.path("my-adapter/tokenizer.json")).unwrap();
    let config = fs::read_to_string(sandbox.path("my-finetune/tokenizer_config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    config.as_object_mut().unwrap().remove("chat_template");
    fs::write(
        sandbox.path("my-adapter/tokenizer_config.json"),
        config.to_string(),
    )
    .unwrap();
    assert!(plain != run("own"));
    assert!(sandbox.path("own/tokenizer.json").exists());
    let (code, output) = sandbox.shell(
        "panacea-patch my-adapter --method panacea --harmful h.jsonl --template alpaca --merge -o merged",
    );
    assert_eq!(code, 0, "{output}");
    assert!(output.contains("tokenizer of the adapter"), "{output}");
}

#[test]
fn the_base_is_found_in_the_cache_of_the_hub() {
    let sandbox = Sandbox::new();
    let config = sandbox.path("my-adapter/adapter_config.json");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text.replace("\"my-finetune\"", "\"org/name\"")).unwrap();
    let flags = "panacea-patch my-adapter --method random --rho 1 --merge --force";
    let (code, output) = sandbox.shell(flags);
    assert_eq!(code, 3, "{output}");
    assert!(
        output.contains("models--org--name/snapshots/main"),
        "{output}"
    );
    let repository = Path::new("cache/models--org--name");
    let folder = sandbox.path("").join(repository);
    fs::create_dir_all(folder.join("refs")).unwrap();
    fs::create_dir_all(folder.join("snapshots")).unwrap();
    fs::write(folder.join("refs/main"), "0123abc").unwrap();
    fs::rename(
        sandbox.path("my-finetune"),
        folder.join("snapshots/0123abc"),
    )
    .unwrap();
    for environment in [
        "HF_HUB_CACHE=cache",
        "HF_HOME=. && mv cache hub && export HF_HOME",
        "HF_HOME= && mkdir -p .cache/huggingface && mv hub .cache/huggingface/hub",
    ] {
        let (code, output) = sandbox.shell(&format!("export {environment}\n{flags}"));
        assert_eq!(code, 0, "{environment}: {output}");
    }
}

#[test]
fn what_has_no_effect_or_does_not_fit_is_refused() {
    let sandbox = Sandbox::new();
    sandbox.run("optimize my-adapter --method random --rho 1 -o a.safetensors");
    sandbox.run("optimize my-finetune --method random --rho 1 -o w.safetensors");
    let edited = |name: &str, from: &str, to: &str| {
        let folder = sandbox.path(name);
        fs::create_dir(&folder).unwrap();
        for (file, bytes) in sandbox.files("my-adapter") {
            fs::write(folder.join(file), bytes).unwrap();
        }
        let config = folder.join("adapter_config.json");
        let text = fs::read_to_string(&config).unwrap();
        assert!(text.contains(from), "{from}");
        fs::write(&config, text.replace(from, to)).unwrap();
    };
    edited("dora", "\"use_dora\": false", "\"use_dora\": true");
    edited("ranked", "\"r\": 8", "\"r\": 4");
    edited("lost", "\"my-finetune\"", "\"elsewhere\"");
    for (flags, code, said) in [
        (
            "my-finetune --base my-finetune",
            2,
            "`--base` has no effect here",
        ),
        ("my-finetune --merge", 2, "`--merge` has no effect here"),
        (
            "my-adapter --base my-finetune --method random --rho 1",
            2,
            "`--base` has no effect here",
        ),
        (
            "apply my-adapter --perturbation a.safetensors --base my-finetune",
            2,
            "`--base` has no effect here",
        ),
        (
            "apply my-adapter --perturbation w.safetensors",
            3,
            "is for the weights of a whole model, and this is a LoRA adapter",
        ),
        (
            "apply my-finetune --perturbation a.safetensors",
            3,
            "is for a LoRA adapter, and this is the weights of a whole model",
        ),
        (
            "apply my-finetune --perturbation a.safetensors --dry-run",
            3,
            "is for a LoRA adapter",
        ),
        ("my-adapter --base my-adapter", 3, "is an adapter itself"),
        (
            "my-adapter --base my-finetune --merge -o my-finetune/out",
            3,
            "my-finetune",
        ),
        ("my-adapter --targets mlp", 3, "mlp"),
        (
            "my-adapter --targets mlp --method random --rho 1",
            3,
            "none of 12 adapted modules",
        ),
        (
            "my-adapter/adapter_model.safetensors",
            3,
            "without its config",
        ),
        ("dora", 3, "`use_dora` of the config is true"),
        (
            "dora --method random --rho 1",
            3,
            "`use_dora` of the config is true",
        ),
        ("ranked", 3, "is stored with rank 8, and the config says 4"),
        ("lost", 3, "was not found"),
        (
            "optimize my-adapter --as-lora 2 --peft made",
            2,
            "`--peft` has no effect on a LoRA adapter",
        ),
        (
            "my-adapter --weight-decay 1",
            2,
            "`--weight-decay` has no effect",
        ),
    ] {
        let (found, output) = sandbox.shell(&format!("panacea-patch {flags}"));
        assert_eq!(found, code, "{flags}: {output}");
        assert!(output.contains(said), "{flags}: {output}");
    }
    let (code, output) = sandbox.shell("panacea-patch inspect dora");
    assert_eq!(code, 0, "{output}");
    assert!(output.contains("use_dora"), "{output}");
    assert_eq!(sandbox.leavings(), Vec::<String>::new());
}

#[test]
fn a_dry_run_of_an_adapter_counts_its_base_and_writes_nothing() {
    let sandbox = Sandbox::new();
    let before = fs::read_dir(sandbox.path("")).unwrap().count();
    for flags in [
        format!("my-adapter {SHORT} --dry-run --json"),
        format!("my-adapter {SHORT} --merge --dry-run --json"),
        format!("optimize my-adapter {SHORT} --dry-run --json"),
    ] {
        let arguments: Vec<&str> = flags.split_whitespace().collect();
        let output = sandbox.program(&arguments).output().unwrap();
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        let plan = &report["plan"];
        let reads = |name: &str| {
            plan["reads"]
                .as_array()
                .unwrap()
                .iter()
                .any(|it| it["name"] == name)
        };
        for name in [
            "adapter_model.safetensors",
            "adapter_config.json",
            "model.safetensors",
            "config.json",
            "tokenizer.json",
        ] {
            assert!(reads(name), "{name}: {plan}");
        }
        assert_eq!(plan["targets"], 24);
        assert_eq!(plan["target_elements"], 14_336);
        assert!(plan["operations"].as_f64().unwrap() > 1e8);
        let writes_model = plan["writes"].to_string().contains("/model.safetensors");
        assert_eq!(writes_model, flags.contains("--merge"), "{plan}");
    }
    assert_eq!(fs::read_dir(sandbox.path("")).unwrap().count(), before);
}
