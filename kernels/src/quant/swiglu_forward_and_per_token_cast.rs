//! swiglu_forward_and_per_token_cast: `silu(gate) * up`, times a routing weight, quantised to e4m3 with a scale factor for each `npc`
//! channels of a row, or for each row.
//!
//! In    x bf16, f32 [p, 2 h], gate left and up right    Out  data e4m3 [p, h], sf [p, ceil(h/npc)]
//! Exact bitwise the specification's (quant.md 5.10, 6.8): each step one f32 operation, `exp` is CUDA's.  NaN never is the amax.
//! Map   a warp takes 512 channels of a row, a lane two vectors of 8 (`cast`), of several rows one after the other where rows may be
//!       padding, which then costs little; or a block takes a row (`rows`); or, of few rows, a warp takes 128 channels (`few`).
//! Cost  4 h bytes read (bf16) and h written a row; about 27 instructions a value: memory bound.
//!
//! Two vectors a lane have scales in two groups. The first step of their maxima lets half of the lanes go on with the one and half with
//! the other, so that everything about scales is done once.

use super::common::{Divisor, E4m3, Scale, SfLayout, Target, scale_at_least, ue8m0};
pub use super::common_swiglu::{Bf16, Clamp, F32, Source};
use super::common_swiglu::{
    Clamped, Counters, Rows, Weights, activate, amax, bf16x2_is_extreme, moderate_silu, normal_quotient, silu,
};
use crate::device::*;
use crate::{kernel, unroll};
use core::hint::cold_path;

/// Channels of a warp of `cast`: whole packed words of every group.
pub const PIECE: u32 = 2 * HALF;
/// Channels of a vector of each lane.
const HALF: u32 = 8 * WARP_SIZE;
/// Most threads of a block of `cast`.
const CAST_THREADS: u32 = 256;
/// Rows that a warp of `cast` takes, if all hold tokens; if they may be padding; if values are counted, which ends with an atomic
/// addition of each block to the same few words.
pub const STEPS: [u32; 3] = [1, 4, 4];
/// Most threads of a block of `rows`. Rows of up to 8 channels for each of them are read once.
const MAX_ROW_THREADS: u32 = 512;
/// Blocks of a launch of `rows` that counts: each ends with an atomic addition to the same few words.
const COUNTING_BLOCKS: u32 = 132 * 8;
/// Grid and block of `cast` for so many warps. Few warps spread over the SMs.
pub fn cast_config(num_warps: u32) -> LaunchConfig {
    let threads = if num_warps < 4096 { CAST_THREADS / 2 } else { CAST_THREADS };
    LaunchConfig::new(ceil_div(num_warps, threads / WARP_SIZE), threads).shared(&cast_shared().0)
}

#[inline(always)]
fn cast_shared() -> (SharedLayout, Counters) {
    let mut layout = SharedLayout::new();
    let counters = Counters::new(&mut layout);
    (layout, counters)
}

/// Grid and block of `rows`.
pub fn rows_config(num_rows: u32, hidden: u32, counting: bool) -> LaunchConfig {
    let threads = align_up(hidden.min(8 * MAX_ROW_THREADS).div_ceil(8), WARP_SIZE);
    let blocks = if counting { num_rows.min(COUNTING_BLOCKS) } else { num_rows };
    LaunchConfig::new(blocks, threads).shared(&RowsShared::new().0)
}

/// Shared memory of `rows`.
#[derive(Clone, Copy)]
struct RowsShared {
    /// One value a warp.
    scratch: Shared<f32>,
    counters: Counters,
}

impl RowsShared {
    #[inline(always)]
    fn new() -> (SharedLayout, Self) {
        let mut layout = SharedLayout::new();
        let shared = Self { scratch: layout.array(WARP_SIZE), counters: Counters::new(&mut layout) };
        (layout, shared)
    }
}

/// Scale of a group, with the choice at run time.
#[inline(always)]
fn scale_of(amax: f32, amax_min: f32, round: bool) -> Scale {
    if round {
        return scale_at_least::<E4m3, true>(amax, amax_min);
    }
    let c = max_total(amax, amax_min);
    Scale { sf: normal_quotient(c, E4m3::MAX), inv: normal_quotient(E4m3::MAX, c) }
}

