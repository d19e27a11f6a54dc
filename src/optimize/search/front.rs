//! Points of which none is better than another in both harm and cost.
//!
//! In: points, and a budget. Out: their places.

use std::cmp::Ordering;

use serde::{Deserialize, Serialize};

use super::super::radius::Budget;

/// One radius along the perturbation of a trial, measured on rows that no trial learns from.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrialPoint {
    /// The norm of the perturbation.
    pub rho: f64,
    /// Share of the harmful requests that would not be refused.
    pub unrefused: f64,
    /// Mean of ln(1 + exp(r - h)) over the harmful requests, in nats: falls on where all are refused.
    pub doubt: f64,
    /// Mean KL divergence on benign text, in nats per token.
    pub kl: f64,
    /// Rise of the task loss, in nats per token; absent without a task set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub task: Option<f64>,
}

impl TrialPoint {
    /// What it uses of the budget: of the divergence's or of the task loss's, whichever is more. 1 is all of it.
    pub fn cost(&self, budget: Budget) -> f64 {
        let of_kl = self.kl / budget.kl;
        self.task
            .map_or(of_kl, |rise| of_kl.max(rise / budget.task))
    }

    /// Whether it keeps to the budget.
    pub fn keeps_to(&self, budget: Budget) -> bool {
        budget.allows(self.kl, self.task)
    }

    /// Less harm first: fewer requests that are complied with, and of as many, less doubt.
    pub fn compare_harm(&self, other: &Self) -> Ordering {
        self.unrefused
            .total_cmp(&other.unrefused)
            .then(self.doubt.total_cmp(&other.doubt))
    }
}

/// The places of the points that no other is better than, from the cheapest to the least harmful. Of equal ones the first.
pub(super) fn front(points: &[TrialPoint], budget: Budget) -> Vec<usize> {
    let cost = |place: usize| points[place].cost(budget);
    let mut order: Vec<usize> = (0..points.len()).collect();
    order.sort_by(|&a, &b| {
        cost(a)
            .total_cmp(&cost(b))
            .then(points[a].compare_harm(&points[b]))
    });
    let mut front: Vec<usize> = Vec::new();
    for place in order {
        let better = |&least: &usize| points[place].compare_harm(&points[least]).is_lt();
        if front.last().is_none_or(better) {
            front.push(place);
        }
    }
    front
}

/// The place of the least harmful point within the budget; of equal ones the cheapest, and the first.
pub(super) fn least_harmful(points: &[TrialPoint], budget: Budget) -> Option<usize> {
    let within = (0..points.len()).filter(|&place| points[place].keeps_to(budget));
    within.min_by(|&a, &b| {
        let (a, b) = (&points[a], &points[b]);
        let cost = || a.cost(budget).total_cmp(&b.cost(budget));
        a.compare_harm(b).then_with(cost)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Few values, so that many points are equal in one thing or in all.
    fn points() -> impl Strategy<Value = Vec<TrialPoint>> {
        let point = (0..4u8, 0..4u8, 0..6u8, prop::option::of(0..6u8)).prop_map(
            |(unrefused, doubt, kl, task)| TrialPoint {
                rho: 1.0,
                unrefused: f64::from(unrefused) / 4.0,
                doubt: f64::from(doubt),
                kl: f64::from(kl) / 4.0,
                task: task.map(|task| f64::from(task) / 2.0 - 0.5),
            },
        );
        prop::collection::vec(point, 0..24)
    }

    /// Harm and cost in two numbers each, by hand.
    fn harm_and_cost(point: &TrialPoint, budget: Budget) -> ((f64, f64), f64) {
        let of_task = point.task.unwrap_or(f64::NEG_INFINITY) / budget.task;
        let of_kl = point.kl / budget.kl;
        let cost = if of_task > of_kl { of_task } else { of_kl };
        ((point.unrefused, point.doubt), cost)
    }

    proptest! {
        #[test]
        fn the_front_is_what_no_point_is_better_than(points in points()) {
            let budget = Budget { kl: 0.5, task: 0.25 };
            let measured: Vec<_> = points.iter().map(|it| harm_and_cost(it, budget)).collect();
            let mut wanted: Vec<usize> = (0..points.len())
                .filter(|&i| {
                    !(0..points.len()).any(|j| {
                        let ((a, b), (c, d)) = (measured[j], measured[i]);
                        let as_good = a <= c && b <= d;
                        as_good && (a < c || b < d || j < i)
                    })
                })
                .collect();
            let mut found = front(&points, budget);
            prop_assert!(found.is_sorted_by(|&a, &b| measured[a].1 < measured[b].1));
            prop_assert!(found.is_sorted_by(|&a, &b| measured[a].0 > measured[b].0));
            found.sort_unstable();
            wanted.sort_unstable();
            prop_assert_eq!(found, wanted);
        }

        #[test]
        fn no_point_within_the_budget_is_less_harmful_than_the_chosen_one(points in points()) {
            let budget = Budget { kl: 0.5, task: 0.25 };
            let within = |point: &TrialPoint| point.kl <= 0.5 && point.task.is_none_or(|it| it <= 0.25);
            match least_harmful(&points, budget) {
                None => prop_assert!(!points.iter().any(within)),
                Some(chosen) => {
                    prop_assert!(within(&points[chosen]));
                    let best = harm_and_cost(&points[chosen], budget);
                    for other in points.iter().filter(|it| within(it)) {
                        prop_assert!(harm_and_cost(other, budget) >= best);
                    }
                }
            }
        }
    }
}
