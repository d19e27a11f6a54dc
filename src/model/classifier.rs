//! A decoder with a matrix of labels in place of its output matrix: tokens in, one logit for each label out.
//!
//! What transformers calls `...ForSequenceClassification`: the logits of a text are the products of its last token's final hidden state
//! with the rows of `score.weight`. What a family does to the logits of its vocabulary, such as a cap, it does not do to these.

use panacea_formats::TensorView;

use super::config::{Config, Logits};
use super::decoder::{Decoder, PackError};
use super::pack::{Pack, Prediction};
use super::point::Point;
use super::targets::TargetSelection;
use super::weights::{Output, Space, WeightsError};

/// A decoder that tells texts apart by labels.
#[derive(Debug)]
pub struct Classifier<'c> {
    decoder: Decoder<'c>,
    padding: Option<u32>,
}

impl<'c> Classifier<'c> {
    /// Resolves the tensors of `config` among `tensors`, with a `score.weight` of `labels` rows.
    ///
    /// `padding`: `pad_token_id` of its `config.json`. A text's logits are those at its last token that is another, as in transformers;
    /// where the end-of-sequence token is also the padding, that is the one before the end.
    ///
    /// # Errors
    /// [`WeightsError`] as for [`Decoder::new`].
    pub fn new<I>(
        config: Config,
        tensors: I,
        labels: usize,
        padding: Option<u32>,
    ) -> Result<Self, WeightsError>
    where
        I: IntoIterator<Item = TensorView<'c>>,
    {
        let config = Config {
            logits: Logits {
                scale: 1.0,
                softcap: None,
            },
            ..config
        };
        // Nothing is optimized, but a decoder has targets.
        let selection = TargetSelection::default();
        let space = Space::Weights(&selection);
        let decoder = Decoder::in_space(config, tensors, space, Output::Labels(labels))?;
        Ok(Self { decoder, padding })
    }

    /// The logits of `texts`, which are computed together: texts x labels.
    ///
    /// # Errors
    /// [`PackError`] when a text is empty, or a token is outside of the vocabulary.
    pub fn logits(&mut self, texts: &[Vec<u32>]) -> Result<Vec<f32>, PackError> {
        if let Some(index) = texts.iter().position(Vec::is_empty) {
            return Err(PackError::EmptyPrompt { index });
        }
        let mut pack = Pack {
            starts: vec![0],
            ..Pack::default()
        };
        for text in texts {
            let is_text = |&token: &u32| Some(token) != self.padding;
            let last = text.iter().rposition(is_text).unwrap_or(0);
            pack.predictions.push(Prediction {
                position: pack.tokens.len() + last,
                // Nothing is predicted; any token of the vocabulary will do.
                token: text[last],
            });
            pack.tokens.extend_from_slice(text);
            pack.starts.push(pack.tokens.len());
        }
        self.decoder.logits(Point::stored(), &pack)
    }
}
