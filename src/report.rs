//! A patch and its evaluation as one page of HTML that needs nothing else: no network, no script, no font.
//!
//! In: a [`Page`], plain data, of which every part may be missing, so that an evaluation without a search makes a report too.
//! Out: [`Page::html`], the same text for the same data. What is missing leaves no trace on the page.
//!
//! The data is not trusted. Requests, answers and names come from data sets and from models: every text is escaped, its control and
//! bidirectional characters are spelled out, and of an answer only an [`Opening`] is ever held, so that a harmful one's body
//! reaches neither the page nor the [`Page`]'s own serialization. Curves, maps and scatter plots are drawn by [`plotters`] as SVG
//! whose colours the page's style sheet decides, for light, dark and paper; each has a title, a description, and its data in a table.

mod affinity;
mod axis;
mod front;
mod number;
mod opening;
mod plot;
mod score;
mod search;
mod text;

use std::sync::LazyLock;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, HtmlEscape, Output, State, Value, escape_formatter};
use panacea_formats::Sha256;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::apply::Change;
use crate::eval::judge::Outcome;

pub use affinity::TensorEnergy;
pub use front::{Front, FrontPoint};
pub use opening::Opening;
pub use score::{Column, Comparison, Difference, Outcomes, Score};
pub use search::{RadiusSearch, Search, Series, SeriesUnit, Trial};

/// All that a report tells, each part of it optional.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Page {
    /// The heading; where empty, one that fits any report.
    pub title: String,
    /// What was done, in one sentence.
    pub summary: String,
    /// How it was done, and what was written.
    pub made: Option<Made>,
    /// What was demanded of the result.
    pub gates: Vec<Gate>,
    /// What was measured of each checkpoint.
    pub comparison: Option<Comparison>,
    /// Answers that changed.
    pub examples: Option<Examples>,
    /// Perturbations to choose from, by cost and harm.
    pub front: Option<Front>,
    /// What was measured while the perturbation was looked for.
    pub search: Option<Search>,
    /// The energy of the perturbation in each tensor: its safety affinity.
    pub affinity: Vec<TensorEnergy>,
    /// What rounding left of the perturbation.
    pub realized: Option<Realized>,
    /// What this report does not promise, in one paragraph; where empty, what holds for any.
    pub limits: String,
}

impl Page {
    /// The page.
    ///
    /// # Errors
    /// [`ReportError`] when it cannot be laid out or a figure cannot be drawn, for which no data is known.
    pub fn html(&self) -> Result<String, ReportError> {
        let failed = self
            .gates
            .iter()
            .filter(|gate| gate.ruling == Ruling::Failed);
        let context = Context {
            page: self,
            title: or(&self.title, "Patch report"),
            limits: or(&self.limits, LIMITS),
            failed_gates: failed.count(),
            measures: self.comparison.as_ref().map(Comparison::measures),
            bars: self.comparison.as_ref().map(Comparison::bars),
            panels: self.search.as_ref().map(Search::panels).transpose()?,
            steps: self.search.as_ref().map(Search::steps),
            radius_panels: self.radius().map(RadiusSearch::panels).transpose()?,
            trials: self.radius().map(RadiusSearch::rows),
            affinity: affinity::View::of(&self.affinity)?,
            front: self.front.as_ref().map(Front::view).transpose()?,
        };
        Ok(TEMPLATES.get_template(NAME)?.render(Serde(&context))?)
    }

    fn radius(&self) -> Option<&RadiusSearch> {
        let search = self.search.as_ref()?;
        search
            .radius
            .as_ref()
            .filter(|radius| !radius.trials.is_empty())
    }
}

/// How a result was made, and what was written.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Made {
    /// The method, such as `adaptive`.
    pub method: String,
    /// Every option that decides the result, in the order in which they are shown.
    pub settings: Vec<Setting>,
    /// Of everything random.
    pub seed: Option<u64>,
    /// The program with its version, such as `panacea-patch 0.1.0`.
    pub program: String,
    /// The digest of the manifest's bytes.
    pub manifest: Option<Sha256>,
    /// What was written, the manifest included.
    pub files: Vec<MadeFile>,
}

/// An option and its value, as a user would type them.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Setting {
    /// Its name.
    pub name: String,
    /// Its value.
    pub value: String,
}

/// A file that was written.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct MadeFile {
    /// Its path inside of the output.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// Its digest, where it is known.
    #[serde(default)]
    pub sha256: Option<Sha256>,
}

