//! Reference, cases, checks and benchmark rows of `swiglu_backward`, and what the tests of the fused op share with them.

use crate::support::bench::{Launch, Row};
use crate::support::cases::{Depth, MoeCase};
use crate::support::compare;
use crate::support::device_math::{self, Function};
use crate::support::golden::{self, Case, Golden};
use crate::support::inputs;
use crate::support::rng::Rng;
use crate::support::suite::{Ctx, Report, Suite, ensure, text};
use ferrotile::quant::swiglu_backward::{self as op, Args, WeightGrad};
use ferrotile::quant::{ExpertRows, RowWeights};
use ferrotile::{Buffer, DType, Device, Stream, TensorMut, TensorRef};
use half::bf16;
use rayon::prelude::*;

/// What the `check` binary runs.
pub const SUITE: Suite = Suite { op: "swiglu_backward", run };

// The problem.

/// An expanded MoE tensor: its rows by expert, each expert from the next multiple of the alignment on, and the maps of both releases.
pub(super) struct Layout {
    pub tokens: u64,
    pub topk: u64,
    pub alignment: u32,
    pub pos_to_expert: Vec<i32>,
    pub pos_to_token_topk: Vec<i32>,
    pub token_topk_to_pos: Vec<i32>,
    pub psum: Vec<i32>,
}

impl Layout {
    pub fn new(case: &MoeCase, alignment: u32) -> Self {
        let experts = case.topk_idx();
        let topk = case.num_topk;
        let mut layout = Self {
            tokens: experts.len() as u64 / topk,
            topk,
            alignment,
            pos_to_expert: Vec::new(),
            pos_to_token_topk: Vec::new(),
            token_topk_to_pos: vec![-1; experts.len()],
            psum: Vec::new(),
        };
        for expert in 0..case.num_experts as i64 {
            // Backwards: no op may count on an order inside an expert.
            for slot in (0..experts.len()).rev().filter(|slot| experts[*slot] == expert) {
                layout.token_topk_to_pos[slot] = layout.pos_to_expert.len() as i32;
                layout.pos_to_expert.push(expert as i32);
                layout.pos_to_token_topk.push(slot as i32);
            }
            layout.psum.push(layout.pos_to_expert.len() as i32);
            let rows = layout.pos_to_expert.len().next_multiple_of(alignment as usize);
            layout.pos_to_expert.resize(rows, -1);
            layout.pos_to_token_topk.resize(rows, -1);
        }
        layout
    }

    /// Padding behind the last expert.
    pub fn with_tail(mut self, rows: usize) -> Self {
        let rows = self.pos_to_expert.len() + rows;
        self.pos_to_expert.resize(rows, -1);
        self.pos_to_token_topk.resize(rows, -1);
        self
    }

    pub fn rows(&self) -> u64 {
        self.pos_to_expert.len() as u64
    }
}

/// A variant of [`ExpertRows`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum RowsBy {
    All,
    PosToExpert,
    Psum,
}

/// A variant of [`RowWeights`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum WeightsBy {
    None,
    PerRow(f32),
    PerTokenTopk,
}

/// What may vary between calls on the same inputs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Options {
    pub rows: RowsBy,
    pub weights: WeightsBy,
    pub clamp: Option<f32>,
    pub weight_grad: bool,
    pub act_out: bool,
}

impl Options {
    pub fn name(&self) -> String {
        let Self { rows, weights, clamp, weight_grad, act_out } = self;
        format!("act_out={act_out},clamp={clamp:?},rows={rows:?},weight_grad={weight_grad},weights={weights:?}")
    }

    /// As 1.0.0 calls it.
    pub fn v1(clamp: Option<f32>) -> Self {
        Self { rows: RowsBy::All, weights: WeightsBy::PerTokenTopk, clamp, weight_grad: true, act_out: true }
    }

    /// As 2.1.0 calls it, with everything.
    pub fn v2(clamp: Option<f32>) -> Self {
        Self { rows: RowsBy::Psum, weights: WeightsBy::PerRow(2.5), clamp, weight_grad: true, act_out: true }
    }

    /// Every combination of rows and weights, with the other options in turn.
    pub fn all() -> Vec<Self> {
        let clamps = [None, Some(10.0), Some(0.5)];
        let mut all = Vec::new();
        for rows in [RowsBy::All, RowsBy::PosToExpert, RowsBy::Psum] {
            for weights in [WeightsBy::None, WeightsBy::PerRow(2.5), WeightsBy::PerRow(-1.0), WeightsBy::PerTokenTopk] {
                let n = all.len();
                let weight_grad = weights != WeightsBy::None && n % 5 != 1;
                all.push(Self { rows, weights, clamp: clamps[n % 3], weight_grad, act_out: n % 4 != 2 });
            }
        }
        all
    }
}

/// Inputs of a row-wise op on `layout.rows()` rows, as f32.
pub(super) struct Problem {
    pub layout: Layout,
    pub hidden: usize,
    /// Gates and the other half, row by row.
    pub x: Vec<f32>,
    pub grad: Vec<f32>,
    pub row_weights: Vec<f32>,
    pub topk_weights: Vec<f32>,
}

impl Problem {
    /// `x` and `grad` as given.
    pub fn new(layout: Layout, hidden: u64, x: Vec<f32>, grad: Vec<f32>, name: &str) -> Self {
        let rng = Rng::named(name);
        let weights = |n: u64, len| rng.stream(n).fill(len, |rng, i| rng.unit(i));
        let (rows, slots) = (layout.rows() as usize, layout.token_topk_to_pos.len());
        Self { hidden: hidden as usize, x, grad, row_weights: weights(7, rows), topk_weights: weights(8, slots), layout }
    }

    /// `e^-x` of every gate and of the clamps, as the device computes them.
    pub fn exps(&self, device: &Device) -> Result<Exps, String> {
        let h = self.hidden.max(1);
        let gates: Vec<f32> = self.x.par_chunks(2 * h).flat_map_iter(|row| row[..h].iter().map(|x| -x)).collect();
        Ok(Exps { of_gates: device_math::exp_of(device, &gates)?, device: *device })
    }

