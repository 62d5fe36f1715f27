//! Transforms of activations in place.

pub mod apply_rotary;
