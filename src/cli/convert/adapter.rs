//! A LoRA adapter, or a perturbation of low rank, in, and a GGUF adapter out, for llama.cpp's `--lora`.

use std::path::PathBuf;

use panacea_formats::{
    ADAPTER_CONFIG_FILE, Adapter, AdapterConfig, Checkpoint, Layout, Perturbation,
};
use panacea_patch::convert::types::FileType;
use panacea_patch::convert::{AdapterBase, AdapterSettings, Conversion, ConvertError};
use panacea_patch::manifest::Role;
use serde_json::Map;

use super::{Job, read, refused};
use crate::cli::args::{ConvertArgs, first_given};
use crate::cli::base;
use crate::cli::error::Failure;
use crate::cli::find::required_side_file;
use crate::cli::output::{named_path, with_suffix};
use crate::cli::report::Reporter;
use crate::cli::seal::name_of;

/// Writes the GGUF adapter of a PEFT directory.
pub(super) fn of_peft(
    args: &ConvertArgs,
    checkpoint: &Checkpoint,
    reporter: &Reporter,
) -> Result<(), Failure> {
    refuse_flags(args)?;
    let config = AdapterConfig::read(checkpoint)?;
    let adapter = Adapter::of(checkpoint, &config)?;
    let path = base::find(checkpoint.path(), &config, args.base.path.as_deref())?;
    let (base, mut side_files) = base_at(args, path)?;
    side_files.push((
        Role::Checkpoint,
        checkpoint.path().join(ADAPTER_CONFIG_FILE),
    ));
    run(
        args,
        (checkpoint, Role::Checkpoint),
        side_files,
        |settings| Conversion::of_adapter(checkpoint, &adapter, base, settings),
        reporter,
    )
}

/// Writes the GGUF adapter of a perturbation.
pub(super) fn of_perturbation(
    args: &ConvertArgs,
    checkpoint: &Checkpoint,
    reporter: &Reporter,
) -> Result<(), Failure> {
    refuse_flags(args)?;
    let perturbation = Perturbation::open(checkpoint.path())?;
    let Some(path) = args.base.path.clone() else {
        return Err(
            Failure::usage("a perturbation does not say what GGUF calls its tensors")
                .because("that follows from the model that it was made for")
                .hint("name the model with --base"),
        );
    };
    let (base, side_files) = base_at(args, path)?;
    run(
        args,
        (checkpoint, Role::Perturbation),
        side_files,
        |settings| Conversion::of_perturbation(checkpoint, &perturbation, base, settings),
        reporter,
    )
}

fn run<'c>(
    args: &ConvertArgs,
    (checkpoint, role): (&'c Checkpoint, Role),
    side_files: Vec<(Role, PathBuf)>,
    plan: impl FnOnce(AdapterSettings<'_>) -> Result<Conversion<'c>, ConvertError>,
    reporter: &Reporter,
) -> Result<(), Failure> {
    let named = named_path(checkpoint.path())?;
    let stem = match checkpoint.layout() {
        Layout::LoneFile => named.with_extension(""),
        _ => named,
    };
    let target = match &args.output {
        Some(path) => path.clone(),
        None => with_suffix(&stem, "-lora.gguf"),
    };
    let file = target.file_stem().unwrap_or_default().to_string_lossy();
    let name = name_of(&stem);
    let settings = AdapterSettings {
        stem: &file,
        name: &name,
    };
    let conversion = plan(settings).map_err(|error| refused(&args.source, error))?;
    let job = Job {
        args,
        checkpoint,
        role,
        conversion,
        target,
        is_directory: false,
        kind: FileType::F32.name(),
        direction: "adapter-to-gguf",
        side_files,
        parameters: Map::new(),
    };
    job.run(reporter)
}

/// The base at `path`, and the file that says what it is, if that is not its own metadata.
fn base_at(args: &ConvertArgs, path: PathBuf) -> Result<BaseAndFiles, Failure> {
    let base = Checkpoint::open(&path)?;
    if base.layout().is_gguf() {
        let base = AdapterBase::of_gguf(&base).map_err(|error| refused(&args.source, error))?;
        return Ok((base, Vec::new()));
    }
    let config = required_side_file(&base, "config.json")?;
    let base = AdapterBase::of_config(&read(&config)?);
    Ok((
        base.map_err(|error| refused(&args.source, error))?,
        vec![(Role::Base, config)],
    ))
}

/// A base, and what of it is read.
type BaseAndFiles = (AdapterBase, Vec<(Role, PathBuf)>);

/// Refuses what an adapter has no use for.
fn refuse_flags(args: &ConvertArgs) -> Result<(), Failure> {
    let flags = [
        ("--pre", args.pre.is_some()),
        ("--tokenizer-from", args.tokenizer_from.is_some()),
        ("--patched-type", args.patched_type.is_some()),
        ("--max-shard-bytes", args.max_shard_bytes.is_some()),
        (
            "--type",
            args.file_type.is_some_and(|it| it != FileType::F32),
        ),
    ];
    match first_given(flags) {
        None => Ok(()),
        Some(flag) => Err(Failure::no_effect(flag, "here")
            .because("adapters are one file of F32 tensors, without a tokenizer")
            .hint(format!("leave out `{flag}`"))),
    }
}
