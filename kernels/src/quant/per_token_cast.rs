//! per_token_cast: quantise rows with one scale factor per `npc` consecutive channels, or per row.
//!
//! In    x bf16, f32 [t, h], or e4m3 [t, h], e2m1 [t, h/2] with scales    Out  data e4m3 [t, h] or e2m1 [t, h/2], sf [t, ceil(h/npc)]
//! Exact bitwise the specification's (quant.md 2): one f32 product, one rounding to nearest even, or a stochastic one whose random
//!       bits are a hash of four products (quant.md 6.3).  NaN never is the amax.
//! Map   a block takes some rows of 512 channels, a lane a vector of 16 bytes or more side by side or below (`cast`, `recast`), or a
//!       row when it shares one scale (`rows`); scales given: as `cast`, without the maximum (`apply`). `cast_any` and `recast_any`
//!       are the same for any alignment and every kind of scale, decided at run time.
//! Cost  h * (4, 2, 1 or 1/2) bytes read and h * (1 or 1/2) written a token, and the scales; memory bound.
//!
//! Scales of a block meet in shared memory and leave last. Column by column they are one word a row, and a store of four bytes costs
//! as much as one of 32, so a block has enough rows to fill sectors. Where there are few rows in all, a block has one of them and its
//! lanes write their scales at once: more blocks, less code and no barrier.

use crate::device::*;
use crate::quant::common::{self, Scale, Target, load_bf16s, load_bytes, load_f32s, scale, scale_e4m3, ue8m0};
pub use crate::quant::common::{E2m1, E4m3};
use crate::{kernel, unroll};

/// Channels of a block of `cast`, `recast` and `apply`: whole packed words of every group.
pub const TILE: u32 = 512;
/// How a launch of `cast`, `recast` or `apply` is shaped: vectors of a lane, which all are read before the first is used, and threads
/// of a block.
pub type Shape = (usize, u32);
/// bf16 input: 8 rows a block, so that scales fill sectors.
pub const BF16_SHAPE: Shape = (2, 256);
/// f32 input: 4 rows a block.
pub const F32_SHAPE: Shape = (4, 128);
/// A row a block, so that few rows make many blocks. Their scales go to memory directly: no barrier, and less code to fetch.
pub const FEW_BF16_SHAPE: Shape = (1, 64);
/// See [`FEW_BF16_SHAPE`].
pub const FEW_F32_SHAPE: Shape = (1, 128);
/// e4m3 to e4m3: 8 rows a block.
pub const E4M3_SHAPE: Shape = (2, 128);
/// See [`FEW_BF16_SHAPE`].
pub const FEW_E4M3_SHAPE: Shape = (1, 32);
/// Other quantised input: 16 rows a block.
pub const QUANTISED_SHAPE: Shape = (2, 256);
/// e2m1 to e2m1 where every lane's 32 channels share scales on both sides: 8 rows a block.
pub const PAIRS_SHAPE: Shape = (1, 128);
/// Plain bf16 input of any alignment: 8 rows a block.
pub const ANY_BF16_SHAPE: Shape = (1, 512);
/// Plain f32 input of any alignment: 8 rows a block.
pub const ANY_F32_SHAPE: Shape = (2, 512);
/// Quantised input of any alignment: 8 rows a block.
pub const ANY_QUANTISED_SHAPE: Shape = (1, 256);
/// Narrow entries of `apply`.
pub const NARROW_SHAPE: Shape = (1, 256);
/// Input whose scales are given.
pub const APPLY_SHAPE: Shape = (2, 256);
/// Tiles in y of the grid, whose limit is 65535; what is beyond goes to z.
const GRID_Y: u32 = 1 << 15;
/// Vectors of a lane of `rows`.
pub const ROW_VECTORS: usize = 4;
/// Scales are f32, the exact quotients (quant.md 2a).
pub const EXACT: u32 = 0;
/// Scales are powers of two (2b, 2c).
pub const POWERS: u32 = 1;
/// Scales are e4m3 (2d).
pub const E4M3_SF: u32 = 2;
/// In place of one of these three: an argument of the kernel decides.
pub(super) const AT_RUN_TIME: u32 = 3;
/// How the scales of a quantised input are stored: f32, exponent bytes in words of four, e4m3.
pub const X_SF_F32: u32 = 0;
/// See [`X_SF_F32`].
pub const X_SF_PACKED: u32 = 1;
/// See [`X_SF_F32`].
pub const X_SF_E4M3: u32 = 2;
/// Most threads of a block of `rows`. Rows of up to [`ROW_VECTORS`] vectors for each of them are read once.
pub const MAX_ROW_THREADS: u32 = 512;

/// A format of the input, and how one lane reads its share of it: a vector.
pub trait Source: Copy {
    /// Channels of a vector; divides the number of channels that share a scale.
    const CHANNELS: u32;
    /// Bits of a channel.
    const BITS: u32;
    /// What was read.
    type Raw: Copy;
    /// A vector of zeros.
    const ZERO: Self::Raw;

    /// The vector at `x`, which is aligned to its size.
    fn load(x: In<u8>) -> Self::Raw;

    /// The first `channels` channels of the vector at `x`, which is aligned to one channel, and zeros.
    fn load_part(x: In<u8>, channels: u32) -> Self::Raw;

    /// Largest magnitude.
    fn amax(raw: Self::Raw) -> f32;

    /// The channels times `factor`, in the format `T`, packed from the low end. `SAFE`: `factor` is a power of two and no product
    /// exceeds what `T` can hold.
    fn encode<T: Encode, const SAFE: bool>(raw: Self::Raw, factor: f32) -> [u32; 4];

    /// The values of four channels, from `4 * quad` on.
    fn quad(raw: Self::Raw, quad: usize) -> [f32; 4];
}

/// A format of the output.
pub trait Encode: Target {
    /// Eight values.
    fn eight(v: [f32; 8]) -> [u32; 2];

    /// Eight bf16 times a power of two, no product larger than the format's largest value.
    fn bf16x8(x: [u32; 4], factor: f32) -> [u32; 2];

    /// Eight values, rounded stochastically; a random word for each four.
    fn eight_stochastic(v: [f32; 8], random: [u32; 2]) -> [u32; 2];

    /// Sixteen e2m1 times `factor`.
    fn e2m1x16(x: [u32; 2], factor: f32) -> [u32; 4];
}

/// The channels from `channel` on times `factor`, rounded stochastically and packed from the low end. The random bits of four channels are
/// a hash of their products and of their place in the row; the row does not count.
#[inline(always)]
fn encode_stochastic<S: Source, T: Encode>(raw: S::Raw, factor: f32, channel: u32) -> [u32; 4] {
    // A quad beyond the vector is zeros whose codes nobody uses.
    let quad = |i: usize| if 4 * i < S::CHANNELS as usize { S::quad(raw, i).map(|v| canonical(v * factor)) } else { [0.0; 4] };
    let eight = |i: usize| {
        let (a, b) = (quad(2 * i), quad(2 * i + 1));
        let random = |v: [f32; 4], i: usize| num::quad_hash(v.map(f32::to_bits), channel / 4 + i as u32)[0];
        T::eight_stochastic([a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]], [random(a, 2 * i), random(b, 2 * i + 1)])
    };
    let (front, back) = (eight(0), if S::CHANNELS > 8 { eight(1) } else { [0; 2] });
    if T::BITS == 8 { [front[0], front[1], back[0], back[1]] } else { [front[0], back[0], 0, 0] }
}

