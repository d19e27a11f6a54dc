//! What is sent to a server, and what comes back: `/chat/completions` and `/completions` as OpenAI's API has them, and vLLM,
//! llama.cpp and others after it.
//!
//! Source: <https://platform.openai.com/docs/api-reference/chat/create>, and `completions` beside it.

use panacea_formats::json::JsonError;
use panacea_formats::{Sha256, shown};
use serde::Deserialize;
use serde_json::{Value, json};
use thiserror::Error;

use super::super::Answer;
use crate::data::{EncodeError, Request, Template};

/// How a request is put to a server.
#[derive(Clone, Debug)]
pub enum Form {
    /// As the first turn of a conversation, which the server puts into its model's chat template.
    Chat,
    /// As a prompt that this template makes of it. The server may put its model's begin-of-sequence token before it, so that a template
    /// that writes one itself has it twice.
    Prompt(Template),
}

impl Form {
    /// What the path ends with.
    pub(super) fn path(&self) -> &'static str {
        match self {
            Self::Chat => "chat/completions",
            Self::Prompt(_) => "completions",
        }
    }

    /// The turn or the prompt that `request` becomes.
    ///
    /// # Errors
    /// [`EncodeError::Prompt`] when the template refuses.
    pub(super) fn text(&self, request: &Request) -> Result<String, EncodeError> {
        let template = match self {
            // A turn is what a chat template here would be given: the request as it stands.
            Self::Chat => &Template::Raw,
            Self::Prompt(template) => template,
        };
        template.prompt(request).map_err(EncodeError::Prompt)
    }

    /// What tells it from another one: of a template, what it makes of requests with and without an input.
    pub(super) fn identity(&self) -> String {
        if matches!(self, Self::Chat) {
            return "chat".to_owned();
        }
        let probe = |input: Option<&str>| {
            let request = Request {
                text: "request".to_owned(),
                input: input.map(str::to_owned),
            };
            self.text(&request).ok()
        };
        let found = json!([probe(None), probe(Some("input"))]).to_string();
        format!("prompt {}", Sha256::of(found.as_bytes()))
    }

    /// The body of a request for a greedy answer to `text`.
    pub(super) fn body(&self, model: Option<&str>, text: &str, max_new_tokens: usize) -> Vec<u8> {
        let mut body = json!({
            "temperature": 0,
            "seed": 0,
            "max_tokens": max_new_tokens,
            "stream": false,
        });
        match self {
            Self::Chat => body["messages"] = json!([{"role": "user", "content": text}]),
            Self::Prompt(_) => body["prompt"] = Value::from(text),
        }
        if let Some(model) = model {
            body["model"] = Value::from(model);
        }
        body.to_string().into_bytes()
    }

    /// The answer in the body of a response.
    ///
    /// # Errors
    /// [`MalformedAnswer`] when there is none.
    pub(super) fn answer(&self, body: &[u8]) -> Result<Answer, MalformedAnswer> {
        let completion: Completion = serde_json::from_slice(body)
            .map_err(|error| MalformedAnswer::Json(JsonError::from(error)))?;
        if completion.error.is_some_and(|error| !error.is_null()) {
            return Err(MalformedAnswer::Error {
                message: message(body),
            });
        }
        let Some(choice) = completion.choices.into_iter().next() else {
            return Err(MalformedAnswer::NoChoice);
        };
        let reason = choice.finish_reason.unwrap_or_default();
        let text = match self {
            Self::Chat => choice.message.and_then(|message| message.content),
            Self::Prompt(_) => choice.text,
        };
        let Some(text) = text else {
            return Err(MalformedAnswer::NoText {
                reason: shown(&reason).to_string(),
            });
        };
        match reason.as_str() {
            "stop" => Ok(Answer { text, ended: true }),
            "length" => Ok(Answer { text, ended: false }),
            _ => Err(MalformedAnswer::Unfinished {
                reason: shown(&reason).to_string(),
            }),
        }
    }
}

/// Why there is no answer in a response that says it is one.
#[derive(Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum MalformedAnswer {
    /// An error in place of it.
    #[error("the response is an error: {message}")]
    Error {
        /// What the server says, cut to a length that can be shown.
        message: String,
    },
    /// Not the JSON that it should be.
    #[error("the response is not the JSON that it should be")]
    Json(#[source] JsonError),
    /// No choices at all.
    #[error("the response has no choices")]
    NoChoice,
    /// A choice that says nothing; an empty text is one.
    #[error("the response has no text, and the finish reason `{reason}`")]
    NoText {
        /// Why it ended there, as the server says.
        reason: String,
    },
    /// An answer that came neither to its end nor to the limit, such as one that a filter cut.
    #[error("the answer has the finish reason `{reason}`, which is neither `stop` nor `length`")]
    Unfinished {
        /// Why it ended there, as the server says.
        reason: String,
    },
}

