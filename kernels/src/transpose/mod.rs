//! Out-of-place transposes.

pub mod batched_transpose;
