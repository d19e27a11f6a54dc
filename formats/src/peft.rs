//! LoRA adapters as PEFT stores them: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! In: an open [`Checkpoint`] of [`Layout::Adapter`](crate::Layout::Adapter). Out: an [`AdapterConfig`], the settings that
//! change the arithmetic, and an [`Adapter`], the tensors under their roles:
//!
//! ```text
//! base_model.model.<module>.lora_A.weight   rank x inputs      A
//! base_model.model.<module>.lora_B.weight   outputs x rank     B
//! base_model.model.<tensor>                 as in the base     in place of the base's tensor (`modules_to_save`)
//! ```
//!
//! An adapted module computes with W + scale B A, where W is `<module>.weight` of the base and scale is alpha / rank, or
//! alpha / sqrt(rank) with `use_rslora`.
//!
//! Which modules are adapted is what the file says, as for PEFT when it loads one; what the config says of them has to agree.
//! Whatever would compute something else (DoRA, biases, adapted embeddings, ...) is refused by name rather than passed over.
//!
//! Source: PEFT 0.21.2, `tuners/lora/config.py`, `tuners/lora/model.py`, `tuners/tuners_utils.py` and `utils/save_and_load.py`.

mod config;
mod modules;

use std::collections::BTreeMap;

use thiserror::Error;

use crate::checkpoint::{ADAPTER_WEIGHTS_FILE, Checkpoint};
use crate::dtype::Dtype;
use crate::error::{FormatError, Problems, shown};
use crate::json::JsonError;
use crate::tensor::TensorView;

pub use config::{AdapterConfig, MAX_ADAPTER_CONFIG_BYTES};
pub use modules::Selected;

/// The tensors of an adapter under their roles, in agreement with its config.
#[derive(Clone, Debug)]
pub struct Adapter<'c> {
    modules: Vec<LoraModule<'c>>,
    saved: Vec<SavedTensor<'c>>,
}

/// One adapted module: its weight W becomes W + scale B A.
#[derive(Clone, Copy, Debug)]
pub struct LoraModule<'c> {
    /// The module's path in the base, such as `model.layers.0.self_attn.q_proj`.
    pub path: &'c str,
    /// rank x inputs, of a type that can be patched.
    pub a: TensorView<'c>,
    /// outputs x rank, of a type that can be patched.
    pub b: TensorView<'c>,
    /// At least 1.
    pub rank: usize,
    /// The factor on B A; finite.
    pub scale: f32,
}

impl LoraModule<'_> {
    /// The name of the base's tensor that it changes.
    pub fn weight(&self) -> String {
        format!("{}.weight", self.path)
    }

    /// Outputs and inputs of the module.
    pub fn shape(&self) -> [usize; 2] {
        [self.b.shape[0], self.a.shape[1]]
    }
}

/// A tensor that takes the place of the base's tensor of the same name.
#[derive(Clone, Copy, Debug)]
pub struct SavedTensor<'c> {
    /// The name in the base, such as `lm_head.weight`.
    pub name: &'c str,
    /// The tensor, under its name in the adapter.
    pub tensor: TensorView<'c>,
}

impl<'c> Adapter<'c> {
    /// Sorts the tensors of `checkpoint`, and holds them against `config`.
    ///
    /// # Errors
    /// When it adapts nothing, or a tensor has no role, no partner, another rank than the config says, or a type that cannot be
    /// computed with. All problems are listed.
    pub fn of(checkpoint: &'c Checkpoint, config: &AdapterConfig) -> Result<Self, FormatError> {
        Self::sorted(checkpoint.tensors(), config)
            .map_err(|error| FormatError::new(&checkpoint.path().join(ADAPTER_WEIGHTS_FILE), error))
    }

