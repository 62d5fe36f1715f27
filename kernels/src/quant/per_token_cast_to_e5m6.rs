//! per_token_cast_to_e5m6: quantise rows to 12 bits a value, with one scale factor a row.
//!
//! In    x bf16, f32 [t, h], any row stride      Out  data e5m6, 12 bytes for 8 values [t, 3h/2]; sf  f32, ue8m0 \[t\]
//! Exact  bit for bit, quant.md 1.3 and 2, below 2^-14 too.  NaN never is the amax and stays NaN; infinity stays infinity.
//! Map   a block per row; a lane holds vectors of 8 values between maximum and conversion, and four lanes write 48 bytes together.
//! Cost  h * (2 or 4) bytes read and h * 3 / 2 written a token; memory bound; 11 instructions a value.

use super::common::{Scale, Target, exponent_ceil, ue8m0};
use crate::device::*;
use crate::{kernel, unroll};

/// Channels of a vector: three words of output.
pub const CHANNELS: u32 = 8;
/// Bytes of a vector of output.
const BYTES: u32 = 12;
/// Most threads of a block. Longer rows than they can hold are read twice.
pub const MAX_THREADS: u32 = 512;
/// Vectors of a lane from bf16.
pub const BF16_VECTORS: usize = 4;
/// Vectors of a lane from f32, which take twice the registers.
pub const F32_VECTORS: usize = 2;

/// 1 sign, 5 exponent, 6 mantissa bits: the upper 12 bits of an f16. Largest value 65024.
#[derive(Clone, Copy)]
pub struct E5m6;

impl Target for E5m6 {
    const MAX: f32 = 65024.0;
    const AMAX_MIN: f32 = 1e-4;
    const BITS: u32 = 12;
}

/// Grid and block: so many threads that each holds `vectors` vectors of the row.
pub fn config(num_tokens: u32, hidden: u32, vectors: usize) -> LaunchConfig {
    let threads = ceil_div(hidden / CHANNELS, vectors as u32);
    LaunchConfig::new(num_tokens, align_up(threads, WARP_SIZE).clamp(WARP_SIZE, MAX_THREADS)).shared(&shared().0)
}

/// One value a warp.
#[inline(always)]
fn shared() -> (SharedLayout, Shared<f32>) {
    let mut layout = SharedLayout::new();
    let scratch = layout.array(WARP_SIZE);
    (layout, scratch)
}

/// A format of the input.
trait Source {
    /// Bytes of a value.
    const BYTES: u32;
    /// Eight values.
    type Raw: Copy;
    /// Eight zeros.
    const ZERO: Self::Raw;

    /// Eight values from `x` on, which is aligned to 16 bytes if `WIDE`, else to one value.
    fn load<const WIDE: bool>(x: In<u8>) -> Self::Raw;

    /// Largest magnitude.
    fn amax(raw: Self::Raw) -> f32;

    /// As f32.
    fn values(raw: Self::Raw) -> [f32; 8];
}

/// bf16 input.
struct Bf16;
/// f32 input.
struct F32;

impl Source for Bf16 {
    const BYTES: u32 = 2;
    type Raw = [u32; 4];
    const ZERO: [u32; 4] = [0; 4];

    #[inline(always)]
    #[track_caller]
    fn load<const WIDE: bool>(x: In<u8>) -> [u32; 4] {
        let one = |i: u32| x.cast::<u16>().get(i) as u32;
        if WIDE { x.load16(0) } else { core::array::from_fn(|i| one(2 * i as u32) | one(2 * i as u32 + 1) << 16) }
    }

    #[inline(always)]
    fn amax(x: [u32; 4]) -> f32 {
        let m = bf16x2_max_abs(bf16x2_max_abs(x[0], x[1]), bf16x2_max_abs(x[2], x[3]));
        let [a, b] = bf16x2_to_f32(m);
        max_total(a.abs(), b.abs())
    }

    #[inline(always)]
    fn values(x: [u32; 4]) -> [f32; 8] {
        let [a, b, c, d] = x.map(bf16x2_to_f32);
        [a[0], a[1], b[0], b[1], c[0], c[1], d[0], d[1]]
    }
}

impl Source for F32 {
    const BYTES: u32 = 4;
    type Raw = [u32; 8];
    const ZERO: [u32; 8] = [0; 8];

    #[inline(always)]
    #[track_caller]
    fn load<const WIDE: bool>(x: In<u8>) -> [u32; 8] {
        let x = x.cast::<u32>();
        if WIDE {
            let (a, b) = (x.load16(0), x.load16(4));
            [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]]
        } else {
            core::array::from_fn(|i| x.get(i as u32))
        }
    }

    #[inline(always)]
    fn amax(x: [u32; 8]) -> f32 {
        let [a, b, c, d, e, f, g, h] = x.map(|w| f32::from_bits(w).abs());
        max_total(max_total(max_total(a, b), max_total(c, d)), max_total(max_total(e, f), max_total(g, h)))
    }

    #[inline(always)]
    fn values(x: [u32; 8]) -> [f32; 8] {
        x.map(f32::from_bits)
    }
}

