//! `cast_back` and `per_token_cast_back`: every product is one f32 multiplication of two numbers that the reference reads from
//! the bits on its own, so results are compared bit for bit.

use crate::support::bench::Row;
use crate::support::cases::{Depth, HIDDENS, TOKENS};
use crate::support::compare::{Bits, equal};
use crate::support::golden::{self, Case as GoldenCase, Golden};
use crate::support::inputs;
use crate::support::rng::Rng;
use crate::support::suite::{Ctx, Report, Suite, ensure, text};
use ferrotile::quant::cast_back::{Args, PerTokenArgs, cast_back, cast_back_in_parts, per_token_cast_back};
use ferrotile::quant::{Format, Sf, SfLayout, SfShape, sf_shape};
use ferrotile::{Buffer, DType, Device, E4m3, Element, Stream, TensorMut, TensorRef};
use half::bf16;
use rayon::prelude::*;

/// Checks of the op.
pub const SUITE: Suite = Suite { op: "cast_back", run };

/// The last one is for blocks of one channel only.
const LAYOUTS: [SfLayout; 7] = [
    SfLayout::RowMajor,
    SfLayout::ColMajor,
    SfLayout::ColMajorPacked,
    SfLayout::RowMajorPacked,
    SfLayout::RowMajorE4m3,
    SfLayout::ColMajorE4m3,
    SfLayout::PerChannelPacked,
];

/// What is cast: data in logical order, with one f32 for each scale also where it is stored as a byte.
struct Problem {
    format: Format,
    tokens: u64,
    hidden: u64,
    block: (u32, u32),
    x: Vec<u8>,
    scales: Vec<f32>,
}

impl Problem {
    fn rows(&self) -> u64 {
        self.tokens.div_ceil(self.block.0.into())
    }

    fn columns(&self) -> u64 {
        self.hidden.div_ceil(self.block.1.into())
    }

    /// All codes, NaN too; scales of all sizes that the layout can hold, such that products overflow and underflow here and there.
    fn random(format: Format, (tokens, hidden): (u64, u64), block: (u32, u32), layout: SfLayout) -> Self {
        let x = Rng::named("cast_back x").bytes((tokens * format.columns(hidden)) as usize);
        Self { x, ..Self::with_scales(format, (tokens, hidden), block, layout) }
    }

    /// Without data.
    fn with_scales(format: Format, (tokens, hidden): (u64, u64), block: (u32, u32), layout: SfLayout) -> Self {
        let mut problem = Self { format, tokens, hidden, block, x: Vec::new(), scales: Vec::new() };
        let packed = layout.is_packed();
        let rng = Rng::named(&format!("cast_back sf {tokens} {hidden} {block:?} {packed}"));
        problem.scales = rng.fill((problem.rows() * problem.columns()) as usize, |rng, i| {
            if layout.is_e4m3() {
                return e4m3(rng.bits(i) as u8);
            }
            // Mostly around 1; one in eight from the whole range of exponents. 255, infinity, is left out: 0 times it is a NaN
            // whose sign is the hardware's choice.
            let exponent = if rng.below(2 * i, 8) == 0 { rng.below(2 * i + 1, 255) } else { 120 + rng.below(2 * i + 1, 14) };
            let mantissa = if packed { 0 } else { rng.bits(i) as u32 & 0x7F_FFFF };
            f32::from_bits((exponent as u32) << 23 | mantissa)
        });
        problem
    }
}

/// The value of an e4m3 code from its definition.
fn e4m3(code: u8) -> f32 {
    let (exponent, mantissa) = ((code >> 3 & 15) as i32, (code & 7) as f64);
    let magnitude = if exponent == 0 { mantissa / 8.0 * 2f64.powi(-6) } else { (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7) };
    let value = if code & 0x7F == 0x7F { f64::NAN } else { magnitude };
    (if code & 0x80 != 0 { -value } else { value }) as f32
}

const E2M1: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

/// An output type, and how the specification rounds to it.
trait Output: Element + Bits + Send {
    fn of(v: f32) -> Self;
}

impl Output for f32 {
    fn of(v: f32) -> Self {
        // The NaN of NVIDIA's conversion from e4m3, which the product keeps.
        if v.is_nan() { f32::from_bits(0x7FFF_FFFF) } else { v }
    }
}

impl Output for bf16 {
    fn of(v: f32) -> Self {
        if v.is_nan() { bf16::from_bits(0x7FFF) } else { bf16::from_f32(v) }
    }
}

fn reference<O: Output>(p: &Problem, x: &[u8]) -> Vec<O> {
    let e4m3: Vec<f32> = (0..=255).map(e4m3).collect();
    let mut out = vec![O::of(0.0); (p.tokens * p.hidden) as usize];
    let columns = p.columns() as usize;
    out.par_chunks_mut(p.hidden.max(1) as usize).enumerate().for_each(|(t, out)| {
        let row = &x[t * p.format.columns(p.hidden) as usize..];
        let scales = &p.scales[t / p.block.0 as usize * columns..];
        for (k, out) in out.chunks_mut(p.block.1 as usize).enumerate() {
            for (i, out) in out.iter_mut().enumerate() {
                let channel = k * p.block.1 as usize + i;
                let q = match p.format {
                    Format::E4m3 => e4m3[row[channel] as usize],
                    Format::E2m1 => {
                        let code = row[channel / 2] >> (channel % 2 * 4) & 15;
                        if code & 8 != 0 { -E2M1[code as usize & 7] } else { E2M1[code as usize] }
                    }
                };
                *out = O::of(q * scales[k]);
            }
        }
    });
    out
}

/// Data in device memory, its rows `pitch` bytes apart from byte `offset` on; between them 0xA5.
struct Data {
    buffer: Buffer<u8>,
    shape: [u64; 2],
    pitch: u64,
    offset: u64,
    dtype: DType,
}

