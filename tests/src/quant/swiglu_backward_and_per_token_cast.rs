//! Reference, cases, checks and benchmark rows of `swiglu_backward_and_per_token_cast`.

use super::swiglu_backward::{
    Expected, FILL, Floats, GUARD, Layout, Options, Problem, Routing, RowsBy, WeightsBy, awkward, check_weight_grad,
    golden_problem, matches_golden, matches_golden_weight_grad, moe_cases, near, nothing_here, plain_layout, small_layout,
};
use crate::support::bench::{Launch, Row};
use crate::support::cases::{Depth, MoeCase, rows_apart};
use crate::support::compare;
use crate::support::golden::{self, Case, Golden};
use crate::support::inputs;
use crate::support::rng::Rng;
use crate::support::suite::{Ctx, Report, Suite, ensure, text};
use ferrotile::quant::swiglu_backward_and_per_token_cast::{self as op, Args};
use ferrotile::quant::{ExpertRows, RowWeights, Sf, SfLayout, SfMut, SfShape, sf_shape};
use ferrotile::{Buffer, DType, Device, E4m3, Stream, Ue8m0x4};
use half::bf16;
use rayon::prelude::*;

/// What the `check` binary runs.
pub const SUITE: Suite = Suite { op: "swiglu_backward_and_per_token_cast", run };

// The reference.

/// Values in groups of `npc`: codes, and scales `(rows, columns / npc)`.
#[derive(Default)]
struct Quantised {
    codes: Vec<u8>,
    sf: Vec<f32>,
}

/// The cast of `(1, npc)` groups (quant.md 2); rows that hold no token get scales of 0.
fn quantise(values: &[f32], columns: usize, npc: usize, round: bool, holds_token: impl Fn(usize) -> bool + Sync) -> Quantised {
    let mut q = Quantised { codes: vec![0; values.len()], sf: vec![0.0; values.len() / npc] };
    let groups = q.codes.par_chunks_mut(npc).zip(q.sf.par_iter_mut()).zip(values.par_chunks(npc)).enumerate();
    groups.for_each(|(i, ((codes, sf), values))| {
        if !holds_token(i / (columns / npc)) {
            return;
        }
        // `>` is false for NaN.
        let amax = values.iter().fold(0f32, |max, v| if v.abs() > max { v.abs() } else { max }).min(f32::MAX);
        let c = if amax > 1e-4 { amax } else { 1e-4 };
        let mut inverse = 448.0 / c;
        *sf = c / 448.0;
        if round {
            let exact = *sf as f64;
            let exponent = (-30..128).find(|e| 2f64.powi(*e) >= exact).unwrap_or(127);
            (*sf, inverse) = (2f64.powi(exponent) as f32, 2f64.powi(-exponent) as f32);
        }
        for (code, v) in codes.iter_mut().zip(values) {
            *code = if v.is_nan() { 0x7F } else { E4m3::from_f32(v * inverse).0 };
        }
    });
    q
}

/// What codes stand for.
fn dequantised(q: &Quantised, npc: usize) -> Vec<f32> {
    (0..q.codes.len()).into_par_iter().map(|i| E4m3(q.codes[i]).to_f32() * q.sf[i / npc]).collect()
}

/// Words of the scale tensor, contiguous: f32 bits, or four exponents with zeros for groups that do not exist.
fn sf_words(sf: &[f32], columns: usize, layout: SfLayout) -> Vec<u32> {
    if !layout.is_packed() {
        return sf.iter().map(|v| v.to_bits()).collect();
    }
    let word = |four: &[f32]| four.iter().rev().fold(0, |word, v| word << 8 | v.to_bits() >> 23);
    sf.chunks(columns.max(1)).flat_map(|row| row.chunks(4).map(word)).collect()
}

// Running.

/// Inputs on the device.
struct Inputs {
    hidden: u64,
    npc: u64,
    x: Buffer<u8>,
    x_sf: Buffer<f32>,
    grad: Floats,
    /// Elements from one row to the next beyond what a row has, and before the first.
    apart: (u64, u64),
    routing: Routing,
}

impl Inputs {
    fn new(device: &Device, problem: &Problem, x: &Quantised, npc: u64, dtype: DType, apart: (u64, u64)) -> Result<Self, String> {
        let h = problem.hidden as u64;
        let groups = 2 * h / npc;
        Ok(Self {
            hidden: h,
            npc,
            x: device.upload(&rows_apart(&x.codes, 2 * h, (2 * h + apart.0, apart.1), 0x7E)).map_err(text)?,
            x_sf: device.upload(&rows_apart(&x.sf, groups, (groups + apart.0, apart.1), 1e30)).map_err(text)?,
            grad: Floats::upload(device, dtype, &problem.grad, h, (h + apart.0, apart.1))?,
            apart,
            routing: Routing::new(device, problem)?,
        })
    }

    fn rows(&self) -> u64 {
        self.routing.num_rows()
    }
}

/// Output buffers.
struct Outputs {
    layout: SfLayout,
    sf_shape: SfShape,
    x_grad: Floats,
    fp8: Buffer<u8>,
    sf: Buffer<u32>,
    act_out: Floats,
    weight_grad: Buffer<f32>,
    num_weights: usize,
}

impl Outputs {
    fn new(device: &Device, inputs: &Inputs, options: &Options, layout: SfLayout) -> Result<Self, String> {
        let values = (inputs.rows() * inputs.hidden) as usize;
        let num_weights = if options.weight_grad { inputs.routing.num_weights(options.weights) } else { 0 };
        let sf_shape = sf_shape(inputs.rows(), 2 * inputs.hidden, (1, inputs.npc as u32), layout);
        let mut new = Self {
            layout,
            x_grad: Floats::output(device, DType::Bf16, 2 * values)?,
            fp8: device.alloc(2 * values + GUARD).map_err(text)?,
            sf: device.alloc(sf_shape.elements as usize + GUARD).map_err(text)?,
            sf_shape,
            act_out: Floats::output(device, DType::Bf16, values)?,
            weight_grad: device.alloc(num_weights + GUARD).map_err(text)?,
            num_weights,
        };
        new.fill()?;
        Ok(new)
    }

