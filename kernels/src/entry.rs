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

/// Kernel arguments, and a pointer to each as the driver wants them.
pub struct Params {
    // Most kernels have few, so the others are not even zeroed.
    values: [MaybeUninit<u64>; Self::MAX],
    pointers: [MaybeUninit<*mut c_void>; Self::MAX],
    count: usize,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            values: [const { MaybeUninit::uninit() }; Self::MAX],
            pointers: [const { MaybeUninit::uninit() }; Self::MAX],
            count: 0,
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
        // The kernel takes as many bytes from there as its parameter has; the low ones come first.
        self.values[self.count].write(p.to_bits().to_le());
        self.count += 1;
    }

    /// A pointer to each argument, valid until this is moved.
    pub fn pointers(&mut self) -> *mut *mut c_void {
        for (pointer, value) in self.pointers.iter_mut().zip(&mut self.values).take(self.count) {
            pointer.write(value.as_mut_ptr().cast());
        }
        self.pointers.as_mut_ptr().cast()
    }
}

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
    fn handles_are_kept_for_each_device() {
        let loaded = Loaded::new();
        let handle = NonNull::<c_void>::dangling();
        loaded.set(3, handle.as_ptr());
        loaded.set(Loaded::DEVICES, handle.as_ptr());
        assert_eq!([0, 3, Loaded::DEVICES].map(|ordinal| loaded.get(ordinal)), [None, Some(handle), None]);
    }
}
