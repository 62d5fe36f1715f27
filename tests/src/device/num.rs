//! Number formats: every conversion against a slow reference that knows only the table of the formats.
//!
//! The reference lists all values of a format in f64 and searches the nearest one, ties to the even code. It shares no code with
//! the conversions. [`awkward_f32`] is also the input set for comparing instructions with the integer code.

/// A floating-point format, described by its table row.
#[derive(Clone, Copy, Debug)]
pub struct Format {
    /// Name in messages.
    pub name: &'static str,
    /// Exponent bits.
    pub exp_bits: u32,
    /// Mantissa bits.
    pub man_bits: u32,
    /// Exponent bias.
    pub bias: i32,
    /// Code of the largest finite value, without sign.
    pub max_code: u32,
}

/// e4m3 without infinities.
pub const E4M3: Format = Format { name: "e4m3", exp_bits: 4, man_bits: 3, bias: 7, max_code: 0x7E };
/// e5m2.
pub const E5M2: Format = Format { name: "e5m2", exp_bits: 5, man_bits: 2, bias: 15, max_code: 0x7B };
/// e2m1 (FP4).
pub const E2M1: Format = Format { name: "e2m1", exp_bits: 2, man_bits: 1, bias: 1, max_code: 7 };
/// e5m6, the upper 12 bits of an f16.
pub const E5M6: Format = Format { name: "e5m6", exp_bits: 5, man_bits: 6, bias: 15, max_code: 0x7BF };
/// bf16.
pub const BF16: Format = Format { name: "bf16", exp_bits: 8, man_bits: 7, bias: 127, max_code: 0x7F7F };
/// IEEE half.
pub const F16: Format = Format { name: "f16", exp_bits: 5, man_bits: 10, bias: 15, max_code: 0x7BFF };

impl Format {
    /// Magnitude of a code without sign, by the definition. The code after `max_code` gives what would follow without infinities.
    pub fn magnitude(&self, code: u32) -> f64 {
        let exp = (code >> self.man_bits) as i32;
        let man = (code & ((1 << self.man_bits) - 1)) as f64 / (1u32 << self.man_bits) as f64;
        if exp == 0 { man * 2f64.powi(1 - self.bias) } else { (1.0 + man) * 2f64.powi(exp - self.bias) }
    }

    /// The sign bit in a code.
    pub fn sign_bit(&self) -> u32 {
        1 << (self.exp_bits + self.man_bits)
    }

    /// All finite magnitudes, ascending, and the one after the largest, which is where rounding to infinity aims.
    pub fn magnitudes(&self) -> Vec<f64> {
        (0..=self.max_code + 1).map(|code| self.magnitude(code)).collect()
    }
}

/// The codes around a magnitude.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Neighbours {
    /// Largest code whose value is not above the magnitude, at most `max_code + 1`.
    pub below: u32,
    /// Smallest code whose value is not below it; equal to `below` for a value of the format and beyond the end.
    pub above: u32,
    /// Position between the two, 0 to 1.
    pub fraction: f64,
}

impl Neighbours {
    /// Search `values`, which ascend, for `magnitude`.
    pub fn of(values: &[f64], magnitude: f64) -> Self {
        let below = values.partition_point(|v| *v <= magnitude) - 1;
        let last = values.len() - 1;
        if below == last || values[below] == magnitude {
            return Self { below: below as u32, above: below as u32, fraction: 0.0 };
        }
        let fraction = (magnitude - values[below]) / (values[below + 1] - values[below]);
        Self { below: below as u32, above: below as u32 + 1, fraction }
    }

    /// Nearest code, ties to the even one.
    pub fn nearest(&self) -> u32 {
        match self.fraction.total_cmp(&0.5) {
            std::cmp::Ordering::Less => self.below,
            std::cmp::Ordering::Greater => self.above,
            std::cmp::Ordering::Equal => self.below + (self.below & 1),
        }
    }
}

/// Low halves that sit on and beside rounding decisions, joined to every upper half.
pub const LOW_HALVES: [u32; 10] = [0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF];

