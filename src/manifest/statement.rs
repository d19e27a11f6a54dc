//! The manifest: what was written, from what, and how.
//!
//! In: the digest of every file of a finished checkpoint, and the run's options, inputs and measurements. Out: the bytes of
//! `panacea.manifest.json`, an in-toto Statement v1 whose predicate is SLSA provenance v1, and back. The bytes are a function of
//! what is put in: keys are sorted, and the only time in it comes from `SOURCE_DATE_EPOCH`.
//!
//! A manifest is a claim. Whose claim it is, and that nobody changed it, only a signature over it can say.
//!
//! Sources: <https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md>, <https://slsa.dev/spec/v1.1/provenance>.

use std::collections::BTreeMap;

use panacea_formats::json::{JsonError, canonical};
use panacea_formats::{Sha256, shown};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use thiserror::Error;

use super::json;
use super::timestamp::Timestamp;
use super::tree::{FileDigest, FileName};

/// What a checkpoint's files are and how they came to be.
#[derive(Clone, Debug, PartialEq)]
pub struct Statement {
    subjects: Vec<FileDigest>,
    provenance: Provenance,
}

impl Statement {
    /// States that `subjects`, every file written but the manifest and the signature, were made as `provenance` says.
    ///
    /// # Errors
    /// [`StatementError::NoSubject`] or [`StatementError::DuplicateSubject`].
    pub fn new(
        mut subjects: Vec<FileDigest>,
        provenance: Provenance,
    ) -> Result<Self, StatementError> {
        if subjects.is_empty() {
            return Err(StatementError::NoSubject);
        }
        subjects.sort_by(|a, b| a.name.cmp(&b.name));
        if let Some(pair) = subjects
            .windows(2)
            .find(|pair| pair[0].name == pair[1].name)
        {
            return Err(StatementError::DuplicateSubject {
                name: pair[0].name.clone(),
            });
        }
        Ok(Self {
            subjects,
            provenance,
        })
    }

    /// The files, sorted by name.
    pub fn subjects(&self) -> &[FileDigest] {
        &self.subjects
    }

    /// How they came to be.
    pub fn provenance(&self) -> &Provenance {
        &self.provenance
    }

    /// The manifest's text: JSON, indented, keys sorted, a newline at the end.
    pub fn to_json(&self) -> String {
        let subjects: Vec<_> = self
            .subjects
            .iter()
            .map(|subject| json!({"name": subject.name, "digest": {"sha256": subject.digest}}))
            .collect();
        json::pretty(&json!({
            "_type": STATEMENT_TYPE,
            "subject": subjects,
            "predicateType": PREDICATE_TYPE,
            "predicate": self.provenance.to_value(),
        }))
    }

    /// Reads a manifest that [`Statement::to_json`] of this or a later version wrote.
    ///
    /// Fields unknown to this version are passed over, as in-toto asks; an object that names a key twice is refused.
    ///
    /// # Errors
    /// [`StatementError`] saying what is not as the format has it.
    pub fn parse(bytes: &[u8]) -> Result<Self, StatementError> {
        let not_json = |source| StatementError::Json { source };
        let text = json::Text::parse(bytes).map_err(not_json)?;
        // The types first: what they are decides what the rest should look like.
        expect(&text.value, "/_type", STATEMENT_TYPE)?;
        expect(&text.value, "/predicateType", PREDICATE_TYPE)?;
        expect(
            &text.value,
            "/predicate/buildDefinition/buildType",
            BUILD_TYPE,
        )?;
        let text: StatementText = text.decode().map_err(not_json)?;
        let subjects = text
            .subject
            .into_iter()
            .map(|subject| FileDigest {
                name: subject.name,
                digest: subject.digest.sha256,
            })
            .collect();
        let run = text.predicate.run_details;
        let definition = text.predicate.build_definition;
        let provenance = Provenance {
            tool_version: run
                .builder
                .version
                .into_iter()
                .find_map(|(tool, version)| (tool == TOOL).then_some(version))
                .unwrap_or_default(),
            external_parameters: definition.external_parameters,
            internal_parameters: definition.internal_parameters,
            dependencies: definition
                .resolved_dependencies
                .into_iter()
                .map(|dependency| Dependency {
                    role: dependency.annotations.role,
                    name: dependency.name,
                    uri: dependency.uri,
                    digest: dependency.digest.sha256,
                })
                .collect(),
            byproducts: run
                .byproducts
                .into_iter()
                .map(|byproduct| Byproduct {
                    name: byproduct.name,
                    measured: byproduct.annotations,
                })
                .collect(),
            finished_on: run.metadata.finished_on,
        };
        Self::new(subjects, provenance)
    }
}

