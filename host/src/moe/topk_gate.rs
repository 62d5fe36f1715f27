//! topk_gate: the experts with the largest scores of each token.

use crate::{DType, Result, Stream, TensorMut, TensorRef, check};
use ferrotile_kernels::entry::Entry;
use ferrotile_kernels::moe::topk_gate as kernels;
use kernels::gate;

const OP: &str = "topk_gate";

/// Most experts a token may choose.
pub const MAX_TOPK: u64 = kernels::MAX_TOPK as u64;

/// Arguments of [`topk_gate`].
pub struct Args<'a> {
    /// Scores, f32 `[num_tokens, num_experts]`; rows with any stride, last dimension with stride 1.
    pub scores: TensorRef<'a>,
    /// Chosen experts, i64 `[num_tokens, num_topk]`, contiguous; must not overlap `scores`.
    pub topk_idx: TensorMut<'a>,
}

/// For each token the `num_topk` experts with the largest scores, largest first. Asynchronous on `stream`; allocates nothing.
///
/// | tensor | shape | dtype | layout |
/// |---|---|---|---|
/// | `scores` | `[num_tokens, num_experts]` | f32 | any row stride and alignment |
/// | `topk_idx` | `[num_tokens, num_topk]` | i64 | contiguous |
///
/// The result is that of a stable sort in descending order: of equal scores the smaller index comes first, and `-0.0` equals `+0.0`.
/// Infinities are numbers like others. NaN comes after everything else, so it is chosen only where a row has fewer than `num_topk`
/// numbers. No expert is chosen twice. Every `num_topk` up to 32 and up to `num_experts` is allowed, and every `num_experts` below
/// 2^31; the fast path takes up to 1024 experts, and rows whose candidates do not fit a warp (more than about 24 equal scores at the
/// threshold, or `num_topk` beyond about 20) take a slower one. (Facts: moe.md, section 2.)
///
/// ```
/// use ferrotile::moe::topk_gate::{Args, topk_gate};
///
/// let device = ferrotile::Device::emulator();
/// let scores = device.upload(&[0.1f32, 0.7, 0.2, 0.7])?;
/// let mut idx = device.alloc::<i64>(3)?;
/// let args = Args { scores: scores.tensor(&[1, 4])?, topk_idx: idx.tensor_mut(&[1, 3])? };
/// topk_gate(&device.stream()?, args)?;
/// assert_eq!(idx.to_vec()?, [1, 3, 2]);
/// # Ok::<(), ferrotile::Error>(())
/// ```
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape), [`Error::DType`](crate::Error::DType), [`Error::Layout`](crate::Error::Layout) when a tensor
/// is not as in the table; [`Error::Value`](crate::Error::Value) for `num_topk` above 32 or above `num_experts`, and for sizes beyond
/// 32 bits; [`Error::Overlap`](crate::Error::Overlap), [`Error::DeviceMismatch`](crate::Error::DeviceMismatch),
/// [`Error::Driver`](crate::Error::Driver).
pub fn topk_gate(stream: &Stream, args: Args<'_>) -> Result<()> {
    let sizes = check_args(stream, &args)?;
    if args.topk_idx.is_empty() {
        return Ok(());
    }
    let (ptr, row_stride) = (args.scores.ptr(), args.scores.stride(0));
    // Every row starts at a multiple of 16 bytes and ends with a whole vector.
    let aligned = ptr.is_multiple_of(16) && (sizes.t == 1 || row_stride.is_multiple_of(4)) && sizes.e.is_multiple_of(4);
    let values =
        gate::Args { scores: args.scores.input(), idx: args.topk_idx.output(), t: sizes.t, e: sizes.e, k: sizes.k, row_stride };
    stream.launch(OP, entry(sizes.e, aligned), &kernels::config(sizes.t), &values)
}

/// The kernel that holds rows of `e` experts in registers, or the one for longer rows.
fn entry(e: u32, vectors: bool) -> &'static Entry<gate::Args> {
    if vectors {
        return match e.div_ceil(128) {
            0 | 1 => &gate::r1v4,
            2 => &gate::r2v4,
            3 => &gate::r3v4,
            4 => &gate::r4v4,
            5..=8 => &gate::r8v4,
            _ => &gate::any,
        };
    }
    match e.div_ceil(32) {
        0 | 1 => &gate::r1,
        2 => &gate::r2,
        3 => &gate::r3,
        4 => &gate::r4,
        5..=6 => &gate::r6,
        7..=8 => &gate::r8,
        9..=12 => &gate::r12,
        13..=16 => &gate::r16,
        17..=32 => &gate::r32,
        _ => &gate::any,
    }
}

/// What the kernel counts with.
struct Sizes {
    t: u32,
    e: u32,
    k: u32,
}

fn check_args(stream: &Stream, args: &Args<'_>) -> Result<Sizes> {
    let (scores, idx) = (&args.scores, &args.topk_idx);
    check::rank(OP, "scores", scores, 2)?;
    check::dtype(OP, "scores", scores, &[DType::F32])?;
    check::last_stride_1(OP, "scores", scores)?;
    check::rank(OP, "topk_idx", idx, 2)?;
    check::whole(OP, "topk_idx", idx, DType::I64, &[scores.dim(0), idx.dim(1)])?;
    check::in_range(OP, "num_experts", scores.dim(1), 0, i32::MAX as u64)?;
    check::in_range(OP, "num_topk", idx.dim(1), 0, MAX_TOPK.min(scores.dim(1)))?;
    check::same_device(OP, stream, &[("scores", scores), ("topk_idx", idx)])?;
    check::no_overlap(OP, ("scores", scores), ("topk_idx", idx))?;
    Ok(Sizes {
        t: check::fits_u32(OP, "num_tokens", scores.dim(0))?,
        e: check::fits_u32(OP, "num_experts", scores.dim(1))?,
        k: check::fits_u32(OP, "num_topk", idx.dim(1))?,
    })
}
