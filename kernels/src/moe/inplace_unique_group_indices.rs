//! inplace_unique_group_indices: in each row, the second and later mention of a group becomes -1.
//!
//! In    indices i64 `[t, k]` in place, or a source of the same shape        Out   indices
//! Exact; what is negative stays as it is, so does what is not below `groups`.
//! Map   `V` neighbouring entries a lane, whole rows a warp: a row is `lanes` lanes, and each lane asks those before it in its row. Rows
//!       beyond a warp: a thread a row, each entry compared with those before it.
//! Cost  8·n bytes read, and written where something changes (all of it with a source); latency bound.

use super::common_index::{NONE, index_or_none};
use crate::device::*;
use crate::kernel;

/// Threads of a block.
pub const THREADS: u32 = 256;
const WARPS: u32 = THREADS / WARP_SIZE;

/// How rows of `k` entries lie on a warp.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Entries of a lane: 2 or 1; 0 where a row has a single thread.
    pub per_lane: u32,
    /// Lanes of a row.
    pub lanes: u32,
    /// Rows of a warp.
    pub rows: u32,
    /// `2^16 / lanes`, rounded up.
    pub reciprocal: u32,
}

/// The plan for rows of `k` entries, which start at multiples of 16 bytes if `aligned`.
pub const fn plan(k: u32, aligned: bool) -> Plan {
    if aligned && k.is_multiple_of(2) && k <= 2 * WARP_SIZE {
        rows(2, k / 2)
    } else if k <= WARP_SIZE {
        rows(1, k)
    } else {
        rows(0, 1)
    }
}

const fn rows(per_lane: u32, lanes: u32) -> Plan {
    // No row has no entries.
    let lanes = if lanes == 0 { 1 } else { lanes };
    Plan { per_lane, lanes, rows: WARP_SIZE / lanes, reciprocal: ceil_div(1 << 16, lanes) }
}

/// Grid and block for `t` rows.
pub const fn config(t: u32, plan: Plan) -> LaunchConfig {
    LaunchConfig::new(ceil_div(t, plan.rows * WARPS), THREADS)
}

kernel! {
    op = inplace_unique_group_indices;
    threads = 256;
    /// `V` is `per_lane` of the [`Plan`]; 0: a thread takes a row. `COPY`: entries come from `source`, and all are written.
    pub fn unique[const V: usize, const COPY: bool](
        source: In<i64>, indices: Out<i64>, t: u32, k: u32, groups: u32, lanes: u32, rows: u32, reciprocal: u32,
    ) {
        let first_row = (block_idx_x() as u64 * WARPS as u64 + warp_id() as u64) * rows as u64;
        if first_row >= t as u64 {
            return;
        }
        // `lane / lanes`: exact because both are at most 32.
        let in_warp = (lane_id() * reciprocal) >> 16;
        let place = lane_id() - in_warp * lanes;
        let row = first_row + in_warp as u64;
        let inside = in_warp < rows && row < t as u64;
        let at = row * k as u64 + V as u64 * place as u64;
        let (source, indices) = (source.at(at), indices.at(at));
        if V == 0 {
            if inside {
                by_one_thread::<COPY>(source, indices, k, groups);
            }
            return;
        }

        let entries: [i64; V] = if inside { load::<V, COPY>(source, indices) } else { [-1; V] };
        let keys: [u32; V] = core::array::from_fn(|i| index_or_none(entries[i], groups));
        let mut repeats = [false; V];
        if V == 2 {
            repeats[1] = keys[1] == keys[0];
        }
        let mut distance = 1;
        while distance < lanes {
            for key in 0..V {
                let earlier = warp_shuffle_up(keys[key], distance);
                for i in 0..V {
                    repeats[i] |= place >= distance && keys[i] == earlier;
                }
            }
            distance += 1;
        }
        let repeats: [bool; V] = core::array::from_fn(|i| repeats[i] && keys[i] != NONE);
        if !inside {
            return;
        }
        if COPY && V == 2 {
            let entry = |i: usize| if repeats[i] { -1 } else { entries[i] };
            let (a, b) = (entry(0), entry(V - 1));
            indices.store16(0, [a as u32, (a >> 32) as u32, b as u32, (b >> 32) as u32]);
        } else {
            for i in 0..V {
                if COPY || repeats[i] {
                    indices.set(i as u32, if repeats[i] { -1 } else { entries[i] });
                }
            }
        }
    }
    entries { v2[2, false], v1[1, false], any[0, false], copy_v2[2, true], copy_v1[1, true], copy_any[0, true] }
}

/// This lane's entries.
#[inline(always)]
#[track_caller]
fn load<const V: usize, const COPY: bool>(source: In<i64>, indices: Out<i64>) -> [i64; V] {
    if V == 2 {
        let words = if COPY { source.load16(0) } else { indices.load16(0) };
        core::array::from_fn(|i| (words[(2 * i) & 3] as u64 | (words[(2 * i + 1) & 3] as u64) << 32) as i64)
    } else {
        [if COPY { source.get(0) } else { indices.get(0) }; V]
    }
}

/// A row of any length.
#[inline(always)]
#[track_caller]
fn by_one_thread<const COPY: bool>(source: In<i64>, indices: Out<i64>, k: u32, groups: u32) {
    let entry = |i: u32| if COPY { source.get(i) } else { indices.get(i) };
    let mut i = 0;
    while i < k {
        let (this, key) = (entry(i), index_or_none(entry(i), groups));
        let mut earlier = 0;
        while earlier < i && (key == NONE || entry(earlier) != this) {
            rolled();
            earlier += 1;
        }
        let repeats = key != NONE && earlier < i;
        if COPY || repeats {
            indices.set(i, if repeats { -1 } else { this });
        }
        i += 1;
    }
}
