//! What a server that speaks OpenAI's API says to prompts: for looking at servers, and for comparing with other programs.
//!
//!     cargo run --release --example ask -- URL PROMPT [PROMPT ...] [--max-new-tokens N] [--raw]
//!
//! PROMPT is a chat's first turn; with --raw it is the text that the model is given. A key is taken from $API_KEY. Prints for each prompt one line
//! of JSON: `{"text": "..", "ended": true}`.

use std::error::Error;
use std::ops::ControlFlow;

use panacea_patch::data::{Request, Template};
use panacea_patch::eval::answer::endpoint::Form;
use panacea_patch::eval::answer::{Endpoint, EndpointSettings};
use panacea_patch::eval::journal::Journal;

#[expect(clippy::print_stdout, reason = "an example's output")]
fn main() -> Result<(), Box<dyn Error>> {
    let usage = "usage: ask URL PROMPT [PROMPT ...] [--max-new-tokens N] [--raw]";
    let mut arguments = std::env::args().skip(1);
    let url = arguments.next().ok_or(usage)?;
    let mut settings = EndpointSettings::to(url.parse()?);
    let mut requests = Vec::new();
    let mut max_new_tokens = 64;
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--raw" => settings.form = Form::Prompt(Template::Raw),
            "--max-new-tokens" => max_new_tokens = arguments.next().ok_or(usage)?.parse()?,
            other if other.starts_with("--") => return Err(usage.into()),
            _ => requests.push(Request::new(argument)),
        }
    }
    if let Ok(key) = std::env::var("API_KEY") {
        settings.api_key = Some(key.parse()?);
    }
    let answers = Journal::none().answers(
        &mut Endpoint::new(settings),
        &requests,
        max_new_tokens,
        &mut |_, _| ControlFlow::Continue(()),
    )?;
    for answer in answers {
        println!("{}", serde_json::to_string(&answer)?);
    }
    Ok(())
}
