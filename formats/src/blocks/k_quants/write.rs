//! Values as blocks of 256.
//!
//! What the search found for the sub-blocks is rounded to the few bits of their scales; then every value is rounded anew, with the scale
//! as it will be read. A sub-block whose scale came out as 0 keeps the levels of the search, as in llama.cpp.

use std::marker::PhantomData;

use pulp::{Simd, WithSimd};

use super::super::{low_byte, put_half};
use super::search::{
    ALL_ZERO, Absolute, Candidates, Columns, Found, GROUP, Squared, of_q3, of_q6, with_minimums,
};
use super::{
    Q2K, Q3K, Q4K, Q5K, Q6K, VALUES, nearest, pack_pairs_of_6_bits, pack_scales_of_6_bits,
};

/// A type whose blocks are written by a search over 16 sub-blocks at once.
pub(crate) trait WriteBlocks<const BYTES: usize> {
    /// How many blocks have 16 sub-blocks.
    const BLOCKS: usize;

    /// Writes so many blocks, or fewer where the values end.
    ///
    /// Called again and again: `inline(always)`, so that it is compiled for the caller's instruction set.
    fn write<S: Simd>(simd: S, values: &[[f32; VALUES]], out: &mut [[u8; BYTES]]);
}

/// Writes whole blocks, on the best instruction set of the processor.
pub(crate) fn write<T: WriteBlocks<BYTES>, const BYTES: usize>(values: &[f32], out: &mut [u8]) {
    pulp::Arch::new().dispatch(Write::<T, BYTES>::new(values, out));
}

struct Write<'a, T, const BYTES: usize> {
    of: PhantomData<T>,
    values: &'a [[f32; VALUES]],
    out: &'a mut [[u8; BYTES]],
}

impl<'a, T, const BYTES: usize> Write<'a, T, BYTES> {
    fn new(values: &'a [f32], out: &'a mut [u8]) -> Self {
        let of = PhantomData;
        let (values, out) = (values.as_chunks().0, out.as_chunks_mut().0);
        Self { of, values, out }
    }
}

impl<T: WriteBlocks<BYTES>, const BYTES: usize> WithSimd for Write<'_, T, BYTES> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (values, out) = (
            self.values.chunks(T::BLOCKS),
            self.out.chunks_mut(T::BLOCKS),
        );
        for (values, out) in values.zip(out) {
            T::write(simd, values, out);
        }
    }
}

/// Levels 0 to 3, times a scale of 4 bits, less a minimum of 4 bits.
impl WriteBlocks<84> for Q2K {
    const BLOCKS: usize = 1;

    #[inline(always)]
    fn write<S: Simd>(simd: S, values: &[[f32; VALUES]], out: &mut [[u8; 84]]) {
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
impl WriteBlocks<110> for Q3K {
    const BLOCKS: usize = 1;

    #[inline(always)]
    fn write<S: Simd>(simd: S, values: &[[f32; VALUES]], out: &mut [[u8; 110]]) {
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
impl WriteBlocks<144> for Q4K {
    const BLOCKS: usize = 2;

    #[inline(always)]
    fn write<S: Simd>(simd: S, values: &[[f32; VALUES]], out: &mut [[u8; 144]]) {
        let columns = columns(values.as_flattened());
        let found = with_minimums::<S, Squared, 32>(simd, &columns, &CANDIDATES_Q4);
        for (i, (values, out)) in values.iter().zip(out).enumerate() {
            let levels = write_scales(values, &found, i * 8, 15, out);
            put_four_bits(&mut out[16..], &levels);
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
impl WriteBlocks<176> for Q5K {
    const BLOCKS: usize = 2;

    #[inline(always)]
    fn write<S: Simd>(simd: S, values: &[[f32; VALUES]], out: &mut [[u8; 176]]) {
        let columns = columns(values.as_flattened());
        let found = with_minimums::<S, Squared, 32>(simd, &columns, &CANDIDATES_Q5);
        for (i, (values, out)) in values.iter().zip(out).enumerate() {
            let levels = write_scales(values, &found, i * 8, 31, out);
            put_upper_bit(&mut out[16..48], &levels, 4);
            put_four_bits(&mut out[48..], &levels);
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
impl WriteBlocks<210> for Q6K {
    const BLOCKS: usize = 1;

    #[inline(always)]
    fn write<S: Simd>(simd: S, values: &[[f32; VALUES]], out: &mut [[u8; 210]]) {
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
    for level in &mut levels {
        *level >>= 4;
    }
    put_two_bits(&mut block[128..192], &levels);
}

/// The values of 16 sub-blocks, side by side; zeros in the place of those that are missing.
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

#[cfg(test)]
mod tests {
    use pulp::{Scalar, Scalar128b, Scalar256b, Scalar512b};

    use super::*;

    #[test]
    fn registers_of_every_width_write_the_same_blocks() {
        same_for_every_width::<Q2K, 84>();
        same_for_every_width::<Q3K, 110>();
        same_for_every_width::<Q4K, 144>();
        same_for_every_width::<Q5K, 176>();
        same_for_every_width::<Q6K, 210>();
    }

    /// 3 blocks, so that a group of 2 is once incomplete.
    fn same_for_every_width<T: WriteBlocks<BYTES>, const BYTES: usize>() {
        let values: Vec<f32> = (0..3 * 256_u16)
            .map(|i| (f32::from(i) * 0.7).sin() * f32::from(i % 37) * 1e-3)
            .collect();
        let mut best = vec![0; 3 * BYTES];
        write::<T, BYTES>(&values, &mut best);
        assert!(best.iter().any(|&byte| byte != 0));
        let check = |written: &[u8]| assert!(written == best, "{BYTES}");
        let mut written = vec![0; 3 * BYTES];
        Scalar.vectorize(Write::<T, BYTES>::new(&values, &mut written));
        check(&written);
        written.fill(0);
        Scalar128b.vectorize(Write::<T, BYTES>::new(&values, &mut written));
        check(&written);
        written.fill(0);
        Scalar256b.vectorize(Write::<T, BYTES>::new(&values, &mut written));
        check(&written);
        written.fill(0);
        Scalar512b.vectorize(Write::<T, BYTES>::new(&values, &mut written));
        check(&written);
    }
}
