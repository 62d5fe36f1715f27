//! Reference, cases, checks and benchmark rows of `swiglu_forward_and_per_channel_cast_and_transpose`.
//!
//! The reference takes `exp` from the device under test ([`device_math`]) and does everything after it on its own, so results are
//! compared bit for bit on a GPU and on the emulator.

use crate::support::bench::{Launch, Row};
use crate::support::cases::{Depth, HIDDENS};
use crate::support::compare;
use crate::support::device_math;
use crate::support::golden::{self, Case, Golden};
use crate::support::inputs;
use crate::support::rng::Rng;
use crate::support::suite::{Ctx, Report, Suite, ensure, text};
use ferrotile::quant::swiglu_forward_and_per_channel_cast_and_transpose::{self as op, Args};
use ferrotile::quant::{SfLayout, SfMut};
use ferrotile::{Buffer, Device, E4m3, Stream, TensorRef};
use half::bf16;
use rayon::prelude::*;

/// What the `check` binary runs.
pub const SUITE: Suite = Suite { op: "swiglu_forward_and_per_channel_cast_and_transpose", run };

// The reference.

/// Options of a call.
#[derive(Clone, Copy, Debug)]
struct Options {
    npt: u32,
    round_sf: bool,
    clamp: Option<f32>,
    without_transpose: bool,
}

/// `silu` of every bf16, the clamp applied.
fn silu_table(device: &Device, clamp: Option<f32>) -> Result<Vec<f32>, String> {
    let gates: Vec<f32> = (0..=u16::MAX).map(|bits| clamped(bf16::from_bits(bits).to_f32(), None, clamp)).collect();
    let exp = device_math::exp_of(device, &gates.iter().map(|l| -l).collect::<Vec<_>>())?;
    Ok(gates.iter().zip(exp).map(|(l, e)| l / (1.0 + e)).collect())
}

/// `v` between the limits; NaN stays.
fn clamped(v: f32, low: Option<f32>, high: Option<f32>) -> f32 {
    match (low, high) {
        (_, Some(high)) if v > high => high,
        (Some(low), _) if v < low => low,
        _ => v,
    }
}

/// Activations `(t, h)`, each a bf16.
fn activations(x: &[bf16], h: usize, silu: &[f32], clamp: Option<f32>) -> Vec<bf16> {
    let mut out = vec![bf16::ZERO; x.len() / 2];
    out.par_chunks_mut(h.max(1)).zip(x.par_chunks((2 * h).max(1))).for_each(|(out, x)| {
        let (gates, ups) = x.split_at(h);
        for ((out, gate), up) in out.iter_mut().zip(gates).zip(ups) {
            let r = clamped(up.to_f32(), clamp.map(|c| -c), clamp);
            *out = bf16::from_f32(silu[gate.to_bits() as usize] * r);
        }
    });
    out
}

/// Data `(t, h)` or `(h, t)`, and scales `(ceil(t / npt), h)`.
struct Quantised {
    data: Vec<u8>,
    sf: Vec<f32>,
}

/// `(sf, what the data are multiplied by)`.
fn reference_scale(amax: f32, round: bool) -> (f32, f32) {
    let c = amax.max(1e-4);
    let s = c / 448.0;
    if !round {
        return (s, 448.0 / c);
    }
    let mut exponent = (s as f64).log2().ceil() as i32;
    while 2f64.powi(exponent) < s as f64 {
        exponent += 1;
    }
    while 2f64.powi(exponent - 1) >= s as f64 {
        exponent -= 1;
    }
    (2f64.powi(exponent) as f32, 2f64.powi(-exponent) as f32)
}

/// The e4m3 code nearest to a value, ties to even: its spacing around the value is a power of two, and codes count steps.
fn e4m3(v: f32) -> u8 {
    if v.is_nan() {
        return 0x7F;
    }
    let a = v.abs().min(448.0);
    let exponent = ((a.to_bits() >> 23) as i32 - 127).max(-6);
    // Adding and taking away 2^23 rounds to an integer.
    let steps = (a * f32::from_bits(((3 - exponent + 127) as u32) << 23) + 8_388_608.0) - 8_388_608.0;
    (steps as u8 + ((exponent + 6) << 3) as u8) | if v.is_sign_negative() { 0x80 } else { 0 }
}

