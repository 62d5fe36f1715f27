//! Quantisation.

pub mod cast;
pub mod cast_back;
pub mod per_block_cast;
pub mod per_token_cast;
pub mod per_token_cast_and_cast_back;
