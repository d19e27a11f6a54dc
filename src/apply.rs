//! Adds a perturbation to a checkpoint and writes the result: w' = round(w + strength * delta).
//!
//! In: an open [`Checkpoint`], the [`Wanted`] deltas, from a file or straight from the optimizer, and an output that is not
//! committed. Out: the files written, and the [`RealizedChange`]: what rounding to the stored type left of what was wanted. A
//! BF16 weight has 8 significant bits, so a step much smaller than 1/256 of the weight often vanishes; the numbers say how often.
//!
//! The sum is computed in `f32`, then rounded once to the stored type. An element that is to move by exactly zero keeps its
//! bytes, so that a strength of 0 gives an identical file (no -0.0 becomes 0.0, no NaN another NaN). So does an element that is
//! not finite, and these are counted. A sum that does not fit the stored type is refused: no infinity is ever written.
//!
//! Bytes and numbers are functions of the inputs alone: chunks have a fixed size, sums run in a fixed order, and randomness
//! is counted by element, so neither threads nor the division into shards matter.

mod blocks;
mod merge;
mod rounding;
mod sums;

use std::collections::HashMap;
use std::ops::Range;

use half::f16;
use panacea_formats::{
    BaseProblem, Checkpoint, DeltaTensor, Destination, Dtype, NotFinite, Observer, Patch,
    Perturbation, PerturbationRecord, Problems, Sha256, SideFiles, Space, TensorView, WidenError,
    WriteError, WrittenFile, check_base, write_checkpoint,
};
use pulp::{Simd, WithSimd};
use serde::Serialize;
use thiserror::Error;

pub use merge::{Merge, MergeError, MergingError, merge};
pub use rounding::Rounding;

use rounding::Dice;
use sums::Sums;

/// How a perturbation is added.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ApplySettings {
    /// The factor on the deltas.
    pub strength: Strength,
    /// How sums are rounded to the stored type.
    pub rounding: Rounding,
    /// What patched tensors of a GGUF file are stored in, where their own type has fewer bits for an element.
    pub patched_type: Option<Dtype>,
    /// The least [`Change::realized_share`] over all patched tensors of quantized types together. Below it, these types are too coarse
    /// for the perturbation, and it is refused.
    pub least_realized: f64,
}

impl Default for ApplySettings {
    /// At full strength, rounded by chance, every tensor in its own type, and at least [`LEAST_REALIZED`] of it.
    fn default() -> Self {
        Self {
            strength: Strength::default(),
            rounding: Rounding::default(),
            patched_type: None,
            least_realized: LEAST_REALIZED,
        }
    }
}

/// The share of a perturbation that quantized types have to realize where nothing else is asked for.
pub const LEAST_REALIZED: f64 = 0.5;

/// The factor on a perturbation: finite and not negative, because a negative one would undo safety rather than restore it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Strength(f32);

impl Strength {
    /// The strength `value`, rounded to `f32`.
    ///
    /// # Errors
    /// When it is negative, not a number, or too large for `f32`.
    pub fn new(value: f64) -> Result<Self, StrengthError> {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "a strength is a factor on f32 values"
        )]
        let single = value as f32;
        if value.is_nan() || single.is_infinite() {
            return Err(StrengthError::NotFinite { found: value });
        }
        if value < 0.0 {
            return Err(StrengthError::Negative { found: value });
        }
        Ok(Self(single.abs()))
    }

    /// The factor.
    pub fn value(self) -> f32 {
        self.0
    }
}

impl Default for Strength {
    fn default() -> Self {
        Self(1.0)
    }
}

/// Why a number is no strength.
#[derive(Clone, Copy, Debug, Error, PartialEq)]
#[non_exhaustive]
pub enum StrengthError {
    /// It would turn the perturbation round.
    #[error("a strength of {found} would weaken safety instead of restoring it")]
    Negative {
        /// The number.
        found: f64,
    },
    /// Not a number, or one beyond `f32`.
    #[error("a strength of {found} is not a finite factor")]
    NotFinite {
        /// The number.
        found: f64,
    },
}

/// The deltas to be added.
#[derive(Clone, Debug)]
pub struct Wanted<'a> {
    deltas: Vec<DeltaTensor<'a>>,
    /// What they were made for, when they come from a file.
    record: Option<&'a PerturbationRecord>,
}

