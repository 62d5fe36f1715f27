//! expand_to_fused: copy the row of every token to all its rows of the expanded buffer and zero the padding rows.
//!
//! In   x any dtype [t, h]; x_sf f32 or ue8m0 [t, s]; token_topk_to_pos i32 [t, k]; pos_to_expert i32 \[p\]
//! Out  out [p, h], out_sf [p, s], of the same dtypes: rows of tokens where a choice names them, zeros where the expert is negative
//! Exact a copy of bytes.
//! Map   one warp per chunk of a row of x, 7 vectors of 16 bytes a lane, or 4: it loads them once with the choices of its token, a lane
//!       each, stores them to each row of the token, and looks at one or two chunks of the expanded buffer for padding. Rows that are short,
//!       don't fill their chunks or aren't aligned: one thread per 16 bytes or fewer. Scale factors have blocks of their own, spread evenly.
//! Cost  x read once, out written once, and the scales; a warp finds its token and its rows once for 3.5 KB: memory bound.

use super::common_expanded::{CHOICES, fills_chunks, has_row, load_choices};
use crate::device::*;
use crate::quant::common::Divisor;
use crate::{kernel, unroll};

/// Threads of a block of [`rows`](mod@rows) and [`rows_with_sf`](mod@rows_with_sf).
pub const THREADS: u32 = 256;
/// Threads of a block of [`chunks`](mod@chunks) and [`chunks_with_sf`](mod@chunks_with_sf).
pub const CHUNK_THREADS: u32 = 128;
/// Vectors of a lane where all lanes have as many. 14 are slower: too few warps for small buffers, and no faster for large ones.
pub const WHOLE_VECTORS: u32 = 7;
/// Vectors of a lane of other rows that fill such chunks.
pub const VECTORS: u32 = 4;
/// Places of the expanded buffer that a thread looks at for padding, or chunks that a warp does, if there are not enough tokens for all of it.
pub const PLACES: u32 = 2;
/// Most pieces of one launch. Threads of a last block that have none are numbered below 2^31 too, see [`Divisor`].
pub const MAX_PIECES: u64 = (1 << 31) - THREADS as u64;
/// Scale factors that a thread copies where they don't lie together: words of one row.
pub const WORDS: u32 = 4;

/// Vectors of a lane for rows of `vectors` vectors: 0 if they don't fill chunks.
pub const fn chunk_vectors(vectors: u32) -> u32 {
    if vectors == 0 {
        0
    } else if vectors.is_multiple_of(32 * WHOLE_VECTORS) {
        WHOLE_VECTORS
    } else if fills_chunks(vectors, 32 * VECTORS) {
        VECTORS
    } else {
        0
    }
}

/// Blocks for `row_chunks` chunks a row that are scattered from `t` tokens to `p` rows.
pub const fn chunk_blocks(t: u32, p: u32, row_chunks: u32) -> u32 {
    // Of few tokens most warps have only padding: a chunk of it each ends sooner than two one after the other.
    let places = if p as u64 > 4 * t as u64 { 1 } else { PLACES };
    let (copies, places) = (t * row_chunks, ceil_div(p * row_chunks, places));
    ceil_div(if copies > places { copies } else { places }, CHUNK_THREADS / 32)
}

/// Blocks for rows of `pieces` pieces that are scattered from `t` tokens to `p` rows.
pub const fn scatter_blocks(t: u32, p: u32, pieces: u32, threads: u32) -> u32 {
    let (copies, places) = (t * pieces, ceil_div(p * pieces, PLACES));
    ceil_div(if copies > places { copies } else { places }, threads)
}

/// Blocks for rows of `pieces` pieces that are gathered into `p` rows.
pub const fn gather_blocks(p: u32, pieces: u32, threads: u32) -> u32 {
    ceil_div(p * pieces, threads)
}

/// Rows in memory. A thread moves one piece: `N` words of type `W` of one row.
#[derive(Clone, Copy)]
struct Rows {
    from: In<u8>,
    to: Out<u8>,
    /// Bytes from one row to the next.
    from_row: u32,
    to_row: u32,
    /// Bytes from one word of a row to the next.
    from_word: u32,
    to_word: u32,
    words: u32,
    pieces: u32,
}

