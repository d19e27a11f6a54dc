//! The evaluation of a patch: the model before, the patched copy as it was written, and noise of the same norm for control.
//!
//! In: the flags of the whole job. Out: [`Findings`], while the copy can still be dropped: where a gate is not met, nothing is written.

use std::path::Path;

use panacea_patch::eval::suite::Scored;
use panacea_patch::manifest::{Byproduct, Dependency};
use panacea_patch::model::{TargetSelection, TargetTensors};
use panacea_patch::optimize::gaussian;
use panacea_patch::report::Page;
use serde_json::{Value, json};

use super::{Answering, Compared, EvalFlags, EvalPaths, Evaluation, Findings, Told};
use crate::cli::args::PatchArgs;
use crate::cli::error::Failure;
use crate::cli::model::Model;
use crate::cli::output::byproduct;
use crate::cli::places::Places;
use crate::cli::report::{Report, Reporter, Table};

/// An evaluation that was asked for with a patch.
pub(in crate::cli) struct PatchEvaluation {
    evaluation: Evaluation,
    control: bool,
    keep_failed: bool,
    found: Option<PatchFindings>,
}

/// What was found.
pub(in crate::cli) struct PatchFindings {
    pub(in crate::cli) findings: Findings,
    /// Noise of the same norm.
    pub(in crate::cli) control: Option<Scored>,
}

impl PatchFindings {
    /// What machines read.
    pub(in crate::cli) fn to_json(&self) -> Value {
        let mut json = self.findings.to_json();
        json["control"] = json!(self.control.as_ref().map(|it| &it.scores));
        json
    }
}

/// A perturbation whose norm noise is to have.
pub(in crate::cli) struct Control<'c> {
    pub(in crate::cli) selection: Option<TargetSelection>,
    pub(in crate::cli) delta: &'c TargetTensors,
    pub(in crate::cli) seed: u64,
}

impl PatchEvaluation {
    /// Whether `args` ask for one.
    pub(in crate::cli) fn is_wanted(args: &PatchArgs) -> bool {
        let sets = &args.evaluation;
        let given = [
            &sets.eval_harmful,
            &sets.eval_harmless,
            &sets.eval_task,
            &sets.eval_benign,
        ];
        let told = &args.telling;
        !told.gate.is_empty()
            || told.report.is_some()
            || told.summary.is_some()
            || sets.control
            || given.iter().any(|set| set.is_some())
    }

    /// The one that `args` ask for, every input read.
    ///
    /// # Errors
    /// The first input that is refused, and flags of an evaluation where none is asked for.
    pub(in crate::cli) fn prepare(args: &PatchArgs) -> Result<Option<Self>, Failure> {
        if !Self::is_wanted(args) {
            return match args.judging.first_given() {
                None => Ok(None),
                Some(flag) => Err(Failure::no_effect(flag, "here")
                    .because("no evaluation is asked for")
                    .hint(format!("pass --gate or --report, or leave out `{flag}`"))),
            };
        }
        let sets = &args.evaluation;
        let paths = EvalPaths {
            harmful: sets.eval_harmful.clone(),
            harmless: sets.eval_harmless.clone(),
            task: sets.eval_task.clone(),
            benign: sets.eval_benign.clone(),
        };
        let template = args.data.template.unwrap_or_default();
        let here = Answering::Here;
        let evaluation = Evaluation::prepare(&paths, template, &args.judging, here)?.demanding(
            &args.telling.gate,
            Compared::Model,
            &FLAGS,
        )?;
        Ok(Some(Self {
            evaluation,
            control: sets.control,
            keep_failed: sets.keep_failed,
            found: None,
        }))
    }

    /// Keeps and tells what will be found where `args` say, beside the `places` of the job.
    ///
    /// # Errors
    /// When a file may not be written.
    pub(in crate::cli) fn telling(self, args: &PatchArgs, places: Places) -> Result<Self, Failure> {
        let journal = args.judging.journal.as_deref();
        let evaluation = self.evaluation.telling(Told {
            args: &args.telling,
            results: None,
            // A dry run writes nothing.
            journal: journal.filter(|_| !args.writing.dry_run),
            places,
        })?;
        Ok(Self { evaluation, ..self })
    }

