//! Measured numbers as people read them.

/// `value` in four significant digits; with its power of ten where it is far from 1.
pub fn four_digits(value: f64) -> String {
    let size = value.abs();
    if value == 0.0 {
        return "0".to_owned();
    }
    if !value.is_finite() {
        return value.to_string();
    }
    if !(1e-4..1e6).contains(&size) {
        return format!("{value:.3e}");
    }
    #[expect(clippy::cast_possible_truncation, reason = "between -4 and 6")]
    let digits_before = size.log10().floor() as i32 + 1;
    let digits_after = usize::try_from(4 - digits_before).unwrap_or(0);
    format!("{value:.digits_after$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_keep_four_digits_at_any_size() {
        for (value, text) in [
            (0.0, "0"),
            (-0.0, "0"),
            (1.0, "1.000"),
            (-0.012_345_6, "-0.01235"),
            (123.456, "123.5"),
            (123_456.7, "123457"),
            (1e-7, "1.000e-7"),
            (2.5e9, "2.500e9"),
            (f64::NAN, "NaN"),
            (f64::NEG_INFINITY, "-inf"),
        ] {
            assert_eq!(four_digits(value), text);
        }
    }
}
