//! How many blocks and threads a kernel is launched with: plain integer code, the same on host and device.

use crate::device::SharedLayout;

/// Threads in a warp, on every architecture this crate supports.
pub const WARP_SIZE: u32 = 32;

/// Grid, block and dynamic shared memory of one launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaunchConfig {
    /// Blocks in x, y, z.
    pub grid: [u32; 3],
    /// Threads of a block. Blocks are one-dimensional.
    pub threads: u32,
    /// Bytes of dynamic shared memory a block gets.
    pub shared_bytes: u32,
    /// All blocks must be resident at the same time (a kernel with a barrier across the grid).
    pub cooperative: bool,
}

impl LaunchConfig {
    /// `blocks` blocks of `threads` threads, no shared memory.
    pub const fn new(blocks: u32, threads: u32) -> Self {
        Self::grid([blocks, 1, 1], threads)
    }

    /// A grid of up to three dimensions.
    pub const fn grid(grid: [u32; 3], threads: u32) -> Self {
        Self { grid, threads, shared_bytes: 0, cooperative: false }
    }

    /// With dynamic shared memory of the size that `layout` carved.
    pub const fn shared(mut self, layout: &SharedLayout) -> Self {
        self.shared_bytes = layout.bytes();
        self
    }

    /// All blocks resident at once.
    pub const fn cooperative(mut self) -> Self {
        self.cooperative = true;
        self
    }

    /// Number of blocks, all dimensions multiplied.
    pub const fn num_blocks(&self) -> u64 {
        self.grid[0] as u64 * self.grid[1] as u64 * self.grid[2] as u64
    }
}

/// `ceil(a / b)`; `b` must not be 0.
#[inline(always)]
pub const fn ceil_div(a: u32, b: u32) -> u32 {
    // `checked_div` leaves no division-by-zero branch in the PTX once `b` is known.
    match a.checked_div(b) {
        Some(q) => q + (q * b != a) as u32,
        None => 0,
    }
}

/// `a` rounded up to a multiple of `b`; `b` must not be 0.
#[inline(always)]
pub const fn align_up(a: u32, b: u32) -> u32 {
    ceil_div(a, b) * b
}
