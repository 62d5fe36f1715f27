//! norm_backward: reference, cases, checks and benchmark.

use super::norm_forward::{DTYPES, Gaps, PARTS, Placed, Problem, golden_floats, maybe, normal, same, small_shapes};
use crate::support::bench::{Launch, Row};
use crate::support::cases::Depth;
use crate::support::compare;
use crate::support::golden::{self, Case, Golden};
use crate::support::rng::Rng;
use crate::support::suite::{Ctx, Report, Suite, text};
use ferrotile::quant::norm_backward::{self as op, Args, WeightGrad};
use ferrotile::{Buffer, DType, Device, Stream};
use rayon::prelude::*;

/// The checks of this op.
pub const SUITE: Suite = Suite { op: "norm_backward", run };

// The reference.

/// Inputs as numbers that the types hold.
#[derive(Clone, Debug)]
struct Backward {
    name: String,
    dtype: DType,
    t: u64,
    h: u64,
    out_grad: Vec<f32>,
    x: Vec<f32>,
    weight: Option<Vec<f32>>,
    rstd: Vec<f32>,
    residual_out_grad: Option<Vec<f32>>,
    out_scale: f32,
    /// Type of the weight's gradient, and what it is added to.
    weight_grad: Option<(DType, Option<Vec<f32>>)>,
}

impl Backward {
    /// With the parts of a norm; `weight_grad` says type and whether something is there already.
    fn new(dtype: DType, (t, h): (u64, u64), parts: (bool, bool, bool), weight_grad: Option<(DType, bool)>) -> Self {
        let forward = Problem::new(dtype, &[t, h], parts);
        let rng = Rng::named(&forward.name).stream(77);
        let rstd = forward.rstd(&forward.x).iter().map(|v| *v as f32).collect();
        let old = |ty: DType| normal(ty, &rng.stream(2), h);
        Self {
            name: format!("{},weight_grad={weight_grad:?}", forward.name),
            dtype,
            t,
            h,
            out_grad: normal(dtype, &rng.stream(0), t * h),
            x: forward.x,
            weight: forward.weight,
            rstd,
            residual_out_grad: parts.0.then(|| normal(dtype, &rng.stream(1), t * h)),
            out_scale: forward.out_scale,
            weight_grad: weight_grad.map(|(ty, there)| (ty, there.then(|| old(ty)))),
        }
    }

    /// Both gradients in f64; that of the weight without what is there already.
    fn reference(&self) -> (Vec<f64>, Vec<f64>) {
        let h = self.h as usize;
        let (scale, n) = (self.out_scale as f64, self.h as f64);
        let weight = |c: usize| self.weight.as_ref().map_or(1.0, |w| w[c] as f64);
        let mut x_grad = vec![0f64; self.x.len()];
        x_grad.par_chunks_mut(h).enumerate().for_each(|(row, out)| {
            let at = row * h;
            let rstd = self.rstd[row] as f64;
            let xh = |c: usize| self.x[at + c] as f64 * rstd;
            let gw = |c: usize| self.out_grad[at + c] as f64 * scale * weight(c);
            let mean = (0..h).map(|c| xh(c) * gw(c)).sum::<f64>() / n;
            for (c, out) in out.iter_mut().enumerate() {
                let other = self.residual_out_grad.as_ref().map_or(0.0, |r| r[at + c] as f64);
                *out = (gw(c) - xh(c) * mean) * rstd + other;
            }
        });
        // Rows in pieces, so that memory is read in order.
        let of_rows = |rows: std::ops::Range<usize>| {
            let mut sums = vec![0f64; h];
            for row in rows {
                let rstd = self.rstd[row] as f64;
                for (c, sum) in sums.iter_mut().enumerate() {
                    *sum += self.x[row * h + c] as f64 * rstd * self.out_grad[row * h + c] as f64 * scale;
                }
            }
            sums
        };
        let t = self.t as usize;
        let pieces: Vec<Vec<f64>> =
            (0..t.div_ceil(256)).into_par_iter().map(|i| of_rows(i * 256..t.min((i + 1) * 256))).collect();
        let mut weight_grad = vec![0f64; h];
        pieces.iter().for_each(|piece| weight_grad.iter_mut().zip(piece).for_each(|(sum, v)| *sum += v));
        (x_grad, weight_grad)
    }
}

