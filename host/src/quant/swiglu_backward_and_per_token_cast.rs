//! Launcher of `swiglu_backward_and_per_token_cast`.

use super::common_swiglu::{Tensors, check_clamp, check_memory, check_rows, check_weights, row_bytes};
use super::swiglu_backward::{OfWeights, WeightGrad, check_grad, check_output};
use super::{ExpertRows, RowWeights, Sf, SfLayout, SfMut};
use crate::{DType, Error, Result, Stream, TensorMut, TensorRef, check};
use ferrotile_kernels::device::Out;
use ferrotile_kernels::quant::swiglu_backward_and_per_token_cast as k;

const OP: &str = "swiglu_backward_and_per_token_cast";

/// Arguments of [`swiglu_backward_and_per_token_cast`].
#[derive(Debug)]
pub struct Args<'a> {
    /// Input of the forward op, e4m3 `(P, 2H)`: gates, then what they are multiplied with. Rows may lie any distance apart.
    pub x: TensorRef<'a>,
    /// Its scale factors, row-major, `(P, 2H / npc)`.
    pub x_sf: Sf<'a>,
    /// Channels that share a scale, of `x` and of its gradient: 32 or 128, and a divisor of H.
    pub npc: u32,
    /// Gradient of the forward op's output, bf16 or f32 `(P, H)`; rows may lie any distance apart.
    pub act_x_grad: TensorRef<'a>,
    /// Which rows hold tokens.
    pub rows: ExpertRows<'a>,
    /// What the forward op multiplied rows by.
    pub weights: RowWeights<'a>,
    /// What the forward op limited gates to, and the other half in magnitude. A positive number.
    pub clamp_value: Option<f32>,
    /// Make every scale of the gradient a power of two. Packed layouts need it.
    pub round_sf: bool,
    /// Gradient of `x`: bf16 `(P, 2H)`, contiguous.
    pub x_grad: TensorMut<'a>,
    /// The same, quantised: e4m3 `(P, 2H)`, contiguous.
    pub x_grad_fp8: TensorMut<'a>,
    /// Its scale factors, see [`sf_shape`](super::sf_shape).
    pub x_grad_sf: SfMut<'a>,
    /// Gradient of the weights.
    pub weight_grad: Option<WeightGrad<'a>>,
    /// The output of the forward op once more, bf16 `(P, H)`, contiguous.
    pub act_out: Option<TensorMut<'a>>,
}

