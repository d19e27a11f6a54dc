//! Quantized blocks: bytes of GGUF's quantized types <-> `f32` values, bit for bit as llama.cpp computes them.
//!
//! A block holds 32 or 256 neighboring values of one row as small integers ("levels") and a few scales. Numbers are little-endian,
//! `f16` is IEEE 754 binary16. A value is `d * level`, or `d * level + m` where there is a minimum; the types named `_K` have scales
//! for each sub-block of 16 or 32, themselves in few bits, times the `f16` scales of the block. Fields in the order of their bytes:
//!
//! | type | values | bytes | fields |
//! |---|---|---|---|
//! | Q4_0 | 32 | 18 | `d` f16, `levels` 16 |
//! | Q4_1 | 32 | 20 | `d` f16, `m` f16, `levels` 16 |
//! | Q5_0 | 32 | 22 | `d` f16, `fifth bits` 4, `levels` 16 |
//! | Q5_1 | 32 | 24 | `d` f16, `m` f16, `fifth bits` 4, `levels` 16 |
//! | Q8_0 | 32 | 34 | `d` f16, `levels` 32, signed |
//! | Q2_K | 256 | 84 | `scale, minimum` 16 of 4 + 4 bits, `levels` 64, `d` f16, `dmin` f16 |
//! | Q3_K | 256 | 110 | `third bits` 32, `levels` 64, `scales` 12 (16 of 6 bits), `d` f16 |
//! | Q4_K | 256 | 144 | `d` f16, `dmin` f16, `scales, minimums` 12 (8 pairs of 6 bits), `levels` 128 |
//! | Q5_K | 256 | 176 | `d` f16, `dmin` f16, `scales, minimums` 12, `fifth bits` 32, `levels` 128 |
//! | Q6_K | 256 | 210 | `lower bits` 128, `upper bits` 64, `scales` 16, signed, `d` f16 |
//! | IQ4_NL | 32 | 18 | `d` f16, `indices` 16 into a curve of 16 values |
//! | MXFP4 | 32 | 17 | `exponent` 1, `indices` 16 into the values of a 4-bit float |
//!
//! Where two levels share a byte in a block of 32, the lower half is of value `i`, the upper of value `i + 16`. The orders in blocks
//! of 256 are told in `k_quants`.
//!
//! # Which bits
//!
//! Those of `ggml-quants.c` as compilers for x86-64 make it: `f32` arithmetic in the order of its source, each operation rounded on
//! its own. Here no operation is fused with another, so every processor gives these bits. A compiler of C may fuse them where the
//! processor can (the default for AArch64): gcc, told to build for an x86-64 with fused operations, gave other bytes for 3 in 10
//! blocks of random values in Q2_K and Q5_K, 1 in 16 in Q4_K, and none in Q8_0.
//!
//! [`quantize`] does what llama.cpp's `ggml_quantize_chunk` does without an importance matrix. gguf-py, with which
//! `convert_hf_to_gguf.py` writes Q8_0, gives the same bytes there, halves rounded away from zero included.
//!
//! Facts: llama.cpp, `ggml/src/ggml-quants.c` and `ggml-common.h`, a compiled copy of which wrote `testdata/blocks`.

mod curves;
mod k_quants;
mod legacy;

use std::marker::PhantomData;

use half::f16;
use pulp::{Simd, WithSimd};

use crate::dtype::Dtype;

/// Reads `bytes`, whole blocks of a quantized `dtype`, as the `f32` values that llama.cpp dequantizes, to as many elements `out`.
///
/// Any bytes give values; scales that are infinite or NaN give infinite values or NaN. A part of a block at the end, of `bytes` or
/// of `out`, is left as it is. Does nothing for types that are not quantized ones, or are not known by their blocks' content: ask
/// [`Dtype::is_readable`]. Runs on the thread that calls it.
pub fn dequantize(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        Dtype::Q4_0 => read::<legacy::Q4Zero, _, _>(bytes, out),
        Dtype::Q4_1 => read::<legacy::Q4One, _, _>(bytes, out),
        Dtype::Q5_0 => read::<legacy::Q5Zero, _, _>(bytes, out),
        Dtype::Q5_1 => read::<legacy::Q5One, _, _>(bytes, out),
        Dtype::Q8_0 => read::<legacy::Q8Zero, _, _>(bytes, out),
        Dtype::Q2_K => read::<k_quants::Q2K, _, _>(bytes, out),
        Dtype::Q3_K => read::<k_quants::Q3K, _, _>(bytes, out),
        Dtype::Q4_K => read::<k_quants::Q4K, _, _>(bytes, out),
        Dtype::Q5_K => read::<k_quants::Q5K, _, _>(bytes, out),
        Dtype::Q6_K => read::<k_quants::Q6K, _, _>(bytes, out),
        Dtype::IQ4_NL => read::<curves::Iq4Nl, _, _>(bytes, out),
        Dtype::MXFP4 => read::<curves::Mxfp4, _, _>(bytes, out),
        _ => {}
    }
}

