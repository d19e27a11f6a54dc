//! A part of the targets: some blocks, some modules of each.

use crate::model::Target;

/// The targets that steps move. The default is all of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Region {
    /// The first and the last block; `None` is all.
    pub blocks: Option<(usize, usize)>,
    /// Modules by the name that their tensors' have as a part, such as `q_proj`; `None` is all.
    pub modules: Option<Vec<String>>,
}

impl Region {
    /// Whether `target` is in it.
    pub fn holds(&self, target: &Target) -> bool {
        let in_blocks = self
            .blocks
            .is_none_or(|(first, last)| (first..=last).contains(&target.block));
        let named = |modules: &Vec<String>| {
            let mut parts = target.name.split('.');
            parts.any(|part| modules.iter().any(|module| module == part))
        };
        in_blocks && self.modules.as_ref().is_none_or(named)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_is_blocks_times_modules() {
        let target = |name: &str, block| Target {
            name: name.to_owned(),
            shape: [1, 1],
            block,
        };
        let v = target("model.layers.3.self_attn.v_proj.weight", 3);
        let a = target(
            "base_model.model.model.layers.3.self_attn.v_proj.lora_A.weight",
            3,
        );
        let q = target("model.layers.3.self_attn.q_proj.weight", 3);
        let region = |blocks, modules: &[&str]| Region {
            blocks: Some(blocks),
            modules: Some(modules.iter().map(|&it| it.to_owned()).collect()),
        };
        assert!(region((3, 3), &["v_proj", "o_proj"]).holds(&v));
        assert!(region((0, 3), &["v_proj"]).holds(&a));
        assert!(!region((0, 3), &["v_proj"]).holds(&q));
        assert!(!region((0, 2), &["v_proj"]).holds(&v));
        assert!(!region((4, 5), &["v_proj"]).holds(&v));
        assert!(Region::default().holds(&q));
    }
}
