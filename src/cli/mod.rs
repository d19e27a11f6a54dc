//! The command line: flags as given ([`args`]), settings resolved ([`settings`]), one file for each subcommand, all printing in
//! [`report`], and what a failure says in [`error`].
//!
//! Exit codes are those of [`error::Exit`], which `--help` lists.

mod adapter;
mod apply;
mod args;
mod base;
mod convert;
mod device;
mod error;
mod eval;
mod evaluation;
mod find;
mod form;
mod inspect;
mod interrupt;
mod keygen;
mod launch;
mod memory;
mod model;
mod optimize;
mod output;
mod patch;
mod places;
mod plan;
mod report;
mod seal;
mod settings;
mod sign;
mod targets;
mod verify;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use args::{Cli, Command, RunArgs};
use error::{Exit, Failure};
use launch::Launch;
use report::Reporter;

/// Runs the program. Whatever happened is printed; what is left is the exit code.
pub(crate) fn main() -> ExitCode {
    let launch = Launch::join();
    let exit = match Cli::try_parse() {
        Ok(cli) => run(&cli, launch),
        // The first rank says it.
        Err(error) if launch.as_ref().is_ok_and(|launch| !launch.is_first()) => {
            Exit::of_code(u8::try_from(error.exit_code()).unwrap_or(u8::MAX))
        }
        Err(error) => {
            let words: Vec<String> = std::env::args_os()
                .skip(1)
                .map(|word| word.to_string_lossy().into_owned())
                .collect();
            report::command_line(&error, &words)
        }
    };
    ExitCode::from(exit as u8)
}

fn run(cli: &Cli, launch: Result<Launch, Failure>) -> Exit {
    let (name, run_args) = command(cli);
    let launch = match launch {
        Ok(launch) => launch,
        Err(failure) => {
            Reporter::new(&run_args).failure(name, &failure);
            return failure.exit;
        }
    };
    let reporter = match launch.is_first() {
        true => Reporter::new(&run_args),
        false => Reporter::silent(),
    };
    let result = launch
        .require_search(cli, name)
        .and_then(|()| start_threads(&run_args, &launch))
        .and_then(|()| match launch.is_first() {
            true => dispatch(cli, &launch, &reporter),
            false => launch.follow(cli, &reporter),
        });
    let told = |failure: &Failure| {
        match launch.must_speak() {
            true => Reporter::new(&run_args).failure(name, failure),
            false => reporter.failure(name, failure),
        }
        failure.exit
    };
    // Before the others end, which may end this process too.
    let exit = result.as_ref().err().map(told);
    let of_another = launch.leave(&result);
    exit.or_else(|| of_another.as_ref().map(told))
        .unwrap_or(Exit::Done)
}

/// The subcommand's name, and what every command knows.
fn command(cli: &Cli) -> (&'static str, RunArgs) {
    let (name, run_args) = match &cli.command {
        None => ("patch", &cli.patch.run),
        Some(Command::Optimize(args)) => ("optimize", &args.run),
        Some(Command::Apply(args)) => ("apply", &args.run),
        Some(Command::Convert(args)) => ("convert", &args.run),
        Some(Command::Eval(args)) => ("eval", &args.run),
        Some(Command::Verify(args)) => ("verify", &args.run),
        Some(Command::Inspect(args)) => ("inspect", &args.run),
        Some(Command::Keygen(args)) => ("keygen", &args.run),
        Some(Command::Sign(args)) => ("sign", &args.run),
        Some(Command::Completions { .. }) => return ("completions", RunArgs::default()),
        Some(Command::Man { .. }) => return ("man", RunArgs::default()),
    };
    (name, run_args.clone())
}

fn start_threads(run_args: &RunArgs, launch: &Launch) -> Result<(), Failure> {
    let Some(threads) = run_args.threads.or_else(|| launch.threads()) else {
        return Ok(());
    };
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build_global()
        .map_err(|error| {
            let what = format!("cannot start {threads} threads");
            Failure::doing(Exit::Environment, what, &error)
                .hint("pass a smaller number with --threads")
        })
}

fn dispatch(cli: &Cli, launch: &Launch, reporter: &Reporter) -> Result<(), Failure> {
    let (name, run_args) = command(cli);
    if !matches!(&cli.command, None | Some(Command::Optimize(_))) {
        device::refuse_devices(run_args.device.as_ref(), name)?;
    }
    match &cli.command {
        None => patch::run(&cli.patch, launch, reporter),
        Some(Command::Optimize(args)) => optimize::run(args, launch, reporter),
        Some(Command::Apply(args)) => apply::run(args, reporter),
        Some(Command::Convert(args)) => convert::run(args, reporter),
        Some(Command::Eval(args)) => eval::run(args, reporter),
        Some(Command::Verify(args)) => verify::run(args, reporter),
        Some(Command::Inspect(args)) => inspect::run(args, reporter),
        Some(Command::Keygen(args)) => keygen::run(args, reporter),
        Some(Command::Sign(args)) => sign::run(args, reporter),
        Some(Command::Completions { shell }) => {
            let mut text = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "panacea-patch", &mut text);
            reporter.text(&String::from_utf8_lossy(&text))
        }
        Some(Command::Man { subcommand }) => reporter.text(&manual(subcommand.as_deref())?),
    }
}

fn manual(subcommand: Option<&str>) -> Result<String, Failure> {
    let mut command = Cli::command();
    // Gives each subcommand its whole name.
    command.build();
    if let Some(name) = subcommand {
        command = command.find_subcommand(name).cloned().ok_or_else(|| {
            Failure::usage(format!("there is no subcommand `{name}`"))
                .hint("see `panacea-patch --help`")
        })?;
    }
    let mut text = Vec::new();
    clap_mangen::Man::new(command)
        .render(&mut text)
        .map_err(|error| {
            Failure::doing(Exit::Environment, "the manual cannot be written", &error)
        })?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}
