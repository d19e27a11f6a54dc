//! What the user reads when something fails: what, why, what to do; and the exit code.
//!
//! In: the typed errors of the stages. Out: a [`Failure`]. The libraries' errors say what was found and where; what to do about it
//! is added here, because only here the flags are known. A hint never suggests what the user has already done.

mod evaluation;

use std::error::Error;
use std::io;
use std::path::Path;

use panacea_formats::{
    AdapterBaseProblem, BaseProblem, CheckpointError, FormatError, FormatErrorKind, OutputError,
    OutputErrorKind, PeftError, PerturbationError, PerturbationWriteError, Problems, Space,
    WriteError,
};
use panacea_patch::apply::{ApplyError, MergeError};
use panacea_patch::data::{DataError, DataErrorKind, EncodeError, RowProblem};
use panacea_patch::manifest::{
    FileNameError, KeyError, SignError, StatementError, TreeError, VerifyError,
};
use panacea_patch::model::device::{DeviceError, DeviceErrorKind};
use panacea_patch::model::{ConfigError, PackError, WeightsError};
use panacea_patch::optimize::{OptimizeError, Set};
use panacea_patch::resume::ResumeError;
use serde_json::Value;

/// How the program ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// All that was asked for is done.
    Done = 0,
    /// A check said no: verification failed, or nothing keeps to the budget.
    SaidNo = 1,
    /// The command line was not understood.
    Usage = 2,
    /// An input was refused.
    Refused = 3,
    /// The machine did not do its part: disk, permission, memory, device.
    Environment = 4,
    /// Stopped from outside, as shells report it.
    Interrupted = 130,
}

impl Exit {
    /// The way of ending that has this code; one that is none is the machine's.
    pub(crate) fn of_code(code: u8) -> Self {
        let all = [
            Self::Done,
            Self::SaidNo,
            Self::Usage,
            Self::Refused,
            Self::Interrupted,
        ];
        let mut all = all.into_iter();
        all.find(|exit| *exit as u8 == code)
            .unwrap_or(Self::Environment)
    }
}

/// Why the program ends otherwise than done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) exit: Exit,
    /// What failed.
    pub(crate) error: String,
    /// Why.
    pub(crate) because: Option<String>,
    /// What to do.
    pub(crate) hint: Option<String>,
    /// What was found out all the same, for machines.
    pub(crate) found: Option<Value>,
    /// Whether machines were told of it already, with a result.
    pub(crate) told: bool,
}

impl Failure {
    pub(crate) fn new(exit: Exit, error: impl Into<String>) -> Self {
        Self {
            exit,
            error: error.into(),
            because: None,
            hint: None,
            found: None,
            told: false,
        }
    }

    /// `error` with its sources as the reason.
    pub(crate) fn of(exit: Exit, error: &dyn Error) -> Self {
        Self {
            because: error.source().map(chain),
            ..Self::new(exit, error.to_string())
        }
    }

    /// `what` failed because of `error` and its sources.
    pub(crate) fn doing(exit: Exit, what: impl Into<String>, error: &dyn Error) -> Self {
        Self {
            because: Some(chain(error)),
            ..Self::new(exit, what)
        }
    }

    pub(crate) fn because(mut self, because: impl Into<String>) -> Self {
        self.because = Some(because.into());
        self
    }

    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    pub(crate) fn found(mut self, found: Value) -> Self {
        self.found = Some(found);
        self
    }

    fn maybe_hint(mut self, hint: Option<impl Into<String>>) -> Self {
        self.hint = hint.map(Into::into);
        self
    }

    /// A command line that contradicts itself.
    pub(crate) fn usage(error: impl Into<String>) -> Self {
        Self::new(Exit::Usage, error)
    }

    /// `flag` was given where nothing reads it.
    pub(crate) fn no_effect(flag: &str, here: &str) -> Self {
        Self::usage(format!("`{flag}` has no effect {here}"))
    }

    /// Work that was stopped.
    pub(crate) fn interrupted() -> Self {
        Self::new(Exit::Interrupted, "interrupted")
    }
}