/// Gradients of SwiGLU from quantised input, in bf16 and quantised, and of the routing weights of its rows.
///
/// | tensor | dtype | shape | layout |
/// |---|---|---|---|
/// | `x` | e4m3 | `(P, 2H)`, `H % npc == 0` | last stride 1, rows at multiples of 8 bytes |
/// | `x_sf` | f32 | `(P, 2H / npc)` | row-major |
/// | `act_x_grad` | bf16 or f32 | `(P, H)` | last stride 1, rows at multiples of 16 bytes |
/// | `x_grad` | bf16 | `(P, 2H)` | contiguous, 16-byte aligned |
/// | `x_grad_fp8` | e4m3 | `(P, 2H)` | contiguous, 16-byte aligned |
/// | `x_grad_sf` | f32, or ue8m0x4 in a packed layout | `(P, K)` or `(P, ceil(K / 4))` with `K = 2H / npc` | see [`SfLayout`] |
/// | `act_out` | bf16 | `(P, H)` | contiguous, 16-byte aligned |
/// | `weight_grad` | f32 | `(P,)` or `(N, k)` | contiguous |
///
/// `x` is `fp32(q) * sf`; the gradients are those of [`swiglu_backward`](super::swiglu_backward::swiglu_backward()), whose documentation also says
/// what padding rows become, which weights rows have and how exact the results are. What is quantised are the gradients in f32, not those in bf16, by
/// the rules of [`per_token_cast`](super::per_token_cast::per_token_cast()): groups do not cross the middle of a row. Padding rows, with
/// [`Psum`](ExpertRows::Psum) or [`PosToExpert`](ExpertRows::PosToExpert), have zeros as data and scales of 0 (a byte of 0 if packed), whatever
/// their inputs hold. Unused bytes of a last packed word are written as 0; padding between columns of scales is not touched.
///
/// - The arguments of 1.0.0: `rows` [`All`](ExpertRows::All), `weights` [`PerTokenTopk`](RowWeights::PerTokenTopk), a `weight_grad` of that kind,
///   `act_out`, bf16 `act_x_grad`, row-major scales.
/// - Those of 2.1.0: `rows` `All` or [`Psum`](ExpertRows::Psum), `weights` [`None`](RowWeights::None) or [`PerRow`](RowWeights::PerRow).
///
/// NaN does not count for a scale and becomes `0x7F`; an infinite gradient counts as the largest finite number and becomes the largest
/// code. Everything else about both is as in `swiglu_backward`.
///
/// Asynchronous; allocates nothing. Without rows nothing is launched unless a `weight_grad` is to be cleared. Entries of maps must be smaller
/// than what they index, and not repeat. Source: the specification's sections 2, 5.12 and 6.9.
///
/// # Errors
/// [`Shape`](Error::Shape) when shapes do not belong together, [`DType`](Error::DType), [`Layout`](Error::Layout) for strides and alignment,
/// [`Value`](Error::Value) for `npc` and a H that is no multiple of it, a `clamp_value` that is not positive, packed scales that are
/// not rounded, an alignment of 0, a `weight_grad` of another kind than `weights`, more than 49152 scales in a row, or sizes beyond 31 bits,
/// [`DeviceMismatch`](Error::DeviceMismatch), [`Overlap`](Error::Overlap) of an output with another argument, [`Driver`](Error::Driver).
/// The outputs are untouched then.
///
/// ```
/// use ferrotile::quant::swiglu_backward_and_per_token_cast::{Args, swiglu_backward_and_per_token_cast};
/// use ferrotile::quant::{ExpertRows, RowWeights, Sf, SfLayout, SfMut};
/// use ferrotile::{Device, E4m3};
/// use half::bf16;
///
/// let device = Device::emulator();
/// // One row of 32 channels: gates 0, the other half 2 * 1.5.
/// let x: Vec<E4m3> = (0..64).map(|i| E4m3::from_f32([0.0, 2.0][i / 32])).collect();
/// let (x, x_sf) = (device.upload(&x)?, device.upload(&[1.0f32, 1.5])?);
/// let grad = device.upload(&[bf16::from_f32(4.0); 32])?;
/// let mut x_grad = device.alloc::<bf16>(64)?;
/// let (mut fp8, mut sf) = (device.alloc::<E4m3>(64)?, device.alloc::<f32>(2)?);
/// swiglu_backward_and_per_token_cast(
///     &device.stream()?,
///     Args {
///         x: x.tensor(&[1, 64])?,
///         x_sf: Sf { tensor: x_sf.tensor(&[1, 2])?, layout: SfLayout::RowMajor },
///         npc: 32,
///         act_x_grad: grad.tensor(&[1, 32])?,
///         rows: ExpertRows::All,
///         weights: RowWeights::None,
///         clamp_value: None,
///         round_sf: true,
///         x_grad: x_grad.tensor_mut(&[1, 64])?,
///         x_grad_fp8: fp8.tensor_mut(&[1, 64])?,
///         x_grad_sf: SfMut { tensor: sf.tensor_mut(&[1, 2])?, layout: SfLayout::RowMajor },
///         weight_grad: None,
///         act_out: None,
///     },
/// )?;
/// // silu'(0) = 1 / 2: 4 * 3 / 2, and 4 * silu(0).
/// assert_eq!((x_grad.to_vec()?[0].to_f32(), x_grad.to_vec()?[32].to_f32()), (6.0, 0.0));
/// // 6 / 448, rounded up to a power of two.
/// assert_eq!((sf.to_vec()?[0], fp8.to_vec()?[0].to_f32()), (2f32.powi(-6), 384.0));
/// # Ok::<(), ferrotile::Error>(())
/// ```
pub fn swiglu_backward_and_per_token_cast(stream: &Stream, args: Args<'_>) -> Result<()> {
    let (x, grad, x_grad, fp8) = (&args.x, &args.act_x_grad, &args.x_grad, &args.x_grad_fp8);
    check::one_of(OP, "npc", args.npc, &[32, 128])?;
    check::rank(OP, "x", x, 2)?;
    check::dtype(OP, "x", x, &[DType::E4m3])?;
    // Kernels count rows, and channels of both halves, with 32 bits.
    check::in_range(OP, "num_rows", x.dim(0), 0, i32::MAX as u64)?;
    check::divisible(OP, "columns of x", x.dim(1), 2 * args.npc as u64)?;
    check::in_range(OP, "scales of a row", x.dim(1) / args.npc as u64, 0, k::MAX_GROUPS.into())?;
    check::last_stride_1(OP, "x", x)?;
    check::aligned(OP, "x", x, 8)?;
    let (num_rows, hidden) = (x.dim(0) as u32, (x.dim(1) / 2) as u32);
    let groups = 2 * (hidden / args.npc);
    check_grad(OP, grad, &[DType::Bf16, DType::F32], (num_rows, hidden))?;
    let whole = [num_rows.into(), 2 * hidden as u64];
    check_output(OP, "x_grad", x_grad, DType::Bf16, &whole)?;
    check_output(OP, "x_grad_fp8", fp8, DType::E4m3, &whole)?;
    if let Some(act_out) = &args.act_out {
        check_output(OP, "act_out", act_out, DType::Bf16, &[num_rows.into(), hidden.into()])?;
    }
    let scales = (num_rows.into(), groups.into());
    let x_sf = args.x_sf.check(OP, "x_sf", &[SfLayout::RowMajor], scales)?;
    let packed = args.x_grad_sf.layout.is_packed();
    if packed && !args.round_sf {
        let allowed = format!("true with {} scales", args.x_grad_sf.layout);
        return Err(Error::Value { op: OP, arg: "round_sf", allowed, got: "false".to_owned() });
    }
    let sf = args.x_grad_sf.check(OP, "x_grad_sf", SfLayout::COMMON, scales)?;
    let rows = check_rows(OP, &args.rows, num_rows)?;
    let weights = check_weights(OP, &args.weights, num_rows)?;
    let of_weights = OfWeights::new(OP, num_rows, &args.weights, args.weight_grad.as_ref())?;
    let clamp = check_clamp(OP, args.clamp_value, None)?.value;

    let mut inputs = Tensors::inputs(x, &args.rows, &args.weights);
    let mut outputs = Tensors::new(("x_grad", x_grad));
    inputs.push(("x_sf", &args.x_sf.tensor));
    inputs.push(("act_x_grad", grad));
    outputs.push(("x_grad_fp8", fp8));
    outputs.push(("x_grad_sf", &args.x_grad_sf.tensor));
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
    let with = |option, wanted| if wanted { option } else { 0 };
    let kernel_args = k::cast::Args {
        x: x.input(),
        x_sf: args.x_sf.tensor.input(),
        grad: grad.input(),
        rows_map: rows.map,
        weights: weights.weights,
        weights_map: weights.map,
        token_topk_to_pos: of_weights.token_topk_to_pos,
        x_grad: x_grad.output(),
        x_grad_fp8: fp8.output(),
        sf: args.x_grad_sf.tensor.output(),
        weight_grad: of_weights.weight_grad,
        act_out: args.act_out.as_ref().map_or(Out::null(), |t| t.output()),
        x_stride: row_bytes(x),
        grad_stride: row_bytes(grad),
        x_sf_stride: x_sf.row,
        sf_row_stride: sf.row,
        sf_col_stride: sf.col,
        num_rows,
        hidden,
        clamp,
        options: of_weights.options | with(k::PACKED, packed) | with(k::ACT_OUT, args.act_out.is_some()),
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
    use k::cast::{bf16_32, bf16_128, bf16_round_32, bf16_round_128, f32_32, f32_128, f32_round_32, f32_round_128};
    let entry = match (grad.dtype(), args.round_sf, args.npc) {
        (DType::Bf16, false, 32) => &bf16_32,
        (DType::Bf16, false, _) => &bf16_128,
        (DType::Bf16, true, 32) => &bf16_round_32,
        (DType::Bf16, true, _) => &bf16_round_128,
        (_, false, 32) => &f32_32,
        (_, false, _) => &f32_128,
        (_, true, 32) => &f32_round_32,
        (_, true, _) => &f32_round_128,
    };
    stream.launch(OP, entry, &k::config(num_rows, hidden, groups, of_weights.num_weights), &kernel_args)
}
