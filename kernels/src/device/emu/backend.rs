//! What [`super::backend`] is on the emulator: the same functions as in `ptx.rs`.

use super::atomic::{AtomicOp, Scope};
use super::emu::{Access, Bulk, FaultKind, PendingCopy, Thread, WARP_SYNC, Wait, current};
use super::num;
use std::panic::Location;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Source position.
pub type Here = &'static Location<'static>;

#[inline(always)]
#[track_caller]
pub fn here() -> Here {
    Location::caller()
}

/// A global address with the range it may touch.
#[derive(Clone, Copy)]
pub struct Ptr {
    address: usize,
    start: usize,
    end: usize,
}

impl Ptr {
    pub fn new(address: u64, bytes: u64) -> Self {
        Self { address: address as usize, start: address as usize, end: (address + bytes) as usize }
    }

    #[inline(always)]
    pub fn offset(self, bytes: u64) -> Self {
        Self { address: self.address.wrapping_add(bytes as usize), ..self }
    }

    #[inline(always)]
    pub fn address(self) -> u64 {
        self.address as u64
    }

    /// The range, for the launch's bookkeeping.
    pub fn range(self) -> (usize, usize) {
        (self.start, self.end - self.start)
    }

    /// The address after all checks.
    #[inline(always)]
    #[track_caller]
    fn checked<W>(self, access: Access) -> *mut W {
        self.checked_bytes(size_of::<W>(), size_of::<W>(), access, Location::caller()) as *mut W
    }

    #[inline(always)]
    fn checked_bytes(self, bytes: usize, align: usize, access: Access, at: Here) -> usize {
        let thread = current();
        if self.address < self.start || self.address.wrapping_add(bytes) > self.end || self.address > self.end {
            let offset = self.address.wrapping_sub(self.start) as i64;
            let len = (self.end - self.start) as u64;
            thread.fault(FaultKind::OutOfBounds { space: "global", offset, bytes: bytes as u32, len }, at);
        }
        if !self.address.is_multiple_of(align) {
            thread.fault(FaultKind::Misaligned { space: "global", address: self.address as u64, bytes: bytes as u32 }, at);
        }
        if thread.block().checked() {
            thread.check_global(self.address, bytes, access, at);
        }
        self.address
    }
}

/// An offset in shared memory with the array it belongs to.
#[derive(Clone, Copy)]
pub struct SharedPtr {
    offset: u32,
    start: u32,
    end: u32,
}

impl SharedPtr {
    #[inline(always)]
    pub fn new(offset: u32, start: u32, end: u32) -> Self {
        Self { offset, start, end }
    }

    #[inline(always)]
    fn bounds(self, bytes: u32, align: u32, at: Here) -> &'static Thread {
        let thread = current();
        if self.offset < self.start || self.offset as u64 + bytes as u64 > self.end as u64 {
            let offset = self.offset as i32 as i64 - self.start as i64;
            let len = (self.end - self.start) as u64;
            thread.fault(FaultKind::OutOfBounds { space: "shared", offset, bytes, len }, at);
        }
        let asked = thread.block().shared_bytes();
        if self.end > asked {
            thread.fault(FaultKind::SharedTooSmall { needed: self.end, asked }, at);
        }
        if !self.offset.is_multiple_of(align) {
            thread.fault(FaultKind::Misaligned { space: "shared", address: self.offset as u64, bytes }, at);
        }
        thread
    }

    #[inline(always)]
    #[track_caller]
    fn checked<W>(self, access: Access) -> *mut W {
        let at = Location::caller();
        let bytes = size_of::<W>() as u32;
        let thread = self.bounds(bytes, bytes, at);
        if thread.block().checked() {
            thread.check_shared(self.offset, bytes as usize, access, at);
        }
        shared_address(thread, self.offset) as *mut W
    }
}

fn shared_address(thread: &Thread, offset: u32) -> *mut u8 {
    thread.block().shared_base().wrapping_add(offset as usize)
}

