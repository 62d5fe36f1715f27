//! norm_backward: copies a vector. (Written by `cargo xtask new`; say here what the op computes.)

use crate::{DType, Result, Stream, TensorMut, TensorRef, check};
use ferrotile_kernels::quant::norm_backward as kernels;

const OP: &str = "norm_backward";

/// Arguments of [`norm_backward`].
pub struct Args<'a> {
    /// Input, u32 `[n]`, contiguous.
    pub x: TensorRef<'a>,
    /// Output, u32 `[n]`, contiguous; must not overlap `x`.
    pub y: TensorMut<'a>,
}

/// Copies `x` to `y`. Asynchronous on `stream`; allocates nothing.
///
/// # Errors
/// Another dtype, rank or shape, strides that are not contiguous, tensors that overlap or are on another device.
pub fn norm_backward(stream: &Stream, args: Args<'_>) -> Result<()> {
    let n = check_args(stream, &args)?;
    if n == 0 {
        return Ok(());
    }
    let values = kernels::copy::Args { x: args.x.input(), y: args.y.output(), n };
    stream.launch(OP, &kernels::copy::ENTRY, &kernels::config(n), &values)
}

/// Number of elements, if the arguments are right.
fn check_args(stream: &Stream, args: &Args<'_>) -> Result<u32> {
    let (x, y) = (&args.x, &args.y);
    check::rank(OP, "x", x, 1)?;
    check::dtype(OP, "x", x, &[DType::U32])?;
    check::dtype(OP, "y", y, &[DType::U32])?;
    check::shape(OP, "y", y, x.shape())?;
    check::contiguous(OP, "x", x)?;
    check::contiguous(OP, "y", y)?;
    check::same_device(OP, stream, &[("x", x), ("y", y)])?;
    check::no_overlap(OP, ("x", x), ("y", y))?;
    check::fits_u32(OP, "n", x.numel())
}