impl Failure {
    /// What clap says of a command line, in three parts. `first` is the first word after the program's name.
    pub(crate) fn of_command_line(error: &clap::Error, first: Option<&str>) -> Self {
        let text = error.to_string();
        let mut lines = text.lines();
        let headline = lines.next().unwrap_or_default();
        let headline = headline.strip_prefix("error: ").unwrap_or(headline);
        let mut because = Vec::new();
        let mut hint = None;
        // The reason may run over several lines, until the empty one before the usage.
        let mut part = &mut because;
        let mut tips = Vec::new();
        for line in lines {
            let line = line.trim();
            if line.starts_with("Usage:") || line.starts_with("For more information") {
                break;
            } else if let Some(tip) = line.strip_prefix("tip: ") {
                tips.push(tip);
                part = &mut tips;
            } else if !line.is_empty() {
                part.push(line);
            }
        }
        let mut headline = headline.to_owned();
        let mut because = because.join(" ");
        if let Some((what, why)) = headline.clone().split_once("': ") {
            because = format!("{why} {because}").trim().to_owned();
            headline = format!("{what}'");
        }
        if !tips.is_empty() {
            hint = Some(tips.join("; "));
        }
        let slip = first.filter(|word| !COMMANDS.contains(word));
        if let Some(command) = slip.and_then(|word| panacea_formats::nearest(word, COMMANDS)) {
            hint = Some(format!(
                "if a subcommand was meant, it is `panacea-patch {command}`"
            ));
        }
        let command = first
            .filter(|word| COMMANDS.contains(word))
            .map(|word| format!("{word} "))
            .unwrap_or_default();
        Self {
            because: (!because.is_empty()).then_some(because),
            ..Self::usage(headline.trim_end_matches(':'))
        }
        .hint(hint.unwrap_or_else(|| format!("see `panacea-patch {command}--help`")))
    }
}

/// The subcommands, for slips in them.
const COMMANDS: [&str; 10] = [
    "eval",
    "optimize",
    "apply",
    "convert",
    "verify",
    "inspect",
    "keygen",
    "sign",
    "completions",
    "man",
];

/// An error and its sources, from the nearest to the last.
pub(super) fn chain(error: &dyn Error) -> String {
    let mut said = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        said.push_str(": ");
        said.push_str(&cause.to_string());
        source = cause.source();
    }
    said
}

/// Whether the machine is to blame for `error`, rather than the path that was named.
fn exit_of(error: &io::Error) -> Exit {
    match error.kind() {
        io::ErrorKind::NotFound
        | io::ErrorKind::NotADirectory
        | io::ErrorKind::IsADirectory
        | io::ErrorKind::InvalidData
        | io::ErrorKind::InvalidFilename
        | io::ErrorKind::InvalidInput => Exit::Refused,
        _ => Exit::Environment,
    }
}

impl From<FormatError> for Failure {
    fn from(error: FormatError) -> Self {
        let exit = match error.is_environment() {
            true => Exit::Environment,
            false => Exit::Refused,
        };
        Self::of(exit, &error).maybe_hint(format_hint(&error))
    }
}

