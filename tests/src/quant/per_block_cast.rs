//! Reference, cases, checks and benchmark rows of `per_block_cast` and its two variants.

use crate::support::bench::{Launch, Row};
use crate::support::cases::{Depth, HIDDENS, TOKENS};
use crate::support::compare;
use crate::support::golden::{self, Case, Golden};
use crate::support::inputs;
use crate::support::rng::Rng;
use crate::support::suite::{Ctx, Report, Suite, ensure, text};
use ferrotile::quant::per_block_cast::{self as op, Args, PrecomputedArgs, SfOnlyArgs};
use ferrotile::quant::{Format, Sf, SfLayout, SfMut, SfShape, sf_shape};
use ferrotile::{Buffer, DType, Device, E2m1x2, E4m3, Stream, TensorRef, Ue8m0x4};
use half::bf16;
use rayon::prelude::*;
use std::cell::OnceCell;

/// What the `check` binary runs.
pub const SUITE: Suite = Suite { op: "per_block_cast", run };

type Block = (u32, u32);

// The reference.

/// Data as bytes, row by row, and scales `(M, K)`.
#[derive(Clone, Debug, PartialEq)]
struct Quantised {
    data: Vec<u8>,
    sf: Vec<f32>,
}

/// Largest value and smallest `amax` of a format.
fn limits(format: Format) -> (f32, f32) {
    match format {
        Format::E4m3 => (448.0, 1e-4),
        Format::E2m1 => (6.0, 6.0 * 2f32.powi(-126)),
    }
}

/// `(sf, what the data are multiplied by)`.
fn reference_scale(amax: f32, format: Format, round: bool) -> (f32, f32) {
    let (largest, amax_min) = limits(format);
    let c = if amax > amax_min { amax } else { amax_min };
    let s = c / largest;
    if !round {
        return (s, largest / c);
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

/// The code nearest to a value, ties to even: the spacing of the format around the value is a power of two, and codes count steps.
fn nearest(v: f32, mantissa_bits: i32, min_exponent: i32, largest: u32, sign: u32, nan: u32) -> u32 {
    if v.is_nan() {
        return nan;
    }
    let exponent = ((v.to_bits() >> 23 & 0xFF) as i32 - 127).max(min_exponent);
    let spacing = f32::from_bits(((exponent - mantissa_bits + 127) as u32) << 23);
    let steps = (v.abs() / spacing).round_ties_even();
    let code = if exponent > 60 { largest } else { steps as u32 + (((exponent - min_exponent) as u32) << mantissa_bits) };
    code.min(largest) | if v.is_sign_negative() { sign } else { 0 }
}

fn e4m3(v: f32) -> u8 {
    nearest(v, 3, -6, 0x7E, 0x80, 0x7F) as u8
}

fn e2m1(v: f32) -> u8 {
    nearest(v, 1, 0, 7, 8, 7) as u8
}

/// The cast of `x`, `(t, h)`; with `given` scales instead of computed ones.
fn reference(x: &[f32], h: usize, format: Format, (npt, npc): Block, round: bool, given: Option<&[f32]>) -> Quantised {
    let (npt, npc) = (npt as usize, npc as usize);
    let columns = h.div_ceil(npc);
    let rows = (x.len() / h.max(1)).div_ceil(npt);
    let row_bytes = format.columns(h as u64) as usize;
    let mut data = vec![0u8; x.len() / h.max(1) * row_bytes];
    let mut sf = vec![0f32; rows * columns];
    if x.is_empty() {
        return Quantised { data, sf };
    }
    let strips = data.par_chunks_mut(npt * row_bytes).zip(sf.par_chunks_mut(columns)).zip(x.par_chunks(npt * h)).enumerate();
    strips.for_each(|(m, ((data, sf), x))| {
        let mut amax = vec![0f32; columns];
        for row in x.chunks_exact(h) {
            for (amax, values) in amax.iter_mut().zip(row.chunks(npc)) {
                // `>` is false for NaN.
                *amax = values.iter().fold(*amax, |max, v| if v.abs() > max { v.abs() } else { max });
            }
        }
        let mut inverse = vec![0f32; columns];
        for k in 0..columns {
            (sf[k], inverse[k]) = match given {
                Some(given) => (given[m * columns + k], 1.0 / given[m * columns + k]),
                None => reference_scale(amax[k], format, round),
            };
        }
        for (row, out) in x.chunks_exact(h).zip(data.chunks_exact_mut(row_bytes)) {
            let scaled = |i: usize| row[i] * inverse[i / npc];
            match format {
                Format::E4m3 => out.iter_mut().enumerate().for_each(|(i, q)| *q = e4m3(scaled(i))),
                Format::E2m1 => {
                    out.iter_mut().enumerate().for_each(|(i, q)| *q = e2m1(scaled(2 * i)) | e2m1(scaled(2 * i + 1)) << 4)
                }
            }
        }
    });
    Quantised { data, sf }
}

/// What the values of `data` stand for.
fn dequantised(q: &Quantised, h: usize, format: Format, (npt, npc): Block) -> Vec<f32> {
    let columns = h.div_ceil(npc as usize);
    let e4m3 = |c: u8| {
        let (exp, man) = ((c >> 3 & 15) as i32, (c & 7) as f32);
        let magnitude = if exp == 0 { man * 2f32.powi(-9) } else { (8.0 + man) * 2f32.powi(exp - 10) };
        if c & 0x80 != 0 { -magnitude } else { magnitude }
    };
    let e2m1 = |c: u8| {
        let magnitude = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0][(c & 7) as usize];
        if c & 8 != 0 { -magnitude } else { magnitude }
    };
    let len = match format {
        Format::E4m3 => q.data.len(),
        Format::E2m1 => 2 * q.data.len(),
    };
    let value = |i: usize| match format {
        Format::E4m3 => e4m3(q.data[i]),
        Format::E2m1 => e2m1(q.data[i / 2] >> (4 * (i % 2)) & 15),
    };
    (0..len).into_par_iter().map(|i| value(i) * q.sf[i / h / npt as usize * columns + i % h / npc as usize]).collect()
}

/// Words of the scale tensor, contiguous: f32 bits, or four exponents with zeros for blocks that do not exist.
fn sf_words(sf: &[f32], columns: usize, layout: SfLayout) -> Vec<u32> {
    if !layout.is_packed() {
        return sf.iter().map(|v| v.to_bits()).collect();
    }
    let word = |four: &[f32]| four.iter().rev().fold(0, |word, v| word << 8 | v.to_bits() >> 23);
    sf.chunks(columns.max(1)).flat_map(|row| row.chunks(4).map(word)).collect()
}

// Inputs.

/// An input on the device, and its values.
struct Input {
    t: u64,
    h: u64,
    stride: u64,
    offset: u64,
    values: Vec<f32>,
    buffer: Elements,
}

enum Elements {
    Bf16(Buffer<bf16>),
    F32(Buffer<f32>),
}

impl Input {
    /// `values` in rows that lie `stride` elements apart, from element `offset` of a buffer on. bf16 values must be given as such.
    fn new(
        device: &Device,
        dtype: DType,
        (t, h): (u64, u64),
        (stride, offset): (u64, u64),
        values: Vec<f32>,
    ) -> Result<Self, String> {
        let plain = stride == h && offset == 0;
        let len = if t == 0 { offset } else { offset + (t - 1) * stride + h } as usize;
        // What lies between the rows would be noticed if it were read.
        let spread = |between: f32| {
            let mut all = vec![between; len];
            for (row, values) in values.chunks_exact(h.max(1) as usize).enumerate() {
                let start = (offset + row as u64 * stride) as usize;
                all[start..start + h as usize].copy_from_slice(values);
            }
            all
        };
        let buffer = match (dtype, plain) {
            (DType::Bf16, true) => Elements::Bf16(device.upload(&to_bf16(&values)).map_err(text)?),
            (DType::Bf16, false) => Elements::Bf16(device.upload(&to_bf16(&spread(1e30))).map_err(text)?),
            (_, true) => Elements::F32(device.upload(&values).map_err(text)?),
            (_, false) => Elements::F32(device.upload(&spread(1e30)).map_err(text)?),
        };
        Ok(Self { t, h, stride, offset, values, buffer })
    }

    fn tensor(&self) -> Result<TensorRef<'_>, String> {
        let (shape, strides) = ([self.t, self.h], [self.stride, 1]);
        match &self.buffer {
            Elements::Bf16(b) => b.strided(&shape, &strides, self.offset),
            Elements::F32(b) => b.strided(&shape, &strides, self.offset),
        }
        .map_err(text)
    }

    fn dtype(&self) -> DType {
        match self.buffer {
            Elements::Bf16(_) => DType::Bf16,
            Elements::F32(_) => DType::F32,
        }
    }
}

