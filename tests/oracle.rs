//! Losses, logits and gradients against PyTorch, on the tiny checkpoints of `testdata/oracle`.
//!
//! The expected values come from transformers' own models (`testdata/gen/oracle.py`), in f32 with eager attention. Ours
//! add the same numbers in another order, so a few units in the last place of the largest value are allowed: 1e-4
//! relative to each tensor's norm is the bar, and what is seen is printed.

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

use panacea_formats::Checkpoint;
use panacea_patch::model::{
    Activations, Config, Decoder, Differentiable, EncodedRow, Pack, Point, TargetSelection,
    TargetTensors,
};

#[path = "common/cases.rs"]
mod cases;
mod common;
use cases::{ALL, cases};
use common::{Stored, oracle, relative_error};

/// Largest relative error allowed, for losses and for each tensor in the Euclidean norm.
const TOLERANCE: f64 = 1e-4;

fn config(case: &Path, file: &str) -> Config {
    Config::parse(&std::fs::read_to_string(case.join(file)).expect("a config"))
        .expect("a supported config")
}

#[test]
fn logits_losses_and_gradients_agree_with_pytorch() {
    for case in cases() {
        for (file, activations) in [
            ("config.json", Activations::Keep),
            ("config.old.json", Activations::Recompute),
        ] {
            let stored = Stored::open(&case.join("model.safetensors"));
            let expected = Stored::open(&case.join("expected.safetensors"));
            let facts = common::json(&case.join("expected.json"));
            let rows = common::rows(&case.join("rows.json"));
            let selection: TargetSelection = ALL.parse().expect("names");
            let mut decoder = Decoder::new(config(&case, file), stored.views(), &selection)
                .expect("a decoder")
                .with_activations(activations);
            let values = decoder.target_values().expect("finite weights");
            let pack = Pack::of(&rows);

            let logits = decoder.logits(&values, &pack).expect("logits");
            let error = relative_error(&logits, &expected.floats("logits"));
            assert!(
                error < TOLERANCE,
                "{}: logits are off by {error:e}",
                case.display()
            );

            let predicted = decoder.predicted(&values, &pack).expect("predictions");
            let of_each = logits.chunks_exact(decoder.config().vocab_size);
            assert_eq!(predicted.len(), of_each.len());
            for (predicted, logits) in predicted.iter().zip(of_each) {
                let largest = logits.iter().copied().fold(f32::MIN, f32::max);
                assert_eq!(logits[predicted.likeliest as usize], largest);
            }

            let mut gradient = values.zeros_like();
            let loss = decoder
                .loss_and_gradient(&values, &pack, &mut gradient)
                .expect("a loss");
            let forward_only = decoder.loss(&values, &pack).expect("a loss");
            assert_eq!(
                loss,
                forward_only,
                "{}: with and without gradient",
                case.display()
            );
            let wanted = facts["loss"].as_f64().expect("a number");
            assert_eq!(
                loss.count as u64,
                facts["predicted"].as_u64().expect("a count")
            );
            assert!(
                (loss.mean() / wanted - 1.0).abs() < TOLERANCE,
                "{}: {} for {wanted}",
                case.display(),
                loss.mean()
            );
            for (row, wanted) in rows
                .iter()
                .zip(facts["row_losses"].as_array().expect("losses"))
            {
                let alone = decoder
                    .loss(&values, &Pack::of([row]))
                    .expect("a loss")
                    .mean();
                let wanted = wanted.as_f64().expect("a number");
                assert!(
                    (alone / wanted - 1.0).abs() < TOLERANCE,
                    "{}: {alone} for {wanted}",
                    case.display()
                );
            }

            gradient.scale(1.0 / loss.count as f32);
            let gradients = expected
                .views()
                .map(|view| view.name)
                .filter(|name| name.starts_with("grad."));
            let judged = gradients.filter(|name| name.contains("_proj.") || name.contains(".w"));
            assert_eq!(
                judged.count(),
                decoder.targets().len(),
                "{}",
                case.display()
            );
            let mut worst = (0.0, String::new());
            for (target, found) in decoder.targets().iter().zip(gradient.iter()) {
                let error =
                    relative_error(found, &expected.floats(&format!("grad.{}", target.name)));
                if error >= worst.0 {
                    worst = (error, target.name.clone());
                }
            }
            println!(
                "{} {activations:?}: worst gradient {:.1e} in {}",
                case.display(),
                worst.0,
                worst.1
            );
            assert!(
                worst.0 < TOLERANCE,
                "{}: gradient of {} is off by {:e}",
                case.display(),
                worst.1,
                worst.0
            );
        }
    }
}

