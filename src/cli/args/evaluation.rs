//! Flags of evaluation: what is asked, who judges, what is demanded, and where it is told.

use std::path::{Path, PathBuf};

use clap::Args;
use panacea_patch::data::{DataPath, TemplateChoice};
use panacea_patch::eval::answer::endpoint::Address;
use panacea_patch::eval::gate::Gate;
use panacea_patch::eval::judge::{JudgeChoice, Threshold};
use panacea_patch::eval::task::GradingChoice;

use super::values::{at_least_one, explained};
use super::{BaseArgs, RunArgs, first_given};

/// Measure whether a model refuses what it should and still does what it did.
///
/// Asks it harmful requests, harmless ones and the task's, has the answers judged, and tells each figure with its 95% interval. Beside another
/// checkpoint, `--against`, every figure is compared row by row.
#[derive(Args, Debug)]
pub(crate) struct EvalArgs {
    /// The model: a Hugging Face directory, a PEFT directory, one `.safetensors` file, or a `.gguf` file.
    #[arg(value_name = "MODEL", required_unless_present = "endpoint")]
    pub(crate) model: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) base: BaseArgs,

    /// Compare with this checkpoint, or with the results of another evaluation: a JSON file that `--output` wrote.
    #[arg(long, value_name = "MODEL|RESULTS.json")]
    pub(crate) against: Option<PathBuf>,

    /// Write the results, row by row, to this JSON file.
    #[arg(short, long, value_name = "FILE.json")]
    pub(crate) output: Option<PathBuf>,

    /// Replace files that are at the paths of `--output`, `--report` and `--junit`.
    #[arg(long)]
    pub(crate) force: bool,

    #[command(flatten)]
    pub(crate) sets: EvalSetArgs,
    #[command(flatten)]
    pub(crate) endpoint: EndpointArgs,
    #[command(flatten)]
    pub(crate) judging: JudgingArgs,
    #[command(flatten)]
    pub(crate) telling: TellingArgs,
    #[command(flatten)]
    pub(crate) run: RunArgs,
}

/// What `eval` asks.
#[derive(Args, Debug, Default)]
#[command(next_help_heading = "Data")]
pub(crate) struct EvalSetArgs {
    /// Harmful requests; with openings of compliant answers, their loss is told as well [default: built-in, held out from learning].
    ///
    /// A JSON array, or JSON lines. `FILE#field=value` takes only the rows whose field has the value.
    #[arg(long, value_name = "FILE[#field=value]", value_parser = explained::<DataPath>)]
    pub(crate) harmful: Option<DataPath>,

    /// Harmless requests, to see whether they are refused [default: built-in].
    #[arg(long, value_name = "FILE[#field=value]", value_parser = explained::<DataPath>)]
    pub(crate) harmless: Option<DataPath>,

    /// Items of the task with their right answers [default: none].
    #[arg(long, value_name = "FILE[#field=value]", value_parser = explained::<DataPath>)]
    pub(crate) task: Option<DataPath>,

    /// Ordinary requests with answers, for perplexity and divergence [default: built-in].
    #[arg(long, value_name = "FILE[#field=value]", value_parser = explained::<DataPath>)]
    pub(crate) benign: Option<DataPath>,

    /// How a request becomes text: `auto`, `alpaca`, `chat` or `raw` [default: auto; of a server its own].
    #[arg(long, value_name = "TEMPLATE", value_parser = explained::<TemplateChoice>)]
    pub(crate) template: Option<TemplateChoice>,
}

/// What the whole job asks before and after.
#[derive(Args, Debug, Default)]
#[command(next_help_heading = "Evaluation")]
pub(crate) struct PatchEvalArgs {
    /// Harmful requests to evaluate on; nothing is learned from them [default: built-in].
    #[arg(long, value_name = "FILE[#field=value]", value_parser = explained::<DataPath>)]
    pub(crate) eval_harmful: Option<DataPath>,

    /// Harmless requests, to see whether they are refused [default: built-in].
    #[arg(long, value_name = "FILE[#field=value]", value_parser = explained::<DataPath>)]
    pub(crate) eval_harmless: Option<DataPath>,

    /// Items of the task with their right answers [default: none].
    #[arg(long, value_name = "FILE[#field=value]", value_parser = explained::<DataPath>)]
    pub(crate) eval_task: Option<DataPath>,

    /// Ordinary requests with answers, for perplexity and divergence [default: built-in].
    #[arg(long, value_name = "FILE[#field=value]", value_parser = explained::<DataPath>)]
    pub(crate) eval_benign: Option<DataPath>,

    /// Evaluate noise of the same norm beside the patch, as a control.
    #[arg(long)]
    pub(crate) control: bool,

    /// Write the patched checkpoint even where a gate is not met. The exit code is 1 all the same.
    #[arg(long, requires = "gate")]
    pub(crate) keep_failed: bool,
}

/// A server that answers in the model's place.
#[derive(Args, Debug, Default)]
#[command(next_help_heading = "Server")]
pub(crate) struct EndpointArgs {
    /// Ask this OpenAI-compatible server instead of computing here, such as `http://127.0.0.1:8080/v1`.
    ///
    /// Its losses are unknown, so only what answers tell is measured. A key is read from the variable OPENAI_API_KEY.
    #[arg(long, value_name = "URL", value_parser = explained::<Address>, conflicts_with = "model")]
    pub(crate) endpoint: Option<Address>,

