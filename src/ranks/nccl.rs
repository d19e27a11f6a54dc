//! Sums of ranks on their GPUs, by NCCL. MPI starts the ranks and carries everything else.
//!
//! In: a [`Group`] and the [`Device`] of this rank, an NVIDIA GPU that no other rank has: NCCL refuses one that two share. Out: an [`Nccl`],
//! which [sums in the engine's place](Group::sum_by).
//!
//! A sum is `ncclReduceScatter` and `ncclAllGather`, as MPI's is: NCCL's manual does not say that `ncclAllReduce` leaves the same bits on all
//! ranks. Values are the host's, so a part at a time goes to the GPU and comes back. A failure of one rank leaves the others in a sum: the group
//! ends them.

use std::cell::RefCell;
use std::ffi::c_char;
use std::fmt;
use std::sync::Arc;

use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaStream, DriverError};
use candle_core::cuda_backend::cudarc::nccl::result::NcclError;
use candle_core::cuda_backend::cudarc::nccl::{Comm, Id, ReduceOp};

use super::{Adder, EngineError, Group, RanksError, in_even_parts};
use crate::model::device::{Device, DeviceError, DeviceErrorKind};

/// The GPUs of all ranks, connected.
pub struct Nccl {
    device: Device,
    ranks: usize,
    stream: Arc<CudaStream>,
    comm: Comm,
    buffers: RefCell<Buffers>,
}

/// On the GPU, for one part of what is summed.
struct Buffers {
    whole: CudaSlice<f32>,
    /// This rank's share of it.
    own: CudaSlice<f32>,
}

impl Nccl {
    /// Connects `device` with those of the other ranks of `group`, which call this too. Takes 64 MB of its memory, that of the rank's share, and
    /// NCCL's own.
    ///
    /// # Errors
    /// [`RanksError`]. What the device or NCCL says is [`RanksError::Engine`], after which [the others wait](Group::has_failed).
    pub fn join(group: &Group, device: &Device) -> Result<Self, RanksError> {
        let id = match group.is_first() {
            true => Id::new()
                .map_err(|error| EngineError::from(refused(device, &error)))?
                .internal()
                .map(|it| it.to_ne_bytes()[0])
                .to_vec(),
            false => Vec::new(),
        };
        let ids = group.exchange("NCCL's id", &id)?;
        let joined = Self::with_id(&ids[0], group, device);
        Ok(joined.inspect_err(|_| group.fail())?)
    }

    fn with_id(id: &[u8], group: &Group, device: &Device) -> Result<Self, EngineError> {
        let id: [u8; 128] = id.try_into()?;
        let id = Id::uninit(id.map(|it| c_char::from_ne_bytes([it])));
        let stream = device.stream().ok_or("NCCL connects NVIDIA's GPUs alone")?;
        let failed = |error| failed(device, error);
        // NCCL takes the GPU of the calling thread.
        stream.context().bind_to_thread().map_err(failed)?;
        let (rank, ranks) = (group.rank(), group.size());
        let part = PART.max(ranks);
        let buffers = Buffers {
            whole: stream.alloc_zeros(part).map_err(failed)?,
            own: stream.alloc_zeros(part / ranks).map_err(failed)?,
        };
        let comm = Comm::from_rank(stream.clone(), rank, ranks, id);
        Ok(Self {
            comm: comm.map_err(|error| refused(device, &error))?,
            buffers: RefCell::new(buffers),
            device: device.clone(),
            ranks,
            stream,
        })
    }

    /// Sums `values`, as many as divide evenly among the ranks.
    fn sum_even(&self, values: &mut [f32]) -> Result<(), DeviceError> {
        let failed = |error| failed(&self.device, error);
        let refused = |error: NcclError| refused(&self.device, &error);
        let buffers = &mut *self.buffers.borrow_mut();
        let mut whole = buffers.whole.slice_mut(..values.len());
        let mut own = buffers.own.slice_mut(..values.len() / self.ranks);
        let stream = &self.stream;
        stream.memcpy_htod(&*values, &mut whole).map_err(failed)?;
        let sum = ReduceOp::Sum;
        let scattered = self.comm.reduce_scatter(&whole, &mut own, &sum);
        scattered.map_err(refused)?;
        self.comm.all_gather(&own, &mut whole).map_err(refused)?;
        stream.memcpy_dtoh(&whole, values).map_err(failed)?;
        stream.synchronize().map_err(failed)
    }
}

impl fmt::Debug for Nccl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NCCL on {}", self.device.name())
    }
}

impl Adder for Nccl {
    fn sum(&self, values: &mut [f32]) -> Result<(), EngineError> {
        in_even_parts(values, self.ranks, PART, |part| Ok(self.sum_even(part)?))
    }
}

/// What CUDA says of `device`.
fn failed(device: &Device, error: DriverError) -> DeviceError {
    device.failed(&candle_core::Error::Cuda(Box::new(error)))
}

/// What NCCL says of `device`.
fn refused(device: &Device, error: &NcclError) -> DeviceError {
    DeviceError {
        device: device.name(),
        kind: DeviceErrorKind::Failed {
            reason: format!("NCCL says {:?}", error.0),
        },
    }
}

/// Elements on the GPU at a time.
const PART: usize = 1 << 24;
