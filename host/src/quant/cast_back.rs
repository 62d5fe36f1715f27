//! Launchers of `cast_back` and `per_token_cast_back`.

use super::{Format, Sf, SfLayout, SfStrides};
use crate::{DType, Result, Stream, TensorMut, TensorRef, check};
use ferrotile_kernels::device::LaunchConfig;
use ferrotile_kernels::entry::Entry;
use ferrotile_kernels::quant::cast_back as k;

/// Arguments of [`cast_back`].
#[derive(Debug)]
pub struct Args<'a> {
    /// Quantised values: e4m3 `(T, H)` or e2m1x2 `(T, H / 2)`; rows may lie any distance apart.
    pub x: TensorRef<'a>,
    /// Scale factors of `x`, one for each `block`.
    pub sf: Sf<'a>,
    /// Tokens and channels that share a scale, `(npt, npc)`: any number of tokens; 1, 16, 32, 64, 128 or all channels.
    pub block: (u32, u32),
    /// Output, bf16 or f32 `(T, H)`, contiguous.
    pub out: TensorMut<'a>,
}

/// Arguments of [`per_token_cast_back`].
#[derive(Debug)]
pub struct PerTokenArgs<'a> {
    /// Quantised values: e4m3 `(T, H)` or e2m1x2 `(T, H / 2)`; rows may lie any distance apart.
    pub x: TensorRef<'a>,
    /// Scale factors of `x`.
    pub sf: Sf<'a>,
    /// Channels that share a scale: 16, 32, 64, 128 or all of them.
    pub npc: u32,
    /// Output, bf16 or f32 `(T, H)`, contiguous.
    pub out: TensorMut<'a>,
}

/// Dequantise: `out = fp32(x) * sf`, one f32 multiplication rounded to nearest even, then for bf16 rounded to nearest even again.
///
/// | tensor | dtype | shape | layout |
/// |---|---|---|---|
/// | `x` | e4m3, or e2m1x2 with two values a byte | `(T, H)`, or `(T, H / 2)` | last stride 1, any row stride |
/// | `sf` | f32, packed ue8m0x4, or e4m3 | `(M, K)`, packed `(M, ceil(K / 4))` or `(ceil(M / 4), K)` | [`SfLayout`], any pitch |
/// | `out` | bf16 or f32 | `(T, H)` | contiguous |
///
/// `M = ceil(T / npt)` and `K = ceil(H / npc)`: a ragged last block uses its scale for what there is. NaN of `x` or of an e4m3
/// scale stays NaN. Every layout goes with every block, but [`SfLayout::PerChannelPacked`] only with blocks of one channel. Any
/// alignment works; it is fast when rows of `x` start at multiples of 8 bytes, `out` at one of 16 and `H` is a multiple of 8, and for
/// blocks of one channel when scales are row-major f32 or packed in rows that start at multiples of 16 bytes.
/// Source: quant.md 2 (dequantisation), 3, 5.7 and 6.7. Asynchronous; allocates nothing; an empty `out` launches nothing.
///
/// # Errors
/// [`Shape`](crate::Error::Shape) when shapes do not belong together, [`DType`](crate::Error::DType),
/// [`Layout`](crate::Error::Layout) for strides and for per-channel scales of wider blocks, [`Value`](crate::Error::Value) for `block` or a size beyond 32 bits,
/// [`DeviceMismatch`](crate::Error::DeviceMismatch),
/// [`Overlap`](crate::Error::Overlap) of `out` with an input, [`Driver`](crate::Error::Driver). `out` is untouched then.
///
/// ```
/// use ferrotile::quant::{Sf, SfLayout, cast_back};
/// use ferrotile::{Device, E4m3};
///
/// let device = Device::emulator();
/// // 32 tokens of 128 channels; a scale for each 16 tokens and 64 channels.
/// let x = device.upload(&[E4m3::from_f32(1.5); 32 * 128])?;
/// let sf = device.upload(&[1.0f32, 2.0, 4.0, 8.0])?;
/// let mut out = device.alloc::<f32>(32 * 128)?;
/// let args = cast_back::Args {
///     x: x.tensor(&[32, 128])?,
///     sf: Sf { tensor: sf.tensor(&[2, 2])?, layout: SfLayout::RowMajor },
///     block: (16, 64),
///     out: out.tensor_mut(&[32, 128])?,
/// };
/// cast_back::cast_back(&device.stream()?, args)?;
/// let out = out.to_vec()?;
/// assert_eq!([out[0], out[64], out[31 * 128], out[31 * 128 + 64]], [1.5, 3.0, 6.0, 12.0]);
/// # Ok::<(), ferrotile::Error>(())
/// ```
pub fn cast_back(stream: &Stream, args: Args<'_>) -> Result<()> {
    launch("cast_back", stream, args, u32::MAX)
}

