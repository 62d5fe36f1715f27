//! norm_forward_and_per_token_cast: root mean square norm of rows, quantised to e4m3.

use super::norm_forward::{Norm, Way, input, output};
use super::{SfLayout, SfMut, SfStrides};
use crate::{DType, Error, Result, Stream, TensorMut, TensorRef, View, check};
use ferrotile_kernels::quant::common::Divisor;
use ferrotile_kernels::quant::norm_forward_and_per_token_cast as k;

const OP: &str = "norm_forward_and_per_token_cast";

/// Channels that share a scale.
pub const NUM_PER_CHANNELS: u32 = k::GROUP;

/// Arguments of [`norm_forward_and_per_token_cast`].
#[derive(Debug)]
pub struct Args<'a> {
    /// bf16 or f32 `(T, H)` or `(B, T, H)`, last stride 1.
    pub x: TensorRef<'a>,
    /// What is added to `x` before: of its type and shape, last stride 1.
    pub residual: Option<TensorRef<'a>>,
    /// A factor for each channel, `(H,)` of the type of `x`, contiguous.
    pub weight: Option<TensorRef<'a>>,
    /// What is added to the mean square, not negative.
    pub eps: f32,
    /// A factor for everything; 1 in most models.
    pub out_scale: f32,
    /// Make every scale a power of two. Packed layouts and `mega_moe_sf` need it.
    pub round_sf: bool,
    /// The quantised norm, e4m3 of the shape of `x`, contiguous.
    pub out: TensorMut<'a>,
    /// Scale factors of `(1, 32)` blocks. For `x` of two dimensions as [`sf_shape`](super::sf_shape) says; for three, such tensors one
    /// after the other: shape `(B, T, K)`, or `(B, T, ceil(K / 4))` if packed.
    pub sf: SfMut<'a>,
    /// The exponents of the scales a second time, in the order in which the mega-MoE kernel reads them.
    pub mega_moe_sf: Option<MegaMoeSf<'a>>,
    /// The norm before it is quantised, rounded to bf16, of the shape of `x`, contiguous.
    pub out_bf16: Option<TensorMut<'a>>,
    /// `x + residual`, of the type and shape of `x`, contiguous. Only with a residual: otherwise it would be `x` itself.
    pub residual_out: Option<TensorMut<'a>>,
    /// The reciprocal root mean square of each row, f32 `(T,)` or `(B, T)`, contiguous.
    pub rstd: Option<TensorMut<'a>>,
}

/// Scale exponents in the order of the mega-MoE kernel, for `x` of two dimensions with `H % 128 == 0`.
///
/// Byte `g % 4` of word `(row(t), g / 4)` is the exponent of 32-channel group `g` of token `t`, with `bm = block_m`, `i = t % bm` and
/// `row(t) = (t / bm) * align(bm, 128) + (i / 128) * 128 + (i % 32) * 4 + i % 128 / 32`.
#[derive(Debug)]
pub struct MegaMoeSf<'a> {
    /// ue8m0x4 `(R, H / 128)` with strides `(1, at least R)`, and [`mega_moe_sf_rows`] of them or more. Rows of no token stay as they are.
    pub tensor: TensorMut<'a>,
    /// Tokens of a block of the mega-MoE kernel.
    pub block_m: u32,
}

/// Rows that [`MegaMoeSf::tensor`] needs at least. It saturates instead of overflowing; 0 for a `block_m` of 0.
pub fn mega_moe_sf_rows(num_tokens: u64, block_m: u32) -> u64 {
    match u64::from(block_m) {
        0 => 0,
        block_m => num_tokens.div_ceil(block_m).saturating_mul(block_m.next_multiple_of(128)),
    }
}

