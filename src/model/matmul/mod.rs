//! Matrix products over strided f32 views.
//!
//! In: two views and an output slice. Out: the product written to, or added onto, the output. This is the one door to
//! the `gemm` crate (candle's own kernel library), so that products read transposed operands and slices of a larger
//! matrix through strides instead of copies, and write into buffers that are reused; and to the processor's matrix unit, where
//! it has one that multiplies BF16 ([`amx`]) and a product is large enough. That unit is as exact ([`tiles`]), but rounds elsewhere.

mod amx;
mod tiles;

use std::cell::Cell;
use std::ops::Range;

use gemm::Parallelism;
use rayon::prelude::*;

use amx::Amx;
pub(crate) use tiles::{Arranged, Inner};
use tiles::{Multiply, Pieces, SIDE, Sums, Tile, Unit};

use super::kernels::simd;

/// A read-only matrix: `rows` x `cols` elements of `data`, `row_stride` and `col_stride` elements apart.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matrix<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Matrix<'a> {
    /// Views `data` as `rows` x `cols`, row-major, with rows `row_stride` elements apart.
    pub(crate) fn strided(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert!(cols <= row_stride && fits(data.len(), rows, cols, row_stride));
        Self {
            data,
            rows,
            cols,
            row_stride,
            col_stride: 1,
        }
    }

    /// Views all of `data` as `rows` x `cols`, row-major.
    pub(crate) fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols);
        Self::strided(data, rows, cols, cols)
    }

    /// The same elements with rows and columns exchanged.
    pub(crate) fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }
}

/// Where a product goes: `rows` x `cols` of `data`, row-major, with rows `row_stride` elements apart.
#[derive(Debug)]
pub(crate) struct MatrixMut<'a> {
    data: &'a mut [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
}

impl<'a> MatrixMut<'a> {
    /// Views `data` as `rows` x `cols` with rows `row_stride` elements apart.
    pub(crate) fn strided(
        data: &'a mut [f32],
        rows: usize,
        cols: usize,
        row_stride: usize,
    ) -> Self {
        assert!(cols <= row_stride && fits(data.len(), rows, cols, row_stride));
        Self {
            data,
            rows,
            cols,
            row_stride,
        }
    }

    /// Views all of `data` as `rows` x `cols`.
    pub(crate) fn new(data: &'a mut [f32], rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols);
        Self::strided(data, rows, cols, cols)
    }
}

/// What happens to the output's old content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Output {
    /// It is added to.
    Add,
    /// It is overwritten, and need not be initialized with anything.
    Overwrite,
}

/// Which threads a product runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Threads {
    /// The calling thread: for products inside a parallel loop.
    One,
    /// All threads of the current rayon pool.
    All,
}

/// The right operand of a product.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Right<'a> {
    /// As it lies in memory.
    Plain(Matrix<'a>),
    /// As the matrix unit reads it: for an operand of several products, or one that is stored in BF16. Only where
    /// [`takes_arranged`] says so.
    Arranged(&'a Arranged),
}

impl<'a> From<Matrix<'a>> for Right<'a> {
    fn from(matrix: Matrix<'a>) -> Self {
        Self::Plain(matrix)
    }
}

/// Whether there is a unit for arranged operands.
pub(crate) fn takes_arranged() -> bool {
    Amx::here().is_some()
}

/// `out = scale * a b`, or `out += scale * a b`.
///
/// The output is cut into tasks, as many as the threads need. Each element is a sum over the inner dimension in an order that depends on
/// the shapes alone, so the cut changes nothing but the time.
pub(crate) fn matmul<'b>(
    out: MatrixMut<'_>,
    output: Output,
    scale: f32,
    a: Matrix<'_>,
    b: impl Into<Right<'b>>,
    threads: Threads,
) {
    let b = b.into();
    let (inner, cols) = match b {
        Right::Plain(b) => (b.rows, b.cols),
        Right::Arranged(b) => (b.inner, b.columns),
    };
    assert_eq!(a.cols, inner);
    assert_eq!((out.rows, out.cols), (a.rows, cols));
    if out.rows == 0 || out.cols == 0 {
        return;
    }
    match (b, Amx::here()) {
        (Right::Plain(b), Some(unit)) if is_worth_arranging([a.rows, inner, cols]) => {
            let mut arranged = ARRANGED.take();
            arranged.arrange(b);
            by_tiles(unit, out, output, scale, a, &arranged, threads);
            ARRANGED.set(arranged);
        }
        (Right::Plain(b), _) => by_fma(out, output, scale, a, b, threads),
        (Right::Arranged(b), Some(unit)) => by_tiles(unit, out, output, scale, a, b, threads),
        (Right::Arranged(_), None) => unreachable!("nobody arranges without a unit"),
    }
}

