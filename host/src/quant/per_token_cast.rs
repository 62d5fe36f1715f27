//! Launchers of `per_token_cast`, `per_token_cast_with_sf_only` and `per_token_cast_with_precomputed_sf`.

use super::{Format, Input, Sf, SfLayout, SfMut, SfStrides};
use crate::{DType, Error, Result, Stream, TensorMut, TensorRef, View, check};
use ferrotile_kernels::device::Out;
use ferrotile_kernels::entry::Entry;
use ferrotile_kernels::launch::LaunchConfig;
use ferrotile_kernels::quant::per_token_cast as k;

/// Arguments of [`per_token_cast`].
#[derive(Debug)]
pub struct Args<'a> {
    /// bf16 or f32 `(T, H)`, or a quantised tensor; rows may lie any distance apart.
    pub x: Input<'a>,
    /// Channels that share a scale: 16, 32, 64, 128, or `H` for one scale a row (plain input, `H % 64 == 0`).
    pub npc: u32,
    /// Make every scale a power of two. Packed layouts need it, e4m3 layouts exclude it.
    pub round_sf: bool,
    /// Round the data stochastically instead of to nearest. Not with one scale a row.
    pub stochastic: bool,
    /// Quantised values: e4m3 `(T, H)` or e2m1x2 `(T, H / 2)`, contiguous.
    pub out: TensorMut<'a>,
    /// Scale factors, see [`sf_shape`](super::sf_shape) with the block `(1, npc)`.
    pub sf: SfMut<'a>,
}

/// Arguments of [`per_token_cast_with_sf_only`].
#[derive(Debug)]
pub struct SfOnlyArgs<'a> {
    /// bf16 or f32 `(T, H)`; rows may lie any distance apart.
    pub x: TensorRef<'a>,
    /// What the scales are for.
    pub format: Format,
    /// Channels that share a scale: 16, 32, 64 or 128.
    pub npc: u32,
    /// Make every scale a power of two. Packed layouts need it, e4m3 layouts exclude it.
    pub round_sf: bool,
    /// Scale factors, see [`sf_shape`](super::sf_shape) with the block `(1, npc)`.
    pub sf: SfMut<'a>,
}

/// Arguments of [`per_token_cast_with_precomputed_sf`].
#[derive(Debug)]
pub struct PrecomputedArgs<'a> {
    /// bf16 or f32 `(T, H)`; rows may lie any distance apart.
    pub x: TensorRef<'a>,
    /// Scale factors, f32 or e4m3, row-major or column-major.
    pub sf: Sf<'a>,
    /// Channels that share a scale: 16, 32, 64 or 128.
    pub npc: u32,
    /// Quantised values: e4m3 `(T, H)` or e2m1x2 `(T, H / 2)`, contiguous.
    pub out: TensorMut<'a>,
}

