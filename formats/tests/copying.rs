//! Copies with chosen tensors changed: exact at every seam, one pass, and the same failure on any number of threads.

#![expect(clippy::unwrap_used, reason = "a test may fail loudly")]

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use panacea_formats::{
    CHUNK_BYTES, Checkpoint, Destination, INDEX_FILE, Observer, OutputDir, Overwrite, Patch,
    Sha256, TensorView, WriteError, WrittenCheckpoint, write_checkpoint,
};
use thiserror::Error;

/// Lengths around those that the writer cuts at: a sector, a chunk, a window of two.
const LENGTHS: &[usize] = &[
    2,
    4096 - 200,
    4096,
    CHUNK_BYTES - 2,
    CHUNK_BYTES + 2,
    2 * CHUNK_BYTES,
    5 * CHUNK_BYTES + 4096 + 6,
];

#[test]
fn every_byte_of_a_chosen_tensor_is_patched_and_no_other_at_any_length() {
    for (place, &length) in LENGTHS.iter().enumerate() {
        // Chosen tensors at the beginning, in the middle, at the end, next to each other, and none at all.
        for names in [
            ["x", "b", "c"],
            ["a", "x", "c"],
            ["a", "b", "x"],
            ["a", "x", "x2"],
            ["a", "b", "c"],
        ] {
            let other = LENGTHS[(place + 3) % LENGTHS.len()];
            let lengths = [other, length, 10];
            let tensors: Vec<(&str, usize)> = names.into_iter().zip(lengths).collect();
            let root = tempfile::tempdir().unwrap();
            let source = root.path().join("in");
            checkpoint(&source, &[&tensors]);
            let written = copied(&source, &root.path().join("out"), &Flip).unwrap();
            check(&source, &root.path().join("out"), &written);
        }
    }
}

#[test]
fn shards_are_told_apart_and_each_has_the_digest_of_what_was_read() {
    let root = tempfile::tempdir().unwrap();
    let source = root.path().join("in");
    let long = 3 * CHUNK_BYTES + 2;
    checkpoint(
        &source,
        &[
            &[("a", 10), ("x0", long)],
            &[("b", long)],
            &[("x1", 6), ("c", 6)],
            &[("d", 4096), ("x2", CHUNK_BYTES)],
            &[("x3", 2 * CHUNK_BYTES)],
        ],
    );
    for threads in [1, 2, 7] {
        let target = root.path().join(format!("out-{threads}"));
        let written = in_pool(threads, || copied(&source, &target, &Flip)).unwrap();
        check(&source, &target, &written);
    }
}

#[test]
fn of_several_failures_the_first_file_is_named_on_any_number_of_threads() {
    let root = tempfile::tempdir().unwrap();
    let source = root.path().join("in");
    let long = 3 * CHUNK_BYTES;
    checkpoint(
        &source,
        &[
            &[("x0", long)],
            &[("a", long), ("bad1", 2 * CHUNK_BYTES), ("bad2", long)],
            &[("bad3", 10)],
            &[("bad4", 10)],
        ],
    );
    for threads in [1, 2, 7] {
        for _ in 0..3 {
            let target = root.path().join("out");
            let error = in_pool(threads, || copied(&source, &target, &Flip)).unwrap_err();
            let WriteError::Patch { tensor, source } = error else {
                panic!("{error:?}")
            };
            assert_eq!((tensor.as_str(), source.element), ("bad1", 0));
            assert!(!target.exists());
        }
    }
}

#[test]
fn progress_adds_up_and_an_interruption_ends_the_copy_soon() {
    let root = tempfile::tempdir().unwrap();
    let source = root.path().join("in");
    let long = 10 * CHUNK_BYTES;
    checkpoint(&source, &[&[("a", long)], &[("x", long)], &[("b", long)]]);
    let total = panacea_formats::copied_bytes(&Checkpoint::open(&source).unwrap()).unwrap();
    for stop_at in [0, total / 2, u64::MAX] {
        let watch = Watch {
            done: AtomicU64::new(0),
            stop_at,
        };
        let checkpoint = Checkpoint::open(&source).unwrap();
        let mut output =
            OutputDir::create(&root.path().join("out"), Overwrite::Never, &[]).unwrap();
        let result = write_checkpoint(
            &checkpoint,
            &Flip,
            Destination::Directory(&mut output),
            &watch,
            |_, _| {},
        );
        let done = watch.done.into_inner();
        if stop_at == u64::MAX {
            assert_eq!((result.is_ok(), done), (true, total));
        } else {
            assert!(matches!(result, Err(WriteError::Interrupted)));
            // A window of each of two files can be under way.
            assert!(done <= stop_at + 4 * CHUNK_BYTES as u64, "{done}");
        }
    }
}

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

