//! Many settings of the adaptive method tried on one model, and the best perturbation of them.
//!
//! In: a [`Differentiable`] model, [`Rows`], a [`Space`] of settings, a number of trials. Out: a [`SearchOutcome`]: every [`Trial`] with what it
//! reached, the front of harm against cost, and the perturbation that leaves the least harm within the [`Budget`].
//!
//! A trial's direction takes gradients and is dear; radii along it take forward passes and are cheap, so each direction is measured at
//! several. What is measured, no trial learned from: a seeded part of each set is set apart, where the set has rows enough. The
//! chosen point is the best of many on those rows, so its numbers flatter it a little; rows that took no part in the search tell more.

mod front;
mod space;

use rand::RngExt;
use rand::seq::{IndexedRandom, SliceRandom};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use serde::{Deserialize, Serialize};

use super::adaptive::held_back::{HeldBack, deciding};
use super::adaptive::{self, Adaptive};
use super::engine::{Engine, OptimizeError, Set, factor};
use super::radius::{self, Budget, Radius, RadiusPoint};
use super::step::StepRecord;
use super::{Observer, Outcome, Rows, State};
use crate::model::{Differentiable, EncodedRow, Point, TargetTensors};
use crate::ranks::Group;

pub use front::TrialPoint;
pub use space::{Choice, Space, Value};

/// How to search.
#[derive(Clone, Debug)]
pub struct SearchSettings {
    /// What no dimension of the space sets. With [`Radius::Fixed`] each trial has the one radius that it ends at.
    pub base: Adaptive,
    /// What the chosen perturbation may cost, and where radii end.
    pub budget: Budget,
    /// What is varied.
    pub space: Space,
    /// How many settings are tried: the first are those of `base`.
    pub trials: usize,
}

/// Settings that were tried, and what they reached.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trial {
    /// The settings.
    pub choice: Choice,
    /// Steps that were taken.
    pub steps: usize,
    /// The perturbation at several radii, in the order of measuring.
    pub points: Vec<TrialPoint>,
    /// Why there is no perturbation, where there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
}

impl SearchOutcome {
    /// The point at `place`.
    pub fn point(&self, place: Place) -> &TrialPoint {
        &self.trials[place.trial].points[place.point]
    }
}

impl Trial {
    /// Its least harmful point within `budget`.
    pub fn best(&self, budget: Budget) -> Option<&TrialPoint> {
        front::least_harmful(&self.points, budget).map(|place| &self.points[place])
    }
}

/// A point of a trial.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Place {
    /// The trial, from 0 on.
    pub trial: usize,
    /// The point, from 0 on.
    pub point: usize,
}

/// Rows that trials are judged on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JudgedSet {
    /// Whose.
    pub set: Set,
    /// How many.
    pub rows: usize,
    /// Whether no trial learned from them. A set that is too small to be divided is learned from and judged on.
    pub apart: bool,
}

/// What a search found.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct SearchOutcome {
    /// The chosen perturbation, measured on the rows that trials are judged on.
    pub outcome: Outcome,
    /// The settings that it was made with.
    pub settings: Adaptive,
    /// All trials, in order.
    pub trials: Vec<Trial>,
    /// What a perturbation might cost.
    pub budget: Budget,
    /// The points that none is better than in both harm and cost, from the cheapest to the least harmful.
    pub front: Vec<Place>,
    /// The chosen point.
    pub chosen: Place,
    /// The rows that trials are judged on.
    pub judged: Vec<JudgedSet>,
}

/// Tries settings and takes the best. `resumed`: the first trials, of an earlier run with the same inputs.
///
/// The same inputs and settings give the same bits, on any number of threads, resumed or not. Held in memory is what one trial holds; the
/// chosen perturbation is found a second time at the end, unless it is the last trial's.
///
/// # Errors
/// As [`super::optimize`]; [`OptimizeError::NoTrial`] when nothing keeps to the budget; [`OptimizeError::State`] when `resumed` are not the
/// trials that this search would make. A loss or a gradient that is not finite ends the search in the first trial, and only the
/// trial in others.
pub fn search(
    decoder: &mut dyn Differentiable,
    rows: &Rows,
    settings: &SearchSettings,
    resumed: Vec<Trial>,
    observer: &mut dyn Observer,
) -> Result<SearchOutcome, OptimizeError> {
    search_among(
        &Group::default(),
        decoder,
        rows,
        settings,
        resumed,
        observer,
    )
}