    fn sorted(
        tensors: impl Iterator<Item = TensorView<'c>>,
        config: &AdapterConfig,
    ) -> Result<Self, PeftError> {
        let mut pairs: BTreeMap<&str, Pair<'c>> = BTreeMap::new();
        let mut saved = Vec::new();
        let mut problems = Vec::new();
        for tensor in tensors {
            match role_of(tensor.name) {
                Role::A(module) => pairs.entry(module).or_default().a = Some(tensor),
                Role::B(module) => pairs.entry(module).or_default().b = Some(tensor),
                Role::Saved(name) => saved.push(SavedTensor { name, tensor }),
                Role::OtherMethod(method) => problems.push(AdapterProblem::OtherMethod {
                    tensor: tensor.name.to_owned(),
                    method,
                }),
                Role::Unknown => problems.push(AdapterProblem::UnknownTensor {
                    tensor: tensor.name.to_owned(),
                }),
            }
        }
        saved.sort_by_key(|saved| saved.name);
        let mut modules = Vec::with_capacity(pairs.len());
        for (path, pair) in &pairs {
            match module_of(path, pair, config)? {
                Ok(module) => modules.push(module),
                Err(problem) => problems.push(problem),
            }
        }
        problems.extend(saved.iter().filter_map(|saved| {
            let module = saved.name.rsplit_once('.')?.0;
            pairs
                .contains_key(module)
                .then(|| AdapterProblem::AdaptedAndSaved {
                    module: module.to_owned(),
                })
        }));
        let stored = saved.iter().map(|saved| saved.tensor);
        problems.extend(
            stored
                .filter(|tensor| !tensor.dtype.is_patchable())
                .map(|tensor| AdapterProblem::Dtype {
                    tensor: tensor.name.to_owned(),
                    found: tensor.dtype,
                }),
        );
        let saves = |wanted: &str| saved.iter().any(|saved| is_within(saved.name, wanted));
        problems.extend(
            config
                .modules_to_save
                .iter()
                .filter(|wanted| !saves(wanted))
                .map(|wanted| AdapterProblem::NotSaved {
                    module: wanted.clone(),
                }),
        );
        Problems::none_of(problems).map_err(PeftError::Tensors)?;
        if modules.is_empty() {
            return Err(PeftError::Empty);
        }
        Ok(Self { modules, saved })
    }

    /// The adapted modules, by path.
    pub fn modules(&self) -> &[LoraModule<'c>] {
        &self.modules
    }

    /// The tensors that take the place of the base's, by name.
    pub fn saved(&self) -> &[SavedTensor<'c>] {
        &self.saved
    }

    /// The tensors of `base`, under its names, with those that the adapter saves whole in their places.
    pub fn base_tensors<'b>(
        &self,
        base: &'b Checkpoint,
    ) -> impl Iterator<Item = TensorView<'b>> + use<'_, 'b, 'c>
    where
        'c: 'b,
    {
        base.tensors().map(|tensor| {
            let saved = self.saved.iter().find(|saved| saved.name == tensor.name);
            saved.map_or(tensor, |saved| TensorView {
                name: tensor.name,
                ..saved.tensor
            })
        })
    }

    /// Whether `base` has what the adapter is for: every adapted weight, and every tensor that is replaced, in the same shape
    /// and of a type that can be computed with. Where the base's config says `tie_word_embeddings`, neither the embedding nor the
    /// head may be among them: PEFT then computes with two matrices where the base has one.
    ///
    /// # Errors
    /// Everything that is missing or does not fit.
    pub fn check_base(
        &self,
        base: &Checkpoint,
        tie_word_embeddings: bool,
    ) -> Result<(), Problems<AdapterBaseProblem>> {
        let is_tied = |tensor: &str| {
            let module = tensor
                .strip_suffix(".weight")
                .and_then(|it| it.rsplit('.').next());
            tie_word_embeddings && module.is_some_and(|it| TIED.contains(&it))
        };
        let adapted = self
            .modules
            .iter()
            .map(|module| (module.weight(), module.shape().to_vec()));
        let saved = self
            .saved
            .iter()
            .map(|saved| (saved.name.to_owned(), saved.tensor.shape.to_vec()));
        let problems = adapted
            .chain(saved)
            .filter_map(|(tensor, wanted)| match base.tensor(&tensor) {
                _ if is_tied(&tensor) => Some(AdapterBaseProblem::Tied { tensor }),
                None => Some(AdapterBaseProblem::Missing {
                    nearest: base.nearest_name(&tensor).map(str::to_owned),
                    tensor,
                }),
                Some(found) if !found.dtype.is_patchable() => Some(AdapterBaseProblem::Dtype {
                    tensor,
                    found: found.dtype,
                }),
                Some(found) if found.shape != wanted => Some(AdapterBaseProblem::Shape {
                    tensor,
                    wanted,
                    found: found.shape.to_vec(),
                }),
                Some(_) => None,
            })
            .collect();
        Problems::none_of(problems)
    }
}

#[derive(Default)]
struct Pair<'c> {
    a: Option<TensorView<'c>>,
    b: Option<TensorView<'c>>,
}

