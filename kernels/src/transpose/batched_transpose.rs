//! batched_transpose: swap rows and columns of each matrix of a batch; elements are 1, 2 or 4 bytes that are moved, not read.
//!
//! In   x  [b, m, n], rows and matrices at any stride      Out  out  [b, n, m] contiguous
//! Bytes are copied, so the result is exact for every element type, NaN payloads included.
//! Map   one block per tile of ROWS x COLS cells; a cell is V x V elements of one thread, V elements being 16 bytes.
//! Cost  2·b·m·n·size bytes; a cell costs V loads, V stores, 2·V shared accesses and 0 (f32), 4·V (bf16), 8·V (e4m3) permutes.

use crate::device::*;
use crate::{kernel, unroll};

/// Bytes of a vector access, and of a chunk of the shared tile.
const CHUNK: u32 = 16;

/// Edge of the tile of [`any`], in elements.
pub const ANY_TILE: u32 = 64;

/// Threads of [`any`].
pub const ANY_THREADS: u32 = 256;

/// Cells of a tile, one thread each: `rows` down `m` and `cols` along `n`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cells {
    /// Cells down the rows of the input; 16 times as many bytes are written in a piece.
    pub rows: u32,
    /// Cells along a row of the input; 16 times as many bytes are read in a piece.
    pub cols: u32,
}

impl Cells {
    /// 128-byte pieces on both sides, 64 threads: many small tiles in flight.
    pub const SMALL: Self = Self { rows: 8, cols: 8 };
    /// 256-byte pieces on both sides, 256 threads.
    pub const LARGE: Self = Self { rows: 16, cols: 16 };
}

/// The shared tile: transposed rows of `rows` chunks.
#[inline(always)]
const fn cells_tile(v: u32, cells: Cells) -> (SharedLayout, Shared<u8>) {
    let mut layout = SharedLayout::new();
    let tile = layout.array::<u8>(cells.cols * v * cells.rows * CHUNK);
    (layout, tile)
}

