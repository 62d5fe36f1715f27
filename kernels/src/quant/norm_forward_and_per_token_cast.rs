//! norm_forward_and_per_token_cast: root mean square norm of rows, quantised to e4m3 with one scale for 32 channels.
//!
//! In    as norm_forward    Out  data e4m3 [b, t, h], sf [b, t, ceil(h/32)], norm as bf16 [b, t, h], residual_out, rstd
//! Exact bitwise `per_token_cast` of what `norm_forward` writes, which is close to the specification (quant.md 6.10).
//! Map   as norm_forward; a scale is shared by 4 or 8 neighbouring lanes, the first of which writes it.
//! Cost  2 or 4 bytes read and 1 written a channel, and what is asked for besides; memory bound.

use super::norm_forward::{Emit, Norm, Row, Strides, Value, normalise, store};
pub use super::norm_forward::{RESIDUAL, RESIDUAL_OUT, RSTD, VECTORS, WEIGHT, config, lanes_log2};
use crate::device::*;
use crate::quant::common::{Divisor, E4m3, Scale, SfLayout, scale, ue8m0};
use crate::quant::per_token_cast::Source;
pub use crate::quant::per_token_cast::{Bf16, F32};
use crate::{kernel, unroll};
use core::marker::PhantomData;

/// Channels that share a scale.
pub const GROUP: u32 = 32;
/// The norm is written as bf16 too.
pub const OUT_BF16: u32 = 16;
/// Scales are exponent bytes.
pub const PACKED: u32 = 32;
/// Exponents are written a second time, in the order of the mega-MoE kernel.
pub const MEGA_MOE: u32 = 64;
/// Scales are powers of two; looked at by entries for long rows and narrow ones only.
pub const ROUND: u32 = 128;

/// Row of the mega-MoE scales that belongs to `token`: blocks of `block_m` tokens each start at a multiple of 128, and of 128 rows, row
/// `32 * i + j` comes to `4 * j + i`.
#[inline(always)]
pub const fn mega_moe_row(token: u32, block_m: u32, by_block_m: Divisor) -> u32 {
    let block = by_block_m.divide(token);
    let i = token - block * block_m;
    block * align_up(block_m, 128) + i / 128 * 128 + i % 32 * 4 + i % 128 / 32
}

/// A vector in the output formats.
pub trait Output: Value {
    /// Something like the largest magnitude of a vector, in a form that combines cheaply.
    fn largest(v: [u32; 4]) -> u32;

    /// The same of two vectors.
    fn larger(a: u32, b: u32) -> u32;

    /// As a number.
    fn magnitude(largest: u32) -> f32;

    /// Write the first `channels` of a vector as bf16.
    fn store_bf16<const WIDE: bool>(out: Out<u8>, v: [u32; 4], channels: u32);

    /// Write the e4m3 codes of the first `channels` of a vector.
    fn store_codes<const WIDE: bool>(out: Out<u8>, codes: [u32; 4], channels: u32);
}

impl Output for Bf16 {
    #[inline(always)]
    fn largest(v: [u32; 4]) -> u32 {
        bf16x2_max_abs(bf16x2_max_abs(v[0], v[1]), bf16x2_max_abs(v[2], v[3]))
    }

    #[inline(always)]
    fn larger(a: u32, b: u32) -> u32 {
        bf16x2_max_abs(a, b)
    }

    #[inline(always)]
    fn magnitude(largest: u32) -> f32 {
        let [a, b] = bf16x2_to_f32(largest);
        max_total(a.abs(), b.abs())
    }

    #[inline(always)]
    #[track_caller]
    fn store_bf16<const WIDE: bool>(out: Out<u8>, v: [u32; 4], channels: u32) {
        store::<Bf16, WIDE>(out, v, channels);
    }

    #[inline(always)]
    #[track_caller]
    fn store_codes<const WIDE: bool>(out: Out<u8>, codes: [u32; 4], channels: u32) {
        if WIDE { out.store8(0, [codes[0], codes[1]]) } else { store_bytes::<8>(out, codes, channels) }
    }
}

impl Output for F32 {
    #[inline(always)]
    fn largest(v: [u32; 4]) -> u32 {
        F32::amax(v).to_bits()
    }

    #[inline(always)]
    fn larger(a: u32, b: u32) -> u32 {
        max_total(f32::from_bits(a), f32::from_bits(b)).to_bits()
    }

    #[inline(always)]
    fn magnitude(largest: u32) -> f32 {
        f32::from_bits(largest)
    }

    #[inline(always)]
    #[track_caller]
    fn store_bf16<const WIDE: bool>(out: Out<u8>, v: [u32; 4], channels: u32) {
        let [a, b, c, d] = v.map(f32::from_bits);
        let halves = [f32x2_to_bf16x2(a, b), f32x2_to_bf16x2(c, d)];
        if WIDE {
            out.store8(0, halves);
        } else {
            unroll!(i in 4 {
                if (i as u32) < channels {
                    out.cast::<u16>().set(i as u32, (halves[i / 2] >> (i % 2 * 16)) as u16);
                }
            });
        }
    }

