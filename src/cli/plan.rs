//! `--dry-run`: what a run would read, compute, hold in memory and write. Everything that can be refused was refused before.
//!
//! Bytes are exact but for those of manifest and signature, which are not counted, and of a perturbation, whose header depends on
//! what is found, and its entries too where it is sparse. Memory and work are estimates from above: a search for a radius may end
//! early, and so may the steps.

use std::path::Path;

use panacea_formats::{ADAPTER_CONFIG_FILE, Checkpoint, Layout, Perturbation, copied_bytes};
use panacea_patch::convert::CONVERSION_BYTES;
use panacea_patch::manifest::{manifest_path, signature_path};
use panacea_patch::model::{Decoder, EncodedRow};
use panacea_patch::optimize::{MOST_RADII, Radius, Rows, Settings};
use serde_json::{Value, json};

use super::error::Failure;
use super::evaluation::PatchEvaluation;
use super::find::Prepared;
use super::form::FormChoice;
use super::memory::DeviceMemory;
use super::model::Model;
use super::output::Output;
use super::report::{Report, Reporter, Table, bytes, number};
use super::settings::Search;

/// A run that was thought through and not begun.
#[derive(Debug)]
pub(super) struct Plan {
    output: String,
    /// What is read: a name and its length.
    reads: Vec<(String, u64)>,
    /// What is written.
    writes: Vec<String>,
    written_bytes: u64,
    /// How exact that is, in words before it.
    written: &'static str,
    /// What is held in memory: a name and its length.
    memory: Vec<(&'static str, u64)>,
    /// What devices hold.
    devices: Vec<DeviceMemory>,
    /// Floating-point operations, at most.
    operations: f64,
    targets: Option<(usize, usize)>,
    /// Settings that are tried.
    trials: Option<usize>,
}

impl Plan {
    /// The whole job.
    ///
    /// # Errors
    /// When the side files cannot be listed.
    pub(super) fn of_job(
        model: &Model,
        search: &Search,
        prepared: &Prepared<'_>,
        output: &Output,
    ) -> Result<Self, Failure> {
        let mut plan = Self::of_copy(model, output)?;
        plan.add_search(model, search, prepared);
        Ok(plan)
    }

    /// The search alone, whose perturbation in the form `form`, of some `size` bytes, goes to `target`.
    pub(super) fn of_search(
        model: &Model,
        search: &Search,
        prepared: &Prepared<'_>,
        form: FormChoice,
        target: &Path,
        size: u64,
    ) -> Self {
        let mut plan = Self {
            output: target.display().to_string(),
            reads: weights(&model.checkpoint),
            writes: vec![target.display().to_string()],
            written_bytes: size,
            written: match form {
                FormChoice::Sparse(_) => "at most about",
                _ => "about",
            },
            memory: Vec::new(),
            devices: Vec::new(),
            operations: 0.0,
            targets: None,
            trials: None,
        };
        plan.reads
            .extend(model.base().into_iter().flat_map(weights));
        plan.add_adapter_config(model);
        plan.add_search(model, search, prepared);
        plan
    }

    /// An adapter of the files `names`, of some `size` bytes, beside the perturbation.
    pub(super) fn add_adapter(&mut self, names: &[String], size: u64) {
        self.writes.extend_from_slice(names);
        self.written_bytes += size;
    }

    /// An evaluation before and after.
    pub(super) fn add_evaluation(&mut self, evaluation: Option<&PatchEvaluation>) {
        let Some((sets, files)) = evaluation.map(PatchEvaluation::plan) else {
            return;
        };
        self.reads.extend(sets.into_iter().map(|set| (set, 0)));
        self.writes.extend(files);
    }

