//! Any bytes are a sound GGUF file or an error, and opening them allocates at most four times as many bytes; of a sound file every
//! tensor can be read, and what is written of it is read again and written alike.

#![no_main]

use std::alloc::{GlobalAlloc, Layout as Block, System};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use libfuzzer_sys::fuzz_target;
use panacea_formats::gguf::{GgufFile, GgufLayout, TensorInfo};

fuzz_target!(|bytes: &[u8]| {
    let owned = bytes.to_vec();
    let before = LIVE.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    // A path of no bytes, which would count too.
    let opened = GgufFile::from_bytes(Path::new(""), owned);
    let allocated = PEAK.load(Ordering::Relaxed) - before;
    assert!(
        allocated <= MOST_PER_BYTE * bytes.len(),
        "{allocated} bytes for {}",
        bytes.len()
    );
    let Ok(file) = opened else {
        return;
    };
    let mut end = file.header_bytes().len();
    for tensor in file.tensors() {
        assert!(tensor.offset >= end && tensor.offset - end < file.alignment() as usize);
        end = tensor.offset + tensor.bytes.len();
        let found = file.tensor(tensor.name);
        assert_eq!(found.map(|found| found.bytes), Some(tensor.bytes));
        if let Some(view) = tensor.view() {
            assert_eq!(view.dtype.bytes_of(view.elements()), Some(view.bytes.len()));
            if view.dtype.is_readable() {
                let mut wide = vec![0.0; view.elements()];
                assert!(view.widen_into(0..wide.len(), &mut wide).is_ok());
            }
        }
    }
    assert!(end <= bytes.len());
    // A short file can say that it is aligned to 2^31, and the writer would pad it to that.
    if file.alignment() <= LARGEST_ALIGNMENT {
        let once = rewritten(&file);
        let again = GgufFile::from_bytes(Path::new(""), once.clone());
        assert!(again.is_ok_and(|again| rewritten(&again) == once));
    }
});

/// What the writer makes of `file`.
fn rewritten(file: &GgufFile) -> Vec<u8> {
    let infos = file.tensors().map(|tensor| match tensor.dtype() {
        Some(dtype) => TensorInfo::new(tensor.name, dtype, tensor.shape),
        None => {
            let length = tensor.bytes.len();
            TensorInfo::raw(tensor.name, tensor.type_number, tensor.shape, length)
        }
    });
    let infos: Vec<TensorInfo> = infos.collect::<Result<_, _>>().expect("what was read");
    let layout = GgufLayout::new(file.metadata(), &infos).expect("what was read");
    let mut written = layout.header().to_vec();
    for (index, tensor) in file.tensors().enumerate() {
        written.extend(tensor.bytes);
        written.resize(written.len() + layout.padding(index), 0);
    }
    assert_eq!(written.len(), layout.length());
    written
}

/// Bytes that may be allocated for each byte of a file, as the reader promises.
const MOST_PER_BYTE: usize = 4;

/// Above it, padding would take most of the time.
const LARGEST_ALIGNMENT: u32 = 4096;

struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

#[global_allocator]
static ALLOCATOR: Counting = Counting;

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
