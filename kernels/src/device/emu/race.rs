//! Who touched a byte last: finds two accesses without a barrier between.
//!
//! Each byte has one record of the last write and one of the last read. Accesses are ordered by a barrier of the block, by
//! `warp_sync` within a warp, and across blocks by a release of the one block after its access and an acquire of the other
//! before its own (an approximation that misses some races between blocks but reports none that is not there).

use super::memory::{Allocation, Region};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};

/// Kind of an access.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Read,
    Write,
    Atomic,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Kind::Read => "read",
            Kind::Write => "write",
            Kind::Atomic => "atomic",
        }
    }
}

/// Who accesses, and when in terms of barriers.
#[derive(Clone, Copy)]
pub struct Who {
    pub block: u32,
    pub thread: u32,
    pub block_epoch: u32,
    pub warp_epoch: u32,
    /// Barriers over the whole launch so far.
    pub grid_epoch: u32,
    /// Releases of this block so far.
    pub releases: u8,
    /// Whether this block has acquired anything.
    pub acquired: bool,
}

/// Packed: valid, atomic, many lanes of the warp, many warps, many blocks, then block 24, thread 10, block epoch 10,
/// warp epoch 7, releases 5, grid epoch 3 bits.
#[derive(Clone, Copy)]
struct Record(u64);

const VALID: u64 = 1 << 63;
const ATOMIC: u64 = 1 << 62;
const MANY_LANES: u64 = 1 << 61;
const MANY_WARPS: u64 = 1 << 60;
const MANY_BLOCKS: u64 = 1 << 59;

impl Record {
    fn new(who: Who, flags: u64) -> Self {
        Self(
            VALID
                | flags
                | (who.block as u64 & 0xff_ffff) << 35
                | (who.thread as u64 & 0x3ff) << 25
                | (who.block_epoch as u64 & 0x3ff) << 15
                | (who.warp_epoch as u64 & 0x7f) << 8
                | (who.releases as u64 & 0x1f) << 3
                | (who.grid_epoch as u64 & 7),
        )
    }

    fn has(self, flag: u64) -> bool {
        self.0 & flag != 0
    }

    fn block(self) -> u32 {
        (self.0 >> 35) as u32 & 0xff_ffff
    }

    fn thread(self) -> u32 {
        (self.0 >> 25) as u32 & 0x3ff
    }

    /// Whether a barrier stands between this access and one by `who` now.
    fn ordered_before(self, who: Who, releases: &Releases) -> bool {
        if self.0 as u32 & 7 != who.grid_epoch & 7 {
            return true;
        }
        if self.has(MANY_BLOCKS) {
            // Which ones have released is not known, so a block that has acquired anything gets the benefit of the doubt.
            return who.acquired;
        }
        if self.block() != who.block & 0xff_ffff {
            return who.acquired && (releases.of(self.block()) as u32 ^ (self.0 >> 3) as u32) & 0x1f != 0;
        }
        if ((self.0 >> 15) as u32 ^ who.block_epoch) & 0x3ff != 0 {
            return true;
        }
        if self.has(MANY_WARPS) {
            return false;
        }
        if self.thread() == who.thread && !self.has(MANY_LANES) {
            return true;
        }
        self.thread() / 32 == who.thread / 32 && ((self.0 >> 8) as u32 ^ who.warp_epoch) & 0x7f != 0
    }

    /// This read record joined by one more reader.
    fn joined_by(self, who: Who, releases: &Releases) -> Self {
        if !self.has(VALID) || self.ordered_before(who, releases) {
            return Record::new(who, 0);
        }
        let mut flags = self.0 & (MANY_LANES | MANY_WARPS | MANY_BLOCKS);
        if self.block() != who.block & 0xff_ffff {
            flags |= MANY_BLOCKS;
        } else if self.thread() / 32 != who.thread / 32 {
            flags |= MANY_WARPS;
        } else {
            flags |= MANY_LANES;
        }
        Record::new(who, flags)
    }
}

/// Releases per block of a launch.
pub struct Releases(Vec<AtomicU8>);

impl Releases {
    pub fn new(blocks: u64) -> Self {
        Self((0..blocks.min(1 << 24)).map(|_| AtomicU8::new(0)).collect())
    }

    pub fn of(&self, block: u32) -> u8 {
        self.0.get(block as usize).map_or(0, |r| r.load(Relaxed))
    }

    pub fn add(&self, block: u32) {
        if let Some(r) = self.0.get(block as usize) {
            r.fetch_add(1, Relaxed);
        }
    }
}

