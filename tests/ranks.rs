//! Several ranks, as threads of this process, against one.
//!
//! Each rank opens the model and the rows by itself, as processes do, and computes its share. What is promised: every rank ends with the same
//! bits, those are one process's but for the order of sums, whoever had which row, and one that fails or is asked to stop ends all.

use std::sync::{Arc, Barrier, Mutex};
use std::thread;

use panacea_patch::model::TargetTensors;
use panacea_patch::optimize::{
    Adaptive, Budget, Observer, OptimizeError, Outcome, Panacea, Radius, Rows, SearchSettings,
    Settings, Space, State, StepRecord, Unobserved, optimize_among, search_among,
};
use panacea_patch::ranks::{EngineError, Group, Ranks, RanksError};
use panacea_patch::resume;

#[expect(dead_code, reason = "the decoder's own tests use the rest")]
mod common;
#[path = "common/tiny.rs"]
mod tiny;
use tiny::{Tiny, rows};

/// Ranks that meet in memory.
#[derive(Clone)]
struct Threads {
    rank: usize,
    meeting: Arc<Meeting>,
}

struct Meeting {
    words: Mutex<Vec<Vec<u8>>>,
    barrier: Barrier,
}

impl Threads {
    /// Calls `work` on each rank, and gives back what each returns.
    fn each<T: Send>(size: usize, work: impl Fn(Group) -> T + Sync) -> Vec<T> {
        let meeting = Arc::new(Meeting {
            words: Mutex::new(vec![Vec::new(); size]),
            barrier: Barrier::new(size),
        });
        let work = &work;
        thread::scope(|scope| {
            let ranks: Vec<_> = (0..size)
                .map(|rank| {
                    let meeting = Arc::clone(&meeting);
                    scope.spawn(move || work(Group::of(Self { rank, meeting })))
                })
                .collect();
            let results = ranks.into_iter().map(|rank| rank.join());
            results.map(|result| result.expect("a result")).collect()
        })
    }
}

impl Ranks for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.meeting.words.lock().expect("the words").len()
    }

    fn gather(&self, own: &[u8]) -> Result<Vec<Vec<u8>>, EngineError> {
        let lock = || self.meeting.words.lock().expect("the words");
        lock()[self.rank] = own.to_vec();
        self.meeting.barrier.wait();
        let words = lock().clone();
        self.meeting.barrier.wait();
        Ok(words)
    }

    fn sum(&self, values: &mut [f32]) -> Result<(), EngineError> {
        let own: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        values.fill(0.0);
        for word in self.gather(&own)? {
            for (sum, x) in values.iter_mut().zip(word.as_chunks().0) {
                *sum += f32::from_le_bytes(*x);
            }
        }
        Ok(())
    }

    fn broadcast(&self, values: &mut [f32]) -> Result<(), EngineError> {
        let own: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        let words = self.gather(&own)?;
        for (value, x) in values.iter_mut().zip(words[0].as_chunks().0) {
            *value = f32::from_le_bytes(*x);
        }
        Ok(())
    }

    fn abort(&self) {
        panic!("rank {} failed in a sum", self.rank);
    }
}

fn panacea() -> Settings {
    Settings::Panacea(Panacea {
        steps: 2,
        batch: 3,
        lr: 1e-3,
        rho: Radius::Auto(Budget::default()),
        ..Panacea::default()
    })
}

fn adaptive() -> Adaptive {
    Adaptive {
        batch: 3,
        steps: 2,
        repair_steps: 1,
        cap: 30.0,
        ..Adaptive::default()
    }
}

/// The outcome on each of `size` ranks.
fn outcomes(size: usize, rows: &Rows, settings: &Settings) -> Vec<Outcome> {
    let tiny = Tiny::open();
    Threads::each(size, |group| {
        let decoder = &mut tiny.decoder();
        optimize_among(&group, decoder, rows, settings, None, &mut Unobserved).expect("an outcome")
    })
}

fn cosine(a: &TargetTensors, b: &TargetTensors) -> f64 {
    a.dot(b) / (a.norm() * b.norm())
}

#[test]
fn every_rank_ends_with_the_same_bits_which_are_one_process_s_but_for_the_order_of_sums() {
    for settings in [panacea(), Settings::Adaptive(adaptive())] {
        let alone = &outcomes(1, &rows(), &settings)[0];
        for size in [2, 3, 9] {
            let ranks = outcomes(size, &rows(), &settings);
            for rank in &ranks {
                assert_eq!(rank.delta, ranks[0].delta);
                assert_eq!(rank.steps, ranks[0].steps);
                assert_eq!(rank.results, ranks[0].results);
            }
            // Two orders of summing f32 gradients differ by some 1e-7 of their norm.
            let cosine = cosine(&alone.delta, &ranks[0].delta);
            assert!(cosine > 1.0 - 1e-9, "{size} ranks: cosine {cosine}");
            for (a, b) in alone.results.iter().zip(&ranks[0].results) {
                assert!((a.1 - b.1).abs() < 1e-4 * a.1.abs().max(1.0), "{a:?} {b:?}");
            }
        }
    }
}