// Tensors.

/// Everything of a call on a device.
struct Tensors {
    out_grad: Placed,
    x: Placed,
    weight: Option<Placed>,
    rstd: Placed,
    residual_out_grad: Option<Placed>,
    x_grad: Placed,
    weight_grad: Option<Placed>,
    accumulate: bool,
    workspace: Buffer<u8>,
    out_scale: f32,
}

impl Tensors {
    fn new(device: &Device, p: &Backward, gaps: Gaps, offset: u64) -> Result<Self, String> {
        let shape = [p.t, p.h];
        let like_x = |values: &[f32], gaps| Placed::input(device, p.dtype, values, &shape, gaps);
        let other = Gaps { row: 2 * gaps.row, ..gaps };
        let flat = Gaps { offset: gaps.offset, ..Gaps::default() };
        let weight_grad = match &p.weight_grad {
            None => None,
            Some((ty, old)) => {
                let mut placed = Placed::output(device, *ty, &[p.h], offset)?;
                if let Some(old) = old {
                    placed.set(old)?;
                }
                Some(placed)
            }
        };
        let bytes = op::workspace_bytes(device, p.t, p.h);
        Ok(Self {
            out_grad: like_x(&p.out_grad, gaps)?,
            x: like_x(&p.x, other)?,
            weight: p.weight.as_ref().map(|w| Placed::input(device, p.dtype, w, &[p.h], flat)).transpose()?,
            rstd: Placed::input(device, DType::F32, &p.rstd, &[p.t], flat)?,
            residual_out_grad: p.residual_out_grad.as_ref().map(|r| like_x(r, gaps)).transpose()?,
            x_grad: Placed::output(device, p.dtype, &shape, offset)?,
            weight_grad,
            accumulate: matches!(p.weight_grad, Some((_, Some(_)))),
            workspace: device.zeros(bytes as usize).map_err(text)?,
            out_scale: p.out_scale,
        })
    }

    fn launch(&mut self, stream: &Stream) -> ferrotile::Result<()> {
        let bytes = self.workspace.len() as u64;
        let weight_grad = match maybe(&mut self.weight_grad)? {
            None => None,
            Some(tensor) => {
                Some(WeightGrad { tensor, accumulate: self.accumulate, workspace: self.workspace.tensor_mut(&[bytes])? })
            }
        };
        let args = Args {
            out_grad: self.out_grad.tensor()?,
            x: self.x.tensor()?,
            weight: self.weight.as_ref().map(Placed::tensor).transpose()?,
            rstd: self.rstd.tensor()?,
            residual_out_grad: self.residual_out_grad.as_ref().map(Placed::tensor).transpose()?,
            out_scale: self.out_scale,
            x_grad: self.x_grad.tensor_mut()?,
            weight_grad,
        };
        op::norm_backward(stream, args)
    }

    /// The gradients.
    fn results(&self, name: &str) -> Result<(Vec<f32>, Vec<f32>), String> {
        let weight = self.weight_grad.as_ref().map_or(Ok(Vec::new()), |w| w.values("weight_grad", name))?;
        Ok((self.x_grad.values("x_grad", name)?, weight))
    }
}

/// Gradients against the reference. Terms are a few units large and have f32's error, a bf16 result half a step of its own besides.
fn check_results(p: &Backward, name: &str, (x_grad, weight_grad): &(Vec<f32>, Vec<f32>)) -> Result<(), String> {
    let (expected, mut sums) = p.reference();
    let step = |ty: DType| if ty == DType::Bf16 { 1.0 / 256.0 } else { 1e-6 };
    let (shape, bound) = ([p.t, p.h], if p.dtype == DType::Bf16 { 1e-5 } else { 1e-9 });
    // Of few channels the gradient is hardly more than what cancels.
    if p.h >= 32 {
        compare::close_diff("x_grad", name, x_grad, &expected, bound)?;
    }
    compare::allclose("x_grad", name, &shape, x_grad, &expected, (2e-5, step(p.dtype)))?;
    let Some((ty, old)) = &p.weight_grad else { return Ok(()) };
    if let Some(old) = old {
        sums.iter_mut().zip(old).for_each(|(sum, old)| *sum += *old as f64);
    }
    // Errors of the f32 sum grow as a random walk.
    let atol = 1e-6 * (p.t as f64).sqrt() + 1e-6;
    compare::allclose("weight_grad", name, &[p.h], weight_grad, &sums, (atol, step(*ty)))
}

