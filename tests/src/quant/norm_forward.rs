//! norm_forward: reference, cases, checks and benchmark. The reference and the inputs serve the other norms too.

use crate::support::bench::{Launch, Row};
use crate::support::cases::Depth;
use crate::support::compare;
use crate::support::golden::{self, Case, Golden};
use crate::support::inputs;
use crate::support::rng::Rng;
use crate::support::suite::{Ctx, Report, Suite, ensure, text};
use ferrotile::quant::norm_forward::{self as op, Args};
use ferrotile::{Buffer, DType, Device, Stream, TensorMut, TensorRef};
use half::bf16;
use rayon::prelude::*;

/// The checks of this op.
pub const SUITE: Suite = Suite { op: "norm_forward", run };

// The reference.

/// A norm: its inputs as numbers that `dtype` holds.
#[derive(Clone, Debug)]
pub(super) struct Problem {
    pub name: String,
    pub dtype: DType,
    /// `[t, h]` or `[b, t, h]`.
    pub shape: Vec<u64>,
    pub x: Vec<f32>,
    pub residual: Option<Vec<f32>>,
    pub weight: Option<Vec<f32>>,
    pub eps: f32,
    pub out_scale: f32,
}

/// To bf16 and back, if that is the type.
pub(super) fn round(dtype: DType, v: f32) -> f32 {
    if dtype == DType::Bf16 { bf16::from_f32(v).to_f32() } else { v }
}

/// Standard normal values.
pub(super) fn normal(dtype: DType, rng: &Rng, len: u64) -> Vec<f32> {
    rng.fill(len as usize, |rng, i| round(dtype, rng.normal(i)))
}

impl Problem {
    /// Which of residual, weight and scale there are, is said by `parts`.
    pub(super) fn new(dtype: DType, shape: &[u64], parts: (bool, bool, bool)) -> Self {
        let (residual, weight, scale) = parts;
        let name = format!("input={dtype},residual={residual},scale={scale},shape={shape:?},weight={weight}");
        let rng = Rng::named(&name);
        let (n, h) = (shape.iter().product(), shape[shape.len() - 1]);
        Self {
            dtype,
            shape: shape.to_vec(),
            x: normal(dtype, &rng.stream(0), n),
            residual: residual.then(|| normal(dtype, &rng.stream(1), n)),
            weight: weight.then(|| normal(dtype, &rng.stream(2), h)),
            eps: 1e-6,
            out_scale: if scale { 0.75 } else { 1.0 },
            name,
        }
    }

    /// Rows that are hard: zeros of both signs, far apart magnitudes, subnormals, squares beyond f32, infinities, NaN.
    pub(super) fn awkward(mut self) -> Self {
        let (dtype, h) = (self.dtype, self.hidden());
        let rng = Rng::named(&self.name).stream(9);
        for (i, v) in self.x.iter_mut().enumerate() {
            let (row, col) = (i / h, i % h);
            let draw = rng.bits(i as u64);
            *v = match row % 10 {
                0 => 0.0,
                1 => -0.0,
                2 => *v * 2f32.powi((draw >> 8) as i32 % 40 - 20),
                // Below the smallest normal number: they vanish beside eps.
                3 => f32::from_bits(draw as u32 & 0x807F_FFFF),
                4 => *v * 1e25,
                5 if col == h / 2 => f32::NAN,
                6 if col == h - 1 => f32::INFINITY,
                7 if col == 0 => 3e4,
                8 => *v * 1e-4,
                _ => *v,
            };
            if dtype == DType::Bf16 {
                *v = f32::from_bits(v.to_bits() & 0xFFFF_0000);
            }
        }
        if let Some(residual) = &mut self.residual {
            residual.iter_mut().zip(&self.x).enumerate().for_each(|(i, (r, x))| {
                // What adds up to zero of either sign, and to the largest number.
                *r = match (i / h % 10, i % 3) {
                    (0, 0) => -0.0,
                    (1, 0) => -0.0,
                    (3, 0) => 0.0,
                    (9, 0) => -*x,
                    _ => *r,
                }
            });
        }
        self.name += ",kind=awkward";
        self
    }

    pub(super) fn hidden(&self) -> usize {
        self.shape[self.shape.len() - 1] as usize
    }

    /// `x + residual`.
    pub(super) fn sum(&self) -> Vec<f32> {
        match &self.residual {
            None => self.x.clone(),
            // The f32 sum has more than twice the bits of a bf16, so rounding twice is rounding once.
            Some(residual) => self.x.par_iter().zip(residual).map(|(x, r)| round(self.dtype, x + r)).collect(),
        }
    }

