//! Reference, cases, checks and benchmark rows of `swiglu_forward`.

use super::common_swiglu::{Exp, Input, Layout, RowsKind, WeightsKind, awkward, normal, reference};
use crate::support::bench::{Launch, Row};
use crate::support::cases::{Depth, MoeCase, moe_bench_cases};
use crate::support::compare;
use crate::support::golden::{self, Case, Golden};
use crate::support::suite::{Ctx, Report, Suite, ensure, text};
use ferrotile::quant::swiglu_forward::{Args, swiglu_forward};
use ferrotile::{Buffer, DType, Device, Stream};
use half::bf16;
use rayon::prelude::*;

/// What the `check` binary runs.
pub const SUITE: Suite = Suite { op: "swiglu_forward", run };

/// Bytes behind an output that must stay as they are, and what rows without a token keep.
const GUARD: usize = 64;
const FILL: u8 = 0xA5;

/// Options of one call.
#[derive(Clone, Copy, Debug)]
struct Options {
    rows: RowsKind,
    weights: WeightsKind,
    clamp: Option<f32>,
    count: bool,
    out: DType,
}

/// Output buffers of one call. Counters start at 100.
struct Outputs {
    shape: [u64; 2],
    dtype: DType,
    data: Buffer<u8>,
    counts: Buffer<i64>,
}

impl Outputs {
    fn new(device: &Device, input: &Input, dtype: DType) -> Result<Self, String> {
        let shape = [input.num_rows, input.hidden];
        let mut data = device.alloc::<u8>((shape[0] * shape[1] * dtype.size()) as usize + GUARD).map_err(text)?;
        data.fill_bytes(FILL).map_err(text)?;
        Ok(Self { shape, dtype, data, counts: device.upload(&[100; 4]).map_err(text)? })
    }

    fn run(&mut self, stream: &Stream, input: &Input, options: Options, counters: u64) -> ferrotile::Result<()> {
        let bytes = self.shape[0] * self.shape[1] * self.dtype.size();
        let flat = self.data.strided_mut(&[bytes], &[1], 0)?;
        // SAFETY: the tensor covers the same bytes, seen as another element type.
        let out =
            unsafe { ferrotile::TensorMut::from_raw(flat.device(), flat.ptr(), self.dtype, &self.shape, &[self.shape[1], 1])? };
        let clamped_count = if options.count { Some(self.counts.strided_mut(&[counters], &[1], 0)?) } else { None };
        swiglu_forward(
            stream,
            Args {
                x: input.x()?,
                rows: input.rows(options.rows)?,
                weights: input.weights(options.weights)?,
                clamp_value: options.clamp,
                clamped_count,
                out,
            },
        )
    }

    /// `expected` in rows that hold tokens, nothing elsewhere; any NaN of f32 is as good as another.
    fn check(&self, name: &str, input: &Input, rows: RowsKind, expected: &[f32]) -> Result<(), String> {
        let data = self.data.to_vec().map_err(text)?;
        let (data, guard) = data.split_at(data.len() - GUARD);
        ensure(guard.iter().all(|b| *b == FILL), || format!("out: bytes behind the tensor were written; {name}"))?;
        let h = self.shape[1].max(1) as usize;
        let untouched = |i: usize| !input.holds_token(rows, i / h);
        if self.dtype == DType::Bf16 {
            let fill = bf16::from_bits(u16::from_ne_bytes([FILL; 2]));
            let one = |(i, v): (usize, &f32)| match v {
                _ if untouched(i) => fill,
                v if v.is_nan() => bf16::from_bits(0x7FFF),
                v => bf16::from_f32(*v),
            };
            let expected: Vec<bf16> = expected.par_iter().enumerate().map(one).collect();
            compare::equal("out", name, &self.shape, bytemuck::cast_slice(data), &expected)
        } else {
            let fill = f32::from_ne_bytes([FILL; 4]);
            let canonical = |v: f32| if v.is_nan() { f32::NAN } else { v };
            let got: Vec<f32> = bytemuck::cast_slice(data).par_iter().map(|v| canonical(*v)).collect();
            let one = |(i, v): (usize, &f32)| if untouched(i) { fill } else { canonical(*v) };
            let expected: Vec<f32> = expected.par_iter().enumerate().map(one).collect();
            compare::equal("out", name, &self.shape, &got, &expected)
        }
    }

