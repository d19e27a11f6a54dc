//! Copies a checkpoint, hashing every file on the way, and tells how fast.
//!
//!     cargo run --release -p panacea-formats --example copy -- SOURCE TARGET

#![expect(clippy::print_stdout, reason = "an example talks to its user")]

use std::convert::Infallible;
use std::error::Error;
use std::ops::Range;
use std::path::Path;
use std::time::Instant;

use panacea_formats::{
    Checkpoint, Destination, Layout, OutputDir, OutputFile, Overwrite, Patch, TensorView,
    copied_bytes, write_checkpoint,
};

/// Chooses no tensor.
struct Untouched;

impl Patch for Untouched {
    type Report = ();
    type Error = Infallible;

    fn targets(&self, _: &TensorView<'_>) -> bool {
        false
    }

    fn patch(&self, _: &TensorView<'_>, _: Range<usize>, _: &mut [u8]) -> Result<(), Infallible> {
        Ok(())
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args_os().skip(1);
    let (Some(source), Some(target)) = (arguments.next(), arguments.next()) else {
        return Err("two paths are needed: SOURCE and TARGET".into());
    };
    let (source, target) = (Path::new(&source), Path::new(&target));
    let started = Instant::now();
    let checkpoint = Checkpoint::open(source)?;
    let bytes = copied_bytes(&checkpoint)?;
    let written = if checkpoint.layout() == Layout::LoneFile {
        let mut output = OutputFile::create(target, Overwrite::Never, &[source])?;
        output.require_space(bytes)?;
        let written = write_checkpoint(
            &checkpoint,
            &Untouched,
            Destination::File(&mut output),
            &(),
            |_, ()| {},
        )?;
        let _ = output.commit()?;
        written
    } else {
        let mut output = OutputDir::create(target, Overwrite::Never, &[source])?;
        output.require_space(bytes)?;
        let destination = Destination::Directory(&mut output);
        let written = write_checkpoint(&checkpoint, &Untouched, destination, &(), |_, ()| {})?;
        let _ = output.commit()?;
        written
    };
    for file in &written.files {
        println!("{}  {}", file.sha256, file.name);
    }
    for (name, reason) in &written.side_files.left_out {
        println!("left out: {name} ({reason})");
    }
    let seconds = started.elapsed().as_secs_f64();
    #[expect(clippy::cast_precision_loss, reason = "a rate for the reader")]
    let rate = bytes as f64 / seconds / 1e6;
    println!("{bytes} bytes in {seconds:.3} s, {rate:.0} MB/s");
    Ok(())
}
