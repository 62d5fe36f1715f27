//! Random numbers.

pub mod randn;
