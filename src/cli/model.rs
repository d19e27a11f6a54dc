//! MODEL as the command line gives it: a whole model, or a LoRA adapter with the base that it is for.
//!
//! In: the path, `--base` and `--merge`. Out: a [`Model`], open and checked, which knows what is patched (its own tensors), what
//! computes (base and adapter together), and what is copied (the adapter, or with `--merge` the base).

use std::path::{Path, PathBuf};

use panacea_formats::{
    ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, Adapter, AdapterConfig, Checkpoint, Destination,
    FormatError, Layout, Sha256, Space, TensorView, shown,
};
use panacea_patch::apply::{self, Applied, ApplySettings, Merge, Wanted};
use panacea_patch::convert::{StoredModel, StoredModelError};
use panacea_patch::data::TokenizerFiles;
use panacea_patch::manifest::{Dependency, Role};
use panacea_patch::model::{AdapterModule, Config, Decoder, TargetSelection};
use rayon::prelude::*;
use serde_json::Value;

use super::args::first_given;
use super::base;
use super::error::{Exit, Failure};
use super::find::{read_config, required_side_file};
use super::report::{CopyWatch, Reporter};

/// A model whose files are open.
#[derive(Debug)]
pub(super) struct Model {
    /// What MODEL names; what a perturbation is for.
    pub(super) checkpoint: Checkpoint,
    /// Where it is an adapter.
    lora: Option<Lora>,
    /// Where it is a GGUF file, which may be one that nothing is computed with.
    stored: Option<Result<StoredModel, StoredModelError>>,
}

#[derive(Debug)]
struct Lora {
    config: AdapterConfig,
    /// Open where the work needs it.
    base: Option<Checkpoint>,
    merge: bool,
}

/// What is to be done with the model, as far as an adapter's base is concerned.
#[derive(Clone, Copy, Debug)]
pub(super) struct Use<'a> {
    /// `--base`.
    pub(super) base: Option<&'a Path>,
    /// `--merge`.
    pub(super) merge: bool,
    /// Whether losses are computed.
    pub(super) computes: bool,
}

impl Model {
    /// Opens the checkpoint at `path`, and of an adapter the base, where it is needed.
    ///
    /// # Errors
    /// When one is refused, they do not fit, or a flag has no effect.
    pub(super) fn open(path: &Path, usage: Use<'_>, reporter: &Reporter) -> Result<Self, Failure> {
        let checkpoint = opened(path, reporter)?;
        if checkpoint.layout() != Layout::Adapter {
            let of_adapter = [("--base", usage.base.is_some()), ("--merge", usage.merge)];
            if let Some(flag) = first_given(of_adapter) {
                return Err(Failure::no_effect(flag, "here")
                    .because(format!("`{}` is not a LoRA adapter", path.display()))
                    .hint(format!("leave out `{flag}`, or give a PEFT directory")));
            }
            refuse_bare_weights(&checkpoint)?;
            let is_gguf = checkpoint.layout().is_gguf();
            return Ok(Self {
                stored: is_gguf.then(|| StoredModel::of(&checkpoint)),
                checkpoint,
                lora: None,
            });
        }
        let config = AdapterConfig::read(&checkpoint)?;
        let adapter = Adapter::of(&checkpoint, &config)?;
        let base = match usage.merge || usage.computes {
            true => {
                let path = base::find(path, &config, usage.base)?;
                let base = opened(&path, reporter)?;
                if base.layout() == Layout::Adapter {
                    return Err(Failure::new(
                        Exit::Refused,
                        format!("the base `{}` is an adapter itself", path.display()),
                    )
                    .hint("merge that one into its own base first"));
                }
                adapter
                    .check_base(&base, ties_embeddings(&base)?)
                    .map_err(|problems| Failure::of_adapter_base(base.path(), &problems))?;
                if usage.merge && checkpoint.side_file("tokenizer.json").is_some() {
                    reporter.note(
                        "the tokenizer of the adapter is not copied: side files of a merged model are the base's",
                    );
                }
                Some(base)
            }
            false if usage.base.is_some() => {
                return Err(Failure::no_effect("--base", "here")
                    .because("an adapter's own tensors are all that is read")
                    .hint("leave out `--base`, or pass `--merge`"));
            }
            false => None,
        };
        Ok(Self {
            lora: Some(Lora {
                config,
                base,
                merge: usage.merge,
            }),
            checkpoint,
            stored: None,
        })
    }

