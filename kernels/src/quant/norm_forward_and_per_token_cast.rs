//! norm_forward_and_per_token_cast: root mean square norm of rows, quantised to e4m3 with one scale for 32 channels.
//!
//! In    as norm_forward    Out  data e4m3 [b, t, h], sf [b, t, ceil(h/32)], norm as bf16 [b, t, h], residual_out, rstd
//! Exact bitwise `per_token_cast` of what `norm_forward` writes, which is close to the specification (quant.md 6.10).
//! Map   as norm_forward; a scale is shared by 4 or 8 neighbouring lanes, the first of which writes it.
//! Cost  2 or 4 bytes read and 1 written a channel, and what is asked for besides; memory bound.

use super::norm_forward::{Norm, Row, Strides, Value, normalise, store};
pub use super::norm_forward::{PAIR, RESIDUAL, RESIDUAL_OUT, RSTD, VECTORS, WEIGHT, config, lanes_log2};
use crate::device::*;
use crate::quant::common::{Divisor, E4m3, Scale, SfLayout, scale, ue8m0};
pub use crate::quant::per_token_cast::{Bf16, F32};
use crate::{kernel, unroll};

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
    /// Write the first `channels` of a vector as bf16.
    fn store_bf16<const WIDE: bool>(out: Out<u8>, v: [u32; 4], channels: u32);

    /// Write the e4m3 codes of the first `channels` of a vector.
    fn store_codes<const WIDE: bool>(out: Out<u8>, codes: [u32; 4], channels: u32);
}

impl Output for Bf16 {
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

/// Where the scales of a thread's vectors go: into the tensor, and into that of the mega-MoE kernel.
#[derive(Clone, Copy)]
struct Scales {
    /// Scale of this thread's first vector.
    sf: Out<u8>,
    /// Bytes from one vector's to the next one's.
    step: u64,
    mega_moe: Out<u8>,
    mega_moe_step: u64,
    /// Channels that have a scale or, packed, a byte in a word.
    end: u32,
    parts: u32,
}

impl Scales {
    #[inline(always)]
    fn new(
        row: Row,
        sf: Out<u8>,
        layout: SfLayout,
        mega_moe: Out<u8>,
        mega_moe_row: u32,
        mega_moe_stride: u32,
        parts: u32,
    ) -> Self {
        let group = row.first / GROUP;
        let packed = parts & PACKED != 0;
        // Vectors lie whole words apart.
        let at = if packed { layout.byte(row.token, group) } else { 4 * layout.index(row.token, group) };
        let columns = row.step / if packed { 4 * GROUP } else { GROUP };
        let order = SfLayout { row_stride: 1, col_stride: mega_moe_stride };
        Self {
            sf: sf.at(at as u64),
            step: 4 * columns as u64 * layout.col_stride as u64,
            mega_moe: mega_moe.at(order.byte(mega_moe_row, group) as u64),
            mega_moe_step: 4 * (row.step / (4 * GROUP)) as u64 * mega_moe_stride as u64,
            end: if packed { align_up(row.end, 4 * GROUP) } else { row.end },
            parts,
        }
    }

    /// Write the scale of the group that begins at `channel` with vector `i`; 0 for groups that only fill a word up.
    #[inline(always)]
    #[track_caller]
    fn write(self, i: u32, inside: bool, channel: u32, sf: f32) {
        if channel.is_multiple_of(GROUP) && channel < self.end {
            let exponent = if inside { ue8m0(sf) as u8 } else { 0 };
            let to = self.sf.at(i as u64 * self.step);
            if self.parts & PACKED != 0 {
                to.set(0, exponent);
            } else {
                to.cast::<f32>().set(0, sf);
            }
            if self.parts & MEGA_MOE != 0 {
                self.mega_moe.at(i as u64 * self.mega_moe_step).set(0, exponent);
            }
        }
    }
}

kernel! {
    op = norm_forward_and_per_token_cast;
    threads = 512, blocks = 2;
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
        let (out, out_bf16) = (out.at(row.element(hidden)), out_bf16.at(2 * row.element(hidden)));
        let sf = sf.at(4 * row.batch as u64 * sf_batch_stride);
        let layout = SfLayout { row_stride: sf_row_stride, col_stride: sf_col_stride };
        let by_block_m = Divisor { magic: block_m_magic, shift: block_m_shift };
        let mega_moe_row = mega_moe_row(row.token, mega_moe_block_m, by_block_m);
        let scales = Scales::new(row, sf, layout, mega_moe_sf, mega_moe_row, mega_moe_stride, parts);
        normalise::<S, WIDE, LONG, HELD>(&norm, row, |i, at, v| {
            let mut amax = S::amax(v);
            unroll!(step in 3 {
                if (S::CHANNELS << step) < GROUP {
                    amax = max_total(amax, warp_shuffle_xor(amax, 1 << step));
                }
            });
            let rounded = if LONG { parts & ROUND != 0 } else { ROUNDED };
            let Scale { sf, inv } = if rounded { scale::<E4m3, true>(amax) } else { scale::<E4m3, false>(amax) };
            if at < row.end {
                S::store_codes::<WIDE>(out.at(row.skip(i, 8)), S::encode::<E4m3, ROUNDED>(v, inv), row.end - at);
                if parts & OUT_BF16 != 0 {
                    S::store_bf16::<WIDE>(out_bf16.at(row.skip(i, 16)), v, row.end - at);
                }
            }
            scales.write(i, at < row.end, at, sf);
        });
    }
    entries {
        bf16[Bf16, false, true, false, VECTORS], bf16_round[Bf16, true, true, false, VECTORS],
        f32[F32, false, true, false, VECTORS], f32_round[F32, true, true, false, VECTORS],
        bf16_round_pair[Bf16, true, true, false, PAIR],
        bf16_long[Bf16, false, true, true, 1], f32_long[F32, false, true, true, 1],
        bf16_narrow[Bf16, false, false, true, 1], f32_narrow[F32, false, false, true, 1],
    }
}
