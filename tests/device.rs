//! The decoder on devices against PyTorch and against the processor's decoder, on the tiny checkpoints of `testdata/oracle`.
//!
//! The device is candle's own processor backend, which runs the operations that a GPU would be given, in f32 with the bar of
//! `tests/oracle.rs`, and in BF16 with a wider one. Nothing here has run on a GPU.

#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    reason = "counts of a few tokens, and steps whose last bits do not matter"
)]
#![expect(
    clippy::print_stdout,
    reason = "how far off the worst gradient is, for --nocapture"
)]

use std::path::Path;

use panacea_formats::{Adapter, AdapterConfig, Checkpoint};
use panacea_patch::model::device::{Device, DeviceDecoder, DeviceName, Precision};
use panacea_patch::model::{
    Activations, AdapterModule, Config, Decoder, Differentiable, EncodedRow, Objective, Pack,
    Point, TargetSelection, TargetTensors,
};
use panacea_patch::optimize::{Adaptive, Panacea, Radius, Rows, Settings, Unobserved, optimize};

#[path = "common/cases.rs"]
mod cases;
mod common;
use cases::{ALL, cases};
use common::{Stored, oracle, relative_error};

/// Largest relative error allowed against PyTorch, for losses and for each tensor in the Euclidean norm.
const TOLERANCE: f64 = 1e-4;

/// The same against the processor's decoder: the same numbers are added in other orders.
const TOLERANCE_OF_OURS: f64 = 1e-5;

fn decoder<'s>(case: &Path, stored: &'s Stored, selection: &str) -> Decoder<'s> {
    let text = std::fs::read_to_string(case.join("config.json")).expect("a config");
    let config = Config::parse(&text).expect("a supported config");
    let selection: TargetSelection = selection.parse().expect("a selection");
    Decoder::new(config, stored.views(), &selection).expect("a decoder")
}

fn candle(precision: Precision) -> Device {
    let device = Device::open(DeviceName::Candle).expect("this processor");
    device.with_precision(precision)
}

fn on<'c>(
    devices: usize,
    precision: Precision,
    activations: Activations,
    host: Decoder<'c>,
) -> DeviceDecoder<'c> {
    let devices = vec![candle(precision); devices];
    DeviceDecoder::upload(host, devices, activations).expect("a decoder on devices")
}

/// A loss with its gradient, at the stored values.
fn gradient(decoder: &mut dyn Differentiable, pack: &Pack) -> (f64, TargetTensors) {
    let sizes = decoder.target_sizes();
    let mut gradient = TargetTensors::new(sizes.iter().map(|&size| vec![0.0; size]).collect());
    let loss =
        decoder.capped_loss_and_gradient(Point::stored(), pack, f64::INFINITY, &mut gradient);
    (loss.expect("a loss").sum, gradient)
}

fn assert_same(found: &TargetTensors, wanted: &TargetTensors, tolerance: f64, name: &str) {
    for (index, (found, wanted)) in found.iter().zip(wanted.iter()).enumerate() {
        let error = relative_error(found, wanted);
        assert!(
            error < tolerance,
            "{name}: target {index} is off by {error:e}"
        );
    }
}

#[test]
fn losses_and_gradients_agree_with_pytorch_and_with_the_processor() {
    for case in cases() {
        let stored = Stored::open(&case.join("model.safetensors"));
        let expected = Stored::open(&case.join("expected.safetensors"));
        let facts = common::json(&case.join("expected.json"));
        let rows = common::rows(&case.join("rows.json"));
        let pack = Pack::of(&rows);
        let (ours, gradient_of_ours) = gradient(&mut decoder(&case, &stored, ALL), &pack);
        for (devices, activations) in [
            (1, Activations::Keep),
            (1, Activations::Recompute),
            (2, Activations::Keep),
            (2, Activations::Recompute),
        ] {
            let name = format!("{} {devices} {activations:?}", case.display());
            let host = decoder(&case, &stored, ALL);
            let mut decoder = on(devices, Precision::F32, activations, host);
            let (loss, mut gradient) = gradient(&mut decoder, &pack);
            assert!(
                (loss / ours - 1.0).abs() < 1e-6,
                "{name}: {loss} for {ours}"
            );
            assert_same(&gradient, &gradient_of_ours, TOLERANCE_OF_OURS, &name);
            let forward_only = decoder.loss(Point::stored(), &pack).expect("a loss");
            assert_eq!(loss, forward_only.sum, "{name}: with and without gradient");
            let count = facts["predicted"].as_u64().expect("a count");
            let wanted = facts["loss"].as_f64().expect("a number") * count as f64;
            assert!(
                (loss / wanted - 1.0).abs() < TOLERANCE,
                "{name}: {loss} for {wanted}"
            );
            gradient.scale(1.0 / count as f32);
            let mut worst = 0f64;
            for (target, found) in decoder.targets().iter().zip(gradient.iter()) {
                let wanted = expected.floats(&format!("grad.{}", target.name));
                let error = relative_error(found, &wanted);
                assert!(
                    error < TOLERANCE,
                    "{name}: {} is off by {error:e}",
                    target.name
                );
                worst = worst.max(error);
            }
            println!("{name}: worst gradient {worst:.1e}");
        }
    }
}

