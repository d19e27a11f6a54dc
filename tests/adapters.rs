//! LoRA adapters against PEFT and PyTorch, on the tiny adapters of `testdata/peft` (`testdata/gen/adapters.py`): logits, losses
//! and gradients with respect to A and B, whole runs of the paper's method on them, and merging.
//!
//! Tolerances are those of the whole models' tests, for the same reasons.

#![expect(clippy::unwrap_used, reason = "a test may fail loudly")]
#![expect(clippy::cast_precision_loss, reason = "counts of a few tokens")]

use std::fs;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use panacea_formats::{
    Adapter, AdapterBaseProblem, AdapterConfig, Checkpoint, DeltaTensor, Destination, OutputDir,
    Overwrite, Perturbation, PerturbationRecord, Space, describe_base, write_perturbation,
};
use panacea_patch::apply::{
    Applied, ApplyError, ApplySettings, Merge, MergeError, Rounding, Strength, Wanted, apply, merge,
};
use panacea_patch::model::{AdapterModule, Config, Decoder, Pack, TargetSelection, TargetTensors};
use panacea_patch::optimize::{
    Panacea, Part, Radius, Rows, Settings, Unobserved, gaussian, optimize,
};
use safetensors::SafeTensors;

mod common;
use common::{Stored, oracle, relative_error};

const CASES: [&str; 4] = ["patterns", "rank-stabilized", "one-layer", "saved-head"];

/// Largest relative error allowed, for losses and for each tensor in the Euclidean norm.
const TOLERANCE: f64 = 1e-4;

/// One of the fixtures, open.
struct Case {
    checkpoint: Checkpoint,
    config: AdapterConfig,
    base: Checkpoint,
}

impl Case {
    fn open(name: &'static str) -> Self {
        let checkpoint = Checkpoint::open(&fixture(name).join("adapter")).unwrap();
        let config = AdapterConfig::read(&checkpoint).unwrap();
        let base = config.base_model_name_or_path.as_deref().unwrap();
        Self {
            base: Checkpoint::open(&checkpoint.path().join(base)).unwrap(),
            checkpoint,
            config,
        }
    }

    fn adapter(&self) -> Adapter<'_> {
        Adapter::of(&self.checkpoint, &self.config).unwrap()
    }

    fn decoder(&self, selection: Option<&str>) -> Decoder<'_> {
        let text = fs::read_to_string(self.base.path().join("config.json")).unwrap();
        let adapter = self.adapter();
        let modules = adapter
            .modules()
            .iter()
            .map(|module| AdapterModule {
                path: module.path.to_owned(),
                a: module.a,
                b: module.b,
                scale: module.scale,
            })
            .collect();
        let selection: Option<TargetSelection> = selection.map(|it| it.parse().unwrap());
        let tensors = adapter.base_tensors(&self.base);
        let config = Config::parse(&text).unwrap();
        Decoder::with_adapter(config, tensors, modules, selection.as_ref()).unwrap()
    }

    /// Noise for every A and B, as a file's deltas are: names, shapes, values.
    fn noise(&self, rho: f64) -> Vec<(String, Vec<usize>, Vec<f32>)> {
        let adapter = self.adapter();
        let tensors: Vec<_> = adapter
            .modules()
            .iter()
            .flat_map(|it| [it.a, it.b])
            .collect();
        let sizes: Vec<usize> = tensors.iter().map(|it| it.elements()).collect();
        let noise = gaussian(&sizes, 7, rho);
        tensors
            .iter()
            .zip(noise.iter())
            .map(|(it, values)| (it.name.to_owned(), it.shape.to_vec(), values.to_vec()))
            .collect()
    }
}

fn fixture(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("testdata/peft")
        .join(case)
}

fn wanted(noise: &[(String, Vec<usize>, Vec<f32>)]) -> Wanted<'_> {
    let deltas = noise
        .iter()
        .map(|(name, shape, values)| DeltaTensor::new(name, shape, values).unwrap())
        .collect();
    Wanted::in_memory(deltas).unwrap()
}

fn at_strength(strength: f64) -> ApplySettings {
    ApplySettings {
        strength: Strength::new(strength).unwrap(),
        ..ApplySettings::default()
    }
}

