//! Merges a LoRA adapter with its perturbation into the base: W' = round(W + scale (B + dB) (A + dA)).
//!
//! In: the base, the adapter's checkpoint and the [`Adapter`] in it, the [`Wanted`] deltas of its A and B, and an output. Out: a
//! copy of the base (its sharding, element types and side files) in which every adapted weight is merged, and every tensor that
//! the adapter saves whole takes the place of the base's, in the base's type.
//!
//! A + dA and B + dB are kept in `f32`, whatever the adapter is stored in: only the sum is rounded, once. The scale is multiplied
//! into B. PEFT multiplies the product instead, so that its `merge_and_unload` of an F32 adapter may differ by one rounding, and
//! where W and the product almost cancel by what f32 itself leaves open.
//!
//! The [`RealizedChange`](super::RealizedChange) is that of the perturbation: what a merge without it would have stored is
//! subtracted from what is stored. Tensors that are saved whole are not part of it.

use std::collections::HashMap;
use std::ops::Range;

use half::{bf16, f16};
use panacea_formats::{
    Adapter, AdapterBaseProblem, Checkpoint, DeltaTensor, Destination, Dtype, NotFinite, Observer,
    Patch, Problems, TensorView, WidenError, WriteError, write_checkpoint,
};
use thiserror::Error;

use super::rounding::{self, Dice};
use super::sums::Sums;
use super::{Applied, ApplyError, ApplySettings, BLOCK, Wanted, realized, widened};

/// What is merged into what.
#[derive(Clone, Copy, Debug)]
pub struct Merge<'a> {
    /// The whole model.
    pub base: &'a Checkpoint,
    /// Whether the base's config ties its head to the embedding.
    pub tie_word_embeddings: bool,
    /// The adapter's checkpoint, which the deltas are for.
    pub checkpoint: &'a Checkpoint,
    /// The tensors of that checkpoint under their roles.
    pub adapter: &'a Adapter<'a>,
}

/// Writes the base of `merge` with the adapter and `wanted` merged into it to `destination`, which the caller commits.
///
/// Memory: the adapter twice in `f32`, beside the chunks of [`write_checkpoint`].
///
/// # Errors
/// [`MergeError`]; the output is then incomplete and should be dropped.
pub fn merge(
    merge: Merge<'_>,
    wanted: &Wanted<'_>,
    settings: ApplySettings,
    destination: Destination<'_>,
    observer: &impl Observer,
) -> Result<Applied, MergeError> {
    wanted.check(merge.checkpoint)?;
    merge
        .adapter
        .check_base(merge.base, merge.tie_word_embeddings)
        .map_err(MergeError::Base)?;
    let products = products(merge.adapter, wanted, settings)?;
    let mut changes = HashMap::new();
    for product in &products {
        changes.insert(product.name.as_str(), product.change()?);
    }
    for saved in merge.adapter.saved() {
        changes.insert(saved.name, Change::Replaced(saved.tensor));
    }
    let merging = Merging { changes, settings };
    let mut tensors: Vec<(String, Sums)> = Vec::new();
    let written = write_checkpoint(
        merge.base,
        &merging,
        destination,
        observer,
        |name, sums: Option<Sums>| {
            let Some(sums) = sums else { return };
            match tensors.last_mut() {
                Some((last, total)) if last == name => total.add(&sums),
                _ => tensors.push((name.to_owned(), sums)),
            }
        },
    )?;
    // The adapter was read while the base was copied.
    merge
        .checkpoint
        .check_unchanged()
        .map_err(WriteError::Input)?;
    Ok(Applied {
        files: written.files,
        sources: written.sources,
        side_files: written.side_files,
        realized: realized(tensors),
    })
}

/// The factors of one module before and after the perturbation, the scale in B.
struct Product {
    name: String,
    shape: [usize; 2],
    before: Factors,
    after: Factors,
}

struct Factors {
    a: Vec<f32>,
    b: Vec<f32>,
}

