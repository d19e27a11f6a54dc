//! Writes a copy of a checkpoint in which chosen tensors have other bytes, and nothing else differs.
//!
//! In: an open checkpoint, a [`Patch`] that says what the chosen tensors' bytes become, and an output. Out: every file with its
//! length and digest, and the digests of the files that were read. The header of each file of weights is repeated byte for byte, so that order, metadata, offsets and element
//! types stay; all other ranges and all side files are copied.
//!
//! Every byte is read once. A window of chunks is patched in parallel while the one before is hashed, as it was and as it will be,
//! and written; a few files go on at the same time. Chunks have a fixed size, and what is learned from them is told in a fixed
//! order, so bytes and reports do not depend on the number of threads. Memory: at most 8 chunks of 4 MiB for each of 2 files,
//! whatever the size of the checkpoint.

use std::fs::File;
use std::io::{self, Read as _};
use std::ops::Range;

use rayon::prelude::*;
use thiserror::Error;

use crate::atomic::{HashedFile, OutputDir, OutputError, OutputFile, WrittenFile};
use crate::checkpoint::{Checkpoint, Layout, Shard, SideFile, SideFiles};
use crate::digest::{Hasher, Sha256};
use crate::dtype::Dtype;
use crate::error::{FormatError, shown};
use crate::safetensors::SafetensorsFile;
use crate::tensor::TensorView;

/// What becomes of chosen tensors.
pub trait Patch: Sync {
    /// What is learned from one chunk.
    type Report: Send;
    /// Why a chunk cannot be patched.
    type Error: std::error::Error + Send + 'static;

    /// Whether `tensor` is chosen. Only `F32`, `F16` and `BF16` tensors can be.
    fn targets(&self, tensor: &TensorView<'_>) -> bool;

    /// Replaces `bytes`, which hold the stored elements `elements` of `tensor`, by the new ones. Called for every chunk of a
    /// chosen tensor once, from any thread, in any order; chunks of a tensor start at multiples of [`CHUNK_BYTES`].
    ///
    /// # Errors
    /// Ends the writing.
    fn patch(
        &self,
        tensor: &TensorView<'_>,
        elements: Range<usize>,
        bytes: &mut [u8],
    ) -> Result<Self::Report, Self::Error>;
}

/// Watches long work, and can end it.
pub trait Observer: Sync {
    /// `bytes` more were done. From any thread.
    fn advanced(&self, bytes: u64) {
        let _ = bytes;
    }

    /// Whether to stop. Asked before every few chunks, from any thread.
    fn interrupted(&self) -> bool {
        false
    }
}

/// Watches nothing.
impl Observer for () {}

/// Where a copy goes. A lone file gives a file, a directory a directory.
#[derive(Debug)]
pub enum Destination<'a> {
    /// For [`Layout::Directory`] and [`Layout::Sharded`].
    Directory(&'a mut OutputDir),
    /// For [`Layout::LoneFile`].
    File(&'a mut OutputFile),
}

/// What a copy consists of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrittenCheckpoint {
    /// Every file written, by name.
    pub files: Vec<WrittenFile>,
    /// Every file of weights that was read, by name, with the digest of its bytes.
    pub sources: Vec<(String, Sha256)>,
    /// Which side files were copied, and which were not and why.
    pub side_files: SideFiles,
}

/// How many bytes [`write_checkpoint`] will write, to be compared with the room there is.
///
/// # Errors
/// When the side files cannot be listed.
pub fn copied_bytes(checkpoint: &Checkpoint) -> Result<u64, FormatError> {
    let weights: u64 = checkpoint
        .files()
        .iter()
        .map(|shard| shard.file.length() as u64)
        .sum();
    let side_files = checkpoint.side_files()?;
    let side: u64 = side_files
        .copied
        .iter()
        .filter_map(|file| std::fs::metadata(&file.path).ok())
        .map(|metadata| metadata.len())
        .sum();
    Ok(weights + side)
}

/// Writes a copy of `checkpoint` in which `patch` has its way. `reported` gets each chunk's report with the tensor's name: file
/// after file, tensor after tensor, chunk after chunk. Nothing is committed.
///
/// # Errors
/// [`WriteError`], of several the one about the first file; the output is then incomplete and should be dropped.
pub fn write_checkpoint<P: Patch>(
    checkpoint: &Checkpoint,
    patch: &P,
    destination: Destination<'_>,
    observer: &impl Observer,
    mut reported: impl FnMut(&str, P::Report) + Send,
) -> Result<WrittenCheckpoint, WriteError<P::Error>> {
    let side_files = checkpoint.side_files()?;
    let mut files = Vec::new();
    let mut sources = Vec::new();
    match destination {
        Destination::Directory(output) if checkpoint.layout() != Layout::LoneFile => {
            for shards in checkpoint.files().chunks(FILES_AT_ONCE) {
                let mut pairs = Vec::new();
                for shard in shards {
                    pairs.push((shard, output.create_file(&shard.name)?));
                }
                let written: Vec<CopiedShard<'_, P>> = pairs
                    .into_par_iter()
                    .with_max_len(1)
                    .map(|(shard, mut file)| {
                        let source = write_shard(shard, patch, &mut file, observer)?;
                        Ok((source, file.finish()?))
                    })
                    .collect();
                for (shard, written) in shards.iter().zip(written) {
                    let (source, file) = written?;
                    sources.push((shard.name.clone(), source.sha256));
                    source.report(&mut reported);
                    files.push(file);
                }
            }
            for side_file in &side_files.copied {
                files.push(copy_side_file(side_file, output, observer)?);
            }
        }
        Destination::File(output) if checkpoint.layout() == Layout::LoneFile => {
            for shard in checkpoint.files() {
                let source = write_shard(shard, patch, output.growing()?, observer)?;
                sources.push((shard.name.clone(), source.sha256));
                source.report(&mut reported);
            }
            files.push(output.finish()?);
        }
        _ => return Err(WriteError::KindOfOutput),
    }
    checkpoint.check_unchanged()?;
    files.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(WrittenCheckpoint {
        files,
        sources,
        side_files,
    })
}

/// A file of weights, copied and finished.
type CopiedShard<'a, P> = Result<(Source<'a, P>, WrittenFile), WriteError<<P as Patch>::Error>>;

