//! norm_backward: gradients of the root mean square norm of rows.
//!
//! In    out_grad, x, residual_out_grad bf16 or f32 [t, h], weight \[h\], rstd f32 \[t\]    Out  x_grad [t, h], weight_grad \[h\]
//! Close f32 arithmetic; sums have a fixed order, which depends on shape, type and number of multiprocessors (quant.md 6.11).
//! Map   `rows`: one block a multiprocessor. It takes some rows at a time, which bulk copies bring into a ring in shared memory, and
//!       keeps its share of `weight_grad` in registers; at the end the blocks' shares are added up, 64 channels a block, after a barrier
//!       of all. `any_rows` and `any_weight` take everything else, and read twice; `add_up` adds their shares up.
//! Cost  2 or 4 bytes each of out_grad, x, residual_out_grad and x_grad a channel; memory bound.

use super::norm_forward::Value;
pub use super::norm_forward::{Bf16, F32, WEIGHT};
use crate::device::*;
use crate::{kernel, unroll};

/// Most threads of a block of `rows`: few enough that each has the registers for its share of `weight_grad`.
pub const MAX_THREADS: u32 = 512;
/// Vectors of a thread of `rows`: 16 channels.
pub const BF16_VECTORS: usize = 2;
/// The same in f32.
pub const F32_VECTORS: usize = 4;
/// Threads of a block of `add_up`.
pub const ADD_UP_THREADS: u32 = 1024;
/// Most stages of the ring.
pub const MAX_STAGES: u32 = 6;
/// Bytes of shared memory that the ring may take.
pub const RING_BYTES: u32 = 224 << 10;
/// Threads of a block of `any_rows` and `any_weight`.
pub const ANY_THREADS: u32 = 256;
/// Tokens of a share of `any_weight`, unless there would be too many shares.
pub const ANY_TOKENS: u32 = 64;

/// There is a `residual_out_grad`.
pub const RESIDUAL: u32 = 1;
/// There is a `weight_grad`.
pub const WEIGHT_GRAD: u32 = 16;
/// It is f32 rather than bf16.
pub const WEIGHT_GRAD_F32: u32 = 32;
/// It is added to what is there.
pub const ACCUMULATE: u32 = 64;
/// An element type whose vectors can be taken apart.
pub trait Floats: Value {
    /// The values of a vector, then zeros.
    fn floats(v: [u32; 4]) -> [f32; 8];

    /// Back, rounded to this type.
    fn pack(v: [f32; 8]) -> [u32; 4];

    /// Element `i`.
    fn get(from: In<u8>, i: u32) -> f32;

    /// Write element `i`.
    fn set(to: Out<u8>, i: u32, v: f32);
}

impl Floats for Bf16 {
    #[inline(always)]
    fn floats(v: [u32; 4]) -> [f32; 8] {
        let [a, b, c, d] = v.map(bf16x2_to_f32);
        [a[0], a[1], b[0], b[1], c[0], c[1], d[0], d[1]]
    }

    #[inline(always)]
    fn pack(v: [f32; 8]) -> [u32; 4] {
        core::array::from_fn(|i| f32x2_to_bf16x2(v[2 * i], v[2 * i + 1]))
    }

    #[inline(always)]
    #[track_caller]
    fn get(from: In<u8>, i: u32) -> f32 {
        f32::from_bits((from.cast::<u16>().get(i) as u32) << 16)
    }

    #[inline(always)]
    #[track_caller]
    fn set(to: Out<u8>, i: u32, v: f32) {
        to.cast::<u16>().set(i, f32x2_to_bf16x2(v, 0.0) as u16);
    }
}

impl Floats for F32 {
    #[inline(always)]
    fn floats(v: [u32; 4]) -> [f32; 8] {
        let [a, b, c, d] = v.map(f32::from_bits);
        [a, b, c, d, 0.0, 0.0, 0.0, 0.0]
    }

    #[inline(always)]
    fn pack(v: [f32; 8]) -> [u32; 4] {
        [v[0], v[1], v[2], v[3]].map(f32::to_bits)
    }

