//! The trials of a search that was stopped: kept after each, and taken up again by the same search only.
//!
//! In: the [`Trial`]s so far and the [`Identity`] of the search, in which their number is not: a search may be taken up to go further. Out: a
//! file of JSON lines, a header and then a trial on each, with numbers as their bits:
//!
//! ```text
//! {"format":"panacea-trials","identity":{..},"run":"<64 hexadecimal digits>","version":2}
//! {"choice":{"alpha":"bits:3ff0000000000000",..},"points":[..],"steps":16}
//! ```
//!
//! Perturbations are not in it: they are large, and one of them can be found again.

use std::path::Path;

use panacea_formats::json::{JsonError, canonical, parse_strict};
use panacea_formats::{FormatError, OutputFile, Overwrite, Sha256};
use serde::{Deserialize, Serialize};

use super::{Identity, ResumeError, check_identity, from_bits, to_bits};
use crate::optimize::Trial;

/// Writes `trials` to `path`, in place of earlier ones. The file is complete or as it was.
///
/// # Errors
/// When it cannot be written.
pub fn save_trials(path: &Path, identity: &Identity, trials: &[Trial]) -> Result<(), ResumeError> {
    let header = Header {
        format: FORMAT.to_owned(),
        version: VERSION,
        run: identity.digest(),
        identity: identity.clone(),
    };
    let header = serde_json::to_value(&header).map_err(JsonError::from)?;
    let mut text = canonical(&header) + "\n";
    for trial in trials {
        text.push_str(&canonical(&to_bits(trial)?));
        text.push('\n');
    }
    let mut output = OutputFile::create(path, Overwrite::Replace, &[])?;
    output.write_all(text.as_bytes())?;
    // A file that could not be deleted after it was replaced is only litter.
    let _ = output.commit()?;
    Ok(())
}

/// Reads the trials at `path` for the search that is `identity`.
///
/// # Errors
/// When they cannot be read, or are of another search.
pub fn load_trials(path: &Path, identity: &Identity) -> Result<Vec<Trial>, ResumeError> {
    let text = std::fs::read_to_string(path).map_err(|error| FormatError::new(path, error))?;
    let syntax = |source: JsonError| ResumeError::Record {
        path: path.to_owned(),
        source,
    };
    let mut lines = text.lines();
    let header = parse_strict(lines.next().unwrap_or_default()).map_err(syntax)?;
    if header["format"] != FORMAT || header["version"] != VERSION {
        return Err(ResumeError::Malformed {
            path: path.to_owned(),
            reason: "its first line is not that of trials of this version of the program",
        });
    }
    let header: Header =
        serde_json::from_value(header).map_err(|error| syntax(JsonError::from(error)))?;
    check_identity(path, header.run, &header.identity, identity)?;
    lines
        .map(|line| parse_strict(line).and_then(from_bits).map_err(syntax))
        .collect()
}

/// The first line.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    format: String,
    version: u64,
    run: Sha256,
    identity: Identity,
}

/// What the file says that it is.
const FORMAT: &str = "panacea-trials";

/// The version that is written, and the only one that is read.
const VERSION: u64 = 2;

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn trials() -> Vec<Trial> {
        let point = json!({"rho": 0.1 + 0.2, "unrefused": 0.0, "doubt": 1e-300, "kl": 2.0});
        let choice = json!({"alpha": 1.0, "blocks": [1, 2], "modules": ["v_proj"], "steps": 3});
        [
            json!({"choice": choice, "steps": 3, "points": [point]}),
            json!({"choice": {}, "steps": 0, "points": [], "failure": "no gradient"}),
        ]
        .map(|trial| serde_json::from_value(trial).unwrap())
        .into()
    }

    fn identity(space: &str) -> Identity {
        let mut identity = Identity::default();
        identity.insert("space", space);
        identity
    }

    #[test]
    fn trials_come_back_bit_for_bit() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("trials");
        for count in 0..=2 {
            save_trials(&path, &identity("a"), &trials()[..count]).unwrap();
            assert_eq!(
                load_trials(&path, &identity("a")).unwrap(),
                trials()[..count]
            );
        }
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text.lines().count(), 3);
        assert!(text.contains("\"rho\":\"bits:3fd3333333333334\""), "{text}");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn trials_of_another_search_and_other_files_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("trials");
        assert!(matches!(
            load_trials(&path, &identity("a")),
            Err(ResumeError::Read(_))
        ));
        save_trials(&path, &identity("a"), &trials()).unwrap();
        match load_trials(&path, &identity("b")) {
            Err(ResumeError::OtherRun { differences, .. }) => {
                assert_eq!(differences.to_string(), "space was `a` and is `b`");
            }
            other => panic!("{other:?}"),
        }
        let text = std::fs::read_to_string(&path).unwrap();
        for (from, to) in [
            ("panacea-trials", "panacea-trails"),
            ("\"version\":2", "\"version\":3"),
            ("\"steps\":3}\n", "\"steps\":-3}\n"),
            ("\"points\"", "\"point\""),
            ("{\"choice\":{}", "{"),
        ] {
            let changed = text.replacen(from, to, 1);
            assert_ne!(changed, text, "{from}");
            std::fs::write(&path, changed).unwrap();
            assert!(load_trials(&path, &identity("a")).is_err(), "{from}");
        }
    }
}
