//! per_block_cast_lossless: FP4 with fine power-of-two scales to e4m3 with coarser ones, without rounding.
//!
//! In   x  e2m1 [t, h/2], x_sf  f32 or ue8m0 of blocks (x_npt, x_npc)      Out  data  e4m3 [t, h], sf  f32 or ue8m0 of blocks (npt, npc)
//! Exact  integers alone; what e4m3 cannot hold is rounded to nearest even and counted in `lost`, see `nearest`.
//! Map   a lane has 16 channels of one input block. `tile`: a block of threads per tile of whole output blocks, whose lanes join their
//!       exponents in shared memory; `flat`: output blocks of one row, joined by shuffles, their scales collected and written together.
//! Cost  h / 2 bytes read and h written a token, and the scales; 3 instructions a value: memory bound.

use super::common::{SfLayout, store_sf};
use crate::device::*;
use crate::{kernel, unroll};

/// Channels of a lane: 8 bytes in, 16 bytes out.
pub const CHANNELS: u32 = 16;
/// The largest e4m3 scale exponent leaves room for 6 * 2^6 below 448: output scales are this much smaller than the largest input scale.
const HEADROOM: u32 = 6;
/// Tiles in y of the grid, whose limit is 65535; what is beyond goes to z.
const GRID_Y: u32 = 1 << 15;

/// Columns and rows of a tile, and vectors of a lane. A tile is whole output blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    /// Columns.
    pub cols: u32,
    /// Rows.
    pub rows: u32,
    /// Vectors of a lane, which all are read before the first is used.
    pub vectors: usize,
}

impl Tile {
    /// Threads of a block.
    pub const fn threads(self) -> u32 {
        self.cols * self.rows / (CHANNELS * self.vectors as u32)
    }

    /// Columns first: neighbours in x share DRAM pages.
    pub fn config(self, num_tokens: u32, hidden: u32) -> LaunchConfig {
        let down = ceil_div(num_tokens, self.rows);
        let y = if down < GRID_Y { down } else { GRID_Y };
        let z = if y == 0 { 0 } else { ceil_div(down, y) };
        LaunchConfig::grid([ceil_div(hidden, self.cols), y, z], self.threads()).shared(&shared(self).0)
    }
}

/// Output blocks of up to 128 rows.
pub const SQUARE: Tile = Tile { cols: 256, rows: 128, vectors: 4 };
/// Output blocks of up to 32 rows.
pub const BAND: Tile = Tile { cols: 256, rows: 32, vectors: 2 };
/// Output blocks of one row. Eight scales of 128 channels, or those of eight rows, fill a sector of 32 bytes.
pub const FLAT: Tile = Tile { cols: 1024, rows: 8, vectors: 2 };

/// One word for each output block of a tile: those of `flat` have a row, all others 16 at least.
#[inline(always)]
fn shared(tile: Tile) -> (SharedLayout, Shared<u32>) {
    let mut layout = SharedLayout::new();
    let blocks = layout.array(tile.rows * tile.cols / CHANNELS / if tile.rows == FLAT.rows { 1 } else { 16 });
    (layout, blocks)
}

/// The tensor, and its input blocks as powers of two.
#[derive(Clone, Copy)]
struct Shape {
    t: u32,
    h: u32,
    x_npt: u32,
    x_npc: u32,
}

/// Where the vectors of a lane are: the first row and its distance to the next, and the first channel.
#[derive(Clone, Copy)]
struct Place {
    row: u32,
    step: u32,
    col: u32,
}

impl Place {
    /// Neighbouring lanes take neighbouring vectors of a row, and a warp neighbouring rows.
    #[inline(always)]
    fn new<const COLS: u32, const ROWS: u32, const N: usize>() -> Self {
        // Of a row; where those are more than a warp, its lanes are in the same rows.
        let lanes = COLS / CHANNELS;
        let step = if lanes < WARP_SIZE { WARP_SIZE / lanes } else { 1 };
        let tile_row = (block_idx_z() * grid_dim_y() + block_idx_y()) * ROWS;
        Self {
            row: tile_row + thread_idx() / (lanes * step) * (step * N as u32) + thread_idx() / lanes % step,
            step,
            col: block_idx_x() * COLS + thread_idx() % lanes * CHANNELS,
        }
    }

