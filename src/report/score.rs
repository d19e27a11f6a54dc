//! Scores of any number of checkpoints, side by side.
//!
//! In: for each checkpoint a [`Column`]. Out, for the template: a group of rows for each measure, with the checkpoints below one another so that
//! their digits are, too, and it all fits a telephone; and a bar of outcomes for each checkpoint.

use serde::{Deserialize, Serialize};

use super::number::{Digits, one_digit, p_value, with_sign};
use crate::eval::figure::{Estimate, Measure};
use crate::eval::judge::Outcome;

/// Checkpoints that were asked the same.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Comparison {
    /// The judge of the answers, such as `keyword:heretic`; empty where none was asked.
    pub judge: String,
    /// The checkpoints. Differences are to the first.
    pub columns: Vec<Column>,
}

/// What was measured of a checkpoint.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Column {
    /// What it is called, such as `before`.
    pub name: String,
    /// What it is, such as `noise of the same norm, 0.363`.
    pub note: String,
    /// How harmful requests were met.
    pub outcomes: Option<Outcomes>,
    /// What was measured, in any order.
    pub scores: Vec<Score>,
}

/// A measure of a checkpoint.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Score {
    /// What is measured.
    pub measure: Measure,
    /// Its value, with an interval.
    pub estimate: Estimate,
    /// How far it is from the first checkpoint's.
    #[serde(default)]
    pub difference: Option<Difference>,
}

/// A measure less the same measure of the first checkpoint, on the same rows, in the measure's unit.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Difference {
    /// The difference.
    pub value: f64,
    /// The ends of its 95% interval.
    #[serde(default)]
    pub interval: Option<(f64, f64)>,
    /// How likely one as large would be if there were none.
    #[serde(default)]
    pub p: Option<f64>,
}

/// How many harmful requests were met in which way.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Outcomes {
    /// Declined.
    pub refused: usize,
    /// Done, or begun.
    pub complied: usize,
    /// Answered with nothing that can be read.
    pub incoherent: usize,
    /// Answered with what the judge makes nothing of.
    pub invalid: usize,
}

impl Outcomes {
    /// Counts `outcomes`.
    pub fn of(outcomes: &[Outcome]) -> Self {
        let count = |wanted| {
            outcomes
                .iter()
                .filter(|&&outcome| outcome == wanted)
                .count()
        };
        Self {
            refused: count(Outcome::Refused),
            complied: count(Outcome::Complied),
            incoherent: count(Outcome::Incoherent),
            invalid: count(Outcome::Invalid),
        }
    }

    /// By name, in the order in which bars are stacked.
    fn parts(&self) -> [(&'static str, usize); 4] {
        [
            ("refused", self.refused),
            ("complied", self.complied),
            ("incoherent", self.incoherent),
            ("invalid", self.invalid),
        ]
    }
}

impl Comparison {
    /// The rows of each measure that any checkpoint has, in the order of [`Measure`].
    pub(super) fn measures(&self) -> Vec<MeasureRows> {
        let scores = self.columns.iter().flat_map(|column| &column.scores);
        let mut measures: Vec<Measure> = scores.map(|score| score.measure).collect();
        measures.sort_unstable();
        measures.dedup();
        measures
            .into_iter()
            .map(|measure| self.rows(measure))
            .collect()
    }

    fn rows(&self, measure: Measure) -> MeasureRows {
        let found: Vec<(&Column, &Score)> = self
            .columns
            .iter()
            .filter_map(|column| {
                let score = column
                    .scores
                    .iter()
                    .find(|score| score.measure == measure)?;
                Some((column, score))
            })
            .collect();
        let words = Words::of(measure);
        let scale = Scale::of(words.unit, found.iter().map(|(_, score)| score.estimate));
        let style = Style {
            unit: words.unit,
            digits: Digits::of(found.iter().flat_map(|(_, score)| {
                let Estimate {
                    value, low, high, ..
                } = score.estimate;
                [value, low, high]
            })),
        };
        let rows = found.iter().map(|(column, score)| Row {
            column: column.name.clone(),
            value: style.value(score.estimate.value),
            interval: style.interval(score.estimate.low, score.estimate.high),
            n: score.estimate.n,
            difference: score
                .difference
                .map(|difference| with_sign(style.plain(difference.value))),
            difference_interval: score
                .difference
                .and_then(|difference| difference.interval)
                .map(|(low, high)| style.interval(low, high)),
            p: score
                .difference
                .and_then(|difference| difference.p)
                .map(p_value),
            strip: scale.strip(score.estimate),
        });
        MeasureRows {
            name: words.name,
            about: words.about,
            rows: rows.collect(),
        }
    }

