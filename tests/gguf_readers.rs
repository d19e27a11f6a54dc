//! A second opinion on the GGUF reader: candle's.
//!
//! In: files of `testdata/gguf`, which gguf-py wrote. Out: agreement on keys and values with their types, and on the tensors' names,
//! types, shapes, offsets and numbers. `types.gguf` is left out, since candle 0.11 refuses a file with any type that it does not know.
//! It tells no type of an array without elements, so `formats/tests/gguf.rs` alone holds these to theirs.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{Content, Value as Theirs};
use candle_core::{Device, Result};
use panacea_formats::gguf::{Array, GgufFile, Value};

#[test]
fn candle_reads_the_same_keys_and_values() -> Result<()> {
    for name in READABLE {
        let (ours, theirs, _) = both(name)?;
        let keys: BTreeSet<&str> = ours.metadata().iter().map(|(key, _)| key).collect();
        let wanted: BTreeSet<&str> = theirs.metadata.keys().map(String::as_str).collect();
        assert_eq!(keys, wanted, "{name}");
        for (key, value) in ours.metadata().iter() {
            assert!(
                same(value, &theirs.metadata[key]),
                "{name}: {key}: {value:?}"
            );
        }
    }
    Ok(())
}

#[test]
fn candle_reads_the_same_tensors() -> Result<()> {
    let mut tensors = 0;
    for name in READABLE {
        let (ours, theirs, mut file) = both(name)?;
        assert_eq!(ours.tensors().len(), theirs.tensor_infos.len(), "{name}");
        for tensor in ours.tensors() {
            let info = &theirs.tensor_infos[tensor.name];
            assert_eq!(info.shape.dims(), tensor.shape, "{name}: {}", tensor.name);
            let offset = theirs.tensor_data_offset + info.offset;
            assert_eq!(offset, tensor.offset as u64, "{name}: {}", tensor.name);
            let view = tensor.view().expect("a known type");
            assert_eq!(
                format!("{:?}", info.ggml_dtype).to_uppercase(),
                view.dtype.name()
            );
            let read = theirs.tensor(&mut file, tensor.name, &Device::Cpu)?;
            let wanted: Vec<f32> = read.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1()?;
            let mut found = vec![f32::NAN; view.elements()];
            view.widen_into(0..found.len(), &mut found)
                .expect("a readable type");
            assert_eq!(found, wanted, "{name}: {}", tensor.name);
            tensors += 1;
        }
    }
    // A lower bound shows that there was something to compare.
    assert!(tensors >= 8 + 5 + 5 + 3, "{tensors}");
    Ok(())
}

/// The files in which candle knows every type.
const READABLE: &[&str] = &[
    "values.gguf",
    "arrays.gguf",
    "aligned-64.gguf",
    "version-2.gguf",
    "split-00001-of-00002.gguf",
    "split-00002-of-00002.gguf",
];

/// The file `name`, as it is read here and there, and open.
fn both(name: &str) -> Result<(GgufFile, Content, File)> {
    let path: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("testdata/gguf")
        .join(name);
    let ours = GgufFile::open(&path).expect("a sound file");
    let mut file = File::open(&path)?;
    let theirs = Content::read(&mut file)?;
    Ok((ours, theirs, file))
}

/// Whether both have the same type and value; numbers to the bit.
fn same(ours: &Value, theirs: &Theirs) -> bool {
    match (ours, theirs) {
        (Value::U8(a), Theirs::U8(b)) => a == b,
        (Value::I8(a), Theirs::I8(b)) => a == b,
        (Value::U16(a), Theirs::U16(b)) => a == b,
        (Value::I16(a), Theirs::I16(b)) => a == b,
        (Value::U32(a), Theirs::U32(b)) => a == b,
        (Value::I32(a), Theirs::I32(b)) => a == b,
        (Value::U64(a), Theirs::U64(b)) => a == b,
        (Value::I64(a), Theirs::I64(b)) => a == b,
        (Value::F32(a), Theirs::F32(b)) => a.to_bits() == b.to_bits(),
        (Value::F64(a), Theirs::F64(b)) => a.to_bits() == b.to_bits(),
        (Value::Bool(a), Theirs::Bool(b)) => a == b,
        (Value::Text(a), Theirs::String(b)) => a == b,
        (Value::Array(a), Theirs::Array(b)) => {
            let a = elements(a);
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b))
        }
        _ => false,
    }
}

/// Each element as a value of its own, as candle has them.
fn elements(array: &Array) -> Vec<Value> {
    match array {
        Array::U8(it) => it.iter().copied().map(Value::U8).collect(),
        Array::I8(it) => it.iter().copied().map(Value::I8).collect(),
        Array::U16(it) => it.iter().copied().map(Value::U16).collect(),
        Array::I16(it) => it.iter().copied().map(Value::I16).collect(),
        Array::U32(it) => it.iter().copied().map(Value::U32).collect(),
        Array::I32(it) => it.iter().copied().map(Value::I32).collect(),
        Array::U64(it) => it.iter().copied().map(Value::U64).collect(),
        Array::I64(it) => it.iter().copied().map(Value::I64).collect(),
        Array::F32(it) => it.iter().copied().map(Value::F32).collect(),
        Array::F64(it) => it.iter().copied().map(Value::F64).collect(),
        Array::Bool(it) => it.iter().copied().map(Value::Bool).collect(),
        Array::Text(it) => it.iter().cloned().map(Value::Text).collect(),
        Array::Array(it) => it.iter().cloned().map(Value::Array).collect(),
    }
}
