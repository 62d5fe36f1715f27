//! Backend 1: PTX. Intrinsics where the compiler must know that an operation is convergent, inline assembly elsewhere.
//!
//! SAFETY of everything here: addresses come from the launcher, which checked shapes and sizes against the tensors, and from
//! kernels whose every index the emulator checks in tests. `nomem` on loads of [`In`](super::In) is its contract: nobody
//! writes that memory while the kernel runs.

use super::atomic::{AtomicOp, Scope};
use core::arch::asm;
use core::arch::nvptx as arch;

/// A global address.
pub type Ptr = GlobalPtr;

#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct GlobalPtr(*mut u8);

impl GlobalPtr {
    #[inline(always)]
    pub fn offset(self, bytes: u64) -> Self {
        Self(self.0.wrapping_add(bytes as usize))
    }

    #[inline(always)]
    pub fn address(self) -> u64 {
        self.0 as u64
    }
}

/// A shared address, 32 bits as PTX wants it.
#[derive(Clone, Copy)]
pub struct SharedPtr(u32);

core::arch::global_asm!(".extern .shared .align 1024 .b8 ferrotile_shared[];");

impl SharedPtr {
    #[inline(always)]
    pub fn new(offset: u32, _start: u32, _end: u32) -> Self {
        let base: u32;
        unsafe { asm!("mov.u32 {0}, ferrotile_shared;", out(reg32) base, options(pure, nomem, nostack, preserves_flags)) };
        Self(base + offset)
    }
}

/// Source position; only the emulator has one.
#[derive(Clone, Copy)]
pub struct Here;

#[inline(always)]
pub fn here() -> Here {
    Here
}

/// A value that one instruction loads or stores.
pub trait Word: Copy {
    #[doc(hidden)]
    unsafe fn ld_nc(p: Ptr) -> Self;
    #[doc(hidden)]
    unsafe fn ld_nc_stream(p: Ptr) -> Self;
    #[doc(hidden)]
    unsafe fn ld(p: Ptr) -> Self;
    #[doc(hidden)]
    unsafe fn st(p: Ptr, v: Self);
    #[doc(hidden)]
    unsafe fn st_stream(p: Ptr, v: Self);
    #[doc(hidden)]
    unsafe fn ld_shared(p: SharedPtr) -> Self;
    #[doc(hidden)]
    unsafe fn st_shared(p: SharedPtr, v: Self);
}

macro_rules! word {
    ($($t:ty, $ty:literal, $reg:ident, $bits:ty, $v:ident => $to:expr, $r:ident => $from:expr;)*) => { $(impl Word for $t {
        #[inline(always)]
        unsafe fn ld_nc(p: Ptr) -> Self {
            let $r: $bits;
            unsafe { asm!(concat!("ld.global.nc.", $ty, " {0}, [{1}];"), out($reg) $r, in(reg64) p.0, options(pure, nomem, nostack, preserves_flags)) };
            $from
        }
        #[inline(always)]
        unsafe fn ld_nc_stream(p: Ptr) -> Self {
            let $r: $bits;
            unsafe { asm!(concat!("ld.global.nc.L1::no_allocate.", $ty, " {0}, [{1}];"), out($reg) $r, in(reg64) p.0, options(pure, nomem, nostack, preserves_flags)) };
            $from
        }
        #[inline(always)]
        unsafe fn ld(p: Ptr) -> Self {
            let $r: $bits;
            unsafe { asm!(concat!("ld.global.", $ty, " {0}, [{1}];"), out($reg) $r, in(reg64) p.0, options(readonly, nostack, preserves_flags)) };
            $from
        }
        #[inline(always)]
        unsafe fn st(p: Ptr, $v: Self) {
            unsafe { asm!(concat!("st.global.", $ty, " [{0}], {1};"), in(reg64) p.0, in($reg) $to, options(nostack, preserves_flags)) };
        }
        #[inline(always)]
        unsafe fn st_stream(p: Ptr, $v: Self) {
            unsafe { asm!(concat!("st.global.cs.", $ty, " [{0}], {1};"), in(reg64) p.0, in($reg) $to, options(nostack, preserves_flags)) };
        }
        #[inline(always)]
        unsafe fn ld_shared(p: SharedPtr) -> Self {
            let $r: $bits;
            unsafe { asm!(concat!("ld.shared.", $ty, " {0}, [{1}];"), out($reg) $r, in(reg32) p.0, options(readonly, nostack, preserves_flags)) };
            $from
        }
        #[inline(always)]
        unsafe fn st_shared(p: SharedPtr, $v: Self) {
            unsafe { asm!(concat!("st.shared.", $ty, " [{0}], {1};"), in(reg32) p.0, in($reg) $to, options(nostack, preserves_flags)) };
        }
    })* };
}
word! {
    u8, "u8", reg32, u32, v => v as u32, r => r as u8;
    u16, "u16", reg16, u16, v => v, r => r;
    u32, "u32", reg32, u32, v => v, r => r;
    i32, "u32", reg32, u32, v => v as u32, r => r as i32;
    f32, "f32", reg32, f32, v => v, r => r;
    u64, "u64", reg64, u64, v => v, r => r;
    i64, "u64", reg64, u64, v => v as u64, r => r as i64;
}

