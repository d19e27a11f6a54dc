//! Any bytes are a sound safetensors file or an error; of a sound one, every tensor can be read.

#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use panacea_formats::SafetensorsFile;

fuzz_target!(|bytes: &[u8]| {
    let Ok(file) = SafetensorsFile::from_bytes(Path::new("fuzz"), bytes.to_vec()) else {
        return;
    };
    let mut end = file.header_bytes().len();
    for tensor in file.tensors() {
        assert_eq!(
            tensor.dtype.bytes_of(tensor.elements()),
            Some(tensor.bytes.len())
        );
        assert_eq!(
            file.tensor(tensor.name).map(|found| found.bytes),
            Some(tensor.bytes)
        );
        end += tensor.bytes.len();
        if tensor.dtype.is_patchable() {
            let mut wide = vec![0.0; tensor.elements()];
            assert!(tensor.widen_into(0..wide.len(), &mut wide).is_ok());
        }
    }
    assert_eq!(end, bytes.len());
});