impl Encode for E4m3 {
    #[inline(always)]
    fn eight(v: [f32; 8]) -> [u32; 2] {
        [f32x4_to_e4m3x4([v[0], v[1], v[2], v[3]]), f32x4_to_e4m3x4([v[4], v[5], v[6], v[7]])]
    }

    #[inline(always)]
    fn eight_stochastic(v: [f32; 8], random: [u32; 2]) -> [u32; 2] {
        let (front, back) = ([v[0], v[1], v[2], v[3]], [v[4], v[5], v[6], v[7]]);
        [f32x4_to_e4m3x4_sr(front, random[0]), f32x4_to_e4m3x4_sr(back, random[1])]
    }

    #[inline(always)]
    fn bf16x8(x: [u32; 4], factor: f32) -> [u32; 2] {
        // The products are exact in bf16, so two are made at a time.
        let both = byte_permute(factor.to_bits(), 0, 0x3232);
        Self::eight(bf16x8_to_f32(x.map(|w| bf16x2_mul(w, both))))
    }

    #[inline(always)]
    fn e2m1x16(x: [u32; 2], factor: f32) -> [u32; 4] {
        // There are only eight magnitudes: their products, as bytes, are the table of a look-up of four codes at a time.
        let table = Self::eight(E2M1_MAGNITUDES.map(|v| v * factor));
        let (front, back) = (e2m1x8_map(x[0], table), e2m1x8_map(x[1], table));
        [front[0], front[1], back[0], back[1]]
    }
}

impl Encode for E2m1 {
    #[inline(always)]
    fn eight(v: [f32; 8]) -> [u32; 2] {
        [f32x8_to_e2m1x8(v), 0]
    }

    #[inline(always)]
    fn eight_stochastic(v: [f32; 8], random: [u32; 2]) -> [u32; 2] {
        [f32x8_to_e2m1x8_sr(v, random), 0]
    }

    #[inline(always)]
    fn bf16x8(x: [u32; 4], factor: f32) -> [u32; 2] {
        [bf16x8_to_e2m1x8(x, factor), 0]
    }

    #[inline(always)]
    fn e2m1x16(x: [u32; 2], factor: f32) -> [u32; 4] {
        // The new codes of the eight magnitudes, spread to bytes.
        let codes = f32x8_to_e2m1x8(E2M1_MAGNITUDES.map(|v| v * factor));
        let (even, odd) = (codes & 0x0f0f_0f0f, (codes >> 4) & 0x0f0f_0f0f);
        let (front, back) = (byte_permute(even, odd, 0x5140), byte_permute(even, odd, 0x7362));
        let eight = |word: u32| {
            let picked = word & 0x7777_7777;
            let (low, high) = (byte_permute(front, back, picked), byte_permute(front, back, picked >> 16));
            // Two bytes with one code each become one byte.
            let packed = byte_permute(low | low >> 4, high | high >> 4, 0x6420);
            packed | (word & 0x8888_8888)
        };
        [eight(x[0]), eight(x[1]), 0, 0]
    }
}

/// What the low three bits of an e2m1 mean.
const E2M1_MAGNITUDES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

#[inline(always)]
fn bf16x8_to_f32(x: [u32; 4]) -> [f32; 8] {
    let [a, b, c, d] = x.map(bf16x2_to_f32);
    [a[0], a[1], b[0], b[1], c[0], c[1], d[0], d[1]]
}

/// bf16 input.
#[derive(Clone, Copy)]
pub struct Bf16;
/// f32 input.
#[derive(Clone, Copy)]
pub struct F32;

impl Source for Bf16 {
    const CHANNELS: u32 = 8;
    const BITS: u32 = 16;
    type Raw = [u32; 4];
    const ZERO: [u32; 4] = [0; 4];

    #[inline(always)]
    #[track_caller]
    fn load(x: In<u8>) -> [u32; 4] {
        x.load16(0)
    }

    #[inline(always)]
    #[track_caller]
    fn load_part(x: In<u8>, channels: u32) -> [u32; 4] {
        load_bf16s(x, channels)
    }

    #[inline(always)]
    fn amax(x: [u32; 4]) -> f32 {
        let m = bf16x2_max_abs(bf16x2_max_abs(x[0], x[1]), bf16x2_max_abs(x[2], x[3]));
        let [a, b] = bf16x2_to_f32(m);
        max_total(a.abs(), b.abs())
    }

    #[inline(always)]
    fn encode<T: Encode, const SAFE: bool>(x: [u32; 4], factor: f32) -> [u32; 4] {
        let [a, b] = if SAFE { T::bf16x8(x, factor) } else { T::eight(bf16x8_to_f32(x).map(|v| v * factor)) };
        [a, b, 0, 0]
    }

    #[inline(always)]
    fn quad(x: [u32; 4], quad: usize) -> [f32; 4] {
        let ([a, b], [c, d]) = (bf16x2_to_f32(x[2 * quad]), bf16x2_to_f32(x[2 * quad + 1]));
        [a, b, c, d]
    }
}

impl Source for F32 {
    const CHANNELS: u32 = 4;
    const BITS: u32 = 32;
    type Raw = [u32; 4];
    const ZERO: [u32; 4] = [0; 4];

    #[inline(always)]
    #[track_caller]
    fn load(x: In<u8>) -> [u32; 4] {
        x.load16(0)
    }

    #[inline(always)]
    #[track_caller]
    fn load_part(x: In<u8>, channels: u32) -> [u32; 4] {
        load_f32s(x, channels)
    }

    #[inline(always)]
    fn amax(x: [u32; 4]) -> f32 {
        let [a, b, c, d] = x.map(|w| f32::from_bits(w).abs());
        max_total(max_total(a, b), max_total(c, d))
    }

    #[inline(always)]
    fn encode<T: Encode, const SAFE: bool>(x: [u32; 4], factor: f32) -> [u32; 4] {
        let [a, b, c, d] = x.map(|w| f32::from_bits(w) * factor);
        [T::eight([a, b, c, d, 0.0, 0.0, 0.0, 0.0])[0], 0, 0, 0]
    }

    #[inline(always)]
    fn quad(x: [u32; 4], _quad: usize) -> [f32; 4] {
        x.map(f32::from_bits)
    }
}

impl Source for E4m3 {
    const CHANNELS: u32 = 16;
    const BITS: u32 = 8;
    type Raw = [u32; 4];
    const ZERO: [u32; 4] = [0; 4];

