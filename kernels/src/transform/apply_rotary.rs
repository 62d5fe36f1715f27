//! apply_rotary: rotary position embedding of a query and a key, in place.
//!
//! InOut query, key f32 or bf16 [b, l, heads, d]      In  cos_sin f32 [rows, d], cosines before sines; positions none, i32 or i64 [b, l]
//! Exact `x1' = fma(x1, c, -(x2 * s))`, `x2' = fma(x1, s, x2 * c)` in f32, then to nearest even. The inverse rotation has `-s` for `s`.
//! Map   `rotate` takes everything. A thread has two 16-byte vectors of a head, half a head apart, and the same of a second head, if there is
//!       one; so both kinds of pairs are whole within a thread, neighbours touch neighbouring vectors, and angles are loaded once for two
//!       heads. `plain` takes bf16 heads of 64 of a query alone, with half as many pairs a thread and less arithmetic before its loads.
//!       All loads of a thread are under way at once; only cosines and sines wait for the position.
//! Cost  query and key read and written once, the rows of cos_sin that occur, positions; 2.2 instructions a byte: memory bound.

use crate::device::*;
use crate::quant::common::Divisor;
use crate::{kernel, unroll};
use core::hint::cold_path;

/// Most threads of a block.
pub const THREADS: u32 = 128;
/// Heads of a thread, unless query and key have only one.
pub const HEADS: u32 = 2;
/// Most items of one launch. All threads are numbered below 2^31, see [`Divisor`].
pub const MAX_ITEMS: u64 = (1 << 31) - THREADS as u64;

/// Grid and block for a number of items. Small blocks make the last ones short, and spread few items over all multiprocessors; those of
/// narrow items, of which there are many more, would be too many.
pub const fn config(num_items: u32, wide: bool) -> LaunchConfig {
    let threads = if wide || num_items <= 1 << 17 { 64 } else { THREADS };
    LaunchConfig::new(ceil_div(num_items, threads), threads)
}

/// An element type of query and key. `N` neighbouring values are 16 bytes, or one value.
pub trait Element {
    /// Bytes of a value.
    const BYTES: u32;

    /// `N` values as they lie in memory.
    fn load<const N: usize>(from: Out<u8>) -> [u32; 4];

    /// Those values; only the first `N` mean something.
    fn decode(raw: [u32; 4]) -> [f32; 8];

    /// The first `N` values as they lie in memory.
    fn encode(values: [f32; 8]) -> [u32; 4];

    /// Write `N` values as they lie in memory.
    fn store<const N: usize>(to: Out<u8>, raw: [u32; 4]);
}

/// f32.
pub struct F32;
/// bf16.
pub struct Bf16;

impl Element for F32 {
    const BYTES: u32 = 4;

    #[inline(always)]
    #[track_caller]
    fn load<const N: usize>(from: Out<u8>) -> [u32; 4] {
        if N == 1 { [from.load4(0), 0, 0, 0] } else { from.load16(0) }
    }

    #[inline(always)]
    fn decode(raw: [u32; 4]) -> [f32; 8] {
        core::array::from_fn(|i| f32::from_bits(raw[i & 3]))
    }

    #[inline(always)]
    fn encode(v: [f32; 8]) -> [u32; 4] {
        core::array::from_fn(|i| canonical(v[i]).to_bits())
    }

    #[inline(always)]
    #[track_caller]
    fn store<const N: usize>(to: Out<u8>, raw: [u32; 4]) {
        if N == 1 { to.store4(0, raw[0]) } else { to.store16(0, raw) }
    }
}

impl Element for Bf16 {
    const BYTES: u32 = 2;

    #[inline(always)]
    #[track_caller]
    fn load<const N: usize>(from: Out<u8>) -> [u32; 4] {
        if N == 1 { [from.cast::<u16>().get(0) as u32, 0, 0, 0] } else { from.load16(0) }
    }

