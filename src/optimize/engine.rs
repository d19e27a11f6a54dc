//! Mean losses and gradients over any number of rows, with the checks that every method needs.
//!
//! In: rows and values of the targets. Out: means over predicted tokens, whatever the packs. Rows are packed up to a fixed
//! number of tokens, so memory does not grow with a batch.

use std::fmt;

use thiserror::Error;

use super::Observer;
use super::radius::RadiusPoint;
use super::region::Region;
use crate::model::{
    Differentiable, EncodedRow, LossSum, Pack, PackError, Point, Predicted, TargetTensors,
    WeightsError, common_beginning,
};
use crate::ranks::{Group, RanksError};

/// Tokens computed together, at most, but for a single row that is longer: enough for matrix products to run at full speed and for
/// the widening of weights, once for each pack and block, to cost little beside them.
pub const PACK_TOKENS: usize = 1024;

/// Which rows a batch is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Set {
    /// Requests with affirmative openings.
    Harmful,
    /// Requests with refusals.
    Refusals,
    /// The fine-tuning data.
    Task,
    /// Ordinary requests with answers.
    Benign,
}

impl fmt::Display for Set {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Harmful => "harmful",
            Self::Refusals => "refusal",
            Self::Task => "task",
            Self::Benign => "benign",
        })
    }
}

/// Why no perturbation was found.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OptimizeError {
    /// A set that the method needs has no rows.
    #[error("{method} needs {set} rows, and there are none")]
    NoRows {
        /// The method.
        method: &'static str,
        /// The set.
        set: Set,
    },
    /// A loss is NaN or infinite.
    #[error("the loss of {set} rows {} at step {step} is {loss}", listed(rows))]
    Loss {
        /// Whose rows.
        set: Set,
        /// Their places in the set, from 0 on.
        rows: Vec<usize>,
        /// The step, from 0 on.
        step: usize,
        /// The loss.
        loss: f64,
    },
    /// A gradient is zero, NaN or infinite: it has no direction.
    #[error(
        "the gradient of {set} rows {} at step {step} has norm {norm}",
        listed(rows)
    )]
    Gradient {
        /// Whose rows.
        set: Set,
        /// Their places in the set, from 0 on.
        rows: Vec<usize>,
        /// The step, from 0 on.
        step: usize,
        /// The norm.
        norm: f64,
    },
    /// No radius, however small, keeps to the budget.
    #[error(
        "even at radius {smallest} the divergence on benign text is {divergence} nats per token, above the budget of {budget}"
    )]
    Budget {
        /// The smallest radius tried.
        smallest: f64,
        /// KL there.
        divergence: f64,
        /// The budget.
        budget: f64,
    },
    /// No trial of a search keeps to the budget.
    #[error(
        "none of {trials} trials keeps to the budget{}",
        nearest.map_or_else(String::new, |it| format!(
            ": at radius {} the nearest has a divergence of {} nats per token on benign text{}",
            it.rho,
            it.kl,
            it.task.map_or_else(String::new, |rise| format!(", and raises the task loss by {rise}"))
        ))
    )]
    NoTrial {
        /// How many there were.
        trials: usize,
        /// What costs least of all that was measured.
        nearest: Option<RadiusPoint>,
    },
    /// A row does not fit the model.
    #[error(transparent)]
    Pack(#[from] PackError),
    /// The model's own weights cannot be computed with.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// Another rank cannot go on.
    #[error(transparent)]
    Ranks(#[from] RanksError),
    /// The state to go on from is of another run.
    #[error("the saved state does not hold the tensors of this run")]
    State,
    /// The observer asked to stop.
    #[error("interrupted")]
    Interrupted,
}

/// The first rows by their places, and how many more.
fn listed(rows: &[usize]) -> String {
    const SHOWN: usize = 10;
    match rows.len().saturating_sub(SHOWN) {
        0 => format!("{rows:?}"),
        more => format!("{:?} and {more} more", &rows[..SHOWN]),
    }
}

/// Some rows of a set, by their places in it.
#[derive(Clone, Debug)]
pub(crate) struct Batch<'r> {
    set: Set,
    rows: &'r [EncodedRow],
    places: Vec<usize>,
}

