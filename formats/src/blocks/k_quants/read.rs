//! Blocks of 256 as values: the layouts, as loops.

use super::super::{ReadBlock, half_at};
use super::{VALUES, pairs_of_6_bits, scales_of_6_bits};

/// `d * scale * level - dmin * minimum`, in sub-blocks of 16 with scale and minimum in one byte. Levels of 2 bits.
pub(crate) struct Q2K;

impl ReadBlock<84, VALUES> for Q2K {
    #[inline(always)]
    fn read(block: &[u8; 84], out: &mut [f32; VALUES]) {
        let (d, dmin) = (half_at(block, 80), half_at(block, 82));
        let levels = two_bits(&block[16..80]);
        let (out, _) = out.as_chunks_mut::<16>();
        for ((out, levels), pair) in out
            .iter_mut()
            .zip(levels.as_chunks::<16>().0)
            .zip(&block[..16])
        {
            let scale = d * f32::from(pair & 15);
            let minimum = dmin * f32::from(pair >> 4);
            for (value, &level) in out.iter_mut().zip(levels) {
                *value = scale * f32::from(level) - minimum;
            }
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
        for (part, levels) in levels.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            for (level, third) in levels.iter_mut().zip(&block[..32]) {
                *level |= (third >> part & 1) << 2;
            }
        }
        let scales = scales_of_6_bits(&block[96..108]);
        let (out, _) = out.as_chunks_mut::<16>();
        for ((out, levels), scale) in out.iter_mut().zip(levels.as_chunks::<16>().0).zip(scales) {
            let scale = d * f32::from(scale.cast_signed() - 32);
            for (value, &level) in out.iter_mut().zip(levels) {
                *value = scale * f32::from(level.cast_signed() - 4);
            }
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
        for (part, levels) in levels.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            for (level, fifth) in levels.iter_mut().zip(&block[16..48]) {
                *level |= (fifth >> part & 1) << 4;
            }
        }
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
        let (out, _) = out.as_chunks_mut::<16>();
        let scales = &block[192..208];
        for ((out, levels), scale) in out.iter_mut().zip(levels.as_chunks::<16>().0).zip(scales) {
            let scale = d * f32::from(scale.cast_signed());
            for (value, &level) in out.iter_mut().zip(levels) {
                *value = scale * f32::from(level.cast_signed() - 32);
            }
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
    let pairs = pairs_of_6_bits(&block[4..16]);
    let (out, _) = out.as_chunks_mut::<32>();
    let levels = levels.as_chunks::<32>().0;
    for ((out, levels), (scale, minimum)) in out.iter_mut().zip(levels).zip(pairs) {
        let scale = d * f32::from(scale);
        let minimum = dmin * f32::from(minimum);
        for (value, &level) in out.iter_mut().zip(levels) {
            *value = scale * f32::from(level) - minimum;
        }
    }
}

/// The 256 numbers in 64 bytes: of each 128, numbers `i`, `i + 32`, `i + 64`, `i + 96` share byte `i`, the first lowest.
#[inline(always)]
fn two_bits(packed: &[u8]) -> [u8; VALUES] {
    let mut numbers = [0; VALUES];
    for (part, numbers) in numbers.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let packed = &packed[part / 4 * 32..];
        for (number, packed) in numbers.iter_mut().zip(packed) {
            *number = packed >> (part % 4 * 2) & 3;
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
