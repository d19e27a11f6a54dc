//! Where a patched checkpoint goes, and the writing of it with its manifest and signature.
//!
//! In: an open checkpoint, what is to be added, and how it came about. Out: every file written, with its digest. A directory
//! appears at its path when all of it is on the disk. Of a lone file, the manifest and the signature beside it are moved to
//! their places first and the file last: where it is, they are.

use std::path::{Path, PathBuf};

use panacea_formats::{
    Checkpoint, Committed, Destination, Dtype, Layout, OutputDir, OutputFile, Overwrite, Sha256,
    SideFiles, WrittenFile, copied_bytes, shown,
};
use panacea_patch::apply::{Applied, ApplySettings, RealizedChange, Wanted};
use panacea_patch::convert::PatchedType;
use panacea_patch::convert::types::FileType;
use panacea_patch::manifest::{Byproduct, Dependency, FileName, Provenance, Role, Timestamp};
use serde_json::{Map, Value, json};

use super::args::{AdditionArgs, GgufArgs, WritingArgs};
use super::convert::{GgufRequest, refused};
use super::error::{Exit, Failure};
use super::model::{Model, digest_of};
use super::places::Places;
use super::report::{CopyWatch, Reporter, Table, bytes, number, percent};
use super::seal::{Seal, name_of};

/// A place for a patched checkpoint that was free, or may be replaced, when it was looked at.
#[derive(Debug)]
pub(super) struct Output {
    target: PathBuf,
    overwrite: Overwrite,
    /// What it is made from: it may be none of these.
    inputs: Vec<PathBuf>,
    seal: Seal,
    /// What the patched directory is to become, if it is not to stay one.
    gguf: Option<GgufOutput>,
}

/// A patched checkpoint on the disk.
#[derive(Debug)]
pub(super) struct Written {
    pub(super) target: PathBuf,
    /// Every file, manifest and signature included.
    pub(super) files: Vec<WrittenFile>,
    pub(super) realized: RealizedChange,
    /// The digest that names the key, when it is signed.
    pub(super) signed_with: Option<Sha256>,
}

/// How a patched checkpoint came about.
#[derive(Debug, Default)]
pub(super) struct Origin {
    /// What computed, as on a command line.
    pub(super) device: String,
    /// The options that change bytes.
    pub(super) parameters: Map<String, Value>,
    /// Inputs. Files of weights that are copied and not among them are added when they have been read.
    pub(super) dependencies: Vec<Dependency>,
    /// What was measured on the way.
    pub(super) byproducts: Vec<Byproduct>,
    /// How many processes shared the search, if there was one.
    pub(super) ranks: usize,
}

/// A GGUF file that a patched directory becomes.
#[derive(Debug)]
struct GgufOutput {
    file_type: FileType,
    pre: Option<String>,
    tokenizer_from: Option<PathBuf>,
    patched_type: Option<Dtype>,
}