/// Quantise rows, with one scale factor for each `npc` consecutive channels of a token, or one for each token.
///
/// | tensor | dtype | shape | layout |
/// |---|---|---|---|
/// | `x`, plain | bf16 or f32 | `(T, H)` | last stride 1, any row stride |
/// | `x`, quantised | e4m3, or e2m1x2 with two values a byte | `(T, H)`, or `(T, H / 2)` | last stride 1, any row stride |
/// | its scales | f32, e4m3, or ue8m0x4 in a packed layout | one for each block of `x` | see [`SfLayout`], any pitch |
/// | `out` | e4m3, or e2m1x2 | `(T, H)`, or `(T, H / 2)` | contiguous |
/// | `sf` | f32, e4m3, or ue8m0x4 in a packed layout | `(T, K)`, or `(T, ceil(K / 4))`, with `K = ceil(H / npc)` | see [`SfLayout`] |
///
/// With `amax` the largest magnitude of a group, `Q` the format's largest value and `c = max(amax, c_min)` (`c_min` 1e-4 for e4m3,
/// `6 * 2^-126` for e2m1): `sf = c / Q` and `q = x * (Q / c)`; with `round_sf`, `sf` is the smallest power of two that is not below
/// `c / Q` and `q = x / sf`. In an e4m3 layout `c_min` is `Q / 512`, `sf` is the e4m3 nearest to `c / Q`, at most 448, and
/// `q = x * (1 / sf)`, which saturates where `sf` was rounded down. Each step is one f32 operation; `q` is rounded to nearest even and
/// saturates. A last group of fewer than `npc` channels uses what there is. The sign of zero is kept. NaN does not count for a scale
/// and becomes `0x7F` in e4m3, 6 or -6 in e2m1; infinities are the caller's mistake (with e4m3 scales they become the largest
/// value). Unused bytes of a last packed word are written as 0; padding between columns of scales is not touched. A quantised input
/// stands for `x * x_sf`, and `q = x * (x_sf * (Q / c))`. Source: the specification's sections 1 to 4 and 5.1, what was added to
/// that from 6.1.
///
/// With `stochastic`, `q` becomes one of its two neighbours, the farther from zero with the probability that its distance from the nearer
/// says, to 16 bits; a value of the format stays itself, and NaN becomes `0x7F` or 6. The random bits are a hash of four
/// consecutive products `q` and of their place in the row (not of the row), so equal input gives equal output; channels beyond the
/// end of a row that is no multiple of 4 count as 0 in it. Source: 6.3.
///
/// The block of a quantised input is a power of two of tokens, or all of them, by a power of two of at least 16 channels, or all.
///
/// Asynchronous; allocates nothing; an empty `x` launches nothing. Any `H` (even for e2m1) and any alignment works; it is fast when
/// rows of `x` are whole numbers of 16-byte words and start at multiples of 16 bytes (8 for e2m1).
///
/// # Errors
/// [`Shape`](Error::Shape) when shapes do not belong together, [`DType`](Error::DType), [`Layout`](Error::Layout) for strides and
/// alignment, [`Value`](Error::Value) for `npc`, the block of the input, packed scales that are not rounded, e4m3 scales that are, stochastic
/// rounding with one scale a row, an odd `H` with e2m1, or sizes beyond 31 bits, [`DeviceMismatch`](Error::DeviceMismatch), [`Overlap`](Error::Overlap) of an output with another argument,
/// [`Driver`](Error::Driver). The outputs are untouched then.
///
/// ```
/// use ferrotile::quant::{Input, SfLayout, SfMut, per_token_cast, sf_shape};
/// use ferrotile::{Device, E4m3, Ue8m0x4};
///
/// let device = Device::emulator();
/// // Two tokens of 64 channels, four groups of 16 each.
/// let mut x = vec![0.5f32; 2 * 64];
/// x[127] = 448.0;
/// let x = device.upload(&x)?;
/// let layout = sf_shape(2, 64, (1, 16), SfLayout::ColMajorPacked);
/// let (mut out, mut sf) = (device.alloc::<E4m3>(2 * 64)?, device.alloc::<Ue8m0x4>(layout.elements as usize)?);
/// per_token_cast::per_token_cast(
///     &device.stream()?,
///     per_token_cast::Args {
///         x: Input::Plain(x.tensor(&[2, 64])?),
///         npc: 16,
///         round_sf: true,
///         stochastic: false,
///         out: out.tensor_mut(&[2, 64])?,
///         sf: SfMut { tensor: sf.strided_mut(&layout.shape, &layout.strides, 0)?, layout: SfLayout::ColMajorPacked },
///     },
/// )?;
/// // 0.5 / 448 rounded up is 2^-9, 448 / 448 is 2^0; exponents are stored with 127 added.
/// let sf = sf.to_vec()?;
/// assert_eq!((sf[0].0.to_le_bytes(), sf[1].0.to_le_bytes()), ([118; 4], [118, 118, 118, 127]));
/// // 0.5 * 2^9 = 256, and in the last group 0.5 and 448 as they are.
/// let out = out.to_vec()?;
/// assert_eq!([out[0].0, out[126].0, out[127].0], [0x78, 0x30, 0x7E]);
/// # Ok::<(), ferrotile::Error>(())
/// ```
pub fn per_token_cast(stream: &Stream, args: Args<'_>) -> Result<()> {
    let op = "per_token_cast";
    match args.x {
        Input::Plain(x) => cast_plain(op, stream, x, &args),
        Input::Quantised { data, sf, block } => cast_quantised(op, stream, data, sf, block, &args),
    }
}

