//! Number formats: conversions of two, four or eight values at a time, as instructions where the architecture has them and as
//! the integer code of [`num`] elsewhere. Both give the same bits; a test runs all inputs that matter through both.

use super::{backend, num};

/// The low and the high bf16 of a word as f32 (exact).
#[inline(always)]
pub fn bf16x2_to_f32(v: u32) -> [f32; 2] {
    [f32::from_bits(v << 16), f32::from_bits(v & 0xffff_0000)]
}

/// Two f32 to bf16, round to nearest even; `lo` in the low half.
#[inline(always)]
pub fn f32x2_to_bf16x2(lo: f32, hi: f32) -> u32 {
    backend::cvt_bf16x2(lo, hi)
}

/// Two f32 to f16, round to nearest even; overflow gives infinity.
#[inline(always)]
pub fn f32x2_to_f16x2(lo: f32, hi: f32) -> u32 {
    backend::cvt_f16x2(lo, hi)
}

/// f32 to f16, round toward zero.
#[inline(always)]
pub fn f32_to_f16_rz(v: f32) -> u32 {
    backend::cvt_f16_rz(v)
}

/// Two f32 to f16, round toward zero; finite values stay finite.
#[inline(always)]
pub fn f32x2_to_f16x2_rz(lo: f32, hi: f32) -> u32 {
    backend::cvt_f16x2_rz(lo, hi)
}

/// The low and the high f16 of a word as f32 (exact).
#[inline(always)]
pub fn f16x2_to_f32(v: u32) -> [f32; 2] {
    backend::cvt_f32_f16x2(v)
}

/// Two f32 to e4m3 in the low 16 bits, round to nearest even, saturating at 448; NaN gives `0x7F`.
#[inline(always)]
pub fn f32x2_to_e4m3x2(lo: f32, hi: f32) -> u32 {
    backend::cvt_e4m3x2(lo, hi)
}

/// Four f32 to e4m3, first in the low byte. Three instructions: ptxas lets the second conversion put the first one's result into its upper
/// half, which it does not see in a shift and an or.
#[inline(always)]
pub fn f32x4_to_e4m3x4(v: [f32; 4]) -> u32 {
    backend::join_halves(f32x2_to_e4m3x2(v[0], v[1]), f32x2_to_e4m3x2(v[2], v[3]))
}

/// Two e4m3 (low 16 bits) to two f16 (exact).
#[inline(always)]
pub fn e4m3x2_to_f16x2(v: u32) -> u32 {
    backend::cvt_f16x2_e4m3x2(v)
}

/// Two e4m3 (low 16 bits) to f32 (exact).
#[inline(always)]
pub fn e4m3x2_to_f32(v: u32) -> [f32; 2] {
    f16x2_to_f32(e4m3x2_to_f16x2(v))
}

/// Four e4m3 to f32 (exact), low byte first.
#[inline(always)]
pub fn e4m3x4_to_f32(v: u32) -> [f32; 4] {
    let (a, b) = (e4m3x2_to_f32(v & 0xffff), e4m3x2_to_f32(v >> 16));
    [a[0], a[1], b[0], b[1]]
}

/// Eight e2m1 to bytes: `table` has the bytes of the eight magnitudes, below 128 each; the sign becomes the top bit. Two look-ups
/// of four codes, and what it takes to move the signs.
#[inline(always)]
pub fn e2m1x8_map(codes: u32, table: [u32; 2]) -> [u32; 2] {
    let picked = codes & 0x7777_7777;
    let (low, high) = (byte_permute(table[0], table[1], picked), byte_permute(table[0], table[1], picked >> 16));
    // The sign of an odd code is the top bit of its byte, that of an even one gets there by a shift.
    let (even, odd) = (codes << 4, codes);
    let signs = [byte_permute(even, odd, 0x5140), byte_permute(even, odd, 0x7362)];
    [low | (signs[0] & 0x8080_8080), high | (signs[1] & 0x8080_8080)]
}

