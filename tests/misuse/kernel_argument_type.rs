//! Kernels take pointers and scalars of 4 or 8 bytes: nothing whose layout a compiler may choose.

use ferrotile_kernels::device::*;
use ferrotile_kernels::kernel;

kernel! {
    op = misuse;
    /// Takes a bool.
    pub fn flag(y: Out<u32>, on: bool) {
        if on {
            y.set(thread_idx(), 1);
        }
    }
}

fn main() {}
