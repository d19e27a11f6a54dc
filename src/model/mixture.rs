//! A mixture of experts: each token passes the few feed-forward layers that a router picks for it.
//!
//! ```text
//! p   = softmax(router y)                     one probability for each expert
//! out = x + sum over the chosen e of weight_e expert_e(y)      weight: p, scaled to a sum of 1 or not
//! ```
//!
//! Experts are loaded and computed one after the other, so memory holds one of them as an operand, and every sum runs in their order.
//! The router is frozen, but the gradient passes through it: the weights depend on y.
//!
//! Source: Shazeer et al., "Outrageously Large Neural Networks", arXiv:1701.06538; Jiang et al., "Mixtral of Experts",
//! arXiv:2401.04088.

use panacea_formats::TensorView;

use super::config::{Config, Experts};
use super::kernels::{dot, glu, simd};
use super::linear::{Gradients, Products};
use super::matmul::{Matrix, MatrixMut, Output, Threads, matmul};
use super::point::Point;
use super::stream::stream_matrix;
use super::weights::{BlockMatrices, GatedLinear};

/// Which tokens went where, kept for the backward.
#[derive(Debug, Default)]
pub(crate) struct Routing {
    /// Tokens x experts.
    probabilities: Vec<f32>,
    /// Expert after expert, the tokens that it gets, ascending.
    assigned: Vec<Assignment>,
    /// Where each expert's begin in `assigned`, and, last, where the last one's end.
    starts: Vec<usize>,
}

#[derive(Clone, Copy, Debug)]
struct Assignment {
    token: usize,
    weight: f32,
}

/// Buffers that hold nothing between two calls.
#[derive(Debug, Default)]
pub(crate) struct Mixture {
    rows: Vec<f32>,
    wide: Vec<f32>,
    d_wide: Vec<f32>,
    out_rows: Vec<f32>,
    d_weights: Vec<f32>,
    gate_up: Vec<f32>,
}