/// Two f32 to e5m2 in the low 16 bits, round to nearest even, saturating at 57344; NaN gives `0x7F`.
#[inline(always)]
pub fn f32x2_to_e5m2x2(lo: f32, hi: f32) -> u32 {
    backend::cvt_e5m2x2(lo, hi)
}

/// Two e5m2 (low 16 bits) to f32 (exact): the upper half of an f16.
#[inline(always)]
pub fn e5m2x2_to_f32(v: u32) -> [f32; 2] {
    f16x2_to_f32((v & 0xff) << 8 | (v & 0xff00) << 16)
}

/// Eight f32 to e2m1, round to nearest even, saturating at 6, first in the low nibble. The sign is kept, for zeros too; NaN
/// gives +6, as the instruction of sm_100 does.
#[inline(always)]
pub fn f32x8_to_e2m1x8(v: [f32; 8]) -> u32 {
    if backend::PACKED_E2M1 { f32x8_to_e2m1x8_packed(v) } else { num::pack_e2m1(v.map(num::f32_to_e2m1)) }
}

/// [`f32x8_to_e2m1x8`] by f16 arithmetic on two values at a time: five instructions a value, of which three and a half compete
/// for the integer pipe.
///
/// 1. A factor 2^-14 moves 1, the smallest normal e2m1, to the smallest normal f16: the subnormals of both formats then coincide,
///    and the spacing of e2m1 is `2^9` times that of f16 everywhere.
/// 2. Rounding to f16 and then to e2m1 could turn a value next to a halfway point into a tie. So a factor 513/512 goes in first.
///    It moves every halfway point `(2k+1)/2` of e2m1 (mantissas 1, 1.25, 1.5 and 1.75) to one of f16, whose even neighbour is on
///    the side that ties of e2m1 go to: 256.5 steps of f16 for 0.25 (down, to 256), 769.5 for 0.75 (up, to 770), 1282.5 for
///    1.25 (down), 1795.5 for 1.75 (up), and the same mantissas in the binades above. The rounding to f16 decides everything.
/// 3. `M` is a power of two whose unit in the last place is the spacing of e2m1 in this binade, so the sum `h * 511/512 + M`
///    rounds to e2m1 (511/512 takes the factor back; no tie is left). Its low bits count steps, its exponent the binade;
///    `M` has 4 extra units so that `sum + (sum >> 9)` is the code in the low three bits, with the sign in bit 6.
#[doc(hidden)]
#[inline(always)]
pub fn f32x8_to_e2m1x8_packed(v: [f32; 8]) -> u32 {
    const SCALE: f32 = 513.0 / 512.0 / 16384.0;
    // 2^-14 and 6 * 2^-14; all exponent bits and the sign; 2^9 with 4 units; 511/512.
    const ONE: u32 = 0x0400_0400;
    const SIX: u32 = 0x0E00_0E00;
    const BINADE: u32 = 0xFC00_FC00;
    const MAGIC: u32 = 0x6004_6004;
    const BACK: u32 = 0x3BFC_3BFC;
    let pair = |lo: f32, hi: f32| {
        // NaN loses against 6.
        let h = backend::min_abs_f16x2(backend::cvt_f16x2(lo * SCALE, hi * SCALE), SIX);
        let m = backend::mul_f16x2(backend::max_abs_f16x2(h & BINADE, ONE), MAGIC);
        let sum = backend::fma_f16x2(h, BACK, m);
        sum.wrapping_add(sum >> 9)
    };
    // The low bytes of each half: sign in bit 6, code in bits 0 to 2, in between whatever.
    let even = backend::byte_permute(pair(v[0], v[2]), pair(v[4], v[6]), 0x6420);
    let odd = backend::byte_permute(pair(v[1], v[3]), pair(v[5], v[7]), 0x6420);
    // Where the mask has ones `a`, else `b`: one instruction.
    let select = |mask: u32, a: u32, b: u32| (a & mask) | (b & !mask);
    let low = select(0x0707_0707, even, even >> 3);
    let high = select(0x7070_7070, odd << 4, odd << 1);
    select(0x0F0F_0F0F, low, high)
}

