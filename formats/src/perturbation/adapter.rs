//! Writes a low-rank perturbation as a LoRA adapter, which PEFT loads over the unpatched model.
//!
//! In: low-rank deltas of weights, and the checkpoint's other names. Out: a directory with `adapter_config.json`, and
//! `adapter_model.safetensors` with `base_model.model.<module>.lora_A.weight`, rank x inputs, and `.lora_B.weight`, outputs x
//! rank, for each `<module>.weight`. Alpha is the rank everywhere, so that PEFT adds B A as it is.
//!
//! Nothing of the record goes with it: PEFT knows no digest of the base, and loads the adapter over any model whose modules have
//! these names and shapes. Modules are supposed to hold their weights as outputs x inputs, as PyTorch's `Linear` does.
//!
//! Source: PEFT 0.21.2, `tuners/lora/config.py`, and `check_target_module_exists` in `tuners/tuners_utils.py`.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};
use thiserror::Error;

use super::delta::{DeltaTensor, Form, LORA_A, LORA_B};
use super::writer::StoredPart;
use crate::atomic::{OutputDir, OutputError, WrittenFile};
use crate::checkpoint::{ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE};
use crate::error::shown;
use crate::safetensors::write_tensors;

/// Writes `deltas` to `output`, which the caller commits. `base` is what PEFT loads the model from when it is asked for the adapter
/// alone: a path or a name on a hub. `tensors` are the names of all tensors of that model, those of the deltas among them, from
/// which it is told whether the last parts of the modules' names select exactly them.
///
/// # Errors
/// When a delta is not low rank or not of a module's weight, when there are none, or when writing fails.
pub fn write_adapter<'a>(
    output: &mut OutputDir,
    base: &str,
    tensors: impl IntoIterator<Item = &'a str>,
    deltas: &[DeltaTensor<'_>],
) -> Result<Vec<WrittenFile>, AdapterWriteError> {
    let mut ranks = BTreeMap::new();
    let mut stored = BTreeMap::new();
    for delta in deltas {
        let tensor = delta.name();
        let Form::LowRank { rank } = delta.form() else {
            return Err(AdapterWriteError::NotLowRank {
                tensor: tensor.to_owned(),
            });
        };
        let Some(module) = tensor.strip_suffix(WEIGHT) else {
            return Err(AdapterWriteError::NotAWeight {
                tensor: tensor.to_owned(),
            });
        };
        ranks.insert(module, rank);
        for (end, part) in StoredPart::of(delta) {
            debug_assert!([LORA_A, LORA_B].contains(&end));
            stored.insert(format!("base_model.model.{module}{end}{WEIGHT}"), part);
        }
    }
    let Some(&rank) = ranks.values().max() else {
        return Err(AdapterWriteError::Empty);
    };
    // A module that only holds others has a name too.
    let modules = tensors.into_iter().flat_map(|tensor| {
        let ends = tensor.match_indices('.');
        ends.filter_map(|(end, _)| tensor.get(..end))
    });
    let config = config(base, rank, &ranks, modules);
    let config = output.write_file(ADAPTER_CONFIG_FILE, config.as_bytes())?;
    let mut weights = output.create_file(ADAPTER_WEIGHTS_FILE)?;
    write_tensors(("format", "pt"), stored.iter(), |bytes| {
        weights.write_all(bytes)
    })?;
    Ok(vec![config, weights.finish()?])
}

/// The text of `adapter_config.json`. Fields in the order of their names, whatever the map of the JSON crate does.
fn config<'a>(
    base: &str,
    rank: usize,
    ranks: &BTreeMap<&str, usize>,
    modules: impl Iterator<Item = &'a str>,
) -> String {
    let others: Map<String, Value> = ranks
        .iter()
        .filter(|(_, other)| **other != rank)
        .map(|(module, other)| ((*module).to_owned(), json!(other)))
        .collect();
    let config = json!({
        "alpha_pattern": others,
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "modules_to_save": null,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": others,
        "target_modules": target_modules(ranks, modules),
        "task_type": "CAUSAL_LM",
        "use_dora": false,
        "use_rslora": false,
    });
    format!("{config:#}\n")
}

/// The names by which PEFT selects exactly the modules of `ranks` among `modules`: the last parts of their paths, or, where these
/// select others too, the whole paths.
fn target_modules<'a>(
    ranks: &BTreeMap<&str, usize>,
    modules: impl Iterator<Item = &'a str>,
) -> Vec<String> {
    let last = |module: &str| module.rsplit('.').next().unwrap_or(module).to_owned();
    let short: BTreeSet<String> = ranks.keys().map(|module| last(module)).collect();
    let mut others = modules.filter(|module| !ranks.contains_key(module));
    match others.any(|module| short.contains(&last(module))) {
        false => short.into_iter().collect(),
        true => ranks.keys().map(|module| (*module).to_owned()).collect(),
    }
}

/// The end of the name of what a LoRA can change.
const WEIGHT: &str = ".weight";

