//! norm_backward: gradients of the root mean square norm.

use super::norm_forward::{input, output};
use crate::{DType, Device, Error, Result, Stream, TensorMut, TensorRef, View, check};
use ferrotile_kernels::device::Out;
use ferrotile_kernels::quant::norm_backward as k;

const OP: &str = "norm_backward";

/// Arguments of [`norm_backward`].
#[derive(Debug)]
pub struct Args<'a> {
    /// Gradient of the norm, bf16 or f32 `(T, H)`, last stride 1.
    pub out_grad: TensorRef<'a>,
    /// What was normed: the sum with the residual, if there was one. Of the type and shape of `out_grad`, last stride 1.
    pub x: TensorRef<'a>,
    /// The weight of the norm, `(H,)` of the type of `x`, contiguous.
    pub weight: Option<TensorRef<'a>>,
    /// What the norm returned, f32 `(T,)`, contiguous.
    pub rstd: TensorRef<'a>,
    /// A gradient that reaches `x` on another way and is added: of the type and shape of `x`, last stride 1.
    pub residual_out_grad: Option<TensorRef<'a>>,
    /// The factor of the norm.
    pub out_scale: f32,
    /// Gradient of `x`, and of the residual: of the type and shape of `x`, contiguous.
    pub x_grad: TensorMut<'a>,
    /// Gradient of the weight, if it is wanted.
    pub weight_grad: Option<WeightGrad<'a>>,
}

/// Where the gradient of the weight goes.
#[derive(Debug)]
pub struct WeightGrad<'a> {
    /// bf16 or f32 `(H,)`, contiguous.
    pub tensor: TensorMut<'a>,
    /// Add to what is there instead of replacing it.
    pub accumulate: bool,
    /// Where the multiprocessors leave their shares: u8 `[n]` with `n` at least [`workspace_bytes`], contiguous, 16-byte aligned. Zeroed
    /// once, when it is made (`device.zeros::<u8>(bytes)`); every call leaves it ready for the next one. Calls that may run at the same
    /// time need one each.
    pub workspace: TensorMut<'a>,
}

/// Bytes of workspace that [`norm_backward`] needs on this device for the gradient of the weight: an f32 for each channel, rounded up to
/// four of them, and each multiprocessor that has work, and 16 bytes. More tokens or channels never need less. It saturates instead of overflowing.
pub fn workspace_bytes(device: &Device, num_tokens: u64, hidden: u64) -> u64 {
    num_tokens
        .min(device.num_sms().into())
        .saturating_mul(hidden.saturating_add(3) / 4 * 4)
        .saturating_mul(4)
        .saturating_add(BARRIER_BYTES)
}

/// The barrier stands in front of the shares, which start at a multiple of 16 bytes.
const BARRIER_BYTES: u64 = 16;

