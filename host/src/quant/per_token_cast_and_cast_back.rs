//! Launcher of `per_token_cast_and_cast_back`.

use super::Format;
use crate::{DType, Error, Result, Stream, TensorMut, check};
use ferrotile_kernels::entry::Entry;
use ferrotile_kernels::launch::LaunchConfig;
use ferrotile_kernels::quant::common::Divisor;
use ferrotile_kernels::quant::per_token_cast::{E4M3_SF, EXACT, POWERS, Source};
use ferrotile_kernels::quant::per_token_cast_and_cast_back as k;

const OP: &str = "per_token_cast_and_cast_back";

/// Arguments of [`per_token_cast_and_cast_back`].
#[derive(Debug)]
pub struct Args<'a> {
    /// Input and output, bf16 or f32 `(T, H)`; rows may lie any distance of at least `H` apart.
    pub x: TensorMut<'a>,
    /// What the values are quantised to.
    pub format: Format,
    /// Channels that share a scale: 16, 32, 64 or 128.
    pub npc: u32,
    /// Make every scale a power of two.
    pub round_sf: bool,
    /// Make every scale an e4m3; not together with `round_sf`.
    pub e4m3_sf: bool,
}

/// Replace values by what is left of them after quantising: `x = cast_back(per_token_cast(x))`, bit for bit, without storing what lies
/// between.
///
/// | tensor | dtype | shape | layout |
/// |---|---|---|---|
/// | `x` | bf16 or f32 | `(T, H)` | last stride 1, any row stride of at least `H` |
///
/// Each `npc` consecutive channels of a token share a scale, which [`per_token_cast`](super::per_token_cast()) describes with the
/// rounding; a last group of fewer channels uses what there is. Then `x = fp32(q) * sf`, one f32 product, for bf16 rounded to nearest
/// even. NaN does not count for a scale; it stays NaN by way of e4m3 and becomes 6 or -6 times the scale by way of e2m1. Infinities are
/// the caller's mistake. Source: quant.md 2 and 6.2.
///
/// Asynchronous; allocates nothing; an empty `x` launches nothing. Any `H` (even for e2m1) and any alignment works; it is fast when rows
/// are whole numbers of 16-byte words and start at multiples of 16 bytes.
///
/// # Errors
/// [`Shape`](Error::Shape), [`DType`](Error::DType), [`Layout`](Error::Layout) for strides and alignment, also for rows that overlap,
/// [`Value`](Error::Value) for `npc`, for `round_sf` with `e4m3_sf`, an odd `H` with e2m1, or sizes beyond 31 bits,
/// [`DeviceMismatch`](Error::DeviceMismatch), [`Driver`](Error::Driver). `x` is untouched then.
///
/// ```
/// use ferrotile::quant::{Format, per_token_cast_and_cast_back};
/// use ferrotile::Device;
///
/// let device = Device::emulator();
/// // One group: the scale of FP4 is 12 / 6 = 2, so the values that are left are multiples of 1 up to 4, of 2 up to 8, of 4 beyond.
/// let mut x = device.upload(&[0.9f32, -2.6, 5.4, 12.0, 0.1, -0.1, 0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 7.1, 9.0, 11.0])?;
/// per_token_cast_and_cast_back::per_token_cast_and_cast_back(
///     &device.stream()?,
///     per_token_cast_and_cast_back::Args {
///         x: x.tensor_mut(&[1, 16])?,
///         format: Format::E2m1,
///         npc: 16,
///         round_sf: false,
///         e4m3_sf: false,
///     },
/// )?;
/// let left = [1.0, -3.0, 6.0, 12.0, 0.0, -0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 8.0, 8.0, 12.0];
/// assert_eq!(x.to_vec()?, left);
/// # Ok::<(), ferrotile::Error>(())
/// ```
pub fn per_token_cast_and_cast_back(stream: &Stream, args: Args<'_>) -> Result<()> {
    per_token_cast_and_cast_back_in_parts(stream, args, u32::MAX)
}