/// What a server says of its error, cut to a length that can be shown: the message in `body`, or `body` itself.
pub(super) fn message(body: &[u8]) -> String {
    let found: Value = serde_json::from_slice(body).unwrap_or_default();
    // OpenAI's, and then others'.
    let places = ["/error/message", "/error", "/message", "/detail"];
    let named = places
        .into_iter()
        .find_map(|place| found.pointer(place)?.as_str());
    match named {
        Some(text) => shown(text.trim()).to_string(),
        None => shown(String::from_utf8_lossy(body).trim()).to_string(),
    }
}

#[derive(Deserialize)]
struct Completion {
    #[serde(default)]
    choices: Vec<Choice>,
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Choice {
    message: Option<Said>,
    text: Option<String>,
    finish_reason: Option<String>,
}

#[derive(Deserialize)]
struct Said {
    content: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(input: Option<&str>) -> Request {
        Request {
            text: "q".to_owned(),
            input: input.map(str::to_owned),
        }
    }

    fn chat(message: &str, reason: &str) -> Result<Answer, MalformedAnswer> {
        let body =
            format!(r#"{{"choices":[{{"message":{message},"finish_reason":{reason}}}],"id":7}}"#);
        Form::Chat.answer(body.as_bytes())
    }

    #[test]
    fn a_turn_is_the_request_an_empty_line_and_the_input() {
        assert_eq!(Form::Chat.text(&request(Some("i"))).unwrap(), "q\n\ni");
        let body = Form::Chat.body(Some("m"), "q", 5);
        let found: Value = serde_json::from_slice(&body).unwrap();
        let expected = json!({
            "model": "m", "messages": [{"role": "user", "content": "q"}], "temperature": 0, "max_tokens": 5, "stream": false, "seed": 0,
        });
        assert_eq!(found, expected);
    }

    #[test]
    fn a_prompt_is_what_the_template_makes_of_the_request() {
        let form = Form::Prompt(Template::Alpaca);
        let text = form.text(&request(None)).unwrap();
        assert!(text.ends_with("### Instruction:\nq\n\n### Response:\n"));
        let found: Value = serde_json::from_slice(&form.body(None, &text, 5)).unwrap();
        let expected =
            json!({"prompt": text, "temperature": 0, "max_tokens": 5, "stream": false, "seed": 0});
        assert_eq!(found, expected);
    }

    #[test]
    fn forms_are_told_apart() {
        let forms = [
            Form::Chat,
            Form::Prompt(Template::Raw),
            Form::Prompt(Template::Alpaca),
        ];
        let found: std::collections::BTreeSet<String> = forms.iter().map(Form::identity).collect();
        assert_eq!(found.len(), 3);
    }

    #[test]
    fn an_answer_ended_unless_it_was_cut() {
        let found = chat(r#"{"role":"assistant","content":"a"}"#, r#""stop""#).unwrap();
        assert_eq!((found.text.as_str(), found.ended), ("a", true));
        let found = chat(r#"{"content":""}"#, r#""length""#).unwrap();
        assert_eq!((found.text.as_str(), found.ended), ("", false));
        let body = br#"{"choices":[{"text":"b","finish_reason":"stop"}],"error":null}"#;
        assert_eq!(Form::Prompt(Template::Raw).answer(body).unwrap().text, "b");
    }

    #[test]
    fn a_response_without_an_answer_says_why() {
        use MalformedAnswer::{Error, Json, NoChoice, NoText, Unfinished};
        let reason = |text: &str| text.to_owned();
        assert_eq!(
            chat(r#"{"content":null}"#, r#""tool_calls""#).unwrap_err(),
            NoText {
                reason: reason("tool_calls")
            }
        );
        assert_eq!(
            chat("null", "null").unwrap_err(),
            NoText { reason: reason("") }
        );
        assert_eq!(
            chat(r#"{"content":"a"}"#, r#""content_filter""#).unwrap_err(),
            Unfinished {
                reason: reason("content_filter")
            }
        );
        assert_eq!(
            chat(r#"{"content":"a"}"#, "null").unwrap_err(),
            Unfinished { reason: reason("") }
        );
        let of = |body: &[u8]| Form::Chat.answer(body).unwrap_err();
        assert_eq!(of(br#"{"choices":[]}"#), NoChoice);
        assert_eq!(of(b"{}"), NoChoice);
        assert_eq!(
            of(br#"{"error":{"message":"busy"}}"#),
            Error {
                message: reason("busy")
            }
        );
        for body in [
            &b"<html>"[..],
            b"",
            b"[]",
            br#"{"choices":7}"#,
            b"{\"choices\":[\xff]}",
        ] {
            assert!(matches!(of(body), Json(_)));
        }
    }

    #[test]
    fn a_servers_own_words_are_found_and_cut() {
        assert_eq!(message(br#"{"error":{"message":" m "}}"#), "m");
        assert_eq!(message(br#"{"error":"e"}"#), "e");
        assert_eq!(message(br#"{"detail":"d"}"#), "d");
        assert_eq!(message(b"plain\x1b[2J"), "plain\\u{1b}[2J");
        assert!(message(&[b'x'; 5000]).len() < 300);
    }
}
