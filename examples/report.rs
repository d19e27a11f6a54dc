//! A report's page from its data: for looking at it, and for renewing the page that the tests compare with.
//!
//!     cargo run --example report -- PAGE.json OUT.html
//!
//! PAGE.json is a [`Page`]; `{}` is one, too.

use std::error::Error;
use std::path::Path;

use panacea_formats::{OutputFile, Overwrite};
use panacea_patch::report::Page;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [data, out] = arguments.as_slice() else {
        return Err("usage: report PAGE.json OUT.html".into());
    };
    let page: Page = serde_json::from_str(&std::fs::read_to_string(data)?)?;
    let mut output = OutputFile::create(Path::new(out), Overwrite::Replace, &[])?;
    output.write_all(page.html()?.as_bytes())?;
    // A file that it replaces and that cannot be deleted is only litter.
    let _ = output.commit()?;
    Ok(())
}