/// Another access that conflicts.
pub struct Conflict {
    pub byte: usize,
    pub other: Kind,
    pub block: u32,
    pub thread: u32,
}

/// Records of a range of bytes.
pub struct Shadow {
    write: Vec<AtomicU64>,
    read: Vec<AtomicU64>,
}

impl Shadow {
    pub fn new(bytes: usize) -> Self {
        // Zeroed pages come straight from the system, so untouched bytes cost nothing.
        let zeroed = || {
            let zeros = std::mem::ManuallyDrop::new(vec![0u64; bytes]);
            // SAFETY: AtomicU64 has the size and alignment of u64.
            unsafe { Vec::from_raw_parts(zeros.as_ptr() as *mut AtomicU64, zeros.len(), zeros.capacity()) }
        };
        Self { write: zeroed(), read: zeroed() }
    }

    /// Note an access and look for one that conflicts with it.
    pub fn access(&self, from: usize, bytes: usize, kind: Kind, who: Who, releases: &Releases) -> Result<(), Conflict> {
        for byte in from..from + bytes {
            let written = Record(self.write[byte].load(Relaxed));
            if written.has(VALID) && !(kind == Kind::Atomic && written.has(ATOMIC)) && !written.ordered_before(who, releases) {
                let other = if written.has(ATOMIC) { Kind::Atomic } else { Kind::Write };
                return Err(Conflict { byte, other, block: written.block(), thread: written.thread() });
            }
            let read = Record(self.read[byte].load(Relaxed));
            if kind == Kind::Read {
                self.read[byte].store(read.joined_by(who, releases).0, Relaxed);
                continue;
            }
            if read.has(VALID) && !read.ordered_before(who, releases) {
                return Err(Conflict { byte, other: Kind::Read, block: read.block(), thread: read.thread() });
            }
            let flags = if kind == Kind::Atomic { ATOMIC } else { 0 };
            self.write[byte].store(Record::new(who, flags).0, Relaxed);
        }
        Ok(())
    }

    /// Forget what happened to these bytes: something ordered them.
    pub fn forget(&self, from: usize, bytes: usize) {
        for byte in from..from + bytes {
            self.write[byte].store(0, Relaxed);
            self.read[byte].store(0, Relaxed);
        }
    }
}

/// A global range that a launch may touch.
struct Range {
    start: usize,
    end: usize,
    shadow: Shadow,
    allocation: Option<Arc<Allocation>>,
}

/// All global memory of a launch.
pub struct GlobalShadow {
    ranges: Vec<Range>,
    pub releases: Releases,
}

impl GlobalShadow {
    /// Regions that overlap are joined: in and out may be the same tensor.
    pub fn new(regions: &[Region], blocks: u64) -> Self {
        let mut spans: Vec<(usize, usize)> =
            regions.iter().filter(|r| r.bytes > 0).map(|r| (r.address, r.address + r.bytes)).collect();
        spans.sort_unstable();
        let mut joined: Vec<(usize, usize)> = Vec::new();
        for (start, end) in spans {
            match joined.last_mut() {
                Some(last) if start < last.1 => last.1 = last.1.max(end),
                _ => joined.push((start, end)),
            }
        }
        let ranges = joined
            .into_iter()
            .map(|(start, end)| Range {
                start,
                end,
                shadow: Shadow::new(end - start),
                allocation: super::memory::find(start, end - start),
            })
            .collect();
        Self { ranges, releases: Releases::new(blocks) }
    }

    fn range(&self, address: usize) -> Option<&Range> {
        let i = self.ranges.partition_point(|r| r.end <= address);
        self.ranges.get(i).filter(|r| r.start <= address)
    }

    /// Note an access to global memory; the error is the address of the conflicting byte.
    pub fn access(&self, address: usize, bytes: usize, kind: Kind, who: Who) -> Result<(), Conflict> {
        let Some(range) = self.range(address) else { return Ok(()) };
        let from = address - range.start;
        range.shadow.access(from, bytes, kind, who, &self.releases)?;
        if kind != Kind::Read
            && let Some(allocation) = &range.allocation
        {
            allocation.mark(address, bytes);
        }
        Ok(())
    }

    /// Offset of the first byte that nothing wrote.
    pub fn unwritten(&self, address: usize, bytes: usize) -> Option<u64> {
        let range = self.range(address)?;
        let allocation = range.allocation.as_ref()?;
        let offset = allocation.unwritten(address, bytes)?;
        Some((allocation.address + offset - range.start) as u64)
    }
}
