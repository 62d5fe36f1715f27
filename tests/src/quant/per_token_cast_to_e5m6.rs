//! Reference, cases, checks and benchmark rows of `per_token_cast_to_e5m6`.

use crate::support::bench::{Launch, Row};
use crate::support::cases::{Depth, HIDDENS, TOKENS};
use crate::support::compare;
use crate::support::golden::{self, Case, Golden};
use crate::support::inputs;
use crate::support::rng::Rng;
use crate::support::suite::{Ctx, Report, Suite, ensure, text};
use ferrotile::quant::per_token_cast_to_e5m6::{self as op, Args};
use ferrotile::quant::{SfLayout, SfMut, SfShape, sf_shape};
use ferrotile::{Buffer, DType, Device, Stream, TensorRef, Ue8m0x4};
use half::bf16;
use rayon::prelude::*;

/// What the `check` binary runs.
pub const SUITE: Suite = Suite { op: "per_token_cast_to_e5m6", run };

// The reference.

/// Data as bytes, row by row, and a scale for each row.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Quantised {
    pub(super) data: Vec<u8>,
    pub(super) sf: Vec<f32>,
}

/// The 12-bit code of a value as the specification spells it: truncated to the upper bits of an f16, then decided by the 17 low bits of
/// the f32.
fn e5m6(v: f32) -> u16 {
    let sign = if v.is_sign_negative() { 0x800 } else { 0 };
    if v.is_nan() {
        return 0x7FF;
    }
    if v.is_infinite() {
        return sign | 0x7C0;
    }
    let magnitude = v.abs() as f64;
    let truncated = if magnitude < 2f64.powi(-14) {
        (magnitude * 2f64.powi(20)).floor()
    } else {
        let exponent = (v.to_bits() >> 23 & 255) as i32 - 127;
        ((exponent + 15) as f64 * 64.0 + (magnitude / 2f64.powi(exponent) - 1.0) * 64.0).floor()
    };
    // The largest finite f16 begins like this.
    let code = truncated.min(0x7BF as f64) as u16;
    (code + ((code % 2) as u32 + v.to_bits() % 0x2_0000 > 0x1_0000) as u16) | sign
}

/// `(sf, what the data are multiplied by)`.
fn reference_scale(amax: f32, round: bool) -> (f32, f32) {
    let c = if amax > f32::MAX {
        f32::MAX
    } else if amax > 1e-4 {
        amax
    } else {
        1e-4
    };
    let s = c / 65024.0;
    if !round {
        return (s, 65024.0 / c);
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

/// The cast of `x`, `(t, h)`.
pub(super) fn reference(x: &[f32], h: usize, round: bool) -> Quantised {
    let t = x.len().checked_div(h).unwrap_or(0);
    let (mut data, mut sf) = (vec![0u8; t * h / 2 * 3], vec![0f32; t]);
    let rows = data.par_chunks_mut((h / 2 * 3).max(1)).zip(&mut sf).zip(x.par_chunks(h.max(1)));
    rows.for_each(|((data, sf), x)| {
        // `>` is false for NaN.
        let amax = x.iter().fold(0.0, |max, v| if v.abs() > max { v.abs() } else { max });
        let inverse;
        (*sf, inverse) = reference_scale(amax, round);
        for (to, from) in data.chunks_exact_mut(12).zip(x.chunks_exact(8)) {
            // A string of 96 bits, first value in the highest, cut into words.
            let string = from.iter().fold(0u128, |bits, v| bits << 12 | e5m6(v * inverse) as u128);
            for (i, word) in to.chunks_exact_mut(4).enumerate() {
                word.copy_from_slice(&((string >> (64 - 32 * i)) as u32).to_le_bytes());
            }
        }
    });
    Quantised { data, sf }
}

/// Words of the scale tensor: f32 bits, or an exponent with three zero bytes.
fn sf_words(sf: &[f32], layout: SfLayout) -> Vec<u32> {
    sf.iter().map(|v| if layout.is_packed() { v.to_bits() >> 23 } else { v.to_bits() }).collect()
}

// Inputs.

/// An input on the device, and its values.
pub(super) struct Input {
    t: u64,
    h: u64,
    stride: u64,
    offset: u64,
    pub(super) values: Vec<f32>,
    buffer: Elements,
}

enum Elements {
    Bf16(Buffer<bf16>),
    F32(Buffer<f32>),
}

impl Input {
    /// `values` in rows that lie `gap` elements apart, from element `offset` of a buffer on. bf16 values must be given as such.
    pub(super) fn new(
        device: &Device,
        dtype: DType,
        (t, h): (u64, u64),
        (gap, offset): (u64, u64),
        values: Vec<f32>,
    ) -> Result<Self, String> {
        let stride = h + gap;
        let len = if t == 0 { offset } else { offset + (t - 1) * stride + h } as usize;
        let spread;
        let all = if gap == 0 && offset == 0 {
            &values
        } else {
            // What lies between the rows would be noticed if it were read.
            let mut rows = vec![1e30; len];
            for (row, values) in values.chunks_exact(h.max(1) as usize).enumerate() {
                let start = (offset + row as u64 * stride) as usize;
                rows[start..start + h as usize].copy_from_slice(values);
            }
            spread = rows;
            &spread
        };
        let buffer = if dtype == DType::Bf16 {
            let all: Vec<bf16> = all.par_iter().map(|v| bf16::from_f32(*v)).collect();
            Elements::Bf16(device.upload(&all).map_err(text)?)
        } else {
            Elements::F32(device.upload(all).map_err(text)?)
        };
        Ok(Self { t, h, stride, offset, values, buffer })
    }

    fn tensor(&self) -> ferrotile::Result<TensorRef<'_>> {
        let (shape, strides) = ([self.t, self.h], [self.stride, 1]);
        match &self.buffer {
            Elements::Bf16(b) => b.strided(&shape, &strides, self.offset),
            Elements::F32(b) => b.strided(&shape, &strides, self.offset),
        }
    }
}

/// What an input is made of.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Normal,
    /// One value in all channels but the last, which is 65024, so that the scale is 1.
    Constant(i32, f32),
    Awkward,
}

