//! What was measured while a perturbation was looked for: curves over the steps, and over the radii that were tried.

use serde::{Deserialize, Serialize};

use super::ReportError;
use super::axis::{Axis, place};
use super::number::{Digits, number, percent};
use super::plot::{self, Caption, Curve};
use crate::optimize::{RadiusPoint, StepRecord};

/// The search for a perturbation.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Search {
    /// What was measured at each step, each in a panel of its own. One without any value is left out.
    pub series: Vec<Series>,
    /// The radii that were tried.
    pub radius: Option<RadiusSearch>,
}

/// A measure at each step, from step 0 on.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Series {
    /// Its name, such as `h`.
    pub name: String,
    /// What it is, with its unit.
    #[serde(default)]
    pub about: String,
    /// Its values; nothing where a step did not measure it.
    pub values: Vec<Option<f64>>,
    /// How values are shown.
    #[serde(default)]
    pub unit: SeriesUnit,
}

/// How the values of a series are shown.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum SeriesUnit {
    /// As they are.
    #[default]
    Number,
    /// Shares from 0 to 1, in percent.
    Share,
}

/// The radii that were tried, and what each costs.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct RadiusSearch {
    /// In the order in which they were tried.
    pub trials: Vec<Trial>,
    /// The largest KL divergence that was allowed, in nats per token.
    pub kl_budget: Option<f64>,
    /// The largest rise of the task loss that was allowed, in nats per token.
    pub task_budget: Option<f64>,
    /// The radius that was taken.
    pub chosen: Option<f64>,
}

/// What a radius costs.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Trial {
    /// The radius: the norm of the perturbation.
    pub rho: f64,
    /// Mean KL divergence on benign text, in nats per token.
    pub kl: f64,
    /// Rise of the task loss, in nats per token.
    #[serde(default)]
    pub task: Option<f64>,
}

impl From<&RadiusPoint> for Trial {
    fn from(point: &RadiusPoint) -> Self {
        Self {
            rho: point.rho,
            kl: point.kl,
            task: point.task,
        }
    }
}

impl Search {
    /// What a run of [`crate::optimize`] measured at its steps: losses, the held-back share, the norm.
    pub fn of_steps(records: &[StepRecord]) -> Self {
        type Pick = fn(&StepRecord) -> Option<f64>;
        let series = |name: &str, about: &str, unit, pick: Pick| Series {
            name: name.to_owned(),
            about: about.to_owned(),
            values: records.iter().map(pick).collect(),
            unit,
        };
        let nats = SeriesUnit::Number;
        let all = [
            series(
                "h",
                "loss on compliant openings, nats per token",
                nats,
                |step| step.h,
            ),
            series("r", "loss on refusals, nats per token", nats, |step| step.r),
            series("g", "loss on the task, nats per token", nats, |step| step.g),
            series(
                "kl",
                "divergence on benign text, nats per token",
                nats,
                |step| step.kl,
            ),
            series(
                "refusing",
                "held-back requests that would be refused",
                SeriesUnit::Share,
                |step| step.refusing,
            ),
            series("norm", "length of delta after the step", nats, |step| {
                Some(step.norm)
            }),
        ];
        Self {
            series: all.into_iter().filter(Series::is_measured).collect(),
            radius: None,
        }
    }

    /// A panel for each series.
    pub(super) fn panels(&self) -> Result<Vec<Panel>, ReportError> {
        let last = self
            .measured()
            .map(|series| series.values.len())
            .max()
            .unwrap_or(0);
        let panels = self.measured().enumerate().map(|(index, series)| {
            let factor = match series.unit {
                SeriesUnit::Number => 1.0,
                SeriesUnit::Share => 100.0,
            };
            let points: Vec<(f64, f64)> = series
                .values
                .iter()
                .enumerate()
                .filter_map(|(step, value)| Some((place(step), factor * finite(*value)?)))
                .collect();
            let caption = Caption {
                id: format!("series-{index}"),
                title: format!("{} at each step", series.name),
                description: series.course(),
            };
            let curve = Curve {
                x: Axis::steps(last.saturating_sub(1)),
                y: match series.unit {
                    SeriesUnit::Number => Axis::of("", points.iter().map(|point| point.1)),
                    SeriesUnit::Share => Axis::percent(),
                },
                points,
                limit: None,
                chosen: None,
            };
            Ok(Panel {
                name: series.name.clone(),
                about: match series.unit {
                    SeriesUnit::Number => series.about.clone(),
                    SeriesUnit::Share => format!("{}, percent", series.about),
                },
                svg: plot::curve(&caption, &curve)?,
            })
        });
        panels.collect()
    }

