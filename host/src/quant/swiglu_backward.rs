//! Launcher of `swiglu_backward`, and what it shares with the fused one.

use super::{ExpertRows, RowWeights};
use crate::{DType, Error, Result, Stream, TensorMut, TensorRef, View, check};
use ferrotile_kernels::device::{In, Out};
use ferrotile_kernels::quant::common::Divisor;
use ferrotile_kernels::quant::common_swiglu::{Rows, Weights};
use ferrotile_kernels::quant::swiglu_backward as k;

const OP: &str = "swiglu_backward";

/// Arguments of [`swiglu_backward`].
#[derive(Debug)]
pub struct Args<'a> {
    /// Input of the forward op, bf16 or f32 `(P, 2H)`, `H % 8 == 0`: gates, then what they are multiplied with. Rows may lie any distance apart.
    pub x: TensorRef<'a>,
    /// Gradient of its output, of the same type, `(P, H)`; rows may lie any distance apart.
    pub act_x_grad: TensorRef<'a>,
    /// Which rows hold tokens.
    pub rows: ExpertRows<'a>,
    /// What the forward op multiplied rows by.
    pub weights: RowWeights<'a>,
    /// The value that the forward op clamped `x` with.
    pub clamp: Option<f32>,
    /// Gradient of `x`: bf16 or f32 `(P, 2H)`, contiguous.
    pub x_grad: TensorMut<'a>,
    /// Gradient of the weights.
    pub weight_grad: Option<WeightGrad<'a>>,
    /// The output of the forward op once more, of the type of `x_grad`, `(P, H)`, contiguous.
    pub act_out: Option<TensorMut<'a>>,
}

/// Where the gradients of routing weights go.
#[derive(Debug, PartialEq)]
pub enum WeightGrad<'a> {
    /// f32 `(P,)`, for weights by row.
    PerRow(TensorMut<'a>),
    /// For weights by token and choice.
    PerTokenTopk {
        /// f32 `(N, k)`, contiguous.
        weight_grad: TensorMut<'a>,
        /// i32 `(N, k)`: the row of each choice, which has its gradient; where it is negative, the gradient is 0.
        token_topk_to_pos: TensorRef<'a>,
    },
}

