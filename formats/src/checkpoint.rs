//! A checkpoint: the tensors of a Hugging Face directory, a PEFT directory, one `.safetensors` file or a GGUF file, split or not, and
//! the files that belong to them.
//!
//! In: a path. Out: every tensor by name, whichever shard holds it, and the side files by name. Which files are shards is taken
//! from the index and never from a directory listing, so that a stale shard beside them is not read.

mod index;
mod parts;
mod side_files;

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::error::{FormatError, Problems, shown};
use crate::gguf::{self, Split};
use crate::json::JsonError;
use crate::tensor::TensorView;
use crate::weights_file::WeightsFile;

pub use index::{IndexProblem, MAX_INDEX_BYTES};
pub use parts::PartProblem;
pub use side_files::{LeftOut, MAX_DEPTH, SideFile, SideFiles};

use index::Index;

/// The weights of a directory that is not sharded.
pub const WEIGHTS_FILE: &str = "model.safetensors";

/// The index of a directory that is.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

/// The weights of a PEFT directory.
pub const ADAPTER_WEIGHTS_FILE: &str = "adapter_model.safetensors";

/// What makes a directory a PEFT one.
pub const ADAPTER_CONFIG_FILE: &str = "adapter_config.json";

/// An open checkpoint: headers are read, tensors are mapped and untouched.
///
/// Symbolic links are followed, since the snapshots of the Hugging Face cache consist of them.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    layout: Layout,
    shards: Vec<Shard>,
    /// Name -> (position in `shards`, position in that file). For look-up only; nothing iterates over it.
    by_name: HashMap<String, usize>,
}

/// How a checkpoint lies on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Layout {
    /// A PEFT directory: `adapter_config.json` and `adapter_model.safetensors`. What they mean is [`crate::Adapter`]'s to say.
    Adapter,
    /// A directory with `model.safetensors`.
    Directory,
    /// One `.gguf` file, which has no side files: its metadata says what they would.
    Gguf,
    /// One `.safetensors` file. Its side files, if any, lie beside it.
    LoneFile,
    /// A directory with `model.safetensors.index.json` and the shards that it names.
    Sharded,
    /// The parts of one GGUF file, opened at the first. Its copy is a directory with all of them.
    SplitGguf,
}

impl Layout {
    /// Whether it is one file, and its copy is one.
    pub fn is_one_file(self) -> bool {
        matches!(self, Self::Gguf | Self::LoneFile)
    }

    /// Whether its metadata says what other checkpoints have side files for.
    pub fn is_gguf(self) -> bool {
        matches!(self, Self::Gguf | Self::SplitGguf)
    }
}

/// One file of weights.
#[derive(Debug)]
pub struct Shard {
    /// The file's name in its directory.
    pub name: String,
    /// The file.
    pub file: WeightsFile,
}

