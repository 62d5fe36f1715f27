//! Quantisation.

pub mod cast_back;
pub mod common_swiglu;
pub mod per_block_cast;
pub mod per_token_cast;
pub mod swiglu_backward;
pub mod swiglu_backward_and_per_token_cast;
pub mod swiglu_forward;
pub mod swiglu_forward_and_per_token_cast;
