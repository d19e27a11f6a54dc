//! Tokenizers between a directory's files and a GGUF's metadata, judged by llama.cpp: by the ids that it gives texts, and by what its converter
//! writes (testdata/gguf-tokenizers, see testdata/README.md).

#![expect(clippy::unwrap_used, reason = "a test may fail loudly")]

use std::fs;
use std::path::{Path, PathBuf};

use panacea_formats::gguf::{Array, GgufFile, Metadata, Value};
use panacea_patch::convert::tokenizer::{
    TokenizerError, TokenizerFolder, TokenizerOptions, from_metadata, to_metadata,
};
use panacea_patch::data::{Encoder, Request, TemplateChoice, TokenizerFiles};
use serde::Deserialize;
use tokenizers::Tokenizer;

#[derive(Deserialize)]
struct Expected {
    texts: Vec<String>,
    ids: Cases,
}

#[derive(Deserialize)]
struct Cases {
    bytes: Vec<Case>,
    pieces: Vec<Case>,
}

/// What llama.cpp makes of the texts when `key` has another value.
#[derive(Deserialize)]
struct Case {
    case: String,
    key: String,
    value: serde_json::Value,
    ids: Vec<Vec<u32>>,
}

fn testdata(name: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata");
    root.join("gguf-tokenizers").join(name)
}

fn expected() -> Expected {
    serde_json::from_slice(&fs::read(testdata("expected.json")).unwrap()).unwrap()
}

fn metadata(name: &str) -> Metadata {
    let file = GgufFile::open(&testdata(name)).unwrap();
    file.metadata().clone()
}

fn folder(name: &str) -> TokenizerFolder {
    TokenizerFolder::open(&testdata(name)).unwrap()
}

