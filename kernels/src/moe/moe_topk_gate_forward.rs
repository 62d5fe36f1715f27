//! moe_topk_gate_forward: the experts of each token, their weights and where they are, from logits: the whole gate in one launch.
//!
//! In    logits f32 `[t, e]`, optional biases f32 `[e]`, flags of tokens u8 `[t]`, map of physical experts, fixed experts i64 `[t, k]`
//! Out   idx i64 and weights f32 `[t, k + s]`, optional logical indices i64 `[t, k]` and scores f32 `[t, e]`
//! Exact indices, given the scores: ties lower index first. Scores within 2.5 units of the last place, their sum in the order of a
//!       butterfly; the same bits on GPU and emulator. Random experts and weights bit for bit as 2.1.0 defines them.
//! Map   one warp per token. Logits are copied to shared memory and become scores there, with ranking keys beside them, four experts a
//!       lane at a time; `select` of `common_gate` finds the experts; then a lane is a slot.
//! Cost  4·t·e bytes read (not for tokens that are masked or random) and as many written; about 600 instructions a warp at e = 256.

use super::common_gate::*;
use super::common_index::{NONE, index_or_none};
use crate::device::*;
use crate::{kernel, unroll};
use core::hint::cold_path;

/// There are masks: bit `i` belongs to the `i`th of the kernel's four flags of a token.
pub const MASK: u32 = 1;
/// There are tokens with random experts.
pub const RANDOM: u32 = 2;
/// There are tokens with fixed experts.
pub const FIXED: u32 = 4;
/// There are tokens with another bias.
pub const IMAGE: u32 = 8;
/// There is a bias for tokens that are not `IMAGE`.
pub const BIAS: u32 = 16;
/// Every bias is 16-byte aligned.
pub const ALIGNED: u32 = 32;
/// Logical indices are wanted.
pub const UNMAPPED: u32 = 64;
/// Scores are wanted.
pub const SCORES: u32 = 128;
/// There are physical experts.
pub const PHYSICAL: u32 = 256;
/// Logits are asked for before it is known whether the token needs them.
pub const EAGER: u32 = 512;

/// Experts of a warp at a time.
const QUADS: u32 = STEP;

/// Shared memory of a block of `warps`: for each warp scores, keys and a list of candidates.
const fn shared(e: u32, warps: u32) -> (SharedLayout, Shared<f32>, Shared<u32>, Shared<u32>) {
    let mut layout = SharedLayout::new();
    let scores = layout.array::<f32>(warps * e);
    let keys = layout.array::<u32>(warps * e);
    let lists = layout.array::<u32>(warps * LIST);
    (layout, scores, keys, lists)
}

/// Grid and block for `t` tokens of `e` experts.
pub fn config(t: u32, e: u32) -> LaunchConfig {
    warp_per_token(t, |warps| shared(e, warps).0)
}

