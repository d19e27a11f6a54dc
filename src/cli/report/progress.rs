//! Progress of long work, and what happens when it is interrupted.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use panacea_patch::eval::suite;
use panacea_patch::optimize::{self, Budget, Phase, State, StepRecord, Trial};
use panacea_patch::resume::{self, Identity, ResumeError};

use super::{Reporter, number, percent};
use crate::cli::error::chain;
use crate::cli::interrupt;

/// Watches the optimizer: shows progress, takes the time of steps, saves states, passes interruptions on.
#[derive(Debug)]
pub(in crate::cli) struct StepWatch<'r> {
    reporter: &'r Reporter,
    bar: ProgressBar,
    saver: Option<Saver>,
    /// Seconds of each step of this process, in order.
    seconds: Vec<f64>,
    step_began: Instant,
    longest_step: Duration,
    /// Steps done and not saved.
    unsaved: usize,
    /// Of a search, all trials so far.
    trials: Vec<Trial>,
    budget: Budget,
}

/// Keeps states of a run.
#[derive(Clone, Debug)]
pub(in crate::cli) struct Saver {
    pub(in crate::cli) path: PathBuf,
    pub(in crate::cli) identity: Identity,
    /// Steps from one state to the next.
    pub(in crate::cli) every: usize,
}

impl<'r> StepWatch<'r> {
    pub(in crate::cli) fn new(reporter: &'r Reporter, saver: Option<Saver>) -> Self {
        Self {
            reporter,
            bar: reporter.progress_bar(
                "{spinner} {msg} [{bar:32}] {pos}/{len} tokens, {per_sec}, {eta} left",
            ),
            saver,
            seconds: Vec::new(),
            step_began: Instant::now(),
            longest_step: Duration::ZERO,
            unsaved: 0,
            trials: Vec::new(),
            budget: Budget::default(),
        }
    }

    /// Of a search with `budget`, `trials` are done.
    pub(in crate::cli) fn go_on_after(&mut self, trials: &[Trial], budget: Budget) {
        self.trials = trials.to_vec();
        self.budget = budget;
    }

    /// Seconds of each step of this process, in order.
    pub(in crate::cli) fn seconds(&self) -> &[f64] {
        &self.seconds
    }

    /// Clears the progress away.
    pub(in crate::cli) fn finish(&self) {
        self.bar.finish_and_clear();
    }

    fn save(&mut self, state: &State<'_>) {
        let Some(saver) = &self.saver else { return };
        let saved = resume::save(&saver.path, &saver.identity, state);
        self.is_saved(saved);
    }

    fn is_saved(&mut self, saved: Result<(), ResumeError>) {
        match saved {
            Ok(()) => self.unsaved = 0,
            Err(error) => {
                // The run itself may still succeed, and stopping it would lose what could not be saved.
                let reason = chain(&error);
                self.reporter.note(format!(
                    "the state was not saved, and the run goes on: {reason}"
                ));
                self.saver = None;
            }
        }
    }
}

impl optimize::Observer for StepWatch<'_> {
    fn progress(&mut self, what: &str, done: usize, total: usize) {
        self.bar.set_length(total as u64);
        self.bar.set_position(done as u64);
        self.bar.set_message(format!("{what} rows"));
    }

    fn step(&mut self, record: &StepRecord) {
        let took = self.step_began.elapsed();
        self.step_began = Instant::now();
        self.longest_step = self.longest_step.max(took);
        self.seconds.push(took.as_secs_f64());
        self.unsaved += 1;
        let line = step_line(record, took);
        self.bar.suspend(|| self.reporter.stage(line));
        self.bar.reset();
    }

    fn state(&mut self, state: &State<'_>) {
        let due = self
            .saver
            .as_ref()
            .is_some_and(|saver| self.unsaved >= saver.every || interrupt::asked());
        if due {
            self.save(state);
        }
        // Saving is not part of a step.
        self.step_began = Instant::now();
    }

    fn trial(&mut self, number: usize, trial: &Trial) {
        self.trials.push(trial.clone());
        let line = trial_line(number, trial, self.budget, self.step_began.elapsed());
        self.bar.suspend(|| self.reporter.stage(line));
        self.bar.reset();
        if let Some(saver) = &self.saver {
            let saved = resume::save_trials(&saver.path, &saver.identity, &self.trials);
            self.is_saved(saved);
        }
        self.step_began = Instant::now();
    }

    /// Where steps would be lost, the present one is finished and saved first, unless it takes twice as long as any before:
    /// then there is none, and the last work of the run is under way.
    fn interrupted(&self) -> bool {
        let finishing = self.saver.is_some()
            && self.unsaved > 0
            && self.step_began.elapsed() < 2 * self.longest_step;
        interrupt::asked() && !finishing
    }

    fn stop(&mut self) {
        interrupt::ask();
    }
}

