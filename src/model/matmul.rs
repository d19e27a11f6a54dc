//! Matrix products over strided f32 views.
//!
//! In: two views and an output slice. Out: the product written to, or added onto, the output. This is the one door to
//! the `gemm` crate (candle's own kernel library), so that products read transposed operands and slices of a larger
//! matrix through strides instead of copies, and write into buffers that are reused.

use gemm::Parallelism;
use rayon::prelude::*;

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

/// Columns of the output that one task computes: a multiple of the kernel's tile on every instruction set, and narrow enough to
/// share a block's projections evenly. gemm's own threads reached 220 to 400 GFLOP/s on the shapes of a 135M-parameter model, two
/// cores and x w^T; one-threaded products of this width reach 340 to 400 on all of them (64 to 512 columns were tried).
const COLUMNS: usize = 96;

/// `out = scale * a b`, or `out += scale * a b`.
///
/// The output is cut into columns by its shape alone, and each element is a sum over the inner dimension in an order that
/// depends on that shape: the number of threads changes nothing.
pub(crate) fn matmul(
    out: MatrixMut<'_>,
    output: Output,
    scale: f32,
    a: Matrix<'_>,
    b: Matrix<'_>,
    threads: Threads,
) {
    assert_eq!(a.cols, b.rows);
    assert_eq!((out.rows, out.cols), (a.rows, b.cols));
    if out.rows == 0 || out.cols == 0 {
        return;
    }
    let product = Product {
        rows: out.rows,
        row_stride: out.row_stride,
        data: out.data.as_mut_ptr(),
        output,
        scale,
        a,
        b,
    };
    match threads {
        Threads::One => product.columns(0..out.cols),
        Threads::All => (0..out.cols.div_ceil(COLUMNS))
            .into_par_iter()
            .for_each(|task| {
                let first = task * COLUMNS;
                product.columns(first..out.cols.min(first + COLUMNS));
            }),
    }
}

/// A product whose shapes were checked: `a` is rows x inner, `b` inner x columns, and every element of the output lies inside what
/// `data` points to, which nobody else uses meanwhile.
struct Product<'a> {
    rows: usize,
    row_stride: usize,
    data: *mut f32,
    output: Output,
    scale: f32,
    a: Matrix<'a>,
    b: Matrix<'a>,
}

#[expect(unsafe_code, reason = "threads write different columns of one matrix")]
// SAFETY: `data` is only written through, by `columns`, whose callers share no column between threads.
unsafe impl Sync for Product<'_> {}

impl Product<'_> {
    /// Computes the columns in `range`, on the calling thread.
    fn columns(&self, range: std::ops::Range<usize>) {
        let (a, b) = (self.a, self.b);
        #[expect(
            clippy::cast_possible_wrap,
            reason = "strides are smaller than a slice's length, which fits isize"
        )]
        let stride = |s: usize| s as isize;
        #[expect(unsafe_code, reason = "gemm takes raw pointers")]
        // SAFETY: the constructors checked that every (row, col) of each view lies inside its slice, and `range` is inside the
        // output's columns, which are those of `b`; the output was borrowed mutably, so it overlaps neither operand; f32 has no
        // invalid values.
        unsafe {
            gemm::gemm(
                self.rows,
                range.len(),
                a.cols,
                self.data.add(range.start),
                1,
                stride(self.row_stride),
                self.output == Output::Add,
                a.data.as_ptr(),
                stride(a.col_stride),
                stride(a.row_stride),
                b.data.as_ptr().add(range.start * b.col_stride),
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
        let (m, n, k) = (311, 577, 1030);
        let a: Vec<f32> = ramp(m * k).iter().map(|x| x * 0.1).collect();
        let b: Vec<f32> = ramp(k * n).iter().map(|x| x * 0.3).collect();
        let product = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .expect("a pool");
            let mut out = vec![0.0; m * n];
            pool.install(|| {
                matmul(
                    MatrixMut::new(&mut out, m, n),
                    Output::Overwrite,
                    1.0,
                    Matrix::new(&a, m, k),
                    Matrix::new(&b, k, n),
                    Threads::All,
                );
            });
            out
        };
        let one = product(1);
        for threads in [2, 3, 8] {
            assert_eq!(one, product(threads), "{threads} threads");
        }
    }
}
