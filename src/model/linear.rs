//! A linear layer of a block: y = x W^T + bias, with W one or several stored matrices that read the same input.
//!
//! In: activations, tokens x width, f32. Out: products, and gradients with respect to those matrices that are targets, or to the
//! LoRA factors over them. The stored matrices stay where they are, in their own dtype; [`Linear::load`] makes operands of products of
//! them in [`Loaded`] buffers that are reused from layer to layer.

use std::borrow::Cow;
use std::ops::Range;

use panacea_formats::{Dtype, TensorView};
use rayon::prelude::*;

use super::kernels::simd;
use super::matmul::{
    Arranged, Inner, Matrix, MatrixMut, Output, Right, Threads, matmul, takes_arranged,
};
use super::point::Point;
use super::tensors::TargetTensors;

/// Matrices of outputs x inputs, one above the other.
#[derive(Debug)]
pub(crate) struct Linear<'c> {
    pub(crate) inputs: usize,
    pub(crate) outputs: usize,
    pub(crate) parts: Vec<Part<'c>>,
    /// One for each output; empty without.
    pub(crate) bias: Vec<f32>,
}

/// One stored matrix of a layer.
#[derive(Debug)]
pub(crate) struct Part<'c> {
    /// The module's path in the checkpoint.
    pub(crate) path: String,
    /// Outputs x inputs.
    pub(crate) view: TensorView<'c>,
    pub(crate) role: Role<'c>,
}

/// What of a matrix is optimized.
#[derive(Debug)]
pub(crate) enum Role<'c> {
    /// Nothing: it is as stored.
    Frozen,
    /// Itself, under this index.
    Target(usize),
    /// A LoRA over it.
    Adapted(Lora<'c>),
}

/// Low-rank factors over a frozen matrix W: the layer computes with W + scale B A.
#[derive(Debug)]
pub(crate) struct Lora<'c> {
    pub(crate) rank: usize,
    pub(crate) scale: f32,
    /// Rank x inputs.
    pub(crate) a: Factor<'c>,
    /// Outputs x rank.
    pub(crate) b: Factor<'c>,
}

/// One of both factors.
#[derive(Debug)]
pub(crate) enum Factor<'c> {
    /// As stored, widened.
    Frozen(Vec<f32>),
    /// The target of this index, stored here.
    Target(usize, TensorView<'c>),
}

impl Factor<'_> {
    pub(super) fn values<'v>(&'v self, point: Point<'v>) -> Cow<'v, [f32]> {
        match self {
            Self::Frozen(values) => Cow::Borrowed(values),
            Self::Target(index, view) => point.values(*index, view),
        }
    }
}

/// Where the targets are, and their gradient to add to.
#[derive(Debug)]
pub(crate) struct Gradients<'a> {
    pub(crate) point: Point<'a>,
    pub(crate) targets: &'a mut TargetTensors,
}

/// Which products a layer's matrices are loaded for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Products {
    /// Those of [`Linear::forward`].
    Forward,
    /// Those of [`Linear::backward`].
    Backward,
    /// All.
    Both,
}

/// Matrices W of a layer, outputs x inputs, as right operands: in f32 or, where there is a matrix unit, arranged for it, straight from what
/// is stored where that is BF16.
#[derive(Debug, Default)]
pub(crate) struct Loaded {
    outputs: usize,
    inputs: usize,
    widened: Vec<f32>,
    /// W^T.
    forward: Arranged,
    /// W.
    backward: Arranged,
}

impl Loaded {
    /// W^T, of the forward.
    pub(crate) fn transposed(&self) -> Right<'_> {
        match takes_arranged() {
            true => Right::Arranged(&self.forward),
            false => Right::Plain(self.matrix().t()),
        }
    }

    /// W, of the backward.
    pub(crate) fn plain(&self) -> Right<'_> {
        match takes_arranged() {
            true => Right::Arranged(&self.backward),
            false => Right::Plain(self.matrix()),
        }
    }

    /// Loads `rows` of the stored matrix `view`.
    pub(crate) fn load_rows(
        &mut self,
        view: &TensorView<'_>,
        rows: Range<usize>,
        products: Products,
    ) {
        self.inputs = view.elements() / view.shape[0];
        self.outputs = rows.len();
        let elements = rows.start * self.inputs..rows.end * self.inputs;
        if takes_arranged() && view.dtype == Dtype::BF16 {
            self.arrange_stored(
                &[&view.bytes[2 * elements.start..2 * elements.end]],
                products,
            );
            return;
        }
        self.widened.resize(elements.len(), 0.0);
        widen(view, elements.start, &mut self.widened);
        self.arrange_widened(products);
    }

    fn matrix(&self) -> Matrix<'_> {
        Matrix::new(&self.widened, self.outputs, self.inputs)
    }

    fn arrange_stored(&mut self, parts: &[&[u8]], products: Products) {
        if products != Products::Backward {
            self.forward
                .arrange_stored(parts, self.inputs, Inner::Along);
        }
        if products != Products::Forward {
            self.backward
                .arrange_stored(parts, self.inputs, Inner::Across);
        }
    }

    fn arrange_widened(&mut self, products: Products) {
        if !takes_arranged() {
            return;
        }
        let w = Matrix::new(&self.widened, self.outputs, self.inputs);
        if products != Products::Backward {
            self.forward.arrange(w.t());
        }
        if products != Products::Forward {
            self.backward.arrange(w);
        }
    }
}

