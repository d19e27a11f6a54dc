//! Writes a safetensors file of four-byte numbers: the same metadata and tensors give the same bytes.

use std::ops::Range;

use serde_json::{Value, json};

use crate::atomic::OutputError;
use crate::dtype::Dtype;

/// A tensor to be stored.
pub trait Stored {
    /// Its element type, of four bytes.
    fn dtype(&self) -> Dtype;
    /// Its shape.
    fn shape(&self) -> &[usize];
    /// How many numbers it has.
    fn numbers(&self) -> usize;
    /// Appends the little-endian bytes of the numbers in `range`.
    fn append_to(&self, range: Range<usize>, bytes: &mut Vec<u8>);
}

/// Numbers in memory, as an `F32` tensor.
#[derive(Clone, Debug)]
pub struct StoredFloats<'a> {
    /// As many elements as there are values.
    pub shape: Vec<usize>,
    /// Row-major.
    pub values: &'a [f32],
}

impl Stored for StoredFloats<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn numbers(&self) -> usize {
        self.values.len()
    }

    fn append_to(&self, range: Range<usize>, bytes: &mut Vec<u8>) {
        let values = self.values[range].iter();
        bytes.extend(values.flat_map(|value| value.to_le_bytes()));
    }
}

/// Hands the file to `write` piece by piece: one pair of metadata, and the tensors in their order, each under a name of its own.
///
/// # Errors
/// Those of `write`.
pub fn write_tensors<'t, T: Stored + 't>(
    metadata: (&str, &str),
    tensors: impl Iterator<Item = (&'t String, &'t T)> + Clone,
    mut write: impl FnMut(&[u8]) -> Result<(), OutputError>,
) -> Result<(), OutputError> {
    write(&header(metadata, tensors.clone()))?;
    let mut bytes = Vec::with_capacity(4 * BLOCK);
    for (_, tensor) in tensors {
        let numbers = tensor.numbers();
        for start in (0..numbers).step_by(BLOCK) {
            bytes.clear();
            tensor.append_to(start..numbers.min(start + BLOCK), &mut bytes);
            write(&bytes)?;
        }
    }
    Ok(())
}

/// The header with its length before it: metadata first, then the tensors in order, then spaces up to a multiple of 8 bytes,
/// which keeps the values aligned for readers that care.
fn header<'t, T: Stored + 't>(
    metadata: (&str, &str),
    tensors: impl Iterator<Item = (&'t String, &'t T)>,
) -> Vec<u8> {
    let described = |(name, tensor): (&'t String, &'t T)| {
        let bytes = 4 * tensor.numbers();
        (name.as_str(), tensor.dtype(), tensor.shape(), bytes)
    };
    safetensors_header(metadata, tensors.map(described))
}

/// What stands before the bytes of `tensors`, each of which has a name of its own, an element type, a shape and a length in bytes, and
/// which follow one another: one pair of metadata, and the tensors in their order.
pub fn safetensors_header<'t>(
    (key, value): (&str, &str),
    tensors: impl Iterator<Item = (&'t str, Dtype, &'t [usize], usize)>,
) -> Vec<u8> {
    let text = |text: &str| Value::from(text).to_string();
    let mut json = format!("{{\"__metadata__\":{{{}:{}}}", text(key), text(value));
    let mut begin = 0;
    for (name, dtype, shape, bytes) in tensors {
        let end = begin + bytes;
        json.push_str(&format!(
            ",{}:{{\"dtype\":\"{dtype}\",\"shape\":{},\"data_offsets\":[{begin},{end}]}}",
            text(name),
            json!(shape),
        ));
        begin = end;
    }
    json.push('}');
    while json.len() % 8 != 0 {
        json.push(' ');
    }
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.extend_from_slice(json.as_bytes());
    header
}

/// Numbers written at once.
const BLOCK: usize = 1 << 18;
