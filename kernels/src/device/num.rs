//! Number formats: the conversions of the specification in integer and plain float code.
//!
//! This is the one definition of every conversion. The emulator runs it, architectures without the instruction run it, and the
//! tests compare the instruction with it. All functions work on one value, never panic, need no table in memory and have no
//! branch that depends on data (the `if`s below are selects). They are right only without flush-to-zero, which rustc never enables.
//!
//! | format | bits S/E/M | bias | largest finite | NaN | code in |
//! |---|---|---|---|---|---|
//! | e4m3 | 1/4/3 | 7 | 448 | `0x7F`, `0xFF` | `u8` |
//! | e5m2 | 1/5/2 | 15 | 57344 | `0x7D..=0x7F` and with sign | `u8` |
//! | e2m1 | 1/2/1 | 1 | 6 | none | low 4 bits of `u8` |
//! | e5m6 | 1/5/6 | 15 | 65024 | `0x7C1..=0x7FF` and with sign | low 12 bits of `u16` |
//! | ue8m0 | 0/8/0 | 127 | 2^127 | none here: 255 decodes to infinity | `u8` |
//! | bf16 | 1/8/7 | 127 | 3.39e38 | yes | `u16` |
//! | f16 | 1/5/10 | 15 | 65504 | yes | `u16` |

/// The NaN that NVIDIA's conversions to f32 return, whatever the input's sign and payload.
const NAN: f32 = f32::from_bits(0x7FFF_FFFF);

/// All bits of an f32 but the sign.
const MAGNITUDE: u32 = 0x7FFF_FFFF;

/// Bits of an infinite f32; larger magnitudes are NaN.
const INFINITY: u32 = 0x7F80_0000;

#[inline(always)]
const fn min(a: u32, b: u32) -> u32 {
    if a < b { a } else { b }
}

#[inline(always)]
const fn max(a: u32, b: u32) -> u32 {
    if a > b { a } else { b }
}

/// `2^e` for a normal exponent.
#[inline(always)]
const fn exp2(e: i32) -> f32 {
    f32::from_bits(((e + 127) as u32) << 23)
}

/// `nan` if the magnitude `a` is a NaN's, else `code`. By masks: a select becomes a jump around the rounding in PTX, which diverges.
#[inline(always)]
const fn nan_or(a: u32, nan: u32, code: u32) -> u32 {
    // All ones if `a > INFINITY`; both are below 2^31, so the difference has the sign of the comparison.
    let mask = ((INFINITY as i32 - a as i32) >> 31) as u32;
    (code & !mask) | (nan & mask)
}

/// Code, without sign, of the value nearest to a magnitude (f32 bits), ties to even, in a format of `MAN` mantissa bits whose
/// smallest normal has the biased f32 exponent `EMIN`. `a` must be at most 2^126.
///
/// The rounding is one f32 addition: `M` is a power of two whose unit in the last place is the spacing of the target around `a`,
/// so `M + a` is rounded to that spacing by the adder, subnormals of the target included. The low bits of the sum count steps
/// from zero on, and a carry out of the binade lands on the next code by itself. The parity of the count is the parity of the
/// code, because what is added for the binade is a multiple of `2^MAN`.
#[inline(always)]
const fn round_nearest<const MAN: u32, const EMIN: u32>(a: u32) -> u32 {
    let e = max(a & INFINITY, EMIN << 23);
    let m = e + ((23 - MAN) << 23);
    let sum = (f32::from_bits(m) + f32::from_bits(a)).to_bits();
    (sum - m) + ((e - (EMIN << 23)) >> (23 - MAN))
}

/// Like [`round_nearest`], but adds the 16 bits `random` just below the last kept bit and truncates: the code above `a` is
/// taken with the probability that `a`'s distance from the code below says, to 16 bits.
#[inline(always)]
const fn round_stochastic<const MAN: u32, const EMIN: u32>(a: u32, random: u16) -> u32 {
    let exp = max(a >> 23, 1);
    let significand = (a & 0x7F_FFFF) | (((a >= 0x80_0000) as u32) << 23);
    let e = max(exp, EMIN);
    // Bits below the 16 that meet a random bit can't cause a carry, so they are cut off first; that keeps every sum in 32 bits.
    let below = min(23 - MAN - 16 + (e - exp), 31);
    (((significand >> below) + random as u32) >> 16) + ((e - EMIN) << MAN)
}

// 16-bit formats.

/// f32 to bf16, round to nearest even; too large becomes infinity, NaN becomes `0x7FFF` (`cvt.rn.bf16.f32`).
#[inline(always)]
pub const fn f32_to_bf16(v: f32) -> u16 {
    let bits = v.to_bits();
    // Wraps for NaNs only, which are replaced.
    let rounded = bits.wrapping_add(0x7FFF + ((bits >> 16) & 1)) >> 16;
    if bits & MAGNITUDE > INFINITY { 0x7FFF } else { rounded as u16 }
}

