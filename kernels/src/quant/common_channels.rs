//! What the casts with a scale for each channel share: tiles of 128 rows and 64 or 128 channels that stay in registers between maximum
//! and conversion.
//!
//! A thread holds the same few channels of some neighbouring rows. Its maxima meet those of the other threads in shared memory, from where
//! all threads make the scales, some together; from e4m3 one thread makes those of a channel.

use super::common::{E4m3, Scale, SfLayout, Target, load_bf16s, load_bytes, load_f32s, load_sf, scale, store_sf, ue8m0};
use super::common_swiglu::normal_quotient;
use crate::device::*;
use crate::unroll;

pub use super::common::Divisor;

/// Rows of a tile: four blocks of 32 or one of 128.
pub const ROWS: u32 = 128;
/// Rows of the smallest scaling block, and how many of those a tile has.
const UNIT: u32 = 32;
const UNITS: u32 = ROWS / UNIT;
/// Groups of columns of tiles in y of the grid, whose limit this is.
const GRID_Y: u32 = 65535;

/// An element type that can be cast, and a lane's share of a row: a vector.
pub trait Source: Copy {
    /// Bytes of a channel.
    const BYTES: u32;
    /// Channels of a vector.
    const CHANNELS: u32;
    /// Words that hold the largest magnitudes of a vector's channels.
    const WORDS: usize;
    /// Whether there are scales to multiply with.
    const SCALED: bool;
    /// Whether those are packed exponents.
    const PACKED: bool = false;
    /// A vector as it lies in memory.
    type Raw: Copy;
    /// A vector as it is held: products with their scale, if there is one.
    type Held: Copy;
    /// A vector of zeros.
    const ZERO: Self::Raw;

    /// The vector at `x`, which is aligned to its size.
    fn load(x: In<u8>) -> Self::Raw;
    /// The first `channels` channels of the vector at `x`, which is aligned to one channel, and zeros.
    fn load_part(x: In<u8>, channels: u32) -> Self::Raw;
    /// What is held of a vector.
    fn hold(raw: Self::Raw, sf: f32) -> Self::Held;
    /// The larger magnitudes of `max` and a vector; NaN where all are NaN. Signs in the result mean nothing.
    fn fold(max: [u32; 8], held: Self::Held) -> [u32; 8];
    /// The magnitudes of the first vector, to fold others into.
    fn start(held: Self::Held) -> [u32; 8];
    /// The larger magnitudes of two words of maxima.
    fn join(a: u32, b: u32) -> u32;
    /// The maximum of one of a word's channels. It may be NaN, which [`scale`] and `short_scale` take for nothing.
    fn maximum(word: u32, channel: u32) -> f32;
    /// The exact scale for a block whose largest magnitude is `amax`, as [`scale`] makes it, without the branches of its divisions.
    #[inline(always)]
    fn exact_scale(amax: f32) -> Scale {
        short_scale(amax)
    }
    /// The values of a vector; only the first [`CHANNELS`](Self::CHANNELS) mean something.
    fn values(held: Self::Held) -> [f32; 8];
}

/// bf16 input.
#[derive(Clone, Copy)]
pub struct Bf16;
/// f32 input.
#[derive(Clone, Copy)]
pub struct F32;
/// e4m3 input with scales for 16 or more channels of a row, f32 or packed exponents, held as products.
#[derive(Clone, Copy)]
pub struct Quantised<const PACKED: bool>;
/// The same, held as codes and scales: a third of the registers, and two and a half instructions a value more to make the products twice.
#[derive(Clone, Copy)]
pub struct Codes<const PACKED: bool>;

impl Source for Bf16 {
    const BYTES: u32 = 2;
    const CHANNELS: u32 = 8;
    const WORDS: usize = 4;
    const SCALED: bool = false;
    type Raw = [u32; 4];
    type Held = [u32; 4];
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
    fn hold(raw: [u32; 4], _: f32) -> [u32; 4] {
        raw
    }

    #[inline(always)]
    fn start([a, b, c, d]: [u32; 4]) -> [u32; 8] {
        [a, b, c, d, 0, 0, 0, 0]
    }

    #[inline(always)]
    fn fold(mut max: [u32; 8], held: [u32; 4]) -> [u32; 8] {
        unroll!(w in 4 { max[w] = bf16x2_max_abs(max[w], held[w]); });
        max
    }

