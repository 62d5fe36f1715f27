//! Barriers and reductions over a block, and the barrier over a cooperative launch.

use super::backend;
use super::global::{lane_id, thread_idx, warp_id};
use super::math::max_total;
use super::shared::Shared;
use super::warp::{ShuffleValue, warp_reduce, warp_scan_sum, warp_shuffle};
use super::{Word, block_dim};

/// Barrier over the block; orders its shared and global memory accesses.
#[inline(always)]
#[track_caller]
pub fn block_sync() {
    backend::block_sync(backend::here())
}

/// Barrier over all blocks of a cooperative launch ([`LaunchConfig::cooperative`](crate::launch::LaunchConfig::cooperative));
/// orders all global memory accesses. `barrier` is one word that was zero before the launch and is zero after it.
#[inline(always)]
#[track_caller]
pub fn grid_sync(barrier: super::Out<u32>) {
    backend::grid_sync(barrier.element(0), backend::here())
}

/// Reduce over the block in a fixed order; every thread gets the result. `scratch` has one element a warp and may be used
/// again after the next [`block_sync`].
#[inline(always)]
#[track_caller]
pub fn block_reduce<V: ShuffleValue + Word>(value: V, identity: V, scratch: Shared<V>, combine: impl Fn(V, V) -> V + Copy) -> V {
    let of_warp = warp_reduce::<32, V>(value, combine);
    if lane_id() == 0 {
        scratch.set(warp_id(), of_warp);
    }
    block_sync();
    let part = if lane_id() < block_dim() / 32 { scratch.get(lane_id()) } else { identity };
    warp_reduce::<32, V>(part, combine)
}

/// Sum over the block, see [`block_reduce`].
#[inline(always)]
#[track_caller]
pub fn block_sum(value: f32, scratch: Shared<f32>) -> f32 {
    block_reduce(value, 0.0, scratch, |a, b| a + b)
}

/// Largest value over the block, see [`block_reduce`]; NaN is ignored unless all are NaN.
#[inline(always)]
#[track_caller]
pub fn block_max(value: f32, scratch: Shared<f32>) -> f32 {
    block_reduce(value, f32::NEG_INFINITY, scratch, max_total)
}

/// Inclusive prefix sum over the block, wrapping, and the total. `scratch` has one element a warp and may be used again
/// after the next [`block_sync`].
#[inline(always)]
#[track_caller]
pub fn block_scan_sum(value: u32, scratch: Shared<u32>) -> (u32, u32) {
    let in_warp = warp_scan_sum(value);
    if thread_idx() & 31 == 31 {
        scratch.set(warp_id(), in_warp);
    }
    block_sync();
    let of_warp = if lane_id() < block_dim() / 32 { scratch.get(lane_id()) } else { 0 };
    let warps = warp_scan_sum(of_warp);
    let before = warp_shuffle(warps, warp_id().wrapping_sub(1) & 31);
    let total = warp_shuffle(warps, 31);
    (in_warp.wrapping_add(if warp_id() == 0 { 0 } else { before }), total)
}
