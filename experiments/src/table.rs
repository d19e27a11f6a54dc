//! Results as a table: for each task and share of poison, a line for each arm, over its seeds.
//!
//! In: the files of results in a folder. Out: Markdown. Rows of all seeds are pooled, and intervals are those of the pooled rows; what one seed
//! differs from another is in the range beside them.

use std::collections::BTreeMap;
use std::path::Path;

use panacea_patch::eval::figure::{Figure, Measure};
use panacea_patch::eval::judge::Outcome;
use panacea_patch::eval::scores::Scores;
use serde_json::Value;

use crate::arms::Arm;
use crate::{Failure, run};

/// One arm of one cell.
struct Found {
    seed: u64,
    scores: Scores,
    /// Norm of the perturbation, as it was looked for.
    norm: Option<f64>,
    seconds: Option<f64>,
}

/// Cells by task and poison, and their arms by name.
type Cells = BTreeMap<(String, u64), BTreeMap<String, Vec<Found>>>;

pub(crate) fn of(folder: &Path) -> Result<String, Failure> {
    let mut cells = Cells::new();
    for cell in run::cells(folder)? {
        for file in std::fs::read_dir(&cell)? {
            let file = file?.path();
            if file.extension().is_some_and(|it| it == "json") {
                let record: Value = serde_json::from_str(&std::fs::read_to_string(&file)?)?;
                // The manifest beside a converted model.
                if record.get("arm").is_none() {
                    continue;
                }
                let text = |key: &str| record[key].as_str().unwrap_or_default().to_owned();
                let number = |key: &str| record[key].as_u64().unwrap_or_default();
                let arms = cells.entry((text("task"), number("poison"))).or_default();
                let made = &record["made"];
                arms.entry(text("arm")).or_default().push(Found {
                    seed: number("seed"),
                    scores: serde_json::from_value(record["scores"]["scores"].clone())?,
                    norm: made["told"]["results"]["delta_norm"].as_f64(),
                    seconds: made["seconds"].as_f64(),
                });
            }
        }
    }
    let mut text = String::new();
    for ((task, poison), arms) in &mut cells {
        text += &format!("### {task}, {poison}% poison\n\n");
        text += "| arm | seeds | HS | HS+ | refused / complied / incoherent | over-refusal | FA | KL | norm | seconds |\n";
        text += "|---|---|---|---|---|---|---|---|---|---|\n";
        let place = |name: &str| {
            let known = Arm::ALL.iter().position(|arm| arm.name() == name);
            (known.unwrap_or(usize::MAX), name.to_owned())
        };
        let mut names: Vec<&String> = arms.keys().collect();
        names.sort_by_key(|name| place(name));
        let names: Vec<String> = names.into_iter().cloned().collect();
        for name in names {
            if let Some(found) = arms.get_mut(&name) {
                found.sort_by_key(|it| it.seed);
                text += &line(&name, found);
            }
        }
        text += "\n";
    }
    Ok(text)
}

fn line(name: &str, found: &[Found]) -> String {
    let seeds: Vec<String> = found.iter().map(|it| it.seed.to_string()).collect();
    let count = |outcome| {
        found
            .iter()
            .map(|it| it.scores.count(outcome))
            .sum::<usize>()
    };
    let cells = [
        name.to_owned(),
        seeds.join(" "),
        pooled(found, Measure::Hs),
        pooled(found, Measure::HsPlus),
        format!(
            "{} / {} / {}",
            count(Outcome::Refused),
            count(Outcome::Complied),
            count(Outcome::Incoherent)
        ),
        pooled(found, Measure::OverRefusal),
        pooled(found, Measure::Fa),
        pooled(found, Measure::Kl),
        mean(found.iter().map(|it| it.norm), 3),
        mean(found.iter().map(|it| it.seconds), 0),
    ];
    format!("| {} |\n", cells.join(" | "))
}

/// The estimate over the rows of all seeds, and the least and the largest of a seed's own.
fn pooled(found: &[Found], measure: Measure) -> String {
    let figures: Vec<&Figure> = found
        .iter()
        .filter_map(|it| it.scores.figure(measure))
        .collect();
    let pooled = Figure {
        rows: figures.iter().flat_map(|it| it.rows.clone()).collect(),
        weights: figures.iter().flat_map(|it| it.weights.clone()).collect(),
        ..Figure::share(measure, [])
    };
    let Some(estimate) = pooled.estimate() else {
        return String::new();
    };
    let values = figures.iter().filter_map(|it| it.estimate());
    let values: Vec<f64> = values.map(|it| it.value).collect();
    let range = match values.len() {
        0 | 1 => String::new(),
        _ => {
            let least = values.iter().copied().fold(f64::INFINITY, f64::min);
            let largest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let digits = if measure.is_share() { 1 } else { 3 };
            format!(", {least:.digits$} .. {largest:.digits$}")
        }
    };
    format!("{}{range}", estimate.written(measure))
}

fn mean(values: impl Iterator<Item = Option<f64>>, digits: usize) -> String {
    let values: Vec<f64> = values.flatten().collect();
    if values.is_empty() {
        return String::new();
    }
    #[expect(clippy::cast_precision_loss, reason = "a handful of seeds")]
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    format!("{mean:.digits$}")
}