impl Mixture {
    /// Adds to `out` what the experts make of `y`, both tokens x hidden. `gate_up` keeps, assignment after assignment, what their first
    /// matrices gave.
    #[expect(
        clippy::too_many_arguments,
        reason = "inputs, what is kept, and the output"
    )]
    pub(crate) fn forward(
        &mut self,
        config: &Config,
        experts: &[GatedLinear<'_>],
        point: Point<'_>,
        matrices: &mut BlockMatrices,
        y: &[f32],
        routing: &mut Routing,
        gate_up: &mut Vec<f32>,
        out: &mut [f32],
    ) {
        let Some(settings) = config.experts else {
            return;
        };
        let hidden = config.hidden_size;
        routing.choose(settings, y, &matrices.router, hidden);
        gate_up.clear();
        for (expert, gated) in experts.iter().enumerate() {
            let assigned = &routing.assigned[routing.range(expert)];
            if assigned.is_empty() {
                continue;
            }
            matrices.load_gated(gated, point, Products::Forward);
            gather(y, hidden, assigned, &mut self.rows);
            gated
                .gate_up
                .forward(&self.rows, &matrices.gate_up, &mut self.gate_up);
            let width = gated.down.inputs;
            self.wide.resize(assigned.len() * width, 0.0);
            glu::forward(config.activation, &self.gate_up, &mut self.wide, width);
            gate_up.extend_from_slice(&self.gate_up);
            gated
                .down
                .forward(&self.wide, &matrices.down, &mut self.out_rows);
            for (assignment, row) in assigned.iter().zip(self.out_rows.chunks_exact(hidden)) {
                let factor = config.residual_multiplier * assignment.weight;
                add_scaled(&mut out[assignment.token * hidden..][..hidden], factor, row);
            }
        }
    }

    /// As [`Self::forward`] for a few tokens: matrices are read where they are stored, and nothing is kept but the `routing`.
    pub(crate) fn stream(
        &mut self,
        config: &Config,
        (router, experts): (&TensorView<'_>, &[GatedLinear<'_>]),
        point: Point<'_>,
        y: &[f32],
        routing: &mut Routing,
        out: &mut [f32],
    ) {
        let Some(settings) = config.experts else {
            return;
        };
        let hidden = config.hidden_size;
        stream_matrix(y, router, hidden, |x| x, &mut routing.probabilities);
        routing.assign(settings);
        for (expert, gated) in experts.iter().enumerate() {
            let assigned = &routing.assigned[routing.range(expert)];
            if assigned.is_empty() {
                continue;
            }
            gather(y, hidden, assigned, &mut self.rows);
            gated.stream(config, &self.rows, point, &mut self.gate_up, &mut self.wide);
            gated.down.stream(&self.wide, point, &mut self.out_rows);
            for (assignment, row) in assigned.iter().zip(self.out_rows.chunks_exact(hidden)) {
                let factor = config.residual_multiplier * assignment.weight;
                add_scaled(&mut out[assignment.token * hidden..][..hidden], factor, row);
            }
        }
    }

    /// Overwrites `y` with the gradient with respect to it, given `d`, that with respect to the output; `gate_up` is used up.
    #[expect(
        clippy::too_many_arguments,
        reason = "inputs, what was kept, and the gradients"
    )]
    pub(crate) fn backward(
        &mut self,
        config: &Config,
        experts: &[GatedLinear<'_>],
        matrices: &mut BlockMatrices,
        d: &[f32],
        routing: &Routing,
        gate_up: &mut [f32],
        y: &mut [f32],
        gradients: &mut Gradients<'_>,
    ) {
        let Some(settings) = config.experts else {
            return;
        };
        let (hidden, scale) = (config.hidden_size, config.residual_multiplier);
        let mut dy = vec![0.0; y.len()];
        self.d_weights.clear();
        self.d_weights.resize(routing.assigned.len(), 0.0);
        let mut rest = gate_up;
        for (expert, gated) in experts.iter().enumerate() {
            let range = routing.range(expert);
            let assigned = &routing.assigned[range.clone()];
            let GatedLinear { gate_up, down } = gated;
            let width = down.inputs;
            let (kept, behind) = rest.split_at_mut(assigned.len() * 2 * width);
            rest = behind;
            if assigned.is_empty() {
                continue;
            }
            matrices.load_gated(gated, gradients.point, Products::Backward);
            self.wide.resize(assigned.len() * width, 0.0);
            glu::forward(config.activation, kept, &mut self.wide, width);
            gather(d, hidden, assigned, &mut self.out_rows);
            // With d_e the gradient of the expert's output before its weight, the weight's own is d_e W_down . glu: no product more.
            down.backward(&self.out_rows, &matrices.down, scale, &mut self.d_wide);
            let rows = self.d_wide.chunks_exact_mut(width);
            for (((d_wide, wide), assignment), d_weight) in rows
                .zip(self.wide.chunks_exact(width))
                .zip(assigned)
                .zip(&mut self.d_weights[range])
            {
                *d_weight = simd(
                    #[inline(always)]
                    || dot(d_wide, wide),
                );
                d_wide.iter_mut().for_each(|d| *d *= assignment.weight);
            }
            if down.has_targets() {
                let rows = self.out_rows.chunks_exact_mut(hidden);
                for (row, assignment) in rows.zip(assigned) {
                    row.iter_mut().for_each(|d| *d *= assignment.weight);
                }
                down.add_gradients(&self.out_rows, &self.wide, scale, gradients);
            }
            glu::backward(config.activation, &self.d_wide, kept, width);
            if gate_up.has_targets() {
                gather(y, hidden, assigned, &mut self.rows);
                gate_up.add_gradients(kept, &self.rows, 1.0, gradients);
            }
            gate_up.backward(kept, &matrices.gate_up, 1.0, &mut self.rows);
            for (assignment, row) in assigned.iter().zip(self.rows.chunks_exact(hidden)) {
                add_scaled(&mut dy[assignment.token * hidden..][..hidden], 1.0, row);
            }
        }
        let d_router = routing.router_gradient(settings, &self.d_weights);
        let n = y.len() / hidden;
        matmul(
            MatrixMut::new(&mut dy, n, hidden),
            Output::Add,
            1.0,
            Matrix::new(&d_router, n, settings.count),
            Matrix::new(&matrices.router, settings.count, hidden),
            Threads::All,
        );
        y.copy_from_slice(&dy);
    }
}

impl Routing {
    /// Where the router's `products` (tokens x experts) send each token.
    pub(crate) fn of_products(settings: Experts, products: Vec<f32>) -> Self {
        let mut routing = Self {
            probabilities: products,
            ..Self::default()
        };
        routing.assign(settings);
        routing
    }

    /// How often a token was sent to an expert.
    pub(crate) fn count(&self) -> usize {
        self.assigned.len()
    }

