//! Products of a few rows of activations with stored matrices, as generating text wants them: one row for each sequence.
//!
//! A matrix is read once for all rows, in its stored dtype, and widened a few of its rows at a time into a buffer that stays in the
//! cache: with so few rows the time goes into reading it, and BF16 is half of f32, and a quantized type less. Each element of a product
//! is computed by one thread in an order that depends on the inner dimension alone: it has the same bits on any number of threads, and
//! whatever other rows there are.

use panacea_formats::TensorView;
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::kernels::dots::dots;
use super::linear::{Linear, Role, widen_here};
use super::point::Point;

impl Linear<'_> {
    /// `y = x W^T + bias`, with the targets at `point`.
    pub(crate) fn stream(&self, x: &[f32], point: Point<'_>, y: &mut Vec<f32>) {
        y.clear();
        y.resize(x.len() / self.inputs * self.outputs, 0.0);
        self.add_streamed(x, point, 1.0, y);
    }

    /// `y = residual + scale (x W^T + bias)`, with the targets at `point` and `residual` rows x outputs.
    pub(crate) fn stream_onto(
        &self,
        residual: &[f32],
        x: &[f32],
        point: Point<'_>,
        scale: f32,
        y: &mut Vec<f32>,
    ) {
        y.clear();
        y.extend_from_slice(residual);
        self.add_streamed(x, point, scale, y);
    }

    fn add_streamed(&self, x: &[f32], point: Point<'_>, scale: f32, y: &mut [f32]) {
        let add = |y: &mut f32, product: f32| *y += scale * product;
        let rows = y.chunks_exact_mut(self.outputs).collect();
        let read = |row, out: &mut [f32]| self.read(row, point, out);
        product(x, self.inputs, read, rows, add);
        let mut first = 0;
        for part in &self.parts {
            let outputs = part.view.elements() / self.inputs;
            if let Role::Adapted(lora) = &part.role {
                let (a, b) = (lora.a.values(point), lora.b.values(point));
                let mut narrow = vec![0.0; x.len() / self.inputs * lora.rank];
                let rows = narrow.chunks_exact_mut(lora.rank).collect();
                product(x, self.inputs, row_of(&a, self.inputs), rows, |y, xa| {
                    *y = xa
                });
                let rows = y.chunks_exact_mut(self.outputs);
                let rows = rows.map(|row| &mut row[first..first + outputs]).collect();
                let add = |y: &mut f32, product: f32| *y += scale * (lora.scale * product);
                product(&narrow, lora.rank, row_of(&b, lora.rank), rows, add);
            }
            first += outputs;
        }
        self.add_bias(scale, y);
    }

    /// Widens one row of the matrices, without factors over them, into `out`.
    fn read(&self, mut row: usize, point: Point<'_>, out: &mut [f32]) {
        for part in &self.parts {
            let outputs = part.view.elements() / self.inputs;
            if row < outputs {
                let first = row * self.inputs;
                return match part.role {
                    Role::Target(index) => point.load_from(index, &part.view, first, out),
                    Role::Frozen | Role::Adapted(_) => widen_here(&part.view, first, out),
                };
            }
            row -= outputs;
        }
    }
}

/// `y = finish(x matrix^T)`, with `matrix` outputs x inputs.
pub(crate) fn stream_matrix(
    x: &[f32],
    matrix: &TensorView<'_>,
    inputs: usize,
    finish: impl Fn(f32) -> f32 + Sync,
    y: &mut Vec<f32>,
) {
    let outputs = matrix.elements() / inputs;
    y.resize(x.len() / inputs * outputs, 0.0);
    let read = |row, out: &mut [f32]| widen_here(matrix, row * inputs, out);
    let rows = y.chunks_exact_mut(outputs).collect();
    product(x, inputs, read, rows, |y, product| *y = finish(product));
}

fn row_of(matrix: &[f32], inputs: usize) -> impl Fn(usize, &mut [f32]) + Sync {
    move |row, out| out.copy_from_slice(&matrix[row * inputs..(row + 1) * inputs])
}