/// The size that config.json gives the vocabulary.
fn vocabulary(name: &str) -> usize {
    let config = fs::read(testdata(name).join("config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
    usize::try_from(config["vocab_size"].as_u64().unwrap()).unwrap()
}

fn options(name: &str) -> TokenizerOptions<'_> {
    TokenizerOptions {
        architecture: "llama",
        vocabulary: vocabulary(name),
        pre: None,
        from: None,
    }
}

fn written(folder: &TokenizerFolder, options: &TokenizerOptions<'_>) -> Metadata {
    let mut metadata = Metadata::default();
    to_metadata(folder, options, &mut metadata).unwrap();
    metadata
}

fn refused(folder: &TokenizerFolder, options: &TokenizerOptions<'_>) -> TokenizerError {
    to_metadata(folder, options, &mut Metadata::default()).unwrap_err()
}

fn assert_ids(metadata: &Metadata, texts: &[String], ids: &[Vec<u32>], case: &str) {
    let texts_of = from_metadata(metadata).unwrap();
    let tokenizer = Tokenizer::from_bytes(texts_of.tokenizer.as_bytes()).unwrap();
    assert_eq!(texts.len(), ids.len());
    for (text, ids) in texts.iter().zip(ids) {
        let found = tokenizer.encode_fast(text.as_str(), false).unwrap();
        assert_eq!(found.get_ids(), ids, "{case}: {text:?}");
    }
}

/// The keys of a tokenizer alone.
fn tokenizer_keys(metadata: &Metadata) -> Vec<(&str, &Value)> {
    let keys = metadata.iter();
    keys.filter(|(key, _)| key.starts_with("tokenizer."))
        .collect()
}

/// The folder of a tokenizer that was rebuilt from a GGUF's metadata.
fn rebuilt(metadata: &Metadata) -> (tempfile::TempDir, TokenizerFolder) {
    let directory = tempfile::tempdir().unwrap();
    let texts = from_metadata(metadata).unwrap();
    let put = |name: &str, text: &str| fs::write(directory.path().join(name), text).unwrap();
    put("tokenizer.json", &texts.tokenizer);
    put("tokenizer_config.json", &texts.tokenizer_config.to_string());
    if let Some(template) = &texts.chat_template {
        put("chat_template.jinja", template);
    }
    let folder = TokenizerFolder::open(directory.path()).unwrap();
    (directory, folder)
}

#[test]
fn every_way_of_cutting_text_gives_the_ids_of_llama_cpp() {
    let Expected { texts, ids } = expected();
    for case in &ids.bytes {
        let mut metadata = metadata("bytes.gguf");
        let name = case.value.as_str().unwrap().to_owned();
        metadata.set(case.key.as_str(), Value::Text(name));
        assert_ids(&metadata, &texts, &case.ids, &case.case);
    }
}

#[test]
fn a_sentencepiece_vocabulary_gives_the_ids_of_llama_cpp() {
    let Expected { texts, ids } = expected();
    for case in &ids.pieces {
        let mut metadata = metadata("pieces.gguf");
        let value = match &case.value {
            serde_json::Value::Bool(it) => Value::Bool(*it),
            other => Value::Text(other.as_str().unwrap().to_owned()),
        };
        metadata.set(case.key.as_str(), value);
        assert_ids(&metadata, &texts, &case.ids, &case.case);
    }
}

#[test]
fn metadata_is_what_the_converter_of_llama_cpp_writes() {
    for (name, pre) in [("bytes", Some("gpt-2")), ("pieces", None)] {
        let theirs = metadata(&format!("{name}.gguf"));
        let ours = written(
            &folder(name),
            &TokenizerOptions {
                pre,
                ..options(name)
            },
        );
        let (theirs, ours) = (tokenizer_keys(&theirs), tokenizer_keys(&ours));
        let keys = |of: &[(&str, _)]| of.iter().map(|(key, _)| (*key).to_owned()).collect();
        let (their_keys, our_keys): (Vec<String>, Vec<String>) = (keys(&theirs), keys(&ours));
        assert_eq!(our_keys, their_keys, "{name}");
        for ((key, theirs), (_, ours)) in theirs.into_iter().zip(ours) {
            assert!(ours == theirs, "{name}: {key}: {ours:?}, not {theirs:?}");
        }
    }
}

#[test]
fn a_rebuilt_tokenizer_becomes_the_same_metadata() {
    for (name, pre) in [("bytes", Some("gpt-2")), ("pieces", None)] {
        let first = metadata(&format!("{name}.gguf"));
        let (_directory, folder) = rebuilt(&first);
        let options = TokenizerOptions {
            pre,
            ..options(name)
        };
        let second = written(&folder, &options);
        for key in [
            "model",
            "pre",
            "tokens",
            "merges",
            "bos_token_id",
            "eos_token_id",
        ] {
            let key = format!("tokenizer.ggml.{key}");
            assert!(first.value(&key) == second.value(&key), "{name}: {key}");
        }
        let template = "tokenizer.chat_template";
        assert_eq!(first.value(template), second.value(template), "{name}");
    }
}

#[test]
fn a_sentencepiece_tokenizer_without_its_own_file_keeps_its_ids() {
    let Expected { texts, ids } = expected();
    let case = &ids.pieces[0];
    let mut first = metadata("pieces.gguf");
    first.set(case.key.as_str(), Value::Bool(true));
    let (_directory, folder) = rebuilt(&first);
    let second = written(&folder, &options("pieces"));
    assert_ids(&second, &texts, &case.ids, "scores from merges");
}

#[test]
fn another_file_s_tokenizer_is_copied_key_by_key_if_it_fits() {
    let base = metadata("bytes.gguf");
    let empty = TokenizerFolder::default();
    let mut options = TokenizerOptions {
        from: Some(&base),
        ..options("bytes")
    };
    let copied = written(&empty, &options);
    assert_eq!(tokenizer_keys(&copied), tokenizer_keys(&base));
    assert_eq!(copied.iter().len(), tokenizer_keys(&base).len());
    options.vocabulary += 1;
    let TokenizerError::BaseDoesNotFit { tokens, vocabulary } = refused(&empty, &options) else {
        panic!("it does not fit");
    };
    assert_eq!(tokens + 1, vocabulary);
}

#[test]
fn a_tokenizer_that_cuts_text_in_an_unknown_way_needs_a_name() {
    let folder = folder("bytes");
    let mut options = options("bytes");
    let error = refused(&folder, &options);
    assert!(matches!(error, TokenizerError::UnknownCut { hash } if hash.len() == 64));
    options.pre = Some("my-own");
    let error = refused(&folder, &options);
    assert!(
        error
            .to_string()
            .starts_with("`tokenizer.ggml.pre` is `my-own`; known are `default`, `llama-bpe`, ")
    );
    // Known to llama.cpp, though not to be read here.
    options.pre = Some("deepseek-v3");
    let pre = Value::Text("deepseek-v3".to_owned());
    let metadata = written(&folder, &options);
    assert_eq!(metadata.value("tokenizer.ggml.pre"), Some(&pre));
    let error = from_metadata(&metadata).unwrap_err();
    assert!(matches!(error, TokenizerError::UnknownPre { found } if found == "deepseek-v3"));
}

#[test]
fn tokens_that_the_model_has_no_row_for_are_refused_or_left_out() {
    let bytes = TokenizerOptions {
        pre: Some("gpt-2"),
        vocabulary: 10,
        ..options("bytes")
    };
    let error = refused(&folder("bytes"), &bytes);
    let TokenizerError::TokenBeyondVocabulary { id, vocabulary, .. } = error else {
        panic!("{error}");
    };
    assert!(id >= 10 && vocabulary == 10);
    // SentencePiece's are cut, as the converter cuts them.
    let pieces = TokenizerOptions {
        vocabulary: 300,
        ..options("pieces")
    };
    let metadata = written(&folder("pieces"), &pieces);
    let tokens = metadata.value("tokenizer.ggml.tokens").unwrap();
    assert_eq!(tokens.as_array().unwrap().as_texts().unwrap().len(), 300);
}

#[test]
fn the_rules_of_families_are_those_of_the_converter() {
    let written = |architecture| {
        let options = TokenizerOptions {
            architecture,
            ..options("pieces")
        };
        written(&folder("pieces"), &options)
    };
    let end_of_turn = "tokenizer.ggml.eot_token_id";
    let space_prefix = "tokenizer.ggml.add_space_prefix";
    for (architecture, eot, prefix) in [
        ("gemma", Some(&Value::U32(107)), Some(&Value::Bool(false))),
        ("gemma2", None, Some(&Value::Bool(false))),
        ("gemma3", None, Some(&Value::Bool(false))),
        ("phi3", None, None),
        ("qwen2", None, None),
    ] {
        let metadata = written(architecture);
        assert_eq!(metadata.value(end_of_turn), eot, "{architecture}");
        assert_eq!(metadata.value(space_prefix), prefix, "{architecture}");
    }
    // Granite's small models, and SmolLM's, are known by their number of tokens.
    let options = TokenizerOptions {
        pre: Some("refact"),
        vocabulary: 49152,
        ..options("bytes")
    };
    for (architecture, begins) in [("granite", false), ("qwen2", true)] {
        let mut metadata = Metadata::default();
        let options = TokenizerOptions {
            architecture,
            ..options
        };
        to_metadata(&folder("bytes"), &options, &mut metadata).unwrap();
        let key = "tokenizer.ggml.add_bos_token";
        assert_eq!(metadata.value(key), Some(&Value::Bool(begins)));
    }
}

#[test]
fn an_encoder_reads_the_files_that_metadata_makes() {
    let (directory, _folder) = rebuilt(&metadata("bytes.gguf"));
    let files = TokenizerFiles::in_directory(directory.path()).unwrap();
    let encoder = Encoder::open(&files, TemplateChoice::Chat, 64, vocabulary("bytes")).unwrap();
    assert_eq!(encoder.eos(), 1);
    let request = Request::new("");
    let prompt = encoder.prompt(&request).unwrap();
    // The default template of two: the token that begins a text, and an `x`.
    assert_eq!(prompt.len(), 2);
    assert_eq!(prompt[0], 0);
}

/// A small tokenizer of bytes: `a`, `b`, `ab`, and a control token.
fn small() -> Metadata {
    let texts = |texts: &[&str]| {
        let texts = texts.iter().map(|&text| text.to_owned()).collect();
        Value::Array(Array::Text(texts))
    };
    let mut metadata = Metadata::default();
    for (key, value) in [
        ("model", Value::Text("gpt2".to_owned())),
        ("pre", Value::Text("gpt-2".to_owned())),
        ("tokens", texts(&["a", "b", "ab", "<s>"])),
        ("token_type", Value::Array(Array::I32(vec![1, 1, 1, 3]))),
        ("merges", texts(&["a b"])),
        ("bos_token_id", Value::U32(3)),
    ] {
        metadata.set(format!("tokenizer.ggml.{key}"), value);
    }
    metadata
}

/// What is said of [`small`] after `value` is put under `key`.
fn error_with(key: &str, value: Value) -> String {
    let mut metadata = small();
    metadata.set(format!("tokenizer.ggml.{key}"), value);
    from_metadata(&metadata).unwrap_err().to_string()
}

fn texts(texts: &[&str]) -> Value {
    Value::Array(Array::Text(texts.iter().map(|&it| it.to_owned()).collect()))
}

#[test]
fn a_small_tokenizer_is_fine_before_anything_is_wrong_with_it() {
    let files = from_metadata(&small()).unwrap();
    let tokenizer = Tokenizer::from_bytes(files.tokenizer.as_bytes()).unwrap();
    let encoding = tokenizer.encode_fast("ab<s>ba", false).unwrap();
    assert_eq!(encoding.get_ids(), [2, 3, 1, 0]);
}

/// llama.cpp would look for the longer `<s>` first, and find it.
#[test]
fn control_tokens_that_overlap_in_a_text_are_read_from_left_to_right() {
    let mut metadata = small();
    let tokens = texts(&["a", "b", "ab", "<s>", "b<"]);
    metadata.set("tokenizer.ggml.tokens", tokens);
    let types = Array::I32(vec![1, 1, 1, 3, 3]);
    metadata.set("tokenizer.ggml.token_type", Value::Array(types));
    let files = from_metadata(&metadata).unwrap();
    let tokenizer = Tokenizer::from_bytes(files.tokenizer.as_bytes()).unwrap();
    let encoding = tokenizer.encode_fast("ab<s>", false).unwrap();
    assert_eq!(encoding.get_ids(), [0, 4]);
}

#[test]
fn metadata_that_contradicts_itself_is_refused() {
    let cases = [
        (
            "merges",
            texts(&["a"]),
            "merge 0 is `a`, which is not two tokens with a space between them",
        ),
        (
            "merges",
            texts(&["a b", ""]),
            "merge 1 is ``, which is not two tokens with a space between them",
        ),
        (
            "merges",
            texts(&["a c"]),
            "merge 0, `a c`, needs the token `c`, which there is not",
        ),
        (
            "merges",
            texts(&["a b", "b a"]),
            "merge 1, `b a`, needs the token `ba`, which there is not",
        ),
        (
            "merges",
            Value::U32(1),
            "`tokenizer.ggml.merges` is not an array of texts",
        ),
        (
            "token_type",
            Value::Array(Array::I32(vec![1; 3])),
            "`tokenizer.ggml.token_type` has 3 elements for 4 tokens",
        ),
        (
            "token_type",
            Value::Array(Array::I32(vec![1; 5])),
            "`tokenizer.ggml.token_type` has 5 elements for 4 tokens",
        ),
        (
            "token_type",
            Value::Array(Array::U8(vec![1; 4])),
            "`tokenizer.ggml.token_type` is not an array of signed 32-bit integers",
        ),
        (
            "tokens",
            texts(&["a", "b", "ab", "a"]),
            "tokens 0 and 3 are both `a`",
        ),
        (
            "tokens",
            texts(&["a", "b", "ab"]),
            "`tokenizer.ggml.token_type` has 4 elements for 3 tokens",
        ),
        (
            "tokens",
            Value::Text("a".to_owned()),
            "`tokenizer.ggml.tokens` is not an array of texts",
        ),
        (
            "bos_token_id",
            Value::U32(4),
            "`tokenizer.ggml.bos_token_id` is 4, but there are 4 tokens",
        ),
        (
            "eos_token_id",
            Value::U64(u64::MAX),
            "`tokenizer.ggml.eos_token_id` is 18446744073709551615, but there are 4 tokens",
        ),
        (
            "eos_token_id",
            Value::I32(-1),
            "`tokenizer.ggml.eos_token_id` is not a whole number that is not negative",
        ),
        (
            "add_bos_token",
            Value::U8(1),
            "`tokenizer.ggml.add_bos_token` is not true or false",
        ),
        (
            "model",
            Value::Text("bert\u{1b}".to_owned()),
            "`tokenizer.ggml.model` is `bert\\u{1b}`; known are `gpt2` (byte-pair merges) and `llama` (SentencePiece)",
        ),
    ];
    for (key, value, message) in cases {
        assert_eq!(error_with(key, value), message);
    }
    for key in ["model", "tokens", "merges"] {
        let key = format!("tokenizer.ggml.{key}");
        let mut metadata = small();
        metadata.remove(&key);
        let error = from_metadata(&metadata).unwrap_err();
        assert_eq!(error.to_string(), format!("the metadata has no `{key}`"));
    }
}

#[test]
fn a_sentencepiece_vocabulary_that_contradicts_itself_is_refused() {
    let mut metadata = small();
    metadata.set("tokenizer.ggml.model", Value::Text("llama".to_owned()));
    let error = |scores| {
        let mut metadata = metadata.clone();
        metadata.set("tokenizer.ggml.scores", Value::Array(scores));
        from_metadata(&metadata).unwrap_err().to_string()
    };
    assert_eq!(
        error(Array::F32(vec![0.0; 3])),
        "`tokenizer.ggml.scores` has 3 elements for 4 tokens"
    );
    assert_eq!(
        error(Array::F64(vec![0.0; 4])),
        "`tokenizer.ggml.scores` is not an array of 32-bit floats"
    );
    // Scores that are no numbers order nothing, but end nothing either.
    let mut numberless = metadata.clone();
    let scores = Array::F32(vec![f32::NAN, f32::INFINITY, f32::NAN, -0.0]);
    numberless.set("tokenizer.ggml.scores", Value::Array(scores));
    assert!(from_metadata(&numberless).is_ok());
    let mut many = Metadata::default();
    many.set("tokenizer.ggml.model", Value::Text("llama".to_owned()));
    let runs = |letter: char| (1..=1024).map(move |length| letter.to_string().repeat(length));
    let runs = ('a'..='h').flat_map(runs).collect();
    many.set("tokenizer.ggml.tokens", Value::Array(Array::Text(runs)));
    let error = from_metadata(&many).unwrap_err();
    assert!(matches!(error, TokenizerError::TooManyMerges { .. }));
    for (length, fine) in [(1024, true), (1025, false)] {
        let long = "a".repeat(length);
        metadata.set("tokenizer.ggml.tokens", texts(&["a", "b", &long, "<s>"]));
        assert_eq!(from_metadata(&metadata).is_ok(), fine, "{length}");
    }
}

#[test]
fn what_no_token_of_a_vocabulary_says_is_the_unknown_token() {
    let mut metadata = small();
    metadata.set("tokenizer.ggml.model", Value::Text("llama".to_owned()));
    metadata.set("tokenizer.ggml.add_space_prefix", Value::Bool(false));
    metadata.set("tokenizer.ggml.unknown_token_id", Value::U32(3));
    let files = from_metadata(&metadata).unwrap();
    let tokenizer = Tokenizer::from_bytes(files.tokenizer.as_bytes()).unwrap();
    let encoding = tokenizer.encode_fast("abxyb", false).unwrap();
    assert_eq!(encoding.get_ids(), [2, 3, 1]);
}

#[test]
fn a_token_without_a_text_and_a_missing_array_of_types_are_fine() {
    let mut metadata = small();
    metadata.remove("tokenizer.ggml.token_type");
    metadata.remove("tokenizer.ggml.pre");
    metadata.set("tokenizer.ggml.tokens", texts(&["a", "b", "ab", ""]));
    let files = from_metadata(&metadata).unwrap();
    let tokenizer = Tokenizer::from_bytes(files.tokenizer.as_bytes()).unwrap();
    assert_eq!(tokenizer.token_to_id("[EMPTY_3]"), Some(3));
}

#[test]
fn files_that_make_no_tokenizer_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let put = |name: &str, text: &str| fs::write(directory.path().join(name), text).unwrap();
    let error = || {
        let options = TokenizerOptions {
            pre: Some("gpt-2"),
            ..options("bytes")
        };
        let folder = TokenizerFolder::open(directory.path())?;
        to_metadata(&folder, &options, &mut Metadata::default())
    };
    let no_tokenizer = error().unwrap_err();
    assert!(matches!(no_tokenizer, TokenizerError::NoTokenizer));
    put("tokenizer.json", "{}");
    assert!(matches!(error(), Err(TokenizerError::Tokenizer { .. })));
    put("tokenizer.json", "[]");
    assert!(matches!(error(), Err(TokenizerError::NotJson { .. })));
    fs::copy(
        testdata("bytes/tokenizer.json"),
        directory.path().join("tokenizer.json"),
    )
    .unwrap();
    assert!(error().is_ok());
    put("config.json", r#"{"eos_token_id": -1}"#);
    assert!(matches!(
        error(),
        Err(TokenizerError::NegativeId {
            kind: "eos",
            id: -1
        })
    ));
    put("config.json", r#"{"eos_token_id": 4294967296}"#);
    assert!(matches!(
        error(),
        Err(TokenizerError::IdTooLarge { kind: "eos", .. })
    ));
    put("config.json", "{}");
    put("tokenizer.model", "no");
    assert!(matches!(error(), Err(TokenizerError::Pieces { .. })));
}
