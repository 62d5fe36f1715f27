//! per_channel_cast_fused: as `per_channel_cast`, of rows that are gathered first.
//!
//! In   x  bf16, f32 [n, h], or e4m3 [n, h] with scales of 32 or 128 channels; pos_to_token  i32 \[t\]
//! Out  data  e4m3 [t, h];  sf  f32, ue8m0 [ceil(t/npt), h]
//! Exact  bit for bit, quant.md 2 and 5.5; a row whose index is negative counts as zeros.
//! Map   as `per_channel_cast`; columns of tiles in groups, so that a row that is read again is still in the cache.
//! Cost  rows of x read once or more, data and sf written once; 7 instructions a value from bf16, 11 from e4m3: memory bound.

use super::common::{Divisor, SfLayout};
use super::common_channels::{
    Bf16, F32, Input, Order, Place, Quantised, Rows, ScaleOutput, Source, Tile, load, store, tile_factors,
};
use super::per_channel_cast::Shape;
pub use super::per_channel_cast::{F32_SHAPE, NARROW_F32_SHAPE, NARROW_SHAPE};
use crate::device::*;
use crate::kernel;

/// bf16 input: more rows a thread than without gathering, so that more loads are under way behind an index.
pub const BF16_SHAPE: Shape = (128, 8);
/// e4m3 input: rows of a tile are whole cache lines, which gathered rows do not share with their neighbours in memory.
pub const E4M3_SHAPE: Shape = (128, 4);

/// Output row `r` is input row `pos_to_token[r]`.
#[derive(Clone, Copy)]
struct Gathered {
    pos_to_token: In<u8>,
    num_tokens: u32,
}

impl Rows for Gathered {
    #[inline(always)]
    #[track_caller]
    fn source(self, row: u32) -> Option<u32> {
        let token = self.pos_to_token.cast::<i32>().get(row);
        if token >= 0 && index_below(token as u32, self.num_tokens) { Some(token as u32) } else { None }
    }
}

kernel! {
    op = per_channel_cast_fused;
    threads = 512, blocks = 2;
    /// As `per_channel_cast`, whose launch is this one's too: `t` rows of output out of `num_tokens` of input.
    pub fn gather[S: Source, const COLS: u32, const N: usize, const WIDE: bool](
        x: In<u8>, x_sf: In<u8>, pos_to_token: In<u8>, out: Out<u8>, sf: Out<u8>, num_tokens: u32, t: u32, h: u32, x_stride: u32,
        x_sf_row: u32, x_sf_col: u32, x_shift: u32, sf_stride: u32,
        units: u32, round: u32, packed: u32, width: u32, magic: u32, shift: u32,
    ) {
        let order = Order { width, divisor: Divisor { magic, shift } };
        let Some(tile) = Tile::of_block(t, h, COLS, order) else { return };
        let at = Place::new::<S>(tile, COLS, N);
        let sf_layout = SfLayout { row_stride: x_sf_row, col_stride: x_sf_col };
        let input = Input { x, stride: x_stride, sf: x_sf, sf_layout, sf_shift: x_shift };
        let held = load::<S, _, N, WIDE>(input, Gathered { pos_to_token, num_tokens }, tile, at);
        let to = ScaleOutput { sf, stride: sf_stride, packed: packed != 0, round: round != 0, units };
        let factors = tile_factors::<S, COLS, N>(&held, tile, at, to);
        store::<S, N, WIDE>(&held, factors, out, tile, at);
    }
    entries {
        bf16[Bf16, { BF16_SHAPE.0 }, { BF16_SHAPE.1 }, true], f32[F32, { F32_SHAPE.0 }, { F32_SHAPE.1 }, true],
        e4m3_f32[Quantised<false>, { E4M3_SHAPE.0 }, { E4M3_SHAPE.1 }, true],
        e4m3_ue8m0[Quantised<true>, { E4M3_SHAPE.0 }, { E4M3_SHAPE.1 }, true],
        bf16_narrow[Bf16, { NARROW_SHAPE.0 }, { NARROW_SHAPE.1 }, false],
        f32_narrow[F32, { NARROW_F32_SHAPE.0 }, { NARROW_F32_SHAPE.1 }, false],
        e4m3_f32_narrow[Quantised<false>, { NARROW_SHAPE.0 }, { NARROW_SHAPE.1 }, false],
        e4m3_ue8m0_narrow[Quantised<true>, { NARROW_SHAPE.0 }, { NARROW_SHAPE.1 }, false],
    }
}
