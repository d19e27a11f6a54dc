//! How this process was started: alone, or as one of several ranks that share a search.
//!
//! In: the environment that `mpirun` and the like leave. Out: a [`Launch`], which is the same for all ranks but for its number. The first rank
//! is the program as it is alone: it checks the outputs, prints, keeps the state and writes. The others do their share of the search and are
//! silent: what stops one of them, the first says.

use std::collections::BTreeSet;

use panacea_patch::ranks::{Group, RanksError};
use panacea_patch::resume::Identity;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::args::{Cli, Command, OptimizeArgs, PatchArgs};
use super::device::Computer;
use super::error::{Exit, Failure};
use super::find;
use super::interrupt;
use super::model::{Model, Use};
use super::patch;
use super::report::Reporter;
use super::settings::Search;

/// This process among the others.
#[derive(Debug)]
pub(super) struct Launch {
    pub(super) group: Group,
    /// What a failure calls it.
    name: String,
    /// Ranks that compute on the same processors, this one among them.
    pub(super) neighbours: usize,
    /// Ranks on the same machine that come before this one.
    pub(super) place: usize,
    /// What MPI calls the machine; nothing for one process.
    host: String,
    /// Machines that ranks are on.
    machines: usize,
}

impl Launch {
    /// Joins the ranks that this process was started with, if it was.
    ///
    /// # Errors
    /// When there are several and the program cannot be one of them.
    pub(super) fn join() -> Result<Self, Failure> {
        let expected = launched();
        match expected {
            None | Some(0 | 1) => Ok(Self::alone()),
            Some(expected) => join_ranks(expected),
        }
    }

    fn alone() -> Self {
        Self {
            group: Group::default(),
            name: "the process".to_owned(),
            neighbours: 1,
            place: 0,
            host: String::new(),
            machines: 1,
        }
    }

    /// One of several on `host`.
    #[cfg(feature = "mpi")]
    fn of(group: Group, host: &str) -> Result<Self, RanksError> {
        let own = json!([host, allowed_processors()]).to_string();
        let places = group.exchange("the start", own.as_bytes())?;
        let same = |place: &&Vec<u8>| place[..] == *own.as_bytes();
        let hosts: Vec<String> = places
            .iter()
            .filter_map(|place| serde_json::from_slice::<[String; 2]>(place).ok())
            .map(|[host, _]| host)
            .collect();
        let before = hosts.iter().take(group.rank());
        Ok(Self {
            place: before.filter(|it| *it == host).count(),
            host: host.to_owned(),
            name: format!("rank {} of {} on {host}", group.rank(), group.size()),
            neighbours: places.iter().filter(same).count(),
            machines: BTreeSet::from_iter(hosts).len(),
            group,
        })
    }

    /// Whether this is the one that speaks and writes.
    pub(super) fn is_first(&self) -> bool {
        self.group.is_first()
    }

    /// Whether no other rank can say what stops this one.
    pub(super) fn must_speak(&self) -> bool {
        self.is_first() || self.group.has_failed()
    }

    /// Whether there are others.
    pub(super) fn is_shared(&self) -> bool {
        self.group.size() > 1
    }

    /// Threads to compute with where nobody says: this rank's share of the processors that it may run on. Nothing for one process.
    pub(super) fn threads(&self) -> Option<usize> {
        if !self.is_shared() || std::env::var_os("RAYON_NUM_THREADS").is_some() {
            return None;
        }
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Some((processors / self.neighbours).max(1))
    }

    /// Refuses what several processes cannot share.
    ///
    /// # Errors
    /// A usage error, on all ranks.
    pub(super) fn require_search(&self, cli: &Cli, name: &str) -> Result<(), Failure> {
        let searches = match &cli.command {
            None => cli.patch.perturbation.is_none(),
            Some(command) => matches!(command, Command::Optimize(_)),
        };
        if searches || !self.is_shared() {
            return Ok(());
        }
        let what = match &cli.command {
            None => "adding a perturbation from a file".to_owned(),
            Some(_) => format!("`{name}`"),
        };
        let size = self.group.size();
        Err(Failure::usage(format!("{what} is work for one process"))
            .because(format!(
                "{size} were started, and only the search for a perturbation can be shared"
            ))
            .hint("run it without mpirun"))
    }

    /// Lets NCCL sum where it can connect what the ranks compute on; otherwise MPI does.
    ///
    /// # Errors
    /// When another rank cannot go on, or NCCL fails.
    pub(super) fn connect(&self, computer: &Computer) -> Result<(), Failure> {
        if !self.is_shared() {
            return Ok(());
        }
        let own = json!([self.host, slot(computer)]).to_string();
        let all = self.group.exchange("the devices", own.as_bytes())?;
        let slots = all.iter().map(|word| serde_json::from_slice(word).ok());
        match slots.collect::<Option<Vec<Slot>>>() {
            Some(slots) if are_apart(&slots) => join_gpus(&self.group, computer),
            _ => Ok(()),
        }
    }

