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
use super::address::ApiKey;
use crate::data::{EncodeError, Message, Request, Template};

/// How a request is put to a server.
#[derive(Clone, Debug)]
pub enum Form {
    /// As the turns of a conversation, which the server puts into its model's chat template.
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

    /// The turns or the prompt that `request` becomes.
    ///
    /// # Errors
    /// [`EncodeError::Prompt`] when the template refuses.
    pub(super) fn asking(&self, request: &Request) -> Result<Value, EncodeError> {
        let turn = |it: &Message| json!({"role": it.role.as_str(), "content": it.content});
        match self {
            // What a chat template here would be given.
            Self::Chat => Ok(request.turns().iter().map(turn).collect()),
            Self::Prompt(template) => {
                let prompt = template.prompt(request).map_err(EncodeError::Prompt)?;
                Ok(Value::from(prompt))
            }
        }
    }

    /// What tells it from another one: of a template, what it makes of requests with and without an input.
    pub(super) fn identity(&self) -> String {
        if matches!(self, Self::Chat) {
            return "chat".to_owned();
        }
        let probe = |input: Option<&str>| {
            let request = Request::new("request").about(input.map(str::to_owned));
            self.asking(&request).ok()
        };
        let found = json!([probe(None), probe(Some("input"))]).to_string();
        format!("prompt {}", Sha256::of(found.as_bytes()))
    }

    /// The body of a request for a greedy answer to what [`Self::asking`] made.
    pub(super) fn body(
        &self,
        model: Option<&str>,
        asking: &Value,
        max_new_tokens: usize,
    ) -> Vec<u8> {
        let mut body = json!({
            "temperature": 0,
            "seed": 0,
            "max_tokens": max_new_tokens,
            "stream": false,
        });
        match self {
            Self::Chat => body["messages"] = asking.clone(),
            Self::Prompt(_) => body["prompt"] = asking.clone(),
        }
        if let Some(model) = model {
            body["model"] = Value::from(model);
        }
        body.to_string().into_bytes()
    }