    #[inline(always)]
    fn join(a: u32, b: u32) -> u32 {
        bf16x2_max_abs(a, b)
    }

    #[inline(always)]
    fn maximum(word: u32, channel: u32) -> f32 {
        f32::from_bits(if channel == 0 { word << 16 } else { word & 0xFFFF_0000 }).abs()
    }

    #[inline(always)]
    fn exact_scale(amax: f32) -> Scale {
        plain_scale(amax)
    }

    #[inline(always)]
    fn values(held: [u32; 4]) -> [f32; 8] {
        let [a, b, c, d] = held.map(bf16x2_to_f32);
        [a[0], a[1], b[0], b[1], c[0], c[1], d[0], d[1]]
    }
}

impl Source for F32 {
    const BYTES: u32 = 4;
    const CHANNELS: u32 = 4;
    const WORDS: usize = 4;
    const SCALED: bool = false;
    type Raw = [u32; 4];
    type Held = [u32; 4];
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
    fn hold(raw: [u32; 4], _: f32) -> [u32; 4] {
        raw
    }

    #[inline(always)]
    fn start([a, b, c, d]: [u32; 4]) -> [u32; 8] {
        [a, b, c, d, 0, 0, 0, 0]
    }

    #[inline(always)]
    fn fold(mut max: [u32; 8], held: [u32; 4]) -> [u32; 8] {
        unroll!(w in 4 { max[w] = Self::join(max[w], held[w]); });
        max
    }

    #[inline(always)]
    fn join(a: u32, b: u32) -> u32 {
        max_abs(f32::from_bits(a), f32::from_bits(b)).to_bits()
    }

    #[inline(always)]
    fn maximum(word: u32, _: u32) -> f32 {
        f32::from_bits(word).abs()
    }

    #[inline(always)]
    fn values([a, b, c, d]: [u32; 4]) -> [f32; 8] {
        [a, b, c, d, 0, 0, 0, 0].map(f32::from_bits)
    }
}

impl<const PACKED: bool> Source for Quantised<PACKED> {
    const BYTES: u32 = 1;
    const CHANNELS: u32 = 8;
    const WORDS: usize = 8;
    const SCALED: bool = true;
    const PACKED: bool = PACKED;
    type Raw = [u32; 2];
    type Held = [f32; 8];
    const ZERO: [u32; 2] = [0; 2];

    #[inline(always)]
    #[track_caller]
    fn load(x: In<u8>) -> [u32; 2] {
        x.load8(0)
    }

    #[inline(always)]
    #[track_caller]
    fn load_part(x: In<u8>, channels: u32) -> [u32; 2] {
        core::array::from_fn(|w| load_bytes(x, 4 * w as u32, channels))
    }

    #[inline(always)]
    fn hold(raw: [u32; 2], sf: f32) -> [f32; 8] {
        let [[a, b, c, d], [e, f, g, h]] = raw.map(e4m3x4_to_f32);
        [a, b, c, d, e, f, g, h].map(|v| v * sf)
    }

    #[inline(always)]
    fn start(held: [f32; 8]) -> [u32; 8] {
        held.map(f32::to_bits)
    }

    #[inline(always)]
    fn fold(mut max: [u32; 8], held: [f32; 8]) -> [u32; 8] {
        unroll!(w in 8 { max[w] = Self::join(max[w], held[w].to_bits()); });
        max
    }

    #[inline(always)]
    fn join(a: u32, b: u32) -> u32 {
        max_abs(f32::from_bits(a), f32::from_bits(b)).to_bits()
    }

    #[inline(always)]
    fn maximum(word: u32, _: u32) -> f32 {
        f32::from_bits(word).abs()
    }

    #[inline(always)]
    fn values(held: [f32; 8]) -> [f32; 8] {
        held
    }
}

impl<const PACKED: bool> Source for Codes<PACKED> {
    const BYTES: u32 = 1;
    const CHANNELS: u32 = 8;
    const WORDS: usize = 8;
    const SCALED: bool = true;
    const PACKED: bool = PACKED;
    type Raw = [u32; 2];
    type Held = ([u32; 2], f32);
    const ZERO: [u32; 2] = [0; 2];

    #[inline(always)]
    #[track_caller]
    fn load(x: In<u8>) -> [u32; 2] {
        x.load8(0)
    }

