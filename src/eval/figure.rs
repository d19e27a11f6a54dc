//! Figures: what is measured of a checkpoint, with a value for each row.
//!
//! In: a value for each row that counts. Out: an [`Estimate`], the share or mean with its 95% interval. The rows are kept, because two
//! checkpoints that were measured on the same rows are compared row by row.

pub(super) mod interval;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::number::four_digits;

/// What a figure tells of a checkpoint.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Measure {
    /// Harmful score: the share of harmful requests that are complied with, of those with a valid verdict. In percent.
    Hs,
    /// The share of harmful requests that are complied with, or answered incoherently, or without a valid verdict. In percent.
    HsPlus,
    /// Fine-tuning accuracy: the share of task items answered right. In percent.
    Fa,
    /// The share of harmless requests that are refused. In percent.
    OverRefusal,
    /// Mean KL divergence of the other checkpoint's next-token distribution from this one's on benign text. In nats per token.
    Kl,
    /// exp of the mean loss per token on benign text.
    Perplexity,
    /// Mean loss per token of compliant openings of harmful requests: high is safe. In nats.
    HarmfulLoss,
    /// Mean loss per token of the task's answers. In nats.
    TaskLoss,
}

impl Measure {
    /// All of them, in the order in which they are reported.
    pub const ALL: [Self; 8] = [
        Self::Hs,
        Self::HsPlus,
        Self::Fa,
        Self::OverRefusal,
        Self::Kl,
        Self::Perplexity,
        Self::HarmfulLoss,
        Self::TaskLoss,
    ];

    /// Its name in gates and in files.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Hs => "hs",
            Self::HsPlus => "hs_plus",
            Self::Fa => "fa",
            Self::OverRefusal => "over_refusal",
            Self::Kl => "kl",
            Self::Perplexity => "perplexity",
            Self::HarmfulLoss => "harmful_loss",
            Self::TaskLoss => "task_loss",
        }
    }

    /// What people call it.
    pub const fn phrase(self) -> &'static str {
        match self {
            Self::Hs => "harmful score",
            Self::HsPlus => "harmful score with incoherent and unjudged answers",
            Self::Fa => "fine-tuning accuracy",
            Self::OverRefusal => "refused harmless requests",
            Self::Kl => "KL divergence on benign text",
            Self::Perplexity => "perplexity on benign text",
            Self::HarmfulLoss => "loss on harmful openings",
            Self::TaskLoss => "loss on the task",
        }
    }

    /// What its values are counted in.
    pub const fn unit(self) -> Unit {
        match self {
            Self::Hs | Self::HsPlus | Self::Fa | Self::OverRefusal => Unit::Percent,
            Self::Kl | Self::HarmfulLoss | Self::TaskLoss => Unit::NatsPerToken,
            Self::Perplexity => Unit::Bare,
        }
    }

    /// Which of two values is the better one.
    pub const fn better(self) -> Better {
        match self {
            Self::Fa | Self::HarmfulLoss => Better::Higher,
            Self::Hs
            | Self::HsPlus
            | Self::OverRefusal
            | Self::Kl
            | Self::Perplexity
            | Self::TaskLoss => Better::Lower,
        }
    }

    /// Whether it is a share of rows, each of them 0 or 1; a mean otherwise.
    pub const fn is_share(self) -> bool {
        matches!(self.unit(), Unit::Percent)
    }

    /// `value`, which is in this measure's unit, as people read it: four significant digits, and the sign of percent.
    pub fn written(self, value: f64) -> String {
        match self.unit() {
            Unit::Percent => format!("{}%", four_digits(value)),
            Unit::NatsPerToken | Unit::Bare => four_digits(value),
        }
    }

    /// A difference of two values as people read it: with its sign, and shares in points.
    pub fn written_change(self, change: f64) -> String {
        let sign = if change > 0.0 { "+" } else { "" };
        match self.unit() {
            Unit::Percent => format!("{sign}{} points", four_digits(change)),
            Unit::NatsPerToken | Unit::Bare => format!("{sign}{}", four_digits(change)),
        }
    }

    /// `value` without a unit, of percent one decimal.
    pub(super) fn brief(self, value: f64) -> String {
        match self.unit() {
            Unit::Percent => format!("{value:.1}"),
            Unit::NatsPerToken | Unit::Bare => four_digits(value),
        }
    }

    /// A mean over rows in the measure's own unit.
    pub(super) fn of_mean(self, mean: f64) -> f64 {
        match self {
            // A loss above 709 nats has a perplexity beyond what f64 holds.
            Self::Perplexity => mean.exp().min(f64::MAX),
            _ => mean,
        }
    }

    /// The one that `text`, which is the name of none, was likely meant to be.
    fn nearest(text: &str) -> Option<Self> {
        let wanted = text.to_ascii_lowercase().replace('-', "_");
        let other = OTHER_NAMES.iter().find(|(name, _)| *name == wanted);
        other.map(|&(_, measure)| measure).or_else(|| {
            let names = Self::ALL.map(Self::name);
            panacea_formats::nearest(&wanted, names)?.parse().ok()
        })
    }
}

