//! `convert`: a Hugging Face checkpoint in and a GGUF file out, or the other way round.

mod adapter;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use panacea_formats::gguf::Metadata;
use panacea_formats::{
    Checkpoint, Dtype, FormatError, Layout, OutputDir, OutputFile, Overwrite, WrittenFile, shown,
};
use panacea_patch::convert::config::GgufConfig;
use panacea_patch::convert::general::Origins;
use panacea_patch::convert::tokenizer::{
    TokenizerError, TokenizerFolder, TokenizerOptions, to_metadata,
};
use panacea_patch::convert::types::FileType;
use panacea_patch::convert::{
    Conversion, ConvertError, GgufSettings, PatchedType, StoredModelError, Texts,
};
use panacea_patch::manifest::{
    Dependency, MANIFEST_NAME, Provenance, Role, Statement, manifest_path,
};
use rayon::prelude::*;
use serde_json::{Map, Value, json};

use super::args::{ConvertArgs, first_given};
use super::device::CPU;
use super::error::{Exit, Failure};
use super::find::required_side_file;
use super::inspect::is_perturbation;
use super::interrupt;
use super::model::digest_of;
use super::output::{MANIFEST_ROOM, files_json, named_path, object, with_suffix};
use super::plan::Plan;
use super::report::{CopyWatch, Report, Reporter, Table, bytes};
use super::seal::{Seal, name_of};

pub(super) fn run(args: &ConvertArgs, reporter: &Reporter) -> Result<(), Failure> {
    interrupt::listen()?;
    let checkpoint = Checkpoint::open(&args.source)?;
    reporter.stage(format!(
        "read the headers of {}: {} tensors",
        args.source.display(),
        checkpoint.tensors().count()
    ));
    let layout = checkpoint.layout();
    if layout == Layout::Adapter {
        return adapter::of_peft(args, &checkpoint, reporter);
    }
    if layout == Layout::LoneFile && is_perturbation(&args.source)? {
        return adapter::of_perturbation(args, &checkpoint, reporter);
    }
    if args.base.path.is_some() {
        return Err(Failure::no_effect("--base", "here")
            .because(format!("`{}` is a whole model", args.source.display()))
            .hint("leave out `--base`"));
    }
    match layout.is_gguf() {
        true => to_directory(args, &checkpoint, reporter),
        false => to_gguf(args, &checkpoint, reporter),
    }
}

fn to_directory(
    args: &ConvertArgs,
    checkpoint: &Checkpoint,
    reporter: &Reporter,
) -> Result<(), Failure> {
    let of_gguf = [
        ("--pre", args.pre.is_some()),
        ("--tokenizer-from", args.tokenizer_from.is_some()),
        ("--patched-type", args.patched_type.is_some()),
    ];
    if let Some(flag) = first_given(of_gguf) {
        return Err(Failure::no_effect(flag, "here")
            .because(format!(
                "`{}` is a GGUF file already",
                args.source.display()
            ))
            .hint(format!("leave out `{flag}`")));
    }
    let file_type = args.file_type.unwrap_or(FileType::BF16);
    let dtype = file_type.dtype();
    if !dtype.is_float() {
        return Err(
            Failure::usage(format!("`--type {file_type}` is no type of a directory"))
                .because("safetensors has no quantized types of llama.cpp's")
                .hint("pass `--type f32`, `f16` or `bf16`"),
        );
    }
    let target = match &args.output {
        Some(path) => path.clone(),
        None => with_suffix(&named_path(checkpoint.path())?.with_extension(""), "-hf"),
    };
    let shards = args.max_shard_bytes.map(|size| size.bytes());
    let conversion = Conversion::to_directory(checkpoint, dtype, shards)
        .map_err(|error| refused(&args.source, error))?;
    let job = Job {
        args,
        checkpoint,
        conversion,
        target,
        is_directory: true,
        role: Role::Checkpoint,
        direction: "gguf-to-huggingface",
        kind: file_type.name(),
        side_files: Vec::new(),
        parameters: Map::new(),
    };
    job.run(reporter)
}