/// Gradients of SwiGLU, and of the routing weights of its rows.
///
/// | tensor | dtype | shape | layout |
/// |---|---|---|---|
/// | `x` | bf16 or f32 | `(P, 2H)`, `H % 8 == 0` | last stride 1, rows at multiples of 16 bytes |
/// | `act_x_grad` | that of `x` | `(P, H)` | last stride 1, rows at multiples of 16 bytes |
/// | `x_grad` | bf16 or f32 | `(P, 2H)` | contiguous, 16-byte aligned |
/// | `act_out` | that of `x_grad` | `(P, H)` | contiguous, 16-byte aligned |
/// | `weight_grad` | f32 | `(P,)` or `(N, k)` | contiguous |
///
/// With `x, y` the halves of a row, `w` its weight and `c` the clamp, each operation rounded to f32:
///
/// ```text
/// x = min(x, c); y = max(min(y, c), -c)                  // with a clamp
/// t = 1 + exp(-x); s = 1 / t; act = (x / t) * y; g = (grad * w) * s
/// dx = (g * y) * fma(x, 1 - s, 1), or 0 where x was above c
/// dy = g * x, or 0 where y was beyond c
/// x_grad = [dx | dy]; act_out = act * w                  // to nearest even
/// weight_grad = sum(grad * act) * routed_scaling_factor
/// ```
///
/// The weight is [`PerRow`](RowWeights::PerRow) `topk_weights * routed_scaling_factor`; [`PerTokenTopk`](RowWeights::PerTokenTopk)
/// `topk_weights[pos_to_token_topk]`, and 0 where that index is negative; otherwise 1.
///
/// **Padding.** Rows without a token, by [`ExpertRows`], become zeros in every output, whatever their inputs hold; 2.1.0 works like this, with
/// [`Psum`](ExpertRows::Psum). With [`All`](ExpertRows::All) every row is processed, those of weight 0 too: their results are zeros with
/// the sign of their products, and NaN if their inputs are not finite. 1.0.0 works like this, with `PerTokenTopk`. The formulas are the same.
///
/// `exp` is CUDA's `expf`. All results but `weight_grad` are those of the formulas bit for bit on a GPU (for x between -88.8 and -87.3,
/// where `s` is subnormal, it may be off by one unit, once in a million); on the emulator `exp` may differ in the last bit. `weight_grad`
/// is a sum of f32 products in a fixed order: the same bytes in every run.
///
/// NaN in `x`, clamped or not, gives NaN in what depends on it. Infinities are the caller's mistake: an infinite gate gives NaN,
/// other infinities what the formulas say.
///
/// Asynchronous; allocates nothing. Without rows nothing is launched unless a `weight_grad` is to be cleared. Entries of maps must be smaller
/// than what they index, and not repeat. Source: the specification's sections 5.12 and 6.9.
///
/// # Errors
/// [`Shape`](Error::Shape) when shapes do not belong together, [`DType`](Error::DType), [`Layout`](Error::Layout) for strides and alignment,
/// [`Value`](Error::Value) for `H % 8 != 0`, a clamp that is negative or NaN, an alignment of 0, a `weight_grad` of another kind than `weights`, or
/// sizes beyond 31 bits, [`DeviceMismatch`](Error::DeviceMismatch), [`Overlap`](Error::Overlap) of an output with another
/// argument, [`Driver`](Error::Driver). The outputs are untouched then.
///
/// ```
/// use ferrotile::quant::swiglu_backward::{Args, WeightGrad, swiglu_backward};
/// use ferrotile::quant::{ExpertRows, RowWeights};
/// use ferrotile::Device;
///
/// let device = Device::emulator();
/// // Two rows of eight channels: gates 0, the other half 3 and 5; the second row is padding.
/// let x: Vec<f32> = (0..32).map(|i| [0.0, 3.0, 0.0, 5.0][i / 8]).collect();
/// let (x, grad) = (device.upload(&x)?, device.upload(&[2.0f32; 16])?);
/// let (weights, ends) = (device.upload(&[0.5f32, 9.0])?, device.upload(&[1i32])?);
/// let (mut x_grad, mut weight_grad) = (device.alloc::<f32>(32)?, device.alloc::<f32>(2)?);
/// swiglu_backward(
///     &device.stream()?,
///     Args {
///         x: x.tensor(&[2, 16])?,
///         act_x_grad: grad.tensor(&[2, 8])?,
///         rows: ExpertRows::Psum { psum_num_tokens_per_expert: ends.tensor(&[1])?, alignment: 2 },
///         weights: RowWeights::PerRow { topk_weights: weights.tensor(&[2])?, routed_scaling_factor: 1.0 },
///         clamp: None,
///         x_grad: x_grad.tensor_mut(&[2, 16])?,
///         weight_grad: Some(WeightGrad::PerRow(weight_grad.tensor_mut(&[2])?)),
///         act_out: None,
///     },
/// )?;
/// // silu'(0) = 1 / 2, and silu(0) = 0.
/// let x_grad = x_grad.to_vec()?;
/// assert_eq!((x_grad[0], x_grad[8], x_grad[16]), (2.0 * 0.5 * 3.0 * 0.5, 0.0, 0.0));
/// assert_eq!(weight_grad.to_vec()?, [0.0, 0.0]);
/// # Ok::<(), ferrotile::Error>(())
/// ```
pub fn swiglu_backward(stream: &Stream, args: Args<'_>) -> Result<()> {
    let (x, grad, x_grad) = (&args.x, &args.act_x_grad, &args.x_grad);
    let floats = [DType::Bf16, DType::F32];
    check::dtype(OP, "x", x, &floats)?;
    check::dtype(OP, "x_grad", x_grad, &floats)?;
    check::dtype(OP, "act_x_grad", grad, &[x.dtype()])?;
    let (num_rows, hidden) = rows_and_hidden(OP, x, 8)?;
    // A lane reads and writes 16 bytes at a time, or less where it has only four channels.
    for (arg, t) in [("x", x), ("act_x_grad", grad)] {
        check::last_stride_1(OP, arg, t)?;
        check::aligned(OP, arg, t, 16)?;
    }
    check::shape(OP, "act_x_grad", grad, &[num_rows.into(), hidden.into()])?;
    check_output(OP, "x_grad", x_grad, x_grad.dtype(), &[num_rows.into(), 2 * hidden as u64])?;
    if let Some(act_out) = &args.act_out {
        check_output(OP, "act_out", act_out, x_grad.dtype(), &[num_rows.into(), hidden.into()])?;
    }
    let routing = Routing::new(OP, num_rows, &args.rows, &args.weights, args.weight_grad.as_ref(), args.clamp)?;
    let mut inputs = Named::new(("x", x));
    inputs.push(Some(("act_x_grad", grad)));
    let mut outputs = Named::new(("x_grad", x_grad));
    outputs.push(args.act_out.as_ref().map(|t| ("act_out", &**t)));
    routing.check_memory(stream, inputs, outputs)?;
    if x.is_empty() && routing.num_weights_to_write == 0 {
        return Ok(());
    }
    let bytes = |t: &View| if num_rows == 1 { 0 } else { t.stride(0) * t.dtype().size() };
    let kernel_args = k::plain::Args {
        x: x.input(),
        grad: grad.input(),
        rows_map: routing.rows_map,
        weights: routing.weights,
        weights_map: routing.weights_map,
        token_topk_to_pos: routing.token_topk_to_pos,
        x_grad: x_grad.output(),
        weight_grad: routing.weight_grad,
        act_out: args.act_out.as_ref().map_or(Out::null(), |t| t.output()),
        x_stride: bytes(x),
        grad_stride: bytes(grad),
        num_rows,
        hidden,
        clamp: routing.clamp,
        options: routing.options | if args.act_out.is_some() { k::ACT_OUT } else { 0 },
        rows_kind: routing.rows_kind,
        num_experts: routing.num_experts,
        alignment: routing.alignment,
        alignment_magic: routing.divisor.magic,
        alignment_shift: routing.divisor.shift,
        weights_kind: routing.weights_kind,
        factor: routing.factor,
        num_weights: routing.num_weights,
        share: routing.share(num_rows),
    };
    let (entry, channels) = match (x.dtype(), x_grad.dtype()) {
        (DType::Bf16, DType::Bf16) => (&k::plain::bf16_bf16, 8),
        (DType::Bf16, _) => (&k::plain::bf16_f32, 4),
        (_, DType::Bf16) => (&k::plain::f32_bf16, 4),
        _ => (&k::plain::f32_f32, 4),
    };
    let config = k::config(num_rows, hidden.div_ceil(channels), routing.num_weights, k::THREADS);
    stream.launch(OP, entry, &config, &kernel_args)
}

