//! Transposes of one matrix ([`transpose`]) or of each matrix of a batch ([`batched_transpose`]).

use crate::{DType, Error, Result, Stream, TensorMut, TensorRef, check};
use ferrotile_kernels::device::{In, Out};
use ferrotile_kernels::entry::Entry;
use ferrotile_kernels::transpose::batched_transpose as k;

/// Element types that can be transposed: all of 1, 2 or 4 bytes.
pub const DTYPES: [DType; 10] = [
    DType::E4m3,
    DType::Bf16,
    DType::F32,
    DType::E5m2,
    DType::F16,
    DType::U8,
    DType::I32,
    DType::U32,
    DType::E2m1x2,
    DType::Ue8m0x4,
];

/// Arguments of [`batched_transpose`] and [`transpose`].
#[derive(Debug)]
pub struct Args<'a> {
    /// `[b, m, n]` (for [`transpose`] `[m, n]`), last stride 1, other strides as you like.
    pub x: TensorRef<'a>,
    /// `[b, n, m]` (for [`transpose`] `[n, m]`), contiguous, element type of `x`.
    pub out: TensorMut<'a>,
}

/// Swap rows and columns of each matrix of a batch: `out[b][j][i] = x[b][i][j]`.
///
/// | argument | shape | dtype | layout |
/// |---|---|---|---|
/// | `x` | `[b, m, n]` | any of 1, 2 or 4 bytes ([`DTYPES`]) | last stride 1 |
/// | `out` | `[b, n, m]` | that of `x` | contiguous |
///
/// Bits are copied, NaN payloads included. An element of [`DType::E2m1x2`] is a byte: its two values stay together. Any sizes and
/// strides work. Fast is an `n` of whole 16 bytes with rows of `x` that start at multiples of 16 bytes, fastest if `m` elements are
/// whole 16 bytes too; then rows may also start at multiples of 4 elements, at a small loss. Everything else goes element by element
/// and takes about twice as long.
///
/// Asynchronous on `stream`, allocates nothing. Empty tensors launch nothing. (Facts: moe.md section 13.)
///
/// ```
/// use ferrotile::{Device, transpose::batched_transpose::{Args, batched_transpose}};
///
/// let device = Device::emulator();
/// let x = device.upload(&[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0])?;
/// let mut out = device.zeros::<f32>(6)?;
/// batched_transpose(&device.stream()?, Args { x: x.tensor(&[1, 2, 3])?, out: out.tensor_mut(&[1, 3, 2])? })?;
/// assert_eq!(out.to_vec()?, [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
/// # Ok::<(), ferrotile::Error>(())
/// ```
///
/// # Errors
/// [`Error::Shape`], [`Error::DType`], [`Error::Layout`] (last stride of `x`, gaps in `out`, an address that is no multiple of the
/// element size), [`Error::Value`] (`m` or `n` of 2^31 or more, more than 2^31 tiles), [`Error::Overlap`], [`Error::DeviceMismatch`],
/// [`Error::Driver`].
pub fn batched_transpose(stream: &Stream, args: Args<'_>) -> Result<()> {
    run("batched_transpose", 3, stream, &args)
}

/// [`batched_transpose`] of a single matrix: `x` is `[m, n]`, `out` is `[n, m]`.
///
/// ```
/// use ferrotile::{Device, transpose::batched_transpose::{Args, transpose}};
///
/// let device = Device::emulator();
/// // The left half of a matrix that is twice as wide.
/// let x = device.upload(&[1u8, 2, 0, 0, 3, 4, 0, 0])?;
/// let mut out = device.zeros::<u8>(4)?;
/// transpose(&device.stream()?, Args { x: x.strided(&[2, 2], &[4, 1], 0)?, out: out.tensor_mut(&[2, 2])? })?;
/// assert_eq!(out.to_vec()?, [1, 3, 2, 4]);
/// # Ok::<(), ferrotile::Error>(())
/// ```
///
/// # Errors
/// Those of [`batched_transpose`].
pub fn transpose(stream: &Stream, args: Args<'_>) -> Result<()> {
    run("transpose", 2, stream, &args)
}