/// f32 inputs that decide: every upper half with [`LOW_HALVES`] (all of bf16 among them), every value of every format, every halfway point between neighbouring
/// codes, and the two f32 neighbours of each, with both signs.
pub fn awkward_f32() -> Vec<f32> {
    let mut bits: Vec<u32> = (0..=0xFFFFu32).flat_map(|high| LOW_HALVES.map(|low| high << 16 | low)).collect();
    for format in [E4M3, E5M2, E2M1, E5M6, BF16, F16] {
        let values = format.magnitudes();
        let halfway = values.windows(2).map(|pair| (pair[0] + pair[1]) / 2.0);
        for value in values.iter().copied().chain(halfway) {
            // Values of bf16 beyond the largest f32 become infinity here, which is an input as good as any.
            for near in [value as f32, (value as f32).next_down(), (value as f32).next_up()] {
                bits.extend([near.to_bits() & 0x7FFF_FFFF, near.to_bits() | 0x8000_0000]);
            }
        }
    }
    bits.sort_unstable();
    bits.dedup();
    bits.into_iter().map(f32::from_bits).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferrotile_kernels::device::num::*;
    use ferrotile_kernels::device::{
        e5m6x8_to_f32, f32x2_to_bf16x2_sr, f32x4_to_e4m3x4_sr, f32x8_to_e2m1x8_packed, f32x8_to_e2m1x8_sr, f32x8_to_e5m6x8,
    };
    use rayon::prelude::*;

    /// What a conversion does beyond the largest finite value.
    #[derive(Clone, Copy, PartialEq)]
    enum Beyond {
        Saturate,
        Infinity,
    }

    /// Compare `convert` with `expect` for all awkward inputs but NaN; both return codes.
    fn compare(name: &str, convert: impl Fn(f32) -> u32 + Sync, expect: impl Fn(f32) -> u32 + Sync) {
        let inputs: Vec<f32> = awkward_f32().into_iter().filter(|v| !v.is_nan()).collect();
        assert!(inputs.len() > 600_000);
        let wrong: Vec<String> = inputs
            .par_iter()
            .filter(|v| convert(**v) != expect(**v))
            .map(|v| format!("{v:e} ({:#010x}): got {:#x}, expected {:#x}", v.to_bits(), convert(*v), expect(*v)))
            .collect();
        assert!(wrong.is_empty(), "{name}: {} of {} differ, first: {}", wrong.len(), inputs.len(), wrong[0]);
    }

    /// Compare with the nearest value of the format.
    fn compare_nearest(format: Format, beyond: Beyond, convert: impl Fn(f32) -> u32 + Sync) {
        let values = format.magnitudes();
        compare(format.name, convert, |v| {
            let nearest = Neighbours::of(&values, (v as f64).abs()).nearest();
            let code = if beyond == Beyond::Saturate { nearest.min(format.max_code) } else { nearest };
            code | if v.is_sign_negative() { format.sign_bit() } else { 0 }
        });
    }

    /// Every code decodes to the value of the definition, sign of zero included, and encodes to itself.
    fn check_decode(format: Format, decode: impl Fn(u32) -> f32, encode: impl Fn(f32) -> u32) {
        for code in (0..=format.max_code).flat_map(|code| [code, code | format.sign_bit()]) {
            let magnitude = format.magnitude(code & !format.sign_bit());
            let expected = if code & format.sign_bit() != 0 { -magnitude } else { magnitude };
            let got = decode(code);
            assert_eq!(
                (got as f64).to_bits(),
                expected.to_bits(),
                "{} {code:#x}: got {got:e}, expected {expected:e}",
                format.name
            );
            assert_eq!(encode(got), code, "{} {code:#x} does not come back from {got:e}", format.name);
        }
    }

    #[test]
    fn decode_all_codes() {
        check_decode(E4M3, |c| e4m3_to_f32(c as u8), |v| f32_to_e4m3(v).into());
        check_decode(E5M2, |c| e5m2_to_f32(c as u8), |v| f32_to_e5m2(v).into());
        check_decode(E2M1, |c| e2m1_to_f32(c as u8), |v| f32_to_e2m1(v).into());
        check_decode(E5M6, |c| e5m6_to_f32(c as u16), |v| f32_to_e5m6(v).into());
        check_decode(BF16, |c| bf16_to_f32(c as u16), |v| f32_to_bf16(v).into());
        check_decode(F16, |c| f16_to_f32(c as u16), |v| f32_to_f16(v).into());
    }

    #[test]
    fn decode_specials() {
        for code in 0..=0xFFFFu16 {
            let got = f16_to_f32(code);
            match code & 0x7FFF {
                0x7C00 => assert_eq!(got, if code == 0x7C00 { f32::INFINITY } else { f32::NEG_INFINITY }),
                0x7C01.. => assert_eq!(got.to_bits(), 0x7FFF_FFFF, "f16 {code:#x}"),
                _ => assert!(got.is_finite()),
            }
            if code & 0xFF == 0 {
                assert_eq!(e5m2_to_f32((code >> 8) as u8).to_bits(), got.to_bits());
            }
            if code & 0xF == 0 {
                assert_eq!(e5m6_to_f32(code >> 4).to_bits(), got.to_bits());
            }
            assert_eq!(bf16_to_f32(code).to_bits(), (code as u32) << 16);
        }
        for code in [0x7F, 0xFF] {
            assert_eq!(e4m3_to_f32(code).to_bits(), 0x7FFF_FFFF);
        }
        // Only the low nibble counts.
        assert_eq!(e2m1_to_f32(0xF7), 6.0);
    }

    #[test]
    fn f32_to_e4m3_nearest() {
        compare_nearest(E4M3, Beyond::Saturate, |v| f32_to_e4m3(v).into());
    }

    #[test]
    fn f32_to_e5m2_nearest() {
        compare_nearest(E5M2, Beyond::Saturate, |v| f32_to_e5m2(v).into());
    }

    #[test]
    fn f32_to_e2m1_nearest() {
        compare_nearest(E2M1, Beyond::Saturate, |v| f32_to_e2m1(v).into());
    }

    #[test]
    fn f32_to_bf16_nearest() {
        compare_nearest(BF16, Beyond::Infinity, |v| f32_to_bf16(v).into());
    }

    #[test]
    fn f32_to_f16_nearest() {
        compare_nearest(F16, Beyond::Infinity, |v| f32_to_f16(v).into());
    }

    /// The code toward zero, infinity only from infinity.
    fn f16_rz_reference(values: &[f64], v: f32) -> u32 {
        let sign = if v.is_sign_negative() { 0x8000 } else { 0 };
        let below = Neighbours::of(values, (v as f64).abs()).below;
        sign | if v.is_infinite() { 0x7C00 } else { below.min(0x7BFF) }
    }

    #[test]
    fn f32_to_f16_toward_zero() {
        let values = F16.magnitudes();
        compare("f16 rz", |v| f32_to_f16_rz(v).into(), |v| f16_rz_reference(&values, v));
    }

    #[test]
    fn f32_to_e5m6_nearest_and_quirk() {
        let (values, halves) = (E5M6.magnitudes(), F16.magnitudes());
        compare(
            "e5m6",
            |v| f32_to_e5m6(v).into(),
            |v| {
                let magnitude = (v as f64).abs();
                let sign = if v.is_sign_negative() { 0x800 } else { 0 };
                if (2f64.powi(-14)..=65024.0).contains(&magnitude) {
                    return sign | Neighbours::of(&values, magnitude).nearest();
                }
                // Outside the range of exact rounding the rule of the specification is the definition.
                let code = f16_rz_reference(&halves, v) / 16;
                code + ((code % 2) + v.to_bits() % 0x2_0000 > 0x1_0000) as u32
            },
        );
    }

    /// The packed conversion of the PTX backend, with its instructions emulated, is the integer code in every position of the word.
    fn check_packed_e2m1(v: [f32; 8]) {
        let (got, expected) = (f32x8_to_e2m1x8_packed(v), pack_e2m1(v.map(f32_to_e2m1)));
        assert_eq!(got, expected, "{got:#010x}, expected {expected:#010x} of {v:?}");
    }

    #[test]
    fn packed_e2m1_is_the_integer_code() {
        let x = awkward_f32();
        x.par_chunks(8).enumerate().for_each(|(i, chunk)| {
            let mut v = [0.0; 8];
            v[..chunk.len()].copy_from_slice(chunk);
            v.rotate_left(i % 8);
            check_packed_e2m1(v);
        });
        // Neighbours of the halfway points in every position.
        for tie in [0.25f32, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0] {
            for delta in -40i32..40 {
                for position in 0..8 {
                    let v = f32::from_bits(tie.to_bits().wrapping_add_signed(delta));
                    check_packed_e2m1(core::array::from_fn(|i| if i == position { v } else { -v }));
                }
            }
        }
    }

    #[test]
    #[ignore = "all 2^32 inputs take minutes"]
    fn packed_e2m1_of_all_inputs() {
        (0..1u32 << 29)
            .into_par_iter()
            .for_each(|i| check_packed_e2m1(core::array::from_fn(|j| f32::from_bits(i * 8 + j as u32))));
    }

    /// The conversion of eight values is the integer code in every place, NaNs among them.
    fn check_e5m6x8(v: [f32; 8]) {
        let (got, expected) = (f32x8_to_e5m6x8(v), pack_e5m6(v.map(f32_to_e5m6)));
        assert_eq!(got, expected, "{got:08x?}, expected {expected:08x?} of {v:?}");
        let back = e5m6x8_to_f32(got).map(f32::to_bits);
        assert_eq!(back, v.map(|v| e5m6_to_f32(f32_to_e5m6(v)).to_bits()), "{v:?}");
    }

    #[test]
    fn eight_e5m6_are_the_integer_code() {
        let x = awkward_f32();
        x.par_chunks(8).enumerate().for_each(|(i, chunk)| {
            let mut v = [0.0; 8];
            v[..chunk.len()].copy_from_slice(chunk);
            v.rotate_left(i % 8);
            check_e5m6x8(v);
        });
        // Every halfway point of the format, its quirky part below 2^-14 included, and what lies beside it, in every place.
        let values = E5M6.magnitudes();
        let mut near = Vec::new();
        for value in values.windows(2).map(|pair| ((pair[0] + pair[1]) / 2.0) as f32).chain([2f32.powi(-24), 1e-40, 65504.0]) {
            near.extend((-3i32..=3).map(|delta| f32::from_bits(value.to_bits().wrapping_add_signed(delta))));
        }
        near.extend([f32::NAN, -f32::NAN, f32::from_bits(0x7FFF_FFFF), f32::from_bits(0x7F80_0001), f32::INFINITY]);
        near.par_iter().for_each(|v| {
            for place in 0..8 {
                check_e5m6x8(core::array::from_fn(|i| if i == place { *v } else { -v * i as f32 }));
            }
        });
    }

    #[test]
    #[ignore = "all 2^32 inputs take minutes"]
    fn eight_e5m6_of_all_inputs() {
        (0..1u32 << 29).into_par_iter().for_each(|i| check_e5m6x8(core::array::from_fn(|j| f32::from_bits(i * 8 + j as u32))));
    }

    #[test]
    fn nan_codes() {
        for bits in [0x7F80_0001u32, 0x7FC0_0000, 0x7FFF_FFFF, 0x7F81_FFFF, 0xFF80_0001, 0xFFC0_0000, 0xFFFF_FFFF] {
            let v = f32::from_bits(bits);
            assert_eq!(f32_to_bf16(v), 0x7FFF);
            assert_eq!(f32_to_bf16_sr(v, 0xFFFF), 0x7FFF);
            assert_eq!(f32_to_f16(v), 0x7FFF);
            assert_eq!(f32_to_f16_rz(v), 0x7FFF);
            assert_eq!(f32_to_e4m3(v), 0x7F);
            assert_eq!(f32_to_e4m3_sr(v, 0xFFFF), 0x7F);
            assert_eq!(f32_to_e5m2(v), 0x7F);
            assert_eq!(f32_to_e5m6(v), 0x7FF);
            assert_eq!(f32_to_e2m1(v), 7);
            assert_eq!(f32_to_e2m1_sr(v, 0xFFFF), 7);
        }
    }

    #[test]
    fn ue8m0_decode_all_and_round_up() {
        assert_eq!(ue8m0_to_f32(0).to_bits(), 0);
        assert_eq!(ue8m0_to_f32(255), f32::INFINITY);
        for byte in 1..255u8 {
            let power = 2f64.powi(byte as i32 - 127);
            assert_eq!(ue8m0_to_f32(byte) as f64, power);
            assert_eq!(f32_to_ue8m0_ceil(power as f32), byte, "an exact power stays");
        }
        for s in awkward_f32().into_iter().filter(|s| *s >= f32::MIN_POSITIVE && *s <= 2f32.powi(127)) {
            let (power, byte) = (ue8m0_to_f32(f32_to_ue8m0_ceil(s)), f32_to_ue8m0_ceil(s));
            assert!(power >= s && power as f64 / 2.0 < s as f64, "{s:e}: byte {byte}");
        }
    }

    /// Check the number of random words, out of all 65536, that round `v` up: it is the position of `v` between its neighbours.
    fn check_stochastic(format: Format, values: &[f64], v: f32, convert: impl Fn(f32, u16) -> u32) {
        let sign = if v.is_sign_negative() { format.sign_bit() } else { 0 };
        let n = Neighbours::of(values, (v as f64).abs());
        let (below, above) = (n.below.min(format.max_code), n.above.min(format.max_code));
        let mut ups = 0u32;
        for random in 0..=0xFFFF {
            let code = convert(v, random);
            assert!(
                code == sign | below || code == sign | above,
                "{} {v:e} random {random:#x}: {code:#x} is no neighbour",
                format.name
            );
            ups += (below != above && code == sign | above) as u32;
        }
        let expected = if below == above { 0 } else { (n.fraction * 65536.0) as u32 };
        assert_eq!(ups, expected, "{} {v:e} ({:#x})", format.name, v.to_bits());
    }

    #[test]
    fn stochastic_rounding_is_unbiased_and_stays_between_neighbours() {
        let inputs = awkward_f32();
        for (format, convert) in [
            (E4M3, (|v, r| f32_to_e4m3_sr(v, r).into()) as fn(f32, u16) -> u32),
            (E2M1, |v, r| f32_to_e2m1_sr(v, r).into()),
            (BF16, |v, r| f32_to_bf16_sr(v, r).into()),
        ] {
            let values = format.magnitudes();
            // Beside a stride through all inputs, the values and halfway points of the format itself.
            let own = values.iter().chain(&[0.0, 448.0, 6.0]).map(|v| *v as f32).filter(|_| format.man_bits < 7);
            let own = own.flat_map(|v| [v, v.next_down(), v * 1.25, -v * 1.5]);
            let chosen: Vec<f32> =
                inputs.iter().copied().step_by(997).chain(own).filter(|v| v.abs() <= f32::MAX && !v.is_nan()).collect();
            assert!(chosen.len() > 500);
            chosen.par_iter().for_each(|v| check_stochastic(format, &values, *v, convert));
        }
        assert_eq!(f32_to_bf16_sr(f32::INFINITY, 0), 0x7F7F);
        assert_eq!(f32_to_bf16_sr(f32::NEG_INFINITY, 0xFFFF), 0xFF7F);
        assert_eq!(f32_to_bf16_sr(f32::MAX, 0xFFFF), 0x7F7F);
        assert_eq!(f32_to_e4m3_sr(f32::INFINITY, 0xFFFF), 0x7E);
        assert_eq!(f32_to_e2m1_sr(f32::NEG_INFINITY, 0xFFFF), 0xF);
        assert_eq!(f32_to_bf16_sr(-0.0, 0xFFFF), 0x8000);
    }

    /// Every awkward input, NaN too, in changing places and with random bits of all kinds: what kernels run is the definition.
    #[test]
    fn stochastic_conversions_of_several_values_are_the_integer_code() {
        let inputs = awkward_f32();
        let words = [0, u32::MAX, 0xFFFF, 0xFFFF_0000, 0x8000_7FFF, 0x0001_8000];
        inputs.par_chunks(8).enumerate().for_each(|(chunk, values)| {
            let mut v = [0.0f32; 8];
            v[..values.len()].copy_from_slice(values);
            let hashed = quad_hash(std::array::from_fn(|i| v[i].to_bits()), chunk as u32);
            let special = [words[chunk % 6], words[chunk / 6 % 6]];
            for (rotate, random) in [(chunk % 8, hashed), (chunk / 8 % 8, special), (0, [hashed[1], special[0]])] {
                v.rotate_left(rotate);
                let bits: [u16; 8] = std::array::from_fn(|i| sr_bits_x4(random[i / 4])[i % 4]);
                let what = || format!("{v:?} {:08x?} random {random:08x?}", v.map(f32::to_bits));
                for half in 0..2 {
                    let four = std::array::from_fn(|i| v[4 * half + i]);
                    let expected = std::array::from_fn(|i| f32_to_e4m3_sr(four[i], bits[4 * half + i]));
                    assert_eq!(f32x4_to_e4m3x4_sr(four, random[half]).to_le_bytes(), expected, "e4m3 {}", what());
                }
                let expected = pack_e2m1(std::array::from_fn(|i| f32_to_e2m1_sr(v[i], bits[i])));
                assert_eq!(f32x8_to_e2m1x8_sr(v, random), expected, "e2m1 {}", what());
                let [low, high] = [random[0] as u16, (random[0] >> 16) as u16];
                let expected = f32_to_bf16_sr(v[0], low) as u32 | (f32_to_bf16_sr(v[1], high) as u32) << 16;
                assert_eq!(f32x2_to_bf16x2_sr(v[0], v[1], random[0]), expected, "bf16 {}", what());
            }
        });
    }

    /// Which 16 bits of a word serve which value: an upward step happens exactly when a value's bits reach what it lacks.
    #[test]
    fn halves_of_a_random_word_serve_their_values() {
        // A quarter above 1 in e4m3: up for bits of 0xC000 and more. 0x3000 reversed is 0x000C, 0x0003 is 0xC000.
        let v = 1.03125f32;
        let up = |random| f32x4_to_e4m3x4_sr([v; 4], random).to_le_bytes().map(|code| code == 0x39);
        assert_eq!(up(0x0000_C000), [true, false, false, false]);
        assert_eq!(up(0x0000_0003), [false, true, false, false]);
        assert_eq!(up(0xC000_0000), [false, false, true, false]);
        assert_eq!(up(0x0003_0000), [false, false, false, true]);
        assert_eq!(up(0xBFFF_BFFF), [false, true, false, true]);
        assert_eq!(f32x8_to_e2m1x8_sr([1.125; 8], [0x0000_C000, 0x0003_0000]), 0x3222_2223);
        let third = f32::from_bits(0x3F80_4000);
        assert_eq!(f32x2_to_bf16x2_sr(third, third, 0xBFFF_C000), 0x3F80_3F81);
    }

    /// The hash in exact arithmetic, reduced at the end of each step.
    fn quad_hash_reference(v: [u32; 4], quad_idx: u32) -> [u32; 2] {
        const M: u128 = 1 << 32;
        let factors = [0x5671D42Bu128, 0x9995E499, 0xACE1B8A5, 0xE153538D];
        let sum: u128 = factors.iter().zip(v).map(|(f, v)| f * v as u128).sum::<u128>() + quad_idx as u128;
        let mix = |x: u128, shift: u32| x ^ (x >> shift);
        let h = mix(mix(sum % M, 23) * 0x7FEB352D % M, 16);
        [0x846CA68B, 0xD35A2D97].map(|f| mix(h * f % M, 11) as u32)
    }

    #[test]
    fn quad_hash_matches_exact_arithmetic_and_spreads() {
        let inputs: Vec<u32> = awkward_f32().iter().map(|v| v.to_bits()).collect();
        let mut ones = [[0u32; 32]; 2];
        let mut count = 0;
        for (idx, quad) in inputs.chunks_exact(4).enumerate() {
            let quad = [quad[0], quad[1], quad[2], quad[3]];
            for quad_idx in [idx as u32, u32::MAX - idx as u32] {
                let got = quad_hash(quad, quad_idx);
                assert_eq!(got, quad_hash_reference(quad, quad_idx), "{quad:08x?} {quad_idx}");
                count += 1;
                for (ones, word) in ones.iter_mut().zip(got) {
                    ones.iter_mut().enumerate().for_each(|(bit, n)| *n += word >> bit & 1);
                }
            }
        }
        // Every bit is set about half of the time: 8 standard deviations of a fair coin.
        let bound = 8.0 * (count as f64).sqrt() / 2.0;
        assert!(ones.iter().flatten().all(|n| (*n as f64 - count as f64 / 2.0).abs() < bound), "{ones:?} of {count}");
        assert_eq!(sr_bits_x4(0x8001_0003), [0x0003, 0xC000, 0x8001, 0x8001]);
        assert_eq!(sr_bits_x2(0x8001_0003), [0x0003, 0x8001]);
    }

    #[test]
    fn packing_round_trips_and_ignores_high_bits() {
        assert_eq!(pack_e2m1([1, 2, 3, 4, 5, 6, 7, 0xF8]), 0x8765_4321);
        let codes = [0x001, 0x234, 0x567, 0x89A, 0xBCD, 0xEF0, 0xFFF, 0x7C0];
        assert_eq!(pack_e5m6(codes), [0x0012_3456, 0x789A_BCDE, 0xF0FF_F7C0]);
        assert_eq!(unpack_e5m6(pack_e5m6(codes)), codes);
        assert_eq!(pack_e5m6(codes.map(|c| c | 0xF000)), pack_e5m6(codes));
        // Every code at every place.
        for code in 0..0x1000u16 {
            for place in 0..8 {
                let mut codes = [0x5A5; 8];
                codes[place] = code;
                assert_eq!(unpack_e5m6(pack_e5m6(codes)), codes);
                let mut nibbles = [0xA; 8];
                nibbles[place] = (code & 0xF) as u8;
                assert_eq!(unpack_e2m1(pack_e2m1(nibbles)), nibbles);
            }
        }
    }

    /// The golden vectors of quant.md section 9: one group, its largest magnitude 100.
    const X: [f32; 8] = [0.1, -0.25, 1.0, 3.0, -7.5, 0.0, -0.0, 100.0];
    const Y: [f32; 8] = [0.3, -2.0, 5.0, -6.0, 1.25, 2.5, -0.75, 0.26];

    /// `v * sf_inv` as the casts do it, with `sf_inv` as f32 bits.
    fn scaled(v: [f32; 8], sf_inv: u32) -> [f32; 8] {
        v.map(|v| v * f32::from_bits(sf_inv))
    }

    #[test]
    fn golden_vectors_e4m3() {
        assert_eq!(scaled(X, 0x408F_5C29).map(f32_to_e4m3), [0x2E, 0xB9, 0x49, 0x55, 0xE0, 0x00, 0x80, 0x7E]);
        assert_eq!(scaled(X, 0x4080_0000).map(f32_to_e4m3), [0x2D, 0xB8, 0x48, 0x54, 0xDF, 0x00, 0x80, 0x7C]);
        assert_eq!(scaled(Y, 64f32.to_bits()).map(f32_to_e4m3), [0x5A, 0xF0, 0x7A, 0xFC, 0x6A, 0x72, 0xE4, 0x58]);
    }

    #[test]
    fn golden_vectors_e2m1() {
        let bytes = |v: [f32; 8]| pack_e2m1(v.map(f32_to_e2m1)).to_le_bytes();
        assert_eq!(bytes(scaled(X, 0x3D75_C28F)), [0x80, 0x00, 0x09, 0x78]);
        assert_eq!(bytes(scaled(X, 0x3D00_0000)), [0x80, 0x00, 0x08, 0x58]);
        assert_eq!(bytes(Y), [0xC1, 0xF6, 0x42, 0x1A]);
    }

    #[test]
    fn golden_vectors_e5m6() {
        let codes = scaled(X, 0x4422_8F5C).map(f32_to_e5m6);
        assert_eq!(codes, [0x541, 0xD91, 0x611, 0x67A, 0xECC, 0x000, 0x800, 0x7BF]);
        assert_eq!(pack_e5m6(codes), [0x541D_9161, 0x167A_ECC0, 0x0080_07BF]);
        let bytes: Vec<u8> = pack_e5m6(codes).iter().flat_map(|w| w.to_le_bytes()).collect();
        assert_eq!(bytes, [0x61, 0x91, 0x1D, 0x54, 0xC0, 0xEC, 0x7A, 0x16, 0xBF, 0x07, 0x80, 0x00]);
        let codes = scaled(X, 0x4400_0000).map(f32_to_e5m6);
        assert_eq!(codes, [0x526, 0xD80, 0x600, 0x660, 0xEB8, 0x000, 0x800, 0x7A4]);
        assert_eq!(pack_e5m6(codes), [0x526D_8060, 0x0660_EB80, 0x0080_07A4]);
        for (v, code) in [
            (2f32.powi(-20), 0x001),
            (1.5 * 2f32.powi(-20), 0x001),
            (f32::from_bits(0x0001_8001), 0x001),
            (2f32.powi(-14) * 63.0 / 64.0, 0x03F),
            (65024.0, 0x7BF),
            (-65024.0, 0xFBF),
            (1.0 + 1.0 / 128.0, 0x3C0),
            (1.0 + 3.0 / 128.0, 0x3C2),
        ] {
            assert_eq!(f32_to_e5m6(v), code, "{v:e}");
        }
    }

    #[test]
    fn golden_vectors_scale_factors() {
        for (amax, largest, byte) in [
            (100f32, 448f32, 125),
            (100.0, 6.0, 132),
            (100.0, 65024.0, 118),
            (1e-4, 448.0, 105),
            (6.0 * 2f32.powi(-126), 6.0, 1),
            (1e-4, 65024.0, 98),
        ] {
            assert_eq!(f32_to_ue8m0_ceil(amax / largest), byte, "{amax:e} / {largest}");
        }
    }
}
