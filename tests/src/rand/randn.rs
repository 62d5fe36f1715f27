//! randn: reference, cases, checks and benchmark.

use crate::support::bench::{Launch, Row};
use crate::support::cases::Depth;
use crate::support::compare::{Bits, equal, untouched};
use crate::support::device_math::{self, Function};
use crate::support::rng::philox;
use crate::support::suite::{Ctx, Report, Suite, ensure, text};
use ferrotile::half::bf16;
use ferrotile::rand::randn::{Args, CountedArgs};
use ferrotile::rand::{Generator, randn, randn_counted, randn_like, set_seed};
use ferrotile::{Buffer, DType, Device, Element, Stream};
use ferrotile_kernels::device::{LaunchConfig, Out};
use ferrotile_kernels::rand::randn as kernels;
use rayon::prelude::*;

/// The checks of this op.
pub const SUITE: Suite = Suite { op: "randn", run };

/// What lies around outputs.
const FILL: u8 = 0xA5;
const GUARD: u64 = 37;

/// The hash of section 19.
fn call_seed(s: u32) -> u32 {
    let mut z = s.wrapping_add(0x9E37_79B9);
    z = (z ^ (z >> 16)).wrapping_mul(0x21F0_AAAD);
    z = (z ^ (z >> 15)).wrapping_mul(0x735A_2D97);
    z ^ (z >> 15)
}

/// The words of block `block` of a call.
fn words(seed: u64, call: u64, block: u64) -> [u32; 4] {
    let key = [call_seed((seed as u32).wrapping_add(call as u32)), (seed >> 32) as u32];
    philox([block as u32, (block >> 32) as u32, call as u32, (call >> 32) as u32], key)
}

/// Radius, and the exact values of a pair but for the rounding of integers to f32.
fn exact_pair(first: u32, second: u32) -> (f64, [f64; 2]) {
    let u = ((first as i32 as f32).abs() + 0.5) as f64 / 2f64.powi(31);
    let radius = (-2.0 * u.ln()).sqrt();
    let (sin, cos) = (std::f64::consts::FRAC_PI_2 * (second as i32 as f64 / 2f64.powi(31))).sin_cos();
    let sign = if first >> 31 == 1 { -1.0 } else { 1.0 };
    (radius, [sign * radius * cos, radius * sin])
}

/// How far a value may be from the exact one: 0.6e-6 of the radius for the logarithm and as much for the sine, the rest for roundings.
fn bound(radius: f64) -> f64 {
    1.6e-6 * radius + 2e-9
}

/// Elements from `first` on are those of the call, up to the error of the polynomials.
fn near_exact(name: &str, seed: u64, call: u64, first: u64, got: &[f32]) -> Result<(), String> {
    let far = got.par_iter().enumerate().find_first(|(i, got)| {
        let at = first + *i as u64;
        let words = words(seed, call, at / 4);
        let pair = (at % 4 / 2 * 2) as usize;
        let (radius, values) = exact_pair(words[pair], words[pair + 1]);
        // NaN is far.
        let near = (**got as f64 - values[(at % 2) as usize]).abs() <= bound(radius);
        !near
    });
    far.map_or(Ok(()), |(i, got)| Err(format!("element {} is {got:e}, not what the call has; {name}", first + i as u64)))
}

/// A type of the output.
trait Value: Element + Bits + bytemuck::Pod {
    const NAME: &'static str;
    fn of(v: f32) -> Self;
    fn to(self) -> f32;
}
impl Value for f32 {
    const NAME: &'static str = "f32";
    fn of(v: f32) -> Self {
        v
    }
    fn to(self) -> f32 {
        self
    }
}
impl Value for bf16 {
    const NAME: &'static str = "bf16";
    fn of(v: f32) -> Self {
        bf16::from_f32(v)
    }
    fn to(self) -> f32 {
        self.to_f32()
    }
}

