//! Continuations with kept keys and values against computing each sequence anew for each of its tokens.
//!
//! The whole forward is held to PyTorch's in `oracle.rs`. Here every token found must be the one with its largest logit, up to what
//! summing in another order makes.

use std::path::Path;

use panacea_formats::{Dtype, TensorView, narrow};
use panacea_patch::model::{
    AdapterModule, Config, Decoder, Generation, MODEL_TYPES, Pack, Point, Prediction,
    TargetSelection,
};

#[expect(dead_code, reason = "other test files use more of it")]
mod common;
use common::{Stored, oracle};

/// How far below the largest logit that of a found token may be, in parts of the largest magnitude.
const TIE: f32 = 1e-5;

fn config(case: &Path) -> Config {
    let text = std::fs::read_to_string(case.join("config.json")).expect("a config");
    Config::parse(&text).expect("a supported config")
}

/// The rows' tokens, of 2 to 23 tokens.
fn prompts(case: &Path) -> Vec<Vec<u32>> {
    let rows = common::rows(&case.join("rows.json"));
    rows.into_iter().map(|row| row.tokens).collect()
}

/// Panics unless each token of `found` has the largest logit after those before it.
fn assert_most_probable(
    decoder: &mut Decoder<'_>,
    point: Point<'_>,
    prompts: &[Vec<u32>],
    found: &[Vec<u32>],
    what: &str,
) {
    assert_eq!(prompts.len(), found.len());
    let vocabulary = decoder.config().vocab_size;
    for (prompt, found) in prompts.iter().zip(found) {
        let mut tokens = prompt.clone();
        for &token in found {
            // Of the tokens before it alone: how long a sequence is can decide how it is computed.
            let pack = Pack {
                starts: vec![0, tokens.len()],
                predictions: vec![Prediction {
                    position: tokens.len() - 1,
                    token,
                }],
                tokens,
            };
            let logits = decoder.logits(point, &pack).expect("logits");
            tokens = pack.tokens;
            assert_eq!(logits.len(), vocabulary);
            let largest = logits.iter().copied().fold(f32::MIN, f32::max);
            let tie = TIE * logits.iter().fold(0.0, |most: f32, x| most.max(x.abs()));
            assert!(
                logits[token as usize] >= largest - tie,
                "{what}: after {} tokens",
                tokens.len()
            );
            tokens.push(token);
        }
    }
}

#[test]
fn every_family_continues_as_if_each_token_were_computed_anew() {
    let mut families = Vec::new();
    let mut cases: Vec<_> = std::fs::read_dir(oracle(""))
        .expect("the oracle's folder")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.join("expected.safetensors").exists())
        .collect();
    cases.sort();
    for case in cases {
        let stored = Stored::open(&case.join("model.safetensors"));
        let selection = TargetSelection::default();
        for reordered in [None, Some(true)] {
            let mut config = config(&case);
            families.push(config.model_type);
            // As in GGUF: another rotation, which no oracle is needed for here.
            if let Some(reordered) = reordered {
                config = config.over_gguf(reordered);
            }
            let mut decoder = Decoder::new(config, stored.views(), &selection).expect("a decoder");
            let prompts = prompts(&case);
            // More than what room is made for at once, than twice any window, and than the context of any short frequencies.
            let generation = Generation::of(if reordered.is_none() { 75 } else { 12 });
            let found = decoder
                .generate(Point::stored(), &prompts, &generation)
                .expect("continuations");
            assert!(found.iter().all(|it| it.len() == generation.max_new_tokens));
            let name = case.display().to_string();
            assert_most_probable(&mut decoder, Point::stored(), &prompts, &found, &name);
            // Behind a beginning that is computed once: longer than any window, and than what attention takes at a time.
            let beginning = prompts.concat().repeat(2);
            let behind = |prompt: &Vec<u32>| [&beginning[..], prompt].concat();
            let prompts: Vec<Vec<u32>> = prompts.iter().map(behind).collect();
            let found = decoder
                .generate(Point::stored(), &prompts, &Generation::of(6))
                .expect("continuations");
            assert_most_probable(&mut decoder, Point::stored(), &prompts, &found, &name);
        }
    }
    let missing = MODEL_TYPES.iter().find(|it| !families.contains(it));
    assert_eq!(missing, None, "a family without a checkpoint here");
}

