//! Ctrl-C and SIGTERM: the first asks the work to stop where nothing is lost, the second ends the program at once.

use std::process;
use std::sync::atomic::{AtomicBool, Ordering};

use super::error::{Exit, Failure};

/// Begins to listen. Until this is called, a signal ends the program as it does any other.
///
/// # Errors
/// When the system refuses.
pub(super) fn listen() -> Result<(), Failure> {
    ctrlc::set_handler(|| {
        if SIGNALLED.swap(true, Ordering::SeqCst) {
            #[expect(
                clippy::exit,
                reason = "the user insists; outputs are complete or absent at any moment"
            )]
            process::exit(Exit::Interrupted as i32);
        }
    })
    .map_err(|error| Failure::doing(Exit::Environment, "cannot listen for Ctrl-C", &error))
}

/// Whether the work was asked to stop.
pub(super) fn asked() -> bool {
    SIGNALLED.load(Ordering::SeqCst) || TOLD.load(Ordering::SeqCst)
}

/// Asks the work to stop, as a signal does that came to another rank. One that comes to this process after it is still its first.
pub(super) fn ask() {
    TOLD.store(true, Ordering::SeqCst);
}

static SIGNALLED: AtomicBool = AtomicBool::new(false);
static TOLD: AtomicBool = AtomicBool::new(false);
