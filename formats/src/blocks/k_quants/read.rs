//! Blocks of 256 as values: the layouts, as loops.
//!
//! Scales are first spread over the values they are of: the compiler makes one loop over 256 a loop of vectors, which it does not do
//! with one over a sub-block inside of another.

use super::super::{ReadBlock, half_at};
use super::{VALUES, pairs_of_6_bits, scales_of_6_bits};

/// `d * scale * level - dmin * minimum`, in sub-blocks of 16 with scale and minimum in one byte. Levels of 2 bits.
pub(crate) struct Q2K;

impl ReadBlock<84, VALUES> for Q2K {
    #[inline(always)]
    fn read(block: &[u8; 84], out: &mut [f32; VALUES]) {
        let (d, dmin) = (half_at(block, 80), half_at(block, 82));
        let levels = two_bits(&block[16..80]);
        let (mut scales, mut minimums) = ([0.0; VALUES], [0.0; VALUES]);
        for (i, pair) in block[..16].iter().enumerate() {
            scales[i * 16..][..16].fill(d * f32::from(pair & 15));
            minimums[i * 16..][..16].fill(dmin * f32::from(pair >> 4));
        }
        for i in 0..VALUES {
            out[i] = scales[i] * f32::from(levels[i]) - minimums[i];
        }
    }
}

/// `d * (scale - 32) * (level - 4)`, in sub-blocks of 16. Levels of 3 bits, of which the third of value `i` is bit `i / 32` of
/// byte `i % 32`.
pub(crate) struct Q3K;

impl ReadBlock<110, VALUES> for Q3K {
    #[inline(always)]
    fn read(block: &[u8; 110], out: &mut [f32; VALUES]) {
        let d = half_at(block, 108);
        let mut levels = two_bits(&block[32..96]);
        add_upper_bits(&mut levels, &block[..32], 4);
        let mut scales = [0.0; VALUES];
        for (i, scale) in scales_of_6_bits(&block[96..108]).iter().enumerate() {
            scales[i * 16..][..16].fill(d * f32::from(scale.cast_signed() - 32));
        }
        for i in 0..VALUES {
            out[i] = scales[i] * f32::from(levels[i].cast_signed() - 4);
        }
    }
}

/// `d * scale * level - dmin * minimum`, in sub-blocks of 32. Levels of 4 bits, of which those of values `i` and `i + 32` of each 64
/// share a byte.
pub(crate) struct Q4K;

impl ReadBlock<144, VALUES> for Q4K {
    #[inline(always)]
    fn read(block: &[u8; 144], out: &mut [f32; VALUES]) {
        scale_32(block, &four_bits(&block[16..]), out);
    }
}

/// As Q4_K, with levels of 5 bits, of which the fifth of value `i` is bit `i / 32` of byte `i % 32`.
pub(crate) struct Q5K;

impl ReadBlock<176, VALUES> for Q5K {
    #[inline(always)]
    fn read(block: &[u8; 176], out: &mut [f32; VALUES]) {
        let mut levels = four_bits(&block[48..]);
        add_upper_bits(&mut levels, &block[16..48], 16);
        scale_32(block, &levels, out);
    }
}

/// `d * scale * (level - 32)`, in sub-blocks of 16. Levels of 6 bits: in each 128, the lower 4 of values `i` and `i + 64` share a
/// byte, and the upper 2 of values `i`, `i + 32`, `i + 64`, `i + 96`.
pub(crate) struct Q6K;

impl ReadBlock<210, VALUES> for Q6K {
    #[inline(always)]
    fn read(block: &[u8; 210], out: &mut [f32; VALUES]) {
        let d = half_at(block, 208);
        let mut levels = two_bits(&block[128..192]);
        let (parts, _) = levels.as_chunks_mut::<64>();
        for (part, levels) in parts.iter_mut().enumerate() {
            let low = &block[part / 2 * 64..];
            for (level, low) in levels.iter_mut().zip(low) {
                *level = *level << 4 | low >> (part % 2 * 4) & 15;
            }
        }
        let mut scales = [0.0; VALUES];
        for (i, scale) in block[192..208].iter().enumerate() {
            scales[i * 16..][..16].fill(d * f32::from(scale.cast_signed()));
        }
        for i in 0..VALUES {
            out[i] = scales[i] * f32::from(levels[i].cast_signed() - 32);
        }
    }
}

/// Values of Q4_K and Q5_K, which start alike: `d`, `dmin`, packed scales and minimums.
#[inline(always)]
fn scale_32<const BYTES: usize>(
    block: &[u8; BYTES],
    levels: &[u8; VALUES],
    out: &mut [f32; VALUES],
) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let (mut scales, mut minimums) = ([0.0; VALUES], [0.0; VALUES]);
    for (i, (scale, minimum)) in pairs_of_6_bits(&block[4..16]).iter().enumerate() {
        scales[i * 32..][..32].fill(d * f32::from(*scale));
        minimums[i * 32..][..32].fill(dmin * f32::from(*minimum));
    }
    for i in 0..VALUES {
        out[i] = scales[i] * f32::from(levels[i]) - minimums[i];
    }
}

/// Adds `weight` to the numbers `i` of which bit `i / 32` of byte `i % 32` is set.
#[inline(always)]
fn add_upper_bits(numbers: &mut [u8; VALUES], bits: &[u8], weight: u8) {
    for (part, numbers) in numbers.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        for (number, bits) in numbers.iter_mut().zip(bits) {
            *number |= if bits & 1 << part == 0 { 0 } else { weight };
        }
    }
}

/// The 256 numbers in 64 bytes: of each 128, numbers `i`, `i + 32`, `i + 64`, `i + 96` share byte `i`, the first lowest.
#[inline(always)]
fn two_bits(packed: &[u8]) -> [u8; VALUES] {
    let mut numbers = [0; VALUES];
    let (halves, packed) = (numbers.as_chunks_mut::<128>().0, packed.as_chunks::<32>().0);
    for (numbers, packed) in halves.iter_mut().zip(packed) {
        for (i, packed) in packed.iter().enumerate() {
            numbers[i] = packed & 3;
            numbers[i + 32] = packed >> 2 & 3;
            numbers[i + 64] = packed >> 4 & 3;
            numbers[i + 96] = packed >> 6;
        }
    }
    numbers
}

/// The 256 numbers in 128 bytes: of each 64, numbers `i` and `i + 32` share byte `i`, the first lower.
#[inline(always)]
fn four_bits(packed: &[u8]) -> [u8; VALUES] {
    let mut numbers = [0; VALUES];
    for (part, numbers) in numbers.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let packed = &packed[part / 2 * 32..];
        for (number, packed) in numbers.iter_mut().zip(packed) {
            *number = packed >> (part % 2 * 4) & 15;
        }
    }
    numbers
}
