//! Transposes of one matrix ([`transpose`]) or of each matrix of a batch ([`batched_transpose`]).

use crate::{DType, Error, Result, Stream, TensorMut, TensorRef, check};
use ferrotile_kernels::device::{In, Out};
use ferrotile_kernels::entry::Entry;
use ferrotile_kernels::launch::LaunchConfig;
use ferrotile_kernels::transpose::batched_transpose::{self as k, Cells};

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

/// Kernels the benchmark compares.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// Tiles through registers, 128-byte pieces.
    Small,
    /// As `Small` without cache hints.
    SmallPlain,
    /// Tiles through registers, 256-byte pieces.
    Large,
    /// As `Large` without cache hints.
    LargePlain,
    /// Tiles through one stage.
    One,
    /// Tiles through three stages.
    Three,
    /// As `Three` with plain stores.
    Plain,
    /// As `Three`; 512-byte pieces read, 128-byte pieces written.
    Wide,
    /// As `Three`; 128-byte pieces read, 512-byte pieces written.
    Tall,
    /// One stage of half the size; 128-byte pieces read, 256-byte pieces written.
    HalfOne,
    /// Three such stages.
    HalfThree,
    /// One stage of 128-byte pieces, 64 threads.
    Mini,
}

/// What the benchmark compares: a kernel, the order of its tiles, and how many blocks it has.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Variant {
    /// The kernel.
    pub kernel: Kernel,
    /// Tile rows of a band that is walked column by column.
    pub group: u32,
    /// Bytes of a multiprocessor's shared memory that blocks may fill, if they take one tile after the other. 0: a block per tile.
    pub resident_bytes: u32,
    /// At most so many blocks, for tests.
    pub blocks: u32,
}

const PER_TILE: u32 = 0;
const FULL: u32 = 200 << 10;
const ROWS: u32 = 1;
const COLUMNS: u32 = u32::MAX;

/// The variants by name.
#[doc(hidden)]
pub const VARIANTS: [(&str, Variant); 17] = {
    const fn v(kernel: Kernel, group: u32, resident_bytes: u32) -> Variant {
        Variant { kernel, group, resident_bytes, blocks: u32::MAX }
    }
    [
        ("small", v(Kernel::Small, ROWS, PER_TILE)),
        ("small_plain", v(Kernel::SmallPlain, ROWS, PER_TILE)),
        ("mini", v(Kernel::Mini, ROWS, PER_TILE)),
        ("large", v(Kernel::Large, ROWS, PER_TILE)),
        ("large_m", v(Kernel::Large, COLUMNS, PER_TILE)),
        ("large_16", v(Kernel::Large, 16, PER_TILE)),
        ("large_plain", v(Kernel::LargePlain, ROWS, PER_TILE)),
        ("one", v(Kernel::One, ROWS, PER_TILE)),
        ("one_loop", v(Kernel::One, ROWS, FULL)),
        ("three", v(Kernel::Three, ROWS, FULL)),
        ("three_m", v(Kernel::Three, COLUMNS, FULL)),
        ("three_16", v(Kernel::Three, 16, FULL)),
        ("three_plain", v(Kernel::Plain, ROWS, FULL)),
        ("wide", v(Kernel::Wide, ROWS, FULL)),
        ("tall", v(Kernel::Tall, ROWS, FULL)),
        ("half_one", v(Kernel::HalfOne, ROWS, PER_TILE)),
        ("half_three", v(Kernel::HalfThree, ROWS, FULL)),
    ]
};

/// Swap rows and columns of each matrix of a batch: `out[b][j][i] = x[b][i][j]`.
///
/// | argument | shape | dtype | layout |
/// |---|---|---|---|
/// | `x` | `[b, m, n]` | any of 1, 2 or 4 bytes ([`DTYPES`]) | last stride 1 |
/// | `out` | `[b, n, m]` | that of `x` | contiguous |
///
/// Bits are copied, NaN payloads included. An element of [`DType::E2m1x2`] is a byte: its two values stay together. Any sizes and
/// strides work; fast are `m` and `n` that are multiples of 16 bytes, with rows that start at multiples of 16 bytes, or of 4
/// elements at a small loss.
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
    run("batched_transpose", 3, stream, &args, None)
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
    run("transpose", 2, stream, &args, None)
}

