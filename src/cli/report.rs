//! All printing: results on stdout, everything else on stderr.
//!
//! In: what the subcommands found. Out: a table for people, or one JSON object for machines; a line for each stage, or a progress
//! bar where stderr is a terminal; and failures as `error:`, `because:`, `hint:`. A reader that closed its end of the pipe is no
//! failure: the work is done whether anybody reads of it or not.

mod progress;
mod table;

use std::io::{self, IsTerminal, Write};

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::args::RunArgs;
use super::error::{Exit, Failure};

pub(super) use panacea_patch::number::{bytes, four_digits as number};
pub(super) use progress::{CopyWatch, EvalWatch, Saver, StepWatch};
pub(super) use table::{Table, bar, percent};

/// Where words go.
#[derive(Clone, Debug)]
pub(super) struct Reporter {
    json: bool,
    quiet: bool,
    /// Whether stderr is a terminal.
    terminal: bool,
    /// Whether another process says everything.
    silent: bool,
}

/// What a command has to tell, as `--json` prints it. What a command has not is absent.
#[derive(Debug, Default, Serialize)]
pub(super) struct Report {
    /// Empty where the command line was not understood.
    pub(super) command: &'static str,
    /// The exit code.
    pub(super) exit_code: u8,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) output: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) plan: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) perturbation: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) steps: Option<Vec<Value>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) radii: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) results: Option<Map<String, Value>>,
    /// What `--search` tried.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) search: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) realized: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) files: Option<Vec<Value>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) evaluation: Option<Value>,
    /// The processes that shared the search, and what that took.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) ranks: Option<Value>,
    /// What only this command tells.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) found: Option<Value>,
    /// The most memory that the process held, in MiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) peak_rss_mib: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) error: Option<Value>,
}

impl Report {
    pub(super) fn of(command: &'static str) -> Self {
        Self {
            command,
            ..Self::default()
        }
    }
}

impl Reporter {
    pub(super) fn new(run: &RunArgs) -> Self {
        Self {
            json: run.json,
            quiet: run.quiet,
            terminal: io::stderr().is_terminal(),
            silent: false,
        }
    }

    /// Of a rank that leaves all words to the first.
    pub(super) fn silent() -> Self {
        Self {
            json: false,
            quiet: true,
            terminal: false,
            silent: true,
        }
    }

    /// Says that a stage begins.
    pub(super) fn stage(&self, text: impl AsRef<str>) {
        if !self.quiet {
            eprint_line(text.as_ref());
        }
    }

    /// Says something that the user should know and that stops nothing.
    pub(super) fn note(&self, text: impl AsRef<str>) {
        if !self.quiet {
            eprint_line(&format!(
                "{} {}",
                painted("note:", CYAN, self.terminal),
                text.as_ref()
            ));
        }
    }

    /// Says what of the files is not as it should be: a result, and so on stdout, unless that holds JSON with the same.
    pub(super) fn difference(&self, text: &str) {
        if !self.json {
            // The failure that follows tells of it again, in numbers.
            let _ = print_text(&format!("{text}\n"));
        }
    }

    /// Prints the result: the report for machines, or `table` for people.
    ///
    /// # Errors
    /// When stdout cannot be written to, other than because its reader left.
    pub(super) fn result(&self, mut report: Report, table: &Table) -> Result<(), Failure> {
        report.peak_rss_mib = peak_rss_mib();
        match self.json {
            true => print_json(&report),
            false => print_text(&table.to_string()),
        }
    }

    /// Prints a result that a check said no to: as [`Self::result`], with the failure in the report for machines. The failure is given back, for
    /// people to read after the result.
    ///
    /// # Errors
    /// The failure, or that stdout cannot be written to.
    pub(super) fn rejected(
        &self,
        report: Report,
        table: &Table,
        failure: Failure,
    ) -> Result<(), Failure> {
        let report = Report {
            exit_code: failure.exit as u8,
            error: Some(failure_json(&failure)),
            ..report
        };
        self.result(report, table)?;
        Err(Failure {
            told: true,
            ..failure
        })
    }

