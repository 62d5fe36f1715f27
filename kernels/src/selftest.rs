//! Kernels that exercise the device layer itself, so that both backends can be held to the same results. Not part of the
//! published PTX.

use crate::device::*;
use crate::quant::common_swiglu::{F32, Source, moderate_silu, silu};
use crate::quant::swiglu_forward_and_per_channel_cast_and_transpose::silu_of_bf16;
use crate::{kernel, unroll};

/// Threads of a block in every kernel here.
pub const THREADS: u32 = 256;

/// Outputs of [`warp_ops`] per thread.
pub const WARP_OPS: u32 = 24;

kernel! {
    op = selftest;
    threads = 256, blocks = 2;
    /// Block-wide inclusive prefix sum and total.
    pub fn scan(x: In<u32>, sum: Out<u32>, total: Out<u32>, n: u32) {
        let mut layout = SharedLayout::new();
        let scratch = layout.array::<u32>(8);
        let i = block_idx_x() * THREADS + thread_idx();
        let v = if i < n { x.get(i) } else { 0 };
        let (inclusive, all) = block_scan_sum(v, scratch);
        if i < n {
            sum.set(i, inclusive);
            total.set(i, all);
        }
    }
}

kernel! {
    op = selftest;
    threads = 256;
    /// Every warp operation on the value of its lane.
    pub fn warp_ops(x: In<u32>, y: Out<u32>) {
        let i = block_idx_x() * THREADS + thread_idx();
        let v = x.get(i);
        let f = f32::from_bits(v);
        let wide = v as u64 * 0x1_0000_0001;
        let (key, index) = warp_arg_max(ordered_key(f), lane_id());
        let out = y.at(i as u64 * WARP_OPS as u64);
        out.set(0, warp_shuffle(v, v & 63));
        out.set(1, warp_shuffle_xor(v, 5));
        out.set(2, warp_shuffle_up(v, 3));
        out.set(3, warp_shuffle_down(v, 7));
        out.set(4, warp_ballot(v & 1 == 1));
        out.set(5, warp_any(v & 0xff == 0) as u32);
        out.set(6, warp_all(v & 0x80 == 0) as u32);
        out.set(7, warp_match_any(v & 3));
        out.set(8, warp_sum_u32(v));
        out.set(9, warp_max_u32(v));
        out.set(10, warp_min_u32(v));
        out.set(11, warp_sum::<32>(f).to_bits());
        out.set(12, warp_max::<8>(f).to_bits());
        out.set(13, warp_min::<16>(f).to_bits());
        out.set(14, warp_max_nonnegative(f.abs()).to_bits());
        out.set(15, warp_scan_sum(v));
        out.set(16, key);
        out.set(17, index);
        out.set(18, (warp_shuffle(wide, lane_id() + 1) >> 16) as u32);
        out.set(19, warp_shuffle(f, 31 - lane_id()).to_bits());
        out.set(20, byte_permute(v, !v, v >> 7));
        out.set(21, warp_reduce::<4, u32>(v, |a, b| a ^ b));
        out.set(22, warp_shuffle_up(v, 40));
        out.set(23, warp_shuffle_down(v, 40));
    }
}

kernel! {
    op = selftest;
    threads = 256;
    /// Block reductions, and shared atomics into 16 bins.
    pub fn block_ops(x: In<f32>, y: Out<f32>, bins: Out<u32>) {
        let mut layout = SharedLayout::new();
        let (sums, maxima, counts) = (layout.array::<f32>(8), layout.array::<f32>(8), layout.array::<u32>(16));
        let i = block_idx_x() * THREADS + thread_idx();
        let v = x.get(i);
        if thread_idx() < 16 {
            counts.set(thread_idx(), 0);
        }
        let out = y.at(i as u64 * 2);
        out.set(0, block_sum(v, sums));
        out.set(1, block_max(v, maxima));
        counts.atomic_add(v.to_bits() >> 8 & 15, 1);
        counts.atomic(AtomicOp::Or, 15, 1 << 20);
        block_sync();
        if thread_idx() < 16 {
            bins.atomic_add(thread_idx(), counts.get(thread_idx()), Scope::Gpu);
        }
    }
}