    fn holds_token(&self, row: usize, by: RowsBy) -> bool {
        match by {
            RowsBy::All => true,
            RowsBy::PosToExpert => self.layout.pos_to_expert[row] >= 0,
            RowsBy::Psum => {
                // The walk of the specification.
                let row = row as i64;
                let align = |end: i64| (end as u64).next_multiple_of(self.layout.alignment.into()) as i64;
                let mut before = 0;
                for end in &self.layout.psum {
                    if row < *end as i64 {
                        return row >= align(before);
                    }
                    before = (*end).into();
                }
                false
            }
        }
    }

    /// Weight of a row and the number of its gradient.
    fn weight(&self, row: usize, by: WeightsBy) -> (f32, Option<usize>) {
        match by {
            WeightsBy::None => (1.0, None),
            WeightsBy::PerRow(factor) => (self.row_weights[row] * factor, Some(row)),
            WeightsBy::PerTokenTopk => match usize::try_from(self.layout.pos_to_token_topk[row]) {
                Ok(slot) => (self.topk_weights[slot], Some(slot)),
                Err(_) => (0.0, None),
            },
        }
    }

    /// The specification's formulas (5.12), with the exact division.
    pub fn expected(&self, options: &Options, exps: &Exps) -> Result<Expected, String> {
        let h = self.hidden;
        let clamp = options.clamp;
        let exp_of_clamp = match clamp {
            Some(clamp) => device_math::exp_of(&exps.device, &[-clamp])?[0],
            None => f32::NAN,
        };
        let rows = self.layout.rows() as usize;
        let mut of = Expected {
            holds_token: (0..rows).map(|row| self.holds_token(row, options.rows)).collect(),
            x_grad: vec![0.0; rows * 2 * h],
            act_out: vec![0.0; rows * h],
            weight_grad: Vec::new(),
        };
        let number = match options.weights {
            WeightsBy::None => 0,
            WeightsBy::PerRow(_) => rows,
            WeightsBy::PerTokenTopk => self.topk_weights.len(),
        };
        if options.weight_grad {
            of.weight_grad = vec![(0.0, 0.0); number];
        }
        if h == 0 {
            return Ok(of);
        }
        let outputs = of.x_grad.par_chunks_mut(2 * h).zip(of.act_out.par_chunks_mut(h)).enumerate();
        let sums: Vec<(f64, f64)> = outputs
            .map(|(row, (x_grad, act_out))| {
                if !of.holds_token[row] {
                    return (0.0, 0.0);
                }
                let (w, _) = self.weight(row, options.weights);
                let (mut sum, mut magnitude) = (0.0, 0.0);
                for i in 0..h {
                    let (mut x, mut y) = (self.x[row * 2 * h + i], self.x[row * 2 * h + h + i]);
                    let grad = self.grad[row * h + i];
                    let mut exp = exps.of_gates[row * h + i];
                    let (mut x_cut, mut y_cut) = (false, false);
                    if let Some(c) = clamp {
                        (x_cut, y_cut) = (x > c, y > c || y < -c);
                        if x_cut {
                            (x, exp) = (c, exp_of_clamp);
                        }
                        if y_cut {
                            y = if y > c { c } else { -c };
                        }
                    }
                    let t = 1.0 + exp;
                    let s = 1.0 / t;
                    let act = (x / t) * y;
                    let g = (grad * w) * s;
                    x_grad[i] = if x_cut { 0.0 } else { (g * y) * x.mul_add(1.0 - s, 1.0) };
                    x_grad[h + i] = if y_cut { 0.0 } else { g * x };
                    act_out[i] = act * w;
                    sum += grad as f64 * act as f64;
                    magnitude += (grad as f64 * act as f64).abs();
                }
                (sum, magnitude)
            })
            .collect();
        if options.weight_grad {
            let factor = if let WeightsBy::PerRow(factor) = options.weights { factor as f64 } else { 1.0 };
            for (row, (sum, magnitude)) in sums.iter().enumerate() {
                if let (_, Some(slot)) = self.weight(row, options.weights) {
                    of.weight_grad[slot] = (sum * factor, magnitude * factor.abs());
                }
            }
        }
        Ok(of)
    }
}

/// Exponentials of a problem's gates.
pub(super) struct Exps {
    of_gates: Vec<f32>,
    device: Device,
}

/// Results before they are rounded.
pub(super) struct Expected {
    pub holds_token: Vec<bool>,
    pub x_grad: Vec<f32>,
    pub act_out: Vec<f32>,
    /// The sums, and those of magnitudes.
    weight_grad: Vec<(f64, f64)>,
}

impl Expected {
    /// A gradient is a sum of f32 products, of which each lane adds some tens and the block joins a few hundred: errors of some `2^-24`
    /// of the magnitudes each. What has no row must be zero.
    pub fn check_weight_grad(&self, name: &str, got: &[f32]) -> Result<(), String> {
        ensure(got.len() == self.weight_grad.len(), || format!("weight_grad: {} elements; {name}", got.len()))?;
        for (i, (got, (sum, magnitude))) in got.iter().zip(&self.weight_grad).enumerate() {
            let fine = if sum.is_nan() {
                got.is_nan()
            } else if *magnitude >= f32::MAX as f64 {
                // What an overflow leaves depends on the order.
                true
            } else {
                (*got as f64 - sum).abs() <= magnitude * 2f64.powi(-18) && (*magnitude > 0.0 || *got == 0.0)
            };
            ensure(fine, || format!("weight_grad: {i}: got {got:e}, expected {sum:e}; {name}"))?;
        }
        Ok(())
    }
}

/// The bits that conversion to bf16 gives.
pub(super) fn to_bf16(v: f32) -> bf16 {
    if v.is_nan() { bf16::from_bits(0x7FFF) } else { bf16::from_f32(v) }
}