    fn fill(&mut self) -> Result<(), String> {
        self.x_grad.fill()?;
        self.act_out.fill()?;
        self.fp8.fill_bytes(FILL).map_err(text)?;
        self.sf.fill_bytes(FILL).map_err(text)?;
        self.weight_grad.fill_bytes(FILL).map_err(text)
    }

    fn run(&mut self, stream: &Stream, inputs: &Inputs, options: &Options, round_sf: bool) -> ferrotile::Result<()> {
        let (p, h) = (inputs.rows(), inputs.hidden);
        let groups = 2 * h / inputs.npc;
        let (gap, offset) = inputs.apart;
        let SfShape { shape, strides, dtype, .. } = &self.sf_shape;
        op::swiglu_backward_and_per_token_cast(
            stream,
            Args {
                x: inputs.x.strided(&[p, 2 * h], &[2 * h + gap, 1], offset)?.reinterpret(DType::E4m3)?,
                x_sf: Sf { tensor: inputs.x_sf.strided(&[p, groups], &[groups + gap, 1], offset)?, layout: SfLayout::RowMajor },
                npc: inputs.npc as u32,
                act_x_grad: inputs.grad.tensor(&[p, h], &[h + gap, 1], offset)?,
                rows: inputs.routing.rows(options.rows)?,
                weights: inputs.routing.weights(options.weights)?,
                clamp_value: options.clamp,
                round_sf,
                x_grad: self.x_grad.tensor_mut(&[p, 2 * h])?,
                x_grad_fp8: self.fp8.tensor_mut(&[p, 2 * h])?.reinterpret(DType::E4m3)?,
                x_grad_sf: SfMut { tensor: self.sf.strided_mut(shape, strides, 0)?.reinterpret(*dtype)?, layout: self.layout },
                weight_grad: inputs.routing.weight_grad(options, &mut self.weight_grad)?,
                act_out: if options.act_out { Some(self.act_out.tensor_mut(&[p, h])?) } else { None },
            },
        )
    }

    fn check(&self, name: &str, inputs: &Inputs, options: &Options, expected: &Expected, fp8: &Quantised) -> Result<(), String> {
        let (p, h) = (inputs.rows(), inputs.hidden);
        self.x_grad.check("x_grad", name, &[p, 2 * h], &expected.x_grad)?;
        if options.act_out {
            self.act_out.check("act_out", name, &[p, h], &expected.act_out)?;
        } else {
            self.act_out.check("act_out", name, &[0], &[])?;
        }
        check_weight_grad(name, &self.weight_grad, self.num_weights, expected)?;
        self.check_fp8(name, inputs, fp8)
    }

    fn check_fp8(&self, name: &str, inputs: &Inputs, expected: &Quantised) -> Result<(), String> {
        let columns = (2 * inputs.hidden / inputs.npc) as usize;
        let SfShape { shape, strides, .. } = &self.sf_shape;
        let sf = self.sf.to_vec().map_err(text)?;
        let words = sf_words(&expected.sf, columns, self.layout);
        if self.layout.is_packed() {
            let (got, words) = (bytemuck::cast_slice(&sf), bytemuck::cast_slice(&words));
            compare::equal_strided::<Ue8m0x4>("sf", name, shape, strides, got, words)?;
        } else {
            let (got, words) = (bytemuck::cast_slice(&sf), bytemuck::cast_slice(&words));
            compare::equal_strided::<f32>("sf", name, shape, strides, got, words)?;
        }
        compare::untouched("sf", name, shape, strides, &sf, FILL)?;
        let all = self.fp8.to_vec().map_err(text)?;
        let (got, guard) = all.split_at(all.len() - GUARD);
        ensure(guard.iter().all(|b| *b == FILL), || format!("fp8: bytes behind the tensor were written; {name}"))?;
        let shape = [inputs.rows(), 2 * inputs.hidden];
        compare::equal::<E4m3>("fp8", name, &shape, bytemuck::cast_slice(got), bytemuck::cast_slice(&expected.codes))
    }

    /// What data and scales say, read as row-major f32 scales.
    fn dequantised(&self, inputs: &Inputs) -> Result<Vec<f32>, String> {
        let (mut codes, sf) = (self.fp8.to_vec().map_err(text)?, self.sf.to_vec().map_err(text)?);
        codes.truncate(codes.len() - GUARD);
        Ok(dequantised(&Quantised { codes, sf: sf.iter().map(|v| f32::from_bits(*v)).collect() }, inputs.npc as usize))
    }

    /// All bytes of the outputs, as words.
    fn bytes(&self) -> Result<Vec<u32>, String> {
        let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits);
        let mut all: Vec<u32> = bits(self.x_grad.values()?).chain(bits(self.act_out.values()?)).collect();
        all.extend(self.fp8.to_vec().map_err(text)?.iter().map(|b| *b as u32));
        all.extend(self.sf.to_vec().map_err(text)?);
        all.extend(bits(self.weight_grad.to_vec().map_err(text)?));
        Ok(all)
    }
}

// Cases.

const ROUNDED: [SfLayout; 4] = [SfLayout::RowMajor, SfLayout::ColMajorPacked, SfLayout::ColMajor, SfLayout::RowMajorPacked];
const PLAIN: [SfLayout; 2] = [SfLayout::RowMajor, SfLayout::ColMajor];

/// Whether scales are rounded, and where they lie: all that is possible, one after the other.
fn scales(n: usize) -> (bool, SfLayout) {
    let round = !n.is_multiple_of(3);
    (round, if round { ROUNDED[n % 4] } else { PLAIN[n % 2] })
}