/// The cast of activations `(t, h)`, not transposed.
fn quantised(a: &[bf16], h: usize, npt: usize, round: bool) -> Quantised {
    let (t, width) = (a.len() / h.max(1), h.max(1));
    let mut q = Quantised { data: vec![0; a.len()], sf: vec![0.0; t.div_ceil(npt) * h] };
    let strips = q.data.par_chunks_mut(npt * width).zip(q.sf.par_chunks_mut(width)).zip(a.par_chunks(npt * width));
    strips.for_each(|((data, sf), a)| {
        let mut amax = vec![0f32; h];
        for row in a.chunks_exact(h) {
            for (amax, v) in amax.iter_mut().zip(row) {
                // `>` is false for NaN; infinity counts as the largest finite value.
                if v.to_f32().abs() > *amax {
                    *amax = v.to_f32().abs().min(bf16::MAX.to_f32());
                }
            }
        }
        let mut inverse = vec![0f32; h];
        for c in 0..h {
            (sf[c], inverse[c]) = reference_scale(amax[c], round);
        }
        for (row, out) in a.chunks_exact(h).zip(data.chunks_exact_mut(h)) {
            for ((out, v), inverse) in out.iter_mut().zip(row).zip(&inverse) {
                *out = e4m3(v.to_f32() * inverse);
            }
        }
    });
    q
}

/// `(t, h)` to `(h, t)`.
fn transposed(data: &[u8], h: usize) -> Vec<u8> {
    let t = data.len() / h.max(1);
    let mut out = vec![0; data.len()];
    // 64 rows of the output at a time, so that a line of the input serves all of them.
    out.par_chunks_mut((64 * t).max(1)).enumerate().for_each(|(strip, out)| {
        for (i, row) in data.chunks_exact(h).enumerate() {
            for (c, out) in out.chunks_exact_mut(t).enumerate() {
                out[i] = row[64 * strip + c];
            }
        }
    });
    out
}

// Inputs.

/// `(t, 2h)` on the device, in rows that lie `stride` elements apart, from element `offset` of a buffer on.
struct Input {
    t: u64,
    h: u64,
    stride: u64,
    offset: u64,
    values: Vec<bf16>,
    buffer: Buffer<bf16>,
}

impl Input {
    fn new(device: &Device, (t, h): (u64, u64), (stride, offset): (u64, u64), values: Vec<bf16>) -> Result<Self, String> {
        let buffer = if stride == 2 * h && offset == 0 {
            device.upload(&values)
        } else {
            // What lies between the rows would be noticed if it were read.
            let mut all = vec![bf16::from_f32(1e30); (offset + t * stride) as usize];
            for (row, values) in values.chunks_exact((2 * h).max(1) as usize).enumerate() {
                let start = (offset + row as u64 * stride) as usize;
                all[start..start + values.len()].copy_from_slice(values);
            }
            device.upload(&all)
        };
        Ok(Self { t, h, stride, offset, values, buffer: buffer.map_err(text)? })
    }

    fn tensor(&self) -> ferrotile::Result<TensorRef<'_>> {
        self.buffer.strided(&[self.t, 2 * self.h], &[self.stride, 1], self.offset)
    }
}

fn normal((t, h): (u64, u64), name: &str) -> Vec<bf16> {
    Rng::named(name).normal_bf16((t * 2 * h) as usize)
}

/// Values with all that is hard: zeros of both signs, subnormals, halfway points, gates for which `exp` overflows, infinities, NaN; blocks of
/// zeros, of tiny values and with one huge value.
fn awkward((t, h): (u64, u64), name: &str) -> Vec<bf16> {
    let rng = Rng::named(name);
    let mut values = normal((t, h), name);
    for (i, v) in values.iter_mut().enumerate() {
        let (row, channel, up) = (i as u64 / (2 * h), i as u64 % h, i as u64 % (2 * h) >= h);
        let draw = rng.stream(1).bits(i as u64);
        let sign = if draw & 1 == 0 { 1.0f32 } else { -1.0 };
        let some = draw >> 8 & 7 == 0;
        let special = match (channel % 16, up) {
            (0, true) => 0.0 * sign,
            (1, false) if some => 0.0 * sign,
            (2, true) => f32::from_bits((draw >> 16) as u32 & 0x807F_0000),
            (3, true) => v.to_f32() * 1e-6,
            // Any bits at all, NaN and infinities too.
            (4, _) | (5, true) if some => f32::from_bits((draw >> 20) as u32 & 0xFFFF_0000),
            (6, false) => sign * ((draw >> 8) % 240) as f32 * 0.5,
            (7, true) if row % 128 == 17 => 3e38 * sign,
            (8, false) if some => f32::INFINITY * sign,
            (9, _) if some => f32::NAN,
            (10, _) => f32::NAN,
            // silu(100) = 100: activations are multiples of a quarter, many of them ties.
            (11, false) => 100.0,
            (11, true) => {
                if row % 32 == 0 {
                    4.48
                } else {
                    sign * ((draw >> 8) % 300) as f32 / 64.0
                }
            }
            (12, true) if some => f32::INFINITY * sign,
            (13, _) => 1e20 * sign,
            _ => continue,
        };
        *v = bf16::from_f32(special);
    }
    values
}