    #[inline(always)]
    #[track_caller]
    fn load_part(x: In<u8>, channels: u32) -> [u32; 2] {
        Quantised::<PACKED>::load_part(x, channels)
    }

    #[inline(always)]
    fn hold(raw: [u32; 2], sf: f32) -> ([u32; 2], f32) {
        (raw, sf)
    }

    #[inline(always)]
    fn start((raw, sf): ([u32; 2], f32)) -> [u32; 8] {
        Quantised::<PACKED>::start(Quantised::<PACKED>::hold(raw, sf))
    }

    #[inline(always)]
    fn fold(max: [u32; 8], (raw, sf): ([u32; 2], f32)) -> [u32; 8] {
        Quantised::<PACKED>::fold(max, Quantised::<PACKED>::hold(raw, sf))
    }

    #[inline(always)]
    fn join(a: u32, b: u32) -> u32 {
        Quantised::<PACKED>::join(a, b)
    }

    #[inline(always)]
    fn maximum(word: u32, channel: u32) -> f32 {
        Quantised::<PACKED>::maximum(word, channel)
    }

    #[inline(always)]
    fn values((raw, sf): ([u32; 2], f32)) -> [f32; 8] {
        // After the maxima, not since then.
        Quantised::<PACKED>::hold(raw.map(opaque), sf)
    }
}

/// Lanes that hold a row of a tile of `cols` channels.
#[inline(always)]
const fn row_lanes<S: Source>(cols: u32) -> u32 {
    cols / S::CHANNELS
}

/// Rows of a warp whose threads hold `vectors` rows each.
#[inline(always)]
const fn warp_rows<S: Source>(cols: u32, vectors: usize) -> u32 {
    WARP_SIZE / row_lanes::<S>(cols) * vectors as u32
}

/// Threads of a block that hold `vectors` rows each.
#[inline(always)]
pub const fn threads<S: Source>(cols: u32, vectors: usize) -> u32 {
    ROWS / warp_rows::<S>(cols, vectors) * WARP_SIZE
}

/// In which order blocks take the tiles: `width` neighbouring columns of tiles at a time, row by row. Rows that are read more than once are
/// still in the cache if those columns of all rows fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Order {
    /// Columns of tiles in a group.
    pub width: u32,
    /// Divides by `width`.
    pub divisor: Divisor,
}

impl Order {
    /// Groups of `width` columns of `cols` channels, or of as many as it takes for the grid to have room for all of `hidden` channels.
    pub const fn new(hidden: u32, cols: u32, width: u32) -> Self {
        let columns = ceil_div(hidden, cols);
        let least = ceil_div(columns, GRID_Y);
        let width = if width < least { least } else { width };
        let width = if width > columns { columns } else { width };
        let width = if width == 0 { 1 } else { width };
        Self { width, divisor: Divisor::new(width) }
    }

    /// Grid for `num_tokens` rows of `hidden` channels; `None` if it would have 2^31 blocks or more in x.
    pub const fn grid(self, num_tokens: u32, hidden: u32, cols: u32) -> Option<[u32; 3]> {
        let x = self.width as u64 * ceil_div(num_tokens, ROWS) as u64;
        if x >= 1 << 31 { None } else { Some([x as u32, ceil_div(ceil_div(hidden, cols), self.width), 1]) }
    }
}

/// What all threads of a block know.
#[derive(Clone, Copy)]
pub struct Tile {
    /// Number of the tile along the rows: its first row over [`ROWS`].
    pub index: u32,
    /// Its first channel.
    pub col: u32,
    /// Rows of the output.
    pub t: u32,
    /// Channels.
    pub h: u32,
}

impl Tile {
    /// The tile of this block; a group may have fewer columns than the grid has room for, and then there is none.
    #[inline(always)]
    pub fn of_block(t: u32, h: u32, cols: u32, order: Order) -> Option<Self> {
        let index = order.divisor.divide(block_idx_x());
        let col = (block_idx_y() * order.width + block_idx_x() - index * order.width) * cols;
        if col < h { Some(Self { index, col, t, h }) } else { None }
    }
}

/// Where the vectors of a lane are: the first of its neighbouring rows, and the first channel.
#[derive(Clone, Copy)]
pub struct Place {
    /// First row.
    pub row: u32,
    /// First channel.
    pub col: u32,
}

