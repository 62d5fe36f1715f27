//! Reference, cases, checks and benchmark rows of `per_block_cast_lossless`.

use crate::support::bench::{Launch, Row};
use crate::support::cases::{Depth, HIDDENS, TOKENS};
use crate::support::compare;
use crate::support::golden::{self, Case, Golden};
use crate::support::inputs;
use crate::support::rng::Rng;
use crate::support::suite::{Ctx, Report, Suite, ensure, text};
use ferrotile::quant::per_block_cast_lossless::{self as op, Args};
use ferrotile::quant::{Sf, SfLayout, SfMut, SfShape, sf_shape};
use ferrotile::{Buffer, DType, Device, E2m1x2, E4m3, Stream, Ue8m0x4};
use rayon::prelude::*;

/// What the `check` binary runs.
pub const SUITE: Suite = Suite { op: "per_block_cast_lossless", run };

type Block = (u32, u32);

// The reference.

/// Codes as bytes, scales `(M, K)` as f32 bits, and the values of each row that were not kept.
#[derive(Clone, Debug, PartialEq)]
struct Lossless {
    data: Vec<u8>,
    sf: Vec<u32>,
    lost: Vec<i32>,
}

/// Magnitude of an e2m1.
fn e2m1(code: u8) -> f64 {
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0][(code & 7) as usize]
}

/// Magnitude of an e4m3.
fn e4m3(code: u8) -> f64 {
    let (exp, man) = ((code >> 3 & 15) as i32, (code & 7) as f64);
    if exp == 0 { man * 2f64.powi(-9) } else { (8.0 + man) * 2f64.powi(exp - 10) }
}

/// The e4m3 nearest to a magnitude of at most 448, ties to even, and whether it is equal.
fn nearest(magnitude: f64) -> (u8, bool) {
    let above = (0..=0x7Eu8).find(|c| e4m3(*c) >= magnitude).unwrap_or(0x7E);
    let below = above.saturating_sub((e4m3(above) != magnitude && above > 0) as u8);
    let (up, down) = (e4m3(above) - magnitude, magnitude - e4m3(below));
    let code = if up < down || (up == down && above % 2 == 0) { above } else { below };
    (code, e4m3(code) == magnitude)
}

/// Exponent field of a scale's f32 bits.
fn exponent(bits: u32) -> i32 {
    (bits >> 23 & 255) as i32
}

/// The cast of the codes `x`, `(t, h / 2)` bytes, with scales `x_sf` as f32 bits.
fn reference(x: &[u8], x_sf: &[u32], h: usize, x_block: Block, block: Block) -> Lossless {
    let t = (2 * x.len()).checked_div(h).unwrap_or(0);
    let blocks = |(npt, npc): Block| (t.div_ceil(npt as usize), h.div_ceil(npc as usize));
    let (x_columns, (rows, columns)) = (blocks(x_block).1, blocks(block));
    let mut sf = vec![0; rows * columns];
    for (i, scale) in x_sf.iter().enumerate() {
        let (row, col) = (i / x_columns * x_block.0 as usize, i % x_columns * x_block.1 as usize);
        let to = &mut sf[row / block.0 as usize * columns + col / block.1 as usize];
        *to = exponent(*scale).max(*to);
    }
    sf.iter_mut().for_each(|e| *e = (*e - 6).max(0));
    // Every magnitude at every distance of exponents.
    let table: Vec<[(u8, bool); 8]> =
        (-255..=6).map(|d| core::array::from_fn(|c| nearest(e2m1(c as u8) * 2f64.powi(d)))).collect();
    let mut data = vec![0; t * h];
    let mut lost = vec![0; t];
    data.par_chunks_mut(h.max(1)).zip(&mut lost).enumerate().for_each(|(row, (out, lost))| {
        for (col, out) in out.iter_mut().enumerate() {
            let code = x[(row * h + col) / 2] >> (col % 2 * 4) & 15;
            let from = x_sf[row / x_block.0 as usize * x_columns + col / x_block.1 as usize];
            let to = sf[row / block.0 as usize * columns + col / block.1 as usize];
            let (magnitude, exact) = table[(exponent(from) - to + 255) as usize][(code & 7) as usize];
            let kept = exact && from & 0x807F_FFFF == 0 && exponent(from) < 255 && to > 0;
            *out = magnitude | (code & 8) << 4;
            *lost += (code & 7 != 0 && !kept) as i32;
        }
    });
    Lossless { data, sf: sf.iter().map(|e| (*e as u32) << 23).collect(), lost }
}

/// Scales as the words of a tensor of this layout, contiguous.
fn sf_words(sf: &[u32], columns: usize, layout: SfLayout) -> Vec<u32> {
    if !layout.is_packed() {
        return sf.to_vec();
    }
    let word = |four: &[u32]| four.iter().rev().fold(0, |word, v| word << 8 | (v >> 23 & 255));
    sf.chunks(columns.max(1)).flat_map(|row| row.chunks(4).map(word)).collect()
}

// Inputs.

