//! Values as blocks of 256.
//!
//! What the search found for the sub-blocks is rounded to the few bits of their scales; then every value is rounded anew, with the scale
//! as it will be read. A sub-block whose scale came out as 0 keeps the levels of the search, as in llama.cpp.

use pulp::{Simd, WithSimd};

use super::super::{low_byte, put_half};
use super::search::{
    ALL_ZERO, Absolute, Candidates, Columns, Found, GROUP, Squared, of_q3, of_q6, with_minimums,
};
use super::{VALUES, nearest, pack_pairs_of_6_bits, pack_scales_of_6_bits};

/// Levels 0 to 3, times a scale of 4 bits, less a minimum of 4 bits.
pub(crate) fn write_q2(values: &[f32], out: &mut [u8]) {
    pulp::Arch::new().dispatch(Q2 { values, out });
}

struct Q2<'a> {
    values: &'a [f32],
    out: &'a mut [u8],
}

impl WithSimd for Q2<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (values, out) = (self.values.as_chunks().0, self.out.as_chunks_mut().0);
        for (values, out) in values.iter().zip(out) {
            let found = with_minimums::<S, Absolute, 16>(simd, &columns(values), &CANDIDATES_Q2);
            write_q2_block(values, &found, out);
        }
    }
}

const CANDIDATES_Q2: Candidates = Candidates {
    most: 3.0,
    first: -0.5,
    step: 0.1,
    last: 15,
};

#[inline(always)]
fn write_q2_block(values: &[f32; VALUES], found: &Found<16>, block: &mut [u8; 84]) {
    let (max_scale, max_minimum) = (greatest(&found.scales), greatest(&found.minimums));
    let d = put_half(block, 80, max_scale / 15.0);
    let dmin = put_half(block, 82, max_minimum / 15.0);
    // Both at most 15, or 0 where the greatest is.
    let of_scale = if max_scale > 0.0 {
        15.0 / max_scale
    } else {
        0.0
    };
    let of_minimum = if max_minimum > 0.0 {
        15.0 / max_minimum
    } else {
        0.0
    };
    let mut levels = levels_of(found);
    let sub_blocks = sub_blocks::<16>(values, &mut levels);
    for (i, (values, levels)) in sub_blocks.enumerate() {
        let scale = low_byte(nearest(of_scale * found.scales[i]));
        let minimum = low_byte(nearest(of_minimum * found.minimums[i]));
        block[i] = scale | minimum << 4;
        let (scale, minimum) = (
            d * f32::from(block[i] & 15),
            dmin * f32::from(block[i] >> 4),
        );
        if scale != 0.0 {
            for (x, level) in values.iter().zip(levels) {
                *level = low_byte(nearest((x + minimum) / scale).clamp(0, 3));
            }
        }
    }
    put_two_bits(&mut block[16..80], &levels);
}

/// Levels -4 to 3, times a scale of 6 bits.
pub(crate) fn write_q3(values: &[f32], out: &mut [u8]) {
    pulp::Arch::new().dispatch(Q3 { values, out });
}

struct Q3<'a> {
    values: &'a [f32],
    out: &'a mut [u8],
}

impl WithSimd for Q3<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (values, out) = (self.values.as_chunks().0, self.out.as_chunks_mut().0);
        for (values, out) in values.iter().zip(out) {
            write_q3_block(values, &of_q3(simd, &columns(values)), out);
        }
    }
}

#[inline(always)]
fn write_q3_block(values: &[f32; VALUES], found: &Found<16>, block: &mut [u8; 110]) {
    let max_scale = farthest(&found.scales);
    let (inverse, d) = match max_scale == 0.0 {
        true => (0.0, 0.0),
        false => (-32.0 / max_scale, 1.0 / (-32.0 / max_scale)),
    };
    let d = put_half(block, 108, d);
    let mut scales = [0; 16];
    let mut levels = levels_of(found);
    let sub_blocks = sub_blocks::<16>(values, &mut levels);
    for (i, (values, levels)) in sub_blocks.enumerate() {
        let scale = low_byte(nearest(inverse * found.scales[i])).cast_signed();
        let scale = scale.clamp(-32, 31);
        // Where all scales are 0, none is written, which reads as -32.
        scales[i] = if max_scale == 0.0 {
            0
        } else {
            (scale + 32).cast_unsigned()
        };
        let scale = d * f32::from(scales[i].cast_signed() - 32);
        if scale != 0.0 {
            for (x, level) in values.iter().zip(levels) {
                *level = low_byte(nearest(x / scale).clamp(-4, 3) + 4);
            }
        }
    }
    block[96..108].copy_from_slice(&pack_scales_of_6_bits(&scales));
    let (third, rest) = block.split_at_mut(32);
    put_upper_bit(third, &levels, 2);
    put_two_bits(&mut rest[..64], &levels);
}

