//! per_block_cast: quantise to e4m3 or e2m1 with one scale factor for each block of `npt` tokens by `npc` channels.
//!
//! In   x  bf16, f32 [t, h], any row stride      Out  data  e4m3 [t, h], e2m1 [t, h/2];  sf  f32, ue8m0 [ceil(t/npt), ceil(h/npc)]
//! Exact  bit for bit, quant.md 2; blocks at the edges take what there is; NaN does not count for a scale.
//! Map   a block per tile of whole scaling blocks, held in registers between maximum and conversion; the threads of a scaling
//!       block join their maxima in shared memory.
//! Cost  x read once, data and sf written once; 8 to 10 instructions a value, 16 from f32 to e2m1: memory bound.

use super::common::{self, E2m1, E4m3, Scale, SfLayout, Target, load_sf, scale};
use crate::device::*;
use crate::{kernel, unroll};

/// Threads of a block.
pub const THREADS: u32 = 256;
/// Threads of a block of [`cast_many`].
pub const MANY_THREADS: u32 = 512;
/// Threads of a block of [`cast_few`], for so few tokens that each tile has a multiprocessor: less work a thread and less code.
pub const FEW_THREADS: u32 = 512;
/// Side of the smallest scaling block.
const UNIT: u32 = 32;
/// Tiles in y of the grid, whose limit is 65535; what is beyond goes to z.
const GRID_Y: u32 = 1 << 15;

/// One block a tile of `tile` rows and columns, columns first: neighbours in x share DRAM pages.
pub fn config(num_tokens: u32, hidden: u32, tile: (u32, u32), threads: u32) -> LaunchConfig {
    let rows = ceil_div(num_tokens, tile.0);
    let y = if rows < GRID_Y { rows } else { GRID_Y };
    let z = if y == 0 { 0 } else { ceil_div(rows, y) };
    LaunchConfig::grid([ceil_div(hidden, tile.1), y, z], threads).shared(&shared().0)
}

/// Bits of the largest magnitude of each scaling block in a tile, 128 by 128 values at most.
#[inline(always)]
fn shared() -> (SharedLayout, Shared<u32>) {
    let mut layout = SharedLayout::new();
    let maxima = layout.array(WARP_SIZE);
    (layout, maxima)
}

/// An element type that can be cast. A lane holds `N` vectors of 16 bytes.
trait Source: Copy {
    /// Bytes of an element.
    const BYTES: u32;
    /// Four words from elements that need not be aligned to 16 bytes.
    fn gather(x: In<u8>) -> [u32; 4];
    /// Bits of the largest magnitude.
    fn amax<const N: usize>(held: &[[u32; 4]; N]) -> u32;
    /// Quantise and store the vectors whose rows exist. `SAFE`: `inv` is a power of two and no product exceeds the largest value.
    fn store<T: Target, const N: usize, const SAFE: bool>(held: &[[u32; 4]; N], inv: f32, out: Out<u8>, at: Place, shape: Shape);
}

/// Sizes of the tensor, and of its scaling blocks as powers of two.
#[derive(Clone, Copy)]
struct Shape {
    t: u32,
    h: u32,
    npt: u32,
    npc: u32,
}

#[derive(Clone, Copy)]
struct Bf16;
#[derive(Clone, Copy)]
struct F32;

/// Where the vectors of a lane are: the first row and its distance to the next, and the first channel.
#[derive(Clone, Copy)]
struct Place {
    row: u32,
    step: u32,
    col: u32,
}

/// Lanes that hold a row of a tile; a warp has at least one row.
#[inline(always)]
const fn row_lanes<X: Source, const COLS: u32>() -> u32 {
    COLS * X::BYTES / 16
}

impl Place {
    /// Of the calling lane in its tile: neighbouring lanes take neighbouring vectors of a row, and a warp neighbouring rows, all in
    /// the same scaling blocks.
    #[inline(always)]
    fn new<X: Source, const ROWS: u32, const COLS: u32, const N: usize>() -> Self {
        let lanes = row_lanes::<X, COLS>();
        let step = WARP_SIZE / lanes;
        let tile_row = (block_idx_z() * grid_dim_y() + block_idx_y()) * ROWS;
        Self {
            row: tile_row + warp_id() * (step * N as u32) + lane_id() / lanes,
            step,
            col: block_idx_x() * COLS + lane_id() % lanes * (16 / X::BYTES),
        }
    }

