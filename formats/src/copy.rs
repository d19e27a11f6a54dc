//! Writes a copy of a checkpoint in which chosen tensors have other bytes, and nothing else differs.
//!
//! In: an open checkpoint, a [`Patch`] that says what the chosen tensors' bytes become, and an output. Out: every file with its
//! length and digest, and the digests of the files that were read. The header of each file of weights is repeated byte for byte, so that order, metadata, offsets and element
//! types stay; all other ranges and all side files are copied.
//!
//! Every byte is read once. A window of chunks is patched in parallel while the one before is hashed, as it was and as it will be,
//! and the one before that is written; two files go on at the same time. Chunks have a fixed size, and what is learned from
//! them is told in a fixed order, so bytes and reports do not depend on the number of threads. Memory: three windows of
//! 8 MiB for each of two files, whatever the size of the checkpoint.

use std::fs::File;
use std::io::{self, Read as _};
use std::ops::Range;

use rayon::prelude::*;
use thiserror::Error;

use crate::atomic::{Block, HashedFile, OutputDir, OutputError, OutputFile, WrittenFile};
use crate::checkpoint::{Checkpoint, Shard, SideFile, SideFiles};
use crate::digest::{Hasher, Sha256};
use crate::dtype::Dtype;
use crate::error::{FormatError, shown};
use crate::gguf::{GgufFile, GgufLayout, GgufWriteError, TensorInfo};
use crate::tensor::TensorView;
use crate::weights_file::WeightsFile;

/// What becomes of chosen tensors.
pub trait Patch: Sync {
    /// What is learned from one chunk.
    type Report: Send;
    /// Why a chunk cannot be patched.
    type Error: std::error::Error + Send + 'static;

