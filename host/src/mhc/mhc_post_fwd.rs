//! Write a sub-layer's output back into the residual streams ([`mhc_post_fwd`]).

use crate::{DType, Error, Result, Stream, TensorMut, TensorRef, View, check};
use ferrotile_kernels::mhc::mhc_post_fwd as k;

const OP: &str = "mhc_post_fwd";

/// Arguments of [`mhc_post_fwd`]. `...` is one or two leading dimensions, the same everywhere; all tensors are contiguous.
#[derive(Debug)]
pub struct Args<'a> {
    /// Output of the sub-layer, bf16 `[..., h]`.
    pub x: TensorRef<'a>,
    /// Residual streams, bf16 `[..., m, h]`.
    pub residual: TensorRef<'a>,
    /// Weight of `x` in each stream, f32 `[..., m]` or `[..., m, 1]`.
    pub post: TensorRef<'a>,
    /// Mixing matrix, f32 `[..., m, m]`, input stream first.
    pub comb: TensorRef<'a>,
    /// New residual streams, bf16 `[..., m, h]`.
    pub out: TensorMut<'a>,
}

/// New residual streams of a hyper-connection:
/// `out[.., o, :] = post[.., o] * x[.., :] + sum over i of comb[.., i, o] * residual[.., i, :]`.
///
/// | argument | shape | dtype |
/// |---|---|---|
/// | `x` | `[..., h]`, one or two leading dimensions | bf16 |
/// | `residual`, `out` | `[..., m, h]` | bf16 |
/// | `post` | `[..., m]` or `[..., m, 1]` | f32 |
/// | `comb` | `[..., m, m]`: input stream, output stream | f32 |
///
/// The sum is evaluated in f32 in this order: `comb[0, o] * residual[0]`, rounded; then a fused multiply-add of `post[o] * x`; then
/// one of `comb[i, o] * residual[i]` for `i = 1, 2, ...`; the result is rounded once, to nearest even. NaN becomes `0x7FFF`. Any `m`
/// and `h` work; fast are `m` of 2, 4 and 8 with `h` a multiple of 8 and 16-byte aligned tensors.
///
/// Asynchronous on `stream`, allocates nothing. Empty tensors launch nothing. (Facts: mhc.md sections 0 and 7.)
///
/// ```
/// use ferrotile::half::bf16;
/// use ferrotile::{Device, mhc::mhc_post_fwd::{Args, mhc_post_fwd}};
///
/// let device = Device::emulator();
/// let bf16s = |v: &[f32]| v.iter().map(|v| bf16::from_f32(*v)).collect::<Vec<_>>();
/// let x = device.upload(&bf16s(&[1.0, 2.0]))?;
/// let residual = device.upload(&bf16s(&[10.0, 20.0, 30.0, 40.0]))?;
/// let post = device.upload(&[1.0f32, -1.0])?;
/// // Both streams go to the other one.
/// let comb = device.upload(&[0.0f32, 1.0, 1.0, 0.0])?;
/// let mut out = device.alloc::<bf16>(4)?;
/// mhc_post_fwd(&device.stream()?, Args {
///     x: x.tensor(&[1, 2])?,
///     residual: residual.tensor(&[1, 2, 2])?,
///     post: post.tensor(&[1, 2])?,
///     comb: comb.tensor(&[1, 2, 2])?,
///     out: out.tensor_mut(&[1, 2, 2])?,
/// })?;
/// assert_eq!(out.to_vec()?, bf16s(&[31.0, 42.0, 9.0, 18.0]));
/// # Ok::<(), ferrotile::Error>(())
/// ```
///
/// # Errors
/// [`Error::Shape`], [`Error::DType`], [`Error::Layout`] (a tensor with gaps, an address that is no multiple of the element size),
/// [`Error::Value`] (more than 1024 streams, a token of 2^32 elements or more, more work than 2^32 threads), [`Error::Overlap`] of
/// `out` with an input, [`Error::DeviceMismatch`], [`Error::Driver`].
pub fn mhc_post_fwd(stream: &Stream, args: Args<'_>) -> Result<()> {
    let Some(Plan { t, m, h, vectors }) = check(stream, &args)? else { return Ok(()) };
    let Args { x, residual, post, comb, out } = args;
    let (x, residual, post, comb, out) = (x.input(), residual.input(), post.input(), comb.input(), out.output());
    match (m, vectors) {
        (2 | 4, true) => {
            let entry = if m == 2 { &k::columns::m2 } else { &k::columns::m4 };
            stream.launch(OP, entry, &k::columns_config(t, h), &k::columns::Args { x, residual, post, comb, out, t, h })
        }
        (8, true) => {
            stream.launch(OP, &k::eight::ENTRY, &k::eight_config(t, h), &k::eight::Args { x, residual, post, comb, out, t, h })
        }
        _ => stream.launch(OP, &k::any::ENTRY, &k::any_config(t, h), &k::any::Args { x, residual, post, comb, out, t, m, h }),
    }
}

