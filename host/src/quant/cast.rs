//! Launcher of `cast`.

use crate::{DType, Error, Result, Stream, TensorMut, TensorRef, check};
use ferrotile_kernels::entry::Entry;
use ferrotile_kernels::quant::cast as k;

const OP: &str = "cast";

/// Arguments of [`cast`].
#[derive(Debug)]
pub struct Args<'a> {
    /// f32, bf16, f16 or e4m3 of any shape, contiguous.
    pub x: TensorRef<'a>,
    /// Output, f32, bf16, f16 or e4m3 of the same shape, contiguous.
    pub out: TensorMut<'a>,
    /// Round stochastically instead of to nearest: f32 to bf16 or e4m3, bf16 to e4m3.
    pub stochastic: bool,
}

/// Convert every element to another floating-point type, without any scale.
///
/// | tensor | dtype | shape | layout |
/// |---|---|---|---|
/// | `x` | f32, bf16, f16 or e4m3 | any | contiguous |
/// | `out` | f32, bf16, f16 or e4m3 | that of `x` | contiguous |
///
/// A value that the output type lacks is rounded once, to nearest even. Into e4m3 it saturates: infinity and all above 448 become 448;
/// into bf16 and f16 what is too large becomes infinity. The sign of zero is kept. NaN becomes the positive NaN `0x7F`, `0x7FFF` or
/// `0x7FFFFFFF`, but from bf16 to f32 it keeps sign and payload. Equal types are a copy.
///
/// With `stochastic`, a value becomes one of its two neighbours, the farther from zero with the probability that its distance from the
/// nearer says, to 16 bits, and saturates in bf16 too: infinity becomes the largest finite value. A value of the output type
/// stays itself, and NaN becomes `0x7F` or `0x7FFF`. The random bits are a hash of four consecutive values and of their place in the
/// tensor, so equal input gives equal output; a last group of fewer than four counts as filled up with zeros. Source: quant.md 6.3.
///
/// Asynchronous; allocates nothing; an empty `x` launches nothing. Any alignment works; it is fast when both tensors start at multiples
/// of 16 bytes.
///
/// # Errors
/// [`Shape`](Error::Shape), [`DType`](Error::DType), [`Layout`](Error::Layout) when a tensor is not contiguous or not aligned to its
/// elements, [`Value`](Error::Value) for stochastic rounding between other types and for more than 2^40 elements or so,
/// [`DeviceMismatch`](Error::DeviceMismatch), [`Overlap`](Error::Overlap), [`Driver`](Error::Driver). `out` is untouched then.
///
/// ```
/// use ferrotile::{Device, E4m3, quant::cast};
///
/// let device = Device::emulator();
/// let x = device.upload(&[0.3f32, -1e9, 1.0, 0.0])?;
/// let mut out = device.alloc::<E4m3>(4)?;
/// let args = cast::Args { x: x.tensor(&[2, 2])?, out: out.tensor_mut(&[2, 2])?, stochastic: false };
/// cast::cast(&device.stream()?, args)?;
/// let out: Vec<f32> = out.to_vec()?.into_iter().map(E4m3::to_f32).collect();
/// assert_eq!(out, [0.3125, -448.0, 1.0, 0.0]);
/// # Ok::<(), ferrotile::Error>(())
/// ```
pub fn cast(stream: &Stream, args: Args<'_>) -> Result<()> {
    let (x, out) = (&args.x, &args.out);
    let types = [DType::F32, DType::Bf16, DType::F16, DType::E4m3];
    check::dtype(OP, "x", x, &types)?;
    check::dtype(OP, "out", out, &types)?;
    check::shape(OP, "out", out, x.shape())?;
    check::contiguous(OP, "x", x)?;
    check::contiguous(OP, "out", out)?;
    let (from, to) = (x.dtype(), out.dtype());
    if args.stochastic && !matches!((from, to), (DType::F32, DType::Bf16 | DType::E4m3) | (DType::Bf16, DType::E4m3)) {
        let allowed = format!("false from {from} to {to}");
        return Err(Error::Value { op: OP, arg: "stochastic", allowed, got: "true".to_owned() });
    }
    check::same_device(OP, stream, &[("x", x), ("out", out)])?;
    check::no_overlap(OP, ("x", x), ("out", out))?;
    let n = x.numel();
    if n == 0 {
        return Ok(());
    }
    check::aligned(OP, "x", x, from.size())?;
    check::aligned(OP, "out", out, to.size())?;
    if from == to {
        let mut out = args.out;
        return stream.copy(&mut out, &args.x);
    }
    let vector = k::vector(kind(from), kind(to));
    let aligned = |t: &crate::View| t.ptr().is_multiple_of(vector as u64 * t.dtype().size());
    if !(aligned(x) && aligned(out)) {
        let stochastic = args.stochastic.into();
        let args = k::narrow::Args { x: x.input(), out: out.output(), n, from: kind(from), to: kind(to), stochastic };
        return stream.launch(OP, &k::narrow::ENTRY, &k::narrow_config(n), &args);
    }
    if args.stochastic {
        use k::stochastic as e;
        let entry = match (from, to) {
            (DType::Bf16, _) => &e::bf16_e4m3,
            (_, DType::Bf16) => &e::f32_bf16,
            _ => &e::f32_e4m3,
        };
        let args = e::Args { x: x.input(), out: out.output(), n };
        return stream.launch(OP, entry, &k::wide_config(vector, n), &args);
    }
    use k::wide as e;
    let entry: &'static Entry<e::Args> = match (from, to) {
        (DType::F32, DType::F16) => &e::f32_f16,
        (DType::F32, DType::E4m3) => &e::f32_e4m3,
        (DType::F32, _) => &e::f32_bf16,
        (DType::Bf16, DType::F32) => &e::bf16_f32,
        (DType::Bf16, DType::F16) => &e::bf16_f16,
        (DType::Bf16, _) => &e::bf16_e4m3,
        (DType::F16, DType::F32) => &e::f16_f32,
        (DType::F16, DType::Bf16) => &e::f16_bf16,
        (DType::F16, _) => &e::f16_e4m3,
        (_, DType::F32) => &e::e4m3_f32,
        (_, DType::Bf16) => &e::e4m3_bf16,
        (_, _) => &e::e4m3_f16,
    };
    let vectors = if from == DType::F32 || to == DType::E4m3 { k::MORE_VECTORS } else { k::VECTORS };
    let args = e::Args { x: x.input(), out: out.output(), n };
    stream.launch(OP, entry, &k::wide_config(vector * vectors as u32, n), &args)
}

/// The kernels' number of a type.
fn kind(dtype: DType) -> u32 {
    match dtype {
        DType::F32 => k::KIND_F32,
        DType::Bf16 => k::KIND_BF16,
        DType::F16 => k::KIND_F16,
        _ => k::KIND_E4M3,
    }
}
