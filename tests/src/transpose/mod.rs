//! Transposes.

pub mod batched_transpose;