kernel! {
    op = moe_topk_gate_forward;
    threads = 256;
    /// `e` is a multiple of 4, `has` are flags of this module. `map_lines` and `count_lines` of 128 bytes of the maps are asked for ahead.
    /// What is needed to ask for the logits comes first, in one line of the constant cache.
    pub fn gate(
        t: u32, e: u32, has: u32, k: u32, logits: In<f32>, mask: In<u8>, random: In<u8>, fixed: In<u8>, image: In<u8>,
        bias: In<f32>, image_bias: In<f32>, unmapped: Out<i64>, unmapped_stride: u64, idx: Out<i64>, weights: Out<f32>,
        scores_out: Out<f32>, s: u32, factor: f32, map: In<i32>, logical_count: In<i32>, columns: u32, map_lines: u32, count_lines: u32,
        ep_rank: u32,
    ) {
        let (lane, warps) = (lane_id(), block_dim() / WARP_SIZE);
        let physical = Physical { map, logical_count, columns };
        if has & PHYSICAL != 0 {
            physical.prefetch(map_lines, count_lines);
        }
        let token = block_idx_x() * warps + warp_id();
        if token >= t {
            return;
        }
        let (_, scores, keys, lists) = shared(e, warps);
        let (scores, keys) = (scores.slice(warp_id() * e, e), keys.slice(warp_id() * e, e));
        let list = lists.slice(warp_id() * LIST, LIST);

        // Load. The four flags of the token come in one access, a lane each.
        let row = token as u64 * e as u64;
        if has & EAGER != 0 {
            copy_row(scores, logits.at(row), e);
        }
        let flag = if lane < 2 { if lane == 0 { mask } else { random } } else if lane == 2 { fixed } else { image };
        let flags = warp_ballot(lane < 4 && has >> lane & 1 == 1 && flag.at(token as u64).get(0) != 0);
        let masked = has & MASK != 0 && flags & MASK == 0;
        let places = token as u64 * (k + s) as u64;
        let (idx, weights, scores_out) = (idx.at(places), weights.at(places), scores_out.at(row));
        let unmapped = unmapped.at(token as u64 * unmapped_stride);
        if masked | (flags & RANDOM != 0) {
            // Behind everything else, so that the usual way is straight on: code comes from memory too.
            cold_path();
            if has & SCORES != 0 {
                let mut i = lane * 4;
                while i < e {
                    rolled();
                    scores_out.store16(i, [0; 4]);
                    i += QUADS;
                }
            }
            if lane < k && has & UNMAPPED != 0 {
                unmapped.set(lane, -1);
            }
            let (mut place, mut weight) = (-1, 0.0);
            if !masked {
                (place, weight) = at_random(physical, token, e + s, k + s, has, ep_rank);
            }
            if lane < k + s {
                idx.set(lane, place as i64);
                weights.set(lane, weight);
            }
            return;
        }
        if has & EAGER == 0 {
            copy_row(scores, logits.at(row), e);
        }
        let is_image = flags & IMAGE != 0;
        let bias = if is_image { image_bias } else { bias };
        let has_bias = is_image || has & BIAS != 0;
        let is_fixed = flags & FIXED != 0;
        let given = if is_fixed && lane < k { unmapped.get(lane) } else { -1 };
        let of_bias = |i: u32| if has_bias { load_quad(bias, i, has) } else { [0.0; 4] };

        // Scores in place of the logits, and what experts are ranked by.
        let mut best = 0;
        let mut i = lane * 4;
        while i < e {
            rolled();
            let bias = of_bias(i);
            copy_wait::<0>();
            let mut score = scores.load16(i);
            let mut key = [0; 4];
            unroll!(j in 4 {
                let u = sqrtsoftplus(f32::from_bits(score[j]));
                score[j] = u.to_bits();
                key[j] = rank_key(u + bias[j]);
                best = if key[j] > best { key[j] } else { best };
            });
            scores.store16(i, score);
            keys.store16(i, key);
            if has & SCORES != 0 {
                scores_out.store16(i, score);
            }
            i += QUADS;
        }

        // An expert and its slot. Only whole warps have fixed routing.
        let (mut expert, mut slot) = (index_or_none(given, e), lane);
        if !is_fixed && k > 0 {
            warp_sync();
            (expert, slot) = select(keys, e, k, best, list);
        }
        warp_sync();
        if slot < k {
            list.set(slot, expert);
        }
        warp_sync();

        // A lane is a slot from here on; those behind the chosen experts have the shared ones.
        expert = if lane < k { list.get(lane) } else { e + lane - k };
        let maps = (has & PHYSICAL != 0) & (expert != NONE) & (lane < k + s);
        // On its way while the scores are added up.
        let count = if maps { logical_count.get(expert) } else { 0 };
        let score = if lane < k && expert != NONE { scores.get(expert) } else { 0.0 };
        let sum = warp_sum::<WARP_SIZE>(score) + 1e-20;
        if lane >= k + s {
            return;
        }
        let mut weight = 1.0;
        if lane < k {
            weight = share(score, sum) * factor;
            if has & UNMAPPED != 0 && !is_fixed {
                unmapped.set(lane, expert as i64);
            }
        }
        weights.set(lane, weight);
        let mut place = expert as i32;
        if maps {
            place = physical.expert(expert, count, token, ep_rank);
        }
        idx.set(lane, place as i64);
    }
}

/// Start copying a row to shared memory, all of it at once. Each lane has its own quads after `copy_wait`.
#[inline(always)]
#[track_caller]
fn copy_row(to: Shared<f32>, from: In<f32>, e: u32) {
    let mut i = lane_id() * 4;
    while i < e {
        rolled();
        to.copy16_async(i, from, i);
        i += QUADS;
    }
    copy_commit();
}

/// Four neighbouring values.
#[inline(always)]
#[track_caller]
fn load_quad(from: In<f32>, i: u32, has: u32) -> [f32; 4] {
    if has & ALIGNED != 0 {
        return from.load16(i).map(f32::from_bits);
    }
    [from.get(i), from.get(i + 1), from.get(i + 2), from.get(i + 3)]
}

/// `part / sum`, correctly rounded, but 0 where it is below 2^-126.
#[inline(always)]
fn share(part: f32, sum: f32) -> f32 {
    let quotient = divide_normal(part, sum);
    if quotient < f32::MIN_POSITIVE { 0.0 } else { quotient }
}

/// The physical expert and the weight of this lane's slot, of `slots`, for a token with random experts, all of them different. `logical` is
/// the number of logical experts, shared ones included.
///
/// Slot `l` takes the `r`th of the experts that no slot before it has taken, with `r` below their number: two words of Philox decide
/// about slot and weight (moe.md, section 15).
#[inline(always)]
#[track_caller]
fn at_random(physical: Physical, token: u32, logical: u32, slots: u32, has: u32, ep_rank: u32) -> (i32, f32) {
    let lane = lane_id();
    let mut experts = logical;
    if has & PHYSICAL != 0 {
        experts = 0;
        let mut i = lane;
        while i < logical {
            experts = experts.wrapping_add(physical.logical_count.get(i) as u32);
            i += WARP_SIZE;
        }
        experts = warp_sum_u32(experts);
    }
    let number = token as u64 * 32 + lane as u64;
    let [weight, rank, ..] = philox4x32_10([0, 0, number as u32, (number >> 32) as u32], [ep_rank, 0]);
    let left = experts.saturating_sub(lane);
    // `checked_rem` leaves no branch to a panic.
    let rank = rank.checked_rem(left).unwrap_or(0);
    // From the last slot to the first: what it takes moves the numbers of all behind it that are not smaller.
    let mut place = rank;
    let mut slot = slots;
    while slot > 0 {
        rolled();
        slot -= 1;
        let taken = warp_shuffle(rank, slot);
        place += (lane > slot && place >= taken) as u32;
    }
    const UNIT: f32 = 1.0 / 4_294_967_296.0;
    (place as i32, fma(weight as f32, UNIT, 0.5 * UNIT))
}
