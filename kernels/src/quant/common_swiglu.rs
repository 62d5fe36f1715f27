//! What the SwiGLU ops share: the activation in the operations of the specification, which rows of an expanded tensor hold tokens,
//! and their routing weights.

use super::common::Divisor;
use crate::device::*;
use crate::unroll;

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
/// operands of extreme size. The divisor is at least 1, and groups with a gate below [`LOW_GATE`], an infinity or a NaN take
/// the division itself. The step leaves an error of 2^-22 units in the last place before its rounding, and no quotient of a number of
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

/// [`silu`] of a gate that bf16 can hold, bit for bit: by the short division whatever the size of the gate.
#[inline(always)]
pub fn careful_silu(gate: f32) -> f32 {
    let divisor = one_plus_exp(-gate);
    // A divisor beyond 2^126 has a subnormal reciprocal, which the approximation would make 0.
    let reciprocal = fast_rcp(divisor * 0.25) * 0.25;
    let quotient = short_quotient(gate, divisor, reciprocal);
    // There is no remainder where a divisor or a gate is infinite, and no need of one.
    if quotient.is_nan() { gate * reciprocal } else { quotient }
}

/// An element type of the input. A lane takes eight channels at a time.
pub trait Source: Copy {
    /// Bytes of an element.
    const BYTES: u32;
    /// Eight elements as read.
    type Raw: Copy;
    /// Eight zeros.
    const ZERO: Self::Raw;

    /// The eight elements at `x`, which is aligned to 16 bytes.
    fn load(x: In<u8>) -> Self::Raw;

    /// Their values.
    fn values(raw: Self::Raw) -> [f32; 8];

    /// [`silu`] of gates that were `raw` before they were clamped; `exact` as for [`silu_of_bf16x8`].
    fn silu(raw: Self::Raw, gates: [f32; 8], exact: bool) -> [f32; 8];
}

/// bf16 input.
#[derive(Clone, Copy)]
pub struct Bf16;
/// f32 input.
#[derive(Clone, Copy)]
pub struct F32;

impl Source for Bf16 {
    const BYTES: u32 = 2;
    type Raw = [u32; 4];
    const ZERO: [u32; 4] = [0; 4];

    #[inline(always)]
    #[track_caller]
    fn load(x: In<u8>) -> [u32; 4] {
        x.load16(0)
    }

    #[inline(always)]
    fn values(raw: [u32; 4]) -> [f32; 8] {
        unpack(raw)
    }

    #[inline(always)]
    fn silu(raw: [u32; 4], gates: [f32; 8], exact: bool) -> [f32; 8] {
        silu_of_bf16x8(raw, gates, exact)
    }
}

impl Source for F32 {
    const BYTES: u32 = 4;
    type Raw = [[u32; 4]; 2];
    const ZERO: [[u32; 4]; 2] = [[0; 4]; 2];

    #[inline(always)]
    #[track_caller]
    fn load(x: In<u8>) -> [[u32; 4]; 2] {
        [x.load16(0), x.load16(16)]
    }

    #[inline(always)]
    fn values(raw: [[u32; 4]; 2]) -> [f32; 8] {
        core::array::from_fn(|i| f32::from_bits(raw[i / 4][i % 4]))
    }

    #[inline(always)]
    fn silu(_: [[u32; 4]; 2], gates: [f32; 8], _: bool) -> [f32; 8] {
        gates.map(silu)
    }
}

/// The clamp of gate and up.
#[derive(Clone, Copy)]
pub struct Clamp {
    /// Gates are at most this, the other half at most this in magnitude.
    pub value: f32,
    /// Whether bf16 cannot hold `value`.
    pub inexact: bool,
}

impl Clamp {
    /// No clamp.
    pub const NONE: u32 = 0;
    /// Clamp.
    pub const CLAMP: u32 = 1;
    /// Clamp, and count what was clamped.
    pub const COUNT: u32 = 2;
}

/// Gates above the clamp, other values above it, other values below its negative, and all values.
pub type Counts = [u32; 4];

/// `silu(gate) * up * weight` of eight channels. `MODE` is one of those of [`Clamp`].
#[inline(always)]
pub fn activate<S: Source, const MODE: u32>(
    gate: S::Raw,
    up: S::Raw,
    clamp: Clamp,
    weight: f32,
    counts: &mut Counts,
) -> [f32; 8] {
    let (mut gates, mut ups) = (S::values(gate), S::values(up));
    let c = clamp.value;
    if MODE == Clamp::COUNT {
        counts[0] += gates.iter().map(|l| (*l > c) as u32).sum::<u32>();
        counts[1] += ups.iter().map(|r| (*r > c) as u32).sum::<u32>();
        counts[2] += ups.iter().map(|r| (*r < -c) as u32).sum::<u32>();
        counts[3] += 8;
    }
    if MODE != Clamp::NONE {
        gates = gates.map(|l| clamp_gate(l, c));
        ups = ups.map(|r| clamp_up(r, c));
    }
    let silu = S::silu(gate, gates, MODE != Clamp::NONE && clamp.inexact);
    core::array::from_fn(|i| silu[i] * ups[i] * weight)
}

/// Where the counts of a block meet; see [`Counters::add`].
#[derive(Clone, Copy)]
pub struct Counters {
    sums: Shared<u32>,
}

impl Counters {
    /// In shared memory.
    #[inline(always)]
    pub const fn new(layout: &mut SharedLayout) -> Self {
        Self { sums: layout.array(4) }
    }

    /// Add the counts of all threads of the block to the first `used` of `counters`, with one atomic addition each.
    #[inline(always)]
    #[track_caller]
    pub fn add(self, counts: Counts, counters: Out<u64>, used: u32) {
        if thread_idx() < 4 {
            self.sums.set(thread_idx(), 0);
        }
        block_sync();
        unroll!(i in 4 {
            let of_warp = warp_sum_u32(counts[i]);
            if lane_id() == 0 {
                self.sums.atomic_add(i as u32, of_warp);
            }
        });
        block_sync();
        if thread_idx() < used {
            let sum = self.sums.get(thread_idx());
            if sum > 0 {
                counters.atomic_add(thread_idx(), sum as u64, Scope::Gpu);
            }
        }
    }
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
