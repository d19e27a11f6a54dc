//! `eval`: what a model says, judged and counted, beside another's.

use std::path::{Path, PathBuf};

use panacea_formats::{FormatError, Overwrite};
use panacea_patch::data::{Template, TemplateChoice};
use panacea_patch::eval::answer::Endpoint;
use panacea_patch::eval::answer::endpoint::{Address, Form};
use panacea_patch::eval::scores::Scores;
use panacea_patch::eval::suite::{Scored, Subject};
use serde_json::{Value, json};

use super::args::EvalArgs;
use super::error::{Exit, Failure};
use super::evaluation::{
    API_KEY, Answering, Compared, EvalFlags, EvalPaths, Evaluation, Findings, Told, server,
};
use super::interrupt;
use super::model::{Model, Use};
use super::places::Places;
use super::report::{Report, Reporter, Table};

pub(super) fn run(args: &EvalArgs, reporter: &Reporter) -> Result<(), Failure> {
    let paths = EvalPaths {
        harmful: args.sets.harmful.clone(),
        harmless: args.sets.harmless.clone(),
        task: args.sets.task.clone(),
        benign: args.sets.benign.clone(),
    };
    let answering = match args.endpoint.endpoint {
        Some(_) => Answering::There,
        None => Answering::Here,
    };
    let template = args.sets.template.unwrap_or_default();
    let against = match &args.against {
        None => Compared::Nothing,
        Some(path) if is_results(path) => Compared::Results,
        Some(_) => Compared::Model,
    };
    let evaluation = Evaluation::prepare(&paths, template, &args.judging, answering)?.demanding(
        &args.telling.gate,
        against,
        &FLAGS,
    )?;
    interrupt::listen()?;
    let asked = Asked::open(args, reporter)?;
    let overwrite = match args.force {
        true => Overwrite::Replace,
        false => Overwrite::Never,
    };
    let mut evaluation = evaluation.telling(Told {
        args: &args.telling,
        results: args.output.as_deref(),
        journal: args.judging.journal.as_deref(),
        places: Places::beside(asked.paths(args), Vec::new(), overwrite),
    })?;
    let findings = asked.score(&mut evaluation, reporter)?;
    evaluation.tell(&findings)?;
    evaluation.report(&findings, None, |_| ())?;
    evaluation.results(|| {
        let results = json!({
            "format": RESULTS,
            "version": 1,
            "results": findings.to_json(),
        });
        format!("{results:#}\n")
    })?;
    let mut table = Table::new();
    table.heading(format!(
        "evaluated {} by the judge {}",
        findings.scored.scores.model,
        evaluation.judge()
    ));
    findings.describe(&mut table);
    evaluation.describe(&mut table);
    let report = Report {
        found: Some(findings.to_json()),
        ..Report::of(COMMAND)
    };
    match findings.require_met() {
        Ok(()) => reporter.result(report, &table),
        Err(failure) => reporter.rejected(report, &table, failure),
    }
}

/// Who is asked, and who they are compared with.
struct Asked {
    who: Who,
    against: Option<Against>,
}

enum Who {
    Model(Box<Model>),
    Server(String, Box<Endpoint>),
}

enum Against {
    Model(Box<Model>),
    Results(Scored),
}

impl Asked {
    /// Opens what `args` name.
    ///
    /// # Errors
    /// When a model or a file of results is refused, or a flag has no effect.
    fn open(args: &EvalArgs, reporter: &Reporter) -> Result<Self, Failure> {
        let open = |path: &Path, base| {
            let usage = Use {
                base,
                merge: false,
                computes: true,
            };
            Model::open(path, usage, reporter).map(Box::new)
        };
        let who = match (&args.endpoint.endpoint, &args.model) {
            (Some(address), _) => {
                let server = of_server(args, address)?;
                Who::Server(address.to_string(), Box::new(server))
            }
            (None, Some(path)) => {
                if let Some(flag) = args.endpoint.first_without_server() {
                    return Err(Failure::no_effect(flag, "here")
                        .because("no server is asked")
                        .hint("pass --endpoint, or leave it out"));
                }
                Who::Model(open(path, args.base.path.as_deref())?)
            }
            (None, None) => {
                return Err(
                    Failure::usage("no model is given").hint("see `panacea-patch eval --help`")
                );
            }
        };
        let against = match &args.against {
            None => None,
            Some(path) if is_results(path) => Some(Against::Results(read_results(path)?)),
            Some(_) if matches!(who, Who::Server(..)) => {
                return Err(Failure::usage("a server is compared with results only")
                    .because("what it computes with is not here")
                    .hint("evaluate the other one with --output FILE.json, and pass that file"));
            }
            Some(path) => Some(Against::Model(open(path, None)?)),
        };
        Ok(Self { who, against })
    }

