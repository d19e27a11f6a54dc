//! Blocks of 32 with one scale: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0.
//!
//! Written in one pass: the largest value, or the range, gives the scale, and every value is divided by it and rounded. The scale in
//! the divisor is the exact one, not its `f16` that is stored.
//!
//! A scale so small that its reciprocal is infinite (values below 2^-120 or so) is stored as 0. All levels of such a block are 0 too,
//! because x86-64 converts what is out of an integer's range so; AArch64 does not.

use super::{ReadBlock, WriteBlock, half_at, put_half};

const VALUES: usize = 32;
const HALF: usize = VALUES / 2;

/// `d * (level - 8)`
pub(crate) struct Q4Zero;

impl ReadBlock<18, VALUES> for Q4Zero {
    #[inline(always)]
    fn read(block: &[u8; 18], out: &mut [f32; VALUES]) {
        let d = half_at(block, 0);
        for (value, level) in out.iter_mut().zip(nibbles(&block[2..])) {
            *value = f32::from(level.cast_signed() - 8) * d;
        }
    }
}

/// `d * level + m`
pub(crate) struct Q4One;

impl ReadBlock<20, VALUES> for Q4One {
    #[inline(always)]
    fn read(block: &[u8; 20], out: &mut [f32; VALUES]) {
        let (d, m) = (half_at(block, 0), half_at(block, 2));
        for (value, level) in out.iter_mut().zip(nibbles(&block[4..])) {
            *value = f32::from(level) * d + m;
        }
    }
}

/// `d * (level - 16)`
pub(crate) struct Q5Zero;

impl ReadBlock<22, VALUES> for Q5Zero {
    #[inline(always)]
    fn read(block: &[u8; 22], out: &mut [f32; VALUES]) {
        let d = half_at(block, 0);
        for (value, level) in out.iter_mut().zip(five_bits(&block[2..6], &block[6..])) {
            *value = f32::from(level.cast_signed() - 16) * d;
        }
    }
}

/// `d * level + m`
pub(crate) struct Q5One;

impl ReadBlock<24, VALUES> for Q5One {
    #[inline(always)]
    fn read(block: &[u8; 24], out: &mut [f32; VALUES]) {
        let (d, m) = (half_at(block, 0), half_at(block, 2));
        for (value, level) in out.iter_mut().zip(five_bits(&block[4..8], &block[8..])) {
            *value = f32::from(level) * d + m;
        }
    }
}

/// `d * level`
pub(crate) struct Q8Zero;

impl ReadBlock<34, VALUES> for Q8Zero {
    #[inline(always)]
    fn read(block: &[u8; 34], out: &mut [f32; VALUES]) {
        let d = half_at(block, 0);
        let mut levels = [0; VALUES];
        levels.copy_from_slice(&block[2..]);
        for (value, level) in out.iter_mut().zip(levels) {
            *value = f32::from(level.cast_signed()) * d;
        }
    }
}

impl WriteBlock<18, VALUES> for Q4Zero {
    /// The value that is farthest from 0 becomes level 0: on its side of 0 there is one level more.
    #[inline(always)]
    fn write(values: &[f32; VALUES], block: &mut [u8; 18]) {
        let d = farthest(values) / -8.0;
        put_half(block, 0, d);
        let (inverse, offset) = match reciprocal(d) {
            Some(inverse) => (inverse, 8.5),
            None => (0.0, 0.0),
        };
        put_nibbles(&mut block[2..], &levels(values, 0.0, inverse, offset, 15));
    }
}

impl WriteBlock<20, VALUES> for Q4One {
    #[inline(always)]
    fn write(values: &[f32; VALUES], block: &mut [u8; 20]) {
        let (least, most) = range(values);
        let d = (most - least) / 15.0;
        put_half(block, 0, d);
        put_half(block, 2, least);
        let inverse = reciprocal(d).unwrap_or(0.0);
        let levels = levels(values, least, inverse, 0.5, 15);
        put_nibbles(&mut block[4..], &levels);
    }
}

impl WriteBlock<22, VALUES> for Q5Zero {
    /// As Q4_0, with twice the levels.
    #[inline(always)]
    fn write(values: &[f32; VALUES], block: &mut [u8; 22]) {
        let d = farthest(values) / -16.0;
        put_half(block, 0, d);
        let (inverse, offset) = match reciprocal(d) {
            Some(inverse) => (inverse, 16.5),
            None => (0.0, 0.0),
        };
        put_five_bits(&mut block[2..], &levels(values, 0.0, inverse, offset, 31));
    }
}

impl WriteBlock<24, VALUES> for Q5One {
    #[inline(always)]
    fn write(values: &[f32; VALUES], block: &mut [u8; 24]) {
        let (least, most) = range(values);
        let d = (most - least) / 31.0;
        put_half(block, 0, d);
        put_half(block, 2, least);
        let inverse = reciprocal(d).unwrap_or(0.0);
        let levels = levels(values, least, inverse, 0.5, 31);
        put_five_bits(&mut block[4..], &levels);
    }
}

