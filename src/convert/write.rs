//! Tensors on their way from one file to the other: rows are read, put in order, changed, rounded and written.
//!
//! In: a list of [`Planned`] tensors, each of which knows where its values come from. Out: their bytes, one after the other. Chunks of
//! rows are made in parallel while those before are written; memory is two windows of chunks, whatever the size of a tensor. Bytes
//! do not depend on the number of threads.

use std::ops::Range;

use half::f16;
use panacea_formats::{Checkpoint, Dtype, Observer, OutputError, TensorView, narrow};
use rayon::prelude::*;

use super::ConvertError;
use super::conversion::PlannedFile;
use super::names::{row_in_gguf, row_in_source};

/// A tensor of the output.
#[derive(Debug)]
pub(super) struct Planned<'c> {
    pub(super) name: String,
    pub(super) dtype: Dtype,
    /// Outermost dimension first.
    pub(super) shape: Vec<usize>,
    pub(super) content: Content<'c>,
}

/// Where values come from.
#[derive(Debug)]
pub(super) enum Content<'c> {
    /// They were computed.
    Made(Vec<f32>),
    /// They are stored in `parts`, which have the same number of rows and follow one another.
    Stored {
        parts: Vec<TensorView<'c>>,
        order: RowOrder,
        /// What is added to each.
        offset: f32,
    },
}

/// How rows follow one another, as against the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RowOrder {
    /// As there.
    Same,
    /// As GGUF has the rows of heads of so many.
    Interleaved(usize),
    /// As Hugging Face's file has them.
    Halved(usize),
}

impl RowOrder {
    /// The row of the source that becomes row `row`.
    pub(super) fn origin(self, row: usize) -> usize {
        match self {
            Self::Same => row,
            Self::Interleaved(head) => row_in_source(row, head),
            Self::Halved(head) => row_in_gguf(row, head),
        }
    }
}

impl Planned<'_> {
    /// Elements of a row, the least that is made at once. A vector has as many rows as elements.
    pub(super) fn columns(&self) -> usize {
        match self.shape.as_slice() {
            [] | [_] => 1,
            [.., columns] => *columns,
        }
    }

    pub(super) fn rows(&self) -> usize {
        match self.shape.as_slice() {
            [rows] => *rows,
            [] => 1,
            [outer @ .., _] => outer.iter().product(),
        }
    }

    /// How long it is; rows are whole blocks.
    pub(super) fn bytes(&self) -> usize {
        self.rows() * self.row_bytes()
    }

    fn row_bytes(&self) -> usize {
        // Types are chosen so that rows are whole blocks.
        self.dtype.bytes_of(self.columns()).unwrap_or(0)
    }

    /// Makes `rows`, in as many bytes `out`.
    fn fill(&self, rows: Range<usize>, out: &mut [u8]) -> Result<(), ConvertError> {
        let columns = self.columns();
        let start = rows.start * columns;
        match &self.content {
            Content::Made(values) => {
                let values = &values[start..rows.end * columns];
                narrow(self.dtype, values, out);
            }
            Content::Stored {
                parts,
                order,
                offset,
            } => {
                let each = self.rows() / parts.len().max(1);
                let stored = parts.first().map(|part| part.dtype);
                let is_copy = stored == Some(self.dtype) && *offset == 0.0;
                let row_bytes = self.row_bytes();
                let mut values = match is_copy {
                    true => Vec::new(),
                    false => vec![0.0; rows.len() * columns],
                };
                for (from, run) in runs(*order, each, rows) {
                    let part = &parts[run.start / each];
                    let first = order.origin(run.start % each);
                    if is_copy {
                        let stored = &part.bytes[first * row_bytes..][..run.len() * row_bytes];
                        out[from * row_bytes..][..stored.len()].copy_from_slice(stored);
                    } else {
                        let elements = first * columns..(first + run.len()) * columns;
                        let values = &mut values[from * columns..][..elements.len()];
                        part.widen_into(elements, values).map_err(|source| {
                            ConvertError::Unreadable {
                                tensor: part.name.to_owned(),
                                source,
                            }
                        })?;
                    }
                }
                if !is_copy {
                    add(*offset, stored, &mut values);
                    self.refuse_what_overflows(start, &values)?;
                    narrow(self.dtype, &values, out);
                }
            }
        }
        Ok(())
    }

    /// Refuses values that the type cannot hold: of quantized ones those that are not finite, of F16 those above its largest.
    fn refuse_what_overflows(&self, start: usize, values: &[f32]) -> Result<(), ConvertError> {
        let too_large = |value: &f32| match self.dtype {
            Dtype::F16 => value.is_finite() && value.abs() >= F16_OVERFLOW,
            dtype => dtype.is_quantized() && !value.is_finite(),
        };
        match values.iter().position(too_large) {
            None => Ok(()),
            Some(at) => Err(ConvertError::NotHeld {
                tensor: self.name.clone(),
                element: start + at,
                value: values[at],
                dtype: self.dtype,
            }),
        }
    }
}