/// How the exponents of an input lie.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    /// As the published kernels take them: within a factor of 2^11 in every output block.
    Normal,
    /// Within a factor of 2^14: still exact.
    Spread,
    /// Anything: blocks of zeros with the smallest scale, spread that loses bits, scales near both ends.
    Wild,
    /// [`Wild`](Kind::Wild), and f32 scales that are no power of two.
    Odd,
}

/// An input on the device, and what it holds.
struct Input {
    t: u64,
    h: u64,
    /// Bytes from row to row, and of the first one.
    stride: u64,
    offset: u64,
    block: Block,
    codes: Vec<u8>,
    /// f32 bits, `(M, K)`.
    scales: Vec<u32>,
    x: Buffer<u8>,
}

/// The scales of an input in a layout.
struct InputSf {
    layout: SfLayout,
    shape: [u64; 2],
    strides: [u64; 2],
    words: Buffer<u32>,
}

impl Input {
    fn new(device: &Device, (t, h): (u64, u64), (gap, offset): (u64, u64), block: Block, kind: Kind) -> Result<Self, String> {
        let rng = Rng::named(&format!("per_block_cast_lossless {t} {h} {block:?} {kind:?}"));
        let codes = rng.bytes((t * h / 2) as usize);
        let blocks = t.div_ceil(block.0.into()) * h.div_ceil(block.1.into());
        let columns = h.div_ceil(block.1.into());
        let exponents = rng.stream(1);
        let scales = exponents.fill(blocks as usize, |rng, i| {
            let draw = rng.bits(i);
            // Tiles of 128 by 128 have their own range.
            let (row, col) = (i / columns * block.0 as u64 / 128, i % columns * block.1 as u64 / 128);
            let tile = rng.stream(row * 1000 + col).bits(0) % 200;
            let spread = |n: u64| (tile + 20 + draw % n) as u32;
            let exponent = match kind {
                Kind::Normal => spread(12),
                Kind::Spread => spread(15),
                _ => match tile % 6 {
                    0 => (draw % 14) as u32,
                    1 => 241 + (draw % 14) as u32,
                    2 => (draw % 256) as u32,
                    3 if draw.is_multiple_of(3) => 1,
                    _ => spread(24),
                },
            };
            let odd = [0x8000_0000, 1, 0x40_0000, 0x80FF_FFFF];
            let more = if kind == Kind::Odd && (draw >> 8).is_multiple_of(9) { odd[(draw >> 16) as usize % 4] } else { 0 };
            exponent << 23 | more
        });
        let mut input = Self::given(device, (t, h), (gap, offset), block, codes, scales)?;
        if kind != Kind::Normal && kind != Kind::Spread {
            // Zeros where the scale is tiny, as the casts make them, of both signs; here and there values all the same.
            for (i, code) in input.codes.iter_mut().enumerate() {
                let (row, col) = (2 * i as u64 / h, 2 * i as u64 % h);
                let at = row / block.0 as u64 * columns + col / block.1 as u64;
                if exponent(input.scales[at as usize]) == 1 && !at.is_multiple_of(5) {
                    *code &= 0x88;
                }
            }
            input.upload(device)?;
        }
        Ok(input)
    }

    fn given(
        device: &Device,
        (t, h): (u64, u64),
        (gap, offset): (u64, u64),
        block: Block,
        codes: Vec<u8>,
        scales: Vec<u32>,
    ) -> Result<Self, String> {
        let x = device.alloc(0).map_err(text)?;
        let mut input = Self { t, h, stride: h / 2 + gap, offset, block, codes, scales, x };
        input.upload(device)?;
        Ok(input)
    }

    fn upload(&mut self, device: &Device) -> Result<(), String> {
        let row = (self.h / 2) as usize;
        let len = (self.offset + self.t.saturating_sub(1) * self.stride) as usize + row;
        let mut bytes = vec![0x77; len];
        for (i, codes) in self.codes.chunks(row.max(1)).enumerate() {
            let start = self.offset as usize + i * self.stride as usize;
            bytes[start..start + row].copy_from_slice(codes);
        }
        self.x = device.upload(&bytes).map_err(text)?;
        Ok(())
    }

    /// Its scales in a layout, in rows or columns that lie `pad` elements further apart than they must.
    fn sf(&self, device: &Device, layout: SfLayout, pad: u64) -> Result<InputSf, String> {
        let columns = self.h.div_ceil(self.block.1.into());
        let shape = [self.t.div_ceil(self.block.0.into()), layout.columns(columns)];
        let [rows, words] = shape;
        let strides = if layout.is_col_major() { [1, rows + pad] } else { [words + pad, 1] };
        let len = if rows * words == 0 { 0 } else { (rows - 1) * strides[0] + (words - 1) * strides[1] + 1 };
        let mut spread = vec![0xFFFF_FFFFu32; len as usize];
        for (i, word) in sf_words(&self.scales, columns as usize, layout).iter().enumerate() {
            spread[(i as u64 / words * strides[0] + i as u64 % words * strides[1]) as usize] = *word;
        }
        Ok(InputSf { layout, shape, strides, words: device.upload(&spread).map_err(text)? })
    }

