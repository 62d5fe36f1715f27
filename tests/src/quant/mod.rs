//! Quantisation.

pub mod cast_back;
pub mod norm_backward;
pub mod norm_forward;
pub mod norm_forward_and_per_token_cast;
pub mod per_block_cast;
pub mod per_token_cast;