fn to_bf16(values: &[f32]) -> Vec<bf16> {
    values.par_iter().map(|v| bf16::from_f32(*v)).collect()
}

/// Standard normal values; bf16 as f32.
fn normal(dtype: DType, len: usize, name: &str) -> Vec<f32> {
    let mut values = Rng::named(name).normal_f32(len);
    if dtype == DType::Bf16 {
        values.par_iter_mut().for_each(|v| *v = bf16::from_f32(*v).to_f32());
    }
    values
}

/// Values with all that is hard: zero blocks, negative zeros, subnormals, halfway points of both formats and their neighbours, one huge
/// value in a block, the largest finite value, NaN.
fn awkward(dtype: DType, (t, h): (u64, u64), name: &str) -> Vec<f32> {
    let mut values = normal(dtype, (t * h) as usize, name);
    let rng = Rng::named(name).stream(1);
    let ties = [0.25f32, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 1.0625, 1.1875, 2f32.powi(-10), 1.5 * 2f32.powi(-9)];
    for (i, v) in values.iter_mut().enumerate() {
        let (row, col) = (i as u64 / h, i as u64 % h);
        let draw = rng.bits(i as u64);
        let sign = if draw & 1 == 0 { 1.0 } else { -1.0 };
        *v = match (row / 32, col / 32) {
            // Blocks of zeros, of negative ones among them, of subnormals, of values below the clamp.
            (0, 0) => 0.0 * sign,
            (0, 1) => f32::from_bits((draw >> 8) as u32 & 0x807F_FFFF),
            (0, 2) => *v * 1e-6,
            // amax 6 or 448 and halfway points: the scale is 1.
            (_, 3) if row % 32 == 0 && col % 32 == 0 => 6.0,
            (_, 4) if row % 32 == 0 && col % 32 == 0 => 448.0,
            (_, 3 | 4) => {
                let tie = ties[(draw >> 8) as usize % ties.len()].to_bits();
                let step = if dtype == DType::Bf16 { 1 << 16 } else { 1 };
                sign * f32::from_bits(tie.wrapping_add_signed(((draw >> 16) as i32).rem_euclid(3) * step - step))
            }
            (_, 5) if col % 32 == 7 && row % 32 == 0 => 1e38 * sign,
            (1, 6) if col % 32 == 31 => f32::MAX * sign,
            (_, 7) if draw.is_multiple_of(61) => f32::NAN,
            (_, 8) => f32::NAN,
            _ => *v,
        };
        if dtype == DType::Bf16 {
            // Toward zero: the largest f32 would become infinity.
            *v = f32::from_bits(v.to_bits() & 0xFFFF_0000);
        }
    }
    values
}

