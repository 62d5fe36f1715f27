//! topk_gate: for each token, the `k` experts with the largest scores, largest first.
//!
//! In    scores f32 `[t, e]`, rows `row_stride` elements apart        Out   idx i64 `[t, k]`
//! Exact bitwise a stable descending sort: ties lower index first, -0.0 equals +0.0, NaN below -inf; no expert repeats.
//! Map   one warp per token. The k-th largest of the 32 lane maxima bounds the result from below; whoever reaches it (about k + 1
//!       experts) is gathered one per lane, and a lane's rank is the number of candidates that beat its own. More candidates than
//!       lanes (many ties, or `k` beyond about 20): the `k`th largest is found by bisection instead.
//! Cost  4·t·e bytes read, 8·t·k written; about 225 warp instructions a token at e = 256, k = 8: 2 us of issue
//!       slots for 8001 tokens, beside 3 us of DRAM.

use super::common_gate::load;
use crate::device::*;
use crate::kernel;

/// Tokens, that is warps, of a block. Eight blocks of 256 threads fill an SM: 8001 tokens are in flight at once on 132 SMs.
pub const WARPS: u32 = 8;

/// Most experts that a token can choose: the result is sorted one per lane.
pub const MAX_TOPK: u32 = WARP_SIZE;

/// Shared memory: candidates of each warp as (bits of the score, expert), and how many there are.
const fn shared() -> (SharedLayout, Shared<u64>, Shared<u32>) {
    let mut layout = SharedLayout::new();
    let found = layout.array::<u64>(WARPS * WARP_SIZE);
    let count = layout.array::<u32>(WARPS);
    (layout, found, count)
}

/// Grid and block for `t` tokens.
pub const fn config(t: u32) -> LaunchConfig {
    LaunchConfig::new(ceil_div(t, WARPS), WARPS * WARP_SIZE).shared(&shared().0)
}

kernel! {
    op = topk_gate;
    threads = 256;
    /// A lane holds `RUNS` runs of `V` neighbouring experts, 32 runs beside each other; the first `FULL` runs of every lane are
    /// within the row. `V` is 4 for rows that are 16-byte aligned and a multiple of 4 long, else 1. `RUNS` = 0: any length, slowly.
    pub fn gate[const RUNS: usize, const FULL: usize, const V: usize](
        scores: In<f32>, idx: Out<i64>, t: u32, e: u32, k: u32, row_stride: u64,
    ) {
        let token = block_idx_x() * WARPS + warp_id();
        if token >= t {
            return;
        }
        let (row, idx) = (scores.at(token as u64 * row_stride), idx.at(token as u64 * k as u64));
        let (_, found, count) = shared();
        let (found, count) = (found.slice(warp_id() * WARP_SIZE, WARP_SIZE), count.slice(warp_id(), 1));
        if RUNS == 0 {
            select(row, idx, e, k, 0, found);
            return;
        }
        let lane = lane_id();

        // Load. Experts beyond the row are NaN, which is never a candidate.
        let first = |run: usize| (run as u32 * WARP_SIZE + lane) * V as u32;
        let values = |run: usize| {
            if run < FULL || first(run) < e { load::<V>(row, first(run)) } else { [f32::NAN; V] }
        };
        let x: [[f32; V]; RUNS] = core::array::from_fn(values);

        // Until the scores arrive: an empty list, whose entries lose against everything.
        found.store8(lane, [f32::NAN.to_bits(), u32::MAX]);
        if lane == 0 {
            count.set(0, 0);
        }
        warp_sync();

        // The low bits of a key make lanes differ, so each round drops exactly one lane; cutting them off lowers the bound a little.
        let best = x.iter().flatten().fold(f32::NAN, |best, &v| max_total(best, v));
        let mut key = ordered_key(best) & !31 | lane;
        let mut bound = 0;
        for _ in 0..k {
            bound = warp_max_u32(key);
            if key == bound {
                key = 0;
            }
        }
        let low = bound & !31;
        let bound = ordered_float(low);

        // Bit `run * V + i` of a lane: its expert of that number is a candidate.
        let mut mine = 0u32;
        for (run, held) in x.iter().enumerate() {
            // Long rows are read again, from L1: the compiler would not unroll this loop and keep `x` in registers.
            let values = if RUNS * V > 12 { values(run) } else { *held };
            for (i, v) in values.iter().enumerate() {
                mine |= ((*v >= bound) as u32) << (run * V + i);
            }
        }
        let candidates = warp_sum_u32(mine.count_ones());
        if candidates < k || candidates > WARP_SIZE {
            // Too many equal scores, too many large ones in one lane, or not enough numbers.
            select(row, idx, e, k, if candidates < k { 0 } else { low }, found);
            return;
        }

        // Gather, in any order. Few lanes have a candidate and hardly any has three, and the row is still in L1.
        if mine != 0 {
            let mut at = count.atomic_add(0, mine.count_ones());
            while mine != 0 {
                let bit = mine.trailing_zeros();
                let expert = first((bit / V as u32) as usize) + bit % V as u32;
                found.store8(at, [row.get(expert).to_bits(), expert]);
                mine &= mine - 1;
                at += 1;
            }
        }
        warp_sync();

        // Rank. Few candidates are compared by both halves of the warp, every other pair each, without a loop.
        let few = candidates <= 12;
        let [score, expert] = found.load8(if few { lane & 15 } else { lane });
        let beaten = |j: u32| {
            let [a, a_expert, b, b_expert] = found.load16(j);
            beats(a, a_expert, score, expert) as u32 + beats(b, b_expert, score, expert) as u32
        };
        let mut rank;
        if few {
            let half = lane >> 4 << 1;
            rank = beaten(half) + beaten(4 + half) + beaten(8 + half);
            rank += warp_shuffle_xor(rank, 16);
        } else {
            rank = 0;
            let mut j = 0;
            while j < candidates {
                rank += beaten(j);
                j += 2;
            }
        }
        if lane < candidates && rank < k {
            idx.set(rank, expert as i64);
        }
    }
    entries {
        r1[1, 0, 1], r2[2, 1, 1], r3[3, 2, 1], r4[4, 3, 1], r6[6, 4, 1], r8[8, 6, 1], r12[12, 8, 1], r16[16, 12, 1], r32[32, 16, 1],
        r1v4[1, 0, 4], r2v4[2, 1, 4], r3v4[3, 2, 4], r4v4[4, 3, 4], r8v4[8, 4, 4],
        any[0, 0, 1],
    }
}

