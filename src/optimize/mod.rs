//! From a fine-tuned model and rows of text to a perturbation of its targets that brings refusals back.
//!
//! In: a [`Differentiable`] model at the fine-tuned weights w0, encoded [`Rows`], [`Settings`]. Out: an [`Outcome`] with delta, one
//! tensor for each target. No file is opened here and nothing is printed; an [`Observer`] hears of progress and may stop
//! the work.
//!
//! Losses are means over predicted tokens: h over the harmful set's affirmative openings, g over the task set, r over
//! refusals of the harmful requests; kl is the mean KL divergence from w0's own next-token distribution on benign text.
//!
//! | method | delta |
//! |---|---|
//! | [`Panacea`] | the paper's: (w_T - w0) + eps, with eps = rho grad h / norm(grad h) at w_T |
//! | [`Adaptive`] | normalized steps inside the ball of radius rho: h up to a cap, r down, g held |
//! | [`Random`] | Gaussian of norm rho: the control of every result |
//!
//! [`search`] tries many settings of [`Adaptive`] and takes the best.
//!
//! Source: Panacea, arXiv:2501.18100; the letters are its.

mod adamw;
mod adaptive;
pub(crate) mod engine;
mod fine_tune;
mod panacea;
mod radius;
mod random;
mod region;
mod search;
mod step;

pub use adaptive::{Adaptive, Order};
pub use engine::{OptimizeError, PACK_TOKENS, Set};
pub use fine_tune::{FineTuning, fine_tune};
pub use panacea::{FinalEps, Panacea, Part};
pub use radius::{Budget, Radius, RadiusError, RadiusPoint};
pub use random::{Random, gaussian};
pub use region::Region;
pub use search::{
    Choice, JudgedSet, MOST_RADII, Place, SearchOutcome, SearchSettings, Space, Trial, TrialPoint,
    Value, search, search_among,
};
pub use step::{Phase, StepRecord};

use std::borrow::Cow;

use crate::model::{Differentiable, EncodedRow, TargetTensors};
use crate::ranks::Group;
use engine::Engine;

/// The norm that an update of AdamW's is clipped to before it.
const CLIP: f64 = 1.0;

/// Encoded rows by their role.
#[derive(Clone, Debug, Default)]
pub struct Rows {
    /// Requests with affirmative openings: h.
    pub harmful: Vec<EncodedRow>,
    /// The same requests, in the same order, with refusals: r. Empty, or as long as `harmful`.
    pub refusals: Vec<EncodedRow>,
    /// The user's fine-tuning data: g. May be empty.
    pub task: Vec<EncodedRow>,
    /// Ordinary requests with answers: kl. May be empty.
    pub benign: Vec<EncodedRow>,
}

/// How to find a perturbation.
#[derive(Clone, Debug, PartialEq)]
pub enum Settings {
    /// Several normalized steps under constraints.
    Adaptive(Adaptive),
    /// The paper's.
    Panacea(Panacea),
    /// The control.
    Random(Random),
}

/// A perturbation, and what was measured on the way.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Outcome {
    /// What is added to each target, in the targets' order.
    pub delta: TargetTensors,
    /// What each step measured.
    pub steps: Vec<StepRecord>,
    /// The search for a radius, where there was one, in the order of its trials.
    pub radii: Vec<RadiusPoint>,
    /// Named results at the end, such as `h_final`, in a fixed order.
    pub results: Vec<(&'static str, f64)>,
}

/// Where a run stands between two steps: all that is needed to go on.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct State<'t> {
    /// What the steps so far measured; their number is the next step's.
    pub steps: Vec<StepRecord>,
    /// The method's tensors by name, in a fixed order.
    pub tensors: Vec<(String, Cow<'t, TargetTensors>)>,
}