    #[inline(always)]
    #[track_caller]
    fn get(from: In<u8>, i: u32) -> f32 {
        from.cast::<f32>().get(i)
    }

    #[inline(always)]
    #[track_caller]
    fn set(to: Out<u8>, i: u32, v: f32) {
        to.cast::<f32>().set(i, v);
    }
}

/// How `rows` is launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Rows that a block works on at a time.
    pub rows: u32,
    /// Threads of each.
    pub row_threads: u32,
    /// Stages of the ring.
    pub stages: u32,
    /// Blocks.
    pub blocks: u32,
    /// Those that have rows, and so a share of `weight_grad`.
    pub num_shares: u32,
}

/// The plan for threads that take `vectors` of a row, if rows of that length fit.
pub fn plan<S: Value>(vectors: usize, num_tokens: u32, hidden: u32, weight_grad: bool, num_sms: u32) -> Option<Plan> {
    let row_threads = align_up(ceil_div(ceil_div(hidden, S::CHANNELS), vectors as u32), WARP_SIZE);
    if row_threads > MAX_THREADS {
        return None;
    }
    // Blocks come first, rows side by side in a block second.
    let rows = (MAX_THREADS / row_threads).min(ceil_div(num_tokens, num_sms)).max(1);
    // A tile is written by a thread for each channel.
    let rows = rows.max(TILE / row_threads);
    // One is worked on, another may not be left by all threads yet.
    let stages = (RING_BYTES / (rows * row_bytes::<S>(hidden) * 2)).min(MAX_STAGES);
    // Of few rows the shares are added up by more blocks than there are rows.
    let tiles = if weight_grad { ceil_div(hidden, TILE) } else { 0 };
    let blocks = ceil_div(num_tokens, rows).max(tiles).min(num_sms);
    let num_shares = ceil_div(num_tokens, rows).min(num_sms);
    if stages < 3 { None } else { Some(Plan { rows, row_threads, stages, blocks, num_shares }) }
}

#[inline(always)]
fn row_bytes<S: Value>(hidden: u32) -> u32 {
    hidden * (S::BITS / 8)
}

/// Grid and block of `rows`; with `weight_grad` it must be cooperative.
pub fn rows_config<S: Value>(plan: Plan, hidden: u32) -> LaunchConfig {
    let ring = ring_bytes::<S>(plan.stages, plan.rows, hidden);
    LaunchConfig::new(plan.blocks, plan.rows * plan.row_threads).shared(&block(ring).layout)
}

/// Bytes of the ring, which later has room for the sums of warps.
#[inline(always)]
fn ring_bytes<S: Value>(stages: u32, rows: u32, hidden: u32) -> u32 {
    let bytes = stages * rows * row_bytes::<S>(hidden) * 2;
    if bytes > TILE_BYTES { bytes } else { TILE_BYTES }
}

/// Grid and block of `add_up`.
pub fn add_up_config(hidden: u32) -> LaunchConfig {
    LaunchConfig::new(ceil_div(hidden, TILE), ADD_UP_THREADS).shared(&block(TILE_BYTES).layout)
}

/// Grid and block of `any_rows`.
pub fn any_rows_config(num_tokens: u32) -> LaunchConfig {
    LaunchConfig::new(num_tokens, ANY_THREADS).shared(&block(0).layout)
}

/// Shares of `any_weight`.
pub const fn any_shares(num_tokens: u32, num_sms: u32) -> u32 {
    let shares = ceil_div(num_tokens, ANY_TOKENS);
    if shares < num_sms { shares } else { num_sms }
}

/// Grid and block of `any_weight`.
pub fn any_weight_config(hidden: u32, shares: u32) -> LaunchConfig {
    LaunchConfig::grid([ceil_div(hidden, ANY_THREADS), shares, 1], ANY_THREADS)
}

/// Shared memory.
struct Block {
    layout: SharedLayout,
    /// One for each stage: its copies have arrived.
    full: Shared<u64>,
    /// One value a warp, twice, so that one barrier a step is enough.
    scratch: Shared<f32>,
    /// Stages, later the shares of the rows, then of the warps.
    ring: Shared<u8>,
}