    /// A bar for each checkpoint of which any outcome is known.
    pub(super) fn bars(&self) -> Vec<Bar> {
        let bars = self.columns.iter().filter_map(|column| {
            let parts = column.outcomes?.parts();
            let all: usize = parts.iter().map(|(_, count)| count).sum();
            (all > 0).then(|| Bar {
                column: column.name.clone(),
                note: column.note.clone(),
                all,
                segments: segments(&parts, all),
            })
        });
        bars.collect()
    }
}

/// A measure, and its row of each checkpoint.
#[derive(Debug, Serialize)]
pub(super) struct MeasureRows {
    name: &'static str,
    about: &'static str,
    rows: Vec<Row>,
}

/// A checkpoint's row, as it is shown.
#[derive(Debug, Serialize)]
struct Row {
    column: String,
    value: String,
    interval: String,
    n: usize,
    difference: Option<String>,
    difference_interval: Option<String>,
    p: Option<String>,
    strip: Option<Strip>,
}

/// An interval and its value on their measure's scale, in percent of the scale's length.
#[derive(Debug, PartialEq, Serialize)]
struct Strip {
    low: f64,
    value: f64,
    high: f64,
}

/// A checkpoint's outcomes as a stacked bar.
#[derive(Debug, Serialize)]
pub(super) struct Bar {
    column: String,
    note: String,
    all: usize,
    segments: Vec<Segment>,
}

/// A part of a bar; `start` and `width` in percent of it, to be written as they are.
#[derive(Debug, PartialEq, Serialize)]
struct Segment {
    outcome: &'static str,
    count: usize,
    share: f64,
    start: String,
    width: String,
    label: String,
}

#[expect(
    clippy::cast_precision_loss,
    reason = "counts of answers, shown in tenths of a percent"
)]
fn segments(parts: &[(&'static str, usize)], all: usize) -> Vec<Segment> {
    let mut before = 0;
    let segment = |&(outcome, count): &(&'static str, usize)| {
        let share = count as f64 / all as f64;
        let start = 100.0 * before as f64 / all as f64;
        before += count;
        Segment {
            outcome,
            count,
            share,
            start: format!("{start:.3}"),
            width: format!("{:.3}", 100.0 * share),
            label: match share {
                _ if share >= WORD => format!("{outcome} {count}"),
                _ if share >= NUMBER => count.to_string(),
                _ => String::new(),
            },
        }
    };
    parts.iter().map(segment).collect()
}

/// The range that a measure's strips share.
struct Scale {
    low: f64,
    high: f64,
}

impl Scale {
    /// All of 0 to 100 for shares; from 0, or below, to the highest end otherwise.
    fn of(unit: Unit, estimates: impl Iterator<Item = Estimate>) -> Self {
        let (low, high) = match unit {
            Unit::Percent => (0.0, 100.0),
            Unit::Nats | Unit::None => (0.0, f64::MIN_POSITIVE),
        };
        estimates.fold(Self { low, high }, |scale, estimate| Self {
            low: scale.low.min(estimate.low),
            high: scale.high.max(estimate.high),
        })
    }

    /// Nothing where an end is no number.
    fn strip(&self, estimate: Estimate) -> Option<Strip> {
        let place = |value: f64| {
            let share = (value - self.low) / (self.high - self.low);
            share
                .is_finite()
                .then(|| (1000.0 * share.clamp(0.0, 1.0)).round() / 10.0)
        };
        Some(Strip {
            low: place(estimate.low)?,
            value: place(estimate.value)?,
            high: place(estimate.high)?,
        })
    }
}

/// A measure in words.
struct Words {
    name: &'static str,
    /// What it is a share or mean of, its unit, and which way is good.
    about: &'static str,
    unit: Unit,
}

impl Words {
    fn of(measure: Measure) -> Self {
        let (name, unit, about) = match measure {
            Measure::Hs => (
                "Harmful score",
                Unit::Percent,
                "harmful requests complied with, of those with a valid verdict; low is safe",
            ),
            Measure::HsPlus => (
                "Not refused",
                Unit::Percent,
                "harmful requests complied with, answered incoherently or without a valid verdict; low is safe",
            ),
            Measure::Fa => (
                "Fine-tuning accuracy",
                Unit::Percent,
                "task items answered right; high is useful",
            ),
            Measure::OverRefusal => (
                "Over-refusal",
                Unit::Percent,
                "harmless requests refused; low is useful",
            ),
            Measure::Kl => (
                "KL divergence on benign text",
                Unit::Nats,
                "from the first checkpoint, nats per token; low is little changed",
            ),
            Measure::Perplexity => (
                "Perplexity on benign text",
                Unit::None,
                "exp of the loss per token; low is fluent",
            ),
            Measure::HarmfulLoss => (
                "Loss on compliant openings",
                Unit::Nats,
                "nats per token; high is safe",
            ),
            Measure::TaskLoss => (
                "Loss on the task",
                Unit::Nats,
                "nats per token; low is useful",
            ),
        };
        Self { name, about, unit }
    }
}

#[derive(Clone, Copy)]
enum Unit {
    Percent,
    Nats,
    None,
}

/// How the numbers of a measure are written.
struct Style {
    unit: Unit,
    digits: Digits,
}

impl Style {
    fn value(&self, value: f64) -> String {
        match self.unit {
            Unit::Percent if value.is_finite() => format!("{}%", one_digit(value)),
            _ => self.plain(value),
        }
    }

    fn interval(&self, low: f64, high: f64) -> String {
        format!("[{}, {}]", self.plain(low), self.plain(high))
    }

    fn plain(&self, value: f64) -> String {
        match self.unit {
            Unit::Percent => one_digit(value),
            Unit::Nats | Unit::None => self.digits.show(value),
        }
    }
}

/// The shares of a bar from which on a segment has room for its outcome and count, and for its count, on a telephone.
const WORD: f64 = 0.3;
const NUMBER: f64 = 0.08;

#[cfg(test)]
mod tests {
    use super::*;

    fn score(measure: Measure, value: f64, low: f64, high: f64) -> Score {
        let estimate = Estimate {
            value,
            low,
            high,
            n: 40,
        };
        Score {
            measure,
            estimate,
            difference: None,
        }
    }

    fn column(name: &str, scores: Vec<Score>) -> Column {
        Column {
            name: name.to_owned(),
            scores,
            ..Column::default()
        }
    }

    #[test]
    fn measures_come_in_their_own_order_with_those_checkpoints_that_have_them() {
        let comparison = Comparison {
            columns: vec![
                column(
                    "before",
                    vec![
                        score(Measure::Fa, 90.0, 80.0, 95.0),
                        score(Measure::Hs, 100.0, 91.2, 100.0),
                    ],
                ),
                column("after", vec![score(Measure::Hs, 2.5, 0.4, 12.9)]),
            ],
            ..Comparison::default()
        };
        let measures = comparison.measures();
        let names: Vec<_> = measures
            .iter()
            .map(|measure| (measure.name, measure.rows.len()))
            .collect();
        assert_eq!(names, [("Harmful score", 2), ("Fine-tuning accuracy", 1)]);
        assert_eq!(measures[0].rows[1].value, "2.5%");
        assert_eq!(measures[0].rows[1].interval, "[0.4, 12.9]");
        assert_eq!(
            measures[0].rows[1].strip,
            Some(Strip {
                low: 0.4,
                value: 2.5,
                high: 12.9
            })
        );
    }

    #[test]
    fn strips_of_losses_reach_from_zero_to_the_highest_end() {
        let comparison = Comparison {
            columns: vec![
                column("before", vec![score(Measure::TaskLoss, 1.0, 0.5, 1.5)]),
                column("after", vec![score(Measure::TaskLoss, 2.0, 1.0, 3.0)]),
                column("broken", vec![score(Measure::TaskLoss, f64::NAN, 1.0, 3.0)]),
            ],
            ..Comparison::default()
        };
        let [task] = comparison.measures().try_into().expect("one measure");
        let strips: Vec<_> = task.rows.into_iter().map(|row| row.strip).collect();
        assert_eq!(
            strips[0],
            Some(Strip {
                low: 16.7,
                value: 33.3,
                high: 50.0
            })
        );
        assert_eq!(
            strips[1],
            Some(Strip {
                low: 33.3,
                value: 66.7,
                high: 100.0
            })
        );
        assert_eq!(strips[2], None);
    }

    #[test]
    fn segments_lie_end_to_end_and_are_labelled_where_there_is_room() {
        let outcomes = Outcomes::of(&[
            Outcome::Refused,
            Outcome::Refused,
            Outcome::Refused,
            Outcome::Invalid,
        ]);
        let [refused, complied, incoherent, invalid] = segments(&outcomes.parts(), 4)
            .try_into()
            .expect("four outcomes");
        assert_eq!(
            (
                refused.start.as_str(),
                refused.width.as_str(),
                refused.label.as_str()
            ),
            ("0.000", "75.000", "refused 3")
        );
        assert_eq!((complied.count, complied.label.as_str()), (0, ""));
        assert_eq!(incoherent.start, "75.000");
        assert_eq!(
            (invalid.start.as_str(), invalid.label.as_str()),
            ("75.000", "1")
        );
    }

    #[test]
    fn no_outcomes_make_no_bar() {
        let outcomes = Some(Outcomes::default());
        let comparison = Comparison {
            columns: vec![
                Column {
                    outcomes,
                    ..Column::default()
                },
                Column::default(),
            ],
            ..Comparison::default()
        };
        assert!(comparison.bars().is_empty());
    }
}
