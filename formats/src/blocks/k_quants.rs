//! Blocks of 256 with scales for each sub-block of 16 or 32: Q2_K to Q6_K.
//!
//! Sub-blocks are contiguous, levels are not: the lower 2 bits of values `i`, `i + 32`, `i + 64` and `i + 96` of each 128 share a
//! byte in Q2_K and Q3_K, so that a vector of bytes shifted and masked is a vector of neighbors; other types alike. `read` has the
//! layouts as loops, `write` is their inverse, and this file the packing of scales in 6 bits.
//!
//! Writing is a search: for each sub-block the scale (and minimum) that make the sum of weighted squared errors small, among about
//! twenty candidates. It takes all the time. In `search` it runs for 16 sub-blocks side by side, one in each lane of a vector: sums
//! within a sub-block keep llama.cpp's order, and its bits.

mod lanes;
mod read;
mod search;
mod write;

pub(super) use read::{Q2K, Q3K, Q4K, Q5K, Q6K};
pub(super) use write::write;

/// Values in a block.
const VALUES: usize = 256;

/// The 8 pairs of scale and minimum, 0..64, of Q4_K and Q5_K.
///
/// Of the first four pairs, the scales are the lower 6 bits of bytes 0-3, the minimums those of bytes 4-7. Of the others, the lower
/// 4 bits are in bytes 8-11, scales below minimums; the upper 2 on top of bytes 0-3 and 4-7.
#[inline(always)]
fn pairs_of_6_bits(packed: &[u8]) -> [(u8, u8); 8] {
    std::array::from_fn(|i| match i {
        0..4 => (packed[i] & 63, packed[i + 4] & 63),
        _ => {
            let low = packed[i + 4];
            let (scale, minimum) = (packed[i - 4] >> 6, packed[i] >> 6);
            (low & 15 | scale << 4, low >> 4 | minimum << 4)
        }
    })
}

/// The inverse of [`pairs_of_6_bits`].
fn pack_pairs_of_6_bits(pairs: &[(u8, u8); 8]) -> [u8; 12] {
    let mut packed = [0; 12];
    for i in 0..4 {
        let ((scale, minimum), (high_scale, high_minimum)) = (pairs[i], pairs[i + 4]);
        packed[i] = scale | high_scale >> 4 << 6;
        packed[i + 4] = minimum | high_minimum >> 4 << 6;
        packed[i + 8] = high_scale & 15 | high_minimum << 4;
    }
    packed
}

/// The 16 scales, 0..64, of Q3_K: their lower 4 bits in bytes 0-7, scale `i + 8` above scale `i`; the upper 2 bits of scales `i`,
/// `i + 4`, `i + 8`, `i + 12` in byte `i + 8`.
#[inline(always)]
fn scales_of_6_bits(packed: &[u8]) -> [u8; 16] {
    std::array::from_fn(|i| {
        let low = packed[i % 8] >> (i / 8 * 4) & 15;
        let high = packed[8 + i % 4] >> (i / 4 * 2) & 3;
        low | high << 4
    })
}

/// The inverse of [`scales_of_6_bits`].
fn pack_scales_of_6_bits(scales: &[u8; 16]) -> [u8; 12] {
    let mut packed = [0; 12];
    for (i, scale) in scales.iter().enumerate() {
        packed[i % 8] |= (scale & 15) << (i / 8 * 4);
        packed[8 + i % 4] |= (scale >> 4) << (i / 4 * 2);
    }
    packed
}

/// `x` rounded to an integer, ties to even, as llama.cpp's `nearest_int` does: exact up to 2^22, beyond it what becomes of the bits.
#[inline(always)]
fn nearest(x: f32) -> i32 {
    let bits = (x + ROUNDING).to_bits() & MANTISSA;
    bits.cast_signed() - (1 << 22)
}

/// 1.5 * 2^23: a number that it is added to keeps no fraction.
const ROUNDING: f32 = 12_582_912.0;

/// Bits of a float's mantissa.
const MANTISSA: u32 = (1 << 23) - 1;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packed_scales_unpack_to_themselves_and_every_bit_of_the_twelve_bytes_is_used() {
        for bit in 0..96 {
            let mut packed = [0_u8; 12];
            packed[bit / 8] = 1 << (bit % 8);
            assert_eq!(pack_pairs_of_6_bits(&pairs_of_6_bits(&packed)), packed);
            assert_eq!(pack_scales_of_6_bits(&scales_of_6_bits(&packed)), packed);
        }
    }

    #[test]
    fn nearest_takes_halves_to_even_numbers() {
        for (x, wanted) in [
            (0.5, 0),
            (1.5, 2),
            (2.5, 2),
            (-0.5, 0),
            (-1.5, -2),
            (0.499_999_97, 0),
            (4_194_303.0, 4_194_303),
        ] {
            assert_eq!(nearest(x), wanted, "{x}");
        }
    }
}