/// How a checkpoint was made.
#[derive(Clone, Debug, PartialEq)]
pub struct Provenance {
    /// The version of this program that ran.
    pub tool_version: String,
    /// The options that change bytes, as resolved: the same ones on the same inputs give the same files.
    pub external_parameters: Map<String, Value>,
    /// What is not meant to change bytes, such as the device.
    pub internal_parameters: Map<String, Value>,
    /// Every input, in the order given.
    pub dependencies: Vec<Dependency>,
    /// What was measured on the way, in the order given.
    pub byproducts: Vec<Byproduct>,
    /// When it was done, if `SOURCE_DATE_EPOCH` says so; the clock is never asked.
    pub finished_on: Option<Timestamp>,
}

impl Default for Provenance {
    fn default() -> Self {
        Self {
            tool_version: env!("CARGO_PKG_VERSION").to_owned(),
            external_parameters: Map::new(),
            internal_parameters: Map::new(),
            dependencies: Vec::new(),
            byproducts: Vec::new(),
            finished_on: None,
        }
    }
}

impl Provenance {
    fn to_value(&self) -> Value {
        let dependencies: Vec<_> = self
            .dependencies
            .iter()
            .map(|dependency| {
                let mut value = json!({
                    "name": dependency.name,
                    "digest": {"sha256": dependency.digest},
                    "annotations": {"role": dependency.role},
                });
                if let Some(uri) = &dependency.uri {
                    value["uri"] = json!(uri);
                }
                value
            })
            .collect();
        let byproducts: Vec<_> = self
            .byproducts
            .iter()
            .map(|byproduct| {
                // in-toto wants a URI, a digest or content beside a name; the digest leaves the measurements readable.
                let measured = Value::Object(byproduct.measured.clone());
                json!({
                    "name": byproduct.name,
                    "digest": {"sha256": Sha256::of(canonical(&measured).as_bytes())},
                    "annotations": measured,
                })
            })
            .collect();
        let mut metadata = Map::new();
        if let Some(time) = &self.finished_on {
            metadata.insert("finishedOn".to_owned(), json!(time));
        }
        json!({
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": self.external_parameters,
                "internalParameters": self.internal_parameters,
                "resolvedDependencies": dependencies,
            },
            "runDetails": {
                "builder": {"id": BUILDER_ID, "version": {TOOL: self.tool_version}},
                "metadata": metadata,
                "byproducts": byproducts,
            },
        })
    }
}

/// An input of the run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dependency {
    /// What it was used as.
    pub role: Role,
    /// Its name: a file's name inside its checkpoint or directory, never a path of the machine it was read on.
    pub name: String,
    /// Where it can be had, if that is known.
    pub uri: Option<String>,
    /// The SHA-256 of its bytes.
    pub digest: Sha256,
}

/// What an input was used as.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
#[non_exhaustive]
pub enum Role {
    /// A file of the checkpoint that was patched or converted.
    Checkpoint,
    /// A file of the model that the patched checkpoint is a LoRA adapter of.
    Base,
    /// The perturbation that was applied.
    Perturbation,
    /// The set h is measured on.
    HarmfulSet,
    /// The user's own fine-tuning data, which g is measured on.
    TaskSet,
    /// Benign text, whose divergence from the unpatched model is held down.
    BenignSet,
    /// Refusals of the harmful set's requests.
    RefusalSet,
    /// A GGUF file whose tokenizer was taken.
    Tokenizer,
    /// A role that a later version gave.
    Other(String),
}

impl Role {
    /// The role as manifests spell it.
    pub fn as_str(&self) -> &str {
        match self {
            Self::Checkpoint => "checkpoint",
            Self::Base => "base",
            Self::Perturbation => "perturbation",
            Self::HarmfulSet => "harmful-set",
            Self::TaskSet => "task-set",
            Self::BenignSet => "benign-set",
            Self::RefusalSet => "refusal-set",
            Self::Tokenizer => "tokenizer",
            Self::Other(role) => role,
        }
    }
}

impl From<String> for Role {
    fn from(text: String) -> Self {
        const KNOWN: [Role; 8] = [
            Role::Checkpoint,
            Role::Base,
            Role::Perturbation,
            Role::HarmfulSet,
            Role::TaskSet,
            Role::BenignSet,
            Role::RefusalSet,
            Role::Tokenizer,
        ];
        KNOWN
            .into_iter()
            .find(|role| role.as_str() == text)
            .unwrap_or(Self::Other(text))
    }
}