/// Values with what is hard: zeros of both signs, subnormals, large ones, NaN, gates whose `s` is subnormal or 0.
pub(super) fn awkward(len: usize, name: &str) -> Vec<f32> {
    let rng = Rng::named(name).stream(3);
    Rng::named(name).fill(len, |values, i| {
        let draw = rng.bits(i);
        let v = values.normal(i);
        match draw % 64 {
            0 => 0.0,
            1 => -0.0,
            2 => f32::from_bits((draw >> 16) as u32 & 0x807F_FFFF),
            3 => v * 1e-30,
            4 => v * 1e4,
            5 => -87.3 - v.abs(),
            6 => -88.5 + 0.2 * v,
            7 => -110.0,
            8 if draw >> 8 & 15 == 0 => f32::NAN,
            9 => 0.5,
            10 => -0.5,
            11 => 10.0,
            12 => v * 30.0,
            _ => v,
        }
    })
}

// Buffers.

/// A buffer of floats.
pub(super) enum Floats {
    Bf16(Buffer<bf16>),
    F32(Buffer<f32>),
}

/// Bytes behind an output that must stay as they are, as elements.
pub(super) const GUARD: usize = 64;
pub(super) const FILL: u8 = 0xA5;

impl Floats {
    /// Rows of `columns` values that lie `stride` elements apart, from element `offset` on.
    pub fn upload(
        device: &Device,
        dtype: DType,
        values: &[f32],
        columns: u64,
        (stride, offset): (u64, u64),
    ) -> Result<Self, String> {
        let rows = (values.len() as u64).checked_div(columns).unwrap_or(0);
        // What lies between rows would be noticed if it were read.
        let mut all = vec![1e30f32; (offset + rows * stride) as usize];
        for (row, values) in values.chunks_exact(columns.max(1) as usize).enumerate() {
            let start = offset as usize + row * stride as usize;
            all[start..start + values.len()].copy_from_slice(values);
        }
        Ok(match dtype {
            DType::Bf16 => {
                let all: Vec<bf16> = all.par_iter().map(|v| to_bf16(*v)).collect();
                Self::Bf16(device.upload(&all).map_err(text)?)
            }
            _ => Self::F32(device.upload(&all).map_err(text)?),
        })
    }

    /// Normal values for a benchmark.
    pub fn normal(device: &Device, dtype: DType, seed: u64, len: u64) -> Result<Self, String> {
        Ok(match dtype {
            DType::Bf16 => Self::Bf16(inputs::normal_bf16(device, seed, len)?),
            _ => Self::F32(inputs::normal_f32(device, seed, len)?),
        })
    }

    /// An output with a guard behind it.
    pub fn output(device: &Device, dtype: DType, len: usize) -> Result<Self, String> {
        let mut new = match dtype {
            DType::Bf16 => Self::Bf16(device.alloc(len + GUARD).map_err(text)?),
            _ => Self::F32(device.alloc(len + GUARD).map_err(text)?),
        };
        new.fill()?;
        Ok(new)
    }

    pub fn fill(&mut self) -> Result<(), String> {
        match self {
            Self::Bf16(b) => b.fill_bytes(FILL),
            Self::F32(b) => b.fill_bytes(FILL),
        }
        .map_err(text)
    }

    pub fn tensor(&self, shape: &[u64], strides: &[u64], offset: u64) -> ferrotile::Result<TensorRef<'_>> {
        match self {
            Self::Bf16(b) => b.strided(shape, strides, offset),
            Self::F32(b) => b.strided(shape, strides, offset),
        }
    }

    pub fn tensor_mut(&mut self, shape: &[u64]) -> ferrotile::Result<TensorMut<'_>> {
        match self {
            Self::Bf16(b) => b.tensor_mut(shape),
            Self::F32(b) => b.tensor_mut(shape),
        }
    }

    /// The values, without the guard.
    pub fn values(&self) -> Result<Vec<f32>, String> {
        let mut all = match self {
            Self::Bf16(b) => b.to_vec().map_err(text)?.par_iter().map(|v| v.to_f32()).collect(),
            Self::F32(b) => b.to_vec().map_err(text)?,
        };
        all.truncate(all.len() - GUARD);
        Ok(all)
    }

    /// Equal to the expected values once those are rounded; nothing behind them was written.
    pub fn check(&self, what: &str, name: &str, shape: &[u64], expected: &[f32]) -> Result<(), String> {
        match self {
            Self::Bf16(b) => {
                let got = b.to_vec().map_err(text)?;
                let rounded: Vec<bf16> = expected.par_iter().map(|v| to_bf16(*v)).collect();
                compare::equal(what, name, shape, &got[..expected.len()], &rounded)?;
                self.check_guard(what, name, bytemuck::cast_slice(&got[expected.len()..]))
            }
            Self::F32(b) => {
                let got = b.to_vec().map_err(text)?;
                // Which NaN it is does not matter.
                let canonical = |v: &f32| if v.is_nan() { f32::NAN } else { *v };
                let [a, b]: [Vec<f32>; 2] = [&got[..expected.len()], expected].map(|v| v.par_iter().map(canonical).collect());
                compare::equal(what, name, shape, &a, &b)?;
                self.check_guard(what, name, bytemuck::cast_slice(&got[expected.len()..]))
            }
        }
    }

    fn check_guard(&self, what: &str, name: &str, guard: &[u8]) -> Result<(), String> {
        ensure(guard.iter().all(|b| *b == FILL), || format!("{what}: bytes behind the tensor were written; {name}"))
    }
}

/// Maps, weights and their gradients on the device.
pub(super) struct Routing {
    rows: u64,
    slots: [u64; 2],
    alignment: u32,
    pos_to_expert: Buffer<i32>,
    psum: Buffer<i32>,
    pos_to_token_topk: Buffer<i32>,
    token_topk_to_pos: Buffer<i32>,
    row_weights: Buffer<f32>,
    topk_weights: Buffer<f32>,
}