    /// The copy of this model that was written to `path`, with what it computes with. A lone file's config and tokenizer stay here.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(super) fn copy_at(&self, path: &Path) -> Result<Self, Failure> {
        let first = self.copied().files().first();
        let checkpoint = match (self.copied().layout(), first) {
            (Layout::SplitGguf, Some(first)) => Checkpoint::open(&path.join(&first.name))?,
            _ => Checkpoint::open(path)?,
        };
        let lora = match &self.lora {
            Some(lora) if checkpoint.layout() == Layout::Adapter => Some(Lora {
                config: lora.config.clone(),
                base: match &lora.base {
                    None => None,
                    Some(base) => Some(Checkpoint::open(base.path())?),
                },
                merge: false,
            }),
            _ => None,
        };
        let is_gguf = checkpoint.layout().is_gguf();
        Ok(Self {
            stored: is_gguf.then(|| StoredModel::of(&checkpoint)),
            checkpoint,
            lora,
        })
    }

    /// What perturbations of it are added to.
    pub(super) fn space(&self) -> Space {
        Space::of(&self.checkpoint)
    }

    /// Whether an adapter is to become part of its base.
    pub(super) fn merges(&self) -> bool {
        self.lora.as_ref().is_some_and(|lora| lora.merge)
    }

    /// The base of an adapter, where it is open.
    pub(super) fn base(&self) -> Option<&Checkpoint> {
        self.lora.as_ref()?.base.as_ref()
    }

    /// The tensors of an adapter under their roles; nothing of a whole model.
    ///
    /// # Errors
    /// None that [`Self::open`] did not have.
    pub(super) fn adapter(&self) -> Result<Option<Adapter<'_>>, Failure> {
        match &self.lora {
            None => Ok(None),
            Some(lora) => Ok(Some(Adapter::of(&self.checkpoint, &lora.config)?)),
        }
    }

    /// The whole model: of an adapter the base, where it is open.
    pub(super) fn whole(&self) -> &Checkpoint {
        self.base().unwrap_or(&self.checkpoint)
    }

    /// What is copied to the output.
    pub(super) fn copied(&self) -> &Checkpoint {
        match self.merges() {
            true => self.whole(),
            false => &self.checkpoint,
        }
    }

    /// What a manifest calls the files of [`Self::copied`].
    pub(super) fn copied_role(&self) -> Role {
        match self.merges() {
            true => Role::Base,
            false => Role::Checkpoint,
        }
    }

    /// Every directory and file that it is read from.
    pub(super) fn paths(&self) -> Vec<PathBuf> {
        let mut paths = Vec::new();
        for checkpoint in std::iter::once(&self.checkpoint).chain(self.base()) {
            paths.push(checkpoint.path().to_owned());
            match checkpoint.layout() {
                Layout::SplitGguf => {
                    let parts = checkpoint.files().iter();
                    paths.extend(parts.map(|part| checkpoint.path().with_file_name(&part.name)));
                }
                Layout::LoneFile => {
                    let beside = TokenizerFiles::NAMES.into_iter();
                    paths.extend(beside.filter_map(|name| checkpoint.side_file(name)));
                }
                _ => {}
            }
        }
        paths
    }

    /// The tensors that the decoder computes with, under its names.
    ///
    /// # Errors
    /// When a GGUF file is of no known architecture.
    pub(super) fn tensors(&self) -> Result<Vec<TensorView<'_>>, Failure> {
        Ok(match self.stored()? {
            Some(stored) => stored.tensors(&self.checkpoint).collect(),
            None => self.whole().tensors().collect(),
        })
    }

    /// The model in a GGUF file, nothing of another checkpoint.
    fn stored(&self) -> Result<Option<&StoredModel>, Failure> {
        match &self.stored {
            None => Ok(None),
            Some(Ok(stored)) => Ok(Some(stored)),
            Some(Err(error)) => Err(self.not_computable(error)),
        }
    }

    fn not_computable(&self, error: &StoredModelError) -> Failure {
        Failure::doing(
            Exit::Refused,
            format!("cannot compute with `{}`", self.checkpoint.path().display()),
            error,
        )
        .hint("a perturbation that was made for it can still be added with --perturbation")
    }

    /// What the checkpoint calls the target that the decoder calls `name`.
    ///
    /// # Errors
    /// When it is one of several in a tensor.
    pub(super) fn stored_name(&self, name: &str) -> Result<String, Failure> {
        match self.stored()? {
            None => Ok(name.to_owned()),
            Some(stored) => stored.stored_name(name).map(str::to_owned).ok_or_else(|| {
                Failure::new(Exit::Refused, "experts of a GGUF file cannot be targets")
                    .because(format!("`{}` is part of a larger tensor", shown(name)))
                    .hint("name other projections with --targets, or patch the model that it was converted from")
            }),
        }
    }

    /// The config of what computes: that of a GGUF file from its metadata, otherwise in `config.json`.
    ///
    /// # Errors
    /// When there is none, or it is refused.
    pub(super) fn config(&self) -> Result<Config, Failure> {
        match self.stored()? {
            None => read_config(&self.config_file()?),
            Some(stored) => stored
                .config(&self.checkpoint)
                .map_err(|error| self.not_computable(&error)),
        }
    }

    /// Where the config is, if not in a GGUF file's metadata.
    ///
    /// # Errors
    /// When there is none.
    pub(super) fn config_file(&self) -> Result<PathBuf, Failure> {
        required_side_file(self.whole(), "config.json")
    }

    /// The tokenizer's files: the adapter's own if it has any, else the whole model's; of a GGUF file those that say what its metadata does.
    ///
    /// # Errors
    /// When there is no `tokenizer.json`.
    pub(super) fn tokenizer(&self) -> Result<TokenizerFiles, Failure> {
        if let Some(stored) = self.stored()? {
            return stored
                .tokenizer(&self.checkpoint)
                .map_err(|error| self.not_computable(&error));
        }
        let own = self.checkpoint.side_file("tokenizer.json").is_some();
        let find = |name: &str| match name {
            "config.json" | "generation_config.json" => self.whole().side_file(name),
            _ if own => self.checkpoint.side_file(name),
            _ => self.whole().side_file(name),
        };
        TokenizerFiles::find(find).map_err(|error| Failure {
            error: error.to_string(),
            ..Failure::from(error).because(looked_in(self.whole()))
        })
    }

    /// The decoder: of an adapter with A and B as its targets.
    ///
    /// # Errors
    /// When tensors do not make the model that `config` describes, or `selection` names none of the targets.
    pub(super) fn decoder(
        &self,
        config: Config,
        selection: Option<&TargetSelection>,
    ) -> Result<Decoder<'_>, Failure> {
        let Some(adapter) = self.adapter()? else {
            let selection = selection.cloned().unwrap_or_default();
            return Ok(Decoder::new(config, self.tensors()?, &selection)?);
        };
        let tensors = adapter.base_tensors(self.whole());
        let modules = adapter
            .modules()
            .iter()
            .map(|module| AdapterModule {
                path: module.path.to_owned(),
                a: module.a,
                b: module.b,
                scale: module.scale,
            })
            .collect();
        Ok(Decoder::with_adapter(config, tensors, modules, selection)?)
    }

    /// Writes what is copied with `wanted` added, merged where that was asked for.
    ///
    /// # Errors
    /// When the deltas are not for it, or the writing fails.
    pub(super) fn add(
        &self,
        wanted: &Wanted<'_>,
        settings: ApplySettings,
        destination: Destination<'_>,
        watch: &CopyWatch,
    ) -> Result<Applied, Failure> {
        match (self.adapter()?, self.base()) {
            (Some(adapter), Some(base)) if self.merges() => {
                let merge = Merge {
                    base,
                    tie_word_embeddings: ties_embeddings(base)?,
                    checkpoint: &self.checkpoint,
                    adapter: &adapter,
                };
                Ok(apply::merge(merge, wanted, settings, destination, watch)?)
            }
            _ => Ok(apply::apply(
                &self.checkpoint,
                wanted,
                settings,
                destination,
                watch,
            )?),
        }
    }

    /// The digests of the weights' files, of the base's and the adapter's config where the base counts, and of `side`.
    ///
    /// # Errors
    /// When one of `side` cannot be read.
    pub(super) fn inputs(&self, side: &[PathBuf]) -> Result<Vec<Dependency>, Failure> {
        let mut inputs = weights(&self.checkpoint, Role::Checkpoint);
        let mut files: Vec<PathBuf> = Vec::new();
        if let Some(base) = self.base() {
            inputs.extend(weights(base, Role::Base));
            files.push(self.checkpoint.path().join(ADAPTER_CONFIG_FILE));
        }
        for path in files.iter().chain(side) {
            let digest = digest_of(path)?;
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            // By the place it was found in, which is the adapter's directory or the base's.
            let own = self.checkpoint.side_file(&name).as_deref() == Some(path);
            inputs.push(Dependency {
                role: match own {
                    true => Role::Checkpoint,
                    false => Role::Base,
                },
                name: name.into_owned(),
                uri: None,
                digest,
            });
        }
        Ok(inputs)
    }

    /// The digests of what is read and not copied: of an adapter that is merged, its own files.
    ///
    /// # Errors
    /// When the adapter's config cannot be read.
    pub(super) fn inputs_not_copied(&self) -> Result<Vec<Dependency>, Failure> {
        if !self.merges() {
            return Ok(Vec::new());
        }
        let mut inputs = weights(&self.checkpoint, Role::Checkpoint);
        let path = self.checkpoint.path().join(ADAPTER_CONFIG_FILE);
        inputs.push(Dependency {
            role: Role::Checkpoint,
            name: ADAPTER_CONFIG_FILE.to_owned(),
            uri: None,
            digest: digest_of(&path)?,
        });
        Ok(inputs)
    }

    /// Refuses to go on when a file of weights has another length than when it was opened.
    ///
    /// # Errors
    /// When one has.
    pub(super) fn check_unchanged(&self) -> Result<(), Failure> {
        self.checkpoint.check_unchanged()?;
        if let Some(base) = self.base() {
            base.check_unchanged()?;
        }
        Ok(())
    }
}

