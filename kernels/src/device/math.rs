//! Arithmetic beyond `+ - * /`, which are IEEE on both backends (`/` is `div.rn`; mul and add are never contracted).

use super::backend;

/// `a * b + c` with one rounding.
#[inline(always)]
pub fn fma(a: f32, b: f32, c: f32) -> f32 {
    backend::fma(a, b, c)
}

/// Lower and upper half of a product.
#[inline(always)]
pub fn multiply_wide(a: u32, b: u32) -> [u32; 2] {
    backend::multiply_wide(a, b)
}

/// A result of arithmetic, with the bits of NaN that it has on NVIDIA hardware; the host that emulates may make others. For code that
/// looks at the bits.
#[inline(always)]
pub fn canonical(v: f32) -> f32 {
    backend::canonical(v)
}

/// The smaller one. Not `u32::min`, which leaves more than one instruction.
#[inline(always)]
pub fn min_u32(a: u32, b: u32) -> u32 {
    if b < a { b } else { a }
}

/// The larger one, see [`min_u32`].
#[inline(always)]
pub fn max_u32(a: u32, b: u32) -> u32 {
    if b > a { b } else { a }
}

/// The larger value; NaN loses against a number.
#[inline(always)]
pub fn max_total(a: f32, b: f32) -> f32 {
    backend::max(a, b)
}

/// The smaller value; NaN loses against a number.
#[inline(always)]
pub fn min_total(a: f32, b: f32) -> f32 {
    backend::min(a, b)
}

/// The larger magnitude; NaN loses against a number. The sign of the result means nothing.
#[inline(always)]
pub fn max_abs(a: f32, b: f32) -> f32 {
    backend::max_abs(a, b)
}

/// The larger value; NaN if there is one.
#[inline(always)]
pub fn max_nan(a: f32, b: f32) -> f32 {
    backend::max_nan(a, b)
}

/// The smaller value; NaN if there is one.
#[inline(always)]
pub fn min_nan(a: f32, b: f32) -> f32 {
    backend::min_nan(a, b)
}

/// Square root, correctly rounded.
#[inline(always)]
pub fn sqrt(v: f32) -> f32 {
    backend::sqrt(v)
}

/// Square root, correctly rounded, for `v` from 2^-100 to the largest finite number: without the branch for other numbers that [`sqrt`]
/// has, so that several of them overlap.
#[inline(always)]
pub fn sqrt_normal(v: f32) -> f32 {
    // The sequence that the compiler makes of `sqrt.rn` for such numbers.
    let inverse = fast_rsqrt(v);
    let near = v * inverse;
    let remainder = fma(-near, near, v);
    fma(remainder, 0.5 * inverse, near)
}

/// `a / b`, correctly rounded like the operator, without the branch that that has: for `b` from 2^-67 to 2^70 and `0 <= a <= b`,
/// `a` not above 2^64. Quotients that are subnormal are rounded twice.
#[inline(always)]
pub fn divide_normal(a: f32, b: f32) -> f32 {
    let inverse = inverse_normal(b);
    // The scaling keeps the remainder normal.
    divide_by(a * 1.152_921_5e18, b, inverse) * 8.673_617_4e-19
}

/// `1 / v`, correctly rounded, for `v` from 2^-126 to 2^125, for [`divide_by`].
#[inline(always)]
pub fn inverse_normal(v: f32) -> f32 {
    let near = fast_rcp(v);
    fma(near, fma(-v, near, 1.0), near)
}

/// `a / b`, correctly rounded like the operator, in three instructions, with `inverse` from [`inverse_normal`] of `b`: for `b` from 2^-126
/// to 2^125 and `a` that is +0, or from 2^-100 on and such that the quotient is normal.
#[inline(always)]
pub fn divide_by(a: f32, b: f32, inverse: f32) -> f32 {
    // A correctly rounded inverse and an exact remainder make a correctly rounded quotient: tests/src/device/layer.rs looks at
    // quotients that are close enough to the middle of two floats to be in doubt.
    let quotient = a * inverse;
    fma(inverse, fma(-b, quotient, a), quotient)
}