    /// Prints, for people, what was found before a failure that ends the work.
    pub(super) fn partial(&self, table: &Table) {
        if !self.json {
            // The failure that follows is told in any case.
            let _ = print_text(&table.to_string());
        }
    }

    /// Prints text that is itself the result, such as completions.
    ///
    /// # Errors
    /// As [`Self::result`].
    pub(super) fn text(&self, text: &str) -> Result<(), Failure> {
        print_text(text)
    }

    /// Prints a failure, and for machines the report that it ends.
    pub(super) fn failure(&self, command: &'static str, failure: &Failure) {
        if self.silent {
            return;
        }
        print_failure(failure, self.terminal);
        if self.json && !failure.told {
            let report = Report {
                exit_code: failure.exit as u8,
                found: failure.found.clone(),
                peak_rss_mib: peak_rss_mib(),
                error: Some(failure_json(failure)),
                ..Report::of(command)
            };
            // It failed already; stdout failing too changes nothing.
            let _ = print_json(&report);
        }
    }
}

/// Prints what clap made of a command line: help and version as they are, a refusal in three parts.
pub(super) fn command_line(error: &clap::Error, words: &[String]) -> Exit {
    use clap::error::ErrorKind;
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            // A reader that left has read enough of it.
            let _ = error.print();
            Exit::Done
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = error.print();
            Exit::Usage
        }
        _ => {
            let failure = Failure::of_command_line(error, words.first().map(String::as_str));
            let reporter = Reporter {
                json: words.iter().any(|word| word == "--json"),
                quiet: false,
                terminal: io::stderr().is_terminal(),
                silent: false,
            };
            reporter.failure("", &failure);
            Exit::Usage
        }
    }
}

fn failure_json(failure: &Failure) -> Value {
    json!({
        "error": failure.error,
        "because": failure.because,
        "hint": failure.hint,
    })
}

fn print_failure(failure: &Failure, terminal: bool) {
    let mut lines = vec![format!(
        "{} {}",
        painted("error:", RED, terminal),
        failure.error
    )];
    if let Some(because) = &failure.because {
        let because = one_line(because);
        lines.push(format!(
            "  {} {because}",
            painted("because:", BOLD, terminal)
        ));
    }
    if let Some(hint) = &failure.hint {
        lines.push(format!("  {} {hint}", painted("hint:", GREEN, terminal)));
    }
    for line in lines {
        eprint_line(&line);
    }
}

/// Some libraries' messages have several lines; three parts are easier to read when each is one.
fn one_line(text: &str) -> String {
    text.split('\n')
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect::<Vec<_>>()
        .join(" ")
}

fn print_json(report: &Report) -> Result<(), Failure> {
    let text = serde_json::to_string(report).map_err(|error| {
        Failure::doing(Exit::Environment, "the report cannot be written", &error)
    })?;
    print_text(&format!("{text}\n"))
}

fn print_text(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    match stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
    {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Failure::doing(
            Exit::Environment,
            "cannot write to stdout",
            &error,
        )),
        _ => Ok(()),
    }
}

fn eprint_line(line: &str) {
    // There is nowhere to say that stderr is closed.
    let _ = writeln!(io::stderr().lock(), "{line}");
}

/// `text` in a style, where a terminal shows it and the user has not asked for none (<https://no-color.org>).
fn painted(text: &str, style: &str, terminal: bool) -> String {
    let wanted = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    match terminal && wanted {
        true => format!("\x1b[{style}m{text}\x1b[0m"),
        false => text.to_owned(),
    }
}

/// The most memory that this process held, where the system tells.
fn peak_rss_mib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib / 1024)
}

const BOLD: &str = "1";
const CYAN: &str = "1;36";
const GREEN: &str = "1;32";
const RED: &str = "1;31";
