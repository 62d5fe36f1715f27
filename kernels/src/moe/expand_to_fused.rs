//! expand_to_fused: copy the row of every token to all its rows of the expanded buffer and zero the padding rows.
//!
//! In   x any dtype [t, h]; x_sf f32 or ue8m0 [t, s]; token_topk_to_pos i32 [t, k]; pos_to_expert i32 \[p\]
//! Out  out [p, h], out_sf [p, s], of the same dtypes: rows of tokens where a choice names them, zeros where the expert is negative
//! Exact a copy of bytes.
//! Map   one thread per 16 bytes of x (fewer where alignment wants it): it loads them once, stores them to each row of its token, and
//!       looks at one or two places of the expanded buffer for padding. Scale factors have blocks of their own, spread evenly.
//! Cost  x read once, out written once, and the scales; some 2 instructions a byte: memory bound.

use super::common_expanded::{CHOICES, has_row, load_choices};
use crate::device::*;
use crate::quant::common::Divisor;
use crate::{kernel, unroll};

/// Threads of a block.
pub const THREADS: u32 = 256;
/// Places of the expanded buffer that a thread looks at for padding, if there are not enough tokens for all of it.
pub const PLACES: u32 = 2;
/// Most pieces of one launch. Threads of a last block that have none are numbered below 2^31 too, see [`Divisor`].
pub const MAX_PIECES: u64 = (1 << 31) - THREADS as u64;
/// Scale factors that a thread copies where they don't lie together: words of one row.
pub const WORDS: u32 = 4;

/// Blocks for rows of `pieces` pieces that are scattered from `t` tokens to `p` rows.
pub const fn scatter_blocks(t: u32, p: u32, pieces: u32) -> u32 {
    let (copies, places) = (t * pieces, ceil_div(p * pieces, PLACES));
    ceil_div(if copies > places { copies } else { places }, THREADS)
}

/// Blocks for rows of `pieces` pieces that are gathered into `p` rows.
pub const fn gather_blocks(p: u32, pieces: u32) -> u32 {
    ceil_div(p * pieces, THREADS)
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
        let block = block_idx_x();
        let turn = Divisor { magic: period_magic, shift: period_shift }.divide(block);
        if block == turn * period && turn < sf_blocks {
            let rows = Rows {
                from: x_sf, to: out_sf, from_row: x_sf_row, to_row: out_sf_row, from_word: x_sf_word, to_word: out_sf_word,
                words: sf_words, pieces: sf_pieces,
            };
            let order = |length: u32, magic, shift| {
                Order::<DOWN> { length: if DOWN { length } else { sf_pieces }, divisor: Divisor { magic, shift } }
            };
            let places = order(num_rows, row_magic, row_shift);
            let n = turn * THREADS + thread_idx();
            if gathers != 0 {
                gather::<S, N, DOWN>(rows, pos_to_token, (num_rows, first_row, all_tokens), places, n);
            } else {
                let tokens = order(num_tokens, token_magic, token_shift);
                scatter::<S, N, DOWN>(rows, map, (tokens, places), n, sf_blocks * THREADS);
            }
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
