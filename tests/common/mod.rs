//! What several test files share: where the fixtures are, and plain readers for them that use none of the code under test.

#![expect(
    unreachable_pub,
    reason = "a module of every test file, not an interface"
)]

use std::path::{Path, PathBuf};

use panacea_formats::Dtype;
use panacea_formats::TensorView;
use panacea_patch::model::EncodedRow;
use safetensors::SafeTensors;

/// The path of a fixture in `testdata/oracle`.
pub fn oracle(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("testdata/oracle")
        .join(name)
}

/// A JSON file.
pub fn json(path: &Path) -> serde_json::Value {
    let text =
        std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).expect("JSON")
}

/// The rows of a `rows.json`: token ids and which of them the loss is taken on.
pub fn rows(path: &Path) -> Vec<EncodedRow> {
    json(path)["rows"]
        .as_array()
        .expect("rows")
        .iter()
        .map(|row| EncodedRow {
            tokens: serde_json::from_value(row["tokens"].clone()).expect("tokens"),
            in_loss: serde_json::from_value(row["in_loss"].clone()).expect("marks"),
        })
        .collect()
}

/// A safetensors file of F32 tensors, read with the `safetensors` crate.
pub struct Stored {
    tensors: Vec<(String, Vec<usize>, Vec<u8>)>,
}

impl Stored {
    /// Reads all of `path`.
    pub fn open(path: &Path) -> Self {
        let bytes =
            std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let file = SafeTensors::deserialize(&bytes).expect("a safetensors file");
        let tensors = file
            .tensors()
            .into_iter()
            .map(|(name, view)| {
                assert_eq!(view.dtype(), safetensors::Dtype::F32, "{name}");
                (name, view.shape().to_vec(), view.data().to_vec())
            })
            .collect();
        Self { tensors }
    }

    /// All tensors, as the library takes them.
    pub fn views(&self) -> impl Iterator<Item = TensorView<'_>> {
        self.tensors.iter().map(|(name, shape, bytes)| TensorView {
            name,
            dtype: Dtype::F32,
            shape,
            bytes,
        })
    }

    /// The elements of one tensor.
    pub fn floats(&self, name: &str) -> Vec<f32> {
        let (_, _, bytes) = self
            .tensors
            .iter()
            .find(|(n, ..)| n == name)
            .unwrap_or_else(|| panic!("no `{name}`"));
        bytes
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect()
    }
}

/// |found - wanted| / |wanted|, in the Euclidean norm.
pub fn relative_error(found: &[f32], wanted: &[f32]) -> f64 {
    assert_eq!(found.len(), wanted.len());
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let difference = norm(
        &mut found
            .iter()
            .zip(wanted)
            .map(|(a, b)| f64::from(*a) - f64::from(*b)),
    );
    difference / norm(&mut wanted.iter().map(|x| f64::from(*x)))
}