fn to_gguf(
    args: &ConvertArgs,
    checkpoint: &Checkpoint,
    reporter: &Reporter,
) -> Result<(), Failure> {
    let mut manifests = Vec::new();
    let patched = args
        .patched_type
        .map(|dtype| patched_type(dtype, checkpoint, &mut manifests))
        .transpose()?;
    let file_type = args.file_type.unwrap_or_else(|| own_type(checkpoint));
    let named = named_path(checkpoint.path())?;
    let stem = match checkpoint.layout() {
        Layout::LoneFile => named.with_extension(""),
        _ => named,
    };
    let suffix = format!("-{file_type}.gguf");
    let is_directory = args.max_shard_bytes.is_some();
    let target = match (&args.output, is_directory) {
        (Some(path), _) => path.clone(),
        (None, false) => with_suffix(&stem, &suffix),
        (None, true) => with_suffix(&stem, suffix.trim_end_matches(".gguf")),
    };
    let request = GgufRequest {
        source: &args.source,
        name: &name_of(&stem),
        target: &target,
        file_type,
        pre: args.pre.as_deref(),
        tokenizer_from: args.tokenizer_from.as_deref(),
        patched: patched.as_ref(),
        max_shard_bytes: args.max_shard_bytes.map(|size| size.bytes()),
    };
    let (conversion, side_files) = request.plan(checkpoint)?;
    let mut parameters = Map::new();
    if let Some(pre) = &args.pre {
        parameters.insert("pre".to_owned(), json!(pre));
    }
    if let Some(dtype) = args.patched_type {
        parameters.insert("patched_type".to_owned(), json!(dtype.name()));
    }
    let side_files = side_files.into_iter().chain(manifests);
    let job = Job {
        args,
        checkpoint,
        conversion,
        is_directory,
        role: Role::Checkpoint,
        direction: "huggingface-to-gguf",
        kind: file_type.name(),
        side_files: side_files.map(|path| (Role::Checkpoint, path)).collect(),
        parameters,
        target,
    };
    job.run(reporter)
}

/// What a GGUF file is to be made of a whole model.
#[derive(Clone, Copy, Debug)]
pub(super) struct GgufRequest<'a> {
    /// What the user named.
    pub(super) source: &'a Path,
    /// What the model is called.
    pub(super) name: &'a str,
    /// The file, or the directory of its parts.
    pub(super) target: &'a Path,
    pub(super) file_type: FileType,
    pub(super) pre: Option<&'a str>,
    pub(super) tokenizer_from: Option<&'a Path>,
    pub(super) patched: Option<&'a PatchedType>,
    /// What a part may have; one file without.
    pub(super) max_shard_bytes: Option<u64>,
}