fn format_hint(error: &FormatError) -> Option<String> {
    let own = match &error.kind {
        FormatErrorKind::Io(reason) if reason.kind() == io::ErrorKind::NotFound => {
            return missing_path_hint(&error.path);
        }
        FormatErrorKind::Io(reason) if reason.kind() == io::ErrorKind::PermissionDenied => {
            "ask for permission to read it"
        }
        FormatErrorKind::Io(_) => return None,
        FormatErrorKind::Checkpoint(CheckpointError::NoWeights { .. }) => {
            "give a directory with `model.safetensors` (or its index and shards), or one `.safetensors` or `.gguf` file"
        }
        FormatErrorKind::Checkpoint(CheckpointError::OtherFormat { .. }) => {
            "convert it to safetensors first, for example with transformers' `save_pretrained`"
        }
        FormatErrorKind::Checkpoint(CheckpointError::LaterPart { .. }) => {
            "give the first part; the others are found beside it"
        }
        FormatErrorKind::Checkpoint(CheckpointError::Ambiguous { .. }) => {
            "move the model or the adapter into a directory of its own"
        }
        FormatErrorKind::Checkpoint(CheckpointError::HalfAdapter { .. }) => {
            "give a PEFT directory: `adapter_config.json` and `adapter_model.safetensors`, as `save_pretrained` writes them"
        }
        FormatErrorKind::Checkpoint(_) => {
            "the download may be incomplete or mixed from two versions; fetch the directory again"
        }
        FormatErrorKind::Peft(PeftError::Unsupported { .. } | PeftError::UnknownField { .. }) => {
            "merge the adapter into its base with PEFT's `merge_and_unload`, and patch the result"
        }
        FormatErrorKind::Peft(_) => {
            "config and tensors are to be as PEFT's `save_pretrained` wrote them; fetch them again"
        }
        FormatErrorKind::Perturbation(PerturbationError::NoRecord { .. }) => {
            "give a file that `panacea-patch optimize` wrote"
        }
        FormatErrorKind::Perturbation(PerturbationError::Direction { .. }) => {
            "perturbations that weaken a model are not applied"
        }
        FormatErrorKind::Perturbation(PerturbationError::Version { .. }) => {
            "use the version of panacea-patch that wrote it"
        }
        FormatErrorKind::Perturbation(_) => {
            "the file was altered or damaged; make it again with `panacea-patch optimize`"
        }
        FormatErrorKind::Gguf(_) | FormatErrorKind::Safetensors(_) => {
            "the file may be incomplete or damaged; compare its size and digest with the source's"
        }
        _ => return None,
    };
    Some(own.to_owned())
}

/// A path that does not exist may be a subcommand with a slip in it.
fn missing_path_hint(path: &Path) -> Option<String> {
    let name = path.to_str()?;
    match panacea_formats::nearest(name, COMMANDS) {
        Some(command) => Some(format!(
            "if a subcommand was meant, it is `panacea-patch {command}`"
        )),
        None => Some("check the path".to_owned()),
    }
}

impl From<OutputError> for Failure {
    fn from(error: OutputError) -> Self {
        let hint = match &error.kind {
            OutputErrorKind::Exists => Some("pass --force, or choose another --output"),
            OutputErrorKind::NotReplaced { .. } | OutputErrorKind::OverlapsInput { .. } => {
                Some("choose another --output")
            }
            OutputErrorKind::NoName => Some("name a file or directory with --output"),
            OutputErrorKind::NoParent { .. } => {
                Some("make that directory first, or choose another --output")
            }
            OutputErrorKind::NotEnoughSpace { .. } => {
                Some("make room, or choose an --output on another disk")
            }
            OutputErrorKind::Io(reason) => match reason.kind() {
                io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                    Some("choose an --output where you may write")
                }
                io::ErrorKind::StorageFull
                | io::ErrorKind::QuotaExceeded
                | io::ErrorKind::FileTooLarge => {
                    Some("make room, or choose an --output on another disk")
                }
                _ => None,
            },
            _ => None,
        };
        let exit = match error.is_environment() {
            true => Exit::Environment,
            false => Exit::Refused,
        };
        Self::of(exit, &error).maybe_hint(hint)
    }
}

impl From<DataError> for Failure {
    fn from(error: DataError) -> Self {
        let exit = match &error.kind {
            DataErrorKind::Io(reason) => exit_of(reason),
            _ => Exit::Refused,
        };
        let hint = match &error.kind {
            DataErrorKind::Io(reason) if reason.kind() == io::ErrorKind::NotFound => {
                Some("check the path".to_owned())
            }
            DataErrorKind::Io(reason) if reason.kind() == io::ErrorKind::PermissionDenied => {
                Some("ask for permission to read it".to_owned())
            }
            DataErrorKind::Io(_) => None,
            DataErrorKind::OtherFormat(_) => {
                Some("unpack or convert it to JSON lines first".to_owned())
            }
            DataErrorKind::Malformed(_) => {
                Some("each row is one JSON object, or the file one JSON array of them".to_owned())
            }
            DataErrorKind::NoRows { .. } => {
                Some("give a file with at least one row, or leave the flag out".to_owned())
            }
            DataErrorKind::NothingSelected { .. } => {
                Some("correct what follows `#`, or leave it out to take all rows".to_owned())
            }
            DataErrorKind::Rows(problems) => problems
                .all()
                .iter()
                .find_map(|problem| row_hint(&problem.kind)),
            _ => None,
        };
        Self::of(exit, &error).maybe_hint(hint)
    }
}