/// [`norm_forward`](super::norm_forward()), quantised to e4m3 as by [`per_token_cast`](super::per_token_cast()) with 32 channels a scale,
/// without a trip to memory in between: the same bits as one after the other.
///
/// | tensor | dtype | shape | layout |
/// |---|---|---|---|
/// | `x`, `residual` | bf16 or f32 | `(T, H)` or `(B, T, H)` | last stride 1, any other strides |
/// | `weight` | that of `x` | `(H,)` | contiguous |
/// | `out` | e4m3 | that of `x` | contiguous |
/// | `sf` | f32, or ue8m0x4 in a packed layout | `(T, K)` or `(B, T, K)`, packed `ceil(K / 4)` columns, with `K = ceil(H / 32)` | see [`SfLayout`], batches any distance apart |
/// | `mega_moe_sf` | ue8m0x4 | `(R, H / 128)` | see [`MegaMoeSf`] |
/// | `out_bf16` | bf16 | that of `x` | contiguous |
/// | `residual_out` | that of `x` | that of `x` | contiguous |
/// | `rstd` | f32 | `(T,)` or `(B, T)` | contiguous |
///
/// The norm is rounded to the type of `x` before it is quantised. Scales and rounding are those of `per_token_cast`: a last group of fewer
/// than 32 channels uses what there is, unused bytes of a last packed word are written as 0. A row of NaN has the scale of a row of zeros and
/// codes `0x7F`; a norm that overflows to infinity is the caller's mistake and spoils its group, the same on every device. What makes a row
/// NaN or zero is said at `norm_forward`. Source: the specification's section 6.10.
///
/// Asynchronous; allocates nothing; an empty `x` launches nothing. Any `H` works and any alignment; what is fast is said there too.
///
/// # Errors
/// Those of `norm_forward`; [`Shape`](Error::Shape), [`DType`](Error::DType) and [`Layout`](Error::Layout) also for scales that do not
/// fit; [`Value`](Error::Value) also for packed or mega-MoE scales that are not rounded, and for mega-MoE scales of three dimensions, of
/// `H % 128 != 0`, or of a `block_m` that is 0 or beyond 2^30. The outputs are untouched then.
///
/// ```
/// use ferrotile::quant::norm_forward_and_per_token_cast::{Args, norm_forward_and_per_token_cast};
/// use ferrotile::quant::{SfLayout, SfMut, sf_shape};
/// use ferrotile::{Device, E4m3, Ue8m0x4};
///
/// let device = Device::emulator();
/// let x = device.upload(&[3.0f32; 64])?;
/// let layout = sf_shape(1, 64, (1, 32), SfLayout::RowMajorPacked);
/// let (mut out, mut sf) = (device.alloc::<E4m3>(64)?, device.alloc::<Ue8m0x4>(layout.elements as usize)?);
/// let args = Args {
///     x: x.tensor(&[1, 64])?,
///     residual: None,
///     weight: None,
///     eps: 0.0,
///     out_scale: 448.0,
///     round_sf: true,
///     out: out.tensor_mut(&[1, 64])?,
///     sf: SfMut { tensor: sf.tensor_mut(&layout.shape)?, layout: SfLayout::RowMajorPacked },
///     mega_moe_sf: None,
///     out_bf16: None,
///     residual_out: None,
///     rstd: None,
/// };
/// norm_forward_and_per_token_cast(&device.stream()?, args)?;
/// // All values are equal, so the norm is 1, or 448 with the scale. 448 / 448 is 2^0; two of the four bytes have no group.
/// assert_eq!((out.to_vec()?[0].0, sf.to_vec()?[0].0), (0x7E, 0x0000_7F7F));
/// # Ok::<(), ferrotile::Error>(())
/// ```
pub fn norm_forward_and_per_token_cast(stream: &Stream, args: Args<'_>) -> Result<()> {
    let x = &args.x;
    let norm = Norm {
        x,
        residual: args.residual.as_deref(),
        weight: args.weight.as_deref(),
        eps: args.eps,
        residual_out: args.residual_out.as_deref(),
        rstd: args.rstd.as_deref(),
    };
    let rows = norm.check(OP)?;
    check::whole(OP, "out", &args.out, DType::E4m3, x.shape())?;
    if let Some(out) = &args.out_bf16 {
        check::whole(OP, "out_bf16", out, DType::Bf16, x.shape())?;
        check::aligned(OP, "out_bf16", out, 2)?;
    }
    let packed = args.sf.layout.is_packed();
    if packed && !args.round_sf {
        let allowed = format!("true with {} scales", args.sf.layout);
        return Err(Error::Value { op: OP, arg: "round_sf", allowed, got: "false".to_owned() });
    }
    let (sf, sf_batch_stride) = check_sf(&args.sf, x, rows.num_tokens, rows.hidden)?;
    let mega_moe = match &args.mega_moe_sf {
        Some(mega_moe) => Some(check_mega_moe(mega_moe, x, args.round_sf)?),
        None => None,
    };
    let mega_moe_tensor: Option<&View> = args.mega_moe_sf.as_ref().map(|m| &*m.tensor);
    norm.check_memory(
        OP,
        stream,
        &[
            ("out", Some(&args.out)),
            ("sf", Some(&args.sf.tensor)),
            ("mega_moe_sf", mega_moe_tensor),
            ("out_bf16", args.out_bf16.as_deref()),
        ],
    )?;
    if x.is_empty() {
        return Ok(());
    }
    // A vector of bf16 becomes 8 bytes, or 16 of bf16; one of f32 half as much.
    let bf16 = x.dtype() == DType::Bf16;
    let (code_bytes, bf16_bytes) = if bf16 { (8, 16) } else { (4, 8) };
    let aligned = args.out.ptr().is_multiple_of(code_bytes)
        && args.out_bf16.as_ref().is_none_or(|out| out.ptr().is_multiple_of(bf16_bytes));
    use k::rows as e;
    let entry = match (bf16, rows.way(aligned), args.round_sf) {
        (true, Way::Held, true) => &e::bf16_round,
        (true, Way::Held, false) => &e::bf16,
        (true, Way::Long, _) => &e::bf16_long,
        (true, Way::Narrow, _) => &e::bf16_narrow,
        (false, Way::Held, true) => &e::f32_round,
        (false, Way::Held, false) => &e::f32,
        (false, Way::Long, _) => &e::f32_long,
        (false, Way::Narrow, _) => &e::f32_narrow,
    };
    let flag = |present: bool, part: u32| if present { part } else { 0 };
    let parts = norm.parts()
        | flag(args.out_bf16.is_some(), k::OUT_BF16)
        | flag(packed, k::PACKED)
        | flag(mega_moe.is_some(), k::MEGA_MOE)
        | flag(args.round_sf, k::ROUND);
    let plain = bf16
        && matches!(rows.way(aligned), Way::Held)
        && args.round_sf
        && rows.num_tokens == rows.num_rows
        && rows.lanes_log2() > 5
        && parts & (k::RESIDUAL | k::OUT_BF16 | k::MEGA_MOE) == 0;
    if plain {
        let kernel_args = k::plain::Args {
            x: x.input(),
            weight: input(norm.weight),
            out: args.out.output(),
            sf: args.sf.tensor.output(),
            rstd: output(norm.rstd),
            x_stride: rows.x_strides.token,
            sf_row_stride: sf.row,
            sf_col_stride: sf.col,
            hidden: rows.hidden,
            parts,
            inv_hidden: rows.inv_hidden(),
            eps: args.eps,
            out_scale: args.out_scale,
        };
        return stream.launch(OP, &k::plain::ENTRY, &rows.config(), &kernel_args);
    }
    let mega_moe = mega_moe.unwrap_or(MegaMoe { stride: 0, block_m: 128 });
    let by_block_m = Divisor::new(mega_moe.block_m);
    let kernel_args = e::Args {
        x: x.input(),
        residual: input(norm.residual),
        weight: input(norm.weight),
        out: args.out.output(),
        out_bf16: output(args.out_bf16.as_deref()),
        sf: args.sf.tensor.output(),
        mega_moe_sf: output(mega_moe_tensor),
        residual_out: output(norm.residual_out),
        rstd: output(norm.rstd),
        x_batch_stride: rows.x_strides.batch,
        x_stride: rows.x_strides.token,
        residual_batch_stride: rows.residual_strides.batch,
        residual_stride: rows.residual_strides.token,
        sf_batch_stride,
        sf_row_stride: sf.row,
        sf_col_stride: sf.col,
        mega_moe_stride: mega_moe.stride,
        mega_moe_block_m: mega_moe.block_m,
        block_m_magic: by_block_m.magic,
        block_m_shift: by_block_m.shift,
        num_rows: rows.num_rows,
        hidden: rows.hidden,
        num_tokens: rows.num_tokens,
        tokens_magic: rows.by_tokens.magic,
        tokens_shift: rows.by_tokens.shift,
        lanes_log2: rows.lanes_log2(),
        parts,
        inv_hidden: rows.inv_hidden(),
        eps: args.eps,
        out_scale: args.out_scale,
    };
    stream.launch(OP, entry, &rows.config(), &kernel_args)
}