    fn reference(&self, block: Block) -> Lossless {
        reference(&self.codes, &self.scales, self.h as usize, self.block, block)
    }
}

// Running.

/// Elements behind an output that must stay as they are.
const GUARD: usize = 64;
const FILL: u8 = 0xA5;
/// What the counters hold before.
const BEFORE: i32 = 1000;

/// Output buffers of one call.
struct Outputs {
    shape: [u64; 2],
    data: Buffer<u8>,
    sf_shape: SfShape,
    layout: SfLayout,
    sf: Buffer<u32>,
    lost: Buffer<i32>,
}

impl Outputs {
    fn new(device: &Device, input: &Input, block: Block, layout: SfLayout) -> Result<Self, String> {
        let sf_shape = sf_shape(input.t, input.h, block, layout);
        let data = device.alloc((input.t * input.h) as usize + GUARD).map_err(text)?;
        let sf = device.alloc(sf_shape.elements as usize + GUARD).map_err(text)?;
        let lost = device.alloc(input.t as usize + GUARD).map_err(text)?;
        let mut outputs = Self { shape: [input.t, input.h], data, sf_shape, layout, sf, lost };
        outputs.reset()?;
        Ok(outputs)
    }

    fn reset(&mut self) -> Result<(), String> {
        self.data.fill_bytes(FILL).map_err(text)?;
        self.sf.fill_bytes(FILL).map_err(text)?;
        self.lost.copy_from(&vec![BEFORE; self.lost.len()]).map_err(text)
    }

    fn cast(&mut self, stream: &Stream, input: &Input, x_sf: &InputSf, block: Block, counts: bool) -> ferrotile::Result<()> {
        let x = input.x.strided(&[input.t, input.h / 2], &[input.stride, 1], input.offset)?.reinterpret(DType::E2m1x2)?;
        let tensor = x_sf.words.strided(&x_sf.shape, &x_sf.strides, 0)?.reinterpret(x_sf.layout.dtype())?;
        let x_sf = Sf { tensor, layout: x_sf.layout };
        let out = self.data.tensor_mut(&self.shape)?.reinterpret(DType::E4m3)?;
        let sf = self.sf.strided_mut(&self.sf_shape.shape, &self.sf_shape.strides, 0)?.reinterpret(self.sf_shape.dtype)?;
        let sf = SfMut { tensor: sf, layout: self.layout };
        let lost = if counts { Some(self.lost.tensor_mut(&[input.t])?) } else { None };
        op::per_block_cast_lossless(stream, Args { x, x_sf, x_block: input.block, out_block: block, out, sf, lost })
    }

    fn check(&self, name: &str, expected: &Lossless, columns: usize, counts: bool) -> Result<(), String> {
        self.check_data(name, &expected.data)?;
        self.check_sf(name, &sf_words(&expected.sf, columns, self.layout))?;
        let mut lost = vec![BEFORE; self.lost.len()];
        if counts {
            lost.iter_mut().zip(&expected.lost).for_each(|(n, lost)| *n += lost);
        }
        compare::equal("lost", name, &[lost.len() as u64], &self.lost.to_vec().map_err(text)?, &lost)
    }

    fn check_data(&self, name: &str, expected: &[u8]) -> Result<(), String> {
        let data = self.data.to_vec().map_err(text)?;
        let (data, guard) = data.split_at(data.len() - GUARD);
        ensure(guard.iter().all(|b| *b == FILL), || format!("data: bytes behind the tensor were written; {name}"))?;
        compare::equal::<E4m3>("data", name, &self.shape, bytemuck::cast_slice(data), bytemuck::cast_slice(expected))
    }

    fn check_sf(&self, name: &str, expected: &[u32]) -> Result<(), String> {
        let SfShape { shape, strides, .. } = &self.sf_shape;
        let sf = self.sf.to_vec().map_err(text)?;
        if self.layout.is_packed() {
            let (got, expected) = (bytemuck::cast_slice(&sf), bytemuck::cast_slice(expected));
            compare::equal_strided::<Ue8m0x4>("sf", name, shape, strides, got, expected)?;
        } else {
            let (got, expected) = (bytemuck::cast_slice(&sf), bytemuck::cast_slice(expected));
            compare::equal_strided::<f32>("sf", name, shape, strides, got, expected)?;
        }
        compare::untouched("sf", name, shape, strides, &sf, FILL)
    }
}

/// The tested ones of the specification.
const BLOCKS: [Block; 3] = [(1, 128), (32, 32), (128, 128)];
/// Others that the op takes.
const MORE_BLOCKS: [Block; 7] = [(1, 32), (1, 64), (16, 32), (32, 128), (64, 64), (128, 32), (16, 128)];

