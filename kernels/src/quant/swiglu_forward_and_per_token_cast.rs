//! swiglu_forward_and_per_token_cast: `silu(gate) * up`, times a routing weight, quantised to e4m3 with a scale factor for each `npc`
//! channels of a row, or for each row.
//!
//! In    x bf16, f32 [p, 2 h], gate left and up right    Out  data e4m3 [p, h], sf [p, ceil(h/npc)]
//! Exact bitwise the specification's (quant.md 5.10, 6.8): each step one f32 operation, `exp` is CUDA's.  NaN never is the amax.
//! Map   a block takes 8 rows of 512 channels, a warp a row of them, a lane 8 channels at a time (`cast`); or it takes a row (`rows`).
//!       Padding rows cost what it takes to see that they are.
//! Cost  4 h bytes read (bf16) and h written a row; about 23 instructions a value: memory bound.
//!
//! Scales of a block meet in shared memory and leave last, so that column-major ones fill sectors of 32 bytes.

use super::common::{Divisor, E4m3, Scale, scale_at_least, ue8m0};
pub use super::common_swiglu::{Bf16, Clamp, F32, Source};
use super::common_swiglu::{Counters, Rows, Weights, activate};
use crate::device::*;
use crate::{kernel, unroll};

/// Channels of a block of `cast`: whole packed words of every group.
pub const TILE: u32 = 512;
/// Rows of a block of `cast`.
pub const TILE_ROWS: u32 = 8;
/// Most groups of a row in a tile.
const MOST_GROUPS: u32 = TILE / 32;
/// Vectors of a lane of `rows`.
const ROW_VECTORS: usize = 2;
/// Most threads of a block of `rows`. Rows of up to [`ROW_VECTORS`] vectors for each of them are read once.
const MAX_ROW_THREADS: u32 = 512;
/// Blocks of a launch that counts: each ends with an atomic addition to the same few words.
const COUNTING_BLOCKS: u32 = 132 * 8;
/// Most blocks in y.
const GRID_Y: u32 = 1 << 15;

/// Grid and block of `cast` with `vectors` vectors a lane. A block goes on to other rows if there are more than the grid has.
pub fn tile_config(num_rows: u32, hidden: u32, vectors: u32, counting: bool) -> LaunchConfig {
    let (columns, strips) = (ceil_div(hidden, TILE), ceil_div(num_rows, TILE_ROWS));
    let most = if counting { (COUNTING_BLOCKS / columns.max(1)).max(1) } else { GRID_Y };
    LaunchConfig::grid([columns, strips.min(most), 1], TILE / 8 / vectors * TILE_ROWS).shared(&TileShared::new().0)
}

