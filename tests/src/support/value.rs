//! Element types of tensors whose values references compute in f32.

use super::compare::Bits;
use ferrotile::{E4m3, Element};
use half::bf16;

/// An element type.
pub trait Value: Element + Bits + Send + Sync + Default + PartialEq {
    /// As f32.
    fn widen(self) -> f32;
    /// Rounded to nearest even; every NaN is the one that the GPU makes.
    fn round(value: f32) -> Self;
}

impl Value for f32 {
    fn widen(self) -> f32 {
        self
    }
    fn round(value: f32) -> Self {
        if value.is_nan() { f32::from_bits(0x7FFF_FFFF) } else { value }
    }
}

impl Value for bf16 {
    fn widen(self) -> f32 {
        self.to_f32()
    }
    fn round(value: f32) -> Self {
        if value.is_nan() { bf16::from_bits(0x7FFF) } else { bf16::from_f32(value) }
    }
}

impl Value for E4m3 {
    fn widen(self) -> f32 {
        self.to_f32()
    }
    fn round(value: f32) -> Self {
        if value.is_nan() { E4m3(0x7F) } else { E4m3::from_f32(value) }
    }
}
