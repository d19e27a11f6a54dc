//! The command line as it was given: flags, their help, and nothing resolved.
//!
//! No flag has a default here, so that [`super::settings`] can tell what was given from what was not: a flag that the chosen
//! method would pass over is refused rather than ignored. Parsers refuse values that no setting could make sense of.

mod evaluation;
mod values;

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;
use panacea_formats::Dtype;
use panacea_patch::apply::Strength;
use panacea_patch::compact::EnergyShare;
use panacea_patch::convert::types::FileType;
use panacea_patch::data::{DataPath, TemplateChoice};
use panacea_patch::model::TargetSelection;

use super::memory::MemorySize;

pub(crate) use evaluation::{EvalArgs, JudgingArgs, PatchEvalArgs, TellingArgs};
pub(crate) use values::{
    CurveName, DeviceArg, FinalEpsName, MethodName, PartName, RhoArg, RoundingName,
};
use values::{
    at_least_one, device, energy_share, explained, not_negative, patchable_type, positive, rank,
    rho, share, strength,
};

/// The first of `flags`, each with whether it was given, that was.
pub(crate) fn first_given(
    flags: impl IntoIterator<Item = (&'static str, bool)>,
) -> Option<&'static str> {
    let mut flags = flags.into_iter();
    flags.find_map(|(flag, given)| given.then_some(flag))
}

/// Restores the safety of a fine-tuned language model with a small optimized perturbation of its weights.
///
/// Given a model and no subcommand, it does the whole job: it finds a perturbation (or loads one), writes a patched copy of the
/// checkpoint with a manifest that says how it was made, and signs it when asked to. The model itself is never changed.
#[derive(Debug, Parser)]
#[command(
    name = "panacea-patch",
    version,
    propagate_version = true,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    arg_required_else_help = true,
    max_term_width = 110,
    after_help = "See `--help` for examples and exit codes.",
    after_long_help = EPILOG
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
    #[command(flatten)]
    pub(crate) patch: PatchArgs,
}

/// The stages, each by itself.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Find a perturbation and write it to a file of its own.
    Optimize(Box<OptimizeArgs>),
    /// Add a perturbation from a file to the checkpoint that it was made for.
    Apply(ApplyArgs),
    /// Make a GGUF file of a Hugging Face checkpoint, or a Hugging Face directory of a GGUF file.
    Convert(ConvertArgs),
    /// Measure whether a model refuses what it should and still does what it did.
    Eval(Box<EvalArgs>),
    /// Check files against their signature, or, without a key, against their manifest.
    Verify(VerifyArgs),
    /// Tell what a checkpoint, perturbation, manifest or signature holds.
    Inspect(InspectArgs),
    /// Make a pair of keys to sign and verify with.
    Keygen(KeygenArgs),
    /// Sign something that is already written.
    Sign(SignArgs),
    /// Print the completions of a shell.
    Completions {
        /// The shell.
        shell: Shell,
    },
    /// Print the manual page, in roff: of the program, or of a subcommand.
    #[command(hide = true)]
    Man {
        /// The subcommand.
        subcommand: Option<String>,
    },
}

/// The whole job.
#[derive(Args, Debug)]
pub(crate) struct PatchArgs {
    /// The fine-tuned checkpoint: a Hugging Face directory, a PEFT directory, one `.safetensors` file, or a `.gguf` file.
    ///
    /// `config.json` and the tokenizer of a lone file are looked for beside it, those of a LoRA adapter in its base (a tokenizer
    /// of the adapter's own goes first). A path that has the name of a subcommand can be given as `./optimize`.
    #[arg(value_name = "MODEL", required = true)]
    pub(crate) model: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) base: BaseArgs,

    /// Write the base with the patched adapter merged into it, instead of the patched adapter.
    #[arg(long, help_heading = OUTPUT)]
    pub(crate) merge: bool,

    /// Where to write the patched checkpoint.
    ///
    /// Default: `<dir>-panacea` beside a directory, `<stem>.panacea.safetensors` beside a file.
    #[arg(short, long, value_name = "PATH", help_heading = OUTPUT)]
    pub(crate) output: Option<PathBuf>,

    /// Add this perturbation instead of finding one.
    #[arg(long, value_name = "FILE", help_heading = OUTPUT)]
    pub(crate) perturbation: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) addition: AdditionArgs,
    #[command(flatten)]
    pub(crate) gguf: GgufArgs,
    #[command(flatten)]
    pub(crate) writing: WritingArgs,
    #[command(flatten)]
    pub(crate) data: DataArgs,
    #[command(flatten)]
    pub(crate) method: MethodArgs,
    #[command(flatten)]
    pub(crate) evaluation: PatchEvalArgs,
    #[command(flatten)]
    pub(crate) judging: JudgingArgs,
    #[command(flatten)]
    pub(crate) telling: TellingArgs,
    #[command(flatten)]
    pub(crate) work: WorkArgs,
    #[command(flatten)]
    pub(crate) run: RunArgs,
}

