//! Checks that the SwiGLU launchers share.

use super::{ExpertRows, RowWeights};
use crate::{DType, Error, Result, Stream, TensorMut, TensorRef, View, check};
use ferrotile_kernels::device::{In, Out};
use ferrotile_kernels::quant::common::Divisor;
use ferrotile_kernels::quant::common_swiglu::{Rows, Weights};

/// A tensor and the name of the argument.
pub(crate) type Named<'a> = (&'static str, &'a View);

/// Most tensors of a list: all that the backward cast reads.
const MOST: usize = 7;

/// Tensors and their names, without allocating.
#[derive(Clone, Copy)]
pub(crate) struct Tensors<'a> {
    all: [Named<'a>; MOST],
    len: usize,
}

impl<'a> Tensors<'a> {
    /// One tensor.
    pub(crate) fn new(first: Named<'a>) -> Self {
        Self { all: [first; MOST], len: 1 }
    }

    /// What every op reads.
    pub(crate) fn inputs(x: &'a View, rows: &'a ExpertRows<'_>, weights: &'a RowWeights<'_>) -> Self {
        let mut inputs = Self::new(("x", x));
        match rows {
            ExpertRows::All => (),
            ExpertRows::PosToExpert(map) => inputs.push(("pos_to_expert", map)),
            ExpertRows::Psum { psum_num_tokens_per_expert, .. } => {
                inputs.push(("psum_num_tokens_per_expert", psum_num_tokens_per_expert))
            }
        }
        match weights {
            RowWeights::None => (),
            RowWeights::PerRow { topk_weights, .. } => inputs.push(("topk_weights", topk_weights)),
            RowWeights::PerTokenTopk { topk_weights, pos_to_token_topk } => {
                inputs.push(("topk_weights", topk_weights));
                inputs.push(("pos_to_token_topk", pos_to_token_topk));
            }
        }
        inputs
    }

    /// One more.
    pub(crate) fn push(&mut self, next: Named<'a>) {
        self.all[self.len] = next;
        self.len += 1;
    }

    /// The tensors.
    pub(crate) fn list(&self) -> &[Named<'a>] {
        &self.all[..self.len]
    }
}

/// Inputs and outputs are where the stream is, and no output overlaps anything else.
pub(crate) fn check_memory(op: &'static str, stream: &Stream, inputs: &Tensors<'_>, outputs: &Tensors<'_>) -> Result<()> {
    check::same_device(op, stream, inputs.list())?;
    check::same_device(op, stream, outputs.list())?;
    check::no_overlaps(op, inputs.list(), outputs.list())
}

/// Rows and channels of `x`, which is bf16 or f32 `(P, 2 H)` with rows that start at multiples of 16 bytes; `H` is a multiple of 8.
pub(crate) fn check_x(op: &'static str, x: &View) -> Result<(u32, u32)> {
    check::rank(op, "x", x, 2)?;
    check::dtype(op, "x", x, &[DType::Bf16, DType::F32])?;
    // Kernels count rows, and channels of both halves rounded up to tiles, with 32 bits.
    check::in_range(op, "num_rows", x.dim(0), 0, i32::MAX as u64)?;
    check::in_range(op, "columns of x", x.dim(1), 0, i32::MAX as u64)?;
    check::divisible(op, "columns of x", x.dim(1), 16)?;
    check::last_stride_1(op, "x", x)?;
    check::aligned(op, "x", x, 16)?;
    Ok((x.dim(0) as u32, x.dim(1) as u32 / 2))
}

/// Bytes from one row of `x` to the next.
pub(crate) fn row_bytes(x: &TensorRef<'_>) -> u64 {
    if x.dim(0) <= 1 { 0 } else { x.stride(0) * x.dtype().size() }
}

/// A vector of that many elements, one after the other.
pub(crate) fn vector(op: &'static str, arg: &'static str, t: &View, dtype: DType, len: u64) -> Result<()> {
    check::dtype(op, arg, t, &[dtype])?;
    check::shape(op, arg, t, &[len])?;
    elements(op, arg, t)
}

/// Elements one after the other, each at a multiple of its size.
pub(crate) fn elements(op: &'static str, arg: &'static str, t: &View) -> Result<()> {
    check::contiguous(op, arg, t)?;
    check::aligned(op, arg, t, t.dtype().size())
}

