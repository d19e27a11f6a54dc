//! Whether two checkpoints differ: the same figure of both, on the same rows, compared row by row.
//!
//! In: two [`Figure`]s. Out: their [`Difference`], after minus before, with a 95% interval and a two-sided p-value. Rows are paired, because a
//! patch changes few answers: what both checkpoints do alike says nothing of their difference, and as noise would hide it.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::figure::{Figure, FigureError, Measure, interval, ratio};

/// How much more one checkpoint has of a measure than another, in the measure's unit; shares in points.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
pub struct Difference {
    /// After minus before.
    pub value: f64,
    /// The lower end of the 95% interval.
    pub low: f64,
    /// The upper end of the 95% interval.
    pub high: f64,
    /// The probability of a difference at least this large, either way, if the two did not differ.
    pub p: f64,
    /// How many pairs of rows it is of.
    pub n: usize,
}

impl Difference {
    /// The difference and its interval in brackets, as tables have them, such as `-97.5 points [-99.6, -83.9]`.
    pub fn written(&self, measure: Measure) -> String {
        let unit = if measure.is_share() { " points" } else { "" };
        let [value, low, high] = [self.value, self.low, self.high].map(|value| {
            let sign = if value > 0.0 { "+" } else { "" };
            format!("{sign}{}", measure.brief(value))
        });
        format!("{value}{unit} [{low}, {high}]")
    }
}

/// Compares `after` with `before`, row by row.
///
/// Of shares, the interval is Newcombe's and p is McNemar's exact. Of means, the interval lies between percentiles of 2000 seeded bootstrap resamples of
/// pairs, and p is that of 9999 seeded random exchanges within pairs, so never below 0.0001. Interval and p come by different
/// ways, and near 0.05 may disagree.
///
/// # Errors
/// [`CompareError`] when the two are not of the same measure and rows, or one of them has nothing to estimate.
pub fn compare(before: &Figure, after: &Figure) -> Result<Difference, CompareError> {
    let measure = after.measure;
    if before.measure != measure {
        return Err(CompareError::Measures {
            before: before.measure,
            after: measure,
        });
    }
    let n = after.rows.len();
    if before.rows.len() != n {
        return Err(CompareError::Rows {
            measure,
            before: before.rows.len(),
            after: n,
        });
    }
    let faulty = |source| CompareError::Figure { measure, source };
    before.check().map_err(faulty)?;
    after.check().map_err(faulty)?;
    let difference = if measure.is_share() {
        Table::count(before, after).difference()
    } else {
        difference_of_means(before, after)
    };
    let Difference {
        value, low, high, ..
    } = difference;
    if [value, low, high].into_iter().all(f64::is_finite) {
        Ok(difference)
    } else {
        Err(CompareError::Overflow { measure })
    }
}

/// Why two figures are not compared.
#[derive(Clone, Debug, Error, PartialEq)]
#[non_exhaustive]
pub enum CompareError {
    /// One of them has nothing to estimate.
    #[error("the figures of `{measure}` cannot be compared")]
    Figure {
        /// What is measured.
        measure: Measure,
        /// Why.
        source: FigureError,
    },
    /// They measure different things.
    #[error("`{after}` is compared with `{before}`")]
    Measures {
        /// What was measured before.
        before: Measure,
        /// What was measured after.
        after: Measure,
    },
    /// Values so large that their difference is no number.
    #[error("the figures of `{measure}` are too large for a difference")]
    Overflow {
        /// What is measured.
        measure: Measure,
    },
    /// They are not of the same rows.
    #[error("`{measure}` has {after} rows, where the other checkpoint has {before}")]
    Rows {
        /// What is measured.
        measure: Measure,
        /// Rows before.
        before: usize,
        /// Rows after.
        after: usize,
    },
}

/// Pairs of rows by what they were before and after.
#[derive(Clone, Copy, Debug)]
struct Table {
    /// 1 in both.
    both: usize,
    /// 1 before, 0 after.
    lost: usize,
    /// 0 before, 1 after.
    gained: usize,
    /// 0 in both.
    neither: usize,
}

impl Table {
    fn count(before: &Figure, after: &Figure) -> Self {
        let count = |wanted: (bool, bool)| {
            let pairs = before.rows.iter().zip(&after.rows);
            pairs
                .filter(|&(&before, &after)| (before == 1.0, after == 1.0) == wanted)
                .count()
        };
        Self {
            both: count((true, true)),
            lost: count((true, false)),
            gained: count((false, true)),
            neither: count((false, false)),
        }
    }

    fn n(self) -> usize {
        self.both + self.lost + self.gained + self.neither
    }

