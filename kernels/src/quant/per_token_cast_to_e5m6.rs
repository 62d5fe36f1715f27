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
/// Words of a vector of output.
const WORDS: u32 = 3;
/// Most threads of a block. Longer rows than they can hold are read twice.
pub const MAX_THREADS: u32 = 512;
/// Vectors of a lane from bf16.
pub const BF16_VECTORS: usize = 4;
/// Vectors of a lane from f32, which take twice the registers.
pub const F32_VECTORS: usize = 2;
/// Vectors of a lane from bf16 where there are few rows: more warps, and fewer instructions to fetch.
pub const FEW_VECTORS: usize = 2;

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
    let threads = align_up(threads, WARP_SIZE).clamp(WARP_SIZE, MAX_THREADS);
    LaunchConfig::new(num_tokens, threads).shared(&shared(threads * vectors as u32).0)
}

/// One word a warp, and the output of `vectors` vectors.
#[inline(always)]
fn shared(vectors: u32) -> (SharedLayout, Shared<u32>, Shared<u32>) {
    let mut layout = SharedLayout::new();
    let scratch = layout.array(WARP_SIZE);
    let words = layout.array(vectors * WORDS);
    (layout, scratch, words)
}

/// A format of the input.
trait Source: Sized {
    /// Bytes of a value.
    const BYTES: u32;
    /// Whether [`encode_plain`](Self::encode_plain) needs a row that [`is_plain`].
    const SHORT: bool;
    /// Eight values.
    type Raw: Copy;
    /// Eight zeros.
    const ZERO: Self::Raw;

    /// Eight values from `x` on, which is aligned to 16 bytes if `WIDE`, else to one value.
    fn load<const WIDE: bool>(x: In<u8>) -> Self::Raw;

    /// Largest magnitude; NaN is ignored.
    fn amax(raw: Self::Raw) -> f32;

    /// [`encode`], or what gives the same codes of a row that [`is_plain`] and is scaled by a power of two.
    fn encode_plain(raw: Self::Raw, inv: f32) -> [u32; 3] {
        encode::<Self>(raw, inv)
    }

    /// Largest magnitude as the bits of an f32, beyond infinity's if there is a NaN. Only where there is short code.
    fn largest(raw: Self::Raw) -> u32 {
        number(Self::amax(raw))
    }

    /// As f32.
    fn values(raw: Self::Raw) -> [f32; 8];
}

/// bf16 input.
struct Bf16;
/// f32 input.
struct F32;

impl Source for Bf16 {
    const BYTES: u32 = 2;
    const SHORT: bool = true;
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
    fn largest(x: [u32; 4]) -> u32 {
        let [a, b, c, d] = x.map(|pair| pair & 0x7FFF_7FFF);
        let m = u16x2_max(u16x2_max(a, b), u16x2_max(c, d));
        (m << 16).max(m & 0xFFFF_0000)
    }

    /// A bf16 times a power of two has 7 bits of mantissa, one more than its code. So the code that truncates is bumped if both end with a
    /// one: that is round to nearest even, and what the 17 low bits of the f32 say below 2^-14.
    #[inline(always)]
    fn encode_plain(x: [u32; 4], inv: f32) -> [u32; 3] {
        let [a, b, c, d] = x.map(|pair| {
            let [first, second] = bf16x2_to_f32(pair);
            let h = f32x2_to_f16x2_rz(second * inv, first * inv);
            // The last bits of the values, where those of the codes are.
            let last = pair.rotate_left(20);
            let h = h.wrapping_add(h & last & 0x0010_0010);
            // Two codes in the upper 24 bits.
            select_bits(0xFFF0_0000, h, h << 4)
        });
        [byte_permute(a, b, 0x3217), byte_permute(b, c, 0x2176), byte_permute(c, d, 0x1765)]
    }

    #[inline(always)]
    fn values(x: [u32; 4]) -> [f32; 8] {
        let [a, b, c, d] = x.map(bf16x2_to_f32);
        [a[0], a[1], b[0], b[1], c[0], c[1], d[0], d[1]]
    }
}

