//! What a search varies: named settings with ranges, drawn from a seed.
//!
//! In: the settings that a search starts from, and the targets of the model. Out: a [`Space`], from which a [`Choice`] is drawn, or moved
//! a little. A setting is added to the search by a line of [`Space::of`].

use std::collections::BTreeMap;
use std::fmt;

use rand::RngExt;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::super::adaptive::{Adaptive, Order};
use crate::model::Target;

/// The settings that a search varies, in a fixed order.
#[derive(Clone, Debug)]
pub struct Space {
    dimensions: Vec<Dimension>,
}

/// One setting that a search varies.
#[derive(Clone, Debug)]
struct Dimension {
    name: &'static str,
    /// The value of the first trial.
    first: Value,
    range: Range,
}

/// The values that a setting may take, and how it is set.
#[derive(Clone, Debug)]
enum Range {
    /// A number above 0, whose logarithm is uniform.
    Logarithm(f64, f64, fn(&mut Adaptive, f64)),
    /// A number, uniform.
    Number(f64, f64, fn(&mut Adaptive, f64)),
    /// A whole number, uniform.
    Whole(usize, usize, fn(&mut Adaptive, usize)),
    /// Any order of rows.
    Order,
    /// Successive ones of these blocks: all, or any, each half of the time.
    Blocks(Vec<usize>),
    /// One of these lists of modules.
    Modules(Vec<Vec<String>>),
}

/// The value of a setting.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Value {
    /// A count.
    Whole(usize),
    /// A number.
    Number(f64),
    /// Which rows come first.
    Order(Order),
    /// The first and the last block that are touched.
    Blocks(usize, usize),
    /// The modules that are touched.
    Modules(Vec<String>),
}

/// A value for each setting that a search varies, by its name.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Choice(pub BTreeMap<String, Value>);

impl Space {
    /// All of them, for a model with `targets`. The first trial has the settings of `base`.
    pub fn of(base: &Adaptive, targets: &[Target]) -> Self {
        let mut blocks: Vec<usize> = targets.iter().map(|target| target.block).collect();
        blocks.sort_unstable();
        blocks.dedup();
        let mut present: Vec<String> = Vec::new();
        for target in targets {
            let module = module_of(&target.name);
            if !present.iter().any(|known| known == module) {
                present.push(module.to_owned());
            }
        }
        let all = base.touches.modules.clone().unwrap_or(present.clone());
        let subsets = MODULES.map(|names| names.iter().map(|&name| name.to_owned()).collect());
        let mut modules: Vec<Vec<String>> = Vec::new();
        for mut subset in [all].into_iter().chain(subsets) {
            subset.retain(|module| present.contains(module));
            if !subset.is_empty() && !modules.contains(&subset) {
                modules.push(subset);
            }
        }
        let whole = (
            blocks.first().copied().unwrap_or(0),
            blocks.last().copied().unwrap_or(0),
        );
        let (first_block, last_block) = base.touches.blocks.unwrap_or(whole);
        let dimension = |name, first, range| Dimension { name, first, range };
        let number = Value::Number;
        let mut dimensions = vec![
            dimension(
                "alpha",
                number(base.alpha),
                Range::Logarithm(0.25, 4.0, |it, alpha| it.alpha = alpha),
            ),
            dimension(
                "cap",
                number(base.cap),
                Range::Logarithm(1.25, 6.0, |it, cap| it.cap = cap),
            ),
            dimension(
                "gain",
                number(base.gain),
                Range::Logarithm(0.25, 3.0, |it, gain| it.gain = gain),
            ),
            dimension(
                "steps",
                Value::Whole(base.steps),
                Range::Whole(2, 16, |it, steps| it.steps = steps),
            ),
            dimension(
                "repair_steps",
                Value::Whole(base.repair_steps),
                Range::Whole(0, 8, |it, steps| it.repair_steps = steps),
            ),
            dimension(
                "guard_share",
                number(base.guard_share),
                Range::Number(0.0, 1.0, |it, share| it.guard_share = share),
            ),
            dimension(
                "learning_share",
                number(base.learning_share),
                Range::Number(0.25, 1.0, |it, share| it.learning_share = share),
            ),
            dimension(
                "affinity",
                number(base.affinity),
                Range::Number(-1.0, 0.25, |it, affinity| it.affinity = affinity),
            ),
            dimension("order", Value::Order(base.order), Range::Order),
        ];
        if blocks.len() > 1 {
            let first = Value::Blocks(first_block, last_block);
            dimensions.push(dimension("blocks", first, Range::Blocks(blocks)));
        }
        if modules.len() > 1 {
            let first = Value::Modules(modules[0].clone());
            dimensions.push(dimension("modules", first, Range::Modules(modules)));
        }
        Self { dimensions }
    }

