//! `optimize`: a checkpoint in, a perturbation file out.

use std::path::{Path, PathBuf};

use panacea_formats::{Committed, OutputFile, Overwrite, Space, write_perturbation};
use panacea_patch::optimize::SearchOutcome;
use panacea_patch::resume::{self, Identity};
use serde_json::{Map, Value, json};

use super::adapter::AdapterOutput;
use super::args::{OptimizeArgs, WorkArgs};
use super::error::{Exit, Failure};
use super::find::{self, Found, Resumed};
use super::form::FormChoice;
use super::interrupt;
use super::launch::Launch;
use super::model::{Model, Use};
use super::output::{default_perturbation, files_json};
use super::plan::Plan;
use super::report::{Report, Reporter, Saver, Table, bytes, number, percent};
use super::settings::Search;

pub(super) fn run(
    args: &OptimizeArgs,
    launch: &Launch,
    reporter: &Reporter,
) -> Result<(), Failure> {
    let search = Search::resolve(&args.method, &args.data, false)?;
    let form = FormChoice::of(&args.form);
    interrupt::listen()?;
    let usage = Use {
        base: args.base.path.as_deref(),
        merge: false,
        computes: search.computes(),
    };
    let model = Model::open(&args.model, usage, reporter)?;
    if args.form.peft.is_some() && model.space() == Space::Adapter {
        return Err(Failure::no_effect("--peft", "on a LoRA adapter")
            .because("its perturbation is of A and B, and has no adapter of its own")
            .hint("leave out `--peft`; `panacea-patch apply` writes the patched adapter"));
    }
    let search = search.in_space(model.space());
    let target = match &args.output {
        Some(path) => path.clone(),
        None => default_perturbation(&model.checkpoint)?,
    };
    let overwrite = match args.force {
        true => Overwrite::Replace,
        false => Overwrite::Never,
    };
    let mut inputs: Vec<PathBuf> = search.data_files();
    inputs.extend(model.paths());
    // One that is missing is reported by whoever opens it.
    let inputs: Vec<&Path> = inputs
        .iter()
        .map(PathBuf::as_path)
        .filter(|path| path.exists())
        .collect();
    OutputFile::check(&target, overwrite, &inputs, 0)?;
    let (work, run) = (&args.work, &args.run);
    let prepared = find::prepare(&model, &search, (work, run), launch, reporter)?;
    let size = form.bytes(prepared.targets()) + header_room(prepared.targets());
    OutputFile::check(&target, overwrite, &inputs, size)?;
    let adapter = match &args.form.peft {
        Some(path) => {
            prepared.require_modules()?;
            Some(AdapterOutput::plan(
                path, overwrite, &inputs, &target, size,
            )?)
        }
        None => None,
    };
    if args.dry_run {
        let mut plan = Plan::of_search(&model, &search, &prepared, form, &target, size);
        if let Some(adapter) = &adapter {
            plan.add_adapter(&adapter.file_names(), size);
        }
        return plan.print("optimize", reporter);
    }

    let state = State::beside(&target, &args.work, &search);
    let resumed = state.resumed(&prepared.identity(), reporter)?;
    let saver = state.saver(prepared.identity());
    let mut found = prepared
        .run(saver, resumed, launch, reporter)
        .map_err(|failure| state.ended(failure))?;
    let made = form.make(&found, reporter)?;
    found.record.parameters.extend(made.parameters());

    reporter.stage(format!("writing {}", target.display()));
    let mut output = OutputFile::create(&target, overwrite, &inputs)?;
    output.require_space(size)?;
    let file = write_perturbation(&mut output, &found.record, &made.deltas(&found))?;
    let mut files = vec![file.clone()];
    if let Some(adapter) = &adapter {
        reporter.stage(format!("writing {}", adapter.path().display()));
        let (written, committed) = adapter.write(&model.checkpoint, &made.deltas(&found))?;
        files.extend(written);
        tell_of_leavings(committed, reporter);
    }
    tell_of_leavings(output.commit()?, reporter);
    state.discard();

    let mut table = Table::new();
    table.heading(format!(
        "optimized {} -> {}",
        args.model.display(),
        target.display()
    ));
    describe(&found, &mut table);
    made.describe(&found, &mut table);
    table.row(
        "file",
        format!("{}, sha256 {}", bytes(file.bytes), file.sha256),
    );
    if let Some(adapter) = &adapter {
        let length: u64 = files.iter().skip(1).map(|file| file.bytes).sum();
        table.row(
            "adapter",
            format!("{}, {}", adapter.path().display(), bytes(length)),
        );
    }
    let mut perturbation = found.to_json();
    made.add_to(&mut perturbation, &found);
    let report = Report {
        output: Some(target.display().to_string()),
        perturbation: Some(perturbation),
        steps: Some(found.steps_json()),
        radii: Some(json!(found.radii)),
        results: Some(results_json(&found)),
        search: found.search_json(),
        ranks: found.ranks_json(),
        files: Some(files_json(&files)),
        ..Report::of("optimize")
    };
    reporter.result(report, &table)
}