/// Two f32 to bf16, rounded stochastically and saturating; `lo` in the low half. The low half of `random` serves `lo`, the high half
/// `hi`. NaN gives `0x7FFF`.
#[inline(always)]
pub fn f32x2_to_bf16x2_sr(lo: f32, hi: f32, random: u32) -> u32 {
    let [a, b] = num::sr_bits_x2(random);
    num::f32_to_bf16_sr(lo, a) as u32 | (num::f32_to_bf16_sr(hi, b) as u32) << 16
}

/// Four f32 to e4m3, rounded stochastically and saturating at 448, first in the low byte. The low half of `random` serves `v[0]` and,
/// bit-reversed, `v[1]`, the high half `v[2]` and, reversed, `v[3]`; so the x4 instruction of sm_100 is reported to do it. NaN
/// gives `0x7F`.
#[inline(always)]
pub fn f32x4_to_e4m3x4_sr(v: [f32; 4], random: u32) -> u32 {
    f32x4_to_e4m3x4(stochastic_neighbours::<3, 121, 135>(v, random))
}

/// Eight f32 to e2m1, rounded stochastically and saturating at 6, first in the low nibble. The first random word serves the first
/// four values, in the way of [`f32x4_to_e4m3x4_sr`], the second the others. NaN gives +6.
#[inline(always)]
pub fn f32x8_to_e2m1x8_sr(v: [f32; 8], random: [u32; 2]) -> u32 {
    let [a, b, c, d] = stochastic_neighbours::<1, 127, 129>([v[0], v[1], v[2], v[3]], random[0]);
    let [e, f, g, h] = stochastic_neighbours::<1, 127, 129>([v[4], v[5], v[6], v[7]], random[1]);
    f32x8_to_e2m1x8([a, b, c, d, e, f, g, h])
}

/// Four values rounded stochastically to a format of `MAN` mantissa bits whose binades have the biased f32 exponents `EMIN` (the
/// smallest, which subnormals share) to `EMAX`: the ordinary conversion of the results is exact, or saturates.
#[inline(always)]
fn stochastic_neighbours<const MAN: u32, const EMIN: u32, const EMAX: u32>(v: [f32; 4], random: u32) -> [f32; 4] {
    // Reversed as a whole, the halves change places.
    let reversed = random.reverse_bits();
    // 2^23 plus a half, as f32: the half below an exponent.
    let (low, high) = (|word| byte_permute(word, 0x4B00_0000, 0x7610), |word| byte_permute(word, 0x4B00_0000, 0x7632));
    let random = [low(random), high(reversed), high(random), low(reversed)].map(f32::from_bits);
    core::array::from_fn(|i| stochastic_neighbour::<MAN, EMIN, EMAX>(v[i], random[i]))
}

/// One value, with `random` of 2^23 to 2^23 + 65535.
///
/// With `p` the power of two at or below `v` (that of a binade of the format) and `s = p / 2^MAN` the format's spacing there, the
/// sum `|v| + random * s / 2^16` is `|v|` plus the random part of a spacing, on top of `2^7 s`. That puts it into one binade,
/// where 16 bits of an f32 lie below `s`: the sum, rounded down, has the 16 bits that meet a random bit, and cutting them off
/// leaves the neighbour.
#[inline(always)]
fn stochastic_neighbour<const MAN: u32, const EMIN: u32, const EMAX: u32>(v: f32, random: f32) -> f32 {
    let power = |e: i32| f32::from_bits(((127 + e) as u32) << 23);
    let p = f32::from_bits((v.to_bits() & 0x7f80_0000).max(EMIN << 23).min(EMAX << 23));
    let sum = backend::fma_toward_minus_inf(random, p * power(-(MAN as i32) - 16), v.abs());
    let kept = f32::from_bits(sum.to_bits() & 0xffff_0000);
    let magnitude = backend::fma(p, -power(7 - MAN as i32), kept);
    f32::from_bits(select_bits(0x8000_0000, v.to_bits(), magnitude.to_bits()))
}

/// The larger magnitude of two pairs of bf16, per half; NaN loses against a number. The sign bits of the result mean nothing.
#[inline(always)]
pub fn bf16x2_max_abs(a: u32, b: u32) -> u32 {
    backend::max_abs_bf16x2(a, b)
}