// Running.

/// Bytes or words behind an output that must stay as they are.
const GUARD: usize = 64;
const FILL: u8 = 0xA5;

/// Output buffers of one call.
struct Outputs {
    format: Format,
    shape: [u64; 2],
    data: Buffer<u8>,
    sf_shape: SfShape,
    layout: SfLayout,
    sf: Buffer<u32>,
}

impl Outputs {
    fn new(device: &Device, input: &Input, format: Format, block: Block, layout: SfLayout) -> Result<Self, String> {
        let shape = [input.t, format.columns(input.h)];
        let sf_shape = sf_shape(input.t, input.h, block, layout);
        let mut data = device.alloc::<u8>((shape[0] * shape[1]) as usize + GUARD).map_err(text)?;
        let mut sf = device.alloc::<u32>(sf_shape.elements as usize + GUARD).map_err(text)?;
        data.fill_bytes(FILL).map_err(text)?;
        sf.fill_bytes(FILL).map_err(text)?;
        Ok(Self { format, shape, data, sf_shape, layout, sf })
    }

    fn cast(&mut self, stream: &Stream, x: TensorRef<'_>, block: Block, round_sf: bool) -> ferrotile::Result<()> {
        let out = self.data.tensor_mut(&self.shape)?.reinterpret(self.format.dtype())?;
        let sf = self.sf.strided_mut(&self.sf_shape.shape, &self.sf_shape.strides, 0)?.reinterpret(self.sf_shape.dtype)?;
        let sf = SfMut { tensor: sf, layout: self.layout };
        op::per_block_cast(stream, Args { x, block, round_sf, out, sf })
    }

    fn sf_only(&mut self, stream: &Stream, x: TensorRef<'_>, block: Block, round_sf: bool) -> ferrotile::Result<()> {
        let sf = self.sf.strided_mut(&self.sf_shape.shape, &self.sf_shape.strides, 0)?.reinterpret(self.sf_shape.dtype)?;
        let sf = SfMut { tensor: sf, layout: self.layout };
        op::per_block_cast_with_sf_only(stream, SfOnlyArgs { x, format: self.format, block, round_sf, sf })
    }

    /// Takes the scales of `sf`, `(M, K)` in rows that lie `pitch` apart.
    fn precomputed(
        &mut self,
        stream: &Stream,
        x: TensorRef<'_>,
        block: Block,
        sf: &Buffer<f32>,
        pitch: u64,
    ) -> ferrotile::Result<()> {
        let out = self.data.tensor_mut(&self.shape)?.reinterpret(self.format.dtype())?;
        let tensor = sf.strided(&self.sf_shape.shape, &[pitch, 1], 0)?;
        let sf = Sf { tensor, layout: SfLayout::RowMajor };
        op::per_block_cast_with_precomputed_sf(stream, PrecomputedArgs { x, sf, block, out })
    }

    fn check_data(&self, name: &str, expected: &[u8]) -> Result<(), String> {
        let data = self.data.to_vec().map_err(text)?;
        let (data, guard) = data.split_at(data.len() - GUARD);
        ensure(guard.iter().all(|b| *b == FILL), || format!("data: bytes behind the tensor were written; {name}"))?;
        let what = "data";
        match self.format {
            Format::E4m3 => {
                compare::equal::<E4m3>(what, name, &self.shape, bytemuck::cast_slice(data), bytemuck::cast_slice(expected))
            }
            Format::E2m1 => {
                compare::equal::<E2m1x2>(what, name, &self.shape, bytemuck::cast_slice(data), bytemuck::cast_slice(expected))
            }
        }
    }

    fn check_sf(&self, name: &str, expected: &[u32]) -> Result<(), String> {
        let SfShape { shape, strides, .. } = &self.sf_shape;
        let sf = self.sf.to_vec().map_err(text)?;
        if self.layout.is_packed() {
            compare::equal_strided::<Ue8m0x4>(
                "sf",
                name,
                shape,
                strides,
                bytemuck::cast_slice(&sf),
                bytemuck::cast_slice(expected),
            )?;
        } else {
            compare::equal_strided::<f32>("sf", name, shape, strides, bytemuck::cast_slice(&sf), bytemuck::cast_slice(expected))?;
        }
        compare::untouched("sf", name, shape, strides, &sf, FILL)
    }
}

const BLOCKS: [Block; 4] = [(32, 32), (128, 128), (32, 128), (128, 32)];
const ROUNDED: [SfLayout; 4] = [SfLayout::RowMajor, SfLayout::ColMajorPacked, SfLayout::ColMajor, SfLayout::RowMajorPacked];
const PLAIN: [SfLayout; 2] = [SfLayout::RowMajor, SfLayout::ColMajor];