/// Quantised input, and the problem that it stands for.
fn problem(layout: Layout, hidden: u64, npc: u64, dtype: DType, kind: &str, name: &str) -> (Problem, Quantised) {
    let len = (layout.rows() * hidden) as usize;
    let make = |len, name: &str| match kind {
        "awkward" => awkward(len, name),
        _ => Rng::named(name).normal_f32(len),
    };
    let x = if len == 0 {
        Quantised::default()
    } else {
        quantise(&make(2 * len, name), 2 * hidden as usize, npc as usize, false, |_| true)
    };
    let mut grad = make(len, &format!("{name} grad"));
    for (i, v) in grad.iter_mut().enumerate() {
        if kind == "awkward" && i % 977 == 11 {
            // Its products overflow.
            *v = 3e38;
        }
        if dtype == DType::Bf16 {
            *v = bf16::from_f32(*v).to_f32();
        }
    }
    (Problem::new(layout, hidden, dequantised(&x, npc as usize), grad, name), x)
}

/// All options on one problem; for each, one way to write scales, or all of them.
fn check_problem(
    ctx: &Ctx,
    (problem, x): &(Problem, Quantised),
    (npc, dtype): (u64, DType),
    apart: (u64, u64),
    all: &[Options],
    kind: &str,
) -> Result<(), String> {
    let inputs = Inputs::new(&ctx.device, problem, x, npc, dtype, apart)?;
    let stream = ctx.device.stream().map_err(text)?;
    let exps = problem.exps(&ctx.device)?;
    let (h, t) = (inputs.hidden, inputs.rows());
    for (i, options) in all.iter().enumerate() {
        let expected = problem.expected(options, &exps)?;
        // Both kinds of scales where the specification's grid has them.
        let kinds = if ctx.depth == Depth::Full && kind == "normal" { vec![3, 4 + i] } else { vec![i] };
        for (round, layout) in kinds.into_iter().map(scales) {
            let name = format!("h={h},input={dtype},kind={kind},npc={npc},round_sf={round},sf={layout},t={t},{}", options.name());
            if !ctx.case(&name) {
                continue;
            }
            let fp8 = if expected.x_grad.is_empty() {
                Quantised::default()
            } else {
                quantise(&expected.x_grad, 2 * h as usize, npc as usize, round, |row| expected.holds_token[row])
            };
            let mut outputs = Outputs::new(&ctx.device, &inputs, options, layout)?;
            outputs.run(&stream, &inputs, options, round).map_err(text)?;
            outputs.check(&name, &inputs, options, &expected, &fp8)?;
            if i == 0 {
                // Once more, over its own results: the same bytes, sums included.
                let before = outputs.bytes()?;
                outputs.run(&stream, &inputs, options, round).map_err(text)?;
                ensure(before == outputs.bytes()?, || format!("two runs differ; {name}"))?;
            }
        }
    }
    Ok(())
}

fn run(ctx: &Ctx) -> Result<Report, String> {
    let some = [Options::v1(None), Options::v2(Some(0.5))];
    for (npc, dtype) in [(32, DType::Bf16), (128, DType::Bf16), (32, DType::F32), (128, DType::F32)] {
        let make = |layout, hidden, kind: &str| {
            problem(layout, hidden, npc, dtype, kind, &format!("swiglu_backward cast {npc} {dtype} {hidden} {kind}"))
        };
        let (what, plain) = ((npc, dtype), (0, 0));
        // Packed words that are not full, whole warps and not, rows apart, more than a block's share of channels; nothing at all, which
        // leaves gradients to clear.
        check_problem(ctx, &make(small_layout(7, 8), 3 * npc, "awkward"), what, plain, &Options::all(), "awkward")?;
        check_problem(ctx, &make(small_layout(5, 3), 2 * npc, "normal, apart"), what, (24, 8), &some, "normal, apart")?;
        check_problem(ctx, &make(small_layout(2, 1), 2048 + npc, "normal, long"), what, plain, &some, "normal, long")?;
        check_problem(ctx, &make(nothing_here(), npc, "empty"), what, plain, &some, "empty")?;
        check_problem(ctx, &make(small_layout(3, 4), 0, "empty"), what, plain, &some, "empty")?;
        if ctx.depth == Depth::Small {
            continue;
        }
        let clamps = [None, Some(10.0), Some(0.5)];
        let v1 = clamps.map(Options::v1);
        let v2 = clamps.map(Options::v2);
        // The grid of 1.0.0 with fewer tokens: each MoE shape with two hidden sizes, each hidden size with four MoE shapes. f32 gradients
        // are none of its own.
        let hiddens = [2048, 2560, 3072, 4096, 6144, 7168];
        for (i, case) in moe_cases().iter().enumerate() {
            for j in 0..if dtype == DType::Bf16 { 2 } else { 1 } {
                let h = hiddens[(i + 3 * j) % 6];
                check_problem(ctx, &make(Layout::new(case, npc as u32), h, "normal"), what, plain, &v1, "normal")?;
            }
            if i % 3 == 0 {
                let h = hiddens[i / 2 % 6];
                check_problem(ctx, &make(Layout::new(case, 128), h, "normal"), what, plain, &v2, "normal")?;
            }
        }
        check_problem(ctx, &make(small_layout(1200, 16), 2048, "awkward"), what, plain, &Options::all(), "awkward")?;
    }
    if !ctx.device.is_emulator() {
        check_graph(ctx)?;
        if ctx.depth == Depth::Full {
            check_backends(ctx)?;
            check_large(ctx)?;
        }
    }
    let notes = golden::check_cases(ctx, &[SUITE.op], |golden, case| check_golden(ctx, golden, case))?;
    Ok(Report { notes, ..ctx.report() })
}

