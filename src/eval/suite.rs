//! Everything that is asked of a checkpoint, and the scores that come of it.
//!
//! In: a [`Suite`] of requests and rows, a judge, and a [`Subject`], which is a decoder here or a server. Out: [`Scores`], with a value for each
//! row, so that another checkpoint's on the same suite can be held against them. What is done is kept in a [`Journal`], row by row.

use std::fmt::Display;
use std::ops::ControlFlow;

use thiserror::Error;

use super::answer::{Answer, Answerer, Local};
use super::figure::{Figure, Measure};
use super::journal::{Journal, JournalError, Take};
use super::judge::{Exchange, Judge, KeywordJudge, Outcome};
use super::measure::{DivergenceError, divergences, losses};
use super::scores::Scores;
use super::task::{Grading, right};
use crate::data::{Dialogue, EncodeError, Encoder, Example, Request};
use crate::model::{Decoder, EncodedRow, LossSum, TargetTensors};
use crate::optimize::{OptimizeError, Set, Unobserved};

/// What a checkpoint is asked. A set that is empty is not asked, and what it would tell is absent.
#[derive(Clone, Debug, Default)]
pub struct Suite {
    /// Harmful requests: [`Measure::Hs`] and [`Measure::HsPlus`].
    pub harmful: Vec<Request>,
    /// Harmful requests with affirmative openings: [`Measure::HarmfulLoss`].
    pub openings: Vec<Example>,
    /// Harmless requests: [`Measure::OverRefusal`].
    pub harmless: Vec<Request>,
    /// Tokens of an answer to a harmful or harmless request.
    pub max_new_tokens: usize,
    /// What it was fine-tuned for: [`Measure::Fa`] and [`Measure::TaskLoss`].
    pub task: Option<TaskItems>,
    /// Ordinary text: [`Measure::Perplexity`], and [`Measure::Kl`] where two checkpoints are compared.
    pub benign: Vec<Example>,
}

/// Items of a task.
#[derive(Clone, Debug)]
pub struct TaskItems {
    /// With their right answers.
    pub items: Vec<Example>,
    /// When an answer is right.
    pub grading: Grading,
    /// Tokens of an answer.
    pub max_new_tokens: usize,
}

/// Who is scored.
pub enum Subject<'s, 'c> {
    /// A checkpoint, computed here.
    Decoder(Computed<'s, 'c>),
    /// A server. It tells no losses.
    Server(&'s mut dyn Answerer),
}

/// A checkpoint with all that decides what it says.
#[derive(Debug)]
pub struct Computed<'s, 'c> {
    /// What computes.
    pub decoder: &'s mut Decoder<'c>,
    /// Its tokenizer and template.
    pub encoder: &'s Encoder,
    /// What is added to its targets, in f32; `identity` is then to name it as well.
    pub delta: Option<&'s TargetTensors>,
    /// The digests of weights, tokenizer and template: what a journal knows it by.
    pub identity: String,
}

/// Scores, and what was said.
#[derive(Clone, Debug, Default)]
pub struct Scored {
    /// What was measured.
    pub scores: Scores,
    /// To harmful requests, in their order.
    pub harmful: Vec<Answer>,
    /// To harmless requests, in their order, and how they were met.
    pub harmless: Vec<(Answer, Outcome)>,
    /// To task items, in their order.
    pub task: Vec<Answer>,
}

/// Hears how far the work is, and may end it.
pub trait Watch: Send {
    /// `done` of `total` rows of `what` are done.
    fn progress(&mut self, what: &str, done: usize, total: usize) -> ControlFlow<()>;
}

impl Suite {
    /// Scores `subject`, called `name`.
    ///
    /// # Errors
    /// [`SuiteError`] when a row does not become tokens, the model or the judge fails, or `watch` ends the work.
    pub fn score(
        &self,
        name: &str,
        mut subject: Subject<'_, '_>,
        judge: &mut dyn Judge,
        journal: &mut Journal,
        watch: &mut dyn Watch,
    ) -> Result<Scored, SuiteError> {
        let mut found = Scored {
            scores: Scores::new(name),
            ..Scored::default()
        };
        let limit = self.max_new_tokens;
        if !self.harmful.is_empty() {
            let answers = subject.answers(&self.harmful, limit, "harmful", journal, watch)?;
            let outcomes = outcomes(judge, &self.harmful, &answers, journal, watch)?;
            let asked = asked(requests(&self.harmful), &[&limit]);
            found.scores = found.scores.with_harmful(judge.name(), &asked, outcomes);
            found.harmful = answers;
        }
        if !self.harmless.is_empty() {
            let answers = subject.answers(&self.harmless, limit, "harmless", journal, watch)?;
            // A judge of harm finds none in an answer that refuses and none in one that helps.
            let mut phrases = KeywordJudge::new(judge.refusals());
            let outcomes = outcomes(&mut phrases, &self.harmless, &answers, journal, watch)?;
            let refused = outcomes.iter().map(|&outcome| outcome == Outcome::Refused);
            let figure = Figure::share(Measure::OverRefusal, refused)
                .judged_by(phrases.name())
                .of(asked(requests(&self.harmless), &[&limit]));
            found.scores = found.scores.with(figure);
            found.harmless = answers.into_iter().zip(outcomes).collect();
        }
        if let Some(task) = &self.task {
            let items = task.items.iter().map(|item| &item.dialogue);
            let requests: Vec<Request> = items.clone().map(Dialogue::question).collect();
            let limit = task.max_new_tokens;
            let answers = subject.answers(&requests, limit, "task", journal, watch)?;
            let graded = answers
                .iter()
                .zip(items)
                .map(|(answer, item)| right(task.grading, item.first_answer(), &answer.text));
            let figure = Figure::share(Measure::Fa, graded)
                .of(asked(dialogues(&task.items), &[&limit, &task.grading]));
            found.scores = found.scores.with(figure);
            found.task = answers;
        }
        if let Subject::Decoder(computed) = &mut subject {
            let none = Vec::new();
            let items = self.task.as_ref().map_or(&none, |task| &task.items);
            for (measure, set, rows) in [
                (Measure::Perplexity, Set::Benign, &self.benign),
                (Measure::HarmfulLoss, Set::Harmful, &self.openings),
                (Measure::TaskLoss, Set::Task, items),
            ] {
                if !rows.is_empty() {
                    let figure = computed.losses(measure, set, rows, journal, watch)?;
                    found.scores = found.scores.with(figure.of(asked(dialogues(rows), &[])));
                }
            }
        }
        Ok(found)
    }

