//! What the SwiGLU ops share: the activation in the operations of the specification, which rows of an expanded tensor hold tokens,
//! and their routing weights.

use super::common::Divisor;
use crate::device::*;

/// Gates below this make [`one_plus_exp`] so large that its approximate reciprocal is 0.
const LOW_GATE: f32 = -87.0;

/// `min(gate, clamp)`; NaN stays NaN.
#[inline(always)]
pub fn clamp_gate(gate: f32, clamp: f32) -> f32 {
    min_nan(gate, clamp)
}

/// `max(min(up, clamp), -clamp)`; NaN stays NaN.
#[inline(always)]
pub fn clamp_up(up: f32, clamp: f32) -> f32 {
    max_nan(min_nan(up, clamp), -clamp)
}

/// `gate / (1 + e^-gate)` with the IEEE division.
#[inline(always)]
pub fn silu(gate: f32) -> f32 {
    gate / one_plus_exp(-gate)
}

/// Eight bf16 as f32, in the order of their channels.
#[inline(always)]
pub fn unpack(words: [u32; 4]) -> [f32; 8] {
    let [a, b, c, d] = words.map(bf16x2_to_f32);
    [a[0], a[1], b[0], b[1], c[0], c[1], d[0], d[1]]
}

/// [`silu`] of eight gates, bit for bit, in fewer instructions. `words` are the gates as bf16, `gates` the same as f32, clamped
/// perhaps; `exact` must be set when a clamp value that bf16 cannot hold may be among them.
///
/// The quotient is an approximate reciprocal, a product and one step of correction, without the tests that IEEE division makes for
/// operands of extreme size. The divisor is at least 1, and rows with a gate below [`LOW_GATE`], an infinity or a NaN take the
/// division itself. The step leaves an error of 2^-22 units in the last place before its rounding, and no quotient of a number of
/// 8 bits and the divisor that belongs to it lies so close to a halfway point: `tests/src/device/layer.rs` compares all 65536 gates
/// on the device, `tests/src/quant/swiglu_forward.rs` all errors that the approximations may have.
#[inline(always)]
pub fn silu_of_bf16x8(words: [u32; 4], gates: [f32; 8], exact: bool) -> [f32; 8] {
    let divisors = gates.map(|l| one_plus_exp(-l));
    if exact || has_extreme(words) {
        core::array::from_fn(|i| gates[i] / divisors[i])
    } else {
        core::array::from_fn(|i| short_quotient(gates[i], divisors[i], fast_rcp(divisors[i])))
    }
}

/// `a / d`, given the reciprocal of `d` but for its last bit.
#[doc(hidden)]
#[inline(always)]
pub fn short_quotient(a: f32, d: f32, reciprocal: f32) -> f32 {
    let q = a * reciprocal;
    // The remainder's negative, which is exact: a zero of it leaves the sign of a zero quotient alone.
    let excess = fma(d, q, -a);
    fma(-excess, reciprocal, q)
}

/// Whether one of eight bf16 is below [`LOW_GATE`], infinite or NaN.
#[inline(always)]
fn has_extreme(words: [u32; 4]) -> bool {
    let [a, b, c, d] = words;
    // As unsigned numbers the negative ones of large magnitude are the largest, as signed numbers the positive ones.
    let low = u16x2_max(u16x2_max(a, b), u16x2_max(c, d));
    let low = u16x2_max(low, low << 16);
    let high = i16x2_max(i16x2_max(a, b), i16x2_max(c, d));
    let high = i16x2_max(high, high << 16);
    low > LOW_GATE.to_bits() | 0xFFFF || high as i32 >= 0x7F80_0000
}

/// Which rows of an expanded tensor hold tokens.
#[derive(Clone, Copy)]
pub struct Rows {
    /// One of [`Rows::ALL`], [`Rows::POS_TO_EXPERT`] and [`Rows::PSUM`].
    pub kind: u32,
    /// The expert of each row, or one past the last row of each expert.
    pub map: In<i32>,
    /// Experts in a psum map.
    pub num_experts: u32,
    /// Experts of a psum map start at multiples of this.
    pub alignment: u32,
    /// By which to divide by `alignment`.
    pub divisor: Divisor,
}

impl Rows {
    /// Every row.
    pub const ALL: u32 = 0;
    /// Rows whose entry in the map is not negative.
    pub const POS_TO_EXPERT: u32 = 1;
    /// Rows between the start and the end of an expert.
    pub const PSUM: u32 = 2;

    /// Whether `row`, the same for all lanes of the warp, holds a token.
    #[inline(always)]
    #[track_caller]
    pub fn holds_token(self, row: u32) -> bool {
        if self.kind == Self::POS_TO_EXPERT {
            return self.map.get(row) >= 0;
        }
        if self.kind != Self::PSUM {
            return true;
        }
        // An expert starts at the first multiple of the alignment from the end of the one before. So a row is padding if an end
        // lies after the last such multiple and not after the row, or if no end comes after it. The order of ends does not matter.
        let start = self.divisor.divide(row) * self.alignment;
        let (mut before_end, mut padding) = (false, false);
        let mut expert = lane_id();
        while expert < self.num_experts {
            let end = self.map.get(expert) as u32;
            before_end |= end > row;
            padding |= end > start && end <= row;
            expert += WARP_SIZE;
        }
        warp_any(before_end) && !warp_any(padding)
    }
}

/// Routing weights of rows.
#[derive(Clone, Copy)]
pub struct Weights {
    /// One of [`Weights::NONE`], [`Weights::PER_ROW`] and [`Weights::PER_TOKEN_TOPK`].
    pub kind: u32,
    /// The weights.
    pub weights: In<f32>,
    /// For each row the number of its weight; negative for weight 0.
    pub map: In<i32>,
    /// What weights of rows are multiplied by.
    pub factor: f32,
}

impl Weights {
    /// Every row counts as it is.
    pub const NONE: u32 = 0;
    /// One weight a row.
    pub const PER_ROW: u32 = 1;
    /// The weight that the map names.
    pub const PER_TOKEN_TOPK: u32 = 2;

    /// The weight of a row.
    #[inline(always)]
    #[track_caller]
    pub fn of(self, row: u32) -> f32 {
        if self.kind == Self::PER_ROW {
            self.weights.get(row) * self.factor
        } else if self.kind == Self::PER_TOKEN_TOPK {
            let number = self.map.get(row);
            if number < 0 { 0.0 } else { self.weights.get(number as u32) }
        } else {
            1.0
        }
    }
}
