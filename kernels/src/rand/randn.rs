//! randn: standard normal values from Philox4x32-10 by the method of Box and Muller.
//!
//! Out   out f32 or bf16 `[n]`; element `i` is made of word `i % 4` and its neighbour of the Philox block `i / 4`
//! Exact integer code, additions, products, multiply-adds and correctly rounded roots only: the same bits on both backends. bf16 values
//!       are the f32 values of the same call, rounded. Polynomials are within 1.1e-6 of the functions, which no sample of 2^34 shows.
//! Map   two Philox blocks, so 8 elements, a thread and step; the round keys of a call are made once for all its steps.
//! Cost  4·n or 2·n bytes written, 30 instructions an element (10 Philox, 17 Box and Muller): f32 is memory bound, bf16 by arithmetic.

use crate::device::*;
use crate::{kernel, unroll};

/// Threads of a block.
pub const THREADS: u32 = 256;
/// Elements of a block's step.
pub const STEP: u64 = 8 * THREADS as u64;
/// Most elements of one launch, whose Philox blocks are numbered below 2^31.
pub const MAX_ELEMENTS: u64 = 1 << 33;
/// Most steps of a block. The round keys cost 20 instructions, a step 240.
const MAX_STEPS: u64 = 8;
/// Blocks that an H100 has at the same time; larger launches give blocks more steps.
const BLOCKS: u64 = 132 * 8;

/// Steps of each block.
pub const fn steps(num_elements: u64) -> u32 {
    let even = num_elements / (STEP * BLOCKS);
    (if even < 1 {
        1
    } else if even > MAX_STEPS {
        MAX_STEPS
    } else {
        even
    }) as u32
}

/// Grid and block for at most [`MAX_ELEMENTS`].
pub const fn config(num_elements: u64) -> LaunchConfig {
    LaunchConfig::new(num_elements.div_ceil(STEP * steps(num_elements) as u64) as u32, THREADS)
}

/// Grid and block of [`count`].
pub const COUNT_CONFIG: LaunchConfig = LaunchConfig::new(1, WARP_SIZE);

/// An element type of the result.
pub trait Element {
    /// The two Philox blocks of thread `t`, counted from the first of the step: those of one vector or of two vectors that lie a whole
    /// warp's store apart.
    fn blocks(t: u32) -> [u32; 2];

    /// Write `values` of the Philox blocks `blocks`. The first `num_vectors` vectors are written whole, other elements one by one.
    fn store(out: Out<u8>, blocks: [u32; 2], values: [[f32; 4]; 2], num_vectors: u32, num_elements: u64);
}

/// f32.
pub struct F32;
/// bf16.
pub struct Bf16;

impl Element for F32 {
    #[inline(always)]
    fn blocks(t: u32) -> [u32; 2] {
        [t, t + THREADS]
    }

    #[inline(always)]
    #[track_caller]
    fn store(out: Out<u8>, blocks: [u32; 2], values: [[f32; 4]; 2], num_vectors: u32, num_elements: u64) {
        unroll!(i in 2 {
            let (block, values) = (blocks[i], values[i].map(f32::to_bits));
            let to = out.at(block as u64 * 16);
            if block < num_vectors {
                to.store16(0, values);
            } else {
                unroll_store(to.cast::<u32>(), values, block as u64 * 4, num_elements);
            }
        });
    }
}

/// The elements before the end, one by one.
#[inline(always)]
#[track_caller]
fn unroll_store<W: Word, const N: usize>(to: Out<W>, values: [W; N], first: u64, num_elements: u64) {
    unroll!(j in N {
        if first + (j as u64) < num_elements {
            to.set(j as u32, values[j]);
        }
    });
}

impl Element for Bf16 {
    #[inline(always)]
    fn blocks(t: u32) -> [u32; 2] {
        [2 * t, 2 * t + 1]
    }

    #[inline(always)]
    #[track_caller]
    fn store(out: Out<u8>, blocks: [u32; 2], [a, b]: [[f32; 4]; 2], num_vectors: u32, num_elements: u64) {
        let words =
            [f32x2_to_bf16x2(a[0], a[1]), f32x2_to_bf16x2(a[2], a[3]), f32x2_to_bf16x2(b[0], b[1]), f32x2_to_bf16x2(b[2], b[3])];
        let to = out.at(blocks[0] as u64 * 8);
        if blocks[0] / 2 < num_vectors {
            to.store16(0, words);
        } else {
            let values: [u16; 8] = core::array::from_fn(|i| (words[i / 2] >> (i % 2 * 16)) as u16);
            unroll_store(to.cast::<u16>(), values, blocks[0] as u64 * 4, num_elements);
        }
    }
}

/// What is different from call to call: key and upper counter words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// Key of Philox.
    pub key: [u32; 2],
    /// Counter words 2 and 3.
    pub counter: [u32; 2],
}

impl Call {
    /// Call number `calls` of a generator with this seed.
    ///
    /// The first key word is the specification's hash of `seed + calls`. With it alone, the second call of seed 0 would be the first one of
    /// seed 1; the number of the call as part of the counter keeps them apart, and the upper half of the seed is the second key word.
    #[inline(always)]
    pub const fn new(seed: u64, calls: u64) -> Self {
        let mut z = (seed as u32).wrapping_add(calls as u32).wrapping_add(0x9E37_79B9);
        z = (z ^ (z >> 16)).wrapping_mul(0x21F0_AAAD);
        z = (z ^ (z >> 15)).wrapping_mul(0x735A_2D97);
        z ^= z >> 15;
        Self { key: [z, (seed >> 32) as u32], counter: [calls as u32, (calls >> 32) as u32] }
    }
}

/// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3; SC 2011).
#[inline(always)]
pub fn philox(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let mut c = counter;
    unroll!(round in 10 {
        let ([low0, high0], [low1, high1]) = (multiply_wide(c[0], 0xD251_1F53), multiply_wide(c[2], 0xCD9E_8D57));
        let round_key = |i: usize, step: u32| key[i].wrapping_add(step.wrapping_mul(round as u32));
        c = [high1 ^ c[1] ^ round_key(0, 0x9E37_79B9), low1, high0 ^ c[3] ^ round_key(1, 0xBB67_AE85), low0];
    });
    c
}

/// Two independent standard normal values of two words.
///
/// The magnitude of the first word, read as a signed integer, is `u` in (0, 1], at least 2^-32, and gives the radius `sqrt(-2 ln u)`; its sign is
/// that of the first value. The second word is an angle in half a circle, from -pi/2 to pi/2, whose sine has both signs.
#[inline(always)]
pub fn normal_pair([first, second]: [u32; 2]) -> [f32; 2] {
    // u * 2^31. The half is lost in the rounding of all but small numbers, and keeps 0 out.
    let scaled = (first as i32 as f32).abs() + 0.5;
    // `u = 2^e * (1 + f)` with `1 + f` from 2/3 to 4/3, so that the radius is accurate near `u = 1`, where `e` is 0. `e` is held shifted.
    let shifted_31 = 31 << 23;
    let bits = scaled.to_bits();
    let e = bits.wrapping_sub((2.0f32 / 3.0).to_bits() + shifted_31) & 0xFF80_0000;
    let f = f32::from_bits(bits.wrapping_sub(e).wrapping_sub(shifted_31)) - 1.0;
    // -2 ln(1 + f) / f, relative error 1.1e-6.
    let p = fma(-0.341_305_1, f, 0.388_153_73);
    let p = fma(p, f, -0.396_053_85);
    let p = fma(p, f, 0.496_833_18);
    let p = fma(p, f, -0.666_753_4);
    let p = fma(p, f, 1.000_044_8);
    let p = fma(p, f, -1.999_999_8);
    // Not quite 0 where u is 1, for the root.
    let square = fma(e as i32 as f32, -2.0 * core::f32::consts::LN_2 / (1 << 23) as f32, f32::from_bits((127 - 60) << 23));
    let radius = sqrt_normal(fma(f, p, square));

    let y = second as i32 as f32 * (1.0 / 2_147_483_648.0);
    let y2 = y * y;
    // cos(pi/2 y), error 4.7e-8.
    let c = fma(8.581_906e-4, y2, -0.020_810_628);
    let c = fma(c, y2, 0.253_650_75);
    let c = fma(c, y2, -1.233_698_2);
    let c = fma(c, y2, 0.999_999_94);
    // sin(pi/2 y) / y, error 5.9e-7.
    let s = fma(-4.333_177e-3, y2, 0.079_434_5);
    let s = fma(s, y2, -0.645_892_9);
    let s = fma(s, y2, 1.570_791);
    [f32::from_bits((radius * c).to_bits() ^ (first & 0x8000_0000)), radius * y * s]
}

/// The four values of a Philox block.
#[inline(always)]
fn normals(counter: [u32; 4], key: [u32; 2]) -> [f32; 4] {
    let [a, b, c, d] = philox(counter, key);
    let ([a, b], [c, d]) = (normal_pair([a, b]), normal_pair([c, d]));
    [a, b, c, d]
}

/// The steps of this thread's block. `launch` is the number of the launch among those of one call.
#[inline(always)]
#[track_caller]
fn steps_of_block<T: Element>(out: Out<u8>, num_elements: u64, num_vectors: u32, steps: u32, launch: u32, call: Call) {
    // Philox blocks of the call before this launch: whole multiples of 2^31.
    let (first, high) = (launch << 31, launch >> 1);
    let num_blocks = num_elements.div_ceil(4) as u32;
    let [a, b] = T::blocks(thread_idx());
    let mut at = block_idx_x() * steps * (2 * THREADS);
    let end = at + steps * (2 * THREADS);
    while at < end {
        rolled();
        if a + at >= num_blocks {
            return;
        }
        let blocks = [a + at, b + at];
        let values = |block: u32| normals([first + block, high, call.counter[0], call.counter[1]], call.key);
        T::store(out, blocks, [values(blocks[0]), values(blocks[1])], num_vectors, num_elements);
        at += 2 * THREADS;
    }
}

kernel! {
    op = randn;
    threads = 256, blocks = 4;
    /// Of a call that the host counts.
    pub fn fill[T: Element](
        out: Out<u8>, num_elements: u64, num_vectors: u32, steps: u32, launch: u32, key0: u32, key1: u32, calls0: u32, calls1: u32,
    ) {
        let call = Call { key: [key0, key1], counter: [calls0, calls1] };
        steps_of_block::<T>(out, num_elements, num_vectors, steps, launch, call);
    }
    entries { f32[F32], bf16[Bf16] }
}

kernel! {
    op = randn;
    threads = 256, blocks = 4;
    /// Of a call that device memory counts: `state` is the seed and the number of calls so far.
    pub fn fill_counted[T: Element](
        state: In<u64>, out: Out<u8>, num_elements: u64, num_vectors: u32, steps: u32, launch: u32,
    ) {
        let call = Call::new(state.get(0), state.get(1));
        steps_of_block::<T>(out, num_elements, num_vectors, steps, launch, call);
    }
    entries { f32[F32], bf16[Bf16] }
}

kernel! {
    op = randn;
    threads = 32;
    /// One call more.
    pub fn count(state: Out<u64>) {
        if thread_idx() == 0 {
            state.set(1, state.get(1).wrapping_add(1));
        }
    }
}