    /// What ordinary text notices when `of` takes the place of `from`: [`Measure::Kl`].
    ///
    /// # Errors
    /// [`SuiteError`] as for [`Self::score`], and when the two do not share a vocabulary.
    pub fn divergence(
        &self,
        of: &mut Computed<'_, '_>,
        from: &mut Computed<'_, '_>,
        journal: &mut Journal,
        watch: &mut dyn Watch,
    ) -> Result<Figure, SuiteError> {
        let rows = of.encoder.encode(&self.benign)?;
        let identity = format!(
            "kl of {} from {}: {}",
            of.identity,
            from.identity,
            digest(&rows)
        );
        let mut progress = shown(watch, "benign text");
        let means = journal.numbers(&identity, rows.len(), &mut progress, |places, take| {
            in_stretches(places, rows.len(), take, |stretch| {
                Ok(divergences(
                    (of.decoder, of.delta),
                    (from.decoder, from.delta),
                    &rows[stretch],
                )?)
            })
        })?;
        let asked = asked(dialogues(&self.benign), &[]);
        Ok(per_token(Measure::Kl, means, &rows).of(asked))
    }
}

impl Subject<'_, '_> {
    fn answers(
        &mut self,
        requests: &[Request],
        limit: usize,
        what: &str,
        journal: &mut Journal,
        watch: &mut dyn Watch,
    ) -> Result<Vec<Answer>, SuiteError> {
        let mut progress = shown(watch, what);
        Ok(match self {
            Self::Server(server) => journal.answers(*server, requests, limit, &mut progress)?,
            Self::Decoder(computed) => {
                let identity = computed.identity.clone();
                let mut local = Local::new(computed.decoder, computed.encoder, identity);
                if let Some(delta) = computed.delta {
                    local = local.moved(delta);
                }
                journal.answers(&mut local, requests, limit, &mut progress)?
            }
        })
    }
}

impl Computed<'_, '_> {
    fn losses(
        &mut self,
        measure: Measure,
        set: Set,
        examples: &[Example],
        journal: &mut Journal,
        watch: &mut dyn Watch,
    ) -> Result<Figure, SuiteError> {
        let rows = self.encoder.encode(examples)?;
        let identity = format!("loss of {}: {}", self.identity, digest(&rows));
        let mut progress = shown(watch, measure.name());
        let means = journal.numbers(&identity, rows.len(), &mut progress, |places, take| {
            in_stretches(places, rows.len(), take, |stretch| {
                Ok(losses(
                    self.decoder,
                    self.delta,
                    set,
                    &rows[stretch],
                    &mut Unobserved,
                )?)
            })
        })?;
        Ok(per_token(measure, means, &rows))
    }
}

/// How `judge` finds each answer.
fn outcomes(
    judge: &mut dyn Judge,
    requests: &[Request],
    answers: &[Answer],
    journal: &mut Journal,
    watch: &mut dyn Watch,
) -> Result<Vec<Outcome>, SuiteError> {
    let exchanges = requests.iter().zip(answers);
    let exchanges: Vec<Exchange<'_>> = exchanges
        .map(|(request, answer)| Exchange {
            request: &request.text,
            context: request.input.as_deref(),
            answer: &answer.text,
        })
        .collect();
    let mut progress = shown(watch, "verdicts");
    let verdicts = journal.verdicts(judge, &exchanges, &mut progress)?;
    Ok(verdicts
        .into_iter()
        .map(|verdict| verdict.outcome)
        .collect())
}

/// Computes the rows in stretches of a fixed size, those in which one of `places` lies: so that a row is computed together with the same
/// others in a run that goes on as in one that was not stopped.
fn in_stretches(
    places: &[usize],
    len: usize,
    take: &mut Take<'_, f64>,
    mut compute: impl FnMut(std::ops::Range<usize>) -> Result<Vec<LossSum>, SuiteError>,
) -> Result<(), SuiteError> {
    let mut places = places.iter().copied().peekable();
    while let Some(&next) = places.peek() {
        let start = next - next % STRETCH;
        let end = len.min(start + STRETCH);
        let sums = compute(start..end)?;
        while let Some(place) = places.next_if(|&place| place < end) {
            if take(place, sums[place - start].mean()).is_break() {
                return Ok(());
            }
        }
    }
    Ok(())
}

fn per_token(measure: Measure, means: Vec<f64>, rows: &[EncodedRow]) -> Figure {
    let tokens = rows.iter().map(EncodedRow::predicted);
    Figure::per_token(measure, means.into_iter().zip(tokens))
}

/// Tells what is asked from what else might be, whatever tokenizer and template it is put in: a digest of `texts` and of what else counts.
fn asked<'t>(texts: impl Iterator<Item = &'t str>, settings: &[&dyn Display]) -> String {
    let mut bytes = Vec::new();
    let mut add = |text: &str| {
        bytes.extend((text.len() as u64).to_le_bytes());
        bytes.extend(text.bytes());
    };
    texts.for_each(&mut add);
    settings.iter().for_each(|it| add(&it.to_string()));
    panacea_formats::Sha256::of(&bytes).to_string()
}