// Running.

const FILL: u8 = 0xA5;
/// Bytes and words around an output that must stay as they are.
const GUARD: usize = 64;

/// Output buffers of one call. Data start `offset` bytes, scales' rows lie `sf_gap` elements further apart than they need.
struct Outputs {
    shape: [u64; 2],
    offset: u64,
    data: Buffer<E4m3>,
    sf_shape: [u64; 2],
    sf_pitch: u64,
    sf: Buffer<f32>,
}

impl Outputs {
    fn new(device: &Device, (t, h): (u64, u64), o: Options, offset: u64, sf_gap: u64) -> Result<Self, String> {
        let shape = if o.without_transpose { [t, h] } else { [h, t] };
        let (rows, sf_pitch) = (t.div_ceil(o.npt.into()), h + sf_gap);
        let mut data = device.alloc((t * h + offset) as usize + 2 * GUARD).map_err(text)?;
        let mut sf = device.alloc((rows * sf_pitch) as usize + GUARD).map_err(text)?;
        data.fill_bytes(FILL).map_err(text)?;
        sf.fill_bytes(FILL).map_err(text)?;
        Ok(Self { shape, offset: offset + GUARD as u64, data, sf_shape: [rows, h], sf_pitch, sf })
    }

    fn cast(&mut self, stream: &Stream, x: TensorRef<'_>, o: Options) -> ferrotile::Result<()> {
        let [rows, columns] = self.shape;
        let out = self.data.strided_mut(&[rows, columns], &[columns.max(1), 1], self.offset)?;
        let tensor = self.sf.strided_mut(&self.sf_shape, &[self.sf_pitch.max(1), 1], 0)?;
        let args = Args {
            x,
            npt: o.npt,
            round_sf: o.round_sf,
            swiglu_clamp_value: o.clamp,
            without_transpose: o.without_transpose,
            out,
            sf: SfMut { tensor, layout: SfLayout::RowMajor },
        };
        op::swiglu_forward_and_per_channel_cast_and_transpose(stream, args)
    }

    fn check(&self, name: &str, data: &[u8], sf: &[f32]) -> Result<(), String> {
        let got = self.data.to_vec().map_err(text)?;
        let (start, end) = (self.offset as usize, self.offset as usize + data.len());
        let untouched = |part: &[E4m3]| part.iter().all(|b| b.0 == FILL);
        ensure(untouched(&got[..start]) && untouched(&got[end..]), || format!("memory beside out was written; {name}"))?;
        compare::equal::<E4m3>("out", name, &self.shape, &got[start..end], bytemuck::cast_slice(data))?;
        let got = self.sf.to_vec().map_err(text)?;
        let strides = [self.sf_pitch, 1];
        compare::equal_strided::<f32>("sf", name, &self.sf_shape, &strides, &got, sf)?;
        compare::untouched("sf", name, &self.sf_shape, &strides, &got, FILL)
    }
}

fn case_name((t, h): (u64, u64), o: Options, kind: &str) -> String {
    let clamp = o.clamp.map_or("none".to_owned(), |c| c.to_string());
    let Options { npt, round_sf, without_transpose, .. } = o;
    format!("clamp={clamp},h={h},kind={kind},npt={npt},round_sf={round_sf},t={t},without_transpose={without_transpose}")
}

/// All options on one input.
fn check_input(ctx: &Ctx, input: &Input, clamps: &[Option<f32>], kind: &str, offset: u64, sf_gap: u64) -> Result<(), String> {
    let stream = ctx.device.stream().map_err(text)?;
    let (shape, h) = ((input.t, input.h), input.h as usize);
    for &clamp in clamps {
        let mut a = None;
        for (npt, round_sf) in [(32, false), (32, true), (128, false), (128, true)] {
            let mut expected = None;
            for without_transpose in [true, false] {
                let o = Options { npt, round_sf, clamp, without_transpose };
                let name = case_name(shape, o, kind);
                if !ctx.case(&name) {
                    continue;
                }
                if a.is_none() {
                    a = Some(activations(&input.values, h, &silu_table(&ctx.device, clamp)?, clamp));
                }
                let Some(a) = &a else { continue };
                let Quantised { data, sf } = expected.get_or_insert_with(|| quantised(a, h, npt as usize, round_sf));
                let turned = if without_transpose { None } else { Some(transposed(data, h)) };
                let data = turned.as_ref().unwrap_or(data);
                let mut out = Outputs::new(&ctx.device, shape, o, offset, sf_gap)?;
                out.cast(&stream, input.tensor().map_err(text)?, o).map_err(|e| format!("{e}; {name}"))?;
                out.check(&name, data, sf)?;
                if ctx.depth == Depth::Small {
                    // Once more, over its own results.
                    out.cast(&stream, input.tensor().map_err(text)?, o).map_err(text)?;
                    out.check(&name, data, sf)?;
                }
            }
        }
    }
    Ok(())
}

