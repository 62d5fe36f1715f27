//! What the full gates share: scores, the choice of the best experts from keys in shared memory, and physical experts.

use super::common_index::NONE;
use crate::device::*;

/// Most slots of a token, shared experts included: each has a lane.
pub const MAX_SLOTS: u32 = WARP_SIZE;

/// Most experts: what a block of one warp has shared memory for.
pub const MAX_EXPERTS: u32 = 16 << 10;

/// Tokens that a launch of one-warp blocks takes at most: those are all resident at once, and start and end by themselves.
pub const FEW: u32 = 2048;

/// Grid and block for `t` tokens of a warp each, whose blocks of so many warps have this shared memory.
pub fn warp_per_token(t: u32, shared: impl Fn(u32) -> SharedLayout) -> LaunchConfig {
    let mut warps = if t > FEW { 8 } else { 1 };
    // Several blocks of several warps fit an SM.
    while warps > 1 && shared(warps).bytes() > 48 << 10 {
        warps /= 2;
    }
    LaunchConfig::new(ceil_div(t, warps), warps * WARP_SIZE).shared(&shared(warps))
}

/// Most columns of a map of physical experts.
pub const MAX_COLUMNS: u32 = 1 << 16;

/// `sqrt(log(1 + e^x))`, within 2.5 ulp and without the cancellation of a logarithm near 1: the same bits on both backends.
///
/// With `a = e^(-|x|/2)` the function is `l = a * q(1 - a * a)` for `x <= 0`, where `q` is a polynomial, and `sqrt(x + l * l)` for
/// `x > 0` (moe.md, section 15).
#[inline(always)]
pub fn sqrtsoftplus(x: f32) -> f32 {
    let a = exp_nonpositive(x.abs() * -0.5);
    let t = fma(-a, a, 1.0);
    let q = fma(0.000_471_802_57, t, -0.000_422_692_4);
    let q = fma(q, t, -8.536_428_5e-5);
    let q = fma(q, t, 0.002_192_076);
    let q = fma(q, t, 0.000_292_900_95);
    let q = fma(q, t, 0.004_986_04);
    let q = fma(q, t, 0.011_144_61);
    let q = fma(q, t, 0.032_870_79);
    let q = fma(q, t, 0.115_995_18);
    let q = fma(q, t, 0.832_554_64);
    let l = a * q;
    // Before the comparison, so that it becomes a select: four of these overlap.
    let root = sqrt_normal(fma(l, l, x));
    if x > 0.0 { root } else { l }
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
    max_u32(ordered_key(value), 1)
}

/// `V` neighbouring values, 4 of which are aligned.
#[inline(always)]
#[track_caller]
pub fn load<const V: usize>(row: In<f32>, i: u32) -> [f32; V] {
    if V == 4 {
        let words = row.load16(i);
        core::array::from_fn(|j| f32::from_bits(words[j & 3]))
    } else {
        core::array::from_fn(|j| row.get(i + j as u32))
    }
}

/// What a step of a loop over experts advances: four of each lane.
pub const STEP: u32 = 4 * WARP_SIZE;

/// `e` rounded up to whole vectors: the length of rows in shared memory.
#[inline(always)]
pub const fn padded(e: u32) -> u32 {
    (e + 3) & !3
}

/// Where this lane's `i`th element of the step from `first` on is, if lanes are neighbours.
#[inline(always)]
pub fn element(first: u32, i: usize) -> u32 {
    first + i as u32 * WARP_SIZE + lane_id()
}

/// Where the four elements of this lane in the step from `first` on begin, if they are neighbours.
#[inline(always)]
pub fn own(first: u32) -> u32 {
    first + 4 * lane_id()
}

/// Words of a warp's list of candidates: their keys, then their experts.
pub const LIST: u32 = 2 * WARP_SIZE;

