//! What is written is read back, here and by the `safetensors` crate; what other writers wrote is read alike; the bytes are
//! those that the documentation describes.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use panacea_formats::{
    BaseProblem, BaseTensor, Checkpoint, CheckpointError, DataSource, DeltaTensor, Destination,
    Dtype, FormatErrorKind, INDEX_FILE, Layout, LeftOut, OutputDir, OutputFile, Overwrite, Patch,
    Perturbation, PerturbationRecord, PerturbationWriteError, SafetensorsFile, Sha256, Space,
    TensorProblem, TensorView, WEIGHTS_FILE, WeightsFile, WriteError, check_base, copied_bytes,
    describe_base, write_checkpoint, write_perturbation,
};
use proptest::prelude::*;
use serde_json::json;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn files_of_the_safetensors_crate_are_read_alike(
        tensors in prop::collection::btree_map("[a-z.\u{e9}\"\\\\]{1,12}", (0_usize..22, prop::collection::vec(0_usize..5, 0..4)), 0..8),
        metadata in prop::option::of(prop::collection::hash_map("[ -~]{0,8}", "[ -~\u{1F600}]{0,8}", 0..3)),
    ) {
        let mut stored = Vec::new();
        for (i, (name, (dtype, shape))) in tensors.iter().enumerate() {
            let dtype = Dtype::ALL[*dtype];
            if let Some(size) = dtype.bytes_of(shape.iter().product()) {
                let bytes: Vec<u8> = (0..size).map(|byte| u8::try_from((byte * 31 + i) % 251).unwrap()).collect();
                stored.push((name.clone(), dtype, shape.clone(), bytes));
            }
        }
        let views = stored.iter().map(|(name, dtype, shape, bytes)| {
            let dtype = serde_json::from_value(json!(dtype.name())).unwrap();
            (name, safetensors::tensor::TensorView::new(dtype, shape.clone(), bytes).unwrap())
        });
        // Of no tensors and empty metadata, safetensors 0.8.0 writes a file that it cannot read itself.
        let metadata = metadata.filter(|metadata| !(metadata.is_empty() && stored.is_empty()));
        let file = safetensors::serialize(views, metadata.clone()).unwrap();
        let read = SafetensorsFile::from_bytes(Path::new("theirs"), file.clone()).unwrap();
        prop_assert_eq!(read.tensors().len(), stored.len());
        for (name, dtype, shape, bytes) in &stored {
            let view = read.tensor(name).unwrap();
            prop_assert_eq!((view.name, view.dtype, view.shape, view.bytes), (name.as_str(), *dtype, &shape[..], &bytes[..]));
            prop_assert_eq!(view.elements(), shape.iter().product::<usize>());
        }
        prop_assert!(read.tensor("not there").is_none());
        let pairs: HashMap<String, String> = read.metadata().iter().cloned().collect();
        prop_assert_eq!(pairs, metadata.unwrap_or_default());
        prop_assert_eq!(read.digest(), Sha256::of(&file));
    }

    #[test]
    fn perturbations_are_read_back_as_written(
        tensors in prop::collection::btree_map("[a-zA-Z0-9._\u{e9}\"]{1,12}", prop::collection::vec(-1e30_f32..1e30, 1..40), 1..6),
        seed in any::<u64>(),
    ) {
        let root = tempfile::tempdir().unwrap();
        let shapes: Vec<[usize; 2]> = tensors.values().map(|values| [1, values.len()]).collect();
        let deltas: Vec<_> = tensors
            .iter()
            .zip(&shapes)
            .rev()
            .map(|((name, values), shape)| DeltaTensor::new(name, shape, values).unwrap())
            .collect();
        let record = record_for(&deltas, seed);
        let path = root.path().join("p.safetensors");
        let digest = write(&path, &record, &deltas).unwrap();
        prop_assert_eq!(digest, Sha256::of_file(&path).unwrap());

        let read = Perturbation::open(&path).unwrap();
        prop_assert_eq!(read.record(), &record);
        for (delta, (name, values)) in read.deltas().zip(&tensors) {
            let mut found = vec![0.0; delta.elements()];
            delta.read_into(0..found.len(), &mut found).unwrap();
            prop_assert_eq!((delta.name(), &found), (name.as_str(), values));
        }
        let bytes = fs::read(&path).unwrap();
        let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        prop_assert_eq!(theirs.len(), tensors.len());
    }
}

