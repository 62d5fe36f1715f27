//! Random numbers.

pub mod randn;

pub use randn::{Generator, randn, randn_counted, randn_like, set_seed};