kernel! {
    op = selftest;
    threads = 256;
    /// Global atomics of every kind, and the last block to finish reads what all others wrote.
    pub fn atomics(x: In<u32>, words: Out<u32>, wide: Out<u64>, floats: Out<f32>, parts: Out<u32>, ticket: Out<u32>, sum: Out<u32>) {
        let mut layout = SharedLayout::new();
        let last = layout.array::<u32>(1);
        let i = block_idx_x() * THREADS + thread_idx();
        let v = x.get(i);
        words.atomic_add(0, v, Scope::Gpu);
        words.atomic(AtomicOp::Min, 1, v, Scope::Gpu);
        words.atomic(AtomicOp::Max, 2, v, Scope::System);
        words.atomic(AtomicOp::And, 3, v, Scope::Gpu);
        words.atomic(AtomicOp::Or, 4, v, Scope::Gpu);
        wide.atomic_add(0, v as u64 * v as u64, Scope::Gpu);
        wide.atomic(AtomicOp::Max, 1, (v as u64) << 20, Scope::Gpu);
        // Small integers, so the sum does not depend on the order.
        floats.atomic_add(0, (v & 15) as f32, Scope::Gpu);
        if words.compare_exchange(5, 0, i + 1, Scope::Gpu) == 0 {
            words.atomic(AtomicOp::Exchange, 6, 1, Scope::Gpu);
        }
        parts.set(i, v ^ 0x5555_5555);
        block_sync();
        if thread_idx() == 0 {
            fence(Scope::Gpu);
            let before = ticket.atomic_acq_rel(AtomicOp::Add, 0, 1, Scope::Gpu);
            last.set(0, (before + 1 == grid_dim_x()) as u32);
        }
        block_sync();
        if last.get(0) == 1 {
            let mut all = 0u32;
            let mut j = thread_idx();
            while j < grid_dim_x() * THREADS {
                all = all.wrapping_add(parts.get(j));
                j += THREADS;
            }
            sum.atomic_add(0, all, Scope::Gpu);
        }
    }
}

kernel! {
    op = selftest;
    threads = 256;
    /// A chain through all blocks: each waits for the number its predecessor releases and passes on the next one.
    pub fn chain(order: Out<u32>, flags: Out<u32>, values: Out<u32>) {
        let mut layout = SharedLayout::new();
        let place = layout.array::<u32>(1);
        if thread_idx() == 0 {
            // The place in the chain is drawn, so that a block only waits for blocks that have started.
            place.set(0, order.atomic_add(0, 1, Scope::Gpu));
        }
        block_sync();
        let me = place.get(0);
        if thread_idx() == 0 {
            let mut value = 1;
            if me > 0 {
                while flags.load_acquire(me - 1, Scope::System) == 0 {
                    spin();
                }
                value = values.get(me - 1).wrapping_mul(3).wrapping_add(1);
            }
            values.set(me, value);
            flags.store_release(me, 1, Scope::System);
        }
    }
}

/// Words each block of [`copies`] moves: four stages of 4 KiB.
pub const COPY_WORDS: u32 = 4096;

kernel! {
    op = selftest;
    threads = 256;
    /// 16 KiB a block through shared memory: two stages by `cp.async`, two by bulk copies with an mbarrier; out by a bulk store.
    pub fn copies(x: In<u32>, y: Out<u32>) {
        let (_, stages, barriers) = copies_shared();
        let base = block_idx_x() as u64 * COPY_WORDS as u64;
        let (from, to, t) = (x.at(base), y.at(base), thread_idx());
        let full = Mbarrier::new(barriers, 0);
        if t == 0 {
            // All threads arrive, so that nobody is two phases ahead of a thread that still waits.
            full.init(THREADS);
        }
        block_sync();
        for stage in 0..2 {
            let at = stage * 1024 + t * 4;
            if stage == 0 {
                stages.copy16_async(at, from, at);
            } else {
                for i in 0..4 {
                    stages.copy4_async(at + i, from, at + i);
                }
            }
            copy_commit();
        }
        for stage in 2..4 {
            if t == 0 {
                full.arrive_expect(4096);
                stages.copy_bulk(stage * 1024, from, stage * 1024, 4096, full);
            } else {
                full.arrive();
            }
            full.wait(stage & 1);
        }
        copy_wait::<1>();
        block_sync();
        let first = stages.load16(((t + 1) & 255) * 4);
        copy_wait::<0>();
        block_sync();
        let second = stages.load16(1024 + ((t + 2) & 255) * 4);
        block_sync();
        stages.store16(t * 4, second);
        stages.store16(1024 + t * 4, first);
        fence_async_copy();
        block_sync();
        if t == 0 {
            stages.store_bulk(0, to, 0, 4 * COPY_WORDS);
            bulk_commit();
            bulk_wait_read::<0>();
        }
    }
}