/// A delta in memory, with an owner for its numbers.
#[derive(Clone, Debug)]
struct Owned {
    shape: [usize; 2],
    numbers: Numbers,
}

#[derive(Clone, Debug)]
enum Numbers {
    Dense(Vec<f32>),
    LowRank(Vec<f32>, Vec<f32>),
    Sparse(Vec<u32>, Vec<f32>),
}

impl Owned {
    fn delta<'a>(&'a self, name: &'a str) -> Option<DeltaTensor<'a>> {
        match &self.numbers {
            Numbers::Dense(values) => DeltaTensor::new(name, &self.shape, values),
            Numbers::LowRank(a, b) => DeltaTensor::low_rank(name, &self.shape, a, b),
            Numbers::Sparse(indices, values) => {
                DeltaTensor::sparse(name, &self.shape, indices, values)
            }
        }
    }

    /// The values by the definitions of the forms, written down again.
    fn values(&self) -> Vec<f32> {
        let [outputs, inputs] = self.shape;
        match &self.numbers {
            Numbers::Dense(values) => values.clone(),
            Numbers::LowRank(a, b) => {
                let rank = a.len() / inputs;
                let element = |row: usize, column: usize| {
                    (0..rank).fold(0.0, |sum, k| {
                        sum + b[row * rank + k] * a[k * inputs + column]
                    })
                };
                (0..outputs * inputs)
                    .map(|place| element(place / inputs, place % inputs))
                    .collect()
            }
            Numbers::Sparse(indices, values) => {
                let mut all = vec![0.0; outputs * inputs];
                for (&index, &value) in indices.iter().zip(values) {
                    all[index as usize] = value;
                }
                all
            }
        }
    }
}

