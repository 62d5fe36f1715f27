//! moe_topk_gate_backward: the gradient of the gate with respect to its logits, fused with that of a loss on sums of scores.
//!
//! In    scores f32 `[t, e]`; idx i64, weights and their gradients f32 `[t, k]`; mask u8 `[t]` and h f32 `[q, e]`        Out   f32 `[t, e]`
//! Exact f32 with sums in a fixed order and correctly rounded quotients; the derivative of the score within 3 units of the last place.
//! Map   one warp per token, a lane per choice. A row of zeros, or of the gradient of the loss, is written by all lanes; then each lane
//!       writes the element of its choice over it.
//! Cost  4·t·e bytes written and 20·t·k read, with a loss 4·t·e read beside; memory bound. With a loss some 30 instructions an element.

use super::common_gate::load;
pub use super::common_index::Divisor;
use super::common_index::{NONE, index_or_none};
use crate::device::*;
use crate::{kernel, unroll};

/// Tokens, that is warps, of a block.
pub const WARPS: u32 = 8;

/// Most choices: a lane each.
pub const MAX_TOPK: u32 = WARP_SIZE;

/// Longest rows that an entry of `with_loss` keeps in registers, given its `HELD`.
pub const fn max_held(held: usize) -> u32 {
    held as u32 * WARP_SIZE * 4
}

/// Grid and block for `t` tokens.
pub const fn config(t: u32) -> LaunchConfig {
    LaunchConfig::new(ceil_div(t, WARPS), WARPS * WARP_SIZE)
}

/// What keeps a token without a score from being divided by 0.
const EPSILON: f32 = 1e-20;

kernel! {
    op = moe_topk_gate_backward;
    threads = 256;
    /// Without a loss on the scores: all but the choices of a token are 0. `V` is 4 where rows start at multiples of 16 bytes, else 1.
    pub fn routed[const V: u32](
        t: u32, k: u32, idx: In<i64>, idx_stride: u64, weights: In<f32>, weights_stride: u64, grads: In<f32>, grads_stride: u64, e: u32,
        scores: In<f32>, out: Out<f32>, factor: f32,
    ) {
        let token = block_idx_x() * WARPS + warp_id();
        if token >= t {
            return;
        }
        let of_token = |stride: u64| token as u64 * stride;
        let choice = Choice::load(idx.at(of_token(idx_stride)), weights.at(of_token(weights_stride)), grads.at(of_token(grads_stride)), k);
        let row = of_token(e as u64);
        let (scores, out) = (scores.at(row), out.at(row));
        let expert = choice.expert::<true>(e);
        let score = if expert != NONE { scores.get(expert) } else { 0.0 };

        // While that arrives.
        let mut i = lane_id() * V;
        while i < e {
            rolled();
            if V == 4 { out.store16(i, [0; 4]) } else { out.set(i, 0.0) }
            i += WARP_SIZE * V;
        }
        let (gradient, slope, writes) = choice.gradient(expert, score, k, factor);
        // Its element is written a second time.
        warp_sync();
        if writes {
            out.set(expert, times(slope, gradient));
        }
    }
    entries { v4[4], v1[1] }
}

