//! Whole runs of the optimizer.
//!
//! The paper's method against PyTorch, step by step (`testdata/gen/oracle_optimizer.py`), with tolerances above what two of
//! PyTorch's own orders of summation disagree by (1.6e-5 for the drift). The adaptive method and the control by what they
//! promise: the same bits on any number of threads and resumed or not, a ball that is kept, a budget that is kept.

use std::borrow::Cow;
use std::cell::RefCell;

use panacea_patch::model::{EncodedRow, Generation, Pack, Point, TargetTensors};
use panacea_patch::optimize::{
    Adaptive, Budget, FinalEps, Observer, OptimizeError, Outcome, Panacea, Part, Phase, Radius,
    Random, Rows, Settings, State, StepRecord, Unobserved, optimize,
};

#[expect(dead_code, reason = "the decoder's own tests use the rest")]
mod common;
#[path = "common/tiny.rs"]
mod tiny;
use common::{Stored, oracle};
use tiny::{Tiny, rows, rows_of};

fn run(tiny: &Tiny, rows: &Rows, settings: &Settings) -> Result<Outcome, OptimizeError> {
    optimize(&mut tiny.decoder(), rows, settings, None, &mut Unobserved)
}

fn result(outcome: &Outcome, name: &str) -> f64 {
    let found = outcome.results.iter().find(|(known, _)| *known == name);
    found
        .unwrap_or_else(|| panic!("no `{name}` in {:?}", outcome.results))
        .1
}

fn adaptive() -> Adaptive {
    Adaptive {
        rho: Radius::Fixed(0.3),
        steps: 3,
        repair_steps: 2,
        batch: 2,
        step_length: Some(0.05),
        // Never reached, so that every step is taken.
        aim: 2.0,
        ..Adaptive::default()
    }
}

#[test]
fn the_papers_method_follows_pytorch_step_by_step() {
    let tiny = Tiny::open();
    for name in [
        "eps-alone",
        "whole",
        "partly-clipped",
        "last-batch",
        "all-linear",
    ] {
        let facts = common::json(&oracle("optimizer").join(format!("{name}.json")));
        let expected = Stored::open(&oracle("optimizer").join(format!("{name}.safetensors")));
        let given = &facts["settings"];
        let number = |key: &str| given[key].as_f64().expect("a number");
        let count = |key: &str| {
            usize::try_from(given[key].as_u64().expect("a count")).expect("a small count")
        };
        let targets: Vec<&str> = given["targets"]
            .as_array()
            .expect("targets")
            .iter()
            .filter_map(|t| t.as_str())
            .collect();
        let rows = Rows {
            harmful: rows_of("harmful.json"),
            task: rows_of(given["task"].as_str().expect("a file")),
            ..Rows::default()
        };
        for (part, prefix) in [(Part::Eps, "eps"), (Part::Drift, "drift")] {
            let settings = Settings::Panacea(Panacea {
                weight_decay: 0.0,
                rho: Radius::fixed(number("rho")).expect("a radius"),
                lambda: number("lambda"),
                lr: number("lr"),
                steps: count("steps"),
                batch: count("batch"),
                final_eps: match given["final_eps"].as_str() {
                    Some("last-batch") => FinalEps::LastBatch,
                    _ => FinalEps::Whole,
                },
                part,
            });
            let mut decoder = tiny.decoder_of(&targets.join(","));
            let outcome = optimize(&mut decoder, &rows, &settings, None, &mut Unobserved)
                .expect("an outcome");

            let steps = facts["steps"].as_array().expect("steps");
            assert_eq!(outcome.steps.len(), steps.len(), "{name}");
            for (found, wanted) in outcome.steps.iter().zip(steps) {
                for (key, found) in [
                    ("g", found.g),
                    ("h", found.h),
                    ("h_eps", found.h_eps),
                    ("grad_h", found.grad_h),
                    ("clip", found.clip),
                ] {
                    close(
                        &format!("{name} step {key}"),
                        found.expect(key),
                        wanted[key].as_f64().expect("a number"),
                    );
                }
            }
            for key in [
                "h_final",
                "grad_h_final",
                "h_final_eps",
                "eps_norm",
                "drift_norm",
            ] {
                if let Some(wanted) = facts[key].as_f64() {
                    close(&format!("{name} {key}"), result(&outcome, key), wanted);
                }
            }
            if part == Part::Drift && steps.is_empty() {
                assert_eq!(outcome.delta.norm(), 0.0);
                continue;
            }
            for (target, found) in decoder.targets().iter().zip(outcome.delta.iter()) {
                let wanted = expected.floats(&format!("{prefix}.{}", target.name));
                let (cosine, ratio) = compare(found, &wanted);
                assert!(
                    cosine > 0.999_999 && (ratio - 1.0).abs() < 1e-4,
                    "{name} {prefix} {}: cosine {cosine}, norm ratio {ratio}",
                    target.name
                );
            }
        }
    }
}

