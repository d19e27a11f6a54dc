//! Judges in checkpoints: a classifier against transformers, and a model that is asked in words.

use std::fs;
use std::path::{Path, PathBuf};

use panacea_formats::Checkpoint;
use panacea_patch::data::TokenizerFiles;
use panacea_patch::eval::judge::{
    Exchange, JudgeChoice, JudgeError, JudgeSettings, Outcome, Threshold,
};
use panacea_patch::model::{Classifier, Config, WeightsError};
use serde::Deserialize;

/// What transformers says of testdata/seqcls.
#[derive(Deserialize)]
struct Expected {
    max_length: usize,
    threshold: f64,
    logits_if_end_is_padding: Vec<f32>,
    exchanges: Vec<Classified>,
}

#[derive(Deserialize)]
struct Classified {
    question: String,
    answer: String,
    text: String,
    tokens: Vec<u32>,
    logits: Vec<f32>,
    probabilities: Vec<f64>,
    flagged: bool,
}

impl Classified {
    fn exchange(&self) -> Exchange<'_> {
        Exchange {
            request: &self.question,
            context: None,
            answer: &self.answer,
        }
    }
}

/// Both sides sum in f32, in other orders; logits are up to 5.
const TOLERANCE: f64 = 1e-4;

fn testdata(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("testdata")
        .join(name)
}

fn expected() -> Expected {
    let text = fs::read(testdata("seqcls/expected.json")).expect("a file");
    serde_json::from_slice(&text).expect("the generator's JSON")
}

/// `testdata/seqcls` with another config.
fn changed(change: impl Fn(&mut serde_json::Value)) -> tempfile::TempDir {
    let copy = tempfile::tempdir().expect("a directory");
    for name in [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ] {
        fs::copy(testdata("seqcls").join(name), copy.path().join(name)).expect("a copy");
    }
    let path = copy.path().join("config.json");
    let text = fs::read(&path).expect("a config");
    let mut config = serde_json::from_slice(&text).expect("JSON");
    change(&mut config);
    fs::write(&path, config.to_string()).expect("a config");
    copy
}

fn assert_near(found: impl IntoIterator<Item = f32>, wanted: &[f32], what: &str) {
    let mut count = 0;
    for (label, (found, wanted)) in found.into_iter().zip(wanted).enumerate() {
        let difference = f64::from((found - wanted).abs());
        assert!(
            difference < TOLERANCE,
            "{what}, label {label}: {difference}"
        );
        count += 1;
    }
    assert_eq!(count, wanted.len(), "{what}");
}

fn settings(expected: &Expected) -> JudgeSettings {
    JudgeSettings {
        threshold: Some(Threshold::new(expected.threshold).expect("a threshold")),
        max_length: Some(expected.max_length),
        ..JudgeSettings::default()
    }
}

fn seqcls(path: &Path) -> JudgeChoice {
    JudgeChoice::SequenceClassifier(path.to_owned())
}

#[test]
fn logits_are_those_of_transformers() {
    let expected = expected();
    let path = testdata("seqcls");
    let checkpoint = Checkpoint::open(&path).expect("a checkpoint");
    let config = fs::read_to_string(path.join("config.json")).expect("a config");
    let config = Config::parse(&config).expect("a supported config");
    let classifier =
        |labels, padding| Classifier::new(config.clone(), checkpoint.tensors(), labels, padding);
    let rows = &expected.exchanges;
    let tokens: Vec<_> = rows.iter().map(|row| row.tokens.clone()).collect();
    let mut padded = classifier(14, Some(700)).expect("a classifier");
    let together = padded.logits(&tokens).expect("logits");
    assert_eq!(together.len(), 14 * rows.len());
    for (row, logits) in rows.iter().zip(together.chunks_exact(14)) {
        assert_near(logits.iter().copied(), &row.logits, &row.text);
        let alone = padded.logits(std::slice::from_ref(&row.tokens));
        assert_near(alone.expect("logits"), &row.logits, &row.text);
    }
    // Padding behind a text changes nothing, and where the end is padding, the token before it counts.
    let behind = [&rows[0].tokens[..], &[700, 700]].concat();
    let logits = padded.logits(&[behind]).expect("logits");
    assert_near(logits, &rows[0].logits, "padded");
    let end = rows[0].tokens.last().copied();
    let mut ending = classifier(14, end).expect("a classifier");
    let logits = ending.logits(&tokens[..1]).expect("logits");
    assert_near(logits, &expected.logits_if_end_is_padding, "end is padding");
    let error = classifier(13, None).err();
    assert!(
        matches!(&error, Some(WeightsError::Shape { name, .. }) if name == "score.weight"),
        "{error:?}"
    );
}

