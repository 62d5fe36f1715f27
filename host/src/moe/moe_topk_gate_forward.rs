//! moe_topk_gate_forward: from logits to experts and weights of each token.

use crate::{DType, Error, Result, Stream, TensorMut, TensorRef, View, check};

const OP: &str = "moe_topk_gate_forward";

/// Most experts that a token may choose, shared ones included.
pub const MAX_TOPK: u64 = 32;

/// A second bias for tokens of another kind.
#[derive(Clone, Copy, Debug)]
pub struct ImageBias<'a> {
    /// Which tokens rank by `bias` here instead of the common one: u8 `[num_tokens]`, contiguous; 0 is no.
    pub token_mask: TensorRef<'a>,
    /// f32 `[num_experts]`, contiguous.
    pub bias: TensorRef<'a>,
}

/// Where the replicas of each expert are.
#[derive(Clone, Copy, Debug)]
pub struct PhysicalMap<'a> {
    /// Physical numbers of each logical expert: i32 `[num_experts + num_shared_experts, most_replicas]`, contiguous.
    pub to_physical_map: TensorRef<'a>,
    /// How many of them there are, 1 at least: i32 `[num_experts + num_shared_experts]`, contiguous.
    pub logical_count: TensorRef<'a>,
}

/// Arguments of [`moe_topk_gate_forward`]. No output may overlap another tensor.
#[derive(Debug)]
pub struct Args<'a> {
    /// f32 `[num_tokens, num_experts]`, `num_experts % 4 == 0`, contiguous, 16-byte aligned. Finite.
    pub logits: TensorRef<'a>,
    /// Added to the scores for the ranking only: f32 `[num_experts]`, contiguous. `None` is 0.
    pub bias: Option<TensorRef<'a>>,
    /// What some tokens rank by instead of `bias`.
    pub image_bias: Option<ImageBias<'a>>,
    /// Which tokens are routed at all: u8 `[num_tokens]`, contiguous; 0 is no.
    pub mask: Option<TensorRef<'a>>,
    /// Which tokens go to random experts: u8 `[num_tokens]`, contiguous; 0 is no.
    pub force_random: Option<TensorRef<'a>>,
    /// Which tokens take the experts that `unmapped_topk_idx` holds: u8 `[num_tokens]`, contiguous; 0 is no.
    pub fix_routing_mask: Option<TensorRef<'a>>,
    /// Replicas of experts.
    pub physical_map: Option<PhysicalMap<'a>>,
    /// Shared experts that are routed to like others, behind the chosen ones: 0, 1 or 2.
    pub num_shared_experts: u32,
    /// What the normalised weights are multiplied by.
    pub routed_scaling_factor: f32,
    /// Rank within the expert-parallel group: chooses among replicas, and seeds random routing.
    pub ep_rank: u32,
    /// Logical experts, written, and read where routing is fixed: i64 `[num_tokens, num_topk]`, rows with any stride.
    pub unmapped_topk_idx: Option<TensorMut<'a>>,
    /// Scores for the backward pass: f32 `[num_tokens, num_experts]`, contiguous, 16-byte aligned.
    pub scores: Option<TensorMut<'a>>,
    /// i64 `[num_tokens, num_topk + num_shared_experts]`, contiguous.
    pub topk_idx: TensorMut<'a>,
    /// f32 `[num_tokens, num_topk + num_shared_experts]`, contiguous.
    pub topk_weights: TensorMut<'a>,
}

