//! How far a perturbation may go: a number, or the largest radius that ordinary text hardly notices.
//!
//! In: a direction. Out: the largest radius along it whose mean KL divergence from the unpatched model on benign text, and
//! whose rise of the task loss, stay within a [`Budget`]. The search doubles or halves until it has one radius inside and one
//! outside, then bisects the logarithm of the radius.

use serde::Serialize;
use thiserror::Error;

use super::Rows;
use super::engine::{Batch, Engine, OptimizeError, Set, factor};
use crate::model::{Point, TargetTensors};

/// Where a search without a limit starts, as a share of the norm of the targets.
const START: f64 = 1e-3;

/// Doublings or halvings before the search gives up.
const DOUBLINGS: usize = 12;

/// Bisections of the last factor of two: the radius found is within 5% of the largest.
const BISECTIONS: usize = 4;

/// Task rows that a search looks at: its every trial computes them.
const TASK_ROWS: usize = 64;

/// The norm of a perturbation, over all targets together, in the weights' unit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Radius {
    /// The largest that keeps to the budget.
    Auto(Budget),
    /// This one; finite and above 0.
    Fixed(f64),
}

impl Radius {
    /// A given radius.
    ///
    /// # Errors
    /// [`RadiusError`] unless it is finite and above 0.
    pub fn fixed(rho: f64) -> Result<Self, RadiusError> {
        if rho.is_finite() && rho > 0.0 {
            Ok(Self::Fixed(rho))
        } else {
            Err(RadiusError { rho })
        }
    }
}

/// A radius that is none.
#[derive(Clone, Copy, Debug, Error, PartialEq)]
#[error("rho is {rho}, where a finite number above 0 belongs")]
#[non_exhaustive]
pub struct RadiusError {
    /// What was given.
    pub rho: f64,
}

/// What a search may cost.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Budget {
    /// Mean KL divergence from the unpatched model on benign text, in nats per token.
    pub kl: f64,
    /// Rise of the task loss, in nats per token.
    pub task: f64,
}

impl Default for Budget {
    fn default() -> Self {
        Self { kl: 0.1, task: 0.1 }
    }
}

impl Budget {
    /// Whether this divergence and this rise of the task loss, where there is one, are no more.
    pub(super) fn allows(self, kl: f64, task: Option<f64>) -> bool {
        kl <= self.kl && task.is_none_or(|rise| rise <= self.task)
    }
}

/// What one radius costs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct RadiusPoint {
    /// The radius.
    pub rho: f64,
    /// Mean KL divergence on benign text, in nats per token.
    pub kl: f64,
    /// Task loss minus the unpatched model's, in nats per token; absent without a task set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub task: Option<f64>,
}

/// A radius, and the trials that led to it.
pub(super) struct Found {
    pub(super) radius: f64,
    pub(super) tried: Vec<RadiusPoint>,
}

/// Measures perturbations of one model against one budget.
pub(super) struct Search<'s> {
    benign: Batch<'s>,
    reference: Vec<Vec<f32>>,
    task: Option<(Batch<'s>, f64)>,
    budget: Budget,
}

impl<'s> Search<'s> {
    pub(super) fn new(
        engine: &mut Engine<'_, '_>,
        rows: &'s Rows,
        budget: Budget,
    ) -> Result<Self, OptimizeError> {
        if rows.benign.is_empty() {
            return Err(OptimizeError::NoRows {
                method: "a search for rho",
                set: Set::Benign,
            });
        }
        let benign = Batch::whole(Set::Benign, &rows.benign);
        let reference = engine.reference(Point::stored(), &benign)?;
        let task = match rows.task.len().min(TASK_ROWS) {
            0 => None,
            some => {
                let batch = Batch::new(Set::Task, &rows.task, (0..some).collect());
                let loss = engine.loss(Point::stored(), &batch)?;
                Some((batch, loss))
            }
        };
        Ok(Self {
            benign,
            reference,
            task,
            budget,
        })
    }

    /// What `radius * unit` costs.
    pub(super) fn measure(
        &self,
        engine: &mut Engine<'_, '_>,
        unit: &TargetTensors,
        radius: f64,
    ) -> Result<RadiusPoint, OptimizeError> {
        let moved = Point::stored().moved(factor(radius), unit);
        let kl = engine.divergence(moved, &self.benign, &self.reference)?;
        let task = match &self.task {
            None => None,
            Some((batch, before)) => Some(engine.loss(moved, batch)? - before),
        };
        Ok(RadiusPoint {
            rho: radius,
            kl,
            task,
        })
    }

    /// The largest radius along `unit` (of norm 1) within the budget; at most `limit`, where one is given.
    pub(super) fn largest(
        &self,
        engine: &mut Engine<'_, '_>,
        unit: &TargetTensors,
        limit: Option<f64>,
    ) -> Result<Found, OptimizeError> {
        let start = match limit {
            Some(limit) => limit,
            None => START * engine.decoder.target_norm()?,
        };
        let mut tried = Vec::new();
        let mut within = |radius: f64| -> Result<bool, OptimizeError> {
            let point = self.measure(engine, unit, radius)?;
            tried.push(point);
            Ok(self.budget.allows(point.kl, point.task))
        };
        let mut inside = None;
        let mut outside = None;
        let mut radius = start;
        for _ in 0..=DOUBLINGS {
            if within(radius)? {
                inside = Some(radius);
                if limit.is_some_and(|limit| radius >= limit) || outside.is_some() {
                    break;
                }
                radius *= 2.0;
            } else {
                outside = Some(radius);
                if inside.is_some() {
                    break;
                }
                radius /= 2.0;
            }
        }
        if let (Some(mut low), Some(mut high)) = (inside, outside) {
            for _ in 0..BISECTIONS {
                let middle = (low * high).sqrt();
                if within(middle)? {
                    low = middle
                } else {
                    high = middle
                }
            }
            inside = Some(low);
        }
        match (inside, tried.last()) {
            (Some(radius), _) => Ok(Found { radius, tried }),
            (None, last) => Err(OptimizeError::Budget {
                smallest: last.map_or(start, |point| point.rho),
                divergence: last.map_or(f64::NAN, |point| point.kl),
                budget: self.budget.kl,
            }),
        }
    }
}
