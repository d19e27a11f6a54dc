//! What this program makes of tokenizers: for comparing it with llama.cpp, by tests/interop/tokenizer.py.
//!
//!     cargo run --release --example tokenizer -- ids FILE.gguf < TEXTS.jsonl
//!     cargo run --release --example tokenizer -- files FILE.gguf DIR
//!     cargo run --release --example tokenizer -- metadata DIR ARCHITECTURE
//!
//! `ids`: for each line of the input, a JSON string, its ids as a JSON array. `files`: writes the tokenizer's files into DIR. `metadata`: the keys
//! that a GGUF of the directory gets, as a JSON array of `[key, type, value]`; of an array, `type` is `[type of elements]`.

use std::error::Error;
use std::io::{self, BufRead, Write};
use std::path::Path;

use panacea_formats::gguf::{Array, GgufFile, Metadata, Value};
use panacea_patch::convert::tokenizer::{
    TokenizerFolder, TokenizerOptions, from_metadata, to_metadata,
};
use serde_json::json;
use tokenizers::Tokenizer;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["ids", file] => ids(Path::new(file)),
        ["files", file, directory] => files(Path::new(file), Path::new(directory)),
        ["metadata", directory, architecture] => metadata(Path::new(directory), architecture),
        _ => Err(
            "usage: tokenizer ids FILE.gguf | files FILE.gguf DIR | metadata DIR ARCHITECTURE"
                .into(),
        ),
    }
}

fn ids(file: &Path) -> Result<(), Box<dyn Error>> {
    let file = GgufFile::open(file)?;
    let texts = from_metadata(file.metadata())?;
    let tokenizer =
        Tokenizer::from_bytes(texts.tokenizer.as_bytes()).map_err(|it| it.to_string())?;
    let mut out = io::BufWriter::new(io::stdout().lock());
    for line in io::stdin().lock().lines() {
        let text: String = serde_json::from_str(&line?)?;
        let encoding = tokenizer
            .encode_fast(text, false)
            .map_err(|it| it.to_string())?;
        writeln!(out, "{}", json!(encoding.get_ids()))?;
    }
    Ok(out.flush()?)
}

fn files(file: &Path, directory: &Path) -> Result<(), Box<dyn Error>> {
    let file = GgufFile::open(file)?;
    let texts = from_metadata(file.metadata())?;
    std::fs::create_dir_all(directory)?;
    std::fs::write(directory.join("tokenizer.json"), texts.tokenizer)?;
    let config = serde_json::to_string_pretty(&texts.tokenizer_config)?;
    std::fs::write(directory.join("tokenizer_config.json"), config)?;
    if let Some(template) = texts.chat_template {
        std::fs::write(directory.join("chat_template.jinja"), template)?;
    }
    Ok(())
}

fn metadata(directory: &Path, architecture: &str) -> Result<(), Box<dyn Error>> {
    let config = std::fs::read(directory.join("config.json"))?;
    let config: serde_json::Value = serde_json::from_slice(&config)?;
    let vocabulary = config["vocab_size"].as_u64().ok_or("no vocab_size")?;
    let options = TokenizerOptions {
        architecture,
        vocabulary: usize::try_from(vocabulary)?,
        pre: None,
        from: None,
    };
    let mut metadata = Metadata::default();
    to_metadata(&TokenizerFolder::open(directory)?, &options, &mut metadata)?;
    let rows: Vec<_> = metadata
        .iter()
        .map(|(key, value)| {
            let (kind, value) = typed(value);
            json!([key, kind, value])
        })
        .collect();
    writeln!(io::stdout(), "{}", json!(rows))?;
    Ok(())
}

fn typed(value: &Value) -> (serde_json::Value, serde_json::Value) {
    match value {
        Value::Text(it) => (json!("STRING"), json!(it)),
        Value::Bool(it) => (json!("BOOL"), json!(it)),
        Value::U32(it) => (json!("UINT32"), json!(it)),
        Value::Array(Array::Text(it)) => (json!(["STRING"]), json!(it)),
        Value::Array(Array::I32(it)) => (json!(["INT32"]), json!(it)),
        Value::Array(Array::F32(it)) => (json!(["FLOAT32"]), json!(it)),
        other => (json!("other"), json!(format!("{other:?}"))),
    }
}