/// The scale factors that [`per_token_cast`] would store for plain input, without the data.
///
/// # Errors
/// Those of [`per_token_cast`]; one scale for a whole row is not among the values of `npc` here.
///
/// ```
/// use ferrotile::quant::{Format, SfLayout, SfMut, per_token_cast, sf_shape};
/// use ferrotile::Device;
///
/// let device = Device::emulator();
/// let x = device.upload(&[3.0f32; 64])?;
/// let layout = sf_shape(1, 64, (1, 32), SfLayout::RowMajor);
/// let mut sf = device.alloc::<f32>(layout.elements as usize)?;
/// per_token_cast::per_token_cast_with_sf_only(
///     &device.stream()?,
///     per_token_cast::SfOnlyArgs {
///         x: x.tensor(&[1, 64])?,
///         format: Format::E2m1,
///         npc: 32,
///         round_sf: false,
///         sf: SfMut { tensor: sf.tensor_mut(&layout.shape)?, layout: SfLayout::RowMajor },
///     },
/// )?;
/// assert_eq!(sf.to_vec()?, [0.5, 0.5]);
/// # Ok::<(), ferrotile::Error>(())
/// ```
pub fn per_token_cast_with_sf_only(stream: &Stream, args: SfOnlyArgs<'_>) -> Result<()> {
    let op = "per_token_cast_with_sf_only";
    let rows = Rows::new(op, &args.x, &[DType::Bf16, DType::F32])?;
    rows.check_even(op, args.format)?;
    check::one_of(op, "npc", args.npc, &GROUPS)?;
    let group = rows.check_sf(op, &args.sf, SF_LAYOUTS, args.npc, args.round_sf)?;
    check::same_device(op, stream, &[("x", &args.x), ("sf", &args.sf.tensor)])?;
    check::no_overlap(op, ("x", &args.x), ("sf", &args.sf.tensor))?;
    if args.x.is_empty() {
        return Ok(());
    }
    launch_cast(op, stream, &rows, group, args.format, None, args.sf.tensor.output(), false)
}

/// Quantise with given scale factors: `q = x * (1 / sf)`, the quotient and the product rounded to f32, then rounded and saturated as
/// by [`per_token_cast`].
///
/// With the scales that [`per_token_cast`] made, the data are the same if they are powers of two (`round_sf`) or e4m3; otherwise `1 / sf`
/// may differ from `Q / c` in the last bit. A scale of 0 makes every value but 0 the largest, and 0 NaN.
///
/// # Errors
/// Those of [`per_token_cast`]; one scale for a whole row is not among the values of `npc` here, and packed scales are a
/// [`Layout`](Error::Layout).
///
/// ```
/// use ferrotile::quant::{Sf, SfLayout, per_token_cast};
/// use ferrotile::{Device, E2m1x2};
///
/// let device = Device::emulator();
/// let (x, sf) = (device.upload(&[12.0f32; 64])?, device.upload(&[4.0f32, 1.0])?);
/// let mut out = device.alloc::<E2m1x2>(32)?;
/// per_token_cast::per_token_cast_with_precomputed_sf(
///     &device.stream()?,
///     per_token_cast::PrecomputedArgs {
///         x: x.tensor(&[1, 64])?,
///         sf: Sf { tensor: sf.tensor(&[1, 2])?, layout: SfLayout::RowMajor },
///         npc: 32,
///         out: out.tensor_mut(&[1, 32])?,
///     },
/// )?;
/// // 12 / 4 = 3 is code 5; 12 saturates to 6, code 7.
/// let out = out.to_vec()?;
/// assert_eq!((out[0].0, out[16].0), (0x55, 0x77));
/// # Ok::<(), ferrotile::Error>(())
/// ```
pub fn per_token_cast_with_precomputed_sf(stream: &Stream, args: PrecomputedArgs<'_>) -> Result<()> {
    let op = "per_token_cast_with_precomputed_sf";
    let rows = Rows::new(op, &args.x, &[DType::Bf16, DType::F32])?;
    let format = rows.check_out(op, &args.out)?;
    check::one_of(op, "npc", args.npc, &GROUPS)?;
    let allowed = &[SfLayout::RowMajor, SfLayout::ColMajor, SfLayout::RowMajorE4m3, SfLayout::ColMajorE4m3];
    let sf = args.sf.check(op, "sf", allowed, (rows.num_tokens.into(), rows.num_groups(args.npc)))?;
    check::same_device(op, stream, &[("x", &args.x), ("sf", &args.sf.tensor), ("out", &args.out)])?;
    check::no_overlaps(op, &[("x", &args.x), ("sf", &args.sf.tensor)], &[("out", &args.out)])?;
    if args.x.is_empty() {
        return Ok(());
    }
    use k::apply as e;
    let wide = rows.is_wide(format, Some(&args.out));
    let entry = match (rows.source, format, wide) {
        (Source::F32, Format::E4m3, true) => &e::f32_e4m3,
        (Source::F32, Format::E2m1, true) => &e::f32_e2m1,
        (Source::F32, Format::E4m3, false) => &e::f32_e4m3_narrow,
        (Source::F32, Format::E2m1, false) => &e::f32_e2m1_narrow,
        (_, Format::E4m3, true) => &e::bf16_e4m3,
        (_, Format::E2m1, true) => &e::bf16_e2m1,
        (_, Format::E4m3, false) => &e::bf16_e4m3_narrow,
        (_, Format::E2m1, false) => &e::bf16_e2m1_narrow,
    };
    let kernel_args = e::Args {
        x: args.x.input(),
        sf: args.sf.tensor.input(),
        out: args.out.output(),
        x_stride: rows.stride_bytes,
        num_tokens: rows.num_tokens,
        hidden: rows.hidden,
        npc_log2: args.npc.trailing_zeros(),
        sf_row_stride: sf.row,
        sf_col_stride: sf.col,
        sf_e4m3: args.sf.layout.is_e4m3().into(),
    };
    let shape = if wide { k::APPLY_SHAPE } else { k::NARROW_SHAPE };
    stream.launch(op, entry, &rows.config(shape), &kernel_args)
}

