//! Rows as token ids.
//!
//! In: the tokenizer files of a checkpoint and rows of a data set. Out: [`EncodedRow`]s for the decoder. The parts of a row are tokenized
//! apart, without the tokenizer's own special tokens, and joined: prompt, response, end-of-sequence token; cut to a maximum length; the
//! loss is taken on the response and on that last token. A row of which the cut leaves no response is refused, never trained on
//! as nothing.

use std::fmt;
use std::io;
use std::path::PathBuf;

use panacea_formats::Problems;
use thiserror::Error;
use tokenizers::{PostProcessor, Tokenizer, TruncationDirection};

use super::chat::ChatError;
use super::dataset::Place;
use super::rows::{Example, Request};
use super::side_files::{Eos, SideFiles, TokenizerFiles};
use super::template::{Segment, Template, TemplateChoice, TemplateError};
use crate::model::EncodedRow;

/// Turns the rows of data sets into tokens for one checkpoint.
pub struct Encoder {
    tokenizer: Tokenizer,
    template: Template,
    max_length: usize,
    vocabulary: usize,
    eos: Eos,
    /// Those that end an answer.
    ends: Vec<u32>,
    special_tokens: SpecialTokens,
}

/// Which special tokens a prompt has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SpecialTokens {
    /// Those that its text spells.
    #[default]
    Spelled,
    /// Also those that the tokenizer puts around a text, such as a beginning-of-sequence token; not a second time where the text begins
    /// with it.
    Added,
}

impl Encoder {
    /// Reads the tokenizer and settles on a template.
    ///
    /// `max_length`: tokens in a row at most. `vocabulary`: how many rows the model's embedding has.
    ///
    /// # Errors
    /// [`EncodeError`] when a file cannot be read or understood, no end-of-sequence token is named, or `choice` is
    /// [`TemplateChoice::Chat`] and there is no chat template.
    pub fn open(
        files: &TokenizerFiles,
        choice: TemplateChoice,
        max_length: usize,
        vocabulary: usize,
    ) -> Result<Self, EncodeError> {
        let mut tokenizer = Tokenizer::from_bytes(files.tokenizer.read()?).map_err(|source| {
            EncodeError::Tokenizer {
                path: files.tokenizer.name().to_owned(),
                source,
            }
        })?;
        // A tokenizer.json can carry settings of the program that saved it; rows are cut and batched here.
        tokenizer.with_padding(None);
        tokenizer
            .with_truncation(None)
            .map_err(EncodeError::Tokenize)?;
        let side = SideFiles::read(files)?;
        let eos = Eos::find(&side, &tokenizer)?;
        if eos.id as usize >= vocabulary {
            return Err(EncodeError::VocabularyDoesNotFit {
                place: None,
                token: eos.id,
                vocabulary,
            });
        }
        let template = match choice {
            TemplateChoice::Raw => Template::Raw,
            TemplateChoice::Alpaca => Template::Alpaca,
            TemplateChoice::Chat => {
                Template::Chat(side.chat_template()?.ok_or(EncodeError::NoChatTemplate)?)
            }
            TemplateChoice::Auto => side
                .chat_template()?
                .map_or(Template::Alpaca, Template::Chat),
        };
        Ok(Self {
            tokenizer,
            template,
            max_length,
            vocabulary,
            ends: eos.with_others(&side),
            eos,
            special_tokens: SpecialTokens::default(),
        })
    }

    /// Writes prompts with another template.
    #[must_use]
    pub fn with_template(self, template: Template) -> Self {
        Self { template, ..self }
    }

    /// Chooses the special tokens of prompts. Rows of data sets have those that their template spells.
    #[must_use]
    pub fn with_special_tokens(self, special_tokens: SpecialTokens) -> Self {
        Self {
            special_tokens,
            ..self
        }
    }

    /// The template that is used; its `Display` is a phrase for people.
    pub fn template(&self) -> &Template {
        &self.template
    }

    /// The end-of-sequence token.
    pub fn eos(&self) -> u32 {
        self.eos.id
    }

    /// The tokens that end an answer: the end-of-sequence token, and others that the side files name.
    pub fn ends(&self) -> &[u32] {
        &self.ends
    }

    /// The text of the end-of-sequence token; empty if the tokenizer does not know it.
    pub fn eos_text(&self) -> &str {
        &self.eos.text
    }

