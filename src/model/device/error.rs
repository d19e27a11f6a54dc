//! What goes wrong on a device, with the device's name.
//!
//! In: the errors of candle, which speak for drivers and libraries. Out: a [`DeviceError`] that can be compared and kept, and that tells
//! one kind from the others: memory that is not enough, which computing in smaller parts may help.

use thiserror::Error;

use super::place::DeviceName;

/// Why a device did not do its part.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{device} {kind}")]
#[non_exhaustive]
pub struct DeviceError {
    /// The device.
    pub device: DeviceName,
    /// What happened.
    pub kind: DeviceErrorKind,
}

/// What happened on a device.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum DeviceErrorKind {
    /// Something else than memory.
    #[error("failed: {reason}")]
    Failed {
        /// In the driver's words.
        reason: String,
    },
    /// This program was built without it.
    #[error("is not in this build")]
    NotBuilt,
    /// Its memory is not enough.
    #[error("has not enough memory: {reason}")]
    OutOfMemory {
        /// In the driver's words.
        reason: String,
    },
    /// It cannot be used.
    #[error("cannot be used: {reason}")]
    Unusable {
        /// In the driver's words.
        reason: String,
    },
}

impl DeviceError {
    /// What an operation on `device` met.
    pub(super) fn of(device: DeviceName, error: &candle_core::Error) -> Self {
        let reason = first_line(error);
        let kind = match is_out_of_memory(&format!("{error} {error:?}")) {
            true => DeviceErrorKind::OutOfMemory { reason },
            false => DeviceErrorKind::Failed { reason },
        };
        Self { device, kind }
    }

    /// What opening `device` met.
    pub(super) fn of_opening(device: DeviceName, error: &candle_core::Error) -> Self {
        use candle_core::Error::{NotCompiledWithCudaSupport, NotCompiledWithMetalSupport};
        let kind = match error {
            NotCompiledWithCudaSupport | NotCompiledWithMetalSupport => DeviceErrorKind::NotBuilt,
            _ => DeviceErrorKind::Unusable {
                reason: first_line(error),
            },
        };
        Self { device, kind }
    }

    /// Whether smaller parts may be computed all the same.
    pub fn is_out_of_memory(&self) -> bool {
        matches!(self.kind, DeviceErrorKind::OutOfMemory { .. })
    }
}

/// Whether what a driver or library says means that memory is not enough. They have no type for it that reaches this far.
fn is_out_of_memory(text: &str) -> bool {
    SAID_OF_MEMORY.iter().any(|said| text.contains(said))
}

/// What is said then: by the driver, by cuBLAS, and by candle of a buffer that Metal did not give.
const SAID_OF_MEMORY: [&str; 3] = [
    "CUDA_ERROR_OUT_OF_MEMORY",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "FailedToCreateResource",
];

/// Errors of candle may carry a backtrace in the lines behind.
fn first_line(error: &candle_core::Error) -> String {
    let text = error.to_string();
    text.lines().next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_is_not_enough_is_told_from_other_failures() {
        /// As cudarc's error of a driver prints itself.
        #[derive(Debug)]
        struct Driver(&'static str);
        impl std::fmt::Display for Driver {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, "DriverError({}, \"said by the driver\")", self.0)
            }
        }
        impl std::error::Error for Driver {}
        let of = |code| {
            let error = candle_core::Error::Cuda(Box::new(Driver(code)));
            DeviceError::of(DeviceName::Cuda(1), &error)
        };
        let memory = of("CUDA_ERROR_OUT_OF_MEMORY");
        assert!(memory.is_out_of_memory());
        assert!(
            memory
                .to_string()
                .starts_with("cuda:1 has not enough memory: ")
        );
        let other = of("CUDA_ERROR_ILLEGAL_ADDRESS");
        assert!(!other.is_out_of_memory());
        let wanted =
            "cuda:1 failed: DriverError(CUDA_ERROR_ILLEGAL_ADDRESS, \"said by the driver\")";
        assert_eq!(other.to_string(), wanted);
        let library = candle_core::Error::msg("CublasError(CUBLAS_STATUS_ALLOC_FAILED)");
        assert!(DeviceError::of(DeviceName::Cuda(0), &library).is_out_of_memory());
    }
}
