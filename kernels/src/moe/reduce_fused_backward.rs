//! reduce_fused_backward: what a gradient of the tokens' sums means for the rows of the expanded buffer, and for their weights.
//!
//! In    x f32 or bf16 [p, h]; grad f32 or bf16 [t, h]; topk_weights f32 [t, k]; token_topk_to_pos i32 [t, k]; pos_to_expert i32 \[p\]
//! Out   grad_x as x [p, h]; grad_topk_weights f32 [t, k]
//! Exact `grad_x[p] = grad[t] * topk_weights[t, k]`, one product, to nearest even; zeros for padding. `grad_topk_weights[t, k]` is the dot
//!       product of grad\[t\] and x\[p\] in f32: a thread adds its columns in ascending order, one fma each, then butterflies over the
//!       warp and over the warps; 0 for a choice without a row.
//! Map   a block per token, or several that share its choices where tokens are few. Its threads go along the row, with two rows of x at
//!       a time; grad comes from L1 after the first two. Blocks in front of them zero the padding, 32 rows each.
//! Cost  x read once, grad_x written once, grad read once: memory bound, 3 to 4 instructions a byte.

use super::common_expanded::{CHOICES, has_row, load_choices};
use super::reduce_fused::{Bf16, Element, F32};
use crate::device::*;
use crate::quant::common::Divisor;
use crate::{kernel, unroll};

/// Threads of a block: a warp for each choice that is looked up at once.
pub const THREADS: u32 = 256;
const WARPS: u32 = THREADS / WARP_SIZE;
/// Rows of the expanded buffer that a block looks at for padding.
pub const PADDING_ROWS: u32 = WARP_SIZE;
/// Most tokens, so that blocks are counted in 31 bits; see [`Divisor`].
pub const MAX_TOKENS: u64 = 1 << 30;

/// Blocks that share the choices of a token: enough for two on every multiprocessor, as far as there are choices.
pub const fn parts(t: u32, k: u32, num_sms: u32) -> u32 {
    let wanted = match (2 * num_sms).checked_div(t) {
        Some(wanted) => wanted,
        None => 1,
    };
    let most = if k < CHOICES as u32 { k } else { CHOICES as u32 };
    if wanted == 0 || most == 0 {
        1
    } else if wanted < most {
        wanted
    } else {
        most
    }
}

/// Blocks that look for padding.
pub const fn padding_blocks(p: u32) -> u32 {
    ceil_div(p, PADDING_ROWS)
}

/// By choice and warp: sums of the warp.
fn shared() -> (SharedLayout, Shared<f32>) {
    let mut layout = SharedLayout::new();
    let sums = layout.array(CHOICES as u32 * WARPS);
    (layout, sums)
}

/// Grid and block.
pub fn config(t: u32, parts: u32, padding_blocks: u32) -> LaunchConfig {
    LaunchConfig::new(padding_blocks + t * parts, THREADS).shared(&shared().0)
}

/// Rows in memory; a thread has `N` values of one at a time.
#[derive(Clone, Copy)]
struct Rows {
    x: In<u8>,
    grad: In<u8>,
    grad_x: Out<u8>,
    /// Bytes from one row to the next.
    x_row: u32,
    grad_row: u32,
    /// Pieces of `N` values of a row.
    pieces: u32,
}

/// A row and its weight.
#[derive(Clone, Copy)]
struct Choice {
    row: u32,
    weight: f32,
}

impl Rows {
    #[inline(always)]
    #[track_caller]
    fn load<X: Element, const N: usize>(self, row: u32, piece: u32) -> [u32; 4] {
        X::load::<N>(self.x.at(row as u64 * self.x_row as u64 + piece as u64 * (N as u64 * X::BYTES as u64)))
    }

    #[inline(always)]
    #[track_caller]
    fn store<X: Element, const N: usize>(self, row: u32, piece: u32, values: [f32; 8]) {
        let at = (row as u64 * self.pieces as u64 + piece as u64) * (N as u64 * X::BYTES as u64);
        X::store::<N>(self.grad_x.at(at), values);
    }

    /// One piece of one row: its gradient, and its part of the dot product.
    #[inline(always)]
    #[track_caller]
    fn step<X: Element, const N: usize>(self, to: Choice, piece: u32, x: [u32; 4], grad: [f32; 8], sum: f32) -> f32 {
        let (x, mut sum, mut product) = (X::decode(x), sum, [0.0; 8]);
        unroll!(i in 8 {
            if i < N {
                sum = fma(grad[i], x[i], sum);
                // A product, whose NaN is the same on both backends.
                product[i] = fma(grad[i], to.weight, -0.0);
            }
        });
        self.store::<X, N>(to.row, piece, product);
        sum
    }

    /// Two rows of a token; this thread's parts of their dot products.
    #[inline(always)]
    #[track_caller]
    fn pair<X: Element, G: Element, const N: usize>(self, token: u32, one: Choice, other: Choice) -> (f32, f32) {
        let grad = self.grad.at(token as u64 * self.grad_row as u64);
        let (mut sum, mut other_sum) = (0.0, 0.0);
        let mut piece = thread_idx();
        while piece < self.pieces {
            rolled();
            let held = G::load::<N>(grad.at(piece as u64 * (N as u64 * G::BYTES as u64)));
            let (x, other_x) = (self.load::<X, N>(one.row, piece), self.load::<X, N>(other.row, piece));
            let held = G::decode(held);
            sum = self.step::<X, N>(one, piece, x, held, sum);
            other_sum = self.step::<X, N>(other, piece, other_x, held, other_sum);
            piece += THREADS;
        }
        (sum, other_sum)
    }