/// Whether a product of f32 matrices, rows x inner times inner x columns, is faster in tiles, arranging included.
fn is_worth_arranging([rows, inner, cols]: [usize; 3]) -> bool {
    rows.min(cols) >= 2 * SIDE && inner >= 2 * SIDE && rows * inner * cols >= 1 << 22
}

thread_local! {
    /// The right operand of a product of f32 matrices, while it runs.
    static ARRANGED: Cell<Arranged> = Cell::default();
    /// The left operand of a task.
    static LEFT: Cell<Vec<Tile>> = Cell::default();
}

/// Bytes of a task's left operand: so much stays in a core's second-level cache, beside a panel of the right one.
const LEFT_BYTES: usize = 1 << 20;

/// Tasks for each thread, so that one that is held up does not hold up all.
const TASKS_PER_THREAD: usize = 2;

/// Steps of the inner dimension that are summed at once, at most: so that a task's left operand has some panels, which share each panel of
/// the right one.
const MOST_STEPS: usize = 32;

/// [`matmul`] by a matrix unit.
///
/// A task takes some panels of rows. Stretch after stretch of the inner dimension, it arranges them and goes over the right operand's panels
/// of columns: all, unless there are fewer panels of rows than threads.
fn by_tiles(
    unit: impl Unit,
    out: MatrixMut<'_>,
    output: Output,
    scale: f32,
    a: Matrix<'_>,
    b: &Arranged,
    threads: Threads,
) {
    let steps = b.steps();
    let stretch = steps.div_ceil(steps.div_ceil(MOST_STEPS).max(1)).max(1);
    let [row_panels, column_panels] = [out.rows, out.cols].map(|side| side.div_ceil(SIDE));
    let wanted = match threads {
        Threads::One => 1,
        Threads::All => match rayon::current_num_threads() {
            1 => 1,
            threads => TASKS_PER_THREAD * threads,
        },
    };
    let panel_bytes = stretch * Pieces::Three.tiles() * size_of::<Tile>();
    let high = row_panels.div_ceil(wanted).min(LEFT_BYTES / panel_bytes);
    let across = (wanted / row_panels.div_ceil(high)).clamp(1, column_panels);
    let wide = column_panels.div_ceil(across);

    // The rows of each task, cut to its columns: tasks of one band of rows after the other.
    let across = column_panels.div_ceil(wide);
    let mut tasks: Vec<Vec<&mut [f32]>> = Vec::new();
    tasks.resize_with(row_panels.div_ceil(high) * across, Vec::new);
    let rows = out.data.chunks_mut(out.row_stride).take(out.rows);
    for (row, elements) in rows.enumerate() {
        let first = row / (high * SIDE) * across;
        let parts = elements[..out.cols].chunks_mut(wide * SIDE);
        for (task, part) in parts.enumerate() {
            tasks[first + task].push(part);
        }
    }
    let run = |(task, mut rows): (usize, Vec<&mut [f32]>)| {
        let (first_row, first_panel) = (task / across * high * SIDE, task % across * wide);
        let mut buffer = LEFT.take();
        // An empty sum is zero: there is at least one stretch.
        for first in (0..steps.max(1)).step_by(stretch) {
            let stretch = first..steps.min(first + stretch);
            let output = match first {
                0 => output,
                _ => Output::Add,
            };
            let tiles = rows.len().div_ceil(SIDE) * stretch.len() * Pieces::Three.tiles();
            buffer.resize(buffer.len().max(tiles), Tile::ZERO);
            let left = &mut buffer[..tiles];
            if tiles > 0 {
                tiles::arrange_left(a, first_row, stretch.clone(), left);
            }
            let panel = |index: usize| b.panel(first_panel + index, stretch.clone());
            multiply_stretch(unit, &mut rows, output, scale, left, b.pieces, panel);
        }
        LEFT.set(buffer);
    };
    match wanted {
        1 => tasks.into_iter().enumerate().for_each(run),
        _ => tasks.into_par_iter().enumerate().for_each(run),
    }
}

