//! Launcher of `per_channel_cast_fused`.

use super::per_channel_cast::{Plan, Scales};
use super::{Input, SfMut};
use crate::{DType, Result, Stream, TensorMut, TensorRef, check};
use ferrotile_kernels::quant::per_channel_cast::{Element, Order};
use ferrotile_kernels::quant::per_channel_cast_fused as k;

/// Arguments of [`per_channel_cast_fused`].
#[derive(Debug)]
pub struct Args<'a> {
    /// bf16 or f32 `(N, H)`, or an e4m3 tensor with scales for blocks of `(1, 16)`, `(1, 32)`, `(1, 64)` or `(1, 128)`; rows may lie
    /// any distance apart.
    pub x: Input<'a>,
    /// The row of `x` for each row of the output, i32 `(T,)`, contiguous; negative for a row of zeros. Without it `T` is `N` and rows
    /// stay where they are.
    pub pos_to_token: Option<TensorRef<'a>>,
    /// Rows of a channel that share a scale: 32 or 128.
    pub npt: u32,
    /// Make every scale a power of two. The packed layout needs it.
    pub round_sf: bool,
    /// Quantised values: e4m3 `(T, H)`, contiguous.
    pub out: TensorMut<'a>,
    /// Scale factors, [`RowMajor`](super::SfLayout::RowMajor) or [`PerChannelPacked`](super::SfLayout::PerChannelPacked), see
    /// [`sf_shape`](super::sf_shape) with the block `(npt, 1)`.
    pub sf: SfMut<'a>,
}