/// e^v for `v <= 0`, within 1 ulp and from fused multiply-adds only: the same bits on both backends. Subnormal results are right, NaN
/// stays NaN, and positive `v` must not be given.
#[inline(always)]
pub fn exp_nonpositive(v: f32) -> f32 {
    // Below this the result rounds to 0.
    let v = max_nan(v, -104.0);
    // e^v = 2^n * e^r with n the nearest integer. The sum has n + 151 in its low bits, which makes the exponent of 2^(n + 24).
    const MAGIC: f32 = 12_582_912.0 + 151.0;
    let shifted = fma(v, core::f32::consts::LOG2_E, MAGIC);
    let n = shifted - MAGIC;
    // In two steps, of which the first one is exact.
    let r = fma(n, -core::f32::consts::LN_2, v);
    let r = fma(n, 1.904_654_2e-9, r);
    // (e^r - 1 - r) / r^2 interpolated on |r| <= ln(2) / 2; relative error of the whole 8e-9.
    let p = fma(0.001_392_845_1, r, 0.008_364_993);
    let p = fma(p, r, 0.041_666_54);
    let p = fma(p, r, 0.166_665_66);
    let p = fma(p, r, 0.5);
    let p = fma(fma(p, r, 1.0), r, 1.0);
    // The first product is normal and exact, the second one rounds once.
    p * f32::from_bits(shifted.to_bits() << 23) * 5.960_464_5e-8
}

/// 2^v, relative error at most 2^-22; results below 2^-126 are 0. The emulator's is correctly rounded.
#[inline(always)]
pub fn fast_exp2(v: f32) -> f32 {
    backend::ex2(v)
}

/// log2(v), absolute error at most 2^-22 near 1, else relative 2^-22; subnormal `v` counts as 0. The emulator's is correctly
/// rounded.
#[inline(always)]
pub fn fast_log2(v: f32) -> f32 {
    backend::lg2(v)
}

/// ln(v) from [`fast_log2`].
#[inline(always)]
pub fn fast_log(v: f32) -> f32 {
    fast_log2(v) * core::f32::consts::LN_2
}

/// 1 / sqrt(v), relative error at most 2^-22.9; subnormal `v` gives infinity. The emulator's is correctly rounded.
#[inline(always)]
pub fn fast_rsqrt(v: f32) -> f32 {
    backend::rsqrt(v)
}

/// 1 / v, at most 1 ulp off; subnormal `v` gives infinity. The emulator's is correctly rounded.
#[inline(always)]
pub fn fast_rcp(v: f32) -> f32 {
    backend::rcp(v)
}

/// e^v as CUDA's single-precision `expf` computes it (2 ulp): the same bits as the peers' on a GPU. On the emulator the power
/// of two inside is correctly rounded, which moves the last bit of one result in eight.
#[inline(always)]
pub fn exp(v: f32) -> f32 {
    let [mantissa, power] = exp_factors(v);
    mantissa * power
}

/// `1 + e^v` with [`exp`], rounded twice as that sum is, in one instruction less: the product inside `exp` is by a power of two, so it
/// is exact unless it is too small for the sum or infinite either way.
#[inline(always)]
pub fn one_plus_exp(v: f32) -> f32 {
    let [mantissa, power] = exp_factors(v);
    fma(mantissa, power, 1.0)
}

/// Two factors of [`exp`], the second of them a power of two.
#[inline(always)]
fn exp_factors(v: f32) -> [f32; 2] {
    // Constants of the published sequence (quant.md 1.9): log2(e) split in two, and a magic number that rounds to integer.
    let t = backend::saturate(fma(v, f32::from_bits(0x3BBB_989D), 0.5));
    let j = backend::fma_toward_minus_inf(t, 252.0, f32::from_bits(0x4B40_0001));
    let k = -(j + f32::from_bits(0xCB40_007F));
    let q = fma(v, f32::from_bits(0x3FB8_AA3B), k);
    let q = fma(v, f32::from_bits(0x32A5_7060), q);
    [fast_exp2(q), f32::from_bits(j.to_bits() << 23)]
}

/// 1 / v for `v >= 1`, infinity too, without the branch that `1.0 / v` has: correctly rounded below 2^126, and beyond, where 1 / v is
/// subnormal, for all but a few `v` in a million, which are one unit off.
#[inline(always)]
pub fn reciprocal(v: f32) -> f32 {
    // The instruction flushes subnormal results, so it is given a quarter.
    let near = fast_rcp(v * 0.25) * 0.25;
    // Infinity times zero would be NaN.
    let remainder = fma(-min_total(v, f32::MAX), near, 1.0);
    fma(near, remainder, near)
}