    /// Reciprocal root mean squares.
    pub(super) fn rstd(&self, sum: &[f32]) -> Vec<f64> {
        let of_row = |row: &[f32]| {
            let squares: f64 = row.iter().map(|v| *v as f64 * *v as f64).sum();
            // The kernel adds in f32.
            let squares = if squares > f32::MAX as f64 { f64::INFINITY } else { squares };
            1.0 / (squares / row.len() as f64 + self.eps as f64).sqrt()
        };
        sum.par_chunks(self.hidden()).map(of_row).collect()
    }

    /// The norm, from the reciprocal roots that the kernel found: those may differ in their last bits, what is made of them may not.
    pub(super) fn norm(&self, sum: &[f32], rstd: &[f32]) -> Vec<f32> {
        let h = self.hidden();
        let of = |i: usize| {
            let weight = self.weight.as_ref().map_or(1.0, |w| w[i % h]);
            round(self.dtype, (sum[i] * rstd[i / h]) * (weight * self.out_scale))
        };
        (0..sum.len()).into_par_iter().map(of).collect()
    }

    /// `rstd` within the bound of the specification.
    pub(super) fn check_rstd(&self, sum: &[f32], got: &[f32]) -> Result<(), String> {
        let expected = self.rstd(sum);
        ensure(got.len() == expected.len(), || format!("rstd: {} values; {}", got.len(), self.name))?;
        for (row, (got, expected)) in got.iter().zip(&expected).enumerate() {
            let fine = (got.is_nan() && expected.is_nan()) || (*got as f64 - expected).abs() <= 1e-5 * expected;
            ensure(fine, || format!("rstd: row {row}: got {got:e}, expected {expected:e}; {}", self.name))?;
        }
        Ok(())
    }
}

/// Same bits, where any NaN is as good as another: its payload is the device's.
pub(super) fn same(what: &str, name: &str, shape: &[u64], got: &[f32], expected: &[f32]) -> Result<(), String> {
    let plain = |v: &[f32]| -> Vec<f32> { v.par_iter().map(|v| if v.is_nan() { f32::NAN } else { *v }).collect() };
    compare::equal(what, name, shape, &plain(got), &plain(expected))
}

// Tensors.

/// What lies outside of outputs, and what it consists of.
pub(super) const GUARD: u64 = 64;
pub(super) const FILL: u8 = 0xA5;

/// Elements of either type.
pub(super) enum Elements {
    Bf16(Buffer<bf16>),
    F32(Buffer<f32>),
}

/// A tensor somewhere in a buffer.
pub(super) struct Placed {
    elements: Elements,
    shape: Vec<u64>,
    strides: Vec<u64>,
    offset: u64,
}

/// How inputs lie: elements between rows, between batches, and before the first row.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Gaps {
    pub row: u64,
    pub batch: u64,
    pub offset: u64,
}

impl Placed {
    /// An input; what lies between its rows would be noticed if it were read.
    pub(super) fn input(device: &Device, dtype: DType, values: &[f32], shape: &[u64], gaps: Gaps) -> Result<Self, String> {
        let rank = shape.len();
        let h = shape[rank - 1];
        let mut strides = vec![1; rank];
        if rank > 1 {
            strides[rank - 2] = h + gaps.row;
        }
        if rank > 2 {
            strides[0] = shape[1] * strides[1] + gaps.batch;
        }
        let rows: Vec<u64> = match rank {
            1 => vec![0],
            2 => (0..shape[0]).map(|t| t * strides[0]).collect(),
            _ => (0..shape[0])
                .flat_map(|b| (0..shape[1]).map(move |t| (b, t)))
                .map(|(b, t)| b * strides[0] + t * strides[1])
                .collect(),
        };
        let len = gaps.offset + rows.last().map_or(0, |last| last + h);
        let mut all = vec![1e30f32; len as usize];
        for (row, start) in values.chunks(h.max(1) as usize).zip(&rows) {
            let start = (gaps.offset + start) as usize;
            all[start..start + row.len()].copy_from_slice(row);
        }
        let elements = if dtype == DType::Bf16 {
            let values: Vec<bf16> = all.par_iter().map(|v| bf16::from_f32(*v)).collect();
            Elements::Bf16(device.upload(&values).map_err(text)?)
        } else {
            Elements::F32(device.upload(&all).map_err(text)?)
        };
        Ok(Self { elements, shape: shape.to_vec(), strides, offset: gaps.offset })
    }

    /// A contiguous input of a benchmark: normal values.
    pub(super) fn normal(device: &Device, dtype: DType, seed: u64, shape: &[u64]) -> Result<Self, String> {
        let len = shape.iter().product();
        let elements = if dtype == DType::Bf16 {
            Elements::Bf16(inputs::normal_bf16(device, seed, len)?)
        } else {
            Elements::F32(inputs::normal_f32(device, seed, len)?)
        };
        let strides = (0..shape.len()).map(|i| shape[i + 1..].iter().product()).collect();
        Ok(Self { elements, shape: shape.to_vec(), strides, offset: 0 })
    }

