//! per_token_cast: quantise rows with one scale factor per `npc` consecutive channels, or per row.
//!
//! In    x bf16, f32 [t, h], or e4m3 [t, h], e2m1 [t, h/2] with scales    Out  data e4m3 [t, h] or e2m1 [t, h/2], sf [t, ceil(h/npc)]
//! Exact bitwise the specification's (quant.md 2): one f32 product, one rounding to nearest even.  NaN never is the amax.
//! Map   a block takes some rows of 512 channels, a lane a vector of 16 bytes or more side by side or below (`cast`, `recast`), or a
//!       row when it shares one scale (`rows`); scales given: as `cast`, without the maximum (`apply`).
//! Cost  h * (4, 2, 1 or 1/2) bytes read and h * (1 or 1/2) written a token, and the scales; memory bound.
//!
//! Scales of a block meet in shared memory and leave last. Column by column they are one word a row, and a store of four bytes costs
//! as much as one of 32, so a block has enough rows to fill sectors.

use crate::device::*;
pub use crate::quant::common::{E2m1, E4m3};
use crate::quant::common::{Scale, Target, scale, ue8m0};
use crate::{kernel, unroll};

/// Channels of a block of `cast`, `recast` and `apply`: whole packed words of every group.
pub const TILE: u32 = 512;
/// How a launch of `cast`, `recast` or `apply` is shaped: vectors of a lane, which all are read before the first is used, and threads
/// of a block.
pub type Shape = (usize, u32);
/// bf16 input: 8 rows a block, so that scales fill sectors.
pub const BF16_SHAPE: Shape = (2, 256);
/// f32 input: 8 rows a block.
pub const F32_SHAPE: Shape = (2, 512);
/// Quantised input: 16 rows a block.
pub const QUANTISED_SHAPE: Shape = (2, 256);
/// e2m1 to e2m1 where every lane's 32 channels share scales on both sides: 8 rows a block.
pub const PAIRS_SHAPE: Shape = (1, 128);
/// Narrow entries.
pub const NARROW_SHAPE: Shape = (1, 256);
/// Input whose scales are given.
pub const APPLY_SHAPE: Shape = (2, 256);
/// Tiles in y of the grid, whose limit is 65535; what is beyond goes to z.
const GRID_Y: u32 = 1 << 15;
/// Vectors of a lane of `rows`.
pub const ROW_VECTORS: usize = 4;
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
}

/// A format of the output.
pub trait Encode: Target {
    /// Eight values.
    fn eight(v: [f32; 8]) -> [u32; 2];

    /// Eight bf16 times a power of two, no product larger than the format's largest value.
    fn bf16x8(x: [u32; 4], factor: f32) -> [u32; 2];

    /// Sixteen e2m1 times `factor`.
    fn e2m1x16(x: [u32; 2], factor: f32) -> [u32; 4];
}