impl Rows {
    /// Words `piece * N ..` of a row of `from`.
    #[inline(always)]
    #[track_caller]
    fn load<W: Word + Default, const N: usize>(self, row: u32, piece: u32) -> [W; N] {
        let mut held = [W::default(); N];
        unroll!(i in N {
            let word = piece * N as u32 + i as u32;
            // One word a piece always exists.
            if N == 1 || word < self.words {
                let at = row as u64 * self.from_row as u64 + word as u64 * self.from_word as u64;
                held[i] = self.from.at(at).cast::<W>().get(0);
            }
        });
        held
    }

    /// The same words of a row of `to`.
    #[inline(always)]
    #[track_caller]
    fn store<W: Word, const N: usize>(self, row: u32, piece: u32, held: [W; N]) {
        unroll!(i in N {
            let word = piece * N as u32 + i as u32;
            if N == 1 || word < self.words {
                self.to.at(row as u64 * self.to_row as u64 + word as u64 * self.to_word as u64).cast::<W>().set(0, held[i]);
            }
        });
    }
}

/// How pieces are numbered: along rows, or with `DOWN` down columns, so that a warp has the same words of 32 rows.
#[derive(Clone, Copy)]
struct Order<const DOWN: bool> {
    /// Pieces of a row; with `DOWN` rows.
    length: u32,
    divisor: Divisor,
}

impl<const DOWN: bool> Order<DOWN> {
    /// Row and piece of a number.
    #[inline(always)]
    fn place(self, n: u32) -> (u32, u32) {
        let quotient = self.divisor.divide(n);
        let rest = n - quotient * self.length;
        if DOWN { (rest, quotient) } else { (quotient, rest) }
    }
}

/// Which tokens and rows a launch is about, and what goes where.
#[derive(Clone, Copy)]
struct Map {
    token_topk_to_pos: In<i32>,
    pos_to_expert: In<i32>,
    k: u32,
    /// Tokens and rows of this launch, and what its first row is in the expanded buffer.
    num_tokens: u32,
    num_rows: u32,
    first_row: u32,
    /// Rows of the expanded buffer.
    all_rows: u32,
}

/// Thread `n` of `num_threads`: piece `n` to all rows of its token, and zeros to pieces `n`, `n + num_threads`, … of the expanded buffer
/// that are padding.
#[inline(always)]
#[track_caller]
fn scatter<W: Word + Default, const N: usize, const DOWN: bool>(
    rows: Rows,
    map: Map,
    (tokens, places): (Order<DOWN>, Order<DOWN>),
    n: u32,
    num_threads: u32,
) {
    // Load. What the loop below waits for arrives long before the piece.
    let copies = n < map.num_tokens * rows.pieces;
    let (token, piece) = tokens.place(n);
    let positions = map.token_topk_to_pos.at(token as u64 * map.k as u64);
    let (mut held, mut to) = ([W::default(); N], [-1; CHOICES]);
    if copies {
        held = rows.load::<W, N>(token, piece);
        to = load_choices(positions, map.k);
    }

    let mut place = n;
    while place < map.num_rows * rows.pieces {
        rolled();
        let (row, piece) = places.place(place);
        if map.pos_to_expert.get(row) < 0 {
            rows.store(map.first_row + row, piece, [W::default(); N]);
        }
        place += num_threads;
    }

    if !copies {
        return;
    }
    let mut first = 0;
    loop {
        rolled();
        unroll!(i in CHOICES {
            if has_row(to[i], map.all_rows) {
                rows.store(to[i] as u32, piece, held);
            }
        });
        first += CHOICES as u32;
        if first >= map.k {
            return;
        }
        to = load_choices(positions.at(first as u64), map.k - first);
    }
}

/// Thread `n`: piece `n` of the expanded buffer from the token that its row belongs to, or zeros.
#[inline(always)]
#[track_caller]
fn gather<W: Word + Default, const N: usize, const DOWN: bool>(
    rows: Rows,
    pos_to_token: In<i32>,
    (num_rows, first_row, num_tokens): (u32, u32, u32),
    places: Order<DOWN>,
    n: u32,
) {
    if n >= num_rows * rows.pieces {
        return;
    }
    let (row, piece) = places.place(n);
    let token = pos_to_token.get(row);
    let mut held = [W::default(); N];
    if has_row(token, num_tokens) {
        held = rows.load::<W, N>(token as u32, piece);
    }
    rows.store(first_row + row, piece, held);
}