/// Dequantise what a per-token cast made: [`cast_back`] with blocks of one token and `npc` channels.
///
/// ```
/// use ferrotile::quant::{Sf, SfLayout, cast_back};
/// use ferrotile::{Device, E2m1x2, Ue8m0x4, half::bf16};
///
/// let device = Device::emulator();
/// // 1 token of 64 channels, FP4 with a power-of-two scale for each 32 channels: 2^-1 and 2^3.
/// let x = device.upload(&[E2m1x2::from_f32s([3.0, -0.5]); 32])?;
/// let sf = device.upload(&[Ue8m0x4(i32::from_le_bytes([126, 130, 0, 0]))])?;
/// let mut out = device.alloc::<bf16>(64)?;
/// let args = cast_back::PerTokenArgs {
///     x: x.tensor(&[1, 32])?,
///     sf: Sf { tensor: sf.tensor(&[1, 1])?, layout: SfLayout::ColMajorPacked },
///     npc: 32,
///     out: out.tensor_mut(&[1, 64])?,
/// };
/// cast_back::per_token_cast_back(&device.stream()?, args)?;
/// let out = out.to_vec()?;
/// assert_eq!([out[0], out[1], out[62], out[63]].map(bf16::to_f32), [1.5, -0.25, 24.0, -4.0]);
/// # Ok::<(), ferrotile::Error>(())
/// ```
///
/// # Errors
/// Those of [`cast_back`].
pub fn per_token_cast_back(stream: &Stream, args: PerTokenArgs<'_>) -> Result<()> {
    let op = "per_token_cast_back";
    let hidden = hidden(op, &args.x)?;
    allowed_npc(op, "npc", args.npc, hidden, &[16, 32, 64, 128])?;
    launch(op, stream, Args { x: args.x, sf: args.sf, block: (1, args.npc), out: args.out }, u32::MAX)
}

/// [`cast_back`] in launches of at most `max_tokens` tokens each, as it goes about tensors of more than 2^31 items.
#[doc(hidden)]
pub fn cast_back_in_parts(stream: &Stream, args: Args<'_>, max_tokens: u32) -> Result<()> {
    launch("cast_back", stream, args, max_tokens)
}

/// Channels of `x`.
fn hidden(op: &'static str, x: &TensorRef<'_>) -> Result<u64> {
    check::rank(op, "x", x, 2)?;
    check::dtype(op, "x", x, &[DType::E4m3, DType::E2m1x2])?;
    // Kernels number values with 32 bits and divide numbers below 2^31.
    let values = if x.dtype() == DType::E2m1x2 { 2 } else { 1 };
    check::in_range(op, "columns of x", x.dim(1), 0, i32::MAX as u64 / values)?;
    Ok(x.dim(1) * values)
}

fn allowed_npc(op: &'static str, arg: &'static str, npc: u32, hidden: u64, fixed: &[u32]) -> Result<()> {
    if npc > 0 && npc as u64 == hidden {
        return Ok(());
    }
    check::one_of(op, arg, npc, fixed).map_err(|error| match error {
        crate::Error::Value { op, arg, allowed, got } => {
            crate::Error::Value { op, arg, allowed: format!("{allowed}, {hidden} (hidden)"), got }
        }
        other => other,
    })
}

/// Layouts of scales; the last one for blocks of one channel only.
const LAYOUTS: [SfLayout; 7] = [
    SfLayout::RowMajor,
    SfLayout::ColMajor,
    SfLayout::ColMajorPacked,
    SfLayout::RowMajorPacked,
    SfLayout::RowMajorE4m3,
    SfLayout::ColMajorE4m3,
    SfLayout::PerChannelPacked,
];

