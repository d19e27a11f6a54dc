//! `keygen`: a new pair of keys.

use panacea_patch::manifest::{Curve, KeyPairPaths, PrivateKey};
use serde_json::json;

use super::args::{CurveName, KeygenArgs};
use super::error::Failure;
use super::report::{Report, Reporter, Table};

pub(super) fn run(args: &KeygenArgs, reporter: &Reporter) -> Result<(), Failure> {
    let curve = match args.curve {
        Some(CurveName::P384) => Curve::P384,
        Some(CurveName::P256) | None => Curve::P256,
    };
    let paths = KeyPairPaths::named(&args.name);
    let key = PrivateKey::generate(curve)?;
    key.write_pair(&paths)?;
    let digest = key.public_key().hint();

    let mut table = Table::new();
    table.heading(format!("made a pair of keys on {curve}"));
    table.row(
        "private",
        format!(
            "{}: not encrypted; keep it to yourself",
            paths.private.display()
        ),
    );
    table.row(
        "public",
        format!("{}: give it to those who verify", paths.public.display()),
    );
    table.row("key", digest.to_string());
    let report = Report {
        found: Some(json!({
            "curve": curve.to_string(),
            "private": paths.private.display().to_string(),
            "public": paths.public.display().to_string(),
            "key": digest,
        })),
        ..Report::of("keygen")
    };
    reporter.result(report, &table)
}