    /// Whether `tensor` is chosen. Only those of a patchable element type can be.
    fn targets(&self, tensor: &TensorView<'_>) -> bool;

    /// The element type that a chosen tensor gets: its own, unless a GGUF file is to have another.
    fn dtype(&self, tensor: &TensorView<'_>) -> Dtype {
        tensor.dtype
    }

    /// Replaces `bytes`, which hold the stored elements `elements` of `tensor`, by the new ones. Where these are of another type,
    /// `bytes` is as long as they are, and holds anything. Called for every chunk of a chosen tensor once, from any thread, in any
    /// order; chunks of a tensor start at multiples of 256 elements, and those of a float type at multiples of [`CHUNK_BYTES`].
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
    /// For layouts of several files.
    Directory(&'a mut OutputDir),
    /// For layouts of one file, see [`Layout::is_one_file`](crate::Layout::is_one_file).
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
        Destination::Directory(output) if !checkpoint.layout().is_one_file() => {
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
        Destination::File(output) if checkpoint.layout().is_one_file() => {
            for shard in checkpoint.files() {
                let file = output.growing()?;
                // Inside of rayon's threads at once, rather than on the way to them for each window.
                let source = rayon::scope(|_| write_shard(shard, patch, file, observer))?;
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

/// A range of one file, and what becomes of it.
struct Segment<'a> {
    stored: &'a [u8],
    becomes: Becomes<'a>,
}

enum Becomes<'a> {
    /// Itself.
    Copied,
    /// A chunk of a chosen tensor, of another length where its element type is another.
    Patched {
        tensor: TensorView<'a>,
        elements: Range<usize>,
        length: usize,
    },
    /// Something else that is known already: what stands around tensors whose lengths change.
    Replaced(Vec<u8>),
}

impl<'a> Segment<'a> {
    /// `bytes` as they are, in pieces.
    fn copied(bytes: &'a [u8]) -> impl Iterator<Item = Self> {
        bytes.chunks(CHUNK_BYTES).map(|stored| Self {
            stored,
            becomes: Becomes::Copied,
        })
    }

    /// The length of what becomes of it.
    fn length(&self) -> usize {
        match &self.becomes {
            Becomes::Copied => self.stored.len(),
            Becomes::Patched { length, .. } => *length,
            Becomes::Replaced(bytes) => bytes.len(),
        }
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
    let windows = windows(&segments);
    let capacity = windows.iter().map(|window| window.bytes).max().unwrap_or(0);
    let mut reports = Vec::new();
    // Up to the first chunk that is patched, the digest of the copy is that of the source.
    let mut source: Option<Hasher> = None;
    let mut hashing: Option<(&Window<'_, '_>, Block)> = None;
    for window in windows.iter().map(Some).chain([None]) {
        if observer.interrupted() {
            return Err(WriteError::Interrupted);
        }
        let mut block = window
            .map(|window| output.block(window.bytes, capacity))
            .transpose()?;
        if let Some((window, _)) = &hashing
            && source.is_none()
            && window.is_patched()
        {
            source = Some(output.hasher().clone());
        }
        // Whoever is without work takes what was offered first, so the two that cannot be divided are begun first.
        let ((_, patched), _) = rayon::join(
            || {
                rayon::join(
                    || hashing.as_ref().map(|(_, block)| output.hash_block(block)),
                    || {
                        let (window, block) = window.zip(block.as_mut())?;
                        Some(window.fill(block, patch, observer))
                    },
                )
            },
            || {
                hashing
                    .as_ref()
                    .map(|(window, _)| window.hash(source.as_mut()))
            },
        );
        if let Some((window, block)) = hashing.take() {
            output.write_block(block)?;
            observer.advanced(window.bytes as u64);
        }
        for (segment, report) in window
            .into_iter()
            .flat_map(|it| it.segments)
            .zip(patched.into_iter().flatten())
        {
            // The failure of earlier bytes first, so that what is reported does not depend on timing.
            let report = match report {
                Err(error) => return Err(output.settle().err().map_or(error, Into::into)),
                Ok(report) => report,
            };
            if let Becomes::Patched { tensor, .. } = &segment.becomes
                && let Some(report) = report
            {
                reports.push((tensor.name, report));
            }
        }
        hashing = window.zip(block);
    }
    let source = source.unwrap_or_else(|| output.hasher().clone());
    Ok(Source {
        sha256: source.finish(),
        reports,
    })
}

/// Cuts a file into segments of at most [`CHUNK_BYTES`], in order.
fn segments<'a, P: Patch>(
    file: &'a WeightsFile,
    patch: &P,
) -> Result<Vec<Segment<'a>>, WriteError<P::Error>> {
    let retyped = file
        .tensors()
        .find(|tensor| patch.targets(tensor) && patch.dtype(tensor) != tensor.dtype);
    match (file, retyped) {
        (_, None) => {}
        (WeightsFile::Gguf(file), Some(_)) => return laid_out_anew(file, patch),
        (WeightsFile::Safetensors(_), Some(tensor)) => {
            return Err(WriteError::NotPatchable {
                tensor: tensor.name.to_owned(),
                dtype: patch.dtype(&tensor),
            });
        }
    }
    let all = file.file_bytes();
    let mut segments = Vec::new();
    let mut copied = 0;
    for (position, tensor) in file.placed_tensors() {
        if patch.targets(&tensor) {
            segments.extend(Segment::copied(&all[copied..position]));
            segments.extend(patched(tensor, patch)?);
            copied = position + tensor.bytes.len();
        }
    }
    segments.extend(Segment::copied(&all[copied..]));
    Ok(segments)
}

/// As [`segments`], of a GGUF file in which tensors get other types: its header is written anew, and so is all padding.
fn laid_out_anew<'a, P: Patch>(
    file: &'a GgufFile,
    patch: &P,
) -> Result<Vec<Segment<'a>>, WriteError<P::Error>> {
    let all = file.file_bytes();
    let infos = file.tensors().map(|tensor| match tensor.view() {
        Some(view) if patch.targets(&view) => {
            TensorInfo::new(view.name, patch.dtype(&view), view.shape)
        }
        _ => TensorInfo::raw(
            tensor.name,
            tensor.type_number,
            tensor.shape,
            tensor.bytes.len(),
        ),
    });
    let infos: Vec<TensorInfo> = infos.collect::<Result<_, _>>()?;
    let layout = GgufLayout::new(file.metadata(), &infos)?;
    let replaced = |stored: &'a [u8], by: &[u8]| Segment {
        stored,
        becomes: Becomes::Replaced(by.to_vec()),
    };
    let mut segments = vec![replaced(file.header_bytes(), layout.header())];
    let mut ends = file.header_bytes().len();
    for (index, tensor) in file.tensors().enumerate() {
        let padding = match index.checked_sub(1) {
            Some(before) => layout.padding(before),
            None => 0,
        };
        segments.push(replaced(&all[ends..tensor.offset], &vec![0; padding]));
        match tensor.view() {
            Some(view) if patch.targets(&view) => segments.extend(patched(view, patch)?),
            _ => segments.extend(Segment::copied(tensor.bytes)),
        }
        ends = tensor.offset + tensor.bytes.len();
    }
    let padding = infos.len().checked_sub(1).map(|last| layout.padding(last));
    segments.push(replaced(&all[ends..], &vec![0; padding.unwrap_or(0)]));
    Ok(segments)
}