/// Not written yet: checks its arguments, and refuses to compute.
///
/// # Errors
/// Always.
pub fn moe_topk_gate_forward(stream: &Stream, args: Args<'_>) -> Result<()> {
    let sizes = check_args(stream, &args)?;
    if sizes.t == 0 {
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

/// Tensors by name, in an array that may have gaps at its end.
struct List<'a, const N: usize> {
    tensors: [(&'static str, &'a View); N],
    len: usize,
}

impl<'a, const N: usize> List<'a, N> {
    fn new(first: (&'static str, &'a View)) -> Self {
        Self { tensors: [first; N], len: 1 }
    }

    fn push(&mut self, name: &'static str, tensor: Option<&'a View>) {
        if let Some(tensor) = tensor {
            self.tensors[self.len] = (name, tensor);
            self.len += 1;
        }
    }

    fn all(&self) -> &[(&'static str, &'a View)] {
        &self.tensors[..self.len]
    }
}

fn check_args(stream: &Stream, args: &Args<'_>) -> Result<Sizes> {
    let logits = &args.logits;
    check::rank(OP, "logits", logits, 2)?;
    let (t, e) = (logits.dim(0), logits.dim(1));
    check::rank(OP, "topk_idx", &args.topk_idx, 2)?;
    let columns = args.topk_idx.dim(1);
    let shared = u64::from(args.num_shared_experts);
    check::in_range(OP, "num_shared_experts", shared, 0, 2)?;
    check::in_range(OP, "num_experts", e, 0, MAX_EXPERTS)?;
    check::divisible(OP, "num_experts", e, 4)?;
    check::in_range(OP, "num_topk + num_shared_experts", columns, shared, MAX_TOPK.min(e + shared))?;
    let k = columns - shared;

    let replicas = args.physical_map.as_ref().map_or(0, |map| map.to_physical_map.dim(1));
    if args.physical_map.is_some() {
        check::in_range(OP, "replicas", replicas, 1, i32::MAX as u64 / (e + shared).max(1))?;
    }
    if args.fix_routing_mask.is_some() && args.unmapped_topk_idx.is_none() {
        let allowed = "None without unmapped_topk_idx".into();
        return Err(Error::Value { op: OP, arg: "fix_routing_mask", allowed, got: "a tensor".into() });
    }

    let mut inputs = List::<9>::new(("logits", logits));
    let mut outputs = List::<4>::new(("topk_idx", &args.topk_idx));
    whole("logits", logits, DType::F32, &[t, e])?;
    check::aligned(OP, "logits", logits, 16)?;
    let image = args.image_bias.as_ref();
    let map = args.physical_map.as_ref();
    for (name, tensor, dtype, shape) in [
        ("bias", args.bias.as_ref(), DType::F32, &[e][..]),
        ("image_bias", image.map(|image| &image.bias), DType::F32, &[e]),
        ("image_token_mask", image.map(|image| &image.token_mask), DType::U8, &[t]),
        ("mask", args.mask.as_ref(), DType::U8, &[t]),
        ("force_random", args.force_random.as_ref(), DType::U8, &[t]),
        ("fix_routing_mask", args.fix_routing_mask.as_ref(), DType::U8, &[t]),
        ("to_physical_map", map.map(|map| &map.to_physical_map), DType::I32, &[e + shared, replicas]),
        ("logical_count", map.map(|map| &map.logical_count), DType::I32, &[e + shared]),
    ] {
        if let Some(tensor) = tensor {
            whole(name, tensor, dtype, shape)?;
            inputs.push(name, Some(tensor));
        }
    }
    whole("topk_idx", &args.topk_idx, DType::I64, &[t, columns])?;
    whole("topk_weights", &args.topk_weights, DType::F32, &[t, columns])?;
    outputs.push("topk_weights", Some(&args.topk_weights));
    if let Some(unmapped) = &args.unmapped_topk_idx {
        check::dtype(OP, "unmapped_topk_idx", unmapped, &[DType::I64])?;
        check::shape(OP, "unmapped_topk_idx", unmapped, &[t, k])?;
        check::last_stride_1(OP, "unmapped_topk_idx", unmapped)?;
        outputs.push("unmapped_topk_idx", Some(unmapped));
    }
    if let Some(scores) = &args.scores {
        whole("scores", scores, DType::F32, &[t, e])?;
        check::aligned(OP, "scores", scores, 16)?;
        outputs.push("scores", Some(scores));
    }
    check::in_range(OP, "num_tokens", t, 0, MAX_TOKENS)?;
    check::same_device(OP, stream, inputs.all())?;
    check::same_device(OP, stream, outputs.all())?;
    check::no_overlaps(OP, inputs.all(), outputs.all())?;
    Ok(Sizes { t: t as u32, e: e as u32, k: k as u32 })
}

/// Dtype, shape, and one element after the other.
fn whole(arg: &'static str, tensor: &View, dtype: DType, shape: &[u64]) -> Result<()> {
    check::dtype(OP, arg, tensor, &[dtype])?;
    check::shape(OP, arg, tensor, shape)?;
    check::contiguous(OP, arg, tensor)
}

/// Most experts: a row's offsets in bytes have 32 bits.
const MAX_EXPERTS: u64 = 1 << 28;

/// Most tokens: blocks are counted in 31 bits.
const MAX_TOKENS: u64 = i32::MAX as u64;