#[test]
fn the_sum_is_its_parts() {
    let tiny = Tiny::open();
    let of = |part| {
        let settings = Panacea {
            steps: 2,
            batch: 2,
            lr: 1e-3,
            part,
            ..Panacea::default()
        };
        run(&tiny, &rows(), &Settings::Panacea(settings))
            .expect("an outcome")
            .delta
    };
    let mut sum = of(Part::Eps);
    sum.add_scaled(1.0, &of(Part::Drift));
    assert_eq!(of(Part::Sum), sum);
}

#[test]
fn runs_are_the_same_bits_on_any_number_of_threads() {
    let tiny = Tiny::open();
    for settings in [
        Settings::Panacea(Panacea {
            steps: 2,
            batch: 2,
            lr: 1e-3,
            ..Panacea::default()
        }),
        Settings::Adaptive(Adaptive {
            rho: Radius::Auto(Budget::default()),
            ..adaptive()
        }),
        Settings::Random(Random {
            rho: Radius::Auto(Budget::default()),
            seed: 5,
        }),
    ] {
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .expect("a pool");
            let outcome = pool
                .install(|| run(&tiny, &rows(), &settings))
                .expect("an outcome");
            (outcome.delta, outcome.steps, outcome.results)
        };
        let one = on(1);
        assert_eq!(one, on(2), "{settings:?}");
        assert_eq!(one, on(5), "{settings:?}");
    }
}

/// Keeps the state after `after` steps and stops there.
struct StopAfter {
    after: usize,
    state: RefCell<Option<State<'static>>>,
}

impl Observer for StopAfter {
    fn progress(&mut self, _what: &str, _done: usize, _total: usize) {}
    fn step(&mut self, _record: &StepRecord) {}
    fn state(&mut self, state: &State<'_>) {
        if state.steps.len() == self.after {
            self.state.replace(Some(state.clone().into_owned()));
        }
    }
    fn interrupted(&self) -> bool {
        self.state.borrow().is_some()
    }
}

#[test]
fn a_resumed_run_ends_with_the_same_bits() {
    let tiny = Tiny::open();
    for (settings, last) in [
        (
            Settings::Panacea(Panacea {
                steps: 3,
                batch: 2,
                lr: 1e-3,
                final_eps: FinalEps::LastBatch,
                ..Panacea::default()
            }),
            2,
        ),
        (Settings::Adaptive(adaptive()), 4),
    ] {
        let whole = run(&tiny, &rows(), &settings).expect("an outcome");
        for after in 1..=last {
            let mut decoder = tiny.decoder();
            let mut stop = StopAfter {
                after,
                state: RefCell::default(),
            };
            let stopped = optimize(&mut decoder, &rows(), &settings, None, &mut stop);
            assert!(
                matches!(stopped, Err(OptimizeError::Interrupted)),
                "{settings:?} after {after}"
            );
            let state = stop.state.take();
            let resumed = optimize(&mut decoder, &rows(), &settings, state, &mut Unobserved)
                .expect("an outcome");
            assert_eq!(
                (&whole.delta, &whole.steps),
                (&resumed.delta, &resumed.steps),
                "{settings:?} after {after}"
            );
        }
    }
}