enum Role<'n> {
    A(&'n str),
    B(&'n str),
    Saved(&'n str),
    OtherMethod(&'static str),
    Unknown,
}

/// What a tensor is, by its name.
fn role_of(name: &str) -> Role<'_> {
    let Some(inner) = name.strip_prefix(PREFIX) else {
        return Role::Unknown;
    };
    let whole = |path: &str| path.split('.').all(|part| !part.is_empty());
    match (inner.strip_suffix(A), inner.strip_suffix(B)) {
        (Some(module), _) if whole(module) => return Role::A(module),
        (_, Some(module)) if whole(module) => return Role::B(module),
        _ => {}
    }
    let parts = || inner.split('.');
    if let Some((_, method)) = OTHER_METHODS
        .iter()
        .find(|(part, _)| parts().any(|it| it == *part))
    {
        return Role::OtherMethod(method);
    }
    // An adapter's name between `lora_A` and `weight`, or a part of a live model, such as `base_layer`, is no name of the base.
    let live = parts().any(|part| part.starts_with("lora_") || LIVE_PARTS.contains(&part));
    match whole(inner) && inner.contains('.') && !live {
        true => Role::Saved(inner),
        false => Role::Unknown,
    }
}

/// The adapted module at `path`, or what is wrong with it.
///
/// # Errors
/// When a pattern of the config cannot be evaluated, which is no fault of the module's.
fn module_of<'c>(
    path: &'c str,
    pair: &Pair<'c>,
    config: &AdapterConfig,
) -> Result<Result<LoraModule<'c>, AdapterProblem>, PeftError> {
    let module = || path.to_owned();
    let (a, b) = match (pair.a, pair.b) {
        (Some(a), Some(b)) => (a, b),
        (a, _) => {
            let (present, absent) = match a {
                Some(_) => ("lora_A", "lora_B"),
                None => ("lora_B", "lora_A"),
            };
            return Ok(Err(AdapterProblem::Unpaired {
                module: module(),
                present,
                absent,
            }));
        }
    };
    for tensor in [a, b] {
        if !tensor.dtype.is_patchable() {
            return Ok(Err(AdapterProblem::Dtype {
                tensor: tensor.name.to_owned(),
                found: tensor.dtype,
            }));
        }
    }
    let (&[rank, inputs], &[outputs, rank_of_b]) = (a.shape, b.shape) else {
        return Ok(Err(AdapterProblem::Shapes {
            module: module(),
            a: a.shape.to_vec(),
            b: b.shape.to_vec(),
        }));
    };
    if rank != rank_of_b || rank == 0 || inputs == 0 || outputs == 0 {
        return Ok(Err(AdapterProblem::Shapes {
            module: module(),
            a: a.shape.to_vec(),
            b: b.shape.to_vec(),
        }));
    }
    let claimed = config.rank_of(path)?;
    if claimed != rank {
        return Ok(Err(AdapterProblem::Rank {
            module: module(),
            stored: rank,
            claimed,
        }));
    }
    if config.selects(path)? == Selected::No {
        return Ok(Err(AdapterProblem::NotSelected { module: module() }));
    }
    let scale = config.scale_of(path)?;
    Ok(match scale.is_finite() {
        true => Ok(LoraModule {
            path,
            a,
            b,
            rank,
            scale,
        }),
        false => Err(AdapterProblem::Scale { module: module() }),
    })
}

/// Whether the tensor `name` belongs to the module that `modules_to_save` calls `wanted`: PEFT takes every module whose path
/// ends in that.
fn is_within(name: &str, wanted: &str) -> bool {
    name.match_indices('.')
        .any(|(end, _)| name[..end].ends_with(wanted))
}

/// Before every name: PEFT's model, and the tuner's in it.
const PREFIX: &str = "base_model.model.";

const A: &str = ".lora_A.weight";
const B: &str = ".lora_B.weight";

/// Parts of names that other methods leave in a file, and what they are.
const OTHER_METHODS: &[(&str, &str)] = &[
    ("lora_embedding_A", "an adapted embedding"),
    ("lora_embedding_B", "an adapted embedding"),
    ("lora_magnitude_vector", "DoRA"),
    ("trainable_tokens_delta", "trained tokens"),
    ("token_adapter", "trained tokens"),
    ("lora_diag", "KaSA"),
];

/// The two modules that a base may have as one.
const TIED: &[&str] = &["embed_tokens", "lm_head"];

/// Parts of names of a model that PEFT has wrapped, which its files leave out.
const LIVE_PARTS: &[&str] = &["base_layer", "modules_to_save", "original_module"];

/// Why files are not an adapter that can be computed with.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PeftError {
    /// The config is not the JSON that it should be.
    #[error("the config is not the JSON that it should be")]
    ConfigSyntax {
        /// What is wrong, and where.
        source: JsonError,
    },
    /// The config is longer than any sound one.
    #[error("the config has {found} bytes, above the limit of {MAX_ADAPTER_CONFIG_BYTES}")]
    ConfigTooLong {
        /// Its length.
        found: u64,
    },
    /// It adapts no module.
    #[error("it holds no `lora_A` and `lora_B`")]
    Empty,
    /// A field that is missing or of another kind.
    #[error("`{field}` of the config is {}, where {wanted} belongs", shown(found))]
    Field {
        /// The field.
        field: &'static str,
        /// What belongs there.
        wanted: &'static str,
        /// What it is.
        found: String,
    },
    /// A pattern of the config that is no regular expression, or one that takes too long.
    #[error("`{}` in `{field}` of the config cannot be matched", shown(pattern))]
    Pattern {
        /// The field.
        field: &'static str,
        /// The pattern.
        pattern: String,
        /// Why not.
        #[source]
        source: Box<fancy_regex::Error>,
    },
    /// Tensors that do not fit together, or not the config.
    #[error("{0}")]
    Tensors(Problems<AdapterProblem>),
    /// A field that changes what is computed, by a version of PEFT that is not known here.
    #[error(
        "`{}` of the config is {}, and what it means is not known here",
        shown(field),
        shown(found)
    )]
    UnknownField {
        /// The field.
        field: String,
        /// What it is.
        found: String,
    },
    /// A setting that changes what is computed and is not implemented.
    #[error("`{field}` of the config is {}: {reason}", shown(found))]
    Unsupported {
        /// The field.
        field: &'static str,
        /// What it is.
        found: String,
        /// What that would mean.
        reason: &'static str,
    },
}