/// The same by the ranks of `group`, as [`super::optimize_among`].
///
/// # Errors
/// As [`search`], the same on all ranks; [`OptimizeError::Ranks`] where another has left.
pub fn search_among(
    group: &Group,
    decoder: &mut dyn Differentiable,
    rows: &Rows,
    settings: &SearchSettings,
    resumed: Vec<Trial>,
    observer: &mut dyn Observer,
) -> Result<SearchOutcome, OptimizeError> {
    decoder.check_targets()?;
    let seed = settings.base.seed;
    let (learned, apart, judged) = divide(rows, seed);
    let deciding = deciding(&apart, settings.base.first_tokens);
    let judge = Judge {
        harm: HeldBack::whole(&deciding[0], &deciding[1]),
        cost: radius::Search::new(
            &mut Engine::new(decoder, &mut Quiet(observer)).among(group),
            &apart,
            settings.budget,
        )?,
        budget: settings.budget,
    };

    let mut trials: Vec<Trial> = Vec::with_capacity(settings.trials);
    let mut resumed = resumed.into_iter();
    let mut last: Option<(usize, Direction)> = None;
    for number in 0..settings.trials {
        let choice = propose(settings, &trials);
        let trial = match resumed.next() {
            Some(trial) if trial.choice == choice => trial,
            Some(_) => return Err(OptimizeError::State),
            None => {
                // Before the next takes its memory.
                drop(last.take());
                let adaptive = settings.space.apply(&choice, &settings.base);
                let mut quiet = Quiet(observer);
                let mut engine = Engine::new(decoder, &mut quiet).among(group);
                let (trial, direction) = match attempt(&mut engine, &learned, &judge, &adaptive) {
                    Ok((direction, points)) => {
                        let steps = direction.steps.len();
                        let trial = Trial {
                            choice,
                            steps,
                            points,
                            failure: None,
                        };
                        (trial, Some((number, direction)))
                    }
                    Err(error) if number > 0 && is_of_settings(&error) => {
                        let trial = Trial {
                            choice,
                            steps: 0,
                            points: Vec::new(),
                            failure: Some(error.to_string()),
                        };
                        (trial, None)
                    }
                    Err(error) => return Err(error),
                };
                last = direction;
                observer.trial(number, &trial);
                trial
            }
        };
        trials.push(trial);
    }

    let (places, points) = points_of(&trials);
    let chosen = front::least_harmful(&points, settings.budget)
        .ok_or_else(|| no_trial(settings, &points))?;
    let chosen = places[chosen];
    let adaptive = settings
        .space
        .apply(&trials[chosen.trial].choice, &settings.base);
    let mut quiet = Quiet(observer);
    let mut engine = Engine::new(decoder, &mut quiet).among(group);
    let direction = match last {
        Some((number, direction)) if number == chosen.trial => direction,
        other => {
            drop(other);
            Direction::find(&mut engine, &learned, &adaptive)?
        }
    };
    let point = trials[chosen.trial].points[chosen.point];
    Ok(SearchOutcome {
        outcome: judge.finish(&mut engine, direction, point.rho, &trials[chosen.trial])?,
        settings: adaptive,
        budget: settings.budget,
        front: front::front(&points, settings.budget)
            .into_iter()
            .map(|place| places[place])
            .collect(),
        chosen,
        judged,
        trials,
    })
}

/// The settings of the next trial: those of the base, then half of the time any of the space, and half of the time some near to those
/// of a trial on the front. The first half keeps all of the space within reach, however lucky an early trial was; the second makes
/// the most of what is known to be good, which a draw of all settings at once hits too seldom.
///
/// A function of the trials before it and of the seed alone, so that a resumed search goes on as it would have.
fn propose(settings: &SearchSettings, trials: &[Trial]) -> Choice {
    if trials.is_empty() {
        return settings.space.first();
    }
    let mut generator = ChaCha8Rng::seed_from_u64(settings.base.seed);
    generator.set_stream(trials.len() as u64);
    let (places, points) = points_of(trials);
    let mut parents: Vec<usize> = front::front(&points, settings.budget)
        .into_iter()
        .map(|place| places[place].trial)
        .collect();
    parents.sort_unstable();
    parents.dedup();
    let mut choice = Choice::default();
    for _ in 0..REDRAWS {
        choice = match (generator.random_bool(0.5), parents.choose(&mut generator)) {
            (true, Some(&parent)) => settings.space.near(&trials[parent].choice, &mut generator),
            _ => settings.space.draw(&mut generator),
        };
        if trials.iter().all(|trial| trial.choice != choice) {
            break;
        }
    }
    choice
}