#[test]
fn a_state_of_other_targets_is_refused() {
    let tiny = Tiny::open();
    let state = State {
        steps: Vec::new(),
        tensors: vec![
            (
                "delta".to_owned(),
                Cow::Owned(TargetTensors::new(vec![vec![0.0; 3]])),
            ),
            ("along".to_owned(), Cow::Owned(TargetTensors::default())),
        ],
    };
    let mut decoder = tiny.decoder_of("q_proj");
    let refused = optimize(
        &mut decoder,
        &rows(),
        &Settings::Adaptive(adaptive()),
        Some(state),
        &mut Unobserved,
    );
    assert!(matches!(refused, Err(OptimizeError::State)));
}

#[test]
fn the_adaptive_method_makes_refusals_likelier_and_openings_less_likely_inside_its_ball() {
    let tiny = Tiny::open();
    let rows = rows();
    let settings = Adaptive {
        cap: 30.0,
        batch: 4,
        ..adaptive()
    };
    let outcome = run(&tiny, &rows, &Settings::Adaptive(settings)).expect("an outcome");
    let norm = outcome.delta.norm();
    assert!(norm > 0.05 && norm <= 0.3 * (1.0 + 1e-6), "{norm}");
    let contrasts = outcome
        .steps
        .iter()
        .filter(|step| step.phase == Phase::Contrast);
    assert_eq!(contrasts.count(), 3);
    let noise = Settings::Random(Random {
        rho: Radius::Fixed(norm),
        seed: 1,
    });
    let noise = run(&tiny, &rows, &noise).expect("an outcome");
    assert!((noise.delta.norm() - norm).abs() < 1e-6);

    // How much a perturbation changes the mean loss of some rows. Weights are random, so held-back rows say nothing here.
    let mut decoder = tiny.decoder();
    let w0 = decoder.target_values().expect("finite weights");
    let mut change = |delta: &TargetTensors, rows: &[EncodedRow]| {
        let pack = Pack::of(rows);
        let before = decoder.loss(&w0, &pack).expect("a loss").mean();
        let mut moved = w0.clone();
        moved.add_scaled(1.0, delta);
        decoder.loss(&moved, &pack).expect("a loss").mean() - before
    };
    let (h, r) = (
        change(&outcome.delta, &rows.harmful),
        change(&outcome.delta, &rows.refusals),
    );
    assert!(h > 0.1 && r < -0.1, "h by {h}, r by {r}");
    let (h, r) = (
        change(&noise.delta, &rows.harmful),
        change(&noise.delta, &rows.refusals),
    );
    assert!(h.abs() < 0.05 && r.abs() < 0.05, "h by {h}, r by {r}");
}

/// Three requests, and what generation answers them with, three tokens each.
fn said(tiny: &Tiny) -> (Rows, Vec<Vec<u32>>) {
    let mut rows = rows();
    // Fewer than four, so that all are measured.
    rows.harmful.truncate(3);
    let prompts: Vec<Vec<u32>> = rows.harmful.iter().map(prompt).collect();
    let mut decoder = tiny.decoder_of("q_proj");
    let said = decoder.generate(Point::stored(), &prompts, &Generation::of(3));
    (rows, said.expect("tokens"))
}

fn prompt(row: &EncodedRow) -> Vec<u32> {
    let length = row.in_loss.iter().position(|&marked| marked);
    row.tokens[..length.expect("a response")].to_vec()
}

/// The requests of `rows`, each with the words of its refusal.
fn refused_with(rows: &[EncodedRow], words: &[Vec<u32>]) -> Vec<EncodedRow> {
    let row = |(row, words): (&EncodedRow, &Vec<u32>)| {
        let prompt = prompt(row);
        EncodedRow {
            tokens: [prompt.as_slice(), words, &[1]].concat(),
            in_loss: (0..prompt.len() + words.len() + 1)
                .map(|at| at >= prompt.len())
                .collect(),
        }
    };
    rows.iter().zip(words).map(row).collect()
}