/// The chunks of a chosen tensor.
fn patched<'a, P: Patch>(
    tensor: TensorView<'a>,
    patch: &P,
) -> Result<impl Iterator<Item = Segment<'a>>, WriteError<P::Error>> {
    let dtype = patch.dtype(&tensor);
    for dtype in [tensor.dtype, dtype] {
        if !dtype.is_patchable() {
            return Err(WriteError::NotPatchable {
                tensor: tensor.name.to_owned(),
                dtype,
            });
        }
    }
    let [stored, becomes] =
        [tensor.dtype, dtype].map(|dtype| dtype.bytes_of(CHUNK_ALIGNMENT).unwrap_or(1));
    let chunk = CHUNK_BYTES / stored.max(becomes) * stored;
    let becomes = dtype.block();
    let mut first = 0;
    Ok(tensor.bytes.chunks(chunk).map(move |stored| {
        let block = tensor.dtype.block();
        let elements = first..first + stored.len() / block.bytes * block.elements;
        first = elements.end;
        Segment {
            stored,
            becomes: Becomes::Patched {
                length: elements.len() / becomes.elements * becomes.bytes,
                tensor,
                elements,
            },
        }
    }))
}

/// Neighboring segments that are patched, hashed and written together.
struct Window<'a, 's> {
    segments: &'s [Segment<'a>],
    /// Of all of them.
    bytes: usize,
}

/// Cuts segments into windows of at most [`WINDOW_BYTES`].
fn windows<'a, 's>(segments: &'s [Segment<'a>]) -> Vec<Window<'a, 's>> {
    let mut windows = Vec::new();
    let mut rest = segments;
    while !rest.is_empty() {
        let (mut count, mut bytes) = (0, 0);
        for segment in rest {
            let longer = bytes + segment.length();
            if count > 0 && longer > WINDOW_BYTES {
                break;
            }
            (count, bytes) = (count + 1, longer);
        }
        let (segments, later) = rest.split_at(count);
        windows.push(Window { segments, bytes });
        rest = later;
    }
    windows
}

/// A chunk's report; nothing for a copied segment.
type FilledSegment<P> = Result<Option<<P as Patch>::Report>, WriteError<<P as Patch>::Error>>;

impl Window<'_, '_> {
    fn is_patched(&self) -> bool {
        let mut segments = self.segments.iter();
        segments.any(|segment| !matches!(segment.becomes, Becomes::Copied))
    }

    /// Hashes what the window was before it was patched, where that is not what the copy's own digest is of.
    fn hash(&self, source: Option<&mut Hasher>) {
        if let Some(hasher) = source {
            for segment in self.segments {
                hasher.update(segment.stored);
            }
        }
    }

    /// Makes `block` what the window becomes. One result for each segment.
    fn fill<P: Patch>(
        &self,
        block: &mut Block,
        patch: &P,
        observer: &impl Observer,
    ) -> Vec<FilledSegment<P>> {
        let mut rest = block.bytes_mut();
        let mut slots = Vec::with_capacity(self.segments.len());
        for segment in self.segments {
            let (slot, later) = rest.split_at_mut(segment.length());
            slots.push((segment, slot));
            rest = later;
        }
        slots
            .into_par_iter()
            .with_max_len(1)
            .map(|(segment, slot)| {
                let known = match &segment.becomes {
                    Becomes::Replaced(bytes) => bytes,
                    _ => segment.stored,
                };
                if known.len() == slot.len() {
                    slot.copy_from_slice(known);
                }
                let Becomes::Patched {
                    tensor, elements, ..
                } = &segment.becomes
                else {
                    return Ok(None);
                };
                if observer.interrupted() {
                    return Err(WriteError::Interrupted);
                }
                patch
                    .patch(tensor, elements.clone(), slot)
                    .map(Some)
                    .map_err(|source| WriteError::Patch {
                        tensor: tensor.name.to_owned(),
                        source,
                    })
            })
            .collect()
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

/// Elements in whole blocks of every element type: chunks of quantized tensors are multiples of so many.
const CHUNK_ALIGNMENT: usize = 256;

/// Bytes patched, hashed or written at once, each while the other two happen to neighbors: so many that threads seldom wait for
/// each other.
const WINDOW_BYTES: usize = 2 * CHUNK_BYTES;

/// Files written at the same time: what one waits for, a hash or the disk, the other makes use of.
const FILES_AT_ONCE: usize = 2;

/// Bytes of a side file read at once.
const SIDE_PIECE: usize = 1 << 20;

/// Why a copy was not written. `E` is the patch's own error.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum WriteError<E: std::error::Error + 'static> {
    /// A GGUF file that cannot be written with other types.
    #[error(transparent)]
    Layout(#[from] GgufWriteError),
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