/// With fewer targets the backward stops earlier, and what it still computes must not change.
#[test]
fn fewer_targets_give_the_same_gradients_for_those_that_remain() {
    for (case, selection) in [
        ("llama-biases", "q_proj"),
        ("llama-biases", "o_proj"),
        ("llama-biases", "down_proj"),
        ("llama-biases", "1.mlp.gate_proj"),
        ("gemma2", "down_proj"),
        ("gemma2", "1.self_attn.o_proj"),
        ("mixtral", r".*\.1\..*\.experts\.[02]\.w2"),
        ("mixtral", "w3"),
        ("olmo2", "1.self_attn.v_proj"),
        ("phi3-window", "qkv_proj"),
        ("qwen3-moe", "v_proj"),
    ] {
        let case = oracle(case);
        let stored = Stored::open(&case.join("model.safetensors"));
        let pack = Pack::of(&common::rows(&case.join("rows.json")));
        let (_, wanted) = gradient(&mut decoder(&case, &stored, selection), &pack);
        let host = decoder(&case, &stored, selection);
        let mut decoder = on(2, Precision::F32, Activations::Keep, host);
        let (_, found) = gradient(&mut decoder, &pack);
        assert_same(&found, &wanted, TOLERANCE_OF_OURS, selection);
    }
}

#[test]
fn a_common_beginning_is_computed_once() {
    let mut compared = 0;
    for case in cases() {
        let stored = Stored::open(&case.join("model.safetensors"));
        let rows = common::rows(&case.join("rows.json"));
        let mut ours = decoder(&case, &stored, ALL);
        if !ours.shares_beginnings() {
            continue;
        }
        // Longer than any window.
        let beginning: Vec<u32> = rows.iter().flat_map(|row| row.tokens.clone()).collect();
        let behind = |row: &EncodedRow| EncodedRow {
            tokens: [&beginning[..], &row.tokens].concat(),
            in_loss: [&vec![false; beginning.len()][..], &row.in_loss].concat(),
        };
        let rows: Vec<EncodedRow> = rows.iter().map(behind).collect();
        let pack = Pack::sharing(&rows.iter().collect::<Vec<_>>());
        assert!(pack.starts[0] + 1 >= beginning.len());
        let (wanted_loss, wanted) = gradient(&mut ours, &pack);
        let host = decoder(&case, &stored, ALL);
        let mut decoder = on(1, Precision::F32, Activations::Keep, host);
        let (loss, found) = gradient(&mut decoder, &pack);
        let name = case.display().to_string();
        assert!((loss / wanted_loss - 1.0).abs() < 1e-6, "{name}");
        assert_same(&found, &wanted, TOLERANCE_OF_OURS, &name);
        compared += 1;
    }
    assert!(compared >= 18, "only {compared}");
}

