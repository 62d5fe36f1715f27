//! Quantisation: casts to and from FP8 and FP4 with scale factors per token, block or channel.
//!
//! A quantised tensor is a pair of data and scale factors `sf`, with `decoded = data * sf`. The scale of a block comes from its
//! largest magnitude `amax`; [`common`] has the arithmetic, which is the same in every op.

pub mod batched_transpose_weight_sf;
pub mod cast;
pub mod cast_back;
pub mod cast_back_e5m6;
pub mod common;
pub mod common_channels;
pub mod common_swiglu;
pub mod convert_sf;
pub mod norm_backward;
pub mod norm_forward;
pub mod norm_forward_and_per_token_cast;
pub mod per_block_cast;
pub mod per_block_cast_lossless;
pub mod per_channel_cast;
pub mod per_channel_cast_and_transpose;
pub mod per_channel_cast_fused;
pub mod per_token_cast;
pub mod per_token_cast_and_cast_back;
pub mod per_token_cast_to_e5m6;
pub mod swiglu_backward;
pub mod swiglu_backward_and_per_token_cast;
pub mod swiglu_forward;
pub mod swiglu_forward_and_per_channel_cast_and_transpose;
pub mod swiglu_forward_and_per_token_cast;