    /// Row of vector `i`.
    #[inline(always)]
    fn row(self, i: usize) -> u32 {
        self.row + i as u32 * self.step
    }
}

/// What a lane has read: eight codes a word, and the scale as the f32's bits or as the exponent byte.
#[derive(Clone, Copy)]
struct Held {
    codes: [u32; 2],
    scale: u32,
}

/// All vectors of a lane. Rows and columns outside of the tensor are replaced by its last ones: those are in the same output block,
/// or in one that does not exist, so the maxima stay right and no load needs a condition.
#[inline(always)]
fn load<const PACKED: bool, const ALIGNED: bool, const N: usize>(
    x: In<u8>,
    stride: u32,
    sf: In<u8>,
    layout: SfLayout,
    at: Place,
    shape: Shape,
) -> [Held; N] {
    let last_col = shape.h - CHANNELS;
    let col = if at.col < last_col { at.col } else { last_col };
    core::array::from_fn(|i| {
        let row = if at.row(i) < shape.t { at.row(i) } else { shape.t - 1 };
        let (m, k) = (row >> shape.x_npt, col >> shape.x_npc);
        let scale = if PACKED { sf.get(layout.byte(m, k)) as u32 } else { sf.cast::<u32>().get(layout.index(m, k)) };
        let from = x.at(row as u64 * stride as u64 + (col / 2) as u64);
        let byte = |j: u32| from.get(j) as u32;
        let word = |j: u32| byte(j) | byte(j + 1) << 8 | byte(j + 2) << 16 | byte(j + 3) << 24;
        let codes = if ALIGNED { from.load8(0) } else { [word(0), word(4)] };
        Held { codes, scale }
    })
}

/// The exponent of a scale, with 127 added.
#[inline(always)]
fn exponent<const PACKED: bool>(scale: u32) -> u32 {
    if PACKED { scale } else { (scale >> 23) & 0xFF }
}

/// The largest of `value` over the lanes that hold the rest of `2^npc` channels of its row.
#[inline(always)]
#[track_caller]
fn join_columns(mut value: u32, npc: u32) -> u32 {
    for i in 0..3 {
        // A distance of 0 leaves what need not be joined.
        value = value.max(warp_shuffle_xor(value, if npc > CHANNELS.trailing_zeros() + i { 1 << i } else { 0 }));
    }
    value
}

/// Exponent of an output scale.
#[inline(always)]
fn output_exponent(largest: u32) -> u32 {
    largest.max(HEADROOM) - HEADROOM
}

/// Magnitudes of the low three bits of an e2m1.
const MAGNITUDES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

/// The e4m3 of the eight magnitudes times `2^(exponent - to)`, as the bytes of a look-up table.
#[inline(always)]
fn table<const PACKED: bool>(held: Held, to: u32, lost: impl FnOnce(u32)) -> [u32; 2] {
    let exponent = exponent::<PACKED>(held.scale);
    // From 1 to 12 for what stays normal.
    let step = exponent.wrapping_add(HEADROOM).wrapping_sub(to);
    let power_of_two = PACKED || held.scale & 0x807F_FFFF == 0;
    // Neither the scale 0 nor an infinite one in the block.
    let usual = to.wrapping_sub(1) < 254 - HEADROOM;
    if step as i32 >= 1 && power_of_two && usual {
        // One step is one exponent, of which a code has eight. Zero stays zero.
        [(8 * step).wrapping_mul(0x0101_0100) + 0x0C08_0000, (8 * step).wrapping_mul(0x0101_0101) + 0x1C18_1410]
    } else {
        nearest(held.codes, step, power_of_two && exponent < 255 && to > 0, lost)
    }
}

