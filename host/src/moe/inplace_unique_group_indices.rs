//! inplace_unique_group_indices: each token names each group once.

use crate::{DType, Result, Stream, TensorMut, TensorRef, check};
use ferrotile_kernels::device::In;
use ferrotile_kernels::moe::inplace_unique_group_indices as kernels;
use kernels::unique;

const OP: &str = "inplace_unique_group_indices";

/// Arguments of [`inplace_unique_group_indices`].
pub struct Args<'a> {
    /// Group of each choice, i64 `[num_tokens, num_topk]`, contiguous; negative for none.
    pub group_indices: TensorMut<'a>,
    /// Number of groups, 0 to 2^31 - 1.
    pub num_groups: u64,
    /// Where to take the entries from instead: shape and dtype of `group_indices`, contiguous; must not overlap it. It is left as it is, and
    /// all of `group_indices` is written: the same as a copy first, in one launch.
    pub source: Option<TensorRef<'a>>,
}

/// In each row of `group_indices` the first mention of a group stays and later ones become -1. Asynchronous on `stream`; allocates nothing.
///
/// | tensor | shape | dtype | layout |
/// |---|---|---|---|
/// | `group_indices` | `[num_tokens, num_topk]` | i64 | contiguous |
/// | `source`, if any | `[num_tokens, num_topk]` | i64 | contiguous |
///
/// Negative entries stay as they are. Entries must be below `num_groups`: one that is not is reported by the checked emulator, and stays as it
/// is on a GPU, repeated or not. Rows of up to 32 entries, and up to 64 if their number is even and the tensors start at multiples of 16
/// bytes, take the fast path. (Facts: moe.md, section 11.)
///
/// ```
/// use ferrotile::moe::inplace_unique_group_indices::{Args, inplace_unique_group_indices};
///
/// let device = ferrotile::Device::emulator();
/// let mut groups = device.upload(&[2i64, 0, 2, -1, 3, 3, 3, 1])?;
/// let args = Args { group_indices: groups.tensor_mut(&[2, 4])?, num_groups: 4, source: None };
/// inplace_unique_group_indices(&device.stream()?, args)?;
/// assert_eq!(groups.to_vec()?, [2, 0, -1, -1, 3, -1, -1, 1]);
/// # Ok::<(), ferrotile::Error>(())
/// ```
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape), [`Error::DType`](crate::Error::DType), [`Error::Layout`](crate::Error::Layout) when a tensor
/// is not as in the table; [`Error::Value`](crate::Error::Value) for numbers beyond 2^31 - 1 (groups, entries of a row) or 2^32 - 1
/// (tokens); [`Error::Overlap`](crate::Error::Overlap), [`Error::DeviceMismatch`](crate::Error::DeviceMismatch),
/// [`Error::Driver`](crate::Error::Driver).
pub fn inplace_unique_group_indices(stream: &Stream, args: Args<'_>) -> Result<()> {
    let sizes = check_args(stream, &args)?;
    if args.group_indices.is_empty() {
        return Ok(());
    }
    let aligned = args.group_indices.ptr().is_multiple_of(16) && args.source.as_ref().is_none_or(|s| s.ptr().is_multiple_of(16));
    let plan = kernels::plan(sizes.k, aligned);
    let entry = match (plan.per_lane, args.source.is_some()) {
        (2, false) => &unique::v2,
        (1, false) => &unique::v1,
        (_, false) => &unique::any,
        (2, true) => &unique::copy_v2,
        (1, true) => &unique::copy_v1,
        (_, true) => &unique::copy_any,
    };
    let values = unique::Args {
        source: args.source.as_ref().map_or(In::null(), |s| s.input()),
        indices: args.group_indices.output(),
        t: sizes.t,
        k: sizes.k,
        groups: sizes.groups,
        lanes: plan.lanes,
        rows: plan.rows,
        reciprocal: plan.reciprocal,
    };
    stream.launch(OP, entry, &kernels::config(sizes.t, plan), &values)
}

/// What the kernels count with.
struct Sizes {
    t: u32,
    k: u32,
    groups: u32,
}

fn check_args(stream: &Stream, args: &Args<'_>) -> Result<Sizes> {
    const MOST: u64 = i32::MAX as u64;
    let indices = &args.group_indices;
    check::rank(OP, "group_indices", indices, 2)?;
    check::dtype(OP, "group_indices", indices, &[DType::I64])?;
    check::contiguous(OP, "group_indices", indices)?;
    check::in_range(OP, "num_topk", indices.dim(1), 0, MOST)?;
    check::in_range(OP, "num_groups", args.num_groups, 0, MOST)?;
    check::same_device(OP, stream, &[("group_indices", indices)])?;
    if let Some(source) = &args.source {
        check::whole(OP, "source", source, DType::I64, indices.shape())?;
        check::same_device(OP, stream, &[("source", source)])?;
        check::no_overlap(OP, ("source", source), ("group_indices", indices))?;
    }
    Ok(Sizes { t: check::fits_u32(OP, "num_tokens", indices.dim(0))?, k: indices.dim(1) as u32, groups: args.num_groups as u32 })
}
