//! Models as GGUF files hold them: the tiny checkpoints of `testdata/oracle`, converted, compute what PyTorch computed of the originals.
//!
//! Rows of queries and keys stand in another order there, norms hold their offset, experts are stacked, and the config is keys. None of
//! that may change a loss or a gradient by more than rounding does.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use panacea_formats::gguf::{Array, Metadata, Value};
use panacea_formats::{Checkpoint, Layout};
use panacea_patch::convert::general::Origins;
use panacea_patch::convert::names::row_in_source;
use panacea_patch::convert::types::FileType;
use panacea_patch::convert::{Conversion, ConvertError, GgufSettings, StoredModel, Texts};
use panacea_patch::model::{Config, Decoder, Pack, TargetSelection};

mod common;
use common::{Stored, oracle, relative_error};

/// Every projection matrix of every family.
const ALL: &str =
    "q_proj,k_proj,v_proj,qkv_proj,o_proj,gate_proj,up_proj,gate_up_proj,down_proj,w1,w2,w3";

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
        match converted(case, &path) {
            Ok(losses) if losses.is_empty() => {}
            Ok(losses) => {
                println!("{name}: {losses:?}");
                lossy.push(name);
                continue;
            }
            Err(ConvertError::NoPlace { .. }) => {
                without_place.push(name);
                continue;
            }
            Err(error) => panic!("{name}: {error}"),
        }
        let checkpoint = Checkpoint::open(&path).unwrap();
        assert_eq!(checkpoint.layout(), Layout::Gguf);
        let model = StoredModel::of(&checkpoint).unwrap();
        let config = model.config(&checkpoint).unwrap();
        let head = config.head_dim;
        let selection: TargetSelection = ALL.parse().unwrap();
        let mut decoder = Decoder::new(config, model.tensors(&checkpoint), &selection).unwrap();
        let values = decoder.target_values().unwrap();

        let expected = Stored::open(&case.join("expected.safetensors"));
        let pack = Pack::of(&common::rows(&case.join("rows.json")));
        let logits = decoder.logits(&values, &pack).unwrap();
        let error = relative_error(&logits, &expected.floats("logits"));
        assert!(error < TOLERANCE, "{name}: logits are off by {error:e}");

        let mut gradient = values.zeros_like();
        let loss = decoder
            .loss_and_gradient(&values, &pack, &mut gradient)
            .unwrap();
        #[expect(clippy::cast_precision_loss, reason = "a few tokens")]
        gradient.scale(1.0 / loss.count as f32);
        let prefix = match name {
            "gemma3-multimodal" => "model.language_model.",
            _ => "model.",
        };
        let mut judged = 0;
        for (index, target) in decoder.targets().iter().enumerate() {
            let theirs = target.name.replacen("model.", prefix, 1);
            let wanted = expected.floats(&format!("grad.{theirs}"));
            let [rows, columns] = target.shape;
            let reordered = model.architecture().reordered
                && ["q_proj.weight", "k_proj.weight"]
                    .iter()
                    .any(|end| target.name.ends_with(end));
            let found = gradient.tensor(index);
            let found: Vec<f32> = match reordered {
                false => found.to_vec(),
                true => {
                    let mut there = vec![0.0; found.len()];
                    for (row, values) in found.chunks(columns).enumerate() {
                        let origin = row_in_source(row, head);
                        there[origin * columns..][..columns].copy_from_slice(values);
                    }
                    there
                }
            };
            assert_eq!(wanted.len(), rows * columns);
            let error = relative_error(&found, &wanted);
            assert!(error < TOLERANCE, "{name}, {theirs}: off by {error:e}");
            judged += 1;
        }
        assert!(judged > 0, "{name}");
    }
    // llama.cpp computes these without their windows.
    assert_eq!(lossy, [""]);
    // It has a block without experts, which llama.cpp does not know there.
    assert_eq!(without_place, ["qwen3-moe"]);
}
