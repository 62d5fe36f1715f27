//! swiglu_forward_and_per_channel_cast_and_transpose: `silu(gate) * up` in bf16, quantised to e4m3 with one scale for each `npt` tokens
//! of a channel.
//!
//! In   x  bf16 [t, 2h], gate in the left half, any row stride      Out  out  e4m3 [h, t] or [t, h];  sf  f32 [ceil(t/npt), h]
//! Exact  bit for bit, quant.md 5.11, as far as [`exp`] is; a last block takes the tokens there are; NaN does not count for a scale.
//! Map   a block per tile of whole scaling blocks; a thread has 4 tokens by 8 channels in registers, from the load to the store. The
//!       maxima of a channel meet in shared memory; four tokens of a channel are a word of the transposed tile, which goes through
//!       shared memory too.
//! Cost  4 bytes read and 1 written a value, 4/npt for its scale; about 29 instructions a value: memory bound, but not by far.

use super::common::{E4m3, scale};
use super::common_channels::{plain_scale, short_quotient};
use super::common_swiglu::{clamp_gate, clamp_up, silu};
use crate::device::*;
use crate::{kernel, unroll};

/// Threads of a block.
pub const THREADS: u32 = 256;
/// Tokens of a thread, one after the other: as e4m3 a word of a transposed row.
const TOKENS: u32 = 4;
/// Channels of a thread: 16 bytes of bf16.
const CHANNELS: u32 = 8;
/// Tiles in y of the grid, whose limit is 65535; what is beyond goes to z.
const GRID_Y: u32 = 1 << 15;

/// Tokens and channels of a tile with `lanes` threads across.
const fn tile(lanes: u32) -> (u32, u32) {
    (THREADS / lanes * TOKENS, lanes * CHANNELS)
}

/// One block a tile, channels first: neighbours in x share DRAM pages of `x`.
pub const fn config(num_tokens: u32, hidden: u32, lanes: u32) -> LaunchConfig {
    let (tokens, channels) = tile(lanes);
    let (rows, columns) = (ceil_div(num_tokens, tokens), ceil_div(hidden, channels));
    let y = if rows < GRID_Y { rows } else { GRID_Y };
    let z = if y == 0 { 0 } else { ceil_div(rows, y) };
    LaunchConfig::grid([columns, y, z], THREADS).shared(&Scratch::new(lanes).0)
}

/// What a block keeps in shared memory.
struct Scratch {
    /// Largest magnitude of each channel in the tokens of a warp, as bf16.
    maxima: Shared<u16>,
    /// What the values of each scaling block are multiplied by.
    inverses: Shared<f32>,
    /// The transposed tile.
    tile: Shared<u8>,
}

impl Scratch {
    #[inline(always)]
    const fn new(lanes: u32) -> (SharedLayout, Self) {
        let (tokens, channels) = tile(lanes);
        let mut layout = SharedLayout::new();
        let maxima = layout.array(THREADS / WARP_SIZE * channels);
        let inverses = layout.array(tokens / 32 * channels);
        let tile = layout.array(tokens * channels);
        (layout, Self { maxima, inverses, tile })
    }
}

/// Gate and up of four tokens.
type Held = [[[u32; 4]; 2]; TOKENS as usize];

/// Load what a thread needs. Tokens and channels outside of the tensor are replaced by its last ones: those are in the same scaling
/// block, or in one that does not exist, so the maxima stay right and no load needs a condition.
#[inline(always)]
fn load<const ALIGNED: bool>(x: In<u16>, stride: u32, (token, channel): (u32, u32), (t, h): (u32, u32)) -> Held {
    let mut held = [[[0; 4]; 2]; TOKENS as usize];
    if ALIGNED {
        let (token, channel) = (min_u32(t - TOKENS, token), min_u32(h - CHANNELS, channel));
        let mut gate = x.at(token as u64 * stride as u64 + channel as u64);
        unroll!(i in (TOKENS as usize) {
            gate = if i == 0 { gate } else { gate.at(stride as u64) };
            held[i] = [gate.load16(0), gate.at(h as u64).load16(0)];
        });
    } else {
        unroll!(i in (TOKENS as usize) {
            let row = x.at(min_u32(t - 1, token + i as u32) as u64 * stride as u64);
            held[i] = [gather(row, channel, h), gather(row.at(h as u64), channel, h)];
        });
    }
    held
}

