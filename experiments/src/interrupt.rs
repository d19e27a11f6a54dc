//! Ctrl-C and SIGTERM: the program that runs meanwhile is asked to stop too, and waited for.
//!
//! In: a command. Out: what it printed. Without this, a signal to the experiment alone left a program running that held its files.

use std::io;
use std::process::{self, Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::process::{Pid, Signal, kill_process};

use crate::Failure;

/// As shells report it.
const INTERRUPTED: i32 = 130;

/// What a signal finds.
#[derive(Clone, Copy)]
enum Doing {
    /// No program runs. What this process makes itself is whole or absent.
    Own,
    Program(Pid),
    Stopping,
}

static DOING: Mutex<Doing> = Mutex::new(Doing::Own);

/// Begins to listen.
///
/// # Errors
/// When the system refuses.
pub(crate) fn listen() -> Result<(), Failure> {
    ctrlc::set_handler(|| {
        let mut doing = now();
        match *doing {
            // It may have ended just now.
            Doing::Program(program) => drop(kill_process(program, Signal::TERM)),
            Doing::Own | Doing::Stopping => exit(),
        }
        *doing = Doing::Stopping;
    })?;
    Ok(())
}

/// Runs `command`; where a signal came meanwhile, does not return.
pub(crate) fn output(command: &mut Command) -> io::Result<Output> {
    let child = {
        let mut doing = now();
        let child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        *doing = Doing::Program(Pid::from_child(&child));
        child
    };
    let output = child.wait_with_output();
    let mut doing = now();
    if matches!(*doing, Doing::Stopping) {
        exit();
    }
    *doing = Doing::Own;
    output
}

fn now() -> MutexGuard<'static, Doing> {
    DOING.lock().unwrap_or_else(PoisonError::into_inner)
}

#[expect(
    clippy::exit,
    reason = "a signal ends the process; what is written is whole or absent at any moment"
)]
fn exit() -> ! {
    process::exit(INTERRUPTED);
}
