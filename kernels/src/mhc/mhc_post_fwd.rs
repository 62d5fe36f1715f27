//! mhc_post_fwd: write a sub-layer's output into the `m` residual streams of each token and mix the streams.
//!
//! In   x bf16 [t, h]; residual bf16 [t, m, h]; post f32 [t, m]; comb f32 [t, m, m]      Out  out bf16 [t, m, h]
//! `out[o] = comb[0][o]*residual[0]`, `fma(post[o], x, _)`, `fma(comb[i][o], residual[i], _)` for i = 1.., rounded to bf16 once.
//! Map   one thread per 8 columns of a token and all its streams, in registers only; the mixes are broadcast loads.
//! Cost  2·t·h·(2·m + 1) + 4·t·m·(m + 1) bytes; m·(m + 1) multiply-adds a column (40 flop for 18 bytes at m = 4): memory bound.

use crate::device::*;
use crate::{kernel, unroll};

/// Threads of a block of [`columns`].
pub const THREADS: u32 = 256;

/// Threads of a block of [`eight`].
pub const EIGHT_THREADS: u32 = 128;

/// Threads of a block of [`any`].
pub const ANY_THREADS: u32 = 256;

/// Columns of a 16-byte vector.
pub const COLUMNS: u32 = 8;

/// Launch of [`columns`]: one thread per vector of a token. Small hidden sizes need no special case, because threads run through
/// tokens and columns as one range.
pub const fn columns_config(num_tokens: u32, hidden: u32) -> LaunchConfig {
    LaunchConfig::new(ceil_div(num_tokens * (hidden / COLUMNS), THREADS), THREADS)
}

/// Launch of [`eight`].
pub const fn eight_config(num_tokens: u32, hidden: u32) -> LaunchConfig {
    LaunchConfig::new(ceil_div(num_tokens * (hidden / COLUMNS), EIGHT_THREADS), EIGHT_THREADS)
}

/// Launch of [`any`]: one thread per column of a token.
pub const fn any_config(num_tokens: u32, hidden: u32) -> LaunchConfig {
    LaunchConfig::new(ceil_div(num_tokens * hidden, ANY_THREADS), ANY_THREADS)
}

/// `N` floats from a pointer that is aligned to all of them or to 16 bytes.
#[inline(always)]
fn load_f32s<const N: usize>(from: In<f32>) -> [f32; N] {
    // Twos are the only size that is not made of 16-byte vectors; those loads are merged by the compiler.
    core::array::from_fn(|i| {
        let bits = if N.is_multiple_of(4) { from.load16(i as u32 / 4 * 4)[i % 4] } else { from.load8(i as u32 / 2 * 2)[i % 2] };
        f32::from_bits(bits)
    })
}

/// What a thread holds of its token: one 16-byte vector of the sub-layer output and of every stream.
#[derive(Clone, Copy)]
struct Vectors<const M: usize> {
    x: [u32; 4],
    residual: [[u32; 4]; M],
}

impl<const M: usize> Vectors<M> {
    #[inline(always)]
    fn load(x: In<u16>, residual: In<u16>, h: u32, col: u32) -> Self {
        let mut vectors = Self { x: x.load16(col), residual: [[0; 4]; M] };
        unroll!(i in M {
            vectors.residual[i] = residual.load16(i as u32 * h + col);
        });
        vectors
    }

    /// One output stream, from its weight in `post` and its column of `comb`.
    #[inline(always)]
    fn mix(&self, post: f32, comb: &[f32; M]) -> [u32; 4] {
        [self.mix_word(post, comb, 0), self.mix_word(post, comb, 1), self.mix_word(post, comb, 2), self.mix_word(post, comb, 3)]
    }

    #[inline(always)]
    fn mix_word(&self, post: f32, comb: &[f32; M], w: usize) -> u32 {
        let (x, first) = (bf16x2_to_f32(self.x[w]), bf16x2_to_f32(self.residual[0][w]));
        let mut lo = fma(post, x[0], comb[0] * first[0]);
        let mut hi = fma(post, x[1], comb[0] * first[1]);
        unroll!(i in M {
            if i > 0 {
                let stream = bf16x2_to_f32(self.residual[i][w]);
                lo = fma(comb[i], stream[0], lo);
                hi = fma(comb[i], stream[1], hi);
            }
        });
        f32x2_to_bf16x2(lo, hi)
    }
}

