//! top2_sum_gate: from logits to experts and weights of each token, with groups and parallel ranks.

use super::moe_topk_gate_forward::PhysicalMap;
use crate::{DType, Error, Result, Stream, TensorMut, TensorRef, View, check};
use ferrotile_kernels::device::{In, Out};
use ferrotile_kernels::entry::Entry;
use ferrotile_kernels::moe::common_gate::{self, MAX_COLUMNS, MAX_SLOTS};
use ferrotile_kernels::moe::mask_indices_by_tp::Divisor;
use ferrotile_kernels::moe::top2_sum_gate as kernels;
use ferrotile_kernels::moe::topk_sum_and_topk_group_idx::log_lanes;
use kernels::gate;

const OP: &str = "top2_sum_gate";

/// Most experts that a token may choose, shared ones included.
pub const MAX_TOPK: u64 = MAX_SLOTS as u64;

/// Most experts.
pub const MAX_EXPERTS: u64 = common_gate::MAX_EXPERTS as u64;

/// Most groups.
pub const MAX_GROUPS: u64 = kernels::MAX_GROUPS as u64;

/// What makes scores of logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ScoringFunc {
    /// `1 / (1 + exp(-x))`.
    Sigmoid,
    /// `sqrt(log(1 + exp(x)))`.
    SqrtSoftplus,
    /// `exp(x)` over its sum; experts are ranked by `x`.
    Softmax,
}

/// Arguments of [`top2_sum_gate`]. No output may overlap another tensor.
#[derive(Debug)]
pub struct Args<'a> {
    /// f32 `[num_tokens, num_experts]`, contiguous. Finite.
    pub logits: TensorRef<'a>,
    /// Added for the ranking only: f32 `[num_experts]`, contiguous.
    pub bias: TensorRef<'a>,
    /// What makes scores of logits.
    pub scoring_func: ScoringFunc,
    /// Groups of neighbouring experts, of which the best are kept; 0 is no grouping, as is `num_topk_groups == num_groups`.
    pub num_groups: u64,
    /// Groups that a token's experts may come from; 0 together with `num_groups`.
    pub num_topk_groups: u64,
    /// Shared experts that are routed to like others, behind the chosen ones. They need `physical_map` with more columns than that.
    pub num_shared_experts: u64,
    /// What the normalised weights are multiplied by.
    pub routed_scaling_factor: f32,
    /// Rank within the expert-parallel group: chooses among replicas. Below `num_ep_ranks`.
    pub ep_rank: u64,
    /// Expert-parallel ranks, which take neighbouring physical experts each.
    pub num_ep_ranks: u64,
    /// Rank within the tensor-parallel group, below `num_tp_ranks`.
    pub tp_rank: u64,
    /// Tensor-parallel ranks, which take turns with the expert-parallel ones' experts.
    pub num_tp_ranks: u64,
    /// Which tokens are routed at all: u8 `[num_tokens]`, contiguous; 0 is no.
    pub mask: Option<TensorRef<'a>>,
    /// Which tokens take the experts that `unmapped_topk_idx` holds: u8 `[num_tokens]`, contiguous; 0 is no.
    pub fix_routing_mask: Option<TensorRef<'a>>,
    /// Replicas of experts.
    pub physical_map: Option<PhysicalMap<'a>>,
    /// Logical experts, written, and read where routing is fixed: i64 `[num_tokens, num_topk]`, rows with any stride.
    pub unmapped_topk_idx: Option<TensorMut<'a>>,
    /// i64 `[num_tokens, num_topk + num_shared_experts]`, contiguous.
    pub topk_idx: TensorMut<'a>,
    /// f32 `[num_tokens, num_topk + num_shared_experts]`, contiguous.
    pub topk_weights: TensorMut<'a>,
}

impl<'a> Args<'a> {
    /// Without anything that may be left out: no groups, no shared expert, one rank, all tokens routed by their logits, weights that add up
    /// to 1.
    pub fn new(
        scoring_func: ScoringFunc,
        logits: TensorRef<'a>,
        bias: TensorRef<'a>,
        topk_idx: TensorMut<'a>,
        topk_weights: TensorMut<'a>,
    ) -> Self {
        Self {
            logits,
            bias,
            scoring_func,
            num_groups: 0,
            num_topk_groups: 0,
            num_shared_experts: 0,
            routed_scaling_factor: 1.0,
            ep_rank: 0,
            num_ep_ranks: 1,
            tp_rank: 0,
            num_tp_ranks: 1,
            mask: None,
            fix_routing_mask: None,
            physical_map: None,
            unmapped_topk_idx: None,
            topk_idx,
            topk_weights,
        }
    }
}