    /// Row of vector `i`.
    #[inline(always)]
    fn row(self, i: usize) -> u32 {
        self.row + i as u32 * self.step
    }

    /// Block row and block column of all the lane's vectors.
    #[inline(always)]
    fn block(self, shape: Shape) -> (u32, u32) {
        (self.row >> shape.npt, self.col >> shape.npc)
    }

    /// First row of the tile.
    #[inline(always)]
    fn tile_row<const ROWS: u32>(self) -> u32 {
        self.row & !(ROWS - 1)
    }
}

/// All vectors of a lane. Rows and columns outside of the tensor are replaced by its last ones: those are in the same scaling
/// block, or in one that does not exist, so the maxima stay right and no load needs a condition.
#[inline(always)]
fn load<X: Source, const N: usize, const ALIGNED: bool>(x: In<u8>, stride: u32, at: Place, shape: Shape) -> [[u32; 4]; N] {
    let last_col = shape.h - 16 / X::BYTES;
    let col = if at.col < last_col { at.col } else { last_col };
    core::array::from_fn(|i| {
        let row = if at.row(i) < shape.t { at.row(i) } else { shape.t - 1 };
        let from = x.at((row as u64 * stride as u64 + col as u64) * X::BYTES as u64);
        if ALIGNED { from.load16(0) } else { X::gather(from) }
    })
}

impl Source for Bf16 {
    const BYTES: u32 = 2;

    #[inline(always)]
    fn gather(x: In<u8>) -> [u32; 4] {
        let x = x.cast::<u16>();
        core::array::from_fn(|w| x.get(2 * w as u32) as u32 | (x.get(2 * w as u32 + 1) as u32) << 16)
    }

    #[inline(always)]
    fn amax<const N: usize>(held: &[[u32; 4]; N]) -> u32 {
        // Four chains, one for each word of a vector. They start from a number, so no NaN is left.
        let mut max = [0; 4];
        for v in held {
            max = core::array::from_fn(|w| bf16x2_max_abs(max[w], v[w]));
        }
        let [a, b, c, d] = max;
        let max = bf16x2_max_abs(bf16x2_max_abs(a, b), bf16x2_max_abs(c, d));
        let (low, high) = (max << 16 & 0x7FFF_0000, max & 0x7FFF_0000);
        if low > high { low } else { high }
    }

    #[inline(always)]
    fn store<T: Target, const N: usize, const SAFE: bool>(held: &[[u32; 4]; N], inv: f32, out: Out<u8>, at: Place, shape: Shape) {
        unroll!(i in N {
            let row = at.row(i);
            if row >= shape.t {
                return;
            }
            let to = row as u64 * shape.h as u64 + at.col as u64;
            let [a, b, c, d] = held[i].map(bf16x2_to_f32).map(|pair| pair.map(|v| v * inv));
            if T::BITS == 8 {
                let (low, high) = ([a[0], a[1], b[0], b[1]], [c[0], c[1], d[0], d[1]]);
                out.at(to).store8(0, [f32x4_to_e4m3x4(low), f32x4_to_e4m3x4(high)]);
            } else {
                let codes = if SAFE {
                    bf16x8_to_e2m1x8(held[i], inv)
                } else {
                    f32x8_to_e2m1x8([a[0], a[1], b[0], b[1], c[0], c[1], d[0], d[1]])
                };
                out.at(to / 2).store4(0, codes);
            }
        });
    }
}

impl Source for F32 {
    const BYTES: u32 = 4;

    #[inline(always)]
    fn gather(x: In<u8>) -> [u32; 4] {
        core::array::from_fn(|w| x.cast::<u32>().get(w as u32))
    }