/// What is measured on held-back requests, against generation, which computes each token from kept keys and values.
#[test]
fn a_request_is_refused_where_generation_begins_as_some_refusal_does() {
    let tiny = Tiny::open();
    let (mut rows, said) = said(&tiny);
    let mut decoder = tiny.decoder_of("q_proj");
    // A refusal of each request: in the words said to the next one, or, but for the first, in those words with another among them.
    for changed in [None, Some(0), Some(1), Some(2)] {
        let words = |place: usize| {
            let mut words = said[(place + 1) % said.len()].clone();
            if let Some(changed) = changed.filter(|_| place != 0) {
                words[changed] = (words[changed] + 1) % 97;
            }
            words
        };
        let refusals: Vec<Vec<u32>> = (0..3).map(words).collect();
        rows.refusals = refused_with(&rows.harmful, &refusals);
        let settings = Settings::Adaptive(Adaptive {
            steps: 1,
            repair_steps: 0,
            ..adaptive()
        });
        let outcome = run(&tiny, &rows, &settings).expect("a perturbation");
        let mut likelier = |place: usize| {
            let mut loss = |row: &EncodedRow| {
                let mut pack = Pack::of([row]);
                pack.predictions.truncate(3);
                decoder.loss(Point::stored(), &pack).expect("a loss").mean()
            };
            loss(&rows.refusals[place]) < loss(&rows.harmful[place])
        };
        let is_refused = |&place: &usize| refusals.contains(&said[place]) && likelier(place);
        let refused: u8 = (0..3).filter(is_refused).map(|_| 1).sum();
        let found = 3.0 * result(&outcome, "refusing_before");
        assert!(
            (found - f64::from(refused)).abs() < 1e-9,
            "{changed:?}: {found} for {refused}: {said:?} among {refusals:?}"
        );
    }
}

/// Repair behind the last contrast step undid the aim, and nothing was left to reach it again.
#[test]
fn repair_that_undoes_the_aim_with_no_contrast_left_is_taken_back() {
    let tiny = Tiny::open();
    let (without, with) = (
        undone(&tiny, Radius::Fixed(1e9), 0),
        undone(&tiny, Radius::Fixed(1e9), 2),
    );
    assert_eq!(with.steps.len(), 2, "it went on: {:?}", with.steps);
    assert_eq!(with.steps[1].phase, Phase::Repair);
    assert_eq!(with.steps[1].length, Some(0.0));
    assert_eq!(result(&without, "refusing_after"), 1.0);
    assert_eq!(result(&with, "refusing_after"), 1.0);
    assert_eq!(with.delta, without.delta);
}

/// Repair was taken back beyond the budget too, where the search for a radius then undid more than it had.
#[test]
fn repair_that_the_budget_asks_for_is_kept() {
    let tiny = Tiny::open();
    let of = |kl| {
        undone(
            &tiny,
            Radius::Auto(Budget {
                kl,
                task: f64::INFINITY,
            }),
            2,
        )
    };
    let lengths = |outcome: &Outcome| -> Vec<f64> {
        outcome
            .steps
            .iter()
            .filter_map(|step| step.length)
            .collect()
    };
    let (ample, scarce) = (of(1e9), of(1e-5));
    assert_eq!(lengths(&ample)[1..], [0.0]);
    let repairs = &lengths(&scarce)[1..];
    assert_eq!(repairs.len(), 2, "{repairs:?}");
    assert!(repairs.iter().all(|&length| length > 0.0), "{repairs:?}");
}

/// A run whose one contrast step reaches the aim, and whose every repair step goes so far that nothing is said as before.
fn undone(tiny: &Tiny, rho: Radius, repair_steps: usize) -> Outcome {
    let (mut rows, said) = said(tiny);
    rows.refusals = refused_with(&rows.harmful, &said);
    let settings = Settings::Adaptive(Adaptive {
        rho,
        steps: 1,
        repair_steps,
        repair_length: 50.0,
        step_length: Some(0.01),
        ..adaptive()
    });
    run(tiny, &rows, &settings).expect("a perturbation")
}

