//! A checkpoint's own chat template, rendered as transformers renders it.
//!
//! In: the Jinja source that the checkpoint carries and the turns of a conversation. Out: the text that the model was trained to
//! see. The template is a program from a stranger: it reaches nothing but its arguments, and it runs on a budget of steps and bytes.
//!
//! Three things differ from transformers on purpose. `strftime_now` always tells 26 July 2024, the date that Llama 3's template
//! falls back to, because the same inputs must give the same tokens tomorrow. A `generation` block is rendered as its contents; it only
//! marks them. And a template that exceeds its budget is an error.
//!
//! Source: `_compile_jinja_template` and `render_jinja_template` in transformers 5, `utils/chat_template_utils.py`.

use std::fmt;
use std::sync::LazyLock;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, Value, context, escape_formatter};
use minijinja_contrib::pycompat::unknown_method_callback;
use regex::Regex;
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};
use thiserror::Error as ThisError;

use super::rows::Message;

/// A compiled chat template and the special tokens it may write.
#[derive(Clone)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: Vec<(String, String)>,
}

impl ChatTemplate {
    /// Compiles `source`. `special_tokens` are names and texts, such as `bos_token` and `<s>`.
    ///
    /// # Errors
    /// [`ChatError::Malformed`] when `source` is not a Jinja template.
    pub fn compile(
        source: &str,
        special_tokens: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, ChatError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()
            .map_err(ChatError::Malformed)?;
        environment.set_syntax(syntax);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(unknown_method_callback);
        environment.set_formatter(print_as_python);
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", |message: String| {
            Err::<Value, _>(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |format: String| date(&format));
        let source = GENERATION.replace_all(source, |block: &regex::Captures<'_>| {
            let word = if &block[2] == "generation" {
                "if true"
            } else {
                "endif"
            };
            format!("{{%{} {word} {}%}}", &block[1], &block[3])
        });
        environment
            .add_template_owned(NAME, source.into_owned())
            .map_err(ChatError::Malformed)?;
        Ok(Self {
            environment,
            special_tokens: special_tokens.into_iter().collect(),
        })
    }

    /// The text of `turns`, followed, if `add_generation_prompt`, by what comes before the model's next answer.
    ///
    /// # Errors
    /// [`ChatError::Refused`] when the template raises an exception (many do for roles in an order that they do not know), uses
    /// something that does not exist, or exceeds its budget.
    pub fn render(
        &self,
        turns: &[Message],
        add_generation_prompt: bool,
    ) -> Result<String, ChatError> {
        let messages: Vec<Value> = turns
            .iter()
            .map(|turn| context! { role => turn.role.as_str(), content => turn.content.as_str() })
            .collect();
        let tokens = self
            .special_tokens
            .iter()
            .map(|(name, text)| (name.as_str(), Value::from(text.as_str())));
        let arguments = [
            ("messages", Value::from(messages)),
            ("tools", Value::from(())),
            ("documents", Value::from(())),
            ("add_generation_prompt", Value::from(add_generation_prompt)),
        ];
        let context = Value::from_pairs(tokens.chain(arguments));
        self.environment
            .get_template(NAME)
            .and_then(|template| template.render(context))
            .map_err(ChatError::Refused)
    }
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChatTemplate")
            .field("special_tokens", &self.special_tokens)
            .finish_non_exhaustive()
    }
}

/// Why a chat template gives no text.
#[derive(Debug, ThisError)]
#[non_exhaustive]
pub enum ChatError {
    /// It is not a Jinja template.
    #[error("the chat template does not compile")]
    Malformed(#[source] Error),
    /// It gave up on these turns.
    #[error("the chat template refuses the conversation")]
    Refused(#[source] Error),
}

/// What the template is called in messages about it.
const NAME: &str = "chat_template";

/// Steps and bytes (one per 64) that one rendering may take. A real template takes about fifty steps a turn, so that this is
/// good for conversations of tens of thousands of turns, and ends a hostile loop within about a second.
const FUEL: u64 = 5_000_000;

/// A `generation` or `endgeneration` tag, with its white-space marks.
static GENERATION: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"\{%([-+]?)\s*(generation|endgeneration)\s*([-+]?)%\}").expect("a literal pattern")
});

