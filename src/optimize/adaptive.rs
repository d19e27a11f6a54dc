//! The default method: a few normalized steps inside a ball, under the constraints that a user cares about.
//!
//!     max over |delta| <= rho of  min(h, cap) - alpha r    while g and kl hardly move
//!
//! Contrast steps go along c = grad h / |grad h| - alpha grad r / |grad r|: away from openings that comply, towards refusals
//! of the same requests. Once a batch's h is above the cap its part is dropped, since ascent on h alone ends in nonsense. The
//! part of c that would raise the guard (the task loss, or without a task set the divergence on benign text) is projected out, and
//! a share of the guard's own descent is added. Steps have a fixed length in the Euclidean geometry: Adam would spread the
//! same length over all elements, where the useful direction has few. Contrast ends when enough held-back requests would
//! rather be refused. Repair steps then descend the guard, without what opposes the contrast.

use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use super::engine::{Batch, Engine, Gradient, OptimizeError, Set, factor, wrapping};
use super::radius::{Budget, Radius, RadiusPoint, Search};
use super::step::{Phase, StepRecord};
use super::{Outcome, Rows, State};
use crate::model::TargetTensors;

/// Largest share of the harmful rows that is held back to see when the aim is reached, and the most rows.
const HELD_BACK: (usize, usize) = (4, 24);

/// Settings of the method.
#[derive(Clone, Debug, PartialEq)]
pub struct Adaptive {
    /// The ball's radius; a search shrinks the result until it keeps to its budget.
    pub rho: Radius,
    /// Weight of the refusals in the contrast.
    pub alpha: f64,
    /// Harmful loss above which a batch no longer pushes away from openings, in nats per token.
    pub cap: f64,
    /// Length of a contrast step, as a share of the norm of the targets.
    pub step_length: f64,
    /// Most contrast steps.
    pub steps: usize,
    /// Rows of each set in a step.
    pub batch: usize,
    /// Share of held-back requests that are to be refused; contrast ends there.
    pub aim: f64,
    /// Share of a contrast step's length that descends the guard.
    pub guard_share: f64,
    /// Repair steps after the contrast.
    pub repair_steps: usize,
    /// Length of the first repair step, as a share of a contrast step's; later ones shrink to a quarter of it.
    pub repair_length: f64,
    /// Of the order of rows.
    pub seed: u64,
}

impl Default for Adaptive {
    fn default() -> Self {
        Self {
            rho: Radius::Auto(Budget::default()),
            alpha: 1.0,
            cap: 2.5,
            step_length: 1.2e-4,
            steps: 6,
            batch: 24,
            aim: 0.95,
            guard_share: 0.5,
            repair_steps: 6,
            repair_length: 0.5,
            seed: 0,
        }
    }
}

pub(super) fn run(
    engine: &mut Engine<'_, '_>,
    rows: &Rows,
    settings: &Adaptive,
    resumed: Option<State>,
) -> Result<Outcome, OptimizeError> {
    for (set, of_set) in [
        (Set::Harmful, &rows.harmful),
        (Set::Refusals, &rows.refusals),
        (Set::Benign, &rows.benign),
    ] {
        if of_set.is_empty() {
            return Err(OptimizeError::NoRows {
                method: "adaptive",
                set,
            });
        }
    }
    let w0 = engine.decoder.target_values()?;
    let mut run = Run::new(engine, rows, settings, &w0)?;
    if let Some(state) = resumed {
        run.resume(state)?;
    }
    run.contrast(engine)?;
    run.repair(engine)?;
    let Run {
        delta,
        steps,
        held_back,
        guard,
        ..
    } = run;
    drop(guard);
    finish(engine, rows, settings, &w0, delta, steps, &held_back)
}

/// Shrinks delta to the budget, and measures the result.
fn finish(
    engine: &mut Engine<'_, '_>,
    rows: &Rows,
    settings: &Adaptive,
    w0: &TargetTensors,
    mut delta: TargetTensors,
    steps: Vec<StepRecord>,
    held_back: &HeldBack<'_>,
) -> Result<Outcome, OptimizeError> {
    engine.step = steps.len();
    let norm = delta.norm();
    delta.scale(factor(1.0 / norm));
    let (radius, radii, at_end) = match settings.rho {
        Radius::Auto(budget) => {
            let found =
                Search::new(engine, rows, w0, budget)?.largest(engine, &delta, Some(norm))?;
            let at_end = found
                .tried
                .iter()
                .copied()
                .find(|point| point.rho == found.radius);
            (found.radius, found.tried, at_end)
        }
        Radius::Fixed(_) => {
            let point =
                Search::new(engine, rows, w0, Budget::default())?.measure(engine, &delta, norm)?;
            (norm, Vec::new(), Some(point))
        }
    };
    delta.scale(factor(radius));
    let mut moved = w0.clone();
    moved.add_scaled(1.0, &delta);
    let after = held_back.measure(engine, &moved)?;
    let before = held_back.measure(engine, w0)?;
    let mut results = vec![
        ("delta_norm", delta.norm()),
        ("held_back", after.rows),
        ("refusing_before", before.refusing),
        ("refusing_after", after.refusing),
        ("h_before", before.h),
        ("h_after", after.h),
        ("r_before", before.r),
        ("r_after", after.r),
    ];
    if let Some(RadiusPoint { kl, task, .. }) = at_end {
        results.push(("kl", kl));
        results.extend(task.map(|rise| ("task_rise", rise)));
    }
    Ok(Outcome {
        delta,
        steps,
        radii,
        results,
    })
}