/// All options on one input.
fn check_input(ctx: &Ctx, input: &Input, blocks: &[Block], kind: &str) -> Result<(), String> {
    let stream = ctx.device.stream().map_err(text)?;
    let x = input.tensor()?;
    let h = input.h as usize;
    let bias = kind == "normal" && ctx.depth == Depth::Full;
    for &block in blocks {
        for format in [Format::E4m3, Format::E2m1] {
            for round in [true, false] {
                let case = |variant: &str, layout: SfLayout| {
                    format!(
                        "block={}x{},fmt={format},h={h},input={},kind={kind},op={variant},round_sf={round},sf={layout},stride={},t={}",
                        block.0,
                        block.1,
                        input.dtype(),
                        input.stride,
                        input.t
                    )
                };
                let columns = h.div_ceil(block.1 as usize);
                let cell = OnceCell::new();
                let expected = || cell.get_or_init(|| reference(&input.values, h, format, block, round, None));
                let layouts: &[SfLayout] = if round { &ROUNDED } else { &PLAIN };
                for (i, &layout) in layouts.iter().enumerate() {
                    let name = case("cast", layout);
                    if ctx.case(&name) {
                        let mut out = Outputs::new(&ctx.device, input, format, block, layout)?;
                        out.cast(&stream, x, block, round).map_err(text)?;
                        let words = sf_words(&expected().sf, columns, layout);
                        out.check_sf(&name, &words)?;
                        out.check_data(&name, &expected().data)?;
                        if i == 0 {
                            // Once more, over its own results.
                            out.cast(&stream, x, block, round).map_err(text)?;
                            out.check_sf(&name, &words)?;
                            out.check_data(&name, &expected().data)?;
                        }
                    }
                    let name = case("sf_only", layout);
                    if ctx.case(&name) {
                        let mut out = Outputs::new(&ctx.device, input, format, block, layout)?;
                        out.sf_only(&stream, x, block, round).map_err(text)?;
                        out.check_sf(&name, &sf_words(&expected().sf, columns, layout))?;
                    }
                }
                let name = case("precomputed", SfLayout::RowMajor);
                if ctx.case(&name) {
                    // Rows of scales may lie any distance apart.
                    let pitch = columns + 3;
                    let mut rows = vec![f32::NAN; expected().sf.len() / columns.max(1) * pitch];
                    for (row, sf) in rows.chunks_mut(pitch).zip(expected().sf.chunks(columns.max(1))) {
                        row[..columns].copy_from_slice(sf);
                    }
                    let sf = ctx.device.upload(&rows).map_err(text)?;
                    let mut out = Outputs::new(&ctx.device, input, format, block, SfLayout::RowMajor)?;
                    out.precomputed(&stream, x, block, &sf, pitch as u64).map_err(text)?;
                    // Powers of two have exact inverses: the same data.
                    let own = reference(&input.values, h, format, block, round, Some(&expected().sf));
                    ensure(!round || own.data == expected().data, || format!("the references disagree; {name}"))?;
                    out.check_data(&name, &own.data)?;
                }
                if bias && let Some(expected) = cell.get() {
                    let back = dequantised(expected, h, format, block);
                    compare::check_bias("data", &case("cast", SfLayout::RowMajor), &back, &input.values)?;
                }
            }
        }
    }
    Ok(())
}

fn run(ctx: &Ctx) -> Result<Report, String> {
    let dtypes = [DType::Bf16, DType::F32];
    let input = |dtype, shape: (u64, u64), (stride, offset), kind: &str| {
        let name = format!("per_block_cast {dtype} {shape:?} {kind}");
        let values = match kind {
            "awkward" => awkward(dtype, shape, &name),
            _ => normal(dtype, (shape.0 * shape.1) as usize, &name),
        };
        Input::new(&ctx.device, dtype, shape, (stride, offset), values)
    };
    for dtype in dtypes {
        // Rows of any distance: aligned vectors, and elements one by one; ragged edges on both sides, many awkward values.
        check_input(ctx, &input(dtype, (37, 576), (576, 0), "awkward")?, &BLOCKS, "awkward")?;
        check_input(ctx, &input(dtype, (165, 192), (384, 8), "normal, apart")?, &BLOCKS[..2], "normal, apart")?;
        check_input(ctx, &input(dtype, (3, 320), (323, 1), "awkward")?, &BLOCKS[..1], "awkward")?;
        check_input(ctx, &input(dtype, (0, 384), (384, 0), "empty")?, &BLOCKS, "empty")?;
        check_input(ctx, &input(dtype, (5, 0), (0, 0), "empty")?, &BLOCKS[..1], "empty")?;
        if ctx.depth == Depth::Small {
            check_input(ctx, &input(dtype, (1, 2048), (2048, 0), "normal")?, &BLOCKS[1..2], "normal")?;
            continue;
        }
        check_input(ctx, &input(dtype, (4001, 576), (581, 3), "awkward")?, &BLOCKS, "awkward")?;
        for h in HIDDENS {
            for t in [1].into_iter().chain(TOKENS) {
                // The mixed blocks where the edges are ragged, and at the largest size.
                let blocks = if h == 576 || h == 7168 { &BLOCKS[..] } else { &BLOCKS[..2] };
                check_input(ctx, &input(dtype, (t, h), (h, 0), "normal")?, blocks, "normal")?;
            }
        }
    }
    if !ctx.device.is_emulator() {
        check_graphs(ctx)?;
        if ctx.depth == Depth::Full {
            check_large_output(ctx)?;
            check_large_input(ctx)?;
        }
    }
    let notes = golden::check_cases(ctx, &["per_block_cast"], |golden, case| check_golden(ctx, golden, case))?;
    Ok(Report { notes, ..ctx.report() })
}