impl<'a> Wanted<'a> {
    /// Deltas that were computed from the very checkpoint that they will be added to.
    ///
    /// # Errors
    /// When there are none, one is not finite, or two are for the same tensor.
    pub fn in_memory(deltas: Vec<DeltaTensor<'a>>) -> Result<Self, ApplyError> {
        if deltas.is_empty() {
            return Err(ApplyError::Empty);
        }
        let mut names: Vec<&str> = deltas.iter().map(DeltaTensor::name).collect();
        names.sort_unstable();
        if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(ApplyError::Repeated {
                tensor: pair[0].to_owned(),
            });
        }
        for delta in &deltas {
            if let Some(reason) = delta.first_not_finite() {
                return Err(ApplyError::NotFinite {
                    tensor: delta.name().to_owned(),
                    reason,
                });
            }
        }
        Ok(Self {
            deltas,
            record: None,
        })
    }

    /// The names of the tensors that there are deltas for.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.deltas.iter().map(DeltaTensor::name)
    }

    /// Whether `checkpoint` is what the deltas are for. Those of a file are held against its digests, which reads the tensors
    /// that would be patched once, in parallel.
    ///
    /// # Errors
    /// [`ApplyError::Space`] or [`ApplyError::Base`].
    pub fn check(&self, checkpoint: &Checkpoint) -> Result<(), ApplyError> {
        let Some(record) = self.record else {
            return self.check_shapes(checkpoint).map_err(ApplyError::Base);
        };
        let space = Space::of(checkpoint);
        if record.space != space {
            return Err(ApplyError::Space {
                wanted: record.space,
                found: space,
            });
        }
        check_base(&record.base, checkpoint).map_err(ApplyError::Base)
    }

    /// Whether every tensor that is to get another type has rows of whole blocks of it.
    fn check_patched_type(
        &self,
        checkpoint: &Checkpoint,
        settings: ApplySettings,
    ) -> Result<(), ApplyError> {
        for delta in &self.deltas {
            let Some(tensor) = checkpoint.tensor(delta.name()) else {
                continue;
            };
            let dtype = blocks::patched_type(tensor.dtype, settings.patched_type);
            let columns = tensor.shape.last().copied().unwrap_or(1);
            if dtype.bytes_of(columns).is_none() {
                return Err(ApplyError::PatchedType {
                    tensor: tensor.name.to_owned(),
                    dtype,
                    columns,
                });
            }
        }
        Ok(())
    }

    fn check_shapes(&self, checkpoint: &Checkpoint) -> Result<(), Problems<BaseProblem>> {
        let problems = self
            .deltas
            .iter()
            .filter_map(|delta| {
                let tensor = delta.name().to_owned();
                match checkpoint.tensor(delta.name()) {
                    None => Some(BaseProblem::Missing {
                        nearest: checkpoint.nearest_name(&tensor).map(str::to_owned),
                        tensor,
                    }),
                    Some(found) if !found.dtype.is_patchable() => Some(BaseProblem::NotPatchable {
                        tensor,
                        dtype: found.dtype,
                    }),
                    Some(found) if found.shape != delta.shape() => Some(BaseProblem::Shape {
                        tensor,
                        wanted: delta.shape().to_vec(),
                        found: found.shape.to_vec(),
                    }),
                    Some(_) => None,
                }
            })
            .collect();
        Problems::none_of(problems)
    }
}

impl<'a> From<&'a Perturbation> for Wanted<'a> {
    fn from(perturbation: &'a Perturbation) -> Self {
        Self {
            deltas: perturbation.deltas().collect(),
            record: Some(perturbation.record()),
        }
    }
}

/// What was written, and what became of the deltas.
#[derive(Clone, Debug)]
pub struct Applied {
    /// Every file, by name, with its digest.
    pub files: Vec<WrittenFile>,
    /// The checkpoint's files of weights, by name, with the digest of what was read of each.
    pub sources: Vec<(String, Sha256)>,
    /// The side files that were copied, and those that were left out and why.
    pub side_files: SideFiles,
    /// What rounding left of the deltas.
    pub realized: RealizedChange,
}

/// What rounding to the stored types left of a perturbation.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct RealizedChange {
    /// All patched tensors together.
    pub total: Change,
    /// Each of them: file after file, in the order of their bytes.
    pub tensors: Vec<TensorChange>,
}

/// The change of one tensor.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TensorChange {
    /// The tensor.
    pub name: String,
    /// What became of its delta.
    #[serde(flatten)]
    pub change: Change,
}