/// One input with output blocks and layouts of scales on both sides.
fn check_input(ctx: &Ctx, input: &Input, blocks: &[Block], layouts: [&[SfLayout]; 2], kind: Kind) -> Result<(), String> {
    let stream = ctx.device.stream().map_err(text)?;
    let mut x_sf = Vec::new();
    for (i, &layout) in layouts[0].iter().enumerate() {
        // Columns of scales need not be aligned.
        x_sf.push(input.sf(&ctx.device, layout, [0, 3, 1, 2][i % 4])?);
    }
    for &block in blocks {
        let mut expected = None;
        for x_sf in &x_sf {
            for &layout in layouts[1] {
                let name = format!(
                    "block={}x{},h={},input={}x{},input_sf={},kind={kind:?},sf={layout},stride={},t={}",
                    block.0, block.1, input.h, input.block.0, input.block.1, x_sf.layout, input.stride, input.t
                );
                if !ctx.case(&name) {
                    continue;
                }
                let expected: &Lossless = expected.get_or_insert_with(|| input.reference(block));
                let lost = expected.lost.iter().sum::<i32>();
                ensure(lost == 0 || matches!(kind, Kind::Wild | Kind::Odd), || {
                    format!("the input is not what it should be; {name}")
                })?;
                let columns = input.h.div_ceil(block.1.into()) as usize;
                let mut out = Outputs::new(&ctx.device, input, block, layout)?;
                let counts = layout != SfLayout::ColMajor;
                out.cast(&stream, input, x_sf, block, counts).map_err(text)?;
                out.check(&name, expected, columns, counts)?;
            }
        }
    }
    Ok(())
}

const ROW: SfLayout = SfLayout::RowMajor;
const PACKED: SfLayout = SfLayout::ColMajorPacked;

fn run(ctx: &Ctx) -> Result<Report, String> {
    let notes = golden::check_cases(ctx, &[SUITE.op], |golden, case| check_golden(ctx, golden, case))?;
    let d = &ctx.device;
    let all = [SfLayout::COMMON, SfLayout::COMMON];
    let some: [&[SfLayout]; 2] = [&[PACKED], &[ROW, PACKED]];
    let plain: [&[SfLayout]; 2] = [&[ROW], &[PACKED, SfLayout::ColMajor]];
    let check = |shape, apart, x_block, blocks: &[Block], layouts, kind| {
        check_input(ctx, &Input::new(d, shape, apart, x_block, kind)?, blocks, layouts, kind)
    };
    check((37, 384), (0, 0), (1, 32), &BLOCKS, all, Kind::Normal)?;
    check((37, 576), (0, 0), (1, 32), &BLOCKS, some, Kind::Wild)?;
    check((133, 272), (8, 16), (1, 32), &BLOCKS, plain, Kind::Odd)?;
    // Rows that start anywhere.
    check((37, 176), (3, 1), (1, 32), &BLOCKS, plain, Kind::Odd)?;
    check((37, 176), (3, 1), (1, 32), &BLOCKS, some, Kind::Wild)?;
    check((70, 304), (0, 0), (1, 32), &MORE_BLOCKS, plain, Kind::Wild)?;
    // Other input blocks.
    check((70, 304), (0, 0), (1, 16), &[(1, 16), (1, 128), (32, 32), (128, 128)], some, Kind::Spread)?;
    check((133, 272), (0, 0), (32, 32), &[(32, 32), (32, 64), (128, 128)], some, Kind::Wild)?;
    check((133, 272), (0, 0), (2, 64), &[(16, 128), (64, 64)], plain, Kind::Odd)?;
    check((0, 384), (0, 0), (1, 32), &BLOCKS, some, Kind::Normal)?;
    check((5, 0), (0, 0), (1, 32), &BLOCKS, some, Kind::Normal)?;
    check((1, 16), (0, 0), (1, 32), &BLOCKS, some, Kind::Wild)?;
    if ctx.depth == Depth::Small {
        check((1, 2048), (0, 0), (1, 32), &BLOCKS, plain, Kind::Normal)?;
        return Ok(Report { notes, ..ctx.report() });
    }
    let grid: [&[SfLayout]; 2] = [&[ROW, PACKED], &[ROW, PACKED]];
    for h in HIDDENS {
        for t in TOKENS {
            check((t, h), (0, 0), (1, 32), &BLOCKS, grid, Kind::Normal)?;
        }
        check((1, h), (0, 0), (1, 32), &BLOCKS, grid, Kind::Spread)?;
    }
    check((4001, 576), (0, 0), (1, 32), &BLOCKS, all, Kind::Wild)?;
    check((4001, 2560), (8, 0), (1, 32), &MORE_BLOCKS, plain, Kind::Odd)?;
    check((8064, 7168), (0, 0), (32, 32), &[(128, 128)], some, Kind::Spread)?;
    if !ctx.device.is_emulator() {
        check_graph(ctx)?;
        check_both_backends(ctx)?;
        check_large(ctx)?;
    }
    Ok(Report { notes, ..ctx.report() })
}