    /// What it reads, in words, and the files that it writes.
    pub(in crate::cli) fn plan(&self) -> (Vec<String>, Vec<String>) {
        let files = self.evaluation.telling.files();
        let files = files.map(|path| path.display().to_string());
        (self.evaluation.sets().collect(), files.collect())
    }

    /// Scores `model` and its patched copy at `written`, which will be called `target`, and says what records keep of it. Where the copy is to be
    /// dropped, the report is written here, with what `add` puts in it.
    ///
    /// # Errors
    /// When a gate is not met and nothing is to be kept then, or the evaluation fails.
    pub(in crate::cli) fn run(
        &mut self,
        model: &Model,
        (written, target): (&Path, &Path),
        control: Option<Control<'_>>,
        add: impl FnOnce(&mut Page),
        reporter: &Reporter,
    ) -> Result<(Vec<Dependency>, Byproduct), Failure> {
        let evaluation = &mut self.evaluation;
        let name = model.checkpoint.path().display().to_string();
        let loaded = evaluation.load(model, model)?;
        let before = evaluation.score(&name, &loaded, reporter)?;
        let copy = model.copy_at(written)?;
        let whole = match copy.checkpoint.layout().is_gguf() {
            true => &copy,
            false => model,
        };
        let patched = evaluation.load(&copy, whole)?;
        let name = target.display().to_string();
        let mut scored = evaluation.score(&name, &patched, reporter)?;
        evaluation.diverge(&mut scored, &patched, &loaded, reporter)?;
        let noise = match control.filter(|_| self.control) {
            None => None,
            Some(control) => {
                let sizes: Vec<usize> = control.delta.iter().map(<[f32]>::len).collect();
                let noise = gaussian(&sizes, control.seed, control.delta.norm());
                let noted = format!(
                    "with noise of norm {} and seed {}",
                    noise.norm(),
                    control.seed
                );
                let moved = loaded.moved(control.selection, &noise, &noted);
                let mut scored = evaluation.score("noise of the same norm", &moved, reporter)?;
                evaluation.diverge(&mut scored, &moved, &loaded, reporter)?;
                Some(scored)
            }
        };
        let findings = evaluation.conclude(scored, Some(before))?;
        evaluation.tell(&findings)?;
        let kept = byproduct("evaluation", findings.summary_json(&evaluation.judge()));
        let met = findings.require_met();
        self.found = Some(PatchFindings {
            findings,
            control: noise,
        });
        if let (Err(failure), false) = (met, self.keep_failed) {
            let mut table = Table::new();
            let told = self.tell(&mut table, add);
            reporter.partial(&table);
            told?;
            return Err(failure
                .hint("no checkpoint was written; pass --keep-failed to write it all the same"));
        }
        Ok((self.evaluation.sources().to_vec(), kept))
    }

    /// Writes the report, if one is asked for, and adds to `table` what was found. `add` puts in the report what else there is.
    ///
    /// # Errors
    /// When the report cannot be made.
    pub(in crate::cli) fn tell(
        &self,
        table: &mut Table,
        add: impl FnOnce(&mut Page),
    ) -> Result<(), Failure> {
        let Some(PatchFindings { findings, control }) = &self.found else {
            return Ok(());
        };
        table.row("judged by", self.evaluation.judge());
        findings.describe(table);
        self.evaluation.describe(table);
        self.evaluation.report(findings, control.as_ref(), add)
    }

    /// What was found, once it was.
    pub(in crate::cli) fn found(&self) -> Option<&PatchFindings> {
        self.found.as_ref()
    }

    /// Prints the result of what was written.
    ///
    /// # Errors
    /// When a gate is not met all the same, or stdout cannot be written to.
    pub(in crate::cli) fn result(
        evaluation: Option<&Self>,
        report: Report,
        table: &Table,
        reporter: &Reporter,
    ) -> Result<(), Failure> {
        let found = evaluation.and_then(Self::found);
        match found.map_or(Ok(()), |found| found.findings.require_met()) {
            Ok(()) => reporter.result(report, table),
            Err(failure) => {
                let failure = failure.hint("the patched checkpoint was written all the same");
                reporter.rejected(report, table, failure)
            }
        }
    }
}

const FLAGS: EvalFlags = EvalFlags {
    harmful: "--eval-harmful",
    task: "--eval-task",
};