/// The special tensors of the specification, then the halfway point above 2^-20, which rounds down here.
const CONSTANTS: [Kind; 4] =
    [Kind::Constant(-20, 1.0), Kind::Constant(-14, 63.0 / 64.0), Kind::Constant(-14, 1.0), Kind::Constant(-20, 1.5)];

fn values(dtype: DType, (t, h): (u64, u64), kind: Kind) -> Vec<f32> {
    let rng = Rng::named(&format!("per_token_cast_to_e5m6 {dtype} {t} {h} {kind:?}"));
    let to_type = |v: f32| if dtype == DType::Bf16 { bf16::from_f32(v).to_f32() } else { v };
    rng.fill((t * h) as usize, |rng, i| {
        let (row, col) = (i / h, i % h);
        match kind {
            Kind::Normal => to_type(rng.normal(i)),
            Kind::Constant(..) if col == h - 1 => 65024.0,
            Kind::Constant(exponent, factor) => factor * 2f32.powi(exponent),
            Kind::Awkward => awkward(rng, dtype, (row, col, h), i),
        }
    })
}

/// Values with all that is hard, a kind for each row.
fn awkward(rng: &Rng, dtype: DType, (row, col, h): (u64, u64, u64), i: u64) -> f32 {
    let draw = rng.stream(1).bits(i);
    let sign = if draw & 1 == 0 { 1.0 } else { -1.0 };
    let any = f32::from_bits((draw >> 8) as u32);
    let last = col == h - 1;
    let v = match row % 11 {
        0 => 0.0 * sign,
        // Below the clamp, and subnormal.
        1 => rng.normal(i) * 1e-6,
        2 => f32::from_bits((draw >> 8) as u32 & 0x807F_FFFF),
        // A scale of 1 and every kind of value under it: halfway points, what lies beside them, and the range of the quirk.
        3 | 4 if last => 65024.0,
        3 => {
            let code = (draw >> 8) % (0x7BF << 1);
            let exponent = (code >> 7) as i32;
            let man = (code & 127) as f32 / 128.0;
            let value = if exponent == 0 { man * 2f32.powi(-14) } else { (1.0 + man) * 2f32.powi(exponent - 15) };
            sign * f32::from_bits(value.to_bits().wrapping_add_signed((draw >> 40) as i32 % 3))
        }
        4 => sign * f32::from_bits((((draw >> 8) % 115) << 23 | ((draw >> 20) & 0x7F_FFFF)) as u32),
        // The largest quotient next to a power of two: a product with the reciprocal would miss the next exponent.
        5 if last => 65024f32.next_up() * 2f32.powi((row % 30) as i32),
        6 if last => f32::MAX,
        7 if draw.is_multiple_of(61) => f32::NAN,
        8 => f32::NAN,
        9 if draw.is_multiple_of(97) => f32::INFINITY * sign,
        10 if any.is_finite() => any,
        _ => rng.normal(i),
    };
    // Toward zero: the largest f32 would become infinity.
    if dtype == DType::Bf16 { f32::from_bits(v.to_bits() & 0xFFFF_0000) } else { v }
}