/// Quantizes `values`, finite and whole blocks, to as many blocks `out` of `dtype`, as llama.cpp does without an importance matrix.
///
/// Finite values can be too large: where a block's scale is beyond the largest `f16`, 65504, it is written as infinite, and the
/// values read back are infinite or NaN; Q4_0, whose scale is the largest value / -8, can hold values up to 524032. Of values that
/// are infinite or NaN the result is a block without meaning, not a panic. A part of a block at the end, of `values` or of `out`, is
/// left as it is. Does nothing for types of which [`Dtype::is_quantized`] is not true. Runs on the thread that calls it.
pub fn quantize(dtype: Dtype, values: &[f32], out: &mut [u8]) {
    match dtype {
        Dtype::Q4_0 => write::<legacy::Q4Zero, _, _>(values, out),
        Dtype::Q4_1 => write::<legacy::Q4One, _, _>(values, out),
        Dtype::Q5_0 => write::<legacy::Q5Zero, _, _>(values, out),
        Dtype::Q5_1 => write::<legacy::Q5One, _, _>(values, out),
        Dtype::Q8_0 => write::<legacy::Q8Zero, _, _>(values, out),
        Dtype::Q2_K => k_quants::write::<k_quants::Q2K, _>(values, out),
        Dtype::Q3_K => k_quants::write::<k_quants::Q3K, _>(values, out),
        Dtype::Q4_K => k_quants::write::<k_quants::Q4K, _>(values, out),
        Dtype::Q5_K => k_quants::write::<k_quants::Q5K, _>(values, out),
        Dtype::Q6_K => k_quants::write::<k_quants::Q6K, _>(values, out),
        _ => {}
    }
}

/// A type whose blocks of `BYTES` bytes are read as `ELEMENTS` values.
trait ReadBlock<const BYTES: usize, const ELEMENTS: usize> {
    /// Called once for each block: `inline(always)`, so that it is compiled for the caller's instruction set.
    fn read(block: &[u8; BYTES], out: &mut [f32; ELEMENTS]);
}

/// A type whose blocks are written one by one.
trait WriteBlock<const BYTES: usize, const ELEMENTS: usize> {
    /// As [`ReadBlock::read`].
    fn write(values: &[f32; ELEMENTS], block: &mut [u8; BYTES]);
}

/// Reads block after block, compiled for the best instruction set of the processor.
fn read<T, const BYTES: usize, const ELEMENTS: usize>(bytes: &[u8], out: &mut [f32])
where
    T: ReadBlock<BYTES, ELEMENTS>,
{
    let (bytes, out) = (bytes.as_chunks().0, out.as_chunks_mut().0);
    let of = PhantomData::<T>;
    pulp::Arch::new().dispatch(Read { of, bytes, out });
}

struct Read<'a, T, const BYTES: usize, const ELEMENTS: usize> {
    of: PhantomData<T>,
    bytes: &'a [[u8; BYTES]],
    out: &'a mut [[f32; ELEMENTS]],
}

impl<T, const BYTES: usize, const ELEMENTS: usize> WithSimd for Read<'_, T, BYTES, ELEMENTS>
where
    T: ReadBlock<BYTES, ELEMENTS>,
{
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for (bytes, out) in self.bytes.iter().zip(self.out) {
            T::read(bytes, out);
        }
    }
}

/// Writes block after block, compiled for the best instruction set of the processor.
fn write<T, const BYTES: usize, const ELEMENTS: usize>(values: &[f32], out: &mut [u8])
where
    T: WriteBlock<BYTES, ELEMENTS>,
{
    let (values, out) = (values.as_chunks().0, out.as_chunks_mut().0);
    let of = PhantomData::<T>;
    pulp::Arch::new().dispatch(Write { of, values, out });
}

struct Write<'a, T, const BYTES: usize, const ELEMENTS: usize> {
    of: PhantomData<T>,
    values: &'a [[f32; ELEMENTS]],
    out: &'a mut [[u8; BYTES]],
}

impl<T, const BYTES: usize, const ELEMENTS: usize> WithSimd for Write<'_, T, BYTES, ELEMENTS>
where
    T: WriteBlock<BYTES, ELEMENTS>,
{
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for (values, out) in self.values.iter().zip(self.out) {
            T::write(values, out);
        }
    }
}

/// The `f16` that starts at byte `at` of a block.
#[inline(always)]
fn half_at<const BYTES: usize>(block: &[u8; BYTES], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Stores `value` at byte `at` of a block, rounded to the nearest `f16` (ties to even), and returns what was stored.
#[inline(always)]
fn put_half<const BYTES: usize>(block: &mut [u8; BYTES], at: usize, value: f32) -> f32 {
    let half = f16::from_f32(value);
    block[at..at + 2].copy_from_slice(&half.to_le_bytes());
    half.to_f32()
}

/// The lowest 8 bits, as C converts integers.
#[inline(always)]
fn low_byte(value: i32) -> u8 {
    value.to_le_bytes()[0]
}