#[inline(always)]
const fn block(ring_bytes: u32) -> Block {
    let mut layout = SharedLayout::new();
    let (full, scratch) = (layout.array(MAX_STAGES), layout.array(2 * WARP_SIZE));
    let ring = layout.aligned(ring_bytes, 128);
    Block { layout, full, scratch, ring }
}

/// Rows in memory that bulk copies can read.
#[derive(Clone, Copy)]
struct Source {
    from: In<u8>,
    stride: u64,
}

/// Rows of `x` and `out_grad` on their way into shared memory. Step `k` of a block is the group of rows `k * grid + block`; it lies in
/// stage `k % stages`.
#[derive(Clone, Copy)]
struct Ring {
    rows: u32,
    num_tokens: u32,
    row_bytes: u32,
    sources: [Source; 2],
    full: Shared<u64>,
    ring: Shared<u8>,
}

impl Ring {
    /// Where row `row` of a tensor of a stage lies.
    #[inline(always)]
    fn at(self, stage: u32, tensor: u32, row: u32) -> u32 {
        ((stage * 2 + tensor) * self.rows + row) * self.row_bytes
    }

    /// Start the copies of a group; called by one warp.
    #[inline(always)]
    #[track_caller]
    fn fetch(self, group: u32, stage: u32) {
        let first = group * self.rows;
        let left = self.num_tokens - first;
        let count = if left < self.rows { left } else { self.rows };
        let full = Mbarrier::new(self.full, stage);
        if lane_id() == 0 {
            full.arrive_expect(count * 2 * self.row_bytes);
        }
        warp_sync();
        // Half of the lanes for each tensor: there are at most 16 rows.
        let (tensor, row) = (lane_id() / 16, lane_id() % 16);
        if row < count {
            let source = if tensor == 0 { self.sources[0] } else { self.sources[1] };
            let from = source.from.at((first + row) as u64 * source.stride);
            self.ring.copy_bulk(self.at(stage, tensor, row), from, 0, self.row_bytes, full);
        }
    }
}

/// Where `weight_grad` goes, and what it is made of: shares of `hidden` f32 each.
#[derive(Clone, Copy)]
struct WeightGrad {
    shares: Out<f32>,
    num_shares: u32,
    hidden: u32,
    to: Out<u8>,
    parts: u32,
}

/// Channels that a block adds up at a time: few enough that all multiprocessors have some of 8192.
pub const TILE: u32 = 64;
/// Lanes that read a share of them.
const TILE_LANES: u32 = TILE / 4;
const TILE_BYTES: u32 = TILE * 4 * (1024 / TILE_LANES);
/// Shares that a lane reads at once.
const AT_ONCE: usize = 5;

impl WeightGrad {
    /// A share. They start at multiples of 16 bytes.
    #[inline(always)]
    fn share(self, number: u32) -> Out<f32> {
        self.shares.at(number as u64 * align_up(self.hidden, 4) as u64)
    }

    /// Add up all shares of [`TILE`] channels and write the result. Half warps take turns at the shares, then their sums are added.
    #[inline(always)]
    #[track_caller]
    fn add_up(self, tile: u32, ring: Shared<u8>) {
        let (halves, half, lane) = (block_dim() / TILE_LANES, thread_idx() / TILE_LANES, thread_idx() % TILE_LANES * 4);
        let channel = tile * TILE + lane;
        let mut sum = [0.0; 4];
        let mut number = half;
        while number < self.num_shares {
            rolled();
            let values: [[u32; 4]; AT_ONCE] = core::array::from_fn(|i| {
                let number = number + i as u32 * halves;
                if (number < self.num_shares) & (channel < self.hidden) { self.share(number).load16(channel) } else { [0; 4] }
            });
            sum = values.iter().fold(sum, |sum, v| add(sum, *v));
            number += AT_ONCE as u32 * halves;
        }
        let by_half = ring.cast::<f32>();
        by_half.store16(half * TILE + lane, sum.map(f32::to_bits));
        block_sync();
        let column = thread_idx();
        if column < TILE && tile * TILE + column < self.hidden {
            let mut sum = 0.0;
            let mut half = 0;
            while half < halves {
                rolled();
                let get = |half: u32| if half < halves { by_half.get(half * TILE + column) } else { 0.0 };
                let values: [f32; 8] = core::array::from_fn(|i| get(half + i as u32));
                sum = values.iter().fold(sum, |sum, v| sum + v);
                half += 8;
            }
            self.write(tile * TILE + column, sum);
        }
    }

