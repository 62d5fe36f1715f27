//! Transforms in place.

pub mod apply_rotary;
