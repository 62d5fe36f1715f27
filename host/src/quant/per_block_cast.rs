//! Launchers of `per_block_cast`, `per_block_cast_with_sf_only` and `per_block_cast_with_precomputed_sf`.

use super::{Format, Sf, SfLayout, SfMut, SfStrides};
use crate::{DType, Error, Result, Stream, TensorMut, TensorRef, View, check};
use ferrotile_kernels::launch::LaunchConfig;
use ferrotile_kernels::quant::per_block_cast as k;

/// Arguments of [`per_block_cast`].
#[derive(Debug)]
pub struct Args<'a> {
    /// bf16 or f32 `(T, H)`, `H % 64 == 0`; rows may lie any distance apart.
    pub x: TensorRef<'a>,
    /// Tokens and channels that share a scale, `(npt, npc)`: 32 or 128 each.
    pub block: (u32, u32),
    /// Make every scale a power of two. Packed layouts need it.
    pub round_sf: bool,
    /// Quantised values: e4m3 `(T, H)` or e2m1x2 `(T, H / 2)`, contiguous.
    pub out: TensorMut<'a>,
    /// Scale factors, see [`sf_shape`](super::sf_shape).
    pub sf: SfMut<'a>,
}

/// Arguments of [`per_block_cast_with_sf_only`].
#[derive(Debug)]
pub struct SfOnlyArgs<'a> {
    /// bf16 or f32 `(T, H)`, `H % 64 == 0`; rows may lie any distance apart.
    pub x: TensorRef<'a>,
    /// What the scales are for.
    pub format: Format,
    /// Tokens and channels that share a scale, `(npt, npc)`: 32 or 128 each.
    pub block: (u32, u32),
    /// Make every scale a power of two. Packed layouts need it.
    pub round_sf: bool,
    /// Scale factors, see [`sf_shape`](super::sf_shape).
    pub sf: SfMut<'a>,
}

/// Arguments of [`per_block_cast_with_precomputed_sf`].
#[derive(Debug)]
pub struct PrecomputedArgs<'a> {
    /// bf16 or f32 `(T, H)`, `H % 64 == 0`; rows may lie any distance apart.
    pub x: TensorRef<'a>,
    /// Scale factors, in the row-major layout.
    pub sf: Sf<'a>,
    /// Tokens and channels that share a scale, `(npt, npc)`: 32 or 128 each.
    pub block: (u32, u32),
    /// Quantised values: e4m3 `(T, H)` or e2m1x2 `(T, H / 2)`, contiguous.
    pub out: TensorMut<'a>,
}

