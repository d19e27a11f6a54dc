//! What a perturbation must hardly move: the task loss, and the model's distribution on benign text.
//!
//! In: weights. Out: a gradient along which the guard would rise.

use super::super::Rows;
use super::super::engine::{Batch, Engine, Gradient, OptimizeError, Set, wrapping};
use super::super::step::StepRecord;
use crate::model::{EncodedRow, Point, TargetTensors};

/// What must hardly move.
pub(super) enum Guard<'r> {
    /// The task loss, on batches of these rows.
    Task(&'r [EncodedRow]),
    /// The divergence from w0 on batches of benign rows, each with its reference.
    Benign(Vec<(Batch<'r>, Vec<Vec<f32>>)>),
}

impl<'r> Guard<'r> {
    /// The task, if there is one, and the benign rows, in batches of `size`.
    pub(super) fn all(
        engine: &mut Engine<'_, '_>,
        rows: &'r Rows,
        size: usize,
    ) -> Result<Vec<Self>, OptimizeError> {
        let mut guards = Vec::new();
        if !rows.task.is_empty() {
            guards.push(Self::Task(&rows.task));
        }
        let places: Vec<usize> = (0..rows.benign.len()).collect();
        let batches = places.chunks(size).map(|places| {
            let batch = Batch::new(Set::Benign, &rows.benign, places.to_vec());
            let reference = engine.reference(Point::stored(), &batch)?;
            Ok((batch, reference))
        });
        guards.push(Self::Benign(batches.collect::<Result<_, OptimizeError>>()?));
        Ok(guards)
    }

    /// The gradient on a batch of the step's own, its loss noted in `record`; `None` where there is none: a divergence is
    /// flat at its own reference.
    pub(super) fn gradient(
        &self,
        engine: &mut Engine<'_, '_>,
        point: Point<'_>,
        size: usize,
        record: &mut StepRecord,
        out: &mut TargetTensors,
    ) -> Result<Option<Gradient>, OptimizeError> {
        let step = record.step;
        match self {
            Self::Task(rows) => {
                let batch = Batch::new(Set::Task, rows, wrapping(rows.len(), size, step));
                let found = engine.gradient(point, &batch, out)?;
                record.g = Some(found.loss);
                Ok(Some(found))
            }
            Self::Benign(_) if step == 0 => Ok(None),
            Self::Benign(batches) => {
                let (batch, reference) = &batches[step % batches.len()];
                let found = engine.divergence_gradient(point, batch, reference, out)?;
                record.kl = Some(found.loss);
                Ok(Some(found))
            }
        }
    }
}