/// Rows and hidden size of `x`, whose rows have two halves of multiples of `divisor` channels.
pub(super) fn rows_and_hidden(op: &'static str, x: &View, divisor: u64) -> Result<(u32, u32)> {
    check::rank(op, "x", x, 2)?;
    // Kernels count rows and channels with 32 bits.
    check::in_range(op, "rows of x", x.dim(0), 0, i32::MAX as u64)?;
    check::in_range(op, "columns of x", x.dim(1), 0, i32::MAX as u64)?;
    check::divisible(op, "columns of x", x.dim(1), 2 * divisor)?;
    Ok((x.dim(0) as u32, (x.dim(1) / 2) as u32))
}

/// A contiguous output, aligned for stores of 16 bytes.
pub(super) fn check_output(op: &'static str, arg: &'static str, t: &View, dtype: DType, shape: &[u64]) -> Result<()> {
    check::dtype(op, arg, t, &[dtype])?;
    check::shape(op, arg, t, shape)?;
    check::contiguous(op, arg, t)?;
    check::aligned(op, arg, t, 16)
}

/// Tensors and their names, at most eight.
#[derive(Clone, Copy)]
pub(super) struct Named<'a> {
    list: [(&'static str, &'a View); 8],
    len: usize,
}

impl<'a> Named<'a> {
    /// One tensor.
    pub fn new(first: (&'static str, &'a View)) -> Self {
        Self { list: [first; 8], len: 1 }
    }

    /// One more, if it is there.
    pub fn push(&mut self, next: Option<(&'static str, &'a View)>) {
        if let (Some(next), Some(place)) = (next, self.list.get_mut(self.len)) {
            *place = next;
            self.len += 1;
        }
    }