    /// Says that several share the work, and how.
    pub(super) fn tell(&self, reporter: &Reporter) {
        if self.is_shared() {
            let machines = match self.machines {
                1 => "one machine".to_owned(),
                machines => format!("{machines} machines"),
            };
            let threads = match rayon::current_num_threads() {
                1 => "one thread".to_owned(),
                threads => format!("{threads} threads"),
            };
            let adder = match self.group.has_adder() {
                true => "NCCL",
                false => "MPI",
            };
            let size = self.group.size();
            reporter.stage(format!(
                "{size} ranks on {machines}, this one with {threads}; {adder} sums"
            ));
        }
    }

    /// Makes sure that all ranks are about to do the same.
    ///
    /// # Errors
    /// When one reads other data or weights or is another version, or has failed.
    pub(super) fn agree(&self, identity: &Identity) -> Result<(), Failure> {
        if !self.is_shared() {
            return Ok(());
        }
        let own = json!(identity).to_string();
        let all = self.group.exchange("the beginning", own.as_bytes())?;
        let read = |word: &Vec<u8>| serde_json::from_slice::<Identity>(word).unwrap_or_default();
        let first = read(&all[0]);
        for (rank, word) in all.iter().enumerate() {
            if let Some(other) = first.differences(&read(word)).into_iter().next() {
                let value = |value: Option<String>| match value {
                    Some(value) => format!("`{}`", panacea_formats::shown(&value)),
                    None => "nothing".to_owned(),
                };
                return Err(Failure::new(
                    Exit::Refused,
                    format!("rank {rank} would do other work than rank 0"),
                )
                .because(format!(
                    "{} is {} there and {} on rank 0",
                    panacea_formats::shown(&other.name),
                    value(other.now),
                    value(other.saved)
                ))
                .hint("give all ranks the same program, checkpoint and data"));
            }
        }
        Ok(())
    }

    /// Ends this rank's part with what came of it. The first gets back what ended another where nothing ended it, for it to be told.
    pub(super) fn leave(&self, result: &Result<(), Failure>) -> Option<Failure> {
        let word = match result {
            Ok(()) => Word::of(&self.name, &Failure::new(Exit::Done, "done")),
            Err(failure) => Word::of(&self.name, failure),
        };
        let heard = self.group.leave(&json!(word).to_string());
        let mut failures = match heard {
            Ok(words) => words
                .into_iter()
                .map(|(rank, word)| Failure::from(RanksError::Left { rank, word })),
            Err(error) => return Some(error.into()),
        };
        failures.find(|failure| failure.exit != Exit::Done)
    }

    /// What every rank but the first does.
    ///
    /// # Errors
    /// When it, or another, cannot go on. The first says so.
    pub(super) fn follow(&self, cli: &Cli, reporter: &Reporter) -> Result<(), Failure> {
        match &cli.command {
            Some(Command::Optimize(args)) => self.follow_optimize(args, reporter),
            _ => self.follow_patch(&cli.patch, reporter),
        }
    }

    fn follow_optimize(&self, args: &OptimizeArgs, reporter: &Reporter) -> Result<(), Failure> {
        let search = Search::resolve(&args.method, &args.data, false)?;
        interrupt::listen()?;
        let usage = Use {
            base: args.base.path.as_deref(),
            merge: false,
            computes: search.computes(),
        };
        let model = Model::open(&args.model, usage, reporter)?;
        let search = search.in_space(model.space());
        let (work, run) = (&args.work, &args.run);
        find::prepare(&model, &search, (work, run), self, reporter)?.follow(self, reporter)
    }

    fn follow_patch(&self, args: &PatchArgs, reporter: &Reporter) -> Result<(), Failure> {
        let (model, search) = patch::open(args, reporter)?;
        let (work, run) = (&args.work, &args.run);
        find::prepare(&model, &search, (work, run), self, reporter)?.follow(self, reporter)
    }
}

/// What a rank says when it leaves.
#[derive(Serialize, Deserialize)]
struct Word {
    rank: String,
    exit: u8,
    error: String,
    because: Option<String>,
    hint: Option<String>,
}

impl Word {
    fn of(rank: &str, failure: &Failure) -> Self {
        Self {
            rank: rank.to_owned(),
            exit: failure.exit as u8,
            error: failure.error.clone(),
            because: failure.because.clone(),
            hint: failure.hint.clone(),
        }
    }
}

impl From<RanksError> for Failure {
    /// What another rank failed with, under its name.
    fn from(error: RanksError) -> Self {
        let told = match &error {
            RanksError::Left { word, .. } => serde_json::from_str::<Word>(word).ok(),
            _ => None,
        };
        match told {
            Some(word) => Self {
                because: word.because,
                hint: word.hint,
                ..Self::new(
                    Exit::of_code(word.exit),
                    format!("{}: {}", word.rank, word.error),
                )
            },
            None => {
                let failure = Self::doing(Exit::Environment, "the ranks do not go on", &error);
                match error {
                    RanksError::Engine(_) => failure,
                    _ => failure.hint("give all ranks the same program, checkpoint and data"),
                }
            }
        }
    }
}

