//! Several processes that share one search: ranks, each with the same program, inputs and seed, and its share of the rows.
//!
//! In: what each rank computed from its rows. Out: the sum or the list of it, the same bits on every rank. Whatever a rank decides follows
//! from such numbers, so all of them go the same way without being led, and at the end each has the whole result.
//!
//! An engine that exists moves the numbers: [`Ranks`] is what it has to do, [`Alone`] is one process, and MPI is behind the feature `mpi`. Sums may be
//! left to an [`Adder`]: NCCL's, between GPUs, is behind the feature `nccl`. The search talks to a [`Group`], which keeps ranks from waiting for
//! ever: before anything is summed they tell each other where they are, and one that cannot go on says so in the same place; one that fails in a
//! sum ends all.

#[cfg(feature = "mpi")]
mod mpi;
#[cfg(feature = "nccl")]
mod nccl;

use std::cell::{Cell, OnceCell};
use std::error::Error;
use std::fmt;
use std::rc::Rc;
use std::time::{Duration, Instant};

use thiserror::Error;

#[cfg(feature = "mpi")]
pub use self::mpi::{Mpi, MpiError};
#[cfg(feature = "nccl")]
pub use self::nccl::Nccl;
use crate::model::TargetTensors;

/// What moves numbers between ranks. Each call is made by all ranks, with values of the same length, in the same order, and by one thread of each.
pub trait Ranks {
    /// This one's number, from 0 on.
    fn rank(&self) -> usize;

    /// How many there are.
    fn size(&self) -> usize;

    /// The bytes of each rank, of any length, in the order of ranks.
    ///
    /// # Errors
    /// When the engine fails.
    fn gather(&self, own: &[u8]) -> Result<Vec<Vec<u8>>, EngineError>;

    /// Each element becomes its sum over all ranks, in any order, but the same bits on each.
    ///
    /// # Errors
    /// When the engine fails.
    fn sum(&self, values: &mut [f32]) -> Result<(), EngineError>;

    /// The values of rank 0 become those of all.
    ///
    /// # Errors
    /// When the engine fails.
    fn broadcast(&self, values: &mut [f32]) -> Result<(), EngineError>;

    /// Ends all ranks, this one too, where the others may wait for it and cannot hear why.
    fn abort(&self);
}

/// What sums for the ranks in place of their engine. All ranks call it as they would the engine.
pub trait Adder {
    /// As [`Ranks::sum`].
    ///
    /// # Errors
    /// When this rank's part fails.
    fn sum(&self, values: &mut [f32]) -> Result<(), EngineError>;
}

/// Why an engine failed, in its own words.
pub type EngineError = Box<dyn Error + Send + Sync>;

/// One process: what it has is the sum.
#[derive(Clone, Copy, Debug, Default)]
pub struct Alone;

impl Ranks for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn gather(&self, own: &[u8]) -> Result<Vec<Vec<u8>>, EngineError> {
        Ok(vec![own.to_vec()])
    }

    fn sum(&self, _values: &mut [f32]) -> Result<(), EngineError> {
        Ok(())
    }

    fn broadcast(&self, _values: &mut [f32]) -> Result<(), EngineError> {
        Ok(())
    }

    fn abort(&self) {}
}

/// The ranks of one search, as one of them sees them. Clones are the same group.
#[derive(Clone)]
pub struct Group(Rc<Members>);

struct Members {
    engine: Box<dyn Ranks>,
    /// Dropped after the engine, whose end all ranks come to: one that takes its part away may disturb a sum of the others.
    adder: OnceCell<Box<dyn Adder>>,
    /// Whether nobody waits for this rank any more.
    over: Cell<bool>,
    /// Whether the engine or the adder failed here, so that others may wait for this rank where they hear nothing.
    broken: Cell<bool>,
    cost: Cell<Cost>,
}

/// What being several took, on this rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Bytes of gradients that were summed; a rank sends and receives about twice as many.
    pub bytes: u64,
    /// Time in sums.
    pub summing: Duration,
    /// Time until all other ranks had come to the same place.
    pub waiting: Duration,
}

impl Default for Group {
    fn default() -> Self {
        Self::of(Alone)
    }
}

impl fmt::Debug for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} of {}", self.rank(), self.size())
    }
}

