//! The state of a run that was stopped: saved between steps, and taken up again by the same run only.
//!
//! In: a [`State`] of the optimizer and the [`Identity`] of the run, which names everything that changes its numbers. Out: a
//! file from which a run of the same identity goes on to the same bits as if it had never been stopped. Another run is
//! refused with what differs.
//!
//! The file is a safetensors file of `F32` tensors `<name>.<target>`, each of one dimension, whose metadata has one key,
//! `panacea-state`: canonical JSON with the identity, the steps so far, and the names of the tensors. Numbers of the steps are
//! stored as their bits, since a decimal text need not come back as the same number. The file is for this machine
//! and this version of the program; it is deleted when the run is done.

mod shared;
mod trials;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use panacea_formats::json::{JsonError, canonical, parse_strict};
use panacea_formats::{
    FormatError, OutputError, OutputFile, Overwrite, Problems, SafetensorsFile, Sha256,
    StoredFloats, shown, write_tensors,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use thiserror::Error;

pub use shared::{share, share_trials};
pub use trials::{load_trials, save_trials};

use crate::model::TargetTensors;
use crate::optimize::{State, StepRecord};
use crate::ranks::RanksError;

/// Everything that changes a run's numbers, by name: settings, digests of data and weights, the program's version.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Identity(BTreeMap<String, String>);

impl Identity {
    /// Names one more thing; a second value for the same name replaces the first.
    pub fn insert(&mut self, name: impl Into<String>, value: impl fmt::Display) {
        self.0.insert(name.into(), value.to_string());
    }

    /// One digest of all of it.
    pub fn digest(&self) -> Sha256 {
        Sha256::of(canonical(&json!(self.0)).as_bytes())
    }

    /// What `later` has otherwise than `self`.
    pub fn differences(&self, later: &Self) -> Vec<Difference> {
        let names: std::collections::BTreeSet<&String> =
            self.0.keys().chain(later.0.keys()).collect();
        names
            .into_iter()
            .filter(|name| self.0.get(*name) != later.0.get(*name))
            .map(|name| Difference {
                name: name.clone(),
                saved: self.0.get(name).cloned(),
                now: later.0.get(name).cloned(),
            })
            .collect()
    }
}

/// Writes `state` to `path`, in place of an earlier one. The file is complete or as it was.
///
/// # Errors
/// When it cannot be written.
pub fn save(path: &Path, identity: &Identity, state: &State<'_>) -> Result<(), ResumeError> {
    let record = Record {
        format_version: FORMAT_VERSION,
        run: identity.digest(),
        identity: identity.clone(),
        steps: state.steps.iter().map(to_bits).collect::<Result<_, _>>()?,
        tensors: state
            .tensors
            .iter()
            .map(|(name, tensors)| (name.clone(), tensors.iter().len()))
            .collect(),
    };
    let mut output = OutputFile::create(path, Overwrite::Replace, &[])?;
    let text = canonical(&serde_json::to_value(&record).map_err(JsonError::from)?);
    let stored: Vec<(String, StoredFloats<'_>)> = state
        .tensors
        .iter()
        .flat_map(|(name, tensors)| {
            tensors.iter().enumerate().map(move |(target, values)| {
                let shape = vec![values.len()];
                (tensor_name(name, target), StoredFloats { shape, values })
            })
        })
        .collect();
    let tensors = stored.iter().map(|(name, tensor)| (name, tensor));
    write_tensors((METADATA_KEY, &text), tensors, |bytes| {
        output.write_all(bytes)
    })?;
    // A state that could not be deleted after it was replaced is only litter.
    let _ = output.commit()?;
    Ok(())
}

/// Reads the state at `path` for the run that is `identity`.
///
/// # Errors
/// When it cannot be read, is not such a file, or is of another run.
pub fn load(path: &Path, identity: &Identity) -> Result<State<'static>, ResumeError> {
    let file = SafetensorsFile::open(path)?;
    let malformed = |reason| ResumeError::Malformed {
        path: path.to_owned(),
        reason,
    };
    let [(key, text)] = file.metadata() else {
        return Err(malformed("it has not the one key `panacea-state`"));
    };
    if key != METADATA_KEY {
        return Err(malformed("it has not the one key `panacea-state`"));
    }
    let syntax = |source: JsonError| ResumeError::Record {
        path: path.to_owned(),
        source,
    };
    let value = parse_strict(text).map_err(syntax)?;
    if value["format_version"] != json!(FORMAT_VERSION) {
        return Err(malformed("another version of the program wrote it"));
    }
    let record: Record =
        serde_json::from_value(value).map_err(|error| syntax(JsonError::from(error)))?;
    check_identity(path, record.run, &record.identity, identity)?;
    let steps: Vec<StepRecord> = record
        .steps
        .into_iter()
        .map(from_bits)
        .collect::<Result<_, _>>()
        .map_err(syntax)?;
    if steps
        .iter()
        .enumerate()
        .any(|(place, step)| step.step != place)
    {
        return Err(malformed("its steps are not in order"));
    }
    let mut tensors = Vec::new();
    for (name, targets) in record.tensors {
        // Not sized by a number from the file: each target must be there before it counts.
        let mut of_name = Vec::new();
        for target in 0..targets {
            let stored = file
                .tensor(&tensor_name(&name, target))
                .ok_or_else(|| malformed("a tensor of its record is missing"))?;
            let mut values = vec![0.0; stored.elements()];
            stored
                .widen_into(0..stored.elements(), &mut values)
                .map_err(|_| malformed("a tensor of it is not F32"))?;
            if values.iter().any(|value| !value.is_finite()) {
                return Err(malformed("a tensor of it is not finite"));
            }
            of_name.push(values);
        }
        tensors.push((name, Cow::Owned(TargetTensors::new(of_name))));
    }
    Ok(State { steps, tensors })
}

/// Why a state, or trials, cannot be saved or taken up again.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ResumeError {
    /// A sound safetensors file that is no state.
    #[error("`{}` is not a saved state: {reason}", path.display())]
    Malformed {
        /// The file.
        path: std::path::PathBuf,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A state of a run with other settings, data or weights.
    #[error("the state in `{}` is of another run", path.display())]
    OtherRun {
        /// The file.
        path: std::path::PathBuf,
        /// Everything that differs.
        #[source]
        differences: Problems<Difference>,
    },
    /// The file cannot be read.
    #[error(transparent)]
    Read(#[from] FormatError),
    /// The record in it is not the JSON that it should be.
    #[error("the record in `{}` is not the JSON that it should be", path.display())]
    Record {
        /// The file.
        path: std::path::PathBuf,
        /// What is wrong, and where.
        source: JsonError,
    },
    /// A number of a step cannot be stored.
    #[error("the numbers of a step or a trial cannot be stored")]
    Step(#[from] JsonError),
    /// The file cannot be written.
    #[error(transparent)]
    Write(#[from] OutputError),
    /// Another rank cannot go on.
    #[error(transparent)]
    Ranks(#[from] RanksError),
}

/// A thing that two runs do not have in common.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// What it is.
    pub name: String,
    /// What the saved run had.
    pub saved: Option<String>,
    /// What this run has.
    pub now: Option<String>,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = |value: &Option<String>| match value {
            Some(value) => format!("`{}`", shown(value)),
            None => "absent".to_owned(),
        };
        write!(
            f,
            "{} was {} and is {}",
            shown(&self.name),
            value(&self.saved),
            value(&self.now)
        )
    }
}

/// The record in the metadata.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    format_version: u64,
    /// The identity's digest: what decides.
    run: Sha256,
    /// The identity itself: what a refusal speaks of.
    identity: Identity,
    steps: Vec<Value>,
    /// The name of each tensor of the state, and how many targets it has.
    tensors: Vec<(String, usize)>,
}

fn tensor_name(name: &str, target: usize) -> String {
    format!("{name}.{target}")
}

/// Refuses a file of another run, that of `found` with the digest `run`, than the one that is `identity`.
fn check_identity(
    path: &Path,
    run: Sha256,
    found: &Identity,
    identity: &Identity,
) -> Result<(), ResumeError> {
    if run == identity.digest() && found == identity {
        return Ok(());
    }
    Err(Problems::none_of(found.differences(identity)).map_or_else(
        |differences| ResumeError::OtherRun {
            path: path.to_owned(),
            differences,
        },
        |()| ResumeError::Malformed {
            path: path.to_owned(),
            reason: "its digest is not that of its record",
        },
    ))
}

/// As JSON, with each fractional number as the text of its bits.
fn to_bits(record: &impl Serialize) -> Result<Value, JsonError> {
    Ok(each_leaf(
        serde_json::to_value(record)?,
        &|value| match value.as_f64() {
            Some(number) if value.is_f64() => {
                Value::from(format!("{BITS}{:016x}", number.to_bits()))
            }
            _ => value,
        },
    ))
}

fn from_bits<T: DeserializeOwned>(stored: Value) -> Result<T, JsonError> {
    Ok(serde_json::from_value(each_leaf(stored, &|value| {
        let bits = value
            .as_str()
            .and_then(|text| u64::from_str_radix(text.strip_prefix(BITS)?, 16).ok());
        match bits {
            Some(bits) => Value::from(f64::from_bits(bits)),
            None => value,
        }
    }))?)
}

fn each_leaf(value: Value, change: &impl Fn(Value) -> Value) -> Value {
    match value {
        Value::Object(fields) => fields
            .into_iter()
            .map(|(name, value)| (name, each_leaf(value, change)))
            .collect::<Map<_, _>>()
            .into(),
        Value::Array(values) => values
            .into_iter()
            .map(|value| each_leaf(value, change))
            .collect(),
        leaf => change(leaf),
    }
}

/// The version that is written, and the only one that is read.
const FORMAT_VERSION: u64 = 1;

/// The one key of the metadata.
const METADATA_KEY: &str = "panacea-state";

/// Marks the text of a number's bits.
const BITS: &str = "bits:";

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> State<'static> {
        let step = json!({
            "step": 0, "phase": "contrast", "h": 0.1 + 0.2, "norm": 1e-300, "refusing": 1.0,
        });
        State {
            steps: vec![serde_json::from_value(step).unwrap()],
            tensors: vec![
                (
                    "delta".to_owned(),
                    Cow::Owned(TargetTensors::new(vec![vec![1.0, -0.0, 1e-45], vec![0.1]])),
                ),
                (
                    "along".to_owned(),
                    Cow::Owned(TargetTensors::new(vec![vec![3.0; 3], vec![f32::MAX]])),
                ),
            ],
        }
    }

    fn identity(rho: &str) -> Identity {
        let mut identity = Identity::default();
        identity.insert("rho", rho);
        identity.insert("seed", 7);
        identity
    }

    #[test]
    fn a_state_comes_back_bit_for_bit() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state");
        for _ in 0..2 {
            save(&path, &identity("1"), &state()).unwrap();
        }
        let found = load(&path, &identity("1")).unwrap();
        assert_eq!(found, state());
        let zero = found.tensors[0].1.tensor(0)[1];
        assert!(zero.is_sign_negative());
        assert_eq!(
            found.steps[0].h.unwrap().to_bits(),
            (0.1_f64 + 0.2).to_bits()
        );
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_state_of_another_run_is_refused_with_what_differs() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state");
        save(&path, &identity("1"), &state()).unwrap();
        let mut other = identity("2");
        other.insert("task", "t.jsonl");
        match load(&path, &other) {
            Err(ResumeError::OtherRun { differences, .. }) => assert_eq!(
                differences.to_string(),
                "rho was `1` and is `2`; task was absent and is `t.jsonl`"
            ),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_file_that_is_no_state_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state");
        save(&path, &identity("1"), &state()).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let altered = |from: &str, to: &str| {
            let text = String::from_utf8_lossy(&bytes[..bytes.len() - 32]).into_owned();
            let changed = text.replacen(from, to, 1);
            assert_ne!(changed, text, "{from}");
            [changed.as_bytes(), &bytes[bytes.len() - 32..]].concat()
        };
        for bytes in [
            bytes[..bytes.len() - 1].to_vec(),
            altered("panacea-state", "panacea-stale"),
            altered("format_version\\\":1", "format_version\\\":2"),
            altered("[\\\"delta\\\",2]", "[\\\"delta\\\",3]"),
            altered("\\\"step\\\":0", "\\\"step\\\":1"),
        ] {
            std::fs::write(&path, bytes).unwrap();
            assert!(load(&path, &identity("1")).is_err());
        }
    }
}
