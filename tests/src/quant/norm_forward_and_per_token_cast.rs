//! norm_forward_and_per_token_cast: reference, cases, checks and benchmark.

use super::norm_forward::{
    DTYPES, FILL, GUARD, Gaps, Inputs, Outputs as NormOutputs, PARTS, Placed, Problem, bench_inputs, golden_problem, maybe, same,
    small_shapes,
};
use crate::support::bench::{Launch, Row};
use crate::support::cases::Depth;
use crate::support::compare;
use crate::support::golden::{self, Case, Golden};
use crate::support::suite::{Ctx, Report, Suite, ensure, text};
use ferrotile::quant::norm_forward_and_per_token_cast::{self as op, Args, MegaMoeSf};
use ferrotile::quant::{Input, SfLayout, SfMut, per_token_cast, sf_shape};
use ferrotile::{Buffer, DType, Device, E4m3, Stream};
use rayon::prelude::*;

/// The checks of this op.
pub const SUITE: Suite = Suite { op: "norm_forward_and_per_token_cast", run };

// The reference.

/// e4m3 by counting steps: 2^-9 below 2^-6, else an eighth of the binade.
fn encode(v: f32) -> u8 {
    if v.is_nan() {
        return 0x7F;
    }
    let sign = (v.to_bits() >> 24) as u8 & 0x80;
    if v.abs() >= 448.0 {
        return sign | 0x7E;
    }
    let binade = ((v.to_bits() >> 23 & 0xFF) as i32 - 127).max(-6);
    let steps = (v.abs() * 2f32.powi(3 - binade)).round_ties_even() as i32;
    sign | ((binade + 6) * 8 + steps) as u8
}

/// Codes of rows, and scales of their groups of 32.
fn quantise(norm: &[f32], hidden: usize, round: bool) -> (Vec<u8>, Vec<f32>) {
    let rows = norm.par_chunks(hidden).map(|row| {
        let (mut codes, mut scales) = (Vec::with_capacity(hidden), Vec::new());
        for group in row.chunks(32) {
            // `max` ignores NaN.
            let amax = group.iter().fold(0f32, |max, v| max.max(v.abs()));
            let c = amax.max(f32::from_bits(0x38D1_B717));
            let (mut sf, mut inverse) = (c / 448.0, 448.0 / c);
            if round {
                let up = if sf.to_bits() & 0x7F_FFFF == 0 { 0 } else { 1 };
                sf = f32::from_bits(((sf.to_bits() >> 23) + up) << 23);
                // What the published arithmetic makes of infinity.
                inverse = if sf.is_finite() { 1.0 / sf } else { f32::NEG_INFINITY };
            }
            scales.push(sf);
            codes.extend(group.iter().map(|v| encode(v * inverse)));
        }
        (codes, scales)
    });
    let rows: Vec<_> = rows.collect();
    (rows.par_iter().flat_map_iter(|r| r.0.clone()).collect(), rows.iter().flat_map(|r| r.1.clone()).collect())
}

/// The row of a token in the mega-MoE order, by the words of the specification.
fn mega_moe_row(t: u64, bm: u64) -> u64 {
    let i = t % bm;
    (t / bm) * bm.next_multiple_of(128) + (i / 128) * 128 + (i % 32) * 4 + (i % 128) / 32
}

// Running.

/// Options of a call.
#[derive(Clone, Copy, Debug)]
struct Options {
    round: bool,
    layout: SfLayout,
    /// `out_bf16`, and the other optional outputs.
    all: bool,
    /// Without `out_bf16` though with `all`.
    no_bf16: bool,
    mega_moe: Option<u32>,
    /// What the outputs are off from where their buffers start.
    offset: u64,
    /// What column-major and batch pitches exceed the smallest ones by, a multiple of 4.
    pad: u64,
}

impl Options {
    fn new(round: bool, layout: SfLayout) -> Self {
        Self { round, layout, all: true, no_bf16: false, mega_moe: None, offset: 0, pad: 0 }
    }
}

const CONFIGS: [(bool, SfLayout); 6] = [
    (true, SfLayout::RowMajorPacked),
    (true, SfLayout::ColMajorPacked),
    (true, SfLayout::RowMajor),
    (false, SfLayout::ColMajor),
    (false, SfLayout::RowMajor),
    (true, SfLayout::ColMajor),
];

