//! Makes keys, signs and verifies from the command line, with the library alone.
//!
//!     cargo run --example signature -- keygen release            # release.pem, release.pub.pem
//!     cargo run --example signature -- sign DIR --key release.pem
//!     cargo run --example signature -- verify DIR --key release.pub.pem
//!
//! `keygen NAME --curve p384` makes a key on the other curve; `--signature PATH` names a signature elsewhere than at its usual
//! place. Exit codes: 0 done, 1 not verified or failed, 2 usage.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "an example talks to its user"
)]

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use panacea_patch::manifest::{
    Curve, KeyPairPaths, PrivateKey, PublicKey, Signature, signature_path, verify,
};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let Some((command, target, options)) = parse(&arguments) else {
        eprintln!(
            "usage: signature keygen|sign|verify TARGET [--key K] [--signature S] [--curve C]"
        );
        return ExitCode::from(2);
    };
    match run(command, target, &options) {
        Ok(done) => {
            println!("{done}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            let mut cause = error.source();
            while let Some(because) = cause {
                eprintln!("  because: {because}");
                cause = because.source();
            }
            ExitCode::FAILURE
        }
    }
}

/// What may follow the target.
#[derive(Default)]
struct Options {
    key: PathBuf,
    signature: Option<PathBuf>,
    curve: Option<String>,
}

fn parse(arguments: &[String]) -> Option<(&str, &Path, Options)> {
    let [command, target, rest @ ..] = arguments else {
        return None;
    };
    let mut options = Options::default();
    for pair in rest.chunks(2) {
        let [flag, value] = pair else {
            return None;
        };
        match flag.as_str() {
            "--key" => options.key = value.into(),
            "--signature" => options.signature = Some(value.into()),
            "--curve" => options.curve = Some(value.clone()),
            _ => return None,
        }
    }
    Some((command, Path::new(target), options))
}

fn run(command: &str, target: &Path, options: &Options) -> Result<String, Box<dyn Error>> {
    match command {
        "keygen" => {
            let curve = match options.curve.as_deref() {
                None | Some("p256") => Curve::P256,
                Some("p384") => Curve::P384,
                Some(other) => return Err(format!("no curve `{other}`").into()),
            };
            let paths = KeyPairPaths::named(target);
            PrivateKey::generate(curve)?.write_pair(&paths)?;
            Ok(format!("wrote {}", paths.public.display()))
        }
        "sign" => {
            let usual = signature_path(target);
            let path = options.signature.as_deref().unwrap_or(&usual);
            let key = PrivateKey::read(&options.key)?;
            let signature = Signature::of(target, path, &key)?;
            std::fs::write(path, signature.to_json())?;
            Ok(format!("signed as {}", path.display()))
        }
        "verify" => {
            let key = PublicKey::read(&options.key)?;
            let verified = verify(target, options.signature.as_deref(), &key)?;
            Ok(format!("verified {} files", verified.files().len()))
        }
        other => Err(format!("no command `{other}`").into()),
    }
}