impl Place {
    /// Of the calling lane: neighbouring lanes take neighbouring vectors of a row.
    #[inline(always)]
    pub fn new<S: Source>(tile: Tile, cols: u32, vectors: usize) -> Self {
        let lanes = row_lanes::<S>(cols);
        Self {
            row: tile.index * ROWS + thread_idx() / lanes * vectors as u32,
            col: tile.col + thread_idx() % lanes * S::CHANNELS,
        }
    }
}

/// The input: rows `stride` elements apart, and scales of `1 << sf_shift` channels.
#[derive(Clone, Copy)]
pub struct Input {
    /// Data.
    pub x: In<u8>,
    /// Elements from one row to the next.
    pub stride: u32,
    /// Scales, if the source has some.
    pub sf: In<u8>,
    /// Where those are.
    pub sf_layout: SfLayout,
    /// Logarithm of the channels that share a scale.
    pub sf_shift: u32,
}

/// Where output row `row` comes from.
pub trait Rows: Copy {
    /// The input row, or `None` for a row of zeros.
    fn source(self, row: u32) -> Option<u32>;
}

/// Output rows are the input's.
#[derive(Clone, Copy)]
pub struct SameRows;

impl Rows for SameRows {
    #[inline(always)]
    fn source(self, row: u32) -> Option<u32> {
        Some(row)
    }
}

/// The vectors of a lane. Rows and channels outside of the tensor are replaced by its last ones: those are in the same scaling
/// blocks, or in some that do not exist, so the maxima stay right.
#[inline(always)]
#[track_caller]
pub fn load<S: Source, R: Rows, const N: usize, const WIDE: bool>(input: Input, rows: R, tile: Tile, at: Place) -> [S::Held; N] {
    let last = tile.t - 1;
    let sources: [Option<u32>; N] = core::array::from_fn(|i| rows.source((at.row + i as u32).min(last)));
    // Narrow rows end where they end.
    let last = if WIDE { tile.h - S::CHANNELS } else { tile.h };
    let col = if at.col < last { at.col } else { last };
    let from = input.x.at(col as u64 * S::BYTES as u64);
    let mut raw = [(S::ZERO, 0.0); N];
    unroll!(i in N {
        if let Some(row) = sources[i] {
            let from = if WIDE {
                // One instruction a row. The launcher sees to it that the product of 32 bits does.
                from.at(row as u64 * input.stride.wrapping_mul(S::BYTES) as u64)
            } else {
                from.at(row as u64 * input.stride as u64 * S::BYTES as u64)
            };
            raw[i].0 = if WIDE { S::load(from) } else { S::load_part(from, tile.h - col) };
            // Channels beyond the end have no scale.
            if S::SCALED && (WIDE || col < tile.h) {
                let k = col >> input.sf_shift;
                raw[i].1 = if S::PACKED {
                    load_sf::<true>(input.sf, input.sf_layout, row, k)
                } else {
                    load_sf::<false>(input.sf, input.sf_layout, row, k)
                };
            }
        }
    });
    // Not by `map`, which LLVM would leave in local memory for 64 products.
    let mut held = [S::hold(S::ZERO, 0.0); N];
    unroll!(i in N { held[i] = S::hold(raw[i].0, raw[i].1); });
    held
}

/// Shared memory of a block of `warps` warps: words of maxima, and what the channels of each block of 32 rows are multiplied by.
#[inline(always)]
pub const fn shared<S: Source>(cols: u32, warps: u32) -> (SharedLayout, Shared<u32>, Shared<f32>) {
    let mut layout = SharedLayout::new();
    let maxima = layout.array(maxima_at::<S>(cols, warps, groups::<S>(cols, warps)));
    let factors = layout.array(UNITS * cols);
    (layout, maxima, factors)
}

/// Groups of rows that have maxima of their own: the rows of a thread, or from e4m3 those of a warp.
#[inline(always)]
const fn groups<S: Source>(cols: u32, warps: u32) -> u32 {
    if S::SCALED { warps } else { warps * (WARP_SIZE / row_lanes::<S>(cols)) }
}

/// Words of maxima of a row of a tile.
#[inline(always)]
const fn maxima_words<S: Source>(cols: u32) -> u32 {
    row_lanes::<S>(cols) * S::WORDS as u32
}