macro_rules! vector_word {
    ($($n:literal, $ty:literal, $list:literal, $at:literal, $store_at:literal, $store_list:literal, $($i:literal $r:ident),*;)*) => { $(impl Word for [u32; $n] {
        #[inline(always)]
        unsafe fn ld_nc(p: Ptr) -> Self {
            $(let $r: u32;)*
            unsafe { asm!(concat!("ld.global.nc.", $ty, " ", $list, ", [", $at, "];"), $(out(reg32) $r,)* in(reg64) p.0, options(pure, nomem, nostack, preserves_flags)) };
            [$($r),*]
        }
        #[inline(always)]
        unsafe fn ld_nc_stream(p: Ptr) -> Self {
            $(let $r: u32;)*
            unsafe { asm!(concat!("ld.global.nc.L1::no_allocate.", $ty, " ", $list, ", [", $at, "];"), $(out(reg32) $r,)* in(reg64) p.0, options(pure, nomem, nostack, preserves_flags)) };
            [$($r),*]
        }
        #[inline(always)]
        unsafe fn ld(p: Ptr) -> Self {
            $(let $r: u32;)*
            unsafe { asm!(concat!("ld.global.", $ty, " ", $list, ", [", $at, "];"), $(out(reg32) $r,)* in(reg64) p.0, options(readonly, nostack, preserves_flags)) };
            [$($r),*]
        }
        #[inline(always)]
        unsafe fn st(p: Ptr, v: Self) {
            unsafe { asm!(concat!("st.global.", $ty, " [{0}], ", $store_list, ";"), in(reg64) p.0, $(in(reg32) v[$i],)* options(nostack, preserves_flags)) };
        }
        #[inline(always)]
        unsafe fn st_stream(p: Ptr, v: Self) {
            unsafe { asm!(concat!("st.global.cs.", $ty, " [{0}], ", $store_list, ";"), in(reg64) p.0, $(in(reg32) v[$i],)* options(nostack, preserves_flags)) };
        }
        #[inline(always)]
        unsafe fn ld_shared(p: SharedPtr) -> Self {
            $(let $r: u32;)*
            unsafe { asm!(concat!("ld.shared.", $ty, " ", $list, ", [", $at, "];"), $(out(reg32) $r,)* in(reg32) p.0, options(readonly, nostack, preserves_flags)) };
            [$($r),*]
        }
        #[inline(always)]
        unsafe fn st_shared(p: SharedPtr, v: Self) {
            unsafe { asm!(concat!("st.shared.", $ty, " [{0}], ", $store_list, ";"), in(reg32) p.0, $(in(reg32) v[$i],)* options(nostack, preserves_flags)) };
        }
    })* };
}
vector_word! {
    2, "v2.u32", "{{{0},{1}}}", "{2}", "{0}", "{{{1},{2}}}", 0 a, 1 b;
    4, "v4.u32", "{{{0},{1},{2},{3}}}", "{4}", "{0}", "{{{1},{2},{3},{4}}}", 0 a, 1 b, 2 c, 3 d;
}

#[inline(always)]
pub fn load_nc<W: Word>(p: Ptr) -> W {
    unsafe { W::ld_nc(p) }
}
#[inline(always)]
pub fn load_nc_stream<W: Word>(p: Ptr) -> W {
    unsafe { W::ld_nc_stream(p) }
}
#[inline(always)]
pub fn load<W: Word>(p: Ptr) -> W {
    unsafe { W::ld(p) }
}
#[inline(always)]
pub fn store<W: Word>(p: Ptr, v: W) {
    unsafe { W::st(p, v) }
}
#[inline(always)]
pub fn store_stream<W: Word>(p: Ptr, v: W) {
    unsafe { W::st_stream(p, v) }
}
#[inline(always)]
pub fn load_shared<W: Word>(p: SharedPtr) -> W {
    unsafe { W::ld_shared(p) }
}
#[inline(always)]
pub fn store_shared<W: Word>(p: SharedPtr, v: W) {
    unsafe { W::st_shared(p, v) }
}
#[inline(always)]
pub fn index_below(i: u32, len: u32, _: Here) -> bool {
    i < len
}
#[inline(always)]
pub fn prefetch_l2(p: Ptr) {
    unsafe { asm!("prefetch.global.L2 [{0}];", in(reg64) p.0, options(readonly, nostack, preserves_flags)) }
}