/// Opens the checkpoint at `path`, and says so.
fn opened(path: &Path, reporter: &Reporter) -> Result<Checkpoint, Failure> {
    let checkpoint = Checkpoint::open(path)?;
    let tensors = checkpoint.tensors().count();
    reporter.stage(format!(
        "read the headers of {}: {tensors} tensors",
        path.display()
    ));
    Ok(checkpoint)
}

/// The file of an adapter's tensors says too little without the config beside it.
fn refuse_bare_weights(checkpoint: &Checkpoint) -> Result<(), Failure> {
    let is_lora = |tensor: TensorView<'_>| tensor.name.ends_with(".lora_A.weight");
    if checkpoint.layout() != Layout::LoneFile || !checkpoint.tensors().any(is_lora) {
        return Ok(());
    }
    let failure = Failure::new(
        Exit::Refused,
        format!(
            "`{}` holds a LoRA adapter's tensors without its config",
            checkpoint.path().display()
        ),
    )
    .because("rank, scale and base are in `adapter_config.json`");
    Err(match checkpoint.side_file(ADAPTER_CONFIG_FILE) {
        Some(config) => failure.hint(format!(
            "give the directory `{}`",
            config.parent().unwrap_or(Path::new(".")).display()
        )),
        None => failure.hint(format!(
            "give a PEFT directory: `{ADAPTER_CONFIG_FILE}` and `{ADAPTER_WEIGHTS_FILE}`"
        )),
    })
}