/// Gradients of [`norm_forward`](super::norm_forward()): with `xh = x * rstd`, `g = out_grad * out_scale` and `m = mean(xh * g * weight)`
/// over the channels of a token, `x_grad = (g * weight - xh * m) * rstd + residual_out_grad`, and `weight_grad = sum(xh * g)` over tokens.
///
/// | tensor | dtype | shape | layout |
/// |---|---|---|---|
/// | `out_grad`, `x`, `residual_out_grad` | bf16 or f32, all the same | `(T, H)` | last stride 1, any row stride |
/// | `weight` | that of `x` | `(H,)` | contiguous |
/// | `rstd` | f32 | `(T,)` | contiguous |
/// | `x_grad` | that of `x` | `(T, H)` | contiguous |
/// | `weight_grad` | bf16 or f32 | `(H,)` | contiguous |
/// | its workspace | u8 | [`workspace_bytes`] | contiguous |
///
/// All arithmetic is f32, and each result is rounded once at its end; `weight_grad` is added to what it replaces before that. Sums have a
/// fixed order, which depends on shapes, alignment and the number of multiprocessors: the same call on the same GPU gives the same bits. A
/// row whose `rstd` is NaN has a NaN gradient and makes all of `weight_grad` NaN; other infinities and NaN spread as the formulas say.
/// Source: the specification's section 6.11.
///
/// Asynchronous; allocates nothing. Without tokens nothing is launched, except that a `weight_grad` that is not added to becomes zeros. With
/// `weight_grad` the launch is cooperative: it starts when the GPU has room for all of its blocks, at most one per multiprocessor. Any `H`
/// works and any alignment; it is fast up to 8192 channels when rows are whole numbers of 16-byte words that start at multiples of 16 bytes.
/// Otherwise rows are read twice, channel by channel, in up to three launches.
///
/// # Errors
/// [`Shape`](Error::Shape), [`DType`](Error::DType) and [`Layout`](Error::Layout) when a tensor is not as in the table or the workspace
/// is too small, [`Value`](Error::Value) for no channels, 2^31 or more of them or of tokens, [`DeviceMismatch`](Error::DeviceMismatch),
/// [`Overlap`](Error::Overlap) of an output with another argument, [`Driver`](Error::Driver). The outputs are untouched then.
///
/// ```
/// use ferrotile::quant::norm_backward::{Args, WeightGrad, norm_backward, workspace_bytes};
///
/// let device = ferrotile::Device::emulator();
/// let (x, out_grad) = (device.upload(&[2.0f32, 2.0, -2.0, 2.0])?, device.upload(&[1.0f32, 3.0, 0.0, 4.0])?);
/// let rstd = device.upload(&[0.5f32, 0.5])?;
/// let (mut x_grad, mut weight_grad) = (device.alloc::<f32>(4)?, device.alloc::<f32>(2)?);
/// let bytes = workspace_bytes(&device, 2, 2);
/// let mut workspace = device.zeros::<u8>(bytes as usize)?;
/// let args = Args {
///     out_grad: out_grad.tensor(&[2, 2])?,
///     x: x.tensor(&[2, 2])?,
///     weight: None,
///     rstd: rstd.tensor(&[2])?,
///     residual_out_grad: None,
///     out_scale: 1.0,
///     x_grad: x_grad.tensor_mut(&[2, 2])?,
///     weight_grad: Some(WeightGrad {
///         tensor: weight_grad.tensor_mut(&[2])?,
///         accumulate: false,
///         workspace: workspace.tensor_mut(&[bytes])?,
///     }),
/// };
/// norm_backward(&device.stream()?, args)?;
/// // The first row is [1, 1] after the norm; what is parallel to it does not count.
/// assert_eq!(x_grad.to_vec()?, [-0.5, 0.5, 1.0, 1.0]);
/// assert_eq!(weight_grad.to_vec()?, [1.0, 7.0]);
/// # Ok::<(), ferrotile::Error>(())
/// ```
pub fn norm_backward(stream: &Stream, args: Args<'_>) -> Result<()> {
    let sizes = check_args(stream, &args)?;
    let weight_grad = args.weight_grad.as_ref();
    if sizes.num_tokens == 0 {
        return match weight_grad {
            Some(weight_grad) if !weight_grad.accumulate => add_up(stream, weight_grad, &sizes, 0),
            _ => Ok(()),
        };
    }
    let num_sms = stream.device().num_sms();
    let f32_input = args.x.dtype() == DType::F32;
    let plan = if !sizes.wide {
        None
    } else if f32_input {
        k::plan::<k::F32>(k::F32_VECTORS, sizes.num_tokens, sizes.hidden, weight_grad.is_some(), num_sms)
    } else {
        k::plan::<k::Bf16>(k::BF16_VECTORS, sizes.num_tokens, sizes.hidden, weight_grad.is_some(), num_sms)
    };
    let Some(plan) = plan else { return launch_any(stream, &args, &sizes) };
    use k::rows as e;
    let (entry, config) = if f32_input {
        (&e::f32, k::rows_config::<k::F32>(plan, sizes.hidden))
    } else {
        (&e::bf16, k::rows_config::<k::Bf16>(plan, sizes.hidden))
    };
    let config = if weight_grad.is_some() { config.cooperative() } else { config };
    let kernel_args = e::Args {
        out_grad: args.out_grad.input(),
        x: args.x.input(),
        residual_out_grad: input(args.residual_out_grad.as_deref()),
        weight: input(args.weight.as_deref()),
        rstd: args.rstd.input(),
        x_grad: args.x_grad.output(),
        weight_grad: output(weight_grad.map(|w| &*w.tensor)),
        shares: weight_grad.map_or(Out::null(), |w| shares(w)),
        barrier: weight_grad.map_or(Out::null(), |w| Out::new(w.workspace.ptr(), BARRIER_BYTES)),
        out_grad_stride: row_stride(&args.out_grad),
        x_stride: row_stride(&args.x),
        residual_stride: args.residual_out_grad.as_deref().map_or(0, row_stride),
        num_tokens: sizes.num_tokens,
        hidden: sizes.hidden,
        rows: plan.rows,
        row_threads: plan.row_threads,
        stages: plan.stages,
        num_shares: plan.num_shares,
        parts: parts(&args),
        inv_hidden: 1.0 / sizes.hidden as f32,
        out_scale: args.out_scale,
    };
    stream.launch(OP, entry, &config, &kernel_args)
}