/// `rows = scale * left right`, or `rows += ...`, with the columns `index * SIDE` and following of the right operand in `right(index)`.
fn multiply_stretch<'b>(
    unit: impl Unit,
    rows: &mut [&mut [f32]],
    output: Output,
    scale: f32,
    left: &[Tile],
    pieces: Pieces,
    right: impl Fn(usize) -> &'b [Tile],
) {
    let unit = unit.set_up();
    let width = rows.first().map_or(0, |row| row.len());
    let panels = rows.len().div_ceil(SIDE);
    let panel = left.len() / panels;
    // Each block is written while the next one is multiplied: writing waits for sums, and for memory.
    let (mut new, mut old) = (&mut Sums::ZERO.clone(), &mut Sums::ZERO.clone());
    let mut last = None;
    for column in (0..width).step_by(SIDE) {
        let columns = column..width.min(column + SIDE);
        let index = column / SIDE;
        for first in (0..rows.len()).step_by(SIDE) {
            let block = first..rows.len().min(first + SIDE);
            unit.multiply(
                &left[first / SIDE * panel..][..panel],
                right(index),
                pieces,
                new,
            );
            if let Some((rows_of_last, columns)) = last.replace((block, columns.clone())) {
                write(old, &mut rows[rows_of_last], columns, output, scale);
            }
            std::mem::swap(&mut new, &mut old);
        }
    }
    if let Some((rows_of_last, columns)) = last {
        write(old, &mut rows[rows_of_last], columns, output, scale);
    }
}

/// Writes `scale * sums` to the elements of `rows` in `columns`, or adds them.
fn write(sums: &Sums, rows: &mut [&mut [f32]], columns: Range<usize>, output: Output, scale: f32) {
    simd(
        #[inline(always)]
        || {
            for (row, sums) in rows.iter_mut().zip(&sums.0) {
                let row = &mut row[columns.clone()];
                match (output, row.first_chunk_mut::<SIDE>()) {
                    (Output::Overwrite, Some(row)) => {
                        *row = std::array::from_fn(|i| scale * sums[i]);
                    }
                    (Output::Add, Some(row)) => {
                        *row = std::array::from_fn(|i| row[i] + scale * sums[i]);
                    }
                    (Output::Overwrite, None) => {
                        let each = row.iter_mut().zip(sums);
                        each.for_each(|(out, sum)| *out = scale * sum);
                    }
                    (Output::Add, None) => {
                        let each = row.iter_mut().zip(sums);
                        each.for_each(|(out, sum)| *out += scale * sum);
                    }
                }
            }
        },
    );
}

/// The kernel's tile with AVX-512; with AVX2 it is as high and a quarter as wide.
const TILE: [usize; 2] = [6, 64];

/// Tiles, down and across, that a task has at least. One of 64 by 64 elements or less would be summed in another order.
const LEAST_TILES: [usize; 2] = [11, 2];

/// What arranging one element of an operand costs, in products of two elements.
const ARRANGING: usize = 20;

/// [`matmul`] by the `gemm` crate: the processor's fused multiply-add.
fn by_fma(
    out: MatrixMut<'_>,
    output: Output,
    scale: f32,
    a: Matrix<'_>,
    b: Matrix<'_>,
    threads: Threads,
) {
    let product = Product {
        row_stride: out.row_stride,
        data: out.data.as_mut_ptr(),
        output,
        scale,
        a,
        b,
    };
    let (rows, cols) = (out.rows, out.cols);
    if threads == Threads::One {
        product.compute(0..rows, 0..cols);
        return;
    }
    let [down, across] = cut([rows, cols], rayon::current_num_threads());
    (0..down * across).into_par_iter().for_each(|task| {
        product.compute(
            part(rows, TILE[0], down, task / across),
            part(cols, TILE[1], across, task % across),
        );
    });
}