/// Whether the head of `base` is its embedding: what its config says, else whether it has no head of its own.
fn ties_embeddings(base: &Checkpoint) -> Result<bool, Failure> {
    let said = match base.side_file("config.json") {
        None => None,
        Some(path) => {
            let text = std::fs::read_to_string(&path)
                .map_err(|error| Failure::from(FormatError::new(&path, error)))?;
            let config: Value = serde_json::from_str(&text).unwrap_or_default();
            ["/tie_word_embeddings", "/text_config/tie_word_embeddings"]
                .into_iter()
                .find_map(|place| config.pointer(place)?.as_bool())
        }
    };
    let has_head = || base.tensors().any(|it| it.name.ends_with("lm_head.weight"));
    Ok(said.unwrap_or_else(|| !has_head()))
}

/// The digest of a whole file.
///
/// # Errors
/// When it cannot be read.
pub(super) fn digest_of(path: &Path) -> Result<Sha256, Failure> {
    Sha256::of_file(path).map_err(|error| Failure::from(FormatError::new(path, error)))
}

/// Where side files of `checkpoint` are looked for, in words.
pub(super) fn looked_in(checkpoint: &Checkpoint) -> String {
    let path = checkpoint.path();
    match checkpoint.layout() {
        Layout::LoneFile => {
            let parent = path
                .parent()
                .filter(|parent| !parent.as_os_str().is_empty());
            format!(
                "it was looked for beside the file, in `{}`",
                parent.unwrap_or(Path::new(".")).display()
            )
        }
        _ => format!("it was looked for in `{}`", path.display()),
    }
}

/// The files of weights as inputs.
fn weights(checkpoint: &Checkpoint, role: Role) -> Vec<Dependency> {
    checkpoint
        .files()
        .par_iter()
        .map(|shard| Dependency {
            role: role.clone(),
            name: shard.name.clone(),
            uri: None,
            digest: shard.file.digest(),
        })
        .collect()
}
