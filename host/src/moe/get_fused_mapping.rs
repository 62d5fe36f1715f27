//! get_fused_mapping: which row of the expanded buffer belongs to which choice of which token.

use crate::{Buffer, DType, Error, Result, Stream, TensorMut, TensorRef, View, check};
use ferrotile_kernels::moe::get_fused_mapping as kernels;
use kernels::{Plan, mapping};
use std::collections::HashMap;

const OP: &str = "get_fused_mapping";

/// Most experts of a rank.
pub const MAX_EXPERTS: u64 = kernels::MAX_EXPERTS as u64;

/// Arguments of [`get_fused_mapping`]. No two tensors may overlap.
pub struct Args<'a> {
    /// Expert of each choice, i64 `[num_tokens, num_topk]`, contiguous; -1 for a choice that is not on this rank.
    pub topk_idx: TensorRef<'a>,
    /// Each expert's rows are a multiple of this, at least 1.
    pub alignment: u32,
    /// Expert of each row, i32 `[num_expanded_tokens]`.
    pub pos_to_expert: TensorMut<'a>,
    /// Token of each row, i32 `[num_expanded_tokens]`.
    pub pos_to_token: TensorMut<'a>,
    /// `token * num_topk + choice` of each row, i32 `[num_expanded_tokens]`.
    pub pos_to_token_topk: TensorMut<'a>,
    /// Row of each choice, i32 `[num_tokens, num_topk]`, contiguous.
    pub token_topk_to_pos: TensorMut<'a>,
    /// First row of each expert, i32 `[num_experts]`.
    pub expert_start: TensorMut<'a>,
    /// Row after the last one of each expert, padding included, i32 `[num_experts]`.
    pub expert_end: TensorMut<'a>,
    /// Rows of each expert, padding included, i32 `[num_experts]`.
    pub num_tokens_per_expert: TensorMut<'a>,
    /// Where the multiprocessors tell each other what they counted: u8 `[n]` with `n` at least [`workspace_bytes`], contiguous,
    /// 8-byte aligned. Zeroed once, when it is made (`device.zeros::<u8>(bytes)`); every call leaves it ready for the next one, of
    /// any shape for which it is large enough. Calls that may run at the same time need one each, else they may never end.
    pub workspace: TensorMut<'a>,
}

/// Bytes of workspace that [`get_fused_mapping`] needs, at most 256 KiB and a word; more tokens never need less. 0 for arguments that
/// it refuses.
pub fn workspace_bytes(num_tokens: u64, num_topk: u64, num_experts: u64) -> u64 {
    match (num_tokens.checked_mul(num_topk), num_experts) {
        (Some(n), 1..=MAX_EXPERTS) if n <= i32::MAX as u64 => 8 * kernels::workspace_words(n as u32, num_experts as u32) as u64,
        _ => 0,
    }
}

/// Rows that are enough for any choice of experts: `num_expanded_tokens` when the counts are not known on the host. That is
/// `num_tokens * num_topk`, and `alignment - 1` for each expert that may have been chosen, down to a multiple of `alignment`. It
/// saturates instead of overflowing.
pub fn max_expanded_tokens(num_tokens: u64, num_topk: u64, num_experts: u64, alignment: u32) -> u64 {
    let alignment = u64::from(alignment.max(1));
    let choices = num_tokens.saturating_mul(num_topk);
    let rows = choices.saturating_add(num_experts.min(choices).saturating_mul(alignment - 1));
    rows / alignment * alignment
}

