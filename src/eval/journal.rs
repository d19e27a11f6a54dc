//! What was found out so far, row by row: so that a run that was stopped, or killed, goes on where it was.
//!
//! In: requests, exchanges or rows, and who answers, judges or computes. Out: all answers, verdicts or numbers, of which only those are asked for
//! that no earlier run has kept. Each is kept under the digest of everything that decides it, so that one of another model,
//! judge, limit or request is never taken for it, and rows that are the same are asked for once.
//!
//! The file is JSON lines: a header with the format's version, then one line for each row,
//!
//! ```text
//! {"format":"panacea-journal","version":1}
//! {"answer":{"ended":true,"key":"<64 hexadecimal digits>","text":".."}}
//! {"verdict":{"categories":[],"key":"..","outcome":"refused","score":"<16 hexadecimal digits>"}}
//! {"number":{"key":"..","value":"<16 hexadecimal digits>"}}
//! ```
//!
//! where numbers are the bits of an f64, since a decimal text need not come back as the same number. Lines are only ever appended, each in
//! one write, so that a process that is killed leaves at most its last line torn; that one is dropped. What a machine loses that is
//! switched off is more, but no more than a set's rows. The answers in it are as harmful as the model that gave them, and whoever
//! can write to the file can make a model look safe: it is for this machine, and for the time of a run.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use panacea_formats::Sha256;
use panacea_formats::json::{JsonError, canonical, parse_strict};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use thiserror::Error;

use super::answer::{Answer, AnswerError, Answerer};
use super::judge::{Exchange, Judge, JudgeError, Outcome, Verdict};
use crate::data::Request;

/// Hears how many rows are done, and of how many: before the first is asked for, and after each. [`ControlFlow::Break`] stops the work.
pub type Progress<'f> = dyn FnMut(usize, usize) -> ControlFlow<()> + Send + 'f;

/// Takes the value of the row at a place.
pub type Take<'f, T> = dyn FnMut(usize, T) -> ControlFlow<()> + Send + 'f;

/// Rows that are done, in a file or in none.
pub struct Journal {
    /// None keeps nothing.
    file: Option<Open>,
    answers: BTreeMap<Sha256, Answer>,
    verdicts: BTreeMap<Sha256, Verdict>,
    numbers: BTreeMap<Sha256, f64>,
}

/// A file that is locked while it is open.
struct Open {
    path: PathBuf,
    file: File,
}

impl Journal {
    /// One that keeps nothing: every row is asked for, and those that are the same within a set once.
    pub fn none() -> Self {
        Self {
            file: None,
            answers: BTreeMap::new(),
            verdicts: BTreeMap::new(),
            numbers: BTreeMap::new(),
        }
    }

