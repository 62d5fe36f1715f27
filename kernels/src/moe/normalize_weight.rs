//! normalize_weight: each token's routing weights divided by their sum.
//!
//! In    weights f32 `[t, k]`        Out   denominator f32 `[t]`, normalized f32 `[t, k]`
//! Exact IEEE f32, correctly rounded quotients, the sum in one of two orders: from left to right on top of 1e-20, or in a tree of
//!       distances 16, 8, 4, 2, 1 and 1e-20 last. Every NaN that results is 0x7FC00000.
//! Map   rows of one or two 16-byte vectors: a thread per row. Other rows of up to 9: a thread per row, through shared memory, so that a
//!       warp reads and writes its 32 rows as one piece. Up to 32: a lane per weight. Longer ones: a thread per row, two passes.
//! Cost  8·t·k bytes; latency bound.

use crate::device::*;
use crate::{kernel, unroll};

/// Threads of a block.
pub const THREADS: u32 = 128;

/// Longest rows of `by_row`.
pub const MAX_VECTORS: u32 = 8;

/// Longest rows of `staged`.
pub const MAX_STAGED: u32 = 9;
const STAGED: usize = MAX_STAGED as usize;

/// Longest rows of `by_weight`, and longest rows that have a sum in a tree.
pub const MAX_LANES: u32 = WARP_SIZE;

/// What keeps a row of zeros from being divided by 0.
const EPSILON: f32 = 1e-20;

/// Shared memory of `staged`: the rows of each warp.
const fn tile() -> (SharedLayout, Shared<f32>) {
    let mut layout = SharedLayout::new();
    let tile = layout.array(THREADS * MAX_STAGED);
    (layout, tile)
}

/// Grid and block with a thread for each of `t` rows.
pub const fn config(t: u32) -> LaunchConfig {
    LaunchConfig::new(ceil_div(t, THREADS), THREADS)
}

/// The same with the shared memory of `staged`.
pub const fn config_staged(t: u32) -> LaunchConfig {
    config(t).shared(&tile().0)
}

/// Grid and block of `by_weight` with `lanes` lanes for each of `t` rows.
pub const fn config_by_weight(t: u32, lanes: u32) -> LaunchConfig {
    LaunchConfig::new(ceil_div(t, THREADS / lanes), THREADS)
}

kernel! {
    op = normalize_weight;
    threads = 128;
    /// Rows of up to `MAX` weights that are 16-byte aligned, `k` a multiple of 4. `MAX` = 0: any rows, from left to right.
    pub fn by_row[const TREE: bool, const MAX: usize](
        weights: In<f32>, denominator: Out<f32>, normalized: Out<f32>, t: u32, k: u32,
    ) {
        let row = block_idx_x() * THREADS + thread_idx();
        if row >= t {
            return;
        }
        let at = row as u64 * k as u64;
        let (weights, normalized) = (weights.at(at), normalized.at(at));
        if MAX == 0 {
            let (mut sum, mut i) = (EPSILON, 0);
            while i < k {
                sum += weights.get(i);
                i += 1;
            }
            i = 0;
            while i < k {
                rolled();
                normalized.set(i, number(weights.get(i) / sum));
                i += 1;
            }
            denominator.set(row, number(sum));
            return;
        }
        let vectors = MAX / 4;
        let mut w = [0.0; MAX];
        unroll!(i in vectors {
            if 4 * (i as u32) < k {
                let words = weights.load16(4 * i as u32);
                for j in 0..4 {
                    w[4 * i + j] = f32::from_bits(words[j]);
                }
            }
        });
        let sum = sum::<TREE, MAX>(w);
        unroll!(i in vectors {
            if 4 * (i as u32) < k {
                let word = |j: usize| number(w[4 * i + j] / sum).to_bits();
                normalized.store16(4 * i as u32, [word(0), word(1), word(2), word(3)]);
            }
        });
        denominator.set(row, number(sum));
    }
    entries { left_8[false, 8], tree_8[true, 8], left_any[false, 0] }
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
        let sum = sum::<TREE, STAGED>(w);
        unroll!(i in STAGED {
            if (i as u32) < k {
                tile.set(place(i), number(w[i] / sum));
            }
        });
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

kernel! {
    op = normalize_weight;
    threads = 128;
    /// Rows of up to `lanes` weights, which is 16 or 32.
    pub fn by_weight[const TREE: bool](
        weights: In<f32>, denominator: Out<f32>, normalized: Out<f32>, t: u32, k: u32, lanes: u32,
    ) {
        let (first, place) = (lane_id() & !(lanes - 1), lane_id() & (lanes - 1));
        // Of neighbouring rows in a warp, all are counted, also those beyond the last one: the warp stays together.
        let row = (block_idx_x() * THREADS + thread_idx()) >> (31 - lanes.leading_zeros());
        let inside = row < t && place < k;
        let at = row as u64 * k as u64 + place as u64;
        let w = if inside { weights.at(at).get(0) } else { 0.0 };
        let mut sum = EPSILON;
        if TREE {
            // All lanes get the sum, in which the operands of an addition may be swapped.
            let mut tree = w;
            let mut distance = lanes / 2;
            while distance > 0 {
                rolled();
                tree += warp_shuffle_xor(tree, distance);
                distance /= 2;
            }
            sum += tree;
        } else {
            for i in 0..k {
                sum += warp_shuffle(w, first + i);
            }
        }
        if inside {
            normalized.at(at).set(0, number(w / sum));
        }
        if row < t && place == 0 {
            denominator.set(row, number(sum));
        }
    }
    entries { left[false], tree[true] }
}

/// The sum in the order asked for. Zeros behind the end of the row do not change it: the only value that they could change is -0.0, and
/// 1e-20 is added to that one too.
#[inline(always)]
fn sum<const TREE: bool, const MAX: usize>(w: [f32; MAX]) -> f32 {
    if TREE {
        let mut a = w;
        unroll!(step in 4 {
            let distance = 8 >> step;
            unroll!(i in MAX {
                if i & distance == 0 && i + distance < MAX {
                    a[i] += a[i + distance];
                }
            });
        });
        EPSILON + a[0]
    } else {
        let mut sum = EPSILON;
        unroll!(i in MAX { sum += w[i] });
        sum
    }
}

/// The value, or the one NaN that both backends give.
#[inline(always)]
fn number(value: f32) -> f32 {
    if value.is_nan() { f32::NAN } else { value }
}
