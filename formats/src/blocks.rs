//! Quantized blocks: bytes of GGUF's quantized types <-> `f32` values, as llama.cpp computes them.

use crate::dtype::Dtype;

/// Reads `bytes`, whole blocks of a quantized `dtype`, as the `f32` values that llama.cpp dequantizes, to as many elements `out`.
///
/// Does nothing for types that are not quantized ones, or are not known by their blocks' content: ask [`Dtype::is_readable`].
pub fn dequantize(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    let _ = (dtype, bytes, out);
    unimplemented!("quantized blocks")
}

/// Quantizes `values`, finite and whole blocks, to as many blocks `out` of `dtype`, as llama.cpp does without an importance matrix.
///
/// Does nothing for types of which [`Dtype::is_quantized`] is not true.
pub fn quantize(dtype: Dtype, values: &[f32], out: &mut [u8]) {
    let _ = (dtype, values, out);
    unimplemented!("quantized blocks")
}