/// Grid and block of `rows`.
pub fn rows_config(num_rows: u32, hidden: u32, counting: bool) -> LaunchConfig {
    let threads = align_up(ceil_div(ceil_div(hidden, 8), ROW_VECTORS as u32), WARP_SIZE).min(MAX_ROW_THREADS);
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
    fn new() -> (SharedLayout, Self) {
        let mut layout = SharedLayout::new();
        let shared = Self {
            scales: layout.array(TILE_ROWS * MOST_GROUPS),
            used: layout.array(TILE_ROWS),
            counters: Counters::new(&mut layout),
        };
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

/// Largest magnitude; NaN does not count.
#[inline(always)]
fn amax_of(v: [f32; 8]) -> f32 {
    v.iter().fold(0.0, |max, v| max_total(max, v.abs()))
}

/// Quantise and write eight values.
#[inline(always)]
#[track_caller]
fn store(out: Out<u8>, v: [f32; 8], inv: f32) {
    let [a, b, c, d, e, f, g, h] = v.map(|v| v * inv);
    out.store8(0, [f32x4_to_e4m3x4([a, b, c, d]), f32x4_to_e4m3x4([e, f, g, h])]);
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
    clamp: Clamp,
    rows: Rows,
    weights: Weights,
    counters: Out<u64>,
    num_counters: u32,
) {
    let (_, shared) = TileShared::new();
    let tile_channel = block_idx_x() * TILE;
    // Vectors are numbered row by row, `N * 32` neighbours a warp.
    let first = warp_id() * N as u32 * WARP_SIZE;
    let row_in_tile = first / (TILE / 8);
    let in_tile: [u32; N] = core::array::from_fn(|i| (first + i as u32 * WARP_SIZE) % (TILE / 8) * 8 + lane_id() * 8);
    // Channels and columns of a tile that a word of scales stands for.
    let word_log2 = npc_log2 + if scales.packed { 2 } else { 0 };
    let columns_log2 = TILE.trailing_zeros() - word_log2;
    let mut counts = [0; 4];
    let mut strip = block_idx_y();
    while strip * TILE_ROWS < num_rows {
        let row = strip * TILE_ROWS + row_in_tile;
        let used = row < num_rows && rows.holds_token(row);
        if in_tile[0] == 0 {
            shared.used.set(row_in_tile, used as u32);
        }
        if used {
            let x = x.at(row as u64 * x_stride);
            let read = |channel: u32| if channel < hidden { S::load(x.at(channel as u64 * S::BYTES as u64)) } else { S::ZERO };
            let gates: [S::Raw; N] = core::array::from_fn(|i| read(tile_channel + in_tile[i]));
            let x = x.at(hidden as u64 * S::BYTES as u64);
            let read = |channel: u32| if channel < hidden { S::load(x.at(channel as u64 * S::BYTES as u64)) } else { S::ZERO };
            let ups: [S::Raw; N] = core::array::from_fn(|i| read(tile_channel + in_tile[i]));
            let weight = weights.of(row);
            let mut v = [[0.0; 8]; N];
            let mut amax = [0.0; N];
            unroll!(i in N {
                // What lies behind the row is not counted, and its zeros are no largest magnitude.
                let mut here = [0; 4];
                v[i] = activate::<S, MODE>(gates[i], ups[i], clamp, weight, &mut here);
                amax[i] = amax_of(v[i]);
                if MODE == Clamp::COUNT && tile_channel + in_tile[i] < hidden {
                    counts = core::array::from_fn(|j| counts[j] + here[j]);
                }
            });
            // Over the lanes of a group, which are 4 or 16.
            let mut mask = 1;
            while mask < 16 {
                if mask < 4 || npc_log2 == 7 {
                    amax = amax.map(|m| max_total(m, warp_shuffle_xor(m, mask)));
                }
                mask *= 2;
            }
            unroll!(i in N {
                let channel = tile_channel + in_tile[i];
                let Scale { sf, inv } = scale_of(amax[i], scales.amax_min, scales.round);
                if in_tile[i] & ((1 << npc_log2) - 1) == 0 {
                    let group = in_tile[i] >> npc_log2;
                    if scales.packed {
                        // Groups that do not exist count as 0.
                        let exponent = if channel < hidden { ue8m0(sf) } else { 0 };
                        shared.scales.cast::<u8>().set((group / 4 * TILE_ROWS + row_in_tile) * 4 + group % 4, exponent as u8);
                    } else {
                        shared.scales.set(group * TILE_ROWS + row_in_tile, sf.to_bits());
                    }
                }
                if channel < hidden {
                    store(out.at(row as u64 * hidden as u64 + channel as u64), v[i], inv);
                }
            });
        }
        block_sync();
        let mut i = thread_idx();
        while i < TILE_ROWS << columns_log2 {
            // Neighbouring threads write neighbouring words.
            let by_rows = (i >> columns_log2, i & ((1 << columns_log2) - 1));
            let (row, column) = if scales.col_stride == 1 { by_rows } else { (i % TILE_ROWS, i / TILE_ROWS) };
            let to = (tile_channel >> word_log2) + column;
            if shared.used.get(row) != 0 && to << word_log2 < hidden {
                let at = (strip * TILE_ROWS + row) * scales.row_stride + to * scales.col_stride;
                sf.set(at, shared.scales.get(column * TILE_ROWS + row));
            }
            i += TILE / 8 / N as u32 * TILE_ROWS;
        }
        strip += grid_dim_y();
        if strip * TILE_ROWS < num_rows {
            block_sync();
        }
    }
    if MODE == Clamp::COUNT {
        shared.counters.add(counts, counters, num_counters);
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

kernel! {
    op = swiglu_forward_and_per_token_cast;
    threads = 256, blocks = 4;
    /// Groups of `2^npc_log2` channels, 32 or 128, share a scale. `x_stride` counts bytes, strides of `sf` words. See
    /// [`Rows`], [`Weights`] and [`Clamp`] for the rest.
    pub fn cast[S: Source, const MODE: u32](
        x: In<u8>, out: Out<u8>, sf: Out<u32>, x_stride: u64, num_rows: u32, hidden: u32, npc_log2: u32,
        amax_min: f32, round: u32, packed: u32, sf_row_stride: u32, sf_col_stride: u32, clamp: f32, clamp_inexact: u32,
        rows_kind: u32, rows_map: In<i32>, num_experts: u32, alignment: u32, alignment_magic: u32, alignment_shift: u32,
        weights_kind: u32, weights: In<f32>, weights_map: In<i32>, weights_factor: f32, counters: Out<u64>, num_counters: u32,
    ) {
        let divisor = Divisor { magic: alignment_magic, shift: alignment_shift };
        let rows = Rows { kind: rows_kind, map: rows_map, num_experts, alignment, divisor };
        let weights = Weights { kind: weights_kind, weights, map: weights_map, factor: weights_factor };
        let scales = ScaleOptions {
            amax_min, round: round != 0, packed: packed != 0, row_stride: sf_row_stride, col_stride: sf_col_stride,
        };
        let clamp = Clamp { value: clamp, inexact: clamp_inexact != 0 };
        cast_tiles::<S, MODE, 2>(
            x, out, sf, x_stride, num_rows, hidden, npc_log2, scales, clamp, rows, weights, counters, num_counters,
        );
    }
    entries {
        bf16[Bf16, { Clamp::NONE }], bf16_clamp[Bf16, { Clamp::CLAMP }], bf16_count[Bf16, { Clamp::COUNT }],
        f32[F32, { Clamp::NONE }], f32_clamp[F32, { Clamp::CLAMP }], f32_count[F32, { Clamp::COUNT }],
    }
}

kernel! {
    op = swiglu_forward_and_per_token_cast;
    threads = 512, blocks = 2;
    /// `cast` with one vector a lane.
    pub fn cast_flat[S: Source, const MODE: u32](
        x: In<u8>, out: Out<u8>, sf: Out<u32>, x_stride: u64, num_rows: u32, hidden: u32, npc_log2: u32,
        amax_min: f32, round: u32, packed: u32, sf_row_stride: u32, sf_col_stride: u32, clamp: f32, clamp_inexact: u32,
        rows_kind: u32, rows_map: In<i32>, num_experts: u32, alignment: u32, alignment_magic: u32, alignment_shift: u32,
        weights_kind: u32, weights: In<f32>, weights_map: In<i32>, weights_factor: f32, counters: Out<u64>, num_counters: u32,
    ) {
        let divisor = Divisor { magic: alignment_magic, shift: alignment_shift };
        let rows = Rows { kind: rows_kind, map: rows_map, num_experts, alignment, divisor };
        let weights = Weights { kind: weights_kind, weights, map: weights_map, factor: weights_factor };
        let scales = ScaleOptions {
            amax_min, round: round != 0, packed: packed != 0, row_stride: sf_row_stride, col_stride: sf_col_stride,
        };
        let clamp = Clamp { value: clamp, inexact: clamp_inexact != 0 };
        cast_tiles::<S, MODE, 1>(
            x, out, sf, x_stride, num_rows, hidden, npc_log2, scales, clamp, rows, weights, counters, num_counters,
        );
    }
    entries { bf16[Bf16, { Clamp::NONE }], bf16_clamp[Bf16, { Clamp::CLAMP }] }
}

kernel! {
    op = swiglu_forward_and_per_token_cast;
    threads = 512, blocks = 2;
    /// One scale a row, one block a row; `sf_packed`: the scale is a word with one exponent byte. The rest as for `cast`.
    pub fn rows[S: Source, const MODE: u32](
        x: In<u8>, out: Out<u8>, sf: Out<u32>, x_stride: u64, num_rows: u32, hidden: u32,
        amax_min: f32, round: u32, packed: u32, sf_row_stride: u32, clamp: f32, clamp_inexact: u32,
        rows_kind: u32, rows_map: In<i32>, num_experts: u32, alignment: u32, alignment_magic: u32, alignment_shift: u32,
        weights_kind: u32, weights: In<f32>, weights_map: In<i32>, weights_factor: f32, counters: Out<u64>, num_counters: u32,
    ) {
        let (_, shared) = RowsShared::new();
        let divisor = Divisor { magic: alignment_magic, shift: alignment_shift };
        let rows = Rows { kind: rows_kind, map: rows_map, num_experts, alignment, divisor };
        let weights = Weights { kind: weights_kind, weights, map: weights_map, factor: weights_factor };
        let clamp = Clamp { value: clamp, inexact: clamp_inexact != 0 };
        let channel = |i: u32| (thread_idx() + i * block_dim()) * 8;
        let mut counts = [0; 4];
        let mut row = block_idx_x();
        while row < num_rows {
            if rows.holds_token(row) {
                let gate = x.at(row as u64 * x_stride);
                let up = gate.at(hidden as u64 * S::BYTES as u64);
                let out = out.at(row as u64 * hidden as u64);
                let read = |x: In<u8>, at: u32| {
                    if at < hidden { S::load(x.at(at as u64 * S::BYTES as u64)) } else { S::ZERO }
                };
                let gates: [S::Raw; ROW_VECTORS] = core::array::from_fn(|i| read(gate, channel(i as u32)));
                let ups: [S::Raw; ROW_VECTORS] = core::array::from_fn(|i| read(up, channel(i as u32)));
                let weight = weights.of(row);
                let mut v = [[0.0; 8]; ROW_VECTORS];
                let mut amax = 0.0;
                unroll!(i in ROW_VECTORS {
                    let mut here = [0; 4];
                    v[i] = activate::<S, MODE>(gates[i], ups[i], clamp, weight, &mut here);
                    amax = max_total(amax, amax_of(v[i]));
                    if MODE == Clamp::COUNT && channel(i as u32) < hidden {
                        counts = core::array::from_fn(|j| counts[j] + here[j]);
                    }
                });
                // A row that is longer than what the threads can hold is worked out twice, the second time from L2.
                let mut at = channel(ROW_VECTORS as u32);
                while at < hidden {
                    amax = max_total(amax, amax_of(activate::<S, MODE>(read(gate, at), read(up, at), clamp, weight, &mut counts)));
                    at += block_dim() * 8;
                }
                let Scale { sf: value, inv } = scale_of(block_max(amax, shared.scratch), amax_min, round != 0);
                unroll!(i in ROW_VECTORS {
                    if channel(i as u32) < hidden {
                        store(out.at(channel(i as u32) as u64), v[i], inv);
                    }
                });
                let mut at = channel(ROW_VECTORS as u32);
                while at < hidden {
                    let mut again = [0; 4];
                    store(out.at(at as u64), activate::<S, MODE>(read(gate, at), read(up, at), clamp, weight, &mut again), inv);
                    at += block_dim() * 8;
                }
                if thread_idx() == 0 {
                    sf.set(row * sf_row_stride, if packed != 0 { ue8m0(value) } else { value.to_bits() });
                }
            }
            row += grid_dim_x();
            if row < num_rows {
                block_sync();
            }
        }
        if MODE == Clamp::COUNT {
            shared.counters.add(counts, counters, num_counters);
        }
    }
    entries {
        bf16[Bf16, { Clamp::NONE }], bf16_clamp[Bf16, { Clamp::CLAMP }], bf16_count[Bf16, { Clamp::COUNT }],
        f32[F32, { Clamp::NONE }], f32_clamp[F32, { Clamp::CLAMP }], f32_count[F32, { Clamp::COUNT }],
    }
}
