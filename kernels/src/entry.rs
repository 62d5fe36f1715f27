//! What the host needs to know about a compiled kernel entry.

use crate::device::{In, Out, emu};
use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicPtr, Ordering};

/// One PTX entry together with its emulator twin. `A` is the argument struct that [`kernel!`](crate::kernel) made.
pub struct Entry<A: 'static> {
    /// Name of the op, which is also the name of its PTX file.
    pub op: &'static str,
    /// Name of the entry in the PTX: `op__kernel` or `op__kernel__variant`.
    pub name: &'static str,
    /// Threads per block the PTX was compiled for (`.maxntid`), 0 when it was left open.
    pub max_threads: u32,
    /// The body, called once per emulated thread.
    pub run: fn(&A),
    /// Where launches find the compiled kernel.
    pub loaded: Loaded,
}

/// The driver's handles of a kernel, one for each device that has compiled it: what a launch would otherwise look up in a table.
pub struct Loaded([AtomicPtr<c_void>; Self::DEVICES]);

impl Loaded {
    /// Devices with a place here.
    const DEVICES: usize = 16;

    /// Compiled nowhere.
    #[allow(clippy::new_without_default)]
    pub const fn new() -> Self {
        Self([const { AtomicPtr::new(ptr::null_mut()) }; Self::DEVICES])
    }

    /// The handle on device `ordinal`, if it is known here.
    #[inline]
    pub fn get(&self, ordinal: usize) -> Option<NonNull<c_void>> {
        NonNull::new(self.0.get(ordinal)?.load(Ordering::Acquire))
    }

    /// Keep the handle on device `ordinal`, if there is a place for it.
    pub fn set(&self, ordinal: usize, handle: *mut c_void) {
        if let Some(place) = self.0.get(ordinal) {
            place.store(handle, Ordering::Release);
        }
    }
}

impl<A> Entry<A> {
    /// Run the kernel on the CPU emulator; returns when every block has finished.
    // Apart from the launch on a GPU, whose code should be short: it is rarely in the cache.
    #[inline(never)]
    pub fn emulate(
        &'static self,
        config: &crate::launch::LaunchConfig,
        args: &A,
        options: &emu::Options,
    ) -> Result<(), emu::Fault>
    where
        A: Sync + KernelArgs,
    {
        let mut regions = Vec::new();
        if options.checked {
            args.regions(&mut regions);
        }
        emu::launch(self.name, self.max_threads, config, options, &regions, &|| (self.run)(args))
    }
}

/// Kernel arguments as they lie in the kernel's parameter space, and a pointer to each: the two ways in which the driver takes them.
pub struct Params {
    // Most kernels have few, so the others are not even zeroed.
    block: [MaybeUninit<u64>; Self::MAX],
    offsets: [MaybeUninit<u16>; Self::MAX],
    pointers: [MaybeUninit<*mut c_void>; Self::MAX],
    count: usize,
    bytes: usize,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            block: [const { MaybeUninit::uninit() }; Self::MAX],
            offsets: [const { MaybeUninit::uninit() }; Self::MAX],
            pointers: [const { MaybeUninit::uninit() }; Self::MAX],
            count: 0,
            bytes: 0,
        }
    }
}

impl Params {
    /// More than any kernel here takes.
    pub const MAX: usize = 168;

    /// Append one argument.
    // Inlined with all its neighbours, so that places are constants and nothing is left to check.
    #[inline(always)]
    pub fn push<P: KernelParam>(&mut self, p: P) {
        assert!(self.count < Self::MAX, "a kernel has more than Params::MAX arguments");
        // Each starts at a multiple of its size. One of 4 bytes is written as 8: the next one takes the rest, or nobody reads it.
        let offset = self.bytes.next_multiple_of(P::BYTES);
        let word = &mut self.block[offset / 8];
        let bits = p.to_bits();
        if offset.is_multiple_of(8) {
            word.write(bits);
        } else {
            // SAFETY: the argument before this one, of 4 bytes, has written the word.
            word.write(unsafe { word.assume_init() } & 0xFFFF_FFFF | bits << 32);
        }
        self.offsets[self.count].write(offset as u16);
        self.bytes = offset + P::BYTES;
        self.count += 1;
    }

