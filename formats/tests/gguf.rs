//! GGUF files: what gguf-py wrote is read with every type and written again byte for byte, and anything that can be written is read
//! as it was.

#![expect(clippy::unwrap_used, reason = "a test may fail loudly")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use panacea_formats::gguf::{Array, GgufFile, GgufLayout, Metadata, TensorInfo, Value};
use panacea_formats::{Checkpoint, Dtype, Layout};
use proptest::prelude::*;

#[test]
fn files_of_gguf_py_are_written_again_byte_for_byte() {
    let mut files = 0;
    for entry in fs::read_dir(fixture("")).unwrap() {
        let path = entry.unwrap().path();
        let mut stored = fs::read(&path).unwrap();
        let file = GgufFile::open(&path).unwrap();
        assert_eq!(file.version(), u32::from(stored[4]));
        // Version 2 is written as 3, and nothing else differs.
        stored[4] = 3;
        assert!(rewritten(&file) == stored, "{}", path.display());
        files += 1;
    }
    assert_eq!(files, 7);
}

#[test]
fn values_of_gguf_py_have_their_types() {
    let file = GgufFile::open(&fixture("values.gguf")).unwrap();
    let array = Value::Array;
    let texts = |texts: &[&str]| texts.iter().map(|&it| it.to_owned()).collect();
    let expected = [
        ("general.architecture", Value::Text("llama".to_owned())),
        ("scalar.u8", Value::U8(200)),
        ("scalar.i8", Value::I8(-100)),
        ("scalar.u16", Value::U16(60_000)),
        ("scalar.i16", Value::I16(-30_000)),
        ("scalar.u32", Value::U32(4_000_000_000)),
        ("scalar.i32", Value::I32(-2_000_000_000)),
        ("scalar.f32", Value::F32(0.1)),
        ("scalar.true", Value::Bool(true)),
        ("scalar.false", Value::Bool(false)),
        (
            "scalar.text",
            Value::Text("caf\u{e9} \u{1f980}\0end".to_owned()),
        ),
        ("scalar.no-text", Value::Text(String::new())),
        ("scalar.u64", Value::U64(u64::MAX)),
        ("scalar.i64", Value::I64(i64::MIN)),
        ("scalar.f64", Value::F64(0.1)),
        ("array.u8", array(Array::U8(vec![0, u8::MAX]))),
        ("array.i8", array(Array::I8(vec![i8::MIN, i8::MAX]))),
        ("array.u16", array(Array::U16(vec![0, u16::MAX]))),
        ("array.i16", array(Array::I16(vec![i16::MIN, i16::MAX]))),
        ("array.u32", array(Array::U32(vec![0, u32::MAX]))),
        ("array.i32", array(Array::I32(vec![i32::MIN, i32::MAX]))),
        (
            "array.f32",
            array(Array::F32(vec![0.1, -0.0, f32::INFINITY])),
        ),
        ("array.bool", array(Array::Bool(vec![true, false, true]))),
        (
            "array.text",
            array(Array::Text(texts(&["", "a", "\u{4e2d}\u{6587}"]))),
        ),
        ("array.u64", array(Array::U64(vec![0, u64::MAX]))),
        ("array.i64", array(Array::I64(vec![i64::MIN, i64::MAX]))),
        (
            "array.f64",
            array(Array::F64(vec![0.1, -0.0, f64::NEG_INFINITY])),
        ),
    ];
    let found: Vec<(&str, Value)> = file
        .metadata()
        .iter()
        .map(|(key, value)| (key, value.clone()))
        .collect();
    assert_eq!(found, expected);
}