    /// Without the settings called `names`, which then stay as the search's base has them.
    #[must_use]
    pub fn without(mut self, names: &[&str]) -> Self {
        self.dimensions
            .retain(|dimension| !names.contains(&dimension.name));
        self
    }

    /// What the first trial takes.
    pub(super) fn first(&self) -> Choice {
        self.each(|dimension| dimension.first.clone())
    }

    /// Any values.
    pub(super) fn draw(&self, generator: &mut ChaCha8Rng) -> Choice {
        self.each(|dimension| dimension.range.draw(generator))
    }

    /// `choice` with about half of its values moved a little.
    pub(super) fn near(&self, choice: &Choice, generator: &mut ChaCha8Rng) -> Choice {
        self.each(|dimension| match choice.0.get(dimension.name) {
            Some(value) if generator.random_bool(0.5) => value.clone(),
            Some(value) => dimension.range.near(value, generator),
            None => dimension.range.draw(generator),
        })
    }

    /// `base` with the values of `choice`.
    pub fn apply(&self, choice: &Choice, base: &Adaptive) -> Adaptive {
        let mut settings = base.clone();
        for dimension in &self.dimensions {
            match (&dimension.range, choice.0.get(dimension.name)) {
                (Range::Logarithm(.., set) | Range::Number(.., set), Some(Value::Number(it))) => {
                    set(&mut settings, *it);
                }
                (Range::Whole(.., set), Some(Value::Whole(it))) => set(&mut settings, *it),
                (Range::Order, Some(Value::Order(order))) => settings.order = *order,
                (Range::Blocks(_), Some(Value::Blocks(first, last))) => {
                    settings.touches.blocks = Some((*first, *last));
                }
                (Range::Modules(_), Some(Value::Modules(names))) => {
                    settings.touches.modules = Some(names.clone());
                }
                _ => {}
            }
        }
        settings
    }

    /// `base` with as many steps as a trial may have.
    pub fn longest(&self, base: &Adaptive) -> Adaptive {
        let mut settings = base.clone();
        for dimension in &self.dimensions {
            if let Range::Whole(_, most, set) = dimension.range {
                set(&mut settings, most);
            }
        }
        settings
    }

    fn each(&self, mut value: impl FnMut(&Dimension) -> Value) -> Choice {
        let dimensions = self.dimensions.iter();
        Choice(
            dimensions
                .map(|it| (it.name.to_owned(), value(it)))
                .collect(),
        )
    }
}

impl Range {
    fn draw(&self, generator: &mut ChaCha8Rng) -> Value {
        match self {
            Self::Logarithm(low, high, _) => {
                let exponent = generator.random_range(low.ln()..=high.ln());
                Value::Number(exponent.exp().clamp(*low, *high))
            }
            Self::Number(low, high, _) => Value::Number(generator.random_range(*low..=*high)),
            Self::Whole(low, high, _) => Value::Whole(generator.random_range(*low..=*high)),
            Self::Order => Value::Order(match generator.random_bool(0.5) {
                true => Order::EasiestFirst,
                false => Order::Seeded,
            }),
            Self::Blocks(blocks) => {
                let last = blocks.len() - 1;
                if generator.random_bool(0.5) {
                    return Value::Blocks(blocks[0], blocks[last]);
                }
                let (a, b) = (
                    generator.random_range(0..=last),
                    generator.random_range(0..=last),
                );
                Value::Blocks(blocks[a.min(b)], blocks[a.max(b)])
            }
            Self::Modules(subsets) => {
                Value::Modules(subsets.choose(generator).cloned().unwrap_or_default())
            }
        }
    }