    #[inline(always)]
    #[track_caller]
    fn load(x: In<u8>) -> [u32; 4] {
        x.load16(0)
    }

    #[inline(always)]
    #[track_caller]
    fn load_part(x: In<u8>, channels: u32) -> [u32; 4] {
        core::array::from_fn(|i| load_bytes(x, 4 * i as u32, channels))
    }

    #[inline(always)]
    fn amax(x: [u32; 4]) -> f32 {
        let m = x.map(|w| f16x2_max_abs(e4m3x2_to_f16x2(w & 0xffff), e4m3x2_to_f16x2(w >> 16)));
        let [a, b] = f16x2_to_f32(f16x2_max_abs(f16x2_max_abs(m[0], m[1]), f16x2_max_abs(m[2], m[3])));
        max_total(a.abs(), b.abs())
    }

    #[inline(always)]
    fn encode<T: Encode, const SAFE: bool>(x: [u32; 4], factor: f32) -> [u32; 4] {
        let [a, b, c, d] = x.map(|w| e4m3x4_to_f32(w).map(|v| v * factor));
        let front = T::eight([a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]]);
        let back = T::eight([c[0], c[1], c[2], c[3], d[0], d[1], d[2], d[3]]);
        if T::BITS == 8 { [front[0], front[1], back[0], back[1]] } else { [front[0], back[0], 0, 0] }
    }

    #[inline(always)]
    fn quad(x: [u32; 4], quad: usize) -> [f32; 4] {
        e4m3x4_to_f32(x[quad])
    }
}

impl Source for E2m1 {
    const CHANNELS: u32 = 16;
    const BITS: u32 = 4;
    type Raw = [u32; 2];
    const ZERO: [u32; 2] = [0; 2];

    #[inline(always)]
    #[track_caller]
    fn load(x: In<u8>) -> [u32; 2] {
        x.load8(0)
    }

    #[inline(always)]
    #[track_caller]
    fn load_part(x: In<u8>, channels: u32) -> [u32; 2] {
        core::array::from_fn(|i| load_bytes(x, 4 * i as u32, channels / 2))
    }

    #[inline(always)]
    fn amax(x: [u32; 2]) -> f32 {
        // Magnitudes order as their codes. Each shift brings another code to the top of its half, where what is below it does
        // not matter.
        let [a, b] = x.map(|w| {
            let w = w & 0x7777_7777;
            u16x2_max(u16x2_max(w, w << 4), u16x2_max(w << 8, w << 12))
        });
        let m = u16x2_max(a, b);
        num::e2m1_to_f32((u16x2_max(m, m << 16) >> 28) as u8)
    }

    #[inline(always)]
    fn encode<T: Encode, const SAFE: bool>(x: [u32; 2], factor: f32) -> [u32; 4] {
        T::e2m1x16(x, factor)
    }

    #[inline(always)]
    fn quad(x: [u32; 2], quad: usize) -> [f32; 4] {
        // The compiler decodes each word once.
        let v = e2m1x8_to_f32(x[quad / 2]);
        if quad.is_multiple_of(2) { [v[0], v[1], v[2], v[3]] } else { [v[4], v[5], v[6], v[7]] }
    }
}

/// e2m1 input on its way to e2m1, with scales of at least 32 channels on both sides: a table of the encoding serves twice as many.
#[derive(Clone, Copy)]
pub struct E2m1x32;

impl Source for E2m1x32 {
    const CHANNELS: u32 = 32;
    const BITS: u32 = 4;
    type Raw = [u32; 4];
    const ZERO: [u32; 4] = [0; 4];

    #[inline(always)]
    #[track_caller]
    fn load(x: In<u8>) -> [u32; 4] {
        x.load16(0)
    }

    #[inline(always)]
    #[track_caller]
    fn load_part(x: In<u8>, channels: u32) -> [u32; 4] {
        core::array::from_fn(|i| load_bytes(x, 4 * i as u32, channels / 2))
    }

    #[inline(always)]
    fn amax(x: [u32; 4]) -> f32 {
        max_total(E2m1::amax([x[0], x[1]]), E2m1::amax([x[2], x[3]]))
    }

    #[inline(always)]
    fn encode<T: Encode, const SAFE: bool>(x: [u32; 4], factor: f32) -> [u32; 4] {
        // The compiler makes the table once.
        let (front, back) = (T::e2m1x16([x[0], x[1]], factor), T::e2m1x16([x[2], x[3]], factor));
        [front[0], front[1], back[0], back[1]]
    }

    #[inline(always)]
    fn quad(x: [u32; 4], quad: usize) -> [f32; 4] {
        E2m1::quad([x[quad / 4 * 2], x[quad / 4 * 2 + 1]], quad % 4)
    }
}

/// Bytes of `channels` channels of `bits` bits.
#[inline(always)]
const fn bytes(channels: u32, bits: u32) -> u64 {
    channels as u64 * bits as u64 / 8
}

/// A lane's vector at `channel`: whole if `wide`, where rows are whole numbers of aligned vectors, else as far as the row goes.
#[inline(always)]
#[track_caller]
fn load<S: Source>(x: In<u8>, channel: u32, hidden: u32, wide: bool) -> S::Raw {
    if channel >= hidden {
        S::ZERO
    } else if wide {
        S::load(x)
    } else {
        S::load_part(x, hidden - channel)
    }
}

/// Write the codes of a lane's vector, see [`load`].
#[inline(always)]
#[track_caller]
fn store<S: Source, T: Encode>(out: Out<u8>, codes: [u32; 4], channel: u32, hidden: u32, wide: bool) {
    let size = bytes(S::CHANNELS, T::BITS);
    if wide {
        match size {
            16 => out.store16(0, codes),
            8 => out.store8(0, [codes[0], codes[1]]),
            4 => out.store4(0, codes[0]),
            _ => out.cast::<u16>().set(0, codes[0] as u16),
        }
    } else {
        let left = bytes((hidden - channel).min(S::CHANNELS), T::BITS);
        unroll!(i in 16 {
            if i < size as usize && i < left as usize {
                out.set(i as u32, (codes[i / 4] >> (i % 4 * 8)) as u8);
            }
        });
    }
}

/// Rows of a block of `threads` threads that hold `vectors` vectors each.
pub const fn tile_rows<S: Source>(vectors: usize, threads: u32) -> u32 {
    threads * vectors as u32 * S::CHANNELS / TILE
}

/// Grid and block of all kernels but `rows`.
pub fn tile_config<S: Source>((vectors, threads): Shape, num_tokens: u32, hidden: u32) -> LaunchConfig {
    let down = ceil_div(num_tokens, tile_rows::<S>(vectors, threads));
    let y = down.min(GRID_Y);
    let z = if y == 0 { 0 } else { ceil_div(down, y) };
    LaunchConfig::grid([ceil_div(hidden, TILE), y, z], threads).shared(&tile_shared(tile_rows::<S>(vectors, threads)).0)
}

