//! cast_back: quantised data times scale factors, back to bf16 or f32.
//!
//! In    x e4m3 [t, h] or e2m1 [t, h/2], any row stride; sf f32, ue8m0, e4m3 of blocks (npt, npc)    Out  out bf16 or f32 [t, h]
//! Exact `out = fp32(q) * sf`, one f32 multiplication, then to bf16 by round to nearest even; bitwise the specification's.
//! Map   `wide`: 16 bytes of output a thread, items numbered through the whole tensor, so that every warp store is 512 bytes in a
//!       row; `per_channel` (npc = 1): a thread keeps the scales of its channels and goes down rows; `narrow`: one byte of x a
//!       step, whatever its alignment.
//! Cost  h * (1 or 1/2) bytes read and h * (2 or 4) written a token, and the scales; memory bound.

use crate::device::*;
pub use crate::quant::common::Divisor;
use crate::quant::common::{E2m1, E4m3, SfLayout, Target, load_sf};
use crate::{kernel, unroll};

/// Threads of a block of `wide` and `narrow`. Small blocks with little work a thread come and go evenly, which keeps reads and
/// writes mixed and the last blocks short.
pub const THREADS: u32 = 256;
/// Threads of a block of `per_channel`. 7168 channels are a whole number of such blocks for both outputs.
pub const PER_CHANNEL_THREADS: u32 = 128;
/// Items of a thread in `narrow`.
pub const NARROW_ITEMS: u32 = 4;
/// Items of one launch must stay below this, see [`Divisor`].
pub const MAX_ITEMS: u64 = 1 << 31;
/// Rows of a thread in `per_channel`.
pub const CHANNEL_ROWS: u32 = 4;

/// Tokens of the launch that starts with token `first`, at most `limit` of them: whole scaling blocks of `npt` tokens, or a part
/// of one, so that block rows count from 0 in every launch.
pub const fn launch_tokens(first: u32, num_tokens: u32, npt: u32, limit: u32) -> u32 {
    let rest = match first.checked_rem(npt) {
        Some(begun) => npt - begun,
        None => 0,
    };
    let blocks = match limit.checked_div(npt) {
        Some(blocks) if blocks > 0 && rest == npt => blocks * npt,
        _ if limit < rest => limit,
        _ => rest,
    };
    if blocks < num_tokens - first { blocks } else { num_tokens - first }
}

/// An element type of the output.
pub trait Output {
    /// Bytes of a value.
    const BYTES: u32;
    /// Values in 16 bytes.
    const VALUES: u32 = 16 / Self::BYTES;

    /// The first [`VALUES`](Self::VALUES) products as 16 bytes.
    fn pack(values: [f32; 8]) -> [u32; 4];

    /// Write one value as element `i`.
    fn set(out: Out<u8>, i: u32, value: f32);
}

/// Output in bf16.
pub struct Bf16;
/// Output in f32.
pub struct F32;

impl Output for Bf16 {
    const BYTES: u32 = 2;

    #[inline(always)]
    fn pack(v: [f32; 8]) -> [u32; 4] {
        core::array::from_fn(|i| f32x2_to_bf16x2(v[2 * i], v[2 * i + 1]))
    }

    #[inline(always)]
    #[track_caller]
    fn set(out: Out<u8>, i: u32, value: f32) {
        out.cast::<u16>().set(i, f32x2_to_bf16x2(value, 0.0) as u16);
    }
}

impl Output for F32 {
    const BYTES: u32 = 4;

    #[inline(always)]
    fn pack(v: [f32; 8]) -> [u32; 4] {
        core::array::from_fn(|i| v[i].to_bits())
    }

    #[inline(always)]
    #[track_caller]
    fn set(out: Out<u8>, i: u32, value: f32) {
        out.cast::<f32>().set(i, value);
    }
}

/// A format of the input.
pub trait Source: Target {
    /// The quantised values of 16 bytes of output `O`: 2, 4 or 8 bytes, in the low end of 8.
    fn load<O: Output>(x: In<u8>) -> [u32; 2];

    /// Those values; only the first `O::VALUES` mean something.
    fn decode(raw: [u32; 2]) -> [f32; 8];
}

impl Source for E4m3 {
    #[inline(always)]
    #[track_caller]
    fn load<O: Output>(x: In<u8>) -> [u32; 2] {
        if O::VALUES == 8 { x.load8(0) } else { [x.load4(0), 0] }
    }