    fn add_search(&mut self, model: &Model, search: &Search, prepared: &Prepared<'_>) {
        let plan = self;
        let elements = prepared.target_elements();
        plan.trials = search.trials.as_ref().map(|trials| trials.count);
        plan.targets = Some((prepared.target_count(), elements));
        for path in prepared.side_files() {
            plan.add_read(path);
        }
        let one = 4 * elements as u64;
        match prepared.computing() {
            None => plan.memory.push(("1 copy of the targets in f32", one)),
            Some((decoder, rows, memory)) => {
                plan.memory.extend_from_slice(&memory.parts);
                plan.devices.clone_from(&memory.devices);
                plan.operations = operations(model.whole(), search, decoder, elements, rows);
            }
        }
        for source in prepared.data() {
            plan.reads.push((
                format!("{} rows of {} ({})", source.rows, source.name, source.role),
                0,
            ));
        }
    }

    fn add_adapter_config(&mut self, model: &Model) {
        if model.checkpoint.layout() == Layout::Adapter {
            self.add_read(&model.checkpoint.path().join(ADAPTER_CONFIG_FILE));
        }
    }

    /// A side file, unless it is in the plan already: copied ones may decide the result as well.
    fn add_read(&mut self, path: &Path) {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let length = std::fs::metadata(path).map_or(0, |metadata| metadata.len());
        let read = (name.into_owned(), length);
        if !self.reads.contains(&read) {
            self.reads.push(read);
        }
    }

    /// The addition of a perturbation from a file.
    ///
    /// # Errors
    /// When the side files cannot be listed.
    pub(super) fn of_addition(
        model: &Model,
        perturbation: &Perturbation,
        output: &Output,
    ) -> Result<Self, Failure> {
        let mut plan = Self::of_copy(model, output)?;
        let elements = perturbation.deltas().map(|delta| delta.elements()).sum();
        plan.targets = Some((perturbation.deltas().len(), elements));
        plan.reads.push((
            perturbation.path().display().to_string(),
            perturbation.file().length() as u64,
        ));
        Ok(plan)
    }

    /// A conversion that reads files of some length, and writes those at `writes`, of `written_bytes` together.
    pub(super) fn of_conversion(
        target: &Path,
        reads: Vec<(String, u64)>,
        writes: Vec<String>,
        written_bytes: u64,
    ) -> Self {
        Self {
            output: target.display().to_string(),
            reads,
            writes,
            written_bytes,
            written: "",
            memory: vec![("rows on their way", CONVERSION_BYTES)],
            devices: Vec::new(),
            operations: 0.0,
            targets: None,
            trials: None,
        }
    }

    fn of_copy(model: &Model, output: &Output) -> Result<Self, Failure> {
        let checkpoint = model.copied();
        let target = output.target().display().to_string();
        let side_files = checkpoint.side_files()?;
        let mut reads = weights(checkpoint);
        for file in &side_files.copied {
            let length = std::fs::metadata(&file.path).map_or(0, |metadata| metadata.len());
            reads.push((file.name.clone(), length));
        }
        let writes = match output.is_one_file(checkpoint) {
            true => {
                let mut writes = vec![target.clone()];
                writes.push(manifest_path(output.target()).display().to_string());
                if output.is_signed() {
                    writes.push(signature_path(output.target()).display().to_string());
                }
                writes
            }
            false => {
                let names = reads.iter().map(|(name, _)| name.as_str());
                let signature = output.is_signed().then_some("model.sig");
                names
                    .chain(["panacea.manifest.json"])
                    .chain(signature)
                    .map(|name| format!("{target}/{name}"))
                    .collect()
            }
        };
        // Of an adapter, the files of the other side are read and not written.
        let other = match model.merges() {
            true => Some(&model.checkpoint),
            false => model.base(),
        };
        reads.extend(other.into_iter().flat_map(weights));
        let mut plan = Self {
            output: target,
            reads,
            writes,
            written_bytes: copied_bytes(checkpoint)?,
            written: "",
            memory: vec![(
                "chunks being patched",
                8 * panacea_formats::CHUNK_BYTES as u64,
            )],
            devices: Vec::new(),
            operations: 0.0,
            targets: None,
            trials: None,
        };
        plan.add_adapter_config(model);
        Ok(plan)
    }