impl Routing {
    pub fn new(device: &Device, problem: &Problem) -> Result<Self, String> {
        let layout = &problem.layout;
        let map = |values: &[i32]| device.upload(values).map_err(text);
        Ok(Self {
            rows: layout.rows(),
            slots: [layout.tokens, layout.topk],
            alignment: layout.alignment,
            pos_to_expert: map(&layout.pos_to_expert)?,
            psum: map(&layout.psum)?,
            pos_to_token_topk: map(&layout.pos_to_token_topk)?,
            token_topk_to_pos: map(&layout.token_topk_to_pos)?,
            row_weights: device.upload(&problem.row_weights).map_err(text)?,
            topk_weights: device.upload(&problem.topk_weights).map_err(text)?,
        })
    }

    pub fn num_rows(&self) -> u64 {
        self.rows
    }

    pub fn rows(&self, by: RowsBy) -> ferrotile::Result<ExpertRows<'_>> {
        Ok(match by {
            RowsBy::All => ExpertRows::All,
            RowsBy::PosToExpert => ExpertRows::PosToExpert(self.pos_to_expert.tensor(&[self.rows])?),
            RowsBy::Psum => ExpertRows::Psum {
                psum_num_tokens_per_expert: self.psum.tensor(&[self.psum.len() as u64])?,
                alignment: self.alignment,
            },
        })
    }

    pub fn weights(&self, by: WeightsBy) -> ferrotile::Result<RowWeights<'_>> {
        Ok(match by {
            WeightsBy::None => RowWeights::None,
            WeightsBy::PerRow(routed_scaling_factor) => {
                RowWeights::PerRow { topk_weights: self.row_weights.tensor(&[self.rows])?, routed_scaling_factor }
            }
            WeightsBy::PerTokenTopk => RowWeights::PerTokenTopk {
                topk_weights: self.topk_weights.tensor(&self.slots)?,
                pos_to_token_topk: self.pos_to_token_topk.tensor(&[self.rows])?,
            },
        })
    }

    /// Elements of the gradient of these weights.
    pub fn num_weights(&self, by: WeightsBy) -> usize {
        match by {
            WeightsBy::None => 0,
            WeightsBy::PerRow(_) => self.rows as usize,
            WeightsBy::PerTokenTopk => (self.slots[0] * self.slots[1]) as usize,
        }
    }

    pub fn weight_grad<'a>(
        &'a self,
        options: &Options,
        buffer: &'a mut Buffer<f32>,
    ) -> ferrotile::Result<Option<WeightGrad<'a>>> {
        if !options.weight_grad {
            return Ok(None);
        }
        Ok(match options.weights {
            WeightsBy::None => None,
            WeightsBy::PerRow(_) => Some(WeightGrad::PerRow(buffer.tensor_mut(&[self.rows])?)),
            WeightsBy::PerTokenTopk => Some(WeightGrad::PerTokenTopk {
                weight_grad: buffer.tensor_mut(&self.slots)?,
                token_topk_to_pos: self.token_topk_to_pos.tensor(&self.slots)?,
            }),
        })
    }
}

/// Inputs on the device.
struct Inputs {
    hidden: u64,
    x: Floats,
    grad: Floats,
    /// Elements from one row to the next beyond what a row has, and before the first.
    apart: (u64, u64),
    routing: Routing,
}

impl Inputs {
    fn new(device: &Device, problem: &Problem, dtype: DType, apart: (u64, u64)) -> Result<Self, String> {
        let h = problem.hidden as u64;
        Ok(Self {
            hidden: h,
            x: Floats::upload(device, dtype, &problem.x, 2 * h, (2 * h + apart.0, apart.1))?,
            grad: Floats::upload(device, dtype, &problem.grad, h, (h + apart.0, apart.1))?,
            apart,
            routing: Routing::new(device, problem)?,
        })
    }
}

/// Output buffers.
struct Outputs {
    x_grad: Floats,
    act_out: Floats,
    weight_grad: Buffer<f32>,
    num_weights: usize,
}

impl Outputs {
    fn new(device: &Device, inputs: &Inputs, options: &Options, dtype: DType) -> Result<Self, String> {
        let values = (inputs.routing.rows * inputs.hidden) as usize;
        let num_weights = if options.weight_grad { inputs.routing.num_weights(options.weights) } else { 0 };
        let mut new = Self {
            x_grad: Floats::output(device, dtype, 2 * values)?,
            act_out: Floats::output(device, dtype, values)?,
            weight_grad: device.alloc(num_weights + GUARD).map_err(text)?,
            num_weights,
        };
        new.weight_grad.fill_bytes(FILL).map_err(text)?;
        Ok(new)
    }

    fn run(&mut self, stream: &Stream, inputs: &Inputs, options: &Options) -> ferrotile::Result<()> {
        let (p, h) = (inputs.routing.rows, inputs.hidden);
        let (gap, offset) = inputs.apart;
        op::swiglu_backward(
            stream,
            Args {
                x: inputs.x.tensor(&[p, 2 * h], &[2 * h + gap, 1], offset)?,
                act_x_grad: inputs.grad.tensor(&[p, h], &[h + gap, 1], offset)?,
                rows: inputs.routing.rows(options.rows)?,
                weights: inputs.routing.weights(options.weights)?,
                clamp_value: options.clamp,
                x_grad: self.x_grad.tensor_mut(&[p, 2 * h])?,
                weight_grad: inputs.routing.weight_grad(options, &mut self.weight_grad)?,
                act_out: if options.act_out { Some(self.act_out.tensor_mut(&[p, h])?) } else { None },
            },
        )
    }

    fn check(&self, name: &str, inputs: &Inputs, options: &Options, expected: &Expected) -> Result<(), String> {
        let (p, h) = (inputs.routing.rows, inputs.hidden);
        self.x_grad.check("x_grad", name, &[p, 2 * h], &expected.x_grad)?;
        if options.act_out {
            self.act_out.check("act_out", name, &[p, h], &expected.act_out)?;
        } else {
            self.act_out.check("act_out", name, &[0], &[])?;
        }
        check_weight_grad(name, &self.weight_grad, self.num_weights, expected)
    }

