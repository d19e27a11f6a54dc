//! Checkpoint and perturbation in, patched checkpoint out: the whole path on small checkpoints built here.

#![expect(clippy::unwrap_used, reason = "a test may fail loudly")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use half::{bf16, f16};
use panacea_formats::{
    CHUNK_BYTES, Checkpoint, DeltaTensor, Destination, Dtype, NotFinite, Observer, OutputDir,
    OutputFile, Overwrite, Perturbation, PerturbationRecord, Sha256, Space, WriteError,
    describe_base, write_perturbation,
};
use panacea_patch::apply::{
    AdditionError, Applied, ApplyError, ApplySettings, Rounding, Strength, StrengthError, Wanted,
    apply,
};
use serde_json::{Map, json};

#[test]
fn every_patched_element_is_the_rounded_sum_and_every_other_byte_stays() {
    let root = tempfile::tempdir().unwrap();
    let source = root.path().join("in");
    build(&source, Layout::One);
    let deltas = Deltas::for_targets();
    let settings = ApplySettings {
        strength: Strength::new(0.5).unwrap(),
        ..to_nearest()
    };
    patched(&source, &root.path().join("out"), &deltas, settings).unwrap();

    let before = Checkpoint::open(&source).unwrap();
    let after = Checkpoint::open(&root.path().join("out")).unwrap();
    assert_eq!(
        before.files()[0].file.header_bytes(),
        after.files()[0].file.header_bytes()
    );
    for tensor in before.tensors() {
        let new = after.tensor(tensor.name).unwrap();
        let Some((_, _, delta)) = deltas.0.iter().find(|(name, ..)| name == tensor.name) else {
            assert_eq!(new.bytes, tensor.bytes, "{}", tensor.name);
            continue;
        };
        let width = tensor.bytes.len() / delta.len();
        for (i, &delta) in delta.iter().enumerate() {
            let old = &tensor.bytes[i * width..][..width];
            let found = &new.bytes[i * width..][..width];
            let weight = value(tensor.dtype, old);
            let wanted = if delta == 0.0 || !weight.is_finite() {
                old.to_vec()
            } else {
                nearest(tensor.dtype, weight + 0.5 * delta)
            };
            assert_eq!(
                found, wanted,
                "{} element {i}: {weight} + {delta} / 2",
                tensor.name
            );
        }
    }
    for name in ["config.json", "sub/notes.txt"] {
        assert_eq!(
            fs::read(source.join(name)).unwrap(),
            fs::read(root.path().join("out").join(name)).unwrap()
        );
    }
}

#[test]
fn one_file_three_shards_and_a_lone_file_give_the_same_tensors_and_numbers() {
    let root = tempfile::tempdir().unwrap();
    let deltas = Deltas::for_targets();
    let settings = stochastic(3);
    let mut outcomes = Vec::new();
    for layout in [Layout::One, Layout::Three] {
        let source = root.path().join(format!("{layout:?}"));
        let target = root.path().join(format!("{layout:?}-out"));
        build(&source, layout);
        let applied = patched(&source, &target, &deltas, settings).unwrap();
        outcomes.push((tensors(&target), sorted(applied)));
    }
    let source = root.path().join("One/model.safetensors");
    let target = root.path().join("lone.safetensors");
    let checkpoint = Checkpoint::open(&source).unwrap();
    let mut output = OutputFile::create(&target, Overwrite::Never, &[&source]).unwrap();
    let applied = apply(
        &checkpoint,
        &deltas.wanted(),
        settings,
        Destination::File(&mut output),
        &(),
    )
    .unwrap();
    let _ = output.commit().unwrap();
    outcomes.push((tensors(&target), sorted(applied)));
    assert_eq!(outcomes[0], outcomes[1]);
    assert_eq!(outcomes[0], outcomes[2]);
}

#[test]
fn bytes_and_numbers_do_not_depend_on_the_number_of_threads() {
    let root = tempfile::tempdir().unwrap();
    let source = root.path().join("in");
    build(&source, Layout::Three);
    let deltas = Deltas::for_targets();
    for settings in [ApplySettings::default(), stochastic(9)] {
        let outcomes: Vec<_> = [1, 2, 7]
            .into_iter()
            .map(|threads| {
                let target = root
                    .path()
                    .join(format!("{threads}-{:?}", settings.rounding));
                let pool = rayon::ThreadPoolBuilder::new()
                    .num_threads(threads)
                    .build()
                    .unwrap();
                let applied = pool
                    .install(|| patched(&source, &target, &deltas, settings))
                    .unwrap();
                (applied.files, applied.realized)
            })
            .collect();
        assert_eq!(outcomes[0], outcomes[1]);
        assert_eq!(outcomes[0], outcomes[2]);
    }
}