impl Output {
    /// Looks at where the patched `model` would go, before any work is done for it. Writes nothing.
    ///
    /// # Errors
    /// When the place, the key, or the names of the files are refused, or the disk has no room.
    pub(super) fn plan(
        model: &Model,
        given: Option<&Path>,
        (args, addition, gguf): (&WritingArgs, &AdditionArgs, &GgufArgs),
        other_inputs: &[&Path],
    ) -> Result<Self, Failure> {
        let gguf = gguf.gguf.map(|file_type| GgufOutput {
            file_type,
            pre: gguf.pre.clone(),
            tokenizer_from: gguf.tokenizer_from.clone(),
            patched_type: addition.patched_type,
        });
        if gguf.is_some() {
            refuse_other_than_directory(model)?;
        }
        let target = match (given, &gguf) {
            (Some(path), _) => path.to_owned(),
            (None, None) => default_target(model)?,
            (None, Some(gguf)) => with_suffix(
                &default_target(model)?,
                &format!("-{}.gguf", gguf.file_type),
            ),
        };
        let overwrite = match args.force {
            true => Overwrite::Replace,
            false => Overwrite::Never,
        };
        let checkpoint = model.copied();
        let mut inputs = model.paths();
        // One that is missing is reported by whoever opens it.
        let others = other_inputs.iter().filter(|path| path.exists());
        inputs.extend(others.map(|path| (*path).to_owned()));
        inputs.extend(args.sign_key.clone());
        inputs.extend(gguf.iter().filter_map(|gguf| gguf.tokenizer_from.clone()));
        let output = Self {
            target,
            overwrite,
            inputs,
            seal: Seal::read(args.sign_key.as_deref())?,
            gguf,
        };
        let needed = copied_bytes(checkpoint)?.saturating_add(MANIFEST_ROOM);
        let inputs = output.inputs();
        match output.is_one_file(checkpoint) {
            true => {
                OutputFile::check(&output.target, overwrite, &inputs, needed)?;
                for path in output.seal.paths_beside(&output.target) {
                    OutputFile::check(&path, overwrite, &inputs, 0)?;
                }
            }
            false => OutputDir::check(&output.target, overwrite, &inputs, needed)?,
        }
        for name in file_names(checkpoint)? {
            name.parse::<FileName>()?;
        }
        Ok(output)
    }

    pub(super) fn target(&self) -> &Path {
        &self.target
    }

    /// Its places and inputs, for what else is written: neither there nor to these.
    pub(super) fn places(&self, checkpoint: &Checkpoint) -> Places {
        let mut taken = vec![self.target.clone()];
        if self.is_one_file(checkpoint) {
            taken.extend(self.seal.paths_beside(&self.target));
        }
        let taken = taken.into_iter().map(|path| ("--output", path));
        Places::beside(self.inputs.clone(), taken.collect(), self.overwrite)
    }

    /// Whether the copy of `checkpoint` will be one file.
    pub(super) fn is_one_file(&self, checkpoint: &Checkpoint) -> bool {
        self.gguf.is_some() || checkpoint.layout().is_one_file()
    }

    /// Whether it will be signed.
    pub(super) fn is_signed(&self) -> bool {
        self.seal.signs()
    }

    /// Writes `model` with `wanted` added. `origin` is asked for when the weights are written, with where they lie until the rest is: what it
    /// refuses is not written.
    ///
    /// # Errors
    /// When anything fails or the work is interrupted; the target is then as it was.
    pub(super) fn write(
        self,
        model: &Model,
        wanted: &Wanted<'_>,
        settings: ApplySettings,
        origin: impl FnOnce(&Path) -> Result<Origin, Failure>,
        reporter: &Reporter,
    ) -> Result<Written, Failure> {
        let total = copied_bytes(model.copied())?;
        reporter.stage(format!(
            "writing {}: {}",
            self.target.display(),
            bytes(total)
        ));
        let watch = CopyWatch::new(reporter, total);
        let one_file = self.is_one_file(model.copied());
        let written = match &self.gguf {
            Some(_) => self.write_gguf(model, wanted, settings, origin, &watch),
            None if one_file => self.write_file(model, wanted, settings, origin, &watch),
            None => self.write_directory(model, wanted, settings, origin, &watch),
        };
        watch.finish();
        let (written, side_files, committed) = written?;
        tell_of_side_files(&side_files, reporter);
        for (path, error) in committed.into_iter().filter_map(|it| it.left_behind) {
            reporter.note(format!(
                "what was replaced could not be deleted and lies at {}: {error}",
                path.display()
            ));
        }
        Ok(written)
    }