    #[inline(always)]
    #[track_caller]
    fn store_codes<const WIDE: bool>(out: Out<u8>, codes: [u32; 4], channels: u32) {
        if WIDE { out.store4(0, codes[0]) } else { store_bytes::<4>(out, codes, channels) }
    }
}

#[inline(always)]
#[track_caller]
fn store_bytes<const N: usize>(out: Out<u8>, codes: [u32; 4], channels: u32) {
    unroll!(i in N {
        if (i as u32) < channels {
            out.set(i as u32, (codes[i / 4] >> (i % 4 * 8)) as u8);
        }
    });
}

/// The norm goes to memory quantised.
struct Quantise<S, const ROUNDED: bool, const WIDE: bool, const LONG: bool> {
    row: Row,
    out: Out<u8>,
    out_bf16: Out<u8>,
    /// Scales of the row's batch.
    sf: Out<u8>,
    layout: SfLayout,
    mega_moe_sf: Out<u8>,
    mega_moe_row: u32,
    mega_moe_stride: u32,
    parts: u32,
    of: PhantomData<S>,
}

/// Vectors of a thread that are quantised together.
const TOGETHER: usize = 4;

/// The largest of `values[i]` over four neighbouring lanes, for the lane number `i` of them: each step leaves half of the values.
#[inline(always)]
#[track_caller]
fn largest_of_four<S: Output>(lane: u32, values: [u32; TOGETHER]) -> u32 {
    let exchange = |bit: u32, a: u32, b: u32| {
        let odd = lane & bit != 0;
        let (kept, given) = if odd { (b, a) } else { (a, b) };
        S::larger(kept, warp_shuffle_xor(given, bit))
    };
    let (front, back) = (exchange(1, values[0], values[1]), exchange(1, values[2], values[3]));
    exchange(2, front, back)
}

impl<S: Output, const ROUNDED: bool, const WIDE: bool, const LONG: bool> Quantise<S, ROUNDED, WIDE, LONG> {
    /// Write the scale of vector `number`'s group, 0 for groups that only fill a word up.
    #[inline(always)]
    #[track_caller]
    fn write_scale(&self, number: u32, sf: f32) {
        // Of the group: the row may end before this lane's share of it.
        let channel = self.row.channel(number) / GROUP * GROUP;
        let packed = self.parts & PACKED != 0;
        let end = if packed { align_up(self.row.end, 4 * GROUP) } else { self.row.end };
        if channel < end {
            let group = channel / GROUP;
            let exponent = if channel < self.row.end { ue8m0(sf) as u8 } else { 0 };
            if packed {
                self.sf.set(self.layout.byte(self.row.token, group), exponent);
            } else {
                self.sf.cast::<f32>().set(self.layout.index(self.row.token, group), sf);
            }
            if self.parts & MEGA_MOE != 0 {
                let order = SfLayout { row_stride: 1, col_stride: self.mega_moe_stride };
                self.mega_moe_sf.set(order.byte(self.mega_moe_row, group), exponent);
            }
        }
    }
}

impl<S: Output, const ROUNDED: bool, const WIDE: bool, const LONG: bool> Emit for Quantise<S, ROUNDED, WIDE, LONG> {
    /// Lanes of a group have the same share of each of its [`TOGETHER`] vectors, so each of the first four makes and writes one scale.
    #[inline(always)]
    #[track_caller]
    fn vectors<const N: usize>(&self, first: u32, v: [[u32; 4]; N]) {
        let lane = self.row.first / S::CHANNELS % (GROUP / S::CHANNELS);
        let mine = lane % TOGETHER as u32;
        let mut amax = if N == TOGETHER {
            largest_of_four::<S>(lane, core::array::from_fn(|i| S::largest(v[i % N])))
        } else {
            let largest = S::largest(v[0]);
            let largest = S::larger(largest, warp_shuffle_xor(largest, 1));
            S::larger(largest, warp_shuffle_xor(largest, 2))
        };
        if S::CHANNELS == 4 {
            amax = S::larger(amax, warp_shuffle_xor(amax, 4));
        }
        let amax = S::magnitude(amax);
        let rounded = if LONG { self.parts & ROUND != 0 } else { ROUNDED };
        let Scale { sf, inv } = if rounded { scale::<E4m3, true>(amax) } else { scale::<E4m3, false>(amax) };
        if lane < N as u32 {
            self.write_scale(first + if N == TOGETHER { mine } else { 0 }, sf);
        }
        unroll!(i in N {
            let inv = if N == TOGETHER { warp_shuffle_xor(inv, mine ^ i as u32) } else { inv };
            let number = first + i as u32;
            let (row, at) = (self.row, self.row.channel(number));
            if at < row.end {
                S::store_codes::<WIDE>(self.out.at(row.skip(number, 8)), S::encode::<E4m3, ROUNDED>(v[i], inv), row.end - at);
                if self.parts & OUT_BF16 != 0 {
                    S::store_bf16::<WIDE>(self.out_bf16.at(row.skip(number, 16)), v[i], row.end - at);
                }
            }
        });
    }
}