    #[inline(always)]
    fn decode(raw: [u32; 2]) -> [f32; 8] {
        let (a, b) = (e4m3x4_to_f32(raw[0]), e4m3x4_to_f32(raw[1]));
        [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]]
    }
}

impl Source for E2m1 {
    #[inline(always)]
    #[track_caller]
    fn load<O: Output>(x: In<u8>) -> [u32; 2] {
        [if O::VALUES == 8 { x.load4(0) } else { x.cast::<u16>().get(0) as u32 }, 0]
    }

    #[inline(always)]
    fn decode(raw: [u32; 2]) -> [f32; 8] {
        e2m1x8_to_f32(raw[0])
    }
}

/// How scales are stored; strides of the layout count elements (packed: words).
pub trait Scales {
    /// The scale of block row `m` and block column `k`.
    fn load(sf: In<u8>, layout: SfLayout, m: u32, k: u32) -> f32;
}

/// One f32 a scale.
pub struct SfF32;
/// Exponent bytes of four block columns in a word.
pub struct SfUe8m0;
/// One e4m3 a scale.
pub struct SfE4m3;
/// Exponent bytes of four block rows in a word.
pub struct SfPerChannel;

impl Scales for SfF32 {
    #[inline(always)]
    #[track_caller]
    fn load(sf: In<u8>, layout: SfLayout, m: u32, k: u32) -> f32 {
        load_sf::<false>(sf, layout, m, k)
    }
}

impl Scales for SfUe8m0 {
    #[inline(always)]
    #[track_caller]
    fn load(sf: In<u8>, layout: SfLayout, m: u32, k: u32) -> f32 {
        load_sf::<true>(sf, layout, m, k)
    }
}

impl Scales for SfE4m3 {
    #[inline(always)]
    #[track_caller]
    fn load(sf: In<u8>, layout: SfLayout, m: u32, k: u32) -> f32 {
        e4m3x2_to_f32(sf.get(layout.index(m, k)) as u32)[0]
    }
}

impl Scales for SfPerChannel {
    #[inline(always)]
    #[track_caller]
    fn load(sf: In<u8>, layout: SfLayout, m: u32, k: u32) -> f32 {
        f32::from_bits((sf.get(layout.index(m / 4, k) * 4 + m % 4) as u32) << 23)
    }
}

/// The 16 bytes of output of one item.
#[inline(always)]
fn product<F: Source, O: Output>(raw: [u32; 2], scale: f32) -> [u32; 4] {
    O::pack(F::decode(raw).map(|q| q * scale))
}

kernel! {
    op = cast_back;
    threads = 256;
    /// Rows of `x` start at a multiple of what an item reads, `out` is contiguous and 16-byte aligned. An item is 16 bytes of
    /// output; `num_items` of them, `row_items` in a row. `x_stride` counts bytes, the strides of `sf` its elements (packed:
    /// words). The magic numbers divide by the items of a row and of a row of scaling blocks; an item's number within its row,
    /// shifted by `k_shift`, is its block column.
    pub fn wide[F: Source, O: Output, S: Scales](
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
        let raw = F::load::<O>(x.at(row as u64 * x_stride as u64 + (column * (O::VALUES * F::BITS / 8)) as u64));
        let scale = S::load(sf, layout, block, column >> k_shift);
        out.at(item as u64 * 16).store16(0, product::<F, O>(raw, scale));
    }
    entries {
        e4m3_bf16_f32[E4m3, Bf16, SfF32], e4m3_f32_f32[E4m3, F32, SfF32],
        e2m1_bf16_f32[E2m1, Bf16, SfF32], e2m1_f32_f32[E2m1, F32, SfF32],
        e4m3_bf16_ue8m0[E4m3, Bf16, SfUe8m0], e4m3_f32_ue8m0[E4m3, F32, SfUe8m0],
        e2m1_bf16_ue8m0[E2m1, Bf16, SfUe8m0], e2m1_f32_ue8m0[E2m1, F32, SfUe8m0],
        e4m3_bf16_e4m3[E4m3, Bf16, SfE4m3], e4m3_f32_e4m3[E4m3, F32, SfE4m3],
        e2m1_bf16_e4m3[E2m1, Bf16, SfE4m3], e2m1_f32_e4m3[E2m1, F32, SfE4m3],
    }
}

/// Values of a piece of `staged`: 16 bytes of e4m3.
pub const PIECE: u32 = 16;
/// Least values for `staged`. It takes two latencies more than `wide`, which is faster for few rows.
pub const STAGED_LEAST: u64 = 1 << 20;

