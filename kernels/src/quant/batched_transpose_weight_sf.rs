//! batched_transpose_weight_sf: power-of-two scales of many weights as packed exponents for both operands of a GEMM, a row of words each.
//!
//! In   per weight sf f32 [g, n_s, k_s]; a scale is for b by b values, b 32 or 128, and n = n_s b, k = k_s b      Out  sf0 ue8m0 words
//!      [g, ceil(k_s/4), n], word (p, r) the exponents \[r/b\]\[4p..4p+4\]; sf1 [g, ceil(n_s/4), k], word (p, c) those of \[4p..4p+4\]\[c/b\]
//! Exact  exponent fields; scales with a sign or mantissa bits are counted.
//! Map   tasks are kernel parameters, of which a block finds its own; a warp takes 8 words, one scale a lane, and writes each b times.
//! Cost  4 bytes written for each row, or column, and 4 of its scales; bound by the launch, or by memory for many groups.

use crate::device::*;
use crate::kernel;

/// Threads of a block.
pub const THREADS: u32 = 256;
/// Different words of a warp: a lane for each byte.
const WARP_WORDS: u32 = 8;
/// Different words of a block.
pub const BLOCK_WORDS: u32 = THREADS / WARP_SIZE * WARP_WORDS;
/// Tasks of a launch.
pub const TASKS: usize = 32;
/// Bits of a number of scaling blocks in a [`shape`].
pub const SIZE_BITS: u32 = 21;
/// Bits of the number of groups in a [`shape`].
pub const GROUP_BITS: u32 = 17;

/// Number of a task, groups, rows and columns of scales in one number: the fewer words a task has, the shorter is the code that picks one.
/// Rows and columns have [`SIZE_BITS`] bits, groups [`GROUP_BITS`], and a number the five that are left.
pub const fn shape(number: u64, groups: u64, rows: u64, columns: u64) -> u64 {
    number << (2 * SIZE_BITS + GROUP_BITS) | groups << (2 * SIZE_BITS) | rows << SIZE_BITS | columns
}

/// Blocks for one output of `groups` times `columns` rows of scales by `rows`.
pub const fn blocks(groups: u64, rows: u64, columns: u64) -> u64 {
    (groups * rows * columns.div_ceil(4)).div_ceil(BLOCK_WORDS as u64)
}

/// Calls a macro with the names of all tasks' parameters.
#[doc(hidden)]
#[macro_export]
macro_rules! with_weight_sf_tasks {
    ($with:ident) => {
        $with! {
            sf_0 out0_0 out1_0 shape_0 first_0,
             sf_1 out0_1 out1_1 shape_1 first_1,
             sf_2 out0_2 out1_2 shape_2 first_2,
             sf_3 out0_3 out1_3 shape_3 first_3,
             sf_4 out0_4 out1_4 shape_4 first_4,
             sf_5 out0_5 out1_5 shape_5 first_5,
             sf_6 out0_6 out1_6 shape_6 first_6,
             sf_7 out0_7 out1_7 shape_7 first_7,
             sf_8 out0_8 out1_8 shape_8 first_8,
             sf_9 out0_9 out1_9 shape_9 first_9,
             sf_10 out0_10 out1_10 shape_10 first_10,
             sf_11 out0_11 out1_11 shape_11 first_11,
             sf_12 out0_12 out1_12 shape_12 first_12,
             sf_13 out0_13 out1_13 shape_13 first_13,
             sf_14 out0_14 out1_14 shape_14 first_14,
             sf_15 out0_15 out1_15 shape_15 first_15,
             sf_16 out0_16 out1_16 shape_16 first_16,
             sf_17 out0_17 out1_17 shape_17 first_17,
             sf_18 out0_18 out1_18 shape_18 first_18,
             sf_19 out0_19 out1_19 shape_19 first_19,
             sf_20 out0_20 out1_20 shape_20 first_20,
             sf_21 out0_21 out1_21 shape_21 first_21,
             sf_22 out0_22 out1_22 shape_22 first_22,
             sf_23 out0_23 out1_23 shape_23 first_23,
             sf_24 out0_24 out1_24 shape_24 first_24,
             sf_25 out0_25 out1_25 shape_25 first_25,
             sf_26 out0_26 out1_26 shape_26 first_26,
             sf_27 out0_27 out1_27 shape_27 first_27,
             sf_28 out0_28 out1_28 shape_28 first_28,
             sf_29 out0_29 out1_29 shape_29 first_29,
             sf_30 out0_30 out1_30 shape_30 first_30,
             sf_31 out0_31 out1_31 shape_31 first_31
        }
    };
}

/// One weight.
#[derive(Clone, Copy)]
struct Task {
    /// f32 bits.
    sf: In<u32>,
    sf0: Out<u32>,
    sf1: Out<u32>,
    /// See [`shape`].
    shape: u64,
    /// First block of the grid.
    first: u32,
}