kernel! {
    op = norm_forward_and_per_token_cast;
    threads = 576, blocks = 2;
    /// As [`norm_forward::rows`](super::norm_forward::rows); strides of scales count words.
    pub fn rows[S: Output, const ROUNDED: bool, const WIDE: bool, const LONG: bool, const HELD: usize](
        x: In<u8>, residual: In<u8>, weight: In<u8>, out: Out<u8>, out_bf16: Out<u8>, sf: Out<u8>, mega_moe_sf: Out<u8>,
        residual_out: Out<u8>, rstd: Out<f32>,
        x_batch_stride: u64, x_stride: u64, residual_batch_stride: u64, residual_stride: u64, sf_batch_stride: u64,
        sf_row_stride: u32, sf_col_stride: u32, mega_moe_stride: u32, mega_moe_block_m: u32, block_m_magic: u32, block_m_shift: u32,
        num_rows: u32, hidden: u32, num_tokens: u32, tokens_magic: u32, tokens_shift: u32, lanes_log2: u32, parts: u32,
        inv_hidden: f32, eps: f32, out_scale: f32,
    ) {
        let norm = Norm {
            x, residual, weight, residual_out, rstd,
            x_strides: Strides { batch: x_batch_stride, token: x_stride },
            residual_strides: Strides { batch: residual_batch_stride, token: residual_stride },
            hidden, inv_hidden, parts, eps, out_scale,
        };
        let by_tokens = Divisor { magic: tokens_magic, shift: tokens_shift };
        let row = Row::of_thread::<S>(num_rows, hidden, num_tokens, by_tokens, lanes_log2);
        normalise::<S, _, WIDE, LONG, HELD, false>(&norm, row, || Quantise::<S, ROUNDED, WIDE, LONG> {
            row,
            out: out.at(row.element(hidden)),
            out_bf16: out_bf16.at(2 * row.element(hidden)),
            sf: sf.at(4 * row.batch as u64 * sf_batch_stride),
            layout: SfLayout { row_stride: sf_row_stride, col_stride: sf_col_stride },
            mega_moe_sf,
            mega_moe_row: mega_moe_row(row.token, mega_moe_block_m, Divisor { magic: block_m_magic, shift: block_m_shift }),
            mega_moe_stride,
            parts,
            of: PhantomData,
        });
    }
    entries {
        bf16[Bf16, false, true, false, VECTORS], bf16_round[Bf16, true, true, false, VECTORS],
        f32[F32, false, true, false, VECTORS], f32_round[F32, true, true, false, VECTORS],
        bf16_long[Bf16, false, true, true, 0], f32_long[F32, false, true, true, 0],
        bf16_narrow[Bf16, false, false, true, 0], f32_narrow[F32, false, false, true, 0],
    }
}

kernel! {
    op = norm_forward_and_per_token_cast;
    threads = 576, blocks = 2;
    /// As `rows` of bf16 with scales that are powers of two, for a block a row, one batch, and no residual, mega-MoE scales or norm in
    /// bf16. Without what those take, which is addresses for the most part, 8064 rows of 7168 take 49.9 us instead of 54.7 on an H200. With
    /// 40 registers, and so six rows on a multiprocessor instead of five, it is not faster, and slower for shorter rows.
    pub fn plain(
        x: In<u8>, weight: In<u8>, out: Out<u8>, sf: Out<u8>, rstd: Out<f32>, x_stride: u64,
        sf_row_stride: u32, sf_col_stride: u32, hidden: u32, parts: u32, inv_hidden: f32, eps: f32, out_scale: f32,
    ) {
        let parts = parts & (WEIGHT | RSTD | PACKED);
        let strides = Strides { batch: 0, token: x_stride };
        let norm = Norm {
            x, residual: x, weight, residual_out: out, rstd, x_strides: strides, residual_strides: strides,
            hidden, inv_hidden, parts, eps, out_scale,
        };
        let row = Row {
            index: block_idx_x(), batch: 0, token: block_idx_x(),
            first: thread_idx() * Bf16::CHANNELS, step: block_dim() * Bf16::CHANNELS, end: hidden,
        };
        normalise::<Bf16, _, true, false, VECTORS, false>(&norm, row, || Quantise::<Bf16, true, true, false> {
            row,
            out: out.at(row.element(hidden)),
            out_bf16: out,
            sf,
            layout: SfLayout { row_stride: sf_row_stride, col_stride: sf_col_stride },
            mega_moe_sf: sf,
            mega_moe_row: 0,
            mega_moe_stride: 0,
            parts,
            of: PhantomData,
        });
    }
}