/// Strides of the scales within a batch, and words from one batch to the next.
fn check_sf(sf: &SfMut<'_>, x: &View, num_tokens: u32, hidden: u32) -> Result<(SfStrides, u64)> {
    let (rows, columns) = (u64::from(num_tokens), u64::from(hidden.div_ceil(k::GROUP)));
    if x.rank() == 2 {
        return Ok((sf.check(OP, "sf", SfLayout::COMMON, (rows, columns))?, 0));
    }
    let t: &View = &sf.tensor;
    if t.rank() != 3 || t.dim(0) != x.dim(0) {
        let expected = format!("{:?}", [x.dim(0), sf.layout.rows(rows), sf.layout.columns(columns)]);
        return Err(Error::Shape { op: OP, arg: "sf", expected, got: format!("{:?}", t.shape()) });
    }
    let first = View::new(OP, *t.device(), t.ptr(), t.dtype(), &t.shape()[1..], &t.strides()[1..])?;
    let of_batch = SfMut { tensor: TensorMut::new(OP, first)?, layout: sf.layout };
    let strides = of_batch.check(OP, "sf", SfLayout::COMMON, (rows, columns))?;
    if t.is_empty() || t.dim(0) == 1 {
        return Ok((strides, 0));
    }
    let (words, batch) = (first.span_bytes() / t.dtype().size(), t.stride(0));
    if batch < words || (sf.layout.is_col_major() && !batch.is_multiple_of(4)) {
        let unit = if sf.layout.is_col_major() { ", a multiple of 4" } else { "" };
        let expected = format!("batches at least {words} elements apart{unit}");
        return Err(Error::Layout { op: OP, arg: "sf", expected, got: format!("strides {:?}", t.strides()) });
    }
    Ok((strides, batch))
}

