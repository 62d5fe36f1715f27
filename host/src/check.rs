//! Small checks that launchers share. Each returns a typed error that names op and argument; none allocates unless it fails.

use crate::{DType, Device, Error, Result, Stream, View};
use ferrotile_kernels::launch::LaunchConfig;
use std::fmt::Display;

/// Largest dynamic shared memory of a block on sm_90 and newer data-centre GPUs.
pub const MAX_SHARED_BYTES: u32 = 227 * 1024;

/// `t` has `n` dimensions.
#[inline]
pub fn rank(op: &'static str, arg: &'static str, t: &View, n: usize) -> Result<()> {
    if t.rank() == n { Ok(()) } else { Err(wrong_rank(op, arg, t, n)) }
}

/// The element type of `t` is one of `allowed`.
#[inline]
pub fn dtype(op: &'static str, arg: &'static str, t: &View, allowed: &[DType]) -> Result<()> {
    // As a set of bits, which is a constant for a list that is one.
    let allows = allowed.iter().fold(0, |set, dtype| set | 1u64 << *dtype as u32);
    if allows >> t.dtype() as u32 & 1 == 1 { Ok(()) } else { Err(wrong_dtype(op, arg, t, allowed)) }
}

/// `t` has exactly this shape.
#[inline]
pub fn shape(op: &'static str, arg: &'static str, t: &View, expected: &[u64]) -> Result<()> {
    // One by one: a comparison of slices calls the C library.
    let equal = t.rank() == expected.len() && expected.iter().enumerate().all(|(i, n)| t.dim(i) == *n);
    if equal { Ok(()) } else { Err(wrong_shape(op, arg, t, expected)) }
}

/// The elements of `t` lie one after the other.
#[inline]
pub fn contiguous(op: &'static str, arg: &'static str, t: &View) -> Result<()> {
    if t.is_contiguous() { Ok(()) } else { Err(wrong_layout(op, arg, t, "contiguous")) }
}

/// Dtype, shape, and one element after the other.
pub fn whole(op: &'static str, arg: &'static str, t: &View, of: DType, expected: &[u64]) -> Result<()> {
    dtype(op, arg, t, &[of])?;
    shape(op, arg, t, expected)?;
    contiguous(op, arg, t)
}

/// Elements of the last dimension of `t` are neighbours in memory.
#[inline]
pub fn last_stride_1(op: &'static str, arg: &'static str, t: &View) -> Result<()> {
    // Without dimensions: 1, as beyond the last one.
    let last = t.rank().wrapping_sub(1);
    let fine = t.stride(last) == 1 || t.dim(last) <= 1 || t.is_empty();
    if fine { Ok(()) } else { Err(wrong_layout(op, arg, t, "last dimension with stride 1")) }
}

/// The first element of `t`, and of each row of it, is at a multiple of `bytes`: vector accesses along the last dimension
/// are then aligned. `bytes` is a power of two. Strides of dimensions of size 1 do not count, nor does anything of an empty tensor.
#[inline]
pub fn aligned(op: &'static str, arg: &'static str, t: &View, bytes: u64) -> Result<()> {
    debug_assert!(bytes.is_power_of_two());
    let strides = (1..t.rank()).fold(0, |all, i| all | if t.dim(i - 1) == 1 { 0 } else { t.stride(i - 1) });
    let starts = t.ptr() | strides.wrapping_mul(t.dtype().size());
    if starts & (bytes - 1) == 0 || t.is_empty() { Ok(()) } else { Err(unaligned(op, arg, t, bytes)) }
}

/// `value` is a multiple of `by`.
#[inline]
pub fn divisible(op: &'static str, arg: &'static str, value: u64, by: u64) -> Result<()> {
    if value.is_multiple_of(by) { Ok(()) } else { Err(indivisible(op, arg, value, by)) }
}

/// `value` is one of `allowed`.
#[inline]
pub fn one_of<T: PartialEq + Display>(op: &'static str, arg: &'static str, value: T, allowed: &[T]) -> Result<()> {
    if allowed.contains(&value) { Ok(()) } else { Err(none_of(op, arg, &value, allowed)) }
}

