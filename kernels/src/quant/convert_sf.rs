//! convert_sf: scale factors of a quantised tensor from one layout to another.
//!
//! In   sf  f32, exponent bytes or e4m3, for [m, k] scaling blocks, strided      Out  out  the same scales in any other form
//! Exact  where `out` can hold a scale; others are counted, and rounded up to a power of two or to the nearest e4m3.
//! Map   a thread for each element of `out`, which are up to 4 scales; lanes along its contiguous dimension.
//! Cost  each scale read and written once; bound by the launch but for tensors with many scales.

use super::common::e4m3;
use crate::device::*;
use crate::{kernel, unroll};

/// Threads of a block.
pub const THREADS: u32 = 256;

/// One f32 a scale.
pub const F32: u32 = 0;
/// Exponent bytes of four block columns in a word.
pub const PACKED: u32 = 1;
/// Exponent bytes of four block rows in a word.
pub const PER_CHANNEL: u32 = 2;
/// One e4m3 a scale.
pub const E4M3: u32 = 3;

/// Blocks of a launch, for `inner` elements of the contiguous dimension of `out` and `outer` of the other one.
pub const fn blocks(inner: u64, outer: u64) -> u64 {
    let lanes = 1 << lanes_log2(inner);
    inner.div_ceil(lanes) * outer.div_ceil(THREADS as u64 / lanes)
}

/// Logarithm of the number of threads along the contiguous dimension: a warp, or fewer if there is less to do.
pub const fn lanes_log2(inner: u64) -> u32 {
    let log2 = inner.next_power_of_two().trailing_zeros();
    if log2 < 5 { log2 } else { 5 }
}

/// Scales in memory. Strides count elements of the tensor, which are words or single scales.
#[derive(Clone, Copy)]
struct Layout {
    form: u32,
    row: u32,
    col: u32,
}

impl Layout {
    /// Index of the scale of block row `m` and block column `k`: of its f32, or of its byte.
    #[inline(always)]
    fn index(self, m: u32, k: u32) -> u32 {
        match self.form {
            PACKED => (m * self.row + k / 4 * self.col) * 4 + k % 4,
            PER_CHANNEL => (m / 4 * self.row + k * self.col) * 4 + m % 4,
            _ => m * self.row + k * self.col,
        }
    }
}

/// The exponent byte of the power of two at or above the magnitude of a scale.
#[inline(always)]
fn exponent(bits: u32) -> u32 {
    let exponent = ((bits & 0x7FFF_FFFF) + 0x7F_FFFF) >> 23;
    // NaN.
    if exponent > 255 { 255 } else { exponent }
}

kernel! {
    op = convert_sf;
    threads = 256;
    /// `rows` by `columns` scales. Threads are `2^lanes_log2` elements of `out` along its contiguous dimension, which tiles of a row of
    /// blocks cover; `down` if that goes from block row to block row.
    pub fn convert(
        sf: In<u8>, sf_form: u32, sf_row: u32, sf_col: u32, out: Out<u8>, out_form: u32, out_row: u32, out_col: u32,
        rows: u32, columns: u32, down: u32, lanes_log2: u32, tiles: u32, bad: Out<u32>, count: u32,
    ) {
        let (from, to) = (Layout { form: sf_form, row: sf_row, col: sf_col }, Layout { form: out_form, row: out_row, col: out_col });
        // There are tiles, but a plain division would bring code for the case of none.
        let tile_row = block_idx_x().checked_div(tiles).unwrap_or(0);
        let tile = block_idx_x() - tile_row * tiles;
        let inner = (tile << lanes_log2) + (thread_idx() & ((1 << lanes_log2) - 1));
        let outer = tile_row * (THREADS >> lanes_log2) + (thread_idx() >> lanes_log2);
        // The first scale of the element, and how many it has below and beside it.
        let (row, column) = if down != 0 { (inner, outer) } else { (outer, inner) };
        let (high, wide) = (if out_form == PER_CHANNEL { 4 } else { 1 }, if out_form == PACKED { 4 } else { 1 });
        let (m, k) = (row * high, column * wide);
        let place = |i: u32| if out_form == PER_CHANNEL { (m + i, k) } else { (m, k + i) };
        let exists = |i: u32| {
            let (m, k) = place(i);
            i < high * wide && m < rows && k < columns
        };

        // All loads before the first use.
        let mut words = [0; 4];
        unroll!(i in 4 {
            if exists(i as u32) {
                let (m, k) = place(i as u32);
                let index = from.index(m, k);
                words[i] = if sf_form == F32 { sf.cast::<u32>().get(index) } else { sf.get(index) as u32 };
            }
        });
        if sf_form == E4M3 {
            words = e4m3x4_to_f32(words[0] | words[1] << 8 | words[2] << 16 | words[3] << 24).map(f32::to_bits);
        } else if sf_form != F32 {
            words = words.map(|exponent| exponent << 23);
        }

        let mut odd = 0;
        if out_form == F32 {
            if exists(0) {
                out.cast::<u32>().set(to.index(m, k), words[0]);
            }
        } else if out_form == E4M3 {
            if exists(0) {
                let scale = f32::from_bits(words[0]);
                let code = e4m3(scale);
                odd = (e4m3x2_to_f32(code)[0].to_bits() != words[0] && !scale.is_nan()) as u32;
                out.set(to.index(m, k), code as u8);
            }
        } else if exists(0) {
            // Scales that are not there are 0.
            odd = words.iter().fold(0, |odd, bits| odd + (bits & 0x807F_FFFF != 0) as u32);
            let word = exponent(words[0]) | exponent(words[1]) << 8 | exponent(words[2]) << 16 | exponent(words[3]) << 24;
            out.cast::<u32>().set(to.index(m, k) / 4, word);
        }
        if count != 0 {
            let odd = warp_sum_u32(odd);
            if odd > 0 && lane_id() == 0 {
                bad.atomic_add(0, odd, Scope::Gpu);
            }
        }
    }
}