fn row_hint(problem: &RowProblem) -> Option<String> {
    match problem {
        RowProblem::NotAnObject(_) => Some(
            "each row is an object, such as {\"prompt\": \"...\", \"target\": \"...\"}".to_owned(),
        ),
        RowProblem::MarkedSafe => {
            Some("add `#is_safe=false` to the path to leave such rows out".to_owned())
        }
        RowProblem::NoField { names, found, .. } => {
            // The fields that are there, as the message lists them.
            let there = found.split('`').skip(1).step_by(2);
            let slip = there
                .filter_map(|field| {
                    let meant = panacea_formats::nearest(field, names.iter().copied())?;
                    Some((field, meant))
                })
                .next();
            Some(match slip {
                Some((field, meant)) => format!("did you mean `{meant}` with `{field}`?"),
                None => format!("name a field of each row `{}`", names.first()?),
            })
        }
        _ => None,
    }
}

impl From<EncodeError> for Failure {
    fn from(error: EncodeError) -> Self {
        let exit = match &error {
            EncodeError::Io { source, .. } => exit_of(source),
            _ => Exit::Refused,
        };
        let hint = match &error {
            EncodeError::NoTokenizer => Some(
                "put the base model's `tokenizer.json` there, or load a perturbation with --perturbation, which needs none",
            ),
            EncodeError::NoEos => {
                Some("name the token in `generation_config.json`, as `eos_token_id`")
            }
            EncodeError::NoChatTemplate => Some("pass --template alpaca or --template raw"),
            EncodeError::Template { .. } | EncodeError::ChatTemplate(_) => {
                Some("pass --template alpaca if the model was fine-tuned without its chat template")
            }
            EncodeError::VocabularyDoesNotFit { .. } => {
                Some("the tokenizer is of another model; put this model's `tokenizer.json` there")
            }
            EncodeError::NoResponseLeft { .. } => Some("raise --max-length, or drop these rows"),
            _ => None,
        };
        Self::doing(exit, "rows cannot be turned into tokens", &error).maybe_hint(hint)
    }
}

impl Failure {
    /// A `config.json` that is refused.
    pub(crate) fn of_config(path: &Path, error: &ConfigError) -> Self {
        let hint = match error {
            ConfigError::ModelType { .. } => Some(
                "gradients are computed for these only; a perturbation from a file, or noise with --method random --rho, \
                 can be added to any checkpoint"
            .to_owned(),
            ),
            ConfigError::Unknown { setting, .. } => Some(format!(
                "if `{setting}` changes nothing that the model computes, leave it out of a copy of the file"
            )),
            ConfigError::Json(_) => {
                Some("the file is damaged; fetch the checkpoint's again".to_owned())
            }
            _ => None,
        };
        Self::doing(
            Exit::Refused,
            format!("cannot compute with `{}`", path.display()),
            error,
        )
        .maybe_hint(hint)
    }
}

impl From<WeightsError> for Failure {
    fn from(error: WeightsError) -> Self {
        let hint = match &error {
            WeightsError::NoTarget { .. } => {
                Some("name projections that the model has with --targets")
            }
            WeightsError::Missing { .. } | WeightsError::Shape { .. } => {
                Some("`config.json` and the weights are not of the same model; use its own")
            }
            WeightsError::NotFinite { .. } => {
                Some("the checkpoint is broken; look for one saved before training diverged")
            }
            WeightsError::Dtype { .. } => Some("use the checkpoint before it was quantized"),
            _ => None,
        };
        Self::doing(
            Exit::Refused,
            "the checkpoint cannot be computed with",
            &error,
        )
        .maybe_hint(hint)
    }
}