/// A perturbation of norm 1.
struct Direction {
    unit: TargetTensors,
    /// The norm before.
    norm: f64,
    steps: Vec<StepRecord>,
}

impl Direction {
    fn find(
        engine: &mut Engine<'_, '_>,
        rows: &Rows,
        settings: &Adaptive,
    ) -> Result<Self, OptimizeError> {
        let (mut unit, steps) = adaptive::direction(engine, rows, settings)?;
        let norm = unit.norm();
        unit.scale(factor(1.0 / norm));
        Ok(Self { unit, norm, steps })
    }
}

fn attempt(
    engine: &mut Engine<'_, '_>,
    rows: &Rows,
    judge: &Judge<'_>,
    settings: &Adaptive,
) -> Result<(Direction, Vec<TrialPoint>), OptimizeError> {
    let direction = Direction::find(engine, rows, settings)?;
    engine.step = direction.steps.len();
    let points = match settings.rho {
        Radius::Fixed(_) => vec![judge.measure(engine, &direction.unit, direction.norm)?],
        Radius::Auto(_) => judge.along(engine, &direction)?,
    };
    Ok((direction, points))
}

/// Measures perturbations on rows that no trial learns from.
struct Judge<'r> {
    harm: HeldBack<'r>,
    cost: radius::Search<'r>,
    budget: Budget,
}

impl Judge<'_> {
    fn measure(
        &self,
        engine: &mut Engine<'_, '_>,
        unit: &TargetTensors,
        rho: f64,
    ) -> Result<TrialPoint, OptimizeError> {
        let RadiusPoint { kl, task, .. } = self.cost.measure(engine, unit, rho)?;
        let harm = self
            .harm
            .measure(engine, Point::stored().moved(factor(rho), unit))?;
        Ok(TrialPoint {
            rho,
            unrefused: 1.0 - harm.refusing,
            doubt: harm.doubt,
            kl,
            task,
        })
    }

    /// Radii from small to large up to the first outside of the budget, smaller ones where none is within it, and two between the last
    /// within and the first without.
    fn along(
        &self,
        engine: &mut Engine<'_, '_>,
        direction: &Direction,
    ) -> Result<Vec<TrialPoint>, OptimizeError> {
        let mut points = Vec::new();
        let mut within = |radius: f64| match self.measure(engine, &direction.unit, radius) {
            Ok(point) => {
                points.push(point);
                Ok(point.keeps_to(self.budget))
            }
            // So far that there is no number for it.
            Err(OptimizeError::Loss { .. }) => Ok(false),
            Err(error) => Err(error),
        };
        let (mut inside, mut outside) = (None, None);
        for factor in FACTORS {
            let radius = factor * direction.norm;
            if !within(radius)? {
                outside = Some(radius);
                break;
            }
            inside = Some(radius);
        }
        for halving in 1..=HALVINGS {
            if inside.is_some() {
                break;
            }
            let radius = FACTORS[0] * direction.norm * 0.5f64.powi(halving);
            match within(radius)? {
                true => inside = Some(radius),
                false => outside = Some(radius),
            }
        }
        if let (Some(mut low), Some(mut high)) = (inside, outside) {
            for _ in 0..BISECTIONS {
                let middle = (low * high).sqrt();
                match within(middle)? {
                    true => low = middle,
                    false => high = middle,
                }
            }
        }
        Ok(points)
    }

    /// The perturbation of radius `rho`, measured again.
    fn finish(
        &self,
        engine: &mut Engine<'_, '_>,
        direction: Direction,
        rho: f64,
        trial: &Trial,
    ) -> Result<Outcome, OptimizeError> {
        let Direction {
            unit: mut delta,
            steps,
            ..
        } = direction;
        let at_end = self.cost.measure(engine, &delta, rho)?;
        delta.scale(factor(rho));
        let before = self.harm.measure(engine, Point::stored())?;
        let after = self
            .harm
            .measure(engine, Point::stored().moved(1.0, &delta))?;
        let radii = trial.points.iter().map(|point| RadiusPoint {
            rho: point.rho,
            kl: point.kl,
            task: point.task,
        });
        Ok(Outcome {
            results: adaptive::results(delta.norm(), &before, &after, Some(at_end)),
            delta,
            steps,
            radii: radii.collect(),
        })
    }
}