// Indices. The intrinsics return i32.
#[inline(always)]
pub fn thread_idx() -> u32 {
    unsafe { arch::_thread_idx_x() as u32 }
}
#[inline(always)]
pub fn block_dim() -> u32 {
    unsafe { arch::_block_dim_x() as u32 }
}
#[inline(always)]
pub fn block_idx_x() -> u32 {
    unsafe { arch::_block_idx_x() as u32 }
}
#[inline(always)]
pub fn block_idx_y() -> u32 {
    unsafe { arch::_block_idx_y() as u32 }
}
#[inline(always)]
pub fn block_idx_z() -> u32 {
    unsafe { arch::_block_idx_z() as u32 }
}
#[inline(always)]
pub fn grid_dim_x() -> u32 {
    unsafe { arch::_grid_dim_x() as u32 }
}
#[inline(always)]
pub fn grid_dim_y() -> u32 {
    unsafe { arch::_grid_dim_y() as u32 }
}

unsafe extern "C" {
    #[link_name = "llvm.nvvm.barrier.cta.sync.aligned.all"]
    fn barrier_sync(id: i32);
    #[link_name = "llvm.nvvm.bar.warp.sync"]
    fn bar_warp_sync(mask: i32);
    #[link_name = "llvm.nvvm.shfl.sync.idx.i32"]
    fn shfl_idx(mask: i32, v: i32, lane: i32, c: i32) -> i32;
    #[link_name = "llvm.nvvm.shfl.sync.up.i32"]
    fn shfl_up(mask: i32, v: i32, delta: i32, c: i32) -> i32;
    #[link_name = "llvm.nvvm.shfl.sync.down.i32"]
    fn shfl_down(mask: i32, v: i32, delta: i32, c: i32) -> i32;
    #[link_name = "llvm.nvvm.shfl.sync.bfly.i32"]
    fn shfl_bfly(mask: i32, v: i32, lane_mask: i32, c: i32) -> i32;
    #[link_name = "llvm.nvvm.vote.ballot.sync"]
    fn vote_ballot(mask: i32, vote: bool) -> i32;
    #[link_name = "llvm.nvvm.match.any.sync.i32"]
    fn match_any_sync(mask: i32, v: i32) -> i32;
    #[link_name = "llvm.nvvm.redux.sync.umax"]
    fn redux_umax(v: i32, mask: i32) -> i32;
    #[link_name = "llvm.nvvm.redux.sync.umin"]
    fn redux_umin(v: i32, mask: i32) -> i32;
    #[link_name = "llvm.nvvm.redux.sync.add"]
    fn redux_sum(v: i32, mask: i32) -> i32;
    #[link_name = "llvm.fma.f32"]
    fn llvm_fma(a: f32, b: f32, c: f32) -> f32;
}

const FULL: i32 = -1;

#[inline(always)]
pub fn shuffle_idx(v: u32, lane: u32, _: Here) -> u32 {
    unsafe { shfl_idx(FULL, v as i32, lane as i32, 0x1f) as u32 }
}
#[inline(always)]
pub fn shuffle_xor(v: u32, mask: u32, _: Here) -> u32 {
    unsafe { shfl_bfly(FULL, v as i32, mask as i32, 0x1f) as u32 }
}
#[inline(always)]
pub fn shuffle_up(v: u32, delta: u32, _: Here) -> u32 {
    unsafe { shfl_up(FULL, v as i32, delta as i32, 0) as u32 }
}
#[inline(always)]
pub fn shuffle_down(v: u32, delta: u32, _: Here) -> u32 {
    unsafe { shfl_down(FULL, v as i32, delta as i32, 0x1f) as u32 }
}
#[inline(always)]
pub fn ballot(vote: bool, _: Here) -> u32 {
    unsafe { vote_ballot(FULL, vote) as u32 }
}
#[inline(always)]
pub fn match_any(v: u32, _: Here) -> u32 {
    unsafe { match_any_sync(FULL, v as i32) as u32 }
}
#[inline(always)]
pub fn redux_max(v: u32, _: Here) -> u32 {
    unsafe { redux_umax(v as i32, FULL) as u32 }
}
#[inline(always)]
pub fn redux_min(v: u32, _: Here) -> u32 {
    unsafe { redux_umin(v as i32, FULL) as u32 }
}
#[inline(always)]
pub fn redux_add(v: u32, _: Here) -> u32 {
    unsafe { redux_sum(v as i32, FULL) as u32 }
}
#[inline(always)]
pub fn warp_sync(_: Here) {
    unsafe { bar_warp_sync(FULL) }
}
#[inline(always)]
pub fn block_sync(_: Here) {
    unsafe { barrier_sync(0) }
}
#[inline(always)]
pub fn spin(_: Here) {}
#[inline(always)]
pub fn opaque(v: u32) -> u32 {
    let r: u32;
    // Not `pure`: two calls with one value are two values.
    unsafe { asm!("mov.b32 {0}, {1};", out(reg32) r, in(reg32) v, options(nomem, nostack, preserves_flags)) };
    r
}
/// ptxas takes the line as one about the loop whose first block it stands in.
#[inline(always)]
pub fn rolled() {
    unsafe { asm!(".pragma \"nounroll\";", options(nomem, nostack, preserves_flags)) }
}