/// Merges into `target`.
fn merged(
    case: &Case,
    base: &Checkpoint,
    wanted: &Wanted<'_>,
    settings: ApplySettings,
    target: &Path,
) -> Result<Applied, MergeError> {
    let adapter = case.adapter();
    let inputs = Merge {
        base,
        tie_word_embeddings: false,
        checkpoint: &case.checkpoint,
        adapter: &adapter,
    };
    let mut output = OutputDir::create(target, Overwrite::Never, &[]).unwrap();
    let applied = merge(
        inputs,
        wanted,
        settings,
        Destination::Directory(&mut output),
        &(),
    )?;
    let _ = output.commit().unwrap();
    Ok(applied)
}

#[test]
fn logits_losses_and_gradients_of_a_and_b_agree_with_pytorch() {
    for name in CASES {
        let case = Case::open(name);
        let expected = Stored::open(&fixture(name).join("expected.safetensors"));
        let facts = common::json(&fixture(name).join("expected.json"));
        let rows = common::rows(&fixture(name).join("rows.json"));
        let mut decoder = case.decoder(None);
        let values = decoder.target_values().unwrap();
        let pack = Pack::of(&rows);
        let logits = decoder.logits(&values, &pack).unwrap();
        let error = relative_error(&logits, &expected.floats("logits"));
        assert!(error < TOLERANCE, "{name}: logits are off by {error:e}");

        let mut gradient = values.zeros_like();
        let loss = decoder
            .loss_and_gradient(&values, &pack, &mut gradient)
            .unwrap();
        assert_eq!(loss.count as u64, facts["predicted"].as_u64().unwrap());
        let wanted = facts["loss"].as_f64().unwrap();
        assert!(
            (loss.mean() / wanted - 1.0).abs() < TOLERANCE,
            "{name}: {} for {wanted}",
            loss.mean()
        );

        gradient.scale(1.0 / loss.count as f32);
        assert_eq!(decoder.targets().len(), 2 * case.adapter().modules().len());
        judge_gradients(name, &decoder, &gradient, &expected);
    }
}

/// Holds the gradient of each target against PyTorch's.
fn judge_gradients(name: &str, decoder: &Decoder<'_>, gradient: &TargetTensors, expected: &Stored) {
    for (target, found) in decoder.targets().iter().zip(gradient.iter()) {
        let wanted = expected.floats(&format!("grad.{}", target.name));
        let error = relative_error(found, &wanted);
        assert!(
            error < TOLERANCE,
            "{name}: {} is off by {error:e}",
            target.name
        );
    }
}

#[test]
fn targets_are_a_before_b_and_modules_in_the_decoders_order() {
    let case = Case::open("rank-stabilized");
    let names = |selection| -> Vec<String> {
        let decoder = case.decoder(selection);
        let names = decoder.targets().iter().map(|target| target.name.clone());
        names.collect()
    };
    let mut wanted = Vec::new();
    for block in 0..2 {
        for module in [
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.up_proj",
        ] {
            for half in ["A", "B"] {
                wanted.push(format!(
                    "base_model.model.model.layers.{block}.{module}.lora_{half}.weight"
                ));
            }
        }
    }
    assert_eq!(names(None), wanted);
    wanted.retain(|name| name.contains("k_proj"));
    assert_eq!(names(Some("k_proj")), wanted);
}

/// Adapted modules that are no targets still compute with their A and B.
#[test]
fn fewer_targets_give_the_same_gradients_for_those_that_remain() {
    for name in CASES {
        let case = Case::open(name);
        let expected = Stored::open(&fixture(name).join("expected.safetensors"));
        let rows = common::rows(&fixture(name).join("rows.json"));
        let mut decoder = case.decoder(Some("q_proj"));
        let values = decoder.target_values().unwrap();
        let mut gradient = values.zeros_like();
        let loss = decoder
            .loss_and_gradient(&values, &Pack::of(&rows), &mut gradient)
            .unwrap();
        gradient.scale(1.0 / loss.count as f32);
        judge_gradients(name, &decoder, &gradient, &expected);
    }
}