    /// One row of a token.
    #[inline(always)]
    #[track_caller]
    fn single<X: Element, G: Element, const N: usize>(self, token: u32, one: Choice) -> f32 {
        let grad = self.grad.at(token as u64 * self.grad_row as u64);
        let mut sum = 0.0;
        let mut piece = thread_idx();
        while piece < self.pieces {
            rolled();
            let held = G::load::<N>(grad.at(piece as u64 * (N as u64 * G::BYTES as u64)));
            let x = self.load::<X, N>(one.row, piece);
            sum = self.step::<X, N>(one, piece, x, G::decode(held), sum);
            piece += THREADS;
        }
        sum
    }

    /// Zero those of 32 rows that are padding.
    #[inline(always)]
    #[track_caller]
    fn pad<X: Element, const N: usize>(self, pos_to_expert: In<i32>, first: u32, p: u32) {
        let row = first + lane_id();
        // Each warp looks for itself, and all of them write each row together.
        let mut rest = warp_ballot(row < p && pos_to_expert.get(row) < 0);
        while rest != 0 {
            rolled();
            let row = first + rest.trailing_zeros();
            rest &= rest - 1;
            let mut piece = thread_idx();
            while piece < self.pieces {
                rolled();
                self.store::<X, N>(row, piece, [0.0; 8]);
                piece += THREADS;
            }
        }
    }
}

kernel! {
    op = reduce_fused_backward;
    threads = 256, blocks = 5;
    /// `pieces` of `N` values make a row; `x_row` and `grad_row` count bytes. `parts` blocks share a token's choices, and the magic number
    /// divides by it. Without `has_weights` every weight is 1.
    pub fn rows[X: Element, G: Element, const N: usize](
        x: In<u8>, grad: In<u8>, topk_weights: In<f32>, token_topk_to_pos: In<i32>, pos_to_expert: In<i32>,
        grad_x: Out<u8>, grad_topk_weights: Out<f32>,
        k: u32, p: u32, x_row: u32, grad_row: u32, pieces: u32, padding_blocks: u32, parts: u32, magic: u32, shift: u32, has_weights: u32,
    ) {
        let rows = Rows { x, grad, grad_x, x_row, grad_row, pieces };
        if block_idx_x() < padding_blocks {
            rows.pad::<X, N>(pos_to_expert, block_idx_x() * PADDING_ROWS, p);
            return;
        }
        let block = block_idx_x() - padding_blocks;
        let token = Divisor { magic, shift }.divide(block);
        let part = block - token * parts;
        let slots = token as u64 * k as u64;
        let (positions, weights, grad_weights) = (token_topk_to_pos.at(slots), topk_weights.at(slots), grad_topk_weights.at(slots));
        let (_, sums) = shared();
        let choice = |choice: u32| Choice {
            // Read again, from L1.
            row: positions.get(choice) as u32,
            weight: if has_weights != 0 { weights.get(choice) } else { 1.0 },
        };

        let mut first = 0;
        while first < k {
            rolled();
            let found = load_choices(positions.at(first as u64), k - first);
            let (mut with_row, mut mine, mut next) = (0, 0, part);
            unroll!(i in CHOICES {
                with_row |= (has_row(found[i], p) as u32) << i;
            });
            while next < CHOICES as u32 {
                rolled();
                mine |= 1 << next;
                next += parts;
            }
            let mut rest = with_row & mine;
            while rest != 0 {
                rolled();
                let one = rest.trailing_zeros();
                rest &= rest - 1;
                if rest == 0 {
                    let sum = warp_sum::<WARP_SIZE>(rows.single::<X, G, N>(token, choice(first + one)));
                    if lane_id() == 0 {
                        sums.set(one * WARPS + warp_id(), sum);
                    }
                } else {
                    let other = rest.trailing_zeros();
                    rest &= rest - 1;
                    let (sum, other_sum) = rows.pair::<X, G, N>(token, choice(first + one), choice(first + other));
                    let (sum, other_sum) = (warp_sum::<WARP_SIZE>(sum), warp_sum::<WARP_SIZE>(other_sum));
                    if lane_id() == 0 {
                        sums.set(one * WARPS + warp_id(), sum);
                        sums.set(other * WARPS + warp_id(), other_sum);
                    }
                }
            }
            block_sync();
            // A warp for each choice.
            let of_warp = first + warp_id();
            if of_warp < k && mine >> warp_id() & 1 != 0 {
                let has = with_row >> warp_id() & 1 != 0;
                let sum = if has && lane_id() < WARPS { sums.get(warp_id() * WARPS + lane_id()) } else { 0.0 };
                let sum = warp_sum::<WARPS>(sum);
                if lane_id() == 0 {
                    grad_weights.set(of_warp, canonical(sum));
                }
            }
            first += CHOICES as u32;
            if first < k {
                block_sync();
            }
        }
    }
    entries {
        f32_f32[F32, F32, 4], f32_bf16[F32, Bf16, 4], bf16_f32[Bf16, F32, 4], bf16_bf16[Bf16, Bf16, 8],
        f32_f32_narrow[F32, F32, 1], f32_bf16_narrow[F32, Bf16, 1], bf16_f32_narrow[Bf16, F32, 1], bf16_bf16_narrow[Bf16, Bf16, 1],
    }
}
