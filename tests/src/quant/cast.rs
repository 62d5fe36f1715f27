//! Reference, cases, checks and benchmark rows of `cast`.
//!
//! bf16 and f16 come from the `half` crate, e4m3 from counting steps; what is to be rounded passes through f32, which holds every
//! value of the other types.

use super::per_token_cast::{decode_e4m3, encode_e4m3, neighbour, random_words, round_stochastically};
use crate::device::num::awkward_f32;
use crate::support::bench::{Launch, Row};
use crate::support::cases::Depth;
use crate::support::compare;
use crate::support::golden::{self, Golden};
use crate::support::inputs::{self, BLOCK};
use crate::support::rng::Rng;
use crate::support::suite::{Ctx, Report, Suite, ensure, text};
use ferrotile::quant::Format;
use ferrotile::quant::cast::{Args, cast};
use ferrotile::{Buffer, DType, Device, Stream, TensorMut, TensorRef};
use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::Dtype;

/// What the `check` binary runs.
pub const SUITE: Suite = Suite { op: "cast", run };

const TYPES: [DType; 4] = [DType::F32, DType::Bf16, DType::F16, DType::E4m3];
/// What NVIDIA's conversions make of NaN.
const NAN: f32 = f32::from_bits(0x7FFF_FFFF);

/// The value that the bits of an element stand for.
fn decode(dtype: DType, bits: u32) -> f32 {
    let value = match dtype {
        // bf16 is the upper half of an f32, NaN too.
        DType::F32 => return f32::from_bits(bits),
        DType::Bf16 => return f32::from_bits(bits << 16),
        DType::F16 => f16::from_bits(bits as u16).to_f32(),
        _ => decode_e4m3(bits as u8),
    };
    if value.is_nan() { NAN } else { value }
}

/// The bits of the nearest element.
fn encode(dtype: DType, v: f32) -> u32 {
    match dtype {
        DType::F32 => v.to_bits(),
        DType::Bf16 if v.is_nan() => 0x7FFF,
        DType::Bf16 => bf16::from_f32(v).to_bits().into(),
        DType::F16 if v.is_nan() => 0x7FFF,
        DType::F16 => f16::from_f32(v).to_bits().into(),
        _ => encode_e4m3(v).into(),
    }
}

/// What the op computes, on the bits of elements.
fn reference(from: DType, to: DType, x: &[u32], stochastic: bool) -> Vec<u32> {
    if from == to {
        return x.to_vec();
    }
    if !stochastic {
        return x.par_iter().map(|bits| encode(to, decode(from, *bits))).collect();
    }
    let mut out = vec![0; x.len()];
    out.par_chunks_mut(4).zip(x.par_chunks(4)).enumerate().for_each(|(i, (out, quad))| {
        let mut v = [0f32; 4];
        v.iter_mut().zip(quad).for_each(|(v, bits)| *v = decode(from, *bits));
        if to == DType::E4m3 {
            let codes = round_e4m3(v, i as u32);
            return out.iter_mut().zip(codes).for_each(|(out, code)| *out = code.into());
        }
        let words = random_words(v.map(f32::to_bits), i as u32);
        for (j, out) in out.iter_mut().enumerate() {
            // The largest bf16; what is beyond it stays it.
            let largest = f32::from_bits(0x7F7F_0000);
            let random = (words[j / 2] >> (16 * (j % 2))) as u16;
            *out = encode(to, neighbour(v[j], random, largest, -126, 128.0));
        }
    });
    out
}

/// Codes of four values; those of NaN are hashed with their own bits here, as there is no product that would change them.
fn round_e4m3(v: [f32; 4], quad: u32) -> [u8; 4] {
    let r = random_words(v.map(f32::to_bits), quad)[0];
    let bits = [r as u16, (r as u16).reverse_bits(), (r >> 16) as u16, ((r >> 16) as u16).reverse_bits()];
    let codes = std::array::from_fn(|i| encode_e4m3(neighbour(v[i], bits[i], 448.0, -6, 8.0)));
    assert!(v.iter().any(|v| v.is_nan()) || codes == round_stochastically(&v, quad, Format::E4m3));
    codes
}

