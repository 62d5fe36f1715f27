//! Warp matrix multiply: one 16 x 8 tile of f32 sums per call, all 32 lanes together.
//!
//! Fragments are those of PTX: with `g = lane / 4` and `t = lane % 4`, lane holds of C rows `g` and `g + 8`, columns `2t` and
//! `2t + 1`. The hardware adds the products of a call in an order of its own with at least f32 precision and truncates;
//! the emulator adds them in f64 and rounds once, so the two agree to a few ulp of the largest term, not bit for bit.

use super::backend;

/// `c + a * b` with a bf16 `[16, 16]`, b bf16 `[16, 8]`, c f32 `[16, 8]`.
///
/// `a`: words `(g, 2t..)`, `(g + 8, 2t..)`, `(g, 2t + 8..)`, `(g + 8, 2t + 8..)`, two columns a word.
/// `b`: words `(2t.., g)`, `(2t + 8.., g)`, two rows a word.
#[inline(always)]
#[track_caller]
pub fn warp_mma_bf16(a: [u32; 4], b: [u32; 2], c: [f32; 4]) -> [f32; 4] {
    backend::mma_bf16(a, b, c, backend::here())
}

/// `c + a * b` with a tf32 `[16, 8]`, b tf32 `[8, 8]`, c f32 `[16, 8]`. Inputs are f32 bits; the lower 13 bits are ignored.
///
/// `a`: `(g, t)`, `(g + 8, t)`, `(g, t + 4)`, `(g + 8, t + 4)`. `b`: `(t, g)`, `(t + 4, g)`.
#[inline(always)]
#[track_caller]
pub fn warp_mma_tf32(a: [f32; 4], b: [f32; 2], c: [f32; 4]) -> [f32; 4] {
    backend::mma_tf32(a, b, c, backend::here())
}
