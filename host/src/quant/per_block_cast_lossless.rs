//! Launcher of `per_block_cast_lossless`.

use super::{Sf, SfLayout, SfMut, SfStrides};
use crate::{DType, Result, Stream, TensorMut, TensorRef, check};
use ferrotile_kernels::device::Out;
use ferrotile_kernels::quant::per_block_cast_lossless as k;

/// Arguments of [`per_block_cast_lossless`].
#[derive(Debug)]
pub struct Args<'a> {
    /// FP4 values, e2m1x2 `(T, H / 2)`, `H % 16 == 0`; rows may lie any distance apart.
    pub x: TensorRef<'a>,
    /// Scale factors of `x`, powers of two.
    pub x_sf: Sf<'a>,
    /// Tokens and channels that share a scale of `x`: a power of two up to 128 by 16, 32, 64 or 128.
    pub x_block: (u32, u32),
    /// Tokens and channels that share a scale of `out`: 1, 16, 32, 64 or 128 by 16, 32, 64 or 128, neither less than in `x_block`.
    pub out_block: (u32, u32),
    /// e4m3 `(T, H)`, contiguous.
    pub out: TensorMut<'a>,
    /// Scale factors of `out`, see [`sf_shape`](super::sf_shape).
    pub sf: SfMut<'a>,
    /// i32 `(T,)`: to the element of each row, the number of its values that `out` does not hold is added. Zero it first.
    pub lost: Option<TensorMut<'a>>,
}

/// FP4 with fine scales to e4m3 with coarser ones, each value exactly what it was, as long as the scales of a block allow it.
///
/// | tensor | dtype | shape | layout |
/// |---|---|---|---|
/// | `x` | e2m1x2, two values a byte | `(T, H / 2)`, `H % 16 == 0` | last stride 1, any row stride |
/// | `x_sf` | f32, or ue8m0x4 in a packed layout | one for each `x_block` | see [`SfLayout`], any pitch |
/// | `out` | e4m3 | `(T, H)` | contiguous, 16-byte aligned |
/// | `sf` | f32, or ue8m0x4 in a packed layout | one for each `out_block` | see [`SfLayout`] |
/// | `lost` | i32 | `(T,)` | contiguous |
///
/// Scales are powers of two, `2^(e - 127)`, of which only the exponent field `e` is used. With `m` the largest `e` of an output block,
/// its scale has the exponent field `max(m - 6, 0)`, and a value `q` of an input block becomes `q * 2^(e - max(m - 6, 0))`. Its
/// sign is kept, for zeros too. Blocks at the edges (`T % npt != 0`, `H % npc != 0`) use what there is. Unused bytes of a last
/// packed word are written as 0; padding between columns of scales is not touched. FP4 has neither NaN nor infinity.
///
/// **What cannot be kept is reported, not refused.** All values are exact if the scales of an output block lie within a factor of
/// `2^14`, and whatever the scales, zeros are. (The published kernels stop from `2^12` on, even for zeros.) A value that e4m3 does not
/// have is rounded to nearest even, as small values to 0, and counted in the `lost` of its row. So is each value other than zero
/// whose scale is not a positive finite power of two, or whose output scale has the exponent field 0, which decodes to 0
/// (`m < 7`, scales below `2^-120`). A scale of 0 counts as `2^-127`. Without `lost` the output is the same.
///
/// Asynchronous; allocates nothing; an empty `x` launches nothing. Any alignment of `x` works; it is fast when its rows start at
/// multiples of 8 bytes. The result does not depend on the schedule. Source: the specification's 5.3 and 6.5.
///
/// # Errors
/// [`Shape`](crate::Error::Shape) when shapes do not belong together, [`DType`](crate::Error::DType), [`Layout`](crate::Error::Layout) for strides and
/// alignment, [`Value`](crate::Error::Value) for the blocks, `H % 16 != 0`, or sizes beyond 31 bits,
/// [`DeviceMismatch`](crate::Error::DeviceMismatch), [`Overlap`](crate::Error::Overlap) of an output with another argument,
/// [`Driver`](crate::Error::Driver). The outputs are untouched then.
///
/// ```
/// use ferrotile::quant::{Sf, SfLayout, SfMut, per_block_cast_lossless};
/// use ferrotile::{Device, E2m1x2, E4m3};
///
/// let device = Device::emulator();
/// // One token of 64 channels, 1.5 and -6 in turn; scales of 2^0 and 2^-20 for 32 channels each.
/// let x = device.upload(&[E2m1x2::from_f32s([1.5, -6.0]); 32])?;
/// let x_sf = device.upload(&[1.0, 2f32.powi(-20)])?;
/// let (mut out, mut sf) = (device.alloc::<E4m3>(64)?, device.alloc::<f32>(1)?);
/// let mut lost = device.zeros::<i32>(1)?;
/// per_block_cast_lossless::per_block_cast_lossless(
///     &device.stream()?,
///     per_block_cast_lossless::Args {
///         x: x.tensor(&[1, 32])?,
///         x_sf: Sf { tensor: x_sf.tensor(&[1, 2])?, layout: SfLayout::RowMajor },
///         x_block: (1, 32),
///         out_block: (1, 64),
///         out: out.tensor_mut(&[1, 64])?,
///         sf: SfMut { tensor: sf.tensor_mut(&[1, 1])?, layout: SfLayout::RowMajor },
///         lost: Some(lost.tensor_mut(&[1])?),
///     },
/// )?;
/// assert_eq!(sf.to_vec()?, [2f32.powi(-6)]);
/// let out = out.to_vec()?;
/// assert_eq!([out[0], out[1], out[32]].map(E4m3::to_f32), [96.0, -384.0, 0.0]);
/// // 1.5 * 2^-20 and 6 * 2^-20 are too small beside 2^0.
/// assert_eq!(lost.to_vec()?, [32]);
/// # Ok::<(), ferrotile::Error>(())
/// ```
pub fn per_block_cast_lossless(stream: &Stream, args: Args<'_>) -> Result<()> {
    let plan = check(stream, &args)?;
    if args.x.is_empty() {
        return Ok(());
    }
    let (npt, packed) = (args.out_block.0, args.x_sf.layout.is_packed());
    let log2 = u32::trailing_zeros;
    // Both kernels take the same arguments but for `npt`.
    macro_rules! launch {
        ($kernel:ident, $tile:expr, $entries:expr, $($npt:ident)?) => {{
            let [plain, of_packed] = $entries;
            let args = k::$kernel::Args {
                x: args.x.input(),
                x_sf: args.x_sf.tensor.input(),
                out: args.out.output(),
                sf: args.sf.tensor.output(),
                lost: args.lost.as_ref().map_or(Out::null(), |lost| lost.output()),
                t: plan.num_tokens,
                h: plan.hidden,
                x_stride: plan.x_stride,
                x_sf_row: plan.x_sf.row,
                x_sf_col: plan.x_sf.col,
                x_npt: log2(args.x_block.0),
                x_npc: log2(args.x_block.1),
                sf_row: plan.sf.row,
                sf_col: plan.sf.col,
                $($npt: log2($npt),)?
                npc: log2(args.out_block.1),
                packed: args.sf.layout.is_packed().into(),
                count: args.lost.is_some().into(),
            };
            let entry = if packed { of_packed } else { plain };
            stream.launch(OP, entry, &$tile.config(plan.num_tokens, plan.hidden), &args)
        }};
    }
    use {k::flat as f, k::tile as t};
    match (npt, plan.aligned) {
        (1, true) => launch!(flat, k::FLAT, [&f::f32, &f::ue8m0],),
        (1, false) => launch!(flat, k::FLAT, [&f::unaligned_f32, &f::unaligned_ue8m0],),
        (_, false) => launch!(tile, k::SQUARE, [&t::unaligned_f32, &t::unaligned_ue8m0], npt),
        (16 | 32, true) => launch!(tile, k::BAND, [&t::band_f32, &t::band_ue8m0], npt),
        (_, true) => launch!(tile, k::SQUARE, [&t::square_f32, &t::square_ue8m0], npt),
    }
}

