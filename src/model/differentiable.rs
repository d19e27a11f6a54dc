//! What a search asks of a model: losses of packs, and their gradients with respect to the targets.
//!
//! In: a [`Point`], a [`Pack`] and an [`Objective`]. Out: the loss of each predicted token and, if wanted, a gradient added to a
//! [`TargetTensors`]. The methods of [`crate::optimize`] know no more of a model than this, so that a processor and a GPU compute for
//! them alike, and so does whatever stands between.

use super::decoder::PackError;
use super::head::{LossSum, Objective, Predicted};
use super::linear::add_scaled;
use super::pack::Pack;
use super::point::Point;
use super::targets::Target;
use super::tensors::TargetTensors;
use super::weights::WeightsError;

/// A model whose losses can be differentiated with respect to some of its matrices.
pub trait Differentiable {
    /// The selected matrices, in the order of every [`TargetTensors`].
    fn targets(&self) -> &[Target];

    /// The stored values of target number `index`, widened to f32.
    ///
    /// # Errors
    /// [`WeightsError::NotFinite`] when one of them is NaN or infinite.
    fn stored_target(&self, index: usize) -> Result<Vec<f32>, WeightsError>;

    /// Whether packs may hold what their rows begin with once ([`Pack::sharing`]).
    fn shares_beginnings(&self) -> bool;

    /// The loss of each predicted position of `pack` with the targets at `point`, in nats, in the order of [`Pack::predictions`].
    ///
    /// # Errors
    /// [`PackError`] when a token is outside of the vocabulary, or what computes cannot do it.
    fn losses(
        &mut self,
        point: Point<'_>,
        pack: &Pack,
        objective: Objective<'_>,
    ) -> Result<Vec<f64>, PackError>;

    /// What is predicted at each position of `pack` by itself, in the order of [`Pack::predictions`].
    ///
    /// # Errors
    /// As [`Self::losses`].
    fn predicted(&mut self, point: Point<'_>, pack: &Pack) -> Result<Vec<Predicted>, PackError>;

    /// As [`Self::losses`]; adds the gradient of their sum to `gradient`, and nothing when a device has not enough memory for it.
    ///
    /// # Errors
    /// As [`Self::losses`].
    fn losses_and_gradient(
        &mut self,
        point: Point<'_>,
        pack: &Pack,
        objective: Objective<'_>,
        gradient: &mut TargetTensors,
    ) -> Result<Vec<f64>, PackError>;

    /// What [`Objective::Divergence`] compares with: the final hidden states at the predicted positions, predictions x hidden.
    ///
    /// # Errors
    /// As [`Self::losses`].
    fn reference(&mut self, point: Point<'_>, pack: &Pack) -> Result<Vec<f32>, PackError>;

    /// Takes less memory from now on, for more work, if it knows a way; whether it did.
    fn save_memory(&mut self) -> bool {
        false
    }

    /// Elements of each target.
    fn target_sizes(&self) -> Vec<usize> {
        let shapes = self.targets().iter().map(|target| target.shape);
        shapes.map(|[rows, cols]| rows * cols).collect()
    }

    /// The targets' stored values, widened to f32.
    ///
    /// # Errors
    /// [`WeightsError::NotFinite`] when one of them is NaN or infinite.
    fn target_values(&self) -> Result<TargetTensors, WeightsError> {
        let values = (0..self.targets().len()).map(|index| self.stored_target(index));
        Ok(TargetTensors::new(values.collect::<Result<_, _>>()?))
    }

    /// Whether the stored targets can be computed with.
    ///
    /// # Errors
    /// [`WeightsError::NotFinite`] when one of them holds NaN or infinity.
    fn check_targets(&self) -> Result<(), WeightsError> {
        self.target_norm().map(drop)
    }

    /// Euclidean norm of the stored targets, one of them in memory at a time.
    ///
    /// # Errors
    /// [`WeightsError::NotFinite`] when one of them holds NaN or infinity.
    fn target_norm(&self) -> Result<f64, WeightsError> {
        let mut squares = 0.0;
        for index in 0..self.targets().len() {
            let stored = TargetTensors::new(vec![self.stored_target(index)?]);
            squares += stored.dot(&stored);
        }
        Ok(squares.sqrt())
    }

    /// Subtracts the stored targets from `values`, one of them in memory at a time.
    ///
    /// # Errors
    /// [`WeightsError::NotFinite`] when one of them holds NaN or infinity.
    fn subtract_stored(&self, values: &mut TargetTensors) -> Result<(), WeightsError> {
        for index in 0..self.targets().len() {
            let stored = self.stored_target(index)?;
            add_scaled(-1.0, &stored, values.tensor_mut(index));
        }
        Ok(())
    }

    /// The next-token loss of `pack`.
    ///
    /// # Errors
    /// As [`Self::losses`].
    fn loss(&mut self, point: Point<'_>, pack: &Pack) -> Result<LossSum, PackError> {
        let objective = Objective::NextToken { cap: f64::INFINITY };
        let losses = self.losses(point, pack, objective)?;
        Ok(LossSum::of_tokens(&losses))
    }

    /// As [`Self::loss`]; adds the gradient of the sum of min(loss, `cap`) to `gradient`: tokens above the cap have none.
    ///
    /// # Errors
    /// As [`Self::losses`].
    fn capped_loss_and_gradient(
        &mut self,
        point: Point<'_>,
        pack: &Pack,
        cap: f64,
        gradient: &mut TargetTensors,
    ) -> Result<LossSum, PackError> {
        let objective = Objective::NextToken { cap };
        let losses = self.losses_and_gradient(point, pack, objective, gradient)?;
        Ok(LossSum::of_tokens(&losses))
    }

    /// KL(reference || this) over the next token, summed over the predicted positions of `pack`, in nats.
    ///
    /// `reference`: what [`Self::reference`] gave for the same pack with other values.
    ///
    /// # Errors
    /// As [`Self::losses`].
    fn divergence(
        &mut self,
        point: Point<'_>,
        pack: &Pack,
        reference: &[f32],
    ) -> Result<LossSum, PackError> {
        let losses = self.losses(point, pack, Objective::Divergence { reference })?;
        Ok(LossSum::of_tokens(&losses))
    }

    /// As [`Self::divergence`]; adds the gradient of the sum to `gradient`.
    ///
    /// # Errors
    /// As [`Self::losses`].
    fn divergence_and_gradient(
        &mut self,
        point: Point<'_>,
        pack: &Pack,
        reference: &[f32],
        gradient: &mut TargetTensors,
    ) -> Result<LossSum, PackError> {
        let objective = Objective::Divergence { reference };
        let losses = self.losses_and_gradient(point, pack, objective, gradient)?;
        Ok(LossSum::of_tokens(&losses))
    }
}
