//! moe_topk_gate_forward: from logits to experts and weights of each token.

use crate::{DType, Error, Result, Stream, TensorMut, TensorRef, View, check};
use ferrotile_kernels::device::{In, Out};
use ferrotile_kernels::moe::common_gate::{self, MAX_COLUMNS, MAX_SLOTS};
use ferrotile_kernels::moe::moe_topk_gate_forward as kernels;
use kernels::gate;

const OP: &str = "moe_topk_gate_forward";

/// Most experts that a token may choose, shared ones included.
pub const MAX_TOPK: u64 = MAX_SLOTS as u64;

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

impl<'a> Args<'a> {
    /// Without anything that may be left out: no bias, no shared expert, all tokens routed by their logits, weights that add up to 1.
    pub fn new(logits: TensorRef<'a>, topk_idx: TensorMut<'a>, topk_weights: TensorMut<'a>) -> Self {
        Self {
            logits,
            bias: None,
            image_bias: None,
            mask: None,
            force_random: None,
            fix_routing_mask: None,
            physical_map: None,
            num_shared_experts: 0,
            routed_scaling_factor: 1.0,
            ep_rank: 0,
            unmapped_topk_idx: None,
            scores: None,
            topk_idx,
            topk_weights,
        }
    }
}

/// The whole gate of a mixture of experts: scores, choice, weights, and where the chosen experts are. Asynchronous on `stream`; allocates
/// nothing.
///
/// | tensor | shape | dtype | layout |
/// |---|---|---|---|
/// | `logits` | `[num_tokens, num_experts]` | f32 | contiguous, 16-byte aligned |
/// | `bias`, `image_bias.bias` | `[num_experts]` | f32 | contiguous |
/// | `mask`, `force_random`, `fix_routing_mask`, `image_bias.token_mask` | `[num_tokens]` | u8, not 0 is true | contiguous |
/// | `to_physical_map` | `[num_experts + num_shared_experts, replicas]` | i32 | contiguous |
/// | `logical_count` | `[num_experts + num_shared_experts]` | i32 | contiguous |
/// | `unmapped_topk_idx` | `[num_tokens, num_topk]` | i64 | any row stride |
/// | `scores` | `[num_tokens, num_experts]` | f32 | contiguous, 16-byte aligned |
/// | `topk_idx` | `[num_tokens, num_topk + num_shared_experts]` | i64 | contiguous |
/// | `topk_weights` | `[num_tokens, num_topk + num_shared_experts]` | f32 | contiguous |
///
/// The first of these that applies to a token `t`:
///
/// | token | `topk_idx` | `topk_weights` | `unmapped_topk_idx` | `scores` |
/// |---|---|---|---|---|
/// | `mask` is given and false | -1 | 0 | -1 | 0 |
/// | `force_random` is true | different physical experts | in (0, 1] | -1 | 0 |
/// | `fix_routing_mask` is true | the experts in `unmapped_topk_idx` | as below | kept | `u` |
/// | others | the best experts, the best one first | as below | the best experts | `u` |
///
/// Scores are `u = sqrt(log(1 + exp(x)))`. Experts are ranked by `u + bias`, rounded to f32; tokens whose `token_mask` is true rank by the
/// bias for images instead. Of equal ones the smaller index comes first, and -0.0 equals +0.0. Weights are
/// `u[j] / (sum of the chosen u + 1e-20) * routed_scaling_factor`; the sum is a tree of distances 16, 8, 4, 2, 1 over 32 slots, of
/// which the unused ones are 0; a quotient below 2^-126 counts as 0. Shared experts follow in the last columns, with the logical indices `num_experts` and
/// `num_experts + 1` and the weight 1.
///
/// With `physical_map`, `topk_idx` holds `to_physical_map[j, (ep_rank + t * 23333) % logical_count[j]]` of each logical expert `j`, shared
/// ones included, in arithmetic that does not overflow. Random experts are physical ones from the start, below the sum of
/// `logical_count`, or below `num_experts + num_shared_experts` without a map.
///
/// Random experts and weights are functions of `ep_rank` and the number of the token: Philox4x32-10 with the key `(ep_rank, 0)` and the counter
/// `(0, 0, 32 * t + slot)`, the last number in 64 bits. The weight is `w0 * 2^-32 + 2^-33` in f32; the expert is the `w1 % (N - slot)`th of
/// those of all `N` that no slot before has.
///
/// Scores are within 2.5 units of the last place of `u`. Both backends give the same bits. Logits should be finite: of +inf and NaN the score is
/// NaN, which ranks behind everything; of -inf it is 0. A fixed expert outside `0..num_experts` counts as none: -1 with the
/// weight 0; the checked emulator reports it unless it is negative. Logits of masked tokens and of random ones may be read, but do not
/// matter. (Facts: moe.md, section 15.)
///
/// ```
/// use ferrotile::moe::moe_topk_gate_forward::{Args, moe_topk_gate_forward};
///
/// let device = ferrotile::Device::emulator();
/// let logits = device.upload(&[-1.0f32, 3.0, 0.0, 2.0])?;
/// let bias = device.upload(&[0.0f32, -9.0, 0.0, 0.0])?;
/// let (mut topk_idx, mut topk_weights) = (device.alloc::<i64>(3)?, device.alloc::<f32>(3)?);
/// let args = Args {
///     bias: Some(bias.tensor(&[4])?),
///     num_shared_experts: 1,
///     routed_scaling_factor: 2.0,
///     ..Args::new(logits.tensor(&[1, 4])?, topk_idx.tensor_mut(&[1, 3])?, topk_weights.tensor_mut(&[1, 3])?)
/// };
/// moe_topk_gate_forward(&device.stream()?, args)?;
/// // The bias keeps expert 1 out. Number 4 is the shared expert.
/// assert_eq!(topk_idx.to_vec()?, [3, 2, 4]);
/// let score = |x: f32| x.exp().ln_1p().sqrt();
/// for (got, expected) in topk_weights.to_vec()?.iter().zip([score(2.0), score(0.0)]) {
///     assert!((got - 2.0 * expected / (score(2.0) + score(0.0))).abs() < 1e-6);
/// }
/// assert_eq!(topk_weights.to_vec()?[2], 1.0);
/// # Ok::<(), ferrotile::Error>(())
/// ```
///
/// # Errors
/// [`Error::Shape`], [`Error::DType`], [`Error::Layout`] when a tensor is not as in the table; [`Error::Value`] for a number of experts that is
/// no multiple of 4 or above 16384, more than 2 shared experts, more than 32 choices with the shared experts or more than there are,
/// no or more than 65536 columns of the map, `fix_routing_mask` without `unmapped_topk_idx`, or more than 2^31 - 1 tokens;
/// [`Error::Overlap`], [`Error::DeviceMismatch`], [`Error::Driver`]. The outputs are untouched then.
pub fn moe_topk_gate_forward(stream: &Stream, args: Args<'_>) -> Result<()> {
    let Sizes { t, e, k } = check_args(stream, &args)?;
    if t == 0 || args.topk_idx.dim(1) == 0 && args.scores.is_none() {
        return Ok(());
    }
    let flags = |tensor: &Option<TensorRef<'_>>| tensor.as_ref().map_or(In::null(), |tensor| tensor.input::<u8>());
    let floats = |tensor: &Option<TensorRef<'_>>| tensor.as_ref().map_or(In::null(), |tensor| tensor.input::<f32>());
    let (image, map) = (args.image_bias.as_ref(), args.physical_map.as_ref());
    let image_bias = image.map(|image| image.bias);
    let aligned = |tensor: &Option<TensorRef<'_>>| tensor.as_ref().is_none_or(|tensor| tensor.ptr().is_multiple_of(16));
    let mut has = 0;
    for (bit, given) in [
        (kernels::MASK, args.mask.is_some()),
        (kernels::RANDOM, args.force_random.is_some()),
        (kernels::FIXED, args.fix_routing_mask.is_some()),
        (kernels::IMAGE, image.is_some()),
        (kernels::BIAS, args.bias.is_some()),
        (kernels::ALIGNED, aligned(&args.bias) && aligned(&image_bias)),
        (kernels::UNMAPPED, args.unmapped_topk_idx.is_some()),
        (kernels::SCORES, args.scores.is_some()),
        (kernels::PHYSICAL, map.is_some()),
        // Beside random tokens, most of what it asks for may be in vain; with few tokens, time is short of bandwidth anyway.
        (kernels::EAGER, args.force_random.is_none() || t <= common_gate::FEW),
    ] {
        has |= if given { bit } else { 0 };
    }
    let ints = |tensor: Option<&TensorRef<'_>>| tensor.map_or(In::null(), |tensor| tensor.input::<i32>());
    let lines = |tensor: Option<&TensorRef<'_>>| tensor.map_or(0, |tensor| tensor.span_bytes().div_ceil(128) as u32);
    let (physical, count) = (map.map(|map| &map.to_physical_map), map.map(|map| &map.logical_count));
    let values = gate::Args {
        logits: args.logits.input(),
        mask: flags(&args.mask),
        random: flags(&args.force_random),
        fixed: flags(&args.fix_routing_mask),
        image: flags(&image.map(|image| image.token_mask)),
        bias: floats(&args.bias),
        image_bias: floats(&image_bias),
        map: ints(physical),
        logical_count: ints(count),
        unmapped: args.unmapped_topk_idx.as_ref().map_or(Out::null(), |tensor| tensor.output()),
        idx: args.topk_idx.output(),
        weights: args.topk_weights.output(),
        scores_out: args.scores.as_ref().map_or(Out::null(), |tensor| tensor.output()),
        unmapped_stride: args.unmapped_topk_idx.as_ref().map_or(0, |tensor| tensor.stride(0)),
        t,
        e,
        k,
        s: args.num_shared_experts,
        has,
        factor: args.routed_scaling_factor,
        columns: physical.map_or(0, |map| map.dim(1) as u32),
        map_lines: lines(physical),
        count_lines: lines(count),
        ep_rank: args.ep_rank,
    };
    stream.launch(OP, &gate::ENTRY, &kernels::config(t, e), &values)
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
        check::in_range(OP, "columns of to_physical_map", replicas, 1, MAX_COLUMNS.into())?;
    }
    if args.fix_routing_mask.is_some() && args.unmapped_topk_idx.is_none() {
        let allowed = "None without unmapped_topk_idx".into();
        return Err(Error::Value { op: OP, arg: "fix_routing_mask", allowed, got: "a tensor".into() });
    }

    let mut inputs = List::<9>::new(("logits", logits));
    let mut outputs = List::<4>::new(("topk_idx", &args.topk_idx));
    check::whole(OP, "logits", logits, DType::F32, &[t, e])?;
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
            check::whole(OP, name, tensor, dtype, shape)?;
            inputs.push(name, Some(tensor));
        }
    }
    check::whole(OP, "topk_idx", &args.topk_idx, DType::I64, &[t, columns])?;
    check::whole(OP, "topk_weights", &args.topk_weights, DType::F32, &[t, columns])?;
    outputs.push("topk_weights", Some(&args.topk_weights));
    if let Some(unmapped) = &args.unmapped_topk_idx {
        check::dtype(OP, "unmapped_topk_idx", unmapped, &[DType::I64])?;
        check::shape(OP, "unmapped_topk_idx", unmapped, &[t, k])?;
        check::last_stride_1(OP, "unmapped_topk_idx", unmapped)?;
        outputs.push("unmapped_topk_idx", Some(unmapped));
    }
    if let Some(scores) = &args.scores {
        check::whole(OP, "scores", scores, DType::F32, &[t, e])?;
        check::aligned(OP, "scores", scores, 16)?;
        outputs.push("scores", Some(scores));
    }
    check::in_range(OP, "num_tokens", t, 0, MAX_TOKENS)?;
    check::same_device(OP, stream, inputs.all())?;
    check::same_device(OP, stream, outputs.all())?;
    check::no_overlaps(OP, inputs.all(), outputs.all())?;
    Ok(Sizes { t: t as u32, e: e as u32, k: k as u32 })
}

/// Most experts.
pub const MAX_EXPERTS: u64 = common_gate::MAX_EXPERTS as u64;

/// Most tokens: blocks are counted in 31 bits.
const MAX_TOKENS: u64 = i32::MAX as u64;
