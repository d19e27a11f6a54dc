//! Any bytes are a perturbation or an error; of a perturbation, the record survives being written and every value is finite.
//!
//! Compact forms can describe tensors of any size in few bytes, so only their first and last elements are read.

#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use panacea_formats::Perturbation;
use panacea_formats::json::{canonical, parse_strict};

fuzz_target!(|bytes: &[u8]| {
    let Ok(perturbation) = Perturbation::from_bytes(Path::new("fuzz"), bytes.to_vec()) else {
        return;
    };
    let text = perturbation.record().to_json();
    assert_eq!(parse_strict(&text).map(|value| canonical(&value)), Ok(text));
    for delta in perturbation.deltas() {
        assert_eq!(delta.first_not_finite(), None);
        let elements = delta.elements();
        let mut values = vec![f32::NAN; elements.min(4096)];
        for start in [0, elements - values.len()] {
            let end = start + values.len();
            assert!(delta.read_into(start..end, &mut values).is_ok());
            assert!(values.iter().all(|value| value.is_finite()));
        }
    }
});