    #[inline(always)]
    fn decode(raw: [u32; 4]) -> [f32; 8] {
        let pairs = raw.map(bf16x2_to_f32);
        core::array::from_fn(|i| pairs[i / 2][i % 2])
    }

    #[inline(always)]
    fn encode(v: [f32; 8]) -> [u32; 4] {
        core::array::from_fn(|i| f32x2_to_bf16x2(v[2 * i], v[2 * i + 1]))
    }

    #[inline(always)]
    #[track_caller]
    fn store<const N: usize>(to: Out<u8>, raw: [u32; 4]) {
        if N == 1 { to.cast::<u16>().set(0, raw[0] as u16) } else { to.store16(0, raw) }
    }
}

/// `n` floats, as many as a vector access takes: the others are 0. With `flip` in their bits.
#[inline(always)]
#[track_caller]
fn load_floats(from: In<f32>, n: usize, flip: u32) -> [f32; 4] {
    let words = match n {
        4 => from.load16(0),
        2 => {
            let [a, b] = from.load8(0);
            [a, b, 0, 0]
        }
        _ => [from.load4(0), 0, 0, 0],
    };
    words.map(|word| f32::from_bits(word ^ flip))
}

/// Cosines or sines of a thread's `N` pairs, of a row's cosines or sines. Neighbouring pairs are neighbours in the first half of the row and,
/// if pairs are `INTERLEAVED`, in the second.
#[inline(always)]
#[track_caller]
fn load_angles<const INTERLEAVED: bool, const N: usize>(from: In<f32>, vector: u32, half: u32, flip: u32) -> [f32; 8] {
    let n = N as u32;
    let [a, b] = match (N, INTERLEAVED) {
        (1, _) => [load_floats(from.at(vector as u64), 1, flip), [0.0; 4]],
        (4, false) => [load_floats(from.at((vector * n) as u64), 4, flip), [0.0; 4]],
        (_, false) => [0, 4].map(|i| load_floats(from.at((vector * n + i) as u64), 4, flip)),
        (_, true) => [0, half / 2].map(|i| load_floats(from.at((vector * (n / 2) + i) as u64), N / 2, flip)),
    };
    // What lies in a half of four floats.
    let split = if INTERLEAVED && N == 4 { 2 } else { 4 };
    core::array::from_fn(|i| if i < split { a[i & 3] } else { b[(i - split) & 3] })
}

/// The `N` pairs of two vectors, rotated, or as they are if `keep`.
#[inline(always)]
fn rotated<T: Element, const INTERLEAVED: bool, const N: usize>(
    raw: [[u32; 4]; 2],
    c: [f32; 8],
    s: [f32; 8],
    keep: bool,
) -> [[u32; 4]; 2] {
    let [a, b] = [T::decode(raw[0]), T::decode(raw[1])];
    let mut out = [a, b];
    unroll!(i in N {
        // Vectors and places of the first and second of the pair.
        let ((v1, i1), (v2, i2)) = if INTERLEAVED && N > 1 {
            let (v, j) = ((i / (N / 2)) & 1, 2 * (i % (N / 2)));
            ((v, j), (v, j + 1))
        } else {
            ((0, i & 7), (1, i & 7))
        };
        let (x1, x2, c, s) = ([a, b][v1][i1], [a, b][v2][i2], c[i & 7], s[i & 7]);
        out[v1][i1] = fma(x1, c, -(x2 * s));
        out[v2][i2] = fma(x1, s, x2 * c);
    });
    let [a, b] = [T::encode(out[0]), T::encode(out[1])];
    let choose = |i: usize, new: [u32; 4]| core::array::from_fn(|j| if keep { raw[i][j] } else { new[j] });
    [choose(0, a), choose(1, b)]
}