/// Eight channels from `channel` on, one by one; those beyond the last are the last.
#[inline(always)]
fn gather(row: In<u16>, channel: u32, h: u32) -> [u32; 4] {
    let value = |c: u32| row.at(min_u32(h - 1, channel + c) as u64).get(0) as u32;
    [value(0) | value(1) << 16, value(2) | value(3) << 16, value(4) | value(5) << 16, value(6) | value(7) << 16]
}

/// How `silu` is computed. What comes of it is the same once its product with a bf16 is rounded to bf16.
trait Silu {
    fn silu(gate: f32) -> f32;
}

/// For gates that bf16 can hold.
struct Short;
/// For all gates.
struct Any;

impl Silu for Short {
    #[inline(always)]
    fn silu(gate: f32) -> f32 {
        silu_of_bf16(gate)
    }
}

impl Silu for Any {
    #[inline(always)]
    fn silu(gate: f32) -> f32 {
        silu(gate)
    }
}

/// `silu` of a gate that bf16 can hold, the way the kernel takes.
#[doc(hidden)]
#[inline(always)]
pub fn silu_of_bf16(gate: f32) -> f32 {
    // Quarters, because the reciprocal of a divisor beyond 2^126 would be 0; negative ones to keep the sign of a zero.
    let divisor = one_plus_exp(-gate) * -0.25;
    short_quotient(gate * -0.25, divisor, fast_rcp(divisor))
}

/// `silu(gate) * up` of two channels, rounded to bf16.
#[inline(always)]
fn activate<S: Silu, const CLAMP: bool>(gate: u32, up: u32, clamp: f32) -> u32 {
    let value = |l: f32, r: f32| {
        let (l, r) = if CLAMP { (clamp_gate(l, clamp), clamp_up(r, clamp)) } else { (l, r) };
        S::silu(l) * r
    };
    let (l, r) = (bf16x2_to_f32(gate), bf16x2_to_f32(up));
    f32x2_to_bf16x2(value(l[0], r[0]), value(l[1], r[1]))
}

/// Pairs of channels of a thread.
const PAIRS: usize = (TOKENS * CHANNELS / 2) as usize;

/// [`activate`] of all that a thread holds, `N` pairs at a time: a loop that turns everything round, because registers have no index.
/// Written out, the code would be longer than the driver compiles in good time before the first launch.
#[inline(always)]
fn activate_all<S: Silu, const CLAMP: bool, const N: usize>(held: &Held, clamp: f32) -> [[u32; 4]; TOKENS as usize] {
    let mut gates: [u32; PAIRS] = core::array::from_fn(|i| held[i / 4][0][i % 4]);
    let mut ups: [u32; PAIRS] = core::array::from_fn(|i| held[i / 4][1][i % 4]);
    for _ in 0..PAIRS / N {
        rolled();
        let mut done = [0; N];
        unroll!(i in N {
            done[i] = activate::<S, CLAMP>(gates[i], ups[i], clamp);
        });
        // All move up, and results follow the gates. No up is used after the last, but if those of a few pairs did not change, the
        // compiler would peel steps off the loop.
        let before = ups;
        unroll!(i in PAIRS {
            if i + N < PAIRS {
                (gates[i], ups[i]) = (gates[i + N], ups[i + N]);
            } else {
                gates[i] = done[i + N - PAIRS];
                ups[i] = if N < 8 { before[i + N - PAIRS] } else { ups[i] };
            }
        });
    }
    core::array::from_fn(|i| core::array::from_fn(|w| gates[4 * i + w]))
}