    #[expect(
        clippy::cast_precision_loss,
        reason = "rows of a data set are below 2^53"
    )]
    fn difference(self) -> Difference {
        let n = self.n();
        // Rounded once, so that two of 200 rows are exactly one point.
        let value = 100.0 * (self.gained as f64 - self.lost as f64) / n as f64;
        let (low, high) = self.newcombe();
        Difference {
            value,
            low: 100.0 * low,
            high: 100.0 * high,
            p: self.mcnemar(),
            n,
        }
    }

    /// The interval of the share after minus the share before, as shares.
    ///
    /// Source: method 10 of Newcombe 1998, Stat. Med. 17, 2635: the square root of squares of Wilson's distances, less their
    /// correlation, which is corrected for continuity where it is positive.
    #[expect(
        clippy::cast_precision_loss,
        reason = "rows of a data set are below 2^53"
    )]
    fn newcombe(self) -> (f64, f64) {
        let n = self.n();
        let (hits_before, hits_after) = (self.both + self.lost, self.both + self.gained);
        let (before, after) = (hits_before as f64 / n as f64, hits_after as f64 / n as f64);
        let (before_low, before_high) = interval::wilson(hits_before, n);
        let (after_low, after_high) = interval::wilson(hits_after, n);
        let product = [hits_before, n - hits_before, hits_after, n - hits_after]
            .map(|count| count as f64)
            .iter()
            .product::<f64>();
        let excess = self.both as f64 * self.neither as f64 - self.lost as f64 * self.gained as f64;
        let excess = if excess > 0.0 {
            (excess - n as f64 / 2.0).max(0.0)
        } else {
            excess
        };
        let phi = if product > 0.0 {
            excess / product.sqrt()
        } else {
            0.0
        };
        // Rounding can leave a square of zero below it.
        let distance = |a: f64, b: f64| (a * a - 2.0 * phi * a * b + b * b).max(0.0).sqrt();
        let value = after - before;
        let low = value - distance(after - after_low, before_high - before);
        let high = value + distance(after_high - after, before - before_low);
        (low.max(-1.0), high.min(1.0))
    }

    /// The two-sided p-value of McNemar's exact test: the discordant pairs against a fair coin.
    ///
    /// Source: McNemar 1947, Psychometrika 12, 153, with the binomial distribution in place of its approximation.
    #[expect(
        clippy::cast_precision_loss,
        reason = "rows of a data set are below 2^53"
    )]
    fn mcnemar(self) -> f64 {
        let discordant = self.lost + self.gained;
        let fewer = self.lost.min(self.gained);
        // P(X <= fewer) from its largest term downwards. The term itself as a logarithm: 2^-discordant underflows beyond 1074 pairs.
        let mut log_term = -(discordant as f64) * std::f64::consts::LN_2;
        for k in 1..=fewer {
            log_term += ((discordant - fewer + k) as f64 / k as f64).ln();
        }
        let (mut sum, mut term) = (1.0, 1.0);
        for k in (1..=fewer).rev() {
            term *= k as f64 / (discordant - k + 1) as f64;
            sum += term;
        }
        (2.0 * log_term.exp() * sum).min(1.0)
    }
}

/// A bootstrap of pairs for the interval, and exchanges within pairs for p, of (weighted) means.
fn difference_of_means(before: &Figure, after: &Figure) -> Difference {
    let measure = after.measure;
    let n = after.rows.len();
    let (before, after) = (before.terms(), after.terms());
    let value_of = |terms: &mut dyn Iterator<Item = (f64, f64)>| measure.of_mean(ratio(terms));
    let difference = |rows: &[usize]| {
        value_of(&mut rows.iter().map(|&i| after[i]))
            - value_of(&mut rows.iter().map(|&i| before[i]))
    };
    let all: Vec<usize> = (0..n).collect();
    let value = difference(&all);
    let (low, high) = interval::bootstrap(n, difference);

    // If the checkpoints did not differ, each pair could as well be the other way round. With equal weights that is the sign-flip
    // test; with other weights, a row's weight goes where its value goes.
    let mut generator = ChaCha8Rng::seed_from_u64(PERMUTATION_SEED);
    // Sums in another order differ in their last bits; what is equal but for them counts as at least as large.
    let least = value.abs() * (1.0 - 1e-9);
    let at_least = (0..PERMUTATIONS)
        .filter(|_| {
            let (mut a, mut b) = ((0.0, 0.0), (0.0, 0.0));
            let mut bits = 0;
            for (i, (&x, &y)) in after.iter().zip(&before).enumerate() {
                if i % 64 == 0 {
                    bits = generator.next_u64();
                }
                let (x, y) = if bits & 1 == 0 { (x, y) } else { (y, x) };
                bits >>= 1;
                a = (a.0 + x.0, a.1 + x.1);
                b = (b.0 + y.0, b.1 + y.1);
            }
            let exchanged = measure.of_mean(a.0 / a.1) - measure.of_mean(b.0 / b.1);
            exchanged.abs() >= least
        })
        .count();
    #[expect(clippy::cast_precision_loss, reason = "at most 10000")]
    let p = (at_least + 1) as f64 / (PERMUTATIONS + 1) as f64;
    Difference {
        value,
        low,
        high,
        p,
        n,
    }
}