    /// The tokens of every example, in order.
    ///
    /// # Errors
    /// [`EncodeError::Template`] for the first row that the template has no text for, [`EncodeError::VocabularyDoesNotFit`] for the first
    /// with a token that the model does not know, and [`EncodeError::NoResponseLeft`] for all whose response is cut away.
    pub fn encode(&self, examples: &[Example]) -> Result<Vec<EncodedRow>, EncodeError> {
        let mut rows = Vec::with_capacity(examples.len());
        let mut cut = Vec::new();
        for example in examples {
            match self.row(example)? {
                Some(row) => rows.push(row),
                None => cut.push(example.place),
            }
        }
        Problems::none_of(cut).map_err(|cut| EncodeError::NoResponseLeft {
            cut,
            rows: examples.len(),
            max_length: self.max_length,
        })?;
        Ok(rows)
    }

    /// The tokens that the model is given before it answers `request`, at most the last `max_length` of them; special tokens that are
    /// added around them count, and stay.
    ///
    /// # Errors
    /// [`EncodeError::VocabularyDoesNotFit`], or [`EncodeError::Tokenize`]; [`EncodeError::Prompt`] when the chat template refuses.
    pub fn prompt(&self, request: &Request) -> Result<Vec<u32>, EncodeError> {
        let text = self.template.prompt(request).map_err(EncodeError::Prompt)?;
        // The question's end, and the template's call for an answer, matter more than its beginning.
        let tokens = match self.special_tokens {
            SpecialTokens::Added => self.surrounded(&text)?,
            SpecialTokens::Spelled => {
                let mut tokens = self.tokens(&text)?;
                tokens.drain(..tokens.len().saturating_sub(self.max_length));
                tokens
            }
        };
        self.in_vocabulary(&tokens, None)?;
        Ok(tokens)
    }

    /// The text of `tokens`, without special tokens.
    ///
    /// # Errors
    /// [`EncodeError::Tokenize`] when the tokenizer cannot.
    pub fn decode(&self, tokens: &[u32]) -> Result<String, EncodeError> {
        self.tokenizer
            .decode(tokens, true)
            .map_err(EncodeError::Tokenize)
    }

    /// None if the cut leaves no token of any response.
    fn row(&self, example: &Example) -> Result<Option<EncodedRow>, EncodeError> {
        let segments = self
            .template
            .segments(&example.dialogue, &self.eos.text)
            .map_err(|source| EncodeError::Template {
                place: example.place,
                source,
            })?;
        let mut row = EncodedRow {
            tokens: Vec::new(),
            in_loss: Vec::new(),
        };
        let mut responses_left = false;
        for segment in &segments {
            let (tokens, in_loss) = match segment {
                Segment::Context(text) => (self.tokens(text)?, false),
                Segment::Response(text) => (self.tokens(text)?, true),
                Segment::EndOfSequence => (vec![self.eos.id], true),
            };
            // The first token of a row is predicted by nothing, so that it alone is no response to learn.
            let predicted = row.tokens.len().max(1)..row.tokens.len() + tokens.len();
            let response = matches!(segment, Segment::Response(_)) && !predicted.is_empty();
            responses_left |= response && predicted.start < self.max_length;
            row.in_loss.extend(tokens.iter().map(|_| in_loss));
            row.tokens.extend(tokens);
        }
        row.tokens.truncate(self.max_length);
        row.in_loss.truncate(self.max_length);
        self.in_vocabulary(&row.tokens, Some(example.place))?;
        Ok(responses_left.then_some(row))
    }

    fn tokens(&self, text: &str) -> Result<Vec<u32>, EncodeError> {
        self.tokenizer
            .encode_fast(text, false)
            .map(|encoding| encoding.get_ids().to_vec())
            .map_err(EncodeError::Tokenize)
    }

    /// The last tokens of `text` between the special tokens that the tokenizer adds, at most `max_length` with them, as transformers cuts with
    /// `truncation_side="left"`.
    fn surrounded(&self, text: &str) -> Result<Vec<u32>, EncodeError> {
        let mut encoding = self
            .tokenizer
            .encode_fast(text, false)
            .map_err(EncodeError::Tokenize)?;
        let processor = self.tokenizer.get_post_processor();
        let added = processor.map_or(0, |it| it.added_tokens(false));
        let left = self.max_length.saturating_sub(added);
        encoding.truncate(left, 0, TruncationDirection::Left);
        let encoding = self
            .tokenizer
            .post_process(encoding, None, true)
            .map_err(EncodeError::Tokenize)?;
        let tokens = encoding.get_ids();
        Ok(match (tokens, encoding.get_special_tokens_mask()) {
            ([added, spelled, ..], [1, 0, ..]) if added == spelled => tokens[1..].to_vec(),
            _ => tokens.to_vec(),
        })
    }