    /// The same of values from 0 to 1.
    pub(super) fn uniform(device: &Device, seed: u64, len: u64) -> Result<Self, String> {
        let elements = Elements::F32(inputs::uniform(device, seed, len)?);
        Ok(Self { elements, shape: vec![len], strides: vec![1], offset: 0 })
    }

    /// A contiguous output with a guard before and after.
    pub(super) fn output(device: &Device, dtype: DType, shape: &[u64], offset: u64) -> Result<Self, String> {
        let len = (shape.iter().product::<u64>() + offset + GUARD) as usize;
        let mut strides = vec![1; shape.len()];
        for i in (1..shape.len()).rev() {
            strides[i - 1] = strides[i] * shape[i];
        }
        let elements = if dtype == DType::Bf16 {
            Elements::Bf16(device.alloc(len).map_err(text)?)
        } else {
            Elements::F32(device.alloc(len).map_err(text)?)
        };
        let mut placed = Self { elements, shape: shape.to_vec(), strides, offset };
        placed.fill()?;
        Ok(placed)
    }

    pub(super) fn fill(&mut self) -> Result<(), String> {
        match &mut self.elements {
            Elements::Bf16(b) => b.fill_bytes(FILL).map_err(text),
            Elements::F32(b) => b.fill_bytes(FILL).map_err(text),
        }
    }

    /// Values for an output that is read too.
    pub(super) fn set(&mut self, values: &[f32]) -> Result<(), String> {
        let (start, end) = (self.offset as usize, self.offset as usize + values.len());
        match &mut self.elements {
            Elements::Bf16(b) => {
                let mut all = b.to_vec().map_err(text)?;
                all[start..end].iter_mut().zip(values).for_each(|(to, v)| *to = bf16::from_f32(*v));
                b.copy_from(&all).map_err(text)
            }
            Elements::F32(b) => {
                let mut all = b.to_vec().map_err(text)?;
                all[start..end].copy_from_slice(values);
                b.copy_from(&all).map_err(text)
            }
        }
    }

    pub(super) fn tensor(&self) -> ferrotile::Result<TensorRef<'_>> {
        match &self.elements {
            Elements::Bf16(b) => b.strided(&self.shape, &self.strides, self.offset),
            Elements::F32(b) => b.strided(&self.shape, &self.strides, self.offset),
        }
    }

    pub(super) fn tensor_mut(&mut self) -> ferrotile::Result<TensorMut<'_>> {
        match &mut self.elements {
            Elements::Bf16(b) => b.strided_mut(&self.shape, &self.strides, self.offset),
            Elements::F32(b) => b.strided_mut(&self.shape, &self.strides, self.offset),
        }
    }

    /// The values of an output, after a look at what is around it.
    pub(super) fn values(&self, what: &str, name: &str) -> Result<Vec<f32>, String> {
        let n = self.shape.iter().product::<u64>() as usize;
        let (start, end) = (self.offset as usize, self.offset as usize + n);
        let outside = |fine: bool| ensure(fine, || format!("{what}: elements outside the tensor were written; {name}"));
        match &self.elements {
            Elements::Bf16(b) => {
                let all = b.to_vec().map_err(text)?;
                outside(all[..start].iter().chain(&all[end..]).all(|v| v.to_bits() == 0xA5A5))?;
                Ok(all[start..end].par_iter().map(|v| v.to_f32()).collect())
            }
            Elements::F32(b) => {
                let mut all = b.to_vec().map_err(text)?;
                outside(all[..start].iter().chain(&all[end..]).all(|v| v.to_bits() == 0xA5A5_A5A5))?;
                all.truncate(end);
                Ok(all.split_off(start))
            }
        }
    }
}

/// The inputs of a problem on a device.
pub(super) struct Inputs {
    pub x: Placed,
    pub residual: Option<Placed>,
    pub weight: Option<Placed>,
}

impl Inputs {
    pub(super) fn new(device: &Device, p: &Problem, gaps: Gaps) -> Result<Self, String> {
        let like_x = |values: &Vec<f32>, gaps: Gaps| Placed::input(device, p.dtype, values, &p.shape, gaps);
        // The residual lies differently, but as evenly.
        let other = Gaps { row: 2 * gaps.row, ..gaps };
        let of_weight = Gaps { row: 0, batch: 0, offset: gaps.offset };
        let weight = |values: &Vec<f32>| Placed::input(device, p.dtype, values, &[p.hidden() as u64], of_weight);
        Ok(Self {
            x: like_x(&p.x, gaps)?,
            residual: p.residual.as_ref().map(|r| like_x(r, other)).transpose()?,
            weight: p.weight.as_ref().map(weight).transpose()?,
        })
    }
}

