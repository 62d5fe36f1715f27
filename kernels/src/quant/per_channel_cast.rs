//! per_channel_cast: quantise to e4m3 with one scale factor for each channel of `npt` tokens.
//!
//! In   x  bf16, f32 [t, h], or e4m3 [t, h] with scales of 32 or 128 channels      Out  data  e4m3 [t, h];  sf  f32, ue8m0 [ceil(t/npt), h]
//! Exact  bit for bit, quant.md 2; the last block takes the rows there are; NaN does not count for a scale.
//! Map   a block per tile of 128 rows and 128 channels (64 from e4m3 with packed scales), held in registers between maximum and
//!       conversion, eight rows a thread: 128 KB under way on a multiprocessor; see `common_channels`.
//! Cost  x read once, data and sf written once; 6 instructions a value from bf16, 10 from e4m3: memory bound. From e4m3 instructions are
//!       half of what a block's time goes to; so the code is short there, and codes are held rather than products (8 instructions, but
//!       96 registers), which lets 32 warps with 64 KB of loads live on a multiprocessor. From bf16 they count for few rows only: on an
//!       H200, some 370 a warp instead of 488 gain 0.2 to 0.4 us for 1 to 128 rows, and nothing for 8064 x 7168 (46.4 us). Nor do
//!       tiles in shared memory with five blocks on a multiprocessor (46.4) or stores without predicates in whole tiles (46.3); e4m3
//!       in shared memory in tiles of 256 channels is slower (37.2, against 35.0).

use super::common::{Divisor, SfLayout};
pub use super::common_channels::Order;
use super::common_channels::{
    Bf16, Codes, F32, Input, Place, Quantised, ROWS, SameRows, ScaleOutput, Source, Tile, load, shared, store, threads,
    tile_factors,
};
use crate::device::*;
use crate::kernel;

/// Channels of a tile, and rows of a thread.
pub type Shape = (u32, usize);
/// bf16 input.
pub const BF16_SHAPE: Shape = (128, 8);
/// bf16 input of so few rows that tiles of [`BF16_SHAPE`] would leave multiprocessors without work.
pub const BF16_FEW_SHAPE: Shape = (64, 2);
/// f32 input.
pub const F32_SHAPE: Shape = (128, 8);
/// e4m3 input with f32 scales, which is held as codes.
pub const E4M3_SHAPE: Shape = (128, 8);
/// e4m3 input with packed scales, held likewise.
pub const E4M3_PACKED_SHAPE: Shape = (64, 8);
/// Any input whose rows are not whole numbers of aligned vectors: few rows a thread, because the driver takes long to compile accesses to
/// single channels. The same for f32, whose vectors have half as many channels.
pub const NARROW_SHAPE: Shape = (64, 2);
/// See [`NARROW_SHAPE`].
pub const NARROW_F32_SHAPE: Shape = (32, 2);

/// An element type of the input, for [`config`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    /// bf16.
    Bf16,
    /// f32.
    F32,
    /// e4m3 with scales.
    E4m3,
}

/// Tiles of bf16 input in [`BF16_SHAPE`].
pub const fn bf16_tiles(num_tokens: u32, hidden: u32) -> u64 {
    ceil_div(num_tokens, ROWS) as u64 * ceil_div(hidden, BF16_SHAPE.0) as u64
}

/// One block a tile, in the given order. `None` if that would be 2^31 blocks or more in x.
pub fn config(element: Element, (cols, vectors): Shape, num_tokens: u32, hidden: u32, order: Order) -> Option<LaunchConfig> {
    fn config<S: Source>(grid: [u32; 3], cols: u32, vectors: usize) -> LaunchConfig {
        let threads = threads::<S>(cols, vectors);
        LaunchConfig::grid(grid, threads).shared(&shared::<S>(cols, threads / WARP_SIZE).0)
    }
    let grid = order.grid(num_tokens, hidden, cols)?;
    Some(match element {
        Element::Bf16 => config::<Bf16>(grid, cols, vectors),
        Element::F32 => config::<F32>(grid, cols, vectors),
        Element::E4m3 => config::<Quantised<false>>(grid, cols, vectors),
    })
}

kernel! {
    op = per_channel_cast;
    threads = 512, blocks = 2;
    /// Strides count elements, those of `x_sf` its elements (packed: words); `x_shift` is the logarithm of the channels that share one of
    /// them. `units` times 32 tokens share a scale. `width`, `magic` and `shift` are an [`Order`].
    pub fn cast[S: Source, const COLS: u32, const N: usize, const WIDE: bool](
        x: In<u8>, x_sf: In<u8>, out: Out<u8>, sf: Out<u8>, t: u32, h: u32, x_stride: u32,
        x_sf_row: u32, x_sf_col: u32, x_shift: u32, sf_stride: u32,
        units: u32, round: u32, packed: u32, width: u32, magic: u32, shift: u32,
    ) {
        let order = Order { width, divisor: Divisor { magic, shift } };
        let Some(tile) = Tile::of_block(t, h, COLS, order) else { return };
        let at = Place::new::<S>(tile, COLS, N);
        let sf_layout = SfLayout { row_stride: x_sf_row, col_stride: x_sf_col };
        let input = Input { x, stride: x_stride, sf: x_sf, sf_layout, sf_shift: x_shift };
        let held = load::<S, _, N, WIDE>(input, SameRows, tile, at);
        let to = ScaleOutput { sf, stride: sf_stride, packed: packed != 0, round: round != 0, units };
        let factors = tile_factors::<S, COLS, N>(&held, tile, at, to);
        store::<S, N, WIDE>(&held, factors, out, tile, at);
    }
    entries {
        bf16[Bf16, { BF16_SHAPE.0 }, { BF16_SHAPE.1 }, true], bf16_few[Bf16, { BF16_FEW_SHAPE.0 }, { BF16_FEW_SHAPE.1 }, true],
        f32[F32, { F32_SHAPE.0 }, { F32_SHAPE.1 }, true],
        e4m3_f32[Codes<false>, { E4M3_SHAPE.0 }, { E4M3_SHAPE.1 }, true],
        e4m3_ue8m0[Codes<true>, { E4M3_PACKED_SHAPE.0 }, { E4M3_PACKED_SHAPE.1 }, true],
        bf16_narrow[Bf16, { NARROW_SHAPE.0 }, { NARROW_SHAPE.1 }, false],
        f32_narrow[F32, { NARROW_F32_SHAPE.0 }, { NARROW_F32_SHAPE.1 }, false],
        e4m3_f32_narrow[Quantised<false>, { NARROW_SHAPE.0 }, { NARROW_SHAPE.1 }, false],
        e4m3_ue8m0_narrow[Quantised<true>, { NARROW_SHAPE.0 }, { NARROW_SHAPE.1 }, false],
    }
}