/// What was learned of one file of weights while it was copied.
struct Source<'a, P: Patch> {
    sha256: Sha256,
    /// With the tensor's name, in the order of the chunks.
    reports: Vec<(&'a str, P::Report)>,
}

impl<P: Patch> Source<'_, P> {
    fn report(self, reported: &mut impl FnMut(&str, P::Report)) {
        for (tensor, report) in self.reports {
            reported(tensor, report);
        }
    }
}

/// A range of one file.
enum Segment<'a> {
    /// Goes over as it is.
    Copied(&'a [u8]),
    /// A chunk of a chosen tensor.
    Patched {
        tensor: TensorView<'a>,
        elements: Range<usize>,
        stored: &'a [u8],
    },
}

impl Segment<'_> {
    fn stored(&self) -> &[u8] {
        match self {
            Self::Copied(stored) | Self::Patched { stored, .. } => stored,
        }
    }

    fn is_patched(&self) -> bool {
        matches!(self, Self::Patched { .. })
    }
}

/// Appends the copy of `shard` to `output`.
fn write_shard<'a, P: Patch>(
    shard: &'a Shard,
    patch: &P,
    output: &mut HashedFile,
    observer: &impl Observer,
) -> Result<Source<'a, P>, WriteError<P::Error>> {
    let segments = segments(&shard.file, patch)?;
    let mut reports = Vec::new();
    // Up to the first chunk that is patched, the digest of the copy is that of the source.
    let mut source: Option<Hasher> = None;
    let mut patching: Window = Window::default();
    let mut writing: Window = Window::default();
    let mut pending: &[Segment<'_>] = &[];
    for window in segments.chunks(WINDOW_CHUNKS).chain([&[][..]]) {
        if source.is_none() && pending.iter().any(Segment::is_patched) {
            source = Some(output.hasher().clone());
        }
        let ((written, ()), patched) = rayon::join(
            || {
                rayon::join(
                    || write_window(pending, &writing, output, observer),
                    || hash_window(pending, source.as_mut()),
                )
            },
            || patch_window(window, &mut patching, patch, observer),
        );
        // The earlier bytes' failure first, so that what is reported does not depend on timing.
        written?;
        for (segment, report) in window.iter().zip(patched) {
            if let Segment::Patched { tensor, .. } = segment
                && let Some(report) = report?
            {
                reports.push((tensor.name, report));
            }
        }
        std::mem::swap(&mut patching, &mut writing);
        pending = window;
    }
    let source = source.unwrap_or_else(|| output.hasher().clone());
    Ok(Source {
        sha256: source.finish(),
        reports,
    })
}

/// Cuts a file into segments of at most [`CHUNK_BYTES`], in order.
fn segments<'a, P: Patch>(
    file: &'a SafetensorsFile,
    patch: &P,
) -> Result<Vec<Segment<'a>>, WriteError<P::Error>> {
    let all = file.file_bytes();
    let mut segments = Vec::new();
    let mut copied = 0;
    let mut position = file.header_bytes().len();
    for tensor in file.tensors() {
        let end = position + tensor.bytes.len();
        if patch.targets(&tensor) {
            let width = tensor
                .dtype
                .patchable_width()
                .ok_or_else(|| WriteError::NotPatchable {
                    tensor: tensor.name.to_owned(),
                    dtype: tensor.dtype,
                })?;
            segments.extend(
                all[copied..position]
                    .chunks(CHUNK_BYTES)
                    .map(Segment::Copied),
            );
            let mut first = 0;
            for stored in tensor.bytes.chunks(CHUNK_BYTES) {
                let elements = first..first + stored.len() / width;
                first = elements.end;
                segments.push(Segment::Patched {
                    tensor,
                    elements,
                    stored,
                });
            }
            copied = end;
        }
        position = end;
    }
    segments.extend(all[copied..].chunks(CHUNK_BYTES).map(Segment::Copied));
    Ok(segments)
}

