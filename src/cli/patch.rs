//! The whole job: find a perturbation or load one, add it, write the result with its manifest, sign it.

use std::path::{Path, PathBuf};

use panacea_patch::apply::Wanted;
use panacea_patch::manifest::{Dependency, Role};
use serde_json::json;

use super::apply;
use super::args::PatchArgs;
use super::error::Failure;
use super::evaluation::{Control, PatchEvaluation, PatchFindings, add_search, add_written};
use super::find::{self, Found};
use super::interrupt;
use super::launch::Launch;
use super::model::{Model, Use};
use super::optimize::{State, describe, results_json};
use super::output::{Origin, Output, byproduct};
use super::plan::Plan;
use super::report::{Report, Reporter, Table};
use super::settings::{self, Search};

pub(super) fn run(args: &PatchArgs, launch: &Launch, reporter: &Reporter) -> Result<(), Failure> {
    let Some(path) = &args.model else {
        return Err(no_model());
    };
    let addition = settings::addition(&args.addition, args.method.seed.unwrap_or(0));
    let evaluates = PatchEvaluation::is_wanted(args);
    let evaluation = PatchEvaluation::prepare(args)?;
    if let Some(file) = &args.perturbation {
        settings::refuse_search_flags(args, evaluates)?;
        interrupt::listen()?;
        let model = Model::open(path, of_base(args, evaluates), reporter)?;
        settings::check_addition(&args.addition, &args.gguf, &model)?;
        let output = Output::plan(
            &model,
            args.output.as_deref(),
            (&args.writing, &args.addition, &args.gguf),
            &[file],
        )?;
        if args.evaluation.control {
            return Err(Failure::no_effect("--control", "with `--perturbation`")
                .because("noise is drawn for the targets of a search")
                .hint("leave it out; `--method random --rho NORM` makes a control of its own"));
        }
        let places = output.places(model.copied());
        let evaluation = evaluation.map(|it| it.telling(args, places)).transpose()?;
        let loading = apply::Loading {
            command: COMMAND,
            file,
            settings: addition,
            dry_run: args.writing.dry_run,
        };
        return apply::from_file(loading, &model, output, evaluation, reporter);
    }
    let (model, search) = open(args, reporter)?;
    settings::check_addition(&args.addition, &args.gguf, &model)?;
    let data: Vec<PathBuf> = search.data_files();
    let data: Vec<&Path> = data.iter().map(PathBuf::as_path).collect();
    let output = Output::plan(
        &model,
        args.output.as_deref(),
        (&args.writing, &args.addition, &args.gguf),
        &data,
    )?;
    let places = output.places(model.copied());
    let mut evaluation = evaluation.map(|it| it.telling(args, places)).transpose()?;
    let (work, run) = (&args.work, &args.run);
    let prepared = find::prepare(&model, &search, (work, run), launch, reporter)?;
    if args.writing.dry_run {
        let mut plan = Plan::of_job(&model, &search, &prepared, &output)?;
        plan.add_evaluation(evaluation.as_ref());
        return plan.print(COMMAND, reporter);
    }
    let state = State::beside(output.target(), &args.work, &search);
    let resumed = state.resumed(&prepared.identity(), reporter)?;
    let saver = state.saver(prepared.identity());
    let found = prepared
        .run(saver, resumed, launch, reporter)
        .map_err(|failure| state.ended(failure))?;

    let mut parameters = settings::addition_parameters(addition, &model);
    parameters.insert("method".to_owned(), json!(found.record.method));
    parameters.insert("seed".to_owned(), json!(found.record.seed));
    parameters.extend(found.record.parameters.clone());
    let target = output.target().to_owned();
    let origin = |written: &Path| {
        let mut dependencies = dependencies(&found);
        let mut byproducts = vec![byproduct(
            "optimization",
            json!({
                "steps": found.steps,
                "radii": found.radii,
                "results": results_json(&found),
            }),
        )];
        byproducts.extend(found.search_json().map(|it| byproduct("search", it)));
        if let Some(evaluation) = &mut evaluation {
            let control = Control {
                selection: found.selection.clone(),
                delta: &found.delta,
                seed: found.record.seed,
            };
            let places = (written, target.as_path());
            let (sets, scores) = {
                let add = |page: &mut _| add_search(page, &found);
                evaluation.run(&model, places, Some(control), add, reporter)?
            };
            dependencies.extend(sets);
            byproducts.push(scores);
        }
        Ok(Origin {
            device: found.device.clone(),
            parameters,
            dependencies,
            byproducts,
            ranks: found.ranks,
        })
    };
    let wanted = Wanted::in_memory(found.deltas())?;
    let written = output
        .write(&model, &wanted, addition, origin, reporter)
        .map_err(|failure| state.ended(failure))?;
    state.discard();

    let mut table = Table::new();
    table.heading(written.heading(&model));
    describe(&found, &mut table);
    written.describe(&mut table);
    if let Some(evaluation) = &evaluation {
        evaluation.tell(&mut table, |page| {
            add_search(page, &found);
            add_written(page, &model, &written);
        })?;
    }
    let evaluated = evaluation.as_ref().and_then(PatchEvaluation::found);
    let report = Report {
        evaluation: evaluated.map(PatchFindings::to_json),
        output: Some(written.target.display().to_string()),
        perturbation: Some(found.to_json()),
        steps: Some(found.steps_json()),
        radii: Some(json!(found.radii)),
        results: Some(results_json(&found)),
        search: found.search_json(),
        ranks: found.ranks_json(),
        realized: Some(json!(written.realized)),
        files: Some(written.files_json()),
        ..Report::of(COMMAND)
    };
    PatchEvaluation::result(evaluation.as_ref(), report, &table, reporter)
}

/// Opens the model of a job that searches, and resolves how.
///
/// # Errors
/// When the model or a flag is refused.
pub(super) fn open(args: &PatchArgs, reporter: &Reporter) -> Result<(Model, Search), Failure> {
    let Some(path) = &args.model else {
        return Err(no_model());
    };
    let evaluates = PatchEvaluation::is_wanted(args);
    let search = Search::resolve(&args.method, &args.data, evaluates)?;
    interrupt::listen()?;
    let usage = of_base(args, evaluates || search.computes());
    let model = Model::open(path, usage, reporter)?;
    let search = search.in_space(model.space());
    Ok((model, search))
}

fn no_model() -> Failure {
    Failure::usage("no model is given").hint("see `panacea-patch --help`")
}

/// What an adapter's base is needed for, beside searches that compute.
fn of_base(args: &PatchArgs, computes: bool) -> Use<'_> {
    Use {
        base: args.base.path.as_deref(),
        merge: args.merge,
        computes,
    }
}

/// The inputs that decided the perturbation.
fn dependencies(found: &Found) -> Vec<Dependency> {
    let mut dependencies = found.inputs.clone();
    dependencies.extend(found.record.data.iter().map(|source| Dependency {
        role: match source.role.as_str() {
            "harmful" => Role::HarmfulSet,
            "task" => Role::TaskSet,
            "benign" => Role::BenignSet,
            "refusals" => Role::RefusalSet,
            other => Role::Other(other.to_owned()),
        },
        name: source.name.clone(),
        uri: None,
        digest: source.sha256,
    }));
    dependencies
}

const COMMAND: &str = "patch";