/// Codes of eight values.
#[inline(always)]
fn quantise(v: [f32; 8], inv: f32) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = v.map(|v| v * inv);
    [f32x4_to_e4m3x4([a, b, c, d]), f32x4_to_e4m3x4([e, f, g, h])]
}

/// How scales are made and where they go; see [`SfLayout`](super::common::SfLayout).
#[derive(Clone, Copy)]
struct ScaleOptions {
    amax_min: f32,
    round: bool,
    packed: bool,
    row_stride: u32,
    col_stride: u32,
}

/// The body of `cast`, for groups of `NPC` channels, 32 or 128. `warps_of_row` is what a warp's number is divided by.
#[inline(always)]
#[track_caller]
#[allow(clippy::too_many_arguments)]
fn cast_pieces<S: Source, const MODE: u32, const NPC: u32>(
    x: In<u8>,
    out: Out<u8>,
    sf: Out<u32>,
    x_stride: u64,
    num_rows: u32,
    hidden: u32,
    steps: u32,
    warps_of_row: Divisor,
    scales: ScaleOptions,
    clamp: f32,
    rows: Rows,
    weights: Weights,
    counters: Out<u64>,
    num_counters: u32,
) {
    let (_, shared) = cast_shared();
    if MODE == Clamp::COUNT {
        shared.start();
    }
    let warp = block_idx_x() * (block_dim() / WARP_SIZE) + warp_id();
    let strip = warps_of_row.divide(warp);
    let piece = warp - strip * ceil_div(hidden, PIECE);
    let first = strip * steps;
    let mut used = rows.holding_tokens(first, steps.min(num_rows - num_rows.min(first)));

    let lane = lane_id();
    let channel = piece * PIECE + lane * 8;
    let inside = [channel < hidden, channel + HALF < hidden];
    // Half of the lanes of a group see to the scales of the first vectors, the upper half to those of the second.
    let half_group = NPC / 16;
    let upper = lane & half_group != 0;
    let group = lane / (NPC / 8) + if upper { HALF / NPC } else { 0 };
    let group_exists = piece * PIECE + group * NPC < hidden;

    // The driver shall have compiled every entry soon; f32 is bound by memory either way.
    let small = !S::SHORT && MODE == Clamp::COUNT;
    let values = used.count_ones() * PIECE.min(hidden - piece * PIECE);
    let mut clamped = Clamped::default();
    while used != 0 {
        rolled();
        let row = first + used.trailing_zeros();
        used &= used - 1;
        let x = x.at(row as u64 * x_stride + channel as u64 * S::BYTES as u64);
        let up = x.at(hidden as u64 * S::BYTES as u64);
        let load = |x: In<u8>| -> [S::Raw; 2] {
            let one = |i: usize| if inside[i] { S::load(x.at(i as u64 * (HALF * S::BYTES) as u64)) } else { S::ZERO };
            [one(0), one(1)]
        };
        let (gates, ups) = (load(x), load(up));
        let (v, count) = activate::<S, MODE, 2>(gates, ups, clamp, weights.of(row), small, [true, inside[1]]);
        clamped.add(count);

        let (low, high) = (amax(v[0]), amax(v[1]));
        let (keep, give) = if upper { (high, low) } else { (low, high) };
        let mut largest = max_total(keep, warp_shuffle_xor(give, half_group));
        let mut mask = half_group / 2;
        while mask > 0 {
            largest = max_total(largest, warp_shuffle_xor(largest, mask));
            mask /= 2;
        }
        let Scale { sf: value, inv } = scale_of(largest, scales.amax_min, scales.round);
        let other = warp_shuffle_xor(inv, half_group);
        let inverses = if upper { [other, inv] } else { [inv, other] };

        let out = out.at(row as u64 * hidden as u64 + channel as u64);
        unroll!(i in 2 {
            if inside[i] {
                out.at((i as u32 * HALF) as u64).store8(0, quantise(v[i], inverses[i]));
            }
        });
        let sf = sf.at((row * scales.row_stride) as u64);
        if !scales.packed {
            if lane & (half_group - 1) == 0 && group_exists {
                sf.set((piece * (PIECE / NPC) + group) * scales.col_stride, value.to_bits());
            }
        } else {
            // Groups that do not exist count as 0.
            let exponent = if group_exists { ue8m0(value) << (8 * (group % 4)) } else { 0 };
            if NPC == 128 {
                let word = warp_sum_u32(if lane & (half_group - 1) == 0 { exponent } else { 0 });
                if lane == 0 {
                    sf.set(piece * scales.col_stride, word);
                }
            } else {
                // Four groups are 16 lanes, of which two in four have the same vector.
                let word = exponent | warp_shuffle_xor(exponent, 4);
                let word = word | warp_shuffle_xor(word, 8);
                let column = piece * 4 + group / 4;
                if lane & 0b01101 == 0 && column * 128 < hidden {
                    sf.set(column * scales.col_stride, word);
                }
            }
        }
    }
    if MODE == Clamp::COUNT {
        shared.count(clamped, values);
        shared.finish(counters, num_counters);
    }
}

