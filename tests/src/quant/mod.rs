//! Quantisation ops.

pub mod per_block_cast;