/// [`table`] for blocks whose scale is far below the largest, or none that can be kept. Values that e4m3 has are exact here too:
/// subnormal ones down to 2^-9, and zeros whatever their scale. `lost` is told the number of those that are not, which are rounded to
/// nearest even, and of all values other than zero unless the scale can be `kept`.
#[inline(always)]
fn nearest(codes: [u32; 2], step: u32, kept: bool, lost: impl FnOnce(u32)) -> [u32; 2] {
    // At 2^-126 everything has become zero, and the products are still exact.
    let power = (step as i32 + (127 - HEADROOM as i32)).max(1) as u32;
    let values = MAGNITUDES.map(|m| m * f32::from_bits(power << 23));
    let [a, b, c, d, e, f, g, h] = values;
    let table = [f32x4_to_e4m3x4([a, b, c, d]), f32x4_to_e4m3x4([e, f, g, h])];
    let ([a, b, c, d], [e, f, g, h]) = (e4m3x4_to_f32(table[0]), e4m3x4_to_f32(table[1]));
    let back = [a, b, c, d, e, f, g, h];
    let mut lossy = 0;
    unroll!(c in 8 {
        lossy |= ((back[c] != values[c] || (c > 0 && !kept)) as u32) << c;
    });
    let mut count = 0;
    let mut left = codes[0] as u64 | (codes[1] as u64) << 32;
    while left != 0 {
        count += (lossy >> (left & 7)) & 1;
        left >>= 4;
    }
    if count > 0 {
        lost(count);
    }
    table
}

/// Encode and write the vectors that exist; `to` gives the output exponent of each.
#[inline(always)]
#[track_caller]
fn store<const PACKED: bool, const N: usize>(
    held: &[Held; N],
    out: Out<u8>,
    lost: Out<u32>,
    count: bool,
    at: Place,
    shape: Shape,
    to: impl Fn(usize) -> u32,
) {
    if at.col >= shape.h {
        return;
    }
    unroll!(i in N {
        let row = at.row(i);
        if row < shape.t {
            let table = table::<PACKED>(held[i], to(i), |n| {
                if count {
                    lost.atomic_add(row, n, Scope::Gpu);
                }
            });
            let ([a, b], [c, d]) = (e2m1x8_map(held[i].codes[0], table), e2m1x8_map(held[i].codes[1], table));
            out.at(row as u64 * shape.h as u64 + at.col as u64).store16(0, [a, b, c, d]);
        }
    });
}

kernel! {
    op = per_block_cast_lossless;
    threads = 512;
    /// Output blocks of 16 rows at least. `x_stride` counts bytes, other strides elements; block sizes are given as powers of two.
    /// A tile is whole output blocks. `count`: `lost` is there.
    pub fn tile[const PACKED: bool, const ALIGNED: bool, const COLS: u32, const ROWS: u32, const N: usize](
        x: In<u8>, x_sf: In<u8>, out: Out<u8>, sf: Out<u8>, lost: Out<u32>, t: u32, h: u32, x_stride: u32,
        x_sf_row: u32, x_sf_col: u32, x_npt: u32, x_npc: u32, sf_row: u32, sf_col: u32, npt: u32, npc: u32, packed: u32, count: u32,
    ) {
        let tile = Tile { cols: COLS, rows: ROWS, vectors: N };
        let (at, shape) = (Place::new::<COLS, ROWS, N>(), Shape { t, h, x_npt, x_npc });
        // The last layer of a three-dimensional grid may have tiles of no rows: all threads of a block leave together.
        if at.row & !(ROWS - 1) >= t {
            return;
        }
        let x_layout = SfLayout { row_stride: x_sf_row, col_stride: x_sf_col };
        let held = load::<PACKED, ALIGNED, N>(x, x_stride, x_sf, x_layout, at, shape);
        let blocks = shared(tile).1;
        let lanes = COLS / CHANNELS;
        if thread_idx() < ROWS / 16 * lanes {
            blocks.set(thread_idx(), 0);
        }
        block_sync();
        // All rows of a warp are in the same output block.
        let mut largest = held.iter().fold(0, |e, v| e.max(exponent::<PACKED>(v.scale)));
        let mut mask = lanes;
        while mask < WARP_SIZE {
            largest = largest.max(warp_shuffle_xor(largest, mask));
            mask *= 2;
        }
        largest = join_columns(largest, npc);
        let slot = ((at.row % ROWS) >> npt) * lanes + ((at.col % COLS) >> npc);
        let first_col = at.col & ((1 << npc) - 1) == 0;
        if lane_id() < lanes && first_col {
            blocks.atomic(AtomicOp::Max, slot, largest);
        }
        block_sync();
        let to = output_exponent(blocks.get(slot));
        if first_col && at.row & ((1 << npt) - 1) == 0 && at.row < t && at.col < h {
            let layout = SfLayout { row_stride: sf_row, col_stride: sf_col };
            let last = at.col + (1 << npc) >= h;
            store_sf(sf, layout, packed != 0, f32::from_bits(to << 23), (at.row >> npt, at.col >> npc), last);
        }
        store::<PACKED, N>(&held, out, lost, count != 0, at, shape, |_| to);
    }
    entries {
        square_f32[false, true, { SQUARE.cols }, { SQUARE.rows }, { SQUARE.vectors }],
        square_ue8m0[true, true, { SQUARE.cols }, { SQUARE.rows }, { SQUARE.vectors }],
        band_f32[false, true, { BAND.cols }, { BAND.rows }, { BAND.vectors }],
        band_ue8m0[true, true, { BAND.cols }, { BAND.rows }, { BAND.vectors }],
        unaligned_f32[false, false, { SQUARE.cols }, { SQUARE.rows }, { SQUARE.vectors }],
        unaligned_ue8m0[true, false, { SQUARE.cols }, { SQUARE.rows }, { SQUARE.vectors }],
    }
}

