//! Devices: what they are called, opening them, and how a model's blocks are divided among several.
//!
//! In: names, as on a command line. Out: open [`Device`]s with the precision that they compute in.

use std::fmt;
use std::str::FromStr;
#[cfg(feature = "nccl")]
use std::sync::Arc;

#[cfg(feature = "nccl")]
use candle_core::cuda_backend::cudarc::driver::CudaStream;
use candle_core::{DType, Tensor};
use thiserror::Error;

use super::error::DeviceError;
use super::kernels::{Kernels, check};

/// A device's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceName {
    /// This processor, by the code that a GPU would run: for tests. The [`Decoder`](crate::model::Decoder) is faster.
    Candle,
    /// The NVIDIA GPU of this number.
    Cuda(usize),
    /// Apple's GPU.
    Metal,
}

/// A text that names no device.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("`cuda:0` (or the number of another NVIDIA GPU) or `metal` belongs here")]
pub struct DeviceNameError;

impl FromStr for DeviceName {
    type Err = DeviceNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "candle" => Ok(Self::Candle),
            "cuda" => Ok(Self::Cuda(0)),
            "metal" => Ok(Self::Metal),
            _ => {
                let number = text.strip_prefix("cuda:").ok_or(DeviceNameError)?;
                number.parse().map(Self::Cuda).map_err(|_| DeviceNameError)
            }
        }
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Candle => f.write_str("candle"),
            Self::Cuda(number) => write!(f, "cuda:{number}"),
            Self::Metal => f.write_str("metal"),
        }
    }
}

/// How a device stores matrices and activations. Sums, norms, softmax and losses are f32 in either.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// BF16, half the memory, for which GPUs have units of their own.
    Bf16,
    /// f32; a GPU with TF32 rounds the factors of products to its 11 bits.
    F32,
}

impl Precision {
    pub(super) fn dtype(self) -> DType {
        match self {
            Self::Bf16 => DType::BF16,
            Self::F32 => DType::F32,
        }
    }

    /// Bytes of an element.
    pub(super) fn bytes(self) -> usize {
        self.dtype().size_in_bytes()
    }
}

/// A device that can be computed on.
#[derive(Clone, Debug)]
pub struct Device {
    name: DeviceName,
    precision: Precision,
    pub(super) handle: candle_core::Device,
    kernels: Option<Kernels>,
    trouble: Option<String>,
}

impl Device {
    /// Opens the device called `name`, which computes in BF16 if it is a GPU with units for it.
    ///
    /// # Errors
    /// [`DeviceError`] when this program was built without it, or it is not there.
    pub fn open(name: DeviceName) -> Result<Self, DeviceError> {
        let handle = match name {
            DeviceName::Candle => Ok(candle_core::Device::Cpu),
            DeviceName::Cuda(number) => candle_core::Device::new_cuda(number),
            DeviceName::Metal => candle_core::Device::new_metal(0),
        };
        let handle = handle.map_err(|error| DeviceError::of_opening(name, &error))?;
        let precision = precision_of(&handle);
        // What is BF16 is exact in TF32, so that products of such f32 have BF16's inputs and f32's sums.
        candle_core::cuda::set_gemm_reduced_precision_f32(true);
        let device = Self {
            name,
            precision,
            handle,
            kernels: None,
            trouble: None,
        };
        #[cfg(feature = "cuda")]
        if let candle_core::Device::Cuda(cuda) = &device.handle {
            let kernels = super::cuda::CudaKernels::compile(cuda);
            return Ok(device.with_kernels(kernels.map(Kernels::new)));
        }
        Ok(device)
    }

    /// The same, computing in `precision`.
    #[must_use]
    pub fn with_precision(self, precision: Precision) -> Self {
        Self { precision, ..self }
    }