impl<'r> Batch<'r> {
    /// The rows at `places` of `rows`.
    pub(super) fn new(set: Set, rows: &'r [EncodedRow], places: Vec<usize>) -> Self {
        Self { set, rows, places }
    }

    /// All rows of a set.
    pub(crate) fn whole(set: Set, rows: &'r [EncodedRow]) -> Self {
        Self::new(set, rows, (0..rows.len()).collect())
    }

    /// The rows in order.
    pub(super) fn rows(&self) -> impl Iterator<Item = &'r EncodedRow> + Clone {
        self.places.iter().map(|&place| &self.rows[place])
    }

    /// How many rows it has.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.places.len()
    }

    /// Tokens that all rows begin with and that stand in a pack once, if it `shares` them.
    fn shared(&self, shares: bool) -> usize {
        match shares {
            true => common_beginning(self.rows()),
            false => 0,
        }
    }

    /// The share of rank number `rank` of `size`: rows that follow each other, none or more. Shares are as even in tokens as whole rows allow.
    fn share(&self, rank: usize, size: usize, shares_beginnings: bool) -> Self {
        let shared = self.shared(shares_beginnings);
        let own = |row: &EncodedRow| row.tokens.len() - shared;
        let total: usize = self.rows().map(own).sum();
        let mut before = 0;
        // A row is of the rank in whose part of all tokens its middle lies.
        let is_of_rank = |place: &usize| {
            let length = own(&self.rows[*place]);
            let middle = before + length / 2;
            before += length;
            middle * size / total.max(1) == rank
        };
        let places = self.places.iter().copied().filter(is_of_rank).collect();
        Self::new(self.set, self.rows, places)
    }

    /// The rows in order, cut into as few packs as can be, of about the same size, with what they begin with once in each if `shares`.
    fn packs(&self, shares: bool) -> Vec<Pack> {
        let rows = self.rows();
        let shared = self.shared(shares);
        let pack = |rows: &[&EncodedRow]| match shares {
            true => Pack::sharing(rows),
            false => Pack::of(rows.iter().copied()),
        };
        let room = PACK_TOKENS.saturating_sub(shared).max(1);
        let own = |row: &EncodedRow| row.tokens.len() - shared;
        let total: usize = rows.clone().map(own).sum();
        let even = total.div_ceil(total.div_ceil(room).max(1));
        let mut packs = Vec::new();
        let mut members: Vec<&EncodedRow> = Vec::new();
        let mut tokens = 0;
        for row in rows {
            let length = own(row);
            let is_full = tokens + length > room || tokens + length / 2 > even;
            if is_full && !members.is_empty() {
                packs.push(pack(&members));
                members.clear();
                tokens = 0;
            }
            tokens += length;
            members.push(row);
        }
        if !members.is_empty() {
            packs.push(pack(&members));
        }
        packs
    }
}

/// `size` places of a set of `len` rows for batch number `index`, in order and wrapping around.
pub(super) fn wrapping(len: usize, size: usize, index: usize) -> Vec<usize> {
    (0..size).map(|k| (index * size + k) % len).collect()
}

/// A model, watched.
pub(crate) struct Engine<'e, 'c> {
    pub(super) decoder: &'e mut (dyn Differentiable + 'c),
    pub(super) observer: &'e mut dyn Observer,
    /// The step that errors speak of.
    pub(super) step: usize,
    /// Numbers of the targets whose gradients are taken as zero.
    untouched: Vec<usize>,
    /// Those that the rows of each batch are shared with.
    group: Group,
}

