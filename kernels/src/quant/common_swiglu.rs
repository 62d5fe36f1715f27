//! What the SwiGLU ops share: the activation in the operations of the specification, which rows of an expanded tensor hold tokens,
//! and their routing weights.

use super::common::Divisor;
use crate::device::*;
use crate::unroll;

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

/// `gate / (1 + e^-gate)` of a gate whose magnitude is at most `MODERATE`, bit for bit the IEEE quotient, in fewer instructions and
/// without a branch.
///
/// This is what the hardware's division does for operands of moderate size: a reciprocal, a step that corrects it, the product and a
/// step for its remainder. `SHORT` leaves out the first step, which gates that bf16 can hold do not need.
/// `tests/src/device/layer.rs` compares all 2^32 gates with the division.
#[inline(always)]
pub fn moderate_silu<const SHORT: bool>(gate: f32) -> f32 {
    let d = one_plus_exp(-gate);
    if SHORT { short_quotient(gate, d, fast_rcp(d)) } else { quotient(gate, d) }
}

/// `a / d`, given the reciprocal of `d` but for its last bits. Its error is 2^-44 of the quotient, so this is the IEEE quotient unless that
/// is as close to a halfway point. With gates that bf16 can hold it is so for 2^-23 and 2^-24 only, and there the hardware's reciprocal
/// of `2 - 2^-23` has to be the right one; tests run all of them.
#[inline(always)]
fn short_quotient(a: f32, d: f32, reciprocal: f32) -> f32 {
    let q = a * reciprocal;
    // The negative of the remainder, see `quotient`.
    let excess = fma(d, q, -a);
    fma(-excess, reciprocal, q)
}

/// `gate / (1 + e^-gate)` of one gate, whatever its size.
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
    /// Whether bf16 can hold all values.
    const SHORT: bool;
    /// Eight elements as read.
    type Raw: Copy;
    /// Eight zeros.
    const ZERO: Self::Raw;

    /// The eight elements at `x`, which is aligned to 16 bytes.
    fn load(x: In<u8>) -> Self::Raw;

    /// Their values.
    fn values(raw: Self::Raw) -> [f32; 8];

    /// `f(gate, up)` of eight elements at a time, one after the other: little code, soon compiled.
    fn map<const N: usize>(gates: [Self::Raw; N], ups: [Self::Raw; N], f: impl Fn(f32, f32) -> f32) -> [[f32; 8]; N];

    /// [`clamp_gate`] and [`clamp_up`], with a clamp that the type can hold.
    fn limit(gate: Self::Raw, up: Self::Raw, clamp: f32) -> [Self::Raw; 2];

    /// Whether the magnitude of one exceeds `MODERATE`; NaN does not.
    fn is_extreme<const N: usize>(raw: [Self::Raw; N]) -> bool;

    /// How many gates are above a positive clamp, and how many other values are above it or below its negative.
    fn count<const N: usize>(gates: [Self::Raw; N], ups: [Self::Raw; N], clamp: f32) -> Clamped;
}

/// bf16 input.
#[derive(Clone, Copy)]
pub struct Bf16;
/// f32 input.
#[derive(Clone, Copy)]
pub struct F32;

impl Source for Bf16 {
    const BYTES: u32 = 2;
    const SHORT: bool = true;
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
    fn map<const N: usize>(gates: [[u32; 4]; N], ups: [[u32; 4]; N], f: impl Fn(f32, f32) -> f32) -> [[f32; 8]; N] {
        let mut pairs = [[0; 2]; 8];
        unroll!(i in 8 {
            if i < 4 * N {
                pairs[i] = [gates[i / 4][i % 4], ups[i / 4][i % 4]];
            }
        });
        for _ in 0..4 * N {
            rolled();
            // Results take the place of what they are made from, and all turn round, because registers have no index.
            let before = pairs;
            let (l, r) = (bf16x2_to_f32(before[0][0]), bf16x2_to_f32(before[0][1]));
            let done = [f(l[0], r[0]).to_bits(), f(l[1], r[1]).to_bits()];
            unroll!(i in 8 {
                if i < 4 * N {
                    pairs[i] = if i + 1 < 4 * N { before[(i + 1) % 8] } else { done };
                }
            });
        }
        let mut v = [[0.0; 8]; N];
        unroll!(n in N {
            v[n] = core::array::from_fn(|i| f32::from_bits(pairs[(4 * n + i / 2) % 8][i % 2]));
        });
        v
    }

    #[inline(always)]
    fn limit(gate: [u32; 4], up: [u32; 4], clamp: f32) -> [[u32; 4]; 2] {
        let clamp = (clamp.to_bits() >> 16) * 0x1_0001;
        [gate.map(|l| bf16x2_min_nan(l, clamp)), up.map(|r| bf16x2_max_nan(bf16x2_min_nan(r, clamp), clamp | 0x8000_8000))]
    }

