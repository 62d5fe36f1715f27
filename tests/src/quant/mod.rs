//! Quantisation.

pub mod cast_back;
pub mod per_block_cast;
pub mod per_token_cast;
pub mod swiglu_forward_and_per_channel_cast_and_transpose;
