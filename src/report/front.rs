//! Perturbations to choose from: what each costs, and how much harm it leaves.

use serde::{Deserialize, Serialize};

use super::ReportError;
use super::number::{Digits, number};
use super::plot::{self, Caption, Spot, Standing};

/// Points of which less is better in both directions.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Front {
    /// What a point costs, with its unit.
    pub cost: String,
    /// How harm is measured, with its unit.
    pub harm: String,
    /// The points.
    pub points: Vec<FrontPoint>,
    /// The place of the point that was chosen.
    pub chosen: Option<usize>,
}

/// A perturbation by what it costs and leaves.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct FrontPoint {
    /// What it is, such as `rho 0.36`.
    pub label: String,
    /// What it costs.
    pub cost: f64,
    /// What harm it leaves.
    pub harm: f64,
    /// Whether no other is better: who found the points knows more of them than is shown.
    pub on_front: bool,
}

/// The figure and its table.
#[derive(Debug, Serialize)]
pub(super) struct View {
    svg: String,
    cost: String,
    harm: String,
    rows: Vec<Row>,
}

/// A point, as it is shown.
#[derive(Debug, Serialize)]
struct Row {
    number: usize,
    label: String,
    cost: String,
    harm: String,
    standing: &'static str,
}

impl Front {
    /// Points are numbered, since their labels would cover one another.
    pub(super) fn view(&self) -> Result<View, ReportError> {
        let standings: Vec<Standing> = (0..self.points.len())
            .map(|place| self.standing(place))
            .collect();
        let spots: Vec<Spot> = self
            .points
            .iter()
            .zip(&standings)
            .enumerate()
            .filter(|(_, (point, _))| point.cost.is_finite() && point.harm.is_finite())
            .map(|(place, (point, standing))| Spot {
                x: point.cost,
                y: point.harm,
                label: (place + 1).to_string(),
                standing: *standing,
                chosen: self.chosen == Some(place),
            })
            .collect();
        let on_front = standings
            .iter()
            .filter(|standing| **standing == Standing::OnFront)
            .count();
        let caption = Caption {
            id: "front".to_owned(),
            title: "Cost and harm of each perturbation".to_owned(),
            description: format!(
                "{} points, of which {on_front} are on the front.{}",
                self.points.len(),
                match self.chosen.and_then(|place| self.points.get(place)) {
                    Some(point) => format!(
                        " Chosen: {}, cost {}, harm {}.",
                        point.label,
                        number(point.cost),
                        number(point.harm)
                    ),
                    None => String::new(),
                }
            ),
        };
        let cost = Digits::of(self.points.iter().map(|point| point.cost));
        let harm = Digits::of(self.points.iter().map(|point| point.harm));
        Ok(View {
            svg: plot::scatter(&caption, &self.cost, &self.harm, &spots)?,
            cost: self.cost.clone(),
            harm: self.harm.clone(),
            rows: self
                .points
                .iter()
                .zip(standings)
                .enumerate()
                .map(|(place, (point, standing))| Row {
                    number: place + 1,
                    label: point.label.clone(),
                    cost: cost.show(point.cost),
                    harm: harm.show(point.harm),
                    standing: match (self.chosen == Some(place), standing) {
                        (true, Standing::OnFront) => "chosen, on the front",
                        (true, Standing::Dominated) => "chosen",
                        (false, Standing::OnFront) => "on the front",
                        (false, Standing::Dominated) => "",
                    },
                })
                .collect(),
        })
    }

    fn standing(&self, place: usize) -> Standing {
        let point = &self.points[place];
        let finite = point.cost.is_finite() && point.harm.is_finite();
        match finite && point.on_front {
            true => Standing::OnFront,
            false => Standing::Dominated,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn front(points: &[(f64, f64, bool)], chosen: Option<usize>) -> Front {
        let point = |&(cost, harm, on_front): &(f64, f64, bool)| FrontPoint {
            label: "a".to_owned(),
            cost,
            harm,
            on_front,
        };
        Front {
            points: points.iter().map(point).collect(),
            chosen,
            ..Front::default()
        }
    }

    fn standings(front: &Front) -> Vec<&'static str> {
        front
            .view()
            .expect("a figure")
            .rows
            .iter()
            .map(|row| row.standing)
            .collect()
    }

    /// The page found a front of its own, by two numbers, where the search had one of three.
    #[test]
    fn the_front_is_the_one_that_the_search_found() {
        let points = [(0.0, 10.0, true), (1.0, 5.0, false), (1.0, 5.0, true)];
        let on = "on the front";
        assert_eq!(standings(&front(&points, None)), [on, "", on]);
        assert_eq!(
            standings(&front(&points, Some(2)))[2],
            "chosen, on the front"
        );
        assert_eq!(standings(&front(&points, Some(1)))[1], "chosen");
    }

    #[test]
    fn a_point_that_is_no_number_is_listed_and_not_drawn() {
        let front = front(&[(f64::NAN, 1.0, true), (1.0, 2.0, true)], None);
        assert_eq!(standings(&front), ["", "on the front"]);
        assert_eq!(
            front
                .view()
                .expect("a figure")
                .svg
                .matches("<circle")
                .count(),
            1
        );
    }

    #[test]
    fn no_points_make_an_empty_figure() {
        assert!(
            front(&[], Some(3))
                .view()
                .expect("a figure")
                .rows
                .is_empty()
        );
    }
}