    #[inline(always)]
    fn is_extreme<const N: usize>(raw: [[u32; 4]; N]) -> bool {
        let largest = |[a, b, c, d]: [u32; 4]| bf16x2_max_abs(bf16x2_max_abs(a, b), bf16x2_max_abs(c, d));
        bf16x2_is_extreme(raw.map(largest).into_iter().fold(0, bf16x2_max_abs))
    }

    #[inline(always)]
    fn count<const N: usize>(gates: [[u32; 4]; N], ups: [[u32; 4]; N], clamp: f32) -> Clamped {
        // Above the clamp is above the largest bf16 that is not: both halves of a word at once.
        let limit = (clamp.to_bits() >> 16) * 0x1_0001;
        // From 128 on the sums have a unit in the last place of 1, so that the count is in the low bits.
        let mut sums = [0x4300_4300; 3];
        unroll!(i in 8 {
          if i < 4 * N {
            let (gate, up) = (gates[i / 4][i % 4], ups[i / 4][i % 4]);
            sums[0] = bf16x2_add(bf16x2_greater(gate, limit), sums[0]);
            sums[1] = bf16x2_add(bf16x2_greater(up, limit), sums[1]);
            sums[2] = bf16x2_add(bf16x2_greater(limit | 0x8000_8000, up), sums[2]);
          }
        });
        let [gates, above, below] = sums.map(|sum| (sum & 0x7F) + (sum >> 16 & 0x7F));
        Clamped { above: gates + (above << 16), below }
    }
}

impl Source for F32 {
    const BYTES: u32 = 4;
    const SHORT: bool = false;
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
    fn map<const N: usize>(gates: [[[u32; 4]; 2]; N], ups: [[[u32; 4]; 2]; N], f: impl Fn(f32, f32) -> f32) -> [[f32; 8]; N] {
        let mut pairs = [[0.0; 2]; 16];
        unroll!(i in 16 {
            if i < 8 * N {
                let value = |raw: [[[u32; 4]; 2]; N]| f32::from_bits(raw[i / 8][i / 4 % 2][i % 4]);
                pairs[i] = [value(gates), value(ups)];
            }
        });
        for _ in 0..8 * N {
            rolled();
            let before = pairs;
            let done = [f(before[0][0], before[0][1]), 0.0];
            unroll!(i in 16 {
                if i < 8 * N {
                    pairs[i] = if i + 1 < 8 * N { before[(i + 1) % 16] } else { done };
                }
            });
        }
        let mut v = [[0.0; 8]; N];
        unroll!(n in N {
            v[n] = core::array::from_fn(|i| pairs[(8 * n + i) % 16][0]);
        });
        v
    }

    #[inline(always)]
    fn limit(gate: [[u32; 4]; 2], up: [[u32; 4]; 2], clamp: f32) -> [[[u32; 4]; 2]; 2] {
        let limited = |f: fn(f32, f32) -> f32, v: [u32; 4]| v.map(|v| f(f32::from_bits(v), clamp).to_bits());
        [gate.map(|v| limited(clamp_gate, v)), up.map(|v| limited(clamp_up, v))]
    }

    #[inline(always)]
    fn is_extreme<const N: usize>(raw: [[[u32; 4]; 2]; N]) -> bool {
        raw.map(|raw| amax(Self::values(raw))).into_iter().fold(0.0, max_total) > MODERATE
    }

    #[inline(always)]
    fn count<const N: usize>(gates: [[[u32; 4]; 2]; N], ups: [[[u32; 4]; 2]; N], clamp: f32) -> Clamped {
        let mut count = Clamped::default();
        unroll!(n in N {
            let (gates, ups) = (Self::values(gates[n]), Self::values(ups[n]));
            for i in 0..8 {
                let (gate, up) = (gates[i], ups[i]);
                count.above += (gate > clamp) as u32 + (((up > clamp) as u32) << 16);
                count.below += (up < -clamp) as u32;
            }
        });
        count
    }
}

/// `a / d` for normal operands and quotients, without the branch that it has otherwise.
#[inline(always)]
pub fn normal_quotient(a: f32, d: f32) -> f32 {
    // Scaled, so that the reciprocal of a huge number is not 0.
    quotient(a * (1.0 / 256.0), d * (1.0 / 256.0))
}