/// A wanted change beside the one that the stored values made. *Wanted* is strength times delta; *realized* is the new stored
/// value less the old one. Norms are L2, summed in `f64`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Change {
    /// Elements in the tensors.
    pub elements: u64,
    /// Elements whose stored value changed.
    pub moved: u64,
    /// Elements that were left alone because they are infinite or not numbers.
    pub not_finite: u64,
    /// Norm of the wanted change.
    pub wanted_norm: f64,
    /// Norm of the realized change.
    pub realized_norm: f64,
    /// Cosine of the angle between both; nothing when one of them is zero.
    pub cosine: Option<f64>,
    /// Norm of the finite old weights.
    pub weight_norm: f64,
    /// The largest old weight that is finite, without its sign.
    pub largest_weight: f32,
    /// The largest wanted change, without its sign.
    pub largest_wanted: f32,
    /// The largest realized change, without its sign.
    pub largest_realized: f32,
}

impl Change {
    /// How much of the wanted change was made: the length of the realized one along it, as a share of its own; 1 when nothing was wanted.
    pub fn realized_share(&self) -> f64 {
        match self.cosine {
            Some(cosine) => cosine * self.realized_norm / self.wanted_norm,
            None if self.wanted_norm == 0.0 => 1.0,
            None => 0.0,
        }
    }

    /// The share of elements whose stored value changed, from 0 to 1.
    #[expect(clippy::cast_precision_loss, reason = "a share needs no 53 bits")]
    pub fn moved_share(&self) -> f64 {
        if self.elements == 0 {
            0.0
        } else {
            self.moved as f64 / self.elements as f64
        }
    }
}

/// Writes `checkpoint` with `wanted` added to `destination`, which the caller commits when manifest and signature are in it.
///
/// Before the first byte is written, every patched tensor is compared with what the deltas are for: name, shape and element
/// type, and for those of a file the digest. That reads the patched tensors once, in parallel.
///
/// # Errors
/// [`ApplyError`]; the output is then incomplete and should be dropped.
pub fn apply(
    checkpoint: &Checkpoint,
    wanted: &Wanted<'_>,
    settings: ApplySettings,
    destination: Destination<'_>,
    observer: &impl Observer,
) -> Result<Applied, ApplyError> {
    wanted.check(checkpoint)?;
    wanted.check_patched_type(checkpoint, settings)?;
    let addition = Addition {
        deltas: wanted
            .deltas
            .iter()
            .map(|delta| (delta.name(), *delta))
            .collect(),
        settings,
    };
    let mut tensors: Vec<(String, Sums)> = Vec::new();
    let written = write_checkpoint(
        checkpoint,
        &addition,
        destination,
        observer,
        |name, sums: Sums| match tensors.last_mut() {
            Some((last, total)) if last == name => total.add(&sums),
            _ => tensors.push((name.to_owned(), sums)),
        },
    )?;
    refuse_too_coarse(checkpoint, &tensors, settings)?;
    Ok(Applied {
        files: written.files,
        sources: written.sources,
        side_files: written.side_files,
        realized: realized(tensors),
    })
}

/// Refuses a perturbation of which quantized types keep too little.
fn refuse_too_coarse(
    checkpoint: &Checkpoint,
    tensors: &[(String, Sums)],
    settings: ApplySettings,
) -> Result<(), ApplyError> {
    let mut total = Sums::default();
    let mut coarsest: Option<(f64, &str, Dtype)> = None;
    for (name, sums) in tensors {
        let stored = checkpoint.tensor(name).map(|tensor| tensor.dtype);
        let Some(dtype) = stored
            .map(|stored| blocks::patched_type(stored, settings.patched_type))
            .filter(|dtype| dtype.is_quantized())
        else {
            continue;
        };
        total.add(sums);
        let share = sums.change().realized_share();
        if coarsest.is_none_or(|(least, ..)| share < least) {
            coarsest = Some((share, name, dtype));
        }
    }
    let share = total.change().realized_share();
    match coarsest {
        Some((of_tensor, name, dtype)) if share < settings.least_realized => {
            Err(ApplyError::TooCoarse {
                share,
                least: settings.least_realized,
                tensor: name.to_owned(),
                of_tensor,
                dtype,
            })
        }
        _ => Ok(()),
    }
}

/// The sums of each tensor, and of all of them, as a report.
fn realized(tensors: Vec<(String, Sums)>) -> RealizedChange {
    let mut total = Sums::default();
    for (_, sums) in &tensors {
        total.add(sums);
    }
    RealizedChange {
        total: total.change(),
        tensors: tensors
            .into_iter()
            .map(|(name, sums)| TensorChange {
                name,
                change: sums.change(),
            })
            .collect(),
    }
}

/// All values of `tensor`.
fn widened(tensor: &TensorView<'_>) -> Result<Vec<f32>, WidenError> {
    let mut values = vec![0.0; tensor.elements()];
    tensor.widen_into(0..values.len(), &mut values)?;
    Ok(values)
}