/// Shared memory of all kernels but `rows`: scales of the tile, of 16 channels at least.
#[inline(always)]
fn tile_shared(rows: u32) -> (SharedLayout, Shared<u32>) {
    let mut layout = SharedLayout::new();
    let scales = layout.array(rows * (TILE / 16));
    (layout, scales)
}

/// Grid and block of `rows`: so many threads that each holds [`ROW_VECTORS`] vectors of the row.
pub fn rows_config<S: Source>(num_tokens: u32, hidden: u32) -> LaunchConfig {
    let threads = ceil_div(ceil_div(hidden, S::CHANNELS), ROW_VECTORS as u32);
    LaunchConfig::new(num_tokens, align_up(threads, WARP_SIZE).clamp(WARP_SIZE, MAX_ROW_THREADS)).shared(&rows_shared().0)
}

/// Shared memory of `rows`: one value a warp.
#[inline(always)]
fn rows_shared() -> (SharedLayout, Shared<f32>) {
    let mut layout = SharedLayout::new();
    let scratch = layout.array(WARP_SIZE);
    (layout, scratch)
}

/// Where the vectors of a lane lie: [`TILE`] channels of some rows, numbered row by row; a warp has `N * 32` neighbours.
#[derive(Clone, Copy)]
struct Tile<const N: usize, const THREADS: u32> {
    /// First row of the block.
    row: u32,
    /// First channel of the block.
    channel: u32,
}

impl<const N: usize, const THREADS: u32> Tile<N, THREADS> {
    /// The tile of this block.
    #[inline(always)]
    fn of_block<S: Source>() -> Self {
        let down = block_idx_z() * GRID_Y + block_idx_y();
        Self { row: down * tile_rows::<S>(N, THREADS), channel: block_idx_x() * TILE }
    }

    /// Number in the tile of this lane's vector `i`.
    #[inline(always)]
    fn number(self, i: usize) -> u32 {
        (warp_id() * N as u32 + i as u32) * WARP_SIZE + lane_id()
    }

    /// Row within the tile of vector `i`.
    #[inline(always)]
    fn row_in_tile<S: Source>(self, i: usize) -> u32 {
        self.number(i) / (TILE / S::CHANNELS)
    }

    /// First channel within the tile of this lane's vector `i`.
    #[inline(always)]
    fn channel_in_tile<S: Source>(self, i: usize) -> u32 {
        self.number(i) % (TILE / S::CHANNELS) * S::CHANNELS
    }

    /// Row of vector `i`.
    #[inline(always)]
    fn row<S: Source>(self, i: usize) -> u32 {
        self.row + self.row_in_tile::<S>(i)
    }

    /// First channel of this lane's vector `i`.
    #[inline(always)]
    fn channel<S: Source>(self, i: usize) -> u32 {
        self.channel + self.channel_in_tile::<S>(i)
    }

    /// Where this lane's vector `i` lies in rows of `stride` bytes.
    #[inline(always)]
    fn offset<S: Source>(self, i: usize, stride: u64, bits: u32) -> u64 {
        self.row::<S>(i) as u64 * stride + bytes(self.channel::<S>(i), bits)
    }

    /// This lane's vectors.
    #[inline(always)]
    #[track_caller]
    fn load<S: Source>(self, x: In<u8>, num_tokens: u32, hidden: u32, stride: u64, wide: bool) -> [S::Raw; N] {
        core::array::from_fn(|i| {
            if self.row::<S>(i) < num_tokens {
                load::<S>(x.at(self.offset::<S>(i, stride, S::BITS)), self.channel::<S>(i), hidden, wide)
            } else {
                S::ZERO
            }
        })
    }

    /// Quantise and write this lane's vectors; `factor` gives that of each.
    #[inline(always)]
    #[track_caller]
    fn store<S: Source, T: Encode, const SAFE: bool, const STOCHASTIC: bool>(
        self,
        out: Out<u8>,
        raw: [S::Raw; N],
        factor: impl Fn(usize) -> f32,
        num_tokens: u32,
        hidden: u32,
        wide: bool,
    ) {
        unroll!(i in N {
            let channel = self.channel::<S>(i);
            if self.row::<S>(i) < num_tokens && channel < hidden {
                let codes = if STOCHASTIC {
                    encode_stochastic::<S, T>(raw[i], factor(i), channel)
                } else {
                    S::encode::<T, SAFE>(raw[i], factor(i))
                };
                store::<S, T>(out.at(self.offset::<S>(i, bytes(hidden, T::BITS), T::BITS)), codes, channel, hidden, wide);
            }
        });
    }
}

/// Largest values over groups of `2^lanes_log2` neighbouring lanes, which hold 16 to 128 channels. `SHORT`: fewer steps for groups of a
/// whole warp, by a branch that costs more than it gains where there is much other code.
#[inline(always)]
#[track_caller]
pub(super) fn group_max<S: Source, const N: usize, const SHORT: bool>(mut amax: [f32; N], lanes_log2: u32) -> [f32; N] {
    // The whole warp: one instruction for five steps. A lane that has nothing but NaN has none to offer.
    if SHORT && S::CHANNELS == 4 && lanes_log2 == 5 {
        return amax.map(|m| warp_max_nonnegative(max_total(m, 0.0)));
    }
    for step in 0..5 {
        let (always, never) = ((2 * S::CHANNELS) << step <= 16, (2 * S::CHANNELS) << step > 128);
        if always || (!never && lanes_log2 > step) {
            amax = amax.map(|m| max_total(m, warp_shuffle_xor(m, 1 << step)));
        }
    }
    amax
}

/// What gives the scales of a lane's vectors, whose groups have the largest values `amax`. A scale by a rule known at compile time
/// is made anew wherever it is used, which saves registers; else once, which saves code.
#[inline(always)]
pub(super) fn scales<T: Target, const RULE: u32, const N: usize>(amax: [f32; N], rule: u32) -> impl Fn(usize) -> Scale {
    let make = move |amax: f32| match rule {
        EXACT => scale::<T, false>(amax),
        POWERS => scale::<T, true>(amax),
        _ => scale_e4m3::<T>(amax),
    };
    let made = if RULE == AT_RUN_TIME { amax.map(make) } else { [Scale { sf: 0.0, inv: 0.0 }; N] };
    move |i| if RULE == AT_RUN_TIME { made[i] } else { make(amax[i]) }
}

/// The scales of a tile and where they go, see [`SfLayout`](crate::quant::common::SfLayout).
#[derive(Clone, Copy)]
struct SfOut {
    sf: Out<u8>,
    row_stride: u32,
    col_stride: u32,
    packed: bool,
    /// A group has `2^npc_log2` channels.
    npc_log2: u32,
    /// [`EXACT`], [`POWERS`] or [`E4M3_SF`].
    rule: u32,
    /// Column by column, as one word for each row: a scale, or four exponents. Scales in e4m3 as bytes.
    scales: Shared<u32>,
}