// Running.

/// Elements behind an output that must stay as they are.
const GUARD: usize = 64;
const FILL: u8 = 0xA5;

/// Output buffers of one call.
pub(super) struct Outputs {
    shape: [u64; 2],
    offset: u64,
    data: Buffer<u8>,
    pub(super) sf_shape: SfShape,
    layout: SfLayout,
    sf: Buffer<u32>,
}

impl Outputs {
    pub(super) fn new(device: &Device, input: &Input, layout: SfLayout, offset: u64) -> Result<Self, String> {
        let shape = [input.t, input.h / 2 * 3];
        let sf_shape = sf_shape(input.t, input.h, (1, input.h as u32), layout);
        let mut data = device.alloc((offset + shape[0] * shape[1]) as usize + GUARD).map_err(text)?;
        let mut sf = device.alloc(sf_shape.elements as usize + GUARD).map_err(text)?;
        data.fill_bytes(FILL).map_err(text)?;
        sf.fill_bytes(FILL).map_err(text)?;
        Ok(Self { shape, offset, data, sf_shape, layout, sf })
    }

    pub(super) fn cast(&mut self, stream: &Stream, input: &Input, round_sf: bool) -> ferrotile::Result<()> {
        let out = self.data.strided_mut(&self.shape, &[self.shape[1], 1], self.offset)?;
        let sf = self.sf.strided_mut(&self.sf_shape.shape, &self.sf_shape.strides, 0)?.reinterpret(self.sf_shape.dtype)?;
        op::per_token_cast_to_e5m6(
            stream,
            Args { x: input.tensor()?, round_sf, out, sf: SfMut { tensor: sf, layout: self.layout } },
        )
    }

    fn check(&self, name: &str, expected: &Quantised) -> Result<(), String> {
        self.check_data(name, &expected.data)?;
        self.check_sf(name, &sf_words(&expected.sf, self.layout))
    }

    pub(super) fn check_data(&self, name: &str, expected: &[u8]) -> Result<(), String> {
        let data = self.data.to_vec().map_err(text)?;
        let (front, data) = data.split_at(self.offset as usize);
        let (data, guard) = data.split_at(data.len() - GUARD);
        let untouched = front.iter().chain(guard).all(|b| *b == FILL);
        ensure(untouched, || format!("data: bytes outside the tensor were written; {name}"))?;
        compare::equal("data", name, &self.shape, data, expected)
    }

    pub(super) fn check_sf(&self, name: &str, expected: &[u32]) -> Result<(), String> {
        let SfShape { shape, strides, .. } = &self.sf_shape;
        let sf = self.sf.to_vec().map_err(text)?;
        let (got, words) = (bytemuck::cast_slice(&sf), bytemuck::cast_slice(expected));
        if self.layout.is_packed() {
            compare::equal_strided::<Ue8m0x4>("sf", name, shape, strides, got, words)?;
        } else {
            let (got, words) = (bytemuck::cast_slice(&sf), bytemuck::cast_slice(expected));
            compare::equal_strided::<f32>("sf", name, shape, strides, got, words)?;
        }
        compare::untouched("sf", name, shape, strides, &sf, FILL)
    }
}

const PLAIN: [SfLayout; 2] = [SfLayout::RowMajor, SfLayout::ColMajor];

