//! Quantisation ops.

pub mod per_token_cast;