/// One output of a task. Its words run along `rows` of the scales, and four scales of a word along `columns`.
#[derive(Clone, Copy)]
struct Side {
    out: Out<u32>,
    rows: u32,
    columns: u32,
    row_stride: u32,
    column_stride: u32,
    /// Different words.
    words: u32,
}

/// Quotient and remainder; neither is used if `b` is 0.
#[inline(always)]
fn divide(a: u32, b: u32) -> (u32, u32) {
    let quotient = a.checked_div(b).unwrap_or(0);
    (quotient, a - quotient * b)
}

impl Side {
    #[inline(always)]
    fn new(out: Out<u32>, groups: u32, (rows, columns): (u32, u32), (row_stride, column_stride): (u32, u32)) -> Self {
        Self { out, rows, columns, row_stride, column_stride, words: groups * rows * ceil_div(columns, 4) }
    }

    /// Blocks of the grid.
    #[inline(always)]
    fn blocks(self) -> u32 {
        ceil_div(self.words, BLOCK_WORDS)
    }
}

/// The part of a task that block `block` of it does. Scales that are no powers of two are counted in `bad`, if there is one.
#[inline(always)]
fn run(task: Task, block: u32, block_log2: u32, bad: Out<u32>, count: bool) {
    let mask = (1 << SIZE_BITS) - 1;
    let (n, k) = ((task.shape >> SIZE_BITS) as u32 & mask, task.shape as u32 & mask);
    let groups = (task.shape >> (2 * SIZE_BITS)) as u32 & ((1 << GROUP_BITS) - 1);
    let by_rows = Side::new(task.sf0, groups, (n, k), (k, 1));
    let by_columns = Side::new(task.sf1, groups, (k, n), (1, k));
    let first_side = block < by_rows.blocks();
    let side = if first_side { by_rows } else { by_columns };
    let block = if first_side { block } else { block - by_rows.blocks() };

    let first = block * BLOCK_WORDS + warp_id() * WARP_WORDS;
    let (word, byte) = (first + lane_id() / 4, lane_id() % 4);
    let (above, row) = divide(word, side.rows);
    let (group, pack) = divide(above, ceil_div(side.columns, 4));
    let column = 4 * pack + byte;
    let exists = word < side.words && column < side.columns;
    let scale = if exists {
        task.sf.at(group as u64 * n as u64 * k as u64).get(row * side.row_stride + column * side.column_stride)
    } else {
        0
    };
    // Both outputs read every scale once; one of them counts.
    let odd = warp_ballot(scale & 0x807F_FFFF != 0).count_ones();
    if count && first_side && odd > 0 && lane_id() == 0 {
        bad.atomic_add((task.shape >> (2 * SIZE_BITS + GROUP_BITS)) as u32, odd, Scope::Gpu);
    }
    let exponent = (scale >> 23) & 0xFF;
    let packed = warp_reduce::<4, u32>(exponent << (8 * byte), |a, b| a | b);
    // Each word goes to `b` neighbours, four of which a lane writes at once.
    let vectors_log2 = block_log2 - 2;
    let to = side.out.at((first as u64) << block_log2);
    let mut vector = lane_id();
    while vector < WARP_WORDS << vectors_log2 {
        rolled();
        let number = vector >> vectors_log2;
        let value = warp_shuffle(packed, 4 * number);
        if first + number < side.words {
            to.store16(4 * vector, [value; 4]);
        }
        vector += WARP_SIZE;
    }
}

macro_rules! declare {
    (
        $sf_0:ident $sf0_0:ident $sf1_0:ident $shape_0:ident $first_0:ident,
        $($sf:ident $sf0:ident $sf1:ident $shape:ident $first:ident),*
    ) => {
        kernel! {
            op = batched_transpose_weight_sf;
            threads = 256;
            /// Tasks in the order of their first blocks; those that are not there start at the largest number. Blocks of `2^block_log2` values.
            pub fn transpose(
                bad: Out<u32>, count: u32, block_log2: u32,
                $sf_0: In<u32>, $sf0_0: Out<u32>, $sf1_0: Out<u32>, $shape_0: u64, $first_0: u32,
                $($sf: In<u32>, $sf0: Out<u32>, $sf1: Out<u32>, $shape: u64, $first: u32),*
            ) {
                // The first task starts at block 0.
                let mut task = Task { sf: $sf_0, sf0: $sf0_0, sf1: $sf1_0, shape: $shape_0, first: $first_0 };
                $(
                    if block_idx_x() >= $first {
                        task = Task { sf: $sf, sf0: $sf0, sf1: $sf1, shape: $shape, first: $first };
                    }
                )*
                run(task, block_idx_x() - task.first, block_log2, bad, count != 0);
            }
        }
    };
}
with_weight_sf_tasks!(declare);
