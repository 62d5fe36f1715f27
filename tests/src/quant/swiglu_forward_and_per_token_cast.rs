//! Reference, cases, checks and benchmark rows of `swiglu_forward_and_per_token_cast`.

use super::common_swiglu::{Exp, Input, Layout, RowsKind, WeightsKind, awkward, normal, reference};
use crate::support::bench::{Launch, Row};
use crate::support::cases::{Depth, MoeCase, moe_bench_cases};
use crate::support::compare;
use crate::support::golden::{self, Case, Golden};
use crate::support::suite::{Ctx, Report, Suite, ensure, text};
use ferrotile::quant::swiglu_forward_and_per_token_cast::{self as op, Args};
use ferrotile::quant::{SfLayout, SfMut, SfShape, sf_shape};
use ferrotile::{Buffer, DType, Device, E4m3, Stream, Ue8m0x4};
use rayon::prelude::*;

/// What the `check` binary runs.
pub const SUITE: Suite = Suite { op: "swiglu_forward_and_per_token_cast", run };

/// Bytes or words behind an output that must stay as they are, and what rows without a token keep.
const GUARD: usize = 64;
const FILL: u8 = 0xA5;

// The reference of the cast; that of the activation is shared with `swiglu_forward`.

/// Data row by row, and scales `(P, K)`.
struct Quantised {
    data: Vec<u8>,
    sf: Vec<f32>,
}

