//! reduce_fused: add up the rows of the expanded buffer that belong to a token, with weights.
//!
//! In    x f32, bf16 or e4m3 [p, h]; x_sf f32 \[p\]; topk_weights f32 [t, k]; token_topk_to_pos i32 [t, k]; sf f32 \[1\]
//! Out   out f32, bf16 or e4m3 [t, h]
//! Exact `acc = fma(x\[p\], topk_weights * x_sf\[p\], acc)` from 0 on in ascending order of the choices, `acc * sf`, then to nearest even.
//! Map   one warp per chunk of a token: vectors of 8 columns (of 4 where a tensor is f32), a warp's width apart. Its lanes read a choice
//!       each; then it walks those that have a row. Few rows a token: 32 columns a lane, the first row at once into its sum while the
//!       others come to L2. Many, or chunks that are not full: 4 vectors a lane, the rows of two choices at a time.
//!       Rows that are short or don't fill their chunks: one thread per vector, or per column where alignment wants it.
//! Cost  a row of x read for each choice that has one, out written once; 2 to 3 instructions a byte: memory bound. With few rows a
//!       token waits as long for its choices as for a row, so they are brought to L2 by a token [`AHEAD`] before it.

use super::common_expanded::{CHOICES, has_row, load_choices};
use crate::device::*;
use crate::quant::common::Divisor;
use crate::{kernel, unroll};

/// Threads of a block of [`rows`](mod@rows).
pub const THREADS: u32 = 256;
/// Threads of a block of [`chunks`](mod@chunks) and [`whole`](mod@whole).
pub const CHUNK_THREADS: u32 = 128;
/// Vectors of a lane of [`chunks`](mod@chunks).
pub const VECTORS: usize = 4;
/// Vectors of a chunk of [`chunks`](mod@chunks).
pub const CHUNK: u32 = 32 * VECTORS as u32;
/// Values of a chunk of [`whole`](mod@whole).
pub const WHOLE_CHUNK: u32 = 32 * 32;
/// Most choices of a token for [`whole`](mod@whole): a lane has one.
pub const WHOLE_CHOICES: u32 = 32;
/// From a token to the one whose choices it brings to L2: one whose warps don't run yet, as 4224 chunks do at once on an H200, 603 tokens of
/// 7168 values. Choices and weights of so many tokens are 64 KB at 8 choices, which stay in L2 until they are wanted.
pub const AHEAD: u32 = 1024;
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

