//! `cast_back_e5m6`: every product is one f32 multiplication of two numbers that the reference reads from the bits on its own, so
//! results are compared bit for bit.

use super::per_token_cast_to_e5m6 as cast;
use crate::support::bench::{Launch, Row};
use crate::support::cases::{Depth, HIDDENS, TOKENS};
use crate::support::compare::{self, Bits};
use crate::support::golden::{self, Case, Golden};
use crate::support::inputs;
use crate::support::rng::Rng;
use crate::support::suite::{Ctx, Report, Suite, ensure, text};
use ferrotile::quant::cast_back_e5m6::{self as op, Args};
use ferrotile::quant::{Sf, SfLayout, SfShape, sf_shape};
use ferrotile::{Buffer, Device, Element, Stream};
use half::bf16;
use rayon::prelude::*;

/// What the `check` binary runs.
pub const SUITE: Suite = Suite { op: "cast_back_e5m6", run };

type Block = (u32, u32);

/// What is cast: data in logical order, with one f32 for each scale also where it is stored as a byte.
struct Problem {
    t: u64,
    h: u64,
    block: Block,
    x: Vec<u8>,
    scales: Vec<f32>,
}

impl Problem {
    fn rows(&self) -> u64 {
        self.t.div_ceil(self.block.0.into())
    }

    fn columns(&self) -> u64 {
        self.h.div_ceil(self.block.1.max(1).into())
    }

    /// All codes, NaN and infinity too; scales of all sizes, such that products overflow and underflow here and there. Packed ones are
    /// powers of two.
    fn random((t, h): (u64, u64), block: Block, packed: bool) -> Self {
        let x = Rng::named("cast_back_e5m6 x").bytes((t * h / 2 * 3) as usize);
        let mut problem = Self { t, h, block, x, scales: Vec::new() };
        let rng = Rng::named(&format!("cast_back_e5m6 sf {t} {h} {block:?} {packed}"));
        problem.scales = rng.fill((problem.rows() * problem.columns()) as usize, |rng, i| {
            // Mostly around 1; one in eight from the whole range of exponents. 0 and 255, infinity, are left out: 0 times infinity
            // is a NaN whose sign is the hardware's choice.
            let exponent = if rng.below(2 * i, 8) == 0 { 1 + rng.below(2 * i + 1, 254) } else { 120 + rng.below(2 * i + 1, 14) };
            let mantissa = if packed { 0 } else { rng.bits(i) as u32 & 0x7F_FFFF };
            f32::from_bits((exponent as u32) << 23 | mantissa)
        });
        problem
    }

    fn reference<O: Output>(&self) -> Vec<O> {
        let h = self.h as usize;
        let mut out = vec![O::of(0.0); self.t as usize * h];
        // All values once.
        let table: Vec<f32> = (0..0x1000).map(e5m6).collect();
        out.par_chunks_mut(h.max(1)).enumerate().for_each(|(row, out)| {
            for (group, out) in out.chunks_exact_mut(8).enumerate() {
                let bytes = &self.x[row * h / 2 * 3 + group * 12..][..12];
                // A string of 96 bits, first value in the highest, cut into little-endian words.
                let string =
                    bytes.chunks_exact(4).fold(0u128, |s, w| s << 32 | u32::from_le_bytes([w[0], w[1], w[2], w[3]]) as u128);
                for (i, out) in out.iter_mut().enumerate() {
                    let at = row / self.block.0 as usize * self.columns() as usize + (8 * group + i) / self.block.1 as usize;
                    *out = O::of(table[(string >> (84 - 12 * i)) as usize & 0xFFF] * self.scales[at]);
                }
            }
        });
        out
    }
}

