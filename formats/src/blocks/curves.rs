//! Blocks of 32 indices into a fixed curve of 16 values: read only.

use super::{ReadBlock, half_at};

/// IQ4_NL: `d` f16, then 16 bytes of indices. A value is `d` times the curve's.
pub(super) struct Iq4Nl;

impl ReadBlock<18, 32> for Iq4Nl {
    #[inline(always)]
    fn read(block: &[u8; 18], out: &mut [f32; 32]) {
        let d = half_at(block, 0);
        look_up(d, &IQ4_NL, &block[2..], out);
    }
}

/// MXFP4: the exponent of the scale 2^(e - 127), then 16 bytes of indices.
///
/// The exponent 255, which the OCP's specification makes NaN, is read as the number that it would be otherwise, as llama.cpp does.
pub(super) struct Mxfp4;

impl ReadBlock<17, 32> for Mxfp4 {
    #[inline(always)]
    fn read(block: &[u8; 17], out: &mut [f32; 32]) {
        // Half of the scale, because the levels are doubled.
        let half_scale = match u32::from(block[0]) {
            exponent @ 0..2 => f32::from_bits(0x0020_0000 << exponent), // subnormal
            exponent => f32::from_bits((exponent - 1) << 23),
        };
        look_up(half_scale, &FP4_DOUBLED, &block[1..], out);
    }
}

/// Values of the curve, times `scale`. Value `i` is found by the lower half of byte `i`, value `i + 16` by the upper.
#[inline(always)]
fn look_up(scale: f32, curve: &[f32; 16], indices: &[u8], out: &mut [f32; 32]) {
    let mut scaled = *curve;
    for value in &mut scaled {
        *value *= scale;
    }
    let (lower, upper) = out.split_at_mut(16);
    for ((lower, upper), byte) in lower.iter_mut().zip(upper).zip(indices) {
        *lower = scaled[usize::from(byte & 15)];
        *upper = scaled[usize::from(byte >> 4)];
    }
}

/// llama.cpp's `kvalues_iq4nl`: closer together near 0, where weights are.
const IQ4_NL: [f32; 16] = [
    -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0,
    89.0, 113.0,
];

/// Twice the values of a float with 2 exponent bits and 1 of mantissa. Negative zero is read as 0, as llama.cpp does.
const FP4_DOUBLED: [f32; 16] = [
    0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0,
];
