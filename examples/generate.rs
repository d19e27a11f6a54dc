//! What a model continues a prompt with, greedily: for looking at models, and for comparing with other programs.
//!
//!     cargo run --release --example generate -- MODEL PROMPT [PROMPT ...] [--max-new-tokens N] [--raw]
//!
//! MODEL is a checkpoint directory or a GGUF file. PROMPT is put into its chat template; with --raw it is the text itself. Prints for each prompt one
//! line of JSON: `{"prompt": [ids], "tokens": [ids], "text": ".."}`. How long it took goes to standard error.

use std::error::Error;
use std::path::Path;
use std::time::Instant;

use panacea_formats::{Checkpoint, TensorView};
use panacea_patch::convert::StoredModel;
use panacea_patch::data::{Encoder, Request, TemplateChoice, TokenizerFiles};
use panacea_patch::model::{Config, Decoder, Generation, Point, TargetSelection};

#[expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "an example's output"
)]
fn main() -> Result<(), Box<dyn Error>> {
    let Options {
        model,
        prompts,
        max_new_tokens,
        template,
    } = Options::parse(std::env::args().skip(1))?;
    let path = Path::new(&model);
    let checkpoint = Checkpoint::open(path)?;
    let stored = match checkpoint.layout().is_gguf() {
        true => Some(StoredModel::of(&checkpoint)?),
        false => None,
    };
    let (config, files, tensors): (_, _, Vec<TensorView<'_>>) = match &stored {
        Some(stored) => (
            stored.config(&checkpoint)?,
            stored.tokenizer(&checkpoint)?,
            stored.tensors(&checkpoint).collect(),
        ),
        None => (
            Config::parse(&std::fs::read_to_string(path.join("config.json"))?)?,
            TokenizerFiles::find(|name| checkpoint.side_file(name))?,
            checkpoint.tensors().collect(),
        ),
    };
    let encoder = Encoder::open(&files, template, usize::MAX, config.vocab_size)?;
    let mut decoder = Decoder::new(config, tensors, &TargetSelection::default())?;

    let requests = prompts.into_iter().map(Request::new);
    let prompts = requests
        .map(|request| encoder.prompt(&request))
        .collect::<Result<Vec<_>, _>>()?;
    let mut generation = Generation::of(max_new_tokens);
    generation.stop = vec![encoder.eos()];
    let start = Instant::now();
    let found = decoder.generate(Point::stored(), &prompts, &generation)?;
    let seconds = start.elapsed().as_secs_f64();
    let count: usize = found.iter().map(Vec::len).sum();
    eprintln!("{count} tokens in {seconds:.2} s");
    for (prompt, tokens) in prompts.iter().zip(&found) {
        let text = encoder.decode(tokens)?;
        let line = serde_json::json!({"prompt": prompt, "tokens": tokens, "text": text});
        println!("{line}");
    }
    Ok(())
}

struct Options {
    model: String,
    prompts: Vec<String>,
    max_new_tokens: usize,
    template: TemplateChoice,
}

impl Options {
    fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Self, Box<dyn Error>> {
        let usage = "usage: generate MODEL PROMPT [PROMPT ...] [--max-new-tokens N] [--raw]";
        let mut positional = Vec::new();
        let (mut max_new_tokens, mut template) = (64, TemplateChoice::Auto);
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--raw" => template = TemplateChoice::Raw,
                "--max-new-tokens" => max_new_tokens = arguments.next().ok_or(usage)?.parse()?,
                other if other.starts_with("--") => return Err(usage.into()),
                _ => positional.push(argument),
            }
        }
        if positional.len() < 2 {
            return Err(usage.into());
        }
        Ok(Self {
            model: positional.remove(0),
            prompts: positional,
            max_new_tokens,
            template,
        })
    }
}
