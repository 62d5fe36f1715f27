//! per_token_cast: quantise rows with one scale factor per `npc` consecutive channels, or per row.
//!
//! In    x bf16, f32 [t, h], or e4m3 [t, h], e2m1 [t, h/2] with scales    Out  data e4m3 [t, h] or e2m1 [t, h/2], sf [t, ceil(h/npc)]
//! Exact bitwise the specification's (quant.md 2): one f32 product, one rounding to nearest even.  NaN never is the amax.
//! Map   a warp takes four vectors of 32 lanes: along a row of plain input, down four rows of quantised input (`cast`, `recast`); a
//!       block takes a row when the row shares one scale (`rows`); scales given: as `cast`, without the maximum (`apply`).
//! Cost  h * (4, 2, 1 or 1/2) bytes read and h * (1 or 1/2) written a token, and the scales; memory bound.

use crate::device::*;
pub use crate::quant::common::{Divisor, E2m1, E4m3};
use crate::quant::common::{Scale, Target, scale, ue8m0};
use crate::{kernel, unroll};

/// Warps of a block of `cast`, `recast` and `apply`.
pub const WARPS: u32 = 8;
/// Vectors of a lane: 64 bytes in flight a thread, 64 to 128 KB an SM.
pub const VECTORS: usize = 4;
/// Most threads of a block of `rows`. Rows of up to [`VECTORS`] vectors for each of them are read once.
pub const MAX_ROW_THREADS: u32 = 512;
/// Warp tiles of one launch must stay below this, see [`Divisor`].
pub const MAX_TILES: u64 = 1 << 31;

/// A format of the input, and how one lane reads its share of it: a vector.
pub trait Source: Copy {
    /// Channels of a vector; divides the number of channels that share a scale.
    const CHANNELS: u32;
    /// Bits of a channel.
    const BITS: u32;
    /// Rows of a warp tile: 1, with [`VECTORS`] vectors side by side, or [`VECTORS`] with one each.
    const ROWS: u32;
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
        let eight = |codes: u32| {
            let picked = codes & 0x7777_7777;
            let (low, high) = (byte_permute(table[0], table[1], picked), byte_permute(table[0], table[1], picked >> 16));
            // The sign of an odd code is the top bit of its byte, that of an even one gets there by a shift.
            let (even, odd) = (codes << 4, codes);
            let signs = [byte_permute(even, odd, 0x5140), byte_permute(even, odd, 0x7362)];
            [low | (signs[0] & 0x8080_8080), high | (signs[1] & 0x8080_8080)]
        };
        let (front, back) = (eight(x[0]), eight(x[1]));
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
    const ROWS: u32 = 1;
    type Raw = [u32; 4];
    const ZERO: [u32; 4] = [0; 4];