    /// Which of the server's models answers [default: the server's choice].
    #[arg(long, value_name = "NAME")]
    pub(crate) endpoint_model: Option<String>,

    /// Requests on their way at once [default: 8].
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub(crate) concurrency: Option<usize>,
}

/// How answers are made and judged.
#[derive(Args, Debug, Default)]
#[command(next_help_heading = "Evaluation")]
pub(crate) struct JudgingArgs {
    /// Who tells harmful answers from others: `keyword[:LIST]`, `seqcls:DIR`, `generate:DIR` or `endpoint` [default: keyword].
    ///
    /// Lists are panacea (the program's own), gcg, harmbench, refusal-direction and heretic. `seqcls` is a classifier such as beaver-dam-7b, `generate` a model that writes its
    /// verdict, such as Llama Guard.
    #[arg(long, value_name = "JUDGE", value_parser = explained::<JudgeChoice>)]
    pub(crate) judge: Option<JudgeChoice>,

    /// How an exchange becomes the judge's text: a file with `{behavior}`, `{generation}` and `{context}` [seqcls, generate, endpoint].
    #[arg(long, value_name = "FILE")]
    pub(crate) judge_template: Option<PathBuf>,

    /// Probability above which a label counts [seqcls; default: 0.5].
    #[arg(long, value_name = "SHARE", value_parser = explained::<Threshold>)]
    pub(crate) judge_threshold: Option<Threshold>,

    /// The server of `--judge endpoint`.
    ///
    /// A key is read from the variable JUDGE_API_KEY; without it from OPENAI_API_KEY, where no other server is asked.
    #[arg(long, value_name = "URL", value_parser = explained::<Address>)]
    pub(crate) judge_endpoint: Option<Address>,

    /// Which of that server's models judges.
    #[arg(long, value_name = "NAME", requires = "judge_endpoint")]
    pub(crate) judge_model: Option<String>,

    /// When a task's answer is right: `exact`, `first-word`, `number` or `auto` [default: auto].
    #[arg(long, value_name = "RULE", value_parser = explained::<GradingChoice>)]
    pub(crate) grade: Option<GradingChoice>,

    /// Tokens of an answer to a harmful or harmless request [default: 64].
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub(crate) max_new_tokens: Option<usize>,

    /// Tokens of an answer to a task item [default: 200].
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub(crate) task_tokens: Option<usize>,

    /// Keep every answer and verdict in this file, and take those that an interrupted run left there.
    #[arg(long, value_name = "FILE")]
    pub(crate) journal: Option<PathBuf>,
}

/// Parses a gate, and says what may have been meant.
fn gate(text: &str) -> Result<Gate, String> {
    text.parse::<Gate>().map_err(|error| {
        let hint = error.hint().map(|hint| format!("; {hint}"));
        format!("{error}{}", hint.unwrap_or_default())
    })
}

impl EndpointArgs {
    /// The first flag of a server that was given where no server was.
    pub(crate) fn first_without_server(&self) -> Option<&'static str> {
        let of_server = [
            ("--endpoint-model", self.endpoint_model.is_some()),
            ("--concurrency", self.concurrency.is_some()),
        ];
        first_given(of_server).filter(|_| self.endpoint.is_none())
    }
}

impl JudgingArgs {
    /// Files and directories that the judge is read from.
    pub(crate) fn files(&self) -> Vec<PathBuf> {
        let checkpoint = self.judge.as_ref().and_then(JudgeChoice::path);
        let files = checkpoint.into_iter().map(Path::to_owned);
        files.chain(self.judge_template.clone()).collect()
    }

    /// The first of these flags that was given.
    pub(crate) fn first_given(&self) -> Option<&'static str> {
        first_given([
            ("--judge", self.judge.is_some()),
            ("--judge-template", self.judge_template.is_some()),
            ("--judge-threshold", self.judge_threshold.is_some()),
            ("--judge-endpoint", self.judge_endpoint.is_some()),
            ("--grade", self.grade.is_some()),
            ("--max-new-tokens", self.max_new_tokens.is_some()),
            ("--task-tokens", self.task_tokens.is_some()),
            ("--journal", self.journal.is_some()),
        ])
    }
}

/// What is demanded, and where results are told.
#[derive(Args, Debug, Default)]
#[command(next_help_heading = "Evaluation")]
pub(crate) struct TellingArgs {
    /// A demand, such as `hs<=5`, `kl<=0.05`, or `fa>=-1%`, where the sign makes it one on the change. Can be given again. One that is not met
    /// makes the exit code 1.
    ///
    /// Measures are hs, hs_plus, fa, over_refusal, kl, perplexity, harmful_loss and task_loss; `hs.high<=12` is about the upper end of the 95%
    /// interval.
    #[arg(long, value_name = "GATE", value_parser = gate)]
    pub(crate) gate: Vec<Gate>,

    /// Write a report to this HTML file, which needs nothing else.
    #[arg(long, value_name = "FILE.html")]
    pub(crate) report: Option<PathBuf>,

    /// Write the gates to this file as JUnit XML.
    #[arg(long, value_name = "FILE.xml", requires = "gate")]
    pub(crate) junit: Option<PathBuf>,

    /// Append a summary in Markdown to this file [default: the one that GITHUB_STEP_SUMMARY names].
    #[arg(long, value_name = "FILE.md")]
    pub(crate) summary: Option<PathBuf>,
}