impl Data {
    fn upload(device: &Device, p: &Problem, x: &[u8], gap: u64, offset: u64) -> Result<Self, String> {
        let shape = [p.tokens, p.format.columns(p.hidden)];
        let pitch = shape[1] + gap;
        let bytes = if gap == 0 && offset == 0 {
            device.upload(x).map_err(text)?
        } else {
            let mut spread = vec![0xA5; (offset + shape[0] * pitch) as usize];
            for (t, row) in x.chunks(shape[1].max(1) as usize).enumerate() {
                let at = offset as usize + t * pitch as usize;
                spread[at..at + row.len()].copy_from_slice(row);
            }
            device.upload(&spread).map_err(text)?
        };
        Ok(Self { buffer: bytes, shape, pitch, offset, dtype: p.format.dtype() })
    }

    fn tensor(&self) -> ferrotile::Result<TensorRef<'_>> {
        self.buffer.strided(&self.shape, &[self.pitch, 1], self.offset)?.reinterpret(self.dtype)
    }
}

/// Scales in device memory; rows (column-major: columns) are `gap` elements further apart than they need be.
struct Scales {
    buffer: ScaleBuffer,
    shape: [u64; 2],
    strides: [u64; 2],
    layout: SfLayout,
}

enum ScaleBuffer {
    /// f32 bits, or four exponents.
    Words(Buffer<u32>),
    E4m3(Buffer<E4m3>),
}

impl Scales {
    fn upload(device: &Device, p: &Problem, layout: SfLayout, gap: u64) -> Result<Self, String> {
        let (rows, columns) = (p.rows(), p.columns());
        let shape = match layout {
            SfLayout::PerChannelPacked => [rows.div_ceil(4), columns],
            _ if layout.is_packed() => [rows, columns.div_ceil(4)],
            _ => [rows, columns],
        };
        let strides = if layout.is_col_major() { [1, rows + gap] } else { [shape[1] + gap, 1] };
        let mut words = vec![if layout.is_packed() { 0u32 } else { 0xA5A5_A5A5 }; ((rows + gap) * (shape[1] + gap)) as usize];
        for m in 0..rows {
            for k in 0..columns {
                let scale = p.scales[(m * columns + k) as usize];
                let bits = if layout.is_e4m3() { E4m3::from_f32(scale).0 as u32 } else { scale.to_bits() };
                let mut set = |m: u64, k: u64, byte: u64| {
                    assert_eq!(bits & 0x807F_FFFF, 0, "packed scales are powers of two");
                    words[(m * strides[0] + k * strides[1]) as usize] |= bits >> 23 << (byte * 8);
                };
                match layout {
                    SfLayout::PerChannelPacked => set(m / 4, k, m % 4),
                    _ if layout.is_packed() => set(m, k / 4, k % 4),
                    _ => words[(m * strides[0] + k * strides[1]) as usize] = bits,
                }
            }
        }
        let buffer = if layout.is_e4m3() {
            let codes: Vec<E4m3> = words.iter().map(|word| E4m3(*word as u8)).collect();
            ScaleBuffer::E4m3(device.upload(&codes).map_err(text)?)
        } else {
            ScaleBuffer::Words(device.upload(&words).map_err(text)?)
        };
        Ok(Self { buffer, shape, strides, layout })
    }

    fn sf(&self) -> ferrotile::Result<Sf<'_>> {
        let tensor = match &self.buffer {
            ScaleBuffer::Words(words) => words.strided(&self.shape, &self.strides, 0)?.reinterpret(self.layout.dtype())?,
            ScaleBuffer::E4m3(codes) => codes.strided(&self.shape, &self.strides, 0)?,
        };
        Ok(Sf { tensor, layout: self.layout })
    }
}

/// Output in device memory with a margin of 0xA5 on both sides; `offset` elements moved from where vectors fit.
struct Destination<O> {
    buffer: Buffer<O>,
    shape: [u64; 2],
    offset: u64,
}

const MARGIN: u64 = 32;

impl<O: Output> Destination<O> {
    fn new(device: &Device, p: &Problem, offset: u64) -> Result<Self, String> {
        let len = p.tokens * p.hidden + 2 * MARGIN + offset;
        let mut buffer = device.alloc::<O>(len as usize).map_err(text)?;
        buffer.fill_bytes(0xA5).map_err(text)?;
        Ok(Self { buffer, shape: [p.tokens, p.hidden], offset: MARGIN + offset })
    }

    fn tensor(&mut self) -> ferrotile::Result<TensorMut<'_>> {
        self.buffer.strided_mut(&self.shape, &[self.shape[1].max(1), 1], self.offset)
    }

    fn check(&self, case: &str, expected: &[O]) -> Result<(), String> {
        let got = self.buffer.to_vec().map_err(text)?;
        let (start, end) = (self.offset as usize, self.offset as usize + expected.len());
        let untouched = |part: &[O]| bytemuck::cast_slice::<O, u8>(part).iter().all(|b| *b == 0xA5);
        ensure(untouched(&got[..start]) && untouched(&got[end..]), || format!("memory beside out was written; {case}"))?;
        equal("out", case, &self.shape, &got[start..end], expected)
    }
}

/// Which launcher.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Block,
    PerToken,
    /// In launches of so many tokens.
    Parts(u32),
}

fn call(stream: &Stream, way: Way, x: TensorRef<'_>, sf: Sf<'_>, block: (u32, u32), out: TensorMut<'_>) -> ferrotile::Result<()> {
    match way {
        Way::Block => cast_back(stream, Args { x, sf, block, out }),
        Way::PerToken => per_token_cast_back(stream, PerTokenArgs { x, sf, npc: block.1, out }),
        Way::Parts(tokens) => cast_back_in_parts(stream, Args { x, sf, block, out }, tokens),
    }
}

/// Ways in which a tensor may lie in memory.
#[derive(Clone, Copy, Default)]
struct Placement {
    x_gap: u64,
    x_offset: u64,
    sf_gap: u64,
    out_offset: u64,
}

