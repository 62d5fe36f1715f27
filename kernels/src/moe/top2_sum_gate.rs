//! top2_sum_gate: the experts of each token, their weights and where they are, from logits: the whole gate in one launch.
//!
//! In    logits f32 `[t, e]`, bias f32 `[e]`; optional mask, fixed routing, map of physical experts
//! Out   idx i64 `[t, k + s]`, weights f32 `[t, k + s]`, optional logical indices i64 `[t, k]`
//! Exact indices, given the scores: ties lower index first. Scores within 2.7 ulp (softmax: relative (20 + max - x) / 2^24), added in slot
//!       order; the same bits on GPU and emulator and whatever the launch.
//! Map   one warp per token. Logits and bias are copied to shared memory, so that any `e` is loaded at once; scores and ranking keys stay
//!       there; groups are ranked by some lanes each; `select` of `common_gate` finds the experts; then a lane is a slot.
//! Cost  4·t·e bytes read and 12·t·(k + s) written, far from the limit: a chain of about 2 memory latencies and 1500 cycles.

use super::common_gate::*;
use super::common_index::{Divisor, NONE, index_or_none};
use crate::device::*;
use crate::kernel;

/// Most groups: each has a lane.
pub const MAX_GROUPS: u32 = WARP_SIZE;

/// Scores: `1 / (1 + e^-x)`.
pub const SIGMOID: u32 = 0;
/// Scores: `sqrt(log(1 + e^x))`.
pub const SQRTSOFTPLUS: u32 = 1;
/// Scores: `e^x` over its sum; experts are ranked by `x`.
pub const SOFTMAX: u32 = 2;

/// Logits and bias are 16-byte aligned, and `e` is a multiple of 4.
pub const ALIGNED: u32 = 1;
/// There is a mask.
pub const MASK: u32 = 2;
/// There is a mask of tokens with fixed routing.
pub const FIXED: u32 = 4;
/// Logical indices are wanted.
pub const UNMAPPED: u32 = 8;
/// There are physical experts.
pub const PHYSICAL: u32 = 16;

/// Shared memory of a block of `warps`: bias, and for each warp scores, keys and a list of candidates.
const fn shared(e: u32, warps: u32) -> (SharedLayout, Shared<f32>, Shared<f32>, Shared<u32>, Shared<u32>) {
    let e = padded(e);
    let mut layout = SharedLayout::new();
    let bias = layout.array::<f32>(e);
    let scores = layout.array::<f32>(warps * e);
    let keys = layout.array::<u32>(warps * e);
    let lists = layout.array::<u32>(warps * LIST);
    (layout, bias, scores, keys, lists)
}

/// Grid and block for `t` tokens of `e` experts.
pub fn config(t: u32, e: u32) -> LaunchConfig {
    warp_per_token(t, |warps| shared(e, warps).0)
}