/// Find a perturbation and write it to a file of its own.
///
/// The file is bound to the checkpoint by the digest of every tensor that it perturbs.
#[derive(Args, Debug)]
pub(crate) struct OptimizeArgs {
    /// The fine-tuned checkpoint: a Hugging Face directory, a PEFT directory, one `.safetensors` file, or a `.gguf` file.
    #[arg(value_name = "MODEL")]
    pub(crate) model: PathBuf,

    #[command(flatten)]
    pub(crate) base: BaseArgs,

    /// Where to write the perturbation [default: `<stem>.perturbation.safetensors` beside the model].
    #[arg(short, long, value_name = "FILE", help_heading = OUTPUT)]
    pub(crate) output: Option<PathBuf>,

    /// Replace what is at the output's path.
    #[arg(long, help_heading = OUTPUT)]
    pub(crate) force: bool,

    /// Check everything that can be checked, print what would be read, computed and written, and write nothing.
    #[arg(long, help_heading = OUTPUT)]
    pub(crate) dry_run: bool,

    #[command(flatten)]
    pub(crate) form: FormArgs,
    #[command(flatten)]
    pub(crate) data: DataArgs,
    #[command(flatten)]
    pub(crate) method: MethodArgs,
    #[command(flatten)]
    pub(crate) work: WorkArgs,
    #[command(flatten)]
    pub(crate) run: RunArgs,
}

/// Add a perturbation from a file to the checkpoint that it was made for.
///
/// A checkpoint whose tensors are not those that the perturbation was made for is refused.
#[derive(Args, Debug)]
pub(crate) struct ApplyArgs {
    /// The checkpoint that the perturbation was made for.
    #[arg(value_name = "MODEL")]
    pub(crate) model: PathBuf,

    /// The perturbation.
    #[arg(long, value_name = "FILE")]
    pub(crate) perturbation: PathBuf,

    #[command(flatten)]
    pub(crate) base: BaseArgs,

    /// Write the base with the patched adapter merged into it, instead of the patched adapter.
    #[arg(long, help_heading = OUTPUT)]
    pub(crate) merge: bool,

    /// Where to write the patched checkpoint [default: as without a subcommand].
    #[arg(short, long, value_name = "PATH", help_heading = OUTPUT)]
    pub(crate) output: Option<PathBuf>,

    /// Seed of the rounding [default: 0].
    #[arg(long, value_name = "N", help_heading = OUTPUT)]
    pub(crate) seed: Option<u64>,

    #[command(flatten)]
    pub(crate) addition: AdditionArgs,
    #[command(flatten)]
    pub(crate) gguf: GgufArgs,
    #[command(flatten)]
    pub(crate) writing: WritingArgs,
    #[command(flatten)]
    pub(crate) run: RunArgs,
}

/// Make a GGUF file of a Hugging Face checkpoint, or a Hugging Face directory of a GGUF file.
///
/// The GGUF file has the bytes that llama.cpp's own programs give it: `convert_hf_to_gguf.py` for `f32`, `f16`, `bf16` and `q8_0`, and
/// `llama-quantize`, from the `f32` file, for the others. A directory has every tensor as it is computed with, rounded to the nearest.
#[derive(Args, Debug)]
pub(crate) struct ConvertArgs {
    /// A Hugging Face directory, one `.safetensors` file with its config and tokenizer beside it, or a `.gguf` file; a PEFT directory or a
    /// perturbation of low rank becomes a GGUF adapter.
    #[arg(value_name = "SOURCE")]
    pub(crate) source: PathBuf,

