//! Axes: what they show, and where their ticks are.
//!
//! The ticks are found here, because those of [`plotters`] are not found in time, or not at all, for ranges that are very short or very long.

use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint, Ranged};
use plotters::coord::types::RangedCoordf64;

use super::number::tick;

/// What lies along a side of a figure. A logarithmic one has powers of ten for its places.
#[derive(Clone, Debug)]
pub(super) struct Axis {
    name: String,
    from: f64,
    to: f64,
    ticks: Vec<(f64, String)>,
}

impl Axis {
    /// Steps from 0 to `last`.
    pub(super) fn steps(last: usize) -> Self {
        let to = place(last.max(1));
        let mut axis = Self::between("step", 0.0, to, TICKS);
        axis.ticks.retain(|(step, _)| step.fract() == 0.0);
        axis
    }

    /// Percent.
    pub(super) fn percent() -> Self {
        Self::between("", 0.0, 100.0, 4.0)
    }

    /// Room for `values`, from zero on where none is below.
    pub(super) fn of(name: &str, values: impl IntoIterator<Item = f64>) -> Self {
        let (low, high) = values
            .into_iter()
            .filter(|value| value.abs() < LARGEST)
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| {
                (low.min(value), high.max(value))
            });
        if low > high || (low == 0.0 && high == 0.0) {
            return Self::between(name, 0.0, 1.0, TICKS);
        }
        let from = low.min(0.0);
        let margin = SHARE * (high - from).max(from.abs());
        let from = if low < 0.0 { low - margin } else { 0.0 };
        Self::between(name, from, high + margin, TICKS)
    }

    /// Radii from `least` to `most`, both finite and above 0, by their logarithms.
    pub(super) fn radii(least: f64, most: f64) -> Self {
        let (low, high) = (least.log10(), most.log10());
        let margin = (SHARE * (high - low)).max(0.02);
        let (from, to) = (low - margin, high + margin);
        let candidates = |factors: &[f64]| -> Vec<(f64, String)> {
            #[expect(
                clippy::cast_possible_truncation,
                reason = "exponents of finite numbers"
            )]
            let decades = from.floor() as i32..=to.floor() as i32;
            let values = decades.flat_map(|decade| {
                factors
                    .iter()
                    .map(move |factor| factor * 10.0_f64.powi(decade))
            });
            let inside = values.filter(|value| (from..=to).contains(&value.log10()));
            inside.map(|value| (value.log10(), tick(value))).collect()
        };
        let finer: [&[f64]; 4] = [
            &[1.0],
            &[1.0, 3.0],
            &[1.0, 2.0, 5.0],
            &[1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0],
        ];
        let found = finer
            .into_iter()
            .map(candidates)
            .find(|ticks| ticks.len() >= 3);
        let mut ticks = found.unwrap_or_else(|| vec![(low, tick(least)), (high, tick(most))]);
        ticks.dedup();
        let between = ticks.len().div_ceil(6);
        Self {
            name: "radius, log scale".to_owned(),
            from,
            to,
            ticks: ticks.into_iter().step_by(between).collect(),
        }
    }

    /// Values from `from` to `to`, with round ticks, `most` or fewer between them.
    fn between(name: &str, from: f64, to: f64, most: f64) -> Self {
        let exact = (to - from) / most;
        let power = 10.0_f64.powf(exact.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0]
            .into_iter()
            .map(|factor| factor * power)
            .find(|step| *step >= exact * (1.0 - 1e-9))
            .unwrap_or(exact);
        let first = (from / step).ceil();
        let ticks = (0..20_u8)
            .map(|index| (first + f64::from(index)) * step)
            .take_while(|value| *value <= to + 1e-9 * step)
            .map(|value| (value, tick(value)));
        Self {
            name: name.to_owned(),
            from,
            to,
            ticks: ticks.collect(),
        }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Whether `value` is on it.
    pub(super) fn shows(&self, value: f64) -> bool {
        (self.from..=self.to).contains(&value)
    }

    /// Its ends.
    pub(super) fn ends(&self) -> [f64; 2] {
        [self.from, self.to]
    }

    /// What stands beside the tick at `place`.
    pub(super) fn label(&self, place: f64) -> String {
        let found = self.ticks.iter().find(|(other, _)| *other == place);
        found.map(|(_, label)| label.clone()).unwrap_or_default()
    }
}

impl Ranged for Axis {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        RangedCoordf64::from(self.range()).map(value, limit)
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        match hint.weight().allow_light_points() {
            true => Vec::new(),
            false => self.ticks.iter().map(|(place, _)| *place).collect(),
        }
    }

    fn range(&self) -> std::ops::Range<f64> {
        self.from..self.to
    }
}

/// A number of things as a place on an axis.
#[expect(
    clippy::cast_precision_loss,
    reason = "steps of a search, layers of a model"
)]
pub(super) fn place(number: usize) -> f64 {
    number as f64
}

/// Ticks that have room, but for one.
const TICKS: f64 = 5.5;

/// The part of an axis that is left free at an end.
const SHARE: f64 = 0.05;

/// Values of this size and above are left out, so that no length overflows.
const LARGEST: f64 = 1e100;

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(axis: &Axis) -> Vec<&str> {
        axis.ticks.iter().map(|(_, label)| label.as_str()).collect()
    }

    #[test]
    fn ticks_are_round_and_few() {
        assert_eq!(
            labels(&Axis::of("", [0.094, 0.0])),
            ["0", "0.02", "0.04", "0.06", "0.08"]
        );
        assert_eq!(labels(&Axis::of("", [-3.0, 8.0])), ["0", "5"]);
        assert_eq!(labels(&Axis::percent()), ["0", "50", "100"]);
        assert_eq!(labels(&Axis::steps(32)), ["0", "10", "20", "30"]);
    }

    #[test]
    fn steps_are_whole() {
        assert_eq!(labels(&Axis::steps(0)), ["0", "1"]);
        assert_eq!(labels(&Axis::steps(3)), ["0", "1", "2", "3"]);
    }

    #[test]
    fn every_axis_has_a_length_and_ends_around_its_values() {
        for values in [
            vec![],
            vec![0.0],
            vec![5.0],
            vec![-5.0],
            vec![-1.0, -1.0 - f64::EPSILON],
            vec![1e-300, 2e-300],
            vec![f64::NAN, f64::INFINITY],
            vec![-9e99, 9e99],
        ] {
            let axis = Axis::of("", values.iter().copied());
            assert!(axis.from < axis.to, "{values:?}");
            assert!(axis.ticks.len() <= 7, "{values:?} {axis:?}");
            assert!(
                values
                    .iter()
                    .all(|value| !value.is_finite() || axis.shows(*value)),
                "{values:?}"
            );
        }
    }

    #[test]
    fn radii_have_some_ticks_at_any_distance() {
        for (least, most) in [
            (0.1, 0.8),
            (1e-9, 1e9),
            (0.5, 0.51),
            (0.7, 0.7),
            (1e-300, 1e300),
        ] {
            let axis = Axis::radii(least, most);
            assert!((1..=6).contains(&axis.ticks.len()), "{axis:?}");
            assert!(axis.ticks.iter().all(|(place, _)| axis.shows(*place)));
        }
        assert_eq!(labels(&Axis::radii(0.1, 0.8)), ["0.1", "0.2", "0.5"]);
    }
}