/// The larger magnitude of two pairs of f16, per half; NaN loses against a number. The sign bits of the result mean nothing.
#[inline(always)]
pub fn f16x2_max_abs(a: u32, b: u32) -> u32 {
    backend::max_abs_f16x2(a, b)
}

/// The larger of two pairs of unsigned 16-bit numbers.
#[inline(always)]
pub fn u16x2_max(a: u32, b: u32) -> u32 {
    backend::max_u16x2(a, b)
}

/// Two products of bf16, rounded to nearest even.
#[inline(always)]
pub fn bf16x2_mul(a: u32, b: u32) -> u32 {
    // Adding -0.0 changes no product, not even the sign of a zero.
    backend::fma_bf16x2(a, b, 0x8000_8000)
}

/// The smaller of two pairs of bf16; NaN if there is one.
#[inline(always)]
pub fn bf16x2_min_nan(a: u32, b: u32) -> u32 {
    backend::min_nan_bf16x2(a, b)
}

/// The larger of two pairs of bf16; NaN if there is one.
#[inline(always)]
pub fn bf16x2_max_nan(a: u32, b: u32) -> u32 {
    backend::max_nan_bf16x2(a, b)
}

/// 1.0 in each half where `a > b`, else 0.0, as bf16.
#[inline(always)]
pub fn bf16x2_greater(a: u32, b: u32) -> u32 {
    backend::greater_bf16x2(a, b)
}

/// Two sums of bf16, rounded to nearest even.
#[inline(always)]
pub fn bf16x2_add(a: u32, b: u32) -> u32 {
    backend::fma_bf16x2(a, 0x3f80_3f80, b)
}

/// Eight bf16 times the power of two `scale` to e2m1, round to nearest even, first in the low nibble. No product may exceed 6 in
/// magnitude; the sign is kept, for zeros too, and NaN gives 6 with its sign.
///
/// The code of a magnitude `a` is the integer nearest to `2a` below 2, `a + 2` below 4 and `a / 2 + 4` above, ties to even: the
/// lowest of three lines. Each is one bf16 addition to 128, whose unit in the last place is 1, so that the adder rounds and
/// the code is in the low bits; rounding does not change which line is the lowest.
#[inline(always)]
pub fn bf16x8_to_e2m1x8(x: [u32; 4], scale: f32) -> u32 {
    let both = |v: f32| byte_permute(v.to_bits(), 0, 0x3232);
    let (half, one, two) = (both(scale * 0.5), both(scale), both(scale * 2.0));
    let nibbles = x.map(|w| {
        let a = w & 0x7fff_7fff;
        let low = backend::min_bf16x2(backend::fma_bf16x2(a, two, 0x4300_4300), backend::fma_bf16x2(a, one, 0x4302_4302));
        let code = backend::min_bf16x2(low, backend::fma_bf16x2(a, half, 0x4304_4304));
        // Code and sign in the low nibble of each half; the other bits are cut off below.
        select_bits(0x0007_0007, code, w >> 12)
    });
    let (front, back) = (byte_permute(nibbles[0], nibbles[1], 0x6240), byte_permute(nibbles[2], nibbles[3], 0x6240));
    let (even, odd) = (byte_permute(front, back, 0x5410), byte_permute(front, back, 0x7632));
    select_bits(0x0f0f_0f0f, even, odd << 4)
}

/// Eight e2m1 to f32 (exact), low nibble first.
#[inline(always)]
pub fn e2m1x8_to_f32(v: u32) -> [f32; 8] {
    // As f16 the eight magnitudes have a low byte of 0, so the high bytes are a table that fits one look-up.
    const LOW: u32 = 0x3E3C_3800; // 1.5, 1, 0.5, 0
    const HIGH: u32 = 0x4644_4240; // 6, 4, 3, 2
    let magnitudes = v & 0x7777_7777;
    // The signs of odd values top the bytes of `v`; shifted, the signs of even ones do.
    let shifted = v << 4;
    let quad = |magnitudes: u32, order: u32| {
        let signs = byte_permute(shifted, v, order) & 0x8080_8080;
        let codes = byte_permute(LOW, HIGH, magnitudes) | signs;
        let (a, b) = (byte_permute(codes, 0, 0x1404), byte_permute(codes, 0, 0x3424));
        let (a, b) = (f16x2_to_f32(a), f16x2_to_f32(b));
        [a[0], a[1], b[0], b[1]]
    };
    let (a, b) = (quad(magnitudes, 0x5140), quad(magnitudes >> 16, 0x7362));
    [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]]
}

