//! Quantisation.

pub mod batched_transpose_weight_sf;
pub mod cast_back;
pub mod cast_back_e5m6;
pub mod per_block_cast;
pub mod per_block_cast_lossless;
pub mod per_token_cast;
pub mod per_token_cast_to_e5m6;
