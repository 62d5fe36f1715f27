//! What the emulator knows about buffers: which bytes have been written.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

/// A tensor given to a kernel, as bytes.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    /// First byte.
    pub address: usize,
    /// Number of bytes.
    pub bytes: usize,
}

/// One registered allocation: a byte each that is 1 once written.
pub(super) struct Allocation {
    pub address: usize,
    written: Vec<AtomicU8>,
}

impl Allocation {
    pub fn end(&self) -> usize {
        self.address + self.written.len()
    }

    /// Offset of the first byte in `[address, address + bytes)` that was never written.
    pub fn unwritten(&self, address: usize, bytes: usize) -> Option<usize> {
        let from = address - self.address;
        let written = &self.written[from..from + bytes];
        written.iter().position(|b| b.load(Ordering::Relaxed) == 0).map(|i| from + i)
    }

    pub fn mark(&self, address: usize, bytes: usize) {
        let from = address - self.address;
        self.written[from..from + bytes].iter().for_each(|b| b.store(1, Ordering::Relaxed));
    }
}

static ALLOCATIONS: RwLock<BTreeMap<usize, Arc<Allocation>>> = RwLock::new(BTreeMap::new());

/// Tell the emulator of a buffer, so that reads of what nothing wrote are found.
pub fn register(address: usize, bytes: usize, written: bool) {
    let written = (0..bytes).map(|_| AtomicU8::new(written as u8)).collect();
    let allocation = Arc::new(Allocation { address, written });
    ALLOCATIONS.write().unwrap_or_else(PoisonError::into_inner).insert(address, allocation);
}

/// The buffer is gone.
pub fn unregister(address: usize) {
    ALLOCATIONS.write().unwrap_or_else(PoisonError::into_inner).remove(&address);
}

/// The host wrote these bytes.
pub fn mark_written(address: usize, bytes: usize) {
    if bytes > 0
        && let Some(allocation) = find(address, bytes)
    {
        allocation.mark(address, bytes);
    }
}

/// The registered allocation that holds all of these bytes.
pub(super) fn find(address: usize, bytes: usize) -> Option<Arc<Allocation>> {
    let allocations = ALLOCATIONS.read().unwrap_or_else(PoisonError::into_inner);
    let (_, allocation) = allocations.range(..=address).next_back()?;
    (address + bytes <= allocation.end()).then(|| allocation.clone())
}
