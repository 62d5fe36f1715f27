//! Quantisation.

pub mod cast_back;
pub mod per_block_cast;
pub mod per_token_cast;
