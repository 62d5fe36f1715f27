//! Inputs and the reference activation of the SwiGLU ops.

use crate::support::cases::MoeCase;
use crate::support::device_math::{self, Function};
use crate::support::inputs;
use crate::support::rng::Rng;
use crate::support::suite::text;
use ferrotile::quant::{ExpertRows, RowWeights};
use ferrotile::{Buffer, DType, Device, TensorRef};
use half::bf16;
use rayon::prelude::*;

/// Which rows of an expanded tensor hold tokens, as data for both ways to say it.
pub struct Layout {
    /// Rows, padding included.
    pub num_rows: u64,
    /// Expert of each row, -1 for padding.
    pub pos_to_expert: Vec<i32>,
    /// One past the last row of each expert.
    pub psum: Vec<i32>,
    /// Experts start at multiples of this.
    pub alignment: u32,
}

impl Layout {
    /// Experts with so many rows each, and `tail` rows behind the last one's padding.
    pub fn new(counts: &[u64], alignment: u32, tail: u64) -> Self {
        let (mut pos_to_expert, mut psum) = (Vec::new(), Vec::new());
        for (expert, count) in counts.iter().enumerate() {
            pos_to_expert.resize(pos_to_expert.len().next_multiple_of(alignment as usize), -1);
            pos_to_expert.resize(pos_to_expert.len() + *count as usize, expert as i32);
            psum.push(pos_to_expert.len() as i32);
        }
        pos_to_expert.resize(pos_to_expert.len().next_multiple_of(alignment as usize) + tail as usize, -1);
        Self { num_rows: pos_to_expert.len() as u64, pos_to_expert, psum, alignment }
    }

    /// The rows that rank 0 gets.
    pub fn of_moe(case: &MoeCase, alignment: u32) -> Self {
        let mut counts = vec![0; case.num_experts as usize];
        case.topk_idx().iter().filter(|expert| **expert >= 0).for_each(|expert| counts[*expert as usize] += 1);
        Self::new(&counts, alignment, 0)
    }
}

/// How a call says which rows hold tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowsKind {
    /// All do.
    All,
    /// By the expert of each row.
    PosToExpert,
    /// By the ends of experts.
    Psum,
}

/// What weights a call gives.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum WeightsKind {
    /// None.
    None,
    /// One a row, and a factor.
    PerRow(f32),
    /// By token and choice.
    PerTokenTopk,
}

/// An input on the device, and its values.
pub struct Input {
    /// Rows.
    pub num_rows: u64,
    /// Columns of the result.
    pub hidden: u64,
    /// Elements from one row to the next.
    pub stride: u64,
    /// bf16 or f32.
    pub dtype: DType,
    /// `(P, 2 H)`, dense.
    pub values: Vec<f32>,
    /// The rows.
    pub layout: Layout,
    /// Weights of rows, and those by token and choice with the number of each row's own.
    per_row: Vec<f32>,
    per_choice: Vec<f32>,
    choices: Vec<i32>,
    x: Elements,
    buffers: Buffers,
}

enum Elements {
    Bf16(Buffer<bf16>),
    F32(Buffer<f32>),
}

struct Buffers {
    pos_to_expert: Buffer<i32>,
    psum: Buffer<i32>,
    per_row: Buffer<f32>,
    per_choice: Buffer<f32>,
    choices: Buffer<i32>,
}

/// Choices of a token in the weights by token and choice.
const TOPK: u64 = 4;

impl Input {
    /// `values` in rows that lie `stride` elements apart. bf16 values must be given as such.
    pub fn new(
        device: &Device,
        dtype: DType,
        layout: Layout,
        hidden: u64,
        stride: u64,
        values: Vec<f32>,
        name: &str,
    ) -> Result<Self, String> {
        let (num_rows, width) = (layout.num_rows, 2 * hidden);
        let rng = Rng::named(name).stream(7);
        let per_row = rng.normal_f32(num_rows as usize);
        // More weights than rows; some rows that hold tokens have none.
        let tokens = num_rows.div_ceil(TOPK) + 3;
        let per_choice = rng.stream(1).normal_f32((tokens * TOPK) as usize);
        let choices = (0..num_rows)
            .map(|row| match layout.pos_to_expert[row as usize] {
                -1 => -1,
                _ if rng.stream(2).below(row, 17) == 0 => -1,
                _ => rng.stream(3).below(row, tokens * TOPK) as i32,
            })
            .collect();
        Self::with_weights(device, dtype, layout, hidden, (stride, width), values, (per_row, per_choice, choices))
    }

    /// For a benchmark: normal values, and weights from 0 to 1 by row.
    pub fn bench(device: &Device, dtype: DType, layout: Layout, hidden: u64) -> Result<Self, String> {
        let num_rows = layout.num_rows;
        let none = (Vec::new(), Vec::new(), Vec::new());
        let mut input = Self::with_weights(device, dtype, layout, hidden, (2 * hidden, 2 * hidden), Vec::new(), none)?;
        let len = num_rows * 2 * hidden;
        input.x = match dtype {
            DType::Bf16 => Elements::Bf16(inputs::normal_bf16(device, 0, len)?),
            _ => Elements::F32(inputs::normal_f32(device, 0, len)?),
        };
        input.buffers.per_row = inputs::uniform(device, 1, num_rows)?;
        Ok(input)
    }

