//! `--peft`: the directory to which `optimize` writes a low-rank perturbation as an adapter.

use std::path::{Path, PathBuf};

use panacea_formats::{
    ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, AdapterWriteError, Checkpoint, Committed,
    DeltaTensor, Layout, OutputDir, Overwrite, WrittenFile, write_adapter,
};

use super::error::{Exit, Failure};
use super::places::{of_place, refuse_overlap};

/// A place for an adapter that was free, or may be replaced, when it was looked at.
#[derive(Debug)]
pub(super) struct AdapterOutput {
    path: PathBuf,
    overwrite: Overwrite,
    inputs: Vec<PathBuf>,
}

impl AdapterOutput {
    /// Looks at `path`, which is to hold some `size` bytes made from `inputs`, beside the perturbation at `perturbation`. Writes
    /// nothing.
    ///
    /// # Errors
    /// When it may not be written to, or the perturbation would lie in it.
    pub(super) fn plan(
        path: &Path,
        overwrite: Overwrite,
        inputs: &[&Path],
        perturbation: &Path,
        size: u64,
    ) -> Result<Self, Failure> {
        OutputDir::check(path, overwrite, inputs, size).map_err(|error| of_place(PEFT, error))?;
        refuse_overlap((PEFT, path), ("--output", perturbation))?;
        Ok(Self {
            path: path.to_owned(),
            overwrite,
            inputs: inputs.iter().map(|path| (*path).to_owned()).collect(),
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// What will be in it.
    pub(super) fn file_names(&self) -> Vec<String> {
        [ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE]
            .map(|name| self.path.join(name).display().to_string())
            .into()
    }

    /// Writes `deltas`, which are for `checkpoint`, and moves the directory to its place.
    ///
    /// # Errors
    /// When it cannot be written; the place is then as it was.
    pub(super) fn write(
        &self,
        checkpoint: &Checkpoint,
        deltas: &[DeltaTensor<'_>],
    ) -> Result<(Vec<WrittenFile>, Committed), Failure> {
        let inputs: Vec<&Path> = self.inputs.iter().map(PathBuf::as_path).collect();
        let mut output = OutputDir::create(&self.path, self.overwrite, &inputs)
            .map_err(|error| of_place(PEFT, error))?;
        let base = base_of(checkpoint).display().to_string();
        let tensors = checkpoint.tensors().map(|tensor| tensor.name);
        let files = write_adapter(&mut output, &base, tensors, deltas)?;
        Ok((
            files,
            output.commit().map_err(|error| of_place(PEFT, error))?,
        ))
    }
}

impl From<AdapterWriteError> for Failure {
    fn from(error: AdapterWriteError) -> Self {
        match error {
            AdapterWriteError::Output(error) => of_place(PEFT, error),
            error => Self::doing(
                Exit::Refused,
                "the perturbation cannot be written as an adapter",
                &error,
            )
            .hint("leave out --peft"),
        }
    }
}

/// What PEFT loads the base from: a directory, as it was given.
fn base_of(checkpoint: &Checkpoint) -> &Path {
    let path = checkpoint.path();
    let parent = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    match checkpoint.layout() {
        Layout::LoneFile => parent.unwrap_or(Path::new(".")),
        _ => path,
    }
}

/// The flag that names the place.
const PEFT: &str = "--peft";
