//! moe_topk_gate_backward: the gradient of the gate with respect to its logits.

use crate::{DType, Error, Result, Stream, TensorMut, TensorRef, View, check};
use ferrotile_kernels::moe::moe_topk_gate_backward as kernels;
use kernels::{routed, with_loss};

const OP: &str = "moe_topk_gate_backward";

/// Most experts that a token may have chosen.
pub const MAX_TOPK: u64 = kernels::MAX_TOPK as u64;

/// The gradient of a loss on the sums, over each sequence, of scores that are normalised token by token.
#[derive(Clone, Copy, Debug)]
pub struct AuxGrad<'a> {
    /// Which tokens count: u8 `[num_tokens]`, contiguous; 0 is no.
    pub mask: TensorRef<'a>,
    /// f32 `[num_sequences, num_experts]`, contiguous; each sequence has the same number of tokens.
    pub grad_scores_sum: TensorRef<'a>,
}

/// Arguments of [`moe_topk_gate_backward`]. `grad_logits` may not overlap another tensor.
#[derive(Debug)]
pub struct Args<'a> {
    /// Scores as the forward op wrote them: f32 `[num_tokens, num_experts]`, contiguous.
    pub scores: TensorRef<'a>,
    /// Logical experts, -1 is none: i64 `[num_tokens, num_topk]`, rows with any stride.
    pub topk_idx: TensorRef<'a>,
    /// Their weights: f32 `[num_tokens, num_topk]`, rows with any stride.
    pub topk_weights: TensorRef<'a>,
    /// Gradient of those weights: f32 `[num_tokens, num_topk]`, rows with any stride.
    pub grad_topk_weights: TensorRef<'a>,
    /// What the normalised weights were multiplied by.
    pub routed_scaling_factor: f32,
    /// A second gradient.
    pub aux: Option<AuxGrad<'a>>,
    /// f32 `[num_tokens, num_experts]`, contiguous.
    pub grad_logits: TensorMut<'a>,
}

