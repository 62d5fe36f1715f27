//! aux_fi: how much of the routing each expert gets, for the load-balancing loss.

use super::common_count::{self, Tensors};
use crate::{DType, Result, Stream, TensorMut, TensorRef, check};
use ferrotile_kernels::moe::aux_fi as kernels;
use kernels::fi;

const OP: &str = "aux_fi";

/// Most experts.
pub const MAX_EXPERTS: u64 = common_count::MAX_BINS;

/// Arguments of [`aux_fi`]. No two tensors may overlap.
pub struct Args<'a> {
    /// Expert of each choice, i64 `[num_tokens, num_topk]`, contiguous; -1 for none.
    pub topk_idx: TensorRef<'a>,
    /// By how many choices of a token the loss divides, at least 1; often `num_topk`.
    pub num_aux_topk: u32,
    /// The load of each expert, f32 `[num_experts]`, contiguous.
    pub f: TensorMut<'a>,
    /// Where the blocks add up their counts: u8 `[n]` with `n` at least [`workspace_bytes`], contiguous, 8-byte aligned. Zeroed once, when
    /// it is made (`device.zeros::<u8>(bytes)`); every call leaves it zero, so it serves calls of any shape for which it is large
    /// enough, of this op and of [`group_count`](super::group_count()). Calls that may run at the same time need one each.
    pub workspace: TensorMut<'a>,
}

/// Bytes of workspace that [`aux_fi`] needs, at most 256 KiB; more tokens never need less. 0 for few tokens, which a single block counts,
/// and for arguments that are refused.
pub fn workspace_bytes(num_tokens: u64, num_topk: u64, num_experts: u64) -> u64 {
    common_count::workspace_bytes(num_tokens, num_topk, num_experts)
}

/// The factor `f` of the load-balancing loss: `f[e] = count[e] * num_experts / (num_tokens * num_aux_topk)` with the number of entries of
/// `topk_idx` that are `e`. Asynchronous on `stream`; allocates nothing; one launch, and `f` need not be zero before.
///
/// | tensor | shape | dtype | layout |
/// |---|---|---|---|
/// | `topk_idx` | `[num_tokens, num_topk]` | i64 | contiguous |
/// | `f` | `[num_experts]` | f32 | contiguous |
///
/// Choices are counted as integers. Count, `num_experts` and the denominator are rounded to f32 each, then the product, then the quotient:
/// the same bits whatever the order of the blocks. An expert that nobody chose has 0, so all have 0 where there are no tokens.
///
/// Negative entries are not counted. Entries must be below `num_experts`: one that is not is reported by the checked emulator, and
/// counted nowhere on a GPU. There may be up to 32768 experts and 2^31 - 1 entries. (Facts: moe.md, section 7.)
///
/// ```
/// use ferrotile::moe::aux_fi::{Args, aux_fi, workspace_bytes};
///
/// let device = ferrotile::Device::emulator();
/// let topk_idx = device.upload(&[1i64, -1, 0, 1])?;
/// let mut f = device.alloc::<f32>(3)?;
/// let bytes = workspace_bytes(2, 2, 3);
/// let mut workspace = device.zeros::<u8>(bytes as usize)?;
/// let args = Args {
///     topk_idx: topk_idx.tensor(&[2, 2])?,
///     num_aux_topk: 2,
///     f: f.tensor_mut(&[3])?,
///     workspace: workspace.tensor_mut(&[bytes])?,
/// };
/// aux_fi(&device.stream()?, args)?;
/// assert_eq!(f.to_vec()?, [0.75, 1.5, 0.0]);
/// # Ok::<(), ferrotile::Error>(())
/// ```
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape), [`Error::DType`](crate::Error::DType), [`Error::Layout`](crate::Error::Layout) when a tensor
/// is not as in the table or the workspace is too small; [`Error::Value`](crate::Error::Value) for a `num_aux_topk` of 0, and for more
/// than 32768 experts or 2^31 - 1 entries; [`Error::Overlap`](crate::Error::Overlap),
/// [`Error::DeviceMismatch`](crate::Error::DeviceMismatch), [`Error::Driver`](crate::Error::Driver).
pub fn aux_fi(stream: &Stream, args: Args<'_>) -> Result<()> {
    let tensors = Tensors {
        indices: ("topk_idx", &args.topk_idx),
        workspace: &args.workspace,
        out: ("f", &args.f, DType::F32),
        num_bins: "num_experts",
    };
    let sizes = common_count::check(OP, stream, &tensors)?;
    check::in_range(OP, "num_aux_topk", args.num_aux_topk.into(), 1, u32::MAX.into())?;
    if sizes.bins == 0 {
        return Ok(());
    }
    let num_blocks = kernels::num_blocks(sizes.n, sizes.bins, stream.device().num_sms());
    let values = fi::Args {
        topk_idx: args.topk_idx.input(),
        workspace: args.workspace.output(),
        f: args.f.output(),
        n: sizes.n,
        e: sizes.bins,
        // Rounded once, from 64 bits or more: a tensor without entries may have any number of rows.
        denominator: (u128::from(args.topk_idx.dim(0)) * u128::from(args.num_aux_topk)) as f32,
    };
    stream.launch(OP, &fi::ENTRY, &kernels::config(num_blocks, sizes.bins), &values)
}
