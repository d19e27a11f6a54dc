//! Where in the targets' space a model is computed.
//!
//! A perturbed model is its stored weights plus a direction. Saying so, instead of adding them up beforehand, spares a copy of the
//! targets: the sum is made a matrix at a time, in the buffer that the matrix is widened into.

use std::borrow::Cow;

use panacea_formats::TensorView;

use super::linear::{copy, widen, widen_here};
use super::tensors::{Content, TargetTensors};

/// Values of all targets: those that are stored, or given ones, plus a direction or not.
#[derive(Clone, Copy, Debug)]
pub struct Point<'v> {
    base: Option<&'v TargetTensors>,
    direction: Option<(f32, &'v TargetTensors)>,
}

/// Tells points apart without reading their values: at two with the same one, all values are the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PointContent {
    base: Option<Content>,
    /// The factor by its bits.
    direction: Option<(u32, Content)>,
}

impl<'v> Point<'v> {
    /// The stored values.
    pub fn stored() -> Self {
        Self {
            base: None,
            direction: None,
        }
    }

    /// `values`.
    pub fn at(values: &'v TargetTensors) -> Self {
        Self {
            base: Some(values),
            direction: None,
        }
    }

    /// `factor * direction` further on. Each element is the f32 nearest to base plus the f32 nearest to the product.
    #[must_use]
    pub fn moved(self, factor: f32, direction: &'v TargetTensors) -> Self {
        Self {
            direction: Some((factor, direction)),
            ..self
        }
    }

    /// What tells these values from others.
    pub(super) fn content(self) -> PointContent {
        let direction =
            |(factor, direction): (f32, &TargetTensors)| (factor.to_bits(), direction.content());
        PointContent {
            base: self.base.map(TargetTensors::content),
            direction: self.direction.map(direction),
        }
    }

    /// Whether these are the stored values.
    pub(super) fn is_stored(self) -> bool {
        self.base.is_none() && self.direction.is_none()
    }

    /// Writes the values of target number `index`, stored in `view`, to `out`.
    pub(super) fn load(self, index: usize, view: &TensorView<'_>, out: &mut [f32]) {
        match self.base {
            None => widen(view, 0, out),
            Some(values) => copy(values.tensor(index), out),
        }
        if let Some((factor, direction)) = self.direction {
            super::linear::add_scaled(factor, direction.tensor(index), out);
        }
    }

    /// Writes those values of target number `index`, stored in `view`, that begin at number `first` to `out`, on the calling thread.
    pub(super) fn load_from(
        self,
        index: usize,
        view: &TensorView<'_>,
        first: usize,
        out: &mut [f32],
    ) {
        let range = first..first + out.len();
        match self.base {
            None => widen_here(view, first, out),
            Some(values) => out.copy_from_slice(&values.tensor(index)[range.clone()]),
        }
        if let Some((factor, direction)) = self.direction {
            let more = &direction.tensor(index)[range];
            out.iter_mut().zip(more).for_each(|(x, y)| *x += factor * y);
        }
    }

    /// The values of target number `index`, stored in `view`.
    pub(super) fn values(self, index: usize, view: &TensorView<'_>) -> Cow<'v, [f32]> {
        match (self.base, self.direction) {
            (Some(values), None) => Cow::Borrowed(values.tensor(index)),
            _ => {
                let mut values = vec![0.0; view.elements()];
                self.load(index, view, &mut values);
                Cow::Owned(values)
            }
        }
    }
}

impl<'v> From<&'v TargetTensors> for Point<'v> {
    fn from(values: &'v TargetTensors) -> Self {
        Self::at(values)
    }
}