/// Into how many parts rows and columns are cut for `threads` threads: those with which the last of them is done first.
fn cut(shape: [usize; 2], threads: usize) -> [usize; 2] {
    if threads == 1 {
        return [1, 1];
    }
    let most = |side: usize| (shape[side] / TILE[side] / LEAST_TILES[side]).clamp(1, 2 * threads);
    let length =
        |side: usize, parts: usize| (shape[side] / TILE[side]).div_ceil(parts).max(1) * TILE[side];
    let cost = |&[down, across]: &[usize; 2]| {
        let (rows, cols) = (length(0, down), length(1, across));
        (down * across).div_ceil(threads) * (rows * cols + ARRANGING * (rows + cols))
    };
    (1..=most(0))
        .flat_map(|down| (1..=most(1)).map(move |across| [down, across]))
        .min_by_key(cost)
        .unwrap_or([1, 1])
}

/// Part number `index` of `parts` of a side: whole tiles, and in the last part what is left.
fn part(length: usize, tile: usize, parts: usize, index: usize) -> Range<usize> {
    let tiles = length / tile;
    let end = match index + 1 == parts {
        true => length,
        false => (index + 1) * tiles / parts * tile,
    };
    index * tiles / parts * tile..end
}

/// A product whose shapes were checked: `a` is rows x inner, `b` inner x columns, and every element of the output lies inside what
/// `data` points to, which nobody else uses meanwhile.
struct Product<'a> {
    row_stride: usize,
    data: *mut f32,
    output: Output,
    scale: f32,
    a: Matrix<'a>,
    b: Matrix<'a>,
}

#[expect(unsafe_code, reason = "threads write different elements of one matrix")]
// SAFETY: `data` is only written through, by `compute`, whose callers share no element between threads.
unsafe impl Sync for Product<'_> {}

impl Product<'_> {
    /// Computes the elements in `rows` and `cols`, on the calling thread.
    fn compute(&self, rows: Range<usize>, cols: Range<usize>) {
        let (a, b) = (self.a, self.b);
        #[expect(
            clippy::cast_possible_wrap,
            reason = "strides are smaller than a slice's length, which fits isize"
        )]
        let stride = |s: usize| s as isize;
        #[expect(unsafe_code, reason = "gemm takes raw pointers")]
        // SAFETY: the constructors checked that every (row, col) of each view lies inside its slice, and `rows` and `cols` are inside
        // the output's, which are those of `a` and `b`; the output was borrowed mutably, so it overlaps neither operand; f32 has no
        // invalid values.
        unsafe {
            gemm::gemm(
                rows.len(),
                cols.len(),
                a.cols,
                self.data.add(rows.start * self.row_stride + cols.start),
                1,
                stride(self.row_stride),
                self.output == Output::Add,
                a.data.as_ptr().add(rows.start * a.row_stride),
                stride(a.col_stride),
                stride(a.row_stride),
                b.data.as_ptr().add(cols.start * b.col_stride),
                stride(b.col_stride),
                stride(b.row_stride),
                1.0,
                self.scale,
                false,
                false,
                false,
                Parallelism::None,
            );
        }
    }
}

/// Whether the last element of a `rows` x `cols` view lies inside `len` elements.
fn fits(len: usize, rows: usize, cols: usize, row_stride: usize) -> bool {
    rows == 0 || cols == 0 || (rows - 1) * row_stride + cols <= len
}

#[cfg(test)]
mod tests {
    use super::tiles::emulation::{Emulated, bf16};
    use super::*;

    /// Small integers, so that products are exact and any order of summation gives the same bits.
    fn ramp(n: usize) -> Vec<f32> {
        (0u8..=250)
            .cycle()
            .take(n)
            .map(|i| f32::from(i % 7) - 3.0)
            .collect()
    }

    fn naive(
        m: usize,
        n: usize,
        k: usize,
        a: impl Fn(usize, usize) -> f32,
        b: impl Fn(usize, usize) -> f32,
    ) -> Vec<f32> {
        let mut out = vec![0.0; m * n];
        for i in 0..m {
            for j in 0..n {
                out[i * n + j] = (0..k).map(|l| a(i, l) * b(l, j)).sum();
            }
        }
        out
    }

