//! Asking, judging and demanding, as `eval` and the whole job do it.
//!
//! In: flags, and models. Out: an [`Evaluation`], with every set, judge and gate read and understood before any work is done; from it the
//! scores of models, and what is told of them: tables, gates, JSON, JUnit XML, a Markdown summary, the report.

mod findings;
mod page;
mod patched;
mod telling;

use std::path::PathBuf;
use std::sync::Arc;

use panacea_formats::Sha256;
use panacea_patch::data::{
    DataPath, Dataset, Encoder, Example, Request, Source, TemplateChoice, TokenizerFiles, builtin,
};
use panacea_patch::eval::answer::endpoint::{Address, ApiKey, Form};
use panacea_patch::eval::answer::{Answerer, Endpoint, EndpointSettings};
use panacea_patch::eval::figure::Measure;
use panacea_patch::eval::gate::{Bound, Gate};
use panacea_patch::eval::journal::Journal;
use panacea_patch::eval::judge::{Judge, JudgeChoice, JudgeSettings, JudgeTemplate};
use panacea_patch::eval::scores::Comparison;
use panacea_patch::eval::suite::{Computed, Scored, Subject, Suite, TaskItems};
use panacea_patch::manifest::{Dependency, Role};
use panacea_patch::model::{Config, Decoder, TargetSelection, TargetTensors};
use panacea_patch::report::Page;

use super::args::JudgingArgs;
use super::error::{Exit, Failure};
use super::find::side_inputs;
use super::interrupt;
use super::model::{Model, digest_of};
use super::report::{EvalWatch, Reporter, Table};
use super::settings::name_without_folders;
use telling::Telling;

pub(super) use findings::Findings;
pub(super) use page::{add_record, add_search, add_written};
pub(super) use patched::{Control, PatchEvaluation, PatchFindings};
pub(super) use telling::Told;

/// Where the sets of an evaluation are; built-in ones in the places of those that are not given.
#[derive(Clone, Debug, Default)]
pub(super) struct EvalPaths {
    pub(super) harmful: Option<DataPath>,
    pub(super) harmless: Option<DataPath>,
    pub(super) task: Option<DataPath>,
    pub(super) benign: Option<DataPath>,
}

impl EvalPaths {
    /// The files among them.
    fn files(&self) -> Vec<PathBuf> {
        [&self.harmful, &self.harmless, &self.task, &self.benign]
            .into_iter()
            .flatten()
            .map(|path| path.path().to_owned())
            .collect()
    }
}

/// An evaluation of which every input was read.
pub(super) struct Evaluation {
    suite: Suite,
    answering: Answering,
    judge: Box<dyn Judge>,
    journal: Journal,
    /// Whether anything is kept, so that models have to be told apart by their digests.
    keeps: bool,
    template: TemplateChoice,
    gates: Vec<Gate>,
    telling: Telling,
    /// The sets, for records.
    sources: Vec<Dependency>,
    /// What sets and judge are read from.
    inputs: Vec<PathBuf>,
}

/// A model that is ready to be scored.
pub(super) struct Loaded<'m> {
    model: &'m Model,
    config: Config,
    encoder: Arc<Encoder>,
    identity: String,
    /// What is added to the targets that are selected.
    moved: Option<(Option<TargetSelection>, &'m TargetTensors)>,
}

impl<'m> Loaded<'m> {
    /// The same with `delta` added to the targets of `selection`, in f32.
    pub(super) fn moved(
        &self,
        selection: Option<TargetSelection>,
        delta: &'m TargetTensors,
        note: &str,
    ) -> Self {
        Self {
            model: self.model,
            config: self.config.clone(),
            encoder: Arc::clone(&self.encoder),
            identity: format!("{} {note}", self.identity),
            moved: Some((selection, delta)),
        }
    }

