//! The kernels of `kernels.cu` on an NVIDIA GPU: compiled for it by NVRTC when it is opened, and launched.
//!
//! This has never run: no GPU was at hand. [`super::kernels::check`] holds every kernel against candle's operations on the device before any
//! is used.

use std::sync::Arc;

use candle_core::cuda_backend::cudarc::driver::{CudaView, LaunchConfig, PushKernelArg};
use candle_core::cuda_backend::cudarc::nvrtc::{CompileOptions, compile_ptx_with_opts};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, DType, Result, Storage, Tensor};

use super::kernels::{Launch, Scalar};

/// What compiles when a device is opened.
const SOURCE: &str = include_str!("kernels.cu");

/// What candle keeps the compiled kernels under.
const MODULE: &str = "panacea";

/// Threads of a block, as the source has it.
const THREADS: u32 = 256;

/// The kernels of one GPU.
#[derive(Clone, Debug)]
pub(super) struct CudaKernels {
    device: CudaDevice,
    ptx: Arc<str>,
}

impl CudaKernels {
    /// Compiles them for `device`.
    ///
    /// # Errors
    /// What the compiler says.
    pub(super) fn compile(device: &CudaDevice) -> std::result::Result<Self, String> {
        let options = CompileOptions {
            options: vec![format!("-DTHREADS={THREADS}")],
            ..CompileOptions::default()
        };
        let ptx = compile_ptx_with_opts(SOURCE, options);
        let ptx = ptx.map_err(|error| format!("kernels do not compile: {error:?}"))?;
        Ok(Self {
            device: device.clone(),
            ptx: ptx.to_src().into(),
        })
    }
}

/// An input from its first element on.
enum Given<'t> {
    F32(CudaView<'t, f32>),
    U32(CudaView<'t, u32>),
}

impl Launch for CudaKernels {
    fn launch(
        &self,
        name: &'static str,
        blocks: usize,
        inputs: &[Tensor],
        scalars: &[Scalar],
        outputs: &[&[usize]],
    ) -> Result<Vec<Tensor>> {
        let function = self
            .device
            .get_or_load_custom_func(name, MODULE, &self.ptx)?;
        let storages: Vec<_> = inputs.iter().map(Tensor::storage_and_layout).collect();
        let given = storages
            .iter()
            .zip(inputs)
            .map(|((storage, layout), input)| {
                let Storage::Cuda(storage) = &**storage else {
                    let elsewhere = "a kernel was given what is elsewhere";
                    return Err(candle_core::Error::msg(elsewhere));
                };
                let first = layout.start_offset();
                Ok(match input.dtype() {
                    DType::U32 => Given::U32(storage.as_cuda_slice()?.slice(first..)),
                    _ => Given::F32(storage.as_cuda_slice()?.slice(first..)),
                })
            });
        let given = given.collect::<Result<Vec<_>>>()?;
        let written = outputs.iter().map(|shape| {
            let elements = shape.iter().product();
            self.device.alloc_zeros::<f32>(elements)
        });
        let mut written = written.collect::<Result<Vec<_>>>()?;
        let mut builder = function.builder();
        for input in &given {
            match input {
                Given::F32(view) => builder.arg(view),
                Given::U32(view) => builder.arg(view),
            };
        }
        for scalar in scalars {
            match scalar {
                Scalar::Float(x) => builder.arg(x),
                Scalar::Int(x) => builder.arg(x),
            };
        }
        for slice in &mut written {
            builder.arg(slice);
        }
        let blocks = u32::try_from(blocks).map_err(candle_core::Error::wrap)?;
        let config = LaunchConfig {
            grid_dim: (blocks, 1, 1),
            block_dim: (THREADS, 1, 1),
            shared_mem_bytes: 0,
        };
        #[expect(unsafe_code, reason = "a kernel is what its source says")]
        // SAFETY: the parameters are in the order and of the types of the kernel's signature, which the test of the same calls on the
        // processor checks; each block reads and writes its own row of matrices whose sizes are those of the shapes given with them.
        unsafe { builder.launch(config) }.map_err(candle_core::Error::wrap)?;
        let tensors = written.into_iter().zip(outputs).map(|(slice, shape)| {
            let storage = CudaStorage::wrap_cuda_slice(slice, self.device.clone());
            Tensor::from_storage(Storage::Cuda(storage), *shape, BackpropOp::none(), false)
        });
        Ok(tensors.collect())
    }
}
