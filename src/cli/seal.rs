//! The manifest that goes with an output, and the signature where a key is given.
//!
//! In: every file written, and how it came about. Out: `panacea.manifest.json` and `model.sig` in a directory, or beside a lone file,
//! where they are moved to their places before it: where it is, they are.

use std::path::{Path, PathBuf};

use panacea_formats::{Committed, OutputDir, OutputFile, Overwrite, Sha256, WrittenFile};
use panacea_patch::manifest::{
    FileDigest, FileName, MANIFEST_NAME, PrivateKey, Provenance, SIGNATURE_NAME, Signature,
    Statement, Timestamp, ignored_by_default, manifest_path, signature_path,
};

use super::error::{Exit, Failure};

/// What seals outputs.
#[derive(Debug)]
pub(super) struct Seal {
    key: Option<PrivateKey>,
    finished_on: Option<Timestamp>,
}

impl Seal {
    /// Reads the key, and the time that `SOURCE_DATE_EPOCH` tells.
    ///
    /// # Errors
    /// When one of them is not what it should be.
    pub(super) fn read(key: Option<&Path>) -> Result<Self, Failure> {
        Ok(Self {
            key: key.map(PrivateKey::read).transpose()?,
            finished_on: source_date()?,
        })
    }

    /// Whether outputs will be signed.
    pub(super) fn signs(&self) -> bool {
        self.key.is_some()
    }

    /// The one time that a manifest may tell.
    pub(super) fn finished_on(&self) -> Option<Timestamp> {
        self.finished_on
    }

    /// The digest that names the key.
    pub(super) fn signed_with(&self) -> Option<Sha256> {
        self.key.as_ref().map(|key| key.public_key().hint())
    }

    /// What the files are called that belong beside the lone file `target`.
    pub(super) fn paths_beside(&self, target: &Path) -> Vec<PathBuf> {
        let mut paths = vec![manifest_path(target)];
        if self.signs() {
            paths.push(signature_path(target));
        }
        paths
    }

    /// Adds manifest and signature to a directory that will be called `name`, of which `files` are all files; they are added to these.
    ///
    /// # Errors
    /// When a name is none that a manifest can list, or the files cannot be written.
    pub(super) fn add_to(
        &self,
        output: &mut OutputDir,
        name: &str,
        files: &mut Vec<WrittenFile>,
        provenance: Provenance,
    ) -> Result<(), Failure> {
        let ignored = ignored_by_default(Some(SIGNATURE_NAME.parse()?));
        // The repository's own files are in no signature, so that they may change; nor are they subjects of the manifest.
        let mut listed: Vec<FileDigest> = Vec::new();
        for file in &*files {
            let name: FileName = file.name.parse()?;
            if !ignored.iter().any(|ignored| name.is_within(ignored)) {
                listed.push(FileDigest {
                    name,
                    digest: file.sha256,
                });
            }
        }
        let manifest = Statement::new(listed.clone(), provenance)?.to_json();
        let manifest = output.write_file(MANIFEST_NAME, manifest.as_bytes())?;
        listed.push(FileDigest {
            name: MANIFEST_NAME.parse()?,
            digest: manifest.sha256,
        });
        files.push(manifest);
        if let Some(key) = &self.key {
            let signature = Signature::of_directory(name, listed, ignored, key)?;
            files.push(output.write_file(SIGNATURE_NAME, signature.to_json().as_bytes())?);
        }
        Ok(())
    }

    /// Moves manifest and signature to their places beside `target`, and then `output`, which is it and is finished. They are added to
    /// `files`, of which it is the first.
    ///
    /// # Errors
    /// When one of them cannot be written.
    pub(super) fn commit_with(
        &self,
        output: OutputFile,
        (target, overwrite, inputs): (&Path, Overwrite, &[&Path]),
        files: &mut Vec<WrittenFile>,
        provenance: Provenance,
    ) -> Result<Vec<Committed>, Failure> {
        let mut subjects = Vec::new();
        for file in &*files {
            subjects.push(FileDigest {
                name: file.name.parse()?,
                digest: file.sha256,
            });
        }
        let signed = files.first().map(|file| file.sha256);
        let text = Statement::new(subjects, provenance)?.to_json();
        let digest = Sha256::of(text.as_bytes());
        let mut beside = vec![(manifest_path(target), text)];
        if let (Some(key), Some(signed)) = (&self.key, signed) {
            let signature = Signature::of_file(&name_of(target), signed, Some(digest), key);
            beside.push((signature_path(target), signature.to_json()));
        }
        let mut outputs = Vec::new();
        for (path, text) in &beside {
            let mut output = OutputFile::create(path, overwrite, inputs)?;
            output.write_all(text.as_bytes())?;
            files.push(output.finish()?);
            outputs.push(output);
        }
        let mut committed = Vec::new();
        for output in outputs {
            committed.push(output.commit()?);
        }
        if overwrite == Overwrite::Replace && self.key.is_none() {
            // A signature of the bytes that are replaced would only make the new ones look forged.
            match std::fs::remove_file(signature_path(target)) {
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
        Ok(committed)
    }
}

/// What a checkpoint at `target` is called in its signature.
pub(super) fn name_of(target: &Path) -> String {
    let name = target.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
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