    /// The one at `path`, which is made if it is not there, and locked against other runs.
    ///
    /// # Errors
    /// [`JournalError`] when it cannot be read or written, is another run's at the moment, or is not a journal of this version. A file that
    /// is no journal is left as it is.
    pub fn open(path: &Path) -> Result<Self, JournalError> {
        let failed = |source| JournalError::Io {
            path: path.to_owned(),
            source,
        };
        let options = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .clone();
        let file = options.open(path).map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(JournalError::Locked {
                    path: path.to_owned(),
                });
            }
            Err(TryLockError::Error(source)) => return Err(failed(source)),
        }
        if !file.metadata().map_err(failed)?.is_file() {
            return Err(JournalError::NoJournal {
                path: path.to_owned(),
            });
        }
        let mut journal = Self::none();
        let sound = journal.read(path, &file)?;
        let mut open = Open {
            path: path.to_owned(),
            file,
        };
        open.file.set_len(sound).map_err(failed)?;
        if sound == 0 {
            open.append(&header())?;
        }
        journal.file = Some(open);
        Ok(journal)
    }

    /// The answers to `requests`, in their order, of at most `max_new_tokens` tokens each.
    ///
    /// # Errors
    /// [`JournalError::Answer`] when a request has no answer, [`JournalError::Interrupted`] when `progress` or the answerer stops the work,
    /// others when an answer cannot be kept. Those that were found until then are.
    pub fn answers(
        &mut self,
        answerer: &mut dyn Answerer,
        requests: &[Request],
        max_new_tokens: usize,
        progress: &mut Progress<'_>,
    ) -> Result<Vec<Answer>, JournalError> {
        let identity = answerer.identity();
        let key = |request: &Request| {
            let Request {
                text,
                input,
                before,
            } = request;
            let mut key = json!(["answer", identity, max_new_tokens, text, input]);
            if let Some(key) = key.as_array_mut() {
                key.extend(
                    before
                        .iter()
                        .map(|it| json!([it.role.as_str(), it.content])),
                );
            }
            key_of(&key)
        };
        let keys: Vec<Sha256> = requests.iter().map(key).collect();
        self.rows(&keys, progress, |places, take| {
            let asked: Vec<&Request> = places.iter().map(|&place| &requests[place]).collect();
            answerer
                .answer(&asked, max_new_tokens, &mut |index, answer| {
                    give(places, take, index, answer)
                })
                .map_err(|error| error.among(places).into())
        })
    }

    /// The verdicts of `judge` on `exchanges`, in their order.
    ///
    /// # Errors
    /// [`JournalError::Judge`] when the judge fails, and otherwise as for [`Self::answers`].
    pub fn verdicts(
        &mut self,
        judge: &mut dyn Judge,
        exchanges: &[Exchange<'_>],
        progress: &mut Progress<'_>,
    ) -> Result<Vec<Verdict>, JournalError> {
        let name = judge.name();
        let key = |it: &Exchange<'_>| {
            let Exchange {
                request,
                context,
                answer,
            } = it;
            key_of(&json!(["verdict", name, request, context, answer]))
        };
        let keys: Vec<Sha256> = exchanges.iter().map(key).collect();
        self.rows(&keys, progress, |places, take| {
            let asked: Vec<Exchange<'_>> = places.iter().map(|&place| exchanges[place]).collect();
            judge
                .judge(&asked, &mut |index, verdict| {
                    give(places, take, index, verdict)
                })
                .map_err(JournalError::from)
        })
    }

    /// The numbers of `len` rows, such as their losses, in order. `identity` names everything that decides them, the rows included.
    ///
    /// `compute` is given the places that are missing, in ascending order, and hands over the number of each, in any order; where that breaks, it
    /// is to stop. It is not called if none is missing.
    ///
    /// # Errors
    /// Whatever `compute` fails with, and otherwise as for [`Self::answers`].
    pub fn numbers<E: From<JournalError>>(
        &mut self,
        identity: &str,
        len: usize,
        progress: &mut Progress<'_>,
        compute: impl FnOnce(&[usize], &mut Take<'_, f64>) -> Result<(), E>,
    ) -> Result<Vec<f64>, E> {
        let key = |place: usize| key_of(&json!(["number", identity, place]));
        let keys: Vec<Sha256> = (0..len).map(key).collect();
        self.rows(&keys, progress, compute)
    }

    /// Deletes the file, when a run is done.
    ///
    /// # Errors
    /// [`JournalError::Io`] when it cannot be deleted.
    pub fn discard(self) -> Result<(), JournalError> {
        let Some(Open { path, file }) = self.file else {
            return Ok(());
        };
        // Locked until it is gone.
        let deleted = std::fs::remove_file(&path);
        drop(file);
        deleted.map_err(|source| JournalError::Io { path, source })
    }

    /// The values under `keys`: those that are kept, and the others from `find`, which is given the places of the first row of each key and hands
    /// over their values.
    fn rows<T: Kept, E: From<JournalError>>(
        &mut self,
        keys: &[Sha256],
        progress: &mut Progress<'_>,
        find: impl FnOnce(&[usize], &mut Take<'_, T>) -> Result<(), E>,
    ) -> Result<Vec<T>, E> {
        let mut found: BTreeMap<Sha256, T> = BTreeMap::new();
        let mut missing: BTreeMap<Sha256, usize> = BTreeMap::new();
        let mut places = Vec::new();
        for (place, key) in keys.iter().enumerate() {
            if let Some(value) = T::kept(self).get(key) {
                found.insert(*key, value.clone());
            } else {
                let rows = missing.entry(*key).or_default();
                if *rows == 0 {
                    places.push(place);
                }
                *rows += 1;
            }
        }
        let mut done = keys.len() - missing.values().sum::<usize>();
        if progress(done, keys.len()).is_break() {
            return Err(JournalError::Interrupted.into());
        }
        let mut stopped = None;
        let mut take = |place: usize, value: T| {
            // A value that nobody asked for, or a second one, counts for nothing.
            let Some((key, rows)) = keys.get(place).and_then(|key| missing.remove_entry(key))
            else {
                return ControlFlow::Continue(());
            };
            if let Err(error) = self.keep(&key, &value) {
                stopped = Some(error);
                return ControlFlow::Break(());
            }
            found.insert(key, value);
            done += rows;
            if progress(done, keys.len()).is_break() {
                stopped = Some(JournalError::Interrupted);
                return ControlFlow::Break(());
            }
            ControlFlow::Continue(())
        };
        let outcome = if places.is_empty() {
            Ok(())
        } else {
            find(&places, &mut take)
        };
        if let Some(error) = stopped {
            return Err(error.into());
        }
        outcome?;
        if let Some(open) = &self.file {
            open.file.sync_data().map_err(|error| open.failed(error))?;
        }
        let value = |(place, key)| match found.get(key) {
            Some(value) => Ok(T::clone(value)),
            None => Err(JournalError::PassedOver { place }.into()),
        };
        keys.iter().enumerate().map(value).collect()
    }

    fn keep<T: Kept>(&mut self, key: &Sha256, value: &T) -> Result<(), JournalError> {
        let Some(open) = &mut self.file else {
            return Ok(());
        };
        open.append(&value.entry(*key).line())?;
        T::kept_mut(self).insert(*key, value.clone());
        Ok(())
    }

    /// Reads the lines of `file`, and says after how many bytes the last whole one ends.
    fn read(&mut self, path: &Path, file: &File) -> Result<u64, JournalError> {
        let mut reader = BufReader::new(file);
        let mut bytes = Vec::new();
        let mut sound = 0;
        for line in 1_usize.. {
            bytes.clear();
            reader
                .by_ref()
                .take(LINE_BYTES)
                .read_until(b'\n', &mut bytes)
                .map_err(|source| JournalError::Io {
                    path: path.to_owned(),
                    source,
                })?;
            let malformed = |problem| JournalError::Malformed {
                path: path.to_owned(),
                line,
                problem,
            };
            let Some(whole) = bytes.strip_suffix(b"\n") else {
                // A file of another kind has no torn header, and is not to be cut.
                if line == 1 && !header().as_bytes().starts_with(&bytes) {
                    return Err(JournalError::NoJournal {
                        path: path.to_owned(),
                    });
                }
                if bytes.len() as u64 == LINE_BYTES {
                    return Err(malformed(LineProblem::TooLong { limit: LINE_BYTES }));
                }
                break;
            };
            if line == 1 {
                check_header(path, whole)?;
            } else {
                let entry = Entry::parse(whole).map_err(malformed)?;
                self.take_in(entry).map_err(malformed)?;
            }
            sound += bytes.len() as u64;
        }
        Ok(sound)
    }

    /// Of two entries with one key the first counts, since it is what its run went on with.
    fn take_in(&mut self, entry: Entry) -> Result<(), LineProblem> {
        match entry {
            Entry::Answer { key, text, ended } => {
                self.answers.entry(key).or_insert(Answer { text, ended });
            }
            Entry::Number { key, value } => {
                self.numbers.entry(key).or_insert(from_bits(&value)?);
            }
            Entry::Verdict {
                key,
                outcome,
                score,
                categories,
            } => {
                let verdict = Verdict {
                    outcome,
                    score: score.as_deref().map(from_bits).transpose()?,
                    categories,
                };
                self.verdicts.entry(key).or_insert(verdict);
            }
        }
        Ok(())
    }
}

/// How much there is; answers are not for every eye.
impl fmt::Debug for Journal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Journal")
            .field("path", &self.file.as_ref().map(|open| &open.path))
            .field("answers", &self.answers.len())
            .field("verdicts", &self.verdicts.len())
            .field("numbers", &self.numbers.len())
            .finish()
    }
}

