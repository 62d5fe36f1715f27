//! topk_sum_and_topk_group_idx: the groups of experts with the best experts.

use crate::{DType, Error, Result, Stream, TensorMut, TensorRef, View, check};
use ferrotile_kernels::moe::topk_sum_and_topk_group_idx as kernels;
use kernels::select;

const OP: &str = "topk_sum_and_topk_group_idx";

/// Most groups of experts.
pub const MAX_GROUPS: u64 = kernels::MAX_GROUPS as u64;

/// Arguments of [`topk_sum_and_topk_group_idx`].
pub struct Args<'a> {
    /// Scores, f32 `[num_tokens, num_groups, experts_per_group]`; tokens with any stride, the rest of a token contiguous.
    pub scores: TensorRef<'a>,
    /// How many of a group's best scores are added, 1 or 2, at most `experts_per_group`.
    pub num_topk_sum: u32,
    /// Chosen groups, i64 `[num_tokens, num_topk_groups]`, contiguous; must not overlap `scores`.
    pub topk_group_idx: TensorMut<'a>,
}

/// For each token the `num_topk_groups` groups of experts whose `num_topk_sum` best scores have the largest sum, largest first. Asynchronous
/// on `stream`; allocates nothing.
///
/// | tensor | shape | dtype | layout |
/// |---|---|---|---|
/// | `scores` | `[num_tokens, num_groups, experts_per_group]` | f32 | any stride of tokens, any alignment |
/// | `topk_group_idx` | `[num_tokens, num_topk_groups]` | i64 | contiguous |
///
/// A score that occurs twice counts twice. Of equal sums the group with the smaller index comes first, and `-0.0` equals `+0.0`. Infinities are
/// numbers like others; a NaN score counts as -inf, and a group whose sum is NaN (of +inf and -inf) comes after all others. No group is
/// chosen twice. There may be up to 32 groups. (Facts: moe.md, section 3.)
///
/// ```
/// use ferrotile::moe::topk_sum_and_topk_group_idx::{Args, topk_sum_and_topk_group_idx};
///
/// let device = ferrotile::Device::emulator();
/// let scores = device.upload(&[0.9f32, 0.0, 0.5, 0.6, 0.5, 0.5])?;
/// let mut idx = device.alloc::<i64>(2)?;
/// let args = Args { scores: scores.tensor(&[1, 3, 2])?, num_topk_sum: 2, topk_group_idx: idx.tensor_mut(&[1, 2])? };
/// topk_sum_and_topk_group_idx(&device.stream()?, args)?;
/// assert_eq!(idx.to_vec()?, [1, 2]);
/// # Ok::<(), ferrotile::Error>(())
/// ```
///
/// # Errors
/// [`Error::Shape`], [`Error::DType`], [`Error::Layout`] when a tensor
/// is not as in the table; [`Error::Value`] for a `num_topk_sum` that is not 1 or 2 or above `experts_per_group`, for
/// `num_topk_groups` above `num_groups`, for more than 32 groups, and for sizes beyond 32 bits; [`Error::Overlap`],
/// [`Error::DeviceMismatch`], [`Error::Driver`].
pub fn topk_sum_and_topk_group_idx(stream: &Stream, args: Args<'_>) -> Result<()> {
    let sizes = check_args(stream, &args)?;
    if args.topk_group_idx.is_empty() {
        return Ok(());
    }
    let (ptr, row_stride) = (args.scores.ptr(), args.scores.stride(0));
    // Every group starts at such a multiple, and is whole vectors.
    let vectors = |v: u64| {
        ptr.is_multiple_of(4 * v) && (sizes.t == 1 || row_stride.is_multiple_of(v)) && u64::from(sizes.of_group).is_multiple_of(v)
    };
    let entry = match (args.num_topk_sum, vectors(4), vectors(2)) {
        (1, true, _) => &select::best_v4,
        (1, false, true) => &select::best_v2,
        (1, false, false) => &select::best_v1,
        (_, true, _) => &select::two_v4,
        (_, false, true) => &select::two_v2,
        (_, false, false) => &select::two_v1,
    };
    let values = select::Args {
        scores: args.scores.input(),
        idx: args.topk_group_idx.output(),
        t: sizes.t,
        groups: sizes.groups,
        of_group: sizes.of_group,
        k: sizes.k,
        log_lanes: kernels::log_lanes(sizes.groups),
        row_stride,
    };
    stream.launch(OP, entry, &kernels::config(sizes.t), &values)
}

/// What the kernels count with.
struct Sizes {
    t: u32,
    groups: u32,
    of_group: u32,
    k: u32,
}

fn check_args(stream: &Stream, args: &Args<'_>) -> Result<Sizes> {
    let (scores, idx) = (&args.scores, &args.topk_group_idx);
    check::rank(OP, "scores", scores, 3)?;
    check::dtype(OP, "scores", scores, &[DType::F32])?;
    check_tokens(scores)?;
    check::rank(OP, "topk_group_idx", idx, 2)?;
    check::whole(OP, "topk_group_idx", idx, DType::I64, &[scores.dim(0), idx.dim(1)])?;
    let (groups, of_group, k) = (scores.dim(1), scores.dim(2), idx.dim(1));
    check::in_range(OP, "num_groups", groups, 0, MAX_GROUPS)?;
    check::in_range(OP, "experts_per_group", of_group, 0, i32::MAX as u64)?;
    check::in_range(OP, "num_topk_groups", k, 0, groups)?;
    // A token has no group without experts to choose.
    check::in_range(OP, "num_topk_sum", args.num_topk_sum.into(), 1, of_group.min(2))?;
    check::same_device(OP, stream, &[("scores", scores), ("topk_group_idx", idx)])?;
    check::no_overlap(OP, ("scores", scores), ("topk_group_idx", idx))?;
    Ok(Sizes {
        t: check::fits_u32(OP, "num_tokens", scores.dim(0))?,
        groups: groups as u32,
        of_group: of_group as u32,
        k: k as u32,
    })
}

/// The scores of a token lie one after the other.
fn check_tokens(scores: &View) -> Result<()> {
    check::last_stride_1(OP, "scores", scores)?;
    if scores.is_empty() || scores.dim(1) == 1 || scores.stride(1) == scores.dim(2) {
        return Ok(());
    }
    let got = format!("shape {:?} with strides {:?}", scores.shape(), scores.strides());
    Err(Error::Layout { op: OP, arg: "scores", expected: "groups of a token one after the other".to_owned(), got })
}
