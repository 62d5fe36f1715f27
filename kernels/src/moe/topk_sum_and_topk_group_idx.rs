//! topk_sum_and_topk_group_idx: the groups of experts with the largest sum of their one or two best scores.
//!
//! In    scores f32 `[t, groups, of_group]`, tokens `row_stride` elements apart        Out   idx i64 `[t, k]`
//! Exact bitwise: one f32 addition; ties smaller group first, -0.0 equals +0.0. NaN scores count as -inf; a sum that is NaN (inf - inf)
//!       comes last.
//! Map   a warp per token, `32 / groups` lanes (rounded down to a power of two) a group. The lanes of a group merge their best two; then
//!       each compares its group with some of the others, and how many beat it is its rank.
//! Cost  4·t·groups·of_group bytes read; about 180 warp instructions a token for 8 groups of 32.

use crate::device::*;
use crate::{kernel, unroll};

/// Tokens, that is warps, of a block.
pub const WARPS: u32 = 8;

/// Most groups: each has a lane.
pub const MAX_GROUPS: u32 = WARP_SIZE;

/// Vectors of scores that a lane has in flight.
const HELD: usize = 4;

/// Grid and block for `t` tokens.
pub const fn config(t: u32) -> LaunchConfig {
    LaunchConfig::new(ceil_div(t, WARPS), WARPS * WARP_SIZE)
}

/// Logarithm of the number of lanes of a group, for 1 to [`MAX_GROUPS`] groups.
pub const fn log_lanes(groups: u32) -> u32 {
    (WARP_SIZE / groups.next_power_of_two()).ilog2()
}

kernel! {
    op = topk_sum_and_topk_group_idx;
    threads = 256, blocks = 8;
    /// The sum has `SUM` terms; vectors of `V` scores are aligned, and a group is whole vectors.
    pub fn select[const SUM: usize, const V: usize](
        scores: In<f32>, idx: Out<i64>, t: u32, groups: u32, of_group: u32, k: u32, log_lanes: u32, row_stride: u64,
    ) {
        let token = block_idx_x() * WARPS + warp_id();
        if token >= t {
            return;
        }
        let lanes = 1 << log_lanes;
        let (group, place) = (lane_id() >> log_lanes, lane_id() & (lanes - 1));
        let row = scores.at(token as u64 * row_stride + group as u64 * of_group as u64);

        // The best two of this lane's part of the group.
        let vectors = of_group / V as u32;
        let mine = if group < groups { vectors } else { 0 };
        let (mut best, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
        let mut first = 0;
        while first < vectors {
            rolled();
            let vector = |i: usize| first + ((i as u32) << log_lanes) + place;
            let held: [[f32; V]; HELD] = core::array::from_fn(|i| {
                if vector(i) < mine { load::<V>(row, vector(i) * V as u32) } else { [f32::NEG_INFINITY; V] }
            });
            unroll!(i in HELD {
                // The second half is often absent.
                if i < HELD / 2 || first + ((i as u32) << log_lanes) < vectors {
                    for score in held[i].as_slice() {
                        if SUM == 2 {
                            // NaN would be ignored by the next line, and leave the best one as the second.
                            let score = max_total(*score, f32::NEG_INFINITY);
                            second = max_total(second, min_total(best, score));
                        }
                        best = max_total(best, *score);
                    }
                }
            });
            first += (HELD as u32) << log_lanes;
        }

        // The best two of the group.
        let mut distance = lanes >> 1;
        while distance > 0 {
            rolled();
            let other = warp_shuffle_xor(best, distance);
            if SUM == 2 {
                let other_second = warp_shuffle_xor(second, distance);
                second = max_total(max_total(second, other_second), min_total(best, other));
            }
            best = max_total(best, other);
            distance >>= 1;
        }
        let key = ordered_key(if SUM == 2 { best + second } else { best });

        // The lanes of a group share the work of comparing it with all others.
        let mut rank = 0;
        let mut first = 0;
        while first < groups {
            rolled();
            let other = first + place;
            let other_key = warp_shuffle(key, other << log_lanes);
            let beaten = other_key > key || other_key == key && other < group;
            rank += (other < groups && beaten) as u32;
            first += lanes;
        }
        let mut distance = lanes >> 1;
        while distance > 0 {
            rolled();
            rank += warp_shuffle_xor(rank, distance);
            distance >>= 1;
        }
        if place == 0 && group < groups && rank < k {
            idx.at(token as u64 * k as u64).set(rank, group as i64);
        }
    }
    entries { best_v4[1, 4], best_v2[1, 2], best_v1[1, 1], two_v4[2, 4], two_v2[2, 2], two_v1[2, 1] }
}

/// `V` neighbouring scores.
#[inline(always)]
#[track_caller]
fn load<const V: usize>(row: In<f32>, i: u32) -> [f32; V] {
    match V {
        4 => {
            let words = row.load16(i);
            core::array::from_fn(|j| f32::from_bits(words[j & 3]))
        }
        2 => {
            let words = row.load8(i);
            core::array::from_fn(|j| f32::from_bits(words[j & 1]))
        }
        _ => [row.get(i); V],
    }
}
