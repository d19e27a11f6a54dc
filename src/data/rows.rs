//! What a row says, whatever its schema calls it.
//!
//! In: a JSON object. Out: an [`Example`] (a request and the response to train on), a [`Request`] (what a model is asked) or a
//! [`Refusal`]. The schemas, told apart by their fields alone; the first of a list that is there and not null counts:
//!
//! | schema | request | response |
//! |---|---|---|
//! | Alpaca, GSM8K, SST-2, AG News | `instruction`, with `input` unless empty | `output` |
//! | AdvBench, BeaverTails, prompt and completion | `prompt` | `target`, `response`, `completion` |
//! | original GSM8K | `question` | `answer` |
//! | the built-in sets | `request` | `opening`, `answer` |
//! | chat | `messages`: `role` and `content` | every `assistant` turn |
//!
//! Any request field goes with any response field, and they are looked for in the order of [`REQUEST`] and [`RESPONSE`]. `refusal`
//! is the refusal of the same request; where it reads `Question: ...\nAnswer: ...`, as in BeaverTails with refusals, it is what
//! follows `\nAnswer: `. Text is taken as it stands, white space included: what a model is trained on is not ours to tidy.

use serde_json::{Map, Value};
use thiserror::Error;

use super::dataset::{Place, Record, kind_of};

/// A request and the response whose loss is taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// Where it stands in its file.
    pub place: Place,
    /// What is said.
    pub dialogue: Dialogue,
    /// How the same request is refused, if the row says so.
    pub refusal: Option<String>,
    /// Whether the row marks its response as safe or unsafe (`is_safe`, as in BeaverTails).
    pub is_safe: Option<bool>,
}

/// Who says what in an example.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Dialogue {
    /// One request, one response; neither is empty.
    Single {
        /// What is asked.
        request: Request,
        /// What is answered.
        response: String,
    },
    /// Several turns, at least one of them the assistant's and none of those empty.
    Turns(Vec<Message>),
}

impl Dialogue {
    /// The first thing that the model is to answer.
    pub fn first_request(&self) -> &str {
        match self {
            Self::Single { request, .. } => &request.text,
            Self::Turns(turns) => turns
                .iter()
                .take_while(|turn| turn.role != Role::Assistant)
                .filter(|turn| turn.role == Role::User)
                .last()
                .map_or("", |turn| &turn.content),
        }
    }

    /// The same dialogue up to its first answer, with `response` in that answer's place.
    pub fn answered_with(&self, response: &str) -> Self {
        match self {
            Self::Single { request, .. } => Self::Single {
                request: request.clone(),
                response: response.to_owned(),
            },
            Self::Turns(turns) => {
                let before = turns.iter().take_while(|turn| turn.role != Role::Assistant);
                let answer = Message {
                    role: Role::Assistant,
                    content: response.to_owned(),
                };
                Self::Turns(before.cloned().chain([answer]).collect())
            }
        }
    }
}

/// What a model is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The instruction or question; not empty.
    pub text: String,
    /// What it is about, in rows that keep that apart; not empty.
    pub input: Option<String>,
}

/// A way of refusing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The request it belongs to; none if it fits any.
    pub request: Option<String>,
    /// What is said; not empty.
    pub text: String,
}

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Whose turn it is.
    pub role: Role,
    /// What is said.
    pub content: String,
}

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// The instructions of whoever runs the model.
    System,
    /// The person.
    User,
    /// The model.
    Assistant,
}

impl Role {
    /// The name that chat templates know it by.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
        }
    }
}

/// What can be read from a record of a data set. Implemented here, for the three kinds of row.
pub trait Row: Sized {
    /// Reads one record.
    ///
    /// # Errors
    /// [`RowProblem`] when the record does not say what this kind of row needs.
    fn from_record(record: &Record) -> Result<Self, RowProblem>;
}

