//! A second opinion on the decoder's hand-written gradients: candle's autograd.
//!
//! In: two checkpoints of `testdata/oracle`, read by candle. Out: agreement of the loss and of the gradients of all seven projection
//! matrices. `tests/oracle.rs` holds the same gradients against numbers that PyTorch wrote down once; here a forward of a
//! screen's length is written out in Rust, and its gradients are derived by machine on every run, so whoever doubts a derivative can
//! read what it is the derivative of. Candle sees each row alone, the decoder sees them packed: packing must change nothing.
//!
//! Only ops that candle can differentiate are used. Its fused ones (`softmax_last_dim`, `rms_norm`, `rope`) pass no gradient on, and
//! say nothing; should one slip in, the gradient of a matrix before it is missing or wrong, and the test fails.

#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    reason = "sizes of a tiny model"
)]

use std::collections::HashMap;
use std::f64::consts::TAU;
use std::path::Path;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::ops::{log_softmax, rms_norm_slow, softmax};
use candle_nn::rotary_emb::rope_slow;
use panacea_patch::model::{Config, Decoder, EncodedRow, Pack, TargetSelection};
use serde_json::Value;

#[expect(dead_code, reason = "expected values are computed here, not read")]
mod common;
use common::{Stored, oracle, relative_error};

/// Every projection matrix.
const ALL: &str = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj";

/// Largest relative error allowed, for the loss and for each gradient in the Euclidean norm: both sides are f32, and add in
/// different orders.
const TOLERANCE: f64 = 1e-4;

#[test]
fn gradients_agree_with_autograd_where_rope_is_scaled_and_heads_share_keys() -> Result<()> {
    agrees("llama3-rope")
}

#[test]
fn gradients_agree_with_autograd_where_the_head_is_tied_to_the_embedding() -> Result<()> {
    agrees("llama-tied")
}

fn agrees(case: &str) -> Result<()> {
    let case = oracle(case);
    let rows = common::rows(&case.join("rows.json"));

    let llama = Llama::open(&case)?;
    let row_losses: Result<Vec<Tensor>> = rows.iter().map(|row| llama.loss(row)).collect();
    let wanted_loss = Tensor::stack(&row_losses?, 0)?.sum_all()?;
    let wanted = wanted_loss.backward()?;

    let stored = Stored::open(&case.join("model.safetensors"));
    let config = std::fs::read_to_string(case.join("config.json")).expect("a config");
    let config = Config::parse(&config).expect("a supported config");
    let all: TargetSelection = ALL.parse().expect("names");
    let mut decoder = Decoder::new(config, stored.views(), &all).expect("a decoder");
    let values = decoder.target_values().expect("finite weights");
    let mut found = values.zeros_like();
    let found_loss = decoder.loss_and_gradient(&values, &Pack::of(&rows), &mut found);
    let found_loss = found_loss.expect("a loss").sum;

    let wanted_loss = f64::from(wanted_loss.to_scalar::<f32>()?);
    assert!(
        (found_loss / wanted_loss - 1.0).abs() < TOLERANCE,
        "the loss is {found_loss}, candle's {wanted_loss}"
    );
    assert_eq!(decoder.targets().len(), llama.projections.len());
    for (target, found) in decoder.targets().iter().zip(found.iter()) {
        let projection = &llama.projections[&target.name];
        let wanted = wanted.get(projection).expect("an unbroken graph");
        let error = relative_error(found, &wanted.flatten_all()?.to_vec1()?);
        assert!(error < TOLERANCE, "`{}`: off by {error:e}", target.name);
    }
    Ok(())
}

/// The architecture as its papers state it, one row at a time, with nothing cached or fused.
struct Llama {
    config: Value,
    /// Embedding, norms and, unless it is tied, the head: constants.
    frozen: HashMap<String, Tensor>,
    /// What gradients are wanted of.
    projections: HashMap<String, Var>,
}

impl Llama {
    fn open(case: &Path) -> Result<Self> {
        let weights = candle_core::safetensors::load(case.join("model.safetensors"), &Device::Cpu)?;
        let (projections, frozen): (HashMap<_, _>, _) = weights
            .into_iter()
            .partition(|(name, _)| name.ends_with("_proj.weight"));
        let variable = |(name, weight)| Ok((name, Var::from_tensor(&weight)?));
        let projections: Result<_> = projections.into_iter().map(variable).collect();
        Ok(Self {
            config: common::json(&case.join("config.json")),
            frozen,
            projections: projections?,
        })
    }