/// The outputs of a call.
struct Outputs {
    data: Buffer<u8>,
    sf: Buffer<u32>,
    sf_shape: Vec<u64>,
    sf_strides: Vec<u64>,
    mega_moe: Buffer<u32>,
    mega_moe_shape: [u64; 2],
    mega_moe_strides: [u64; 2],
    out_bf16: Option<Placed>,
    residual_out: Option<Placed>,
    rstd: Option<Placed>,
}

impl Outputs {
    fn new(device: &Device, p: &Problem, o: Options) -> Result<Self, String> {
        let (rank, h) = (p.shape.len(), p.hidden() as u64);
        let t = p.shape[rank - 2];
        let of_batch = sf_shape(t, h, (1, 32), o.layout);
        let (mut strides, columns) = (of_batch.strides, of_batch.shape[1]);
        strides[if o.layout.is_col_major() { 1 } else { 0 }] += o.pad;
        let pitch = if o.layout.is_col_major() { columns * strides[1] } else { t * strides[0] } + o.pad;
        let (sf_shape, sf_strides) = if rank == 2 {
            (of_batch.shape.to_vec(), strides.to_vec())
        } else {
            (vec![p.shape[0], t, columns], vec![pitch, strides[0], strides[1]])
        };
        let batches = if rank == 2 { 1 } else { p.shape[0] };
        let mega_moe_rows = o.mega_moe.map_or(0, |bm| op::mega_moe_sf_rows(t, bm) + o.pad);
        let mega_moe_shape = [mega_moe_rows, if mega_moe_rows > 0 { h / 128 } else { 0 }];
        let optional = |dtype: DType, shape: &[u64]| Placed::output(device, dtype, shape, o.offset);
        let mut new = Self {
            data: device.alloc((p.shape.iter().product::<u64>() + o.offset + GUARD) as usize).map_err(text)?,
            sf: device.alloc((batches * pitch + GUARD) as usize).map_err(text)?,
            sf_shape,
            sf_strides,
            mega_moe: device.alloc((mega_moe_shape[1] * (mega_moe_rows + o.pad) + GUARD) as usize).map_err(text)?,
            mega_moe_shape,
            mega_moe_strides: [1, mega_moe_rows + o.pad],
            out_bf16: if o.all && !o.no_bf16 { Some(optional(DType::Bf16, &p.shape)?) } else { None },
            residual_out: if o.all && p.residual.is_some() { Some(optional(p.dtype, &p.shape)?) } else { None },
            rstd: if o.all { Some(optional(DType::F32, &p.shape[..rank - 1])?) } else { None },
        };
        new.fill()?;
        Ok(new)
    }

    fn fill(&mut self) -> Result<(), String> {
        self.data.fill_bytes(FILL).map_err(text)?;
        self.sf.fill_bytes(FILL).map_err(text)?;
        self.mega_moe.fill_bytes(FILL).map_err(text)?;
        [&mut self.out_bf16, &mut self.residual_out, &mut self.rstd].into_iter().flatten().try_for_each(Placed::fill)
    }

    fn launch(&mut self, stream: &Stream, p: &Problem, inputs: &Inputs, o: Options) -> ferrotile::Result<()> {
        let mut strides = vec![1; p.shape.len()];
        for i in (1..p.shape.len()).rev() {
            strides[i - 1] = strides[i] * p.shape[i];
        }
        let sf = self.sf.strided_mut(&self.sf_shape, &self.sf_strides, 0)?.reinterpret(o.layout.dtype())?;
        let mega_moe = match o.mega_moe {
            None => None,
            Some(block_m) => {
                let tensor = self.mega_moe.strided_mut(&self.mega_moe_shape, &self.mega_moe_strides, 0)?;
                Some(MegaMoeSf { tensor: tensor.reinterpret(DType::Ue8m0x4)?, block_m })
            }
        };
        let args = Args {
            x: inputs.x.tensor()?,
            residual: inputs.residual.as_ref().map(Placed::tensor).transpose()?,
            weight: inputs.weight.as_ref().map(Placed::tensor).transpose()?,
            eps: p.eps,
            out_scale: p.out_scale,
            round_sf: o.round,
            out: self.data.strided_mut(&p.shape, &strides, o.offset)?.reinterpret(DType::E4m3)?,
            sf: SfMut { tensor: sf, layout: o.layout },
            mega_moe_sf: mega_moe,
            out_bf16: maybe(&mut self.out_bf16)?,
            residual_out: maybe(&mut self.residual_out)?,
            rstd: maybe(&mut self.rstd)?,
        };
        op::norm_forward_and_per_token_cast(stream, args)
    }