impl Source for F32 {
    const BYTES: u32 = 4;
    const SHORT: bool = false;
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

/// The bits of a largest magnitude; 0 if that is NaN, because there was nothing else.
#[inline(always)]
fn number(amax: f32) -> u32 {
    max_total(amax, 0.0).to_bits()
}

/// The words of a vector that is multiplied by `inv`.
#[inline(always)]
fn encode<S: Source>(raw: S::Raw, inv: f32) -> [u32; 3] {
    f32x8_to_e5m6x8(S::values(raw).map(|v| v * inv))
}

/// Whether the short code is right for a row: it has no NaN, and no product is a subnormal f32, whose low bits would count.
#[inline(always)]
fn is_plain(largest: u32) -> bool {
    largest <= E5m6::MAX.to_bits()
}

/// Largest value over the block; `scratch` as of [`block_reduce`].
#[inline(always)]
#[track_caller]
fn block_largest(value: u32, scratch: Shared<u32>) -> u32 {
    let of_warp = warp_max_u32(value);
    if lane_id() == 0 {
        scratch.set(warp_id(), of_warp);
    }
    block_sync();
    warp_max_u32(if lane_id() < block_dim() / WARP_SIZE { scratch.get(lane_id()) } else { 0 })
}

/// Put the words of vector `number` where they belong.
#[inline(always)]
#[track_caller]
fn put(words: Shared<u32>, number: u32, vector: [u32; 3]) {
    unroll!(w in 3 {
        words.set(number * WORDS + w as u32, vector[w]);
    });
}

/// Write vector `number` of the row `out`, which is aligned to a word if `WIDE`.
#[inline(always)]
#[track_caller]
fn store<const WIDE: bool>(out: Out<u8>, number: u32, vector: [u32; 3]) {
    let out = out.at(number as u64 * BYTES as u64);
    if WIDE {
        unroll!(w in 3 {
            out.cast::<u32>().set(w as u32, vector[w]);
        });
    } else {
        unroll!(i in 12 {
            out.set(i as u32, (vector[i / 4] >> (i % 4 * 8)) as u8);
        });
    }
}

/// Write the scale of the block's row.
#[inline(always)]
#[track_caller]
fn store_sf<const ROUND: bool>(sf: Out<u8>, scale: Scale, sf_stride: u32, packed: u32) {
    if thread_idx() == 0 {
        let word = if ROUND && packed != 0 { ue8m0(scale.sf) } else { scale.sf.to_bits() };
        sf.cast::<u32>().set(block_idx_x() * sf_stride, word);
    }
}

kernel! {
    op = per_token_cast_to_e5m6;
    threads = 512, blocks = 3;
    /// One block a row. `x_stride` counts bytes. `packed`: the scale is a word with one exponent byte. `WIDE`: rows of `x`, and `out`, are
    /// aligned to 16 bytes, and `hidden` is a multiple of 32. A warp holds `N` times 32 neighbouring vectors; if `WIDE`, it puts their
    /// words in order in shared memory, so that it stores 512 bytes at once.
    pub fn rows[S: Source, const ROUND: bool, const WIDE: bool, const N: usize](
        x: In<u8>, out: Out<u8>, sf: Out<u8>, x_stride: u64, hidden: u32, sf_stride: u32, packed: u32,
    ) {
        let held_by_warp = N as u32 * WARP_SIZE;
        let (_, scratch, words) = shared(block_dim() * N as u32);
        let (row, count) = (block_idx_x(), hidden / CHANNELS);
        let x = x.at(row as u64 * x_stride);
        let out = out.at(row as u64 * count as u64 * BYTES as u64);
        let first = warp_id() * held_by_warp;
        let place = |i: u32| first + i * WARP_SIZE + lane_id();
        let load = |n: u32| S::load::<WIDE>(x.at(n as u64 * (CHANNELS * S::BYTES) as u64));
        let held: [S::Raw; N] = core::array::from_fn(|i| {
            let n = place(i as u32);
            if n < count { load(n) } else { S::ZERO }
        });

        let short = S::SHORT && ROUND && WIDE;
        let largest = |raw| if short { S::largest(raw) } else { number(S::amax(raw)) };
        let mut max = held.iter().fold(0, |m: u32, raw| m.max(largest(*raw)));
        // A row that is longer than what the threads can hold is read twice, the second time from L2.
        let mut from = N as u32 * block_dim();
        loop {
            let mut n = from + thread_idx();
            while n < count {
                rolled();
                max = max.max(number(S::amax(load(n))));
                n += block_dim();
            }
            max = block_largest(max, scratch);
            if !short || from == 0 || max <= f32::INFINITY.to_bits() {
                break;
            }
            // A NaN: once more, without. There is no third time, whatever the second one gives.
            block_sync();
            (from, max) = (0, 0);
        }
        let plain = !short || from != 0 && is_plain(max);
        let scale = scale::<ROUND>(f32::from_bits(max));
        store_sf::<ROUND>(sf, scale, sf_stride, packed);

        if plain && WIDE {
            unroll!(i in N {
                let vector = if short { S::encode_plain(held[i], scale.inv) } else { encode::<S>(held[i], scale.inv) };
                put(words, place(i as u32), vector);
            });
            warp_sync();
            // Pieces of 16 bytes.
            let (first, of_warp, pieces) = (first / 4 * WORDS, held_by_warp / 4 * WORDS, count / 4 * WORDS);
            unroll!(i in N {
                let piece = i as u32 * WARP_SIZE + lane_id();
                if piece < of_warp && first + piece < pieces {
                    out.at((first + piece) as u64 * 16).store16(0, words.load16((first + piece) * 4));
                }
            });
        } else if plain {
            unroll!(i in N {
                let n = place(i as u32);
                if n < count {
                    store::<WIDE>(out, n, encode::<S>(held[i], scale.inv));
                }
            });
        }
        // What is not held, or all of it.
        let mut n = if plain { N as u32 * block_dim() } else { 0 } + thread_idx();
        while n < count {
            rolled();
            store::<WIDE>(out, n, encode::<S>(load(n), scale.inv));
            n += block_dim();
        }
    }
    entries {
        bf16[Bf16, false, true, { BF16_VECTORS }], bf16_round[Bf16, true, true, { BF16_VECTORS }],
        f32[F32, false, true, { F32_VECTORS }], f32_round[F32, true, true, { F32_VECTORS }],
        bf16_few[Bf16, false, true, { FEW_VECTORS }], bf16_round_few[Bf16, true, true, { FEW_VECTORS }],
        bf16_narrow[Bf16, false, false, 1], bf16_round_narrow[Bf16, true, false, 1],
        f32_narrow[F32, false, false, 1], f32_round_narrow[F32, true, false, 1],
    }
}