/// The kernels of pieces: name, blocks that an SM must hold, entries.
macro_rules! pieces {
    ($($(#[$doc:meta])* $name:ident($blocks:literal) { $($entries:tt)* })*) => { $(kernel! {
        op = swiglu_forward_and_per_token_cast;
        threads = 256, blocks = $blocks;
        $(#[$doc])*
        ///
        /// Groups of `NPC` channels share a scale. A warp takes up to `steps` rows, at most 31. `x_stride` counts bytes, strides of `sf`
        /// words. See [`Rows`], [`Weights`] and [`Counters`] for the rest.
        pub fn $name[S: Source, const MODE: u32, const NPC: u32](
            x: In<u8>, out: Out<u8>, sf: Out<u32>, x_stride: u64, num_rows: u32, hidden: u32,
            steps: u32, warps_magic: u32, warps_shift: u32,
            amax_min: f32, round: u32, packed: u32, sf_row_stride: u32, sf_col_stride: u32, clamp: f32,
            rows_kind: u32, rows_map: In<i32>, num_experts: u32, alignment: u32, alignment_magic: u32, alignment_shift: u32,
            weights_kind: u32, weights: In<f32>, weights_map: In<i32>, weights_factor: f32, counters: Out<u64>, num_counters: u32,
        ) {
            let divisor = Divisor { magic: alignment_magic, shift: alignment_shift };
            let rows = Rows { kind: rows_kind, map: rows_map, num_experts, alignment, divisor };
            let weights = Weights { kind: weights_kind, weights, map: weights_map, factor: weights_factor };
            let scales = ScaleOptions {
                amax_min, round: round != 0, packed: packed != 0, row_stride: sf_row_stride, col_stride: sf_col_stride,
            };
            let warps_of_row = Divisor { magic: warps_magic, shift: warps_shift };
            cast_pieces::<S, MODE, NPC>(
                x, out, sf, x_stride, num_rows, hidden, steps, warps_of_row, scales, clamp, rows, weights, counters, num_counters,
            );
        }
        entries { $($entries)* }
    })* };
}
pieces! {
    /// Pieces of rows of bf16.
    cast(5) {
        g128[Bf16, { Clamp::NONE }, 128], g128_clamp[Bf16, { Clamp::CLAMP }, 128],
        g32[Bf16, { Clamp::NONE }, 32], g32_clamp[Bf16, { Clamp::CLAMP }, 32],
    }
    /// The same, and counts of what was clamped.
    cast_count(4) { g128[Bf16, { Clamp::COUNT }, 128], g32[Bf16, { Clamp::COUNT }, 32] }
    /// Pieces of rows of f32.
    cast_f32(3) {
        g128[F32, { Clamp::NONE }, 128], g128_clamp[F32, { Clamp::CLAMP }, 128],
        g32[F32, { Clamp::NONE }, 32], g32_clamp[F32, { Clamp::CLAMP }, 32],
    }
    /// The same, and counts of what was clamped.
    cast_f32_count(2) { g128[F32, { Clamp::COUNT }, 128], g32[F32, { Clamp::COUNT }, 32] }
}

/// Channels of a lane of `few`.
const FEW_CHANNELS: u32 = 4;
/// Threads of a block of `few`: they take a piece.
const FEW_THREADS: u32 = PIECE / FEW_CHANNELS;
/// Most pieces that `few` takes: not more than the GPU holds at once.
pub const MAX_FEW_PIECES: u32 = 132 * 8;

/// Grid and block of `few`.
pub fn few_config(num_rows: u32, hidden: u32) -> LaunchConfig {
    LaunchConfig::grid([ceil_div(hidden, PIECE), num_rows, 1], FEW_THREADS)
}

/// The largest of the magnitudes of `NPC` channels, four a lane, and of `amax_min`.
#[inline(always)]
#[track_caller]
fn largest_of_few<const NPC: u32>([a, b, c, d]: [f32; 4], amax_min: f32) -> f32 {
    let largest = max_total(max_abs(max_abs(a, b), max_abs(c, d)).abs(), amax_min);
    if NPC == 128 { warp_max_nonnegative(largest) } else { warp_max::<8>(largest) }
}

kernel! {
    op = swiglu_forward_and_per_token_cast;
    threads = 128, blocks = 8;
    /// Few rows of bf16, which all hold tokens and count as they are; a block takes a piece of a row. Fetching the code takes most of the
    /// time then, so there is little of it, and no jump on the way of moderate gates. Arguments as for `cast`.
    pub fn few[const NPC: u32, const ROUND: bool](
        x: In<u8>, out: Out<u8>, sf: Out<u8>, x_stride: u64, hidden: u32, amax_min: f32,
        packed: u32, sf_row_stride: u32, sf_col_stride: u32,
    ) {
        let row = block_idx_y();
        let channel = (block_idx_x() * FEW_THREADS + thread_idx()) * FEW_CHANNELS;
        let x = x.at(row as u64 * x_stride + channel as u64 * 2);
        let inside = channel < hidden;
        let gates = if inside { x.load8(0) } else { [0; 2] };
        let ups = if inside { x.at(hidden as u64 * 2).load8(0) } else { [0; 2] };
        let floats = |v: [u32; 2]| {
            let [a, b] = v.map(bf16x2_to_f32);
            [a[0], a[1], b[0], b[1]]
        };
        let (l, r) = (floats(gates), floats(ups));

        let finish = |v: [f32; 4]| {
            let Scale { sf: value, inv } = scale_of(largest_of_few::<NPC>(v, amax_min), amax_min, ROUND);
            if inside {
                let out = out.at(row as u64 * hidden as u64 + channel as u64);
                out.store4(0, f32x4_to_e4m3x4(v.map(|v| v * inv)));
            }
            let layout = SfLayout { row_stride: sf_row_stride, col_stride: sf_col_stride };
            let group = channel / NPC;
            if channel.is_multiple_of(NPC) {
                if packed == 0 {
                    if inside {
                        sf.cast::<f32>().set(layout.index(row, group), value);
                    }
                } else if channel / (4 * NPC) * (4 * NPC) < hidden {
                    // Groups that do not exist count as 0.
                    sf.set(layout.byte(row, group), if inside { ue8m0(value) as u8 } else { 0 });
                }
            }
        };
        // The rest a second time rather than after both: the way without a jump is the usual one.
        if warp_any(bf16x2_is_extreme(bf16x2_max_abs(gates[0], gates[1]))) {
            cold_path();
            finish(core::array::from_fn(|i| silu(l[i]) * r[i]));
        } else {
            finish(core::array::from_fn(|i| moderate_silu::<true>(l[i]) * r[i]));
        }
    }
    entries { g128[128, false], g128_round[128, true], g32[32, false], g32_round[32, true] }
}

/// The body of `rows`.
#[inline(always)]
#[track_caller]
#[allow(clippy::too_many_arguments)]
fn cast_rows<S: Source, const MODE: u32>(
    x: In<u8>,
    out: Out<u8>,
    sf: Out<u32>,
    x_stride: u64,
    num_rows: u32,
    hidden: u32,
    scales: ScaleOptions,
    clamp: f32,
    rows: Rows,
    weights: Weights,
    counters: Out<u64>,
    num_counters: u32,
) {
    let (_, shared) = RowsShared::new();
    let step = block_dim() * 8;
    if MODE == Clamp::COUNT {
        shared.counters.start();
    }
    let mut row = block_idx_x();
    while row < num_rows {
        if rows.holds_token(row) {
            let x = x.at(row as u64 * x_stride);
            let out = out.at(row as u64 * hidden as u64);
            let weight = weights.of(row);
            let work = |channel: u32| {
                let load = |half: u32| {
                    let at = half as u64 * hidden as u64 + channel as u64;
                    if channel < hidden { S::load(x.at(at * S::BYTES as u64)) } else { S::ZERO }
                };
                let ([v], clamped) = activate::<S, MODE, 1>([load(0)], [load(1)], clamp, weight, !S::SHORT, [true]);
                (v, clamped)
            };
            // The warp's channels; the last ones stay in registers. A row longer than what the threads can hold is worked out
            // twice, the second time backwards and from L2.
            let mut first = thread_idx() / WARP_SIZE * (8 * WARP_SIZE);
            let mut largest = 0.0;
            let mut v;
            loop {
                rolled();
                let (values, clamped) = work(first + 8 * lane_id());
                v = values;
                largest = max_total(largest, amax(v));
                if MODE == Clamp::COUNT {
                    shared.counters.count(clamped, (8 * WARP_SIZE).min(hidden - hidden.min(first)));
                }
                if first + step >= hidden {
                    break;
                }
                first += step;
            }
            let Scale { sf: value, inv } = scale_of(block_max(largest, shared.scratch), scales.amax_min, scales.round);
            loop {
                rolled();
                let channel = first + 8 * lane_id();
                if channel < hidden {
                    out.at(channel as u64).store8(0, quantise(v, inv));
                }
                if first < step {
                    break;
                }
                first -= step;
                v = work(first + 8 * lane_id()).0;
            }
            if thread_idx() == 0 {
                sf.set(row * scales.row_stride, if scales.packed { ue8m0(value) } else { value.to_bits() });
            }
        }
        if MODE != Clamp::COUNT {
            return;
        }
        row += grid_dim_x();
        block_sync();
    }
    if MODE == Clamp::COUNT {
        shared.counters.finish(counters, num_counters);
    }
}

/// The kernels of rows: name, blocks that an SM must hold, entries.
macro_rules! rows {
    ($($(#[$doc:meta])* $name:ident($blocks:literal) { $($entries:tt)* })*) => { $(kernel! {
        op = swiglu_forward_and_per_token_cast;
        threads = 512, blocks = $blocks;
        $(#[$doc])*
        ///
        /// One scale a row; a packed one is a word with one exponent byte. The rest as for `cast`.
        pub fn $name[S: Source, const MODE: u32](
            x: In<u8>, out: Out<u8>, sf: Out<u32>, x_stride: u64, num_rows: u32, hidden: u32,
            amax_min: f32, round: u32, packed: u32, sf_row_stride: u32, clamp: f32,
            rows_kind: u32, rows_map: In<i32>, num_experts: u32, alignment: u32, alignment_magic: u32, alignment_shift: u32,
            weights_kind: u32, weights: In<f32>, weights_map: In<i32>, weights_factor: f32, counters: Out<u64>, num_counters: u32,
        ) {
            let divisor = Divisor { magic: alignment_magic, shift: alignment_shift };
            let rows = Rows { kind: rows_kind, map: rows_map, num_experts, alignment, divisor };
            let weights = Weights { kind: weights_kind, weights, map: weights_map, factor: weights_factor };
            let scales =
                ScaleOptions { amax_min, round: round != 0, packed: packed != 0, row_stride: sf_row_stride, col_stride: 0 };
            cast_rows::<S, MODE>(
                x, out, sf, x_stride, num_rows, hidden, scales, clamp, rows, weights, counters, num_counters,
            );
        }
        entries { $($entries)* }
    })* };
}
rows! {
    /// Whole rows, one block a row.
    rows(3) {
        bf16[Bf16, { Clamp::NONE }], bf16_clamp[Bf16, { Clamp::CLAMP }], f32[F32, { Clamp::NONE }], f32_clamp[F32, { Clamp::CLAMP }],
    }
    /// The same, and counts of what was clamped.
    rows_count(2) { bf16[Bf16, { Clamp::COUNT }], f32[F32, { Clamp::COUNT }] }
}