    fn write_directory(
        self,
        model: &Model,
        wanted: &Wanted<'_>,
        settings: ApplySettings,
        origin: impl FnOnce(&Path) -> Result<Origin, Failure>,
        watch: &CopyWatch,
    ) -> Result<(Written, SideFiles, Vec<Committed>), Failure> {
        let mut output = OutputDir::create(&self.target, self.overwrite, &self.inputs())?;
        output.require_space(copied_bytes(model.copied())?.saturating_add(MANIFEST_ROOM))?;
        let destination = Destination::Directory(&mut output);
        let applied = model.add(wanted, settings, destination, watch)?;
        let role = model.copied_role();
        let origin = origin(output.partial_path())?;
        let provenance = origin.provenance(&applied, &role, self.seal.finished_on())?;
        let mut files = applied.files;
        let name = name_of(&self.target);
        self.seal
            .add_to(&mut output, &name, &mut files, provenance)?;
        let committed = output.commit()?;
        let written = Written {
            files,
            realized: applied.realized,
            signed_with: self.seal.signed_with(),
            target: self.target,
        };
        Ok((written, applied.side_files, vec![committed]))
    }

    fn write_file(
        self,
        model: &Model,
        wanted: &Wanted<'_>,
        settings: ApplySettings,
        origin: impl FnOnce(&Path) -> Result<Origin, Failure>,
        watch: &CopyWatch,
    ) -> Result<(Written, SideFiles, Vec<Committed>), Failure> {
        let inputs = self.inputs();
        let mut output = OutputFile::create(&self.target, self.overwrite, &inputs)?;
        output.require_space(copied_bytes(model.copied())?.saturating_add(MANIFEST_ROOM))?;
        let applied = model.add(wanted, settings, Destination::File(&mut output), watch)?;
        output.finish()?;
        let role = model.copied_role();
        let origin = origin(output.partial_path())?;
        let provenance = origin.provenance(&applied, &role, self.seal.finished_on())?;
        let mut files = applied.files;
        let place = (self.target.as_path(), self.overwrite, inputs.as_slice());
        let committed = self
            .seal
            .commit_with(output, place, &mut files, provenance)?;
        let written = Written {
            files,
            realized: applied.realized,
            signed_with: self.seal.signed_with(),
            target: self.target,
        };
        Ok((written, applied.side_files, committed))
    }

    /// Writes the patched directory beside the target, and the target from it. The directory is removed again.
    fn write_gguf(
        self,
        model: &Model,
        wanted: &Wanted<'_>,
        settings: ApplySettings,
        origin: impl FnOnce(&Path) -> Result<Origin, Failure>,
        watch: &CopyWatch,
    ) -> Result<(Written, SideFiles, Vec<Committed>), Failure> {
        let Some(gguf) = &self.gguf else {
            return self.write_directory(model, wanted, settings, origin, watch);
        };
        let inputs = self.inputs();
        let mut output = OutputFile::create(&self.target, self.overwrite, &inputs)?;
        let beside = with_suffix(&self.target, ".patched");
        // Never committed, so that it goes away with its owner.
        let mut directory = OutputDir::create(&beside, Overwrite::Never, &inputs)?;
        directory.require_space(copied_bytes(model.copied())?.saturating_mul(2))?;
        let settings = ApplySettings {
            patched_type: None,
            ..settings
        };
        let destination = Destination::Directory(&mut directory);
        let applied = model.add(wanted, settings, destination, watch)?;
        let patched_type = gguf
            .patched_type
            .map(|dtype| PatchedType::of_names(dtype, wanted.names().map(str::to_owned)));
        let request = GgufRequest {
            source: model.copied().path(),
            name: &name_of(&named_path(model.copied().path())?),
            target: &self.target,
            file_type: gguf.file_type,
            pre: gguf.pre.as_deref(),
            tokenizer_from: gguf.tokenizer_from.as_deref(),
            patched: patched_type.as_ref(),
            max_shard_bytes: None,
        };
        let patched = Checkpoint::open(directory.partial_path())?;
        let (conversion, _) = request.plan(&patched)?;
        conversion
            .write(0, watch, |bytes| output.write_all(bytes))
            .map_err(|error| refused(request.source, error))?;
        let mut files = vec![output.finish()?];
        let mut origin = origin(output.partial_path())?;
        let parameters = &mut origin.parameters;
        parameters.insert("gguf".to_owned(), json!(gguf.file_type.name()));
        if let Some(pre) = &gguf.pre {
            parameters.insert("pre".to_owned(), json!(pre));
        }
        if let Some(path) = &gguf.tokenizer_from {
            origin.dependencies.push(Dependency {
                role: Role::Tokenizer,
                name: name_of(path),
                uri: None,
                digest: digest_of(path)?,
            });
        }
        let role = model.copied_role();
        let provenance = origin.provenance(&applied, &role, self.seal.finished_on())?;
        let place = (self.target.as_path(), self.overwrite, inputs.as_slice());
        let committed = self
            .seal
            .commit_with(output, place, &mut files, provenance)?;
        let written = Written {
            files,
            realized: applied.realized,
            signed_with: self.seal.signed_with(),
            target: self.target,
        };
        Ok((written, SideFiles::default(), committed))
    }

