//! What the casts share: formats, scale arithmetic and the layouts of scale factors.

use crate::device::*;

/// A format that data is quantised to.
pub trait Target: Copy {
    /// Largest finite magnitude.
    const MAX: f32;
    /// `amax` counts as at least this.
    const AMAX_MIN: f32;
    /// The same where scales are e4m3: its smallest value, 2^-9, is the smallest scale.
    const AMAX_MIN_E4M3: f32 = Self::MAX / 512.0;
    /// Bits of one value.
    const BITS: u32;
}

/// 1 sign, 4 exponent, 3 mantissa bits, largest value 448, no infinity.
#[derive(Clone, Copy)]
pub struct E4m3;
/// 1 sign, 2 exponent, 1 mantissa bit, largest value 6; two values a byte, even channel in the low nibble.
#[derive(Clone, Copy)]
pub struct E2m1;

impl Target for E4m3 {
    const MAX: f32 = 448.0;
    const AMAX_MIN: f32 = 1e-4;
    const BITS: u32 = 8;
}
impl Target for E2m1 {
    const MAX: f32 = 6.0;
    // 6 * 2^-126: the smallest amax whose scale is a normal number.
    const AMAX_MIN: f32 = f32::from_bits(0x01C0_0000);
    const BITS: u32 = 4;
}

/// Scale of a block: `sf` is stored and dequantises, `inv` is what the data is multiplied by.
#[derive(Clone, Copy)]
pub struct Scale {
    /// Stored scale factor.
    pub sf: f32,
    /// Its inverse as the op defines it: `MAX / amax`, not `1 / sf`.
    pub inv: f32,
}

/// Scale for a block whose largest magnitude is `amax`, see [`scale_at_least`].
#[inline(always)]
pub fn scale<T: Target, const ROUND: bool>(amax: f32) -> Scale {
    scale_at_least::<T, ROUND>(amax, T::AMAX_MIN)
}

/// Scale for a block whose largest magnitude is `amax`, which counts as at least `amax_min`. With `ROUND` it is the power of two at or
/// above `amax / MAX`, so that data never saturate (quant.md 2b); without, it is the exact quotient (2a).
#[inline(always)]
pub fn scale_at_least<T: Target, const ROUND: bool>(amax: f32, amax_min: f32) -> Scale {
    let clamped = max_total(amax, amax_min);
    if ROUND {
        // The product with the rounded reciprocal lands in the same binade as the quotient for every legal `amax`.
        // An infinite `amax` gives infinity and, by wrapping, its negative.
        let exponent = exponent_ceil(clamped * (1.0 / T::MAX));
        Scale { sf: f32::from_bits(exponent << 23), inv: f32::from_bits(254u32.wrapping_sub(exponent) << 23) }
    } else {
        Scale { sf: clamped / T::MAX, inv: T::MAX / clamped }
    }
}

/// Scale that is stored as e4m3, for a block whose largest magnitude is `amax` (quant.md 2d): the quotient `amax / MAX` rounded to
/// e4m3, and the inverse of that. Data can exceed `MAX` where the scale was rounded down, and saturate.
#[inline(always)]
pub fn scale_e4m3<T: Target>(amax: f32) -> Scale {
    // An infinity would become NaN below.
    let c = min_total(max_total(amax, T::AMAX_MIN_E4M3), f32::MAX);
    // The product with the rounded reciprocal, corrected by its remainder, is the quotient rounded to nearest.
    let reciprocal = 1.0 / T::MAX;
    let quotient = c * reciprocal;
    let quotient = fma(fma(-quotient, T::MAX, c), reciprocal, quotient);
    let sf = e4m3x2_to_f32(f32x2_to_e4m3x2(quotient, 0.0))[0];
    Scale { sf, inv: 1.0 / sf }
}

/// The code of a scale that is an e4m3.
#[inline(always)]
pub fn e4m3(sf: f32) -> u32 {
    f32x2_to_e4m3x2(sf, 0.0) & 0xff
}

/// Biased exponent of the power of two at or above a positive normal `s`.
#[inline(always)]
pub fn exponent_ceil(s: f32) -> u32 {
    (s.to_bits() + 0x7f_ffff) >> 23
}

/// The ue8m0 byte of a power of two.
#[inline(always)]
pub fn ue8m0(sf: f32) -> u32 {
    sf.to_bits() >> 23
}

