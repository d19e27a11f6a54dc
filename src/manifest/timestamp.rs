//! The one time that a manifest may tell.
//!
//! In: `SOURCE_DATE_EPOCH`, or a manifest's own spelling of a time. Out: RFC 3339 in UTC, to the second. The clock is never asked, so
//! that the same run gives the same bytes.

use std::fmt;
use std::str::FromStr;

use panacea_formats::shown;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A second in UTC, from 1970 to the end of the year 9999.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Timestamp {
    /// Since 1970-01-01T00:00:00Z, leap seconds left out.
    seconds: u64,
}

impl Timestamp {
    /// Reads the value of the environment variable `SOURCE_DATE_EPOCH`: seconds since 1970 in ASCII digits.
    ///
    /// Source: <https://reproducible-builds.org/specs/source-date-epoch/>.
    ///
    /// # Errors
    /// [`TimestampError`] when `text` is anything else, or lies after the year 9999, which RFC 3339 cannot write.
    pub fn from_source_date_epoch(text: &str) -> Result<Self, TimestampError> {
        let refused = || TimestampError {
            found: text.to_owned(),
            expected: "seconds since 1970, up to the year 9999",
        };
        if !text.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(refused());
        }
        match text.parse() {
            Ok(seconds) if seconds < END_OF_9999 => Ok(Self { seconds }),
            _ => Err(refused()),
        }
    }
}

impl fmt::Display for Timestamp {
    /// RFC 3339 in UTC, to the second: `2025-01-31T18:00:00Z`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (mut day, second) = (self.seconds / DAY, self.seconds % DAY);
        let mut year = 1970;
        while day >= days_in_year(year) {
            day -= days_in_year(year);
            year += 1;
        }
        let mut month = 1;
        while day >= days_in_month(year, month) {
            day -= days_in_month(year, month);
            month += 1;
        }
        let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
        let day = day + 1;
        write!(
            f,
            "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z"
        )
    }
}

impl FromStr for Timestamp {
    type Err = TimestampError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refused = || TimestampError {
            found: text.to_owned(),
            expected: "a time in UTC like `2025-01-31T18:00:00Z`",
        };
        let number = |from: usize, to: usize| -> Option<u64> {
            let digits = text.get(from..to)?;
            let all_digits = digits.bytes().all(|byte| byte.is_ascii_digit());
            all_digits.then(|| digits.parse().ok())?
        };
        let parts = || {
            let date = (number(0, 4)?, number(5, 7)?, number(8, 10)?);
            let time = (number(11, 13)?, number(14, 16)?, number(17, 19)?);
            Some((date, time))
        };
        let ((year, month, day), (hour, minute, second)) = parts().ok_or_else(refused)?;
        let in_range = year >= 1970 && (1..=12).contains(&month) && (1..=31).contains(&day);
        if !in_range {
            return Err(refused());
        }
        let days = (1970..year).map(days_in_year).sum::<u64>()
            + (1..month)
                .map(|month| days_in_month(year, month))
                .sum::<u64>()
            + (day - 1);
        let timestamp = Self {
            seconds: days * DAY + hour * 3600 + minute * 60 + second,
        };
        // Everything else that could be wrong (separators, the 30th of February, 25 o'clock) shows here.
        if timestamp.to_string() != text {
            return Err(refused());
        }
        Ok(timestamp)
    }
}

impl TryFrom<String> for Timestamp {
    type Error = TimestampError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Timestamp> for String {
    fn from(timestamp: Timestamp) -> Self {
        timestamp.to_string()
    }
}

/// A text that is no time.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("expected {expected}, found `{}`", shown(found))]
pub struct TimestampError {
    found: String,
    expected: &'static str,
}

fn days_in_year(year: u64) -> u64 {
    if is_leap(year) { 366 } else { 365 }
}

fn days_in_month(year: u64, month: u64) -> u64 {
    match month {
        2 if is_leap(year) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

fn is_leap(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

/// Seconds of a day.
const DAY: u64 = 86_400;

/// 10000-01-01T00:00:00Z.
const END_OF_9999: u64 = 253_402_300_800;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_dates_as_the_calendar_has_them() {
        // From `date -u -d @N +%FT%TZ`.
        for (seconds, text) in [
            ("0", "1970-01-01T00:00:00Z"),
            ("951782399", "2000-02-28T23:59:59Z"),
            ("951782400", "2000-02-29T00:00:00Z"),
            ("1735689599", "2024-12-31T23:59:59Z"),
            ("4107542400", "2100-03-01T00:00:00Z"),
            ("253402300799", "9999-12-31T23:59:59Z"),
        ] {
            let time = Timestamp::from_source_date_epoch(seconds).unwrap();
            assert_eq!(time.to_string(), text);
            assert_eq!(text.parse::<Timestamp>().unwrap(), time);
        }
        for bad in [
            "",
            "-1",
            "+1",
            "1.5",
            " 1",
            "253402300800",
            "99999999999999999999",
        ] {
            assert!(Timestamp::from_source_date_epoch(bad).is_err(), "{bad:?}");
        }
        for bad in [
            "2025-02-29T00:00:00Z",
            "2025-01-01T24:00:00Z",
            "2025-01-01 00:00:00Z",
            "2025-01-01T00:00:00+00:00",
            "1969-12-31T23:59:59Z",
            "2025-00-01T00:00:00Z",
            "2025-01-00T00:00:00Z",
            "2025-é1-01T00:00:00Z",
            "",
        ] {
            assert!(bad.parse::<Timestamp>().is_err(), "{bad:?}");
        }
    }
}