/// What F16 rounds to infinity: halfway between its largest value and the next that there would be.
const F16_OVERFLOW: f32 = 65_520.0;

/// Adds `offset` in the precision of the stored type where that is F16, as PyTorch does, and in f32 otherwise.
fn add(offset: f32, stored: Option<Dtype>, values: &mut [f32]) {
    if offset == 0.0 {
        return;
    }
    for value in values {
        *value += offset;
        if stored == Some(Dtype::F16) {
            *value = f16::from_f32(*value).to_f32();
        }
    }
}

/// Cuts `rows`, of parts of `each`, into runs that lie one after the other in the source as well, each with how many rows of `rows` are
/// before it.
fn runs(
    order: RowOrder,
    each: usize,
    rows: Range<usize>,
) -> impl Iterator<Item = (usize, Range<usize>)> {
    let (start, end) = (rows.start, rows.end);
    let mut at = start;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let until = match order {
            RowOrder::Same => ((at / each + 1) * each).min(end),
            _ => at + 1,
        };
        let run = (at - start, at..until);
        at = until;
        Some(run)
    })
}

/// Rows of a tensor that are made at once.
struct Chunk<'p, 'c> {
    tensor: &'p Planned<'c>,
    rows: Range<usize>,
    /// Zeros before them.
    padding: usize,
}

impl Chunk<'_, '_> {
    fn make(&self) -> Result<Vec<u8>, ConvertError> {
        let mut bytes = vec![0; self.padding + self.rows.len() * self.tensor.row_bytes()];
        let rows = &mut bytes[self.padding..];
        self.tensor.fill(self.rows.clone(), rows)?;
        Ok(bytes)
    }
}

/// Cuts the tensors of a file into chunks.
fn chunks<'p, 'c>(file: &'p PlannedFile<'c>) -> Vec<Chunk<'p, 'c>> {
    let mut chunks = Vec::new();
    let mut end = file.header.len();
    for (tensor, &place) in file.tensors.iter().zip(&file.places) {
        let mut padding = place - end;
        end = place + tensor.bytes();
        let at_once = (CHUNK_ELEMENTS / tensor.columns().max(1)).max(1);
        for first in (0..tensor.rows()).step_by(at_once) {
            chunks.push(Chunk {
                tensor,
                rows: first..tensor.rows().min(first + at_once),
                padding,
            });
            padding = 0;
        }
    }
    chunks
}

