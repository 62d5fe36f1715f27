//! Launcher of `swiglu_backward`, and what it shares with the fused one.

use super::common_swiglu::{Tensors, check_clamp, check_memory, check_rows, check_weights, check_x, elements, row_bytes, vector};
use super::{ExpertRows, RowWeights};
use crate::{DType, Error, Result, Stream, TensorMut, TensorRef, View, check};
use ferrotile_kernels::device::{In, Out};
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
    /// What the forward op limited gates to, and the other half in magnitude. A positive number.
    pub clamp_value: Option<f32>,
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
/// With `x, y` the halves of a row, `w` its weight and `c` the `clamp_value`, each operation rounded to f32:
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
/// [`Value`](Error::Value) for `H % 8 != 0`, a `clamp_value` that is not positive, an alignment of 0, a `weight_grad` of another kind than `weights`, or
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
///         clamp_value: None,
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
    let (num_rows, hidden) = check_x(OP, x)?;
    check_grad(OP, grad, &[x.dtype()], (num_rows, hidden))?;
    check::dtype(OP, "x_grad", x_grad, &[DType::Bf16, DType::F32])?;
    check_output(OP, "x_grad", x_grad, x_grad.dtype(), &[num_rows.into(), 2 * hidden as u64])?;
    if let Some(act_out) = &args.act_out {
        check_output(OP, "act_out", act_out, x_grad.dtype(), &[num_rows.into(), hidden.into()])?;
    }
    let rows = check_rows(OP, &args.rows, num_rows)?;
    let weights = check_weights(OP, &args.weights, num_rows)?;
    let of_weights = OfWeights::new(OP, num_rows, &args.weights, args.weight_grad.as_ref())?;
    let clamp = check_clamp(OP, args.clamp_value, None)?.value;

    let mut inputs = Tensors::inputs(x, &args.rows, &args.weights);
    let mut outputs = Tensors::new(("x_grad", x_grad));
    inputs.push(("act_x_grad", grad));
    if let Some(act_out) = &args.act_out {
        outputs.push(("act_out", act_out));
    }
    if let Some(weight_grad) = &args.weight_grad {
        weight_grad.push(&mut inputs, &mut outputs);
    }
    check_memory(OP, stream, &inputs, &outputs)?;
    if x.is_empty() && of_weights.is_empty {
        return Ok(());
    }
    let kernel_args = k::plain::Args {
        x: x.input(),
        grad: grad.input(),
        rows_map: rows.map,
        weights: weights.weights,
        weights_map: weights.map,
        token_topk_to_pos: of_weights.token_topk_to_pos,
        x_grad: x_grad.output(),
        weight_grad: of_weights.weight_grad,
        act_out: args.act_out.as_ref().map_or(Out::null(), |t| t.output()),
        x_stride: row_bytes(x),
        grad_stride: row_bytes(grad),
        num_rows,
        hidden,
        clamp,
        options: of_weights.options | if args.act_out.is_some() { k::ACT_OUT } else { 0 },
        rows_kind: rows.kind,
        num_experts: rows.num_experts,
        alignment: rows.alignment,
        alignment_magic: rows.divisor.magic,
        alignment_shift: rows.divisor.shift,
        weights_kind: weights.kind,
        factor: weights.factor,
        num_weights: of_weights.num_weights,
        share: of_weights.share(num_rows),
    };
    let (entry, channels) = match (x.dtype(), x_grad.dtype()) {
        (DType::Bf16, DType::Bf16) => (&k::plain::bf16_bf16, 8),
        (DType::Bf16, _) => (&k::plain::bf16_f32, 4),
        (_, DType::Bf16) => (&k::plain::f32_bf16, 4),
        _ => (&k::plain::f32_f32, 4),
    };
    stream.launch(OP, entry, &k::config(num_rows, hidden.div_ceil(channels), of_weights.num_weights), &kernel_args)
}