impl WriteBlock<34, VALUES> for Q8Zero {
    /// Rounded to the nearest level, halves away from zero.
    #[inline(always)]
    fn write(values: &[f32; VALUES], block: &mut [u8; 34]) {
        let d = f32::from_bits(largest_magnitude(values)) / 127.0;
        put_half(block, 0, d);
        let inverse = reciprocal(d).unwrap_or(0.0);
        let mut levels = [0; VALUES];
        for (level, x) in levels.iter_mut().zip(values) {
            // At most 127.00001 on either side before.
            *level = whole_byte((x * inverse).round());
        }
        block[2..].copy_from_slice(&levels);
    }
}

/// The lower halves of 16 bytes, then the upper.
#[inline(always)]
fn nibbles(bytes: &[u8]) -> [u8; VALUES] {
    let mut levels = [0; VALUES];
    for i in 0..HALF {
        levels[i] = bytes[i] & 15;
        levels[i + HALF] = bytes[i] >> 4;
    }
    levels
}

#[inline(always)]
fn put_nibbles(bytes: &mut [u8], levels: &[u8; VALUES]) {
    let (lower, upper) = levels.split_at(HALF);
    for ((byte, lower), upper) in bytes.iter_mut().zip(lower).zip(upper) {
        *byte = (lower & 15) | (upper << 4);
    }
}

/// Levels of which the fifth bits are those of a little-endian integer, in the order of the values.
#[inline(always)]
fn five_bits(fifth: &[u8], lower: &[u8]) -> [u8; VALUES] {
    let mut levels = nibbles(lower);
    for i in 0..VALUES {
        levels[i] |= (fifth[i / 8] >> (i % 8) & 1) << 4;
    }
    levels
}

/// Fifth bits in 4 bytes, then the lower bits in 16.
#[inline(always)]
fn put_five_bits(bytes: &mut [u8], levels: &[u8; VALUES]) {
    let mut fifth = 0_u32;
    for (i, level) in levels.iter().enumerate() {
        fifth |= u32::from(level >> 4 & 1) << i;
    }
    bytes[..4].copy_from_slice(&fifth.to_le_bytes());
    put_nibbles(&mut bytes[4..], levels);
}

/// 1 / `d`, or 0 for 0; nothing when that is infinite.
#[inline(always)]
fn reciprocal(d: f32) -> Option<f32> {
    match 1.0 / d {
        _ if d == 0.0 => Some(0.0),
        inverse if inverse.is_infinite() => None,
        inverse => Some(inverse),
    }
}

/// `(x - least) * inverse + offset` without its fraction, at most `most`, for each value; not below 0 for those of the block.
///
/// A loop, not a `map`: that one is not inlined, and would be compiled without the caller's vector instructions.
#[inline(always)]
fn levels(values: &[f32; VALUES], least: f32, inverse: f32, offset: f32, most: u8) -> [u8; VALUES] {
    let mut levels = [0; VALUES];
    for (level, x) in levels.iter_mut().zip(values) {
        *level = whole_byte(((x - least) * inverse + offset).trunc()).min(most);
    }
    levels
}

/// The lowest 8 bits of a whole number between -2^22 and 2^22, negative ones in two's complement; 0 for the NaN of 0 * infinity.
///
/// The sum is between 2^23 and 2^24, where the last bit of a float counts ones. A conversion by `as` saturates, which does not
/// vectorize.
#[inline(always)]
fn whole_byte(whole: f32) -> u8 {
    (whole + 12_582_912.0).to_bits().to_le_bytes()[0]
}

/// The bits of the largest magnitude: numbers without a sign are ordered as their bits are, and integers have a maximum that
/// vectorizes.
#[inline(always)]
fn largest_magnitude(values: &[f32; VALUES]) -> u32 {
    values
        .iter()
        .fold(0, |largest, x| largest.max(x.abs().to_bits()))
}

/// The value that is farthest from 0, with its sign: the first of those that are equally far. 0 when all are.
#[inline(always)]
fn farthest(values: &[f32; VALUES]) -> f32 {
    let largest = largest_magnitude(values);
    let mut at = 0_u32;
    for (i, x) in values.iter().enumerate() {
        at |= u32::from(x.abs().to_bits() == largest) << i;
    }
    match largest {
        0 => 0.0,
        // `at` has a bit set, because `largest` came from one of the values.
        _ => values[at.trailing_zeros() as usize % VALUES],
    }
}

/// The least and the greatest value. Of zeros with different signs the first counts.
#[inline(always)]
fn range(values: &[f32; VALUES]) -> (f32, f32) {
    let (mut least, mut most) = (*values, *values);
    let mut width = HALF;
    while width > 0 {
        for i in 0..width {
            let (a, b) = (least[i], least[i + width]);
            least[i] = if b < a { b } else { a };
            let (a, b) = (most[i], most[i + width]);
            most[i] = if b > a { b } else { a };
        }
        width /= 2;
    }
    let (mut least, mut most) = (least[0], most[0]);
    if least == 0.0 {
        let first = values.iter().copied().find(|&x| x == 0.0).unwrap_or(least);
        least = first;
        most = if most == 0.0 { first } else { most };
    }
    (least, most)
}