/// Eight f32 to e5m6, packed in three words, first in the highest bits of the first: [`num::f32_to_e5m6`] of each, with its
/// rounding below 2^-14; NaN gives `0x7FF`, infinity `0x7C0` with its sign.
///
/// A code is the upper 12 bits of the f16 that truncates the value, plus one where the 17 bits behind them, taken from the f32, say
/// so. Code and those 17 bits are joined to one number, which an addition rounds to nearest even; the codes are then
/// cut out of the sums on their way to the words.
#[inline(always)]
pub fn f32x8_to_e5m6x8(v: [f32; 8]) -> [u32; 3] {
    let joined = |v: f32, code: u32| {
        // The low bits of a NaN would carry into the sign; those of infinity, which the minimum makes of it, are zeros.
        let low = backend::min(v, f32::INFINITY).to_bits();
        // What stands above bit 28 is cut off below.
        let joined = select_bits(0x1_FFFF, low, code);
        joined.wrapping_add((joined >> 17) & 1).wrapping_add(0xFFFF)
    };
    let pair = |lo: f32, hi: f32| {
        let h = f32x2_to_f16x2_rz(lo, hi);
        [joined(lo, h << 13), joined(hi, h >> 3)]
    };
    let ([a, b], [c, d]) = (pair(v[0], v[1]), pair(v[2], v[3]));
    let ([e, f], [g, h]) = (pair(v[4], v[5]), pair(v[6], v[7]));
    [
        select_bits(0xFFF0_0000, a << 3, select_bits(0xFFFF_FF00, b >> 9, c >> 21)),
        select_bits(0xF000_0000, c << 11, select_bits(0xFFFF_0000, d >> 1, select_bits(0xFFFF_FFF0, e >> 13, f >> 25))),
        select_bits(0xFF00_0000, f << 7, select_bits(0xFFFF_F000, g >> 5, h >> 17)),
    ]
}

/// The two e5m6 in the upper 24 bits of a word, the first in the highest, as f32 (exact).
#[inline(always)]
pub fn e5m6x2_to_f32(pair: u32) -> [f32; 2] {
    // An e5m6 is the upper 12 bits of an f16.
    let [second, first] = f16x2_to_f32(select_bits(0xFFF0_0000, pair, pair >> 4) & 0xFFF0_FFF0);
    [first, second]
}

/// Eight e5m6 in three words to f32 (exact), the reverse of [`f32x8_to_e5m6x8`].
#[inline(always)]
pub fn e5m6x8_to_f32(w: [u32; 3]) -> [f32; 8] {
    let (a, b) = (e5m6x2_to_f32(w[0]), e5m6x2_to_f32(byte_permute(w[1], w[0], 0x4320)));
    let (c, d) = (e5m6x2_to_f32(byte_permute(w[2], w[1], 0x5430)), e5m6x2_to_f32(w[2] << 8));
    [a[0], a[1], b[0], b[1], c[0], c[1], d[0], d[1]]
}

/// Byte `n` of the result is the byte of `{b, a}` (`a` the low four) that nibble `n` of `selector` names with its low three
/// bits; the nibble's top bit replaces the byte by eight copies of its sign. A table look-up of eight bytes in one instruction.
#[inline(always)]
pub fn byte_permute(a: u32, b: u32, selector: u32) -> u32 {
    backend::byte_permute(a, b, selector)
}

/// The bits of `a` where `mask` has ones, else those of `b`; one instruction.
#[inline(always)]
pub fn select_bits(mask: u32, a: u32, b: u32) -> u32 {
    backend::select_bits(mask, a, b)
}