/// Grid and block of `staged`: a thread a piece.
pub fn staged_config(pieces: u32) -> LaunchConfig {
    LaunchConfig::new(pieces.div_ceil(THREADS), THREADS).shared(&staged_shared().0)
}

/// Shared memory of `staged`: a piece a thread.
#[inline(always)]
const fn staged_shared() -> (SharedLayout, Shared<u8>) {
    let mut layout = SharedLayout::new();
    let pieces = layout.array(THREADS * PIECE);
    (layout, pieces)
}

kernel! {
    op = cast_back;
    threads = 256, blocks = 8;
    /// e4m3 to bf16, where rows are whole numbers of aligned pieces of 16 bytes. A thread reads one, and its scale; those of a warp pass
    /// through shared memory, so that a warp writes 512 bytes in a row, twice. An item is a piece; arguments as of `wide`.
    pub fn staged[S: Scales](
        x: In<u8>, sf: In<u8>, out: Out<u8>, x_stride: u32, sf_row_stride: u32, sf_col_stride: u32,
        num_items: u32, row_items: u32, row_magic: u32, row_shift: u32, block_magic: u32, block_shift: u32, k_shift: u32,
    ) {
        let layout = SfLayout { row_stride: sf_row_stride, col_stride: sf_col_stride };
        let first = block_idx_x() * THREADS + warp_id() * WARP_SIZE;
        if first >= num_items {
            return;
        }
        // Beyond the end the last piece is read again: the warp stays together, and there is no branch around the loads.
        let item = (first + lane_id()).min(num_items - 1);
        let row = Divisor { magic: row_magic, shift: row_shift }.divide(item);
        let block = Divisor { magic: block_magic, shift: block_shift }.divide(item);
        let column = item - row * row_items;
        let raw = x.at(row as u64 * x_stride as u64 + (column * PIECE) as u64).load16(0);
        let scale = S::load(sf, layout, block, column >> k_shift);

        let pieces = staged_shared().1.slice(warp_id() * (WARP_SIZE * PIECE), WARP_SIZE * PIECE);
        pieces.store16(lane_id() * PIECE, raw);
        warp_sync();
        // A piece is two vectors of the output.
        let out = out.at(first as u64 * (2 * PIECE) as u64);
        unroll!(half in 2 {
            let vector = half as u32 * WARP_SIZE + lane_id();
            let scale = warp_shuffle(scale, vector / 2);
            let product = product::<E4m3, Bf16>(pieces.load8(vector * 8), scale);
            if vector < 2 * (num_items - first) {
                out.at((vector * 16) as u64).store16(0, product);
            }
        });
    }
    entries { f32[SfF32], ue8m0[SfUe8m0], e4m3[SfE4m3] }
}

kernel! {
    op = cast_back;
    threads = 128;
    /// Blocks of one channel (npc = 1) with row-major f32 scales, or `PACKED` ones; aligned as for `wide`, and `sf` for 16-byte loads.
    /// A thread has one item of a row and goes down `CHANNEL_ROWS` rows of one scaling block. `tiles` is the number of such row
    /// groups in a scaling block, `columns` of grid blocks across a row.
    pub fn per_channel[F: Source, O: Output, const PACKED: bool](
        x: In<u8>, sf: In<u8>, out: Out<u8>, x_stride: u32, sf_stride: u32, num_tokens: u32, row_items: u32, npt: u32,
        columns: u32, columns_magic: u32, columns_shift: u32, tiles: u32, tiles_magic: u32, tiles_shift: u32,
    ) {
        let down = Divisor { magic: columns_magic, shift: columns_shift }.divide(block_idx_x());
        let item = (block_idx_x() - down * columns) * PER_CHANNEL_THREADS + thread_idx();
        let block = Divisor { magic: tiles_magic, shift: tiles_shift }.divide(down);
        let row_in_block = (down - block * tiles) * CHANNEL_ROWS;
        let first = block * npt + row_in_block;
        // The last scaling block may have fewer row groups than the others.
        if item >= row_items || first >= num_tokens {
            return;
        }
        let rows = (npt - row_in_block).min(num_tokens - first);

        // Rows beyond the end are the last one again, so that all loads are in flight together.
        let x = x.at(first as u64 * x_stride as u64 + (item * (O::VALUES * F::BITS / 8)) as u64);
        let mut held = [[0; 2]; CHANNEL_ROWS as usize];
        unroll!(i in (CHANNEL_ROWS as usize) { held[i] = F::load::<O>(x.at((i as u32).min(rows - 1) as u64 * x_stride as u64)); });
        let sf_row = if PACKED { block / 4 } else { block };
        let sf = sf.cast::<f32>().at(sf_row as u64 * sf_stride as u64 + (item * O::VALUES) as u64);
        let (a, b) = (sf.load16(0), if O::VALUES == 8 { sf.load16(4) } else { [0; 4] });
        let bits = |word: u32| if PACKED { (word >> (block % 4 * 8) & 0xFF) << 23 } else { word };
        let scales = [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]].map(|word| f32::from_bits(bits(word)));

        let out = out.at((first as u64 * row_items as u64 + item as u64) * 16);
        unroll!(i in (CHANNEL_ROWS as usize) {
            if (i as u32) < rows {
                let values = F::decode(held[i]);
                let products = core::array::from_fn(|j| values[j] * scales[j]);
                out.at(i as u64 * row_items as u64 * 16).store16(0, O::pack(products));
            }
        });
    }
    entries {
        e4m3_bf16[E4m3, Bf16, false], e4m3_f32[E4m3, F32, false], e2m1_bf16[E2m1, Bf16, false], e2m1_f32[E2m1, F32, false],
        e4m3_bf16_ue8m0[E4m3, Bf16, true], e4m3_f32_ue8m0[E4m3, F32, true],
        e2m1_bf16_ue8m0[E2m1, Bf16, true], e2m1_f32_ue8m0[E2m1, F32, true],
    }
}