impl GgufRequest<'_> {
    /// Plans the file that `checkpoint` becomes, and tells which files beside its weights that took.
    ///
    /// # Errors
    /// When one of them cannot be read, or they do not make a model that GGUF has a place for.
    pub(super) fn plan<'c>(
        &self,
        checkpoint: &'c Checkpoint,
    ) -> Result<(Conversion<'c>, Vec<PathBuf>), Failure> {
        let mut side_files = vec![required_side_file(checkpoint, "config.json")?];
        let others = SIDE_FILES
            .iter()
            .filter_map(|name| checkpoint.side_file(name));
        side_files.extend(others);
        let config = read(&side_files[0])?;
        let optional = |name: &str| {
            checkpoint
                .side_file(name)
                .map(|path| read(&path))
                .transpose()
        };
        let card = optional("README.md")?;
        let generation = optional("generation_config.json")?;
        let parsed = GgufConfig::parse(&config)
            .map_err(|error| Failure::of_config(&side_files[0], &error))?;
        let tokenizer = self.tokenizer(checkpoint, &parsed)?;
        let json: Map<String, Value> = serde_json::from_str(&config).unwrap_or_default();
        let texts = Texts {
            config: &config,
            origins: Origins {
                directory: self.name,
                name_or_path: json.get("_name_or_path").and_then(Value::as_str),
                card: card.as_deref(),
                generation: generation.as_deref(),
            },
            tokenizer: &tokenizer,
        };
        let stem = match self.max_shard_bytes {
            Some(_) => name_of(self.target),
            None => name_of(&self.target.with_extension("")),
        };
        let settings = GgufSettings {
            file_type: self.file_type,
            patched: self.patched,
            stem: &stem,
            max_shard_bytes: self.max_shard_bytes,
        };
        let conversion = Conversion::to_gguf(checkpoint, texts, settings)
            .map_err(|error| refused(self.source, error))?;
        Ok((conversion, side_files))
    }

    /// The keys of the tokenizer.
    fn tokenizer(&self, checkpoint: &Checkpoint, config: &GgufConfig) -> Result<Metadata, Failure> {
        let base = self.tokenizer_from.map(Checkpoint::open).transpose()?;
        let from = match &base {
            None => None,
            Some(base) => Some(base.gguf_metadata().ok_or_else(|| {
                Failure::new(
                    Exit::Refused,
                    format!("`{}` is no GGUF file", base.path().display()),
                )
                .hint("name a GGUF file of the same base model with --tokenizer-from")
            })?),
        };
        let mut tokenizer = Metadata::default();
        let options = TokenizerOptions {
            architecture: config.architecture.name,
            vocabulary: config.config.vocab_size,
            pre: self.pre,
            from,
        };
        let folder = TokenizerFolder::find(|name| checkpoint.side_file(name));
        let tokenized = folder.and_then(|folder| to_metadata(&folder, &options, &mut tokenizer));
        tokenized.map_err(|error| refused(self.source, error.into()))?;
        Ok(tokenizer)
    }
}

/// Files of a directory that a GGUF file is made from, where they are there.
const SIDE_FILES: &[&str] = &[
    "README.md",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
];

/// A conversion that was planned.
struct Job<'a, 'c> {
    args: &'a ConvertArgs,
    checkpoint: &'c Checkpoint,
    /// What a manifest calls the source.
    role: Role,
    /// What is made of what, in a manifest.
    direction: &'static str,
    conversion: Conversion<'c>,
    target: PathBuf,
    /// Whether there will be several files, in a directory at `target`.
    is_directory: bool,
    /// The type's name.
    kind: &'static str,
    /// What is read besides weights.
    side_files: Vec<(Role, PathBuf)>,
    parameters: Map<String, Value>,
}

impl Job<'_, '_> {
    fn run(mut self, reporter: &Reporter) -> Result<(), Failure> {
        for loss in &self.conversion.losses {
            reporter.note(format!("the file cannot say {loss}"));
        }
        if self.conversion.left_out > 0 {
            reporter.note(format!(
                "left out: {} tensors of other towers than the decoder of text",
                self.conversion.left_out
            ));
        }
        let tokenizer = self.args.tokenizer_from.iter();
        self.side_files
            .extend(tokenizer.map(|path| (Role::Tokenizer, path.clone())));
        let seal = Seal::read(self.args.writing.sign_key.as_deref())?;
        let inputs = self.inputs();
        let inputs: Vec<&Path> = inputs.iter().map(PathBuf::as_path).collect();
        let overwrite = match self.args.writing.force {
            true => Overwrite::Replace,
            false => Overwrite::Never,
        };
        let needed = self.conversion.bytes().saturating_add(MANIFEST_ROOM);
        match self.is_directory {
            true => OutputDir::check(&self.target, overwrite, &inputs, needed)?,
            false => {
                OutputFile::check(&self.target, overwrite, &inputs, needed)?;
                for path in seal.paths_beside(&self.target) {
                    OutputFile::check(&path, overwrite, &inputs, 0)?;
                }
            }
        }
        if self.args.writing.dry_run {
            return self.plan(&seal).print("convert", reporter);
        }
        let total = self.conversion.bytes();
        reporter.stage(format!(
            "writing {}: {}",
            self.target.display(),
            bytes(total)
        ));
        let watch = CopyWatch::new(reporter, total);
        let written = match self.is_directory {
            true => self.write_directory(&seal, overwrite, &inputs, &watch),
            false => self.write_file(&seal, overwrite, &inputs, &watch),
        };
        watch.finish();
        let (files, left_behind) = written?;
        for (path, error) in left_behind {
            reporter.note(format!(
                "what was replaced could not be deleted and lies at {}: {error}",
                path.display()
            ));
        }
        self.report(&seal, &files, reporter)
    }

