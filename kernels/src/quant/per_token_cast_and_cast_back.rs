//! per_token_cast_and_cast_back: what rows become by quantising and dequantising them, in place.
//!
//! In and out  x bf16 or f32 [t, h], any row stride
//! Exact bitwise `cast_back` of `per_token_cast`: one f32 product and a rounding to e4m3 or e2m1, one f32 product and a rounding back.
//! Map   an item is 16 bytes of a row; items are numbered through all rows, rows filled up to whole groups, a lane has one. The lanes
//!       of a group find its maximum by shuffles.
//! Cost  h * (2 or 4) bytes read and as many written a token; memory bound.

use super::per_token_cast::{AT_RUN_TIME, E4M3_SF, EXACT, Encode, POWERS, Source, group_max, scales};
pub use super::per_token_cast::{Bf16, F32};
use crate::device::*;
use crate::quant::common::Divisor;
pub use crate::quant::common::{E2m1, E4m3};
use crate::{kernel, unroll};

/// Threads of a block. Two items a thread, or 512 threads a block, take as long.
pub const THREADS: u32 = 256;
/// Items of one launch must stay below this, see [`Divisor`].
pub const MAX_ITEMS: u64 = 1 << 31;

/// Codes back to their values.
pub trait Decode: Encode {
    /// The values of eight codes, as many as there are, without their scale.
    fn eight(codes: [u32; 4]) -> [f32; 8];
}

impl Decode for E4m3 {
    #[inline(always)]
    fn eight(codes: [u32; 4]) -> [f32; 8] {
        let ([a, b, c, d], [e, f, g, h]) = (e4m3x4_to_f32(codes[0]), e4m3x4_to_f32(codes[1]));
        [a, b, c, d, e, f, g, h]
    }
}

impl Decode for E2m1 {
    #[inline(always)]
    fn eight(codes: [u32; 4]) -> [f32; 8] {
        e2m1x8_to_f32(codes[0])
    }
}

/// A type of `x`.
pub trait Element: Source<Raw = [u32; 4]> {
    /// The values of an item.
    fn pack(values: [f32; 8]) -> [u32; 4];
}

impl Element for Bf16 {
    #[inline(always)]
    fn pack(v: [f32; 8]) -> [u32; 4] {
        core::array::from_fn(|i| f32x2_to_bf16x2(v[2 * i], v[2 * i + 1]))
    }
}

impl Element for F32 {
    #[inline(always)]
    fn pack(v: [f32; 8]) -> [u32; 4] {
        core::array::from_fn(|i| v[i].to_bits())
    }
}

/// The first `channels` channels at `x`, at most an item, and zeros: 16 bytes if `wide`.
#[inline(always)]
#[track_caller]
fn load<S: Element>(x: Out<u8>, channels: u32, wide: bool) -> [u32; 4] {
    if wide {
        return x.load16(0);
    }
    core::array::from_fn(|i| {
        let one = |j: u32| if j < channels { x.cast::<u16>().get(j) as u32 } else { 0 };
        let i = i as u32;
        match S::BITS {
            16 => one(2 * i) | one(2 * i + 1) << 16,
            _ if i < channels => x.cast::<u32>().get(i),
            _ => 0,
        }
    })
}

/// Write what [`load`] reads.
#[inline(always)]
#[track_caller]
fn store<S: Element>(x: Out<u8>, words: [u32; 4], channels: u32, wide: bool) {
    if wide {
        return x.store16(0, words);
    }
    unroll!(i in 8 {
        if (i as u32) < channels {
            match S::BITS {
                16 => x.cast::<u16>().set(i as u32, (words[i / 2] >> (16 * (i % 2))) as u16),
                _ => x.cast::<u32>().set(i as u32, words[i % 4]),
            }
        }
    });
}