impl<'e, 'c> Engine<'e, 'c> {
    pub(crate) fn new(
        decoder: &'e mut (dyn Differentiable + 'c),
        observer: &'e mut dyn Observer,
    ) -> Self {
        Self {
            decoder,
            observer,
            step: 0,
            untouched: Vec::new(),
            group: Group::default(),
        }
    }

    /// The same, one of a group: each rank computes its share of the rows, and what comes out is of all rows on every rank, bit for
    /// bit, but for references.
    pub(super) fn among(mut self, group: &Group) -> Self {
        self.group = group.clone();
        self
    }

    /// From now on, gradients are zero outside of `region`.
    pub(super) fn touch(&mut self, region: &Region) {
        let targets = self.decoder.targets().iter().enumerate();
        let outside = targets.filter(|(_, target)| !region.holds(target));
        self.untouched = outside.map(|(index, _)| index).collect();
    }

    /// A buffer for a gradient: zeros.
    pub(super) fn zeros(&self) -> TargetTensors {
        let sizes = self.decoder.target_sizes();
        TargetTensors::new(sizes.into_iter().map(|size| vec![0.0; size]).collect())
    }

    /// Mean loss per predicted token.
    pub(super) fn loss(
        &mut self,
        point: Point<'_>,
        batch: &Batch<'_>,
    ) -> Result<f64, OptimizeError> {
        let sum = self.over_packs(batch, |decoder, _, pack| decoder.loss(point, pack))?;
        Ok(sum.mean())
    }

    /// Mean loss, and its gradient in `gradient`, whose old content is dropped. The gradient is finite and not zero.
    pub(super) fn gradient(
        &mut self,
        point: Point<'_>,
        batch: &Batch<'_>,
        gradient: &mut TargetTensors,
    ) -> Result<Gradient, OptimizeError> {
        let found = self.capped_gradient(point, batch, f64::INFINITY, gradient)?;
        self.with_direction(batch, found)
    }

    /// Mean loss, and in `gradient` that of its mean under a cap for each token. The gradient is finite, and zero where every
    /// token is above the cap.
    pub(super) fn capped_gradient(
        &mut self,
        point: Point<'_>,
        batch: &Batch<'_>,
        cap: f64,
        gradient: &mut TargetTensors,
    ) -> Result<Gradient, OptimizeError> {
        gradient.clear();
        let sum = self.over_packs(batch, |decoder, _, pack| {
            decoder.capped_loss_and_gradient(point, pack, cap, gradient)
        })?;
        self.finish(batch, sum, gradient)
    }

    /// The loss of each row by itself, in the batch's order.
    pub(crate) fn row_losses(
        &mut self,
        point: Point<'_>,
        batch: &Batch<'_>,
    ) -> Result<Vec<LossSum>, OptimizeError> {
        let rows = self.row_predictions(point, batch)?;
        let loss = |row: Vec<Predicted>| row.iter().map(|it| LossSum::of_token(it.loss)).sum();
        Ok(rows.into_iter().map(loss).collect())
    }

    /// What is predicted at each position of each row, in the batch's order. Every loss is finite.
    pub(super) fn row_predictions(
        &mut self,
        point: Point<'_>,
        batch: &Batch<'_>,
    ) -> Result<Vec<Vec<Predicted>>, OptimizeError> {
        let mut rows = Vec::with_capacity(batch.places.len());
        self.over_packs(batch, |decoder, _, pack| {
            let predicted = decoder.predicted(point, pack)?;
            let first = rows.len();
            rows.resize(first + pack.starts.len() - 1, Vec::new());
            for (prediction, &found) in pack.predictions.iter().zip(&predicted) {
                let row = pack
                    .starts
                    .partition_point(|&start| start <= prediction.position)
                    - 1;
                rows[first + row].push(found);
            }
            let losses = predicted.iter().map(|it| LossSum::of_token(it.loss));
            Ok(losses.sum())
        })?;
        let own: Vec<u8> = rows.iter().flat_map(|row| row_to_bytes(row)).collect();
        let place = format!("the rows of {}", self.place(batch));
        // Shares follow each other as ranks do.
        let all = self.group.exchange(&place, &own)?.concat();
        Ok(rows_from_bytes(&all))
    }

    /// What [`Self::divergence`] compares with: hidden states for each pack of this rank's share of the batch.
    pub(super) fn reference(
        &mut self,
        point: Point<'_>,
        batch: &Batch<'_>,
    ) -> Result<Vec<Vec<f32>>, OptimizeError> {
        let mut references = Vec::new();
        self.over_share(batch, |decoder, _, pack| {
            references.push(decoder.reference(point, pack)?);
            Ok(LossSum::default())
        })?;
        Ok(references)
    }

    /// Mean KL divergence from the reference per predicted token.
    pub(super) fn divergence(
        &mut self,
        point: Point<'_>,
        batch: &Batch<'_>,
        reference: &[Vec<f32>],
    ) -> Result<f64, OptimizeError> {
        let sum = self.over_packs(batch, |decoder, index, pack| {
            decoder.divergence(point, pack, &reference[index])
        })?;
        Ok(sum.mean())
    }

    /// Mean KL divergence, and its gradient in `gradient`.
    pub(super) fn divergence_gradient(
        &mut self,
        point: Point<'_>,
        batch: &Batch<'_>,
        reference: &[Vec<f32>],
        gradient: &mut TargetTensors,
    ) -> Result<Gradient, OptimizeError> {
        gradient.clear();
        let sum = self.over_packs(batch, |decoder, index, pack| {
            decoder.divergence_and_gradient(point, pack, &reference[index], gradient)
        })?;
        let found = self.finish(batch, sum, gradient)?;
        self.with_direction(batch, found)
    }

    /// Turns the gradient of this rank's share of `sum` into that of the mean over all ranks, and checks that it is finite.
    fn finish(
        &self,
        batch: &Batch<'_>,
        sum: LossSum,
        gradient: &mut TargetTensors,
    ) -> Result<Gradient, OptimizeError> {
        self.group.sum(gradient)?;
        for &index in &self.untouched {
            gradient.tensor_mut(index).fill(0.0);
        }
        gradient.scale(reciprocal(sum.count));
        let norm = gradient.norm();
        if norm.is_finite() {
            let loss = sum.mean();
            Ok(Gradient { loss, norm })
        } else {
            Err(self.no_direction(batch, norm))
        }
    }

    /// Refuses a gradient of zero.
    fn with_direction(
        &self,
        batch: &Batch<'_>,
        found: Gradient,
    ) -> Result<Gradient, OptimizeError> {
        if found.norm > 0.0 {
            Ok(found)
        } else {
            Err(self.no_direction(batch, found.norm))
        }
    }

    fn no_direction(&self, batch: &Batch<'_>, norm: f64) -> OptimizeError {
        OptimizeError::Gradient {
            set: batch.set,
            rows: batch.places.clone(),
            step: self.step,
            norm,
        }
    }

    /// Sums `work` over the packs of all ranks. The mean is finite.
    fn over_packs(
        &mut self,
        batch: &Batch<'_>,
        work: impl FnMut(&mut (dyn Differentiable + 'c), usize, &Pack) -> Result<LossSum, PackError>,
    ) -> Result<LossSum, OptimizeError> {
        let own = self.over_share(batch, work)?;
        let sum = self.summed(batch, own)?;
        if sum.mean().is_finite() {
            Ok(sum)
        } else {
            Err(OptimizeError::Loss {
                set: batch.set,
                rows: batch.places.clone(),
                step: self.step,
                loss: sum.mean(),
            })
        }
    }

    /// Sums `work` over the packs of this rank's share of the batch.
    fn over_share(
        &mut self,
        batch: &Batch<'_>,
        mut work: impl FnMut(&mut (dyn Differentiable + 'c), usize, &Pack) -> Result<LossSum, PackError>,
    ) -> Result<LossSum, OptimizeError> {
        let shares_beginnings = self.decoder.shares_beginnings();
        let (rank, size) = (self.group.rank(), self.group.size());
        let packs = batch
            .share(rank, size, shares_beginnings)
            .packs(shares_beginnings);
        let total = packs.iter().map(|pack| pack.tokens.len()).sum();
        let what = batch.set.to_string();
        let (mut sum, mut done) = (LossSum::default(), 0);
        for (index, pack) in packs.iter().enumerate() {
            // What the others are asked, the first hears with their sums.
            if self.group.is_first() && self.observer.interrupted() {
                return Err(OptimizeError::Interrupted);
            }
            self.observer.progress(&what, done, total);
            sum += work(self.decoder, index, pack)?;
            done += pack.tokens.len();
        }
        self.observer.progress(&what, total, total);
        Ok(sum)
    }

    /// The sum of what all ranks have, in their order.
    fn summed(&mut self, batch: &Batch<'_>, own: LossSum) -> Result<LossSum, OptimizeError> {
        let asked = !self.group.is_first() && self.observer.interrupted();
        let mut word = to_bytes(own).to_vec();
        word.push(u8::from(asked));
        let words = self.group.exchange(&self.place(batch), &word)?;
        if words.iter().any(|word| word.last() == Some(&1)) {
            self.observer.stop();
        }
        let sums = words.iter().filter_map(|word| word.first_chunk());
        Ok(sums.map(from_bytes).sum())
    }

    /// Where the work is, for other ranks to compare.
    fn place(&self, batch: &Batch<'_>) -> String {
        format!("{} rows at step {}", batch.set, self.step)
    }
}

/// A sum as a rank tells it: the bits of the sum and the count, each 8 bytes, little-endian.
fn to_bytes(sum: LossSum) -> [u8; 16] {
    let (count, sum) = (sum.count as u128, u128::from(sum.sum.to_bits()));
    (count << 64 | sum).to_le_bytes()
}

fn from_bytes(bytes: &[u8; 16]) -> LossSum {
    let whole = u128::from_le_bytes(*bytes);
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the halves of 16 bytes; a count of tokens in memory fits"
    )]
    let (sum, count) = (whole as u64, (whole >> 64) as usize);
    LossSum {
        sum: f64::from_bits(sum),
        count,
    }
}

/// What is predicted of a row, as a rank tells it: how many tokens, 8 bytes; then of each the bits of the loss, 8 bytes, and the likeliest
/// token, 4 bytes; little-endian.
fn row_to_bytes(row: &[Predicted]) -> Vec<u8> {
    let mut bytes = (row.len() as u64).to_le_bytes().to_vec();
    for predicted in row {
        bytes.extend(predicted.loss.to_bits().to_le_bytes());
        bytes.extend(predicted.likeliest.to_le_bytes());
    }
    bytes
}

/// The rows that ranks told one after the other.
fn rows_from_bytes(mut bytes: &[u8]) -> Vec<Vec<Predicted>> {
    let mut rows = Vec::new();
    while let Some((count, rest)) = bytes.split_first_chunk() {
        let mut row = Vec::new();
        bytes = rest;
        for _ in 0..u64::from_le_bytes(*count) {
            let Some((loss, rest)) = bytes.split_first_chunk() else {
                break;
            };
            let Some((likeliest, rest)) = rest.split_first_chunk() else {
                break;
            };
            row.push(Predicted {
                loss: f64::from_bits(u64::from_le_bytes(*loss)),
                likeliest: u32::from_le_bytes(*likeliest),
            });
            bytes = rest;
        }
        rows.push(row);
    }
    rows
}

/// A mean loss with the norm of its gradient.
#[derive(Clone, Copy, Debug)]
pub(super) struct Gradient {
    pub(super) loss: f64,
    pub(super) norm: f64,
}

/// 1 / count.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    reason = "the factor of an f32 gradient"
)]
fn reciprocal(count: usize) -> f32 {
    (1.0 / count as f64) as f32
}

