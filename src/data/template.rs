//! How a row becomes text, and which of it the loss is taken on.
//!
//! In: a [`Dialogue`]. Out: [`Segment`]s, which are tokenized apart: what the model is given, what it is to say, and where it is to stop.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

use super::chat::{ChatError, ChatTemplate};
use super::rows::{Dialogue, Message, Request, Role};

/// Which template is asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TemplateChoice {
    /// The checkpoint's own chat template if it has one, else Alpaca's.
    #[default]
    Auto,
    /// Stanford Alpaca's two prompts, with and without an input, as in the Panacea paper.
    Alpaca,
    /// The checkpoint's own chat template.
    Chat,
    /// No template: the request and the response as they stand.
    Raw,
}

impl FromStr for TemplateChoice {
    type Err = UnknownTemplate;

    fn from_str(text: &str) -> Result<Self, UnknownTemplate> {
        [Self::Auto, Self::Alpaca, Self::Chat, Self::Raw]
            .into_iter()
            .find(|choice| choice.to_string() == text)
            .ok_or_else(|| UnknownTemplate(text.to_owned()))
    }
}

impl fmt::Display for TemplateChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Alpaca => "alpaca",
            Self::Chat => "chat",
            Self::Raw => "raw",
        })
    }
}

/// Not the name of a template.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("`{0}` is none of `auto`, `alpaca`, `chat` and `raw`")]
pub struct UnknownTemplate(String);

/// The template that is used.
#[derive(Clone, Debug)]
pub enum Template {
    /// Stanford Alpaca's.
    Alpaca,
    /// The checkpoint's own.
    Chat(Box<ChatTemplate>),
    /// None.
    Raw,
}

/// A part of a row that is tokenized by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Segment {
    /// What the model is given: no loss.
    Context(String),
    /// What the model is to say.
    Response(String),
    /// Its end-of-sequence token.
    EndOfSequence,
}

impl Template {
    /// The segments of `dialogue`, which end with the response and [`Segment::EndOfSequence`].
    ///
    /// In a conversation every `assistant` turn is a response, written as the template writes it once it is history; turns after the
    /// last of them are left out. `eos` is the text of the end-of-sequence token: where a template closes a turn with it, it is a segment
    /// of its own.
    ///
    /// # Errors
    /// [`TemplateError`] when the template has no text for this dialogue.
    pub fn segments(&self, dialogue: &Dialogue, eos: &str) -> Result<Vec<Segment>, TemplateError> {
        match (self, dialogue) {
            (Self::Chat(template), Dialogue::Turns(turns)) => conversation(template, turns, eos),
            (_, Dialogue::Single { request, response }) => {
                Ok(single(self.prompt(request)?, response))
            }
            (_, Dialogue::Turns(turns)) => match &turns[..] {
                [
                    Message {
                        role: Role::User,
                        content,
                    },
                    Message {
                        role: Role::Assistant,
                        content: response,
                    },
                ] => {
                    let request = Request::new(content);
                    Ok(single(self.prompt(&request)?, response))
                }
                _ => Err(TemplateError::NotSingle { turns: turns.len() }),
            },
        }
    }

    /// The text that the model is given before it answers `request`. A chat template sees the request, an empty line and the input as
    /// one `user` turn.
    ///
    /// # Errors
    /// [`TemplateError::Chat`] when the chat template refuses, [`TemplateError::NotSingle`] when there is none for what was said before.
    pub fn prompt(&self, request: &Request) -> Result<String, TemplateError> {
        let Request {
            text,
            input,
            before,
        } = request;
        if !before.is_empty() && !matches!(self, Self::Chat(_)) {
            return Err(TemplateError::NotSingle {
                turns: before.len() + 1,
            });
        }
        Ok(match (self, input) {
            (Self::Alpaca, Some(input)) => format!(
                "{ALPACA}, paired with an input that provides further context. {ALPACA_WRITE}\n\n\
                 ### Instruction:\n{text}\n\n### Input:\n{input}\n\n### Response:\n"
            ),
            (Self::Alpaca, None) => {
                format!("{ALPACA}. {ALPACA_WRITE}\n\n### Instruction:\n{text}\n\n### Response:\n")
            }
            (Self::Raw, Some(input)) => format!("{text}\n\n{input}"),
            (Self::Raw, None) => text.clone(),
            (Self::Chat(template), _) => template.render(&request.turns(), true)?,
        })
    }
}

