//! Global memory: typed pointers with vector access and cache hints.
//!
//! [`In`] is memory that nothing writes while the kernel runs, so its loads may use the read-only path and move across
//! barriers; [`Out`] is everything else. Both are one 8-byte pointer in PTX. On the emulator they also carry the byte range
//! the launcher allowed, against which every access is checked.
//!
//! Indices count elements of `T` and are 32 bits wide; whatever may not fit goes into [`In::at`] first, whose offset is 64
//! bits wide. A vector access of `N` bytes must be `N`-aligned.

use super::backend::{self, Ptr, Word};
use core::marker::PhantomData;

macro_rules! pointer {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[repr(transparent)]
        pub struct $name<T> {
            ptr: Ptr,
            element: PhantomData<fn() -> T>,
        }

        impl<T> Clone for $name<T> {
            #[inline(always)]
            fn clone(&self) -> Self {
                *self
            }
        }
        impl<T> Copy for $name<T> {}

        impl<T> $name<T> {
            #[inline(always)]
            pub(super) fn from_ptr(ptr: Ptr) -> Self {
                Self { ptr, element: PhantomData }
            }

            #[inline(always)]
            pub(super) fn element(self, i: u32) -> Ptr {
                self.ptr.offset(i as u64 * size_of::<T>() as u64)
            }

            /// The pointer moved by `elements` (64 bits: the one place for large offsets).
            #[inline(always)]
            #[must_use]
            pub fn at(self, elements: u64) -> Self {
                // Wrapping, so that a wrong offset ends as an access out of bounds on both backends.
                Self::from_ptr(self.ptr.offset(elements.wrapping_mul(size_of::<T>() as u64)))
            }

            /// The same address seen as another element type.
            #[inline(always)]
            #[must_use]
            pub fn cast<U>(self) -> $name<U> {
                $name::from_ptr(self.ptr)
            }

            /// Whether the address is a multiple of `bytes` (a power of two).
            #[inline(always)]
            pub fn is_aligned(self, bytes: u32) -> bool {
                self.ptr.address() & (bytes as u64 - 1) == 0
            }
        }

        #[cfg(not(target_arch = "nvptx64"))]
        impl<T> $name<T> {
            /// For launchers: `bytes` bytes at `address`, which is a device address or, on the emulator, a host address.
            pub fn new(address: u64, bytes: u64) -> Self {
                Self::from_ptr(Ptr::new(address, bytes))
            }

            /// The device address.
            pub fn address(self) -> u64 {
                self.ptr.address()
            }

            /// The bytes the launcher allowed.
            pub fn region(self) -> super::emu::memory::Region {
                let (address, bytes) = self.ptr.range();
                super::emu::memory::Region { address, bytes }
            }

            /// An absent optional argument.
            pub fn null() -> Self {
                Self::new(0, 0)
            }
        }
    };
}

pointer! {
    /// Global memory that this kernel only reads and nobody writes meanwhile.
    In
}
pointer! {
    /// Global memory that this kernel writes, or reads while others write.
    Out
}

impl<T: Word> In<T> {
    /// One element.
    #[inline(always)]
    #[track_caller]
    pub fn get(self, i: u32) -> T {
        backend::load_nc(self.element(i))
    }
}

impl<T: Word> Out<T> {
    /// One element.
    #[inline(always)]
    #[track_caller]
    pub fn get(self, i: u32) -> T {
        backend::load(self.element(i))
    }

    /// Write one element.
    #[inline(always)]
    #[track_caller]
    pub fn set(self, i: u32, value: T) {
        backend::store(self.element(i), value)
    }

    /// Write one element that nobody reads soon.
    #[inline(always)]
    #[track_caller]
    pub fn set_stream(self, i: u32, value: T) {
        backend::store_stream(self.element(i), value)
    }
}