/// Scale factors in global memory: element `(m, k)` is the f32 or e4m3 at `m * row_stride + k * col_stride`, or packed the byte
/// `k % 4` of the 32-bit word at `m * row_stride + k / 4 * col_stride`. Row-major and column-major forms differ only in the strides.
#[derive(Clone, Copy)]
pub struct SfLayout {
    /// Elements from one block row to the next.
    pub row_stride: u32,
    /// Elements from one block column (packed: four block columns) to the next.
    pub col_stride: u32,
}

impl SfLayout {
    /// Index of the f32 scale.
    #[inline(always)]
    pub fn index(self, m: u32, k: u32) -> u32 {
        m * self.row_stride + k * self.col_stride
    }

    /// Index of the byte of the packed scale.
    #[inline(always)]
    pub fn byte(self, m: u32, k: u32) -> u32 {
        (m * self.row_stride + k / 4 * self.col_stride) * 4 + k % 4
    }
}

/// Read a scale, packed or not.
#[inline(always)]
#[track_caller]
pub fn load_sf<const PACKED: bool>(sf: In<u8>, layout: SfLayout, m: u32, k: u32) -> f32 {
    if PACKED { f32::from_bits((sf.get(layout.byte(m, k)) as u32) << 23) } else { sf.cast::<f32>().get(layout.index(m, k)) }
}

/// Write the scale of the scaling block `(m, k)`, and if the block is the `last` of its row, zeros into what is left of a last packed
/// word.
#[inline(always)]
#[track_caller]
pub fn store_sf(sf: Out<u8>, layout: SfLayout, packed: bool, value: f32, (m, k): (u32, u32), last: bool) {
    if packed {
        sf.set(layout.byte(m, k), ue8m0(value) as u8);
        if last {
            let mut unused = k + 1;
            while !unused.is_multiple_of(4) {
                sf.set(layout.byte(m, unused), 0);
                unused += 1;
            }
        }
    } else {
        sf.cast::<f32>().set(layout.index(m, k), value);
    }
}

/// The word of bytes `i` to `i + 3`; those from `bytes` on are not read and count as 0.
#[inline(always)]
#[track_caller]
pub fn load_bytes(x: In<u8>, i: u32, bytes: u32) -> u32 {
    let one = |j: u32| if i + j < bytes { (x.get(i + j) as u32) << (8 * j) } else { 0 };
    one(0) | one(1) | one(2) | one(3)
}

/// Eight bf16 at any even address; those from `channels` on are not read and count as 0.
#[inline(always)]
#[track_caller]
pub fn load_bf16s(x: In<u8>, channels: u32) -> [u32; 4] {
    let x = x.cast::<u16>();
    let one = |i: u32| if i < channels { x.get(i) as u32 } else { 0 };
    core::array::from_fn(|i| one(2 * i as u32) | one(2 * i as u32 + 1) << 16)
}

/// Four f32 at any address that is a multiple of 4; those from `channels` on are not read and count as 0.
#[inline(always)]
#[track_caller]
pub fn load_f32s(x: In<u8>, channels: u32) -> [u32; 4] {
    let x = x.cast::<u32>();
    core::array::from_fn(|i| if (i as u32) < channels { x.get(i as u32) } else { 0 })
}

/// Division by a number that the host knows, as a product and a shift. Right for dividends below 2^31.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Divisor {
    /// `floor(2^(31 + shift) / divisor) + 1`.
    pub magic: u32,
    /// Logarithm of the divisor, rounded up.
    pub shift: u32,
}

impl Divisor {
    /// `divisor` must lie in `1..=2^31`.
    ///
    /// The product `magic * divisor` exceeds `2^(31 + shift)` by at most `divisor <= 2^shift`, so for `n < 2^31` the quotient is
    /// too large by less than `1 / divisor`, which the cut does not see.
    pub const fn new(divisor: u32) -> Self {
        let shift = 32 - divisor.wrapping_sub(1).leading_zeros();
        let magic = match (1u64 << (31 + shift)).checked_div(divisor as u64) {
            Some(quotient) => (quotient + 1) as u32,
            None => 0,
        };
        Self { magic, shift }
    }

    /// `n / divisor`.
    #[inline(always)]
    pub const fn divide(self, n: u32) -> u32 {
        (((2 * n) as u64 * self.magic as u64) >> 32) as u32 >> self.shift
    }
}