/// Rows of any length and alignment.
fn launch_any(stream: &Stream, args: &Args<'_>, sizes: &Sizes) -> Result<()> {
    let f32_input = args.x.dtype() == DType::F32;
    use k::any_rows as e;
    let kernel_args = e::Args {
        out_grad: args.out_grad.input(),
        x: args.x.input(),
        residual_out_grad: input(args.residual_out_grad.as_deref()),
        weight: input(args.weight.as_deref()),
        rstd: args.rstd.input(),
        x_grad: args.x_grad.output(),
        out_grad_stride: row_stride(&args.out_grad),
        x_stride: row_stride(&args.x),
        residual_stride: args.residual_out_grad.as_deref().map_or(0, row_stride),
        hidden: sizes.hidden,
        parts: parts(args),
        inv_hidden: 1.0 / sizes.hidden as f32,
        out_scale: args.out_scale,
    };
    stream.launch(OP, if f32_input { &e::f32 } else { &e::bf16 }, &k::any_rows_config(sizes.num_tokens), &kernel_args)?;
    let Some(weight_grad) = &args.weight_grad else { return Ok(()) };
    use k::any_weight as w;
    let num_shares = k::any_shares(sizes.num_tokens, stream.device().num_sms());
    let kernel_args = w::Args {
        out_grad: args.out_grad.input(),
        x: args.x.input(),
        rstd: args.rstd.input(),
        shares: shares(weight_grad),
        out_grad_stride: row_stride(&args.out_grad),
        x_stride: row_stride(&args.x),
        num_tokens: sizes.num_tokens,
        hidden: sizes.hidden,
        out_scale: args.out_scale,
    };
    let config = k::any_weight_config(sizes.hidden, num_shares);
    stream.launch(OP, if f32_input { &w::f32 } else { &w::bf16 }, &config, &kernel_args)?;
    add_up(stream, weight_grad, sizes, num_shares)
}

/// The last sum of `weight_grad`.
fn add_up(stream: &Stream, weight_grad: &WeightGrad<'_>, sizes: &Sizes, num_shares: u32) -> Result<()> {
    let kernel_args = k::add_up::Args {
        shares: shares(weight_grad),
        weight_grad: weight_grad.tensor.output(),
        num_shares,
        hidden: sizes.hidden,
        parts: weight_parts(weight_grad),
    };
    stream.launch(OP, &k::add_up::ENTRY, &k::add_up_config(sizes.hidden), &kernel_args)
}

/// The workspace without the barrier.
fn shares(weight_grad: &WeightGrad<'_>) -> Out<f32> {
    let workspace = &weight_grad.workspace;
    Out::new(workspace.ptr() + BARRIER_BYTES, workspace.span_bytes() - BARRIER_BYTES)
}

fn parts(args: &Args<'_>) -> u32 {
    let flag = |present: bool, part: u32| if present { part } else { 0 };
    flag(args.weight.is_some(), k::WEIGHT)
        | flag(args.residual_out_grad.is_some(), k::RESIDUAL)
        | args.weight_grad.as_ref().map_or(0, weight_parts)
}

fn weight_parts(weight_grad: &WeightGrad<'_>) -> u32 {
    let f32_output = if weight_grad.tensor.dtype() == DType::F32 { k::WEIGHT_GRAD_F32 } else { 0 };
    k::WEIGHT_GRAD | f32_output | if weight_grad.accumulate { k::ACCUMULATE } else { 0 }
}

/// Bytes from one row to the next.
fn row_stride(t: &View) -> u64 {
    if t.is_empty() || t.dim(0) == 1 { 0 } else { t.stride(0) * t.dtype().size() }
}