#[test]
fn other_prompts_and_threads_change_no_token() {
    for case in ["gemma2", "llama-biases", "phi3-longrope-mixed", "qwen3-moe"] {
        let case = oracle(case);
        let stored = Stored::open(&case.join("model.safetensors"));
        let mut prompts = prompts(&case);
        prompts.extend(
            prompts
                .clone()
                .iter()
                .map(|it| it[..it.len() / 2 + 1].to_vec()),
        );
        let found = |prompts: &[Vec<u32>], at_once, threads| {
            let mut decoder =
                Decoder::new(config(&case), stored.views(), &TargetSelection::default())
                    .expect("a decoder");
            let mut generation = Generation::of(20);
            generation.at_once = at_once;
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
            pool.expect("a pool")
                .install(|| decoder.generate(Point::stored(), prompts, &generation))
                .expect("continuations")
        };
        let all = found(&prompts, 16, 1);
        for (at_once, threads) in [(16, 2), (16, 7), (3, 1), (1, 2), (0, 1)] {
            assert_eq!(all, found(&prompts, at_once, threads), "{at_once} at once");
        }
        let alone: Vec<_> = prompts
            .iter()
            .map(|it| found(std::slice::from_ref(it), 16, 2).remove(0))
            .collect();
        assert_eq!(all, alone);
    }
}

#[test]
fn a_continuation_ends_with_the_first_token_that_stops_it() {
    let case = oracle("llama3-rope");
    let stored = Stored::open(&case.join("model.safetensors"));
    let mut decoder = Decoder::new(config(&case), stored.views(), &TargetSelection::default())
        .expect("a decoder");
    let prompts = prompts(&case);
    let mut generation = Generation::of(30);
    let whole = decoder
        .generate(Point::stored(), &prompts, &generation)
        .expect("continuations");
    generation.stop = vec![whole[0][4], whole[2][9]];
    let stopped = decoder
        .generate(Point::stored(), &prompts, &generation)
        .expect("continuations");
    assert!(stopped[0].len() <= 5 && stopped[2].len() <= 10);
    for (whole, stopped) in whole.iter().zip(&stopped) {
        let end = whole.iter().position(|it| generation.stop.contains(it));
        assert_eq!(whole[..end.map_or(30, |at| at + 1)], stopped[..]);
    }
    let nothing = decoder.generate(Point::stored(), &prompts, &Generation::of(0));
    assert_eq!(
        nothing.expect("continuations"),
        vec![Vec::new(); 4] as Vec<Vec<u32>>
    );
}

#[test]
fn what_cannot_be_continued_is_refused() {
    let case = oracle("llama-tied");
    let stored = Stored::open(&case.join("model.safetensors"));
    let mut decoder = Decoder::new(config(&case), stored.views(), &TargetSelection::default())
        .expect("a decoder");
    for (prompts, words) in [
        (vec![vec![1], vec![]], "prompt number 1 holds no token"),
        (
            vec![vec![1, 97]],
            "token 97 is outside of the model's vocabulary of 97",
        ),
    ] {
        let error = decoder
            .generate(Point::stored(), &prompts, &Generation::of(3))
            .expect_err("a refusal");
        assert_eq!(error.to_string(), words);
    }
    let none = decoder.generate(Point::stored(), &[], &Generation::of(3));
    assert_eq!(none, Ok(Vec::new()));
}

