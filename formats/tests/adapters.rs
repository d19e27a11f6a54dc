//! PEFT directories: what is read of sound ones, and why others are refused.

#![expect(clippy::unwrap_used, reason = "a test may fail loudly")]

use std::fs;
use std::path::{Path, PathBuf};

use panacea_formats::{
    Adapter, AdapterBaseProblem, AdapterConfig, Checkpoint, FormatError, Layout, LeftOut,
};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

const CONFIG: &str = r#"{"peft_type":"LORA","r":2,"lora_alpha":4,"target_modules":["q","v"]}"#;
const A: &str = "base_model.model.m.0.q.lora_A.weight";
const B: &str = "base_model.model.m.0.q.lora_B.weight";

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../testdata")
        .join(name)
}

/// A tensor: its name, type and shape.
type Stored<'a> = (&'a str, Dtype, &'a [usize]);

/// Writes an adapter of `tensors`: names, types, shapes.
fn write(directory: &Path, config: &str, tensors: &[Stored<'_>]) {
    fs::write(directory.join("adapter_config.json"), config).unwrap();
    let zeros = vec![0_u8; 4096];
    let views = tensors.iter().map(|(name, dtype, shape)| {
        let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
        let view = TensorView::new(*dtype, shape.to_vec(), &zeros[..bytes]).unwrap();
        (*name, view)
    });
    safetensors::serialize_to_file(views, None, &directory.join("adapter_model.safetensors"))
        .unwrap();
}

/// The whole reason for which the adapter is refused; nothing when it is sound.
fn refusal(config: &str, tensors: &[Stored<'_>]) -> Option<String> {
    let directory = tempfile::tempdir().unwrap();
    write(directory.path(), config, tensors);
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let opened = AdapterConfig::read(&checkpoint)
        .and_then(|config| Adapter::of(&checkpoint, &config).map(drop));
    opened.err().map(|error| reason(&error))
}

fn reason(error: &FormatError) -> String {
    let mut reason = error.kind.to_string();
    let mut source = std::error::Error::source(&error.kind);
    while let Some(cause) = source {
        reason.push_str(": ");
        reason.push_str(&cause.to_string());
        source = cause.source();
    }
    reason
}

#[test]
fn adapters_that_peft_saved_are_read_with_their_bases() {
    for (case, base, modules, saved) in [
        ("peft/patterns/adapter", "oracle/llama-tied", 12, &[][..]),
        (
            "peft/rank-stabilized/adapter",
            "oracle/llama3-rope",
            10,
            &[],
        ),
        ("peft/one-layer/adapter", "oracle/llama-tied", 3, &[]),
        (
            "peft/saved-head/adapter",
            "oracle/llama3-rope",
            4,
            &["lm_head.weight"],
        ),
        ("peft/tiny-chat", "tiny-chat", 12, &[]),
    ] {
        let checkpoint = Checkpoint::open(&fixture(case)).unwrap();
        assert_eq!(checkpoint.layout(), Layout::Adapter);
        let config = AdapterConfig::read(&checkpoint).unwrap();
        let adapter = Adapter::of(&checkpoint, &config).unwrap();
        assert_eq!(adapter.modules().len(), modules, "{case}");
        let names: Vec<&str> = adapter.saved().iter().map(|saved| saved.name).collect();
        assert_eq!(names, saved, "{case}");
        for module in adapter.modules() {
            assert_eq!(module.a.shape[0], module.rank);
            assert_eq!(
                module.a.name,
                format!("base_model.model.{}.lora_A.weight", module.path)
            );
            assert_eq!(
                module.b.name,
                format!("base_model.model.{}.lora_B.weight", module.path)
            );
        }
        adapter
            .check_base(&Checkpoint::open(&fixture(base)).unwrap(), false)
            .unwrap();
        let other = match base {
            "oracle/llama-tied" => "oracle/llama3-rope",
            _ => "oracle/llama-tied",
        };
        let problems = adapter
            .check_base(&Checkpoint::open(&fixture(other)).unwrap(), false)
            .unwrap_err();
        assert!(!problems.all().is_empty(), "{case}");
    }
}

#[test]
fn tensors_that_fit_neither_each_other_nor_the_config_are_refused() {
    use Dtype::{BF16, F16, F32, I32};
    let a: Stored<'_> = (A, F32, &[2, 6]);
    let b: Stored<'_> = (B, F32, &[5, 2]);
    let saved = "base_model.model.head.weight";
    assert_eq!(refusal(CONFIG, &[a, b]), None);
    assert_eq!(
        refusal(CONFIG, &[(A, F16, &[2, 6]), (B, BF16, &[5, 2])]),
        None
    );
    assert_eq!(refusal(CONFIG, &[a, b, (saved, BF16, &[3])]), None);
    let cases: &[(&[Stored<'_>], &str)] = &[
        (&[][..], "it holds no `lora_A` and `lora_B`"),
        (
            &[(saved, F32, &[2, 2])],
            "it holds no `lora_A` and `lora_B`",
        ),
        (&[a], "module `m.0.q` has a lora_A and no lora_B"),
        (&[b], "module `m.0.q` has a lora_B and no lora_A"),
        (&[(A, F32, &[12]), b], "no product B A"),
        (&[a, (B, F32, &[5, 3])], "no product B A"),
        (&[a, (B, F32, &[5, 2, 1])], "no product B A"),
        (&[(A, F32, &[2, 0]), b], "no product B A"),
        (&[(A, F32, &[0, 6]), (B, F32, &[5, 0])], "no product B A"),
        (
            &[(A, F32, &[3, 6]), (B, F32, &[5, 3])],
            "stored with rank 3, and the config says 2",
        ),
        (
            &[(A, I32, &[2, 6]), b],
            "is I32, and an adapter is F32, F16 or BF16",
        ),
        (
            &[a, b, (saved, I32, &[3])],
            "is I32, and an adapter is F32, F16 or BF16",
        ),
        (
            &[a, b, ("base_model.model.m.0.q.weight", F32, &[5, 6])],
            "module `m.0.q` is adapted and saved whole",
        ),
        (
            &[a, b, ("model.q.lora_A.weight", F32, &[2, 6])],
            "no part of a LoRA adapter",
        ),
        (
            &[
                a,
                b,
                ("base_model.model.q.lora_A.default.weight", F32, &[2, 6]),
            ],
            "no part of a LoRA adapter",
        ),
        (
            &[a, b, ("base_model.model.q.lora_B.bias", F32, &[2])],
            "no part of a LoRA adapter",
        ),
        (
            &[a, b, ("base_model.model.q.base_layer.weight", F32, &[2, 6])],
            "no part of a LoRA adapter",
        ),
        (
            &[a, b, ("base_model.model..lora_A.weight", F32, &[2, 6])],
            "no part of a LoRA adapter",
        ),
        (
            &[a, b, ("base_model.model.a..q.weight", F32, &[2])],
            "no part of a LoRA adapter",
        ),
        (
            &[a, b, ("base_model.model.weight", F32, &[2])],
            "no part of a LoRA adapter",
        ),
        (
            &[a, b, ("base_model.model.e.lora_embedding_A", F32, &[2, 6])],
            "is of an adapted embedding",
        ),
        (
            &[
                a,
                b,
                ("base_model.model.m.0.q.lora_magnitude_vector", F32, &[5]),
            ],
            "is of DoRA",
        ),
        (
            &[
                a,
                b,
                ("base_model.model.k.lora_A.weight", F32, &[2, 6]),
                ("base_model.model.k.lora_B.weight", F32, &[5, 2]),
            ],
            "module `k` is adapted, and `target_modules` does not select it",
        ),
    ];
    for (tensors, wanted) in cases {
        let found = refusal(CONFIG, tensors).unwrap_or_default();
        assert!(found.contains(wanted), "{tensors:?}: {found}");
    }
    let saves = CONFIG.replace('}', r#","modules_to_save":["head"]}"#);
    assert_eq!(refusal(&saves, &[a, b, (saved, F32, &[3])]), None);
    let found = refusal(&saves, &[a, b]).unwrap();
    assert_eq!(
        found,
        "`modules_to_save` names `head`, and no tensor of it is there"
    );
    let huge = CONFIG.replace("\"lora_alpha\":4", "\"lora_alpha\":1e39");
    assert_eq!(
        refusal(&huge, &[a, b]).unwrap(),
        "the scale of module `m.0.q` is not finite"
    );
}

#[test]
fn a_changed_half_of_a_tied_pair_is_refused_by_name() {
    let checkpoint = Checkpoint::open(&fixture("peft/saved-head/adapter")).unwrap();
    let config = AdapterConfig::read(&checkpoint).unwrap();
    let adapter = Adapter::of(&checkpoint, &config).unwrap();
    let base = Checkpoint::open(&fixture("oracle/llama3-rope")).unwrap();
    let problems = adapter.check_base(&base, true).unwrap_err();
    assert_eq!(
        problems.all(),
        [AdapterBaseProblem::Tied {
            tensor: "lm_head.weight".to_owned()
        }]
    );
}

#[test]
fn half_an_adapter_and_one_beside_a_whole_model_are_refused_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let opened = || reason(&Checkpoint::open(path).unwrap_err());
    fs::write(path.join("adapter_config.json"), CONFIG).unwrap();
    assert_eq!(
        opened(),
        "it is a PEFT directory without `adapter_model.safetensors`"
    );
    fs::write(path.join("adapter_model.bin"), "pickled").unwrap();
    assert_eq!(
        opened(),
        "it is a PEFT directory without `adapter_model.safetensors`; `adapter_model.bin` is not read"
    );
    write(path, CONFIG, &[(A, Dtype::F32, &[2, 6])]);
    fs::remove_file(path.join("adapter_config.json")).unwrap();
    assert_eq!(
        opened(),
        "it is a PEFT directory without `adapter_config.json`; `adapter_model.bin` is not read"
    );
    fs::write(path.join("adapter_config.json"), CONFIG).unwrap();
    assert!(Checkpoint::open(path).is_ok());
    fs::copy(
        path.join("adapter_model.safetensors"),
        path.join("model.safetensors"),
    )
    .unwrap();
    assert_eq!(
        opened(),
        "it holds an adapter beside `model.safetensors`, and either could be meant"
    );
}

#[test]
fn a_config_that_is_no_text_or_too_long_is_refused() {
    let tensors: [Stored<'_>; 2] = [(A, Dtype::F32, &[2, 6]), (B, Dtype::F32, &[5, 2])];
    let spaces = |count| format!("{CONFIG}{}", " ".repeat(count - CONFIG.len()));
    let limit = usize::try_from(panacea_formats::MAX_ADAPTER_CONFIG_BYTES).unwrap();
    assert_eq!(refusal(&spaces(limit), &tensors), None);
    let found = refusal(&spaces(limit + 1), &tensors).unwrap();
    assert!(found.contains("above the limit"), "{found}");
    assert!(refusal("\u{feff}{}", &tensors).is_some());
}

#[test]
fn what_lies_beside_an_adapter_travels_with_it_and_other_weights_do_not() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    write(
        path,
        CONFIG,
        &[(A, Dtype::F32, &[2, 6]), (B, Dtype::F32, &[5, 2])],
    );
    for name in [
        "README.md",
        "tokenizer.json",
        "training_args.bin",
        "adapter_model.bin",
    ] {
        fs::write(path.join(name), name).unwrap();
    }
    let files = Checkpoint::open(path).unwrap().side_files().unwrap();
    let copied: Vec<&str> = files.copied.iter().map(|file| file.name.as_str()).collect();
    assert_eq!(
        copied,
        ["README.md", "adapter_config.json", "tokenizer.json"]
    );
    let left_out: Vec<(&str, LeftOut)> = files
        .left_out
        .iter()
        .map(|(name, why)| (name.as_str(), *why))
        .collect();
    assert_eq!(
        left_out,
        [
            ("adapter_model.bin", LeftOut::Weights),
            ("training_args.bin", LeftOut::TrainingState)
        ]
    );
}

#[test]
fn a_config_with_any_byte_changed_or_cut_is_read_or_refused_and_never_a_panic() {
    let whole = fs::read_to_string(fixture("peft/patterns/adapter/adapter_config.json")).unwrap();
    let mut read = 0;
    let mut try_text = |text: &str| {
        let Ok(config) = AdapterConfig::parse(text) else {
            return;
        };
        read += 1;
        for module in ["model.layers.1.self_attn.q_proj", "", "."] {
            let _ = (
                config.rank_of(module),
                config.scale_of(module),
                config.selects(module),
            );
        }
    };
    for place in (0..whole.len()).step_by(3) {
        try_text(&whole[..place]);
        for other in ["", "\"", "\\", "(", "*", "0", "-", "}", "[", "\u{fffd}"] {
            try_text(&format!(
                "{}{other}{}",
                &whole[..place],
                &whole[place + 1..]
            ));
        }
    }
    // Both outcomes must occur, or the changes test one side only.
    assert!((1000..10_000).contains(&read), "{read} of some 13000 read");
}