/// A value that one instruction loads or stores.
pub trait Word: Copy + Send + 'static {}
impl Word for u8 {}
impl Word for u16 {}
impl Word for u32 {}
impl Word for i32 {}
impl Word for f32 {}
impl Word for u64 {}
impl Word for i64 {}
impl Word for [u32; 2] {}
impl Word for [u32; 4] {}

// SAFETY of the accesses below: `checked` has established that the bytes belong to the tensor or array and are aligned to
// the access; `[u32; N]` needs less alignment than that.

#[inline(always)]
#[track_caller]
pub fn load_nc<W: Word>(p: Ptr) -> W {
    unsafe { p.checked::<W>(Access::Read).read() }
}
#[inline(always)]
#[track_caller]
pub fn load_nc_stream<W: Word>(p: Ptr) -> W {
    load_nc(p)
}
#[inline(always)]
#[track_caller]
pub fn load<W: Word>(p: Ptr) -> W {
    load_nc(p)
}
#[inline(always)]
#[track_caller]
pub fn store<W: Word>(p: Ptr, v: W) {
    unsafe { p.checked::<W>(Access::Write).write(v) }
}
#[inline(always)]
#[track_caller]
pub fn store_stream<W: Word>(p: Ptr, v: W) {
    store(p, v)
}
#[inline(always)]
#[track_caller]
pub fn load_shared<W: Word>(p: SharedPtr) -> W {
    unsafe { p.checked::<W>(Access::Read).read() }
}
#[inline(always)]
#[track_caller]
pub fn store_shared<W: Word>(p: SharedPtr, v: W) {
    unsafe { p.checked::<W>(Access::Write).write(v) }
}
#[inline(always)]
pub fn index_below(i: u32, len: u32, at: Here) -> bool {
    if i >= len && current().block().checked() {
        current().fault(FaultKind::Index { index: i, len }, at);
    }
    i < len
}
#[inline(always)]
pub fn prefetch_l2(_: Ptr) {}

#[inline(always)]
pub fn thread_idx() -> u32 {
    current().index
}
#[inline(always)]
pub fn block_dim() -> u32 {
    current().block().num_threads()
}
#[inline(always)]
pub fn block_idx_x() -> u32 {
    current().block().index[0]
}
#[inline(always)]
pub fn block_idx_y() -> u32 {
    current().block().index[1]
}
#[inline(always)]
pub fn block_idx_z() -> u32 {
    current().block().index[2]
}
#[inline(always)]
pub fn grid_dim_x() -> u32 {
    current().block().grid()[0]
}
#[inline(always)]
pub fn grid_dim_y() -> u32 {
    current().block().grid()[1]
}

fn lane() -> u32 {
    current().index % 32
}