    #[test]
    fn a_product_of_transposed_and_sliced_views_is_the_naive_one() {
        let (m, n, k) = (5, 7, 9);
        let a = ramp(m * 20);
        let b = ramp(n * k);
        let want = naive(m, n, k, |i, l| a[i * 20 + l], |l, j| b[j * k + l]);
        let mut out = vec![f32::NAN; m * n];
        matmul(
            MatrixMut::new(&mut out, m, n),
            Output::Overwrite,
            1.0,
            Matrix::strided(&a, m, k, 20),
            Matrix::new(&b, n, k).t(),
            Threads::One,
        );
        assert_eq!(out, want);
        matmul(
            MatrixMut::new(&mut out, m, n),
            Output::Add,
            2.0,
            Matrix::strided(&a, m, k, 20),
            Matrix::new(&b, n, k).t(),
            Threads::All,
        );
        assert!(out.iter().zip(&want).all(|(o, w)| *o == 3.0 * w));
    }

    #[test]
    fn the_number_of_threads_does_not_change_a_bit() {
        // Inner dimensions above and below what the kernel sums at once, in all layouts that the decoder uses.
        for (m, n, k) in [
            (311, 577, 1030),
            (577, 193, 311),
            (13, 400, 64),
            (200, 60, 700),
        ] {
            let a: Vec<f32> = ramp(m * k).iter().map(|x| x * 0.1).collect();
            let b: Vec<f32> = ramp(k * n).iter().map(|x| x * 0.3).collect();
            let plain = (Matrix::new(&a, m, k), Matrix::new(&b, k, n));
            let layouts = [
                plain,
                (plain.0, Matrix::new(&b, n, k).t()),
                (Matrix::new(&a, k, m).t(), plain.1),
            ];
            for (a, b) in layouts {
                let product = |threads: usize| {
                    let pool = rayon::ThreadPoolBuilder::new()
                        .num_threads(threads)
                        .build()
                        .expect("a pool");
                    let mut out = vec![0.0; m * n];
                    pool.install(|| {
                        let out = MatrixMut::new(&mut out, m, n);
                        matmul(out, Output::Overwrite, 1.0, a, b, Threads::All);
                    });
                    out
                };
                let one = product(1);
                for threads in [2, 3, 8, 40] {
                    assert!(
                        one == product(threads),
                        "{m} x {n} x {k}, {threads} threads"
                    );
                }
            }
        }
    }