    /// The values of every series at each step.
    pub(super) fn steps(&self) -> Steps {
        let last = self
            .measured()
            .map(|series| series.values.len())
            .max()
            .unwrap_or(0);
        let digits: Vec<Digits> = self.measured().map(Series::digits).collect();
        let row = |step: usize| {
            self.measured()
                .zip(&digits)
                .map(|(series, digits)| {
                    series.shown(series.values.get(step).copied().flatten(), *digits)
                })
                .collect()
        };
        Steps {
            names: self.measured().map(|series| series.name.clone()).collect(),
            rows: (0..last).map(row).collect(),
        }
    }

    fn measured(&self) -> impl Iterator<Item = &Series> {
        self.series.iter().filter(|series| series.is_measured())
    }
}

impl Series {
    fn is_measured(&self) -> bool {
        self.values.iter().any(|value| finite(*value).is_some())
    }

    fn digits(&self) -> Digits {
        Digits::of(self.values.iter().copied().flatten())
    }

    fn shown(&self, value: Option<f64>, digits: Digits) -> String {
        match (finite(value), self.unit) {
            (None, _) => String::new(),
            (Some(value), SeriesUnit::Number) => digits.show(value),
            (Some(value), SeriesUnit::Share) => percent(value),
        }
    }

    /// The curve in a sentence.
    fn course(&self) -> String {
        let values: Vec<(usize, f64)> = self
            .values
            .iter()
            .enumerate()
            .filter_map(|(step, value)| Some((step, finite(*value)?)))
            .collect();
        let (Some(&(first, start)), Some(&(last, end))) = (values.first(), values.last()) else {
            return String::new();
        };
        let lowest = values
            .iter()
            .map(|value| value.1)
            .fold(f64::INFINITY, f64::min);
        let highest = values
            .iter()
            .map(|value| value.1)
            .fold(f64::NEG_INFINITY, f64::max);
        let shown = |value| self.shown(Some(value), self.digits());
        format!(
            "From {} at step {first} to {} at step {last}; lowest {}, highest {}.",
            shown(start),
            shown(end),
            shown(lowest),
            shown(highest),
        )
    }
}

impl RadiusSearch {
    /// What the radii cost in KL divergence and, where it was measured, in task loss.
    pub(super) fn panels(&self) -> Result<Vec<Panel>, ReportError> {
        let mut trials: Vec<Trial> = self.trials.clone();
        trials.retain(|trial| trial.rho.is_finite() && trial.rho > 0.0);
        trials.sort_by(|a, b| a.rho.total_cmp(&b.rho));
        let (Some(least), Some(most)) = (trials.first(), trials.last()) else {
            return Ok(Vec::new());
        };
        type Cost = fn(&Trial) -> Option<f64>;
        let costs: [(&str, &str, &str, Option<f64>, Cost); 2] = [
            (
                "radius-kl",
                "KL divergence",
                "benign text, nats per token",
                self.kl_budget,
                |trial| Some(trial.kl),
            ),
            (
                "radius-task",
                "Task loss",
                "rise, nats per token",
                self.task_budget,
                |trial| trial.task,
            ),
        ];
        let mut panels = Vec::new();
        for (id, name, about, budget, cost) in costs {
            let costly: Vec<(&Trial, f64)> = trials
                .iter()
                .filter_map(|trial| Some((trial, finite(cost(trial))?)))
                .collect();
            if costly.is_empty() {
                continue;
            }
            let budget = finite(budget);
            let within = match budget {
                Some(budget) => format!(" The dashed line is the budget, {}.", number(budget)),
                None => String::new(),
            };
            let chosen = self.chosen.map(|chosen| {
                let distance = |trial: &Trial| (trial.rho / chosen).ln().abs();
                costly
                    .iter()
                    .enumerate()
                    .min_by(|(_, (a, _)), (_, (b, _))| distance(a).total_cmp(&distance(b)))
                    .map_or(0, |(index, _)| index)
            });
            let taken = match chosen {
                Some(index) => format!(
                    " The ring is the radius taken, {}.",
                    number(costly[index].0.rho)
                ),
                None => String::new(),
            };
            let caption = Caption {
                id: id.to_owned(),
                title: format!("{name} at each radius tried"),
                description: format!(
                    "From {} at radius {} to {} at radius {}.{within}{taken}",
                    number(costly[0].1),
                    number(costly[0].0.rho),
                    number(costly[costly.len() - 1].1),
                    number(costly[costly.len() - 1].0.rho),
                ),
            };
            let curve = Curve {
                x: Axis::radii(least.rho, most.rho),
                y: Axis::of("", costly.iter().map(|(_, cost)| *cost).chain(budget)),
                points: costly
                    .iter()
                    .map(|(trial, cost)| (trial.rho.log10(), *cost))
                    .collect(),
                limit: budget,
                chosen,
            };
            panels.push(Panel {
                name: name.to_owned(),
                about: about.to_owned(),
                svg: plot::curve(&caption, &curve)?,
            });
        }
        Ok(panels)
    }