    fn in_vocabulary(&self, tokens: &[u32], place: Option<Place>) -> Result<(), EncodeError> {
        match tokens.iter().find(|&&id| id as usize >= self.vocabulary) {
            None => Ok(()),
            Some(&token) => Err(EncodeError::VocabularyDoesNotFit {
                place,
                token,
                vocabulary: self.vocabulary,
            }),
        }
    }
}

impl fmt::Debug for Encoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Encoder")
            .field("template", &self.template)
            .field("max_length", &self.max_length)
            .field("vocabulary", &self.vocabulary)
            .field("eos", &self.eos)
            .field("special_tokens", &self.special_tokens)
            .finish_non_exhaustive()
    }
}

/// Why rows do not become tokens.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum EncodeError {
    /// No `tokenizer.json`; the older `tokenizer.model` is not read.
    #[error("the checkpoint has no `tokenizer.json`")]
    NoTokenizer,
    /// A file that cannot be opened or read.
    #[error("cannot read `{}`", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A side file that is not the JSON object it should be.
    #[error("`{}` is not a JSON object", path.display())]
    SideFile {
        /// The file.
        path: PathBuf,
        /// Where it goes wrong; none if it is JSON of another kind.
        source: Option<serde_json::Error>,
    },
    /// A chat template in a file that is not UTF-8.
    #[error("`{}` is not UTF-8 text", path.display())]
    NotText {
        /// The file.
        path: PathBuf,
        /// Where it goes wrong.
        source: std::string::FromUtf8Error,
    },
    /// A tokenizer that the `tokenizers` crate does not take.
    #[error("cannot use the tokenizer `{}`", path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What it says.
        source: tokenizers::Error,
    },
    /// A text that the tokenizer gives up on.
    #[error("the tokenizer fails on a text")]
    Tokenize(#[source] tokenizers::Error),
    /// No file names an end-of-sequence token that the tokenizer knows.
    #[error(
        "no end-of-sequence token: looked for `eos_token` in tokenizer_config.json and special_tokens_map.json, and for `eos_token_id` in generation_config.json and config.json"
    )]
    NoEos,
    /// A chat template was asked for.
    #[error(
        "the checkpoint has no chat template, neither in chat_template.jinja nor in tokenizer_config.json"
    )]
    NoChatTemplate,
    /// A chat template that cannot be used.
    #[error(transparent)]
    ChatTemplate(#[from] ChatError),
    /// A row that the template has no text for.
    #[error("{place} does not fit the template")]
    Template {
        /// Where the row stands.
        place: Place,
        /// What is wrong with it.
        source: TemplateError,
    },
    /// A request that the template has no text for.
    #[error("a request does not fit the template")]
    Prompt(#[source] TemplateError),
    /// A tokenizer with more tokens than the model.
    #[error(
        "the vocabulary does not fit: token {token}{}, but the model knows {vocabulary} tokens",
        at(place)
    )]
    VocabularyDoesNotFit {
        /// The row; none for the end-of-sequence token and for prompts.
        place: Option<Place>,
        /// The token's id.
        token: u32,
        /// How many tokens the model knows.
        vocabulary: usize,
    },
    /// Rows whose prompt fills the maximum length.
    #[error("{} of {rows} rows keep no token of their response when cut to {max_length} tokens: {cut}", cut.all().len())]
    NoResponseLeft {
        /// Which rows.
        cut: Problems<Place>,
        /// How many rows there are.
        rows: usize,
        /// The maximum length.
        max_length: usize,
    },
}