/// A call of the device under test, or of another one: `len` elements from element `offset` of a buffer on, whose rest stays as it is.
fn fill<T: Value>(device: &Device, generator: &Generator, shape: &[u64], offset: u64, name: &str) -> Result<Vec<T>, String> {
    let stream = device.stream().map_err(text)?;
    let len: u64 = shape.iter().product();
    let mut buffer = device.alloc::<T>((offset + len + GUARD) as usize).map_err(text)?;
    buffer.fill_bytes(FILL).map_err(text)?;
    let strides: Vec<u64> = (0..shape.len()).map(|i| shape[i + 1..].iter().product::<u64>().max(1)).collect();
    let out = buffer.strided_mut(shape, &strides, offset).map_err(text)?;
    generator.randn(&stream, Args { out }).map_err(text)?;
    stream.synchronize().map_err(text)?;
    let all = buffer.to_vec().map_err(text)?;
    untouched("out", name, &[0], &[1], &all[..offset as usize], FILL)?;
    untouched("out", name, &[0], &[1], &all[(offset + len) as usize..], FILL)?;
    Ok(all[offset as usize..(offset + len) as usize].to_vec())
}

/// Like the first call of seed `seed`, `T` being f32; bf16 is f32 rounded. The device has the bits that the emulator has.
fn check<T: Value>(ctx: &Ctx, seed: u64, shape: &[u64], offset: u64, name: &str) -> Result<Vec<T>, String> {
    let got = fill::<T>(&ctx.device, &Generator::new(seed), shape, offset, name)?;
    let singles = fill::<f32>(&Device::emulator(), &Generator::new(seed), shape, 0, name)?;
    near_exact(name, seed, 0, 0, &singles)?;
    let expected: Vec<T> = singles.iter().map(|v| T::of(*v)).collect();
    equal("out", name, shape, &got, &expected)?;
    Ok(got)
}

/// What section 19 asks of 2^20 elements and more.
fn check_moments(name: &str, x: &[impl Value]) -> Result<(), String> {
    let n = x.len() as f64;
    let (sum, square, above) = x
        .par_iter()
        .map(|v| (v.to() as f64, (v.to() as f64).powi(2), (v.to() > 0.0) as u64))
        .reduce(|| (0.0, 0.0, 0), |a, b| (a.0 + b.0, a.1 + b.1, a.2 + b.2));
    let mean = sum / n;
    let deviation = (square / n - mean * mean).sqrt();
    let share = above as f64 / n;
    ensure(
        mean.abs() < 0.02
            && (deviation - 1.0).abs() < 0.02
            && (share - 0.5).abs() < 0.02
            && x.par_iter().all(|v| v.to().is_finite()),
        || format!("mean {mean}, deviation {deviation}, share above 0 {share}; {name}"),
    )
}

