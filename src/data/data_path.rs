//! How a user names a data set: a file, and which of its rows.
//!
//! Public benchmarks keep several sets in one file and tell them apart by a field. In: `PATH` or `PATH#FIELD=VALUE&FIELD=VALUE`. Out:
//! the path, and a filter over rows.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde_json::{Map, Value};
use thiserror::Error;

/// A path and the rows that are wanted from it: `PATH` or `PATH#FIELD=VALUE`, with further `&FIELD=VALUE`.
///
/// A row is selected when every named field is there and reads as the value: a string as itself, anything else as its JSON
/// (`is_safe=false`). What follows the last `#` is a filter only if it holds a `=`, so `notes#2.jsonl` is a plain path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataPath {
    path: PathBuf,
    filters: Filters,
}

impl DataPath {
    /// The file, without the filter.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn filters(&self) -> &Filters {
        &self.filters
    }
}

impl FromStr for DataPath {
    type Err = DataPathError;

    fn from_str(text: &str) -> Result<Self, DataPathError> {
        let (path, filters) = match text.rsplit_once('#') {
            Some((path, filters)) if filters.contains('=') => (path, filters),
            _ => (text, ""),
        };
        if path.is_empty() {
            return Err(DataPathError::NoPath);
        }
        let filters = filters
            .split('&')
            .filter(|filter| !filter.is_empty())
            .map(|filter| match filter.split_once('=') {
                Some((field, value)) if !field.is_empty() => Ok(Filter {
                    field: field.to_owned(),
                    value: value.to_owned(),
                }),
                _ => Err(DataPathError::NotAFilter(filter.to_owned())),
            })
            .collect::<Result<_, _>>()?;
        Ok(Self {
            path: PathBuf::from(path),
            filters: Filters(filters),
        })
    }
}

impl From<&Path> for DataPath {
    /// The whole file, whatever its name holds.
    fn from(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            filters: Filters::default(),
        }
    }
}

impl fmt::Display for DataPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mark = if self.filters.0.is_empty() { "" } else { "#" };
        write!(f, "{}{mark}{}", self.path.display(), self.filters)
    }
}

/// What is wrong with the spelling of a [`DataPath`].
#[derive(Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum DataPathError {
    /// Nothing before the `#`, or nothing at all.
    #[error("there is no path")]
    NoPath,
    /// A part of the filter is not `FIELD=VALUE`.
    #[error("`{0}` is not a filter of the form FIELD=VALUE")]
    NotAFilter(String),
}

/// All of which a row must pass; none is passed by every row.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Filters(Vec<Filter>);

/// A field and the value it must have.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Filter {
    field: String,
    value: String,
}

impl Filters {
    pub(super) fn select(&self, row: &Map<String, Value>) -> bool {
        self.0.iter().all(|filter| {
            row.get(&filter.field)
                .is_some_and(|value| as_written(value) == filter.value)
        })
    }

    /// The first filter's value in each of `rows` that has its field.
    pub(super) fn first_values<'a>(
        &self,
        rows: impl Iterator<Item = &'a Map<String, Value>>,
    ) -> impl Iterator<Item = String> {
        let field = self.0.first().map(|filter| filter.field.as_str());
        rows.filter_map(move |row| row.get(field?)).map(as_written)
    }
}

impl fmt::Display for Filters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, Filter { field, value }) in self.0.iter().enumerate() {
            write!(f, "{}{field}={value}", if i == 0 { "" } else { "&" })?;
        }
        Ok(())
    }
}

/// How a value is written in a filter.
fn as_written(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_filter_after_the_last_hash_is_one() {
        for plain in ["a.jsonl", "dir/a#2.jsonl", "a=b.jsonl"] {
            let path: DataPath = plain.parse().unwrap();
            assert_eq!(path.path(), Path::new(plain));
            assert_eq!(path.to_string(), plain);
        }
        let path: DataPath = "a#2.jsonl#split=x&type=a=b".parse().unwrap();
        assert_eq!(path.path(), Path::new("a#2.jsonl"));
        assert_eq!(path.to_string(), "a#2.jsonl#split=x&type=a=b");
    }

    #[test]
    fn what_is_no_path_or_no_filter_is_refused() {
        assert_eq!("#a=b".parse::<DataPath>(), Err(DataPathError::NoPath));
        assert_eq!("".parse::<DataPath>(), Err(DataPathError::NoPath));
        let not_a_filter = |text: &str| Err(DataPathError::NotAFilter(text.to_owned()));
        assert_eq!("x#a=1&b".parse::<DataPath>(), not_a_filter("b"));
        assert_eq!("x#=1".parse::<DataPath>(), not_a_filter("=1"));
    }
}
