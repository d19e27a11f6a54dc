//! The default method: a few normalized steps inside a ball, under the constraints that a user cares about.
//!
//! ```text
//! max over |delta| <= rho of  min(h, cap) - alpha r    while g and kl hardly move
//! ```
//!
//! A contrast step goes along c = grad h / |grad h| - alpha grad r / |grad r|: away from openings that comply, towards refusals
//! of the same requests. The cap holds for each token: one that is unlikely enough is left alone, since ascent on h without
//! an end turns into nonsense, while the first word of an opening may still need a push. What in c would raise a guard (the
//! task loss, the divergence on benign text) is projected out, and a share of the guard's own descent is added. Steps have a
//! fixed length in the Euclidean geometry: Adam would spread the same length over all elements, where the useful direction
//! has few. When enough held-back requests would be refused ([`held_back`]), or the steps are used up, repair steps descend the guards
//! without what opposes the contrast. If they undo the aim, the contrast goes on; once it has no steps left, the repair step that undoes it
//! is taken back, unless the point before it is beyond the budget: shrinking it would cost the aim more.

mod guard;
pub(super) mod held_back;

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use self::guard::Guard;
use self::held_back::{HeldBack, Measured, beginnings, deciding};
use super::engine::{Batch, Engine, Gradient, OptimizeError, Set, factor, wrapping};
use super::radius::{Budget, Radius, RadiusPoint, Search};
use super::region::Region;
use super::step::{Phase, StepRecord};
use super::{Outcome, Rows, State};
use crate::model::{EncodedRow, Point, Target, TargetTensors};

/// Settings of the method.
#[derive(Clone, Debug, PartialEq)]
pub struct Adaptive {
    /// The ball's radius; a search shrinks the result until it keeps to its budget.
    pub rho: Radius,
    /// Weight of the refusals in the contrast.
    pub alpha: f64,
    /// Loss above which a token of an opening is unlikely enough to be left alone, in nats.
    pub cap: f64,
    /// Length of a contrast step in the weights' unit; `None` takes the one whose first step changes h - r by `gain`.
    pub step_length: Option<f64>,
    /// What the first contrast step is to change h - r by, to first order, in nats per token, where no length is given.
    ///
    /// Scale-free: it asks the same of weights of any size. On the models it was tried on, 1 gives steps of 0.1 to 0.2.
    pub gain: f64,
    /// Tokens of each opening and refusal that the loss is taken on: what an answer begins with decides what it is.
    pub first_tokens: usize,
    /// Most contrast steps.
    pub steps: usize,
    /// Rows of each set in a step.
    pub batch: usize,
    /// Share of held-back requests that are to be refused; contrast ends there.
    pub aim: f64,
    /// Share of a contrast step's length that descends the guards.
    pub guard_share: f64,
    /// Repair steps after each run of contrast steps.
    pub repair_steps: usize,
    /// Length of the first repair step, as a share of a contrast step's; the last one's is a quarter of it.
    pub repair_length: f64,
    /// Share of the harmful rows, other than those held back, that steps learn from: above 0, at most 1.
    pub learning_share: f64,
    /// Which of them steps see first.
    pub order: Order,
    /// Power of a block's share of the energy by which its part of the result is scaled, at the same norm: 0 leaves it as the steps made
    /// it, -0.5 gives all blocks the same norm, above 0 the strong ones get more.
    pub affinity: f64,
    /// The targets that steps move; the others stay as they are, though their gradients are computed.
    pub touches: Region,
    /// Of the order of rows.
    pub seed: u64,
}

/// In which order steps see harmful rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// One that the seed draws.
    #[default]
    Seeded,
    /// From the request whose refusal is nearest to being likelier than its opening to that whose is farthest.
    EasiestFirst,
}

impl Default for Adaptive {
    fn default() -> Self {
        Self {
            rho: Radius::Auto(Budget::default()),
            alpha: 1.0,
            cap: 2.5,
            step_length: None,
            gain: 1.0,
            first_tokens: 8,
            steps: 12,
            batch: 24,
            aim: 0.95,
            guard_share: 0.5,
            repair_steps: 4,
            repair_length: 0.5,
            learning_share: 1.0,
            order: Order::Seeded,
            affinity: 0.0,
            touches: Region::default(),
            seed: 0,
        }
    }
}

