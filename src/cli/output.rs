//! Where a patched checkpoint goes, and the writing of it with its manifest and signature.
//!
//! In: an open checkpoint, what is to be added, and how it came about. Out: every file written, with its digest. A directory
//! appears at its path when all of it is on the disk. Of a lone file, the manifest and the signature beside it are moved to
//! their places first and the file last: where it is, they are.

use std::path::{Path, PathBuf};

use panacea_formats::{
    Checkpoint, Committed, Destination, Layout, OutputDir, OutputFile, Overwrite, Sha256,
    SideFiles, WrittenFile, copied_bytes, shown,
};
use panacea_patch::apply::{Applied, ApplySettings, RealizedChange, Wanted};
use panacea_patch::manifest::{
    Byproduct, Dependency, FileDigest, FileName, MANIFEST_NAME, PrivateKey, Provenance, Role,
    SIGNATURE_NAME, Signature, Statement, Timestamp, ignored_by_default, manifest_path,
    signature_path,
};
use serde_json::{Map, Value, json};

use super::args::WritingArgs;
use super::error::{Exit, Failure};
use super::model::Model;
use super::report::{CopyWatch, Reporter, Table, bytes, number, percent};

/// A place for a patched checkpoint that was free, or may be replaced, when it was looked at.
#[derive(Debug)]
pub(super) struct Output {
    target: PathBuf,
    overwrite: Overwrite,
    /// What it is made from: it may be none of these.
    inputs: Vec<PathBuf>,
    key: Option<PrivateKey>,
    finished_on: Option<Timestamp>,
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
    /// The options that change bytes.
    pub(super) parameters: Map<String, Value>,
    /// Inputs. Files of weights that are copied and not among them are added when they have been read.
    pub(super) dependencies: Vec<Dependency>,
    /// What was measured on the way.
    pub(super) byproducts: Vec<Byproduct>,
}

impl Output {
    /// Looks at where the patched `model` would go, before any work is done for it. Writes nothing.
    ///
    /// # Errors
    /// When the place, the key, or the names of the files are refused, or the disk has no room.
    pub(super) fn plan(
        model: &Model,
        given: Option<&Path>,
        args: &WritingArgs,
        other_inputs: &[&Path],
    ) -> Result<Self, Failure> {
        let target = match given {
            Some(path) => path.to_owned(),
            None => default_target(model)?,
        };
        let overwrite = match args.force {
            true => Overwrite::Replace,
            false => Overwrite::Never,
        };
        let checkpoint = model.copied();
        let mut inputs: Vec<PathBuf> = model.paths().into_iter().map(Path::to_owned).collect();
        // One that is missing is reported by whoever opens it.
        let others = other_inputs.iter().filter(|path| path.exists());
        inputs.extend(others.map(|path| (*path).to_owned()));
        inputs.extend(args.sign_key.clone());
        let output = Self {
            target,
            overwrite,
            inputs,
            key: args.sign_key.as_deref().map(PrivateKey::read).transpose()?,
            finished_on: source_date()?,
        };
        let needed = copied_bytes(checkpoint)?.saturating_add(MANIFEST_ROOM);
        let inputs = output.inputs();
        match checkpoint.layout() {
            layout if layout.is_one_file() => {
                OutputFile::check(&output.target, overwrite, &inputs, needed)?;
                for path in output.beside() {
                    OutputFile::check(&path, overwrite, &inputs, 0)?;
                }
            }
            _ => OutputDir::check(&output.target, overwrite, &inputs, needed)?,
        }
        for name in file_names(checkpoint)? {
            name.parse::<FileName>()?;
        }
        Ok(output)
    }

    pub(super) fn target(&self) -> &Path {
        &self.target
    }

    /// Whether it will be signed.
    pub(super) fn is_signed(&self) -> bool {
        self.key.is_some()
    }

