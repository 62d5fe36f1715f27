//! per_channel_cast_and_transpose: as `per_channel_cast`, with the data transposed.
//!
//! In   x  bf16, f32 [t, h]      Out  data  e4m3 [h, t];  sf  f32, ue8m0 [ceil(t/npt), h], not transposed
//! Exact  bit for bit, quant.md 2 and 5.6.
//! Map   tiles as in `per_channel_cast`; a thread has eight neighbouring rows, so that it can write eight bytes of a transposed row to
//!       shared memory, from where 16-byte pieces leave.
//! Cost  x read once, data and sf written once; 7 instructions a value: memory bound.

use super::common::{Divisor, SfLayout};
use super::common_channels::{Bf16, F32, Input, Order, Place, ROWS, SameRows, ScaleOutput, Source, Tile, load, tile_factors};
use super::common_channels::{shared as factors_shared, threads};
use crate::device::*;
use crate::{kernel, unroll};

/// Channels of a tile.
pub const COLS: u32 = 128;
/// The same for bf16 input of so few rows that tiles of [`COLS`] would leave multiprocessors without work.
pub const FEW_COLS: u32 = 64;
/// Rows of a thread.
const N: usize = 8;
/// Bytes of a piece that leaves at once.
const PIECE: u32 = 16;
/// Pieces of a transposed row in a tile.
const PIECES: u32 = ROWS / PIECE;

/// An element type of the input, for [`config`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    /// bf16.
    Bf16,
    /// f32.
    F32,
}

/// One block a tile of `cols` channels, in the given order. `None` if that would be 2^31 blocks or more in x.
pub fn config(element: Element, cols: u32, num_tokens: u32, hidden: u32, order: Order) -> Option<LaunchConfig> {
    let grid = order.grid(num_tokens, hidden, cols)?;
    Some(match element {
        Element::Bf16 => LaunchConfig::grid(grid, threads::<Bf16>(cols, N)).shared(&shared::<Bf16>(cols).0),
        Element::F32 => LaunchConfig::grid(grid, threads::<F32>(cols, N)).shared(&shared::<F32>(cols).0),
    })
}

/// Shared memory: what the scales need, and the transposed tile.
#[inline(always)]
const fn shared<S: Source>(cols: u32) -> (SharedLayout, Shared<u8>) {
    let mut layout = factors_shared::<S>(cols, threads::<S>(cols, N) / WARP_SIZE).0;
    let tile = layout.array(cols * ROWS);
    (layout, tile)
}

/// Where eight rows of a channel are in a transposed tile of `cols` channels: `octet` counts them along the row. The swizzle lets the
/// lanes of a half warp, which have the neighbouring channels of one row of the tile or more, write to all banks.
#[inline(always)]
const fn octet_at(cols: u32, channel: u32, octet: u32) -> u32 {
    channel * ROWS + (octet ^ (channel / 8 * (COLS / cols) % (ROWS / 8))) * 8
}

/// Quantise the lane's vectors and put them into the transposed tile.
#[inline(always)]
#[track_caller]
fn transpose<S: Source, const C: u32>(held: &[S::Held; N], factors: [f32; 8], tile: Tile, at: Place) {
    let (_, shared) = shared::<S>(C);
    let octet = at.row % ROWS / 8;
    let channel = at.col - tile.col;
    let values: [[f32; 8]; N] = core::array::from_fn(|i| S::values(held[i]));
    unroll!(j in 8 {
        if (j as u32) < S::CHANNELS {
            let v: [f32; 8] = core::array::from_fn(|i| values[i][j] * factors[j]);
            let low = f32x4_to_e4m3x4([v[0], v[1], v[2], v[3]]);
            let high = f32x4_to_e4m3x4([v[4], v[5], v[6], v[7]]);
            shared.store8(octet_at(C, channel, octet) + j as u32 * ROWS, [low, high]);
        }
    });
}

