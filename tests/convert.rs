//! Conversion as a whole, on the tiny checkpoints of `testdata/oracle`: there, what the decoder computes with the GGUF file is what
//! PyTorch computed with the checkpoint; and back, every tensor is what it was.
//!
//! The bytes themselves are held against llama.cpp's own programs by `tests/interop/convert.sh`, and keys and types by the tests of
//! `src/convert`.

#![expect(clippy::unwrap_used, reason = "a test may fail loudly")]

use std::fs;
use std::path::{Path, PathBuf};

use panacea_formats::gguf::{Array, GgufFile, Metadata, Value};
use panacea_formats::{Checkpoint, Dtype};
use panacea_patch::convert::general::Origins;
use panacea_patch::convert::types::FileType;
use panacea_patch::convert::{
    Conversion, ConvertError, GgufSettings, PatchedType, StoredModel, Texts,
};
use panacea_patch::model::{Decoder, Pack, TargetSelection};

#[expect(dead_code, reason = "expected gradients are other tests' matter")]
mod common;
use common::oracle;

/// Every case that llama.cpp has a place for, and whether its file computes the same: not all of a config can be said there.
const CASES: &[(&str, bool)] = &[
    ("gemma", false),
    ("gemma2", false),
    ("gemma3-multimodal", false),
    ("gemma3-text", false),
    ("granite", true),
    ("llama-biases", true),
    ("llama-linear-rope", true),
    ("llama-tied", true),
    ("llama-yarn-rope", true),
    ("llama3-rope", true),
    ("mistral-window", false),
    ("mixtral", false),
    ("olmo2", true),
    ("phi3-longrope-mixed", true),
    ("phi3-longrope-short", true),
    ("phi3-window", true),
    ("qwen2-window", false),
    ("qwen2-yarn", true),
    ("qwen3", true),
];

/// A tokenizer of as many tokens as the cases have, each of one character.
fn tokenizer(tokens: u32) -> Metadata {
    let mut metadata = Metadata::default();
    let text = |text: &str| Value::Text(text.to_owned());
    let texts = (0..tokens).filter_map(|i| char::from_u32(0x100 + i));
    let texts: Vec<String> = texts.map(String::from).collect();
    metadata.set("tokenizer.ggml.model", text("gpt2"));
    metadata.set("tokenizer.ggml.pre", text("default"));
    let kinds = vec![1; texts.len()];
    metadata.set("tokenizer.ggml.tokens", Value::Array(Array::Text(texts)));
    metadata.set("tokenizer.ggml.token_type", Value::Array(Array::I32(kinds)));
    metadata.set(
        "tokenizer.ggml.merges",
        Value::Array(Array::Text(Vec::new())),
    );
    metadata.set("tokenizer.ggml.eos_token_id", Value::U32(2));
    metadata
}

/// Converts the checkpoint of `case` to a file of type `kind`, or its parts.
fn to_gguf(
    case: &str,
    kind: &str,
    patched: Option<&PatchedType>,
    max_shard_bytes: Option<u64>,
    directory: &Path,
) -> Result<Vec<PathBuf>, ConvertError> {
    let checkpoint = Checkpoint::open(&oracle(case)).unwrap();
    let config = fs::read_to_string(oracle(case).join("config.json")).unwrap();
    let tokenizer = tokenizer(97);
    let texts = Texts {
        config: &config,
        origins: Origins {
            directory: case,
            ..Origins::default()
        },
        tokenizer: &tokenizer,
    };
    let settings = GgufSettings {
        file_type: kind.parse().unwrap(),
        patched,
        stem: "model",
        max_shard_bytes,
    };
    let conversion = Conversion::to_gguf(&checkpoint, texts, settings)?;
    Ok(written(&conversion, directory))
}

/// Writes everything that a conversion consists of.
fn written(conversion: &Conversion<'_>, directory: &Path) -> Vec<PathBuf> {
    let mut paths = Vec::new();
    for (i, (name, length)) in conversion.weights().enumerate() {
        let mut bytes = Vec::new();
        let append = |more: &[u8]| {
            bytes.extend_from_slice(more);
            Ok(())
        };
        conversion.write(i, &(), append).unwrap();
        assert_eq!(bytes.len() as u64, length, "{name}");
        let path = directory.join(name);
        fs::write(&path, bytes).unwrap();
        paths.push(path);
    }
    for (name, text) in conversion.texts() {
        fs::write(directory.join(name), text).unwrap();
    }
    paths
}