kernel! {
    op = apply_rotary;
    threads = 128;
    /// An item is a token's vector number `0..vectors` of `H` heads; a token has `token_items`, those of the query first. Strides count
    /// elements. `position_bytes` is 0 without positions; `flip` is the sign bit for the inverse rotation. The magic numbers divide by
    /// `token_items`, `length` and `vectors`. `N` is 1 where alignment wants it.
    pub fn rotate[T: Element, const INTERLEAVED: bool, const N: usize, const H: usize](
        query: Out<u8>, key: Out<u8>, cos_sin: In<f32>, positions: In<u8>,
        query_batch: u64, query_token: u32, query_head: u32, query_heads: u32,
        key_batch: u64, key_token: u32, key_head: u32, key_heads: u32,
        cos_sin_row: u32, num_rows: u32, position_batch: u32, position_bytes: u32, seqlen_offset: i64, flip: u32,
        first: u32, num_items: u32, token_items: u32, items_magic: u32, items_shift: u32,
        length: u32, length_magic: u32, length_shift: u32, vectors: u32, vectors_magic: u32, vectors_shift: u32,
    ) {
        let item = block_idx_x() * block_dim() + thread_idx();
        if item >= num_items {
            return;
        }
        let token = Divisor { magic: items_magic, shift: items_shift }.divide(item);
        let place = item - token * token_items;
        let token = first + token;
        let batch = Divisor { magic: length_magic, shift: length_shift }.divide(token);
        let token = token - batch * length;
        let group = Divisor { magic: vectors_magic, shift: vectors_shift }.divide(place);
        let vector = place - group * vectors;

        let position = positions.at((batch as u64 * position_batch as u64 + token as u64) * position_bytes as u64);
        let position = match position_bytes {
            0 => token as i64,
            4 => position.cast::<i32>().get(0) as i64,
            _ => position.cast::<i64>().get(0),
        };

        let query_groups = ceil_div(query_heads, H as u32);
        let of_key = group >= query_groups;
        let (x, batch_stride, token_stride, head_stride, heads, head) = if of_key {
            (key, key_batch, key_token, key_head, key_heads, group - query_groups)
        } else {
            (query, query_batch, query_token, query_head, query_heads, group)
        };
        let x = x.at((batch as u64 * batch_stride + token as u64 * token_stride as u64) * T::BYTES as u64);
        let (half, n) = (vectors * N as u32, N as u32);
        let (a, b) = if INTERLEAVED && N == 1 { (2 * vector, 2 * vector + 1) } else { (vector * n, vector * n + half) };
        let groups = ceil_div(heads, H as u32);
        // The last group of an odd number has one head, and does everything twice.
        let vector_at = |h: usize, i: u32| {
            let other = head + h as u32 * groups;
            let head = if h > 0 && other < heads { other } else { head };
            x.at((head as u64 * head_stride as u64 + i as u64) * T::BYTES as u64)
        };
        let mut raw = [[[0; 4]; 2]; H];
        unroll!(h in H { raw[h] = [T::load::<N>(vector_at(h, a)), T::load::<N>(vector_at(h, b))] });

        let row = seqlen_offset.wrapping_add(position) as u64;
        // No table has so many rows.
        let row = if row < u32::MAX as u64 { row as u32 } else { u32::MAX };
        let has_row = index_below(row, num_rows);
        if H > 1 && !has_row {
            cold_path();
            // As they were. A branch that has no use for the vectors would draw their loads behind it, where they wait for the position. A
            // loop, which turns once: ptxas would make predicated stores of a few, which wait for the vectors on the usual way too.
            loop {
                rolled();
                unroll!(h in H {
                    T::store::<N>(vector_at(h, a), raw[h][0]);
                    T::store::<N>(vector_at(h, b), raw[h][1]);
                });
                if num_items >> 31 == 0 {
                    return;
                }
            }
        }
        // With one head it is faster without that branch. A token that has no row reads row 0, and stays as it was.
        let keep = H == 1 && !has_row;
        let angles = cos_sin.at(if keep { 0 } else { row } as u64 * cos_sin_row as u64);
        let c = load_angles::<INTERLEAVED, N>(angles, vector, half, 0);
        let s = load_angles::<INTERLEAVED, N>(angles.at(half as u64), vector, half, flip);
        // ptxas would load the second half of the angles, or the second vector of one head, when the first one is done. This makes it wait
        // for all of them: no bit of the mask is set, which the compiler does not know.
        if H > 1 {
            let loaded = c[0].to_bits() | c[N - 1].to_bits() | s[0].to_bits() | s[N - 1].to_bits();
            if loaded & (num_items >> 31) != 0 {
                return;
            }
        } else if INTERLEAVED {
            let wait = (raw[0][1][3] | c[N - 1].to_bits() | s[N - 1].to_bits()) & (num_items >> 31);
            raw[0][0] = raw[0][0].map(|word| word ^ wait);
        }
        unroll!(h in H {
            let [new_a, new_b] = rotated::<T, INTERLEAVED, N>(raw[h], c, s, keep);
            T::store::<N>(vector_at(h, a), new_a);
            T::store::<N>(vector_at(h, b), new_b);
        });
    }
    entries {
        f32_halves[F32, false, 4, 2], f32_interleaved[F32, true, 4, 2],
        bf16_halves[Bf16, false, 8, 2], bf16_interleaved[Bf16, true, 8, 2],
        f32_halves_single[F32, false, 4, 1], f32_interleaved_single[F32, true, 4, 1],
        bf16_halves_single[Bf16, false, 8, 1], bf16_interleaved_single[Bf16, true, 8, 1],
        f32_halves_narrow[F32, false, 1, 2], f32_interleaved_narrow[F32, true, 1, 2],
        bf16_halves_narrow[Bf16, false, 1, 2], bf16_interleaved_narrow[Bf16, true, 1, 2],
    }
}