    #[command(flatten)]
    pub(crate) base: BaseArgs,

    /// Where to write [default: `<source>-<type>.gguf` or `<source>-hf` beside it].
    #[arg(short, long, value_name = "PATH", help_heading = OUTPUT)]
    pub(crate) output: Option<PathBuf>,

    /// The type of the file, such as `q4_k_m`; of a directory `f32`, `f16` or `bf16`.
    ///
    /// Default: the type of the source's matrices; of a directory `bf16`. Written are f32, f16, bf16, q8_0, q4_0, q4_1, q5_0, q5_1, q2_k,
    /// q3_k_s, q3_k_m, q3_k_l, q4_k_s, q4_k_m, q5_k_s, q5_k_m and q6_k.
    #[arg(long = "type", value_name = "TYPE", value_parser = explained::<FileType>, help_heading = OUTPUT)]
    pub(crate) file_type: Option<FileType>,

    /// Store the tensors that a patch touched in this type, such as `q8_0` or `f16`, where the file's would have fewer bits.
    ///
    /// Which these are is read from the `panacea.manifest.json` beside the source.
    #[arg(long, value_name = "TYPE", value_parser = patchable_type, help_heading = OUTPUT)]
    pub(crate) patched_type: Option<Dtype>,

    /// Divide the output into files of at most this size, such as `5G`, in a directory.
    #[arg(long, value_name = "SIZE", value_parser = explained::<MemorySize>, help_heading = OUTPUT)]
    pub(crate) max_shard_bytes: Option<MemorySize>,

    /// What llama.cpp calls the way in which the tokenizer cuts text, for a tokenizer that it does not know, such as `llama-bpe`.
    #[arg(long, value_name = "NAME", conflicts_with = "tokenizer_from", help_heading = OUTPUT)]
    pub(crate) pre: Option<String>,

    /// Take the tokenizer from this GGUF file of the same base model.
    #[arg(long, value_name = "BASE.gguf", help_heading = OUTPUT)]
    pub(crate) tokenizer_from: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) writing: WritingArgs,
    #[command(flatten)]
    pub(crate) run: RunArgs,
}

/// Check files against their signature, or, without a key, against their manifest.
///
/// With a key: whether exactly these files were signed with it. That proves where they come from, not that the model is safe.
/// Without: whether they are as the manifest beside them says, which finds damage and no deceit.
#[derive(Args, Debug)]
pub(crate) struct VerifyArgs {
    /// A directory, or one file.
    #[arg(value_name = "PATH")]
    pub(crate) path: PathBuf,

    /// The public key that is trusted, as PEM.
    #[arg(long, value_name = "PUB.pem")]
    pub(crate) key: Option<PathBuf>,

    /// The signature [default: `model.sig` in a directory, `<file>.sig` beside a file].
    #[arg(long, value_name = "FILE", requires = "key")]
    pub(crate) signature: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) run: RunArgs,
}

/// Tell what a checkpoint, perturbation, manifest or signature holds.
///
/// Nothing is verified. Of a perturbation, the table gives for each block and each projection its share of the energy,
/// |eps_l|^2 / |eps|^2, which is the paper's safety affinity.
#[derive(Args, Debug)]
pub(crate) struct InspectArgs {
    /// A checkpoint directory, a `.safetensors` file, a manifest (`.json`) or a signature (`.sig`).
    #[arg(value_name = "PATH")]
    pub(crate) path: PathBuf,

    /// Which matrices count as targets.
    #[arg(long, value_name = "NAMES|REGEX", value_parser = explained::<TargetSelection>)]
    pub(crate) targets: Option<TargetSelection>,

    #[command(flatten)]
    pub(crate) run: RunArgs,
}