    /// Prints it.
    ///
    /// # Errors
    /// When stdout cannot be written to.
    pub(super) fn print(&self, command: &'static str, reporter: &Reporter) -> Result<(), Failure> {
        let mut table = Table::new();
        table.heading("dry run: nothing was written");
        if let Some((count, elements)) = self.targets {
            table.row("targets", format!("{elements} elements in {count} tensors"));
        }
        for (name, length) in &self.reads {
            table.row("reads", sized(name, *length));
        }
        let length = bytes(self.written_bytes);
        table.row("writes", format!("{} {length}", self.written).trim_start());
        for name in &self.writes {
            table.row("", name);
        }
        let memory: u64 = self.memory.iter().map(|(_, length)| length).sum();
        table.row("memory", format!("about {}", bytes(memory)));
        for (name, length) in &self.memory {
            table.row("", sized(name, *length));
        }
        for device in &self.devices {
            let needed = bytes(device.needed);
            let is = match device.free {
                None => format!("about {needed}"),
                Some(free) => format!("about {needed} of {} that are free", bytes(free)),
            };
            let short = match device.is_short() {
                true => "; where it is not enough, rows are computed in smaller parts",
                false => "",
            };
            table.row(device.name.to_string(), format!("{is}{short}"));
        }
        if let Some(trials) = self.trials {
            table.row(
                "search",
                format!("{trials} trials, each measured at up to {MOST_RADII} radii"),
            );
        }
        if self.operations > 0.0 {
            table.row(
                "work",
                format!(
                    "at most about {} floating-point operations",
                    number(self.operations)
                ),
            );
        }
        let report = Report {
            output: Some(self.output.clone()),
            plan: Some(self.to_json(memory)),
            ..Report::of(command)
        };
        reporter.result(report, &table)
    }