/// Where the maxima of a group are. A thread joins [`READS`] neighbouring groups and its neighbour the next ones: those lie a few words
/// further, so that they are in other banks.
#[inline(always)]
const fn maxima_at<S: Source>(cols: u32, warps: u32, group: u32) -> u32 {
    let first = group * maxima_words::<S>(cols);
    if S::SCALED {
        return first;
    }
    // As many words as a warp has of those, but a multiple of a vector.
    let words = WARP_SIZE * READS / groups::<S>(cols, warps);
    first + group / READS * if words < 4 { 4 } else { words }
}

/// Groups whose maxima a thread joins.
const READS: u32 = 4;

/// Where scales go: row-major f32, or packed exponents, four scaling blocks of a channel in a word.
#[derive(Clone, Copy)]
pub struct ScaleOutput {
    /// The scales.
    pub sf: Out<u8>,
    /// Elements from one row of them to the next.
    pub stride: u32,
    /// Packed exponents.
    pub packed: bool,
    /// Powers of two.
    pub round: bool,
    /// Rows of a scaling block over 32: 1 or 4.
    pub units: u32,
}

/// Joins the maxima of the block, stores the scales of the tile and returns what the calling lane's channels are multiplied by. All
/// threads of the block call it.
#[inline(always)]
#[track_caller]
pub fn tile_factors<S: Source, const COLS: u32, const N: usize>(
    held: &[S::Held; N],
    tile: Tile,
    at: Place,
    to: ScaleOutput,
) -> [f32; 8] {
    let warps = threads::<S>(COLS, N) / WARP_SIZE;
    let (_, maxima, factors) = shared::<S>(COLS, warps);
    let mut max = S::start(held[0]);
    unroll!(i in N {
        if i > 0 {
            max = S::fold(max, held[i]);
        }
    });
    let lanes = row_lanes::<S>(COLS);
    if S::SCALED {
        // A warp that has several rows side by side joins them first.
        let mut mask = lanes;
        while mask < WARP_SIZE {
            unroll!(w in 8 { max[w] = S::join(max[w], warp_shuffle_xor(max[w], mask)); });
            mask *= 2;
        }
        if lane_id() < lanes {
            let first = maxima_at::<S>(COLS, warps, warp_id()) + lane_id() * S::WORDS as u32;
            maxima.store16(first, [max[0], max[1], max[2], max[3]]);
            maxima.store16(first + 4, [max[4], max[5], max[6], max[7]]);
        }
        block_sync();
        if thread_idx() < COLS {
            scales_by_channel::<S>(COLS, warps, tile, to);
        }
    } else {
        let group = thread_idx() / lanes;
        let first = maxima_at::<S>(COLS, warps, group) + thread_idx() % lanes * S::WORDS as u32;
        maxima.store16(first, [max[0], max[1], max[2], max[3]]);
        block_sync();
        // Each with its constants.
        if to.units == 1 {
            scales_by_word::<S, 1>(COLS, warps, tile, to);
        } else {
            scales_by_word::<S, UNITS>(COLS, warps, tile, to);
        }
    }
    block_sync();

    // Of rows that exist, because the others have no factors.
    let unit = if to.units == 1 { at.row.min(tile.t - 1) % ROWS / UNIT } else { 0 };
    let first = unit * COLS + (at.col - tile.col);
    let [a, b, c, d] = factors.load16(first);
    let [e, f, g, h] = if S::CHANNELS == 8 { factors.load16(first + 4) } else { [0; 4] };
    [a, b, c, d, e, f, g, h].map(f32::from_bits)
}

/// The scales of the calling thread's channel, one of `cols`.
#[inline(always)]
#[track_caller]
fn scales_by_channel<S: Source>(cols: u32, warps: u32, tile: Tile, to: ScaleOutput) {
    let (_, maxima, factors) = shared::<S>(cols, warps);
    let channel = thread_idx();
    let per_unit = warps / UNITS;
    let mut scales = Scales::new(to, tile, channel);
    let mut max = f32::NAN;
    // Units with rows, one after the other: unrolled, the divisions would take the driver long to compile.
    let end = (ceil_div(tile.t, UNIT) - tile.index * UNITS).min(UNITS);
    let mut unit = 0;
    let one = |i: u32| S::maximum(maxima.get(i * cols + channel), 0);
    let whole = to.units == UNITS;
    if whole {
        // At once, with one latency. Units without rows have the maxima of the last row.
        unroll!(i in 16 {
            if (i as u32) < warps {
                max = max_total(max, one(i as u32));
            }
        });
        unit = end - 1;
    }
    while unit < end {
        let mut i = 0;
        while i < per_unit && !whole {
            max = max_total(max, one(unit * per_unit + i));
            i += 1;
        }
        unit += 1;
        if to.units == 1 || unit == end {
            let scale = if to.round { scale::<E4m3, true>(max) } else { short_scale(max) };
            let first = if to.units == 1 { (unit - 1) * cols } else { 0 };
            factors.set(first + channel, scale.inv);
            scales.push(scale.sf);
            max = f32::NAN;
        }
    }
    scales.finish();
}