/// Elements as bytes.
fn to_bytes(dtype: DType, elements: &[u32]) -> Vec<u8> {
    match dtype.size() {
        1 => elements.par_iter().map(|bits| *bits as u8).collect(),
        2 => bytemuck::cast_slice(&elements.par_iter().map(|bits| *bits as u16).collect::<Vec<_>>()).to_vec(),
        _ => bytemuck::cast_slice(elements).to_vec(),
    }
}

fn from_bytes(dtype: DType, bytes: &[u8]) -> Vec<u32> {
    match dtype.size() {
        1 => bytes.par_iter().map(|byte| *byte as u32).collect(),
        2 => bytes.par_chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]) as u32).collect(),
        _ => bytes.par_chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
    }
}

/// Bytes behind an output that must stay as they are.
const GUARD: u64 = 64;
const FILL: u8 = 0xA5;

/// Input and output of a call; each starts some elements into its buffer.
struct Tensors {
    x: Buffer<u8>,
    out: Buffer<u8>,
    from: (DType, u64),
    to: (DType, u64),
    shape: Vec<u64>,
}

impl Tensors {
    fn new(device: &Device, from: (DType, u64), to: (DType, u64), shape: &[u64], x: &[u32]) -> Result<Self, String> {
        let before = vec![FILL; (from.1 * from.0.size()) as usize];
        let bytes = [before, to_bytes(from.0, x)].concat();
        let mut out = device.alloc::<u8>(((to.1 + x.len() as u64) * to.0.size() + GUARD) as usize).map_err(text)?;
        out.fill_bytes(FILL).map_err(text)?;
        Ok(Self { x: device.upload(&bytes).map_err(text)?, out, from, to, shape: shape.to_vec() })
    }

    fn cast(&mut self, stream: &Stream, stochastic: bool) -> ferrotile::Result<()> {
        let strides: Vec<u64> = (0..self.shape.len()).map(|i| self.shape[i + 1..].iter().product()).collect();
        let at = |buffer: &Buffer<u8>, (dtype, offset): (DType, u64)| buffer.as_ptr() + offset * dtype.size();
        // SAFETY: the buffers have room for these elements, and outlive the call.
        let (x, out) = unsafe {
            let device = self.x.device();
            (
                TensorRef::from_raw(device, at(&self.x, self.from), self.from.0, &self.shape, &strides)?,
                TensorMut::from_raw(device, at(&self.out, self.to), self.to.0, &self.shape, &strides)?,
            )
        };
        cast(stream, Args { x, out, stochastic })
    }

    fn check(&self, name: &str, expected: &[u32]) -> Result<(), String> {
        let all = self.out.to_vec().map_err(text)?;
        let start = (self.to.1 * self.to.0.size()) as usize;
        let end = all.len() - GUARD as usize;
        ensure(all[..start].iter().chain(&all[end..]).all(|b| *b == FILL), || {
            format!("bytes outside `out` were written; {name}")
        })?;
        compare::equal("out", name, &[expected.len() as u64], &from_bytes(self.to.0, &all[start..end]), expected)
    }
}

/// One input, converted to a type.
#[derive(Clone, Copy)]
struct Case<'a> {
    from: (DType, u64),
    to: (DType, u64),
    shape: &'a [u64],
    kind: &'a str,
    stochastic: bool,
}

fn check(ctx: &Ctx, case: Case<'_>, x: &[u32]) -> Result<(), String> {
    let Case { from, to, shape, kind, stochastic } = case;
    let name =
        format!("from={},kind={kind},offsets={}+{},shape={shape:?},stochastic={stochastic},to={}", from.0, from.1, to.1, to.0);
    if !ctx.case(&name) {
        return Ok(());
    }
    let stream = ctx.device.stream().map_err(text)?;
    let mut tensors = Tensors::new(&ctx.device, from, to, shape, x)?;
    for _ in 0..if ctx.depth == Depth::Small { 1 } else { 2 } {
        tensors.cast(&stream, stochastic).map_err(|e| format!("{e}; {name}"))?;
    }
    tensors.check(&name, &reference(from.0, to.0, x, stochastic))
}