    fn check_counts(&self, name: &str, expected: [i64; 4], counters: u64) -> Result<(), String> {
        let expected: Vec<i64> = (0..4).map(|i| 100 + if i < counters { expected[i as usize] } else { 0 }).collect();
        compare::equal("clamped_count", name, &[4], &self.counts.to_vec().map_err(text)?, &expected)
    }
}

/// Calls with these options, results compared bit for bit.
fn check_input(ctx: &Ctx, input: &Input, all: &[Options], kind: &str) -> Result<(), String> {
    let stream = ctx.device.stream().map_err(text)?;
    for (i, &options) in all.iter().enumerate() {
        let Options { rows, weights, clamp, count, out } = options;
        let name = format!(
            "clamp={clamp:?},count={count},h={},input={},kind={kind},out={out},rows={rows:?},stride={},t={},weights={weights:?}",
            input.hidden, input.dtype, input.stride, input.num_rows
        );
        if !ctx.case(&name) {
            continue;
        }
        let (values, counts) = reference(input, &Exp::new(&ctx.device, input, clamp)?, clamp, rows, weights);
        let mut outputs = Outputs::new(&ctx.device, input, out)?;
        let counters = 3 + i as u64 % 2;
        outputs.run(&stream, input, options, counters).map_err(text)?;
        outputs.check(&name, input, rows, &values)?;
        let mut expected = if count { counts } else { [0; 4] };
        outputs.check_counts(&name, expected, counters)?;
        if i == 0 {
            // Once more, over its own results; counters go on.
            outputs.run(&stream, input, options, counters).map_err(text)?;
            outputs.check(&name, input, rows, &values)?;
            expected = expected.map(|n| 2 * n);
            outputs.check_counts(&name, expected, counters)?;
        }
    }
    Ok(())
}

const FACTOR: f32 = 2.5;
const CLAMPS: [Option<f32>; 3] = [None, Some(10.0), Some(0.5)];

/// Every option at least once, for a given type of the input; more of them where it costs little.
fn options(full: bool) -> Vec<Options> {
    let mut all = Vec::new();
    for (i, out) in [DType::Bf16, DType::F32].into_iter().enumerate() {
        for (j, rows) in [RowsKind::Psum, RowsKind::All, RowsKind::PosToExpert].into_iter().enumerate() {
            for (k, clamp) in [CLAMPS[0], CLAMPS[1], CLAMPS[2], Some(0.3)].into_iter().enumerate() {
                let kinds = [WeightsKind::PerRow(FACTOR), WeightsKind::None, WeightsKind::PerTokenTopk];
                let weights = kinds[(i + j + k) % 3];
                if full || (i + j + k) % 2 == 0 {
                    all.push(Options { rows, weights, clamp, count: clamp.is_some() && (i + k) % 2 == 1, out });
                }
            }
        }
    }
    all
}

/// Counts of experts with an empty first, inner and last one.
const COUNTS: [u64; 9] = [0, 5, 0, 0, 13, 8, 1, 16, 0];

