//! aux_fi: the share of the routing that each expert has, for the load-balancing loss.
//!
//! In    topk_idx i64 `[n]`; -1 names no expert        Out   f f32 `[e]`
//! Exact `(f32(count) * f32(e)) / f32(t·num_aux_topk)`, the product rounded first; whatever the order of the blocks. No entry, no load:
//!       an expert that nobody chose has 0, also where there are no tokens.
//! Map   512 threads a block, at most a block on each SM, counters in shared memory: `common_count.rs`.
//! Cost  8·n bytes read; latency: one trip to memory, one to L2.

use super::common_count;
pub use super::common_count::{MAX_BINS, config, num_blocks, workspace_words};
use crate::device::*;
use crate::kernel;

kernel! {
    op = aux_fi;
    threads = 512;
    /// `denominator` is the number of tokens times `num_aux_topk`. `workspace` is zero, and zero again afterwards; a single block does
    /// not use it.
    pub fn fi(topk_idx: In<i64>, workspace: Out<u64>, f: Out<f32>, n: u32, e: u32, denominator: f32) {
        common_count::count(topk_idx, workspace, n, e, |expert, n| {
            let load = n as f32 * e as f32 / denominator;
            f.set(expert, if n == 0 { 0.0 } else { load });
        });
    }
}