#[test]
fn arrays_keep_their_element_types_when_they_are_empty_and_when_they_are_nested() {
    let file = GgufFile::open(&fixture("arrays.gguf")).unwrap();
    let value = |key: &str| file.metadata().value(key).unwrap().as_array().unwrap();
    let empty = [
        ("uint8", Array::U8(vec![])),
        ("int8", Array::I8(vec![])),
        ("uint16", Array::U16(vec![])),
        ("int16", Array::I16(vec![])),
        ("uint32", Array::U32(vec![])),
        ("int32", Array::I32(vec![])),
        ("float32", Array::F32(vec![])),
        ("bool", Array::Bool(vec![])),
        ("string", Array::Text(vec![])),
        ("array", Array::Array(vec![])),
        ("uint64", Array::U64(vec![])),
        ("int64", Array::I64(vec![])),
        ("float64", Array::F64(vec![])),
    ];
    for (name, array) in &empty {
        assert_eq!(value(&format!("empty.{name}")), array);
    }
    let numbers = |numbers: &[i32]| Array::I32(numbers.to_vec());
    let floats = |floats: &[f32]| Array::F32(floats.to_vec());
    let nested = [
        (
            "numbers",
            vec![numbers(&[1, 2]), numbers(&[3]), numbers(&[-4, 5, 6])],
        ),
        (
            "texts",
            vec![
                Array::Text(vec!["a".to_owned(), String::new()]),
                Array::Text(vec!["b".to_owned()]),
            ],
        ),
        (
            "deep",
            vec![
                Array::Array(vec![floats(&[0.5])]),
                Array::Array(vec![floats(&[1.5, 2.5]), floats(&[3.5])]),
            ],
        ),
        (
            "empty",
            vec![Array::U16(vec![]), numbers(&[7]), Array::Array(vec![])],
        ),
    ];
    for (name, arrays) in nested {
        assert_eq!(value(&format!("nested.{name}")), &Array::Array(arrays));
    }
    assert_eq!(file.metadata().iter().len(), 1 + 13 + 4);
    assert_eq!(file.tensors().len(), 0);
}

#[test]
fn tensors_of_gguf_py_have_their_types_shapes_and_bytes() {
    let file = GgufFile::open(&fixture("values.gguf")).unwrap();
    let found: Vec<(&str, Dtype, &[usize])> = file
        .tensors()
        .map(|tensor| (tensor.name, tensor.dtype().unwrap(), tensor.shape))
        .collect();
    let cube: &[usize] = &[2, 3, 64];
    let expected: [(&str, Dtype, &[usize]); 8] = [
        ("matrix.f32", Dtype::F32, &[3, 5]),
        ("list.f16", Dtype::F16, &[7]),
        ("cube.bf16", Dtype::BF16, cube),
        ("cube.q4_0", Dtype::Q4_0, cube),
        ("cube.q4_1", Dtype::Q4_1, cube),
        ("cube.q5_0", Dtype::Q5_0, cube),
        ("cube.q5_1", Dtype::Q5_1, cube),
        ("cube.q8_0", Dtype::Q8_0, cube),
    ];
    assert_eq!(found, expected);
    for tensor in file.tensors() {
        let view = tensor.view().unwrap();
        let mut values = vec![0.0; view.elements()];
        view.widen_into(0..values.len(), &mut values).unwrap();
        let last = f32::from(u16::try_from(values.len() - 1).unwrap());
        for (index, value) in (0_u16..).zip(values) {
            // Of the types, 4 bits with 16 steps for at most 2 are the coarsest.
            let wanted = -1.0 + 2.0 * f32::from(index) / last;
            assert!((value - wanted).abs() < 0.13, "{}: {value}", tensor.name);
        }
    }
}

#[test]
fn a_tensor_of_an_unknown_type_is_carried_with_its_padding() {
    let file = GgufFile::open(&fixture("types.gguf")).unwrap();
    let strange = file.tensor("strange").unwrap();
    assert_eq!((strange.type_number, strange.shape), (1000, &[5][..]));
    assert!(strange.dtype().is_none() && strange.view().is_none());
    let written: Vec<u8> = (0..77).collect();
    assert_eq!(
        (&strange.bytes[..77], &strange.bytes[77..]),
        (&*written, &[0; 19][..])
    );
    let int16 = file.tensor("int16").unwrap();
    let numbers = (-3_i16..4).flat_map(i16::to_le_bytes);
    assert_eq!(int16.bytes, numbers.collect::<Vec<u8>>());
    // As one of several, it is no tensor of the checkpoint, because nothing can be done with it.
    let checkpoint = Checkpoint::open(&fixture("types.gguf")).unwrap();
    assert_eq!(checkpoint.tensors().count(), 8);
}

