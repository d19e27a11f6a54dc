//! The header of a GGUF file.

use panacea_formats::Dtype;
use panacea_formats::gguf::{Array, Metadata, Value};

/// The bytes before the tensors, padding included, and where each tensor begins behind them.
pub(super) fn header(
    metadata: &Metadata,
    tensors: &[(&str, Dtype, &[usize], usize)],
) -> (Vec<u8>, Vec<usize>) {
    let mut out = b"GGUF".to_vec();
    out.extend(3_u32.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.iter().len() as u64).to_le_bytes());
    for (key, value) in metadata.iter() {
        text(key, &mut out);
        put(value, &mut out);
    }
    let mut offsets = Vec::new();
    let mut at = 0_usize;
    for (name, dtype, shape, bytes) in tensors {
        text(name, &mut out);
        out.extend(u32::try_from(shape.len()).unwrap_or(0).to_le_bytes());
        for dimension in shape.iter().rev() {
            out.extend((*dimension as u64).to_le_bytes());
        }
        out.extend(dtype.gguf_type().unwrap_or(0).to_le_bytes());
        out.extend((at as u64).to_le_bytes());
        offsets.push(at);
        at = (at + bytes).next_multiple_of(32);
    }
    out.resize(out.len().next_multiple_of(32), 0);
    (out, offsets)
}

fn text(text: &str, out: &mut Vec<u8>) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put(value: &Value, out: &mut Vec<u8>) {
    let mut kind = |number: u32| out.extend(number.to_le_bytes());
    match value {
        Value::U8(it) => {
            kind(0);
            out.push(*it);
        }
        Value::I8(it) => {
            kind(1);
            out.extend(it.to_le_bytes());
        }
        Value::U16(it) => {
            kind(2);
            out.extend(it.to_le_bytes());
        }
        Value::I16(it) => {
            kind(3);
            out.extend(it.to_le_bytes());
        }
        Value::U32(it) => {
            kind(4);
            out.extend(it.to_le_bytes());
        }
        Value::I32(it) => {
            kind(5);
            out.extend(it.to_le_bytes());
        }
        Value::F32(it) => {
            kind(6);
            out.extend(it.to_le_bytes());
        }
        Value::Bool(it) => {
            kind(7);
            out.push(u8::from(*it));
        }
        Value::Text(it) => {
            kind(8);
            text(it, out);
        }
        Value::Array(it) => {
            kind(9);
            array(it, out);
        }
        Value::U64(it) => {
            kind(10);
            out.extend(it.to_le_bytes());
        }
        Value::I64(it) => {
            kind(11);
            out.extend(it.to_le_bytes());
        }
        Value::F64(it) => {
            kind(12);
            out.extend(it.to_le_bytes());
        }
    }
}

fn array(array: &Array, out: &mut Vec<u8>) {
    macro_rules! numbers {
        ($kind:literal, $items:expr) => {{
            out.extend(u32::to_le_bytes($kind));
            out.extend(($items.len() as u64).to_le_bytes());
            for item in $items {
                out.extend(item.to_le_bytes());
            }
        }};
    }
    match array {
        Array::U32(it) => numbers!(4, it),
        Array::I32(it) => numbers!(5, it),
        Array::F32(it) => numbers!(6, it),
        Array::Text(it) => {
            out.extend(8_u32.to_le_bytes());
            out.extend((it.len() as u64).to_le_bytes());
            for item in it {
                text(item, out);
            }
        }
        _ => unimplemented!("to be replaced by the container's writer"),
    }
}
