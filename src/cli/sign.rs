//! `sign`: a signature for something that is already written.

use panacea_formats::{FormatError, OutputErrorKind, OutputFile, Overwrite};
use panacea_patch::manifest::{PrivateKey, Signature, signature_path};
use serde_json::json;

use super::args::SignArgs;
use super::error::Failure;
use super::output::files_json;
use super::report::{Report, Reporter, Table};

pub(super) fn run(args: &SignArgs, reporter: &Reporter) -> Result<(), Failure> {
    if let Err(error) = std::fs::metadata(&args.path) {
        return Err(Failure::from(FormatError::new(&args.path, error)));
    }
    let key = PrivateKey::read(&args.key)?;
    let target = signature_path(&args.path);
    let overwrite = match args.force {
        true => Overwrite::Replace,
        false => Overwrite::Never,
    };
    OutputFile::check(&target, overwrite, &[&args.key], 0).map_err(|error| {
        let exists = matches!(error.kind, OutputErrorKind::Exists);
        let failure = Failure::from(error);
        match exists {
            true => failure.hint("pass --force to replace it"),
            false => failure,
        }
    })?;
    reporter.stage(format!("hashing {}", args.path.display()));
    // Before the output is begun: what grows in the directory must not be signed.
    let signature = Signature::of(&args.path, &target, &key)?;
    let mut output = OutputFile::create(&target, overwrite, &[&args.key])?;
    output.write_all(signature.to_json().as_bytes())?;
    let file = output.finish()?;
    if let Some((path, error)) = output.commit()?.left_behind {
        reporter.note(format!("{} could not be deleted: {error}", path.display()));
    }
    let digest = key.public_key().hint();

    let mut table = Table::new();
    table.heading(format!(
        "signed {} -> {}",
        args.path.display(),
        target.display()
    ));
    table.row("signed with", format!("the key {digest}"));
    let report = Report {
        output: Some(target.display().to_string()),
        found: Some(json!({"key": digest})),
        files: Some(files_json(&[file])),
        ..Report::of("sign")
    };
    reporter.result(report, &table)
}