    /// The codes, after a look at what is around them.
    fn codes(&self, p: &Problem, o: Options) -> Result<Vec<u8>, String> {
        let all = self.data.to_vec().map_err(text)?;
        let (start, end) = (o.offset as usize, o.offset as usize + p.x.len());
        let outside = all[..start].iter().chain(&all[end..]).all(|b| *b == FILL);
        ensure(outside, || format!("out: bytes outside the tensor were written; {}", p.name))?;
        Ok(all[start..end].to_vec())
    }

    fn check(&self, p: &Problem, o: Options, name: &str, norm: &[f32], rstd: &[f32]) -> Result<(), String> {
        let h = p.hidden();
        let (codes, scales) = quantise(norm, h, o.round);
        let e4m3 = bytemuck::cast_slice::<u8, E4m3>;
        compare::equal("out", name, &p.shape, e4m3(&self.codes(p, o)?), e4m3(&codes))?;
        let columns = h.div_ceil(32);
        let words: Vec<u32> = if o.layout.is_packed() {
            let word = |four: &[f32]| four.iter().enumerate().fold(0, |word, (i, v)| word | (v.to_bits() >> 23) << (8 * i));
            scales.chunks(columns).flat_map(|row| row.chunks(4).map(word)).collect()
        } else {
            scales.iter().map(|v| v.to_bits()).collect()
        };
        let sf = self.sf.to_vec().map_err(text)?;
        compare::equal_strided("sf", name, &self.sf_shape, &self.sf_strides, &sf, &words)?;
        compare::untouched("sf", name, &self.sf_shape, &self.sf_strides, &sf, FILL)?;
        if let Some(bm) = o.mega_moe {
            let got = self.mega_moe.to_vec().map_err(text)?;
            let mut expected = vec![0xA5A5_A5A5u32; got.len()];
            for (t, row) in scales.chunks(columns).enumerate() {
                for (c, four) in row.chunks(4).enumerate() {
                    let at = c as u64 * self.mega_moe_strides[1] + mega_moe_row(t as u64, bm.into());
                    expected[at as usize] = u32::from_le_bytes(core::array::from_fn(|i| (four[i].to_bits() >> 23) as u8));
                }
            }
            compare::equal("mega_moe_sf", name, &[got.len() as u64], &got, &expected)?;
        }
        if let Some(out) = &self.out_bf16 {
            let expected: Vec<f32> = norm.par_iter().map(|v| half::bf16::from_f32(*v).to_f32()).collect();
            same("out_bf16", name, &p.shape, &out.values("out_bf16", name)?, &expected)?;
        }
        if let Some(sum) = &self.residual_out {
            same("residual_out", name, &p.shape, &sum.values("residual_out", name)?, &p.sum())?;
        }
        if let Some(got) = &self.rstd {
            same("rstd", name, &p.shape[..p.shape.len() - 1], &got.values("rstd", name)?, rstd)?;
        }
        Ok(())
    }
}

/// The op with each of the options, against the reference and against the two ops it stands for.
fn check_problem(ctx: &Ctx, p: &Problem, gaps: Gaps, options: &[Options]) -> Result<(), String> {
    let name = |o: &Options| format!("{},gaps={gaps:?},{o:?}", p.name);
    if !options.iter().fold(false, |any, o| ctx.case(&name(o)) | any) {
        return Ok(());
    }
    let stream = ctx.device.stream().map_err(text)?;
    let inputs = Inputs::new(&ctx.device, p, gaps)?;
    let mut norm = NormOutputs::new(&ctx.device, p, 0, true)?;
    norm.launch(&stream, p, &inputs).map_err(text)?;
    let (rstd, values) = norm.check(p)?;
    for o in options {
        let name = name(o);
        let mut outputs = Outputs::new(&ctx.device, p, *o)?;
        // The second time over its own results.
        for _ in 0..if ctx.depth == Depth::Small { 1 } else { 2 } {
            outputs.launch(&stream, p, &inputs, *o).map_err(text)?;
        }
        outputs.check(p, *o, &name, &values, &rstd)?;
        if p.shape.len() == 2 && !p.x.is_empty() {
            let mut cast = Outputs::new(&ctx.device, p, *o)?;
            let sf = cast.sf.strided_mut(&cast.sf_shape, &cast.sf_strides, 0).map_err(text)?;
            let args = per_token_cast::Args {
                x: Input::Plain(norm.out.tensor().map_err(text)?),
                npc: 32,
                round_sf: o.round,
                stochastic: false,
                out: cast.data.tensor_mut(&p.shape).and_then(|t| t.reinterpret(DType::E4m3)).map_err(text)?,
                sf: SfMut { tensor: sf.reinterpret(o.layout.dtype()).map_err(text)?, layout: o.layout },
            };
            per_token_cast::per_token_cast(&stream, args).map_err(text)?;
            let codes = cast.codes(p, Options { offset: 0, ..*o })?;
            compare::equal("out and per_token_cast", &name, &p.shape, &outputs.codes(p, *o)?, &codes)?;
            let (got, expected) = (outputs.sf.to_vec().map_err(text)?, cast.sf.to_vec().map_err(text)?);
            compare::equal("sf and per_token_cast", &name, &[got.len() as u64], &got, &expected)?;
        }
    }
    Ok(())
}