/// What the peers computed.
fn check_golden(ctx: &Ctx, golden: &Golden, case: &Case) -> Result<(), String> {
    let name = case.name();
    let format = if case.param::<String>("fmt")? == "e4m3" { Format::E4m3 } else { Format::E2m1 };
    let block: Block = case.param("block_size")?;
    let (layout, round) = case.sf_options()?;
    let x = golden.tensor(case, "in/x")?;
    let values = x.floats()?;
    let shape = (x.shape[0], x.shape[1]);
    let input = Input::new(&ctx.device, DType::Bf16, shape, (x.shape[1], 0), values)?;
    let mut out = Outputs::new(&ctx.device, &input, format, block, layout)?;
    let stream = ctx.device.stream().map_err(text)?;
    out.cast(&stream, input.tensor().map_err(text)?, block, round).map_err(text)?;
    stream.synchronize().map_err(text)?;
    out.check_data(&name, golden.tensor(case, "out/0")?.bytes)?;
    let sf = golden.tensor(case, "out/1")?;
    sf.check_place(&name, &out.sf_shape)?;
    let words = if layout.is_packed() { sf.packed_words(shape.1.div_ceil(block.1.into()))? } else { sf.to_vec()? };
    out.check_sf(&name, &words)
}

/// Every launcher recorded in a graph and replayed.
fn check_graphs(ctx: &Ctx) -> Result<(), String> {
    let name = "kind=graph,h=576,t=133";
    if !ctx.case(name) {
        return Ok(());
    }
    let (format, block, layout) = (Format::E4m3, (32, 128), SfLayout::RowMajor);
    let input = Input::new(&ctx.device, DType::Bf16, (133, 576), (576, 0), normal(DType::Bf16, 133 * 576, name))?;
    let x = input.tensor()?;
    let expected = reference(&input.values, 576, format, block, true, None);
    let stream = ctx.device.stream().map_err(text)?;
    let given = ctx.device.upload(&expected.sf).map_err(text)?;
    let columns = 576u64.div_ceil(block.1.into());
    let words = sf_words(&expected.sf, columns as usize, layout);
    let mut all = Outputs::new(&ctx.device, &input, format, block, layout)?;
    let mut scales = Outputs::new(&ctx.device, &input, format, block, layout)?;
    let mut data = Outputs::new(&ctx.device, &input, format, block, layout)?;
    let graph = stream
        .capture(|s| {
            all.cast(s, x, block, true)?;
            scales.sf_only(s, x, block, true)?;
            data.precomputed(s, x, block, &given, columns)
        })
        .map_err(text)?;
    for replay in 0..2 {
        for buffer in [&mut all.data, &mut data.data] {
            buffer.fill_bytes(FILL).map_err(text)?;
        }
        for buffer in [&mut all.sf, &mut scales.sf] {
            buffer.fill_bytes(FILL).map_err(text)?;
        }
        graph.launch(&stream).map_err(text)?;
        stream.synchronize().map_err(text)?;
        let name = format!("{name},replay={replay}");
        all.check_data(&name, &expected.data)?;
        all.check_sf(&name, &words)?;
        scales.check_sf(&name, &words)?;
        data.check_data(&name, &expected.data)?;
    }
    Ok(())
}

/// More than 2^31 output elements. All rows are one row in memory (stride 0), so every row of the output must be the same.
fn check_large_output(ctx: &Ctx) -> Result<(), String> {
    let (t, h) = (300_001u64, 7168u64);
    let name = "kind=large output,h=7168,t=300001";
    if !ctx.case(name) {
        return Ok(());
    }
    let (block, layout) = ((128, 128), SfLayout::ColMajor);
    let row = normal(DType::F32, h as usize, name);
    let expected = reference(&row, h as usize, Format::E4m3, block, true, None);
    let buffer = Elements::F32(ctx.device.upload(&row).map_err(text)?);
    let input = Input { t, h, stride: 0, offset: 0, values: row, buffer };
    let mut out = Outputs::new(&ctx.device, &input, Format::E4m3, block, layout)?;
    out.cast(&ctx.device.stream().map_err(text)?, input.tensor()?, block, true).map_err(text)?;
    let data = out.data.to_vec().map_err(text)?;
    let rows = data[..(t * h) as usize].par_chunks_exact(h as usize);
    if let Some(bad) = rows.enumerate().find_map_any(|(i, row)| (row != expected.data).then_some(i)) {
        return Err(format!("data: row {bad} differs; {name}"));
    }
    let block_rows = t.div_ceil(block.0.into()) as usize;
    let sf: Vec<f32> = expected.sf.iter().copied().cycle().take(block_rows * expected.sf.len()).collect();
    out.check_sf(name, &sf_words(&sf, expected.sf.len(), layout))
}

/// Rows that lie 2^24 + 8 elements apart: offsets in `x` beyond 2^32 bytes.
fn check_large_input(ctx: &Ctx) -> Result<(), String> {
    let (t, h, stride) = (130u64, 576u64, (1u64 << 24) + 8);
    let name = "kind=large input,h=576,t=130";
    if !ctx.case(name) {
        return Ok(());
    }
    let (block, layout) = ((32, 32), SfLayout::RowMajor);
    let values = normal(DType::Bf16, (t * h) as usize, name);
    let stream = ctx.device.stream().map_err(text)?;
    let rows = ctx.device.upload(&to_bf16(&values)).map_err(text)?;
    let mut wide = ctx.device.alloc::<bf16>(((t - 1) * stride + h) as usize).map_err(text)?;
    for i in 0..t {
        let mut to = wide.strided_mut(&[h], &[1], i * stride).map_err(text)?;
        stream.copy(&mut to, &rows.strided(&[h], &[1], i * h).map_err(text)?).map_err(text)?;
    }
    let expected = reference(&values, h as usize, Format::E2m1, block, true, None);
    let input = Input { t, h, stride, offset: 0, values, buffer: Elements::Bf16(wide) };
    let mut out = Outputs::new(&ctx.device, &input, Format::E2m1, block, layout)?;
    out.cast(&stream, input.tensor()?, block, true).map_err(text)?;
    out.check_data(name, &expected.data)?;
    out.check_sf(name, &sf_words(&expected.sf, h.div_ceil(32) as usize, layout))
}

