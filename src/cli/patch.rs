//! The whole job: find a perturbation or load one, add it, write the result with its manifest, sign it.

use std::path::{Path, PathBuf};

use panacea_patch::apply::Wanted;
use panacea_patch::manifest::{Dependency, Role};
use serde_json::json;

use super::apply;
use super::args::PatchArgs;
use super::error::Failure;
use super::find::{self, Found};
use super::interrupt;
use super::model::{Model, Use};
use super::optimize::{State, describe, results_json};
use super::output::{Origin, Output, byproduct};
use super::plan::Plan;
use super::report::{Report, Reporter, Table};
use super::settings::{self, Search};

pub(super) fn run(args: &PatchArgs, reporter: &Reporter) -> Result<(), Failure> {
    let Some(path) = &args.model else {
        return Err(Failure::usage("no model is given").hint("see `panacea-patch --help`"));
    };
    let addition = settings::addition(&args.addition, args.method.seed.unwrap_or(0));
    if let Some(file) = &args.perturbation {
        settings::refuse_search_flags(args)?;
        interrupt::listen()?;
        let model = Model::open(path, of_base(args, false), reporter)?;
        settings::check_addition(&args.addition, &args.gguf, &model)?;
        let output = Output::plan(
            &model,
            args.output.as_deref(),
            (&args.writing, &args.addition, &args.gguf),
            &[file],
        )?;
        let dry_run = args.writing.dry_run;
        return apply::from_file(COMMAND, &model, file, addition, output, dry_run, reporter);
    }
    let search = Search::resolve(&args.method, &args.data)?;
    interrupt::listen()?;
    let model = Model::open(path, of_base(args, search.computes()), reporter)?;
    settings::check_addition(&args.addition, &args.gguf, &model)?;
    let search = search.in_space(model.space());
    let data: Vec<PathBuf> = search.data_files();
    let data: Vec<&Path> = data.iter().map(PathBuf::as_path).collect();
    let output = Output::plan(
        &model,
        args.output.as_deref(),
        (&args.writing, &args.addition, &args.gguf),
        &data,
    )?;
    let prepared = find::prepare(&model, &search, &args.work, reporter)?;
    if args.writing.dry_run {
        return Plan::of_job(&model, &search, &prepared, &output)?.print(COMMAND, reporter);
    }
    let state = State::beside(output.target(), &args.work, &search);
    let resumed = state.resumed(&prepared.identity(), reporter)?;
    let saver = state.saver(prepared.identity());
    let found = prepared
        .run(saver, resumed, reporter)
        .map_err(|failure| state.explain(failure))?;

    let mut parameters = settings::addition_parameters(addition, &model);
    parameters.insert("method".to_owned(), json!(found.record.method));
    parameters.insert("seed".to_owned(), json!(found.record.seed));
    parameters.extend(found.record.parameters.clone());
    let tried = found.search_json().map(|it| byproduct("search", it));
    let origin = || Origin {
        parameters,
        dependencies: dependencies(&found),
        byproducts: [byproduct(
            "optimization",
            json!({
                "steps": found.steps,
                "radii": found.radii,
                "results": results_json(&found),
            }),
        )]
        .into_iter()
        .chain(tried)
        .collect(),
    };
    let wanted = Wanted::in_memory(found.deltas())?;
    let written = output
        .write(&model, &wanted, addition, origin, reporter)
        .map_err(|failure| state.explain(failure))?;
    state.discard();

    let mut table = Table::new();
    table.heading(written.heading(&model));
    describe(&found, &mut table);
    written.describe(&mut table);
    let report = Report {
        output: Some(written.target.display().to_string()),
        perturbation: Some(found.to_json()),
        steps: Some(found.steps_json()),
        radii: Some(json!(found.radii)),
        results: Some(results_json(&found)),
        search: found.search_json(),
        realized: Some(json!(written.realized)),
        files: Some(written.files_json()),
        ..Report::of(COMMAND)
    };
    reporter.result(report, &table)
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
