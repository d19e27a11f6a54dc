//! The tiny checkpoints of `testdata/oracle`, and what can be perturbed in them.

#![expect(
    unreachable_pub,
    reason = "a module of every test file, not an interface"
)]

use std::path::PathBuf;

use super::common::oracle;

/// Every projection matrix of every family.
pub const ALL: &str =
    "q_proj,k_proj,v_proj,qkv_proj,o_proj,gate_proj,up_proj,gate_up_proj,down_proj,w1,w2,w3";

/// The folders of those that PyTorch's numbers are there for, in order.
pub fn cases() -> Vec<PathBuf> {
    let mut cases: Vec<PathBuf> = std::fs::read_dir(oracle(""))
        .expect("the oracle's folder")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.join("expected.safetensors").exists())
        .collect();
    cases.sort();
    assert!(cases.len() >= 21, "found only {cases:?}");
    cases
}
