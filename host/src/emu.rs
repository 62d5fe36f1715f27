//! Memory of the emulator: aligned host allocations that the checked emulator knows about.

use ferrotile_kernels::device::emu::memory;
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr;

/// What `cuMemAlloc` guarantees as well.
const ALIGN: usize = 256;

/// What uninitialised memory of a checked device holds: as f32, bf16 or f16 a large negative number, as an index far out.
const GARBAGE: u8 = 0xC9;

fn layout(bytes: usize) -> Option<Layout> {
    // An empty buffer has an address of its own too, as any other allocation.
    Layout::from_size_align(bytes.max(1), ALIGN).ok()
}

/// `bytes` bytes; `None` when there is no memory left.
pub fn alloc(bytes: usize, checked: bool) -> Option<u64> {
    // SAFETY: the layout has at least one byte.
    let memory = unsafe { alloc_zeroed(layout(bytes)?) };
    if memory.is_null() {
        return None;
    }
    if checked {
        // SAFETY: just allocated with at least this size.
        unsafe { memory.write_bytes(GARBAGE, bytes) };
        memory::register(memory.addr(), bytes, false);
    }
    Some(memory.expose_provenance() as u64)
}

/// Give back what [`alloc`] returned.
///
/// # Safety
/// `address` comes from [`alloc`] with the same `bytes` and `checked`, and nothing uses it any more.
pub unsafe fn free(address: u64, bytes: usize, checked: bool) {
    if checked {
        memory::unregister(address as usize);
    }
    if let Some(layout) = layout(bytes) {
        // SAFETY: allocated in `alloc` with this layout.
        unsafe { dealloc(ptr::with_exposed_provenance_mut(address as usize), layout) };
    }
}

/// Copy host data to `address`.
///
/// # Safety
/// `address` has room for `bytes` bytes, which nothing else uses meanwhile; `from` has as many to read.
pub unsafe fn upload(address: u64, from: *const u8, bytes: usize, checked: bool) {
    // SAFETY: by the caller. The two cannot overlap because one is borrowed exclusively.
    unsafe { ptr::copy_nonoverlapping(from, ptr::with_exposed_provenance_mut(address as usize), bytes) };
    mark(address, bytes, checked);
}

/// Copy from `address` to host memory.
///
/// # Safety
/// `address` has `bytes` bytes that nothing writes meanwhile; `to` has room for as many.
pub unsafe fn download(to: *mut u8, address: u64, bytes: usize) {
    // SAFETY: by the caller. Buffers are initialised when they are allocated.
    unsafe { ptr::copy_nonoverlapping(ptr::with_exposed_provenance(address as usize), to, bytes) };
}

/// Copy within the device.
///
/// # Safety
/// Both sides have `bytes` bytes and do not overlap.
pub unsafe fn copy(to: u64, from: u64, bytes: usize, checked: bool) {
    // SAFETY: by the caller.
    unsafe {
        let to = ptr::with_exposed_provenance_mut::<u8>(to as usize);
        ptr::copy_nonoverlapping(ptr::with_exposed_provenance(from as usize), to, bytes);
    }
    mark(to, bytes, checked);
}

/// Set every byte.
///
/// # Safety
/// `address` has room for `bytes` bytes, which nothing else uses meanwhile.
pub unsafe fn fill(address: u64, byte: u8, bytes: usize, checked: bool) {
    // SAFETY: by the caller.
    unsafe { ptr::with_exposed_provenance_mut::<u8>(address as usize).write_bytes(byte, bytes) };
    mark(address, bytes, checked);
}

fn mark(address: u64, bytes: usize, checked: bool) {
    if checked {
        memory::mark_written(address as usize, bytes);
    }
}