/// Flips the lowest bit of every byte of tensors whose names begin with `x`, and fails at those that begin with `bad`: the earlier
/// in the checkpoint, the later in time.
struct Flip;

#[derive(Debug, Error)]
#[error("bad")]
struct Bad {
    element: usize,
}

impl Patch for Flip {
    type Report = (usize, usize);
    type Error = Bad;

    fn targets(&self, tensor: &TensorView<'_>) -> bool {
        tensor.name.starts_with('x') || tensor.name.starts_with("bad")
    }

    fn patch(
        &self,
        tensor: &TensorView<'_>,
        elements: Range<usize>,
        bytes: &mut [u8],
    ) -> Result<(usize, usize), Bad> {
        if let Some(number) = tensor.name.strip_prefix("bad") {
            let wait = if elements.start == 0 {
                4 - number.parse::<u64>().unwrap()
            } else {
                0
            };
            thread::sleep(Duration::from_millis(20 * wait));
            return Err(Bad {
                element: elements.start,
            });
        }
        assert_eq!(bytes.len(), 2 * elements.len());
        for byte in bytes {
            *byte ^= 1;
        }
        Ok((elements.start, elements.end))
    }
}

fn copied(
    source: &Path,
    target: &Path,
    patch: &Flip,
) -> Result<WrittenCheckpoint, WriteError<Bad>> {
    let checkpoint = Checkpoint::open(source).unwrap();
    let mut output = OutputDir::create(target, Overwrite::Never, &[source]).unwrap();
    let mut reports: Vec<(String, (usize, usize))> = Vec::new();
    let written = write_checkpoint(
        &checkpoint,
        patch,
        Destination::Directory(&mut output),
        &(),
        |name, range| reports.push((name.to_owned(), range)),
    )?;
    // File after file, tensor after tensor, chunk after chunk, and all of each.
    let mut expected = Vec::new();
    for tensor in checkpoint.tensors().filter(|tensor| patch.targets(tensor)) {
        let elements = tensor.elements();
        for start in (0..elements).step_by(CHUNK_BYTES / 2) {
            let end = elements.min(start + CHUNK_BYTES / 2);
            expected.push((tensor.name.to_owned(), (start, end)));
        }
    }
    assert_eq!(reports, expected);
    let _ = output.commit().unwrap();
    Ok(written)
}

/// Whether `target` is `source` with every chosen tensor's bytes flipped, and `written` says so.
fn check(source: &Path, target: &Path, written: &WrittenCheckpoint) {
    let before = Checkpoint::open(source).unwrap();
    let digests: BTreeMap<_, _> = written
        .files
        .iter()
        .map(|file| (file.name.as_str(), (file.bytes, file.sha256)))
        .collect();
    let mut sources = Vec::new();
    for shard in before.files() {
        let mut bytes = fs::read(source.join(&shard.name)).unwrap();
        sources.push((shard.name.clone(), Sha256::of(&bytes)));
        let mut position = shard.file.header_bytes().len();
        for tensor in shard.file.tensors() {
            let end = position + tensor.bytes.len();
            if tensor.name.starts_with('x') {
                bytes[position..end].iter_mut().for_each(|byte| *byte ^= 1);
            }
            position = end;
        }
        assert!(
            fs::read(target.join(&shard.name)).unwrap() == bytes,
            "{}",
            shard.name
        );
        let expected = (bytes.len() as u64, Sha256::of(&bytes));
        assert_eq!(digests[shard.name.as_str()], expected, "{}", shard.name);
    }
    assert_eq!(written.sources, sources);
}

/// A checkpoint whose shards have BF16 tensors of these names and lengths in bytes.
fn checkpoint(directory: &Path, shards: &[&[(&str, usize)]]) {
    fs::create_dir(directory).unwrap();
    let mut map = Vec::new();
    for (number, tensors) in shards.iter().enumerate() {
        let name = format!("{number}.safetensors");
        let (mut entries, mut begin) = (Vec::new(), 0);
        for (tensor, length) in *tensors {
            let end = begin + length;
            entries.push(format!(
                r#""{tensor}":{{"dtype":"BF16","shape":[{}],"data_offsets":[{begin},{end}]}}"#,
                length / 2
            ));
            map.push(format!(r#""{tensor}":"{name}""#));
            begin = end;
        }
        let header = format!("{{{}}}", entries.join(","));
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        let mut state = u32::try_from(number).unwrap();
        bytes.extend((0..begin).map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state.to_be_bytes()[0]
        }));
        fs::write(directory.join(name), bytes).unwrap();
    }
    let index = format!(r#"{{"metadata":{{}},"weight_map":{{{}}}}}"#, map.join(","));
    fs::write(directory.join(INDEX_FILE), index).unwrap();
}

fn in_pool<R: Send>(threads: usize, work: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .unwrap()
        .install(work)
}
