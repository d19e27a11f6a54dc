//! The files of a checkpoint directory that are not weights: which travel with a copy, and which must not.
//!
//! A patched directory that carried the unpatched weights along in another format, or a signature of the old bytes, would
//! mislead whoever loads or verifies it. So weights in any format, training state and old attestations stay behind, each with
//! the reason.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::INDEX_FILE;
use crate::error::FormatError;

/// What lies in a checkpoint directory beside its weights, each list sorted by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SideFiles {
    /// To be copied byte for byte.
    pub copied: Vec<SideFile>,
    /// Not to be copied. A folder stands for all that it holds.
    pub left_out: Vec<(String, LeftOut)>,
}

/// A file to be copied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SideFile {
    /// Its name relative to the directory, with `/` between folders.
    pub name: String,
    /// Where to read it; a symbolic link is read through.
    pub path: PathBuf,
    /// Whether it is Python code, which some loaders run (`trust_remote_code`). A user should be told.
    pub is_code: bool,
}

/// Why a file or folder stays behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum LeftOut {
    /// A signature or manifest of other bytes.
    Attestation,
    /// Neither a file nor a folder, or a link to a folder or to nothing.
    NotRegular,
    /// A name that is not Unicode, which a manifest could not list.
    NotUnicode,
    /// Deeper than [`MAX_DEPTH`] folders.
    TooDeep,
    /// State of a training run.
    TrainingState,
    /// History of the directory itself.
    VersionControl,
    /// Weights that would not be patched.
    Weights,
}

impl fmt::Display for LeftOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Attestation => "a signature or manifest of the unpatched files",
            Self::NotRegular => "not a regular file",
            Self::NotUnicode => "its name is not Unicode",
            Self::TooDeep => "too many folders deep",
            Self::TrainingState => "state of a training run",
            Self::VersionControl => "version control",
            Self::Weights => "weights that are not patched",
        })
    }
}

/// Deepest folder that is looked into; `additional_chat_templates` is one deep.
pub const MAX_DEPTH: usize = 8;

/// Lists `directory`, whose weights are the files `weights` in it.
pub(super) fn list(
    directory: &Path,
    weights: &[&str],
    sharded: bool,
) -> Result<SideFiles, FormatError> {
    let mut found = SideFiles::default();
    walk(directory, "", 0, &mut found)?;
    found
        .left_out
        .retain(|(name, _)| !weights.contains(&name.as_str()));
    if !sharded {
        // An index that is not in use names shards that would not be there.
        found.copied.retain(|file| file.name != INDEX_FILE);
    }
    found.copied.sort_by(|a, b| a.name.cmp(&b.name));
    found.left_out.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(found)
}

fn walk(
    directory: &Path,
    prefix: &str,
    depth: usize,
    found: &mut SideFiles,
) -> Result<(), FormatError> {
    let refused = |error: io::Error| FormatError::new(directory, error);
    for entry in fs::read_dir(directory).map_err(refused)? {
        let entry = entry.map_err(refused)?;
        let path = entry.path();
        let file_name = entry.file_name();
        let Some(file_name) = file_name.to_str() else {
            let name = format!("{prefix}{}", file_name.to_string_lossy());
            found.left_out.push((name, LeftOut::NotUnicode));
            continue;
        };
        let name = format!("{prefix}{file_name}");
        if entry.file_type().map_err(refused)?.is_dir() {
            match left_out_folder(file_name) {
                Some(reason) => found.left_out.push((name, reason)),
                None if depth == MAX_DEPTH => found.left_out.push((name, LeftOut::TooDeep)),
                None => walk(&path, &format!("{name}/"), depth + 1, found)?,
            }
        } else if let Some(reason) = left_out_file(file_name) {
            found.left_out.push((name, reason));
        } else if fs::metadata(&path).is_ok_and(|metadata| metadata.is_file()) {
            found.copied.push(SideFile {
                is_code: has_extension(file_name, &["py"]),
                name,
                path,
            });
        } else {
            found.left_out.push((name, LeftOut::NotRegular));
        }
    }
    Ok(())
}

fn left_out_folder(name: &str) -> Option<LeftOut> {
    let numbered = |prefix| {
        name.strip_prefix(prefix).is_some_and(|rest: &str| {
            !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_digit())
        })
    };
    match name {
        ".git" | ".github" | ".cache" => Some(LeftOut::VersionControl),
        // What transformers' and DeepSpeed's trainers leave beside the finished model.
        _ if numbered("checkpoint-") || numbered("global_step") => Some(LeftOut::TrainingState),
        _ => None,
    }
}

fn left_out_file(name: &str) -> Option<LeftOut> {
    if matches!(
        name,
        "training_args.bin" | "trainer_state.json" | "optimizer.pt" | "scheduler.pt"
    ) || name.starts_with("rng_state")
    {
        return Some(LeftOut::TrainingState);
    }
    if has_extension(name, &["sig"]) || name == "panacea.manifest.json" {
        return Some(LeftOut::Attestation);
    }
    let stale_index = name != INDEX_FILE
        && (name.ends_with(".safetensors.index.json") || name.ends_with(".bin.index.json"));
    if stale_index || has_extension(name, WEIGHTS) {
        return Some(LeftOut::Weights);
    }
    None
}

/// Extensions of files that hold weights, used or not.
const WEIGHTS: &[&str] = &[
    "bin",
    "ckpt",
    "gguf",
    "h5",
    "msgpack",
    "onnx",
    "onnx_data",
    "pt",
    "pth",
    "safetensors",
    "tflite",
];

fn has_extension(name: &str, extensions: &[&str]) -> bool {
    name.rsplit_once('.').is_some_and(|(_, extension)| {
        extensions
            .iter()
            .any(|wanted| extension.eq_ignore_ascii_case(wanted))
    })
}