/// bf16 to f32, exact; a NaN keeps sign and payload.
#[inline(always)]
pub const fn bf16_to_f32(b: u16) -> f32 {
    f32::from_bits((b as u32) << 16)
}

/// f32 to f16, round to nearest even; 65520 and more becomes infinity, NaN becomes `0x7FFF` (`cvt.rn.f16.f32`).
#[inline(always)]
pub const fn f32_to_f16(v: f32) -> u16 {
    let bits = v.to_bits();
    let a = bits & MAGNITUDE;
    // 65536 rounds to the code of infinity.
    let code = round_nearest::<10, 113>(min(a, 143 << 23)) | ((bits >> 16) & 0x8000);
    nan_or(a, 0x7FFF, code) as u16
}

/// f32 to f16, toward zero; finite values stay finite (at most 65504), infinity stays, NaN becomes `0x7FFF` (`cvt.rz.f16.f32`).
#[inline(always)]
pub const fn f32_to_f16_rz(v: f32) -> u16 {
    let bits = v.to_bits();
    let a = bits & MAGNITUDE;
    // Just below 65536, so that what is too large is cut to 65504.
    let clamped = min(a, (143 << 23) - 1);
    let normal = (clamped >> 13).wrapping_sub(112 << 10);
    // Steps of 2^-24; the product is exact and the cast cuts.
    let subnormal = (f32::from_bits(min(clamped, 113 << 23)) * exp2(24)) as u32;
    let finite = if clamped < 113 << 23 { subnormal } else { normal };
    let code = if a == INFINITY { 0x7C00 } else { finite } | ((bits >> 16) & 0x8000);
    if a > INFINITY { 0x7FFF } else { code as u16 }
}

/// f16 to f32, exact; every NaN becomes `0x7FFF_FFFF` (`cvt.f32.f16`).
#[inline(always)]
pub const fn f16_to_f32(h: u16) -> f32 {
    let a = (h & 0x7FFF) as u32;
    let sign = ((h & 0x8000) as u32) << 16;
    // The exponent field is moved to where f32 has it, the product mends the bias. A subnormal f16 is a subnormal f32 in between.
    let finite = (f32::from_bits(a << 13) * exp2(112)).to_bits();
    let value = f32::from_bits(if a == 0x7C00 { INFINITY } else { finite } | sign);
    if a > 0x7C00 { NAN } else { value }
}

// 8-bit formats.

/// f32 to e4m3, round to nearest even, saturating: infinity and all above 448 become 448. The sign of zero is kept; NaN becomes
/// `0x7F` (`cvt.rn.satfinite.e4m3x2.f32`).
#[inline(always)]
pub const fn f32_to_e4m3(v: f32) -> u8 {
    let bits = v.to_bits();
    let a = bits & MAGNITUDE;
    let code = round_nearest::<3, 121>(min(a, 448f32.to_bits())) | ((bits >> 24) & 0x80);
    nan_or(a, 0x7F, code) as u8
}

/// e4m3 to f32, exact; both NaNs become `0x7FFF_FFFF` (`cvt.rn.f16x2.e4m3x2`, then `cvt.f32.f16`).
#[inline(always)]
pub const fn e4m3_to_f32(c: u8) -> f32 {
    let a = (c & 0x7F) as u32;
    let sign = ((c & 0x80) as u32) << 24;
    let value = f32::from_bits((f32::from_bits(a << 20) * exp2(120)).to_bits() | sign);
    if a == 0x7F { NAN } else { value }
}

/// f32 to e5m2, round to nearest even, saturating: infinity and all above 57344 become 57344. The sign of zero is kept; NaN
/// becomes `0x7F` (`cvt.rn.satfinite.e5m2x2.f32`).
#[inline(always)]
pub const fn f32_to_e5m2(v: f32) -> u8 {
    let bits = v.to_bits();
    let a = bits & MAGNITUDE;
    let code = round_nearest::<2, 113>(min(a, 57344f32.to_bits())) | ((bits >> 24) & 0x80);
    nan_or(a, 0x7F, code) as u8
}

/// e5m2 to f32, exact: an e5m2 is the upper byte of an f16.
#[inline(always)]
pub const fn e5m2_to_f32(c: u8) -> f32 {
    f16_to_f32((c as u16) << 8)
}

// e2m1 (FP4).

