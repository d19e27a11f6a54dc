//! The `panacea-patch` program: see `panacea-patch --help`.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}