/// How many processes were started together, as far as the launcher says so: Open MPI's `mpirun`, or one that speaks PMI, as MPICH's does.
fn launched() -> Option<usize> {
    ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"]
        .into_iter()
        .filter_map(|name| std::env::var(name).ok()?.trim().parse().ok())
        .next()
}

#[cfg(feature = "mpi")]
fn join_ranks(expected: usize) -> Result<Launch, Failure> {
    use panacea_patch::ranks::{Mpi, Ranks};

    let mpi = Mpi::start().map_err(|error| {
        Failure::doing(Exit::Environment, "cannot join the other ranks", &error)
    })?;
    if mpi.size() != expected {
        return Err(
            Failure::new(Exit::Environment, "cannot join the other ranks")
                .because(format!(
                    "{expected} processes were started, and the MPI library knows of {}",
                    mpi.size()
                ))
                .hint(
                    "start it with the mpirun of the MPI library that the program was built with",
                ),
        );
    }
    let host = mpi.host().to_owned();
    Ok(Launch::of(Group::of(mpi), &host)?)
}

#[cfg(not(feature = "mpi"))]
fn join_ranks(expected: usize) -> Result<Launch, Failure> {
    Err(Failure::new(
        Exit::Environment,
        "this program cannot share its work with others",
    )
    .because(format!(
        "{expected} processes were started together, and it was built without the feature `mpi`: each would do all of the work and write the same files"
    ))
    .hint("build it with `cargo install --path . --features mpi`, or start one process"))
}

/// A machine, and where the GPU of a rank is plugged in there, where NCCL can use it.
type Slot = (String, Option<[i32; 3]>);

/// Whether every rank has a GPU to itself.
fn are_apart(slots: &[Slot]) -> bool {
    let distinct: BTreeSet<_> = slots.iter().filter(|(_, slot)| slot.is_some()).collect();
    distinct.len() == slots.len()
}

/// Where the GPU is that NCCL would use: the first of several.
#[cfg(feature = "nccl")]
fn slot(computer: &Computer) -> Option<[i32; 3]> {
    match computer {
        Computer::Cpu => None,
        Computer::Devices(devices) => devices.first()?.slot(),
    }
}

/// This build has no NCCL.
#[cfg(not(feature = "nccl"))]
fn slot(_computer: &Computer) -> Option<[i32; 3]> {
    None
}

#[cfg(feature = "nccl")]
fn join_gpus(group: &Group, computer: &Computer) -> Result<(), Failure> {
    use panacea_patch::ranks::Nccl;

    if let Computer::Devices(devices) = computer
        && let Some(device) = devices.first()
    {
        group.sum_by(Nccl::join(group, device)?);
    }
    Ok(())
}

/// No rank offers a GPU without NCCL.
#[cfg(not(feature = "nccl"))]
fn join_gpus(_group: &Group, _computer: &Computer) -> Result<(), Failure> {
    Ok(())
}

/// The processors that this process may run on, in the system's own notation, where it tells.
#[cfg(feature = "mpi")]
fn allowed_processors() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mut lines = status.lines();
    let line = lines.find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    line.unwrap_or_default().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nccl_sums_where_every_rank_has_a_gpu_to_itself() {
        let slot = |host: &str, slot| (host.to_owned(), slot);
        let (one, other) = (Some([0, 1, 0]), Some([0, 2, 0]));
        assert!(are_apart(&[slot("a", one), slot("a", other)]));
        assert!(are_apart(&[slot("a", one), slot("b", one)]));
        assert!(!are_apart(&[slot("a", one), slot("a", one)]));
        assert!(!are_apart(&[slot("a", one), slot("b", None)]));
        assert!(!are_apart(&[slot("a", None), slot("b", None)]));
    }

    #[test]
    fn what_ends_a_rank_is_told_under_its_name() {
        let failure = Failure::new(Exit::Environment, "no room")
            .because("the disk is full")
            .hint("make some");
        let word = json!(Word::of("rank 3 of 4 on box", &failure)).to_string();
        let heard = Failure::from(RanksError::Left { rank: 3, word });
        assert_eq!(heard.exit, Exit::Environment);
        assert_eq!(heard.error, "rank 3 of 4 on box: no room");
        assert_eq!((heard.because, heard.hint), (failure.because, failure.hint));
        let heard = Failure::from(RanksError::Left {
            rank: 3,
            word: "?".to_owned(),
        });
        assert_eq!(heard.because.as_deref(), Some("rank 3 cannot go on: ?"));
    }
}
