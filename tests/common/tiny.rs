//! A tiny checkpoint and rows that the optimizer's tests run on.

#![expect(
    unreachable_pub,
    reason = "a module of every test file, not an interface"
)]

use panacea_patch::model::{Config, Decoder, EncodedRow, TargetSelection};
use panacea_patch::optimize::Rows;

use super::common::{self, Stored, oracle};

/// The checkpoint.
pub struct Tiny {
    stored: Stored,
    config: Config,
}

impl Tiny {
    pub fn open() -> Self {
        let folder = oracle("llama-tied");
        let text = std::fs::read_to_string(folder.join("config.json")).expect("a config");
        Self {
            stored: Stored::open(&folder.join("model.safetensors")),
            config: Config::parse(&text).expect("a supported config"),
        }
    }

    /// A decoder with the default targets.
    pub fn decoder(&self) -> Decoder<'_> {
        self.decoder_of("q_proj,k_proj,v_proj")
    }

    /// A decoder with the targets that `targets` selects.
    pub fn decoder_of(&self, targets: &str) -> Decoder<'_> {
        let selection: TargetSelection = targets.parse().expect("names");
        Decoder::new(self.config.clone(), self.stored.views(), &selection).expect("a decoder")
    }
}

/// The rows of one of the optimizer's files.
pub fn rows_of(name: &str) -> Vec<EncodedRow> {
    common::rows(&oracle("optimizer").join(name))
}

/// Rows for the adaptive method: the harmful ones again, answered with other tokens, stand for refusals.
pub fn rows() -> Rows {
    let harmful = rows_of("harmful.json");
    let other = |(&token, &predicted): (&u32, &bool)| match predicted {
        true => (token + 31) % 97,
        false => token,
    };
    let refusal = |row: &EncodedRow| EncodedRow {
        tokens: row.tokens.iter().zip(&row.in_loss).map(other).collect(),
        in_loss: row.in_loss.clone(),
    };
    Rows {
        refusals: harmful.iter().map(refusal).collect(),
        harmful,
        task: rows_of("task-likely.json"),
        benign: rows_of("task.json"),
    }
}