#[test]
fn the_papers_method_with_weight_decay_follows_pytorch_step_by_step() {
    for name in CASES {
        let case = Case::open(name);
        let facts = common::json(&fixture(name).join("run.json"));
        let expected = Stored::open(&fixture(name).join("run.safetensors"));
        let number = |key: &str| facts["settings"][key].as_f64().unwrap();
        let rows = Rows {
            harmful: common::rows(&oracle("optimizer/harmful.json")),
            task: common::rows(&oracle("optimizer/task.json")),
            ..Rows::default()
        };
        for (part, prefix) in [(Part::Eps, "eps"), (Part::Drift, "drift")] {
            let settings = Settings::Panacea(Panacea {
                rho: Radius::fixed(number("rho")).unwrap(),
                lambda: number("lambda"),
                lr: number("lr"),
                weight_decay: number("weight_decay"),
                steps: 2,
                batch: 2,
                part,
                ..Panacea::default()
            });
            let mut decoder = case.decoder(None);
            let outcome = optimize(&mut decoder, &rows, &settings, None, &mut Unobserved).unwrap();
            let close = |what: &str, found: f64, wanted: f64| {
                assert!(
                    (found / wanted - 1.0).abs() < TOLERANCE,
                    "{name} {what}: {found} for {wanted}"
                );
            };
            let steps = facts["steps"].as_array().unwrap();
            assert_eq!(outcome.steps.len(), steps.len());
            for (found, wanted) in outcome.steps.iter().zip(steps) {
                for (key, found) in [
                    ("g", found.g),
                    ("h", found.h),
                    ("h_eps", found.h_eps),
                    ("grad_h", found.grad_h),
                    ("clip", found.clip),
                ] {
                    close(key, found.unwrap(), wanted[key].as_f64().unwrap());
                }
            }
            for (key, found) in &outcome.results {
                if let Some(wanted) = facts[*key].as_f64() {
                    close(key, *found, wanted);
                }
            }
            for (target, found) in decoder.targets().iter().zip(outcome.delta.iter()) {
                let wanted = expected.floats(&format!("{prefix}.{}", target.name));
                let error = relative_error(found, &wanted);
                assert!(
                    error < 1e-3,
                    "{name} {prefix} {}: off by {error:e}",
                    target.name
                );
            }
        }
    }
}

#[test]
fn a_merged_base_is_what_peft_makes_of_it() {
    for name in CASES {
        let case = Case::open(name);
        let root = tempfile::tempdir().unwrap();
        let noise = case.noise(1.0);
        // Without strength, what is merged is the adapter as it was saved.
        let out = root.path().join("out");
        merged(&case, &case.base, &wanted(&noise), at_strength(0.0), &out).unwrap();
        let theirs = Stored::open(&fixture(name).join("merged-f32.safetensors"));
        let ours = Stored::open(&out.join("model.safetensors"));
        let before = Stored::open(&case.base.path().join("model.safetensors"));
        for tensor in before.views() {
            let found = ours.floats(tensor.name);
            match theirs.views().any(|it| it.name == tensor.name) {
                true => {
                    let error = relative_error(&found, &theirs.floats(tensor.name));
                    assert!(error < 3e-7, "{name}: {} is off by {error:e}", tensor.name);
                }
                false => assert_eq!(found, before.floats(tensor.name), "{name}: {}", tensor.name),
            }
        }
        for file in ["config.json", "rows.json"] {
            let (ours, theirs) = (out.join(file), case.base.path().join(file));
            assert_eq!(fs::read(ours).unwrap(), fs::read(theirs).unwrap());
        }
    }
}