/// Shared memory of [`copies`].
pub const fn copies_shared() -> (SharedLayout, Shared<u32>, Shared<u64>) {
    let mut layout = SharedLayout::new();
    let stages = layout.aligned::<u32>(COPY_WORDS, 128);
    let barriers = layout.array::<u64>(1);
    (layout, stages, barriers)
}

kernel! {
    op = selftest;
    threads = 32;
    /// One tile a block: c = c + a b, bf16 `[16, 16] x [16, 8]` and tf32 `[16, 8] x [8, 8]`, all row-major.
    pub fn mma(a: In<u16>, b: In<u16>, c: Out<f32>, ta: In<f32>, tb: In<f32>, tc: Out<f32>) {
        let (g, t) = (lane_id() / 4, lane_id() % 4);
        let block = block_idx_x() as u64;
        let (a, b, c) = (a.at(block * 256), b.at(block * 128), c.at(block * 128));
        let (ta, tb, tc) = (ta.at(block * 128), tb.at(block * 64), tc.at(block * 128));
        let pair_a = |row: u32, col: u32| a.get(row * 16 + col) as u32 | (a.get(row * 16 + col + 1) as u32) << 16;
        let pair_b = |row: u32, col: u32| b.get(row * 8 + col) as u32 | (b.get((row + 1) * 8 + col) as u32) << 16;
        let sums = |c: Out<f32>| [c.get(g * 8 + 2 * t), c.get(g * 8 + 2 * t + 1), c.get((g + 8) * 8 + 2 * t), c.get((g + 8) * 8 + 2 * t + 1)];
        let put = |c: Out<f32>, v: [f32; 4]| {
            c.set(g * 8 + 2 * t, v[0]);
            c.set(g * 8 + 2 * t + 1, v[1]);
            c.set((g + 8) * 8 + 2 * t, v[2]);
            c.set((g + 8) * 8 + 2 * t + 1, v[3]);
        };
        let fa = [pair_a(g, 2 * t), pair_a(g + 8, 2 * t), pair_a(g, 2 * t + 8), pair_a(g + 8, 2 * t + 8)];
        put(c, warp_mma_bf16(fa, [pair_b(2 * t, g), pair_b(2 * t + 8, g)], sums(c)));
        let fta = [ta.get(g * 8 + t), ta.get((g + 8) * 8 + t), ta.get(g * 8 + t + 4), ta.get((g + 8) * 8 + t + 4)];
        put(tc, warp_mma_tf32(fta, [tb.get(t * 8 + g), tb.get((t + 4) * 8 + g)], sums(tc)));
    }
}

/// Results of [`conversions`] per input.
pub const CONVERSIONS: u32 = 10;

/// Every conversion from f32 of one value, by instruction where there is one.
#[inline(always)]
fn convert(v: f32) -> [u32; CONVERSIONS as usize] {
    [
        f32x2_to_bf16x2(v, 1.0) & 0xffff,
        f32x2_to_bf16x2(1.0, v) >> 16,
        f32x2_to_f16x2(v, -2.0) & 0xffff,
        f32_to_f16_rz(v),
        f32x2_to_e4m3x2(v, 3.0) & 0xff,
        f32x2_to_e4m3x2(3.0, v) >> 8,
        f32x2_to_e5m2x2(v, 3.0) & 0xff,
        same_nibbles(f32x8_to_e2m1x8([v; 8])),
        same_e5m6(f32x8_to_e5m6x8([v; 8])),
        f16x2_to_f32(f32x2_to_f16x2(v, 0.0))[0].to_bits(),
    ]
}

/// The code that all eight nibbles of a word hold; all ones if they differ.
#[inline(always)]
fn same_nibbles(word: u32) -> u32 {
    let code = word & 15;
    if word == code * 0x1111_1111 { code } else { u32::MAX }
}