    /// A value not far from `value`: within a quarter of the range, or any where nothing is near anything.
    fn near(&self, value: &Value, generator: &mut ChaCha8Rng) -> Value {
        match (self, value) {
            (Self::Logarithm(low, high, _), Value::Number(value)) => {
                let width = (high / low).ln() * REACH;
                let moved = value * generator.random_range(-width..=width).exp();
                Value::Number(moved.clamp(*low, *high))
            }
            (Self::Number(low, high, _), Value::Number(value)) => {
                let width = (high - low) * REACH;
                let moved = value + generator.random_range(-width..=width);
                Value::Number(moved.clamp(*low, *high))
            }
            (Self::Whole(low, high, _), Value::Whole(value)) => {
                let width = (high - low).div_ceil(4);
                let (least, most) = (value.saturating_sub(width), value + width);
                let moved = generator.random_range(least..=most);
                Value::Whole(moved.clamp(*low, *high))
            }
            (Self::Blocks(blocks), Value::Blocks(first, last)) => {
                let width = blocks.len().div_ceil(4);
                let mut moved = |block: &usize| {
                    let place = blocks.iter().position(|it| it == block).unwrap_or(0);
                    let (least, most) = (place.saturating_sub(width), place + width);
                    generator.random_range(least..=most).min(blocks.len() - 1)
                };
                let (a, b) = (moved(first), moved(last));
                Value::Blocks(blocks[a.min(b)], blocks[a.max(b)])
            }
            _ => self.draw(generator),
        }
    }
}

impl fmt::Display for Space {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, Dimension { name, range, .. }) in self.dimensions.iter().enumerate() {
            let comma = if place > 0 { ", " } else { "" };
            write!(f, "{comma}{name} ")?;
            match range {
                Range::Logarithm(low, high, _) | Range::Number(low, high, _) => {
                    write!(f, "{low}..{high}")?;
                }
                Range::Whole(low, high, _) => write!(f, "{low}..{high}")?,
                Range::Order => f.write_str("seeded or easiest-first")?,
                Range::Blocks(blocks) => {
                    write!(f, "{}..{}", blocks[0], blocks[blocks.len() - 1])?;
                }
                Range::Modules(subsets) => {
                    let subsets: Vec<String> = subsets.iter().map(|it| it.join("+")).collect();
                    f.write_str(&subsets.join(" or "))?;
                }
            }
        }
        Ok(())
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Whole(count) => write!(f, "{count}"),
            Self::Number(number) => write!(f, "{number:.3}"),
            Self::Order(Order::Seeded) => f.write_str("seeded"),
            Self::Order(Order::EasiestFirst) => f.write_str("easiest-first"),
            Self::Blocks(first, last) => write!(f, "{first}-{last}"),
            Self::Modules(names) => {
                let names = names
                    .iter()
                    .map(|it| it.strip_suffix("_proj").unwrap_or(it));
                f.write_str(&names.collect::<Vec<_>>().join("+"))
            }
        }
    }
}

/// What the module of a tensor is called, such as `q_proj`, also of LoRA factors.
fn module_of(tensor: &str) -> &str {
    let mut parts = tensor.rsplit('.');
    let module = parts.find(|part| *part != "weight" && !part.starts_with("lora_"));
    module.unwrap_or(tensor)
}

/// How far a value is moved, as a share of its range.
const REACH: f64 = 0.25;