#[test]
fn a_base_in_bf16_is_merged_within_one_rounding_of_peft() {
    for name in CASES {
        let case = Case::open(name);
        let root = tempfile::tempdir().unwrap();
        let base = narrowed(
            &case.base,
            &root.path().join("base"),
            safetensors::Dtype::BF16,
        );
        let noise = case.noise(1.0);
        let out = root.path().join("out");
        // PEFT rounds to nearest.
        let settings = ApplySettings {
            rounding: Rounding::Nearest,
            ..at_strength(0.0)
        };
        merged(&case, &base, &wanted(&noise), settings, &out).unwrap();
        let ours = fs::read(out.join("model.safetensors")).unwrap();
        let ours = SafeTensors::deserialize(&ours).unwrap();
        let theirs = fs::read(fixture(name).join("merged-bf16.safetensors")).unwrap();
        let theirs = SafeTensors::deserialize(&theirs).unwrap();
        let (mut elements, mut differing) = (0, 0);
        for (tensor, wanted) in theirs.iter() {
            let found = ours.tensor(tensor).unwrap();
            for (found, wanted) in ordered(found.data()).zip(ordered(wanted.data())) {
                assert!(
                    (found - wanted).abs() <= 1,
                    "{name}: {tensor}: {found} for {wanted}"
                );
                elements += 1;
                differing += usize::from(found != wanted);
            }
        }
        // Ties that two orders of summation break in two ways.
        assert!(
            differing * 1000 <= elements,
            "{name}: {differing} of {elements}"
        );
    }
}

#[test]
fn merging_a_patched_adapter_is_merging_the_adapter_with_the_patch() {
    for name in CASES {
        let case = Case::open(name);
        let root = tempfile::tempdir().unwrap();
        let noise = case.noise(0.5);
        let patched = root.path().join("patched");
        let mut output = OutputDir::create(&patched, Overwrite::Never, &[]).unwrap();
        let destination = Destination::Directory(&mut output);
        let settings = at_strength(0.75);
        let applied = apply(
            &case.checkpoint,
            &wanted(&noise),
            settings,
            destination,
            &(),
        )
        .unwrap();
        let _ = output.commit().unwrap();
        assert_eq!(
            applied.realized.tensors.len(),
            2 * case.adapter().modules().len()
        );

        let (once, twice) = (root.path().join("once"), root.path().join("twice"));
        let at_once = merged(&case, &case.base, &wanted(&noise), settings, &once).unwrap();
        let patched = Case {
            checkpoint: Checkpoint::open(&patched).unwrap(),
            ..Case::open(name)
        };
        merged(
            &patched,
            &case.base,
            &wanted(&noise),
            at_strength(0.0),
            &twice,
        )
        .unwrap();
        let bytes = |path: &Path| fs::read(path.join("model.safetensors")).unwrap();
        assert!(bytes(&once) == bytes(&twice), "{name}");
        // The report is of the perturbation: the difference to a merge without it.
        let plain = root.path().join("plain");
        merged(&case, &case.base, &wanted(&noise), at_strength(0.0), &plain).unwrap();
        let (with, without) = (
            Stored::open(&once.join("model.safetensors")),
            Stored::open(&plain.join("model.safetensors")),
        );
        let mut squared = 0.0;
        for module in case.adapter().modules() {
            let weight = module.weight();
            squared += with
                .floats(&weight)
                .iter()
                .zip(without.floats(&weight))
                .map(|(a, b)| (f64::from(*a) - f64::from(b)).powi(2))
                .sum::<f64>();
        }
        let change = at_once.realized.total;
        assert!(
            (change.realized_norm / squared.sqrt() - 1.0).abs() < 1e-9,
            "{name}"
        );
        assert!(
            (change.wanted_norm / squared.sqrt() - 1.0).abs() < 1e-4,
            "{name}"
        );
        assert!(
            change.cosine.unwrap() > 0.9999 && change.moved > 0,
            "{name}"
        );
        assert_eq!(
            at_once.realized.tensors.len(),
            case.adapter().modules().len()
        );
    }
}