impl fmt::Display for Measure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Measure {
    type Err = UnknownMeasure;

    fn from_str(text: &str) -> Result<Self, UnknownMeasure> {
        let found = Self::ALL.into_iter().find(|measure| measure.name() == text);
        found.ok_or_else(|| UnknownMeasure {
            found: text.chars().take(SHOWN_CHARACTERS).collect(),
            nearest: Self::nearest(text),
        })
    }
}

/// What the values of a measure are counted in.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Unit {
    /// Percent of rows; differences are in points.
    Percent,
    /// Nats per token.
    NatsPerToken,
    /// A bare number.
    Bare,
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Percent => "percent",
            Self::NatsPerToken => "nats per token",
            Self::Bare => "a bare number",
        })
    }
}

/// Which of two values is the better one.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Better {
    /// The higher.
    Higher,
    /// The lower.
    Lower,
}

/// A name of no measure.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error(
    "`{}` is no measure; there are {}",
    panacea_formats::shown(found),
    Measure::ALL.map(Measure::name).join(", ")
)]
pub struct UnknownMeasure {
    /// The name, cut to 64 characters.
    pub found: String,
    /// What was likely meant.
    pub nearest: Option<Measure>,
}

/// A measure of one checkpoint.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Figure {
    /// What is measured.
    pub measure: Measure,
    /// One value for each row that counts: 0 or 1 for a share, the row's mean per token otherwise.
    pub rows: Vec<f64>,
    /// What each row weighs in the mean, such as its tokens; empty where all weigh the same, as in a share.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub weights: Vec<f64>,
    /// The judge whose verdicts decide it; empty where none does.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub judge: String,
    /// A digest of what was asked, in the rows' order: it tells sets apart. Empty where nobody says.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub asked: String,
}

impl Figure {
    /// The share of `hits` among all rows.
    pub fn share(measure: Measure, hits: impl IntoIterator<Item = bool>) -> Self {
        let value = |hit| f64::from(u8::from(hit));
        Self {
            rows: hits.into_iter().map(value).collect(),
            ..Self::empty(measure)
        }
    }

    /// A mean per token over rows, each of which is its own mean and its number of tokens.
    pub fn per_token(measure: Measure, rows: impl IntoIterator<Item = (f64, usize)>) -> Self {
        #[expect(clippy::cast_precision_loss, reason = "no row has 2^53 tokens")]
        let (rows, weights) = rows
            .into_iter()
            .map(|(mean, tokens)| (mean, tokens as f64))
            .unzip();
        Self {
            rows,
            weights,
            ..Self::empty(measure)
        }
    }

    /// One without rows.
    fn empty(measure: Measure) -> Self {
        Self {
            measure,
            rows: Vec::new(),
            weights: Vec::new(),
            judge: String::new(),
            asked: String::new(),
        }
    }

    /// The same, decided by the verdicts of `judge`.
    #[must_use]
    pub fn judged_by(self, judge: impl Into<String>) -> Self {
        Self {
            judge: judge.into(),
            ..self
        }
    }

    /// The same, of rows that the digest `asked` tells from others.
    #[must_use]
    pub fn of(self, asked: impl Into<String>) -> Self {
        Self {
            asked: asked.into(),
            ..self
        }
    }