/// Random exchanges of a permutation test; with the one that was found they make 10000.
const PERMUTATIONS: usize = 9999;

/// Of the permutation test's generator: any number, always the same, and another than the bootstrap's.
const PERMUTATION_SEED: u64 = 1;

#[cfg(test)]
mod tests {
    use rand_distr::{Distribution, StandardNormal};

    use super::*;

    fn near(found: f64, wanted: f64, tolerance: f64) {
        assert!((found - wanted).abs() <= tolerance, "{found} for {wanted}");
    }

    /// Two shares whose pairs are 1 in both, lost, gained, 0 in both as often as said.
    fn shares(both: usize, lost: usize, gained: usize, neither: usize) -> (Figure, Figure) {
        let figure = |counts: [(bool, usize); 4]| {
            let rows = counts.map(|(hit, count)| vec![hit; count]).concat();
            Figure::share(Measure::Hs, rows)
        };
        (
            figure([
                (true, both),
                (true, lost),
                (false, gained),
                (false, neither),
            ]),
            figure([
                (true, both),
                (false, lost),
                (true, gained),
                (false, neither),
            ]),
        )
    }

    fn of_shares(both: usize, lost: usize, gained: usize, neither: usize) -> Difference {
        let (before, after) = shares(both, lost, gained, neither);
        compare(&before, &after).unwrap()
    }

    fn means(rows: &[f64]) -> Figure {
        Figure::per_token(Measure::HarmfulLoss, rows.iter().map(|&row| (row, 1)))
    }

    // python: scipy.stats.binomtest(k, n, 0.5).pvalue
    #[test]
    fn p_of_shares_is_that_of_a_binomial_test_of_the_discordant_pairs() {
        for (lost, gained, p) in [
            (1, 7, 0.070_312_5),
            (12, 2, 0.012_939_453_125),
            (0, 5, 0.0625),
            (12, 25, 0.047_031_027_439_516_04),
            (6, 53, 1.753_918_746_350_002_8e-10),
            (5, 5, 1.0),
            (0, 1, 1.0),
            (0, 0, 1.0),
            (700, 1300, 1.629_349_702_760_265_4e-41),
        ] {
            let found = of_shares(3, lost, gained, 4).p;
            assert!((found / p - 1.0).abs() < 1e-9, "{lost} {gained}: {found}");
        }
    }

    // The first two are the examples of Fagerland, Lydersen and Laake 2014, BMC Med. Res. Methodol. 14, and of their R package
    // `contingencytables`; the next two are in the table of Newcombe's paper. Both subtract the other way round: the second share from the first.
    #[test]
    fn the_interval_of_shares_is_newcombes() {
        for (pairs, low, high) in [
            ((59, 6, 16, 80), -0.1186, -0.0046),
            ((1, 1, 7, 12), -0.5069, -0.0256),
            ((36, 12, 2, 0), 0.0569, 0.3404),
            ((36, 14, 0, 0), 0.1528, 0.4167),
            // The rest is by the formula, computed apart: at the borders, where a marginal is zero.
            ((0, 50, 0, 0), 0.8991, 1.0),
            ((54, 0, 0, 0), -0.0664, 0.0664),
            ((1, 0, 0, 0), -0.7935, 0.7935),
        ] {
            let (both, lost, gained, neither) = pairs;
            let found = of_shares(both, lost, gained, neither);
            near(found.low, -100.0 * high, 6e-3);
            near(found.high, -100.0 * low, 6e-3);
        }
    }

    #[test]
    fn a_difference_of_shares_is_after_minus_before_in_points() {
        let found = of_shares(150, 3, 1, 46);
        assert_eq!(found.value, -1.0);
        assert_eq!(found.n, 200);
        assert!(found.low < -1.0 && found.high > -1.0);
    }