    fn to_json(&self, memory: u64) -> Value {
        let named = |list: &[(String, u64)]| -> Vec<Value> {
            list.iter()
                .map(|(name, bytes)| json!({"name": name, "bytes": bytes}))
                .collect()
        };
        let parts: Vec<(String, u64)> = self
            .memory
            .iter()
            .map(|(name, bytes)| ((*name).to_owned(), *bytes))
            .collect();
        let of_device = |it: &DeviceMemory| json!({"name": it.name.to_string(), "bytes": it.needed, "free_bytes": it.free});
        let devices: Vec<Value> = self.devices.iter().map(of_device).collect();
        json!({
            "devices": devices,
            "reads": named(&self.reads),
            "writes": self.writes,
            "written_bytes": self.written_bytes,
            "memory_bytes": memory,
            "memory": named(&parts),
            "operations": self.operations,
            "trials": self.trials,
            "targets": self.targets.map(|(count, _)| count),
            "target_elements": self.targets.map(|(_, elements)| elements),
        })
    }
}

/// The files of weights with their lengths.
fn weights(checkpoint: &Checkpoint) -> Vec<(String, u64)> {
    checkpoint
        .files()
        .iter()
        .map(|shard| (shard.name.clone(), shard.file.length() as u64))
        .collect()
}

fn sized(name: &str, length: u64) -> String {
    match length {
        0 => name.to_owned(),
        _ => format!("{name}, {}", bytes(length)),
    }
}

/// Tokens that are computed, and how many of them predict one whose loss counts.
#[derive(Clone, Copy, Debug, Default)]
struct Tokens {
    all: f64,
    predicted: f64,
}

impl Tokens {
    /// As many as `count` rows of `rows` have, by the mean; the `shared` ones that all begin with count once.
    #[expect(clippy::cast_precision_loss, reason = "an estimate")]
    fn of(rows: &[EncodedRow], count: usize, shared: usize) -> Self {
        if rows.is_empty() || count == 0 {
            return Self::default();
        }
        let part = count as f64 / rows.len() as f64;
        let own: usize = rows.iter().map(|row| row.tokens.len() - shared).sum();
        let predicted: usize = rows.iter().map(EncodedRow::predicted).sum();
        Self {
            all: shared as f64 + own as f64 * part,
            predicted: predicted as f64 * part,
        }
    }
}

/// Floating-point operations of matrix products, two for each weight and token: forward once, backward once more for inputs and
/// once for targets; the head at predicted tokens only.
#[expect(clippy::cast_precision_loss, reason = "an estimate")]
fn operations(
    checkpoint: &Checkpoint,
    search: &Search,
    decoder: &Decoder<'_>,
    target_elements: usize,
    rows: &Rows,
) -> f64 {
    let config = decoder.config();
    let head = config.vocab_size as f64 * config.hidden_size as f64;
    let blocks: usize = checkpoint
        .tensors()
        .filter(|tensor| {
            tensor.shape.len() == 2 && tensor.shape != [config.vocab_size, config.hidden_size]
        })
        .map(|tensor| tensor.elements())
        .sum();
    let (blocks, targets) = (blocks as f64, target_elements as f64);
    let forward = |tokens: Tokens| 2.0 * blocks * tokens.all + 2.0 * head * tokens.predicted;
    let gradient = |tokens: Tokens| {
        (4.0 * blocks + 2.0 * targets) * tokens.all + 4.0 * head * tokens.predicted
    };
    let tokens =
        |rows: &[EncodedRow], count: usize| Tokens::of(rows, count, decoder.common_beginning(rows));
    let trial = forward(tokens(&rows.benign, rows.benign.len()))
        + forward(tokens(&rows.task, rows.task.len().min(TASK_ROWS)));
    let radius_search = |radius: Radius| match radius {
        Radius::Auto(_) => (TRIALS + 1.0) * trial,
        Radius::Fixed(_) => 0.0,
    };
    match &search.settings {
        Settings::Adaptive(adaptive) => {
            let trials = search.trial_settings(decoder.targets());
            let longest = trials.as_ref().map(|it| it.space.longest(&it.base));
            let adaptive = longest.as_ref().unwrap_or(adaptive);
            let batch = |rows: &[EncodedRow]| gradient(tokens(rows, adaptive.batch));
            let guards = batch(&rows.benign) + batch(&rows.task);
            let held = (rows.harmful.len() / 4).clamp(1, 24);
            // Two more tokens of each answer, when the first begins a refusal.
            let look =
                forward(tokens(&rows.harmful, held)) + 3.0 * forward(tokens(&rows.refusals, held));
            let contrast = batch(&rows.harmful) + batch(&rows.refusals) + guards + look;
            // Each run of contrast steps, of which there may be as many as steps, is followed by repair.
            let repair = adaptive.repair_steps as f64 * guards + look;
            let steps = adaptive.steps as f64 * (contrast + repair);
            match trials {
                None => steps + 2.0 * (look + trial) + radius_search(adaptive.rho),
                // The chosen one is found again.
                Some(trials) => {
                    let radii = MOST_RADII as f64 * (look + trial);
                    (trials.trials as f64 + 1.0) * (steps + radii)
                }
            }
        }
        Settings::Panacea(panacea) => {
            let batch = |rows: &[EncodedRow]| gradient(tokens(rows, panacea.batch));
            let whole = tokens(&rows.harmful, rows.harmful.len());
            let first = match panacea.rho {
                Radius::Auto(_) => gradient(whole),
                Radius::Fixed(_) => 0.0,
            };
            panacea.steps as f64 * (batch(&rows.task) + 2.0 * batch(&rows.harmful))
                + gradient(whole)
                + forward(whole)
                + first
                + radius_search(panacea.rho)
        }
        Settings::Random(random) => radius_search(random.rho),
    }
}

/// Radii that a search tries at most: 13 doublings or halvings and 4 bisections.
const TRIALS: f64 = 17.0;

/// Task rows that a search looks at.
const TASK_ROWS: usize = 64;
