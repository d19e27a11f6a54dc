//! Which tensors a patch touched, and how fine they are to be stored.
//!
//! In: the manifest beside a patched checkpoint. Out: whether a tensor was a target, by the selection that it names, or a patched
//! perturbation of unknown targets is refused. A quantized type can round a patch away; a finer one for these tensors keeps it.

use std::collections::HashSet;

use panacea_formats::Dtype;
use serde_json::{Map, Value};

use super::ConvertError;
use crate::manifest::Statement;
use crate::model::TargetSelection;

/// A type that tensors are to have at least, and which these are.
#[derive(Clone, Debug)]
pub struct PatchedType {
    dtype: Dtype,
    patched: Patched,
}

/// Which tensors were touched.
#[derive(Clone, Debug)]
enum Patched {
    Selected(TargetSelection),
    Named(HashSet<String>),
}

impl PatchedType {
    /// Tensors that `selection` names get `dtype`.
    pub fn new(dtype: Dtype, selection: TargetSelection) -> Self {
        Self {
            dtype,
            patched: Patched::Selected(selection),
        }
    }

    /// The tensors of these names get `dtype`.
    pub fn of_names(dtype: Dtype, names: impl Iterator<Item = String>) -> Self {
        Self {
            dtype,
            patched: Patched::Named(names.collect()),
        }
    }

    /// The targets of the run that `manifest` tells of get `dtype`.
    ///
    /// # Errors
    /// When the manifest does not say what they were.
    pub fn of_manifest(dtype: Dtype, manifest: &Statement) -> Result<Self, ConvertError> {
        let provenance = manifest.provenance();
        let of_perturbation = || {
            let mut byproducts = provenance.byproducts.iter();
            let it = byproducts.find(|it| it.name == "perturbation")?;
            it.measured.get("parameters")?.as_object()
        };
        let targets =
            |parameters: &Map<String, Value>| parameters.get("targets")?.as_str()?.parse().ok();
        let selection = targets(&provenance.external_parameters)
            .or_else(|| targets(of_perturbation()?))
            .ok_or(ConvertError::NoTargets)?;
        Ok(Self::new(dtype, selection))
    }

    /// Whether the tensor that the checkpoint calls `name` was a target.
    pub(super) fn was_patched(&self, name: &str) -> bool {
        match &self.patched {
            Patched::Named(names) => names.contains(name),
            Patched::Selected(selection) => name
                .strip_suffix(".weight")
                .is_some_and(|module| selection.selects(module)),
        }
    }

    /// The finer of `dtype` and what patched tensors are to have.
    ///
    /// # Errors
    /// When that is the latter, and rows are no whole blocks of it.
    pub(super) fn at_least(
        &self,
        dtype: Dtype,
        name: &str,
        shape: &[usize],
    ) -> Result<Dtype, ConvertError> {
        // Bytes of as many elements as every block has a whole number of times.
        let size = |dtype: Dtype| dtype.bytes_of(256);
        if size(dtype) >= size(self.dtype) {
            return Ok(dtype);
        }
        let columns = shape.last().copied().unwrap_or(1);
        match self.dtype.bytes_of(columns) {
            Some(_) => Ok(self.dtype),
            None => Err(ConvertError::PatchedType {
                tensor: name.to_owned(),
                dtype: self.dtype,
                columns,
            }),
        }
    }
}
