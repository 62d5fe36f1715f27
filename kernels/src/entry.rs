//! What the host needs to know about a compiled kernel entry.

use crate::device::{In, Out, emu};
use std::mem::MaybeUninit;

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
}

impl<A> Entry<A> {
    /// Run the kernel on the CPU emulator; returns when every block has finished.
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

/// Kernel arguments in the form the driver wants them: one 8-byte slot each.
pub struct Params {
    // Most kernels have few, so the others are not even zeroed.
    slots: [MaybeUninit<u64>; Self::MAX],
    len: usize,
}

impl Default for Params {
    fn default() -> Self {
        Self { slots: [const { MaybeUninit::uninit() }; Self::MAX], len: 0 }
    }
}

impl Params {
    /// More than any kernel here takes.
    pub const MAX: usize = 168;

    /// Append one argument.
    pub fn push<P: KernelParam>(&mut self, p: P) {
        self.slots[self.len].write(p.to_slot());
        self.len += 1;
    }

    /// The slots in declaration order.
    pub fn slots(&mut self) -> &mut [u64] {
        let pushed = &mut self.slots[..self.len];
        // SAFETY: `push` has written all of these, and a slot has the layout of what it holds.
        unsafe { std::slice::from_raw_parts_mut(pushed.as_mut_ptr().cast(), pushed.len()) }
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
    /// Little-endian bits, zero-extended to 8 bytes.
    fn to_slot(self) -> u64;

    /// The bytes it may touch, if it is a pointer.
    fn region(self) -> Option<emu::memory::Region> {
        None
    }
}

macro_rules! pointer_param {
    ($($pointer:ident),*) => { $(impl<T> KernelParam for $pointer<T> {
        fn to_slot(self) -> u64 {
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
        fn to_slot(self) -> u64 {
            <$as>::from_ne_bytes(self.to_ne_bytes()) as u64
        }
    })* };
}
scalar_param!(u32 => u32, i32 => u32, f32 => u32, u64 => u64, i64 => u64);
