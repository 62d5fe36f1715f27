//! batched_transpose: swap rows and columns of each matrix of a batch; elements are 1, 2 or 4 bytes that are moved, not read.
//!
//! In   x  [b, m, n], rows and matrices at any stride      Out  out  [b, n, m] contiguous
//! Bytes are copied, so the result is exact for every element type, NaN payloads included.
//! Map   one block per tile of 16 x 16 cells, of 8 x 8 for small matrices, tiles along the rows of x; a cell is V x V elements of one
//!       thread, V of them 16 bytes.
//! Cost  2·b·m·n·size bytes; a cell costs V loads, V stores, 2·V shared accesses and 0 (4 bytes), 4·V (2), 8·V (1) permutes.
//! Ragged m adds V shared accesses, about 15·V moves and permutes and V²/16 stores of one element to a cell; ragged n goes by element.

use crate::device::*;
use crate::{kernel, unroll};

/// Bytes of a vector access, and of a chunk of the shared tile.
const CHUNK: u32 = 16;

/// Cells along each edge of a tile: 256-byte pieces of rows on both sides. Smaller tiles, tiles staged by `cp.async` and blocks
/// that loop over tiles were measured and are no faster.
pub const CELLS: u32 = 16;

/// The same where there are few tiles of [`CELLS`]: 128-byte pieces, 64 threads, so that all multiprocessors have something to do from
/// beginning to end. Bytes of 64 x 7168: 4.7 us instead of 5.3 on an H200, of 4032 x 2048 8.7 instead of 9.15.
pub const SMALL_CELLS: u32 = 8;

/// So many tiles of [`CELLS`] are few. With more, small tiles gain nothing.
pub const FEW_TILES: u32 = 1024;

/// Edge of the tile of [`any`], in elements.
pub const ANY_TILE: u32 = 64;

/// Threads of [`any`].
pub const ANY_THREADS: u32 = 256;

/// The shared tile: transposed rows of `cells` chunks.
#[inline(always)]
const fn shared_tile(v: u32, cells: u32) -> (SharedLayout, Shared<u8>) {
    let mut layout = SharedLayout::new();
    let tile = layout.array::<u8>(cells * v * cells * CHUNK);
    (layout, tile)
}

/// Launch of [`tiles`] for `batches` matrices of `m` x `n` elements, `v` of them in 16 bytes: one thread per cell, `cells` along each edge
/// of a tile.
pub const fn tiles_config(batches: u32, m: u32, n: u32, v: u32, cells: u32) -> LaunchConfig {
    let tiles = batches * ceil_div(m, cells * v) * ceil_div(n, cells * v);
    LaunchConfig::new(tiles, cells * cells).shared(&shared_tile(v, cells).0)
}

/// The shared tile of [`any`] for elements of `size` bytes. The pitch is an odd number of words, so neither rows nor columns
/// meet in a bank.
#[inline(always)]
const fn any_tile(size: u32) -> (SharedLayout, Shared<u8>) {
    let mut layout = SharedLayout::new();
    let tile = layout.array::<u8>(ANY_TILE * (ANY_TILE * size + 4));
    (layout, tile)
}

/// Launch of [`any`] for `batches` matrices of `m` x `n` elements of `size` bytes.
pub const fn any_config(batches: u32, m: u32, n: u32, size: u32) -> LaunchConfig {
    let tiles = batches * ceil_div(m, ANY_TILE) * ceil_div(n, ANY_TILE);
    LaunchConfig::new(tiles, ANY_THREADS).shared(&any_tile(size).0)
}

/// Where a tile is.
struct Tile {
    batch: u32,
    row: u32,
    col: u32,
}

/// Tile `index` of all, in the order of `x`: along the rows of a matrix first.
#[inline(always)]
fn tile_at(index: u32, (m, n): (u32, u32), edge: u32) -> Tile {
    let (tiles_m, tiles_n) = (ceil_div(m, edge), ceil_div(n, edge));
    let line = index.checked_div(tiles_n).unwrap_or(0);
    let batch = line.checked_div(tiles_m).unwrap_or(0);
    Tile { batch, row: (line - batch * tiles_m) * edge, col: (index - line * tiles_n) * edge }
}

/// Chunk of the shared tile that holds chunk `chunk` of transposed row `row`. The swizzle spreads the eight threads of a
/// quarter warp over all banks twice: when they write the same row of neighbouring cells, which are `V` rows apart, and when they
/// read neighbouring chunks of a row.
#[inline(always)]
pub const fn tile_chunk<const V: usize, const CELLS: u32>(row: u32, chunk: u32) -> u32 {
    row * CELLS + (chunk ^ (row / V as u32 % 8))
}