/// Levels 0 to 15, times a scale of 6 bits, less a minimum of 6 bits.
pub(crate) fn write_q4(values: &[f32], out: &mut [u8]) {
    pulp::Arch::new().dispatch(Q4 { values, out });
}

struct Q4<'a> {
    values: &'a [f32],
    out: &'a mut [u8],
}

impl WithSimd for Q4<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (values, out) = (self.values.as_chunks().0, self.out.as_chunks_mut::<144>().0);
        for (values, out) in values.chunks(2).zip(out.chunks_mut(2)) {
            let found = with_minimums::<S, Squared, 32>(simd, &two(values), &CANDIDATES_Q4);
            for (first, (values, out)) in values.iter().zip(out).enumerate() {
                let levels = write_scales(values, &found, first * 8, 15, out);
                put_four_bits(&mut out[16..], &levels);
            }
        }
    }
}

const CANDIDATES_Q4: Candidates = Candidates {
    most: 15.0,
    first: -1.0,
    step: 0.1,
    last: 20,
};

/// Levels 0 to 31, times a scale of 6 bits, less a minimum of 6 bits.
pub(crate) fn write_q5(values: &[f32], out: &mut [u8]) {
    pulp::Arch::new().dispatch(Q5 { values, out });
}

struct Q5<'a> {
    values: &'a [f32],
    out: &'a mut [u8],
}

impl WithSimd for Q5<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (values, out) = (self.values.as_chunks().0, self.out.as_chunks_mut::<176>().0);
        for (values, out) in values.chunks(2).zip(out.chunks_mut(2)) {
            let found = with_minimums::<S, Squared, 32>(simd, &two(values), &CANDIDATES_Q5);
            for (first, (values, out)) in values.iter().zip(out).enumerate() {
                let levels = write_scales(values, &found, first * 8, 31, out);
                put_upper_bit(&mut out[16..48], &levels, 4);
                put_four_bits(&mut out[48..], &levels);
            }
        }
    }
}

const CANDIDATES_Q5: Candidates = Candidates {
    most: 31.0,
    first: -0.5,
    step: 0.1,
    last: 15,
};

/// Writes `d`, `dmin`, scales and minimums of Q4_K and Q5_K, from those found from `first` on, and returns the levels.
#[inline(always)]
fn write_scales<const BYTES: usize>(
    values: &[f32; VALUES],
    found: &Found<32>,
    first: usize,
    most: i32,
    block: &mut [u8; BYTES],
) -> [u8; VALUES] {
    let (scales, minimums) = (
        &found.scales[first..first + 8],
        &found.minimums[first..first + 8],
    );
    let (max_scale, max_minimum) = (greatest(scales), greatest(minimums));
    let d = put_half(block, 0, max_scale / 63.0);
    let dmin = put_half(block, 2, max_minimum / 63.0);
    let of_scale = if max_scale > 0.0 {
        63.0 / max_scale
    } else {
        0.0
    };
    let of_minimum = if max_minimum > 0.0 {
        63.0 / max_minimum
    } else {
        0.0
    };
    let mut pairs = [(0, 0); 8];
    let mut levels = [0; VALUES];
    let sub_blocks = sub_blocks::<32>(values, &mut levels);
    for (i, (values, levels)) in sub_blocks.enumerate() {
        let scale = low_byte(nearest(of_scale * scales[i])).min(63);
        let minimum = low_byte(nearest(of_minimum * minimums[i])).min(63);
        pairs[i] = (scale, minimum);
        let (scale, minimum) = (d * f32::from(scale), dmin * f32::from(minimum));
        match scale == 0.0 {
            true => column(&found.levels, first + i, levels),
            false => {
                for (x, level) in values.iter().zip(levels) {
                    *level = low_byte(nearest((x + minimum) / scale).clamp(0, most));
                }
            }
        }
    }
    block[4..16].copy_from_slice(&pack_pairs_of_6_bits(&pairs));
    levels
}

/// Levels -32 to 31, times a scale of 8 bits.
pub(crate) fn write_q6(values: &[f32], out: &mut [u8]) {
    pulp::Arch::new().dispatch(Q6 { values, out });
}

struct Q6<'a> {
    values: &'a [f32],
    out: &'a mut [u8],
}

impl WithSimd for Q6<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (values, out) = (self.values.as_chunks().0, self.out.as_chunks_mut().0);
        for (values, out) in values.iter().zip(out) {
            write_q6_block(values, &of_q6(simd, &columns(values)), out);
        }
    }
}

