//! mask_indices_by_tp: the experts of one tensor-parallel rank, by their index there.

use crate::{DType, Result, Stream, TensorMut, TensorRef, check};
use ferrotile_kernels::moe::mask_indices_by_tp as kernels;
use kernels::{Divisor, mask};

const OP: &str = "mask_indices_by_tp";

/// Arguments of [`mask_indices_by_tp`].
pub struct Args<'a> {
    /// Expert of each choice, i64 or i32 `[num_tokens, num_topk]`, contiguous; negative for none.
    pub indices: TensorRef<'a>,
    /// Number of experts of all ranks, 1 to 2^31 - 1.
    pub num_experts: u64,
    /// Expert-parallel ranks, 1 to `num_experts`.
    pub num_ep_ranks: u64,
    /// The tensor-parallel rank, below `num_tp_ranks`.
    pub tp_rank: u64,
    /// Tensor-parallel ranks, 1 to 2^31 - 1.
    pub num_tp_ranks: u64,
    /// The index on that rank, or -1; shape and dtype of `indices`, contiguous. Must not overlap it.
    pub out: TensorMut<'a>,
}

/// Turns global expert indices into those local to the experts of one tensor-parallel rank, and experts of other ranks into -1. Asynchronous
/// on `stream`; allocates nothing.
///
/// | tensor | shape | dtype | layout |
/// |---|---|---|---|
/// | `indices` | `[num_tokens, num_topk]` | i64, i32 | contiguous |
/// | `out` | `[num_tokens, num_topk]` | that of `indices` | contiguous |
///
/// Experts come in groups of `g = num_experts / num_ep_ranks` (rounded down), which the tensor-parallel ranks take in turn. Expert `v` of
/// group `r = v / g` belongs to rank `r % num_tp_ranks`, where its index is `r / num_tp_ranks * g + v % g`.
///
/// Negative indices become -1. Indices must be below `num_experts`: one that is not is reported by the checked emulator, and becomes -1 on a
/// GPU. Tensors that start at multiples of 16 bytes are faster. (Facts: moe.md, section 10.)
///
/// ```
/// use ferrotile::moe::mask_indices_by_tp::{Args, mask_indices_by_tp};
///
/// let device = ferrotile::Device::emulator();
/// let indices = device.upload(&[0i64, 3, 4, 7, -1, 5])?;
/// let mut out = device.alloc::<i64>(6)?;
/// // Groups {0, 1}, {2, 3}, {4, 5} and {6, 7}; rank 1 of 2 has the second and the fourth.
/// let args = Args {
///     indices: indices.tensor(&[2, 3])?,
///     num_experts: 8,
///     num_ep_ranks: 4,
///     tp_rank: 1,
///     num_tp_ranks: 2,
///     out: out.tensor_mut(&[2, 3])?,
/// };
/// mask_indices_by_tp(&device.stream()?, args)?;
/// assert_eq!(out.to_vec()?, [-1, 1, -1, 3, -1, -1]);
/// # Ok::<(), ferrotile::Error>(())
/// ```
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape), [`Error::DType`](crate::Error::DType), [`Error::Layout`](crate::Error::Layout) when a tensor
/// is not as in the table; [`Error::Value`](crate::Error::Value) for numbers that are not as in [`Args`], and for more than about 2^39
/// indices;
/// [`Error::Overlap`](crate::Error::Overlap), [`Error::DeviceMismatch`](crate::Error::DeviceMismatch),
/// [`Error::Driver`](crate::Error::Driver).
pub fn mask_indices_by_tp(stream: &Stream, args: Args<'_>) -> Result<()> {
    let sizes = check_args(stream, &args)?;
    let len = args.indices.numel();
    if len == 0 {
        return Ok(());
    }
    let aligned = args.indices.ptr().is_multiple_of(16) && args.out.ptr().is_multiple_of(16);
    let (entry, per_thread) = match (args.indices.dtype(), aligned) {
        (DType::I64, true) => (&mask::i64_v2, 2),
        (DType::I64, false) => (&mask::i64_v1, 1),
        (_, true) => (&mask::i32_v4, 4),
        (_, false) => (&mask::i32_v1, 1),
    };
    let Sizes { n, first_expert, size, period } = sizes;
    let Divisor { magic: period_magic, shift: period_shift } = Divisor::new(period);
    let (indices, out) = (args.indices.input(), args.out.output());
    let values = mask::Args { indices, out, len, n, first_expert, size, period, period_magic, period_shift };
    stream.launch(OP, entry, &kernels::config(len, per_thread), &values)
}

/// What the kernels count with.
struct Sizes {
    n: u32,
    /// Of this rank, or more than any expert.
    first_expert: u32,
    /// Experts of a group.
    size: u32,
    /// Experts of a group of each rank, or more than there are.
    period: u32,
}

fn check_args(stream: &Stream, args: &Args<'_>) -> Result<Sizes> {
    const MOST: u64 = i32::MAX as u64;
    let (indices, out) = (&args.indices, &args.out);
    check::rank(OP, "indices", indices, 2)?;
    check::dtype(OP, "indices", indices, &[DType::I64, DType::I32])?;
    check::contiguous(OP, "indices", indices)?;
    check::whole(OP, "out", out, indices.dtype(), indices.shape())?;
    check::in_range(OP, "num_tokens * num_topk", indices.numel(), 0, kernels::MAX_LEN)?;
    check::in_range(OP, "num_experts", args.num_experts, 1, MOST)?;
    check::in_range(OP, "num_ep_ranks", args.num_ep_ranks, 1, args.num_experts)?;
    check::in_range(OP, "num_tp_ranks", args.num_tp_ranks, 1, MOST)?;
    check::in_range(OP, "tp_rank", args.tp_rank, 0, args.num_tp_ranks - 1)?;
    check::same_device(OP, stream, &[("indices", indices), ("out", out)])?;
    check::no_overlap(OP, ("indices", indices), ("out", out))?;
    let size = args.num_experts / args.num_ep_ranks;
    // Products below 2^62. Experts are below `MOST`: what is more may as well be that.
    Ok(Sizes {
        n: args.num_experts as u32,
        first_expert: (args.tp_rank * size).min(MOST) as u32,
        size: size as u32,
        period: (args.num_tp_ranks * size).min(MOST) as u32,
    })
}
