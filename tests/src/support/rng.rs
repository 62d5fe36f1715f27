//! Seeded inputs. Every value is a function of (seed, index), so tensors are made in parallel and come out the same everywhere.
//!
//! Only integer operations and correctly rounded f32 ones are used, no `ln` or `cos` of the machine's math library: an emulator
//! run here and a GPU run elsewhere see the same bytes.

use half::bf16;
use rayon::prelude::*;

/// Elements that one rayon task makes.
const CHUNK: usize = 1 << 14;

/// A counter-based generator: state is the key alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rng {
    key: u64,
}

impl Rng {
    /// The generator of a seed.
    pub const fn new(seed: u64) -> Self {
        Self { key: mix(seed ^ 0x6A09_E667_F3BC_C908) }
    }

    /// The generator of a test case, from the name that spells its parameters.
    pub fn named(case: &str) -> Self {
        // FNV-1a.
        Self::new(case.bytes().fold(0xCBF2_9CE4_8422_2325, |h, b| (h ^ b as u64).wrapping_mul(0x0000_0100_0000_01B3)))
    }

    /// An independent generator for the `n`th tensor of a case.
    pub const fn stream(&self, n: u64) -> Self {
        Self::new(self.key.rotate_left(17) ^ mix(n))
    }

    /// 64 random bits.
    #[inline]
    pub const fn bits(&self, index: u64) -> u64 {
        mix(self.key.wrapping_add(index.wrapping_mul(0x9E37_79B9_7F4A_7C15)))
    }

    /// An integer below `n`; `n` must not be 0.
    #[inline]
    pub const fn below(&self, index: u64, n: u64) -> u64 {
        ((self.bits(index) as u128 * n as u128) >> 64) as u64
    }

    /// A multiple of 2^-24 in [0, 1).
    #[inline]
    pub const fn unit(&self, index: u64) -> f32 {
        (self.bits(index) >> 40) as f32 * (1.0 / (1 << 24) as f32)
    }

    /// A standard normal value, at most 6.7 in magnitude.
    #[inline]
    pub fn normal(&self, index: u64) -> f32 {
        let (even, odd) = normal_pair(self.bits(index / 2));
        if index & 1 == 0 { even } else { odd }
    }

    /// `len` values of `make(index)`, in parallel.
    pub fn fill<T: Send + Copy + Default>(&self, len: usize, make: impl Fn(&Self, u64) -> T + Sync) -> Vec<T> {
        let mut out = vec![T::default(); len];
        out.par_chunks_mut(CHUNK).enumerate().for_each(|(chunk, values)| {
            for (i, value) in values.iter_mut().enumerate() {
                *value = make(self, (chunk * CHUNK + i) as u64);
            }
        });
        out
    }

    /// `len` standard normal f32.
    pub fn normal_f32(&self, len: usize) -> Vec<f32> {
        self.fill(len, |rng, i| rng.normal(i))
    }

    /// `len` standard normal bf16: [`normal_f32`](Self::normal_f32), rounded.
    pub fn normal_bf16(&self, len: usize) -> Vec<bf16> {
        self.fill(len, |rng, i| bf16::from_f32(rng.normal(i)))
    }

    /// Normal values times one power of two from 2^-110 to 2^126 for the whole tensor, at most `f32::MAX / 8` in magnitude.
    pub fn rand_float(&self, len: usize) -> Vec<f32> {
        let exponent = self.stream(u64::MAX).below(0, 237) as i32 - 110;
        let scale = f32::from_bits(((exponent + 127) as u32) << 23);
        let limit = f32::MAX / 8.0;
        self.fill(len, |rng, i| {
            let plain = rng.normal(i);
            let scaled = plain * scale;
            if scaled.is_finite() { scaled.clamp(-limit, limit) } else { plain }
        })
    }

    /// `len` random bytes.
    pub fn bytes(&self, len: usize) -> Vec<u8> {
        self.fill(len, |rng, i| (rng.bits(i / 8) >> (i % 8 * 8)) as u8)
    }