/// Launch for `batches` matrices of `m` x `n` elements, `v` of them in 16 bytes.
pub const fn cells_config(batches: u32, m: u32, n: u32, v: u32, cells: Cells) -> LaunchConfig {
    let tiles = batches * ceil_div(m, cells.rows * v) * ceil_div(n, cells.cols * v);
    LaunchConfig::new(tiles, cells.rows * cells.cols).shared(&cells_tile(v, cells).0)
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

/// Tile `index` of all. Tiles are walked in bands of `group` tile rows, column by column within a band: 1 goes along the rows of
/// the input, `u32::MAX` along those of the output.
#[inline(always)]
fn tile_at(index: u32, (m, n): (u32, u32), (tile_m, tile_n): (u32, u32), group: u32) -> Tile {
    let (tiles_m, tiles_n) = (ceil_div(m, tile_m), ceil_div(n, tile_n));
    let group = min(group, tiles_m);
    let batch = index.checked_div(tiles_m * tiles_n).unwrap_or(0);
    let index = index - batch * (tiles_m * tiles_n);
    let band = index.checked_div(group * tiles_n).unwrap_or(0);
    let (index, first) = (index - band * (group * tiles_n), band * group);
    let height = min(group, tiles_m - first);
    let col = index.checked_div(height).unwrap_or(0);
    Tile { batch, row: (first + index - col * height) * tile_m, col: col * tile_n }
}

/// Chunk of the shared tile that holds chunk `chunk` of transposed row `row`. The swizzle spreads the eight threads of a
/// quarter warp over all banks twice: when they write the same row of neighbouring cells, which are `V` rows apart, and when they
/// read neighbouring chunks of a row.
#[inline(always)]
pub const fn tile_chunk<const V: usize, const ROWS: u32>(row: u32, chunk: u32) -> u32 {
    row * ROWS + (chunk ^ (row / V as u32 % 8))
}

/// 16 bytes of a row in pieces of `LOAD` bytes.
#[inline(always)]
fn load_chunk<const LOAD: u32, const PLAIN: bool>(row: In<u8>) -> [u32; 4] {
    match LOAD {
        _ if PLAIN => row.load16(0),
        4 => core::array::from_fn(|i| row.load4(4 * i as u32)),
        8 => {
            let ([a, b], [c, d]) = (row.load8(0), row.load8(8));
            [a, b, c, d]
        }
        _ => row.load16_stream(0),
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

/// Transpose a tile of whole cells: `m` and `n` are multiples of `V`, output rows are 16-byte aligned, input rows `LOAD`-byte
/// aligned. Strides of `x` count bytes.
#[inline(always)]
fn transpose_tile<const V: usize, const ROWS: u32, const COLS: u32, const LOAD: u32, const PLAIN: bool>(
    (x, out): (In<u8>, Out<u8>),
    (m, n, group): (u32, u32, u32),
    (row_stride, batch_stride): (u64, u64),
) {
    let cell = V as u32;
    let size = CHUNK / cell;
    let thread = thread_idx() % (ROWS * COLS);
    let tile = tile_at(block_idx_x(), (m, n), (ROWS * cell, COLS * cell), group);
    let (_, shared) = cells_tile(cell, Cells { rows: ROWS, cols: COLS });

    let (r, c) = (thread / COLS, thread % COLS);
    let (row, col) = (tile.row + r * cell, tile.col + c * cell);
    if row < m && col < n {
        let mut from = x.at(tile.batch as u64 * batch_stride + row as u64 * row_stride + col as u64 * size as u64);
        let mut rows = [[0; 4]; V];
        unroll!(i in V {
            from = if i == 0 { from } else { from.at(row_stride) };
            rows[i] = load_chunk::<LOAD, PLAIN>(from);
        });
        let columns = transpose_cell(&rows);
        unroll!(j in V {
            shared.store16(tile_chunk::<V, ROWS>(c * cell + j as u32, r) * CHUNK, columns[j]);
        });
    }
    block_sync();

    // Each step writes COLS output rows: ROWS neighbouring threads write the pieces of one.
    let (first, chunk) = (thread / ROWS, thread % ROWS);
    let (row, col) = (tile.col + first, tile.row + chunk * cell);
    if col < m && row < n {
        let mut columns = [[0; 4]; V];
        unroll!(i in V {
            // Beyond the edge the first row is read again, which costs less than a branch.
            let step = if row + i as u32 * COLS < n { i as u32 * COLS } else { 0 };
            columns[i] = shared.load16(tile_chunk::<V, ROWS>(first + step, chunk) * CHUNK);
        });
        let pitch = m as u64 * size as u64;
        let mut to = out.at((tile.batch as u64 * n as u64 + row as u64) * pitch + col as u64 * size as u64);
        unroll!(i in V {
            to = if i == 0 { to } else { to.at(COLS as u64 * pitch) };
            if row + i as u32 * COLS < n {
                store_chunk::<PLAIN>(to, columns[i]);
            }
        });
    }
}

#[inline(always)]
fn store_chunk<const PLAIN: bool>(to: Out<u8>, chunk: [u32; 4]) {
    if PLAIN { to.store16(0, chunk) } else { to.store16_stream(0, chunk) }
}

/// What [`transpose_staged`] works on.
#[derive(Clone, Copy)]
struct Staged {
    x: In<u8>,
    out: Out<u8>,
    m: u32,
    n: u32,
    row_stride: u64,
    batch_stride: u64,
    tiles: u32,
    group: u32,
}

/// Chunk of a stage that holds chunk `chunk` of input row `row`. The swizzle spreads eight threads over all banks when they read
/// the same chunk of rows that are `V` apart.
#[inline(always)]
pub const fn staged_chunk<const V: usize, const COLS: u32>(row: u32, chunk: u32) -> u32 {
    row * COLS + (chunk ^ (row / V as u32 % 8))
}

/// The stages of a block, each a tile of the input.
#[inline(always)]
const fn stages(v: u32, cells: Cells, stages: u32) -> (SharedLayout, Shared<u8>) {
    let mut layout = SharedLayout::new();
    let tile = layout.array::<u8>(stages * cells.cols * v * cells.rows * CHUNK);
    (layout, tile)
}

/// Tiles of `batches` matrices.
pub const fn num_tiles(batches: u32, m: u32, n: u32, v: u32, cells: Cells) -> u32 {
    batches * ceil_div(m, cells.rows * v) * ceil_div(n, cells.cols * v)
}

/// Launch of a staged kernel with `blocks` blocks.
pub const fn staged_config(blocks: u32, v: u32, cells: Cells, num_stages: u32) -> LaunchConfig {
    LaunchConfig::new(blocks, cells.rows * cells.cols).shared(&stages(v, cells, num_stages).0)
}

/// Start the copies of a tile into a stage. A tile beyond the last is an empty group.
#[inline(always)]
fn copy_tile<const V: usize, const ROWS: u32, const COLS: u32>(what: &Staged, stage: Shared<u8>, index: u32) {
    let cell = V as u32;
    let size = CHUNK / cell;
    if index < what.tiles {
        let tile = tile_at(index, (what.m, what.n), (ROWS * cell, COLS * cell), what.group);
        let thread = thread_idx() % (ROWS * COLS);
        let (line, chunk) = (thread / COLS, thread % COLS);
        let (row, col) = (tile.row + line, tile.col + chunk * cell);
        if col < what.n {
            let offset = row as u64 * what.row_stride + col as u64 * size as u64;
            let mut from = what.x.at(tile.batch as u64 * what.batch_stride + offset);
            unroll!(i in V {
                from = if i == 0 { from } else { from.at(ROWS as u64 * what.row_stride) };
                if row + i as u32 * ROWS < what.m {
                    stage.copy16_async(staged_chunk::<V, COLS>(line + i as u32 * ROWS, chunk) * CHUNK, from, 0);
                }
            });
        }
    }
    copy_commit();
}

/// As [`transpose_tile`] through stages that `cp.async` fills: loads hold no registers, and those of the next `STAGES` tiles run
/// while one is written. `PENDING` is `STAGES - 1`.
#[inline(always)]
fn transpose_staged<
    const V: usize,
    const ROWS: u32,
    const COLS: u32,
    const STAGES: usize,
    const PENDING: u32,
    const PLAIN: bool,
>(
    what: Staged,
) {
    let cell = V as u32;
    let size = CHUNK / cell;
    let (_, shared) = stages(cell, Cells { rows: ROWS, cols: COLS }, STAGES as u32);
    let bytes = ROWS * cell * COLS * CHUNK;
    let thread = thread_idx() % (ROWS * COLS);
    // Neighbouring threads write neighbouring chunks of an output row.
    let (c, r) = (thread / ROWS, thread % ROWS);

    let mut index = block_idx_x();
    unroll!(s in STAGES {
        copy_tile::<V, ROWS, COLS>(&what, shared.slice(s as u32 * bytes, bytes), index + s as u32 * grid_dim_x());
    });
    let mut stage = 0;
    while index < what.tiles {
        let tile = tile_at(index, (what.m, what.n), (ROWS * cell, COLS * cell), what.group);
        let (row, col) = (tile.row + r * cell, tile.col + c * cell);
        let inside = row < what.m && col < what.n;
        let from = shared.slice(stage * bytes, bytes);
        copy_wait::<PENDING>();
        block_sync();
        let mut rows = [[0; 4]; V];
        if inside {
            unroll!(i in V {
                rows[i] = from.load16(staged_chunk::<V, COLS>(r * cell + i as u32, c) * CHUNK);
            });
        }
        block_sync();
        copy_tile::<V, ROWS, COLS>(&what, from, index + STAGES as u32 * grid_dim_x());
        if inside {
            let columns = transpose_cell(&rows);
            let pitch = what.m as u64 * size as u64;
            let mut to = what.out.at((tile.batch as u64 * what.n as u64 + col as u64) * pitch + row as u64 * size as u64);
            unroll!(j in V {
                to = if j == 0 { to } else { to.at(pitch) };
                store_chunk::<PLAIN>(to, columns[j]);
            });
        }
        index += grid_dim_x();
        stage = if stage == PENDING { 0 } else { stage + 1 };
    }
}

kernel! {
    op = batched_transpose;
    threads = 64, blocks = 8;
    /// Tiles of [`Cells::SMALL`], see `transpose_tile`.
    pub fn small[const V: usize, const LOAD: u32, const PLAIN: bool](
        x: In<u8>, out: Out<u8>, m: u32, n: u32, row_stride: u64, batch_stride: u64, group: u32,
    ) {
        transpose_tile::<V, { Cells::SMALL.rows }, { Cells::SMALL.cols }, LOAD, PLAIN>(
            (x, out), (m, n, group), (row_stride, batch_stride),
        );
    }
    entries {
        b1[16, 16, false], b2[8, 16, false], b4[4, 16, false], b1_narrow[16, 4, false], b2_narrow[8, 8, false],
        b1_plain[16, 16, true], b2_plain[8, 16, true], b4_plain[4, 16, true],
    }
}

kernel! {
    op = batched_transpose;
    threads = 256, blocks = 2;
    /// Tiles of [`Cells::LARGE`], see `transpose_tile`.
    pub fn large[const V: usize, const PLAIN: bool](
        x: In<u8>, out: Out<u8>, m: u32, n: u32, row_stride: u64, batch_stride: u64, group: u32,
    ) {
        transpose_tile::<V, { Cells::LARGE.rows }, { Cells::LARGE.cols }, 16, PLAIN>(
            (x, out), (m, n, group), (row_stride, batch_stride),
        );
    }
    entries {
        b1[16, false], b2[8, false], b4[4, false],
        b1_plain[16, true], b2_plain[8, true], b4_plain[4, true],
    }
}

kernel! {
    op = batched_transpose;
    threads = 256, blocks = 2;
    /// See `transpose_staged`.
    pub fn staged[const V: usize, const ROWS: u32, const COLS: u32, const STAGES: usize, const PENDING: u32, const PLAIN: bool](
        x: In<u8>, out: Out<u8>, m: u32, n: u32, row_stride: u64, batch_stride: u64, tiles: u32, group: u32,
    ) {
        transpose_staged::<V, ROWS, COLS, STAGES, PENDING, PLAIN>(Staged { x, out, m, n, row_stride, batch_stride, tiles, group });
    }
    entries {
        one_b1[16, 16, 16, 1, 0, false], one_b2[8, 16, 16, 1, 0, false], one_b4[4, 16, 16, 1, 0, false],
        three_b1[16, 16, 16, 3, 2, false], three_b2[8, 16, 16, 3, 2, false], three_b4[4, 16, 16, 3, 2, false],
        plain_b1[16, 16, 16, 3, 2, true], plain_b2[8, 16, 16, 3, 2, true], plain_b4[4, 16, 16, 3, 2, true],
        wide_b1[16, 8, 32, 3, 2, false], wide_b2[8, 8, 32, 3, 2, false], wide_b4[4, 8, 32, 3, 2, false],
        tall_b1[16, 32, 8, 3, 2, false], tall_b2[8, 32, 8, 3, 2, false], tall_b4[4, 32, 8, 3, 2, false],
    }
}

kernel! {
    op = batched_transpose;
    threads = 128, blocks = 4;
    /// See `transpose_staged`.
    pub fn staged_half[const V: usize, const ROWS: u32, const COLS: u32, const STAGES: usize, const PENDING: u32, const PLAIN: bool](
        x: In<u8>, out: Out<u8>, m: u32, n: u32, row_stride: u64, batch_stride: u64, tiles: u32, group: u32,
    ) {
        transpose_staged::<V, ROWS, COLS, STAGES, PENDING, PLAIN>(Staged { x, out, m, n, row_stride, batch_stride, tiles, group });
    }
    entries {
        one_b1[16, 16, 8, 1, 0, false], one_b2[8, 16, 8, 1, 0, false], one_b4[4, 16, 8, 1, 0, false],
        three_b1[16, 16, 8, 3, 2, false], three_b2[8, 16, 8, 3, 2, false], three_b4[4, 16, 8, 3, 2, false],
        mini_b1[16, 8, 8, 1, 0, false], mini_b2[8, 8, 8, 1, 0, false], mini_b4[4, 8, 8, 1, 0, false],
    }
}

kernel! {
    op = batched_transpose;
    threads = 256;
    /// Any size and any alignment, element by element. Strides of `x` count bytes.
    pub fn any[T: Word](x: In<u8>, out: Out<u8>, m: u32, n: u32, row_stride: u64, batch_stride: u64) {
        let size = size_of::<T>() as u32;
        let pitch = ANY_TILE + 4 / size;
        let tile = tile_at(block_idx_x(), (m, n), (ANY_TILE, ANY_TILE), 1);
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