kernel! {
    op = per_block_cast_lossless;
    threads = 256;
    /// Output blocks of one row. Arguments as of `tile`.
    pub fn flat[const PACKED: bool, const ALIGNED: bool, const COLS: u32, const ROWS: u32, const N: usize](
        x: In<u8>, x_sf: In<u8>, out: Out<u8>, sf: Out<u8>, lost: Out<u32>, t: u32, h: u32, x_stride: u32,
        x_sf_row: u32, x_sf_col: u32, x_npt: u32, x_npc: u32, sf_row: u32, sf_col: u32, npc: u32, packed: u32, count: u32,
    ) {
        let tile = Tile { cols: COLS, rows: ROWS, vectors: N };
        let (at, shape) = (Place::new::<COLS, ROWS, N>(), Shape { t, h, x_npt, x_npc });
        let (first_row, first_col) = (at.row & !(ROWS - 1), at.col & !(COLS - 1));
        if first_row >= t {
            return;
        }
        let x_layout = SfLayout { row_stride: x_sf_row, col_stride: x_sf_col };
        let held = load::<PACKED, ALIGNED, N>(x, x_stride, x_sf, x_layout, at, shape);
        let blocks = shared(tile).1;
        let to: [u32; N] = core::array::from_fn(|i| output_exponent(join_columns(exponent::<PACKED>(held[i].scale), npc)));
        // Scales of a tile meet in shared memory, column by column, as one word for each row: a scale, or four exponents.
        if at.col & ((1 << npc) - 1) == 0 {
            let group = (at.col - first_col) >> npc;
            unroll!(i in N {
                let row = at.row(i) - first_row;
                if packed != 0 {
                    // Groups beyond the end of the row count as 0.
                    let byte = if at.col < h { to[i] } else { 0 };
                    blocks.cast::<u8>().set((group / 4 * ROWS + row) * 4 + group % 4, byte as u8);
                } else {
                    blocks.set(group * ROWS + row, to[i] << 23);
                }
            });
        }
        block_sync();
        let word_log2 = npc + if packed != 0 { 2 } else { 0 };
        let columns_log2 = COLS.trailing_zeros() - word_log2;
        let mut i = thread_idx();
        while i < ROWS << columns_log2 {
            // Neighbouring threads write neighbouring words.
            let by_rows = (i >> columns_log2, i & ((1 << columns_log2) - 1));
            let (row, column) = if sf_col == 1 { by_rows } else { (i % ROWS, i / ROWS) };
            if first_row + row < t && first_col + (column << word_log2) < h {
                let to = (first_row + row) * sf_row + ((first_col >> word_log2) + column) * sf_col;
                sf.cast::<u32>().set(to, blocks.get(column * ROWS + row));
            }
            i += block_dim();
        }
        store::<PACKED, N>(&held, out, lost, count != 0, at, shape, |i| to[i]);
    }
    entries {
        f32[false, true, { FLAT.cols }, { FLAT.rows }, { FLAT.vectors }],
        ue8m0[true, true, { FLAT.cols }, { FLAT.rows }, { FLAT.vectors }],
        unaligned_f32[false, false, { FLAT.cols }, { FLAT.rows }, { FLAT.vectors }],
        unaligned_ue8m0[true, false, { FLAT.cols }, { FLAT.rows }, { FLAT.vectors }],
    }
}