/// The clamps of the specification, and one that bf16 cannot hold.
const CLAMPS: [Option<f32>; 3] = [None, Some(10.0), Some(0.5)];
const NO_BF16: Option<f32> = Some(1.234_567_8);

fn run(ctx: &Ctx) -> Result<Report, String> {
    let input = |shape: (u64, u64), (gap, offset): (u64, u64), kind: &str| {
        let name = format!("{} {shape:?} {kind}", SUITE.op);
        let values = if kind == "awkward" { awkward(shape, &name) } else { normal(shape, &name) };
        Input::new(&ctx.device, shape, (2 * shape.1 + gap, offset), values)
    };
    // Whole tiles and parts of tiles, tokens and channels that vectors fit and that they do not.
    let all = [None, Some(0.5), NO_BF16];
    for (shape, at, clamps, offset, sf_gap) in [
        ((128, 128), (0, 0), &all[..], 0, 0),
        ((144, 72), (8, 8), &all[..2], 0, 3),
        ((37, 200), (0, 0), &all[..2], 0, 0),
        ((36, 200), (0, 0), &all[..2], 0, 0),
        ((1, 64), (0, 0), &all[..1], 0, 0),
        ((133, 21), (1, 3), &all[1..], 5, 1),
        ((16, 8), (0, 0), &all[..1], 8, 0),
        ((48, 16), (2, 0), &all[..1], 1, 0),
        ((0, 64), (0, 0), &all[..1], 0, 0),
        ((7, 0), (0, 0), &all[..1], 0, 0),
    ] {
        check_input(ctx, &input(shape, at, "awkward")?, clamps, "awkward", offset, sf_gap)?;
    }
    if ctx.depth == Depth::Full {
        check_input(ctx, &input((8001, 576), (0, 0), "awkward")?, &all, "awkward", 0, 0)?;
        for h in HIDDENS {
            for t in [4096, 8064] {
                check_input(ctx, &input((t, h), (0, 0), "normal")?, &CLAMPS, "normal", 0, 0)?;
            }
        }
        for t in [1, 16, 128] {
            check_input(ctx, &input((t, 7168), (0, 0), "normal")?, &CLAMPS, "normal", 0, 0)?;
        }
    }
    if !ctx.device.is_emulator() {
        check_graph(ctx)?;
        check_emulator(ctx)?;
        if ctx.depth == Depth::Full {
            check_large(ctx)?;
        }
    }
    let notes = golden::check_cases(ctx, &[SUITE.op], |golden, case| check_golden(ctx, golden, case))?;
    Ok(Report { notes, ..ctx.report() })
}

/// Recorded in a graph and replayed.
fn check_graph(ctx: &Ctx) -> Result<(), String> {
    let (name, shape) = ("kind=graph,h=576,t=256", (256, 576));
    if !ctx.case(name) {
        return Ok(());
    }
    let stream = ctx.device.stream().map_err(text)?;
    let input = Input::new(&ctx.device, shape, (2 * 576, 0), normal(shape, name))?;
    let o = Options { npt: 128, round_sf: true, clamp: Some(10.0), without_transpose: false };
    let a = activations(&input.values, 576, &silu_table(&ctx.device, o.clamp)?, o.clamp);
    let expected = quantised(&a, 576, 128, true);
    let data = transposed(&expected.data, 576);
    let mut out = Outputs::new(&ctx.device, shape, o, 0, 0)?;
    let graph = stream.capture(|s| out.cast(s, input.tensor()?, o)).map_err(text)?;
    for _ in 0..2 {
        out.data.fill_bytes(FILL).map_err(text)?;
        out.sf.fill_bytes(FILL).map_err(text)?;
        graph.launch(&stream).map_err(text)?;
        stream.synchronize().map_err(text)?;
        out.check(name, &data, &expected.sf)?;
    }
    Ok(())
}