pub(super) fn run(
    engine: &mut Engine<'_, '_>,
    rows: &Rows,
    settings: &Adaptive,
    resumed: Option<State<'_>>,
) -> Result<Outcome, OptimizeError> {
    let harmful = Harmful::of(rows, settings)?;
    let (learn, held_back) = harmful.split(settings);
    let sets = (rows, &harmful, learn, &held_back);
    let (delta, steps) = walk(engine, sets, settings, resumed)?;
    finish(engine, rows, settings, delta, steps, &held_back)
}

/// Delta before it is shrunk to any budget, and the steps to it.
pub(super) fn direction(
    engine: &mut Engine<'_, '_>,
    rows: &Rows,
    settings: &Adaptive,
) -> Result<(TargetTensors, Vec<StepRecord>), OptimizeError> {
    let harmful = Harmful::of(rows, settings)?;
    let (learn, held_back) = harmful.split(settings);
    walk(engine, (rows, &harmful, learn, &held_back), settings, None)
}

/// Harmful rows as the steps see them.
struct Harmful {
    openings: Vec<EncodedRow>,
    refusals: Vec<EncodedRow>,
    /// Both, up to where it is decided which of the two an answer is.
    deciding: [Vec<EncodedRow>; 2],
}

impl Harmful {
    fn of(rows: &Rows, settings: &Adaptive) -> Result<Self, OptimizeError> {
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
        Ok(Self {
            openings: beginnings(&rows.harmful, settings.first_tokens),
            refusals: beginnings(&rows.refusals, settings.first_tokens),
            deciding: deciding(rows, settings.first_tokens),
        })
    }

    /// The places of the rows to learn from, in a seeded order, and the rows that are held back.
    fn split(&self, settings: &Adaptive) -> (Vec<usize>, HeldBack<'_>) {
        let [openings, refusals] = &self.deciding;
        let (mut learn, held_back) = HeldBack::split(openings, refusals, settings.seed);
        #[expect(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a share of a number of rows"
        )]
        let share = (learn.len() as f64 * settings.learning_share).ceil() as usize;
        learn.truncate(share.max(1));
        (learn, held_back)
    }
}

/// Takes all steps.
fn walk<'r>(
    engine: &mut Engine<'_, '_>,
    (rows, harmful, mut learn, held_back): (&'r Rows, &'r Harmful, Vec<usize>, &'r HeldBack<'r>),
    settings: &'r Adaptive,
    resumed: Option<State<'_>>,
) -> Result<(TargetTensors, Vec<StepRecord>), OptimizeError> {
    engine.touch(&settings.touches);
    if settings.order == Order::EasiestFirst {
        let [openings, refusals] = &harmful.deciding;
        let all = HeldBack::whole(openings, refusals);
        let distance = all.distances(engine, Point::stored())?;
        learn.sort_by(|&a, &b| distance[a].total_cmp(&distance[b]));
    }
    let mut run = Run {
        settings,
        rows,
        openings: &harmful.openings,
        refusals: &harmful.refusals,
        learn,
        held_back,
        guards: Guard::all(engine, rows, settings.batch)?,
        delta: engine.zeros(),
        along: engine.zeros(),
        gradient: engine.zeros(),
        steps: Vec::new(),
    };
    if let Some(state) = resumed {
        run.resume(state)?;
    }
    while let Some(phase) = next_phase(settings, &run.steps) {
        run.step(engine, phase)?;
    }
    let Run {
        mut delta, steps, ..
    } = run;
    if settings.affinity != 0.0 {
        share_out(&mut delta, engine.decoder.targets(), settings.affinity);
    }
    Ok((delta, steps))
}

/// Scales each block's part of `delta` by its share of the energy to the power of `affinity`, and keeps the norm.
fn share_out(delta: &mut TargetTensors, targets: &[Target], affinity: f64) {
    let norm = delta.norm();
    let mut of_blocks: BTreeMap<usize, f64> = BTreeMap::new();
    for (target, norm) in targets.iter().zip(delta.norms()) {
        *of_blocks.entry(target.block).or_default() += norm * norm;
    }
    let whole: f64 = of_blocks.values().sum();
    for (index, target) in targets.iter().enumerate() {
        let share = of_blocks[&target.block] / whole;
        // A block that nothing touched has none.
        if share > 0.0 {
            let scale = factor(share.powf(affinity));
            delta.tensor_mut(index).iter_mut().for_each(|x| *x *= scale);
        }
    }
    delta.scale(factor(norm / delta.norm()));
}