pub fn shuffle_idx(v: u32, from: u32, at: Here) -> u32 {
    current().exchange("warp_shuffle", v as u64, at)[(from % 32) as usize] as u32
}
pub fn shuffle_xor(v: u32, mask: u32, at: Here) -> u32 {
    current().exchange("warp_shuffle_xor", v as u64, at)[((lane() ^ mask) % 32) as usize] as u32
}
pub fn shuffle_up(v: u32, delta: u32, at: Here) -> u32 {
    let from = lane().checked_sub(delta % 32).unwrap_or(lane());
    current().exchange("warp_shuffle_up", v as u64, at)[from as usize] as u32
}
pub fn shuffle_down(v: u32, delta: u32, at: Here) -> u32 {
    let from = if delta % 32 < 32 - lane() { lane() + delta % 32 } else { lane() };
    current().exchange("warp_shuffle_down", v as u64, at)[from as usize] as u32
}
pub fn ballot(vote: bool, at: Here) -> u32 {
    current().exchange("warp vote", vote as u64, at).iter().rev().fold(0, |bits, &v| bits << 1 | v as u32)
}
pub fn match_any(v: u32, at: Here) -> u32 {
    current().exchange("warp_match_any", v as u64, at).iter().rev().fold(0, |bits, &w| bits << 1 | (w == v as u64) as u32)
}
pub fn redux_max(v: u32, at: Here) -> u32 {
    current().exchange("warp_max", v as u64, at).iter().fold(0, |m, &w| m.max(w as u32))
}
pub fn redux_min(v: u32, at: Here) -> u32 {
    current().exchange("warp_min", v as u64, at).iter().fold(u32::MAX, |m, &w| m.min(w as u32))
}
pub fn redux_add(v: u32, at: Here) -> u32 {
    current().exchange("warp_sum", v as u64, at).iter().fold(0, |s, &w| s.wrapping_add(w as u32))
}
pub fn warp_sync(at: Here) {
    current().exchange(WARP_SYNC, 0, at);
}
pub fn block_sync(at: Here) {
    current().wait_for(Wait::Block(at));
}
pub fn grid_sync(_: Ptr, at: Here) {
    current().wait_for(Wait::Grid(at));
}
pub fn spin(at: Here) {
    current().wait_for(Wait::Spin(at));
}
pub fn rolled() {}

/// Words with atomic instructions.
pub trait AtomicWord: Word {
    #[doc(hidden)]
    fn to_bits64(self) -> u64;
    #[doc(hidden)]
    fn from_bits64(bits: u64) -> Self;
    #[doc(hidden)]
    fn apply(op: AtomicOp, old: Self, value: Self) -> Self;
}

macro_rules! atomic_integer {
    ($($t:ty),*) => { $(impl AtomicWord for $t {
        fn to_bits64(self) -> u64 {
            self as u64
        }
        fn from_bits64(bits: u64) -> Self {
            bits as $t
        }
        fn apply(op: AtomicOp, old: Self, value: Self) -> Self {
            match op {
                AtomicOp::Add => old.wrapping_add(value),
                AtomicOp::Min => old.min(value),
                AtomicOp::Max => old.max(value),
                AtomicOp::And => old & value,
                AtomicOp::Or => old | value,
                AtomicOp::Exchange => value,
            }
        }
    })* };
}
atomic_integer!(u32, u64);
impl AtomicWord for f32 {
    fn to_bits64(self) -> u64 {
        self.to_bits() as u64
    }
    fn from_bits64(bits: u64) -> Self {
        f32::from_bits(bits as u32)
    }
    fn apply(op: AtomicOp, old: Self, value: Self) -> Self {
        if op == AtomicOp::Add { old + value } else { value }
    }
}

/// Read-modify-write of a 4- or 8-byte word; returns the old value.
fn update<T: AtomicWord>(address: *mut T, ordering: Ordering, f: impl Fn(T) -> T) -> T {
    // SAFETY: the address was checked; on the emulator device memory is host memory, and every concurrent access to an atomic
    // word goes through here or through the acquire and release accesses below.
    let old = unsafe {
        if size_of::<T>() == 4 {
            let word = AtomicU32::from_ptr(address.cast());
            word.fetch_update(ordering, Ordering::Relaxed, |old| Some(f(T::from_bits64(old as u64)).to_bits64() as u32))
                .map(u64::from)
                .unwrap_or_else(u64::from)
        } else {
            let word = AtomicU64::from_ptr(address.cast());
            word.fetch_update(ordering, Ordering::Relaxed, |old| Some(f(T::from_bits64(old)).to_bits64()))
                .unwrap_or_else(|old| old)
        }
    };
    T::from_bits64(old)
}

