//! reduce_fused: add up the rows of the expanded buffer that belong to a token, with weights.
//!
//! In    x f32, bf16 or e4m3 [p, h]; x_sf f32 \[p\]; topk_weights f32 [t, k]; token_topk_to_pos i32 [t, k]; sf f32 \[1\]
//! Out   out f32, bf16 or e4m3 [t, h]
//! Exact `acc = fma(x\[p\], topk_weights * x_sf\[p\], acc)` from 0 on in ascending order of the choices, `acc * sf`, then to nearest even.
//! Map   one warp per chunk of a token: 4 vectors of 8 columns a lane (of 4 where a tensor is f32), a warp's width apart. Its lanes read
//!       a choice each; then it walks those that have a row, mostly one or two of `k`, and loads the rows of two of them at a time.
//!       Rows that are short or don't fill their chunks: one thread per vector, or per column where alignment wants it.
//! Cost  a row of x read for each choice that has one, out written once; 2 to 3 instructions a byte: memory bound.

use super::common_expanded::{CHOICES, has_row, load_choices};
use crate::device::*;
use crate::quant::common::Divisor;
use crate::{kernel, unroll};

/// Threads of a block of [`rows`](mod@rows).
pub const THREADS: u32 = 256;
/// Threads of a block of [`chunks`](mod@chunks).
pub const CHUNK_THREADS: u32 = 128;
/// Vectors of a lane of [`chunks`](mod@chunks).
pub const VECTORS: usize = 4;
/// Vectors of a chunk.
pub const CHUNK: u32 = 32 * VECTORS as u32;
/// Most items of one launch. All threads are numbered below 2^31, see [`Divisor`].
pub const MAX_ITEMS: u64 = (1 << 31) - THREADS as u64;

/// Values that a thread of the wide kernels has of a row, for elements of these sizes: 16 bytes of the larger ones.
pub const fn values(x_bytes: u64, out_bytes: u64) -> u32 {
    if x_bytes == 4 || out_bytes == 4 { 4 } else { 8 }
}

/// Grid and block for a number of items.
pub const fn config(num_items: u32) -> LaunchConfig {
    LaunchConfig::new(ceil_div(num_items, THREADS), THREADS)
}

/// Grid and block for a number of chunks.
pub const fn chunk_config(num_chunks: u32) -> LaunchConfig {
    LaunchConfig::new(ceil_div(num_chunks, CHUNK_THREADS / 32), CHUNK_THREADS)
}

/// Whether rows of `vectors` vectors leave at most a quarter of their chunks empty.
pub const fn fills_chunks(vectors: u32) -> bool {
    vectors as u64 * 4 >= ceil_div(vectors, CHUNK) as u64 * CHUNK as u64 * 3
}

/// An element type of rows. `N` neighbouring values are aligned to all of them; `N` is 1, 4 or 8.
pub trait Element {
    /// Bytes of a value.
    const BYTES: u32;

    /// `N` values as they lie in memory, in the low end of 16 bytes.
    fn load<const N: usize>(from: In<u8>) -> [u32; 4];

    /// Those values; only the first `N` mean something.
    fn decode(raw: [u32; 4]) -> [f32; 8];

    /// Write the first `N` values.
    fn store<const N: usize>(to: Out<u8>, values: [f32; 8]);
}

/// f32.
pub struct F32;
/// bf16.
pub struct Bf16;
/// e4m3.
pub struct E4m3;

/// 16, 8 or 4 bytes, in the low end of 16.
#[inline(always)]
#[track_caller]
fn load_words(from: In<u8>, bytes: u32) -> [u32; 4] {
    match bytes {
        16 => from.load16(0),
        8 => {
            let [a, b] = from.load8(0);
            [a, b, 0, 0]
        }
        _ => [from.load4(0), 0, 0, 0],
    }
}

/// The first 16, 8 or 4 bytes.
#[inline(always)]
#[track_caller]
fn store_words(to: Out<u8>, bytes: u32, words: [u32; 4]) {
    match bytes {
        16 => to.store16(0, words),
        8 => to.store8(0, [words[0], words[1]]),
        _ => to.store4(0, words[0]),
    }
}

impl Element for F32 {
    const BYTES: u32 = 4;