    fn list(&self) -> &[(&'static str, &'a View)] {
        &self.list[..self.len]
    }
}

/// Rows, weights and clamp as kernels take them.
pub(super) struct Routing<'a> {
    op: &'static str,
    rows_tensor: Option<(&'static str, &'a View)>,
    weights_tensor: Option<(&'static str, &'a View)>,
    weights_map_tensor: Option<(&'static str, &'a View)>,
    absent_tensor: Option<(&'static str, &'a View)>,
    grad_tensor: Option<(&'static str, &'a View)>,
    pub rows_kind: u32,
    pub rows_map: In<i32>,
    pub num_experts: u32,
    pub alignment: u32,
    pub divisor: Divisor,
    pub weights_kind: u32,
    pub weights: In<f32>,
    pub weights_map: In<i32>,
    pub factor: f32,
    pub token_topk_to_pos: In<i32>,
    pub weight_grad: Out<f32>,
    /// How many gradients of weights are looked through for those without a row.
    pub num_weights: u32,
    /// How many gradients of weights there are.
    pub num_weights_to_write: u64,
    pub clamp: f32,
    pub options: u32,
}

impl<'a> Routing<'a> {
    pub fn new(
        op: &'static str,
        num_rows: u32,
        rows: &'a ExpertRows<'_>,
        weights: &'a RowWeights<'_>,
        weight_grad: Option<&'a WeightGrad<'_>>,
        clamp: Option<f32>,
    ) -> Result<Self> {
        let mut routing = Self {
            op,
            rows_tensor: None,
            weights_tensor: None,
            weights_map_tensor: None,
            absent_tensor: None,
            grad_tensor: None,
            rows_kind: Rows::ALL,
            rows_map: In::null(),
            num_experts: 0,
            alignment: 1,
            divisor: Divisor::new(1),
            weights_kind: Weights::NONE,
            weights: In::null(),
            weights_map: In::null(),
            factor: 1.0,
            token_topk_to_pos: In::null(),
            weight_grad: Out::null(),
            num_weights: 0,
            num_weights_to_write: 0,
            clamp: f32::INFINITY,
            options: 0,
        };
        if let Some(clamp) = clamp {
            if clamp.is_nan() || clamp < 0.0 {
                return Err(Error::Value { op, arg: "clamp", allowed: "0 or more".to_owned(), got: clamp.to_string() });
            }
            routing.clamp = clamp;
        }
        routing.set_rows(num_rows, rows)?;
        routing.set_weights(num_rows, weights)?;
        routing.set_weight_grad(num_rows, weights, weight_grad)?;
        Ok(routing)
    }

    fn set_rows(&mut self, num_rows: u32, rows: &'a ExpertRows<'_>) -> Result<()> {
        let op = self.op;
        match rows {
            ExpertRows::All => Ok(()),
            ExpertRows::PosToExpert(map) => {
                vector(op, "pos_to_expert", map, DType::I32, &[num_rows.into()])?;
                (self.rows_kind, self.rows_map) = (Rows::POS_TO_EXPERT, map.input());
                self.rows_tensor = Some(("pos_to_expert", map));
                Ok(())
            }
            ExpertRows::Psum { psum_num_tokens_per_expert: ends, alignment } => {
                let arg = "psum_num_tokens_per_expert";
                check::rank(op, arg, ends, 1)?;
                vector(op, arg, ends, DType::I32, ends.shape())?;
                check::in_range(op, "alignment", (*alignment).into(), 1, 1 << 31)?;
                (self.rows_kind, self.rows_map) = (Rows::PSUM, ends.input());
                self.num_experts = check::fits_u32(op, "num_experts", ends.dim(0))?;
                (self.alignment, self.divisor) = (*alignment, Divisor::new(*alignment));
                self.rows_tensor = Some((arg, ends));
                Ok(())
            }
        }
    }