    /// `len` integers in `low..high`, which must not be empty.
    pub fn ints_i32(&self, len: usize, low: i32, high: i32) -> Vec<i32> {
        self.fill(len, |rng, i| (low as i64 + rng.below(i, (high as i64 - low as i64) as u64) as i64) as i32)
    }

    /// `len` integers in `low..high`, which must not be empty.
    pub fn ints_i64(&self, len: usize, low: i64, high: i64) -> Vec<i64> {
        self.fill(len, |rng, i| low.wrapping_add(rng.below(i, high.wrapping_sub(low) as u64) as i64))
    }
}

/// The finaliser of SplitMix64, a bijection.
#[inline]
const fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Box and Muller: a radius from 32 bits, an angle from 24, and from three more the octant of the angle.
#[inline]
fn normal_pair(bits: u64) -> (f32, f32) {
    // (0, 1], its logarithm by exponent and the series of atanh; an error of 1e-7 does not matter here.
    let u = ((bits >> 32) + 1) as f32 * (1.0 / 4_294_967_296.0);
    // Shifted so that the mantissa lies in [2^-0.5, 2^0.5).
    let shifted = u.to_bits().wrapping_sub(0x3F35_04F3);
    let exponent = (shifted as i32 >> 23) as f32;
    let mantissa = f32::from_bits((shifted & 0x7F_FFFF) + 0x3F35_04F3);
    let s = (mantissa - 1.0) / (mantissa + 1.0);
    let s2 = s * s;
    let ln =
        exponent * core::f32::consts::LN_2 + 2.0 * s * (1.0 + s2 * (1.0 / 3.0 + s2 * (1.0 / 5.0 + s2 * (1.0 / 7.0 + s2 / 9.0))));
    let radius = (-2.0 * ln).max(0.0).sqrt();
    // [0, pi/4), series of sine and cosine.
    let x = (bits >> 8 & 0xFF_FFFF) as f32 * (core::f32::consts::FRAC_PI_4 / 16_777_216.0);
    let x2 = x * x;
    let sin = x * (1.0 - x2 * (1.0 / 6.0 - x2 * (1.0 / 120.0 - x2 / 5040.0)));
    let cos = 1.0 - x2 * (1.0 / 2.0 - x2 * (1.0 / 24.0 - x2 * (1.0 / 720.0 - x2 / 40320.0)));
    let (a, b) = if bits & 1 == 0 { (cos, sin) } else { (sin, cos) };
    let sign = |bit: u32, v: f32| f32::from_bits(v.to_bits() ^ ((bits >> bit & 1) as u32) << 31);
    (sign(1, radius * a), sign(2, radius * b))
}