#[test]
fn targets_are_where_the_point_says() {
    let case = oracle("qwen2-window");
    let stored = Stored::open(&case.join("model.safetensors"));
    let selection: TargetSelection = "q_proj,v_proj,down_proj".parse().expect("names");
    let mut decoder = Decoder::new(config(&case), stored.views(), &selection).expect("a decoder");
    let prompts = prompts(&case);
    let generation = Generation::of(12);
    let values = decoder.target_values().expect("finite weights");
    let base = decoder
        .generate(Point::stored(), &prompts, &generation)
        .expect("continuations");
    let at_values = decoder.generate(&values, &prompts, &generation);
    assert_eq!(base, at_values.expect("continuations"));
    // Far enough to be another model.
    let mut direction = values.clone();
    for index in 0..decoder.targets().len() {
        direction.tensor_mut(index).reverse();
    }
    for point in [Point::stored(), Point::at(&values)] {
        let moved = point.moved(0.7, &direction);
        let found = decoder
            .generate(moved, &prompts, &generation)
            .expect("continuations");
        assert_ne!(base, found);
        assert_most_probable(&mut decoder, moved, &prompts, &found, "moved");
    }
}

#[test]
fn factors_over_matrices_take_part() {
    let case = oracle("granite");
    let stored = Stored::open(&case.join("model.safetensors"));
    let prompts = prompts(&case);
    let generation = Generation::of(12);
    let rank = 3;
    let factor = |elements: usize, step: usize| -> Vec<u8> {
        let of = |i: usize| u8::try_from((i * step + 5) % 64).expect("below 64");
        let values: Vec<f32> = (0..elements)
            .map(|i| f32::from(of(i)) / 64.0 - 0.5)
            .collect();
        values.iter().flat_map(|x| x.to_le_bytes()).collect()
    };
    let over = ["0.self_attn.v_proj", "1.self_attn.q_proj", "1.mlp.up_proj"];
    let factors: Vec<_> = stored
        .views()
        .filter_map(|view| {
            let path = view.name.strip_suffix(".weight")?;
            over.iter().find(|it| path.ends_with(**it))?;
            let (a, b) = ([rank, view.shape[1]], [view.shape[0], rank]);
            let bytes = |shape: &[usize], step| factor(shape.iter().product(), step);
            Some((path.to_owned(), (a, bytes(&a, 7)), (b, bytes(&b, 23))))
        })
        .collect();
    assert_eq!(factors.len(), over.len());
    for selection in [None, Some("q_proj")] {
        let modules = factors
            .iter()
            .map(|(path, (a_shape, a), (b_shape, b))| AdapterModule {
                path: path.clone(),
                a: floats("lora_A", a_shape, a),
                b: floats("lora_B", b_shape, b),
                scale: 1.5,
            })
            .collect();
        let selection: Option<TargetSelection> = selection.map(|it| it.parse().expect("a name"));
        let mut decoder =
            Decoder::with_adapter(config(&case), stored.views(), modules, selection.as_ref())
                .expect("a decoder");
        let found = decoder
            .generate(Point::stored(), &prompts, &generation)
            .expect("continuations");
        assert_most_probable(&mut decoder, Point::stored(), &prompts, &found, "adapted");
        let mut plain = Decoder::new(config(&case), stored.views(), &TargetSelection::default())
            .expect("a decoder");
        let without = plain.generate(Point::stored(), &prompts, &generation);
        assert_ne!(without.expect("continuations"), found);
    }
}

fn floats<'a>(name: &'a str, shape: &'a [usize], bytes: &'a [u8]) -> TensorView<'a> {
    TensorView {
        name,
        dtype: Dtype::F32,
        shape,
        bytes,
    }
}

#[test]
fn halves_are_read_as_what_they_are() {
    let case = oracle("olmo2");
    let stored = Stored::open(&case.join("model.safetensors"));
    let prompts = prompts(&case);
    for dtype in [Dtype::BF16, Dtype::F16] {
        let halves: Vec<_> = stored
            .views()
            .map(|view| {
                let mut bytes = vec![0; 2 * view.elements()];
                narrow(dtype, &stored.floats(view.name), &mut bytes);
                (view, bytes)
            })
            .collect();
        let views = halves.iter().map(|(view, bytes)| TensorView {
            dtype,
            bytes,
            ..*view
        });
        let mut decoder =
            Decoder::new(config(&case), views, &TargetSelection::default()).expect("a decoder");
        let found = decoder
            .generate(Point::stored(), &prompts, &Generation::of(20))
            .expect("continuations");
        let name = dtype.to_string();
        assert_most_probable(&mut decoder, Point::stored(), &prompts, &found, &name);
    }
}