/// Python's spelling of what has no text of its own.
fn print_as_python(
    out: &mut minijinja::Output<'_>,
    state: &mut State<'_, '_>,
    value: &Value,
) -> Result<(), Error> {
    match value.kind() {
        ValueKind::Bool if value.is_true() => Ok(out.write_str("True")?),
        ValueKind::Bool => Ok(out.write_str("False")?),
        ValueKind::None => Ok(out.write_str("None")?),
        _ => escape_formatter(out, state, value),
    }
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=indent)`; the engine's own filter escapes for HTML.
fn to_json(value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    if options.get::<Option<bool>>("ensure_ascii")? == Some(true) {
        let message = "`tojson` with `ensure_ascii` is not supported";
        return Err(Error::new(ErrorKind::InvalidOperation, message));
    }
    options.assert_all_used()?;
    match indent {
        Some(width) if width <= 64 => {
            let spaces = vec![b' '; width];
            write_json(value, PrettyFormatter::with_indent(&spaces))
        }
        Some(width) => Err(Error::new(
            ErrorKind::InvalidOperation,
            format!("`tojson` with an indent of {width}"),
        )),
        None => write_json(value, Spaced),
    }
}

fn write_json(value: &Value, formatter: impl Formatter) -> Result<String, Error> {
    let mut bytes = Vec::new();
    value
        .serialize(&mut Serializer::with_formatter(&mut bytes, formatter))
        .map_err(|error| {
            Error::new(ErrorKind::InvalidOperation, "the value has no JSON").with_source(error)
        })?;
    String::from_utf8(bytes).map_err(|error| {
        Error::new(ErrorKind::InvalidOperation, "JSON in UTF-8").with_source(error)
    })
}

/// A space after each comma and colon, as Python writes them.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        out.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        out.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
    ) -> std::io::Result<()> {
        out.write_all(b": ")
    }
}

/// `strftime` at noon on Friday, 26 July 2024.
fn date(format: &str) -> Result<String, Error> {
    let mut text = String::new();
    let mut rest = format.chars();
    while let Some(character) = rest.next() {
        if character != '%' {
            text.push(character);
            continue;
        }
        let mut code = rest.next();
        if code == Some('-') {
            // "%-d": without a leading zero, which only the month has here.
            code = rest.next();
            if code == Some('m') {
                text.push('7');
                continue;
            }
        }
        text.push_str(match code {
            Some('Y') => "2024",
            Some('y') => "24",
            Some('m') => "07",
            Some('B') => "July",
            Some('b') => "Jul",
            Some('d') => "26",
            Some('j') => "208",
            Some('A') => "Friday",
            Some('a') => "Fri",
            Some('H' | 'I') => "12",
            Some('M' | 'S') => "00",
            Some('p') => "PM",
            Some('F') => "2024-07-26",
            Some('T') => "12:00:00",
            Some('%') => "%",
            _ => {
                let message = format!("`strftime_now` does not know all of `{format}`");
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
        });
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::super::rows::Role;
    use super::*;

    /// One template of testdata/chat-templates/cases.json, with what transformers makes of it.
    #[derive(serde::Deserialize)]
    struct Case {
        name: String,
        special_tokens: std::collections::BTreeMap<String, String>,
        source: String,
        renderings: Vec<Rendering>,
    }

    #[derive(serde::Deserialize)]
    struct Rendering {
        title: String,
        messages: Vec<Turn>,
        add_generation_prompt: bool,
        text: Option<String>,
        error: Option<String>,
    }

    #[derive(serde::Deserialize)]
    struct Turn {
        role: String,
        content: String,
    }

    fn message(role: &str, content: &str) -> Message {
        let role = match role {
            "system" => Role::System,
            "user" => Role::User,
            "assistant" => Role::Assistant,
            other => panic!("{other}"),
        };
        Message {
            role,
            content: content.to_owned(),
        }
    }

    fn render(source: &str) -> Result<String, ChatError> {
        ChatTemplate::compile(source, [])?.render(&[message("user", "Hi")], true)
    }

    fn cause(error: &ChatError) -> String {
        std::error::Error::source(error).unwrap().to_string()
    }

    #[test]
    fn renders_what_transformers_renders() {
        let cases = include_str!("../../testdata/chat-templates/cases.json");
        let cases: Vec<Case> = serde_json::from_str(cases).unwrap();
        assert_eq!(cases.len(), 7);
        for case in cases {
            let template = ChatTemplate::compile(&case.source, case.special_tokens).unwrap();
            for rendering in case.renderings {
                let turns: Vec<_> = rendering
                    .messages
                    .iter()
                    .map(|turn| message(&turn.role, &turn.content))
                    .collect();
                let found = template.render(&turns, rendering.add_generation_prompt);
                let place = format!("{}, {}", case.name, rendering.title);
                match (found, rendering.text, rendering.error) {
                    (Ok(found), Some(text), None) => assert_eq!(found, text, "{place}"),
                    (Err(found), None, Some(error)) => {
                        assert!(cause(&found).contains(&error), "{place}: {}", cause(&found));
                    }
                    (found, text, error) => panic!("{place}: {found:?}, {text:?}, {error:?}"),
                }
            }
        }
    }

    #[test]
    fn a_template_that_does_not_end_runs_out_of_its_budget() {
        let endless =
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
        let huge = "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}";
        for source in [endless, huge] {
            let error = render(source).unwrap_err();
            assert!(cause(&error).contains("fuel"), "{}", cause(&error));
        }
    }

    #[test]
    fn a_template_reaches_no_other_template() {
        for source in [
            "{% include 'chat_template.jinja' %}",
            "{% import '/etc/passwd' as x %}",
        ] {
            assert!(
                matches!(render(source), Err(ChatError::Refused(_))),
                "{source}"
            );
        }
    }

    #[test]
    fn a_template_that_is_not_jinja_does_not_compile() {
        let error = ChatTemplate::compile("{% for x in %}", []).unwrap_err();
        assert!(matches!(error, ChatError::Malformed(_)));
    }

    #[test]
    fn the_clock_stands_still_and_knows_its_own_limits() {
        assert_eq!(
            render("{{ strftime_now('%-d.%-m.%y %j%%') }}").unwrap(),
            "26.7.24 208%"
        );
        let error = render("{{ strftime_now('%Q') }}").unwrap_err();
        assert!(cause(&error).contains("`%Q`"), "{}", cause(&error));
    }
}