    #[inline(always)]
    #[track_caller]
    fn load<const N: usize>(from: In<u8>) -> [u32; 4] {
        load_words(from, 4 * N as u32)
    }

    #[inline(always)]
    fn decode(raw: [u32; 4]) -> [f32; 8] {
        core::array::from_fn(|i| f32::from_bits(raw[i & 3]))
    }

    #[inline(always)]
    #[track_caller]
    fn store<const N: usize>(to: Out<u8>, v: [f32; 8]) {
        store_words(to, 4 * N as u32, [v[0].to_bits(), v[1].to_bits(), v[2].to_bits(), v[3].to_bits()]);
    }
}

impl Element for Bf16 {
    const BYTES: u32 = 2;

    #[inline(always)]
    #[track_caller]
    fn load<const N: usize>(from: In<u8>) -> [u32; 4] {
        if N == 1 { [from.cast::<u16>().get(0) as u32, 0, 0, 0] } else { load_words(from, 2 * N as u32) }
    }

    #[inline(always)]
    fn decode(raw: [u32; 4]) -> [f32; 8] {
        let pairs = raw.map(bf16x2_to_f32);
        core::array::from_fn(|i| pairs[i / 2][i % 2])
    }

    #[inline(always)]
    #[track_caller]
    fn store<const N: usize>(to: Out<u8>, v: [f32; 8]) {
        let words = core::array::from_fn(|i| f32x2_to_bf16x2(v[2 * i], v[2 * i + 1]));
        if N == 1 { to.cast::<u16>().set(0, words[0] as u16) } else { store_words(to, 2 * N as u32, words) }
    }
}

impl Element for E4m3 {
    const BYTES: u32 = 1;

    #[inline(always)]
    #[track_caller]
    fn load<const N: usize>(from: In<u8>) -> [u32; 4] {
        if N == 1 { [from.get(0) as u32, 0, 0, 0] } else { load_words(from, N as u32) }
    }

    #[inline(always)]
    fn decode(raw: [u32; 4]) -> [f32; 8] {
        let (a, b) = (e4m3x4_to_f32(raw[0]), e4m3x4_to_f32(raw[1]));
        [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]]
    }

    #[inline(always)]
    #[track_caller]
    fn store<const N: usize>(to: Out<u8>, v: [f32; 8]) {
        let words = [f32x4_to_e4m3x4([v[0], v[1], v[2], v[3]]), f32x4_to_e4m3x4([v[4], v[5], v[6], v[7]]), 0, 0];
        if N == 1 { to.set(0, words[0] as u8) } else { store_words(to, N as u32, words) }
    }
}

/// Where the factors of rows come from; absent ones are not looked at.
#[derive(Clone, Copy)]
struct Factors {
    topk_weights: In<f32>,
    x_sf: In<f32>,
    has_weights: bool,
    has_x_sf: bool,
}

impl Factors {
    /// The factor of a row that is choice `choice` of this thread's token.
    #[inline(always)]
    #[track_caller]
    fn of(self, choice: u32, row: u32) -> f32 {
        let weight = if self.has_weights { self.topk_weights.get(choice) } else { 1.0 };
        let sf = if self.has_x_sf { self.x_sf.get(row) } else { 1.0 };
        // Outside of the branches, where it would hold up the loads that follow. Products with 1 change nothing.
        weight * sf
    }
}

/// A bit for each of the first choices in `positions`, at most `count`, that has a row.
#[inline(always)]
#[track_caller]
fn with_row(positions: In<i32>, count: u32, num_rows: u32) -> u32 {
    let rows = load_choices(positions, count);
    let mut bits = 0;
    unroll!(i in CHOICES {
        bits |= (has_row(rows[i], num_rows) as u32) << i;
    });
    bits
}

/// Bits that no load of these may be missing for.
#[inline(always)]
fn any_word<const V: usize>(held: &[[u32; 4]; V]) -> u32 {
    let mut bits = 0;
    unroll!(v in V {
        bits |= held[v][0];
    });
    bits
}

/// `acc + x * factor`, one rounding a value.
#[inline(always)]
fn add<const N: usize>(acc: &mut [f32; 8], x: [f32; 8], factor: f32) {
    unroll!(i in 8 {
        if i < N {
            acc[i] = fma(x[i], factor, acc[i]);
        }
    });
}

