//! A model that goes on when its device has not enough memory for a pack: with less kept, and then with less computed at once.
//!
//! In: a [`Differentiable`] model. Out: another one with the same losses and gradients, up to the order of sums. When a device says that
//! its memory is not enough, activations are computed again instead of kept; then packs are halved, between rows, down to single
//! rows; only then does the error come out, and the gradient holds those of some parts. What was learned is kept: later packs are as small
//! from the start.

use std::ops::Range;

use super::decoder::PackError;
use super::differentiable::Differentiable;
use super::head::{Objective, Predicted};
use super::pack::Pack;
use super::point::Point;
use super::targets::Target;
use super::tensors::TargetTensors;
use super::weights::WeightsError;

/// Computes packs in parts where they are too large for the device's memory.
#[derive(Debug)]
pub struct InParts<D> {
    whole: D,
    /// Tokens above which packs are halved.
    limit: usize,
    saves_memory: bool,
}

impl<D: Differentiable> InParts<D> {
    /// Packs are `whole`'s until its device refuses one.
    pub fn new(whole: D) -> Self {
        Self {
            whole,
            limit: usize::MAX,
            saves_memory: false,
        }
    }

    /// Whether activations are computed again because memory was not enough.
    pub fn saves_memory(&self) -> bool {
        self.saves_memory
    }

    /// Tokens above which packs are halved, if memory was not enough for some.
    pub fn limit(&self) -> Option<usize> {
        Some(self.limit).filter(|&limit| limit < usize::MAX)
    }

    /// Hands `work` the pack, or parts of it one after the other, each with the places of its predictions among the whole pack's.
    fn divide(
        &mut self,
        pack: &Pack,
        first: usize,
        work: &mut impl FnMut(&mut D, &Pack, Range<usize>) -> Result<(), PackError>,
    ) -> Result<(), PackError> {
        let is_row = pack.starts.len() <= 2;
        if is_row || pack.tokens.len() <= self.limit {
            let places = first..first + pack.predictions.len();
            let refused = loop {
                match work(&mut self.whole, pack, places.clone()) {
                    Err(PackError::Device(error)) if error.is_out_of_memory() => {
                        if !self.whole.save_memory() {
                            break error;
                        }
                        self.saves_memory = true;
                    }
                    other => return other,
                }
            };
            if is_row {
                return Err(refused.into());
            }
            let halves = pack.halves();
            self.limit = halves[0].tokens.len().max(halves[1].tokens.len());
        }
        let mut first = first;
        for half in &pack.halves() {
            self.divide(half, first, work)?;
            first += half.predictions.len();
        }
        Ok(())
    }
}

impl<D: Differentiable> Differentiable for InParts<D> {
    fn targets(&self) -> &[Target] {
        self.whole.targets()
    }

    fn stored_target(&self, index: usize) -> Result<Vec<f32>, WeightsError> {
        self.whole.stored_target(index)
    }

    fn shares_beginnings(&self) -> bool {
        self.whole.shares_beginnings()
    }

    fn losses(
        &mut self,
        point: Point<'_>,
        pack: &Pack,
        objective: Objective<'_>,
    ) -> Result<Vec<f64>, PackError> {
        let mut losses = Vec::with_capacity(pack.predictions.len());
        self.divide(pack, 0, &mut |whole, part, places| {
            let objective = of_part(objective, pack, places);
            losses.extend(whole.losses(point, part, objective)?);
            Ok(())
        })?;
        Ok(losses)
    }

    fn predicted(&mut self, point: Point<'_>, pack: &Pack) -> Result<Vec<Predicted>, PackError> {
        let mut predicted = Vec::with_capacity(pack.predictions.len());
        self.divide(pack, 0, &mut |whole, part, _| {
            predicted.extend(whole.predicted(point, part)?);
            Ok(())
        })?;
        Ok(predicted)
    }