fn run(ctx: &Ctx) -> Result<Report, String> {
    let packed = Options::new(true, SfLayout::RowMajorPacked);
    for dtype in DTYPES {
        for (i, (shape, gaps, offset)) in small_shapes(dtype).into_iter().enumerate() {
            let options: Vec<Options> = (0..3)
                .map(|j| {
                    let (round, layout) = CONFIGS[(i + 2 * j) % 6];
                    Options {
                        offset: if j == 1 { offset } else { 0 },
                        all: j != 2,
                        pad: 4 * j as u64,
                        ..Options::new(round, layout)
                    }
                })
                .collect();
            check_problem(ctx, &Problem::new(dtype, &shape, PARTS[i % 4]), gaps, &options)?;
        }
        // All layouts with words that are not full, in two and three dimensions.
        let all: Vec<Options> = CONFIGS.iter().map(|(round, layout)| Options::new(*round, *layout)).collect();
        for shape in [&[9, 576][..], &[13, 160], &[2, 5, 192], &[3, 2, 1184]] {
            check_problem(ctx, &Problem::new(dtype, shape, PARTS[1]), Gaps::default(), &all)?;
        }
        for shape in [[20, 192], [11, 1024], [10, 51]] {
            check_problem(ctx, &Problem::new(dtype, &shape, (false, true, false)).awkward(), Gaps::default(), &all[..4])?;
            check_problem(ctx, &Problem::new(dtype, &shape, (true, false, false)).awkward(), Gaps::default(), &all[3..])?;
        }
        // A block a row, and no output but the scales' and `rstd`; the last shape is the longest that is held.
        let rstd: Vec<Options> = all.iter().map(|o| Options { no_bf16: true, ..*o }).collect();
        let even = Gaps { row: 8, batch: 0, offset: 8 };
        for (shape, gaps) in [([3, 1032], even), ([2, 1184], Gaps::default()), ([3, 2048], even), ([1, 16384], Gaps::default())] {
            for parts in [PARTS[0], PARTS[2]] {
                check_problem(ctx, &Problem::new(dtype, &shape, parts), gaps, &rstd)?;
            }
        }
        check_problem(ctx, &Problem::new(dtype, &[3, 2048], PARTS[2]).awkward(), Gaps::default(), &rstd)?;
        for (shape, block_m, layout) in [
            ([133, 128], 32, SfLayout::RowMajorPacked),
            ([70, 384], 64, SfLayout::ColMajorPacked),
            ([41, 1152], 16, SfLayout::RowMajor),
            ([300, 256], 192, SfLayout::ColMajor),
            ([5, 128], 1, SfLayout::RowMajorPacked),
        ] {
            let o = Options { mega_moe: Some(block_m), pad: 4, ..Options::new(true, layout) };
            check_problem(ctx, &Problem::new(dtype, &shape, PARTS[2]), Gaps::default(), &[o])?;
        }
        for shape in [&[0, 128][..], &[0, 3, 64], &[3, 0, 64]] {
            check_problem(ctx, &Problem::new(dtype, shape, PARTS[1]), Gaps::default(), &all)?;
        }
    }
    if ctx.depth == Depth::Full {
        let mega_moe = Options { mega_moe: Some(128), ..packed };
        for h in [128, 192, 768, 2048, 4096, 7168, 8192] {
            for dtype in DTYPES {
                let all: Vec<Options> = CONFIGS.iter().map(|(round, layout)| Options::new(*round, *layout)).collect();
                check_problem(ctx, &Problem::new(dtype, &[1, h], PARTS[1]), Gaps::default(), &all)?;
                check_problem(ctx, &Problem::new(dtype, &[512, h], PARTS[0]), Gaps::default(), &all)?;
                check_problem(ctx, &Problem::new(dtype, &[7, 73, h], PARTS[1]), Gaps::default(), &all)?;
                let rstd: Vec<Options> = all.iter().map(|o| Options { no_bf16: true, ..*o }).collect();
                check_problem(ctx, &Problem::new(dtype, &[2001, h], PARTS[2]), Gaps::default(), &rstd)?;
                let large = if h % 128 == 0 { [mega_moe, all[1], all[4]] } else { [packed, all[1], all[4]] };
                // The largest take seconds each, most of them for the reference.
                let large = if h == 192 || h == 7168 { &large[..] } else { &large[..1] };
                check_problem(ctx, &Problem::new(dtype, &[8001, h], PARTS[1]), Gaps::default(), large)?;
            }
        }
        check_problem(ctx, &Problem::new(DType::Bf16, &[501, 16384], PARTS[1]), Gaps::default(), &[mega_moe])?;
    }
    if !ctx.device.is_emulator() {
        check_graph(ctx)?;
    }
    let ops = ["norm_forward", "norm_forward_and_per_token_cast"];
    let notes = golden::check_cases(ctx, &ops, |golden, case| check_golden(ctx, golden, case))?;
    Ok(Report { notes, ..ctx.report() })
}