/// The f32 nearest to a factor that was computed in f64.
#[expect(clippy::cast_possible_truncation, reason = "the factor of f32 tensors")]
pub(super) fn factor(x: f64) -> f32 {
    x as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_wrap_around_in_file_order() {
        assert_eq!(wrapping(3, 2, 0), [0, 1]);
        assert_eq!(wrapping(3, 2, 1), [2, 0]);
        assert_eq!(wrapping(2, 5, 1), [1, 0, 1, 0, 1]);
    }

    #[test]
    fn shares_are_whole_rows_in_order_and_even_in_tokens() {
        let shares = |lengths: &[usize], size: usize| -> Vec<Vec<usize>> {
            let row = |&n: &usize| EncodedRow {
                tokens: vec![1; n],
                // Predicted from the start, so that nothing is shared.
                in_loss: vec![true; n],
            };
            let rows: Vec<EncodedRow> = lengths.iter().map(row).collect();
            let batch = Batch::whole(Set::Task, &rows);
            let share = |rank| batch.share(rank, size, true);
            (0..size).map(|rank| share(rank).places).collect()
        };
        assert_eq!(shares(&[5, 7, 9], 1), [[0, 1, 2]]);
        assert_eq!(shares(&[10; 4], 2), [[0, 1], [2, 3]]);
        assert_eq!(shares(&[30, 10, 10, 10], 2), [vec![0], vec![1, 2, 3]]);
        assert_eq!(shares(&[4, 4], 3), [vec![0], vec![], vec![1]]);
        let nothing = Batch::new(Set::Task, &[], Vec::new());
        assert_eq!(nothing.packs(true), []);
    }

    #[test]
    fn sums_come_back_from_their_bytes() {
        for sum in [0.1 + 0.2, -0.0, f64::INFINITY] {
            let sum = LossSum { sum, count: 7 };
            assert_eq!(from_bytes(&to_bytes(sum)), sum);
        }
    }

    #[test]
    fn rows_come_back_as_they_were_told() {
        let predicted = |loss, likeliest| Predicted { loss, likeliest };
        let rows = [
            vec![predicted(0.1 + 0.2, 7), predicted(f64::INFINITY, u32::MAX)],
            Vec::new(),
            vec![predicted(1e-300, 0)],
        ];
        let told: Vec<u8> = rows.iter().flat_map(|row| row_to_bytes(row)).collect();
        assert_eq!(rows_from_bytes(&told), rows);
        assert_eq!(rows_from_bytes(&[]), [[]; 0]);
    }

    #[test]
    fn packs_hold_whole_rows_up_to_the_limit_and_are_even() {
        let sizes = |lengths: &[usize]| -> Vec<usize> {
            let row = |&n: &usize| EncodedRow {
                tokens: vec![1; n],
                // Predicted from the start, so that nothing is shared.
                in_loss: vec![true; n],
            };
            let rows: Vec<EncodedRow> = lengths.iter().map(row).collect();
            let batch = Batch::whole(Set::Task, &rows);
            batch.packs(true).iter().map(|p| p.tokens.len()).collect()
        };
        assert_eq!(sizes(&[600, 424]), [1024]);
        assert_eq!(sizes(&[600, 425]), [600, 425]);
        assert_eq!(sizes(&[2000, 24]), [2000, 24]);
        assert_eq!(sizes(&[85; 13]), [7 * 85, 6 * 85]);
        assert_eq!(sizes(&[900, 900, 1]), [900, 901]);
        // With a beginning of 60 tokens in each: 13 rows of 85 are one pack of 60 + 13 x 25.
        let row = EncodedRow {
            tokens: (0..60).chain([7; 25]).collect(),
            in_loss: (0..85).map(|i| i > 60).collect(),
        };
        let rows = vec![row; 13];
        let batch = Batch::whole(Set::Task, &rows);
        let of_each = |packs: Vec<Pack>| -> Vec<usize> {
            packs.iter().map(|pack| pack.tokens.len()).collect()
        };
        assert_eq!(of_each(batch.packs(true)), [60 + 13 * 25]);
        assert_eq!(of_each(batch.packs(false)), [7 * 85, 6 * 85]);
    }
}