impl Open {
    /// Writes `line` and its end.
    fn append(&mut self, line: &str) -> Result<(), JournalError> {
        let bytes = [line.as_bytes(), b"\n"].concat();
        if bytes.len() as u64 > LINE_BYTES {
            return Err(self.failed(io::ErrorKind::FileTooLarge.into()));
        }
        self.file
            .write_all(&bytes)
            .map_err(|error| self.failed(error))
    }

    fn failed(&self, source: io::Error) -> JournalError {
        JournalError::Io {
            path: self.path.clone(),
            source,
        }
    }
}

/// Why rows are not all there.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum JournalError {
    /// A request has no answer.
    #[error(transparent)]
    Answer(AnswerError),
    /// The work was asked to stop.
    #[error("interrupted")]
    Interrupted,
    /// The file cannot be read or written.
    #[error("cannot keep results in `{}`", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The judge fails.
    #[error(transparent)]
    Judge(JudgeError),
    /// Another run has it open.
    #[error("another run keeps its results in `{}`", path.display())]
    Locked {
        /// The file.
        path: PathBuf,
    },
    /// A line that is not what was written.
    #[error("line {line} of `{}` is not what was written there", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Which line, from 1.
        line: usize,
        /// What is wrong with it.
        #[source]
        problem: LineProblem,
    },
    /// A file that is something else.
    #[error("`{}` is not a file that results are kept in", path.display())]
    NoJournal {
        /// The file.
        path: PathBuf,
    },
    /// Somebody who was asked for a row, says that all is well, and did not hand it over.
    #[error("row number {place} was passed over")]
    PassedOver {
        /// The row's place among those asked for, from 0.
        place: usize,
    },
    /// A file of another version of the format.
    #[error(
        "`{}` has version {found} of its format, and this program reads version {VERSION}", path.display()
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u64,
    },
}

