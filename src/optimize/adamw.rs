//! AdamW, as `torch.optim.AdamW(lr, betas=(0.9, 0.999), eps=1e-8, weight_decay)`: the decay is decoupled, w *= 1 - lr * decay
//! before the step.
//!
//! Source: Loshchilov and Hutter, arXiv:1711.05101, algorithm 2.

use super::engine::factor;
use crate::model::TargetTensors;

const BETA1: f64 = 0.9;
const BETA2: f64 = 0.999;
const EPSILON: f64 = 1e-8;

/// First and second moments of the gradient.
#[derive(Clone, Debug)]
pub(super) struct AdamW {
    pub(super) m: TargetTensors,
    pub(super) v: TargetTensors,
}

/// How far a step goes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rates {
    /// Learning rate.
    pub(super) lr: f64,
    /// The share of w, times the learning rate, that is taken off.
    pub(super) weight_decay: f64,
}

impl AdamW {
    /// Moments of zero in the shape of `like`.
    pub(super) fn new(like: &TargetTensors) -> Self {
        Self {
            m: like.zeros_like(),
            v: like.zeros_like(),
        }
    }

    /// Shrinks `w`, and moves it against `gradient`; `step` counts from 1. `gradient` becomes the update that was subtracted.
    pub(super) fn step(
        &mut self,
        w: &mut TargetTensors,
        gradient: &mut TargetTensors,
        rates: Rates,
        step: i32,
    ) {
        let Rates { lr, weight_decay } = rates;
        if weight_decay != 0.0 {
            w.scale(factor(1.0 - lr * weight_decay));
        }
        let (beta1, beta2) = (factor(BETA1), factor(BETA2));
        self.m
            .zip_mut(gradient, |m, g| *m += (1.0 - beta1) * (g - *m));
        self.v
            .zip_mut(gradient, |v, g| *v = *v * beta2 + (1.0 - beta2) * g * g);
        let step_size = factor(lr / (1.0 - BETA1.powi(step)));
        let root_correction = factor((1.0 - BETA2.powi(step)).sqrt());
        let epsilon = factor(EPSILON);
        gradient.copy_from(&self.v);
        gradient.zip_mut(&self.m, |v, m| {
            *v = step_size * m / (v.sqrt() / root_correction + epsilon)
        });
        w.add_scaled(-1.0, gradient);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against the definition in f64.
    #[test]
    fn three_steps_follow_the_definition() {
        for weight_decay in [0.0, 0.1] {
            follow_the_definition(weight_decay);
        }
    }

    fn follow_the_definition(weight_decay: f64) {
        let mut w = TargetTensors::new(vec![vec![1.0, -2.0]]);
        let mut adam = AdamW::new(&w);
        let (mut want, mut m, mut v) = ([1.0f64, -2.0], [0.0f64; 2], [0.0f64; 2]);
        for (step, gradient) in [(1, [0.5f32, -0.1]), (2, [-0.25, 0.0]), (3, [1.0, 3.0])] {
            adam.step(
                &mut w,
                &mut TargetTensors::new(vec![gradient.to_vec()]),
                Rates {
                    lr: 0.01,
                    weight_decay,
                },
                step,
            );
            for i in 0..2 {
                let g = f64::from(gradient[i]);
                m[i] = 0.9 * m[i] + 0.1 * g;
                v[i] = 0.999 * v[i] + 0.001 * g * g;
                let (m, v) = (
                    m[i] / (1.0 - 0.9f64.powi(step)),
                    v[i] / (1.0 - 0.999f64.powi(step)),
                );
                want[i] *= 1.0 - 0.01 * weight_decay;
                want[i] -= 0.01 * m / (v.sqrt() + 1e-8);
            }
            for (found, want) in w.tensor(0).iter().zip(want) {
                assert!(
                    (f64::from(*found) - want).abs() < 1e-6,
                    "step {step}: {found} for {want}"
                );
            }
        }
    }
}
