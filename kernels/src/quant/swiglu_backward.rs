//! swiglu_backward: gradients of `act = silu(x) * y` times a routing weight, for rows `[x | y]`; the activation and the weights' gradient too.
//!
//! In   x bf16, f32 [p, 2h], act_x_grad of the same type [p, h], row weights    Out  x_grad [p, 2h], act_out [p, h] bf16, f32; weight_grad f32
//! Exact bitwise quant.md 5.12 and 6.9 but for `weight_grad`, whose sum has an order of its own, always the same.
//! Map   a block a row, a lane 8 channels (4 if f32 comes or goes) at a time, the next ones on their way while these are worked on.
//! Cost  h * 3 values read and h * 3 (2 without act_out) written a row; 40 instructions a channel: memory bound.
//!
//! What is shared with `swiglu_backward_and_per_token_cast` is here.

use super::common::Divisor;
use super::common_swiglu::{Rows, Weights, clamp_gate, clamp_up};
use crate::device::*;
use crate::{kernel, unroll};

/// Most threads of a block.
const THREADS: u32 = 256;

/// Threads of a block for rows of `vectors` vectors: all take the same number of them, as far as whole warps allow.
pub const fn row_threads(vectors: u32) -> u32 {
    let rounds = ceil_div(vectors, THREADS);
    let threads = if rounds == 0 { 0 } else { align_up(ceil_div(vectors, rounds), WARP_SIZE) };
    if threads == 0 { WARP_SIZE } else { threads }
}

/// Blocks of a launch: one a row, but at least so many that none has more than 4096 of the weights' gradients to clear.
pub const fn blocks(num_rows: u32, num_weights: u32) -> u32 {
    let clearing = ceil_div(num_weights, 4096);
    if num_rows > clearing { num_rows } else { clearing }
}

/// Shared memory of a block: a sum a warp.
#[inline(always)]
pub fn row_shared() -> (SharedLayout, Shared<f32>) {
    let mut layout = SharedLayout::new();
    let sums = layout.array(WARP_SIZE);
    (layout, sums)
}

/// A type of gradients and activations.
pub trait Float: Copy {
    /// Bytes of a value.
    const BYTES: u32;

    /// `N` values (4 or 8) at `from`, which is aligned to as many bytes or to 16, as they lie in memory.
    fn load<const N: usize>(from: In<u8>) -> [u32; 8];

    /// Those values.
    fn decode<const N: usize>(raw: [u32; 8]) -> [f32; N];

    /// Write `N` values (4 or 8), rounded to nearest even.
    fn store<const N: usize>(to: Out<u8>, values: [f32; N]);
}

/// bf16.
#[derive(Clone, Copy)]
pub struct Bf16;
/// f32.
#[derive(Clone, Copy)]
pub struct F32;

impl Float for Bf16 {
    const BYTES: u32 = 2;

    #[inline(always)]
    #[track_caller]
    fn load<const N: usize>(from: In<u8>) -> [u32; 8] {
        if N == 8 {
            let [a, b, c, d] = from.load16(0);
            [a, b, c, d, 0, 0, 0, 0]
        } else {
            let [a, b] = from.load8(0);
            [a, b, 0, 0, 0, 0, 0, 0]
        }
    }

    #[inline(always)]
    fn decode<const N: usize>(raw: [u32; 8]) -> [f32; N] {
        core::array::from_fn(|i| bf16x2_to_f32(raw[i / 2])[i % 2])
    }

    #[inline(always)]
    #[track_caller]
    fn store<const N: usize>(to: Out<u8>, v: [f32; N]) {
        let pair = |i: usize| f32x2_to_bf16x2(v[2 * i], v[2 * i + 1]);
        if N == 8 { to.store16(0, [pair(0), pair(1), pair(2), pair(3)]) } else { to.store8(0, [pair(0), pair(1)]) }
    }
}

impl Float for F32 {
    const BYTES: u32 = 4;

    #[inline(always)]
    #[track_caller]
    fn load<const N: usize>(from: In<u8>) -> [u32; 8] {
        let [a, b, c, d] = from.load16(0);
        let [e, f, g, h] = if N == 8 { from.load16(16) } else { [0; 4] };
        [a, b, c, d, e, f, g, h]
    }

    #[inline(always)]
    fn decode<const N: usize>(raw: [u32; 8]) -> [f32; N] {
        core::array::from_fn(|i| f32::from_bits(raw[i]))
    }