/// The code that all eight places of three words hold; all ones if they differ.
#[inline(always)]
fn same_e5m6(words: [u32; 3]) -> u32 {
    let code = words[2] & 0xfff;
    if words == num::pack_e5m6([code as u16; 8]) { code } else { u32::MAX }
}

/// The same by the integer code.
#[inline(always)]
fn convert_integer(v: f32) -> [u32; CONVERSIONS as usize] {
    let bf16 = num::f32_to_bf16(v) as u32;
    let e4m3 = num::f32_to_e4m3(v) as u32;
    [
        bf16,
        bf16,
        num::f32_to_f16(v) as u32,
        num::f32_to_f16_rz(v) as u32,
        e4m3,
        e4m3,
        num::f32_to_e5m2(v) as u32,
        num::f32_to_e2m1(v) as u32,
        num::f32_to_e5m6(v) as u32,
        num::f16_to_f32(num::f32_to_f16(v)).to_bits(),
    ]
}

kernel! {
    op = selftest;
    threads = 256;
    /// Conversions of given values, instruction results first, integer results behind them.
    pub fn conversions(x: In<f32>, y: Out<u32>, n: u32) {
        let i = block_idx_x() * THREADS + thread_idx();
        if i < n {
            let out = y.at(i as u64 * 2 * CONVERSIONS as u64);
            let (a, b) = (convert(x.get(i)), convert_integer(x.get(i)));
            for j in 0..CONVERSIONS {
                out.set(j, a[j as usize]);
                out.set(CONVERSIONS + j, b[j as usize]);
            }
        }
    }
}

kernel! {
    op = selftest;
    threads = 256;
    /// All f32 bit patterns `start + stride * i`, `i < n`: counts, per conversion, where instruction and integer code differ, and keeps
    /// the smallest such pattern.
    pub fn conversion_sweep(start: u32, stride: u32, n: u64, differ: Out<u32>, first: Out<u32>) {
        let mut i = block_idx_x() as u64 * THREADS as u64 + thread_idx() as u64;
        while i < n {
            let bits = start.wrapping_add((i as u32).wrapping_mul(stride));
            let v = f32::from_bits(bits);
            let (a, b) = (convert(v), convert_integer(v));
            for j in 0..CONVERSIONS {
                if a[j as usize] != b[j as usize] {
                    differ.atomic_add(j, 1, Scope::Gpu);
                    first.atomic(AtomicOp::Min, j, bits, Scope::Gpu);
                }
            }
            i += grid_dim_x() as u64 * THREADS as u64;
        }
    }
}

/// Counts of `stochastic_sweep`: e4m3, e2m1 and bf16, first where kernels' conversion and integer code differ, then where the code
/// is no neighbour of the value.
pub const STOCHASTIC: u32 = 6;

/// Whether a magnitude's `code` is one of the two around it (the same one twice for a value of the format), the largest finite one
/// above that. `nearest` is the code of the nearest value, and `exact` what that stands for.
#[inline(always)]
fn is_neighbour(magnitude: f32, code: u32, nearest: u32, exact: f32, largest: u32) -> bool {
    let below = nearest - (exact > magnitude) as u32;
    let above = nearest + (exact < magnitude) as u32;
    code == below.min(largest) || code == above.min(largest)
}