/// Hands each element of x w^T to `put`, with the element of `y` that it belongs to.
///
/// `x`: rows x inputs. `read`: writes a row of `w`. `y`: the rows of the output.
fn product(
    x: &[f32],
    inputs: usize,
    read: impl Fn(usize, &mut [f32]) + Sync,
    mut y: Vec<&mut [f32]>,
    put: impl Fn(&mut f32, f32) + Sync,
) {
    let outputs = y.first().map_or(0, |row| row.len());
    let tile = (TILE_ELEMENTS / inputs).max(1).next_multiple_of(SIDE);
    // A few for each thread, since others may want the machine, too.
    let tasks = (4 * rayon::current_num_threads())
        .min(outputs.div_ceil(tile))
        .max(1);
    let share = outputs.div_ceil(tasks).next_multiple_of(SIDE).max(1);
    let mut parts: Vec<Vec<&mut [f32]>> = Vec::new();
    parts.resize_with(outputs.div_ceil(share), || Vec::with_capacity(y.len()));
    for row in &mut y {
        let columns = row.chunks_mut(share);
        parts
            .iter_mut()
            .zip(columns)
            .for_each(|(part, columns)| part.push(columns));
    }
    parts
        .into_par_iter()
        .enumerate()
        .for_each_init(Vec::new, |wide, (index, mut y)| {
            let here = index * share..outputs.min((index + 1) * share);
            for first in here.clone().step_by(tile) {
                let rows = first..here.end.min(first + tile);
                wide.resize(rows.len() * inputs, 0.0);
                for (row, out) in rows.clone().zip(wide.chunks_exact_mut(inputs)) {
                    read(row, out);
                }
                let column = first - here.start;
                let tile = Tile {
                    x,
                    w: wide,
                    inputs,
                    column,
                    y: &mut y,
                    put: &put,
                };
                pulp::Arch::new().dispatch(tile);
            }
        });
}

/// The products of all rows of `x` with the rows of `w`, which belong to the columns of `y` from `column` on.
struct Tile<'t, 'y, P> {
    x: &'t [f32],
    w: &'t [f32],
    inputs: usize,
    column: usize,
    y: &'t mut [&'y mut [f32]],
    put: &'t P,
}

impl<P: Fn(&mut f32, f32)> WithSimd for Tile<'_, '_, P> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self {
            x,
            w,
            inputs,
            column,
            y,
            put,
        } = self;
        for (group, w) in w.chunks(SIDE * inputs).enumerate() {
            let column = column + group * SIDE;
            for (x, y) in x.chunks(SIDE * inputs).zip(y.chunks_mut(SIDE)) {
                match (w.len() == SIDE * inputs, y.len()) {
                    (true, SIDE) => block::<S, SIDE, SIDE>(simd, x, w, inputs, column, y, put),
                    (true, 3) => block::<S, SIDE, 3>(simd, x, w, inputs, column, y, put),
                    (true, 2) => block::<S, SIDE, 2>(simd, x, w, inputs, column, y, put),
                    (true, _) => block::<S, SIDE, 1>(simd, x, w, inputs, column, y, put),
                    (false, _) => {
                        for (column, w) in (column..).zip(w.chunks_exact(inputs)) {
                            for (x, y) in x.chunks_exact(inputs).zip(y.iter_mut()) {
                                block::<S, 1, 1>(
                                    simd,
                                    x,
                                    w,
                                    inputs,
                                    column,
                                    std::slice::from_mut(y),
                                    put,
                                );
                            }
                        }
                    }
                }
            }
        }
    }
}

#[inline(always)]
fn block<S: Simd, const W: usize, const X: usize>(
    simd: S,
    x: &[f32],
    w: &[f32],
    inputs: usize,
    column: usize,
    y: &mut [&mut [f32]],
    put: &impl Fn(&mut f32, f32),
) {
    let row = |i: usize| i * inputs..(i + 1) * inputs;
    let w: [&[f32]; W] = std::array::from_fn(|i| &w[row(i)]);
    let x: [&[f32]; X] = std::array::from_fn(|i| &x[row(i)]);
    for (j, products) in dots(simd, w, x).into_iter().enumerate() {
        for (product, y) in products.into_iter().zip(y.iter_mut()) {
            put(&mut y[column + j], product);
        }
    }
}

/// Rows of each side whose products are summed at once: 16 sums fit the registers.
const SIDE: usize = 4;

/// Elements that are widened at once: a third of a first-level cache.
const TILE_ELEMENTS: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_element_has_the_same_bits_on_any_number_of_threads_and_among_any_rows() {
        let (inputs, outputs, rows) = (100, 333, 7);
        let ramp = |n: usize, step: usize| -> Vec<f32> {
            let of = |i: usize| u8::try_from(i * step % 251).expect("below 251");
            (0..n).map(|i| f32::from(of(i)) * 0.01 - 1.0).collect()
        };
        let (x, w) = (ramp(rows * inputs, 37), ramp(outputs * inputs, 73));
        let computed = |x: &[f32], threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
            let mut y = vec![f32::NAN; x.len() / inputs * outputs];
            pool.expect("a pool").install(|| {
                let y = y.chunks_exact_mut(outputs).collect();
                product(x, inputs, row_of(&w, inputs), y, |y, product| *y = product);
            });
            y
        };
        let all = computed(&x, 1);
        for threads in [2, 3, 40] {
            assert!(all == computed(&x, threads), "{threads} threads");
        }
        for (x, wanted) in x.chunks(inputs).zip(all.chunks(outputs)) {
            assert!(wanted == computed(x, 2));
        }
        for (x, y) in x.chunks(inputs).zip(all.chunks(outputs)) {
            for (w, found) in w.chunks(inputs).zip(y) {
                let terms = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w));
                assert!((terms.sum::<f64>() - f64::from(*found)).abs() < 1e-4);
            }
        }
    }
}
