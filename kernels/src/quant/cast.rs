//! cast: element by element to another floating-point type.
//!
//! In    x f32, bf16, f16 or e4m3, n elements    Out  out n elements of another of these types
//! Exact through f32, which holds every value: one rounding, to nearest even, saturating into e4m3; or a stochastic one whose random
//!       bits are a hash of four values and their place (quant.md 6.3).
//! Map   `wide`: a thread converts vectors of 16 bytes of the wider type; `narrow`: four values a thread, one by one, whatever the
//!       types and their alignment.
//! Cost  n * (1, 2 or 4) bytes read, n * (1, 2 or 4) written; memory bound.

use crate::device::*;
use crate::{kernel, unroll};

/// Threads of a block; 512 take as long.
pub const THREADS: u32 = 256;
/// Vectors of a thread of `wide` from bf16, f16 and e4m3 to other types than e4m3. On an H100 two took as long; on an H200 more than one
/// was not tried.
pub const VECTORS: usize = 1;
/// The same from f32, and into e4m3. On an H200 1 or 2 % faster than one from f32 into bf16, 3 % into e4m3, and 2 % from bf16 into e4m3;
/// for 1 to 128 rows of 7168 too. With f16 it was not timed.
pub const MORE_VECTORS: usize = 4;
/// A number for each type, for `narrow`.
pub const KIND_F32: u32 = 0;
/// See [`KIND_F32`].
pub const KIND_BF16: u32 = 1;
/// See [`KIND_F32`].
pub const KIND_F16: u32 = 2;
/// See [`KIND_F32`].
pub const KIND_E4M3: u32 = 3;

/// A type of the input.
pub trait Source {
    /// Its number.
    const KIND: u32;
    /// The values of four elements, from `4 * quad` on.
    fn quad(raw: [u32; 4], quad: usize) -> [f32; 4];
}

/// A type of the output.
pub trait Target {
    /// Its number.
    const KIND: u32;
    /// Eight values, or as many as fit 16 bytes.
    fn encode(v: [f32; 8]) -> [u32; 4];
}

/// A type of the output that values may be rounded to stochastically.
pub trait StochasticTarget: Target {
    /// Eight values, with the random words of each four.
    fn encode_stochastic(v: [f32; 8], random: [[u32; 2]; 2]) -> [u32; 4];
}

/// IEEE single.
pub struct F32;
/// bfloat16.
pub struct Bf16;
/// IEEE half.
pub struct F16;
/// FP8 without infinities.
pub struct E4m3;

/// The values of two words of two.
#[inline(always)]
fn halves(raw: [u32; 4], quad: usize, decode: impl Fn(u32) -> [f32; 2]) -> [f32; 4] {
    let ([a, b], [c, d]) = (decode(raw[2 * quad]), decode(raw[2 * quad + 1]));
    [a, b, c, d]
}

impl Source for F32 {
    const KIND: u32 = KIND_F32;
    #[inline(always)]
    fn quad(raw: [u32; 4], _quad: usize) -> [f32; 4] {
        raw.map(f32::from_bits)
    }
}
impl Source for Bf16 {
    const KIND: u32 = KIND_BF16;
    #[inline(always)]
    fn quad(raw: [u32; 4], quad: usize) -> [f32; 4] {
        halves(raw, quad, bf16x2_to_f32)
    }
}
impl Source for F16 {
    const KIND: u32 = KIND_F16;
    #[inline(always)]
    fn quad(raw: [u32; 4], quad: usize) -> [f32; 4] {
        halves(raw, quad, f16x2_to_f32)
    }
}
impl Source for E4m3 {
    const KIND: u32 = KIND_E4M3;
    #[inline(always)]
    fn quad(raw: [u32; 4], quad: usize) -> [f32; 4] {
        e4m3x4_to_f32(raw[quad])
    }
}

impl Target for F32 {
    const KIND: u32 = KIND_F32;
    #[inline(always)]
    fn encode(v: [f32; 8]) -> [u32; 4] {
        core::array::from_fn(|i| v[i].to_bits())
    }
}
impl Target for Bf16 {
    const KIND: u32 = KIND_BF16;
    #[inline(always)]
    fn encode(v: [f32; 8]) -> [u32; 4] {
        core::array::from_fn(|i| f32x2_to_bf16x2(v[2 * i], v[2 * i + 1]))
    }
}
impl Target for F16 {
    const KIND: u32 = KIND_F16;
    #[inline(always)]
    fn encode(v: [f32; 8]) -> [u32; 4] {
        core::array::from_fn(|i| f32x2_to_f16x2(v[2 * i], v[2 * i + 1]))
    }
}
impl Target for E4m3 {
    const KIND: u32 = KIND_E4M3;
    #[inline(always)]
    fn encode(v: [f32; 8]) -> [u32; 4] {
        [f32x4_to_e4m3x4([v[0], v[1], v[2], v[3]]), f32x4_to_e4m3x4([v[4], v[5], v[6], v[7]]), 0, 0]
    }
}