/// A demand, and whether the result meets it.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Gate {
    /// The demand as its user wrote it, such as `hs<=5`.
    pub demand: String,
    /// Whether it is met.
    pub ruling: Ruling,
    /// What was found, or why nothing could be.
    #[serde(default)]
    pub explanation: String,
}

/// Whether a demand is met. One that could not be measured has failed.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Ruling {
    /// It is.
    Met,
    /// It is not, or nobody knows.
    Failed,
}

/// What rounding to the stored types left of a perturbation.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Realized {
    /// Norm of the change that was wanted.
    pub wanted_norm: f64,
    /// Norm of the change that the stored values made.
    pub realized_norm: f64,
    /// Cosine of the angle between both; nothing when one of them is zero.
    #[serde(default)]
    pub cosine: Option<f64>,
    /// Elements whose stored value changed.
    pub moved: u64,
    /// Elements of the patched tensors.
    pub elements: u64,
    /// Norm of the patched tensors before.
    pub weight_norm: f64,
}

impl From<&Change> for Realized {
    fn from(change: &Change) -> Self {
        Self {
            wanted_norm: change.wanted_norm,
            realized_norm: change.realized_norm,
            cosine: change.cosine,
            moved: change.moved,
            elements: change.elements,
            weight_norm: change.weight_norm,
        }
    }
}

/// Answers that changed between two checkpoints.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Examples {
    /// The first checkpoint, as the comparison calls it.
    pub before: String,
    /// The second.
    pub after: String,
    /// How many outcomes changed, those shown included, where that is known.
    pub changed: Option<usize>,
    /// Those that are shown.
    pub shown: Vec<Example>,
}

/// A request, and how the answer to it changed.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Example {
    /// What was asked.
    pub request: String,
    /// What the first checkpoint said.
    pub before: Said,
    /// What the second checkpoint said.
    pub after: Said,
}

/// How an answer begins, and what it is.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Said {
    /// Its first words.
    pub opening: Opening,
    /// The judge's verdict.
    pub outcome: Outcome,
}

/// Why there is no page.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ReportError {
    /// The template asks for what the data has not.
    #[error("the page cannot be laid out")]
    Layout(#[from] minijinja::Error),
    /// A figure that cannot be drawn.
    #[error("a figure cannot be drawn")]
    Figure(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// What the template sees: the page, and what was made of its parts.
#[derive(Serialize)]
struct Context<'p> {
    page: &'p Page,
    title: &'p str,
    limits: &'p str,
    failed_gates: usize,
    measures: Option<Vec<score::MeasureRows>>,
    bars: Option<Vec<score::Bar>>,
    panels: Option<Vec<search::Panel>>,
    steps: Option<search::Steps>,
    radius_panels: Option<Vec<search::Panel>>,
    trials: Option<Vec<[String; 3]>>,
    affinity: Option<affinity::View>,
    front: Option<front::View>,
}

/// `text`, or `other` where it is empty.
fn or<'t>(text: &'t str, other: &'t str) -> &'t str {
    if text.is_empty() { other } else { text }
}

/// Prints every text that is not markup of this module's own harmlessly.
fn print(
    out: &mut Output<'_>,
    state: &mut State<'_, '_>,
    value: &Value,
) -> Result<(), minijinja::Error> {
    match value.as_str() {
        Some(text) if !value.is_safe() => {
            Ok(out.write_str(&HtmlEscape(&text::visible(text)).to_string())?)
        }
        _ => escape_formatter(out, state, value),
    }
}

/// What the template is called; the ending has its texts escaped.
const NAME: &str = "page.html";

/// What no report promises.
const LIMITS: &str = "These numbers are of these requests, this judge, these checkpoints and this seed. They do not show that the model is \
    safe: requests of other kinds, other languages, longer conversations and other ways of decoding were not tried, and a judge errs. They do not show \
    that the change holds against further fine-tuning or a determined attacker; it does not. An interval tells of the chance in drawing \
    requests, not of any of this. A digest or signature tells who made these files, not that they do no harm.";

static TEMPLATES: LazyLock<Environment<'static>> = LazyLock::new(|| {
    let mut templates = Environment::new();
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build()
        .expect("the usual delimiters");
    templates.set_syntax(syntax);
    templates.set_formatter(print);
    templates.add_filter("number", number::number);
    templates.add_filter("percent", number::percent);
    templates.add_filter("count", number::count);
    templates.add_filter("bytes", crate::number::bytes);
    templates
        .add_template(NAME, include_str!("report/page.html"))
        .expect("a template that the tests render");
    templates
});

#[cfg(test)]
mod tests;