fn any_delta() -> impl Strategy<Value = Owned> {
    (1_usize..7, 1_usize..7, 0_usize..3, any::<usize>()).prop_flat_map(
        |(outputs, inputs, form, seed)| {
            let elements = outputs * inputs;
            let rank = 1 + seed % outputs.min(inputs);
            let few = prop::collection::vec(-1e3_f32..1e3, (inputs + outputs) * rank);
            let values = prop::collection::vec(-1e30_f32..1e30, elements);
            let chosen = prop::collection::vec(any::<bool>(), elements);
            (few, values, chosen).prop_map(move |(mut factors, mut values, chosen)| {
                let numbers = match form {
                    0 => Numbers::Dense(values),
                    1 => {
                        let b = factors.split_off(rank * inputs);
                        Numbers::LowRank(factors, b)
                    }
                    _ => {
                        let indices: Vec<u32> = (0..)
                            .zip(chosen)
                            .filter_map(|(index, chosen)| chosen.then_some(index))
                            .collect();
                        values.truncate(indices.len());
                        Numbers::Sparse(indices, values)
                    }
                };
                Owned {
                    shape: [outputs, inputs],
                    numbers,
                }
            })
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_form_is_read_back_as_written(
        tensors in prop::collection::btree_map("[a-zA-Z0-9._\u{e9}\"]{1,12}", any_delta(), 1..6),
        cut in any::<(usize, usize)>(),
    ) {
        let root = tempfile::tempdir().unwrap();
        let deltas: Vec<_> = tensors.iter().rev().map(|(name, owned)| owned.delta(name).unwrap()).collect();
        let record = record_for(&deltas, 7);
        let path = root.path().join("p.safetensors");
        write(&path, &record, &deltas).unwrap();

        let read = Perturbation::open(&path).unwrap();
        prop_assert_eq!(read.record(), &record);
        prop_assert_eq!(read.deltas().len(), tensors.len());
        let mut stored = 0;
        for found in read.deltas() {
            let owned = &tensors[found.name()];
            let written = owned.delta(found.name()).unwrap();
            let values = owned.values();
            prop_assert_eq!((found.shape(), found.form()), (&owned.shape[..], written.form()));
            prop_assert_eq!(found.factors(), written.factors());
            prop_assert_eq!(found.stored_bytes(), written.stored_bytes());
            stored += found.stored_bytes();
            let mut ends = [cut.0 % (values.len() + 1), cut.1 % (values.len() + 1)];
            ends.sort_unstable();
            for range in [0..values.len(), ends[0]..ends[1]] {
                let mut room = vec![f32::NAN; range.len()];
                found.read_into(range.clone(), &mut room).unwrap();
                prop_assert_eq!(&room, &values[range.clone()]);
                written.read_into(range.clone(), &mut room).unwrap();
                prop_assert_eq!(&room, &values[range]);
            }
        }
        let bytes = fs::read(&path).unwrap();
        prop_assert_eq!(read.file().header_bytes().len() as u64 + stored, bytes.len() as u64);
        prop_assert!(safetensors::SafeTensors::deserialize(&bytes).is_ok());
    }
}

#[test]
fn compact_forms_have_exactly_these_bytes() {
    let root = tempfile::tempdir().unwrap();
    let deltas = [
        DeltaTensor::sparse("v", &[70_000], &[1, 65_537], &[0.5, -0.25]).unwrap(),
        DeltaTensor::low_rank("w", &[2, 1], &[1.0], &[0.5, -0.25]).unwrap(),
    ];
    let path = root.path().join("p.safetensors");
    write(&path, &record_for(&deltas, 7), &deltas).unwrap();
    let found = fs::read(&path).unwrap();
    let header_length =
        usize::try_from(u64::from_le_bytes(found[..8].try_into().unwrap())).unwrap();
    let header = std::str::from_utf8(&found[8..8 + header_length]).unwrap();
    assert!(
        header.trim_end().ends_with(
            "\"v.indices\":{\"dtype\":\"U32\",\"shape\":[2],\"data_offsets\":[0,8]},\
             \"v.values\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,16]},\
             \"w.lora_A\":{\"dtype\":\"F32\",\"shape\":[1,1],\"data_offsets\":[16,20]},\
             \"w.lora_B\":{\"dtype\":\"F32\",\"shape\":[2,1],\"data_offsets\":[20,28]}}"
        ),
        "{header}"
    );
    assert_eq!(
        found[8 + header_length..],
        [
            1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0x3F, 0, 0, 0x80, 0xBE, 0, 0, 0x80, 0x3F, 0, 0, 0,
            0x3F, 0, 0, 0x80, 0xBE
        ]
    );
}

#[test]
fn a_perturbation_has_exactly_these_bytes() {
    let root = tempfile::tempdir().unwrap();
    let values = [0.5_f32, -0.25];
    let deltas = [DeltaTensor::new("w", &[2], &values).unwrap()];
    let record = record_for(&deltas, 7);
    let path = root.path().join("p.safetensors");
    write(&path, &record, &deltas).unwrap();

    let digest = Sha256::of(b"base w").to_string();
    let rows = Sha256::of(b"rows").to_string();
    let metadata = format!(
        "{{\"base\":{{\"w\":{{\"dtype\":\"BF16\",\"sha256\":\"{digest}\",\"shape\":[2]}}}},\
         \"data\":[{{\"name\":\"h.jsonl\",\"role\":\"harmful\",\"rows\":3,\"sha256\":\"{rows}\"}}],\
         \"direction\":\"restores-safety\",\"format_version\":1,\"method\":\"adaptive\",\
         \"parameters\":{{\"lambda\":1e-7,\"rho\":0.5}},\"seed\":7,\"space\":\"weights\",\"tool\":\"panacea-patch 0.1.0\"}}"
    );
    let mut header = format!(
        "{{\"__metadata__\":{{\"panacea\":\"{}\"}},\"w\":{{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}}}",
        metadata.replace('"', "\\\"")
    );
    while header.len() % 8 != 0 {
        header.push(' ');
    }
    let mut wanted = (header.len() as u64).to_le_bytes().to_vec();
    wanted.extend_from_slice(header.as_bytes());
    wanted.extend_from_slice(&[0, 0, 0, 0x3F, 0, 0, 0x80, 0xBE]);
    let found = fs::read(&path).unwrap();
    assert_eq!(
        String::from_utf8_lossy(&found),
        String::from_utf8_lossy(&wanted)
    );
    assert_eq!(found, wanted);
}

#[test]
fn a_perturbation_that_does_not_fit_its_record_is_not_written() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("p.safetensors");
    let values = [0.5_f32, f32::NAN];
    let good = DeltaTensor::new("w", &[1], &values[..1]).unwrap();
    let record = record_for(&[good], 7);
    let problem = |deltas: &[DeltaTensor<'_>]| match write(&path, &record, deltas).unwrap_err() {
        PerturbationWriteError::Tensors(problems) => problems.all()[0].clone(),
        error => panic!("{error}"),
    };
    assert!(matches!(problem(&[]), TensorProblem::Absent { .. }));
    assert!(matches!(
        problem(&[good, good]),
        TensorProblem::Undescribed { .. }
    ));
    let other = DeltaTensor::new("v", &[1], &values[..1]).unwrap();
    assert!(matches!(
        problem(&[good, other]),
        TensorProblem::Undescribed { .. }
    ));
    let shaped = DeltaTensor::new("w", &[1, 1], &values[..1]).unwrap();
    assert!(matches!(problem(&[shaped]), TensorProblem::Shape { .. }));
    let not_finite = DeltaTensor::new("w", &[1], &values[1..]).unwrap();
    assert!(matches!(
        problem(&[not_finite]),
        TensorProblem::NotFinite { element: 0, .. }
    ));
    assert!(DeltaTensor::new("w", &[3], &values).is_none());
    assert!(DeltaTensor::new("w", &[usize::MAX, 2], &values).is_none());

    let matrix = DeltaTensor::low_rank("w", &[1, 2], &[1.0; 4], &[1.0; 2]).unwrap();
    let named = DeltaTensor::new("w.lora_A", &[1], &values[..1]).unwrap();
    for (deltas, wanted) in [
        (&[matrix][..], "of rank 2, and its shape allows 1"),
        (&[matrix, named], "stored as `w.lora_A`"),
    ] {
        let error = write(&path, &record_for(deltas, 7), deltas).unwrap_err();
        assert!(error.to_string().contains(wanted), "{error}");
    }
    let large = DeltaTensor::low_rank("w", &[1, 2], &[1e30, 0.0], &[1e30]).unwrap();
    let infinite = DeltaTensor::sparse("w", &[2], &[1], &[f32::INFINITY]).unwrap();
    for (delta, part) in [
        (large, "may reach 1.0"),
        (infinite, "`w.values` is not finite"),
    ] {
        let error = write(&path, &record_for(&[delta], 7), &[delta]).unwrap_err();
        assert!(error.to_string().contains(part), "{error}");
    }
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
}

#[test]
fn the_base_of_a_perturbation_is_checked_tensor_by_tensor() {
    let root = tempfile::tempdir().unwrap();
    let a = vec![1; 8];
    fs::write(
        root.path().join(WEIGHTS_FILE),
        file(&[
            ("layer.weight", "BF16", &[4], &a),
            ("norm.weight", "F16", &[4], &a),
            ("ids", "I32", &[2], &a),
        ]),
    )
    .unwrap();
    let checkpoint = Checkpoint::open(root.path()).unwrap();
    let base = describe_base(&checkpoint, ["layer.weight", "norm.weight"]).unwrap();
    assert_eq!(base["layer.weight"].sha256, Sha256::of(&a));
    assert!(check_base(&base, &checkpoint).is_ok());

    let problems =
        describe_base(&checkpoint, ["ids", "layer.weights", "nothing like it"]).unwrap_err();
    for part in [
        "`ids`",
        "did you mean `layer.weight`?",
        "no tensor `nothing like it`",
    ] {
        assert!(problems.to_string().contains(part), "{problems}");
    }

    let mut changed = base.clone();
    changed.get_mut("layer.weight").unwrap().sha256 = Sha256::of(b"");
    changed.get_mut("norm.weight").unwrap().dtype = Dtype::BF16;
    let mut moved = base["layer.weight"].clone();
    moved.shape = vec![2, 2];
    changed.insert("lm_head.weight".into(), moved.clone());
    let problems = check_base(&changed, &checkpoint).unwrap_err();
    assert!(matches!(
        problems.all(),
        [
            BaseProblem::Digest { .. },
            BaseProblem::Missing { .. },
            BaseProblem::Dtype { .. }
        ]
    ));
    let shape = check_base(
        &BTreeMap::from([("layer.weight".to_owned(), moved)]),
        &checkpoint,
    )
    .unwrap_err();
    assert!(matches!(shape.all(), [BaseProblem::Shape { .. }]));
}

#[test]
fn a_copy_without_targets_is_byte_identical_in_every_layout() {
    let root = tempfile::tempdir().unwrap();
    let sharded = root.path().join("sharded");
    fs::create_dir(&sharded).unwrap();
    // An order of entries, a metadata order and a spelling that no writer of ours would choose.
    let odd = "{ \"b\":{\"data_offsets\":[4,8],\"shape\":[4],\"dtype\":\"U8\"},\"__metadata__\":{\"z\":\"1\",\"a\":\"2\"},\
               \"a\":{\"dtype\":\"BF16\",\"shape\":[2,1],\"data_offsets\":[0,4]}}   ";
    fs::write(sharded.join("x.safetensors"), raw(odd, b"12345678")).unwrap();
    fs::write(
        sharded.join("y.safetensors"),
        file(&[("c", "F32", &[], b"abcd")]),
    )
    .unwrap();
    let index = json!({"metadata": {}, "weight_map": {"a": "x.safetensors", "b": "x.safetensors", "c": "y.safetensors"}});
    fs::write(sharded.join(INDEX_FILE), index.to_string()).unwrap();
    fs::write(sharded.join("config.json"), b"{ }").unwrap();

    let checkpoint = Checkpoint::open(&sharded).unwrap();
    assert_eq!(checkpoint.layout(), Layout::Sharded);
    let names: Vec<&str> = checkpoint.tensors().map(|tensor| tensor.name).collect();
    assert_eq!(names, ["a", "b", "c"]);
    let WeightsFile::Safetensors(shard) = &checkpoint.files()[0].file else {
        panic!("another format");
    };
    assert_eq!(
        shard.names_in_header_order().collect::<Vec<_>>(),
        ["b", "a"]
    );
    assert_eq!(shard.metadata()[0], ("z".to_owned(), "1".to_owned()));
    let copy = root.path().join("copy");
    let mut output = OutputDir::create(&copy, Overwrite::Never, &[&sharded]).unwrap();
    let written = write_checkpoint(
        &checkpoint,
        &Untouched,
        Destination::Directory(&mut output),
        &(),
        |_, ()| {},
    )
    .unwrap();
    let _ = output.commit().unwrap();
    let names: Vec<&str> = written
        .files
        .iter()
        .map(|file| file.name.as_str())
        .collect();
    assert_eq!(
        names,
        ["config.json", INDEX_FILE, "x.safetensors", "y.safetensors"]
    );
    for file in &written.files {
        let bytes = fs::read(copy.join(&file.name)).unwrap();
        assert_eq!(
            bytes,
            fs::read(sharded.join(&file.name)).unwrap(),
            "{}",
            file.name
        );
        assert_eq!(
            (file.bytes, file.sha256),
            (bytes.len() as u64, Sha256::of(&bytes))
        );
    }
    let total: u64 = written.files.iter().map(|file| file.bytes).sum();
    assert_eq!(copied_bytes(&checkpoint).unwrap(), total);

    let lone = sharded.join("x.safetensors");
    let checkpoint = Checkpoint::open(&lone).unwrap();
    assert_eq!(checkpoint.layout(), Layout::LoneFile);
    assert_eq!(
        checkpoint.side_file("config.json"),
        Some(sharded.join("config.json"))
    );
    assert_eq!(checkpoint.side_file("tokenizer.json"), None);
    let mut output =
        OutputDir::create(&root.path().join("wrong"), Overwrite::Never, &[&lone]).unwrap();
    let wrong = write_checkpoint(
        &checkpoint,
        &Untouched,
        Destination::Directory(&mut output),
        &(),
        |_, ()| {},
    );
    assert!(matches!(wrong, Err(WriteError::KindOfOutput)));
    let target = root.path().join("lone.safetensors");
    let mut output = OutputFile::create(&target, Overwrite::Never, &[&lone]).unwrap();
    let written = write_checkpoint(
        &checkpoint,
        &Untouched,
        Destination::File(&mut output),
        &(),
        |_, ()| {},
    )
    .unwrap();
    let _ = output.commit().unwrap();
    assert_eq!(written.files[0].name, "lone.safetensors");
    assert_eq!(fs::read(&target).unwrap(), fs::read(&lone).unwrap());
}

#[test]
fn side_files_travel_and_other_weights_training_state_and_old_attestations_do_not() {
    let root = tempfile::tempdir().unwrap();
    let path = |name: &str| {
        let path = root.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        path
    };
    let travel = [
        "LICENSE.txt",
        "README.md",
        "additional_chat_templates/tool_use.jinja",
        "config.json",
        "modeling_custom.py",
        "tokenizer.json",
        "tokenizer.model",
    ];
    let stay = [
        (".git", ".git/config", LeftOut::VersionControl),
        (
            "checkpoint-500",
            "checkpoint-500/config.json",
            LeftOut::TrainingState,
        ),
        (
            "consolidated.safetensors",
            "consolidated.safetensors",
            LeftOut::Weights,
        ),
        ("model.sig", "model.sig", LeftOut::Attestation),
        (
            "old/adapter.SAFETENSORS",
            "old/adapter.SAFETENSORS",
            LeftOut::Weights,
        ),
        ("optimizer.pt", "optimizer.pt", LeftOut::TrainingState),
        (
            "panacea.manifest.json",
            "panacea.manifest.json",
            LeftOut::Attestation,
        ),
        ("pytorch_model.bin", "pytorch_model.bin", LeftOut::Weights),
        (
            "pytorch_model.bin.index.json",
            "pytorch_model.bin.index.json",
            LeftOut::Weights,
        ),
        ("q4.gguf", "q4.gguf", LeftOut::Weights),
        (
            "training_args.bin",
            "training_args.bin",
            LeftOut::TrainingState,
        ),
    ];
    for name in travel {
        fs::write(path(name), name).unwrap();
    }
    for (_, name, _) in stay {
        fs::write(path(name), b"").unwrap();
    }
    fs::write(path(INDEX_FILE), b"stale").unwrap();
    fs::write(path(WEIGHTS_FILE), file(&[("a", "U8", &[1], b"a")])).unwrap();
    symlink("/nowhere", path("dangling.json")).unwrap();
    symlink(root.path(), path("loop")).unwrap();

    let side_files = Checkpoint::open(root.path()).unwrap().side_files().unwrap();
    let copied: Vec<&str> = side_files
        .copied
        .iter()
        .map(|file| file.name.as_str())
        .collect();
    assert_eq!(copied, travel);
    let code: Vec<&str> = side_files
        .copied
        .iter()
        .filter(|file| file.is_code)
        .map(|file| file.name.as_str())
        .collect();
    assert_eq!(code, ["modeling_custom.py"]);
    let mut wanted: Vec<(String, LeftOut)> = stay
        .iter()
        .map(|&(name, _, reason)| (name.to_owned(), reason))
        .collect();
    wanted.push(("dangling.json".into(), LeftOut::NotRegular));
    wanted.push(("loop".into(), LeftOut::NotRegular));
    wanted.sort_by(|a, b| a.0.cmp(&b.0));
    assert_eq!(side_files.left_out, wanted);
}

#[test]
fn a_cache_snapshot_of_links_becomes_regular_files() {
    let root = tempfile::tempdir().unwrap();
    let blobs = root.path().join("blobs");
    let snapshot = root.path().join("snapshots/1234");
    fs::create_dir_all(&blobs).unwrap();
    fs::create_dir_all(&snapshot).unwrap();
    fs::write(blobs.join("aa"), file(&[("a", "U8", &[1], b"a")])).unwrap();
    fs::write(blobs.join("bb"), b"{}").unwrap();
    symlink("../../blobs/aa", snapshot.join(WEIGHTS_FILE)).unwrap();
    symlink("../../blobs/bb", snapshot.join("config.json")).unwrap();
    let checkpoint = Checkpoint::open(&snapshot).unwrap();
    let target = root.path().join("out");
    let mut output = OutputDir::create(&target, Overwrite::Never, &[&snapshot]).unwrap();
    write_checkpoint(
        &checkpoint,
        &Untouched,
        Destination::Directory(&mut output),
        &(),
        |_, ()| {},
    )
    .unwrap();
    let _ = output.commit().unwrap();
    for (name, blob) in [(WEIGHTS_FILE, "aa"), ("config.json", "bb")] {
        assert!(fs::symlink_metadata(target.join(name)).unwrap().is_file());
        assert_eq!(
            fs::read(target.join(name)).unwrap(),
            fs::read(blobs.join(blob)).unwrap()
        );
    }
}

#[test]
fn paths_that_are_no_checkpoint_are_refused_with_what_was_found() {
    let root = tempfile::tempdir().unwrap();
    let kind = |path: &Path| Checkpoint::open(path).unwrap_err();
    let missing = kind(&root.path().join("missing"));
    assert!(matches!(missing.kind, FormatErrorKind::Io(_)) && !missing.is_environment());
    let text = |error: &panacea_formats::FormatError| error.kind.to_string();
    assert!(text(&kind(root.path())).contains("neither"));
    fs::write(root.path().join("pytorch_model.bin"), b"").unwrap();
    assert!(text(&kind(root.path())).contains("`pytorch_model.bin` is not read"));
    let pickle = kind(&root.path().join("pytorch_model.bin"));
    assert!(matches!(
        pickle.kind,
        FormatErrorKind::Checkpoint(CheckpointError::OtherFormat { .. })
    ));
    fs::create_dir(root.path().join(WEIGHTS_FILE)).unwrap();
    assert!(matches!(kind(root.path()).kind, FormatErrorKind::Io(_)));
    assert!(matches!(
        kind(Path::new("/dev/null")).kind,
        FormatErrorKind::Io(_)
    ));
}

#[test]
fn a_file_that_changed_its_length_while_open_is_noticed() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("a.safetensors");
    fs::write(&path, file(&[("a", "U8", &[4], b"abcd")])).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert!(checkpoint.check_unchanged().is_ok());
    let longer = fs::OpenOptions::new().append(true).open(&path).unwrap();
    longer
        .set_len(longer.metadata().unwrap().len() + 1)
        .unwrap();
    let mut output =
        OutputFile::create(&root.path().join("out"), Overwrite::Never, &[&path]).unwrap();
    let result = write_checkpoint(
        &checkpoint,
        &Untouched,
        Destination::File(&mut output),
        &(),
        |_, ()| {},
    );
    let Err(WriteError::Input(error)) = result else {
        panic!("{result:?}")
    };
    assert!(matches!(error.kind, FormatErrorKind::Changed { .. }));
}

