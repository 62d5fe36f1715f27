//! Quantisation.

pub mod cast_back;
mod common_channels;
pub mod per_block_cast;
pub mod per_channel_cast;
pub mod per_channel_cast_and_transpose;
pub mod per_channel_cast_fused;
pub mod per_token_cast;
