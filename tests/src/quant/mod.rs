//! Quantisation.

pub mod cast_back;
pub mod per_token_cast;