/// Philox4x32 with 10 rounds, as the paper (Salmon and others, 2011) has it: the reference for what kernels draw.
pub fn philox(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let (mut c, mut k) = (counter, key);
    for _ in 0..10 {
        let (p0, p1) = (0xD251_1F53u64 * c[0] as u64, 0xCD9E_8D57u64 * c[2] as u64);
        c = [(p1 >> 32) as u32 ^ c[1] ^ k[0], p1 as u32, (p0 >> 32) as u32 ^ c[3] ^ k[1], p0 as u32];
        k = [k[0].wrapping_add(0x9E37_79B9), k[1].wrapping_add(0xBB67_AE85)];
    }
    c
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn same_seed_and_index_same_value() {
        let rng = Rng::named("per_token_cast h=576");
        let all = rng.normal_f32(100_000);
        assert!((0..100_000).all(|i| rng.normal(i as u64).to_bits() == all[i].to_bits()));
        assert_eq!(&rng.normal_f32(777)[..], &all[..777], "a shorter tensor is a prefix");
        for other in [Rng::named("per_token_cast h=577"), rng.stream(0), rng.stream(1), Rng::new(1)] {
            let same = other.normal_f32(1000).iter().zip(&all).filter(|(a, b)| a == b).count();
            assert!(same < 3, "{same} of 1000 are equal");
        }
        // Pinned: data of recorded runs must stay reproducible on every machine.
        assert_eq!(Rng::new(0).bits(0), 0x83CD_62B9_6D17_D778);
        assert_eq!(Rng::new(42).normal(7).to_bits(), 0x3F48_5196);
    }

    #[test]
    fn normal_has_the_moments_and_tails_of_a_normal() {
        let n = 2_000_000;
        let x = Rng::new(3).normal_f32(n);
        let moment = |p: i32| x.par_iter().map(|v| (*v as f64).powi(p)).sum::<f64>() / n as f64;
        // Six standard deviations of each estimate: variances of x, x^2, x^3, x^4 are 1, 2, 15, 96.
        for (p, expected, variance) in [(1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)] {
            let got = moment(p);
            let bound = 6.0 * f64::sqrt(variance / n as f64);
            assert!((got - expected).abs() < bound, "moment {p}: {got}, expected {expected} within {bound}");
        }
        // P(|x| > k) for k = 1, 2, 3, 4.
        for (k, p) in [(1.0, 0.317_310_5), (2.0, 0.045_500_3), (3.0, 0.002_699_8), (4.0, 6.334e-5)] {
            let count = x.iter().filter(|v| v.abs() > k).count() as f64;
            let (mean, bound) = (p * n as f64, 6.0 * f64::sqrt(p * n as f64));
            assert!((count - mean).abs() < bound, "beyond {k}: {count}, expected {mean} within {bound}");
        }
        // Pairs are not correlated.
        let products = x.chunks_exact(2).map(|p| p[0] as f64 * p[1] as f64).sum::<f64>() / (n / 2) as f64;
        assert!(products.abs() < 6.0 / f64::sqrt(n as f64 / 2.0), "{products}");
        assert!(x.iter().all(|v| v.abs() < 6.7));
    }

    #[test]
    fn normal_is_box_and_muller() {
        let rng = Rng::new(9);
        for i in 0..100_000 {
            let bits = rng.bits(i);
            let radius = (-2.0 * (((bits >> 32) + 1) as f64 / 2f64.powi(32)).ln()).sqrt();
            let (sin, cos) = ((bits >> 8 & 0xFF_FFFF) as f64 / 2f64.powi(24) * std::f64::consts::FRAC_PI_4).sin_cos();
            let (a, b) = if bits & 1 == 0 { (cos, sin) } else { (sin, cos) };
            let signed = |bit: u32, v: f64| if bits >> bit & 1 == 0 { v } else { -v };
            for (got, exact) in [(rng.normal(2 * i), signed(1, radius * a)), (rng.normal(2 * i + 1), signed(2, radius * b))] {
                assert!((got as f64 - exact).abs() < 1e-5, "{i}: {got}, exactly {exact}");
            }
        }
        // The ends: u = 1 gives zeros, the smallest u the largest radius.
        assert_eq!(normal_pair(0xFFFF_FFFF_0000_0000), (0.0, 0.0));
        assert!((normal_pair(0).0 - 6.6604).abs() < 1e-3);
    }

    #[test]
    fn integers_are_in_range_and_uniform() {
        let rng = Rng::new(5);
        let mut counts = [0u32; 9];
        rng.ints_i32(90_000, -1, 8).iter().for_each(|v| counts[(v + 1) as usize] += 1);
        assert!(counts.iter().all(|c| (*c as f64 - 10_000.0).abs() < 6.0 * f64::sqrt(10_000.0)), "{counts:?}");
        assert!(rng.ints_i64(1000, i64::MIN, i64::MAX).iter().any(|v| *v < -(1 << 62)));
        assert!(rng.fill(1000, |r, i| r.unit(i)).iter().all(|v| (0.0..1.0).contains(v)));
        let mut seen = [false; 256];
        rng.bytes(10_000).iter().for_each(|b| seen[*b as usize] = true);
        assert!(seen.iter().all(|s| *s));
    }

    #[test]
    fn rand_float_is_finite_and_covers_exponents() {
        let mut small = false;
        let mut large = false;
        for seed in 0..200 {
            let x = Rng::new(seed).rand_float(100);
            assert!(x.iter().all(|v| v.abs() <= f32::MAX / 8.0));
            small |= x.iter().all(|v| v.abs() < 1e-20);
            large |= x.iter().any(|v| v.abs() > 1e30);
        }
        assert!(small && large);
    }
}
