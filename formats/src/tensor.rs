//! A tensor as it is stored: a name, an element type, a shape and borrowed bytes.
//!
//! Nothing is copied or decoded until it is asked for. Bytes in a safetensors file start wherever the header's length leaves
//! them, so they are never assumed to be aligned.

use std::ops::Range;

use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use half::{bf16, f16};
use thiserror::Error;

use crate::blocks::{dequantize, quantize};
use crate::digest::Sha256;
use crate::dtype::Dtype;

/// A stored tensor, borrowed from its file.
///
/// A view handed out by this crate's readers has as many bytes as its shape and element type say.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    /// The name in its file.
    pub name: &'a str,
    /// The element type.
    pub dtype: Dtype,
    /// Outermost dimension first, row-major; empty for a scalar.
    pub shape: &'a [usize],
    /// The elements, little-endian, not necessarily aligned.
    pub bytes: &'a [u8],
}

impl TensorView<'_> {
    /// How many elements the shape holds; 1 for a scalar.
    ///
    /// Does not overflow for views from this crate's readers, which checked the product.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// The digest of the stored bytes. Costs one pass over them.
    pub fn digest(&self) -> Sha256 {
        Sha256::of(self.bytes)
    }

    /// Reads the elements in `range` as `f32` into `out`, which is as long as `range`. Exact for every value of a float type, where
    /// a NaN stays a NaN; of a quantized type, what llama.cpp dequantizes.
    ///
    /// # Errors
    /// [`WidenError`] when the element type is not readable, or when the lengths do not fit.
    pub fn widen_into(&self, range: Range<usize>, out: &mut [f32]) -> Result<(), WidenError> {
        if !self.dtype.is_readable() {
            return Err(WidenError::Dtype { dtype: self.dtype });
        }
        let block = self.dtype.block();
        let elements = self.bytes.len() / block.bytes * block.elements;
        if range.end.checked_sub(range.start) != Some(out.len()) || range.end > elements {
            return Err(WidenError::Range {
                start: range.start,
                end: range.end,
                elements,
                room: out.len(),
            });
        }
        // The whole blocks in the middle go straight to where they belong, what is cut off at both ends through a block aside.
        let head = (range.start.next_multiple_of(block.elements) - range.start).min(out.len());
        let (head, rest) = out.split_at_mut(head);
        let (body, tail) = rest.split_at_mut(rest.len() - rest.len() % block.elements);
        let bytes = &self.bytes[range.start / block.elements * block.bytes..];
        let mut aside = [0.0; MAX_BLOCK];
        let aside = &mut aside[..block.elements];
        if !head.is_empty() {
            let within = range.start % block.elements;
            widen(self.dtype, &bytes[..block.bytes], aside);
            head.copy_from_slice(&aside[within..within + head.len()]);
        }
        let bytes = &self.bytes[range.start.div_ceil(block.elements) * block.bytes..];
        let (whole, bytes) = bytes.split_at(body.len() / block.elements * block.bytes);
        widen(self.dtype, whole, body);
        if !tail.is_empty() {
            widen(self.dtype, &bytes[..block.bytes], aside);
            tail.copy_from_slice(&aside[..tail.len()]);
        }
        Ok(())
    }
}

/// Most elements in a block of a readable type.
const MAX_BLOCK: usize = 256;

/// Widens little-endian `bytes`, whole blocks of a readable `dtype`, to as many elements `out`.
fn widen(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        Dtype::F32 => {
            for (value, &bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                *value = f32::from_le_bytes(bytes);
            }
        }
        Dtype::BF16 => {
            for (value, &bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                // The upper half of an f32. `bf16::to_f32` also quiets NaNs, by a branch that keeps this loop from vectorizing.
                *value = f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16);
            }
        }
        Dtype::F16 => {
            // Through an aligned block, because the vector conversion takes a slice of halves.
            let mut block = [0_u16; BLOCK];
            for (out, bytes) in out.chunks_mut(BLOCK).zip(bytes.chunks(2 * BLOCK)) {
                let block = &mut block[..out.len()];
                for (bits, &bytes) in block.iter_mut().zip(bytes.as_chunks().0) {
                    *bits = u16::from_le_bytes(bytes);
                }
                block.reinterpret_cast::<f16>().convert_to_f32_slice(out);
            }
        }
        quantized => dequantize(quantized, bytes, out),
    }
}

/// Stores `values` as whole blocks of a patchable `dtype` in as many bytes `out`: as the nearest values of a float type, ties to even,
/// or as [`quantize`] does. Does nothing for other types.
pub fn narrow(dtype: Dtype, values: &[f32], out: &mut [u8]) {
    match dtype {
        Dtype::F32 => {
            for (bytes, value) in out.as_chunks_mut().0.iter_mut().zip(values) {
                *bytes = value.to_le_bytes();
            }
        }
        Dtype::BF16 => {
            for (bytes, &value) in out.as_chunks_mut().0.iter_mut().zip(values) {
                *bytes = bf16::from_f32(value).to_le_bytes();
            }
        }
        Dtype::F16 => {
            let mut block = [f16::ZERO; BLOCK];
            for (out, values) in out.chunks_mut(2 * BLOCK).zip(values.chunks(BLOCK)) {
                let block = &mut block[..values.len()];
                block.convert_from_f32_slice(values);
                for (bytes, half) in out.as_chunks_mut().0.iter_mut().zip(&*block) {
                    *bytes = half.to_le_bytes();
                }
            }
        }
        quantized => quantize(quantized, values, out),
    }
}