#[test]
fn a_strength_of_zero_gives_identical_files() {
    let root = tempfile::tempdir().unwrap();
    let source = root.path().join("in");
    build(&source, Layout::Three);
    let deltas = Deltas::for_targets();
    for rounding in [Rounding::Nearest, Rounding::Stochastic { seed: 1 }] {
        let target = root.path().join(format!("{rounding:?}"));
        let settings = ApplySettings {
            strength: Strength::new(0.0).unwrap(),
            rounding,
            ..ApplySettings::default()
        };
        let applied = patched(&source, &target, &deltas, settings).unwrap();
        for file in &applied.files {
            assert_eq!(
                file.sha256,
                Sha256::of_file(&source.join(&file.name)).unwrap(),
                "{}",
                file.name
            );
        }
        assert_eq!(applied.realized.total.moved, 0);
        assert_eq!(applied.realized.total.cosine, None);
    }
}

#[test]
fn the_realized_change_is_that_of_the_stored_values() {
    let root = tempfile::tempdir().unwrap();
    let source = root.path().join("in");
    build(&source, Layout::One);
    let deltas = Deltas::for_targets();
    let target = root.path().join("out");
    let applied = patched(&source, &target, &deltas, ApplySettings::default()).unwrap();
    let (before, after) = (
        Checkpoint::open(&source).unwrap(),
        Checkpoint::open(&target).unwrap(),
    );
    let (mut wanted_total, mut moved_total) = (0.0, 0);
    for change in &applied.realized.tensors {
        let (_, _, delta) = deltas
            .0
            .iter()
            .find(|(name, ..)| *name == change.name)
            .unwrap();
        let (old, new) = (
            before.tensor(&change.name).unwrap(),
            after.tensor(&change.name).unwrap(),
        );
        let (mut a, mut b) = (vec![0.0; delta.len()], vec![0.0; delta.len()]);
        old.widen_into(0..delta.len(), &mut a).unwrap();
        new.widen_into(0..delta.len(), &mut b).unwrap();
        let finite: Vec<usize> = (0..delta.len()).filter(|&i| a[i].is_finite()).collect();
        let realized: Vec<f64> = finite
            .iter()
            .map(|&i| f64::from(b[i]) - f64::from(a[i]))
            .collect();
        let wanted: f64 = delta.iter().map(|&d| f64::from(d).powi(2)).sum();
        let squared: f64 = realized.iter().map(|r| r * r).sum();
        let dot: f64 = finite
            .iter()
            .zip(&realized)
            .map(|(&i, r)| f64::from(delta[i]) * r)
            .sum();
        let moved = realized.iter().filter(|&&r| r != 0.0).count() as u64;
        let found = change.change;
        // Only the order of the f64 sums differs.
        let near =
            |x: f64, y: f64| assert!((x - y).abs() <= 1e-12 * y.abs(), "{}: {x} {y}", change.name);
        near(found.wanted_norm, wanted.sqrt());
        near(found.realized_norm, squared.sqrt());
        near(found.cosine.unwrap(), dot / (wanted * squared).sqrt());
        assert_eq!((found.elements, found.moved), (delta.len() as u64, moved));
        assert_eq!(found.not_finite, (delta.len() - finite.len()) as u64);
        let largest = finite.iter().map(|&i| a[i].abs()).fold(0.0, f32::max);
        assert_eq!(found.largest_weight.to_bits(), largest.to_bits());
        wanted_total += wanted;
        moved_total += moved;
    }
    let total = applied.realized.total;
    assert!((total.wanted_norm - f64::sqrt(wanted_total)).abs() < 1e-12 * total.wanted_norm);
    assert_eq!(total.moved, moved_total);
    assert_eq!(
        total.not_finite, 3,
        "the F16 tensor has three elements that are not finite"
    );
    assert!(total.moved_share() > 0.5 && total.moved_share() < 1.0);
}

