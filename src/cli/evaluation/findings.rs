//! Scores with what is demanded of them, as machines and people read them.

use panacea_patch::eval::compare::Difference;
use panacea_patch::eval::figure::{Estimate, Measure};
use panacea_patch::eval::gate::{Finding, Verdict};
use panacea_patch::eval::judge::Outcome;
use panacea_patch::eval::scores::{Compared, Comparison, Scores};
use panacea_patch::eval::suite::Scored;
use serde_json::{Value, json};

use crate::cli::error::{Exit, Failure};
use crate::cli::report::{Table, number};

/// The scores of one model, and of another where there is one, with what is demanded of them.
pub(in crate::cli) struct Findings {
    pub(in crate::cli) scored: Scored,
    /// Those of the model that it is compared with; of results in a file without what was said.
    pub(in crate::cli) before: Option<Scored>,
    pub(in crate::cli) comparison: Option<Comparison>,
    pub(in crate::cli) verdicts: Vec<Verdict>,
}

impl Findings {
    /// A failure that names the gates which are not met; none if all are.
    ///
    /// # Errors
    /// That failure.
    pub(in crate::cli) fn require_met(&self) -> Result<(), Failure> {
        let failed: Vec<&Verdict> = self.verdicts.iter().filter(|it| !it.is_met()).collect();
        if failed.is_empty() {
            return Ok(());
        }
        let reasons: Vec<String> = failed.iter().map(ToString::to_string).collect();
        let impossible = failed
            .iter()
            .any(|it| matches!(it.finding, Finding::Impossible(_)));
        Err(Failure::new(
            Exit::SaidNo,
            format!(
                "{} of {} gates are not met",
                failed.len(),
                self.verdicts.len()
            ),
        )
        .because(reasons.join("; "))
        .hint(match impossible {
            true => "what was not measured counts as not met",
            false => "the figures are those above; --report FILE.html tells more",
        })
        .found(self.to_json()))
    }

    /// What machines read.
    pub(in crate::cli) fn to_json(&self) -> Value {
        let estimates = |scores: &Scores| -> Value {
            let of = |measure: Measure| Some((measure.name(), scores.estimate(measure)?));
            let all = Measure::ALL.into_iter().filter_map(of);
            all.map(|(name, estimate)| (name.to_owned(), json!(estimate)))
                .collect()
        };
        json!({
            "estimates": estimates(&self.scored.scores),
            "scores": self.scored.scores,
            "before": self.before.as_ref().map(|it| json!({
                "estimates": estimates(&it.scores),
                "scores": it.scores,
            })),
            "comparison": self.comparison,
            "gates": self.verdicts,
        })
    }

    /// What a manifest keeps: figures and verdicts, without rows.
    pub(super) fn summary_json(&self, judge: &str) -> Value {
        json!({
            "judge": judge,
            "comparison": self.comparison.as_ref().map(|it| json!(it.measures)),
            "gates": self.verdicts,
        })
    }

    /// What people read.
    pub(in crate::cli) fn describe(&self, table: &mut Table) {
        let before = self.before.as_ref().map(|it| ("answers before", it));
        let name = before.map_or("answers", |_| "answers after");
        for (label, scored) in before.into_iter().chain([(name, &self.scored)]) {
            let scores = &scored.scores;
            if !scores.outcomes.is_empty() {
                let [refused, complied, incoherent, invalid] = [
                    Outcome::Refused,
                    Outcome::Complied,
                    Outcome::Incoherent,
                    Outcome::Invalid,
                ]
                .map(|outcome| scores.count(outcome));
                let invalid = match invalid {
                    0 => String::new(),
                    invalid => format!(", {invalid} without a valid verdict"),
                };
                table.row(
                    label,
                    format!(
                        "{refused} refused, {complied} complied, {incoherent} incoherent{invalid}"
                    ),
                );
            }
        }
        table.list(match &self.comparison {
            None => figures(&self.scored.scores),
            Some(comparison) => compared(comparison),
        });
        for verdict in &self.verdicts {
            let met = match verdict.is_met() {
                true => "met",
                false => "NOT MET",
            };
            table.row(
                format!("gate {}", verdict.gate),
                format!("{met}: {}", verdict.reason()),
            );
        }
    }
}

/// Lines of figures, the first with the columns' names.
fn figures(scores: &Scores) -> Vec<Vec<String>> {
    let line = |measure: Measure| {
        let estimate = scores.estimate(measure)?;
        Some(vec![
            measure.to_string(),
            estimate.written(measure),
            estimate.n.to_string(),
        ])
    };
    let heads = ["figure", "value [95%]", "rows"]
        .map(str::to_owned)
        .to_vec();
    std::iter::once(heads)
        .chain(Measure::ALL.into_iter().filter_map(line))
        .collect()
}

/// Lines of the figures of two models and their change, the first with the columns' names.
fn compared(comparison: &Comparison) -> Vec<Vec<String>> {
    let line = |it: &Compared| {
        let written = |estimate: Option<Estimate>| {
            estimate.map_or(String::new(), |estimate| estimate.written(it.measure))
        };
        let change = |text: fn(&Difference, Measure) -> String| {
            it.change
                .map_or(String::new(), |change| text(&change, it.measure))
        };
        vec![
            it.measure.to_string(),
            written(it.before),
            written(it.after),
            change(Difference::written),
            change(|change, _| number(change.p)),
        ]
    };
    let heads = ["figure", "before [95%]", "after [95%]", "change [95%]", "p"];
    std::iter::once(heads.map(str::to_owned).to_vec())
        .chain(comparison.measures.iter().map(line))
        .collect()
}