/// The launcher recorded in a graph and replayed.
fn check_graph(ctx: &Ctx) -> Result<(), String> {
    let stream = ctx.device.stream().map_err(text)?;
    let input = Input::new(&ctx.device, (133, 576), (0, 0), (1, 32), Kind::Wild)?;
    let x_sf = input.sf(&ctx.device, ROW, 0)?;
    for block in BLOCKS {
        let name = format!("block={}x{},kind=graph,h=576,t=133", block.0, block.1);
        if !ctx.case(&name) {
            continue;
        }
        let mut out = Outputs::new(&ctx.device, &input, block, PACKED)?;
        let graph = stream.capture(|s| out.cast(s, &input, &x_sf, block, true)).map_err(text)?;
        let expected = input.reference(block);
        for replay in 0..2 {
            out.reset()?;
            graph.launch(&stream).map_err(text)?;
            stream.synchronize().map_err(text)?;
            out.check(&format!("{name},replay={replay}"), &expected, 576usize.div_ceil(block.1 as usize), true)?;
        }
    }
    Ok(())
}

/// The emulator and this device write the same bytes.
fn check_both_backends(ctx: &Ctx) -> Result<(), String> {
    let emulator = Device::emulator();
    for block in BLOCKS {
        for kind in [Kind::Spread, Kind::Wild, Kind::Odd] {
            let name = format!("block={}x{},kind=both backends {kind:?},h=272,t=133", block.0, block.1);
            if !ctx.case(&name) {
                continue;
            }
            let mut results = Vec::new();
            for device in [&ctx.device, &emulator] {
                let input = Input::new(device, (133, 272), (0, 0), (1, 32), kind)?;
                let mut out = Outputs::new(device, &input, block, ROW)?;
                let stream = device.stream().map_err(text)?;
                out.cast(&stream, &input, &input.sf(device, ROW, 0)?, block, true).map_err(text)?;
                let to_vecs = || Ok((out.data.to_vec()?, out.sf.to_vec()?, out.lost.to_vec()?));
                results.push(to_vecs().map_err(|e: ferrotile::Error| text(e))?);
            }
            ensure(results[0] == results[1], || format!("the backends differ; {name}"))?;
        }
    }
    Ok(())
}

/// More than 2^31 output elements. All rows are one row in memory (stride 0), so every row of the output must be the same.
fn check_large(ctx: &Ctx) -> Result<(), String> {
    let (t, h, block) = (300_001u64, 7168u64, (128, 128));
    let name = "kind=large,h=7168,t=300001";
    if !ctx.case(name) {
        return Ok(());
    }
    let d = &ctx.device;
    let row = Input::new(d, (1, h), (0, 0), (128, 32), Kind::Spread)?;
    let expected = row.reference(block);
    let scales = row.scales.repeat(t.div_ceil(128) as usize);
    let mut input = Input::given(d, (0, h), (0, 0), (128, 32), Vec::new(), scales)?;
    (input.t, input.stride, input.x) = (t, 0, d.upload(&row.codes).map_err(text)?);
    let mut out = Outputs::new(d, &input, block, ROW)?;
    out.cast(&d.stream().map_err(text)?, &input, &input.sf(d, ROW, 0)?, block, true).map_err(text)?;
    let data = out.data.to_vec().map_err(text)?;
    let rows = data[..(t * h) as usize].par_chunks_exact(h as usize);
    if let Some(bad) = rows.enumerate().find_map_any(|(i, row)| (row != expected.data).then_some(i)) {
        return Err(format!("data: row {bad} differs; {name}"));
    }
    out.check_sf(name, &expected.sf.repeat(t.div_ceil(128) as usize))
}

// The benchmark.

/// What the peers computed.
fn check_golden(ctx: &Ctx, golden: &Golden, case: &Case) -> Result<(), String> {
    let name = case.name();
    let (layout, _) = case.sf_options()?;
    let (x_block, block): (Block, Block) = (case.param("x_block_size")?, case.param("out_block_size")?);
    let (x, sf) = (golden.tensor(case, "in/x.0")?, golden.tensor(case, "in/x.1")?);
    let (t, h) = (x.shape[0], 2 * x.shape[1]);
    let columns = h.div_ceil(x_block.1.into());
    let words = sf.to_vec::<u32>()?;
    let scale = |i: u64| {
        let (m, k) = (i / columns, i % columns);
        if !layout.is_packed() {
            return words[i as usize];
        }
        (words[(m * columns.div_ceil(4) + k / 4) as usize] >> (k % 4 * 8) & 255) << 23
    };
    let scales = (0..t.div_ceil(x_block.0.into()) * columns).map(scale).collect();
    let input = Input::given(&ctx.device, (t, h), (0, 0), x_block, x.bytes.to_vec(), scales)?;
    let mut out = Outputs::new(&ctx.device, &input, block, layout)?;
    let stream = ctx.device.stream().map_err(text)?;
    out.cast(&stream, &input, &input.sf(&ctx.device, layout, 0)?, block, true).map_err(text)?;
    stream.synchronize().map_err(text)?;
    out.check_data(&name, golden.tensor(case, "out/0")?.bytes)?;
    ensure(out.lost.to_vec().map_err(text)?.iter().all(|n| *n == BEFORE), || format!("values counted as lost; {name}"))?;
    let sf = golden.tensor(case, "out/1")?;
    sf.check_place(&name, &out.sf_shape)?;
    out.check_sf(&name, &if layout.is_packed() { sf.packed_words(h.div_ceil(block.1.into()))? } else { sf.to_vec()? })
}