/// What the checks found out.
struct Plan {
    format: Format,
    out: DType,
    layout: SfLayout,
    tokens: u32,
    hidden: u32,
    x_stride: u32,
    sf: SfStrides,
    npt: u32,
    /// A channel's number, shifted by this, is its block column.
    npc_shift: u32,
    path: Path,
}

/// Which kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Path {
    Wide,
    Staged,
    PerChannel,
    Narrow,
}

impl Plan {
    /// Channels that one item of the path covers.
    fn values_per_item(&self) -> u32 {
        match self.path {
            Path::Narrow => 8 / self.bits(),
            Path::Staged => k::PIECE,
            Path::Wide | Path::PerChannel => 16 / self.out.size() as u32,
        }
    }

    /// Bits of a value of `x`.
    fn bits(&self) -> u32 {
        match self.format {
            Format::E4m3 => 8,
            Format::E2m1 => 4,
        }
    }
}

/// `None` when there is nothing to do.
fn check(op: &'static str, stream: &Stream, a: &Args<'_>) -> Result<Option<Plan>> {
    let hidden = hidden(op, &a.x)?;
    let num_tokens = a.x.dim(0);
    check::dtype(op, "out", &a.out, &[DType::Bf16, DType::F32])?;
    check::shape(op, "out", &a.out, &[num_tokens, hidden])?;
    check::in_range(op, "npt", a.block.0.into(), 1, u32::MAX.into())?;
    allowed_npc(op, "npc", a.block.1, hidden, &[1, 16, 32, 64, 128])?;
    let (npt, npc) = a.block;
    let block_rows = num_tokens.div_ceil(npt.into());
    let layouts = if npc == 1 { &LAYOUTS[..] } else { &LAYOUTS[..LAYOUTS.len() - 1] };
    let sf = a.sf.check(op, "sf", layouts, (block_rows, hidden.div_ceil(npc.into())))?;
    check::last_stride_1(op, "x", &a.x)?;
    check::contiguous(op, "out", &a.out)?;
    check::same_device(op, stream, &[("x", &a.x), ("sf", &a.sf.tensor), ("out", &a.out)])?;
    if a.out.is_empty() {
        return Ok(None);
    }
    check::in_range(op, "num_tokens", num_tokens, 0, i32::MAX as u64)?;
    let x_stride = if num_tokens == 1 { 0 } else { check::fits_u32(op, "row stride of x", a.x.stride(0))? };
    check::aligned(op, "out", &a.out, a.out.dtype().size())?;
    check::no_overlaps(op, &[("x", &a.x), ("sf", &a.sf.tensor)], &[("out", &a.out)])?;

    let format = if a.x.dtype() == DType::E2m1x2 { Format::E2m1 } else { Format::E4m3 };
    let mut plan = Plan {
        format,
        out: a.out.dtype(),
        layout: a.sf.layout,
        tokens: num_tokens as u32,
        hidden: hidden as u32,
        x_stride,
        sf,
        // Larger blocks than there are tokens are one block; this keeps products of block and number of tokens small.
        npt: npt.min(num_tokens as u32),
        npc_shift: if npc.is_power_of_two() && npc <= 128 { npc.trailing_zeros() } else { 31 },
        path: Path::Wide,
    };
    let values = plan.values_per_item();
    let item_bytes = values as u64 * plan.bits() as u64 / 8;
    let aligned = a.x.ptr().is_multiple_of(item_bytes)
        && (x_stride as u64).is_multiple_of(item_bytes)
        && a.out.ptr().is_multiple_of(16)
        && plan.hidden.is_multiple_of(values);
    // A single row has stride 0.
    let scales_in_vectors = matches!(a.sf.layout, SfLayout::RowMajor | SfLayout::PerChannelPacked)
        && a.sf.tensor.ptr().is_multiple_of(16)
        && sf.row.is_multiple_of(4);
    let in_pieces = [a.x.ptr(), x_stride.into(), hidden].iter().all(|v| v.is_multiple_of(k::PIECE.into()));
    let large = num_tokens * hidden >= k::STAGED_LEAST;
    let e4m3_to_bf16 = plan.format == Format::E4m3 && plan.out == DType::Bf16;
    plan.path = match (aligned, npc == 1) {
        (true, false) if large && in_pieces && e4m3_to_bf16 => Path::Staged,
        (true, false) => Path::Wide,
        (true, true) if scales_in_vectors => Path::PerChannel,
        _ => Path::Narrow,
    };
    Ok(Some(plan))
}