    fn inputs(&self) -> Vec<&Path> {
        self.inputs.iter().map(PathBuf::as_path).collect()
    }
}

impl Origin {
    /// What the manifest says of how `applied` came about.
    ///
    /// # Errors
    /// When weights are not those that the inputs name.
    fn provenance(
        self,
        applied: &Applied,
        role: &Role,
        finished_on: Option<Timestamp>,
    ) -> Result<Provenance, Failure> {
        let mut dependencies = Vec::new();
        for (name, digest) in &applied.sources {
            let known = |it: &&Dependency| it.role == *role && it.name == *name;
            match self.dependencies.iter().find(known) {
                Some(known) if known.digest != *digest => {
                    return Err(Failure::new(
                        Exit::Refused,
                        format!("`{}` is not what it was any more", shown(name)),
                    )
                    .because(format!(
                        "its digest was {} when the perturbation was looked for, and {digest} when it was copied",
                        known.digest
                    ))
                    .hint("run it again, and let nothing write to the model meanwhile"));
                }
                Some(_) => {}
                None => dependencies.push(Dependency {
                    role: role.clone(),
                    name: name.clone(),
                    uri: None,
                    digest: *digest,
                }),
            }
        }
        dependencies.extend(self.dependencies);
        for copy in copied_dependencies(&applied.side_files, &applied.files, role) {
            let same = |known: &Dependency| known.name == copy.name && known.role == copy.role;
            if !dependencies.iter().any(same) {
                dependencies.push(copy);
            }
        }
        let mut byproducts = self.byproducts;
        byproducts.push(byproduct("realized-change", json!(applied.realized.total)));
        Ok(Provenance {
            external_parameters: self.parameters,
            internal_parameters: internal_parameters(&self.device, self.ranks),
            dependencies,
            byproducts,
            finished_on,
            ..Provenance::default()
        })
    }
}

impl Written {
    /// The manifest among its files.
    pub(super) fn manifest(&self) -> Option<&WrittenFile> {
        let mut files = self.files.iter();
        files.find(|file| file.name.ends_with("manifest.json"))
    }

    /// The files in a report.
    pub(super) fn files_json(&self) -> Vec<Value> {
        files_json(&self.files)
    }

    /// What was made of what.
    pub(super) fn heading(&self, model: &Model) -> String {
        let (from, target) = (model.checkpoint.path().display(), self.target.display());
        match model.merges() {
            true => format!(
                "patched {from}, merged into {} -> {target}",
                model.whole().path().display()
            ),
            false => format!("patched {from} -> {target}"),
        }
    }

