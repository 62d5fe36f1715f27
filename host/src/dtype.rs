//! Element types of tensors and buffers.

use ferrotile_kernels::device::num;
use std::fmt;

/// What one element of a tensor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DType {
    /// IEEE single.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half.
    F16,
    /// FP8 with 4 exponent and 3 mantissa bits, finite ("fn") variant: largest value 448.
    E4m3,
    /// FP8 with 5 exponent and 2 mantissa bits: largest finite value 57344.
    E5m2,
    /// Two FP4 values (2 exponent bits, 1 mantissa bit) in a byte, the even channel in the low nibble. Shapes count bytes.
    E2m1x2,
    /// Unsigned byte; also the 12-bit e5m6 stream.
    U8,
    /// Signed 32-bit integer.
    I32,
    /// Signed 64-bit integer.
    I64,
    /// Unsigned 32-bit integer.
    U32,
    /// Four power-of-two scale factors, one exponent byte each, in an i32; the first is in the lowest byte.
    Ue8m0x4,
}

impl DType {
    /// Bytes of one element.
    pub const fn size(self) -> u64 {
        match self {
            DType::E4m3 | DType::E5m2 | DType::E2m1x2 | DType::U8 => 1,
            DType::Bf16 | DType::F16 => 2,
            DType::F32 | DType::I32 | DType::U32 | DType::Ue8m0x4 => 4,
            DType::I64 => 8,
        }
    }

    /// The name used in error texts and in test and benchmark cases.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::Bf16 => "bf16",
            DType::F16 => "f16",
            DType::E4m3 => "e4m3",
            DType::E5m2 => "e5m2",
            DType::E2m1x2 => "e2m1x2",
            DType::U8 => "u8",
            DType::I32 => "i32",
            DType::I64 => "i64",
            DType::U32 => "u32",
            DType::Ue8m0x4 => "ue8m0x4",
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A Rust type that may be the element of a [`Buffer`](crate::Buffer).
pub trait Element: bytemuck::Pod {
    /// Its tensor type.
    const DTYPE: DType;
}

macro_rules! element {
    ($($t:ty => $dtype:ident),* $(,)?) => { $(impl Element for $t {
        const DTYPE: DType = DType::$dtype;
    })* };
}
element! {
    f32 => F32, half::bf16 => Bf16, half::f16 => F16, u8 => U8, i32 => I32, i64 => I64, u32 => U32,
    E4m3 => E4m3, E5m2 => E5m2, E2m1x2 => E2m1x2, Ue8m0x4 => Ue8m0x4,
}

macro_rules! bits {
    ($($(#[$doc:meta])* $name:ident($bits:ty);)*) => { $(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, bytemuck::Pod, bytemuck::Zeroable)]
        #[repr(transparent)]
        pub struct $name(pub $bits);
    )* };
}
bits! {
    /// Bits of one [`DType::E4m3`] value.
    E4m3(u8);
    /// Bits of one [`DType::E5m2`] value.
    E5m2(u8);
    /// Bits of two FP4 values ([`DType::E2m1x2`]).
    E2m1x2(u8);
    /// Four exponent bytes ([`DType::Ue8m0x4`]).
    Ue8m0x4(i32);
}

impl E4m3 {
    /// The nearest value, ties to even; magnitudes above 448 become 448, NaN stays NaN.
    ///
    /// ```
    /// use ferrotile::E4m3;
    /// assert_eq!(E4m3::from_f32(0.3).to_f32(), 0.3125);
    /// assert_eq!(E4m3::from_f32(-1e9).to_f32(), -448.0);
    /// ```
    pub const fn from_f32(value: f32) -> Self {
        Self(num::f32_to_e4m3(value))
    }

    /// The value, exactly.
    pub const fn to_f32(self) -> f32 {
        num::e4m3_to_f32(self.0)
    }
}

impl E5m2 {
    /// The nearest value, ties to even; magnitudes above 57344 become 57344, NaN stays NaN.
    pub const fn from_f32(value: f32) -> Self {
        Self(num::f32_to_e5m2(value))
    }

    /// The value, exactly.
    pub const fn to_f32(self) -> f32 {
        num::e5m2_to_f32(self.0)
    }
}

impl E2m1x2 {
    /// The values nearest to two numbers, the first in the low nibble; magnitudes above 6 become 6.
    pub const fn from_f32s(values: [f32; 2]) -> Self {
        Self(num::f32_to_e2m1(values[0]) | num::f32_to_e2m1(values[1]) << 4)
    }

    /// Both values, exactly.
    ///
    /// ```
    /// use ferrotile::E2m1x2;
    /// assert_eq!(E2m1x2::from_f32s([1.4, -20.0]).to_f32s(), [1.5, -6.0]);
    /// ```
    pub const fn to_f32s(self) -> [f32; 2] {
        [num::e2m1_to_f32(self.0 & 15), num::e2m1_to_f32(self.0 >> 4)]
    }
}

impl Ue8m0x4 {
    /// The four scale factors. As everywhere here, exponent 0 means 0.
    pub const fn to_f32s(self) -> [f32; 4] {
        let [a, b, c, d] = self.0.to_le_bytes();
        [num::ue8m0_to_f32(a), num::ue8m0_to_f32(b), num::ue8m0_to_f32(c), num::ue8m0_to_f32(d)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packed_values_come_apart_in_order() {
        assert_eq!(E2m1x2(0x92).to_f32s(), [1.0, -0.5]);
        assert_eq!(E2m1x2::from_f32s([1.0, -0.5]), E2m1x2(0x92));
        assert_eq!(Ue8m0x4(i32::from_le_bytes([127, 128, 126, 0])).to_f32s(), [1.0, 2.0, 0.5, 0.0]);
        assert_eq!(E5m2::from_f32(1e9).to_f32(), 57344.0);
    }

    fn agrees<T: Element>() {
        assert_eq!(size_of::<T>() as u64, T::DTYPE.size(), "{}", T::DTYPE);
    }

    #[test]
    fn sizes_agree_with_the_rust_types() {
        agrees::<f32>();
        agrees::<half::bf16>();
        agrees::<half::f16>();
        agrees::<u8>();
        agrees::<i32>();
        agrees::<i64>();
        agrees::<u32>();
        agrees::<E4m3>();
        agrees::<E5m2>();
        agrees::<E2m1x2>();
        agrees::<Ue8m0x4>();
    }
}