    /// All bytes of the outputs.
    fn bytes(&self) -> Result<Vec<Vec<f32>>, String> {
        Ok(vec![self.x_grad.values()?, self.act_out.values()?, self.weight_grad.to_vec().map_err(text)?])
    }
}

/// The gradients in a buffer with a guard.
pub(super) fn check_weight_grad(name: &str, buffer: &Buffer<f32>, num_weights: usize, expected: &Expected) -> Result<(), String> {
    let all = buffer.to_vec().map_err(text)?;
    expected.check_weight_grad(name, &all[..num_weights])?;
    let guard = bytemuck::cast_slice::<f32, u8>(&all[num_weights..]);
    ensure(guard.iter().all(|b| *b == FILL), || format!("weight_grad: elements behind it were written; {name}"))
}

// Cases.

/// Values of the type as f32.
fn values(dtype: DType, mut values: Vec<f32>) -> Vec<f32> {
    if dtype == DType::Bf16 {
        values.par_iter_mut().for_each(|v| *v = to_bf16(*v).to_f32());
    }
    values
}

/// A layout with experts of several sizes, some of them empty, and a tail of padding.
pub(super) fn small_layout(tokens: u64, alignment: u32) -> Layout {
    let case = MoeCase { num_send_tokens: tokens, num_topk: 2, num_experts: 5, num_ranks: 2 };
    Layout::new(&case, alignment).with_tail(3)
}

/// A problem of a kind: `normal` or `awkward` inputs.
fn problem(layout: Layout, hidden: u64, dtype: DType, kind: &str, name: &str) -> Problem {
    let len = (layout.rows() * hidden) as usize;
    let make = |len, name: &str| match kind {
        "awkward" => awkward(len, name),
        _ => Rng::named(name).normal_f32(len),
    };
    let x = values(dtype, make(2 * len, name));
    let grad = values(dtype, make(len, &format!("{name} grad")));
    Problem::new(layout, hidden, x, grad, name)
}

fn check_problem(
    ctx: &Ctx,
    problem: &Problem,
    dtypes: (DType, DType),
    apart: (u64, u64),
    all: &[Options],
    kind: &str,
) -> Result<(), String> {
    let inputs = Inputs::new(&ctx.device, problem, dtypes.0, apart)?;
    let stream = ctx.device.stream().map_err(text)?;
    let exps = problem.exps(&ctx.device)?;
    for (i, options) in all.iter().enumerate() {
        let name = format!(
            "fmt={},h={},input={},kind={kind},t={},{}",
            dtypes.1,
            inputs.hidden,
            dtypes.0,
            inputs.routing.rows,
            options.name()
        );
        if !ctx.case(&name) {
            continue;
        }
        let mut outputs = Outputs::new(&ctx.device, &inputs, options, dtypes.1)?;
        outputs.run(&stream, &inputs, options).map_err(text)?;
        let expected = problem.expected(options, &exps)?;
        outputs.check(&name, &inputs, options, &expected)?;
        if i == 0 {
            // Once more, over its own results: the same bytes, sums included.
            let before = outputs.bytes()?;
            outputs.run(&stream, &inputs, options).map_err(text)?;
            for (a, b) in before.iter().zip(outputs.bytes()?) {
                ensure(a.iter().zip(&b).all(|(a, b)| a.to_bits() == b.to_bits()), || format!("two runs differ; {name}"))?;
            }
        }
    }
    Ok(())
}

const DTYPES: [(DType, DType); 4] =
    [(DType::Bf16, DType::Bf16), (DType::Bf16, DType::F32), (DType::F32, DType::Bf16), (DType::F32, DType::F32)];

fn run(ctx: &Ctx) -> Result<Report, String> {
    let some = [Options::v1(None), Options::v2(Some(0.5))];
    for dtypes in DTYPES {
        let make = |layout, hidden, kind: &str| {
            problem(layout, hidden, dtypes.0, kind, &format!("swiglu_backward {dtypes:?} {hidden} {kind}"))
        };
        // Hidden sizes around whole warps and blocks; rows apart; nothing at all, which leaves gradients to clear.
        check_problem(ctx, &make(small_layout(7, 8), 264, "awkward"), dtypes, (0, 0), &Options::all(), "awkward")?;
        check_problem(ctx, &make(small_layout(5, 3), 8, "normal, apart"), dtypes, (24, 8), &some, "normal, apart")?;
        check_problem(ctx, &make(small_layout(2, 1), 2312, "normal"), dtypes, (0, 0), &some, "normal")?;
        check_problem(ctx, &make(nothing_here(), 64, "empty"), dtypes, (0, 0), &some, "empty")?;
        check_problem(ctx, &make(small_layout(3, 4), 0, "empty"), dtypes, (0, 0), &some, "empty")?;
        if ctx.depth == Depth::Small {
            continue;
        }
        let all: Vec<Options> = [None, Some(10.0), Some(0.5)].iter().flat_map(|c| [Options::v1(*c), Options::v2(*c)]).collect();
        for (case, h) in moe_cases().iter().zip([64, 576, 2048, 2560, 3072, 4096, 6144, 7168].iter().cycle()) {
            check_problem(ctx, &make(Layout::new(case, 128), *h, "normal"), dtypes, (0, 0), &all, "normal")?;
        }
        check_problem(ctx, &make(small_layout(1200, 16), 2048, "awkward"), dtypes, (0, 0), &all, "awkward")?;
    }
    if ctx.depth == Depth::Full {
        check_reciprocal(ctx)?;
    }
    if !ctx.device.is_emulator() {
        check_graph(ctx)?;
        if ctx.depth == Depth::Full {
            check_backends(ctx)?;
        }
    }
    let notes = golden::check_cases(ctx, &["swiglu_forward_backward"], |golden, case| check_golden(ctx, golden, case))?;
    Ok(Report { notes, ..ctx.report() })
}

/// Tokens of which none came to these experts: no rows, yet weights.
pub(super) fn nothing_here() -> Layout {
    Layout {
        tokens: 700,
        topk: 7,
        alignment: 16,
        pos_to_expert: vec![],
        pos_to_token_topk: vec![],
        token_topk_to_pos: vec![-1; 4900],
        psum: vec![0; 40],
    }
}