fn run(ctx: &Ctx) -> Result<Report, String> {
    for dtype in [DType::Bf16, DType::F32] {
        let input = |layout: Layout, h: u64, gap: u64, kind: &str| {
            let name = format!("swiglu_forward {dtype} {} {h} {kind}", layout.num_rows);
            let values = match kind {
                "awkward" => awkward(dtype, layout.num_rows, h, true, &name),
                _ => normal(dtype, (layout.num_rows * 2 * h) as usize, &name),
            };
            Input::new(&ctx.device, dtype, layout, h, 2 * h + gap, values, &name)
        };
        let every = options(true);
        check_input(ctx, &input(Layout::new(&COUNTS, 8, 3), 136, 0, "awkward")?, &every, "awkward")?;
        // More than a warp's share of experts, an alignment that is no power of two, ragged rows far apart.
        let counts: Vec<u64> = (0..70).map(|e| [1, 0, 2][e % 3]).collect();
        check_input(ctx, &input(Layout::new(&counts, 3, 1), 320, 24, "normal, apart")?, &options(false), "normal, apart")?;
        check_input(ctx, &input(Layout::new(&[1], 1, 0), 8, 0, "normal")?, &every[..4], "normal")?;
        check_input(ctx, &input(Layout::new(&[0, 0], 4, 0), 64, 0, "empty")?, &every[..4], "empty")?;
        check_input(ctx, &input(Layout::new(&[0, 0], 4, 6), 64, 0, "all padding")?, &every[..4], "all padding")?;
        check_input(ctx, &input(Layout::new(&[3], 4, 0), 0, 0, "empty")?, &every[..2], "empty")?;
        check_input(ctx, &input(Layout::new(&[], 4, 3), 64, 0, "no experts")?, &every[..4], "no experts")?;
        if ctx.depth == Depth::Small {
            continue;
        }
        for t in [1, 512, 8001] {
            for h in [64, 128, 192, 384, 1024, 1280, 1536, 2048, 3072, 3584] {
                check_input(ctx, &input(Layout::new(&[t], 1, 0), h, 0, "normal")?, &every[4..6], "normal")?;
            }
        }
        let cases: Vec<MoeCase> = moe_bench_cases().into_iter().step_by(2).collect();
        for (i, h) in [1024, 1280, 1536, 2048, 3072, 3584].into_iter().enumerate() {
            let layout = Layout::of_moe(&cases[i % cases.len()], 128);
            check_input(ctx, &input(layout, h, 0, "normal")?, &[every[i], every[11 - i], every[12 + i]], "moe")?;
        }
    }
    if !ctx.device.is_emulator() {
        check_graph(ctx)?;
        check_emulator(ctx)?;
        if ctx.depth == Depth::Full {
            check_large_output(ctx)?;
        }
    }
    let notes = golden::check_cases(ctx, &["swiglu_forward_backward"], |golden, case| check_golden(ctx, golden, case))?;
    Ok(Report { notes, ..ctx.report() })
}

/// What 2.1.0 computed, recorded together with the gradients: bit for bit on a GPU; on the emulator, whose `exp` differs in the last bit,
/// some last bits of f32 differ, and the last bit of bf16 now and then.
fn check_golden(ctx: &Ctx, golden: &Golden, case: &Case) -> Result<(), String> {
    let (name, keys) = (case.name(), golden.keys(case));
    let has = |key: &str| keys.iter().any(|k| k == key);
    let shape = golden.tensor(case, "in/x")?.shape;
    let (t, h) = (shape[0], shape[1] / 2);
    let dtype = if case.param::<String>("fmt")? == "bf16" { DType::Bf16 } else { DType::F32 };
    let psum = if has("in/psum") { golden.tensor(case, "in/psum")?.to_vec()? } else { vec![t as i32] };
    let rows = if has("in/psum") { RowsKind::Psum } else { RowsKind::All };
    let (kind, weights) = if has("in/topk_weights") {
        (WeightsKind::PerRow(1.0), golden.tensor(case, "in/topk_weights")?.to_vec()?)
    } else {
        (WeightsKind::None, vec![0.0; t as usize])
    };
    let given = (weights, vec![0.0; 4], vec![-1; t as usize]);
    let (layout, values) = (from_psum(&psum, 128, t), golden.tensor(case, "in/x")?.floats()?);
    let input = Input::with_weights(&ctx.device, dtype, layout, h, (2 * h, 2 * h), values, given)?;
    let options = Options { rows, weights: kind, clamp: case.param("clamp_value")?, count: false, out: dtype };
    let mut outputs = Outputs::new(&ctx.device, &input, dtype)?;
    let stream = ctx.device.stream().map_err(text)?;
    outputs.run(&stream, &input, options, 4).map_err(text)?;
    stream.synchronize().map_err(text)?;

    let expected = golden.tensor(case, "out/fwd")?.floats()?;
    let got = outputs.data.to_vec().map_err(text)?;
    let got = &got[..got.len() - GUARD];
    let got: Vec<f32> = match dtype {
        DType::Bf16 => got.chunks_exact(2).map(|b| bf16::from_ne_bytes([b[0], b[1]]).to_f32()).collect(),
        _ => got.chunks_exact(4).map(|b| f32::from_ne_bytes([b[0], b[1], b[2], b[3]])).collect(),
    };
    ensure(got.len() == expected.len(), || format!("{} values, {} recorded; {name}", got.len(), expected.len()))?;
    let (step, most) = match (ctx.device.is_emulator(), dtype) {
        (false, _) => (0.0, 1.0),
        (true, DType::Bf16) => (2f32.powi(-7), 0.999),
        (true, _) => (2f32.powi(-21), 0.5),
    };
    let mut equal = 0;
    for i in (0..got.len()).filter(|i| input.holds_token(rows, i / h as usize)) {
        let (got, expected) = (got[i], expected[i]);
        let allowed = step * got.abs().max(expected.abs()).max(f32::MIN_POSITIVE);
        ensure((got - expected).abs() <= allowed, || format!("element {i}: got {got}, expected {expected}; {name}"))?;
        equal += (got.to_bits() == expected.to_bits()) as usize;
    }
    ensure(equal as f64 >= most * (input.num_used(rows) * h) as f64, || format!("only {equal} equal; {name}"))
}