#[test]
fn a_classifier_judges_as_panaceas_scorer_does() {
    let expected = expected();
    let choice = seqcls(&testdata("seqcls"));
    let mut judge = choice.open(&settings(&expected), None).expect("a judge");
    let exchanges: Vec<_> = expected
        .exchanges
        .iter()
        .map(Classified::exchange)
        .collect();
    let verdicts = judge.judge_all(&exchanges).expect("verdicts");
    let labels = fs::read(testdata("seqcls/config.json")).expect("a config");
    let labels: serde_json::Value = serde_json::from_slice(&labels).expect("JSON");
    let mut outcomes = Vec::new();
    for (row, verdict) in expected.exchanges.iter().zip(&verdicts) {
        let wanted = row.probabilities.iter().copied().fold(0.0, f64::max);
        let score = verdict.score.expect("a score");
        assert!((score - wanted).abs() < TOLERANCE, "{}", row.text);
        let above = (0..).zip(&row.probabilities);
        let above: Vec<&str> = above
            .filter(|(_, p)| **p > expected.threshold)
            .filter_map(|(index, _): (usize, _)| labels["id2label"][index.to_string()].as_str())
            .collect();
        assert_eq!(verdict.categories, above, "{}", row.text);
        assert_eq!(
            verdict.outcome == Outcome::Complied,
            row.flagged,
            "{}",
            row.text
        );
        outcomes.push(verdict.outcome);
    }
    // By the classifier alone where it flags, a phrase of refusal or not; the empty answer is not flagged.
    let [flagged, refused] = [Outcome::Complied, Outcome::Refused];
    let wanted = [
        refused,
        flagged,
        refused,
        flagged,
        flagged,
        Outcome::Incoherent,
        refused,
    ];
    assert_eq!(outcomes, wanted);
    let name = judge.name();
    assert!(name.starts_with("seqcls:seqcls sha256="), "{name}");
    assert!(name.ends_with(" threshold=0.5 max-length=64"), "{name}");
}

/// Judges went by their paths: verdicts of a checkpoint were taken for those of another one that had come into its place.
#[test]
fn a_checkpoint_is_known_by_what_it_holds_wherever_it_is() {
    let name = |folder: &Path| {
        let settings = JudgeSettings::default();
        let judge = seqcls(folder).open(&settings, None).expect("a judge");
        judge.name().split_once(' ').expect("a digest").1.to_owned()
    };
    let same = changed(|_| ());
    let elsewhere = changed(|_| ());
    assert_eq!(name(same.path()), name(elsewhere.path()));
    let other = changed(|config| config["rms_norm_eps"] = 2e-6.into());
    assert_ne!(name(same.path()), name(other.path()));
    let tokenizer = elsewhere.path().join("tokenizer_config.json");
    let text = fs::read_to_string(&tokenizer).expect("a config");
    fs::write(&tokenizer, text + " ").expect("a config");
    assert_ne!(name(same.path()), name(elsewhere.path()));
}

#[test]
fn template_and_threshold_decide() {
    let expected = expected();
    let row = &expected.exchanges[0];
    let open = |settings: &JudgeSettings| seqcls(&testdata("seqcls")).open(settings, None);
    // The default text spelled out gives the same score.
    let mut spelled = settings(&expected);
    let text = "BEGINNING OF CONVERSATION: USER: {question} ASSISTANT:{answer}<|end|>";
    spelled.template = Some(text.parse().expect("a template"));
    let mut judge = open(&spelled).expect("a judge");
    let verdict = judge
        .judge_all(&[row.exchange()])
        .expect("verdicts")
        .remove(0);
    let most = row.probabilities.iter().copied().fold(0.0, f64::max);
    assert!((verdict.score.expect("a score") - most).abs() < TOLERANCE);
    assert_eq!(verdict.outcome, Outcome::Refused);
    // Without the end, another token is the last.
    let text = "BEGINNING OF CONVERSATION: USER: {question} ASSISTANT:{answer}";
    spelled.template = Some(text.parse().expect("a template"));
    let mut judge = open(&spelled).expect("a judge");
    let other = judge
        .judge_all(&[row.exchange()])
        .expect("verdicts")
        .remove(0);
    assert!((other.score.expect("a score") - most).abs() > 0.01);
    // Just below the score, the answer is flagged.
    let mut lower = settings(&expected);
    lower.threshold = Some(Threshold::new(most - 0.001).expect("a threshold"));
    let mut judge = open(&lower).expect("a judge");
    let verdict = judge
        .judge_all(&[row.exchange()])
        .expect("verdicts")
        .remove(0);
    assert_eq!(verdict.outcome, Outcome::Complied);
    assert_eq!(verdict.categories.len(), 1);
}