impl Group {
    /// The ranks that `engine` connects.
    pub fn of(engine: impl Ranks + 'static) -> Self {
        Self(Rc::new(Members {
            engine: Box::new(engine),
            adder: OnceCell::new(),
            over: Cell::new(false),
            broken: Cell::new(false),
            cost: Cell::default(),
        }))
    }

    /// This one's number, from 0 on.
    pub fn rank(&self) -> usize {
        self.0.engine.rank()
    }

    /// How many there are.
    pub fn size(&self) -> usize {
        self.0.engine.size()
    }

    /// Whether this is rank 0, who decides what only one can: to stop, what to go on from.
    pub fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// What being several took so far.
    pub fn cost(&self) -> Cost {
        self.0.cost.get()
    }

    /// What each rank has to say at `place`, in the order of ranks.
    ///
    /// From here to the next exchange, no rank may fail alone: the others would wait for it in a sum.
    ///
    /// # Errors
    /// [`RanksError`], with the same meaning on every rank.
    pub fn exchange(&self, place: &str, own: &[u8]) -> Result<Vec<Vec<u8>>, RanksError> {
        let began = Instant::now();
        let words = self.0.engine.gather(&Message::At(place, own).to_bytes())?;
        let mut cost = self.0.cost.get();
        cost.waiting += began.elapsed();
        self.0.cost.set(cost);
        let messages: Vec<Message<'_>> = words.iter().map(|word| Message::of(word)).collect();
        for (rank, message) in messages.iter().enumerate() {
            if let Message::Left(word) = message {
                self.0.over.set(true);
                return Err(RanksError::Left {
                    rank,
                    word: (*word).to_owned(),
                });
            }
        }
        let places = || messages.iter().map(Message::place);
        let first = places().next().unwrap_or_default();
        if let Some((rank, place)) = places().enumerate().find(|(_, place)| *place != first) {
            return Err(RanksError::Astray {
                rank,
                place: place.to_owned(),
                first: first.to_owned(),
            });
        }
        Ok(messages
            .iter()
            .map(|message| message.content().to_vec())
            .collect())
    }

    /// Leaves all sums from here on to `adder`, the first that comes. All ranks do so at the same place.
    pub fn sum_by(&self, adder: impl Adder + 'static) {
        // A second one would not be what the others sum with.
        let _ = self.0.adder.set(Box::new(adder));
    }

    /// Whether another than the engine sums.
    pub fn has_adder(&self) -> bool {
        self.0.adder.get().is_some()
    }

    /// Whether this rank failed where the others may wait for it and hear nothing, as in a sum. Nobody else can tell what happened, and
    /// [leaving](Self::leave) ends all.
    pub fn has_failed(&self) -> bool {
        self.0.broken.get()
    }

    fn fail(&self) {
        self.0.broken.set(true);
        self.end();
    }

    /// Each element becomes its sum over all ranks.
    ///
    /// # Errors
    /// [`RanksError::Engine`], after which this rank [has failed](Self::has_failed).
    pub fn sum(&self, tensors: &mut TargetTensors) -> Result<(), RanksError> {
        if self.size() == 1 {
            return Ok(());
        }
        let began = Instant::now();
        let mut cost = self.0.cost.get();
        for tensor in tensors.iter_mut() {
            let summed = match self.0.adder.get() {
                Some(adder) => adder.sum(tensor),
                None => self.0.engine.sum(tensor),
            };
            summed.inspect_err(|_| self.fail())?;
            cost.bytes += size_of_val(tensor) as u64;
        }
        cost.summing += began.elapsed();
        self.0.cost.set(cost);
        Ok(())
    }

    /// The elements of rank 0 become those of all.
    ///
    /// # Errors
    /// [`RanksError::Engine`].
    pub fn broadcast(&self, values: &mut [f32]) -> Result<(), RanksError> {
        Ok(self.0.engine.broadcast(values)?)
    }

    /// Says that the search is over: no rank waits for another from here on, and each may fail as if it were alone.
    pub fn end(&self) {
        self.0.over.set(true);
    }

    /// Leaves the others before the search is over: where they are, they hear `word` and end too. The words of those that leave at
    /// the same time come back, with their ranks.
    ///
    /// Does nothing where the search is over, or another rank has left before. Where this one [has failed](Self::has_failed), all end here.
    ///
    /// # Errors
    /// [`RanksError::Engine`].
    pub fn leave(&self, word: &str) -> Result<Vec<(usize, String)>, RanksError> {
        if self.has_failed() {
            self.0.engine.abort();
        }
        if self.0.over.replace(true) {
            return Ok(Vec::new());
        }
        let words = self.0.engine.gather(&Message::Left(word).to_bytes())?;
        let others = words.iter().enumerate();
        Ok(others
            .filter(|(rank, _)| *rank != self.rank())
            .filter_map(|(rank, word)| match Message::of(word) {
                Message::Left(word) => Some((rank, word.to_owned())),
                Message::At(..) => None,
            })
            .collect())
    }
}