/// Rows of 16-byte vectors that warps copy in chunks of `V` vectors a lane.
#[derive(Clone, Copy)]
struct Chunks {
    from: In<u8>,
    to: Out<u8>,
    /// Bytes from one row to the next.
    from_row: u32,
    to_row: u32,
    /// Vectors and chunks of a row.
    vectors: u32,
    row_chunks: u32,
    /// By `row_chunks`.
    divisor: Divisor,
}

impl Chunks {
    /// A lane's vectors of a chunk. With `WHOLE` all lanes of all chunks have `V`.
    #[inline(always)]
    #[track_caller]
    fn load<const V: usize, const WHOLE: bool>(self, row: u32, chunk: u32) -> [[u32; 4]; V] {
        let first = chunk * (32 * V as u32) + lane_id();
        let from = self.from.at(row as u64 * self.from_row as u64);
        let mut held = [[0; 4]; V];
        unroll!(v in V {
            held[v] = if WHOLE {
                from.at(first as u64 * 16).load16(512 * v as u32)
            } else {
                // Lanes beyond the end load the last vector: no branch stands between the loads.
                from.at(Ord::min(first + 32 * v as u32, self.vectors - 1) as u64 * 16).load16(0)
            };
        });
        held
    }

    #[inline(always)]
    #[track_caller]
    fn store<const V: usize, const WHOLE: bool>(self, row: u32, chunk: u32, held: [[u32; 4]; V]) {
        let first = chunk * (32 * V as u32) + lane_id();
        let to = self.to.at(row as u64 * self.to_row as u64 + first as u64 * 16);
        unroll!(v in V {
            if WHOLE || first + 32 * (v as u32) < self.vectors {
                to.store16(512 * v as u32, held[v]);
            }
        });
    }
}

/// Warp `n` of `num_warps`: chunk `n` to all rows of its token, and zeros to chunks `n`, `n + num_warps`, … of the expanded buffer that are
/// padding, at most 32 of them.
#[inline(always)]
#[track_caller]
fn scatter_chunks<const V: usize, const WHOLE: bool>(chunks: Chunks, map: Map, n: u32, num_warps: u32) {
    let lane = lane_id();
    let Chunks { row_chunks, divisor, .. } = chunks;
    // Load everything: a choice and a place for padding each lane, and the chunk.
    let copies = n < map.num_tokens * row_chunks;
    let token = divisor.divide(n);
    let chunk = n - token * row_chunks;
    let positions = map.token_topk_to_pos.at(token as u64 * map.k as u64);
    let (mut held, mut to) = ([[0; 4]; V], -1);
    if copies {
        if lane < map.k {
            to = positions.get(lane);
        }
        held = chunks.load::<V, WHOLE>(token, chunk);
    }
    let place = n + lane * num_warps;
    let (mut row, mut empty) = (0, false);
    if place < map.num_rows * row_chunks {
        row = divisor.divide(place);
        empty = map.pos_to_expert.get(row) < 0;
    }

    let mut rest = warp_ballot(empty);
    while rest != 0 {
        rolled();
        let lane = rest.trailing_zeros();
        rest &= rest - 1;
        let row = warp_shuffle(row, lane);
        let chunk = n + lane * num_warps - row * row_chunks;
        chunks.store::<V, WHOLE>(map.first_row + row, chunk, [[0; 4]; V]);
    }
    if !copies {
        return;
    }
    let mut first = 0;
    loop {
        rolled();
        let mut rest = warp_ballot(has_row(to, map.all_rows));
        while rest != 0 {
            rolled();
            let row = warp_shuffle(to, rest.trailing_zeros());
            rest &= rest - 1;
            chunks.store::<V, WHOLE>(row as u32, chunk, held);
        }
        first += 32;
        if first >= map.k {
            return;
        }
        to = if first + lane < map.k { positions.get(first + lane) } else { -1 };
    }
}

/// Scale factors of a launch, which `blocks` blocks have.
#[derive(Clone, Copy)]
struct Scales {
    rows: Rows,
    /// What the magic numbers below divide by.
    token: Divisor,
    row: Divisor,
    gathers: u32,
    pos_to_token: In<i32>,
    all_tokens: u32,
    blocks: u32,
}