/// Thread 0 of each block adds 1, that of block 0 adds what is missing to 2^31: the top bit flips exactly when all have
/// arrived, and the low bits are 0 again, so the word needs no reset.
#[inline(always)]
pub fn grid_sync(word: Ptr, at: Here) {
    block_sync(at);
    if thread_idx() == 0 {
        let blocks = grid_dim_x() * grid_dim_y() * unsafe { arch::_grid_dim_z() as u32 };
        let first = block_idx_x() | block_idx_y() | block_idx_z() == 0;
        let add = if first { 0x8000_0000 - (blocks - 1) } else { 1 };
        let before = atomic::<u32>(word, AtomicOp::Add, add, Scope::Gpu, true);
        while (before ^ load_acquire::<u32>(word, Scope::Gpu)) >> 31 == 0 {}
    }
    block_sync(at);
}

/// Words with atomic instructions.
pub trait AtomicWord: Word {
    #[doc(hidden)]
    unsafe fn atom(p: Ptr, op: AtomicOp, v: Self, scope: Scope, acq_rel: bool) -> Self;
    #[doc(hidden)]
    unsafe fn atom_shared(p: SharedPtr, op: AtomicOp, v: Self) -> Self;
    #[doc(hidden)]
    unsafe fn cas(p: Ptr, expected: Self, v: Self, scope: Scope) -> Self;
    #[doc(hidden)]
    unsafe fn ld_relaxed(p: Ptr, scope: Scope) -> Self;
    #[doc(hidden)]
    unsafe fn st_relaxed(p: Ptr, v: Self, scope: Scope);
    #[doc(hidden)]
    unsafe fn ld_acquire(p: Ptr, scope: Scope) -> Self;
    #[doc(hidden)]
    unsafe fn st_release(p: Ptr, v: Self, scope: Scope);
}

