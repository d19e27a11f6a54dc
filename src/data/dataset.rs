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
use std::path::PathBuf;

use panacea_formats::{Problems, Sha256, shown};
use serde::de::{Deserializer as _, SeqAccess, Visitor};
use serde_json::{Map, Value};
use thiserror::Error;

use super::data_path::{DataPath, Filters};
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

impl<R: Row> Dataset<R> {
    /// Reads the rows that `path` selects.
    ///
    /// # Errors
    /// [`DataError`], with the file and, for a row, its line or its index in the array.
    pub fn open(path: &DataPath) -> Result<Self, DataError> {
        let fail = |kind| DataError {
            path: path.path().to_owned(),
            kind,
        };
        let bytes = fs::read(path.path()).map_err(|error| fail(DataErrorKind::Io(error)))?;
        Self::from_bytes(&bytes, Source::File(path.clone())).map_err(fail)
    }

    /// Reads the rows of `bytes`, all of them or those that the path of `source` selects.
    pub(super) fn from_bytes(bytes: &[u8], source: Source) -> Result<Self, DataErrorKind> {
        let everything = Filters::default();
        let filters = match &source {
            Source::File(path) => path.filters(),
            Source::BuiltIn(_) => &everything,
        };
        let mut parsed = Parsed::default();
        parsed.read(bytes)?;
        let (total, skipped) = (parsed.records.len(), parsed.skipped);
        let mut problems = parsed.problems;
        if total == 0 && problems.is_empty() {
            return Err(DataErrorKind::NoRows { skipped });
        }
        let mut rows = Vec::new();
        for record in parsed
            .records
            .iter()
            .filter(|record| filters.select(&record.fields))
        {
            match R::from_record(record) {
                Ok(row) => rows.push(row),
                Err(kind) => problems.push(RowError {
                    place: record.place,
                    kind,
                }),
            }
        }
        Problems::none_of(problems)?;
        if rows.is_empty() {
            return Err(DataErrorKind::NothingSelected {
                filter: filters.to_string(),
                total,
                present: first_few(
                    filters.first_values(parsed.records.iter().map(|record| &record.fields)),
                ),
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
    #[error(transparent)]
    Rows(#[from] Problems<RowError>),
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
    problems: Vec<RowError>,
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

/// The different values among `values`, in order of appearance, the first few of the short ones.
fn first_few(values: impl Iterator<Item = String>) -> String {
    const LISTED: usize = 6;
    const LONGEST: usize = 40;
    let mut listed: Vec<String> = Vec::new();
    for value in values.filter(|value| value.chars().count() <= LONGEST) {
        let value = format!("`{}`", shown(&value));
        if !listed.contains(&value) {
            listed.push(value);
        }
        if listed.len() == LISTED {
            break;
        }
    }
    if listed.is_empty() {
        "nothing".to_owned()
    } else {
        listed.join(", ")
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::path::Path;

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
    fn all_bad_rows_are_kept_and_the_first_are_spelled_out() {
        let text = "{\"prompt\":\"a\",\"target\":\" \"}\n".repeat(25);
        let Err(DataErrorKind::Rows(problems)) = parse(&text, "") else {
            panic!("taken");
        };
        assert_eq!(problems.all().len(), 25);
        let message = problems.to_string();
        assert!(
            message.starts_with("line 1: `target` is empty; line 2:"),
            "{message}"
        );
        assert!(message.ends_with(" more"), "{message}");
    }

    #[test]
    fn what_a_file_says_cannot_steer_a_terminal() {
        let text = "{\"split\":\"\\u001b[2J\",\"\\u001b[1m\":1}";
        for filter in ["", "#split=x"] {
            let found = message(parse(text, filter));
            assert!(
                found.contains("\\u{1b}") && !found.contains('\u{1b}'),
                "{found}"
            );
        }
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