// Running.

/// Types of the weight's gradient, and whether it is added to something.
const WEIGHT_GRADS: [Option<(DType, bool)>; 5] =
    [Some((DType::F32, true)), Some((DType::Bf16, false)), None, Some((DType::F32, false)), Some((DType::Bf16, true))];

fn run(ctx: &Ctx) -> Result<Report, String> {
    for dtype in DTYPES {
        let two = small_shapes(dtype).into_iter().filter(|(shape, _, _)| shape.len() == 2);
        for (i, (shape, gaps, offset)) in two.enumerate() {
            let p = Backward::new(dtype, (shape[0], shape[1]), PARTS[(i + 1) % 4], WEIGHT_GRADS[i % 5]);
            check_problem(ctx, &p, gaps, offset)?;
        }
        // More rows than blocks: several rows a step, several steps, a last group that is not full; a ring that goes round.
        for (i, shape) in [(300, 32), (701, 160), (530, 1024), (133, 1160)].into_iter().enumerate() {
            let p = Backward::new(dtype, shape, PARTS[i], WEIGHT_GRADS[[0, 3, 1, 4][i]]);
            check_problem(ctx, &p, Gaps::default(), 0)?;
        }
        for weight_grad in WEIGHT_GRADS {
            check_problem(ctx, &Backward::new(dtype, (0, 48), PARTS[1], weight_grad), Gaps::default(), 0)?;
        }
    }
    check_nan(ctx)?;
    if ctx.depth == Depth::Full {
        // More steps than stages.
        for dtype in DTYPES {
            check_problem(ctx, &Backward::new(dtype, (1500, 7168), PARTS[1], WEIGHT_GRADS[0]), Gaps::default(), 0)?;
        }
        for h in [128, 192, 768, 2048, 4096, 7168, 8192] {
            for dtype in DTYPES {
                for (t, parts, weight_grad) in
                    [(1, PARTS[1], 0), (512, PARTS[0], 1), (512, PARTS[1], 2), (512, PARTS[2], 0), (8001, PARTS[1], 3)]
                {
                    check_problem(ctx, &Backward::new(dtype, (t, h), parts, WEIGHT_GRADS[weight_grad]), Gaps::default(), 0)?;
                }
            }
        }
        check_problem(ctx, &Backward::new(DType::Bf16, (1001, 16384), PARTS[1], WEIGHT_GRADS[0]), Gaps::default(), 0)?;
    }
    if !ctx.device.is_emulator() {
        check_graph(ctx)?;
    }
    let notes = golden::check_cases(ctx, &["norm_backward"], |golden, case| check_golden(ctx, golden, case))?;
    Ok(Report { notes, ..ctx.report() })
}

/// A call, and the same again: the same bits.
fn check_problem(ctx: &Ctx, p: &Backward, gaps: Gaps, offset: u64) -> Result<(), String> {
    let name = format!("{},gaps={gaps:?},offset={offset}", p.name);
    if !ctx.case(&name) {
        return Ok(());
    }
    let stream = ctx.device.stream().map_err(text)?;
    let mut tensors = Tensors::new(&ctx.device, p, gaps, offset)?;
    tensors.launch(&stream).map_err(text)?;
    let results = tensors.results(&name)?;
    check_results(p, &name, &results)?;
    if let (Some(placed), Some((_, Some(old)))) = (&mut tensors.weight_grad, &p.weight_grad) {
        placed.set(old)?;
    }
    // The workspace serves again.
    tensors.launch(&stream).map_err(text)?;
    let again = tensors.results(&name)?;
    same("x_grad, a second time", &name, &[p.t, p.h], &again.0, &results.0)?;
    same("weight_grad, a second time", &name, &[results.1.len() as u64], &again.1, &results.1)?;
    Ok(())
}

