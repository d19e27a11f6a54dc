//! A mixture of experts on a device: each token passes the few feed-forward layers that a router picks for it.
//!
//! Tokens are sent to experts on the processor, by the code of [`crate::model::mixture`], from the router's products; the experts
//! are computed on the device, one after the other.

use candle_core::{DType, Result, Tensor};

use super::glu;
use super::linear::{PlacedLinear, Sink, gradients};
use super::place::Device;
use crate::model::config::{Config, Experts};
use crate::model::mixture::Routing;
use crate::model::point::Point;
use crate::model::weights::GatedLinear;

/// down(act(gate(x)) * up(x)) on a device.
#[derive(Debug)]
pub(super) struct PlacedGated {
    pub(super) gate_up: PlacedLinear,
    pub(super) down: PlacedLinear,
}

/// What the backward reads of a mixture's forward.
#[derive(Debug)]
pub(super) struct Kept {
    routing: Routing,
    /// What the first matrices of each expert gave, in the device's precision; `None` where no token went.
    gate_up: Vec<Option<Tensor>>,
}

/// The experts of a block, here and on the device.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mixture<'a> {
    pub(super) config: &'a Config,
    pub(super) settings: Experts,
    pub(super) device: &'a Device,
    /// Experts x hidden, f32.
    pub(super) router: &'a Tensor,
    pub(super) experts: &'a [GatedLinear<'a>],
    pub(super) placed: &'a [PlacedGated],
}

impl Mixture<'_> {
    /// Adds to `out` what the experts make of `y`, both tokens x hidden, f32.
    pub(super) fn forward(self, y: &Tensor, out: Tensor) -> Result<(Tensor, Kept)> {
        let products = y.matmul(&self.router.t()?)?.flatten_all()?;
        let routing = Routing::of_products(self.settings, products.to_vec1()?);
        let mut out = out;
        let mut kept = Vec::with_capacity(self.experts.len());
        for (expert, placed) in self.placed.iter().enumerate() {
            let Some(sent) = self.sent(&routing, expert)? else {
                kept.push(None);
                continue;
            };
            let rows = self.rounded(&y.index_select(&sent.tokens, 0)?)?;
            let gate_up = placed.gate_up.forward(&rows)?;
            let wide = glu::forward(self.config.activation, &gate_up, self.device)?;
            let rows = placed.down.forward(&self.rounded(&wide)?)?;
            let factor = f64::from(self.config.residual_multiplier);
            let rows = rows.broadcast_mul(&sent.weights)?.affine(factor, 0.0)?;
            out = out.index_add(&sent.tokens, &rows, 0)?;
            kept.push(Some(self.rounded(&gate_up)?));
        }
        let kept = Kept {
            routing,
            gate_up: kept,
        };
        Ok((out, kept))
    }

    /// The gradient with respect to `y`, given `d`, that with respect to the output; both tokens x hidden, f32.
    pub(super) fn backward(
        self,
        d: &Tensor,
        y: &Tensor,
        kept: &Kept,
        point: Point<'_>,
        sink: Sink<'_>,
    ) -> Result<Tensor> {
        let routing = &kept.routing;
        let d = d.affine(f64::from(self.config.residual_multiplier), 0.0)?;
        let mut dy = y.zeros_like()?;
        let mut d_weights = Vec::with_capacity(routing.count());
        let experts = self.experts.iter().zip(self.placed).zip(&kept.gate_up);
        for (expert, ((gated, placed), gate_up)) in experts.enumerate() {
            let (Some(sent), Some(gate_up)) = (self.sent(routing, expert)?, gate_up) else {
                continue;
            };
            let gate_up = gate_up.to_dtype(DType::F32)?;
            let d_rows = d.index_select(&sent.tokens, 0)?;
            let d_wide = placed.down.backward(&self.rounded(&d_rows)?)?;
            let wide = glu::forward(self.config.activation, &gate_up, self.device)?;
            // With d_e the gradient of the expert's output before its weight, the weight's own is d_e W_down . glu.
            let of_weights: Vec<f32> = (&d_wide * &wide)?.sum(1)?.to_vec1()?;
            d_weights.extend(of_weights);
            if gated.down.has_targets() {
                let d_rows = self.rounded(&d_rows.broadcast_mul(&sent.weights)?)?;
                let wide = self.rounded(&wide)?;
                gradients(&gated.down, &d_rows, &wide, point, self.device, sink)?;
            }
            let d_wide = d_wide.broadcast_mul(&sent.weights)?;
            let d_gate_up = glu::backward(self.config.activation, &d_wide, &gate_up, self.device)?;
            let d_gate_up = self.rounded(&d_gate_up)?;
            if gated.gate_up.has_targets() {
                let rows = self.rounded(&y.index_select(&sent.tokens, 0)?)?;
                gradients(&gated.gate_up, &d_gate_up, &rows, point, self.device, sink)?;
            }
            let rows = placed.gate_up.backward(&d_gate_up)?;
            dy = dy.index_add(&sent.tokens, &rows, 0)?;
        }
        let d_router = routing.router_gradient(self.settings, &d_weights);
        let shape = [y.dim(0)?, self.settings.count];
        dy + self.device.upload(&d_router, &shape)?.matmul(self.router)?
    }

    /// The tokens of an expert with their weights, if it has any.
    fn sent(self, routing: &Routing, expert: usize) -> Result<Option<Sent>> {
        let (tokens, weights) = routing.of_expert(expert);
        if tokens.is_empty() {
            return Ok(None);
        }
        let weights = self.device.upload(&weights, &[tokens.len(), 1])?;
        let tokens = Tensor::from_vec(tokens, weights.dim(0)?, &self.device.handle)?;
        Ok(Some(Sent { tokens, weights }))
    }

    fn rounded(self, x: &Tensor) -> Result<Tensor> {
        x.to_dtype(self.device.precision().dtype())
    }
}

/// Where an expert's rows come from and go to.
struct Sent {
    /// Numbers of tokens.
    tokens: Tensor,
    /// Tokens x 1.
    weights: Tensor,
}