/// With fewer targets the backward stops earlier, and what it still computes must not change.
#[test]
fn fewer_targets_give_the_same_gradients_for_those_that_remain() {
    for (case, selection) in [
        ("llama-biases", "q_proj"),
        ("llama-biases", "o_proj"),
        ("llama-biases", "up_proj"),
        ("llama-biases", "down_proj"),
        ("llama-biases", "1.mlp.gate_proj"),
        ("llama-biases", r"model\.layers\.1\..*(k|down)_proj"),
        ("gemma2", "down_proj"),
        ("gemma2", "1.self_attn.o_proj"),
        ("granite", "gate_proj"),
        ("mixtral", r".*\.1\..*\.experts\.[02]\.w2"),
        ("mixtral", "w3"),
        ("olmo2", "1.self_attn.v_proj"),
        ("phi3-window", "qkv_proj"),
        ("phi3-window", "1.mlp.gate_up_proj"),
        ("qwen3-moe", "v_proj"),
    ] {
        let case = oracle(case);
        let stored = Stored::open(&case.join("model.safetensors"));
        let expected = Stored::open(&case.join("expected.safetensors"));
        let rows = common::rows(&case.join("rows.json"));
        let selection: TargetSelection = selection.parse().expect("a selection");
        let mut decoder = Decoder::new(config(&case, "config.json"), stored.views(), &selection)
            .expect("a decoder");
        let values = decoder.target_values().expect("finite weights");
        let mut gradient = values.zeros_like();
        let loss = decoder
            .loss_and_gradient(&values, &Pack::of(&rows), &mut gradient)
            .expect("a loss");
        gradient.scale(1.0 / loss.count as f32);
        for (target, found) in decoder.targets().iter().zip(gradient.iter()) {
            let error = relative_error(found, &expected.floats(&format!("grad.{}", target.name)));
            assert!(
                error < TOLERANCE,
                "{selection}: gradient of {} is off by {error:e}",
                target.name
            );
        }
    }
}

/// What rows begin with is computed once and seen by all of them: the same losses and gradients as when each row is computed whole, which
/// PyTorch's are held against above.
#[test]
fn a_common_beginning_is_computed_once() {
    let mut compared = 0;
    for case in cases() {
        let stored = Stored::open(&case.join("model.safetensors"));
        let rows = common::rows(&case.join("rows.json"));
        let selection: TargetSelection = ALL.parse().expect("names");
        for activations in [Activations::Keep, Activations::Recompute] {
            let mut decoder =
                Decoder::new(config(&case, "config.json"), stored.views(), &selection)
                    .expect("a decoder")
                    .with_activations(activations);
            if !decoder.shares_beginnings() {
                continue;
            }
            // Longer than any window, and than what attention takes at a time.
            let beginning: Vec<u32> = rows.iter().flat_map(|row| row.tokens.clone()).collect();
            let beginning = beginning.repeat(70 / beginning.len() + 1);
            let behind = |row: &EncodedRow| EncodedRow {
                tokens: [&beginning[..], &row.tokens].concat(),
                in_loss: [&vec![false; beginning.len()][..], &row.in_loss].concat(),
            };
            let rows: Vec<EncodedRow> = rows.iter().map(behind).collect();
            let whole = Pack::of(&rows);
            let sharing = Pack::sharing(&rows.iter().collect::<Vec<_>>());
            assert!(sharing.starts[0] + 1 >= beginning.len());
            assert!(sharing.tokens.len() + beginning.len() < whole.tokens.len() + 2);
            let values = decoder.target_values().expect("finite weights");
            let mut found = |pack: &Pack| {
                let mut gradient = values.zeros_like();
                let loss = decoder
                    .loss_and_gradient(&values, pack, &mut gradient)
                    .expect("a loss");
                let logits = decoder.logits(&values, pack).expect("logits");
                (loss, logits, gradient)
            };
            let (loss, logits, gradient) = found(&sharing);
            let (wanted_loss, wanted_logits, wanted) = found(&whole);
            let name = case.display();
            assert_eq!(loss.count, wanted_loss.count);
            assert!((loss.sum / wanted_loss.sum - 1.0).abs() < 1e-6, "{name}");
            assert!(relative_error(&logits, &wanted_logits) < 1e-5, "{name}");
            let targets = decoder.targets().iter();
            for (target, (found, wanted)) in targets.zip(gradient.iter().zip(wanted.iter())) {
                let error = relative_error(found, wanted);
                assert!(error < 1e-5, "{name}: {} is off by {error:e}", target.name);
            }
            compared += 1;
        }
    }
    assert!(compared >= 36, "only {compared}");
}

