//! Backend 2: a CPU emulator for kernels.
//!
//! Each thread of a block is a coroutine; a block runs on one core, blocks are spread over cores. A thread runs until it
//! reaches something that needs others (a shuffle, a barrier, a wait), so without [`Options::checked`] a kernel costs little
//! more than its arithmetic. Bounds and alignment are always checked. With checks on, every byte also knows whether it was
//! written and who touched it last, and reading what nobody wrote or touching what another thread touched without a barrier
//! between is a [`Fault`], as is a shuffle or barrier that some threads miss.

pub mod memory;
mod race;
mod sched;
mod stack;

pub use sched::launch;
pub(super) use sched::{Access, Bulk, PendingCopy, Thread, WARP_SYNC, Wait, current};

use std::fmt;
use std::panic::Location;
use std::time::Duration;

/// In which order blocks, warps and lanes get their turn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// By index.
    #[default]
    Ascending,
    /// Shuffled from this seed: finds what works by luck.
    Shuffled(u64),
}

/// How a kernel is run.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Look for reads of memory nothing wrote and for races; about thirty times slower.
    pub checked: bool,
    /// Scheduling order.
    pub order: Order,
    /// How long all threads may wait for something that does not happen.
    pub patience: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self { checked: false, order: Order::Ascending, patience: Duration::from_secs(20) }
    }
}

/// A kernel did what it must not do.
#[derive(Clone, Debug)]
pub struct Fault {
    /// Entry name.
    pub kernel: &'static str,
    /// Block index.
    pub block: [u32; 3],
    /// Thread within the block.
    pub thread: u32,
    /// Where in the kernel's source.
    pub at: &'static Location<'static>,
    /// What it did.
    pub kind: FaultKind,
}

/// What a kernel did wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FaultKind {
    /// An access outside the tensor or the shared array.
    OutOfBounds {
        /// `global` or `shared`.
        space: &'static str,
        /// Byte offset from the start of the tensor or array; negative when before it.
        offset: i64,
        /// Bytes accessed.
        bytes: u32,
        /// Bytes there are.
        len: u64,
    },
    /// An index that was read from memory and is too large.
    Index {
        /// The index.
        index: u32,
        /// What it must be below.
        len: u32,
    },
    /// Shared memory was carved larger than what the launch asked for.
    SharedTooSmall {
        /// Bytes the access needs.
        needed: u32,
        /// Bytes the launch asked for.
        asked: u32,
    },
    /// A vector access at an address that is not a multiple of its size.
    Misaligned {
        /// `global` or `shared`.
        space: &'static str,
        /// The address (for shared memory the offset).
        address: u64,
        /// Bytes accessed.
        bytes: u32,
    },
    /// Memory was read that nothing has written.
    Unwritten {
        /// `global` or `shared`.
        space: &'static str,
        /// Byte offset of the first such byte in its tensor, or in shared memory.
        offset: u64,
    },
    /// Two threads touched the same byte, at least one wrote, and no barrier stands between.
    Race {
        /// `global` or `shared`.
        space: &'static str,
        /// Byte offset in its tensor, or in shared memory.
        offset: u64,
        /// `read`, `write` or `atomic`: what this thread did.
        access: &'static str,
        /// What the other thread had done.
        other_access: &'static str,
        /// The other thread's block, modulo 2^24, counted over the grid.
        other_block: u32,
        /// The other thread.
        other_thread: u32,
    },
    /// A warp operation that not all lanes reached together.
    MissedWarpOp {
        /// Which one.
        op: &'static str,
        /// What another lane did instead.
        other: String,
    },
    /// A barrier that not all threads reached together.
    MissedBarrier {
        /// `block_sync` or `grid_sync`.
        op: &'static str,
        /// What another thread did instead.
        other: String,
    },
    /// Threads wait for something that nobody does.
    Deadlock,
    /// More threads per block than the entry was compiled for, or a number that is no multiple of 32.
    BlockSize {
        /// Threads asked for.
        threads: u32,
        /// Threads the entry allows.
        allowed: u32,
    },
    /// A thread used more stack than the emulator gives it.
    StackOverflow,
    /// The kernel panicked.
    Panic(String),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [x, y, z] = self.block;
        write!(f, "kernel {}, block ({x}, {y}, {z}), thread {}, {}: ", self.kernel, self.thread, self.at)?;
        match &self.kind {
            FaultKind::OutOfBounds { space, offset, bytes, len } => {
                write!(f, "{space} access out of bounds: {bytes} bytes at offset {offset} of {len}")
            }
            FaultKind::Index { index, len } => write!(f, "index {index} in memory, allowed: below {len}"),
            FaultKind::SharedTooSmall { needed, asked } => {
                write!(f, "shared memory beyond what was asked for: needs {needed} bytes, the launch asked for {asked}")
            }
            FaultKind::Misaligned { space, address, bytes } => {
                write!(f, "misaligned {space} access: {bytes} bytes at address {address:#x}")
            }
            FaultKind::Unwritten { space, offset } => write!(f, "read of {space} memory that nothing wrote, byte {offset}"),
            FaultKind::Race { space, offset, access, other_access, other_block, other_thread } => write!(
                f,
                "race on {space} byte {offset}: this {access} and the {other_access} of block {other_block}, thread {other_thread}, \
                 with no barrier between"
            ),
            FaultKind::MissedWarpOp { op, other } => write!(f, "{op} that some lanes miss: {other}"),
            FaultKind::MissedBarrier { op, other } => write!(f, "{op} that some threads miss: {other}"),
            FaultKind::Deadlock => write!(f, "waits for something that does not happen"),
            FaultKind::BlockSize { threads, allowed } => {
                write!(f, "block of {threads} threads; allowed are multiples of 32 up to {allowed}")
            }
            FaultKind::StackOverflow => write!(f, "stack overflow"),
            FaultKind::Panic(text) => write!(f, "panic: {text}"),
        }
    }
}

impl std::error::Error for Fault {}