/// `(sf, what the data are multiplied by)`.
fn reference_scale(amax: f32, amax_min: f32, round: bool) -> (f32, f32) {
    let c = if amax > amax_min { amax } else { amax_min };
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

/// The e4m3 nearest to a value, ties to even, saturating.
fn e4m3(v: f32) -> u8 {
    if v.is_nan() {
        return 0x7F;
    }
    let exponent = ((v.to_bits() >> 23 & 0xFF) as i32 - 127).clamp(-6, 9);
    let steps = (v.abs() as f64 * 2f64.powi(3 - exponent)).round_ties_even().min(16.0);
    let code = steps as i32 + 8 * (exponent + 6);
    code.min(0x7E) as u8 | if v.is_sign_negative() { 0x80 } else { 0 }
}

fn value_of_e4m3(code: u8) -> f32 {
    let (exponent, mantissa) = ((code >> 3 & 15) as i32, (code & 7) as f32);
    let magnitude = if exponent == 0 { mantissa * 2f32.powi(-9) } else { (8.0 + mantissa) * 2f32.powi(exponent - 10) };
    if code & 0x80 != 0 { -magnitude } else { magnitude }
}

/// The cast of `v`, `(P, h)`.
fn quantise(v: &[f32], h: usize, npc: usize, round: bool, amax_min: f32) -> Quantised {
    let groups = h.div_ceil(npc.max(1));
    let mut q = Quantised { data: vec![0; v.len()], sf: vec![0.0; v.len() / h.max(1) * groups] };
    if v.is_empty() {
        return q;
    }
    let rows = q.data.par_chunks_mut(h).zip(q.sf.par_chunks_mut(groups)).zip(v.par_chunks(h));
    rows.for_each(|((data, sf), v)| {
        for ((data, sf), v) in data.chunks_mut(npc).zip(sf).zip(v.chunks(npc)) {
            // `>` is false for NaN.
            let amax = v.iter().fold(0.0, |max, v| if v.abs() > max { v.abs() } else { max });
            let inverse;
            (*sf, inverse) = reference_scale(amax, amax_min, round);
            data.iter_mut().zip(v).for_each(|(q, v)| *q = e4m3(v * inverse));
        }
    });
    q
}

/// Words of the scale tensor, contiguous: f32 bits, or four exponents with zeros for groups that do not exist.
fn sf_words(sf: &[f32], groups: usize, layout: SfLayout) -> Vec<u32> {
    if !layout.is_packed() {
        return sf.iter().map(|v| v.to_bits()).collect();
    }
    let word = |four: &[f32]| four.iter().rev().fold(0, |word, v| word << 8 | v.to_bits() >> 23);
    sf.chunks(groups.max(1)).flat_map(|row| row.chunks(4).map(word)).collect()
}

// Running.

/// Options of one call. `npc = 0` stands for a scale a row.
#[derive(Clone, Copy, Debug)]
struct Options {
    rows: RowsKind,
    weights: WeightsKind,
    clamp: Option<f32>,
    count: bool,
    npc: u32,
    sf: SfLayout,
    round: bool,
    amax_min: Option<f32>,
}

impl Options {
    fn npc(&self, input: &Input) -> u32 {
        if self.npc == 0 { input.hidden as u32 } else { self.npc }
    }
}

/// Output buffers of one call. Counters start at 100.
struct Outputs {
    shape: [u64; 2],
    data: Buffer<u8>,
    sf_shape: SfShape,
    layout: SfLayout,
    sf: Buffer<u32>,
    counts: Buffer<i64>,
}

impl Outputs {
    fn new(device: &Device, input: &Input, options: Options) -> Result<Self, String> {
        let shape = [input.num_rows, input.hidden];
        let sf_shape = sf_shape(shape[0], shape[1], (1, options.npc(input)), options.sf);
        let mut data = device.alloc::<u8>((shape[0] * shape[1]) as usize + GUARD).map_err(text)?;
        let mut sf = device.alloc::<u32>(sf_shape.elements as usize + GUARD).map_err(text)?;
        data.fill_bytes(FILL).map_err(text)?;
        sf.fill_bytes(FILL).map_err(text)?;
        Ok(Self { shape, data, sf_shape, layout: options.sf, sf, counts: device.upload(&[100; 4]).map_err(text)? })
    }

    fn run(&mut self, stream: &Stream, input: &Input, options: Options, counters: u64) -> ferrotile::Result<()> {
        let out = self.data.tensor_mut(&self.shape)?.reinterpret(DType::E4m3)?;
        let sf = self.sf.strided_mut(&self.sf_shape.shape, &self.sf_shape.strides, 0)?.reinterpret(self.sf_shape.dtype)?;
        let clamped_count = if options.count { Some(self.counts.strided_mut(&[counters], &[1], 0)?) } else { None };
        op::swiglu_forward_and_per_token_cast(
            stream,
            Args {
                x: input.x()?,
                rows: input.rows(options.rows)?,
                weights: input.weights(options.weights)?,
                clamp_value: options.clamp,
                clamped_count,
                npc: options.npc(input),
                round_sf: options.round,
                sf_clamp_min: options.amax_min,
                out,
                sf: SfMut { tensor: sf, layout: self.layout },
            },
        )
    }

    /// Data and scales of rows that hold tokens, nothing elsewhere.
    fn check(&self, name: &str, input: &Input, options: Options, expected: &Quantised) -> Result<(), String> {
        let data = self.data.to_vec().map_err(text)?;
        let (data, guard) = data.split_at(data.len() - GUARD);
        ensure(guard.iter().all(|b| *b == FILL), || format!("data: bytes behind the tensor were written; {name}"))?;
        let used = |row: usize| input.holds_token(options.rows, row);
        let h = self.shape[1].max(1) as usize;
        let codes: Vec<u8> = expected.data.par_iter().enumerate().map(|(i, q)| if used(i / h) { *q } else { FILL }).collect();
        compare::equal::<E4m3>("data", name, &self.shape, bytemuck::cast_slice(data), bytemuck::cast_slice(&codes))?;

        let SfShape { shape, strides, .. } = &self.sf_shape;
        let groups = h.div_ceil(options.npc(input).max(1) as usize);
        let mut words = sf_words(&expected.sf, groups, self.layout);
        let columns = shape[1].max(1) as usize;
        words.iter_mut().enumerate().filter(|(i, _)| !used(i / columns)).for_each(|(_, w)| *w = u32::from_ne_bytes([FILL; 4]));
        let sf = self.sf.to_vec().map_err(text)?;
        let (got, expected) = (bytemuck::cast_slice(&sf), bytemuck::cast_slice(&words));
        if self.layout.is_packed() {
            compare::equal_strided::<Ue8m0x4>("sf", name, shape, strides, got, expected)?;
        } else {
            compare::equal_strided::<f32>("sf", name, shape, strides, bytemuck::cast_slice(got), bytemuck::cast_slice(expected))?;
        }
        compare::untouched("sf", name, shape, strides, &sf, FILL)
    }

    fn check_counts(&self, name: &str, expected: [i64; 4], counters: u64) -> Result<(), String> {
        let expected: Vec<i64> = (0..4).map(|i| 100 + if i < counters { expected[i as usize] } else { 0 }).collect();
        compare::equal("clamped_count", name, &[4], &self.counts.to_vec().map_err(text)?, &expected)
    }
}

/// Calls with these options, results compared bit for bit.
fn check_input(ctx: &Ctx, input: &Input, all: &[Options], kind: &str) -> Result<(), String> {
    let stream = ctx.device.stream().map_err(text)?;
    // The activation of the last call, which many options share.
    let mut last = None;
    for (i, &options) in all.iter().enumerate() {
        let Options { rows, weights, clamp, count, npc, sf, round, amax_min } = options;
        let name = format!(
            "clamp={clamp:?},clamp_min={amax_min:?},count={count},h={},input={},kind={kind},npc={npc},round_sf={round},rows={rows:?},\
             sf={sf},stride={},t={},weights={weights:?}",
            input.hidden, input.dtype, input.stride, input.num_rows
        );
        if !ctx.case(&name) {
            continue;
        }
        let key = (rows, weights, clamp);
        if last.as_ref().is_none_or(|(of, _)| *of != key) {
            last = Some((key, reference(input, &Exp::new(&ctx.device, input, clamp)?, clamp, rows, weights)));
        }
        let Some((_, (values, counts))) = &last else { continue };
        let expected = quantise(values, input.hidden as usize, options.npc(input) as usize, round, amax_min.unwrap_or(1e-4));
        let mut outputs = Outputs::new(&ctx.device, input, options)?;
        let counters = 3 + i as u64 % 2;
        outputs.run(&stream, input, options, counters).map_err(text)?;
        outputs.check(&name, input, options, &expected)?;
        let mut sums = if count { *counts } else { [0; 4] };
        outputs.check_counts(&name, sums, counters)?;
        if i % 8 == 0 {
            // Once more, over its own results; counters go on.
            outputs.run(&stream, input, options, counters).map_err(text)?;
            outputs.check(&name, input, options, &expected)?;
            sums = sums.map(|n| 2 * n);
            outputs.check_counts(&name, sums, counters)?;
        }
    }
    Ok(())
}

const FACTOR: f32 = 2.5;
const ROWS: [RowsKind; 3] = [RowsKind::Psum, RowsKind::All, RowsKind::PosToExpert];
const WEIGHTS: [WeightsKind; 3] = [WeightsKind::PerRow(FACTOR), WeightsKind::None, WeightsKind::PerTokenTopk];
const ROUNDED: [SfLayout; 4] = [SfLayout::ColMajorPacked, SfLayout::RowMajor, SfLayout::ColMajor, SfLayout::RowMajorPacked];
const PLAIN: [SfLayout; 2] = [SfLayout::RowMajor, SfLayout::ColMajor];

/// All layouts, groups and clamps; rows and weights take turns.
fn options(counting: bool) -> Vec<Options> {
    let mut all = Vec::new();
    for (i, clamp) in [None, Some(10.0), Some(0.5), Some(0.3)].into_iter().enumerate() {
        let (rows, weights) = (ROWS[i % 3], WEIGHTS[(i + i / 2) % 3]);
        for (j, npc) in [128, 32, 0].into_iter().enumerate() {
            for round in [true, false] {
                let layouts: &[SfLayout] = if round { &ROUNDED } else { &PLAIN };
                for (k, &sf) in layouts.iter().enumerate() {
                    let amax_min = [None, None, Some(0.75), Some(1e-7)][(j + k) % 4];
                    all.push(Options { rows, weights, clamp, count: counting && clamp.is_some(), npc, sf, round, amax_min });
                }
            }
        }
    }
    all
}

/// All layouts and groups for rows that all hold tokens and count as they are, without a clamp: `few` takes them if they are few.
fn plain() -> Vec<Options> {
    let (rows, weights) = (RowsKind::All, WeightsKind::None);
    let all = options(false).into_iter().filter(|o| o.clamp.is_none() && o.npc != 0);
    all.map(|o| Options { rows, weights, ..o }).collect()
}

/// Counts of experts with an empty first, inner and last one.
const COUNTS: [u64; 9] = [0, 5, 0, 0, 13, 8, 1, 16, 0];

fn run(ctx: &Ctx) -> Result<Report, String> {
    let every = options(false);
    let counting: Vec<Options> = options(true).into_iter().filter(|o| o.count).step_by(3).collect();
    for dtype in [DType::Bf16, DType::F32] {
        let input = |layout: Layout, h: u64, gap: u64, kind: &str| {
            let name = format!("swiglu_forward_and_per_token_cast {dtype} {} {h} {kind}", layout.num_rows);
            let values = match kind {
                "awkward" => awkward(dtype, layout.num_rows, h, false, &name),
                _ => normal(dtype, (layout.num_rows * 2 * h) as usize, &name),
            };
            Input::new(&ctx.device, dtype, layout, h, 2 * h + gap, values, &name)
        };
        let awkward = input(Layout::new(&COUNTS, 8, 3), 648, 0, "awkward")?;
        check_input(ctx, &awkward, &every, "awkward")?;
        check_input(ctx, &awkward, &counting, "awkward")?;
        check_input(ctx, &awkward, &plain(), "awkward")?;
        // More than a warp's share of experts, an alignment that is no power of two, ragged rows far apart.
        let counts: Vec<u64> = (0..70).map(|e| [1, 0, 2][e % 3]).collect();
        let apart = input(Layout::new(&counts, 3, 1), 320, 24, "normal, apart")?;
        let some: Vec<Options> = every.iter().step_by(4).copied().collect();
        check_input(ctx, &apart, &some, "normal, apart")?;
        check_input(ctx, &apart, &counting[..4], "normal, apart")?;
        check_input(ctx, &apart, &plain(), "normal, apart")?;
        // Words with more or less than a group that exists; more rows than count as few.
        for (t, h) in [(1, 8), (2, 72), (1, 2048), (1100, 40)] {
            let step = if t > 2 { 5 } else { 1 };
            let some: Vec<Options> = plain().into_iter().step_by(step).collect();
            check_input(ctx, &input(Layout::new(&[t], 1, 0), h, 0, "normal")?, &some, "normal, plain")?;
        }
        check_input(ctx, &input(Layout::new(&[1], 1, 0), 8, 0, "normal")?, &every[..18], "normal")?;
        // Longer than the threads of a block hold at once.
        check_input(ctx, &input(Layout::new(&[2], 1, 0), 8968, 0, "normal")?, &every[12..20], "normal")?;
        let by_row: Vec<Options> = options(true).into_iter().filter(|o| o.count && o.npc == 0).step_by(5).collect();
        check_input(ctx, &input(Layout::new(&[2], 1, 0), 8968, 0, "normal")?, &by_row, "normal")?;
        check_input(ctx, &input(Layout::new(&[0, 0], 4, 0), 64, 0, "empty")?, &every[..18], "empty")?;
        check_input(ctx, &input(Layout::new(&[0, 0], 4, 6), 64, 0, "all padding")?, &every[..18], "all padding")?;
        check_input(ctx, &input(Layout::new(&[3], 4, 0), 0, 0, "empty")?, &every[..12], "empty")?;
        if ctx.depth == Depth::Small {
            continue;
        }
        for (t, h) in [(1, 1280), (16, 2048), (128, 3584), (264, 2048), (8001, 1280)] {
            check_input(ctx, &input(Layout::new(&[t], 1, 0), h, 0, "normal")?, &plain(), "normal, plain")?;
        }
        for t in [1, 512, 8001] {
            for h in [64, 128, 192, 384, 1024, 1280, 1536, 2048, 3072, 3584] {
                let all: Vec<Options> = every[18..36].iter().step_by(if t == 8001 { 7 } else { 3 }).copied().collect();
                check_input(ctx, &input(Layout::new(&[t], 1, 0), h, 0, "normal")?, &all, "normal")?;
            }
        }
        // The cases of 1.0.0's grid, its sizes in turn; f32 input is not in it.
        let cases: Vec<MoeCase> = moe_bench_cases();
        let hiddens = [1024, 1280, 1536, 2048, 3072, 3584];
        for (i, case) in cases.iter().enumerate().step_by(if dtype == DType::Bf16 { 1 } else { 5 }) {
            let input = input(Layout::of_moe(case, 16), hiddens[i % 6], 0, "normal")?;
            for (j, clamp) in [None, Some(10.0), Some(0.5)].into_iter().enumerate() {
                let (rows, weights) = (ROWS[(i + j) % 3], WEIGHTS[(i / 3 + j) % 3]);
                let base =
                    Options { rows, weights, clamp, count: false, npc: 128, sf: SfLayout::RowMajor, round: true, amax_min: None };
                let count = clamp.is_some();
                let all = [
                    Options { sf: SfLayout::ColMajorPacked, count, ..base },
                    Options { npc: [0, 32][(i + j) % 2], count: count && i % 4 == 0, ..base },
                    Options { round: false, npc: [128, 0][(i + j) % 2], ..base },
                ];
                check_input(ctx, &input, &all, "moe")?;
            }
        }
    }
    if !ctx.device.is_emulator() {
        check_graph(ctx)?;
        check_emulator(ctx)?;
        if ctx.depth == Depth::Full {
            check_large_output(ctx)?;
        }
    }
    let notes = golden::check_cases(ctx, &[SUITE.op], |golden, case| check_golden(ctx, golden, case))?;
    Ok(Report { notes, ..ctx.report() })
}

/// Every kernel recorded in one graph and replayed.
fn check_graph(ctx: &Ctx) -> Result<(), String> {
    let name = "kind=graph,h=640";
    if !ctx.case(name) {
        return Ok(());
    }
    let layout = Layout::new(&COUNTS, 16, 0);
    let values = normal(DType::Bf16, layout.num_rows as usize * 1280, name);
    let input = Input::new(&ctx.device, DType::Bf16, layout, 640, 1280, values, name)?;
    let base = Options {
        rows: RowsKind::Psum,
        weights: WeightsKind::PerRow(FACTOR),
        clamp: Some(0.5),
        count: true,
        npc: 128,
        sf: SfLayout::ColMajorPacked,
        round: true,
        amax_min: None,
    };
    let calls = [base, Options { npc: 0, ..base }, Options { npc: 32, count: false, ..base }];
    let (values, counts) = reference(&input, &Exp::new(&ctx.device, &input, base.clamp)?, base.clamp, base.rows, base.weights);
    let stream = ctx.device.stream().map_err(text)?;
    let mut outputs: Vec<Outputs> = calls.iter().map(|o| Outputs::new(&ctx.device, &input, *o)).collect::<Result<_, _>>()?;
    let graph = stream
        .capture(|s| outputs.iter_mut().zip(calls).try_for_each(|(outputs, options)| outputs.run(s, &input, options, 4)))
        .map_err(text)?;
    for replay in 1..3 {
        for outputs in &mut outputs {
            outputs.data.fill_bytes(FILL).map_err(text)?;
            outputs.sf.fill_bytes(FILL).map_err(text)?;
        }
        graph.launch(&stream).map_err(text)?;
        stream.synchronize().map_err(text)?;
        for (outputs, options) in outputs.iter().zip(calls) {
            let expected = quantise(&values, 640, options.npc(&input) as usize, true, 1e-4);
            outputs.check(name, &input, options, &expected)?;
            outputs.check_counts(name, if options.count { counts.map(|n| n * replay) } else { [0; 4] }, 4)?;
        }
    }
    Ok(())
}

/// Decoded values, zeros for NaN, and the scale of each.
fn decoded(outputs: &Outputs, groups: usize) -> Result<Vec<(f32, f32)>, String> {
    let (data, sf) = (outputs.data.to_vec().map_err(text)?, outputs.sf.to_vec().map_err(text)?);
    let h = outputs.shape[1] as usize;
    let one = |(i, code): (usize, &u8)| {
        let sf = f32::from_bits(sf[i / h * groups + i % h * groups / h]);
        (if code & 0x7F == 0x7F { 0.0 } else { value_of_e4m3(*code) * sf }, sf)
    };
    Ok(data[..data.len() - GUARD].iter().enumerate().map(one).collect())
}

/// Two results of kernels whose `exp` differs in the last bits: scales differ in theirs, or by a step where they are powers of two and
/// the largest magnitude is close to one; values differ by at most one code, and seldom.
fn check_close(name: &str, got: &[(f32, f32)], expected: &[(f32, f32)]) -> Result<(), String> {
    let mut same = 0;
    for (i, ((a, sf), (b, other_sf))) in got.iter().zip(expected).enumerate() {
        let ratio = sf / other_sf;
        ensure((0.5..=2.0).contains(&ratio), || format!("element {i}: got scale {sf}, expected {other_sf}; {name}"))?;
        // Scales that are as good as equal: then values are those of codes, and equal ones are equal but for the scale.
        let near = (ratio - 1.0).abs() < 1e-6;
        // One code is 1/8 at most, and the smallest step of e4m3 near zero. Scales a step apart make it twice that.
        let code = if near { 1.0 } else { 2.0 };
        let bound = (a.abs().max(b.abs()) / 8.0 * 1.00001 + sf.max(*other_sf) * 2f32.powi(-9)) * code;
        ensure((a - b).abs() <= bound, || format!("element {i}: got {a} with scale {sf}, expected {b} with {other_sf}; {name}"))?;
        same += (near && (a / sf - b / other_sf).abs() <= (a / sf).abs() * 1e-5) as usize;
    }
    ensure(same as f64 >= 0.99 * got.len() as f64, || format!("only {same} of {} are equal; {name}", got.len()))
}

/// What the peers computed: bit for bit on a GPU; on the emulator, whose `exp` differs in the last bit, but for a code now and then.
fn check_golden(ctx: &Ctx, golden: &Golden, case: &Case) -> Result<(), String> {
    let name = case.name();
    let (input, options) = recorded(golden, case, &ctx.device)?;
    let mut outputs = Outputs::new(&ctx.device, &input, options)?;
    let stream = ctx.device.stream().map_err(text)?;
    outputs.run(&stream, &input, options, 3).map_err(text)?;
    stream.synchronize().map_err(text)?;
    let prefix = if golden.keys(case).iter().any(|key| key == "out/q.0") { "out/q." } else { "out/" };
    let (data, sf) = (golden.tensor(case, &format!("{prefix}0"))?, golden.tensor(case, &format!("{prefix}1"))?);
    sf.check_place(&name, &outputs.sf_shape)?;
    let scales: Vec<f32> = sf.to_vec()?;
    if ctx.device.is_emulator() {
        let (h, groups) = (input.hidden as usize, sf.shape[1] as usize);
        let scale = |i: usize| scales[i / h * groups + i % h * groups / h];
        let expected: Vec<(f32, f32)> =
            data.bytes.iter().enumerate().map(|(i, code)| (value_of_e4m3(*code) * scale(i), scale(i))).collect();
        let used = |all: &[(f32, f32)]| -> Vec<(f32, f32)> {
            all.iter().enumerate().filter(|(i, _)| input.holds_token(options.rows, i / h)).map(|(_, v)| *v).collect()
        };
        check_close(&name, &used(&decoded(&outputs, groups)?), &used(&expected))?;
    } else {
        outputs.check(&name, &input, options, &Quantised { data: data.bytes.to_vec(), sf: scales })?;
    }
    if options.count {
        let counts: Vec<i64> = golden.tensor(case, "out/clamped_count")?.to_vec()?;
        let got: Vec<i64> = outputs.counts.to_vec().map_err(text)?.iter().map(|n| n - 100).collect();
        ensure(got[..counts.len()] == counts[..], || format!("counts: got {got:?}, expected {counts:?}; {name}"))?;
    }
    Ok(())
}

/// What a recorded call was given, for both releases.
fn recorded(golden: &Golden, case: &Case, device: &Device) -> Result<(Input, Options), String> {
    let keys = golden.keys(case);
    let has = |key: &str| keys.iter().any(|k| k == key);
    let x = golden.tensor(case, "in/x")?;
    let values: Vec<f32> = x.floats()?;
    let (t, h) = (x.shape[0], x.shape[1] / 2);
    let mut layout = Layout::new(&[t], 1, 0);
    let mut rows = RowsKind::All;
    if has("in/pos_to_expert") {
        rows = RowsKind::PosToExpert;
        layout.pos_to_expert = golden.tensor(case, "in/pos_to_expert")?.to_vec()?;
    }
    if has("in/psum") {
        rows = RowsKind::Psum;
        layout.alignment = 128;
        layout.psum = golden.tensor(case, "in/psum")?.to_vec()?;
        layout.pos_to_expert = vec![-1; t as usize];
        let mut start = 0usize;
        for (expert, end) in layout.psum.iter().enumerate() {
            layout.pos_to_expert[start..*end as usize].fill(expert as i32);
            start = (*end as usize).next_multiple_of(128);
        }
    }
    let by_choice = case.params["weights"] == true;
    let weights: Vec<f32> = if has("in/topk_weights") { golden.tensor(case, "in/topk_weights")?.to_vec()? } else { vec![] };
    let factor = case.param::<Option<f32>>("routed_scaling_factor")?;
    let kind = match (by_choice, factor, has("in/topk_weights")) {
        (true, ..) => WeightsKind::PerTokenTopk,
        (false, factor, true) => WeightsKind::PerRow(factor.unwrap_or(1.0)),
        _ => WeightsKind::None,
    };
    let given = match kind {
        WeightsKind::PerTokenTopk => (vec![0.0; t as usize], weights, golden.tensor(case, "in/pos_to_token_topk")?.to_vec()?),
        WeightsKind::PerRow(_) => (weights, vec![0.0; 4], vec![-1; t as usize]),
        WeightsKind::None => (vec![0.0; t as usize], vec![0.0; 4], vec![-1; t as usize]),
    };
    let input = Input::with_weights(device, DType::Bf16, layout, h, (2 * h, 2 * h), values, given)?;
    let clamp: Option<f32> = case.param("swiglu_clamp_value").or_else(|_| case.param("clamp_value"))?;
    let clamp = clamp.or_else(|| case.param::<Option<f32>>("clamp_value").unwrap_or_default());
    let options = Options {
        rows,
        weights: kind,
        clamp,
        count: has("out/clamped_count"),
        npc: case.param("num_per_channels")?,
        sf: SfLayout::RowMajor,
        round: case.param("round_sf")?,
        amax_min: None,
    };
    Ok((input, options))
}

/// The emulator's results are those of the device but for a code now and then.
fn check_emulator(ctx: &Ctx) -> Result<(), String> {
    let name = "kind=both backends,h=320";
    if !ctx.case(name) {
        return Ok(());
    }
    let run = |device: &Device, round: bool| {
        let values = awkward(DType::F32, 40, 320, false, name);
        let input = Input::new(device, DType::F32, Layout::new(&[40], 1, 0), 320, 640, values, name)?;
        let options = Options {
            rows: RowsKind::All,
            weights: WeightsKind::PerRow(FACTOR),
            clamp: None,
            count: false,
            npc: 32,
            sf: SfLayout::RowMajor,
            round,
            amax_min: None,
        };
        let mut outputs = Outputs::new(device, &input, options)?;
        outputs.run(&device.stream().map_err(text)?, &input, options, 4).map_err(text)?;
        decoded(&outputs, 10)
    };
    for round in [true, false] {
        check_close(name, &run(&ctx.device, round)?, &run(&Device::emulator(), round)?)?;
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
    let values = normal(DType::Bf16, 2 * h as usize, name);
    let mut input = Input::new(&ctx.device, DType::Bf16, Layout::new(&[1], 1, 0), h, 2 * h, values, name)?;
    let (rows, weights, clamp) = (RowsKind::All, WeightsKind::None, None);
    let (values, _) = reference(&input, &Exp::new(&ctx.device, &input, clamp)?, clamp, rows, weights);
    (input.num_rows, input.stride) = (t, 0);
    for npc in [128, 0] {
        let options =
            Options { rows, weights, clamp, count: false, npc, sf: SfLayout::ColMajorPacked, round: true, amax_min: None };
        let expected = quantise(&values, h as usize, options.npc(&input) as usize, true, 1e-4);
        let mut outputs = Outputs::new(&ctx.device, &input, options)?;
        outputs.run(&ctx.device.stream().map_err(text)?, &input, options, 4).map_err(text)?;
        let data = outputs.data.to_vec().map_err(text)?;
        let rows = data[..data.len() - GUARD].par_chunks_exact(h as usize);
        if let Some(bad) = rows.enumerate().find_map_any(|(i, row)| (row != expected.data).then_some(i)) {
            return Err(format!("data: row {bad} differs; {name}"));
        }
        let words = sf_words(&expected.sf, expected.sf.len(), options.sf);
        let SfShape { shape, strides, .. } = &outputs.sf_shape;
        let all: Vec<u32> = words.iter().copied().cycle().take(words.len() * t as usize).collect();
        compare::equal_strided("sf", name, shape, strides, &outputs.sf.to_vec().map_err(text)?, &all)?;
    }
    Ok(())
}

// The benchmark.

/// Which rows a row of the benchmark has.
#[derive(Clone, Copy)]
enum Tokens {
    /// So many, all with tokens.
    Dense(u64),
    /// A sixteenth of so many with tokens.
    Sparse(u64),
    /// What rank 0 receives, experts from multiples of a number on.
    Moe(MoeCase, u32),
}

impl Tokens {
    fn layout(self) -> Layout {
        match self {
            Tokens::Dense(t) => Layout::new(&[t], 1, 0),
            Tokens::Sparse(t) => Layout::new(&[t / 16], 128, t - t / 16),
            Tokens::Moe(case, alignment) => Layout::of_moe(&case, alignment),
        }
    }
}

/// One row. Bytes are those of rows that hold tokens if the call says which do, scales included.
fn row(case: String, dtype: DType, tokens: Tokens, h: u64, options: Options) -> Row {
    let layout = tokens.layout();
    let used = match options.rows {
        RowsKind::All => layout.num_rows,
        _ => layout.pos_to_expert.iter().filter(|expert| **expert >= 0).count() as u64,
    };
    let npc = if options.npc == 0 { h } else { options.npc.into() };
    let bytes = used * (h * (2 * dtype.size() + 1) + 4 * options.sf.columns(h.div_ceil(npc)));
    let build = move |device: &Device, _: &Stream| -> Result<Launch, String> {
        let input = Input::bench(device, dtype, tokens.layout(), h)?;
        let mut outputs = Outputs::new(device, &input, options)?;
        // 1.0.0, which alone says it by the experts of rows, has no counter of elements.
        let counters = if options.rows == RowsKind::PosToExpert { 3 } else { 4 };
        Ok(Box::new(move |stream| outputs.run(stream, &input, options, counters)))
    };
    Row { op: "swiglu_forward_and_per_token_cast", case, bytes, build: Box::new(build) }
}

const PACKED: Options = Options {
    rows: RowsKind::All,
    weights: WeightsKind::None,
    clamp: None,
    count: false,
    npc: 128,
    sf: SfLayout::ColMajorPacked,
    round: true,
    amax_min: None,
};

/// The peers' cases, options and small inputs. With a clamp what it does is counted too.
pub fn bench() -> Vec<Row> {
    let mut rows = peers();
    let (shape, clamped) = (Tokens::Dense(32768), |clamp| Options { clamp: Some(clamp), count: true, ..PACKED });
    for h in [2048, 3072, 1024, 1280, 1536, 3584] {
        rows.push(row(format!("h={h},npc=128,sf=packed,t=32768"), DType::Bf16, shape, h, PACKED));
    }
    let case = "clamp=10,h=2048,npc=128,sf=packed,t=32768".to_owned();
    rows.push(row(case, DType::Bf16, shape, 2048, clamped(10.0)));
    let psum = Options { rows: RowsKind::Psum, ..PACKED };
    let case = "h=2048,npc=128,psum=True,sf=packed,t=32768,weights=True".to_owned();
    let weights = Options { weights: WeightsKind::PerRow(FACTOR), ..psum };
    rows.push(row(case, DType::Bf16, shape, 2048, weights));
    let case = "h=2048,npc=128,psum=True,sf=packed,t=32768,used=2048".to_owned();
    rows.push(row(case, DType::Bf16, Tokens::Sparse(32768), 2048, psum));
    for t in [1, 16, 128] {
        let case = format!("h=2048,npc=128,sf=packed,t={t}");
        rows.push(row(case, DType::Bf16, Tokens::Dense(t), 2048, PACKED));
    }
    for h in [2048, 3584] {
        let case = format!("clamp=0.5,h={h},npc=128,sf=packed,t=32768");
        rows.push(row(case, DType::Bf16, shape, h, clamped(0.5)));
        for (npc, sf, name) in [
            (32, SfLayout::ColMajorPacked, "packed"),
            (32, SfLayout::RowMajor, "row"),
            (128, SfLayout::RowMajor, "row"),
            (0, SfLayout::RowMajor, "row"),
        ] {
            let of = if npc == 0 { h } else { npc.into() };
            let case = format!("h={h},npc={of},sf={name},t=32768");
            rows.push(row(case, DType::Bf16, shape, h, Options { npc, sf, ..PACKED }));
        }
    }
    let by_row = Options { npc: 0, sf: SfLayout::RowMajor, ..clamped(0.5) };
    rows.push(row("clamp=0.5,h=2048,npc=2048,sf=row,t=32768".to_owned(), DType::Bf16, shape, 2048, by_row));
    let plain = Options { round: false, sf: SfLayout::RowMajor, ..PACKED };
    rows.push(row("h=2048,npc=128,round=False,sf=row,t=32768".to_owned(), DType::Bf16, shape, 2048, plain));
    rows.push(row("h=2048,input=f32,npc=128,sf=packed,t=32768".to_owned(), DType::F32, shape, 2048, PACKED));
    rows
}

/// Their cases of experts: rows as 1.0.0's own benchmark has them, with what it says about them, and as 2.1.0 says it.
fn peers() -> Vec<Row> {
    let mut rows = Vec::new();
    let mut add = |(e, ep, k): (u64, u64, u64), h: u64, mut o: Options, alignment: u32| {
        o.count = o.clamp.is_some();
        let clamp = o.clamp.map_or(String::new(), |c| format!("clamp={c},"));
        let (masked, psum) = match o.rows {
            RowsKind::All => ("", ""),
            RowsKind::PosToExpert => ("pos_to_expert=True,", ""),
            RowsKind::Psum => ("", "psum=True,"),
        };
        let weights = if o.weights == WeightsKind::None { "" } else { ",weights=True" };
        let npc = o.npc;
        let case = format!("{clamp}e={e},ep={ep},h={h},k={k},npc={npc},{masked}{psum}send=4001,sf=packed{weights}");
        let moe = MoeCase { num_send_tokens: 4001, num_topk: k, num_experts: e, num_ranks: ep };
        rows.push(row(case, DType::Bf16, Tokens::Moe(moe, alignment), h, o));
    };
    let masked = Options { rows: RowsKind::PosToExpert, ..PACKED };
    let psum = Options { rows: RowsKind::Psum, ..PACKED };
    let clamp = Some(0.5);
    add((9, 8, 8), 1024, masked, 16);
    add((9, 8, 8), 1536, Options { clamp, ..masked }, 16);
    add((9, 8, 8), 3072, PACKED, 16);
    add((32, 8, 8), 1024, Options { clamp, ..PACKED }, 16);
    add((32, 8, 8), 2048, masked, 16);
    add((32, 8, 8), 3584, Options { clamp, ..masked }, 16);
    add((4, 64, 8), 1280, PACKED, 16);
    add((4, 64, 8), 2048, Options { clamp, ..PACKED }, 16);
    add((9, 8, 2), 2048, masked, 16);
    add((32, 8, 8), 2048, psum, 128);
    add((32, 8, 8), 2048, Options { npc: 32, weights: WeightsKind::PerRow(FACTOR), ..psum }, 128);
    add((32, 8, 8), 3584, Options { clamp, ..psum }, 128);
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::support::rng::Rng;
    use ferrotile::quant::{ExpertRows, RowWeights};
    use half::bf16;
    use proptest::prelude::{ProptestConfig, proptest};

    #[test]
    fn suite() {
        SUITE.test();
    }

    #[test]
    fn the_reference_reproduces_the_published_vectors() {
        let x = [0.1, -0.25, 1.0, 3.0, -7.5, 0.0, -0.0, 100.0];
        let plain = quantise(&x, 8, 8, false, 1e-4);
        assert_eq!((plain.sf[0].to_bits(), &plain.data[..]), (0x3E64_9249, &[0x2E, 0xB9, 0x49, 0x55, 0xE0, 0, 0x80, 0x7E][..]));
        let rounded = quantise(&x, 8, 8, true, 1e-4);
        assert_eq!(
            (rounded.sf[0].to_bits(), &rounded.data[..]),
            (0x3E80_0000, &[0x2D, 0xB8, 0x48, 0x54, 0xDF, 0, 0x80, 0x7C][..])
        );
        assert_eq!(quantise(&[0.0; 8], 8, 8, true, 1e-4).sf[0].to_bits(), 105 << 23);
        assert_eq!([e4m3(449.0), e4m3(-1e9), e4m3(2f32.powi(-10)), e4m3(1.5 * 2f32.powi(-9))], [0x7E, 0xFE, 0, 2]);
    }

    /// Arguments that this op has beyond those of `swiglu_forward`, whose checks the two share.
    #[test]
    fn bad_arguments_are_named() {
        let device = Device::emulator();
        let x = device.zeros::<bf16>(4096).unwrap();
        let mut out = device.zeros::<u8>(4096).unwrap();
        let (mut sf, mut packed) = (device.zeros::<f32>(256).unwrap(), device.zeros::<Ue8m0x4>(256).unwrap());
        let mut counts = device.zeros::<i64>(4).unwrap();
        out.fill_bytes(FILL).unwrap();
        sf.fill_bytes(FILL).unwrap();
        packed.fill_bytes(FILL).unwrap();
        /// What is changed in a call that is fine.
        #[derive(Clone, Copy)]
        struct Call<'a> {
            npc: u32,
            round_sf: bool,
            sf_clamp_min: Option<f32>,
            clamp: Option<f32>,
            out: (&'a [u64], DType, u64),
            sf: (&'a [u64], SfLayout),
        }
        let call = Call {
            npc: 32,
            round_sf: true,
            sf_clamp_min: None,
            clamp: Some(1.0),
            out: (&[8, 64], DType::E4m3, 0),
            sf: (&[8, 2], SfLayout::RowMajor),
        };
        let mut run = |call: Call<'_>| {
            let strides: Vec<u64> = (0..call.out.0.len()).map(|i| call.out.0[i + 1..].iter().product()).collect();
            let tensor = match call.sf.1 {
                layout if layout.is_packed() => packed.tensor_mut(call.sf.0).unwrap(),
                _ => sf.tensor_mut(call.sf.0).unwrap(),
            };
            let args = Args {
                x: x.tensor(&[8, 128]).unwrap(),
                rows: ExpertRows::All,
                weights: RowWeights::None,
                clamp_value: call.clamp,
                clamped_count: Some(counts.tensor_mut(&[4]).unwrap()),
                npc: call.npc,
                round_sf: call.round_sf,
                sf_clamp_min: call.sf_clamp_min,
                out: out.strided_mut(call.out.0, &strides, call.out.2).unwrap().reinterpret(call.out.1).unwrap(),
                sf: SfMut { tensor, layout: call.sf.1 },
            };
            let result = op::swiglu_forward_and_per_token_cast(&device.stream().unwrap(), args);
            if result.is_err() {
                assert!(out.to_vec().unwrap().iter().all(|b| *b == FILL), "out was written");
                let fill = u32::from_ne_bytes([FILL; 4]);
                assert!(sf.to_vec().unwrap().iter().all(|v| v.to_bits() == fill), "sf was written");
                assert!(packed.to_vec().unwrap().iter().all(|v| v.0 as u32 == fill), "sf was written");
                assert_eq!(counts.to_vec().unwrap(), [0; 4]);
            }
            result
        };
        let mut refuses = |call: Call<'_>, start: &str| {
            let text = run(call).expect_err(start).to_string();
            assert!(text.starts_with(&format!("swiglu_forward_and_per_token_cast: {start}")), "{text}\nexpected {start}");
        };
        refuses(Call { npc: 48, ..call }, "npc is 48, allowed: 32, 128, 64");
        refuses(Call { npc: 0, ..call }, "npc is 0, allowed: 32, 128, 64");
        refuses(Call { sf_clamp_min: Some(0.0), ..call }, "sf_clamp_min is 0e0, allowed: 1e-30 to 1e30");
        refuses(Call { sf_clamp_min: Some(f32::NAN), ..call }, "sf_clamp_min is NaN, allowed: 1e-30 to 1e30");
        refuses(Call { clamp: None, ..call }, "clamp_value is none, allowed: a positive number with clamped_count");
        refuses(Call { out: (&[8, 64], DType::U8, 0), ..call }, "out is u8, allowed: e4m3");
        refuses(Call { out: (&[8, 32], DType::E4m3, 0), ..call }, "out has shape [8, 32], expected [8, 64]");
        refuses(Call { out: (&[8, 64], DType::E4m3, 4), ..call }, "layout of out is");
        refuses(Call { sf: (&[8, 3], SfLayout::RowMajor), ..call }, "sf has shape [8, 3], expected [8, 2]");
        refuses(Call { sf: (&[8, 2], SfLayout::ColMajor), ..call }, "layout of sf is");
        refuses(Call { sf: (&[8, 2], SfLayout::RowMajorE4m3), ..call }, "layout of sf is row-major e4m3, expected");
        let row_packed = (&[8, 1][..], SfLayout::RowMajorPacked);
        refuses(
            Call { sf: row_packed, round_sf: false, ..call },
            "round_sf is false, allowed: true with row-major packed scales",
        );
        // What all of this was derived from is fine.
        run(call).unwrap();
        run(Call { npc: 64, sf: (&[8, 1], SfLayout::RowMajor), ..call }).unwrap();
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        /// Any shape, layout, type and range of values.
        #[test]
        fn any_input(
            counts in proptest::collection::vec(0u64..7, 0..20), alignment in 1u32..20, tail in 0u64..4, eighths in 1u64..140,
            gap in 0u64..3, f32_input: bool, kind in 0usize..3, weights in 0usize..3, clamp in 0usize..3, npc in 0usize..3,
            round: bool, layout in 0usize..4, exponent in -20i32..20, count: bool, seed: u64,
        ) {
            let device = Device::emulator();
            let h = 8 * eighths;
            let rows = Layout::new(&counts, alignment, tail);
            let dtype = if f32_input { DType::F32 } else { DType::Bf16 };
            let values = Rng::new(seed).fill((rows.num_rows * 2 * h) as usize, |rng, i| {
                let v = rng.normal(i) * 2f32.powi(exponent);
                if f32_input { v } else { bf16::from_f32(v).to_f32() }
            });
            let input = Input::new(&device, dtype, rows, h, 2 * h + 8 * gap, values, "any").unwrap();
            let clamp = [None, Some(10.0), Some(0.3)][clamp];
            let options = Options {
                rows: ROWS[kind],
                weights: WEIGHTS[weights],
                clamp,
                count: count && clamp.is_some(),
                npc: [32, 128, 0][npc],
                sf: if round { ROUNDED[layout] } else { PLAIN[layout % 2] },
                round,
                amax_min: None,
            };
            let exp = Exp::new(&device, &input, clamp).unwrap();
            let (values, counts) = reference(&input, &exp, clamp, options.rows, options.weights);
            let expected = quantise(&values, h as usize, options.npc(&input) as usize, round, 1e-4);
            let mut outputs = Outputs::new(&device, &input, options).unwrap();
            outputs.run(&device.stream().unwrap(), &input, options, 4).unwrap();
            outputs.check("any", &input, options, &expected).unwrap();
            outputs.check_counts("any", if options.count { counts } else { [0; 4] }, 4).unwrap();
        }
    }
}