    /// The same, computing by `kernels` if they are there and do what candle's operations do.
    #[cfg_attr(
        not(any(feature = "cuda", test)),
        expect(dead_code, reason = "other devices have none")
    )]
    pub(super) fn with_kernels(self, kernels: Result<Kernels, String>) -> Self {
        let checked = kernels.and_then(|kernels| {
            let device = Self {
                kernels: Some(kernels),
                ..self.clone()
            };
            check(&device).map(|()| device)
        });
        checked.unwrap_or_else(|trouble| Self {
            trouble: Some(trouble),
            ..self
        })
    }

    /// The same by candle's operations alone.
    pub(super) fn without_kernels(self) -> Self {
        Self {
            kernels: None,
            ..self
        }
    }

    /// Kernels of its own, if it has some.
    pub(super) fn kernels(&self) -> Option<&Kernels> {
        self.kernels.as_ref()
    }

    /// Why it computes by candle's operations alone, where it should have kernels of its own: slower, and to the same result.
    pub fn trouble(&self) -> Option<&str> {
        self.trouble.as_deref()
    }

    /// What it is called.
    pub fn name(&self) -> DeviceName {
        self.name
    }

    /// What it stores matrices and activations in.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Bytes of its memory that are free, where it tells.
    pub fn free_memory(&self) -> Option<u64> {
        #[cfg(feature = "cuda")]
        if let candle_core::Device::Cuda(cuda) = &self.handle {
            let free = cuda.cuda_stream().context().mem_get_info().ok()?.0;
            return u64::try_from(free).ok();
        }
        None
    }

    /// How many NVIDIA GPUs this process may use.
    pub fn gpus() -> usize {
        #[cfg(feature = "cuda")]
        if let Ok(count) = candle_core::cuda_backend::cudarc::driver::CudaContext::device_count() {
            return usize::try_from(count).unwrap_or(0);
        }
        0
    }

    /// Where an NVIDIA GPU is plugged in: the PCI domain, bus and device, by which NCCL tells the GPUs of a machine apart.
    #[cfg(feature = "nccl")]
    pub fn slot(&self) -> Option<[i32; 3]> {
        use candle_core::cuda_backend::cudarc::driver::sys::CUdevice_attribute as Attribute;
        let stream = self.stream()?;
        let of = |attribute| stream.context().attribute(attribute).ok();
        Some([
            of(Attribute::CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID)?,
            of(Attribute::CU_DEVICE_ATTRIBUTE_PCI_BUS_ID)?,
            of(Attribute::CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID)?,
        ])
    }

    /// The queue of an NVIDIA GPU's work.
    #[cfg(feature = "nccl")]
    pub(crate) fn stream(&self) -> Option<Arc<CudaStream>> {
        match &self.handle {
            candle_core::Device::Cuda(cuda) => Some(cuda.cuda_stream()),
            _ => None,
        }
    }

    /// Elements in f32.
    pub(super) fn upload(&self, values: &[f32], shape: &[usize]) -> candle_core::Result<Tensor> {
        Tensor::from_slice(values, shape, &self.handle)
    }

    /// `x` on this device. From another one it goes through the host, which needs no access between them; activations are few bytes beside
    /// what a block reads.
    pub(super) fn take(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        match x.device().same_device(&self.handle) {
            true => Ok(x.clone()),
            false => {
                let here = x.to_device(&candle_core::Device::Cpu)?;
                here.to_device(&self.handle)
            }
        }
    }

    /// What an operation on this device met.
    pub(crate) fn failed(&self, error: &candle_core::Error) -> DeviceError {
        DeviceError::of(self.name, error)
    }
}

/// What a device computes in by itself: BF16 if it has units for it.
fn precision_of(handle: &candle_core::Device) -> Precision {
    #[cfg(feature = "cuda")]
    if let candle_core::Device::Cuda(cuda) = handle {
        // candle has no kernels in BF16 for those below 8.0.
        let stream = cuda.cuda_stream();
        return match stream.context().compute_capability() {
            Ok((8.., _)) => Precision::Bf16,
            _ => Precision::F32,
        };
    }
    match handle {
        candle_core::Device::Cpu => Precision::F32,
        _ => Precision::Bf16,
    }
}

/// On which of several devices each block goes: in order, as many bytes on each as its share of the free memory.
///
/// `blocks`: bytes of each. `free`: bytes of each device. Returns a device's number for each block.
pub(super) fn divide(blocks: &[u64], free: &[u64]) -> Vec<usize> {
    let total: u128 = blocks.iter().copied().map(u128::from).sum();
    let all: u128 = free.iter().copied().map(u128::from).sum();
    let (mut device, mut until) = (0, free.first().copied().map_or(0, u128::from));
    let mut before = 0;
    let of_block = |&bytes: &u64| {
        // By where its middle falls.
        let middle = 2 * before + u128::from(bytes);
        before += u128::from(bytes);
        while device + 1 < free.len() && middle * all > 2 * until * total {
            device += 1;
            until += u128::from(free[device]);
        }
        device
    };
    blocks.iter().map(of_block).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for name in ["candle", "cuda:0", "cuda:12", "metal"] {
            assert_eq!(
                name.parse().map(|it: DeviceName| it.to_string()),
                Ok(name.to_owned())
            );
        }
        assert_eq!("cuda".parse(), Ok(DeviceName::Cuda(0)));
        for name in ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "Metal"] {
            assert_eq!(name.parse::<DeviceName>(), Err(DeviceNameError), "{name}");
        }
    }

    #[test]
    fn blocks_are_divided_by_free_memory_and_stay_in_order() {
        assert_eq!(divide(&[1; 4], &[9]), [0; 4]);
        assert_eq!(divide(&[1; 4], &[1, 1]), [0, 0, 1, 1]);
        assert_eq!(divide(&[1; 4], &[3, 1]), [0, 0, 0, 1]);
        assert_eq!(divide(&[1; 6], &[1, 1, 1]), [0, 0, 1, 1, 2, 2]);
        assert_eq!(divide(&[1; 2], &[1, 0, 1]), [0, 2]);
        assert_eq!(divide(&[5, 1, 1, 1], &[1, 1]), [0, 1, 1, 1]);
        // Sizes of real memories, whose products are beyond 64 bits.
        assert_eq!(divide(&[1 << 40; 2], &[80 << 30, 80 << 30]), [0, 1]);
    }
}