/// [`per_token_cast_and_cast_back`] in launches of at most `max_tokens` tokens each, as it goes about tensors of more than 2^31 items.
#[doc(hidden)]
pub fn per_token_cast_and_cast_back_in_parts(stream: &Stream, args: Args<'_>, max_tokens: u32) -> Result<()> {
    let x = &args.x;
    check::rank(OP, "x", x, 2)?;
    check::dtype(OP, "x", x, &[DType::Bf16, DType::F32])?;
    let (num_tokens, hidden) = (x.dim(0), x.dim(1));
    check::in_range(OP, "num_tokens", num_tokens, 0, i32::MAX as u64)?;
    // Numbers of items of a row, filled up to whole groups, and of its channels have 31 bits.
    check::in_range(OP, "hidden", hidden, 0, i32::MAX as u64 - 128)?;
    check::one_of(OP, "npc", args.npc, &[16, 32, 64, 128])?;
    if args.round_sf && args.e4m3_sf {
        let allowed = "false with e4m3_sf".to_owned();
        return Err(Error::Value { op: OP, arg: "round_sf", allowed, got: "true".to_owned() });
    }
    if args.format == Format::E2m1 {
        // Two FP4 values share a byte wherever they are stored.
        check::divisible(OP, "hidden", hidden, 2)?;
    }
    check::last_stride_1(OP, "x", x)?;
    check::aligned(OP, "x", x, x.dtype().size())?;
    check::same_device(OP, stream, &[("x", x)])?;
    if x.is_empty() {
        return Ok(());
    }
    if num_tokens > 1 && x.stride(0) < hidden {
        let got = format!("strides {:?}", x.strides());
        return Err(Error::Layout { op: OP, arg: "x", expected: format!("rows at least {hidden} elements apart"), got });
    }
    let stride = if num_tokens == 1 { 0 } else { x.stride(0) * x.dtype().size() };
    let f32_input = x.dtype() == DType::F32;
    let channels = if f32_input { k::F32::CHANNELS } else { k::Bf16::CHANNELS };
    let row_items = (hidden as u32).next_multiple_of(args.npc) / channels;
    let wide = hidden.is_multiple_of(channels.into()) && x.ptr().is_multiple_of(16) && stride.is_multiple_of(16);
    let rule = match (args.round_sf, args.e4m3_sf) {
        (true, _) => POWERS,
        (_, true) => E4M3_SF,
        _ => EXACT,
    };
    let row = Divisor::new(row_items);
    // Beyond 2^31 items (32 GiB) it takes more than one launch.
    let limit = ((k::MAX_ITEMS - 1) / row_items as u64).min(max_tokens.into()) as u32;
    let (mut first, num_tokens) = (0, num_tokens as u32);
    while first < num_tokens {
        let tokens = limit.min(num_tokens - first);
        let num_items = tokens * row_items;
        let x = x.output::<u8>().at(first as u64 * stride);
        let (hidden, npc_log2) = (hidden as u32, args.npc.trailing_zeros());
        let config = LaunchConfig::new(num_items.div_ceil(k::THREADS), k::THREADS);
        if wide {
            use k::wide as e;
            let entry: &'static Entry<e::Args> = match (f32_input, args.format, rule) {
                (true, Format::E4m3, EXACT) => &e::f32_e4m3,
                (true, Format::E4m3, POWERS) => &e::f32_e4m3_round,
                (true, Format::E4m3, _) => &e::f32_e4m3_sf8,
                (true, Format::E2m1, EXACT) => &e::f32_e2m1,
                (true, Format::E2m1, POWERS) => &e::f32_e2m1_round,
                (true, Format::E2m1, _) => &e::f32_e2m1_sf8,
                (false, Format::E4m3, EXACT) => &e::bf16_e4m3,
                (false, Format::E4m3, POWERS) => &e::bf16_e4m3_round,
                (false, Format::E4m3, _) => &e::bf16_e4m3_sf8,
                (false, Format::E2m1, EXACT) => &e::bf16_e2m1,
                (false, Format::E2m1, POWERS) => &e::bf16_e2m1_round,
                (false, Format::E2m1, _) => &e::bf16_e2m1_sf8,
            };
            let kernel_args = e::Args {
                x,
                x_stride: stride,
                hidden,
                npc_log2,
                num_items,
                row_items,
                row_magic: row.magic,
                row_shift: row.shift,
            };
            stream.launch(OP, entry, &config, &kernel_args)?;
        } else {
            use k::narrow as e;
            let entry: &'static Entry<e::Args> = match (f32_input, args.format) {
                (true, Format::E4m3) => &e::f32_e4m3,
                (true, Format::E2m1) => &e::f32_e2m1,
                (false, Format::E4m3) => &e::bf16_e4m3,
                (false, Format::E2m1) => &e::bf16_e2m1,
            };
            let kernel_args = e::Args {
                x,
                x_stride: stride,
                hidden,
                npc_log2,
                num_items,
                row_items,
                row_magic: row.magic,
                row_shift: row.shift,
                rule,
            };
            stream.launch(OP, entry, &config, &kernel_args)?;
        }
        first += tokens;
    }
    Ok(())
}
