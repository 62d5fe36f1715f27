//! What `group_count` and `aux_fi` share: both count how often each index occurs.

use crate::{DType, Error, Result, Stream, View, check};
use ferrotile_kernels::moe::group_count as kernels;

/// Most groups or experts.
pub const MAX_BINS: u64 = kernels::MAX_BINS as u64;

/// Most indices: counts are i32.
const MAX_LEN: u64 = i32::MAX as u64;

/// Bytes of workspace for `rows * columns` indices and this many bins; 0 for numbers that are refused.
pub fn workspace_bytes(rows: u64, columns: u64, bins: u64) -> u64 {
    match (rows.checked_mul(columns), bins) {
        (Some(n @ ..=MAX_LEN), 1..=MAX_BINS) => 8 * kernels::workspace_words(n as u32, bins as u32) as u64,
        _ => 0,
    }
}

/// The tensors of a call. The output has one element per bin.
pub struct Tensors<'a> {
    /// Name and tensor of the indices.
    pub indices: (&'static str, &'a View),
    /// The workspace.
    pub workspace: &'a View,
    /// Name, tensor and dtype of the output.
    pub out: (&'static str, &'a View, DType),
    /// What the bins are called.
    pub num_bins: &'static str,
}

/// What the kernels count with.
pub struct Sizes {
    /// Number of indices.
    pub n: u32,
    /// Number of bins.
    pub bins: u32,
}

/// The sizes, if everything is right.
pub fn check(op: &'static str, stream: &Stream, tensors: &Tensors<'_>) -> Result<Sizes> {
    let (name, indices) = tensors.indices;
    check::rank(op, name, indices, 2)?;
    check::dtype(op, name, indices, &[DType::I64])?;
    check::contiguous(op, name, indices)?;
    let (out_name, out, out_dtype) = tensors.out;
    check::rank(op, out_name, out, 1)?;
    check::dtype(op, out_name, out, &[out_dtype])?;
    check::contiguous(op, out_name, out)?;
    let (rows, columns, bins) = (indices.dim(0), indices.dim(1), out.dim(0));
    let n = rows.saturating_mul(columns);
    check::in_range(op, "num_tokens * num_topk", n, 0, MAX_LEN)?;
    check::in_range(op, tensors.num_bins, bins, 0, MAX_BINS)?;

    let workspace = tensors.workspace;
    check::rank(op, "workspace", workspace, 1)?;
    check::dtype(op, "workspace", workspace, &[DType::U8])?;
    check::contiguous(op, "workspace", workspace)?;
    check::aligned(op, "workspace", workspace, 8)?;
    let bytes = workspace_bytes(rows, columns, bins);
    if workspace.dim(0) < bytes {
        let (expected, got) = (format!("at least [{bytes}]"), format!("{:?}", workspace.shape()));
        return Err(Error::Shape { op, arg: "workspace", expected, got });
    }

    let all = [(name, indices), (out_name, out), ("workspace", workspace)];
    check::same_device(op, stream, &all)?;
    check::no_overlaps(op, &all[..1], &all[1..])?;
    Ok(Sizes { n: n as u32, bins: bins as u32 })
}
