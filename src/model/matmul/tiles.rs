//! Operands in the form that a unit for BF16 tiles reads: cut in pieces, and arranged in panels.
//!
//! In: f32 matrices, or stored BF16 ones. Out: [`Tile`]s, and products of them. A BF16 has 8 significant bits and an f32 24, so an f32 is the
//! sum of three BF16 pieces, high, middle and low, each the BF16 nearest to what those before leave. Nothing is lost, unless a piece is below
//! 2^-126, which counts as zero: that takes less than 2^-125 from an element below 2^-102.
//!
//! - A left operand, activations or gradients, is always in three pieces.
//! - A right operand is in one, where its elements are BF16: then each product is of exact operands, by three products of tiles.
//! - Otherwise it is in three, and six of nine products of tiles are made: high high, high middle, middle high, middle middle, high low and low
//!   high. As a middle piece is at most 2^-8 of its element and a low one 2^-17, what is left out is less than 2^-23 of a product, of either
//!   sign: what rounding the product to f32 may take.
//!
//! Sums are f32 throughout; in which order they run depends on the inner dimension alone. An element that is infinite or NaN makes all sums NaN
//! that it is in.
//!
//! Source: Henry, Tang and Heinecke, "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations", arXiv:1904.06376.

use std::ops::Range;

use rayon::prelude::*;

use super::Matrix;
use crate::model::kernels::simd;

/// 16 rows of 64 bytes. Of a left operand they are 16 rows of 32 inner indices; of a right one, 16 pairs of inner indices of 16 columns: column
/// after column, both of a pair.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(super) struct Tile(pub(super) [[u16; SIDE]; SIDE / 2]);

/// Rows of a left panel, columns of a right one, and inner indices of a step: a step of a panel is two tiles of each piece.
pub(super) const SIDE: usize = 32;

/// The sums over the inner dimension for one left and one right panel, row-major.
#[derive(Clone, Debug)]
#[repr(C, align(64))]
pub(super) struct Sums(pub(super) [[f32; SIDE]; SIDE]);

/// Into how many pieces the elements of a right operand are cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Pieces {
    /// They are BF16.
    #[default]
    One,
    /// They are f32.
    Three,
}

impl Pieces {
    /// Tiles of a step.
    pub(super) const fn tiles(self) -> usize {
        match self {
            Self::One => 2,
            Self::Three => 6,
        }
    }
}

/// What multiplies tiles.
pub(super) trait Unit: Copy + Sync {
    /// It, on a thread.
    type SetUp: Multiply;

    /// Sets it up on the calling thread.
    fn set_up(self) -> Self::SetUp;
}

/// A [`Unit`] on a thread.
pub(super) trait Multiply {
    /// Overwrites `sums` with the products of the rows of a left panel with the columns of a right one, of as many steps.
    fn multiply(&self, left: &[Tile], right: &[Tile], pieces: Pieces, sums: &mut Sums);
}

/// A right operand, inner x columns, arranged.
#[derive(Debug, Default)]
pub(crate) struct Arranged {
    pub(super) inner: usize,
    pub(super) columns: usize,
    pub(super) pieces: Pieces,
    /// Panel after panel, step after step, piece after piece, two tiles.
    tiles: Vec<Tile>,
}

/// Which side of the lines of a stored matrix is the inner one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Inner {
    /// They are as long as the inner dimension: a line is a column of the right operand, or a row of the left one.
    Along,
    /// There are as many as the inner dimension.
    Across,
}

impl Arranged {
    /// Arranges `b` in three pieces.
    pub(crate) fn arrange(&mut self, b: Matrix<'_>) {
        let inner = match b.col_stride {
            1 => Inner::Across,
            _ => Inner::Along,
        };
        self.fill(F32Lines::of(b), Pieces::Three, inner);
    }

    /// Arranges stored BF16 matrices, one above the other, with lines of `length`, as they are.
    pub(crate) fn arrange_stored(&mut self, parts: &[&[u8]], length: usize, inner: Inner) {
        let lines = Bf16Lines { parts, length };
        self.fill(lines, Pieces::One, inner);
    }

    fn fill<const P: usize>(&mut self, lines: impl Lines<P>, pieces: Pieces, inner: Inner) {
        let (count, length) = (lines.count(), lines.length());
        (self.inner, self.columns) = match inner {
            Inner::Along => (length, count),
            Inner::Across => (count, length),
        };
        self.pieces = pieces;
        let panel = self.panel_tiles();
        self.tiles
            .resize(self.columns.div_ceil(SIDE) * panel, Tile::ZERO);
        if panel == 0 {
            return;
        }
        let group = |index: usize, tiles: &mut [Tile]| {
            simd(
                #[inline(always)]
                || right_panels(lines, inner, index * PANELS_AT_ONCE * SIDE, panel, tiles),
            );
        };
        self.tiles
            .par_chunks_mut(PANELS_AT_ONCE * panel)
            .enumerate()
            .for_each(|(index, tiles)| group(index, tiles));
    }