    #[inline(always)]
    #[track_caller]
    fn store<const N: usize>(to: Out<u8>, v: [f32; N]) {
        let v = v.map(f32::to_bits);
        to.store16(0, [v[0], v[1], v[2], v[3]]);
        if N == 8 {
            to.store16(16, [v[N - 4], v[N - 3], v[N - 2], v[N - 1]]);
        }
    }
}

/// What comes of some channels.
pub struct Gradients<const N: usize> {
    /// Gradient of the gate.
    pub dx: [f32; N],
    /// Gradient of the other half.
    pub dy: [f32; N],
    /// The activation, not weighted.
    pub act: [f32; N],
}

/// `sum` and what these channels add to the gradient of the weight.
#[inline(always)]
pub fn dot<const N: usize>(grad: [f32; N], act: [f32; N], mut sum: f32) -> f32 {
    for i in 0..N {
        sum = fma(grad[i], act[i], sum);
    }
    sum
}

/// Gradients of some channels of a row of weight `weight`, quant.md 5.12; `clamp` is infinite where nothing is clamped.
#[inline(always)]
pub fn gradients<const N: usize>(x: [f32; N], y: [f32; N], grad: [f32; N], weight: f32, clamp: f32) -> Gradients<N> {
    let mut out = Gradients { dx: [0.0; N], dy: [0.0; N], act: [0.0; N] };
    unroll!(i in N {
        let (x_cut, y_cut) = (x[i] > clamp, y[i].abs() > clamp);
        let (x, y) = (clamp_gate(x[i], clamp), clamp_up(y[i], clamp));
        let t = one_plus_exp(-x);
        let s = reciprocal(t);
        // x / t, correctly rounded: the product with the inverse, and its remainder divided too (6.9). Infinity times zero would be NaN.
        let quotient = x * s;
        let silu = fma(-fma(quotient, min_total(t, f32::MAX), -x), s, quotient);
        out.act[i] = silu * y;
        let g = (grad[i] * weight) * s;
        // Of what was clamped there is no gradient.
        out.dx[i] = if x_cut { 0.0 } else { (g * y) * fma(x, 1.0 - s, 1.0) };
        out.dy[i] = if y_cut { 0.0 } else { g * x };
    });
    out
}

/// Bits of `options`: the activation is wanted.
pub const ACT_OUT: u32 = 1;
/// The gradients of the weights are wanted.
pub const WEIGHT_GRAD: u32 = 2;
/// Scales are packed.
pub const PACKED: u32 = 4;

/// What a row is multiplied by, and where the gradient of that goes.
#[derive(Clone, Copy)]
pub struct RowWeight {
    /// The weight; 0 for padding.
    pub weight: f32,
    holds_token: bool,
    /// Number of the gradient, at least 2^31 if there is none.
    slot: u32,
    /// What the gradient is multiplied by.
    factor: f32,
}

impl RowWeight {
    /// Of row `row`.
    #[inline(always)]
    #[track_caller]
    pub fn new(holds_token: bool, weights: Weights, row: u32) -> Self {
        let weight = if holds_token { weights.of(row).unwrap_or(1.0) } else { 0.0 };
        let slot = match weights.kind {
            Weights::PER_ROW => row,
            Weights::PER_TOKEN_TOPK => weights.map.get(row) as u32,
            _ => u32::MAX,
        };
        Self { weight, holds_token, slot, factor: weights.factor }
    }

    /// Write the gradient after [`begin_sum`] and a barrier.
    #[inline(always)]
    #[track_caller]
    pub fn store_grad(self, weight_grad: Out<f32>) {
        if warp_id() == 0 {
            let sum = if self.holds_token { end_sum() * self.factor } else { 0.0 };
            if self.slot as i32 >= 0 && lane_id() == 0 {
                weight_grad.set(self.slot, sum);
            }
        }
    }
}

/// Zeros into those gradients of weights that no row has: the block looks after `share` of all `num_weights`.
#[inline(always)]
#[track_caller]
pub fn clear_absent(token_topk_to_pos: In<i32>, weight_grad: Out<f32>, num_weights: u32, share: u32) {
    let first = block_idx_x() * share;
    let end = (first + share).min(num_weights);
    let mut slot = first + thread_idx();
    while slot < end {
        rolled();
        if token_topk_to_pos.get(slot) < 0 {
            weight_grad.set(slot, 0.0);
        }
        slot += block_dim();
    }
}