impl Linear<'_> {
    /// Whether any of it is optimized.
    pub(crate) fn has_targets(&self) -> bool {
        self.parts.iter().any(|part| match &part.role {
            Role::Frozen => false,
            Role::Target(_) => true,
            Role::Adapted(lora) => [&lora.a, &lora.b]
                .iter()
                .any(|factor| matches!(factor, Factor::Target(..))),
        })
    }

    /// Whether it is computed as it is stored, wherever the targets are, and stored in BF16.
    pub(crate) fn is_stored_bf16(&self) -> bool {
        let mut parts = self.parts.iter();
        parts.all(|part| part.view.dtype == Dtype::BF16 && matches!(part.role, Role::Frozen))
    }

    /// Loads the matrices, with those that are targets, or have factors over them, at `point`.
    pub(crate) fn load(&self, point: Point<'_>, products: Products, w: &mut Loaded) {
        (w.outputs, w.inputs) = (self.outputs, self.inputs);
        let is_moved = |part: &Part<'_>| match part.role {
            Role::Frozen => false,
            Role::Target(_) => !point.is_stored(),
            Role::Adapted(_) => true,
        };
        let is_bf16 = |part: &Part<'_>| part.view.dtype == Dtype::BF16;
        let mut parts = self.parts.iter();
        if takes_arranged() && parts.all(|part| is_bf16(part) && !is_moved(part)) {
            let parts: Vec<&[u8]> = self.parts.iter().map(|part| part.view.bytes).collect();
            w.arrange_stored(&parts, products);
            return;
        }
        self.widen(point, &mut w.widened);
        w.arrange_widened(products);
    }

    /// Widens the matrices, with the targets at `point`, into `w`, outputs x inputs.
    pub(crate) fn widen(&self, point: Point<'_>, w: &mut Vec<f32>) {
        w.resize(self.outputs * self.inputs, 0.0);
        let mut rest = w.as_mut_slice();
        for part in &self.parts {
            let (rows, left) = rest.split_at_mut(part.view.elements());
            match &part.role {
                Role::Frozen => widen(&part.view, 0, rows),
                Role::Target(index) => point.load(*index, &part.view, rows),
                Role::Adapted(lora) => {
                    widen(&part.view, 0, rows);
                    let outputs = rows.len() / self.inputs;
                    matmul(
                        MatrixMut::new(rows, outputs, self.inputs),
                        Output::Add,
                        lora.scale,
                        Matrix::new(&lora.b.values(point), outputs, lora.rank),
                        Matrix::new(&lora.a.values(point), lora.rank, self.inputs),
                        Threads::All,
                    );
                }
            }
            rest = left;
        }
    }

    /// `y = x w^T + bias`, with `w` as [`Self::load`] left it for the forward.
    pub(crate) fn forward(&self, x: &[f32], w: &Loaded, y: &mut Vec<f32>) {
        y.resize(x.len() / self.inputs * self.outputs, 0.0);
        self.multiply(x, w, Output::Overwrite, 1.0, y);
        self.add_bias(1.0, y);
    }

    /// `y = residual + scale (x w^T + bias)`, with `residual` tokens x outputs.
    pub(crate) fn forward_onto(
        &self,
        residual: &[f32],
        x: &[f32],
        w: &Loaded,
        scale: f32,
        y: &mut Vec<f32>,
    ) {
        y.resize(residual.len(), 0.0);
        copy(residual, y);
        self.multiply(x, w, Output::Add, scale, y);
        self.add_bias(scale, y);
    }

    /// `dx = scale dy w`: the gradient of [`Self::forward`] with respect to `x`, with `w` as [`Self::load`] left it for the backward.
    pub(crate) fn backward(&self, dy: &[f32], w: &Loaded, scale: f32, dx: &mut Vec<f32>) {
        let n = dy.len() / self.outputs;
        dx.resize(n * self.inputs, 0.0);
        matmul(
            MatrixMut::new(dx, n, self.inputs),
            Output::Overwrite,
            scale,
            Matrix::new(dy, n, self.outputs),
            w.plain(),
            Threads::All,
        );
    }

    /// Adds the gradients of `scale (x w^T)` with respect to targets, given `dy`: dW = scale dy^T x of a matrix, and of factors
    /// over one, with s the product of both scales, dB = s dy^T (x A^T) and dA = s (dy B)^T x.
    pub(crate) fn add_gradients(
        &self,
        dy: &[f32],
        x: &[f32],
        scale: f32,
        gradients: &mut Gradients<'_>,
    ) {
        let (n, point) = (x.len() / self.inputs, gradients.point);
        let x = Matrix::new(x, n, self.inputs);
        let mut first = 0;
        for part in &self.parts {
            let rows = part.view.elements() / self.inputs;
            let dy = Matrix::strided(&dy[first.min(dy.len())..], n, rows, self.outputs);
            first += rows;
            let mut add = |index: usize, scale, d: Matrix<'_>, input: Matrix<'_>, rows, cols| {
                let out = MatrixMut::new(gradients.targets.tensor_mut(index), rows, cols);
                matmul(out, Output::Add, scale, d.t(), input, Threads::All);
            };
            match &part.role {
                Role::Frozen => {}
                Role::Target(index) => add(*index, scale, dy, x, rows, self.inputs),
                Role::Adapted(lora) => {
                    let (rank, scale) = (lora.rank, scale * lora.scale);
                    let (a, b) = (lora.a.values(point), lora.b.values(point));
                    let a = Matrix::new(&a, rank, self.inputs);
                    let b = Matrix::new(&b, rows, rank);
                    let narrow = |left: Matrix<'_>, right: Matrix<'_>| {
                        let mut product = vec![0.0; n * rank];
                        let out = MatrixMut::new(&mut product, n, rank);
                        matmul(out, Output::Overwrite, 1.0, left, right, Threads::All);
                        product
                    };
                    if let Factor::Target(index, _) = lora.b {
                        let xa = narrow(x, a.t());
                        add(index, scale, dy, Matrix::new(&xa, n, rank), rows, rank);
                    }
                    if let Factor::Target(index, _) = lora.a {
                        let db = narrow(dy, b);
                        add(
                            index,
                            scale,
                            Matrix::new(&db, n, rank),
                            x,
                            rank,
                            self.inputs,
                        );
                    }
                }
            }
        }
    }

    fn multiply(&self, x: &[f32], w: &Loaded, output: Output, scale: f32, y: &mut [f32]) {
        let n = x.len() / self.inputs;
        matmul(
            MatrixMut::new(y, n, self.outputs),
            output,
            scale,
            Matrix::new(x, n, self.inputs),
            w.transposed(),
            Threads::All,
        );
    }

    pub(super) fn add_bias(&self, scale: f32, y: &mut [f32]) {
        if self.bias.is_empty() {
            return;
        }
        for row in y.chunks_exact_mut(self.outputs) {
            for (y, b) in row.iter_mut().zip(&self.bias) {
                *y += scale * b;
            }
        }
    }
}