kernel! {
    op = top2_sum_gate;
    threads = 256;
    /// `has` are flags of this module. `groups` is 0 without groups, of which `kept` are kept, each of `of_group` experts and ranked by
    /// `1 << log_lanes` lanes. A parallel rank has `rank_experts` physical experts (`rank_magic` and so on are a [`Divisor`]), and `tp_rank`
    /// of `tp_ranks` takes every `tp_ranks`th such rank. `map_lines` and `count_lines` of 128 bytes of the tables are asked for ahead.
    /// What is needed to ask for the logits comes first, in one line of the constant cache.
    pub fn gate[const SCORING: u32](
        t: u32, e: u32, has: u32, k: u32, logits: In<f32>, bias: In<f32>, mask: In<u8>, fixed: In<u8>, s: u32, groups: u32,
        unmapped: Out<i64>, unmapped_stride: u64, idx: Out<i64>, weights: Out<f32>, scaling: f32, kept: u32, of_group: u32, log_lanes: u32,
        map: In<i32>, logical_count: In<i32>, columns: u32, map_lines: u32, count_lines: u32, ep_rank: u32,
        rank_experts: u32, rank_magic: u32, rank_shift: u32, tp_rank: u32, tp_ranks: u32, tp_magic: u32, tp_shift: u32,
    ) {
        let (lane, warps) = (lane_id(), block_dim() / WARP_SIZE);
        let token = block_idx_x() * warps + warp_id();
        let inside = token < t;
        let (_, bias_row, scores, keys, lists) = shared(e, warps);
        let (scores, keys) = (scores.slice(warp_id() * padded(e), padded(e)), keys.slice(warp_id() * padded(e), padded(e)));
        let list = lists.slice(warp_id() * LIST, LIST);

        // Load. Masked tokens too: the mask arrives no earlier.
        let row = logits.at(token as u64 * e as u64);
        let has_bias = warp_id() == 0;
        if inside {
            let mut i = if has & ALIGNED != 0 { own(0) } else { lane };
            while i < e {
                rolled();
                if has & ALIGNED != 0 {
                    scores.copy16_async(i, row, i);
                    if has_bias {
                        bias_row.copy16_async(i, bias, i);
                    }
                    i += STEP;
                } else {
                    scores.copy4_async(i, row, i);
                    if has_bias {
                        bias_row.copy4_async(i, bias, i);
                    }
                    i += WARP_SIZE;
                }
            }
            // Padding gets key 0, because of NaN, and no share of a softmax.
            if lane < padded(e) - e {
                scores.set(e + lane, f32::NEG_INFINITY);
                if has_bias {
                    bias_row.set(e + lane, f32::NAN);
                }
            }
        }
        copy_commit();
        // Never, as no shift is so large. The last arguments are in a line of their own of the constant cache, which is fetched for this
        // while the logits are on their way, and not when everything else is done.
        if (rank_shift | tp_shift) >> 5 != 0 {
            return;
        }
        let physical = Physical { map, logical_count, columns };
        if has & PHYSICAL != 0 {
            physical.prefetch(map_lines, count_lines);
        }
        let unmapped = unmapped.at(token as u64 * unmapped_stride);
        let (mut routed, mut is_fixed, mut given) = (inside, false, -1);
        if inside && has & MASK != 0 {
            routed = mask.at(token as u64).get(0) != 0;
        }
        if inside && has & FIXED != 0 {
            is_fixed = fixed.at(token as u64).get(0) != 0;
            if lane < k {
                given = unmapped.get(lane);
            }
        }
        copy_wait::<0>();
        block_sync();
        // As votes, because the compiler knows that a vote is the same for the whole warp.
        let (inside, routed, is_fixed) = (warp_any(inside), warp_any(routed), warp_any(is_fixed));
        if !inside {
            return;
        }
        let (idx, weights) = (idx.at(token as u64 * (k + s) as u64), weights.at(token as u64 * (k + s) as u64));
        if !routed {
            if lane < k + s {
                idx.set(lane, -1);
                weights.set(lane, 0.0);
            }
            if lane < k && has & UNMAPPED != 0 {
                unmapped.set(lane, -1);
            }
            return;
        }

        // Scores in place of the logits, and what experts are ranked by.
        let (mut best, mut largest) = (0, f32::NAN);
        let mut i = own(0);
        while i < e {
            rolled();
            let x = scores.load16(i).map(f32::from_bits);
            let bias = bias_row.load16(i).map(f32::from_bits);
            let of_expert: [f32; 4] = core::array::from_fn(|j| match SCORING {
                SIGMOID => sigmoid(x[j]),
                SQRTSOFTPLUS => sqrtsoftplus(x[j]),
                _ => x[j],
            });
            // NaN has key 0 and is never chosen.
            let of_rank: [u32; 4] = core::array::from_fn(|j| ordered_key(of_expert[j] + bias[j]));
            keys.store16(i, of_rank);
            for j in 0..4 {
                best = max_u32(best, of_rank[j]);
                largest = max_total(largest, x[j]);
            }
            if SCORING != SOFTMAX {
                scores.store16(i, of_expert.map(f32::to_bits));
            }
            i += STEP;
        }
        let mut total = 1.0;
        if SCORING == SOFTMAX {
            let largest = ordered_float(warp_max_u32(ordered_key(largest)));
            let mut sum = [0.0; 4];
            let mut i = own(0);
            while i < e {
                rolled();
                let x = scores.load16(i).map(f32::from_bits);
                let powers: [f32; 4] = core::array::from_fn(|j| exp_nonpositive(x[j] - largest));
                scores.store16(i, powers.map(f32::to_bits));
                sum = core::array::from_fn(|j| sum[j] + powers[j]);
                i += STEP;
            }
            total = warp_sum::<WARP_SIZE>((sum[0] + sum[1]) + (sum[2] + sum[3]));
        }
        if groups != 0 {
            best = keep_groups(keys, e, groups, kept, of_group, log_lanes, list);
        }

        // An expert and its slot. Only whole warps have fixed routing.
        let (expert, slot) = if is_fixed { (index_or_none(given, e), lane) } else { select(keys, e, k, best, list) };
        warp_sync();
        let powers = list.slice(WARP_SIZE, WARP_SIZE).cast::<f32>();
        // A slot without expert.
        list.set(lane, NONE);
        powers.set(lane, 0.0);
        warp_sync();
        if slot < k {
            list.set(slot, expert);
            let power = if expert == NONE { 0.0 } else { scores.get(expert) };
            powers.set(slot, if SCORING == SOFTMAX { divide_normal(power, total) } else { power });
        }
        warp_sync();

        // A lane is a slot from here on; those behind the chosen experts have the shared ones.
        if lane >= k + s {
            return;
        }
        let expert = if lane < k { list.get(lane) } else { e + lane - k };
        let maps = (has & PHYSICAL != 0) & (expert != NONE);
        // On its way while the weights are added up.
        let count = if maps { logical_count.get(expert) } else { 0 };
        let mut sum = 1e-20;
        let mut first = 0;
        while first < k {
            rolled();
            for power in powers.load16(first).iter() {
                sum += f32::from_bits(*power);
            }
            first += 4;
        }
        let mut weight = 1.0;
        if lane < k {
            weight = divide_normal(powers.get(lane), sum) * scaling;
            if (has & UNMAPPED != 0) & !is_fixed {
                unmapped.set(lane, expert as i32 as i64);
            }
        }
        weights.set(lane, weight);
        let mut place = expert as i32;
        if maps {
            place = physical.expert(expert, count, token, ep_rank);
        }
        let by_rank = Divisor { magic: rank_magic, shift: rank_shift };
        let by_ranks = Divisor { magic: tp_magic, shift: tp_shift };
        let rank = by_rank.divide(place as u32);
        let round = by_ranks.divide(rank);
        // In place of the experts of all ranks before it stand those of this rank's.
        let here = (place >= 0) & (rank.wrapping_sub(round.wrapping_mul(tp_ranks)) == tp_rank);
        let local = (place as u32).wrapping_sub(rank.wrapping_sub(round).wrapping_mul(rank_experts));
        idx.set(lane, if here { local as i32 as i64 } else { -1 });
    }
    entries { sigmoid[SIGMOID], sqrtsoftplus[SQRTSOFTPLUS], softmax[SOFTMAX] }
}