/// Probability that a standard normal value lies below `x`, by Simpson's rule.
fn probability_below(x: f64) -> f64 {
    let density = |x: f64| (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
    let n = 2000;
    let h = x / n as f64;
    let inner: f64 = (1..n).map(|i| density(i as f64 * h) * if i % 2 == 1 { 4.0 } else { 2.0 }).sum();
    0.5 + (density(0.0) + inner + density(x)) * h / 3.0
}

/// Moments up to the fourth, all parts of the distribution, tails, and products of elements that are near each other, each within six
/// standard deviations of what independent normal values give.
fn check_distribution(name: &str, x: &[f32]) -> Result<(), String> {
    let n = x.len() as f64;
    for (power, expected, variance) in [(1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)] {
        let got = x.par_iter().map(|v| (*v as f64).powi(power)).sum::<f64>() / n;
        let bound = 6.0 * f64::sqrt(variance / n);
        ensure((got - expected).abs() < bound, || format!("moment {power}: {got}, expected {expected} within {bound}; {name}"))?;
    }
    // Squares of values that belong to the same radius, or to the same angle, may not be correlated either.
    for lag in [1, 2, 3, 4, 5, 8, 1024] {
        for power in [1, 2] {
            let centred = |v: f32| if power == 1 { v as f64 } else { (v as f64).powi(2) - 1.0 };
            let got = x.par_windows(lag + 1).map(|w| centred(w[0]) * centred(w[lag])).sum::<f64>() / n;
            let bound = 6.0 * power as f64 / n.sqrt();
            ensure(got.abs() < bound, || format!("lag {lag}, power {power}: correlation {got}, allowed {bound}; {name}"))?;
        }
    }
    // Chi-squared over bins of a quarter from -4 to 4.
    let edge = |i: usize| i as f64 / 4.0 - 4.0;
    let mut counts = vec![0u64; 34];
    x.iter().for_each(|v| counts[(((*v as f64 + 4.0) * 4.0).floor() + 1.0).clamp(0.0, 33.0) as usize] += 1);
    let below: Vec<f64> = (0..=32).map(|i| probability_below(edge(i))).collect();
    let expected = |i: usize| n * (below.get(i).unwrap_or(&1.0) - if i == 0 { 0.0 } else { below[i - 1] });
    let chi: f64 = (0..34).map(|i| (counts[i] as f64 - expected(i)).powi(2) / expected(i)).sum();
    let bound = 33.0 + 6.0 * f64::sqrt(66.0);
    ensure(chi < bound, || format!("chi-squared {chi} of 33 degrees, allowed {bound}; {name}"))
}

fn shapes() -> Vec<Vec<u64>> {
    vec![vec![1], vec![127, 129], vec![7, 11, 13], vec![16383], vec![16384], vec![16385], vec![1024, 1024]]
}

fn run(ctx: &Ctx) -> Result<Report, String> {
    if ctx.case("kind=known_answers") {
        check_known_answers()?;
    }
    for shape in shapes() {
        let name = format!("fmt=f32,shape={shape:?}");
        if ctx.case(&name) {
            let x = check::<f32>(ctx, 1, &shape, 0, &name)?;
            if x.len() >= 1 << 20 {
                check_moments(&name, &x)?;
                check_distribution(&name, &x)?;
            }
        }
        let name = format!("fmt=bf16,shape={shape:?}");
        if ctx.case(&name) {
            let x = check::<bf16>(ctx, 2, &shape, 0, &name)?;
            if x.len() >= 1 << 20 {
                check_moments(&name, &x)?;
            }
        }
    }
    // Lengths around vectors, blocks and launches, at every alignment.
    for len in [0, 1, 2, 3, 4, 5, 7, 8, 9, 31, 1023, 1025, 2047, 2048, 2049, 5000] {
        for offset in [0, 1, 2, 3, 4, 8] {
            let name = format!("len={len},offset={offset}");
            if ctx.case(&name) {
                let seed = 0xDEAD_BEEF_0000_0000 + len;
                check::<f32>(ctx, seed, &[len], offset, &format!("fmt=f32,{name}"))?;
                check::<bf16>(ctx, seed, &[len], offset, &format!("fmt=bf16,{name}"))?;
            }
        }
    }
    // More steps than one a block.
    let name = "len=6000001";
    if ctx.depth == Depth::Full && ctx.case(name) {
        check::<f32>(ctx, 3, &[6_000_001], 0, name)?;
        check::<bf16>(ctx, 3, &[6_000_001], 0, name)?;
    }
    check_calls(ctx)?;
    check_counted(ctx)?;
    check_parts(ctx)?;
    check_roots(ctx)?;
    if ctx.depth == Depth::Full {
        check_large::<f32>(ctx, &[4096, 262_144])?;
        check_large::<bf16>(ctx, &[4096, 262_144])?;
        // Beyond 2^31 elements.
        check_large::<bf16>(ctx, &[3, 1 << 30])?;
    }
    if !ctx.device.is_emulator() && ctx.case("kind=graph") {
        check_graph(&ctx.device)?;
    }
    Ok(ctx.report())
}

/// The vectors that come with the paper, for the reference and for the kernel's function.
fn check_known_answers() -> Result<(), String> {
    let ones = u32::MAX;
    for (counter, key, expected) in [
        ([0; 4], [0; 2], [0x6627_E8D5, 0xE169_C58D, 0xBC57_AC4C, 0x9B00_DBD8]),
        ([ones; 4], [ones; 2], [0x408F_276D, 0x41C8_3B0E, 0xA20B_C7C6, 0x6D54_51FD]),
        (
            [0x243F_6A88, 0x85A3_08D3, 0x1319_8A2E, 0x0370_7344],
            [0xA409_3822, 0x299F_31D0],
            [0xD16C_FE09, 0x94FD_CCEB, 0x5001_E420, 0x2412_6EA1],
        ),
    ] {
        for (what, got) in [("reference", philox(counter, key)), ("kernel", kernels::philox(counter, key))] {
            ensure(got == expected, || {
                format!("philox of {counter:x?} with key {key:x?}: {got:x?}, expected {expected:x?}; {what}")
            })?;
        }
    }
    Ok(())
}

/// Repeated, other calls, other seeds, and the generator of the process.
fn check_calls(ctx: &Ctx) -> Result<(), String> {
    let name = "kind=calls";
    if !ctx.case(name) {
        return Ok(());
    }
    let (device, shape) = (&ctx.device, [128, 8192]);
    let generator = Generator::new(9);
    let first: Vec<f32> = fill(device, &generator, &shape, 0, name)?;
    // Neither empty tensors nor refused calls count.
    fill::<f32>(device, &generator, &[0, 5], 0, name)?;
    let mut integers = device.alloc::<i32>(4).map_err(text)?;
    let stream = device.stream().map_err(text)?;
    ensure(generator.randn(&stream, Args { out: integers.tensor_mut(&[4]).map_err(text)? }).is_err(), || "took i32".to_owned())?;
    let second: Vec<f32> = fill(device, &generator, &[1000], 0, name)?;
    near_exact(name, 9, 0, 0, &first)?;
    near_exact(name, 9, 1, 0, &second)?;
    generator.set_seed(9);
    equal("the same seed", name, &shape, &fill(device, &generator, &shape, 0, name)?, &first)?;
    // Seed 9's second call is not seed 10's first, nor is anything else the same.
    let other: Vec<f32> = fill(device, &Generator::new(10), &[1000], 0, name)?;
    let high: Vec<f32> = fill(device, &Generator::new(9 + (1 << 32)), &[1000], 0, name)?;
    for (what, a, b) in [("calls", &first, &second), ("seeds", &second, &other), ("high seeds", &first, &high)] {
        let same = a.iter().zip(b).filter(|(a, b)| a == b).count();
        ensure(same < 3, || format!("{same} values of two {what} are equal; {name}"))?;
    }
    let (mut a, mut b) = (device.alloc::<f32>(1000).map_err(text)?, device.alloc::<f32>(1000).map_err(text)?);
    set_seed(9);
    randn(&stream, Args { out: a.tensor_mut(&[1000]).map_err(text)? }).map_err(text)?;
    randn_like(&stream, &a.tensor(&[10, 100]).map_err(text)?, Args { out: b.tensor_mut(&[10, 100]).map_err(text)? })
        .map_err(text)?;
    equal("randn", name, &[1000], &a.to_vec().map_err(text)?, &first[..1000])?;
    equal("randn_like", name, &[1000], &b.to_vec().map_err(text)?, &second)?;
    let wrong = [
        randn_like(&stream, &a.tensor(&[100, 10]).map_err(text)?, Args { out: b.tensor_mut(&[10, 100]).map_err(text)? }),
        randn_like(&stream, &integers.tensor(&[4]).map_err(text)?, Args { out: b.tensor_mut(&[4]).map_err(text)? }),
    ];
    ensure(wrong.iter().all(Result::is_err), || format!("unlike tensors were accepted; {name}"))
}

/// Counted in device memory, as the generator on the host counts.
fn check_counted(ctx: &Ctx) -> Result<(), String> {
    for seed in [7, -1, i64::MIN + 5] {
        let name = format!("kind=counted,seed={seed}");
        if !ctx.case(&name) {
            continue;
        }
        let (device, stream) = (&ctx.device, ctx.device.stream().map_err(text)?);
        let generator = Generator::new(seed as u64);
        let mut state = device.upload(&[seed, 0]).map_err(text)?;
        for call in 0..3 {
            let (mut singles, mut halves) = (device.alloc::<f32>(3001).map_err(text)?, device.alloc::<bf16>(3001).map_err(text)?);
            let args =
                CountedArgs { state: state.tensor_mut(&[2]).map_err(text)?, out: singles.tensor_mut(&[3001]).map_err(text)? };
            randn_counted(&stream, args).map_err(text)?;
            let expected = fill(device, &generator, &[3001], 0, &name)?;
            equal("out", &name, &[3001], &singles.to_vec().map_err(text)?, &expected)?;
            let args =
                CountedArgs { state: state.tensor_mut(&[2]).map_err(text)?, out: halves.tensor_mut(&[3001]).map_err(text)? };
            randn_counted(&stream, args).map_err(text)?;
            let expected = fill(device, &generator, &[3001], 0, &name)?;
            equal("out", &name, &[3001], &halves.to_vec().map_err(text)?, &expected)?;
            equal("state", &name, &[2], &state.to_vec().map_err(text)?, &[seed, 2 * call + 2])?;
        }
        let mut nothing = device.alloc::<f32>(0).map_err(text)?;
        let args = CountedArgs { state: state.tensor_mut(&[2]).map_err(text)?, out: nothing.tensor_mut(&[0]).map_err(text)? };
        randn_counted(&stream, args).map_err(text)?;
        equal("state", &name, &[2], &state.to_vec().map_err(text)?, &[seed, 6])?;
    }
    Ok(())
}

/// Launches of a call beyond the first, of which a small piece is made, and blocks with several steps.
fn check_parts(ctx: &Ctx) -> Result<(), String> {
    for (launch, steps) in [(1, 1), (2, 3), (5, 2)] {
        let name = format!("kind=parts,launch={launch},steps={steps}");
        if !ctx.case(&name) {
            continue;
        }
        let (device, len) = (&ctx.device, 9001u64);
        let stream = device.stream().map_err(text)?;
        let buffer: Buffer<f32> = device.alloc(len as usize).map_err(text)?;
        let key = [call_seed(11), 0];
        let args = kernels::fill::Args {
            out: Out::new(buffer.as_ptr(), 4 * len),
            num_elements: len,
            num_vectors: (len / 4) as u32,
            steps,
            launch,
            key0: key[0],
            key1: key[1],
            calls0: 0,
            calls1: 0,
        };
        let blocks = len.div_ceil(kernels::STEP * steps as u64) as u32;
        stream.launch("randn", &kernels::fill::f32, &LaunchConfig::new(blocks, kernels::THREADS), &args).map_err(text)?;
        stream.synchronize().map_err(text)?;
        near_exact(&name, 11, 0, launch as u64 * kernels::MAX_ELEMENTS, &buffer.to_vec().map_err(text)?)?;
    }
    Ok(())
}

/// The short root is the IEEE one for all mantissas, and at the ends of the range that is asked for.
fn check_roots(ctx: &Ctx) -> Result<(), String> {
    let name = "kind=roots";
    if !ctx.case(name) {
        return Ok(());
    }
    let step = if ctx.device.is_emulator() { 101 } else { 1 };
    let two_binades = (1f32.to_bits()..4f32.to_bits()).step_by(step);
    let all_exponents = (2f32.powi(-100).to_bits()..2f32.powi(126).to_bits()).step_by(100_003);
    let x: Vec<f32> = two_binades.chain(all_exponents).map(f32::from_bits).collect();
    let expected: Vec<f32> = x.par_iter().map(|v| v.sqrt()).collect();
    equal("sqrt_normal", name, &[x.len() as u64], &device_math::map(&ctx.device, Function::SqrtNormal, &x)?, &expected)
}

/// Gigabytes: the ends are those of the call, and all of it is normal.
fn check_large<T: Value>(ctx: &Ctx, shape: &[u64]) -> Result<(), String> {
    let name = format!("fmt={},shape={shape:?}", T::NAME);
    if ctx.device.is_emulator() || !ctx.case(&name) {
        return Ok(());
    }
    let len: u64 = shape.iter().product();
    let stream = ctx.device.stream().map_err(text)?;
    let mut buffer = ctx.device.alloc::<T>(len as usize).map_err(text)?;
    Generator::new(4).randn(&stream, Args { out: buffer.tensor_mut(shape).map_err(text)? }).map_err(text)?;
    let piece = 1u64 << 20;
    for first in [0, len / 2 - 12, len - piece] {
        let mut part = ctx.device.alloc::<T>(piece as usize).map_err(text)?;
        let from = buffer.strided(&[piece], &[1], first).map_err(text)?;
        stream.copy(&mut part.tensor_mut(&[piece]).map_err(text)?, &from).map_err(text)?;
        stream.synchronize().map_err(text)?;
        let got = part.to_vec().map_err(text)?;
        if T::DTYPE == DType::F32 {
            let singles: Vec<f32> = got.iter().map(|v| v.to()).collect();
            near_exact(&name, 4, 0, first, &singles)?;
        }
        check_moments(&name, &got)?;
        // Rounded, a value is within half a step of what is near the exact one.
        let far = got.par_iter().enumerate().any(|(i, v)| {
            let at = first + i as u64;
            let words = words(4, 0, at / 4);
            let pair = (at % 4 / 2 * 2) as usize;
            let (radius, values) = exact_pair(words[pair], words[pair + 1]);
            let exact = values[(at % 2) as usize];
            let near = (v.to() as f64 - exact).abs() <= exact.abs() / 256.0 + bound(radius);
            !near
        });
        ensure(!far, || format!("elements from {first} on are not those of the call; {name}"))?;
    }
    Ok(())
}

/// Every replay is a call.
fn check_graph(device: &Device) -> Result<(), String> {
    let stream = device.stream().map_err(text)?;
    let (seed, len) = (21, 70_001);
    let mut state = device.upload(&[seed as i64, 0]).map_err(text)?;
    let mut out = device.alloc::<f32>(len).map_err(text)?;
    let graph = stream
        .capture(|stream| {
            randn_counted(stream, CountedArgs { state: state.tensor_mut(&[2])?, out: out.tensor_mut(&[len as u64])? })
        })
        .map_err(text)?;
    for call in 0..4 {
        graph.launch(&stream).map_err(text)?;
        stream.synchronize().map_err(text)?;
        near_exact("graph", seed, call, 0, &out.to_vec().map_err(text)?)?;
    }
    Ok(())
}

/// The peer's cases, small ones, and one that counts on the device.
pub fn bench() -> Vec<Row> {
    fn build<T: Value>(device: &Device, rows: u64, columns: u64, counted: bool) -> Result<Launch, String> {
        let generator = Generator::new(1);
        let mut state = device.upload(&[1i64, 0]).map_err(text)?;
        let mut out = device.alloc::<T>((rows * columns) as usize).map_err(text)?;
        Ok(Box::new(move |stream: &Stream| {
            let out = out.tensor_mut(&[rows, columns])?;
            if counted {
                randn_counted(stream, CountedArgs { state: state.tensor_mut(&[2])?, out })
            } else {
                generator.randn(stream, Args { out })
            }
        }))
    }
    let mut rows = Vec::new();
    let mut row = |t: u64, h: u64, f32s: bool, counted: bool| {
        let (name, size) = if f32s { ("f32", 4) } else { ("bf16", 2) };
        let counted_name = if counted { "counted=1," } else { "" };
        rows.push(Row {
            op: "randn",
            case: format!("{counted_name}dtype={name},shape={t}x{h}"),
            bytes: size * t * h,
            build: Box::new(
                move |device, _| {
                    if f32s { build::<f32>(device, t, h, counted) } else { build::<bf16>(device, t, h, counted) }
                },
            ),
        });
    };
    for f32s in [true, false] {
        for (t, h) in [(4096, 262_144), (4096, 4096), (1024, 1024), (128, 7168), (16, 7168), (1, 7168)] {
            row(t, h, f32s, false);
        }
        row(4096, 4096, f32s, true);
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::support::rng::{Rng, philox};
    use ferrotile::{Error, TensorMut};
    use proptest::prelude::{ProptestConfig, prop_assert_eq, proptest};

    #[test]
    fn suite() {
        SUITE.test();
    }

    /// The kernel's Philox, key and pair are those of the reference, and the pair is near the exact one everywhere.
    #[test]
    fn kernel_functions_are_those_of_the_reference() {
        let rng = Rng::new(1);
        for i in 0..2000 {
            let word = |n| rng.stream(n).bits(i) as u32;
            let (counter, key) = ([word(0), word(1), word(2), word(3)], [word(4), word(5)]);
            assert_eq!(kernels::philox(counter, key), philox(counter, key));
            let (seed, call) = (rng.stream(6).bits(i), rng.stream(7).bits(i));
            let of_kernel = kernels::Call::new(seed, call);
            let block = 3 + i;
            let got = kernels::philox([block as u32, 0, of_kernel.counter[0], of_kernel.counter[1]], of_kernel.key);
            assert_eq!(got, words(seed, call, block));
        }
        let edges =
            [0u32, 1, 2, 3, 0x7F, 0x80, 0xFF_FFFF, 0x100_0001, 0x3FFF_FFFF, 0x4000_0000, 0x5555_5555, 0x7FFF_FF00, 0x7FFF_FFFF];
        let all: Vec<u32> =
            edges.iter().flat_map(|w| [*w, w.wrapping_neg(), !w]).chain((0..400).map(|i| rng.bits(i) as u32)).collect();
        for &first in &all {
            for &second in &all {
                let (radius, exact) = exact_pair(first, second);
                let got = kernels::normal_pair([first, second]);
                let near = got.iter().zip(exact).all(|(got, exact)| (*got as f64 - exact).abs() <= bound(radius));
                assert!(near, "{first:#x} {second:#x}: {got:?}, exactly {exact:?}");
                assert!(got.iter().all(|v| v.abs() <= 6.67));
            }
        }
    }

    /// All angles, and all mantissas of u, have the errors that the docs name.
    #[test]
    fn polynomials_are_as_near_as_documented() {
        let errors = (0..1u32 << 22).into_par_iter().map(|i| {
            // A quarter of 2^24 mantissas and angles: radii of u in (2^-8, 1], angles of [-pi/2, pi/2).
            let (first, second) = (0x7FFF_FFFF - ((i << 9) & 0x7FFF_FFFF), i << 10);
            let (radius, exact) = exact_pair(first, second);
            let got = kernels::normal_pair([first, second]);
            (0..2).map(|j| (got[j] as f64 - exact[j]).abs() / (radius + 1e-3)).fold(0.0, f64::max)
        });
        let worst = errors.reduce(|| 0.0, f64::max);
        assert!(worst < 1.6e-6 && worst > 1e-8, "{worst}");
    }

    #[test]
    fn bad_input_is_refused_and_nothing_is_written() {
        let device = Device::emulator();
        let stream = device.stream().unwrap();
        let generator = Generator::new(0);
        let mut out = device.upload(&[-7f32; 64]).unwrap();
        let mut words = device.upload(&[3i32; 64]).unwrap();
        let mut elsewhere = device.checked().zeros::<f32>(64).unwrap();
        let mut state = device.upload(&[5i64; 8]).unwrap();
        let error = generator.randn(&stream, Args { out: words.tensor_mut(&[8]).unwrap() });
        assert!(matches!(error, Err(Error::DType { op: "randn", arg: "out", .. })));
        let error = generator.randn(&stream, Args { out: out.strided_mut(&[4, 4], &[5, 1], 0).unwrap() });
        assert!(matches!(error, Err(Error::Layout { op: "randn", arg: "out", .. })));
        let error = generator.randn(&stream, Args { out: elsewhere.tensor_mut(&[8]).unwrap() });
        assert!(matches!(error, Err(Error::DeviceMismatch { op: "randn", arg: "out", .. })));
        let over = |address: u64, dtype: DType, len: u64| {
            // SAFETY: the calls that get it are refused before anything is written.
            unsafe { TensorMut::from_raw(&device, address, dtype, &[len], &[1]) }.unwrap()
        };
        let error = generator.randn(&stream, Args { out: over(out.as_ptr() + 2, DType::F32, 8) });
        assert!(matches!(error, Err(Error::Layout { op: "randn", arg: "out", .. })));
        let error = randn_like(&stream, &words.tensor(&[8]).unwrap(), Args { out: out.tensor_mut(&[8]).unwrap() });
        assert!(matches!(error, Err(Error::DType { op: "randn", arg: "out", .. })));
        let counted = |state: TensorMut<'_>, at: Option<u64>| {
            let out = over(at.unwrap_or(out.as_ptr()), DType::F32, 8);
            randn_counted(&stream, CountedArgs { state, out }).unwrap_err()
        };
        assert!(matches!(counted(words.tensor_mut(&[2]).unwrap(), None), Error::DType { arg: "state", .. }));
        assert!(matches!(counted(state.tensor_mut(&[3]).unwrap(), None), Error::Shape { arg: "state", .. }));
        assert!(matches!(counted(state.strided_mut(&[2], &[2], 0).unwrap(), None), Error::Layout { arg: "state", .. }));
        let at = state.as_ptr();
        assert!(matches!(counted(over(at + 4, DType::I64, 2), None), Error::Layout { arg: "state", .. }));
        assert!(matches!(counted(over(at, DType::I64, 2), Some(at + 8)), Error::Overlap { a: "state", b: "out", .. }));
        assert!(matches!(counted(over(elsewhere.as_ptr(), DType::I64, 2), Some(at + 2)), Error::Layout { arg: "out", .. }));
        assert_eq!(out.to_vec().unwrap(), [-7.0; 64]);
        assert_eq!(state.to_vec().unwrap(), [5; 8]);
        // None of it was a call.
        generator.randn(&stream, Args { out: out.tensor_mut(&[64]).unwrap() }).unwrap();
        near_exact("after errors", 0, 0, 0, &out.to_vec().unwrap()).unwrap();
    }

    /// Many threads take as many different calls.
    #[test]
    fn threads_share_a_generator() {
        let generator = Generator::new(77);
        let mut firsts: Vec<u32> = (0..64)
            .into_par_iter()
            .map(|_| fill::<f32>(&Device::emulator(), &generator, &[4], 0, "threads").unwrap()[0].to_bits())
            .collect();
        let value = |call| kernels::normal_pair([words(77, call, 0)[0], words(77, call, 0)[1]])[0].to_bits();
        let mut expected: Vec<u32> = (0..64).map(value).collect();
        firsts.sort_unstable();
        expected.sort_unstable();
        assert_eq!(firsts, expected);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn any_length_and_place(len in 0u64..9000, offset in 0u64..17, seed: u64) {
            let ctx = Ctx::new(Device::emulator(), Depth::Small);
            prop_assert_eq!(check::<bf16>(&ctx, seed, &[len], offset, "random").map(|_| ()), Ok(()));
            prop_assert_eq!(check::<f32>(&ctx, seed, &[len], offset, "random").map(|_| ()), Ok(()));
        }
    }
}