/// The derivative along a direction, from losses alone: an oracle that shares no arithmetic with the backward.
#[test]
fn gradients_pass_a_finite_difference_check() {
    for case in cases() {
        let stored = Stored::open(&case.join("model.safetensors"));
        let rows = common::rows(&case.join("rows.json"));
        let selection: TargetSelection = ALL.parse().expect("names");
        let mut decoder = Decoder::new(config(&case, "config.json"), stored.views(), &selection)
            .expect("a decoder");
        let values = decoder.target_values().expect("finite weights");
        let pack = Pack::of(&rows);
        let mut gradient = values.zeros_like();
        decoder
            .loss_and_gradient(&values, &pack, &mut gradient)
            .expect("a loss");
        for index in 0..decoder.targets().len() {
            // Along the gradient of one target the derivative is its norm: the largest, so rounding matters least.
            let norm = gradient.norms()[index];
            let step = 0.002;
            let mut loss_at = |factor: f64| {
                let mut moved = values.clone();
                let direction = gradient.tensor(index);
                for (w, g) in moved.tensor_mut(index).iter_mut().zip(direction) {
                    *w += (factor * f64::from(*g) / norm) as f32;
                }
                decoder.loss(&moved, &pack).expect("a loss").sum
            };
            // Fourth order: (8 (f(s) - f(-s)) - (f(2s) - f(-2s))) / 12 s.
            let near = loss_at(step) - loss_at(-step);
            let far = loss_at(2.0 * step) - loss_at(-2.0 * step);
            let slope = (8.0 * near - far) / (12.0 * step);
            let name = &decoder.targets()[index].name;
            assert!(
                (slope / norm - 1.0).abs() < 2e-3,
                "{}: {name}: slope {slope}, norm {norm}",
                case.display()
            );
        }
    }
}

/// Held against its definition in f64, and its gradient against differences of its own values.
#[test]
fn a_divergence_is_zero_at_its_reference_and_its_gradient_is_its_slope() {
    let case = oracle("llama3-rope");
    let stored = Stored::open(&case.join("model.safetensors"));
    let rows = common::rows(&case.join("rows.json"));
    let mut decoder = Decoder::new(
        config(&case, "config.json"),
        stored.views(),
        &TargetSelection::default(),
    )
    .expect("a decoder");
    let base = decoder.target_values().expect("finite weights");
    let pack = Pack::of(&rows);
    let reference = decoder.reference(&base, &pack).expect("a reference");
    assert!(
        decoder
            .divergence(&base, &pack, &reference)
            .expect("a divergence")
            .mean()
            .abs()
            < 1e-6
    );

    let mut moved = base.clone();
    let mut gradient = base.zeros_like();
    decoder
        .loss_and_gradient(&base, &pack, &mut gradient)
        .expect("a loss");
    moved.add_scaled(0.5 / gradient.norm() as f32, &gradient);

    // KL by its definition, from the two distributions' logits, in f64.
    let vocab = decoder.config().vocab_size;
    let (p, q) = (
        decoder.logits(&base, &pack).expect("logits"),
        decoder.logits(&moved, &pack).expect("logits"),
    );
    let wanted: f64 = p
        .chunks(vocab)
        .zip(q.chunks(vocab))
        .map(|(p, q)| kl(p, q))
        .sum();
    gradient.clear();
    let found = decoder
        .divergence_and_gradient(&moved, &pack, &reference, &mut gradient)
        .expect("a divergence");
    assert!(
        (found.sum / wanted - 1.0).abs() < 1e-4,
        "{} for {wanted}",
        found.sum
    );

    let norm = gradient.norm();
    let mut at = |step: f32| {
        let mut there = moved.clone();
        there.add_scaled(step / norm as f32, &gradient);
        decoder
            .divergence(&there, &pack, &reference)
            .expect("a divergence")
            .sum
    };
    let slope = (at(0.01) - at(-0.01)) / 0.02;
    assert!(
        (slope / norm - 1.0).abs() < 5e-3,
        "slope {slope}, norm {norm}"
    );
}

#[test]
fn a_token_outside_of_the_vocabulary_is_refused() {
    let case = oracle("llama-tied");
    let stored = Stored::open(&case.join("model.safetensors"));
    let mut decoder = Decoder::new(
        config(&case, "config.json"),
        stored.views(),
        &TargetSelection::default(),
    )
    .expect("a decoder");
    let values = decoder.target_values().expect("finite weights");
    let row = EncodedRow {
        tokens: vec![1, 97],
        in_loss: vec![false, true],
    };
    let error = decoder
        .loss(&values, &Pack::of([&row]))
        .expect_err("a refusal");
    assert_eq!(
        error.to_string(),
        "token 97 is outside of the model's vocabulary of 97"
    );
}