fn launch(op: &'static str, stream: &Stream, args: Args<'_>, max_tokens: u32) -> Result<()> {
    let Some(plan) = check(op, stream, &args)? else { return Ok(()) };
    if plan.path == Path::PerChannel {
        return launch_per_channel(op, stream, &args, &plan);
    }
    let values = plan.values_per_item();
    let row_items = plan.hidden / values;
    let row = k::Divisor::new(row_items);
    // A scaling block with more items than a launch can have is the only one of its launch.
    let block = k::Divisor::new((row_items as u64 * plan.npt as u64).min(k::MAX_ITEMS) as u32);
    let one_column = plan.npc_shift == 31;
    let k_shift = if one_column || plan.path == Path::Narrow { plan.npc_shift } else { plan.npc_shift - values.trailing_zeros() };
    // Beyond 2^31 items (32 GiB of output) it takes more than one launch.
    let limit = ((k::MAX_ITEMS - 1) / row_items as u64).min(max_tokens.into()) as u32;
    let mut first_token = 0;
    while first_token < plan.tokens {
        let tokens = k::launch_tokens(first_token, plan.tokens, plan.npt, limit);
        let num_items = tokens * row_items;
        let x = args.x.input::<u8>().at(first_token as u64 * plan.x_stride as u64);
        // A launch may start within a word of four block rows.
        let first_block = first_token / plan.npt;
        let (sf_row, first_block) = match plan.layout {
            SfLayout::PerChannelPacked => (first_block / 4, first_block % 4),
            _ => (first_block, 0),
        };
        let sf = args.sf.tensor.input::<u8>().at(sf_row as u64 * plan.sf.row as u64 * args.sf.tensor.dtype().size());
        let out = args.out.output::<u8>().at(first_token as u64 * plan.hidden as u64 * plan.out.size());
        // These kernels number items through the tensor and take the same arguments, but for the last.
        macro_rules! launch {
            ($kernel:ident, $entry:expr, $config:expr $(, $more:ident)?) => {{
                let config = $config;
                let args = k::$kernel::Args {
                    x,
                    sf,
                    out,
                    x_stride: plan.x_stride,
                    sf_row_stride: plan.sf.row,
                    sf_col_stride: plan.sf.col,
                    num_items,
                    row_items,
                    row_magic: row.magic,
                    row_shift: row.shift,
                    block_magic: block.magic,
                    block_shift: block.shift,
                    k_shift,
                    $($more,)?
                };
                stream.launch(op, $entry, &config, &args)?
            }};
        }
        if plan.path == Path::Narrow {
            let blocks = num_items.div_ceil(k::THREADS * k::NARROW_ITEMS);
            launch!(narrow, narrow_entry(&plan), LaunchConfig::new(blocks, k::THREADS), first_block);
        } else if plan.path == Path::Staged {
            launch!(staged, staged_entry(&plan), k::staged_config(num_items));
        } else {
            launch!(wide, wide_entry(&plan), LaunchConfig::new(num_items.div_ceil(k::THREADS), k::THREADS));
        }
        first_token += tokens;
    }
    Ok(())
}