kernel! {
    op = moe_topk_gate_backward;
    threads = 256;
    /// With a loss on the scores. Rows stay in registers with `HELD` > 0, which are rows of up to [`max_held`] experts, `V` = 4.
    /// `sequence_magic` and so on are the [`Divisor`] for the tokens of a sequence.
    pub fn with_loss[const HELD: usize, const V: usize](
        t: u32, k: u32, idx: In<i64>, idx_stride: u64, weights: In<f32>, weights_stride: u64, grads: In<f32>, grads_stride: u64, e: u32,
        scores: In<f32>, mask: In<u8>, h: In<f32>, sequence_magic: u32, sequence_shift: u32, out: Out<f32>, factor: f32,
    ) {
        let token = block_idx_x() * WARPS + warp_id();
        if token >= t {
            return;
        }
        let lane = lane_id();
        let of_token = |stride: u64| token as u64 * stride;
        let choice = Choice::load(idx.at(of_token(idx_stride)), weights.at(of_token(weights_stride)), grads.at(of_token(grads_stride)), k);
        let sequence = Divisor { magic: sequence_magic, shift: sequence_shift }.divide(token);
        let row = of_token(e as u64);
        let (scores, out, h) = (scores.at(row), out.at(row), h.at(sequence as u64 * e as u64));
        let counts = mask.at(token as u64).get(0) != 0;

        // Sums over the row.
        let first = |run: usize| (run as u32 * WARP_SIZE + lane) * V as u32;
        let (mut sum, mut product) = (0.0, 0.0);
        let mut add = |u: [f32; V], h: [f32; V]| {
            for i in 0..V {
                sum += u[i];
                product = fma(h[i], u[i], product);
            }
        };
        let mut held = [([0.0; V], [0.0; V]); HELD];
        let of_choice = |expert: u32| if expert != NONE { (scores.get(expert), h.get(expert)) } else { (0.0, 0.0) };
        let (expert, early);
        if HELD > 0 {
            unroll!(run in HELD {
                if first(run) < e {
                    held[run] = (load::<V>(scores, first(run)), load::<V>(h, first(run)));
                }
            });
            // On its way while the row is added up.
            expert = choice.expert::<true>(e);
            early = of_choice(expert);
            unroll!(run in HELD { add(held[run].0, held[run].1) });
        } else {
            (expert, early) = (choice.expert::<false>(e), (0.0, 0.0));
            let mut i = first(0);
            while i < e {
                add(load::<V>(scores, i), load::<V>(h, i));
                i += WARP_SIZE * V as u32;
            }
        }
        let (sum, product) = (warp_sum::<WARP_SIZE>(sum), warp_sum::<WARP_SIZE>(product));
        // A row of zeros, as of a token that was routed at random, has no shares.
        let inverse = if counts & (sum > 0.0) { 1.0 / sum } else { 0.0 };
        let mean = inverse * product;
        let of_loss = |h: f32| (h - mean) * inverse;

        // Gradients of the loss alone.
        let write = |i: u32, u: [f32; V], h: [f32; V]| {
            store::<V>(out, i, core::array::from_fn(|j| times(slope(u[j]), of_loss(h[j]))));
        };
        if HELD > 0 {
            unroll!(run in HELD {
                if first(run) < e {
                    write(first(run), held[run].0, held[run].1);
                }
            });
        } else {
            let mut i = first(0);
            while i < e {
                rolled();
                // From L1.
                write(i, load::<V>(scores, i), load::<V>(h, i));
                i += WARP_SIZE * V as u32;
            }
        }

        // With long rows here, and `h` below: across two loops they would take more registers than there are.
        let score = if HELD > 0 || expert == NONE { early.0 } else { scores.get(expert) };
        let (gradient, slope, writes) = choice.gradient(expert, score, k, factor);
        // Its element is written a second time.
        warp_sync();
        if writes {
            let h = if HELD > 0 { early.1 } else { h.get(expert) };
            out.set(expert, times(slope, gradient + of_loss(h)));
        }
    }
    entries { held_2_v4[2, 4], held_4_v4[4, 4], v4[0, 4], v1[0, 1] }
}

/// What a lane knows about its choice.
struct Choice {
    /// The words of its index, -1 beyond `k`.
    index: [u32; 2],
    weight: f32,
    gradient: f32,
}

impl Choice {
    /// From the rows of a token.
    #[inline(always)]
    #[track_caller]
    fn load(idx: In<i64>, weights: In<f32>, grads: In<f32>, k: u32) -> Self {
        let lane = lane_id();
        if lane < k {
            Self { index: idx.load8(lane), weight: weights.get(lane), gradient: grads.get(lane) }
        } else {
            Self { index: [u32::MAX; 2], weight: 0.0, gradient: 0.0 }
        }
    }