/// The whole gate of a mixture of experts in one launch: scores, groups, choice, weights, and where the chosen experts are. Asynchronous on
/// `stream`; allocates nothing.
///
/// | tensor | shape | dtype | layout |
/// |---|---|---|---|
/// | `logits` | `[num_tokens, num_experts]` | f32 | contiguous |
/// | `bias` | `[num_experts]` | f32 | contiguous |
/// | `mask`, `fix_routing_mask` | `[num_tokens]` | u8, not 0 is true | contiguous |
/// | `to_physical_map` | `[num_experts + num_shared_experts, columns]` | i32 | contiguous |
/// | `logical_count` | `[num_experts + num_shared_experts]` | i32 | contiguous |
/// | `unmapped_topk_idx` | `[num_tokens, num_topk]` | i64 | any row stride |
/// | `topk_idx` | `[num_tokens, num_topk + num_shared_experts]` | i64 | contiguous |
/// | `topk_weights` | `[num_tokens, num_topk + num_shared_experts]` | f32 | contiguous |
///
/// For each token `t`, with `x` its logits:
///
/// 1. If `mask` is given and false, `topk_idx` and `unmapped_topk_idx` are -1, `topk_weights` is 0, and that is all.
/// 2. Scores `s` are as [`ScoringFunc`] says. Experts are ranked by `s + bias`, of softmax by `x + bias`, rounded to f32.
/// 3. With groups, only the experts of the `num_topk_groups` groups are left whose two best ranking values have the largest sum (rounded
///    to f32); of equal sums the smaller group counts.
/// 4. The `num_topk` best experts are chosen, the best one first; of equal ones the smaller index comes first, and -0.0 equals +0.0. If
///    `fix_routing_mask` is true, they are those of `unmapped_topk_idx` instead, in any number of repetitions.
/// 5. Weights are `s[j] / D * routed_scaling_factor` with `D = ((1e-20 + s[first]) + s[second]) + ...` over the chosen experts.
/// 6. Shared experts follow, with the logical indices `num_experts`, `num_experts + 1` and so on, and the weight 1.
/// 7. With `physical_map`, index `j` becomes `to_physical_map[j, (ep_rank + t * 23333) % logical_count[j]]`, in arithmetic that does not
///    overflow.
/// 8. With `R = (num_experts + columns - 1) / num_ep_ranks` (rounded down; `columns` is 1 without a map) index `j` is on rank `r = j / R`. If
///    `r % num_tp_ranks` is `tp_rank`, it becomes `r / num_tp_ranks * R + j % R`, else -1. Its weight stays.
///
/// Scores are within 3 units of the last place; those of softmax have a relative error of at most `(20 + max(x) - x) * 2^-24` for
/// up to 1024 experts, because `x - max(x)`
/// is rounded. Both backends give the same bits. Logits and bias should be finite.
/// NaN is never chosen: a slot without expert has the index -1 and the weight 0. A logit of -inf counts as the smallest number; one of +inf
/// makes NaN of sqrtsoftplus and softmax. A fixed expert outside `0..num_experts` counts as none; the checked emulator reports it unless
/// it is negative. A `logical_count` outside `1..=columns` counts as 1 and is reported likewise.
///
/// Logits and bias at multiples of 16 bytes with `num_experts % 4 == 0` are faster. (Facts: moe.md, section 4.)
///
/// ```
/// use ferrotile::moe::top2_sum_gate::{Args, ScoringFunc, top2_sum_gate};
///
/// let device = ferrotile::Device::emulator();
/// let logits = device.upload(&[2.0f32, -9.0, 1.0, 1.5])?;
/// let bias = device.zeros::<f32>(4)?;
/// let (mut topk_idx, mut topk_weights) = (device.alloc::<i64>(2)?, device.alloc::<f32>(2)?);
/// let args = Args {
///     // Of {2, -9} and {1, 1.5} the second one has the larger sum.
///     num_groups: 2,
///     num_topk_groups: 1,
///     ..Args::new(
///         ScoringFunc::Softmax,
///         logits.tensor(&[1, 4])?,
///         bias.tensor(&[4])?,
///         topk_idx.tensor_mut(&[1, 2])?,
///         topk_weights.tensor_mut(&[1, 2])?,
///     )
/// };
/// top2_sum_gate(&device.stream()?, args)?;
/// assert_eq!(topk_idx.to_vec()?, [3, 2]);
/// let expected = 1.5f32.exp() / (1.5f32.exp() + 1f32.exp());
/// assert!((topk_weights.to_vec()?[0] - expected).abs() < 1e-6);
/// # Ok::<(), ferrotile::Error>(())
/// ```
///
/// # Errors
/// [`Error::Shape`], [`Error::DType`], [`Error::Layout`] when a tensor is not as in the table; [`Error::Value`] for more than 16384 experts; no
/// or more than 32 choices with the shared experts, or more than the experts (of the kept groups); more than 32 groups, more kept
/// than there are, groups that do not divide the experts or have fewer than two; shared experts without a map of more columns than
/// that; more than 65536 columns; ranks that are not below their number, or more expert-parallel ranks than physical experts;
/// `fix_routing_mask` without `unmapped_topk_idx`; and more than 2^31 - 1 tokens. [`Error::Overlap`], [`Error::DeviceMismatch`],
/// [`Error::Driver`]. The outputs are untouched then.
pub fn top2_sum_gate(stream: &Stream, args: Args<'_>) -> Result<()> {
    let sizes = check_args(stream, &args)?;
    let (t, e) = (sizes.t, sizes.e);
    if t == 0 {
        return Ok(());
    }
    let config = kernels::config(t, e);
    let flags = |tensor: &Option<TensorRef<'_>>| tensor.as_ref().map_or(In::null(), |tensor| tensor.input::<u8>());
    let (map, count) = match &args.physical_map {
        Some(map) => (Some(&map.to_physical_map), Some(&map.logical_count)),
        None => (None, None),
    };
    let ints = |tensor: Option<&TensorRef<'_>>| tensor.map_or(In::null(), |tensor| tensor.input::<i32>());
    let lines = |tensor: Option<&TensorRef<'_>>| tensor.map_or(0, |tensor| tensor.span_bytes().div_ceil(128));
    let (map_lines, count_lines) = (lines(map), lines(count));
    // A few a thread take no longer than the loads that they are beside.
    let ahead = map_lines + count_lines <= 16 * config.num_blocks() * u64::from(config.threads);
    let aligned = args.logits.ptr().is_multiple_of(16) && args.bias.ptr().is_multiple_of(16) && e.is_multiple_of(4);
    let mut has = 0;
    for (bit, given) in [
        (kernels::ALIGNED, aligned),
        (kernels::MASK, args.mask.is_some()),
        (kernels::FIXED, args.fix_routing_mask.is_some()),
        (kernels::UNMAPPED, args.unmapped_topk_idx.is_some()),
        (kernels::PHYSICAL, map.is_some()),
    ] {
        has |= if given { bit } else { 0 };
    }
    let (by_rank, by_ranks) = (Divisor::new(sizes.rank_experts), Divisor::new(args.num_tp_ranks as u32));
    let values = gate::Args {
        logits: args.logits.input(),
        bias: args.bias.input(),
        mask: flags(&args.mask),
        fixed: flags(&args.fix_routing_mask),
        map: ints(map),
        logical_count: ints(count),
        unmapped: args.unmapped_topk_idx.as_ref().map_or(Out::null(), |tensor| tensor.output()),
        idx: args.topk_idx.output(),
        weights: args.topk_weights.output(),
        unmapped_stride: args.unmapped_topk_idx.as_ref().map_or(0, |tensor| tensor.stride(0)),
        t,
        e,
        k: sizes.k,
        s: args.num_shared_experts as u32,
        has,
        scaling: args.routed_scaling_factor,
        groups: sizes.groups,
        kept: args.num_topk_groups as u32,
        of_group: e.checked_div(sizes.groups).unwrap_or(0),
        log_lanes: log_lanes(sizes.groups.max(1)),
        columns: sizes.columns,
        map_lines: if ahead { map_lines as u32 } else { 0 },
        count_lines: if ahead { count_lines as u32 } else { 0 },
        ep_rank: args.ep_rank as u32,
        rank_experts: sizes.rank_experts,
        rank_magic: by_rank.magic,
        rank_shift: by_rank.shift,
        tp_rank: args.tp_rank as u32,
        tp_ranks: args.num_tp_ranks as u32,
        tp_magic: by_ranks.magic,
        tp_shift: by_ranks.shift,
    };
    stream.launch(OP, entry(args.scoring_func), &config, &values)
}