/// The value of a code by the definition of the format.
fn e5m6(code: u16) -> f32 {
    let (exponent, mantissa) = ((code >> 6 & 31) as i32, (code & 63) as f32 / 64.0);
    let magnitude = match exponent {
        0 => mantissa * 2f32.powi(-14),
        31 if mantissa == 0.0 => f32::INFINITY,
        // What the conversion from f16 makes of every NaN.
        31 => return f32::from_bits(0x7FFF_FFFF),
        _ => (1.0 + mantissa) * 2f32.powi(exponent - 15),
    };
    if code & 0x800 != 0 { -magnitude } else { magnitude }
}

/// An element type of the output.
trait Output: Element + Bits + PartialEq + Send {
    fn of(v: f32) -> Self;
}

impl Output for f32 {
    fn of(v: f32) -> Self {
        v
    }
}

impl Output for bf16 {
    fn of(v: f32) -> Self {
        // The conversion's NaN has no sign and all mantissa bits.
        if v.is_nan() { bf16::from_bits(0x7FFF) } else { bf16::from_f32(v) }
    }
}

/// Distances between rows and offsets of first elements: of `x` in bytes, of scales, of the output.
#[derive(Clone, Copy, Debug, Default)]
struct Placement {
    gap: u64,
    offset: u64,
    sf_gap: u64,
    out_offset: u64,
}

/// Elements behind an output that must stay as they are.
const GUARD: usize = 64;
const FILL: u8 = 0xA5;

/// Inputs and output on a device.
struct Uploaded<O> {
    shape: [u64; 2],
    block: Block,
    at: Placement,
    x: Buffer<u8>,
    layout: SfLayout,
    sf_shape: [u64; 2],
    sf_strides: [u64; 2],
    sf: Buffer<u32>,
    out: Buffer<O>,
}

impl<O: Output> Uploaded<O> {
    fn new(device: &Device, p: &Problem, layout: SfLayout, at: Placement) -> Result<Self, String> {
        let row = (p.h / 2 * 3) as usize;
        let stride = row + at.gap as usize;
        let mut x = vec![0x55u8; at.offset as usize + p.t as usize * stride];
        for (i, bytes) in p.x.chunks_exact(row.max(1)).enumerate() {
            x[at.offset as usize + i * stride..][..row].copy_from_slice(bytes);
        }
        let sf_shape = [p.rows(), layout.columns(p.columns())];
        let [rows, columns] = sf_shape;
        let sf_strides = if layout.is_col_major() { [1, rows + at.sf_gap] } else { [columns + at.sf_gap, 1] };
        let mut sf = vec![0xFFFF_FFFFu32; ((rows + at.sf_gap + 1) * (columns + at.sf_gap + 1)) as usize];
        for m in 0..rows {
            for k in 0..columns {
                let scale = |k: u64| if k < p.columns() { p.scales[(m * p.columns() + k) as usize].to_bits() } else { 0 };
                let packed = (0..4).fold(0, |word, i| word | (scale(4 * k + i) >> 23) << (8 * i));
                sf[(m * sf_strides[0] + k * sf_strides[1]) as usize] = if layout.is_packed() { packed } else { scale(k) };
            }
        }
        let mut out = device.alloc::<O>((at.out_offset + p.t * p.h) as usize + GUARD).map_err(text)?;
        out.fill_bytes(FILL).map_err(text)?;
        let (x, sf) = (device.upload(&x).map_err(text)?, device.upload(&sf).map_err(text)?);
        Ok(Self { shape: [p.t, p.h], block: p.block, at, x, layout, sf_shape, sf_strides, sf, out })
    }