/// The patch of [`apply`].
struct Addition<'a> {
    /// For look-up only.
    deltas: HashMap<&'a str, DeltaTensor<'a>>,
    settings: ApplySettings,
}

impl Patch for Addition<'_> {
    type Report = Sums;
    type Error = AdditionError;

    fn targets(&self, tensor: &TensorView<'_>) -> bool {
        self.deltas.contains_key(tensor.name)
    }

    fn dtype(&self, tensor: &TensorView<'_>) -> Dtype {
        blocks::patched_type(tensor.dtype, self.settings.patched_type)
    }

    fn patch(
        &self,
        tensor: &TensorView<'_>,
        elements: Range<usize>,
        bytes: &mut [u8],
    ) -> Result<Sums, AdditionError> {
        let delta = self.deltas.get(tensor.name).ok_or(AdditionError::NoDelta)?;
        let dtype = self.dtype(tensor);
        if dtype != tensor.dtype || !dtype.is_float() {
            return self.add_in_blocks(delta, tensor, elements, dtype, bytes);
        }
        let mut dice = self.settings.rounding.dice(tensor.name, elements.start);
        match tensor.dtype {
            Dtype::F32 => self.add(delta, tensor, elements, bytes, &mut dice, f32::to_le_bytes),
            Dtype::BF16 => self.add(delta, tensor, elements, bytes, &mut dice, |value| {
                rounding::to_bf16(value).to_le_bytes()
            }),
            Dtype::F16 => self.add(delta, tensor, elements, bytes, &mut dice, |value| {
                f16::from_f32(value).to_le_bytes()
            }),
            dtype => Err(AdditionError::Read(WidenError::Dtype { dtype })),
        }
    }
}

impl Addition<'_> {
    /// Adds `delta` to the elements `elements` of `tensor`, whose stored bytes `bytes` holds. `narrow` rounds to nearest, ties to
    /// even, and gives the bytes that are stored, `WIDTH` of them.
    fn add<const WIDTH: usize>(
        &self,
        delta: &DeltaTensor<'_>,
        tensor: &TensorView<'_>,
        elements: Range<usize>,
        bytes: &mut [u8],
        dice: &mut Dice,
        narrow: impl Fn(f32) -> [u8; WIDTH],
    ) -> Result<Sums, AdditionError> {
        let strength = self.settings.strength.value();
        let mut weights = [0.0_f32; BLOCK];
        let mut steps = [0.0_f32; BLOCK];
        let mut stored = [0.0_f32; BLOCK];
        let mut sums = Sums::default();
        let (slots, _) = bytes.as_chunks_mut::<WIDTH>();
        for (start, slots) in elements.clone().step_by(BLOCK).zip(slots.chunks_mut(BLOCK)) {
            let range = start..start + slots.len();
            let weights = &mut weights[..slots.len()];
            let steps = &mut steps[..slots.len()];
            let stored = &mut stored[..slots.len()];
            tensor.widen_into(range.clone(), weights)?;
            delta.read_into(range, steps)?;
            match dice.is_thrown() {
                false => pulp::Arch::new().dispatch(Nearest {
                    slots: &mut *slots,
                    steps: &mut *steps,
                    weights,
                    strength,
                    narrow: &narrow,
                }),
                true => {
                    for ((slot, step), &weight) in slots.iter_mut().zip(&mut *steps).zip(&*weights)
                    {
                        *step *= strength;
                        let random = dice.roll();
                        if moves(weight, *step) {
                            *slot = narrow(rounding::round(weight + *step, tensor.dtype, random));
                        }
                    }
                }
            }
            widen(tensor, slots.as_flattened(), stored)?;
            refuse_overflow(start, tensor.dtype, weights, steps, stored)?;
            sums.measure(weights, steps, stored);
        }
        Ok(sums)
    }
}

/// Refuses elements from `start` on of which one was finite, and is not any more as it is stored.
fn refuse_overflow(
    start: usize,
    dtype: Dtype,
    weights: &[f32],
    steps: &[f32],
    stored: &[f32],
) -> Result<(), AdditionError> {
    let overflows = |(weight, stored): (&f32, &f32)| weight.is_finite() & !stored.is_finite();
    let pairs = || weights.iter().zip(stored);
    // Without a way out of the loop, which is taken hardly ever and would keep it from vectorizing.
    if pairs().fold(false, |any, pair| any | overflows(pair))
        && let Some(i) = pairs().position(overflows)
    {
        return Err(AdditionError::Overflow {
            element: start + i,
            dtype,
            weight: weights[i],
            step: steps[i],
        });
    }
    Ok(())
}