/// Values of a head that [`plain`] takes.
pub const PLAIN_DIM: u32 = 64;
/// Neighbouring pairs of a head that a thread of [`plain`] has.
pub const PLAIN_PAIRS: u32 = 4;
/// Threads of a block of [`plain`].
pub const PLAIN_THREADS: u32 = 64;

/// [`PLAIN_PAIRS`] pairs of a head as they lie in memory: one vector if they are `INTERLEAVED`, else two half as wide, half a head apart.
#[inline(always)]
#[track_caller]
fn load_pairs<const INTERLEAVED: bool>(from: Out<u8>) -> [u32; 4] {
    if INTERLEAVED {
        return from.load16(0);
    }
    let ([a, b], [c, d]) = (from.load8(0), from.at(PLAIN_DIM as u64).load8(0));
    [a, b, c, d]
}

/// Write what [`load_pairs`] loads.
#[inline(always)]
#[track_caller]
fn store_pairs<const INTERLEAVED: bool>(to: Out<u8>, raw: [u32; 4]) {
    if INTERLEAVED {
        return to.store16(0, raw);
    }
    to.store8(0, [raw[0], raw[1]]);
    to.at(PLAIN_DIM as u64).store8(0, [raw[2], raw[3]]);
}

/// The pairs of [`load_pairs`], rotated.
#[inline(always)]
fn rotated_pairs<const INTERLEAVED: bool>(raw: [u32; 4], c: [f32; 4], s: [f32; 4]) -> [u32; 4] {
    let x = Bf16::decode(raw);
    let mut out = x;
    unroll!(i in 4 {
        let (i1, i2) = if INTERLEAVED { (2 * i, 2 * i + 1) } else { (i, i + 4) };
        let (x1, x2) = (x[i1], x[i2]);
        out[i1] = fma(x1, c[i], -(x2 * s[i]));
        out[i2] = fma(x1, s[i], x2 * c[i]);
    });
    Bf16::encode(out)
}