/// The first `exist` of eight bytes, one by one.
#[inline(always)]
fn store_bytes(to: Out<u8>, bytes: [u32; 2], exist: u32) {
    unroll!(c in (CHANNELS as usize) {
        if (c as u32) < exist {
            to.set(c as u32, (bytes[c / 4] >> (8 * (c % 4))) as u8);
        }
    });
}

/// Arguments of a launch.
#[derive(Clone, Copy)]
struct Call {
    x: In<u16>,
    out: Out<u8>,
    sf: Out<f32>,
    t: u32,
    h: u32,
    x_stride: u32,
    sf_stride: u32,
    clamp: f32,
    round: u32,
}

/// What a block does.
#[inline(always)]
fn cast_tile<const LANES: u32, const NPT: u32, const TRANSPOSE: bool, const CLAMP: bool, const ALIGNED: bool>(call: Call) {
    let Call { x, out, sf, t, h, x_stride, sf_stride, clamp, round } = call;
    let (_, Scratch { maxima, inverses, tile: shared }) = Scratch::new(LANES);
    let (tokens, channels) = tile(LANES);
    let (row, column) = (block_idx_z() * grid_dim_y() + block_idx_y(), block_idx_x());
    let (tile_token, tile_channel) = (row * tokens, column * channels);
    // Blocks of the last z that have no tokens: all threads of a block leave together.
    if tile_token >= t {
        return;
    }
    let thread = thread_idx() % THREADS;
    let (lane, group) = (thread % LANES, thread / LANES);
    let (token, channel) = (tile_token + group * TOKENS, tile_channel + lane * CHANNELS);

    let held = load::<ALIGNED>(x, x_stride, (token, channel), (t, h));
    let acts = if ALIGNED { activate_all::<Short, CLAMP, 8>(&held, clamp) } else { activate_all::<Any, CLAMP, 2>(&held, clamp) };

    // Maxima of the channels: of the thread, of the warp, of the tile. They start from a number, so no NaN is left.
    let mut own: [u32; 4] = acts.iter().fold([0; 4], |own, v| core::array::from_fn(|w| bf16x2_max_abs(own[w], v[w])));
    if LANES <= 16 {
        own = own.map(|m| bf16x2_max_abs(m, warp_shuffle_xor(m, 16)));
    }
    if LANES <= 8 {
        own = own.map(|m| bf16x2_max_abs(m, warp_shuffle_xor(m, 8)));
    }
    if lane_id() < LANES {
        maxima.store16(warp_id() * channels + lane * CHANNELS, own);
    }
    block_sync();
    // A thread for each scale of the tile.
    let blocks = tokens / NPT;
    let warps = THREADS / WARP_SIZE / blocks;
    if thread < blocks * channels {
        let (block, c) = (thread / channels, thread % channels);
        let mut amax = 0;
        unroll!(i in 16 {
            if (i as u32) < warps {
                // Without the sign, which means nothing, bf16 order like integers.
                amax = max_u32(maxima.get((block * warps + i as u32) * channels + c) as u32 & 0x7FFF, amax);
            }
        });
        // An infinite activation counts as the largest finite one.
        let amax = f32::from_bits(min_u32(0x7F7F, amax) << 16);
        let scale = if round != 0 { scale::<E4m3, true>(amax) } else { plain_scale(amax) };
        inverses.set(thread, scale.inv);
        let (m, c) = (tile_token / NPT + block, tile_channel + c);
        if c < h && (blocks == 1 || m * NPT < t) {
            sf.at(m as u64 * sf_stride as u64 + c as u64).set(0, scale.sf);
        }
    }
    block_sync();

    let first = group * TOKENS / NPT * channels + lane * CHANNELS;
    let (a, b) = (inverses.load16(first), inverses.load16(first + 4));
    let inv = [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]].map(f32::from_bits);
    let value = |i: usize, c: usize| bf16x2_to_f32(acts[i][c / 2])[c % 2] * inv[c];
    if !TRANSPOSE {
        let word = |i: usize, w: usize| f32x4_to_e4m3x4([value(i, w), value(i, w + 1), value(i, w + 2), value(i, w + 3)]);
        let mut to = out.at(token as u64 * h as u64 + channel as u64);
        unroll!(i in (TOKENS as usize) {
            let codes = [word(i, 0), word(i, 4)];
            to = if i == 0 { to } else { to.at(h as u64) };
            if ALIGNED {
                // All of a thread's tokens exist, or none.
                if token < t && channel < h {
                    to.store8(0, codes);
                }
            } else {
                let exist = if token + (i as u32) < t { h.saturating_sub(channel) } else { 0 };
                store_bytes(to, codes, exist);
            }
        });
        return;
    }

    // Row `c` of the shared tile is a channel, with its chunks of 16 tokens swizzled by the lane that writes it: the words of a warp
    // then lie in 32 banks, and a quarter warp reads all chunks of a row.
    let chunks = tokens / 16;
    let chunk = (group / 4) ^ (lane % chunks);
    unroll!(c in (CHANNELS as usize) {
        let word = f32x4_to_e4m3x4([value(0, c), value(1, c), value(2, c), value(3, c)]);
        shared.store4((lane * CHANNELS + c as u32) * tokens + chunk * 16 + group % 4 * 4, word);
    });
    block_sync();
    if ALIGNED {
        unroll!(i in 2 {
            let item = thread + i as u32 * THREADS;
            let (c, chunk) = (item / chunks, item % chunks);
            let swizzled = chunk ^ (c / CHANNELS % chunks);
            let codes = shared.load16(c * tokens + swizzled * 16);
            let (channel, token) = (tile_channel + c, tile_token + chunk * 16);
            if channel < h && token < t {
                out.at(channel as u64 * t as u64 + token as u64).store16(0, codes);
            }
        });
    } else {
        // One byte a step: neighbouring threads write neighbouring tokens, each thread those of one.
        let token = thread % tokens;
        if tile_token + token < t {
            let end = min_u32(h - tile_channel, channels);
            let mut c = thread / tokens;
            while c < end {
                let swizzled = (token / 16) ^ (c / CHANNELS % chunks);
                let code = shared.get(c * tokens + swizzled * 16 + token % 16);
                out.at((tile_channel + c) as u64 * t as u64 + (tile_token + token) as u64).set(0, code);
                c += THREADS / tokens;
            }
        }
    }
}