fn tell_of_leavings(committed: Committed, reporter: &Reporter) {
    if let Some((path, error)) = committed.left_behind {
        reporter.note(format!("{} could not be deleted: {error}", path.display()));
    }
}

/// The state file of a run: `.<output>.panacea-state` beside the output, of a search `.<output>.panacea-trials`.
#[derive(Clone, Debug)]
pub(super) struct State {
    path: PathBuf,
    kind: Kind,
    every: usize,
    resume: bool,
}

/// What a state file holds.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Steps,
    Trials,
}

impl State {
    pub(super) fn beside(target: &Path, work: &WorkArgs, search: &Search) -> Self {
        let name = target.file_name().unwrap_or_default().to_string_lossy();
        let (kind, suffix) = match search.trials {
            None => (Kind::Steps, "state"),
            Some(_) => (Kind::Trials, "trials"),
        };
        Self {
            path: target.with_file_name(format!(".{name}.panacea-{suffix}")),
            kind,
            every: work.state_every.unwrap_or(5),
            resume: work.resume,
        }
    }

    /// The state to go on from, when that was asked for.
    ///
    /// # Errors
    /// When there is none, or it is of another run.
    pub(super) fn resumed(
        &self,
        identity: &Identity,
        reporter: &Reporter,
    ) -> Result<Option<Resumed>, Failure> {
        match (self.resume, self.path.exists()) {
            (true, true) => Ok(Some(match self.kind {
                Kind::Steps => {
                    let state = resume::load(&self.path, identity)?;
                    reporter.stage(format!("going on after step {}", state.steps.len()));
                    Resumed::Steps(state)
                }
                Kind::Trials => {
                    let trials = resume::load_trials(&self.path, identity)?;
                    reporter.stage(format!("going on after trial {}", trials.len()));
                    Resumed::Trials(trials)
                }
            })),
            (true, false) => Err(
                Failure::new(Exit::Refused, "there is no state to go on from").because(format!(
                    "it was looked for at `{}`",
                    self.path.display()
                ))
                .hint("repeat the interrupted command with the same output, or leave out --resume to start from the beginning"),
            ),
            (false, true) => {
                reporter.note(format!(
                    "starting from the beginning; {} is of an earlier run, and --resume goes on from it",
                    self.path.display()
                ));
                Ok(None)
            }
            (false, false) => Ok(None),
        }
    }

    /// What keeps the states of this run.
    pub(super) fn saver(&self, identity: Identity) -> Option<Saver> {
        (self.every > 0).then(|| Saver {
            path: self.path.clone(),
            identity,
            every: self.every,
        })
    }

