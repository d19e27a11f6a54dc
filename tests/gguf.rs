//! Models as GGUF files hold them: the tiny checkpoints of `testdata/oracle`, converted, compute what their sources do, and where the
//! file can say all of the config, what PyTorch computed.
//!
//! Rows of queries and keys stand in another order there, norms hold their offset, experts are stacked, and the config is keys. None of
//! that may change a loss or a gradient by more than rounding does.

#![expect(clippy::unwrap_used, reason = "a test may fail loudly")]

use std::io::Write as _;
use std::path::{Path, PathBuf};

use panacea_formats::gguf::{Array, Metadata, Value};
use panacea_formats::{Checkpoint, Layout};
use panacea_patch::convert::config::from_gguf;
use panacea_patch::convert::general::Origins;
use panacea_patch::convert::names::row_in_source;
use panacea_patch::convert::types::FileType;
use panacea_patch::convert::{Conversion, ConvertError, GgufSettings, StoredModel, Texts};
use panacea_patch::model::{Config, Decoder, Pack, Point, TargetSelection};

#[expect(dead_code, reason = "not all cases are GGUF files too")]
#[path = "common/cases.rs"]
mod cases;
mod common;
use cases::ALL;
use common::{Stored, oracle, relative_error};

/// As in `tests/oracle.rs`.
const TOLERANCE: f64 = 1e-4;

/// Converts the checkpoint at `case` to `target`, and says what the file cannot tell.
fn converted(case: &Path, target: &Path) -> Result<Vec<String>, ConvertError> {
    let checkpoint = Checkpoint::open(case).unwrap();
    let text = std::fs::read_to_string(case.join("config.json")).unwrap();
    let vocabulary = Config::parse(&text).unwrap().vocab_size;
    let tokens = (0..vocabulary).map(|id| format!("t{id}")).collect();
    let mut tokenizer = Metadata::default();
    tokenizer.set("tokenizer.ggml.tokens", Value::Array(Array::Text(tokens)));
    let texts = Texts {
        config: &text,
        origins: Origins::default(),
        tokenizer: &tokenizer,
    };
    let settings = GgufSettings {
        file_type: FileType::F32,
        patched: None,
        stem: "model",
        max_shard_bytes: None,
    };
    let conversion = Conversion::to_gguf(&checkpoint, texts, settings)?;
    let mut file = std::fs::File::create(target).unwrap();
    conversion
        .write(0, &(), |bytes| {
            file.write_all(bytes).unwrap();
            Ok(())
        })
        .unwrap();
    Ok(conversion.losses)
}

#[test]
fn losses_and_gradients_over_a_gguf_file_are_those_of_its_source() {
    let root = tempfile::tempdir().unwrap();
    let mut cases: Vec<PathBuf> = std::fs::read_dir(oracle(""))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join("expected.safetensors").exists())
        .collect();
    cases.sort();
    assert!(cases.len() >= 21);
    let (mut lossy, mut without_place) = (Vec::new(), Vec::new());
    for case in &cases {
        let name = case.file_name().unwrap().to_str().unwrap();
        let path = root.path().join(format!("{name}.gguf"));
        let losses = match converted(case, &path) {
            Ok(losses) => losses,
            Err(ConvertError::NoPlace { .. }) => {
                without_place.push(name);
                continue;
            }
            Err(error) => panic!("{name}: {error}"),
        };
        let checkpoint = Checkpoint::open(&path).unwrap();
        assert_eq!(checkpoint.layout(), Layout::Gguf);
        let model = StoredModel::of(&checkpoint).unwrap();
        let config = model.config(&checkpoint).unwrap();
        let head = config.head_dim;
        let selection: TargetSelection = ALL.parse().unwrap();
        let mut found = Decoder::new(config, model.tensors(&checkpoint), &selection).unwrap();
        let pack = Pack::of(&common::rows(&case.join("rows.json")));

        // The source, computed by what the file's keys say, which is all that llama.cpp can know.
        let source = Stored::open(&case.join("model.safetensors"));
        let keys = checkpoint.gguf_metadata().unwrap();
        let text = from_gguf(keys, &|name| checkpoint.tensor(name)).unwrap();
        let config = Config::parse(&serde_json::to_string(&text).unwrap()).unwrap();
        let mut wanted = Decoder::new(config, source.views(), &selection).unwrap();

        let logits = found.logits(Point::stored(), &pack).unwrap();
        let error = relative_error(&logits, &wanted.logits(Point::stored(), &pack).unwrap());
        assert!(error < TOLERANCE, "{name}: logits are off by {error:e}");
        match losses.is_empty() {
            true => {
                let theirs = Stored::open(&case.join("expected.safetensors"));
                let error = relative_error(&logits, &theirs.floats("logits"));
                assert!(
                    error < TOLERANCE,
                    "{name}: logits are {error:e} off PyTorch's"
                );
            }
            false => lossy.push(name),
        }

        let gradients = [&mut found, &mut wanted].map(|decoder| {
            let mut gradient = decoder.target_values().unwrap().zeros_like();
            decoder
                .loss_and_gradient(Point::stored(), &pack, &mut gradient)
                .unwrap();
            gradient
        });
        assert_eq!(found.targets().len(), wanted.targets().len());
        for (index, target) in found.targets().iter().enumerate() {
            let columns = target.shape[1];
            let is_reordered = |end: &&str| target.name.ends_with(end);
            let reordered = model.architecture().reordered
                && ["q_proj.weight", "k_proj.weight"].iter().any(is_reordered);
            let mut gradient = gradients[0].tensor(index).to_vec();
            if reordered {
                for (row, values) in gradients[0].tensor(index).chunks(columns).enumerate() {
                    let origin = row_in_source(row, head);
                    gradient[origin * columns..][..columns].copy_from_slice(values);
                }
            }
            let error = relative_error(&gradient, gradients[1].tensor(index));
            assert!(
                error < TOLERANCE,
                "{name}, {}: off by {error:e}",
                target.name
            );
        }
    }
    // llama.cpp has no key for their windows, or for the small theta or factor on scores that only a test has.
    assert_eq!(
        lossy,
        [
            "gemma",
            "gemma2",
            "gemma3-multimodal",
            "gemma3-text",
            "mistral-window",
            "mixtral",
            "phi3-window",
            "qwen2-window"
        ]
    );
    // They have a block without experts, which llama.cpp does not know there.
    assert_eq!(without_place, ["qwen3-moe", "qwen3-moe-plain"]);
}