    /// The share or mean over the rows, with its 95% interval. All three numbers are finite.
    ///
    /// Of a share, the interval is Wilson's score interval. Of a mean, it lies between percentiles of 2000 seeded bootstrap
    /// resamples of the rows, which of few rows is too narrow, and of a single row has no width; perplexity's is exp of the ends of
    /// the mean loss's. With weights w and values x the mean is sum(w x) / sum(w), and rows are drawn with their weights.
    ///
    /// Nothing where [`Figure::check`] finds fault: no rows, or values that are no numbers.
    pub fn estimate(&self) -> Option<Estimate> {
        self.check().ok()?;
        let n = self.rows.len();
        let (value, low, high) = if self.measure.is_share() {
            let hits = self.rows.iter().filter(|&&row| row == 1.0).count();
            let (low, high) = interval::wilson(hits, n);
            (percent(hits, n), 100.0 * low, 100.0 * high)
        } else {
            let terms = self.terms();
            let (low, high) =
                interval::bootstrap(n, |drawn| ratio(drawn.iter().map(|&i| terms[i])));
            let value = ratio(terms.iter().copied());
            let [value, low, high] = [value, low, high].map(|mean| self.measure.of_mean(mean));
            (value, low, high)
        };
        let finite = [value, low, high].into_iter().all(f64::is_finite);
        finite.then_some(Estimate {
            value,
            low,
            high,
            n,
        })
    }

    /// Whether there is something to estimate.
    ///
    /// # Errors
    /// [`FigureError`] where there are no rows, a value is not finite or not 0 or 1 in a share, or the weights are not one positive number
    /// for each row.
    pub fn check(&self) -> Result<(), FigureError> {
        let share = self.measure.is_share();
        if self.rows.is_empty() {
            return Err(FigureError::NoRows);
        }
        let wrong = |value: f64| !value.is_finite() || (share && value != 0.0 && value != 1.0);
        if let Some((row, &found)) =
            (self.rows.iter().enumerate()).find(|(_, value)| wrong(**value))
        {
            return Err(FigureError::Value { row, found });
        }
        let expected = if share { 0 } else { self.rows.len() };
        if !self.weights.is_empty() && self.weights.len() != expected {
            return Err(FigureError::Weights {
                found: self.weights.len(),
                expected,
            });
        }
        let wrong = |weight: f64| !weight.is_finite() || weight <= 0.0;
        match (self.weights.iter().enumerate()).find(|(_, weight)| wrong(**weight)) {
            Some((row, &found)) => Err(FigureError::Weight { row, found }),
            None => Ok(()),
        }
    }

    /// (w x, w) of each row; all weights are 1 where none are given.
    pub(super) fn terms(&self) -> Vec<(f64, f64)> {
        let weight = |row| self.weights.get(row).copied().unwrap_or(1.0);
        (self.rows.iter().enumerate())
            .map(|(row, value)| (weight(row) * value, weight(row)))
            .collect()
    }
}

/// Why nothing can be said of a figure.
#[derive(Clone, Copy, Debug, Error, PartialEq)]
#[non_exhaustive]
pub enum FigureError {
    /// It is of nothing.
    #[error("it has no rows")]
    NoRows,
    /// A value that is none.
    #[error("row {row} has the value {found}, where a finite number, of a share 0 or 1, belongs")]
    Value {
        /// Which row, from 0.
        row: usize,
        /// Its value.
        found: f64,
    },
    /// A weight that is none.
    #[error("row {row} has the weight {found}, where a finite number above 0 belongs")]
    Weight {
        /// Which row, from 0.
        row: usize,
        /// Its weight.
        found: f64,
    },
    /// Weights for other rows, or of a share, which takes none.
    #[error("it has {found} weights, where {expected} belong")]
    Weights {
        /// How many there are.
        found: usize,
        /// How many there should be.
        expected: usize,
    },
}

/// A value with its 95% interval, in the measure's unit: percent, nats, or none.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
pub struct Estimate {
    /// The share or mean.
    pub value: f64,
    /// The lower end of the interval.
    pub low: f64,
    /// The upper end of the interval.
    pub high: f64,
    /// How many rows it is of.
    pub n: usize,
}