#[test]
fn tensors_are_aligned_as_the_file_says() {
    for (name, version) in [("aligned-64.gguf", 3), ("version-2.gguf", 2)] {
        let file = GgufFile::open(&fixture(name)).unwrap();
        assert_eq!((file.version(), file.alignment()), (version, 64));
        let lengths: Vec<usize> = file.tensors().map(|tensor| tensor.bytes.len()).collect();
        assert_eq!(lengths, [4, 60, 64, 68, 128]);
        assert!(file.tensors().all(|tensor| tensor.offset % 64 == 0));
        assert_eq!(file.header_bytes().len() % 64, 0);
    }
}

#[test]
fn a_split_of_gguf_py_is_one_checkpoint() {
    let checkpoint = Checkpoint::open(&fixture("split-00001-of-00002.gguf")).unwrap();
    assert_eq!(checkpoint.layout(), Layout::SplitGguf);
    let names: Vec<&str> = checkpoint.tensors().map(|tensor| tensor.name).collect();
    assert_eq!(names, ["a", "b", "c"]);
    let metadata = checkpoint.gguf_metadata().unwrap();
    let name = metadata.value("general.name").and_then(Value::as_text);
    assert_eq!(name, Some("in two parts"));
    let mut values = [0.0; 6];
    let last = checkpoint.tensor("c").unwrap();
    last.widen_into(0..6, &mut values).unwrap();
    assert_eq!((values[0], values[5]), (98.0, 100.0));
}

proptest! {
    #[test]
    fn what_is_written_is_read_as_it_was(metadata in metadata(), tensors in tensors()) {
        let infos: Vec<TensorInfo> = tensors.iter().map(Described::info).collect();
        let layout = GgufLayout::new(&metadata, &infos).unwrap();
        let bytes = file(&layout, tensors.iter().map(|it| it.bytes.as_slice()));
        let read = GgufFile::from_bytes(Path::new("written"), bytes.clone()).unwrap();
        prop_assert_eq!(read.version(), 3);
        prop_assert_eq!(read.metadata(), &metadata);
        prop_assert_eq!(read.tensors().len(), tensors.len());
        for (found, wanted) in read.tensors().zip(&tensors) {
            prop_assert_eq!(found.name, wanted.name.as_str());
            prop_assert_eq!(found.type_number, wanted.type_number);
            prop_assert_eq!(found.shape, wanted.shape.as_slice());
            prop_assert_eq!(&found.bytes[..wanted.bytes.len()], &*wanted.bytes);
            match found.dtype() {
                Some(_) => prop_assert_eq!(found.bytes.len(), wanted.bytes.len()),
                None => prop_assert!(found.bytes[wanted.bytes.len()..].iter().all(|&it| it == 0)),
            }
        }
        prop_assert!(rewritten(&read) == bytes);
    }
}

/// `file` as the writer makes it of what the reader found.
fn rewritten(read: &GgufFile) -> Vec<u8> {
    let infos: Vec<TensorInfo> = read
        .tensors()
        .map(|tensor| match tensor.dtype() {
            Some(dtype) => TensorInfo::new(tensor.name, dtype, tensor.shape).unwrap(),
            None => {
                let bytes = tensor.bytes.len();
                TensorInfo::raw(tensor.name, tensor.type_number, tensor.shape, bytes).unwrap()
            }
        })
        .collect();
    let layout = GgufLayout::new(read.metadata(), &infos).unwrap();
    file(&layout, read.tensors().map(|tensor| tensor.bytes))
}

fn file<'a>(layout: &GgufLayout, tensors: impl Iterator<Item = &'a [u8]>) -> Vec<u8> {
    let mut file = layout.header().to_vec();
    for (index, bytes) in tensors.enumerate() {
        assert_eq!(file.len(), layout.places()[index].start);
        file.extend(bytes);
        file.resize(file.len() + layout.padding(index), 0);
    }
    assert_eq!(file.len(), layout.length());
    file
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../testdata/gguf")
        .join(name)
}