#[test]
fn ties_go_to_the_even_value() {
    let root = tempfile::tempdir().unwrap();
    let source = root.path().join("in.safetensors");
    let target = root.path().join("out.safetensors");
    // 1 + 1/128 is the BF16 value after 1, 1 + 1/1024 the F16 one; a step of half of that is a tie, by IEEE 754 section 4.3.1.
    let ones: Vec<u8> = [0x80, 0x3F].repeat(4);
    let halves: Vec<u8> = [0x00, 0x3C].repeat(4);
    fs::write(
        &source,
        file(&[
            ("b", Dtype::BF16, &[4], &ones),
            ("h", Dtype::F16, &[4], &halves),
        ]),
    )
    .unwrap();
    let steps = |spacing: f32| {
        [0.5, 1.5, 0.5 + 1e-4, 2.0]
            .map(|step| step * spacing)
            .to_vec()
    };
    let deltas = Deltas(vec![
        ("b".into(), vec![4], steps(1.0 / 128.0)),
        ("h".into(), vec![4], steps(1.0 / 1024.0)),
    ]);
    let checkpoint = Checkpoint::open(&source).unwrap();
    let mut output = OutputFile::create(&target, Overwrite::Never, &[&source]).unwrap();
    apply(
        &checkpoint,
        &deltas.wanted(),
        to_nearest(),
        Destination::File(&mut output),
        &(),
    )
    .unwrap();
    let _ = output.commit().unwrap();
    let patched = tensors(&target);
    assert_eq!(
        patched[0].1,
        [0x80, 0x3F, 0x82, 0x3F, 0x81, 0x3F, 0x82, 0x3F]
    );
    assert_eq!(
        patched[1].1,
        [0x00, 0x3C, 0x02, 0x3C, 0x01, 0x3C, 0x02, 0x3C]
    );
}

#[test]
fn chance_keeps_the_mean_of_steps_that_rounding_would_lose() {
    let root = tempfile::tempdir().unwrap();
    let source = root.path().join("in.safetensors");
    let weights: Vec<u8> = (0..40_000).flat_map(|_| bf16::ONE.to_le_bytes()).collect();
    fs::write(&source, file(&[("w", Dtype::BF16, &[40_000], &weights)])).unwrap();
    // A tenth of the distance from 1 to the next BF16 value.
    let deltas = Deltas(vec![("w".into(), vec![40_000], vec![0.1 / 128.0; 40_000])]);
    let run = |settings, name: &str| {
        let checkpoint = Checkpoint::open(&source).unwrap();
        let mut output =
            OutputFile::create(&root.path().join(name), Overwrite::Never, &[&source]).unwrap();
        let applied = apply(
            &checkpoint,
            &deltas.wanted(),
            settings,
            Destination::File(&mut output),
            &(),
        );
        applied.unwrap()
    };
    assert_eq!(run(to_nearest(), "nearest").realized.total.moved, 0);
    assert!(
        run(ApplySettings::default(), "default")
            .realized
            .total
            .moved
            > 0
    );
    let by_chance = run(stochastic(5), "chance");
    // Five standard deviations, sqrt(40000 * 0.1 * 0.9), are 300.
    assert!((3_700..=4_300).contains(&by_chance.realized.total.moved));
    assert_eq!(by_chance.files, {
        let again = run(stochastic(5), "again").files;
        again
            .into_iter()
            .map(|file| panacea_formats::WrittenFile {
                name: "chance".into(),
                ..file
            })
            .collect::<Vec<_>>()
    });
    assert_ne!(
        by_chance.files[0].sha256,
        run(stochastic(6), "other").files[0].sha256
    );
}