// The benchmark.

/// One row: names as the peers', if they have the case.
fn row(case: String, dtype: DType, (t, h): (u64, u64), format: Format, block: Block, layout: SfLayout) -> Row {
    let sf = sf_shape(t, h, block, layout);
    let bytes = t * h * dtype.size() + t * format.columns(h) + 4 * sf.shape[0] * sf.shape[1];
    let build = move |device: &Device, _: &Stream| -> Result<Launch, String> {
        let buffer = match dtype {
            DType::Bf16 => Elements::Bf16(inputs::normal_bf16(device, 0, t * h)?),
            _ => Elements::F32(inputs::normal_f32(device, 0, t * h)?),
        };
        let input = Input { t, h, stride: h, offset: 0, values: Vec::new(), buffer };
        let mut out = Outputs::new(device, &input, format, block, layout)?;
        Ok(Box::new(move |stream| {
            let x = match &input.buffer {
                Elements::Bf16(b) => b.tensor(&[t, h])?,
                Elements::F32(b) => b.tensor(&[t, h])?,
            };
            out.cast(stream, x, block, true)
        }))
    };
    Row { op: "per_block_cast", case, bytes, build: Box::new(build) }
}

/// The peers' cases, those of 1.0.0's own benchmark, and small inputs.
pub fn bench() -> Vec<Row> {
    let mut rows = Vec::new();
    for format in [Format::E4m3, Format::E2m1] {
        let case = format!("block=128x128,fmt={format},h=7168,input=bf16,t=8064");
        rows.push(row(case, DType::Bf16, (8064, 7168), format, (128, 128), SfLayout::RowMajor));
    }
    for (dtype, input) in [(DType::Bf16, "bf16"), (DType::F32, "f32")] {
        for format in [Format::E4m3, Format::E2m1] {
            for (layout, sf) in [(SfLayout::RowMajor, "row"), (SfLayout::ColMajorPacked, "packed")] {
                for block in [(128, 128), (32, 32)] {
                    let case = format!("block={}x{},fmt={format},h=7168,input={input},sf={sf},t=8001", block.0, block.1);
                    rows.push(row(case, dtype, (8001, 7168), format, block, layout));
                }
            }
        }
    }
    let shapes = [(4001, 2048), (1, 7168), (16, 7168), (128, 7168)];
    for (t, h) in shapes {
        let case = format!("block=128x128,fmt=e4m3,h={h},input=bf16,t={t}");
        rows.push(row(case, DType::Bf16, (t, h), Format::E4m3, (128, 128), SfLayout::RowMajor));
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferrotile::{Error, Result};
    use proptest::prelude::{ProptestConfig, proptest};

    #[test]
    fn suite() {
        SUITE.test();
    }

    /// The vectors of quant.md 9, to hold the reference to something.
    #[test]
    fn the_reference_reproduces_the_published_vectors() {
        let row = |values: [f32; 8]| {
            let mut x = vec![0.0; 64];
            x[..8].copy_from_slice(&values);
            x
        };
        let x = row([0.1, -0.25, 1.0, 3.0, -7.5, 0.0, -0.0, 100.0]);
        let y = row([0.3, -2.0, 5.0, -6.0, 1.25, 2.5, -0.75, 0.26]);
        let check = |x: &[f32], format, round, sf: u32, data: &[u8]| {
            let q = reference(x, 64, format, (32, 32), round, None);
            assert_eq!((q.sf[0].to_bits(), &q.data[..data.len()]), (sf, data), "{format} {round}");
        };
        check(&x, Format::E4m3, false, 0x3E64_9249, &[0x2E, 0xB9, 0x49, 0x55, 0xE0, 0, 0x80, 0x7E]);
        check(&x, Format::E4m3, true, 0x3E80_0000, &[0x2D, 0xB8, 0x48, 0x54, 0xDF, 0, 0x80, 0x7C]);
        check(&x, Format::E2m1, false, 0x4185_5555, &[0x80, 0, 0x09, 0x78]);
        check(&x, Format::E2m1, true, 0x4200_0000, &[0x80, 0, 0x08, 0x58]);
        check(&y, Format::E2m1, true, 1f32.to_bits(), &[0xC1, 0xF6, 0x42, 0x1A]);
        check(&y, Format::E4m3, true, 2f32.powi(-6).to_bits(), &[0x5A, 0xF0, 0x7A, 0xFC, 0x6A, 0x72, 0xE4, 0x58]);
        let zeros = [0.0; 64];
        check(&zeros, Format::E4m3, false, 0x346F_ACAD, &[0; 32]);
        check(&zeros, Format::E4m3, true, 105 << 23, &[0; 32]);
        check(&zeros, Format::E2m1, true, 1 << 23, &[0; 16]);
        check(&[-0.0; 64], Format::E2m1, true, 1 << 23, &[0x88; 16]);
    }

    /// Buffers for calls that must be refused.
    struct Refused {
        device: Device,
        x: Buffer<bf16>,
        out: Buffer<u8>,
        sf: Buffer<f32>,
        packed: Buffer<Ue8m0x4>,
    }

    /// Everything that can be wrong in one call.
    struct Call {
        x: ([u64; 2], [u64; 2], u64),
        block: Block,
        round_sf: bool,
        out: (Vec<u64>, DType, u64),
        sf: (Vec<u64>, SfLayout),
    }

    impl Refused {
        fn new() -> Self {
            let device = Device::emulator();
            let x = device.zeros(64 * 256).unwrap();
            let mut out = device.zeros(64 * 256).unwrap();
            let mut sf = device.zeros(256).unwrap();
            let mut packed = device.zeros(256).unwrap();
            out.fill_bytes(FILL).unwrap();
            sf.fill_bytes(FILL).unwrap();
            packed.fill_bytes(FILL).unwrap();
            Self { device, x, out, sf, packed }
        }

        /// A call that is fine.
        fn call() -> Call {
            Call {
                x: ([40, 128], [128, 1], 0),
                block: (32, 32),
                round_sf: true,
                out: (vec![40, 128], DType::E4m3, 0),
                sf: (vec![2, 4], SfLayout::RowMajor),
            }
        }

        fn run(&mut self, call: Call) -> Result<()> {
            let x = self.x.strided(&call.x.0, &call.x.1, call.x.2)?;
            let strides: Vec<u64> = (0..call.out.0.len()).map(|i| call.out.0[i + 1..].iter().product()).collect();
            let out = self.out.strided_mut(&call.out.0, &strides, call.out.2)?.reinterpret(call.out.1)?;
            let tensor = match call.sf.1 {
                layout if layout.is_packed() => self.packed.tensor_mut(&call.sf.0)?,
                _ => self.sf.tensor_mut(&call.sf.0)?,
            };
            let sf = SfMut { tensor, layout: call.sf.1 };
            let stream = self.device.stream()?;
            op::per_block_cast(&stream, Args { x, block: call.block, round_sf: call.round_sf, out, sf })
        }

        /// The call fails with a text that starts like this, and nothing was written.
        fn refuses(&mut self, call: Call, start: &str) {
            let text = self.run(call).expect_err(start).to_string();
            assert!(text.starts_with(start), "{text}\nexpected {start}");
            assert!(self.out.to_vec().unwrap().iter().all(|b| *b == FILL), "{text}: out was written");
            let fill = u32::from_ne_bytes([FILL; 4]);
            assert!(self.sf.to_vec().unwrap().iter().all(|v| v.to_bits() == fill), "{text}: sf was written");
            assert!(self.packed.to_vec().unwrap().iter().all(|v| v.0 as u32 == fill), "{text}: sf was written");
        }
    }

    #[test]
    fn bad_arguments_are_named() {
        let mut r = Refused::new();
        let call = Refused::call;
        r.refuses(Call { x: ([40, 100], [100, 1], 0), ..call() }, "per_block_cast: hidden is 100, allowed: multiples of 64");
        r.refuses(Call { block: (64, 32), ..call() }, "per_block_cast: npt is 64, allowed: 32, 128");
        r.refuses(Call { block: (32, 16), ..call() }, "per_block_cast: npc is 16, allowed: 32, 128");
        r.refuses(Call { x: ([40, 128], [1, 40], 0), ..call() }, "per_block_cast: layout of x is");
        r.refuses(Call { x: ([2, 64], [1 << 32, 1], 0), ..call() }, "strided: shape");
        r.refuses(
            Call { out: (vec![40, 64], DType::E4m3, 0), ..call() },
            "per_block_cast: out has shape [40, 64], expected [40, 128]",
        );
        r.refuses(
            Call { out: (vec![40, 128], DType::E2m1x2, 0), ..call() },
            "per_block_cast: out has shape [40, 128], expected [40, 64]",
        );
        r.refuses(
            Call { out: (vec![5120], DType::E4m3, 0), ..call() },
            "per_block_cast: out has shape [5120], expected [40, 128]",
        );
        r.refuses(Call { out: (vec![40, 128], DType::U8, 0), ..call() }, "per_block_cast: out is u8, allowed: e4m3, e2m1x2");
        r.refuses(Call { out: (vec![40, 128], DType::E4m3, 8), ..call() }, "per_block_cast: layout of out is");
        r.refuses(
            Call { sf: (vec![2, 3], SfLayout::RowMajor), ..call() },
            "per_block_cast: sf has shape [2, 3], expected [2, 4]",
        );
        r.refuses(Call { sf: (vec![2, 4], SfLayout::ColMajor), ..call() }, "per_block_cast: layout of sf is");
        r.refuses(
            Call { sf: (vec![2, 1], SfLayout::RowMajorPacked), round_sf: false, ..call() },
            "per_block_cast: round_sf is false, allowed: true with row-major packed scales",
        );
        let dtype = r.device.stream().and_then(|stream| {
            let x = r.x.tensor(&[40, 128])?.reinterpret(DType::F16)?;
            let (out, sf) = (r.out.tensor_mut(&[40, 128])?.reinterpret(DType::E4m3)?, r.sf.tensor_mut(&[2, 4])?);
            op::per_block_cast(
                &stream,
                Args { x, block: (32, 32), round_sf: true, out, sf: SfMut { tensor: sf, layout: SfLayout::RowMajor } },
            )
        });
        assert_eq!(dtype.unwrap_err().to_string(), "per_block_cast: x is f16, allowed: bf16, f32");
        // What all of this was derived from is fine.
        r.run(call()).unwrap();
        assert_eq!(r.sf.to_vec().unwrap()[..8], [2f32.powi(-22); 8]);
    }

    #[test]
    fn the_variants_check_their_arguments() {
        let mut r = Refused::new();
        let stream = r.device.stream().unwrap();
        let sf_only = |x: TensorRef<'_>, round_sf, sf: SfMut<'_>| {
            op::per_block_cast_with_sf_only(&stream, SfOnlyArgs { x, format: Format::E2m1, block: (32, 32), round_sf, sf })
        };
        let packed = SfMut { tensor: r.packed.tensor_mut(&[2, 1]).unwrap(), layout: SfLayout::RowMajorPacked };
        let error = sf_only(r.x.tensor(&[40, 128]).unwrap(), false, packed).unwrap_err();
        assert!(matches!(error, Error::Value { op: "per_block_cast_with_sf_only", arg: "round_sf", .. }), "{error}");
        let sf = SfMut { tensor: r.sf.tensor_mut(&[2, 4]).unwrap(), layout: SfLayout::RowMajor };
        let error = sf_only(r.x.tensor(&[5120]).unwrap(), false, sf).unwrap_err();
        assert!(matches!(error, Error::Shape { arg: "x", .. }), "{error}");

        let sf = Sf { tensor: r.sf.strided(&[2, 4], &[1, 4], 0).unwrap(), layout: SfLayout::ColMajor };
        let out = r.out.tensor_mut(&[40, 128]).unwrap().reinterpret(DType::E4m3).unwrap();
        let args = PrecomputedArgs { x: r.x.tensor(&[40, 128]).unwrap(), sf, block: (32, 32), out };
        let error = op::per_block_cast_with_precomputed_sf(&stream, args).unwrap_err().to_string();
        assert_eq!(error, "per_block_cast_with_precomputed_sf: layout of sf is col-major, expected row-major");
    }

    #[test]
    fn overlap_and_other_devices_are_refused() {
        let device = Device::emulator();
        let stream = device.stream().unwrap();
        let memory = device.zeros::<f32>(4096).unwrap();
        let (other, mut sf) = (device.checked().zeros::<f32>(64 * 32).unwrap(), device.zeros::<f32>(4).unwrap());
        // SAFETY: nothing is launched on these overlapping tensors; that is what is checked.
        let tensor = |offset: u64, dtype, shape: &[u64], strides: &[u64]| unsafe {
            ferrotile::TensorMut::from_raw(&device, memory.as_ptr() + offset, dtype, shape, strides).unwrap()
        };
        let mut run = |x: TensorRef<'_>, out, sf_offset: Option<u64>| {
            let sf = match sf_offset {
                Some(offset) => tensor(offset, DType::F32, &[1, 2], &[2, 1]),
                None => sf.tensor_mut(&[1, 2]).unwrap(),
            };
            let sf = SfMut { tensor: sf, layout: SfLayout::RowMajor };
            op::per_block_cast(&stream, Args { x, block: (32, 32), round_sf: false, out, sf })
        };
        let x = memory.tensor(&[32, 64]).unwrap();
        let apart = 4 * 32 * 64;
        let out = |offset| tensor(offset, DType::E4m3, &[32, 64], &[64, 1]);
        assert!(matches!(run(x, out(apart - 16), None), Err(Error::Overlap { a: "x", b: "out", .. })));
        assert!(matches!(run(x, out(apart), Some(16)), Err(Error::Overlap { a: "x", b: "sf", .. })));
        assert!(matches!(run(x, out(apart), Some(apart + 2044)), Err(Error::Overlap { a: "out", b: "sf", .. })));
        assert!(matches!(run(other.tensor(&[32, 64]).unwrap(), out(apart), None), Err(Error::DeviceMismatch { arg: "x", .. })));
        assert!(run(x, out(apart), None).is_ok());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        /// Any shape, distance of rows, alignment and range of values.
        #[test]
        fn any_input(
            t in 0u64..140, columns in 1u64..5, gap in 0u64..9, offset in 0u64..9, f32_input: bool, e2m1: bool, round: bool,
            block in 0usize..4, layout in 0usize..4, exponent in -130i32..120, seed: u64,
        ) {
            let device = Device::emulator();
            let stream = device.stream().unwrap();
            let h = 64 * columns;
            let dtype = if f32_input { DType::F32 } else { DType::Bf16 };
            let format = if e2m1 { Format::E2m1 } else { Format::E4m3 };
            let layout = if round { ROUNDED[layout] } else { PLAIN[layout % 2] };
            let block = BLOCKS[block];
            let values = Rng::new(seed).fill((t * h) as usize, |rng, i| {
                let v = (rng.normal(i) as f64 * 2f64.powi(exponent)) as f32;
                if dtype == DType::Bf16 { bf16::from_f32(v).to_f32() } else { v }
            });
            let input = Input::new(&device, dtype, (t, h), (h + gap, offset), values).unwrap();
            let expected = reference(&input.values, h as usize, format, block, round, None);
            let mut out = Outputs::new(&device, &input, format, block, layout).unwrap();
            out.cast(&stream, input.tensor().unwrap(), block, round).unwrap();
            out.check_data("any", &expected.data).unwrap();
            out.check_sf("any", &sf_words(&expected.sf, h.div_ceil(block.1.into()) as usize, layout)).unwrap();
        }
    }
}