/// Block `turn` of scale factors, of `threads` threads.
#[inline(always)]
#[track_caller]
fn copy_scales<S: Word + Default, const N: usize, const DOWN: bool>(scales: Scales, map: Map, turn: u32, threads: u32) {
    let order = |length: u32, divisor| Order::<DOWN> { length: if DOWN { length } else { scales.rows.pieces }, divisor };
    let places = order(map.num_rows, scales.row);
    let n = turn * threads + thread_idx();
    if scales.gathers != 0 {
        gather::<S, N, DOWN>(scales.rows, scales.pos_to_token, (map.num_rows, map.first_row, scales.all_tokens), places, n);
    } else {
        let tokens = order(map.num_tokens, scales.token);
        scatter::<S, N, DOWN>(scales.rows, map, (tokens, places), n, scales.blocks * threads);
    }
}

kernel! {
    op = expand_to_fused;
    threads = 256;
    /// Rows of `pieces` words of type `W`; `x_row` and `out_row` count bytes. `x` and the index tensors start at the first token and row of
    /// this launch, `out` at row 0. The magic number divides by `pieces`.
    pub fn rows[W: Word + Default](
        x: In<u8>, token_topk_to_pos: In<i32>, pos_to_expert: In<i32>, out: Out<u8>, k: u32, num_tokens: u32, num_rows: u32,
        first_row: u32, all_rows: u32, x_row: u32, out_row: u32, pieces: u32, magic: u32, shift: u32,
    ) {
        let word = size_of::<W>() as u32;
        let rows =
            Rows { from: x, to: out, from_row: x_row, to_row: out_row, from_word: word, to_word: word, words: pieces, pieces };
        let map = Map { token_topk_to_pos, pos_to_expert, k, num_tokens, num_rows, first_row, all_rows };
        let order = Order::<false> { length: pieces, divisor: Divisor { magic, shift } };
        let n = block_idx_x() * THREADS + thread_idx();
        scatter::<W, 1, false>(rows, map, (order, order), n, grid_dim_x() * THREADS);
    }
    entries { w16[[u32; 4]], w4[u32], w2[u16], w1[u8] }
}

kernel! {
    op = expand_to_fused;
    threads = 128;
    /// As [`rows`], a warp a chunk of a token's row: `V` vectors a lane, `row_chunks` chunks and `pieces` vectors a row. The magic number
    /// divides by `row_chunks`.
    pub fn chunks[const V: usize, const WHOLE: bool](
        x: In<u8>, token_topk_to_pos: In<i32>, pos_to_expert: In<i32>, out: Out<u8>, k: u32, num_tokens: u32, num_rows: u32,
        first_row: u32, all_rows: u32, x_row: u32, out_row: u32, pieces: u32, row_chunks: u32, magic: u32, shift: u32,
    ) {
        let chunks = Chunks {
            from: x, to: out, from_row: x_row, to_row: out_row, vectors: pieces, row_chunks, divisor: Divisor { magic, shift },
        };
        let map = Map { token_topk_to_pos, pos_to_expert, k, num_tokens, num_rows, first_row, all_rows };
        let warps = CHUNK_THREADS / 32;
        scatter_chunks::<V, WHOLE>(chunks, map, block_idx_x() * warps + warp_id(), grid_dim_x() * warps);
    }
    entries { v4[4, false], v7[7, true] }
}