#[test]
fn a_perturbation_file_is_applied_to_its_base_and_to_no_other() {
    let root = tempfile::tempdir().unwrap();
    let source = root.path().join("in");
    build(&source, Layout::Three);
    let deltas = Deltas::for_targets();
    let checkpoint = Checkpoint::open(&source).unwrap();
    let path = root.path().join("p.safetensors");
    let record = PerturbationRecord {
        method: "adaptive".into(),
        parameters: Map::new(),
        seed: 1,
        space: Space::Weights,
        base: describe_base(&checkpoint, deltas.0.iter().map(|(name, ..)| name.as_str())).unwrap(),
        data: Vec::new(),
        tool: "test".into(),
    };
    let mut output = OutputFile::create(&path, Overwrite::Never, &[&source]).unwrap();
    write_perturbation(&mut output, &record, &deltas.tensors()).unwrap();
    let _ = output.commit().unwrap();
    let perturbation = Perturbation::open(&path).unwrap();

    let mut output =
        OutputDir::create(&root.path().join("file"), Overwrite::Never, &[&source]).unwrap();
    let from_file = apply(
        &checkpoint,
        &Wanted::from(&perturbation),
        stochastic(2),
        Destination::Directory(&mut output),
        &(),
    )
    .unwrap();
    let from_memory =
        patched(&source, &root.path().join("memory"), &deltas, stochastic(2)).unwrap();
    assert_eq!(from_file.files, from_memory.files);
    assert_eq!(from_file.realized, from_memory.realized);
    drop(checkpoint);

    // One bit of one targeted tensor.
    let shard = source.join("model-00001-of-00003.safetensors");
    let mut bytes = fs::read(&shard).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&shard, bytes).unwrap();
    let changed = Checkpoint::open(&source).unwrap();
    let target = root.path().join("refused");
    let mut output = OutputDir::create(&target, Overwrite::Never, &[&source]).unwrap();
    let partial = output.partial_path().to_owned();
    let result = apply(
        &changed,
        &Wanted::from(&perturbation),
        ApplySettings::default(),
        Destination::Directory(&mut output),
        &(),
    );
    let Err(ApplyError::Base(problems)) = result else {
        panic!("{result:?}")
    };
    assert_eq!(problems.all().len(), 1, "{problems}");
    assert_eq!(
        fs::read_dir(&partial).unwrap().count(),
        0,
        "nothing is written before the check"
    );
    drop(output);
    assert!(!target.exists() && !partial.exists());
}

#[test]
fn what_would_weaken_or_break_a_model_is_refused() {
    assert_eq!(
        Strength::new(-0.1),
        Err(StrengthError::Negative { found: -0.1 })
    );
    assert_eq!(
        Strength::new(-1e-300),
        Err(StrengthError::Negative { found: -1e-300 })
    );
    assert!(matches!(
        Strength::new(f64::NAN),
        Err(StrengthError::NotFinite { .. })
    ));
    assert!(matches!(
        Strength::new(1e39),
        Err(StrengthError::NotFinite { .. })
    ));
    assert_eq!(Strength::new(-0.0).unwrap().value().to_bits(), 0);

    let wanted = |values: &[f32]| {
        Wanted::in_memory(vec![DeltaTensor::new("w", &[1], values).unwrap()]).map(drop)
    };
    assert!(matches!(
        Wanted::in_memory(Vec::new()).map(drop),
        Err(ApplyError::Empty)
    ));
    assert!(matches!(
        wanted(&[f32::NAN]),
        Err(ApplyError::NotFinite {
            reason: NotFinite::Value { element: 0, .. },
            ..
        })
    ));
    let one = DeltaTensor::new("w", &[1], &[1.0]).unwrap();
    assert!(matches!(
        Wanted::in_memory(vec![one, one]).map(drop),
        Err(ApplyError::Repeated { .. })
    ));

    let root = tempfile::tempdir().unwrap();
    let source = root.path().join("in");
    build(&source, Layout::One);
    let refused = |name: &str, shape: &[usize]| {
        let values = vec![0.0; shape.iter().product()];
        let deltas = Deltas(vec![(name.into(), shape.to_vec(), values)]);
        match patched(
            &source,
            &root.path().join("out"),
            &deltas,
            ApplySettings::default(),
        ) {
            Err(ApplyError::Base(problems)) => problems.to_string(),
            result => panic!("{result:?}"),
        }
    };
    assert!(refused("layers.0.q.wieght", &[4]).contains("did you mean `layers.0.q.weight`?"));
    assert!(refused("ids", &[6]).contains("I64"));
    assert!(refused("layers.0.norm.weight", &[3, 1]).contains("[3, 1]"));
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
}