/// The gradient of the activation, whose rows start at multiples of 16 bytes.
pub(super) fn check_grad(op: &'static str, grad: &View, dtypes: &[DType], (num_rows, hidden): (u32, u32)) -> Result<()> {
    check::dtype(op, "act_x_grad", grad, dtypes)?;
    check::shape(op, "act_x_grad", grad, &[num_rows.into(), hidden.into()])?;
    check::last_stride_1(op, "act_x_grad", grad)?;
    check::aligned(op, "act_x_grad", grad, 16)
}

/// A contiguous output, aligned for stores of 16 bytes.
pub(super) fn check_output(op: &'static str, arg: &'static str, t: &View, dtype: DType, shape: &[u64]) -> Result<()> {
    check::whole(op, arg, t, dtype, shape)?;
    check::aligned(op, arg, t, 16)
}

impl WeightGrad<'_> {
    /// Adds the tensors to those of an op.
    pub(super) fn push<'a>(&'a self, inputs: &mut Tensors<'a>, outputs: &mut Tensors<'a>) {
        match self {
            WeightGrad::PerRow(weight_grad) => outputs.push(("weight_grad", weight_grad)),
            WeightGrad::PerTokenTopk { weight_grad, token_topk_to_pos } => {
                outputs.push(("weight_grad", weight_grad));
                inputs.push(("token_topk_to_pos", token_topk_to_pos));
            }
        }
    }

    fn kind(&self) -> &'static str {
        match self {
            WeightGrad::PerRow(_) => "by row",
            WeightGrad::PerTokenTopk { .. } => "by token and choice",
        }
    }
}

/// The gradient of weights as kernels take it.
pub(super) struct OfWeights {
    pub token_topk_to_pos: In<i32>,
    pub weight_grad: Out<f32>,
    /// How many are looked through for those without a row.
    pub num_weights: u32,
    /// Whether there is nothing to write.
    pub is_empty: bool,
    pub options: u32,
}

impl OfWeights {
    /// Checks that the gradient is of the kind that the weights are, and of their shape.
    pub fn new(op: &'static str, num_rows: u32, weights: &RowWeights<'_>, weight_grad: Option<&WeightGrad<'_>>) -> Result<Self> {
        let none = Self { token_topk_to_pos: In::null(), weight_grad: Out::null(), num_weights: 0, is_empty: true, options: 0 };
        match (weight_grad, weights) {
            (None, _) => Ok(none),
            (Some(WeightGrad::PerRow(grad)), RowWeights::PerRow { .. }) => {
                vector(op, "weight_grad", grad, DType::F32, num_rows.into())?;
                Ok(Self { weight_grad: grad.output(), is_empty: num_rows == 0, options: k::WEIGHT_GRAD, ..none })
            }
            (
                Some(WeightGrad::PerTokenTopk { weight_grad: grad, token_topk_to_pos: map }),
                RowWeights::PerTokenTopk { topk_weights, .. },
            ) => {
                for (arg, t, dtype) in [("weight_grad", &**grad, DType::F32), ("token_topk_to_pos", &**map, DType::I32)] {
                    check::dtype(op, arg, t, &[dtype])?;
                    check::shape(op, arg, t, topk_weights.shape())?;
                    elements(op, arg, t)?;
                }
                Ok(Self {
                    token_topk_to_pos: map.input(),
                    weight_grad: grad.output(),
                    // Known to fit from the check of the weights.
                    num_weights: topk_weights.numel() as u32,
                    is_empty: topk_weights.is_empty(),
                    options: k::WEIGHT_GRAD,
                })
            }
            (Some(grad), weights) => {
                let allowed = match weights {
                    RowWeights::None => "none without weights",
                    RowWeights::PerRow { .. } => "by row, as the weights are",
                    RowWeights::PerTokenTopk { .. } => "by token and choice, as the weights are",
                };
                Err(Error::Value { op, arg: "weight_grad", allowed: allowed.to_owned(), got: grad.kind().to_owned() })
            }
        }
    }

    /// How many gradients each block looks through.
    pub fn share(&self, num_rows: u32) -> u32 {
        self.num_weights.div_ceil(k::blocks(num_rows, self.num_weights).max(1))
    }
}
