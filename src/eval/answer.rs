//! What a model says to a request.
//!
//! In: requests. Out: for each of them an [`Answer`], by whoever answers: the decoder here ([`Local`]), or a server ([`Endpoint`]).

pub mod endpoint;
mod local;

use std::ops::ControlFlow;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::data::{EncodeError, Request};
use crate::model::PackError;
use endpoint::ServerError;

pub use endpoint::{Endpoint, EndpointSettings};
pub use local::Local;

/// What a model said.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct Answer {
    /// Its text, without special tokens.
    pub text: String,
    /// Whether it came to its own end before the limit on its length.
    pub ended: bool,
}

/// Hears of each answer as it comes, with its request's place among those asked; [`ControlFlow::Break`] stops the work.
pub type Each<'f> = dyn FnMut(usize, Answer) -> ControlFlow<()> + Send + 'f;

/// Answers requests, greedily.
pub trait Answerer {
    /// What decides the answers besides the requests and their limit, so that answers kept from another run can be told apart: the
    /// digests of weights and tokenizer with the template, or a server's address and its model's name.
    fn identity(&self) -> String;

    /// Answers each of `requests` with at most `max_new_tokens` tokens, in any order.
    ///
    /// # Errors
    /// [`AnswerError`] when a request cannot be answered, or `each` stops the work.
    fn answer(
        &mut self,
        requests: &[&Request],
        max_new_tokens: usize,
        each: &mut Each<'_>,
    ) -> Result<(), AnswerError>;
}

/// Why there is no answer.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum AnswerError {
    /// A request that does not become tokens, or tokens that do not become text.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// A prompt that the model does not take.
    #[error(transparent)]
    Prompt(#[from] PackError),
    /// A request that a server does not answer.
    #[error("request number {place} has no answer")]
    Server {
        /// Its place among the requests, from 0.
        place: usize,
        /// Why.
        source: Box<ServerError>,
    },
    /// The work was asked to stop.
    #[error("interrupted")]
    Interrupted,
}

impl AnswerError {
    /// The error of requests that are some of others: `places` says where each of them is among those.
    #[must_use]
    pub fn among(self, places: &[usize]) -> Self {
        let of = |place: usize| places.get(place).copied().unwrap_or(place);
        match self {
            Self::Server { place, source } => Self::Server {
                place: of(place),
                source,
            },
            Self::Prompt(PackError::EmptyPrompt { index }) => {
                Self::Prompt(PackError::EmptyPrompt { index: of(index) })
            }
            other => other,
        }
    }
}