/// Why a rank cannot go on with the others.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RanksError {
    /// One has left.
    #[error("rank {rank} cannot go on: {word}")]
    Left {
        /// Which.
        rank: usize,
        /// What it said.
        word: String,
    },
    /// One computes something else than the first: its program, its inputs or its processor are others.
    #[error("rank {rank} is at {place}, and rank 0 at {first}")]
    Astray {
        /// Which.
        rank: usize,
        /// Where it is.
        place: String,
        /// Where rank 0 is.
        first: String,
    },
    /// The engine failed.
    #[error("the ranks cannot reach each other")]
    Engine(#[from] EngineError),
}

/// Calls `sum` with one part of `values` after the other, each of which divides evenly among `ranks`: `most` elements, or what is left; behind it the few
/// that do not divide, with zeros.
///
/// # Errors
/// The first of `sum`.
#[cfg(any(feature = "mpi", test))]
fn in_even_parts(
    values: &mut [f32],
    ranks: usize,
    most: usize,
    mut sum: impl FnMut(&mut [f32]) -> Result<(), EngineError>,
) -> Result<(), EngineError> {
    for part in values.chunks_mut(most.max(ranks) / ranks * ranks) {
        let (even, rest) = part.split_at_mut(part.len() / ranks * ranks);
        if !even.is_empty() {
            sum(even)?;
        }
        if !rest.is_empty() {
            let mut padded = vec![0.0; ranks];
            padded[..rest.len()].copy_from_slice(rest);
            sum(&mut padded)?;
            rest.copy_from_slice(&padded[..rest.len()]);
        }
    }
    Ok(())
}

/// What one rank tells all: a byte that says which it is; of [`Message::At`] the length of the place, 4 bytes, little-endian; then the text or texts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Message<'m> {
    At(&'m str, &'m [u8]),
    Left(&'m str),
}

impl<'m> Message<'m> {
    fn to_bytes(self) -> Vec<u8> {
        match self {
            Self::Left(word) => [&[LEFT], word.as_bytes()].concat(),
            Self::At(place, content) => {
                let place = place.as_bytes();
                let length = u32::try_from(place.len()).unwrap_or(u32::MAX);
                [&[AT], &length.to_le_bytes()[..], place, content].concat()
            }
        }
    }

    /// What `bytes` say. Other bytes than a rank sends are one that left.
    fn of(bytes: &'m [u8]) -> Self {
        let text = |bytes| str::from_utf8(bytes).unwrap_or("its words are no text");
        let at = |rest: &'m [u8]| {
            let (length, rest) = rest.split_first_chunk::<4>()?;
            let length = usize::try_from(u32::from_le_bytes(*length)).ok()?;
            let (place, content) = rest.split_at_checked(length)?;
            Some(Self::At(text(place), content))
        };
        match bytes.split_first() {
            Some((&AT, rest)) => at(rest).unwrap_or(Self::Left("its words are cut off")),
            Some((_, rest)) => Self::Left(text(rest)),
            None => Self::Left("it said nothing"),
        }
    }

    fn place(&self) -> &'m str {
        match self {
            Self::At(place, _) => place,
            Self::Left(_) => "",
        }
    }

    fn content(&self) -> &'m [u8] {
        match self {
            Self::At(_, content) => content,
            Self::Left(_) => &[],
        }
    }
}

const AT: u8 = 0;
const LEFT: u8 = 1;

#[cfg(test)]
mod tests {
    use super::*;