/// What a row of the benchmark calls with: a problem without values, and inputs of `[t, h]` on the device.
pub(super) fn bench_inputs(
    device: &Device,
    dtype: DType,
    (t, h): (u64, u64),
    residual: bool,
) -> Result<(Problem, Inputs), String> {
    let like_x = |seed| Placed::normal(device, dtype, seed, &[t, h]);
    let inputs = Inputs {
        x: like_x(0)?,
        residual: if residual { Some(like_x(1)?) } else { None },
        weight: Some(Placed::normal(device, dtype, 2, &[h])?),
    };
    // Of no rows, made into one of `t` by its shape.
    let mut p = Problem::new(dtype, &[0, h], (residual, true, false));
    p.shape = vec![t, h];
    Ok((p, inputs))
}

/// The outputs of a call.
pub(super) struct Outputs {
    pub out: Placed,
    pub residual_out: Option<Placed>,
    pub rstd: Option<Placed>,
}

/// An optional tensor for a call.
pub(super) fn maybe(t: &mut Option<Placed>) -> ferrotile::Result<Option<TensorMut<'_>>> {
    t.as_mut().map(Placed::tensor_mut).transpose()
}

impl Outputs {
    pub(super) fn new(device: &Device, p: &Problem, offset: u64, all: bool) -> Result<Self, String> {
        let rank = p.shape.len();
        let sum = p.residual.is_some() && all;
        Ok(Self {
            out: Placed::output(device, p.dtype, &p.shape, offset)?,
            residual_out: if sum { Some(Placed::output(device, p.dtype, &p.shape, offset)?) } else { None },
            rstd: if all { Some(Placed::output(device, DType::F32, &p.shape[..rank - 1], offset)?) } else { None },
        })
    }

    pub(super) fn launch(&mut self, stream: &Stream, p: &Problem, inputs: &Inputs) -> ferrotile::Result<()> {
        let args = Args {
            x: inputs.x.tensor()?,
            residual: inputs.residual.as_ref().map(Placed::tensor).transpose()?,
            weight: inputs.weight.as_ref().map(Placed::tensor).transpose()?,
            eps: p.eps,
            out_scale: p.out_scale,
            out: self.out.tensor_mut()?,
            residual_out: maybe(&mut self.residual_out)?,
            rstd: maybe(&mut self.rstd)?,
        };
        op::norm_forward(stream, args)
    }

    fn fill(&mut self) -> Result<(), String> {
        self.out.fill()?;
        [&mut self.residual_out, &mut self.rstd].into_iter().flatten().try_for_each(Placed::fill)
    }

    /// Everything against the reference; returns `rstd` and the norm.
    pub(super) fn check(&self, p: &Problem) -> Result<(Vec<f32>, Vec<f32>), String> {
        let sum = p.sum();
        if let Some(got) = &self.residual_out {
            same("residual_out", &p.name, &p.shape, &got.values("residual_out", &p.name)?, &sum)?;
        }
        let rstd = self.rstd.as_ref().ok_or_else(|| format!("no rstd; {}", p.name))?.values("rstd", &p.name)?;
        p.check_rstd(&sum, &rstd)?;
        let out = self.out.values("out", &p.name)?;
        same("out", &p.name, &p.shape, &out, &p.norm(&sum, &rstd))?;
        Ok((rstd, out))
    }
}

// Running.

pub(super) const DTYPES: [DType; 2] = [DType::Bf16, DType::F32];

/// Residual, weight, scale.
pub(super) const PARTS: [(bool, bool, bool); 4] =
    [(false, false, false), (true, true, true), (false, true, false), (true, false, true)];

/// Shapes for every device, with gaps, and the offset of the outputs: every way through the kernels.
pub(super) fn small_shapes(dtype: DType) -> Vec<(Vec<u64>, Gaps, u64)> {
    let vector = if dtype == DType::Bf16 { 8 } else { 4 };
    let none = Gaps::default();
    let even = Gaps { row: vector, batch: 3 * vector, offset: vector };
    let odd = Gaps { row: 3, batch: 1, offset: 1 };
    let held = if dtype == DType::Bf16 { 16384 } else { 8192 };
    vec![
        // Rows on 16 and 32 lanes, with more than a block of them; on two warps and more; the longest that is held.
        (vec![11, 128], none, 0),
        (vec![21, 32], even, vector),
        (vec![10, 192], even, 0),
        (vec![5, 768], none, 0),
        (vec![3, 2048], even, 0),
        (vec![1, 7168], none, 0),
        (vec![2, held], none, 0),
        // Longer; the last round has few channels.
        (vec![2, held + vector], even, 0),
        // Channel by channel: ragged or not aligned, short and long.
        (vec![12, 37], odd, 1),
        (vec![3, 1], none, 0),
        (vec![11, 200], odd, 0),
        (vec![3, 200], none, 1),
        (vec![2, 2087], odd, 3),
        (vec![1, held + 3], none, 0),
        // Three dimensions.
        (vec![3, 5, 96], even, 0),
        (vec![2, 3, 1100], even, vector),
        (vec![2, 4, 51], odd, 0),
        (vec![4, 1, 64], even, 0),
    ]
}