macro_rules! atom {
    ($sem:literal, $scope:literal, $space:literal, $op:literal, $ty:literal, $areg:ident, $reg:ident, $p:expr, $v:expr) => {{
        let r;
        asm!(concat!("atom.", $sem, ".", $scope, ".", $space, ".", $op, ".", $ty, " {0}, [{1}], {2};"), out($reg) r, in($areg) $p, in($reg) $v, options(nostack));
        r
    }};
}
macro_rules! atom_scopes {
    ($scope:expr, $acq_rel:expr, $op:literal, $ty:literal, $reg:ident, $p:expr, $v:expr) => {
        match ($scope, $acq_rel) {
            (Scope::Block, false) => atom!("relaxed", "cta", "global", $op, $ty, reg64, $reg, $p, $v),
            (Scope::Gpu, false) => atom!("relaxed", "gpu", "global", $op, $ty, reg64, $reg, $p, $v),
            (Scope::System, false) => atom!("relaxed", "sys", "global", $op, $ty, reg64, $reg, $p, $v),
            (Scope::Block, true) => atom!("acq_rel", "cta", "global", $op, $ty, reg64, $reg, $p, $v),
            (Scope::Gpu, true) => atom!("acq_rel", "gpu", "global", $op, $ty, reg64, $reg, $p, $v),
            (Scope::System, true) => atom!("acq_rel", "sys", "global", $op, $ty, reg64, $reg, $p, $v),
        }
    };
}
macro_rules! ld_scopes {
    ($sem:literal, $scope:expr, $ty:literal, $reg:ident, $p:expr) => {{
        let r;
        match $scope {
            Scope::Block => asm!(concat!("ld.", $sem, ".cta.global.", $ty, " {0}, [{1}];"), out($reg) r, in(reg64) $p, options(nostack)),
            Scope::Gpu => asm!(concat!("ld.", $sem, ".gpu.global.", $ty, " {0}, [{1}];"), out($reg) r, in(reg64) $p, options(nostack)),
            Scope::System => asm!(concat!("ld.", $sem, ".sys.global.", $ty, " {0}, [{1}];"), out($reg) r, in(reg64) $p, options(nostack)),
        }
        r
    }};
}
macro_rules! st_scopes {
    ($sem:literal, $scope:expr, $ty:literal, $reg:ident, $p:expr, $v:expr) => {{
        match $scope {
            Scope::Block => asm!(concat!("st.", $sem, ".cta.global.", $ty, " [{0}], {1};"), in(reg64) $p, in($reg) $v, options(nostack)),
            Scope::Gpu => asm!(concat!("st.", $sem, ".gpu.global.", $ty, " [{0}], {1};"), in(reg64) $p, in($reg) $v, options(nostack)),
            Scope::System => asm!(concat!("st.", $sem, ".sys.global.", $ty, " [{0}], {1};"), in(reg64) $p, in($reg) $v, options(nostack)),
        }
    }};
}
macro_rules! atomic_word {
    ($($t:ty, $reg:ident, $add:literal, $bits:literal, $plain:literal, [$($op:ident $name:literal $ty:literal),*];)*) => { $(impl AtomicWord for $t {
        #[inline(always)]
        unsafe fn atom(p: Ptr, op: AtomicOp, v: Self, scope: Scope, acq_rel: bool) -> Self {
            unsafe {
                match op {
                    AtomicOp::Add => atom_scopes!(scope, acq_rel, "add", $add, $reg, p.0, v),
                    $(AtomicOp::$op => atom_scopes!(scope, acq_rel, $name, $ty, $reg, p.0, v),)*
                    #[allow(unreachable_patterns)]
                    _ => atom_scopes!(scope, acq_rel, "exch", $bits, $reg, p.0, v),
                }
            }
        }
        #[inline(always)]
        unsafe fn atom_shared(p: SharedPtr, op: AtomicOp, v: Self) -> Self {
            unsafe {
                match op {
                    AtomicOp::Add => atom!("relaxed", "cta", "shared", "add", $add, reg32, $reg, p.0, v),
                    $(AtomicOp::$op => atom!("relaxed", "cta", "shared", $name, $ty, reg32, $reg, p.0, v),)*
                    #[allow(unreachable_patterns)]
                    _ => atom!("relaxed", "cta", "shared", "exch", $bits, reg32, $reg, p.0, v),
                }
            }
        }
        #[inline(always)]
        unsafe fn cas(p: Ptr, expected: Self, v: Self, scope: Scope) -> Self {
            let r;
            unsafe {
                match scope {
                    Scope::Block => asm!(concat!("atom.relaxed.cta.global.cas.", $bits, " {0}, [{1}], {2}, {3};"), out($reg) r, in(reg64) p.0, in($reg) expected, in($reg) v, options(nostack)),
                    Scope::Gpu => asm!(concat!("atom.relaxed.gpu.global.cas.", $bits, " {0}, [{1}], {2}, {3};"), out($reg) r, in(reg64) p.0, in($reg) expected, in($reg) v, options(nostack)),
                    Scope::System => asm!(concat!("atom.relaxed.sys.global.cas.", $bits, " {0}, [{1}], {2}, {3};"), out($reg) r, in(reg64) p.0, in($reg) expected, in($reg) v, options(nostack)),
                }
            }
            r
        }
        #[inline(always)]
        unsafe fn ld_relaxed(p: Ptr, scope: Scope) -> Self {
            unsafe { ld_scopes!("relaxed", scope, $plain, $reg, p.0) }
        }
        #[inline(always)]
        unsafe fn st_relaxed(p: Ptr, v: Self, scope: Scope) {
            unsafe { st_scopes!("relaxed", scope, $plain, $reg, p.0, v) }
        }
        #[inline(always)]
        unsafe fn ld_acquire(p: Ptr, scope: Scope) -> Self {
            unsafe { ld_scopes!("acquire", scope, $plain, $reg, p.0) }
        }
        #[inline(always)]
        unsafe fn st_release(p: Ptr, v: Self, scope: Scope) {
            unsafe { st_scopes!("release", scope, $plain, $reg, p.0, v) }
        }
    })* };
}
atomic_word! {
    u32, reg32, "u32", "b32", "u32", [Min "min" "u32", Max "max" "u32", And "and" "b32", Or "or" "b32"];
    u64, reg64, "u64", "b64", "u64", [Min "min" "u64", Max "max" "u64", And "and" "b64", Or "or" "b64"];
    f32, reg32, "f32", "b32", "f32", [];
}

#[inline(always)]
pub fn atomic<T: AtomicWord>(p: Ptr, op: AtomicOp, v: T, scope: Scope, acq_rel: bool) -> T {
    unsafe { T::atom(p, op, v, scope, acq_rel) }
}
#[inline(always)]
pub fn atomic_shared<T: AtomicWord>(p: SharedPtr, op: AtomicOp, v: T) -> T {
    unsafe { T::atom_shared(p, op, v) }
}
#[inline(always)]
pub fn compare_exchange<T: AtomicWord>(p: Ptr, expected: T, v: T, scope: Scope) -> T {
    unsafe { T::cas(p, expected, v, scope) }
}
#[inline(always)]
pub fn load_relaxed<T: AtomicWord>(p: Ptr, scope: Scope) -> T {
    unsafe { T::ld_relaxed(p, scope) }
}
#[inline(always)]
pub fn store_relaxed<T: AtomicWord>(p: Ptr, v: T, scope: Scope) {
    unsafe { T::st_relaxed(p, v, scope) }
}
#[inline(always)]
pub fn load_acquire<T: AtomicWord>(p: Ptr, scope: Scope) -> T {
    unsafe { T::ld_acquire(p, scope) }
}
#[inline(always)]
pub fn store_release<T: AtomicWord>(p: Ptr, v: T, scope: Scope) {
    unsafe { T::st_release(p, v, scope) }
}
#[inline(always)]
pub fn fence(scope: Scope) {
    unsafe {
        match scope {
            Scope::Block => asm!("fence.acq_rel.cta;", options(nostack)),
            Scope::Gpu => asm!("fence.acq_rel.gpu;", options(nostack)),
            Scope::System => asm!("fence.acq_rel.sys;", options(nostack)),
        }
    }
}