/// [`per_channel_cast`](super::per_channel_cast()) of gathered rows: the expansion of tokens to the rows of their experts, and the cast, in
/// one pass.
///
/// | tensor | dtype | shape | layout |
/// |---|---|---|---|
/// | `x` | bf16, f32, or e4m3 with scales | `(N, H)` | last stride 1, any row stride |
/// | scales of `x` | f32, or ue8m0x4 in a packed layout | `(N, K)`, or `(N, ceil(K / 4))`, with `K = ceil(H / npc)` | [`SfLayout::COMMON`](super::SfLayout::COMMON) |
/// | `pos_to_token` | i32 | `(T,)` | contiguous |
/// | `out` | e4m3 | `(T, H)` | contiguous |
/// | `sf` | f32, or ue8m0x4 | `(M, H)`, or `(ceil(M / 4), H)`, with `M = ceil(T / npt)` | last stride 1, any row stride |
///
/// Row `r` of the output is row `pos_to_token[r]` of `x`, quantised as by [`per_channel_cast`](super::per_channel_cast()): same scales,
/// rounding, and treatment of NaN and infinity. A negative index stands for a row of zeros, which does not count for a scale and whose bytes
/// are 0. An index of `N` or more is the caller's mistake: it is never followed, and its row becomes zeros too; the checked emulator reports
/// it. Any `T` and any order of indices will do. Source: the specification's section 5.5.
///
/// Asynchronous; allocates nothing; no rows of output launch nothing. It is fast under the conditions of
/// [`per_channel_cast`](super::per_channel_cast()).
///
/// # Errors
/// Those of [`per_channel_cast`](super::per_channel_cast()).
///
/// ```
/// use ferrotile::quant::{Input, SfLayout, SfMut, per_channel_cast_fused};
/// use ferrotile::{Device, E4m3};
///
/// let device = Device::emulator();
/// // Two tokens of two channels; three rows, of which the second is padding.
/// let x = device.upload(&[448.0f32, 1.0, 7.0, 896.0])?;
/// let pos_to_token = device.upload(&[1i32, -1, 0])?;
/// let (mut out, mut sf) = (device.alloc::<E4m3>(3 * 2)?, device.alloc::<f32>(2)?);
/// per_channel_cast_fused::per_channel_cast_fused(
///     &device.stream()?,
///     per_channel_cast_fused::Args {
///         x: Input::Plain(x.tensor(&[2, 2])?),
///         pos_to_token: Some(pos_to_token.tensor(&[3])?),
///         npt: 128,
///         round_sf: true,
///         out: out.tensor_mut(&[3, 2])?,
///         sf: SfMut { tensor: sf.tensor_mut(&[1, 2])?, layout: SfLayout::RowMajor },
///     },
/// )?;
/// assert_eq!(sf.to_vec()?, [1.0, 2.0]);
/// // 7 and 896 / 2, zeros, 448 and 1 / 2.
/// let codes: Vec<u8> = out.to_vec()?.iter().map(|code| code.0).collect();
/// assert_eq!(codes, [0x4E, 0x7E, 0, 0, 0x7E, 0x30]);
/// # Ok::<(), ferrotile::Error>(())
/// ```
pub fn per_channel_cast_fused(stream: &Stream, args: Args<'_>) -> Result<()> {
    let op = "per_channel_cast_fused";
    let plan = Plan::new(op, &args.x)?;
    let rows = match &args.pos_to_token {
        None => plan.num_rows,
        Some(pos) => {
            check::rank(op, "pos_to_token", pos, 1)?;
            check::dtype(op, "pos_to_token", pos, &[DType::I32])?;
            check::contiguous(op, "pos_to_token", pos)?;
            check::aligned(op, "pos_to_token", pos, 4)?;
            check::in_range(op, "rows", pos.dim(0), 0, i32::MAX as u64)?;
            pos.dim(0) as u32
        }
    };
    let scales = Scales::check(op, args.npt, args.round_sf, &args.sf, (rows.into(), plan.hidden.into()))?;
    let wide = plan.check_out(op, &args.out, rows)?;
    let outputs = [("out", &*args.out), ("sf", &*args.sf.tensor)];
    plan.check_apart(op, stream, &outputs)?;
    if let Some(pos) = &args.pos_to_token {
        check::same_device(op, stream, &[("pos_to_token", pos)])?;
        check::no_overlaps(op, &[("pos_to_token", pos)], &outputs)?;
    }
    if args.out.is_empty() {
        return Ok(());
    }
    let Some(pos_to_token) = args.pos_to_token else {
        return plan.launch(op, stream, wide, scales, &args.out, &args.sf);
    };
    use k::gather as e;
    let (entry, shape) = match (plan.element, plan.x_packed, wide) {
        (Element::Bf16, _, true) => (&e::bf16, k::BF16_SHAPE),
        (Element::Bf16, _, false) => (&e::bf16_narrow, k::NARROW_SHAPE),
        (Element::F32, _, true) => (&e::f32, k::F32_SHAPE),
        (Element::F32, _, false) => (&e::f32_narrow, k::NARROW_F32_SHAPE),
        (Element::E4m3, false, true) => (&e::e4m3_f32, k::E4M3_SHAPE),
        (Element::E4m3, false, false) => (&e::e4m3_f32_narrow, k::NARROW_SHAPE),
        (Element::E4m3, true, true) => (&e::e4m3_ue8m0, k::E4M3_SHAPE),
        (Element::E4m3, true, false) => (&e::e4m3_ue8m0_narrow, k::NARROW_SHAPE),
    };
    let width = group_width(plan.num_rows, plan.data().dtype().size() * shape.0 as u64);
    let order = Order::new(plan.hidden, shape.0, width);
    let config = plan.config(op, shape, rows, order)?;
    let kernel_args = e::Args {
        x: plan.data().input(),
        x_sf: plan.x_sf_input(),
        pos_to_token: pos_to_token.input(),
        out: args.out.output(),
        sf: args.sf.tensor.output(),
        num_tokens: plan.num_rows,
        t: rows,
        h: plan.hidden,
        x_stride: plan.stride,
        x_sf_row: plan.x_sf.row,
        x_sf_col: plan.x_sf.col,
        x_shift: plan.x_shift,
        sf_stride: scales.stride,
        units: scales.units,
        round: scales.round,
        packed: scales.packed,
        width: order.width,
        magic: order.divisor.magic,
        shift: order.divisor.shift,
    };
    stream.launch(op, entry, &config, &kernel_args)
}

/// Columns of tiles that leave most of the L2 cache to what is written: rows that are read a second time are still there. `bytes` of a
/// row are in a tile.
fn group_width(num_tokens: u32, bytes: u64) -> u32 {
    const GROUP: u64 = 8 << 20;
    const CACHED: u64 = 24 << 20;
    let column = num_tokens.max(1) as u64 * bytes;
    match GROUP / column {
        // Where not even one column stays in the cache, whole rows are best.
        0 if column > CACHED => u32::MAX,
        width => width.clamp(1, u32::MAX.into()) as u32,
    }
}