fn launch_per_channel(op: &'static str, stream: &Stream, args: &Args<'_>, plan: &Plan) -> Result<()> {
    let row_items = plan.hidden / plan.values_per_item();
    let columns = row_items.div_ceil(k::PER_CHANNEL_THREADS);
    let tiles = plan.npt.div_ceil(k::CHANNEL_ROWS);
    let blocks = columns as u64 * tiles as u64 * plan.tokens.div_ceil(plan.npt) as u64;
    check::in_range(op, "number of blocks", blocks, 0, i32::MAX as u64)?;
    let config = LaunchConfig::new(blocks as u32, k::PER_CHANNEL_THREADS);
    let (across, down) = (k::Divisor::new(columns), k::Divisor::new(tiles));
    let args = k::per_channel::Args {
        x: args.x.input(),
        sf: args.sf.tensor.input(),
        out: args.out.output(),
        x_stride: plan.x_stride,
        sf_stride: plan.sf.row,
        num_tokens: plan.tokens,
        row_items,
        npt: plan.npt,
        columns,
        columns_magic: across.magic,
        columns_shift: across.shift,
        tiles,
        tiles_magic: down.magic,
        tiles_shift: down.shift,
    };
    use k::per_channel as e;
    let entry = match (plan.format, plan.out, plan.layout) {
        (Format::E4m3, DType::Bf16, SfLayout::RowMajor) => &e::e4m3_bf16,
        (Format::E4m3, _, SfLayout::RowMajor) => &e::e4m3_f32,
        (Format::E2m1, DType::Bf16, SfLayout::RowMajor) => &e::e2m1_bf16,
        (Format::E2m1, _, SfLayout::RowMajor) => &e::e2m1_f32,
        (Format::E4m3, DType::Bf16, _) => &e::e4m3_bf16_ue8m0,
        (Format::E4m3, _, _) => &e::e4m3_f32_ue8m0,
        (Format::E2m1, DType::Bf16, _) => &e::e2m1_bf16_ue8m0,
        (Format::E2m1, _, _) => &e::e2m1_f32_ue8m0,
    };
    stream.launch(op, entry, &config, &args)
}

/// The entry of a kernel for a format of data, an output type and a kind of scales.
macro_rules! entries {
    ($kernel:ident, $plan:expr, $per_channel:expr) => {{
        use SfLayout::{ColMajor, ColMajorE4m3, ColMajorPacked, PerChannelPacked, RowMajor, RowMajorE4m3, RowMajorPacked};
        use k::$kernel as e;
        let [e4m3_bf16, e4m3_f32, e2m1_bf16, e2m1_f32] = match $plan.layout {
            RowMajor | ColMajor => [&e::e4m3_bf16_f32, &e::e4m3_f32_f32, &e::e2m1_bf16_f32, &e::e2m1_f32_f32],
            ColMajorPacked | RowMajorPacked => [&e::e4m3_bf16_ue8m0, &e::e4m3_f32_ue8m0, &e::e2m1_bf16_ue8m0, &e::e2m1_f32_ue8m0],
            RowMajorE4m3 | ColMajorE4m3 => [&e::e4m3_bf16_e4m3, &e::e4m3_f32_e4m3, &e::e2m1_bf16_e4m3, &e::e2m1_f32_e4m3],
            PerChannelPacked => $per_channel,
        };
        match ($plan.format, $plan.out) {
            (Format::E4m3, DType::Bf16) => e4m3_bf16,
            (Format::E4m3, _) => e4m3_f32,
            (Format::E2m1, DType::Bf16) => e2m1_bf16,
            (Format::E2m1, _) => e2m1_f32,
        }
    }};
}

fn wide_entry(plan: &Plan) -> &'static Entry<k::wide::Args> {
    // Blocks of one channel never come here, and no others have such scales.
    entries!(wide, plan, [&e::e4m3_bf16_f32, &e::e4m3_f32_f32, &e::e2m1_bf16_f32, &e::e2m1_f32_f32])
}

fn staged_entry(plan: &Plan) -> &'static Entry<k::staged::Args> {
    match plan.layout {
        SfLayout::RowMajorE4m3 | SfLayout::ColMajorE4m3 => &k::staged::e4m3,
        layout if layout.is_packed() => &k::staged::ue8m0,
        _ => &k::staged::f32,
    }
}

fn narrow_entry(plan: &Plan) -> &'static Entry<k::narrow::Args> {
    entries!(
        narrow,
        plan,
        [&e::e4m3_bf16_per_channel, &e::e4m3_f32_per_channel, &e::e2m1_bf16_per_channel, &e::e2m1_f32_per_channel]
    )
}