/// The layout that ends describe.
fn from_psum(psum: &[i32], alignment: u32, num_rows: u64) -> Layout {
    let mut start = 0;
    let counts: Vec<u64> = psum
        .iter()
        .map(|end| {
            let count = *end as u64 - start;
            start = (*end as u64).next_multiple_of(alignment.into());
            count
        })
        .collect();
    let mut layout = Layout::new(&counts, alignment, 0);
    layout.pos_to_expert.resize(num_rows as usize, -1);
    layout.num_rows = num_rows;
    layout
}

/// The launcher recorded in a graph and replayed.
fn check_graph(ctx: &Ctx) -> Result<(), String> {
    let name = "kind=graph,h=320";
    if !ctx.case(name) {
        return Ok(());
    }
    let layout = Layout::new(&COUNTS, 16, 0);
    let values = normal(DType::Bf16, layout.num_rows as usize * 640, name);
    let input = Input::new(&ctx.device, DType::Bf16, layout, 320, 640, values, name)?;
    let (rows, clamp, weights) = (RowsKind::Psum, Some(0.5), WeightsKind::PerRow(FACTOR));
    let options = Options { rows, weights, clamp, count: true, out: DType::Bf16 };
    let (expected, counts) = reference(&input, &Exp::new(&ctx.device, &input, clamp)?, clamp, rows, weights);
    let stream = ctx.device.stream().map_err(text)?;
    let mut outputs = Outputs::new(&ctx.device, &input, DType::Bf16)?;
    let graph = stream.capture(|s| outputs.run(s, &input, options, 4)).map_err(text)?;
    for replay in 1..3 {
        outputs.data.fill_bytes(FILL).map_err(text)?;
        graph.launch(&stream).map_err(text)?;
        stream.synchronize().map_err(text)?;
        outputs.check(name, &input, rows, &expected)?;
        outputs.check_counts(name, counts.map(|n| n * replay), 4)?;
    }
    Ok(())
}