    /// What becomes of it where the work ends with `failure`: kept and pointed out where somebody stopped the work, and deleted where a check
    /// said no, when nothing is to be left.
    pub(super) fn ended(&self, failure: Failure) -> Failure {
        match failure.exit {
            Exit::SaidNo => {
                self.discard();
                failure
            }
            Exit::Interrupted if self.path.exists() => failure
                .because(format!("the state is in `{}`", self.path.display()))
                .hint(match self.resume {
                    true => "repeat the command to go on",
                    false => "repeat the command with --resume to go on",
                }),
            Exit::Interrupted => failure.because(match self.kind {
                Kind::Steps => "no step was saved",
                Kind::Trials => "no trial was saved",
            }),
            _ => failure,
        }
    }

    /// Deletes the state of a run that is done.
    pub(super) fn discard(&self) {
        // A state that stays is refused or pointed out by the next run.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// What people read of a search.
pub(super) fn describe(found: &Found, table: &mut Table) {
    let steps = match found.steps.len() {
        0 => String::new(),
        steps => format!(", {steps} steps"),
    };
    table.row(
        "method",
        format!("{}{steps}, seed {}", found.record.method, found.record.seed),
    );
    table.row(
        "perturbation",
        format!(
            "norm {} over {} elements in {} tensors",
            number(found.delta.norm()),
            found.delta.elements(),
            found.targets.len()
        ),
    );
    for source in &found.record.data {
        table.row(
            match source.role.as_str() {
                "refusals" => "refusals".to_owned(),
                role => format!("{role} rows"),
            },
            format!(
                "{} of {}",
                source.rows,
                panacea_formats::shown(&source.name)
            ),
        );
    }
    if let Some(search) = &found.search {
        describe_search(search, table);
    } else if !found.radii.is_empty() {
        table.row("radii tried", found.radii.len().to_string());
    }
    for (name, value) in &found.results {
        let value = match *name {
            name if name.starts_with("refusing") => percent(*value),
            "held_back" => format!("{value} requests"),
            _ => number(*value),
        };
        table.row(name.replace('_', " "), value);
    }
}

/// The front, and the settings that were chosen from it.
fn describe_search(search: &SearchOutcome, table: &mut Table) {
    let points: usize = search.trials.iter().map(|trial| trial.points.len()).sum();
    table.row(
        "search",
        format!("{} trials, {points} points", search.trials.len()),
    );
    let choice = &search.trials[search.chosen.trial].choice.0;
    let choice: Vec<String> = choice
        .iter()
        .map(|(name, value)| format!("{} {value}", name.replace('_', " ")))
        .collect();
    table.row(
        "chosen",
        format!("trial {}: {}", search.chosen.trial + 1, choice.join(", ")),
    );
    let has_task = search.trials.iter().flat_map(|trial| &trial.points);
    let has_task = has_task.clone().any(|point| point.task.is_some());
    let mut lines = vec![
        ["front", "trial", "rho", "refusing", "doubt", "kl"]
            .map(str::to_owned)
            .to_vec(),
    ];
    lines[0].extend(has_task.then(|| "task rise".to_owned()));
    for &place in &search.front {
        let point = search.point(place);
        let mut line = vec![
            if place == search.chosen { "chosen" } else { "" }.to_owned(),
            (place.trial + 1).to_string(),
            number(point.rho),
            percent(1.0 - point.unrefused),
            number(point.doubt),
            number(point.kl),
        ];
        line.extend(point.task.map(number));
        lines.push(line);
    }
    table.list(lines);
}

/// Results by name.
pub(super) fn results_json(found: &Found) -> Map<String, Value> {
    found
        .results
        .iter()
        .map(|(name, value)| ((*name).to_owned(), json!(value)))
        .collect()
}

/// Room for the header of a perturbation of `targets`: for each its line in the record and at most two in the file.
fn header_room(targets: &[(String, Vec<usize>)]) -> u64 {
    let lines = targets.iter().map(|(name, _)| 3 * name.len() + 400);
    (lines.sum::<usize>() + RECORD_ROOM) as u64
}

/// Room for what a record says besides its targets.
const RECORD_ROOM: usize = 4096;