/// Make the keys of all experts 0 that are not in one of the `kept` groups with the largest sum of the best two values; ties smaller group
/// first, a sum that is NaN last. Returns the largest key of this lane that is left.
#[inline(always)]
#[track_caller]
#[allow(clippy::too_many_arguments)]
fn keep_groups(keys: Shared<u32>, e: u32, groups: u32, kept: u32, of_group: u32, log_lanes: u32, list: Shared<u32>) -> u32 {
    let lane = lane_id();
    let lanes = 1 << log_lanes;
    let (group, place) = (lane >> log_lanes, lane & (lanes - 1));
    list.set(lane, 0);
    warp_sync();

    // The best two of this lane's part of the group, then of the group.
    let (mut best, mut second) = (0, 0);
    let mine = if group < groups { of_group } else { 0 };
    let mut first = place;
    while first < of_group {
        rolled();
        let at = [first, first + lanes];
        let held = at.map(|at| keys.get(min_u32(group * of_group + at, e - 1)));
        for i in 0..2 {
            let key = if at[i] < mine { held[i] } else { 0 };
            second = max_u32(second, min_u32(best, key));
            best = max_u32(best, key);
        }
        first += 2 * lanes;
    }
    let mut distance = lanes >> 1;
    while distance > 0 {
        rolled();
        let (other, other_second) = (warp_shuffle_xor(best, distance), warp_shuffle_xor(second, distance));
        second = max_u32(max_u32(second, other_second), min_u32(best, other));
        best = max_u32(best, other);
        distance >>= 1;
    }
    if place == 0 && group < groups {
        list.set(group, max_u32(ordered_key(ordered_float(best) + ordered_float(second)), 1));
    }
    warp_sync();
    let rank = rank(list, groups, list.get(lane));
    let chosen = warp_ballot(lane < groups && rank < kept);
    if group < groups && chosen >> group & 1 == 0 {
        let mut at = place;
        while at < of_group {
            rolled();
            keys.set(group * of_group + at, 0);
            at += lanes;
        }
    }
    warp_sync();
    let mut best = 0;
    let mut i = own(0);
    while i < e {
        rolled();
        for key in keys.load16(i).iter() {
            best = max_u32(best, *key);
        }
        i += STEP;
    }
    best
}