/// What [`check()`] found: sizes that fit the kernels.
#[derive(Clone, Copy)]
struct Plan {
    batches: u32,
    m: u32,
    n: u32,
    /// Bytes of an element.
    size: u32,
    /// In bytes, 0 where there is one row or one matrix.
    row_stride: u64,
    batch_stride: u64,
    access: Access,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Access {
    /// 16-byte vectors on both sides.
    Wide,
    /// Four elements at a time from `x`, 16-byte vectors to `out`.
    Narrow,
    /// 16-byte vectors from `x`; output rows start anywhere.
    Ragged,
    /// Single elements.
    Any,
}

/// `None` when there is nothing to do.
fn check(op: &'static str, rank: usize, stream: &Stream, Args { x, out }: &Args<'_>) -> Result<Option<Plan>> {
    check::rank(op, "x", x, rank)?;
    check::dtype(op, "x", x, &DTYPES)?;
    let (m, n) = (x.dim(rank - 2), x.dim(rank - 1));
    let (batches, batch_stride) = if rank == 3 { (x.dim(0), x.stride(0)) } else { (1, 0) };
    check::shape(op, "out", out, &[batches, n, m][3 - rank..])?;
    check::dtype(op, "out", out, &[x.dtype()])?;
    check::last_stride_1(op, "x", x)?;
    check::contiguous(op, "out", out)?;
    check::same_device(op, stream, &[("x", x), ("out", out)])?;
    let size = x.dtype().size();
    for (arg, ptr) in [("x", x.ptr()), ("out", out.ptr())] {
        if !ptr.is_multiple_of(size) {
            let expected = format!("an address that is a multiple of {size}");
            return Err(Error::Layout { op, arg, expected, got: format!("address {ptr:#x}") });
        }
    }
    check::no_overlap(op, ("x", x), ("out", out))?;
    if x.is_empty() {
        return Ok(None);
    }
    // The kernels add a tile's edge to row and column numbers.
    check::in_range(op, "rows of x", m, 0, i32::MAX as u64)?;
    check::in_range(op, "columns of x", n, 0, i32::MAX as u64)?;
    // The smallest tiles, those of 4-byte elements and of `any`, have 64 rows and columns.
    let tiles = (m.div_ceil(64) * n.div_ceil(64)).saturating_mul(batches);
    check::in_range(op, "tiles of x", tiles, 0, i32::MAX as u64)?;

    // No overflow: the last row and matrix lie within the tensor, whose bytes are known to fit in 64 bits.
    let row_stride = if m > 1 { x.stride(rank - 2) * size } else { 0 };
    let batch_stride = if batches > 1 { batch_stride * size } else { 0 };
    let cell = 16 / size;
    let whole = m.is_multiple_of(cell) && out.ptr().is_multiple_of(16);
    let aligned = |bytes: u64| [x.ptr(), row_stride, batch_stride].iter().all(|v| v.is_multiple_of(bytes));
    let access = match whole {
        _ if !n.is_multiple_of(cell) => Access::Any,
        true if aligned(16) => Access::Wide,
        true if aligned(4 * size) => Access::Narrow,
        false if aligned(16) => Access::Ragged,
        _ => Access::Any,
    };
    Ok(Some(Plan { batches: batches as u32, m: m as u32, n: n as u32, size: size as u32, row_stride, batch_stride, access }))
}

fn run(op: &'static str, rank: usize, stream: &Stream, args: &Args<'_>) -> Result<()> {
    let Some(plan) = check(op, rank, stream, args)? else { return Ok(()) };
    let Plan { batches, m, n, size, row_stride, batch_stride, access } = plan;
    let (x, out): (In<u8>, Out<u8>) = (args.x.input(), args.out.output());
    let few = k::tiles_config(batches, m, n, 16 / size, k::CELLS).grid[0] <= k::FEW_TILES;
    let tiles = |entry: &'static Entry<k::tiles::Args>, cells: u32| {
        let config = k::tiles_config(batches, m, n, 16 / size, cells);
        stream.launch(op, entry, &config, &k::tiles::Args { x, out, m, n, row_stride, batch_stride })
    };
    let ragged = |entry: &'static Entry<k::ragged::Args>| {
        let config = k::tiles_config(batches, m, n, 16 / size, k::CELLS);
        let start = (args.out.ptr() % 16) as u32 / size;
        stream.launch(op, entry, &config, &k::ragged::Args { x, out, m, n, row_stride, batch_stride, start })
    };
    let any = |entry: &'static Entry<k::any::Args>| {
        let config = k::any_config(batches, m, n, size);
        stream.launch(op, entry, &config, &k::any::Args { x, out, m, n, row_stride, batch_stride })
    };
    match (access, size) {
        (Access::Wide, 1) if few => tiles(&k::tiles::b1_small, k::SMALL_CELLS),
        (Access::Wide, 1) => tiles(&k::tiles::b1, k::CELLS),
        (Access::Wide, 2) if few => tiles(&k::tiles::b2_small, k::SMALL_CELLS),
        (Access::Wide, 2) => tiles(&k::tiles::b2, k::CELLS),
        (Access::Narrow, 1) => tiles(&k::tiles::b1_narrow, k::CELLS),
        (Access::Narrow, 2) => tiles(&k::tiles::b2_narrow, k::CELLS),
        // Four elements of 4 bytes are not narrow.
        (Access::Wide | Access::Narrow, _) => tiles(&k::tiles::b4, k::CELLS),
        (Access::Ragged, 1) => ragged(&k::ragged::b1),
        (Access::Ragged, 2) => ragged(&k::ragged::b2),
        (Access::Ragged, _) => ragged(&k::ragged::b4),
        (Access::Any, 1) => any(&k::any::b1),
        (Access::Any, 2) => any(&k::any::b2),
        (Access::Any, _) => any(&k::any::b4),
    }
}