#[track_caller]
pub fn atomic<T: AtomicWord>(p: Ptr, op: AtomicOp, v: T, _scope: Scope, acq_rel: bool) -> T {
    let address = p.checked::<T>(Access::Atomic);
    if acq_rel {
        current().release();
    }
    let old = update(address, Ordering::AcqRel, |old| T::apply(op, old, v));
    if acq_rel {
        current().acquire();
    }
    old
}
#[track_caller]
pub fn atomic_shared<T: AtomicWord>(p: SharedPtr, op: AtomicOp, v: T) -> T {
    let address = p.checked::<T>(Access::Atomic);
    // SAFETY: checked; the threads of a block run one at a time.
    unsafe {
        let old = address.read();
        address.write(T::apply(op, old, v));
        old
    }
}
#[track_caller]
pub fn compare_exchange<T: AtomicWord>(p: Ptr, expected: T, v: T, _scope: Scope) -> T {
    let address = p.checked::<T>(Access::Atomic);
    update(address, Ordering::AcqRel, |old| if old.to_bits64() == expected.to_bits64() { v } else { old })
}
#[track_caller]
pub fn load_relaxed<T: AtomicWord>(p: Ptr, _scope: Scope) -> T {
    update(p.checked::<T>(Access::Atomic), Ordering::AcqRel, |old| old)
}
#[track_caller]
pub fn store_relaxed<T: AtomicWord>(p: Ptr, v: T, _scope: Scope) {
    update(p.checked::<T>(Access::Atomic), Ordering::AcqRel, |_| v);
}
#[track_caller]
pub fn load_acquire<T: AtomicWord>(p: Ptr, _scope: Scope) -> T {
    let address = p.checked::<T>(Access::Atomic);
    let value = update(address, Ordering::AcqRel, |old| old);
    current().acquire();
    value
}
#[track_caller]
pub fn store_release<T: AtomicWord>(p: Ptr, v: T, _scope: Scope) {
    let address = p.checked::<T>(Access::Atomic);
    current().release();
    update(address, Ordering::AcqRel, |_| v);
}
pub fn fence(_scope: Scope) {
    std::sync::atomic::fence(Ordering::SeqCst);
    current().release();
    current().acquire();
}

#[track_caller]
pub fn copy_async<const BYTES: u32>(to: SharedPtr, from: Ptr) {
    let at = Location::caller();
    let source = from.checked_bytes(BYTES as usize, BYTES as usize, Access::Read, at);
    let thread = to.bounds(BYTES, BYTES, at);
    if thread.block().checked() {
        thread.check_shared(to.offset, BYTES as usize, Access::Write, at);
    }
    thread.block().shared_in_flight(to.offset, BYTES);
    let copy = PendingCopy { to: to.offset, from: source, bytes: BYTES, group: thread.copy_group.get() };
    thread.copies.borrow_mut().push(copy);
}
pub fn copy_commit() {
    let group = &current().copy_group;
    group.set(group.get() + 1);
}
#[track_caller]
pub fn copy_wait<const PENDING: u32>() {
    let at = Location::caller();
    let thread = current();
    let done = thread.copy_group.get().saturating_sub(PENDING);
    let mut copies = thread.copies.borrow_mut();
    copies.retain(|copy| {
        if copy.group >= done {
            return true;
        }
        let bytes = copy.bytes as usize;
        // SAFETY: both sides were checked when the copy was started.
        unsafe { std::ptr::copy_nonoverlapping(copy.from as *const u8, shared_address(thread, copy.to), bytes) };
        if thread.block().checked() {
            thread.check_shared(copy.to, bytes, Access::Write, at);
        }
        false
    });
}