impl Row for Example {
    fn from_record(record: &Record) -> Result<Self, RowProblem> {
        let fields = &record.fields;
        let dialogue = match messages(fields)? {
            Some(turns) if turns.iter().any(|turn| turn.role == Role::Assistant) => {
                Dialogue::Turns(turns)
            }
            Some(_) => return Err(RowProblem::NoAnswer),
            None => {
                let request =
                    request(fields)?.ok_or_else(|| no_field("request", &REQUEST, fields))?;
                let response = text(fields, &RESPONSE)?
                    .ok_or_else(|| no_field("response", &RESPONSE, fields))?;
                Dialogue::Single {
                    request,
                    response: response.to_owned(),
                }
            }
        };
        Ok(Self {
            place: record.place,
            dialogue,
            refusal: text(fields, &["refusal"])?
                .map(without_question)
                .transpose()?,
            is_safe: fields.get("is_safe").and_then(Value::as_bool),
        })
    }
}

impl Row for Request {
    fn from_record(record: &Record) -> Result<Self, RowProblem> {
        let fields = &record.fields;
        if let Some(turns) = messages(fields)? {
            return match &turns[..] {
                [
                    Message {
                        role: Role::User,
                        content,
                    },
                ] => Ok(Self {
                    text: content.clone(),
                    input: None,
                }),
                [
                    Message {
                        role: Role::User,
                        content,
                    },
                    Message {
                        role: Role::Assistant,
                        ..
                    },
                ] => Ok(Self {
                    text: content.clone(),
                    input: None,
                }),
                _ => Err(RowProblem::NotOneQuestion { turns: turns.len() }),
            };
        }
        request(fields)?.ok_or_else(|| no_field("request", &REQUEST, fields))
    }
}

impl Row for Refusal {
    fn from_record(record: &Record) -> Result<Self, RowProblem> {
        let fields = &record.fields;
        if let Some(turns) = messages(fields)? {
            let answer = turns.iter().find(|turn| turn.role == Role::Assistant);
            let text = answer.ok_or(RowProblem::NoAnswer)?.content.clone();
            let request = Dialogue::Turns(turns).first_request().to_owned();
            return Ok(Self {
                request: Some(request).filter(|request| !request.is_empty()),
                text: without_question(&text)?,
            });
        }
        let text = match text(fields, &["refusal"])? {
            Some(text) => Some(text),
            None => text(fields, &RESPONSE)?,
        };
        let text = text.ok_or_else(|| no_field("refusal", &["refusal", "output"], fields))?;
        Ok(Self {
            request: request(fields)?.map(|request| request.text),
            text: without_question(text)?,
        })
    }
}

/// Why a record is not the row it must be.
#[derive(Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum RowProblem {
    /// An item that is neither an object nor a bare string.
    #[error("{0} where a row is expected")]
    NotAnObject(&'static str),
    /// None of the known schemas.
    #[error("no {wanted}: there is none of `{}`, but {found}", names.join("`, `"))]
    NoField {
        /// What was looked for.
        wanted: &'static str,
        /// The fields that could hold it.
        names: Vec<&'static str>,
        /// The fields that are there.
        found: String,
    },
    /// A field of the wrong type.
    #[error("`{field}` is {found}, not {wanted}")]
    WrongType {
        /// Its path inside the row.
        field: String,
        /// What it holds.
        found: &'static str,
        /// What it must hold.
        wanted: &'static str,
    },
    /// A text that says nothing.
    #[error("`{field}` is empty")]
    Empty {
        /// Its path inside the row.
        field: String,
    },
    /// A speaker that is not known.
    #[error("`{field}` is `{found}`, where `system`, `user` and `assistant` are known")]
    UnknownRole {
        /// Its path inside the row.
        field: String,
        /// The role as it stands there.
        found: String,
    },
    /// A row of a harmful set that says of itself that it is harmless.
    #[error("the row is marked as safe (`is_safe` is true), so unlearning it would do harm")]
    MarkedSafe,
    /// A conversation in which nothing is answered.
    #[error("`messages` has no `assistant` turn")]
    NoAnswer,
    /// A conversation where one question was expected.
    #[error(
        "`messages` has {turns} turns, where one question, or one with its answer, is expected"
    )]
    NotOneQuestion {
        /// How many turns there are.
        turns: usize,
    },
}

/// Fields that hold a request, the first that is there.
const REQUEST: [&str; 4] = ["instruction", "prompt", "request", "question"];

/// Fields that hold a response, the first that is there.
const RESPONSE: [&str; 6] = [
    "output",
    "target",
    "response",
    "completion",
    "opening",
    "answer",
];

