//! Warp-wide exchange and reductions. All 32 lanes call each function together, from the same place in the source; a warp
//! leaves a kernel as a whole, and block sizes are multiples of 32.

use super::backend;
use super::global::lane_id;
use super::math::{max_total, min_total};

/// A value that fits one or two shuffles.
pub trait ShuffleValue: Copy {
    /// Apply a 32-bit shuffle to each word.
    fn map_words(self, f: impl Fn(u32) -> u32) -> Self;
}

macro_rules! shuffle_value {
    ($($t:ty: $v:ident => $to:expr, $w:ident => $from:expr;)*) => { $(impl ShuffleValue for $t {
        #[inline(always)]
        #[track_caller]
        fn map_words(self, f: impl Fn(u32) -> u32) -> Self {
            let $v = self;
            let $w = f($to);
            $from
        }
    })* };
}
shuffle_value! {
    u32: v => v, w => w;
    i32: v => v as u32, w => w as i32;
    f32: v => v.to_bits(), w => f32::from_bits(w);
}
impl ShuffleValue for u64 {
    #[inline(always)]
    #[track_caller]
    fn map_words(self, f: impl Fn(u32) -> u32) -> Self {
        f(self as u32) as u64 | (f((self >> 32) as u32) as u64) << 32
    }
}

/// The value of lane `lane` (taken modulo 32).
#[inline(always)]
#[track_caller]
pub fn warp_shuffle<V: ShuffleValue>(value: V, lane: u32) -> V {
    let at = backend::here();
    value.map_words(|w| backend::shuffle_idx(w, lane, at))
}

/// The value of lane `lane_id() ^ mask`.
#[inline(always)]
#[track_caller]
pub fn warp_shuffle_xor<V: ShuffleValue>(value: V, mask: u32) -> V {
    let at = backend::here();
    value.map_words(|w| backend::shuffle_xor(w, mask, at))
}

/// The value of lane `lane_id() - delta`; lanes below `delta` keep their own. `delta` counts modulo 32.
#[inline(always)]
#[track_caller]
pub fn warp_shuffle_up<V: ShuffleValue>(value: V, delta: u32) -> V {
    let at = backend::here();
    value.map_words(|w| backend::shuffle_up(w, delta, at))
}

/// The value of lane `lane_id() + delta`; the last `delta` lanes keep their own. `delta` counts modulo 32.
#[inline(always)]
#[track_caller]
pub fn warp_shuffle_down<V: ShuffleValue>(value: V, delta: u32) -> V {
    let at = backend::here();
    value.map_words(|w| backend::shuffle_down(w, delta, at))
}

/// Bit `l` is set where lane `l` says true.
#[inline(always)]
#[track_caller]
pub fn warp_ballot(vote: bool) -> u32 {
    backend::ballot(vote, backend::here())
}

/// Whether any lane says true.
#[inline(always)]
#[track_caller]
pub fn warp_any(vote: bool) -> bool {
    backend::ballot(vote, backend::here()) != 0
}

/// Whether all lanes say true.
#[inline(always)]
#[track_caller]
pub fn warp_all(vote: bool) -> bool {
    backend::ballot(vote, backend::here()) == u32::MAX
}

/// Bit `l` is set where lane `l` has the same value as this lane.
#[inline(always)]
#[track_caller]
pub fn warp_match_any(value: u32) -> u32 {
    backend::match_any(value, backend::here())
}

/// Orders memory accesses among the lanes of the warp.
#[inline(always)]
#[track_caller]
pub fn warp_sync() {
    backend::warp_sync(backend::here())
}

/// Sum over the warp, wrapping; one instruction.
#[inline(always)]
#[track_caller]
pub fn warp_sum_u32(value: u32) -> u32 {
    backend::redux_add(value, backend::here())
}

/// Largest value of the warp; one instruction.
#[inline(always)]
#[track_caller]
pub fn warp_max_u32(value: u32) -> u32 {
    backend::redux_max(value, backend::here())
}

/// Smallest value of the warp; one instruction.
#[inline(always)]
#[track_caller]
pub fn warp_min_u32(value: u32) -> u32 {
    backend::redux_min(value, backend::here())
}

/// Butterfly reduction over groups of `LANES` neighbouring lanes (a power of two); every lane gets its group's result.
#[inline(always)]
#[track_caller]
pub fn warp_reduce<const LANES: u32, V: ShuffleValue>(value: V, combine: impl Fn(V, V) -> V) -> V {
    let mut v = value;
    let mut mask = LANES / 2;
    while mask > 0 {
        v = combine(v, warp_shuffle_xor(v, mask));
        mask /= 2;
    }
    v
}

/// Sum over groups of `LANES` lanes, in the fixed order of a butterfly (widest distance first).
#[inline(always)]
#[track_caller]
pub fn warp_sum<const LANES: u32>(value: f32) -> f32 {
    warp_reduce::<LANES, f32>(value, |a, b| a + b)
}

/// Largest value over groups of `LANES` lanes; NaN is ignored unless all are NaN.
#[inline(always)]
#[track_caller]
pub fn warp_max<const LANES: u32>(value: f32) -> f32 {
    warp_reduce::<LANES, f32>(value, max_total)
}

/// Smallest value over groups of `LANES` lanes; NaN is ignored unless all are NaN.
#[inline(always)]
#[track_caller]
pub fn warp_min<const LANES: u32>(value: f32) -> f32 {
    warp_reduce::<LANES, f32>(value, min_total)
}

/// Largest of non-negative values (or +0.0) over the whole warp: their bits order like integers, so one instruction does it.
#[inline(always)]
#[track_caller]
pub fn warp_max_nonnegative(value: f32) -> f32 {
    f32::from_bits(warp_max_u32(value.to_bits()))
}

/// Inclusive prefix sum over the lanes, wrapping.
#[inline(always)]
#[track_caller]
pub fn warp_scan_sum(value: u32) -> u32 {
    let mut v = value;
    let mut delta = 1;
    while delta < 32 {
        let below = warp_shuffle_up(v, delta);
        v = v.wrapping_add(if lane_id() >= delta { below } else { 0 });
        delta *= 2;
    }
    v
}

/// Largest key and the smallest index that has it; every lane gets both. `key` orders as an unsigned integer.
#[inline(always)]
#[track_caller]
pub fn warp_arg_max(key: u32, index: u32) -> (u32, u32) {
    let best = warp_max_u32(key);
    (best, warp_min_u32(if key == best { index } else { u32::MAX }))
}

/// An unsigned integer that orders as the float does: -inf lowest, then up to +inf. `-0.0` counts as `+0.0`; NaN of either
/// sign lands below everything.
#[inline(always)]
pub fn ordered_key(value: f32) -> u32 {
    // `+ 0.0` turns -0.0 into +0.0 and leaves everything else alone.
    let bits = (value + 0.0).to_bits();
    let key = if bits >> 31 == 1 { !bits } else { bits | 0x8000_0000 };
    if value.is_nan() { 0 } else { key }
}

/// The float of a key; inverse of [`ordered_key`] except for `-0.0` and NaN. Keys of no number give NaN.
#[inline(always)]
pub fn ordered_float(key: u32) -> f32 {
    f32::from_bits(if key >> 31 == 1 { key & 0x7fff_ffff } else { !key })
}