/// Room for the patched chunks of one window, kept from one to the next.
type Window = [Vec<u8>; WINDOW_CHUNKS];

/// A chunk's report; nothing for a copied segment.
type PatchedSegment<P> = Result<Option<<P as Patch>::Report>, WriteError<<P as Patch>::Error>>;

/// One result for each segment.
fn patch_window<P: Patch>(
    segments: &[Segment<'_>],
    window: &mut Window,
    patch: &P,
    observer: &impl Observer,
) -> Vec<PatchedSegment<P>> {
    segments
        .par_iter()
        .zip(window.par_iter_mut())
        .with_max_len(1)
        .map(|(segment, bytes)| {
            let Segment::Patched {
                tensor,
                elements,
                stored,
            } = segment
            else {
                return Ok(None);
            };
            if observer.interrupted() {
                return Err(WriteError::Interrupted);
            }
            bytes.clear();
            bytes.extend_from_slice(stored);
            patch
                .patch(tensor, elements.clone(), bytes)
                .map(Some)
                .map_err(|source| WriteError::Patch {
                    tensor: tensor.name.to_owned(),
                    source,
                })
        })
        .collect()
}

fn write_window<E: std::error::Error + 'static>(
    segments: &[Segment<'_>],
    window: &Window,
    output: &mut HashedFile,
    observer: &impl Observer,
) -> Result<(), WriteError<E>> {
    if observer.interrupted() {
        return Err(WriteError::Interrupted);
    }
    let pieces: Vec<&[u8]> = segments
        .iter()
        .zip(window)
        .map(|(segment, patched)| match segment {
            Segment::Copied(stored) => stored,
            Segment::Patched { .. } => patched.as_slice(),
        })
        .collect();
    output.write_pieces(&pieces)?;
    observer.advanced(pieces.iter().map(|piece| piece.len() as u64).sum());
    Ok(())
}

/// Hashes what `segments` were before they were patched, where that is not what the copy's own digest is of.
fn hash_window(segments: &[Segment<'_>], source: Option<&mut Hasher>) {
    if let Some(hasher) = source {
        for segment in segments {
            hasher.update(segment.stored());
        }
    }
}

fn copy_side_file<E: std::error::Error + 'static>(
    side_file: &SideFile,
    output: &mut OutputDir,
    observer: &impl Observer,
) -> Result<WrittenFile, WriteError<E>> {
    let unreadable = |error: io::Error| FormatError::new(&side_file.path, error);
    let mut from = File::open(&side_file.path).map_err(unreadable)?;
    let mut to = output.create_file(&side_file.name)?;
    let mut piece = vec![0; SIDE_PIECE];
    loop {
        if observer.interrupted() {
            return Err(WriteError::Interrupted);
        }
        match from.read(&mut piece) {
            Ok(0) => return Ok(to.finish()?),
            Ok(read) => {
                to.write_all(&piece[..read])?;
                observer.advanced(read as u64);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(unreadable(error).into()),
        }
    }
}

/// Bytes patched at once: a multiple of every element's width, and small enough that a window stays in a large cache.
pub const CHUNK_BYTES: usize = 4 << 20;

/// Chunks patched in parallel. Two windows are alive at once. Hashing, on one thread, is slower than four of patching.
const WINDOW_CHUNKS: usize = 4;

/// Files written at the same time: what one waits for, a hash or the disk, the other makes use of.
const FILES_AT_ONCE: usize = 2;

/// Bytes of a side file read at once.
const SIDE_PIECE: usize = 1 << 20;

/// Why a copy was not written. `E` is the patch's own error.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum WriteError<E: std::error::Error + 'static> {
    /// The checkpoint could not be read.
    #[error(transparent)]
    Input(#[from] FormatError),
    /// The observer asked to stop.
    #[error("interrupted")]
    Interrupted,
    /// A lone file was to become a directory, or the other way round.
    #[error("a lone file is written as a file, and a directory as a directory")]
    KindOfOutput,
    /// A chosen tensor that cannot be patched.
    #[error("tensor `{}` is {dtype}, which cannot be patched", shown(tensor))]
    NotPatchable {
        /// The tensor.
        tensor: String,
        /// Its element type.
        dtype: Dtype,
    },
    /// The output failed.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// A chosen tensor whose values cannot be patched.
    #[error("tensor `{}` cannot be patched", shown(tensor))]
    Patch {
        /// The tensor.
        tensor: String,
        /// The reason.
        source: E,
    },
}