/// The emulator gives the GPU's codes, or neighbours of a few: its `exp` may be off by a bit.
fn check_emulator(ctx: &Ctx) -> Result<(), String> {
    let (name, shape) = ("kind=both backends,h=576,t=256", (256, 576));
    if !ctx.case(name) {
        return Ok(());
    }
    let (gpu, emulator) = (silu_table(&ctx.device, None)?, silu_table(&Device::emulator(), None)?);
    for (bits, (a, b)) in gpu.iter().zip(&emulator).enumerate() {
        // Two units in the last place: one of `exp`, one of the quotient.
        let close = a.to_bits().abs_diff(b.to_bits()) <= 2 || a.is_nan() && b.is_nan();
        ensure(close, || format!("silu of {:e}: {a:e} on the GPU, {b:e} on the emulator", bf16::from_bits(bits as u16)))?;
    }
    let run = |device: &Device| -> Result<(Vec<E4m3>, Vec<f32>), String> {
        let o = Options { npt: 32, round_sf: false, clamp: None, without_transpose: false };
        let input = Input::new(device, shape, (2 * shape.1, 0), normal(shape, name))?;
        let mut out = Outputs::new(device, shape, o, 0, 0)?;
        out.cast(&device.stream().map_err(text)?, input.tensor().map_err(text)?, o).map_err(text)?;
        Ok((out.data.to_vec().map_err(text)?, out.sf.to_vec().map_err(text)?))
    };
    let ((data, sf), (emulated, emulated_sf)) = (run(&ctx.device)?, run(&Device::emulator())?);
    // Codes of a sign are numbered by magnitude.
    let neighbours = data.iter().zip(&emulated).all(|(a, b)| (a.0 & 0x7F).abs_diff(b.0 & 0x7F) <= 1);
    ensure(neighbours, || format!("out: the emulator's codes are no neighbours of the GPU's; {name}"))?;
    let close = sf.iter().zip(&emulated_sf).all(|(a, b)| (a - b).abs() <= a.abs() / 128.0);
    ensure(close, || format!("sf: the emulator's scales are not next to the GPU's; {name}"))
}

/// More than 2^31 output elements. All rows are one row in memory (stride 0), so every row of the output must be the same.
fn check_large(ctx: &Ctx) -> Result<(), String> {
    let (t, h) = (300_032u64, 7168u64);
    for without_transpose in [true, false] {
        let o = Options { npt: 32, round_sf: true, clamp: None, without_transpose };
        let name = case_name((t, h), o, "large");
        if !ctx.case(&name) {
            continue;
        }
        let values = normal((1, h), "large");
        let a = activations(&values, h as usize, &silu_table(&ctx.device, None)?, None);
        let expected = quantised(&a, h as usize, 32, true);
        let buffer = ctx.device.upload(&values).map_err(text)?;
        let x = buffer.strided(&[t, 2 * h], &[0, 1], 0).map_err(text)?;
        let mut out = Outputs::new(&ctx.device, (t, h), o, 0, 0)?;
        out.cast(&ctx.device.stream().map_err(text)?, x, o).map_err(text)?;
        let data = out.data.to_vec().map_err(text)?;
        let data = &bytemuck::cast_slice::<E4m3, u8>(&data)[out.offset as usize..][..(t * h) as usize];
        let bad = if without_transpose {
            let rows = data.par_chunks_exact(h as usize).enumerate();
            rows.into_par_iter().find_map_any(|(i, row)| (row != expected.data).then_some(i))
        } else {
            let rows = data.par_chunks_exact(t as usize).enumerate();
            rows.into_par_iter().find_map_any(|(c, row)| row.iter().any(|q| *q != expected.data[c]).then_some(c))
        };
        if let Some(bad) = bad {
            return Err(format!("out: row {bad} differs; {name}"));
        }
        let sf = out.sf.to_vec().map_err(text)?;
        let rows = sf[..sf.len() - GUARD].par_chunks_exact(h as usize).enumerate();
        if let Some(bad) = rows.into_par_iter().find_map_any(|(m, row)| (row != expected.sf).then_some(m)) {
            return Err(format!("sf: row {bad} differs; {name}"));
        }
    }
    Ok(())
}

/// What the peer computed.
fn check_golden(ctx: &Ctx, golden: &Golden, case: &Case) -> Result<(), String> {
    let o = Options {
        npt: case.param("num_per_tokens")?,
        round_sf: case.param("round_sf")?,
        clamp: case.param("swiglu_clamp_value")?,
        without_transpose: case.param("without_transpose")?,
    };
    let x = golden.tensor(case, "in/x")?;
    let shape = (x.shape[0], x.shape[1] / 2);
    let input = Input::new(&ctx.device, shape, (x.shape[1], 0), x.to_vec()?)?;
    let mut out = Outputs::new(&ctx.device, shape, o, 0, 0)?;
    out.cast(&ctx.device.stream().map_err(text)?, input.tensor().map_err(text)?, o).map_err(text)?;
    let (data, sf) = (golden.tensor(case, "out/0")?, golden.tensor(case, "out/1")?);
    ensure(data.shape == out.shape && sf.shape == out.sf_shape, || format!("shapes differ; {}", case.name()))?;
    out.check(&case.name(), data.bytes, &sf.to_vec()?)
}