/// Recorded in a graph and replayed.
fn check_graph(ctx: &Ctx) -> Result<(), String> {
    let name = "kind=graph,h=640,npc=128";
    if !ctx.case(name) {
        return Ok(());
    }
    let (problem, x) = problem(small_layout(21, 16), 640, 128, DType::Bf16, "normal", name);
    let inputs = Inputs::new(&ctx.device, &problem, &x, 128, DType::Bf16, (0, 0))?;
    let options = Options::v1(Some(0.5));
    let expected = problem.expected(&options, &problem.exps(&ctx.device)?)?;
    let fp8 = quantise(&expected.x_grad, 1280, 128, true, |_| true);
    let mut outputs = Outputs::new(&ctx.device, &inputs, &options, SfLayout::ColMajorPacked)?;
    let stream = ctx.device.stream().map_err(text)?;
    let graph = stream.capture(|s| outputs.run(s, &inputs, &options, true)).map_err(text)?;
    for replay in 0..2 {
        outputs.fill()?;
        graph.launch(&stream).map_err(text)?;
        stream.synchronize().map_err(text)?;
        outputs.check(&format!("{name},replay={replay}"), &inputs, &options, &expected, &fp8)?;
    }
    Ok(())
}

/// Two sides whose `exp` differs in a last bit: one code of the quantised values, which is an eighth of them or the smallest.
fn near_quantised(name: &str, a: &[f32], b: &[f32], sf: &[f32], npc: usize) -> Result<(), String> {
    let near = |i: usize| (a[i] - b[i]).abs() <= (b[i].abs() / 8.0).max(sf[i / npc] * 2f32.powi(-9)) * 1.01;
    let far = (0..b.len()).find(|i| !near(*i));
    match far {
        Some(i) => Err(format!("fp8: {i}: {:e} and {:e}; {name}", a[i], b[i])),
        None => Ok(()),
    }
}

/// The emulator and the GPU.
fn check_backends(ctx: &Ctx) -> Result<(), String> {
    let name = "kind=both backends,h=640,npc=128";
    if !ctx.case(name) {
        return Ok(());
    }
    let (problem, x) = problem(small_layout(21, 16), 640, 128, DType::Bf16, "normal", name);
    let options = Options::v2(Some(1.5));
    let mut results = Vec::new();
    for device in [ctx.device, Device::emulator()] {
        let inputs = Inputs::new(&device, &problem, &x, 128, DType::Bf16, (0, 0))?;
        let mut outputs = Outputs::new(&device, &inputs, &options, SfLayout::RowMajor)?;
        outputs.run(&device.stream().map_err(text)?, &inputs, &options, true).map_err(text)?;
        let sf: Vec<f32> = outputs.sf.to_vec().map_err(text)?.iter().map(|v| f32::from_bits(*v)).collect();
        results.push((outputs.x_grad.values()?, outputs.act_out.values()?, outputs.dequantised(&inputs)?, sf));
    }
    let (a, b) = (&results[0], &results[1]);
    near("x_grad", name, &a.0, &b.0)?;
    near("act_out", name, &a.1, &b.1)?;
    near_quantised(name, &a.2, &b.2, &b.3, 128)
}

/// More than 2^31 output elements. All rows are one row in memory (stride 0), so every row of the output must be the same.
fn check_large(ctx: &Ctx) -> Result<(), String> {
    let (p, h, npc) = (150_016u64, 7168u64, 128u64);
    let name = "kind=large,h=7168,npc=128,t=150016";
    if !ctx.case(name) {
        return Ok(());
    }
    let groups = 2 * h / npc;
    let (problem, x) = problem(plain_layout(1), h, npc, DType::Bf16, "normal", name);
    let options = Options { rows: RowsBy::All, weights: WeightsBy::None, clamp: None, weight_grad: false, act_out: false };
    let expected = problem.expected(&options, &problem.exps(&ctx.device)?)?;
    let fp8 = quantise(&expected.x_grad, 2 * h as usize, npc as usize, true, |_| true);
    let (device, stream) = (&ctx.device, ctx.device.stream().map_err(text)?);
    let codes = device.upload(&x.codes).map_err(text)?;
    let x_sf: Vec<f32> = x.sf.iter().copied().cycle().take((p * groups) as usize).collect();
    let x_sf = device.upload(&x_sf).map_err(text)?;
    let grad = Floats::upload(device, DType::Bf16, &problem.grad, h, (h, 0))?;
    let mut x_grad = device.alloc::<bf16>((p * 2 * h) as usize).map_err(text)?;
    let mut data = device.alloc::<u8>((p * 2 * h) as usize).map_err(text)?;
    let mut sf = device.alloc::<f32>((p * groups) as usize).map_err(text)?;
    let mut launch = || {
        let args = Args {
            x: codes.strided(&[p, 2 * h], &[0, 1], 0)?.reinterpret(DType::E4m3)?,
            x_sf: Sf { tensor: x_sf.tensor(&[p, groups])?, layout: SfLayout::RowMajor },
            npc: npc as u32,
            act_x_grad: grad.tensor(&[p, h], &[0, 1], 0)?,
            rows: ExpertRows::All,
            weights: RowWeights::None,
            clamp_value: None,
            round_sf: true,
            x_grad: x_grad.tensor_mut(&[p, 2 * h])?,
            x_grad_fp8: data.tensor_mut(&[p, 2 * h])?.reinterpret(DType::E4m3)?,
            x_grad_sf: SfMut { tensor: sf.tensor_mut(&[p, groups])?, layout: SfLayout::RowMajor },
            weight_grad: None,
            act_out: None,
        };
        op::swiglu_backward_and_per_token_cast(&stream, args)
    };
    launch().map_err(text)?;
    stream.synchronize().map_err(text)?;
    // Rows from everywhere.
    let expected: Vec<bf16> = expected.x_grad.iter().map(|v| bf16::from_f32(*v)).collect();
    for row in (0..p).step_by(4999).chain([p - 1]) {
        let name = format!("{name},row={row}");
        let shape = [2 * h];
        let mut one = device.alloc::<bf16>(2 * h as usize).map_err(text)?;
        let from = x_grad.strided(&shape, &[1], row * 2 * h).map_err(text)?;
        stream.copy(&mut one.tensor_mut(&shape).map_err(text)?, &from).map_err(text)?;
        compare::equal("x_grad", &name, &shape, &one.to_vec().map_err(text)?, &expected)?;
        let mut one = device.alloc::<u8>(2 * h as usize).map_err(text)?;
        let from = data.strided(&shape, &[1], row * 2 * h).map_err(text)?;
        stream.copy(&mut one.tensor_mut(&shape).map_err(text)?, &from).map_err(text)?;
        compare::equal("fp8", &name, &shape, &one.to_vec().map_err(text)?, &fp8.codes)?;
    }
    let sf = sf.to_vec().map_err(text)?;
    let bad = sf.par_chunks_exact(groups as usize).position_any(|row| row != fp8.sf);
    ensure(bad.is_none(), || format!("sf: row {bad:?} differs; {name}"))
}

