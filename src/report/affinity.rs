//! Where in the model a perturbation is: the share of its energy in each layer and each kind of matrix.
//!
//! The share of a layer, |eps_l|^2 / |eps|^2, is this program's definition of the paper's safety affinity.

use serde::{Deserialize, Serialize};

use super::ReportError;
use super::axis;
use super::number::percent;
use super::plot::{self, Caption};

/// The energy of a perturbation in one tensor.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct TensorEnergy {
    /// The tensor, such as `model.layers.3.self_attn.q_proj.weight`.
    pub name: String,
    /// The sum of the squares of its elements.
    pub squared: f64,
}

/// The figures of all tensors, and their numbers.
#[derive(Debug, Serialize)]
pub(super) struct View {
    map: String,
    bars: String,
    columns: Vec<String>,
    rows: Vec<Row>,
    kinds: Vec<String>,
}

/// A layer, as it is shown.
#[derive(Debug, Serialize)]
struct Row {
    name: String,
    cells: Vec<String>,
    share: String,
}

impl View {
    /// Nothing when there is no energy.
    pub(super) fn of(tensors: &[TensorEnergy]) -> Result<Option<Self>, ReportError> {
        let Some(grid) = Grid::of(tensors) else {
            return Ok(None);
        };
        let names: Vec<String> = grid.layers.iter().map(|layer| layer.name()).collect();
        let shares: Vec<f64> = grid
            .shares
            .iter()
            .map(|row| row.iter().flatten().sum())
            .collect();
        let kinds: Vec<f64> = (0..grid.kinds.len())
            .map(|kind| grid.shares.iter().filter_map(|row| row[kind]).sum())
            .collect();
        let map = Caption {
            id: "affinity-map".to_owned(),
            title: "Share of the energy by layer and matrix".to_owned(),
            description: match largest(&kinds) {
                Some(kind) => format!(
                    "{} kinds of matrices in {} layers; {} holds most, {}.",
                    kinds.len(),
                    names.len(),
                    grid.kinds[kind],
                    percent(kinds[kind])
                ),
                None => String::new(),
            },
        };
        let bars = Caption {
            id: "affinity-layers".to_owned(),
            title: "Share of the energy by layer".to_owned(),
            description: match largest(&shares) {
                Some(layer) => format!(
                    "Layer {} holds most, {}; an even spread would give each {}.",
                    names[layer],
                    percent(shares[layer]),
                    percent(1.0 / axis::place(names.len()))
                ),
                None => String::new(),
            },
        };
        let short: Vec<String> = grid.kinds.iter().map(|kind| short(kind)).collect();
        Ok(Some(Self {
            map: plot::map(&map, &names, &short, &grid.shares)?,
            bars: plot::bars(&bars, &names, &shares)?,
            rows: names
                .into_iter()
                .zip(&grid.shares)
                .zip(&shares)
                .map(|((name, cells), share)| Row {
                    name,
                    cells: cells
                        .iter()
                        .map(|cell| cell.map(percent).unwrap_or_default())
                        .collect(),
                    share: percent(*share),
                })
                .collect(),
            kinds: kinds.into_iter().map(percent).collect(),
            columns: grid.kinds,
        }))
    }
}

/// Shares by layer and kind of matrix.
#[derive(Debug, PartialEq)]
struct Grid {
    layers: Vec<Layer>,
    kinds: Vec<String>,
    /// A row for each layer; nothing where it has no such matrix.
    shares: Vec<Vec<Option<f64>>>,
}

impl Grid {
    fn of(tensors: &[TensorEnergy]) -> Option<Self> {
        let all: f64 = tensors.iter().map(|tensor| tensor.squared).sum();
        if !(all.is_finite() && all > 0.0) {
            return None;
        }
        let placed: Vec<(Layer, String, f64)> = tensors
            .iter()
            .map(|tensor| {
                let (layer, kind) = place(&tensor.name);
                (layer, kind, tensor.squared / all)
            })
            .collect();
        let mut layers: Vec<Layer> = placed.iter().map(|(layer, _, _)| *layer).collect();
        layers.sort_unstable();
        layers.dedup();
        let mut kinds: Vec<String> = Vec::new();
        for (_, kind, _) in &placed {
            if !kinds.contains(kind) {
                kinds.push(kind.clone());
            }
        }
        // Stable: kinds of no known place stay in the tensors' order.
        kinds.sort_by_key(|kind| {
            ORDER
                .iter()
                .position(|known| known.contains(&kind.as_str()))
                .unwrap_or(ORDER.len())
        });
        let mut shares = vec![vec![None; kinds.len()]; layers.len()];
        for (layer, kind, share) in placed {
            let row = layers.iter().position(|other| *other == layer)?;
            let column = kinds.iter().position(|other| *other == kind)?;
            let cell: &mut Option<f64> = &mut shares[row][column];
            *cell = Some(cell.unwrap_or(0.0) + share);
        }
        Some(Self {
            layers,
            kinds,
            shares,
        })
    }
}

