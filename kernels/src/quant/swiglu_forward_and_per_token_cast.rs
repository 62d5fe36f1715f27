//! swiglu_forward_and_per_token_cast: `silu(gate) * up`, times a routing weight, quantised to e4m3 with a scale factor for each `npc`
//! channels of a row, or for each row.
//!
//! In    x bf16, f32 [p, 2 h], gate left and up right    Out  data e4m3 [p, h], sf [p, ceil(h/npc)]
//! Exact bitwise the specification's (quant.md 5.10, 6.8): each step one f32 operation, `exp` is CUDA's.  NaN never is the amax.
//! Map   a block takes 4 rows of 512 channels, two warps a row, a lane 8 neighbouring channels (`cast`); or it takes a row (`rows`).
//!       Padding rows cost what it takes to see that they are.
//! Cost  4 h bytes read (bf16) and h written a row; 38 instructions a value, 17 of which are once for 8: memory bound.
//!
//! Scales of a block meet in shared memory and leave last, so that column-major ones fill sectors of 32 bytes.

use super::common::{Divisor, E4m3, Scale, scale_at_least, ue8m0};
pub use super::common_swiglu::{Bf16, Clamp, F32, Source};
use super::common_swiglu::{Counters, Rows, Weights, activate, amax};
use crate::device::*;
use crate::{kernel, unroll};

/// Channels of a block of `cast`: whole packed words of every group.
pub const TILE: u32 = 512;
/// Vectors of a lane of `cast`, which are all read before the first is used.
pub const VECTORS: usize = 1;
/// What `cast_two` has instead.
pub const TWO: usize = 2;
/// Threads of a block of `cast`.
const TILE_THREADS: u32 = 256;
/// Most groups of a row in a tile.
const MOST_GROUPS: u32 = TILE / 32;
/// Most threads of a block of `rows`. Rows of up to 8 channels for each of them are read once.
const MAX_ROW_THREADS: u32 = 512;
/// Blocks of a launch that counts: each ends with an atomic addition to the same few words.
const COUNTING_BLOCKS: u32 = 132 * 8;
/// Most blocks in y of the grid, whose limit is 65535; what is beyond goes to z.
const GRID_Y: u32 = 1 << 15;

/// Rows of a block of `cast`.
const fn tile_rows(vectors: usize) -> u32 {
    TILE_THREADS * vectors as u32 * 8 / TILE
}

/// Grid and block of `cast` with `vectors` vectors a lane. A block that counts goes on to other rows if there are more than the grid has.
pub fn tile_config(num_rows: u32, hidden: u32, vectors: usize, counting: bool) -> LaunchConfig {
    let (columns, strips) = (ceil_div(hidden, TILE), ceil_div(num_rows, tile_rows(vectors)));
    let most = if counting { (COUNTING_BLOCKS / columns.max(1)).max(1) } else { GRID_Y };
    let y = strips.min(most);
    let z = if counting || y == 0 { 1 } else { ceil_div(strips, y) };
    LaunchConfig::grid([columns, y, z], TILE_THREADS).shared(&TileShared::new(tile_rows(vectors)).0)
}

/// Grid and block of `rows`.
pub fn rows_config(num_rows: u32, hidden: u32, counting: bool) -> LaunchConfig {
    let threads = align_up(hidden.min(8 * MAX_ROW_THREADS).div_ceil(8), WARP_SIZE);
    let blocks = if counting { num_rows.min(COUNTING_BLOCKS) } else { num_rows };
    LaunchConfig::new(blocks, threads).shared(&RowsShared::new().0)
}

/// Shared memory of `cast`.
#[derive(Clone, Copy)]
struct TileShared {
    /// Column by column, as one word for each row: a scale, or four exponents.
    scales: Shared<u32>,
    /// Whether a row holds a token.
    used: Shared<u32>,
    counters: Counters,
}

