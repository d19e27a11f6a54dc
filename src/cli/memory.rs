//! How much memory a search takes, and what it does to take no more than it may.
//!
//! In: what is computed, and a budget: `--memory`, or what the machine has free. Out: a [`MemoryPlan`]: whether activations are kept or
//! computed again, whether the pages of weights are given back after each block, and what that adds up to. Neither choice
//! changes a bit of the result. On devices it is their memory that decides whether activations are kept; what is foreseen too low is met
//! while computing ([`panacea_patch::model::InParts`]).

use std::str::FromStr;

use panacea_patch::model::device::{DeviceName, footprint};
use panacea_patch::model::{
    Activations, Decoder, Differentiable, EncodedRow, LOGITS_BYTES, TILE_BYTES,
};
use panacea_patch::optimize::{FinalEps, PACK_TOKENS, Panacea, Radius, Rows, Settings};
use thiserror::Error;

use super::device::Computer;
use super::error::{Exit, Failure};
use super::report::bytes;

/// What a search will hold.
#[derive(Clone, Debug)]
pub(super) struct MemoryPlan {
    pub(super) activations: Activations,
    /// Whether the pages of weights are given back after each block.
    pub(super) releases: bool,
    /// What is held, and how many bytes of it.
    pub(super) parts: Vec<(&'static str, u64)>,
    /// What the devices hold.
    pub(super) devices: Vec<DeviceMemory>,
}

/// What a device will hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DeviceMemory {
    pub(super) name: DeviceName,
    /// Bytes, at most.
    pub(super) needed: u64,
    /// Bytes, where it tells.
    pub(super) free: Option<u64>,
}

/// An amount of memory: a number of bytes, or of `K`, `M`, `G` or `T`, each 1024 times the one before, with or without `B` or `iB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MemorySize(u64);

impl MemorySize {
    /// In bytes.
    pub(super) fn bytes(self) -> u64 {
        self.0
    }
}

impl MemoryPlan {
    /// Chooses the fastest way that keeps to the budget: `given`, or an equal part of what is free for each of `sharers`.
    ///
    /// # Errors
    /// When none keeps to the budget that was given. One that the machine seems too small for is tried all the same.
    pub(super) fn choose(
        decoder: &Decoder<'_>,
        rows: &Rows,
        settings: &Settings,
        weights: u64,
        recompute: bool,
        (given, sharers): (Option<MemorySize>, usize),
        computer: &Computer,
    ) -> Result<Self, Failure> {
        let plan = |activations, releases| {
            let plan = Self::of(decoder, rows, settings, weights, activations, releases);
            match computer {
                Computer::Cpu => plan,
                Computer::Devices(devices) => {
                    let tokens = largest_pack(decoder, rows, settings);
                    let needed = footprint(decoder, devices, activations, tokens);
                    let of_devices = devices.iter().zip(needed).map(|(device, needed)| {
                        let (name, free) = (device.name(), device.free_memory());
                        DeviceMemory { name, needed, free }
                    });
                    plan.beside(decoder, of_devices.collect())
                }
            }
        };
        let first = match recompute {
            true => Activations::Recompute,
            false => Activations::Keep,
        };
        let mut way = plan(first, matches!(computer, Computer::Devices(_)));
        if way.devices.iter().any(DeviceMemory::is_short) {
            way = plan(Activations::Recompute, true);
        }
        let Some(budget) = given.map(|size| size.0).or_else(|| {
            let free = free_memory()?;
            Some(free / sharers as u64)
        }) else {
            return Ok(way);
        };
        for activations in [first, Activations::Recompute] {
            if way.total() > budget {
                let smaller = plan(activations, true);
                if smaller.total() < way.total() {
                    way = smaller;
                }
            }
        }
        if way.total() > budget && given.is_some() {
            return Err(Failure::new(
                Exit::Environment,
                format!("{} of memory are not enough", bytes(budget)),
            )
            .because(format!("at least about {} are needed", bytes(way.total())))
            .hint("pass more with --memory, or fewer targets with --targets"));
        }
        Ok(way)
    }

    /// All parts together.
    pub(super) fn total(&self) -> u64 {
        self.parts.iter().map(|(_, length)| length).sum()
    }

    /// What is left of it here when `devices` compute: no activations, but matrices and gradients on their way.
    fn beside(self, decoder: &Decoder<'_>, devices: Vec<DeviceMemory>) -> Self {
        let gradients = 4 * decoder.target_sizes().iter().sum::<usize>() as u64;
        let Self { parts, .. } = &self;
        let [mapped, copies, .., program] = parts[..] else {
            return self;
        };
        Self {
            parts: vec![
                mapped,
                copies,
                ("gradients on their way", gradients),
                (
                    "matrices on their way",
                    3 * decoder.block_bytes().max(decoder.head_bytes()) as u64,
                ),
                program,
            ],
            devices,
            ..self
        }
    }