/// f32 to e2m1 in the low 4 bits, round to nearest even, saturating to 6. The sign is kept, for zeros too; NaN becomes +6, as
/// `cvt.rn.satfinite.e2m1x2.f32` of sm_100 has it.
#[inline(always)]
pub const fn f32_to_e2m1(v: f32) -> u8 {
    let bits = v.to_bits();
    let a = bits & MAGNITUDE;
    nan_or(a, 7, round_nearest::<1, 127>(min(a, 6f32.to_bits())) | ((bits >> 28) & 8)) as u8
}

/// The low 4 bits, an e2m1, to f32, exact.
#[inline(always)]
pub const fn e2m1_to_f32(c: u8) -> f32 {
    f32::from_bits((((c & 7) as u32) << 22) | (((c & 8) as u32) << 28)) * exp2(126)
}

/// Eight e2m1 codes in the order of their channels to one word: the even channel is the low nibble of its byte.
#[inline(always)]
pub const fn pack_e2m1(c: [u8; 8]) -> u32 {
    let [c0, c1, c2, c3, c4, c5, c6, c7] = c;
    let low = nibble(c0) | nibble(c1) << 4 | nibble(c2) << 8 | nibble(c3) << 12;
    low | nibble(c4) << 16 | nibble(c5) << 20 | nibble(c6) << 24 | nibble(c7) << 28
}

/// The eight codes of a word, the reverse of [`pack_e2m1`].
#[inline(always)]
pub const fn unpack_e2m1(w: u32) -> [u8; 8] {
    [
        nibble(w as u8) as u8,
        nibble((w >> 4) as u8) as u8,
        nibble((w >> 8) as u8) as u8,
        nibble((w >> 12) as u8) as u8,
        nibble((w >> 16) as u8) as u8,
        nibble((w >> 20) as u8) as u8,
        nibble((w >> 24) as u8) as u8,
        nibble((w >> 28) as u8) as u8,
    ]
}

#[inline(always)]
const fn nibble(c: u8) -> u32 {
    (c & 0xF) as u32
}

// e5m6.

/// f32 to e5m6 in the low 12 bits. From 2^-14 to 65024 this is round to nearest even. Below 2^-14 it is not: see
/// [`e5m6_from_f16_rz`]. Beyond 65024 the code of infinity can come out; scaled data never get there. NaN becomes `0x7FF`.
#[inline(always)]
pub const fn f32_to_e5m6(v: f32) -> u16 {
    e5m6_from_f16_rz(f32_to_f16_rz(v), v)
}

/// The second half of [`f32_to_e5m6`]: `h` is `v` as f16, rounded toward zero by code or by instruction.
///
/// The rounding looks at the 17 low mantissa bits of the f32 whatever its exponent. A value below 2^-14 has lost more than those to
/// the f16's shift, so it may be bumped when it should not, even if it is as good as zero, and the other way round. The published
/// kernels do this, and data written by them must be reproduced bit for bit.
#[inline(always)]
pub const fn e5m6_from_f16_rz(h: u16, v: f32) -> u16 {
    let c = h >> 4;
    let bump = (c & 1) as u32 + (v.to_bits() & 0x1_FFFF) > 0x1_0000;
    // A NaN must not be bumped into the sign bit, where it would read as -0.
    c + (bump && h & 0x7FFF <= 0x7C00) as u16
}

/// The low 12 bits, an e5m6, to f32, exact: an e5m6 is the upper 12 bits of an f16.
#[inline(always)]
pub const fn e5m6_to_f32(c: u16) -> f32 {
    f16_to_f32(c << 4)
}

/// Eight e5m6 codes in the order of their channels to three words: a string of 96 bits, first channel in the highest bits of the
/// first word.
#[inline(always)]
pub const fn pack_e5m6(c: [u16; 8]) -> [u32; 3] {
    let [c0, c1, c2, c3, c4, c5, c6, c7] = c;
    [
        twelve(c0) << 20 | twelve(c1) << 8 | twelve(c2) >> 4,
        twelve(c2) << 28 | twelve(c3) << 16 | twelve(c4) << 4 | twelve(c5) >> 8,
        twelve(c5) << 24 | twelve(c6) << 12 | twelve(c7),
    ]
}

/// The eight codes of three words, the reverse of [`pack_e5m6`].
#[inline(always)]
pub const fn unpack_e5m6(w: [u32; 3]) -> [u16; 8] {
    let [w0, w1, w2] = w;
    [
        (w0 >> 20) as u16,
        (w0 >> 8) as u16 & 0xFFF,
        (w0 << 4 | w1 >> 28) as u16 & 0xFFF,
        (w1 >> 16) as u16 & 0xFFF,
        (w1 >> 4) as u16 & 0xFFF,
        (w1 << 8 | w2 >> 24) as u16 & 0xFFF,
        (w2 >> 12) as u16 & 0xFFF,
        w2 as u16 & 0xFFF,
    ]
}