/// A mistake in a routing table is an error that says where: an expert beyond `num_experts`, a number below -1, or the same expert
/// twice in a row. `topk_idx` is i64 `[num_tokens, num_topk]`, contiguous.
///
/// For debugging, as no op looks for these mistakes on a GPU: **waits for the stream** and looks at a copy on the host. An op that
/// meets a wrong index takes it for -1, and the checked emulator reports it if it is too large. A repeated expert is two rows of it
/// with the same token.
///
/// ```
/// use ferrotile::moe::get_fused_mapping::check_indices;
///
/// let device = ferrotile::Device::emulator();
/// let topk_idx = device.upload(&[3i64, -1, 2, 2])?;
/// let stream = device.stream()?;
/// check_indices(&stream, &topk_idx.tensor(&[1, 2])?, 4)?;
/// let error = check_indices(&stream, &topk_idx.tensor(&[2, 2])?, 4).unwrap_err();
/// assert_eq!(error.to_string(), "check_indices: topk_idx is 2 for choice 1 of token 1, allowed: an expert not chosen before");
/// # Ok::<(), ferrotile::Error>(())
/// ```
///
/// # Errors
/// [`Error::Value`] for the first mistake; [`Error::Shape`], [`Error::DType`], [`Error::Layout`] for another kind of tensor,
/// [`Error::DeviceMismatch`], [`Error::Driver`]; [`Error::Unsupported`] while the stream is captured.
pub fn check_indices(stream: &Stream, topk_idx: &TensorRef<'_>, num_experts: u64) -> Result<()> {
    let op = "check_indices";
    check::rank(op, "topk_idx", topk_idx, 2)?;
    check::dtype(op, "topk_idx", topk_idx, &[DType::I64])?;
    check::contiguous(op, "topk_idx", topk_idx)?;
    check::same_device(op, stream, &[("topk_idx", topk_idx)])?;
    stream.refuse_capture(op)?;
    let experts = stream.download::<i64>(op, topk_idx)?;
    let k = topk_idx.dim(1).max(1) as usize;
    // The token that chose an expert last.
    let mut last = HashMap::new();
    for (slot, expert) in experts.into_iter().enumerate() {
        let token = slot / k;
        let allowed = if expert < -1 || expert >= 0 && expert as u64 >= num_experts {
            format!("-1 to {}", num_experts as i128 - 1)
        } else if expert >= 0 && last.insert(expert, token) == Some(token) {
            "an expert not chosen before".to_owned()
        } else {
            continue;
        };
        let got = format!("{expert} for choice {} of token {token}", slot % k);
        return Err(Error::Value { op, arg: "topk_idx", allowed, got });
    }
    Ok(())
}

