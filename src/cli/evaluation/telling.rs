//! Where an evaluation is told, besides stdout: a report, JUnit XML, a Markdown summary, results.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use panacea_formats::FormatError;
use panacea_patch::eval::junit::junit;
use panacea_patch::eval::summary::summary;
use panacea_patch::report::Page;

use super::Findings;
use crate::cli::args::TellingArgs;
use crate::cli::error::{Exit, Failure};
use crate::cli::places::Places;

/// Where an evaluation is to be told and kept.
pub(in crate::cli) struct Told<'a> {
    pub(in crate::cli) args: &'a TellingArgs,
    /// The file of `eval --output`.
    pub(in crate::cli) results: Option<&'a Path>,
    pub(in crate::cli) journal: Option<&'a Path>,
    /// What the run reads and writes besides.
    pub(in crate::cli) places: Places,
}

/// Places that were free, or may be replaced, when they were looked at; at first none.
#[derive(Debug, Default)]
pub(super) struct Telling {
    report: Option<PathBuf>,
    junit: Option<PathBuf>,
    summary: Option<PathBuf>,
    results: Option<PathBuf>,
    places: Places,
}

impl Telling {
    /// Looks at each place. Writes nothing.
    ///
    /// # Errors
    /// When one of the files may not be written.
    pub(super) fn plan(told: Told<'_>) -> Result<Self, Failure> {
        let Told {
            args,
            results,
            journal,
            mut places,
        } = told;
        let summary = args.summary.clone().or_else(step_summary);
        for (flag, path) in [("--journal", journal), (SUMMARY, summary.as_deref())] {
            if let Some(path) = path {
                places.add_growing(flag, path)?;
            }
        }
        let whole = [
            (OUTPUT, results),
            (REPORT, args.report.as_deref()),
            (JUNIT, args.junit.as_deref()),
        ];
        for (flag, path) in whole {
            if let Some(path) = path {
                places.add_file(flag, path)?;
            }
        }
        Ok(Self {
            report: args.report.clone(),
            junit: args.junit.clone(),
            summary,
            results: results.map(Path::to_owned),
            places,
        })
    }

    /// The files that are written.
    pub(super) fn files(&self) -> impl Iterator<Item = &Path> {
        [&self.report, &self.junit, &self.summary, &self.results]
            .into_iter()
            .flatten()
            .map(PathBuf::as_path)
    }

    /// Writes JUnit XML and appends the summary, where they are asked for.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub(super) fn tell(&self, findings: &Findings) -> Result<(), Failure> {
        let scores = &findings.scored.scores;
        if let Some(path) = &self.junit {
            let text = junit(&scores.model, &findings.verdicts);
            self.places.write(JUNIT, path, &text)?;
        }
        if let Some(path) = &self.summary {
            let text = summary(scores, findings.comparison.as_ref(), &findings.verdicts);
            OpenOptions::new()
                .create(true)
                .append(true)
                .open(path)
                .and_then(|mut file| file.write_all(text.as_bytes()))
                .map_err(|error| Failure::from(FormatError::new(path, error)))?;
        }
        Ok(())
    }

    /// Writes the results, where they are asked for.
    ///
    /// # Errors
    /// When they cannot be written.
    pub(super) fn results(&self, text: impl FnOnce() -> String) -> Result<(), Failure> {
        match &self.results {
            None => Ok(()),
            Some(path) => self.places.write(OUTPUT, path, &text()),
        }
    }

    /// Writes the report, where one is asked for.
    ///
    /// # Errors
    /// When it cannot be laid out or written.
    pub(super) fn report(&self, page: impl FnOnce() -> Page) -> Result<(), Failure> {
        let Some(path) = &self.report else {
            return Ok(());
        };
        let html = page().html().map_err(|error| {
            Failure::doing(Exit::Environment, "the report cannot be made", &error)
        })?;
        self.places.write(REPORT, path, &html)
    }
}

/// The file that GitHub's actions show on a run's page.
fn step_summary() -> Option<PathBuf> {
    let path = std::env::var_os("GITHUB_STEP_SUMMARY")?;
    (!path.is_empty()).then(|| PathBuf::from(path))
}

const OUTPUT: &str = "--output";
const REPORT: &str = "--report";
const JUNIT: &str = "--junit";
const SUMMARY: &str = "--summary";