/// Which kind of step follows `steps`, a function of what they measured alone; `None` at the end.
fn next_phase(settings: &Adaptive, steps: &[StepRecord]) -> Option<Phase> {
    let Some(last) = steps.last() else {
        return (settings.steps > 0).then_some(Phase::Contrast);
    };
    let repairs = repairs_in_a_row(steps);
    if last.phase == Phase::Repair && last.length == TAKEN_BACK {
        return None;
    }
    if last.phase == Phase::Repair && repairs < settings.repair_steps {
        return Some(Phase::Repair);
    }
    let contrasts = contrasts(steps);
    let reached = last
        .refusing
        .is_some_and(|refusing| refusing >= settings.aim);
    match last.phase {
        _ if !reached && contrasts < settings.steps => Some(Phase::Contrast),
        Phase::Contrast if settings.repair_steps > 0 => Some(Phase::Repair),
        _ => None,
    }
}

fn contrasts(steps: &[StepRecord]) -> usize {
    let contrast = |step: &&StepRecord| step.phase == Phase::Contrast;
    steps.iter().filter(contrast).count()
}

/// The length of a repair step that undid what the contrast had reached within the budget.
const TAKEN_BACK: Option<f64> = Some(0.0);

fn repairs_in_a_row(steps: &[StepRecord]) -> usize {
    steps
        .iter()
        .rev()
        .take_while(|step| step.phase == Phase::Repair)
        .count()
}

/// A run between two steps, and the buffers of one.
struct Run<'r> {
    settings: &'r Adaptive,
    rows: &'r Rows,
    openings: &'r [EncodedRow],
    refusals: &'r [EncodedRow],
    /// Places of the harmful rows that steps learn from, in their order.
    learn: Vec<usize>,
    held_back: &'r HeldBack<'r>,
    guards: Vec<Guard<'r>>,
    delta: TargetTensors,
    /// The last contrast's direction, of norm 1.
    along: TargetTensors,
    gradient: TargetTensors,
    steps: Vec<StepRecord>,
}

