//! `inspect`: what a checkpoint, a perturbation, a manifest or a signature holds. Nothing is verified.

mod adapter;
mod energy;
mod ranks;

use std::collections::BTreeMap;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use panacea_formats::json::parse_strict;
use panacea_formats::{
    Checkpoint, Form, FormatError, FormatErrorKind, Layout, Perturbation, SafetensorsFile,
    TensorView, shown,
};
use panacea_patch::convert::StoredModel;
use panacea_patch::manifest::{Statement, manifest_path, signature_path};
use panacea_patch::model::TargetSelection;
use rayon::prelude::*;
use serde_json::{Value, json};

use super::args::InspectArgs;
use super::error::{Exit, Failure};
use super::find::read_config;
use super::report::{Report, Reporter, Table, bar, bytes, number, percent};
use super::targets::{block_and_projection, targets_by_name};
use super::verify;
use energy::Energy;
use ranks::Ranks;

pub(super) fn run(args: &InspectArgs, reporter: &Reporter) -> Result<(), Failure> {
    let path = &args.path;
    let metadata =
        std::fs::metadata(path).map_err(|error| Failure::from(FormatError::new(path, error)))?;
    let extension = path.extension().and_then(|it| it.to_str()).unwrap_or("");
    let kind = match extension {
        _ if metadata.is_dir() => Kind::Checkpoint,
        "json" => Kind::Manifest,
        "sig" => Kind::Signature,
        "safetensors" if is_perturbation(path)? => Kind::Perturbation,
        _ => Kind::Checkpoint,
    };
    if args.targets.is_some() && kind != Kind::Checkpoint {
        return Err(Failure::no_effect("--targets", "here")
            .because("only a checkpoint has targets to choose")
            .hint("leave out `--targets`"));
    }
    let mut table = Table::new();
    let found = match kind {
        Kind::Checkpoint => checkpoint(path, args.targets.as_ref(), &mut table)?,
        Kind::Manifest => manifest(path, &mut table)?,
        Kind::Perturbation => perturbation(path, &mut table)?,
        Kind::Signature => signature(path, &mut table)?,
    };
    let report = Report {
        found: Some(found),
        ..Report::of("inspect")
    };
    reporter.result(report, &table)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Checkpoint,
    Manifest,
    Perturbation,
    Signature,
}

/// Whether the safetensors file at `path` is a perturbation.
///
/// # Errors
/// When it cannot be read.
pub(super) fn is_perturbation(path: &Path) -> Result<bool, Failure> {
    let file = SafetensorsFile::open(path)?;
    Ok(file.metadata().iter().any(|(key, _)| key == "panacea"))
}