/// `value` lies in `low..=high`.
#[inline]
pub fn in_range(op: &'static str, arg: &'static str, value: u64, low: u64, high: u64) -> Result<()> {
    if (low..=high).contains(&value) { Ok(()) } else { Err(out_of_range(op, arg, value, low, high)) }
}

/// `value` as the 32-bit number that kernels count with.
#[inline]
pub fn fits_u32(op: &'static str, arg: &'static str, value: u64) -> Result<u32> {
    u32::try_from(value).map_err(|_| out_of_range(op, arg, value, 0, u32::MAX.into()))
}

/// Every tensor is on the device of `stream`.
pub fn same_device(op: &'static str, stream: &Stream, tensors: &[(&'static str, &View)]) -> Result<()> {
    tensors.iter().try_for_each(|(arg, t)| on_device(op, stream.device(), arg, t.device()))
}

/// The argument's device is the expected one.
#[inline]
pub(crate) fn on_device(op: &'static str, expected: &Device, arg: &'static str, got: &Device) -> Result<()> {
    if expected == got { Ok(()) } else { Err(wrong_device(op, expected, arg, got)) }
}

/// The byte ranges of two tensors have nothing in common. Views that interleave within one range count as overlapping.
pub fn no_overlap(op: &'static str, a: (&'static str, &View), b: (&'static str, &View)) -> Result<()> {
    let (x, y) = (a.1, b.1);
    let apart = x.ptr() + x.span_bytes() <= y.ptr() || y.ptr() + y.span_bytes() <= x.ptr();
    if apart || x.span_bytes() == 0 || y.span_bytes() == 0 || x.device() != y.device() {
        return Ok(());
    }
    Err(overlap(op, a.0, b.0))
}