    #[inline(always)]
    #[track_caller]
    fn write(self, channel: u32, sum: f32) {
        let (half, float) = (self.to.cast::<u16>().at(channel as u64), self.to.cast::<f32>().at(channel as u64));
        let f32_output = self.parts & WEIGHT_GRAD_F32 != 0;
        let mut sum = sum;
        if self.parts & ACCUMULATE != 0 {
            sum += if f32_output { float.get(0) } else { f32::from_bits((half.get(0) as u32) << 16) };
        }
        if f32_output {
            float.set(0, sum);
        } else {
            half.set(0, f32x2_to_bf16x2(sum, 0.0) as u16);
        }
    }
}

#[inline(always)]
fn add(a: [f32; 4], b: [u32; 4]) -> [f32; 4] {
    core::array::from_fn(|i| a[i] + f32::from_bits(b[i]))
}

kernel! {
    op = norm_backward;
    threads = 512, blocks = 1;
    /// Strides count bytes, `shares` has one of `hidden` for each block with rows; `barrier` was zeroed once. `rows` rows a step, `row_threads` threads
    /// each. Rows are whole numbers of aligned vectors.
    pub fn rows[S: Floats, const N: usize](
        out_grad: In<u8>, x: In<u8>, residual_out_grad: In<u8>, weight: In<u8>, rstd: In<f32>,
        x_grad: Out<u8>, weight_grad: Out<u8>, shares: Out<f32>, barrier: Out<u32>,
        out_grad_stride: u64, x_stride: u64, residual_stride: u64,
        num_tokens: u32, hidden: u32, rows: u32, row_threads: u32, stages: u32, num_shares: u32, parts: u32, inv_hidden: f32,
        out_scale: f32,
    ) {
        let row_bytes = row_bytes::<S>(hidden);
        let block = block(ring_bytes::<S>(stages, rows, hidden));
        let sources = [Source { from: x, stride: x_stride }, Source { from: out_grad, stride: out_grad_stride }];
        let ring = Ring { rows, num_tokens, row_bytes, sources, full: block.full, ring: block.ring };
        if thread_idx() < stages {
            Mbarrier::new(block.full, thread_idx()).init(1);
            fence_async_copy();
        }
        block_sync();

        // This thread's row of a group, and its vectors.
        let (mut row, mut lane) = (0, thread_idx());
        while lane >= row_threads {
            rolled();
            row += 1;
            lane -= row_threads;
        }
        let row_warps = row_threads / WARP_SIZE;
        let channel = |i: usize| (lane + i as u32 * row_threads) * S::CHANNELS;
        let byte = |i: usize| channel(i) * (S::BITS / 8);
        let mut weights = [[S::ONE; 4]; N];
        let weight_end = if parts & WEIGHT != 0 { hidden } else { 0 };
        unroll!(i in N {
            if channel(i) < weight_end {
                weights[i] = S::load(weight.at(byte(i) as u64));
            }
        });
        let step = grid_dim_x();
        let mut sums = [[0.0f32; 8]; N];
        let (mut group, mut stage, mut parity, mut half) = (block_idx_x(), 0, 0, 0);
        let (mut next, mut next_stage, mut ahead) = (group, 0, 0);
        let rstd_of = |token: u32| if token < num_tokens { rstd.get(token) } else { 0.0 };
        let mut next_rstd = rstd_of(group * rows + row);
        while group * rows < num_tokens {
            // All threads have left the stage before the one before this.
            if warp_id() == 0 {
                while ahead + 1 < stages && next * rows < num_tokens {
                    rolled();
                    ring.fetch(next, next_stage);
                    next_stage = if next_stage + 1 == stages { 0 } else { next_stage + 1 };
                    next += step;
                    ahead += 1;
                }
                ahead -= 1;
            }
            let token = group * rows + row;
            // Channels of the row, none if it does not exist.
            let end = if token < num_tokens { hidden } else { 0 };
            let rstd = next_rstd;
            next_rstd = rstd_of(token + step * rows);
            Mbarrier::new(block.full, stage).wait(parity);

            let (x_at, g_at) = (ring.at(stage, 0, row) + byte(0), ring.at(stage, 1, row) + byte(0));
            let read = |at: u32, i: usize| S::floats(block.ring.load16(at + i as u32 * row_threads * 16));
            let mut dots = [0.0; 2];
            unroll!(i in N {
                if channel(i) < end {
                    let (x, g, w) = (read(x_at, i), read(g_at, i), S::floats(weights[i]));
                    unroll!(c in 8 {
                        if (c as u32) < S::CHANNELS {
                            dots[c % 2] = fma(x[c], g[c] * w[c], dots[c % 2]);
                        }
                    });
                }
            });
            let of_warp = warp_sum::<32>(dots[0] + dots[1]);
            if lane_id() == 0 {
                block.scratch.set(half + warp_id(), of_warp);
            }
            // On its way during the barrier; the ring keeps the memory busy meanwhile.
            let at = token as u64 * residual_stride;
            let residual_end = if parts & RESIDUAL != 0 { end } else { 0 };
            let other: [[u32; 4]; N] = core::array::from_fn(|i| {
                if channel(i) < residual_end { S::load(residual_out_grad.at(at + byte(i) as u64)) } else { [0; 4] }
            });
            block_sync();
            let part = if lane_id() < row_warps { block.scratch.get(half + row * row_warps + lane_id()) } else { 0.0 };
            let of_grad = out_scale * rstd;
            let of_x = warp_sum::<32>(part) * inv_hidden * of_grad * rstd;

            // Read again rather than kept: that takes fewer registers.
            unroll!(i in N {
                if channel(i) < end {
                    let (x, g, w, other) = (read(x_at, i), read(g_at, i), S::floats(weights[i]), S::floats(other[i]));
                    let mut out = [0.0; 8];
                    unroll!(c in 8 {
                        if (c as u32) < S::CHANNELS {
                            let scaled = x[c] * rstd;
                            out[c] = fma(g[c] * w[c], of_grad, fma(-scaled, of_x, other[c]));
                            sums[i][c] = fma(scaled, g[c], sums[i][c]);
                        }
                    });
                    x_grad.at(token as u64 * row_bytes as u64).store16(byte(i), S::pack(out));
                }
            });
            half ^= WARP_SIZE;
            stage += 1;
            if stage == stages {
                (stage, parity) = (0, parity ^ 1);
            }
            group += step;
        }
        if parts & WEIGHT_GRAD == 0 {
            return;
        }

        // The rows of the block pass their sums on from one to the next; what the last one has is the block's share.
        let weight_grad = WeightGrad { shares, num_shares, hidden, to: weight_grad, parts };
        let of_rows = block.ring.cast::<f32>();
        let mut turn = 0;
        while turn < rows {
            rolled();
            block_sync();
            if row == turn {
                unroll!(i in N {
                    if channel(i) < hidden {
                        let [a, b, c, d, e, f, g, h] = sums[i];
                        let pass = |at: u32, v: [f32; 4]| {
                            let before = if row > 0 { of_rows.load16(at) } else { [0; 4] };
                            of_rows.store16(at, add(v, before).map(f32::to_bits));
                        };
                        pass(channel(i), [a, b, c, d]);
                        if S::CHANNELS == 8 {
                            pass(channel(i) + 4, [e, f, g, h]);
                        }
                    }
                });
            }
            turn += 1;
        }
        block_sync();
        let mut at = thread_idx() * 4;
        let end = if block_idx_x() < num_shares { hidden } else { 0 };
        while at < end {
            rolled();
            let sums = of_rows.load16(at).map(f32::from_bits);
            weight_grad.share(block_idx_x()).store16(at, sums.map(|v| (v * out_scale).to_bits()));
            at += block_dim() * 4;
        }
        grid_sync(barrier);
        let mut tile = block_idx_x();
        while tile * TILE < hidden {
            rolled();
            weight_grad.add_up(tile, block.ring);
            block_sync();
            tile += step;
        }
    }
    entries { bf16[Bf16, BF16_VECTORS], f32[F32, F32_VECTORS] }
}