kernel! {
    op = swiglu_forward_and_per_channel_cast_and_transpose;
    threads = 256;
    /// `x_stride` and `sf_stride` count elements. `ALIGNED`: rows of `x` and `out` start at multiples of 16 bytes, `h` is a multiple of 8
    /// and `t` one of 4; transposed `t` is a multiple of 16.
    pub fn cast[const LANES: u32, const NPT: u32, const TRANSPOSE: bool, const CLAMP: bool, const ALIGNED: bool](
        x: In<u16>, out: Out<u8>, sf: Out<f32>, t: u32, h: u32, x_stride: u32, sf_stride: u32, clamp: f32, round: u32,
    ) {
        let call = Call { x, out, sf, t, h, x_stride, sf_stride, clamp, round };
        cast_tile::<LANES, NPT, TRANSPOSE, CLAMP, ALIGNED>(call);
    }
    entries {
        t32[8, 32, true, false, true], t128[8, 128, true, false, true],
        t32_clamp[8, 32, true, true, true], t128_clamp[8, 128, true, true, true],
        n32[16, 32, false, false, true], n128[8, 128, false, false, true],
        n32_clamp[16, 32, false, true, true], n128_clamp[8, 128, false, true, true],
        t32_any[8, 32, true, true, false], t128_any[8, 128, true, true, false],
        n32_any[16, 32, false, true, false], n128_any[8, 128, false, true, false],
    }
}