    #[inline(always)]
    fn amax<const N: usize>(held: &[[u32; 4]; N]) -> u32 {
        let mut max = [0.0f32; 4];
        for v in held {
            max = core::array::from_fn(|w| max_total(max[w], f32::from_bits(v[w]).abs()));
        }
        let [a, b, c, d] = max;
        max_total(max_total(a, b), max_total(c, d)).to_bits()
    }

    #[inline(always)]
    fn store<T: Target, const N: usize, const SAFE: bool>(held: &[[u32; 4]; N], inv: f32, out: Out<u8>, at: Place, shape: Shape) {
        // Two rows at a time, because eight e2m1 are encoded together.
        unroll!(i in (N / 2) {
            let row = at.row(2 * i);
            if row >= shape.t {
                return;
            }
            let more = row + at.step < shape.t;
            let to = row as u64 * shape.h as u64 + at.col as u64;
            let next = to + at.step as u64 * shape.h as u64;
            let [[a, b, c, d], [e, f, g, h]] = [held[2 * i], held[2 * i + 1]].map(|v| v.map(|bits| f32::from_bits(bits) * inv));
            if T::BITS == 8 {
                out.at(to).store4(0, f32x4_to_e4m3x4([a, b, c, d]));
                if more {
                    out.at(next).store4(0, f32x4_to_e4m3x4([e, f, g, h]));
                }
            } else {
                let codes = f32x8_to_e2m1x8([a, b, c, d, e, f, g, h]);
                out.at(to / 2).cast::<u16>().set(0, codes as u16);
                if more {
                    out.at(next / 2).cast::<u16>().set(0, (codes >> 16) as u16);
                }
            }
        });
    }
}

/// Scale of the scaling block that the calling lane's vectors lie in. All threads of the block call it. `FEW`: by the shorter way to the
/// maximum of a warp, which is that of one scaling block if those have 128 channels.
#[inline(always)]
fn block_scale<X: Source, T: Target, const ROWS: u32, const COLS: u32, const N: usize, const FEW: bool>(
    held: &[[u32; 4]; N],
    at: Place,
    shape: Shape,
    round: bool,
) -> Scale {
    let maxima = shared().1;
    if thread_idx() < WARP_SIZE {
        maxima.set(thread_idx(), 0);
    }
    block_sync();
    // Magnitudes are compared as integers. A distance of 0 leaves what need not be joined.
    let lanes = row_lanes::<X, COLS>();
    let unit_lanes = row_lanes::<X, UNIT>();
    let wide = (shape.npc == 7) as u32;
    let mut amax = X::amax(held);
    if FEW && wide != 0 {
        amax = warp_max_u32(amax);
    } else {
        let mut mask = 1;
        while mask < WARP_SIZE {
            if mask < unit_lanes || mask >= lanes {
                amax = amax.max(warp_shuffle_xor(amax, mask));
            } else if mask < 4 * unit_lanes {
                amax = amax.max(warp_shuffle_xor(amax, mask * wide));
            }
            mask *= 2;
        }
    }
    let slot = ((at.row % ROWS) >> shape.npt) * (COLS / UNIT) + ((at.col % COLS) >> shape.npc);
    if lane_id() < lanes && lane_id() & ((unit_lanes << (2 * wide)) - 1) == 0 {
        maxima.atomic(AtomicOp::Max, slot, amax);
    }
    block_sync();
    let amax = f32::from_bits(maxima.get(slot));
    if round { scale::<T, true>(amax) } else { scale::<T, false>(amax) }
}

/// The lane that holds the first element of a scaling block writes its scale.
#[inline(always)]
fn store_sf(sf: Out<u8>, layout: SfLayout, packed: bool, value: f32, at: Place, shape: Shape) {
    let first = at.row & ((1 << shape.npt) - 1) == 0 && at.col & ((1 << shape.npc) - 1) == 0;
    if !first || at.row >= shape.t || at.col >= shape.h {
        return;
    }
    common::store_sf(sf, layout, packed, value, at.block(shape), at.col + (1 << shape.npc) >= shape.h);
}

/// Arguments of [`cast`] and [`cast_many`] beside the tensors.
struct Options {
    x_stride: u32,
    sf: SfLayout,
    round: bool,
    packed: bool,
}