    /// Numbers of both signs over some powers of two, with all their bits.
    fn rough(n: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(0x0019_660d).wrapping_add(0x3c6e_f35f);
            state
        };
        (0..n)
            .map(|_| {
                let (bits, exponent) = (next(), next() >> 29);
                f32::from_bits(bits & 0x807f_ffff | (121 + exponent) << 23)
            })
            .collect()
    }

    /// Holds `out`, rows x columns, against the product of `a` and `b` in f64: within `bound` of the sum of the products' magnitudes.
    fn check_close(out: &[f32], a: Matrix<'_>, b: Matrix<'_>, scale: f64, old: f64, bound: f64) {
        let at = |m: Matrix<'_>, row: usize, col: usize| {
            f64::from(m.data[row * m.row_stride + col * m.col_stride])
        };
        for (place, &out) in out.iter().enumerate() {
            let (row, col) = (place / b.cols, place % b.cols);
            let products = (0..a.cols).map(|k| at(a, row, k) * at(b, k, col));
            let (sum, magnitude) = products.fold((0.0, 0.0), |(s, m), p| (s + p, m + p.abs()));
            let error = (f64::from(out) - (old + scale * sum)).abs();
            assert!(
                error <= bound * (scale.abs() * magnitude + old.abs()),
                "{row}, {col}: {out} for {sum}"
            );
        }
    }

    /// A product in tiles on one thread, by the unit's arithmetic.
    fn emulated(a: Matrix<'_>, b: &Arranged, output: Output, scale: f32, out: &mut [f32]) {
        let out = MatrixMut::new(out, a.rows, b.columns);
        by_tiles(Emulated, out, output, scale, a, b, Threads::One);
    }

    const LAST_BIT: f64 = 1.0 / 8_388_608.0;

    #[test]
    fn products_in_tiles_are_those_of_f64_in_every_layout() {
        // Whole tiles, parts of them, and an inner dimension of two stretches.
        for (m, n, k) in [(64, 32, 96), (37, 45, 70), (1, 3, 5), (33, 5, 1100)] {
            let (a, b) = (rough(m * k, 1), rough(k * n, 2));
            let a = [Matrix::new(&a, m, k), Matrix::new(&a, k, m).t()];
            let b = [Matrix::new(&b, k, n), Matrix::new(&b, n, k).t()];
            for (a, b) in a.into_iter().flat_map(|a| b.map(|b| (a, b))) {
                let mut arranged = Arranged::default();
                arranged.arrange(b);
                let mut out = vec![f32::NAN; m * n];
                emulated(a, &arranged, Output::Overwrite, 1.0, &mut out);
                check_close(&out, a, b, 1.0, 0.0, 8.0 * LAST_BIT);
                let mut out = vec![2.0; m * n];
                emulated(a, &arranged, Output::Add, -0.5, &mut out);
                check_close(&out, a, b, -0.5, 2.0, 8.0 * LAST_BIT);
            }
        }
    }

    #[test]
    fn stored_bf16_matrices_one_above_the_other_are_one_operand() {
        let (tokens, inputs) = (35, 70);
        let rows = [40, 7, 50];
        let outputs: usize = rows.iter().sum();
        let bits: Vec<u16> = rough(outputs * inputs, 3)
            .iter()
            .map(|x| (x.to_bits() >> 16) as u16)
            .collect();
        let widened: Vec<f32> = bits.iter().map(|&bits| bf16(bits)).collect();
        let bytes: Vec<u8> = bits.iter().flat_map(|bits| bits.to_le_bytes()).collect();
        let (first, rest) = bytes.split_at(2 * rows[0] * inputs);
        let (second, third) = rest.split_at(2 * rows[1] * inputs);
        let parts = [first, second, third];
        let w = Matrix::new(&widened, outputs, inputs);
        for (inner, w) in [(Inner::Along, w.t()), (Inner::Across, w)] {
            let x = rough(tokens * w.rows, 4);
            let x = Matrix::new(&x, tokens, w.rows);
            let mut arranged = Arranged::default();
            arranged.arrange_stored(&parts, inputs, inner);
            let mut out = vec![0.0; tokens * w.cols];
            emulated(x, &arranged, Output::Overwrite, 1.0, &mut out);
            check_close(&out, x, w, 1.0, 0.0, 4.0 * LAST_BIT);
        }
    }

    #[test]
    #[expect(
        clippy::print_stderr,
        reason = "a test that tests nothing has to say so"
    )]
    fn the_unit_gives_the_bits_of_its_emulation() {
        let Some(unit) = Amx::here() else {
            eprintln!("there is no AMX-BF16 here, so nothing was compared");
            return;
        };
        // Every tile is full of bits that mean something: also infinities, NaNs, and what counts as zero.
        for (seed, finite) in [(5, true), (6, true), (7, false)] {
            let steps = 3;
            let random = |seed: u32, tiles: usize| -> Vec<Tile> {
                let bits = rough(tiles * 512, seed);
                let bits = bits.iter().zip(rough(tiles * 512, seed + 100));
                let bits: Vec<u16> = bits
                    .map(|(x, y)| match finite {
                        true => (x.to_bits() >> 16) as u16,
                        false => (y.to_bits() << 13 >> 16) as u16,
                    })
                    .collect();
                bits.as_chunks()
                    .0
                    .as_chunks()
                    .0
                    .iter()
                    .map(|rows| Tile(*rows))
                    .collect()
            };
            for pieces in [Pieces::One, Pieces::Three] {
                let left = random(seed, steps * Pieces::Three.tiles());
                let right = random(seed + 10, steps * pieces.tiles());
                let (mut got, mut want) = (Sums::ZERO, Sums::ZERO);
                unit.set_up().multiply(&left, &right, pieces, &mut got);
                Emulated.multiply(&left, &right, pieces, &mut want);
                for (got, want) in got.0.as_flattened().iter().zip(want.0.as_flattened()) {
                    let same = got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan();
                    assert!(same, "{got:e} for {want:e}");
                }
            }
        }
    }
}