/// The `k` experts with the largest keys, 1 to 32; of equal keys the first. Each lane gets an expert and the slot it takes: `k` lanes the
/// slots below `k` in some order, the others a larger number. Key 0 is that of no expert: if fewer have another one, slots stay free, or
/// their expert is `NONE`.
///
/// `keys` has `padded(e)` keys, those of the padding 0; each lane has written some of them, and `best` is the largest one of this lane. `list`
/// has [`LIST`] words, which no lane reads any more. Keys may be overwritten.
///
/// The `k`th largest of the lanes' maxima bounds the result from below; whoever reaches it (about `k + 1` experts) is gathered one per lane,
/// and a lane's slot is the number of candidates that beat its own. If they are more than lanes, because of many equal scores or a large `k`,
/// the best one is looked for `k` times.
// With iterators the loops over four keys need some instructions more, and gates are near the limit.
#[allow(clippy::needless_range_loop)]
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
    let low = max_u32(bound & !31, 1) - 1;

    // Gather in ascending order of the experts.
    list.set(lane, 0);
    warp_sync();
    let mut num = 0;
    let mut first = 0;
    while first < e {
        rolled();
        let held = if own(first) < e { keys.load16(own(first)) } else { [0; 4] };
        let taken: [u32; 4] = core::array::from_fn(|i| warp_ballot(held[i] > low));
        // Where the first one of this lane goes.
        let mut at = num;
        for all in &taken {
            at += (all & below).count_ones();
            num += all.count_ones();
        }
        for i in 0..4 {
            let takes = held[i] > low;
            if takes & (at < WARP_SIZE) {
                list.set(at, held[i]);
                list.set(WARP_SIZE + at, own(first) + i as u32);
            }
            at += takes as u32;
        }
        first += STEP;
    }
    warp_sync();
    if num <= WARP_SIZE {
        let (key, expert) = if lane < num { (list.get(lane), list.get(WARP_SIZE + lane)) } else { (0, NONE) };
        let rank = rank(list, num, key);
        return (expert, if lane < num { rank } else { NONE });
    }

    let mut chosen = NONE;
    for slot in 0..k {
        rolled();
        let (mut best, mut expert) = (0, NONE);
        let mut at = own(0);
        while at < e {
            rolled();
            let held = keys.load16(at);
            for i in 0..4 {
                if held[i] > best {
                    (best, expert) = (held[i], at + i as u32);
                }
            }
            at += STEP;
        }
        let (_, winner) = warp_arg_max(best, expert);
        // Its own key: nobody else reads it.
        if expert == winner && winner != NONE {
            keys.set(expert, 0);
        }
        if lane == slot {
            chosen = winner;
        }
    }
    (chosen, lane)
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
        // Costs nothing, and keeps the compiler from unrolling the loop.
        warp_sync();
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
    /// Ask for a share of both tables, so that they are in L2 when the experts are known. `map_lines` and `count_lines` are their sizes in
    /// lines of 128 bytes, of which the launch's threads take turns.
    #[inline(always)]
    #[track_caller]
    pub fn prefetch(self, map_lines: u32, count_lines: u32) {
        let mut line = block_idx_x() * block_dim() + thread_idx();
        while line < map_lines + count_lines {
            rolled();
            let (table, first) = if line < map_lines { (self.map, 0) } else { (self.logical_count, map_lines) };
            table.prefetch((line - first) * 32);
            line += grid_dim_x() * block_dim();
        }
    }

    /// The physical expert that `token` goes to on this rank, given the number of valid columns of its logical one. A number out of range
    /// counts as 1; the checked emulator reports it.
    #[inline(always)]
    #[track_caller]
    pub fn expert(self, logical: u32, count: i32, token: u32, ep_rank: u32) -> i32 {
        let count = count as u32;
        let count = if index_below(count.wrapping_sub(1), self.columns) { count } else { 1 };
        // In 64 bits: the peers' 32 overflow from 92 037 tokens on.
        let turn = ep_rank as u64 + token as u64 * 23_333;
        self.map.at(logical as u64 * self.columns as u64).get(remainder(turn, count))
    }
}

/// `n % divisor` for `n` below 2^48 and a divisor from 1 to 2^16, in divisions of 32 bits.
#[inline(always)]
fn remainder(n: u64, divisor: u32) -> u32 {
    // `checked_rem` leaves no branch to a panic.
    let rest = |n: u32| n.checked_rem(divisor).unwrap_or(0);
    rest(rest((n >> 16) as u32) << 16 | n as u32 & 0xFFFF)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remainders() {
        for n in [0, 1, 65_535, 65_536, u64::from(u32::MAX), 1 << 32, (1 << 47) + 12_345, (1 << 48) - 1, 92_038 * 23_333] {
            for divisor in [1, 2, 3, 33, 255, 65_535, 65_536] {
                assert_eq!(u64::from(remainder(n, divisor)), n % u64::from(divisor), "{n} % {divisor}");
            }
        }
    }

    /// Distance in units of the last place of the exact result.
    fn ulp(got: f32, exact: f64) -> f64 {
        let unit = f64::from(f32::from_bits((exact as f32).to_bits() + 1)) - f64::from(exact as f32);
        (f64::from(got) - exact).abs() / unit
    }

    #[test]
    fn scores_are_as_close_as_they_say() {
        for bits in (0..200f32.to_bits()).step_by(4001) {
            for x in [f32::from_bits(bits), -f32::from_bits(bits)] {
                let wide = f64::from(x);
                let softplus = wide.max(0.0) + (-wide.abs()).exp().ln_1p();
                assert!(ulp(sqrtsoftplus(x), softplus.sqrt()) < 2.5, "sqrtsoftplus({x:e})");
                assert!(ulp(sigmoid(x), 1.0 / (1.0 + (-wide).exp())) < 2.7, "sigmoid({x:e})");
            }
        }
    }
}