/// Scales and data of a tile of `ROWS` by `COLS` values, `N` vectors a thread; `npt` is at most `ROWS`. `SAFE` as for the store, `FEW` as
/// for the scale.
#[inline(always)]
fn cast_tile<
    X: Source,
    T: Target,
    const ROWS: u32,
    const COLS: u32,
    const N: usize,
    const ALIGNED: bool,
    const SAFE: bool,
    const FEW: bool,
>(
    x: In<u8>,
    out: Out<u8>,
    sf: Out<u8>,
    shape: Shape,
    options: Options,
) {
    let at = Place::new::<X, ROWS, COLS, N>();
    // Blocks of the last z that have no rows: all threads of a block leave together.
    if at.tile_row::<ROWS>() >= shape.t {
        return;
    }
    let held = load::<X, N, ALIGNED>(x, options.x_stride, at, shape);
    let Scale { sf: value, inv } = block_scale::<X, T, ROWS, COLS, N, FEW>(&held, at, shape, options.round);
    store_sf(sf, options.sf, options.packed, value, at, shape);
    if at.col < shape.h {
        X::store::<T, N, SAFE>(&held, inv, out, at, shape);
    }
}

kernel! {
    op = per_block_cast;
    threads = 256;
    /// Computes and stores scales and data. `x` and strides count elements; `npt` and `npc` are given as powers of two. Where `npt` is
    /// 32, the `flat` entries have less work a block, which makes the tail shorter. The `round` entries take a shorter way that only
    /// rounded scales allow; those without compute either scale.
    pub fn cast[X: Source, T: Target, const ROWS: u32, const COLS: u32, const N: usize, const ALIGNED: bool, const SAFE: bool](
        x: In<u8>, out: Out<u8>, sf: Out<u8>, t: u32, h: u32, x_stride: u32, sf_row: u32, sf_col: u32,
        npt: u32, npc: u32, round: u32, packed: u32,
    ) {
        let layout = SfLayout { row_stride: sf_row, col_stride: sf_col };
        let options = Options { x_stride, sf: layout, round: SAFE || round != 0, packed: packed != 0 };
        cast_tile::<X, T, ROWS, COLS, N, ALIGNED, SAFE, false>(x, out, sf, Shape { t, h, npt, npc }, options);
    }
    entries {
        bf16_e4m3[Bf16, E4m3, 128, 128, 8, true, false], f32_e4m3[F32, E4m3, 128, 128, 16, true, false],
        bf16_e2m1_round[Bf16, E2m1, 128, 128, 8, true, true],
        bf16_e4m3_flat[Bf16, E4m3, 32, 128, 2, true, false], f32_e4m3_flat[F32, E4m3, 32, 128, 4, true, false],
        bf16_e2m1_flat[Bf16, E2m1, 32, 128, 2, true, false], bf16_e2m1_flat_round[Bf16, E2m1, 32, 128, 2, true, true],
        f32_e2m1_flat[F32, E2m1, 32, 128, 4, true, false],
        bf16_e4m3_unaligned[Bf16, E4m3, 128, 128, 8, false, false], f32_e4m3_unaligned[F32, E4m3, 128, 128, 16, false, false],
    }
}

kernel! {
    op = per_block_cast;
    threads = 512;
    /// As [`cast`] with half the vectors a thread: the long way to e2m1 for twice as many takes the driver more than 100 ms to compile.
    pub fn cast_many[X: Source, const N: usize, const ALIGNED: bool](
        x: In<u8>, out: Out<u8>, sf: Out<u8>, t: u32, h: u32, x_stride: u32, sf_row: u32, sf_col: u32,
        npt: u32, npc: u32, round: u32, packed: u32,
    ) {
        let layout = SfLayout { row_stride: sf_row, col_stride: sf_col };
        let options = Options { x_stride, sf: layout, round: round != 0, packed: packed != 0 };
        cast_tile::<X, E2m1, 128, 128, N, ALIGNED, false, false>(x, out, sf, Shape { t, h, npt, npc }, options);
    }
    entries {
        bf16_e2m1[Bf16, 4, true], f32_e2m1[F32, 8, true], bf16_e2m1_unaligned[Bf16, 4, false], f32_e2m1_unaligned[F32, 8, false],
    }
}