    /// Steps of a panel.
    pub(super) fn steps(&self) -> usize {
        self.inner.div_ceil(SIDE)
    }

    /// Of columns `index * SIDE` and following, `steps`.
    pub(super) fn panel(&self, index: usize, steps: Range<usize>) -> &[Tile] {
        let step = self.pieces.tiles();
        &self.tiles[index * self.panel_tiles()..][steps.start * step..steps.end * step]
    }

    fn panel_tiles(&self) -> usize {
        self.steps() * self.pieces.tiles()
    }
}

/// Arranges rows `first` and following of the left operand `a` as panels in `tiles`, with the inner indices of `steps` alone.
pub(super) fn arrange_left(a: Matrix<'_>, first: usize, steps: Range<usize>, tiles: &mut [Tile]) {
    let (panel, lines) = (steps.len() * Pieces::Three.tiles(), F32Lines::of(a));
    for (index, tiles) in tiles.chunks_exact_mut(panel).enumerate() {
        let (first, steps) = (first + index * SIDE, steps.clone());
        simd(
            #[inline(always)]
            || match a.col_stride {
                1 => left_panel_of_rows(lines, first, steps.start, tiles),
                _ => left_panel_of_columns(lines, first, steps.start, tiles),
            },
        );
    }
}

impl Tile {
    pub(super) const ZERO: Self = Self([[0; SIDE]; SIDE / 2]);
}

impl Sums {
    pub(super) const ZERO: Self = Self([[0.0; SIDE]; SIDE]);
}

/// A row-major matrix, read 32 x 32 elements at a time.
trait Lines<const P: usize>: Copy + Sync {
    fn count(&self) -> usize;

    fn length(&self) -> usize;

    /// Reads the pieces of the elements of line `line` and those behind it from `start` on; zeros outside.
    fn read(&self, line: usize, start: usize, block: &mut [Block<u16>; P]);
}

/// Elements of 32 lines.
type Block<T> = [[T; SIDE]; SIDE];

/// Lines of f32.
#[derive(Clone, Copy)]
struct F32Lines<'a> {
    data: &'a [f32],
    count: usize,
    length: usize,
    stride: usize,
}

impl<'a> F32Lines<'a> {
    /// The lines of `matrix` as it lies in memory.
    fn of(matrix: Matrix<'a>) -> Self {
        let (count, length, stride) = match matrix.col_stride {
            1 => (matrix.rows, matrix.cols, matrix.row_stride),
            _ => (matrix.cols, matrix.rows, matrix.col_stride),
        };
        Self {
            data: matrix.data,
            count,
            length,
            stride,
        }
    }
}

impl Lines<3> for F32Lines<'_> {
    fn count(&self) -> usize {
        self.count
    }

    fn length(&self) -> usize {
        self.length
    }

    #[inline(always)]
    fn read(&self, line: usize, start: usize, block: &mut [Block<u16>; 3]) {
        let mut rest = [[0.0; SIDE]; SIDE];
        for (line, rest) in (line..self.count).zip(&mut rest) {
            let row = &self.data[line * self.stride..][..self.length][start..];
            match row.first_chunk() {
                Some(whole) => *rest = *whole,
                None => rest[..row.len()].copy_from_slice(row),
            }
        }
        for piece in block {
            // One loop over all elements: the compiler vectorizes a long one, and unrolls short ones to scalars.
            let rest = rest.as_flattened_mut().iter_mut();
            for (rest, piece) in rest.zip(piece.as_flattened_mut()) {
                *piece = take_piece(rest);
            }
        }
    }
}

/// Lines of little-endian BF16, in parts.
#[derive(Clone, Copy)]
struct Bf16Lines<'a> {
    parts: &'a [&'a [u8]],
    length: usize,
}

impl Lines<1> for Bf16Lines<'_> {
    fn count(&self) -> usize {
        let bytes: usize = self.parts.iter().map(|part| part.len()).sum();
        bytes.checked_div(2 * self.length).unwrap_or(0)
    }

    fn length(&self) -> usize {
        self.length
    }

    #[inline(always)]
    fn read(&self, line: usize, start: usize, [block]: &mut [Block<u16>; 1]) {
        let line_bytes = 2 * self.length;
        for (line, piece) in (line..).zip(block) {
            *piece = [0; SIDE];
            // Parts are few.
            let mut at = line * line_bytes;
            let Some(part) = self.parts.iter().find(|part| {
                let is_inside = at < part.len();
                at -= if is_inside { 0 } else { part.len() };
                is_inside
            }) else {
                continue;
            };
            let stored = part[at..][..line_bytes][2 * start..].as_chunks().0;
            for (piece, &bytes) in piece.iter_mut().zip(stored) {
                *piece = u16::from_le_bytes(bytes);
            }
        }
    }
}

