//! Reads gates as people write them, and says what was likely meant where it cannot.

use std::str::FromStr;

use thiserror::Error;

use super::{Bound, End, Gate, Operator};
use crate::eval::figure::{Measure, Unit, UnknownMeasure};

impl FromStr for Gate {
    type Err = GateParseError;

    /// `MEASURE[.low|.high] <=|>=|<|> [+|-]NUMBER[%]`, with blanks between the parts or without.
    fn from_str(text: &str) -> Result<Self, GateParseError> {
        let cut = |text: &str| text.chars().take(SHOWN_CHARACTERS).collect::<String>();
        let is_operator = |c: char| "<>=!~\u{2264}\u{2265}\u{2260}".contains(c);
        let Some(start) = text.find(is_operator) else {
            return Err(GateParseError::NoOperator { text: cut(text) });
        };
        let (left, rest) = text.split_at(start);
        let length = rest.find(|c| !is_operator(c)).unwrap_or(rest.len());
        let (symbol, bound) = rest.split_at(length);

        let left = left.trim();
        if left.is_empty() {
            return Err(GateParseError::NoMeasure { text: cut(text) });
        }
        let (name, end) = match left.split_once('.') {
            None => (left, End::Value),
            Some((name, "low")) => (name, End::Low),
            Some((name, "high")) => (name, End::High),
            Some((_, other)) => return Err(GateParseError::End { found: cut(other) }),
        };
        let measure: Measure = name.parse()?;
        let operator = OPERATORS
            .into_iter()
            .find(|operator| operator.symbol() == symbol);
        let operator = operator.ok_or_else(|| GateParseError::Operator {
            found: cut(symbol),
            meant: meant(symbol),
        })?;

        let bound = bound.trim();
        if bound.is_empty() {
            return Err(GateParseError::NoBound { text: cut(text) });
        }
        let written = format!("{left}{symbol}");
        let (bound, number) = read_bound(measure, bound)?;
        Ok(Self {
            measure,
            end,
            operator,
            bound,
            text: written + &number,
        })
    }
}

impl TryFrom<String> for Gate {
    type Error = GateParseError;

    fn try_from(text: String) -> Result<Self, GateParseError> {
        text.parse()
    }
}

/// The bound, and its text without blanks.
fn read_bound(measure: Measure, text: &str) -> Result<(Bound, String), GateParseError> {
    let wrong = || GateParseError::Bound {
        found: text.chars().take(SHOWN_CHARACTERS).collect(),
    };
    let (digits, percent) = match text.strip_suffix('%') {
        Some(before) => (before.trim_end(), "%"),
        None => (text, ""),
    };
    let unsigned = digits.strip_prefix(['+', '-']).unwrap_or(digits);
    // `parse` would take `inf`, `nan` and a second sign.
    if !unsigned.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
        return Err(wrong());
    }
    let number: f64 = digits.parse().map_err(|_| wrong())?;
    if !number.is_finite() {
        return Err(wrong());
    }
    let is_change = unsigned.len() < digits.len();
    let in_percent = measure.unit() == Unit::Percent;
    if !percent.is_empty() && !in_percent {
        return Err(GateParseError::Percent { measure });
    }
    if is_change && measure == Measure::Kl {
        return Err(GateParseError::ChangeOfDivergence);
    }
    let fraction = number != 0.0 && number.abs() < 1.0;
    if in_percent && percent.is_empty() && fraction {
        return Err(GateParseError::Fraction {
            measure,
            found: digits.to_owned(),
        });
    }
    if in_percent && number.abs() > 100.0 {
        return Err(GateParseError::BeyondAll {
            measure,
            found: digits.to_owned(),
        });
    }
    let bound = if is_change {
        Bound::Change(number)
    } else {
        Bound::Level(number)
    };
    Ok((bound, format!("{digits}{percent}")))
}

/// The operator that `symbol`, which is none, was likely meant to be.
fn meant(symbol: &str) -> Option<Operator> {
    match symbol {
        "=<" | "\u{2264}" | "<==" => Some(Operator::AtMost),
        "=>" | "\u{2265}" | ">==" => Some(Operator::AtLeast),
        "<<" => Some(Operator::Below),
        ">>" => Some(Operator::Above),
        _ => None,
    }
}