/// Hands what follows the header of `file` to `write`: its tensors, with zeros between them and at the end. The pages of `source` are
/// given back as the work goes on.
///
/// # Errors
/// The first in the order of the bytes.
pub(super) fn stream(
    file: &PlannedFile<'_>,
    source: &Checkpoint,
    observer: &impl Observer,
    write: &mut (dyn FnMut(&[u8]) -> Result<(), OutputError> + Send),
) -> Result<(), ConvertError> {
    let chunks = chunks(file);
    let mut made: Vec<Result<Vec<u8>, ConvertError>> = Vec::new();
    let mut read = 0;
    let mut written = file.header.len();
    for window in chunks.chunks(WINDOW).map(Some).chain([None]) {
        if observer.interrupted() {
            return Err(ConvertError::Interrupted);
        }
        let before = std::mem::take(&mut made);
        let (next, result) = rayon::join(
            || {
                let window = window.unwrap_or_default();
                window.par_iter().with_max_len(1).map(Chunk::make).collect()
            },
            || {
                for bytes in before {
                    let bytes = bytes?;
                    write(&bytes)?;
                    written += bytes.len();
                    observer.advanced(bytes.len() as u64);
                }
                Ok::<(), ConvertError>(())
            },
        );
        result?;
        made = next;
        read += window.map_or(0, <[_]>::len);
        if read >= CHUNKS_HELD {
            read = 0;
            source.release();
        }
    }
    write(&vec![0; file.length - written])?;
    Ok(())
}

/// Elements of a chunk, if a row is no longer: 1 MiB in f32, and in most other types less.
const CHUNK_ELEMENTS: usize = 1 << 18;

/// Chunks made at once: enough for the threads of a large machine, and 16 MiB in f32.
const WINDOW: usize = 16;

/// Bytes that a conversion holds at most for tensors with rows of at most 2^18 elements: the chunks of two windows, and the values of
/// those being made.
pub const CONVERSION_BYTES: u64 = (3 * WINDOW * CHUNK_ELEMENTS * size_of::<f32>()) as u64;