fn step_line(record: &StepRecord, took: Duration) -> String {
    let phase = match record.phase {
        Phase::Outer => "outer step",
        Phase::Contrast => "contrast step",
        Phase::Repair => "repair step",
    };
    let mut line = format!("  {phase} {}:", record.step + 1);
    for (name, value) in [
        ("h", record.h),
        ("h(w+eps)", record.h_eps),
        ("r", record.r),
        ("g", record.g),
        ("kl", record.kl),
        ("refusing", record.refusing),
        ("norm", Some(record.norm)),
    ] {
        if let Some(value) = value {
            line.push_str(&format!(" {name} {}", number(value)));
        }
    }
    line.push_str(&format!(" ({:.1} s)", took.as_secs_f64()));
    line
}

fn trial_line(place: usize, trial: &Trial, budget: Budget, took: Duration) -> String {
    let reached = match (&trial.failure, trial.best(budget)) {
        (Some(failure), _) => failure.clone(),
        (None, None) => "nothing within the budget".to_owned(),
        (None, Some(point)) => format!(
            "refusing {}, doubt {}, kl {}{} at rho {}",
            percent(1.0 - point.unrefused),
            number(point.doubt),
            number(point.kl),
            point
                .task
                .map_or_else(String::new, |rise| format!(", task rise {}", number(rise))),
            number(point.rho)
        ),
    };
    let (trial, steps) = (place + 1, trial.steps);
    let took = took.as_secs_f64();
    format!("  trial {trial}: {reached} ({steps} steps, {took:.1} s)")
}

/// Watches an evaluation: a bar for what is being asked or computed.
#[derive(Debug)]
pub(in crate::cli) struct EvalWatch {
    bar: ProgressBar,
}

impl EvalWatch {
    pub(in crate::cli) fn new(reporter: &Reporter) -> Self {
        Self {
            bar: reporter
                .progress_bar("{spinner} {msg} [{bar:32}] {pos}/{len} rows, {per_sec}, {eta} left"),
        }
    }

    /// Clears the progress away.
    pub(in crate::cli) fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

impl suite::Watch for EvalWatch {
    fn progress(&mut self, what: &str, done: usize, total: usize) -> ControlFlow<()> {
        if done == 0 {
            self.bar.reset();
            self.bar.set_message(what.to_owned());
        }
        self.bar.set_length(total as u64);
        self.bar.set_position(done as u64);
        match interrupt::asked() {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }
}

/// Watches a copy being written.
#[derive(Debug)]
pub(in crate::cli) struct CopyWatch {
    bar: ProgressBar,
}

impl CopyWatch {
    pub(in crate::cli) fn new(reporter: &Reporter, total: u64) -> Self {
        let bar = reporter.progress_bar(
            "{spinner} writing [{bar:32}] {bytes}/{total_bytes}, {bytes_per_sec}, {eta} left",
        );
        bar.set_length(total);
        Self { bar }
    }

    /// Clears the progress away.
    pub(in crate::cli) fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

impl panacea_formats::Observer for CopyWatch {
    fn advanced(&self, bytes: u64) {
        self.bar.inc(bytes);
    }

    fn interrupted(&self) -> bool {
        interrupt::asked()
    }
}

impl Reporter {
    /// A bar on a terminal, and nothing elsewhere.
    fn progress_bar(&self, template: &str) -> ProgressBar {
        if self.quiet || !self.terminal {
            return ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
        }
        let style = ProgressStyle::with_template(template)
            .unwrap_or_else(|_| ProgressStyle::default_bar())
            .progress_chars("█▉▊▋▌▍▎▏ ");
        ProgressBar::no_length().with_style(style)
    }
}
