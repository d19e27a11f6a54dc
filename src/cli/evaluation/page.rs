//! What was found, as the data of a report.
//!
//! In: scores of the models that were asked, and of a patch how it was made. Out: a [`Page`]. Of answers it takes only how they begin.

use panacea_formats::PerturbationRecord;
use panacea_patch::eval::figure::Measure;
use panacea_patch::eval::scores::Scores;
use panacea_patch::eval::suite::Scored;
use panacea_patch::optimize::{Place, SearchOutcome};
use panacea_patch::report::{
    Column, Comparison, Difference, Example, Examples, Front, FrontPoint, Gate, Made, MadeFile,
    Opening, Outcomes, Page, RadiusSearch, Realized, Ruling, Said, Score, Search, Setting,
    TensorEnergy,
};
use serde_json::Value;

use super::{Evaluation, Findings};
use crate::cli::find::Found;
use crate::cli::model::Model;
use crate::cli::output::Written;
use crate::cli::report::number;

/// Changed answers that are shown.
const SHOWN: usize = 12;

impl Evaluation {
    /// What `findings` tell, and the scores of `control` beside them.
    pub(super) fn page(&self, findings: &Findings, control: Option<&Scored>) -> Page {
        let after = &findings.scored;
        let before = findings.before.as_ref();
        let first = before.map(|it| &it.scores);
        let mut columns = Vec::new();
        if let Some(before) = before {
            columns.push(column("before", &before.scores, None));
        }
        let name = if before.is_some() { "after" } else { "model" };
        columns.push(column(name, &after.scores, first));
        if let Some(control) = control {
            columns.push(column("noise", &control.scores, first));
        }
        Page {
            title: format!("Evaluation of {}", after.scores.model),
            summary: match before {
                None => "What a model answers, judged and counted.".to_owned(),
                Some(before) => format!(
                    "What {} answers, judged and counted beside what {} does.",
                    after.scores.model, before.scores.model
                ),
            },
            gates: findings
                .verdicts
                .iter()
                .map(|verdict| Gate {
                    demand: verdict.gate.to_string(),
                    ruling: match verdict.is_met() {
                        true => Ruling::Met,
                        false => Ruling::Failed,
                    },
                    explanation: verdict.reason(),
                })
                .collect(),
            comparison: Some(Comparison {
                judge: self.judge(),
                columns,
            }),
            examples: before.and_then(|before| self.examples(before, after)),
            ..Page::default()
        }
    }

    /// Harmful requests whose answers are met otherwise than before.
    fn examples(&self, before: &Scored, after: &Scored) -> Option<Examples> {
        // Results from a file have no answers.
        if before.harmful.is_empty() || before.harmful.len() != after.harmful.len() {
            return None;
        }
        let said = |scored: &Scored, place: usize| Said {
            opening: Opening::of(&scored.harmful[place].text),
            outcome: scored.scores.outcomes[place],
        };
        let mut changed: Vec<Example> = (0..before.harmful.len())
            .map(|place| Example {
                request: self.suite.harmful[place].text.clone(),
                before: said(before, place),
                after: said(after, place),
            })
            .filter(|it| it.before.outcome != it.after.outcome)
            .collect();
        let count = changed.len();
        changed.truncate(SHOWN);
        Some(Examples {
            before: "before".to_owned(),
            after: "after".to_owned(),
            changed: Some(count),
            shown: changed,
        })
    }
}

fn column(name: &str, scores: &Scores, before: Option<&Scores>) -> Column {
    let score = |measure: Measure| {
        let difference = before.and_then(|before| scores.change(before, measure).ok());
        Some(Score {
            measure,
            estimate: scores.estimate(measure)?,
            difference: difference.map(|it| Difference {
                value: it.value,
                interval: Some((it.low, it.high)),
                p: Some(it.p),
            }),
        })
    };
    Column {
        name: name.to_owned(),
        note: scores.model.clone(),
        outcomes: (!scores.outcomes.is_empty()).then(|| Outcomes::of(&scores.outcomes)),
        scores: Measure::ALL.into_iter().filter_map(score).collect(),
    }
}

/// Adds to `page` how a perturbation was found.
pub(in crate::cli) fn add_search(page: &mut Page, found: &Found) {
    let mut search = Search::of_steps(&found.steps);
    if !found.radii.is_empty() {
        let budget = |name: &str| found.record.parameters.get(name).and_then(Value::as_f64);
        search.radius = Some(RadiusSearch {
            trials: found.radii.iter().map(Into::into).collect(),
            kl_budget: budget("kl_budget"),
            task_budget: budget("task_budget"),
            chosen: Some(found.delta.norm()),
        });
    }
    page.search = Some(search);
    page.front = found.search.as_ref().map(front);
    let squared = |values: &[f32]| values.iter().map(|&it| f64::from(it).powi(2)).sum();
    page.affinity = found
        .targets
        .iter()
        .zip(found.delta.iter())
        .map(|((name, _), values)| TensorEnergy {
            name: name.clone(),
            squared: squared(values),
        })
        .collect();
    add_record(page, &found.record);
}

/// Adds to `page` how a perturbation was made, as its file says.
pub(in crate::cli) fn add_record(page: &mut Page, record: &PerturbationRecord) {
    page.made = Some(Made {
        method: record.method.clone(),
        settings: (record.parameters.iter())
            .map(|(name, value)| Setting {
                name: name.clone(),
                value: match value {
                    Value::String(text) => text.clone(),
                    other => other.to_string(),
                },
            })
            .collect(),
        seed: Some(record.seed),
        program: record.tool.clone(),
        ..Made::default()
    });
}

/// Every point of a search over settings, by the trial that it is of.
fn front(search: &SearchOutcome) -> Front {
    let mut points = Vec::new();
    let mut chosen = None;
    for (trial, tried) in search.trials.iter().enumerate() {
        for (point, measured) in tried.points.iter().enumerate() {
            let place = Place { trial, point };
            if place == search.chosen {
                chosen = Some(points.len());
            }
            points.push(FrontPoint {
                label: format!("trial {}, rho {}", trial + 1, number(measured.rho)),
                cost: 100.0 * measured.cost(search.budget),
                harm: 100.0 * measured.unrefused,
                on_front: search.front.contains(&place),
            });
        }
    }
    Front {
        cost: "used of the budget for KL divergence or task loss, percent".to_owned(),
        harm: "requests that would not be refused, percent".to_owned(),
        points,
        chosen,
    }
}

/// Adds to `page` what was written, and what rounding left.
pub(in crate::cli) fn add_written(page: &mut Page, model: &Model, written: &Written) {
    let (from, target) = (model.checkpoint.path().display(), written.target.display());
    page.title = format!("Patch of {from}");
    page.summary = format!("{from} was patched; the result is {target}.");
    page.realized = Some(Realized::from(&written.realized.total));
    // Of a perturbation from a file nobody looked at the energy before.
    if page.affinity.is_empty() {
        let tensors = written.realized.tensors.iter();
        page.affinity = tensors
            .map(|tensor| TensorEnergy {
                name: tensor.name.clone(),
                squared: tensor.change.wanted_norm.powi(2),
            })
            .collect();
    }
    let made = page.made.get_or_insert_with(|| Made {
        program: concat!("panacea-patch ", env!("CARGO_PKG_VERSION")).to_owned(),
        ..Made::default()
    });
    made.manifest = written.manifest().map(|file| file.sha256);
    let files = written.files.iter();
    made.files = files
        .map(|file| MadeFile {
            name: file.name.clone(),
            bytes: file.bytes,
            sha256: Some(file.sha256),
        })
        .collect();
}
