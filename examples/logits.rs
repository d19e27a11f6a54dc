//! The logits that this program computes from a checkpoint directory: for comparing it with other implementations.
//!
//!     cargo run --release --example logits -- DIR ROWS.json OUT.safetensors
//!
//! ROWS.json: `{"rows": [{"tokens": [..], "in_loss": [..]}, ..]}`. OUT.safetensors: one F32 tensor `logits`, predicted positions x
//! vocabulary: for each marked token but a row's first, those of the position before it.

use std::error::Error;
use std::path::Path;

use panacea_formats::{Checkpoint, OutputFile, Overwrite, StoredFloats, write_tensors};
use panacea_patch::model::{Config, Decoder, EncodedRow, Pack, TargetSelection};
use serde::Deserialize;

#[derive(Deserialize)]
struct Rows {
    rows: Vec<Row>,
}

#[derive(Deserialize)]
struct Row {
    tokens: Vec<u32>,
    in_loss: Vec<bool>,
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [directory, rows, out] = arguments.as_slice() else {
        return Err("usage: logits DIR ROWS.json OUT.safetensors".into());
    };
    let checkpoint = Checkpoint::open(Path::new(directory))?;
    let config = Path::new(directory).join("config.json");
    let config = Config::parse(&std::fs::read_to_string(config)?)?;
    let vocabulary = config.vocab_size;
    let rows: Rows = serde_json::from_str(&std::fs::read_to_string(rows)?)?;
    let rows: Vec<EncodedRow> = rows
        .rows
        .into_iter()
        .map(|row| EncodedRow {
            tokens: row.tokens,
            in_loss: row.in_loss,
        })
        .collect();
    let mut decoder = Decoder::new(config, checkpoint.tensors(), &TargetSelection::default())?;
    let values = decoder.target_values()?;
    let logits = decoder.logits(&values, &Pack::of(&rows))?;

    let name = "logits".to_owned();
    let tensor = StoredFloats {
        shape: vec![logits.len() / vocabulary, vocabulary],
        values: &logits,
    };
    let mut output = OutputFile::create(Path::new(out), Overwrite::Replace, &[])?;
    let tensors = std::iter::once((&name, &tensor));
    write_tensors(("format", "pt"), tensors, |bytes| output.write_all(bytes))?;
    // A file that it replaces and that cannot be deleted is only litter.
    let _ = output.commit()?;
    Ok(())
}
