//! Values of flags: names among which one chooses, and numbers with their ranges.

use std::error::Error;
use std::num::NonZeroUsize;
use std::str::FromStr;

use clap::ValueEnum;
use panacea_formats::Dtype;
use panacea_patch::apply::Strength;
use panacea_patch::compact::EnergyShare;
use panacea_patch::model::device::{DeviceName, DeviceNameError};

use crate::cli::error::chain;

/// A method by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum MethodName {
    /// Several normalized steps under constraints.
    Adaptive,
    /// The paper's.
    Panacea,
    /// Gaussian noise of the same norm: the control.
    Random,
}

/// `--rho`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum RhoArg {
    /// The largest within a budget.
    Auto,
    /// This one; finite and above 0.
    Fixed(f64),
}

/// `--final-eps`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum FinalEpsName {
    /// The gradient of the whole harmful set.
    Whole,
    /// The last step's, as in the paper's code.
    LastBatch,
}

/// `--part`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum PartName {
    /// Drift and eps.
    Sum,
    /// eps alone.
    Eps,
    /// What the outer steps moved, alone.
    Drift,
}

/// `--rounding`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum RoundingName {
    /// To the nearest value, ties to even.
    Nearest,
    /// To one of the two neighbors, by chance.
    Stochastic,
}

/// `--curve`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum CurveName {
    /// NIST P-256.
    P256,
    /// NIST P-384.
    P384,
}

/// `--device`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum DeviceArg {
    /// A GPU where this build can use one, else the processor.
    Auto,
    /// The processor.
    Cpu,
    /// These, with the model's blocks divided among them.
    Devices(Vec<DeviceName>),
}

pub(super) fn device(text: &str) -> Result<DeviceArg, String> {
    match text {
        "auto" => Ok(DeviceArg::Auto),
        "cpu" => Ok(DeviceArg::Cpu),
        _ => {
            let names = text.split(',').map(str::parse).collect::<Result<_, _>>();
            names.map(DeviceArg::Devices).map_err(|_: DeviceNameError| {
                "`auto`, `cpu`, `cuda:0`, several such as `cuda:0,cuda:1`, or `metal` belongs here"
                    .to_owned()
            })
        }
    }
}

pub(super) fn rho(text: &str) -> Result<RhoArg, String> {
    match text {
        "auto" => Ok(RhoArg::Auto),
        _ => positive(text).map(RhoArg::Fixed),
    }
}

pub(super) fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number.is_finite() && number > 0.0 => Ok(number),
        _ => Err("a finite number above 0 belongs here".to_owned()),
    }
}

pub(super) fn not_negative(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number.is_finite() && number >= 0.0 => Ok(number.abs()),
        _ => Err("a finite number of 0 or above belongs here".to_owned()),
    }
}

pub(super) fn strength(text: &str) -> Result<Strength, String> {
    let number: f64 = text
        .parse()
        .map_err(|_| "a finite number of 0 or above belongs here".to_owned())?;
    Strength::new(number).map_err(|error| error.to_string())
}

pub(super) fn patchable_type(text: &str) -> Result<Dtype, String> {
    let known = text.to_uppercase().parse::<Dtype>();
    known
        .ok()
        .filter(|dtype| dtype.is_patchable())
        .ok_or_else(|| {
            let names = Dtype::ALL.iter().filter(|dtype| dtype.is_patchable());
            let names: Vec<String> = names.map(|dtype| dtype.name().to_lowercase()).collect();
            format!("one of {} belongs here", names.join(", "))
        })
}

pub(super) fn share(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if (0.0..=1.0).contains(&number) => Ok(number.abs()),
        _ => Err("a share from 0 to 1 belongs here".to_owned()),
    }
}

pub(super) fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(number) if number > 0 => Ok(number),
        _ => Err("a whole number of 1 or above belongs here".to_owned()),
    }
}

pub(super) fn rank(text: &str) -> Result<NonZeroUsize, String> {
    text.parse()
        .map_err(|_| "a whole number of 1 or above belongs here".to_owned())
}

pub(super) fn energy_share(text: &str) -> Result<EnergyShare, String> {
    text.parse()
        .ok()
        .and_then(EnergyShare::new)
        .ok_or_else(|| "a share above 0 and at most 1 belongs here".to_owned())
}

/// Parses with `FromStr`, and says all of its error.
pub(super) fn explained<T>(text: &str) -> Result<T, String>
where
    T: FromStr,
    T::Err: Error,
{
    text.parse::<T>().map_err(|error| chain(&error))
}