/// Lays out the expanded buffer: a stable counting sort of all choices by expert. Asynchronous on `stream`; allocates nothing.
///
/// | tensor | shape | dtype |
/// |---|---|---|
/// | `topk_idx` | `[num_tokens, num_topk]` | i64 |
/// | `pos_to_expert`, `pos_to_token`, `pos_to_token_topk` | `[num_expanded_tokens]` | i32 |
/// | `token_topk_to_pos` | `[num_tokens, num_topk]` | i32 |
/// | `expert_start`, `expert_end`, `num_tokens_per_expert` | `[num_experts]` | i32 |
///
/// All are contiguous. `workspace` is zeroed once and then serves any number of calls, one after the other; see [`Args::workspace`]. From
/// 1025 choices on the launch is cooperative: it starts when the GPU has room for all of its blocks, at most one per multiprocessor.
///
/// Expert `e` owns rows `expert_start[e]..expert_end[e]`, its number of choices rounded up to `alignment`; expert 0
/// starts at row 0 and each expert where the one before ends. Choices stand in ascending order of `token * num_topk + choice` inside
/// an expert, whatever the GPU, so the result is deterministic. Padding rows and rows after the last expert hold -1, as does
/// `token_topk_to_pos` for a choice without expert. Values outside `0..num_experts` count as -1; the checked emulator reports those
/// that are too large, and [`check_indices`] all of them.
///
/// `num_expanded_tokens` is the caller's upper bound, for instance [`max_expanded_tokens`]. Should it be too small, choices whose
/// row would lie beyond it are left out of all four index tensors, and `expert_end` of the last expert says how many rows were
/// needed. [`get_fused_mapping_exact`] finds the exact size by waiting for the stream. No tokens are fine: everything is 0 or -1.
/// (Facts: moe.md, sections 1.2 and 8.)
///
/// ```
/// use ferrotile::moe::get_fused_mapping::{Args, get_fused_mapping, workspace_bytes};
///
/// let device = ferrotile::Device::emulator();
/// // Two tokens with two choices each; the second choice of token 0 is on another rank. Two experts, rows in pairs.
/// let topk_idx = device.upload(&[1i64, -1, 0, 1])?;
/// let mut rows: Vec<_> = (0..3).map(|_| device.alloc::<i32>(4)).collect::<Result<_, _>>()?;
/// let [pos_to_expert, pos_to_token, pos_to_token_topk] = &mut rows[..] else { unreachable!() };
/// let mut token_topk_to_pos = device.alloc::<i32>(4)?;
/// let mut experts: Vec<_> = (0..3).map(|_| device.alloc::<i32>(2)).collect::<Result<_, _>>()?;
/// let [expert_start, expert_end, num_tokens_per_expert] = &mut experts[..] else { unreachable!() };
/// let bytes = workspace_bytes(2, 2, 2);
/// let mut workspace = device.zeros::<u8>(bytes as usize)?;
/// let args = Args {
///     topk_idx: topk_idx.tensor(&[2, 2])?,
///     alignment: 2,
///     pos_to_expert: pos_to_expert.tensor_mut(&[4])?,
///     pos_to_token: pos_to_token.tensor_mut(&[4])?,
///     pos_to_token_topk: pos_to_token_topk.tensor_mut(&[4])?,
///     token_topk_to_pos: token_topk_to_pos.tensor_mut(&[2, 2])?,
///     expert_start: expert_start.tensor_mut(&[2])?,
///     expert_end: expert_end.tensor_mut(&[2])?,
///     num_tokens_per_expert: num_tokens_per_expert.tensor_mut(&[2])?,
///     workspace: workspace.tensor_mut(&[bytes])?,
/// };
/// get_fused_mapping(&device.stream()?, args)?;
/// assert_eq!(pos_to_expert.to_vec()?, [0, -1, 1, 1]);
/// assert_eq!(pos_to_token.to_vec()?, [1, -1, 0, 1]);
/// assert_eq!(token_topk_to_pos.to_vec()?, [2, -1, 0, 3]);
/// assert_eq!(expert_end.to_vec()?, [2, 4]);
/// # Ok::<(), ferrotile::Error>(())
/// ```
///
/// # Errors
/// [`Error::Shape`], [`Error::DType`], [`Error::Layout`] when a tensor
/// is not as in the table or the workspace is too small; [`Error::Value`] for no or more than 1024 experts, an
/// alignment of 0, or more than 2^31 - 1 choices or rows; [`Error::Overlap`],
/// [`Error::DeviceMismatch`], [`Error::Driver`].
pub fn get_fused_mapping(stream: &Stream, args: Args<'_>) -> Result<()> {
    let sizes = check_args(stream, &args)?;
    launch(stream, args, &sizes, kernels::plan(sizes.n, sizes.e, stream.device().num_sms()))
}

fn launch(stream: &Stream, args: Args<'_>, sizes: &Sizes, plan: Plan) -> Result<()> {
    let values = mapping::Args {
        topk_idx: args.topk_idx.input(),
        workspace: args.workspace.output(),
        pos_to_expert: args.pos_to_expert.output(),
        pos_to_token: args.pos_to_token.output(),
        pos_to_token_topk: args.pos_to_token_topk.output(),
        token_topk_to_pos: args.token_topk_to_pos.output(),
        expert_start: args.expert_start.output(),
        expert_end: args.expert_end.output(),
        num_tokens_per_expert: args.num_tokens_per_expert.output(),
        n: sizes.n,
        e: sizes.e,
        k: sizes.k,
        groups: plan.groups,
        p: sizes.p,
        alignment: args.alignment,
    };
    stream.launch(OP, &mapping::ENTRY, &kernels::config(plan, sizes.e), &values)
}