kernel! {
    op = per_block_cast;
    threads = 512;
    /// As [`cast`] for few tokens of bf16, in larger blocks.
    pub fn cast_few(
        x: In<u8>, out: Out<u8>, sf: Out<u8>, t: u32, h: u32, x_stride: u32, sf_row: u32, sf_col: u32,
        npt: u32, npc: u32, round: u32, packed: u32,
    ) {
        let layout = SfLayout { row_stride: sf_row, col_stride: sf_col };
        let options = Options { x_stride, sf: layout, round: round != 0, packed: packed != 0 };
        cast_tile::<Bf16, E4m3, 128, 128, 4, true, false, true>(x, out, sf, Shape { t, h, npt, npc }, options);
    }
}

kernel! {
    op = per_block_cast;
    threads = 256;
    /// The scales alone, from tiles of 128 by 128.
    pub fn sf_only[X: Source, T: Target, const ROWS: u32, const COLS: u32, const N: usize, const ALIGNED: bool](
        x: In<u8>, sf: Out<u8>, t: u32, h: u32, x_stride: u32, sf_row: u32, sf_col: u32,
        npt: u32, npc: u32, round: u32, packed: u32,
    ) {
        let (at, shape) = (Place::new::<X, ROWS, COLS, N>(), Shape { t, h, npt, npc });
        if at.tile_row::<ROWS>() >= t { return; }
        let held = load::<X, N, ALIGNED>(x, x_stride, at, shape);
        let scale = block_scale::<X, T, ROWS, COLS, N, false>(&held, at, shape, round != 0);
        let layout = SfLayout { row_stride: sf_row, col_stride: sf_col };
        store_sf(sf, layout, packed != 0, scale.sf, at, shape);
    }
    entries {
        bf16_e4m3[Bf16, E4m3, 128, 128, 8, true], bf16_e2m1[Bf16, E2m1, 128, 128, 8, true],
        f32_e4m3[F32, E4m3, 128, 128, 16, true], f32_e2m1[F32, E2m1, 128, 128, 16, true],
        bf16_e4m3_unaligned[Bf16, E4m3, 128, 128, 8, false], bf16_e2m1_unaligned[Bf16, E2m1, 128, 128, 8, false],
        f32_e4m3_unaligned[F32, E4m3, 128, 128, 16, false], f32_e2m1_unaligned[F32, E2m1, 128, 128, 16, false],
    }
}

kernel! {
    op = per_block_cast;
    threads = 256;
    /// The data alone, with given row-major f32 scales, in tiles of 32 by 128.
    pub fn precomputed[X: Source, T: Target, const ROWS: u32, const COLS: u32, const N: usize, const ALIGNED: bool](
        x: In<u8>, out: Out<u8>, sf: In<u8>, t: u32, h: u32, x_stride: u32, sf_row: u32, sf_col: u32, npt: u32, npc: u32,
    ) {
        let (at, shape) = (Place::new::<X, ROWS, COLS, N>(), Shape { t, h, npt, npc });
        if at.row >= t || at.col >= h { return; }
        let held = load::<X, N, ALIGNED>(x, x_stride, at, shape);
        let (m, k) = at.block(shape);
        let sf = load_sf::<false>(sf, SfLayout { row_stride: sf_row, col_stride: sf_col }, m, k);
        X::store::<T, N, false>(&held, 1.0 / sf, out, at, shape);
    }
    entries {
        bf16_e4m3[Bf16, E4m3, 32, 128, 2, true], bf16_e2m1[Bf16, E2m1, 32, 128, 2, true],
        f32_e4m3[F32, E4m3, 32, 128, 4, true], f32_e2m1[F32, E2m1, 32, 128, 4, true],
        bf16_e4m3_unaligned[Bf16, E4m3, 32, 128, 2, false], bf16_e2m1_unaligned[Bf16, E2m1, 32, 128, 2, false],
        f32_e4m3_unaligned[F32, E4m3, 32, 128, 4, false], f32_e2m1_unaligned[F32, E2m1, 32, 128, 4, false],
    }
}