    /// A pointer to each argument, valid until this is moved.
    pub fn pointers(&mut self) -> *mut *mut c_void {
        let block = self.block.as_mut_ptr().cast::<u8>();
        for (pointer, offset) in self.pointers.iter_mut().zip(&self.offsets).take(self.count) {
            // SAFETY: the first `count` offsets are written and lie in the block.
            pointer.write(unsafe { block.add(offset.assume_init().into()) }.cast());
        }
        self.pointers.as_mut_ptr().cast()
    }

    /// All arguments as one block, valid until this is moved, and its size in bytes.
    #[inline]
    pub fn block(&mut self) -> (*mut c_void, usize) {
        (self.block.as_mut_ptr().cast(), self.bytes)
    }
}

// Words are put together as a little-endian machine reads them.
const _: () = assert!(cfg!(target_endian = "little"));

/// An argument struct that can be turned into driver parameters.
pub trait KernelArgs {
    /// Append every field in declaration order.
    fn pack(&self, params: &mut Params);

    /// Append the byte range of every pointer.
    fn regions(&self, regions: &mut Vec<emu::memory::Region>);
}

/// A type that may stand in a kernel's argument list: a thin pointer or a scalar of 4 or 8 bytes.
pub trait KernelParam: Copy {
    /// Its size for the kernel, 4 or 8 bytes.
    const BYTES: usize;

    /// Its bits, zero-extended to 8 bytes.
    fn to_bits(self) -> u64;

    /// The bytes it may touch, if it is a pointer.
    fn region(self) -> Option<emu::memory::Region> {
        None
    }
}

macro_rules! pointer_param {
    ($($pointer:ident),*) => { $(impl<T> KernelParam for $pointer<T> {
        const BYTES: usize = 8;
        #[inline(always)]
        fn to_bits(self) -> u64 {
            self.address()
        }
        fn region(self) -> Option<emu::memory::Region> {
            Some(self.region())
        }
    })* };
}
pointer_param!(In, Out);

macro_rules! scalar_param {
    ($($t:ty => $as:ty),*) => { $(impl KernelParam for $t {
        const BYTES: usize = size_of::<$t>();
        #[inline(always)]
        fn to_bits(self) -> u64 {
            <$as>::from_ne_bytes(self.to_ne_bytes()) as u64
        }
    })* };
}
scalar_param!(u32 => u32, i32 => u32, f32 => u32, u64 => u64, i64 => u64);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pointers_lead_to_the_arguments() {
        let mut params = Params::default();
        params.push(1u32);
        params.push(2.5f32);
        params.push(-3i32);
        params.push(-4i64);
        let pointers = params.pointers();
        // SAFETY: four arguments, each with at least four bytes.
        let words = [0, 1, 2, 3].map(|i| unsafe { (*pointers.add(i)).cast::<u32>().read() });
        assert_eq!(words, [1, 2.5f32.to_bits(), -3i32 as u32, -4i32 as u32]);
        // SAFETY: the last has eight.
        assert_eq!(unsafe { (*pointers.add(3)).cast::<i64>().read() }, -4);
    }

    #[test]
    fn the_block_is_laid_out_as_a_kernel_reads_it() {
        let mut params = Params::default();
        params.push(1u64);
        params.push(2u32);
        params.push(3u32);
        params.push(4u32);
        params.push(5u64);
        params.push(6u32);
        let (block, bytes) = params.block();
        assert_eq!(bytes, 36);
        // SAFETY: the block has that many bytes, of which those at 20 are between two arguments, and this reads whole words of it.
        let words = [0, 2, 3, 4, 6, 8].map(|i| unsafe { block.cast::<u32>().add(i).read() });
        assert_eq!(words, [1, 2, 3, 4, 5, 6]);
        let first = block.addr();
        let pointers = params.pointers();
        // SAFETY: six arguments.
        let offsets = [0, 1, 2, 3, 4, 5].map(|i| unsafe { *pointers.add(i) }.addr() - first);
        assert_eq!(offsets, [0, 8, 12, 16, 24, 32]);
    }

    #[test]
    fn handles_are_kept_for_each_device() {
        let loaded = Loaded::new();
        let handle = NonNull::<c_void>::dangling();
        loaded.set(3, handle.as_ptr());
        loaded.set(Loaded::DEVICES, handle.as_ptr());
        assert_eq!([0, 3, Loaded::DEVICES].map(|ordinal| loaded.get(ordinal)), [None, Some(handle), None]);
    }
}
