//! Every file of `testdata/hostile` is refused for the reason that it states, or accepted if it says `sound`; and thousands of
//! mutations of the sound ones are refused or accepted without a panic.

#![expect(clippy::unwrap_used, reason = "a test may fail loudly")]

use std::fs;
use std::path::{Path, PathBuf};

use panacea_formats::gguf::GgufFile;
use panacea_formats::{Checkpoint, FormatError, INDEX_FILE, Perturbation, SafetensorsFile};

#[test]
fn safetensors_files_are_refused_for_the_reason_they_state() {
    run("safetensors", |bytes| safetensors(bytes).map(drop));
}

#[test]
fn the_safetensors_crate_refuses_nothing_that_is_read_here() {
    for case in cases("safetensors") {
        if safetensors(case.bytes.clone()).is_ok() {
            let second_opinion = safetensors::SafeTensors::deserialize(&case.bytes);
            assert!(
                second_opinion.is_ok(),
                "{}: {second_opinion:?}",
                case.path.display()
            );
        }
    }
}

#[test]
fn perturbations_are_refused_for_the_reason_they_state() {
    run("perturbation", |bytes| {
        Perturbation::from_bytes(Path::new("perturbation"), bytes).map(drop)
    });
}

#[test]
fn gguf_files_are_refused_for_the_reason_they_state() {
    run("gguf", |bytes| gguf(bytes).map(drop));
}

#[test]
fn indexes_are_refused_for_the_reason_they_state() {
    let directory = tempfile::tempdir().unwrap();
    for (name, tensors) in [
        ("one.safetensors", &["a", "b"][..]),
        ("two.safetensors", &["c"]),
        ("twin.safetensors", &["c", "t"]),
    ] {
        fs::write(directory.path().join(name), shard(tensors)).unwrap();
    }
    run("index", |bytes| {
        fs::write(directory.path().join(INDEX_FILE), bytes).unwrap();
        Checkpoint::open(directory.path()).map(drop)
    });
}

#[test]
fn messages_are_short_and_steer_no_terminal() {
    let check = |result: Result<(), FormatError>, path: &Path| {
        let Err(error) = result else { return };
        let mut cause: Option<&dyn std::error::Error> = Some(&error);
        while let Some(current) = cause {
            let text = current.to_string();
            assert!(
                text.len() < 2500,
                "{}: {} bytes",
                path.display(),
                text.len()
            );
            assert!(
                !text.chars().any(char::is_control),
                "{}: {text:?}",
                path.display()
            );
            cause = current.source();
        }
    };
    for case in cases("safetensors") {
        check(safetensors(case.bytes).map(drop), &case.path);
    }
    for case in cases("perturbation") {
        check(
            Perturbation::from_bytes(Path::new("p"), case.bytes).map(drop),
            &case.path,
        );
    }
    for case in cases("gguf") {
        check(gguf(case.bytes).map(drop), &case.path);
    }
    let long = format!("{{\"{}\\u001b[2J\":1}}", "x".repeat(100_000));
    let bytes = [&(long.len() as u64).to_le_bytes(), long.as_bytes()].concat();
    check(safetensors(bytes).map(drop), Path::new("long name"));
}

#[test]
fn mutated_files_never_cause_a_panic() {
    let mut refused = 0;
    for folder in ["safetensors", "perturbation"] {
        let seeds: Vec<Vec<u8>> = cases(folder)
            .into_iter()
            .map(|case| case.bytes)
            .filter(|bytes| bytes.len() < 2000)
            .collect();
        let mut random = Random(0x9E37_79B9_7F4A_7C15);
        for round in 0..6000 {
            let mut bytes = seeds[round % seeds.len()].clone();
            for _ in 0..=random.below(3) {
                mutate(&mut bytes, &seeds, &mut random);
            }
            let opened = safetensors(bytes.clone());
            if let Ok(file) = &opened {
                // What was accepted can be walked, and the second opinion agrees.
                let seen: usize = file.tensors().map(|tensor| tensor.bytes.len()).sum();
                assert_eq!(seen + file.header_bytes().len(), bytes.len());
                assert!(safetensors::SafeTensors::deserialize(&bytes).is_ok());
            }
            refused += usize::from(opened.is_err());
            let _ = Perturbation::from_bytes(Path::new("mutated"), bytes);
        }
    }
    // Both outcomes must occur, or the mutations test one side only.
    assert!(
        (6000..11_990).contains(&refused),
        "{refused} of 12000 refused"
    );
}