    /// What the output may not be, nor lie in.
    fn inputs(&self) -> Vec<PathBuf> {
        let mut inputs = vec![self.checkpoint.path().to_owned()];
        inputs.extend(self.side_files.iter().map(|(_, path)| path.clone()));
        inputs.extend(self.args.writing.sign_key.clone());
        inputs
    }

    fn write_directory(
        &self,
        seal: &Seal,
        overwrite: Overwrite,
        inputs: &[&Path],
        watch: &CopyWatch,
    ) -> Result<Outcome, Failure> {
        let mut output = OutputDir::create(&self.target, overwrite, inputs)?;
        output.require_space(self.conversion.bytes().saturating_add(MANIFEST_ROOM))?;
        let (files, dependencies) = self.with_digests(|| {
            let mut files: Vec<WrittenFile> = Vec::new();
            for (i, (name, _)) in self.conversion.weights().enumerate() {
                let mut file = output.create_file(name)?;
                let write = |bytes: &[u8]| file.write_all(bytes);
                let written = self.conversion.write(i, watch, write);
                written.map_err(|error| refused(&self.args.source, error))?;
                files.push(file.finish()?);
            }
            for (name, text) in self.conversion.texts() {
                files.push(output.write_file(name, text.as_bytes())?);
            }
            files.sort_by(|a, b| a.name.cmp(&b.name));
            Ok(files)
        })?;
        let mut files = files;
        let provenance = self.provenance(dependencies, seal);
        seal.add_to(&mut output, &name_of(&self.target), &mut files, provenance)?;
        let committed = output.commit()?;
        Ok((files, committed.left_behind.into_iter().collect()))
    }

    fn write_file(
        &self,
        seal: &Seal,
        overwrite: Overwrite,
        inputs: &[&Path],
        watch: &CopyWatch,
    ) -> Result<Outcome, Failure> {
        let mut output = OutputFile::create(&self.target, overwrite, inputs)?;
        output.require_space(self.conversion.bytes().saturating_add(MANIFEST_ROOM))?;
        let (file, dependencies) = self.with_digests(|| {
            let write = |bytes: &[u8]| output.write_all(bytes);
            let written = self.conversion.write(0, watch, write);
            written.map_err(|error| refused(&self.args.source, error))?;
            Ok(output.finish()?)
        })?;
        let mut files = vec![file];
        let provenance = self.provenance(dependencies, seal);
        let place = (self.target.as_path(), overwrite, inputs);
        let committed = seal.commit_with(output, place, &mut files, provenance)?;
        let left_behind = committed.into_iter().filter_map(|it| it.left_behind);
        Ok((files, left_behind.collect()))
    }

    /// Does `work`, and hashes what is read at the same time.
    fn with_digests<T>(
        &self,
        work: impl FnOnce() -> Result<T, Failure> + Send,
    ) -> Result<(T, Vec<Dependency>), Failure>
    where
        T: Send,
    {
        let (done, digests) = rayon::join(work, || self.dependencies());
        Ok((done?, digests?))
    }