/// Rows as kernels take them.
pub(crate) fn check_rows(op: &'static str, rows: &ExpertRows<'_>, num_rows: u32) -> Result<Rows> {
    let none = Rows { kind: Rows::ALL, map: In::null(), num_experts: 0, alignment: 1, divisor: Divisor::new(1) };
    match rows {
        ExpertRows::All => Ok(none),
        ExpertRows::PosToExpert(map) => {
            vector(op, "pos_to_expert", map, DType::I32, num_rows.into())?;
            Ok(Rows { kind: Rows::POS_TO_EXPERT, map: map.input(), ..none })
        }
        ExpertRows::Psum { psum_num_tokens_per_expert: ends, alignment } => {
            check::rank(op, "psum_num_tokens_per_expert", ends, 1)?;
            vector(op, "psum_num_tokens_per_expert", ends, DType::I32, ends.dim(0))?;
            check::in_range(op, "num_experts", ends.dim(0), 0, i32::MAX as u64)?;
            check::in_range(op, "alignment", (*alignment).into(), 1, 1 << 30)?;
            Ok(Rows {
                kind: Rows::PSUM,
                map: ends.input(),
                num_experts: ends.dim(0) as u32,
                alignment: *alignment,
                divisor: Divisor::new(*alignment),
            })
        }
    }
}

/// Weights as kernels take them.
pub(crate) fn check_weights(op: &'static str, weights: &RowWeights<'_>, num_rows: u32) -> Result<Weights> {
    match weights {
        RowWeights::None => Ok(Weights { kind: Weights::NONE, weights: In::null(), map: In::null(), factor: 1.0 }),
        RowWeights::PerRow { topk_weights, routed_scaling_factor } => {
            vector(op, "topk_weights", topk_weights, DType::F32, num_rows.into())?;
            let (weights, factor) = (topk_weights.input(), *routed_scaling_factor);
            Ok(Weights { kind: Weights::PER_ROW, weights, map: In::null(), factor })
        }
        RowWeights::PerTokenTopk { topk_weights, pos_to_token_topk } => {
            check::rank(op, "topk_weights", topk_weights, 2)?;
            check::dtype(op, "topk_weights", topk_weights, &[DType::F32])?;
            elements(op, "topk_weights", topk_weights)?;
            check::in_range(op, "elements of topk_weights", topk_weights.numel(), 0, i32::MAX as u64)?;
            vector(op, "pos_to_token_topk", pos_to_token_topk, DType::I32, num_rows.into())?;
            let (weights, map) = (topk_weights.input(), pos_to_token_topk.input());
            Ok(Weights { kind: Weights::PER_TOKEN_TOPK, weights, map, factor: 1.0 })
        }
    }
}

/// What kernels take for the clamp and the counters.
#[derive(Clone, Copy)]
pub(crate) struct Clamp {
    pub(crate) value: f32,
    pub(crate) counters: Out<u64>,
    pub(crate) num_counters: u32,
}

/// The clamp, a positive number, and the counters that go with it: i64 `(4,)` or `(3,)`.
pub(crate) fn check_clamp(op: &'static str, clamp: Option<f32>, counts: Option<&TensorMut<'_>>) -> Result<Clamp> {
    let value = match clamp {
        Some(value) if value > 0.0 => value,
        Some(value) => {
            return Err(Error::Value { op, arg: "clamp_value", allowed: "positive numbers".to_owned(), got: value.to_string() });
        }
        None if counts.is_some() => {
            let allowed = "a positive number with clamped_count".to_owned();
            return Err(Error::Value { op, arg: "clamp_value", allowed, got: "none".to_owned() });
        }
        None => f32::INFINITY,
    };
    let Some(counts) = counts else {
        return Ok(Clamp { value, counters: Out::null(), num_counters: 0 });
    };
    check::dtype(op, "clamped_count", counts, &[DType::I64])?;
    if counts.shape() != [4] && counts.shape() != [3] {
        let (expected, got) = ("[4] or [3]".to_owned(), format!("{:?}", counts.shape()));
        return Err(Error::Shape { op, arg: "clamped_count", expected, got });
    }
    elements(op, "clamped_count", counts)?;
    Ok(Clamp { value, counters: counts.output(), num_counters: counts.dim(0) as u32 })
}