    fn of(
        decoder: &Decoder<'_>,
        rows: &Rows,
        settings: &Settings,
        weights: u64,
        activations: Activations,
        releases: bool,
    ) -> Self {
        let one = 4 * decoder.target_sizes().iter().sum::<usize>() as u64;
        // The most lists of tensors that the method holds at once.
        let copies = match settings {
            Settings::Random(_) => ("1 copy of the targets in f32", one),
            Settings::Panacea(panacea) if panacea.steps == 0 => {
                ("1 copy of the targets in f32", one)
            }
            Settings::Adaptive(_) => ("4 copies of the targets in f32", 4 * one),
            Settings::Panacea(Panacea {
                final_eps: FinalEps::Whole,
                ..
            }) => ("6 copies of the targets in f32", 6 * one),
            Settings::Panacea(_) => ("7 copies of the targets in f32", 7 * one),
        };
        let tokens = largest_pack(decoder, rows, settings);
        let block = decoder.block_bytes() as u64;
        let mapped = match releases {
            false => ("mapped weights", weights),
            true => ("mapped weights, given back after each block", block),
        };
        Self {
            activations,
            releases,
            devices: Vec::new(),
            parts: vec![
                mapped,
                copies,
                (
                    "activations",
                    decoder.activation_bytes(activations, tokens) as u64,
                ),
                (
                    "a block's matrices, as they are multiplied with",
                    decoder.operand_bytes(activations) as u64,
                ),
                ("logits", 2 * LOGITS_BYTES as u64 + TILE_BYTES as u64),
                ("the program, tokenizer and rows", PROGRAM_BYTES),
            ],
        }
    }
}

impl DeviceMemory {
    /// Whether more is needed than is free.
    pub(super) fn is_short(&self) -> bool {
        self.free.is_some_and(|free| self.needed > free)
    }
}

/// Tokens of the largest pack that the method computes.
fn largest_pack(decoder: &Decoder<'_>, rows: &Rows, settings: &Settings) -> usize {
    let sets = [&rows.harmful, &rows.refusals, &rows.task, &rows.benign];
    let tokens = |row: &EncodedRow| row.tokens.len();
    let longest = |set: &[EncodedRow]| set.iter().map(tokens).max().unwrap_or(0);
    let batches = |set: &[EncodedRow], size: usize| {
        let shared = decoder.common_beginning(set);
        shared + size.saturating_mul(longest(set) - shared)
    };
    let whole = |set: &[EncodedRow]| {
        let shared = decoder.common_beginning(set);
        shared + set.iter().map(|row| tokens(row) - shared).sum::<usize>()
    };
    let size = match settings {
        Settings::Adaptive(adaptive) => adaptive.batch,
        Settings::Panacea(panacea) if panacea.steps > 0 => panacea.batch,
        Settings::Panacea(_) | Settings::Random(_) => 0,
    };
    let of_batches = sets.iter().map(|set| batches(set, size)).max();
    let searches = matches!(
        settings,
        Settings::Random(_)
            | Settings::Panacea(Panacea {
                rho: Radius::Auto(_),
                ..
            })
            | Settings::Adaptive(_)
    );
    let of_benign = if searches { whole(&rows.benign) } else { 0 };
    let of_harmful = match settings {
        Settings::Panacea(Panacea {
            final_eps: FinalEps::LastBatch,
            rho: Radius::Fixed(_),
            steps: 1..,
            ..
        })
        | Settings::Adaptive(_)
        | Settings::Random(_) => 0,
        Settings::Panacea(_) => whole(&rows.harmful),
    };
    let single = sets.iter().map(|set| longest(set)).max().unwrap_or(0);
    of_batches
        .unwrap_or(0)
        .max(of_benign)
        .max(of_harmful)
        .min(PACK_TOKENS)
        .max(single)
}

/// Memory that can be had without swapping, where the system tells.
fn free_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kibibytes.checked_mul(1024)
}

impl FromStr for MemorySize {
    type Err = MemorySizeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refused = || MemorySizeError {
            found: text.to_owned(),
        };
        let end = text
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(text.len());
        let (number, unit) = text.split_at(end);
        let exponent = match unit.trim().to_ascii_uppercase().as_str() {
            "" | "B" => 0,
            "K" | "KB" | "KIB" => 1,
            "M" | "MB" | "MIB" => 2,
            "G" | "GB" | "GIB" => 3,
            "T" | "TB" | "TIB" => 4,
            _ => return Err(refused()),
        };
        let number: f64 = number.parse().map_err(|_| refused())?;
        let size = number * 1024f64.powi(exponent);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a finite number of bytes, of which the fraction means nothing"
        )]
        match (1.0..1e18).contains(&size) {
            true => Ok(Self(size as u64)),
            false => Err(refused()),
        }
    }
}

/// A text that is no amount of memory.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("`{found}` is not an amount of memory, such as `16G`")]
pub(super) struct MemorySizeError {
    found: String,
}

/// What is resident before anything is computed: 30 MB of program and threads, and a tokenizer of some 50,000 entries.
const PROGRAM_BYTES: u64 = 64 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_in_powers_of_1024() {
        for (text, wanted) in [
            ("7", 7),
            ("1K", 1 << 10),
            ("1.5 MiB", 3 << 19),
            ("20gb", 20 << 30),
            ("2T", 2 << 40),
        ] {
            assert_eq!(text.parse(), Ok(MemorySize(wanted)), "{text}");
        }
        for text in ["", "G", "0", "-1G", "1X", "1e99T", "nan"] {
            assert!(text.parse::<MemorySize>().is_err(), "{text}");
        }
    }
}
