//! Numbers as the page shows them: few digits, a real minus sign, and a dash for what is no number.

use crate::number::four_digits;

/// A measured number in four significant digits.
pub(super) fn number(value: f64) -> String {
    match value.is_finite() {
        true => signed(&four_digits(value)),
        false => "–".to_owned(),
    }
}

/// Decimal places that a column of numbers shares, so that its digits stand below one another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Digits {
    /// So many after the point.
    After(usize),
    /// Each number has its own power of ten.
    Scientific,
}

impl Digits {
    /// Enough for four significant digits of the largest of `values`, but no more than four after the point where that is three of them.
    pub(super) fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let sizes = values
            .into_iter()
            .map(f64::abs)
            .filter(|size| size.is_finite());
        let largest = sizes.fold(0.0, f64::max);
        if largest == 0.0 {
            return Self::After(0);
        }
        if !(1e-4..1e6).contains(&largest) {
            return Self::Scientific;
        }
        #[expect(clippy::cast_possible_truncation, reason = "between -4 and 6")]
        let digits_before = largest.log10().floor() as i32 + 1;
        let digits_after = (4 - digits_before).clamp(0, 4.max(3 - digits_before));
        Self::After(usize::try_from(digits_after).unwrap_or(0))
    }

    pub(super) fn show(self, value: f64) -> String {
        match self {
            Self::After(digits) if value.is_finite() => {
                let text = format!("{value:.digits$}");
                match text.trim_matches(['-', '0', '.']).is_empty() {
                    true => text.trim_start_matches('-').to_owned(),
                    false => signed(&text),
                }
            }
            Self::After(_) | Self::Scientific => number(value),
        }
    }
}

/// A number on an axis, where its neighbors are round, too.
pub(super) fn tick(value: f64) -> String {
    let size = value.abs();
    if size < 1e-12 {
        return "0".to_owned();
    }
    if !(1e-3..1e5).contains(&size) {
        return signed(&format!("{value:.0e}"));
    }
    let text = format!("{value:.4}");
    signed(text.trim_end_matches('0').trim_end_matches('.'))
}

/// A share from 0 to 1 in percent.
pub(super) fn percent(share: f64) -> String {
    match share.is_finite() {
        true => format!("{}%", one_digit(100.0 * share)),
        false => "–".to_owned(),
    }
}

/// A number with one digit after the point.
pub(super) fn one_digit(value: f64) -> String {
    match value.is_finite() {
        // Adding zero makes no -0.0.
        true => signed(&format!("{:.1}", (10.0 * value).round() / 10.0 + 0.0)),
        false => "–".to_owned(),
    }
}

/// A difference: its sign is always told.
pub(super) fn with_sign(text: String) -> String {
    match text.chars().next() {
        Some('−' | '–') => text,
        _ if text.trim_matches(['0', '.']).is_empty() => text,
        _ => format!("+{text}"),
    }
}

/// A p value, no more exact than anybody should take it.
pub(super) fn p_value(p: f64) -> String {
    match p {
        _ if p.is_nan() => "–".to_owned(),
        _ if p < 0.001 => "< 0.001".to_owned(),
        _ if p < 0.1 => format!("{p:.3}"),
        _ => format!("{p:.2}"),
    }
}

/// A count, its digits in groups of three.
pub(super) fn count(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::new();
    for (place, digit) in digits.char_indices() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push('\u{202F}'); // a narrow space where no line may end
        }
        text.push(digit);
    }
    text
}

/// `text` with a minus sign as wide as the plus.
fn signed(text: &str) -> String {
    text.replace('-', "−")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_keep_four_digits_and_a_real_minus() {
        for (value, text) in [
            (0.0, "0"),
            (-0.0, "0"),
            (1.0, "1.000"),
            (-0.012_345_6, "−0.01235"),
            (123_456.7, "123457"),
            (1e-7, "1.000e−7"),
            (f64::NAN, "–"),
            (f64::NEG_INFINITY, "–"),
        ] {
            assert_eq!(number(value), text);
        }
    }

    #[test]
    fn numbers_of_a_column_share_their_places() {
        for (values, texts) in [
            (
                vec![0.0969, 0.0006, -0.00001],
                vec!["0.0969", "0.0006", "0.0000"],
            ),
            (vec![14.93, -0.72, f64::NAN], vec!["14.93", "−0.72", "–"]),
            (vec![0.2512, 1.303], vec!["0.251", "1.303"]),
            (vec![91.7, 4.2], vec!["91.70", "4.20"]),
            (vec![0.0006, 0.0005], vec!["0.000600", "0.000500"]),
            (vec![123_456.7, 2.0], vec!["123457", "2"]),
            (vec![2e-6, 0.0], vec!["2.000e−6", "0"]),
            (vec![0.0, 0.0], vec!["0", "0"]),
        ] {
            let digits = Digits::of(values.iter().copied());
            let shown: Vec<String> = values.into_iter().map(|value| digits.show(value)).collect();
            assert_eq!(shown, texts);
        }
    }

    #[test]
    fn ticks_are_as_short_as_they_can_be() {
        for (value, text) in [
            (0.0, "0"),
            (1e-17, "0"),
            (0.1 + 0.2, "0.3"),
            (-2.5, "−2.5"),
            (20_000.0, "20000"),
            (2e6, "2e6"),
            (5e-5, "5e−5"),
        ] {
            assert_eq!(tick(value), text);
        }
    }

    #[test]
    fn shares_are_percent() {
        assert_eq!(percent(0.025), "2.5%");
        assert_eq!(percent(-0.000_01), "0.0%");
        assert_eq!(percent(f64::NAN), "–");
    }

    #[test]
    fn differences_tell_their_sign_unless_there_is_none() {
        assert_eq!(with_sign(one_digit(2.5)), "+2.5");
        assert_eq!(with_sign(one_digit(-2.5)), "−2.5");
        assert_eq!(with_sign(one_digit(0.0)), "0.0");
        assert_eq!(with_sign(one_digit(f64::NAN)), "–");
    }

    #[test]
    fn p_values_have_a_floor() {
        for (p, text) in [
            (0.0, "< 0.001"),
            (0.001, "0.001"),
            (0.0456, "0.046"),
            (0.5, "0.50"),
            (f64::NAN, "–"),
        ] {
            assert_eq!(p_value(p), text);
        }
    }

    #[test]
    fn counts_come_in_groups_of_three() {
        assert_eq!(count(999), "999");
        assert_eq!(count(61_440), "61\u{202F}440");
        assert_eq!(count(1_234_567), "1\u{202F}234\u{202F}567");
    }
}