/// What the checks found out.
struct Sizes {
    num_tokens: u32,
    hidden: u32,
    /// Whether rows are whole numbers of aligned vectors.
    wide: bool,
}

fn check_args(stream: &Stream, args: &Args<'_>) -> Result<Sizes> {
    let (x, out_grad) = (&args.x, &args.out_grad);
    check::rank(OP, "out_grad", out_grad, 2)?;
    check::dtype(OP, "out_grad", out_grad, &[DType::Bf16, DType::F32])?;
    let (num_tokens, hidden) = (out_grad.dim(0), out_grad.dim(1));
    let (dtype, shape) = (out_grad.dtype(), out_grad.shape());
    let size = dtype.size();
    // Kernels count rows and channels with 32 bits.
    check::in_range(OP, "hidden", hidden, 1, i32::MAX as u64)?;
    check::in_range(OP, "num_tokens", num_tokens, 0, i32::MAX as u64)?;
    let like_x = [("out_grad", Some(&**out_grad)), ("x", Some(&**x)), ("residual_out_grad", args.residual_out_grad.as_deref())];
    for (name, t) in like_x {
        let Some(t) = t else { continue };
        check::dtype(OP, name, t, &[dtype])?;
        check::shape(OP, name, t, shape)?;
        check::last_stride_1(OP, name, t)?;
        check::aligned(OP, name, t, size)?;
    }
    let outputs = [
        ("x_grad", Some(&*args.x_grad)),
        ("weight_grad", args.weight_grad.as_ref().map(|w| &*w.tensor)),
        ("workspace", args.weight_grad.as_ref().map(|w| &*w.workspace)),
    ];
    if let Some(weight) = &args.weight {
        check::whole(OP, "weight", weight, dtype, &[hidden])?;
        check::aligned(OP, "weight", weight, size)?;
    }
    check::whole(OP, "rstd", &args.rstd, DType::F32, &[num_tokens])?;
    check::aligned(OP, "rstd", &args.rstd, 4)?;
    check::whole(OP, "x_grad", &args.x_grad, dtype, shape)?;
    check::aligned(OP, "x_grad", &args.x_grad, size)?;
    if let Some(WeightGrad { tensor, workspace, .. }) = &args.weight_grad {
        check::dtype(OP, "weight_grad", tensor, &[DType::Bf16, DType::F32])?;
        check::shape(OP, "weight_grad", tensor, &[hidden])?;
        check::contiguous(OP, "weight_grad", tensor)?;
        check::aligned(OP, "weight_grad", tensor, tensor.dtype().size())?;
        check::rank(OP, "workspace", workspace, 1)?;
        check::dtype(OP, "workspace", workspace, &[DType::U8])?;
        check::contiguous(OP, "workspace", workspace)?;
        check::aligned(OP, "workspace", workspace, 16)?;
        let bytes = workspace_bytes(stream.device(), num_tokens, hidden);
        if workspace.dim(0) < bytes {
            let (expected, got) = (format!("at least [{bytes}]"), format!("{:?}", workspace.shape()));
            return Err(Error::Shape { op: OP, arg: "workspace", expected, got });
        }
    }
    // Absent tensors are skipped, so what is there lies without gaps.
    let inputs = [("weight", args.weight.as_deref()), ("rstd", Some(&*args.rstd))];
    let mut tensors = [("x", &**x); 8];
    let mut all = 0;
    let mut first_output = 0;
    for (i, (name, t)) in like_x.iter().chain(&inputs).chain(&outputs).enumerate() {
        if let Some(t) = t {
            tensors[all] = (*name, *t);
            all += 1;
        }
        if i + 1 == like_x.len() + inputs.len() {
            first_output = all;
        }
    }
    check::same_device(OP, stream, &tensors[..all])?;
    check::no_overlaps(OP, &tensors[..first_output], &tensors[first_output..all])?;
    let wide = (hidden * size).is_multiple_of(16)
        && like_x.iter().filter_map(|(_, t)| *t).all(|t| t.ptr().is_multiple_of(16) && row_stride(t).is_multiple_of(16))
        && args.weight.as_ref().is_none_or(|w| w.ptr().is_multiple_of(16))
        && args.x_grad.ptr().is_multiple_of(16);
    Ok(Sizes { num_tokens: num_tokens as u32, hidden: hidden as u32, wide })
}
