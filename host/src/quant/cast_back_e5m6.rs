//! Launcher of `cast_back_e5m6`.

use super::{Sf, SfLayout};
use crate::{DType, Error, Result, Stream, TensorMut, TensorRef, check};
use ferrotile_kernels::launch::LaunchConfig;
use ferrotile_kernels::quant::cast_back_e5m6 as k;

/// Arguments of [`cast_back_e5m6`].
#[derive(Debug)]
pub struct Args<'a> {
    /// Quantised values, u8 `(T, 3 * H / 2)`, `H % 8 == 0`; rows may lie any distance apart.
    pub x: TensorRef<'a>,
    /// Scale factors of `x`, one for each `block`.
    pub sf: Sf<'a>,
    /// Tokens and channels that share a scale, `(npt, npc)`: any number of tokens; 8, 16, 32, 64, 128 or all channels.
    pub block: (u32, u32),
    /// Output, bf16 or f32 `(T, H)`, contiguous.
    pub out: TensorMut<'a>,
}

/// Dequantise e5m6: `out = fp32(x) * sf`, one f32 multiplication rounded to nearest even, then for bf16 rounded to nearest even again.
///
/// | tensor | dtype | shape | layout |
/// |---|---|---|---|
/// | `x` | u8, 12 bytes for 8 values, see [`per_token_cast_to_e5m6`](super::per_token_cast_to_e5m6::per_token_cast_to_e5m6) | `(T, 3 * H / 2)`, `H % 8 == 0` | last stride 1, any row stride |
/// | `sf` | f32, or packed ue8m0x4 | `(M, K)`, or `(M, ceil(K / 4))` | [`SfLayout`], any pitch |
/// | `out` | bf16 or f32 | `(T, H)` | contiguous |
///
/// `M = ceil(T / npt)` and `K = ceil(H / npc)`: a ragged last block uses its scale for what there is. NaN and infinity of `x` stay what
/// they are. Any alignment works; it is fast when rows of `x` start at multiples of 4 bytes and `out` at one of 16. Source:
/// quant.md 1.3, 2 (dequantisation), 3 and 5.9. Asynchronous; allocates nothing; an empty `out` launches nothing.
///
/// # Errors
/// [`Shape`](Error::Shape) when shapes do not belong together, [`DType`](Error::DType), [`Layout`](Error::Layout) for strides,
/// [`Value`](Error::Value) for `block`, columns of `x` that are no multiple of 12, or a size beyond 32 bits,
/// [`DeviceMismatch`](Error::DeviceMismatch), [`Overlap`](Error::Overlap) of `out` with an input, [`Driver`](Error::Driver). `out`
/// is untouched then.
///
/// ```
/// use ferrotile::Device;
/// use ferrotile::quant::{Sf, SfLayout, cast_back_e5m6};
///
/// let device = Device::emulator();
/// // One token of 8 channels: 0x3C0 is 1, 0x400 is 2, 0xFBF is -65024.
/// let x = device.upload(&[0x00u8, 0x00, 0x04, 0x3C, 0, 0, 0, 0, 0xBF, 0x0F, 0, 0])?;
/// let sf = device.upload(&[0.5f32])?;
/// let mut out = device.alloc::<f32>(8)?;
/// let args = cast_back_e5m6::Args {
///     x: x.tensor(&[1, 12])?,
///     sf: Sf { tensor: sf.tensor(&[1, 1])?, layout: SfLayout::RowMajor },
///     block: (1, 8),
///     out: out.tensor_mut(&[1, 8])?,
/// };
/// cast_back_e5m6::cast_back_e5m6(&device.stream()?, args)?;
/// assert_eq!(out.to_vec()?, [0.5, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, -32512.0]);
/// # Ok::<(), ferrotile::Error>(())
/// ```
pub fn cast_back_e5m6(stream: &Stream, args: Args<'_>) -> Result<()> {
    launch(stream, args, u32::MAX)
}

/// [`cast_back_e5m6`] in launches of at most `max_tokens` tokens each, as it goes about tensors of more than 2^31 items.
#[doc(hidden)]
pub fn cast_back_e5m6_in_parts(stream: &Stream, args: Args<'_>, max_tokens: u32) -> Result<()> {
    launch(stream, args, max_tokens)
}