/// Column `i` of `mixes` becomes `weights`.
#[inline(always)]
fn set_column<const M: usize>(mixes: &mut [[f32; M]; M], i: usize, weights: [f32; M]) {
    unroll!(o in M {
        mixes[o][i] = weights[o];
    });
}

/// What a kernel works on; strides follow from the sizes.
#[derive(Clone, Copy)]
struct Tensors {
    x: In<u16>,
    residual: In<u16>,
    post: In<f32>,
    comb: In<f32>,
    out: Out<u16>,
}

/// One vector of a token for thread `thread` of the launch. `h` is a multiple of 8, all tensors are 16-byte aligned.
#[inline(always)]
fn mix_token<const M: usize>(thread: u32, tensors: Tensors, t: u32, h: u32) {
    let Tensors { x, residual, post, comb, out } = tensors;
    let vectors = h / COLUMNS;
    let token = thread.checked_div(vectors).unwrap_or(0);
    if token >= t {
        return;
    }
    let col = (thread - token * vectors) * COLUMNS;

    let (m, token) = (M as u32, token as u64);
    // Everything is loaded before the first multiplication, which keeps the memory busy.
    let vectors = Vectors::<M>::load(x.at(token * h as u64), residual.at(token * m as u64 * h as u64), h, col);
    let post: [f32; M] = load_f32s(post.at(token * m as u64));
    let comb = comb.at(token * m as u64 * m as u64);
    // Turned, so that an output stream has its weights together.
    let mut mixes = [[0.0; M]; M];
    unroll!(i in M {
        let weights: [f32; M] = load_f32s(comb.at(i as u64 * m as u64));
        set_column(&mut mixes, i, weights);
    });

    let to = out.at(token * m as u64 * h as u64);
    unroll!(o in M {
        to.store16(o as u32 * h + col, vectors.mix(post[o], &mixes[o]));
    });
}

kernel! {
    op = mhc_post_fwd;
    threads = 256, blocks = 3;
    /// One vector of a token per thread; see `mix_token`. Three blocks on a multiprocessor: with a fourth a thread has 64 registers, and
    /// four streams spill.
    pub fn columns[const M: usize](
        x: In<u16>, residual: In<u16>, post: In<f32>, comb: In<f32>, out: Out<u16>, t: u32, h: u32,
    ) {
        mix_token::<M>(block_idx_x() * THREADS + thread_idx(), Tensors { x, residual, post, comb, out }, t, h);
    }
    entries { m2[2], m4[4] }
}

kernel! {
    op = mhc_post_fwd;
    threads = 128, blocks = 3;
    /// As [`columns`] for eight streams, which take twice the registers.
    pub fn eight(x: In<u16>, residual: In<u16>, post: In<f32>, comb: In<f32>, out: Out<u16>, t: u32, h: u32) {
        mix_token::<8>(block_idx_x() * EIGHT_THREADS + thread_idx(), Tensors { x, residual, post, comb, out }, t, h);
    }
}

kernel! {
    op = mhc_post_fwd;
    threads = 256;
    /// Any number of streams, any `h`, any alignment.
    pub fn any(x: In<u16>, residual: In<u16>, post: In<f32>, comb: In<f32>, out: Out<u16>, t: u32, m: u32, h: u32) {
        let thread = block_idx_x() * ANY_THREADS + thread_idx();
        let token = thread.checked_div(h).unwrap_or(0);
        if token >= t {
            return;
        }
        let col = thread - token * h;
        let token = token as u64;
        let (rows, to) = (residual.at(token * m as u64 * h as u64), out.at(token * m as u64 * h as u64));
        let (post, comb) = (post.at(token * m as u64), comb.at(token * m as u64 * m as u64));
        let stream = |i: u32| bf16x2_to_f32(rows.at(i as u64 * h as u64).get(col) as u32)[0];

        let x = bf16x2_to_f32(x.at(token * h as u64).get(col) as u32)[0];
        let first = stream(0);
        for o in 0..m {
            let mut acc = comb.get(o) * first;
            acc = fma(post.get(o), x, acc);
            for i in 1..m {
                acc = fma(comb.get(i * m + o), stream(i), acc);
            }
            to.at(o as u64 * h as u64).set(col, f32x2_to_bf16x2(acc, 0.0) as u16);
        }
    }
}
