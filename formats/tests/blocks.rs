//! Quantized blocks against llama.cpp's: the vectors of `testdata/gen/blocks.py`, and what holds for any values and any bytes.

#![expect(clippy::unwrap_used, reason = "a test may fail loudly")]

use std::fs;
use std::path::Path;

use panacea_formats::{Dtype, dequantize, quantize};
use proptest::prelude::*;

const WRITTEN: [Dtype; 10] = [
    Dtype::Q4_0,
    Dtype::Q4_1,
    Dtype::Q5_0,
    Dtype::Q5_1,
    Dtype::Q8_0,
    Dtype::Q2_K,
    Dtype::Q3_K,
    Dtype::Q4_K,
    Dtype::Q5_K,
    Dtype::Q6_K,
];
const READ_ONLY: [Dtype; 2] = [Dtype::IQ4_NL, Dtype::MXFP4];

#[test]
fn values_are_written_as_llama_cpp_writes_them() {
    let values = floats("values.bin");
    for dtype in WRITTEN {
        let wanted = bytes(&format!("{dtype}.written.bin"));
        let mut found = vec![0xA5; wanted.len()];
        quantize(dtype, &values, &mut found);
        let block = dtype.block();
        let blocks = found.chunks(block.bytes).zip(wanted.chunks(block.bytes));
        for (i, (found, wanted)) in blocks.enumerate() {
            let values = &values[i * block.elements..][..block.elements];
            assert_eq!(found, wanted, "{dtype}, block {i}: {values:?}");
        }
    }
}

#[test]
fn blocks_are_read_as_llama_cpp_reads_them() {
    for dtype in WRITTEN.into_iter().chain(READ_ONLY) {
        let blocks = bytes(&format!("{dtype}.blocks.bin"));
        let wanted = floats(&format!("{dtype}.read.bin"));
        let mut found = vec![1.5; wanted.len()];
        dequantize(dtype, &blocks, &mut found);
        for (i, (found, wanted)) in found.iter().zip(&wanted).enumerate() {
            let same = found.to_bits() == wanted.to_bits() || found.is_nan() && wanted.is_nan();
            assert!(same, "{dtype}, value {i}: {found:?}, not {wanted:?}");
        }
    }
}

#[test]
fn blocks_do_not_depend_on_where_a_caller_cuts() {
    let values = floats("values.bin");
    for dtype in WRITTEN {
        let whole = bytes(&format!("{dtype}.written.bin"));
        for blocks in [1, 3] {
            let (elements, size) = (dtype.block().elements, dtype.block().bytes);
            let mut cut = vec![0; whole.len()];
            let pieces = values.chunks(blocks * elements);
            for (values, out) in pieces.zip(cut.chunks_mut(blocks * size)) {
                quantize(dtype, values, out);
            }
            assert!(cut == whole, "{dtype} by {blocks}");
        }
    }
}

#[test]
fn an_incomplete_block_is_left_as_it_is() {
    for dtype in WRITTEN {
        let (elements, size) = (dtype.block().elements, dtype.block().bytes);
        let mut out = vec![0x77; 2 * size - 1];
        quantize(dtype, &vec![1.0; 2 * elements], &mut out);
        assert!(out[size..].iter().all(|&byte| byte == 0x77), "{dtype}");
        let mut out = vec![0x77; size];
        quantize(dtype, &vec![1.0; elements - 1], &mut out);
        assert!(out.iter().all(|&byte| byte == 0x77), "{dtype}");
        let mut out = vec![7.0; 2 * elements - 1];
        dequantize(dtype, &vec![0; 2 * size], &mut out);
        assert!(out[elements..].iter().all(|&value| value == 7.0), "{dtype}");
    }
}

#[test]
fn the_types_that_are_read_and_written_are_those_that_say_so() {
    for &dtype in Dtype::ALL {
        let (elements, size) = (dtype.block().elements, dtype.block().bytes);
        let values: Vec<f32> = (0..256_u16).map(f32::from).collect();
        let mut blocks = vec![0x55; 256 / elements * size];
        quantize(dtype, &values, &mut blocks);
        let written = blocks.iter().any(|&byte| byte != 0x55);
        assert_eq!(written, dtype.is_quantized(), "{dtype}");
        let mut values = vec![f32::NAN; 256];
        dequantize(dtype, &blocks, &mut values);
        let read = values.iter().any(|value| !value.is_nan());
        assert_eq!(read, dtype.is_readable() && !dtype.is_float(), "{dtype}");
    }
}

/// Steps that a value may be off. Half of one is lost by rounding to levels; the rest by a search that lets the largest values go for
/// the sake of the others, and, in the types with few bits for a scale, by the rounding of scales.
fn tolerance(dtype: Dtype) -> (f32, f32) {
    match dtype {
        Dtype::Q4_0 => (8.0, 1.1),
        Dtype::Q5_0 => (16.0, 1.1),
        Dtype::Q8_0 => (127.0, 0.6),
        Dtype::Q4_1 => (15.0, 0.6),
        Dtype::Q5_1 => (31.0, 0.6),
        Dtype::Q2_K => (3.0, 1.0),
        Dtype::Q3_K => (4.0, 1.3),
        Dtype::Q4_K => (15.0, 1.5),
        Dtype::Q5_K => (31.0, 1.5),
        _ => (32.0, 1.5),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn what_was_written_is_read_back_within_the_types_steps(
        values in prop::collection::vec(-1_f32..1.0, 512),
        magnitude in 0_i32..4,
    ) {
        let values: Vec<f32> = values.iter().map(|x| x * 10_f32.powi(magnitude)).collect();
        for dtype in WRITTEN {
            let (elements, size) = (dtype.block().elements, dtype.block().bytes);
            let mut blocks = vec![0; 512 / elements * size];
            quantize(dtype, &values, &mut blocks);
            let mut back = vec![f32::NAN; 512];
            dequantize(dtype, &blocks, &mut back);
            for (values, back) in values.chunks(elements).zip(back.chunks(elements)) {
                let least = values.iter().copied().fold(f32::INFINITY, f32::min);
                let most = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let farthest = most.abs().max(least.abs());
                let (steps, off) = tolerance(dtype);
                let range = match dtype {
                    Dtype::Q4_1 | Dtype::Q5_1 => most - least,
                    Dtype::Q2_K | Dtype::Q4_K | Dtype::Q5_K => most.max(0.0) - least.min(0.0),
                    _ => farthest,
                };
                // Scale and minimum are rounded to f16: relatively, and, the smallest, to the nearest 2^-24.
                let bound = off * range / steps + farthest * 2e-3 + 2e-4;
                for (x, y) in values.iter().zip(back) {
                    prop_assert!((x - y).abs() <= bound, "{dtype}: {x} was read back as {y}, more than {bound} off");
                }
            }
        }
    }

    #[test]
    fn any_bytes_and_any_values_pass_without_a_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..900),
        bits in prop::collection::vec(any::<u32>(), 0..600),
    ) {
        let values: Vec<f32> = bits.iter().map(|&bits| f32::from_bits(bits)).collect();
        for &dtype in Dtype::ALL {
            dequantize(dtype, &bytes, &mut vec![0.0; 600]);
            quantize(dtype, &values, &mut vec![0; 900]);
        }
    }
}

fn bytes(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata/blocks");
    fs::read(path.join(name)).unwrap()
}

fn floats(name: &str) -> Vec<f32> {
    let bytes = bytes(name);
    let values = bytes.as_chunks().0.iter().copied();
    values.map(f32::from_le_bytes).collect()
}