/// Adds the deltas to the factors of every module, in `f32`.
fn products(
    adapter: &Adapter<'_>,
    wanted: &Wanted<'_>,
    settings: ApplySettings,
) -> Result<Vec<Product>, MergeError> {
    let deltas: HashMap<&str, &DeltaTensor<'_>> = wanted
        .deltas
        .iter()
        .map(|delta| (delta.name(), delta))
        .collect();
    let strength = settings.strength.value();
    let moved = |tensor: &TensorView<'_>, values: &[f32]| -> Result<Vec<f32>, WidenError> {
        let mut moved = values.to_vec();
        if let Some(delta) = deltas.get(tensor.name) {
            let mut step = vec![0.0; moved.len()];
            delta.read_into(0..step.len(), &mut step)?;
            for (value, step) in moved.iter_mut().zip(step) {
                *value += strength * step;
            }
        }
        Ok(moved)
    };
    let mut products = Vec::with_capacity(adapter.modules().len());
    for module in adapter.modules() {
        let (a, b) = (widened(&module.a)?, widened(&module.b)?);
        let mut before = Factors { a, b };
        let mut after = Factors {
            a: moved(&module.a, &before.a)?,
            b: moved(&module.b, &before.b)?,
        };
        for factors in [&mut before, &mut after] {
            for value in &mut factors.b {
                *value *= module.scale;
            }
        }
        products.push(Product {
            name: module.weight(),
            shape: module.shape(),
            before,
            after,
        });
    }
    Ok(products)
}

impl Product {
    fn change(&self) -> Result<Change<'_>, MergeError> {
        let product = |factors: &'_ Factors| -> Result<(), MergeError> {
            match self
                .delta(factors)
                .and_then(|delta| delta.first_not_finite())
            {
                None => Ok(()),
                Some(problem) => Err(MergeError::NotFinite {
                    tensor: self.name.clone(),
                    problem,
                }),
            }
        };
        product(&self.before)?;
        product(&self.after)?;
        // The shapes were checked when the adapter was read.
        match (self.delta(&self.before), self.delta(&self.after)) {
            (Some(before), Some(after)) => Ok(Change::Merged { before, after }),
            _ => Err(MergeError::Shape {
                tensor: self.name.clone(),
            }),
        }
    }

    fn delta<'a>(&'a self, factors: &'a Factors) -> Option<DeltaTensor<'a>> {
        DeltaTensor::low_rank(&self.name, &self.shape, &factors.a, &factors.b)
    }
}

/// What becomes of one tensor of the base.
enum Change<'a> {
    /// A product is added.
    Merged {
        /// Without the perturbation, to compare with.
        before: DeltaTensor<'a>,
        after: DeltaTensor<'a>,
    },
    /// Another takes its place.
    Replaced(TensorView<'a>),
}

/// The patch of [`merge`].
struct Merging<'a> {
    /// For look-up only.
    changes: HashMap<&'a str, Change<'a>>,
    settings: ApplySettings,
}

impl Patch for Merging<'_> {
    /// Nothing where a tensor was replaced.
    type Report = Option<Sums>;
    type Error = MergingError;

    fn targets(&self, tensor: &TensorView<'_>) -> bool {
        self.changes.contains_key(tensor.name)
    }

    fn patch(
        &self,
        tensor: &TensorView<'_>,
        elements: Range<usize>,
        bytes: &mut [u8],
    ) -> Result<Option<Sums>, MergingError> {
        let dice = self.settings.rounding.dice(tensor.name, elements.start);
        match self.changes.get(tensor.name) {
            Some(Change::Merged { before, after }) => {
                add(tensor, before, after, elements, bytes, dice).map(Some)
            }
            Some(Change::Replaced(saved)) => {
                replace(tensor, saved, elements, bytes, dice).map(|()| None)
            }
            None => Ok(None),
        }
    }
}

/// Adds `after` to the elements `elements` of `tensor`, whose stored bytes `bytes` holds, and measures what `before` would not
/// have done.
fn add(
    tensor: &TensorView<'_>,
    before: &DeltaTensor<'_>,
    after: &DeltaTensor<'_>,
    elements: Range<usize>,
    bytes: &mut [u8],
    mut dice: Dice,
) -> Result<Sums, MergingError> {
    let mut sums = Sums::default();
    let width = width_of(tensor)?;
    let mut room = [[0.0_f32; BLOCK]; 5];
    for (start, slots) in elements.step_by(BLOCK).zip(bytes.chunks_mut(BLOCK * width)) {
        let length = slots.len() / width;
        let range = start..start + length;
        let [weights, without, steps, old, new] = room.each_mut().map(|it| &mut it[..length]);
        tensor.widen_into(range.clone(), weights)?;
        before.read_into(range.clone(), without)?;
        after.read_into(range, steps)?;
        for (place, slot) in slots.chunks_exact_mut(width).enumerate() {
            // One word for both, so that chance makes no difference where the perturbation makes none.
            let random = dice.roll();
            let weight = weights[place];
            let sum = |step: f32| match step != 0.0 && weight.is_finite() {
                true => stored(
                    rounding::round(weight + step, tensor.dtype, random),
                    tensor.dtype,
                ),
                false => weight,
            };
            (old[place], new[place]) = (sum(without[place]), sum(steps[place]));
            if weight.is_finite() && !new[place].is_finite() {
                return Err(MergingError::Overflow {
                    element: start + place,
                    dtype: tensor.dtype,
                    value: weight + steps[place],
                });
            }
            // Otherwise the bytes stay, a NaN's too.
            if new[place] != weight && weight.is_finite() {
                encode(new[place], tensor.dtype, slot);
            }
            steps[place] -= without[place];
        }
        sums.measure(old, steps, new);
    }
    Ok(sums)
}

