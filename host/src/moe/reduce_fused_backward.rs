//! Launcher of [`reduce_fused_backward`].

#[cfg(doc)]
use crate::Error;
use crate::{DType, Result, Stream, TensorMut, TensorRef, View, check};
use ferrotile_kernels::device::In;
use ferrotile_kernels::entry::Entry;
use ferrotile_kernels::moe::reduce_fused::values;
use ferrotile_kernels::moe::reduce_fused_backward as kernels;
use ferrotile_kernels::quant::common::Divisor;
use kernels::rows;

const OP: &str = "reduce_fused_backward";

/// Arguments of [`reduce_fused_backward`].
#[derive(Debug)]
pub struct Args<'a> {
    /// The expanded buffer as the forward op saw it, f32 or bf16 `[num_expanded_tokens, hidden]`; rows may lie any distance apart.
    pub x: TensorRef<'a>,
    /// Gradient of the forward op's `out`, f32 or bf16 `[num_tokens, hidden]`; rows may lie any distance apart.
    pub grad_out: TensorRef<'a>,
    /// Weight of each choice, f32 `[num_tokens, num_topk]`; 1 without.
    pub topk_weights: Option<TensorRef<'a>>,
    /// Row of each choice, i32 `[num_tokens, num_topk]`; -1 for none. No row stands there twice.
    pub token_topk_to_pos: TensorRef<'a>,
    /// Expert of each row, i32 `[num_expanded_tokens]`; negative for padding.
    pub pos_to_expert: TensorRef<'a>,
    /// Gradient of `x`, of its type, `[num_expanded_tokens, hidden]`, contiguous.
    pub grad_x: TensorMut<'a>,
    /// Gradient of the weights, f32 `[num_tokens, num_topk]`, contiguous.
    pub grad_topk_weights: TensorMut<'a>,
}

