//! Launcher of `per_channel_cast_and_transpose`.

use super::Input;
use super::SfMut;
use super::per_channel_cast::{Plan, Scales, too_many_tiles};
use crate::{DType, Result, Stream, TensorMut, TensorRef, check};
use ferrotile_kernels::quant::per_channel_cast::{Element as Source, Order, bf16_tiles};
use ferrotile_kernels::quant::per_channel_cast_and_transpose::{self as k, Element};

/// Arguments of [`per_channel_cast_and_transpose`].
#[derive(Debug)]
pub struct Args<'a> {
    /// bf16 or f32 `(T, H)`; rows may lie any distance apart.
    pub x: TensorRef<'a>,
    /// Tokens of a channel that share a scale: 32 or 128.
    pub npt: u32,
    /// Make every scale a power of two. The packed layout needs it.
    pub round_sf: bool,
    /// Quantised values, transposed: e4m3 `(H, T)`, contiguous.
    pub out: TensorMut<'a>,
    /// Scale factors, not transposed: [`RowMajor`](super::SfLayout::RowMajor) or
    /// [`PerChannelPacked`](super::SfLayout::PerChannelPacked), see [`sf_shape`](super::sf_shape) with the block `(npt, 1)`.
    pub sf: SfMut<'a>,
}

/// [`per_channel_cast`](super::per_channel_cast()) with the data transposed, so that a product over tokens finds them side by side.
///
/// | tensor | dtype | shape | layout |
/// |---|---|---|---|
/// | `x` | bf16 or f32 | `(T, H)` | last stride 1, any row stride |
/// | `out` | e4m3 | `(H, T)` | contiguous |
/// | `sf` | f32, or ue8m0x4 | `(M, H)`, or `(ceil(M / 4), H)`, with `M = ceil(T / npt)` | last stride 1, any row stride |
///
/// Scales, rounding, and what NaN and infinity give are those of [`per_channel_cast`](super::per_channel_cast()). Source: the
/// specification's section 5.6; `T`, `H` and the alignment may be any here.
///
/// Asynchronous; allocates nothing; an empty `x` launches nothing. It is fast when `T % 16 == 0`, `H % 8 == 0`, and rows of `x` and `out`
/// start at multiples of 16 bytes.
///
/// # Errors
/// Those of [`per_channel_cast`](super::per_channel_cast()).
///
/// ```
/// use ferrotile::quant::{SfLayout, SfMut, per_channel_cast_and_transpose};
/// use ferrotile::{Device, E4m3};
///
/// let device = Device::emulator();
/// // Two tokens of three channels.
/// let x = device.upload(&[448.0f32, 1.0, 0.0, 7.0, 2.0, -896.0])?;
/// let (mut out, mut sf) = (device.alloc::<E4m3>(3 * 2)?, device.alloc::<f32>(3)?);
/// per_channel_cast_and_transpose::per_channel_cast_and_transpose(
///     &device.stream()?,
///     per_channel_cast_and_transpose::Args {
///         x: x.tensor(&[2, 3])?,
///         npt: 128,
///         round_sf: true,
///         out: out.tensor_mut(&[3, 2])?,
///         sf: SfMut { tensor: sf.tensor_mut(&[1, 3])?, layout: SfLayout::RowMajor },
///     },
/// )?;
/// assert_eq!(sf.to_vec()?, [1.0, 2f32.powi(-7), 2.0]);
/// // 448 and 7; 1 and 2, times 2^7; 0 and -896 / 2.
/// let codes: Vec<u8> = out.to_vec()?.iter().map(|code| code.0).collect();
/// assert_eq!(codes, [0x7E, 0x4E, 0x70, 0x78, 0, 0xFE]);
/// # Ok::<(), ferrotile::Error>(())
/// ```
pub fn per_channel_cast_and_transpose(stream: &Stream, args: Args<'_>) -> Result<()> {
    let op = "per_channel_cast_and_transpose";
    let plan = Plan::new(op, &Input::Plain(args.x))?;
    let (t, h) = (plan.num_rows, plan.hidden);
    let scales = Scales::check(op, args.npt, args.round_sf, &args.sf, (t.into(), h.into()))?;
    check::whole(op, "out", &args.out, DType::E4m3, &[h.into(), t.into()])?;
    plan.check_apart(op, stream, &[("out", &args.out), ("sf", &args.sf.tensor)])?;
    if args.x.is_empty() {
        return Ok(());
    }
    use k::cast as e;
    let wide = plan.is_wide() && t.is_multiple_of(16) && args.out.ptr().is_multiple_of(16);
    let few = bf16_tiles(t, h) <= stream.device().num_sms().into();
    let (entry, element, columns) = match (plan.element, wide) {
        (Source::F32, true) => (&e::f32, Element::F32, k::COLS),
        (Source::F32, false) => (&e::f32_narrow, Element::F32, k::COLS),
        (_, true) if few => (&e::bf16_few, Element::Bf16, k::FEW_COLS),
        (_, true) => (&e::bf16, Element::Bf16, k::COLS),
        (_, false) => (&e::bf16_narrow, Element::Bf16, k::COLS),
    };
    let order = Order::new(h, columns, u32::MAX);
    let config = k::config(element, columns, t, h, order).ok_or_else(|| too_many_tiles(op, t))?;
    let kernel_args = e::Args {
        x: args.x.input(),
        out: args.out.output(),
        sf: args.sf.tensor.output(),
        t,
        h,
        x_stride: plan.stride,
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