/// Where a tensor is; those outside of layers come last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Layer {
    Of(u32),
    Outside,
}

impl Layer {
    fn name(self) -> String {
        match self {
            Self::Of(number) => number.to_string(),
            Self::Outside => "others".to_owned(),
        }
    }
}

/// The layer and the kind of matrix that a tensor's name tells of. The experts of a layer, and both factors of a LoRA module, are one matrix.
fn place(name: &str) -> (Layer, String) {
    let numbers = name.split('.').filter_map(|part| part.parse().ok());
    let layer = numbers.into_iter().next().map_or(Layer::Outside, Layer::Of);
    let kind = name.rsplit('.').find(|part| {
        !matches!(*part, "weight" | "bias" | "lora_A" | "lora_B" | "default")
            && part.parse::<u32>().is_err()
    });
    (layer, kind.unwrap_or(name).to_owned())
}

/// A kind's name without what the others have in common.
fn short(kind: &str) -> String {
    let kind = kind.strip_suffix("_proj").unwrap_or(kind);
    let kind = kind
        .strip_prefix("attn_")
        .or_else(|| kind.strip_prefix("ffn_"))
        .unwrap_or(kind);
    kind.to_owned()
}

fn largest(values: &[f64]) -> Option<usize> {
    (0..values.len()).max_by(|a, b| values[*a].total_cmp(&values[*b]).then(b.cmp(a)))
}

/// The order in which a layer uses its matrices, by their names in Hugging Face and GGUF files.
const ORDER: [&[&str]; 9] = [
    &["qkv_proj", "attn_qkv"],
    &["q_proj", "attn_q"],
    &["k_proj", "attn_k"],
    &["v_proj", "attn_v"],
    &["o_proj", "attn_output"],
    &["gate_up_proj"],
    &["gate_proj", "ffn_gate"],
    &["up_proj", "ffn_up"],
    &["down_proj", "ffn_down"],
];

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(name: &str, squared: f64) -> TensorEnergy {
        TensorEnergy {
            name: name.to_owned(),
            squared,
        }
    }

    #[test]
    fn names_tell_layer_and_kind() {
        for (name, layer, kind) in [
            (
                "model.layers.3.self_attn.q_proj.weight",
                Layer::Of(3),
                "q_proj",
            ),
            ("blk.11.ffn_down.weight", Layer::Of(11), "ffn_down"),
            (
                "model.layers.0.mlp.experts.7.up_proj.weight",
                Layer::Of(0),
                "up_proj",
            ),
            (
                "base_model.model.model.layers.2.self_attn.v_proj.lora_B.weight",
                Layer::Of(2),
                "v_proj",
            ),
            ("lm_head.weight", Layer::Outside, "lm_head"),
            ("weight", Layer::Outside, "weight"),
        ] {
            assert_eq!(place(name), (layer, kind.to_owned()), "{name}");
        }
    }

    #[test]
    fn shares_add_up_over_tensors_of_one_place() {
        let grid = Grid::of(&[
            tensor("lm_head.weight", 1.0),
            tensor("model.layers.10.mlp.down_proj.weight", 1.0),
            tensor("model.layers.2.self_attn.q_proj.lora_A.weight", 1.0),
            tensor("model.layers.2.self_attn.q_proj.lora_B.weight", 5.0),
        ])
        .expect("energy");
        assert_eq!(grid.layers, [Layer::Of(2), Layer::Of(10), Layer::Outside]);
        assert_eq!(grid.kinds, ["q_proj", "down_proj", "lm_head"]);
        assert_eq!(
            grid.shares,
            [
                [Some(0.75), None, None],
                [None, Some(0.125), None],
                [None, None, Some(0.125)]
            ]
        );
    }

    #[test]
    fn without_energy_there_is_nothing_to_see() {
        for tensors in [vec![], vec![tensor("a", 0.0)], vec![tensor("a", f64::NAN)]] {
            assert_eq!(Grid::of(&tensors), None);
        }
    }

    #[test]
    fn maps_can_be_drawn_of_one_tensor_and_of_many() {
        let many = (0..200).flat_map(|layer| {
            (0..12).map(move |kind| tensor(&format!("layers.{layer}.kind{kind}.weight"), 1.0))
        });
        for tensors in [vec![tensor("a.weight", 1.0)], many.collect()] {
            assert!(View::of(&tensors).expect("a figure").is_some());
        }
    }
}
