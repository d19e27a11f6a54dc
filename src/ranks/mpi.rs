//! Ranks that MPI started and connects, with buffers in the memory of the processor.
//!
//! In: a process that `mpirun` or the like started. Out: an [`Mpi`] until the process ends.
//!
//! A sum is MPI's `Reduce_scatter_block` and `Allgather`: each element is summed by one rank and copied to the others, so all have the same bits
//! whichever algorithm the library takes, and no rank moves more than twice what is summed. Errors of MPI are fatal, as is its default: the
//! library says which rank it was and ends all of them.

use std::fmt;

use mpi::Threading;
use mpi::collective::SystemOperation;
use mpi::datatype::PartitionMut;
use mpi::environment::Universe;
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator, CommunicatorCollectives, Root};
use thiserror::Error;

use super::{EngineError, Ranks, in_even_parts};

/// MPI, from its start to its end. Dropping it waits for the other ranks to end as well, without taking a core meanwhile.
pub struct Mpi {
    world: SimpleCommunicator,
    host: String,
    /// Dropped last: MPI ends with it.
    _universe: Universe,
}

/// Why there is no MPI.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MpiError {
    /// It can be started once in a process.
    #[error("MPI was started before")]
    Started,
    /// The library cannot be called from a program of several threads.
    #[error("the MPI library allows no threads beside it")]
    Threads,
}

impl Mpi {
    /// Joins the ranks that this process was started among; alone where it was not.
    ///
    /// # Errors
    /// [`MpiError`].
    pub fn start() -> Result<Self, MpiError> {
        // The thread that starts it makes all calls.
        let (universe, threading) =
            mpi::initialize_with_threading(Threading::Funneled).ok_or(MpiError::Started)?;
        if threading < Threading::Funneled {
            return Err(MpiError::Threads);
        }
        Ok(Self {
            world: universe.world(),
            host: mpi::environment::processor_name().unwrap_or_default(),
            _universe: universe,
        })
    }

    /// What MPI calls the machine.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Sums `values`, as many as divide evenly among the ranks.
    fn sum_even(&self, values: &mut [f32]) {
        let mut own = vec![0.0f32; values.len() / self.size()];
        let sum = SystemOperation::sum();
        self.world
            .reduce_scatter_block_into(&*values, &mut own[..], sum);
        self.world.all_gather_into(&own[..], values);
    }
}

impl fmt::Debug for Mpi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MPI on {}", self.host)
    }
}

impl Ranks for Mpi {
    fn rank(&self) -> usize {
        usize::try_from(self.world.rank()).unwrap_or(0)
    }

    fn size(&self) -> usize {
        usize::try_from(self.world.size()).unwrap_or(1)
    }

    fn gather(&self, own: &[u8]) -> Result<Vec<Vec<u8>>, EngineError> {
        let length = i32::try_from(own.len())?;
        let mut lengths = vec![0i32; self.size()];
        self.world.all_gather_into(&length, &mut lengths[..]);
        let mut starts = Vec::with_capacity(lengths.len());
        let mut end = 0i32;
        for length in &lengths {
            starts.push(end);
            end = end.checked_add(*length).ok_or("too many bytes at once")?;
        }
        let mut bytes = vec![0u8; usize::try_from(end)?];
        let mut parts = PartitionMut::new(&mut bytes[..], &lengths[..], &starts[..]);
        self.world.all_gather_varcount_into(own, &mut parts);
        let mut rest = &bytes[..];
        let mut words = Vec::with_capacity(lengths.len());
        for length in lengths {
            let (word, others) = rest.split_at(usize::try_from(length)?);
            words.push(word.to_vec());
            rest = others;
        }
        Ok(words)
    }

    fn sum(&self, values: &mut [f32]) -> Result<(), EngineError> {
        in_even_parts(values, self.size(), CHUNK, |part| {
            self.sum_even(part);
            Ok(())
        })
    }

    fn broadcast(&self, values: &mut [f32]) -> Result<(), EngineError> {
        for chunk in values.chunks_mut(CHUNK) {
            self.world.process_at_rank(0).broadcast_into(chunk);
        }
        Ok(())
    }

    fn abort(&self) {
        self.world.abort(FAILED);
    }
}

impl Drop for Mpi {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // The others wait for this rank and would not end by themselves.
            self.world.abort(PANICKED);
        }
    }
}

/// Elements in one call: MPI counts in `int`, and its buffers grow with a call.
const CHUNK: usize = 1 << 24;

/// The exit code of a rank whose device failed, as the program's for its environment.
const FAILED: i32 = 4;

/// The exit code of a Rust program that panicked.
const PANICKED: i32 = 101;