fn may_be_stochastic(from: DType, to: DType) -> bool {
    matches!((from, to), (DType::F32, DType::Bf16 | DType::E4m3) | (DType::Bf16, DType::E4m3))
}

/// All elements of a type, for f32 the awkward ones; about `most` of them.
fn all_elements(dtype: DType, most: usize) -> Vec<u32> {
    let all: Vec<u32> = match dtype {
        DType::F32 => awkward_f32().iter().map(|v| v.to_bits()).collect(),
        DType::E4m3 => (0..0x100).collect(),
        _ => (0..0x10000).collect(),
    };
    // An odd step visits even and odd elements.
    let step = (all.len() / most) | 1;
    all.into_iter().step_by(step).collect()
}

/// Normal values times powers of two, so that all formats get something to round and to cut off.
fn elements(dtype: DType, n: u64, name: &str) -> Vec<u32> {
    let power = |i: u64| f32::from_bits((127 - 14 + i as u32) << 23);
    Rng::named(name).fill(n as usize, |rng, i| encode(dtype, rng.normal(i) * power(rng.bits(i ^ 1 << 40) % 24)))
}

fn run(ctx: &Ctx) -> Result<Report, String> {
    let full = ctx.depth == Depth::Full;
    for from in TYPES {
        let all = all_elements(from, if full { usize::MAX } else { 6_000 });
        let large = elements(from, if full { 2001 * 7168 + 4 } else { 0 }, &format!("cast {from} large"));
        for to in TYPES {
            for stochastic in [false, true] {
                if stochastic && !may_be_stochastic(from, to) {
                    continue;
                }
                let case = Case { from: (from, 0), to: (to, 0), shape: &[all.len() as u64], kind: "all", stochastic };
                check(ctx, case, &all)?;
                // Around vectors, quads and blocks, and tensors that start at any element.
                for (i, n) in [0u64, 1, 3, 4, 5, 7, 8, 9, 63, 1023, 1024, 1025, 2047, 2052, 4099].into_iter().enumerate() {
                    let x = elements(from, n, &format!("cast {from} {n}"));
                    let offsets: &[(u64, u64)] = if i % 3 == 0 { &[(0, 0), (1, 0), (0, 1), (4, 3)] } else { &[(0, 0), (8, 16)] };
                    for &(a, b) in offsets {
                        check(ctx, Case { from: (from, a), to: (to, b), shape: &[n], kind: "normal", ..case }, &x)?;
                    }
                }
                let x = elements(from, 2 * 3 * 5 * 11, "cast 4d");
                check(ctx, Case { shape: &[2, 3, 5, 11], kind: "normal", ..case }, &x)?;
                check(ctx, Case { shape: &[3, 0, 5], kind: "normal", ..case }, &[])?;
                if full {
                    check(ctx, Case { shape: &[large.len() as u64], kind: "normal", ..case }, &large)?;
                }
            }
        }
    }
    if !ctx.device.is_emulator() {
        check_graph(ctx)?;
        if full {
            check_large(ctx)?;
        }
    }
    let notes = golden::check_cases(ctx, &["cast"], |golden, case| check_golden(ctx, golden, case))?;
    Ok(Report { notes, ..ctx.report() })
}

/// What 2.1.0 computed.
fn check_golden(ctx: &Ctx, golden: &Golden, case: &golden::Case) -> Result<(), String> {
    let dtype = |dtype| match dtype {
        Dtype::F32 => Ok(DType::F32),
        Dtype::BF16 => Ok(DType::Bf16),
        Dtype::F8_E4M3 => Ok(DType::E4m3),
        other => Err(format!("{}: a tensor of {other:?}", case.name())),
    };
    let (x, out) = (golden.tensor(case, "in/x")?, golden.tensor(case, "out/")?);
    let (from, to) = (dtype(x.dtype)?, dtype(out.dtype)?);
    let stream = ctx.device.stream().map_err(text)?;
    let mut tensors = Tensors::new(&ctx.device, (from, 0), (to, 0), &x.shape, &from_bytes(from, x.bytes))?;
    tensors.cast(&stream, false).map_err(text)?;
    tensors.check(&case.name(), &from_bytes(to, out.bytes))
}