/// Requests that no step learns from.
struct HeldBack<'r> {
    openings: Batch<'r>,
    refusals: Batch<'r>,
}

/// What held-back requests say.
struct Measured {
    rows: f64,
    refusing: f64,
    h: f64,
    r: f64,
}

impl HeldBack<'_> {
    fn measure(
        &self,
        engine: &mut Engine<'_, '_>,
        values: &TargetTensors,
    ) -> Result<Measured, OptimizeError> {
        let h = engine.row_losses(values, &self.openings)?;
        let r = engine.row_losses(values, &self.refusals)?;
        let refusing = h.iter().zip(&r).filter(|(h, r)| r < h).count();
        #[expect(clippy::cast_precision_loss, reason = "a handful of rows")]
        let (n, refusing) = (h.len() as f64, refusing as f64);
        Ok(Measured {
            rows: n,
            refusing: refusing / n,
            h: h.iter().sum::<f64>() / n,
            r: r.iter().sum::<f64>() / n,
        })
    }
}

/// What must hardly move.
enum Guard<'r> {
    /// The task loss, on batches of these rows.
    Task(&'r [crate::model::EncodedRow]),
    /// The divergence from w0 on batches of benign rows; each batch with its reference.
    Benign(Vec<(Batch<'r>, Vec<Vec<f32>>)>),
}

impl Guard<'_> {
    /// The guard's gradient on batch number `step`; `None` where it has none, as a divergence at its own reference.
    fn gradient(
        &self,
        engine: &mut Engine<'_, '_>,
        values: &TargetTensors,
        step: usize,
        size: usize,
        out: &mut TargetTensors,
    ) -> Result<Option<Gradient>, OptimizeError> {
        match self {
            Self::Task(rows) => {
                let batch = Batch::new(Set::Task, rows, wrapping(rows.len(), size, step));
                engine.gradient(values, &batch, out).map(Some)
            }
            Self::Benign(_) if step == 0 => Ok(None),
            Self::Benign(batches) => {
                let (batch, reference) = &batches[step % batches.len()];
                engine
                    .divergence_gradient(values, batch, reference, out)
                    .map(Some)
            }
        }
    }
}

/// A run between two steps, and the buffers of one.
struct Run<'r> {
    settings: &'r Adaptive,
    rows: &'r Rows,
    w0: &'r TargetTensors,
    /// Places of the harmful rows that steps learn from, in their order.
    learn: Vec<usize>,
    held_back: HeldBack<'r>,
    guard: Guard<'r>,
    delta: TargetTensors,
    /// The last contrast step's direction, of norm 1.
    along: TargetTensors,
    steps: Vec<StepRecord>,
    /// w0 + delta.
    w: TargetTensors,
    gradient: TargetTensors,
}

impl<'r> Run<'r> {
    fn new(
        engine: &mut Engine<'_, '_>,
        rows: &'r Rows,
        settings: &'r Adaptive,
        w0: &'r TargetTensors,
    ) -> Result<Self, OptimizeError> {
        let mut order: Vec<usize> = (0..rows.harmful.len()).collect();
        order.shuffle(&mut ChaCha8Rng::seed_from_u64(settings.seed));
        let held = (order.len() / HELD_BACK.0).min(HELD_BACK.1);
        // A set too small to spare rows is looked at whole.
        let (looked_at, learn) = match held {
            0 => (order.clone(), order),
            _ => (order[..held].to_vec(), order[held..].to_vec()),
        };
        let guard = if rows.task.is_empty() {
            let mut batches = Vec::new();
            for places in (0..rows.benign.len())
                .collect::<Vec<_>>()
                .chunks(settings.batch)
            {
                let batch = Batch::new(Set::Benign, &rows.benign, places.to_vec());
                let reference = engine.reference(w0, &batch)?;
                batches.push((batch, reference));
            }
            Guard::Benign(batches)
        } else {
            Guard::Task(&rows.task)
        };
        Ok(Self {
            settings,
            rows,
            w0,
            learn,
            held_back: HeldBack {
                openings: Batch::new(Set::Harmful, &rows.harmful, looked_at.clone()),
                refusals: Batch::new(Set::Refusals, &rows.refusals, looked_at),
            },
            guard,
            delta: w0.zeros_like(),
            along: w0.zeros_like(),
            steps: Vec::new(),
            w: w0.clone(),
            gradient: w0.zeros_like(),
        })
    }

