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
    CHUNK_BYTES, Checkpoint, Destination, OutputFile, Overwrite, Patch, TensorView,
    write_checkpoint,
};

#[test]
fn a_copy_takes_eight_chunks_whatever_its_size() {
    let directory = tempfile::tempdir().unwrap();
    let small = peak_of_copying(directory.path(), 40 << 20);
    let large = peak_of_copying(directory.path(), 160 << 20);
    // 1 MiB for everything that is not a chunk: names, segments, the thread pool.
    let limit = 8 * CHUNK_BYTES + (1 << 20);
    assert!(small <= limit, "{small} bytes for 40 MiB");
    assert!(large <= limit, "{large} bytes for 160 MiB");
    // A lower bound shows that the allocator counts.
    assert!(large >= 4 * CHUNK_BYTES, "{large} bytes for 160 MiB");
}

/// The most bytes allocated at once while a file with one tensor of `bytes` bytes is opened and copied, all of it patched.
fn peak_of_copying(directory: &Path, bytes: usize) -> usize {
    let input = directory.join("in.safetensors");
    let header = format!(
        r#"{{"w":{{"dtype":"BF16","shape":[{}],"data_offsets":[0,{bytes}]}}}}"#,
        bytes / 2
    );
    let mut file = fs::File::create(&input).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes())
        .unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len((8 + header.len() + bytes) as u64).unwrap();

    let before = LIVE.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let checkpoint = Checkpoint::open(&input).unwrap();
    let mut output = OutputFile::create(
        &directory.join("out.safetensors"),
        Overwrite::Replace,
        &[&input],
    )
    .unwrap();
    let written = write_checkpoint(
        &checkpoint,
        &Ones,
        Destination::File(&mut output),
        &(),
        |_, ()| {},
    )
    .unwrap();
    assert_eq!(written.files[0].bytes, (8 + header.len() + bytes) as u64);
    let _ = output.commit().unwrap();
    PEAK.load(Ordering::Relaxed) - before
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