/// The emulator's results are those of the device but for the last bits of `exp`.
fn check_emulator(ctx: &Ctx) -> Result<(), String> {
    let name = "kind=both backends,h=320";
    if !ctx.case(name) {
        return Ok(());
    }
    let run = |device: &Device| -> Result<Vec<f32>, String> {
        let values = awkward(DType::F32, 40, 320, false, name);
        let input = Input::new(device, DType::F32, Layout::new(&[40], 1, 0), 320, 640, values, name)?;
        let mut outputs = Outputs::new(device, &input, DType::F32)?;
        let options =
            Options { rows: RowsKind::All, weights: WeightsKind::PerRow(FACTOR), clamp: None, count: false, out: DType::F32 };
        outputs.run(&device.stream().map_err(text)?, &input, options, 4).map_err(text)?;
        let data = outputs.data.to_vec().map_err(text)?;
        // NaN on both sides is equal.
        Ok(data[..data.len() - GUARD].chunks_exact(4).map(|b| f32::from_ne_bytes([b[0], b[1], b[2], b[3]])).collect())
    };
    let (got, expected) = (run(&ctx.device)?, run(&Device::emulator())?);
    ensure(got.iter().zip(&expected).all(|(a, b)| a.is_nan() == b.is_nan()), || format!("NaN in different places; {name}"))?;
    let number = |v: Vec<f32>| -> Vec<f32> { v.into_iter().map(|v| if v.is_nan() { 0.0 } else { v }).collect() };
    let (got, expected) = (number(got), number(expected));
    // 2 units in the last place of exp, one for each of four operations, and results below the normal numbers.
    compare::allclose("out", name, &[40, 320], &got, &expected, (1e-37, 6.0 * 2f64.powi(-23)))
}

/// More than 2^31 output elements. All rows are one row in memory (stride 0), so every row of the output must be the same.
fn check_large_output(ctx: &Ctx) -> Result<(), String> {
    let (t, h) = (300_001u64, 7168u64);
    let name = "kind=large output,h=7168,t=300001";
    if !ctx.case(name) {
        return Ok(());
    }
    let mut input =
        Input::new(&ctx.device, DType::Bf16, Layout::new(&[1], 1, 0), h, 2 * h, normal(DType::Bf16, 2 * h as usize, name), name)?;
    let options = Options { rows: RowsKind::All, weights: WeightsKind::None, clamp: None, count: false, out: DType::Bf16 };
    let (expected, _) = reference(&input, &Exp::new(&ctx.device, &input, None)?, None, RowsKind::All, WeightsKind::None);
    let expected: Vec<u8> = expected.iter().flat_map(|v| bf16::from_f32(*v).to_bits().to_ne_bytes()).collect();
    (input.num_rows, input.stride) = (t, 0);
    let mut outputs = Outputs::new(&ctx.device, &input, DType::Bf16)?;
    outputs.run(&ctx.device.stream().map_err(text)?, &input, options, 4).map_err(text)?;
    let data = outputs.data.to_vec().map_err(text)?;
    let rows = data[..data.len() - GUARD].par_chunks_exact(2 * h as usize);
    match rows.enumerate().find_map_any(|(i, row)| (row != expected).then_some(i)) {
        Some(bad) => Err(format!("out: row {bad} differs; {name}")),
        None => Ok(()),
    }
}

// The benchmark.

fn row(case: String, dtype: DType, layout: fn(u64) -> Layout, (t, h): (u64, u64), options: Options) -> Row {
    let used = match options.rows {
        RowsKind::All => t,
        _ => layout(t).pos_to_expert.iter().filter(|expert| **expert >= 0).count() as u64,
    };
    let bytes = used * h * (2 * dtype.size() + options.out.size());
    let build = move |device: &Device, _: &Stream| -> Result<Launch, String> {
        let input = Input::bench(device, dtype, layout(t), h)?;
        let mut outputs = Outputs::new(device, &input, options.out)?;
        Ok(Box::new(move |stream| outputs.run(stream, &input, options, 4)))
    };
    Row { op: "swiglu_forward", case, bytes, build: Box::new(build) }
}

/// All rows of a benchmark hold tokens.
fn dense(t: u64) -> Layout {
    Layout::new(&[t], 1, 0)
}

/// A sixteenth of the rows hold tokens.
fn sparse(t: u64) -> Layout {
    Layout::new(&[t / 16], 128, t - t / 16)
}