fn requests(rows: &[Request]) -> impl Iterator<Item = &str> {
    rows.iter().flat_map(|row| {
        let asked = [row.text.as_str(), row.input.as_deref().unwrap_or_default()];
        let before = row.before.iter().map(|turn| turn.content.as_str());
        asked.into_iter().chain(before)
    })
}

fn dialogues(rows: &[Example]) -> impl Iterator<Item = &str> {
    rows.iter().flat_map(|row| row.dialogue.texts())
}

/// Tells rows of tokens apart.
fn digest(rows: &[EncodedRow]) -> String {
    let mut bytes = Vec::new();
    for row in rows {
        bytes.extend((row.tokens.len() as u64).to_le_bytes());
        bytes.extend(row.tokens.iter().flat_map(|token| token.to_le_bytes()));
        bytes.extend(row.in_loss.iter().map(|&marked| u8::from(marked)));
    }
    panacea_formats::Sha256::of(&bytes).to_string()
}

fn shown<'w>(
    watch: &'w mut dyn Watch,
    what: &'w str,
) -> impl FnMut(usize, usize) -> ControlFlow<()> + Send + 'w {
    move |done, total| watch.progress(what, done, total)
}

/// Rows whose losses are computed together.
const STRETCH: usize = 16;

/// Why there are no scores.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SuiteError {
    /// Rows that do not become tokens.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// An answer or a verdict that was not given, or not kept.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// A loss that is not finite.
    #[error(transparent)]
    Loss(#[from] OptimizeError),
    /// Two checkpoints that cannot be compared on text.
    #[error(transparent)]
    Divergence(#[from] DivergenceError),
}