/// One case with data of its own.
fn compare<O: Output>(ctx: &Ctx, way: Way, p: &Problem, layout: SfLayout, at: Placement, case: &str) -> Result<(), String> {
    let x = Data::upload(&ctx.device, p, &p.x, at.x_gap, at.x_offset)?;
    let sf = Scales::upload(&ctx.device, p, layout, at.sf_gap)?;
    compare_uploaded::<O>(ctx, way, p, (&p.x, &x), &sf, at.out_offset, case)
}

fn compare_uploaded<O: Output>(
    ctx: &Ctx,
    way: Way,
    p: &Problem,
    (x, data): (&[u8], &Data),
    sf: &Scales,
    out_offset: u64,
    case: &str,
) -> Result<(), String> {
    let stream = ctx.device.stream().map_err(text)?;
    let mut out = Destination::<O>::new(&ctx.device, p, out_offset)?;
    let tensors = || Ok::<_, String>((data.tensor().map_err(text)?, sf.sf().map_err(text)?));
    let (x_tensor, sf_tensor) = tensors()?;
    call(&stream, way, x_tensor, sf_tensor, p.block, out.tensor().map_err(text)?).map_err(|e| format!("{e}; {case}"))?;
    stream.synchronize().map_err(|e| format!("{e}; {case}"))?;
    out.check(case, &reference::<O>(p, x))
}

fn name(way: Way, p: &Problem, layout: SfLayout, out: &str) -> String {
    let Problem { format, tokens, hidden, block: (npt, npc), .. } = p;
    let way = match way {
        Way::Block => String::new(),
        Way::PerToken => ",per_token".to_owned(),
        Way::Parts(tokens) => format!(",max_tokens={tokens}"),
    };
    format!("fmt={format},h={hidden},layout={layout},out={out},sf={npt}x{npc},t={tokens}{way}")
}

/// The blocks and layouts of one shape that are checked at both depths: every width of a block, every layout, ragged edges.
fn combinations(hidden: u64) -> Vec<(Way, (u32, u32), SfLayout)> {
    use SfLayout::{ColMajor, ColMajorE4m3, ColMajorPacked, PerChannelPacked, RowMajor, RowMajorE4m3, RowMajorPacked};
    let h = hidden as u32;
    vec![
        (Way::PerToken, (1, 128), RowMajor),
        (Way::PerToken, (1, 128), ColMajorPacked),
        (Way::PerToken, (1, h), RowMajor),
        (Way::PerToken, (1, h), ColMajorPacked),
        (Way::PerToken, (1, 64), ColMajor),
        (Way::PerToken, (1, 16), RowMajorPacked),
        (Way::Block, (1, 32), ColMajorPacked),
        (Way::Block, (128, 128), RowMajor),
        (Way::Block, (32, 32), RowMajorPacked),
        (Way::Block, (3, 64), ColMajor),
        (Way::Block, (128, 1), RowMajor),
        (Way::Block, (7, 1), ColMajor),
        (Way::Block, (7, 1), RowMajor),
        (Way::PerToken, (1, 16), RowMajorE4m3),
        (Way::PerToken, (1, 32), ColMajorE4m3),
        (Way::Block, (32, 32), ColMajorE4m3),
        (Way::Block, (5, h), RowMajorE4m3),
        (Way::Block, (7, 1), RowMajorE4m3),
        (Way::Block, (32, 1), PerChannelPacked),
        (Way::Block, (3, 1), PerChannelPacked),
    ]
}

fn run(ctx: &Ctx) -> Result<Report, String> {
    let small = [(0, 384), (1, 7168), (5, 2048), (37, 576)];
    for shape in small {
        for (way, block, layout) in combinations(shape.1) {
            both_outputs(ctx, &[Format::E4m3, Format::E2m1], shape, &[(way, block, layout)])?;
        }
    }
    // So many values that e4m3 goes to bf16 through shared memory, with a last warp that is not whole.
    for (block, layout) in [
        ((1, 128), SfLayout::RowMajor),
        ((1, 16), SfLayout::ColMajorPacked),
        ((3, 128), SfLayout::RowMajorE4m3),
        ((1, 1040), SfLayout::ColMajor),
        ((7, 32), SfLayout::RowMajorPacked),
    ] {
        both_outputs(ctx, &[Format::E4m3], (1011, 1040), &[(Way::Block, block, layout)])?;
    }
    placements(ctx)?;
    parts(ctx)?;
    if ctx.depth == Depth::Full {
        grid(ctx)?;
    }
    captured(ctx)?;
    let ops = ["cast_back", "per_token_cast_back"];
    let notes = golden::check_cases(ctx, &ops, |golden, case| golden_case(ctx, golden, case))?;
    Ok(Report { notes, ..ctx.report() })
}

/// The combinations of one shape, with data that are uploaded once.
fn both_outputs(
    ctx: &Ctx,
    formats: &[Format],
    shape: (u64, u64),
    combinations: &[(Way, (u32, u32), SfLayout)],
) -> Result<(), String> {
    for &format in formats {
        let mut all: Option<(Problem, Data)> = None;
        for &(way, block, layout) in combinations {
            let p = Problem::with_scales(format, shape, block, layout);
            let outs = ["bf16", "fp32"].map(|out| (out, name(way, &p, layout, out)));
            let chosen: Vec<_> = outs.into_iter().filter(|(_, case)| ctx.case(case)).collect();
            if chosen.is_empty() {
                continue;
            }
            if all.is_none() {
                let p = Problem::random(format, shape, block, layout);
                let data = Data::upload(&ctx.device, &p, &p.x, 0, 0)?;
                all = Some((p, data));
            }
            let Some((first, data)) = &all else { continue };
            let sf = Scales::upload(&ctx.device, &p, layout, 0)?;
            for (out, case) in chosen {
                if out == "bf16" {
                    compare_uploaded::<bf16>(ctx, way, &p, (&first.x, data), &sf, 0, &case)?;
                } else {
                    compare_uploaded::<f32>(ctx, way, &p, (&first.x, data), &sf, 0, &case)?;
                }
            }
        }
    }
    Ok(())
}