/// The entries of a kernel in the order that [`Plan::pick`] knows.
macro_rules! entries {
    ($($kernel:ident)::+) => {
        [
            &$($kernel)::+::bf16_e4m3,
            &$($kernel)::+::bf16_e2m1,
            &$($kernel)::+::f32_e4m3,
            &$($kernel)::+::f32_e2m1,
            &$($kernel)::+::bf16_e4m3_unaligned,
            &$($kernel)::+::bf16_e2m1_unaligned,
            &$($kernel)::+::f32_e4m3_unaligned,
            &$($kernel)::+::f32_e2m1_unaligned,
        ]
    };
}
/// Quantise with one scale factor for each block of `npt` tokens by `npc` channels, as weights are.
///
/// | tensor | dtype | shape | layout |
/// |---|---|---|---|
/// | `x` | bf16 or f32 | `(T, H)`, `H % 64 == 0` | last stride 1, any row stride |
/// | `out` | e4m3, or e2m1x2 with two values a byte | `(T, H)`, or `(T, H / 2)` | contiguous, 16-byte aligned |
/// | `sf` | f32, or ue8m0x4 in a packed layout | `(M, K)`, or `(M, ceil(K / 4))`, with `M = ceil(T / npt)`, `K = ceil(H / npc)` | see [`SfLayout`] |
///
/// With `amax` the largest magnitude of a block, `Q` the format's largest value and `c = max(amax, c_min)` (`c_min` 1e-4 for e4m3,
/// `6 * 2^-126` for e2m1): `sf = c / Q` and `q = x * (Q / c)`; with `round_sf`, `sf` is the smallest power of two that is not below `c / Q`
/// and `q = x / sf`. Each step is one f32 operation; `q` is rounded to nearest even, ties in the target format included, and
/// saturates. Blocks at the edges (`T % npt != 0`, `H % npc != 0`) use what there is. The sign of zero is kept. NaN does not count for a
/// scale and becomes `0x7F` in e4m3, 6 in e2m1; infinities are the caller's mistake. Unused bytes of a last packed word are
/// written as 0; padding between columns of scales is not touched. Source: the specification's sections 1 to 4 and 5.2.
///
/// Asynchronous; allocates nothing; an empty `x` launches nothing. Any alignment of `x` works; it is fast when its rows start at
/// multiples of 16 bytes.
///
/// # Errors
/// [`Shape`](Error::Shape) when shapes do not belong together, [`DType`](Error::DType), [`Layout`](Error::Layout) for strides and alignment,
/// [`Value`](Error::Value) for `block`, `H % 64 != 0`, packed scales that are not rounded, or sizes beyond 31 bits,
/// [`DeviceMismatch`](Error::DeviceMismatch), [`Overlap`](Error::Overlap) of an output with another argument, [`Driver`](Error::Driver).
/// The outputs are untouched then.
///
/// ```
/// use ferrotile::quant::{SfLayout, SfMut, per_block_cast, sf_shape};
/// use ferrotile::{Device, E4m3};
///
/// let device = Device::emulator();
/// // 40 tokens of 64 channels: two rows and two columns of 32 x 32 blocks.
/// let mut x = vec![0.5f32; 40 * 64];
/// x[39 * 64 + 63] = 448.0;
/// let x = device.upload(&x)?;
/// let layout = sf_shape(40, 64, (32, 32), SfLayout::RowMajor);
/// let (mut out, mut sf) = (device.alloc::<E4m3>(40 * 64)?, device.alloc::<f32>(layout.elements as usize)?);
/// per_block_cast::per_block_cast(
///     &device.stream()?,
///     per_block_cast::Args {
///         x: x.tensor(&[40, 64])?,
///         block: (32, 32),
///         round_sf: true,
///         out: out.tensor_mut(&[40, 64])?,
///         sf: SfMut { tensor: sf.tensor_mut(&layout.shape)?, layout: SfLayout::RowMajor },
///     },
/// )?;
/// // 0.5 / 448 rounded up to a power of two, and 448 / 448.
/// assert_eq!(sf.to_vec()?, [2f32.powi(-9), 2f32.powi(-9), 2f32.powi(-9), 1.0]);
/// // 0.5 * 2^9 = 256; in the last block 0.5 and the largest value.
/// let out = out.to_vec()?;
/// assert_eq!([out[0].0, out[32 * 64 + 32].0, out[39 * 64 + 63].0], [0x78, 0x30, 0x7E]);
/// # Ok::<(), ferrotile::Error>(())
/// ```
pub fn per_block_cast(stream: &Stream, args: Args<'_>) -> Result<()> {
    let op = "per_block_cast";
    let plan = Plan::new(op, &args.x, args.block)?;
    let format = plan.check_out(op, &args.out)?;
    let sf = plan.check_sf(op, &args.sf, args.round_sf)?;
    check::same_device(op, stream, &[("x", &args.x), ("out", &args.out), ("sf", &args.sf.tensor)])?;
    check::no_overlaps(op, &[("x", &args.x)], &[("out", &args.out), ("sf", &args.sf.tensor)])?;
    if args.x.is_empty() {
        return Ok(());
    }
    let round = args.round_sf;
    // Two kernels take the same arguments.
    macro_rules! launch {
        ($kernel:ident, $entry:expr, $config:expr) => {{
            let kernel_args = k::$kernel::Args {
                x: args.x.input(),
                out: args.out.output(),
                sf: args.sf.tensor.output(),
                t: plan.num_tokens,
                h: plan.hidden,
                x_stride: plan.x_stride,
                sf_row: sf.row,
                sf_col: sf.col,
                npt: plan.npt,
                npc: plan.npc,
                round: round.into(),
                packed: args.sf.layout.is_packed().into(),
            };
            stream.launch(op, $entry, &$config, &kernel_args)
        }};
    }
    use k::cast as e;
    let flat = plan.npt == 5 && plan.aligned;
    let few = plan.config(128).num_blocks() <= stream.device().num_sms().into();
    if few && plan.bf16 && format == Format::E4m3 && plan.aligned && !flat {
        return launch!(cast_few, &k::cast_few::ENTRY, k::config(plan.num_tokens, plan.hidden, (128, 128), k::FEW_THREADS));
    }
    let entry = match (plan.bf16, format, plan.aligned) {
        (true, Format::E4m3, true) if flat => &e::bf16_e4m3_flat,
        (true, Format::E4m3, true) => &e::bf16_e4m3,
        (true, Format::E4m3, false) => &e::bf16_e4m3_unaligned,
        (true, Format::E2m1, true) if flat && round => &e::bf16_e2m1_flat_round,
        (true, Format::E2m1, true) if flat => &e::bf16_e2m1_flat,
        (true, Format::E2m1, true) if round => &e::bf16_e2m1_round,
        (false, Format::E4m3, true) if flat => &e::f32_e4m3_flat,
        (false, Format::E4m3, true) => &e::f32_e4m3,
        (false, Format::E4m3, false) => &e::f32_e4m3_unaligned,
        (false, Format::E2m1, true) if flat => &e::f32_e2m1_flat,
        (bf16, Format::E2m1, aligned) => {
            use k::cast_many as e;
            let entry = match (bf16, aligned) {
                (true, true) => &e::bf16_e2m1,
                (true, false) => &e::bf16_e2m1_unaligned,
                (false, true) => &e::f32_e2m1,
                (false, false) => &e::f32_e2m1_unaligned,
            };
            let config = k::config(plan.num_tokens, plan.hidden, (128, 128), k::MANY_THREADS);
            return launch!(cast_many, entry, config);
        }
    };
    launch!(cast, entry, plan.config(if flat { 32 } else { 128 }))
}