#[test]
fn a_perturbation_for_an_adapter_is_refused_on_weights_and_the_reverse() {
    let case = Case::open("one-layer");
    let root = tempfile::tempdir().unwrap();
    let weight = case.adapter().modules()[0].weight();
    let whole = case.base.tensor(&weight).unwrap();
    let adapted = case.adapter().modules()[0].a;
    for (space, tensor, of, other) in [
        (Space::Adapter, adapted, &case.checkpoint, &case.base),
        (Space::Weights, whole, &case.base, &case.checkpoint),
    ] {
        let path = root.path().join(format!("{space}.safetensors"));
        let record = PerturbationRecord {
            method: "random".to_owned(),
            parameters: serde_json::Map::new(),
            seed: 0,
            space,
            base: describe_base(of, [tensor.name]).unwrap(),
            data: Vec::new(),
            tool: "test".to_owned(),
        };
        let zeros = vec![0.0; tensor.elements()];
        let delta = DeltaTensor::new(tensor.name, tensor.shape, &zeros).unwrap();
        let mut output = panacea_formats::OutputFile::create(&path, Overwrite::Never, &[]).unwrap();
        write_perturbation(&mut output, &record, &[delta]).unwrap();
        let _ = output.commit().unwrap();
        let perturbation = Perturbation::open(&path).unwrap();
        assert_eq!(perturbation.record().space, space);
        let wanted = Wanted::from(&perturbation);
        wanted.check(of).unwrap();
        match wanted.check(other) {
            Err(ApplyError::Space { wanted, found }) => {
                assert_eq!(wanted, space);
                assert_ne!(found, space);
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn what_cannot_be_merged_is_refused_by_name() {
    let case = Case::open("saved-head");
    let adapter = case.adapter();
    let root = tempfile::tempdir().unwrap();
    let noise = case.noise(1.0);
    let mut output = OutputDir::create(&root.path().join("tied"), Overwrite::Never, &[]).unwrap();
    let inputs = Merge {
        base: &case.base,
        tie_word_embeddings: true,
        checkpoint: &case.checkpoint,
        adapter: &adapter,
    };
    let destination = Destination::Directory(&mut output);
    match merge(inputs, &wanted(&noise), at_strength(1.0), destination, &()) {
        Err(MergeError::Base(problems)) => assert_eq!(
            problems.all(),
            [AdapterBaseProblem::Tied {
                tensor: "lm_head.weight".to_owned()
            }]
        ),
        other => panic!("{other:?}"),
    }
    // Too much for F16, and for f32.
    let half = narrowed(
        &case.base,
        &root.path().join("base"),
        safetensors::Dtype::F16,
    );
    for (strength, said) in [(1e4, "F16 cannot hold"), (1e30, "beyond what F32 holds")] {
        let target = root.path().join("out");
        let error = merged(
            &case,
            &half,
            &wanted(&noise),
            at_strength(strength),
            &target,
        )
        .unwrap_err();
        let mut text = error.to_string();
        let mut source = std::error::Error::source(&error);
        while let Some(cause) = source {
            text.push_str(&format!(": {cause}"));
            source = cause.source();
        }
        assert!(text.contains(said), "{text}");
        assert!(!target.exists());
    }
}

/// A copy of `base` in another type, rounded to nearest.
fn narrowed(base: &Checkpoint, target: &Path, dtype: safetensors::Dtype) -> Checkpoint {
    fs::create_dir(target).unwrap();
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = base
        .tensors()
        .map(|tensor| {
            let mut values = vec![0.0; tensor.elements()];
            tensor.widen_into(0..values.len(), &mut values).unwrap();
            let bytes = values.iter().flat_map(|&value| match dtype {
                safetensors::Dtype::F16 => f16::from_f32(value).to_le_bytes(),
                _ => bf16::from_f32(value).to_le_bytes(),
            });
            (
                tensor.name.to_owned(),
                tensor.shape.to_vec(),
                bytes.collect(),
            )
        })
        .collect();
    let views = tensors.iter().map(|(name, shape, bytes)| {
        let view = safetensors::tensor::TensorView::new(dtype, shape.clone(), bytes).unwrap();
        (name.as_str(), view)
    });
    safetensors::serialize_to_file(views, None, &target.join("model.safetensors")).unwrap();
    Checkpoint::open(target).unwrap()
}

/// BF16 values as integers whose difference counts the values between them.
fn ordered(bytes: &[u8]) -> impl Iterator<Item = i32> + '_ {
    bytes.chunks_exact(2).map(|pair| {
        let bits = i32::from(u16::from_le_bytes([pair[0], pair[1]]));
        match bits & 0x8000 {
            0 => bits,
            _ => -(bits & 0x7FFF),
        }
    })
}