/// A row without a norm has no gradient, and none is left of the weight's; other rows are as before.
fn check_nan(ctx: &Ctx) -> Result<(), String> {
    for (dtype, h) in [(DType::Bf16, 64), (DType::F32, 51)] {
        let mut p = Backward::new(dtype, (5, h), PARTS[2], WEIGHT_GRADS[3]);
        p.rstd[2] = f32::NAN;
        p.name += ",kind=nan";
        if !ctx.case(&p.name) {
            continue;
        }
        let stream = ctx.device.stream().map_err(text)?;
        let mut tensors = Tensors::new(&ctx.device, &p, Gaps::default(), 0)?;
        tensors.launch(&stream).map_err(text)?;
        let (x_grad, weight_grad) = tensors.results(&p.name)?;
        let rows = x_grad.chunks(h as usize).map(|row| row.iter().filter(|v| v.is_nan()).count()).collect::<Vec<_>>();
        let fine = rows == [0, 0, h as usize, 0, 0] && weight_grad.iter().all(|v| v.is_nan());
        crate::support::suite::ensure(fine, || format!("NaN in rows {rows:?}; {}", p.name))?;
    }
    Ok(())
}

/// What the peers computed on a GPU, within what the order of sums makes.
fn check_golden(ctx: &Ctx, golden: &Golden, case: &Case) -> Result<(), String> {
    let x = golden.tensor(case, "in/x")?;
    let dtype = if x.bytes.len() as u64 == 2 * x.shape[0] * x.shape[1] { DType::Bf16 } else { DType::F32 };
    let floats = |key: &str| golden_floats(golden, case, key);
    let p = Backward {
        name: case.name(),
        dtype,
        t: x.shape[0],
        h: x.shape[1],
        out_grad: floats("in/out_grad")?,
        x: floats("in/x")?,
        weight: Some(floats("in/weight")?),
        rstd: floats("in/rstd")?,
        residual_out_grad: None,
        out_scale: case.param("out_scale")?,
        weight_grad: Some((DType::F32, Some(vec![0.0; x.shape[1] as usize]))),
    };
    let stream = ctx.device.stream().map_err(text)?;
    let mut tensors = Tensors::new(&ctx.device, &p, Gaps::default(), 0)?;
    tensors.launch(&stream).map_err(text)?;
    let results = tensors.results(&p.name)?;
    check_results(&p, &p.name, &results)?;
    // Neighbouring bf16 are at most 2^-7 apart.
    let rtol = if dtype == DType::Bf16 { 1.0 / 128.0 } else { 1e-5 };
    compare::allclose("x_grad", &p.name, &[p.t, p.h], &results.0, &floats("out/grad")?, (2e-5, rtol))?;
    compare::allclose("weight_grad", &p.name, &[p.h], &results.1, &floats("out/weight_grad")?, (1e-5, 1e-5))
}

/// Recorded in a graph and replayed.
fn check_graph(ctx: &Ctx) -> Result<(), String> {
    for shape in [(333, 576), (70, 77)] {
        let p = Backward::new(DType::Bf16, shape, PARTS[1], WEIGHT_GRADS[1]);
        let name = format!("kind=graph,{}", p.name);
        if !ctx.case(&name) {
            continue;
        }
        let stream = ctx.device.stream().map_err(text)?;
        let mut tensors = Tensors::new(&ctx.device, &p, Gaps::default(), 0)?;
        let graph = stream.capture(|s| tensors.launch(s)).map_err(text)?;
        for _ in 0..2 {
            tensors.x_grad.fill()?;
            if let Some(weight_grad) = &mut tensors.weight_grad {
                weight_grad.fill()?;
            }
            graph.launch(&stream).map_err(text)?;
            stream.synchronize().map_err(text)?;
            check_results(&p, &name, &tensors.results(&name)?)?;
        }
    }
    Ok(())
}

// The benchmark.

