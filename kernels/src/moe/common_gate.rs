//! What the full gates share: scores, the choice of the best experts from keys in shared memory, and physical experts.

use crate::device::*;

/// Most slots of a token, shared experts included: each has a lane.
pub const MAX_SLOTS: u32 = WARP_SIZE;

/// Most columns of a map of physical experts.
pub const MAX_COLUMNS: u32 = 1 << 16;

/// `sqrt(log(1 + e^x))`, within 2.5 ulp and without the cancellation of a logarithm near 1: the same bits on both backends.
///
/// With `a = e^(-|x|/2)` the function is `l = a * q(1 - a * a)` for `x <= 0`, where `q` is a polynomial, and `sqrt(x + l * l)` for
/// `x > 0` (moe.md, section 15).
#[inline(always)]
pub fn sqrtsoftplus(x: f32) -> f32 {
    const Q: [f32; 10] = [
        0.000_471_802_57,
        -0.000_422_692_4,
        -8.536_428_5e-5,
        0.002_192_076,
        0.000_292_900_95,
        0.004_986_04,
        0.011_144_61,
        0.032_870_79,
        0.115_995_184,
        0.832_554_64,
    ];
    let a = exp_nonpositive(x.abs() * -0.5);
    let t = fma(-a, a, 1.0);
    let q = Q.iter().skip(1).fold(Q[0], |q, c| fma(q, t, *c));
    let l = a * q;
    if x > 0.0 { sqrt_normal(fma(l, l, x)) } else { l }
}

/// `1 / (1 + e^-x)`, within 2.7 ulp: the same bits on both backends.
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    // For a negative `x` numerator and denominator are multiplied by e^x, so that nothing overflows.
    let small = exp_nonpositive(-x.abs());
    let inverse = reciprocal(1.0 + small);
    if x < 0.0 { small * inverse } else { inverse }
}

/// What an expert is ranked by: orders as the value does, NaN below -inf, and 0 is left for experts that must not be chosen.
#[inline(always)]
pub fn rank_key(value: f32) -> u32 {
    larger(ordered_key(value), 1)
}

#[inline(always)]
fn larger(a: u32, b: u32) -> u32 {
    if a > b { a } else { b }
}

/// Elements that a lane has in flight.
const HELD: usize = 4;

/// What a step of a loop over `e` elements advances: [`HELD`] for each lane.
pub const STEP: u32 = HELD as u32 * WARP_SIZE;

/// Where this lane's `i`th element of the step from `first` on is.
#[inline(always)]
pub fn element(first: u32, i: usize) -> u32 {
    first + i as u32 * WARP_SIZE + lane_id()
}

/// This lane's keys of one step; 0 beyond the end.
#[inline(always)]
#[track_caller]
fn held(keys: Shared<u32>, e: u32, first: u32) -> [u32; HELD] {
    core::array::from_fn(|i| if element(first, i) < e { keys.get(element(first, i)) } else { 0 })
}

/// Words of a warp's list of candidates: their keys, then their experts.
pub const LIST: u32 = 2 * WARP_SIZE;

