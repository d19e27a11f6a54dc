//! Sums in quantized tensors, and in tensors that get a finer type than they had.
//!
//! A block's elements share a scale, so they are quantized together: a block of which any element moves is quantized anew, from the
//! sums of all, and any other keeps its bytes. Rounding is llama.cpp's, to the nearest; there is none by chance.

use std::ops::Range;

use panacea_formats::{DeltaTensor, Dtype, TensorView, WidenError, narrow};

use super::sums::Sums;
use super::{Addition, AdditionError, BLOCK, moves, refuse_overflow};

/// What a tensor of type `stored` is stored in after it was patched, when `wanted` is asked for: that, if it has more bits for an
/// element.
pub(super) fn patched_type(stored: Dtype, wanted: Option<Dtype>) -> Dtype {
    // Bytes of the same number of elements, a multiple of every block.
    let size = |dtype: Dtype| dtype.bytes_of(BLOCK);
    wanted
        .filter(|&wanted| size(wanted) > size(stored))
        .unwrap_or(stored)
}

impl Addition<'_> {
    /// Adds `delta` to the elements `elements` of `tensor`, and stores the sums as blocks of `dtype` in `bytes`, which hold the stored
    /// ones where that is the tensor's own type.
    pub(super) fn add_in_blocks(
        &self,
        delta: &DeltaTensor<'_>,
        tensor: &TensorView<'_>,
        elements: Range<usize>,
        dtype: Dtype,
        bytes: &mut [u8],
    ) -> Result<Sums, AdditionError> {
        let strength = self.settings.strength.value();
        let block = dtype.block();
        let [mut weights, mut steps, mut values] = [[0.0_f32; BLOCK]; 3];
        let mut sums = Sums::default();
        let slots = bytes.chunks_mut(BLOCK / block.elements * block.bytes);
        for (start, slots) in elements.step_by(BLOCK).zip(slots) {
            let range = start..start + slots.len() / block.bytes * block.elements;
            let weights = &mut weights[..range.len()];
            let steps = &mut steps[..range.len()];
            let values = &mut values[..range.len()];
            tensor.widen_into(range.clone(), weights)?;
            delta.read_into(range, steps)?;
            for ((value, step), &weight) in values.iter_mut().zip(&mut *steps).zip(&*weights) {
                *step *= strength;
                *value = weight + *step;
            }
            let blocks = slots
                .chunks_exact_mut(block.bytes)
                .zip(weights.chunks_exact(block.elements))
                .zip(steps.chunks_exact(block.elements))
                .zip(values.chunks_exact(block.elements));
            for (((slot, weights), steps), values) in blocks {
                let mut pairs = weights.iter().zip(steps);
                let moves = pairs.any(|(&weight, &step)| moves(weight, step));
                let finite = weights.iter().all(|weight| weight.is_finite());
                if dtype != tensor.dtype || moves && finite {
                    narrow(dtype, values, slot);
                }
            }
            stored(dtype, slots, values)?;
            refuse_overflow(start, dtype, weights, steps, values)?;
            sums.measure(weights, steps, values);
        }
        Ok(sums)
    }
}

/// Reads `bytes`, blocks of `dtype`, into `values`.
fn stored(dtype: Dtype, bytes: &[u8], values: &mut [f32]) -> Result<(), WidenError> {
    let shape = [values.len()];
    let view = TensorView {
        name: "",
        dtype,
        shape: &shape,
        bytes,
    };
    view.widen_into(0..values.len(), values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finer_type_replaces_a_coarser_one_and_no_other() {
        let q8 = Some(Dtype::Q8_0);
        assert_eq!(patched_type(Dtype::Q4_K, q8), Dtype::Q8_0);
        assert_eq!(patched_type(Dtype::F16, q8), Dtype::F16);
        assert_eq!(patched_type(Dtype::Q8_0, q8), Dtype::Q8_0);
        assert_eq!(patched_type(Dtype::Q4_0, None), Dtype::Q4_0);
    }
}