fn launch(stream: &Stream, a: Args<'_>, max_tokens: u32) -> Result<()> {
    let op = "cast_back_e5m6";
    check::rank(op, "x", &a.x, 2)?;
    check::dtype(op, "x", &a.x, &[DType::U8])?;
    let num_tokens = a.x.dim(0);
    check::in_range(op, "columns of x", a.x.dim(1), 0, i32::MAX as u64)?;
    check::divisible(op, "columns of x", a.x.dim(1), k::BYTES.into())?;
    let hidden = a.x.dim(1) / 3 * 2;
    check::dtype(op, "out", &a.out, &[DType::Bf16, DType::F32])?;
    check::shape(op, "out", &a.out, &[num_tokens, hidden])?;
    check::in_range(op, "npt", a.block.0.into(), 1, u32::MAX.into())?;
    let (npt, npc) = a.block;
    if npc as u64 != hidden && ![8, 16, 32, 64, 128].contains(&npc) {
        let allowed = format!("8, 16, 32, 64, 128, {hidden} (hidden)");
        return Err(Error::Value { op, arg: "npc", allowed, got: npc.to_string() });
    }
    let block_rows = num_tokens.div_ceil(npt.into());
    let sf = a.sf.check(op, "sf", SfLayout::COMMON, (block_rows, hidden.div_ceil(npc.max(1).into())))?;
    check::last_stride_1(op, "x", &a.x)?;
    check::contiguous(op, "out", &a.out)?;
    check::same_device(op, stream, &[("x", &a.x), ("sf", &a.sf.tensor), ("out", &a.out)])?;
    if a.out.is_empty() {
        return Ok(());
    }
    check::in_range(op, "num_tokens", num_tokens, 0, i32::MAX as u64)?;
    let x_stride = if num_tokens == 1 { 0 } else { check::fits_u32(op, "row stride of x", a.x.stride(0))? };
    let size = a.out.dtype().size();
    check::aligned(op, "out", &a.out, size)?;
    check::no_overlaps(op, &[("x", &a.x), ("sf", &a.sf.tensor)], &[("out", &a.out)])?;

    let (tokens, hidden) = (num_tokens as u32, hidden as u32);
    // Larger blocks than there are tokens are one block; this keeps products of block and number of tokens small.
    let npt = npt.min(tokens);
    let wide = a.x.ptr().is_multiple_of(4) && x_stride.is_multiple_of(4) && a.out.ptr().is_multiple_of(16);
    let values = if wide { 16 / size as u32 } else { k::CHANNELS };
    let row_items = hidden / values;
    // All channels of a row share a scale unless there are less in a block.
    let k_shift = if npc < hidden { npc.trailing_zeros() - values.trailing_zeros() } else { 31 };
    let row = k::Divisor::new(row_items);
    // A scaling block with more items than a launch can have is the only one of its launch.
    let block = k::Divisor::new((row_items as u64 * npt as u64).min(k::MAX_ITEMS) as u32);
    // Beyond 2^31 items (32 GiB of output) it takes more than one launch.
    let limit = ((k::MAX_ITEMS - 1) / row_items as u64).min(max_tokens.into()) as u32;
    let mut first_token = 0;
    while first_token < tokens {
        let tokens = k::launch_tokens(first_token, tokens, npt, limit);
        let num_items = tokens * row_items;
        let config = LaunchConfig::new(num_items.div_ceil(k::THREADS), k::THREADS);
        // Both kernels number items through the tensor and take the same arguments.
        macro_rules! launch {
            ($kernel:ident) => {{
                use k::$kernel as e;
                let args = e::Args {
                    x: a.x.input::<u8>().at(first_token as u64 * x_stride as u64),
                    sf: a.sf.tensor.input::<u8>().at((first_token / npt) as u64 * sf.row as u64 * 4),
                    out: a.out.output::<u8>().at(first_token as u64 * hidden as u64 * size),
                    x_stride,
                    sf_row_stride: sf.row,
                    sf_col_stride: sf.col,
                    num_items,
                    row_items,
                    row_magic: row.magic,
                    row_shift: row.shift,
                    block_magic: block.magic,
                    block_shift: block.shift,
                    k_shift,
                };
                let all = [&e::bf16_f32, &e::f32_f32, &e::bf16_ue8m0, &e::f32_ue8m0];
                let at = 2 * a.sf.layout.is_packed() as usize + (a.out.dtype() == DType::F32) as usize;
                stream.launch(op, all[at], &config, &args)?
            }};
        }
        if wide {
            launch!(wide)
        } else {
            launch!(narrow)
        }
        first_token += tokens;
    }
    Ok(())
}