/// Make a pair of keys to sign and verify with.
///
/// Writes `<NAME>.pem`, readable by its owner alone and not encrypted, and `<NAME>.pub.pem`, to be given to those who verify.
#[derive(Args, Debug)]
pub(crate) struct KeygenArgs {
    /// The files' path without `.pem`.
    #[arg(value_name = "NAME")]
    pub(crate) name: PathBuf,

    /// The elliptic curve [default: p256].
    #[arg(long, value_name = "CURVE")]
    pub(crate) curve: Option<CurveName>,

    #[command(flatten)]
    pub(crate) run: RunArgs,
}

/// Sign something that is already written.
///
/// Writes `model.sig` into a directory, or `<file>.sig` beside a file. `model_signing verify key` accepts it too.
#[derive(Args, Debug)]
pub(crate) struct SignArgs {
    /// A directory, or one file.
    #[arg(value_name = "PATH")]
    pub(crate) path: PathBuf,

    /// The private key, as PEM.
    #[arg(long, value_name = "KEY.pem")]
    pub(crate) key: PathBuf,

    /// Replace a signature that is there.
    #[arg(long)]
    pub(crate) force: bool,

    #[command(flatten)]
    pub(crate) run: RunArgs,
}

/// What a LoRA adapter is for.
#[derive(Args, Debug, Default)]
pub(crate) struct BaseArgs {
    /// The model that a LoRA adapter, or a perturbation that becomes one, is for.
    ///
    /// Default: what its config names, as a path from here or from the adapter's directory, or in the Hugging Face cache.
    /// Nothing is downloaded.
    #[arg(long = "base", value_name = "DIR")]
    pub(crate) path: Option<PathBuf>,
}

/// Where rows come from, and how they become tokens.
#[derive(Args, Debug, Default)]
#[command(next_help_heading = "Data")]
pub(crate) struct DataArgs {
    /// Requests with compliant answers, or with just their openings [default: built-in].
    ///
    /// A JSON array, or JSON lines. `FILE#field=value` takes only the rows whose field has the value.
    #[arg(long, value_name = "FILE[#field=value]", value_parser = explained::<DataPath>)]
    pub(crate) harmful: Option<DataPath>,

    /// Rows of the data that the model was fine-tuned on, whose loss is to stay as it is [default: none].
    #[arg(long, value_name = "FILE[#field=value]", value_parser = explained::<DataPath>)]
    pub(crate) task: Option<DataPath>,

    /// Harmless requests with answers, on which the model is to go on saying what it says [default: built-in].
    #[arg(long, value_name = "FILE[#field=value]", value_parser = explained::<DataPath>)]
    pub(crate) benign: Option<DataPath>,

    /// Refusals, of the same requests or of any [default: those of the harmful set, or built-in].
    #[arg(long, value_name = "FILE[#field=value]", value_parser = explained::<DataPath>)]
    pub(crate) refusals: Option<DataPath>,

    /// How a row becomes text: `auto`, `alpaca`, `chat` or `raw` [default: auto].
    ///
    /// `auto` is the checkpoint's own chat template if it has one, else Alpaca's prompt.
    #[arg(long, value_name = "TEMPLATE", value_parser = explained::<TemplateChoice>)]
    pub(crate) template: Option<TemplateChoice>,

    /// Tokens that a row is cut to [default: 256].
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(2..=1_048_576))]
    pub(crate) max_length: Option<u32>,
}

/// How a perturbation is found.
#[derive(Args, Debug, Default)]
#[command(next_help_heading = "Method")]
pub(crate) struct MethodArgs {
    /// How the perturbation is found [default: adaptive].
    #[arg(long, value_name = "METHOD")]
    pub(crate) method: Option<MethodName>,

    /// The perturbation's norm over all targets, in the weights' unit, or `auto`.
    ///
    /// `auto` is the largest that keeps to `--kl-budget` and `--task-budget`. Default: auto; with `--method panacea` 1, the
    /// paper's value, which was chosen for the A and B of a LoRA adapter and means something else for full weights.
    #[arg(long, value_name = "NUMBER|auto", value_parser = rho)]
    pub(crate) rho: Option<RhoArg>,

    /// Regularizer intensity [panacea; default: 0.001].
    #[arg(long, value_name = "NUMBER", value_parser = not_negative, allow_negative_numbers = true)]
    pub(crate) lambda: Option<f64>,