/// The scale factors that [`per_block_cast`] would store, without the data.
///
/// # Errors
/// Those of [`per_block_cast`].
///
/// ```
/// use ferrotile::quant::{Format, SfLayout, SfMut, per_block_cast, sf_shape};
/// use ferrotile::{Device, Ue8m0x4};
///
/// let device = Device::emulator();
/// let x = device.upload(&[3.0f32; 64])?;
/// let layout = sf_shape(1, 64, (32, 32), SfLayout::ColMajorPacked);
/// let mut sf = device.alloc::<Ue8m0x4>(layout.elements as usize)?;
/// per_block_cast::per_block_cast_with_sf_only(
///     &device.stream()?,
///     per_block_cast::SfOnlyArgs {
///         x: x.tensor(&[1, 64])?,
///         format: Format::E2m1,
///         block: (32, 32),
///         round_sf: true,
///         sf: SfMut { tensor: sf.strided_mut(&layout.shape, &layout.strides, 0)?, layout: SfLayout::ColMajorPacked },
///     },
/// )?;
/// // Two blocks with the scale 3 / 6 = 2^-1.
/// assert_eq!(sf.to_vec()?[0].0.to_le_bytes(), [126, 126, 0, 0]);
/// # Ok::<(), ferrotile::Error>(())
/// ```
pub fn per_block_cast_with_sf_only(stream: &Stream, args: SfOnlyArgs<'_>) -> Result<()> {
    let op = "per_block_cast_with_sf_only";
    let plan = Plan::new(op, &args.x, args.block)?;
    let sf = plan.check_sf(op, &args.sf, args.round_sf)?;
    check::same_device(op, stream, &[("x", &args.x), ("sf", &args.sf.tensor)])?;
    check::no_overlap(op, ("x", &args.x), ("sf", &args.sf.tensor))?;
    if args.x.is_empty() {
        return Ok(());
    }
    let kernel_args = k::sf_only::Args {
        x: args.x.input(),
        sf: args.sf.tensor.output(),
        t: plan.num_tokens,
        h: plan.hidden,
        x_stride: plan.x_stride,
        sf_row: sf.row,
        sf_col: sf.col,
        npt: plan.npt,
        npc: plan.npc,
        round: args.round_sf.into(),
        packed: args.sf.layout.is_packed().into(),
    };
    stream.launch(op, plan.pick(entries!(k::sf_only), args.format), &plan.config(128), &kernel_args)
}

