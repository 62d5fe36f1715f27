//! Quantisation.

pub mod batched_transpose_weight_sf;
pub mod cast;
pub mod cast_back;
pub mod cast_back_e5m6;
mod common_channels;
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