/// Recorded in a graph and replayed: an aligned cast, a stochastic one, one of other alignment, and a copy.
fn check_graph(ctx: &Ctx) -> Result<(), String> {
    let name = "kind=graph";
    if !ctx.case(name) {
        return Ok(());
    }
    let n = 5003u64;
    let x = elements(DType::F32, n, "cast graph");
    let (f32, e4m3, bf16) = (DType::F32, DType::E4m3, DType::Bf16);
    let make = |from, to| Tensors::new(&ctx.device, from, to, &[n], &x);
    let mut casts = [
        (make((f32, 0), (bf16, 0))?, false),
        (make((f32, 0), (e4m3, 0))?, true),
        (make((f32, 1), (bf16, 3))?, false),
        (make((f32, 0), (f32, 0))?, false),
    ];
    let stream = ctx.device.stream().map_err(text)?;
    let graph = stream.capture(|s| casts.iter_mut().try_for_each(|(tensors, stochastic)| tensors.cast(s, *stochastic)));
    let graph = graph.map_err(text)?;
    for _ in 0..2 {
        casts.iter_mut().try_for_each(|(tensors, _)| tensors.out.fill_bytes(FILL)).map_err(text)?;
        graph.launch(&stream).map_err(text)?;
        stream.synchronize().map_err(text)?;
        for (tensors, stochastic) in &casts {
            tensors.check(name, &reference(f32, tensors.to.0, &x, *stochastic))?;
        }
    }
    Ok(())
}

/// More than 2^31 elements and 2^32 bytes: what lies at the beginning, around both borders and at the end.
fn check_large(ctx: &Ctx) -> Result<(), String> {
    let name = "kind=large";
    if !ctx.case(name) {
        return Ok(());
    }
    let device = &ctx.device;
    let n = (1u64 << 31) + 1029;
    let stream = device.stream().map_err(text)?;
    let piece: Vec<bf16> = (0..512).map(|i| bf16::from_f32(Rng::new(7).normal(i))).collect();
    let expected: Vec<u8> = piece.iter().map(|v| encode_e4m3(v.to_f32())).collect();
    let mut x = device.zeros::<bf16>(n as usize).map_err(text)?;
    let from = device.upload(&piece).map_err(text)?;
    let mut out = device.alloc::<u8>(n as usize).map_err(text)?;
    let starts = [0, (1 << 30) - 256, (1 << 31) - 256, n - 512];
    for start in starts {
        let mut to = x.strided_mut(&[512], &[1], start).map_err(text)?;
        stream.copy(&mut to, &from.tensor(&[512]).map_err(text)?).map_err(text)?;
    }
    let args = Args {
        x: x.tensor(&[n]).map_err(text)?,
        out: out.tensor_mut(&[n]).map_err(text)?.reinterpret(DType::E4m3).map_err(text)?,
        stochastic: false,
    };
    cast(&stream, args).map_err(text)?;
    let mut one = device.alloc::<u8>(512).map_err(text)?;
    for start in starts {
        let found = out.strided(&[512], &[1], start).map_err(text)?;
        stream.copy(&mut one.tensor_mut(&[512]).map_err(text)?, &found).map_err(text)?;
        stream.synchronize().map_err(text)?;
        compare::equal("out", &format!("{name},start={start}"), &[512], &one.to_vec().map_err(text)?, &expected)?;
    }
    Ok(())
}

