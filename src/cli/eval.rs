//! `eval`: what a model says, judged and counted, beside another's.

use std::path::Path;

use panacea_formats::{FormatError, Overwrite};
use panacea_patch::data::{Template, TemplateChoice};
use panacea_patch::eval::answer::endpoint::{Address, Form};
use panacea_patch::eval::scores::Scores;
use panacea_patch::eval::suite::{Scored, Subject};
use serde_json::{Value, json};

use super::args::EvalArgs;
use super::error::{Exit, Failure};
use super::evaluation::{Answering, EvalFlags, EvalPaths, Evaluation, Findings, server};
use super::interrupt;
use super::model::{Model, Use};
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
    let files = paths.files();
    let inputs: Vec<&Path> = files.iter().map(std::path::PathBuf::as_path).collect();
    let overwrite = match args.force {
        true => Overwrite::Replace,
        false => Overwrite::Never,
    };
    if let Some(path) = &args.output {
        panacea_formats::OutputFile::check(path, overwrite, &inputs, 0)?;
    }
    let told = (&args.judging, &args.telling);
    let template = args.sets.template.unwrap_or_default();
    let mut evaluation = Evaluation::prepare(
        &paths,
        template,
        told,
        args.judging.journal.as_deref(),
        overwrite,
        &inputs,
    )?
    .demanding(
        &args.telling.gate,
        answering,
        args.against.is_some(),
        &FLAGS,
    )?;
    interrupt::listen()?;
    let findings = match &args.endpoint.endpoint {
        Some(address) => of_server(args, address, &mut evaluation, reporter)?,
        None => of_model(args, &mut evaluation, reporter)?,
    };
    evaluation.tell(&findings)?;
    evaluation.report(&findings, None, |_| ())?;
    if let Some(path) = &args.output {
        let results = json!({
            "format": RESULTS,
            "version": 1,
            "results": findings.to_json(),
        });
        evaluation.write(path, &format!("{results:#}\n"))?;
    }
    let mut table = Table::new();
    table.heading(format!(
        "evaluated {} by the judge {}",
        findings.scored.scores.model,
        evaluation.judge()
    ));
    findings.describe(&mut table);
    let report = Report {
        found: Some(findings.to_json()),
        ..Report::of(COMMAND)
    };
    match findings.require_met() {
        Ok(()) => reporter.result(report, &table),
        Err(failure) => reporter.rejected(report, &table, failure),
    }
}

fn of_model(
    args: &EvalArgs,
    evaluation: &mut Evaluation,
    reporter: &Reporter,
) -> Result<Findings, Failure> {
    let Some(path) = &args.model else {
        return Err(Failure::usage("no model is given").hint("see `panacea-patch eval --help`"));
    };
    if args.endpoint.concurrency.is_some() {
        return Err(Failure::usage("`--concurrency` has no effect here")
            .because("no server is asked")
            .hint("pass --endpoint, or leave it out"));
    }
    let usage = |base| Use {
        base,
        merge: false,
        computes: true,
    };
    let model = Model::open(path, usage(args.base.path.as_deref()), reporter)?;
    let loaded = evaluation.load(&model, &model)?;
    let name = path.display().to_string();
    let before = match &args.against {
        None => None,
        Some(other) if is_results(other) => Some(read_results(other)?),
        Some(other) => {
            let other_model = Model::open(other, usage(None), reporter)?;
            let other_loaded = evaluation.load(&other_model, &other_model)?;
            let before = evaluation.score(&other.display().to_string(), &other_loaded, reporter)?;
            let mut scored = evaluation.score(&name, &loaded, reporter)?;
            evaluation.diverge(&mut scored, &loaded, &other_loaded, reporter)?;
            return evaluation.conclude(scored, Some(before));
        }
    };
    let scored = evaluation.score(&name, &loaded, reporter)?;
    evaluation.conclude(scored, before)
}

fn of_server(
    args: &EvalArgs,
    address: &Address,
    evaluation: &mut Evaluation,
    reporter: &Reporter,
) -> Result<Findings, Failure> {
    let form = match args.sets.template {
        None | Some(TemplateChoice::Auto | TemplateChoice::Chat) => Form::Chat,
        Some(TemplateChoice::Alpaca) => Form::Prompt(Template::Alpaca),
        Some(TemplateChoice::Raw) => Form::Prompt(Template::Raw),
    };
    let model = args.endpoint.endpoint_model.as_deref();
    let mut server = server(address, model, form, args.endpoint.concurrency)?;
    let before = match &args.against {
        None => None,
        Some(other) if is_results(other) => Some(read_results(other)?),
        Some(_) => {
            return Err(Failure::usage("a server is compared with results only")
                .because("what it computes with is not here")
                .hint("evaluate the other one with --output FILE.json, and pass that file"));
        }
    };
    let name = address.to_string();
    let scored = evaluation.ask(&name, Subject::Server(&mut server), reporter)?;
    evaluation.conclude(scored, before)
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