    /// Learning rate [panacea; default: 0.00002].
    #[arg(long, value_name = "NUMBER", value_parser = positive, allow_negative_numbers = true)]
    pub(crate) lr: Option<f64>,

    /// AdamW's weight decay [panacea; default: 0, on a LoRA adapter 0.1, the paper's].
    #[arg(long, value_name = "NUMBER", value_parser = not_negative, allow_negative_numbers = true)]
    pub(crate) weight_decay: Option<f64>,

    /// Steps: of the outer loop [panacea; default: 20 with a task set, else 0], or at most [adaptive].
    #[arg(long, value_name = "N")]
    pub(crate) steps: Option<usize>,

    /// Rows of each set in a step [adaptive, panacea].
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub(crate) batch: Option<usize>,

    /// The matrices to perturb: names of modules separated by commas, or a regular expression for whole module paths.
    ///
    /// Default: q_proj,k_proj,v_proj, the paper's, and qkv_proj, which some models have in their place; of a LoRA adapter, every
    /// module that it adapts.
    #[arg(long, value_name = "NAMES|REGEX", value_parser = explained::<TargetSelection>)]
    pub(crate) targets: Option<TargetSelection>,

    /// Which gradient the last eps is along: the whole harmful set's, or the last batch's as in the paper's code
    /// [panacea; default: whole].
    #[arg(long, value_name = "WHICH")]
    pub(crate) final_eps: Option<FinalEpsName>,

    /// What the perturbation is: drift and eps, or one of them [panacea; default: sum].
    #[arg(long, value_name = "PART")]
    pub(crate) part: Option<PartName>,

    /// Mean KL divergence on benign text that `--rho auto` may cost, in nats per token [default: 0.1].
    #[arg(long, value_name = "NATS", value_parser = positive, allow_negative_numbers = true)]
    pub(crate) kl_budget: Option<f64>,

    /// Rise of the task loss that `--rho auto` may cost, in nats per token [default: 0.1].
    #[arg(long, value_name = "NATS", value_parser = positive, allow_negative_numbers = true)]
    pub(crate) task_budget: Option<f64>,

    /// Weight of the refusals [adaptive].
    #[arg(long, value_name = "NUMBER", value_parser = not_negative, allow_negative_numbers = true)]
    pub(crate) alpha: Option<f64>,

    /// Loss above which a token of an opening is unlikely enough to be left alone, in nats [adaptive].
    #[arg(long, value_name = "NATS", value_parser = positive, allow_negative_numbers = true)]
    pub(crate) cap: Option<f64>,

    /// Length of a step, in the weights' unit [adaptive; default: found from the first gradient].
    #[arg(long, value_name = "LENGTH", value_parser = positive, allow_negative_numbers = true)]
    pub(crate) step_length: Option<f64>,

    /// Steps back towards the task and the benign text, after each run of the others [adaptive].
    #[arg(long, value_name = "N")]
    pub(crate) repair_steps: Option<usize>,

    /// Try many settings, and take what leaves the least harm within the budgets [adaptive; without a number 16 trials].
    ///
    /// The first trial has the default settings. Settings that are given, such as `--alpha` or `--targets`, are not varied. Trials are
    /// judged on a part of the rows that none of them learns from.
    #[arg(long, value_name = "TRIALS", num_args = 0..=1, default_missing_value = "16", value_parser = at_least_one)]
    pub(crate) search: Option<usize>,

    /// Seed of every random choice [default: 0].
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,
}

/// How a perturbation is added.
#[derive(Args, Debug, Default)]
#[command(next_help_heading = "Output")]
pub(crate) struct AdditionArgs {
    /// Factor on the perturbation; not negative, since that would weaken safety [default: 1].
    #[arg(long, value_name = "NUMBER", value_parser = strength, allow_negative_numbers = true)]
    pub(crate) strength: Option<Strength>,

