//! The matrices that a perturbation is of, by name and without computing.
//!
//! In: a checkpoint's tensors and a selection. Out: names and shapes, in the order of a decoder's targets.

use panacea_formats::{Adapter, TensorView, shown};
use panacea_patch::model::{TargetSelection, decoder_prefix, place_of_module};

use super::error::{Exit, Failure};
use super::model::Model;

/// The targets that `selection` names, without computing; of an adapter its A and B, all of them without a selection.
///
/// # Errors
/// When there are none, or one of them is not a tensor of its own.
pub(super) fn targets_of(
    model: &Model,
    selection: Option<&TargetSelection>,
) -> Result<Vec<(String, Vec<usize>)>, Failure> {
    match model.adapter()? {
        Some(adapter) => targets_of_adapter(&adapter, selection),
        None => {
            let selection = selection.cloned().unwrap_or_default();
            let targets = targets_by_name(&model.tensors()?, &selection)?;
            let stored = |(name, shape): (String, _)| Ok((model.stored_name(&name)?, shape));
            targets.into_iter().map(stored).collect()
        }
    }
}

/// A and B of the modules that `selection` names, or of all, in the order of a decoder's targets: A before B, modules as
/// [`targets_by_name`] has them.
///
/// # Errors
/// When there are none.
pub(super) fn targets_of_adapter(
    adapter: &Adapter<'_>,
    selection: Option<&TargetSelection>,
) -> Result<Vec<(String, Vec<usize>)>, Failure> {
    let mut modules: Vec<_> = adapter
        .modules()
        .iter()
        .filter(|module| selection.is_none_or(|it| it.selects(module.path)))
        .collect();
    modules.sort_by(|a, b| place_of_module(a.path).cmp(&place_of_module(b.path)));
    if !modules.is_empty() {
        let stored = |tensor: &TensorView<'_>| (tensor.name.to_owned(), tensor.shape.to_vec());
        return Ok(modules
            .into_iter()
            .flat_map(|module| [stored(&module.a), stored(&module.b)])
            .collect());
    }
    let wanted = selection.map(ToString::to_string).unwrap_or_default();
    let paths = adapter.modules().iter().map(|module| module.path);
    Err(no_target(&wanted, paths.collect(), "adapted modules"))
}

/// The matrices that `selection` names, without a model: 2-D, of a type that can be patched, ordered as a decoder's targets
/// are, so that the same seed gives the same noise with and without one.
///
/// # Errors
/// When there are none.
pub(super) fn targets_by_name(
    tensors: &[TensorView<'_>],
    selection: &TargetSelection,
) -> Result<Vec<(String, Vec<usize>)>, Failure> {
    // Of a model with several towers, the text decoder's blocks only.
    let blocks = decoder_prefix(|name| tensors.iter().any(|tensor| tensor.name == name))
        .map_or(String::new(), |prefix| format!("{prefix}layers."));
    let matrices: Vec<&TensorView<'_>> = tensors
        .iter()
        .filter(|tensor| tensor.name.starts_with(&blocks))
        .filter(|tensor| tensor.shape.len() == 2 && tensor.dtype.is_patchable())
        .collect();
    let mut targets: Vec<_> = matrices
        .iter()
        .filter(|tensor| selection.selects(module_of(tensor.name)))
        .map(|tensor| (tensor.name.to_owned(), tensor.shape.to_vec()))
        .collect();
    targets.sort_by(|(a, _), (b, _)| {
        place_of_module(module_of(a)).cmp(&place_of_module(module_of(b)))
    });
    if !targets.is_empty() {
        return Ok(targets);
    }
    let names = matrices.iter().map(|tensor| tensor.name).collect();
    Err(no_target(
        &selection.to_string(),
        names,
        "matrices that can be patched",
    ))
}

/// A selection that names none of `names`, which are `what`.
fn no_target(wanted: &str, names: Vec<&str>, what: &str) -> Failure {
    let last_parts = || {
        names
            .iter()
            .filter_map(|name| module_of(name).rsplit('.').next())
    };
    let nearest = wanted
        .split(',')
        .find_map(|name| panacea_formats::nearest(name, last_parts()));
    let failure = Failure::new(
        Exit::Refused,
        format!("targets `{}` match no matrix", shown(wanted)),
    )
    .because(match names.first() {
        Some(first) => format!(
            "none of {} {what} is named so; the first is `{}`",
            names.len(),
            shown(first)
        ),
        None => "the checkpoint has no matrix of a type that can be patched".to_owned(),
    });
    failure.hint(match nearest {
        Some(nearest) => format!("did you mean --targets {}?", shown(nearest)),
        None => "name modules of the checkpoint with --targets".to_owned(),
    })
}

/// The module that a tensor is the weight of.
pub(super) fn module_of(tensor: &str) -> &str {
    tensor.strip_suffix(".weight").unwrap_or(tensor)
}

/// The block and the projection that a tensor's name speaks of.
pub(super) fn block_and_projection(tensor: &str) -> (Option<usize>, &str) {
    let module = module_of(tensor);
    let block = module.split('.').find_map(|part| part.parse().ok());
    (block, module.rsplit('.').next().unwrap_or(module))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use panacea_formats::Checkpoint;
    use panacea_patch::model::Decoder;

    use super::*;
    use crate::cli::find::read_config;

    /// Of several towers, those of the text decoder only: `gemma3-multimodal` has projections of the same names in its vision tower.
    #[test]
    fn targets_are_the_same_with_and_without_a_model() {
        let oracle = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/oracle");
        for case in [
            "gemma3-multimodal",
            "llama3-rope",
            "mixtral",
            "phi3-window",
            "qwen3-moe",
        ] {
            let directory = oracle.join(case);
            let checkpoint = Checkpoint::open(&directory).unwrap();
            let config = read_config(&directory.join("config.json")).unwrap();
            for selection in [
                "q_proj,k_proj,v_proj,qkv_proj",
                "down_proj,w2,o_proj,w1,gate_proj,gate_up_proj,q_proj,w3",
            ] {
                let selection: TargetSelection = selection.parse().unwrap();
                let decoder =
                    Decoder::new(config.clone(), checkpoint.tensors(), &selection).unwrap();
                let of_decoder: Vec<_> = decoder
                    .targets()
                    .iter()
                    .map(|target| (target.name.clone(), target.shape.to_vec()))
                    .collect();
                let tensors: Vec<_> = checkpoint.tensors().collect();
                let by_name = targets_by_name(&tensors, &selection).unwrap();
                assert_eq!(by_name, of_decoder, "{case}, {selection}");
            }
        }
    }

    #[test]
    fn a_slip_in_a_target_finds_its_neighbor() {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/oracle/llama-tied");
        let checkpoint = Checkpoint::open(&directory).unwrap();
        let tensors: Vec<_> = checkpoint.tensors().collect();
        let failure = targets_by_name(&tensors, &"q_porj".parse().unwrap()).unwrap_err();
        assert_eq!(
            failure.hint.as_deref(),
            Some("did you mean --targets q_proj?")
        );
    }
}