/// What the peers computed on a GPU. The norm may be off by one code, which may move a code or, at a power of two, a scale.
fn check_golden(ctx: &Ctx, golden: &Golden, case: &Case) -> Result<(), String> {
    let p = golden_problem(golden, case)?;
    let (layout, round) = case.sf_options()?;
    let o = Options::new(round, layout);
    let stream = ctx.device.stream().map_err(text)?;
    let inputs = Inputs::new(&ctx.device, &p, Gaps::default())?;
    let mut outputs = Outputs::new(&ctx.device, &p, o)?;
    outputs.launch(&stream, &p, &inputs, o).map_err(text)?;
    // The call was recorded alone or beside the norm.
    let key = |number: &str| if case.op == "norm_forward" { format!("out/cast.{number}") } else { format!("out/{number}") };
    let recorded = golden.tensor(case, &key("0.1"))?;
    let shape = sf_shape(p.shape[0], p.shape[1], (1, 32), layout);
    recorded.check_place(&p.name, &shape)?;
    let columns = p.hidden().div_ceil(32);
    // Exponents, group by group.
    let exponents = |words: &[u32]| -> Vec<u8> {
        if layout.is_packed() {
            words.chunks(columns.div_ceil(4)).flat_map(|row| bytemuck::cast_slice::<u32, u8>(row)[..columns].to_vec()).collect()
        } else {
            words.iter().map(|w| (w >> 23) as u8).collect()
        }
    };
    let all = outputs.sf.to_vec().map_err(text)?;
    let at = |m: u64, k: u64| all[(m * shape.strides[0] + k * shape.strides[1]) as usize];
    let ours: Vec<u32> = (0..shape.shape[0]).flat_map(|m| (0..shape.shape[1]).map(move |k| at(m, k))).collect();
    let (ours, theirs) = (exponents(&ours), exponents(&recorded.to_vec::<u32>()?));
    let moved: Vec<bool> = ours.iter().zip(&theirs).map(|(a, b)| a != b).collect();
    let count = moved.iter().filter(|m| **m).count();
    let near = ours.iter().zip(&theirs).all(|(a, b)| a.abs_diff(*b) <= 1);
    ensure(near && count * 200 <= ours.len(), || format!("sf: {count} scales differ; {}", p.name))?;
    let (codes, recorded) = (outputs.codes(&p, o)?, golden.tensor(case, &key("0.0"))?.bytes);
    let group = |i: usize| i / p.hidden() * columns + i % p.hidden() / 32;
    let differ: Vec<usize> = (0..codes.len()).filter(|i| codes[*i] != recorded[*i] && !moved[group(*i)]).collect();
    // Neighbouring codes have the same sign.
    let near = differ.iter().all(|i| codes[*i].abs_diff(recorded[*i]) == 1 && (codes[*i] ^ recorded[*i]) & 0x80 == 0);
    ensure(near && differ.len() * 100 <= codes.len(), || format!("out: {} codes differ; {}", differ.len(), p.name))
}

