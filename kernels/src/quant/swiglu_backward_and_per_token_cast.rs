//! swiglu_backward_and_per_token_cast: gradients of SwiGLU for rows given in e4m3, in bf16 and once more in e4m3 with a scale for each
//! `npc` channels; the activation and the gradients of the routing weights too.
//!
//! In   x e4m3 [p, 2h] and scales, act_x_grad bf16, f32 [p, h], row weights
//! Out  x_grad bf16 [p, 2h], x_grad_fp8 e4m3 [p, 2h] and scales, act_out bf16 [p, h], weight_grad f32
//! Exact bitwise quant.md 5.12 and 6.9 but for `weight_grad`, whose sum has an order of its own, always the same.
//! Map   a block a row, a lane 8 channels of both halves at a time, the next ones on their way while these are worked on; scales of a
//!       row meet in shared memory and leave last.
//! Cost  h * 4 bytes read and h * 8 written a row (6 without act_out); 48 instructions a channel: memory bound.

use super::common::{Divisor, E4m3, Scale, scale};
use super::common_swiglu::{Rows, Weights};
pub use super::swiglu_backward::{ACT_OUT, PACKED, WEIGHT_GRAD};
use super::swiglu_backward::{
    Bf16, F32, Float, RowWeight, begin_sum, blocks, clear_absent, dot, gradients, row_shared, row_threads,
};
use crate::device::*;
use crate::kernel;

/// Channels of a lane.
const N: usize = 8;

/// Most scales of a row, which shared memory has to hold.
pub const MAX_GROUPS: u32 = 48 << 10;

/// Grid and block; a row has `groups` scales.
pub fn config(num_rows: u32, hidden: u32, groups: u32, num_weights: u32) -> LaunchConfig {
    let threads = row_threads(ceil_div(hidden, N as u32));
    LaunchConfig::new(blocks(num_rows, num_weights), threads).shared(&shared(groups).0)
}

/// Shared memory of a block: a sum a warp, and the scales of its row, as words or packed as bytes.
#[inline(always)]
fn shared(groups: u32) -> (SharedLayout, Shared<u32>) {
    let (mut layout, _) = row_shared();
    let scales = layout.array(align_up(groups, 4));
    (layout, scales)
}

/// Quantised values.
#[inline(always)]
fn decode(raw: [u32; 2], sf: f32) -> [f32; N] {
    let words = raw.map(e4m3x4_to_f32);
    core::array::from_fn(|i| words[i / 4][i % 4] * sf)
}

/// Scale of a group of `LANES` lanes.
#[inline(always)]
#[track_caller]
fn scale_of<const ROUND: bool, const LANES: u32>(v: [f32; N]) -> Scale {
    let amax = v.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    // An infinite gradient counts as the largest number.
    scale::<E4m3, ROUND>(min_total(warp_max::<LANES>(amax), f32::MAX))
}

/// Quantise values.
#[inline(always)]
#[track_caller]
fn store(to: Out<u8>, v: [f32; N], inv: f32) {
    let v = v.map(|v| v * inv);
    to.store8(0, [f32x4_to_e4m3x4([v[0], v[1], v[2], v[3]]), f32x4_to_e4m3x4([v[4], v[5], v[6], v[7]])]);
}