/// 16 bytes of a row in pieces of `LOAD` bytes.
#[inline(always)]
fn load_chunk<const LOAD: u32>(row: In<u8>) -> [u32; 4] {
    match LOAD {
        4 => core::array::from_fn(|i| row.load4(4 * i as u32)),
        8 => {
            let ([a, b], [c, d]) = (row.load8(0), row.load8(8));
            [a, b, c, d]
        }
        _ => row.load16(0),
    }
}

/// Transpose of a cell: element `i` of row `j` becomes element `j` of row `i`.
#[inline(always)]
pub fn transpose_cell<const V: usize>(rows: &[[u32; 4]; V]) -> [[u32; 4]; V] {
    let mut columns = [[0; 4]; V];
    unroll!(j in V {
        columns[j] = [cell_word(rows, j, 0), cell_word(rows, j, 1), cell_word(rows, j, 2), cell_word(rows, j, 3)];
    });
    columns
}

/// Word `w` of row `j` of the transposed cell: element `j` of the rows that fit into a word. Steps that two of these have in common
/// are merged by the compiler.
#[inline(always)]
fn cell_word<const V: usize>(rows: &[[u32; 4]; V], j: usize, w: usize) -> u32 {
    match V {
        4 => rows[w][j],
        8 => byte_permute(rows[2 * w][j / 2], rows[2 * w + 1][j / 2], if j.is_multiple_of(2) { 0x5410 } else { 0x7632 }),
        _ => {
            // Bytes 0 and 1, or 2 and 3, of two rows interleaved; then the lower or the upper half of two of those.
            let bytes = if j % 4 < 2 { 0x5140 } else { 0x7362 };
            let pair = |r: usize| byte_permute(rows[4 * w + r][j / 4], rows[4 * w + r + 1][j / 4], bytes);
            byte_permute(pair(0), pair(2), if j.is_multiple_of(2) { 0x5410 } else { 0x7632 })
        }
    }
}

/// Where the matrices of `x` and their rows are; strides count bytes.
#[derive(Clone, Copy)]
struct Input {
    x: In<u8>,
    m: u32,
    n: u32,
    row_stride: u64,
    batch_stride: u64,
}

/// Load the tile, a cell per thread, transpose its cells and put them into shared memory. `n` is a multiple of `V`; so is `m`, unless
/// `RAGGED` is set: then the last row is loaded again in place of those beyond it.
#[inline(always)]
fn load_tile<const V: usize, const LOAD: u32, const CELLS: u32, const RAGGED: bool>(
    input: Input,
    tile: &Tile,
    thread: u32,
    shared: Shared<u8>,
) {
    let Input { x, m, n, row_stride, batch_stride } = input;
    let cell = V as u32;
    let (r, c) = (thread / CELLS, thread % CELLS);
    let (row, col) = (tile.row + r * cell, tile.col + c * cell);
    if row < m && col < n {
        let size = (CHUNK / cell) as u64;
        let mut from = x.at(tile.batch as u64 * batch_stride + row as u64 * row_stride + col as u64 * size);
        let mut rows = [[0; 4]; V];
        unroll!(i in V {
            let again = i == 0 || RAGGED && row + i as u32 >= m;
            from = if again { from } else { from.at(row_stride) };
            rows[i] = load_chunk::<LOAD>(from);
        });
        let columns = transpose_cell(&rows);
        unroll!(j in V {
            shared.store16(tile_chunk::<V, CELLS>(c * cell + j as u32, r) * CHUNK, columns[j]);
        });
    }
}