#[inline(always)]
fn write_q6_block(values: &[f32; VALUES], found: &Found<16>, block: &mut [u8; 210]) {
    let max_scale = farthest(&found.scales);
    if max_scale.abs() < ALL_ZERO {
        block.fill(0);
        return;
    }
    let inverse = -128.0 / max_scale;
    let d = put_half(block, 208, 1.0 / inverse);
    let mut levels = levels_of(found);
    let sub_blocks = sub_blocks::<16>(values, &mut levels);
    for (i, (values, levels)) in sub_blocks.enumerate() {
        block[192 + i] = low_byte(nearest(inverse * found.scales[i]).min(127));
        let scale = d * f32::from(block[192 + i].cast_signed());
        if scale != 0.0 {
            for (x, level) in values.iter().zip(levels) {
                *level = low_byte(nearest(x / scale).clamp(-32, 31) + 32);
            }
        }
    }
    for (part, levels) in levels.as_chunks::<128>().0.iter().enumerate() {
        let (low, _) = block[part * 64..].split_at_mut(64);
        for (i, low) in low.iter_mut().enumerate() {
            *low = levels[i] & 15 | levels[i + 64] << 4;
        }
    }
    put_two_bits(&mut block[128..192], &levels.map(|level| level >> 4));
}

/// The values of 16 sub-blocks, side by side.
#[inline(always)]
fn columns<const N: usize>(values: &[f32]) -> Columns<N> {
    let mut columns = [[0.0; GROUP]; N];
    for (lane, values) in values.as_chunks::<N>().0.iter().take(GROUP).enumerate() {
        for (row, &x) in columns.iter_mut().zip(values) {
            row[lane] = x;
        }
    }
    columns
}

/// The values of the 8 sub-blocks of each of two blocks; of one, with zeros beside it.
#[inline(always)]
fn two(values: &[[f32; VALUES]]) -> Columns<32> {
    columns(values.as_flattened())
}

/// One sub-block's levels.
fn column<const N: usize>(columns: &Columns<N>, lane: usize, levels: &mut [u8; N]) {
    for (level, row) in levels.iter_mut().zip(columns) {
        *level = integer(row[lane]);
    }
}

/// The levels of all sub-blocks, in the order of the values.
#[inline(always)]
fn levels_of(found: &Found<16>) -> [u8; VALUES] {
    let mut levels = [0; VALUES];
    for (lane, levels) in levels.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        column(&found.levels, lane, levels);
    }
    levels
}

#[inline(always)]
fn integer(level: f32) -> u8 {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "0..64"
    )]
    let level = level as u8;
    level
}

/// Sub-blocks of `N` values with their levels.
#[inline(always)]
fn sub_blocks<'a, const N: usize>(
    values: &'a [f32; VALUES],
    levels: &'a mut [u8; VALUES],
) -> impl Iterator<Item = (&'a [f32; N], &'a mut [u8; N])> {
    let (values, levels) = (values.as_chunks().0, levels.as_chunks_mut().0);
    values.iter().zip(levels)
}

/// The greatest, or 0.
fn greatest(numbers: &[f32]) -> f32 {
    let greater = |a, b| if b > a { b } else { a };
    numbers.iter().copied().fold(0.0, greater)
}

/// The one that is farthest from 0: the first of those that are equally far. 0 when all are.
fn farthest(numbers: &[f32; GROUP]) -> f32 {
    let farther = |a: f32, b: f32| if b.abs() > a.abs() { b } else { a };
    numbers.iter().copied().fold(0.0, farther)
}

/// The lowest 2 bits of each level: of each 128, levels `i`, `i + 32`, `i + 64`, `i + 96` in byte `i`, the first lowest.
#[inline(always)]
fn put_two_bits(bytes: &mut [u8], levels: &[u8; VALUES]) {
    for (bytes, levels) in bytes.chunks_exact_mut(32).zip(levels.as_chunks::<128>().0) {
        for (i, byte) in bytes.iter_mut().enumerate() {
            let (a, b, c, d) = (levels[i], levels[i + 32], levels[i + 64], levels[i + 96]);
            *byte = a & 3 | (b & 3) << 2 | (c & 3) << 4 | d << 6;
        }
    }
}

/// The lowest 4 bits of each level: of each 64, levels `i` and `i + 32` in byte `i`, the first lower.
#[inline(always)]
fn put_four_bits(bytes: &mut [u8], levels: &[u8; VALUES]) {
    for (bytes, levels) in bytes.chunks_exact_mut(32).zip(levels.as_chunks::<64>().0) {
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = levels[i] & 15 | levels[i + 32] << 4;
        }
    }
}

/// Bit `bit` of each level: of level `i` in bit `i / 32` of byte `i % 32`.
#[inline(always)]
fn put_upper_bit(bytes: &mut [u8], levels: &[u8; VALUES], bit: u32) {
    for (i, byte) in bytes.iter_mut().enumerate() {
        *byte = 0;
        for (part, levels) in levels.as_chunks::<32>().0.iter().enumerate() {
            *byte |= (levels[i] >> bit & 1) << part;
        }
    }
}
