//! A file of rows, read once: its digest, and its rows as typed values.
//!
//! In: the path of a JSON array or of JSON lines, with an optional filter (`advbench.jsonl#split=harmful`). Out: a [`Dataset`] of
//! [`Example`](super::Example)s, [`Request`](super::Request)s or [`Refusal`](super::Refusal)s, each of which knows where it stood.
//! A file is taken whole or not at all: one row that is not understood refuses it, since a data set that silently lost rows
//! would optimize something else than the user asked for. Only bare strings between the rows of an array are passed over, and
//! counted: result files of the reference code end with one.
//!
//! The file is held in memory while it is read, once as bytes and once as rows.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use panacea_formats::Sha256;
use serde::de::{Deserializer as _, SeqAccess, Visitor};
use serde_json::{Map, Value};
use thiserror::Error;

use super::rows::{Row, RowProblem};

/// The rows of one file, or of a built-in set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dataset<R> {
    /// Where the rows come from.
    pub source: Source,
    /// The digest of the whole file, whatever a filter selects from it.
    pub sha256: Sha256,
    /// At least one row.
    pub rows: Vec<R>,
    /// How many bare strings stood between the rows.
    pub skipped: usize,
}

/// Where a data set comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// Compiled in, under this name.
    BuiltIn(&'static str),
    /// A file of the user's.
    File(DataPath),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BuiltIn(name) => write!(f, "built-in {name}"),
            Self::File(path) => path.fmt(f),
        }
    }
}

/// A path and the rows that are wanted from it: `PATH` or `PATH#FIELD=VALUE`, with further `&FIELD=VALUE`.
///
/// A row is selected when every named field is there and reads as the value: a string as itself, anything else as its JSON
/// (`is_safe=false`). What follows the last `#` is a filter only if it holds a `=`, so `notes#2.jsonl` is a plain path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataPath {
    path: PathBuf,
    filters: Vec<Filter>,
}

/// A field and the value it must have.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Filter {
    field: String,
    value: String,
}

impl DataPath {
    /// The file, without the filter.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl FromStr for DataPath {
    type Err = DataPathError;

    fn from_str(text: &str) -> Result<Self, DataPathError> {
        let (path, filters) = match text.rsplit_once('#') {
            Some((path, filter)) if filter.contains('=') => (path, filter),
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
            filters,
        })
    }
}

impl From<&Path> for DataPath {
    /// The whole file, whatever its name holds.
    fn from(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            filters: Vec::new(),
        }
    }
}

impl fmt::Display for DataPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.path.display())?;
        for (filter, mark) in self
            .filters
            .iter()
            .zip("#".chars().chain("&".chars().cycle()))
        {
            write!(f, "{mark}{filter}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.field, self.value)
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

impl<R: Row> Dataset<R> {
    /// Reads the rows that `path` selects.
    ///
    /// # Errors
    /// [`DataError`], with the file and, for a row, its line or its index in the array.
    pub fn open(path: &DataPath) -> Result<Self, DataError> {
        let fail = |kind| DataError {
            path: path.path.clone(),
            kind,
        };
        let bytes = fs::read(&path.path).map_err(|error| fail(DataErrorKind::Io(error)))?;
        Self::from_bytes(&bytes, Source::File(path.clone())).map_err(fail)
    }

    /// Reads the rows of `bytes`, all of them or those that the path of `source` selects.
    pub(super) fn from_bytes(bytes: &[u8], source: Source) -> Result<Self, DataErrorKind> {
        let filters = match &source {
            Source::File(path) => &path.filters[..],
            Source::BuiltIn(_) => &[],
        };
        let mut parsed = Parsed::default();
        parsed.read(bytes)?;
        let (total, skipped) = (parsed.records.len(), parsed.skipped);
        let mut problems = parsed.problems;
        if total == 0 && problems.total == 0 {
            return Err(DataErrorKind::NoRows { skipped });
        }
        let mut rows = Vec::new();
        for record in parsed
            .records
            .iter()
            .filter(|record| selected(&record.fields, filters))
        {
            match R::from_record(record) {
                Ok(row) => rows.push(row),
                Err(kind) => problems.push(RowError {
                    place: record.place,
                    kind,
                }),
            }
        }
        if problems.total > 0 {
            return Err(DataErrorKind::Rows(problems));
        }
        if rows.is_empty() {
            return Err(DataErrorKind::NothingSelected {
                filter: filters
                    .iter()
                    .map(Filter::to_string)
                    .collect::<Vec<_>>()
                    .join("&"),
                total,
                present: filters.first().map_or_else(String::new, |filter| {
                    values_of(&filter.field, &parsed.records)
                }),
            });
        }
        Ok(Self {
            source,
            sha256: Sha256::of(bytes),
            rows,
            skipped,
        })
    }
}

/// A JSON object and where it stood.
#[derive(Clone, Debug)]
pub struct Record {
    pub(super) place: Place,
    pub(super) fields: Map<String, Value>,
}

/// Where a row stands in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Place {
    /// The line on which it begins, counted from 1.
    Line(usize),
    /// Its index in the array, counted from 0; bare strings count too.
    Index(usize),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Line(line) => write!(f, "line {line}"),
            Self::Index(index) => write!(f, "index {index} of the array"),
        }
    }
}

/// Why a data set is not taken.
#[derive(Debug, Error)]
#[error("cannot read the data set `{}`", path.display())]
pub struct DataError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    #[source]
    pub kind: DataErrorKind,
}

