//! Copies into shared memory that run beside the thread: `cp.async`, and bulk copies that complete on an mbarrier.

use super::backend;
use super::global::{In, Out};
use super::shared::Shared;

impl<T> Shared<T> {
    /// Start copying 16 bytes from `source[j]` to element `i`; both 16-byte aligned. Done after [`copy_commit`] and
    /// [`copy_wait`] by the same thread; other threads see it after the next barrier.
    #[inline(always)]
    #[track_caller]
    pub fn copy16_async(self, i: u32, source: In<T>, j: u32) {
        backend::copy_async::<16>(self.element(i), source.element(j))
    }

    /// As [`copy16_async`](Self::copy16_async) with 4 bytes, 4-byte aligned.
    #[inline(always)]
    #[track_caller]
    pub fn copy4_async(self, i: u32, source: In<T>, j: u32) {
        backend::copy_async::<4>(self.element(i), source.element(j))
    }

    /// Start copying `bytes` (a multiple of 16) from `source[j]` to element `i`, both 16-byte aligned; called by one thread.
    /// Completion is counted in bytes on `barrier`.
    #[inline(always)]
    #[track_caller]
    pub fn copy_bulk(self, i: u32, source: In<T>, j: u32, bytes: u32, barrier: Mbarrier) {
        backend::copy_bulk(self.element(i), source.element(j), bytes, barrier.word.element(0))
    }

    /// Start copying `bytes` (a multiple of 16) from element `i` to `target[j]`, both 16-byte aligned; called by one thread,
    /// after [`fence_async_copy`] by the threads that wrote the elements and a barrier. The elements may be written again after
    /// [`bulk_commit`] and [`bulk_wait_read`].
    #[inline(always)]
    #[track_caller]
    pub fn store_bulk(self, i: u32, target: Out<T>, j: u32, bytes: u32) {
        backend::store_bulk(self.element(i), target.element(j), bytes)
    }
}

/// Close the group of this thread's `copy16_async` calls since the last commit.
#[inline(always)]
pub fn copy_commit() {
    backend::copy_commit()
}

/// Wait until at most `PENDING` of this thread's committed groups are unfinished.
#[inline(always)]
#[track_caller]
pub fn copy_wait<const PENDING: u32>() {
    backend::copy_wait::<PENDING>()
}

/// Close the group of this thread's `store_bulk` calls since the last commit.
#[inline(always)]
pub fn bulk_commit() {
    backend::bulk_commit()
}

/// Wait until at most `PENDING` of this thread's committed bulk stores still read shared memory.
#[inline(always)]
#[track_caller]
pub fn bulk_wait_read<const PENDING: u32>() {
    backend::bulk_wait_read::<PENDING>()
}

/// Makes this thread's ordinary writes to shared memory visible to bulk copies that start after the next barrier.
#[inline(always)]
pub fn fence_async_copy() {
    backend::fence_async_copy()
}

/// A barrier in shared memory that counts arrivals of threads and bytes of bulk copies. It completes phase 0, 1, 0, 1, …
#[derive(Clone, Copy)]
pub struct Mbarrier {
    word: Shared<u64>,
}

impl Mbarrier {
    /// The barrier in element `i` of `words`.
    #[inline(always)]
    pub fn new(words: Shared<u64>, i: u32) -> Self {
        Self { word: words.slice(i, 1) }
    }

    /// By one thread, before a [`block_sync`](super::block_sync): every phase expects `arrivals` arrivals.
    #[inline(always)]
    #[track_caller]
    pub fn init(self, arrivals: u32) {
        backend::mbarrier_init(self.word.element(0), arrivals)
    }

    /// Arrive, and expect `bytes` more of bulk copies in this phase.
    #[inline(always)]
    #[track_caller]
    pub fn arrive_expect(self, bytes: u32) {
        backend::mbarrier_arrive_expect(self.word.element(0), bytes)
    }

    /// Arrive.
    #[inline(always)]
    #[track_caller]
    pub fn arrive(self) {
        backend::mbarrier_arrive(self.word.element(0))
    }

    /// Wait until the phase of this parity (0 first) has completed.
    #[inline(always)]
    #[track_caller]
    pub fn wait(self, parity: u32) {
        while !backend::mbarrier_try_wait(self.word.element(0), parity) {
            backend::spin(backend::here());
        }
    }
}