/// The name of a tensor of the decoder, in a model with one tower.
fn of_one_tower(name: &str) -> Option<String> {
    match name.split_once("language_model.") {
        Some((before, rest)) => Some(format!("{before}{rest}")),
        None if name.starts_with("vision_tower.") || name.starts_with("multi_modal") => None,
        None => Some(name.to_owned()),
    }
}

#[test]
fn a_file_computes_what_the_checkpoint_computes() {
    for &(case, computes_the_same) in CASES {
        let directory = tempfile::tempdir().unwrap();
        let path = to_gguf(case, "f32", None, None, directory.path()).unwrap();
        let gguf = Checkpoint::open(&path[0]).unwrap();
        let stored = StoredModel::of(&gguf).unwrap();
        let config = stored.config(&gguf).unwrap();
        let tensors = stored.tensors(&gguf);
        let mut decoder = Decoder::new(config, tensors, &TargetSelection::default()).unwrap();
        let rows = common::rows(&oracle(case).join("rows.json"));
        let values = decoder.target_values().unwrap();
        let found = decoder.loss(&values, &Pack::of(&rows)).unwrap().mean();
        let facts = common::json(&oracle(case).join("expected.json"));
        let wanted = facts["loss"].as_f64().unwrap();
        let off = (found / wanted - 1.0).abs();
        match computes_the_same {
            true => assert!(off < 1e-4, "{case}: {found} for {wanted}"),
            // What is lost is told, and must be worth telling.
            false => assert!(off > 1e-4, "{case}: {found} for {wanted}"),
        }
    }
}

#[test]
fn there_and_back_every_tensor_is_what_it_was() {
    for &(case, _) in CASES {
        let directory = tempfile::tempdir().unwrap();
        let path = to_gguf(case, "f32", None, None, directory.path()).unwrap();
        let gguf = Checkpoint::open(&path[0]).unwrap();
        let back = Conversion::to_directory(&gguf, Dtype::F32, None).unwrap();
        let out = directory.path().join("back");
        fs::create_dir(&out).unwrap();
        written(&back, &out);
        let found = Checkpoint::open(&out).unwrap();
        let source = Checkpoint::open(&oracle(case)).unwrap();
        let mut compared = 0;
        for tensor in source.tensors() {
            let Some(name) = of_one_tower(tensor.name) else {
                continue;
            };
            let again = found
                .tensor(&name)
                .unwrap_or_else(|| panic!("{case} {name}"));
            assert_eq!(again.shape, tensor.shape, "{case} {name}");
            if case.starts_with("gemma") && name.ends_with("norm.weight") {
                // 1 was added and taken away again.
                let values = |bytes: &[u8]| -> Vec<f32> {
                    let values = bytes.as_chunks().0.iter();
                    values.map(|&bytes| f32::from_le_bytes(bytes)).collect()
                };
                for (a, b) in values(again.bytes).iter().zip(values(tensor.bytes)) {
                    assert!((a - b).abs() <= f32::EPSILON, "{case} {name}: {a} for {b}");
                }
            } else {
                assert!(again.bytes == tensor.bytes, "{case} {name}");
            }
            compared += 1;
        }
        assert_eq!(compared, found.tensors().count(), "{case}");
        assert!(out.join("tokenizer.json").exists() && out.join("generation_config.json").exists());
    }
}

#[test]
fn what_has_no_place_is_refused_by_its_name() {
    let directory = tempfile::tempdir().unwrap();
    for case in ["qwen3-moe", "qwen3-moe-plain"] {
        let error = to_gguf(case, "f32", None, None, directory.path()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "tensor `model.layers.0.mlp.down_proj.weight` has no place in a GGUF file of architecture `qwen3moe`"
        );
    }
    let checkpoint = Checkpoint::open(&oracle("llama-tied")).unwrap();
    let config = fs::read_to_string(oracle("llama-tied").join("config.json")).unwrap();
    let (short, none) = (tokenizer(96), Metadata::default());
    for (tokenizer, words) in [
        (
            &short,
            "the tokenizer has 96 tokens, and the embedding 97 rows",
        ),
        (&none, "the tokenizer has no tokens"),
    ] {
        let texts = Texts {
            config: &config,
            origins: Origins::default(),
            tokenizer,
        };
        let settings = GgufSettings {
            file_type: FileType::F16,
            patched: None,
            stem: "model",
            max_shard_bytes: None,
        };
        let error = Conversion::to_gguf(&checkpoint, texts, settings).unwrap_err();
        assert_eq!(error.to_string(), words);
    }
}