/// Store the pieces of the tile whose channels and rows exist. Rows are whole numbers of aligned pieces.
#[inline(always)]
#[track_caller]
fn store_pieces<S: Source, const C: u32, const STEPS: usize>(out: Out<u8>, tile: Tile) {
    let (_, shared) = shared::<S>(C);
    let piece = thread_idx() % PIECES;
    let first = thread_idx() / PIECES;
    // Channels that the block stores at a time.
    let step = C / STEPS as u32;
    let row = tile.index * ROWS + piece * PIECE;
    let pieces: [[u32; 4]; STEPS] = core::array::from_fn(|i| {
        let channel = first + i as u32 * step;
        // Both octets of a piece are in the same 16 bytes, in this order or the other.
        let at = octet_at(C, channel, 2 * piece);
        let [a, b, c, d] = shared.load16(at & !15);
        if at & 8 == 0 { [a, b, c, d] } else { [c, d, a, b] }
    });
    if row >= tile.t {
        return;
    }
    unroll!(i in STEPS {
        let channel = tile.col + first + i as u32 * step;
        if channel < tile.h {
            out.at(channel as u64 * tile.t as u64 + row as u64).store16(0, pieces[i]);
        }
    });
}

/// The same for rows of any length and alignment, byte by byte. A short tile's rows are shared by as many threads as a whole one's.
#[inline(always)]
#[track_caller]
fn store_bytes<S: Source, const C: u32>(out: Out<u8>, tile: Tile) {
    let (_, shared) = shared::<S>(C);
    let first = tile.index * ROWS;
    let rows = (tile.t - first).min(ROWS);
    // Threads of a channel, a power of two so that nothing is divided.
    let lanes_log2 = WARP_SIZE - (rows - 1).leading_zeros();
    let row = thread_idx() & ((1 << lanes_log2) - 1);
    let mut channel = thread_idx() >> lanes_log2;
    while channel < C && tile.col + channel < tile.h && row < rows {
        rolled();
        let byte = shared.get(octet_at(C, channel, row / 8) + row % 8);
        let to = out.at((tile.col + channel) as u64 * tile.t as u64);
        to.set(first + row, byte);
        channel += block_dim() >> lanes_log2;
    }
}

kernel! {
    op = per_channel_cast_and_transpose;
    threads = 512, blocks = 2;
    /// As `per_channel_cast` for plain input and transposed data, in tiles of `C` channels. `STEPS`: vectors of 16 bytes of output a thread.
    pub fn cast[S: Source, const C: u32, const STEPS: usize, const WIDE: bool](
        x: In<u8>, out: Out<u8>, sf: Out<u8>, t: u32, h: u32, x_stride: u32, sf_stride: u32,
        units: u32, round: u32, packed: u32, width: u32, magic: u32, shift: u32,
    ) {
        let order = Order { width, divisor: Divisor { magic, shift } };
        let Some(tile) = Tile::of_block(t, h, C, order) else { return };
        let at = Place::new::<S>(tile, C, N);
        let input = Input { x, stride: x_stride, sf: x, sf_layout: SfLayout { row_stride: 0, col_stride: 0 }, sf_shift: 0 };
        let held = load::<S, _, N, WIDE>(input, SameRows, tile, at);
        let to = ScaleOutput { sf, stride: sf_stride, packed: packed != 0, round: round != 0, units };
        let factors = tile_factors::<S, C, N>(&held, tile, at, to);
        transpose::<S, C>(&held, factors, tile, at);
        block_sync();
        if WIDE {
            store_pieces::<S, C, STEPS>(out, tile);
        } else {
            store_bytes::<S, C>(out, tile);
        }
    }
    entries {
        bf16[Bf16, COLS, 4, true], bf16_few[Bf16, FEW_COLS, 4, true], f32[F32, COLS, 2, true],
        bf16_narrow[Bf16, COLS, 4, false], f32_narrow[F32, COLS, 2, false],
    }
}