/// A row of the benchmark.
fn row(from: DType, to: DType, (t, h): (u64, u64), stochastic: bool) -> Row {
    let rounding = if stochastic { ",rounding=stochastic" } else { "" };
    let build = move |device: &Device, _: &Stream| -> Result<Launch, String> {
        let mut tensors = Tensors::new(device, (from, 0), (to, 0), &[0, h], &[])?;
        let block = Rng::named("cast benchmark").fill(BLOCK as usize, |rng, i| encode(from, rng.normal(i)));
        tensors.x = inputs::repeated(device, &to_bytes(from, &block), t * h * from.size())?;
        tensors.out = device.alloc((t * h * to.size()) as usize).map_err(text)?;
        tensors.shape = vec![t, h];
        Ok(Box::new(move |stream| tensors.cast(stream, stochastic)))
    };
    Row {
        op: "cast",
        case: format!("h={h},input={from},out={to}{rounding},t={t}"),
        bytes: t * h * (from.size() + to.size()),
        build: Box::new(build),
    }
}

/// The peer's case, other types, stochastic rounding, and small inputs.
pub fn bench() -> Vec<Row> {
    let large = (8064, 7168);
    let (f32, bf16, e4m3) = (DType::F32, DType::Bf16, DType::E4m3);
    let mut rows = vec![row(f32, bf16, large, false)];
    rows.extend([(f32, e4m3), (bf16, f32), (bf16, e4m3), (e4m3, f32), (e4m3, bf16)].map(|(a, b)| row(a, b, large, false)));
    rows.extend([(f32, bf16), (f32, e4m3), (bf16, e4m3)].map(|(a, b)| row(a, b, large, true)));
    rows.extend([1, 16, 128].map(|t| row(f32, bf16, (t, 7168), false)));
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferrotile::{E4m3, Error};
    use proptest::prelude::{ProptestConfig, any, proptest};

    #[test]
    fn suite() {
        SUITE.test();
    }

    /// Rounding errors of many different values average to zero, and equal inputs give equal outputs.
    #[test]
    fn stochastic_rounding_is_unbiased() {
        let device = Device::emulator();
        let stream = device.stream().unwrap();
        let n = 1u64 << 16;
        let x = Rng::named("cast unbiased").normal_f32(n as usize);
        let bits: Vec<u32> = x.iter().map(|v| v.to_bits()).collect();
        for (to, steps) in [(DType::Bf16, 128.0), (DType::E4m3, 8.0)] {
            let mut tensors = Tensors::new(&device, (DType::F32, 0), (to, 0), &[n], &bits).unwrap();
            tensors.cast(&stream, true).unwrap();
            let got = from_bytes(to, &tensors.out.to_vec().unwrap()[..(n * to.size()) as usize]);
            // Errors in units of the spacing have a standard deviation of at most a half each.
            let smallest = if to == DType::Bf16 { -126 } else { -6 };
            let error = |i: usize| {
                let binade = ((x[i].abs().to_bits() >> 23) as i32 - 127).max(smallest);
                (decode(to, got[i]) as f64 - x[i] as f64) / (2f64.powi(binade) / steps)
            };
            let errors: Vec<f64> = (0..n as usize).map(error).collect();
            assert!(errors.iter().all(|e| e.abs() < 1.0), "{to}: no neighbour");
            let (sum, bound) = (errors.iter().sum::<f64>(), 5.0 * 0.5 * (n as f64).sqrt());
            assert!(sum.abs() < bound, "{to}: {sum}, allowed {bound}");
            // Signs apart, so that a bias toward or away from zero does not cancel.
            let away: f64 = errors.iter().zip(&x).map(|(e, x)| e * x.signum() as f64).sum();
            assert!(away.abs() < bound, "{to}: away from zero {away}, allowed {bound}");
            let mut again = Tensors::new(&device, (DType::F32, 0), (to, 0), &[n], &bits).unwrap();
            again.cast(&stream, true).unwrap();
            assert_eq!(again.out.to_vec().unwrap(), tensors.out.to_vec().unwrap());
        }
    }

    #[test]
    fn bad_arguments_are_refused() {
        let device = Device::emulator();
        let stream = device.stream().unwrap();
        let x = device.zeros::<f32>(64).unwrap();
        let mut out = device.alloc::<u8>(512).unwrap();
        out.fill_bytes(FILL).unwrap();
        let (from, to) = (x.as_ptr(), out.as_ptr());
        type Spec<'a> = (u64, DType, &'a [u64], &'a [u64]);
        let refused = |x: Spec, out: Spec, stochastic: bool| {
            // SAFETY: the call is refused and does not touch the memory.
            let args = unsafe {
                let x = TensorRef::from_raw(&device, x.0, x.1, x.2, x.3).unwrap();
                let out = TensorMut::from_raw(&device, out.0, out.1, out.2, out.3).unwrap();
                Args { x, out, stochastic }
            };
            let error = cast(&stream, args).expect_err("this call must be refused");
            assert!(error.to_string().starts_with("cast: "), "{error}");
            error
        };
        let (f32, bf16, e4m3) = (DType::F32, DType::Bf16, DType::E4m3);
        let good: Spec = (from, f32, &[4, 8], &[8, 1]);
        let good_out: Spec = (to, bf16, &[4, 8], &[8, 1]);
        assert!(matches!(refused((from, DType::I32, &[4, 8], &[8, 1]), good_out, false), Error::DType { arg: "x", .. }));
        assert!(matches!(refused(good, (to, DType::E5m2, &[4, 8], &[8, 1]), false), Error::DType { arg: "out", .. }));
        assert!(matches!(refused(good, (to, bf16, &[32], &[1]), false), Error::Shape { arg: "out", .. }));
        assert!(matches!(refused((from, f32, &[4, 8], &[9, 1]), good_out, false), Error::Layout { arg: "x", .. }));
        assert!(matches!(refused(good, (to, bf16, &[4, 8], &[1, 4]), false), Error::Layout { arg: "out", .. }));
        assert!(matches!(refused((from + 2, f32, &[4, 8], &[8, 1]), good_out, false), Error::Layout { arg: "x", .. }));
        assert!(matches!(refused(good, (to + 1, bf16, &[4, 8], &[8, 1]), false), Error::Layout { arg: "out", .. }));
        assert!(matches!(refused(good, (from + 64, bf16, &[4, 8], &[8, 1]), false), Error::Overlap { a: "x", b: "out", .. }));
        for (a, b) in [(f32, DType::F16), (bf16, f32), (e4m3, bf16), (f32, f32), (bf16, bf16)] {
            let error = refused((from, a, &[8], &[1]), (to, b, &[8], &[1]), true);
            assert!(matches!(error, Error::Value { arg: "stochastic", .. }), "{error:?}");
        }
        // Nothing of this size exists, but it is refused before anybody looks.
        let n = 1u64 << 60;
        assert!(matches!(refused((0, e4m3, &[n], &[1]), (n, bf16, &[n], &[1]), false), Error::Value { .. }));
        let checked = Device::emulator().checked();
        let mut elsewhere = checked.zeros::<E4m3>(32).unwrap();
        let args = Args { x: x.tensor(&[32]).unwrap(), out: elsewhere.tensor_mut(&[32]).unwrap(), stochastic: false };
        let error = cast(&stream, args).unwrap_err();
        assert!(matches!(error, Error::DeviceMismatch { arg: "out", .. }), "{error:?}");
        assert!(out.to_vec().unwrap().iter().all(|b| *b == FILL));
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

        /// Any types, bits, size and alignment.
        #[test]
        fn any_input(
            from in 0usize..4, to in 0usize..4, n in 0u64..70, offsets in (0u64..9, 0u64..9), stochastic in any::<bool>(),
            seed in any::<u32>(),
        ) {
            let (from, to) = (TYPES[from], TYPES[to]);
            let mask = if from.size() == 4 { u32::MAX } else { (1 << (8 * from.size())) - 1 };
            let rng = Rng::new(seed.into());
            let x: Vec<u32> = (0..n).map(|i| rng.bits(i) as u32 & mask).collect();
            let ctx = Ctx::new(Device::emulator().checked(), Depth::Small);
            let stochastic = stochastic && may_be_stochastic(from, to);
            let shape = [n];
            let case = Case { from: (from, offsets.0), to: (to, offsets.1), shape: &shape, kind: "any", stochastic };
            check(&ctx, case, &x).unwrap();
        }
    }
}