    fn decoder(&self) -> Result<Decoder<'m>, Failure> {
        let selection = self
            .moved
            .as_ref()
            .and_then(|(selection, _)| selection.as_ref());
        self.model.decoder(self.config.clone(), selection)
    }

    fn computed<'s>(&'s self, decoder: &'s mut Decoder<'m>) -> Computed<'s, 'm> {
        Computed {
            decoder,
            encoder: &self.encoder,
            delta: self.moved.as_ref().map(|(_, delta)| *delta),
            identity: self.identity.clone(),
        }
    }
}

/// Who answers, as far as it decides what can be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answering {
    /// A checkpoint, computed here.
    Here,
    /// A server.
    There,
}

/// What is compared with, as far as it decides the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Compared {
    /// Nothing.
    Nothing,
    /// A checkpoint.
    Model,
    /// The figures of one.
    Results,
}

impl Evaluation {
    /// Reads and checks sets and judge.
    ///
    /// # Errors
    /// The first input that is refused.
    pub(super) fn prepare(
        paths: &EvalPaths,
        template: TemplateChoice,
        judging: &JudgingArgs,
        answering: Answering,
    ) -> Result<Self, Failure> {
        let mut sources = Vec::new();
        let mut note = |role: &str, source: &Source, digest: Sha256| {
            sources.push(Dependency {
                role: Role::Other(role.to_owned()),
                name: name_without_folders(source),
                uri: None,
                digest,
            });
        };
        let (harmful, openings): (Dataset<Request>, _) = match &paths.harmful {
            None => {
                let set = builtin::held_out_harmful();
                let questions = set.rows.iter().map(|row| row.dialogue.question());
                let requests = Dataset {
                    rows: questions.collect(),
                    source: set.source,
                    sha256: set.sha256,
                    skipped: set.skipped,
                };
                (requests, set.rows)
            }
            // Rows without openings are requests all the same; their loss is then not told.
            Some(path) => (
                Dataset::open(path)?,
                Dataset::open(path).map_or(Vec::new(), |set| set.rows),
            ),
        };
        note("evaluation-harmful-set", &harmful.source, harmful.sha256);
        let harmless = opened(paths.harmless.as_ref(), builtin::held_out_harmless)?;
        note("evaluation-harmless-set", &harmless.source, harmless.sha256);
        let benign = opened(paths.benign.as_ref(), builtin::benign)?;
        note("evaluation-benign-set", &benign.source, benign.sha256);
        let task: Option<Dataset<Example>> = paths.task.as_ref().map(Dataset::open).transpose()?;
        if let Some(task) = &task {
            note("evaluation-task-set", &task.source, task.sha256);
        } else if judging.grade.is_some() || judging.task_tokens.is_some() {
            return Err(
                Failure::usage("`--grade` and `--task-tokens` have no effect here")
                    .because("there is no task set")
                    .hint("give its rows, or leave out the flag"),
            );
        }
        let task = task.map(|set| {
            let expected: Vec<&str> = set
                .rows
                .iter()
                .map(|row| row.dialogue.first_answer())
                .collect();
            TaskItems {
                grading: judging.grade.unwrap_or_default().settle(expected),
                max_new_tokens: judging.task_tokens.unwrap_or(TASK_TOKENS),
                items: set.rows,
            }
        });
        Ok(Self {
            suite: Suite {
                harmful: harmful.rows,
                openings,
                harmless: harmless.rows,
                max_new_tokens: judging.max_new_tokens.unwrap_or(MAX_NEW_TOKENS),
                task,
                benign: benign.rows,
            },
            answering,
            judge: judge(judging, answering)?,
            journal: Journal::none(),
            keeps: false,
            template,
            gates: Vec::new(),
            telling: Telling::default(),
            sources,
            inputs: [paths.files(), judging.files()].concat(),
        })
    }