kernel! {
    op = selftest;
    threads = 256;
    /// All f32 bit patterns `start + stride * i`, `i < n`, rounded stochastically by random words that are a hash of pattern and `seed`;
    /// counts as [`STOCHASTIC`] says, and the smallest pattern of each.
    pub fn stochastic_sweep(start: u32, stride: u32, n: u64, seed: u32, differ: Out<u32>, first: Out<u32>) {
        let mut i = block_idx_x() as u64 * THREADS as u64 + thread_idx() as u64;
        while i < n {
            let bits = start.wrapping_add((i as u32).wrapping_mul(stride));
            let v = f32::from_bits(bits);
            let random = num::quad_hash([bits, seed, !bits, bits.rotate_left(16)], seed);
            // Both signs, so that places that are mixed up show.
            let (e4m3, e2m1) = (f32x4_to_e4m3x4_sr([v, -v, v, -v], random[0]), f32x8_to_e2m1x8_sr([v, v, v, v, -v, v, -v, v], random));
            let bf16 = f32x2_to_bf16x2_sr(v, -v, random[1]);
            let mut wrong = [false; STOCHASTIC as usize];
            let (nan, a) = (v.is_nan(), v.abs());
            let (near_e4m3, near_e2m1, near_bf16) =
                (num::f32_to_e4m3(a) as u32, num::f32_to_e2m1(a) as u32, num::f32_to_bf16(a) as u32);
            unroll!(j in 4 {
                let value = if j.is_multiple_of(2) { v } else { -v };
                let code = (e4m3 >> (8 * j)) & 0xff;
                wrong[0] |= code != num::f32_to_e4m3_sr(value, num::sr_bits_x4(random[0])[j % 4]) as u32;
                let sign = value.to_bits() >> 31;
                let near = is_neighbour(a, code & 0x7f, near_e4m3, num::e4m3_to_f32(near_e4m3 as u8), 0x7e) && code >> 7 == sign;
                wrong[3] |= if nan { code != 0x7f } else { !near };
            });
            unroll!(j in 8 {
                let value = if j == 4 || j == 6 { -v } else { v };
                let code = (e2m1 >> (4 * j)) & 15;
                wrong[1] |= code != num::f32_to_e2m1_sr(value, num::sr_bits_x4(random[j / 4 % 2])[j % 4]) as u32;
                let sign = value.to_bits() >> 31;
                let near = is_neighbour(a, code & 7, near_e2m1, num::e2m1_to_f32(near_e2m1 as u8), 7) && code >> 3 == sign;
                wrong[4] |= if nan { code != 7 } else { !near };
            });
            unroll!(j in 2 {
                let value = if j == 0 { v } else { -v };
                let code = (bf16 >> (16 * j)) & 0xffff;
                wrong[2] |= code != num::f32_to_bf16_sr(value, num::sr_bits_x2(random[1])[j % 2]) as u32;
                let sign = value.to_bits() >> 31;
                let exact = num::bf16_to_f32(near_bf16 as u16);
                let near = is_neighbour(a, code & 0x7fff, near_bf16, exact, 0x7f7f) && code >> 15 == sign;
                wrong[5] |= if nan { code != 0x7fff } else { !near };
            });
            unroll!(j in 6 {
                if wrong[j % 6] {
                    differ.atomic_add(j as u32, 1, Scope::Gpu);
                    first.atomic(AtomicOp::Min, j as u32, bits, Scope::Gpu);
                }
            });
            i += grid_dim_x() as u64 * THREADS as u64;
        }
    }
}

/// Results of `packed` for one pattern.
pub const PACKED: u32 = 10;

kernel! {
    op = selftest;
    threads = 256;
    /// Packed arithmetic on the 16-bit pattern `stride * i`, its negative in the upper half, and a second word made of it.
    pub fn packed(scale: f32, stride: u32, y: Out<u32>) {
        let i = block_idx_x() * THREADS + thread_idx();
        let (a, b) = packed_operands(i * stride);
        let out = y.at(i as u64 * PACKED as u64);
        out.set(0, bf16x8_to_e2m1x8([a, a.rotate_left(16), b, a], scale));
        out.set(1, bf16x2_mul(a, b));
        // Signs of these mean nothing.
        out.set(2, bf16x2_max_abs(a, b) & 0x7fff_7fff);
        out.set(3, f16x2_max_abs(a, b) & 0x7fff_7fff);
        out.set(4, u16x2_max(a, b));
        out.set(5, select_bits(b, a, !a));
        out.set(6, bf16x2_add(a, b));
        out.set(7, bf16x2_greater(a, b));
        out.set(8, bf16x2_min_nan(a, b));
        out.set(9, bf16x2_max_nan(a, b));
    }
}

/// Words for the 16-bit pattern `i`. The second one holds magnitudes from 0.5 to 1 as bf16.
pub fn packed_operands(i: u32) -> (u32, u32) {
    (i | (i ^ 0x8000) << 16, (i.wrapping_mul(0x9E37_79B1) & 0x807f_807f) | 0x3f00_3f00)
}

/// Results of [`decode`] for one word.
pub const DECODED: u32 = 24;