/// Scale of a row. An infinite `amax` counts as the largest number, so that the scale is one.
#[inline(always)]
fn scale<const ROUND: bool>(amax: f32) -> Scale {
    let clamped = min_total(max_total(amax, E5m6::AMAX_MIN), f32::MAX);
    if ROUND {
        // The quotient itself: next to a power of two the product with the rounded reciprocal lands on the wrong side.
        let exponent = exponent_ceil(clamped / E5m6::MAX);
        Scale { sf: f32::from_bits(exponent << 23), inv: f32::from_bits((254 - exponent) << 23) }
    } else {
        Scale { sf: clamped / E5m6::MAX, inv: E5m6::MAX / clamped }
    }
}

/// Write vector `number` of the row `out`, if it is one of `count`. All lanes of the warp have neighbouring vectors; `WIDE`: `out` is
/// aligned to 16 bytes and `count` a multiple of four.
#[inline(always)]
#[track_caller]
fn store<const WIDE: bool>(out: Out<u8>, words: [u32; 3], number: u32, count: u32) {
    if WIDE {
        // Four lanes have twelve words; three of them write four each: lane `l` its own from word `l` on and what follows.
        let [d, e, f] = words.map(|w| warp_shuffle_down(w, 1));
        let [a, b, c] = words;
        let lane = number % 4;
        // By masks: a `match` becomes jumps.
        let all_if = |condition: bool| 0u32.wrapping_sub(condition as u32);
        let (zero, one) = (all_if(lane == 0), all_if(lane == 1));
        let pick = |first: u32, second: u32, third: u32| select_bits(zero, first, select_bits(one, second, third));
        if lane < 3 && number < count {
            let to = out.at((number / 4) as u64 * (4 * BYTES) as u64 + (lane * 16) as u64);
            to.store16(0, [pick(a, b, c), pick(b, c, d), pick(c, d, e), pick(d, e, f)]);
        }
    } else if number < count {
        let to = out.at(number as u64 * BYTES as u64);
        unroll!(i in 12 {
            to.set(i as u32, (words[i / 4] >> (i % 4 * 8)) as u8);
        });
    }
}

kernel! {
    op = per_token_cast_to_e5m6;
    threads = 512;
    /// One block a row. `x_stride` counts bytes. `packed`: the scale is a word with one exponent byte.
    pub fn rows[S: Source, const ROUND: bool, const WIDE: bool, const N: usize](
        x: In<u8>, out: Out<u8>, sf: Out<u8>, x_stride: u64, hidden: u32, sf_stride: u32, packed: u32,
    ) {
        let (_, scratch) = shared();
        let (row, count) = (block_idx_x(), hidden / CHANNELS);
        let x = x.at(row as u64 * x_stride);
        let out = out.at(row as u64 * count as u64 * BYTES as u64);
        let number = |i: u32| thread_idx() + i * block_dim();
        let read = |n: u32| {
            if n < count { S::load::<WIDE>(x.at(n as u64 * (CHANNELS * S::BYTES) as u64)) } else { S::ZERO }
        };
        let held: [S::Raw; N] = core::array::from_fn(|i| read(number(i as u32)));
        let mut amax = held.iter().fold(0.0, |m, raw| max_total(m, S::amax(*raw)));
        // A row that is longer than what the threads can hold is read twice, the second time from L2.
        let mut i = N as u32;
        while i * block_dim() < count {
            rolled();
            amax = max_total(amax, S::amax(read(number(i))));
            i += 1;
        }
        let scale = scale::<ROUND>(block_max(amax, scratch));
        // Lanes exchange words, so all of them go through every step.
        let write = |raw: S::Raw, n: u32| {
            store::<WIDE>(out, f32x8_to_e5m6x8(S::values(raw).map(|v| v * scale.inv)), n, count);
        };
        unroll!(i in N {
            write(held[i], number(i as u32));
        });
        let mut i = N as u32;
        while i * block_dim() < count {
            rolled();
            write(read(number(i)), number(i));
            i += 1;
        }
        if thread_idx() == 0 {
            let word = if ROUND && packed != 0 { ue8m0(scale.sf) } else { scale.sf.to_bits() };
            sf.cast::<u32>().set(row * sf_stride, word);
        }
    }
    entries {
        bf16[Bf16, false, true, { BF16_VECTORS }], bf16_round[Bf16, true, true, { BF16_VECTORS }],
        f32[F32, false, true, { F32_VECTORS }], f32_round[F32, true, true, { F32_VECTORS }],
        bf16_narrow[Bf16, false, false, 1], bf16_round_narrow[Bf16, true, false, 1],
        f32_narrow[F32, false, false, 1], f32_round_narrow[F32, true, false, 1],
    }
}