#[track_caller]
pub fn copy_bulk(to: SharedPtr, from: Ptr, bytes: u32, barrier: SharedPtr) {
    let at = Location::caller();
    if !bytes.is_multiple_of(16) {
        current().fault(FaultKind::Misaligned { space: "global", address: from.address as u64, bytes }, at);
    }
    let source = from.checked_bytes(bytes as usize, 16, Access::Read, at);
    let thread = to.bounds(bytes, 16, at);
    thread.block().shared_in_flight(to.offset, bytes);
    thread.block().start_bulk(to.offset, source, bytes, barrier.offset);
}
#[track_caller]
pub fn store_bulk(from: SharedPtr, to: Ptr, bytes: u32) {
    let at = Location::caller();
    if !bytes.is_multiple_of(16) {
        current().fault(FaultKind::Misaligned { space: "global", address: to.address as u64, bytes }, at);
    }
    let thread = from.bounds(bytes, 16, at);
    if thread.block().checked() {
        thread.check_shared(from.offset, bytes as usize, Access::Read, at);
    }
    let target = to.checked_bytes(bytes as usize, 16, Access::Write, at);
    // SAFETY: both sides were checked.
    unsafe { std::ptr::copy_nonoverlapping(shared_address(thread, from.offset), target as *mut u8, bytes as usize) };
}
pub fn bulk_commit() {}
pub fn bulk_wait_read<const PENDING: u32>() {}
pub fn fence_async_copy() {}

#[track_caller]
pub fn mbarrier_init(word: SharedPtr, arrivals: u32) {
    let thread = word.bounds(8, 8, Location::caller());
    let state = Bulk { expected: arrivals, pending: arrivals, bytes: 0, phase: 0 };
    thread.block().barriers.borrow_mut().insert(word.offset, state);
}

/// Change a barrier's state, completing its phase when everything has arrived.
fn with_barrier<R>(word: SharedPtr, at: Here, f: impl FnOnce(&mut Bulk) -> R) -> R {
    let thread = word.bounds(8, 8, at);
    let mut barriers = thread.block().barriers.borrow_mut();
    let Some(state) = barriers.get_mut(&word.offset) else {
        drop(barriers);
        thread.fault(FaultKind::Unwritten { space: "shared", offset: word.offset as u64 }, at)
    };
    let result = f(state);
    if state.pending == 0 && state.bytes == 0 {
        state.phase ^= 1;
        state.pending = state.expected;
    }
    result
}

#[track_caller]
pub fn mbarrier_arrive_expect(word: SharedPtr, bytes: u32) {
    with_barrier(word, Location::caller(), |state| {
        state.bytes += bytes as i64;
        state.pending -= 1;
    });
}
#[track_caller]
pub fn mbarrier_arrive(word: SharedPtr) {
    with_barrier(word, Location::caller(), |state| state.pending -= 1);
}
#[track_caller]
pub fn mbarrier_try_wait(word: SharedPtr, parity: u32) -> bool {
    let at = Location::caller();
    let arrived = current().block().finish_bulk(word.offset);
    with_barrier(word, at, |state| state.bytes -= arrived as i64);
    with_barrier(word, at, |state| state.phase != parity & 1)
}

pub fn cvt_bf16x2(lo: f32, hi: f32) -> u32 {
    num::f32_to_bf16(lo) as u32 | (num::f32_to_bf16(hi) as u32) << 16
}
pub fn cvt_f16x2(lo: f32, hi: f32) -> u32 {
    num::f32_to_f16(lo) as u32 | (num::f32_to_f16(hi) as u32) << 16
}
pub fn cvt_f16_rz(v: f32) -> u32 {
    num::f32_to_f16_rz(v) as u32
}
pub fn cvt_f16x2_rz(lo: f32, hi: f32) -> u32 {
    num::f32_to_f16_rz(lo) as u32 | (num::f32_to_f16_rz(hi) as u32) << 16
}
pub fn cvt_f32_f16x2(v: u32) -> [f32; 2] {
    [num::f16_to_f32(v as u16), num::f16_to_f32((v >> 16) as u16)]
}
pub fn cvt_e4m3x2(lo: f32, hi: f32) -> u32 {
    num::f32_to_e4m3(lo) as u32 | (num::f32_to_e4m3(hi) as u32) << 8
}
pub fn cvt_e5m2x2(lo: f32, hi: f32) -> u32 {
    num::f32_to_e5m2(lo) as u32 | (num::f32_to_e5m2(hi) as u32) << 8
}
pub fn cvt_f16x2_e4m3x2(v: u32) -> u32 {
    cvt_f16x2(num::e4m3_to_f32(v as u8), num::e4m3_to_f32((v >> 8) as u8))
}
/// The integer code is the faster way here; tests still run the packed one, see [`super::convert`].
pub const PACKED_E2M1: bool = false;

