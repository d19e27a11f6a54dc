//! The command line: flags as given ([`args`]), settings resolved ([`settings`]), one file for each subcommand, all printing in
//! [`report`], and what a failure says in [`error`].
//!
//! Exit codes are those of [`error::Exit`], which `--help` lists.

mod apply;
mod args;
mod error;
mod find;
mod inspect;
mod interrupt;
mod keygen;
mod optimize;
mod output;
mod patch;
mod plan;
mod report;
mod settings;
mod sign;
mod verify;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use args::{Cli, Command, RunArgs};
use error::{Exit, Failure};
use report::Reporter;

/// Runs the program. Whatever happened is printed; what is left is the exit code.
pub(crate) fn main() -> ExitCode {
    let exit = match Cli::try_parse() {
        Ok(cli) => run(&cli),
        Err(error) => {
            let json = std::env::args_os().any(|word| word == "--json");
            report::command_line(&error, json)
        }
    };
    ExitCode::from(exit as u8)
}

fn run(cli: &Cli) -> Exit {
    let default = RunArgs::default();
    let (name, run_args): (&'static str, &RunArgs) = match (&cli.command, &cli.patch) {
        (Some(Command::Optimize(args)), _) => ("optimize", &args.run),
        (Some(Command::Apply(args)), _) => ("apply", &args.run),
        (Some(Command::Verify(args)), _) => ("verify", &args.run),
        (Some(Command::Inspect(args)), _) => ("inspect", &args.run),
        (Some(Command::Keygen(args)), _) => ("keygen", &args.run),
        (Some(Command::Sign(args)), _) => ("sign", &args.run),
        (Some(Command::Completions { .. }), _) => ("completions", &default),
        (Some(Command::Man), _) => ("man", &default),
        (None, Some(args)) => ("patch", &args.run),
        (None, None) => ("patch", &default),
    };
    let reporter = Reporter::new(run_args);
    match dispatch(cli, run_args, &reporter) {
        Ok(()) => Exit::Done,
        Err(failure) => {
            reporter.failure(name, &failure);
            failure.exit
        }
    }
}

fn dispatch(cli: &Cli, run_args: &RunArgs, reporter: &Reporter) -> Result<(), Failure> {
    if let Some(threads) = run_args.threads {
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build_global()
            .map_err(|error| {
                Failure::doing(
                    Exit::Environment,
                    format!("cannot start {threads} threads"),
                    &error,
                )
                .hint("pass a smaller number with --threads")
            })?;
    }
    match (&cli.command, &cli.patch) {
        (Some(Command::Optimize(args)), _) => optimize::run(args, reporter),
        (Some(Command::Apply(args)), _) => apply::run(args, reporter),
        (Some(Command::Verify(args)), _) => verify::run(args, reporter),
        (Some(Command::Inspect(args)), _) => inspect::run(args, reporter),
        (Some(Command::Keygen(args)), _) => keygen::run(args, reporter),
        (Some(Command::Sign(args)), _) => sign::run(args, reporter),
        (Some(Command::Completions { shell }), _) => {
            let mut text = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "panacea-patch", &mut text);
            reporter.text(&String::from_utf8_lossy(&text))
        }
        (Some(Command::Man), _) => {
            let mut text = Vec::new();
            clap_mangen::Man::new(Cli::command())
                .render(&mut text)
                .map_err(|error| {
                    Failure::doing(Exit::Environment, "the manual cannot be written", &error)
                })?;
            reporter.text(&String::from_utf8_lossy(&text))
        }
        (None, Some(args)) => patch::run(args, reporter),
        (None, None) => Err(Failure::usage("no model is given").hint("see `panacea-patch --help`")),
    }
}