/// Whether the first (bits of the score, expert) stands before the second in the result; never for NaN.
#[inline(always)]
fn beats(a: u32, a_expert: u32, b: u32, b_expert: u32) -> bool {
    let (a, b) = (f32::from_bits(a), f32::from_bits(b));
    // Without `&&` and `||`, which would become branches.
    (a > b) | (a == b) & (a_expert < b_expert)
}

/// Right for every row, by bisection for the score of the `k`th expert: as many scans of the row as it takes to separate the `k`th from
/// the next one, 32 at most. `low` is the key of a score that at least `k` experts reach, if one is known, else 0. `found` has room for
/// one entry a lane.
#[inline(always)]
#[track_caller]
fn select(row: In<f32>, idx: Out<i64>, e: u32, k: u32, low: u32, found: Shared<u64>) {
    let lane = lane_id();
    // At least `k` experts reach `low`, and `above` of them, fewer than `k`, reach `high`.
    let (mut low, mut high, mut above) = (low, ordered_key(f32::INFINITY) + 1, 0);
    let lowest = ordered_key(f32::NEG_INFINITY);
    if low < lowest {
        let numbers = num_reaching(row, e, lowest);
        // Every expert reaches 0, the key of NaN.
        (low, high, above) = if numbers >= k { (lowest, high, 0) } else { (0, 1, numbers) };
    }
    let mut exact = false;
    while high - low > 1 && !exact {
        let middle = low + (high - low) / 2;
        let num = num_reaching(row, e, middle);
        if num >= k {
            (low, exact) = (middle, num == k);
        } else {
            (high, above) = (middle, num);
        }
    }
    // Of those that have the key `low` itself, the first ones are taken, unless there are exactly `k` that reach it.
    let mut ties = if exact { k } else { k - above };

    // Gather in ascending order of the experts, the key in the lower half.
    let below = (1 << lane) - 1;
    let (mut first, mut num_found) = (0, 0);
    while first < e {
        let i = first + lane;
        let key = if i < e { ordered_key(row.get(i)) } else { 0 };
        let tie = i < e && key == low;
        let tied = warp_ballot(tie);
        let taken = key > low || tie && (tied & below).count_ones() < ties;
        let all = warp_ballot(taken);
        if taken {
            found.store8(num_found + (all & below).count_ones(), [key, i]);
        }
        let num_tied = tied.count_ones();
        ties -= if num_tied < ties { num_tied } else { ties };
        num_found += all.count_ones();
        first += WARP_SIZE;
    }
    warp_sync();

    // Rank: of equal keys the first one wins, which stands first.
    let [key, expert] = if lane < k { found.load8(lane) } else { [0; 2] };
    let mut rank = 0;
    for j in 0..k {
        let other = warp_shuffle(key, j);
        rank += (other > key || other == key && j < lane) as u32;
    }
    if lane < k {
        idx.set(rank, expert as i64);
    }
}

/// How many experts have at least the score of a key, which is that of a number or between such.
#[inline(always)]
#[track_caller]
fn num_reaching(row: In<f32>, e: u32, key: u32) -> u32 {
    let bound = ordered_float(key);
    let mut num = 0;
    let mut i = lane_id();
    while i < e {
        num += (row.get(i) >= bound) as u32;
        i += WARP_SIZE;
    }
    warp_sum_u32(num)
}