kernel! {
    op = expand_to_fused;
    threads = 256;
    /// As [`rows`] with scale factors: `sf_blocks` blocks, every `period`th one until there are no more, have rows of `sf_pieces` pieces of
    /// `N` words of type `S`, `sf_words` in all, with strides in bytes. With `gathers` they come from all of `x_sf` by `pos_to_token`; else
    /// `x_sf` starts at this launch's first token, and `pos_to_token` is not looked at. `DOWN`: lanes of a warp are rows; the magic numbers
    /// divide by the tokens and rows of this launch then, else by `sf_pieces`.
    pub fn rows_with_sf[W: Word + Default, S: Word + Default, const N: usize, const DOWN: bool](
        x: In<u8>, x_sf: In<u8>, token_topk_to_pos: In<i32>, pos_to_expert: In<i32>, pos_to_token: In<i32>, out: Out<u8>, out_sf: Out<u8>,
        k: u32, num_tokens: u32, num_rows: u32, first_row: u32, all_tokens: u32, all_rows: u32,
        x_row: u32, out_row: u32, pieces: u32, magic: u32, shift: u32,
        x_sf_row: u32, out_sf_row: u32, x_sf_word: u32, out_sf_word: u32, sf_words: u32, sf_pieces: u32,
        token_magic: u32, token_shift: u32, row_magic: u32, row_shift: u32,
        gathers: u32, sf_blocks: u32, period: u32, period_magic: u32, period_shift: u32,
    ) {
        let map = Map { token_topk_to_pos, pos_to_expert, k, num_tokens, num_rows, first_row, all_rows };
        let scales = Scales {
            rows: Rows {
                from: x_sf, to: out_sf, from_row: x_sf_row, to_row: out_sf_row, from_word: x_sf_word, to_word: out_sf_word,
                words: sf_words, pieces: sf_pieces,
            },
            token: Divisor { magic: token_magic, shift: token_shift }, row: Divisor { magic: row_magic, shift: row_shift },
            gathers, pos_to_token, all_tokens, blocks: sf_blocks,
        };
        let block = block_idx_x();
        let turn = Divisor { magic: period_magic, shift: period_shift }.divide(block);
        if block == turn * period && turn < sf_blocks {
            copy_scales::<S, N, DOWN>(scales, map, turn, THREADS);
            return;
        }
        // The blocks of scale factors up to this one don't count.
        let block = block - (turn + 1).min(sf_blocks);
        let word = size_of::<W>() as u32;
        let rows =
            Rows { from: x, to: out, from_row: x_row, to_row: out_row, from_word: word, to_word: word, words: pieces, pieces };
        let order = Order::<false> { length: pieces, divisor: Divisor { magic, shift } };
        let num_threads = (grid_dim_x() - sf_blocks) * THREADS;
        scatter::<W, 1, false>(rows, map, (order, order), block * THREADS + thread_idx(), num_threads);
    }
    entries {
        w16_vectors[[u32; 4], [u32; 4], 1, false], w16_words[[u32; 4], u32, 4, true],
        w4_words[u32, u32, 4, true], w1_words[u8, u32, 4, true],
    }
}

kernel! {
    op = expand_to_fused;
    threads = 128;
    /// [`chunks`](mod@chunks) with the scale factors of [`rows_with_sf`](mod@rows_with_sf).
    pub fn chunks_with_sf[const V: usize, const WHOLE: bool, S: Word + Default, const N: usize, const DOWN: bool](
        x: In<u8>, x_sf: In<u8>, token_topk_to_pos: In<i32>, pos_to_expert: In<i32>, pos_to_token: In<i32>, out: Out<u8>, out_sf: Out<u8>,
        k: u32, num_tokens: u32, num_rows: u32, first_row: u32, all_tokens: u32, all_rows: u32,
        x_row: u32, out_row: u32, pieces: u32, row_chunks: u32, magic: u32, shift: u32,
        x_sf_row: u32, out_sf_row: u32, x_sf_word: u32, out_sf_word: u32, sf_words: u32, sf_pieces: u32,
        token_magic: u32, token_shift: u32, row_magic: u32, row_shift: u32,
        gathers: u32, sf_blocks: u32, period: u32, period_magic: u32, period_shift: u32,
    ) {
        let map = Map { token_topk_to_pos, pos_to_expert, k, num_tokens, num_rows, first_row, all_rows };
        let scales = Scales {
            rows: Rows {
                from: x_sf, to: out_sf, from_row: x_sf_row, to_row: out_sf_row, from_word: x_sf_word, to_word: out_sf_word,
                words: sf_words, pieces: sf_pieces,
            },
            token: Divisor { magic: token_magic, shift: token_shift }, row: Divisor { magic: row_magic, shift: row_shift },
            gathers, pos_to_token, all_tokens, blocks: sf_blocks,
        };
        let block = block_idx_x();
        let turn = Divisor { magic: period_magic, shift: period_shift }.divide(block);
        if block == turn * period && turn < sf_blocks {
            copy_scales::<S, N, DOWN>(scales, map, turn, CHUNK_THREADS);
            return;
        }
        // The blocks of scale factors up to this one don't count.
        let block = block - (turn + 1).min(sf_blocks);
        let chunks = Chunks {
            from: x, to: out, from_row: x_row, to_row: out_row, vectors: pieces, row_chunks, divisor: Divisor { magic, shift },
        };
        let warps = CHUNK_THREADS / 32;
        scatter_chunks::<V, WHOLE>(chunks, map, block * warps + warp_id(), (grid_dim_x() - sf_blocks) * warps);
    }
    entries {
        v4_vectors[4, false, [u32; 4], 1, false], v4_words[4, false, u32, 4, true],
        v7_vectors[7, true, [u32; 4], 1, false], v7_words[7, true, u32, 4, true],
    }
}