    /// Every file that is read, with its digest.
    fn dependencies(&self) -> Result<Vec<Dependency>, Failure> {
        let dependency = |role: Role, name: String, digest| Dependency {
            role,
            name,
            uri: None,
            digest,
        };
        let shards = self.checkpoint.files().par_iter();
        let mut all: Vec<Dependency> = shards
            .map(|shard| dependency(self.role.clone(), shard.name.clone(), shard.file.digest()))
            .collect();
        for (role, path) in &self.side_files {
            all.push(dependency(role.clone(), name_of(path), digest_of(path)?));
        }
        Ok(all)
    }

    fn provenance(&self, dependencies: Vec<Dependency>, seal: &Seal) -> Provenance {
        let mut parameters = self.parameters.clone();
        parameters.insert("conversion".to_owned(), json!(self.direction));
        parameters.insert("type".to_owned(), json!(self.kind));
        if let Some(size) = self.args.max_shard_bytes {
            parameters.insert("max_shard_bytes".to_owned(), json!(size.bytes()));
        }
        Provenance {
            external_parameters: parameters,
            internal_parameters: object(json!({"device": CPU})),
            dependencies,
            finished_on: seal.finished_on(),
            ..Provenance::default()
        }
    }

    fn plan(&self, seal: &Seal) -> Plan {
        let mut reads: Vec<(String, u64)> = self
            .checkpoint
            .files()
            .iter()
            .map(|shard| (shard.name.clone(), shard.file.length() as u64))
            .collect();
        for (_, path) in &self.side_files {
            let length = std::fs::metadata(path).map_or(0, |metadata| metadata.len());
            reads.push((name_of(path), length));
        }
        let target = self.target.display();
        let writes = match self.is_directory {
            true => {
                let weights = self.conversion.weights().map(|(name, _)| name);
                let texts = self.conversion.texts().map(|(name, _)| name);
                let signature = seal.signs().then_some("model.sig");
                let all = weights.chain(texts).chain([MANIFEST_NAME]).chain(signature);
                all.map(|name| format!("{target}/{name}")).collect()
            }
            false => {
                let beside = seal.paths_beside(&self.target);
                let beside = beside.iter().map(|path| path.display().to_string());
                std::iter::once(target.to_string()).chain(beside).collect()
            }
        };
        Plan::of_conversion(&self.target, reads, writes, self.conversion.bytes())
    }

    fn report(
        &self,
        seal: &Seal,
        files: &[WrittenFile],
        reporter: &Reporter,
    ) -> Result<(), Failure> {
        // By type, the largest share first.
        let mut types: BTreeMap<&str, (usize, u64)> = BTreeMap::new();
        for (_, dtype, shape) in self.conversion.tensors() {
            let elements: usize = shape.iter().product();
            let (count, all) = types.entry(dtype.name()).or_default();
            *count += 1;
            *all += elements as u64;
        }
        let mut shares: Vec<_> = types.iter().collect();
        shares.sort_by_key(|&(name, &(_, elements))| (std::cmp::Reverse(elements), name));
        let shares: Vec<String> = shares
            .into_iter()
            .map(|(name, (count, _))| format!("{count} {name}"))
            .collect();
        let mut table = Table::new();
        table.heading(format!(
            "converted {} -> {}",
            self.args.source.display(),
            self.target.display()
        ));
        table.row("type", self.kind);
        table.row("tensors", shares.join(", "));
        let total = files.iter().map(|file| file.bytes).sum();
        table.row("files", format!("{}, {}", files.len(), bytes(total)));
        let manifest = files
            .iter()
            .find(|file| file.name.ends_with("manifest.json"));
        if let Some(manifest) = manifest {
            table.row(
                "manifest",
                format!("{}, sha256 {}", shown(&manifest.name), manifest.sha256),
            );
        }
        match seal.signed_with() {
            Some(key) => table.row("signed with", format!("the key {key}")),
            None => table.row("signed with", "no key"),
        }
        let counts: BTreeMap<_, _> = types
            .iter()
            .map(|(name, (count, _))| (name, count))
            .collect();
        let report = Report {
            output: Some(self.target.display().to_string()),
            found: Some(json!({
                "conversion": self.direction,
                "type": self.kind,
                "tensors": counts,
                "losses": self.conversion.losses,
                "left_out": self.conversion.left_out,
            })),
            files: Some(files_json(files)),
            ..Report::of("convert")
        };
        reporter.result(report, &table)
    }
}

