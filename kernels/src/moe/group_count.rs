//! group_count: how many entries name each group.
//!
//! In    group_idx i64 `[n]`; -1 names no group        Out   count i32 `[groups]`
//! Exact integers, whatever the order of the blocks.
//! Map   512 threads a block, at most a block on each SM, counters in shared memory: `common_count.rs`.
//! Cost  8·n bytes read; latency: one trip to memory, one to L2.

use super::common_count;
pub use super::common_count::{MAX_BINS, config, num_blocks, workspace_words};
use crate::device::*;
use crate::kernel;

kernel! {
    op = group_count;
    threads = 512;
    /// `workspace` is zero, and zero again afterwards; a single block does not use it.
    pub fn count(group_idx: In<i64>, workspace: Out<u64>, count: Out<i32>, n: u32, groups: u32) {
        common_count::count(group_idx, workspace, n, groups, |group, n| count.set(group, n as i32));
    }
}