fn entry(scoring_func: ScoringFunc) -> &'static Entry<gate::Args> {
    match scoring_func {
        ScoringFunc::Sigmoid => &gate::sigmoid,
        ScoringFunc::SqrtSoftplus => &gate::sqrtsoftplus,
        ScoringFunc::Softmax => &gate::softmax,
    }
}

/// What the kernel counts with.
struct Sizes {
    t: u32,
    e: u32,
    k: u32,
    /// 0 if all groups are kept.
    groups: u32,
    /// Of the map, 0 without.
    columns: u32,
    /// Physical experts of a rank.
    rank_experts: u32,
}

fn check_args(stream: &Stream, args: &Args<'_>) -> Result<Sizes> {
    /// Blocks are counted in 31 bits, and so are ranks.
    const MOST: u64 = i32::MAX as u64;
    let (logits, idx, weights) = (&args.logits, &args.topk_idx, &args.topk_weights);
    check::rank(OP, "logits", logits, 2)?;
    check::rank(OP, "topk_idx", idx, 2)?;
    let (t, e, slots, shared) = (logits.dim(0), logits.dim(1), idx.dim(1), args.num_shared_experts);
    check::in_range(OP, "num_tokens", t, 0, MOST)?;
    check::in_range(OP, "num_experts", e, 1, MAX_EXPERTS)?;
    check::in_range(OP, "num_shared_experts", shared, 0, MAX_TOPK - 1)?;
    check::in_range(OP, "num_topk + num_shared_experts", slots, shared + 1, MAX_TOPK)?;
    let k = slots - shared;

    let (groups, kept) = (args.num_groups, args.num_topk_groups);
    check::in_range(OP, "num_groups", groups, 0, MAX_GROUPS)?;
    check::in_range(OP, "num_topk_groups", kept, groups.min(1), groups)?;
    let mut candidates = e;
    if groups > 0 {
        check::divisible(OP, "num_experts", e, groups)?;
        if kept < groups {
            check::in_range(OP, "num_experts / num_groups", e / groups, 2, e)?;
            candidates = e / groups * kept;
        }
    }
    check::in_range(OP, "num_topk", k, 1, candidates)?;

    let map = args.physical_map.as_ref();
    let columns = map.map_or(0, |map| map.to_physical_map.dim(1));
    if map.is_some() {
        check::in_range(OP, "columns of to_physical_map", columns, shared + 1, MAX_COLUMNS.into())?;
    } else {
        check::in_range(OP, "num_shared_experts without physical_map", shared, 0, 0)?;
    }
    let physical = e + columns.saturating_sub(1);
    check::in_range(OP, "num_ep_ranks", args.num_ep_ranks, 1, physical)?;
    check::in_range(OP, "ep_rank", args.ep_rank, 0, args.num_ep_ranks - 1)?;
    check::in_range(OP, "num_tp_ranks", args.num_tp_ranks, 1, MOST)?;
    check::in_range(OP, "tp_rank", args.tp_rank, 0, args.num_tp_ranks - 1)?;

    check::whole(OP, "logits", logits, DType::F32, &[t, e])?;
    check::whole(OP, "bias", &args.bias, DType::F32, &[e])?;
    check::whole(OP, "topk_idx", idx, DType::I64, &[t, slots])?;
    check::whole(OP, "topk_weights", weights, DType::F32, &[t, slots])?;
    // Absent ones are stood in for by the logits, which are checked anyway.
    let mut inputs: [(&'static str, &View); 6] = [("logits", logits); 6];
    inputs[1] = ("bias", &args.bias);
    for (i, (name, tensor, dtype, shape)) in [
        ("mask", args.mask.as_ref(), DType::U8, &[t][..]),
        ("fix_routing_mask", args.fix_routing_mask.as_ref(), DType::U8, &[t]),
        ("to_physical_map", map.map(|map| &map.to_physical_map), DType::I32, &[e + shared, columns]),
        ("logical_count", map.map(|map| &map.logical_count), DType::I32, &[e + shared]),
    ]
    .into_iter()
    .enumerate()
    {
        if let Some(tensor) = tensor {
            check::whole(OP, name, tensor, dtype, shape)?;
            inputs[2 + i] = (name, tensor);
        }
    }
    let outputs: [(&'static str, &View); 3] = match &args.unmapped_topk_idx {
        Some(unmapped) => {
            check::dtype(OP, "unmapped_topk_idx", unmapped, &[DType::I64])?;
            check::shape(OP, "unmapped_topk_idx", unmapped, &[t, k])?;
            check::last_stride_1(OP, "unmapped_topk_idx", unmapped)?;
            [("topk_idx", idx), ("topk_weights", weights), ("unmapped_topk_idx", unmapped)]
        }
        None if args.fix_routing_mask.is_some() => {
            let allowed = "None without unmapped_topk_idx".into();
            return Err(Error::Value { op: OP, arg: "fix_routing_mask", allowed, got: "a tensor".into() });
        }
        // The last one only fills the array.
        None => [("topk_idx", idx), ("topk_weights", weights), ("topk_weights", weights)],
    };
    let num_outputs = 2 + args.unmapped_topk_idx.is_some() as usize;
    check::same_device(OP, stream, &inputs)?;
    check::same_device(OP, stream, &outputs)?;
    check::no_overlaps(OP, &inputs, &outputs[..num_outputs])?;
    Ok(Sizes {
        t: t as u32,
        e: e as u32,
        k: k as u32,
        groups: if kept < groups { groups as u32 } else { 0 },
        columns: columns as u32,
        rank_experts: (physical / args.num_ep_ranks) as u32,
    })
}