    /// The same with given weights: of rows, by choice, and the choice of each row.
    pub fn with_weights(
        device: &Device,
        dtype: DType,
        layout: Layout,
        hidden: u64,
        (stride, width): (u64, u64),
        values: Vec<f32>,
        (per_row, per_choice, choices): (Vec<f32>, Vec<f32>, Vec<i32>),
    ) -> Result<Self, String> {
        let num_rows = layout.num_rows;
        let spread = || {
            // What lies between the rows would be noticed if it were read.
            let mut all = vec![1e30; if num_rows == 0 { 0 } else { (num_rows - 1) * stride + width } as usize];
            for (row, values) in values.chunks_exact(width.max(1) as usize).enumerate() {
                let start = row * stride as usize;
                all[start..start + width as usize].copy_from_slice(values);
            }
            all
        };
        let apart;
        let elements = if stride == width {
            &values
        } else {
            apart = spread();
            &apart
        };
        let x = match dtype {
            DType::Bf16 => {
                let elements: Vec<bf16> = elements.par_iter().map(|v| bf16::from_f32(*v)).collect();
                Elements::Bf16(device.upload(&elements).map_err(text)?)
            }
            _ => Elements::F32(device.upload(elements).map_err(text)?),
        };
        let buffers = Buffers {
            pos_to_expert: device.upload(&layout.pos_to_expert).map_err(text)?,
            psum: device.upload(&layout.psum).map_err(text)?,
            per_row: device.upload(&per_row).map_err(text)?,
            per_choice: device.upload(&per_choice).map_err(text)?,
            choices: device.upload(&choices).map_err(text)?,
        };
        Ok(Self { num_rows, hidden, stride, dtype, values, layout, per_row, per_choice, choices, x, buffers })
    }

    /// The tensor.
    pub fn x(&self) -> ferrotile::Result<TensorRef<'_>> {
        let (shape, strides) = ([self.num_rows, 2 * self.hidden], [self.stride, 1]);
        match &self.x {
            Elements::Bf16(x) => x.strided(&shape, &strides, 0),
            Elements::F32(x) => x.strided(&shape, &strides, 0),
        }
    }

    /// The rows as an argument.
    pub fn rows(&self, kind: RowsKind) -> ferrotile::Result<ExpertRows<'_>> {
        Ok(match kind {
            RowsKind::All => ExpertRows::All,
            RowsKind::PosToExpert => ExpertRows::PosToExpert(self.buffers.pos_to_expert.tensor(&[self.num_rows])?),
            RowsKind::Psum => ExpertRows::Psum {
                psum_num_tokens_per_expert: self.buffers.psum.tensor(&[self.layout.psum.len() as u64])?,
                alignment: self.layout.alignment,
            },
        })
    }

    /// The weights as an argument.
    pub fn weights(&self, kind: WeightsKind) -> ferrotile::Result<RowWeights<'_>> {
        Ok(match kind {
            WeightsKind::None => RowWeights::None,
            WeightsKind::PerRow(routed_scaling_factor) => {
                RowWeights::PerRow { topk_weights: self.buffers.per_row.tensor(&[self.num_rows])?, routed_scaling_factor }
            }
            WeightsKind::PerTokenTopk => RowWeights::PerTokenTopk {
                topk_weights: self.buffers.per_choice.tensor(&[self.per_choice.len() as u64 / TOPK, TOPK])?,
                pos_to_token_topk: self.buffers.choices.tensor(&[self.num_rows])?,
            },
        })
    }

    /// Whether a row holds a token.
    pub fn holds_token(&self, kind: RowsKind, row: usize) -> bool {
        kind == RowsKind::All || self.layout.pos_to_expert[row] >= 0
    }

    /// Rows that hold tokens.
    pub fn num_used(&self, kind: RowsKind) -> u64 {
        (0..self.num_rows as usize).filter(|row| self.holds_token(kind, *row)).count() as u64
    }

    fn weight(&self, kind: WeightsKind, row: usize) -> Option<f32> {
        match kind {
            WeightsKind::None => None,
            WeightsKind::PerRow(factor) => Some(self.per_row[row] * factor),
            WeightsKind::PerTokenTopk => Some(usize::try_from(self.choices[row]).map_or(0.0, |choice| self.per_choice[choice])),
        }
    }
}

/// `e^-gate` as the device computes it.
pub enum Exp {
    /// By the bits of the gate, which is bf16, and for the clamp.
    Table(Vec<f32>, f32),
    /// By the number of the gate.
    OfGates(Vec<f32>),
}

