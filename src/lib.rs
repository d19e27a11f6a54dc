//! Restores the safety of a fine-tuned language model with a small optimized perturbation of its weights.
//!
//! The path, which the command line follows too: open, optimize, apply, write; then a manifest and a signature.
//!
//! ```no_run
//! use std::path::Path;
//!
//! use panacea_formats::{Checkpoint, DeltaTensor, Destination, OutputDir, Overwrite};
//! use panacea_patch::apply::{ApplySettings, Wanted, apply};
//! use panacea_patch::data::{Encoder, SetPaths, Sets, TemplateChoice, TokenizerFiles};
//! use panacea_patch::model::{Config, Decoder, TargetSelection};
//! use panacea_patch::optimize::{Adaptive, Rows, Settings, Unobserved, optimize};
//!
//! // A checkpoint's headers, its config and its tokenizer; tensors stay on the disk.
//! let checkpoint = Checkpoint::open(Path::new("my-finetune"))?;
//! let config = checkpoint.side_file("config.json").ok_or("no config.json")?;
//! let config = Config::parse(&std::fs::read_to_string(config)?)?;
//! let tokenizer = TokenizerFiles::find(|name| checkpoint.side_file(name))?;
//! let encoder = Encoder::open(&tokenizer, TemplateChoice::Auto, 256, config.vocab_size)?;
//!
//! // The built-in sets as tokens, and the perturbation that they lead to.
//! let sets = Sets::open(&SetPaths::default())?;
//! let rows = Rows {
//!     harmful: encoder.encode(&sets.harmful.rows)?,
//!     refusals: encoder.encode(&sets.refusals.rows)?,
//!     task: Vec::new(),
//!     benign: encoder.encode(&sets.benign.rows)?,
//! };
//! let mut decoder = Decoder::new(config, checkpoint.tensors(), &TargetSelection::default())?;
//! let settings = Settings::Adaptive(Adaptive::default());
//! let outcome = optimize(&mut decoder, &rows, &settings, None, &mut Unobserved)?;
//!
//! // The patched copy, complete at its path after `commit`.
//! let targets = decoder.targets().iter().zip(outcome.delta.iter());
//! let deltas = targets.filter_map(|(target, values)| DeltaTensor::new(&target.name, &target.shape, values));
//! let wanted = Wanted::in_memory(deltas.collect())?;
//! let mut output = OutputDir::create(Path::new("my-finetune-safe"), Overwrite::Never, &[checkpoint.path()])?;
//! let applied = apply(&checkpoint, &wanted, ApplySettings::default(), Destination::Directory(&mut output), &())?;
//! let realized = applied.realized.total.realized_norm;
//! output.commit()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod data;
pub mod model;

pub mod optimize;
pub mod resume;

pub mod apply;

pub mod manifest;