/// Why a perturbation was not written as an adapter.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum AdapterWriteError {
    /// It changes nothing.
    #[error("there is nothing to adapt")]
    Empty,
    /// A tensor that is no module's weight, such as a bias.
    #[error(
        "tensor `{}` does not end in `.weight`, and an adapter changes nothing else",
        shown(tensor)
    )]
    NotAWeight {
        /// The tensor.
        tensor: String,
    },
    /// A delta without factors.
    #[error("the perturbation of tensor `{}` is not low rank", shown(tensor))]
    NotLowRank {
        /// The tensor.
        tensor: String,
    },
    /// The output failed.
    #[error(transparent)]
    Output(#[from] OutputError),
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::atomic::Overwrite;
    use crate::dtype::Dtype;
    use crate::safetensors::SafetensorsFile;

    const SHAPE: [usize; 2] = [2, 3];
    const NUMBERS: [f32; 6] = [0.5, -1.0, 2.0, 0.25, 4.0, -8.0];

    fn delta(name: &str, rank: usize) -> DeltaTensor<'_> {
        DeltaTensor::low_rank(name, &SHAPE, &NUMBERS[..3 * rank], &NUMBERS[..2 * rank]).unwrap()
    }

    fn written(
        directory: &Path,
        deltas: &[DeltaTensor<'_>],
        others: &[&str],
    ) -> Result<Value, AdapterWriteError> {
        let mut output = OutputDir::create(directory, Overwrite::Never, &[])?;
        let names = deltas.iter().map(DeltaTensor::name);
        let names = names.chain(others.iter().copied());
        let files = write_adapter(&mut output, "models/base", names, deltas)?;
        assert_eq!(files.len(), 2);
        let _ = output.commit()?;
        let text = std::fs::read_to_string(directory.join(ADAPTER_CONFIG_FILE)).unwrap();
        Ok(serde_json::from_str(&text).unwrap())
    }

    #[test]
    fn factors_stand_under_the_names_that_peft_gives_them() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("adapter");
        let deltas = [
            delta("model.layers.0.q_proj.weight", 1),
            delta("model.layers.1.q_proj.weight", 2),
        ];
        let config = written(&path, &deltas, &["model.norm.weight", "lm_head.weight"]).unwrap();
        let file = SafetensorsFile::open(&path.join(ADAPTER_WEIGHTS_FILE)).unwrap();
        assert_eq!(file.metadata(), [("format".to_owned(), "pt".to_owned())]);
        let tensors: Vec<_> = file
            .tensors()
            .map(|it| (it.name, it.dtype, it.shape))
            .collect();
        let wanted = [
            (
                "base_model.model.model.layers.0.q_proj.lora_A.weight",
                &[1, 3][..],
            ),
            (
                "base_model.model.model.layers.0.q_proj.lora_B.weight",
                &[2, 1],
            ),
            (
                "base_model.model.model.layers.1.q_proj.lora_A.weight",
                &[2, 3],
            ),
            (
                "base_model.model.model.layers.1.q_proj.lora_B.weight",
                &[2, 2],
            ),
        ]
        .map(|(name, shape)| (name, Dtype::F32, shape));
        assert_eq!(tensors, wanted);
        let a = file.tensor(wanted[2].0).unwrap();
        let mut values = [0.0; 6];
        a.widen_into(0..6, &mut values).unwrap();
        assert_eq!(values, NUMBERS);
        assert_eq!(config["target_modules"], json!(["q_proj"]));
        assert_eq!(
            (&config["r"], &config["lora_alpha"]),
            (&json!(2), &json!(2))
        );
        let others = json!({"model.layers.0.q_proj": 1});
        assert_eq!(
            (&config["rank_pattern"], &config["alpha_pattern"]),
            (&others, &others)
        );
        assert_eq!(config["base_model_name_or_path"], "models/base");
    }

    #[test]
    fn modules_are_named_in_full_where_their_last_names_select_others() {
        let root = tempfile::tempdir().unwrap();
        let deltas = [delta("model.layers.0.q_proj.weight", 2)];
        for (place, other) in [
            "model.layers.1.q_proj.weight",
            "model.layers.1.q_proj.parts.0.weight",
            "q_proj.scale",
        ]
        .iter()
        .enumerate()
        {
            let path = root.path().join(place.to_string());
            let config = written(&path, &deltas, &[other]).unwrap();
            let wanted = json!(["model.layers.0.q_proj"]);
            assert_eq!(config["target_modules"], wanted, "{other}");
        }
        let others = [
            "model.layers.0.q_proj.bias",
            "model.layers.1.uq_proj.weight",
            "q_proj",
        ];
        let config = written(&root.path().join("short"), &deltas, &others).unwrap();
        assert_eq!(config["target_modules"], json!(["q_proj"]));
    }

    #[test]
    fn what_no_adapter_can_hold_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("adapter");
        let dense = DeltaTensor::new("q_proj.weight", &SHAPE, &NUMBERS).unwrap();
        let refused = |deltas: &[DeltaTensor<'_>]| written(&path, deltas, &[]).unwrap_err();
        assert!(matches!(
            refused(&[dense]),
            AdapterWriteError::NotLowRank { .. }
        ));
        assert!(matches!(
            refused(&[delta("q_proj", 1)]),
            AdapterWriteError::NotAWeight { .. }
        ));
        assert!(matches!(refused(&[]), AdapterWriteError::Empty));
        assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 0);
    }
}
