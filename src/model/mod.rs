//! The differentiable decoder.

mod pack;

pub use pack::{EncodedRow, Pack, Prediction};