    /// What was read for it.
    fn paths(&self, args: &EvalArgs) -> Vec<PathBuf> {
        let mut paths = Vec::new();
        if let Who::Model(model) = &self.who {
            paths.extend(model.paths());
        }
        match &self.against {
            Some(Against::Model(model)) => paths.extend(model.paths()),
            Some(Against::Results(_)) => paths.extend(args.against.clone()),
            None => {}
        }
        paths
    }

    /// Asks them.
    ///
    /// # Errors
    /// When a model, the server, the judge or the disk fails, or the two cannot be compared.
    fn score(self, evaluation: &mut Evaluation, reporter: &Reporter) -> Result<Findings, Failure> {
        let name = |model: &Model| model.checkpoint.path().display().to_string();
        let (other, mut before) = match self.against {
            None => (None, None),
            Some(Against::Results(results)) => (None, Some(results)),
            Some(Against::Model(other)) => (Some(other), None),
        };
        let model = match self.who {
            Who::Model(model) => model,
            Who::Server(name, mut server) => {
                let scored = evaluation.ask(&name, Subject::Server(server.as_mut()), reporter)?;
                return evaluation.conclude(scored, before);
            }
        };
        let of = evaluation.load(&model, &model)?;
        let from = match &other {
            None => None,
            Some(other) => {
                let from = evaluation.load(other, other)?;
                before = Some(evaluation.score(&name(other), &from, reporter)?);
                Some(from)
            }
        };
        let mut scored = evaluation.score(&name(&model), &of, reporter)?;
        if let Some(from) = &from {
            evaluation.diverge(&mut scored, &of, from, reporter)?;
        }
        evaluation.conclude(scored, before)
    }
}

fn of_server(args: &EvalArgs, address: &Address) -> Result<Endpoint, Failure> {
    let form = match args.sets.template {
        None | Some(TemplateChoice::Auto | TemplateChoice::Chat) => Form::Chat,
        Some(TemplateChoice::Alpaca) => Form::Prompt(Template::Alpaca),
        Some(TemplateChoice::Raw) => Form::Prompt(Template::Raw),
    };
    let model = args.endpoint.endpoint_model.as_deref();
    let concurrency = args.endpoint.concurrency;
    server(address, model, form, concurrency, &[API_KEY])
}

fn is_results(path: &Path) -> bool {
    path.extension().is_some_and(|it| it == "json") && !path.is_dir()
}

/// The scores in a file of `--output`.
fn read_results(path: &Path) -> Result<Scored, Failure> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| Failure::from(FormatError::new(path, error)))?;
    let refused = |because: String| {
        Failure::new(
            Exit::Refused,
            format!("`{}` holds no results of an evaluation", path.display()),
        )
        .because(because)
        .hint("give a file that `panacea-patch eval --output` wrote")
    };
    let value: Value = serde_json::from_str(&text).map_err(|error| refused(error.to_string()))?;
    if value["format"] != RESULTS || value["version"] != 1 {
        return Err(refused(format!("its format is not `{RESULTS}`, version 1")));
    }
    let scores: Scores = serde_json::from_value(value["results"]["scores"].clone())
        .map_err(|error| refused(error.to_string()))?;
    Ok(Scored {
        scores,
        ..Scored::default()
    })
}

const FLAGS: EvalFlags = EvalFlags {
    harmful: "--harmful",
    task: "--task",
};

const RESULTS: &str = "panacea-evaluation";

const COMMAND: &str = "eval";