/// Quantise with given scale factors: `q = x * (1 / sf)`, the quotient and the product rounded to f32, then rounded and saturated as by
/// [`per_block_cast`].
///
/// With the scales that [`per_block_cast`] made, the data are the same if they are powers of two (`round_sf`); otherwise `1 / sf` may differ from
/// `Q / c` in the last bit.
///
/// # Errors
/// Those of [`per_block_cast`]; [`Layout`](Error::Layout) unless the scales are [`SfLayout::RowMajor`].
///
/// ```
/// use ferrotile::quant::{Sf, SfLayout, per_block_cast};
/// use ferrotile::{Device, E2m1x2};
///
/// let device = Device::emulator();
/// let (x, sf) = (device.upload(&[12.0f32; 64])?, device.upload(&[4.0f32, 1.0])?);
/// let mut out = device.alloc::<E2m1x2>(32)?;
/// per_block_cast::per_block_cast_with_precomputed_sf(
///     &device.stream()?,
///     per_block_cast::PrecomputedArgs {
///         x: x.tensor(&[1, 64])?,
///         sf: Sf { tensor: sf.tensor(&[1, 2])?, layout: SfLayout::RowMajor },
///         block: (32, 32),
///         out: out.tensor_mut(&[1, 32])?,
///     },
/// )?;
/// // 12 / 4 = 3 is code 5; 12 saturates to 6, code 7.
/// let out = out.to_vec()?;
/// assert_eq!((out[0].0, out[16].0), (0x55, 0x77));
/// # Ok::<(), ferrotile::Error>(())
/// ```
pub fn per_block_cast_with_precomputed_sf(stream: &Stream, args: PrecomputedArgs<'_>) -> Result<()> {
    let op = "per_block_cast_with_precomputed_sf";
    let plan = Plan::new(op, &args.x, args.block)?;
    let format = plan.check_out(op, &args.out)?;
    if args.sf.layout != SfLayout::RowMajor {
        let (expected, got) = (SfLayout::RowMajor.to_string(), args.sf.layout.to_string());
        return Err(Error::Layout { op, arg: "sf", expected, got });
    }
    let sf = args.sf.check(op, "sf", SfLayout::COMMON, (plan.block_rows, plan.block_columns))?;
    check::same_device(op, stream, &[("x", &args.x), ("out", &args.out), ("sf", &args.sf.tensor)])?;
    check::no_overlaps(op, &[("x", &args.x), ("sf", &args.sf.tensor)], &[("out", &args.out)])?;
    if args.x.is_empty() {
        return Ok(());
    }
    let kernel_args = k::precomputed::Args {
        x: args.x.input(),
        out: args.out.output(),
        sf: args.sf.tensor.input(),
        t: plan.num_tokens,
        h: plan.hidden,
        x_stride: plan.x_stride,
        sf_row: sf.row,
        sf_col: sf.col,
        npt: plan.npt,
        npc: plan.npc,
    };
    stream.launch(op, plan.pick(entries!(k::precomputed), format), &plan.config(32), &kernel_args)
}