#[test]
fn a_sum_that_does_not_fit_names_its_tensor_and_element() {
    let root = tempfile::tempdir().unwrap();
    let source = root.path().join("in.safetensors");
    let weights: Vec<u8> = [1.0_f32, 60_000.0]
        .iter()
        .flat_map(|&w| f16::from_f32(w).to_le_bytes())
        .collect();
    fs::write(&source, file(&[("w", Dtype::F16, &[2], &weights)])).unwrap();
    for settings in [ApplySettings::default(), stochastic(1)] {
        let run = |step: f32| {
            let values = [0.0, step];
            let checkpoint = Checkpoint::open(&source).unwrap();
            let wanted =
                Wanted::in_memory(vec![DeltaTensor::new("w", &[2], &values).unwrap()]).unwrap();
            let mut output =
                OutputFile::create(&root.path().join("out"), Overwrite::Never, &[]).unwrap();
            apply(
                &checkpoint,
                &wanted,
                settings,
                Destination::File(&mut output),
                &(),
            )
            .map(drop)
        };
        assert!(run(5_504.0).is_ok(), "65504 is the largest F16");
        let result = run(6_000.0);
        let Err(ApplyError::Write(WriteError::Patch { tensor, source })) = result else {
            panic!("{result:?}")
        };
        assert_eq!(tensor, "w");
        assert!(matches!(
            source,
            AdditionError::Overflow {
                element: 1,
                dtype: Dtype::F16,
                ..
            }
        ));
    }
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
}

#[test]
fn work_can_be_watched_and_interrupted() {
    struct Watch {
        done: AtomicU64,
        stop_at: u64,
    }
    impl Observer for Watch {
        fn advanced(&self, bytes: u64) {
            self.done.fetch_add(bytes, Ordering::Relaxed);
        }
        fn interrupted(&self) -> bool {
            self.done.load(Ordering::Relaxed) >= self.stop_at
        }
    }
    let root = tempfile::tempdir().unwrap();
    let source = root.path().join("in");
    build(&source, Layout::Three);
    let checkpoint = Checkpoint::open(&source).unwrap();
    let total = panacea_formats::copied_bytes(&checkpoint).unwrap();
    let deltas = Deltas::for_targets();
    for stop_at in [1, total / 2, u64::MAX] {
        let watch = Watch {
            done: AtomicU64::new(0),
            stop_at,
        };
        let mut output =
            OutputDir::create(&root.path().join("out"), Overwrite::Never, &[&source]).unwrap();
        let result = apply(
            &checkpoint,
            &deltas.wanted(),
            ApplySettings::default(),
            Destination::Directory(&mut output),
            &watch,
        );
        if stop_at == u64::MAX {
            assert!(result.is_ok());
            assert_eq!(watch.done.into_inner(), total);
        } else {
            assert!(matches!(
                result,
                Err(ApplyError::Write(WriteError::Interrupted))
            ));
        }
    }
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
}