impl From<AnswerError> for JournalError {
    fn from(error: AnswerError) -> Self {
        match error {
            AnswerError::Interrupted => Self::Interrupted,
            other => Self::Answer(other),
        }
    }
}

impl From<JudgeError> for JournalError {
    fn from(error: JudgeError) -> Self {
        // Not a match, so that other reasons may come.
        if matches!(error, JudgeError::Interrupted) {
            Self::Interrupted
        } else {
            Self::Judge(error)
        }
    }
}

/// What is wrong with a line.
#[derive(Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum LineProblem {
    /// Not the JSON that it should be.
    #[error(transparent)]
    Json(#[from] JsonError),
    /// Not text.
    #[error("it is not UTF-8")]
    NotText,
    /// A number that is not written as its bits.
    #[error("a number in it is not 16 hexadecimal digits")]
    Number,
    /// A line that nobody wrote.
    #[error("it is longer than {limit} bytes")]
    TooLong {
        /// Bytes of a line at most, with its end.
        limit: u64,
    },
}

/// One line.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
enum Entry {
    Answer {
        key: Sha256,
        text: String,
        ended: bool,
    },
    Number {
        key: Sha256,
        value: String,
    },
    Verdict {
        key: Sha256,
        outcome: Outcome,
        score: Option<String>,
        categories: Vec<String>,
    },
}

