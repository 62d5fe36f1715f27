//! Launcher of `swiglu_forward_and_per_channel_cast_and_transpose`.

use super::{SfLayout, SfMut};
use crate::{DType, Error, Result, Stream, TensorMut, TensorRef, check};
use ferrotile_kernels::entry::Entry;
use ferrotile_kernels::quant::swiglu_forward_and_per_channel_cast_and_transpose as k;

/// Arguments of [`swiglu_forward_and_per_channel_cast_and_transpose`].
#[derive(Debug)]
pub struct Args<'a> {
    /// bf16 `(T, 2H)`: gate in the left half, up in the right one; rows may lie any distance apart.
    pub x: TensorRef<'a>,
    /// Tokens that share a scale: 32 or 128.
    pub npt: u32,
    /// Make every scale a power of two.
    pub round_sf: bool,
    /// `c` of `gate = min(gate, c)`, `up = max(min(up, c), -c)`.
    pub swiglu_clamp_value: Option<f32>,
    /// Write the values as `(T, H)`.
    pub without_transpose: bool,
    /// Quantised values: e4m3 `(H, T)`, or `(T, H)` with `without_transpose`; contiguous.
    pub out: TensorMut<'a>,
    /// Scale factors `(ceil(T / npt), H)`, row-major f32; not transposed.
    pub sf: SfMut<'a>,
}