/// Whether the magnitude of one of two bf16 gates is beyond what [`moderate_silu`] takes; NaN is not.
#[inline(always)]
pub fn bf16x2_is_extreme(gates: u32) -> bool {
    let [low, high] = bf16x2_to_f32(gates);
    max_abs(low, high).abs() > MODERATE
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

/// `silu(gate) * up`, times the weight if there is one, of eight channels a vector, and if `MODE` (one of [`Clamp`]'s) says so what
/// [`Counters::count`] takes. `small` is a constant: less code, which takes somewhat longer. Vectors that are not `used` are zeros, whose
/// work is left out where they are all that a warp has of that vector.
#[inline(always)]
pub fn activate<S: Source, const MODE: u32, const N: usize>(
    gates: [S::Raw; N],
    ups: [S::Raw; N],
    clamp: f32,
    weight: Option<f32>,
    small: bool,
    used: [bool; N],
) -> ([[f32; 8]; N], Clamped) {
    let clamped = if MODE == Clamp::COUNT { S::count(gates, ups, clamp) } else { Clamped::default() };
    // A clamp that bf16 cannot hold is a gate that it cannot hold.
    let other_clamp = MODE != Clamp::NONE && S::SHORT && clamp.to_bits() & 0xFFFF != 0;
    let mut v = [[0.0; 8]; N];
    if small || other_clamp || S::is_extreme(gates) {
        v = S::map(gates, ups, |l, r| {
            let (l, r) = if MODE == Clamp::NONE { (l, r) } else { (clamp_gate(l, clamp), clamp_up(r, clamp)) };
            silu(l) * r
        });
    } else {
        unroll!(n in N {
            if used[n] {
                let [gate, up] = if MODE == Clamp::NONE { [gates[n], ups[n]] } else { S::limit(gates[n], ups[n], clamp) };
                let (l, r) = (S::values(gate), S::values(up));
                v[n] = core::array::from_fn(|i| {
                    (if S::SHORT { moderate_silu::<true>(l[i]) } else { moderate_silu::<false>(l[i]) }) * r[i]
                });
            }
        });
    }
    if let Some(weight) = weight {
        unroll!(n in N {
            v[n] = v[n].map(|v| v * weight);
        });
    }
    (v, clamped)
}

/// What a lane clamped.
#[derive(Clone, Copy, Default)]
pub struct Clamped {
    /// Gates, and in the upper half of the word other values from above.
    above: u32,
    /// Other values from below.
    below: u32,
}

impl Clamped {
    /// Together with others.
    #[inline(always)]
    pub fn add(&mut self, other: Self) {
        self.above += other.above;
        self.below += other.below;
    }
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

    /// Add what the lanes of a warp clamped, less than 2^16 of a kind, among so many values of the warp.
    #[inline(always)]
    #[track_caller]
    pub fn count(self, clamped: Clamped, values: u32) {
        let (two, below) = (warp_sum_u32(clamped.above), warp_sum_u32(clamped.below));
        let lane = lane_id();
        if lane < 4 {
            let one = if lane == 2 { below } else { values };
            self.sums.atomic_add(lane, if lane < 2 { two >> (16 * lane) & 0xFFFF } else { one });
        }
    }

    /// Add the counts to the first `used` of `counters`. By all threads of the block.
    #[inline(always)]
    #[track_caller]
    pub fn finish(self, counters: Out<u64>, used: u32) {
        block_sync();
        if thread_idx() < used {
            counters.atomic_add(thread_idx(), self.sums.get(thread_idx()) as u64, Scope::Gpu);
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

    /// Rows for a warp to take: the first of these if all hold tokens, the second if not, the third at least if it counts.
    pub fn steps(&self, [all, some, counting]: [u32; 3], count: bool) -> u32 {
        let steps = if self.kind == Self::ALL { all } else { some };
        if count { steps.max(counting) } else { steps }
    }

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
            rolled();
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

    /// Which of `count` rows from `first` on hold tokens, the first in the lowest bit; the same for all lanes of the warp. `count` is
    /// at most 31.
    #[inline(always)]
    #[track_caller]
    pub fn holding_tokens(self, first: u32, count: u32) -> u32 {
        let lane = lane_id();
        if self.kind == Self::POS_TO_EXPERT {
            return warp_ballot(lane < count && self.map.get(first + lane) >= 0);
        }
        if self.kind != Self::PSUM {
            return (1 << count) - 1;
        }
        // As above, for all rows at once.
        let (mut padding, mut before_an_end) = (0, 0);
        let mut expert = lane;
        while expert - lane < self.num_experts {
            rolled();
            let end = if expert < self.num_experts { self.map.get(expert) as u32 } else { 0 };
            let (mut row, mut bit) = (first, 1);
            while row != first + count {
                rolled();
                let start = self.divisor.divide(row) * self.alignment;
                padding |= if warp_any(end > start && end <= row) { bit } else { 0 };
                before_an_end |= if warp_any(end > row) { bit } else { 0 };
                row += 1;
                bit *= 2;
            }
            // Ends that come after the last row are not followed by others.
            if 2 * before_an_end >= bit {
                break;
            }
            expert += WARP_SIZE;
        }
        before_an_end & !padding
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