    /// The answer in the body of a response. What a filter of the server's leaves of one is what its users are answered.
    ///
    /// # Errors
    /// [`MalformedAnswer`] when there is none; it does not show `key`.
    pub(super) fn answer(
        &self,
        body: &[u8],
        key: Option<&ApiKey>,
    ) -> Result<Answer, MalformedAnswer> {
        let completion: Completion = serde_json::from_slice(body)
            .map_err(|error| MalformedAnswer::Json(JsonError::from(error)))?;
        if completion.error.is_some_and(|error| !error.is_null()) {
            return Err(MalformedAnswer::Error {
                message: message(body, key),
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
        match (text, reason.as_str()) {
            (Some(text), "stop") => Ok(Answer { text, ended: true }),
            // A model that thinks first may have said nothing yet.
            (text, "length") => Ok(Answer {
                text: text.unwrap_or_default(),
                ended: false,
            }),
            (text, "content_filter") => Ok(Answer {
                text: text.unwrap_or_default(),
                ended: true,
            }),
            (None, reason) => Err(MalformedAnswer::NoText {
                reason: shown(reason).to_string(),
            }),
            (Some(_), reason) => Err(MalformedAnswer::Unfinished {
                reason: shown(reason).to_string(),
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
    /// An answer that came neither to its end nor to the limit, such as one that calls a tool.
    #[error(
        "the answer has the finish reason `{reason}`, which is none of `stop`, `length` and `content_filter`"
    )]
    Unfinished {
        /// Why it ended there, as the server says.
        reason: String,
    },
}

/// What a server says of its error, cut to a length that can be shown: the message in `body`, or `body` itself. `key` is hidden, however the
/// server spells it.
pub(super) fn message(body: &[u8], key: Option<&ApiKey>) -> String {
    let found: Option<Value> = serde_json::from_slice(body).ok();
    // OpenAI's, and then others'.
    let places = ["/error/message", "/error", "/message", "/detail"];
    let named = |found: &Value| {
        let mut named = places
            .into_iter()
            .map(|place| found.pointer(place)?.as_str());
        named.find_map(|it| it.map(str::to_owned))
    };
    let said = match &found {
        Some(found) => named(found).unwrap_or_else(|| found.to_string()),
        None => String::from_utf8_lossy(body).into_owned(),
    };
    let said = match key {
        Some(key) => key.hidden_in(&said),
        None => said,
    };
    shown(said.trim()).to_string()
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
    use crate::data::Role;

    fn request(input: Option<&str>) -> Request {
        Request::new("q").about(input.map(str::to_owned))
    }

    fn chat(message: &str, reason: &str) -> Result<Answer, MalformedAnswer> {
        let body =
            format!(r#"{{"choices":[{{"message":{message},"finish_reason":{reason}}}],"id":7}}"#);
        Form::Chat.answer(body.as_bytes(), None)
    }

    #[test]
    fn a_turn_is_the_request_an_empty_line_and_the_input() {
        let asking = Form::Chat.asking(&request(Some("i"))).unwrap();
        assert_eq!(asking, json!([{"role": "user", "content": "q\n\ni"}]));
        let before = vec![Message {
            role: Role::System,
            content: "s".to_owned(),
        }];
        let told = Request {
            before,
            ..request(None)
        };
        let turns = json!([{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]);
        assert_eq!(Form::Chat.asking(&told).unwrap(), turns);
        let asking = Form::Chat.asking(&request(None)).unwrap();
        let body = Form::Chat.body(Some("m"), &asking, 5);
        let found: Value = serde_json::from_slice(&body).unwrap();
        let expected = json!({
            "model": "m", "messages": [{"role": "user", "content": "q"}], "temperature": 0, "max_tokens": 5, "stream": false, "seed": 0,
        });
        assert_eq!(found, expected);
    }

    #[test]
    fn a_prompt_is_what_the_template_makes_of_the_request() {
        let form = Form::Prompt(Template::Alpaca);
        let text = form.asking(&request(None)).unwrap();
        let prompt = text.as_str().unwrap();
        assert!(prompt.ends_with("### Instruction:\nq\n\n### Response:\n"));
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
        assert_eq!(
            Form::Prompt(Template::Raw).answer(body, None).unwrap().text,
            "b"
        );
    }

    /// One filtered answer ended the evaluation of a whole set, and again each time that it went on; so did one of a model that had only thought.
    #[test]
    fn what_a_filter_or_the_limit_leaves_is_an_answer() {
        for (content, reason, text, ended) in [
            (r#"{"content":"a"}"#, r#""content_filter""#, "a", true),
            (r#"{"content":null}"#, r#""content_filter""#, "", true),
            (r#"{"content":null}"#, r#""length""#, "", false),
        ] {
            let found = chat(content, reason).unwrap();
            assert_eq!(
                (found.text.as_str(), found.ended),
                (text, ended),
                "{reason}"
            );
        }
    }

    /// Only the raw body of a failure was looked through: not an error in a successful response, and not what JSON spells otherwise.
    #[test]
    fn the_key_is_hidden_however_the_server_spells_it() {
        let key: ApiKey = "sk-a/b\"c".parse().unwrap();
        for body in [
            r#"{"error":{"message":"bad sk-a/b\"c"}}"#,
            r#"{"error":{"message":"bad sk-a\/b\"c"}}"#,
            r#"{"other":"bad sk-a\/b\"c"}"#,
            r#"bad sk-a/b"c"#,
        ] {
            let said = message(body.as_bytes(), Some(&key));
            assert!(said.contains("bad [API key]"), "{said}");
            assert!(!said.contains("sk-"), "{said}");
        }
        let body = br#"{"error":{"message":"bad sk-a/b\"c"}}"#;
        let error = Form::Chat.answer(body, Some(&key)).unwrap_err();
        assert_eq!(error.to_string(), "the response is an error: bad [API key]");
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
            chat(r#"{"content":"a"}"#, "null").unwrap_err(),
            Unfinished { reason: reason("") }
        );
        let of = |body: &[u8]| Form::Chat.answer(body, None).unwrap_err();
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
        let message = |body: &[u8]| message(body, None);
        assert_eq!(message(br#"{"error":{"message":" m "}}"#), "m");
        assert_eq!(message(br#"{"error":"e"}"#), "e");
        assert_eq!(message(br#"{"detail":"d"}"#), "d");
        assert_eq!(message(b"plain\x1b[2J"), "plain\\u{1b}[2J");
        assert!(message(&[b'x'; 5000]).len() < 300);
    }
}