/// All options on one input.
fn check_input(ctx: &Ctx, shape: (u64, u64), apart: (u64, u64), dtype: DType, kind: Kind, out_offset: u64) -> Result<(), String> {
    let stream = ctx.device.stream().map_err(text)?;
    let input = Input::new(&ctx.device, dtype, shape, apart, values(dtype, shape, kind))?;
    let full = ctx.depth == Depth::Full && shape.0 > 1000;
    for round in [true, false] {
        let mut expected = None;
        let layouts: &[SfLayout] = match (round, full) {
            // The grid of the specification.
            (true, true) => &[SfLayout::RowMajor, SfLayout::ColMajorPacked],
            (false, true) => &PLAIN[..1],
            (true, false) => SfLayout::COMMON,
            (false, false) => &PLAIN,
        };
        for &layout in layouts {
            let name = format!(
                "h={},input={dtype},kind={kind:?},offset={out_offset},round_sf={round},sf={layout},stride={},t={}",
                shape.1, input.stride, shape.0
            );
            if !ctx.case(&name) {
                continue;
            }
            let expected: &Quantised = expected.get_or_insert_with(|| reference(&input.values, shape.1 as usize, round));
            let mut out = Outputs::new(&ctx.device, &input, layout, out_offset)?;
            out.cast(&stream, &input, round).map_err(text)?;
            out.check(&name, expected)?;
            if layout == SfLayout::RowMajor && !full {
                // Once more, over its own results.
                out.cast(&stream, &input, round).map_err(text)?;
                out.check(&name, expected)?;
            }
        }
    }
    Ok(())
}

fn run(ctx: &Ctx) -> Result<Report, String> {
    for dtype in [DType::Bf16, DType::F32] {
        let check = |shape, apart, kind, offset| check_input(ctx, shape, apart, dtype, kind, offset);
        check((37, 384), (0, 0), Kind::Awkward, 0)?;
        check((23, 576), (8, 16), Kind::Awkward, 16)?;
        for kind in CONSTANTS {
            check((3, 96), (0, 0), kind, 0)?;
        }
        // Rows that are no multiple of 32, or start anywhere.
        check((23, 1096), (0, 0), Kind::Awkward, 0)?;
        check((23, 320), (3, 1), Kind::Awkward, 0)?;
        check((13, 8), (0, 0), Kind::Awkward, 3)?;
        check((0, 384), (0, 0), Kind::Normal, 0)?;
        check((5, 0), (0, 0), Kind::Normal, 0)?;
        check((1, 7168), (0, 0), Kind::Normal, 0)?;
        // More rows than multiprocessors, and a last warp with few vectors.
        check((133, 160), (0, 0), Kind::Awkward, 0)?;
        check((11, 8224), (0, 0), Kind::Awkward, 0)?;
        // More than the threads of a block can hold.
        check((2, 20032), (0, 0), Kind::Normal, 0)?;
        check((8, 16416), (0, 0), Kind::Awkward, 0)?;
        check((1, 5000), (0, 0), Kind::Awkward, 0)?;
        if ctx.depth == Depth::Full {
            check((4001, 576), (5, 3), Kind::Awkward, 1)?;
            for h in HIDDENS {
                check((1, h), (0, 0), Kind::Normal, 0)?;
                for t in TOKENS {
                    check((t, h), (0, 0), Kind::Normal, 0)?;
                    for kind in &CONSTANTS[..3] {
                        // The largest once, for the time it takes.
                        if t == TOKENS[0] || h == 576 {
                            check((t, h), (0, 0), *kind, 0)?;
                        }
                    }
                }
            }
            check((8001, 7168), (7168, 0), Kind::Awkward, 0)?;
        }
    }
    if !ctx.device.is_emulator() {
        check_graph(ctx)?;
        check_both_backends(ctx)?;
        if ctx.depth == Depth::Full {
            check_large(ctx)?;
        }
    }
    let notes = golden::check_cases(ctx, &["per_token_cast_to_e5m6_and_back"], |golden, case| check_golden(ctx, golden, case))?;
    Ok(Report { notes, ..ctx.report() })
}

/// The launcher recorded in a graph and replayed.
fn check_graph(ctx: &Ctx) -> Result<(), String> {
    let name = "kind=graph,h=576,t=133";
    if !ctx.case(name) {
        return Ok(());
    }
    let stream = ctx.device.stream().map_err(text)?;
    let shape = (133, 576);
    let input = Input::new(&ctx.device, DType::Bf16, shape, (0, 0), values(DType::Bf16, shape, Kind::Awkward))?;
    let mut out = Outputs::new(&ctx.device, &input, SfLayout::ColMajorPacked, 0)?;
    let graph = stream.capture(|s| out.cast(s, &input, true)).map_err(text)?;
    let expected = reference(&input.values, 576, true);
    for replay in 0..2 {
        out.data.fill_bytes(FILL).map_err(text)?;
        out.sf.fill_bytes(FILL).map_err(text)?;
        graph.launch(&stream).map_err(text)?;
        stream.synchronize().map_err(text)?;
        out.check(&format!("{name},replay={replay}"), &expected)?;
    }
    Ok(())
}

