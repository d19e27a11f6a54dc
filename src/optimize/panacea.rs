//! The paper's method, faithful to its equations, on a finished checkpoint.
//!
//! ```text
//! for t in 0..T:
//!     eps = rho grad h(w) / |grad h(w)|
//!     d   = grad g(w) - lambda (grad h(w + eps) - grad h(w))
//!     w   = AdamW(w, clip(d, 1), eta)
//! eps   = rho grad H(w_T) / |grad H(w_T)|       H: the whole harmful set
//! delta = (w_T - w0) + eps
//! ```
//!
//! The harmful loss is never clamped, as the reference code does at 5: above the clamp its gradient vanishes, so the
//! regularizer would change sign exactly when the perturbation has succeeded. w + eps is a buffer of its own: nothing is
//! added in place and subtracted back.
//!
//! Source: Panacea, arXiv:2501.18100, algorithm 1.

use std::borrow::Cow;

use super::adamw::{AdamW, Rates};
use super::engine::{Batch, Engine, OptimizeError, Set, factor, wrapping};
use super::radius::{Radius, Search};
use super::step::{Phase, StepRecord};
use super::{CLIP, Outcome, Rows, State};
use crate::model::{Point, TargetTensors};

/// Added to |grad h| before dividing, so that eps of a zero gradient would be zero; the reference code's value.
const NORM_EPSILON: f64 = 1e-7;

/// Settings of the paper's method, under its names.
#[derive(Clone, Debug, PartialEq)]
pub struct Panacea {
    /// Perturbation intensity: the norm of eps.
    pub rho: Radius,
    /// Regularizer intensity.
    pub lambda: f64,
    /// Learning rate eta.
    pub lr: f64,
    /// AdamW's weight decay; 0 leaves finished weights as they are. The reference code has 0.1, on an adapter's A and B.
    pub weight_decay: f64,
    /// Iterations T; 0 gives eps alone and needs no task set.
    pub steps: usize,
    /// Rows of each set in a step.
    pub batch: usize,
    /// Which gradient the last eps is along.
    pub final_eps: FinalEps,
    /// What is returned.
    pub part: Part,
}

impl Default for Panacea {
    fn default() -> Self {
        Self {
            rho: Radius::Fixed(1.0),
            lambda: 0.001,
            lr: 2e-5,
            weight_decay: 0.0,
            steps: 0,
            batch: 10,
            final_eps: FinalEps::Whole,
            part: Part::Sum,
        }
    }
}

/// Which gradient the final eps is along.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FinalEps {
    /// That of the whole harmful set, at w_T.
    #[default]
    Whole,
    /// That of the last step's batch, at w_(T-1), as in the reference code.
    LastBatch,
}

/// Which part of the method's result is the perturbation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Part {
    /// (w_T - w0) + eps.
    #[default]
    Sum,
    /// eps alone.
    Eps,
    /// w_T - w0 alone.
    Drift,
}

pub(super) fn run(
    engine: &mut Engine<'_, '_>,
    rows: &Rows,
    settings: &Panacea,
    resumed: Option<State<'_>>,
) -> Result<Outcome, OptimizeError> {
    let needs = |set, rows: &[_]| match rows.is_empty() {
        true => Err(OptimizeError::NoRows {
            method: "panacea",
            set,
        }),
        false => Ok(()),
    };
    needs(Set::Harmful, &rows.harmful)?;
    let whole = Batch::whole(Set::Harmful, &rows.harmful);
    let mut h = engine.zeros();
    let mut radii = Vec::new();
    let rho = match settings.rho {
        Radius::Fixed(rho) => rho,
        Radius::Auto(budget) => {
            let found = engine.gradient(Point::stored(), &whole, &mut h)?;
            h.scale(factor(1.0 / found.norm));
            let search = Search::new(engine, rows, budget)?;
            let rho = search.largest(engine, &h, None)?;
            radii = rho.tried;
            rho.radius
        }
    };
    let mut results = vec![("rho", rho)];
    if settings.steps == 0 {
        let eps = eps_of(engine, Point::stored(), &whole, rho, h, &mut results)?;
        let delta = match settings.part {
            Part::Sum | Part::Eps => eps,
            Part::Drift => engine.zeros(),
        };
        results.extend([("drift_norm", 0.0), ("delta_norm", delta.norm())]);
        return Ok(Outcome {
            delta,
            steps: Vec::new(),
            radii,
            results,
        });
    }
    needs(Set::Task, &rows.task)?;
    let w = engine.decoder.target_values()?;
    let mut run = Run {
        eps: match settings.final_eps {
            FinalEps::Whole => TargetTensors::default(),
            FinalEps::LastBatch => engine.zeros(),
        },
        adam: AdamW::new(&w),
        w,
        steps: Vec::new(),
    };
    if let Some(state) = resumed {
        run.resume(state)?;
    }
    run.iterate(engine, rows, settings, rho, &mut h)?;
    let Run { w, eps, steps, .. } = run;
    let eps = match settings.final_eps {
        FinalEps::Whole => {
            engine.step = settings.steps;
            eps_of(engine, Point::at(&w), &whole, rho, h, &mut results)?
        }
        FinalEps::LastBatch => {
            drop(h);
            let moved = Point::at(&w).moved(1.0, &eps);
            results.push(("h_final_eps", engine.loss(moved, &whole)?));
            results.push(("eps_norm", eps.norm()));
            eps
        }
    };
    let mut drift = w;
    engine.decoder.subtract_stored(&mut drift)?;
    results.push(("drift_norm", drift.norm()));
    let delta = match settings.part {
        Part::Sum => {
            drift.add_scaled(1.0, &eps);
            drift
        }
        Part::Eps => eps,
        Part::Drift => drift,
    };
    results.push(("delta_norm", delta.norm()));
    Ok(Outcome {
        delta,
        steps,
        radii,
        results,
    })
}

