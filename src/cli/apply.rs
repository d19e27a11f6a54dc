//! `apply`: a checkpoint and a perturbation file in, a patched checkpoint out.

use std::path::Path;
use std::sync::OnceLock;

use panacea_formats::{Perturbation, Sha256};
use panacea_patch::apply::{ApplySettings, Wanted};
use panacea_patch::manifest::{Dependency, Role};
use serde_json::{Value, json};

use super::args::{ApplyArgs, RoundingName};
use super::device::CPU;
use super::error::Failure;
use super::evaluation::{PatchEvaluation, PatchFindings, add_record, add_written};
use super::interrupt;
use super::model::{Model, Use};
use super::output::{Origin, Output, byproduct};
use super::plan::Plan;
use super::report::{Report, Reporter, Table};
use super::settings;

pub(super) fn run(args: &ApplyArgs, reporter: &Reporter) -> Result<(), Failure> {
    if args.seed.is_some() && args.addition.rounding == Some(RoundingName::Nearest) {
        return Err(Failure::no_effect("--seed", "with `--rounding nearest`")
            .because("nothing else in `apply` is random")
            .hint("leave out one of them"));
    }
    let settings = settings::addition(&args.addition, args.seed.unwrap_or(0));
    interrupt::listen()?;
    let usage = Use {
        base: args.base.path.as_deref(),
        merge: args.merge,
        computes: false,
    };
    let model = Model::open(&args.model, usage, reporter)?;
    settings::check_addition(&args.addition, &args.gguf, &model)?;
    let output = Output::plan(
        &model,
        args.output.as_deref(),
        (&args.writing, &args.addition, &args.gguf),
        &[&args.perturbation],
    )?;
    let loading = Loading {
        command: "apply",
        file: &args.perturbation,
        settings,
        dry_run: args.writing.dry_run,
    };
    from_file(loading, &model, output, None, reporter)
}

/// A perturbation that is loaded rather than looked for.
pub(super) struct Loading<'a> {
    pub(super) command: &'static str,
    pub(super) file: &'a Path,
    pub(super) settings: ApplySettings,
    pub(super) dry_run: bool,
}

/// Adds the perturbation in `file`, for `apply` and for the whole job with `--perturbation`.
pub(super) fn from_file(
    loading: Loading<'_>,
    model: &Model,
    output: Output,
    mut evaluation: Option<PatchEvaluation>,
    reporter: &Reporter,
) -> Result<(), Failure> {
    let Loading {
        command,
        file,
        settings,
        dry_run,
    } = loading;
    let perturbation = Perturbation::open(file)?;
    reporter.stage(format!(
        "read {}: {} tensors by method {}",
        file.display(),
        perturbation.deltas().len(),
        panacea_formats::shown(&perturbation.record().method)
    ));
    if dry_run {
        Wanted::from(&perturbation).check(&model.checkpoint)?;
        let mut plan = Plan::of_addition(model, &perturbation, &output)?;
        plan.add_evaluation(evaluation.as_ref());
        return plan.print(command, reporter);
    }
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    let wanted = Wanted::from(&perturbation);
    // A dense perturbation is hashed for as long as half of the writing takes, so both at once.
    let digest = OnceLock::new();
    let mut dependencies = model.inputs_not_copied()?;
    let target = output.target().to_owned();
    let origin = |written: &Path| {
        let mut byproducts = vec![byproduct("perturbation", record_json(&perturbation))];
        if let Some(evaluation) = &mut evaluation {
            let add = |page: &mut _| add_record(page, perturbation.record());
            let (sets, found) = evaluation.run(model, (written, &target), None, add, reporter)?;
            dependencies.extend(sets);
            byproducts.push(found);
        }
        dependencies.push(Dependency {
            role: Role::Perturbation,
            name: name.clone().into_owned(),
            uri: None,
            digest: *digest.wait(),
        });
        Ok(Origin {
            device: CPU.to_owned(),
            parameters: settings::addition_parameters(settings, model),
            dependencies,
            byproducts,
            ..Origin::default()
        })
    };
    let written = rayon::in_place_scope(|scope| {
        scope.spawn(|_| {
            digest.get_or_init(|| perturbation.file().digest());
        });
        output.write(model, &wanted, settings, origin, reporter)
    })?;
    let digest = *digest.wait();

    let mut table = Table::new();
    table.heading(written.heading(model));
    table.row(
        "perturbation",
        format!("{}, sha256 {digest}", file.display()),
    );
    written.describe(&mut table);
    let found = evaluation.as_ref().and_then(PatchEvaluation::found);
    if let Some(evaluation) = &evaluation {
        evaluation.tell(&mut table, |page| {
            add_record(page, perturbation.record());
            add_written(page, model, &written);
        })?;
    }
    let report = Report {
        evaluation: found.map(PatchFindings::to_json),
        output: Some(written.target.display().to_string()),
        perturbation: Some(described(&perturbation, &name, digest)),
        realized: Some(json!(written.realized)),
        files: Some(written.files_json()),
        ..Report::of(command)
    };
    PatchEvaluation::result(evaluation.as_ref(), report, &table, reporter)
}

/// What a manifest tells of the perturbation that was applied: how it was made.
fn record_json(perturbation: &Perturbation) -> Value {
    let record = perturbation.record();
    json!({
        "method": record.method,
        "parameters": record.parameters,
        "seed": record.seed,
        "data": record.data,
        "tool": record.tool,
    })
}

fn described(perturbation: &Perturbation, name: &str, digest: Sha256) -> Value {
    let mut described = record_json(perturbation);
    described["file"] = json!(name);
    described["sha256"] = json!(digest);
    described["tensors"] = json!(perturbation.deltas().len());
    let elements: usize = perturbation.deltas().map(|delta| delta.elements()).sum();
    described["elements"] = json!(elements);
    described
}