impl Checkpoint {
    /// Opens the directory or the lone file at `path`, and checks every header and the index. Of a GGUF file in parts, `path` is
    /// the first.
    ///
    /// A directory with both `model.safetensors` and an index is read as the former, as transformers does. One with a whole
    /// model and an adapter is refused, since loaders differ in which of them it is.
    ///
    /// # Errors
    /// When a file is missing or unsound, or the index and the shards, or the parts, disagree; all disagreements are listed.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        let metadata = std::fs::metadata(path).map_err(|error| FormatError::new(path, error))?;
        if !metadata.is_dir() {
            return Self::open_file(path);
        }
        let has = |name: &str| path.join(name).exists();
        let is_adapter = has(ADAPTER_CONFIG_FILE) || has(ADAPTER_WEIGHTS_FILE);
        match [WEIGHTS_FILE, INDEX_FILE]
            .into_iter()
            .find(|name| has(name))
        {
            Some(model) if has(ADAPTER_CONFIG_FILE) && has(ADAPTER_WEIGHTS_FILE) => {
                return Err(FormatError::new(path, CheckpointError::Ambiguous { model }));
            }
            Some(WEIGHTS_FILE) => return Self::open_single(path, Layout::Directory, WEIGHTS_FILE),
            Some(_) => return Self::open_sharded(path),
            None if is_adapter => {
                for name in [ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE] {
                    if !has(name) {
                        return Err(FormatError::new(
                            path,
                            CheckpointError::HalfAdapter {
                                absent: name,
                                instead: other_weights(path)
                                    .filter(|it| it != ADAPTER_WEIGHTS_FILE),
                            },
                        ));
                    }
                }
                return Self::open_single(path, Layout::Adapter, ADAPTER_WEIGHTS_FILE);
            }
            None => {}
        }
        Err(FormatError::new(
            path,
            CheckpointError::NoWeights {
                instead: other_weights(path),
            },
        ))
    }

    /// A directory whose weights are the one file `name`.
    fn open_single(path: &Path, layout: Layout, name: &str) -> Result<Self, FormatError> {
        let shard = Shard {
            file: WeightsFile::open(&path.join(name))?,
            name: name.to_owned(),
        };
        Ok(Self::of(path, layout, vec![shard]))
    }

    fn open_file(path: &Path) -> Result<Self, FormatError> {
        let extension = path.extension().and_then(OsStr::to_str).unwrap_or_default();
        if OTHER_WEIGHTS.contains(&extension) {
            return Err(FormatError::new(
                path,
                CheckpointError::OtherFormat {
                    extension: extension.to_owned(),
                },
            ));
        }
        let name = path
            .file_name()
            .and_then(OsStr::to_str)
            .ok_or_else(|| FormatError::new(path, io::Error::from(io::ErrorKind::InvalidFilename)))?
            .to_owned();
        let (layout, file) = match WeightsFile::open(path)? {
            WeightsFile::Gguf(file) => {
                let split = Split::of(file.metadata());
                match split.map_err(|error| FormatError::new(path, error))? {
                    Some(split) => {
                        let parts = parts::open(path, &name, file, split)?;
                        return Ok(Self::of(path, Layout::SplitGguf, parts));
                    }
                    None => (Layout::Gguf, WeightsFile::Gguf(file)),
                }
            }
            file @ WeightsFile::Safetensors(_) => (Layout::LoneFile, file),
        };
        Ok(Self::of(path, layout, vec![Shard { name, file }]))
    }

    fn open_sharded(path: &Path) -> Result<Self, FormatError> {
        let index_path = path.join(INDEX_FILE);
        let refused = |error: CheckpointError| FormatError::new(&index_path, error);
        let index = Index::read(&index_path)?;
        let names = index.shard_names().map_err(refused)?;
        let missing: Vec<_> = names
            .iter()
            .filter(|name| !path.join(name).exists())
            .map(|name| IndexProblem::ShardMissing {
                shard: (*name).to_owned(),
            })
            .collect();
        Problems::none_of(missing).map_err(|problems| refused(problems.into()))?;
        let shards = names
            .into_iter()
            .map(|name| {
                Ok(Shard {
                    file: WeightsFile::open(&path.join(name))?,
                    name: name.to_owned(),
                })
            })
            .collect::<Result<Vec<_>, FormatError>>()?;
        index.check_against(&shards).map_err(refused)?;
        Ok(Self::of(path, Layout::Sharded, shards))
    }

    /// `shards` are known to share no tensor name.
    fn of(path: &Path, layout: Layout, shards: Vec<Shard>) -> Self {
        let by_name = shards
            .iter()
            .enumerate()
            .flat_map(|(position, shard)| {
                shard
                    .file
                    .tensors()
                    .map(move |tensor| (tensor.name.to_owned(), position))
            })
            .collect();
        Self {
            path: path.to_owned(),
            layout,
            shards,
            by_name,
        }
    }

    /// The path it was opened at.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How it lies on disk.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// The files of weights, by name.
    pub fn files(&self) -> &[Shard] {
        &self.shards
    }

    /// Every tensor: file after file, and within a file in the order of the bytes.
    pub fn tensors(&self) -> impl Iterator<Item = TensorView<'_>> {
        self.shards.iter().flat_map(|shard| shard.file.tensors())
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<TensorView<'_>> {
        let &shard = self.by_name.get(name)?;
        self.shards.get(shard)?.file.tensor(name)
    }

    /// The name of the tensor that most resembles `name`, for a message about one that is not there.
    pub fn nearest_name(&self, name: &str) -> Option<&str> {
        crate::error::nearest(name, self.tensors().map(|tensor| tensor.name))
    }

    /// The keys and values of a GGUF file, of the first part where it is split.
    pub fn gguf_metadata(&self) -> Option<&gguf::Metadata> {
        match &self.shards.first()?.file {
            WeightsFile::Gguf(file) => Some(file.metadata()),
            WeightsFile::Safetensors(_) => None,
        }
    }

    /// The path of the file called `name` in the directory, or beside the lone file, if there is one. A GGUF file has none.
    pub fn side_file(&self, name: &str) -> Option<PathBuf> {
        if self.layout.is_gguf() {
            return None;
        }
        let path = self.directory().join(name);
        path.is_file().then_some(path)
    }

    /// The files that travel with the weights, and those that do not, by name. Of a lone file or GGUF: none.
    ///
    /// # Errors
    /// When a directory cannot be listed.
    pub fn side_files(&self) -> Result<SideFiles, FormatError> {
        match self.layout {
            Layout::LoneFile | Layout::Gguf | Layout::SplitGguf => Ok(SideFiles::default()),
            Layout::Adapter | Layout::Directory | Layout::Sharded => {
                let weights: Vec<&str> = self
                    .shards
                    .iter()
                    .map(|shard| shard.name.as_str())
                    .collect();
                side_files::list(&self.path, &weights, self.layout == Layout::Sharded)
            }
        }
    }

    /// Gives the pages of all weights back to the system, as [`WeightsFile::release`] does.
    pub fn release(&self) {
        for shard in &self.shards {
            shard.file.release();
        }
    }

    /// Whether every file of weights still has the length it was opened with.
    ///
    /// # Errors
    /// The first that has not.
    pub fn check_unchanged(&self) -> Result<(), FormatError> {
        self.shards
            .iter()
            .try_for_each(|shard| shard.file.check_unchanged())
    }

    /// The directory that side files are in.
    fn directory(&self) -> &Path {
        match self.layout {
            Layout::LoneFile | Layout::Gguf | Layout::SplitGguf => {
                self.path.parent().unwrap_or(Path::new(""))
            }
            Layout::Adapter | Layout::Directory | Layout::Sharded => &self.path,
        }
    }
}