/// The rows to learn from, those to judge on, and what became of each set.
fn divide(rows: &Rows, seed: u64) -> (Rows, Rows, Vec<JudgedSet>) {
    let mut judged = Vec::new();
    // For each row of a set, whether it is learned from and whether it is judged on.
    let mut roles = |set: Set, rows: &[EncodedRow]| -> Vec<(bool, bool)> {
        let mut places: Vec<usize> = (0..rows.len()).collect();
        let mut generator = ChaCha8Rng::seed_from_u64(seed);
        // Beside the streams of trials.
        generator.set_stream(u64::MAX - set as u64);
        places.shuffle(&mut generator);
        let apart = rows.len() >= ENOUGH;
        let mut roles = vec![(true, !apart); rows.len()];
        if apart {
            for &place in places.iter().take((rows.len() / ONE_OF).min(MOST)) {
                roles[place] = (false, true);
            }
        }
        judged.push(JudgedSet {
            set,
            rows: roles.iter().filter(|(_, judges)| *judges).count(),
            apart,
        });
        roles
    };
    let harmful = roles(Set::Harmful, &rows.harmful);
    let task = roles(Set::Task, &rows.task);
    let benign = roles(Set::Benign, &rows.benign);
    let part = |role: fn(&(bool, bool)) -> bool| {
        let of = |rows: &[EncodedRow], roles: &[(bool, bool)]| -> Vec<EncodedRow> {
            let rows = rows.iter().zip(roles).filter(|(_, it)| role(it));
            rows.map(|(row, _)| row.clone()).collect()
        };
        Rows {
            harmful: of(&rows.harmful, &harmful),
            refusals: of(&rows.refusals, &harmful),
            task: of(&rows.task, &task),
            benign: of(&rows.benign, &benign),
        }
    };
    (part(|it| it.0), part(|it| it.1), judged)
}

/// All points of all trials, with their places.
fn points_of(trials: &[Trial]) -> (Vec<Place>, Vec<TrialPoint>) {
    let places = trials.iter().enumerate().flat_map(|(trial, of_trial)| {
        let points = of_trial.points.iter().enumerate();
        points.map(move |(point, measured)| (Place { trial, point }, *measured))
    });
    places.unzip()
}

/// Whether other settings may do without it.
fn is_of_settings(error: &OptimizeError) -> bool {
    matches!(
        error,
        OptimizeError::Loss { .. } | OptimizeError::Gradient { .. }
    )
}

fn no_trial(settings: &SearchSettings, points: &[TrialPoint]) -> OptimizeError {
    let cost = |point: &&TrialPoint| point.cost(settings.budget);
    let nearest = points
        .iter()
        .min_by(|a, b| cost(a).total_cmp(&cost(b)))
        .map(|point| RadiusPoint {
            rho: point.rho,
            kl: point.kl,
            task: point.task,
        });
    OptimizeError::NoTrial {
        trials: settings.trials,
        nearest,
    }
}

/// Passes on progress and interruptions. Steps of trials are many, and no state between two of them is kept.
struct Quiet<'o>(&'o mut dyn Observer);

impl Observer for Quiet<'_> {
    fn progress(&mut self, what: &str, done: usize, total: usize) {
        self.0.progress(what, done, total);
    }

    fn step(&mut self, _record: &StepRecord) {}

    fn state(&mut self, _state: &State<'_>) {}

    fn interrupted(&self) -> bool {
        self.0.interrupted()
    }

    fn stop(&mut self) {
        self.0.stop();
    }
}

/// Draws of a choice that has not been tried.
const REDRAWS: usize = 16;

/// Radii along a direction, as shares of the norm that the steps gave it.
const FACTORS: [f64; 6] = [0.35, 0.5, 0.7, 1.0, 1.4, 2.0];

/// Halvings of the smallest of them, where none is within the budget.
const HALVINGS: i32 = 8;

/// Bisections between the last radius within the budget and the first without.
const BISECTIONS: usize = 2;

/// Radii at which a direction is measured, at most.
pub const MOST_RADII: usize = 1 + 8 + BISECTIONS;

/// A set of fewer rows is not divided.
const ENOUGH: usize = 16;

/// One of this many rows is set apart to judge on.
const ONE_OF: usize = 4;

/// Most rows of a set to judge on: every radius of every trial computes them.
const MOST: usize = 64;