    /// What people read of it.
    pub(super) fn describe(&self, table: &mut Table) {
        let change = &self.realized.total;
        table.row(
            "moved",
            format!(
                "{} of {} elements in {} tensors",
                percent(change.moved_share()),
                change.elements,
                self.realized.tensors.len()
            ),
        );
        let cosine = change
            .cosine
            .map(|cosine| format!(", cosine {}", number(cosine)));
        table.row(
            "realized norm",
            format!(
                "{} of {} wanted{}, on weights of norm {}",
                number(change.realized_norm),
                number(change.wanted_norm),
                cosine.unwrap_or_default(),
                number(change.weight_norm)
            ),
        );
        if change.not_finite > 0 {
            table.row(
                "not finite",
                format!("{} elements were left as they are", change.not_finite),
            );
        }
        let total = self.files.iter().map(|file| file.bytes).sum();
        table.row("files", format!("{}, {}", self.files.len(), bytes(total)));
        if let Some(manifest) = self.manifest() {
            table.row(
                "manifest",
                format!("{}, sha256 {}", shown(&manifest.name), manifest.sha256),
            );
        }
        match &self.signed_with {
            Some(key) => table.row("signed with", format!("the key {key}")),
            None => table.row("signed with", "no key"),
        }
    }
}

/// Files in a report.
pub(super) fn files_json(files: &[WrittenFile]) -> Vec<Value> {
    files
        .iter()
        .map(|file| json!({"name": file.name, "bytes": file.bytes, "sha256": file.sha256}))
        .collect()
}

/// A measurement for a manifest.
pub(super) fn byproduct(name: &str, measured: Value) -> Byproduct {
    Byproduct {
        name: name.to_owned(),
        measured: object(measured),
    }
}

/// What a manifest says of how the work was done: several ranks sum in another order than one process.
fn internal_parameters(device: &str, ranks: usize) -> Map<String, Value> {
    let mut parameters = object(json!({"device": device}));
    if ranks > 1 {
        parameters.insert("ranks".to_owned(), json!(ranks));
    }
    parameters
}

/// The members of an object.
pub(super) fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(members) => members,
        _ => Map::new(),
    }
}

/// The side files that were copied, as inputs: their digests are those of the copies.
fn copied_dependencies(
    side_files: &SideFiles,
    written: &[WrittenFile],
    role: &Role,
) -> Vec<Dependency> {
    let digest_of = |name: &str| written.iter().find(|file| file.name == name);
    side_files
        .copied
        .iter()
        .filter_map(|file| {
            Some(Dependency {
                role: role.clone(),
                name: file.name.clone(),
                uri: None,
                digest: digest_of(&file.name)?.sha256,
            })
        })
        .collect()
}

/// Only a directory has all that a GGUF file is made of.
fn refuse_other_than_directory(model: &Model) -> Result<(), Failure> {
    match model.copied().layout() {
        Layout::Directory | Layout::Sharded => Ok(()),
        layout => {
            let path = model.copied().path().display();
            let failure = Failure::no_effect("--gguf", "here");
            Err(match layout {
                Layout::Gguf | Layout::SplitGguf => failure
                    .because(format!("`{path}` is a GGUF file already"))
                    .hint("leave out `--gguf`"),
                Layout::Adapter => failure
                    .because(format!("`{path}` is a LoRA adapter"))
                    .hint("pass `--merge`, or convert the patched adapter with `panacea-patch convert`"),
                _ => failure
                    .because(format!("`{path}` is one file"))
                    .hint("give the directory that it is in, or convert the patched file with `panacea-patch convert`"),
            })
        }
    }
}

/// `<dir>-panacea` or `<stem>.panacea.<extension>` beside the checkpoint; for a merged file, `<dir>-panacea.safetensors`.
fn default_target(model: &Model) -> Result<PathBuf, Failure> {
    let path = named_path(model.checkpoint.path())?;
    Ok(match model.copied().layout() {
        Layout::LoneFile if model.merges() => with_suffix(&path, "-panacea.safetensors"),
        layout if layout.is_one_file() => {
            let extension = path.extension().unwrap_or_default().to_string_lossy();
            path.with_extension(format!("panacea.{extension}"))
        }
        Layout::SplitGguf => {
            // Named after the whole, without the part's number.
            let name = name_of(&path.with_extension(""));
            let whole = name.split("-00001-of-").next().unwrap_or(&name);
            path.with_file_name(format!("{whole}-panacea"))
        }
        _ => with_suffix(&path, "-panacea"),
    })
}