    #[inline(always)]
    #[track_caller]
    fn load(x: In<u8>) -> [u32; 4] {
        x.load16_stream(0)
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
    const ROWS: u32 = 1;
    type Raw = [u32; 4];
    const ZERO: [u32; 4] = [0; 4];

    #[inline(always)]
    #[track_caller]
    fn load(x: In<u8>) -> [u32; 4] {
        x.load16_stream(0)
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
    const ROWS: u32 = VECTORS as u32;
    type Raw = [u32; 4];
    const ZERO: [u32; 4] = [0; 4];

    #[inline(always)]
    #[track_caller]
    fn load(x: In<u8>) -> [u32; 4] {
        x.load16_stream(0)
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
    const ROWS: u32 = VECTORS as u32;
    type Raw = [u32; 2];
    const ZERO: [u32; 2] = [0; 2];

    #[inline(always)]
    #[track_caller]
    fn load(x: In<u8>) -> [u32; 2] {
        x.load8_stream(0)
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
fn store<S: Source, T: Encode, const WIDE: bool, const STREAM: bool>(out: Out<u8>, codes: [u32; 4], channel: u32, hidden: u32) {
    let size = bytes(S::CHANNELS, T::BITS);
    if WIDE {
        match (size, STREAM) {
            (16, false) => out.store16(0, codes),
            (16, true) => out.store16_stream(0, codes),
            (8, false) => out.store8(0, [codes[0], codes[1]]),
            (8, true) => out.store8_stream(0, [codes[0], codes[1]]),
            (4, false) => out.store4(0, codes[0]),
            (4, true) => out.store4_stream(0, codes[0]),
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

/// How a launch of `cast`, `recast` or `apply` is cut into warp tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tiling {
    /// Tiles of the launch.
    pub num_tiles: u32,
    /// Tiles of a row, or of the rows of a tile.
    pub row_tiles: u32,
    /// Divides by `row_tiles`.
    pub divisor: Divisor,
}

impl Tiling {
    /// Tiles of `num_tokens` rows of `hidden` channels, at least 1; `None` when there are too many.
    pub fn new<S: Source>(num_tokens: u32, hidden: u32) -> Option<Self> {
        let vectors = VECTORS as u32 / S::ROWS;
        let row_tiles = ceil_div(hidden, vectors * 32 * S::CHANNELS);
        let num_tiles = ceil_div(num_tokens, S::ROWS) as u64 * row_tiles as u64;
        let divisor = Divisor::new(row_tiles);
        (num_tiles < MAX_TILES).then_some(Self { num_tiles: num_tiles as u32, row_tiles, divisor })
    }

    /// Grid and block.
    pub const fn config(&self) -> LaunchConfig {
        LaunchConfig::new(ceil_div(self.num_tiles, WARPS), WARPS * WARP_SIZE)
    }
}

/// Grid and block of `rows`: so many threads that each holds [`VECTORS`] vectors of the row.
pub fn rows_config<S: Source>(num_tokens: u32, hidden: u32) -> LaunchConfig {
    let threads = ceil_div(ceil_div(hidden, S::CHANNELS), VECTORS as u32);
    LaunchConfig::new(num_tokens, align_up(threads, WARP_SIZE).clamp(WARP_SIZE, MAX_ROW_THREADS)).shared(&rows_shared().0)
}

/// Shared memory of `rows`: one value a warp.
#[inline(always)]
fn rows_shared() -> (SharedLayout, Shared<f32>) {
    let mut layout = SharedLayout::new();
    let scratch = layout.array(WARP_SIZE);
    (layout, scratch)
}

/// Where a warp tile's vectors lie, for one lane.
#[derive(Clone, Copy)]
struct Tile {
    row: u32,
    /// Tile within the row.
    column: u32,
}

impl Tile {
    /// The tile of this warp, if there is one.
    #[inline(always)]
    fn of_warp(num_tiles: u32, row_tiles: u32, divisor: Divisor) -> Option<Self> {
        let tile = block_idx_x() * WARPS + warp_id();
        if tile >= num_tiles {
            return None;
        }
        let row = divisor.divide(tile);
        Some(Self { row, column: tile - row * row_tiles })
    }

    /// Whether there is a row for vector `i`.
    #[inline(always)]
    fn has_row<S: Source>(self, i: u32, num_tokens: u32) -> bool {
        S::ROWS == 1 || self.row::<S>(i) < num_tokens
    }

    /// Row of vector `i`.
    #[inline(always)]
    fn row<S: Source>(self, i: u32) -> u32 {
        if S::ROWS == 1 { self.row } else { self.row * S::ROWS + i }
    }

    /// First channel of vector `i` of lane 0.
    #[inline(always)]
    fn start<S: Source>(self, i: u32) -> u32 {
        (if S::ROWS == 1 { self.column * VECTORS as u32 + i } else { self.column }) * (32 * S::CHANNELS)
    }

    /// First channel of this lane's vector `i`.
    #[inline(always)]
    fn channel<S: Source>(self, i: u32) -> u32 {
        self.start::<S>(i) + lane_id() * S::CHANNELS
    }

    /// The address of this lane's vector `i` in rows of `stride` bytes, given that of vector 0: a constant away in the same row.
    #[inline(always)]
    fn step<S: Source>(i: u32, stride: u64, bits: u32) -> u64 {
        if S::ROWS == 1 { i as u64 * bytes(32 * S::CHANNELS, bits) } else { i as u64 * stride }
    }
}

/// This lane's four vectors.
#[inline(always)]
#[track_caller]
fn load_tile<S: Source, const WIDE: bool>(x: In<u8>, tile: Tile, num_tokens: u32, hidden: u32, stride: u64) -> [S::Raw; VECTORS] {
    let first = x.at(tile.row::<S>(0) as u64 * stride + bytes(tile.channel::<S>(0), S::BITS));
    core::array::from_fn(|i| {
        let i = i as u32;
        if tile.has_row::<S>(i, num_tokens) {
            load::<S, WIDE>(first.at(Tile::step::<S>(i, stride, S::BITS)), tile.channel::<S>(i), hidden)
        } else {
            S::ZERO
        }
    })
}

/// Quantise and write this lane's four vectors; `factor` gives that of each.
#[inline(always)]
#[track_caller]
fn store_tile<S: Source, T: Encode, const SAFE: bool, const WIDE: bool, const STREAM: bool>(
    out: Out<u8>,
    raw: [S::Raw; VECTORS],
    factor: impl Fn(usize) -> f32,
    tile: Tile,
    num_tokens: u32,
    hidden: u32,
) {
    let stride = bytes(hidden, T::BITS);
    let first = out.at(tile.row::<S>(0) as u64 * stride + bytes(tile.channel::<S>(0), T::BITS));
    unroll!(i in VECTORS {
        let (j, channel) = (i as u32, tile.channel::<S>(i as u32));
        if tile.has_row::<S>(j, num_tokens) && channel < hidden {
            let codes = S::encode::<T, SAFE>(raw[i], factor(i));
            store::<S, T, WIDE, STREAM>(first.at(Tile::step::<S>(j, stride, T::BITS)), codes, channel, hidden);
        }
    });
}

/// Largest values over groups of `2^lanes_log2` neighbouring lanes.
#[inline(always)]
#[track_caller]
fn group_max(mut amax: [f32; VECTORS], lanes_log2: u32) -> [f32; VECTORS] {
    for step in 0..5 {
        if lanes_log2 > step {
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

/// Where scales go, see [`SfLayout`](crate::quant::common::SfLayout).
#[derive(Clone, Copy)]
struct SfOut {
    sf: Out<u8>,
    row_stride: u32,
    col_stride: u32,
    packed: bool,
}

/// Write the scales of the tile's groups of `2^lanes_log2` lanes; `amax` holds the largest values of this lane's groups.
#[inline(always)]
#[track_caller]
fn store_scales<S: Source, T: Encode>(
    out: SfOut,
    amax: [f32; VECTORS],
    round: bool,
    lanes_log2: u32,
    tile: Tile,
    num_tokens: u32,
    hidden: u32,
) {
    let group = lane_id() >> lanes_log2;
    let groups_log2 = 5 - lanes_log2;
    let leads = group << lanes_log2 == lane_id();
    // First channel of this lane's group in vector `i`, and number of the group in its row.
    let start = |i: u32| tile.start::<S>(i) + (group << lanes_log2) * S::CHANNELS;
    let number = |i: u32| ((if S::ROWS == 1 { tile.column * VECTORS as u32 + i } else { tile.column }) << groups_log2) + group;
    if round && out.packed {
        // Byte `i` is the exponent of vector `i`; groups beyond the end of the row count as 0.
        let mut word = 0;
        unroll!(i in VECTORS {
            let exponent = if start(i as u32) < hidden { ue8m0(scale_of::<T>(amax[i], round).sf) } else { 0 };
            word |= exponent << (8 * i);
        });
        // A word of the output has four neighbouring groups of a row, which four groups of lanes hold for a vector: transpose
        // bytes within each four groups, so that group `i` of the four gets the word of vector `i`. Two groups of lanes, in a warp
        // of two, each get the word of two vectors; a lone group has its word already.
        if lanes_log2 < 5 {
            let other = warp_shuffle_xor(word, 1 << lanes_log2);
            let (even, odd) = if lanes_log2 == 4 { (0x5140, 0x3726) } else { (0x6240, 0x3715) };
            word = byte_permute(word, other, if group & 1 == 0 { even } else { odd });
        }
        if lanes_log2 < 4 {
            let other = warp_shuffle_xor(word, 2 << lanes_log2);
            word = byte_permute(word, other, if group & 2 == 0 { 0x5410 } else { 0x3276 });
        }
        let (vector, first) = if lanes_log2 < 4 { (group & 3, group & !3) } else { (0, 4 * group) };
        let number = ((if S::ROWS == 1 { tile.column * VECTORS as u32 + vector } else { tile.column }) << groups_log2) + first;
        let row = tile.row::<S>(vector);
        // Channels of a group: those of its lanes.
        let channel = (number << lanes_log2) * S::CHANNELS;
        if leads && tile.has_row::<S>(vector, num_tokens) && channel < hidden {
            out.sf.cast::<u32>().set(row * out.row_stride + number / 4 * out.col_stride, word);
        }
    } else if leads {
        unroll!(i in VECTORS {
            let j = i as u32;
            if tile.has_row::<S>(j, num_tokens) && start(j) < hidden {
                let at = tile.row::<S>(j) * out.row_stride + number(j) * out.col_stride;
                out.sf.cast::<f32>().set(at, scale_of::<T>(amax[i], round).sf);
            }
        });
    }
}

kernel! {
    op = per_token_cast;
    threads = 256, blocks = 6;
    /// Plain input. `x_stride` counts bytes. A group of `2^lanes_log2` lanes shares a scale. `round`, only looked at by narrow
    /// entries: scales are powers of two. `STREAM`: data are written to leave the caches first. `with_data = 0`: only the scales are written. Warp tile `i` is part `i % row_tiles` of
    /// row `i / row_tiles`.
    pub fn cast[S: Source, T: Encode, const ROUND: bool, const WIDE: bool, const STREAM: bool](
        x: In<u8>, out: Out<u8>, sf: Out<u8>, x_stride: u64, num_tokens: u32, hidden: u32, lanes_log2: u32, round: u32,
        with_data: u32, sf_row_stride: u32, sf_col_stride: u32, sf_packed: u32, num_tiles: u32, row_tiles: u32,
        row_magic: u32, row_shift: u32,
    ) {
        let Some(tile) = Tile::of_warp(num_tiles, row_tiles, Divisor { magic: row_magic, shift: row_shift }) else { return };
        let round = rounds::<ROUND, WIDE>(round);
        let raw = load_tile::<S, WIDE>(x, tile, num_tokens, hidden, x_stride);
        let amax = group_max(raw.map(S::amax), lanes_log2);
        let to = SfOut { sf, row_stride: sf_row_stride, col_stride: sf_col_stride, packed: sf_packed != 0 };
        store_scales::<S, T>(to, amax, round, lanes_log2, tile, num_tokens, hidden);
        if with_data != 0 {
            // Each scale is made where it is used, which saves registers.
            store_tile::<S, T, ROUND, WIDE, STREAM>(out, raw, |i| scale_of::<T>(amax[i], round).inv, tile, num_tokens, hidden);
        }
    }
    entries {
        bf16_e4m3[Bf16, E4m3, false, true, false], bf16_e4m3_round[Bf16, E4m3, true, true, false],
        bf16_e2m1[Bf16, E2m1, false, true, false], bf16_e2m1_round[Bf16, E2m1, true, true, false],
        f32_e4m3[F32, E4m3, false, true, false], f32_e4m3_round[F32, E4m3, true, true, false],
        f32_e2m1[F32, E2m1, false, true, false], f32_e2m1_round[F32, E2m1, true, true, false],
        bf16_e4m3_narrow[Bf16, E4m3, false, false, false],
        bf16_e2m1_narrow[Bf16, E2m1, false, false, false],
        f32_e4m3_narrow[F32, E4m3, false, false, false],
        f32_e2m1_narrow[F32, E2m1, false, false, false],
        bf16_e4m3_round_stream[Bf16, E4m3, true, true, true], f32_e4m3_round_stream[F32, E4m3, true, true, true],
        bf16_e2m1_round_stream[Bf16, E2m1, true, true, true],
    }
}

kernel! {
    op = per_token_cast;
    threads = 256, blocks = 4;
    /// Quantised input with a scale for each `2^npt_log2` rows by `2^npc_log2` channels, at least 16 of them. Strides of `x_sf` count
    /// words, which hold one scale, or four if packed. Warp tile `i` is part `i % row_tiles` of rows `4 * (i / row_tiles)` and on.
    pub fn recast[S: Source, T: Encode, const ROUND: bool, const WIDE: bool, const STREAM: bool](
        x: In<u8>, x_sf: In<u32>, out: Out<u8>, sf: Out<u8>, x_stride: u64, num_tokens: u32, hidden: u32, lanes_log2: u32,
        round: u32, x_sf_row_stride: u32, x_sf_col_stride: u32, x_sf_packed: u32, npt_log2: u32, npc_log2: u32,
        sf_row_stride: u32, sf_col_stride: u32, sf_packed: u32, num_tiles: u32, row_tiles: u32, row_magic: u32, row_shift: u32,
    ) {
        let Some(tile) = Tile::of_warp(num_tiles, row_tiles, Divisor { magic: row_magic, shift: row_shift }) else { return };
        let round = rounds::<ROUND, WIDE>(round);
        let raw = load_tile::<S, WIDE>(x, tile, num_tokens, hidden, x_stride);
        let channel = tile.channel::<S>(0);
        let block = channel >> npc_log2;
        let column = if x_sf_packed != 0 { block / 4 } else { block };
        let x_sf = x_sf.at(column as u64 * x_sf_col_stride as u64);
        let input_scale = |row: u32| {
            if row >= num_tokens || channel >= hidden {
                return 0.0;
            }
            // One word either way; of a packed one, a byte becomes the exponent.
            let word = x_sf.get((row >> npt_log2) * x_sf_row_stride);
            let exponent = ((word >> (block % 4 * 8)) << 23) & 0x7f80_0000;
            f32::from_bits(if x_sf_packed != 0 { exponent } else { word })
        };
        // The rows of a tile are the ones of four aligned rows, so they share a block of four rows and more.
        let x_sf: [f32; VECTORS] = if npt_log2 >= 2 {
            [input_scale(tile.row::<S>(0)); VECTORS]
        } else {
            core::array::from_fn(|i| input_scale(tile.row::<S>(i as u32)))
        };
        let amax = group_max(core::array::from_fn(|i| S::amax(raw[i]) * x_sf[i]), lanes_log2);
        let to = SfOut { sf, row_stride: sf_row_stride, col_stride: sf_col_stride, packed: sf_packed != 0 };
        store_scales::<S, T>(to, amax, round, lanes_log2, tile, num_tokens, hidden);
        // Zeros in a block of large scale: the factor may overflow, and zero times infinity would be NaN.
        let factor = |i: usize| min_total(x_sf[i] * scale_of::<T>(amax[i], round).inv, f32::MAX);
        store_tile::<S, T, false, WIDE, STREAM>(out, raw, factor, tile, num_tokens, hidden);
    }
    entries {
        e4m3_e4m3[E4m3, E4m3, false, true, false], e4m3_e4m3_round[E4m3, E4m3, true, true, false],
        e4m3_e2m1[E4m3, E2m1, false, true, false], e4m3_e2m1_round[E4m3, E2m1, true, true, false],
        e2m1_e4m3[E2m1, E4m3, false, true, false], e2m1_e4m3_round[E2m1, E4m3, true, true, false],
        e2m1_e2m1[E2m1, E2m1, false, true, false], e2m1_e2m1_round[E2m1, E2m1, true, true, false],
        e4m3_e4m3_narrow[E4m3, E4m3, false, false, false],
        e4m3_e2m1_narrow[E4m3, E2m1, false, false, false],
        e2m1_e4m3_narrow[E2m1, E4m3, false, false, false],
        e2m1_e2m1_narrow[E2m1, E2m1, false, false, false],
        e4m3_e4m3_round_stream[E4m3, E4m3, true, true, true], e2m1_e4m3_round_stream[E2m1, E4m3, true, true, true],
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
        let held: [S::Raw; VECTORS] = core::array::from_fn(|i| read(channel(i as u32)));
        let mut amax = held.iter().fold(0.0, |m, raw| max_total(m, S::amax(*raw)));
        // A row that is longer than what the threads can hold is read twice, the second time from L2.
        let mut at = channel(VECTORS as u32);
        while at < hidden {
            amax = max_total(amax, S::amax(read(at)));
            at += block_dim() * S::CHANNELS;
        }
        let scale = scale_of::<T>(block_max(amax, scratch), round);
        let write = |raw: S::Raw, at: u32| {
            if at < hidden {
                let codes = S::encode::<T, ROUND>(raw, scale.inv);
                store::<S, T, WIDE, false>(out.at(bytes(at, T::BITS)), codes, at, hidden);
            }
        };
        unroll!(i in VECTORS {
            write(held[i], channel(i as u32));
        });
        let mut at = channel(VECTORS as u32);
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
    threads = 256, blocks = 6;
    /// Plain input and given scales, one for `2^npc_log2` channels; tiles as in `cast`.
    pub fn apply[S: Source, T: Encode, const WIDE: bool](
        x: In<u8>, sf: In<f32>, out: Out<u8>, x_stride: u64, num_tokens: u32, hidden: u32, npc_log2: u32,
        sf_row_stride: u32, sf_col_stride: u32, num_tiles: u32, row_tiles: u32, row_magic: u32, row_shift: u32,
    ) {
        let Some(tile) = Tile::of_warp(num_tiles, row_tiles, Divisor { magic: row_magic, shift: row_shift }) else { return };
        let raw = load_tile::<S, WIDE>(x, tile, num_tokens, hidden, x_stride);
        let sf: [f32; VECTORS] = core::array::from_fn(|i| {
            let channel = tile.channel::<S>(i as u32);
            if channel < hidden { sf.get(tile.row * sf_row_stride + (channel >> npc_log2) * sf_col_stride) } else { 1.0 }
        });
        store_tile::<S, T, false, WIDE, false>(out, raw, |i| 1.0 / sf[i], tile, num_tokens, hidden);
    }
    entries {
        bf16_e4m3[Bf16, E4m3, true], bf16_e2m1[Bf16, E2m1, true], f32_e4m3[F32, E4m3, true], f32_e2m1[F32, E2m1, true],
        bf16_e4m3_narrow[Bf16, E4m3, false], bf16_e2m1_narrow[Bf16, E2m1, false],
        f32_e4m3_narrow[F32, E4m3, false], f32_e2m1_narrow[F32, E2m1, false],
    }
}