impl Run<'_> {
    fn step(&mut self, engine: &mut Engine<'_, '_>, phase: Phase) -> Result<(), OptimizeError> {
        let step = self.steps.len();
        engine.step = step;
        let mut record = StepRecord::new(step, phase);
        let (direction, length) = match phase {
            Phase::Repair => self.repair(engine, &mut record)?,
            Phase::Contrast | Phase::Outer => self.contrast(engine, &mut record)?,
        };
        record.length = Some(length);
        let before = self.advance(direction, length);
        match phase {
            Phase::Repair if contrasts(&self.steps) == self.settings.steps => {
                let least = self.reached().min(self.settings.aim);
                let refusing = self.measure(engine)?;
                record.refusing = Some(refusing);
                if refusing < least && !self.is_beyond_budget(engine, &before)? {
                    self.delta = before;
                    record.refusing = Some(self.reached());
                    record.length = TAKEN_BACK;
                }
            }
            Phase::Repair if repairs_in_a_row(&self.steps) + 1 < self.settings.repair_steps => {}
            Phase::Repair | Phase::Contrast | Phase::Outer => {
                drop(before);
                record.refusing = Some(self.measure(engine)?);
            }
        }
        record.norm = self.delta.norm();
        engine.observer.step(&record);
        self.steps.push(record);
        engine.observer.state(&State {
            steps: self.steps.clone(),
            tensors: vec![
                ("delta".to_owned(), Cow::Borrowed(&self.delta)),
                ("along".to_owned(), Cow::Borrowed(&self.along)),
            ],
        });
        Ok(())
    }

    /// The direction and length of a contrast step; `along` becomes the contrast before the guards.
    fn contrast(
        &mut self,
        engine: &mut Engine<'_, '_>,
        record: &mut StepRecord,
    ) -> Result<(TargetTensors, f64), OptimizeError> {
        let settings = self.settings;
        let places: Vec<usize> = self
            .next_batch()
            .into_iter()
            .map(|place| self.learn[place])
            .collect();
        let openings = Batch::new(Set::Harmful, self.openings, places.clone());
        let point = Point::stored().moved(1.0, &self.delta);
        let h = engine.capped_gradient(point, &openings, settings.cap, &mut self.gradient)?;
        self.along.clear();
        let pushes = h.norm > 0.0;
        if pushes {
            self.along.add_scaled(factor(1.0 / h.norm), &self.gradient);
        }
        let refusals = Batch::new(Set::Refusals, self.refusals, places);
        let r = engine.gradient(point, &refusals, &mut self.gradient)?;
        let overlap = self.along.dot(&self.gradient) / r.norm;
        self.along
            .add_scaled(factor(-settings.alpha / r.norm), &self.gradient);
        let norm = self.along.norm();
        self.along.scale(factor(1.0 / norm));
        record.h = Some(h.loss);
        record.grad_h = Some(h.norm);
        record.r = Some(r.loss);

        let h_part = if pushes {
            h.norm * (1.0 - settings.alpha * overlap)
        } else {
            0.0
        };
        let slope = (h_part + r.norm * (settings.alpha - overlap)) / norm;
        let length = self.steps.first().and_then(|first| first.length);
        let length = length
            .or(settings.step_length)
            .unwrap_or(settings.gain / slope.abs());

        let mut direction = self.along.clone();
        #[expect(clippy::cast_precision_loss, reason = "one or two guards")]
        let share = settings.guard_share / self.guards.len() as f64;
        for guard in &self.guards {
            let found =
                guard.gradient(engine, point, settings.batch, record, &mut self.gradient)?;
            let Some(Gradient { norm, .. }) = found else {
                continue;
            };
            let conflict = direction.dot(&self.gradient) / norm;
            if conflict > 0.0 {
                direction.add_scaled(factor(-conflict / norm), &self.gradient);
                direction.scale(factor(1.0 / direction.norm()));
            }
            direction.add_scaled(factor(-share / norm), &self.gradient);
        }
        Ok((direction, length))
    }

    /// The direction and length of a repair step.
    fn repair(
        &mut self,
        engine: &mut Engine<'_, '_>,
        record: &mut StepRecord,
    ) -> Result<(TargetTensors, f64), OptimizeError> {
        let settings = self.settings;
        let point = Point::stored().moved(1.0, &self.delta);
        let mut direction = self.delta.zeros_like();
        for guard in &self.guards {
            let found =
                guard.gradient(engine, point, settings.batch, record, &mut self.gradient)?;
            if let Some(Gradient { norm, .. }) = found {
                direction.add_scaled(factor(-1.0 / norm), &self.gradient);
            }
        }
        direction.scale(factor(1.0 / direction.norm()));
        let opposed = direction.dot(&self.along);
        if opposed < 0.0 {
            direction.add_scaled(factor(-opposed), &self.along);
        }
        let contrast = self
            .steps
            .first()
            .and_then(|first| first.length)
            .unwrap_or(0.0);
        #[expect(clippy::cast_precision_loss, reason = "a handful of steps")]
        let done = repairs_in_a_row(&self.steps) as f64 / settings.repair_steps as f64;
        Ok((
            direction,
            contrast * settings.repair_length * (1.0 - 0.75 * done),
        ))
    }

    /// The share of held-back requests that are refused now.
    fn measure(&self, engine: &mut Engine<'_, '_>) -> Result<f64, OptimizeError> {
        Ok(self.held_back.measure(engine, self.point())?.refusing)
    }

    /// The share that was measured last.
    fn reached(&self) -> f64 {
        let mut measured = self.steps.iter().rev().filter_map(|step| step.refusing);
        measured.next().unwrap_or(0.0)
    }

    /// Whether `delta` costs more than the result may, so that it would be shrunk.
    fn is_beyond_budget(
        &self,
        engine: &mut Engine<'_, '_>,
        delta: &TargetTensors,
    ) -> Result<bool, OptimizeError> {
        let Radius::Auto(budget) = self.settings.rho else {
            return Ok(false);
        };
        let search = Search::new(engine, self.rows, budget)?;
        let RadiusPoint { kl, task, .. } = search.measure(engine, delta, 1.0)?;
        Ok(!budget.allows(kl, task))
    }

    /// The stored weights plus delta.
    fn point(&self) -> Point<'_> {
        Point::stored().moved(1.0, &self.delta)
    }

    /// Places among `learn` of the next contrast step's rows.
    fn next_batch(&self) -> Vec<usize> {
        let size = self.settings.batch.min(self.learn.len());
        wrapping(self.learn.len(), size, contrasts(&self.steps))
    }

    /// Moves delta by `length` times `direction`, back onto the ball where it leaves it. Returns delta as it was.
    fn advance(&mut self, mut direction: TargetTensors, length: f64) -> TargetTensors {
        direction.scale(factor(length));
        direction.add_scaled(1.0, &self.delta);
        let before = std::mem::replace(&mut self.delta, direction);
        if let Radius::Fixed(rho) = self.settings.rho {
            let norm = self.delta.norm();
            if norm > rho {
                self.delta.scale(factor(rho / norm));
            }
        }
        before
    }

    fn resume(&mut self, mut state: State<'_>) -> Result<(), OptimizeError> {
        let shape: Vec<usize> = self.delta.iter().map(<[f32]>::len).collect();
        [self.delta, self.along] = state.take(["delta", "along"], &shape)?;
        self.steps = state.steps;
        Ok(())
    }
}