/// Why a text is no gate.
#[derive(Clone, Debug, Error, PartialEq)]
#[non_exhaustive]
pub enum GateParseError {
    /// More than all rows.
    #[error("the bound {found} of `{measure}` is beyond 100 percent")]
    BeyondAll {
        /// What is measured.
        measure: Measure,
        /// The bound.
        found: String,
    },
    /// Not a number.
    #[error("the bound `{}` is no number", panacea_formats::shown(found))]
    Bound {
        /// What stands after the operator.
        found: String,
    },
    /// A change of what is a change already.
    #[error("`kl` is itself measured against the other checkpoint, so its bound takes no sign")]
    ChangeOfDivergence,
    /// Not an end of an interval.
    #[error("`.{}` is no end of an interval", panacea_formats::shown(found))]
    End {
        /// What stands after the point.
        found: String,
    },
    /// 0.9 may mean 90 percent to one and 0.9 percent to another, and a gate that is met by accident is worse than none.
    #[error("`{measure}` is in percent, and the bound {found} can be read in two ways")]
    Fraction {
        /// What is measured.
        measure: Measure,
        /// The bound.
        found: String,
    },
    /// A name of no measure.
    #[error(transparent)]
    Measure(#[from] UnknownMeasure),
    /// Nothing after the operator.
    #[error("`{}` has no bound", panacea_formats::shown(text))]
    NoBound {
        /// The whole gate.
        text: String,
    },
    /// Nothing before the operator.
    #[error("`{}` names no measure", panacea_formats::shown(text))]
    NoMeasure {
        /// The whole gate.
        text: String,
    },
    /// No operator: a shell may have eaten it.
    #[error(
        "`{}` has none of `<=`, `>=`, `<` and `>`",
        panacea_formats::shown(text)
    )]
    NoOperator {
        /// The whole gate.
        text: String,
    },
    /// Not an operator.
    #[error(
        "`{}` is none of `<=`, `>=`, `<` and `>`",
        panacea_formats::shown(found)
    )]
    Operator {
        /// What stands in its place.
        found: String,
        /// What was likely meant.
        meant: Option<Operator>,
    },
    /// A percent sign where values are not in percent.
    #[error("`{measure}` is in {}, and its bound in percent", measure.unit())]
    Percent {
        /// What is measured.
        measure: Measure,
    },
}

impl GateParseError {
    /// What to write instead, if it can be said.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Bound { found } if found.contains(['<', '>']) => {
                Some("give one gate at a time".to_owned())
            }
            Self::Bound { found } if found.contains(',') => {
                Some("write a point, not a comma, before decimals".to_owned())
            }
            Self::ChangeOfDivergence => Some("leave out the sign, as in `kl<=0.05`".to_owned()),
            Self::End { .. } => {
                Some("write `.low` or `.high`, or nothing for the estimate".to_owned())
            }
            Self::Fraction { found, .. } => {
                let number: f64 = found.parse().ok()?;
                let sign = if found.starts_with('+') { "+" } else { "" };
                // Ten digits are more than anyone writes, and hide that 100 * 0.07 is not quite 7.
                let hundredfold = format!("{:.10}", 100.0 * number);
                let hundredfold = hundredfold.trim_end_matches('0').trim_end_matches('.');
                Some(format!(
                    "write `{sign}{hundredfold}%` or `{found}%`, whichever is meant"
                ))
            }
            Self::Measure(unknown) => {
                let nearest = unknown.nearest?;
                Some(format!("did you mean `{nearest}`?"))
            }
            Self::NoOperator { .. } => Some(
                "write it in quotes, as in 'hs<=5': outside them a shell takes < and > for itself"
                    .to_owned(),
            ),
            Self::NoBound { .. } | Self::NoMeasure { .. } => {
                Some("write it as in `hs<=5` or `fa>=-1%`".to_owned())
            }
            Self::Operator {
                meant: Some(meant), ..
            } => Some(format!("did you mean `{}`?", meant.symbol())),
            Self::Operator { .. } => Some(
                "figures have errors, so gates know no equality: write `<=` or `>=`".to_owned(),
            ),
            Self::Percent { measure } => Some(format!(
                "leave out the percent sign: `{measure}` is in {}",
                measure.unit()
            )),
            Self::BeyondAll { .. } | Self::Bound { .. } => None,
        }
    }
}

/// All of them.
const OPERATORS: [Operator; 4] = [
    Operator::AtMost,
    Operator::AtLeast,
    Operator::Below,
    Operator::Above,
];