/// Apply to the low and to the high half of words.
fn halves<const N: usize>(words: [u32; N], f: impl Fn([u16; N]) -> u16) -> u32 {
    f(words.map(|w| w as u16)) as u32 | (f(words.map(|w| (w >> 16) as u16)) as u32) << 16
}
pub fn mul_f16x2(a: u32, b: u32) -> u32 {
    // Exact in f32, so there is one rounding.
    halves([a, b], |[a, b]| num::f32_to_f16(num::f16_to_f32(a) * num::f16_to_f32(b)))
}
/// `a * b + c` with one rounding.
pub fn fma_f16x2(a: u32, b: u32, c: u32) -> u32 {
    halves([a, b, c], |[a, b, c]| {
        // The product and, as f16 spans 2^-24 to 2^16, also the sum are exact in f64.
        let exact = num::f16_to_f32(a) as f64 * num::f16_to_f32(b) as f64 + num::f16_to_f32(c) as f64;
        num::f32_to_f16(round_to_odd(exact))
    })
}
/// f64 to f32, inexact values to the neighbour with an odd last bit: a rounding to fewer bits afterwards is then the rounding
/// of the f64.
fn round_to_odd(v: f64) -> f32 {
    let near = v as f32;
    if near as f64 == v || near.is_nan() {
        return near;
    }
    let bits = near.to_bits();
    // Even: the odd neighbour on the other side of `v`. Bits of one sign order by magnitude.
    let away = (near as f64).abs() > v.abs();
    f32::from_bits(if bits & 1 == 1 {
        bits
    } else if away {
        bits - 1
    } else {
        bits + 1
    })
}
fn pick_abs(a: f32, b: f32, a_first: bool) -> f32 {
    let sign = (a.to_bits() ^ b.to_bits()) & 0x8000_0000;
    let magnitude = if a.is_nan() {
        b
    } else if b.is_nan() || a_first {
        a
    } else {
        b
    };
    f32::from_bits(magnitude.abs().to_bits() | sign)
}
pub fn min_abs_f16x2(a: u32, b: u32) -> u32 {
    halves([a, b], |[a, b]| {
        let (a, b) = (num::f16_to_f32(a), num::f16_to_f32(b));
        num::f32_to_f16(pick_abs(a, b, a.abs() <= b.abs()))
    })
}
pub fn max_abs_f16x2(a: u32, b: u32) -> u32 {
    halves([a, b], |[a, b]| {
        let (a, b) = (num::f16_to_f32(a), num::f16_to_f32(b));
        num::f32_to_f16(pick_abs(a, b, a.abs() >= b.abs()))
    })
}
pub fn max_abs_bf16x2(a: u32, b: u32) -> u32 {
    const INFINITY: u16 = 0x7F80;
    halves([a, b], |[a, b]| {
        let (x, y) = (a & 0x7FFF, b & 0x7FFF);
        let larger = match (x > INFINITY, y > INFINITY) {
            (true, true) => 0x7FFF,
            (true, false) => y,
            (false, true) => x,
            (false, false) => x.max(y),
        };
        larger | (a ^ b) & 0x8000
    })
}
pub fn min_nan_bf16x2(a: u32, b: u32) -> u32 {
    halves([a, b], |[a, b]| num::f32_to_bf16(min_nan(num::bf16_to_f32(a), num::bf16_to_f32(b))))
}
pub fn max_nan_bf16x2(a: u32, b: u32) -> u32 {
    halves([a, b], |[a, b]| num::f32_to_bf16(max_nan(num::bf16_to_f32(a), num::bf16_to_f32(b))))
}
pub fn greater_bf16x2(a: u32, b: u32) -> u32 {
    halves([a, b], |[a, b]| if num::bf16_to_f32(a) > num::bf16_to_f32(b) { 0x3F80 } else { 0 })
}
pub fn byte_permute(a: u32, b: u32, selector: u32) -> u32 {
    let bytes = (b as u64) << 32 | a as u64;
    (0..4).fold(0, |word, n| {
        let nibble = selector >> (4 * n);
        let byte = (bytes >> (8 * (nibble & 7))) as u8;
        let byte = if nibble & 8 != 0 { ((byte as i8) >> 7) as u8 } else { byte };
        word | (byte as u32) << (8 * n)
    })
}