#[inline(always)]
pub fn copy_async<const BYTES: u32>(to: SharedPtr, from: Ptr) {
    // Only 16 bytes can go past L1.
    if BYTES == 16 {
        unsafe { asm!("cp.async.cg.shared.global [{0}], [{1}], 16;", in(reg32) to.0, in(reg64) from.0, options(nostack)) }
    } else {
        unsafe { asm!("cp.async.ca.shared.global [{0}], [{1}], 4;", in(reg32) to.0, in(reg64) from.0, options(nostack)) }
    }
}
#[inline(always)]
pub fn copy_commit() {
    unsafe { asm!("cp.async.commit_group;", options(nostack)) }
}
#[inline(always)]
pub fn copy_wait<const PENDING: u32>() {
    unsafe { asm!("cp.async.wait_group {0};", const PENDING, options(nostack)) }
}
#[inline(always)]
pub fn copy_bulk(to: SharedPtr, from: Ptr, bytes: u32, barrier: SharedPtr) {
    unsafe {
        asm!("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [{0}], [{1}], {2}, [{3}];",
            in(reg32) to.0, in(reg64) from.0, in(reg32) bytes, in(reg32) barrier.0, options(nostack))
    }
}
#[inline(always)]
pub fn store_bulk(from: SharedPtr, to: Ptr, bytes: u32) {
    unsafe {
        asm!("cp.async.bulk.global.shared::cta.bulk_group [{0}], [{1}], {2};", in(reg64) to.0, in(reg32) from.0, in(reg32) bytes, options(nostack))
    }
}
#[inline(always)]
pub fn bulk_commit() {
    unsafe { asm!("cp.async.bulk.commit_group;", options(nostack)) }
}
#[inline(always)]
pub fn bulk_wait_read<const PENDING: u32>() {
    unsafe { asm!("cp.async.bulk.wait_group.read {0};", const PENDING, options(nostack)) }
}
#[inline(always)]
pub fn fence_async_copy() {
    unsafe { asm!("fence.proxy.async.shared::cta;", options(nostack)) }
}
#[inline(always)]
pub fn mbarrier_init(word: SharedPtr, arrivals: u32) {
    unsafe {
        asm!("mbarrier.init.shared::cta.b64 [{0}], {1};", in(reg32) word.0, in(reg32) arrivals, options(nostack));
        asm!("fence.mbarrier_init.release.cluster;", options(nostack));
    }
}
#[inline(always)]
pub fn mbarrier_arrive_expect(word: SharedPtr, bytes: u32) {
    unsafe {
        asm!("mbarrier.arrive.expect_tx.shared::cta.b64 _, [{0}], {1};", in(reg32) word.0, in(reg32) bytes, options(nostack))
    }
}
#[inline(always)]
pub fn mbarrier_arrive(word: SharedPtr) {
    unsafe { asm!("mbarrier.arrive.shared::cta.b64 _, [{0}];", in(reg32) word.0, options(nostack)) }
}
#[inline(always)]
pub fn mbarrier_try_wait(word: SharedPtr, parity: u32) -> bool {
    let done: u32;
    unsafe {
        asm!("{{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [{1}], {2}; selp.u32 {0}, 1, 0, p; }}",
            out(reg32) done, in(reg32) word.0, in(reg32) parity, options(nostack))
    };
    done != 0
}

macro_rules! pure {
    ($text:literal, $out:ident $r:ty, $($reg:ident $v:expr),*) => {{
        let r: $r;
        unsafe { asm!($text, out($out) r, $(in($reg) $v,)* options(pure, nomem, nostack, preserves_flags)) };
        r
    }};
}