/// The grids of the specification (quant.md 5.7).
fn grid(ctx: &Ctx) -> Result<(), String> {
    use SfLayout::{ColMajorPacked, RowMajor};
    for hidden in HIDDENS {
        for tokens in TOKENS {
            let h = hidden as u32;
            let mut combinations = Vec::new();
            for layout in [RowMajor, ColMajorPacked] {
                combinations.extend([(Way::PerToken, (1, 128), layout), (Way::PerToken, (1, h), layout)]);
            }
            combinations.extend([(Way::Block, (128, 1), RowMajor), (Way::Block, (128, 128), RowMajor)]);
            both_outputs(ctx, &[Format::E4m3, Format::E2m1], (tokens, hidden), &combinations)?;
        }
    }
    Ok(())
}

/// Strides, alignments and sizes that vectors do not fit.
fn placements(ctx: &Ctx) -> Result<(), String> {
    let none = Placement::default();
    let cases = [
        ("rows apart", (9, 192), (1, 64), Placement { x_gap: 64, sf_gap: 3, ..none }),
        ("rows of odd pitch", (9, 192), (1, 64), Placement { x_gap: 1, sf_gap: 1, ..none }),
        ("x from byte 1 on", (9, 192), (2, 32), Placement { x_offset: 1, ..none }),
        ("x from byte 2 on", (9, 192), (2, 32), Placement { x_offset: 2, ..none }),
        ("x from byte 4 on", (9, 192), (2, 32), Placement { x_offset: 4, ..none }),
        ("out from element 1 on", (9, 192), (4, 128), Placement { out_offset: 1, ..none }),
        ("out from element 4 on", (9, 192), (4, 128), Placement { out_offset: 4, ..none }),
        ("one row of any stride", (1, 64), (1, 64), Placement { x_gap: 3, ..none }),
        ("ragged columns", (3, 100), (1, 32), none),
        ("two columns", (5, 2), (1, 2), none),
        ("hidden no multiple of 4", (6, 350), (128, 128), Placement { sf_gap: 5, ..none }),
        ("scales per channel, pitch of 2 more", (11, 192), (8, 1), Placement { sf_gap: 2, ..none }),
        ("scales per channel, pitch of 4 more", (21, 192), (17, 1), Placement { sf_gap: 4, x_gap: 8, ..none }),
        ("scales per channel, more columns than a block has", (9, 2080), (4, 1), none),
    ];
    for (what, shape, block, at) in cases {
        for format in [Format::E4m3, Format::E2m1] {
            for layout in LAYOUTS {
                if layout == SfLayout::PerChannelPacked && block.1 != 1 {
                    continue;
                }
                let p = Problem::random(format, shape, block, layout);
                let case = format!("{what}: {}", name(Way::Block, &p, layout, "both"));
                if ctx.case(&case) {
                    compare::<bf16>(ctx, Way::Block, &p, layout, at, &case)?;
                    compare::<f32>(ctx, Way::Block, &p, layout, at, &case)?;
                }
            }
        }
    }
    Ok(())
}

/// More launches than one.
fn parts(ctx: &Ctx) -> Result<(), String> {
    let limits = [1, 2, 4, 7, 5, 3, 2].into_iter().zip(LAYOUTS);
    for shape in [(17, 1024), (9, 2048), (33, 192)] {
        for format in [Format::E4m3, Format::E2m1] {
            for (tokens, layout) in limits.clone() {
                for block in [(3, 128), (11, 1)] {
                    if layout == SfLayout::PerChannelPacked && block.1 != 1 {
                        continue;
                    }
                    let way = Way::Parts(tokens);
                    let p = Problem::random(format, shape, block, layout);
                    let case = name(way, &p, layout, "both");
                    if ctx.case(&case) {
                        compare::<bf16>(ctx, way, &p, layout, Placement::default(), &case)?;
                        compare::<f32>(ctx, way, &p, layout, Placement::default(), &case)?;
                    }
                }
            }
        }
    }
    Ok(())
}

/// Recorded as a graph and run twice: the same bytes as directly.
fn captured(ctx: &Ctx) -> Result<(), String> {
    if ctx.device.is_emulator() || !ctx.case("captured") {
        return Ok(());
    }
    let stream = ctx.device.stream().map_err(text)?;
    for (way, block) in [(Way::PerToken, (1, 128)), (Way::Block, (128, 128)), (Way::Block, (32, 1))] {
        let p = Problem::random(Format::E4m3, (300, 2048), block, SfLayout::RowMajor);
        let x = Data::upload(&ctx.device, &p, &p.x, 0, 0)?;
        let sf = Scales::upload(&ctx.device, &p, SfLayout::RowMajor, 0)?;
        let mut out = Destination::<bf16>::new(&ctx.device, &p, 0)?;
        // The first launch compiles the kernel, which a capture does not allow.
        call(&stream, way, x.tensor().map_err(text)?, sf.sf().map_err(text)?, block, out.tensor().map_err(text)?)
            .map_err(text)?;
        stream.synchronize().map_err(text)?;
        let graph = stream.capture(|s| call(s, way, x.tensor()?, sf.sf()?, block, out.tensor()?)).map_err(text)?;
        let expected = reference::<bf16>(&p, &p.x);
        for _ in 0..2 {
            out.buffer.fill_bytes(0xA5).map_err(text)?;
            graph.launch(&stream).map_err(text)?;
            stream.synchronize().map_err(text)?;
            out.check("captured", &expected)?;
        }
    }
    Ok(())
}