/// Gradient of [`moe_topk_gate_forward`](super::moe_topk_gate_forward()) with respect to its logits. Asynchronous on `stream`; allocates
/// nothing.
///
/// | tensor | shape | dtype | layout |
/// |---|---|---|---|
/// | `scores` | `[num_tokens, num_experts]` | f32 | contiguous |
/// | `topk_idx` | `[num_tokens, num_topk]` | i64 | any row stride |
/// | `topk_weights`, `grad_topk_weights` | `[num_tokens, num_topk]` | f32 | any row stride |
/// | `mask` | `[num_tokens]` | u8, not 0 is true | contiguous |
/// | `grad_scores_sum` | `[num_sequences, num_experts]` | f32 | contiguous |
/// | `grad_logits` | `[num_tokens, num_experts]` | f32 | contiguous |
///
/// For a token with scores `u`, choices `j[k]` that are not -1, weights `w` and their gradients `g`, and the scaling factor `s`:
///
/// ```text
/// R[e] = sum of (s * g[k] - sum(g * w)) / (sum of u[j[k]] + 1e-20) over all k with j[k] = e
/// X[e] = (h[e] - sum(h * u) / sum(u)) / sum(u)        where the mask is true, else 0; h is grad_scores_sum of the token's sequence
/// grad_logits[e] = (1 - exp(-u[e]^2)) / (2 * u[e]) * (R[e] + X[e])        0 where u[e] is 0
/// ```
///
/// `topk_idx` holds logical experts: neither shared experts nor replicas nor the experts of tokens that were routed at random, which
/// have -1; the forward op writes such indices to `unmapped_topk_idx`. Choices may repeat an expert. An index of `num_experts` or more
/// counts as none; the checked emulator reports it. A token whose scores are all 0 has X = 0, so that a token that was masked or routed at
/// random has a gradient of exactly 0. No result is -0.0. Weights and gradients beside an index of -1 may be anything. Without `aux` the
/// scores of experts that were not chosen are not read, and their gradient is 0.
///
/// All sums are f32 in an order that depends on the sizes only: results are the same from run to run and on both backends. The error is that of
/// a few f32 roundings, relative to the largest term of each sum. The fast path for `aux` takes rows of up to 256 experts, a multiple of 4, with
/// tensors that start at multiples of 16 bytes; others read rows twice. (Facts: moe.md, section 16.)
///
/// ```
/// use ferrotile::moe::moe_topk_gate_backward::{Args, moe_topk_gate_backward};
///
/// let device = ferrotile::Device::emulator();
/// // Four experts, of which a token chose the last and the first. Their weights are 3/4 and 1/4 of the factor 2.
/// let scores = device.upload(&[0.5f32, 0.1, 0.2, 1.5])?;
/// let (idx, weights, grads) = (device.upload(&[3i64, 0])?, device.upload(&[1.5f32, 0.5])?, device.upload(&[1.0f32, 0.0])?);
/// let mut grad_logits = device.alloc::<f32>(4)?;
/// let args = Args {
///     scores: scores.tensor(&[1, 4])?,
///     topk_idx: idx.tensor(&[1, 2])?,
///     topk_weights: weights.tensor(&[1, 2])?,
///     grad_topk_weights: grads.tensor(&[1, 2])?,
///     routed_scaling_factor: 2.0,
///     aux: None,
///     grad_logits: grad_logits.tensor_mut(&[1, 4])?,
/// };
/// moe_topk_gate_backward(&device.stream()?, args)?;
/// let slope = |u: f32| (1.0 - (-u * u).exp()) / (2.0 * u);
/// let expected = [slope(0.5) * (0.0 - 1.5) / 2.0, 0.0, 0.0, slope(1.5) * (2.0 - 1.5) / 2.0];
/// for (got, expected) in grad_logits.to_vec()?.iter().zip(expected) {
///     assert!((got - expected).abs() < 1e-6);
/// }
/// # Ok::<(), ferrotile::Error>(())
/// ```
///
/// # Errors
/// [`Error::Shape`], [`Error::DType`], [`Error::Layout`] when a tensor is not as in the table; [`Error::Value`] for `num_topk` above 32 or
/// above `num_experts`, for a number of sequences that does not divide that of tokens, and for more than 2^31 - 1 tokens or 2^28
/// experts; [`Error::Overlap`], [`Error::DeviceMismatch`], [`Error::Driver`]. `grad_logits` is untouched then.
pub fn moe_topk_gate_backward(stream: &Stream, args: Args<'_>) -> Result<()> {
    let sizes = check_args(stream, &args)?;
    if args.grad_logits.is_empty() {
        return Ok(());
    }
    let Sizes { t, e, k, sequence } = sizes;
    let config = kernels::config(t);
    let vectors = e.is_multiple_of(4) && args.scores.ptr().is_multiple_of(16) && args.grad_logits.ptr().is_multiple_of(16);
    let (scores, idx, out) = (args.scores.input(), args.topk_idx.input(), args.grad_logits.output());
    let (weights, grads) = (args.topk_weights.input(), args.grad_topk_weights.input());
    let idx_stride = args.topk_idx.stride(0);
    let (weights_stride, grads_stride) = (args.topk_weights.stride(0), args.grad_topk_weights.stride(0));
    let factor = args.routed_scaling_factor;
    let Some(aux) = &args.aux else {
        let entry = if vectors { &routed::v4 } else { &routed::v1 };
        let values = routed::Args { scores, idx, weights, grads, out, t, e, k, idx_stride, weights_stride, grads_stride, factor };
        return stream.launch(OP, entry, &config, &values);
    };
    let entry = match vectors && aux.grad_scores_sum.ptr().is_multiple_of(16) {
        true if e <= kernels::max_held(2) => &with_loss::held_2_v4,
        true if e <= kernels::max_held(4) => &with_loss::held_4_v4,
        true => &with_loss::v4,
        false => &with_loss::v1,
    };
    let kernels::Divisor { magic: sequence_magic, shift: sequence_shift } = kernels::Divisor::new(sequence);
    let values = with_loss::Args {
        scores,
        idx,
        weights,
        grads,
        mask: aux.mask.input(),
        h: aux.grad_scores_sum.input(),
        out,
        t,
        e,
        k,
        idx_stride,
        weights_stride,
        grads_stride,
        factor,
        sequence_magic,
        sequence_shift,
    };
    stream.launch(OP, entry, &config, &values)
}