/// The peers' case, with a residual's gradient, the other type, and small inputs.
pub fn bench() -> Vec<Row> {
    let mut rows = Vec::new();
    let mut row = |dtype: DType, t: u64, h: u64, residual: bool| {
        let tensors = if residual { 4 } else { 3 };
        // The gradient is added to what is there, f32 both ways.
        let bytes = tensors * t * h * dtype.size() + 4 * t + h * dtype.size() + 8 * h;
        let input = if dtype == DType::Bf16 { "bf16" } else { "f32" };
        let residual_key = if residual { ",residual=True" } else { "" };
        let case = format!("h={h},input={input}{residual_key},t={t}");
        let build = move |device: &Device, _: &Stream| -> Result<Launch, String> {
            let like_x = |seed| Placed::normal(device, dtype, seed, &[t, h]);
            let bytes = op::workspace_bytes(device, t, h);
            let mut tensors = Tensors {
                out_grad: like_x(0)?,
                x: like_x(1)?,
                weight: Some(Placed::normal(device, dtype, 2, &[h])?),
                rstd: Placed::uniform(device, 3, t)?,
                residual_out_grad: if residual { Some(like_x(4)?) } else { None },
                x_grad: Placed::output(device, dtype, &[t, h], 0)?,
                weight_grad: Some(Placed::normal(device, DType::F32, 5, &[h])?),
                accumulate: true,
                workspace: device.zeros(bytes as usize).map_err(text)?,
                out_scale: 1.0,
            };
            Ok(Box::new(move |stream| tensors.launch(stream)))
        };
        rows.push(Row { op: "norm_backward", case, bytes, build: Box::new(build) });
    };
    row(DType::Bf16, 8064, 7168, false);
    row(DType::Bf16, 8064, 7168, true);
    row(DType::F32, 8064, 7168, false);
    row(DType::F32, 8064, 7168, true);
    row(DType::Bf16, 8001, 4096, false);
    row(DType::Bf16, 8001, 2048, false);
    row(DType::Bf16, 8001, 576, false);
    row(DType::Bf16, 4001, 16384, false);
    for t in [1, 16, 128] {
        row(DType::Bf16, t, 7168, false);
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::super::norm_forward::FILL;
    use super::*;
    use ferrotile::{Error, TensorMut, TensorRef};
    use half::bf16;
    use proptest::prelude::{ProptestConfig, any, proptest};

    #[test]
    fn suite() {
        SUITE.test();
    }

    /// The reference against differences of the norm itself, in f64.
    #[test]
    fn the_reference_is_a_gradient() {
        let mut p = Backward::new(DType::F32, (3, 5), (true, true, true), Some((DType::F32, false)));
        let norm = |x: &[f64], w: &[f64]| -> f64 {
            // The sum of the norm times its gradient, and of x times the other one.
            let mut total = 0.0;
            for (row, x) in x.chunks(5).enumerate() {
                let rstd = 1.0 / (x.iter().map(|v| v * v).sum::<f64>() / 5.0 + 1e-6).sqrt();
                for (c, x) in x.iter().enumerate() {
                    let at = row * 5 + c;
                    total += x * rstd * w[c] * p.out_scale as f64 * p.out_grad[at] as f64;
                    total += x * p.residual_out_grad.as_ref().unwrap()[at] as f64;
                }
            }
            total
        };
        let x: Vec<f64> = p.x.iter().map(|v| *v as f64).collect();
        let w: Vec<f64> = p.weight.as_ref().unwrap().iter().map(|v| *v as f64).collect();
        let slope = |f: &dyn Fn(f64) -> f64| (f(1e-5) - f(-1e-5)) / 2e-5;
        let bumped =
            |v: &[f64], i: usize, d: f64| v.iter().enumerate().map(|(j, v)| v + if i == j { d } else { 0.0 }).collect::<Vec<_>>();
        let x_slopes: Vec<f64> = (0..15).map(|i| slope(&|d| norm(&bumped(&x, i, d), &w))).collect();
        let w_slopes: Vec<f64> = (0..5).map(|i| slope(&|d| norm(&x, &bumped(&w, i, d)))).collect();
        p.name.clear();
        let (x_grad, weight_grad) = p.reference();
        // `rstd` is an f32.
        compare::allclose("x", "", &[15], &x_grad, &x_slopes, (1e-6, 1e-6)).unwrap();
        compare::allclose("w", "", &[5], &weight_grad, &w_slopes, (1e-6, 1e-6)).unwrap();
    }

    #[test]
    fn sizes_of_workspaces() {
        let device = Device::emulator();
        assert_eq!(op::workspace_bytes(&device, 0, 7168), 16);
        assert_eq!(op::workspace_bytes(&device, 3, 7168), 16 + 3 * 4 * 7168);
        assert_eq!(op::workspace_bytes(&device, 3, 77), 16 + 3 * 4 * 80);
        assert_eq!(op::workspace_bytes(&device, 1 << 40, 7168), 16 + 132 * 4 * 7168);
        assert_eq!(op::workspace_bytes(&device, u64::MAX, u64::MAX), u64::MAX);
    }

    #[test]
    fn bad_arguments_are_refused() {
        let device = Device::emulator();
        let stream = device.stream().unwrap();
        let x = device.zeros::<f32>(1024).unwrap();
        let half = device.zeros::<bf16>(1024).unwrap();
        let mut bytes = device.alloc::<u8>(1 << 14).unwrap();
        let (x0, f) = (x.as_ptr(), DType::F32);
        // SAFETY: refused calls touch nothing.
        let read = |ptr: u64, dtype, shape: &[u64], strides: &[u64]| unsafe {
            TensorRef::from_raw(&device, ptr, dtype, shape, strides).unwrap()
        };
        let write = |ptr: u64, dtype, shape: &[u64], strides: &[u64]| unsafe {
            TensorMut::from_raw(&device, ptr, dtype, shape, strides).unwrap()
        };
        let mut refused = |edit: &dyn Fn(&mut Args<'_>)| {
            bytes.fill_bytes(FILL).unwrap();
            let at = bytes.as_ptr();
            let mut args = Args {
                out_grad: read(x0, f, &[4, 64], &[64, 1]),
                x: read(x0, f, &[4, 64], &[64, 1]),
                weight: Some(read(x0, f, &[64], &[1])),
                rstd: read(x0, f, &[4], &[1]),
                residual_out_grad: Some(read(x0, f, &[4, 64], &[64, 1])),
                out_scale: 1.0,
                x_grad: write(at, f, &[4, 64], &[64, 1]),
                weight_grad: Some(WeightGrad {
                    tensor: write(at + 1024, f, &[64], &[1]),
                    accumulate: false,
                    workspace: write(at + 2048, DType::U8, &[4096], &[1]),
                }),
            };
            edit(&mut args);
            let error = op::norm_backward(&stream, args).expect_err("this call must be refused");
            assert!(error.to_string().starts_with("norm_backward: "), "{error}");
            assert!(bytes.to_vec().unwrap().iter().all(|b| *b == FILL), "{error}");
            error
        };
        macro_rules! refused {
            (|$a:ident| $edit:expr, $pattern:pat) => {{
                let error = refused(&|$a: &mut Args<'_>| $edit);
                assert!(matches!(error, $pattern), "{error:?}");
            }};
        }
        let half = half.as_ptr();
        refused!(|a| a.out_grad = read(x0, f, &[256], &[1]), Error::Shape { arg: "out_grad", .. });
        refused!(|a| a.out_grad = read(x0, DType::E4m3, &[4, 64], &[64, 1]), Error::DType { arg: "out_grad", .. });
        refused!(|a| a.out_grad = read(x0, f, &[4, 0], &[64, 1]), Error::Value { arg: "hidden", .. });
        refused!(|a| a.out_grad = read(x0, f, &[1, 1 << 31], &[0, 1]), Error::Value { arg: "hidden", .. });
        refused!(|a| a.out_grad = read(x0, f, &[1 << 31, 64], &[0, 1]), Error::Value { arg: "num_tokens", .. });
        refused!(|a| a.out_grad = read(x0, f, &[4, 64], &[1, 4]), Error::Layout { arg: "out_grad", .. });
        refused!(|a| a.out_grad = read(x0 + 2, f, &[4, 64], &[64, 1]), Error::Layout { arg: "out_grad", .. });
        refused!(|a| a.x = read(half, DType::Bf16, &[4, 64], &[64, 1]), Error::DType { arg: "x", .. });
        refused!(|a| a.x = read(x0, f, &[5, 64], &[64, 1]), Error::Shape { arg: "x", .. });
        refused!(|a| a.x = read(x0, f, &[4, 64], &[1, 4]), Error::Layout { arg: "x", .. });
        refused!(|a| a.weight = Some(read(half, DType::Bf16, &[64], &[1])), Error::DType { arg: "weight", .. });
        refused!(|a| a.weight = Some(read(x0, f, &[65], &[1])), Error::Shape { arg: "weight", .. });
        refused!(|a| a.weight = Some(read(x0, f, &[64], &[2])), Error::Layout { arg: "weight", .. });
        refused!(|a| a.rstd = read(half, DType::Bf16, &[4], &[1]), Error::DType { arg: "rstd", .. });
        refused!(|a| a.rstd = read(x0, f, &[4, 1], &[1, 1]), Error::Shape { arg: "rstd", .. });
        refused!(|a| a.rstd = read(x0, f, &[4], &[2]), Error::Layout { arg: "rstd", .. });
        let other = |dtype, shape: &[u64], strides: &[u64]| Some(read(x0, dtype, shape, strides));
        refused!(|a| a.residual_out_grad = other(DType::U32, &[4, 64], &[64, 1]), Error::DType { arg: "residual_out_grad", .. });
        refused!(|a| a.residual_out_grad = other(f, &[4, 63], &[64, 1]), Error::Shape { arg: "residual_out_grad", .. });
        refused!(|a| a.residual_out_grad = other(f, &[4, 64], &[1, 4]), Error::Layout { arg: "residual_out_grad", .. });
        refused!(|a| a.x_grad = write(a.x_grad.ptr(), DType::Bf16, &[4, 64], &[64, 1]), Error::DType { arg: "x_grad", .. });
        refused!(|a| a.x_grad = write(a.x_grad.ptr(), f, &[4, 65], &[65, 1]), Error::Shape { arg: "x_grad", .. });
        refused!(|a| a.x_grad = write(a.x_grad.ptr(), f, &[4, 64], &[80, 1]), Error::Layout { arg: "x_grad", .. });
        let weight_grad = |a: &mut Args<'_>, dtype, shape: &[u64], strides: &[u64]| {
            let w = a.weight_grad.as_mut().unwrap();
            w.tensor = write(w.tensor.ptr(), dtype, shape, strides);
        };
        refused!(|a| weight_grad(a, DType::F16, &[64], &[1]), Error::DType { arg: "weight_grad", .. });
        refused!(|a| weight_grad(a, f, &[63], &[1]), Error::Shape { arg: "weight_grad", .. });
        refused!(|a| weight_grad(a, f, &[64], &[2]), Error::Layout { arg: "weight_grad", .. });
        let workspace = |a: &mut Args<'_>, offset: u64, dtype, shape: &[u64], strides: &[u64]| {
            let w = a.weight_grad.as_mut().unwrap();
            w.workspace = write(w.workspace.ptr() + offset, dtype, shape, strides);
        };
        refused!(|a| workspace(a, 0, DType::U8, &[16 + 4 * 4 * 64 - 1], &[1]), Error::Shape { arg: "workspace", .. });
        refused!(|a| workspace(a, 0, DType::U8, &[64, 64], &[64, 1]), Error::Shape { arg: "workspace", .. });
        refused!(|a| workspace(a, 0, f, &[4096], &[1]), Error::DType { arg: "workspace", .. });
        refused!(|a| workspace(a, 8, DType::U8, &[4096], &[1]), Error::Layout { arg: "workspace", .. });
        refused!(|a| a.x = read(a.x_grad.ptr(), f, &[4, 64], &[64, 1]), Error::Overlap { a: "x", b: "x_grad", .. });
        refused!(|a| weight_grad_at(a, a.x_grad.ptr()), Error::Overlap { a: "x_grad", b: "weight_grad", .. });
    }

    /// Another place for the weight's gradient; for calls that are refused.
    fn weight_grad_at(a: &mut Args<'_>, ptr: u64) {
        let w = a.weight_grad.as_mut().unwrap();
        // SAFETY: nothing is written.
        w.tensor = unsafe { TensorMut::from_raw(w.tensor.device(), ptr, DType::F32, &[64], &[1]).unwrap() };
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

        /// Any shape, distance of rows, alignment and parts.
        #[test]
        fn any_norm(
            t in 0u64..40, h in 1u64..700, whole in any::<bool>(), row in 0u64..9, offset in 0u64..9, out_offset in 0u64..9,
            f32_input in any::<bool>(), parts in 0usize..4, weight_grad in 0usize..5,
        ) {
            // Half of them for bulk copies.
            let (h, row, offset, out_offset) =
                if whole { (h.next_multiple_of(8), row / 8 * 8, offset / 8 * 8, out_offset / 8 * 8) } else { (h, row, offset, out_offset) };
            let p = Backward::new(DTYPES[f32_input as usize], (t, h), PARTS[parts], WEIGHT_GRADS[weight_grad]);
            let ctx = Ctx::new(Device::emulator().checked(), Depth::Small);
            check_problem(&ctx, &p, Gaps { row, batch: 0, offset }, out_offset).unwrap();
        }
    }
}