kernel! {
    op = norm_backward;
    threads = 1024, blocks = 1;
    /// Adds up the shares of an earlier launch.
    pub fn add_up(shares: Out<f32>, weight_grad: Out<u8>, num_shares: u32, hidden: u32, parts: u32) {
        let weight_grad = WeightGrad { shares, num_shares, hidden, to: weight_grad, parts };
        weight_grad.add_up(block_idx_x(), block(TILE_BYTES).ring);
    }
}

kernel! {
    op = norm_backward;
    threads = 256, blocks = 8;
    /// `x_grad` for rows of any length and alignment: one block a row, channel by channel. Strides count bytes.
    pub fn any_rows[S: Floats](
        out_grad: In<u8>, x: In<u8>, residual_out_grad: In<u8>, weight: In<u8>, rstd: In<f32>, x_grad: Out<u8>,
        out_grad_stride: u64, x_stride: u64, residual_stride: u64, hidden: u32, parts: u32, inv_hidden: f32, out_scale: f32,
    ) {
        let token = block_idx_x() as u64;
        let (x, out_grad) = (x.at(token * x_stride), out_grad.at(token * out_grad_stride));
        let residual_out_grad = residual_out_grad.at(token * residual_stride);
        let x_grad = x_grad.at(token * hidden as u64 * (S::BITS / 8) as u64);
        let rstd = rstd.at(token).get(0);
        let weighted = |c: u32| {
            let w = if parts & WEIGHT != 0 { S::get(weight, c) } else { 1.0 };
            S::get(out_grad, c) * (w * out_scale)
        };
        let mut dot = 0.0;
        let mut c = thread_idx();
        while c < hidden {
            dot = fma(S::get(x, c) * rstd, weighted(c), dot);
            c += ANY_THREADS;
        }
        let mean = block_sum(dot, block(0).scratch) * inv_hidden;
        let mut c = thread_idx();
        while c < hidden {
            let other = if parts & RESIDUAL != 0 { S::get(residual_out_grad, c) } else { 0.0 };
            S::set(x_grad, c, (weighted(c) - (S::get(x, c) * rstd) * mean) * rstd + other);
            c += ANY_THREADS;
        }
    }
    entries { bf16[Bf16], f32[F32] }
}

kernel! {
    op = norm_backward;
    threads = 256, blocks = 8;
    /// Shares of `weight_grad` for rows of any length and alignment: a thread takes a channel of every `grid_dim_y`th row.
    pub fn any_weight[S: Floats](
        out_grad: In<u8>, x: In<u8>, rstd: In<f32>, shares: Out<f32>, out_grad_stride: u64, x_stride: u64,
        num_tokens: u32, hidden: u32, out_scale: f32,
    ) {
        let channel = block_idx_x() * ANY_THREADS + thread_idx();
        if channel >= hidden {
            return;
        }
        let mut sum = 0.0;
        let mut token = block_idx_y();
        while token < num_tokens {
            let (x, out_grad) = (x.at(token as u64 * x_stride), out_grad.at(token as u64 * out_grad_stride));
            sum = fma(S::get(x, channel) * rstd.get(token), S::get(out_grad, channel), sum);
            token += grid_dim_y();
        }
        shares.at(block_idx_y() as u64 * align_up(hidden, 4) as u64).set(channel, sum * out_scale);
    }
    entries { bf16[Bf16], f32[F32] }
}