/// The 12 MoE shapes of 1.0.0 with fewer tokens.
pub(super) fn moe_cases() -> Vec<MoeCase> {
    let fewer = |case: MoeCase| MoeCase { num_send_tokens: 61, ..case };
    crate::support::cases::moe_bench_cases().into_iter().map(fewer).collect()
}

/// The short inverse against the division, for every number from 1 on: equal below 2^126; beyond, of 2^24 few are one unit off.
fn check_reciprocal(ctx: &Ctx) -> Result<(), String> {
    let name = "kind=reciprocal";
    if ctx.device.is_emulator() || !ctx.case(name) {
        return Ok(());
    }
    let (one, end) = (1f32.to_bits(), f32::INFINITY.to_bits() + 1);
    let mut off = 0;
    for first in (one..end).step_by(1 << 26) {
        let x: Vec<f32> = (first..end.min(first + (1 << 26))).into_par_iter().map(f32::from_bits).collect();
        let got = device_math::map(&ctx.device, Function::Reciprocal, &x)?;
        let differences = x.par_iter().zip(&got).map(|(x, got)| (1.0 / x).to_bits().abs_diff(got.to_bits()));
        let differ = differences.zip(&x).filter(|(difference, _)| *difference > 0);
        off += differ
            .map(|(difference, x)| {
                ensure(difference == 1 && *x >= 2f32.powi(126), || format!("1 / {x:e} is {difference} units off; {name}"))?;
                Ok(1)
            })
            .try_reduce(|| 0, |a, b| Ok::<u32, String>(a + b))?;
    }
    ensure(off <= 64, || format!("{off} inverses are off, expected a few; {name}"))
}

/// Recorded in a graph and replayed.
fn check_graph(ctx: &Ctx) -> Result<(), String> {
    let name = "kind=graph,h=576";
    if !ctx.case(name) {
        return Ok(());
    }
    let problem = problem(small_layout(21, 16), 576, DType::Bf16, "normal", name);
    let inputs = Inputs::new(&ctx.device, &problem, DType::Bf16, (0, 0))?;
    let options = Options::v1(Some(0.5));
    let expected = problem.expected(&options, &problem.exps(&ctx.device)?)?;
    let mut outputs = Outputs::new(&ctx.device, &inputs, &options, DType::Bf16)?;
    let stream = ctx.device.stream().map_err(text)?;
    let graph = stream.capture(|s| outputs.run(s, &inputs, &options)).map_err(text)?;
    for replay in 0..2 {
        outputs.x_grad.fill()?;
        outputs.weight_grad.fill_bytes(FILL).map_err(text)?;
        graph.launch(&stream).map_err(text)?;
        stream.synchronize().map_err(text)?;
        outputs.check(&format!("{name},replay={replay}"), &inputs, &options, &expected)?;
    }
    Ok(())
}

/// Results of two backends, whose `exp` differs in a last bit: `fma(x, 1 - s, 1)` may cancel, so what remains is an error of some
/// `2^-22` of the largest value, and a rounding to bf16.
pub(super) fn near(what: &str, name: &str, a: &[f32], b: &[f32]) -> Result<(), String> {
    let largest = b.iter().fold(0f32, |m, v| if v.abs() > m { v.abs() } else { m });
    let far = a.iter().zip(b).position(|(a, b)| {
        let tolerance = b.abs() * 2f32.powi(-7) + largest * 2f32.powi(-20);
        !((a - b).abs() <= tolerance || a.is_nan() && b.is_nan())
    });
    match far {
        Some(i) => Err(format!("{what}: {i}: {:e} and {:e}; {name}", a[i], b[i])),
        None => Ok(()),
    }
}

/// The emulator and the GPU.
fn check_backends(ctx: &Ctx) -> Result<(), String> {
    let name = "kind=both backends,h=576";
    if !ctx.case(name) {
        return Ok(());
    }
    let problem = problem(small_layout(21, 16), 576, DType::Bf16, "normal", name);
    let options = Options::v2(Some(1.5));
    let mut results = Vec::new();
    for device in [ctx.device, Device::emulator()] {
        let inputs = Inputs::new(&device, &problem, DType::Bf16, (0, 0))?;
        let mut outputs = Outputs::new(&device, &inputs, &options, DType::Bf16)?;
        outputs.run(&device.stream().map_err(text)?, &inputs, &options).map_err(text)?;
        results.push(outputs.bytes()?);
    }
    for (i, (a, b)) in results[0].iter().zip(&results[1]).enumerate() {
        near(["x_grad", "act_out", "weight_grad"][i], name, a, b)?;
    }
    Ok(())
}

// Golden data.

/// Layout, weights and their gradient of a recorded case, whichever release it is of.
pub(super) fn golden_problem(
    golden: &Golden,
    case: &Case,
    hidden: u64,
    x: Vec<f32>,
    grad: Vec<f32>,
) -> Result<(Problem, Options), String> {
    let has = |key: &str| golden.keys(case).iter().any(|k| k == key);
    let ints =
        |key: &str| -> Result<Vec<i32>, String> { if has(key) { golden.tensor(case, key)?.to_vec() } else { Ok(Vec::new()) } };
    let floats =
        |key: &str| -> Result<Vec<f32>, String> { if has(key) { golden.tensor(case, key)?.to_vec() } else { Ok(Vec::new()) } };
    let rows = (grad.len() as u64).checked_div(hidden).unwrap_or(0) as usize;
    let v1 = has("in/token_topk_to_pos");
    let (tokens, topk) = if v1 {
        let shape = golden.tensor(case, "in/token_topk_to_pos")?.shape;
        (shape[0], shape[1])
    } else {
        (0, 1)
    };
    let mut layout = Layout {
        tokens,
        topk,
        alignment: 128,
        pos_to_expert: ints("in/pos_to_expert")?,
        pos_to_token_topk: ints("in/pos_to_token_topk")?,
        token_topk_to_pos: ints("in/token_topk_to_pos")?,
        psum: ints("in/psum")?,
    };
    layout.pos_to_expert.resize(rows, -1);
    layout.pos_to_token_topk.resize(rows, -1);
    let key = if v1 { "swiglu_clamp_value" } else { "clamp_value" };
    let clamp = case.param::<Option<f32>>(key)?;
    let mut problem = Problem::new(layout, hidden, x, grad, "golden");
    let mut options = Options::v1(clamp);
    if v1 {
        problem.topk_weights = floats("in/weight")?;
    } else {
        let by = if has("in/psum") { RowsBy::Psum } else { RowsBy::All };
        let weighted = has("in/topk_weights");
        let weights = if weighted { WeightsBy::PerRow(1.0) } else { WeightsBy::None };
        options = Options { rows: by, weights, weight_grad: weighted, ..options };
        problem.row_weights = floats("in/topk_weights")?;
    }
    Ok((problem, options))
}