#[test]
fn it_does_not_matter_who_has_which_row() {
    let settings = Settings::Panacea(Panacea {
        steps: 0,
        ..Panacea::default()
    });
    let mut turned = rows();
    turned.harmful.rotate_left(2);
    let [a, b] = [rows(), turned].map(|rows| outcomes(3, &rows, &settings).swap_remove(0));
    let cosine = cosine(&a.delta, &b.delta);
    assert!(cosine > 1.0 - 1e-9, "cosine {cosine}");
}

#[test]
fn a_search_by_ranks_finds_the_same_on_each() {
    let tiny = Tiny::open();
    let found = Threads::each(2, |group| {
        let mut decoder = tiny.decoder();
        let settings = SearchSettings {
            space: Space::of(&adaptive(), decoder.targets()),
            base: adaptive(),
            budget: Budget {
                kl: 100.0,
                task: 100.0,
            },
            trials: 2,
        };
        let observer = &mut Unobserved;
        search_among(
            &group,
            &mut decoder,
            &rows(),
            &settings,
            Vec::new(),
            observer,
        )
        .expect("an outcome")
    });
    assert_eq!(found[0].trials, found[1].trials);
    assert_eq!(found[0].outcome.delta, found[1].outcome.delta);
}

#[test]
fn a_row_that_one_rank_cannot_compute_ends_all() {
    let tiny = Tiny::open();
    let mut rows = rows();
    let last = rows.harmful.last_mut().expect("a row");
    *last.tokens.last_mut().expect("a token") = 1_000_000;
    let settings = panacea();
    let errors = Threads::each(2, |group| {
        let decoder = &mut tiny.decoder();
        let error = optimize_among(&group, decoder, &rows, &settings, None, &mut Unobserved)
            .expect_err("the row");
        // As the program does.
        assert!(
            group
                .leave(&error.to_string())
                .expect("a meeting")
                .is_empty()
        );
        error
    });
    assert!(matches!(errors[1], OptimizeError::Pack(_)), "{errors:?}");
    match &errors[0] {
        OptimizeError::Ranks(RanksError::Left { rank: 1, word }) => {
            assert!(word.contains("token 1000000"), "{word}");
        }
        other => panic!("{other:?}"),
    }
}

/// Asks one rank to stop after a step, and stops the first when it hears of that.
struct Stopping {
    is_asked: bool,
    hears: bool,
    steps: usize,
}

impl Observer for Stopping {
    fn progress(&mut self, _what: &str, _done: usize, _total: usize) {}

    fn step(&mut self, _record: &StepRecord) {
        self.steps += 1;
    }

    fn state(&mut self, _state: &State<'_>) {}

    fn interrupted(&self) -> bool {
        self.hears || (self.is_asked && self.steps == 1)
    }

    fn stop(&mut self) {
        self.hears = true;
    }
}

#[test]
fn one_rank_that_is_asked_to_stop_stops_all() {
    let tiny = Tiny::open();
    for asked in [0, 1] {
        let ended = Threads::each(2, |group| {
            let mut observer = Stopping {
                is_asked: group.rank() == asked,
                hears: false,
                steps: 0,
            };
            let (decoder, rows, settings) = (&mut tiny.decoder(), rows(), panacea());
            let error = optimize_among(&group, decoder, &rows, &settings, None, &mut observer)
                .expect_err("an interruption");
            group.leave(&error.to_string()).expect("a meeting");
            (error.to_string(), observer.steps)
        });
        let first = ("interrupted".to_owned(), 1);
        let second = ("rank 0 cannot go on: interrupted".to_owned(), 1);
        assert_eq!(ended, [first, second], "rank {asked} was asked");
    }
}

#[test]
fn all_go_on_from_what_the_first_has() {
    let steps = outcomes(1, &rows(), &panacea()).swap_remove(0).steps;
    let kept = State {
        steps,
        tensors: vec![(
            "w".to_owned(),
            std::borrow::Cow::Owned(TargetTensors::new(vec![vec![1.5, -0.0], vec![f32::MIN]])),
        )],
    };
    for given in [Some(&kept), None] {
        let states = Threads::each(3, |group| {
            let own = given.filter(|_| group.is_first()).cloned();
            resume::share(&group, own).expect("a state")
        });
        for state in states {
            assert_eq!(state.as_ref(), given);
        }
    }
}