/// What the kernel counts with.
struct Sizes {
    t: u32,
    e: u32,
    k: u32,
    /// Tokens of a sequence.
    sequence: u32,
}

/// Most tokens, so that a launch has fewer than 2^31 blocks.
const MAX_TOKENS: u64 = i32::MAX as u64;

fn check_args(stream: &Stream, args: &Args<'_>) -> Result<Sizes> {
    let (scores, topk_idx, grad_logits) = (&args.scores, &args.topk_idx, &args.grad_logits);
    check::rank(OP, "scores", scores, 2)?;
    check::rank(OP, "topk_idx", topk_idx, 2)?;
    let (t, e, k) = (scores.dim(0), scores.dim(1), topk_idx.dim(1));
    for (name, tensor) in [("scores", &**scores), ("grad_logits", grad_logits)] {
        check::whole(OP, name, tensor, DType::F32, &[t, e])?;
    }
    for (name, tensor, dtype) in [
        ("topk_idx", topk_idx, DType::I64),
        ("topk_weights", &args.topk_weights, DType::F32),
        ("grad_topk_weights", &args.grad_topk_weights, DType::F32),
    ] {
        check::dtype(OP, name, tensor, &[dtype])?;
        check::shape(OP, name, tensor, &[t, k])?;
        check::last_stride_1(OP, name, tensor)?;
    }
    check::in_range(OP, "num_tokens", t, 0, MAX_TOKENS)?;
    check::in_range(OP, "num_experts", e, 0, MAX_EXPERTS)?;
    check::in_range(OP, "num_topk", k, 0, MAX_TOPK.min(e))?;
    let mut sequence = t;
    let mut inputs: [(&'static str, &View); 6] = [("scores", scores); 6];
    inputs[1] = ("topk_idx", topk_idx);
    inputs[2] = ("topk_weights", &args.topk_weights);
    inputs[3] = ("grad_topk_weights", &args.grad_topk_weights);
    if let Some(aux) = &args.aux {
        check::whole(OP, "mask", &aux.mask, DType::U8, &[t])?;
        let sum = &aux.grad_scores_sum;
        check::dtype(OP, "grad_scores_sum", sum, &[DType::F32])?;
        check::rank(OP, "grad_scores_sum", sum, 2)?;
        check::shape(OP, "grad_scores_sum", sum, &[sum.dim(0), e])?;
        check::contiguous(OP, "grad_scores_sum", sum)?;
        let sequences = sum.dim(0);
        // Tokens divided among sequences evenly; no tokens, any number of sequences.
        if t > 0 && (sequences == 0 || !t.is_multiple_of(sequences)) {
            let (allowed, got) = (format!("divisors of num_tokens ({t})"), sequences.to_string());
            return Err(Error::Value { op: OP, arg: "num_sequences", allowed, got });
        }
        sequence = t.checked_div(sequences).unwrap_or(0);
        inputs[4] = ("mask", &aux.mask);
        inputs[5] = ("grad_scores_sum", sum);
    }
    let inputs = if args.aux.is_some() { &inputs[..] } else { &inputs[..4] };
    check::same_device(OP, stream, inputs)?;
    check::same_device(OP, stream, &[("grad_logits", grad_logits)])?;
    check::no_overlaps(OP, inputs, &[("grad_logits", grad_logits)])?;
    Ok(Sizes { t: t as u32, e: e as u32, k: k as u32, sequence: sequence as u32 })
}

/// Most experts: a row's offsets in bytes have 32 bits.
const MAX_EXPERTS: u64 = 1 << 28;