    /// The tokens that `expert` gets, ascending, and their weights.
    pub(crate) fn of_expert(&self, expert: usize) -> (Vec<u32>, Vec<f32>) {
        let assigned = self.assigned[self.range(expert)].iter();
        #[expect(
            clippy::cast_possible_truncation,
            reason = "a pack has far fewer tokens than 2^32"
        )]
        assigned.map(|it| (it.token as u32, it.weight)).unzip()
    }

    /// Sends each row of `y` to its most probable experts; of equally probable ones, to the first.
    fn choose(&mut self, settings: Experts, y: &[f32], router: &[f32], hidden: usize) {
        let (n, count) = (y.len() / hidden, settings.count);
        self.probabilities.resize(n * count, 0.0);
        matmul(
            MatrixMut::new(&mut self.probabilities, n, count),
            Output::Overwrite,
            1.0,
            Matrix::new(y, n, hidden),
            Matrix::new(router, count, hidden).t(),
            Threads::All,
        );
        self.assign(settings);
    }

    /// Turns what the router gave, in `probabilities`, into what it stands for, and sends each token to its experts.
    fn assign(&mut self, settings: Experts) {
        let count = settings.count;
        let mut of_expert: Vec<Vec<Assignment>> = vec![Vec::new(); count];
        let mut order: Vec<usize> = Vec::with_capacity(count);
        for (token, p) in self.probabilities.chunks_exact_mut(count).enumerate() {
            softmax(p);
            order.clear();
            order.extend(0..count);
            order.sort_by(|&a, &b| p[b].total_cmp(&p[a]));
            let chosen = &order[..settings.per_token];
            let share = match settings.normalized {
                true => 1.0 / chosen.iter().map(|&expert| p[expert]).sum::<f32>(),
                false => 1.0,
            };
            for &expert in chosen {
                of_expert[expert].push(Assignment {
                    token,
                    weight: p[expert] * share,
                });
            }
        }
        self.assigned.clear();
        self.starts.clear();
        for assigned in of_expert {
            self.starts.push(self.assigned.len());
            self.assigned.extend(assigned);
        }
        self.starts.push(self.assigned.len());
    }

    /// The places of an expert's tokens in `assigned`.
    fn range(&self, expert: usize) -> std::ops::Range<usize> {
        self.starts[expert]..self.starts[expert + 1]
    }

    /// The gradient with respect to what the router gave before its softmax, tokens x experts, given that with respect to the weights.
    ///
    /// Of weights p_e / s with s the sum over the chosen: dp_e = (dw_e - sum of dw_i w_i) / s. Of the softmax: p (dp - sum of dp p).
    pub(crate) fn router_gradient(&self, settings: Experts, d_weights: &[f32]) -> Vec<f32> {
        let count = settings.count;
        let n = self.probabilities.len() / count;
        let mut d = vec![0.0; n * count];
        // For each token: sum of dw w, and of the chosen's p.
        let mut sums = vec![(0.0f32, 0.0f32); n];
        let each = |work: &mut dyn FnMut(usize, &Assignment, f32)| {
            for expert in 0..count {
                let range = self.range(expert);
                for (assignment, &dw) in self.assigned[range.clone()].iter().zip(&d_weights[range])
                {
                    work(expert, assignment, dw);
                }
            }
        };
        each(&mut |expert, assignment, dw| {
            let (drift, chosen) = &mut sums[assignment.token];
            *drift += dw * assignment.weight;
            *chosen += self.probabilities[assignment.token * count + expert];
        });
        each(&mut |expert, assignment, dw| {
            let (drift, chosen) = sums[assignment.token];
            d[assignment.token * count + expert] = match settings.normalized {
                true => (dw - drift) / chosen,
                false => dw,
            };
        });
        for (d, p) in d
            .chunks_exact_mut(count)
            .zip(self.probabilities.chunks_exact(count))
        {
            let drift: f32 = d.iter().zip(p).map(|(d, p)| d * p).sum();
            for (d, p) in d.iter_mut().zip(p) {
                *d = p * (*d - drift);
            }
        }
        d
    }
}

/// The rows of `x` that are `assigned`, one after the other.
fn gather(x: &[f32], width: usize, assigned: &[Assignment], rows: &mut Vec<f32>) {
    rows.clear();
    for assignment in assigned {
        let at = assignment.token * width;
        rows.extend_from_slice(&x[at..at + width]);
    }
}

fn add_scaled(x: &mut [f32], factor: f32, more: &[f32]) {
    x.iter_mut().zip(more).for_each(|(x, y)| *x += factor * y);
}

/// By the standard library's exponential: a row has one element for each expert.
fn softmax(row: &mut [f32]) {
    let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    row.iter_mut().for_each(|x| *x = (*x - top).exp());
    let share = 1.0 / row.iter().sum::<f32>();
    row.iter_mut().for_each(|x| *x *= share);
}