/// The emulator and this device write the same bytes.
fn check_both_backends(ctx: &Ctx) -> Result<(), String> {
    let emulator = Device::emulator();
    for dtype in [DType::Bf16, DType::F32] {
        for (h, round) in [(384, true), (384, false), (328, false)] {
            let name = format!("h={h},input={dtype},kind=both backends,round_sf={round},t=133");
            if !ctx.case(&name) {
                continue;
            }
            let mut results = Vec::new();
            for device in [&ctx.device, &emulator] {
                let input = Input::new(device, dtype, (133, h), (0, 0), values(dtype, (133, h), Kind::Awkward))?;
                let mut out = Outputs::new(device, &input, SfLayout::RowMajor, 0)?;
                out.cast(&device.stream().map_err(text)?, &input, round).map_err(text)?;
                results.push((out.data.to_vec().map_err(text)?, out.sf.to_vec().map_err(text)?));
            }
            ensure(results[0] == results[1], || format!("the backends differ; {name}"))?;
        }
    }
    Ok(())
}

/// More than 2^32 bytes of output. All rows are one row in memory (stride 0), so every row of the output must be the same.
fn check_large(ctx: &Ctx) -> Result<(), String> {
    let (t, h) = (400_001u64, 7168u64);
    let name = "kind=large,h=7168,t=400001";
    if !ctx.case(name) {
        return Ok(());
    }
    let row = values(DType::Bf16, (1, h), Kind::Normal);
    let expected = reference(&row, h as usize, true);
    let mut input = Input::new(&ctx.device, DType::Bf16, (1, h), (0, 0), row)?;
    (input.t, input.stride) = (t, 0);
    let mut out = Outputs::new(&ctx.device, &input, SfLayout::ColMajor, 0)?;
    out.cast(&ctx.device.stream().map_err(text)?, &input, true).map_err(text)?;
    let data = out.data.to_vec().map_err(text)?;
    let rows = data[..(t * h / 2 * 3) as usize].par_chunks_exact((h / 2 * 3) as usize);
    if let Some(bad) = rows.enumerate().find_map_any(|(i, row)| (row != expected.data).then_some(i)) {
        return Err(format!("data: row {bad} differs; {name}"));
    }
    out.check_sf(name, &sf_words(&expected.sf.repeat(t as usize), SfLayout::ColMajor))
}

// The benchmark.

/// What 1.0.0 computed.
fn check_golden(ctx: &Ctx, golden: &Golden, case: &Case) -> Result<(), String> {
    let name = case.name();
    let (layout, round) = case.sf_options()?;
    let x = golden.tensor(case, "in/x")?;
    let dtype = if x.dtype == safetensors::Dtype::BF16 { DType::Bf16 } else { DType::F32 };
    let input = Input::new(&ctx.device, dtype, (x.shape[0], x.shape[1]), (0, 0), x.floats()?)?;
    let mut out = Outputs::new(&ctx.device, &input, layout, 0)?;
    let stream = ctx.device.stream().map_err(text)?;
    out.cast(&stream, &input, round).map_err(text)?;
    stream.synchronize().map_err(text)?;
    out.check_data(&name, golden.tensor(case, "out/q.0")?.bytes)?;
    let sf = golden.tensor(case, "out/q.1")?;
    sf.check_place(&name, &out.sf_shape)?;
    out.check_sf(&name, &if layout.is_packed() { sf.packed_words(1)? } else { sf.to_vec()? })
}

fn row(case: String, dtype: DType, (t, h): (u64, u64), layout: SfLayout) -> Row {
    let bytes = t * h * dtype.size() + t * h / 2 * 3 + 4 * t;
    let build = move |device: &Device, _: &Stream| -> Result<Launch, String> {
        let buffer = match dtype {
            DType::Bf16 => Elements::Bf16(inputs::normal_bf16(device, 0, t * h)?),
            _ => Elements::F32(inputs::normal_f32(device, 0, t * h)?),
        };
        let input = Input { t, h, stride: h, offset: 0, values: Vec::new(), buffer };
        let mut out = Outputs::new(device, &input, layout, 0)?;
        Ok(Box::new(move |stream| out.cast(stream, &input, true)))
    };
    Row { op: "per_token_cast_to_e5m6", case, bytes, build: Box::new(build) }
}

