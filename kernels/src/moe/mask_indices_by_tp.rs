//! mask_indices_by_tp: global expert indices to those of one tensor-parallel rank; -1 for experts of other ranks.
//!
//! In    indices i64 or i32 `[len]`, below `n` or negative        Out   of the same type
//! Exact with groups of `size` experts that the ranks take in turn: expert `v` of group `r = v / size` is on rank `r % ranks`, where it has
//!       the index `r / ranks * size + v % size`. That is, experts of a rank are the first `size` of each `period = ranks * size`,
//!       counted from the first one of the rank.
//! Map   16 bytes a thread; one index a thread where an address is not a multiple of 16.
//! Cost  16 (8) bytes an index moved, one division as a multiplication; latency bound.

pub use super::common_index::Divisor;
use super::common_index::index_or_none;
use crate::device::*;
use crate::kernel;
use core::hint::cold_path;

/// Threads of a block.
pub const THREADS: u32 = 256;

/// Most indices of a launch.
pub const MAX_LEN: u64 = i32::MAX as u64 * THREADS as u64;

/// Grid and block for `len` indices, of which a thread takes `per_thread`.
pub const fn config(len: u64, per_thread: u64) -> LaunchConfig {
    LaunchConfig::new(len.div_ceil(per_thread * THREADS as u64) as u32, THREADS)
}

kernel! {
    op = mask_indices_by_tp;
    threads = 256;
    /// An index has `WORDS` 32-bit words, a thread `V` indices. The first expert of the rank is `first_expert`, or more than all experts if the
    /// rank has none. `period_magic` and so on are a [`Divisor`].
    pub fn mask[const WORDS: u32, const V: u32](
        indices: In<u32>, out: Out<u32>, len: u64, n: u32, first_expert: u32, size: u32, period: u32, period_magic: u32, period_shift: u32,
    ) {
        let by_period = Divisor { magic: period_magic, shift: period_shift };
        let local = |index: i64| {
            // Negative for experts before the first one of the rank, and for NONE.
            let from_first = index_or_none(index, n).wrapping_sub(first_expert);
            let round = by_period.divide(from_first);
            let place = from_first.wrapping_sub(round.wrapping_mul(period));
            if (from_first as i32 >= 0) & (place < size) { round.wrapping_mul(size).wrapping_add(place) as i32 } else { -1 }
        };
        let first = (block_idx_x() as u64 * THREADS as u64 + thread_idx() as u64) * V as u64;
        if first >= len {
            return;
        }
        let (indices, out) = (indices.at(first * WORDS as u64), out.at(first * WORDS as u64));
        if V * WORDS == 4 && first + V as u64 <= len {
            let words = indices.load16(0);
            let mut local_words = [0; 4];
            if WORDS == 2 {
                for i in 0..2 {
                    let index = local((words[2 * i] as u64 | (words[2 * i + 1] as u64) << 32) as i64);
                    local_words[2 * i] = index as u32;
                    // The sign.
                    local_words[2 * i + 1] = (index >> 31) as u32;
                }
            } else {
                local_words = words.map(|word| local(word as i32 as i64) as u32);
            }
            out.store16(0, local_words);
        } else {
            if V > 1 {
                // Behind the rest, so that the usual way is straight on.
                cold_path();
            }
            let here = if len - first < V as u64 { (len - first) as u32 } else { V };
            for i in 0..here {
                rolled();
                if WORDS == 2 {
                    let index = local(indices.cast::<i64>().get(i));
                    out.cast::<i64>().set(i, index as i64);
                } else {
                    let index = local(indices.cast::<i32>().get(i) as i64);
                    out.cast::<i32>().set(i, index);
                }
            }
        }
    }
    entries { i64_v2[2, 2], i64_v1[2, 1], i32_v4[1, 4], i32_v1[1, 1] }
}