kernel! {
    op = reduce_fused;
    threads = 256, blocks = 6;
    /// 40 registers: with the 32 of full occupancy a thread waits for the factors of its first row before it asks for the second row.
    ///
    /// An item is `N` values of a token, `row_items` of them in a row; `x_row` counts bytes. The magic number divides by `row_items`.
    /// `has` says which optional tensors there are: bit 0 `topk_weights`, bit 1 `x_sf`, bit 2 `sf`.
    pub fn rows[X: Element, O: Element, const N: usize](
        x: In<u8>, x_sf: In<f32>, topk_weights: In<f32>, token_topk_to_pos: In<i32>, sf: In<f32>, out: Out<u8>,
        k: u32, num_rows: u32, x_row: u32, num_items: u32, row_items: u32, magic: u32, shift: u32, has: u32,
    ) {
        let item = block_idx_x() * THREADS + thread_idx();
        if item >= num_items {
            return;
        }
        let token = Divisor { magic, shift }.divide(item);
        let column = (item - token * row_items) * (N as u32 * X::BYTES);
        let choices = token as u64 * k as u64;
        let positions = token_topk_to_pos.at(choices);
        let factors =
            Factors { topk_weights: topk_weights.at(choices), x_sf, has_weights: has & 1 != 0, has_x_sf: has & 2 != 0 };

        let load = |row: u32| X::load::<N>(x.at(row as u64 * x_row as u64 + column as u64));
        let mut acc = [0.0; 8];
        let mut first = 0;
        while first < k {
            rolled();
            let mut rest = with_row(positions.at(first as u64), k - first, num_rows);
            while rest != 0 {
                rolled();
                let choice = first + rest.trailing_zeros();
                rest &= rest - 1;
                // Rows are read again, from L1.
                if rest == 0 {
                    let row = positions.get(choice) as u32;
                    let held = load(row);
                    add::<N>(&mut acc, X::decode(held), factors.of(choice, row));
                } else {
                    let next_choice = first + rest.trailing_zeros();
                    rest &= rest - 1;
                    let (row, next_row) = (positions.get(choice) as u32, positions.get(next_choice) as u32);
                    let (held, next) = (load(row), load(next_row));
                    let (factor, next_factor) = (factors.of(choice, row), factors.of(next_choice, next_row));
                    add::<N>(&mut acc, X::decode(held), factor);
                    add::<N>(&mut acc, X::decode(next), next_factor);
                }
            }
            first += CHOICES as u32;
        }
        if has & 4 != 0 {
            let sf = sf.get(0);
            // A product, whose NaN is the same on both backends.
            unroll!(i in 8 { acc[i] = fma(acc[i], sf, -0.0); });
        }
        O::store::<N>(out.at(item as u64 * (N as u32 * O::BYTES) as u64), acc);
    }
    entries {
        f32_f32[F32, F32, 4], f32_bf16[F32, Bf16, 4], f32_e4m3[F32, E4m3, 4],
        bf16_f32[Bf16, F32, 4], bf16_bf16[Bf16, Bf16, 8], bf16_e4m3[Bf16, E4m3, 8],
        e4m3_f32[E4m3, F32, 4], e4m3_bf16[E4m3, Bf16, 8], e4m3_e4m3[E4m3, E4m3, 8],
        f32_f32_narrow[F32, F32, 1], f32_bf16_narrow[F32, Bf16, 1], f32_e4m3_narrow[F32, E4m3, 1],
        bf16_f32_narrow[Bf16, F32, 1], bf16_bf16_narrow[Bf16, Bf16, 1], bf16_e4m3_narrow[Bf16, E4m3, 1],
        e4m3_f32_narrow[E4m3, F32, 1], e4m3_bf16_narrow[E4m3, Bf16, 1], e4m3_e4m3_narrow[E4m3, E4m3, 1],
    }
}

/// What a launch of chunks has: a row is `row_vectors` vectors of `N` values and `row_chunks` chunks.
#[derive(Clone, Copy)]
struct Chunks {
    num_chunks: u32,
    row_chunks: u32,
    row_vectors: u32,
    divisor: Divisor,
    /// Tokens from one to the one whose positions and weights are brought to L2 meanwhile; 0 for none.
    ahead: u32,
}

