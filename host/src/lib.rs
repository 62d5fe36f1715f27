//! LLM tile kernels in Rust: quantisation and what is fused with it, mixture-of-experts routing, transposes, rotary
//! embedding, random numbers, hyper-connections.
//!
//! Every op is one function that takes a [`Stream`] and borrowed tensors. The kernels are written in Rust (crate
//! `ferrotile-kernels`) and run on CUDA GPUs, as PTX that ships with this crate, and on a CPU emulator that needs nothing.
//!
//! ```
//! use ferrotile::Device;
//!
//! let device = Device::cuda(0).unwrap_or(Device::emulator());
//! let stream = device.stream()?;
//! let mut x = device.upload(&[1.0f32; 8])?;
//! stream.memset_zero(&mut x.strided_mut(&[2, 2], &[2, 1], 4)?)?;
//! assert_eq!(x.to_vec()?, [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]);
//! # Ok::<(), ferrotile::Error>(())
//! ```
//!
//! | family | ops |
//! |---|---|
//! | [`quant`], a scale for channels of a token | [`per_token_cast`](quant::per_token_cast()), [`per_token_cast_to_e5m6`](quant::per_token_cast_to_e5m6()), [`per_token_cast_and_cast_back`](quant::per_token_cast_and_cast_back()) |
//! | a scale for a block | [`per_block_cast`](quant::per_block_cast()), [`per_block_cast_lossless`](quant::per_block_cast_lossless()), [`batched_transpose_weight_sf`](quant::batched_transpose_weight_sf()), [`convert_sf`](quant::convert_sf()) |
//! | a scale for tokens of a channel | [`per_channel_cast`](quant::per_channel_cast()), [`per_channel_cast_fused`](quant::per_channel_cast_fused()), [`per_channel_cast_and_transpose`](quant::per_channel_cast_and_transpose()) |
//! | back, or without scales | [`cast_back`](quant::cast_back()), [`cast_back_e5m6`](quant::cast_back_e5m6()), [`cast`](quant::cast()) |
//! | SwiGLU | [`swiglu_forward`](quant::swiglu_forward()), [`swiglu_forward_and_per_token_cast`](quant::swiglu_forward_and_per_token_cast()), [`swiglu_forward_and_per_channel_cast_and_transpose`](quant::swiglu_forward_and_per_channel_cast_and_transpose()), [`swiglu_backward`](quant::swiglu_backward()), [`swiglu_backward_and_per_token_cast`](quant::swiglu_backward_and_per_token_cast()) |
//! | RMS norm | [`norm_forward`](quant::norm_forward()), [`norm_forward_and_per_token_cast`](quant::norm_forward_and_per_token_cast()), [`norm_backward`](quant::norm_backward()) |
//! | [`moe`] | [`topk_gate`](moe::topk_gate()), [`top2_sum_gate`](moe::top2_sum_gate()), [`moe_topk_gate_forward`](moe::moe_topk_gate_forward()), [`moe_topk_gate_backward`](moe::moe_topk_gate_backward()), [`get_fused_mapping`](moe::get_fused_mapping()), [`expand_to_fused`](moe::expand_to_fused()), [`reduce_fused`](moe::reduce_fused()), [`reduce_fused_backward`](moe::reduce_fused_backward()), [`normalize_weight`](moe::normalize_weight()), [`group_count`](moe::group_count()), [`aux_fi`](moe::aux_fi()), [`mask_indices_by_tp`](moe::mask_indices_by_tp()), [`inplace_unique_group_indices`](moe::inplace_unique_group_indices()), [`topk_sum_and_topk_group_idx`](moe::topk_sum_and_topk_group_idx()) |
//! | a routed layer | [`MoeRouter`](moe::MoeRouter) in [`router`](moe::router) |
//! | [`transpose`] | [`transpose`](transpose::transpose()), [`batched_transpose`](transpose::batched_transpose()) |
//! | [`transform`] | [`apply_rotary`](transform::apply_rotary()) |
//! | [`rand`] | [`randn`](rand::randn()), [`randn_like`](rand::randn_like), [`randn_counted`](rand::randn_counted), [`Generator`](rand::Generator), [`set_seed`](rand::set_seed) |
//! | [`mhc`] | [`mhc_post_fwd`](mhc::mhc_post_fwd()) |
//!
//! | feature | brings |
//! |---|---|
//! | `cuda` (off) | [`Device::cuda`], through the `cust` crate; needs the NVIDIA driver at run time |
//!
//! Rules that hold for every op: outputs and workspace are given by the caller; nothing is printed, allocated or waited for, so
//! that every op can be captured into a CUDA graph; wrong arguments are an [`Error`] that names op and argument, never a panic.
//! [`TensorRef::from_raw`], [`TensorMut::from_raw`] and [`Stream::from_raw`] take memory and streams of other libraries.

mod buffer;
pub mod check;
mod device;
#[cfg(feature = "cuda")]
mod driver;
#[cfg(not(feature = "cuda"))]
#[path = "driver_off.rs"]
mod driver;
mod dtype;
mod emu;
mod error;
pub mod mhc;
pub mod moe;
mod ptx;
pub mod quant;
pub mod rand;
mod stream;
mod tensor;
pub mod transform;
pub mod transpose;

pub use buffer::Buffer;
pub use device::Device;
pub use dtype::{DType, E2m1x2, E4m3, E5m2, Element, Ue8m0x4};
pub use error::{Error, Result};
pub use stream::{Event, Graph, Stream};
pub use tensor::{MAX_RANK, TensorMut, TensorRef, View};

// For ferrotile-tests: launches without us, PTX of the device layer's own tests, and the record of what was built.
#[doc(hidden)]
pub use ptx::{MANIFEST as PTX_MANIFEST, register as register_ptx};
#[doc(hidden)]
pub use stream::{BareLaunch, LaunchWay, set_schedule};

/// The 16-bit float types, so that users need not depend on `half` themselves.
pub use half;