/// The gradient of [`reduce_fused`](super::reduce_fused()) with respect to the expanded buffer and the weights, in one pass.
///
/// | tensor | shape | dtype | layout |
/// |---|---|---|---|
/// | `x` | `[num_expanded_tokens, hidden]` | f32 or bf16 | last stride 1, any row stride |
/// | `grad_out` | `[num_tokens, hidden]` | f32 or bf16 | last stride 1, any row stride |
/// | `topk_weights` (optional) | `[num_tokens, num_topk]` | f32 | contiguous |
/// | `token_topk_to_pos` | `[num_tokens, num_topk]` | i32 | contiguous |
/// | `pos_to_expert` | `[num_expanded_tokens]` | i32 | contiguous |
/// | `grad_x` | `[num_expanded_tokens, hidden]` | as `x` | contiguous |
/// | `grad_topk_weights` | `[num_tokens, num_topk]` | f32 | contiguous |
///
/// For each choice `k` of token `t` with a row `p = token_topk_to_pos[t, k] >= 0`: `grad_x[p] = grad_out[t] * topk_weights[t, k]`, an f32
/// product to nearest even, and `grad_topk_weights[t, k] = sum(grad_out[t] * x[p])`, an f32 dot product. Choices without a row have the
/// gradient 0. Rows with `pos_to_expert[p] < 0` become zeros; a row that is neither padding nor named by a choice does not occur with the
/// maps of [`get_fused_mapping()`](super::get_fused_mapping()) and is left as it is.
///
/// The dot product is deterministic, its order is fixed by `hidden`, types and alignment alone: it adds with one fma each
/// `hidden / 256` values (rounded up to whole vectors) in a row, and those partial sums pairwise. Its error is thus at most
/// `(hidden / 256 + 18) * 2^-24` times the sum of the magnitudes. NaN becomes `0x7FFFFFFF` in f32 and `0x7FFF` in bf16. A choice whose
/// row is not below `num_expanded_tokens` counts as none; the checked emulator reports it.
///
/// `x_sf` and `sf` of the forward op have no place here: quantised expert outputs are for inference.
/// Any hidden size and alignment work; fast are rows that start at multiples of 16 bytes with `hidden % 8 == 0`. Asynchronous on
/// `stream`; allocates nothing. (The derivative of the formula in moe.md, section 12; maps: section 1.2.)
///
/// ```
/// use ferrotile::moe::reduce_fused_backward::{Args, reduce_fused_backward};
///
/// let device = ferrotile::Device::emulator();
/// let x = device.upload(&[1.0f32, 2.0, 10.0, 20.0, 100.0, 200.0])?;
/// // Token 0 has rows 2 and 0, token 1 has none; row 1 is padding.
/// let token_topk_to_pos = device.upload(&[2i32, 0, -1, -1])?;
/// let pos_to_expert = device.upload(&[0i32, -1, 1])?;
/// let topk_weights = device.upload(&[0.5f32, 2.0, 1.0, 1.0])?;
/// let grad_out = device.upload(&[1.0f32, -1.0, 3.0, 3.0])?;
/// let (mut grad_x, mut grad_topk_weights) = (device.alloc::<f32>(6)?, device.alloc::<f32>(4)?);
/// reduce_fused_backward(&device.stream()?, Args {
///     x: x.tensor(&[3, 2])?,
///     grad_out: grad_out.tensor(&[2, 2])?,
///     topk_weights: Some(topk_weights.tensor(&[2, 2])?),
///     token_topk_to_pos: token_topk_to_pos.tensor(&[2, 2])?,
///     pos_to_expert: pos_to_expert.tensor(&[3])?,
///     grad_x: grad_x.tensor_mut(&[3, 2])?,
///     grad_topk_weights: grad_topk_weights.tensor_mut(&[2, 2])?,
/// })?;
/// assert_eq!(grad_x.to_vec()?, [2.0, -2.0, 0.0, 0.0, 0.5, -0.5]);
/// assert_eq!(grad_topk_weights.to_vec()?, [-100.0, -1.0, 0.0, 0.0]);
/// # Ok::<(), ferrotile::Error>(())
/// ```
///
/// # Errors
/// [`Error::Shape`], [`Error::DType`], [`Error::Layout`] when a tensor is not as in the table or an address is no multiple of the element size;
/// [`Error::Value`] for more than 2^30 tokens, 2^31 - 1 choices of a token, rows or columns, or rows 4 GiB or more apart;
/// [`Error::Overlap`] of an output with another tensor, [`Error::DeviceMismatch`], [`Error::Driver`]. The outputs are untouched then.
pub fn reduce_fused_backward(stream: &Stream, args: Args<'_>) -> Result<()> {
    let plan = check(stream, &args)?;
    let Args { x, grad_out, topk_weights, token_topk_to_pos, pos_to_expert, grad_x, grad_topk_weights } = &args;
    let parts = kernels::parts(plan.t, plan.k, stream.device().num_sms());
    // With no columns there is no padding to write, with no choices no weight.
    let padding_blocks = if grad_x.is_empty() { 0 } else { kernels::padding_blocks(plan.p) };
    let t = if grad_topk_weights.is_empty() { 0 } else { plan.t };
    let divisor = Divisor::new(parts);
    let values = rows::Args {
        x: x.input(),
        grad: grad_out.input(),
        topk_weights: topk_weights.as_ref().map_or(In::null(), |weights| weights.input()),
        token_topk_to_pos: token_topk_to_pos.input(),
        pos_to_expert: pos_to_expert.input(),
        grad_x: grad_x.output(),
        grad_topk_weights: grad_topk_weights.output(),
        k: plan.k,
        p: plan.p,
        x_row: plan.x_row,
        grad_row: plan.grad_row,
        pieces: plan.hidden / plan.values,
        padding_blocks,
        parts,
        magic: divisor.magic,
        shift: divisor.shift,
        has_weights: topk_weights.is_some().into(),
    };
    let entry = entry(x.dtype(), grad_out.dtype(), plan.values > 1);
    stream.launch(OP, entry, &kernels::config(t, parts, padding_blocks), &values)
}

fn entry(x: DType, grad: DType, wide: bool) -> &'static Entry<rows::Args> {
    match (x, grad, wide) {
        (DType::F32, DType::F32, true) => &rows::f32_f32,
        (DType::F32, _, true) => &rows::f32_bf16,
        (_, DType::F32, true) => &rows::bf16_f32,
        (_, _, true) => &rows::bf16_bf16,
        (DType::F32, DType::F32, false) => &rows::f32_f32_narrow,
        (DType::F32, _, false) => &rows::f32_bf16_narrow,
        (_, DType::F32, false) => &rows::bf16_f32_narrow,
        (_, _, false) => &rows::bf16_bf16_narrow,
    }
}

