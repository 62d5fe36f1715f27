//! normalize_weight: each token's routing weights divided by their sum.
//!
//! In    weights f32 `[t, k]`        Out   denominator f32 `[t]`, normalized f32 `[t, k]`
//! Exact IEEE f32, correctly rounded quotients, the sum in one of two orders: from left to right on top of 1e-20, or in a tree of
//!       distances 16, 8, 4, 2, 1 and 1e-20 last. Every NaN that results is 0x7FC00000.
//! Map   rows of several 16-byte vectors: a lane per vector. Other rows of up to 32: a thread per row, all in registers; of an odd number up
//!       to 9 through shared memory, so that a warp reads and writes its 32 rows as one piece. Longer ones: a thread per row, two passes.
//! Cost  8·t·k bytes; latency bound. A reciprocal per row and three instructions per quotient; weights and sums that are negative,
//!       huge, tiny or no numbers are divided one by one, those of a thread together.

use crate::device::*;
use crate::{kernel, unroll};
use core::hint::cold_path;

/// Threads of a block of `staged` and `by_vector`, and most of `by_row`.
pub const THREADS: u32 = 128;

/// Longest rows of `staged`.
pub const MAX_STAGED: u32 = 9;
const STAGED: usize = MAX_STAGED as usize;

/// Longest rows that are held in registers, and longest ones that have a sum in a tree.
pub const MAX_HELD: u32 = 32;

/// What keeps a row of zeros from being divided by 0.
const EPSILON: f32 = 1e-20;

/// Least weight, other than 0, and largest weight and sum that are divided in the short way: 2^-60 and 2^60. See [`divide_by`].
const LEAST: f32 = 8.673_617_4e-19;
const MOST: f32 = 1.152_921_5e18;

/// Shared memory of `staged`: the rows of each warp.
const fn tile() -> (SharedLayout, Shared<f32>) {
    let mut layout = SharedLayout::new();
    let tile = layout.array(THREADS * MAX_STAGED);
    (layout, tile)
}

/// Grid and block with a thread for each of `t` rows. Few rows are spread over all multiprocessors.
pub const fn config(t: u32) -> LaunchConfig {
    let threads = if t <= 1 << 13 { 32 } else { THREADS };
    LaunchConfig::new(ceil_div(t, threads), threads)
}

/// Grid and block of `staged`.
pub const fn config_staged(t: u32) -> LaunchConfig {
    LaunchConfig::new(ceil_div(t, THREADS), THREADS).shared(&tile().0)
}

/// Grid and block of `by_vector` with `lanes` lanes for each of `t` rows.
pub const fn config_by_vector(t: u32, lanes: u32) -> LaunchConfig {
    let threads = if t <= (1 << 13) / lanes { 32 } else { THREADS };
    LaunchConfig::new(ceil_div(t, threads / lanes), threads)
}

kernel! {
    op = normalize_weight;
    threads = 128;
    /// Rows of up to `4 * G` weights, of which `V` are an access: `k` is a multiple of it and rows are aligned to it. `G` = 0: any rows,
    /// from left to right.
    pub fn by_row[const TREE: bool, const G: usize, const V: usize](
        weights: In<f32>, denominator: Out<f32>, normalized: Out<f32>, t: u32, k: u32,
    ) {
        let row = block_idx_x() * block_dim() + thread_idx();
        if row >= t {
            return;
        }
        let at = row as u64 * k as u64;
        let (weights, normalized) = (weights.at(at), normalized.at(at));
        if G == 0 {
            let (mut sum, mut i) = (EPSILON, 0);
            while i < k {
                sum += weights.get(i);
                i += 1;
            }
            divide_each(weights, normalized, k, sum);
            denominator.set(row, number(sum));
            return;
        }
        let mut w = [[0.0; 4]; G];
        unroll!(g in G { w[g] = load::<V>(weights, 4 * g as u32, k) });
        let sum = sum::<TREE, G>(w);
        if ordinary(&w, sum) {
            denominator.set(row, sum);
            let inverse = inverse_normal(sum);
            unroll!(g in G { store::<V>(normalized, 4 * g as u32, k, w[g].map(|w| divide_by(w, sum, inverse))) });
        } else {
            cold_path();
            denominator.set(row, number(sum));
            divide_each(weights, normalized, k, sum);
        }
    }
    entries {
        left_4_by_4[false, 1, 4], left_4_by_2[false, 1, 2], left_4_by_1[false, 1, 1],
        left_8_by_2[false, 2, 2], left_12_by_1[false, 3, 1], left_32_by_2[false, 8, 2], left_32_by_1[false, 8, 1],
        tree_4_by_4[true, 1, 4], tree_4_by_2[true, 1, 2], tree_4_by_1[true, 1, 1],
        tree_8_by_2[true, 2, 2], tree_12_by_1[true, 3, 1], tree_32_by_2[true, 8, 2], tree_32_by_1[true, 8, 1],
        left_any[false, 0, 1],
    }
}