    /// How sums are rounded to a stored 16-bit type [default: stochastic].
    ///
    /// Most changes are smaller than a stored step. `stochastic` takes a step with a chance that keeps their mean, at the cost of noise; see
    /// `--seed`. `nearest` drops them.
    #[arg(long, value_name = "HOW")]
    pub(crate) rounding: Option<RoundingName>,

    /// Store patched tensors of a GGUF file in this type, such as `q8_0` or `f16`, where the file's has fewer bits.
    #[arg(long, value_name = "TYPE", value_parser = patchable_type)]
    pub(crate) patched_type: Option<Dtype>,

    /// Refuse to patch quantized tensors that keep less than this share of the perturbation [default: 0.5].
    #[arg(long, value_name = "SHARE", value_parser = share)]
    pub(crate) min_realized: Option<f64>,
}

/// A patched directory that becomes a GGUF file in the same run.
#[derive(Args, Debug, Default)]
#[command(next_help_heading = "Output")]
pub(crate) struct GgufArgs {
    /// Write the patched model as a GGUF file of this type, such as `q4_k_m`, instead of a directory; `convert` has the types.
    ///
    /// The bytes are those of `convert` over the patched directory, which is written beside the output and removed. Patched tensors get at
    /// least `--patched-type`. Default output: `<dir>-panacea-<type>.gguf`.
    #[arg(long, value_name = "TYPE", value_parser = explained::<FileType>)]
    pub(crate) gguf: Option<FileType>,

    /// What llama.cpp calls the way in which the tokenizer cuts text, for a tokenizer that it does not know, such as `llama-bpe`.
    #[arg(
        long,
        value_name = "NAME",
        conflicts_with = "tokenizer_from",
        requires = "gguf"
    )]
    pub(crate) pre: Option<String>,

    /// Take the tokenizer from this GGUF file of the same base model.
    #[arg(long, value_name = "BASE.gguf", requires = "gguf")]
    pub(crate) tokenizer_from: Option<PathBuf>,
}

/// In which form a perturbation is written. Dense where nothing is asked for.
#[derive(Args, Debug, Default)]
#[command(next_help_heading = "Output")]
pub(crate) struct FormArgs {
    /// Write the perturbation of each matrix as the product of two of this rank, and tell how much of its energy that keeps.
    #[arg(long, value_name = "RANK", value_parser = rank, conflicts_with = "sparse")]
    pub(crate) as_lora: Option<NonZeroUsize>,

    /// Write only the largest elements that together hold this share of the energy, above 0 and at most 1.
    #[arg(long, value_name = "SHARE", value_parser = energy_share, allow_negative_numbers = true)]
    pub(crate) sparse: Option<EnergyShare>,

    /// Write the low-rank perturbation to this new directory too, as an adapter that PEFT loads over the unpatched model.
    // The conflict too: clap takes a requirement as met where what is required conflicts with what is given.
    #[arg(
        long,
        value_name = "DIR",
        requires = "as_lora",
        conflicts_with = "sparse"
    )]
    pub(crate) peft: Option<PathBuf>,
}

/// What is written beside the weights, and over what.
#[derive(Args, Debug, Default)]
#[command(next_help_heading = "Output")]
pub(crate) struct WritingArgs {
    /// Sign the output with this private key (PEM, ECDSA on P-256 or P-384).
    #[arg(long, value_name = "KEY.pem")]
    pub(crate) sign_key: Option<PathBuf>,

    /// Replace what is at the output's path, if it is a checkpoint. Never the input.
    #[arg(long)]
    pub(crate) force: bool,

    /// Check everything that can be checked, print what would be read, computed and written, and write nothing.
    #[arg(long)]
    pub(crate) dry_run: bool,
}

/// How long work is done.
#[derive(Args, Debug, Default)]
#[command(next_help_heading = "Run")]
pub(crate) struct WorkArgs {
    /// Compute activations again instead of keeping them: a third more work, one block's memory.
    #[arg(long)]
    pub(crate) recompute: bool,

    /// Memory that the search may take, such as `16G`; activations are computed again and weights given back where that is needed to
    /// keep to it, at the same result [default: what the machine has free].
    #[arg(long, value_name = "SIZE", value_parser = explained::<MemorySize>)]
    pub(crate) memory: Option<MemorySize>,

