//! What ops on the expanded buffer share: reading which rows belong to a token, and when warps take rows in chunks.

use crate::device::*;
use crate::unroll;

/// Choices of a token whose rows are looked up at once.
pub const CHOICES: usize = 8;

/// Whether rows of `vectors` vectors leave at most a quarter of their chunks of `chunk` vectors empty.
pub const fn fills_chunks(vectors: u32, chunk: u32) -> bool {
    vectors as u64 * 4 >= ceil_div(vectors, chunk) as u64 * chunk as u64 * 3
}

/// Rows of the first choices in `positions`, -1 beyond `count` of them.
#[inline(always)]
#[track_caller]
pub fn load_choices(positions: In<i32>, count: u32) -> [i32; CHOICES] {
    let mut rows = [-1; CHOICES];
    unroll!(i in CHOICES {
        if (i as u32) < count {
            rows[i] = positions.get(i as u32);
        }
    });
    rows
}

/// Whether a choice has a row. One that is too large counts as none, after the checked emulator has reported it.
#[inline(always)]
#[track_caller]
pub fn has_row(row: i32, num_rows: u32) -> bool {
    // The first comparison is the only one in PTX, as negative rows are large ones there.
    (row as u32) < num_rows || row >= 0 && index_below(row as u32, num_rows)
}