    fn losses_and_gradient(
        &mut self,
        point: Point<'_>,
        pack: &Pack,
        objective: Objective<'_>,
        gradient: &mut TargetTensors,
    ) -> Result<Vec<f64>, PackError> {
        let mut losses = Vec::with_capacity(pack.predictions.len());
        self.divide(pack, 0, &mut |whole, part, places| {
            let objective = of_part(objective, pack, places);
            losses.extend(whole.losses_and_gradient(point, part, objective, gradient)?);
            Ok(())
        })?;
        Ok(losses)
    }

    fn reference(&mut self, point: Point<'_>, pack: &Pack) -> Result<Vec<f32>, PackError> {
        let mut hidden = Vec::new();
        self.divide(pack, 0, &mut |whole, part, _| {
            hidden.extend(whole.reference(point, part)?);
            Ok(())
        })?;
        Ok(hidden)
    }

    fn save_memory(&mut self) -> bool {
        self.whole.save_memory()
    }
}

/// The objective of the predictions at `places` of `pack`.
fn of_part<'a>(objective: Objective<'a>, pack: &Pack, places: Range<usize>) -> Objective<'a> {
    match objective {
        Objective::NextToken { cap } => Objective::NextToken { cap },
        Objective::Divergence { reference } => {
            let hidden = reference.len() / pack.predictions.len().max(1);
            Objective::Divergence {
                reference: &reference[places.start * hidden..places.end * hidden],
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::device::{DeviceError, DeviceErrorKind, DeviceName};
    use super::super::pack::EncodedRow;
    use super::*;

    /// A loss for each prediction that tells which token it is of, from a device of so much memory.
    #[derive(Debug)]
    struct Small {
        /// Tokens of the largest pack that it computes.
        room: usize,
        /// By how much more if it keeps nothing.
        spare: usize,
        computed: Vec<usize>,
    }

    impl Small {
        fn new(room: usize, spare: usize) -> InParts<Self> {
            InParts::new(Self {
                room,
                spare,
                computed: Vec::new(),
            })
        }

        fn compute(
            &mut self,
            pack: &Pack,
            shift: impl Fn(usize) -> f64,
        ) -> Result<Vec<f64>, PackError> {
            if pack.tokens.len() > self.room {
                let kind = DeviceErrorKind::OutOfMemory {
                    reason: "all of it is taken".to_owned(),
                };
                let device = DeviceName::Cuda(3);
                return Err(DeviceError { device, kind }.into());
            }
            self.computed.push(pack.tokens.len());
            let predictions = pack.predictions.iter().enumerate();
            let loss = |(place, it): (usize, &super::super::Prediction)| {
                assert_eq!(pack.tokens[it.position + 1], it.token);
                f64::from(it.token) + shift(place)
            };
            Ok(predictions.map(loss).collect())
        }
    }

    impl Differentiable for Small {
        fn targets(&self) -> &[Target] {
            &[]
        }

        fn stored_target(&self, _: usize) -> Result<Vec<f32>, WeightsError> {
            Ok(Vec::new())
        }

        fn shares_beginnings(&self) -> bool {
            true
        }

        fn losses(
            &mut self,
            _: Point<'_>,
            pack: &Pack,
            objective: Objective<'_>,
        ) -> Result<Vec<f64>, PackError> {
            self.compute(pack, |place| match objective {
                Objective::NextToken { .. } => 0.0,
                // Two hidden elements for each prediction.
                Objective::Divergence { reference } => {
                    assert_eq!(reference.len(), 2 * pack.predictions.len());
                    -f64::from(reference[2 * place])
                }
            })
        }

        fn predicted(
            &mut self,
            point: Point<'_>,
            pack: &Pack,
        ) -> Result<Vec<Predicted>, PackError> {
            let objective = Objective::NextToken { cap: f64::INFINITY };
            let losses = self.losses(point, pack, objective)?;
            let predictions = losses.iter().zip(&pack.predictions);
            let predicted = predictions.map(|(&loss, it)| Predicted {
                loss,
                likeliest: it.token,
            });
            Ok(predicted.collect())
        }

        fn losses_and_gradient(
            &mut self,
            _: Point<'_>,
            pack: &Pack,
            _: Objective<'_>,
            gradient: &mut TargetTensors,
        ) -> Result<Vec<f64>, PackError> {
            let losses = self.compute(pack, |_| 0.0)?;
            gradient.tensor_mut(0)[0] += 1.0;
            Ok(losses)
        }

        fn reference(&mut self, _: Point<'_>, pack: &Pack) -> Result<Vec<f32>, PackError> {
            self.compute(pack, |_| 0.0)?;
            #[expect(clippy::cast_precision_loss, reason = "small numbers")]
            let hidden = pack
                .predictions
                .iter()
                .flat_map(|it| [it.token as f32, 0.0]);
            Ok(hidden.collect())
        }

        fn save_memory(&mut self) -> bool {
            self.room += self.spare;
            std::mem::take(&mut self.spare) > 0
        }
    }

    /// Rows of these lengths behind ten common tokens; all tokens differ, and all but the first of each row's own are predicted.
    fn pack(lengths: &[usize]) -> (Pack, Vec<f64>) {
        let mut tokens = 100..;
        let rows: Vec<EncodedRow> = lengths
            .iter()
            .map(|&length| EncodedRow {
                tokens: (0..10).chain(tokens.by_ref().take(length)).collect(),
                in_loss: (0..10 + length).map(|i| i > 10).collect(),
            })
            .collect();
        let pack = Pack::sharing(&rows.iter().collect::<Vec<_>>());
        let predicted = pack.predictions.iter().map(|it| f64::from(it.token));
        let predicted = predicted.collect();
        (pack, predicted)
    }

    #[test]
    fn a_pack_that_does_not_fit_is_computed_in_parts() {
        let (pack, wanted) = pack(&[5, 7, 2, 9, 4, 6]);
        for (room, spare, parts) in [
            (43, 0, 1u8),
            (42, 0, 2),
            (42, 1, 1),
            (24, 0, 4),
            (20, 0, 5),
            (19, 0, 5),
            (10, 9, 5),
        ] {
            let mut model = Small::new(room, spare);
            let objective = Objective::NextToken { cap: f64::INFINITY };
            let found = model.losses(Point::stored(), &pack, objective);
            assert_eq!(found.as_ref(), Ok(&wanted), "{room} {spare}");
            let predicted = model.predicted(Point::stored(), &pack);
            let losses = predicted.expect("losses").into_iter().map(|it| it.loss);
            assert!(losses.eq(wanted.iter().copied()));
            assert_eq!(model.saves_memory(), spare > 0);
            assert_eq!(model.limit().is_some(), parts > 1);
            let reference = model
                .reference(Point::stored(), &pack)
                .expect("a reference");
            let objective = Objective::Divergence {
                reference: &reference,
            };
            let found = model.losses(Point::stored(), &pack, objective);
            assert_eq!(found, Ok(vec![0.0; wanted.len()]));
            let mut gradient = TargetTensors::new(vec![vec![0.0]]);
            let found = model.capped_loss_and_gradient(Point::stored(), &pack, 1.0, &mut gradient);
            assert_eq!(found.map(|it| it.sum), Ok(wanted.iter().sum()));
            // Known from the first time on: no more is refused.
            assert_eq!(gradient.tensor(0), [f32::from(parts)]);
        }
    }

    #[test]
    fn a_row_that_does_not_fit_is_refused_by_the_device() {
        let (pack, _) = pack(&[5, 7, 2, 9, 4, 6]);
        let mut model = Small::new(18, 0);
        let mut gradient = TargetTensors::new(vec![vec![0.0]]);
        let error = model.capped_loss_and_gradient(Point::stored(), &pack, 1.0, &mut gradient);
        let error = error.expect_err("a row of 19 tokens");
        assert_eq!(
            error.to_string(),
            "cuda:3 has not enough memory: all of it is taken"
        );
    }
}
