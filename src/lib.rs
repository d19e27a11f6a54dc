//! Restores the safety of a fine-tuned language model with a small optimized perturbation of its weights.

pub mod apply;
pub mod data;
pub mod manifest;
pub mod model;
pub mod optimize;
pub mod resume;