/// No output overlaps an input or another output. Inputs may overlap each other.
pub fn no_overlaps(op: &'static str, inputs: &[(&'static str, &View)], outputs: &[(&'static str, &View)]) -> Result<()> {
    for input in inputs {
        outputs.iter().try_for_each(|output| no_overlap(op, *input, *output))?;
    }
    for (i, output) in outputs.iter().enumerate() {
        outputs[i + 1..].iter().try_for_each(|other| no_overlap(op, *output, *other))?;
    }
    Ok(())
}

/// The configuration is one that the device and the compiled kernel allow.
pub(crate) fn launch_config(op: &'static str, config: &LaunchConfig, max_threads: u32) -> Result<()> {
    let most = if max_threads == 0 { 1024 } else { max_threads };
    let [x, y, z] = config.grid;
    let fine = (1..=most).contains(&config.threads)
        && config.shared_bytes <= MAX_SHARED_BYTES
        && x <= i32::MAX as u32
        && y <= 65535
        && z <= 65535;
    if fine { Ok(()) } else { wrong_config(op, config, most) }
}

// Errors are made apart from the checks: a launch runs code that the driver has pushed out of the caches, so it should be short.

#[cold]
fn wrong_config(op: &'static str, config: &LaunchConfig, most: u32) -> Result<()> {
    in_range(op, "threads of a block", config.threads.into(), 1, most.into())?;
    in_range(op, "shared memory of a block", config.shared_bytes.into(), 0, MAX_SHARED_BYTES.into())?;
    in_range(op, "grid x", config.grid[0].into(), 0, i32::MAX as u64)?;
    in_range(op, "grid y", config.grid[1].into(), 0, 65535)?;
    in_range(op, "grid z", config.grid[2].into(), 0, 65535)
}

#[cold]
fn wrong_rank(op: &'static str, arg: &'static str, t: &View, n: usize) -> Error {
    let plural = if n == 1 { "" } else { "s" };
    Error::Shape { op, arg, expected: format!("{n} dimension{plural}"), got: format!("{:?}", t.shape()) }
}

#[cold]
fn wrong_dtype(op: &'static str, arg: &'static str, t: &View, allowed: &[DType]) -> Error {
    Error::DType { op, arg, allowed: list(allowed), got: t.dtype() }
}

#[cold]
fn wrong_shape(op: &'static str, arg: &'static str, t: &View, expected: &[u64]) -> Error {
    Error::Shape { op, arg, expected: format!("{expected:?}"), got: format!("{:?}", t.shape()) }
}

#[cold]
fn wrong_layout(op: &'static str, arg: &'static str, t: &View, expected: &str) -> Error {
    Error::Layout { op, arg, expected: expected.to_owned(), got: layout(t) }
}

#[cold]
fn unaligned(op: &'static str, arg: &'static str, t: &View, bytes: u64) -> Error {
    let got = format!("address {:#x}, {}", t.ptr(), layout(t));
    Error::Layout { op, arg, expected: format!("rows that start at multiples of {bytes} bytes"), got }
}

#[cold]
fn indivisible(op: &'static str, arg: &'static str, value: u64, by: u64) -> Error {
    Error::Value { op, arg, allowed: format!("multiples of {by}"), got: value.to_string() }
}

#[cold]
fn none_of<T: Display>(op: &'static str, arg: &'static str, value: &T, allowed: &[T]) -> Error {
    Error::Value { op, arg, allowed: list(allowed), got: value.to_string() }
}

#[cold]
fn out_of_range(op: &'static str, arg: &'static str, value: u64, low: u64, high: u64) -> Error {
    Error::Value { op, arg, allowed: format!("{low} to {high}"), got: value.to_string() }
}

#[cold]
fn wrong_device(op: &'static str, expected: &Device, arg: &'static str, got: &Device) -> Error {
    Error::DeviceMismatch { op, arg, expected: expected.to_string(), got: got.to_string() }
}

#[cold]
fn overlap(op: &'static str, a: &'static str, b: &'static str) -> Error {
    Error::Overlap { op, a, b }
}

fn layout(t: &View) -> String {
    format!("shape {:?} with strides {:?}", t.shape(), t.strides())
}

fn list<T: Display>(values: &[T]) -> String {
    let mut text = String::new();
    for (i, value) in values.iter().enumerate() {
        text.push_str(if i == 0 { "" } else { ", " });
        text.push_str(&value.to_string());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Buffer, TensorRef};

    const OP: &str = "some_op";

    fn buffer(len: usize) -> Buffer<f32> {
        Device::emulator().zeros(len).unwrap()
    }

    fn text(result: Result<()>) -> String {
        result.expect_err("the check must refuse this").to_string()
    }

    #[test]
    fn shapes_and_types() {
        let b = buffer(12);
        let t = b.tensor(&[3, 4]).unwrap();
        rank(OP, "x", &t, 2).unwrap();
        assert_eq!(text(rank(OP, "x", &t, 1)), "some_op: x has shape [3, 4], expected 1 dimension");
        shape(OP, "x", &t, &[3, 4]).unwrap();
        assert_eq!(text(shape(OP, "x", &t, &[4, 3])), "some_op: x has shape [3, 4], expected [4, 3]");
        dtype(OP, "x", &t, &[DType::Bf16, DType::F32]).unwrap();
        assert_eq!(text(dtype(OP, "x", &t, &[DType::Bf16, DType::E4m3])), "some_op: x is f32, allowed: bf16, e4m3");
    }

    #[test]
    fn layouts() {
        let b = buffer(64);
        let rows = b.strided(&[3, 4], &[6, 1], 0).unwrap();
        assert_eq!(
            text(contiguous(OP, "x", &rows)),
            "some_op: layout of x is shape [3, 4] with strides [6, 1], expected contiguous"
        );
        last_stride_1(OP, "x", &rows).unwrap();
        let columns = b.strided(&[3, 4], &[1, 6], 0).unwrap();
        assert!(matches!(last_stride_1(OP, "x", &columns), Err(Error::Layout { .. })));
        // Row stride of 24 bytes: 8-byte vectors fit, 16-byte vectors do not.
        aligned(OP, "x", &rows, 8).unwrap();
        assert!(matches!(aligned(OP, "x", &rows, 16), Err(Error::Layout { .. })));
        // A single row that starts in the middle of a 16-byte word.
        assert!(matches!(aligned(OP, "x", &b.strided(&[1, 4], &[8, 1], 2).unwrap(), 16), Err(Error::Layout { .. })));
        aligned(OP, "x", &b.strided(&[1, 4], &[7, 1], 4).unwrap(), 16).unwrap();
        aligned(OP, "x", &b.strided(&[0, 4], &[7, 1], 1).unwrap(), 16).unwrap();
    }

    #[test]
    fn values() {
        divisible(OP, "hidden", 256, 64).unwrap();
        assert_eq!(text(divisible(OP, "hidden", 100, 64)), "some_op: hidden is 100, allowed: multiples of 64");
        one_of(OP, "group", 32u32, &[32, 64]).unwrap();
        assert_eq!(text(one_of(OP, "group", 48u32, &[32, 64])), "some_op: group is 48, allowed: 32, 64");
        assert_eq!(fits_u32(OP, "num_tokens", u32::MAX as u64).unwrap(), u32::MAX);
        assert!(matches!(fits_u32(OP, "num_tokens", 1 << 32), Err(Error::Value { arg: "num_tokens", .. })));
        assert!(matches!(in_range(OP, "k", 0, 1, 9), Err(Error::Value { arg: "k", .. })));
    }

    #[test]
    fn devices_and_overlap() {
        let (plain, checked) = (Device::emulator(), Device::emulator().checked());
        let (a, b) = (plain.zeros::<f32>(8).unwrap(), checked.zeros::<f32>(8).unwrap());
        let (x, y) = (a.tensor(&[8]).unwrap(), b.tensor(&[8]).unwrap());
        same_device(OP, &plain.default_stream(), &[("x", &x)]).unwrap();
        assert!(matches!(
            same_device(OP, &plain.default_stream(), &[("x", &x), ("y", &y)]),
            Err(Error::DeviceMismatch { arg: "y", .. })
        ));

        let (low, high): (TensorRef, TensorRef) = (a.strided(&[4], &[1], 0).unwrap(), a.strided(&[4], &[1], 4).unwrap());
        no_overlap(OP, ("x", &low), ("out", &high)).unwrap();
        let middle = a.strided(&[4], &[1], 3).unwrap();
        assert_eq!(text(no_overlap(OP, ("x", &low), ("out", &middle))), "some_op: x and out overlap in memory");
        no_overlap(OP, ("x", &low), ("out", &a.strided(&[0], &[1], 2).unwrap())).unwrap();

        // Inputs may share memory; every output is held against all inputs and all other outputs.
        no_overlaps(OP, &[("x", &low), ("y", &low)], &[("out", &high)]).unwrap();
        let apart = a.strided(&[1], &[1], 0).unwrap();
        let error = no_overlaps(OP, &[("x", &apart), ("y", &low)], &[("out", &high), ("sf", &middle)]);
        assert_eq!(text(error), "some_op: y and sf overlap in memory");
        let error = no_overlaps(OP, &[("x", &apart)], &[("out", &high), ("sf", &middle)]);
        assert_eq!(text(error), "some_op: out and sf overlap in memory");
    }

    #[test]
    fn launch_configurations() {
        let fine = LaunchConfig::new(10, 256);
        launch_config(OP, &fine, 0).unwrap();
        launch_config(OP, &fine, 256).unwrap();
        for (bad, max_threads) in [
            (LaunchConfig::new(1, 0), 0),
            (LaunchConfig::new(1, 1025), 0),
            (LaunchConfig::new(1, 256), 128),
            (LaunchConfig::grid([1, 65536, 1], 32), 0),
            (LaunchConfig { shared_bytes: MAX_SHARED_BYTES + 1, ..fine }, 0),
        ] {
            assert!(matches!(launch_config(OP, &bad, max_threads), Err(Error::Value { op: OP, .. })), "{bad:?}");
        }
    }
}
