//! Out-of-place transposes.

pub mod batched_transpose;

pub use batched_transpose::{batched_transpose, transpose};
