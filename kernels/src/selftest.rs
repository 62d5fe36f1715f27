//! Kernels that exercise the device layer itself; not part of the published PTX.

use crate::device::*;
use crate::kernel;

kernel! {
    op = selftest;
    threads = 256, blocks = 2;
    /// y = block-wide prefix sum.
    pub fn scan(x: In<u32>, y: Out<u32>, n: u32) {
        let mut layout = SharedLayout::new();
        let scratch = layout.array::<u32>(8);
        let i = block_idx_x() * 256 + thread_idx();
        let v = if i < n { x.get(i) } else { 0 };
        let (sum, _) = block_scan_sum(v, scratch);
        if i < n {
            y.set(i, sum);
        }
    }
}
