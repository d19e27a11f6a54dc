//! The memory that a conversion takes, measured rather than promised: it does not grow with the tensors.
//!
//! A test binary of its own, because the counting allocator sees every allocation of the process. Maps of the input file are not
//! allocations; the kernel takes their pages back when it needs them.

#![expect(clippy::unwrap_used, reason = "a test may fail loudly")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use panacea_formats::gguf::{Array, Metadata, Value};
use panacea_formats::{Checkpoint, safetensors_header};
use panacea_patch::convert::general::Origins;
use panacea_patch::convert::{CONVERSION_BYTES, Conversion, GgufSettings, Texts};

#[test]
fn a_conversion_takes_two_windows_whatever_the_size_of_a_tensor() {
    let (small, large) = (peak(1 << 15), peak(1 << 18));
    // What is no window: tokens, of which a large vocabulary has more, names, the thread pool.
    let limit = usize::try_from(CONVERSION_BYTES).unwrap() + (4 << 20);
    assert!(large <= limit, "{large} bytes for a tensor of 128 MiB");
    assert!(small <= limit, "{small} bytes for a tensor of 16 MiB");
    // A lower bound shows that the allocator counts.
    assert!(large > 1 << 20, "{large}");
}

/// The most bytes allocated at once while a model of so many tokens, of 256 elements each, is written as Q8_0.
fn peak(tokens: usize) -> usize {
    let directory = tempfile::tempdir().unwrap();
    let model = directory.path().join("model.safetensors");
    zeros(&model, tokens);
    let config = format!(
        r#"{{"model_type": "llama", "vocab_size": {tokens}, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1,
            "num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": true}}"#
    );
    let mut tokenizer = Metadata::default();
    let texts = Array::Text(vec![String::new(); tokens]);
    tokenizer.set("tokenizer.ggml.tokens", Value::Array(texts));
    let checkpoint = Checkpoint::open(&model).unwrap();
    let texts = Texts {
        config: &config,
        origins: Origins::default(),
        tokenizer: &tokenizer,
    };
    let settings = GgufSettings {
        file_type: "q8_0".parse().unwrap(),
        patched: None,
        stem: "model",
        max_shard_bytes: None,
    };
    let conversion = Conversion::to_gguf(&checkpoint, texts, settings).unwrap();
    let before = LIVE.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let mut length = 0;
    let count = |bytes: &[u8]| {
        length += bytes.len() as u64;
        Ok(())
    };
    conversion.write(0, &(), count).unwrap();
    assert_eq!(length, conversion.bytes());
    PEAK.load(Ordering::Relaxed) - before
}

/// A model of one block, all zeros, in a file that takes no room on most disks.
fn zeros(path: &Path, tokens: usize) {
    let block = |module: &str| format!("model.layers.0.{module}.weight");
    let mut tensors = vec![
        ("model.embed_tokens.weight".to_owned(), vec![tokens, 256]),
        ("model.norm.weight".to_owned(), vec![256]),
        (block("input_layernorm"), vec![256]),
        (block("post_attention_layernorm"), vec![256]),
    ];
    for module in ["q_proj", "k_proj", "v_proj", "o_proj"] {
        tensors.push((block(&format!("self_attn.{module}")), vec![256, 256]));
    }
    for module in ["gate_proj", "up_proj", "down_proj"] {
        tensors.push((block(&format!("mlp.{module}")), vec![256, 256]));
    }
    let bytes = |shape: &[usize]| 2 * shape.iter().product::<usize>();
    let described = tensors.iter().map(|(name, shape)| {
        let dtype = panacea_formats::Dtype::BF16;
        (name.as_str(), dtype, shape.as_slice(), bytes(shape))
    });
    let header = safetensors_header(("format", "pt"), described);
    let all: usize = tensors.iter().map(|(_, shape)| bytes(shape)).sum();
    let mut file = fs::File::create(path).unwrap();
    file.write_all(&header).unwrap();
    file.set_len((header.len() + all) as u64).unwrap();
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
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(live, Ordering::Relaxed);
        // SAFETY: the caller's promises are those that `System` asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as above; the memory came from `System`.
        unsafe { System.dealloc(memory, layout) }
    }
}
