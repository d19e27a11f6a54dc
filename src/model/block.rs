//! One decoder block: forward, and the backward derived from it by hand.
//!
//! ```text
//! x2  = x  + o_proj(attention(rope(qkv_proj(norm(x)))))
//! out = x2 + down_proj(swiglu(gate_up_proj(norm(x2))))
//! ```
//!
//! All activations are tokens x width, row-major, f32. The forward keeps what the backward reads and nothing else; the
//! normalized inputs and the SwiGLU output are made again, since that costs no matrix product.

use super::config::Config;
use super::kernels::attention::{self, Kept, Pattern};
use super::kernels::rope::{self, Rotations};
use super::kernels::{norm, swiglu};
use super::matmul::{Matrix, MatrixMut, Output, Threads, matmul};
use super::targets::Projection;
use super::tensors::TargetTensors;
use super::weights::{Block, BlockMatrices};

/// What the backward of a block reads, besides its input.
#[derive(Debug, Default)]
pub(crate) struct Saved {
    input_scales: Vec<f32>,
    heads: Vec<f32>,
    attended: Vec<f32>,
    lse: Vec<f32>,
    x2: Vec<f32>,
    x2_scales: Vec<f32>,
    gate_up: Vec<f32>,
}

impl Saved {
    /// Floats kept for each token.
    pub(crate) fn floats_per_token(config: &Config) -> usize {
        let heads = config.heads();
        2 + heads.row()
            + heads.query * (heads.dim + 1)
            + config.hidden_size
            + 2 * config.intermediate_size
    }
}

/// Buffers that hold nothing between two calls.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    narrow: Vec<f32>,
    qkv: Vec<f32>,
    d_heads: Vec<f32>,
    attended: Vec<f32>,
    wide: Vec<f32>,
}

/// Which tokens are computed, and how they see each other.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tokens<'a> {
    pub(crate) pattern: Pattern<'a>,
    /// Each token's place in its own sequence.
    pub(crate) positions: &'a [usize],
    pub(crate) rotations: &'a Rotations,
}

/// What a backward changes.
#[derive(Debug)]
pub(crate) struct Gradients<'a> {
    /// Tokens x hidden: with respect to the block's output on entry, to its input on return.
    pub(crate) d: &'a mut [f32],
    /// With respect to the targets.
    pub(crate) targets: &'a mut TargetTensors,
}

/// How far down a block's backward has to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Below {
    /// There are targets in blocks below: the gradient with respect to the input is needed.
    Targets,
    /// There are none: the backward ends at this block's last target.
    Nothing,
}

/// A block with its f32 matrices at hand.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layer<'a> {
    pub(crate) config: &'a Config,
    pub(crate) block: &'a Block<'a>,
    pub(crate) matrices: &'a BlockMatrices,
}

