//! Shared memory: one dynamic buffer, carved by type in a fixed order.
//!
//! Kernel and launch configuration build the same [`SharedLayout`], so the size that is asked for and the offsets that are
//! used cannot differ.

use super::backend::{self, Word};
use core::marker::PhantomData;

/// Carves a block's dynamic shared memory.
#[derive(Clone, Copy, Default)]
pub struct SharedLayout {
    bytes: u32,
}

impl SharedLayout {
    /// Nothing yet.
    #[inline(always)]
    pub const fn new() -> Self {
        Self { bytes: 0 }
    }

    /// Room for `len` elements, 16-byte aligned.
    #[inline(always)]
    pub const fn array<T>(&mut self, len: u32) -> Shared<T> {
        self.aligned(len, 16)
    }

    /// Room for `len` elements at a multiple of `align` bytes (a power of two, at most 1024).
    #[inline(always)]
    pub const fn aligned<T>(&mut self, len: u32, align: u32) -> Shared<T> {
        let start = (self.bytes + align - 1) & !(align - 1);
        let bytes = len * size_of::<T>() as u32;
        self.bytes = start + bytes;
        Shared { start, bytes, element: PhantomData }
    }

    /// Bytes carved so far.
    #[inline(always)]
    pub const fn bytes(&self) -> u32 {
        self.bytes
    }
}

/// An array in the block's shared memory. The emulator checks every index against the array, not only against the buffer.
pub struct Shared<T> {
    start: u32,
    bytes: u32,
    element: PhantomData<fn() -> T>,
}

impl<T> Clone for Shared<T> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Shared<T> {}

impl<T> Shared<T> {
    /// Where element `i` is: offset in the buffer, and the end of the array for the emulator.
    #[inline(always)]
    pub(super) fn element(self, i: u32) -> backend::SharedPtr {
        backend::SharedPtr::new(
            self.start.wrapping_add(i.wrapping_mul(size_of::<T>() as u32)),
            self.start,
            self.start + self.bytes,
        )
    }

    /// `len` elements from element `i` on.
    #[inline(always)]
    #[must_use]
    pub const fn slice(self, i: u32, len: u32) -> Self {
        let size = size_of::<T>() as u32;
        Self { start: self.start + i * size, bytes: len * size, element: PhantomData }
    }

    /// The same bytes seen as another element type.
    #[inline(always)]
    #[must_use]
    pub const fn cast<U>(self) -> Shared<U> {
        Shared { start: self.start, bytes: self.bytes, element: PhantomData }
    }
}

impl<T: Word> Shared<T> {
    /// One element.
    #[inline(always)]
    #[track_caller]
    pub fn get(self, i: u32) -> T {
        backend::load_shared(self.element(i))
    }

    /// Write one element.
    #[inline(always)]
    #[track_caller]
    pub fn set(self, i: u32, value: T) {
        backend::store_shared(self.element(i), value)
    }
}

macro_rules! shared_vectors {
    ($($v:ty, $bytes:literal, $load:ident, $store:ident;)*) => {
        impl<T> Shared<T> {
            $(
                #[doc = concat!($bytes, " bytes from element `i` on.")]
                #[inline(always)]
                #[track_caller]
                pub fn $load(self, i: u32) -> $v {
                    backend::load_shared(self.element(i))
                }

                #[doc = concat!("Write ", $bytes, " bytes from element `i` on.")]
                #[inline(always)]
                #[track_caller]
                pub fn $store(self, i: u32, value: $v) {
                    backend::store_shared(self.element(i), value)
                }
            )*
        }
    };
}
shared_vectors! {
    u32, 4, load4, store4;
    [u32; 2], 8, load8, store8;
    [u32; 4], 16, load16, store16;
}