/// Shrinks delta to the budget, and measures the result.
fn finish(
    engine: &mut Engine<'_, '_>,
    rows: &Rows,
    settings: &Adaptive,
    mut delta: TargetTensors,
    steps: Vec<StepRecord>,
    held_back: &HeldBack<'_>,
) -> Result<Outcome, OptimizeError> {
    engine.step = steps.len();
    let norm = delta.norm();
    delta.scale(factor(1.0 / norm));
    let (radius, radii, at_end) = match settings.rho {
        Radius::Auto(budget) => {
            let search = Search::new(engine, rows, budget)?;
            let found = search.largest(engine, &delta, Some(norm))?;
            let at_end = found
                .tried
                .iter()
                .copied()
                .find(|point| point.rho == found.radius);
            (found.radius, found.tried, at_end)
        }
        Radius::Fixed(_) => {
            let search = Search::new(engine, rows, Budget::default())?;
            (
                norm,
                Vec::new(),
                Some(search.measure(engine, &delta, norm)?),
            )
        }
    };
    delta.scale(factor(radius));
    let after = held_back.measure(engine, Point::stored().moved(1.0, &delta))?;
    let before = held_back.measure(engine, Point::stored())?;
    let results = results(delta.norm(), &before, &after, at_end);
    Ok(Outcome {
        delta,
        steps,
        radii,
        results,
    })
}

/// What a run measured at its end, by name.
pub(super) fn results(
    norm: f64,
    before: &Measured,
    after: &Measured,
    at_end: Option<RadiusPoint>,
) -> Vec<(&'static str, f64)> {
    let mut results = vec![
        ("delta_norm", norm),
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
    results
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The phases of a run whose held-back requests refuse as `measured` says, measurement after measurement.
    fn phases(settings: &Adaptive, measured: &[f64]) -> String {
        let mut steps: Vec<StepRecord> = Vec::new();
        let mut measured = measured.iter().copied();
        let mut letters = String::new();
        while let Some(phase) = next_phase(settings, &steps) {
            let mut record = StepRecord::new(steps.len(), phase);
            let last_repair = repairs_in_a_row(&steps) + 1 == settings.repair_steps;
            if phase == Phase::Contrast || last_repair {
                record.refusing = Some(measured.next().expect("a measurement"));
            }
            letters.push(if phase == Phase::Contrast { 'c' } else { 'r' });
            steps.push(record);
        }
        letters
    }

    #[test]
    fn half_a_power_evens_blocks_out_at_the_same_norm() {
        let target = |block| Target {
            name: "x".to_owned(),
            shape: [1, 2],
            block,
        };
        let targets = [target(0), target(0), target(4), target(5)];
        let given = TargetTensors::new(vec![
            vec![3.0, 0.0],
            vec![0.0, 4.0],
            vec![12.0, 0.0],
            vec![0.0; 2],
        ]);
        let mut even = given.clone();
        share_out(&mut even, &targets, -0.5);
        let norms = even.norms();
        let block = (norms[0].powi(2) + norms[1].powi(2)).sqrt();
        assert!((block / norms[2] - 1.0).abs() < 1e-6, "{norms:?}");
        assert!((norms[1] / norms[0] - 4.0 / 3.0).abs() < 1e-6, "{norms:?}");
        assert_eq!(norms[3], 0.0);
        assert!((even.norm() / 13.0 - 1.0).abs() < 1e-6);
        let mut same = given.clone();
        share_out(&mut same, &targets, 0.0);
        assert_eq!(same, given);
    }

    #[test]
    fn contrast_runs_to_the_aim_and_again_when_repair_undoes_it() {
        let settings = Adaptive {
            steps: 4,
            repair_steps: 2,
            aim: 0.9,
            ..Adaptive::default()
        };
        assert_eq!(phases(&settings, &[0.5, 0.95, 0.95]), "ccrr");
        assert_eq!(phases(&settings, &[0.95, 0.5, 0.95, 0.9]), "crrcrr");
        assert_eq!(phases(&settings, &[0.1, 0.2, 0.3, 0.4, 0.4]), "ccccrr");
        let never = Adaptive {
            repair_steps: 0,
            ..settings
        };
        assert_eq!(phases(&never, &[0.1, 0.9]), "cc");
    }
}