/// More of a text that is no gate would tell a reader nothing.
const SHOWN_CHARACTERS: usize = 64;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn refused(text: &str) -> (GateParseError, String) {
        let error = text.parse::<Gate>().expect_err(text);
        let hint = error.hint().unwrap_or_default();
        (error, hint)
    }

    #[test]
    fn a_gate_is_its_parts() {
        let gate: Gate = "hs.high<=12".parse().unwrap();
        let parts = (gate.measure(), gate.end(), gate.operator(), gate.bound());
        let wanted = (Measure::Hs, End::High, Operator::AtMost, Bound::Level(12.0));
        assert_eq!(parts, wanted);
        let bound = |text: &str| text.parse::<Gate>().expect(text).bound();
        assert_eq!(bound("fa>=-1%"), Bound::Change(-1.0));
        assert_eq!(bound("over_refusal<=+5"), Bound::Change(5.0));
        assert_eq!(bound("kl<=0.05"), Bound::Level(0.05));
        assert_eq!(bound("kl<=5e-2"), Bound::Level(0.05));
        assert_eq!(bound("harmful_loss>=1"), Bound::Level(1.0));
        assert_eq!(bound("fa>=-0"), Bound::Change(-0.0));
        assert_eq!(bound("hs<0.5%"), Bound::Level(0.5));
    }

    #[test]
    fn blanks_do_not_matter_and_are_not_kept() {
        let gate: Gate = "  hs <= 5.0 % ".parse().unwrap();
        assert_eq!(gate.to_string(), "hs<=5.0%");
        assert_eq!(gate.to_string().parse(), Ok(gate));
    }

    #[test]
    fn slips_are_refused_with_what_was_meant() {
        for (text, hint) in [
            ("hs", "write it in quotes"),
            ("", "write it in quotes"),
            ("hs=<5", "did you mean `<=`?"),
            ("fa=>90", "did you mean `>=`?"),
            ("hs\u{2264}5", "did you mean `<=`?"),
            ("hs==0", "gates know no equality"),
            ("hs=0", "gates know no equality"),
            ("hs!=0", "gates know no equality"),
            ("hs< =5", ""),
            ("HS<=5", "did you mean `hs`?"),
            ("hs+<=5", "did you mean `hs_plus`?"),
            ("overrefusal<=5", "did you mean `over_refusal`?"),
            ("bleu>=5", ""),
            ("<=5", "as in `hs<=5`"),
            ("hs<=", "as in `hs<=5`"),
            ("hs<=five", ""),
            ("hs<=nan", ""),
            ("hs<=inf", ""),
            ("hs<=1e999", ""),
            ("hs<=+-5", ""),
            ("hs<=- 5", ""),
            ("hs<=5%%", ""),
            ("kl<=0,05", "write a point"),
            ("hs<=5,fa>=-1%", "one gate at a time"),
            ("kl<=5%", "leave out the percent sign"),
            ("perplexity<=+5%", "leave out the percent sign"),
            ("kl<=+0.01", "leave out the sign"),
            ("fa>=0.9", "write `90%` or `0.9%`"),
            ("fa>=-.07", "write `-7%` or `-.07%`"),
            ("fa>=+0.01", "write `+1%` or `+0.01%`"),
            ("hs<=101", ""),
            ("hs.upper<=5", "`.low` or `.high`"),
            ("hs.high.low<=5", "`.low` or `.high`"),
        ] {
            let (error, found) = refused(text);
            assert!(found.contains(hint), "{text}: {error}: {found}");
            assert_eq!(
                hint.is_empty(),
                found.is_empty(),
                "{text}: {error}: {found}"
            );
        }
    }

    #[test]
    fn a_refusal_says_what_was_found() {
        assert_eq!(
            refused("hs=<5").0.to_string(),
            "`=<` is none of `<=`, `>=`, `<` and `>`"
        );
        assert_eq!(
            refused("kl<=5%").0.to_string(),
            "`kl` is in nats per token, and its bound in percent"
        );
        assert_eq!(
            refused(&"x".repeat(1000)).0,
            GateParseError::NoOperator {
                text: "x".repeat(64)
            }
        );
    }

    proptest! {
        #[test]
        fn every_gate_is_read_back_from_what_it_says(
            measure in proptest::sample::select(&Measure::ALL[..]),
            end in "(\\.low|\\.high)?",
            operator in "[<>]=?",
            sign in "[+-]?",
            digits in "([1-9]|[1-9][0-9])(\\.[0-9]{1,5})?|0|100",
            percent in "%?",
            blank in " {0,2}",
        ) {
            let sign = if measure == Measure::Kl { "" } else { &sign };
            let percent = if measure.is_share() { &percent } else { "" };
            let text = format!("{measure}{end}{operator}{sign}{digits}{percent}");
            let gate: Gate = text.parse().unwrap();
            prop_assert_eq!(&gate.to_string(), &text);
            let json = serde_json::to_string(&gate).unwrap();
            prop_assert_eq!(&serde_json::from_str::<Gate>(&json).unwrap(), &gate);
            let spaced = format!("{blank}{measure}{end}{blank}{operator}{blank}{sign}{digits}{blank}{percent}{blank}");
            prop_assert_eq!(&spaced.parse::<Gate>().unwrap(), &gate);
            let number: f64 = format!("{sign}{digits}").parse().unwrap();
            let bound = if sign.is_empty() { Bound::Level(number) } else { Bound::Change(number) };
            prop_assert_eq!(gate.bound(), bound);
        }

        #[test]
        fn no_text_is_too_strange_to_be_refused(text in "[hs.<>=%+0-9eE,\u{2264} ]{0,12}|\\PC{0,40}") {
            if let Err(error) = text.parse::<Gate>() {
                prop_assert!(!error.to_string().is_empty());
                let _ = error.hint();
            }
        }
    }
}