impl Layer<'_> {
    /// Computes `out` from `x`, both tokens x hidden.
    pub(crate) fn forward(
        self,
        x: &[f32],
        tokens: Tokens<'_>,
        saved: &mut Saved,
        scratch: &mut Scratch,
        out: &mut Vec<f32>,
    ) {
        let Self {
            config,
            block,
            matrices,
        } = self;
        let (n, hidden, inner) = (
            tokens.positions.len(),
            config.hidden_size,
            config.intermediate_size,
        );
        let heads = config.heads();
        let Scratch {
            narrow, qkv, wide, ..
        } = scratch;

        narrow.resize(n * hidden, 0.0);
        saved.input_scales.resize(n, 0.0);
        norm::forward(
            x,
            &block.input_norm,
            config.rms_norm_eps,
            narrow,
            &mut saved.input_scales,
        );
        project(narrow, &matrices.qkv, &block.qkv_bias, hidden, qkv);
        saved.heads.resize(qkv.len(), 0.0);
        rope::forward(
            qkv,
            tokens.positions,
            heads,
            tokens.rotations,
            &mut saved.heads,
        );
        saved.attended.resize(n * heads.query * heads.dim, 0.0);
        saved.lse.resize(n * heads.query, 0.0);
        attention::forward(
            &saved.heads,
            tokens.pattern,
            heads,
            &mut saved.attended,
            &mut saved.lse,
        );
        project_onto(
            x,
            &saved.attended,
            &matrices.output,
            &block.output_bias,
            hidden,
            &mut saved.x2,
        );

        saved.x2_scales.resize(n, 0.0);
        norm::forward(
            &saved.x2,
            &block.post_attention_norm,
            config.rms_norm_eps,
            narrow,
            &mut saved.x2_scales,
        );
        project(
            narrow,
            &matrices.gate_up,
            &block.gate_up_bias,
            hidden,
            &mut saved.gate_up,
        );
        wide.resize(n * inner, 0.0);
        swiglu::forward(&saved.gate_up, wide, inner);
        project_onto(
            &saved.x2,
            wide,
            &matrices.down,
            &block.down_bias,
            hidden,
            out,
        );
    }

    /// Turns `d`, the gradient with respect to the output, into the one with respect to the input `x`, and adds to
    /// `targets` that of this block's. `saved` is used up. Where `below` is [`Below::Nothing`], `d` is left unfinished.
    pub(crate) fn backward(
        self,
        x: &[f32],
        tokens: Tokens<'_>,
        saved: &mut Saved,
        below: Below,
        scratch: &mut Scratch,
        gradients: Gradients<'_>,
    ) {
        let Gradients { d, targets } = gradients;
        use Projection::{Down, Gate, Key, Output, Query, Up, Value};
        let Self {
            config,
            block,
            matrices,
        } = self;
        let (n, hidden, inner) = (
            tokens.positions.len(),
            config.hidden_size,
            config.intermediate_size,
        );
        let heads = config.heads();
        let (query_width, key_width) = (heads.query * heads.dim, heads.key_value * heads.dim);
        let wanted =
            |projections: &[Projection]| projections.iter().any(|&p| block.target(p).is_some());
        let go_on = |projections: &[Projection]| below == Below::Targets || wanted(projections);
        let Scratch {
            narrow,
            qkv,
            d_heads,
            attended,
            wide,
        } = scratch;
        let mut add =
            |projection: Projection, d: Matrix<'_>, input: Matrix<'_>, shape: [usize; 2]| {
                if let Some(target) = block.target(projection) {
                    let out = MatrixMut::new(targets.tensor_mut(target), shape[0], shape[1]);
                    matmul(
                        out,
                        super::matmul::Output::Add,
                        1.0,
                        d.t(),
                        input,
                        Threads::All,
                    );
                }
            };

        wide.resize(n * inner, 0.0);
        if wanted(&[Down]) {
            swiglu::forward(&saved.gate_up, wide, inner);
            add(
                Down,
                Matrix::new(d, n, hidden),
                Matrix::new(wide, n, inner),
                [hidden, inner],
            );
        }
        if !go_on(&[Query, Key, Value, Output, Gate, Up]) {
            return;
        }
        project_back(d, &matrices.down, inner, hidden, wide);
        swiglu::backward(wide, &mut saved.gate_up, inner);
        narrow.resize(n * hidden, 0.0);
        if wanted(&[Gate, Up]) {
            norm::again(
                &saved.x2,
                &block.post_attention_norm,
                &saved.x2_scales,
                narrow,
            );
            for (projection, first) in [(Gate, 0), (Up, inner)] {
                let d = Matrix::strided(&saved.gate_up[first..], n, inner, 2 * inner);
                add(
                    projection,
                    d,
                    Matrix::new(narrow, n, hidden),
                    [inner, hidden],
                );
            }
        }
        if !go_on(&[Query, Key, Value, Output]) {
            return;
        }
        project_back(&saved.gate_up, &matrices.gate_up, hidden, 2 * inner, narrow);
        norm::backward(
            narrow,
            &saved.x2,
            &block.post_attention_norm,
            &saved.x2_scales,
            d,
        );

        add(
            Output,
            Matrix::new(d, n, hidden),
            Matrix::new(&saved.attended, n, query_width),
            [hidden, query_width],
        );
        if !go_on(&[Query, Key, Value]) {
            return;
        }
        attended.resize(n * query_width, 0.0);
        project_back(d, &matrices.output, query_width, hidden, attended);
        let kept = Kept {
            heads_in: &saved.heads,
            attended: &saved.attended,
            lse: &saved.lse,
        };
        d_heads.resize(n * heads.row(), 0.0);
        attention::backward(attended, kept, tokens.pattern, heads, d_heads);
        qkv.resize(n * heads.row(), 0.0);
        rope::backward(d_heads, tokens.positions, heads, tokens.rotations, qkv);
        if wanted(&[Query, Key, Value]) {
            norm::again(x, &block.input_norm, &saved.input_scales, narrow);
            let places = [
                (Query, 0, query_width),
                (Key, query_width, key_width),
                (Value, query_width + key_width, key_width),
            ];
            for (projection, first, width) in places {
                let d = Matrix::strided(&qkv[first..], n, width, heads.row());
                add(
                    projection,
                    d,
                    Matrix::new(narrow, n, hidden),
                    [width, hidden],
                );
            }
        }
        if below == Below::Targets {
            project_back(qkv, &matrices.qkv, hidden, heads.row(), narrow);
            norm::backward(narrow, x, &block.input_norm, &saved.input_scales, d);
        }
    }
}

/// `y = x w^T + bias`, with `x` tokens x inputs, `w` outputs x inputs.
fn project(x: &[f32], w: &[f32], bias: &[f32], inputs: usize, y: &mut Vec<f32>) {
    let (n, outputs) = (x.len() / inputs, w.len() / inputs);
    y.resize(n * outputs, 0.0);
    matmul(
        MatrixMut::new(y, n, outputs),
        Output::Overwrite,
        1.0,
        Matrix::new(x, n, inputs),
        Matrix::new(w, outputs, inputs).t(),
        Threads::All,
    );
    add_bias(y, bias);
}

/// `y = residual + x w^T + bias`, with `residual` tokens x outputs.
fn project_onto(
    residual: &[f32],
    x: &[f32],
    w: &[f32],
    bias: &[f32],
    outputs: usize,
    y: &mut Vec<f32>,
) {
    let n = residual.len() / outputs;
    let inputs = w.len() / outputs;
    y.clear();
    y.extend_from_slice(residual);
    matmul(
        MatrixMut::new(y, n, outputs),
        Output::Add,
        1.0,
        Matrix::new(x, n, inputs),
        Matrix::new(w, outputs, inputs).t(),
        Threads::All,
    );
    add_bias(y, bias);
}

/// `dx = dy w`: the gradient of [`project`] with respect to `x`.
fn project_back(dy: &[f32], w: &[f32], inputs: usize, outputs: usize, dx: &mut [f32]) {
    let n = dy.len() / outputs;
    matmul(
        MatrixMut::new(dx, n, inputs),
        Output::Overwrite,
        1.0,
        Matrix::new(dy, n, outputs),
        Matrix::new(w, outputs, inputs),
        Threads::All,
    );
}

fn add_bias(y: &mut [f32], bias: &[f32]) {
    if !bias.is_empty() {
        for row in y.chunks_exact_mut(bias.len()) {
            row.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
        }
    }
}
