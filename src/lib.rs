//! Restores the safety of a fine-tuned language model with a small optimized perturbation of its weights.
//!
//! The path, which the program `panacea-patch` takes with checks, progress and a manifest around it:
//!
//! ```no_run
//! use std::path::Path;
//! use panacea_formats::{Checkpoint, DeltaTensor, Destination, OutputDir, Overwrite};
//! use panacea_patch::apply::{ApplySettings, Wanted, apply};
//! use panacea_patch::data::{Encoder, SetPaths, Sets, TemplateChoice, TokenizerFiles};
//! use panacea_patch::model::{Config, Decoder, TargetSelection};
//! use panacea_patch::optimize::{Adaptive, Rows, Settings, Unobserved, optimize};
//!
//! let path = Path::new("my-finetune");
//! let checkpoint = Checkpoint::open(path)?;
//! let config = Config::parse(&std::fs::read_to_string(path.join("config.json"))?)?;
//!
//! let sets = Sets::open(&SetPaths::default())?;
//! let files = TokenizerFiles::find(|name| checkpoint.side_file(name))?;
//! let encoder = Encoder::open(&files, TemplateChoice::Auto, 256, config.vocab_size)?;
//! let rows = Rows {
//!     harmful: encoder.encode(&sets.harmful.rows)?,
//!     refusals: encoder.encode(&sets.refusals.rows)?,
//!     benign: encoder.encode(&sets.benign.rows)?,
//!     task: Vec::new(),
//! };
//!
//! let mut decoder = Decoder::new(config, checkpoint.tensors(), &TargetSelection::default())?;
//! let settings = Settings::Adaptive(Adaptive::default());
//! let found = optimize(&mut decoder, &rows, &settings, None, &mut Unobserved)?;
//!
//! let targets = decoder.targets().iter().zip(found.delta.iter());
//! let deltas = targets
//!     .filter_map(|(target, values)| DeltaTensor::new(&target.name, &target.shape, values))
//!     .collect();
//! let mut output = OutputDir::create(Path::new("my-finetune-safe"), Overwrite::Never, &[path])?;
//! let applied = apply(
//!     &checkpoint,
//!     &Wanted::in_memory(deltas)?,
//!     ApplySettings::default(),
//!     Destination::Directory(&mut output),
//!     &(),
//! )?;
//! assert!(applied.realized.total.moved > 0);
//! let _ = output.commit()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod apply;
pub mod compact;
pub mod convert;
pub mod data;
pub mod eval;
pub mod manifest;
pub mod model;
pub mod number;
pub mod optimize;
pub mod ranks;
pub mod report;
pub mod resume;