pub fn fma(a: f32, b: f32, c: f32) -> f32 {
    let sum = a.mul_add(b, c);
    // The only NaN that the instruction returns.
    if sum.is_nan() { f32::from_bits(0x7FFF_FFFF) } else { sum }
}
pub fn canonical(v: f32) -> f32 {
    if v.is_nan() { f32::from_bits(0x7FFF_FFFF) } else { v }
}
/// `a * b + c` rounded toward minus infinity: the nearest value, corrected by the exact remainder.
pub fn fma_toward_minus_inf(a: f32, b: f32, c: f32) -> f32 {
    let product = a as f64 * b as f64;
    let sum = product + c as f64;
    let part = sum - product;
    let rest = (product - (sum - part)) + (c as f64 - part);
    let mut r = sum as f32;
    if r as f64 > sum || (r as f64 == sum && rest < 0.0) {
        r = r.next_down();
    }
    r
}
pub fn max(a: f32, b: f32) -> f32 {
    if a.is_nan() || a < b || (a == b && a.is_sign_negative()) { b } else { a }
}
pub fn min(a: f32, b: f32) -> f32 {
    if a.is_nan() || b < a || (a == b && b.is_sign_negative()) { b } else { a }
}
pub fn max_abs(a: f32, b: f32) -> f32 {
    max(a.abs(), b.abs()).copysign(if a.is_sign_negative() == b.is_sign_negative() { 1.0 } else { -1.0 })
}
pub fn max_nan(a: f32, b: f32) -> f32 {
    if a.is_nan() || b.is_nan() { f32::NAN } else { max(a, b) }
}
pub fn min_nan(a: f32, b: f32) -> f32 {
    if a.is_nan() || b.is_nan() { f32::NAN } else { min(a, b) }
}
pub fn saturate(v: f32) -> f32 {
    if v > 0.0 { v.min(1.0) } else { 0.0 }
}
pub fn multiply_wide(a: u32, b: u32) -> [u32; 2] {
    let product = a as u64 * b as u64;
    [product as u32, (product >> 32) as u32]
}
pub fn sqrt(v: f32) -> f32 {
    v.sqrt()
}
/// What `.ftz` does to subnormals.
fn flush(v: f32) -> f32 {
    if v.abs() < f32::MIN_POSITIVE { 0f32.copysign(v) } else { v }
}
pub fn ex2(v: f32) -> f32 {
    flush((flush(v) as f64).exp2() as f32)
}
pub fn lg2(v: f32) -> f32 {
    (flush(v) as f64).log2() as f32
}
pub fn rsqrt(v: f32) -> f32 {
    flush((1.0 / (flush(v) as f64).sqrt()) as f32)
}
pub fn rcp(v: f32) -> f32 {
    flush((1.0 / flush(v) as f64) as f32)
}

