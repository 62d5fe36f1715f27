//! group_count: how many choices name each group.

use super::common_count::{self, Tensors};
use crate::{DType, Result, Stream, TensorMut, TensorRef};
use ferrotile_kernels::moe::group_count as kernels;
use kernels::count;

const OP: &str = "group_count";

/// Most groups.
pub const MAX_GROUPS: u64 = common_count::MAX_BINS;

/// Arguments of [`group_count`]. No two tensors may overlap.
pub struct Args<'a> {
    /// Group (or expert) of each choice, i64 `[num_tokens, num_topk]`, contiguous; -1 for none.
    pub group_idx: TensorRef<'a>,
    /// How often each group occurs, i32 `[num_groups]`, contiguous.
    pub count: TensorMut<'a>,
    /// Where the blocks add up their counts: u8 `[n]` with `n` at least [`workspace_bytes`], contiguous, 8-byte aligned. Zeroed once, when
    /// it is made (`device.zeros::<u8>(bytes)`); every call leaves it zero, so it serves calls of any shape for which it is large
    /// enough, of this op and of [`aux_fi`](super::aux_fi()). Calls that may run at the same time need one each.
    pub workspace: TensorMut<'a>,
}

/// Bytes of workspace that [`group_count`] needs, at most 256 KiB; more tokens never need less. 0 for few tokens, which a single block
/// counts, and for arguments that are refused.
pub fn workspace_bytes(num_tokens: u64, num_topk: u64, num_groups: u64) -> u64 {
    common_count::workspace_bytes(num_tokens, num_topk, num_groups)
}

/// Histogram of group or expert indices: `count[g]` is the number of entries of `group_idx` that are `g`. Asynchronous on `stream`;
/// allocates nothing; one launch, and `count` need not be zero before.
///
/// | tensor | shape | dtype | layout |
/// |---|---|---|---|
/// | `group_idx` | `[num_tokens, num_topk]` | i64 | contiguous |
/// | `count` | `[num_groups]` | i32 | contiguous |
///
/// Negative entries are not counted. Entries must be below `num_groups`: one that is not is reported by the checked emulator, and
/// counted nowhere on a GPU. There may be up to 32768 groups and 2^31 - 1 entries. No tokens are fine: all counts are 0. Integers are added,
/// so the result does not depend on the order. (Facts: moe.md, section 6.)
///
/// ```
/// use ferrotile::moe::group_count::{Args, group_count, workspace_bytes};
///
/// let device = ferrotile::Device::emulator();
/// let group_idx = device.upload(&[1i64, -1, 0, 1])?;
/// let mut count = device.alloc::<i32>(3)?;
/// let bytes = workspace_bytes(2, 2, 3);
/// let mut workspace = device.zeros::<u8>(bytes as usize)?;
/// let args = Args {
///     group_idx: group_idx.tensor(&[2, 2])?,
///     count: count.tensor_mut(&[3])?,
///     workspace: workspace.tensor_mut(&[bytes])?,
/// };
/// group_count(&device.stream()?, args)?;
/// assert_eq!(count.to_vec()?, [1, 2, 0]);
/// # Ok::<(), ferrotile::Error>(())
/// ```
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape), [`Error::DType`](crate::Error::DType), [`Error::Layout`](crate::Error::Layout) when a tensor
/// is not as in the table or the workspace is too small; [`Error::Value`](crate::Error::Value) for more than 32768 groups or 2^31 - 1
/// entries; [`Error::Overlap`](crate::Error::Overlap), [`Error::DeviceMismatch`](crate::Error::DeviceMismatch),
/// [`Error::Driver`](crate::Error::Driver).
pub fn group_count(stream: &Stream, args: Args<'_>) -> Result<()> {
    let tensors = Tensors {
        indices: ("group_idx", &args.group_idx),
        workspace: &args.workspace,
        out: ("count", &args.count, DType::I32),
        num_bins: "num_groups",
    };
    let sizes = common_count::check(OP, stream, &tensors)?;
    if sizes.bins == 0 {
        return Ok(());
    }
    let num_blocks = kernels::num_blocks(sizes.n, sizes.bins, stream.device().num_sms());
    let values = count::Args {
        group_idx: args.group_idx.input(),
        workspace: args.workspace.output(),
        count: args.count.output(),
        n: sizes.n,
        groups: sizes.bins,
    };
    stream.launch(OP, &count::ENTRY, &kernels::config(num_blocks, sizes.bins), &values)
}