impl SfOut {
    /// Collect the scales of this lane's vectors, which `sf` gives.
    #[inline(always)]
    #[track_caller]
    fn collect<S: Source, const N: usize, const THREADS: u32>(
        self,
        tile: Tile<N, THREADS>,
        sf: impl Fn(usize) -> f32,
        hidden: u32,
    ) {
        // A group starts at the same lane in all vectors.
        if (lane_id() * S::CHANNELS) & ((1 << self.npc_log2) - 1) != 0 {
            return;
        }
        let rows = tile_rows::<S>(N, THREADS);
        unroll!(i in N {
            let (row, group) = (tile.row_in_tile::<S>(i), tile.channel_in_tile::<S>(i) >> self.npc_log2);
            let sf = sf(i);
            if self.rule == POWERS && self.packed {
                // Groups beyond the end of the row count as 0.
                let exponent = if tile.channel::<S>(i) < hidden { ue8m0(sf) } else { 0 };
                self.scales.cast::<u8>().set((group / 4 * rows + row) * 4 + group % 4, exponent as u8);
            } else if self.rule == E4M3_SF {
                self.scales.cast::<u8>().set(group * rows + row, common::e4m3(sf) as u8);
            } else {
                self.scales.set(group * rows + row, sf.to_bits());
            }
        });
    }

    /// Write the scales of this lane's vectors, which `sf` gives, one by one.
    #[inline(always)]
    #[track_caller]
    fn write_each<S: Source, const N: usize, const THREADS: u32>(
        self,
        tile: Tile<N, THREADS>,
        sf: impl Fn(usize) -> f32,
        num_tokens: u32,
        hidden: u32,
    ) {
        unroll!(i in N {
            let (row, channel) = (tile.row::<S>(i), tile.channel::<S>(i));
            let group = channel >> self.npc_log2;
            // The first channel that a word of scales stands for.
            let first = if self.packed { (group & !3) << self.npc_log2 } else { channel };
            if channel & ((1 << self.npc_log2) - 1) == 0 && row < num_tokens && first < hidden {
                let at = row * self.row_stride + if self.packed { group / 4 } else { group } * self.col_stride;
                if self.rule == POWERS && self.packed {
                    // Groups beyond the end of the row count as 0.
                    self.sf.set(at * 4 + group % 4, if channel < hidden { ue8m0(sf(i)) } else { 0 } as u8);
                } else if self.rule == E4M3_SF {
                    self.sf.set(at, common::e4m3(sf(i)) as u8);
                } else {
                    self.sf.cast::<u32>().set(at, sf(i).to_bits());
                }
            }
        });
    }

    /// Write what the block collected, after a barrier.
    #[inline(always)]
    #[track_caller]
    fn write<S: Source, const N: usize, const THREADS: u32>(self, tile: Tile<N, THREADS>, num_tokens: u32, hidden: u32) {
        let rows = tile_rows::<S>(N, THREADS);
        // Channels and columns that a word stands for.
        let word_log2 = self.npc_log2 + if self.packed { 2 } else { 0 };
        let columns_log2 = TILE.trailing_zeros() - word_log2;
        let first = tile.channel >> word_log2;
        let mut i = thread_idx();
        while i < rows << columns_log2 {
            // Neighbouring threads write neighbouring words.
            let by_rows = (i >> columns_log2, i & ((1 << columns_log2) - 1));
            let (row, column) = if self.col_stride == 1 { by_rows } else { (i % rows, i / rows) };
            if tile.row + row < num_tokens && (first + column) << word_log2 < hidden {
                let at = (tile.row + row) * self.row_stride + (first + column) * self.col_stride;
                if self.rule == E4M3_SF {
                    self.sf.set(at, self.scales.cast::<u8>().get(column * rows + row));
                } else {
                    self.sf.cast::<u32>().set(at, self.scales.get(column * rows + row));
                }
            }
            i += THREADS;
        }
    }
}

kernel! {
    op = per_token_cast;
    threads = 256, blocks = 6;
    /// Plain input whose rows are whole numbers of aligned vectors. `x_stride` counts bytes. Groups of `2^npc_log2` channels share a
    /// scale. `with_data = 0`: only the scales are written. Strides of `sf` count its elements.
    pub fn cast[S: Source, T: Encode, const RULE: u32, const N: usize, const THREADS: u32](
        x: In<u8>, out: Out<u8>, sf: Out<u8>, x_stride: u64, num_tokens: u32, hidden: u32, npc_log2: u32,
        with_data: u32, sf_row_stride: u32, sf_col_stride: u32, sf_packed: u32,
    ) {
        let (_, scales) = tile_shared(tile_rows::<S>(N, THREADS));
        let to = SfOut {
            sf, row_stride: sf_row_stride, col_stride: sf_col_stride, packed: sf_packed != 0, npc_log2, rule: RULE, scales,
        };
        cast_tile::<S, T, RULE, false, N, THREADS>(x, out, to, x_stride, num_tokens, hidden, with_data, true);
    }
    entries {
        bf16_e4m3[Bf16, E4m3, EXACT, { BF16_SHAPE.0 }, { BF16_SHAPE.1 }],
        bf16_e4m3_round[Bf16, E4m3, POWERS, { BF16_SHAPE.0 }, { BF16_SHAPE.1 }],
        bf16_e4m3_sf8[Bf16, E4m3, E4M3_SF, { BF16_SHAPE.0 }, { BF16_SHAPE.1 }],
        bf16_e2m1[Bf16, E2m1, EXACT, { BF16_SHAPE.0 }, { BF16_SHAPE.1 }],
        bf16_e2m1_round[Bf16, E2m1, POWERS, { BF16_SHAPE.0 }, { BF16_SHAPE.1 }],
        bf16_e2m1_sf8[Bf16, E2m1, E4M3_SF, { BF16_SHAPE.0 }, { BF16_SHAPE.1 }],
        f32_e4m3[F32, E4m3, EXACT, { F32_SHAPE.0 }, { F32_SHAPE.1 }],
        f32_e4m3_round[F32, E4m3, POWERS, { F32_SHAPE.0 }, { F32_SHAPE.1 }],
        f32_e4m3_sf8[F32, E4m3, E4M3_SF, { F32_SHAPE.0 }, { F32_SHAPE.1 }],
        f32_e2m1[F32, E2m1, EXACT, { F32_SHAPE.0 }, { F32_SHAPE.1 }],
        f32_e2m1_round[F32, E2m1, POWERS, { F32_SHAPE.0 }, { F32_SHAPE.1 }],
        f32_e2m1_sf8[F32, E2m1, E4M3_SF, { F32_SHAPE.0 }, { F32_SHAPE.1 }],
        bf16_e4m3_few[Bf16, E4m3, EXACT, { FEW_BF16_SHAPE.0 }, { FEW_BF16_SHAPE.1 }],
        bf16_e4m3_round_few[Bf16, E4m3, POWERS, { FEW_BF16_SHAPE.0 }, { FEW_BF16_SHAPE.1 }],
        f32_e4m3_few[F32, E4m3, EXACT, { FEW_F32_SHAPE.0 }, { FEW_F32_SHAPE.1 }],
        f32_e4m3_round_few[F32, E4m3, POWERS, { FEW_F32_SHAPE.0 }, { FEW_F32_SHAPE.1 }],
    }
}