/// `<stem>.perturbation.safetensors` beside the checkpoint.
pub(super) fn default_perturbation(checkpoint: &Checkpoint) -> Result<PathBuf, Failure> {
    let path = named_path(checkpoint.path())?;
    Ok(match checkpoint.layout() {
        layout if layout.is_one_file() => path.with_extension("perturbation.safetensors"),
        _ => with_suffix(&path, ".perturbation.safetensors"),
    })
}

/// The path itself, or what `.` and the like stand for.
pub(super) fn named_path(path: &Path) -> Result<PathBuf, Failure> {
    match path.file_name() {
        // Without a slash at the end, which would become part of a suffix's way.
        Some(name) => Ok(path.with_file_name(name)),
        None => std::fs::canonicalize(path).map_err(|error| {
            Failure::doing(
                Exit::Refused,
                format!("cannot find out what `{}` is called", path.display()),
                &error,
            )
            .hint("name the output with --output")
        }),
    }
}

pub(super) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut path = path.as_os_str().to_owned();
    path.push(suffix);
    PathBuf::from(path)
}

/// The names of all files that will be written from the checkpoint's own.
fn file_names(checkpoint: &Checkpoint) -> Result<Vec<String>, Failure> {
    let side_files = checkpoint.side_files()?;
    let weights = checkpoint.files().iter().map(|shard| shard.name.clone());
    let copied = side_files.copied.into_iter().map(|file| file.name);
    Ok(weights.chain(copied).collect())
}

fn tell_of_side_files(side_files: &SideFiles, reporter: &Reporter) {
    for (name, reason) in &side_files.left_out {
        reporter.note(format!("not copied: {} ({reason})", shown(name)));
    }
    for file in side_files.copied.iter().filter(|file| file.is_code) {
        reporter.note(format!(
            "copied as it is: {}, Python code that loaders may run",
            shown(&file.name)
        ));
    }
}

/// Room kept for the manifest and the signature, which grow with the number of files.
pub(super) const MANIFEST_ROOM: u64 = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_that_changed_since_the_search_are_refused_and_others_listed_first() {
        let (old, new) = (Sha256::of(b"old"), Sha256::of(b"new"));
        let applied = |digest| Applied {
            files: Vec::new(),
            sources: vec![("model.safetensors".to_owned(), digest)],
            side_files: SideFiles::default(),
            realized: RealizedChange::default(),
        };
        let origin = |names: &[&str]| Origin {
            dependencies: names
                .iter()
                .map(|name| Dependency {
                    role: Role::Checkpoint,
                    name: (*name).to_owned(),
                    uri: None,
                    digest: old,
                })
                .collect(),
            ..Origin::default()
        };
        let listed = |names, digest| -> Result<Vec<_>, _> {
            let provenance = origin(names).provenance(&applied(digest), &Role::Checkpoint, None)?;
            let dependencies = provenance.dependencies.into_iter();
            Ok::<_, Failure>(dependencies.map(|it| (it.name, it.digest)).collect())
        };
        let pair = |name: &str, digest| (name.to_owned(), digest);
        assert_eq!(
            listed(&["p"], new).unwrap(),
            [pair("model.safetensors", new), pair("p", old)]
        );
        let known = ["config.json", "model.safetensors"];
        assert_eq!(
            listed(&known, old).unwrap(),
            known.map(|name| pair(name, old))
        );
        let refusal = listed(&known, new).unwrap_err();
        assert_eq!(refusal.exit, Exit::Refused);
        let because = refusal.because.unwrap();
        assert!(because.contains(&old.to_string()) && because.contains(&new.to_string()));
    }
}
