//! GGUF files in several parts: all of them are one checkpoint, parts that do not fit together are refused, and a copy has all parts.

#![expect(clippy::unwrap_used, reason = "a test may fail loudly")]

use std::convert::Infallible;
use std::fs;
use std::ops::Range;
use std::path::PathBuf;
use std::slice;

use panacea_formats::gguf::{GgufError, GgufLayout, Metadata, Split, TensorInfo, Value};
use panacea_formats::{
    Checkpoint, CheckpointError, Destination, Dtype, FormatError, FormatErrorKind, Layout,
    OutputDir, Overwrite, PartProblem, Patch, Sha256, TensorView, write_checkpoint,
};
use tempfile::TempDir;

#[test]
fn the_parts_of_a_file_are_one_checkpoint_opened_at_the_first() {
    let parts = Parts::sound();
    let checkpoint = parts.open(0).unwrap();
    assert_eq!(checkpoint.layout(), Layout::SplitGguf);
    assert!(!checkpoint.layout().is_one_file() && checkpoint.layout().is_gguf());
    let files: Vec<&str> = checkpoint.files().iter().map(|it| &*it.name).collect();
    let expected = [0, 1, 2].map(name);
    assert_eq!(files, expected);
    let tensors: Vec<&str> = checkpoint.tensors().map(|tensor| tensor.name).collect();
    assert_eq!(tensors, ["a", "x0", "x1", "b"]);
    assert_eq!(checkpoint.tensor("b").unwrap().bytes, [b'b'; 64]);
    let metadata = checkpoint.gguf_metadata().unwrap();
    assert_eq!(
        metadata.value("general.name"),
        Some(&Value::Text("m".to_owned()))
    );
    assert!(checkpoint.side_files().unwrap().copied.is_empty());
}

#[test]
fn a_later_part_is_refused_with_the_name_of_the_first() {
    let parts = Parts::sound();
    for number in [1, 2] {
        let error = parts.open(number).unwrap_err();
        let CheckpointError::LaterPart { first } = reason(&error) else {
            panic!("{error:?}")
        };
        assert_eq!(*first, name(0));
        assert!(error.kind.to_string().contains(&name(0)));
    }
}

#[test]
fn every_part_that_is_missing_is_named() {
    let parts = Parts::sound();
    for number in [1, 2] {
        fs::remove_file(parts.path(number)).unwrap();
    }
    let missing = [1, 2].map(|number| PartProblem::Missing { part: name(number) });
    assert_eq!(parts.problems(), missing);
}

#[test]
fn a_part_must_have_the_name_that_it_says() {
    let parts = Parts::sound();
    for (number, other) in [
        (0, "m.gguf"),
        (0, "m-00002-of-00003.gguf"),
        (1, "m-00001-of-00003.gguf"),
        (0, "-00001-of-00003.gguf"),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(other);
        fs::copy(parts.path(number), &path).unwrap();
        let error = Checkpoint::open(&path).unwrap_err();
        let CheckpointError::PartName { part, wanted } = reason(&error) else {
            panic!("{other}: {error:?}")
        };
        assert_eq!(*part, u32::from(number) + 1);
        assert_eq!(*wanted, format!("NAME-0000{}-of-00003.gguf", number + 1));
    }
}

#[test]
fn parts_that_say_other_things_are_refused() {
    let wanted = split(1, 3, 4);
    for claimed in [
        split(2, 3, 4),
        split(1, 4, 4),
        split(1, 3, 5),
        split(0, 2, 4),
    ] {
        let parts = Parts::sound();
        parts.write(1, Some(claimed), &[("x1", Dtype::F16, 512)]);
        let claim = PartProblem::Claim {
            part: name(1),
            wanted,
            claimed: Some(claimed),
        };
        assert_eq!(parts.problems(), [claim]);
    }
    let parts = Parts::sound();
    parts.write(1, None, &[("x1", Dtype::F16, 512)]);
    let claim = PartProblem::Claim {
        part: name(1),
        wanted,
        claimed: None,
    };
    assert!(
        claim
            .to_string()
            .ends_with("says that it is a whole file, not part 2 of 3 with 4 tensors")
    );
    assert_eq!(parts.problems(), [claim]);
}