/// Any keys, sometimes an alignment.
fn metadata() -> impl Strategy<Value = Metadata> {
    let pairs = prop::collection::vec((".{1,20}", value()), 0..8);
    let alignment = prop::option::of((0_u32..13).prop_map(|exponent| 1 << exponent));
    (pairs, alignment).prop_map(|(pairs, alignment)| {
        let mut metadata = Metadata::default();
        for (key, value) in pairs {
            metadata.set(key, value);
        }
        if let Some(alignment) = alignment {
            metadata.set("general.alignment", Value::U32(alignment));
        }
        metadata
    })
}

/// No NaN, which is not equal to itself.
fn value() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<u8>().prop_map(Value::U8),
        any::<i8>().prop_map(Value::I8),
        any::<u16>().prop_map(Value::U16),
        any::<i16>().prop_map(Value::I16),
        any::<u32>().prop_map(Value::U32),
        any::<i32>().prop_map(Value::I32),
        any::<f32>().prop_map(Value::F32),
        any::<bool>().prop_map(Value::Bool),
        ".{0,20}".prop_map(Value::Text),
        any::<u64>().prop_map(Value::U64),
        any::<i64>().prop_map(Value::I64),
        any::<f64>().prop_map(Value::F64),
        array().prop_map(Value::Array),
    ]
}

fn array() -> impl Strategy<Value = Array> {
    use prop::collection::vec;
    let flat = prop_oneof![
        vec(any::<u8>(), 0..9).prop_map(Array::U8),
        vec(any::<i8>(), 0..9).prop_map(Array::I8),
        vec(any::<u16>(), 0..9).prop_map(Array::U16),
        vec(any::<i16>(), 0..9).prop_map(Array::I16),
        vec(any::<u32>(), 0..9).prop_map(Array::U32),
        vec(any::<i32>(), 0..9).prop_map(Array::I32),
        vec(any::<f32>(), 0..9).prop_map(Array::F32),
        vec(any::<bool>(), 0..9).prop_map(Array::Bool),
        vec(".{0,9}", 0..9).prop_map(Array::Text),
        vec(any::<u64>(), 0..9).prop_map(Array::U64),
        vec(any::<i64>(), 0..9).prop_map(Array::I64),
        vec(any::<f64>(), 0..9).prop_map(Array::F64),
    ];
    // Seven around the innermost: eight in each other, the limit.
    flat.prop_recursive(7, 24, 4, |inner| vec(inner, 0..4).prop_map(Array::Array))
}

#[derive(Clone, Debug)]
struct Described {
    name: String,
    type_number: u32,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Described {
    fn info(&self) -> TensorInfo {
        match Dtype::of_gguf_type(self.type_number) {
            Some(dtype) => TensorInfo::new(&self.name, dtype, &self.shape),
            None => TensorInfo::raw(&self.name, self.type_number, &self.shape, self.bytes.len()),
        }
        .unwrap()
    }
}

/// Tensors of any type, known or not, of any number of dimensions.
fn tensors() -> impl Strategy<Value = Vec<Described>> {
    let one = (
        "[a-z.0-9\u{e9}]{0,30}",
        0_u32..48,
        prop::collection::vec(0_usize..4, 0..5),
        0_usize..100,
        any::<u8>(),
    );
    prop::collection::vec(one, 0..7).prop_map(|tensors| {
        let mut names = BTreeSet::new();
        let fresh = tensors
            .into_iter()
            .filter(|(name, ..)| names.insert(name.clone()));
        fresh
            .map(|(name, type_number, mut shape, unknown, fill)| {
                let length = match Dtype::of_gguf_type(type_number) {
                    None => unknown,
                    Some(dtype) => {
                        let block = dtype.block().elements;
                        match shape.last_mut() {
                            Some(row) => *row *= block,
                            None if block > 1 => shape.push(block),
                            None => {}
                        }
                        dtype.bytes_of(shape.iter().product()).unwrap()
                    }
                };
                Described {
                    name,
                    type_number,
                    shape,
                    bytes: vec![fill; length],
                }
            })
            .collect()
    })
}
