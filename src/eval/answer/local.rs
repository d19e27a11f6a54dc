//! Answers of a decoder in this process.

use std::ops::ControlFlow;

use super::{Answer, AnswerError, Answerer, Each};
use crate::data::{Encoder, Request};
use crate::eval::measure::point;
use crate::model::{Decoder, Generation, TargetTensors};

/// A decoder with its tokenizer and template.
#[derive(Debug)]
pub struct Local<'l, 'c> {
    decoder: &'l mut Decoder<'c>,
    encoder: &'l Encoder,
    /// What is added to the stored targets.
    delta: Option<&'l TargetTensors>,
    identity: String,
}

impl<'l, 'c> Local<'l, 'c> {
    /// The checkpoint's own answers. `identity` names weights, tokenizer and template.
    pub fn new(decoder: &'l mut Decoder<'c>, encoder: &'l Encoder, identity: String) -> Self {
        Self {
            decoder,
            encoder,
            delta: None,
            identity,
        }
    }

    /// The answers with `delta` added to the targets, in f32. `identity` is then to name it as well.
    #[must_use]
    pub fn moved(self, delta: &'l TargetTensors) -> Self {
        Self {
            delta: Some(delta),
            ..self
        }
    }
}

impl Answerer for Local<'_, '_> {
    fn identity(&self) -> String {
        self.identity.clone()
    }

    fn answer(
        &mut self,
        requests: &[&Request],
        max_new_tokens: usize,
        each: &mut Each<'_>,
    ) -> Result<(), AnswerError> {
        let encode = |request: &&Request| self.encoder.prompt(request);
        let prompts = requests.iter().map(encode).collect::<Result<Vec<_>, _>>()?;
        let ends = self.encoder.ends();
        let mut generation = Generation::of(max_new_tokens);
        generation.stop = ends.to_vec();
        generation.at_once = AT_ONCE;
        let point = point(self.delta);
        let mut problem = None;
        let flow =
            self.decoder
                .generate_each(point, &prompts, &generation, &mut |index, tokens| {
                    // The end is no part of the text, be it a special token or not.
                    let (said, ended) = match tokens.split_last() {
                        Some((last, said)) if ends.contains(last) => (said, true),
                        _ => (tokens, false),
                    };
                    match self.encoder.decode(said) {
                        Ok(text) => each(index, Answer { text, ended }),
                        Err(error) => {
                            problem = Some(error);
                            ControlFlow::Break(())
                        }
                    }
                })?;
        match (problem, flow) {
            (Some(error), _) => Err(error.into()),
            (None, ControlFlow::Break(())) => Err(AnswerError::Interrupted),
            (None, ControlFlow::Continue(())) => Ok(()),
        }
    }
}

/// Sequences that advance together: enough rows for a matrix to be read once for many of them.
const AT_ONCE: usize = 32;