kernel! {
    op = cast_back;
    threads = 256;
    /// Any alignment, any hidden size, blocks of any width. An item is one byte of `x`; strides as in `wide`. An e4m3's number
    /// within its row, an e2m1's too, shifted by `k_shift`, is its block column. The first item is in block row `first_block`.
    pub fn narrow[F: Source, O: Output, S: Scales](
        x: In<u8>, sf: In<u8>, out: Out<u8>, x_stride: u32, sf_row_stride: u32, sf_col_stride: u32,
        num_items: u32, row_items: u32, row_magic: u32, row_shift: u32, block_magic: u32, block_shift: u32, k_shift: u32,
        first_block: u32,
    ) {
        let layout = SfLayout { row_stride: sf_row_stride, col_stride: sf_col_stride };
        let values_per_item = 8 / F::BITS;
        let row_of = Divisor { magic: row_magic, shift: row_shift };
        let block_of = Divisor { magic: block_magic, shift: block_shift };
        let first = block_idx_x() * (THREADS * NARROW_ITEMS) + thread_idx();
        unroll!(i in (NARROW_ITEMS as usize) {
            let item = first + i as u32 * THREADS;
            if item < num_items {
                let row = row_of.divide(item);
                let column = item - row * row_items;
                let block = first_block + block_of.divide(item);
                let values = F::decode([x.at(row as u64 * x_stride as u64 + column as u64).get(0) as u32, 0]);
                let out = out.at(item as u64 * (values_per_item * O::BYTES) as u64);
                unroll!(j in 2 {
                    if (j as u32) < values_per_item {
                        let scale = S::load(sf, layout, block, (column * values_per_item + j as u32) >> k_shift);
                        O::set(out, j as u32, values[j] * scale);
                    }
                });
            }
        });
    }
    entries {
        e4m3_bf16_f32[E4m3, Bf16, SfF32], e4m3_f32_f32[E4m3, F32, SfF32],
        e2m1_bf16_f32[E2m1, Bf16, SfF32], e2m1_f32_f32[E2m1, F32, SfF32],
        e4m3_bf16_ue8m0[E4m3, Bf16, SfUe8m0], e4m3_f32_ue8m0[E4m3, F32, SfUe8m0],
        e2m1_bf16_ue8m0[E2m1, Bf16, SfUe8m0], e2m1_f32_ue8m0[E2m1, F32, SfUe8m0],
        e4m3_bf16_e4m3[E4m3, Bf16, SfE4m3], e4m3_f32_e4m3[E4m3, F32, SfE4m3],
        e2m1_bf16_e4m3[E2m1, Bf16, SfE4m3], e2m1_f32_e4m3[E2m1, F32, SfE4m3],
        e4m3_bf16_per_channel[E4m3, Bf16, SfPerChannel], e4m3_f32_per_channel[E4m3, F32, SfPerChannel],
        e2m1_bf16_per_channel[E2m1, Bf16, SfPerChannel], e2m1_f32_per_channel[E2m1, F32, SfPerChannel],
    }
}
