//! swiglu_forward: `silu(gate) * up`, times a routing weight.
//!
//! In    x bf16, f32 [p, 2 h], gate left and up right    Out  bf16, f32 [p, h]
//! Exact bitwise the specification's (quant.md 6.8): each step one f32 operation, `exp` is CUDA's, one rounding to the output.
//! Map   a warp takes 256 channels of a row, a lane 8 neighbouring ones.  Padding rows cost what it takes to see that they are.
//! Cost  4 h bytes read and 2 h written a row (bf16); about 30 instructions a value: memory bound.

use super::common::Divisor;
pub use super::common_swiglu::{Bf16, Clamp, F32, Source};
use super::common_swiglu::{Clamped, Counters, Rows, Weights, activate};
use crate::device::*;
use crate::kernel;

/// Threads of a block.
const THREADS: u32 = 256;
/// Channels of a warp.
pub const PIECE: u32 = 8 * WARP_SIZE;
/// Rows that a warp takes, if all hold tokens; if they may be padding; if values are counted, which ends with an atomic addition of
/// each block to the same few words.
pub const STEPS: [u32; 3] = [1, 4, 8];

/// Grid and block for so many warps.
pub fn config(num_warps: u32) -> LaunchConfig {
    LaunchConfig::new(ceil_div(num_warps, THREADS / WARP_SIZE), THREADS).shared(&shared().0)
}

#[inline(always)]
fn shared() -> (SharedLayout, Counters) {
    let mut layout = SharedLayout::new();
    let counters = Counters::new(&mut layout);
    (layout, counters)
}

/// An element type of the output.
pub trait Target: Copy {
    /// Bytes of an element.
    const BYTES: u32;

    /// Write eight values.
    fn store(out: Out<u8>, v: [f32; 8]);
}

impl Target for Bf16 {
    const BYTES: u32 = 2;

    #[inline(always)]
    #[track_caller]
    fn store(out: Out<u8>, [a, b, c, d, e, f, g, h]: [f32; 8]) {
        out.store16(0, [f32x2_to_bf16x2(a, b), f32x2_to_bf16x2(c, d), f32x2_to_bf16x2(e, f), f32x2_to_bf16x2(g, h)]);
    }
}

impl Target for F32 {
    const BYTES: u32 = 4;

    #[inline(always)]
    #[track_caller]
    fn store(out: Out<u8>, v: [f32; 8]) {
        let [a, b, c, d, e, f, g, h] = v.map(f32::to_bits);
        out.store16(0, [a, b, c, d]);
        out.store16(16, [e, f, g, h]);
    }
}

kernel! {
    op = swiglu_forward;
    threads = 256, blocks = 6;
    /// `x_stride` counts bytes. A warp takes a piece of up to `steps` rows, at most 31; its number is divided by the pieces of a row. See
    /// [`Rows`], [`Weights`] and [`Clamp`] for the rest.
    pub fn activation[S: Source, T: Target, const MODE: u32](
        x: In<u8>, out: Out<u8>, x_stride: u64, num_rows: u32, hidden: u32, steps: u32, warps_magic: u32, warps_shift: u32,
        clamp: f32,
        rows_kind: u32, rows_map: In<i32>, num_experts: u32, alignment: u32, alignment_magic: u32, alignment_shift: u32,
        weights_kind: u32, weights: In<f32>, weights_map: In<i32>, weights_factor: f32, counters: Out<u64>, num_counters: u32,
    ) {
        let divisor = Divisor { magic: alignment_magic, shift: alignment_shift };
        let rows = Rows { kind: rows_kind, map: rows_map, num_experts, alignment, divisor };
        let weights = Weights { kind: weights_kind, weights, map: weights_map, factor: weights_factor };
        let (_, shared) = shared();
        if MODE == Clamp::COUNT {
            shared.start();
        }
        let warp = block_idx_x() * (THREADS / WARP_SIZE) + warp_id();
        let strip = Divisor { magic: warps_magic, shift: warps_shift }.divide(warp);
        let piece = warp - strip * ceil_div(hidden, PIECE);
        let first = strip * steps;
        let mut used = rows.holding_tokens(first, steps.min(num_rows - num_rows.min(first)));
        let channel = piece * PIECE + lane_id() * 8;
        let inside = channel < hidden;
        let values = used.count_ones() * PIECE.min(hidden - piece * PIECE);
        let mut clamped = Clamped::default();
        while used != 0 {
            rolled();
            let row = first + used.trailing_zeros();
            used &= used - 1;
            let x = x.at(row as u64 * x_stride + channel as u64 * S::BYTES as u64);
            let (gate, up) = if inside { (S::load(x), S::load(x.at(hidden as u64 * S::BYTES as u64))) } else { (S::ZERO, S::ZERO) };
            let ([v], count) = activate::<S, MODE, 1>([gate], [up], clamp, weights.of(row), false, [true]);
            if MODE == Clamp::COUNT {
                clamped.add(count);
            }
            if inside {
                T::store(out.at((row as u64 * hidden as u64 + channel as u64) * T::BYTES as u64), v);
            }
        }
        if MODE == Clamp::COUNT {
            shared.count(clamped, values);
            shared.finish(counters, num_counters);
        }
    }
    entries {
        bf16_bf16[Bf16, Bf16, { Clamp::NONE }], bf16_bf16_clamp[Bf16, Bf16, { Clamp::CLAMP }],
        bf16_bf16_count[Bf16, Bf16, { Clamp::COUNT }],
        bf16_f32[Bf16, F32, { Clamp::NONE }], bf16_f32_clamp[Bf16, F32, { Clamp::CLAMP }],
        bf16_f32_count[Bf16, F32, { Clamp::COUNT }],
        f32_bf16[F32, Bf16, { Clamp::NONE }], f32_bf16_clamp[F32, Bf16, { Clamp::CLAMP }],
        f32_bf16_count[F32, Bf16, { Clamp::COUNT }],
        f32_f32[F32, F32, { Clamp::NONE }], f32_f32_clamp[F32, F32, { Clamp::CLAMP }],
        f32_f32_count[F32, F32, { Clamp::COUNT }],
    }
}