// In `cvt.*x2` the first source goes to the upper half.
#[inline(always)]
pub fn cvt_bf16x2(lo: f32, hi: f32) -> u32 {
    pure!("cvt.rn.bf16x2.f32 {0}, {1}, {2};", reg32 u32, reg32 hi, reg32 lo)
}
#[inline(always)]
pub fn cvt_f16x2(lo: f32, hi: f32) -> u32 {
    pure!("cvt.rn.f16x2.f32 {0}, {1}, {2};", reg32 u32, reg32 hi, reg32 lo)
}
#[inline(always)]
pub fn cvt_f16_rz(v: f32) -> u32 {
    pure!("cvt.rz.f16.f32 {0}, {1};", reg16 u16, reg32 v) as u32
}
#[inline(always)]
pub fn cvt_f16x2_rz(lo: f32, hi: f32) -> u32 {
    pure!("cvt.rz.f16x2.f32 {0}, {1}, {2};", reg32 u32, reg32 hi, reg32 lo)
}
#[inline(always)]
pub fn cvt_f32_f16x2(v: u32) -> [f32; 2] {
    [pure!("cvt.f32.f16 {0}, {1};", reg32 f32, reg16 v as u16), pure!("cvt.f32.f16 {0}, {1};", reg32 f32, reg16(v >> 16) as u16)]
}
#[inline(always)]
pub fn cvt_e4m3x2(lo: f32, hi: f32) -> u32 {
    pure!("cvt.rn.satfinite.e4m3x2.f32 {0}, {1}, {2};", reg16 u16, reg32 hi, reg32 lo) as u32
}
#[inline(always)]
pub fn join_halves(lo: u32, hi: u32) -> u32 {
    pure!("mov.b32 {0}, {{{1}, {2}}};", reg32 u32, reg16 lo as u16, reg16 hi as u16)
}
#[inline(always)]
pub fn cvt_e5m2x2(lo: f32, hi: f32) -> u32 {
    pure!("cvt.rn.satfinite.e5m2x2.f32 {0}, {1}, {2};", reg16 u16, reg32 hi, reg32 lo) as u32
}
#[inline(always)]
pub fn cvt_f16x2_e4m3x2(v: u32) -> u32 {
    pure!("cvt.rn.f16x2.e4m3x2 {0}, {1};", reg32 u32, reg16 v as u16)
}
#[inline(always)]
pub fn byte_permute(a: u32, b: u32, selector: u32) -> u32 {
    pure!("prmt.b32 {0}, {1}, {2}, {3};", reg32 u32, reg32 a, reg32 b, reg32 selector)
}

/// The FP4 conversion has no instruction before sm_100; [`super::convert`] builds it from packed f16 arithmetic.
pub const PACKED_E2M1: bool = true;

macro_rules! packed {
    ($($name:ident $text:literal ($($v:ident),*);)*) => { $(
        #[inline(always)]
        pub fn $name($($v: u32),*) -> u32 {
            pure!($text, reg32 u32, $(reg32 $v),*)
        }
    )* };
}
packed! {
    mul_f16x2 "mul.rn.f16x2 {0}, {1}, {2};" (a, b);
    fma_f16x2 "fma.rn.f16x2 {0}, {1}, {2}, {3};" (a, b, c);
    min_abs_f16x2 "min.xorsign.abs.f16x2 {0}, {1}, {2};" (a, b);
    max_abs_f16x2 "max.xorsign.abs.f16x2 {0}, {1}, {2};" (a, b);
    min_nan_bf16x2 "min.NaN.bf16x2 {0}, {1}, {2};" (a, b);
    max_nan_bf16x2 "max.NaN.bf16x2 {0}, {1}, {2};" (a, b);
    max_abs_bf16x2 "max.xorsign.abs.bf16x2 {0}, {1}, {2};" (a, b);
}