impl StochasticTarget for Bf16 {
    #[inline(always)]
    fn encode_stochastic(v: [f32; 8], random: [[u32; 2]; 2]) -> [u32; 4] {
        core::array::from_fn(|i| f32x2_to_bf16x2_sr(v[2 * i], v[2 * i + 1], random[i / 2][i % 2]))
    }
}
impl StochasticTarget for E4m3 {
    #[inline(always)]
    fn encode_stochastic(v: [f32; 8], random: [[u32; 2]; 2]) -> [u32; 4] {
        let (front, back) = ([v[0], v[1], v[2], v[3]], [v[4], v[5], v[6], v[7]]);
        [f32x4_to_e4m3x4_sr(front, random[0][0]), f32x4_to_e4m3x4_sr(back, random[1][0]), 0, 0]
    }
}

/// Bytes of an element of a type.
#[inline(always)]
pub const fn bytes(kind: u32) -> u32 {
    match kind {
        KIND_F32 => 4,
        KIND_E4M3 => 1,
        _ => 2,
    }
}

/// Elements of a vector: 16 bytes of the wider type.
#[inline(always)]
pub const fn vector(from: u32, to: u32) -> u32 {
    if bytes(from) > bytes(to) { 16 / bytes(from) } else { 16 / bytes(to) }
}

/// Grid and block of `wide` and `stochastic`; `values` elements a thread.
pub fn wide_config(values: u32, n: u64) -> LaunchConfig {
    // More blocks than a grid can have are refused by the launch.
    LaunchConfig::new(n.div_ceil((THREADS * values) as u64).min(u32::MAX as u64) as u32, THREADS)
}

/// Grid and block of `narrow`.
pub fn narrow_config(n: u64) -> LaunchConfig {
    wide_config(4, n)
}

/// Four elements one by one, the first `count` of those at `x`; zeros behind them.
#[inline(always)]
#[track_caller]
fn read_quad(kind: u32, x: In<u8>, count: u32) -> [f32; 4] {
    core::array::from_fn(|i| {
        let i = i as u32;
        if i >= count {
            return 0.0;
        }
        match kind {
            KIND_F32 => f32::from_bits(x.cast::<u32>().get(i)),
            KIND_BF16 => bf16x2_to_f32(x.cast::<u16>().get(i) as u32)[0],
            KIND_F16 => f16x2_to_f32(x.cast::<u16>().get(i) as u32)[0],
            _ => e4m3x2_to_f32(x.get(i) as u32)[0],
        }
    })
}

/// Write the first `count` of four elements, which `words` holds one after the other.
#[inline(always)]
#[track_caller]
fn write_quad(kind: u32, out: Out<u8>, words: [u32; 4], count: u32) {
    unroll!(i in 4 {
        if (i as u32) < count {
            match bytes(kind) {
                4 => out.cast::<u32>().set(i as u32, words[i]),
                2 => out.cast::<u16>().set(i as u32, (words[i / 2] >> (16 * (i % 2))) as u16),
                _ => out.set(i as u32, (words[0] >> (8 * i)) as u8),
            }
        }
    });
}

/// The random words of four values.
#[inline(always)]
fn random(v: [f32; 4], quad: u32) -> [u32; 2] {
    num::quad_hash(v.map(f32::to_bits), quad)
}

#[inline(always)]
fn both(a: [f32; 4], b: [f32; 4]) -> [f32; 8] {
    [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]]
}