/// What [`get_fused_mapping_exact`] returns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExactCounts {
    /// Rows of the expanded buffer that are needed; the tensors by row mean something up to there.
    pub num_expanded_tokens: u64,
    /// Rows of each expert, padding included.
    pub num_tokens_per_expert: Vec<i32>,
}

/// [`get_fused_mapping`], and then **waits for the stream** to learn the exact size of the expanded buffer: one copy of
/// `num_tokens_per_expert` to the host. It can't be captured into a graph, which is refused before anything is launched.
///
/// The tensors by row should have [`max_expanded_tokens`] elements; `pos_to_expert.tensor(&[counts.num_expanded_tokens])` is then
/// the exact one. If they have fewer than are needed in the end, that is an error, and they are as [`get_fused_mapping`] leaves them.
/// Allocates the list on the host. (Facts: moe.md, section 8, the form with `P_in = 0`.)
///
/// ```
/// use ferrotile::moe::get_fused_mapping::{Args, get_fused_mapping_exact, max_expanded_tokens, workspace_bytes};
///
/// let device = ferrotile::Device::emulator();
/// let topk_idx = device.upload(&[1i64, -1, 0, 1])?;
/// // Enough rows for two tokens with two of two experts each, in pairs.
/// let most = max_expanded_tokens(2, 2, 2, 2);
/// let mut rows: Vec<_> = (0..3).map(|_| device.alloc::<i32>(most as usize)).collect::<Result<_, _>>()?;
/// let [pos_to_expert, pos_to_token, pos_to_token_topk] = &mut rows[..] else { unreachable!() };
/// let mut token_topk_to_pos = device.alloc::<i32>(4)?;
/// let mut experts: Vec<_> = (0..3).map(|_| device.alloc::<i32>(2)).collect::<Result<_, _>>()?;
/// let [expert_start, expert_end, num_tokens_per_expert] = &mut experts[..] else { unreachable!() };
/// let bytes = workspace_bytes(2, 2, 2);
/// let mut workspace = device.zeros::<u8>(bytes as usize)?;
/// let counts = get_fused_mapping_exact(&device.stream()?, Args {
///     topk_idx: topk_idx.tensor(&[2, 2])?,
///     alignment: 2,
///     pos_to_expert: pos_to_expert.tensor_mut(&[most])?,
///     pos_to_token: pos_to_token.tensor_mut(&[most])?,
///     pos_to_token_topk: pos_to_token_topk.tensor_mut(&[most])?,
///     token_topk_to_pos: token_topk_to_pos.tensor_mut(&[2, 2])?,
///     expert_start: expert_start.tensor_mut(&[2])?,
///     expert_end: expert_end.tensor_mut(&[2])?,
///     num_tokens_per_expert: num_tokens_per_expert.tensor_mut(&[2])?,
///     workspace: workspace.tensor_mut(&[bytes])?,
/// })?;
/// assert_eq!((most, counts.num_expanded_tokens, counts.num_tokens_per_expert), (6, 4, vec![2, 2]));
/// # Ok::<(), ferrotile::Error>(())
/// ```
///
/// # Errors
/// Those of [`get_fused_mapping`]; [`Error::Unsupported`] while the stream is captured; [`Error::Value`] of `num_expanded_tokens` if
/// the tensors by row are too small.
pub fn get_fused_mapping_exact(stream: &Stream, args: Args<'_>) -> Result<ExactCounts> {
    stream.refuse_capture(OP)?;
    let (counts, rows) = (*args.num_tokens_per_expert, args.pos_to_expert.dim(0));
    get_fused_mapping(stream, args)?;
    let list = stream.download::<i32>(OP, &counts)?;
    let needed = list.iter().map(|n| *n as u64).sum();
    if needed > rows {
        let (allowed, got) = (format!("at least {needed} for this routing"), rows.to_string());
        return Err(Error::Value { op: OP, arg: "num_expanded_tokens", allowed, got });
    }
    Ok(ExactCounts { num_expanded_tokens: needed, num_tokens_per_expert: list })
}