#[inline(always)]
const fn twelve(c: u16) -> u32 {
    (c & 0xFFF) as u32
}

// ue8m0.

/// ue8m0 to f32: the byte becomes the exponent field. So 0 decodes to 0 and 255 to infinity, not to 2^-127 and NaN.
#[inline(always)]
pub const fn ue8m0_to_f32(b: u8) -> f32 {
    f32::from_bits((b as u32) << 23)
}

/// The smallest power of two that is not below `s`, as ue8m0. `s` must be a positive normal number of at most 2^127 (a clamped scale
/// factor); other input gives some byte.
#[inline(always)]
pub const fn f32_to_ue8m0_ceil(s: f32) -> u8 {
    (s.to_bits().wrapping_sub(1) >> 23).wrapping_add(1) as u8
}

// Stochastic rounding: 16 random bits are added just below the last bit that is kept, and the rest is cut off. So the neighbour
// away from zero is taken with the probability that the distance from the one toward zero says, to 16 bits; a value of the
// format stays itself. This is the definition; `convert` has what the kernels run, which is held to it for all inputs.

/// f32 to bf16, rounded stochastically by 16 random bits, saturating (infinity becomes the largest finite bf16); NaN becomes
/// `0x7FFF`. The result is a neighbour of `v`, or `v` itself where bf16 has it.
#[inline(always)]
pub const fn f32_to_bf16_sr(v: f32, random: u16) -> u16 {
    let bits = v.to_bits();
    let a = bits & MAGNITUDE;
    // bf16 has the exponents of f32, so the sum works across binades and for subnormals alike.
    let code = min((min(a, INFINITY) + random as u32) >> 16, 0x7F7F) | ((bits >> 16) & 0x8000);
    nan_or(a, 0x7FFF, code) as u16
}

/// f32 to e4m3, rounded stochastically by 16 random bits, saturating to 448; NaN becomes `0x7F`. The result is a neighbour of `v`,
/// or `v` itself where e4m3 has it.
#[inline(always)]
pub const fn f32_to_e4m3_sr(v: f32, random: u16) -> u8 {
    let bits = v.to_bits();
    let a = bits & MAGNITUDE;
    let code = round_stochastic::<3, 121>(min(a, 448f32.to_bits()), random) | ((bits >> 24) & 0x80);
    nan_or(a, 0x7F, code) as u8
}

/// f32 to e2m1 in the low 4 bits, rounded stochastically by 16 random bits, saturating to 6; NaN becomes +6, as in [`f32_to_e2m1`].
/// The result is a neighbour of `v`, or `v` itself where e2m1 has it.
#[inline(always)]
pub const fn f32_to_e2m1_sr(v: f32, random: u16) -> u8 {
    let bits = v.to_bits();
    let a = bits & MAGNITUDE;
    nan_or(a, 7, round_stochastic::<1, 127>(min(a, 6f32.to_bits()), random) | ((bits >> 28) & 8)) as u8
}

/// The random words of four consecutive values: a pure hash of their f32 bits and of the quad's index. The first word serves all
/// four values of an 8-bit or 4-bit target ([`sr_bits_x4`]). For bf16 the first serves values 0 and 1, the second values 2 and 3
/// ([`sr_bits_x2`]).
#[inline(always)]
pub const fn quad_hash(v: [u32; 4], quad_idx: u32) -> [u32; 2] {
    let [a, b, c, d] = v;
    let mut h = a
        .wrapping_mul(0x5671_D42B)
        .wrapping_add(b.wrapping_mul(0x9995_E499))
        .wrapping_add(c.wrapping_mul(0xACE1_B8A5))
        .wrapping_add(d.wrapping_mul(0xE153_538D))
        .wrapping_add(quad_idx);
    h ^= h >> 23;
    h = h.wrapping_mul(0x7FEB_352D);
    h ^= h >> 16;
    let r0 = h.wrapping_mul(0x846C_A68B);
    let r1 = h.wrapping_mul(0xD35A_2D97);
    [r0 ^ (r0 >> 11), r1 ^ (r1 >> 11)]
}

/// The 16 bits of each of four values out of one random word, as the x4 instructions of sm_100 are reported to take them: values 0 and 1
/// share the lower half, 2 and 3 the upper, the odd value reads its half backwards.
#[inline(always)]
pub const fn sr_bits_x4(random: u32) -> [u16; 4] {
    let (low, high) = (random as u16, (random >> 16) as u16);
    [low, low.reverse_bits(), high, high.reverse_bits()]
}

/// The 16 bits of each of two values out of one random word.
#[inline(always)]
pub const fn sr_bits_x2(random: u32) -> [u16; 2] {
    [random as u16, (random >> 16) as u16]
}