/// Tensors of a launch. `has` says which optional ones there are: bit 0 `topk_weights`, bit 1 `x_sf`, bit 2 `sf`.
#[derive(Clone, Copy)]
struct Tensors {
    x: In<u8>,
    x_sf: In<f32>,
    topk_weights: In<f32>,
    token_topk_to_pos: In<i32>,
    sf: In<f32>,
    out: Out<u8>,
    k: u32,
    num_rows: u32,
    /// Bytes from one row of `x` to the next.
    x_row: u32,
    has: u32,
}

/// A warp's chunk: `V` vectors a lane, rows of two choices at once with `PAIRS`, and no lane without vectors with `WHOLE`.
#[inline(always)]
#[track_caller]
fn sum_chunk<X: Element, O: Element, const N: usize, const V: usize, const PAIRS: bool, const WHOLE: bool>(
    tensors: Tensors,
    chunks: Chunks,
) {
    let Tensors { x, x_sf, topk_weights, token_topk_to_pos, sf, out, k, num_rows, x_row, has } = tensors;
    let Chunks { num_chunks, row_chunks, row_vectors, divisor, ahead } = chunks;
    let chunk = block_idx_x() * (CHUNK_THREADS / 32) + warp_id();
    if chunk >= num_chunks {
        return;
    }
    let token = divisor.divide(chunk);
    let first_vector = (chunk - token * row_chunks) * (32 * V as u32);
    let start = first_vector + lane_id();
    let bytes = N as u32 * X::BYTES;
    let x_start = x.at((start * bytes) as u64);

    let load = |row: u32| -> [[u32; 4]; V] {
        let offset = row as u64 * x_row as u64;
        let mut held = [[0; 4]; V];
        unroll!(v in V {
            held[v] = if WHOLE {
                X::load::<N>(x_start.at(offset).at((32 * v as u32 * bytes) as u64))
            } else {
                // Lanes beyond the end load the last vector: no branch stands between the loads.
                let vector = Ord::min(start + 32 * v as u32, row_vectors - 1);
                X::load::<N>(x.at(offset).at((vector * bytes) as u64))
            };
        });
        held
    };
    // 0, which the compiler does not know.
    let none = num_chunks >> 31;
    // A factor in a uniform register would be waited for here.
    let scale = if has & 4 != 0 { sf.get(lane_id() & none) } else { 1.0 };
    let mut acc = [[0.0; 8]; V];
    let mut first = 0;
    while first < k {
        rolled();
        // Made anew for every 32 choices, which are mostly all: registers are short.
        let choices = opaque(token) as u64 * k as u64;
        let (positions, topk_weights) = (token_topk_to_pos.at(choices), topk_weights.at(choices));
        let choice = first + lane_id();
        let (mut row, mut weight, mut row_sf) = (-1, 1.0, 1.0);
        if choice < k {
            row = positions.get(choice);
            if has & 1 != 0 {
                weight = topk_weights.get(choice);
            }
            // One warp of a token asks for those of a token that runs later: they wait for nothing but L2 then.
            if ahead != 0 && first_vector == 0 && choice.is_multiple_of(8) && chunk + ahead * row_chunks < num_chunks {
                positions.prefetch(choice + ahead * k);
                if has & 1 != 0 {
                    topk_weights.prefetch(choice + ahead * k);
                }
            }
        }
        let used = has_row(row, num_rows);
        if has & 2 != 0 && used {
            row_sf = x_sf.get(row as u32);
        }
        let row = row as u32;
        // Behind the loads, which would wait for weights and factors otherwise: all of them take part. Products with 1 change nothing.
        let factor = |lane: u32, loaded: u32| {
            let lane = lane ^ (loaded & none);
            warp_shuffle(weight, lane) * warp_shuffle(row_sf, lane)
        };
        let mut rest = warp_ballot(used);
        while rest != 0 {
            rolled();
            let lane = rest.trailing_zeros();
            rest &= rest - 1;
            if !PAIRS || rest == 0 {
                let held = load(warp_shuffle(row, lane));
                let factor = factor(lane, any_word(&held));
                unroll!(v in V { add::<N>(&mut acc[v], X::decode(held[v]), factor); });
            } else {
                let next_lane = rest.trailing_zeros();
                rest &= rest - 1;
                let (row, next_row) = (warp_shuffle(row, lane), warp_shuffle(row, next_lane));
                let (held, next) = (load(row), load(next_row));
                let all = any_word(&held) | any_word(&next);
                let (factor, next_factor) = (factor(lane, all), factor(next_lane, all));
                unroll!(v in V { add::<N>(&mut acc[v], X::decode(held[v]), factor); });
                unroll!(v in V { add::<N>(&mut acc[v], X::decode(next[v]), next_factor); });
            }
        }
        first += 32;
    }
    // A product, whose NaN is the same on both backends; with 1 it changes nothing.
    unroll!(v in V { unroll!(i in 8 { if i < N { acc[v][i] = fma(acc[v][i], scale, -0.0); } }); });
    let bytes = (N as u32 * O::BYTES) as u64;
    let out = out.at(token as u64 * row_vectors as u64 * bytes + start as u64 * bytes);
    unroll!(v in V {
        if WHOLE || start + 32 * (v as u32) < row_vectors {
            O::store::<N>(out.at(32 * v as u64 * bytes), acc[v]);
        }
    });
}