/// The `k` experts with the largest keys, 1 to 32; of equal keys the first. Each lane gets an expert and the slot it takes: `k` lanes the
/// slots below `k` in some order, the others a larger number.
///
/// `keys` has `e` keys, of which each lane has written those at its number and every 32nd from there on; at least `k` are not 0. `best` is
/// the largest one of this lane. `list` has [`LIST`] words, which other lanes have read before the last `warp_sync`.
///
/// The `k`th largest of the lanes' maxima bounds the result from below; whoever reaches it (about `k + 1` experts) is gathered one per lane,
/// and a lane's slot is the number of candidates that beat its own. More candidates than lanes: another bound is found by bisection.
#[inline(always)]
#[track_caller]
pub fn select(keys: Shared<u32>, e: u32, k: u32, best: u32, list: Shared<u32>) -> (u32, u32) {
    let lane = lane_id();
    let below = (1u32 << lane) - 1;

    // The low bits make lanes differ, so each round drops exactly one; cutting them off lowers the bound a little.
    let mut key = best & !31 | lane;
    let mut bound = 0;
    for _ in 0..k {
        rolled();
        bound = warp_max_u32(key);
        if key == bound {
            key = 0;
        }
    }

    // Keys above `low` are candidates, and of those that equal it the first `ties`.
    let (mut low, mut ties) = (larger(bound & !31, 1) - 1, 0);
    loop {
        rolled();
        list.set(lane, 0);
        warp_sync();
        // Gather in ascending order of the experts.
        let mut num = 0;
        let mut first = 0;
        if ties == 0 {
            while first < e {
                rolled();
                let held = held(keys, e, first);
                let taken: [u32; HELD] = core::array::from_fn(|i| warp_ballot(held[i] > low));
                for (i, (taken, key)) in taken.iter().zip(held).enumerate() {
                    let at = num + (taken & below).count_ones();
                    if taken >> lane & 1 == 1 && at < WARP_SIZE {
                        list.set(at, key);
                        list.set(WARP_SIZE + at, element(first, i));
                    }
                    num += taken.count_ones();
                }
                first += STEP;
            }
        } else {
            while first < e {
                rolled();
                let key = if first + lane < e { keys.get(first + lane) } else { 0 };
                let tied = warp_ballot(key == low);
                let taken = key > low || key == low && (tied & below).count_ones() < ties;
                let all = warp_ballot(taken);
                if taken {
                    let at = num + (all & below).count_ones();
                    list.set(at, key);
                    list.set(WARP_SIZE + at, first + lane);
                }
                let num_tied = tied.count_ones();
                ties -= if num_tied < ties { num_tied } else { ties };
                num += all.count_ones();
                first += WARP_SIZE;
            }
        }
        warp_sync();
        if num <= WARP_SIZE {
            let (key, expert) = if lane < num { (list.get(lane), list.get(WARP_SIZE + lane)) } else { (0, 0) };
            let rank = rank(list, num, key);
            return (expert, if lane < num { rank } else { u32::MAX });
        }

        // More than `k` keys exceed `low`, and `above`, fewer than `k`, exceed `high`.
        let (mut high, mut above) = (warp_max_u32(best), 0);
        let mut fits = false;
        while high - low > 1 && !fits {
            rolled();
            let middle = low + (high - low) / 2;
            let mut mine = 0;
            let mut first = 0;
            while first < e {
                rolled();
                for key in held(keys, e, first) {
                    mine += (key > middle) as u32;
                }
                first += STEP;
            }
            let num = warp_sum_u32(mine);
            fits = num >= k && num <= WARP_SIZE;
            if num >= k {
                low = middle;
            } else {
                (high, above) = (middle, num);
            }
        }
        if !fits {
            (low, ties) = (high, k - above);
        }
    }
}

/// How many of the first `num` keys of a list, 32 at most, stand before this lane's `key`, which is the one of its number: larger ones, and
/// equal ones with a smaller number. The list has 0 up to the next multiple of 4.
#[inline(always)]
#[track_caller]
pub fn rank(list: Shared<u32>, num: u32, key: u32) -> u32 {
    let mut rank = 0;
    let mut first = 0;
    while first < num {
        rolled();
        for (i, other) in list.load16(first).iter().enumerate() {
            // Keys are at least 1.
            rank += (*other > key.wrapping_sub((first + (i as u32) < lane_id()) as u32)) as u32;
        }
        first += 4;
    }
    rank
}

/// Where the physical experts are.
#[derive(Clone, Copy)]
pub struct Physical {
    /// Physical experts of each logical one, `columns` of them in a row.
    pub map: In<i32>,
    /// How many of them are valid, 1 to `columns`.
    pub logical_count: In<i32>,
    /// Columns of the map, [`MAX_COLUMNS`] at most.
    pub columns: u32,
}

impl Physical {
    /// Ask for a share of both tables, so that they are in L2 when the experts are known. `lines` and `count_lines` are their sizes in lines
    /// of 128 bytes, of which the launch's threads take turns.
    #[inline(always)]
    #[track_caller]
    pub fn prefetch(self, lines: u32, count_lines: u32) {
        let thread = block_idx_x() * block_dim() + thread_idx();
        let mut line = thread;
        while line < lines {
            rolled();
            self.map.prefetch(line * 32);
            line += grid_dim_x() * block_dim();
        }
        let mut line = thread;
        while line < count_lines {
            rolled();
            self.logical_count.prefetch(line * 32);
            line += grid_dim_x() * block_dim();
        }
    }

    /// The physical expert that `token` goes to on this rank. A number of columns out of range counts as 1; the checked emulator reports it.
    #[inline(always)]
    #[track_caller]
    pub fn expert(self, logical: u32, token: u32, ep_rank: u32) -> i32 {
        let count = self.logical_count.get(logical) as u32;
        let count = if index_below(count.wrapping_sub(1), self.columns) { count } else { 1 };
        let turn = ep_rank as u64 + token as u64 * 23_333;
        self.map.at(logical as u64 * self.columns as u64).get(remainder(turn, count))
    }
}

/// `n % divisor` for `n` below 2^48 and a divisor of at most 2^16, in divisions of 32 bits.
#[inline(always)]
fn remainder(n: u64, divisor: u32) -> u32 {
    let (high, low) = ((n >> 32) as u32, n as u32);
    if high == 0 {
        return low % divisor;
    }
    let upper = (high % divisor << 16 | low >> 16) % divisor;
    (upper << 16 | low & 0xFFFF) % divisor
}