/// What is wrong with a data set.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DataErrorKind {
    /// The file cannot be opened or read.
    #[error("the file cannot be read")]
    Io(#[source] io::Error),
    /// Another format, recognized by its first bytes.
    #[error("this is {0}, where a JSON array or JSON lines are read")]
    OtherFormat(&'static str),
    /// Not JSON; the source says where.
    #[error("malformed JSON")]
    Malformed(#[source] serde_json::Error),
    /// No row at all.
    #[error("there is no row in it ({skipped} bare strings passed over)")]
    NoRows {
        /// How many bare strings were found instead.
        skipped: usize,
    },
    /// The filter leaves nothing.
    #[error("none of its {total} rows has `{filter}`; the first of these fields holds {present}")]
    NothingSelected {
        /// The filter, as it was given.
        filter: String,
        /// How many rows there are without it.
        total: usize,
        /// The values that the field of the filter does have, the first few.
        present: String,
    },
    /// Rows that do not say what they must.
    #[error("{0}")]
    Rows(Problems),
}

/// The first few rows with a problem, and how many there are in all.
#[derive(Debug, Default)]
pub struct Problems {
    /// The first [`LISTED`](Self::LISTED) of them, in the file's order.
    pub listed: Vec<RowError>,
    /// How many rows have a problem.
    pub total: usize,
}

impl Problems {
    /// How many are listed: enough to see whether it is one row or a wrong schema.
    pub const LISTED: usize = 4;

    pub(super) fn push(&mut self, problem: RowError) {
        self.total += 1;
        if self.listed.len() < Self::LISTED {
            self.listed.push(problem);
        }
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, problem) in self.listed.iter().enumerate() {
            write!(f, "{}{problem}", if i == 0 { "" } else { "; " })?;
        }
        match self.total - self.listed.len() {
            0 => Ok(()),
            more => write!(f, "; and {more} more rows"),
        }
    }
}

/// A row that does not say what it must.
#[derive(Debug, Error)]
#[error("{place}: {kind}")]
pub struct RowError {
    /// Where the row stands.
    pub place: Place,
    /// What is wrong with it.
    pub kind: RowProblem,
}

/// What a file holds, before any row is understood.
#[derive(Default)]
struct Parsed {
    records: Vec<Record>,
    skipped: usize,
    /// What is neither an object nor a bare string.
    problems: Problems,
}

impl Parsed {
    /// Reads an array if the first character is `[`, else one value after another.
    fn read(&mut self, bytes: &[u8]) -> Result<(), DataErrorKind> {
        if let Some((_, format)) = OTHER_FORMATS
            .iter()
            .find(|(magic, _)| bytes.starts_with(magic))
        {
            return Err(DataErrorKind::OtherFormat(format));
        }
        // Some editors begin a file with a byte-order mark, which JSON does not know.
        let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
        let first = bytes.iter().find(|byte| !byte.is_ascii_whitespace());
        if first == Some(&b'[') {
            let mut json = serde_json::Deserializer::from_slice(bytes);
            json.deserialize_seq(Items(self))
                .and_then(|()| json.end())
                .map_err(DataErrorKind::Malformed)
        } else {
            self.read_lines(bytes)
        }
    }

    fn read_lines(&mut self, bytes: &[u8]) -> Result<(), DataErrorKind> {
        let (mut line, mut counted) = (1, 0);
        let mut values = serde_json::Deserializer::from_slice(bytes).into_iter::<Value>();
        loop {
            let before = values.byte_offset();
            let Some(value) = values.next() else {
                return Ok(());
            };
            let value = value.map_err(DataErrorKind::Malformed)?;
            // The value begins after the white space that follows the one before it.
            let blank = bytes[before..]
                .iter()
                .take_while(|byte| byte.is_ascii_whitespace())
                .count();
            let start = before + blank;
            line += bytes[counted..start]
                .iter()
                .filter(|&&byte| byte == b'\n')
                .count();
            counted = start;
            self.push(value, Place::Line(line));
        }
    }

    fn push(&mut self, value: Value, place: Place) {
        match value {
            Value::Object(fields) => self.records.push(Record { place, fields }),
            Value::String(_) => self.skipped += 1,
            other => self.problems.push(RowError {
                place,
                kind: RowProblem::NotAnObject(kind_of(&other)),
            }),
        }
    }
}

/// The items of an array, one at a time, so that the array itself is never held beside them.
struct Items<'a>(&'a mut Parsed);

impl<'de> Visitor<'de> for Items<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of rows")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        let mut index = 0;
        while let Some(value) = items.next_element::<Value>()? {
            self.0.push(value, Place::Index(index));
            index += 1;
        }
        Ok(())
    }
}

/// Formats in which the same data sets are found, by their first bytes.
const OTHER_FORMATS: [(&[u8], &str); 5] = [
    (b"\x1f\x8b", "gzip"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"PK\x03\x04", "a zip archive"),
    (b"PAR1", "Parquet"),
];

/// What a JSON value is, with its article.
pub(super) fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// Whether every filter finds its field in the row, with its value.
fn selected(row: &Map<String, Value>, filters: &[Filter]) -> bool {
    filters.iter().all(|filter| {
        row.get(&filter.field)
            .is_some_and(|value| as_filter_value(value) == filter.value)
    })
}

/// How a value is written in a filter.
fn as_filter_value(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// The different values of `field`, in order of appearance, the first few.
fn values_of(field: &str, records: &[Record]) -> String {
    const SHOWN: usize = 6;
    let mut values: Vec<String> = Vec::new();
    for value in records.iter().filter_map(|record| record.fields.get(field)) {
        let text = as_filter_value(value);
        if text.chars().count() <= 40 && !values.contains(&text) {
            values.push(text);
        }
        if values.len() == SHOWN {
            break;
        }
    }
    if values.is_empty() {
        "nothing".to_owned()
    } else {
        values
            .iter()
            .map(|value| format!("`{value}`"))
            .collect::<Vec<_>>()
            .join(", ")
    }
}
