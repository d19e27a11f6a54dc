//! Places that a run writes to: none of them is an input, nor another of them, nor lies in one.

use std::path::{Path, PathBuf};

use panacea_formats::{OutputError, OutputErrorKind, OutputFile, Overwrite};

use super::error::Failure;

/// What a run reads, and where it will write besides: what a further place may not be.
#[derive(Clone, Debug, Default)]
pub(super) struct Places {
    inputs: Vec<PathBuf>,
    /// With the flags that named them.
    taken: Vec<(&'static str, PathBuf)>,
    overwrite: Overwrite,
}

impl Places {
    /// Beside `inputs`, and `taken` with the flags that named them.
    pub(super) fn beside(
        inputs: Vec<PathBuf>,
        taken: Vec<(&'static str, PathBuf)>,
        overwrite: Overwrite,
    ) -> Self {
        let mut places = Self {
            inputs: Vec::new(),
            taken,
            overwrite,
        };
        places.add_inputs(inputs);
        places
    }

    /// Adds what is read as well. What is missing is reported by whoever opens it.
    pub(super) fn add_inputs(&mut self, inputs: impl IntoIterator<Item = PathBuf>) {
        self.inputs
            .extend(inputs.into_iter().filter(|path| path.exists()));
    }

    /// Adds the file at `path`, which [`Self::write`] will write whole.
    ///
    /// # Errors
    /// When it may not be written.
    pub(super) fn add_file(&mut self, flag: &'static str, path: &Path) -> Result<(), Failure> {
        self.take(flag, path)?;
        OutputFile::check(path, self.overwrite, &self.inputs(), 0)
            .map_err(|error| of_place(flag, error))
    }

    /// Adds the file at `path`, which may be there already and will grow.
    ///
    /// # Errors
    /// When it is something else that is read or written.
    pub(super) fn add_growing(&mut self, flag: &'static str, path: &Path) -> Result<(), Failure> {
        // Through links, as it will be opened.
        let opened = std::fs::canonicalize(path).unwrap_or_else(|_| resolved(path));
        for input in &self.inputs {
            let resolved = std::fs::canonicalize(input).unwrap_or_else(|_| input.clone());
            if overlap(&opened, &resolved) {
                let kind = OutputErrorKind::OverlapsInput {
                    input: input.clone(),
                };
                return Err(of_place(flag, OutputError::new(path, kind)));
            }
        }
        self.take(flag, path)
    }

    /// Writes `text` to `path`, whole or not at all.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(super) fn write(&self, flag: &str, path: &Path, text: &str) -> Result<(), Failure> {
        let inputs = self.inputs();
        let write = || {
            let mut output = OutputFile::create(path, self.overwrite, &inputs)?;
            output.write_all(text.as_bytes())?;
            output.commit()
        };
        write().map(drop).map_err(|error| of_place(flag, error))
    }

    fn take(&mut self, flag: &'static str, path: &Path) -> Result<(), Failure> {
        for (other, taken) in &self.taken {
            refuse_overlap((flag, path), (other, taken))?;
        }
        self.taken.push((flag, path.to_owned()));
        Ok(())
    }

    fn inputs(&self) -> Vec<&Path> {
        self.inputs.iter().map(PathBuf::as_path).collect()
    }
}

/// Refuses two places, given with the flags that named them, of which one is the other or lies in it.
///
/// # Errors
/// When they overlap.
pub(super) fn refuse_overlap(
    (flag, path): (&str, &Path),
    (other, taken): (&str, &Path),
) -> Result<(), Failure> {
    if !overlap(&resolved(path), &resolved(taken)) {
        return Ok(());
    }
    Err(Failure::usage(format!(
        "`{other} {}` and `{flag} {}` overlap",
        taken.display(),
        path.display()
    ))
    .because("each is to be a place of its own")
    .hint(format!("choose another {flag}")))
}

/// Whether one of two resolved paths is the other or lies in it.
fn overlap(a: &Path, b: &Path) -> bool {
    a.starts_with(b) || b.starts_with(a)
}

/// A failure of the place that `flag` named, with a hint that says so.
pub(super) fn of_place(flag: &str, error: OutputError) -> Failure {
    let failure = Failure::from(error);
    Failure {
        hint: failure.hint.map(|hint| hint.replace("--output", flag)),
        ..failure
    }
}

/// The path with its folder resolved, as far as there is one.
fn resolved(path: &Path) -> PathBuf {
    let Some(name) = path.file_name() else {
        return std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    };
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let parent = std::fs::canonicalize(parent).unwrap_or_else(|_| resolved(parent));
    parent.join(name)
}