/// What the peers computed.
fn golden_case(ctx: &Ctx, golden: &Golden, case: &GoldenCase) -> Result<(), String> {
    let format = match case.param::<String>("in_fmt")?.as_str() {
        "e4m3" => Format::E4m3,
        _ => Format::E2m1,
    };
    let (layout, _) = case.sf_options()?;
    let (way, block) = if case.op == "cast_back" {
        (Way::Block, case.param("x_block_size")?)
    } else {
        (Way::PerToken, (1, case.param("num_per_channels")?))
    };
    let (x, sf, out) = (golden.tensor(case, "in/x.0")?, golden.tensor(case, "in/x.1")?, golden.tensor(case, "out/")?);
    let hidden = if format == Format::E2m1 { 2 * x.shape[1] } else { x.shape[1] };
    let p = Problem { format, tokens: x.shape[0], hidden, block, x: Vec::new(), scales: Vec::new() };
    let data = Data::upload(&ctx.device, &p, x.bytes, 0, 0)?;
    let shape = [sf.shape[0], sf.shape[1]];
    let strides = [sf.strides[0], sf.strides[1]];
    let buffer = if layout.is_e4m3() {
        let codes: Vec<E4m3> = laid_out(&sf.to_vec::<u8>()?, shape, strides).into_iter().map(E4m3).collect();
        ScaleBuffer::E4m3(ctx.device.upload(&codes).map_err(text)?)
    } else {
        // Unused bytes of packed words included.
        ScaleBuffer::Words(ctx.device.upload(&laid_out(&sf.to_vec::<u32>()?, shape, strides)).map_err(text)?)
    };
    let scales = Scales { buffer, shape, strides, layout };
    if case.param::<String>("fmt")? == "bf16" {
        golden_output::<bf16>(ctx, way, &p, &data, &scales, &out.to_vec()?, &case.name())
    } else {
        golden_output::<f32>(ctx, way, &p, &data, &scales, &out.to_vec()?, &case.name())
    }
}

/// Elements in logical order at the places that the strides give them.
fn laid_out<T: Copy + Default>(elements: &[T], shape: [u64; 2], strides: [u64; 2]) -> Vec<T> {
    let mut memory = vec![T::default(); ((shape[0] - 1) * strides[0] + (shape[1] - 1) * strides[1]) as usize + 1];
    for (i, element) in elements.iter().enumerate() {
        let (m, k) = (i as u64 / shape[1], i as u64 % shape[1]);
        memory[(m * strides[0] + k * strides[1]) as usize] = *element;
    }
    memory
}

fn golden_output<O: Output>(
    ctx: &Ctx,
    way: Way,
    p: &Problem,
    x: &Data,
    sf: &Scales,
    expected: &[O],
    case: &str,
) -> Result<(), String> {
    let stream = ctx.device.stream().map_err(text)?;
    let mut out = Destination::<O>::new(&ctx.device, p, 0)?;
    call(&stream, way, x.tensor().map_err(text)?, sf.sf().map_err(text)?, p.block, out.tensor().map_err(text)?).map_err(text)?;
    stream.synchronize().map_err(text)?;
    out.check(case, expected)
}

/// The cases of the peers and of their own benchmark, then small ones.
pub fn bench() -> Vec<Row> {
    let mut rows = Vec::new();
    let mut add =
        |case: String, format, shape, block, layout, out, way| rows.push(row(case, format, shape, block, layout, out, way));
    let (r, cp) = (SfLayout::RowMajor, SfLayout::ColMajorPacked);
    let (e4m3, e2m1) = (Format::E4m3, Format::E2m1);
    let large = (8064, 7168);
    for format in [e4m3, e2m1] {
        for out in ["bf16", "fp32"] {
            let case = format!("fmt={format},h=7168,out={out},sf=1x128,t=8064");
            add(case, format, large, (1, 128), r, out, Way::PerToken);
        }
    }
    add("fmt=e4m3,h=7168,out=bf16,sf=128x128,t=8064".to_owned(), e4m3, large, (128, 128), r, "bf16", Way::Block);
    for (format, hidden, tokens, block, layout, out) in [
        (e2m1, 7168, 8001, (1, 128), r, "fp32"),
        (e2m1, 7168, 8001, (1, 7168), r, "fp32"),
        (e2m1, 7168, 8001, (1, 128), cp, "fp32"),
        (e2m1, 7168, 8001, (1, 7168), cp, "fp32"),
        (e4m3, 7168, 8001, (1, 128), r, "fp32"),
        (e4m3, 7168, 8001, (1, 7168), r, "fp32"),
        (e4m3, 7168, 8001, (1, 128), cp, "fp32"),
        (e4m3, 7168, 8001, (1, 7168), cp, "fp32"),
        (e4m3, 7168, 8001, (1, 128), cp, "bf16"),
        (e2m1, 7168, 8001, (1, 128), cp, "bf16"),
        (e2m1, 2048, 4001, (1, 128), r, "fp32"),
        (e4m3, 7168, 8001, (128, 1), r, "bf16"),
        (e4m3, 7168, 8001, (128, 1), r, "fp32"),
        (e4m3, 7168, 8001, (128, 128), r, "bf16"),
        (e4m3, 7168, 8001, (128, 128), r, "fp32"),
        (e4m3, 2048, 4001, (128, 1), r, "bf16"),
        (e4m3, 576, 8001, (1, 128), r, "bf16"),
        (e4m3, 7168, 8064, (128, 1), SfLayout::PerChannelPacked, "bf16"),
        (e2m1, 7168, 8064, (1, 16), SfLayout::RowMajorE4m3, "bf16"),
        (e4m3, 7168, 8064, (1, 128), SfLayout::RowMajorE4m3, "bf16"),
        (e4m3, 7168, 1, (1, 128), r, "bf16"),
        (e4m3, 7168, 16, (1, 128), r, "bf16"),
        (e4m3, 7168, 128, (1, 128), r, "bf16"),
        (e2m1, 7168, 128, (1, 128), r, "fp32"),
    ] {
        let layout_name = match layout {
            SfLayout::PerChannelPacked => "TP",
            SfLayout::RowMajorE4m3 => "R8",
            _ if layout.is_packed() => "CP",
            _ => "R",
        };
        let case = format!("fmt={format},h={hidden},layout={layout_name},out={out},sf={}x{},t={tokens}", block.0, block.1);
        add(case, format, (tokens, hidden), block, layout, out, Way::Block);
    }
    rows
}

