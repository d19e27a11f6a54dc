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

use panacea_formats::shown;
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
            Self::Turns(turns) => until_question(turns)
                .last()
                .map_or("", |turn| &turn.content),
        }
    }

    /// What asks for the first answer, with all that was said before.
    pub fn question(&self) -> Request {
        match self {
            Self::Single { request, .. } => request.clone(),
            Self::Turns(turns) => Request {
                before: match until_question(turns) {
                    [before @ .., _] => before.to_vec(),
                    [] => Vec::new(),
                },
                ..Request::new(self.first_request())
            },
        }
    }

    /// The first answer.
    pub fn first_answer(&self) -> &str {
        match self {
            Self::Single { response, .. } => response,
            Self::Turns(turns) => turns
                .iter()
                .find(|turn| turn.role == Role::Assistant)
                .map_or("", |turn| &turn.content),
        }
    }

    /// All that is said, in order.
    pub fn texts(&self) -> Vec<&str> {
        match self {
            Self::Single { request, response } => {
                let request = [Some(request.text.as_str()), request.input.as_deref()];
                request
                    .into_iter()
                    .flatten()
                    .chain([response.as_str()])
                    .collect()
            }
            Self::Turns(turns) => turns.iter().map(|turn| turn.content.as_str()).collect(),
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

/// `turns` up to the last of the user's before the first answer.
fn until_question(turns: &[Message]) -> &[Message] {
    let asked = turns.split(|turn| turn.role == Role::Assistant).next();
    let asked = asked.unwrap_or_default();
    let question = asked.iter().rposition(|turn| turn.role == Role::User);
    &asked[..question.map_or(0, |place| place + 1)]
}

/// What a model is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The instruction or question; not empty.
    pub text: String,
    /// What it is about, in rows that keep that apart; not empty.
    pub input: Option<String>,
    /// What was said before it, such as the system's instructions; mostly nothing.
    pub before: Vec<Message>,
}

impl Request {
    /// A request that stands by itself.
    pub fn new(text: impl Into<String>) -> Self {
        Self {
            text: text.into(),
            input: None,
            before: Vec::new(),
        }
    }

    /// All that was said, and the request with its input as the user's turn.
    pub fn turns(&self) -> Vec<Message> {
        let content = match &self.input {
            Some(input) => format!("{}\n\n{input}", self.text),
            None => self.text.clone(),
        };
        let question = Message {
            role: Role::User,
            content,
        };
        self.before.iter().cloned().chain([question]).collect()
    }

    /// The same about `input`.
    #[must_use]
    pub fn about(self, input: Option<String>) -> Self {
        Self { input, ..self }
    }
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
            let asked = match &turns[..] {
                [asked @ .., last] if last.role == Role::Assistant => asked,
                asked => asked,
            };
            return match asked.split_last() {
                Some((question, before))
                    if question.role == Role::User
                        && before.iter().all(|turn| turn.role == Role::System) =>
                {
                    Ok(Self {
                        before: before.to_vec(),
                        ..Self::new(&question.content)
                    })
                }
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
    #[error(
        "`{field}` is `{}`, where `system`, `user` and `assistant` are known",
        shown(found)
    )]
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
        "`messages` has {turns} turns, where one question after the system's instructions, if any, is expected, and at most one answer"
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
    Ok(Some(Request::new(text).about(input)))
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
        .map(|name| format!("`{}`", shown(name)))
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

#[cfg(test)]
mod tests {
    use super::*;

    fn read<R: Row>(json: &str) -> Result<R, RowProblem> {
        let Value::Object(fields) = serde_json::from_str(json).unwrap() else {
            panic!("{json}");
        };
        R::from_record(&Record {
            place: Place::Line(7),
            fields,
        })
    }

    fn single(json: &str) -> (String, Option<String>, String) {
        match read::<Example>(json).unwrap().dialogue {
            Dialogue::Single { request, response } => (request.text, request.input, response),
            turns => panic!("{turns:?}"),
        }
    }

    fn plain(text: &str, response: &str) -> (String, Option<String>, String) {
        (text.to_owned(), None, response.to_owned())
    }

    #[test]
    fn every_schema_of_a_request_and_a_response_is_read() {
        for json in [
            r#"{"instruction":"q","output":"a"}"#,
            r#"{"instruction":"q","input":"","output":"a","label":0}"#,
            r#"{"instruction":"q","input":null,"output":"a"}"#,
            r#"{"id":"advbench-0","prompt":"q","target":"a","split":"eval"}"#,
            r#"{"prompt":"q","response":"a","category":{"x":true},"is_safe":false}"#,
            r#"{"prompt":"q","completion":"a"}"#,
            r#"{"request":"q","opening":"a"}"#,
            r#"{"request":"q","answer":"a"}"#,
            r#"{"question":"q","answer":"a"}"#,
        ] {
            assert_eq!(single(json), plain("q", "a"), "{json}");
        }
        let (text, input, response) = single(r#"{"instruction":"q","input":" i","output":"a\n"}"#);
        assert_eq!(
            (text.as_str(), input.as_deref(), response.as_str()),
            ("q", Some(" i"), "a\n")
        );
    }

    #[test]
    fn fields_that_mean_the_same_have_an_order() {
        // GSM8K rows carry the bare number as `answer` beside the `output` to train on.
        let json = r#"{"instruction":"q","prompt":"p","output":"a","answer":"72"}"#;
        assert_eq!(single(json), plain("q", "a"));
        assert_eq!(
            single(r#"{"instruction":null,"prompt":"p","target":"a"}"#),
            plain("p", "a")
        );
    }

    #[test]
    fn a_refusal_is_taken_after_its_repeated_question() {
        let json = r#"{"prompt":"q","response":"a","is_safe":false,"refusal":"Question: q\nAnswer: No.\nAnswer: x"}"#;
        let example: Example = read(json).unwrap();
        assert_eq!(example.refusal.as_deref(), Some("No.\nAnswer: x"));
        assert_eq!(
            (example.is_safe, example.place),
            (Some(false), Place::Line(7))
        );
        let refusal: Refusal = read(json).unwrap();
        assert_eq!(refusal.text, "No.\nAnswer: x");
        assert_eq!(refusal.request.as_deref(), Some("q"));
        let plain: Refusal = read(r#"{"output":"I can't. Question: why?\nAnswer: no"}"#).unwrap();
        assert_eq!(plain.text, "I can't. Question: why?\nAnswer: no");
        assert_eq!(plain.request, None);
        let empty = read::<Refusal>(r#"{"refusal":"Question: q\nAnswer: "}"#);
        assert!(matches!(empty, Err(RowProblem::Empty { .. })));
    }

    #[test]
    fn a_request_needs_no_response() {
        let request: Request = read(r#"{"id":"xstest-1","prompt":"q","label":"safe"}"#).unwrap();
        assert_eq!((request.text.as_str(), request.input), ("q", None));
        assert!(matches!(
            read::<Example>(r#"{"prompt":"q"}"#),
            Err(RowProblem::NoField { .. })
        ));
        let chat =
            r#"{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"a"}]}"#;
        assert_eq!(read::<Request>(chat).unwrap().text, "q");
        assert!(matches!(
            read::<Request>(CHAT),
            Err(RowProblem::NotOneQuestion { turns: 5 })
        ));
    }

    /// Task items were asked without their system prompt, and scored against answers that were given with it.
    #[test]
    fn what_was_said_before_a_question_is_part_of_it() {
        let row = r#"{"messages":[{"role":"system","content":"s"},{"role":"user","content":"q"},
                      {"role":"assistant","content":"a"}]}"#;
        let request: Request = read(row).unwrap();
        assert_eq!(read::<Example>(row).unwrap().dialogue.question(), request);
        assert_eq!((request.text.as_str(), request.before.len()), ("q", 1));
        let turns = request.turns();
        let turns = turns.iter().map(|it| (it.role, it.content.as_str()));
        let expected = [(Role::System, "s"), (Role::User, "q")];
        assert_eq!(turns.collect::<Vec<_>>(), expected);
        let first = read::<Example>(CHAT).unwrap().dialogue.question();
        assert_eq!((first.text.as_str(), first.before.len()), ("one", 1));
    }

    const CHAT: &str = r#"{"messages":[
        {"role":"system","content":""},
        {"role":"user","content":"one","name":"x"},
        {"role":"assistant","content":"1"},
        {"role":"user","content":"two"},
        {"role":"assistant","content":"2"}]}"#;

    #[test]
    fn a_conversation_keeps_its_turns() {
        let Dialogue::Turns(turns) = read::<Example>(CHAT).unwrap().dialogue else {
            panic!("one turn");
        };
        let seen: Vec<_> = turns
            .iter()
            .map(|turn| (turn.role.as_str(), turn.content.as_str()))
            .collect();
        assert_eq!(
            seen,
            [
                ("system", ""),
                ("user", "one"),
                ("assistant", "1"),
                ("user", "two"),
                ("assistant", "2")
            ]
        );
    }

    #[test]
    fn a_conversation_is_refused_at_its_first_answer() {
        let dialogue = read::<Example>(CHAT).unwrap().dialogue;
        assert_eq!(dialogue.first_request(), "one");
        let Dialogue::Turns(turns) = dialogue.answered_with("No.") else {
            panic!("one turn");
        };
        assert_eq!(turns.len(), 3);
        assert_eq!(turns[2].content, "No.");
        let refusal: Refusal = read(CHAT).unwrap();
        assert_eq!(
            (refusal.request.as_deref(), refusal.text.as_str()),
            (Some("one"), "1")
        );
    }

    #[test]
    fn problems_name_the_field_and_what_it_holds() {
        let cases = [
            (
                r#"{"prompt":"q","response":5}"#,
                "`response` is a number, not a string",
            ),
            (r#"{"prompt":"q","response":""}"#, "`response` is empty"),
            (r#"{"prompt":" \n","response":"a"}"#, "`prompt` is empty"),
            (
                r#"{"instruction":"q","input":["i"],"output":"a"}"#,
                "`input` is an array, not a string",
            ),
            (
                r#"{"messages":"hi"}"#,
                "`messages` is a string, not an array of turns",
            ),
            (r#"{"messages":[]}"#, "`messages` is empty"),
            (
                r#"{"messages":["hi"]}"#,
                "`messages[0]` is a string, not an object",
            ),
            (
                r#"{"messages":[{"role":"user"}]}"#,
                "`messages[0].content` is null, not a string",
            ),
            (
                r#"{"messages":[{"role":"user","content":[{"type":"text"}]}]}"#,
                "`messages[0].content` is an array, not a string",
            ),
            (
                r#"{"messages":[{"role":"tool","content":"x"}]}"#,
                "`messages[0].role` is `tool`, where `system`, `user` and `assistant` are known",
            ),
            (
                r#"{"messages":[{"role":"user","content":"q"}]}"#,
                "`messages` has no `assistant` turn",
            ),
            (
                r#"{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":" "}]}"#,
                "`messages[1].content` is empty",
            ),
            (
                r#"{"text":"x","n":1}"#,
                "no request: there is none of `instruction`, `prompt`, `request`, `question`, but `n`, `text`",
            ),
            (
                "{}",
                "no request: there is none of `instruction`, `prompt`, `request`, `question`, but no field at all",
            ),
        ];
        for (json, message) in cases {
            assert_eq!(
                read::<Example>(json).unwrap_err().to_string(),
                message,
                "{json}"
            );
        }
    }
}
