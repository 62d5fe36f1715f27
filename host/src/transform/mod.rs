//! Transforms of activations in place.

pub mod apply_rotary;

pub use apply_rotary::apply_rotary;