impl From<DeviceError> for Failure {
    fn from(error: DeviceError) -> Self {
        let device = error.device;
        let failure = |why: String| {
            Self::new(Exit::Environment, format!("cannot compute on {device}")).because(why)
        };
        match error.kind {
            DeviceErrorKind::NotBuilt => failure("this program was built without it".to_owned())
                .hint("pass --device cpu, or build with the feature `cuda` or `metal`, as docs/gpu.md tells"),
            DeviceErrorKind::OutOfMemory { reason } => {
                failure(format!("its memory is not enough: {reason}")).hint(
                    "divide the model among several devices, such as --device cuda:0,cuda:1; or pass a smaller --max-length, \
                     fewer --targets, or --device cpu",
                )
            }
            DeviceErrorKind::Unusable { reason } => {
                failure(reason).hint("pass --device cpu, or the name of another device")
            }
            DeviceErrorKind::Failed { reason } => failure(reason).hint("pass --device cpu"),
            _ => failure(error.kind.to_string()),
        }
    }
}

impl From<OptimizeError> for Failure {
    fn from(error: OptimizeError) -> Self {
        let what = "no perturbation was found";
        match error {
            OptimizeError::Interrupted => Self::interrupted(),
            OptimizeError::Weights(error) => error.into(),
            OptimizeError::Ranks(error) => error.into(),
            OptimizeError::Pack(PackError::Device(error)) => error.into(),
            OptimizeError::Budget { .. } => Self::doing(Exit::SaidNo, what, &error)
                .hint("raise --kl-budget or --task-budget, or set --rho to a number"),
            OptimizeError::NoTrial { .. } => Self::doing(Exit::SaidNo, what, &error)
                .hint("raise --kl-budget or --task-budget, or try more settings with --search"),
            OptimizeError::NoRows { set, .. } => {
                let flag = match set {
                    Set::Harmful => "--harmful",
                    Set::Refusals => "--refusals",
                    Set::Task => "--task",
                    Set::Benign => "--benign",
                };
                Self::doing(Exit::Usage, what, &error).hint(format!("give rows with {flag}"))
            }
            OptimizeError::Loss { .. } => Self::doing(Exit::Refused, what, &error).hint(
                "weights that are not finite give such losses; `panacea-patch inspect` counts them",
            ),
            OptimizeError::Gradient { .. } => Self::doing(Exit::Refused, what, &error)
                .hint("a gradient of zero means that the model is certain of every token: give other rows"),
            OptimizeError::State => Self::doing(Exit::Refused, what, &error)
                .hint("leave out --resume to start from the beginning"),
            other => Self::doing(Exit::Refused, what, &other),
        }
    }
}

impl From<ApplyError> for Failure {
    fn from(error: ApplyError) -> Self {
        match error {
            ApplyError::Base(problems) => Self::of_base(&problems),
            ApplyError::Space { wanted, .. } => Self::of(Exit::Refused, &error).hint(match wanted {
                Space::Adapter => "give the PEFT directory that it was made for",
                _ => "give the whole model that it was made for; for an adapter, find one with `panacea-patch optimize`",
            }),
            ApplyError::TooCoarse { dtype, .. } => Self::new(
                Exit::Refused,
                format!("{dtype} is too coarse for the perturbation"),
            )
            .because(error.to_string())
            .hint(
                "patch the model that this file was quantized from, and convert that; or keep patched tensors in a finer type with \
                 `--patched-type q8_0`; or allow less with `--min-realized`",
            ),
            ApplyError::PatchedType { dtype, .. } => {
                Self::new(Exit::Refused, format!("cannot store patched tensors as {dtype}"))
                    .because(error.to_string())
                    .hint("pass a type of smaller blocks, such as `--patched-type q8_0`, or `f16`")
            }
            ApplyError::Write(WriteError::Input(error)) => error.into(),
            ApplyError::Write(WriteError::Output(error)) => error.into(),
            ApplyError::Write(WriteError::Interrupted) => Self::interrupted(),
            ApplyError::Write(WriteError::Patch { .. }) => {
                Self::of(Exit::Refused, &error).hint("lower --strength")
            }
            other => Self::of(Exit::Refused, &other),
        }
    }
}