/// Equal to what was recorded on a GPU; on the emulator, whose `exp` may differ in a last bit, as near as that lets it be.
pub(super) fn matches_golden(ctx: &Ctx, what: &str, name: &str, got: &[f32], recorded: &[f32]) -> Result<(), String> {
    if ctx.device.is_emulator() {
        return near(what, name, got, recorded);
    }
    compare::equal(what, name, &[got.len() as u64], got, recorded)
}

/// The recorded gradients of weights, within the specification's tolerance.
pub(super) fn matches_golden_weight_grad(name: &str, got: &[f32], golden: &Golden, case: &Case, key: &str) -> Result<(), String> {
    let recorded = golden.tensor(case, key)?.to_vec::<f32>()?;
    compare::allclose("weight_grad", name, &[got.len() as u64], got, &recorded, (1e-4, 1e-4))
}

fn check_golden(ctx: &Ctx, golden: &Golden, case: &Case) -> Result<(), String> {
    let name = case.name();
    let hidden = golden.tensor(case, "in/act_x_grad")?.shape[1];
    let values = |key| golden.tensor(case, key)?.floats();
    let (problem, options) = golden_problem(golden, case, hidden, values("in/x")?, values("in/act_x_grad")?)?;
    let dtype = if case.param::<String>("fmt")? == "fp32" { DType::F32 } else { DType::Bf16 };
    let inputs = Inputs::new(&ctx.device, &problem, dtype, (0, 0))?;
    let mut outputs = Outputs::new(&ctx.device, &inputs, &options, dtype)?;
    outputs.run(&ctx.device.stream().map_err(text)?, &inputs, &options).map_err(text)?;
    matches_golden(ctx, "x_grad", &name, &outputs.x_grad.values()?, &values("out/bwd.0")?)?;
    // Without weights their gradient is not among the results.
    if options.weight_grad {
        let weight_grad = outputs.weight_grad.to_vec().map_err(text)?;
        matches_golden_weight_grad(&name, &weight_grad[..outputs.num_weights], golden, case, "out/bwd.1")?;
    }
    let act_out = if options.weight_grad { "out/bwd.2" } else { "out/bwd.1" };
    // Not bit for bit: the release's division may be off.
    near("act_out", &name, &outputs.act_out.values()?, &values(act_out)?)?;
    Ok(())
}

// The benchmark.

/// Rows without a layout: one expert that has them all.
pub(super) fn plain_layout(rows: u64) -> Layout {
    let slots: Vec<i32> = (0..rows as i32).collect();
    Layout {
        tokens: rows,
        topk: 1,
        alignment: 128,
        pos_to_expert: vec![0; rows as usize],
        pos_to_token_topk: slots.clone(),
        token_topk_to_pos: slots,
        psum: vec![rows as i32],
    }
}

fn row(t: u64, h: u64, dtype: DType) -> Row {
    let options = Options { rows: RowsBy::All, weights: WeightsBy::PerRow(1.0), clamp: None, weight_grad: true, act_out: true };
    let build = move |device: &Device, _: &Stream| -> Result<Launch, String> {
        let problem = Problem::new(plain_layout(t), h, Vec::new(), Vec::new(), "swiglu_backward benchmark");
        let inputs = Inputs {
            hidden: h,
            x: Floats::normal(device, dtype, 0, t * 2 * h)?,
            grad: Floats::normal(device, dtype, 1, t * h)?,
            apart: (0, 0),
            routing: Routing::new(device, &problem)?,
        };
        let mut outputs = Outputs::new(device, &inputs, &options, dtype)?;
        Ok(Box::new(move |stream| outputs.run(stream, &inputs, &options)))
    };
    let fmt = if dtype == DType::Bf16 { "bf16" } else { "fp32" };
    let case = format!("fmt={fmt},h={h},recompute=True,t={t},weights=True");
    Row { op: SUITE.op, case, bytes: t * h * 6 * dtype.size() + 8 * t, build: Box::new(build) }
}