    /// Keeps and tells what will be found where `told` says.
    ///
    /// # Errors
    /// When one of the places is an input or another place, is taken, or holds something else than a journal.
    pub(super) fn telling(mut self, mut told: Told<'_>) -> Result<Self, Failure> {
        told.places.add_inputs(self.inputs.iter().cloned());
        let journal = told.journal;
        self.telling = Telling::plan(told)?;
        if let Some(path) = journal {
            self.journal = Journal::open(path)?;
            self.keeps = true;
        }
        Ok(self)
    }

    /// Demands `gates` of what is measured, or compared `against`.
    ///
    /// # Errors
    /// When nothing would measure one of them.
    pub(super) fn demanding(
        mut self,
        gates: &[Gate],
        against: Compared,
        flags: &EvalFlags,
    ) -> Result<Self, Failure> {
        for gate in gates {
            let measure = gate.measure();
            let refused = |because: String, hint: String| {
                Err(
                    Failure::usage(format!("the gate `{gate}` cannot be checked"))
                        .because(because)
                        .hint(hint),
                )
            };
            let of_task = matches!(measure, Measure::Fa | Measure::TaskLoss);
            if of_task && self.suite.task.is_none() {
                let hint = format!("give the task's items with {}", flags.task);
                return refused("there is no task set".to_owned(), hint);
            }
            if measure == Measure::HarmfulLoss && self.suite.openings.is_empty() {
                let hint = format!("give openings with the requests of {}", flags.harmful);
                return refused("the harmful requests have no openings".to_owned(), hint);
            }
            let is_loss = matches!(
                measure,
                Measure::Kl | Measure::Perplexity | Measure::HarmfulLoss | Measure::TaskLoss
            );
            if is_loss && self.answering == Answering::There {
                let because = format!("a server tells no losses, and `{measure}` is one");
                return refused(
                    because,
                    "leave out the gate, or give the model itself".to_owned(),
                );
            }
            let is_change = measure == Measure::Kl || matches!(gate.bound(), Bound::Change(_));
            if is_change && against == Compared::Nothing {
                let because = "there is no other checkpoint to compare with".to_owned();
                return refused(because, "name one with --against".to_owned());
            }
            if measure == Measure::Kl && against == Compared::Results {
                let because = "it takes both checkpoints, and results hold figures only".to_owned();
                return refused(because, "name the checkpoint with --against".to_owned());
            }
        }
        self.gates = gates.to_vec();
        Ok(self)
    }

    /// The sets, for records.
    pub(super) fn sources(&self) -> &[Dependency] {
        &self.sources
    }

    /// The sets with their rows, in words.
    fn sets(&self) -> impl Iterator<Item = String> {
        let suite = &self.suite;
        let task = suite.task.as_ref().map(|task| task.items.len());
        let rows = [
            suite.harmful.len(),
            suite.harmless.len(),
            suite.benign.len(),
        ];
        (self.sources.iter())
            .zip(rows.into_iter().chain(task))
            .map(|(set, rows)| format!("{rows} rows of {} ({})", set.name, set.role.as_str()))
    }

    /// The judge's name.
    pub(super) fn judge(&self) -> String {
        self.judge.name()
    }