/// Numbers of channels that may share a scale, besides a whole row.
const GROUPS: [u32; 4] = [16, 32, 64, 128];

/// What scales may be, of an output with groups of channels and of a quantised input.
const SF_LAYOUTS: &[SfLayout] = &[
    SfLayout::RowMajor,
    SfLayout::ColMajor,
    SfLayout::ColMajorPacked,
    SfLayout::RowMajorPacked,
    SfLayout::RowMajorE4m3,
    SfLayout::ColMajorE4m3,
];

/// As many rows count as few.
const FEW_ROWS: u32 = 128;
/// The same for e4m3 on its way to e4m3: of 128 rows, blocks of one take longer.
const FEW_E4M3_ROWS: u32 = 32;

/// How the output is scaled.
#[derive(Clone, Copy)]
struct Group {
    npc: u32,
    /// One of the kernels' rules.
    rule: u32,
    sf: SfStrides,
    packed: bool,
}

fn cast_plain(op: &'static str, stream: &Stream, x: TensorRef<'_>, args: &Args<'_>) -> Result<()> {
    let rows = Rows::new(op, &x, &[DType::Bf16, DType::F32])?;
    let format = rows.check_out(op, &args.out)?;
    // An empty row has no groups; whatever `npc` is, it is none of a whole row.
    let whole_row = args.npc == rows.hidden && rows.hidden > 0 && !GROUPS.contains(&args.npc);
    if whole_row {
        check::divisible(op, "npc for a whole row", args.npc.into(), 64)?;
        check::one_of(op, "stochastic with one scale a row", args.stochastic, &[false])?;
    } else if !GROUPS.contains(&args.npc) {
        let allowed = format!("16, 32, 64, 128, or hidden ({})", rows.hidden);
        return Err(Error::Value { op, arg: "npc", allowed, got: args.npc.to_string() });
    }
    let layouts = if whole_row { SfLayout::COMMON } else { SF_LAYOUTS };
    let group = rows.check_sf(op, &args.sf, layouts, args.npc, args.round_sf)?;
    check::same_device(op, stream, &[("x", &x), ("out", &args.out), ("sf", &args.sf.tensor)])?;
    check::no_overlaps(op, &[("x", &x)], &[("out", &args.out), ("sf", &args.sf.tensor)])?;
    if x.is_empty() {
        return Ok(());
    }
    if whole_row {
        launch_rows(op, stream, &rows, group, format, &args.out, args.sf.tensor.output())
    } else {
        launch_cast(op, stream, &rows, group, format, Some(&args.out), args.sf.tensor.output(), args.stochastic)
    }
}

/// Whether there are so few rows that blocks of several of them would leave multiprocessors idle.
fn few(rows: &Rows) -> bool {
    rows.num_tokens <= FEW_ROWS
}