impl TileShared {
    #[inline(always)]
    fn new(rows: u32) -> (SharedLayout, Self) {
        let mut layout = SharedLayout::new();
        let shared =
            Self { scales: layout.array(rows * MOST_GROUPS), used: layout.array(rows), counters: Counters::new(&mut layout) };
        (layout, shared)
    }
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
    if round { scale_at_least::<E4m3, true>(amax, amax_min) } else { scale_at_least::<E4m3, false>(amax, amax_min) }
}

/// Codes of eight values.
#[inline(always)]
fn quantise(v: [f32; 8], inv: f32) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = v.map(|v| v * inv);
    [f32x4_to_e4m3x4([a, b, c, d]), f32x4_to_e4m3x4([e, f, g, h])]
}

/// The body of `cast`.
#[inline(always)]
#[track_caller]
#[allow(clippy::too_many_arguments)]
fn cast_tiles<S: Source, const MODE: u32, const N: usize>(
    x: In<u8>,
    out: Out<u8>,
    sf: Out<u32>,
    x_stride: u64,
    num_rows: u32,
    hidden: u32,
    npc_log2: u32,
    scales: ScaleOptions,
    clamp: f32,
    rows: Rows,
    weights: Weights,
    counters: Out<u64>,
    num_counters: u32,
) {
    let num_tile_rows = tile_rows(N);
    let (_, shared) = TileShared::new(num_tile_rows);
    // Lanes are numbered row by row and have `8 N` neighbouring channels each.
    let lane_channels = 8 * N as u32;
    let row_in_tile = thread_idx() / (TILE / lane_channels);
    let in_tile = thread_idx() % (TILE / lane_channels) * lane_channels;
    let tile_channel = block_idx_x() * TILE;
    let channel = tile_channel + in_tile;
    if MODE == Clamp::COUNT {
        shared.counters.start();
    }
    let mut strip = block_idx_z() * grid_dim_y() + block_idx_y();
    while strip * num_tile_rows < num_rows {
        let row = strip * num_tile_rows + row_in_tile;
        let used = row < num_rows && rows.holds_token(row);
        if in_tile == 0 {
            shared.used.set(row_in_tile, used as u32);
        }
        if used {
            let x = x.at(row as u64 * x_stride);
            let load = |half: u32, channel: u32| {
                let at = half as u64 * hidden as u64 + channel as u64;
                if channel < hidden { S::load(x.at(at * S::BYTES as u64)) } else { S::ZERO }
            };
            let gates: [S::Raw; N] = core::array::from_fn(|i| load(0, channel + 8 * i as u32));
            let ups: [S::Raw; N] = core::array::from_fn(|i| load(1, channel + 8 * i as u32));
            let weight = weights.of(row);
            let mut v = [[0.0; 8]; N];
            let mut largest = 0.0;
            unroll!(i in N {
                let (values, clamped) = activate::<S, MODE>(gates[i], ups[i], clamp, weight);
                v[i] = values;
                largest = max_total(largest, amax(values));
                if MODE == Clamp::COUNT {
                    shared.counters.count(clamped, channel + 8 * (i as u32) < hidden);
                }
            });
            // Over the lanes of a group.
            let mut mask = 1;
            while mask < 128 / lane_channels {
                if mask < 32 / lane_channels || npc_log2 == 7 {
                    largest = max_total(largest, warp_shuffle_xor(largest, mask));
                }
                mask *= 2;
            }
            let Scale { sf, inv } = scale_of(largest, scales.amax_min, scales.round);
            if in_tile & ((1 << npc_log2) - 1) == 0 {
                let group = in_tile >> npc_log2;
                if scales.packed {
                    // Groups that do not exist count as 0.
                    let exponent = if channel < hidden { ue8m0(sf) } else { 0 };
                    shared.scales.cast::<u8>().set((group / 4 * num_tile_rows + row_in_tile) * 4 + group % 4, exponent as u8);
                } else {
                    shared.scales.set(group * num_tile_rows + row_in_tile, sf.to_bits());
                }
            }
            if channel < hidden {
                let out = out.at(row as u64 * hidden as u64 + channel as u64);
                let codes = v.map(|v| quantise(v, inv));
                if N == 2 {
                    out.store16(0, [codes[0][0], codes[0][1], codes[N - 1][0], codes[N - 1][1]]);
                } else {
                    out.store8(0, codes[0]);
                }
            }
        }
        block_sync();
        // Channels and columns of a tile that a word of scales stands for.
        let word_log2 = npc_log2 + if scales.packed { 2 } else { 0 };
        let columns_log2 = TILE.trailing_zeros() - word_log2;
        // A thread for each word at most; neighbours write neighbouring words.
        let i = thread_idx();
        if i < num_tile_rows << columns_log2 {
            let by_rows = (i >> columns_log2, i & ((1 << columns_log2) - 1));
            let (row, column) = if scales.col_stride == 1 { by_rows } else { (i % num_tile_rows, i / num_tile_rows) };
            let to = (tile_channel >> word_log2) + column;
            if shared.used.get(row) != 0 && to << word_log2 < hidden {
                let at = (strip * num_tile_rows + row) * scales.row_stride + to * scales.col_stride;
                sf.set(at, shared.scales.get(column * num_tile_rows + row));
            }
        }
        if MODE != Clamp::COUNT {
            return;
        }
        strip += grid_dim_y();
        block_sync();
    }
    if MODE == Clamp::COUNT {
        shared.counters.finish(counters, num_counters);
    }
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

/// The kernels of tiles: name, blocks that an SM must hold, vectors of a lane, entries.
macro_rules! tiles {
    ($($(#[$doc:meta])* $name:ident($blocks:literal, $vectors:ident) { $($entries:tt)* })*) => { $(kernel! {
        op = swiglu_forward_and_per_token_cast;
        threads = 256, blocks = $blocks;
        $(#[$doc])*
        ///
        /// Groups of `2^npc_log2` channels, 32 or 128, share a scale. `x_stride` counts bytes, strides of `sf` words. See
        /// [`Rows`], [`Weights`] and [`Counters`] for the rest.
        pub fn $name[S: Source, const MODE: u32](
            x: In<u8>, out: Out<u8>, sf: Out<u32>, x_stride: u64, num_rows: u32, hidden: u32, npc_log2: u32,
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
            cast_tiles::<S, MODE, $vectors>(
                x, out, sf, x_stride, num_rows, hidden, npc_log2, scales, clamp, rows, weights, counters, num_counters,
            );
        }
        entries { $($entries)* }
    })* };
}
tiles! {
    /// Tiles of rows and channels.
    cast(8, VECTORS) {
        bf16[Bf16, { Clamp::NONE }], bf16_clamp[Bf16, { Clamp::CLAMP }], f32[F32, { Clamp::NONE }], f32_clamp[F32, { Clamp::CLAMP }],
    }
    /// The same, and counts of what was clamped.
    cast_count(5, VECTORS) { bf16[Bf16, { Clamp::COUNT }], f32[F32, { Clamp::COUNT }] }
    /// Twice as many rows.
    cast_two(6, TWO) { bf16[Bf16, { Clamp::NONE }], bf16_clamp[Bf16, { Clamp::CLAMP }] }
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
                activate::<S, MODE>(load(0), load(1), clamp, weight)
            };
            // The warp's channels; the last ones stay in registers. A row longer than what the threads can hold is worked out
            // twice, the second time backwards and from L2.
            let mut first = thread_idx() / WARP_SIZE * (8 * WARP_SIZE);
            let mut largest = 0.0;
            let mut v;
            loop {
                let (values, clamped) = work(first + 8 * lane_id());
                v = values;
                largest = max_total(largest, amax(v));
                if MODE == Clamp::COUNT {
                    shared.counters.count(clamped, first + 8 * lane_id() < hidden);
                }
                if first + step >= hidden {
                    break;
                }
                first += step;
            }
            let Scale { sf: value, inv } = scale_of(block_max(largest, shared.scratch), scales.amax_min, scales.round);
            loop {
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