/// rho grad H / |grad H| at `point`, in the place of `h`; what is measured on the way goes to `results`.
fn eps_of(
    engine: &mut Engine<'_, '_>,
    point: Point<'_>,
    whole: &Batch<'_>,
    rho: f64,
    mut h: TargetTensors,
    results: &mut Vec<(&'static str, f64)>,
) -> Result<TargetTensors, OptimizeError> {
    let found = engine.gradient(point, whole, &mut h)?;
    h.scale(factor(rho / (found.norm + NORM_EPSILON)));
    results.extend([("h_final", found.loss), ("grad_h_final", found.norm)]);
    results.push(("h_final_eps", engine.loss(point.moved(1.0, &h), whole)?));
    results.push(("eps_norm", h.norm()));
    Ok(h)
}

/// The outer loop's variables.
struct Run {
    w: TargetTensors,
    /// The last step's; empty when it is not asked for.
    eps: TargetTensors,
    adam: AdamW,
    steps: Vec<StepRecord>,
}

impl Run {
    fn iterate(
        &mut self,
        engine: &mut Engine<'_, '_>,
        rows: &Rows,
        settings: &Panacea,
        rho: f64,
        h: &mut TargetTensors,
    ) -> Result<(), OptimizeError> {
        let (mut d, mut beyond) = (engine.zeros(), engine.zeros());
        for step in self.steps.len()..settings.steps {
            engine.step = step;
            let places = |len| wrapping(len, settings.batch, step);
            let harmful = Batch::new(Set::Harmful, &rows.harmful, places(rows.harmful.len()));
            let task = Batch::new(Set::Task, &rows.task, places(rows.task.len()));
            let found_g = engine.gradient(Point::at(&self.w), &task, &mut d)?;
            let found_h = engine.gradient(Point::at(&self.w), &harmful, h)?;
            // d = grad g + lambda (grad h - grad h(w + eps)), and eps in the place of grad h.
            let lambda = factor(settings.lambda);
            d.add_scaled(lambda, h);
            h.scale(factor(rho / (found_h.norm + NORM_EPSILON)));
            let moved = Point::at(&self.w).moved(1.0, h);
            let found_h_eps = engine.gradient(moved, &harmful, &mut beyond)?;
            if settings.final_eps == FinalEps::LastBatch {
                self.eps.copy_from(h);
            }
            d.add_scaled(-lambda, &beyond);
            let clip = (CLIP / (d.norm() + 1e-6)).min(1.0);
            d.scale(factor(clip));
            let count = i32::try_from(step + 1).unwrap_or(i32::MAX);
            let rates = Rates {
                lr: settings.lr,
                weight_decay: settings.weight_decay,
            };
            self.adam.step(&mut self.w, &mut d, rates, count);
            // d is free until the next gradient is written to it.
            d.copy_from(&self.w);
            engine.decoder.subtract_stored(&mut d)?;
            let record = StepRecord {
                g: Some(found_g.loss),
                h: Some(found_h.loss),
                h_eps: Some(found_h_eps.loss),
                grad_h: Some(found_h.norm),
                clip: Some(clip),
                norm: d.norm(),
                ..StepRecord::new(step, Phase::Outer)
            };
            engine.observer.step(&record);
            self.steps.push(record);
            engine.observer.state(&self.state());
        }
        Ok(())
    }

    fn state(&self) -> State<'_> {
        let named = [
            ("w", &self.w),
            ("eps", &self.eps),
            ("m", &self.adam.m),
            ("v", &self.adam.v),
        ];
        State {
            steps: self.steps.clone(),
            tensors: named
                .map(|(name, tensors)| (name.to_owned(), Cow::Borrowed(tensors)))
                .into(),
        }
    }

    fn resume(&mut self, mut state: State<'_>) -> Result<(), OptimizeError> {
        let shape = self.w.iter().map(<[f32]>::len).collect::<Vec<_>>();
        let [w, m, v] = state.take(["w", "m", "v"], &shape)?;
        let shape = self.eps.iter().map(<[f32]>::len).collect::<Vec<_>>();
        [self.eps] = state.take(["eps"], &shape)?;
        self.w = w;
        self.adam = AdamW { m, v };
        self.steps = state.steps;
        Ok(())
    }
}