// Golden data.

fn check_golden(ctx: &Ctx, golden: &Golden, case: &Case) -> Result<(), String> {
    let name = case.name();
    let npc: u64 = case.param("num_per_channels")?;
    let v1 = golden.keys(case).iter().any(|key| key == "in/token_topk_to_pos");
    let key = if v1 { "in/grad_out" } else { "in/act_x_grad" };
    let hidden = golden.tensor(case, key)?.shape[1];
    let x = Quantised { codes: golden.tensor(case, "in/x.0")?.to_vec()?, sf: golden.tensor(case, "in/x.1")?.to_vec()? };
    let (problem, options) =
        golden_problem(golden, case, hidden, dequantised(&x, npc as usize), golden.tensor(case, key)?.floats()?)?;
    let inputs = Inputs::new(&ctx.device, &problem, &x, npc, DType::Bf16, (0, 0))?;
    let mut outputs = Outputs::new(&ctx.device, &inputs, &options, SfLayout::RowMajor)?;
    let round = case.param("round_sf")?;
    outputs.run(&ctx.device.stream().map_err(text)?, &inputs, &options, round).map_err(text)?;
    let [x_grad, act_out] = if v1 { ["out/2", "out/0"] } else { ["out/0", "out/3"] };
    matches_golden(ctx, "x_grad", &name, &outputs.x_grad.values()?, &golden.tensor(case, x_grad)?.floats()?)?;
    let recorded = golden.tensor(case, act_out)?.floats()?;
    if v1 {
        matches_golden(ctx, "act_out", &name, &outputs.act_out.values()?, &recorded)?;
    } else {
        // Not bit for bit: the release's division may be off.
        near("act_out", &name, &outputs.act_out.values()?, &recorded)?;
    }
    let weight_grad = outputs.weight_grad.to_vec().map_err(text)?;
    let weight_grad = &weight_grad[..outputs.num_weights];
    matches_golden_weight_grad(&name, weight_grad, golden, case, if v1 { "out/3" } else { "out/2" })?;
    let fp8 = Quantised { codes: golden.tensor(case, "out/1.0")?.to_vec()?, sf: golden.tensor(case, "out/1.1")?.to_vec()? };
    if ctx.device.is_emulator() {
        let values = dequantised(&fp8, npc as usize);
        near_quantised(&name, &outputs.dequantised(&inputs)?, &values, &fp8.sf, npc as usize)?;
    } else {
        outputs.check_fp8(&name, &inputs, &fp8)?;
    }
    Ok(())
}

// The benchmark.

/// Rows of a benchmark: plain ones, or what rank 0 receives with experts from multiples of a number on.
#[derive(Clone, Copy)]
enum Tokens {
    Plain(u64),
    Moe(MoeCase, u32),
}

impl Tokens {
    fn layout(self) -> Layout {
        match self {
            Tokens::Plain(t) => plain_layout(t),
            Tokens::Moe(case, alignment) => Layout::new(&case, alignment),
        }
    }
}

fn row(case: String, tokens: Tokens, (h, npc): (u64, u64), options: Options) -> Row {
    let (rows, slots) = {
        let layout = tokens.layout();
        (layout.rows(), layout.token_topk_to_pos.len() as u64)
    };
    let weights = match options.weights {
        WeightsBy::None => 0,
        WeightsBy::PerRow(_) => 8 * rows,
        WeightsBy::PerTokenTopk => 12 * slots + 4 * rows,
    };
    let bytes = rows * (12 * h + 16 * h / npc) + weights;
    let build = move |device: &Device, _: &Stream| -> Result<Launch, String> {
        let name = "swiglu_backward_and_per_token_cast benchmark";
        let problem = Problem::new(tokens.layout(), h, Vec::new(), Vec::new(), name);
        let inputs = Inputs {
            hidden: h,
            npc,
            x: inputs::codes_e4m3(device, 0, rows * 2 * h)?,
            x_sf: inputs::constant(device, 2f32.powi(-7), rows * 2 * h / npc)?,
            grad: Floats::normal(device, DType::Bf16, 1, rows * h)?,
            apart: (0, 0),
            routing: Routing::new(device, &problem)?,
        };
        let mut outputs = Outputs::new(device, &inputs, &options, SfLayout::RowMajor)?;
        Ok(Box::new(move |stream| outputs.run(stream, &inputs, &options, true)))
    };
    Row { op: SUITE.op, case, bytes, build: Box::new(build) }
}