/// What the checks of input and block found out.
struct Plan {
    num_tokens: u32,
    hidden: u32,
    x_stride: u32,
    block_rows: u64,
    block_columns: u64,
    /// Powers of two.
    npt: u32,
    npc: u32,
    bf16: bool,
    /// Whether all rows of `x` start at multiples of 16 bytes.
    aligned: bool,
}

impl Plan {
    fn new(op: &'static str, x: &View, block: (u32, u32)) -> Result<Self> {
        check::rank(op, "x", x, 2)?;
        check::dtype(op, "x", x, &[DType::Bf16, DType::F32])?;
        let (num_tokens, hidden) = (x.dim(0), x.dim(1));
        // Kernels count rows and channels, rounded up to tiles, with 32 bits.
        check::in_range(op, "num_tokens", num_tokens, 0, i32::MAX as u64)?;
        check::in_range(op, "hidden", hidden, 0, i32::MAX as u64)?;
        check::divisible(op, "hidden", hidden, 64)?;
        check::one_of(op, "npt", block.0, &[32, 128])?;
        check::one_of(op, "npc", block.1, &[32, 128])?;
        check::last_stride_1(op, "x", x)?;
        check::aligned(op, "x", x, x.dtype().size())?;
        let x_stride = if num_tokens <= 1 { 0 } else { check::fits_u32(op, "row stride of x", x.stride(0))? };
        Ok(Self {
            num_tokens: num_tokens as u32,
            hidden: hidden as u32,
            x_stride,
            block_rows: num_tokens.div_ceil(block.0.into()),
            block_columns: hidden.div_ceil(block.1.into()),
            npt: block.0.trailing_zeros(),
            npc: block.1.trailing_zeros(),
            bf16: x.dtype() == DType::Bf16,
            aligned: x.ptr().is_multiple_of(16) && (x_stride as u64 * x.dtype().size()).is_multiple_of(16),
        })
    }

    /// Tiles of `rows` by 128.
    fn config(&self, rows: u32) -> LaunchConfig {
        k::config(self.num_tokens, self.hidden, (rows, 128), k::THREADS)
    }

    fn check_out(&self, op: &'static str, out: &View) -> Result<Format> {
        check::dtype(op, "out", out, &[DType::E4m3, DType::E2m1x2])?;
        let format = if out.dtype() == DType::E4m3 { Format::E4m3 } else { Format::E2m1 };
        check::shape(op, "out", out, &[self.num_tokens.into(), format.columns(self.hidden.into())])?;
        check::contiguous(op, "out", out)?;
        check::aligned(op, "out", out, 16)?;
        Ok(format)
    }

    fn check_sf(&self, op: &'static str, sf: &SfMut<'_>, round_sf: bool) -> Result<SfStrides> {
        if sf.layout.is_packed() && !round_sf {
            let allowed = format!("true with {} scales", sf.layout);
            return Err(Error::Value { op, arg: "round_sf", allowed, got: "false".to_owned() });
        }
        sf.check(op, "sf", SfLayout::COMMON, (self.block_rows, self.block_columns))
    }

    /// Of the entries of a kernel, the one for the input's type and alignment and the output's format.
    fn pick<E>(&self, entries: [&'static E; 8], format: Format) -> &'static E {
        let [be4, be2, fe4, fe2, be4_unaligned, be2_unaligned, fe4_unaligned, fe2_unaligned] = entries;
        match (self.bf16, format, self.aligned) {
            (true, Format::E4m3, true) => be4,
            (true, Format::E2m1, true) => be2,
            (false, Format::E4m3, true) => fe4,
            (false, Format::E2m1, true) => fe2,
            (true, Format::E4m3, false) => be4_unaligned,
            (true, Format::E2m1, false) => be2_unaligned,
            (false, Format::E4m3, false) => fe4_unaligned,
            (false, Format::E2m1, false) => fe2_unaligned,
        }
    }
}