fn row(case: String, format: Format, shape: (u64, u64), block: (u32, u32), layout: SfLayout, out: &'static str, way: Way) -> Row {
    let p = Problem { format, tokens: shape.0, hidden: shape.1, block, x: Vec::new(), scales: Vec::new() };
    let out_size = if out == "bf16" { 2 } else { 4 };
    let sf_bytes = layout.rows(p.rows()) * layout.columns(p.columns()) * layout.dtype().size();
    let bytes = shape.0 * (format.columns(shape.1) + shape.1 * out_size) + sf_bytes;
    let build = move |device: &Device, _: &Stream| {
        let p = Problem { format, tokens: shape.0, hidden: shape.1, block, x: Vec::new(), scales: Vec::new() };
        let shape = [p.tokens, format.columns(p.hidden)];
        let buffer = match format {
            Format::E4m3 => inputs::codes_e4m3(device, 0, shape[0] * shape[1])?,
            Format::E2m1 => inputs::bytes(device, 0, shape[0] * shape[1])?,
        };
        let x = Data { buffer, shape, pitch: shape[1], offset: 0, dtype: format.dtype() };
        let SfShape { shape, strides, elements, .. } = sf_shape(p.tokens, p.hidden, block, layout);
        let buffer = if layout.is_e4m3() {
            ScaleBuffer::E4m3(inputs::constant(device, E4m3::from_f32(2f32.powi(-7)), elements)?)
        } else {
            ScaleBuffer::Words(inputs::constant(device, inputs::scale_word(layout.is_packed()), elements)?)
        };
        let sf = Scales { buffer, shape, strides, layout };
        Ok(if out == "bf16" { launch::<bf16>(device, &p, x, sf, way)? } else { launch::<f32>(device, &p, x, sf, way)? })
    };
    Row { op: "cast_back", case, bytes, build: Box::new(build) }
}