/// The piece that comes next: it is taken from `rest`.
#[inline(always)]
fn take_piece(rest: &mut f32) -> u16 {
    let upper = nearest(*rest);
    *rest -= f32::from_bits(upper);
    (upper >> 16) as u16
}

/// The bits, as an f32's, of the BF16 nearest to `x`, of two equally near the even one; of those beyond the largest BF16 the one that is
/// nearer to zero, so that what is left stays finite, too.
#[inline(always)]
fn nearest(x: f32) -> u32 {
    const ROUNDED_TO_INFINITY: u32 = 0x7f7f_8000;
    const UPPER: u32 = 0xffff_0000;
    let bits = x.to_bits();
    let up = match bits & 0x7fff_ffff < ROUNDED_TO_INFINITY {
        true => 0x7fff + (bits >> 16 & 1),
        false => 0,
    };
    bits.wrapping_add(up) & UPPER
}

/// Right panels that are arranged together: what they take of a line that runs across the inner dimension is some cache lines, not one.
const PANELS_AT_ONCE: usize = 4;

/// Fills the tiles of columns `first` and following of a right operand, of panels of so many tiles.
#[inline(always)]
fn right_panels<const P: usize>(
    lines: impl Lines<P>,
    inner: Inner,
    first: usize,
    panel: usize,
    tiles: &mut [Tile],
) {
    let mut block = [[[0; SIDE]; SIDE]; P];
    let steps = panel / (2 * P);
    let panels = tiles.len() / panel;
    let mut fill = |index: usize, step: usize| {
        let (column, start) = (first + index * SIDE, step * SIDE);
        match inner {
            Inner::Along => lines.read(column, start, &mut block),
            Inner::Across => lines.read(start, column, &mut block),
        }
        let tiles = &mut tiles[index * panel + step * 2 * P..][..2 * P];
        for (piece, tiles) in block.iter().zip(tiles.as_chunks_mut().0) {
            match inner {
                Inner::Along => turn_pairs(piece, tiles),
                Inner::Across => interleave(piece, tiles),
            }
        }
    };
    match inner {
        Inner::Along => (0..panels).for_each(|index| (0..steps).for_each(|step| fill(index, step))),
        Inner::Across => {
            (0..steps).for_each(|step| (0..panels).for_each(|index| fill(index, step)));
        }
    }
}

/// Fills the tiles of rows `first` and following of a left operand whose lines are the rows: line after line, as they come from memory.
#[inline(always)]
fn left_panel_of_rows(lines: F32Lines<'_>, first: usize, first_step: usize, tiles: &mut [Tile]) {
    for place in 0..SIDE {
        let line: &[f32] = match first + place < lines.count {
            true => &lines.data[(first + place) * lines.stride..][first_step * SIDE..lines.length],
            false => &[],
        };
        let (whole, rest) = line.as_chunks();
        let mut padded = [0.0; SIDE];
        padded[..rest.len()].copy_from_slice(rest);
        let steps = whole.iter().chain(std::iter::repeat(&padded));
        for (elements, tiles) in steps.zip(tiles.as_chunks_mut::<6>().0) {
            let mut rest = *elements;
            for tiles in tiles.as_chunks_mut::<2>().0 {
                let row = &mut tiles[place / 16].0[place % 16];
                for (rest, piece) in rest.iter_mut().zip(row) {
                    *piece = take_piece(rest);
                }
            }
        }
    }
}

/// The same of a left operand whose lines are the inner indices.
#[inline(always)]
fn left_panel_of_columns(lines: F32Lines<'_>, first: usize, first_step: usize, tiles: &mut [Tile]) {
    let mut block = [[[0; SIDE]; SIDE]; 3];
    for (step, tiles) in tiles.as_chunks_mut::<6>().0.iter_mut().enumerate() {
        lines.read((first_step + step) * SIDE, first, &mut block);
        for (piece, tiles) in block.iter().zip(tiles.as_chunks_mut().0) {
            turn(piece, tiles);
        }
    }
}

/// A line is an inner index of a left operand.
#[inline(always)]
fn turn(block: &Block<u16>, tiles: &mut [Tile; 2]) {
    for (half, tile) in tiles.iter_mut().enumerate() {
        for (row, tile) in tile.0.iter_mut().enumerate() {
            for (index, line) in block.iter().enumerate() {
                tile[index] = line[half * 16 + row];
            }
        }
    }
}

