//! Launcher of `per_token_cast_to_e5m6`.

use super::{SfLayout, SfMut};
use crate::{DType, Error, Result, Stream, TensorMut, TensorRef, check};
use ferrotile_kernels::quant::per_token_cast_to_e5m6 as k;

/// Arguments of [`per_token_cast_to_e5m6`].
#[derive(Debug)]
pub struct Args<'a> {
    /// bf16 or f32 `(T, H)`, `H % 8 == 0`; rows may lie any distance apart.
    pub x: TensorRef<'a>,
    /// Make every scale a power of two. Packed layouts need it.
    pub round_sf: bool,
    /// Quantised values, u8 `(T, 3 * H / 2)`, contiguous.
    pub out: TensorMut<'a>,
    /// Scale factors, see [`sf_shape`](super::sf_shape) with the block `(1, H)`.
    pub sf: SfMut<'a>,
}

/// Quantise rows to e5m6, 12 bits a value, with one scale factor for each token.
///
/// | tensor | dtype | shape | layout |
/// |---|---|---|---|
/// | `x` | bf16 or f32 | `(T, H)`, `H % 8 == 0` | last stride 1, any row stride |
/// | `out` | u8 | `(T, 3 * H / 2)` | contiguous |
/// | `sf` | f32, or ue8m0x4 in a packed layout | `(T, 1)` | see [`SfLayout`] |
///
/// An e5m6 is the upper 12 bits of an f16: 5 exponent and 6 mantissa bits, largest value 65024, smallest 2^-20. Eight channels make a
/// string of 96 bits, the first channel in the highest, cut into three little-endian words.
///
/// With `amax` the largest magnitude of a row and `c = max(amax, 1e-4)`: `sf = c / 65024` and `q = x * (65024 / c)`; with `round_sf`, `sf` is
/// the smallest power of two that is not below `c / 65024` and `q = x / sf`. Each step is one f32 operation, and `q` is rounded to
/// nearest even where its magnitude is 2^-14 or more. Below, the published rule looks at the same 17 bits of the f32 as
/// above, so that a value may become either neighbour; data are reproduced bit for bit. The sign of zero is kept. NaN does not count
/// for a scale and becomes NaN (`0x7FF`). Infinity becomes infinity (`0x7C0` with its sign); `amax` counts as at most the largest
/// f32. In a packed layout, the three unused bytes of a row's word are written as 0; padding between columns of scales is
/// not touched. Source: the specification's 1.3, sections 2 to 4, and 5.8.
///
/// Asynchronous; allocates nothing; an empty `x` launches nothing. Any alignment works; it is fast when `H` is a multiple of 32 and
/// rows of `x`, and `out`, start at multiples of 16 bytes.
///
/// # Errors
/// [`Shape`](Error::Shape) when shapes do not belong together, [`DType`](Error::DType), [`Layout`](Error::Layout) for strides and
/// alignment, [`Value`](Error::Value) for `H % 8 != 0`, packed scales that are not rounded, or sizes beyond 31 bits,
/// [`DeviceMismatch`](Error::DeviceMismatch), [`Overlap`](Error::Overlap) of an output with another argument,
/// [`Driver`](Error::Driver). The outputs are untouched then.
///
/// ```
/// use ferrotile::Device;
/// use ferrotile::quant::{SfLayout, SfMut, per_token_cast_to_e5m6};
///
/// let device = Device::emulator();
/// let x = device.upload(&[0.1f32, -0.25, 1.0, 3.0, -7.5, 0.0, -0.0, 100.0])?;
/// let (mut out, mut sf) = (device.alloc::<u8>(12)?, device.alloc::<f32>(1)?);
/// per_token_cast_to_e5m6::per_token_cast_to_e5m6(
///     &device.stream()?,
///     per_token_cast_to_e5m6::Args {
///         x: x.tensor(&[1, 8])?,
///         round_sf: true,
///         out: out.tensor_mut(&[1, 12])?,
///         sf: SfMut { tensor: sf.tensor_mut(&[1, 1])?, layout: SfLayout::RowMajor },
///     },
/// )?;
/// // 100 / 65024 rounded up. The first word holds 51.2, -128 and the front of 512.
/// assert_eq!(sf.to_vec()?, [2f32.powi(-9)]);
/// assert_eq!(out.to_vec()?, [0x60, 0x80, 0x6D, 0x52, 0x80, 0xEB, 0x60, 0x06, 0xA4, 0x07, 0x80, 0x00]);
/// # Ok::<(), ferrotile::Error>(())
/// ```
pub fn per_token_cast_to_e5m6(stream: &Stream, a: Args<'_>) -> Result<()> {
    let op = "per_token_cast_to_e5m6";
    check::rank(op, "x", &a.x, 2)?;
    check::dtype(op, "x", &a.x, &[DType::Bf16, DType::F32])?;
    let (num_tokens, hidden) = (a.x.dim(0), a.x.dim(1));
    // Kernels count rows and channels, rounded up to what a block holds, with 32 bits.
    check::in_range(op, "num_tokens", num_tokens, 0, i32::MAX as u64)?;
    check::in_range(op, "hidden", hidden, 0, i32::MAX as u64)?;
    check::divisible(op, "hidden", hidden, k::CHANNELS.into())?;
    check::last_stride_1(op, "x", &a.x)?;
    let size = a.x.dtype().size();
    check::aligned(op, "x", &a.x, size)?;
    check::whole(op, "out", &a.out, DType::U8, &[num_tokens, hidden / 2 * 3])?;
    if a.sf.layout.is_packed() && !a.round_sf {
        let allowed = format!("true with {} scales", a.sf.layout);
        return Err(Error::Value { op, arg: "round_sf", allowed, got: "false".to_owned() });
    }
    // A row has one scale, and none if it has no channels.
    let sf = a.sf.check(op, "sf", SfLayout::COMMON, (num_tokens, (hidden > 0).into()))?;
    check::same_device(op, stream, &[("x", &a.x), ("out", &a.out), ("sf", &a.sf.tensor)])?;
    check::no_overlaps(op, &[("x", &a.x)], &[("out", &a.out), ("sf", &a.sf.tensor)])?;
    if a.x.is_empty() {
        return Ok(());
    }
    let x_stride = if num_tokens == 1 { 0 } else { a.x.stride(0) * size };
    let wide = hidden.is_multiple_of(32)
        && a.x.ptr().is_multiple_of(16)
        && x_stride.is_multiple_of(16)
        && a.out.ptr().is_multiple_of(16);
    use k::rows as e;
    let bf16 = a.x.dtype() == DType::Bf16;
    // Rows that leave multiprocessors idle, if so many threads can hold them.
    let few = num_tokens <= u64::from(stream.device().num_sms())
        && hidden <= u64::from(k::MAX_THREADS * k::CHANNELS) * k::FEW_VECTORS as u64;
    let (entry, vectors) = match (bf16, wide, a.round_sf) {
        (true, true, false) if few => (&e::bf16_few, k::FEW_VECTORS),
        (true, true, true) if few => (&e::bf16_round_few, k::FEW_VECTORS),
        (true, true, false) => (&e::bf16, k::BF16_VECTORS),
        (true, true, true) => (&e::bf16_round, k::BF16_VECTORS),
        (false, true, false) => (&e::f32, k::F32_VECTORS),
        (false, true, true) => (&e::f32_round, k::F32_VECTORS),
        (true, false, false) => (&e::bf16_narrow, 1),
        (true, false, true) => (&e::bf16_round_narrow, 1),
        (false, false, false) => (&e::f32_narrow, 1),
        (false, false, true) => (&e::f32_round_narrow, 1),
    };
    let kernel_args = e::Args {
        x: a.x.input(),
        out: a.out.output(),
        sf: a.sf.tensor.output(),
        x_stride,
        hidden: hidden as u32,
        sf_stride: sf.row,
        packed: a.sf.layout.is_packed().into(),
    };
    stream.launch(op, entry, &k::config(num_tokens as u32, hidden as u32, vectors), &kernel_args)
}