#[test]
fn gradients_are_the_same_bits_on_any_number_of_threads() {
    let case = oracle("mistral-window");
    let stored = Stored::open(&case.join("model.safetensors"));
    let rows = common::rows(&case.join("rows.json"));
    let gradient = |threads: usize, pack: &Pack| -> (u64, TargetTensors) {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .expect("a pool");
        pool.install(|| {
            let mut decoder = Decoder::new(
                config(&case, "config.json"),
                stored.views(),
                &TargetSelection::default(),
            )
            .expect("a decoder");
            let values = decoder.target_values().expect("finite weights");
            let mut gradient = values.zeros_like();
            let loss = decoder
                .loss_and_gradient(&values, pack, &mut gradient)
                .expect("a loss");
            (loss.sum.to_bits(), gradient)
        })
    };
    let behind = |row: &EncodedRow| EncodedRow {
        tokens: (0..20).chain(row.tokens.iter().copied()).collect(),
        in_loss: [&[false; 20][..], &row.in_loss].concat(),
    };
    let sharing: Vec<EncodedRow> = rows.iter().map(behind).collect();
    let sharing = Pack::sharing(&sharing.iter().collect::<Vec<_>>());
    assert!(sharing.starts[0] >= 19);
    for pack in [Pack::of(&rows), sharing] {
        let one = gradient(1, &pack);
        assert_eq!(one, gradient(2, &pack));
        assert_eq!(one, gradient(7, &pack));
    }
}

/// What is kept in memory is a matter of memory alone.
#[test]
fn gradients_are_the_same_bits_recomputed_and_with_weights_given_back() {
    for case in ["gemma2", "llama-tied", "mixtral"] {
        let case = oracle(case);
        let rows = common::rows(&case.join("rows.json"));
        let checkpoint = Checkpoint::open(&case).expect("a checkpoint");
        let gradient = |activations, releases| {
            let selection: TargetSelection = ALL.parse().expect("names");
            let mut decoder = Decoder::new(
                config(&case, "config.json"),
                checkpoint.tensors(),
                &selection,
            )
            .expect("a decoder")
            .with_activations(activations);
            if releases {
                decoder = decoder.releasing(&checkpoint);
            }
            let mut gradient = decoder.target_values().expect("finite").zeros_like();
            let loss = decoder
                .loss_and_gradient(Point::stored(), &Pack::of(&rows), &mut gradient)
                .expect("a loss");
            (loss.sum.to_bits(), gradient)
        };
        let kept = gradient(Activations::Keep, false);
        assert!(kept == gradient(Activations::Recompute, false));
        assert!(kept == gradient(Activations::Keep, true));
    }
}

/// A point is what it stands for.
#[test]
fn a_moved_point_gives_the_bits_of_the_sum() {
    let case = oracle("llama-biases");
    let stored = Stored::open(&case.join("model.safetensors"));
    let rows = common::rows(&case.join("rows.json"));
    let selection: TargetSelection = ALL.parse().expect("names");
    let mut decoder =
        Decoder::new(config(&case, "config.json"), stored.views(), &selection).expect("a decoder");
    let values = decoder.target_values().expect("finite weights");
    let mut direction = values.zeros_like();
    let pack = Pack::of(&rows);
    decoder
        .loss_and_gradient(&values, &pack, &mut direction)
        .expect("a loss");
    let mut sum = values.clone();
    sum.add_scaled(0.3, &direction);
    let wanted = decoder.logits(&sum, &pack).expect("logits");
    let moved = Point::stored().moved(0.3, &direction);
    assert!(wanted == decoder.logits(moved, &pack).expect("logits"));
    let moved = Point::at(&values).moved(0.3, &direction);
    assert!(wanted == decoder.logits(moved, &pack).expect("logits"));
    decoder.subtract_stored(&mut sum).expect("finite weights");
    let error = relative_error(sum.tensor(3), direction.tensor(3));
    assert!((error - 0.7).abs() < 1e-3, "{error}");
    let norm = decoder.target_norm().expect("finite weights");
    assert!((norm / values.norm() - 1.0).abs() < 1e-12);
}

fn kl(p: &[f32], q: &[f32]) -> f64 {
    let log_sum = |x: &[f32]| x.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
    let (p_sum, q_sum) = (log_sum(p), log_sum(q));
    p.iter()
        .zip(q)
        .map(|(&p, &q)| {
            let (p, q) = (f64::from(p) - p_sum, f64::from(q) - q_sum);
            p.exp() * (p - q)
        })
        .sum()
}
