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

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::super::rows::{Example, Request};
    use super::*;

    fn parse(text: &str, filter: &str) -> Result<Dataset<Example>, DataErrorKind> {
        let path: DataPath = format!("rows{filter}").parse().unwrap();
        Dataset::from_bytes(text.as_bytes(), Source::File(path))
    }

    fn responses(data: &Dataset<Example>) -> Vec<String> {
        data.rows
            .iter()
            .map(|row| match &row.dialogue {
                super::super::rows::Dialogue::Single { response, .. } => response.clone(),
                turns => panic!("{turns:?}"),
            })
            .collect()
    }

    fn message(result: Result<Dataset<Example>, DataErrorKind>) -> String {
        let error = result.unwrap_err();
        match std::error::Error::source(&error) {
            Some(source) => format!("{error}: {source}"),
            None => error.to_string(),
        }
    }

    const ROWS: &str = r#"{"prompt":"a","target":"1","split":"harmful"}
{"prompt":"b","target":"2","split":"eval","is_safe":false}

  {"prompt":"c","target":"3","split":"harmful","is_safe":false}"#;

    #[test]
    fn lines_and_an_array_give_the_same_rows() {
        let array = format!(
            "\u{feff} [{}]",
            ROWS.replace("\n\n", "\n").replace('\n', ",")
        );
        let (lines, array) = (parse(ROWS, "").unwrap(), parse(&array, "").unwrap());
        assert_eq!(responses(&lines), ["1", "2", "3"]);
        assert_eq!(responses(&array), responses(&lines));
        let places =
            |data: &Dataset<Example>| data.rows.iter().map(|row| row.place).collect::<Vec<_>>();
        assert_eq!(
            places(&lines),
            [Place::Line(1), Place::Line(2), Place::Line(4)]
        );
        assert_eq!(
            places(&array),
            [Place::Index(0), Place::Index(1), Place::Index(2)]
        );
    }

    #[test]
    fn an_object_over_several_lines_stands_where_it_begins() {
        let data = parse(
            "\n{\n\"prompt\": \"a\",\n\"target\": \"1\"\n}\n{\"prompt\":\"b\",\"target\":\"2\"}\n",
            "",
        )
        .unwrap();
        assert_eq!(data.rows[0].place, Place::Line(2));
        assert_eq!(data.rows[1].place, Place::Line(6));
    }

    #[test]
    fn bare_strings_are_passed_over_and_counted() {
        let data = parse(
            r#"["head", {"instruction":"a","output":"1"}, "score=93.1"]"#,
            "",
        )
        .unwrap();
        assert_eq!((data.skipped, data.rows.len()), (2, 1));
        assert_eq!(data.rows[0].place, Place::Index(1));
    }

    #[test]
    fn a_filter_selects_by_text_and_by_json() {
        assert_eq!(
            responses(&parse(ROWS, "#split=harmful").unwrap()),
            ["1", "3"]
        );
        assert_eq!(
            responses(&parse(ROWS, "#is_safe=false").unwrap()),
            ["2", "3"]
        );
        assert_eq!(
            responses(&parse(ROWS, "#split=harmful&is_safe=false").unwrap()),
            ["3"]
        );
    }

    #[test]
    fn rows_that_a_filter_leaves_out_need_no_schema() {
        let text = format!("{ROWS}\n{{\"split\":\"notes\"}}");
        assert_eq!(parse(&text, "#split=eval").unwrap().rows.len(), 1);
        assert!(parse(&text, "").is_err());
    }

    #[test]
    fn a_filter_that_selects_nothing_says_what_there_is() {
        assert_eq!(
            message(parse(ROWS, "#split=harmfull")),
            "none of its 3 rows has `split=harmfull`; the first of these fields holds `harmful`, `eval`"
        );
        assert!(message(parse(ROWS, "#part=x")).ends_with("holds nothing"));
    }

    #[test]
    fn only_a_filter_after_the_last_hash_is_one() {
        for plain in ["a.jsonl", "dir/a#2.jsonl", "a=b.jsonl"] {
            let path: DataPath = plain.parse().unwrap();
            assert_eq!(path.path(), Path::new(plain));
        }
        let path: DataPath = "a#2.jsonl#split=x&type=a=b".parse().unwrap();
        assert_eq!(path.path(), Path::new("a#2.jsonl"));
        assert_eq!(path.to_string(), "a#2.jsonl#split=x&type=a=b");
        assert_eq!("#a=b".parse::<DataPath>(), Err(DataPathError::NoPath));
        assert_eq!("".parse::<DataPath>(), Err(DataPathError::NoPath));
        let not_a_filter = DataPathError::NotAFilter("b".to_owned());
        assert_eq!("x#a=1&b".parse::<DataPath>(), Err(not_a_filter));
    }

    #[test]
    fn malformed_json_is_placed_by_line() {
        let found = message(parse(
            "{\"prompt\":\"a\",\"target\":\"1\"}\n{\"prompt\":",
            "",
        ));
        assert!(
            found.starts_with("malformed JSON: EOF while parsing"),
            "{found}"
        );
        assert!(found.contains("line 2"), "{found}");
        let found = message(parse("[{\"prompt\":\"a\",\"target\":\"1\"}] trailing", ""));
        assert!(found.contains("trailing characters"), "{found}");
        let deep = "[".repeat(100_000);
        assert!(message(parse(&deep, "")).contains("recursion limit"));
        let not_text =
            Dataset::<Example>::from_bytes(b"{\"prompt\":\"\xff\"}", Source::BuiltIn("x"));
        assert!(matches!(not_text, Err(DataErrorKind::Malformed(_))));
    }

    #[test]
    fn files_without_rows_are_refused() {
        for empty in ["", " \n", "[]", "[\"score\"]", "\u{feff}"] {
            assert!(
                matches!(parse(empty, ""), Err(DataErrorKind::NoRows { .. })),
                "{empty:?}"
            );
        }
    }

    #[test]
    fn what_is_not_an_object_is_refused_with_its_place() {
        let found = message(parse("[{\"prompt\":\"a\",\"target\":\"1\"}, 5, null]", ""));
        assert_eq!(
            found,
            "index 1 of the array: a number where a row is expected; index 2 of the array: null where a row is expected"
        );
        assert!(message(parse("3 4", "")).starts_with("line 1: a number"));
    }

    #[test]
    fn bad_rows_are_listed_up_to_a_limit() {
        let text = "{\"prompt\":\"a\",\"target\":\" \"}\n".repeat(Problems::LISTED + 1);
        let found = message(parse(&text, ""));
        assert!(
            found.starts_with("line 1: `target` is empty; line 2:"),
            "{found}"
        );
        assert!(found.ends_with("and 1 more rows"), "{found}");
        let text = "{\"prompt\":\"a\",\"target\":\" \"}\n".repeat(Problems::LISTED);
        assert!(!message(parse(&text, "")).contains("more"));
    }

    #[test]
    fn compressed_files_are_recognized() {
        let gzip = Dataset::<Example>::from_bytes(b"\x1f\x8b\x08\x00", Source::BuiltIn("x"));
        assert!(message(gzip).starts_with("this is gzip"));
    }

    #[test]
    fn a_file_is_opened_hashed_and_named_in_errors() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"{\"prompt\":\"abc\"}").unwrap();
        let path = DataPath::from(file.path());
        let data = Dataset::<Request>::open(&path).unwrap();
        // From sha256sum.
        let digest = "c55027ed8785f702a3c0d7235edb319205da519b3eccf8012b98500d153f5159";
        assert_eq!(data.sha256.to_string(), digest);
        assert_eq!(data.source, Source::File(path.clone()));
        let error = Dataset::<Example>::open(&path).unwrap_err();
        assert!(
            error
                .to_string()
                .contains(&file.path().display().to_string())
        );
        let missing = DataPath::from(Path::new("/nonexistent/rows.jsonl"));
        let error = Dataset::<Example>::open(&missing).unwrap_err();
        assert!(matches!(error.kind, DataErrorKind::Io(_)));
    }
}