/// The peer's case, f32 and the largest hidden size, and small inputs.
pub fn bench() -> Vec<Row> {
    let mut rows = vec![row(32768, 2048, DType::Bf16), row(16384, 2048, DType::F32), row(8192, 7168, DType::Bf16)];
    rows.extend([1, 16, 128].map(|t| row(t, 2048, DType::Bf16)));
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::{ProptestConfig, proptest};

    #[test]
    fn suite() {
        SUITE.test();
    }

    /// The formula of 6.9 for x / t, which the kernel has, against the division: equal for every x, whatever last bit `exp` has.
    #[test]
    fn the_short_quotient_is_the_quotient() {
        let device = Device::emulator();
        let bits: Vec<u32> = (0..u32::MAX).step_by(997).filter(|b| f32::from_bits(*b).is_finite()).collect();
        let x: Vec<f32> = bits.iter().map(|b| f32::from_bits(*b)).chain((0..40_000).map(|i| -90.0 + i as f32 * 1e-4)).collect();
        let negative: Vec<f32> = x.iter().map(|x| -x).collect();
        let exps = device_math::exp_of(&device, &negative).unwrap();
        for (x, exp) in x.iter().zip(exps) {
            for exp in [exp, exp.next_up(), exp.next_down().max(0.0)] {
                let t = 1.0 + exp;
                let s = 1.0 / t;
                let quotient = x * s;
                let remainder = quotient.mul_add(t.min(f32::MAX), -x);
                let short = (-remainder).mul_add(s, quotient);
                assert_eq!(short.to_bits(), (x / t).to_bits(), "{x:e} / {t:e}");
            }
        }
    }

    /// The inverse without a branch. The emulator's instruction is exact, so all that can be off is what is subnormal.
    #[test]
    fn the_short_inverse_is_the_inverse() {
        let mut x: Vec<f32> = (1f32.to_bits()..f32::INFINITY.to_bits()).step_by(499).map(f32::from_bits).collect();
        x.push(f32::INFINITY);
        let got = device_math::map(&Device::emulator(), Function::Reciprocal, &x).unwrap();
        let off = |(x, got): &(&f32, &f32)| (1.0 / *x).to_bits() != got.to_bits();
        assert_eq!(x.iter().zip(&got).filter(off).map(|(x, _)| *x).find(|x| *x < 2f32.powi(126)), None);
        assert!(x.iter().zip(&got).filter(off).count() < 3);
        assert_eq!(got.last().map(|v| v.to_bits()), Some(0));
    }

    #[test]
    fn bad_arguments_are_named() {
        let device = Device::emulator();
        let stream = device.stream().unwrap();
        let (x, grad) = (device.zeros::<f32>(4 * 32).unwrap(), device.zeros::<f32>(4 * 16).unwrap());
        let (bf16s, weights, map) =
            (device.zeros::<bf16>(64).unwrap(), device.zeros::<f32>(4).unwrap(), device.zeros::<i32>(4).unwrap());
        let mut out = (device.zeros::<f32>(4 * 32).unwrap(), device.zeros::<f32>(4).unwrap());
        out.0.fill_bytes(FILL).unwrap();
        out.1.fill_bytes(FILL).unwrap();
        // A call, and whether it wrote something.
        let mut call = |x, act_x_grad, (x_grad, weight_grad): (&[u64], &[u64]), weights, clamp| {
            let result = op::swiglu_backward(
                &stream,
                Args {
                    x,
                    act_x_grad,
                    rows: ExpertRows::PosToExpert(map.tensor(&[4]).unwrap()),
                    weights,
                    clamp_value: clamp,
                    x_grad: out.0.tensor_mut(x_grad).unwrap(),
                    weight_grad: Some(WeightGrad::PerRow(out.1.tensor_mut(weight_grad).unwrap())),
                    act_out: None,
                },
            );
            let filled = |b: &Buffer<f32>| b.to_vec().unwrap().iter().all(|v| v.to_bits() == u32::from_ne_bytes([FILL; 4]));
            (result, filled(&out.0) && filled(&out.1))
        };
        let by_row = || RowWeights::PerRow { topk_weights: weights.tensor(&[4]).unwrap(), routed_scaling_factor: 1.0 };
        let (fine_x, fine_grad) = (x.tensor(&[4, 32]).unwrap(), grad.tensor(&[4, 16]).unwrap());
        let shapes: (&[u64], &[u64]) = (&[4, 32], &[4]);
        let refuses = |text: &str, (result, untouched): (ferrotile::Result<()>, bool)| {
            let got = result.expect_err(text).to_string();
            assert!(got.starts_with(&format!("swiglu_backward: {text}")) && untouched, "{got}\nexpected {text}");
        };
        refuses(
            "columns of x is 24, allowed: multiples of 16",
            call(x.tensor(&[4, 24]).unwrap(), fine_grad, shapes, by_row(), None),
        );
        refuses("clamp_value is 0, allowed: positive numbers", call(fine_x, fine_grad, shapes, by_row(), Some(0.0)));
        refuses("act_x_grad is bf16, allowed: f32", call(fine_x, bf16s.tensor(&[4, 16]).unwrap(), shapes, by_row(), None));
        refuses(
            "act_x_grad has shape [2, 32], expected [4, 16]",
            call(fine_x, grad.tensor(&[2, 32]).unwrap(), shapes, by_row(), None),
        );
        refuses("layout of x is", call(x.strided(&[4, 32], &[1, 4], 0).unwrap(), fine_grad, shapes, by_row(), None));
        refuses("x_grad has shape [2, 64], expected [4, 32]", call(fine_x, fine_grad, (&[2, 64], &[4]), by_row(), None));
        refuses("weight_grad has shape [3], expected [4]", call(fine_x, fine_grad, (&[4, 32], &[3]), by_row(), None));
        refuses("weight_grad is by row, allowed: none", call(fine_x, fine_grad, shapes, RowWeights::None, None));
        let (result, untouched) = call(fine_x, fine_grad, shapes, by_row(), Some(0.1));
        assert!(result.is_ok() && !untouched);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        /// Any layout of experts, hidden size, distance of rows, options and range of values.
        #[test]
        fn any_input(
            tokens in 0u64..9, alignment in 1u32..20, eights in 1u64..40, gap in 0u64..3, offset in 0u64..3, dtypes in 0usize..4,
            option in 0usize..12, seed: u64,
        ) {
            let device = Device::emulator();
            let (input, output) = DTYPES[dtypes];
            let name = format!("any {seed}");
            let problem = problem(small_layout(tokens, alignment), 8 * eights, input, "awkward", &name);
            let inputs = Inputs::new(&device, &problem, input, (8 * gap, 8 * offset)).unwrap();
            let options = Options::all()[option];
            let expected = problem.expected(&options, &problem.exps(&device).unwrap()).unwrap();
            let mut outputs = Outputs::new(&device, &inputs, &options, output).unwrap();
            outputs.run(&device.stream().unwrap(), &inputs, &options).unwrap();
            outputs.check(&name, &inputs, &options, &expected).unwrap();
        }
    }
}