/// Whether [`whole`](mod@whole) takes rows of `hidden` values, `num_rows` of them for `num_tokens` tokens of `k` choices.
///
/// The host does not know which choices have a row, but how many rows there are. With one or two a token it takes 221 us where
/// [`chunks`](mod@chunks) takes 241; with eight it takes 30 us more, because it waits for the others one after the other. Padding counts as
/// rows: few tokens go to [`chunks`](mod@chunks), which is faster for them.
pub const fn is_whole(hidden: u32, k: u32, num_rows: u32, num_tokens: u32) -> bool {
    hidden.is_multiple_of(WHOLE_CHUNK) && k <= WHOLE_CHOICES && num_rows as u64 <= 2 * num_tokens as u64
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

/// Bits that are known only when all of these loads are there.
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

/// `acc + x * factor` of vectors `first .. first + 4` of a lane, that many loads at once.
#[inline(always)]
#[track_caller]
fn add_four<X: Element, const N: usize, const V: usize>(acc: &mut [[f32; 8]; V], from: In<u8>, first: usize, factor: f32) {
    let mut held = [[0; 4]; 4];
    unroll!(i in 4 { held[i] = X::load::<N>(from.at((32 * (first + i) * N) as u64 * X::BYTES as u64)); });
    unroll!(i in 4 { add::<N>(&mut acc[first + i], X::decode(held[i]), factor); });
}

kernel! {
    op = reduce_fused;
    threads = 128, blocks = 5;
    /// A thread of [`rows`](mod@rows) waits for its choices as long as for its one vector; here four vectors share that wait, and twice as
    /// many bytes are on their way.
    ///
    /// A row is `row_vectors` vectors of `N` values and `row_chunks` chunks; `x_row` counts bytes. The magic number divides by
    /// `row_chunks`. `has` as for [`rows`](mod@rows).
    pub fn chunks[X: Element, O: Element, const N: usize](
        x: In<u8>, x_sf: In<f32>, topk_weights: In<f32>, token_topk_to_pos: In<i32>, sf: In<f32>, out: Out<u8>,
        k: u32, num_rows: u32, x_row: u32, num_chunks: u32, row_chunks: u32, row_vectors: u32, magic: u32, shift: u32, has: u32,
    ) {
        let chunk = block_idx_x() * (CHUNK_THREADS / 32) + warp_id();
        if chunk >= num_chunks {
            return;
        }
        let token = Divisor { magic, shift }.divide(chunk);
        let start = (chunk - token * row_chunks) * CHUNK + lane_id();
        let choices = token as u64 * k as u64;
        let positions = token_topk_to_pos.at(choices);
        let topk_weights = topk_weights.at(choices);

        let load = |row: u32| -> [[u32; 4]; VECTORS] {
            let x = x.at(row as u64 * x_row as u64);
            let mut held = [[0; 4]; VECTORS];
            unroll!(v in VECTORS {
                // Lanes beyond the end load the last vector: no branch stands between the loads.
                let vector = Ord::min(start + 32 * v as u32, row_vectors - 1);
                held[v] = X::load::<N>(x.at(vector as u64 * (N as u32 * X::BYTES) as u64));
            });
            held
        };
        let mut acc = [[0.0; 8]; VECTORS];
        let mut first = 0;
        while first < k {
            rolled();
            let choice = first + lane_id();
            let (mut row, mut weight, mut row_sf) = (-1, 1.0, 1.0);
            if choice < k {
                row = positions.get(choice);
                if has & 1 != 0 {
                    weight = topk_weights.get(choice);
                }
            }
            let used = has_row(row, num_rows);
            if has & 2 != 0 && used {
                row_sf = x_sf.get(row as u32);
            }
            let row = row as u32;
            // Weights and factors are multiplied only behind the loads, which would wait for both otherwise. Products with 1 change nothing.
            let factor = |lane| warp_shuffle(weight, lane) * warp_shuffle(row_sf, lane);
            let mut rest = warp_ballot(used);
            while rest != 0 {
                rolled();
                let lane = rest.trailing_zeros();
                rest &= rest - 1;
                if rest == 0 {
                    let held = load(warp_shuffle(row, lane));
                    let factor = factor(lane);
                    unroll!(v in VECTORS { add::<N>(&mut acc[v], X::decode(held[v]), factor); });
                } else {
                    let next_lane = rest.trailing_zeros();
                    rest &= rest - 1;
                    let (row, next_row) = (warp_shuffle(row, lane), warp_shuffle(row, next_lane));
                    let (held, next) = (load(row), load(next_row));
                    let (factor, next_factor) = (factor(lane), factor(next_lane));
                    unroll!(v in VECTORS { add::<N>(&mut acc[v], X::decode(held[v]), factor); });
                    unroll!(v in VECTORS { add::<N>(&mut acc[v], X::decode(next[v]), next_factor); });
                }
            }
            first += 32;
        }
        if has & 4 != 0 {
            let sf = sf.get(0);
            // A product, whose NaN is the same on both backends.
            unroll!(v in VECTORS { unroll!(i in 8 { acc[v][i] = fma(acc[v][i], sf, -0.0); }); });
        }
        let bytes = (N as u32 * O::BYTES) as u64;
        let out = out.at(token as u64 * row_vectors as u64 * bytes);
        unroll!(v in VECTORS {
            let vector = start + 32 * v as u32;
            if vector < row_vectors {
                O::store::<N>(out.at(vector as u64 * bytes), acc[v]);
            }
        });
    }
    entries {
        f32_f32[F32, F32, 4], f32_bf16[F32, Bf16, 4], f32_e4m3[F32, E4m3, 4],
        bf16_f32[Bf16, F32, 4], bf16_bf16[Bf16, Bf16, 8], bf16_e4m3[Bf16, E4m3, 8],
        e4m3_f32[E4m3, F32, 4], e4m3_bf16[E4m3, Bf16, 8], e4m3_e4m3[E4m3, E4m3, 8],
    }
}

kernel! {
    op = reduce_fused;
    threads = 128, blocks = 8;
    /// As [`chunks`](mod@chunks), where all lanes of all chunks have `V` vectors and tokens at most 32 choices. The first row, mostly the only
    /// one, is loaded at once into what becomes its sum; meanwhile the others are brought to L2, from where they are added four vectors at a
    /// time. That takes few registers, so that eight blocks run at once instead of five.
    pub fn whole[X: Element, O: Element, const N: usize, const V: usize](
        x: In<u8>, x_sf: In<f32>, topk_weights: In<f32>, token_topk_to_pos: In<i32>, sf: In<f32>, out: Out<u8>,
        k: u32, num_rows: u32, x_row: u32, num_chunks: u32, row_chunks: u32, row_vectors: u32, magic: u32, shift: u32, has: u32,
    ) {
        let chunk = block_idx_x() * (CHUNK_THREADS / 32) + warp_id();
        if chunk >= num_chunks {
            return;
        }
        let lane = lane_id();
        let token = Divisor { magic, shift }.divide(chunk);
        let first_vector = (chunk - token * row_chunks) * (32 * V as u32);
        let start = first_vector + lane;
        let vector_bytes = N as u32 * X::BYTES;
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
        if first_vector == 0 && lane < k && lane.is_multiple_of(8) && chunk + AHEAD * row_chunks < num_chunks {
            let later = choice + AHEAD as u64 * k as u64;
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
        let row_of = |lane| x.at(warp_shuffle(row, lane) as u64 * x_row as u64);
        let offset = start as u64 * vector_bytes as u64;
        let mut rest = warp_ballot(used);
        let mut acc = [[0.0; 8]; V];
        if rest != 0 {
            let first = rest.trailing_zeros();
            rest &= rest - 1;
            let from = row_of(first).at(offset);
            let mut held = [[0; 4]; V];
            unroll!(v in V { held[v] = X::load::<N>(from.at((32 * v as u32 * vector_bytes) as u64)); });
            let mut later = rest;
            while later != 0 {
                rolled();
                let from = row_of(later.trailing_zeros()).at(first_vector as u64 * vector_bytes as u64);
                later &= later - 1;
                // A chunk has at most 32 lines of 128 bytes.
                if lane * 128 < 32 * V as u32 * vector_bytes {
                    from.prefetch(lane * 128);
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
                let from = row_of(next).at(offset);
                let factor = warp_shuffle(weight, next) * warp_shuffle(row_sf, next);
                unroll!(four in 2 {
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
    entries {
        f32_f32[F32, F32, 4, 8], f32_bf16[F32, Bf16, 4, 8], f32_e4m3[F32, E4m3, 4, 8],
        bf16_f32[Bf16, F32, 4, 8], bf16_bf16[Bf16, Bf16, 8, 4], bf16_e4m3[Bf16, E4m3, 8, 4],
        e4m3_f32[E4m3, F32, 4, 8], e4m3_bf16[E4m3, Bf16, 8, 4], e4m3_e4m3[E4m3, E4m3, 8, 4],
    }
}