kernel! {
    op = per_token_cast;
    threads = 512, blocks = 3;
    /// As `cast`, with any alignment unless `wide`, and scales by a rule at run time: [`EXACT`], [`POWERS`] or [`E4M3_SF`].
    pub fn cast_any[S: Source, T: Encode, const STOCHASTIC: bool, const N: usize, const THREADS: u32](
        x: In<u8>, out: Out<u8>, sf: Out<u8>, x_stride: u64, num_tokens: u32, hidden: u32, npc_log2: u32,
        with_data: u32, sf_row_stride: u32, sf_col_stride: u32, sf_packed: u32, rule: u32, wide: u32,
    ) {
        let (_, scales) = tile_shared(tile_rows::<S>(N, THREADS));
        let to =
            SfOut { sf, row_stride: sf_row_stride, col_stride: sf_col_stride, packed: sf_packed != 0, npc_log2, rule, scales };
        cast_tile::<S, T, AT_RUN_TIME, STOCHASTIC, N, THREADS>(x, out, to, x_stride, num_tokens, hidden, with_data, wide != 0);
    }
    entries {
        bf16_e4m3[Bf16, E4m3, false, { ANY_BF16_SHAPE.0 }, { ANY_BF16_SHAPE.1 }],
        bf16_e2m1[Bf16, E2m1, false, { ANY_BF16_SHAPE.0 }, { ANY_BF16_SHAPE.1 }],
        f32_e4m3[F32, E4m3, false, { ANY_F32_SHAPE.0 }, { ANY_F32_SHAPE.1 }],
        f32_e2m1[F32, E2m1, false, { ANY_F32_SHAPE.0 }, { ANY_F32_SHAPE.1 }],
        bf16_e4m3_stochastic[Bf16, E4m3, true, { ANY_BF16_SHAPE.0 }, { ANY_BF16_SHAPE.1 }],
        bf16_e2m1_stochastic[Bf16, E2m1, true, { ANY_BF16_SHAPE.0 }, { ANY_BF16_SHAPE.1 }],
        f32_e4m3_stochastic[F32, E4m3, true, { ANY_F32_SHAPE.0 }, { ANY_F32_SHAPE.1 }],
        f32_e2m1_stochastic[F32, E2m1, true, { ANY_F32_SHAPE.0 }, { ANY_F32_SHAPE.1 }],
    }
}

/// The body of `cast` and `cast_any`; without `with_data` only the scales are written.
#[inline(always)]
#[track_caller]
#[allow(clippy::too_many_arguments)]
fn cast_tile<S: Source, T: Encode, const RULE: u32, const STOCHASTIC: bool, const N: usize, const THREADS: u32>(
    x: In<u8>,
    out: Out<u8>,
    to: SfOut,
    x_stride: u64,
    num_tokens: u32,
    hidden: u32,
    with_data: u32,
    wide: bool,
) {
    let tile = Tile::<N, THREADS>::of_block::<S>();
    let raw = tile.load::<S>(x, num_tokens, hidden, x_stride, wide);
    let lanes_log2 = to.npc_log2 - S::CHANNELS.trailing_zeros();
    let amax = raw.map(S::amax);
    let amax =
        if RULE == AT_RUN_TIME { group_max::<S, N, false>(amax, lanes_log2) } else { group_max::<S, N, true>(amax, lanes_log2) };
    let scales = scales::<T, RULE, N>(amax, to.rule);
    let of_one_row = tile_rows::<S>(N, THREADS) == 1;
    if of_one_row {
        to.write_each::<S, N, THREADS>(tile, |i| scales(i).sf, num_tokens, hidden);
    } else {
        to.collect::<S, N, THREADS>(tile, |i| scales(i).sf, hidden);
    }
    if with_data != 0 {
        let factor = |i: usize| scales(i).inv;
        if RULE == POWERS {
            tile.store::<S, T, true, STOCHASTIC>(out, raw, factor, num_tokens, hidden, wide);
        } else {
            tile.store::<S, T, false, STOCHASTIC>(out, raw, factor, num_tokens, hidden, wide);
        }
    }
    if !of_one_row {
        block_sync();
        to.write::<S, N, THREADS>(tile, num_tokens, hidden);
    }
}

/// Where the scales of a quantised input are: one for each `2^npt_log2` rows by `2^npc_log2` channels, at least 16 of them.
#[derive(Clone, Copy)]
struct SfIn {
    sf: In<u32>,
    /// Strides in elements.
    row_stride: u32,
    col_stride: u32,
    /// [`X_SF_F32`], [`X_SF_PACKED`] or [`X_SF_E4M3`].
    kind: u32,
    npt_log2: u32,
    npc_log2: u32,
}

impl SfIn {
    /// What holds the scale of a row at a channel, as it lies in memory; outside the tensor, its first. There is no branch around the
    /// load: ptxas would move it behind what waits for the data, and few rows would take two latencies instead of one.
    #[inline(always)]
    #[track_caller]
    fn load(self, row: u32, channel: u32, inside: bool) -> u32 {
        let block = channel >> self.npc_log2;
        let column = if self.kind == X_SF_PACKED { block / 4 } else { block };
        let (row, column) = if inside { (row >> self.npt_log2, column) } else { (0, 0) };
        let offset = column as u64 * self.col_stride as u64;
        let at = row * self.row_stride;
        if self.kind == X_SF_E4M3 { self.sf.cast::<u8>().at(offset).get(at) as u32 } else { self.sf.at(offset).get(at) }
    }

    /// The scale at a channel in what was loaded; 0 outside the tensor.
    #[inline(always)]
    fn decode(self, raw: u32, channel: u32, inside: bool) -> f32 {
        let block = channel >> self.npc_log2;
        // One word either way; of a packed one, a byte becomes the exponent.
        let exponent = ((raw >> (block % 4 * 8)) << 23) & 0x7f80_0000;
        let value = match self.kind {
            X_SF_E4M3 => e4m3x2_to_f32(raw)[0],
            X_SF_PACKED => f32::from_bits(exponent),
            _ => f32::from_bits(raw),
        };
        if inside { value } else { 0.0 }
    }
}