impl fmt::Display for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Alpaca => "Alpaca template",
            Self::Chat(_) => "the checkpoint's chat template",
            Self::Raw => "no template",
        })
    }
}

/// Why a template has no text for a dialogue.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TemplateError {
    /// The chat template itself.
    #[error(transparent)]
    Chat(#[from] ChatError),
    /// A conversation, for a template that knows one question and one answer.
    #[error(
        "a conversation of {turns} turns needs a chat template; without one, only a question and its answer fit"
    )]
    NotSingle {
        /// How many turns it has.
        turns: usize,
    },
    /// A template that writes a turn differently once it is history, so that no text holds all turns as they were.
    #[error(
        "the chat template rewrites the conversation before turn {turn} once it goes on, so its earlier answers cannot be trained on"
    )]
    RewritesHistory {
        /// The index of the turn before which the text changed.
        turn: usize,
    },
}

/// Source: the prompts of tatsu-lab/stanford_alpaca, which the reference code of the paper uses too.
const ALPACA: &str = "Below is an instruction that describes a task";
const ALPACA_WRITE: &str = "Write a response that appropriately completes the request.";

fn single(prompt: String, response: &str) -> Vec<Segment> {
    vec![
        Segment::Context(prompt),
        Segment::Response(response.to_owned()),
        Segment::EndOfSequence,
    ]
}