fn checkpoint(
    path: &Path,
    selection: Option<&TargetSelection>,
    table: &mut Table,
) -> Result<Value, Failure> {
    let checkpoint = Checkpoint::open(path).map_err(|error| {
        let unsound = matches!(error.kind, FormatErrorKind::Safetensors(_));
        let failure = Failure::from(error);
        match unsound && path.extension().is_none_or(|it| it != "safetensors") && path.is_file() {
            true => failure.hint(
                "give a checkpoint, a perturbation, a manifest (`.json`) or a signature (`.sig`)",
            ),
            false => failure,
        }
    })?;
    let tensors: Vec<TensorView<'_>> = checkpoint.tensors().collect();
    let parameters: usize = tensors.iter().map(TensorView::elements).sum();
    let layout = match checkpoint.layout() {
        Layout::Adapter => "LoRA adapter",
        Layout::Gguf => "one GGUF file",
        Layout::LoneFile => "one file",
        Layout::SplitGguf => "a GGUF file in parts",
        Layout::Sharded => "directory with shards",
        _ => "directory",
    };
    table.heading(format!("{} is a checkpoint: {layout}", path.display()));
    let mut files = Vec::new();
    for shard in checkpoint.files() {
        let count = shard.file.tensors().count();
        table.row(
            "weights",
            format!(
                "{}, {}, {count} tensors",
                shown(&shard.name),
                bytes(shard.file.length() as u64)
            ),
        );
        files.push(json!({"name": shard.name, "bytes": shard.file.length(), "tensors": count}));
    }
    table.row(
        "parameters",
        format!("{parameters} in {} tensors", tensors.len()),
    );
    let mut dtypes: BTreeMap<&str, usize> = BTreeMap::new();
    for tensor in &tensors {
        *dtypes.entry(tensor.dtype.name()).or_default() += tensor.elements();
    }
    for (dtype, elements) in &dtypes {
        table.row("stored as", format!("{dtype}: {elements}"));
    }
    let is_adapter = checkpoint.layout() == Layout::Adapter;
    let config = match is_adapter {
        true => Value::Null,
        false => config(&checkpoint, table),
    };
    let in_metadata = checkpoint
        .gguf_metadata()
        .is_some_and(|metadata| metadata.value("tokenizer.ggml.tokens").is_some());
    let tokenizer = in_metadata || checkpoint.side_file("tokenizer.json").is_some();
    table.row(
        "tokenizer",
        match (tokenizer, is_adapter) {
            (true, _) if in_metadata => "in the metadata",
            (true, _) => "tokenizer.json",
            (false, true) => "none of its own",
            (false, false) => "none",
        },
    );
    let (adapter, targets) = match is_adapter {
        true => adapter::describe(&checkpoint, selection, table),
        false => {
            let selection = selection.cloned().unwrap_or_default();
            let stored = StoredModel::of(&checkpoint).ok();
            let targets = match &stored {
                Some(stored) => {
                    let renamed: Vec<_> = stored.tensors(&checkpoint).collect();
                    targets_by_name(&renamed, &selection)
                }
                None => targets_by_name(&tensors, &selection),
            };
            let targets = targets_row(&selection.to_string(), targets, table);
            (Value::Null, targets)
        }
    };
    let not_finite = not_finite(&tensors)?;
    match not_finite.as_slice() {
        [] => table.row("not finite", "none"),
        [(name, count), rest @ ..] => table.row(
            "not finite",
            format!(
                "{count} values of {}, and those of {} more tensors",
                shown(name),
                rest.len()
            ),
        ),
    }
    let (manifest, signature) = (
        manifest_path(path).is_file(),
        signature_path(path).is_file(),
    );
    let presence = |there| if there { "there, not checked" } else { "none" };
    table.row("manifest", presence(manifest));
    table.row("signature", presence(signature));
    Ok(json!({
        "kind": "checkpoint",
        "layout": layout,
        "files": files,
        "tensors": tensors.len(),
        "parameters": parameters,
        "dtypes": dtypes,
        "config": config,
        "adapter": adapter,
        "tokenizer": tokenizer,
        "targets": targets,
        "not_finite": not_finite
            .iter()
            .map(|(name, count)| json!({"tensor": name, "values": count}))
            .collect::<Vec<_>>(),
        "manifest": manifest,
        "signature": signature,
    }))
}

/// Tells which tensors `selection` names.
fn targets_row(
    selection: &str,
    targets: Result<Vec<(String, Vec<usize>)>, Failure>,
    table: &mut Table,
) -> Value {
    match targets {
        Ok(targets) => {
            let elements: usize = targets
                .iter()
                .map(|(_, shape)| shape.iter().product::<usize>())
                .sum();
            table.row(
                "targets",
                format!(
                    "{selection}: {elements} elements in {} tensors",
                    targets.len()
                ),
            );
            json!({"selection": selection, "tensors": targets.len(), "elements": elements})
        }
        Err(failure) => {
            table.row("targets", failure.error);
            Value::Null
        }
    }
}

fn config(checkpoint: &Checkpoint, table: &mut Table) -> Value {
    let found = match (checkpoint.side_file("config.json"), checkpoint.layout()) {
        (_, layout) if layout.is_gguf() => StoredModel::of(checkpoint)
            .and_then(|model| model.config(checkpoint))
            .map_err(|error| error.to_string()),
        (Some(path), _) => {
            read_config(&path).map_err(|failure| failure.because.unwrap_or_default())
        }
        (None, _) => {
            table.row("config", "none: gradients cannot be computed");
            return Value::Null;
        }
    };
    match found {
        Ok(config) => {
            table.row(
                "config",
                format!(
                    "{}, {} blocks of width {}, vocabulary of {}",
                    config.model_type,
                    config.num_hidden_layers(),
                    config.hidden_size,
                    config.vocab_size
                ),
            );
            json!({
                "model_type": config.model_type,
                "num_hidden_layers": config.num_hidden_layers(),
                "hidden_size": config.hidden_size,
                "vocab_size": config.vocab_size,
                "supported": true,
            })
        }
        Err(because) => {
            table.row("config", format!("cannot be computed with: {because}"));
            json!({"supported": false, "because": because})
        }
    }
}