/// The peer's cases, shapes of models, options, and small inputs. With a clamp what it does is counted too.
pub fn bench() -> Vec<Row> {
    let plain = Options { rows: RowsKind::All, weights: WeightsKind::None, clamp: None, count: false, out: DType::Bf16 };
    let mut rows = Vec::new();
    let shapes = [
        (32768, 2048),
        (32768, 3072),
        (32768, 1280),
        (32768, 1536),
        (32768, 3584),
        (8001, 7168),
        (1, 2048),
        (16, 2048),
        (128, 2048),
    ];
    for (t, h) in shapes {
        rows.push(row(format!("fmt=bf16,h={h},input=bf16,t={t}"), DType::Bf16, dense, (t, h), plain));
    }
    let shape = (32768, 2048);
    let f32_out = Options { out: DType::F32, ..plain };
    rows.push(row("fmt=fp32,h=2048,input=f32,t=32768".to_owned(), DType::F32, dense, shape, f32_out));
    for clamp in [10.0, 0.5] {
        let case = format!("clamp={clamp},fmt=bf16,h=2048,input=bf16,t=32768");
        rows.push(row(case, DType::Bf16, dense, shape, Options { clamp: Some(clamp), count: true, ..plain }));
    }
    let weights = Options { rows: RowsKind::Psum, weights: WeightsKind::PerRow(FACTOR), ..plain };
    let case = "fmt=bf16,h=2048,input=bf16,psum=True,t=32768,weights=True";
    rows.push(row(case.to_owned(), DType::Bf16, dense, shape, weights));
    let case = "fmt=bf16,h=2048,input=bf16,psum=True,t=32768,used=2048";
    rows.push(row(case.to_owned(), DType::Bf16, sparse, shape, Options { rows: RowsKind::Psum, ..plain }));
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::support::rng::Rng;
    use ferrotile::quant::{ExpertRows, RowWeights};
    use ferrotile::{Error, TensorMut, TensorRef};
    use proptest::prelude::{ProptestConfig, proptest};

    #[test]
    fn suite() {
        SUITE.test();
    }

    /// Buffers for calls that must be refused.
    struct Refused {
        device: Device,
        x: Buffer<bf16>,
        map: Buffer<i32>,
        weights: Buffer<f32>,
        out: Buffer<bf16>,
        counts: Buffer<i64>,
    }

    impl Refused {
        fn new() -> Self {
            let device = Device::emulator();
            let mut out = device.zeros(1024).unwrap();
            out.fill_bytes(FILL).unwrap();
            Self {
                x: device.zeros(2048).unwrap(),
                map: device.zeros(64).unwrap(),
                weights: device.zeros(64).unwrap(),
                out,
                counts: device.zeros(8).unwrap(),
                device,
            }
        }

        /// A call that is fine but for what `change` does fails with a text that starts like this, and nothing was written.
        fn refuses(&mut self, start: &str, change: impl for<'a> FnOnce(&mut Args<'a>, &'a Others<'a>)) {
            let other = Others { x: &self.x, map: &self.map, weights: &self.weights, device: &self.device };
            let mut args = Args {
                x: self.x.tensor(&[8, 64]).unwrap(),
                rows: ExpertRows::All,
                weights: RowWeights::None,
                clamp_value: Some(1.0),
                clamped_count: Some(self.counts.strided_mut(&[4], &[1], 0).unwrap()),
                out: self.out.strided_mut(&[8, 32], &[32, 1], 0).unwrap(),
            };
            change(&mut args, &other);
            let text = swiglu_forward(&self.device.stream().unwrap(), args).expect_err(start).to_string();
            assert!(text.starts_with(start), "{text}\nexpected {start}");
            let fill = u16::from_ne_bytes([FILL; 2]);
            assert!(self.out.to_vec().unwrap().iter().all(|v| v.to_bits() == fill), "{text}: out was written");
            assert_eq!(self.counts.to_vec().unwrap(), [0; 8], "{text}: counts were written");
        }
    }

    /// What a changed argument may use.
    struct Others<'a> {
        x: &'a Buffer<bf16>,
        map: &'a Buffer<i32>,
        weights: &'a Buffer<f32>,
        device: &'a Device,
    }

    #[test]
    fn bad_arguments_are_named() {
        let mut r = Refused::new();
        // SAFETY: nothing is launched on these tensors; that is what is checked.
        let out = |b: &Others<'_>, offset: u64, dtype, shape: &[u64], strides: &[u64]| unsafe {
            TensorMut::from_raw(b.device, b.x.as_ptr() + offset, dtype, shape, strides).unwrap()
        };
        r.refuses("swiglu_forward: x has shape [512], expected 2 dimensions", |a, b| a.x = b.x.tensor(&[512]).unwrap());
        r.refuses("swiglu_forward: x is f16, allowed: bf16, f32", |a, _| a.x = a.x.reinterpret(DType::F16).unwrap());
        r.refuses("swiglu_forward: columns of x is 72, allowed: multiples of 16", |a, b| a.x = b.x.tensor(&[8, 72]).unwrap());
        r.refuses("swiglu_forward: layout of x is", |a, b| a.x = b.x.strided(&[8, 64], &[1, 8], 0).unwrap());
        r.refuses("swiglu_forward: layout of x is", |a, b| a.x = b.x.strided(&[8, 64], &[68, 1], 0).unwrap());
        r.refuses("swiglu_forward: layout of x is", |a, b| a.x = b.x.strided(&[8, 64], &[64, 1], 4).unwrap());
        r.refuses("swiglu_forward: out has shape [8, 32], expected [7, 32]", |a, b| a.x = b.x.tensor(&[7, 64]).unwrap());
        let apart = 2048;
        r.refuses("swiglu_forward: out is e4m3, allowed: bf16, f32", |a, b| {
            a.out = out(b, apart, DType::E4m3, &[8, 32], &[32, 1])
        });
        r.refuses("swiglu_forward: layout of out is", |a, b| a.out = out(b, apart, DType::Bf16, &[8, 32], &[40, 1]));
        r.refuses("swiglu_forward: layout of out is", |a, b| a.out = out(b, apart + 8, DType::Bf16, &[8, 32], &[32, 1]));
        r.refuses("swiglu_forward: x and out overlap", |a, b| a.out = out(b, 1008, DType::Bf16, &[8, 32], &[32, 1]));
        r.refuses("swiglu_forward: clamp_value is none, allowed: a positive number with clamped_count", |a, _| {
            a.clamp_value = None
        });
        r.refuses("swiglu_forward: clamp_value is 0, allowed: positive numbers", |a, _| a.clamp_value = Some(0.0));
        r.refuses("swiglu_forward: clamp_value is NaN, allowed: positive numbers", |a, _| a.clamp_value = Some(f32::NAN));
        let counts = |dtype, n| move |a: &mut Args<'_>, b: &Others<'_>| a.clamped_count = Some(out(b, apart, dtype, &[n], &[1]));
        r.refuses("swiglu_forward: clamped_count has shape [5], expected [4] or [3]", |a, b| counts(DType::I64, 5)(a, b));
        r.refuses("swiglu_forward: clamped_count is i32, allowed: i64", |a, b| counts(DType::I32, 4)(a, b));
        r.refuses("swiglu_forward: out and clamped_count overlap", |a, b| {
            a.out = out(b, apart, DType::Bf16, &[8, 32], &[32, 1]);
            a.clamped_count = Some(out(b, apart + 504, DType::I64, &[4], &[1]));
        });
        r.refuses("swiglu_forward: pos_to_expert has shape [7], expected [8]", |a, b| {
            a.rows = ExpertRows::PosToExpert(b.map.tensor(&[7]).unwrap())
        });
        r.refuses("swiglu_forward: pos_to_expert is f32, allowed: i32", |a, b| {
            a.rows = ExpertRows::PosToExpert(b.weights.tensor(&[8]).unwrap())
        });
        r.refuses("swiglu_forward: layout of pos_to_expert is", |a, b| {
            a.rows = ExpertRows::PosToExpert(b.map.strided(&[8], &[2], 0).unwrap())
        });
        fn psum<'a>(ends: TensorRef<'a>, alignment: u32) -> ExpertRows<'a> {
            ExpertRows::Psum { psum_num_tokens_per_expert: ends, alignment }
        }
        r.refuses("swiglu_forward: psum_num_tokens_per_expert has shape [2, 2], expected 1 dimension", |a, b| {
            a.rows = psum(b.map.tensor(&[2, 2]).unwrap(), 128)
        });
        r.refuses("swiglu_forward: alignment is 0, allowed: 1 to", |a, b| a.rows = psum(b.map.tensor(&[2]).unwrap(), 0));
        fn per_row<'a>(topk_weights: TensorRef<'a>) -> RowWeights<'a> {
            RowWeights::PerRow { topk_weights, routed_scaling_factor: 1.0 }
        }
        r.refuses("swiglu_forward: topk_weights has shape [9], expected [8]", |a, b| {
            a.weights = per_row(b.weights.tensor(&[9]).unwrap())
        });
        r.refuses("swiglu_forward: topk_weights is i32, allowed: f32", |a, b| a.weights = per_row(b.map.tensor(&[8]).unwrap()));
        r.refuses("swiglu_forward: topk_weights has shape [8], expected 2 dimensions", |a, b| {
            let (topk_weights, pos_to_token_topk) = (b.weights.tensor(&[8]).unwrap(), b.map.tensor(&[8]).unwrap());
            a.weights = RowWeights::PerTokenTopk { topk_weights, pos_to_token_topk }
        });
        r.refuses("swiglu_forward: pos_to_token_topk has shape [6], expected [8]", |a, b| {
            let (topk_weights, pos_to_token_topk) = (b.weights.tensor(&[2, 4]).unwrap(), b.map.tensor(&[6]).unwrap());
            a.weights = RowWeights::PerTokenTopk { topk_weights, pos_to_token_topk }
        });
        let other = Device::emulator().checked().zeros::<f32>(8).unwrap();
        let weights = other.tensor(&[8]).unwrap();
        let args = Args {
            x: r.x.tensor(&[8, 64]).unwrap(),
            rows: ExpertRows::All,
            weights: per_row(weights),
            clamp_value: None,
            clamped_count: None,
            out: r.out.strided_mut(&[8, 32], &[32, 1], 0).unwrap(),
        };
        let error = swiglu_forward(&r.device.stream().unwrap(), args).unwrap_err();
        assert!(matches!(error, Error::DeviceMismatch { arg: "topk_weights", .. }), "{error}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        /// Any shape, layout, type and range of values.
        #[test]
        fn any_input(
            counts in proptest::collection::vec(0u64..9, 0..40), alignment in 1u32..20, tail in 0u64..4, eighths in 1u64..40,
            gap in 0u64..3, f32_input: bool, f32_out: bool, kind in 0usize..3, weights in 0usize..3, clamp in 0usize..3,
            exponent in -20i32..20, seed: u64,
        ) {
            let device = Device::emulator();
            let h = 8 * eighths;
            let layout = Layout::new(&counts, alignment, tail);
            let dtype = if f32_input { DType::F32 } else { DType::Bf16 };
            let values = Rng::new(seed).fill((layout.num_rows * 2 * h) as usize, |rng, i| {
                let v = rng.normal(i) * 2f32.powi(exponent);
                if f32_input { v } else { bf16::from_f32(v).to_f32() }
            });
            let input = Input::new(&device, dtype, layout, h, 2 * h + 8 * gap, values, "any").unwrap();
            let rows = [RowsKind::All, RowsKind::PosToExpert, RowsKind::Psum][kind];
            let weights = [WeightsKind::None, WeightsKind::PerRow(0.7), WeightsKind::PerTokenTopk][weights];
            let clamp = CLAMPS[clamp];
            let out = if f32_out { DType::F32 } else { DType::Bf16 };
            let (expected, counts) = reference(&input, &Exp::new(&device, &input, clamp).unwrap(), clamp, rows, weights);
            let mut outputs = Outputs::new(&device, &input, out).unwrap();
            let options = Options { rows, weights, clamp, count: clamp.is_some(), out };
            outputs.run(&device.stream().unwrap(), &input, options, 4).unwrap();
            outputs.check("any", &input, rows, &expected).unwrap();
            outputs.check_counts("any", if clamp.is_some() { counts } else { [0; 4] }, 4).unwrap();
        }
    }
}