fn launch<O: Output>(
    device: &Device,
    p: &Problem,
    x: Data,
    sf: Scales,
    way: Way,
) -> Result<crate::support::bench::Launch, String> {
    let mut out = Destination::<O>::new(device, p, 0)?;
    let block = p.block;
    Ok(Box::new(move |stream| call(stream, way, x.tensor()?, sf.sf()?, block, out.tensor()?)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::support::compare::calc_diff;
    use ferrotile::Error;
    use ferrotile_kernels::device::e2m1x8_to_f32;
    use ferrotile_kernels::quant::cast_back::{Divisor, launch_tokens};
    use proptest::prelude::{ProptestConfig, prop_assert_eq, proptest};

    #[test]
    fn suite() {
        SUITE.test();
    }

    #[test]
    fn divisors_divide() {
        let interesting = |limit: u64| {
            let near = (0..32).flat_map(|s| [(1u64 << s) - 1, 1 << s, (1 << s) + 1]);
            near.chain(Rng::new(11).fill(2000, |r, i| r.below(i, 1 << 31))).filter(move |v| *v < limit).map(|v| v as u32)
        };
        for d in interesting((1 << 31) + 1).filter(|d| *d > 0) {
            let divisor = Divisor::new(d);
            // Multiples of the divisor and their neighbours are where a quotient changes.
            let multiples = (0..50).flat_map(|i| {
                let n = (i * 0x0123_4567u64) % (1 << 31) / d as u64 * d as u64;
                [n.saturating_sub(1), n, n + 1].map(|n| n.min((1 << 31) - 1) as u32)
            });
            for n in interesting(1 << 31).chain(multiples) {
                assert_eq!(divisor.divide(n), n / d, "{n} / {d}");
            }
        }
    }

    /// Launches cover all tokens, and each holds whole scaling blocks or lies within one.
    #[test]
    fn launches_do_not_split_blocks_and_go_on() {
        for (num_tokens, npt) in [(1, 1), (10, 1), (10, 3), (10, 10), (64, 32), (33, 32)] {
            for limit in 1..=12 {
                let mut first = 0;
                while first < num_tokens {
                    let tokens = launch_tokens(first, num_tokens, npt, limit);
                    assert!(tokens > 0 && tokens <= limit);
                    let last = first + tokens - 1;
                    assert!(first % npt == 0 || first / npt == last / npt, "{first} to {last} with {npt}");
                    first += tokens;
                }
                assert_eq!(first, num_tokens);
            }
        }
        assert_eq!(launch_tokens(0, u32::MAX, 3, 1 << 20), ((1 << 20) / 3) * 3);
    }

    /// All pairs of neighbouring codes in each place, with other codes around them.
    #[test]
    fn e2m1_decodes_in_every_place() {
        for place in 0..8 {
            for codes in 0..256u32 {
                for other in [0u32, 0xFFFF_FFFF, 0x1234_5678, 0x9ABC_DEF8] {
                    let word = other & !(0xFFu32.rotate_left(4 * place)) | codes.rotate_left(4 * place);
                    let expected: [u32; 8] = std::array::from_fn(|i| {
                        let code = word >> (4 * i) & 15;
                        E2M1[code as usize & 7].to_bits() | code >> 3 << 31
                    });
                    assert_eq!(e2m1x8_to_f32(word).map(f32::to_bits), expected, "{word:08x}");
                }
            }
        }
    }

    /// Specification 5.7: the difference to the original after a round trip. Quantised here by the plain formula (section 2).
    #[test]
    fn a_round_trip_stays_close() {
        let device = Device::emulator();
        let (tokens, hidden, npc) = (40u64, 1024u64, 128usize);
        let x = Rng::named("round trip").normal_f32((tokens * hidden) as usize);
        for (format, max, bound) in [(Format::E4m3, 448.0, 1e-3), (Format::E2m1, 6.0, 2e-2)] {
            let scales: Vec<f32> =
                x.chunks(npc).map(|block| block.iter().fold(0f32, |amax, v| amax.max(v.abs())) / max).collect();
            let scaled: Vec<f32> = x.iter().enumerate().map(|(i, v)| v / scales[i / npc]).collect();
            let bytes: Vec<u8> = match format {
                Format::E4m3 => scaled.iter().map(|v| E4m3::from_f32(*v).0).collect(),
                Format::E2m1 => scaled.chunks(2).map(|v| ferrotile::E2m1x2::from_f32s([v[0], v[1]]).0).collect(),
            };
            let p = Problem { format, tokens, hidden, block: (1, npc as u32), x: bytes, scales };
            let data = Data::upload(&device, &p, &p.x, 0, 0).unwrap();
            let sf = Scales::upload(&device, &p, SfLayout::RowMajor, 0).unwrap();
            let mut out = device.alloc::<f32>(x.len()).unwrap();
            let tensor = out.tensor_mut(&[tokens, hidden]).unwrap();
            let stream = device.stream().unwrap();
            call(&stream, Way::PerToken, data.tensor().unwrap(), sf.sf().unwrap(), p.block, tensor).unwrap();
            let diff = calc_diff(&out.to_vec().unwrap(), &x);
            assert!(diff < bound && diff > 0.0, "{format}: {diff}");
        }
    }

    #[test]
    fn two_runs_give_the_same_bytes() {
        let device = Device::emulator().shuffled(3);
        let p = Problem::random(Format::E2m1, (50, 832), (1, 64), SfLayout::ColMajor);
        let (x, sf) =
            (Data::upload(&device, &p, &p.x, 0, 0).unwrap(), Scales::upload(&device, &p, SfLayout::ColMajor, 0).unwrap());
        let once = || {
            let mut out = Destination::<bf16>::new(&device, &p, 0).unwrap();
            let stream = device.stream().unwrap();
            call(&stream, Way::Block, x.tensor().unwrap(), sf.sf().unwrap(), p.block, out.tensor().unwrap()).unwrap();
            out.buffer.to_vec().unwrap().into_iter().map(bf16::to_bits).collect::<Vec<_>>()
        };
        assert_eq!(once(), once());
    }

    /// Every wrong argument is refused with the error that the documentation names, and `out` stays as it was.
    #[test]
    fn wrong_arguments_are_refused() {
        let device = Device::emulator().checked();
        let other = Device::emulator();
        let stream = device.stream().unwrap();
        let x = device.zeros::<E4m3>(4096).unwrap();
        let bytes = device.zeros::<u8>(4096).unwrap();
        let sf = device.zeros::<f32>(256).unwrap();
        let elsewhere = other.zeros::<f32>(256).unwrap();
        let words = device.zeros::<ferrotile::Ue8m0x4>(64).unwrap();
        let mut out = device.upload(&[bf16::ONE; 4096]).unwrap();
        let mut halves = device.upload(&[half::f16::ONE; 1024]).unwrap();

        // 4 tokens of 256 channels with blocks of (1, 128), if nothing else is said.
        let data = || x.tensor(&[4, 256]).unwrap();
        let scales = || Sf { tensor: sf.tensor(&[4, 2]).unwrap(), layout: SfLayout::RowMajor };
        let row_major = |tensor| Sf { tensor, layout: SfLayout::RowMajor };
        let mut refused =
            |what: &str, x: TensorRef<'_>, sf: Sf<'_>, block, shape: &[u64], strides: &[u64], expected: fn(&Error) -> bool| {
                let tensor = out.strided_mut(shape, strides, 0).unwrap();
                let error = cast_back(&stream, Args { x, sf, block, out: tensor }).expect_err(what);
                assert!(expected(&error), "{what}: {error}");
                assert!(error.to_string().starts_with("cast_back: "), "{error}");
            };
        let (fine, rows) = ([4, 256], [256, 1]);
        type Is = fn(&Error) -> bool;
        let shape_of_x: Is = |e| matches!(e, Error::Shape { arg: "x", .. });
        let shape_of_sf: Is = |e| matches!(e, Error::Shape { arg: "sf", .. });
        let dtype_of_sf: Is = |e| matches!(e, Error::DType { arg: "sf", .. });
        let npc: Is = |e| matches!(e, Error::Value { arg: "npc", .. });

        refused("rank of x", x.tensor(&[1024]).unwrap(), scales(), (1, 128), &fine, &rows, shape_of_x);
        refused("dtype of x", bytes.tensor(&[4, 256]).unwrap(), scales(), (1, 128), &fine, &rows, |e| {
            matches!(e, Error::DType { arg: "x", .. })
        });
        refused("stride of x", x.strided(&[4, 256], &[1, 4], 0).unwrap(), scales(), (1, 128), &fine, &rows, |e| {
            matches!(e, Error::Layout { arg: "x", .. })
        });
        refused("shape of out", data(), scales(), (1, 128), &[4, 255], &[255, 1], |e| {
            matches!(e, Error::Shape { arg: "out", .. })
        });
        refused("stride of out", data(), scales(), (1, 128), &fine, &[512, 1], |e| matches!(e, Error::Layout { arg: "out", .. }));
        refused("npt of 0", data(), scales(), (0, 128), &fine, &rows, |e| matches!(e, Error::Value { arg: "npt", .. }));
        for wrong in [0, 2, 48, 127, 129, 512] {
            refused("npc", data(), scales(), (1, wrong), &fine, &rows, npc);
        }
        refused("rows of sf", data(), row_major(sf.tensor(&[3, 2]).unwrap()), (1, 128), &fine, &rows, shape_of_sf);
        refused("columns of sf", data(), row_major(sf.tensor(&[4, 3]).unwrap()), (1, 128), &fine, &rows, shape_of_sf);
        refused("sf of another block", data(), scales(), (2, 128), &fine, &rows, shape_of_sf);
        refused("packed sf called f32", data(), row_major(words.tensor(&[4, 2]).unwrap()), (1, 128), &fine, &rows, dtype_of_sf);
        let packed = Sf { layout: SfLayout::ColMajorPacked, ..scales() };
        refused("f32 sf called packed", data(), packed, (1, 128), &fine, &rows, dtype_of_sf);
        let column_major = Sf { layout: SfLayout::ColMajor, ..scales() };
        refused("row-major sf called column-major", data(), column_major, (1, 128), &fine, &rows, |e| {
            matches!(e, Error::Layout { arg: "sf", .. })
        });
        let per_channel = Sf { layout: SfLayout::PerChannelPacked, ..scales() };
        refused("per-channel sf of wider blocks", data(), per_channel, (1, 128), &fine, &rows, |e| {
            matches!(e, Error::Layout { arg: "sf", .. })
        });
        let e4m3 = Sf { layout: SfLayout::RowMajorE4m3, ..scales() };
        refused("f32 sf called e4m3", data(), e4m3, (1, 128), &fine, &rows, dtype_of_sf);
        refused("sf elsewhere", data(), row_major(elsewhere.tensor(&[4, 2]).unwrap()), (1, 128), &fine, &rows, |e| {
            matches!(e, Error::DeviceMismatch { arg: "sf", .. })
        });
        // SAFETY: nothing is launched.
        let on_out = unsafe { TensorRef::from_raw(&device, out.as_ptr() + 512, DType::E4m3, &[4, 256], &[256, 1]).unwrap() };
        let mut refused = |what: &str, x: TensorRef<'_>, expected: Is| {
            let tensor = out.tensor_mut(&[4, 256]).unwrap();
            let error = cast_back(&stream, Args { x, sf: scales(), block: (1, 128), out: tensor }).expect_err(what);
            assert!(expected(&error), "{what}: {error}");
        };
        refused("overlap", on_out, |e| matches!(e, Error::Overlap { a: "x", b: "out", .. }));
        // SAFETY: nothing is launched.
        let far = unsafe { TensorRef::from_raw(&device, 1 << 40, DType::E4m3, &[4, 256], &[1 << 33, 1]).unwrap() };
        refused("row stride", far, |e| matches!(e, Error::Value { arg: "row stride of x", .. }));

        let f16 = Args { x: data(), sf: scales(), block: (1, 128), out: halves.tensor_mut(&[4, 256]).unwrap() };
        assert!(matches!(cast_back(&stream, f16), Err(Error::DType { arg: "out", .. })));
        // Too many rows for the kernel's numbers; the memory is never touched.
        let rows = 1u64 << 31;
        // SAFETY: nothing is launched.
        let args = unsafe {
            Args {
                x: TensorRef::from_raw(&device, 1 << 40, DType::E4m3, &[rows, 16], &[16, 1]).unwrap(),
                sf: row_major(TensorRef::from_raw(&device, 1 << 50, DType::F32, &[1, 1], &[1, 1]).unwrap()),
                block: (u32::MAX, 16),
                out: TensorMut::from_raw(&device, 1 << 42, DType::Bf16, &[rows, 16], &[16, 1]).unwrap(),
            }
        };
        assert!(matches!(cast_back(&stream, args), Err(Error::Value { arg: "num_tokens", .. })));
        for wrong in [0, 1, 8, 129] {
            let args = PerTokenArgs { x: data(), sf: scales(), npc: wrong, out: out.tensor_mut(&[4, 256]).unwrap() };
            let error = per_token_cast_back(&stream, args).unwrap_err();
            assert!(matches!(error, Error::Value { op: "per_token_cast_back", arg: "npc", .. }), "{error}");
        }
        let allowed =
            cast_back(&stream, Args { x: data(), sf: scales(), block: (1, 48), out: out.tensor_mut(&[4, 256]).unwrap() });
        assert_eq!(allowed.unwrap_err().to_string(), "cast_back: npc is 48, allowed: 1, 16, 32, 64, 128, 256 (hidden)");
        assert!(out.to_vec().unwrap().iter().all(|v| *v == bf16::ONE), "out was written");
    }

    #[test]
    fn empty_tensors_launch_nothing() {
        let device = Device::emulator().checked();
        let x = device.zeros::<E4m3>(1).unwrap();
        let sf = device.zeros::<f32>(1).unwrap();
        let mut out = device.zeros::<f32>(1).unwrap();
        for (shape, sf_shape) in [([0, 256], [0, 2]), ([5, 0], [5, 0])] {
            let args = Args {
                x: x.tensor(&shape).unwrap(),
                sf: Sf { tensor: sf.tensor(&sf_shape).unwrap(), layout: SfLayout::RowMajor },
                block: (1, 128),
                out: out.tensor_mut(&shape).unwrap(),
            };
            cast_back(&device.stream().unwrap(), args).unwrap();
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn any_shape_and_stride(
            e2m1: bool, f32_out: bool, layout in 0usize..7, tokens in 0u64..24, half_hidden in 1u64..150, wide: bool,
            npc in 0usize..6, npt in 1u32..30, x_gap in 0u64..20, x_offset in 0u64..20, sf_gap in 0u64..6, out_offset in 0u64..9,
        ) {
            let hidden = if wide { half_hidden.div_ceil(32) * 64 } else if e2m1 { 2 * half_hidden } else { half_hidden };
            let npc = [1, 16, 32, 64, 128, hidden as u32][npc];
            let format = if e2m1 { Format::E2m1 } else { Format::E4m3 };
            let layout = LAYOUTS[layout];
            let npc = if layout == SfLayout::PerChannelPacked { 1 } else { npc };
            // Half of the cases are laid out for vectors.
            let at = if wide {
                Placement { x_gap: x_gap / 8 * 8, x_offset: x_offset / 8 * 8, sf_gap, out_offset: out_offset / 8 * 8 }
            } else {
                Placement { x_gap, x_offset, sf_gap, out_offset }
            };
            let p = Problem::random(format, (tokens, hidden), (npt, npc), layout);
            let ctx = Ctx::new(Device::emulator().checked(), Depth::Small);
            let case = name(Way::Block, &p, layout, "");
            let result = if f32_out {
                compare::<f32>(&ctx, Way::Block, &p, layout, at, &case)
            } else {
                compare::<bf16>(&ctx, Way::Block, &p, layout, at, &case)
            };
            prop_assert_eq!(result, Ok(()));
        }
    }
}
