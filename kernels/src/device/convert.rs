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

/// Four f32 to e4m3, first in the low byte.
#[inline(always)]
pub fn f32x4_to_e4m3x4(v: [f32; 4]) -> u32 {
    f32x2_to_e4m3x2(v[0], v[1]) | f32x2_to_e4m3x2(v[2], v[3]) << 16
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

/// Eight f32 to e2m1, round to nearest even, saturating at 6, first in the low nibble.
#[inline(always)]
pub fn f32x8_to_e2m1x8(v: [f32; 8]) -> u32 {
    // No instruction before sm_100. Pairs are joined as a tree, which keeps the dependency chain short.
    let pair = |i: usize| num::f32_to_e2m1(v[i]) as u32 | (num::f32_to_e2m1(v[i + 1]) as u32) << 4;
    (pair(0) | pair(2) << 8) | (pair(4) | pair(6) << 8) << 16
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

/// Byte `n` of the result is the byte of `{b, a}` (`a` the low four) that nibble `n` of `selector` names with its low three
/// bits; the nibble's top bit replaces the byte by eight copies of its sign. A table look-up of eight bytes in one instruction.
#[inline(always)]
pub fn byte_permute(a: u32, b: u32, selector: u32) -> u32 {
    backend::byte_permute(a, b, selector)
}