kernel! {
    op = swiglu_backward_and_per_token_cast;
    threads = 256, blocks = 4;
    /// Strides count bytes, those of scales words; `rows_…` and `weights_…` are the fields of [`Rows`] and [`Weights`]. Groups of `LANES`
    /// lanes share a scale. `num_weights` is 0 unless gradients of weights are to be cleared, see [`clear_absent`].
    pub fn cast[G: Float, const ROUND: bool, const LANES: u32](
        x: In<u8>, x_sf: In<f32>, grad: In<u8>, rows_map: In<i32>, weights: In<f32>, weights_map: In<i32>,
        token_topk_to_pos: In<i32>, x_grad: Out<u8>, x_grad_fp8: Out<u8>, sf: Out<u32>, weight_grad: Out<f32>, act_out: Out<u8>,
        x_stride: u64, grad_stride: u64, x_sf_stride: u32, sf_row_stride: u32, sf_col_stride: u32,
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
        let (packed, with_act) = (ROUND && options & PACKED != 0, options & ACT_OUT != 0);
        let h = hidden as u64;
        let x_grad = x_grad.at(row as u64 * 4 * h);
        let x_grad_fp8 = x_grad_fp8.at(row as u64 * 2 * h);
        let act_out = act_out.at(row as u64 * 2 * h);
        let half_groups = hidden / (LANES * N as u32);
        let groups = 2 * half_groups;
        let (_, staged) = shared(groups);
        if packed && thread_idx() < align_up(groups, 4) - groups {
            // What is left of the last word.
            staged.cast::<u8>().set(groups + thread_idx(), 0);
        }

        let x = x.at(row as u64 * x_stride);
        let x_sf = x_sf.at(row as u64 * x_sf_stride as u64);
        let grad = grad.at(row as u64 * grad_stride);
        let load = |channel: u32| {
            // Of padding nothing is read: zeros give zeros. Nor is there anything beyond the end.
            if channel >= hidden || !holds_token {
                return ([0; 2], [0; 2], 0.0, 0.0, [0; 8]);
            }
            let group = channel / (LANES * N as u32);
            (
                x.load8(channel),
                x.load8(hidden + channel),
                x_sf.get(group),
                x_sf.get(half_groups + group),
                G::load::<N>(grad.at(channel as u64 * G::BYTES as u64)),
            )
        };
        let mut channel = thread_idx() * N as u32;
        // On its way before the weight is waited for.
        let mut raw = load(channel);
        let of_row = RowWeight::new(holds_token, weights, row);
        let (mut sum, mut first) = (0.0, 0);
        // The block goes on together.
        while first < hidden {
            let inside = channel < hidden;
            let grad = G::decode::<N>(raw.4);
            let of = gradients::<N>(decode(raw.0, raw.2), decode(raw.1, raw.3), grad, of_row.weight, clamp);
            sum = dot(grad, of.act, sum);
            let at = channel as u64;
            let (of_x, of_y) = (scale_of::<ROUND, LANES>(of.dx), scale_of::<ROUND, LANES>(of.dy));
            if inside {
                Bf16::store::<N>(x_grad.at(2 * at), of.dx);
                Bf16::store::<N>(x_grad.at(2 * (h + at)), of.dy);
                if with_act {
                    Bf16::store::<N>(act_out.at(2 * at), of.act.map(|v| v * of_row.weight));
                }
                store(x_grad_fp8.at(at), of.dx, of_x.inv);
                store(x_grad_fp8.at(h + at), of.dy, of_y.inv);
            }
            if inside && lane_id().is_multiple_of(LANES) {
                let group = channel / (LANES * N as u32);
                let stage = |group: u32, scale: Scale| {
                    let bits = if holds_token { scale.sf.to_bits() } else { 0 };
                    if packed {
                        staged.cast::<u8>().set(group, (bits >> 23) as u8);
                    } else {
                        staged.set(group, bits);
                    }
                };
                stage(group, of_x);
                stage(half_groups + group, of_y);
            }
            first += block_dim() * N as u32;
            channel += block_dim() * N as u32;
            raw = load(channel);
        }
        if options & WEIGHT_GRAD != 0 {
            begin_sum(sum);
        }
        block_sync();
        let words = if packed { ceil_div(groups, 4) } else { groups };
        let sf = sf.at(row as u64 * sf_row_stride as u64);
        let mut word = thread_idx();
        while word < words {
            rolled();
            sf.at(word as u64 * sf_col_stride as u64).set(0, staged.get(word));
            word += block_dim();
        }
        if options & WEIGHT_GRAD != 0 {
            of_row.store_grad(weight_grad);
        }
    }
    entries {
        bf16_32[Bf16, false, 4], bf16_128[Bf16, false, 16], bf16_round_32[Bf16, true, 4], bf16_round_128[Bf16, true, 16],
        f32_32[F32, false, 4], f32_128[F32, false, 16], f32_round_32[F32, true, 4], f32_round_128[F32, true, 16],
    }
}