fn at(place: &Option<Place>) -> String {
    place
        .as_ref()
        .map_or_else(String::new, |place| format!(" in {place}"))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::super::data_path::DataPath;
    use super::super::dataset::Dataset;
    use super::*;

    /// What transformers makes of testdata/tokenizer/rows.jsonl.
    #[derive(serde::Deserialize)]
    struct Expected {
        max_length: usize,
        vocabulary: usize,
        alpaca: Vec<Row>,
        chat: Vec<Row>,
    }

    #[derive(serde::Deserialize)]
    struct Row {
        tokens: Vec<u32>,
        in_loss: Vec<bool>,
    }

    fn directory() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/tokenizer")
    }

    fn expected() -> Expected {
        serde_json::from_slice(&fs::read(directory().join("expected.json")).unwrap()).unwrap()
    }

    fn rows() -> Vec<Example> {
        let path = directory().join("rows.jsonl");
        Dataset::open(&DataPath::from(path.as_path())).unwrap().rows
    }

    fn encoder(choice: TemplateChoice, max_length: usize) -> Encoder {
        let files = TokenizerFiles::in_directory(&directory()).unwrap();
        Encoder::open(&files, choice, max_length, expected().vocabulary).unwrap()
    }

    /// The files of the fixture in a directory of their own, to be changed.
    fn copy() -> tempfile::TempDir {
        let copy = tempfile::tempdir().unwrap();
        for name in ["tokenizer.json", "tokenizer_config.json"] {
            fs::copy(directory().join(name), copy.path().join(name)).unwrap();
        }
        copy
    }

    fn open(directory: &Path, choice: TemplateChoice) -> Result<Encoder, EncodeError> {
        Encoder::open(&TokenizerFiles::in_directory(directory)?, choice, 64, 702)
    }

    fn assert_rows(found: &[EncodedRow], expected: &[Row]) {
        assert_eq!(found.len(), expected.len());
        for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
            assert_eq!(found.tokens, expected.tokens, "row {i}");
            assert_eq!(found.in_loss, expected.in_loss, "row {i}");
        }
    }

    #[test]
    fn alpaca_rows_have_the_tokens_that_transformers_gives_them() {
        let Expected {
            alpaca, max_length, ..
        } = expected();
        let encoder = encoder(TemplateChoice::Alpaca, max_length);
        assert_rows(&encoder.encode(&rows()[..alpaca.len()]).unwrap(), &alpaca);
    }

    #[test]
    fn chat_rows_have_the_tokens_that_transformers_gives_them() {
        let Expected {
            chat, max_length, ..
        } = expected();
        for choice in [TemplateChoice::Chat, TemplateChoice::Auto] {
            let encoder = encoder(choice, max_length);
            assert_rows(&encoder.encode(&rows()).unwrap(), &chat);
        }
    }

    #[test]
    fn a_row_is_cut_in_its_response_but_never_before_it() {
        let row = &rows()[..1];
        let whole = encoder(TemplateChoice::Raw, 64)
            .encode(row)
            .unwrap()
            .remove(0);
        let prompt = whole.in_loss.iter().take_while(|&&marked| !marked).count();
        let cut = encoder(TemplateChoice::Raw, prompt + 1)
            .encode(row)
            .unwrap()
            .remove(0);
        assert_eq!(cut.tokens, whole.tokens[..prompt + 1]);
        assert_eq!(cut.predicted(), 1);
        let error = encoder(TemplateChoice::Raw, prompt)
            .encode(row)
            .unwrap_err();
        assert!(matches!(error, EncodeError::NoResponseLeft { rows: 1, .. }));
    }

    #[test]
    fn rows_that_the_cut_leaves_nothing_of_are_all_counted() {
        let error = encoder(TemplateChoice::Alpaca, 2)
            .encode(&rows()[..6])
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "6 of 6 rows keep no token of their response when cut to 2 tokens: line 1; line 2; line 3; line 4; line 5; line 6"
        );
    }

    #[test]
    fn added_special_tokens_stay_when_a_prompt_is_cut_and_are_not_doubled() {
        let open = |max_length, special| {
            encoder(TemplateChoice::Raw, max_length).with_special_tokens(special)
        };
        let text = Request::new("What is the capital of Australia?");
        let bare = open(64, SpecialTokens::Spelled).prompt(&text).unwrap();
        let begin = open(64, SpecialTokens::Spelled)
            .prompt(&Request::new("<|begin|>"))
            .unwrap();
        assert_eq!(begin.len(), 1);
        let whole = [begin.clone(), bare.clone()].concat();
        assert_eq!(open(64, SpecialTokens::Added).prompt(&text).unwrap(), whole);
        let spelled = Request::new(format!("<|begin|>{}", text.text));
        assert_eq!(
            open(64, SpecialTokens::Added).prompt(&spelled).unwrap(),
            whole
        );
        let cut = open(4, SpecialTokens::Added).prompt(&text).unwrap();
        assert_eq!(cut, [&begin, &bare[bare.len() - 3..]].concat());
    }

    #[test]
    fn prompts_are_cut_at_their_beginning() {
        let request = Request::new("What is the capital of Australia?");
        let whole = encoder(TemplateChoice::Chat, 64).prompt(&request).unwrap();
        let cut = encoder(TemplateChoice::Chat, 4).prompt(&request).unwrap();
        assert_eq!(cut, whole[whole.len() - 4..]);
        let text = encoder(TemplateChoice::Chat, 64).decode(&whole).unwrap();
        assert_eq!(text, "\nWhat is the capital of Australia?\n\n");
    }

    #[test]
    fn a_token_that_the_model_does_not_know_is_refused() {
        let files = TokenizerFiles::in_directory(&directory()).unwrap();
        // <|user|> and <|assistant|> are the last two ids of the fixture.
        let encoder = Encoder::open(&files, TemplateChoice::Chat, 64, 700).unwrap();
        let error = encoder.encode(&rows()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the vocabulary does not fit: token 700 in line 1, but the model knows 700 tokens"
        );
        let error = Encoder::open(&files, TemplateChoice::Raw, 64, 1).unwrap_err();
        assert!(matches!(
            error,
            EncodeError::VocabularyDoesNotFit {
                place: None,
                token: 1,
                ..
            }
        ));
    }

    #[test]
    fn the_end_of_sequence_comes_from_the_first_file_that_names_a_known_token() {
        let copy = copy();
        let write = |name: &str, json: &str| fs::write(copy.path().join(name), json).unwrap();
        write("tokenizer_config.json", r#"{"eos_token": "<|unknown|>"}"#);
        let eos = || open(copy.path(), TemplateChoice::Raw).map(|encoder| encoder.eos());
        assert!(matches!(eos(), Err(EncodeError::NoEos)));
        write("config.json", r#"{"eos_token_id": 5}"#);
        assert_eq!(eos().unwrap(), 5);
        write("generation_config.json", r#"{"eos_token_id": [6, 7]}"#);
        assert_eq!(eos().unwrap(), 6);
        write("generation_config.json", r#"{"eos_token_id": null}"#);
        assert_eq!(eos().unwrap(), 5);
        write("tokenizer_config.json", r#"{"eos_token": "<|begin|>"}"#);
        assert_eq!(eos().unwrap(), 0);
    }

    /// Answers went on behind the end of a turn, where that is another token than the end of a text.
    #[test]
    fn answers_end_with_every_token_that_the_generation_config_names() {
        let copy = copy();
        let write = |name: &str, json: &str| fs::write(copy.path().join(name), json).unwrap();
        let ends = || {
            open(copy.path(), TemplateChoice::Raw)
                .unwrap()
                .ends()
                .to_vec()
        };
        write("tokenizer_config.json", r#"{"eos_token": "<|begin|>"}"#);
        write("config.json", r#"{"eos_token_id": [0, 5]}"#);
        assert_eq!(ends(), [0, 5]);
        write("generation_config.json", r#"{"eos_token_id": [6, 0, 7]}"#);
        assert_eq!(ends(), [0, 6, 7]);
        write("generation_config.json", r#"{"eos_token_id": 6}"#);
        assert_eq!(ends(), [0, 6]);
    }

    #[test]
    fn auto_is_alpaca_without_a_chat_template() {
        let copy = copy();
        let config = copy.path().join("tokenizer_config.json");
        fs::write(
            &config,
            r#"{"eos_token": "<|end|>", "chat_template": null}"#,
        )
        .unwrap();
        let encoder = open(copy.path(), TemplateChoice::Auto).unwrap();
        assert!(matches!(encoder.template(), Template::Alpaca));
        let error = open(copy.path(), TemplateChoice::Chat).unwrap_err();
        assert!(matches!(error, EncodeError::NoChatTemplate));
    }

    #[test]
    fn a_template_in_its_own_file_goes_first() {
        let copy = copy();
        fs::write(copy.path().join("chat_template.jinja"), "{{ bos_token }}!").unwrap();
        let encoder = open(copy.path(), TemplateChoice::Auto).unwrap();
        let request = Request::new("x");
        assert_eq!(encoder.template().prompt(&request).unwrap(), "<|begin|>!");
    }

    #[test]
    fn files_that_are_not_what_they_should_be_are_named() {
        let copy = copy();
        let write = |name: &str, text: &str| fs::write(copy.path().join(name), text).unwrap();
        write("config.json", "[1]");
        let error = open(copy.path(), TemplateChoice::Raw).unwrap_err();
        assert!(matches!(error, EncodeError::SideFile { source: None, .. }));
        assert!(
            error
                .to_string()
                .ends_with("config.json` is not a JSON object")
        );
        write("config.json", "{}");
        write("tokenizer.json", "{\"version\":\"1.0\"}");
        let error = open(copy.path(), TemplateChoice::Raw).unwrap_err();
        assert!(matches!(error, EncodeError::Tokenizer { .. }));
        fs::remove_file(copy.path().join("tokenizer.json")).unwrap();
        let error = open(copy.path(), TemplateChoice::Raw).unwrap_err();
        assert!(matches!(error, EncodeError::NoTokenizer));
    }
}