fn run(ctx: &Ctx) -> Result<Report, String> {
    for dtype in DTYPES {
        for (i, (shape, gaps, offset)) in small_shapes(dtype).into_iter().enumerate() {
            let p = Problem::new(dtype, &shape, PARTS[i % 4]);
            check_problem(ctx, &p, gaps, offset)?;
            check_problem(ctx, &Problem::new(dtype, &shape, PARTS[(i + 1) % 4]), gaps, offset)?;
        }
        for shape in [[20, 192], [11, 1024], [10, 51]] {
            check_problem(ctx, &Problem::new(dtype, &shape, (false, true, false)).awkward(), Gaps::default(), 0)?;
            check_problem(ctx, &Problem::new(dtype, &shape, (true, false, false)).awkward(), Gaps::default(), 0)?;
        }
        for shape in [&[0, 64][..], &[0, 3, 64], &[3, 0, 64]] {
            check_problem(ctx, &Problem::new(dtype, shape, PARTS[1]), Gaps::default(), 0)?;
        }
    }
    if ctx.depth == Depth::Full {
        for h in [128, 192, 768, 2048, 4096, 7168, 8192] {
            for dtype in DTYPES {
                for (t, parts) in [(1, PARTS[1]), (512, PARTS[0]), (512, PARTS[2]), (512, PARTS[3]), (8001, PARTS[1])] {
                    check_problem(ctx, &Problem::new(dtype, &[t, h], parts), Gaps::default(), 0)?;
                }
                check_problem(ctx, &Problem::new(dtype, &[7, 73, h], PARTS[1]), Gaps { row: 8, batch: 16, offset: 0 }, 0)?;
            }
        }
        check_problem(ctx, &Problem::new(DType::Bf16, &[1001, 16384], PARTS[1]), Gaps::default(), 0)?;
        check_problem(ctx, &Problem::new(DType::F32, &[501, 16384], PARTS[1]), Gaps::default(), 0)?;
    }
    if !ctx.device.is_emulator() {
        check_graph(ctx)?;
        if ctx.depth == Depth::Full {
            check_large(ctx)?;
        }
    }
    let notes = golden::check_cases(ctx, &["norm_forward"], |golden, case| check_golden(ctx, golden, case))?;
    Ok(Report { notes, ..ctx.report() })
}

/// A call with all outputs, a second one over its results, and one with the norm alone: all the same bits.
fn check_problem(ctx: &Ctx, p: &Problem, gaps: Gaps, offset: u64) -> Result<(), String> {
    let name = format!("{},gaps={gaps:?},offset={offset}", p.name);
    if !ctx.case(&name) {
        return Ok(());
    }
    let stream = ctx.device.stream().map_err(text)?;
    let inputs = Inputs::new(&ctx.device, p, gaps)?;
    let mut outputs = Outputs::new(&ctx.device, p, offset, true)?;
    outputs.launch(&stream, p, &inputs).map_err(text)?;
    let (_, out) = outputs.check(p)?;
    outputs.launch(&stream, p, &inputs).map_err(text)?;
    same("out, a second time", &name, &p.shape, &outputs.out.values("out", &name)?, &out)?;
    // Another alignment takes another way, and may not change a bit. The largest outputs take too long to look at thrice.
    let others = if p.x.len() < 1 << 24 { &[offset, offset + 1][..] } else { &[] };
    for &other in others {
        let mut alone = Outputs::new(&ctx.device, p, other, false)?;
        alone.launch(&stream, p, &inputs).map_err(text)?;
        same("out alone", &name, &p.shape, &alone.out.values("out", &name)?, &out)?;
    }
    Ok(())
}

/// Floats of a golden tensor of either type.
pub(super) fn golden_floats(golden: &Golden, case: &Case, key: &str) -> Result<Vec<f32>, String> {
    let t = golden.tensor(case, key)?;
    if t.bytes.len() as u64 == 2 * t.shape.iter().product::<u64>() {
        Ok(t.to_vec::<bf16>()?.iter().map(|v| v.to_f32()).collect())
    } else {
        t.to_vec()
    }
}

/// The inputs of a golden case.
pub(super) fn golden_problem(golden: &Golden, case: &Case) -> Result<Problem, String> {
    let keys = golden.keys(case);
    let optional = |key: &str| keys.iter().any(|k| k == key).then(|| golden_floats(golden, case, key)).transpose();
    let x = golden.tensor(case, "in/x")?;
    let bf16 = x.bytes.len() as u64 == 2 * x.shape.iter().product::<u64>();
    Ok(Problem {
        name: case.name(),
        dtype: if bf16 { DType::Bf16 } else { DType::F32 },
        shape: x.shape.clone(),
        x: golden_floats(golden, case, "in/x")?,
        residual: optional("in/residual")?,
        weight: optional("in/weight")?,
        eps: case.param("eps")?,
        out_scale: case.param("out_scale")?,
    })
}