/// `acc + x * factor` of vectors `first ..` of a lane, at most four of them at once.
#[inline(always)]
#[track_caller]
fn add_four<X: Element, const N: usize, const V: usize>(acc: &mut [[f32; 8]; V], from: In<u8>, first: usize, factor: f32) {
    let mut held = [[0; 4]; 4];
    unroll!(i in 4 {
        if first + i < V {
            held[i] = X::load::<N>(from.at((32 * (first + i) * N) as u64 * X::BYTES as u64));
        }
    });
    unroll!(i in 4 {
        if first + i < V {
            add::<N>(&mut acc[first + i], X::decode(held[i]), factor);
        }
    });
}

/// A warp's chunk where all lanes have `V` vectors and tokens at most 32 choices. The first row, mostly the only one, is loaded at once into
/// what becomes its sum; meanwhile the others are brought to L2, from where they are added with few registers.
#[inline(always)]
#[track_caller]
fn sum_whole<X: Element, O: Element, const N: usize, const V: usize>(tensors: Tensors, chunks: Chunks) {
    let Tensors { x, x_sf, topk_weights, token_topk_to_pos, sf, out, k, num_rows, x_row, has } = tensors;
    let Chunks { num_chunks, row_chunks, row_vectors, divisor, ahead } = chunks;
    let chunk = block_idx_x() * (CHUNK_THREADS / 32) + warp_id();
    if chunk >= num_chunks {
        return;
    }
    let lane = lane_id();
    let token = divisor.divide(chunk);
    let first_vector = (chunk - token * row_chunks) * (32 * V as u32);
    let start = first_vector + lane;
    let bytes = N as u32 * X::BYTES;
    let chunk_bytes = 32 * V as u32 * bytes;
    let choice = token as u64 * k as u64 + lane as u64;
    // 0, which the compiler does not know.
    let none = num_chunks >> 31;

    let (mut row, mut weight, mut row_sf, mut scale) = (-1, 1.0, 1.0, 1.0);
    if lane < k {
        row = token_topk_to_pos.at(choice).get(0);
        if has & 1 != 0 {
            weight = topk_weights.at(choice).get(0);
        }
    }
    if has & 4 != 0 {
        // The same for all lanes, but a uniform register would be waited for here.
        scale = sf.get(lane & none);
    }
    // One warp of a token asks for the choices of a token that runs later, so that they come from L2 then.
    if ahead != 0 && first_vector == 0 && lane < k && lane.is_multiple_of(8) && chunk + ahead * row_chunks < num_chunks {
        let later = choice + ahead as u64 * k as u64;
        token_topk_to_pos.at(later).prefetch(0);
        if has & 1 != 0 {
            topk_weights.at(later).prefetch(0);
        }
    }
    let used = has_row(row, num_rows);
    if has & 2 != 0 && used {
        row_sf = x_sf.get(row as u32);
    }
    let row = row as u32;
    let mut rest = warp_ballot(used);
    let mut acc = [[0.0; 8]; V];
    if rest != 0 {
        let first = rest.trailing_zeros();
        rest &= rest - 1;
        let from = x.at(warp_shuffle(row, first) as u64 * x_row as u64 + (start * bytes) as u64);
        let mut held = [[0; 4]; V];
        unroll!(v in V { held[v] = X::load::<N>(from.at((32 * v as u32 * bytes) as u64)); });
        if has & 8 != 0 {
            let mut later = rest;
            while later != 0 {
                rolled();
                let row = warp_shuffle(row, later.trailing_zeros());
                later &= later - 1;
                let from = x.at(row as u64 * x_row as u64 + (first_vector * bytes) as u64);
                unroll!(i in 2 {
                    let line = lane * 128 + 4096 * i as u32;
                    if line < chunk_bytes {
                        from.prefetch(line);
                    }
                });
            }
        }
        // Behind the loads, which would wait for weights and factors otherwise: all of them take part. Products with 1 change nothing.
        let first = first ^ (any_word(&held) & none);
        let factor = warp_shuffle(weight, first) * warp_shuffle(row_sf, first);
        unroll!(v in V { add::<N>(&mut acc[v], X::decode(held[v]), factor); });
        while rest != 0 {
            rolled();
            let next = rest.trailing_zeros();
            rest &= rest - 1;
            let from = x.at(warp_shuffle(row, next) as u64 * x_row as u64 + (start * bytes) as u64);
            let factor = warp_shuffle(weight, next) * warp_shuffle(row_sf, next);
            unroll!(four in 4 {
                if 4 * four < V {
                    add_four::<X, N, V>(&mut acc, from, 4 * four, factor);
                }
            });
        }
    }
    let bytes = (N as u32 * O::BYTES) as u64;
    let out = out.at((token as u64 * row_vectors as u64 + start as u64) * bytes);
    unroll!(v in V {
        // A product, whose NaN is the same on both backends; with 1 it changes nothing.
        unroll!(i in 8 { if i < N { acc[v][i] = fma(acc[v][i], scale, -0.0); } });
        O::store::<N>(out.at(32 * v as u64 * bytes), acc[v]);
    });
}