pub fn select_bits(mask: u32, a: u32, b: u32) -> u32 {
    (a & mask) | (b & !mask)
}
/// `a * b + c` with one rounding, per half.
pub fn fma_bf16x2(a: u32, b: u32, c: u32) -> u32 {
    let half = |shift: u32| {
        let [a, b, c] = [a, b, c].map(|w| num::bf16_to_f32((w >> shift) as u16) as f64);
        // The product is exact. Where the sum is not, its last bit is made odd, so that the rounding to bf16 sees what was cut.
        let (product, sum) = (a * b, a * b + c);
        let part = sum - product;
        let rest = (product - (sum - part)) + (c - part);
        let odd = if rest == 0.0 || !sum.is_finite() || sum.to_bits() & 1 == 1 {
            sum
        } else if (rest > 0.0) == (sum > 0.0) {
            f64::from_bits(sum.to_bits() | 1)
        } else {
            f64::from_bits(sum.to_bits() - 1)
        };
        num::f32_to_bf16(to_f32_odd(odd)) as u32
    };
    half(0) | half(16) << 16
}
/// f64 to f32: what is inexact is cut and its last bit made odd.
fn to_f32_odd(v: f64) -> f32 {
    let near = v as f32;
    if near as f64 == v || !near.is_finite() {
        return near;
    }
    let cut = if (near as f64).abs() > v.abs() { near.to_bits() - 1 } else { near.to_bits() };
    f32::from_bits(cut | 1)
}
pub fn min_bf16x2(a: u32, b: u32) -> u32 {
    let half = |shift: u32| {
        let smaller = min(num::bf16_to_f32((a >> shift) as u16), num::bf16_to_f32((b >> shift) as u16));
        num::f32_to_bf16(smaller) as u32
    };
    half(0) | half(16) << 16
}
pub fn max_u16x2(a: u32, b: u32) -> u32 {
    (a as u16).max(b as u16) as u32 | ((a >> 16).max(b >> 16)) << 16
}

/// All lanes' fragments: word `i` of lane `l` is `[i][l]`.
fn gather<const N: usize>(op: &'static str, words: [u32; N], at: Here) -> [[u32; 32]; N] {
    words.map(|w| {
        let lanes = current().exchange(op, w as u64, at);
        core::array::from_fn(|l| lanes[l] as u32)
    })
}

/// The four sums of this lane, `k` products each.
fn multiply(c: [f32; 4], k: usize, a: impl Fn(usize, usize) -> f64, b: impl Fn(usize, usize) -> f64) -> [f32; 4] {
    let (g, t) = ((lane() / 4) as usize, (lane() % 4) as usize);
    core::array::from_fn(|i| {
        let (row, col) = (g + 8 * (i / 2), 2 * t + i % 2);
        (c[i] as f64 + (0..k).map(|j| a(row, j) * b(j, col)).sum::<f64>()) as f32
    })
}

pub fn mma_bf16(a: [u32; 4], b: [u32; 2], c: [f32; 4], at: Here) -> [f32; 4] {
    let (a, b) = (gather("warp_mma_bf16", a, at), gather("warp_mma_bf16", b, at));
    let half = |w: u32, odd: usize| num::bf16_to_f32((w >> (16 * odd)) as u16) as f64;
    multiply(
        c,
        16,
        |row, j| half(a[row / 8 + 2 * (j / 8)][row % 8 * 4 + j % 8 / 2], j % 2),
        |j, col| half(b[j / 8][col * 4 + j % 8 / 2], j % 2),
    )
}
pub fn mma_tf32(a: [f32; 4], b: [f32; 2], c: [f32; 4], at: Here) -> [f32; 4] {
    let (a, b) = (gather("warp_mma_tf32", a.map(f32::to_bits), at), gather("warp_mma_tf32", b.map(f32::to_bits), at));
    let tf32 = |w: u32| f32::from_bits(w & 0xffff_e000) as f64;
    multiply(c, 8, |row, j| tf32(a[row / 8 + 2 * (j / 4)][row % 8 * 4 + j % 4]), |j, col| tf32(b[j / 4][col * 4 + j % 4]))
}