impl Entry {
    fn parse(line: &[u8]) -> Result<Self, LineProblem> {
        let text = str::from_utf8(line).map_err(|_| LineProblem::NotText)?;
        let value = parse_strict(text)?;
        serde_json::from_value(value).map_err(|error| JsonError::from(error).into())
    }

    fn line(&self) -> String {
        canonical(&json!(self))
    }
}

/// What a row can come to.
trait Kept: Clone + Send {
    fn kept(journal: &Journal) -> &BTreeMap<Sha256, Self>;
    fn kept_mut(journal: &mut Journal) -> &mut BTreeMap<Sha256, Self>;
    fn entry(&self, key: Sha256) -> Entry;
}

impl Kept for Answer {
    fn kept(journal: &Journal) -> &BTreeMap<Sha256, Self> {
        &journal.answers
    }

    fn kept_mut(journal: &mut Journal) -> &mut BTreeMap<Sha256, Self> {
        &mut journal.answers
    }

    fn entry(&self, key: Sha256) -> Entry {
        Entry::Answer {
            key,
            text: self.text.clone(),
            ended: self.ended,
        }
    }
}

impl Kept for Verdict {
    fn kept(journal: &Journal) -> &BTreeMap<Sha256, Self> {
        &journal.verdicts
    }

    fn kept_mut(journal: &mut Journal) -> &mut BTreeMap<Sha256, Self> {
        &mut journal.verdicts
    }

    fn entry(&self, key: Sha256) -> Entry {
        Entry::Verdict {
            key,
            outcome: self.outcome,
            score: self.score.map(to_bits),
            categories: self.categories.clone(),
        }
    }
}

impl Kept for f64 {
    fn kept(journal: &Journal) -> &BTreeMap<Sha256, Self> {
        &journal.numbers
    }

    fn kept_mut(journal: &mut Journal) -> &mut BTreeMap<Sha256, Self> {
        &mut journal.numbers
    }

    fn entry(&self, key: Sha256) -> Entry {
        Entry::Number {
            key,
            value: to_bits(*self),
        }
    }
}

/// Hands over the value of what was asked at `index`, whose place is that among `places`.
fn give<T>(places: &[usize], take: &mut Take<'_, T>, index: usize, value: T) -> ControlFlow<()> {
    match places.get(index) {
        Some(&place) => take(place, value),
        None => ControlFlow::Continue(()),
    }
}

fn key_of(decides: &Value) -> Sha256 {
    Sha256::of(canonical(decides).as_bytes())
}

fn to_bits(number: f64) -> String {
    format!("{:016x}", number.to_bits())
}

fn from_bits(text: &str) -> Result<f64, LineProblem> {
    let is_digit = |byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    if text.len() != 16 || !text.bytes().all(is_digit) {
        return Err(LineProblem::Number);
    }
    let bits = u64::from_str_radix(text, 16).map_err(|_| LineProblem::Number)?;
    Ok(f64::from_bits(bits))
}

/// The first line.
fn header() -> String {
    canonical(&json!({"format": FORMAT, "version": VERSION}))
}

fn check_header(path: &Path, line: &[u8]) -> Result<(), JournalError> {
    let found = str::from_utf8(line)
        .ok()
        .and_then(|text| parse_strict(text).ok());
    let found = found.filter(|value| value["format"] == json!(FORMAT));
    let path = path.to_owned();
    match found.as_ref().and_then(|value| value["version"].as_u64()) {
        Some(VERSION) => Ok(()),
        Some(found) => Err(JournalError::Version { path, found }),
        None => Err(JournalError::NoJournal { path }),
    }
}

/// What the header calls the file.
const FORMAT: &str = "panacea-journal";

/// The version that is written, and the only one that is read.
const VERSION: u64 = 1;

/// Bytes of a line at most, with its end: four times the largest response that a server may give.
const LINE_BYTES: u64 = 16 << 20;

#[cfg(test)]
#[path = "journal_tests.rs"]
mod tests;
