//! `verify`: whether files are as they were signed, or, without a key, as the manifest beside them says.

use panacea_formats::shown;
use panacea_patch::manifest::{
    Differences, FileDigest, PublicKey, Statement, VerifyError, check_manifest, signature_path,
    verify,
};
use serde_json::{Value, json};

use super::args::VerifyArgs;
use super::error::{Exit, Failure};
use super::report::{Report, Reporter, Table};

pub(super) fn run(args: &VerifyArgs, reporter: &Reporter) -> Result<(), Failure> {
    if let Err(error) = std::fs::metadata(&args.path) {
        return Err(Failure::from(panacea_formats::FormatError::new(
            &args.path, error,
        )));
    }
    match &args.key {
        Some(key) => with_key(args, &PublicKey::read(key)?, reporter),
        None => with_manifest(args, reporter),
    }
}

/// Every file that differs, for the report of a failure.
pub(super) fn differences_json(differences: &Differences) -> Value {
    let changed: Vec<Value> = differences
        .changed
        .iter()
        .map(|changed| {
            json!({"name": changed.name, "expected": changed.expected, "found": changed.found})
        })
        .collect();
    json!({
        "missing": differences.missing,
        "extra": differences.extra,
        "changed": changed,
    })
}

fn with_key(args: &VerifyArgs, key: &PublicKey, reporter: &Reporter) -> Result<(), Failure> {
    let verified = verify(&args.path, args.signature.as_deref(), key)
        .map_err(|error| refused(error, args, reporter))?;
    if verified.has_unsigned_manifest() {
        reporter.note("the manifest beside the file is not covered by the signature");
    }
    for name in verified.beyond_manifest() {
        reporter.note(format!("signed, and not in the manifest: {name}"));
    }
    let mut table = Table::new();
    table.heading(format!("verified {}", args.path.display()));
    table.row("signed with", format!("the key {}", verified.key()));
    table.row("signed as", shown(verified.name()).to_string());
    table.row(
        "files",
        format!("{}, all as signed", verified.files().len()),
    );
    if let Some(manifest) = verified.manifest() {
        describe(manifest, &mut table);
    }
    table.row(
        "proves",
        "who signed these bytes; not that the model is safe",
    );
    let report = Report {
        found: Some(json!({
            "verified": true,
            "key": verified.key(),
            "name": verified.name(),
            "beyond_manifest": verified.beyond_manifest(),
        })),
        files: Some(files_json(verified.files())),
        ..Report::of(COMMAND)
    };
    reporter.result(report, &table)
}

fn with_manifest(args: &VerifyArgs, reporter: &Reporter) -> Result<(), Failure> {
    let unproven = check_manifest(&args.path).map_err(|error| refused(error, args, reporter))?;
    let signature = signature_path(&args.path);
    if signature.exists() {
        reporter.note(format!(
            "{} was not checked: pass --key with the publisher's public key",
            signature.display()
        ));
    }
    let manifest = unproven.manifest();
    let mut table = Table::new();
    table.heading(format!(
        "{} is as its manifest says; who made it is unproven",
        args.path.display()
    ));
    table.row(
        "files",
        format!("{}, all as listed", manifest.subjects().len()),
    );
    describe(manifest, &mut table);
    table.row(
        "proves",
        "that nothing was damaged; anyone could have written the manifest",
    );
    let report = Report {
        found: Some(json!({"verified": false, "manifest_agrees": true})),
        files: Some(files_json(manifest.subjects())),
        ..Report::of(COMMAND)
    };
    reporter.result(report, &table)
}

/// What a manifest says of how files were made.
pub(super) fn describe(manifest: &Statement, table: &mut Table) {
    let provenance = manifest.provenance();
    table.row(
        "made by",
        format!("panacea-patch {}", shown(&provenance.tool_version)),
    );
    let parameters: Vec<String> = provenance
        .external_parameters
        .iter()
        .map(|(name, value)| format!("{}={}", shown(name), shown(&value.to_string())))
        .collect();
    table.row("with", parameters.join(" "));
    for dependency in &provenance.dependencies {
        table.row(
            format!("from {}", shown(dependency.role.as_str())),
            format!("{}, sha256 {}", shown(&dependency.name), dependency.digest),
        );
    }
    if let Some(time) = &provenance.finished_on {
        table.row("finished on", time.to_string());
    }
}

/// A refusal that lists every file that differs, a line each.
fn refused(error: VerifyError, args: &VerifyArgs, reporter: &Reporter) -> Failure {
    let VerifyError::FilesDiffer {
        against,
        differences,
    } = &error
    else {
        let failure = Failure::from(error);
        if failure.exit != Exit::SaidNo {
            return failure;
        }
        let reasons = [Some(failure.error), failure.because];
        let reasons: Vec<String> = reasons.into_iter().flatten().collect();
        return Failure {
            hint: failure.hint,
            found: failure.found,
            ..Failure::new(
                failure.exit,
                format!("`{}` is not verified", args.path.display()),
            )
            .because(reasons.join(": "))
        };
    };
    let lists = [
        ("missing", differences.missing.iter().collect::<Vec<_>>()),
        ("extra", differences.extra.iter().collect()),
        (
            "changed",
            differences
                .changed
                .iter()
                .map(|changed| &changed.name)
                .collect(),
        ),
    ];
    let mut counts = Vec::new();
    for (what, names) in lists {
        for name in &names {
            reporter.difference(&format!("{what}: {name}"));
        }
        if !names.is_empty() {
            counts.push(format!("{} {what}", names.len()));
        }
    }
    Failure::new(
        Exit::SaidNo,
        format!("`{}` is not as its {against} says", args.path.display()),
    )
    .because(format!("of its files, {}", counts.join(", ")))
    .hint("fetch the files again from their publisher")
    .found(differences_json(differences))
}

fn files_json(files: &[FileDigest]) -> Vec<Value> {
    files
        .iter()
        .map(|file| json!({"name": file.name, "sha256": file.digest}))
        .collect()
}

const COMMAND: &str = "verify";
