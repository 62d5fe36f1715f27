//! What the SwiGLU ops share: the activation in the operations of the specification, which rows of an expanded tensor hold tokens,
//! and their routing weights.

use super::common::Divisor;
use crate::device::*;

/// Gates of larger magnitude may be too much for the short division: the reciprocal of `1 + e^87.4` is no normal number.
const MODERATE: f32 = 87.0;

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

/// `gate / (1 + e^-gate)` of eight gates, bit for bit the IEEE quotient, in fewer instructions and without a branch a value.
///
/// This is what the hardware's division does for operands of moderate size: a reciprocal, a step that corrects it, the product and a
/// step for its remainder. With `extreme`, which must be set if the magnitude of one exceeds [`MODERATE`], operands are scaled
/// first. `tests/src/device/layer.rs` compares all 2^32 gates with the division.
#[inline(always)]
pub fn silu8(gates: [f32; 8], extreme: bool) -> [f32; 8] {
    let divisors = gates.map(|l| one_plus_exp(-l));
    if !extreme {
        return core::array::from_fn(|i| quotient(gates[i], divisors[i]));
    }
    core::array::from_fn(|i| any_quotient(gates[i], divisors[i]))
}

/// [`silu8`] of one gate, whatever its size.
#[inline(always)]
pub fn silu(gate: f32) -> f32 {
    any_quotient(gate, one_plus_exp(-gate))
}

/// A gate divided by its `1 + e^-gate`.
#[inline(always)]
fn any_quotient(l: f32, d: f32) -> f32 {
    let scale = if l < -MODERATE { 1.0 / 256.0 } else { 1.0 };
    // An infinite divisor becomes a finite one with the same quotient, a zero.
    let silu = quotient(l * scale, min_total(d * scale, f32::MAX));
    if l == f32::INFINITY { l } else { silu }
}

/// `a / d` for operands of which no step below leaves the normal numbers, or is exact.
#[inline(always)]
fn quotient(a: f32, d: f32) -> f32 {
    let r = fast_rcp(d);
    let r = fma(r, fma(-d, r, 1.0), r);
    let q = a * r;
    // The negative of the remainder: if it is zero, the sum below keeps the sign of a zero quotient.
    let excess = fma(d, q, -a);
    fma(-excess, r, q)
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

    /// Whether the magnitude of one exceeds [`MODERATE`]; NaN does not.
    fn is_extreme(raw: Self::Raw) -> bool;
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
        let [a, b, c, d] = raw.map(bf16x2_to_f32);
        [a[0], a[1], b[0], b[1], c[0], c[1], d[0], d[1]]
    }

    #[inline(always)]
    fn is_extreme([a, b, c, d]: [u32; 4]) -> bool {
        let [low, high] = bf16x2_to_f32(bf16x2_max_abs(bf16x2_max_abs(a, b), bf16x2_max_abs(c, d)));
        max_abs(low, high).abs() > MODERATE
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
    fn is_extreme(raw: [[u32; 4]; 2]) -> bool {
        amax(Self::values(raw)) > MODERATE
    }
}

/// Largest magnitude; NaN does not count unless all are NaN.
#[inline(always)]
pub fn amax([a, b, c, d, e, f, g, h]: [f32; 8]) -> f32 {
    max_abs(max_abs(max_abs(a, b), max_abs(c, d)), max_abs(max_abs(e, f), max_abs(g, h))).abs()
}

/// How an entry treats the clamp of gate and up, as a constant.
pub struct Clamp;

impl Clamp {
    /// No clamp.
    pub const NONE: u32 = 0;
    /// Clamp.
    pub const CLAMP: u32 = 1;
    /// Clamp, and count what was clamped.
    pub const COUNT: u32 = 2;
}

/// `silu(gate) * up`, times the weight if there is one, of eight channels, and if `MODE` (one of [`Clamp`]'s) says so what
/// [`Counters::count`] takes.
#[inline(always)]
pub fn activate<S: Source, const MODE: u32>(gate: S::Raw, up: S::Raw, clamp: f32, weight: Option<f32>) -> ([f32; 8], u32) {
    let (mut gates, mut ups) = (S::values(gate), S::values(up));
    let mut clamped = 0;
    if MODE == Clamp::COUNT {
        for i in 0..8 {
            let (gate, above, below) = (gates[i] > clamp, ups[i] > clamp, ups[i] < -clamp);
            clamped += gate as u32 + ((above as u32) << 10) + ((below as u32) << 20);
        }
    }
    if MODE != Clamp::NONE {
        gates = gates.map(|l| clamp_gate(l, clamp));
        ups = ups.map(|r| clamp_up(r, clamp));
    }
    let silu = silu8(gates, S::is_extreme(gate));
    let mut v = core::array::from_fn(|i| silu[i] * ups[i]);
    if let Some(weight) = weight {
        v = v.map(|v| v * weight);
    }
    (v, clamped)
}

/// Counts of a block: gates above the clamp, other values above it, other values below its negative, and all values.
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

    /// Start at zero. By all threads of the block.
    #[inline(always)]
    #[track_caller]
    pub fn start(self) {
        if thread_idx() < 4 {
            self.sums.set(thread_idx(), 0);
        }
        block_sync();
    }

    /// Add what the lanes of a warp clamped among eight values each, in 10 bits each of `clamped`, and those eight of the lanes that
    /// are `inside` of the row; what the others read are zeros, which are not clamped.
    #[inline(always)]
    #[track_caller]
    pub fn count(self, clamped: u32, inside: bool) {
        let values = 8 * warp_ballot(inside).count_ones();
        let clamped = warp_sum_u32(clamped);
        let lane = lane_id();
        if lane < 4 {
            self.sums.atomic_add(lane, if lane == 3 { values } else { (clamped >> (10 * lane)) & 1023 });
        }
    }

    /// Add the counts to the first `used` of `counters`. By all threads of the block.
    #[inline(always)]
    #[track_caller]
    pub fn finish(self, counters: Out<u64>, used: u32) {
        block_sync();
        if thread_idx() < used {
            let sum = self.sums.get(thread_idx());
            if sum > 0 {
                counters.atomic_add(thread_idx(), sum as u64, Scope::Gpu);
            }
        }
    }
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
        // lies after the last such multiple and not after the row, or if no end comes after it. Ends ascend.
        let start = self.divisor.divide(row) * self.alignment;
        let mut first = 0;
        while first < self.num_experts {
            let expert = first + lane_id();
            let end = if expert < self.num_experts { self.map.get(expert) as u32 } else { 0 };
            if warp_any(end > start && end <= row) {
                return false;
            }
            if warp_any(end > row) {
                return true;
            }
            first += WARP_SIZE;
        }
        false
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
    pub fn of(self, row: u32) -> Option<f32> {
        if self.kind == Self::PER_ROW {
            Some(self.weights.get(row) * self.factor)
        } else if self.kind == Self::PER_TOKEN_TOPK {
            let number = self.map.get(row);
            Some(if number < 0 { 0.0 } else { self.weights.get(number as u32) })
        } else {
            None
        }
    }
}