/// Puts the elements `elements` of `saved`, rounded to the type of `tensor`, into `bytes`.
fn replace(
    tensor: &TensorView<'_>,
    saved: &TensorView<'_>,
    elements: Range<usize>,
    bytes: &mut [u8],
    mut dice: Dice,
) -> Result<(), MergingError> {
    let width = width_of(tensor)?;
    let mut room = [0.0_f32; BLOCK];
    for (start, slots) in elements.step_by(BLOCK).zip(bytes.chunks_mut(BLOCK * width)) {
        let values = &mut room[..slots.len() / width];
        saved.widen_into(start..start + values.len(), values)?;
        for (place, (slot, &value)) in slots.chunks_exact_mut(width).zip(&*values).enumerate() {
            let random = dice.roll();
            let rounded = stored(rounding::round(value, tensor.dtype, random), tensor.dtype);
            if !rounded.is_finite() {
                return Err(MergingError::Overflow {
                    element: start + place,
                    dtype: tensor.dtype,
                    value,
                });
            }
            encode(rounded, tensor.dtype, slot);
        }
    }
    Ok(())
}

fn width_of(tensor: &TensorView<'_>) -> Result<usize, WidenError> {
    let dtype = tensor.dtype;
    match dtype.is_float() {
        true => Ok(dtype.block().bytes),
        false => Err(WidenError::Dtype { dtype }),
    }
}

/// The nearest value that `dtype` holds, ties to even.
fn stored(value: f32, dtype: Dtype) -> f32 {
    match dtype {
        Dtype::BF16 => bf16::from_f32(value).to_f32(),
        Dtype::F16 => f16::from_f32(value).to_f32(),
        _ => value,
    }
}

/// Writes a value that `dtype` holds to its bytes.
fn encode(value: f32, dtype: Dtype, slot: &mut [u8]) {
    match dtype {
        Dtype::BF16 => slot.copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
        Dtype::F16 => slot.copy_from_slice(&f16::from_f32(value).to_le_bytes()),
        _ => slot.copy_from_slice(&value.to_le_bytes()),
    }
}

/// Why an adapter was not merged.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MergeError {
    /// The base is not the one that the adapter is for.
    #[error("the adapter is for another base")]
    Base(#[source] Problems<AdapterBaseProblem>),
    /// A factor that is infinite or not a number, or a product that could be.
    #[error("the product for tensor `{tensor}` cannot be added: {problem}")]
    NotFinite {
        /// The tensor of the base.
        tensor: String,
        /// What is not finite.
        problem: NotFinite,
    },
    /// A tensor of the adapter that cannot be read, which its reader rules out.
    #[error(transparent)]
    Read(#[from] WidenError),
    /// Factors without a product, which the adapter's reader rules out.
    #[error("the factors for tensor `{tensor}` have no product")]
    Shape {
        /// The tensor of the base.
        tensor: String,
    },
    /// The deltas are not for this adapter.
    #[error(transparent)]
    Wanted(#[from] ApplyError),
    /// The result could not be computed or written.
    #[error(transparent)]
    Write(#[from] WriteError<MergingError>),
}

/// Why elements could not be merged.
#[derive(Clone, Debug, Error, PartialEq)]
#[non_exhaustive]
pub enum MergingError {
    /// A value that is too large for the stored type, or not finite to begin with.
    #[error("element {element} would be {value:e}, which {dtype} cannot hold")]
    Overflow {
        /// The element.
        element: usize,
        /// The stored type.
        dtype: Dtype,
        /// The value.
        value: f32,
    },
    /// A tensor shorter than it says, which the checks rule out.
    #[error(transparent)]
    Read(#[from] WidenError),
}