/// Runs as a test of its own only when it is told to by the next one, which kills it.
#[test]
fn child_that_is_killed_while_it_writes() {
    struct Slow;
    impl Observer for Slow {
        fn advanced(&self, _: u64) {
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    let Some(root) = std::env::var_os("PANACEA_TEST_KILLED_IN").map(PathBuf::from) else {
        return;
    };
    let source = root.join("in");
    let checkpoint = Checkpoint::open(&source).unwrap();
    let mut output = OutputDir::create(&root.join("out"), Overwrite::Never, &[&source]).unwrap();
    let deltas = Deltas::for_targets();
    apply(
        &checkpoint,
        &deltas.wanted(),
        ApplySettings::default(),
        Destination::Directory(&mut output),
        &Slow,
    )
    .unwrap();
    std::thread::sleep(Duration::from_secs(60));
    let _ = output.commit().unwrap();
}

#[test]
fn a_killed_process_leaves_nothing_but_its_partial_sibling() {
    let root = tempfile::tempdir().unwrap();
    let source = root.path().join("in");
    build(&source, Layout::Three);
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_that_is_killed_while_it_writes"])
        .env("PANACEA_TEST_KILLED_IN", root.path())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let written = |entry: &Path| fs::read_dir(entry).map_or(0, Iterator::count);
    let started = Instant::now();
    let partial = loop {
        let partial = entries(root.path())
            .into_iter()
            .find(|name| name.starts_with(".out.partial-"));
        match partial {
            Some(partial) if written(&root.path().join(&partial)) > 0 => break partial,
            _ => assert!(
                started.elapsed() < Duration::from_secs(60),
                "the child wrote nothing"
            ),
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    // `kill` sends SIGKILL, which no handler sees.
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(entries(root.path()), [partial, "in".to_owned()]);

    // And the next run is not in its way.
    patched(
        &source,
        &root.path().join("out"),
        &Deltas::for_targets(),
        ApplySettings::default(),
    )
    .unwrap();
    assert_eq!(entries(root.path()).len(), 3);
}

#[derive(Clone, Copy, Debug)]
enum Layout {
    One,
    Three,
}

/// Name, shape and values of each delta.
struct Deltas(Vec<(String, Vec<usize>, Vec<f32>)>);

impl Deltas {
    /// For one tensor of each patchable type; the BF16 one is longer than a chunk. Every seventh value is zero.
    fn for_targets() -> Self {
        let deltas = TENSORS
            .iter()
            .filter(|tensor| tensor.targeted)
            .map(|tensor| {
                let elements: usize = tensor.shape.iter().product();
                let values = noise(tensor.name, elements, 1)
                    .enumerate()
                    .map(|(i, noise)| if i % 7 == 0 { 0.0 } else { 0.01 * noise });
                (
                    tensor.name.to_owned(),
                    tensor.shape.to_vec(),
                    values.collect(),
                )
            });
        Self(deltas.collect())
    }

    fn tensors(&self) -> Vec<DeltaTensor<'_>> {
        let tensor = |(name, shape, values)| DeltaTensor::new(name, shape, values).unwrap();
        self.0
            .iter()
            .map(|(name, shape, values)| {
                tensor((name.as_str(), shape.as_slice(), values.as_slice()))
            })
            .collect()
    }

    fn wanted(&self) -> Wanted<'_> {
        Wanted::in_memory(self.tensors()).unwrap()
    }
}

struct Tensor {
    name: &'static str,
    dtype: Dtype,
    shape: &'static [usize],
    targeted: bool,
    shard: usize,
}

/// More than one chunk of BF16, and no whole number of chunks.
const LONG: usize = CHUNK_BYTES / 2 + 12_345;

const TENSORS: &[Tensor] = &[
    Tensor {
        name: "embed.weight",
        dtype: Dtype::BF16,
        shape: &[50, 3],
        targeted: false,
        shard: 0,
    },
    Tensor {
        name: "layers.0.q.weight",
        dtype: Dtype::BF16,
        shape: &[1, LONG],
        targeted: true,
        shard: 0,
    },
    Tensor {
        name: "ids",
        dtype: Dtype::I64,
        shape: &[6],
        targeted: false,
        shard: 1,
    },
    Tensor {
        name: "layers.0.up.weight",
        dtype: Dtype::F32,
        shape: &[33, 31],
        targeted: true,
        shard: 1,
    },
    Tensor {
        name: "layers.0.norm.weight",
        dtype: Dtype::F16,
        shape: &[3],
        targeted: false,
        shard: 1,
    },
    Tensor {
        name: "layers.1.down.weight",
        dtype: Dtype::F16,
        shape: &[2, 2, 601],
        targeted: true,
        shard: 2,
    },
    Tensor {
        name: "last",
        dtype: Dtype::U8,
        shape: &[5],
        targeted: false,
        shard: 2,
    },
];

/// Writes the checkpoint of `TENSORS` to `directory`. The F16 target has three elements that are not finite, and all have zeros
/// of both signs.
fn build(directory: &Path, layout: Layout) {
    fs::create_dir_all(directory.join("sub")).unwrap();
    fs::write(directory.join("config.json"), b"{\"a\" : 1}\n").unwrap();
    fs::write(directory.join("sub/notes.txt"), b"notes").unwrap();
    let bytes: Vec<Vec<u8>> = TENSORS.iter().map(stored).collect();
    let of = |shard: Option<usize>| {
        let tensors: Vec<_> = TENSORS
            .iter()
            .zip(&bytes)
            .filter(|(tensor, _)| shard.is_none_or(|shard| tensor.shard == shard))
            .map(|(tensor, bytes)| (tensor.name, tensor.dtype, tensor.shape, bytes.as_slice()))
            .collect();
        file(&tensors)
    };
    match layout {
        Layout::One => fs::write(directory.join("model.safetensors"), of(None)).unwrap(),
        Layout::Three => {
            let name = |shard: usize| format!("model-0000{}-of-00003.safetensors", shard + 1);
            for shard in 0..3 {
                fs::write(directory.join(name(shard)), of(Some(shard))).unwrap();
            }
            let map: Map<_, _> = TENSORS
                .iter()
                .map(|tensor| (tensor.name.to_owned(), json!(name(tensor.shard))))
                .collect();
            fs::write(
                directory.join("model.safetensors.index.json"),
                json!({"metadata": {"total_size": 0}, "weight_map": map}).to_string(),
            )
            .unwrap();
        }
    }
}

fn stored(tensor: &Tensor) -> Vec<u8> {
    let elements: usize = tensor.shape.iter().product();
    let values = noise(tensor.name, elements, 0)
        .enumerate()
        .map(|(i, noise)| match i % 13 {
            0 => 0.0,
            1 => -0.0,
            _ => noise,
        });
    let mut bytes: Vec<u8> = match tensor.dtype {
        Dtype::F32 | Dtype::F16 | Dtype::BF16 => values
            .flat_map(|value| nearest(tensor.dtype, value))
            .collect(),
        dtype => (0..dtype.bytes_of(elements).unwrap())
            .map(|i| u8::try_from(i % 251).unwrap())
            .collect(),
    };
    if tensor.dtype == Dtype::F16 && tensor.targeted {
        // A NaN with a payload, and both infinities.
        for (i, bits) in [(8, 0x7E55_u16), (9, 0x7C00), (10, 0xFC00)] {
            bytes[2 * i..][..2].copy_from_slice(&bits.to_le_bytes());
        }
    }
    bytes
}

/// Reproducible values in -1..1.
fn noise(name: &str, elements: usize, salt: u32) -> impl Iterator<Item = f32> {
    let mut state = name.bytes().fold(salt.wrapping_mul(77), |state, byte| {
        state.wrapping_mul(31).wrapping_add(u32::from(byte))
    });
    (0..elements).map(move |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        #[expect(clippy::cast_precision_loss, reason = "24 bits fit")]
        let unit = (state >> 8) as f32 / 8_388_608.0;
        unit - 1.0
    })
}

fn value(dtype: Dtype, bytes: &[u8]) -> f32 {
    match *bytes {
        [a, b, c, d] => f32::from_le_bytes([a, b, c, d]),
        [a, b] if dtype == Dtype::F16 => f16::from_le_bytes([a, b]).to_f32(),
        [a, b] => bf16::from_le_bytes([a, b]).to_f32(),
        _ => panic!("{dtype}"),
    }
}

fn nearest(dtype: Dtype, value: f32) -> Vec<u8> {
    match dtype {
        Dtype::F16 => f16::from_f32(value).to_le_bytes().to_vec(),
        Dtype::BF16 => bf16::from_f32(value).to_le_bytes().to_vec(),
        _ => value.to_le_bytes().to_vec(),
    }
}

fn patched(
    source: &Path,
    target: &Path,
    deltas: &Deltas,
    settings: ApplySettings,
) -> Result<Applied, ApplyError> {
    let checkpoint = Checkpoint::open(source).unwrap();
    let mut output = OutputDir::create(target, Overwrite::Never, &[source]).unwrap();
    let applied = apply(
        &checkpoint,
        &deltas.wanted(),
        settings,
        Destination::Directory(&mut output),
        &(),
    )?;
    let _ = output.commit().unwrap();
    Ok(applied)
}

fn to_nearest() -> ApplySettings {
    ApplySettings {
        rounding: Rounding::Nearest,
        ..ApplySettings::default()
    }
}

fn stochastic(seed: u64) -> ApplySettings {
    ApplySettings {
        rounding: Rounding::Stochastic { seed },
        ..ApplySettings::default()
    }
}

/// Name and bytes of every tensor, by name.
fn tensors(path: &Path) -> Vec<(String, Vec<u8>)> {
    let checkpoint = Checkpoint::open(path).unwrap();
    let mut tensors: Vec<_> = checkpoint
        .tensors()
        .map(|tensor| (tensor.name.to_owned(), tensor.bytes.to_vec()))
        .collect();
    tensors.sort();
    tensors
}

fn sorted(applied: Applied) -> Vec<(String, panacea_patch::apply::Change)> {
    let mut tensors: Vec<_> = applied
        .realized
        .tensors
        .into_iter()
        .map(|tensor| (tensor.name, tensor.change))
        .collect();
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    tensors
}

fn entries(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// A safetensors file of `tensors`.
fn file(tensors: &[(&str, Dtype, &[usize], &[u8])]) -> Vec<u8> {
    let mut header = Map::new();
    let mut data = Vec::new();
    for (name, dtype, shape, bytes) in tensors {
        let begin = data.len();
        data.extend_from_slice(bytes);
        let entry =
            json!({"dtype": dtype.name(), "shape": shape, "data_offsets": [begin, data.len()]});
        header.insert((*name).to_owned(), entry);
    }
    let header = serde_json::Value::Object(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(&data);
    file
}