/// Sum over the block in a fixed order, in two parts with a barrier between them. This one notes the sum of each warp.
#[inline(always)]
#[track_caller]
pub fn begin_sum(value: f32) {
    let of_warp = warp_sum::<WARP_SIZE>(value);
    if lane_id() == 0 {
        row_shared().1.set(warp_id(), of_warp);
    }
}

/// The sum; for one warp.
#[inline(always)]
#[track_caller]
pub fn end_sum() -> f32 {
    warp_sum::<WARP_SIZE>(if lane_id() < block_dim() / WARP_SIZE { row_shared().1.get(lane_id()) } else { 0.0 })
}

kernel! {
    op = swiglu_backward;
    threads = 256, blocks = 4;
    /// Strides count bytes; `rows_…` and `weights_…` are the fields of [`Rows`] and [`Weights`]. `num_weights` is 0 unless gradients of
    /// weights are to be cleared, see [`clear_absent`].
    pub fn plain[X: Float, O: Float, const N: usize](
        x: In<u8>, grad: In<u8>, rows_map: In<i32>, weights: In<f32>, weights_map: In<i32>, token_topk_to_pos: In<i32>,
        x_grad: Out<u8>, weight_grad: Out<f32>, act_out: Out<u8>, x_stride: u64, grad_stride: u64,
        num_rows: u32, hidden: u32, clamp: f32, options: u32,
        rows_kind: u32, num_experts: u32, alignment: u32, alignment_magic: u32, alignment_shift: u32,
        weights_kind: u32, factor: f32, num_weights: u32, share: u32,
    ) {
        clear_absent(token_topk_to_pos, weight_grad, num_weights, share);
        let row = block_idx_x();
        if row >= num_rows {
            return;
        }
        let divisor = Divisor { magic: alignment_magic, shift: alignment_shift };
        let rows = Rows { kind: rows_kind, map: rows_map, num_experts, alignment, divisor };
        let weights = Weights { kind: weights_kind, weights, map: weights_map, factor };
        let holds_token = rows.holds_token(row);
        let row_bytes = hidden as u64 * O::BYTES as u64;
        let (x_grad, act_out) = (x_grad.at(row as u64 * 2 * row_bytes), act_out.at(row as u64 * row_bytes));
        let (x, grad) = (x.at(row as u64 * x_stride), grad.at(row as u64 * grad_stride));
        let load = |channel: u32| {
            // Of padding nothing is read: zeros give zeros. Nor is there anything beyond the end.
            if channel >= hidden || !holds_token {
                return ([0; 8], [0; 8], [0; 8]);
            }
            let values = |from: In<u8>, value: u32| X::load::<N>(from.at(value as u64 * X::BYTES as u64));
            (values(x, channel), values(x, hidden + channel), values(grad, channel))
        };
        let mut channel = thread_idx() * N as u32;
        // On its way before the weight is waited for.
        let mut raw = load(channel);
        let of_row = RowWeight::new(holds_token, weights, row);
        let mut sum = 0.0;
        while channel < hidden {
            let grad = X::decode::<N>(raw.2);
            let of = gradients::<N>(X::decode(raw.0), X::decode(raw.1), grad, of_row.weight, clamp);
            sum = dot(grad, of.act, sum);
            let at = channel as u64 * O::BYTES as u64;
            O::store::<N>(x_grad.at(at), of.dx);
            O::store::<N>(x_grad.at(row_bytes + at), of.dy);
            if options & ACT_OUT != 0 {
                O::store::<N>(act_out.at(at), of.act.map(|v| v * of_row.weight));
            }
            channel += block_dim() * N as u32;
            raw = load(channel);
        }
        if options & WEIGHT_GRAD != 0 {
            begin_sum(sum);
            block_sync();
            of_row.store_grad(weight_grad);
        }
    }
    entries {
        bf16_bf16[Bf16, Bf16, 8], bf16_f32[Bf16, F32, 4], f32_bf16[F32, Bf16, 4], f32_f32[F32, F32, 4],
    }
}

/// Grid and block for rows that take `vectors` steps of a lane.
pub fn config(num_rows: u32, vectors: u32, num_weights: u32) -> LaunchConfig {
    LaunchConfig::new(blocks(num_rows, num_weights), row_threads(vectors)).shared(&row_shared().0)
}