kernel! {
    op = selftest;
    threads = 256;
    /// Decoding of all codes: e4m3 pairs, e5m2 pairs, eight e2m1, bf16 and f16 pairs, of the word `i`; eight e5m6, which are the low
    /// 12 bits of `i` and of its complement in turn.
    pub fn decode(y: Out<f32>) {
        let i = block_idx_x() * THREADS + thread_idx();
        let out = y.at(i as u64 * DECODED as u64);
        let (code, other) = (i as u16 & 0xfff, !i as u16 & 0xfff);
        let e5m6 = e5m6x8_to_f32(num::pack_e5m6([code, other, code, other, code, other, code, other]));
        let (e4m3, e5m2) = (e4m3x2_to_f32(i), e5m2x2_to_f32(i));
        let (f16, bf16) = (f16x2_to_f32(i | i << 16), bf16x2_to_f32(i | i << 16));
        let e2m1 = e2m1x8_to_f32(i | i << 16);
        for j in 0..2 {
            out.set(j, e4m3[j as usize]);
            out.set(2 + j, e5m2[j as usize]);
            out.set(4 + j, f16[j as usize]);
            out.set(6 + j, bf16[j as usize]);
        }
        for j in 0..8 {
            out.set(8 + j, e2m1[j as usize]);
            out.set(16 + j, e5m6[j as usize]);
        }
    }
}

/// Results of [`math`] per input.
pub const MATH: u32 = 16;

kernel! {
    op = selftest;
    threads = 256;
    /// Arithmetic of the device layer on given values.
    pub fn math(x: In<f32>, y: Out<f32>, n: u32) {
        let i = block_idx_x() * THREADS + thread_idx();
        if i < n {
            let v = x.get(i);
            let out = y.at(i as u64 * MATH as u64);
            out.set(0, fast_exp2(v));
            out.set(1, fast_log2(v));
            out.set(2, fast_log(v));
            out.set(3, fast_rsqrt(v));
            out.set(4, fast_rcp(v));
            out.set(5, exp(v));
            out.set(6, sqrt(v));
            out.set(7, fma(v, v, -1.0));
            out.set(8, 1.0 / v);
            out.set(9, max_total(v, 0.5));
            out.set(10, min_total(v, 0.5));
            out.set(11, max_nan(v, 0.5));
            out.set(12, min_nan(v, 0.5));
            out.set(13, one_plus_exp(v));
            out.set(14, 1.0 + exp(v));
            out.set(15, max_abs(v, -0.5).abs());
        }
    }
}

/// Functions of [`apply`] that the two backends round differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Function {
    /// [`exp`].
    Exp,
    /// [`fast_exp2`].
    Exp2,
    /// [`fast_rcp`].
    Rcp,
    /// [`fast_rsqrt`].
    Rsqrt,
    /// [`reciprocal`].
    Reciprocal,
    /// [`exp_nonpositive`].
    ExpNonpositive,
    /// [`sqrt_normal`].
    SqrtNormal,
    /// [`divide_normal`] by a number that is larger by 0.375.
    DivideNormal,
}

kernel! {
    op = selftest;
    threads = 256;
    /// One [`Function`] of every element, for references that must have the bits of the device.
    pub fn apply(x: In<f32>, y: Out<f32>, n: u32, function: u32) {
        let mut i = block_idx_x() * THREADS + thread_idx();
        while i < n {
            let v = x.get(i);
            let result = if function == Function::Exp as u32 {
                exp(v)
            } else if function == Function::Exp2 as u32 {
                fast_exp2(v)
            } else if function == Function::Rcp as u32 {
                fast_rcp(v)
            } else if function == Function::Rsqrt as u32 {
                fast_rsqrt(v)
            } else if function == Function::Reciprocal as u32 {
                reciprocal(v)
            } else if function == Function::ExpNonpositive as u32 {
                exp_nonpositive(v)
            } else if function == Function::SqrtNormal as u32 {
                sqrt_normal(v)
            } else {
                divide_normal(v, v + 0.375)
            };
            y.set(i, result);
            i += grid_dim_x() * THREADS;
        }
    }
}

kernel! {
    op = selftest;
    threads = 256;
    /// `silu` of the bf16 gate of each thread's number, by the shortest division.
    pub fn short_silu(y: Out<f32>) {
        let i = block_idx_x() * THREADS + thread_idx();
        y.set(i, silu_of_bf16(f32::from_bits(i << 16)));
    }
}