fn row(case: String, (t, h): (u64, u64), block: Block, layouts: [SfLayout; 2]) -> Row {
    let (x_sf, sf) = (sf_shape(t, h, (1, 32), layouts[0]), sf_shape(t, h, block, layouts[1]));
    let bytes = t * h / 2 + 4 * x_sf.shape[0] * x_sf.shape[1] + t * h + 4 * sf.shape[0] * sf.shape[1];
    let build = move |device: &Device, _: &Stream| -> Result<Launch, String> {
        let mut input = Input::given(device, (0, h), (0, 0), (1, 32), Vec::new(), Vec::new())?;
        let (codes, scales) = cast_of_normal(inputs::BLOCK as usize);
        (input.t, input.x) = (t, inputs::repeated(device, &codes, t * h / 2)?);
        let SfShape { shape, strides, elements, .. } = sf_shape(t, h, (1, 32), layouts[0]);
        let word = |four: &[u32]| four.iter().rev().fold(0, |word, v| word << 8 | v >> 23);
        let words = if layouts[0].is_packed() { scales.chunks(4).map(word).collect() } else { scales };
        let x_sf = InputSf { layout: layouts[0], shape, strides, words: inputs::repeated(device, &words, elements)? };
        let mut out = Outputs::new(device, &input, block, layouts[1])?;
        Ok(Box::new(move |stream| out.cast(stream, &input, &x_sf, block, false)))
    };
    Row { op: "per_block_cast_lossless", case, bytes, build: Box::new(build) }
}

/// Pairs of codes and f32 bits of scales of `n` normal values, each 32 with a scale that is the least power of two at which none is
/// beyond 6: what `per_token_cast` makes of them.
fn cast_of_normal(n: usize) -> (Vec<u8>, Vec<u32>) {
    let values = Rng::named("per_block_cast_lossless benchmark").normal_f32(n);
    let scale = |group: &[f32]| {
        let amax = group.iter().fold(0f32, |max, v| max.max(v.abs()));
        (-20..20).map(|e| 2f32.powi(e)).find(|scale| amax <= 6.0 * scale).unwrap_or(1.0)
    };
    let codes = |group: &[f32]| {
        let scale = scale(group);
        let pairs = group.chunks(2).map(move |v| E2m1x2::from_f32s([v[0] / scale, v[1] / scale]).0);
        pairs.collect::<Vec<_>>()
    };
    (values.par_chunks(32).flat_map_iter(codes).collect(), values.par_chunks(32).map(|group| scale(group).to_bits()).collect())
}