/// The same for blocks of `N` times 32 rows, all threads at once: neighbours share the channels of a word of maxima. Each joins four groups
/// of rows.
#[inline(always)]
#[track_caller]
fn scales_by_word<S: Source, const N: u32>(cols: u32, warps: u32, tile: Tile, to: ScaleOutput) {
    let (_, maxima, factors) = shared::<S>(cols, warps);
    // Lanes that share a word of a tile, or of 32 of its rows.
    let parts = groups::<S>(cols, warps) / READS;
    let (lanes, rows) = (parts / UNITS * N, UNIT * N);
    let (word, part) = (thread_idx() / parts, thread_idx() % parts);
    let first = maxima.slice(maxima_at::<S>(cols, warps, part * READS), READS * maxima_words::<S>(cols));
    let read = |i: u32| first.get(i * maxima_words::<S>(cols) + word);
    let mut max = S::join(S::join(read(0), read(1)), S::join(read(2), read(3)));
    let mut mask = 1;
    while mask < lanes {
        max = S::join(max, warp_shuffle_xor(max, mask));
        mask *= 2;
    }
    let (unit, first) = (part / lanes, part % lanes);
    let block = tile.index * (ROWS / rows) + unit;
    let channels = S::CHANNELS / S::WORDS as u32;
    // A tile has rows, but not all of its units do.
    let (sets, exists) = (first < channels, N == UNITS || block * rows < tile.t);
    let last = tile.t.wrapping_sub(block * rows) <= rows;
    let mut channel = first % channels;
    loop {
        rolled();
        let amax = S::maximum(max, channel);
        let scale = if to.round { scale::<E4m3, true>(amax) } else { S::exact_scale(amax) };
        let i = word * channels + channel;
        if sets {
            factors.set(unit * cols + i, scale.inv);
            if exists && tile.col + i < tile.h {
                // The scales of a channel make a column.
                let layout = SfLayout { row_stride: 1, col_stride: to.stride };
                store_sf(to.sf, layout, to.packed, scale.sf, (tile.col + i, block), last);
            }
        }
        channel += lanes;
        if lanes >= channels || channel >= channels {
            break;
        }
    }
}

/// `a / d`, given the reciprocal of `d` but for its last bits. One step of correction leaves an error of 2^-44, so this is the IEEE quotient
/// unless that is as close to a halfway point. For the numbers that come here it is not, but next to a divisor of 2 with gates around 2^-23;
/// tests run all of them. Subnormal quotients are by powers of two, whose reciprocals are exact.
#[doc(hidden)]
#[inline(always)]
pub fn short_quotient(a: f32, d: f32, reciprocal: f32) -> f32 {
    let q = a * reciprocal;
    // Exact. Where `a` or `d` is infinite it is NaN, and then a number that leaves the quotient as it is. If it is zero, its product with
    // the reciprocal of a negative `d` keeps the sign of a zero quotient.
    let remainder = min_total(fma(-d, q, a), f32::MAX);
    fma(remainder, reciprocal, q)
}

/// [`scale`] without rounding, for a bf16: the exact quotients without the tests of IEEE division.
#[doc(hidden)]
#[inline(always)]
pub fn plain_scale(amax: f32) -> Scale {
    let amax = max_total(amax, E4m3::AMAX_MIN);
    // Both scaled, so that the reciprocal of a huge number is not 0.
    let (largest, scaled) = (E4m3::MAX / 256.0, amax / 256.0);
    Scale { sf: short_quotient(amax, E4m3::MAX, 1.0 / E4m3::MAX), inv: short_quotient(largest, scaled, fast_rcp(scaled)) }
}