kernel! {
    op = per_token_cast;
    threads = 256, blocks = 4;
    /// Quantised input whose rows are whole numbers of aligned vectors, with f32 or packed scales for each `2^x_npt_log2` rows by
    /// `2^x_npc_log2` channels, at least 16 of them. Strides of `x_sf` count words.
    pub fn recast[S: Source, T: Encode, const RULE: u32, const N: usize, const THREADS: u32](
        x: In<u8>, x_sf: In<u32>, out: Out<u8>, sf: Out<u8>, x_stride: u64, num_tokens: u32, hidden: u32, npc_log2: u32,
        x_sf_row_stride: u32, x_sf_col_stride: u32, x_sf_packed: u32, x_npt_log2: u32, x_npc_log2: u32,
        sf_row_stride: u32, sf_col_stride: u32, sf_packed: u32,
    ) {
        let kind = if x_sf_packed != 0 { X_SF_PACKED } else { X_SF_F32 };
        let from = SfIn {
            sf: x_sf, row_stride: x_sf_row_stride, col_stride: x_sf_col_stride, kind, npt_log2: x_npt_log2, npc_log2: x_npc_log2,
        };
        let (_, scales) = tile_shared(tile_rows::<S>(N, THREADS));
        let to = SfOut {
            sf, row_stride: sf_row_stride, col_stride: sf_col_stride, packed: sf_packed != 0, npc_log2, rule: RULE, scales,
        };
        recast_tile::<S, T, RULE, false, N, THREADS>(x, from, out, to, x_stride, num_tokens, hidden, true);
    }
    entries {
        e4m3_e4m3[E4m3, E4m3, EXACT, { E4M3_SHAPE.0 }, { E4M3_SHAPE.1 }],
        e4m3_e4m3_round[E4m3, E4m3, POWERS, { E4M3_SHAPE.0 }, { E4M3_SHAPE.1 }],
        e4m3_e4m3_few[E4m3, E4m3, EXACT, { FEW_E4M3_SHAPE.0 }, { FEW_E4M3_SHAPE.1 }],
        e4m3_e4m3_round_few[E4m3, E4m3, POWERS, { FEW_E4M3_SHAPE.0 }, { FEW_E4M3_SHAPE.1 }],
        e4m3_e2m1[E4m3, E2m1, EXACT, { QUANTISED_SHAPE.0 }, { QUANTISED_SHAPE.1 }],
        e4m3_e2m1_round[E4m3, E2m1, POWERS, { QUANTISED_SHAPE.0 }, { QUANTISED_SHAPE.1 }],
        e2m1_e4m3[E2m1, E4m3, EXACT, { QUANTISED_SHAPE.0 }, { QUANTISED_SHAPE.1 }],
        e2m1_e4m3_round[E2m1, E4m3, POWERS, { QUANTISED_SHAPE.0 }, { QUANTISED_SHAPE.1 }],
        e2m1_e2m1[E2m1, E2m1, EXACT, { QUANTISED_SHAPE.0 }, { QUANTISED_SHAPE.1 }],
        e2m1_e2m1_round[E2m1, E2m1, POWERS, { QUANTISED_SHAPE.0 }, { QUANTISED_SHAPE.1 }],
        e2m1x32_e2m1_round[E2m1x32, E2m1, POWERS, { PAIRS_SHAPE.0 }, { PAIRS_SHAPE.1 }],
    }
}

kernel! {
    op = per_token_cast;
    threads = 256, blocks = 4;
    /// As `recast`, with any alignment unless `wide`, input scales of any kind ([`X_SF_F32`], [`X_SF_PACKED`], [`X_SF_E4M3`]), whose
    /// strides count elements, and output scales by a rule at run time ([`EXACT`], [`POWERS`], [`E4M3_SF`]).
    pub fn recast_any[S: Source, T: Encode, const STOCHASTIC: bool, const N: usize, const THREADS: u32](
        x: In<u8>, x_sf: In<u32>, out: Out<u8>, sf: Out<u8>, x_stride: u64, num_tokens: u32, hidden: u32, npc_log2: u32,
        x_sf_row_stride: u32, x_sf_col_stride: u32, x_sf_kind: u32, x_npt_log2: u32, x_npc_log2: u32,
        sf_row_stride: u32, sf_col_stride: u32, sf_packed: u32, rule: u32, wide: u32,
    ) {
        let from = SfIn {
            sf: x_sf, row_stride: x_sf_row_stride, col_stride: x_sf_col_stride, kind: x_sf_kind, npt_log2: x_npt_log2,
            npc_log2: x_npc_log2,
        };
        let (_, scales) = tile_shared(tile_rows::<S>(N, THREADS));
        let to =
            SfOut { sf, row_stride: sf_row_stride, col_stride: sf_col_stride, packed: sf_packed != 0, npc_log2, rule, scales };
        recast_tile::<S, T, AT_RUN_TIME, STOCHASTIC, N, THREADS>(x, from, out, to, x_stride, num_tokens, hidden, wide != 0);
    }
    entries {
        e4m3_e4m3[E4m3, E4m3, false, { ANY_QUANTISED_SHAPE.0 }, { ANY_QUANTISED_SHAPE.1 }],
        e4m3_e2m1[E4m3, E2m1, false, { ANY_QUANTISED_SHAPE.0 }, { ANY_QUANTISED_SHAPE.1 }],
        e2m1_e4m3[E2m1, E4m3, false, { ANY_QUANTISED_SHAPE.0 }, { ANY_QUANTISED_SHAPE.1 }],
        e2m1_e2m1[E2m1, E2m1, false, { ANY_QUANTISED_SHAPE.0 }, { ANY_QUANTISED_SHAPE.1 }],
        e4m3_e4m3_stochastic[E4m3, E4m3, true, { ANY_QUANTISED_SHAPE.0 }, { ANY_QUANTISED_SHAPE.1 }],
        e4m3_e2m1_stochastic[E4m3, E2m1, true, { ANY_QUANTISED_SHAPE.0 }, { ANY_QUANTISED_SHAPE.1 }],
        e2m1_e4m3_stochastic[E2m1, E4m3, true, { ANY_QUANTISED_SHAPE.0 }, { ANY_QUANTISED_SHAPE.1 }],
        e2m1_e2m1_stochastic[E2m1, E2m1, true, { ANY_QUANTISED_SHAPE.0 }, { ANY_QUANTISED_SHAPE.1 }],
    }
}