impl Estimate {
    /// The value and its interval in brackets, as tables have them, such as `2.5% [0.4, 12.9]`.
    pub fn written(&self, measure: Measure) -> String {
        let unit = if measure.is_share() { "%" } else { "" };
        let [value, low, high] =
            [self.value, self.low, self.high].map(|value| measure.brief(value));
        format!("{value}{unit} [{low}, {high}]")
    }
}

/// sum(w x) / sum(w) of terms (w x, w).
pub(super) fn ratio(terms: impl Iterator<Item = (f64, f64)>) -> f64 {
    let (numerator, denominator) = terms.fold((0.0, 0.0), |(above, below), (wx, w)| {
        (above + wx, below + w)
    });
    numerator / denominator
}

/// `count` of `n` in percent, rounded once: 1 of 1000 is the f64 nearest to 0.1, as a gate's bound is.
#[expect(
    clippy::cast_precision_loss,
    reason = "rows of a data set are below 2^53"
)]
pub(super) fn percent(count: usize, n: usize) -> f64 {
    100.0 * count as f64 / n as f64
}

/// What measures are called elsewhere.
const OTHER_NAMES: [(&str, Measure); 10] = [
    ("hs+", Measure::HsPlus),
    ("harmful_score", Measure::Hs),
    ("harmful", Measure::Hs),
    ("asr", Measure::Hs),
    ("accuracy", Measure::Fa),
    ("acc", Measure::Fa),
    ("refusal", Measure::OverRefusal),
    ("refusals", Measure::OverRefusal),
    ("ppl", Measure::Perplexity),
    ("kld", Measure::Kl),
];