    /// The sum over a row's marked tokens of the cross-entropy in nats.
    fn loss(&self, row: &EncodedRow) -> Result<Tensor> {
        let tokens = Tensor::new(row.tokens.as_slice(), &Device::Cpu)?;
        let embedding = &self.frozen["model.embed_tokens.weight"];
        let mut hidden = embedding.index_select(&tokens, 0)?;
        for layer in 0..self.size("num_hidden_layers") {
            let name = |part: &str| format!("model.layers.{layer}.{part}");
            let normed = self.norm(&hidden, &name("input_layernorm"))?;
            hidden = (&hidden + self.attention(&normed, &name("self_attn"))?)?;
            let normed = self.norm(&hidden, &name("post_attention_layernorm"))?;
            let gate = self.project(&normed, &name("mlp.gate_proj"))?.silu()?;
            let up = self.project(&normed, &name("mlp.up_proj"))?;
            hidden = (&hidden + self.project(&(gate * up)?, &name("mlp.down_proj"))?)?;
        }
        let head = self.frozen.get("lm_head.weight").unwrap_or(embedding);
        let logits = self.norm(&hidden, "model.norm")?.matmul(&head.t()?)?;

        // The logits at one position predict the token at the next.
        let last = row.tokens.len() - 1;
        let next = tokens.narrow(0, 1, last)?.unsqueeze(1)?;
        let log_p = log_softmax(&logits.narrow(0, 0, last)?, 1)?.gather(&next, 1)?;
        let marks = row.in_loss[1..].iter().map(|&marked| f32::from(marked));
        let marks = Tensor::from_iter(marks, &Device::Cpu)?.unsqueeze(1)?;
        (log_p * marks)?.sum_all()?.neg()
    }

    fn attention(&self, normed: &Tensor, name: &str) -> Result<Tensor> {
        let length = normed.dim(0)?;
        let (heads, width) = (self.size("num_attention_heads"), self.size("head_dim"));
        let shared = self.size("num_key_value_heads");
        // (length, n * width) -> (1, n, length, width)
        let split = |part: &str, n: usize| {
            self.project(normed, &format!("{name}.{part}"))?
                .reshape((1, length, n, width))?
                .transpose(1, 2)?
                .contiguous()
        };
        let (cos, sin) = self.turns(length, width)?;
        let queries = rope_slow(&split("q_proj", heads)?, &cos, &sin)?;
        let keys = rope_slow(&split("k_proj", shared)?, &cos, &sin)?;
        // Neighboring query heads share a key and a value head.
        let repeated = |x: Tensor| {
            x.unsqueeze(2)?
                .broadcast_as((1, shared, heads / shared, length, width))?
                .reshape((1, heads, length, width))
        };
        let (keys, values) = (repeated(keys)?, repeated(split("v_proj", shared)?)?);
        let scores = queries.matmul(&keys.transpose(2, 3)?.contiguous()?)?;
        // ln 0 hides what comes later, ln 1 = 0 leaves the rest as it is.
        let causal = Tensor::tril2(length, DType::F32, &Device::Cpu)?.log()?;
        let scores = (scores / (width as f64).sqrt())?.broadcast_add(&causal)?;
        let weights = softmax(&scores, 3)?;
        let mixed = weights.matmul(&values)?.transpose(1, 2)?;
        let mixed = mixed.reshape((length, heads * width))?;
        self.project(&mixed, &format!("{name}.o_proj"))
    }

    /// Cosines and sines of each position and pair: (length, width / 2) each. Llama 3's scaling keeps waves that fit often into the
    /// context trained on, slows those that hardly do, and goes linearly in turns per context between.
    fn turns(&self, length: usize, width: usize) -> Result<(Tensor, Tensor)> {
        let rope = &self.config["rope_parameters"];
        let number = |key: &str| rope[key].as_f64().expect(key);
        let frequencies = (0..width).step_by(2).map(|i| {
            let plain = number("rope_theta").powf(-(i as f64) / width as f64);
            if rope["rope_type"] == "default" {
                return plain;
            }
            assert_eq!(rope["rope_type"], "llama3");
            let (low, high) = (number("low_freq_factor"), number("high_freq_factor"));
            let turns = number("original_max_position_embeddings") * plain / TAU;
            let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
            plain * (kept + (1.0 - kept) / number("factor"))
        });
        let frequencies: Vec<f64> = frequencies.collect();
        let angles = (0..length).flat_map(|at| frequencies.iter().map(move |f| at as f64 * f));
        let angles = Tensor::from_iter(angles, &Device::Cpu)?.reshape((length, width / 2))?;
        let narrow = |x: Tensor| x.to_dtype(DType::F32);
        Ok((narrow(angles.cos()?)?, narrow(angles.sin()?)?))
    }

    fn norm(&self, x: &Tensor, name: &str) -> Result<Tensor> {
        let eps = self.config["rms_norm_eps"].as_f64().expect("a number");
        rms_norm_slow(x, &self.frozen[&format!("{name}.weight")], eps as f32)
    }

    fn project(&self, x: &Tensor, name: &str) -> Result<Tensor> {
        x.matmul(&self.projections[&format!("{name}.weight")].t()?)
    }

    fn size(&self, key: &str) -> usize {
        self.config[key].as_u64().expect(key) as usize
    }
}