impl Encode for E4m3 {
    #[inline(always)]
    fn eight(v: [f32; 8]) -> [u32; 2] {
        [f32x4_to_e4m3x4([v[0], v[1], v[2], v[3]]), f32x4_to_e4m3x4([v[4], v[5], v[6], v[7]])]
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
        let x = x.cast::<u16>();
        let one = |i: u32| if i < channels { x.get(i) as u32 } else { 0 };
        core::array::from_fn(|i| one(2 * i as u32) | one(2 * i as u32 + 1) << 16)
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
        let x = x.cast::<u32>();
        core::array::from_fn(|i| if (i as u32) < channels { x.get(i as u32) } else { 0 })
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
}

/// The word of bytes `i` to `i + 3`; those from `bytes` on are not read and count as 0.
#[inline(always)]
#[track_caller]
fn load_bytes(x: In<u8>, i: u32, bytes: u32) -> u32 {
    let one = |j: u32| if i + j < bytes { (x.get(i + j) as u32) << (8 * j) } else { 0 };
    one(0) | one(1) | one(2) | one(3)
}

/// Bytes of `channels` channels of `bits` bits.
#[inline(always)]
const fn bytes(channels: u32, bits: u32) -> u64 {
    channels as u64 * bits as u64 / 8
}

/// A lane's vector at `channel`: whole if `WIDE`, where rows are whole numbers of aligned vectors, else as far as the row goes.
#[inline(always)]
#[track_caller]
fn load<S: Source, const WIDE: bool>(x: In<u8>, channel: u32, hidden: u32) -> S::Raw {
    if channel >= hidden {
        S::ZERO
    } else if WIDE {
        S::load(x)
    } else {
        S::load_part(x, hidden - channel)
    }
}

/// Write the codes of a lane's vector, see [`load`].
#[inline(always)]
#[track_caller]
fn store<S: Source, T: Encode, const WIDE: bool>(out: Out<u8>, codes: [u32; 4], channel: u32, hidden: u32) {
    let size = bytes(S::CHANNELS, T::BITS);
    if WIDE {
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

/// Grid and block of `cast`, `recast` and `apply`.
pub fn tile_config<S: Source>((vectors, threads): Shape, num_tokens: u32, hidden: u32) -> LaunchConfig {
    let down = ceil_div(num_tokens, tile_rows::<S>(vectors, threads));
    let y = down.min(GRID_Y);
    let z = if y == 0 { 0 } else { ceil_div(down, y) };
    LaunchConfig::grid([ceil_div(hidden, TILE), y, z], threads).shared(&tile_shared(tile_rows::<S>(vectors, threads)).0)
}

/// Shared memory of `cast` and `recast`: scales of the tile, of 16 channels at least.
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
    fn load<S: Source, const WIDE: bool>(self, x: In<u8>, num_tokens: u32, hidden: u32, stride: u64) -> [S::Raw; N] {
        core::array::from_fn(|i| {
            if self.row::<S>(i) < num_tokens {
                load::<S, WIDE>(x.at(self.offset::<S>(i, stride, S::BITS)), self.channel::<S>(i), hidden)
            } else {
                S::ZERO
            }
        })
    }

    /// Quantise and write this lane's vectors; `factor` gives that of each.
    #[inline(always)]
    #[track_caller]
    fn store<S: Source, T: Encode, const SAFE: bool, const WIDE: bool>(
        self,
        out: Out<u8>,
        raw: [S::Raw; N],
        factor: impl Fn(usize) -> f32,
        num_tokens: u32,
        hidden: u32,
    ) {
        unroll!(i in N {
            let channel = self.channel::<S>(i);
            if self.row::<S>(i) < num_tokens && channel < hidden {
                let codes = S::encode::<T, SAFE>(raw[i], factor(i));
                store::<S, T, WIDE>(out.at(self.offset::<S>(i, bytes(hidden, T::BITS), T::BITS)), codes, channel, hidden);
            }
        });
    }
}

/// Largest values over groups of `2^lanes_log2` neighbouring lanes, which hold 16 to 128 channels.
#[inline(always)]
#[track_caller]
fn group_max<S: Source, const N: usize>(mut amax: [f32; N], lanes_log2: u32) -> [f32; N] {
    for step in 0..5 {
        let (always, never) = ((2 * S::CHANNELS) << step <= 16, (2 * S::CHANNELS) << step > 128);
        if always || (!never && lanes_log2 > step) {
            amax = amax.map(|m| max_total(m, warp_shuffle_xor(m, 1 << step)));
        }
    }
    amax
}

/// Whether scales are rounded to powers of two: narrow entries, which are not made for speed, leave it to the argument.
#[inline(always)]
fn rounds<const ROUND: bool, const WIDE: bool>(round: u32) -> bool {
    if WIDE { ROUND } else { round != 0 }
}

/// [`scale`] with the choice at run time.
#[inline(always)]
fn scale_of<T: Target>(amax: f32, round: bool) -> Scale {
    if round { scale::<T, true>(amax) } else { scale::<T, false>(amax) }
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
    /// Column by column, as one word for each row: a scale, or four exponents.
    scales: Shared<u32>,
}

impl SfOut {
    /// Collect the scales of this lane's vectors; `amax` holds the largest values of their groups.
    #[inline(always)]
    #[track_caller]
    fn collect<S: Source, T: Encode, const N: usize, const THREADS: u32>(
        self,
        tile: Tile<N, THREADS>,
        amax: [f32; N],
        round: bool,
        hidden: u32,
    ) {
        // A group starts at the same lane in all vectors.
        if (lane_id() * S::CHANNELS) & ((1 << self.npc_log2) - 1) != 0 {
            return;
        }
        let rows = tile_rows::<S>(N, THREADS);
        unroll!(i in N {
            let (row, group) = (tile.row_in_tile::<S>(i), tile.channel_in_tile::<S>(i) >> self.npc_log2);
            let sf = scale_of::<T>(amax[i], round).sf;
            if round && self.packed {
                // Groups beyond the end of the row count as 0.
                let exponent = if tile.channel::<S>(i) < hidden { ue8m0(sf) } else { 0 };
                self.scales.cast::<u8>().set((group / 4 * rows + row) * 4 + group % 4, exponent as u8);
            } else {
                self.scales.set(group * rows + row, sf.to_bits());
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
                self.sf.cast::<u32>().set(at, self.scales.get(column * rows + row));
            }
            i += THREADS;
        }
    }
}

kernel! {
    op = per_token_cast;
    threads = 512, blocks = 4;
    /// Plain input. `x_stride` counts bytes. Groups of `2^npc_log2` channels share a scale. `round`, only looked at by narrow
    /// entries: scales are powers of two. `with_data = 0`: only the scales are written.
    pub fn cast[S: Source, T: Encode, const ROUND: bool, const WIDE: bool, const N: usize, const THREADS: u32](
        x: In<u8>, out: Out<u8>, sf: Out<u8>, x_stride: u64, num_tokens: u32, hidden: u32, npc_log2: u32, round: u32,
        with_data: u32, sf_row_stride: u32, sf_col_stride: u32, sf_packed: u32,
    ) {
        let tile = Tile::<N, THREADS>::of_block::<S>();
        let round = rounds::<ROUND, WIDE>(round);
        let raw = tile.load::<S, WIDE>(x, num_tokens, hidden, x_stride);
        let amax = group_max::<S, N>(raw.map(S::amax), npc_log2 - S::CHANNELS.trailing_zeros());
        let (_, scales) = tile_shared(tile_rows::<S>(N, THREADS));
        let to = SfOut { sf, row_stride: sf_row_stride, col_stride: sf_col_stride, packed: sf_packed != 0, npc_log2, scales };
        to.collect::<S, T, N, THREADS>(tile, amax, round, hidden);
        if with_data != 0 {
            // Each scale is made where it is used, which saves registers.
            tile.store::<S, T, ROUND, WIDE>(out, raw, |i| scale_of::<T>(amax[i], round).inv, num_tokens, hidden);
        }
        block_sync();
        to.write::<S, N, THREADS>(tile, num_tokens, hidden);
    }
    entries {
        bf16_e4m3[Bf16, E4m3, false, true, { BF16_SHAPE.0 }, { BF16_SHAPE.1 }],
        bf16_e4m3_round[Bf16, E4m3, true, true, { BF16_SHAPE.0 }, { BF16_SHAPE.1 }],
        bf16_e4m3_narrow[Bf16, E4m3, false, false, { NARROW_SHAPE.0 }, { NARROW_SHAPE.1 }],
        bf16_e2m1[Bf16, E2m1, false, true, { BF16_SHAPE.0 }, { BF16_SHAPE.1 }],
        bf16_e2m1_round[Bf16, E2m1, true, true, { BF16_SHAPE.0 }, { BF16_SHAPE.1 }],
        bf16_e2m1_narrow[Bf16, E2m1, false, false, { NARROW_SHAPE.0 }, { NARROW_SHAPE.1 }],
        f32_e4m3[F32, E4m3, false, true, { F32_SHAPE.0 }, { F32_SHAPE.1 }],
        f32_e4m3_round[F32, E4m3, true, true, { F32_SHAPE.0 }, { F32_SHAPE.1 }],
        f32_e4m3_narrow[F32, E4m3, false, false, { NARROW_SHAPE.0 }, { NARROW_SHAPE.1 }],
        f32_e2m1[F32, E2m1, false, true, { F32_SHAPE.0 }, { F32_SHAPE.1 }],
        f32_e2m1_round[F32, E2m1, true, true, { F32_SHAPE.0 }, { F32_SHAPE.1 }],
        f32_e2m1_narrow[F32, E2m1, false, false, { NARROW_SHAPE.0 }, { NARROW_SHAPE.1 }],
    }
}

kernel! {
    op = per_token_cast;
    threads = 256, blocks = 4;
    /// Quantised input with a scale for each `2^x_npt_log2` rows by `2^x_npc_log2` channels, at least 16 of them. Strides of `x_sf`
    /// count words, which hold one scale, or four if packed.
    pub fn recast[S: Source, T: Encode, const ROUND: bool, const WIDE: bool, const N: usize, const THREADS: u32](
        x: In<u8>, x_sf: In<u32>, out: Out<u8>, sf: Out<u8>, x_stride: u64, num_tokens: u32, hidden: u32, npc_log2: u32,
        round: u32, x_sf_row_stride: u32, x_sf_col_stride: u32, x_sf_packed: u32, x_npt_log2: u32, x_npc_log2: u32,
        sf_row_stride: u32, sf_col_stride: u32, sf_packed: u32,
    ) {
        let tile = Tile::<N, THREADS>::of_block::<S>();
        let round = rounds::<ROUND, WIDE>(round);
        let raw = tile.load::<S, WIDE>(x, num_tokens, hidden, x_stride);
        // Warps start at the first channel of a row, so all vectors of a lane have the same channels.
        let channel = tile.channel::<S>(0);
        let block = channel >> x_npc_log2;
        let column = if x_sf_packed != 0 { block / 4 } else { block };
        let x_sf = x_sf.at(column as u64 * x_sf_col_stride as u64);
        let input_scale = |row: u32| {
            if row >= num_tokens || channel >= hidden {
                return 0.0;
            }
            // One word either way; of a packed one, a byte becomes the exponent.
            let word = x_sf.get((row >> x_npt_log2) * x_sf_row_stride);
            let exponent = ((word >> (block % 4 * 8)) << 23) & 0x7f80_0000;
            f32::from_bits(if x_sf_packed != 0 { exponent } else { word })
        };
        // The rows of a lane are among four aligned ones, so they share a block of four rows and more.
        let x_sf: [f32; N] = if N == 1 || x_npt_log2 >= 2 {
            [input_scale(tile.row::<S>(0)); N]
        } else {
            core::array::from_fn(|i| input_scale(tile.row::<S>(i)))
        };
        let products = core::array::from_fn(|i| S::amax(raw[i]) * x_sf[i]);
        let amax = group_max::<S, N>(products, npc_log2 - S::CHANNELS.trailing_zeros());
        let (_, scales) = tile_shared(tile_rows::<S>(N, THREADS));
        let to = SfOut { sf, row_stride: sf_row_stride, col_stride: sf_col_stride, packed: sf_packed != 0, npc_log2, scales };
        to.collect::<S, T, N, THREADS>(tile, amax, round, hidden);
        // Zeros in a block of large scale: the factor may overflow, and zero times infinity would be NaN.
        let factor = |i: usize| min_total(x_sf[i] * scale_of::<T>(amax[i], round).inv, f32::MAX);
        tile.store::<S, T, false, WIDE>(out, raw, factor, num_tokens, hidden);
        block_sync();
        to.write::<S, N, THREADS>(tile, num_tokens, hidden);
    }
    entries {
        e4m3_e4m3[E4m3, E4m3, false, true, { QUANTISED_SHAPE.0 }, { QUANTISED_SHAPE.1 }],
        e4m3_e4m3_round[E4m3, E4m3, true, true, { QUANTISED_SHAPE.0 }, { QUANTISED_SHAPE.1 }],
        e4m3_e4m3_narrow[E4m3, E4m3, false, false, { NARROW_SHAPE.0 }, { NARROW_SHAPE.1 }],
        e4m3_e2m1[E4m3, E2m1, false, true, { QUANTISED_SHAPE.0 }, { QUANTISED_SHAPE.1 }],
        e4m3_e2m1_round[E4m3, E2m1, true, true, { QUANTISED_SHAPE.0 }, { QUANTISED_SHAPE.1 }],
        e4m3_e2m1_narrow[E4m3, E2m1, false, false, { NARROW_SHAPE.0 }, { NARROW_SHAPE.1 }],
        e2m1_e4m3[E2m1, E4m3, false, true, { QUANTISED_SHAPE.0 }, { QUANTISED_SHAPE.1 }],
        e2m1_e4m3_round[E2m1, E4m3, true, true, { QUANTISED_SHAPE.0 }, { QUANTISED_SHAPE.1 }],
        e2m1_e4m3_narrow[E2m1, E4m3, false, false, { NARROW_SHAPE.0 }, { NARROW_SHAPE.1 }],
        e2m1_e2m1[E2m1, E2m1, false, true, { QUANTISED_SHAPE.0 }, { QUANTISED_SHAPE.1 }],
        e2m1_e2m1_round[E2m1, E2m1, true, true, { QUANTISED_SHAPE.0 }, { QUANTISED_SHAPE.1 }],
        e2m1_e2m1_narrow[E2m1, E2m1, false, false, { NARROW_SHAPE.0 }, { NARROW_SHAPE.1 }],
        e2m1x32_e2m1_round[E2m1x32, E2m1, true, true, { PAIRS_SHAPE.0 }, { PAIRS_SHAPE.1 }],
    }
}

kernel! {
    op = per_token_cast;
    threads = 512, blocks = 2;
    /// Plain input, one scale a row, one block a row. `sf_packed`: the scale is a word with one exponent byte.
    pub fn rows[S: Source, T: Encode, const ROUND: bool, const WIDE: bool](
        x: In<u8>, out: Out<u8>, sf: Out<u8>, x_stride: u64, hidden: u32, round: u32, sf_row_stride: u32, sf_packed: u32,
    ) {
        let (_, scratch) = rows_shared();
        let round = rounds::<ROUND, WIDE>(round);
        let row = block_idx_x();
        let x = x.at(row as u64 * x_stride);
        let out = out.at(row as u64 * bytes(hidden, T::BITS));
        let channel = |i: u32| (thread_idx() + i * block_dim()) * S::CHANNELS;
        let read = |at: u32| load::<S, WIDE>(x.at(bytes(at, S::BITS)), at, hidden);
        let held: [S::Raw; ROW_VECTORS] = core::array::from_fn(|i| read(channel(i as u32)));
        let mut amax = held.iter().fold(0.0, |m, raw| max_total(m, S::amax(*raw)));
        // A row that is longer than what the threads can hold is read twice, the second time from L2.
        let mut at = channel(ROW_VECTORS as u32);
        while at < hidden {
            amax = max_total(amax, S::amax(read(at)));
            at += block_dim() * S::CHANNELS;
        }
        let scale = scale_of::<T>(block_max(amax, scratch), round);
        let write = |raw: S::Raw, at: u32| {
            if at < hidden {
                let codes = S::encode::<T, ROUND>(raw, scale.inv);
                store::<S, T, WIDE>(out.at(bytes(at, T::BITS)), codes, at, hidden);
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
            let word = if round && sf_packed != 0 { ue8m0(scale.sf) } else { scale.sf.to_bits() };
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
    /// Plain input and given scales, one for `2^npc_log2` channels.
    pub fn apply[S: Source, T: Encode, const WIDE: bool, const N: usize, const THREADS: u32](
        x: In<u8>, sf: In<f32>, out: Out<u8>, x_stride: u64, num_tokens: u32, hidden: u32, npc_log2: u32,
        sf_row_stride: u32, sf_col_stride: u32,
    ) {
        let tile = Tile::<N, THREADS>::of_block::<S>();
        let raw = tile.load::<S, WIDE>(x, num_tokens, hidden, x_stride);
        let sf: [f32; N] = core::array::from_fn(|i| {
            let (row, channel) = (tile.row::<S>(i), tile.channel::<S>(i));
            let inside = row < num_tokens && channel < hidden;
            if inside { sf.get(row * sf_row_stride + (channel >> npc_log2) * sf_col_stride) } else { 1.0 }
        });
        tile.store::<S, T, false, WIDE>(out, raw, |i| 1.0 / sf[i], num_tokens, hidden);
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