/// Groups of `npc` channels; without `out` only the scales.
#[allow(clippy::too_many_arguments)]
fn launch_cast(
    op: &'static str,
    stream: &Stream,
    rows: &Rows,
    group: Group,
    format: Format,
    out: Option<&TensorMut<'_>>,
    sf: Out<u8>,
    stochastic: bool,
) -> Result<()> {
    let wide = rows.is_wide(format, out.map(|out| &**out));
    let f32_input = rows.source == Source::F32;
    let with_data = out.is_some().into();
    let out = out.map_or(Out::null(), |out| out.output());
    if wide && !stochastic {
        use k::cast as e;
        let entry: &'static Entry<e::Args> = match (f32_input, format, group.rule) {
            (true, Format::E4m3, k::EXACT) => &e::f32_e4m3,
            (true, Format::E4m3, k::POWERS) => &e::f32_e4m3_round,
            (true, Format::E4m3, _) => &e::f32_e4m3_sf8,
            (true, Format::E2m1, k::EXACT) => &e::f32_e2m1,
            (true, Format::E2m1, k::POWERS) => &e::f32_e2m1_round,
            (true, Format::E2m1, _) => &e::f32_e2m1_sf8,
            (false, Format::E4m3, k::EXACT) => &e::bf16_e4m3,
            (false, Format::E4m3, k::POWERS) => &e::bf16_e4m3_round,
            (false, Format::E4m3, _) => &e::bf16_e4m3_sf8,
            (false, Format::E2m1, k::EXACT) => &e::bf16_e2m1,
            (false, Format::E2m1, k::POWERS) => &e::bf16_e2m1_round,
            (false, Format::E2m1, _) => &e::bf16_e2m1_sf8,
        };
        let shape = if f32_input { k::F32_SHAPE } else { k::BF16_SHAPE };
        let (entry, shape) = match (f32_input, format, group.rule) {
            _ if !few(rows) => (entry, shape),
            (true, Format::E4m3, k::EXACT) => (&e::f32_e4m3_few, k::FEW_F32_SHAPE),
            (true, Format::E4m3, k::POWERS) => (&e::f32_e4m3_round_few, k::FEW_F32_SHAPE),
            (false, Format::E4m3, k::EXACT) => (&e::bf16_e4m3_few, k::FEW_BF16_SHAPE),
            (false, Format::E4m3, k::POWERS) => (&e::bf16_e4m3_round_few, k::FEW_BF16_SHAPE),
            _ => (entry, shape),
        };
        let kernel_args = e::Args {
            x: rows.view.input(),
            out,
            sf,
            x_stride: rows.stride_bytes,
            num_tokens: rows.num_tokens,
            hidden: rows.hidden,
            npc_log2: group.npc.trailing_zeros(),
            with_data,
            sf_row_stride: group.sf.row,
            sf_col_stride: group.sf.col,
            sf_packed: group.packed.into(),
        };
        return stream.launch(op, entry, &rows.config(shape), &kernel_args);
    }
    use k::cast_any as e;
    let entry: &'static Entry<e::Args> = match (f32_input, format, stochastic) {
        (true, Format::E4m3, false) => &e::f32_e4m3,
        (true, Format::E4m3, true) => &e::f32_e4m3_stochastic,
        (true, Format::E2m1, false) => &e::f32_e2m1,
        (true, Format::E2m1, true) => &e::f32_e2m1_stochastic,
        (false, Format::E4m3, false) => &e::bf16_e4m3,
        (false, Format::E4m3, true) => &e::bf16_e4m3_stochastic,
        (false, Format::E2m1, false) => &e::bf16_e2m1,
        (false, Format::E2m1, true) => &e::bf16_e2m1_stochastic,
    };
    let kernel_args = e::Args {
        x: rows.view.input(),
        out,
        sf,
        x_stride: rows.stride_bytes,
        num_tokens: rows.num_tokens,
        hidden: rows.hidden,
        npc_log2: group.npc.trailing_zeros(),
        with_data,
        sf_row_stride: group.sf.row,
        sf_col_stride: group.sf.col,
        sf_packed: group.packed.into(),
        rule: group.rule,
        wide: wide.into(),
    };
    let shape = if f32_input { k::ANY_F32_SHAPE } else { k::ANY_BF16_SHAPE };
    stream.launch(op, entry, &rows.config(shape), &kernel_args)
}