/// The body of the wide kernels: `N` vectors a thread, which all are read before the first is used. `encode` makes the output of two quads
/// from their values and the number of the first.
#[inline(always)]
#[track_caller]
fn vectors<S: Source, T: Target, const N: usize>(
    x: In<u8>,
    out: Out<u8>,
    n: u64,
    encode: impl Fn([[f32; 4]; 2], u32) -> [u32; 4],
) {
    let size = vector(S::KIND, T::KIND);
    let (from, to) = (bytes(S::KIND), bytes(T::KIND));
    let tile = (THREADS * size * N as u32) as u64;
    let base = block_idx_x() as u64 * tile;
    let left = (n - base).min(tile) as u32;
    let first_quad = (base / 4) as u32;
    let at = |i: usize| (i as u32 * THREADS + thread_idx()) * size;
    let (x, out) = (x.at(base * from as u64), out.at(base * to as u64));
    let raws: [[u32; 4]; N] = core::array::from_fn(|i| {
        if at(i) + size > left {
            return [0; 4];
        }
        let here = x.at((at(i) * from) as u64);
        match size * from {
            16 => here.load16(0),
            8 => {
                let [a, b] = here.load8(0);
                [a, b, 0, 0]
            }
            _ => [here.load4(0), 0, 0, 0],
        }
    });
    unroll!(i in N {
        if at(i) + size <= left {
            let quads = [S::quad(raws[i], 0), if size == 8 { S::quad(raws[i], 1) } else { [0.0; 4] }];
            let words = encode(quads, first_quad + at(i) / 4);
            let here = out.at((at(i) * to) as u64);
            match size * to {
                16 => here.store16(0, words),
                8 => here.store8(0, [words[0], words[1]]),
                _ => here.store4(0, words[0]),
            }
        }
    });
    // The last elements of all, fewer than a vector, as one or two quads.
    let done = left / size * size + 4 * thread_idx();
    if done < left {
        let quad = read_quad(S::KIND, x.at((done * from) as u64), left - done);
        let words = encode([quad, [0.0; 4]], first_quad + done / 4);
        write_quad(T::KIND, out.at((done * to) as u64), words, left - done);
    }
}

kernel! {
    op = cast;
    threads = 256, blocks = 8;
    /// `n` elements; `x` and `out` are aligned to vectors, see [`vector`].
    pub fn wide[S: Source, T: Target, const N: usize](x: In<u8>, out: Out<u8>, n: u64) {
        vectors::<S, T, N>(x, out, n, |quads, _| T::encode(both(quads[0], quads[1])));
    }
    entries {
        f32_bf16[F32, Bf16, { MORE_VECTORS }],
        f32_f16[F32, F16, { MORE_VECTORS }],
        f32_e4m3[F32, E4m3, { MORE_VECTORS }],
        bf16_f32[Bf16, F32, { VECTORS }],
        bf16_f16[Bf16, F16, { VECTORS }],
        bf16_e4m3[Bf16, E4m3, { MORE_VECTORS }],
        f16_f32[F16, F32, { VECTORS }],
        f16_bf16[F16, Bf16, { VECTORS }],
        f16_e4m3[F16, E4m3, { MORE_VECTORS }],
        e4m3_f32[E4m3, F32, { VECTORS }],
        e4m3_bf16[E4m3, Bf16, { VECTORS }],
        e4m3_f16[E4m3, F16, { VECTORS }],
    }
}

kernel! {
    op = cast;
    threads = 256, blocks = 6;
    /// As `wide`, rounded stochastically.
    pub fn stochastic[S: Source, T: StochasticTarget](x: In<u8>, out: Out<u8>, n: u64) {
        vectors::<S, T, 1>(x, out, n, |quads, quad| {
            let random = [random(quads[0], quad), random(quads[1], quad + 1)];
            T::encode_stochastic(both(quads[0], quads[1]), random)
        });
    }
    entries {
        f32_bf16[F32, Bf16],
        f32_e4m3[F32, E4m3],
        bf16_e4m3[Bf16, E4m3],
    }
}

kernel! {
    op = cast;
    threads = 256;
    /// Any two types by their numbers, any alignment. `stochastic`: to bf16 or e4m3.
    pub fn narrow(x: In<u8>, out: Out<u8>, n: u64, from: u32, to: u32, stochastic: u32) {
        let quad = block_idx_x() as u64 * THREADS as u64 + thread_idx() as u64;
        if 4 * quad >= n {
            return;
        }
        let count = (n - 4 * quad).min(4) as u32;
        let v = read_quad(from, x.at(4 * quad * bytes(from) as u64), count);
        let eight = both(v, [0.0; 4]);
        let words = if stochastic != 0 {
            let random = [random(v, quad as u32), [0; 2]];
            if to == KIND_BF16 { Bf16::encode_stochastic(eight, random) } else { E4m3::encode_stochastic(eight, random) }
        } else {
            match to {
                KIND_F32 => F32::encode(eight),
                KIND_BF16 => Bf16::encode(eight),
                KIND_F16 => F16::encode(eight),
                _ => E4m3::encode(eight),
            }
        };
        write_quad(to, out.at(4 * quad * bytes(to) as u64), words, count);
    }
}