/// Files that were written, and what could not be deleted.
type Outcome = (Vec<WrittenFile>, Vec<(PathBuf, std::io::Error)>);

fn read(path: &Path) -> Result<String, Failure> {
    std::fs::read_to_string(path).map_err(|error| Failure::from(FormatError::new(path, error)))
}

/// The type that loses nothing: that of the first matrix, if it is a float.
fn own_type(checkpoint: &Checkpoint) -> FileType {
    let mut matrices = checkpoint
        .tensors()
        .filter(|tensor| tensor.shape.len() == 2);
    match matrices.next().map(|tensor| tensor.dtype) {
        Some(Dtype::BF16) => FileType::BF16,
        Some(Dtype::F32) => FileType::F32,
        _ => FileType::F16,
    }
}

/// The type of patched tensors, and which these are by the manifest beside the checkpoint, which joins the files that are read.
fn patched_type(
    dtype: Dtype,
    checkpoint: &Checkpoint,
    side_files: &mut Vec<PathBuf>,
) -> Result<PatchedType, Failure> {
    let path = match checkpoint.layout() {
        Layout::LoneFile => manifest_path(checkpoint.path()),
        _ => checkpoint.path().join(MANIFEST_NAME),
    };
    let what = "it is not known which tensors were patched";
    let hint = "give the directory that the patch was written to, or leave out --patched-type";
    let bytes = std::fs::read(&path).map_err(|error| {
        let failure = Failure::from(FormatError::new(&path, error));
        Failure::new(failure.exit, what)
            .because(format!("`{}` cannot be read", path.display()))
            .hint(hint)
    })?;
    let manifest = Statement::parse(&bytes)
        .map_err(|error| Failure::doing(Exit::Refused, what, &error).hint(hint))?;
    side_files.push(path);
    PatchedType::of_manifest(dtype, &manifest)
        .map_err(|error| Failure::doing(Exit::Refused, what, &error).hint(hint))
}

/// Why `source` is not converted, and what to do.
pub(super) fn refused(source: &Path, error: ConvertError) -> Failure {
    let hint = match &error {
        ConvertError::Interrupted => return Failure::interrupted(),
        ConvertError::Output(_) | ConvertError::Source(_) => None,
        ConvertError::Tokenizer(error)
        | ConvertError::Stored(StoredModelError::Tokenizer(error)) => tokenizer_hint(error),
        ConvertError::NoPlace { .. } => Some(
            "llama.cpp has no such tensor; leave it out of a copy of the checkpoint if nothing computes with it",
        ),
        ConvertError::NotHeld { .. } => Some("pass `--type bf16` or `--type f32`"),
        ConvertError::PatchedType { .. } => {
            Some("pass a type of smaller blocks, such as `--patched-type q8_0`, or `f16`")
        }
        ConvertError::Vocabulary { .. } => Some(
            "the tokenizer is of another model; take that of the base with --tokenizer-from base.gguf",
        ),
        ConvertError::Weights(_) => {
            Some("`config.json` and the weights are not of the same model; use its own")
        }
        ConvertError::TooManyParts { .. } => Some("raise --max-shard-bytes"),
        _ => None,
    };
    let what = format!("cannot convert `{}`", source.display());
    let failure = match error {
        ConvertError::Output(error) => return error.into(),
        ConvertError::Source(error) => return error.into(),
        error => Failure::doing(Exit::Refused, what, &error),
    };
    match hint {
        Some(hint) => failure.hint(hint),
        None => failure,
    }
}

fn tokenizer_hint(error: &TokenizerError) -> Option<&'static str> {
    match error {
        TokenizerError::Io { .. } => None,
        _ => Some(
            "name the way it cuts text with --pre, or take the tokenizer of the base with --tokenizer-from base.gguf",
        ),
    }
}
