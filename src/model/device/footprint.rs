//! What a decoder takes of its devices' memory, before anything is copied there.
//!
//! In: a decoder on the host, and devices. Out: for each device how many bytes it will hold at most, and which blocks: an estimate from
//! above, by what the operations of [`super::block`] and [`super::head`] have at once.

use super::attention::STRETCH;
use super::head::{LOGITS_BYTES, TILE_BYTES};
use super::place::{Device, divide};
use crate::model::block::Saved;
use crate::model::config::BlockConfig;
use crate::model::decoder::{Activations, Decoder};
use crate::model::linear::Linear;
use crate::model::weights::{Block, FeedForward};

/// Bytes that each of `devices` will hold while packs of `tokens` tokens are computed.
pub fn footprint(
    host: &Decoder<'_>,
    devices: &[Device],
    activations: Activations,
    tokens: usize,
) -> Vec<u64> {
    let places = places(host, devices);
    let mut bytes = vec![0; devices.len()];
    let mut largest = vec![0; devices.len()];
    let blocks = host.weights.blocks.iter().zip(&host.config.blocks);
    for ((block, config), &place) in blocks.zip(&places) {
        let precision = devices[place].precision().bytes();
        let kept = tokens * precision * Saved::floats_per_token(&host.config, config);
        // Its input, and the sum between its layers, are f32.
        bytes[place] += weights(block, precision) + 2 * 4 * tokens * host.config.hidden_size;
        if activations == Activations::Keep {
            bytes[place] += kept;
        }
        let while_computed = kept + passing(host, block, config, tokens);
        largest[place] = while_computed.max(largest[place]);
    }
    let last = devices.len() - 1;
    let precision = devices[last].precision().bytes();
    bytes[last] += precision * host.weights.head.elements();
    // Logits, what softmax makes of them, their gradient and one more on the way; a divergence has those of its reference as well.
    let vocab = host.weights.head.shape[0];
    let logits = LOGITS_BYTES.min(4 * vocab * tokens);
    let head = 6 * logits + TILE_BYTES.min(4 * host.weights.head.elements());
    largest[last] = largest[last].max(head);
    let of_devices = bytes.into_iter().zip(largest);
    of_devices.map(|(a, b)| (a + b) as u64).collect()
}

/// The number of each block's device, by the devices' free memory.
pub(super) fn places(host: &Decoder<'_>, devices: &[Device]) -> Vec<usize> {
    let sizes: Vec<u64> = host
        .weights
        .blocks
        .iter()
        .map(|block| weights(block, 1) as u64)
        .collect();
    // Where one does not tell, all count the same.
    let free: Option<Vec<u64>> = devices.iter().map(Device::free_memory).collect();
    divide(&sizes, &free.unwrap_or_else(|| vec![1; devices.len()]))
}

/// Bytes of a block's matrices, and of what is added to those with targets.
fn weights(block: &Block<'_>, precision: usize) -> usize {
    let of_linear = |linear: &&Linear<'_>| {
        let matrices = match linear.has_targets() {
            true => 2,
            false => 1,
        };
        matrices * precision * linear.inputs * linear.outputs
    };
    linears(block).iter().map(of_linear).sum()
}

/// Bytes that pass while a block is computed: f32 of its widest layer with their gradients, scores of a stretch of queries, and the
/// gradient of its largest matrix with a target.
fn passing(host: &Decoder<'_>, block: &Block<'_>, config: &BlockConfig, tokens: usize) -> usize {
    let heads = host.config.heads();
    let widest = (2 * config.width).max(heads.row()) + host.config.hidden_size;
    let scores = heads.query * tokens.min(STRETCH) * tokens;
    let with_targets = linears(block).into_iter().filter(|it| it.has_targets());
    let gradient = with_targets.map(|linear| linear.inputs * linear.outputs);
    4 * (6 * tokens * widest + 6 * scores + 2 * gradient.max().unwrap_or(0))
}

fn linears<'b, 'c>(block: &'b Block<'c>) -> Vec<&'b Linear<'c>> {
    let gated = match &block.feed_forward {
        FeedForward::Dense(gated) => std::slice::from_ref(gated),
        FeedForward::Mixture { experts, .. } => experts,
    };
    let gated = gated.iter().flat_map(|gated| [&gated.gate_up, &gated.down]);
    [&block.qkv, &block.output]
        .into_iter()
        .chain(gated)
        .collect()
}
