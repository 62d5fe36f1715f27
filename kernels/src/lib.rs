//! Device code of ferrotile: LLM tile kernels in Rust.
//!
//! The crate is built twice from the same source: by the device compiler into PTX (`no_std`, target `nvptx64-nvidia-cuda`)
//! and by the ordinary compiler into a library whose kernels run on a CPU emulator ([`device::emu`]). Users depend on the
//! `ferrotile` crate, which ships the PTX and offers typed launchers; this crate holds the kernels themselves.
#![cfg_attr(target_arch = "nvptx64", no_std)]
#![cfg_attr(
    target_arch = "nvptx64",
    feature(abi_ptx, stdarch_nvptx, asm_experimental_arch, link_llvm_intrinsics),
    allow(internal_features)
)]

pub mod device;
#[cfg(not(target_arch = "nvptx64"))]
pub mod entry;
pub mod launch;
pub mod mhc;
pub mod moe;
pub mod quant;
pub mod rand;
pub mod transform;
pub mod transpose;

#[cfg(feature = "selftest")]
pub mod selftest;

#[cfg(target_arch = "nvptx64")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}