impl From<MergeError> for Failure {
    fn from(error: MergeError) -> Self {
        match error {
            MergeError::Wanted(error) => error.into(),
            MergeError::Write(WriteError::Input(error)) => error.into(),
            MergeError::Write(WriteError::Output(error)) => error.into(),
            MergeError::Write(WriteError::Interrupted) => Self::interrupted(),
            MergeError::NotFinite { .. } | MergeError::Write(WriteError::Patch { .. }) => {
                Self::of(Exit::Refused, &error).hint("lower --strength, or leave out --merge")
            }
            other => Self::of(Exit::Refused, &other),
        }
    }
}

impl Failure {
    /// A base that an adapter is not for.
    pub(crate) fn of_adapter_base(base: &Path, problems: &Problems<AdapterBaseProblem>) -> Self {
        let first = problems.all().first();
        Self::doing(
            Exit::Refused,
            format!("the adapter does not fit the base `{}`", base.display()),
            problems,
        )
        .hint(match first {
            Some(AdapterBaseProblem::Tied { .. }) => {
                "merge it with PEFT, which unties the two, and patch the result"
            }
            Some(AdapterBaseProblem::Dtype { .. }) => {
                "give the base before it was quantized with --base"
            }
            _ => "give the model that the adapter was trained on with --base",
        })
    }

    /// A perturbation for other weights.
    pub(crate) fn of_base(problems: &Problems<BaseProblem>) -> Self {
        let failure = Self::doing(
            Exit::Refused,
            "the perturbation was made for other weights",
            problems,
        );
        let mut other_values = Vec::new();
        for problem in problems.all() {
            match problem {
                BaseProblem::Digest { tensor, .. } => other_values.push(tensor),
                _ => {
                    return failure
                        .hint("give the very checkpoint that the perturbation was made for");
                }
            }
        }
        // Two digests for each tensor would tell a reader no more.
        let count = other_values.len();
        let first = other_values.first().map_or("", |tensor| tensor.as_str());
        failure
            .because(format!(
                "{count} of its tensors hold other values here, the first of them `{}`",
                panacea_formats::shown(first)
            ))
            .hint("give the very checkpoint that the perturbation was made for; this one may be patched already")
    }
}

impl From<PerturbationWriteError> for Failure {
    fn from(error: PerturbationWriteError) -> Self {
        match error {
            PerturbationWriteError::Output(error) => error.into(),
            other => Self::doing(Exit::Refused, "the perturbation cannot be written", &other),
        }
    }
}

impl From<KeyError> for Failure {
    fn from(error: KeyError) -> Self {
        let keygen = "make a pair with `panacea-patch keygen NAME`";
        match &error {
            KeyError::Io { source, .. } => {
                let missing = source.kind() == io::ErrorKind::NotFound;
                let hint = missing.then(|| format!("check the path, or {keygen}"));
                Self::of(exit_of(source), &error).maybe_hint(hint)
            }
            KeyError::Exists { .. } => {
                Self::doing(Exit::Refused, "no pair of keys was made", &error)
                    .hint("choose another name")
            }
            KeyError::NoRandomness { .. } => Self::of(Exit::Environment, &error),
            KeyError::Refused {
                path: Some(path),
                found,
            } => Self::new(
                Exit::Refused,
                format!("cannot use the key `{}`", path.display()),
            )
            .because(format!("found {}", panacea_formats::shown(found)))
            .hint(if found.contains("private key, where") {
                "give the public half, which `keygen` names `.pub.pem`".to_owned()
            } else if found.contains("public key, where") {
                "give the private half, which `keygen` names `.pem`".to_owned()
            } else {
                format!(
                    "only ECDSA keys on P-256 or P-384 that are not encrypted can be used; {keygen}"
                )
            }),
            _ => Self::doing(Exit::Refused, "cannot use the key", &error).hint(keygen),
        }
    }
}