/// What [`get_fused_mapping_alloc`] returns. The three tensors by row have more elements than rows that are needed:
/// `mapping.pos_to_expert.tensor(&[mapping.num_expanded_tokens])` is the exact one.
#[derive(Debug)]
pub struct FusedMapping {
    /// Rows of the expanded buffer.
    pub num_expanded_tokens: u64,
    /// Expert of each row.
    pub pos_to_expert: Buffer<i32>,
    /// Token of each row.
    pub pos_to_token: Buffer<i32>,
    /// `token * num_topk + choice` of each row.
    pub pos_to_token_topk: Buffer<i32>,
    /// Row of each choice.
    pub token_topk_to_pos: Buffer<i32>,
    /// First row of each expert.
    pub expert_start: Buffer<i32>,
    /// Row after the last one of each expert.
    pub expert_end: Buffer<i32>,
    /// Rows of each expert, on the device.
    pub num_tokens_per_expert: Buffer<i32>,
    /// Rows of each expert, on the host.
    pub num_tokens_per_expert_list: Vec<i32>,
}

/// [`get_fused_mapping_exact`] that **allocates its outputs** too, and waits for the stream. It can't be captured into a graph.
///
/// ```
/// use ferrotile::moe::get_fused_mapping_alloc;
///
/// let device = ferrotile::Device::emulator();
/// let topk_idx = device.upload(&[1i64, -1, 0, 1])?;
/// let mapping = get_fused_mapping_alloc(&device.stream()?, topk_idx.tensor(&[2, 2])?, 2, 1)?;
/// assert_eq!((mapping.num_expanded_tokens, &mapping.num_tokens_per_expert_list[..]), (3, &[1, 2][..]));
/// assert_eq!(mapping.token_topk_to_pos.to_vec()?, [1, -1, 0, 2]);
/// # Ok::<(), ferrotile::Error>(())
/// ```
///
/// # Errors
/// Those of [`get_fused_mapping_exact`], and [`Error::OutOfMemory`].
pub fn get_fused_mapping_alloc(
    stream: &Stream,
    topk_idx: TensorRef<'_>,
    num_experts: u64,
    alignment: u32,
) -> Result<FusedMapping> {
    check::rank(OP, "topk_idx", &topk_idx, 2)?;
    let (t, k) = (topk_idx.dim(0), topk_idx.dim(1));
    check_counts(&topk_idx, num_experts, alignment)?;
    stream.refuse_capture(OP)?;
    let rows = max_expanded_tokens(t, k, num_experts, alignment);
    let bytes = workspace_bytes(t, k, num_experts);
    let device = *stream.device();
    let by_row = || device.alloc::<i32>(rows as usize);
    let by_expert = || device.alloc::<i32>(num_experts as usize);
    let mut workspace = device.zeros::<u8>(bytes as usize)?;
    let mut mapping = FusedMapping {
        num_expanded_tokens: 0,
        pos_to_expert: by_row()?,
        pos_to_token: by_row()?,
        pos_to_token_topk: by_row()?,
        token_topk_to_pos: device.alloc((t * k) as usize)?,
        expert_start: by_expert()?,
        expert_end: by_expert()?,
        num_tokens_per_expert: by_expert()?,
        num_tokens_per_expert_list: Vec::new(),
    };
    let args = Args {
        topk_idx,
        alignment,
        pos_to_expert: mapping.pos_to_expert.tensor_mut(&[rows])?,
        pos_to_token: mapping.pos_to_token.tensor_mut(&[rows])?,
        pos_to_token_topk: mapping.pos_to_token_topk.tensor_mut(&[rows])?,
        token_topk_to_pos: mapping.token_topk_to_pos.tensor_mut(&[t, k])?,
        expert_start: mapping.expert_start.tensor_mut(&[num_experts])?,
        expert_end: mapping.expert_end.tensor_mut(&[num_experts])?,
        num_tokens_per_expert: mapping.num_tokens_per_expert.tensor_mut(&[num_experts])?,
        workspace: workspace.tensor_mut(&[bytes])?,
    };
    let counts = get_fused_mapping_exact(stream, args)?;
    mapping.num_expanded_tokens = counts.num_expanded_tokens;
    mapping.num_tokens_per_expert_list = counts.num_tokens_per_expert;
    Ok(mapping)
}