kernel! {
    op = normalize_weight;
    threads = 128;
    /// Rows of up to `L` vectors of 16 bytes, a lane each.
    pub fn by_vector[const TREE: bool, const L: usize](
        weights: In<f32>, denominator: Out<f32>, normalized: Out<f32>, t: u32, k: u32,
    ) {
        let lanes = L as u32;
        // Rows beyond the last one are zeros: the warp stays together.
        let row = block_idx_x() * (block_dim() / lanes) + thread_idx() / lanes;
        let (first, place) = (lane_id() & !(lanes - 1), lane_id() & (lanes - 1));
        let inside = row < t && 4 * place < k;
        let at = row as u64 * k as u64 + (4 * place) as u64;
        let (weights, normalized) = (weights.at(at), normalized.at(at));
        let w = if inside { weights.load16(0).map(f32::from_bits) } else { [0.0; 4] };
        let mut sum = EPSILON;
        if TREE {
            // All lanes get the sum, in which the operands of an addition may be swapped.
            let mut a = w;
            unroll!(step in 3 {
                let distance = 4 >> step;
                if distance < L {
                    a = core::array::from_fn(|j| a[j] + warp_shuffle_xor(a[j], distance as u32));
                }
            });
            sum += (a[0] + a[2]) + (a[1] + a[3]);
        } else {
            // Each lane in turn adds its weights to the sum that the one before has; the others' sums are of no use.
            unroll!(turn in L {
                sum = warp_shuffle((((sum + w[0]) + w[1]) + w[2]) + w[3], first + turn as u32);
            });
        }
        if !inside {
            return;
        }
        if place == 0 {
            denominator.set(row, number(sum));
        }
        if ordinary(&[w], sum) {
            let inverse = inverse_normal(sum);
            normalized.store16(0, w.map(|w| divide_by(w, sum, inverse).to_bits()));
        } else {
            cold_path();
            divide_each(weights, normalized, 4, sum);
        }
    }
    entries {
        left_2[false, 2], left_4[false, 4], left_8[false, 8],
        tree_2[true, 2], tree_4[true, 4], tree_8[true, 8],
    }
}

kernel! {
    op = normalize_weight;
    threads = 128;
    /// Rows of up to [`MAX_STAGED`] weights. Those of a warp are one piece of memory, and pass through shared memory.
    pub fn staged[const TREE: bool](weights: In<f32>, denominator: Out<f32>, normalized: Out<f32>, t: u32, k: u32) {
        let lane = lane_id();
        let first = block_idx_x() * THREADS + warp_id() * WARP_SIZE;
        if first >= t {
            return;
        }
        let rows = if t - first < WARP_SIZE { t - first } else { WARP_SIZE };
        let len = rows * k;
        let at = first as u64 * k as u64;
        let (weights, normalized) = (weights.at(at), normalized.at(at));
        let tile = tile().1.slice(warp_id() * WARP_SIZE * MAX_STAGED, WARP_SIZE * MAX_STAGED);

        let element = |i: usize| i as u32 * WARP_SIZE + lane;
        let mut w = [0.0; STAGED];
        unroll!(i in STAGED { w[i] = if element(i) < len { weights.get(element(i)) } else { 0.0 } });
        unroll!(i in STAGED { tile.set(element(i), w[i]) });
        warp_sync();
        // Rows beyond the last one are zeros.
        let place = |i: usize| lane * k + i as u32;
        unroll!(i in STAGED { w[i] = if (i as u32) < k { tile.get(place(i)) } else { 0.0 } });
        let groups = [[w[0], w[1], w[2], w[3]], [w[4], w[5], w[6], w[7]], [w[8], 0.0, 0.0, 0.0]];
        let sum = sum::<TREE, 3>(groups);
        if ordinary(&groups, sum) {
            let inverse = inverse_normal(sum);
            unroll!(i in STAGED {
                if (i as u32) < k {
                    tile.set(place(i), divide_by(w[i], sum, inverse));
                }
            });
        } else {
            cold_path();
            let mut i = 0;
            while i < k {
                rolled();
                tile.set(lane * k + i, number(tile.get(lane * k + i) / sum));
                i = opaque(i + 1);
            }
        }
        warp_sync();
        unroll!(i in STAGED {
            if element(i) < len {
                normalized.set(element(i), tile.get(element(i)));
            }
        });
        if lane < rows {
            denominator.set(first + lane, number(sum));
        }
    }
    entries { left_9[false], tree_9[true] }
}