/// Chunks after which the pages of the source are given back.
const CHUNKS_HELD: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    fn floats(bytes: &[u8]) -> Vec<f32> {
        let floats = bytes.as_chunks().0.iter();
        floats.map(|&bytes| f32::from_le_bytes(bytes)).collect()
    }

    fn stored(dtype: Dtype, values: &[f32]) -> Vec<u8> {
        let mut bytes = vec![0; dtype.bytes_of(values.len()).expect("whole blocks")];
        narrow(dtype, values, &mut bytes);
        bytes
    }

    #[expect(clippy::cast_precision_loss, reason = "small numbers")]
    fn counted(count: usize) -> Vec<f32> {
        (0..count).map(|i| i as f32).collect()
    }

    #[test]
    fn rows_are_interleaved_and_put_back_in_any_chunks() {
        let bytes = stored(Dtype::BF16, &counted(24));
        let shape = [12, 2];
        let part = TensorView {
            name: "q",
            dtype: Dtype::BF16,
            shape: &shape,
            bytes: &bytes,
        };
        let planned = |order, dtype| Planned {
            name: "q".to_owned(),
            dtype,
            shape: shape.to_vec(),
            content: Content::Stored {
                parts: vec![part],
                order,
                offset: 0.0,
            },
        };
        let there = planned(RowOrder::Interleaved(6), Dtype::F32);
        let mut all = vec![0; 96];
        there.fill(0..12, &mut all).expect("rows");
        assert_eq!(floats(&all)[..8], [0.0, 1.0, 6.0, 7.0, 2.0, 3.0, 8.0, 9.0]);
        for cut in 1..12 {
            let mut halves = vec![0; 96];
            there.fill(0..cut, &mut halves[..8 * cut]).expect("rows");
            there.fill(cut..12, &mut halves[8 * cut..]).expect("rows");
            assert_eq!(halves, all);
        }
        let copied = planned(RowOrder::Interleaved(6), Dtype::BF16);
        let mut rows = vec![0; 48];
        copied.fill(0..12, &mut rows).expect("rows");
        assert_eq!(rows, stored(Dtype::BF16, &floats(&all)));
        let back = Planned {
            content: Content::Stored {
                parts: vec![TensorView {
                    bytes: &rows,
                    ..part
                }],
                order: RowOrder::Halved(6),
                offset: 0.0,
            },
            ..copied
        };
        let mut again = vec![0; 48];
        back.fill(0..12, &mut again).expect("rows");
        assert_eq!(again, bytes);
    }

    #[test]
    fn stacked_parts_follow_one_another() {
        let parts = [0.0, 10.0, 20.0].map(|first| {
            let values: Vec<f32> = counted(4).iter().map(|it| it + first).collect();
            stored(Dtype::F16, &values)
        });
        let shape = [2, 2];
        let view = |bytes| TensorView {
            name: "e",
            dtype: Dtype::F16,
            shape: &shape,
            bytes,
        };
        let stack = Planned {
            name: "stack".to_owned(),
            dtype: Dtype::F32,
            shape: vec![3, 2, 2],
            content: Content::Stored {
                parts: parts.iter().map(|bytes| view(bytes.as_slice())).collect(),
                order: RowOrder::Same,
                offset: 0.0,
            },
        };
        assert_eq!((stack.rows(), stack.columns(), stack.bytes()), (6, 2, 48));
        let mut out = vec![0; 32];
        stack.fill(1..5, &mut out).expect("rows");
        assert_eq!(floats(&out), [2.0, 3.0, 10.0, 11.0, 12.0, 13.0, 20.0, 21.0]);
    }

    #[test]
    fn one_is_added_in_the_precision_of_the_source() {
        let value = 2f32.powi(-12);
        let shape = [1];
        for (dtype, wanted) in [
            (Dtype::BF16, 1.0 + value),
            (Dtype::F16, 1.0),
            (Dtype::F32, 1.0 + value),
        ] {
            let bytes = stored(dtype, &[value]);
            let part = TensorView {
                name: "norm",
                dtype,
                shape: &shape,
                bytes: &bytes,
            };
            let norm = Planned {
                name: "norm".to_owned(),
                dtype: Dtype::F32,
                shape: vec![1],
                content: Content::Stored {
                    parts: vec![part],
                    order: RowOrder::Same,
                    offset: 1.0,
                },
            };
            let mut out = vec![0; 4];
            norm.fill(0..1, &mut out).expect("a row");
            assert_eq!(floats(&out), [wanted], "{dtype}");
        }
    }

    #[test]
    fn what_a_type_cannot_hold_is_refused_with_its_place() {
        let mut values = vec![0.0; 64];
        values[40] = 70_000.0;
        let bytes = stored(Dtype::F32, &values);
        let shape = [2, 32];
        let planned = |dtype, bytes| Planned {
            name: "w".to_owned(),
            dtype,
            shape: shape.to_vec(),
            content: Content::Stored {
                parts: vec![TensorView {
                    name: "w",
                    dtype: Dtype::F32,
                    shape: &shape,
                    bytes,
                }],
                order: RowOrder::Same,
                offset: 0.0,
            },
        };
        let error = planned(Dtype::F16, &bytes).fill(1..2, &mut [0; 64]);
        let error = error.expect_err("too large").to_string();
        assert_eq!(
            error,
            "element 40 of tensor `w` is 70000, which F16 cannot hold"
        );
        planned(Dtype::BF16, &bytes)
            .fill(1..2, &mut [0; 64])
            .expect("held");
        values[3] = f32::NAN;
        let bytes = stored(Dtype::F32, &values);
        let error = planned(Dtype::Q8_0, &bytes).fill(0..1, &mut [0; 34]);
        let error = error.expect_err("not finite").to_string();
        assert_eq!(
            error,
            "element 3 of tensor `w` is NaN, which Q8_0 cannot hold"
        );
        planned(Dtype::F16, &bytes)
            .fill(0..1, &mut [0; 64])
            .expect("a NaN stays one");
    }
}