/// What the kernel has to know about the mega-MoE scales.
struct MegaMoe {
    stride: u32,
    block_m: u32,
}

fn check_mega_moe(sf: &MegaMoeSf<'_>, x: &View, round_sf: bool) -> Result<MegaMoe> {
    let arg = "mega_moe_sf";
    if x.rank() != 2 {
        let (allowed, got) = ("none with three dimensions of x".to_owned(), format!("x of shape {:?}", x.shape()));
        return Err(Error::Value { op: OP, arg, allowed, got });
    }
    if !round_sf {
        let allowed = "true with mega-MoE scales".to_owned();
        return Err(Error::Value { op: OP, arg: "round_sf", allowed, got: "false".to_owned() });
    }
    check::divisible(OP, "hidden with mega-MoE scales", x.dim(1), 128)?;
    check::in_range(OP, "mega_moe_sf.block_m", sf.block_m.into(), 1, 1 << 30)?;
    let t: &View = &sf.tensor;
    check::rank(OP, arg, t, 2)?;
    check::dtype(OP, arg, t, &[DType::Ue8m0x4])?;
    let (least, columns) = (mega_moe_sf_rows(x.dim(0), sf.block_m), x.dim(1) / 128);
    if t.dim(0) < least || t.dim(1) != columns {
        let (expected, got) = (format!("at least {least} rows of {columns}"), format!("{:?}", t.shape()));
        return Err(Error::Shape { op: OP, arg, expected, got });
    }
    let fine = t.is_empty() || ((t.dim(0) == 1 || t.stride(0) == 1) && (columns == 1 || t.stride(1) >= t.dim(0)));
    if !fine {
        let expected = format!("strides [1, at least {}]", t.dim(0));
        return Err(Error::Layout { op: OP, arg, expected, got: format!("strides {:?}", t.strides()) });
    }
    check::aligned(OP, arg, t, 4)?;
    // The kernel numbers the bytes with 32 bits.
    check::fits_u32(OP, "bytes of mega_moe_sf", t.span_bytes())?;
    Ok(MegaMoe { stride: if columns <= 1 { 0 } else { t.stride(1) as u32 }, block_m: sf.block_m })
}
