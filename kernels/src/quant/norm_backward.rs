//! norm_backward: copies a vector. (Written by `cargo xtask new`; say here what the op computes.)
//!
//! In   x  u32 `[n]`      Out  y  u32 `[n]`
//! Exact.
//! Map  one thread per element.
//! Cost 4·n bytes read, 4·n written; memory bound.

use crate::device::*;
use crate::kernel;

/// Threads per block; the same number as in the kernel's `threads`.
pub const THREADS: u32 = 256;

/// Grid and block for `n` elements.
pub fn config(n: u32) -> LaunchConfig {
    LaunchConfig::new(ceil_div(n, THREADS), THREADS)
}

kernel! {
    op = norm_backward;
    threads = 256;
    /// Arguments of the copy.
    pub fn copy(x: In<u32>, y: Out<u32>, n: u32) {
        let i = block_idx_x() * THREADS + thread_idx();
        if i >= n {
            return;
        }
        y.set(i, x.get(i));
    }
}