#[test]
fn values_of_targets_are_copied_when_they_change() {
    for case in ["llama-biases", "mixtral", "phi3-window"] {
        let case = oracle(case);
        let stored = Stored::open(&case.join("model.safetensors"));
        let pack = Pack::of(&common::rows(&case.join("rows.json")));
        let mut ours = decoder(&case, &stored, ALL);
        let host = decoder(&case, &stored, ALL);
        let mut decoder = on(1, Precision::F32, Activations::Keep, host);
        let (_, mut direction) = gradient(&mut ours, &pack);
        let mut same = |point: Point<'_>| {
            let wanted = Differentiable::loss(&mut ours, point, &pack).expect("a loss");
            let found = decoder.loss(point, &pack).expect("a loss");
            assert!(
                (found.sum / wanted.sum - 1.0).abs() < 1e-6,
                "{found:?} for {wanted:?}"
            );
            found.sum
        };
        let moved = same(Point::stored().moved(0.1, &direction));
        assert_ne!(moved, same(Point::stored()));
        assert_eq!(moved, same(Point::stored().moved(0.1, &direction)));
        direction.scale(-1.0);
        assert_ne!(moved, same(Point::stored().moved(0.1, &direction)));
        let mut values = Differentiable::target_values(&decoder).expect("finite weights");
        values.add_scaled(-0.1, &direction);
        let mut same = |point: Point<'_>| decoder.loss(point, &pack).expect("a loss").sum;
        assert!((same(Point::at(&values)) / moved - 1.0).abs() < 1e-6);
    }
}

#[test]
fn divergences_and_caps_are_the_processors() {
    // One with a cap on its logits.
    for case in ["llama3-rope", "gemma2"] {
        let case = oracle(case);
        let stored = Stored::open(&case.join("model.safetensors"));
        let rows = common::rows(&case.join("rows.json"));
        let pack = Pack::of(&rows);
        let mut ours = decoder(&case, &stored, ALL);
        let host = decoder(&case, &stored, ALL);
        let mut decoder = on(2, Precision::F32, Activations::Keep, host);
        let reference = decoder
            .reference(Point::stored(), &pack)
            .expect("hidden states");
        let wanted = ours
            .reference(Point::stored(), &pack)
            .expect("hidden states");
        assert!(relative_error(&reference, &wanted) < 1e-5);
        let at_reference = decoder.divergence(Point::stored(), &pack, &reference);
        assert!(at_reference.expect("a divergence").sum.abs() < 1e-5);

        let (_, direction) = gradient(&mut ours, &pack);
        let point = Point::stored().moved(0.5 / direction.norm() as f32, &direction);
        let predicted = decoder.predicted(point, &pack).expect("losses");
        let wanted = ours.predicted(point, &pack).expect("losses");
        for (found, wanted) in predicted.iter().zip(&wanted) {
            assert!((found.loss - wanted.loss).abs() < 1e-5 * wanted.loss.max(0.1));
            assert_eq!(found.likeliest, wanted.likeliest);
        }
        let cap = predicted.iter().map(|it| it.loss).sum::<f64>() / predicted.len() as f64;
        for objective in [
            Objective::NextToken { cap },
            Objective::NextToken { cap: 0.0 },
            Objective::Divergence {
                reference: &reference,
            },
        ] {
            let of = |decoder: &mut dyn Differentiable| {
                let mut gradient = direction.zeros_like();
                let losses = decoder.losses_and_gradient(point, &pack, objective, &mut gradient);
                (losses.expect("losses"), gradient)
            };
            let (wanted, wanted_gradient) = of(&mut ours);
            let (found, found_gradient) = of(&mut decoder);
            for (found, wanted) in found.iter().zip(&wanted) {
                assert!((found - wanted).abs() < 1e-5 * wanted.abs().max(0.1));
            }
            if matches!(objective, Objective::NextToken { cap: 0.0 }) {
                assert_eq!(found_gradient.norm(), 0.0);
                continue;
            }
            assert_same(&found_gradient, &wanted_gradient, 1e-4, "divergence or cap");
        }
    }
}