    // python: scipy.stats.permutation_test((AFTER, BEFORE), lambda x, y, axis: x.mean(axis) - y.mean(axis), vectorized=True,
    // permutation_type="samples", n_resamples=numpy.inf).pvalue
    #[test]
    fn p_of_means_is_near_that_of_all_exchanges() {
        let found = compare(&means(&BEFORE), &means(&AFTER)).unwrap();
        near(found.value, VALUE, 1e-12);
        // Of 9999 exchanges p has a standard error of 0.002.
        near(found.p, P, 0.007);
        assert_eq!(compare(&means(&BEFORE), &means(&AFTER)), Ok(found));
        let back = compare(&means(&AFTER), &means(&BEFORE)).unwrap();
        assert_eq!(back.value, -found.value);
        assert_eq!(back.p, found.p);
    }

    // python: d = AFTER - BEFORE; numpy.percentile(d[numpy.random.default_rng(0).integers(0, 10, (2000000, 10))].mean(1), [2.5, 97.5])
    #[test]
    fn the_interval_of_means_is_that_of_a_much_larger_bootstrap_of_pairs() {
        let found = compare(&means(&BEFORE), &means(&AFTER)).unwrap();
        near(found.low, LOW, 0.03);
        near(found.high, HIGH, 0.03);
    }

    const BEFORE: [f64; 10] = [0.3, 1.1, 0.7, 0.9, 1.6, 0.2, 0.8, 2.1, 0.5, 1.3];
    const AFTER: [f64; 10] = [0.6, 1.0, 1.1, 1.2, 1.5, 0.7, 0.9, 2.6, 0.4, 1.5];
    const VALUE: f64 = 0.2;
    const P: f64 = 0.042_968_75;
    const LOW: f64 = 0.06;
    const HIGH: f64 = 0.34;

    #[test]
    fn rows_that_weigh_nothing_to_speak_of_decide_nothing() {
        let weighted = |rows: [f64; 3]| {
            Figure::per_token(
                Measure::TaskLoss,
                rows.into_iter().zip([1_000_000_000, 1_000_000_000, 1]),
            )
        };
        let found = compare(&weighted([1.0, 2.0, 900.0]), &weighted([1.5, 2.5, 0.0])).unwrap();
        near(found.value, 0.5, 1e-6);
        // The first two signs decide, and half of their four ways are as far from zero.
        near(found.p, 0.5, 0.02);
    }

    #[test]
    fn perplexities_are_compared_as_perplexities() {
        let figure = |rows: &[f64]| Figure {
            measure: Measure::Perplexity,
            ..means(rows)
        };
        let found = compare(&figure(&[0.0, 2.0]), &figure(&[1.0, 3.0])).unwrap();
        near(found.value, 2f64.exp() - 1f64.exp(), 1e-12);
        // Of the four ways to exchange, two have equal means on both sides.
        near(found.p, 0.5, 0.02);
    }

    #[test]
    fn equal_figures_do_not_differ() {
        let found = compare(&means(&AFTER), &means(&AFTER)).unwrap();
        let numbers = (found.value, found.low, found.high, found.p);
        assert_eq!(numbers, (0.0, 0.0, 0.0, 1.0));
        let one = compare(&means(&[1.0]), &means(&[3.0])).unwrap();
        assert_eq!(
            (one.value, one.low, one.high, one.p, one.n),
            (2.0, 2.0, 2.0, 1.0, 1)
        );
    }

    // 400 pairs of samples that do not differ: 20 of them should be below 0.05, give or take 4.4.
    #[test]
    fn p_is_as_seldom_small_as_it_says() {
        let mut generator = ChaCha8Rng::seed_from_u64(3);
        let mut sample = || -> Vec<f64> {
            let normal: rand_distr::Iter<_, _, f64> = StandardNormal.sample_iter(&mut generator);
            normal.take(20).collect()
        };
        let small = (0..400)
            .filter(|_| compare(&means(&sample()), &means(&sample())).unwrap().p <= 0.05)
            .count();
        assert!((8..=33).contains(&small), "{small} of 400");
    }

    #[test]
    fn what_is_not_of_the_same_rows_is_refused() {
        assert_eq!(
            compare(&means(&[1.0]), &means(&[1.0, 2.0])),
            Err(CompareError::Rows {
                measure: Measure::HarmfulLoss,
                before: 1,
                after: 2
            })
        );
        assert!(matches!(
            compare(&shares(1, 1, 1, 1).0, &means(&[1.0; 4])),
            Err(CompareError::Measures { .. })
        ));
        assert!(matches!(
            compare(&means(&[f64::NAN]), &means(&[1.0])),
            Err(CompareError::Figure { .. })
        ));
        assert!(matches!(
            compare(&means(&[]), &means(&[])),
            Err(CompareError::Figure {
                source: FigureError::NoRows,
                ..
            })
        ));
        assert!(matches!(
            compare(&means(&[-f64::MAX]), &means(&[f64::MAX])),
            Err(CompareError::Overflow { .. })
        ));
    }
}
