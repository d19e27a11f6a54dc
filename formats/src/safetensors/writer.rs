//! Writes a safetensors file of four-byte numbers: the same metadata and tensors give the same bytes.

use std::collections::BTreeMap;
use std::ops::Range;

use serde_json::{Value, json};

use crate::atomic::OutputError;
use crate::dtype::Dtype;

/// A tensor to be stored.
pub(crate) trait Stored {
    /// Its element type, of four bytes.
    fn dtype(&self) -> Dtype;
    /// Its shape.
    fn shape(&self) -> &[usize];
    /// How many numbers it has.
    fn numbers(&self) -> usize;
    /// Appends the little-endian bytes of the numbers in `range`.
    fn append_to(&self, range: Range<usize>, bytes: &mut Vec<u8>);
}

/// Hands the file to `write` piece by piece: one pair of metadata, and the tensors in the order of their names.
///
/// # Errors
/// Those of `write`.
pub(crate) fn write_tensors(
    metadata: (&str, &str),
    tensors: &BTreeMap<String, impl Stored>,
    mut write: impl FnMut(&[u8]) -> Result<(), OutputError>,
) -> Result<(), OutputError> {
    write(&header(metadata, tensors))?;
    let mut bytes = Vec::with_capacity(4 * BLOCK);
    for tensor in tensors.values() {
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
fn header((key, value): (&str, &str), tensors: &BTreeMap<String, impl Stored>) -> Vec<u8> {
    let text = |text: &str| Value::from(text).to_string();
    let mut json = format!("{{\"__metadata__\":{{{}:{}}}", text(key), text(value));
    let mut begin = 0;
    for (name, tensor) in tensors {
        let end = begin + 4 * tensor.numbers();
        json.push_str(&format!(
            ",{}:{{\"dtype\":\"{}\",\"shape\":{},\"data_offsets\":[{begin},{end}]}}",
            text(name),
            tensor.dtype(),
            json!(tensor.shape()),
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
