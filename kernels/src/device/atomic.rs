//! Atomics, and acquire/release accesses for data that other blocks or other GPUs write.

use super::backend::{self, Word};
use super::global::Out;
use super::shared::Shared;

/// Among which threads an atomic access or a fence is ordered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// The threads of this block.
    Block,
    /// All threads of this GPU.
    Gpu,
    /// This GPU, its peers and the host.
    System,
}

/// What an atomic update does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AtomicOp {
    /// `old + value`, wrapping for integers.
    Add,
    /// The smaller one.
    Min,
    /// The larger one.
    Max,
    /// Bitwise and.
    And,
    /// Bitwise or.
    Or,
    /// `value`.
    Exchange,
}

/// A word with atomic updates: `u32` and `u64` have all of [`AtomicOp`], `f32` has `Add` and `Exchange`.
pub trait Atomic: Word + backend::AtomicWord {}
impl Atomic for u32 {}
impl Atomic for u64 {}
impl Atomic for f32 {}

impl<T: Atomic> Out<T> {
    /// Atomic update of element `i`, relaxed; returns what was there.
    #[inline(always)]
    #[track_caller]
    pub fn atomic(self, op: AtomicOp, i: u32, value: T, scope: Scope) -> T {
        backend::atomic(self.element(i), op, value, scope, false)
    }

    /// Atomic update that also acquires and releases: what this thread wrote before is visible to whoever reads the new value
    /// with acquire, and the other way round.
    #[inline(always)]
    #[track_caller]
    pub fn atomic_acq_rel(self, op: AtomicOp, i: u32, value: T, scope: Scope) -> T {
        backend::atomic(self.element(i), op, value, scope, true)
    }

    /// Atomic addition, relaxed; returns what was there.
    #[inline(always)]
    #[track_caller]
    pub fn atomic_add(self, i: u32, value: T, scope: Scope) -> T {
        backend::atomic(self.element(i), AtomicOp::Add, value, scope, false)
    }

    /// If element `i` equals `expected`, make it `value`; relaxed, returns what was there.
    #[inline(always)]
    #[track_caller]
    pub fn compare_exchange(self, i: u32, expected: T, value: T, scope: Scope) -> T {
        backend::compare_exchange(self.element(i), expected, value, scope)
    }

    /// Read what another thread stores atomically; orders nothing else.
    #[inline(always)]
    #[track_caller]
    pub fn load_relaxed(self, i: u32, scope: Scope) -> T {
        backend::load_relaxed(self.element(i), scope)
    }

    /// Write what other threads load atomically; orders nothing else.
    #[inline(always)]
    #[track_caller]
    pub fn store_relaxed(self, i: u32, value: T, scope: Scope) {
        backend::store_relaxed(self.element(i), value, scope)
    }

    /// Read what another thread released.
    #[inline(always)]
    #[track_caller]
    pub fn load_acquire(self, i: u32, scope: Scope) -> T {
        backend::load_acquire(self.element(i), scope)
    }

    /// Write so that whoever acquires the value sees everything this thread wrote before.
    #[inline(always)]
    #[track_caller]
    pub fn store_release(self, i: u32, value: T, scope: Scope) {
        backend::store_release(self.element(i), value, scope)
    }
}

impl<T: Atomic> Shared<T> {
    /// Atomic update of element `i` within the block; returns what was there.
    #[inline(always)]
    #[track_caller]
    pub fn atomic(self, op: AtomicOp, i: u32, value: T) -> T {
        backend::atomic_shared(self.element(i), op, value)
    }

    /// Atomic addition within the block; returns what was there.
    #[inline(always)]
    #[track_caller]
    pub fn atomic_add(self, i: u32, value: T) -> T {
        backend::atomic_shared(self.element(i), AtomicOp::Add, value)
    }
}

/// Orders this thread's earlier accesses before its later ones, as seen within `scope`.
#[inline(always)]
#[track_caller]
pub fn fence(scope: Scope) {
    backend::fence(scope)
}

/// Inside a loop that waits for another thread: lets others run on the emulator, nothing on the GPU.
#[inline(always)]
#[track_caller]
pub fn spin() {
    backend::spin(backend::here())
}