/// Chooses nothing.
struct Untouched;

impl Patch for Untouched {
    type Report = ();
    type Error = std::convert::Infallible;

    fn targets(&self, _: &TensorView<'_>) -> bool {
        false
    }

    fn patch(
        &self,
        _: &TensorView<'_>,
        _: std::ops::Range<usize>,
        _: &mut [u8],
    ) -> Result<(), Self::Error> {
        Ok(())
    }
}

fn write(
    path: &Path,
    record: &PerturbationRecord,
    deltas: &[DeltaTensor<'_>],
) -> Result<Sha256, PerturbationWriteError> {
    let mut output = OutputFile::create(path, Overwrite::Never, &[])?;
    let written = write_perturbation(&mut output, record, deltas)?;
    let _ = output.commit()?;
    Ok(written.sha256)
}

fn record_for(deltas: &[DeltaTensor<'_>], seed: u64) -> PerturbationRecord {
    let base = deltas.iter().map(|delta| {
        let tensor = BaseTensor {
            dtype: Dtype::BF16,
            shape: delta.shape().to_vec(),
            sha256: Sha256::of(format!("base {}", delta.name()).as_bytes()),
        };
        (delta.name().to_owned(), tensor)
    });
    let serde_json::Value::Object(parameters) = json!({"rho": 0.5, "lambda": 1e-7}) else {
        unreachable!()
    };
    PerturbationRecord {
        method: "adaptive".into(),
        parameters,
        seed,
        space: Space::Weights,
        base: base.collect(),
        data: vec![DataSource {
            role: "harmful".into(),
            name: "h.jsonl".into(),
            sha256: Sha256::of(b"rows"),
            rows: 3,
        }],
        tool: "panacea-patch 0.1.0".into(),
    }
}

/// A safetensors file of `tensors`: name, element type, shape, bytes.
fn file(tensors: &[(&str, &str, &[usize], &[u8])]) -> Vec<u8> {
    let mut entries = Vec::new();
    let mut data = Vec::new();
    for (name, dtype, shape, bytes) in tensors {
        let begin = data.len();
        data.extend_from_slice(bytes);
        entries.push(format!(
            "{}:{}",
            json!(name),
            json!({"dtype": dtype, "shape": shape, "data_offsets": [begin, data.len()]})
        ));
    }
    raw(&format!("{{{}}}", entries.join(",")), &data)
}

fn raw(header: &str, data: &[u8]) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(data);
    file
}