macro_rules! vector_access {
    ($($v:ty, $bytes:literal, $load:ident, $load_stream:ident, $store:ident, $store_stream:ident;)*) => {
        impl<T> In<T> {
            $(
                #[doc = concat!($bytes, " bytes from element `i` on.")]
                #[inline(always)]
                #[track_caller]
                pub fn $load(self, i: u32) -> $v {
                    backend::load_nc(self.element(i))
                }

                #[doc = concat!($bytes, " bytes from element `i` on, touched once: not kept in L1.")]
                #[inline(always)]
                #[track_caller]
                pub fn $load_stream(self, i: u32) -> $v {
                    backend::load_nc_stream(self.element(i))
                }
            )*
        }
        impl<T> Out<T> {
            $(
                #[doc = concat!($bytes, " bytes from element `i` on.")]
                #[inline(always)]
                #[track_caller]
                pub fn $load(self, i: u32) -> $v {
                    backend::load(self.element(i))
                }

                #[doc = concat!("Write ", $bytes, " bytes from element `i` on.")]
                #[inline(always)]
                #[track_caller]
                pub fn $store(self, i: u32, value: $v) {
                    backend::store(self.element(i), value)
                }

                #[doc = concat!("Write ", $bytes, " bytes from element `i` on that nobody reads soon: first to leave the caches.")]
                #[inline(always)]
                #[track_caller]
                pub fn $store_stream(self, i: u32, value: $v) {
                    backend::store_stream(self.element(i), value)
                }
            )*
        }
    };
}

vector_access! {
    u32, 4, load4, load4_stream, store4, store4_stream;
    [u32; 2], 8, load8, load8_stream, store8, store8_stream;
    [u32; 4], 16, load16, load16_stream, store16, store16_stream;
}

impl<T> In<T> {
    /// Ask for the 128-byte line of element `i` to be brought into L2.
    #[inline(always)]
    pub fn prefetch(self, i: u32) {
        backend::prefetch_l2(self.element(i))
    }
}

impl<T> Out<T> {
    /// The same memory for reading, once nobody writes it any more.
    #[inline(always)]
    pub fn as_in(self) -> In<T> {
        In::from_ptr(self.ptr)
    }
}

/// Whether `i`, an index that was read from memory, is below `len`. The checked emulator reports one that is not; on a GPU, and on the
/// emulator without checks, the kernel gets the answer and does without that index.
#[inline(always)]
#[track_caller]
pub fn index_below(i: u32, len: u32) -> bool {
    backend::index_below(i, len, backend::here())
}

/// Indices of a thread in its launch. Blocks are one-dimensional, grids have up to three dimensions.
macro_rules! index {
    ($($(#[$doc:meta])* $name:ident;)*) => { $(
        $(#[$doc])*
        #[inline(always)]
        pub fn $name() -> u32 {
            backend::$name()
        }
    )* };
}
index! {
    /// Thread within its block.
    thread_idx;
    /// Threads of a block.
    block_dim;
    /// Block in x.
    block_idx_x;
    /// Block in y.
    block_idx_y;
    /// Block in z.
    block_idx_z;
    /// Blocks in x.
    grid_dim_x;
    /// Blocks in y.
    grid_dim_y;
}

/// Lane within the warp, 0 to 31.
#[inline(always)]
pub fn lane_id() -> u32 {
    thread_idx() & 31
}

/// Warp within the block.
#[inline(always)]
pub fn warp_id() -> u32 {
    thread_idx() >> 5
}

/// `v`, of which the compiler knows nothing: what is computed from it a second time is computed then, and not held in registers since the
/// first.
#[inline(always)]
pub fn opaque(v: u32) -> u32 {
    backend::opaque(v)
}

/// First in the body of a loop: ptxas leaves it a loop. It would otherwise unroll a small loop four times, which gains little where the
/// loop rarely turns more than once and makes the driver compile longer before the first launch.
#[inline(always)]
pub fn rolled() {
    backend::rolled()
}