impl From<Role> for String {
    fn from(role: Role) -> Self {
        role.as_str().to_owned()
    }
}

/// Something measured on the way, such as the losses, the realized change or the scores.
#[derive(Clone, Debug, PartialEq)]
pub struct Byproduct {
    /// What was measured.
    pub name: String,
    /// The measurements. JSON has no NaN and no infinity; serde_json writes them as null.
    pub measured: Map<String, Value>,
}

/// Why a manifest cannot be made or read.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StatementError {
    /// It is not JSON, names a key twice, or a field is missing or of the wrong kind.
    #[error("the manifest is not the JSON it should be")]
    Json {
        /// What is wrong, and where.
        #[source]
        source: JsonError,
    },
    /// It is something else than a manifest, or one of another version.
    #[error("`{field}` of the manifest is {found}, where `{expected}` is understood")]
    Type {
        /// The field, as a JSON pointer.
        field: &'static str,
        /// What it should be.
        expected: &'static str,
        /// What it is.
        found: String,
    },
    /// It speaks of no file.
    #[error("the manifest names no file")]
    NoSubject,
    /// It speaks of one file twice.
    #[error("the manifest names `{name}` twice")]
    DuplicateSubject {
        /// The file.
        name: FileName,
    },
}

/// Refuses `value` unless the text at `field` is `expected`.
fn expect(
    value: &Value,
    field: &'static str,
    expected: &'static str,
) -> Result<(), StatementError> {
    let found = value.pointer(field).unwrap_or(&Value::Null);
    if found == expected {
        return Ok(());
    }
    Err(StatementError::Type {
        field,
        expected,
        found: if found.is_null() {
            "missing".to_owned()
        } else {
            shown(&found.to_string()).to_string()
        },
    })
}

/// The manifest as JSON has it, for reading.
#[derive(Deserialize)]
struct StatementText {
    subject: Vec<SubjectText>,
    predicate: PredicateText,
}

#[derive(Deserialize)]
struct SubjectText {
    name: FileName,
    digest: DigestText,
}