/// Tensors with values that are infinite or not numbers, and how many.
fn not_finite(tensors: &[TensorView<'_>]) -> Result<Vec<(String, usize)>, Failure> {
    const BLOCK: usize = 1 << 16;
    let counted: Vec<(String, usize)> = tensors
        .par_iter()
        .filter(|tensor| tensor.dtype.is_patchable())
        .map(|tensor| {
            let elements = tensor.elements();
            let mut values = vec![0.0_f32; BLOCK.min(elements)];
            let mut count = 0;
            for start in (0..elements).step_by(BLOCK) {
                let end = elements.min(start + BLOCK);
                let block = &mut values[..end - start];
                tensor.widen_into(start..end, block).map_err(|error| {
                    Failure::doing(Exit::Refused, "a tensor cannot be read", &error)
                })?;
                count += block.iter().filter(|value| !value.is_finite()).count();
            }
            Ok((tensor.name.to_owned(), count))
        })
        .collect::<Result<_, Failure>>()?;
    Ok(counted
        .into_iter()
        .filter(|(_, count)| *count > 0)
        .collect())
}

fn perturbation(path: &Path, table: &mut Table) -> Result<Value, Failure> {
    let perturbation = Perturbation::open(path)?;
    let record = perturbation.record();
    let forms = Forms::of(&perturbation);
    let energy = Energy::of(&perturbation)?;
    let ranks = Ranks::of(&perturbation, &energy)?;
    table.heading(format!("{} is a perturbation", path.display()));
    table.row("made by", shown(&record.tool).to_string());
    table.row(
        "method",
        format!("{}, seed {}", shown(&record.method), record.seed),
    );
    for (name, value) in &record.parameters {
        table.row(
            shown(name).to_string(),
            shown(&value.to_string()).to_string(),
        );
    }
    for source in &record.data {
        table.row(
            format!("{} rows", shown(&source.role)),
            format!(
                "{} of {}, sha256 {}",
                source.rows,
                shown(&source.name),
                source.sha256
            ),
        );
    }
    forms.describe(table);
    table.row(
        "norm",
        format!(
            "{} over {} elements in {} tensors",
            number(energy.norm()),
            energy.elements(),
            energy.tensors.len()
        ),
    );
    table.heading("share of the energy |eps|^2, by block and projection:");
    let shares = Shares::of(&energy);
    table.list(shares.lines());
    table.heading("share of the elements that hold most of the energy:");
    let concentration: Vec<(f64, f64)> = [0.8, 0.9, 0.95, 0.99]
        .into_iter()
        .map(|energy_share| (energy_share, energy.elements_holding(energy_share)))
        .collect();
    for (energy_share, elements) in &concentration {
        table.row(format!("{:.0}%", 100.0 * energy_share), percent(*elements));
    }
    if !ranks.is_empty() {
        table.heading("share of the energy that a low-rank form keeps, by its rank:");
        table.list(ranks.lines());
    }
    Ok(json!({
        "kind": "perturbation",
        "forms": forms.to_json(),
        "method": record.method,
        "parameters": record.parameters,
        "seed": record.seed,
        "tool": record.tool,
        "data": record.data,
        "norm": energy.norm(),
        "elements": energy.elements(),
        "tensors": energy
            .tensors
            .iter()
            .map(|tensor| json!({
                "name": tensor.name,
                "elements": tensor.elements,
                "norm": tensor.squared.sqrt(),
                "share": energy.share(tensor.squared),
            }))
            .collect::<Vec<_>>(),
        "blocks": shares.to_json(),
        "concentration": concentration
            .iter()
            .map(|(energy, elements)| json!({"energy": energy, "elements": elements}))
            .collect::<Vec<_>>(),
        "ranks": ranks.to_json(),
    }))
}

/// The tensors of a perturbation by their form.
#[derive(Debug, Default)]
struct Forms {
    /// By the form's name and, where it is low rank, the rank.
    groups: BTreeMap<(&'static str, usize), FormGroup>,
}

#[derive(Debug, Default)]
struct FormGroup {
    tensors: usize,
    /// Entries of sparse tensors.
    entries: usize,
    stored_bytes: u64,
}

impl Forms {
    fn of(perturbation: &Perturbation) -> Self {
        let mut forms = Self::default();
        for delta in perturbation.deltas() {
            let (key, entries) = match delta.form() {
                Form::LowRank { rank } => ((LOW_RANK, rank), 0),
                Form::Sparse { entries } => ((SPARSE, 0), entries),
                _ => (("dense", 0), 0),
            };
            let group = forms.groups.entry(key).or_default();
            group.tensors += 1;
            group.entries += entries;
            group.stored_bytes += delta.stored_bytes();
        }
        forms
    }

    fn describe(&self, table: &mut Table) {
        for (&(form, rank), group) in &self.groups {
            let what = match form {
                LOW_RANK => format!("rank {rank}"),
                SPARSE => format!("sparse, {} elements", group.entries),
                other => other.to_owned(),
            };
            let FormGroup {
                tensors,
                stored_bytes,
                ..
            } = group;
            table.row(
                "form",
                format!("{what}: {tensors} tensors, {}", bytes(*stored_bytes)),
            );
        }
    }

    fn to_json(&self) -> Vec<Value> {
        self.groups
            .iter()
            .map(|(&(form, rank), group)| {
                let mut value = json!({
                    "form": form,
                    "tensors": group.tensors,
                    "stored_bytes": group.stored_bytes,
                });
                match form {
                    LOW_RANK => value["rank"] = json!(rank),
                    SPARSE => value["entries"] = json!(group.entries),
                    _ => {}
                }
                value
            })
            .collect()
    }
}

/// Names of forms, as reports have them.
const LOW_RANK: &str = "low-rank";
const SPARSE: &str = "sparse";

/// The energy of each block, over its projections.
struct Shares {
    /// In the order of their first tensor.
    projections: Vec<String>,
    /// By block; tensors outside of any block last.
    blocks: BTreeMap<(bool, usize), Vec<f64>>,
}

impl Shares {
    fn of(energy: &Energy) -> Self {
        let mut shares = Self {
            projections: Vec::new(),
            blocks: BTreeMap::new(),
        };
        for tensor in &energy.tensors {
            let (_, projection) = block_and_projection(&tensor.name);
            if !shares.projections.iter().any(|known| known == projection) {
                shares.projections.push(projection.to_owned());
            }
        }
        for tensor in &energy.tensors {
            let (block, projection) = block_and_projection(&tensor.name);
            let column = shares
                .projections
                .iter()
                .position(|known| known == projection);
            let of_block = shares
                .blocks
                .entry((block.is_none(), block.unwrap_or(0)))
                .or_insert_with(|| vec![0.0; shares.projections.len()]);
            if let Some(share) = column.and_then(|column| of_block.get_mut(column)) {
                *share += energy.share(tensor.squared);
            }
        }
        shares
    }

    fn lines(&self) -> Vec<Vec<String>> {
        let largest = self
            .blocks
            .values()
            .map(|shares| shares.iter().sum::<f64>())
            .fold(0.0, f64::max);
        let mut head = vec!["block".to_owned()];
        head.extend(self.projections.iter().map(|name| shown(name).to_string()));
        head.extend(["all".to_owned(), String::new()]);
        let mut lines = vec![head];
        for (&(outside, block), shares) in &self.blocks {
            let all: f64 = shares.iter().sum();
            let mut line = vec![if outside {
                "none".to_owned()
            } else {
                block.to_string()
            }];
            line.extend(shares.iter().map(|share| percent(*share)));
            line.push(percent(all));
            line.push(bar(if largest > 0.0 { all / largest } else { 0.0 }, 24));
            lines.push(line);
        }
        let mut line = vec!["all".to_owned()];
        for column in 0..self.projections.len() {
            let sum: f64 = self.blocks.values().map(|shares| shares[column]).sum();
            line.push(percent(sum));
        }
        lines.push(line);
        lines
    }

    fn to_json(&self) -> Vec<Value> {
        self.blocks
            .iter()
            .map(|(&(outside, block), shares)| {
                let projections: BTreeMap<_, _> = self.projections.iter().zip(shares).collect();
                json!({
                    "block": (!outside).then_some(block),
                    "share": shares.iter().sum::<f64>(),
                    "projections": projections,
                })
            })
            .collect()
    }
}

fn manifest(path: &Path, table: &mut Table) -> Result<Value, Failure> {
    let bytes = read(path)?;
    let statement = Statement::parse(&bytes)
        .map_err(|error| Failure::doing(Exit::Refused, not_a(path, "manifest"), &error))?;
    table.heading(format!(
        "{} is a manifest; who wrote it is unproven",
        path.display()
    ));
    verify::describe(&statement, table);
    for subject in statement.subjects() {
        table.row(
            "file",
            format!("{}, sha256 {}", subject.name, subject.digest),
        );
    }
    for byproduct in &statement.provenance().byproducts {
        for (name, value) in &byproduct.measured {
            table.row(
                format!("{}: {}", shown(&byproduct.name), shown(name)),
                shown(&value.to_string()).to_string(),
            );
        }
    }
    let mut found: Value = serde_json::from_slice(&bytes).unwrap_or_default();
    found["kind"] = json!("manifest");
    Ok(found)
}

/// What a signature says of itself: anyone could have written it.
fn signature(path: &Path, table: &mut Table) -> Result<Value, Failure> {
    let refused = || {
        Failure::new(Exit::Refused, not_a(path, "signature"))
            .because("it is not a Sigstore bundle around an in-toto statement")
    };
    let text = String::from_utf8(read(path)?).map_err(|_| refused())?;
    let bundle = parse_strict(&text).map_err(|_| refused())?;
    let payload = bundle
        .pointer("/dsseEnvelope/payload")
        .and_then(Value::as_str)
        .and_then(|payload| STANDARD.decode(payload).ok())
        .and_then(|payload| String::from_utf8(payload).ok())
        .and_then(|payload| parse_strict(&payload).ok())
        .ok_or_else(refused)?;
    let hint = bundle
        .pointer("/verificationMaterial/publicKey/hint")
        .cloned();
    let name = payload.pointer("/subject/0/name").cloned();
    let resources = payload
        .pointer("/predicate/resources")
        .and_then(Value::as_array)
        .ok_or_else(refused)?;
    let said = |value: &Option<Value>| match value {
        Some(Value::String(text)) => shown(text).to_string(),
        _ => "nothing".to_owned(),
    };
    table.heading(format!(
        "{} is a signature; it was not verified",
        path.display()
    ));
    table.row("names the key", said(&hint));
    table.row("signed as", said(&name));
    for resource in resources {
        table.row(
            "file",
            format!(
                "{}, sha256 {}",
                said(&resource.get("name").cloned()),
                said(&resource.get("digest").cloned())
            ),
        );
    }
    Ok(json!({"kind": "signature", "key": hint, "name": name, "files": resources}))
}

fn not_a(path: &Path, what: &str) -> String {
    format!("`{}` is not a {what} that can be read", path.display())
}

/// Reads a manifest or signature, which is never long.
fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    use std::io::Read as _;
    let mut bytes = Vec::new();
    let unreadable = |error| Failure::from(FormatError::new(path, error));
    let file = std::fs::File::open(path).map_err(unreadable)?;
    file.take(LONGEST_FILE + 1)
        .read_to_end(&mut bytes)
        .map_err(unreadable)?;
    match bytes.len() as u64 > LONGEST_FILE {
        true => Err(Failure::new(
            Exit::Refused,
            format!("`{}` is too long to be read", path.display()),
        )
        .because(format!("it has more than {LONGEST_FILE} bytes"))),
        false => Ok(bytes),
    }
}

/// Far above any sound manifest: a file takes some 150 bytes.
const LONGEST_FILE: u64 = 64 << 20;