/// Whether an element becomes another one, and not merely the same value with other bits.
#[inline(always)]
fn moves(weight: f32, step: f32) -> bool {
    step != 0.0 && weight.is_finite()
}

/// Scales steps and puts the nearest values of the sums into slots of the stored type: a loop that is compiled for each instruction
/// set, to the same bits.
struct Nearest<'b, F, const WIDTH: usize> {
    slots: &'b mut [[u8; WIDTH]],
    steps: &'b mut [f32],
    weights: &'b [f32],
    strength: f32,
    narrow: &'b F,
}

impl<F: Fn(f32) -> [u8; WIDTH], const WIDTH: usize> WithSimd for Nearest<'_, F, WIDTH> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let elements = self.slots.iter_mut().zip(self.steps).zip(self.weights);
        for ((slot, step), &weight) in elements {
            *step *= self.strength;
            let sum = (self.narrow)(weight + *step);
            *slot = if moves(weight, *step) { sum } else { *slot };
        }
    }
}

/// Widens `bytes`, of the element type of `like`, to `out`.
fn widen(like: &TensorView<'_>, bytes: &[u8], out: &mut [f32]) -> Result<(), WidenError> {
    let view = TensorView { bytes, ..*like };
    view.widen_into(0..out.len(), out)
}

/// Elements added at once: three blocks of them fit the first-level cache.
const BLOCK: usize = 1024;

/// Why a perturbation was not applied.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ApplyError {
    /// The checkpoint is not the one that the deltas are for.
    #[error("the perturbation was made for other weights")]
    Base(#[source] Problems<BaseProblem>),
    /// Nothing to add.
    #[error("there is nothing to add")]
    Empty,
    /// A delta that is infinite or not a number, or that could come out as such.
    #[error("the delta of tensor `{tensor}` is not finite: {reason}")]
    NotFinite {
        /// The tensor.
        tensor: String,
        /// Where, in its form.
        reason: NotFinite,
    },
    /// A type whose blocks do not fit a tensor's rows.
    #[error(
        "tensor `{tensor}` has rows of {columns} elements, and {dtype} stores {} at a time",
        dtype.block().elements
    )]
    PatchedType {
        /// The tensor.
        tensor: String,
        /// The type that was asked for.
        dtype: Dtype,
        /// The length of a row.
        columns: usize,
    },
    /// Quantized types that keep too little of the perturbation.
    #[error(
        "{:.0}% of it would be left, less than {:.0}%; in tensor `{tensor}` of {dtype}, {:.0}%",
        100.0 * share, 100.0 * least, 100.0 * of_tensor
    )]
    TooCoarse {
        /// How much of it is left in all quantized tensors together, see [`Change::realized_share`].
        share: f64,
        /// The least that was asked for.
        least: f64,
        /// The tensor that keeps the least.
        tensor: String,
        /// How much that is.
        of_tensor: f64,
        /// Its type.
        dtype: Dtype,
    },
    /// Two deltas for one tensor.
    #[error("tensor `{tensor}` has two deltas")]
    Repeated {
        /// The tensor.
        tensor: String,
    },
    /// For an adapter, and not for weights, or the other way round.
    #[error("the perturbation is for {}, and this is {}", described(*.wanted), described(*.found))]
    Space {
        /// What it is for.
        wanted: Space,
        /// What it was to be applied to.
        found: Space,
    },
    /// The result could not be computed or written.
    #[error(transparent)]
    Write(#[from] WriteError<AdditionError>),
}

fn described(space: Space) -> &'static str {
    match space {
        Space::Adapter => "a LoRA adapter",
        _ => "the weights of a whole model",
    }
}

/// Why elements could not be patched.
#[derive(Clone, Debug, Error, PartialEq)]
#[non_exhaustive]
pub enum AdditionError {
    /// A chosen tensor without a delta, which [`Patch`]'s contract rules out.
    #[error("it has no delta")]
    NoDelta,
    /// The sum is too large for the stored type.
    #[error("element {element} would be {weight:e} + {step:e}, which {dtype} cannot hold")]
    Overflow {
        /// The element.
        element: usize,
        /// The stored type.
        dtype: Dtype,
        /// The old value.
        weight: f32,
        /// Strength times delta.
        step: f32,
    },
    /// A delta shorter than its tensor, which the check of the base rules out.
    #[error(transparent)]
    Read(#[from] WidenError),
}
