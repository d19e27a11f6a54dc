//! What computes a search: `--device`, resolved.
//!
//! In: the flag. Out: a [`Computer`]: this processor, or devices that are open. `auto` is a GPU where this build can use one. Only the
//! search for a perturbation is computed on devices: answers, judges and everything about files are the processor's.

use panacea_patch::model::device::{Device, DeviceErrorKind, DeviceName};

use super::args::DeviceArg;
use super::error::Failure;
use super::report::Reporter;

/// What computes.
#[derive(Debug)]
pub(super) enum Computer {
    /// This processor.
    Cpu,
    /// These, of which there is at least one.
    Devices(Vec<Device>),
}

impl Computer {
    /// Opens what was asked for; by itself, a GPU that can be used: the first for one process, and the next for each of its `place` that share
    /// the machine before it.
    ///
    /// # Errors
    /// When a device that was named cannot be used.
    pub(super) fn open(
        given: Option<&DeviceArg>,
        place: usize,
        reporter: &Reporter,
    ) -> Result<Self, Failure> {
        let computer = Self::find(given, place, reporter)?;
        if let Self::Devices(devices) = &computer {
            for device in devices {
                if let Some(trouble) = device.trouble() {
                    let name = device.name();
                    reporter.note(format!(
                        "{name} computes more slowly than it could: {trouble}"
                    ));
                }
            }
        }
        Ok(computer)
    }

    fn find(given: Option<&DeviceArg>, place: usize, reporter: &Reporter) -> Result<Self, Failure> {
        match given {
            Some(DeviceArg::Cpu) => Ok(Self::Cpu),
            Some(DeviceArg::Devices(names)) => {
                let devices = names.iter().map(|&name| Device::open(name));
                Ok(Self::Devices(devices.collect::<Result<_, _>>()?))
            }
            Some(DeviceArg::Auto) | None => {
                for name in [gpu_of(place, Device::gpus()), DeviceName::Metal] {
                    match Device::open(name) {
                        Ok(device) => return Ok(Self::Devices(vec![device])),
                        Err(error) if error.kind == DeviceErrorKind::NotBuilt => {}
                        Err(error) => reporter.note(format!("computing on the processor: {error}")),
                    }
                }
                Ok(Self::Cpu)
            }
        }
    }

    /// What it is called, as on a command line.
    pub(super) fn name(&self) -> String {
        match self {
            Self::Cpu => CPU.to_owned(),
            Self::Devices(devices) => {
                let names = devices.iter().map(|device| device.name().to_string());
                names.collect::<Vec<_>>().join(",")
            }
        }
    }

    /// What decides the numbers: its name, but for which of a machine's GPUs it is.
    pub(super) fn kind(&self) -> String {
        match self {
            Self::Cpu => CPU.to_owned(),
            Self::Devices(devices) => {
                let kinds = devices.iter().map(|device| match device.name() {
                    DeviceName::Cuda(_) => "cuda".to_owned(),
                    name => name.to_string(),
                });
                kinds.collect::<Vec<_>>().join(",")
            }
        }
    }
}

/// The GPU of a process before which `place` others share its machine, which shows it `gpus`. Where there are fewer than processes, some share one.
fn gpu_of(place: usize, gpus: usize) -> DeviceName {
    DeviceName::Cuda(place % gpus.max(1))
}

/// Refuses devices where `what` leaves them nothing to do.
///
/// # Errors
/// A usage error, when some are named.
pub(super) fn refuse_devices(given: Option<&DeviceArg>, what: &str) -> Result<(), Failure> {
    let Some(DeviceArg::Devices(names)) = given else {
        return Ok(());
    };
    let names: Vec<String> = names.iter().map(DeviceName::to_string).collect();
    let flag = format!("--device {}", names.join(","));
    Err(Failure::no_effect(&flag, &format!("with `{what}`"))
        .because("only the search for a perturbation is computed on a device")
        .hint("leave out `--device`"))
}

/// What the processor is called.
pub(super) const CPU: &str = "cpu";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_of_a_machine_take_one_gpu_each_while_there_are_enough() {
        let taken = |gpus| [0, 1, 2].map(|place| gpu_of(place, gpus).to_string());
        assert_eq!(taken(4), ["cuda:0", "cuda:1", "cuda:2"]);
        assert_eq!(taken(2), ["cuda:0", "cuda:1", "cuda:0"]);
        // One that the launcher chose, or none that is seen: opening it says what is wrong.
        assert_eq!(taken(1), ["cuda:0"; 3]);
        assert_eq!(taken(0), ["cuda:0"; 3]);
    }
}