/// Lists of modules that a search chooses among, beside the base's, as far as the model has them; the first is the paper's.
const MODULES: [&[&str]; 5] = [
    &["q_proj", "k_proj", "v_proj", "qkv_proj"],
    &["v_proj"],
    &["k_proj", "v_proj"],
    &["o_proj"],
    &["q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"],
];

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand_chacha::rand_core::SeedableRng;

    use super::*;

    fn targets(modules: &[&str], blocks: &[usize]) -> Vec<Target> {
        let names = blocks
            .iter()
            .flat_map(|&block| modules.iter().map(move |module| (block, *module)));
        names
            .map(|(block, module)| Target {
                name: format!("model.layers.{block}.self_attn.{module}.weight"),
                shape: [1, 1],
                block,
            })
            .collect()
    }

    fn paper() -> Adaptive {
        let mut base = Adaptive::default();
        let names = ["q_proj", "k_proj", "v_proj", "qkv_proj"];
        base.touches.modules = Some(names.map(str::to_owned).into());
        base
    }

    /// Whether `settings` keep to the space, said again by hand.
    fn is_inside(settings: &Adaptive, blocks: &[usize]) -> bool {
        let (first, last) = settings.touches.blocks.unwrap();
        let modules = settings.touches.modules.clone().unwrap().join(" ");
        (0.25..=4.0).contains(&settings.alpha)
            && (1.25..=6.0).contains(&settings.cap)
            && (0.25..=3.0).contains(&settings.gain)
            && (2..=16).contains(&settings.steps)
            && settings.repair_steps <= 8
            && (0.0..=1.0).contains(&settings.guard_share)
            && (0.25..=1.0).contains(&settings.learning_share)
            && (-1.0..=0.25).contains(&settings.affinity)
            && first <= last
            && blocks.contains(&first)
            && blocks.contains(&last)
            && [
                "q_proj k_proj v_proj",
                "v_proj",
                "k_proj v_proj",
                "o_proj",
                "q_proj k_proj v_proj o_proj",
            ]
            .contains(&modules.as_str())
    }

    proptest! {
        #[test]
        fn what_is_drawn_and_moved_stays_in_the_space(seed: u64) {
            let blocks = [2, 3, 5, 8, 9];
            let targets = targets(&["q_proj", "k_proj", "v_proj", "o_proj"], &blocks);
            let base = paper();
            let space = Space::of(&base, &targets);
            let walk = || {
                let mut generator = ChaCha8Rng::seed_from_u64(seed);
                let mut choices = vec![space.first(), space.draw(&mut generator)];
                for _ in 0..20 {
                    let next = space.near(&choices[choices.len() - 1], &mut generator);
                    choices.push(next);
                }
                choices
            };
            let choices = walk();
            for choice in &choices {
                prop_assert!(is_inside(&space.apply(choice, &base), &blocks), "{choice:?}");
            }
            prop_assert_eq!(choices, walk());
        }
    }

    #[test]
    fn the_first_choice_is_the_base_on_all_blocks() {
        let base = paper();
        let space = Space::of(&base, &targets(&["q_proj", "v_proj", "o_proj"], &[0, 1]));
        let mut first = space.apply(&space.first(), &base);
        assert_eq!(first.touches.blocks, Some((0, 1)));
        assert_eq!(first.touches.modules.clone().unwrap(), ["q_proj", "v_proj"]);
        first.touches = base.touches.clone();
        assert_eq!(first, base);
    }

    #[test]
    fn a_model_has_the_lists_of_its_own_modules() {
        let said = |base: &Adaptive, modules: &[&str]| {
            let said = Space::of(base, &targets(modules, &[0, 7])).to_string();
            said.strip_prefix(
                "alpha 0.25..4, cap 1.25..6, gain 0.25..3, steps 2..16, repair_steps 0..8, \
                 guard_share 0..1, learning_share 0.25..1, affinity -1..0.25, order seeded or easiest-first, blocks 0..7",
            )
            .map(str::to_owned)
            .unwrap_or(said)
        };
        let all = Adaptive::default();
        assert_eq!(said(&all, &["down_proj"]), "");
        assert_eq!(
            said(&all, &["qkv_proj", "o_proj"]),
            ", modules qkv_proj+o_proj or qkv_proj or o_proj"
        );
        assert_eq!(
            said(&paper(), &["qkv_proj", "o_proj"]),
            ", modules qkv_proj or o_proj or qkv_proj+o_proj"
        );
        assert_eq!(
            said(&all, &["q_proj", "v_proj", "up_proj"]),
            ", modules q_proj+v_proj+up_proj or q_proj+v_proj or v_proj"
        );
        assert_eq!(
            module_of("base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight"),
            "v_proj"
        );
    }

    #[test]
    fn a_setting_that_is_taken_out_stays_as_it_is() {
        let base = Adaptive {
            alpha: 7.0,
            ..Adaptive::default()
        };
        let space = Space::of(&base, &targets(&["v_proj"], &[0])).without(&["alpha", "cap"]);
        let choice = space.draw(&mut ChaCha8Rng::seed_from_u64(1));
        assert!(!choice.0.contains_key("alpha") && choice.0.contains_key("gain"));
        let settings = space.apply(&choice, &base);
        assert_eq!((settings.alpha, settings.cap), (7.0, base.cap));
    }
}