#[derive(Deserialize)]
struct DigestText {
    sha256: Sha256,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct PredicateText {
    build_definition: DefinitionText,
    run_details: RunText,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct DefinitionText {
    external_parameters: Map<String, Value>,
    #[serde(default)]
    internal_parameters: Map<String, Value>,
    #[serde(default)]
    resolved_dependencies: Vec<DependencyText>,
}

#[derive(Deserialize)]
struct DependencyText {
    name: String,
    uri: Option<String>,
    digest: DigestText,
    annotations: RoleText,
}

#[derive(Deserialize)]
struct RoleText {
    role: Role,
}

#[derive(Deserialize)]
struct RunText {
    builder: BuilderText,
    #[serde(default)]
    metadata: MetadataText,
    #[serde(default)]
    byproducts: Vec<ByproductText>,
}

#[derive(Deserialize)]
struct BuilderText {
    #[serde(default)]
    version: BTreeMap<String, String>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct MetadataText {
    finished_on: Option<Timestamp>,
}

#[derive(Deserialize)]
struct ByproductText {
    name: String,
    #[serde(default)]
    annotations: Map<String, Value>,
}

/// `_type` of an in-toto Statement v1.
pub(super) const STATEMENT_TYPE: &str = "https://in-toto.io/Statement/v1";

/// `predicateType` of SLSA provenance v1.
const PREDICATE_TYPE: &str = "https://slsa.dev/provenance/v1";

/// What the parameters of a manifest mean; another meaning would be another URI.
const BUILD_TYPE: &str =
    "https://github.com/panacea-patch/panacea-patch/blob/main/docs/manifest.md#build-type-v1";

/// Who ran the program: its user, on a machine that vouches for nothing.
const BUILDER_ID: &str =
    "https://github.com/panacea-patch/panacea-patch/blob/main/docs/manifest.md#builder-local-v1";

/// The program's key among the versions of a builder.
const TOOL: &str = "panacea-patch";

#[cfg(test)]
mod tests {
    use super::*;

    /// A manifest with something in every field.
    fn full() -> Statement {
        let object = |value: Value| match value {
            Value::Object(map) => map,
            other => panic!("{other} is not an object"),
        };
        let file = |name: &str| FileDigest {
            name: name.parse().unwrap(),
            digest: Sha256::of(name.as_bytes()),
        };
        let provenance = Provenance {
            tool_version: "0.1.0".to_owned(),
            external_parameters: object(json!({"rho": 0.5, "method": "adaptive", "seed": 7})),
            internal_parameters: object(json!({"device": "cpu"})),
            dependencies: vec![
                Dependency {
                    role: Role::Checkpoint,
                    name: "model.safetensors".to_owned(),
                    uri: Some("https://huggingface.co/example/model".to_owned()),
                    digest: Sha256::of(b"base"),
                },
                Dependency {
                    role: Role::HarmfulSet,
                    name: "harmful.jsonl".to_owned(),
                    uri: None,
                    digest: Sha256::of(b"harmful"),
                },
            ],
            byproducts: vec![Byproduct {
                name: "losses".to_owned(),
                measured: object(json!({"h": [1.5, 2.5]})),
            }],
            finished_on: Some(Timestamp::from_source_date_epoch("1738346400").unwrap()),
        };
        Statement::new(vec![file("sub.txt"), file("sub/b"), file("a")], provenance).unwrap()
    }

    #[test]
    fn reads_back_everything_it_writes() {
        let statement = full();
        let text = statement.to_json();
        let read = Statement::parse(text.as_bytes()).unwrap();
        assert_eq!(read, statement);
        assert_eq!(read.to_json(), text);
        let names: Vec<_> = read.subjects().iter().map(|s| s.name.as_str()).collect();
        assert_eq!(names, ["a", "sub/b", "sub.txt"]);
    }

    #[test]
    fn writes_the_golden_bytes() {
        let golden = include_str!("../../testdata/manifest-v1/every-field.json");
        assert_eq!(full().to_json(), golden);
    }

    #[test]
    fn says_nothing_of_time_unless_told() {
        let mut statement = full();
        statement.provenance.finished_on = None;
        let text = statement.to_json();
        assert!(!text.contains("finishedOn"), "{text}");
        assert_eq!(Statement::parse(text.as_bytes()).unwrap(), statement);
    }

    #[test]
    fn refuses_what_is_no_manifest_of_this_version() {
        let text = full().to_json();
        for (was, is, field) in [
            (
                STATEMENT_TYPE,
                "https://in-toto.io/Statement/v0.1",
                "/_type",
            ),
            (
                PREDICATE_TYPE,
                "https://slsa.dev/provenance/v2",
                "/predicateType",
            ),
            (
                "build-type-v1",
                "build-type-v2",
                "/predicate/buildDefinition/buildType",
            ),
        ] {
            let changed = text.replace(was, is);
            match Statement::parse(changed.as_bytes()) {
                Err(StatementError::Type { field: found, .. }) => assert_eq!(found, field),
                other => panic!("{field}: {other:?}"),
            }
        }
        assert!(matches!(
            Statement::parse(b"{}"),
            Err(StatementError::Type { field: "/_type", found, .. }) if found == "missing"
        ));
    }

    #[test]
    fn refuses_repeated_keys_names_and_paths_that_leave_the_directory() {
        let text = full().to_json();
        let repeated_key = text.replacen("\"name\": \"a\"", "\"name\": \"a\", \"name\": \"b\"", 1);
        let outside = text.replacen("\"name\": \"a\"", "\"name\": \"../a\"", 1);
        let bad_digest = text.replacen("\"sha256\": \"", "\"sha256\": \"x", 1);
        for changed in [repeated_key, outside, bad_digest] {
            assert_ne!(changed, text);
            assert!(matches!(
                Statement::parse(changed.as_bytes()),
                Err(StatementError::Json { .. })
            ));
        }
        let repeated_name = text.replacen("\"name\": \"a\"", "\"name\": \"sub/b\"", 1);
        assert!(matches!(
            Statement::parse(repeated_name.as_bytes()),
            Err(StatementError::DuplicateSubject { .. })
        ));
        assert!(matches!(
            Statement::new(Vec::new(), Provenance::default()),
            Err(StatementError::NoSubject)
        ));
    }

    #[test]
    fn fields_and_roles_of_later_versions_are_passed_over() {
        let text = full()
            .to_json()
            .replace("\"harmful-set\"", "\"judge\"")
            .replacen("{\n", "{\n  \"later\": {\"x\": 1},\n", 1);
        let read = Statement::parse(text.as_bytes()).unwrap();
        assert_eq!(
            read.provenance().dependencies[1].role,
            Role::Other("judge".to_owned())
        );
    }

    #[test]
    fn every_role_reads_back_as_itself() {
        for role in [
            Role::Checkpoint,
            Role::Perturbation,
            Role::HarmfulSet,
            Role::TaskSet,
            Role::BenignSet,
            Role::RefusalSet,
        ] {
            assert_eq!(Role::from(String::from(role.clone())), role);
        }
    }
}