/// What the kernel counts with.
struct Plan {
    t: u32,
    k: u32,
    p: u32,
    hidden: u32,
    /// Bytes from one row to the next.
    x_row: u32,
    grad_row: u32,
    /// Values of a thread: 1 where alignment allows no more.
    values: u32,
}

fn check(stream: &Stream, args: &Args<'_>) -> Result<Plan> {
    const TYPES: &[DType] = &[DType::F32, DType::Bf16];
    const MOST: u64 = i32::MAX as u64;
    let Args { x, grad_out, topk_weights, token_topk_to_pos, pos_to_expert, grad_x, grad_topk_weights } = args;
    check::rank(OP, "x", x, 2)?;
    check::rank(OP, "token_topk_to_pos", token_topk_to_pos, 2)?;
    let (p, hidden) = (x.dim(0), x.dim(1));
    let (t, k) = (token_topk_to_pos.dim(0), token_topk_to_pos.dim(1));
    check::in_range(OP, "num_tokens", t, 0, kernels::MAX_TOKENS)?;
    check::in_range(OP, "num_topk", k, 0, MOST)?;
    check::in_range(OP, "num_expanded_tokens", p, 0, MOST)?;
    check::in_range(OP, "hidden", hidden, 0, MOST)?;
    check::dtype(OP, "x", x, TYPES)?;
    check::dtype(OP, "grad_out", grad_out, TYPES)?;
    check::shape(OP, "grad_out", grad_out, &[t, hidden])?;
    let row = |arg, tensor: &View| {
        check::last_stride_1(OP, arg, tensor)?;
        check::aligned(OP, arg, tensor, tensor.dtype().size())?;
        let bytes = if tensor.dim(0) <= 1 { 0 } else { tensor.stride(0).saturating_mul(tensor.dtype().size()) };
        check::fits_u32(OP, "bytes from one row to the next", bytes)
    };
    let (x_row, grad_row) = (row("x", x)?, row("grad_out", grad_out)?);

    // An absent tensor's place is taken by one that is there, which changes nothing.
    let mut inputs: [(&str, &View); 5] = [("x", x), ("grad_out", grad_out), ("x", x), ("x", x), ("x", x)];
    let outputs: [(&str, &View); 2] = [("grad_x", grad_x), ("grad_topk_weights", grad_topk_weights)];
    let whole: [(&str, Option<&View>, DType, &[u64]); 5] = [
        ("topk_weights", topk_weights.as_deref(), DType::F32, &[t, k]),
        ("token_topk_to_pos", Some(token_topk_to_pos), DType::I32, &[t, k]),
        ("pos_to_expert", Some(pos_to_expert), DType::I32, &[p]),
        ("grad_x", Some(grad_x), x.dtype(), &[p, hidden]),
        ("grad_topk_weights", Some(grad_topk_weights), DType::F32, &[t, k]),
    ];
    for (i, (arg, tensor, dtype, shape)) in whole.into_iter().enumerate() {
        let Some(tensor) = tensor else { continue };
        check::whole(OP, arg, tensor, dtype, shape)?;
        check::aligned(OP, arg, tensor, dtype.size())?;
        if let Some(place) = inputs.get_mut(2 + i) {
            *place = (arg, tensor);
        }
    }
    check::same_device(OP, stream, &inputs)?;
    check::same_device(OP, stream, &outputs)?;
    check::no_overlaps(OP, &inputs, &outputs)?;

    let values = values(x.dtype().size(), grad_out.dtype().size());
    let fits = |tensor: &View, row: u32| {
        // Tensors without elements do not matter.
        tensor.is_empty() || (tensor.ptr() | row as u64).is_multiple_of(values as u64 * tensor.dtype().size())
    };
    let wide = hidden.is_multiple_of(values.into()) && fits(x, x_row) && fits(grad_out, grad_row) && fits(grad_x, 0);
    Ok(Plan {
        t: t as u32,
        k: k as u32,
        p: p as u32,
        hidden: hidden as u32,
        x_row,
        grad_row,
        values: if wide { values } else { 1 },
    })
}
