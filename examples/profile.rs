//! Where a step's time goes, by stage.
//!
//!     cargo run --release --example profile -- DIR --harmful H.jsonl --task G.jsonl [--batch 8] [--max-length 256] [--runs 5]
//!
//! A step of the paper's method, in rows of the Alpaca template: gradients of the task's loss and of the harmful loss at w, that of the harmful loss at
//! w + eps, and AdamW. Each stage is timed by itself, on the first batch, and told as the median of the runs: a table on stderr, one JSON object on
//! stdout, seconds. *Logits* are what a loss takes beyond the hidden states it is of; *backward* what its gradient takes beyond the loss, logits' own
//! backward with it; *optimizer* what a step takes beyond its three gradients: AdamW, clipping, the points w + eps.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "what it is for")]

use std::error::Error;
use std::path::Path;
use std::time::Instant;

use panacea_formats::Checkpoint;
use panacea_patch::data::{DataPath, Dataset, Encoder, Example, TemplateChoice, TokenizerFiles};
use panacea_patch::model::{
    Config, Decoder, Differentiable, Pack, PackError, Point, TargetSelection,
};
use panacea_patch::optimize::{
    FinalEps, Observer, Panacea, Rows, Settings, State, StepRecord, optimize,
};
use serde_json::json;

fn main() -> Result<(), Box<dyn Error>> {
    let usage = "usage: profile DIR --harmful H.jsonl --task G.jsonl [--batch N] [--max-length N] [--runs N]";
    let mut arguments = std::env::args().skip(1);
    let directory = arguments.next().ok_or(usage)?;
    let directory = Path::new(&directory);
    let (mut harmful, mut task): (Option<DataPath>, Option<DataPath>) = (None, None);
    let [mut batch, mut max_length, mut runs] = [8, 256, 5];
    while let Some(flag) = arguments.next() {
        let value = arguments.next().ok_or(usage)?;
        match flag.as_str() {
            "--harmful" => harmful = Some(value.parse()?),
            "--task" => task = Some(value.parse()?),
            "--batch" => batch = value.parse()?,
            "--max-length" => max_length = value.parse()?,
            "--runs" => runs = value.parse()?,
            _ => return Err(usage.into()),
        }
    }

    let config = Config::parse(&std::fs::read_to_string(directory.join("config.json"))?)?;
    let files = TokenizerFiles::in_directory(directory)?;
    let encoder = Encoder::open(
        &files,
        TemplateChoice::Alpaca,
        max_length,
        config.vocab_size,
    )?;
    let rows = |path: Option<DataPath>| -> Result<_, Box<dyn Error>> {
        let set: Dataset<Example> = Dataset::open(&path.ok_or(usage)?)?;
        Ok(encoder.encode(&set.rows)?)
    };
    let rows = Rows {
        harmful: rows(harmful)?,
        task: rows(task)?,
        ..Rows::default()
    };

    let began = Instant::now();
    let checkpoint = Checkpoint::open(directory)?;
    let mut decoder = Decoder::new(config, checkpoint.tensors(), &TargetSelection::default())?;
    decoder.check_targets()?;
    let reading = began.elapsed().as_secs_f64();

    let pack = |rows: &[_]| Pack::sharing(&rows.iter().take(batch).collect::<Vec<_>>());
    let mut stages = Vec::new();
    let mut gradients = 0.0;
    for (set, pack, times) in [
        ("task", pack(&rows.task), 1.0),
        ("harmful", pack(&rows.harmful), 2.0),
    ] {
        let [hidden, loss, gradient] = of_pack(&mut decoder, &pack, runs)?;
        stages.push((
            format!("{set} forward, {} tokens", pack.tokens.len()),
            times * hidden,
        ));
        stages.push((
            format!("{set} logits, {} predicted", pack.predictions.len()),
            times * (loss - hidden),
        ));
        stages.push((format!("{set} backward"), times * (gradient - loss)));
        gradients += times * gradient;
    }
    let settings = Settings::Panacea(Panacea {
        steps: runs + 1,
        batch,
        final_eps: FinalEps::LastBatch,
        ..Panacea::default()
    });
    let mut seconds = Seconds {
        since: Instant::now(),
        found: Vec::new(),
    };
    optimize(&mut decoder, &rows, &settings, None, &mut seconds)?;
    // The first makes its buffers.
    let step = median(&mut seconds.found[1..]);
    stages.push(("optimizer".to_owned(), step - gradients));

    eprintln!("{:<32} {:>8} {:>6}", "stage", "seconds", "share");
    for (stage, seconds) in &stages {
        eprintln!(
            "{stage:<32} {seconds:>8.3} {:>5.1}%",
            100.0 * seconds / step
        );
    }
    eprintln!(
        "{:<32} {step:>8.3}\n{:<32} {reading:>8.3}, once",
        "a step", "reading"
    );
    let stages: Vec<_> = stages
        .iter()
        .map(|(stage, seconds)| json!({"stage": stage, "seconds": seconds}))
        .collect();
    println!(
        "{}",
        json!({"stages": stages, "step": step, "reading": reading, "runs": runs})
    );
    Ok(())
}

/// Seconds for the hidden states of a pack, for its loss, and for the loss with its gradient.
fn of_pack(decoder: &mut Decoder<'_>, pack: &Pack, runs: usize) -> Result<[f64; 3], PackError> {
    let sizes = decoder.target_sizes();
    let mut gradient = panacea_patch::model::TargetTensors::new(
        sizes.iter().map(|&size| vec![0.0; size]).collect(),
    );
    let mut found = [const { Vec::new() }; 3];
    for _ in 0..=runs {
        let began = Instant::now();
        decoder.reference(Point::stored(), pack)?;
        found[0].push(began.elapsed().as_secs_f64());
        let began = Instant::now();
        decoder.loss(Point::stored(), pack)?;
        found[1].push(began.elapsed().as_secs_f64());
        let began = Instant::now();
        decoder.loss_and_gradient(Point::stored(), pack, &mut gradient)?;
        found[2].push(began.elapsed().as_secs_f64());
    }
    Ok(found.map(|mut seconds| median(&mut seconds[1..])))
}

fn median(seconds: &mut [f64]) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

/// Hears how long each step took.
struct Seconds {
    since: Instant,
    found: Vec<f64>,
}

impl Observer for Seconds {
    fn progress(&mut self, _what: &str, _done: usize, _total: usize) {}

    fn step(&mut self, _record: &StepRecord) {
        self.found.push(self.since.elapsed().as_secs_f64());
        self.since = Instant::now();
    }

    fn state(&mut self, _state: &State<'_>) {}

    fn interrupted(&self) -> bool {
        false
    }
}