    /// Reads config and tokenizer of `model`, which are those of `whole` where it is a copy of that without side files.
    ///
    /// # Errors
    /// When one of them is refused.
    pub(super) fn load<'m>(&self, model: &'m Model, whole: &Model) -> Result<Loaded<'m>, Failure> {
        let config = whole.config()?;
        let files = whole.tokenizer()?;
        let encoder = Encoder::open(&files, self.template, MAX_LENGTH, config.vocab_size)?;
        let identity = match self.keeps {
            false => String::new(),
            true => identity(model, whole, &files, &encoder)?,
        };
        Ok(Loaded {
            model,
            config,
            encoder: Arc::new(encoder),
            identity,
            moved: None,
        })
    }

    /// Scores a model.
    ///
    /// # Errors
    /// When it, the judge or the disk fails, or the work is interrupted.
    pub(super) fn score(
        &mut self,
        name: &str,
        loaded: &Loaded<'_>,
        reporter: &Reporter,
    ) -> Result<Scored, Failure> {
        let mut decoder = loaded.decoder()?;
        let subject = Subject::Decoder(loaded.computed(&mut decoder));
        self.ask(name, subject, reporter)
    }

    /// Scores who answers.
    ///
    /// # Errors
    /// As [`Self::score`].
    pub(super) fn ask(
        &mut self,
        name: &str,
        subject: Subject<'_, '_>,
        reporter: &Reporter,
    ) -> Result<Scored, Failure> {
        reporter.stage(format!(
            "evaluating {name} by the judge {}",
            self.judge.name()
        ));
        let mut watch = EvalWatch::new(reporter);
        let (judge, journal) = (self.judge.as_mut(), &mut self.journal);
        let scored = self.suite.score(name, subject, judge, journal, &mut watch);
        watch.finish();
        Ok(scored?)
    }

    /// Adds to `scored` what ordinary text notices when `of`, which it is of, takes the place of `from`.
    ///
    /// # Errors
    /// As [`Self::score`], and when they do not share a vocabulary.
    pub(super) fn diverge(
        &mut self,
        scored: &mut Scored,
        of: &Loaded<'_>,
        from: &Loaded<'_>,
        reporter: &Reporter,
    ) -> Result<(), Failure> {
        let (mut of_decoder, mut from_decoder) = (of.decoder()?, from.decoder()?);
        let mut watch = EvalWatch::new(reporter);
        let figure = self.suite.divergence(
            &mut of.computed(&mut of_decoder),
            &mut from.computed(&mut from_decoder),
            &mut self.journal,
            &mut watch,
        );
        watch.finish();
        scored.scores = std::mem::take(&mut scored.scores).with(figure?);
        Ok(())
    }

    /// Holds the scores against those of another model and against the gates.
    ///
    /// # Errors
    /// When the two were not asked the same.
    pub(super) fn conclude(
        &self,
        scored: Scored,
        before: Option<Scored>,
    ) -> Result<Findings, Failure> {
        let against = before.as_ref().map(|it| &it.scores);
        let comparison = against
            .map(|before| Comparison::new(before, &scored.scores))
            .transpose()
            .map_err(|error| {
                Failure::doing(Exit::Refused, "the two cannot be compared", &error)
                    .hint("evaluate both on the same sets, with the same judge")
            })?;
        let check = |gate: &Gate| gate.check(&scored.scores, against);
        Ok(Findings {
            verdicts: self.gates.iter().map(check).collect(),
            comparison,
            scored,
            before,
        })
    }

    /// Adds to `table` where else it is told.
    pub(super) fn describe(&self, table: &mut Table) {
        for path in self.telling.files() {
            table.row("told in", path.display().to_string());
        }
    }

    /// Writes JUnit XML and the Markdown summary, where they are asked for.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub(super) fn tell(&self, findings: &Findings) -> Result<(), Failure> {
        self.telling.tell(findings)
    }

    /// Writes the results, where they are asked for.
    ///
    /// # Errors
    /// When they cannot be written.
    pub(super) fn results(&self, text: impl FnOnce() -> String) -> Result<(), Failure> {
        self.telling.results(text)
    }

    /// Writes the report, if one is asked for. `add` puts in it what else there is to tell.
    ///
    /// # Errors
    /// When it cannot be laid out or written.
    pub(super) fn report(
        &self,
        findings: &Findings,
        control: Option<&Scored>,
        add: impl FnOnce(&mut Page),
    ) -> Result<(), Failure> {
        self.telling.report(|| {
            let mut page = self.page(findings, control);
            add(&mut page);
            page
        })
    }
}

/// What the flags are called that give the sets.
#[derive(Clone, Copy, Debug)]
pub(super) struct EvalFlags {
    pub(super) harmful: &'static str,
    pub(super) task: &'static str,
}

