//! `kernel!`: one declaration makes the PTX entries, the emulator entries and the argument struct for the launcher.

/// Declare a kernel.
///
/// ```text
/// kernel! {
///     op = per_token_cast;            // the op, that is the file; entries are called op__kernel[__variant]
///     threads = 256, blocks = 4;      // optional: .maxntid and .minnctapersm of every entry
///     /// Doc of the argument struct.
///     pub fn cast[X: Input, const G: u32](x: In<u8>, out: Out<u8>, t: u32) {
///         ...
///     }
///     entries { bf16_g32[bf16, 32], f32_g128[f32, 128] }   // only for a generic kernel
/// }
/// ```
///
/// This makes a private function `cast` and a public module `cast` with `Args { x, out, t }` and one static
/// [`Entry`](crate::entry::Entry)`<Args>` per variant (`cast::bf16_g32`; `cast::ENTRY` when there are no variants).
/// Argument types: [`In`](crate::device::In), [`Out`](crate::device::Out), `u32`, `i32`, `f32`, `u64`, `i64`.
#[macro_export]
macro_rules! kernel {
    (
        op = $op:ident;
        $(threads = $threads:literal $(, blocks = $blocks:literal)?;)?
        $(#[$doc:meta])*
        pub fn $kernel:ident[$($generics:tt)*]($($arg:ident: $ty:ty),* $(,)?) $body:block
        entries { $($entry:ident[$($choice:tt)*]),* $(,)? }
    ) => {
        #[inline(always)]
        #[allow(clippy::too_many_arguments)]
        fn $kernel<$($generics)*>($($arg: $ty),*) $body

        $(#[$doc])*
        pub mod $kernel {
            #[allow(unused_imports)]
            use super::*;
            $crate::__kernel_args!($($arg: $ty),*);
            // Bounds and arguments go along as one token each: they may not repeat inside the repetition of entries.
            $crate::__kernel_entries! {
                $op; $kernel; ($($threads $(, $blocks)?)?); ($($arg: $ty),*); $($entry[$($choice)*]),*
            }
        }
    };
    (
        op = $op:ident;
        $(threads = $threads:literal $(, blocks = $blocks:literal)?;)?
        $(#[$doc:meta])*
        pub fn $kernel:ident($($arg:ident: $ty:ty),* $(,)?) $body:block
    ) => {
        #[inline(always)]
        #[allow(clippy::too_many_arguments)]
        fn $kernel($($arg: $ty),*) $body

        $(#[$doc])*
        pub mod $kernel {
            #[allow(unused_imports)]
            use super::*;
            $crate::__kernel_args!($($arg: $ty),*);
            $crate::__kernel_entry! {
                concat!(stringify!($op), "__", stringify!($kernel));
                $op; ENTRY; ($($threads $(, $blocks)?)?);
                super::$kernel; ($($arg: $ty),*)
            }
        }
    };
}

/// Part of [`kernel!`]: the entries of a generic kernel.
#[doc(hidden)]
#[macro_export]
macro_rules! __kernel_entries {
    ($op:ident; $kernel:ident; $bounds:tt; $args:tt; $($entry:ident[$($choice:tt)*]),*) => { $(
        $crate::__kernel_entry! {
            concat!(stringify!($op), "__", stringify!($kernel), "__", stringify!($entry));
            $op; $entry; $bounds; super::$kernel::<$($choice)*>; $args
        }
    )* };
}

/// Part of [`kernel!`]: the argument struct (host side only).
#[doc(hidden)]
#[macro_export]
#[cfg(not(target_arch = "nvptx64"))]
macro_rules! __kernel_args {
    ($($arg:ident: $ty:ty),*) => {
        /// Arguments, in the order of the kernel's parameters.
        #[derive(Clone, Copy)]
        #[allow(missing_docs)]
        pub struct Args { $(pub $arg: $ty),* }

        impl $crate::entry::KernelArgs for Args {
            #[inline]
            fn pack(&self, params: &mut $crate::entry::Params) {
                $(params.push(self.$arg);)*
            }

            fn regions(&self, regions: &mut Vec<$crate::device::emu::memory::Region>) {
                $(regions.extend($crate::entry::KernelParam::region(self.$arg));)*
            }
        }
    };
}

/// Part of [`kernel!`]: one entry for the emulator.
#[doc(hidden)]
#[macro_export]
#[cfg(not(target_arch = "nvptx64"))]
macro_rules! __kernel_entry {
    ($name:expr; $op:ident; $entry:ident; ($($threads:literal $(, $blocks:literal)?)?); $call:expr; ($($arg:ident: $ty:ty),*)) => {
        #[allow(non_upper_case_globals, missing_docs)]
        pub static $entry: $crate::entry::Entry<Args> = $crate::entry::Entry {
            op: stringify!($op),
            name: $name,
            max_threads: 0 $(+ $threads)?,
            run: |args| $call($(args.$arg),*),
            loaded: $crate::entry::Loaded::new(),
        };
    };
}

/// Part of [`kernel!`]: nothing to pack on the device.
#[doc(hidden)]
#[macro_export]
#[cfg(target_arch = "nvptx64")]
macro_rules! __kernel_args {
    ($($arg:ident: $ty:ty),*) => {};
}

/// Part of [`kernel!`]: one PTX entry. The launch bounds travel as a comment in the assembly, because rustc has no
/// attribute for them; `cargo xtask ptx` turns the comment into `.maxntid` and `.minnctapersm`.
#[doc(hidden)]
#[macro_export]
#[cfg(target_arch = "nvptx64")]
macro_rules! __kernel_entry {
    ($name:expr; $op:ident; $entry:ident; ($($threads:literal $(, $blocks:literal)?)?); $call:expr; ($($arg:ident: $ty:ty),*)) => {
        const _: () = {
            #[unsafe(export_name = $name)]
            unsafe extern "ptx-kernel" fn entry($($arg: $ty),*) {
                $call($($arg),*)
            }
        };
        $(::core::arch::global_asm!(concat!("// ferrotile.bounds ", $name, " ", $threads $(, " ", $blocks)?));)?
    };
}

/// Write a block once per index below a constant that is at most 16: `unroll!(i in N { ... })`.
///
/// For bodies that are too large for the compiler's own unrolling: an array that is indexed in a loop that stays a loop would be
/// put into local memory. The body is repeated as text, so nest through functions.
#[macro_export]
macro_rules! unroll {
    ($i:ident in $n:tt $body:block) => {
        $crate::unroll!(@each $i, $n, $body, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15)
    };
    (@each $i:ident, $n:tt, $body:block, $($at:literal)*) => { $({
        let $i: usize = $at;
        if $i < $n $body
    })* };
}
