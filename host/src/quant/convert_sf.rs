//! Launcher of `convert_sf`.

use super::common_tensor::LAYOUTS;
use super::{Sf, SfLayout, SfMut};
use crate::{DType, Result, Stream, TensorMut, check};
use ferrotile_kernels::device::Out;
use ferrotile_kernels::launch::LaunchConfig;
use ferrotile_kernels::quant::convert_sf as k;

/// Arguments of [`convert_sf`].
#[derive(Debug)]
pub struct Args<'a> {
    /// The scales, in any layout.
    pub sf: Sf<'a>,
    /// Block rows and block columns, `(M, K)`, which packed words do not say.
    pub num_blocks: (u64, u64),
    /// The same scales in another layout, or another pitch.
    pub out: SfMut<'a>,
    /// i32 `(1,)`: the number of scales that `out` cannot hold is added. Zero it first.
    pub bad: Option<TensorMut<'a>>,
}

/// Scale factors of a quantised tensor in another layout; its data stay as they are.
///
/// | tensor | dtype | shape | layout |
/// |---|---|---|---|
/// | `sf`, `out` | f32, ue8m0x4 or e4m3 | as [`sf_shape`](super::sf_shape) says for `(M, K)` blocks | any [`SfLayout`]; `out` starts columns at multiples of 16 bytes |
///
/// A scale that `out` can hold is the same number there. Others are counted in `bad`:
///
/// | `out` | holds | others |
/// |---|---|---|
/// | f32 | all | |
/// | packed | powers of two from 2^-126 to 2^127, 0 and infinity | rounded up to the next of these; a sign is lost, NaN becomes infinity (255) |
/// | e4m3 | e4m3 values, NaN | rounded to nearest even, 448 at most |
///
/// With a scale that was rounded the tensor is another one: quantise it anew instead. Unused bytes of a last packed word are written
/// as 0. An e4m3 NaN becomes `0x7F` whatever its sign. The per-channel layout is for blocks of one channel, which is not checked here. Source:
/// quant.md 1 and 3.
///
/// Asynchronous; allocates nothing; no blocks, no launch. [`QuantRef::scales_in`](super::QuantRef::scales_in) and
/// [`QuantTensor::into_layout`](super::QuantTensor::into_layout) allocate the output.
///
/// # Errors
/// [`Shape`](crate::Error::Shape) and [`DType`](crate::Error::DType) when scales or `bad` are not what `num_blocks` and the layouts say,
/// [`Layout`](crate::Error::Layout) for strides, [`Value`](crate::Error::Value) for sizes beyond 31 bits,
/// [`DeviceMismatch`](crate::Error::DeviceMismatch), [`Overlap`](crate::Error::Overlap), [`Driver`](crate::Error::Driver). The outputs are
/// untouched then.
///
/// ```
/// use ferrotile::quant::convert_sf::{Args, convert_sf};
/// use ferrotile::quant::{Sf, SfLayout, SfMut};
/// use ferrotile::{Device, Ue8m0x4};
///
/// let device = Device::emulator();
/// // 2 tokens with 3 scales each; 3 is no power of two.
/// let sf = device.upload(&[1.0f32, 2.0, 4.0, 0.5, 3.0, 0.25])?;
/// let (mut packed, mut bad) = (device.zeros::<Ue8m0x4>(4)?, device.zeros::<i32>(1)?);
/// convert_sf(
///     &device.stream()?,
///     Args {
///         sf: Sf { tensor: sf.tensor(&[2, 3])?, layout: SfLayout::RowMajor },
///         num_blocks: (2, 3),
///         out: SfMut { tensor: packed.strided_mut(&[2, 1], &[1, 4], 0)?, layout: SfLayout::ColMajorPacked },
///         bad: Some(bad.tensor_mut(&[1])?),
///     },
/// )?;
/// let packed = packed.to_vec()?;
/// assert_eq!([packed[0], packed[1]].map(|w| w.0.to_le_bytes()), [[127, 128, 129, 0], [126, 129, 125, 0]]);
/// assert_eq!(bad.to_vec()?, [1]);
/// # Ok::<(), ferrotile::Error>(())
/// ```
pub fn convert_sf(stream: &Stream, args: Args<'_>) -> Result<()> {
    let op = "convert_sf";
    let (rows, columns) = args.num_blocks;
    check::in_range(op, "block rows", rows, 0, i32::MAX as u64)?;
    check::in_range(op, "block columns", columns, 0, i32::MAX as u64)?;
    let from = args.sf.check(op, "sf", LAYOUTS, args.num_blocks)?;
    let to = args.out.check(op, "out", LAYOUTS, args.num_blocks)?;
    let (sf, out) = (&args.sf.tensor, &args.out.tensor);
    check::same_device(op, stream, &[("sf", sf), ("out", out)])?;
    check::no_overlap(op, ("sf", sf), ("out", out))?;
    if let Some(bad) = &args.bad {
        check::dtype(op, "bad", bad, &[DType::I32])?;
        check::shape(op, "bad", bad, &[1])?;
        check::aligned(op, "bad", bad, 4)?;
        check::same_device(op, stream, &[("bad", bad)])?;
        check::no_overlaps(op, &[("sf", sf)], &[("out", out), ("bad", bad)])?;
    }
    // Threads run along the contiguous dimension of the output.
    let down = args.out.layout.is_col_major();
    let (inner, outer) = if down { (out.dim(0), out.dim(1)) } else { (out.dim(1), out.dim(0)) };
    let blocks = k::blocks(inner, outer);
    check::in_range(op, "number of blocks", blocks, 0, i32::MAX as u64)?;
    if out.is_empty() {
        return Ok(());
    }
    let lanes_log2 = k::lanes_log2(inner);
    let kernel_args = k::convert::Args {
        sf: sf.input(),
        sf_form: form(args.sf.layout),
        sf_row: from.row,
        sf_col: from.col,
        out: out.output(),
        out_form: form(args.out.layout),
        out_row: to.row,
        out_col: to.col,
        rows: rows as u32,
        columns: columns as u32,
        down: down.into(),
        lanes_log2,
        tiles: inner.div_ceil(1 << lanes_log2) as u32,
        bad: args.bad.as_ref().map_or(Out::null(), |bad| bad.output::<u32>()),
        count: args.bad.is_some().into(),
    };
    stream.launch(op, &k::convert::ENTRY, &LaunchConfig::new(blocks as u32, k::THREADS), &kernel_args)
}

/// How kernels call it.
fn form(layout: SfLayout) -> u32 {
    match layout {
        SfLayout::RowMajor | SfLayout::ColMajor => k::F32,
        SfLayout::ColMajorPacked | SfLayout::RowMajorPacked => k::PACKED,
        SfLayout::PerChannelPacked => k::PER_CHANNEL,
        SfLayout::RowMajorE4m3 | SfLayout::ColMajorE4m3 => k::E4M3,
    }
}