#[test]
fn every_type_of_file_can_be_read_and_threads_do_not_matter() {
    for kind in FileType::names() {
        let of_threads = |threads| {
            let directory = tempfile::tempdir().unwrap();
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
            let path = pool
                .unwrap()
                .install(|| to_gguf("mixtral", kind, None, None, directory.path()));
            let path = path.unwrap().remove(0);
            let gguf = Checkpoint::open(&path).unwrap();
            assert!(gguf.tensors().count() > 20, "{kind}");
            fs::read(path).unwrap()
        };
        assert!(of_threads(1) == of_threads(5), "{kind}");
    }
}

#[test]
fn parts_hold_what_one_file_holds() {
    let directory = tempfile::tempdir().unwrap();
    let whole = to_gguf("llama-tied", "f16", None, None, directory.path()).unwrap();
    let whole = GgufFile::open(&whole[0]).unwrap();
    let parts = to_gguf("llama-tied", "f16", None, Some(20_000), directory.path()).unwrap();
    let count = parts.len();
    assert!(count > 2, "{parts:?}");
    let mut seen = 0;
    for (i, path) in parts.iter().enumerate() {
        let name = format!("model-{:05}-of-{count:05}.gguf", i + 1);
        assert_eq!(path.file_name().unwrap().to_str(), Some(name.as_str()));
        let part = GgufFile::open(path).unwrap();
        let number = |key: &str| part.metadata().value(key).cloned();
        assert_eq!(
            number("split.no"),
            Some(Value::U16(u16::try_from(i).unwrap()))
        );
        assert_eq!(
            number("split.count"),
            Some(Value::U16(u16::try_from(count).unwrap()))
        );
        let total = i32::try_from(whole.tensors().len()).unwrap();
        assert_eq!(number("split.tensors.count"), Some(Value::I32(total)));
        assert_eq!(part.metadata().iter().len() > 3, i == 0);
        let bytes: usize = part.tensors().map(|tensor| tensor.bytes.len()).sum();
        assert!(bytes <= 20_000 || part.tensors().len() == 1);
        for tensor in part.tensors() {
            assert!(whole.tensor(tensor.name).unwrap().bytes == tensor.bytes);
            seen += 1;
        }
    }
    assert_eq!(seen, whole.tensors().len());

    let gguf = Checkpoint::open(&directory.path().join("model.gguf")).unwrap();
    let one = Conversion::to_directory(&gguf, Dtype::F16, None).unwrap();
    let several = Conversion::to_directory(&gguf, Dtype::F16, Some(10_000)).unwrap();
    let out = directory.path().join("several");
    fs::create_dir(&out).unwrap();
    assert!(written(&several, &out).len() > 3);
    let found = Checkpoint::open(&out).unwrap();
    assert_eq!(found.tensors().count(), one.tensors().count());
}

#[test]
fn patched_tensors_are_at_least_as_fine_as_asked_for() {
    let directory = tempfile::tempdir().unwrap();
    // Rows of 32 elements are no whole blocks of a K-quant.
    let patched = PatchedType::new(Dtype::Q5_K, "q_proj".parse().unwrap());
    let path = to_gguf("llama-tied", "q4_0", Some(&patched), None, directory.path());
    assert_eq!(
        path.unwrap_err().to_string(),
        "tensor `blk.0.attn_q.weight` has rows of 32 elements, and Q5_K stores 256 at a time"
    );
    let patched = PatchedType::new(Dtype::Q8_0, "q_proj".parse().unwrap());
    let path = to_gguf("llama-tied", "q4_0", Some(&patched), None, directory.path()).unwrap();
    let gguf = GgufFile::open(&path[0]).unwrap();
    for tensor in gguf.tensors() {
        let is_target = tensor.name.ends_with("attn_q.weight");
        let dtype = Dtype::of_gguf_type(tensor.type_number);
        assert_eq!(
            dtype == Some(Dtype::Q8_0),
            is_target || tensor.name == "token_embd.weight"
        );
    }
    let patched = PatchedType::new(Dtype::Q4_0, "q_proj".parse().unwrap());
    let path = to_gguf("llama-tied", "f16", Some(&patched), None, directory.path()).unwrap();
    let gguf = GgufFile::open(&path[0]).unwrap();
    let query = gguf.tensor("blk.0.attn_q.weight").unwrap();
    assert_eq!(Dtype::of_gguf_type(query.type_number), Some(Dtype::F16));
}
