//! The histogram behind `group_count` and `aux_fi`: how often each index occurs, whichever blocks see it.
//!
//! Each block counts in shared memory. With several blocks, each adds its counts to words of the workspace, the count in the lower half
//! and 1 in the upper half: whoever finds there that all others have been adds its own count to what it found, has the sum, and leaves
//! the word 0 for the next call. So there is one trip to the L2 cache after the last index, and neither a barrier nor a fence, and no
//! block waits for another. Integer sums do not depend on the order.

use super::common_index::{NONE, index_or_none};
use crate::device::*;
use crate::unroll;

/// Threads of a block.
pub const THREADS: u32 = 512;

/// Vectors of two indices that a thread has in flight.
const HELD: usize = 4;

/// Most indices that one block counts alone: two turns of its loop are faster than a trip to L2.
pub const MAX_ALONE: u32 = 2 * THREADS * 2 * HELD as u32;

/// Indices that are worth a further block: one vector a thread.
const PER_BLOCK: u32 = 2 * THREADS;

/// Most bins: the counters of a block, 128 KiB.
pub const MAX_BINS: u32 = 32 << 10;

/// Number of blocks, at least 1, for `n` indices (below 2^31) and 1 to [`MAX_BINS`] bins.
pub const fn num_blocks(n: u32, bins: u32, num_sms: u32) -> u32 {
    // Every block adds to every bin, which must not be more work than counting.
    let by_bins = match n.checked_div(bins) {
        Some(blocks) => blocks,
        None => 1,
    };
    let by_size = ceil_div(n, PER_BLOCK);
    let most = if by_bins < by_size { by_bins } else { by_size };
    let most = if most < num_sms { most } else { num_sms };
    if n <= MAX_ALONE || most == 0 { 1 } else { most }
}

/// Words of 8 bytes of workspace that are enough on any device: one for each bin. (A line of 128 bytes for each takes as long.)
pub const fn workspace_words(n: u32, bins: u32) -> u32 {
    if n <= MAX_ALONE { 0 } else { bins }
}

/// Shared memory: a counter for each bin.
const fn counters(bins: u32) -> (SharedLayout, Shared<u32>) {
    let mut layout = SharedLayout::new();
    let counters = layout.array(bins);
    (layout, counters)
}

/// Grid and block.
pub const fn config(num_blocks: u32, bins: u32) -> LaunchConfig {
    LaunchConfig::new(num_blocks, THREADS).shared(&counters(bins).0)
}

/// Call `write(bin, count)` once for each of the `bins`, anywhere in the grid, with the number of the `n` indices that are equal to it.
#[inline(always)]
#[track_caller]
pub fn count(indices: In<i64>, workspace: Out<u64>, n: u32, bins: u32, mut write: impl FnMut(u32, u32)) {
    let (_, counters) = counters(bins);
    let alone = grid_dim_x() == 1;

    // Load. All vectors are 16-byte aligned, so there may be one index before them and one after them.
    let before = if n > 0 && !indices.is_aligned(16) { 1 } else { 0 };
    let (vectors, after) = ((n - before) / 2, (n - before) & 1);
    let pairs = indices.at(before as u64);
    let (first, step) = (block_idx_x() * THREADS + thread_idx(), grid_dim_x() * THREADS);
    let load = |from: u32| -> [[u32; 4]; HELD] {
        core::array::from_fn(|i| {
            let vector = from + i as u32 * step;
            if vector < vectors { pairs.load16(2 * vector) } else { [NONE; 4] }
        })
    };
    let mut held = load(first);
    let odd = if before == 1 && first == 0 {
        indices.get(0)
    } else if after == 1 && first == 1 {
        indices.get(n - 1)
    } else {
        -1
    };

    // Until they arrive: zeros, and the words of the workspace on their way to L2.
    let mut bin = thread_idx();
    while bin < bins {
        rolled();
        counters.set(bin, 0);
        if !alone {
            workspace.as_in().prefetch(bin);
        }
        bin += THREADS;
    }
    block_sync();

    // Count.
    let add = |index: i64| {
        let bin = index_or_none(index, bins);
        if bin != NONE {
            counters.atomic_add(bin, 1);
        }
    };
    add(odd);
    let mut next = first;
    loop {
        unroll!(i in HELD {
            let [a, a_high, b, b_high] = held[i];
            add((a as u64 | (a_high as u64) << 32) as i64);
            add((b as u64 | (b_high as u64) << 32) as i64);
        });
        next += HELD as u32 * step;
        if next >= vectors {
            break;
        }
        held = load(next);
    }
    block_sync();

    // Add up.
    let mut bin = thread_idx();
    while bin < bins {
        rolled();
        let here = counters.get(bin);
        if alone {
            write(bin, here);
        } else {
            let found = workspace.atomic_add(bin, 1 << 32 | here as u64, Scope::Gpu);
            if (found >> 32) as u32 == grid_dim_x() - 1 {
                workspace.store_relaxed(bin, 0, Scope::Gpu);
                write(bin, found as u32 + here);
            }
        }
        bin += THREADS;
    }
}