impl Exp {
    /// For all gates of an input, clamped.
    pub fn new(device: &Device, input: &Input, clamp: Option<f32>) -> Result<Self, String> {
        let limit = |l: f32| clamp.map_or(l, |c| if l > c { c } else { l });
        if input.dtype == DType::Bf16 {
            let table = device_math::bf16_table(device, Function::Exp)?;
            return Ok(Exp::Table(table, device_math::exp_of(device, &[-clamp.unwrap_or(0.0)])?[0]));
        }
        let (h, width) = (input.hidden as usize, 2 * input.hidden as usize);
        let gates: Vec<f32> =
            (0..input.num_rows as usize * h).into_par_iter().map(|i| -limit(input.values[i / h * width + i % h])).collect();
        Ok(Exp::OfGates(device_math::exp_of(device, &gates)?))
    }

    fn of(&self, number: usize, gate: f32, clamped: bool) -> f32 {
        match self {
            Exp::Table(_, of_clamp) if clamped => *of_clamp,
            Exp::Table(table, _) => table[(-gate).to_bits() as usize >> 16],
            Exp::OfGates(values) => values[number],
        }
    }
}

/// The activation in f32, `(P, H)`, with zeros in rows without a token, and the four counts.
pub fn reference(input: &Input, exp: &Exp, clamp: Option<f32>, rows: RowsKind, weights: WeightsKind) -> (Vec<f32>, [i64; 4]) {
    let h = input.hidden as usize;
    let mut out = vec![0.0; input.num_rows as usize * h];
    if out.is_empty() {
        return (out, [0; 4]);
    }
    let of_row = |(row, (out, x)): (usize, (&mut [f32], &[f32]))| {
        let mut counts = [0i64; 4];
        if !input.holds_token(rows, row) {
            return counts;
        }
        let weight = input.weight(weights, row);
        for i in 0..h {
            let (mut l, mut r) = (x[i], x[h + i]);
            let mut clamped = false;
            if let Some(c) = clamp {
                clamped = l > c;
                counts[0] += (l > c) as i64;
                counts[1] += (r > c) as i64;
                counts[2] += (r < -c) as i64;
                l = if l > c { c } else { l };
                r = if r > c {
                    c
                } else if r < -c {
                    -c
                } else {
                    r
                };
            }
            let v = l / (1.0 + exp.of(row * h + i, l, clamped)) * r;
            out[i] = weight.map_or(v, |w| v * w);
        }
        counts[3] = h as i64;
        counts
    };
    let sum = |a: [i64; 4], b: [i64; 4]| std::array::from_fn(|i| a[i] + b[i]);
    let counts = out.par_chunks_mut(h).zip(input.values.par_chunks(2 * h)).enumerate().map(of_row).reduce(|| [0; 4], sum);
    (out, counts)
}

/// Standard normal values; bf16 as f32.
pub fn normal(dtype: DType, len: usize, name: &str) -> Vec<f32> {
    let mut values = Rng::named(name).normal_f32(len);
    if dtype == DType::Bf16 {
        values.par_iter_mut().for_each(|v| *v = bf16::from_f32(*v).to_f32());
    }
    values
}

/// Gates from all over the range and partners of moderate size, with zeros of both signs, subnormals, NaN, and whole groups of them.
/// `infinite`: infinities and huge partners too.
pub fn awkward(dtype: DType, num_rows: u64, hidden: u64, infinite: bool, name: &str) -> Vec<f32> {
    let rng = Rng::named(name).stream(1);
    let mut values = normal(dtype, (num_rows * 2 * hidden) as usize, name);
    let gates = [
        -87.0, -87.25, -87.5, -88.0, -88.5, -88.75, -89.0, -100.0, -104.0, -1e30, 16.5, 17.5, 87.0, 88.5, 89.0, 1e20, 1e-30,
        -1e-30, 1e-38, -1e-40, 0.0, -0.0, 10.0, 10.0625, 0.5, 0.50390625,
    ];
    let ups = [0.0, -0.0, 1e-38, -1e-40, 0.5, -0.5, 0.50390625, -0.50390625, 10.0, -10.0, 10.0625, -10.0625, 448.0, 1e5];
    for (i, v) in values.iter_mut().enumerate() {
        let (row, column) = (i as u64 / (2 * hidden), i as u64 % (2 * hidden));
        let (gate, channel) = (column < hidden, column % hidden);
        let draw = rng.bits(i as u64);
        let pick = |list: &[f32]| list[(draw >> 8) as usize % list.len()];
        *v = match (row % 5, channel / 32 % 5) {
            // Groups of zeros, of NaN on one side, of values below the smallest scale.
            (1, 0) => 0.0 * *v,
            (1, 1) if gate => f32::NAN,
            (1, 2) if !gate => *v * 1e-7,
            (2, _) if gate => pick(&gates),
            (2, _) => pick(&ups),
            (3, _) if gate => *v * 40.0,
            (3, _) if draw.is_multiple_of(61) => f32::NAN,
            (4, _) if infinite && draw.is_multiple_of(31) => {
                [f32::INFINITY, f32::NEG_INFINITY, 3e38, -3e38][(draw >> 8) as usize % 4]
            }
            _ => *v,
        };
        if dtype == DType::Bf16 && !v.is_nan() {
            // Toward zero: the largest f32 would become infinity.
            *v = f32::from_bits(v.to_bits() & 0xFFFF_0000);
        }
    }
    values
}