impl State<'_> {
    /// The same state, with tensors of its own.
    pub fn into_owned(self) -> State<'static> {
        let own = |(name, tensors): (String, Cow<'_, TargetTensors>)| {
            (name, Cow::Owned(tensors.into_owned()))
        };
        State {
            steps: self.steps,
            tensors: self.tensors.into_iter().map(own).collect(),
        }
    }

    /// Takes out the tensors called `names`, each with as many elements per target as `shape` says.
    fn take<const N: usize>(
        &mut self,
        names: [&str; N],
        shape: &[usize],
    ) -> Result<[TargetTensors; N], OptimizeError> {
        let mut taken = Vec::with_capacity(N);
        for name in names {
            let place = self.tensors.iter().position(|(known, _)| known == name);
            let (_, tensors) = self.tensors.swap_remove(place.ok_or(OptimizeError::State)?);
            if !tensors.iter().map(<[f32]>::len).eq(shape.iter().copied()) {
                return Err(OptimizeError::State);
            }
            taken.push(tensors.into_owned());
        }
        taken.try_into().map_err(|_| OptimizeError::State)
    }
}

/// Hears of the work and may end it.
pub trait Observer {
    /// `done` of `total` tokens of the present piece of work, `what`, are computed.
    fn progress(&mut self, what: &str, done: usize, total: usize);

    /// A step is done.
    fn step(&mut self, record: &StepRecord);

    /// The run could be taken up again from `state`. Called after every step; whoever listens decides how often to keep one.
    fn state(&mut self, state: &State<'_>);

    /// Trial number `number` of a search is done. The search could be taken up again from all trials so far.
    fn trial(&mut self, _number: usize, _trial: &Trial) {}

    /// Whether to stop now; asked before each pack of tokens. Of several ranks the first decides.
    fn interrupted(&self) -> bool;

    /// Another rank was asked to stop. Where the first is to stop for it, its [`Self::interrupted`] says so from now on.
    fn stop(&mut self) {}
}

/// An [`Observer`] that does not listen.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unobserved;

impl Observer for Unobserved {
    fn progress(&mut self, _what: &str, _done: usize, _total: usize) {}
    fn step(&mut self, _record: &StepRecord) {}
    fn state(&mut self, _state: &State<'_>) {}
    fn interrupted(&self) -> bool {
        false
    }
}

/// Finds a perturbation, from the beginning or from where `resumed` stopped.
///
/// The same inputs and settings give the same bits, on any number of threads, resumed or not.
///
/// # Errors
/// [`OptimizeError`] when a set that the method needs is empty, when a loss or gradient is not finite or is zero (the batch is
/// named), or when the observer stops the work.
pub fn optimize(
    decoder: &mut dyn Differentiable,
    rows: &Rows,
    settings: &Settings,
    resumed: Option<State<'_>>,
    observer: &mut dyn Observer,
) -> Result<Outcome, OptimizeError> {
    optimize_among(
        &Group::default(),
        decoder,
        rows,
        settings,
        resumed,
        observer,
    )
}

/// The same by the ranks of `group`, each with the same arguments: the rows of a batch are shared among them, and all end with the
/// same outcome, bit for bit. That is one process's but for the order of sums.
///
/// A rank that returns with an error which is not of all has to [leave](Group::leave) the group, or the others wait for it.
///
/// # Errors
/// As [`optimize`], the same on all ranks; [`OptimizeError::Ranks`] where another has left.
pub fn optimize_among(
    group: &Group,
    decoder: &mut dyn Differentiable,
    rows: &Rows,
    settings: &Settings,
    resumed: Option<State<'_>>,
    observer: &mut dyn Observer,
) -> Result<Outcome, OptimizeError> {
    decoder.check_targets()?;
    let mut engine = Engine::new(decoder, observer).among(group);
    match settings {
        Settings::Adaptive(adaptive) => adaptive::run(&mut engine, rows, adaptive, resumed),
        Settings::Panacea(panacea) => panacea::run(&mut engine, rows, panacea, resumed),
        Settings::Random(random) => random::run(&mut engine, rows, random),
    }
}