/// Weights `at..at + 4` of a row of `k`, those beyond it 0, by accesses of `V`.
#[inline(always)]
#[track_caller]
fn load<const V: usize>(weights: In<f32>, at: u32, k: u32) -> [f32; 4] {
    let mut w = [0.0; 4];
    unroll!(i in 4 {
        let place = at + i as u32;
        if i.is_multiple_of(V) && place < k {
            match V {
                4 => w = weights.load16(place).map(f32::from_bits),
                2 => [w[i & 2], w[(i & 2) + 1]] = weights.load8(place).map(f32::from_bits),
                _ => w[i] = weights.get(place),
            }
        }
    });
    w
}

/// Writes what [`load`] reads.
#[inline(always)]
#[track_caller]
fn store<const V: usize>(to: Out<f32>, at: u32, k: u32, q: [f32; 4]) {
    unroll!(i in 4 {
        let place = at + i as u32;
        if i.is_multiple_of(V) && place < k {
            match V {
                4 => to.store16(place, q.map(f32::to_bits)),
                2 => to.store8(place, [q[i & 2], q[(i & 2) + 1]].map(f32::to_bits)),
                _ => to.set(place, q[i]),
            }
        }
    });
}

/// The sum in the order asked for. Zeros behind the end of the row do not change it: the only value that they could change is -0.0, and
/// 1e-20 is added to that one too.
#[inline(always)]
fn sum<const TREE: bool, const G: usize>(w: [[f32; 4]; G]) -> f32 {
    if TREE {
        let mut a = w;
        unroll!(step in 3 {
            let distance = 4 >> step;
            unroll!(g in G {
                if g & distance == 0 && g + distance < G {
                    a[g] = core::array::from_fn(|j| a[g][j] + a[g + distance][j]);
                }
            });
        });
        let [a, b, c, d] = a[0];
        EPSILON + ((a + c) + (b + d))
    } else {
        let mut sum = EPSILON;
        unroll!(g in G {
            let [a, b, c, d] = w[g];
            sum = (((sum + a) + b) + c) + d;
        });
        sum
    }
}

/// Whether all quotients of these weights can be had from [`divide_by`]. The sum may be that of more weights, of which some are negative.
// As one value: `contains` would be two branches.
#[allow(clippy::manual_range_contains)]
#[inline(always)]
fn ordinary<const G: usize>(w: &[[f32; 4]; G], sum: f32) -> bool {
    let (mut least, mut largest) = (u32::MAX, 0);
    unroll!(g in G {
        let [a, b, c, d] = w[g].map(f32::to_bits);
        // Zeros come last.
        least = min_u32(min_u32(min_u32(min_u32(least, a.wrapping_sub(1)), b.wrapping_sub(1)), c.wrapping_sub(1)), d.wrapping_sub(1));
        // Negative weights and NaN come after all others.
        largest = max_u32(max_u32(max_u32(max_u32(largest, a), b), c), d);
    });
    // Quotients other than 0 are normal: not below 2^-60 / 2^60, and not above 2^60 / 1e-20, which is less than 2^127. NaN is no such sum.
    (least >= LEAST.to_bits() - 1) & (largest <= MOST.to_bits()) & (sum >= EPSILON) & (sum <= MOST)
}

/// `k` weights divided by the sum, whatever they are.
#[inline(always)]
#[track_caller]
fn divide_each(weights: In<f32>, normalized: Out<f32>, k: u32, sum: f32) {
    let mut i = 0;
    while i < k {
        rolled();
        normalized.set(i, number(weights.get(i) / sum));
        // A number that the compiler does not know: otherwise it would repeat the body, division and all.
        i = opaque(i + 1);
    }
}

/// The value, or the one NaN that both backends give.
#[inline(always)]
fn number(value: f32) -> f32 {
    if value.is_nan() { f32::NAN } else { value }
}
