//! The memory that a copy takes, measured rather than promised: it does not grow with the checkpoint.
//!
//! A test binary of its own, because the counting allocator sees every allocation of the process. Maps of the input files are
//! not allocations; the kernel takes their pages back when it needs them.

#![expect(clippy::unwrap_used, reason = "a test may fail loudly")]

use std::alloc::{GlobalAlloc, Layout as Block, System};
use std::convert::Infallible;
use std::fs;
use std::io::Write as _;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use panacea_formats::{
    CHUNK_BYTES, Checkpoint, Destination, OutputDir, OutputFile, Overwrite, Patch, TensorView,
    write_checkpoint,
};

#[test]
fn a_copy_takes_three_windows_for_each_of_two_files_whatever_its_size() {
    let directory = tempfile::tempdir().unwrap();
    // 1 MiB for everything that is no window: names, segments, the thread pool.
    let limit = |files: usize| files * 3 * 2 * CHUNK_BYTES + (1 << 20);
    for (shards, files) in [(1, 1), (5, 2)] {
        for size in [40 << 20, 160 << 20] {
            let peak = peak_of_copying(directory.path(), size, shards);
            assert!(
                peak <= limit(files),
                "{peak} bytes for {size} in {shards} files"
            );
            // A lower bound shows that the allocator counts.
            assert!(
                peak >= 4 * CHUNK_BYTES,
                "{peak} bytes for {size} in {shards} files"
            );
        }
    }
}

/// The most bytes allocated at once while a checkpoint of `bytes` bytes is opened and copied, all of it patched. One shard is a lone file.
fn peak_of_copying(directory: &Path, bytes: usize, shards: usize) -> usize {
    let directory = tempfile::tempdir_in(directory).unwrap();
    let input = directory.path().join("in");
    fs::create_dir(&input).unwrap();
    let mut index = Vec::new();
    for shard in 0..shards {
        let length = bytes / shards / 2 * 2;
        let header = format!(
            r#"{{"w{shard}":{{"dtype":"BF16","shape":[{}],"data_offsets":[0,{length}]}}}}"#,
            length / 2
        );
        let name = format!("{shard}.safetensors");
        let mut file = fs::File::create(input.join(&name)).unwrap();
        file.write_all(&(header.len() as u64).to_le_bytes())
            .unwrap();
        file.write_all(header.as_bytes()).unwrap();
        file.set_len((8 + header.len() + length) as u64).unwrap();
        index.push(format!(r#""w{shard}":"{name}""#));
    }
    let index = format!(
        r#"{{"metadata":{{}},"weight_map":{{{}}}}}"#,
        index.join(",")
    );
    fs::write(input.join("model.safetensors.index.json"), index).unwrap();
    let target = directory.path().join("out");

    let before = LIVE.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let total: u64 = if shards == 1 {
        let input = input.join("0.safetensors");
        let checkpoint = Checkpoint::open(&input).unwrap();
        let mut output = OutputFile::create(&target, Overwrite::Never, &[&input]).unwrap();
        let total = copy(&checkpoint, Destination::File(&mut output));
        let _ = output.commit().unwrap();
        total
    } else {
        let checkpoint = Checkpoint::open(&input).unwrap();
        let mut output = OutputDir::create(&target, Overwrite::Never, &[&input]).unwrap();
        let total = copy(&checkpoint, Destination::Directory(&mut output));
        let _ = output.commit().unwrap();
        total
    };
    assert!(total >= (bytes - 2 * shards) as u64);
    PEAK.load(Ordering::Relaxed) - before
}

/// Returns how many bytes were written.
fn copy(checkpoint: &Checkpoint, destination: Destination<'_>) -> u64 {
    let written = write_checkpoint(checkpoint, &Ones, destination, &(), |_, ()| {}).unwrap();
    written.files.iter().map(|file| file.bytes).sum()
}

/// Sets every byte.
struct Ones;

impl Patch for Ones {
    type Report = ();
    type Error = Infallible;

    fn targets(&self, _: &TensorView<'_>) -> bool {
        true
    }

    fn patch(
        &self,
        _: &TensorView<'_>,
        _: Range<usize>,
        bytes: &mut [u8],
    ) -> Result<(), Infallible> {
        bytes.fill(1);
        Ok(())
    }
}

struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[expect(
    unsafe_code,
    reason = "an allocator is an unsafe trait; this one only counts"
)]
// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, block: Block) -> *mut u8 {
        let live = LIVE.fetch_add(block.size(), Ordering::Relaxed) + block.size();
        PEAK.fetch_max(live, Ordering::Relaxed);
        // SAFETY: the caller's promises are those that `System` asks for.
        unsafe { System.alloc(block) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, block: Block) {
        LIVE.fetch_sub(block.size(), Ordering::Relaxed);
        // SAFETY: as above; the memory came from `System`.
        unsafe { System.dealloc(memory, block) }
    }
}