kernel! {
    op = reduce_fused;
    threads = 128, blocks = 5;
    /// Chunks of any rows.
    ///
    /// A row is `row_vectors` vectors of `N` values and `row_chunks` chunks; `x_row` counts bytes. The magic number divides by
    /// `row_chunks`. `has` as for [`rows`](mod@rows).
    pub fn chunks[X: Element, O: Element, const N: usize, const V: usize](
        x: In<u8>, x_sf: In<f32>, topk_weights: In<f32>, token_topk_to_pos: In<i32>, sf: In<f32>, out: Out<u8>,
        k: u32, num_rows: u32, x_row: u32, num_chunks: u32, row_chunks: u32, row_vectors: u32, magic: u32, shift: u32, ahead: u32, has: u32,
    ) {
        let tensors = Tensors { x, x_sf, topk_weights, token_topk_to_pos, sf, out, k, num_rows, x_row, has };
        let chunks = Chunks { num_chunks, row_chunks, row_vectors, divisor: Divisor { magic, shift }, ahead };
        sum_chunk::<X, O, N, V, true, false>(tensors, chunks);
    }
    entries {
        f32_f32[F32, F32, 4, 4], f32_bf16[F32, Bf16, 4, 4], f32_e4m3[F32, E4m3, 4, 4],
        bf16_f32[Bf16, F32, 4, 4], bf16_bf16[Bf16, Bf16, 8, 4], bf16_e4m3[Bf16, E4m3, 8, 4],
        e4m3_f32[E4m3, F32, 4, 4], e4m3_bf16[E4m3, Bf16, 8, 4], e4m3_e4m3[E4m3, E4m3, 8, 4],
    }
}