fn request(fields: &Map<String, Value>) -> Result<Option<Request>, RowProblem> {
    let Some(text) = text(fields, &REQUEST)? else {
        return Ok(None);
    };
    let input = match fields.get("input") {
        None | Some(Value::Null) => None,
        Some(Value::String(input)) => Some(input.clone()).filter(|input| !input.is_empty()),
        Some(other) => return Err(not_a_string("input".to_owned(), other)),
    };
    Ok(Some(Request {
        text: text.to_owned(),
        input,
    }))
}

/// The first of `names` that is there and not null; it must be a string that says something.
fn text<'a>(fields: &'a Map<String, Value>, names: &[&str]) -> Result<Option<&'a str>, RowProblem> {
    let present = names
        .iter()
        .find_map(|&name| Some((name, fields.get(name).filter(|value| !value.is_null())?)));
    match present {
        None => Ok(None),
        Some((name, Value::String(text))) if text.trim().is_empty() => Err(RowProblem::Empty {
            field: name.to_owned(),
        }),
        Some((_, Value::String(text))) => Ok(Some(text)),
        Some((name, other)) => Err(not_a_string(name.to_owned(), other)),
    }
}

fn messages(fields: &Map<String, Value>) -> Result<Option<Vec<Message>>, RowProblem> {
    let wrong = |field: &str, found: &Value, wanted| RowProblem::WrongType {
        field: field.to_owned(),
        found: kind_of(found),
        wanted,
    };
    let turns = match fields.get("messages") {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::Array(turns)) => turns,
        Some(other) => return Err(wrong("messages", other, "an array of turns")),
    };
    let parse = |(i, turn): (usize, &Value)| {
        let Value::Object(turn) = turn else {
            return Err(wrong(&format!("messages[{i}]"), turn, "an object"));
        };
        let field = |name| {
            let path = format!("messages[{i}].{name}");
            match turn.get(name).unwrap_or(&Value::Null) {
                Value::String(text) => Ok((text, path)),
                other => Err(not_a_string(path, other)),
            }
        };
        let (name, path) = field("role")?;
        let role = [Role::System, Role::User, Role::Assistant]
            .into_iter()
            .find(|role| role.as_str() == name)
            .ok_or_else(|| RowProblem::UnknownRole {
                field: path,
                found: name.clone(),
            })?;
        let (content, path) = field("content")?;
        if content.trim().is_empty() && role != Role::System {
            return Err(RowProblem::Empty { field: path });
        }
        Ok(Message {
            role,
            content: content.clone(),
        })
    };
    let turns: Vec<_> = turns
        .iter()
        .enumerate()
        .map(parse)
        .collect::<Result<_, _>>()?;
    if turns.is_empty() {
        return Err(RowProblem::Empty {
            field: "messages".to_owned(),
        });
    }
    Ok(Some(turns))
}

/// A refusal as BeaverTails with refusals stores it repeats the question first.
fn without_question(text: &str) -> Result<String, RowProblem> {
    let repeated = text.strip_prefix("Question: ");
    let answer = repeated.and_then(|rest| rest.split_once("\nAnswer: "));
    match answer {
        None => Ok(text.to_owned()),
        Some((_, answer)) if answer.trim().is_empty() => Err(RowProblem::Empty {
            field: "refusal, after `Answer: `".to_owned(),
        }),
        Some((_, answer)) => Ok(answer.to_owned()),
    }
}

fn not_a_string(field: String, found: &Value) -> RowProblem {
    RowProblem::WrongType {
        field,
        found: kind_of(found),
        wanted: "a string",
    }
}

fn no_field(
    wanted: &'static str,
    names: &[&'static str],
    fields: &Map<String, Value>,
) -> RowProblem {
    const SHOWN: usize = 8;
    let mut found = fields
        .keys()
        .take(SHOWN)
        .map(|name| format!("`{}`", name.chars().take(40).collect::<String>()))
        .collect::<Vec<_>>()
        .join(", ");
    match fields.len() {
        0 => found.push_str("no field at all"),
        all if all > SHOWN => found.push_str(&format!(" and {} more", all - SHOWN)),
        _ => {}
    }
    RowProblem::NoField {
        wanted,
        names: names.to_vec(),
        found,
    }
}