/// The set at `path`, or the built-in one.
fn opened<R: panacea_patch::data::Row>(
    path: Option<&DataPath>,
    built_in: impl FnOnce() -> Dataset<R>,
) -> Result<Dataset<R>, Failure> {
    Ok(match path {
        None => built_in(),
        Some(path) => Dataset::open(path)?,
    })
}

fn judge(args: &JudgingArgs, answering: Answering) -> Result<Box<dyn Judge>, Failure> {
    let choice = args.judge.clone().unwrap_or_default();
    let settings = JudgeSettings {
        template: args
            .judge_template
            .as_deref()
            .map(JudgeTemplate::read)
            .transpose()?,
        threshold: args.judge_threshold,
        max_length: None,
    };
    if args.judge_endpoint.is_some() && choice != JudgeChoice::Endpoint {
        return Err(Failure::no_effect("--judge-endpoint", "here")
            .because(format!("the judge is `{choice}`"))
            .hint("pass `--judge endpoint`, or leave it out"));
    }
    let endpoint = match &args.judge_endpoint {
        None => None,
        Some(address) => {
            let model = args.judge_model.as_deref();
            // A key is shown to nobody else than whom it is for.
            let keys = match answering {
                Answering::Here => &[JUDGE_API_KEY, API_KEY][..],
                Answering::There => &[JUDGE_API_KEY],
            };
            let server = server(address, model, Form::Chat, None, keys)?;
            Some(Box::new(server) as Box<dyn Answerer>)
        }
    };
    Ok(choice.open(&settings, endpoint)?)
}

/// The server at `address`, which knows its user by the first of the variables `keys` that is set.
///
/// # Errors
/// When what that holds is no key.
pub(super) fn server(
    address: &Address,
    model: Option<&str>,
    form: Form,
    concurrency: Option<usize>,
    keys: &[&str],
) -> Result<Endpoint, Failure> {
    let mut settings = EndpointSettings::to(address.clone());
    settings.model = model.map(str::to_owned);
    settings.form = form;
    settings.asked_to_stop = interrupt::asked;
    if let Some(concurrency) = concurrency {
        settings.concurrency = concurrency;
    }
    let set = keys.iter().find_map(|&variable| {
        let key = std::env::var(variable).ok();
        Some((variable, key.filter(|key| !key.is_empty())?))
    });
    if let Some((variable, key)) = set {
        let key: ApiKey = key.parse().map_err(|error| {
            Failure::doing(Exit::Usage, format!("{variable} holds no key"), &error)
        })?;
        settings.api_key = Some(key);
    }
    Ok(Endpoint::new(settings))
}

/// Names everything that decides what a model says.
fn identity(
    model: &Model,
    whole: &Model,
    files: &TokenizerFiles,
    encoder: &Encoder,
) -> Result<String, Failure> {
    let side_files = match whole.checkpoint.layout().is_gguf() {
        true => Vec::new(),
        false => side_inputs(&whole.config_file()?, files),
    };
    let mut text = format!("{} {}", env!("CARGO_PKG_VERSION"), encoder.template());
    // Not by their names: a lone file has another until it is in its place.
    for weights in model.inputs(&[])? {
        text.push_str(&format!("\n{} {}", weights.role.as_str(), weights.digest));
    }
    for path in &side_files {
        let digest = digest_of(path)?;
        text.push_str(&format!("\n{digest}"));
    }
    Ok(Sha256::of(text.as_bytes()).to_string())
}

/// Tokens of an answer to a harmful or harmless request: enough to tell a refusal from an answer.
const MAX_NEW_TOKENS: usize = 64;

/// Tokens of an answer to a task item: the paper's number for GSM8K.
const TASK_TOKENS: usize = 200;

/// Tokens of a row or prompt at most.
const MAX_LENGTH: usize = 2048;

/// Where a server's key is.
pub(super) const API_KEY: &str = "OPENAI_API_KEY";

/// Where the key of the judge's server is.
const JUDGE_API_KEY: &str = "JUDGE_API_KEY";
