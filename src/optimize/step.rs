//! What one step measured, as it is reported and stored.

use serde::{Deserialize, Serialize};

/// Which kind of step it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// A step of the paper's outer loop.
    Outer,
    /// Away from compliance, towards refusals.
    Contrast,
    /// Back towards the task, without undoing the contrast.
    Repair,
}

/// Losses before the step, in nats per predicted token, and the step's own numbers. What a method does not measure is absent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StepRecord {
    /// From 0 on.
    pub step: usize,
    /// Which kind.
    pub phase: Phase,
    /// Task loss g(w) on the step's batch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub g: Option<f64>,
    /// Harmful loss h(w) on the step's batch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub h: Option<f64>,
    /// Harmful loss h(w + eps) on the step's batch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub h_eps: Option<f64>,
    /// Refusal loss r(w) on the step's batch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub r: Option<f64>,
    /// Mean KL divergence from w0 on the step's batch of benign rows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kl: Option<f64>,
    /// Norm of the gradient of h.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grad_h: Option<f64>,
    /// The factor that clipping applied to the update.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip: Option<f64>,
    /// Length of the step before it was put back onto the ball.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub length: Option<f64>,
    /// Norm of w - w0 after the step.
    pub norm: f64,
    /// Share of held-back requests that would be refused, after the step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refusing: Option<f64>,
}

impl StepRecord {
    /// A record with nothing measured yet.
    pub(super) fn new(step: usize, phase: Phase) -> Self {
        Self {
            step,
            phase,
            g: None,
            h: None,
            h_eps: None,
            r: None,
            kl: None,
            grad_h: None,
            clip: None,
            length: None,
            norm: 0.0,
            refusing: None,
        }
    }
}