/// A line is a column of a right operand.
#[inline(always)]
fn turn_pairs(block: &Block<u16>, tiles: &mut [Tile; 2]) {
    for (half, tile) in block.as_chunks::<16>().0.iter().zip(tiles) {
        for (pair, row) in tile.0.iter_mut().enumerate() {
            for (line, both) in half.iter().zip(row.as_chunks_mut().0) {
                *both = [line[2 * pair], line[2 * pair + 1]];
            }
        }
    }
}

/// A line is an inner index of a right operand.
#[inline(always)]
fn interleave(block: &Block<u16>, tiles: &mut [Tile; 2]) {
    for (pair, [even, odd]) in block.as_chunks().0.iter().enumerate() {
        for (half, tile) in tiles.iter_mut().enumerate() {
            let (even, odd) = (&even[half * 16..][..16], &odd[half * 16..][..16]);
            for ((both, &even), &odd) in
                tile.0[pair].as_chunks_mut().0.iter_mut().zip(even).zip(odd)
            {
                *both = [even, odd];
            }
        }
    }
}

#[cfg(test)]
pub(super) mod emulation {
    //! The unit's arithmetic, an element at a time.

    use super::{Multiply, Pieces, SIDE, Sums, Tile, Unit};

    /// What [`super::super::amx`] documents, computed by the standard library.
    #[derive(Clone, Copy)]
    pub(crate) struct Emulated;

    /// The pieces of each product of tiles, left and right, in the order of the kernel: 0 is high, 2 is low.
    const ORDER: [[usize; 2]; 6] = [[2, 0], [1, 0], [0, 0], [0, 2], [0, 1], [1, 1]];

    impl Unit for Emulated {
        type SetUp = Self;

        fn set_up(self) -> Self {
            self
        }
    }

    impl Multiply for Emulated {
        fn multiply(&self, left: &[Tile], right: &[Tile], pieces: Pieces, sums: &mut Sums) {
            *sums = Sums::ZERO;
            let products = match pieces {
                Pieces::One => &ORDER[..3],
                Pieces::Three => &ORDER,
            };
            let steps = left
                .chunks_exact(Pieces::Three.tiles())
                .zip(right.chunks_exact(pieces.tiles()));
            for (left, right) in steps {
                for &[l, r] in products {
                    for (row, sums) in sums.0.iter_mut().enumerate() {
                        let left = &left[2 * l + row / 16].0[row % 16];
                        for (column, sum) in sums.iter_mut().enumerate() {
                            let right = &right[2 * r + column / 16].0;
                            let mut halves = [0.0; 2];
                            for index in 0..SIDE {
                                let half = &mut halves[index % 2];
                                let other = right[index / 2][2 * (column % 16) + index % 2];
                                *half = flushed(bf16(left[index]).mul_add(bf16(other), *half));
                            }
                            *sum = flushed(*sum + flushed(halves[0] + halves[1]));
                        }
                    }
                }
            }
        }
    }

    pub(crate) fn bf16(bits: u16) -> f32 {
        flushed(f32::from_bits(u32::from(bits) << 16))
    }

    fn flushed(x: f32) -> f32 {
        if x.is_subnormal() {
            0.0_f32.copysign(x)
        } else {
            x
        }
    }
}

#[cfg(test)]
mod tests {
    use super::emulation::bf16;
    use super::*;

    fn pieces(x: f32) -> [u16; 3] {
        let mut rest = x;
        [0; 3].map(|_| take_piece(&mut rest))
    }

    #[test]
    fn every_element_is_the_sum_of_its_pieces() {
        // All exponents and both signs, with significands of all lengths.
        let upper = (0..=u16::MAX).map(|upper| u32::from(upper) << 16);
        let lower = [
            0, 1, 2, 0x7fff, 0x8000, 0x8001, 0xffff, 0x5a5a, 0x00ff, 0x0180,
        ];
        for bits in upper.flat_map(|upper| lower.map(|lower| upper | lower)) {
            let x = f32::from_bits(bits);
            let pieces = pieces(x).map(bf16);
            let sum: f64 = pieces.iter().map(|&piece| f64::from(piece)).sum();
            if !x.is_finite() {
                assert!(sum.is_nan(), "{x} in {pieces:?}");
                continue;
            }
            let lost = (sum - f64::from(x)).abs();
            match x.abs() < 2.0_f32.powi(-102) {
                true => assert!(lost < 2.0_f64.powi(-125), "{x:e} in {pieces:?}"),
                false => assert!(lost == 0.0, "{x:e} in {pieces:?}"),
            }
            assert!(f64::from(pieces[1].abs()) <= f64::from(x.abs()) / 128.0);
        }
    }
}