/// One scale a row.
fn launch_rows(
    op: &'static str,
    stream: &Stream,
    rows: &Rows,
    group: Group,
    format: Format,
    out: &TensorMut<'_>,
    sf: Out<u8>,
) -> Result<()> {
    use k::rows as e;
    let round = group.rule == k::POWERS;
    let entry: &'static Entry<e::Args> = match (rows.source, format, rows.is_wide(format, Some(out)), round) {
        (Source::F32, Format::E4m3, true, false) => &e::f32_e4m3,
        (Source::F32, Format::E4m3, true, true) => &e::f32_e4m3_round,
        (Source::F32, Format::E2m1, true, false) => &e::f32_e2m1,
        (Source::F32, Format::E2m1, true, true) => &e::f32_e2m1_round,
        (Source::F32, Format::E4m3, false, _) => &e::f32_e4m3_narrow,
        (Source::F32, Format::E2m1, false, _) => &e::f32_e2m1_narrow,
        (_, Format::E4m3, true, false) => &e::bf16_e4m3,
        (_, Format::E4m3, true, true) => &e::bf16_e4m3_round,
        (_, Format::E2m1, true, false) => &e::bf16_e2m1,
        (_, Format::E2m1, true, true) => &e::bf16_e2m1_round,
        (_, Format::E4m3, false, _) => &e::bf16_e4m3_narrow,
        (_, Format::E2m1, false, _) => &e::bf16_e2m1_narrow,
    };
    let kernel_args = e::Args {
        x: rows.view.input(),
        out: out.output(),
        sf,
        x_stride: rows.stride_bytes,
        hidden: rows.hidden,
        round: group.rule,
        sf_row_stride: group.sf.row,
        sf_packed: group.packed.into(),
    };
    let config = match rows.source {
        Source::F32 => k::rows_config::<k::F32>(rows.num_tokens, rows.hidden),
        _ => k::rows_config::<k::Bf16>(rows.num_tokens, rows.hidden),
    };
    stream.launch(op, entry, &config, &kernel_args)
}