    /// Steps of the contrast until the aim, or the last one.
    fn contrast(&mut self, engine: &mut Engine<'_, '_>) -> Result<(), OptimizeError> {
        let settings = self.settings;
        let length = settings.step_length * self.w0.norm();
        while self.steps.len() < settings.steps && !self.aim_reached() {
            let step = self.steps.len();
            engine.step = step;
            let mut record = StepRecord::new(step, Phase::Contrast);
            let places: Vec<usize> =
                wrapping(self.learn.len(), settings.batch.min(self.learn.len()), step)
                    .into_iter()
                    .map(|place| self.learn[place])
                    .collect();

            let openings = Batch::new(Set::Harmful, &self.rows.harmful, places.clone());
            let h = engine.gradient(&self.w, &openings, &mut self.gradient)?;
            self.along.clear();
            if h.loss < settings.cap {
                self.along.add_scaled(factor(1.0 / h.norm), &self.gradient);
            }
            let refusals = Batch::new(Set::Refusals, &self.rows.refusals, places);
            let r = engine.gradient(&self.w, &refusals, &mut self.gradient)?;
            self.along
                .add_scaled(factor(-settings.alpha / r.norm), &self.gradient);
            normalize(&mut self.along);

            let guard =
                self.guard
                    .gradient(engine, &self.w, step, settings.batch, &mut self.gradient)?;
            let mut move_by = self.along.clone();
            if let Some(Gradient { norm, .. }) = guard {
                let conflict = move_by.dot(&self.gradient) / norm;
                if conflict > 0.0 {
                    move_by.add_scaled(factor(-conflict / norm), &self.gradient);
                    normalize(&mut move_by);
                }
                move_by.add_scaled(factor(-settings.guard_share / norm), &self.gradient);
            }
            self.advance(&move_by, length);
            drop(move_by);

            record.h = Some(h.loss);
            record.grad_h = Some(h.norm);
            record.r = Some(r.loss);
            record.g = guard.map(|found| found.loss);
            self.record(engine, record)?;
        }
        Ok(())
    }

    /// Steps that descend the guard, without what opposes the last contrast.
    fn repair(&mut self, engine: &mut Engine<'_, '_>) -> Result<(), OptimizeError> {
        let settings = self.settings;
        let contrasts = self
            .steps
            .iter()
            .filter(|step| step.phase == Phase::Contrast)
            .count();
        let first = settings.repair_length * settings.step_length * self.w0.norm();
        while self.steps.len() < contrasts + settings.repair_steps {
            let step = self.steps.len();
            engine.step = step;
            let mut record = StepRecord::new(step, Phase::Repair);
            let Some(guard) =
                self.guard
                    .gradient(engine, &self.w, step, settings.batch, &mut self.gradient)?
            else {
                return Ok(());
            };
            let mut move_by = self.gradient.clone();
            move_by.scale(factor(-1.0 / guard.norm));
            let opposed = move_by.dot(&self.along);
            if opposed < 0.0 {
                move_by.add_scaled(factor(-opposed), &self.along);
            }
            #[expect(clippy::cast_precision_loss, reason = "a handful of steps")]
            let done = (step - contrasts) as f64 / settings.repair_steps as f64;
            self.advance(&move_by, first * (1.0 - 0.75 * done));
            record.g = Some(guard.loss);
            self.record(engine, record)?;
        }
        Ok(())
    }

    /// Moves delta by `length` times `direction`, back onto the ball where it leaves it.
    fn advance(&mut self, direction: &TargetTensors, length: f64) {
        self.delta.add_scaled(factor(length), direction);
        if let Radius::Fixed(rho) = self.settings.rho {
            let norm = self.delta.norm();
            if norm > rho {
                self.delta.scale(factor(rho / norm));
            }
        }
        self.w.copy_from(self.w0);
        self.w.add_scaled(1.0, &self.delta);
    }

    /// Completes `record` with what holds after the step, and tells of it.
    fn record(
        &mut self,
        engine: &mut Engine<'_, '_>,
        mut record: StepRecord,
    ) -> Result<(), OptimizeError> {
        record.norm = self.delta.norm();
        if record.phase == Phase::Contrast {
            record.refusing = Some(self.held_back.measure(engine, &self.w)?.refusing);
        }
        engine.observer.step(&record);
        self.steps.push(record);
        engine.observer.state(&|| State {
            steps: self.steps.clone(),
            tensors: vec![
                ("delta".to_owned(), self.delta.clone()),
                ("along".to_owned(), self.along.clone()),
            ],
        });
        Ok(())
    }

    fn aim_reached(&self) -> bool {
        let last = self.steps.iter().rev().find_map(|step| step.refusing);
        last.is_some_and(|refusing| refusing >= self.settings.aim)
            || self
                .steps
                .last()
                .is_some_and(|step| step.phase == Phase::Repair)
    }

    fn resume(&mut self, mut state: State) -> Result<(), OptimizeError> {
        let shape: Vec<usize> = self.delta.iter().map(<[f32]>::len).collect();
        [self.delta, self.along] = state.take(["delta", "along"], &shape)?;
        self.steps = state.steps;
        self.w.add_scaled(1.0, &self.delta);
        Ok(())
    }
}

fn normalize(x: &mut TargetTensors) {
    x.scale(factor(1.0 / x.norm()));
}