    /// Writes `model` with `wanted` added. `origin` is asked for when the weights are written.
    ///
    /// # Errors
    /// When anything fails or the work is interrupted; the target is then as it was.
    pub(super) fn write(
        self,
        model: &Model,
        wanted: &Wanted<'_>,
        settings: ApplySettings,
        origin: impl FnOnce() -> Origin,
        reporter: &Reporter,
    ) -> Result<Written, Failure> {
        let total = copied_bytes(model.copied())?;
        reporter.stage(format!(
            "writing {}: {}",
            self.target.display(),
            bytes(total)
        ));
        let watch = CopyWatch::new(reporter, total);
        let written = match model.copied().layout() {
            layout if layout.is_one_file() => {
                self.write_file(model, wanted, settings, origin, &watch)
            }
            _ => self.write_directory(model, wanted, settings, origin, &watch),
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
        origin: impl FnOnce() -> Origin,
        watch: &CopyWatch,
    ) -> Result<(Written, SideFiles, Vec<Committed>), Failure> {
        let mut output = OutputDir::create(&self.target, self.overwrite, &self.inputs())?;
        output.require_space(copied_bytes(model.copied())?.saturating_add(MANIFEST_ROOM))?;
        let destination = Destination::Directory(&mut output);
        let applied = model.add(wanted, settings, destination, watch)?;
        let ignored = ignored_by_default(Some(SIGNATURE_NAME.parse()?));
        // The repository's own files are in no signature, so that they may change; nor are they subjects of the manifest.
        let mut listed: Vec<FileDigest> = Vec::new();
        for file in &applied.files {
            let name: FileName = file.name.parse()?;
            if !ignored.iter().any(|ignored| name.is_within(ignored)) {
                listed.push(FileDigest {
                    name,
                    digest: file.sha256,
                });
            }
        }
        let role = model.copied_role();
        let provenance = origin().provenance(&applied, &role, self.finished_on)?;
        let manifest = Statement::new(listed.clone(), provenance)?.to_json();
        let mut files = applied.files;
        let manifest = output.write_file(MANIFEST_NAME, manifest.as_bytes())?;
        listed.push(FileDigest {
            name: MANIFEST_NAME.parse()?,
            digest: manifest.sha256,
        });
        files.push(manifest);
        if let Some(key) = &self.key {
            let signature = Signature::of_directory(&self.name(), listed, ignored, key)?;
            files.push(output.write_file(SIGNATURE_NAME, signature.to_json().as_bytes())?);
        }
        let committed = output.commit()?;
        let written = Written {
            files,
            realized: applied.realized,
            signed_with: self.key.map(|key| key.public_key().hint()),
            target: self.target,
        };
        Ok((written, applied.side_files, vec![committed]))
    }

    fn write_file(
        self,
        model: &Model,
        wanted: &Wanted<'_>,
        settings: ApplySettings,
        origin: impl FnOnce() -> Origin,
        watch: &CopyWatch,
    ) -> Result<(Written, SideFiles, Vec<Committed>), Failure> {
        let inputs = self.inputs();
        let mut output = OutputFile::create(&self.target, self.overwrite, &inputs)?;
        output.require_space(copied_bytes(model.copied())?.saturating_add(MANIFEST_ROOM))?;
        let applied = model.add(wanted, settings, Destination::File(&mut output), watch)?;
        let weights = output.finish()?;
        let role = model.copied_role();
        let provenance = origin().provenance(&applied, &role, self.finished_on)?;
        let subject = FileDigest {
            name: weights.name.parse()?,
            digest: weights.sha256,
        };
        let text = Statement::new(vec![subject], provenance)?.to_json();
        let digest = Sha256::of(text.as_bytes());
        let mut beside = vec![(manifest_path(&self.target), text)];
        if let Some(key) = &self.key {
            let signature = Signature::of_file(&self.name(), weights.sha256, Some(digest), key);
            beside.push((signature_path(&self.target), signature.to_json()));
        }
        let mut files = applied.files;
        let mut outputs = Vec::new();
        for (path, text) in &beside {
            let mut output = OutputFile::create(path, self.overwrite, &inputs)?;
            output.write_all(text.as_bytes())?;
            files.push(output.finish()?);
            outputs.push(output);
        }
        let mut committed = Vec::new();
        for output in outputs {
            committed.push(output.commit()?);
        }
        if self.overwrite == Overwrite::Replace && self.key.is_none() {
            // A signature of the bytes that are replaced would only make the new ones look forged.
            match std::fs::remove_file(signature_path(&self.target)) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(Failure::doing(
                        Exit::Environment,
                        "cannot remove the signature of the file that is replaced",
                        &error,
                    ));
                }
                _ => {}
            }
        }
        committed.push(output.commit()?);
        let written = Written {
            files,
            realized: applied.realized,
            signed_with: self.key.map(|key| key.public_key().hint()),
            target: self.target,
        };
        Ok((written, applied.side_files, committed))
    }

    fn inputs(&self) -> Vec<&Path> {
        self.inputs.iter().map(PathBuf::as_path).collect()
    }

    /// Files that belong beside a lone file.
    fn beside(&self) -> Vec<PathBuf> {
        let mut paths = vec![manifest_path(&self.target)];
        if self.is_signed() {
            paths.push(signature_path(&self.target));
        }
        paths
    }

    /// What the checkpoint is called in its signature.
    fn name(&self) -> String {
        let name = self.target.file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
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
            internal_parameters: object(json!({"device": "cpu"})),
            dependencies,
            byproducts,
            finished_on,
            ..Provenance::default()
        })
    }
}

impl Written {
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
        if let Some(manifest) = self
            .files
            .iter()
            .find(|file| file.name.ends_with("manifest.json"))
        {
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

/// `<dir>-panacea` or `<stem>.panacea.<extension>` beside the checkpoint; for a merged file, `<dir>-panacea.safetensors`.
fn default_target(model: &Model) -> Result<PathBuf, Failure> {
    let path = named_path(model.checkpoint.path())?;
    Ok(match model.copied().layout() {
        Layout::LoneFile if model.merges() => with_suffix(&path, "-panacea.safetensors"),
        layout if layout.is_one_file() => {
            let extension = path.extension().unwrap_or_default().to_string_lossy();
            path.with_extension(format!("panacea.{extension}"))
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
fn named_path(path: &Path) -> Result<PathBuf, Failure> {
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

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
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

/// The one time that a manifest may tell.
fn source_date() -> Result<Option<Timestamp>, Failure> {
    const VARIABLE: &str = "SOURCE_DATE_EPOCH";
    let Some(value) = std::env::var_os(VARIABLE) else {
        return Ok(None);
    };
    Timestamp::from_source_date_epoch(&value.to_string_lossy())
        .map(Some)
        .map_err(|error| {
            Failure::doing(
                Exit::Usage,
                format!("the environment variable `{VARIABLE}` is not a time"),
                &error,
            )
            .hint(format!("unset `{VARIABLE}`, or set it to `date +%s`"))
        })
}

/// Room kept for the manifest and the signature, which grow with the number of files.
const MANIFEST_ROOM: u64 = 1 << 20;

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
