//! cast_back_e5m6: e5m6 times scale factors, back to bf16 or f32.
//!
//! In    x e5m6, 12 bytes for 8 values [t, 3h/2], any row stride; sf f32 or ue8m0 of blocks (npt, npc)    Out  out bf16 or f32 [t, h]
//! Exact `out = fp32(q) * sf`, one f32 multiplication, then to bf16 by round to nearest even; bitwise the specification's.
//! Map   `wide`: 16 bytes of output a thread, items numbered through the whole tensor, so that every warp store is 512 bytes in a
//!       row; `narrow`: 8 values a step, whatever their alignment.
//! Cost  h * 3 / 2 bytes read and h * (2 or 4) written a token, and the scales; memory bound.

use crate::device::*;
use crate::kernel;
use crate::quant::cast_back::Output;
pub use crate::quant::cast_back::{Bf16, Divisor, F32, MAX_ITEMS, THREADS, launch_tokens};
use crate::quant::common::{SfLayout, load_sf};

/// Values that are packed together.
pub const CHANNELS: u32 = 8;
/// Bytes that hold them.
pub const BYTES: u32 = 12;

/// The values of item `column` of a row: all of eight in three words, or half of them in two.
#[inline(always)]
#[track_caller]
fn load<O: Output>(x: In<u8>, column: u32) -> [f32; 8] {
    if O::VALUES == CHANNELS {
        let x = x.at(column as u64 * BYTES as u64);
        return e5m6x8_to_f32([x.load4(0), x.load4(4), x.load4(8)]);
    }
    let (group, half) = (column / 2, column % 2);
    let x = x.at(group as u64 * BYTES as u64 + (half * 4) as u64);
    let (first, second) = (x.load4(0), x.load4(4));
    // The first half is six bytes from the top of the first word on, the second half six that end with the second word.
    let pair = |selector: u32| e5m6x2_to_f32(byte_permute(second, first, selector - half * 0x2220));
    let ([a, b], [c, d]) = (pair(0x7650), pair(0x4320));
    [a, b, c, d, 0.0, 0.0, 0.0, 0.0]
}

kernel! {
    op = cast_back_e5m6;
    threads = 256;
    /// Rows of `x` start at multiples of 4 bytes, `out` is contiguous and 16-byte aligned. An item is 16 bytes of output;
    /// `num_items` of them, `row_items` in a row. `x_stride` counts bytes, the strides of `sf` its elements (packed: words). The magic
    /// numbers divide by the items of a row and of a row of scaling blocks; an item's number within its row, shifted by `k_shift`,
    /// is its block column.
    pub fn wide[O: Output, const PACKED: bool](
        x: In<u8>, sf: In<u8>, out: Out<u8>, x_stride: u32, sf_row_stride: u32, sf_col_stride: u32,
        num_items: u32, row_items: u32, row_magic: u32, row_shift: u32, block_magic: u32, block_shift: u32, k_shift: u32,
    ) {
        let layout = SfLayout { row_stride: sf_row_stride, col_stride: sf_col_stride };
        let item = block_idx_x() * THREADS + thread_idx();
        if item >= num_items {
            return;
        }
        let row = Divisor { magic: row_magic, shift: row_shift }.divide(item);
        let block = Divisor { magic: block_magic, shift: block_shift }.divide(item);
        let column = item - row * row_items;
        let values = load::<O>(x.at(row as u64 * x_stride as u64), column);
        let scale = load_sf::<PACKED>(sf, layout, block, column >> k_shift);
        out.at(item as u64 * 16).store16(0, O::pack(values.map(|q| q * scale)));
    }
    entries {
        bf16_f32[Bf16, false], f32_f32[F32, false], bf16_ue8m0[Bf16, true], f32_ue8m0[F32, true],
    }
}

kernel! {
    op = cast_back_e5m6;
    threads = 256;
    /// Any alignment. An item is eight values; arguments as of `wide`.
    pub fn narrow[O: Output, const PACKED: bool](
        x: In<u8>, sf: In<u8>, out: Out<u8>, x_stride: u32, sf_row_stride: u32, sf_col_stride: u32,
        num_items: u32, row_items: u32, row_magic: u32, row_shift: u32, block_magic: u32, block_shift: u32, k_shift: u32,
    ) {
        let layout = SfLayout { row_stride: sf_row_stride, col_stride: sf_col_stride };
        let item = block_idx_x() * THREADS + thread_idx();
        if item >= num_items {
            return;
        }
        let row = Divisor { magic: row_magic, shift: row_shift }.divide(item);
        let block = Divisor { magic: block_magic, shift: block_shift }.divide(item);
        let column = item - row * row_items;
        let x = x.at(row as u64 * x_stride as u64 + column as u64 * BYTES as u64);
        let byte = |i: u32| x.get(i) as u32;
        let word = |i: u32| byte(i) | byte(i + 1) << 8 | byte(i + 2) << 16 | byte(i + 3) << 24;
        let values = e5m6x8_to_f32([word(0), word(4), word(8)]);
        let scale = load_sf::<PACKED>(sf, layout, block, column >> k_shift);
        let out = out.at(item as u64 * (CHANNELS * O::BYTES) as u64);
        crate::unroll!(i in 8 {
            O::set(out, i as u32, values[i] * scale);
        });
    }
    entries {
        bf16_f32[Bf16, false], f32_f32[F32, false], bf16_ue8m0[Bf16, true], f32_ue8m0[F32, true],
    }
}