    /// The trials, as they are shown.
    pub(super) fn rows(&self) -> Vec<[String; 3]> {
        let rho = Digits::of(self.trials.iter().map(|trial| trial.rho));
        let kl = Digits::of(self.trials.iter().map(|trial| trial.kl));
        let task = Digits::of(self.trials.iter().filter_map(|trial| trial.task));
        let row = |trial: &Trial| {
            let rise = trial.task.map(|rise| task.show(rise));
            [
                rho.show(trial.rho),
                kl.show(trial.kl),
                rise.unwrap_or_default(),
            ]
        };
        self.trials.iter().map(row).collect()
    }
}

/// A small figure with its heading.
#[derive(Debug, Serialize)]
pub(super) struct Panel {
    pub(super) name: String,
    pub(super) about: String,
    pub(super) svg: String,
}

/// A table of all steps.
#[derive(Debug, Serialize)]
pub(super) struct Steps {
    names: Vec<String>,
    rows: Vec<Vec<String>>,
}

fn finite(value: Option<f64>) -> Option<f64> {
    value.filter(|value| value.is_finite())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(values: &[Option<f64>]) -> Series {
        Series {
            name: "h".to_owned(),
            about: "loss".to_owned(),
            values: values.to_vec(),
            unit: SeriesUnit::Number,
        }
    }

    #[test]
    fn a_series_without_values_has_no_panel_and_no_column() {
        let search = Search {
            series: vec![
                series(&[None, Some(f64::NAN)]),
                series(&[Some(1.0), None, Some(2.0)]),
            ],
            radius: None,
        };
        assert_eq!(search.panels().expect("a figure").len(), 1);
        let steps = search.steps();
        assert_eq!(steps.names, ["h"]);
        assert_eq!(steps.rows, [["1.000"], [""], ["2.000"]]);
    }

    #[test]
    fn a_curve_is_told_in_a_sentence() {
        let course = series(&[None, Some(1.0), Some(4.0), Some(3.0), None]).course();
        assert_eq!(
            course,
            "From 1.000 at step 1 to 3.000 at step 3; lowest 1.000, highest 4.000."
        );
    }

    #[test]
    fn figures_can_be_drawn_of_any_finite_values() {
        for values in [
            vec![Some(0.0)],
            vec![Some(1.0); 3],
            vec![Some(-1.0), Some(1e300), Some(-1e300)],
            vec![Some(f64::MAX), Some(f64::MIN)],
            vec![Some(1e-300), Some(2e-300)],
            vec![Some(1.0), Some(1.0 + f64::EPSILON)],
            vec![Some(0.5); 5000],
        ] {
            let search = Search {
                series: vec![series(&values)],
                radius: None,
            };
            assert!(search.panels().expect("a figure")[0].svg.len() < 100_000);
        }
    }

    #[test]
    fn radii_can_be_one_or_far_apart_or_none() {
        let trial = |rho| Trial {
            rho,
            kl: 0.1,
            task: None,
        };
        for (radii, panels) in [
            (vec![1.0], 1),
            (vec![1e-9, 1e9], 1),
            (vec![0.5, 0.51], 1),
            (vec![0.0, f64::NAN], 0),
            (vec![], 0),
        ] {
            let search = RadiusSearch {
                trials: radii.into_iter().map(trial).collect(),
                kl_budget: Some(0.1),
                chosen: Some(0.5),
                ..RadiusSearch::default()
            };
            assert_eq!(search.panels().expect("a figure").len(), panels);
        }
    }
}