    /// Ranks whose words are known before.
    struct Scripted(Vec<Message<'static>>);

    impl Ranks for Scripted {
        fn rank(&self) -> usize {
            0
        }

        fn size(&self) -> usize {
            1 + self.0.len()
        }

        fn gather(&self, own: &[u8]) -> Result<Vec<Vec<u8>>, EngineError> {
            let others = self.0.iter().map(|message| message.to_bytes());
            Ok([own.to_vec()].into_iter().chain(others).collect())
        }

        fn sum(&self, _values: &mut [f32]) -> Result<(), EngineError> {
            Err("no sum is expected".into())
        }

        fn broadcast(&self, _values: &mut [f32]) -> Result<(), EngineError> {
            Err("no broadcast is expected".into())
        }

        fn abort(&self) {}
    }

    /// As if all ranks had the same.
    struct Doubling;

    impl Adder for Doubling {
        fn sum(&self, values: &mut [f32]) -> Result<(), EngineError> {
            values.iter_mut().for_each(|value| *value *= 2.0);
            Ok(())
        }
    }

    #[test]
    fn an_adder_sums_in_place_of_the_engine() {
        let group = Group::of(Scripted(vec![Message::At("here", b"")]));
        let clone = group.clone();
        assert!(!group.has_adder());
        group.sum_by(Doubling);
        assert!(clone.has_adder());
        let mut tensors = TargetTensors::new(vec![vec![1.0, 2.0, 3.0]]);
        clone.sum(&mut tensors).unwrap();
        assert_eq!(tensors.tensor(0), [2.0, 4.0, 6.0]);
        assert!(!group.has_failed());
    }

    #[test]
    fn one_that_fails_in_a_sum_waits_for_nobody() {
        // Rank 1 does not come to where words are heard.
        let group = Group::of(Scripted(vec![Message::Left("unheard")]));
        let mut tensors = TargetTensors::new(vec![vec![1.0]]);
        assert!(group.sum(&mut tensors).is_err());
        assert!(group.has_failed());
        assert!(group.leave("bye").unwrap().is_empty());
    }

    #[test]
    fn parts_divide_evenly_and_every_element_is_summed_once() {
        for (ranks, most) in [(1, 4), (2, 4), (3, 4), (3, 9), (4, 2), (5, 1)] {
            for length in 0..20u8 {
                let mut values: Vec<f32> = (0..length).map(f32::from).collect();
                let expected: Vec<f32> = values.iter().map(|value| value + 0.5).collect();
                in_even_parts(&mut values, ranks, most, |part| {
                    assert!(!part.is_empty() && part.len() % ranks == 0);
                    assert!(part.len() <= most.max(ranks), "{} of {most}", part.len());
                    part.iter_mut().for_each(|value| *value += 0.5);
                    Ok(())
                })
                .unwrap();
                assert_eq!(values, expected, "{length} among {ranks}");
            }
        }
    }

    #[test]
    fn words_come_in_the_order_of_ranks() {
        let group = Group::of(Scripted(vec![
            Message::At("here", b"b"),
            Message::At("here", b""),
        ]));
        let words = group.exchange("here", b"a").unwrap();
        assert_eq!(words, [b"a".to_vec(), b"b".to_vec(), Vec::new()]);
        let alone = Group::default().exchange("here", b"a").unwrap();
        assert_eq!(alone, [b"a".to_vec()]);
    }

    #[test]
    fn one_that_left_ends_the_work_and_is_heard_once() {
        let group = Group::of(Scripted(vec![
            Message::At("here", b"b"),
            Message::Left("no disk"),
        ]));
        let error = group.exchange("here", b"a").unwrap_err();
        assert_eq!(error.to_string(), "rank 2 cannot go on: no disk");
        // Nobody waits for this rank's own farewell.
        assert!(group.leave("me too").unwrap().is_empty());
        let group = Group::of(Scripted(vec![
            Message::At("here", b"b"),
            Message::Left("no disk"),
        ]));
        assert_eq!(group.leave("bye").unwrap(), [(2, "no disk".to_owned())]);
    }

    #[test]
    fn ranks_at_two_places_are_noticed() {
        let group = Group::of(Scripted(vec![Message::At("step 2", b"b")]));
        let error = group.exchange("step 1", b"a").unwrap_err();
        assert_eq!(
            error.to_string(),
            "rank 1 is at step 2, and rank 0 at step 1"
        );
    }

    #[test]
    fn messages_come_back_and_others_are_farewells() {
        for message in [
            Message::At("a place", &[0, 255]),
            Message::At("", b""),
            Message::Left("bye"),
        ] {
            assert_eq!(Message::of(&message.to_bytes()), message);
        }
        for bytes in [&b""[..], &[AT, 1, 0, 0], &[AT, 9, 0, 0, 0, b'x']] {
            assert!(matches!(Message::of(bytes), Message::Left(_)), "{bytes:?}");
        }
    }
}