kernel! {
    op = batched_transpose;
    threads = 256, blocks = 2;
    /// Whole cells: `m` and `n` are multiples of `V`, output rows are 16-byte aligned, input rows `LOAD`-byte aligned. Strides of `x`
    /// count bytes.
    pub fn tiles[const V: usize, const LOAD: u32, const CELLS: u32](
        x: In<u8>, out: Out<u8>, m: u32, n: u32, row_stride: u64, batch_stride: u64,
    ) {
        let cell = V as u32;
        let thread = thread_idx() % (CELLS * CELLS);
        let tile = tile_at(block_idx_x(), (m, n), CELLS * cell);
        let (_, shared) = shared_tile(cell, CELLS);
        load_tile::<V, LOAD, CELLS, false>(Input { x, m, n, row_stride, batch_stride }, &tile, thread, shared);
        block_sync();

        // Each step writes CELLS output rows: CELLS neighbouring threads write the pieces of one.
        let (first, chunk) = (thread / CELLS, thread % CELLS);
        let (row, col) = (tile.col + first, tile.row + chunk * cell);
        if col < m && row < n {
            let mut columns = [[0; 4]; V];
            unroll!(i in V {
                // Beyond the edge the first row is read again, which costs less than a branch.
                let step = if row + i as u32 * CELLS < n { i as u32 * CELLS } else { 0 };
                columns[i] = shared.load16(tile_chunk::<V, CELLS>(first + step, chunk) * CHUNK);
            });
            let size = (CHUNK / cell) as u64;
            let pitch = m as u64 * size;
            let mut to = out.at((tile.batch as u64 * n as u64 + row as u64) * pitch + col as u64 * size);
            unroll!(i in V {
                to = if i == 0 { to } else { to.at(CELLS as u64 * pitch) };
                if row + i as u32 * CELLS < n {
                    to.store16(0, columns[i]);
                }
            });
        }
    }
    // Four elements of 4 bytes are 16 bytes, so there is no narrow load for those.
    entries {
        b1[16, 16, CELLS], b2[8, 16, CELLS], b4[4, 16, CELLS], b1_narrow[16, 4, CELLS], b2_narrow[8, 8, CELLS],
        b1_small[16, 16, SMALL_CELLS], b2_small[8, 16, SMALL_CELLS],
    }
}

/// A row of the shared tile on its way to an output row that starts anywhere: `len` elements, of which `head` come before the first
/// 16-byte boundary of the output.
#[derive(Clone, Copy)]
struct Segment {
    len: u32,
    head: u32,
}

impl Segment {
    /// The segment of output row `row` of the tile's columns. `start` is the distance of `out` from a 16-byte boundary, in elements.
    /// Rows whose numbers differ by a multiple of `V` have the same segment.
    #[inline(always)]
    fn of_row<const V: usize>(tile: &Tile, row: u32, (m, n): (u32, u32), start: u32) -> Self {
        let cell = V as u32;
        // Only the lowest bits matter.
        let at = tile.batch.wrapping_mul(n).wrapping_add(row).wrapping_mul(m).wrapping_add(tile.row + start);
        let len = min(CELLS * cell, m - tile.row);
        Self { len, head: min(0u32.wrapping_sub(at) % cell, len) }
    }
}

/// 16 bytes from byte `offset` (below 16) of two chunks on.
#[inline(always)]
fn shift_chunks(a: [u32; 4], b: [u32; 4], offset: u32) -> [u32; 4] {
    let pick = |skip: bool, this: u32, skipped: u32| if skip { this } else { skipped };
    let words = [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]];
    let by_two: [u32; 6] = core::array::from_fn(|i| pick(offset & 8 != 0, words[i + 2], words[i]));
    let by_one: [u32; 5] = core::array::from_fn(|i| pick(offset & 4 != 0, by_two[i + 1], by_two[i]));
    let bytes = 0x3210 + 0x1111 * (offset % 4);
    core::array::from_fn(|i| byte_permute(by_one[i], by_one[i + 1], bytes))
}

/// `body` at 0, `by`, `2 * by` and so on, `steps` times.
#[inline(always)]
fn each_step(steps: u32, by: u32, body: impl Fn(u32)) {
    if steps == 1 {
        return body(0);
    }
    let mut step = 0;
    while step < steps * by {
        body(step);
        step += by;
    }
}