/// What [`check()`] found: sizes that fit the kernels.
struct Plan {
    t: u32,
    m: u32,
    h: u32,
    /// Whether 16-byte vectors of all tensors are aligned.
    vectors: bool,
}

/// `None` when there is nothing to do.
fn check(stream: &Stream, Args { x, residual, post, comb, out }: &Args<'_>) -> Result<Option<Plan>> {
    let rank = x.rank();
    if !(2..=3).contains(&rank) {
        let (expected, got) = ("2 or 3 dimensions".to_owned(), format!("{:?}", x.shape()));
        return Err(Error::Shape { op: OP, arg: "x", expected, got });
    }
    check::rank(OP, "residual", residual, rank + 1)?;
    let (h, m) = (x.dim(rank - 1), residual.dim(rank - 1));
    // Leading dimensions, then those of the argument.
    let shape = |last: [u64; 2]| {
        let mut shape = [0; 4];
        shape[..rank - 1].copy_from_slice(&x.shape()[..rank - 1]);
        shape[rank - 1..=rank].copy_from_slice(&last);
        shape
    };
    check::shape(OP, "residual", residual, &shape([m, h])[..=rank])?;
    let column = if post.rank() == rank { rank - 1 } else { rank };
    check::shape(OP, "post", post, &shape([m, 1])[..=column])?;
    check::shape(OP, "comb", comb, &shape([m, m])[..=rank])?;
    check::shape(OP, "out", out, &shape([m, h])[..=rank])?;

    let tensors: [(&'static str, &View, DType); 5] = [
        ("x", x, DType::Bf16),
        ("residual", residual, DType::Bf16),
        ("post", post, DType::F32),
        ("comb", comb, DType::F32),
        ("out", out, DType::Bf16),
    ];
    for (arg, tensor, dtype) in tensors {
        check::dtype(OP, arg, tensor, &[dtype])?;
        check::contiguous(OP, arg, tensor)?;
        check::same_device(OP, stream, &[(arg, tensor)])?;
        if !tensor.ptr().is_multiple_of(dtype.size()) {
            let expected = format!("an address that is a multiple of {}", dtype.size());
            return Err(Error::Layout { op: OP, arg, expected, got: format!("address {:#x}", tensor.ptr()) });
        }
    }
    for (arg, tensor, _) in &tensors[..4] {
        check::no_overlap(OP, (arg, tensor), ("out", out))?;
    }
    if out.is_empty() {
        return Ok(None);
    }
    check::in_range(OP, "streams of residual", m, 0, 1024)?;
    check::in_range(OP, "elements of a token of residual", m.saturating_mul(h), 0, u32::MAX as u64)?;
    let t = x.numel() / h;
    check::fits_u32(OP, "tokens of x", t)?;
    let vectors = h.is_multiple_of(k::COLUMNS as u64) && tensors.iter().all(|(_, tensor, _)| tensor.ptr().is_multiple_of(16));
    // Threads are numbered with 32 bits, those beyond the end of the last block included.
    let per_thread = if vectors && matches!(m, 2 | 4 | 8) { k::COLUMNS as u64 } else { 1 };
    check::in_range(OP, "elements of x", x.numel(), 0, (u32::MAX as u64 - 1024) * per_thread)?;
    Ok(Some(Plan { t: t as u32, m: m as u32, h: h as u32, vectors }))
}