/// What the kernels count with.
struct Sizes {
    n: u32,
    e: u32,
    k: u32,
    p: u32,
}

/// The number of choices, if it, the experts and the rows they may need fit 32 bits.
fn check_counts(topk_idx: &View, num_experts: u64, alignment: u32) -> Result<u64> {
    const MOST: u64 = i32::MAX as u64;
    let n = topk_idx.dim(0).saturating_mul(topk_idx.dim(1));
    check::in_range(OP, "num_tokens * num_topk", n, 0, MOST)?;
    check::in_range(OP, "num_experts", num_experts, 1, MAX_EXPERTS)?;
    // Every row, padding included, has a number that fits i32.
    check::in_range(OP, "alignment", alignment.into(), 1, 1 + (MOST - n) / num_experts)?;
    Ok(n)
}

fn check_args(stream: &Stream, args: &Args<'_>) -> Result<Sizes> {
    let topk_idx = &args.topk_idx;
    check::rank(OP, "topk_idx", topk_idx, 2)?;
    check::dtype(OP, "topk_idx", topk_idx, &[DType::I64])?;
    check::contiguous(OP, "topk_idx", topk_idx)?;
    check::rank(OP, "expert_start", &args.expert_start, 1)?;
    check::rank(OP, "pos_to_expert", &args.pos_to_expert, 1)?;
    let (e, p) = (args.expert_start.dim(0), args.pos_to_expert.dim(0));
    let n = check_counts(topk_idx, e, args.alignment)?;
    check::in_range(OP, "num_expanded_tokens", p, 0, i32::MAX as u64)?;

    let outputs: [(&str, &View, &[u64]); 7] = [
        ("pos_to_expert", &args.pos_to_expert, &[p]),
        ("pos_to_token", &args.pos_to_token, &[p]),
        ("pos_to_token_topk", &args.pos_to_token_topk, &[p]),
        ("token_topk_to_pos", &args.token_topk_to_pos, topk_idx.shape()),
        ("expert_start", &args.expert_start, &[e]),
        ("expert_end", &args.expert_end, &[e]),
        ("num_tokens_per_expert", &args.num_tokens_per_expert, &[e]),
    ];
    for (name, tensor, shape) in outputs {
        check::whole(OP, name, tensor, DType::I32, shape)?;
    }

    let workspace = &args.workspace;
    check::rank(OP, "workspace", workspace, 1)?;
    check::dtype(OP, "workspace", workspace, &[DType::U8])?;
    check::contiguous(OP, "workspace", workspace)?;
    check::aligned(OP, "workspace", workspace, 8)?;
    let bytes = workspace_bytes(topk_idx.dim(0), topk_idx.dim(1), e);
    if workspace.dim(0) < bytes {
        let (expected, got) = (format!("at least [{bytes}]"), format!("{:?}", workspace.shape()));
        return Err(Error::Shape { op: OP, arg: "workspace", expected, got });
    }

    let mut all: [(&str, &View); 9] = [("topk_idx", topk_idx); 9];
    for (entry, (name, tensor, _)) in all[1..].iter_mut().zip(outputs) {
        *entry = (name, tensor);
    }
    all[8] = ("workspace", workspace);
    check::same_device(OP, stream, &all)?;
    check::no_overlaps(OP, &all[..1], &all[1..])?;
    Ok(Sizes {
        n: check::fits_u32(OP, "num_tokens * num_topk", n)?,
        e: check::fits_u32(OP, "num_experts", e)?,
        // A tensor without slots may have a dimension beyond 32 bits; the kernel only divides by it.
        k: topk_idx.dim(1).clamp(1, i32::MAX as u64) as u32,
        p: check::fits_u32(OP, "num_expanded_tokens", p)?,
    })
}