/// [`batched_transpose`] with a chosen variant, where tiles of 16-byte vectors are used at all. For the benchmark.
///
/// # Errors
/// Those of [`batched_transpose`].
#[doc(hidden)]
pub fn batched_transpose_with(stream: &Stream, args: Args<'_>, variant: Variant) -> Result<()> {
    run("batched_transpose", 3, stream, &args, Some(variant))
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
    // The smallest tiles that are ever used have 32 rows and columns.
    let tiles = (m.div_ceil(32) * n.div_ceil(32)).saturating_mul(batches);
    check::in_range(op, "tiles of x", tiles, 0, i32::MAX as u64)?;

    // No overflow: the last row and matrix lie within the tensor, whose bytes are known to fit in 64 bits.
    let row_stride = if m > 1 { x.stride(rank - 2) * size } else { 0 };
    let batch_stride = if batches > 1 { batch_stride * size } else { 0 };
    let cell = 16 / size;
    let whole = m.is_multiple_of(cell) && n.is_multiple_of(cell) && out.ptr().is_multiple_of(16);
    let aligned = |bytes: u64| [x.ptr(), row_stride, batch_stride].iter().all(|v| v.is_multiple_of(bytes));
    let access = match whole {
        true if aligned(16) => Access::Wide,
        true if aligned(4 * size) => Access::Narrow,
        _ => Access::Any,
    };
    Ok(Some(Plan { batches: batches as u32, m: m as u32, n: n as u32, size: size as u32, row_stride, batch_stride, access }))
}

fn run(op: &'static str, rank: usize, stream: &Stream, args: &Args<'_>, variant: Option<Variant>) -> Result<()> {
    let Some(plan) = check(op, rank, stream, args)? else { return Ok(()) };
    let Plan { batches, m, n, size, row_stride, batch_stride, access } = plan;
    let (x, out): (In<u8>, Out<u8>) = (args.x.input(), args.out.output());
    let kernel = match size {
        1 => Kernel::Small,
        _ => Kernel::Large,
    };
    let variant = variant.unwrap_or(Variant { kernel, group: 1, resident_bytes: 0, blocks: u32::MAX });
    let Variant { group, .. } = variant;
    let v = 16 / size;
    let cells = |cells: Cells| k::cells_config(batches, m, n, v, cells);
    // Each kernel has an argument type of its own, with the same fields.
    macro_rules! launch {
        ($kernel:ident { $($more:ident),* }, $config:expr, $b1:ident, $b2:ident, $b4:ident) => {{
            let entry: &'static Entry<k::$kernel::Args> = match size {
                1 => &k::$kernel::$b1,
                2 => &k::$kernel::$b2,
                _ => &k::$kernel::$b4,
            };
            let config: LaunchConfig = $config;
            stream.launch(op, entry, &config, &k::$kernel::Args { x, out, m, n, row_stride, batch_stride, $($more),* })
        }};
    }
    macro_rules! staged {
        ($kernel:ident, $rows:literal x $cols:literal, $stages:literal, $($entry:ident),*) => {{
            let cells = Cells { rows: $rows, cols: $cols };
            let tiles = k::num_tiles(batches, m, n, v, cells);
            let shared = k::staged_config(1, v, cells, $stages).shared_bytes;
            // No more threads than 512 and 1024 registers for each of 128 of them.
            let resident = (variant.resident_bytes / shared).min(512 / ($rows * $cols)).max(1) * stream.device().num_sms();
            let most = if variant.resident_bytes == 0 { tiles } else { resident };
            let blocks = tiles.min(most).min(variant.blocks);
            launch!($kernel { tiles, group }, k::staged_config(blocks, v, cells, $stages), $($entry),*)
        }};
    }
    match (access, variant.kernel) {
        (Access::Any, _) => launch!(any {}, k::any_config(batches, m, n, size), b1, b2, b4),
        // Four elements of 4 bytes are not narrow.
        (Access::Narrow, _) => launch!(small { group }, cells(Cells::SMALL), b1_narrow, b2_narrow, b4),
        (Access::Wide, Kernel::Small) => launch!(small { group }, cells(Cells::SMALL), b1, b2, b4),
        (Access::Wide, Kernel::SmallPlain) => launch!(small { group }, cells(Cells::SMALL), b1_plain, b2_plain, b4_plain),
        (Access::Wide, Kernel::Mini) => staged!(staged_half, 8 x 8, 1, mini_b1, mini_b2, mini_b4),
        (Access::Wide, Kernel::Large) => launch!(large { group }, cells(Cells::LARGE), b1, b2, b4),
        (Access::Wide, Kernel::LargePlain) => launch!(large { group }, cells(Cells::LARGE), b1_plain, b2_plain, b4_plain),
        (Access::Wide, Kernel::One) => staged!(staged, 16 x 16, 1, one_b1, one_b2, one_b4),
        (Access::Wide, Kernel::Three) => staged!(staged, 16 x 16, 3, three_b1, three_b2, three_b4),
        (Access::Wide, Kernel::Plain) => staged!(staged, 16 x 16, 3, plain_b1, plain_b2, plain_b4),
        (Access::Wide, Kernel::Wide) => staged!(staged, 8 x 32, 3, wide_b1, wide_b2, wide_b4),
        (Access::Wide, Kernel::Tall) => staged!(staged, 32 x 8, 3, tall_b1, tall_b2, tall_b4),
        (Access::Wide, Kernel::HalfOne) => staged!(staged_half, 16 x 8, 1, one_b1, one_b2, one_b4),
        (Access::Wide, Kernel::HalfThree) => staged!(staged_half, 16 x 8, 3, three_b1, three_b2, three_b4),
    }
}