kernel! {
    op = batched_transpose;
    threads = 256, blocks = 2;
    /// As [`tiles`] for any `m` and for output rows that start anywhere, `start` elements past a 16-byte boundary for the first one:
    /// 16-byte pieces that straddle two chunks of the shared tile, then the elements before the first and after the last piece of a
    /// row, V²/16 by each thread in `STEPS` steps of `EDGES`.
    pub fn ragged[T: Word, const V: usize, const EDGES: usize, const STEPS: usize](
        x: In<u8>, out: Out<u8>, m: u32, n: u32, row_stride: u64, batch_stride: u64, start: u32,
    ) {
        let cell = V as u32;
        let thread = thread_idx() % (CELLS * CELLS);
        let tile = tile_at(block_idx_x(), (m, n), CELLS * cell);
        let (_, shared) = shared_tile(cell, CELLS);
        load_tile::<V, 16, CELLS, true>(Input { x, m, n, row_stride, batch_stride }, &tile, thread, shared);
        block_sync();
        let out = out.cast::<T>().at(tile.batch as u64 * n as u64 * m as u64 + tile.row as u64);

        // As in `tiles`, CELLS neighbouring threads write the pieces of a row.
        let (first, piece) = (thread / CELLS, thread % CELLS);
        let row = tile.col + first;
        let Segment { len, head } = Segment::of_row::<V>(&tile, row, (m, n), start);
        let col = head + piece * cell;
        if col + cell <= len && row < n {
            // The last piece has no chunk after its own, and begins with that.
            let next = min(piece + 1, CELLS - 1);
            // Bytes four rows at a time: the code for all 16 takes the driver too long to compile.
            let rows = if V == 16 { 4 } else { V };
            let pieces = |step: u32| {
                let mut columns = [[0; 4]; 16];
                unroll!(i in rows {
                    let down = step + i as u32 * CELLS;
                    let line = first + if row + down < n { down } else { 0 };
                    let chunk = |chunk: u32| shared.load16(tile_chunk::<V, CELLS>(line, chunk) * CHUNK);
                    columns[i] = shift_chunks(chunk(piece), chunk(next), head * (CHUNK / cell));
                });
                unroll!(i in rows {
                    let down = step + i as u32 * CELLS;
                    if row + down < n {
                        out.at((row + down) as u64 * m as u64).store16(col, columns[i]);
                    }
                });
            };
            each_step((V / rows) as u32, rows as u32 * CELLS, pieces);
        }

        // Neighbouring threads write the single elements of a row: V, or up to 2·V - 2 where the matrix ends.
        let (first, lane) = (thread / cell, thread % cell);
        let row = tile.col + first;
        let lines = CELLS * CELLS / cell;
        let Segment { len, head } = Segment::of_row::<V>(&tile, row, (m, n), start);
        let edges = head + (len - head) % cell;
        let mut edge = lane;
        while edge < edges && row < n {
            let col = if edge < head { edge } else { len - edges + edge };
            // As above, in steps of four rows.
            each_step(STEPS as u32, EDGES as u32 * lines, |step| {
                let values: [T; EDGES] = core::array::from_fn(|i| {
                    let down = step + i as u32 * lines;
                    let line = first + if row + down < n { down } else { 0 };
                    shared.cast::<T>().get(tile_chunk::<V, CELLS>(line, col / cell) * cell + col % cell)
                });
                let _: [(); EDGES] = core::array::from_fn(|i| {
                    let down = step + i as u32 * lines;
                    if row + down < n {
                        out.at((row + down) as u64 * m as u64).set(col, values[i]);
                    }
                });
            });
            edge += cell;
        }
    }
    entries { b1[u8, 16, 4, 4], b2[u16, 8, 4, 1], b4[u32, 4, 1, 1] }
}

kernel! {
    op = batched_transpose;
    threads = 256;
    /// Any size and any alignment, element by element. Strides of `x` count bytes.
    pub fn any[T: Word](x: In<u8>, out: Out<u8>, m: u32, n: u32, row_stride: u64, batch_stride: u64) {
        let size = size_of::<T>() as u32;
        let pitch = ANY_TILE + 4 / size;
        let tile = tile_at(block_idx_x(), (m, n), ANY_TILE);
        let shared = any_tile(size).1.cast::<T>();
        let (line, at) = (thread_idx() / ANY_TILE, thread_idx() % ANY_TILE);
        const LINES: u32 = ANY_THREADS / ANY_TILE;
        const STEPS: usize = (ANY_TILE / LINES) as usize;

        // Beyond the edge the last row and column are read again: no branch around the loads, and nobody writes those results.
        let col = min(tile.col + at, n - 1);
        let from = x.at(tile.batch as u64 * batch_stride + col as u64 * size as u64);
        let values: [T; STEPS] = core::array::from_fn(|i| {
            let row = min(tile.row + line + i as u32 * LINES, m - 1);
            from.at(row as u64 * row_stride).cast::<T>().get(0)
        });
        let _: [(); STEPS] = core::array::from_fn(|i| shared.set((line + i as u32 * LINES) * pitch + at, values[i]));
        block_sync();

        let col = tile.row + at;
        if col < m {
            let to = out.cast::<T>().at(tile.batch as u64 * n as u64 * m as u64 + col as u64);
            let values: [T; STEPS] = core::array::from_fn(|i| shared.get(at * pitch + line + i as u32 * LINES));
            let _: [(); STEPS] = core::array::from_fn(|i| {
                let row = tile.col + line + i as u32 * LINES;
                if row < n {
                    to.at(row as u64 * m as u64).set(0, values[i]);
                }
            });
        }
    }
    entries { b1[u8], b2[u16], b4[u32] }
}

/// `u32::min` as a plain function: the method is not `const` and this one leaves a single instruction.
#[inline(always)]
fn min(a: u32, b: u32) -> u32 {
    if a < b { a } else { b }
}