    fn set_weights(&mut self, num_rows: u32, weights: &'a RowWeights<'_>) -> Result<()> {
        let op = self.op;
        match weights {
            RowWeights::None => Ok(()),
            RowWeights::PerRow { topk_weights, routed_scaling_factor } => {
                vector(op, "topk_weights", topk_weights, DType::F32, &[num_rows.into()])?;
                (self.weights_kind, self.weights) = (Weights::PER_ROW, topk_weights.input());
                self.factor = *routed_scaling_factor;
                self.weights_tensor = Some(("topk_weights", topk_weights));
                Ok(())
            }
            RowWeights::PerTokenTopk { topk_weights, pos_to_token_topk } => {
                check::rank(op, "topk_weights", topk_weights, 2)?;
                vector(op, "topk_weights", topk_weights, DType::F32, topk_weights.shape())?;
                check::in_range(op, "elements of topk_weights", topk_weights.numel(), 0, i32::MAX as u64)?;
                vector(op, "pos_to_token_topk", pos_to_token_topk, DType::I32, &[num_rows.into()])?;
                (self.weights_kind, self.weights) = (Weights::PER_TOKEN_TOPK, topk_weights.input());
                self.weights_map = pos_to_token_topk.input();
                self.weights_tensor = Some(("topk_weights", topk_weights));
                self.weights_map_tensor = Some(("pos_to_token_topk", pos_to_token_topk));
                Ok(())
            }
        }
    }

    fn set_weight_grad(
        &mut self,
        num_rows: u32,
        weights: &RowWeights<'_>,
        weight_grad: Option<&'a WeightGrad<'_>>,
    ) -> Result<()> {
        let op = self.op;
        let grad: &View = match (weight_grad, weights) {
            (None, _) => return Ok(()),
            (Some(WeightGrad::PerRow(grad)), RowWeights::PerRow { .. }) => {
                vector(op, "weight_grad", grad, DType::F32, &[num_rows.into()])?;
                self.weight_grad = grad.output();
                grad
            }
            (
                Some(WeightGrad::PerTokenTopk { weight_grad, token_topk_to_pos }),
                RowWeights::PerTokenTopk { topk_weights, .. },
            ) => {
                vector(op, "weight_grad", weight_grad, DType::F32, topk_weights.shape())?;
                vector(op, "token_topk_to_pos", token_topk_to_pos, DType::I32, topk_weights.shape())?;
                self.token_topk_to_pos = token_topk_to_pos.input();
                self.absent_tensor = Some(("token_topk_to_pos", token_topk_to_pos));
                self.num_weights = topk_weights.numel() as u32;
                self.weight_grad = weight_grad.output();
                weight_grad
            }
            (Some(grad), weights) => {
                let got = match grad {
                    WeightGrad::PerRow(_) => "by row",
                    WeightGrad::PerTokenTopk { .. } => "by token and choice",
                };
                let allowed = match weights {
                    RowWeights::None => "none without weights",
                    RowWeights::PerRow { .. } => "by row, as the weights are",
                    RowWeights::PerTokenTopk { .. } => "by token and choice, as the weights are",
                };
                return Err(Error::Value { op, arg: "weight_grad", allowed: allowed.to_owned(), got: got.to_owned() });
            }
        };
        self.num_weights_to_write = grad.numel();
        self.options |= k::WEIGHT_GRAD;
        self.grad_tensor = Some(("weight_grad", grad));
        Ok(())
    }

    /// All on one device, outputs apart from everything else.
    pub fn check_memory(&self, stream: &Stream, mut inputs: Named<'a>, mut outputs: Named<'a>) -> Result<()> {
        for input in [self.rows_tensor, self.weights_tensor, self.weights_map_tensor, self.absent_tensor] {
            inputs.push(input);
        }
        outputs.push(self.grad_tensor);
        check::same_device(self.op, stream, inputs.list())?;
        check::same_device(self.op, stream, outputs.list())?;
        check::no_overlaps(self.op, inputs.list(), outputs.list())
    }

    /// How many gradients of weights each block looks through.
    pub fn share(&self, num_rows: u32) -> u32 {
        self.num_weights.div_ceil(k::blocks(num_rows, self.num_weights).max(1))
    }
}

/// A contiguous tensor of 4-byte elements.
fn vector(op: &'static str, arg: &'static str, t: &View, dtype: DType, shape: &[u64]) -> Result<()> {
    check::dtype(op, arg, t, &[dtype])?;
    check::shape(op, arg, t, shape)?;
    check::contiguous(op, arg, t)?;
    check::aligned(op, arg, t, 4)
}