/// A tensor of an adapter that has no role, or a module that does not fit together.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum AdapterProblem {
    /// A module that is adapted and replaced at once.
    #[error("module `{}` is adapted and saved whole", shown(module))]
    AdaptedAndSaved {
        /// The module.
        module: String,
    },
    /// A type that cannot be computed with.
    #[error(
        "tensor `{}` is {found}, and an adapter is F32, F16 or BF16",
        shown(tensor)
    )]
    Dtype {
        /// The tensor.
        tensor: String,
        /// Its element type.
        found: Dtype,
    },
    /// In `modules_to_save`, and not in the file.
    #[error(
        "`modules_to_save` names `{}`, and no tensor of it is there",
        shown(module)
    )]
    NotSaved {
        /// The module.
        module: String,
    },
    /// A module that PEFT would not adapt by this config.
    #[error(
        "module `{}` is adapted, and `target_modules` does not select it, so PEFT would leave it out",
        shown(module)
    )]
    NotSelected {
        /// The module.
        module: String,
    },
    /// A tensor of a method that is not plain LoRA.
    #[error("tensor `{}` is of {method}, which is not supported", shown(tensor))]
    OtherMethod {
        /// The tensor.
        tensor: String,
        /// The method.
        method: &'static str,
    },
    /// The stored rank is not the config's.
    #[error(
        "module `{}` is stored with rank {stored}, and the config says {claimed}",
        shown(module)
    )]
    Rank {
        /// The module.
        module: String,
        /// The rank of its tensors.
        stored: usize,
        /// The config's.
        claimed: usize,
    },
    /// A factor beyond f32.
    #[error("the scale of module `{}` is not finite", shown(module))]
    Scale {
        /// The module.
        module: String,
    },
    /// A and B that are no rank x inputs and outputs x rank.
    #[error(
        "module `{}` has a lora_A of shape {a:?} and a lora_B of shape {b:?}, which have no product B A",
        shown(module)
    )]
    Shapes {
        /// The module.
        module: String,
        /// The shape of A.
        a: Vec<usize>,
        /// The shape of B.
        b: Vec<usize>,
    },
    /// One half of a pair.
    #[error("module `{}` has a {present} and no {absent}", shown(module))]
    Unpaired {
        /// The module.
        module: String,
        /// What is there.
        present: &'static str,
        /// What is not.
        absent: &'static str,
    },
    /// A name that is none of an adapter's.
    #[error(
        "tensor `{}` is no part of a LoRA adapter as PEFT saves it",
        shown(tensor)
    )]
    UnknownTensor {
        /// The tensor.
        tensor: String,
    },
}

/// What a base lacks for an adapter.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum AdapterBaseProblem {
    /// A type that nothing can be added to.
    #[error(
        "tensor `{}` of the base is {found}, which cannot be computed with",
        shown(tensor)
    )]
    Dtype {
        /// The tensor.
        tensor: String,
        /// Its element type.
        found: Dtype,
    },
    /// Not there.
    #[error("the base has no tensor `{}`{}", shown(tensor), match nearest {
        Some(name) => format!("; the nearest is `{}`", shown(name)),
        None => String::new(),
    })]
    Missing {
        /// The tensor.
        tensor: String,
        /// The most similar name.
        nearest: Option<String>,
    },
    /// Another shape.
    #[error(
        "tensor `{}` of the base has shape {found:?}, and the adapter is for {wanted:?}",
        shown(tensor)
    )]
    Shape {
        /// The tensor.
        tensor: String,
        /// The shape that the adapter is for.
        wanted: Vec<usize>,
        /// The base's.
        found: Vec<usize>,
    },
    /// The embedding or the head, of which the base has one for both.
    #[error(
        "tensor `{}` is changed, and the base ties the embedding to the head, so that both would change",
        shown(tensor)
    )]
    Tied {
        /// The tensor.
        tensor: String,
    },
}
