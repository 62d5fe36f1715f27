//! The device API: everything a kernel may use, with one meaning on two backends.
//!
//! On `nvptx64` a function is one PTX instruction or a short sequence; elsewhere it runs on the emulator ([`emu`]), which
//! also checks what the hardware does not. `docs/device.md` lists all of it as one table. Names say who has to call a
//! function: `warp_…` all 32 lanes of a warp, `block_…` all threads of a block, `grid_…` all threads of the launch, no
//! prefix any single thread.
//!
//! This folder is the only place with `asm!`, intrinsics and `cfg(target_arch)`.

#[cfg(target_arch = "nvptx64")]
#[path = "ptx.rs"]
mod backend;
#[cfg(not(target_arch = "nvptx64"))]
#[path = "emu/backend.rs"]
mod backend;
#[cfg(not(target_arch = "nvptx64"))]
pub mod emu;

mod atomic;
mod block;
mod convert;
mod copy;
mod global;
mod macros;
mod math;
mod mma;
pub mod num;
mod philox;
mod shared;
mod warp;

pub use atomic::*;
pub use backend::Word;
pub use block::*;
pub use convert::*;
pub use copy::*;
pub use global::*;
pub use math::*;
pub use mma::*;
pub use philox::*;
pub use shared::*;
pub use warp::*;

pub use crate::launch::{LaunchConfig, WARP_SIZE, align_up, ceil_div};