kernel! {
    op = apply_rotary;
    threads = 64;
    /// The usual launch, with little arithmetic before its loads: bf16, heads of [`PLAIN_DIM`] values of the query alone, tokens at one
    /// distance from each other, 32-bit positions or none, all vectors aligned. An item is [`PLAIN_PAIRS`] pairs of `H` heads, `groups`
    /// heads apart: two, or the only one. Strides count bytes. On an H200 it takes 1 to 5 percent less time than `rotate`;
    /// eight pairs, or four or eight heads a thread, gain nothing, and one head where there could be two loses a tenth.
    pub fn plain[const INTERLEAVED: bool, const H: usize, const POSITIONS: bool](
        x: Out<u8>, angles: In<f32>, positions: In<i32>, token_bytes: u32, head_bytes: u32, row_bytes: u32,
        first_row: u32, num_rows: u32, flip: u32,
        num_items: u32, token_items: u32, items_magic: u32, items_shift: u32, groups: u32,
    ) {
        let item = block_idx_x() * block_dim() + thread_idx();
        if item >= num_items {
            return;
        }
        let token = Divisor { magic: items_magic, shift: items_shift }.divide(item);
        let place = item - token * token_items;
        let half = PLAIN_DIM / 2;
        let vectors = half / PLAIN_PAIRS;
        let (group, pair) = (place / vectors, place % vectors * PLAIN_PAIRS);

        // Opaque, as the compiler would load it when vectors are under way.
        let position = if POSITIONS { opaque(positions.get(token) as u32) } else { token };
        let in_head = if INTERLEAVED { 4 * pair } else { 2 * pair };
        let x = x.at(token as u64 * token_bytes as u64).at(group as u64 * head_bytes as u64).at(in_head as u64);
        let step = groups as u64 * head_bytes as u64;
        let mut raw = [[0; 4]; H];
        unroll!(h in H { raw[h] = load_pairs::<INTERLEAVED>(x.at(h as u64 * step)) });

        if POSITIONS && groups >> 31 != 0 {
            cold_path();
            // Never: it keeps ptxas from loading vectors when the position is there. A loop, since ptxas would make predicated stores of a
            // few, which wait for the vectors on the usual way too.
            loop {
                rolled();
                unroll!(h in H { store_pairs::<INTERLEAVED>(x.at(h as u64 * step), raw[h]) });
                if num_items >> 31 == 0 {
                    return;
                }
            }
        }
        // Negative rows are large ones. A token that has no row reads row 0, and is not written.
        let row = position.wrapping_add(first_row);
        let has_row = !POSITIONS || index_below(row, num_rows);
        let row = if has_row { row } else { 0 };
        let angles = angles.cast::<u8>().at(row as u64 * row_bytes as u64).cast::<f32>();
        let c = load_floats(angles.at(pair as u64), 4, 0);
        let s = load_floats(angles.at((pair + half) as u64), 4, flip);
        // One condition that needs all loads, though no bit of the mask is set, which the compiler does not know: with a branch of its own
        // for the row, ptxas would load vectors behind it, where they wait for the position.
        let mut loaded = c[0].to_bits() | c[3].to_bits() | s[0].to_bits() | s[3].to_bits();
        unroll!(h in H { loaded |= if INTERLEAVED { raw[h][0] } else { raw[h][0] | raw[h][2] } });
        if !has_row | (loaded & (num_items >> 31) != 0) {
            return;
        }
        unroll!(h in H { store_pairs::<INTERLEAVED>(x.at(h as u64 * step), rotated_pairs::<INTERLEAVED>(raw[h], c, s)) });
    }
    entries {
        halves_1[false, 1, false], halves_1_positions[false, 1, true],
        halves_2[false, 2, false], halves_2_positions[false, 2, true],
        interleaved_1[true, 1, false], interleaved_1_positions[true, 1, true],
        interleaved_2[true, 2, false], interleaved_2_positions[true, 2, true],
    }
}