#[test]
fn all_tensors_are_there_and_each_once() {
    let parts = Parts::sound();
    parts.write(1, Some(split(1, 3, 4)), &[]);
    let count = PartProblem::TensorCount {
        claimed: 4,
        found: 3,
    };
    assert_eq!(parts.problems(), slice::from_ref(&count));

    parts.write(1, Some(split(1, 3, 4)), &[("b", Dtype::F16, 32)]);
    let twice = PartProblem::TensorTwice {
        tensor: "b".to_owned(),
        parts: [name(1), name(2)],
    };
    assert_eq!(parts.problems(), slice::from_ref(&twice));

    parts.write(
        1,
        Some(split(1, 3, 4)),
        &[("b", Dtype::F16, 32), ("c", Dtype::F16, 32)],
    );
    let count = PartProblem::TensorCount {
        claimed: 4,
        found: 5,
    };
    assert_eq!(parts.problems(), [twice, count]);
}

#[test]
fn tensors_of_unknown_types_are_counted_and_told_apart_too() {
    let parts = Parts::sound();
    let strange = |name| TensorInfo::raw(name, 1000, &[3], 32).unwrap();
    parts.write_infos(1, Some(split(1, 3, 4)), &[strange("x1")]);
    let checkpoint = parts.open(0).unwrap();
    assert!(checkpoint.tensor("x1").is_none());
    parts.write_infos(1, Some(split(1, 3, 4)), &[strange("a")]);
    let twice = PartProblem::TensorTwice {
        tensor: "a".to_owned(),
        parts: [name(0), name(1)],
    };
    assert_eq!(parts.problems(), [twice]);
}

#[test]
fn an_unsound_part_is_named() {
    let parts = Parts::sound();
    fs::write(parts.path(2), b"GGUF").unwrap();
    let error = parts.open(0).unwrap_err();
    assert_eq!(error.path, parts.path(2));
    assert!(matches!(
        error.kind,
        FormatErrorKind::Gguf(GgufError::PastEnd { .. })
    ));
}

#[test]
fn one_part_of_one_is_one_file_under_any_name() {
    // 0 is what is left when llama.cpp puts parts together again.
    for count in [0, 1] {
        let parts = Parts::sound();
        parts.write(0, Some(split(0, count, 4)), &[("a", Dtype::F32, 8)]);
        let path = parts.0.path().join("one.gguf");
        fs::rename(parts.path(0), &path).unwrap();
        let checkpoint = Checkpoint::open(&path).unwrap();
        assert_eq!(checkpoint.layout(), Layout::Gguf);
        assert_eq!(checkpoint.files().len(), 1);
    }
}

#[test]
fn a_copy_has_all_parts_each_with_its_own_header() {
    let parts = Parts::sound();
    let (target, written) = parts.copied(Dtype::F16);
    for number in [0, 1, 2] {
        let mut expected = fs::read(parts.path(number)).unwrap();
        let checkpoint = parts.open(0).unwrap();
        let digest = Sha256::of(&expected);
        assert_eq!(written.sources[usize::from(number)], (name(number), digest));
        if let Some(tensor) = ["x0", "x1"].get(usize::from(number)) {
            let tensor = checkpoint.tensor(tensor).unwrap();
            let file = checkpoint.files()[usize::from(number)].file.file_bytes();
            let start = tensor.bytes.as_ptr().addr() - file.as_ptr().addr();
            expected[start..start + tensor.bytes.len()].fill(0);
        }
        let found = fs::read(target.path().join("out").join(name(number))).unwrap();
        assert!(found == expected, "{number}");
        let file = &written.files[usize::from(number)];
        assert_eq!(
            (&*file.name, file.sha256),
            (&*name(number), Sha256::of(&found))
        );
    }
}

#[test]
fn a_copy_with_other_types_has_all_parts_and_is_sound() {
    let parts = Parts::sound();
    let (target, _) = parts.copied(Dtype::Q8_0);
    let before = parts.open(0).unwrap();
    let after = Checkpoint::open(&target.path().join("out").join(name(0))).unwrap();
    assert_eq!(after.layout(), Layout::SplitGguf);
    assert_eq!(after.gguf_metadata(), before.gguf_metadata());
    for (found, stored) in after.tensors().zip(before.tensors()) {
        assert_eq!((found.name, found.shape), (stored.name, stored.shape));
        match found.name.starts_with('x') {
            true => {
                assert_eq!((found.dtype, found.bytes), (Dtype::Q8_0, &[0; 544][..]));
            }
            false => assert_eq!((found.dtype, found.bytes), (stored.dtype, stored.bytes)),
        }
    }
}

