//! moe_topk_gate_backward: the gradient of the gate with respect to its logits.

use crate::{DType, Error, Result, Stream, TensorMut, TensorRef, View, check};

const OP: &str = "moe_topk_gate_backward";

/// Most experts that a token may have chosen.
pub const MAX_TOPK: u64 = 32;

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

/// Not written yet: checks its arguments, and refuses to compute.
///
/// # Errors
/// Always.
pub fn moe_topk_gate_backward(stream: &Stream, args: Args<'_>) -> Result<()> {
    let sizes = check_args(stream, &args)?;
    if sizes.t == 0 || sizes.e == 0 {
        return Ok(());
    }
    Err(Error::Unsupported { op: OP, what: "the kernel is not written yet".into() })
}

/// What the kernel counts with.
struct Sizes {
    t: u32,
    e: u32,
    k: u32,
}

/// Most tokens, so that a launch has fewer than 2^31 blocks.
const MAX_TOKENS: u64 = i32::MAX as u64;

fn check_args(stream: &Stream, args: &Args<'_>) -> Result<Sizes> {
    let (scores, topk_idx, grad_logits) = (&args.scores, &args.topk_idx, &args.grad_logits);
    check::rank(OP, "scores", scores, 2)?;
    check::rank(OP, "topk_idx", topk_idx, 2)?;
    let (t, e, k) = (scores.dim(0), scores.dim(1), topk_idx.dim(1));
    for (name, tensor) in [("scores", &**scores), ("grad_logits", grad_logits)] {
        check::dtype(OP, name, tensor, &[DType::F32])?;
        check::shape(OP, name, tensor, &[t, e])?;
        check::contiguous(OP, name, tensor)?;
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
    let mut inputs: [(&'static str, &View); 6] = [("scores", scores); 6];
    inputs[1] = ("topk_idx", topk_idx);
    inputs[2] = ("topk_weights", &args.topk_weights);
    inputs[3] = ("grad_topk_weights", &args.grad_topk_weights);
    if let Some(aux) = &args.aux {
        check::dtype(OP, "mask", &aux.mask, &[DType::U8])?;
        check::shape(OP, "mask", &aux.mask, &[t])?;
        check::contiguous(OP, "mask", &aux.mask)?;
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
        inputs[4] = ("mask", &aux.mask);
        inputs[5] = ("grad_scores_sum", sum);
    }
    let inputs = if args.aux.is_some() { &inputs[..] } else { &inputs[..4] };
    check::same_device(OP, stream, inputs)?;
    check::same_device(OP, stream, &[("grad_logits", grad_logits)])?;
    check::no_overlaps(OP, inputs, &[("grad_logits", grad_logits)])?;
    Ok(Sizes { t: t as u32, e: e as u32, k: k as u32 })
}

/// Most experts: a row's offsets in bytes have 32 bits.
const MAX_EXPERTS: u64 = 1 << 28;