/// Halves converted at once: on the stack, and long enough that the detection of the instruction costs nothing.
const BLOCK: usize = 512;

/// Why elements were not widened.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum WidenError {
    /// An element type that is not read as numbers.
    #[error("{dtype} elements cannot be read as numbers")]
    Dtype {
        /// The element type.
        dtype: Dtype,
    },
    /// A range outside of the tensor, or of another length than the room for it.
    #[error("elements {start}..{end} of {elements} do not fit room for {room}")]
    Range {
        /// First element asked for.
        start: usize,
        /// One past the last.
        end: usize,
        /// Elements in the tensor.
        elements: usize,
        /// Length of the output.
        room: usize,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view<'a>(dtype: Dtype, shape: &'a [usize], bytes: &'a [u8]) -> TensorView<'a> {
        TensorView {
            name: "t",
            dtype,
            shape,
            bytes,
        }
    }

    /// IEEE 754 by its definition: sign, power of two, fraction. Slow, and shares nothing with the code under test.
    fn decode(bits: u32, exponent_bits: u32, mantissa_bits: u32) -> f64 {
        let sign = if bits >> (exponent_bits + mantissa_bits) == 1 {
            -1.0
        } else {
            1.0
        };
        let exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
        let mantissa = f64::from(bits & ((1 << mantissa_bits) - 1));
        let scale = 2_f64.powi(mantissa_bits.cast_signed());
        let bias = (1_i32 << (exponent_bits - 1)) - 1;
        match exponent {
            0 => sign * mantissa / scale * 2_f64.powi(1 - bias),
            top if top == (1 << exponent_bits) - 1 => {
                if mantissa == 0.0 {
                    sign * f64::INFINITY
                } else {
                    f64::NAN
                }
            }
            _ => sign * (1.0 + mantissa / scale) * 2_f64.powi(exponent.cast_signed() - bias),
        }
    }

    #[test]
    fn every_half_widens_to_its_exact_value_from_an_odd_address() {
        let mut bytes = vec![0xAA];
        bytes.extend((0..=u16::MAX).flat_map(u16::to_le_bytes));
        for (dtype, exponent, mantissa) in [(Dtype::F16, 5, 10), (Dtype::BF16, 8, 7)] {
            let shape = [65_536];
            let view = view(dtype, &shape, &bytes[1..]);
            let mut wide = vec![0.0; 65_536];
            view.widen_into(0..65_536, &mut wide).unwrap();
            for (bits, &found) in (0_u32..).zip(&wide) {
                let wanted = decode(bits, exponent, mantissa);
                if wanted.is_nan() {
                    assert!(found.is_nan(), "{dtype} {bits:#06x}: {found}");
                } else {
                    assert_eq!(
                        f64::from(found).to_bits(),
                        wanted.to_bits(),
                        "{dtype} {bits:#06x}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_range_starts_at_its_element() {
        let bytes: Vec<u8> = (0..700_u16)
            .flat_map(|i| f16::from_f32(f32::from(i)).to_le_bytes())
            .collect();
        let shape = [7, 100];
        let mut out = [0.0; 3];
        view(Dtype::F16, &shape, &bytes)
            .widen_into(511..514, &mut out)
            .unwrap();
        assert_eq!(out, [511.0, 512.0, 513.0]);
    }

    #[test]
    fn narrowing_a_widened_half_gives_its_bytes_again() {
        for dtype in [Dtype::F16, Dtype::BF16] {
            let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
            let shape = [65_536];
            let mut wide = vec![0.0; 65_536];
            view(dtype, &shape, &bytes)
                .widen_into(0..65_536, &mut wide)
                .unwrap();
            let mut again = vec![0; bytes.len()];
            narrow(dtype, &wide, &mut again);
            let halves = bytes.chunks(2).zip(again.chunks(2)).zip(&wide);
            for ((stored, again), value) in halves.filter(|(_, value)| !value.is_nan()) {
                assert_eq!(stored, again, "{dtype} {value}");
            }
        }
        let mut bytes = [0; 4];
        narrow(
            Dtype::BF16,
            &[1.0 + 1.0 / 256.0, -1.0 - 3.0 / 256.0],
            &mut bytes,
        );
        assert_eq!(bytes, [0x80, 0x3F, 0x82, 0xBF], "ties to even");
    }

    #[test]
    fn refuses_what_it_cannot_widen() {
        let shape = [2];
        let mut out = [0.0; 2];
        let mut widen = |dtype, range| view(dtype, &shape, &[0; 4]).widen_into(range, &mut out);
        assert_eq!(
            widen(Dtype::I16, 0..2),
            Err(WidenError::Dtype { dtype: Dtype::I16 })
        );
        assert!(widen(Dtype::BF16, 0..2).is_ok());
        assert!(widen(Dtype::BF16, 1..3).is_err());
        assert!(widen(Dtype::BF16, 0..1).is_err());
        assert!(widen(Dtype::BF16, usize::MAX / 2..usize::MAX / 2 + 2).is_err());
        #[expect(clippy::reversed_empty_ranges, reason = "the range under test")]
        let backwards = 2..0;
        assert!(widen(Dtype::BF16, backwards).is_err());
    }
}