#[test]
fn factors_of_adapters_have_the_gradients_of_the_processor() {
    for case in ["patterns", "rank-stabilized", "one-layer"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/peft");
        let checkpoint = Checkpoint::open(&path.join(case).join("adapter")).expect("an adapter");
        let config = AdapterConfig::read(&checkpoint).expect("its config");
        let base = config.base_model_name_or_path.as_deref().expect("its base");
        let base = Checkpoint::open(&checkpoint.path().join(base)).expect("the base");
        let adapter = Adapter::of(&checkpoint, &config).expect("its tensors");
        let text = std::fs::read_to_string(base.path().join("config.json")).expect("a config");
        let decoder = || {
            let modules = adapter.modules().iter().map(|module| AdapterModule {
                path: module.path.to_owned(),
                a: module.a,
                b: module.b,
                scale: module.scale,
            });
            let config = Config::parse(&text).expect("a supported config");
            let tensors = adapter.base_tensors(&base);
            Decoder::with_adapter(config, tensors, modules.collect(), None).expect("a decoder")
        };
        let row = |tokens: std::ops::Range<u32>| EncodedRow {
            in_loss: tokens.clone().map(|it| it % 3 > 0).collect(),
            tokens: tokens.collect(),
        };
        let pack = Pack::of(&[row(5..20), row(30..39)]);
        let (mut ours, mut found) = (
            decoder(),
            on(2, Precision::F32, Activations::Recompute, decoder()),
        );
        let (loss, direction) = gradient(&mut ours, &pack);
        let (found_loss, of_found) = gradient(&mut found, &pack);
        assert!((found_loss / loss - 1.0).abs() < 1e-6, "{case}");
        assert_same(&of_found, &direction, TOLERANCE_OF_OURS, case);
        let point = Point::stored().moved(0.01, &direction);
        let wanted = Differentiable::loss(&mut ours, point, &pack).expect("a loss");
        let found = found.loss(point, &pack).expect("a loss");
        assert_ne!(wanted.sum, loss);
        assert!((found.sum / wanted.sum - 1.0).abs() < 1e-6, "{case}");
    }
}

/// BF16 has 8 bits: losses of a few per mille, gradients of the right direction. What a point adds to the weights is not rounded away with
/// them, though it is less than half of their last bit: the loss moves by the gradient times the step.
#[test]
fn in_bf16_losses_are_near_and_small_steps_are_not_lost() {
    for case in cases() {
        let name = case.display();
        let stored = Stored::open(&case.join("model.safetensors"));
        let pack = Pack::of(&common::rows(&case.join("rows.json")));
        let mut ours = decoder(&case, &stored, ALL);
        let (wanted_loss, wanted) = gradient(&mut ours, &pack);
        let host = decoder(&case, &stored, ALL);
        let mut decoder = on(1, Precision::Bf16, Activations::Keep, host);
        let (loss, found) = gradient(&mut decoder, &pack);
        let error = (loss / wanted_loss - 1.0).abs();
        let cosine = found.dot(&wanted) / (found.norm() * wanted.norm());
        assert!(
            error < 5e-3 && cosine > 0.995,
            "{name}: {error:e}, {cosine}"
        );
        // In the mean 2^-10 of each weight.
        let step = decoder.target_norm().expect("finite weights") / 1024.0;
        let slope_of = |decoder: &mut dyn Differentiable| {
            let mut at = |factor: f64| {
                let point = Point::stored().moved((factor / wanted.norm()) as f32, &wanted);
                decoder.loss(point, &pack).expect("a loss").sum
            };
            (at(step) - at(-step)) / (2.0 * step)
        };
        let ratio = slope_of(&mut decoder) / slope_of(&mut ours);
        println!("{name}: loss off by {error:.1e}, cosine {cosine:.5}, slopes {ratio:.3}");
        assert!((ratio - 1.0).abs() < 0.1, "{name}: {ratio}");
    }
}

#[test]
fn a_whole_run_finds_what_the_processor_finds() {
    let case = oracle("llama3-rope");
    let stored = Stored::open(&case.join("model.safetensors"));
    let rows = common::rows(&case.join("rows.json"));
    let rows = Rows {
        harmful: rows.clone(),
        refusals: rows.iter().rev().cloned().collect(),
        task: rows.clone(),
        benign: rows,
    };
    let targets = "q_proj,k_proj,v_proj";
    for settings in [
        Settings::Panacea(Panacea {
            rho: Radius::Fixed(0.5),
            steps: 2,
            ..Panacea::default()
        }),
        Settings::Adaptive(Adaptive {
            rho: Radius::Fixed(0.5),
            steps: 3,
            ..Adaptive::default()
        }),
    ] {
        let found = |decoder: &mut dyn Differentiable| {
            optimize(decoder, &rows, &settings, None, &mut Unobserved).expect("a perturbation")
        };
        let wanted = found(&mut decoder(&case, &stored, targets)).delta;
        let host = decoder(&case, &stored, targets);
        let mut decoder = on(2, Precision::F32, Activations::Keep, host);
        let delta = found(&mut decoder).delta;
        let cosine = delta.dot(&wanted) / (delta.norm() * wanted.norm());
        assert!(cosine > 0.9999, "{settings:?}: {cosine}");
    }
}