/// Recorded in a graph and replayed.
fn check_graph(ctx: &Ctx) -> Result<(), String> {
    let p = Problem::new(DType::Bf16, &[133, 640], PARTS[1]);
    let name = format!("kind=graph,{}", p.name);
    if !ctx.case(&name) {
        return Ok(());
    }
    let stream = ctx.device.stream().map_err(text)?;
    let inputs = Inputs::new(&ctx.device, &p, Gaps::default())?;
    let mut norm = NormOutputs::new(&ctx.device, &p, 0, true)?;
    norm.launch(&stream, &p, &inputs).map_err(text)?;
    let (rstd, values) = norm.check(&p)?;
    let o = Options { mega_moe: Some(64), ..Options::new(true, SfLayout::ColMajorPacked) };
    let mut outputs = Outputs::new(&ctx.device, &p, o)?;
    let graph = stream.capture(|s| outputs.launch(s, &p, &inputs, o)).map_err(text)?;
    for _ in 0..2 {
        outputs.fill()?;
        graph.launch(&stream).map_err(text)?;
        stream.synchronize().map_err(text)?;
        outputs.check(&p, o, &name, &values, &rstd)?;
    }
    Ok(())
}

// The benchmark.

/// The peers' case, other layouts and types, more outputs, and small inputs.
pub fn bench() -> Vec<Row> {
    let mut rows = Vec::new();
    let mut row = |dtype: DType, t: u64, h: u64, layout: SfLayout, residual: bool| {
        let sf = sf_shape(t, h, (1, 32), layout);
        let n = t * h;
        let sums = if residual { 2 * n * dtype.size() } else { 0 };
        let bytes = n * (dtype.size() + 1) + sums + 4 * sf.shape[0] * sf.shape[1] + h * dtype.size() + 4 * t;
        let input = if dtype == DType::Bf16 { "bf16" } else { "f32" };
        let mut case = format!("h={h},input={input},npc=32,");
        case += if residual { "residual=True," } else { "" };
        case += match layout {
            SfLayout::RowMajorPacked => "",
            SfLayout::ColMajorPacked => "sf=packed,",
            _ => "sf=row,",
        };
        case += &format!("t={t}");
        let build = move |device: &Device, _: &Stream| -> Result<Launch, String> {
            let (p, inputs) = bench_inputs(device, dtype, (t, h), residual)?;
            let o = Options::new(layout.is_packed(), layout);
            let mut outputs = Outputs::new(device, &p, o)?;
            outputs.out_bf16 = None;
            Ok(Box::new(move |stream| outputs.launch(stream, &p, &inputs, o)))
        };
        rows.push(Row { op: "norm_forward_and_per_token_cast", case, bytes, build: Box::new(build) });
    };
    let packed = SfLayout::RowMajorPacked;
    row(DType::Bf16, 8064, 7168, packed, false);
    row(DType::Bf16, 8064, 7168, SfLayout::ColMajorPacked, false);
    row(DType::Bf16, 8064, 7168, SfLayout::RowMajor, false);
    row(DType::Bf16, 8064, 7168, packed, true);
    row(DType::F32, 8064, 7168, packed, false);
    row(DType::Bf16, 8001, 4096, packed, false);
    row(DType::Bf16, 8001, 2048, packed, false);
    for t in [1, 16, 128] {
        row(DType::Bf16, t, 7168, packed, false);
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferrotile::{Error, TensorMut, TensorRef};
    use proptest::prelude::{ProptestConfig, any, proptest};

    #[test]
    fn suite() {
        SUITE.test();
    }

    #[test]
    fn the_reference_quantises() {
        let mut row = [0.0f32; 40];
        (row[0], row[1], row[32], row[33], row[34]) = (448.0, 0.3, -1.0, -0.0, f32::NAN);
        let (codes, scales) = quantise(&row, 40, true);
        assert_eq!((codes[0], codes[1], codes[32], codes[33], codes[34]), (0x7E, 0x2A, 0xF8, 0x80, 0x7F));
        assert_eq!(scales, [1.0, 1.0 / 256.0]);
        assert_eq!(quantise(&row, 40, false).1, [1.0, 1.0 / 448.0]);
        // The block of 64 tokens from token 64 on has rows of its own; its second 32 tokens stand between those of its first.
        assert_eq!((mega_moe_row(64, 64), mega_moe_row(65, 64), mega_moe_row(96, 64)), (128, 132, 129));
    }

    #[test]
    fn bad_arguments_are_refused() {
        let device = Device::emulator();
        let stream = device.stream().unwrap();
        let x = device.zeros::<f32>(1024).unwrap();
        let mut bytes = device.alloc::<u8>(8192).unwrap();
        let mut refused = |edit: &dyn Fn(&mut Args<'_>)| {
            bytes.fill_bytes(FILL).unwrap();
            let at = bytes.as_ptr();
            // SAFETY: refused calls touch nothing.
            let (x, out, sf) = unsafe {
                (
                    TensorRef::from_raw(&device, x.as_ptr(), DType::F32, &[4, 128], &[128, 1]).unwrap(),
                    TensorMut::from_raw(&device, at, DType::E4m3, &[4, 128], &[128, 1]).unwrap(),
                    TensorMut::from_raw(&device, at + 1024, DType::Ue8m0x4, &[4, 1], &[1, 1]).unwrap(),
                )
            };
            let mut args = Args {
                x,
                residual: None,
                weight: None,
                eps: 1e-6,
                out_scale: 1.0,
                round_sf: true,
                out,
                sf: SfMut { tensor: sf, layout: SfLayout::RowMajorPacked },
                mega_moe_sf: None,
                out_bf16: None,
                residual_out: None,
                rstd: None,
            };
            edit(&mut args);
            let error = op::norm_forward_and_per_token_cast(&stream, args).expect_err("this call must be refused");
            assert!(error.to_string().starts_with("norm_forward_and_per_token_cast: "), "{error}");
            assert!(bytes.to_vec().unwrap().iter().all(|b| *b == FILL), "{error}");
            error
        };
        let (x0, at) = (x.as_ptr(), 0u64);
        let _ = at;
        macro_rules! refused {
            (|$a:ident| $edit:expr, $pattern:pat) => {{
                let error = refused(&|$a: &mut Args<'_>| $edit);
                assert!(matches!(error, $pattern), "{error:?}");
            }};
        }
        // SAFETY: as above.
        let read =
            |dtype, shape: &[u64], strides: &[u64]| unsafe { TensorRef::from_raw(&device, x0, dtype, shape, strides).unwrap() };
        let write = |ptr: u64, dtype, shape: &[u64], strides: &[u64]| unsafe {
            TensorMut::from_raw(&device, ptr, dtype, shape, strides).unwrap()
        };
        let packed = DType::Ue8m0x4;
        refused!(|a| a.x = read(DType::F32, &[512], &[1]), Error::Shape { arg: "x", .. });
        refused!(|a| a.eps = -1.0, Error::Value { arg: "eps", .. });
        refused!(
            |a| a.residual_out = Some(write(a.out.ptr() + 2048, DType::F32, &[4, 128], &[128, 1])),
            Error::Value { arg: "residual_out", .. }
        );
        refused!(|a| a.out = write(a.out.ptr(), DType::U8, &[4, 128], &[128, 1]), Error::DType { arg: "out", .. });
        refused!(|a| a.out = write(a.out.ptr(), DType::E4m3, &[4, 64], &[64, 1]), Error::Shape { arg: "out", .. });
        refused!(|a| a.out = write(a.out.ptr(), DType::E4m3, &[4, 128], &[129, 1]), Error::Layout { arg: "out", .. });
        let other = |a: &Args<'_>, dtype, shape: &[u64], strides: &[u64]| Some(write(a.out.ptr() + 4096, dtype, shape, strides));
        refused!(|a| a.out_bf16 = other(a, DType::F32, &[4, 128], &[128, 1]), Error::DType { arg: "out_bf16", .. });
        refused!(|a| a.out_bf16 = other(a, DType::Bf16, &[4, 64], &[64, 1]), Error::Shape { arg: "out_bf16", .. });
        refused!(|a| a.out_bf16 = other(a, DType::Bf16, &[4, 128], &[129, 1]), Error::Layout { arg: "out_bf16", .. });
        refused!(|a| a.rstd = other(a, DType::F32, &[5], &[1]), Error::Shape { arg: "rstd", .. });
        refused!(|a| a.round_sf = false, Error::Value { arg: "round_sf", .. });
        refused!(|a| a.sf.layout = SfLayout::RowMajor, Error::DType { arg: "sf", .. });
        refused!(|a| a.sf.layout = SfLayout::PerChannelPacked, Error::Layout { arg: "sf", .. });
        refused!(|a| a.sf.tensor = write(a.sf.tensor.ptr(), packed, &[4, 2], &[2, 1]), Error::Shape { arg: "sf", .. });
        // Scales of three dimensions: rank, batches, distance of batches, their alignment.
        let three = |a: &mut Args<'_>, layout: SfLayout, shape: &[u64], strides: &[u64]| {
            a.x = read(DType::F32, &[2, 2, 128], &[256, 128, 1]);
            a.out = write(a.out.ptr(), DType::E4m3, &[2, 2, 128], &[256, 128, 1]);
            a.sf = SfMut { tensor: write(a.sf.tensor.ptr(), layout.dtype(), shape, strides), layout };
        };
        let (rows, columns) = (SfLayout::RowMajorPacked, SfLayout::ColMajorPacked);
        refused!(|a| three(a, rows, &[4, 1], &[1, 1]), Error::Shape { arg: "sf", .. });
        refused!(|a| three(a, rows, &[3, 2, 1], &[2, 1, 1]), Error::Shape { arg: "sf", .. });
        refused!(|a| three(a, rows, &[2, 2, 2], &[4, 2, 1]), Error::Shape { arg: "sf", .. });
        refused!(|a| three(a, rows, &[2, 2, 1], &[1, 1, 1]), Error::Layout { arg: "sf", .. });
        refused!(|a| three(a, columns, &[2, 2, 1], &[6, 1, 4]), Error::Layout { arg: "sf", .. });
        // Mega-MoE scales.
        let mega = |a: &mut Args<'_>, dtype, shape: &[u64], strides: &[u64], block_m| {
            a.mega_moe_sf = Some(MegaMoeSf { tensor: write(a.out.ptr() + 4096, dtype, shape, strides), block_m });
        };
        refused!(|a| mega(a, DType::F32, &[128, 1], &[1, 128], 64), Error::DType { arg: "mega_moe_sf", .. });
        refused!(|a| mega(a, packed, &[127, 1], &[1, 128], 64), Error::Shape { arg: "mega_moe_sf", .. });
        refused!(|a| mega(a, packed, &[128, 2], &[1, 128], 64), Error::Shape { arg: "mega_moe_sf", .. });
        refused!(|a| mega(a, packed, &[128], &[1], 64), Error::Shape { arg: "mega_moe_sf", .. });
        refused!(|a| mega(a, packed, &[128, 1], &[2, 1], 64), Error::Layout { arg: "mega_moe_sf", .. });
        refused!(|a| mega(a, packed, &[128, 1], &[1, 128], 0), Error::Value { arg: "mega_moe_sf.block_m", .. });
        refused!(
            |a| {
                mega(a, packed, &[128, 1], &[1, 128], 64);
                a.sf = SfMut { tensor: write(a.sf.tensor.ptr(), DType::F32, &[4, 4], &[4, 1]), layout: SfLayout::RowMajor };
                a.round_sf = false;
            },
            Error::Value { arg: "round_sf", .. }
        );
        refused!(
            |a| {
                three(a, rows, &[2, 2, 1], &[2, 1, 1]);
                mega(a, packed, &[128, 1], &[1, 128], 64);
            },
            Error::Value { arg: "mega_moe_sf", .. }
        );
        refused!(
            |a| {
                a.x = read(DType::F32, &[4, 96], &[96, 1]);
                a.out = write(a.out.ptr(), DType::E4m3, &[4, 96], &[96, 1]);
                mega(a, packed, &[128, 1], &[1, 128], 64);
            },
            Error::Value { arg: "hidden with mega-MoE scales", .. }
        );
        // Memory.
        refused!(|a| a.sf.tensor = write(a.out.ptr() + 496, packed, &[4, 1], &[1, 1]), Error::Overlap { a: "out", b: "sf", .. });
        refused!(|a| a.out = write(x0, DType::E4m3, &[4, 128], &[128, 1]), Error::Overlap { a: "x", b: "out", .. });
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

        /// Any shape, distance of rows, alignment and option.
        #[test]
        fn any_norm(
            b in 1u64..3, t in 0u64..7, h in 1u64..700, row in 0u64..9, offset in 0u64..9, out_offset in 0u64..9, pad in 0u64..3,
            three in any::<bool>(), f32_input in any::<bool>(), parts in 0usize..4, awkward in any::<bool>(), config in 0usize..6,
            all in any::<bool>(),
        ) {
            let shape = if three { vec![b, t, h] } else { vec![t, h] };
            let p = Problem::new(DTYPES[f32_input as usize], &shape, PARTS[parts]);
            let p = if awkward { p.awkward() } else { p };
            let (round, layout) = CONFIGS[config];
            let o = Options { offset: out_offset, pad: 4 * pad, all, ..Options::new(round, layout) };
            let ctx = Ctx::new(Device::emulator().checked(), Depth::Small);
            check_problem(&ctx, &p, Gaps { row, batch: row, offset }, &[o]).unwrap();
        }
    }
}
