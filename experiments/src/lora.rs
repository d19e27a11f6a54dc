//! Fine-tuning a LoRA adapter with the project's own engine.
//!
//! In: a base checkpoint, an adapter to start from, rows. Out: a PEFT directory, and the base with it merged, in the base's types.

use std::path::{Path, PathBuf};

use panacea_formats::{
    Adapter, AdapterConfig, Checkpoint, DeltaTensor, Destination, OutputDir, Overwrite, Sha256,
    StoredFloats, write_tensors,
};
use panacea_patch::apply::{self, ApplySettings, Merge, Rounding, Wanted};
use panacea_patch::data::{EncodeError, Encoder, Example, TemplateChoice, TokenizerFiles};
use panacea_patch::model::{AdapterModule, Config, Decoder, TargetSelection};
use panacea_patch::optimize::{FineTuning, Observer, State, StepRecord, fine_tune};
use rand::RngExt as _;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use serde_json::json;

use crate::Failure;

/// A base model, opened for fine-tuning.
pub(crate) struct Base {
    path: PathBuf,
    checkpoint: Checkpoint,
    config: Config,
    encoder: Encoder,
    tie_word_embeddings: bool,
}

impl Base {
    pub(crate) fn open(
        path: &Path,
        template: TemplateChoice,
        max_length: usize,
    ) -> Result<Self, Failure> {
        let checkpoint = Checkpoint::open(path)?;
        let text = std::fs::read_to_string(path.join("config.json"))?;
        let config = Config::parse(&text)?;
        let json: serde_json::Value = serde_json::from_str(&text)?;
        let files = TokenizerFiles::find(|name| checkpoint.side_file(name))?;
        Ok(Self {
            path: path.to_owned(),
            encoder: Encoder::open(&files, template, max_length, config.vocab_size)?,
            tie_word_embeddings: json["tie_word_embeddings"].as_bool().unwrap_or(false),
            checkpoint,
            config,
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// What tells this base from others, wherever it lies: a digest of its files of weights, its configuration and its tokenizer with their
    /// names. Costs one pass over all of them.
    pub(crate) fn digest(&self) -> Result<Sha256, Failure> {
        let weights = self.checkpoint.files().iter();
        let mut digests: Vec<_> = weights
            .map(|shard| (shard.name.as_str(), shard.file.digest()))
            .collect();
        for name in TokenizerFiles::NAMES {
            if let Some(path) = self.checkpoint.side_file(name) {
                digests.push((name, Sha256::of_file(&path)?));
            }
        }
        let lines = digests
            .iter()
            .map(|(name, digest)| format!("{digest}  {name}\n"));
        Ok(Sha256::of(lines.collect::<String>().as_bytes()))
    }

    /// Writes an adapter of q, k and v that changes nothing yet: A uniform within 1 / sqrt(inputs), as PEFT initializes it, B zero.
    pub(crate) fn begin(&self, adapter: &Path, seed: u64) -> Result<(), Failure> {
        let selection = TargetSelection::default();
        let decoder = Decoder::new(self.config.clone(), self.checkpoint.tensors(), &selection)?;
        let mut generator = ChaCha8Rng::seed_from_u64(seed);
        let mut tensors = Vec::new();
        for target in decoder.targets() {
            let module = target.name.trim_end_matches(".weight");
            let [outputs, inputs] = target.shape;
            #[expect(clippy::cast_precision_loss, reason = "a width")]
            let bound = 1.0 / (inputs as f32).sqrt();
            let a = (0..RANK * inputs).map(|_| generator.random_range(-bound..bound));
            tensors.push((
                format!("base_model.model.{module}.lora_A.weight"),
                vec![RANK, inputs],
                a.collect(),
            ));
            tensors.push((
                format!("base_model.model.{module}.lora_B.weight"),
                vec![outputs, RANK],
                vec![0.0; outputs * RANK],
            ));
        }
        write_adapter(adapter, &tensors)
    }

    /// Fine-tunes the adapter at `from` on `rows`, and writes it to `to`.
    pub(crate) fn train(
        &self,
        from: &Path,
        to: &Path,
        rows: &[Example],
        settings: &FineTuning,
    ) -> Result<f64, Failure> {
        let checkpoint = Checkpoint::open(from)?;
        let adapter = Adapter::of(&checkpoint, &AdapterConfig::read(&checkpoint)?)?;
        let modules = adapter.modules().iter().map(|module| AdapterModule {
            path: module.path.to_owned(),
            a: module.a,
            b: module.b,
            scale: module.scale,
        });
        let mut decoder = Decoder::with_adapter(
            self.config.clone(),
            self.checkpoint.tensors(),
            modules.collect(),
            None,
        )?;
        let mut encoded = Vec::with_capacity(rows.len());
        for row in rows {
            match self.encoder.encode(std::slice::from_ref(row)) {
                Ok(rows) => encoded.extend(rows),
                // A prompt that fills the length: nothing is learned from it.
                Err(EncodeError::NoResponseLeft { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let start = decoder.target_values()?;
        let mut watch = Watch;
        let (values, steps) = fine_tune(&mut decoder, start, &encoded, settings, &mut watch)?;
        let targets = decoder.targets().iter().zip(values.iter());
        let tensors: Vec<_> = targets
            .map(|(target, values)| (target.name.clone(), target.shape.to_vec(), values.to_vec()))
            .collect();
        write_adapter(to, &tensors)?;
        Ok(steps.last().and_then(|step| step.g).unwrap_or(f64::NAN))
    }

    /// Writes the base with the adapter at `from` merged into it to `to`.
    pub(crate) fn merge(&self, from: &Path, to: &Path) -> Result<(), Failure> {
        let checkpoint = Checkpoint::open(from)?;
        let adapter = Adapter::of(&checkpoint, &AdapterConfig::read(&checkpoint)?)?;
        let merge = Merge {
            base: &self.checkpoint,
            tie_word_embeddings: self.tie_word_embeddings,
            checkpoint: &checkpoint,
            adapter: &adapter,
        };
        // A merge is of an adapter with a perturbation; this one's is nothing.
        let first = &adapter.modules()[0].b;
        let zeros = vec![0.0; first.elements()];
        let nothing = DeltaTensor::new(first.name, first.shape, &zeros);
        let wanted = Wanted::in_memory(nothing.into_iter().collect())?;
        let inputs = [self.path.as_path(), from];
        let mut output = OutputDir::create(to, Overwrite::Replace, &inputs)?;
        let _ = apply::merge(
            merge,
            &wanted,
            // As PEFT merges.
            ApplySettings {
                rounding: Rounding::Nearest,
                ..ApplySettings::default()
            },
            Destination::Directory(&mut output),
            &(),
        )?;
        let _ = output.commit()?;
        Ok(())
    }
}

/// Tensors with their names and shapes.
type Tensors = [(String, Vec<usize>, Vec<f32>)];

fn write_adapter(path: &Path, tensors: &Tensors) -> Result<(), Failure> {
    let mut output = OutputDir::create(path, Overwrite::Replace, &[])?;
    let config = json!({
        "base_model_name_or_path": null,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": RANK,
        "target_modules": ["k_proj", "q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    });
    output.write_file("adapter_config.json", format!("{config:#}\n").as_bytes())?;
    let stored: Vec<_> = tensors
        .iter()
        .map(|(name, shape, values)| {
            let shape = shape.clone();
            (name, StoredFloats { shape, values })
        })
        .collect();
    let mut file = output.create_file("adapter_model.safetensors")?;
    let named = stored.iter().map(|(name, tensor)| (*name, tensor));
    write_tensors(("format", "pt"), named, |bytes| file.write_all(bytes))?;
    file.finish()?;
    let _ = output.commit()?;
    Ok(())
}

/// Prints every tenth step.
struct Watch;

impl Observer for Watch {
    fn progress(&mut self, _what: &str, _done: usize, _total: usize) {}

    fn step(&mut self, record: &StepRecord) {
        if record.step % 10 == 9 {
            let loss = record.g.unwrap_or(f64::NAN);
            crate::say(&format!("    step {}: loss {loss:.3}", record.step + 1));
        }
    }

    fn state(&mut self, _state: &State<'_>) {}

    fn interrupted(&self) -> bool {
        false
    }
}

/// Rank and alpha of the adapters: those of the paper's scripts.
const RANK: usize = 32;
const ALPHA: usize = 4;