impl From<StatementError> for Failure {
    fn from(error: StatementError) -> Self {
        Self::of(Exit::Refused, &error)
    }
}

impl From<FileNameError> for Failure {
    fn from(error: FileNameError) -> Self {
        Self::of(Exit::Refused, &error).hint("rename the file")
    }
}

impl From<TreeError> for Failure {
    fn from(error: TreeError) -> Self {
        let (exit, hint) = match &error {
            TreeError::Io { source, .. } => (exit_of(source), None),
            TreeError::Symlink { .. } => (
                Exit::Refused,
                Some("copy the directory with `cp -rL` first"),
            ),
            _ => (Exit::Refused, None),
        };
        Self::of(exit, &error).maybe_hint(hint)
    }
}

impl From<SignError> for Failure {
    fn from(error: SignError) -> Self {
        match error {
            SignError::Tree(error) => error.into(),
            SignError::Manifest(error) => Self::doing(Exit::Refused, "nothing was signed", &error)
                .hint("sign the files as they were written, or remove the manifest"),
            other => Self::of(Exit::Refused, &other),
        }
    }
}

impl From<VerifyError> for Failure {
    /// What is not verified is answered with no; what cannot be read at all is refused.
    fn from(error: VerifyError) -> Self {
        let (exit, hint) = match &error {
            VerifyError::Io { source, .. } => (exit_of(source), None),
            VerifyError::Tree(TreeError::Io { source, .. }) => (exit_of(source), None),
            VerifyError::NoSignature { .. } => (
                Exit::SaidNo,
                Some("name it with --signature, or leave out --key to check the manifest alone"),
            ),
            VerifyError::NoManifest { .. } => {
                (Exit::SaidNo, Some("verify a signature with --key PUB.pem"))
            }
            VerifyError::ForeignKey { .. } => (
                Exit::SaidNo,
                Some("ask the publisher for the key; do not take it from beside the model"),
            ),
            _ => (Exit::SaidNo, None),
        };
        Self::of(exit, &error).maybe_hint(hint)
    }
}

impl From<ResumeError> for Failure {
    fn from(error: ResumeError) -> Self {
        match error {
            ResumeError::Read(error) => {
                Self::from(error).hint("leave out --resume to start from the beginning")
            }
            ResumeError::Ranks(error) => error.into(),
            ResumeError::Write(error) => Self::from(error)
                .hint("make room, or turn saving off with --state-every 0"),
            ResumeError::OtherRun { .. } => Self::of(Exit::Refused, &error).hint(
                "repeat the interrupted command with the same inputs and flags, or leave out --resume to start from the beginning",
            ),
            other => Self::of(Exit::Refused, &other)
                .hint("leave out --resume to start from the beginning"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_of_sources_becomes_one_reason() {
        let error = FormatError::new(
            Path::new("m"),
            io::Error::from(io::ErrorKind::PermissionDenied),
        );
        let failure = Failure::from(error);
        assert_eq!(failure.exit, Exit::Environment);
        assert_eq!(failure.error, "cannot read `m`");
        assert_eq!(failure.because.as_deref(), Some("permission denied"));
    }

    #[test]
    fn a_budget_that_nothing_keeps_is_a_no() {
        let failure = Failure::from(OptimizeError::Budget {
            smallest: 1e-3,
            divergence: 0.5,
            budget: 0.1,
        });
        assert_eq!(failure.exit, Exit::SaidNo);
        assert!(
            failure
                .hint
                .is_some_and(|hint| hint.contains("--kl-budget"))
        );
    }

    #[test]
    fn a_slip_in_a_subcommand_is_recognized_and_a_path_is_not() {
        let hint = |path: &str| missing_path_hint(Path::new(path)).unwrap();
        assert!(hint("optimise").contains("panacea-patch optimize"));
        assert_eq!(hint("./models/llama"), "check the path");
    }
}
