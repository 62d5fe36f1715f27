//! What kernels share that read expert or group indices.

use crate::device::index_below;

/// What an index counts as that names no expert or group.
pub const NONE: u32 = u32::MAX;

/// The index if it is below `len`, which is below 2^31; [`NONE`] for a negative one. The checked emulator reports one that is too
/// large; elsewhere it counts as [`NONE`] too.
#[inline(always)]
#[track_caller]
pub fn index_or_none(value: i64, len: u32) -> u32 {
    let index = if (value as u64) < NONE as u64 { value as u32 } else { NONE };
    if value >= 0 && index_below(index, len) { index } else { NONE }
}

/// A divisor that the launcher knows, as one multiplication and one shift.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Divisor {
    /// `2^(31 + shift) / divisor`, rounded up.
    pub magic: u32,
    /// Logarithm of the divisor, rounded up.
    pub shift: u32,
}

impl Divisor {
    /// For a divisor from 1 to 2^31 - 1.
    pub const fn new(divisor: u32) -> Self {
        let shift = if divisor <= 1 { 0 } else { 32 - (divisor - 1).leading_zeros() };
        // `magic * divisor` exceeds 2^(31 + shift) by at most 2^shift, so the quotient of a number below 2^31 is too large by less than
        // 1 / divisor: never enough to reach the next integer.
        let magic = match (1u64 << (31 + shift)).checked_div(divisor as u64) {
            Some(below) => below as u32 + 1,
            None => 0,
        };
        Self { magic, shift }
    }

    /// `n / divisor` for `n` below 2^31; some number for a larger one.
    #[inline(always)]
    pub const fn divide(self, n: u32) -> u32 {
        ((n.wrapping_mul(2) as u64 * self.magic as u64) >> 32) as u32 >> (self.shift & 31)
    }
}