/// What the peers computed on a GPU: the sum bit for bit, the rest within one code.
fn check_golden(ctx: &Ctx, golden: &Golden, case: &Case) -> Result<(), String> {
    let p = golden_problem(golden, case)?;
    let stream = ctx.device.stream().map_err(text)?;
    let inputs = Inputs::new(&ctx.device, &p, Gaps::default())?;
    let mut outputs = Outputs::new(&ctx.device, &p, 0, true)?;
    outputs.launch(&stream, &p, &inputs).map_err(text)?;
    let (rstd, out) = outputs.check(&p)?;
    let close = |what: &str, key: &str, got: &[f32], rtol: f64| {
        let expected = golden_floats(golden, case, key)?;
        compare::allclose(what, &p.name, &[got.len() as u64], got, &expected, (1e-30, rtol))
    };
    // Neighbouring bf16 are at most 2^-7 apart.
    close("out", "out/plain.0", &out, if p.dtype == DType::Bf16 { 1.0 / 128.0 } else { 1e-5 })?;
    close("rstd", "out/plain.1", &rstd, 1e-5)?;
    same("residual_out", &p.name, &p.shape, &p.sum(), &golden_floats(golden, case, "out/plain.2")?)
}

/// Recorded in a graph and replayed.
fn check_graph(ctx: &Ctx) -> Result<(), String> {
    let p = Problem::new(DType::Bf16, &[133, 576], PARTS[1]);
    if !ctx.case(&format!("kind=graph,{}", p.name)) {
        return Ok(());
    }
    let stream = ctx.device.stream().map_err(text)?;
    let inputs = Inputs::new(&ctx.device, &p, Gaps::default())?;
    let mut outputs = Outputs::new(&ctx.device, &p, 0, true)?;
    let graph = stream.capture(|s| outputs.launch(s, &p, &inputs)).map_err(text)?;
    for _ in 0..2 {
        outputs.fill()?;
        graph.launch(&stream).map_err(text)?;
        stream.synchronize().map_err(text)?;
        outputs.check(&p)?;
    }
    Ok(())
}

/// More than 2^32 elements: rows are one row in memory (stride 0), so every row of the output must be the same.
fn check_large(ctx: &Ctx) -> Result<(), String> {
    let (t, h) = (600_001u64, 7168u64);
    let p = Problem::new(DType::Bf16, &[1, h], (false, true, false));
    let name = format!("kind=large,t={t},{}", p.name);
    if !ctx.case(&name) {
        return Ok(());
    }
    let stream = ctx.device.stream().map_err(text)?;
    let mut inputs = Inputs::new(&ctx.device, &p, Gaps::default())?;
    let mut one = Outputs::new(&ctx.device, &p, 0, true)?;
    one.launch(&stream, &p, &inputs).map_err(text)?;
    let (rstd, expected) = one.check(&p)?;
    (inputs.x.shape, inputs.x.strides) = (vec![t, h], vec![0, 1]);
    let many = Problem { shape: vec![t, h], ..p.clone() };
    let mut out = Outputs::new(&ctx.device, &many, 0, true)?;
    out.launch(&stream, &many, &inputs).map_err(text)?;
    let Elements::Bf16(got) = &out.out.elements else { return Err("no bf16".to_owned()) };
    let got = got.to_vec().map_err(text)?;
    let expected: Vec<bf16> = expected.iter().map(|v| bf16::from_f32(*v)).collect();
    let rows = got[..(t * h) as usize].par_chunks_exact(h as usize).enumerate();
    if let Some(bad) = rows.filter(|(_, row)| *row != &expected[..]).map(|(i, _)| i).min() {
        return Err(format!("out: row {bad} differs; {name}"));
    }
    let got = out.rstd.as_ref().map_or(Ok(Vec::new()), |r| r.values("rstd", &name))?;
    ensure(got.iter().all(|v| v.to_bits() == rstd[0].to_bits()), || format!("rstd: rows differ; {name}"))
}

// The benchmark.