/// The body of `recast` and `recast_any`.
#[inline(always)]
#[track_caller]
#[allow(clippy::too_many_arguments)]
fn recast_tile<S: Source, T: Encode, const RULE: u32, const STOCHASTIC: bool, const N: usize, const THREADS: u32>(
    x: In<u8>,
    from: SfIn,
    out: Out<u8>,
    to: SfOut,
    x_stride: u64,
    num_tokens: u32,
    hidden: u32,
    wide: bool,
) {
    let tile = Tile::<N, THREADS>::of_block::<S>();
    // Warps start at the first channel of a row, so all vectors of a lane have the same channels.
    let channel = tile.channel::<S>(0);
    let inside = |i: usize| tile.row::<S>(i) < num_tokens && channel < hidden;
    // Rows of a lane may share a scale; loading it again costs less than a branch, which would wait for it.
    let words: [u32; N] = core::array::from_fn(|i| from.load(tile.row::<S>(i), channel, inside(i)));
    let raw = tile.load::<S>(x, num_tokens, hidden, x_stride, wide);
    let x_sf: [f32; N] = core::array::from_fn(|i| from.decode(words[i], channel, inside(i)));
    let products = core::array::from_fn(|i| S::amax(raw[i]) * x_sf[i]);
    let amax = group_max::<S, N, false>(products, to.npc_log2 - S::CHANNELS.trailing_zeros());
    let scales = scales::<T, RULE, N>(amax, to.rule);
    let of_one_row = tile_rows::<S>(N, THREADS) == 1;
    if of_one_row {
        to.write_each::<S, N, THREADS>(tile, |i| scales(i).sf, num_tokens, hidden);
    } else {
        to.collect::<S, N, THREADS>(tile, |i| scales(i).sf, hidden);
    }
    // Zeros in a block of large scale: the factor may overflow, and zero times infinity would be NaN.
    let factor = |i: usize| min_total(x_sf[i] * scales(i).inv, f32::MAX);
    tile.store::<S, T, false, STOCHASTIC>(out, raw, factor, num_tokens, hidden, wide);
    if !of_one_row {
        block_sync();
        to.write::<S, N, THREADS>(tile, num_tokens, hidden);
    }
}

kernel! {
    op = per_token_cast;
    threads = 512, blocks = 2;
    /// Plain input, one scale a row, one block a row. `round`, only looked at by narrow entries: [`EXACT`] or [`POWERS`]. `sf_packed`:
    /// the scale is a word with one exponent byte.
    pub fn rows[S: Source, T: Encode, const ROUND: bool, const WIDE: bool](
        x: In<u8>, out: Out<u8>, sf: Out<u8>, x_stride: u64, hidden: u32, round: u32, sf_row_stride: u32, sf_packed: u32,
    ) {
        let (_, scratch) = rows_shared();
        let rule = if WIDE { ROUND as u32 } else { round };
        let row = block_idx_x();
        let x = x.at(row as u64 * x_stride);
        let out = out.at(row as u64 * bytes(hidden, T::BITS));
        let channel = |i: u32| (thread_idx() + i * block_dim()) * S::CHANNELS;
        let read = |at: u32| load::<S>(x.at(bytes(at, S::BITS)), at, hidden, WIDE);
        let held: [S::Raw; ROW_VECTORS] = core::array::from_fn(|i| read(channel(i as u32)));
        let mut amax = held.iter().fold(0.0, |m, raw| max_total(m, S::amax(*raw)));
        // A row that is longer than what the threads can hold is read twice, the second time from L2.
        let mut at = channel(ROW_VECTORS as u32);
        while at < hidden {
            amax = max_total(amax, S::amax(read(at)));
            at += block_dim() * S::CHANNELS;
        }
        let amax = block_max(amax, scratch);
        let scale = if rule == POWERS { scale::<T, true>(amax) } else { scale::<T, false>(amax) };
        let write = |raw: S::Raw, at: u32| {
            if at < hidden {
                let codes = S::encode::<T, ROUND>(raw, scale.inv);
                store::<S, T>(out.at(bytes(at, T::BITS)), codes, at, hidden, WIDE);
            }
        };
        unroll!(i in ROW_VECTORS {
            write(held[i], channel(i as u32));
        });
        let mut at = channel(ROW_VECTORS as u32);
        while at < hidden {
            write(read(at), at);
            at += block_dim() * S::CHANNELS;
        }
        if thread_idx() == 0 {
            let word = if rule == POWERS && sf_packed != 0 { ue8m0(scale.sf) } else { scale.sf.to_bits() };
            sf.cast::<u32>().set(row * sf_row_stride, word);
        }
    }
    entries {
        bf16_e4m3[Bf16, E4m3, false, true], bf16_e4m3_round[Bf16, E4m3, true, true],
        bf16_e2m1[Bf16, E2m1, false, true], bf16_e2m1_round[Bf16, E2m1, true, true],
        f32_e4m3[F32, E4m3, false, true], f32_e4m3_round[F32, E4m3, true, true],
        f32_e2m1[F32, E2m1, false, true], f32_e2m1_round[F32, E2m1, true, true],
        bf16_e4m3_narrow[Bf16, E4m3, false, false],
        bf16_e2m1_narrow[Bf16, E2m1, false, false],
        f32_e4m3_narrow[F32, E4m3, false, false],
        f32_e2m1_narrow[F32, E2m1, false, false],
    }
}

kernel! {
    op = per_token_cast;
    threads = 256, blocks = 8;
    /// Plain input and given scales, f32 or e4m3, one for `2^npc_log2` channels.
    pub fn apply[S: Source, T: Encode, const WIDE: bool, const N: usize, const THREADS: u32](
        x: In<u8>, sf: In<u8>, out: Out<u8>, x_stride: u64, num_tokens: u32, hidden: u32, npc_log2: u32,
        sf_row_stride: u32, sf_col_stride: u32, sf_e4m3: u32,
    ) {
        let tile = Tile::<N, THREADS>::of_block::<S>();
        let raw = tile.load::<S>(x, num_tokens, hidden, x_stride, WIDE);
        let sf: [f32; N] = core::array::from_fn(|i| {
            let (row, channel) = (tile.row::<S>(i), tile.channel::<S>(i));
            if row >= num_tokens || channel >= hidden {
                return 1.0;
            }
            let at = row * sf_row_stride + (channel >> npc_log2) * sf_col_stride;
            if sf_e4m3 != 0 { e4m3x2_to_f32(sf.get(at) as u32)[0] } else { sf.cast::<f32>().get(at) }
        });
        tile.store::<S, T, false, false>(out, raw, |i| 1.0 / sf[i], num_tokens, hidden, WIDE);
    }
    entries {
        bf16_e4m3[Bf16, E4m3, true, { APPLY_SHAPE.0 }, { APPLY_SHAPE.1 }],
        bf16_e2m1[Bf16, E2m1, true, { APPLY_SHAPE.0 }, { APPLY_SHAPE.1 }],
        f32_e4m3[F32, E4m3, true, { APPLY_SHAPE.0 }, { APPLY_SHAPE.1 }],
        f32_e2m1[F32, E2m1, true, { APPLY_SHAPE.0 }, { APPLY_SHAPE.1 }],
        bf16_e4m3_narrow[Bf16, E4m3, false, { NARROW_SHAPE.0 }, { NARROW_SHAPE.1 }],
        bf16_e2m1_narrow[Bf16, E2m1, false, { NARROW_SHAPE.0 }, { NARROW_SHAPE.1 }],
        f32_e4m3_narrow[F32, E4m3, false, { NARROW_SHAPE.0 }, { NARROW_SHAPE.1 }],
        f32_e2m1_narrow[F32, E2m1, false, { NARROW_SHAPE.0 }, { NARROW_SHAPE.1 }],
    }
}