/// The activation of an expert's MLP, quantised with one scale factor for each `npt` tokens of a channel and transposed: the operand of
/// the weight gradient's GEMM, which sums over tokens.
///
/// | tensor | dtype | shape | layout |
/// |---|---|---|---|
/// | `x` | bf16 | `(T, 2H)` | last stride 1, any row stride |
/// | `out` | e4m3 | `(H, T)`, or `(T, H)` with `without_transpose` | contiguous |
/// | `sf` | f32 | `(ceil(T / npt), H)` | [`SfLayout::RowMajor`] |
///
/// With `l = x[t][c]` and `r = x[t][H + c]`, both clamped first if that is asked for, `a = bf16((l / (1 + exp(-l))) * r)`: `exp` is
/// CUDA's single-precision one, every other step one f32 operation. Then with `amax` the largest magnitude of `a` in `npt` tokens of a
/// channel and `m = max(amax, 1e-4)`: `sf = m / 448` and `q = a * (448 / m)`; with `round_sf`, `sf` is the smallest power of two that is
/// not below `m / 448` and `q = a / sf`. `q` is rounded to nearest even and saturates. A last block takes the tokens that there are.
/// Source: quant.md 1.9, 2 and 5.11.
///
/// On a GPU the bytes are those of TileKernels 1.0.0. The emulator's `exp` may differ in the last bit, which the rounding to bf16 hides
/// but for one value in a million; such a value may come out as the neighbouring e4m3.
///
/// NaN, of `x` or from an infinite gate of negative sign, does not count for a scale and becomes `0x7F`; clamping keeps it. An activation
/// that is infinite counts as the largest finite bf16 for its scale and becomes 448 with its sign, where
/// [`per_channel_cast`](super::per_channel_cast()) makes the scale infinite.
///
/// Asynchronous; allocates nothing; an empty `x` launches nothing. Any size and alignment works; it is fast when rows of `x` start at
/// multiples of 16 bytes, `H` is a multiple of 8, `T` one of 16 (of 4 with `without_transpose`), and bf16 can hold the clamp.
///
/// # Errors
/// [`Shape`](Error::Shape) when shapes do not belong together, [`DType`](Error::DType), [`Layout`](Error::Layout) for strides and the layout of
/// `sf`, [`Value`](Error::Value) for `npt`, an odd number of columns, a clamp that is negative or NaN, or sizes beyond 31 bits,
/// [`DeviceMismatch`](Error::DeviceMismatch), [`Overlap`](Error::Overlap) of an output with another argument, [`Driver`](Error::Driver).
/// The outputs are untouched then.
///
/// ```
/// use ferrotile::quant::{SfLayout, SfMut, sf_shape, swiglu_forward_and_per_channel_cast_and_transpose as op};
/// use ferrotile::{Device, E4m3, half::bf16};
///
/// let device = Device::emulator();
/// // 2 tokens of 8 channels: gates of 30, whose silu is 30 in bf16 too, and ups of 1 and of 2.
/// let x: Vec<bf16> = [1.0, 2.0].iter().flat_map(|up| [[30.0; 8], [*up; 8]].concat()).map(bf16::from_f32).collect();
/// let x = device.upload(&x)?;
/// let layout = sf_shape(2, 8, (32, 1), SfLayout::RowMajor);
/// let (mut out, mut sf) = (device.alloc::<E4m3>(8 * 2)?, device.alloc::<f32>(layout.elements as usize)?);
/// op::swiglu_forward_and_per_channel_cast_and_transpose(
///     &device.stream()?,
///     op::Args {
///         x: x.tensor(&[2, 16])?,
///         npt: 32,
///         round_sf: true,
///         swiglu_clamp_value: None,
///         without_transpose: false,
///         out: out.tensor_mut(&[8, 2])?,
///         sf: SfMut { tensor: sf.tensor_mut(&layout.shape)?, layout: SfLayout::RowMajor },
///     },
/// )?;
/// // 60 / 448 rounded up to a power of two; the two tokens of a channel side by side.
/// assert_eq!(sf.to_vec()?, [0.25; 8]);
/// assert_eq!(out.to_vec()?[..2].iter().map(|q| q.to_f32() * 0.25).collect::<Vec<_>>(), [30.0, 60.0]);
/// # Ok::<(), ferrotile::Error>(())
/// ```
pub fn swiglu_forward_and_per_channel_cast_and_transpose(stream: &Stream, args: Args<'_>) -> Result<()> {
    let op = "swiglu_forward_and_per_channel_cast_and_transpose";
    check::rank(op, "x", &args.x, 2)?;
    check::dtype(op, "x", &args.x, &[DType::Bf16])?;
    let (num_tokens, columns) = (args.x.dim(0), args.x.dim(1));
    // Kernels count tokens and channels, rounded up to tiles, with 32 bits.
    check::in_range(op, "num_tokens", num_tokens, 0, i32::MAX as u64)?;
    check::in_range(op, "columns of x", columns, 0, i32::MAX as u64)?;
    check::divisible(op, "columns of x", columns, 2)?;
    check::one_of(op, "npt", args.npt, &[32, 128])?;
    check::last_stride_1(op, "x", &args.x)?;
    check::aligned(op, "x", &args.x, 2)?;
    let hidden = columns / 2;
    let x_stride = if num_tokens <= 1 { 0 } else { check::fits_u32(op, "row stride of x", args.x.stride(0))? };
    if let Some(clamp) = args.swiglu_clamp_value
        && (clamp.is_nan() || clamp < 0.0)
    {
        let allowed = "0 and more".to_owned();
        return Err(Error::Value { op, arg: "swiglu_clamp_value", allowed, got: clamp.to_string() });
    }
    check::dtype(op, "out", &args.out, &[DType::E4m3])?;
    let shape = if args.without_transpose { [num_tokens, hidden] } else { [hidden, num_tokens] };
    check::shape(op, "out", &args.out, &shape)?;
    check::contiguous(op, "out", &args.out)?;
    let sf = args.sf.check(op, "sf", &[SfLayout::RowMajor], (num_tokens.div_ceil(args.npt.into()), hidden))?;
    check::same_device(op, stream, &[("x", &args.x), ("out", &args.out), ("sf", &args.sf.tensor)])?;
    check::no_overlaps(op, &[("x", &args.x)], &[("out", &args.out), ("sf", &args.sf.tensor)])?;
    if args.x.is_empty() {
        return Ok(());
    }
    // The short way to `silu` takes gates that bf16 can hold.
    let clamp = args.swiglu_clamp_value.unwrap_or(f32::INFINITY);
    let fast = clamp.to_bits().is_multiple_of(1 << 16)
        && args.x.ptr().is_multiple_of(16)
        && x_stride.is_multiple_of(8)
        && args.out.ptr().is_multiple_of(16)
        && hidden.is_multiple_of(8)
        && num_tokens.is_multiple_of(if args.without_transpose { 4 } else { 16 });
    let kernel_args = k::cast::Args {
        x: args.x.input(),
        out: args.out.output(),
        sf: args.sf.tensor.output(),
        t: num_tokens as u32,
        h: hidden as u32,
        x_stride,
        sf_stride: sf.row,
        clamp,
        round: args.round_sf.into(),
    };
    let (entry, lanes) = pick(args.npt == 32, args.without_transpose, args.swiglu_clamp_value.is_some(), fast);
    stream.launch(op, entry, &k::config(num_tokens as u32, hidden as u32, lanes), &kernel_args)
}

/// The entry, and the lanes across its tiles.
fn pick(npt_32: bool, without_transpose: bool, clamp: bool, fast: bool) -> (&'static Entry<k::cast::Args>, u32) {
    use k::cast as e;
    match (without_transpose, npt_32, fast, clamp) {
        (false, true, true, false) => (&e::t32, 8),
        (false, true, true, true) => (&e::t32_clamp, 8),
        (false, true, false, _) => (&e::t32_any, 8),
        (false, false, true, false) => (&e::t128, 8),
        (false, false, true, true) => (&e::t128_clamp, 8),
        (false, false, false, _) => (&e::t128_any, 8),
        (true, true, true, false) => (&e::n32, 16),
        (true, true, true, true) => (&e::n32_clamp, 16),
        (true, true, false, _) => (&e::n32_any, 16),
        (true, false, true, false) => (&e::n128, 8),
        (true, false, true, true) => (&e::n128_clamp, 8),
        (true, false, false, _) => (&e::n128_any, 8),
    }
}
