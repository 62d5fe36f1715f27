//! Quantisation.

pub mod cast_back;