// The benchmark.

fn row(case: String, (t, h): (u64, u64), o: Options) -> Row {
    let bytes = t * 2 * h * 2 + t * h + 4 * t.div_ceil(o.npt.into()) * h;
    let build = move |device: &Device, _: &Stream| -> Result<Launch, String> {
        let buffer = inputs::normal_bf16(device, 0, t * 2 * h)?;
        let input = Input { t, h, stride: 2 * h, offset: 0, values: Vec::new(), buffer };
        let mut out = Outputs::new(device, (t, h), o, 0, 0)?;
        Ok(Box::new(move |stream| out.cast(stream, input.tensor()?, o)))
    };
    Row { op: SUITE.op, case, bytes, build: Box::new(build) }
}

/// The peer's case, those of 1.0.0's own benchmark, and small inputs.
pub fn bench() -> Vec<Row> {
    let plain = Options { npt: 128, round_sf: true, clamp: None, without_transpose: false };
    let mut rows = Vec::new();
    let mut add = |(t, h): (u64, u64), o: Options| {
        let clamp = o.clamp.map_or(String::new(), |c| format!("clamp={c},"));
        let rounding = if o.round_sf { "" } else { "round=False," };
        let transpose = if o.without_transpose { ",transpose=False" } else { "" };
        rows.push(row(format!("{clamp}h={h},npt={},{rounding}t={t}{transpose}", o.npt), (t, h), o));
    };
    for npt in [128, 32] {
        for without_transpose in [false, true] {
            for round_sf in [true, false] {
                add((8064, 7168), Options { npt, round_sf, clamp: None, without_transpose });
            }
            add((8064, 7168), Options { npt, clamp: Some(0.5), without_transpose, ..plain });
        }
    }
    add((4096, 2048), Options { npt: 32, without_transpose: true, ..plain });
    for t in [1, 16, 128] {
        add((t, 7168), plain);
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferrotile::{DType, Error, TensorMut};
    use ferrotile_kernels::quant::common_channels::{plain_scale, short_quotient};
    use proptest::prelude::{ProptestConfig, prop_assert_eq, proptest};

    #[test]
    fn suite() {
        SUITE.test();
    }

    #[test]
    fn the_reference_reproduces_known_values() {
        // quant.md 9, the group X: its values are no bf16, so only the codes' function is held to it.
        for (v, code) in [(0.1f32 * 4.0, 0x2D), (-1.0, 0xB8), (12.0, 0x54), (-30.0, 0xDF), (-0.0, 0x80), (400.0, 0x7C)] {
            assert_eq!(e4m3(v), code, "{v}");
        }
        assert_eq!((e4m3(2f32.powi(-10)), e4m3(1.5 * 2f32.powi(-9)), e4m3(f32::NAN), e4m3(-1e9)), (0, 2, 0x7F, 0xFE));
        for code in 0..=255u8 {
            let value = E4m3(code).to_f32();
            assert!(e4m3(value) == code || value.is_nan(), "{code}");
        }
        let silu = silu_table(&Device::emulator(), None).unwrap();
        for bits in 0..=u16::MAX {
            let l = bf16::from_bits(bits).to_f32() as f64;
            let exact = l / (1.0 + (-l).exp());
            let got = silu[bits as usize] as f64;
            // Subnormal results, from gates below -83, keep fewer bits.
            let close = (got - exact).abs() <= exact.abs() * 4e-7 + 2f64.powi(-146) || got == exact;
            // An infinite divisor makes gates below -88.7 zeros.
            assert!(close || l < -88.7 && got == 0.0 || got.is_nan() && exact.is_nan(), "{l} {got}");
        }
        assert_eq!(transposed(&[1, 2, 3, 4, 5, 6], 3), [1, 4, 2, 5, 3, 6]);
    }

    /// The short division does as well as the IEEE one for every gate, if `exp` and the reciprocal are off by a bit on some hardware. Those
    /// of powers of two are exact, which subnormal quotients need.
    #[test]
    fn the_short_silu_is_as_good_as_the_quotient() {
        let gates = (0..=u16::MAX).map(|bits| bf16::from_bits(bits).to_f32());
        gates.collect::<Vec<_>>().par_iter().for_each(|&l| {
            let off = |v: f32, by: i32| if v.is_normal() { f32::from_bits(v.to_bits().wrapping_add_signed(by)) } else { v };
            for divisor in (-1..=1).map(|by| 1.0 + off((-l).exp(), by)) {
                let expected = l / divisor;
                let scaled = divisor * -0.25;
                for by in if scaled.to_bits() << 9 == 0 { 0..=0 } else { -1..=1 } {
                    let reciprocal = off(1.0 / scaled, by);
                    // As the instruction does, which flushes subnormal results.
                    let reciprocal = if reciprocal.is_subnormal() { -0.0 } else { reciprocal };
                    let got = short_quotient(l * -0.25, scaled, reciprocal);
                    let product = |silu: f32, m: u16| bf16::from_f32(silu * bf16::from_bits(0x3F80 + m).to_f32()).to_bits();
                    let same = got.to_bits() == expected.to_bits()
                        || got.is_nan() && expected.is_nan()
                        || (0..128).all(|m| product(got, m) == product(expected, m));
                    assert!(same, "{l:e} / {divisor:e} by {reciprocal:e}: {got:e}, not {expected:e}");
                }
            }
        });
    }

    /// Every scale that a bf16 `amax` can have is the IEEE quotient, whichever way the reciprocal is off by its last bit.
    #[test]
    fn plain_scales_are_quotients() {
        for bits in 0..=0x7F7F {
            let amax = bf16::from_bits(bits).to_f32();
            let (c, got) = (amax.max(1e-4), plain_scale(amax));
            assert_eq!((got.sf.to_bits(), got.inv.to_bits()), ((c / 448.0).to_bits(), (448.0 / c).to_bits()), "{amax:e}");
            let scaled = c / 256.0;
            for off in [-2, -1, 1, 2] {
                let reciprocal = f32::from_bits((1.0 / scaled).to_bits().wrapping_add_signed(off));
                assert_eq!(short_quotient(1.75, scaled, reciprocal).to_bits(), (448.0 / c).to_bits(), "{amax:e} {off}");
            }
        }
    }

    /// Every wrong argument is refused with the error that the documentation names, and the outputs stay as they were.
    #[test]
    fn wrong_arguments_are_refused() {
        struct Call<'a> {
            x: TensorRef<'a>,
            npt: u32,
            clamp: Option<f32>,
            without_transpose: bool,
            out: ([u64; 2], DType),
            sf: ([u64; 2], SfLayout),
        }
        let device = Device::emulator().checked();
        let other = Device::emulator();
        let stream = device.stream().unwrap();
        let x = device.zeros::<bf16>(64 * 128).unwrap();
        let floats = device.zeros::<f32>(64 * 128).unwrap();
        let elsewhere = other.zeros::<bf16>(64 * 128).unwrap();
        let mut out = device.zeros::<u8>(64 * 128).unwrap();
        let mut sf = device.zeros::<f32>(256).unwrap();
        out.fill_bytes(FILL).unwrap();
        sf.fill_bytes(FILL).unwrap();
        // 40 tokens of 64 channels, two rows of scales.
        let call = || Call {
            x: x.tensor(&[40, 128]).unwrap(),
            npt: 32,
            clamp: None,
            without_transpose: false,
            out: ([64, 40], DType::E4m3),
            sf: ([2, 64], SfLayout::RowMajor),
        };
        let mut run = |call: Call<'_>| {
            let out = out.tensor_mut(&call.out.0)?.reinterpret(call.out.1)?;
            let sf = SfMut { tensor: sf.tensor_mut(&call.sf.0)?, layout: call.sf.1 };
            let Call { x, npt, clamp, without_transpose, .. } = call;
            let args = Args { x, npt, round_sf: true, swiglu_clamp_value: clamp, without_transpose, out, sf };
            op::swiglu_forward_and_per_channel_cast_and_transpose(&stream, args)
        };
        let name = SUITE.op;
        let mut refuses = |call: Call<'_>, expected: &str| {
            let text = run(call).expect_err(expected).to_string();
            assert!(text.starts_with(&format!("{name}: {expected}")), "{text}\nexpected {expected}");
        };
        refuses(Call { x: x.tensor(&[5120]).unwrap(), ..call() }, "x has shape [5120], expected 2 dimensions");
        refuses(Call { x: floats.tensor(&[40, 128]).unwrap(), ..call() }, "x is f32, allowed: bf16");
        refuses(Call { x: x.tensor(&[40, 127]).unwrap(), ..call() }, "columns of x is 127, allowed: multiples of 2");
        refuses(Call { x: x.strided(&[40, 128], &[1, 40], 0).unwrap(), ..call() }, "layout of x is");
        refuses(Call { npt: 64, ..call() }, "npt is 64, allowed: 32, 128");
        for clamp in [-1.0, f32::NAN] {
            refuses(Call { clamp: Some(clamp), ..call() }, &format!("swiglu_clamp_value is {clamp}, allowed: 0 and more"));
        }
        refuses(Call { out: ([40, 64], DType::E4m3), ..call() }, "out has shape [40, 64], expected [64, 40]");
        refuses(Call { without_transpose: true, ..call() }, "out has shape [64, 40], expected [40, 64]");
        refuses(Call { out: ([64, 40], DType::U8), ..call() }, "out is u8, allowed: e4m3");
        refuses(Call { sf: ([1, 64], SfLayout::RowMajor), ..call() }, "sf has shape [1, 64], expected [2, 64]");
        refuses(Call { sf: ([2, 64], SfLayout::ColMajor), ..call() }, "layout of sf is col-major, expected row-major");
        refuses(Call { npt: 128, ..call() }, "sf has shape [2, 64], expected [1, 64]");
        refuses(Call { x: elsewhere.tensor(&[40, 128]).unwrap(), ..call() }, "x is on");
        // SAFETY: nothing is launched.
        let far = unsafe { TensorRef::from_raw(&device, 1 << 40, DType::Bf16, &[40, 128], &[1 << 33, 1]).unwrap() };
        refuses(Call { x: far, ..call() }, "row stride of x is");

        // SAFETY: nothing is launched on these overlapping tensors; that is what is checked.
        let on_x = |dtype, shape: &[u64], strides: &[u64]| unsafe {
            TensorMut::from_raw(&device, x.as_ptr() + 64, dtype, shape, strides).unwrap()
        };
        let overlaps = |args: Args<'_>| op::swiglu_forward_and_per_channel_cast_and_transpose(&stream, args).unwrap_err();
        let mut sf_elsewhere = device.zeros::<f32>(128).unwrap();
        let mut out_elsewhere = device.zeros::<E4m3>(64 * 40).unwrap();
        let mut args = |out: Option<TensorMut<'static>>, sf: Option<TensorMut<'static>>| {
            let out = out.unwrap_or_else(|| out_elsewhere.tensor_mut(&[64, 40]).unwrap());
            let sf =
                SfMut { tensor: sf.unwrap_or_else(|| sf_elsewhere.tensor_mut(&[2, 64]).unwrap()), layout: SfLayout::RowMajor };
            let x = x.tensor(&[40, 128]).unwrap();
            overlaps(Args { x, npt: 32, round_sf: true, swiglu_clamp_value: None, without_transpose: false, out, sf })
        };
        assert!(matches!(args(Some(on_x(DType::E4m3, &[64, 40], &[40, 1])), None), Error::Overlap { a: "x", b: "out", .. }));
        assert!(matches!(args(None, Some(on_x(DType::F32, &[2, 64], &[64, 1]))), Error::Overlap { a: "x", b: "sf", .. }));

        assert!(out.to_vec().unwrap().iter().all(|b| *b == FILL), "out was written");
        assert!(sf.to_vec().unwrap().iter().all(|v| v.to_bits() == u32::from_ne_bytes([FILL; 4])), "sf was written");
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

        /// Any shape, distance of rows, alignment and range of values.
        #[test]
        fn any_input(
            t in 1u64..150, h in 1u64..80, vectors: bool, gap in 0u64..9, offset in 0u64..9, out_offset in 0u64..17, sf_gap in 0u64..3,
            npt_32: bool, round_sf: bool, clamp in proptest::option::of(0f32..4.0), without_transpose: bool, exponent in -40i32..40,
            seed: u64,
        ) {
            let device = Device::emulator().checked();
            let (t, h, gap, offset, out_offset) = match vectors {
                true => (t.next_multiple_of(if without_transpose { 4 } else { 16 }), h.next_multiple_of(8), gap / 8 * 8, offset / 8 * 8, 0),
                false => (t, h, gap, offset, out_offset),
            };
            // The vector kernels take clamps that bf16 can hold.
            let clamp = clamp.map(|c| if vectors { bf16::from_f32(c).to_f32() } else { c });
            let o = Options { npt: if npt_32 { 32 } else { 128 }, round_sf, clamp, without_transpose };
            let scale = 2f32.powi(exponent);
            let values = Rng::new(seed).fill((t * 2 * h) as usize, |rng, i| {
                let up = i % (2 * h) >= h;
                bf16::from_f32(rng.normal(i) * if up { scale } else { 3.0 })
            });
            let input = Input::new(&device, (t, h), (2 * h + gap, offset), values).unwrap();
            let a = activations(&input.values, h as usize, &silu_table(&device, clamp).unwrap(), clamp);
            let Quantised { mut data, sf } = quantised(&a, h as usize, o.npt as usize, round_sf);
            if !without_transpose {
                data = transposed(&data, h as usize);
            }
            let mut out = Outputs::new(&device, (t, h), o, out_offset, sf_gap).unwrap();
            out.cast(&device.stream().unwrap(), input.tensor().unwrap(), o).unwrap();
            prop_assert_eq!(out.check("any", &data, &sf), Ok(()));
        }
    }
}