#[inline(always)]
pub fn fma(a: f32, b: f32, c: f32) -> f32 {
    unsafe { llvm_fma(a, b, c) }
}
#[inline(always)]
pub fn canonical(v: f32) -> f32 {
    v
}
#[inline(always)]
pub fn fma_toward_minus_inf(a: f32, b: f32, c: f32) -> f32 {
    pure!("fma.rm.f32 {0}, {1}, {2}, {3};", reg32 f32, reg32 a, reg32 b, reg32 c)
}
#[inline(always)]
pub fn max(a: f32, b: f32) -> f32 {
    pure!("max.f32 {0}, {1}, {2};", reg32 f32, reg32 a, reg32 b)
}
#[inline(always)]
pub fn min(a: f32, b: f32) -> f32 {
    pure!("min.f32 {0}, {1}, {2};", reg32 f32, reg32 a, reg32 b)
}
/// One instruction with two absolute values among its operands, which the compiler would make of two more.
#[inline(always)]
pub fn max_abs(a: f32, b: f32) -> f32 {
    pure!("max.xorsign.abs.f32 {0}, {1}, {2};", reg32 f32, reg32 a, reg32 b)
}
#[inline(always)]
pub fn max_nan(a: f32, b: f32) -> f32 {
    pure!("max.NaN.f32 {0}, {1}, {2};", reg32 f32, reg32 a, reg32 b)
}
#[inline(always)]
pub fn min_nan(a: f32, b: f32) -> f32 {
    pure!("min.NaN.f32 {0}, {1}, {2};", reg32 f32, reg32 a, reg32 b)
}
#[inline(always)]
pub fn saturate(v: f32) -> f32 {
    pure!("cvt.sat.f32.f32 {0}, {1};", reg32 f32, reg32 v)
}
// As an instruction with both halves as results, because the compiler makes whatever follows it 64 bits wide, for which there are pairs of
// instructions.
#[inline(always)]
pub fn multiply_wide(a: u32, b: u32) -> [u32; 2] {
    let (low, high): (u32, u32);
    unsafe {
        asm!("{{ .reg .b64 p; mul.wide.u32 p, {2}, {3}; mov.b64 {{{0}, {1}}}, p; }}",
            out(reg32) low, out(reg32) high, in(reg32) a, in(reg32) b, options(pure, nomem, nostack, preserves_flags))
    };
    [low, high]
}
#[inline(always)]
pub fn sqrt(v: f32) -> f32 {
    pure!("sqrt.rn.f32 {0}, {1};", reg32 f32, reg32 v)
}
#[inline(always)]
pub fn ex2(v: f32) -> f32 {
    pure!("ex2.approx.ftz.f32 {0}, {1};", reg32 f32, reg32 v)
}
#[inline(always)]
pub fn lg2(v: f32) -> f32 {
    pure!("lg2.approx.ftz.f32 {0}, {1};", reg32 f32, reg32 v)
}
#[inline(always)]
pub fn rsqrt(v: f32) -> f32 {
    pure!("rsqrt.approx.ftz.f32 {0}, {1};", reg32 f32, reg32 v)
}
#[inline(always)]
pub fn rcp(v: f32) -> f32 {
    pure!("rcp.approx.ftz.f32 {0}, {1};", reg32 f32, reg32 v)
}

// LLVM's intrinsics return a struct of four floats, which Rust cannot declare, so these two are assembly. Without `pure` the
// optimiser neither moves nor duplicates them.
// As an instruction, because the compiler takes expressions of and and or apart.
#[inline(always)]
pub fn select_bits(mask: u32, a: u32, b: u32) -> u32 {
    pure!("lop3.b32 {0}, {1}, {2}, {3}, 0xCA;", reg32 u32, reg32 mask, reg32 a, reg32 b)
}
#[inline(always)]
pub fn fma_bf16x2(a: u32, b: u32, c: u32) -> u32 {
    pure!("fma.rn.bf16x2 {0}, {1}, {2}, {3};", reg32 u32, reg32 a, reg32 b, reg32 c)
}
#[inline(always)]
pub fn greater_bf16x2(a: u32, b: u32) -> u32 {
    pure!("set.gt.bf16x2.bf16x2 {0}, {1}, {2};", reg32 u32, reg32 a, reg32 b)
}
#[inline(always)]
pub fn min_bf16x2(a: u32, b: u32) -> u32 {
    pure!("min.bf16x2 {0}, {1}, {2};", reg32 u32, reg32 a, reg32 b)
}
#[inline(always)]
pub fn max_u16x2(a: u32, b: u32) -> u32 {
    pure!("max.u16x2 {0}, {1}, {2};", reg32 u32, reg32 a, reg32 b)
}

#[inline(always)]
pub fn mma_bf16(a: [u32; 4], b: [u32; 2], c: [f32; 4], _: Here) -> [f32; 4] {
    let [mut c0, mut c1, mut c2, mut c3] = c;
    unsafe {
        asm!("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{{0},{1},{2},{3}}}, {{{4},{5},{6},{7}}}, {{{8},{9}}}, {{{0},{1},{2},{3}}};",
            inout(reg32) c0, inout(reg32) c1, inout(reg32) c2, inout(reg32) c3,
            in(reg32) a[0], in(reg32) a[1], in(reg32) a[2], in(reg32) a[3], in(reg32) b[0], in(reg32) b[1], options(nomem, nostack))
    };
    [c0, c1, c2, c3]
}
#[inline(always)]
pub fn mma_tf32(a: [f32; 4], b: [f32; 2], c: [f32; 4], _: Here) -> [f32; 4] {
    let [mut c0, mut c1, mut c2, mut c3] = c;
    let (a, b) = (a.map(f32::to_bits), b.map(f32::to_bits));
    unsafe {
        asm!("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {{{0},{1},{2},{3}}}, {{{4},{5},{6},{7}}}, {{{8},{9}}}, {{{0},{1},{2},{3}}};",
            inout(reg32) c0, inout(reg32) c1, inout(reg32) c2, inout(reg32) c3,
            in(reg32) a[0], in(reg32) a[1], in(reg32) a[2], in(reg32) a[3], in(reg32) b[0], in(reg32) b[1], options(nomem, nostack))
    };
    [c0, c1, c2, c3]
}