/// The peers' case with a residual, the same without, the other type, and small inputs.
pub fn bench() -> Vec<Row> {
    let mut rows = Vec::new();
    let mut row = |dtype: DType, t: u64, h: u64, residual: bool| {
        let n = t * h * dtype.size();
        let bytes = n * if residual { 4 } else { 2 } + h * dtype.size() + 4 * t;
        let input = if dtype == DType::Bf16 { "bf16" } else { "f32" };
        let case = format!("h={h},input={input},residual={},t={t}", if residual { "True" } else { "False" });
        let build = move |device: &Device, _: &Stream| -> Result<Launch, String> {
            let (p, inputs) = bench_inputs(device, dtype, (t, h), residual)?;
            let mut outputs = Outputs::new(device, &p, 0, true)?;
            Ok(Box::new(move |stream| outputs.launch(stream, &p, &inputs)))
        };
        rows.push(Row { op: "norm_forward", case, bytes, build: Box::new(build) });
    };
    for residual in [true, false] {
        row(DType::Bf16, 8064, 7168, residual);
        row(DType::F32, 8064, 7168, residual);
    }
    row(DType::Bf16, 8001, 4096, true);
    row(DType::Bf16, 8001, 2048, true);
    row(DType::Bf16, 4001, 16384, true);
    row(DType::Bf16, 262_144, 128, false);
    row(DType::F32, 4001, 16384, true);
    for t in [1, 16, 128] {
        row(DType::Bf16, t, 7168, true);
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferrotile::Error;
    use proptest::prelude::{ProptestConfig, any, proptest};

    #[test]
    fn suite() {
        SUITE.test();
    }

    #[test]
    fn the_reference_is_a_norm() {
        let p = Problem {
            name: String::new(),
            dtype: DType::F32,
            shape: vec![1, 2],
            x: vec![1.0, 5.0],
            residual: Some(vec![2.0, -1.0]),
            weight: Some(vec![1.0, 0.5]),
            eps: 3.5,
            out_scale: 2.0,
        };
        let sum = p.sum();
        assert_eq!((&sum[..], &p.rstd(&sum)[..]), (&[3.0, 4.0][..], &[0.25][..]));
        assert_eq!(p.norm(&sum, &[0.25]), [1.5, 1.0]);
    }

    #[test]
    fn bad_arguments_are_refused() {
        let device = Device::emulator();
        let stream = device.stream().unwrap();
        let x = device.zeros::<f32>(512).unwrap();
        let half = device.zeros::<bf16>(512).unwrap();
        let mut out = device.alloc::<f32>(512).unwrap();
        let mut sum = device.alloc::<f32>(512).unwrap();
        let mut rstd = device.alloc::<f32>(16).unwrap();
        let mut refused = |edit: &dyn Fn(&mut Args<'_>, [u64; 3])| {
            for b in [&mut out, &mut sum, &mut rstd] {
                b.fill_bytes(FILL).unwrap();
            }
            let at = [out.as_ptr(), sum.as_ptr(), rstd.as_ptr()];
            let mut args = Args {
                x: x.tensor(&[4, 64]).unwrap(),
                residual: Some(x.tensor(&[4, 64]).unwrap()),
                weight: Some(x.tensor(&[64]).unwrap()),
                eps: 1e-6,
                out_scale: 1.0,
                out: out.tensor_mut(&[4, 64]).unwrap(),
                residual_out: Some(sum.tensor_mut(&[4, 64]).unwrap()),
                rstd: Some(rstd.tensor_mut(&[4]).unwrap()),
            };
            edit(&mut args, at);
            let error = op::norm_forward(&stream, args).expect_err("this call must be refused");
            assert!(error.to_string().starts_with("norm_forward: "), "{error}");
            for b in [&out, &sum, &rstd] {
                assert!(b.to_vec().unwrap().iter().all(|v| v.to_bits() == 0xA5A5_A5A5), "{error}");
            }
            error
        };
        macro_rules! refused {
            (|$a:ident, $at:ident| $edit:expr, $pattern:pat) => {{
                let error = refused(&|$a: &mut Args<'_>, $at: [u64; 3]| {
                    let _ = $at;
                    $edit
                });
                assert!(matches!(error, $pattern), "{error:?}");
            }};
        }
        // SAFETY: refused calls touch nothing.
        let read = |ptr: u64, dtype, shape: &[u64], strides: &[u64]| unsafe {
            TensorRef::from_raw(&device, ptr, dtype, shape, strides).unwrap()
        };
        let write = |ptr: u64, dtype, shape: &[u64], strides: &[u64]| unsafe {
            TensorMut::from_raw(&device, ptr, dtype, shape, strides).unwrap()
        };
        let (f, x0) = (DType::F32, x.as_ptr());
        refused!(|a, at| a.x = read(x0, f, &[256], &[1]), Error::Shape { arg: "x", .. });
        refused!(|a, at| a.x = read(x0, f, &[1, 1, 4, 64], &[256, 256, 64, 1]), Error::Shape { arg: "x", .. });
        refused!(|a, at| a.x = read(x0, f, &[4, 0], &[64, 1]), Error::Value { arg: "hidden", .. });
        refused!(|a, at| a.x = read(x0, f, &[1 << 31, 64], &[0, 1]), Error::Value { arg: "num_tokens", .. });
        refused!(|a, at| a.x = read(x0, f, &[1 << 20, 1 << 20, 64], &[0, 0, 1]), Error::Value { arg: "num_tokens", .. });
        refused!(|a, at| a.x = read(x0, f, &[1, 1 << 31], &[0, 1]), Error::Value { arg: "hidden", .. });
        refused!(|a, at| a.x = read(x0, DType::E4m3, &[4, 64], &[64, 1]), Error::DType { arg: "x", .. });
        refused!(|a, at| a.x = read(x0, f, &[4, 64], &[1, 4]), Error::Layout { arg: "x", .. });
        refused!(|a, at| a.x = read(x0 + 2, f, &[4, 64], &[64, 1]), Error::Layout { arg: "x", .. });
        refused!(
            |a, at| a.residual = Some(read(half.as_ptr(), DType::Bf16, &[4, 64], &[64, 1])),
            Error::DType { arg: "residual", .. }
        );
        refused!(|a, at| a.residual = Some(read(x0, f, &[5, 64], &[64, 1])), Error::Shape { arg: "residual", .. });
        refused!(|a, at| a.residual = Some(read(x0, f, &[4, 64], &[1, 4])), Error::Layout { arg: "residual", .. });
        refused!(|a, at| a.residual = None, Error::Value { arg: "residual_out", .. });
        refused!(|a, at| a.weight = Some(read(half.as_ptr(), DType::Bf16, &[64], &[1])), Error::DType { arg: "weight", .. });
        refused!(|a, at| a.weight = Some(read(x0, f, &[63], &[1])), Error::Shape { arg: "weight", .. });
        refused!(|a, at| a.weight = Some(read(x0, f, &[64], &[2])), Error::Layout { arg: "weight", .. });
        for eps in [-1e-6, f32::NAN, f32::INFINITY] {
            refused!(|a, at| a.eps = eps, Error::Value { arg: "eps", .. });
        }
        refused!(|a, at| a.out = write(at[0], DType::Bf16, &[4, 64], &[64, 1]), Error::DType { arg: "out", .. });
        refused!(|a, at| a.out = write(at[0], f, &[4, 32], &[32, 1]), Error::Shape { arg: "out", .. });
        refused!(|a, at| a.out = write(at[0], f, &[4, 64], &[65, 1]), Error::Layout { arg: "out", .. });
        refused!(|a, at| a.residual_out = Some(write(at[1], f, &[4, 32], &[32, 1])), Error::Shape { arg: "residual_out", .. });
        refused!(|a, at| a.residual_out = Some(write(at[1], f, &[4, 64], &[65, 1])), Error::Layout { arg: "residual_out", .. });
        refused!(|a, at| a.rstd = Some(write(at[2], f, &[4, 1], &[1, 1])), Error::Shape { arg: "rstd", .. });
        refused!(|a, at| a.rstd = Some(write(at[2], f, &[4], &[2])), Error::Layout { arg: "rstd", .. });
        refused!(|a, at| a.rstd = Some(write(at[2], DType::U32, &[4], &[1])), Error::DType { arg: "rstd", .. });
        refused!(|a, at| a.x = read(at[0] + 64, f, &[4, 64], &[64, 1]), Error::Overlap { a: "x", b: "out", .. });
        refused!(|a, at| a.residual = Some(read(at[1], f, &[4, 64], &[64, 1])), Error::Overlap { a: "residual", .. });
        refused!(|a, at| a.weight = Some(read(at[2], f, &[64], &[0])), Error::Layout { arg: "weight", .. });
        refused!(|a, at| a.rstd = Some(write(at[0], f, &[4], &[1])), Error::Overlap { a: "rstd", b: "out", .. });
        let checked = Device::emulator().checked();
        let elsewhere = checked.zeros::<f32>(64).unwrap();
        // SAFETY: as above.
        let elsewhere = unsafe { TensorRef::from_raw(&checked, elsewhere.as_ptr(), f, &[64], &[1]).unwrap() };
        refused!(|a, at| a.weight = Some(read_on(elsewhere)), Error::DeviceMismatch { arg: "weight", .. });
    }

    /// A tensor for any lifetime; for calls that are refused.
    fn read_on<'a>(t: TensorRef<'_>) -> TensorRef<'a> {
        // SAFETY: nothing is read through it.
        unsafe { TensorRef::from_raw(t.device(), t.ptr(), t.dtype(), t.shape(), t.strides()).unwrap() }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

        /// Any shape, distance of rows, alignment and parts.
        #[test]
        fn any_norm(
            b in 1u64..3, t in 0u64..7, h in 1u64..900, row in 0u64..9, batch in 0u64..9, offset in 0u64..9, out_offset in 0u64..9,
            three in any::<bool>(), f32_input in any::<bool>(), parts in 0usize..4, awkward in any::<bool>(),
        ) {
            let shape = if three { vec![b, t, h] } else { vec![t, h] };
            let p = Problem::new(DTYPES[f32_input as usize], &shape, PARTS[parts]);
            let p = if awkward { p.awkward() } else { p };
            let ctx = Ctx::new(Device::emulator().checked(), Depth::Small);
            check_problem(&ctx, &p, Gaps { row, batch, offset }, out_offset).unwrap();
        }
    }
}