/// The peers' case, those of 1.0.0's own benchmark, and small inputs.
pub fn bench() -> Vec<Row> {
    let (plain, packed) = (SfLayout::RowMajor, SfLayout::ColMajorPacked);
    let mut rows = vec![
        row("h=7168,input=bf16,t=8064".to_owned(), DType::Bf16, (8064, 7168), plain),
        row("h=7168,input=f32,t=8064".to_owned(), DType::F32, (8064, 7168), plain),
    ];
    for (dtype, input) in [(DType::Bf16, "bf16"), (DType::F32, "f32")] {
        for (layout, sf) in [(plain, "row"), (packed, "packed")] {
            rows.push(row(format!("h=7168,input={input},sf={sf},t=8001"), dtype, (8001, 7168), layout));
        }
    }
    for (t, h) in [(4001, 2048), (1, 7168), (16, 7168), (128, 7168)] {
        rows.push(row(format!("h={h},input=bf16,sf=row,t={t}"), DType::Bf16, (t, h), plain));
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferrotile::{Error, Result, TensorMut, View};
    use proptest::prelude::{ProptestConfig, proptest};

    #[test]
    fn suite() {
        SUITE.test();
    }

    /// The vectors of quant.md 9, to hold the reference to something.
    #[test]
    fn the_reference_reproduces_the_published_vectors() {
        let x = [0.1, -0.25, 1.0, 3.0, -7.5, 0.0, -0.0, 100.0];
        let check = |x: &[f32], round, sf: u32, data: &[u8]| {
            let q = reference(x, 8, round);
            assert_eq!((q.sf[0].to_bits(), &q.data[..]), (sf, data), "{round}");
        };
        check(&x, false, 0x3AC9_9326, &[0x61, 0x91, 0x1D, 0x54, 0xC0, 0xEC, 0x7A, 0x16, 0xBF, 0x07, 0x80, 0x00]);
        check(&x, true, 0x3B00_0000, &[0x60, 0x80, 0x6D, 0x52, 0x80, 0xEB, 0x60, 0x06, 0xA4, 0x07, 0x80, 0x00]);
        check(&[0.0; 8], false, 0x30D3_5DD3, &[0; 12]);
        check(&[0.0; 8], true, 98 << 23, &[0; 12]);
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
            assert_eq!(e5m6(v), code, "{v:e}");
        }
    }

    /// A call, right but for what a test changes.
    struct Call {
        x: TensorRef<'static>,
        round_sf: bool,
        out: TensorMut<'static>,
        sf: TensorMut<'static>,
        layout: SfLayout,
    }

    /// A tensor `offset` bytes behind another.
    fn view(t: &View, offset: u64, dtype: DType, shape: &[u64], strides: &[u64]) -> TensorMut<'static> {
        // SAFETY: in these tests the buffers outlive the calls, and tensors that overlap are refused.
        unsafe { TensorMut::from_raw(t.device(), t.ptr() + offset, dtype, shape, strides).unwrap() }
    }

    /// The same for reading.
    fn read(t: &View, offset: u64, dtype: DType, shape: &[u64], strides: &[u64]) -> TensorRef<'static> {
        // SAFETY: as in `view`.
        unsafe { TensorRef::from_raw(t.device(), t.ptr() + offset, dtype, shape, strides).unwrap() }
    }

    /// Runs a changed call on fresh buffers; what is refused must leave the outputs alone.
    fn call(change: impl FnOnce(&mut Call)) -> Result<()> {
        let device = Device::emulator();
        let memory = device.zeros::<f32>(4096)?;
        let (mut out, mut sf) = (device.alloc::<u8>(40 * 96 + 64)?, device.alloc::<f32>(128)?);
        out.fill_bytes(FILL)?;
        sf.fill_bytes(FILL)?;
        let mut c = Call {
            x: read(&*memory.tensor(&[4096])?, 0, DType::F32, &[40, 64], &[64, 1]),
            round_sf: false,
            out: view(&*out.tensor(&[40])?, 0, DType::U8, &[40, 96], &[96, 1]),
            sf: view(&*sf.tensor(&[40])?, 0, DType::F32, &[40, 1], &[1, 1]),
            layout: SfLayout::RowMajor,
        };
        change(&mut c);
        let sf_out = SfMut { tensor: c.sf, layout: c.layout };
        let result = op::per_token_cast_to_e5m6(&device.stream()?, Args { x: c.x, round_sf: c.round_sf, out: c.out, sf: sf_out });
        if result.is_err() {
            assert!(out.to_vec()?.iter().all(|v| *v == FILL), "out was written");
            assert!(sf.to_vec()?.iter().all(|v| v.to_bits() == u32::from_ne_bytes([FILL; 4])), "sf was written");
        }
        result
    }

    #[test]
    fn bad_arguments_are_named() {
        assert!(call(|_| ()).is_ok());
        let refuses = |change: &dyn Fn(&mut Call), start: &str| {
            let text = call(|c| change(c)).expect_err(start).to_string();
            assert!(text.starts_with(&format!("per_token_cast_to_e5m6: {start}")), "{text}\nexpected {start}");
        };
        let x = |c: &mut Call, dtype, shape: &[u64], strides: &[u64]| c.x = read(&c.x, 0, dtype, shape, strides);
        refuses(&|c| x(c, DType::F32, &[64], &[1]), "x has shape [64]");
        refuses(&|c| x(c, DType::F16, &[40, 64], &[64, 1]), "x is f16, allowed: bf16, f32");
        refuses(&|c| x(c, DType::F32, &[40, 60], &[64, 1]), "hidden is 60, allowed: multiples of 8");
        refuses(&|c| x(c, DType::F32, &[40, 64], &[1, 40]), "layout of x is");
        refuses(&|c| c.x = read(&c.x, 2, DType::F32, &[40, 64], &[64, 1]), "layout of x is");
        refuses(&|c| c.out = view(&c.out, 0, DType::E4m3, &[40, 96], &[96, 1]), "out is e4m3, allowed: u8");
        refuses(&|c| c.out = view(&c.out, 0, DType::U8, &[40, 64], &[64, 1]), "out has shape [40, 64], expected [40, 96]");
        refuses(&|c| c.out = view(&c.out, 0, DType::U8, &[40, 96], &[97, 1]), "layout of out is");
        refuses(&|c| c.sf = view(&c.sf, 0, DType::F32, &[40, 2], &[2, 1]), "sf has shape [40, 2], expected [40, 1]");
        refuses(&|c| c.layout = SfLayout::RowMajorE4m3, "layout of sf is row-major e4m3, expected row-major, ");
        refuses(&|c| c.layout = SfLayout::ColMajorPacked, "round_sf is false, allowed: true with col-major packed scales");
        refuses(&|c| (c.layout, c.round_sf) = (SfLayout::ColMajorPacked, true), "sf is f32, allowed: ue8m0x4");
        refuses(&|c| c.out = view(&c.x, 0, DType::U8, &[40, 96], &[96, 1]), "x and out overlap");
        refuses(&|c| c.sf = view(&c.x, 64, DType::F32, &[40, 1], &[1, 1]), "x and sf overlap");
        refuses(&|c| c.sf = view(&c.out, 16, DType::F32, &[40, 1], &[1, 1]), "out and sf overlap");
        let elsewhere = Device::emulator().checked().zeros::<f32>(2560).unwrap();
        let error = call(|c| c.x = read(&elsewhere.tensor(&[1]).unwrap(), 0, DType::F32, &[40, 64], &[64, 1])).unwrap_err();
        assert!(matches!(error, Error::DeviceMismatch { arg: "x", .. }), "{error}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        /// Any shape, distance of rows, alignment and range of values.
        #[test]
        fn any_input(
            t in 0u64..40, columns in 1u64..60, gap in 0u64..9, offset in 0u64..9, out_offset in 0u64..17, f32_input: bool, round: bool,
            layout in 0usize..4, exponent in -130i32..120, seed: u64,
        ) {
            let device = Device::emulator();
            let h = 8 * columns;
            let dtype = if f32_input { DType::F32 } else { DType::Bf16 };
            let layout = if round { SfLayout::COMMON[layout] } else { PLAIN[layout % 2] };
            let values = Rng::new(seed).fill((t * h) as usize, |rng, i| {
                let v = (rng.normal(i) as f64 * 2f64.powi(exponent - rng.below(i, 50) as i32)) as f32;
                if dtype == DType::Bf16 { bf16::from_f32(v).to_f32() } else { v }
            });
            let input = Input::new(&device, dtype, (t, h), (gap, offset), values).unwrap();
            let mut out = Outputs::new(&device, &input, layout, out_offset).unwrap();
            out.cast(&device.stream().unwrap(), &input, round).unwrap();
            out.check("any", &reference(&input.values, h as usize, round)).unwrap();
        }
    }
}
