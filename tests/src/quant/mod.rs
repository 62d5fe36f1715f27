//! Quantisation.

pub mod cast_back;
pub mod per_block_cast;
pub mod per_token_cast;
pub mod swiglu_backward;
pub mod swiglu_backward_and_per_token_cast;