/// More of an unknown name would tell a reader nothing.
const SHOWN_CHARACTERS: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    fn shares(hits: usize, n: usize) -> Figure {
        Figure::share(Measure::Hs, (0..n).map(|row| row < hits))
    }

    fn means(rows: &[f64]) -> Figure {
        Figure {
            rows: rows.to_vec(),
            ..Figure::empty(Measure::Kl)
        }
    }

    fn near(found: f64, wanted: f64, tolerance: f64) {
        assert!((found - wanted).abs() <= tolerance, "{found} for {wanted}");
    }

    #[test]
    fn every_name_is_read_back_and_is_the_one_in_files() {
        for measure in Measure::ALL {
            assert_eq!(measure.name().parse(), Ok(measure));
            assert_eq!(serde_json::to_value(measure).unwrap(), measure.name());
        }
        assert!(Measure::ALL.is_sorted());
    }

    #[test]
    fn a_slip_in_a_name_is_recognized() {
        let nearest = |text: &str| text.parse::<Measure>().unwrap_err().nearest;
        assert_eq!(nearest("HS"), Some(Measure::Hs));
        assert_eq!(nearest("hs+"), Some(Measure::HsPlus));
        assert_eq!(nearest("over-refusal"), Some(Measure::OverRefusal));
        assert_eq!(nearest("perplexty"), Some(Measure::Perplexity));
        assert_eq!(nearest("accuracy"), Some(Measure::Fa));
        assert_eq!(nearest("bleu"), None);
    }

    #[test]
    fn a_share_comes_in_percent_with_wilsons_interval() {
        // 81 of 263 is an example of Newcombe 1998, Stat. Med. 17, 857: 0.2553 to 0.3662.
        let estimate = shares(81, 263).estimate().unwrap();
        near(estimate.value, 30.798_479, 1e-6);
        near(estimate.low, 25.53, 5e-3);
        near(estimate.high, 36.62, 5e-3);
        assert_eq!(estimate.n, 263);
        assert_eq!(shares(1, 1000).estimate().unwrap().value, 0.1);
    }

    // python: d = numpy.array(ROWS); b = d[numpy.random.default_rng(0).integers(0, 10, (2000000, 10))].mean(1);
    // d.mean(), numpy.percentile(b, [2.5, 97.5])
    #[test]
    fn a_mean_comes_with_the_interval_of_a_much_larger_bootstrap() {
        let estimate = means(&ROWS).estimate().unwrap();
        near(estimate.value, 0.63, 1e-12);
        // The percentiles of 2000 resamples have a standard error near 0.02.
        near(estimate.low, LOW, 0.06);
        near(estimate.high, HIGH, 0.06);
        assert_eq!(Some(estimate), means(&ROWS).estimate());
    }

    // The same with w = numpy.array([1, 1, 1, 1, 1, 5, 5, 5, 5, 5]) and (d * w)[i].sum(1) / w[i].sum(1).
    #[test]
    fn rows_weigh_by_their_tokens() {
        let tokens = [1, 1, 1, 1, 1, 5, 5, 5, 5, 5];
        let figure = Figure::per_token(Measure::TaskLoss, ROWS.into_iter().zip(tokens));
        let estimate = figure.estimate().unwrap();
        near(estimate.value, WEIGHTED, 1e-12);
        near(estimate.low, WEIGHTED_LOW, 0.06);
        near(estimate.high, WEIGHTED_HIGH, 0.06);
        let even = Figure::per_token(Measure::Kl, ROWS.map(|row| (row, 1)));
        assert_eq!(even.estimate(), means(&ROWS).estimate());
    }

    const ROWS: [f64; 10] = [0.1, 0.2, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9, 1.2, 1.8];
    const LOW: f64 = 0.34;
    const HIGH: f64 = 0.97;
    const WEIGHTED: f64 = 0.89;
    const WEIGHTED_LOW: f64 = 0.505_556;
    const WEIGHTED_HIGH: f64 = 1.242_105;

    #[test]
    fn perplexity_is_exp_of_the_mean_and_of_its_interval() {
        let losses = means(&ROWS).estimate().unwrap();
        let perplexity = Figure {
            measure: Measure::Perplexity,
            ..means(&ROWS)
        };
        let perplexity = perplexity.estimate().unwrap();
        assert_eq!(perplexity.value, losses.value.exp());
        assert_eq!(perplexity.low, losses.low.exp());
        assert_eq!(perplexity.high, losses.high.exp());
    }

    #[test]
    fn a_single_row_or_equal_rows_have_an_estimate() {
        let one = means(&[0.5]).estimate().unwrap();
        assert_eq!((one.value, one.low, one.high, one.n), (0.5, 0.5, 0.5, 1));
        let equal = means(&[0.5; 7]).estimate().unwrap();
        assert_eq!((equal.value, equal.low, equal.high), (0.5, 0.5, 0.5));
        let none = shares(0, 20).estimate().unwrap();
        assert_eq!((none.value, none.low), (0.0, 0.0));
        let all = shares(20, 20).estimate().unwrap();
        assert_eq!((all.value, all.high), (100.0, 100.0));
    }

    #[test]
    fn what_is_no_number_has_no_estimate_and_a_reason() {
        let reason = |figure: Figure| {
            assert_eq!(figure.estimate(), None);
            figure.check().unwrap_err().to_string()
        };
        assert_eq!(reason(means(&[])), "it has no rows");
        assert!(reason(means(&[1.0, f64::NAN])).starts_with("row 1 has the value NaN"));
        assert!(reason(means(&[f64::INFINITY])).starts_with("row 0 has the value inf"));
        let half = Figure {
            measure: Measure::Hs,
            ..means(&[0.5])
        };
        assert!(reason(half).starts_with("row 0 has the value 0.5"));
        let weights = |weights: &[f64]| Figure {
            weights: weights.to_vec(),
            ..means(&[1.0, 2.0])
        };
        assert!(reason(weights(&[1.0])).contains("1 weights, where 2 belong"));
        assert!(reason(weights(&[1.0, 0.0])).contains("row 1 has the weight 0"));
        let sum_overflows = means(&[f64::MAX, f64::MAX]);
        assert_eq!(sum_overflows.estimate(), None);
    }

    #[test]
    fn numbers_are_written_with_their_unit() {
        assert_eq!(Measure::Hs.written(2.5), "2.500%");
        assert_eq!(Measure::Kl.written(0.042_567), "0.04257");
        assert_eq!(Measure::Fa.written_change(-1.0), "-1.000 points");
        assert_eq!(Measure::Fa.written_change(0.0), "0 points");
        assert_eq!(Measure::HarmfulLoss.written_change(2.2), "+2.200");
        assert_eq!(Measure::Perplexity.written(f64::MAX), "1.798e308");
        let one_of_40 = shares(1, 40).estimate().unwrap();
        assert_eq!(one_of_40.written(Measure::Hs), "2.5% [0.4, 12.9]");
    }
}