#[test]
fn a_token_above_the_cap_is_left_alone() {
    let tiny = Tiny::open();
    let mut decoder = tiny.decoder_of("q_proj");
    let w = decoder.target_values().expect("finite weights");
    let rows = rows_of("harmful.json");
    let pack = Pack::of(&rows);
    let predicted = decoder.predicted(&w, &pack).expect("losses");
    let losses: Vec<f64> = predicted.iter().map(|it| it.loss).collect();
    let cap = losses[losses.len() / 2];
    let mut capped = w.zeros_like();
    decoder
        .capped_loss_and_gradient(&w, &pack, cap, &mut capped)
        .expect("a loss");
    // The same gradient from rows whose tokens above the cap are not in the loss.
    let mut below = pack.clone();
    let mut at = losses.iter();
    below
        .predictions
        .retain(|_| *at.next().expect("a loss") <= cap);
    let mut wanted = w.zeros_like();
    decoder
        .loss_and_gradient(&w, &below, &mut wanted)
        .expect("a loss");
    assert!(below.predictions.len() < pack.predictions.len());
    let (cosine, ratio) = compare(capped.tensor(0), wanted.tensor(0));
    assert!(
        cosine > 0.999_999 && (ratio - 1.0).abs() < 1e-5,
        "cosine {cosine}, ratio {ratio}"
    );
}

#[test]
fn a_radius_that_is_searched_for_keeps_to_its_budget_and_nearly_uses_it() {
    let tiny = Tiny::open();
    let budget = Budget {
        kl: 0.01,
        task: 0.5,
    };
    let settings = Settings::Panacea(Panacea {
        rho: Radius::Auto(budget),
        ..Panacea::default()
    });
    let outcome = run(&tiny, &rows(), &settings).expect("an outcome");
    let rho = result(&outcome, "rho");
    let at = outcome
        .radii
        .iter()
        .find(|point| point.rho == rho)
        .expect("the radius was tried");
    assert!(
        at.kl <= budget.kl && at.kl > 0.7 * budget.kl,
        "{:?}",
        outcome.radii
    );
    assert!((outcome.delta.norm() / rho - 1.0).abs() < 1e-5);
}

#[test]
fn sets_that_are_needed_and_empty_are_named() {
    let tiny = Tiny::open();
    let refused = |rows: Rows, settings: Settings| {
        run(&tiny, &rows, &settings)
            .expect_err("a refusal")
            .to_string()
    };
    let empty = Rows::default;
    assert_eq!(
        refused(empty(), Settings::Panacea(Panacea::default())),
        "panacea needs harmful rows, and there are none"
    );
    assert_eq!(
        refused(
            Rows {
                task: Vec::new(),
                ..rows()
            },
            Settings::Panacea(Panacea {
                steps: 1,
                ..Panacea::default()
            })
        ),
        "panacea needs task rows, and there are none"
    );
    assert_eq!(
        refused(
            Rows {
                refusals: Vec::new(),
                ..rows()
            },
            Settings::Adaptive(adaptive())
        ),
        "adaptive needs refusal rows, and there are none"
    );
    assert!(
        Radius::fixed(0.0).is_err()
            && Radius::fixed(f64::NAN).is_err()
            && Radius::fixed(f64::INFINITY).is_err()
    );
}

/// |found / wanted - 1| at most 1e-4: f32 in another order.
fn close(what: &str, found: f64, wanted: f64) {
    let error = if wanted == 0.0 {
        found.abs()
    } else {
        (found / wanted - 1.0).abs()
    };
    assert!(error < 1e-4, "{what}: {found} for {wanted}");
}

/// Cosine of the two, and the ratio of their norms.
fn compare(found: &[f32], wanted: &[f32]) -> (f64, f64) {
    assert_eq!(found.len(), wanted.len());
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        a.iter()
            .zip(b)
            .map(|(&a, &b)| f64::from(a) * f64::from(b))
            .sum()
    };
    let (f, w) = (dot(found, found).sqrt(), dot(wanted, wanted).sqrt());
    (dot(found, wanted) / (f * w), f / w)
}