    fn call(&mut self, launcher: impl Fn(&Stream, Args<'_>) -> ferrotile::Result<()>, stream: &Stream) -> ferrotile::Result<()> {
        let [t, h] = self.shape;
        let x = self.x.strided(&[t, h / 2 * 3], &[h / 2 * 3 + self.at.gap, 1], self.at.offset)?;
        let sf = self.sf.strided(&self.sf_shape, &self.sf_strides, 0)?.reinterpret(self.layout.dtype())?;
        let out = self.out.strided_mut(&self.shape, &[h, 1], self.at.out_offset)?;
        launcher(stream, Args { x, sf: Sf { tensor: sf, layout: self.layout }, block: self.block, out })
    }

    fn check(&self, name: &str, expected: &[O]) -> Result<(), String> {
        let out = self.out.to_vec().map_err(text)?;
        let (front, out) = out.split_at(self.at.out_offset as usize);
        let (out, guard) = out.split_at(expected.len());
        let mut outside = front.iter().chain(guard);
        ensure(outside.all(|v| bytemuck::bytes_of(v).iter().all(|b| *b == FILL)), || {
            format!("out: elements outside the tensor were written; {name}")
        })?;
        compare::equal("out", name, &self.shape, out, expected)
    }
}

/// One problem in one layout of scales, to one element type.
fn check<O: Output>(
    ctx: &Ctx,
    p: &Problem,
    layout: SfLayout,
    at: Placement,
    expected: &mut Option<Vec<O>>,
) -> Result<(), String> {
    let name = format!(
        "at={}/{}/{}/{},block={}x{},h={},out={},sf={layout},t={}",
        at.gap,
        at.offset,
        at.sf_gap,
        at.out_offset,
        p.block.0,
        p.block.1,
        p.h,
        O::DTYPE,
        p.t
    );
    if !ctx.case(&name) {
        return Ok(());
    }
    let expected: &[O] = expected.get_or_insert_with(|| p.reference());
    let mut u = Uploaded::<O>::new(&ctx.device, p, layout, at)?;
    let stream = ctx.device.stream().map_err(text)?;
    u.call(op::cast_back_e5m6, &stream).map_err(text)?;
    u.check(&name, expected)?;
    if ctx.depth == Depth::Small {
        // Once more, over its own result, in many launches.
        u.call(|s, args| op::cast_back_e5m6_in_parts(s, args, 3), &stream).map_err(text)?;
        u.check(&name, expected)?;
    }
    Ok(())
}

const PLAIN: [SfLayout; 2] = [SfLayout::RowMajor, SfLayout::ColMajor];
const PACKED: [SfLayout; 2] = [SfLayout::ColMajorPacked, SfLayout::RowMajorPacked];

/// All layouts and both outputs.
fn check_all(ctx: &Ctx, shape: (u64, u64), block: Block, at: Placement) -> Result<(), String> {
    for layouts in [PLAIN, PACKED] {
        let p = Problem::random(shape, block, layouts[0].is_packed());
        let (mut of_bf16, mut of_f32) = (None, None);
        for layout in layouts {
            // The specification has one of each kind.
            if ctx.depth == Depth::Small || layout == layouts[0] {
                check::<bf16>(ctx, &p, layout, at, &mut of_bf16)?;
                check::<f32>(ctx, &p, layout, at, &mut of_f32)?;
            }
        }
    }
    Ok(())
}

fn run(ctx: &Ctx) -> Result<Report, String> {
    let aligned = Placement::default();
    let narrow = [
        Placement { gap: 1, offset: 2, sf_gap: 3, out_offset: 1 },
        Placement { gap: 4, offset: 8, sf_gap: 1, out_offset: 0 },
        Placement { gap: 0, offset: 0, sf_gap: 0, out_offset: 2 },
    ];
    check_all(ctx, (37, 384), (1, 384), aligned)?;
    check_all(ctx, (13, 576), (1, 128), aligned)?;
    check_all(ctx, (37, 200), (16, 32), narrow[1])?;
    check_all(ctx, (7, 40), (1, 8), aligned)?;
    check_all(ctx, (9, 40), (100, 16), aligned)?;
    for at in narrow {
        check_all(ctx, (11, 72), (1, 72), at)?;
        check_all(ctx, (11, 72), (3, 64), at)?;
    }
    check_all(ctx, (0, 384), (1, 384), aligned)?;
    check_all(ctx, (5, 0), (1, 128), aligned)?;
    check_all(ctx, (1, 8), (1, 8), aligned)?;
    check_round_trip(ctx)?;
    if ctx.depth == Depth::Full {
        for h in HIDDENS {
            for t in [1].into_iter().chain(TOKENS) {
                check_all(ctx, (t, h), (1, h as u32), aligned)?;
            }
        }
        check_all(ctx, (4001, 2560), (128, 128), aligned)?;
        check_all(ctx, (4001, 576), (1, 32), narrow[0])?;
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

/// What is cast and cast back is close to what it was, as the specification bounds it.
fn check_round_trip(ctx: &Ctx) -> Result<(), String> {
    let stream = ctx.device.stream().map_err(text)?;
    let (t, h) = if ctx.depth == Depth::Full { (4001, 2048) } else { (37, 576) };
    let normal = Rng::named("cast_back_e5m6 round trip").normal_f32((t * h) as usize);
    let constant = |v: f32| (0..t * h).map(|i| if i % h == h - 1 { 65024.0 } else { v }).collect::<Vec<f32>>();
    let small = 2f32.powi(-14);
    let inputs = [
        ("normal", normal, 1e-4),
        ("2^-20", constant(2f32.powi(-20)), 5e-6),
        ("63/64 2^-14", constant(small * 63.0 / 64.0), 5e-6),
        ("2^-14", constant(small), 5e-6),
    ];
    for (kind, values, bound) in inputs {
        for round in [true, false] {
            let name = format!("h={h},kind=round trip of {kind},round_sf={round},t={t}");
            if !ctx.case(&name) {
                continue;
            }
            let q = cast::reference(&values, h as usize, round);
            let p = Problem { t, h, block: (1, h as u32), x: q.data, scales: q.sf };
            let mut u = Uploaded::<f32>::new(&ctx.device, &p, SfLayout::RowMajor, Placement::default())?;
            u.call(op::cast_back_e5m6, &stream).map_err(text)?;
            let back: Vec<f32> = u.out.to_vec().map_err(text)?[..values.len()].to_vec();
            compare::close_diff("out", &name, &back, &values, bound)?;
            u.check(&name, &p.reference())?;
        }
    }
    Ok(())
}

/// The launcher recorded in a graph and replayed.
fn check_graph(ctx: &Ctx) -> Result<(), String> {
    let name = "kind=graph,h=576,t=133";
    if !ctx.case(name) {
        return Ok(());
    }
    let p = Problem::random((133, 576), (1, 576), true);
    let mut u = Uploaded::<bf16>::new(&ctx.device, &p, SfLayout::ColMajorPacked, Placement::default())?;
    let stream = ctx.device.stream().map_err(text)?;
    let graph = stream.capture(|s| u.call(op::cast_back_e5m6, s)).map_err(text)?;
    let expected = p.reference();
    for replay in 0..2 {
        u.out.fill_bytes(FILL).map_err(text)?;
        graph.launch(&stream).map_err(text)?;
        stream.synchronize().map_err(text)?;
        u.check(&format!("{name},replay={replay}"), &expected)?;
    }
    Ok(())
}

/// The emulator and this device write the same bytes.
fn check_both_backends(ctx: &Ctx) -> Result<(), String> {
    let emulator = Device::emulator();
    for (gap, name) in [(0, "kind=both backends,h=200,t=37"), (1, "kind=both backends,h=200,stride=301,t=37")] {
        if !ctx.case(name) {
            continue;
        }
        let p = Problem::random((37, 200), (1, 200), false);
        let mut results = Vec::new();
        for device in [&ctx.device, &emulator] {
            let mut u = Uploaded::<f32>::new(device, &p, SfLayout::RowMajor, Placement { gap, ..Placement::default() })?;
            u.call(op::cast_back_e5m6, &device.stream().map_err(text)?).map_err(text)?;
            results.push(u.out.to_vec().map_err(text)?.iter().map(|v| v.to_bits()).collect::<Vec<_>>());
        }
        ensure(results[0] == results[1], || format!("the backends differ; {name}"))?;
    }
    Ok(())
}

/// More than 2^31 values of output. All rows are one row in memory (stride 0), so every row of the output must be the same.
fn check_large(ctx: &Ctx) -> Result<(), String> {
    let (t, h) = (300_001u64, 7168u64);
    let name = "kind=large,h=7168,t=300001";
    if !ctx.case(name) {
        return Ok(());
    }
    let d = &ctx.device;
    let p = Problem::random((1, h), (1, 128), false);
    let expected: Vec<bf16> = p.reference();
    let x = d.upload(&p.x).map_err(text)?;
    let sf = d.upload(&p.scales).map_err(text)?;
    let mut out = d.alloc::<bf16>((t * h) as usize).map_err(text)?;
    let args = Args {
        x: x.strided(&[t, h / 2 * 3], &[0, 1], 0).map_err(text)?,
        sf: Sf { tensor: sf.tensor(&[1, h / 128]).map_err(text)?, layout: SfLayout::RowMajor },
        block: (u32::MAX, 128),
        out: out.tensor_mut(&[t, h]).map_err(text)?,
    };
    op::cast_back_e5m6(&d.stream().map_err(text)?, args).map_err(text)?;
    let out = out.to_vec().map_err(text)?;
    let bits = |v: &[bf16]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    let expected = bits(&expected);
    match out.par_chunks_exact(h as usize).enumerate().find_map_any(|(i, row)| (bits(row) != expected).then_some(i)) {
        Some(bad) => Err(format!("out: row {bad} differs; {name}")),
        None => Ok(()),
    }
}

// The benchmark.

fn row<O: Output + 'static>(case: String, (t, h): (u64, u64), layout: SfLayout) -> Row {
    let bytes = t * h / 2 * 3 + 4 * t + t * h * O::DTYPE.size();
    let build = move |device: &Device, _: &Stream| -> Result<Launch, String> {
        // Some rows of normal values as the cast makes them, over and over.
        let some =
            cast::reference(&Rng::named("cast_back_e5m6 benchmark").normal_f32((t.min(64) * h) as usize), h as usize, true);
        let p = Problem { t: 0, h, block: (1, h as u32), x: Vec::new(), scales: Vec::new() };
        let mut u = Uploaded::<O>::new(device, &p, layout, Placement::default())?;
        let SfShape { shape, strides, elements, .. } = sf_shape(t, h, (1, h as u32), layout);
        let scale = |v: &f32| if layout.is_packed() { v.to_bits() >> 23 } else { v.to_bits() };
        let scales: Vec<u32> = some.sf.iter().map(scale).collect();
        u.x = inputs::repeated(device, &some.data, t * h / 2 * 3)?;
        u.sf = inputs::repeated(device, &scales, elements)?;
        u.out = device.alloc((t * h) as usize).map_err(text)?;
        (u.shape, u.sf_shape, u.sf_strides) = ([t, h], shape, strides);
        Ok(Box::new(move |stream| u.call(op::cast_back_e5m6, stream)))
    };
    Row { op: "cast_back_e5m6", case, bytes, build: Box::new(build) }
}

/// What 1.0.0 made of its own cast.
fn check_golden(ctx: &Ctx, golden: &Golden, case: &Case) -> Result<(), String> {
    let (x, sf, back) = (golden.tensor(case, "out/q.0")?, golden.tensor(case, "out/q.1")?, golden.tensor(case, "out/back")?);
    let (layout, _) = case.sf_options()?;
    let scale = |word: &u32| f32::from_bits(if layout.is_packed() { (word & 255) << 23 } else { *word });
    let scales = sf.to_vec::<u32>()?.iter().map(scale).collect();
    let (t, h) = (x.shape[0], x.shape[1] / 3 * 2);
    let p = Problem { t, h, block: (1, h as u32), x: x.bytes.to_vec(), scales };
    if back.dtype == safetensors::Dtype::BF16 {
        check_recorded(ctx, &p, layout, &case.name(), &back.to_vec::<bf16>()?)
    } else {
        check_recorded(ctx, &p, layout, &case.name(), &back.to_vec::<f32>()?)
    }
}

fn check_recorded<O: Output>(ctx: &Ctx, p: &Problem, layout: SfLayout, name: &str, back: &[O]) -> Result<(), String> {
    let mut uploaded = Uploaded::<O>::new(&ctx.device, p, layout, Placement::default())?;
    let stream = ctx.device.stream().map_err(text)?;
    uploaded.call(op::cast_back_e5m6, &stream).map_err(text)?;
    stream.synchronize().map_err(text)?;
    uploaded.check(name, back)
}

/// The cases of 1.0.0's own benchmark, and small inputs.
pub fn bench() -> Vec<Row> {
    let (plain, packed) = (SfLayout::RowMajor, SfLayout::ColMajorPacked);
    let mut rows = Vec::new();
    for (layout, name) in [(plain, "R"), (packed, "CP")] {
        rows.push(row::<bf16>(format!("h=7168,layout={name},out=bf16,t=8001"), (8001, 7168), layout));
        rows.push(row::<f32>(format!("h=7168,layout={name},out=fp32,t=8001"), (8001, 7168), layout));
    }
    for (t, h) in [(4001, 2048), (1, 7168), (16, 7168), (128, 7168)] {
        rows.push(row::<bf16>(format!("h={h},layout=R,out=bf16,t={t}"), (t, h), plain));
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferrotile::{DType, Error, Result, TensorMut, TensorRef, View};
    use proptest::prelude::{ProptestConfig, proptest};

    #[test]
    fn suite() {
        SUITE.test();
    }

    #[test]
    fn nan_and_infinity_stay() {
        let device = Device::emulator();
        // The codes of infinity, minus infinity, three NaNs, and 1.
        let codes = [0x7C0u16, 0xFC0, 0x7FF, 0x7C1, 0xFFF, 0x3C0, 0x3C0, 0x3C0];
        let string = codes.iter().fold(0u128, |s, c| s << 12 | *c as u128);
        let x = (0..3).flat_map(|i| ((string >> (64 - 32 * i)) as u32).to_le_bytes()).collect();
        let p = Problem { t: 1, h: 8, block: (1, 8), x, scales: vec![0.5] };
        let mut u = Uploaded::<bf16>::new(&device, &p, SfLayout::RowMajor, Placement::default()).unwrap();
        u.call(op::cast_back_e5m6, &device.stream().unwrap()).unwrap();
        let out: Vec<f32> = u.out.to_vec().unwrap()[..8].iter().map(|v| v.to_f32()).collect();
        assert_eq!((out[0], out[1], out[5]), (f32::INFINITY, f32::NEG_INFINITY, 0.5));
        assert!(out[2..5].iter().all(|v| v.is_nan()));
    }

    /// A call, right but for what a test changes.
    struct Call {
        x: TensorRef<'static>,
        sf: TensorRef<'static>,
        layout: SfLayout,
        block: Block,
        out: TensorMut<'static>,
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

    /// Runs a changed call on fresh buffers; what is refused must leave the output alone.
    fn call(change: impl FnOnce(&mut Call)) -> Result<()> {
        let device = Device::emulator();
        let (x, sf) = (device.zeros::<u8>(40 * 96 * 2)?, device.upload(&[1f32; 256])?);
        let mut out = device.alloc::<f32>(40 * 64 + 64)?;
        out.fill_bytes(FILL)?;
        let mut c = Call {
            x: read(&*x.tensor(&[1])?, 0, DType::U8, &[40, 96], &[96, 1]),
            sf: read(&*sf.tensor(&[1])?, 0, DType::F32, &[40, 2], &[2, 1]),
            layout: SfLayout::RowMajor,
            block: (1, 32),
            out: view(&*out.tensor(&[1])?, 0, DType::F32, &[40, 64], &[64, 1]),
        };
        change(&mut c);
        let sf = Sf { tensor: c.sf, layout: c.layout };
        let result = op::cast_back_e5m6(&device.stream()?, Args { x: c.x, sf, block: c.block, out: c.out });
        if result.is_err() {
            assert!(out.to_vec()?.iter().all(|v| v.to_bits() == u32::from_ne_bytes([FILL; 4])), "out was written");
        }
        result
    }

    #[test]
    fn bad_arguments_are_named() {
        assert!(call(|_| ()).is_ok());
        let refuses = |change: &dyn Fn(&mut Call), start: &str| {
            let text = call(|c| change(c)).expect_err(start).to_string();
            assert!(text.starts_with(&format!("cast_back_e5m6: {start}")), "{text}\nexpected {start}");
        };
        refuses(&|c| c.x = read(&c.x, 0, DType::U8, &[96], &[1]), "x has shape [96]");
        refuses(&|c| c.x = read(&c.x, 0, DType::E4m3, &[40, 96], &[96, 1]), "x is e4m3, allowed: u8");
        refuses(&|c| c.x = read(&c.x, 0, DType::U8, &[40, 90], &[96, 1]), "columns of x is 90, allowed: multiples of 12");
        refuses(&|c| c.x = read(&c.x, 0, DType::U8, &[40, 96], &[1, 40]), "layout of x is");
        refuses(&|c| c.block = (0, 32), "npt is 0, allowed: 1 to");
        refuses(&|c| c.block = (1, 4), "npc is 4, allowed: 8, 16, 32, 64, 128, 64 (hidden)");
        refuses(&|c| c.block = (1, 64), "sf has shape [40, 2], expected [40, 1]");
        refuses(&|c| c.layout = SfLayout::ColMajorE4m3, "layout of sf is col-major e4m3, expected row-major, ");
        refuses(&|c| c.layout = SfLayout::ColMajor, "layout of sf is");
        refuses(&|c| c.out = view(&c.out, 0, DType::F16, &[40, 64], &[64, 1]), "out is f16, allowed: bf16, f32");
        refuses(&|c| c.out = view(&c.out, 0, DType::F32, &[40, 60], &[60, 1]), "out has shape [40, 60], expected [40, 64]");
        refuses(&|c| c.out = view(&c.out, 0, DType::F32, &[40, 64], &[65, 1]), "layout of out is");
        refuses(&|c| c.out = view(&c.out, 2, DType::F32, &[40, 64], &[64, 1]), "layout of out is");
        refuses(&|c| c.out = view(&c.x, 3836, DType::Bf16, &[40, 64], &[64, 1]), "x and out overlap");
        refuses(&|c| c.sf = read(&c.out, 64, DType::F32, &[40, 2], &[2, 1]), "sf and out overlap");
        let elsewhere = Device::emulator().checked().zeros::<u8>(40 * 96).unwrap();
        let error = call(|c| c.x = read(&elsewhere.tensor(&[1]).unwrap(), 0, DType::U8, &[40, 96], &[96, 1])).unwrap_err();
        assert!(matches!(error, Error::DeviceMismatch { arg: "x", .. }), "{error}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        /// Any shape, block, layout, distance of rows and alignment.
        #[test]
        fn any_input(
            t in 0u64..40, columns in 1u64..40, npt in 1u32..50, npc in 2u32..8, layout in 0usize..4, gap in 0u64..9, offset in 0u64..9,
            out_offset in 0u64..9, f32_output: bool,
        ) {
            let device = Device::emulator();
            let h = 8 * columns;
            let npc = if npc == 2 { h as u32 } else { 1 << npc };
            let layout = SfLayout::COMMON[layout];
            let p = Problem::random((t, h), (npt, npc), layout.is_packed());
            let at = Placement { gap, offset, sf_gap: gap % 3, out_offset };
            let ctx = Ctx::new(device, Depth::Small);
            if f32_output {
                check::<f32>(&ctx, &p, layout, at, &mut None).unwrap();
            } else {
                check::<bf16>(&ctx, &p, layout, at, &mut None).unwrap();
            }
        }
    }
}