/// Extensions of weights that are not read.
const OTHER_WEIGHTS: &[&str] = &["bin", "ckpt", "h5", "msgpack", "onnx", "pt", "pth"];

/// A file in `directory` that holds weights which are not read, to name it in the refusal.
fn other_weights(directory: &Path) -> Option<String> {
    let mut names: Vec<String> = std::fs::read_dir(directory)
        .ok()?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| {
            let extension = Path::new(name).extension().and_then(OsStr::to_str);
            extension.is_some_and(|it| {
                matches!(it, "safetensors" | "gguf") || OTHER_WEIGHTS.contains(&it)
            })
        })
        .collect();
    names.sort_unstable();
    names.into_iter().next()
}

/// Why files are not a checkpoint.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// A directory that could be read as a whole model or as an adapter.
    #[error("it holds an adapter beside `{model}`, and either could be meant")]
    Ambiguous {
        /// What makes it a whole model.
        model: &'static str,
    },
    /// One of the two files of a PEFT directory.
    #[error("it is a PEFT directory without `{absent}`{}", match instead {
        Some(name) => format!("; `{}` is not read", shown(name)),
        None => String::new(),
    })]
    HalfAdapter {
        /// The other.
        absent: &'static str,
        /// Weights in another format.
        instead: Option<String>,
    },
    /// The index is not the JSON that an index is.
    #[error("the index is not the JSON that it should be")]
    IndexSyntax {
        /// What is wrong, and where.
        source: JsonError,
    },
    /// The index is longer than any sound one.
    #[error("the index has {found} bytes, above the limit of {MAX_INDEX_BYTES}")]
    IndexTooLong {
        /// Its length.
        found: u64,
    },
    /// A part of a GGUF file that is not the first.
    #[error(
        "it is a later part of a GGUF file, which is opened at its first, `{}`",
        shown(first)
    )]
    LaterPart {
        /// The file name of the first.
        first: String,
    },
    /// A directory without weights.
    #[error("it holds neither `{WEIGHTS_FILE}` nor `{INDEX_FILE}`{}", match instead {
        Some(name) => format!("; `{}` is not read", shown(name)),
        None => String::new(),
    })]
    NoWeights {
        /// Other weights in it.
        instead: Option<String>,
    },
    /// The index does not map names to files.
    #[error("the index has no `weight_map` from tensor names to file names")]
    NoWeightMap,
    /// A file of another format, by its extension.
    #[error("`.{extension}` weights are not read here, only `.safetensors` and `.gguf`")]
    OtherFormat {
        /// The extension.
        extension: String,
    },
    /// A part of a GGUF file under a name that does not lead to the others.
    #[error("it says that it is part {part} of a GGUF file, and is not called `{wanted}`")]
    PartName {
        /// Its number, from 1.
        part: u32,
        /// What such parts are called.
        wanted: String,
    },
    /// Index and shards disagree.
    #[error("{0}")]
    Index(Problems<IndexProblem>),
    /// The parts of a GGUF file disagree.
    #[error("{0}")]
    Parts(Problems<PartProblem>),
}

impl From<Problems<IndexProblem>> for CheckpointError {
    fn from(problems: Problems<IndexProblem>) -> Self {
        Self::Index(problems)
    }
}

impl From<Problems<PartProblem>> for CheckpointError {
    fn from(problems: Problems<PartProblem>) -> Self {
        Self::Parts(problems)
    }
}