/// Three parts of one file in a directory: `a` and `x0`, `x1`, and `b`; those that begin with `x` have 512 elements.
struct Parts(TempDir);

impl Parts {
    fn sound() -> Self {
        let parts = Self(tempfile::tempdir().unwrap());
        let all: [&[(&str, Dtype, usize)]; 3] = [
            &[("a", Dtype::F32, 5), ("x0", Dtype::F16, 512)],
            &[("x1", Dtype::F16, 512)],
            &[("b", Dtype::F16, 32)],
        ];
        for (number, tensors) in (0..3).zip(all) {
            parts.write(number, Some(split(number, 3, 4)), tensors);
        }
        parts
    }

    fn write(&self, number: u16, claimed: Option<Split>, tensors: &[(&str, Dtype, usize)]) {
        let infos: Vec<TensorInfo> = tensors
            .iter()
            .map(|&(name, dtype, length)| TensorInfo::new(name, dtype, &[length]).unwrap())
            .collect();
        self.write_infos(number, claimed, &infos);
    }

    /// The bytes of a tensor are the last of its name.
    fn write_infos(&self, number: u16, claimed: Option<Split>, tensors: &[TensorInfo]) {
        let mut metadata = Metadata::default();
        if number == 0 {
            metadata.set("general.name", Value::Text("m".to_owned()));
        }
        if let Some(split) = claimed {
            metadata.set("split.no", Value::U16(split.number));
            metadata.set("split.count", Value::U16(split.count));
            metadata.set("split.tensors.count", Value::I32(split.tensors));
        }
        let layout = GgufLayout::new(&metadata, tensors).unwrap();
        let mut file = layout.header().to_vec();
        for (index, tensor) in tensors.iter().enumerate() {
            let fill = *tensor.name().as_bytes().last().unwrap();
            file.resize(file.len() + tensor.bytes(), fill);
            file.resize(file.len() + layout.padding(index), 0);
        }
        fs::write(self.path(number), file).unwrap();
    }

    fn path(&self, number: u16) -> PathBuf {
        self.0.path().join(name(number))
    }

    fn open(&self, number: u16) -> Result<Checkpoint, FormatError> {
        Checkpoint::open(&self.path(number))
    }

    fn problems(&self) -> Vec<PartProblem> {
        let error = self.open(0).unwrap_err();
        assert_eq!(error.path, self.path(0));
        match reason(&error) {
            CheckpointError::Parts(problems) => problems.all().to_vec(),
            _ => panic!("{error:?}"),
        }
    }

    /// A copy into the folder `out`, in which all that begins with `x` is zeros of `dtype`.
    fn copied(&self, dtype: Dtype) -> (TempDir, panacea_formats::WrittenCheckpoint) {
        let target = tempfile::tempdir().unwrap();
        let checkpoint = self.open(0).unwrap();
        let path = target.path().join("out");
        let mut output = OutputDir::create(&path, Overwrite::Never, &[self.0.path()]).unwrap();
        let destination = Destination::Directory(&mut output);
        let written =
            write_checkpoint(&checkpoint, &Zeros(dtype), destination, &(), |_, ()| {}).unwrap();
        let _ = output.commit().unwrap();
        (target, written)
    }
}

fn name(number: u16) -> String {
    format!("m-0000{}-of-00003.gguf", number + 1)
}

fn split(number: u16, count: u16, tensors: i32) -> Split {
    Split {
        number,
        count,
        tensors,
    }
}

fn reason(error: &FormatError) -> &CheckpointError {
    match &error.kind {
        FormatErrorKind::Checkpoint(reason) => reason,
        other => panic!("{other:?}"),
    }
}

struct Zeros(Dtype);

impl Patch for Zeros {
    type Report = ();
    type Error = Infallible;

    fn targets(&self, tensor: &TensorView<'_>) -> bool {
        tensor.name.starts_with('x')
    }

    fn dtype(&self, _: &TensorView<'_>) -> Dtype {
        self.0
    }

    fn patch(
        &self,
        _: &TensorView<'_>,
        _: Range<usize>,
        bytes: &mut [u8],
    ) -> Result<(), Infallible> {
        bytes.fill(0);
        Ok(())
    }
}