const OP: &str = "per_block_cast_lossless";

/// What the checks found out.
struct Plan {
    num_tokens: u32,
    hidden: u32,
    x_stride: u32,
    x_sf: SfStrides,
    sf: SfStrides,
    aligned: bool,
}

fn check(stream: &Stream, a: &Args<'_>) -> Result<Plan> {
    check::rank(OP, "x", &a.x, 2)?;
    check::dtype(OP, "x", &a.x, &[DType::E2m1x2])?;
    let (num_tokens, hidden) = (a.x.dim(0), a.x.dim(1).saturating_mul(2));
    // Kernels count rows and channels, rounded up to tiles, with 32 bits.
    check::in_range(OP, "num_tokens", num_tokens, 0, i32::MAX as u64)?;
    check::in_range(OP, "hidden", hidden, 0, i32::MAX as u64)?;
    check::divisible(OP, "hidden", hidden, k::CHANNELS.into())?;
    check::one_of(OP, "npt of x", a.x_block.0, &[1, 2, 4, 8, 16, 32, 64, 128])?;
    check::one_of(OP, "npc of x", a.x_block.1, &[16, 32, 64, 128])?;
    check::one_of(OP, "npt of out", a.out_block.0, &[1, 16, 32, 64, 128])?;
    check::one_of(OP, "npc of out", a.out_block.1, &[16, 32, 64, 128])?;
    // Powers of two, so larger ones are multiples.
    check::in_range(OP, "npt of out", a.out_block.0.into(), a.x_block.0.into(), 128)?;
    check::in_range(OP, "npc of out", a.out_block.1.into(), a.x_block.1.into(), 128)?;
    check::last_stride_1(OP, "x", &a.x)?;
    let x_stride = if num_tokens <= 1 { 0 } else { check::fits_u32(OP, "row stride of x", a.x.stride(0))? };
    let blocks = |(npt, npc): (u32, u32)| (num_tokens.div_ceil(npt.into()), hidden.div_ceil(npc.into()));
    let x_sf = a.x_sf.check(OP, "x_sf", SfLayout::COMMON, blocks(a.x_block))?;
    check::whole(OP, "out", &a.out, DType::E4m3, &[num_tokens, hidden])?;
    check::aligned(OP, "out", &a.out, 16)?;
    let sf = a.sf.check(OP, "sf", SfLayout::COMMON, blocks(a.out_block))?;
    let inputs = [("x", &*a.x), ("x_sf", &*a.x_sf.tensor)];
    let outputs = [("out", &*a.out), ("sf", &*a.sf.tensor)];
    check::same_device(OP, stream, &inputs)?;
    check::same_device(OP, stream, &outputs)?;
    check::no_overlaps(OP, &inputs, &outputs)?;
    if let Some(lost) = &a.lost {
        check::whole(OP, "lost", lost, DType::I32, &[num_tokens])?;
        check::aligned(OP, "lost", lost, 4)?;
        check::same_device(OP, stream, &[("lost", lost)])?;
        inputs.iter().chain(&outputs).try_for_each(|other| check::no_overlap(OP, *other, ("lost", lost)))?;
    }
    Ok(Plan {
        num_tokens: num_tokens as u32,
        hidden: hidden as u32,
        x_stride,
        x_sf,
        sf,
        aligned: a.x.ptr().is_multiple_of(8) && x_stride.is_multiple_of(8),
    })
}