/// The peers' case, those of 1.0.0's own benchmark (8001 tokens), and small inputs.
pub fn bench() -> Vec<Row> {
    let name = |layout| if layout == ROW { "row" } else { "packed" };
    let mut rows = vec![row("h=7168,input=e2m1,1x32,out=e4m3,128x128,t=8064".to_owned(), (8064, 7168), (128, 128), [ROW, ROW])];
    let mut add = |(t, h): (u64, u64), (m, k): Block, [x, out]: [SfLayout; 2]| {
        let (in_sf, out_sf) = (name(x), name(out));
        let case = format!("h={h},in_sf={in_sf},input=e2m1,1x32,out=e4m3,{m}x{k},out_sf={out_sf},t={t}");
        rows.push(row(case, (t, h), (m, k), [x, out]));
    };
    for block in BLOCKS {
        for x in [ROW, PACKED] {
            for out in [ROW, PACKED] {
                add((8001, 7168), block, [x, out]);
                if block != (32, 32) && x == out {
                    add((8064, 7168), block, [x, out]);
                }
            }
        }
    }
    for shape in [(4001, 2048), (1, 7168), (16, 7168), (128, 7168)] {
        add(shape, (1, 128), [ROW, ROW]);
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferrotile::{Error, Result, TensorMut, TensorRef};
    use proptest::prelude::{ProptestConfig, proptest};

    #[test]
    fn suite() {
        SUITE.test();
    }

    /// What the reference says is exact is: the products of codes and scales are the same numbers.
    #[test]
    fn the_reference_keeps_values() {
        for kind in [Kind::Normal, Kind::Spread, Kind::Wild, Kind::Odd] {
            let input = Input::new(&Device::emulator(), (133, 272), (0, 0), (1, 32), kind).unwrap();
            for block in BLOCKS {
                let r = input.reference(block);
                let columns = 272usize.div_ceil(block.1 as usize);
                let mut lost = vec![0; 133];
                for i in 0..133 * 272 {
                    let (row, col) = (i / 272, i % 272);
                    let scale = f32::from_bits(input.scales[row * 9 + col / 32]) as f64;
                    let code = input.codes[i / 2] >> (i % 2 * 4);
                    assert_eq!(code >> 3 & 1, r.data[i] >> 7);
                    let sf = f32::from_bits(r.sf[row / block.0 as usize * columns + col / block.1 as usize]) as f64;
                    // A scale of 0 counts as 2^-127.
                    let scale = if scale == 0.0 { 2f64.powi(-127) } else { scale };
                    let same =
                        if code & 7 == 0 { r.data[i] & 0x7F == 0 } else { e2m1(code) * scale == e4m3(r.data[i] & 0x7F) * sf };
                    lost[row] += !same as i32;
                }
                assert_eq!(lost, r.lost, "{kind:?} {block:?}");
                assert_eq!(lost.iter().sum::<i32>() > 0, kind == Kind::Wild || kind == Kind::Odd);
            }
        }
    }

    /// A call, right but for what a test changes.
    struct Call<'a> {
        x: TensorRef<'a>,
        x_sf: TensorRef<'a>,
        x_block: Block,
        out_block: Block,
        out: TensorMut<'a>,
        sf: TensorMut<'a>,
        layout: SfLayout,
        lost: Option<TensorMut<'a>>,
    }

    /// Runs a changed call on fresh buffers; what is refused must leave the outputs alone.
    fn call(change: impl FnOnce(&mut Call<'_>)) -> Result<()> {
        let device = Device::emulator();
        let (x, x_sf) = (device.zeros::<u8>(40 * 64 + 64)?, device.upload(&[1f32; 160])?);
        let (mut out, mut sf, mut lost) =
            (device.alloc::<E4m3>(40 * 128 + 64)?, device.alloc::<f32>(64)?, device.alloc::<i32>(64)?);
        out.fill_bytes(FILL)?;
        sf.fill_bytes(FILL)?;
        lost.fill_bytes(FILL)?;
        let mut c = Call {
            x: x.tensor(&[40, 64])?.reinterpret(DType::E2m1x2)?,
            x_sf: x_sf.tensor(&[40, 4])?,
            x_block: (1, 32),
            out_block: (32, 64),
            out: out.tensor_mut(&[40, 128])?,
            sf: sf.tensor_mut(&[2, 2])?,
            layout: SfLayout::RowMajor,
            lost: Some(lost.tensor_mut(&[40])?),
        };
        change(&mut c);
        let result = op::per_block_cast_lossless(
            &device.stream()?,
            Args {
                x: c.x,
                x_sf: Sf { tensor: c.x_sf, layout: SfLayout::RowMajor },
                x_block: c.x_block,
                out_block: c.out_block,
                out: c.out,
                sf: SfMut { tensor: c.sf, layout: c.layout },
                lost: c.lost,
            },
        );
        if result.is_err() {
            assert!(out.to_vec()?.iter().all(|v| v.0 == FILL), "out was written");
            assert!(sf.to_vec()?.iter().all(|v| v.to_bits() == u32::from_ne_bytes([FILL; 4])), "sf was written");
            assert!(lost.to_vec()?.iter().all(|v| *v == i32::from_ne_bytes([FILL; 4])), "lost was written");
        }
        result
    }

    #[test]
    fn bad_arguments_are_named() {
        let device = Device::emulator();
        let other = device.zeros::<u8>(1 << 14).unwrap();
        let mut out = device.zeros::<f32>(1 << 14).unwrap();
        let text = |change: &mut dyn FnMut(&mut Call<'_>)| call(|c| change(c)).unwrap_err().to_string();
        // SAFETY: `other` outlives all calls.
        let input = |dtype, shape: &[u64], strides: &[u64]| unsafe {
            TensorRef::from_raw(&device, other.as_ptr(), dtype, shape, strides).unwrap()
        };
        // SAFETY: nothing is launched on tensors of shared memory; that is what is checked.
        let view = |t: &ferrotile::View, offset: u64, dtype, shape: &[u64], strides: &[u64]| unsafe {
            TensorMut::from_raw(t.device(), t.ptr() + offset, dtype, shape, strides).unwrap()
        };
        assert!(call(|_| ()).is_ok());
        assert!(call(|c| c.lost = None).is_ok());
        let is = |got: String, start: &str| {
            assert!(got.starts_with(&format!("per_block_cast_lossless: {start}")), "{got}\nexpected {start}");
        };
        is(text(&mut |c| c.x = input(DType::E2m1x2, &[40], &[1])), "x has shape [40]");
        is(text(&mut |c| c.x = input(DType::U8, &[40, 64], &[64, 1])), "x is u8, allowed: e2m1x2");
        is(text(&mut |c| c.x = input(DType::E2m1x2, &[40, 60], &[60, 1])), "hidden is 120, allowed: multiples of 16");
        is(text(&mut |c| c.x = input(DType::E2m1x2, &[40, 64], &[1, 40])), "layout of x is");
        is(text(&mut |c| c.x_block = (3, 32)), "npt of x is 3, allowed: 1, 2, 4");
        is(text(&mut |c| c.x_block = (1, 8)), "npc of x is 8, allowed: 16, 32");
        is(text(&mut |c| c.out_block = (8, 64)), "npt of out is 8, allowed: 1, 16");
        is(text(&mut |c| c.out_block = (32, 256)), "npc of out is 256, allowed: 16, 32");
        is(text(&mut |c| c.x_block = (64, 32)), "npt of out is 32, allowed: 64 to 128");
        is(text(&mut |c| c.out_block = (32, 16)), "npc of out is 16, allowed: 32 to 128");
        is(text(&mut |c| c.x_block = (2, 32)), "x_sf has shape [40, 4], expected [20, 4]");
        is(text(&mut |c| c.out = view(&c.out, 0, DType::U8, &[40, 128], &[128, 1])), "out is u8, allowed: e4m3");
        is(text(&mut |c| c.out = view(&c.out, 0, DType::E4m3, &[40, 64], &[64, 1])), "out has shape [40, 64], expected");
        is(text(&mut |c| c.out = view(&c.out, 0, DType::E4m3, &[40, 128], &[129, 1])), "layout of out is");
        is(text(&mut |c| c.out = view(&c.out, 8, DType::E4m3, &[40, 128], &[128, 1])), "layout of out is");
        is(text(&mut |c| c.sf = view(&c.sf, 0, DType::F32, &[2, 3], &[3, 1])), "sf has shape [2, 3], expected [2, 2]");
        is(text(&mut |c| c.layout = SfLayout::ColMajor), "layout of sf is");
        is(text(&mut |c| c.layout = SfLayout::RowMajorE4m3), "layout of sf is row-major e4m3, expected row-major, ");
        is(text(&mut |c| c.layout = SfLayout::RowMajorPacked), "sf is f32, allowed: ue8m0x4");
        is(text(&mut |c| c.lost = Some(view(&c.sf, 64, DType::I32, &[39], &[1]))), "lost has shape [39], expected [40]");
        is(text(&mut |c| c.lost = Some(view(&c.sf, 64, DType::F32, &[40], &[1]))), "lost is f32, allowed: i32");
        is(text(&mut |c| c.lost = Some(view(&c.sf, 64, DType::I32, &[40], &[2]))), "layout of lost is");
        is(text(&mut |c| c.lost = Some(view(&c.x, 0, DType::I32, &[40], &[1]))), "x and lost overlap");
        is(text(&mut |c| c.sf = view(&c.x_sf, 636, DType::F32, &[2, 2], &[2, 1])), "x_sf and sf overlap");
        is(text(&mut |c| c.sf = view(&c.out, 5116, DType::F32, &[2, 2], &[2, 1])), "out and sf overlap");
        let elsewhere = Device::emulator().checked().zeros::<u8>(40 * 64).unwrap();
        // SAFETY: as above.
        let foreign = unsafe { TensorRef::from_raw(elsewhere.device(), elsewhere.as_ptr(), DType::E2m1x2, &[40, 64], &[64, 1]) };
        let error = call(|c| c.x = foreign.unwrap()).unwrap_err();
        assert!(matches!(error, Error::DeviceMismatch { arg: "x", .. }), "{error}");
        // What lies in one allocation may be used if it does not overlap.
        let memory = out.tensor_mut(&[1 << 14]).unwrap();
        assert!(call(|c| c.lost = Some(view(&memory, 0, DType::I32, &[40], &[1]))).is_ok());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        /// Any shape, distance of rows, alignment, blocks, layouts and scales.
        #[test]
        fn any_input(
            t in 0u64..140, columns in 1u64..40, gap in 0u64..9, offset in 0u64..9, wild: bool, x_npt in 0u32..8, x_npc in 4u32..8,
            npt in 0usize..5, npc in 4u32..8, layouts in 0usize..16, seed: u64,
        ) {
            let device = Device::emulator();
            let stream = device.stream().unwrap();
            let npt = [1, 16, 32, 64, 128][npt];
            let (x_block, block) = (((1 << x_npt).min(npt), 1 << x_npc.min(npc)), (npt, 1 << npc));
            let h = 16 * columns;
            let rng = Rng::new(seed);
            let blocks = (t.div_ceil(x_block.0.into()) * h.div_ceil(x_block.1.into())) as usize;
            let range = if wild { 255 } else { 13 };
            let scales = rng.stream(1).fill(blocks, |rng, i| (rng.below(i, range) as u32 + 240 - range as u32 * 15 / 16) << 23);
            let input =
                Input::given(&device, (t, h), (gap, offset), x_block, rng.bytes((t * h / 2) as usize), scales).unwrap();
            let (x_layout, layout) = (SfLayout::COMMON[layouts % 4], SfLayout::COMMON[layouts / 4]);
            let x_sf = input.sf(&device, x_layout, seed % 3).unwrap();
            let expected = input.reference(block);
            let mut out = Outputs::new(&device, &input, block, layout).unwrap();
            out.cast(&stream, &input, &x_sf, block, true).unwrap();
            out.check("any", &expected, h.div_ceil(block.1.into()) as usize, true).unwrap();
        }
    }
}