kernel! {
    op = reduce_fused;
    threads = 128, blocks = 3;
    /// As [`chunks`](mod@chunks), of rows that chunks of 1792 values fill.
    pub fn pairs[X: Element, O: Element, const N: usize, const V: usize](
        x: In<u8>, x_sf: In<f32>, topk_weights: In<f32>, token_topk_to_pos: In<i32>, sf: In<f32>, out: Out<u8>,
        k: u32, num_rows: u32, x_row: u32, num_chunks: u32, row_chunks: u32, row_vectors: u32, magic: u32, shift: u32, ahead: u32, has: u32,
    ) {
        let tensors = Tensors { x, x_sf, topk_weights, token_topk_to_pos, sf, out, k, num_rows, x_row, has };
        let chunks = Chunks { num_chunks, row_chunks, row_vectors, divisor: Divisor { magic, shift }, ahead };
        sum_chunk::<X, O, N, V, true, true>(tensors, chunks);
    }
    entries {
        f32_f32[F32, F32, 4, 7], f32_bf16[F32, Bf16, 4, 7], f32_e4m3[F32, E4m3, 4, 7],
        bf16_f32[Bf16, F32, 4, 7], bf16_bf16[Bf16, Bf16, 8, 7], bf16_e4m3[Bf16, E4m3, 8, 7],
        e4m3_f32[E4m3, F32, 4, 7], e4m3_bf16[E4m3, Bf16, 8, 7], e4m3_e4m3[E4m3, E4m3, 8, 7],
    }
}

kernel! {
    op = reduce_fused;
    threads = 128, blocks = 5;
    /// Chunks of 56 values a lane of rows that they fill, for up to 32 choices.
    pub fn whole56[X: Element, O: Element, const N: usize, const V: usize](
        x: In<u8>, x_sf: In<f32>, topk_weights: In<f32>, token_topk_to_pos: In<i32>, sf: In<f32>, out: Out<u8>,
        k: u32, num_rows: u32, x_row: u32, num_chunks: u32, row_chunks: u32, row_vectors: u32, magic: u32, shift: u32, ahead: u32, has: u32,
    ) {
        let tensors = Tensors { x, x_sf, topk_weights, token_topk_to_pos, sf, out, k, num_rows, x_row, has };
        let chunks = Chunks { num_chunks, row_chunks, row_vectors, divisor: Divisor { magic, shift }, ahead };
        sum_whole::<X, O, N, V>(tensors, chunks);
    }
    entries {
        f32_f32[F32, F32, 4, 14], f32_bf16[F32, Bf16, 4, 14], f32_e4m3[F32, E4m3, 4, 14],
        bf16_f32[Bf16, F32, 4, 14], bf16_bf16[Bf16, Bf16, 8, 7], bf16_e4m3[Bf16, E4m3, 8, 7],
        e4m3_f32[E4m3, F32, 4, 14], e4m3_bf16[E4m3, Bf16, 8, 7], e4m3_e4m3[E4m3, E4m3, 8, 7],
    }
}

kernel! {
    op = reduce_fused;
    threads = 128, blocks = 8;
    /// Chunks of 32 values a lane of rows that they fill, for up to 32 choices.
    pub fn whole32[X: Element, O: Element, const N: usize, const V: usize](
        x: In<u8>, x_sf: In<f32>, topk_weights: In<f32>, token_topk_to_pos: In<i32>, sf: In<f32>, out: Out<u8>,
        k: u32, num_rows: u32, x_row: u32, num_chunks: u32, row_chunks: u32, row_vectors: u32, magic: u32, shift: u32, ahead: u32, has: u32,
    ) {
        let tensors = Tensors { x, x_sf, topk_weights, token_topk_to_pos, sf, out, k, num_rows, x_row, has };
        let chunks = Chunks { num_chunks, row_chunks, row_vectors, divisor: Divisor { magic, shift }, ahead };
        sum_whole::<X, O, N, V>(tensors, chunks);
    }
    entries {
        f32_f32[F32, F32, 4, 8], f32_bf16[F32, Bf16, 4, 8], f32_e4m3[F32, E4m3, 4, 8],
        bf16_f32[Bf16, F32, 4, 8], bf16_bf16[Bf16, Bf16, 8, 4], bf16_e4m3[Bf16, E4m3, 8, 4],
        e4m3_f32[E4m3, F32, 4, 8], e4m3_bf16[E4m3, Bf16, 8, 4], e4m3_e4m3[E4m3, E4m3, 8, 4],
    }
}