kernel! {
    op = selftest;
    threads = 256;
    /// All gates with the bit patterns `start + stride * i`, `i < n`: counts where the activation of SwiGLU is not the IEEE quotient,
    /// and keeps the smallest such pattern. Every NaN is as good as another.
    pub fn silu_sweep(start: u32, stride: u32, n: u64, differ: Out<u32>, first: Out<u32>) {
        let mut i = block_idx_x() as u64 * THREADS as u64 + thread_idx() as u64;
        while i < n {
            let bits = start.wrapping_add((i as u32).wrapping_mul(stride));
            let gate = f32::from_bits(bits);
            // Moderate gates the short way and the long way, as an extreme neighbour makes it.
            let moderate = !F32::is_extreme([[[bits; 4]; 2]]);
            let expected = gate / (1.0 + exp(-gate));
            let differs = |got: f32| got.to_bits() != expected.to_bits() && !(got.is_nan() && expected.is_nan());
            let short = moderate && bits & 0xFFFF == 0 && differs(moderate_silu::<true>(gate));
            if short || moderate && differs(moderate_silu::<false>(gate)) || differs(silu(gate)) {
                differ.atomic_add(0, 1, Scope::Gpu);
                first.atomic(AtomicOp::Min, 0, bits, Scope::Gpu);
            }
            i += grid_dim_x() as u64 * THREADS as u64;
        }
    }
}

kernel! {
    op = selftest;
    threads = 256;
    /// Every width of load and store, plain and streaming, and the index functions.
    pub fn widths(x: In<u8>, y: Out<u8>, indices: Out<u32>) {
        let block = block_idx_x() + grid_dim_x() * (block_idx_y() + grid_dim_y() * block_idx_z());
        let i = block * THREADS + thread_idx();
        let (from, to) = (x.at(i as u64 * 64), y.at(i as u64 * 64));
        from.prefetch(0);
        to.store16(0, from.load16(0));
        to.store16_stream(16, from.load16_stream(16));
        to.store8(32, from.load8(32));
        to.store8_stream(40, from.load8_stream(40));
        to.store4(48, from.load4(48));
        to.store4_stream(52, from.load4_stream(52));
        to.cast::<u16>().set(28, from.cast::<u16>().get(28));
        to.set(58, from.get(58));
        to.set_stream(59, from.get(59));
        to.cast::<f32>().set(15, from.cast::<f32>().get(15));
        let out = indices.at(i as u64 * 4);
        out.set(0, thread_idx() | block_dim() << 16);
        out.set(1, block_idx_x() | block_idx_y() << 8 | block_idx_z() << 16);
        out.set(2, lane_id() | warp_id() << 8);
        out.set(3, from.is_aligned(64) as u32);
    }
}

kernel! {
    op = selftest;
    threads = 256;
    /// A sum over all blocks between two barriers of a cooperative launch, `rounds` times.
    pub fn grid(words: Out<u32>, sums: Out<u32>, barrier: Out<u32>, rounds: u32) {
        let (me, blocks) = (block_idx_x(), grid_dim_x());
        let mut round = 0;
        while round < rounds {
            if thread_idx() == 0 {
                words.set(me, me * (round + 1) + 1);
            }
            grid_sync(barrier);
            if thread_idx() == 0 {
                let mut sum = 0;
                for j in 0..blocks {
                    sum += words.get(j);
                }
                sums.set(me * rounds + round, sum);
            }
            grid_sync(barrier);
            round += 1;
        }
    }
}

kernel! {
    op = selftest;
    threads = 256;
    /// More than 48 KiB of shared memory: every word of `words` words is written and read by another thread.
    pub fn large_shared(y: Out<u32>, words: u32) {
        let mut layout = SharedLayout::new();
        let array = layout.array::<u32>(words);
        let mut i = thread_idx();
        while i < words {
            array.set(i, i * 7 + block_idx_x());
            i += THREADS;
        }
        block_sync();
        let mut i = thread_idx();
        while i < words {
            y.at(block_idx_x() as u64 * words as u64).set(i, array.get(words - 1 - i));
            i += THREADS;
        }
    }
}
