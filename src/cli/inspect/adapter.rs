//! What `inspect` tells of a LoRA adapter beside its tensors: which modules, with which ranks and scales, and the base.

use std::collections::BTreeSet;

use panacea_formats::{Adapter, AdapterConfig, Checkpoint, shown};
use panacea_patch::model::TargetSelection;
use serde_json::{Value, json};

use super::super::base;
use super::super::error::Failure;
use super::super::report::{Table, number};
use super::super::targets::targets_of_adapter;
use super::targets_row;

/// Adds the rows of the adapter in `checkpoint` to `table`; gives what a report says of it, and of its targets. An adapter that
/// cannot be computed with is told of as such.
pub(super) fn describe(
    checkpoint: &Checkpoint,
    selection: Option<&TargetSelection>,
    table: &mut Table,
) -> (Value, Value) {
    let mut cannot = |failure: Failure| {
        let because = failure.because.unwrap_or(failure.error);
        table.row("adapter", format!("cannot be computed with: {because}"));
        let found = json!({"supported": false, "because": because});
        (found, Value::Null)
    };
    let config = match AdapterConfig::read(checkpoint) {
        Ok(config) => config,
        Err(error) => return cannot(error.into()),
    };
    let adapter = match Adapter::of(checkpoint, &config) {
        Ok(adapter) => adapter,
        Err(error) => return cannot(error.into()),
    };
    let modules = adapter.modules();
    let ranks: BTreeSet<usize> = modules.iter().map(|module| module.rank).collect();
    // As bits, because the order of scales as numbers is not total; they are not negative in practice.
    let scales: BTreeSet<u32> = modules
        .iter()
        .map(|module| module.scale.to_bits())
        .collect();
    let scales: Vec<f32> = scales.into_iter().map(f32::from_bits).collect();
    let listed = |items: Vec<String>| items.join(", ");
    table.row("adapts", format!("{} modules", modules.len()));
    table.row("rank", listed(ranks.iter().map(usize::to_string).collect()));
    table.row(
        "scale",
        listed(scales.iter().map(|&it| number(f64::from(it))).collect()),
    );
    for saved in adapter.saved() {
        table.row("saves whole", shown(saved.name).to_string());
    }
    let name = config.base_model_name_or_path.as_deref();
    let found = base::find(checkpoint.path(), &config, None).ok();
    table.row(
        "base",
        match (name, &found) {
            (None, _) => "none named".to_owned(),
            (Some(name), Some(path)) if path.as_os_str() == name => shown(name).to_string(),
            (Some(name), Some(path)) => format!("{}, at {}", shown(name), path.display()),
            (Some(name), None) => format!("{}, not found here", shown(name)),
        },
    );
    let targets = targets_row(
        &selection.map_or_else(|| "all".to_owned(), ToString::to_string),
        targets_of_adapter(&adapter, selection),
        table,
    );
    let described = json!({
        "supported": true,
        "modules": modules.len(),
        "ranks": ranks,
        "scales": scales,
        "saved": adapter.saved().iter().map(|saved| saved.name).collect::<Vec<_>>(),
        "base": name,
        "base_found": found.map(|path| path.display().to_string()),
    });
    (described, targets)
}