fn conversation(
    template: &ChatTemplate,
    turns: &[Message],
    eos: &str,
) -> Result<Vec<Segment>, TemplateError> {
    let answers: Vec<usize> = (0..turns.len())
        .filter(|&i| turns[i].role == Role::Assistant)
        .collect();
    let prompts = answers
        .iter()
        .map(|&i| template.render(&turns[..i], true))
        .collect::<Result<Vec<_>, _>>()?;
    let mut segments = Vec::new();
    // How much of the conversation's text the segments hold.
    let mut held = String::new();
    for (i, (&turn, prompt)) in answers.iter().zip(&prompts).enumerate() {
        let rewritten = TemplateError::RewritesHistory { turn };
        let Some(context) = prompt.strip_prefix(&held) else {
            return Err(rewritten);
        };
        let context = match context.strip_prefix(eos) {
            Some(rest) if i > 0 && !eos.is_empty() => {
                segments.push(Segment::EndOfSequence);
                rest
            }
            _ => context,
        };
        segments.push(Segment::Context(context.to_owned()));
        held.clone_from(prompt);
        let answer = turns[turn].content.as_str();
        // The last answer is followed by nothing, so it is taken as it stands; one that is followed by more is taken as it is written there.
        let written = match prompts.get(i + 1) {
            None => answer,
            Some(next) => {
                let after = next.strip_prefix(&held).unwrap_or_default();
                let spellings = [
                    answer,
                    answer.trim_end(),
                    answer.trim_start(),
                    answer.trim(),
                ];
                match spellings.into_iter().find(|text| after.starts_with(text)) {
                    Some(text) => text,
                    None => return Err(rewritten),
                }
            }
        };
        segments.push(Segment::Response(written.to_owned()));
        held.push_str(written);
    }
    segments.push(Segment::EndOfSequence);
    Ok(segments)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(text: &str, input: Option<&str>) -> Request {
        Request::new(text).about(input.map(str::to_owned))
    }

    fn turns(contents: &[(Role, &str)]) -> Dialogue {
        let turn = |&(role, content): &(Role, &str)| Message {
            role,
            content: content.to_owned(),
        };
        Dialogue::Turns(contents.iter().map(turn).collect())
    }

    fn chat(source: &str) -> Template {
        Template::Chat(Box::new(ChatTemplate::compile(source, []).unwrap()))
    }

    const SIMPLE: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</s>{% endfor %}\
                          {% if add_generation_prompt %}<assistant>{% endif %}";

    const TWO_ANSWERS: [(Role, &str); 5] = [
        (Role::User, "a"),
        (Role::Assistant, " b "),
        (Role::User, "c"),
        (Role::Assistant, " d "),
        (Role::User, "e"),
    ];

    #[test]
    fn raw_is_the_request_as_it_stands() {
        assert_eq!(Template::Raw.prompt(&request("q ", None)).unwrap(), "q ");
        assert_eq!(
            Template::Raw.prompt(&request("q", Some("i"))).unwrap(),
            "q\n\ni"
        );
    }

    #[test]
    fn a_chat_template_sees_instruction_and_input_as_one_turn() {
        let prompt = chat(SIMPLE).prompt(&request("q", Some("i"))).unwrap();
        assert_eq!(prompt, "<user>q\n\ni</s><assistant>");
    }

    #[test]
    fn what_was_said_before_needs_a_chat_template() {
        let request = Request {
            before: vec![Message {
                role: Role::System,
                content: "s".to_owned(),
            }],
            ..Request::new("q")
        };
        let prompt = chat(SIMPLE).prompt(&request).unwrap();
        assert_eq!(prompt, "<system>s</s><user>q</s><assistant>");
        for template in [Template::Alpaca, Template::Raw] {
            assert!(matches!(
                template.prompt(&request),
                Err(TemplateError::NotSingle { turns: 2 })
            ));
        }
    }

    #[test]
    fn every_answer_of_a_conversation_is_a_response() {
        let segments = chat(SIMPLE).segments(&turns(&TWO_ANSWERS), "</s>").unwrap();
        let context = |text: &str| Segment::Context(text.to_owned());
        let response = |text: &str| Segment::Response(text.to_owned());
        assert_eq!(
            segments,
            [
                context("<user>a</s><assistant>"),
                response("b"),
                Segment::EndOfSequence,
                context("<user>c</s><assistant>"),
                response(" d "),
                Segment::EndOfSequence,
            ]
        );
    }

    #[test]
    fn a_turn_that_closes_without_the_end_of_sequence_has_it_in_the_context() {
        let segments = chat(SIMPLE)
            .segments(&turns(&TWO_ANSWERS), "<eos>")
            .unwrap();
        let after_the_first = Segment::Context("</s><user>c</s><assistant>".to_owned());
        assert_eq!(segments[2], after_the_first);
        assert_eq!(segments.len(), 5);
    }

    #[test]
    fn a_template_that_rewrites_history_is_refused() {
        let forgets = "{{ messages[-1].content }}{% if add_generation_prompt %}>{% endif %}";
        let thinks = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}\
                      {% if add_generation_prompt %}<assistant><think>{% endif %}";
        for source in [forgets, thinks] {
            let error = chat(source)
                .segments(&turns(&TWO_ANSWERS), "</s>")
                .unwrap_err();
            assert!(
                matches!(error, TemplateError::RewritesHistory { .. }),
                "{error}"
            );
            // One answer has no history.
            assert!(
                chat(source)
                    .segments(&turns(&TWO_ANSWERS[..2]), "</s>")
                    .is_ok()
            );
        }
    }

    #[test]
    fn without_a_chat_template_a_question_and_its_answer_still_fit() {
        let pair = turns(&[(Role::User, "q"), (Role::Assistant, "a")]);
        let single = Dialogue::Single {
            request: request("q", None),
            response: "a".to_owned(),
        };
        for template in [Template::Alpaca, Template::Raw] {
            let found = template.segments(&pair, "</s>").unwrap();
            assert_eq!(found, template.segments(&single, "</s>").unwrap());
        }
        let error = Template::Alpaca
            .segments(&turns(&TWO_ANSWERS), "</s>")
            .unwrap_err();
        assert!(matches!(error, TemplateError::NotSingle { turns: 5 }));
    }

    #[test]
    fn choices_are_read_as_they_are_written() {
        for name in ["auto", "alpaca", "chat", "raw"] {
            assert_eq!(name.parse::<TemplateChoice>().unwrap().to_string(), name);
        }
        assert!("Alpaca".parse::<TemplateChoice>().is_err());
    }
}