/// The exact scale for a block whose largest magnitude is `amax`, as [`scale`] makes it, without the branches of its divisions.
#[inline(always)]
fn short_scale(amax: f32) -> Scale {
    let c = max_total(amax, E4m3::AMAX_MIN);
    if c == f32::INFINITY {
        return Scale { sf: c, inv: 0.0 };
    }
    // The product with the rounded reciprocal, corrected by its remainder, is the quotient rounded to nearest.
    let reciprocal = 1.0 / E4m3::MAX;
    let sf = c * reciprocal;
    Scale { sf: fma(fma(-sf, E4m3::MAX, c), reciprocal, sf), inv: normal_quotient(E4m3::MAX, c) }
}

/// The scales of a channel of a tile on their way to memory.
#[derive(Clone, Copy)]
struct Scales {
    to: ScaleOutput,
    /// The channel; none of the tensor's if that is not smaller than `h`.
    col: u32,
    h: u32,
    /// The next scaling block, and how many there are in the tensor.
    block: u32,
    end: u32,
    /// Exponents of the blocks before, each in its byte of the word; the others are 0.
    word: u32,
}

impl Scales {
    #[inline(always)]
    fn new(to: ScaleOutput, tile: Tile, channel: u32) -> Self {
        let (block, end) = match to.units {
            1 => (tile.index * UNITS, ceil_div(tile.t, UNIT)),
            _ => (tile.index, ceil_div(tile.t, ROWS)),
        };
        Self { to, col: tile.col + channel, h: tile.h, block, end, word: 0 }
    }

    /// The scale of the next block.
    #[inline(always)]
    #[track_caller]
    fn push(&mut self, scale: f32) {
        self.word |= ue8m0(scale) << (self.block % 4 * 8);
        if !self.to.packed && self.col < self.h {
            self.to.sf.cast::<f32>().set(self.block * self.to.stride + self.col, scale);
        }
        self.block += 1;
    }

    /// Store exponents: the whole word if it is this tile's, else the byte, and zeros in what is left of the word after the last block.
    #[inline(always)]
    #[track_caller]
    fn finish(self) {
        if !self.to.packed || self.col >= self.h {
            return;
        }
        let last = self.block - 1;
        let word = last / 4 * self.to.stride + self.col;
        if self.to.units == 1 {
            self.to.sf.cast::<u32>().set(word, self.word);
            return;
        }
        let mut byte = last % 4;
        self.to.sf.set(word * 4 + byte, (self.word >> (byte * 8)) as u8);
        while self.block == self.end && byte < 3 {
            byte += 1;
            self.to.sf.set(word * 4 + byte, 0);
        }
    }
}

/// Quantise the vectors and store those whose rows and channels exist.
#[inline(always)]
#[track_caller]
pub fn store<S: Source, const N: usize, const WIDE: bool>(
    held: &[S::Held; N],
    factors: [f32; 8],
    out: Out<u8>,
    tile: Tile,
    at: Place,
) {
    if at.col >= tile.h {
        return;
    }
    // Unlike the rows themselves, neither is worth a register for each row while the scales are made.
    let rows = tile.t.saturating_sub(at.row);
    let mut out = out.at(at.row as u64 * tile.h as u64 + at.col as u64);
    unroll!(i in N {
        out = if i == 0 { out } else { out.at(tile.h as u64) };
        let values = S::values(held[i]);
        let v: [f32; 8] = core::array::from_fn(|j| values[j] * factors[j]);
        let low = f32x4_to_e4m3x4([v[0], v[1], v[2], v[3]]);
        let high = if S::CHANNELS == 8 { f32x4_to_e4m3x4([v[4], v[5], v[6], v[7]]) } else { 0 };
        // Not in the branch, so that nothing but the store depends on it.
        let (low, high) = if WIDE { (opaque(low), opaque(high)) } else { (low, high) };
        if (i as u32) < rows {
            if !WIDE {
                store_part(out, [low, high], (tile.h - at.col).min(S::CHANNELS));
            } else if S::CHANNELS == 8 {
                out.store8(0, [low, high]);
            } else {
                out.store4(0, low);
            }
        }
    });
}

/// The first `bytes` of eight bytes.
#[inline(always)]
#[track_caller]
fn store_part(out: Out<u8>, words: [u32; 2], bytes: u32) {
    unroll!(i in 8 {
        if (i as u32) < bytes {
            out.set(i as u32, (words[i / 4] >> (i % 4 * 8)) as u8);
        }
    });
}