/// The cases of 2.1.0, those of 1.0.0's own benchmark, and small inputs.
pub fn bench() -> Vec<Row> {
    let mut rows = Vec::new();
    let with = |clamp: Option<f32>| clamp.map_or(String::new(), |clamp| format!("clamp={clamp},"));
    let mut plain = |t: u64, h: u64, npc: u64, clamp: Option<f32>| {
        let options = Options { rows: RowsBy::All, weights: WeightsBy::PerRow(1.0), clamp, weight_grad: true, act_out: true };
        let case = format!("{}h={h},npc={npc},recompute=True,t={t},weights=True", with(clamp));
        rows.push(row(case, Tokens::Plain(t), (h, npc), options));
    };
    for t in [32768, 128, 16, 1] {
        plain(t, 2048, 128, None);
    }
    for npc in [32, 128] {
        plain(32768, 7168, npc, None);
        plain(32768, 7168, npc, Some(0.5));
    }
    let mut moe = |e: u64, h: u64, k: u64, npc: u64, clamp: Option<f32>| {
        let tokens = MoeCase { num_send_tokens: 4001, num_topk: k, num_experts: e, num_ranks: 8 };
        let case = format!("{}e={e},ep=8,h={h},k={k},npc={npc},send=4001", with(clamp));
        rows.push(row(case, Tokens::Moe(tokens, npc as u32), (h, npc), Options::v1(clamp)));
    };
    for npc in [32, 128] {
        for e in [9, 32] {
            moe(e, 7168, 8, npc, None);
            moe(e, 7168, 8, npc, Some(0.5));
        }
    }
    moe(9, 2048, 2, 32, None);
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferrotile::quant::swiglu_backward::WeightGrad;
    use ferrotile::{Error, TensorMut, TensorRef};
    use proptest::prelude::{ProptestConfig, proptest};

    #[test]
    fn suite() {
        SUITE.test();
    }

    /// The formulas, by hand: one channel of a clamped gate, one of a clamped other half, one of neither.
    #[test]
    fn the_reference_clamps_and_weighs() {
        let x = vec![3.0, 1.0, -1.0, 0.5, -4.0, 2.0];
        let problem = Problem::new(plain_layout(1), 3, x, vec![2.0, 3.0, 5.0], "");
        let exps = problem.exps(&Device::emulator()).unwrap();
        let options = Options { weights: WeightsBy::None, weight_grad: false, ..Options::v1(Some(2.0)) };
        let of = problem.expected(&options, &exps).unwrap();
        let silu = |x: f64| x / (1.0 + (-x).exp());
        let slope = |x: f64| (silu(x + 1e-6) - silu(x - 1e-6)) / 2e-6;
        let act = [silu(2.0) * 0.5, silu(1.0) * -2.0, silu(-1.0) * 2.0];
        let gradients = [0.0, 3.0 * slope(1.0) * -2.0, 5.0 * slope(-1.0) * 2.0, 2.0 * silu(2.0), 0.0, 5.0 * silu(-1.0)];
        let near = |a: &[f32], b: &[f64]| a.iter().zip(b).all(|(a, b)| (*a as f64 - b).abs() < 1e-5);
        assert!(near(&of.act_out, &act), "{:?} {act:?}", of.act_out);
        assert!(near(&of.x_grad, &gradients), "{:?} {gradients:?}", of.x_grad);
    }

    /// Buffers for calls that must be refused: 4 rows of 64 channels, 2 tokens with 2 choices.
    struct Fixture {
        device: Device,
        x: Buffer<E4m3>,
        x_sf: Buffer<f32>,
        grad: Buffer<bf16>,
        weights: Buffer<f32>,
        map: Buffer<i32>,
        x_grad: Buffer<bf16>,
        fp8: Buffer<E4m3>,
        sf: Buffer<f32>,
        act_out: Buffer<bf16>,
        weight_grad: Buffer<f32>,
        /// Whatever else a call may name.
        spare: Buffer<f32>,
    }

    impl Fixture {
        fn new() -> Self {
            let device = Device::emulator();
            let mut new = Self {
                x: device.zeros(4 * 128).unwrap(),
                x_sf: device.zeros(4 * 4).unwrap(),
                grad: device.zeros(4 * 64).unwrap(),
                weights: device.zeros(4).unwrap(),
                map: device.zeros(4).unwrap(),
                x_grad: device.zeros(4 * 128).unwrap(),
                fp8: device.zeros(4 * 128).unwrap(),
                sf: device.zeros(4 * 4).unwrap(),
                act_out: device.zeros(4 * 64).unwrap(),
                weight_grad: device.zeros(4).unwrap(),
                spare: device.zeros(4096).unwrap(),
                device,
            };
            new.x_grad.fill_bytes(FILL).unwrap();
            new.fp8.fill_bytes(FILL).unwrap();
            new.sf.fill_bytes(FILL).unwrap();
            new.act_out.fill_bytes(FILL).unwrap();
            new.weight_grad.fill_bytes(FILL).unwrap();
            new
        }

        fn spare(&self, dtype: DType, shape: &[u64], strides: &[u64], offset: u64) -> TensorRef<'_> {
            // SAFETY: only calls that launch nothing are given these.
            unsafe { TensorRef::from_raw(&self.device, self.spare.as_ptr() + offset, dtype, shape, strides).unwrap() }
        }

        fn spare_mut(&self, dtype: DType, shape: &[u64], strides: &[u64], offset: u64) -> TensorMut<'_> {
            // SAFETY: only calls that launch nothing are given these.
            unsafe { TensorMut::from_raw(&self.device, self.spare.as_ptr() + offset, dtype, shape, strides).unwrap() }
        }

        /// A call that is fine, changed.
        fn call<'a>(&'a self, edit: impl Fn(&mut Args<'a>, &'a Self)) -> ferrotile::Result<()> {
            let out = |address: u64, dtype, shape: &[u64]| {
                let strides: Vec<u64> = (0..shape.len()).map(|i| shape[i + 1..].iter().product()).collect();
                // SAFETY: no other tensor of these buffers is alive.
                unsafe { TensorMut::from_raw(&self.device, address, dtype, shape, &strides).unwrap() }
            };
            let map = self.map.tensor(&[4])?;
            let mut args = Args {
                x: self.x.tensor(&[4, 128])?,
                x_sf: Sf { tensor: self.x_sf.tensor(&[4, 4])?, layout: SfLayout::RowMajor },
                npc: 32,
                act_x_grad: self.grad.tensor(&[4, 64])?,
                rows: ExpertRows::All,
                weights: RowWeights::PerTokenTopk { topk_weights: self.weights.tensor(&[2, 2])?, pos_to_token_topk: map },
                clamp_value: Some(10.0),
                round_sf: true,
                x_grad: out(self.x_grad.as_ptr(), DType::Bf16, &[4, 128]),
                x_grad_fp8: out(self.fp8.as_ptr(), DType::E4m3, &[4, 128]),
                x_grad_sf: SfMut { tensor: out(self.sf.as_ptr(), DType::F32, &[4, 4]), layout: SfLayout::RowMajor },
                weight_grad: Some(WeightGrad::PerTokenTopk {
                    weight_grad: out(self.weight_grad.as_ptr(), DType::F32, &[2, 2]),
                    token_topk_to_pos: self.map.tensor(&[2, 2])?,
                }),
                act_out: Some(out(self.act_out.as_ptr(), DType::Bf16, &[4, 64])),
            };
            edit(&mut args, self);
            op::swiglu_backward_and_per_token_cast(&self.device.stream()?, args)
        }

        fn untouched(&self) -> bool {
            let halves = [&self.x_grad, &self.act_out].map(|b| b.to_vec().unwrap());
            let words = [&self.sf, &self.weight_grad].map(|b| b.to_vec().unwrap());
            halves.iter().flatten().all(|v| v.to_bits() == u16::from_ne_bytes([FILL; 2]))
                && words.iter().flatten().all(|v| v.to_bits() == u32::from_ne_bytes([FILL; 4]))
                && self.fp8.to_vec().unwrap().iter().all(|v| v.0 == FILL)
        }

        /// The call fails with a text that starts like this, and nothing was written.
        fn refuses<'a>(&'a self, start: &str, edit: impl Fn(&mut Args<'a>, &'a Self)) {
            let text = self.call(edit).expect_err(start).to_string();
            let whole = format!("{}: {start}", SUITE.op);
            assert!(text.starts_with(&whole), "{text}\nexpected {whole}");
            assert!(self.untouched(), "{text}: something was written");
        }
    }

    #[test]
    fn bad_arguments_are_named() {
        use DType::{Bf16, E4m3, F16, F32, I32, I64, Ue8m0x4};
        let f = Fixture::new();
        // Numbers.
        f.refuses("npc is 64, allowed: 32, 128", |a, _| a.npc = 64);
        f.refuses("columns of x is 128, allowed: multiples of 256", |a, _| a.npc = 128);
        f.refuses("columns of x is 96, allowed: multiples of 64", |a, f| a.x = f.spare(E4m3, &[4, 96], &[96, 1], 0));
        f.refuses("clamp_value is -1, allowed: positive numbers", |a, _| a.clamp_value = Some(-1.0));
        f.refuses("clamp_value is NaN, allowed: positive numbers", |a, _| a.clamp_value = Some(f32::NAN));
        f.refuses("num_rows is 2147483648, allowed", |a, f| a.x = f.spare(E4m3, &[1 << 31, 128], &[0, 1], 0));
        f.refuses("scales of a row is 49154, allowed: 0 to 49152", |a, f| {
            a.x = f.spare(E4m3, &[1, 32 * 49154], &[0, 1], 0);
        });
        f.refuses("alignment is 0, allowed: 1 to", |a, f| {
            let psum_num_tokens_per_expert = f.spare(I32, &[3], &[1], 0);
            a.rows = ExpertRows::Psum { psum_num_tokens_per_expert, alignment: 0 };
        });
        f.refuses("round_sf is false, allowed: true with row-major packed scales", |a, f| {
            a.round_sf = false;
            a.x_grad_sf = SfMut { tensor: f.spare_mut(Ue8m0x4, &[4, 1], &[1, 1], 0), layout: SfLayout::RowMajorPacked };
        });
        // Types.
        f.refuses("x is f32, allowed: e4m3", |a, f| a.x = f.spare(F32, &[4, 128], &[128, 1], 0));
        f.refuses("act_x_grad is f16, allowed: bf16, f32", |a, f| a.act_x_grad = f.spare(F16, &[4, 64], &[64, 1], 0));
        f.refuses("x_grad is f32, allowed: bf16", |a, f| a.x_grad = f.spare_mut(F32, &[4, 128], &[128, 1], 0));
        f.refuses("x_grad_fp8 is bf16, allowed: e4m3", |a, f| a.x_grad_fp8 = f.spare_mut(Bf16, &[4, 128], &[128, 1], 0));
        f.refuses("act_out is f32, allowed: bf16", |a, f| a.act_out = Some(f.spare_mut(F32, &[4, 64], &[64, 1], 0)));
        f.refuses("pos_to_expert is i64, allowed: i32", |a, f| {
            a.rows = ExpertRows::PosToExpert(f.spare(I64, &[4], &[1], 0));
        });
        f.refuses("topk_weights is bf16, allowed: f32", |a, f| {
            (a.weights, a.weight_grad) = (RowWeights::None, None);
            a.weights = RowWeights::PerRow { topk_weights: f.spare(Bf16, &[4], &[1], 0), routed_scaling_factor: 1.0 };
        });
        // Shapes.
        f.refuses("x has shape [512], expected 2 dimensions", |a, f| a.x = f.spare(E4m3, &[512], &[1], 0));
        f.refuses("act_x_grad has shape [4, 128], expected [4, 64]", |a, f| {
            a.act_x_grad = f.spare(Bf16, &[4, 128], &[128, 1], 0);
        });
        f.refuses("x_grad has shape [3, 128], expected [4, 128]", |a, f| a.x_grad = f.spare_mut(Bf16, &[3, 128], &[128, 1], 0));
        f.refuses("x_sf has shape [4, 2], expected [4, 4]", |a, f| a.x_sf.tensor = f.spare(F32, &[4, 2], &[2, 1], 0));
        f.refuses("x_grad_sf has shape [4, 8], expected [4, 4]", |a, f| {
            a.x_grad_sf.tensor = f.spare_mut(F32, &[4, 8], &[8, 1], 0);
        });
        f.refuses("pos_to_expert has shape [3], expected [4]", |a, f| {
            a.rows = ExpertRows::PosToExpert(f.spare(I32, &[3], &[1], 0));
        });
        f.refuses("pos_to_token_topk has shape [5], expected [4]", |a, f| {
            let topk_weights = f.spare(F32, &[2, 2], &[2, 1], 0);
            a.weights = RowWeights::PerTokenTopk { topk_weights, pos_to_token_topk: f.spare(I32, &[5], &[1], 0) };
        });
        f.refuses("token_topk_to_pos has shape [4], expected [2, 2]", |a, f| {
            let (weight_grad, token_topk_to_pos) = (f.spare_mut(F32, &[2, 2], &[2, 1], 0), f.spare(I32, &[4], &[1], 64));
            a.weight_grad = Some(WeightGrad::PerTokenTopk { weight_grad, token_topk_to_pos });
        });
        // A gradient of another kind than the weights.
        f.refuses("weight_grad is by row, allowed: by token and choice, as the weights are", |a, f| {
            a.weight_grad = Some(WeightGrad::PerRow(f.spare_mut(F32, &[4], &[1], 0)));
        });
        f.refuses("weight_grad is by token and choice, allowed: none without weights", |a, _| a.weights = RowWeights::None);
        // Layouts.
        f.refuses("layout of x is", |a, f| a.x = f.spare(E4m3, &[4, 128], &[1, 4], 0));
        f.refuses("layout of x is", |a, f| a.x = f.spare(E4m3, &[4, 128], &[132, 1], 0));
        f.refuses("layout of act_x_grad is", |a, f| a.act_x_grad = f.spare(Bf16, &[4, 64], &[64, 1], 8));
        f.refuses("layout of x_sf is col-major, expected row-major", |a, _| a.x_sf.layout = SfLayout::ColMajor);
        f.refuses("layout of x_grad is", |a, f| a.x_grad = f.spare_mut(Bf16, &[4, 128], &[136, 1], 0));
        f.refuses("layout of x_grad_fp8 is", |a, f| a.x_grad_fp8 = f.spare_mut(E4m3, &[4, 128], &[128, 1], 8));
        f.refuses("layout of x_grad_sf is", |a, _| a.x_grad_sf.layout = SfLayout::ColMajor);
        f.refuses("layout of x_grad_sf is per-channel packed, expected", |a, _| {
            a.x_grad_sf.layout = SfLayout::PerChannelPacked;
        });
        f.refuses("layout of psum_num_tokens_per_expert is", |a, f| {
            let psum_num_tokens_per_expert = f.spare(I32, &[3], &[2], 0);
            a.rows = ExpertRows::Psum { psum_num_tokens_per_expert, alignment: 4 };
        });
        // Memory.
        let other = Device::emulator().checked().zeros::<ferrotile::E4m3>(512).unwrap();
        // SAFETY: nothing is launched.
        let x = unsafe { TensorRef::from_raw(other.device(), other.as_ptr(), E4m3, &[4, 128], &[128, 1]).unwrap() };
        let error = f.call(|a, _| a.x = x).unwrap_err();
        assert!(matches!(error, Error::DeviceMismatch { arg: "x", .. }), "{error}");
        f.refuses("x and x_grad overlap in memory", |a, f| {
            a.x = f.spare(E4m3, &[4, 128], &[128, 1], 0);
            a.x_grad = f.spare_mut(Bf16, &[4, 128], &[128, 1], 496);
        });
        f.refuses("x_grad and act_out overlap in memory", |a, f| {
            a.x_grad = f.spare_mut(Bf16, &[4, 128], &[128, 1], 0);
            a.act_out = Some(f.spare_mut(Bf16, &[4, 64], &[64, 1], 512));
        });
        f.refuses("token_topk_to_pos and weight_grad overlap in memory", |a, f| {
            let (weight_grad, token_topk_to_pos) = (f.spare_mut(F32, &[2, 2], &[2, 1], 0), f.spare(I32, &[2, 2], &[2, 1], 8));
            a.weight_grad = Some(WeightGrad::PerTokenTopk { weight_grad, token_topk_to_pos });
        });
        // What all of this was derived from is fine.
        f.call(|_, _| ()).unwrap();
        assert!(!f.untouched());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        /// Any layout of experts, hidden size, distance of rows, options and range of values.
        #[test]
        fn any_input(
            tokens in 0u64..9, alignment in 1u32..20, groups in 1u64..5, wide: bool, gap in 0u64..3, offset in 0u64..3, f32_grad: bool,
            option in 0usize..12, scale in 0usize..12, seed: u64,
        ) {
            let device = Device::emulator();
            let npc = if wide { 128 } else { 32 };
            let dtype = if f32_grad { DType::F32 } else { DType::Bf16 };
            let (h, name) = (groups * npc, format!("any {seed}"));
            let (problem, x) = problem(small_layout(tokens, alignment), h, npc, dtype, "awkward", &name);
            let inputs = Inputs::new(&device, &problem, &x, npc, dtype, (8 * gap, 8 * offset)).unwrap();
            let (options, (round, layout)) = (Options::all()[option], scales(scale));
            let expected = problem.expected(&options, &problem.exps(&device).unwrap()).unwrap();
            let fp8 = quantise(&expected.x_grad, 2 * h as usize, npc as usize, round, |row| expected.holds_token[row]);
            let mut outputs = Outputs::new(&device, &inputs, &options, layout).unwrap();
            outputs.run(&device.stream().unwrap(), &inputs, &options, round).unwrap();
            outputs.check(&name, &inputs, &options, &expected, &fp8).unwrap();
        }
    }
}