    /// The expert, [`NONE`] beyond `k` and for -1. `LATER`: after the loads that come before this call.
    #[inline(always)]
    #[track_caller]
    fn expert<const LATER: bool>(&self, e: u32) -> u32 {
        // Opaque, or the compiler would do this where the index is read, and loads that come between would wait for it.
        let [low, high] = if LATER { self.index.map(opaque) } else { self.index };
        index_or_none((low as u64 | (high as u64) << 32) as i64, e)
    }

    /// Given the expert and its score: the gradient with respect to that, summed over all choices of the expert; the [`slope`] of the score; and
    /// whether this lane is the first with that expert.
    #[inline(always)]
    #[track_caller]
    fn gradient(&self, expert: u32, score: f32, k: u32, factor: f32) -> (f32, f32, bool) {
        let chosen = expert != NONE;
        let same = warp_match_any(expert);
        let dot = warp_sum::<WARP_SIZE>(if chosen { self.gradient * self.weight } else { 0.0 });
        // Without a fused multiply-add: a single choice has the weight `factor`, and the gradient 0.
        let mut gradient = factor * self.gradient - dot;
        if warp_any(chosen & (same & same.wrapping_sub(1) != 0)) {
            let mut sum = 0.0;
            for choice in 0..k {
                rolled();
                let other = warp_shuffle(gradient, choice);
                sum += if same >> choice & 1 == 1 { other } else { 0.0 };
            }
            gradient = sum;
        }
        // Opaque, or the compiler would put it behind the division and its rare branch, where the two do not overlap.
        let slope = f32::from_bits(opaque(slope(score).to_bits()));
        let denominator = warp_sum::<WARP_SIZE>(score) + EPSILON;
        let before = (1 << lane_id()) - 1;
        (gradient / denominator, slope, chosen & (same & before == 0))
    }
}

/// A product that is never -0.0.
#[inline(always)]
fn times(a: f32, b: f32) -> f32 {
    fma(a, b, 0.0)
}

/// The derivative `(1 - exp(-u^2)) / (2 u)` of a score `u = sqrt(log(1 + exp(x)))` by `x`; 0 at 0. At most 3 units of the last place
/// off; the same bits on both backends.
#[inline(always)]
pub fn slope(u: f32) -> f32 {
    // Beyond 40 the exponential is less than half a unit of the last place of 1.
    let v = min_total(u * u, 40.0);
    // exp(-v) = 2^n exp(r) with |r| <= ln(2) / 2. The sum with this constant has n + 127 in its low bits.
    const ROUND: f32 = 12_583_039.0;
    let n = fma(v, -core::f32::consts::LOG2_E, ROUND);
    let scale = f32::from_bits(n.to_bits() << 23);
    let n = n - ROUND;
    // ln(2) in two parts, the first of which times n is exact.
    let r = fma(n, -0.693_145_75, -v);
    let r = fma(n, -1.428_606_8e-6, r);
    // (exp(r) - 1 - r) / r^2, relative error of the whole 1.4e-8.
    let mut q = 0.001_388_251_8;
    for c in [0.008_366_527, 0.041_667_2, 0.166_665_43, 0.5] {
        q = fma(q, r, c);
    }
    let grown = fma(r * r, q, r);
    // 1 - exp(-v) without cancellation: for small v, n is 0 and this is -grown.
    let lost = fma(-scale, grown, 1.0 - scale);
    // 1 / u with a Newton step.
    let near = fast_rcp(u);
    let inverse = fma(near, fma(-u, near, 1.0), near);
    // Where `1 - v / 2` rounds to 1; 1 / u might be infinite.
    if u < 2.44e-4 { 0.5 * u } else { lost * (0.5 * inverse) }
}

/// Write `V` neighbouring values.
#[inline(always)]
#[track_caller]
fn store<const V: usize>(row: Out<f32>, i: u32, values: [f32; V]) {
    if V == 4 {
        row.store16(i, core::array::from_fn(|j| values[j % V].to_bits()));
    } else {
        for (j, v) in values.iter().enumerate() {
            row.set(i + j as u32, *v);
        }
    }
}