#[test]
fn mutated_gguf_files_never_cause_a_panic() {
    let seeds: Vec<Vec<u8>> = cases("gguf")
        .into_iter()
        .map(|case| case.bytes)
        .filter(|bytes| bytes.len() < 2000)
        .collect();
    let mut random = Random(0x9E37_79B9_7F4A_7C15);
    let mut refused = 0;
    for round in 0..20_000 {
        let mut bytes = seeds[round % seeds.len()].clone();
        for _ in 0..=random.below(3) {
            mutate(&mut bytes, &seeds, &mut random);
        }
        let Ok(file) = gguf(bytes) else {
            refused += 1;
            continue;
        };
        // What was accepted can be walked, and each byte of data is of one tensor or of the padding behind it.
        let mut end = file.header_bytes().len();
        for tensor in file.tensors() {
            let gap = tensor.offset - end;
            assert!(gap < usize::try_from(file.alignment()).unwrap());
            end = tensor.offset + tensor.bytes.len();
            let found = file.tensor(tensor.name).unwrap();
            assert_eq!((found.offset, found.bytes), (tensor.offset, tensor.bytes));
        }
        assert!(end <= file.length());
    }
    // Both outcomes must occur, or the mutations test one side only.
    assert!(
        (10_000..19_900).contains(&refused),
        "{refused} of 20000 refused"
    );
}

struct Case {
    path: PathBuf,
    expect: String,
    bytes: Vec<u8>,
}

fn cases(folder: &str) -> Vec<Case> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../testdata/hostile")
        .join(folder);
    let mut paths: Vec<PathBuf> = fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.sort();
    assert!(
        paths.len() > 15,
        "{} has only {} cases",
        folder.display(),
        paths.len()
    );
    paths
        .into_iter()
        .map(|path| {
            let file = fs::read(&path).unwrap();
            let end = file.windows(2).position(|pair| pair == b"\n\n").unwrap();
            let head = std::str::from_utf8(&file[..end]).unwrap();
            let expect = head
                .lines()
                .next()
                .and_then(|line| line.strip_prefix("expect: "));
            Case {
                expect: expect
                    .unwrap_or_else(|| panic!("{}", path.display()))
                    .to_owned(),
                bytes: file[end + 2..].to_vec(),
                path,
            }
        })
        .collect()
}

fn run(folder: &str, mut read: impl FnMut(Vec<u8>) -> Result<(), FormatError>) {
    let mut wrong = Vec::new();
    for case in cases(folder) {
        let found = match read(case.bytes) {
            Ok(()) => "sound".to_owned(),
            Err(error) => variant(&error),
        };
        if found != case.expect {
            wrong.push(format!(
                "{}: expected {}, found {found}",
                case.path.display(),
                case.expect
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The innermost variant of the error's kind: the last word of its `Debug` form before its fields.
fn variant(error: &FormatError) -> String {
    let debug = format!("{:?}", error.kind);
    let head = debug.split('{').next().unwrap_or_default();
    head.split(|c: char| !c.is_alphanumeric())
        .rfind(|word| !word.is_empty())
        .unwrap_or_default()
        .to_owned()
}

fn safetensors(bytes: Vec<u8>) -> Result<SafetensorsFile, FormatError> {
    SafetensorsFile::from_bytes(Path::new("hostile"), bytes)
}

fn gguf(bytes: Vec<u8>) -> Result<GgufFile, FormatError> {
    GgufFile::from_bytes(Path::new("hostile"), bytes)
}

/// A sound file in which each of `names` is four bytes.
fn shard(names: &[&str]) -> Vec<u8> {
    let entries: Vec<String> = names
        .iter()
        .enumerate()
        .map(|(i, name)| {
            format!(
                r#""{name}":{{"dtype":"U8","shape":[4],"data_offsets":[{},{}]}}"#,
                4 * i,
                4 * i + 4
            )
        })
        .collect();
    let header = format!("{{{}}}", entries.join(","));
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.resize(file.len() + 4 * names.len(), 0);
    file
}

/// SplitMix64: enough to choose mutations, and the same on every machine.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % (limit.max(1) as u64)).unwrap()
    }
}

/// One change: a byte, a digit, a cut, a repetition, or a piece of another file. Half of them keep the header's length right, so
/// that the mutation reaches the parser behind it.
fn mutate(bytes: &mut Vec<u8>, seeds: &[Vec<u8>], random: &mut Random) {
    let length = bytes.len();
    let place = random.below(length);
    match random.below(6) {
        0 if length > 0 => bytes[place] = random.next().to_le_bytes()[0],
        1 => {
            let digits: Vec<usize> = (8..length).filter(|&i| bytes[i].is_ascii_digit()).collect();
            if let Some(&digit) = digits.get(random.below(digits.len())) {
                bytes[digit] = b"0123456789-.e"[random.below(13)];
            }
        }
        2 => bytes.truncate(place),
        3 => {
            let end = (place + random.below(40)).min(length);
            let piece = bytes[place..end].to_vec();
            bytes.splice(place..place, piece);
        }
        4 => {
            let other = &seeds[random.below(seeds.len())];
            let start = random.below(other.len());
            let end = (start + random.below(60)).min(other.len());
            let stop = (place + random.below(20)).min(length);
            bytes.splice(place..stop, other[start..end].iter().copied());
        }
        _ => {
            let data = random.below(16);
            bytes.extend((0..data).map(|_| 0));
        }
    }
    if random.below(2) == 0
        && let Some(end) = bytes.iter().rposition(|&byte| byte == b'}')
        && end > 8
    {
        bytes[..8].copy_from_slice(&(end as u64 - 7).to_le_bytes());
    }
}