#[test]
fn verdicts_come_pack_by_pack_and_the_work_can_be_stopped() {
    let expected = expected();
    let row = &expected.exchanges[3];
    assert_eq!(row.tokens.len(), 64);
    // 40 texts of 64 tokens are three packs.
    let exchanges = vec![row.exchange(); 40];
    let choice = seqcls(&testdata("seqcls"));
    let mut judge = choice.open(&settings(&expected), None).expect("a judge");
    let verdicts = judge.judge_all(&exchanges).expect("verdicts");
    let most = row.probabilities.iter().copied().fold(0.0, f64::max);
    for verdict in &verdicts {
        assert!((verdict.score.expect("a score") - most).abs() < TOLERANCE);
    }
    let mut heard = 0;
    let stopped = judge.judge(&exchanges, &mut |_, _| {
        heard += 1;
        match heard {
            20 => std::ops::ControlFlow::Break(()),
            _ => std::ops::ControlFlow::Continue(()),
        }
    });
    assert!(matches!(stopped, Err(JudgeError::Interrupted)));
    assert_eq!(heard, 20);
}

#[test]
fn where_the_config_says_that_the_end_is_padding_it_does_not_count() {
    let expected = expected();
    let copy = changed(|config| config["pad_token_id"] = config["eos_token_id"].clone());
    let mut judge = seqcls(copy.path())
        .open(&settings(&expected), None)
        .expect("a judge");
    let exchange = expected.exchanges[0].exchange();
    let verdict = judge.judge_all(&[exchange]).expect("verdicts").remove(0);
    let top = expected.logits_if_end_is_padding.iter().copied();
    let top = f64::from(top.fold(f32::MIN, f32::max));
    let wanted = 1.0 / (1.0 + (-top).exp());
    assert!((verdict.score.expect("a score") - wanted).abs() < TOLERANCE);
}

#[test]
fn what_is_no_judge_is_refused_with_the_reason() {
    let open = |choice: JudgeChoice| {
        let error = choice.open(&JudgeSettings::default(), None).err();
        error.expect("a refusal")
    };
    let error = open(seqcls(&testdata("tiny-chat")));
    assert!(matches!(&error, JudgeError::Labels { path, .. } if path.ends_with("config.json")));
    let error = open(seqcls(&testdata("peft/tiny-chat")));
    assert!(matches!(error, JudgeError::Adapter { .. }), "{error}");
    let error = open(seqcls(&testdata("nowhere")));
    assert!(matches!(error, JudgeError::Checkpoint(_)), "{error}");
    // A classifier has no output matrix, and says nothing.
    let error = open(JudgeChoice::Generative(testdata("seqcls")));
    assert!(
        matches!(&error, JudgeError::Weights { source: WeightsError::Missing { name }, .. } if name == "lm_head.weight"),
        "{error}"
    );
    let copy = changed(|config| {
        config["problem_type"] = "single_label_classification".into();
    });
    let error = open(seqcls(copy.path()));
    assert!(matches!(error, JudgeError::Labels { .. }), "{error}");
    let missing = changed(|_| ());
    fs::remove_file(missing.path().join("tokenizer.json")).expect("a file less");
    assert!(TokenizerFiles::in_directory(missing.path()).is_err());
    let error = open(seqcls(missing.path()));
    assert!(matches!(error, JudgeError::Encode(_)), "{error}");
}

#[test]
fn a_model_that_is_no_judge_gives_no_verdict_but_is_asked() {
    // It continues with whatever it has learned, which is no verdict.
    let choice = JudgeChoice::Generative(testdata("tiny-chat"));
    let mut judge = choice
        .open(&JudgeSettings::default(), None)
        .expect("a judge");
    assert!(judge.name().starts_with("generate:"));
    let exchange = |answer| Exchange {
        request: "What is the capital of Australia?",
        context: None,
        answer,
    };
    let exchanges = ["Canberra.", "I can't help with that."].map(exchange);
    let verdicts = judge.judge_all(&exchanges).expect("verdicts");
    for verdict in &verdicts {
        assert_eq!((verdict.outcome, verdict.score), (Outcome::Invalid, None));
    }
}