fn cast_quantised(
    op: &'static str,
    stream: &Stream,
    x: TensorRef<'_>,
    x_sf: Sf<'_>,
    block: (u32, u32),
    args: &Args<'_>,
) -> Result<()> {
    let rows = Rows::new(op, &x, &[DType::E4m3, DType::E2m1x2])?;
    let format = rows.check_out(op, &args.out)?;
    check::one_of(op, "npc with quantised input", args.npc, &GROUPS)?;
    let x_npt_log2 = block_log2(op, "npt of the input's block", block.0, 1, rows.num_tokens)?;
    let x_npc_log2 = block_log2(op, "npc of the input's block", block.1, 16, rows.hidden)?;
    let x_strides = x_sf.check(op, "x_sf", SF_LAYOUTS, (rows.num_tokens.div_ceil(block.0).into(), rows.num_groups(block.1)))?;
    let group = rows.check_sf(op, &args.sf, SF_LAYOUTS, args.npc, args.round_sf)?;
    let (out, x_sf_tensor, sf_tensor) = (&args.out, &x_sf.tensor, &args.sf.tensor);
    check::same_device(op, stream, &[("x", &x), ("x_sf", x_sf_tensor), ("out", out), ("sf", sf_tensor)])?;
    check::no_overlaps(op, &[("x", &x), ("x_sf", x_sf_tensor)], &[("out", out), ("sf", sf_tensor)])?;
    if x.is_empty() {
        return Ok(());
    }
    let wide = rows.is_wide(format, Some(out));
    let from_e2m1 = rows.source == Source::E2m1;
    if wide && !args.stochastic && !x_sf.layout.is_e4m3() && group.rule != k::E4M3_SF {
        use k::recast as e;
        let entry: &'static Entry<e::Args> = match (from_e2m1, format, args.round_sf) {
            (true, Format::E4m3, false) => &e::e2m1_e4m3,
            (true, Format::E4m3, true) => &e::e2m1_e4m3_round,
            (true, Format::E2m1, false) => &e::e2m1_e2m1,
            (true, Format::E2m1, true) => &e::e2m1_e2m1_round,
            (false, Format::E4m3, false) => &e::e4m3_e4m3,
            (false, Format::E4m3, true) => &e::e4m3_e4m3_round,
            (false, Format::E2m1, false) => &e::e4m3_e2m1,
            (false, Format::E2m1, true) => &e::e4m3_e2m1_round,
        };
        let wide_32 = rows.is_wide_in::<k::E2m1x32>(format, Some(out)) && args.npc >= 32 && x_npc_log2 >= 5;
        let (entry, config) = if from_e2m1 && format == Format::E2m1 && wide_32 && args.round_sf {
            let config = k::tile_config::<k::E2m1x32>(k::PAIRS_SHAPE, rows.num_tokens, rows.hidden);
            (&e::e2m1x32_e2m1_round, config)
        } else if !from_e2m1 && format == Format::E4m3 {
            match (rows.num_tokens <= FEW_E4M3_ROWS, args.round_sf) {
                (true, false) => (&e::e4m3_e4m3_few, rows.config(k::FEW_E4M3_SHAPE)),
                (true, true) => (&e::e4m3_e4m3_round_few, rows.config(k::FEW_E4M3_SHAPE)),
                (false, _) => (entry, rows.config(k::E4M3_SHAPE)),
            }
        } else {
            (entry, rows.config(k::QUANTISED_SHAPE))
        };
        let kernel_args = e::Args {
            x: x.input(),
            x_sf: x_sf_tensor.input(),
            out: out.output(),
            sf: sf_tensor.output(),
            x_stride: rows.stride_bytes,
            num_tokens: rows.num_tokens,
            hidden: rows.hidden,
            npc_log2: args.npc.trailing_zeros(),
            x_sf_row_stride: x_strides.row,
            x_sf_col_stride: x_strides.col,
            x_sf_packed: x_sf.layout.is_packed().into(),
            x_npt_log2,
            x_npc_log2,
            sf_row_stride: group.sf.row,
            sf_col_stride: group.sf.col,
            sf_packed: group.packed.into(),
        };
        return stream.launch(op, entry, &config, &kernel_args);
    }
    use k::recast_any as e;
    let entry: &'static Entry<e::Args> = match (from_e2m1, format, args.stochastic) {
        (true, Format::E4m3, false) => &e::e2m1_e4m3,
        (true, Format::E4m3, true) => &e::e2m1_e4m3_stochastic,
        (true, Format::E2m1, false) => &e::e2m1_e2m1,
        (true, Format::E2m1, true) => &e::e2m1_e2m1_stochastic,
        (false, Format::E4m3, false) => &e::e4m3_e4m3,
        (false, Format::E4m3, true) => &e::e4m3_e4m3_stochastic,
        (false, Format::E2m1, false) => &e::e4m3_e2m1,
        (false, Format::E2m1, true) => &e::e4m3_e2m1_stochastic,
    };
    let x_sf_kind = match (x_sf.layout.is_packed(), x_sf.layout.is_e4m3()) {
        (true, _) => k::X_SF_PACKED,
        (_, true) => k::X_SF_E4M3,
        _ => k::X_SF_F32,
    };
    let kernel_args = e::Args {
        x: x.input(),
        x_sf: x_sf_tensor.input(),
        out: out.output(),
        sf: sf_tensor.output(),
        x_stride: rows.stride_bytes,
        num_tokens: rows.num_tokens,
        hidden: rows.hidden,
        npc_log2: args.npc.trailing_zeros(),
        x_sf_row_stride: x_strides.row,
        x_sf_col_stride: x_strides.col,
        x_sf_kind,
        x_npt_log2,
        x_npc_log2,
        sf_row_stride: group.sf.row,
        sf_col_stride: group.sf.col,
        sf_packed: group.packed.into(),
        rule: group.rule,
        wide: wide.into(),
    };
    stream.launch(op, entry, &rows.config(k::ANY_QUANTISED_SHAPE), &kernel_args)
}

/// Logarithm of one side of the input's block: a power of two from `least` on, or anything that covers all of `size`.
fn block_log2(op: &'static str, arg: &'static str, value: u32, least: u32, size: u32) -> Result<u32> {
    if value.is_power_of_two() && value >= least {
        return Ok(value.trailing_zeros());
    }
    if value > 0 && value >= size {
        // Sizes have 31 bits, so a shift by that many gives block 0.
        return Ok(31);
    }
    let allowed = format!("powers of two from {least} on, or at least {size}");
    Err(Error::Value { op, arg, allowed, got: value.to_string() })
}

/// What the input holds.
#[derive(Clone, Copy, PartialEq)]
enum Source {
    Bf16,
    F32,
    E4m3,
    E2m1,
}

/// What the checks of the input found out.
struct Rows {
    view: View,
    source: Source,
    num_tokens: u32,
    hidden: u32,
    /// Bytes from one row to the next.
    stride_bytes: u64,
}