/// Widens the elements of `view` from number `first` on into `out`, in parallel.
pub(crate) fn widen(view: &TensorView<'_>, first: usize, out: &mut [f32]) {
    out.par_chunks_mut(CHUNK).enumerate().for_each(|(i, out)| {
        widen_here(view, first + i * CHUNK, out);
    });
}

/// As [`widen`], on the calling thread.
pub(crate) fn widen_here(view: &TensorView<'_>, first: usize, out: &mut [f32]) {
    let range = first..first + out.len();
    // What most checkpoints hold, by the widest instructions there are; the reader of files is compiled for all processors.
    if view.dtype == Dtype::BF16 {
        let bytes = &view.bytes[2 * range.start..2 * range.end];
        return simd(|| {
            for (x, &half) in out.iter_mut().zip(bytes.as_chunks().0) {
                *x = f32::from_bits(u32::from(u16::from_le_bytes(half)) << 16);
            }
        });
    }
    view.widen_into(range, out)
        .expect("dtype and shape were checked when the weights were resolved");
}

/// Copies in parallel.
pub(crate) fn copy(from: &[f32], to: &mut [f32]) {
    to.par_chunks_mut(CHUNK)
        .zip(from.par_chunks(CHUNK))
        .for_each(|(to, from)| to.copy_from_slice(from));
}

/// `x += factor * more`, in parallel.
pub(crate) fn add_scaled(factor: f32, more: &[f32], x: &mut [f32]) {
    x.par_chunks_mut(CHUNK)
        .zip(more.par_chunks(CHUNK))
        .for_each(|(x, more)| x.iter_mut().zip(more).for_each(|(x, y)| *x += factor * y));
}

/// Elements handled by one task.
const CHUNK: usize = 1 << 15;