kernel! {
    op = per_token_cast_and_cast_back;
    threads = 256, blocks = 8;
    /// Rows of `x` are whole numbers of aligned items. A row has `row_items` items, whole groups of `2^npc_log2` channels, of which the
    /// last may lie beyond `hidden`; there are `num_items` in all rows. `x_stride` counts bytes. The magic number divides by `row_items`.
    pub fn wide[S: Element, T: Decode, const RULE: u32](
        x: Out<u8>, x_stride: u64, hidden: u32, npc_log2: u32, num_items: u32, row_items: u32, row_magic: u32, row_shift: u32,
    ) {
        let row = Divisor { magic: row_magic, shift: row_shift };
        items::<S, T, RULE>(x, x_stride, hidden, npc_log2, num_items, row_items, row, RULE, true);
    }
    entries {
        bf16_e4m3[Bf16, E4m3, EXACT],
        bf16_e4m3_round[Bf16, E4m3, POWERS],
        bf16_e4m3_sf8[Bf16, E4m3, E4M3_SF],
        bf16_e2m1[Bf16, E2m1, EXACT],
        bf16_e2m1_round[Bf16, E2m1, POWERS],
        bf16_e2m1_sf8[Bf16, E2m1, E4M3_SF],
        f32_e4m3[F32, E4m3, EXACT],
        f32_e4m3_round[F32, E4m3, POWERS],
        f32_e4m3_sf8[F32, E4m3, E4M3_SF],
        f32_e2m1[F32, E2m1, EXACT],
        f32_e2m1_round[F32, E2m1, POWERS],
        f32_e2m1_sf8[F32, E2m1, E4M3_SF],
    }
}

kernel! {
    op = per_token_cast_and_cast_back;
    threads = 256, blocks = 4;
    /// As `wide`, of any alignment and channel by channel; the rule of the scales is an argument.
    pub fn narrow[S: Element, T: Decode](
        x: Out<u8>, x_stride: u64, hidden: u32, npc_log2: u32, num_items: u32, row_items: u32, row_magic: u32, row_shift: u32,
        rule: u32,
    ) {
        let row = Divisor { magic: row_magic, shift: row_shift };
        items::<S, T, AT_RUN_TIME>(x, x_stride, hidden, npc_log2, num_items, row_items, row, rule, false);
    }
    entries {
        bf16_e4m3[Bf16, E4m3],
        bf16_e2m1[Bf16, E2m1],
        f32_e4m3[F32, E4m3],
        f32_e2m1[F32, E2m1],
    }
}

/// The body of both.
#[inline(always)]
#[track_caller]
#[allow(clippy::too_many_arguments)]
fn items<S: Element, T: Decode, const RULE: u32>(
    x: Out<u8>,
    x_stride: u64,
    hidden: u32,
    npc_log2: u32,
    num_items: u32,
    row_items: u32,
    by_row: Divisor,
    rule: u32,
    wide: bool,
) {
    let item = block_idx_x() * THREADS + thread_idx();
    // Where the item is, and how many channels it has; none beyond the end of the row or of all rows.
    let row = by_row.divide(item);
    let channel = (item - row * row_items) * S::CHANNELS;
    let at = x.at(row as u64 * x_stride + (channel * (S::BITS / 8)) as u64);
    let channels = if item < num_items && channel < hidden { hidden - channel } else { 0 };
    let raw = if channels == 0 { S::ZERO } else { load::<S>(at, channels, wide) };
    let amax = group_max::<S, 1, false>([S::amax(raw)], npc_log2 - S::CHANNELS.trailing_zeros());
    if channels > 0 {
        let scale = scales::<T, RULE, 1>(amax, rule)(0);
        let codes = if RULE == POWERS { S::encode::<T, true>(raw, scale.inv) } else { S::encode::<T, false>(raw, scale.inv) };
        let values = <T as Decode>::eight(codes).map(|q| q * scale.sf);
        store::<S>(at, S::pack(values), channels.min(S::CHANNELS), wide);
    }
}