impl Rows {
    fn new(op: &'static str, x: &View, allowed: &[DType]) -> Result<Self> {
        check::rank(op, "x", x, 2)?;
        check::dtype(op, "x", x, allowed)?;
        let source = match x.dtype() {
            DType::Bf16 => Source::Bf16,
            DType::F32 => Source::F32,
            DType::E4m3 => Source::E4m3,
            _ => Source::E2m1,
        };
        let hidden = if source == Source::E2m1 { x.dim(1).saturating_mul(2) } else { x.dim(1) };
        // Kernels count rows and channels, rounded up to tiles, with 32 bits.
        check::in_range(op, "num_tokens", x.dim(0), 0, i32::MAX as u64)?;
        check::in_range(op, "hidden", hidden, 0, i32::MAX as u64)?;
        check::last_stride_1(op, "x", x)?;
        check::aligned(op, "x", x, x.dtype().size())?;
        let stride_bytes = if x.dim(0) <= 1 || x.is_empty() { 0 } else { x.stride(0) * x.dtype().size() };
        Ok(Self { view: *x, source, num_tokens: x.dim(0) as u32, hidden: hidden as u32, stride_bytes })
    }

    /// Groups of a row.
    fn num_groups(&self, npc: u32) -> u64 {
        self.hidden.div_ceil(npc).into()
    }

    fn check_even(&self, op: &'static str, format: Format) -> Result<()> {
        // Two FP4 values share a byte.
        if format == Format::E2m1 { check::divisible(op, "hidden", self.hidden.into(), 2) } else { Ok(()) }
    }

    fn check_out(&self, op: &'static str, out: &View) -> Result<Format> {
        check::dtype(op, "out", out, &[DType::E4m3, DType::E2m1x2])?;
        let format = if out.dtype() == DType::E4m3 { Format::E4m3 } else { Format::E2m1 };
        self.check_even(op, format)?;
        check::shape(op, "out", out, &[self.num_tokens.into(), format.columns(self.hidden.into())])?;
        check::contiguous(op, "out", out)?;
        Ok(format)
    }

    fn check_sf(&self, op: &'static str, sf: &SfMut<'_>, allowed: &[SfLayout], npc: u32, round_sf: bool) -> Result<Group> {
        let (packed, e4m3) = (sf.layout.is_packed(), sf.layout.is_e4m3());
        if (packed && !round_sf) || (e4m3 && round_sf) {
            let allowed = format!("{} with {} scales", !round_sf, sf.layout);
            return Err(Error::Value { op, arg: "round_sf", allowed, got: round_sf.to_string() });
        }
        let strides = sf.check(op, "sf", allowed, (self.num_tokens.into(), self.num_groups(npc)))?;
        let rule = if e4m3 {
            k::E4M3_SF
        } else if round_sf {
            k::POWERS
        } else {
            k::EXACT
        };
        Ok(Group { npc, rule, sf: strides, packed })
    }

    /// Whether rows are whole numbers of aligned vectors, on both sides.
    fn is_wide(&self, format: Format, out: Option<&View>) -> bool {
        match self.source {
            Source::Bf16 => self.is_wide_in::<k::Bf16>(format, out),
            Source::F32 => self.is_wide_in::<k::F32>(format, out),
            Source::E4m3 => self.is_wide_in::<k::E4m3>(format, out),
            Source::E2m1 => self.is_wide_in::<k::E2m1>(format, out),
        }
    }

    fn is_wide_in<S: k::Source>(&self, format: Format, out: Option<&View>) -> bool {
        let vector = (S::CHANNELS * S::BITS / 8) as u64;
        let out_vector = format.columns(S::CHANNELS.into());
        self.hidden.is_multiple_of(S::CHANNELS)
            && self.view.ptr().is_multiple_of(vector)
            && self.stride_bytes.is_multiple_of(vector)
            && out.is_none_or(|out| out.ptr().is_multiple_of(out_vector))
    }

    fn config(&self, shape: k::Shape) -> LaunchConfig {
        match self.source {
            Source::Bf16 => k::tile_config::<k::Bf16>(shape, self.num_tokens, self.hidden),
            Source::F32 => k::tile_config::<k::F32>(shape, self.num_tokens, self.hidden),
            Source::E4m3 => k::tile_config::<k::E4m3>(shape, self.num_tokens, self.hidden),
            Source::E2m1 => k::tile_config::<k::E2m1>(shape, self.num_tokens, self.hidden),
        }
    }
}