    /// Go on from the state that an interrupted run of the same command left.
    #[arg(long)]
    pub(crate) resume: bool,

    /// Save the state every so many steps, beside the output; 0 never does [default: 5].
    #[arg(long, value_name = "N")]
    pub(crate) state_every: Option<usize>,
}

/// What every command knows.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Run")]
pub(crate) struct RunArgs {
    /// What computes the search for a perturbation: `auto`, `cpu`, `cuda:N` or several with commas between, or `metal`
    /// [default: auto, a GPU where this build can use one].
    #[arg(long, value_name = "DEVICE", value_parser = device)]
    pub(crate) device: Option<DeviceArg>,

    /// Threads to compute with [default: one per core, of several ranks their share]. The output does not depend on it.
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub(crate) threads: Option<usize>,

    /// Print one JSON object on stdout.
    #[arg(long)]
    pub(crate) json: bool,

    /// Say nothing on stderr but errors.
    #[arg(short, long)]
    pub(crate) quiet: bool,
}

const OUTPUT: &str = "Output";

const EPILOG: &str = "\
Examples:
  panacea-patch ./my-finetune
      the whole job on built-in probes; writes ./my-finetune-panacea
  panacea-patch ./my-finetune --harmful h.jsonl --task t.jsonl -o ./safe --sign-key release.pem
      with your own data, and signed
  panacea-patch optimize ./my-finetune -o safety.safetensors
  panacea-patch apply ./my-finetune --perturbation safety.safetensors --strength 0.5
      the same in two steps, at half strength
  panacea-patch ./my-finetune --method random --rho 2.5 -o ./control
      the control: noise of the same norm
  panacea-patch ./my-adapter --base ./llama --harmful h.jsonl --merge -o ./safe
      a LoRA adapter, patched in its A and B, and merged into its base
  panacea-patch convert ./safe --type q4_k_m -o safe.gguf
  panacea-patch verify ./safe --key release.pub.pem

Exit codes:
  0    done
  1    a check said no: verification failed, or no radius keeps to the budget
  2    the command line was not understood
  3    an input was refused
  4    the machine did not do its part: disk, permission, memory, device
  130  interrupted";

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_path_named_as_a_subcommand_can_be_given() {
        let cli = Cli::parse_from(["panacea-patch", "./optimize"]);
        assert!(cli.command.is_none());
        assert_eq!(cli.patch.model, Some(PathBuf::from("./optimize")));
        let cli = Cli::parse_from(["panacea-patch", "optimize", "m"]);
        assert!(matches!(cli.command, Some(Command::Optimize(_))));
    }

    #[test]
    fn numbers_out_of_range_are_usage_errors() {
        for flags in [
            ["--strength", "-1"],
            ["--strength", "nan"],
            ["--rho", "0"],
            ["--rho", "inf"],
            ["--lr", "-1"],
            ["--batch", "0"],
            ["--threads", "0"],
            ["--max-length", "1"],
            ["--kl-budget", "0"],
            ["--device", "cuda:one"],
            ["--targets", "("],
            ["--template", "jinja"],
            ["--harmful", "#a=b"],
        ] {
            let error = Cli::try_parse_from(["panacea-patch", "m", flags[0], flags[1]])
                .expect_err(flags[1]);
            assert_eq!(error.exit_code(), 2, "{flags:?}");
            assert!(error.to_string().contains(flags[0]), "{error}");
        }
    }

    #[test]
    fn a_perturbation_has_one_form() {
        for flags in [
            &["--as-lora", "0"][..],
            &["--as-lora", "8.5"],
            &["--sparse", "0"],
            &["--sparse", "1.01"],
            &["--sparse", "nan"],
            &["--sparse", "-0.5"],
            &["--as-lora", "8", "--sparse", "0.9"],
            &["--peft", "adapter"],
            &["--peft", "adapter", "--sparse", "0.9"],
        ] {
            let words = ["panacea-patch", "optimize", "m"].iter().chain(flags);
            let error = Cli::try_parse_from(words).expect_err(&flags.join(" "));
            assert_eq!(error.exit_code(), 2, "{flags:?}");
        }
    }
}
