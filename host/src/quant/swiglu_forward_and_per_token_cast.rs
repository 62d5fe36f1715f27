//! Launcher of `swiglu_forward_and_per_token_cast`.

use super::common_swiglu::{Tensors, check_clamp, check_rows, check_weights, check_x, row_bytes};
use super::{ExpertRows, RowWeights, SfLayout, SfMut};
use crate::{DType, Error, Result, Stream, TensorMut, TensorRef, check};
use ferrotile_kernels::launch::ceil_div;
use ferrotile_kernels::quant::common::Divisor;
use ferrotile_kernels::quant::swiglu_forward_and_per_token_cast as k;

const OP: &str = "swiglu_forward_and_per_token_cast";

/// Smallest and largest `sf_clamp_min`: its scale and the inverse are normal numbers.
const SF_CLAMP_RANGE: (f32, f32) = (1e-30, 1e30);

/// Arguments of [`swiglu_forward_and_per_token_cast`].
#[derive(Debug)]
pub struct Args<'a> {
    /// bf16 or f32 `(P, 2 H)`, `H % 8 == 0`: gates in the left half. Rows may lie any multiple of 16 bytes apart.
    pub x: TensorRef<'a>,
    /// Which rows hold tokens.
    pub rows: ExpertRows<'a>,
    /// What rows are multiplied by.
    pub weights: RowWeights<'a>,
    /// Gates are limited to this, the right half to this in magnitude. A positive number.
    pub clamp_value: Option<f32>,
    /// i64 `(4,)` or `(3,)`, added to: gates that were clamped, values of the right half clamped from above, from below, and values in
    /// all.
    pub clamped_count: Option<TensorMut<'a>>,
    /// Channels that share a scale: 32, 128, or `H` for one scale a row.
    pub npc: u32,
    /// Make every scale a power of two. Packed layouts need it.
    pub round_sf: bool,
    /// What the largest magnitude of a group counts as at least; 1e-4 if not given. From 1e-30 to 1e30.
    pub sf_clamp_min: Option<f32>,
    /// Quantised values: e4m3 `(P, H)`, contiguous.
    pub out: TensorMut<'a>,
    /// Scale factors, see [`sf_shape`](super::sf_shape).
    pub sf: SfMut<'a>,
}

/// The activation of a gated MLP, `silu(gate) * up` times a routing weight, quantised to e4m3 with one scale factor for each `npc`
/// consecutive channels of a row, or for each row.
///
/// | tensor | dtype | shape | layout |
/// |---|---|---|---|
/// | `x` | bf16 or f32 | `(P, 2 H)`, `H % 8 == 0`: gates left, the other half right | last stride 1, rows at multiples of 16 bytes |
/// | `rows` | i32 | `(P,)`, or `(E,)` | contiguous |
/// | `weights` | f32, i32 | `(P,)`, or `(N, k)` and `(P,)` | contiguous |
/// | `clamped_count` | i64 | `(4,)` or `(3,)` | contiguous |
/// | `out` | e4m3 | `(P, H)` | contiguous, 8-byte aligned |
/// | `sf` | f32, or ue8m0x4 in a packed layout | `(P, K)`, or `(P, ceil(K / 4))`, with `K = ceil(H / npc)` | see [`SfLayout`] |
///
/// The values `v` are those of [`swiglu_forward`](super::swiglu_forward::swiglu_forward) in f32, without a rounding to bf16 in between.
/// With `amax` the largest magnitude of a group and `c = max(amax, sf_clamp_min)`: `sf = c / 448` and `q = v * (448 / c)`; with
/// `round_sf`, `sf` is the smallest power of two that is not below `c / 448` and `q = v / sf`. Each step is one f32 operation; `q` is
/// rounded to nearest even and saturates. On a GPU the result has the published kernels' bits; the emulator's `exp` may move `v` by a
/// unit in the last place and `q` by one code. The sign of zero is kept. NaN does not count for a scale and becomes `0x7F`;
/// infinities, and values that overflow f32, are the caller's mistake: their groups hold no defined codes.
///
/// Rows without a token are not read, not written (neither data nor scales) and not counted; they cost almost no time. Counts are of
/// values beyond the clamp, not of those that equal it; NaN is none of them. Unused bytes of a last packed word are written as 0;
/// padding between columns of scales is not touched. Source: the specification's sections 1 to 4, 5.10 and 6.8.
///
/// Asynchronous; allocates nothing; an empty `x` launches nothing.
///
/// # Errors
/// [`Shape`](Error::Shape) when shapes do not belong together, [`DType`](Error::DType), [`Layout`](Error::Layout) for strides, alignment
/// and layouts of scales that the op does not write, [`Value`](Error::Value) for a width that is no multiple of 16, for `npc`, for a clamp that is not
/// positive or absent beside counts, for `sf_clamp_min`, an alignment outside `1..=2^30`, packed scales that are not rounded, or
/// sizes beyond 31 bits, [`DeviceMismatch`](Error::DeviceMismatch), [`Overlap`](Error::Overlap) of an output with another argument,
/// [`Driver`](Error::Driver). The outputs are untouched then.
///
/// ```
/// use ferrotile::quant::{ExpertRows, RowWeights, SfLayout, SfMut, sf_shape, swiglu_forward_and_per_token_cast};
/// use ferrotile::{Device, E4m3};
///
/// let device = Device::emulator();
/// // Three rows of 32 channels with gate 100 and up 2; the second row is padding.
/// let x = device.upload(&[[100.0f32; 32], [2.0; 32]].concat().repeat(3))?;
/// let pos_to_expert = device.upload(&[0i32, -1, 0])?;
/// let layout = sf_shape(3, 32, (1, 32), SfLayout::RowMajor);
/// let (mut out, mut sf) = (device.zeros::<E4m3>(3 * 32)?, device.zeros::<f32>(layout.elements as usize)?);
/// swiglu_forward_and_per_token_cast::swiglu_forward_and_per_token_cast(
///     &device.stream()?,
///     swiglu_forward_and_per_token_cast::Args {
///         x: x.tensor(&[3, 64])?,
///         rows: ExpertRows::PosToExpert(pos_to_expert.tensor(&[3])?),
///         weights: RowWeights::None,
///         clamp_value: None,
///         clamped_count: None,
///         npc: 32,
///         round_sf: true,
///         sf_clamp_min: None,
///         out: out.tensor_mut(&[3, 32])?,
///         sf: SfMut { tensor: sf.tensor_mut(&layout.shape)?, layout: SfLayout::RowMajor },
///     },
/// )?;
/// // 200 / 448 rounded up is 2^-1; 200 * 2 = 400 lies halfway between two codes, 384 and 416, and goes to the even one.
/// assert_eq!(sf.to_vec()?, [0.5, 0.0, 0.5]);
/// let out = out.to_vec()?;
/// assert_eq!([out[0].0, out[32].0, out[95].0], [0x7C, 0, 0x7C]);
/// # Ok::<(), ferrotile::Error>(())
/// ```
pub fn swiglu_forward_and_per_token_cast(stream: &Stream, args: Args<'_>) -> Result<()> {
    let (num_rows, hidden) = check_x(OP, &args.x)?;
    let rows = check_rows(OP, &args.rows, num_rows)?;
    let weights = check_weights(OP, &args.weights, num_rows)?;
    let counts = args.clamped_count.as_ref();
    let clamp = check_clamp(OP, args.clamp_value, counts)?;
    check::one_of(OP, "npc", args.npc, &[32, 128, hidden])?;
    let amax_min = args.sf_clamp_min.unwrap_or(1e-4);
    if !(SF_CLAMP_RANGE.0..=SF_CLAMP_RANGE.1).contains(&amax_min) {
        let allowed = format!("{:e} to {:e}", SF_CLAMP_RANGE.0, SF_CLAMP_RANGE.1);
        return Err(Error::Value { op: OP, arg: "sf_clamp_min", allowed, got: format!("{amax_min:e}") });
    }
    check::whole(OP, "out", &args.out, DType::E4m3, &[num_rows.into(), hidden.into()])?;
    check::aligned(OP, "out", &args.out, 8)?;
    let layout = args.sf.layout;
    if layout.is_packed() && !args.round_sf {
        let allowed = format!("true with {layout} scales");
        return Err(Error::Value { op: OP, arg: "round_sf", allowed, got: "false".to_owned() });
    }
    let groups = if hidden == 0 { 0 } else { u64::from(hidden).div_ceil(args.npc.into()) };
    let sf = args.sf.check(OP, "sf", SfLayout::COMMON, (num_rows.into(), groups))?;
    let pieces = ceil_div(hidden, k::PIECE);
    check::in_range(OP, "rows times 512-channel pieces", num_rows as u64 * pieces as u64, 0, i32::MAX as u64)?;
    let inputs = Tensors::inputs(&args.x, &args.rows, &args.weights);
    let outputs =
        [("out", &*args.out), ("sf", &*args.sf.tensor), ("clamped_count", counts.map_or(&*args.out, |counts| &**counts))];
    let outputs = if counts.is_some() { &outputs[..] } else { &outputs[..2] };
    check::same_device(OP, stream, inputs.list())?;
    check::same_device(OP, stream, outputs)?;
    check::no_overlaps(OP, inputs.list(), outputs)?;
    if args.x.is_empty() {
        return Ok(());
    }
    // The fields that all kernels here have, in one place.
    macro_rules! kernel_args {
        ($kernel:ident { $($field:ident),* }) => {
            k::$kernel::Args {
                x: args.x.input(),
                out: args.out.output(),
                sf: args.sf.tensor.output(),
                x_stride: row_bytes(&args.x),
                num_rows,
                hidden,
                amax_min,
                round: args.round_sf.into(),
                packed: layout.is_packed().into(),
                sf_row_stride: sf.row,
                clamp: clamp.value,
                rows_kind: rows.kind,
                rows_map: rows.map,
                num_experts: rows.num_experts,
                alignment: rows.alignment,
                alignment_magic: rows.divisor.magic,
                alignment_shift: rows.divisor.shift,
                weights_kind: weights.kind,
                weights: weights.weights,
                weights_map: weights.map,
                weights_factor: weights.factor,
                counters: clamp.counters,
                num_counters: clamp.num_counters,
                $($field),*
            }
        };
    }
    let bf16 = args.x.dtype() == DType::Bf16;
    let counting = counts.is_some();
    let clamping = args.clamp_value.is_some();
    if args.npc != 32 && args.npc != 128 {
        let config = k::rows_config(num_rows, hidden, counting);
        if counting {
            let entry = if bf16 { &k::rows_count::bf16 } else { &k::rows_count::f32 };
            return stream.launch(OP, entry, &config, &kernel_args!(rows_count {}));
        }
        let entry = match (bf16, clamping) {
            (true, false) => &k::rows::bf16,
            (true, true) => &k::rows::bf16_clamp,
            (false, false) => &k::rows::f32,
            (false, true) => &k::rows::f32_clamp,
        };
        return stream.launch(OP, entry, &config, &kernel_args!(rows {}));
    }
    // All rows hold tokens and count as they are.
    let plain = bf16 && !clamping && matches!((&args.rows, &args.weights), (ExpertRows::All, RowWeights::None));
    if plain && num_rows as u64 * pieces as u64 <= k::MAX_FEW_PIECES.into() {
        use k::few as e;
        let entry = match (args.npc, args.round_sf) {
            (128, false) => &e::g128,
            (128, true) => &e::g128_round,
            (_, false) => &e::g32,
            (_, true) => &e::g32_round,
        };
        let kernel_args = e::Args {
            x: args.x.input(),
            out: args.out.output(),
            sf: args.sf.tensor.output(),
            x_stride: row_bytes(&args.x),
            hidden,
            amax_min,
            packed: layout.is_packed().into(),
            sf_row_stride: sf.row,
            sf_col_stride: sf.col,
        };
        return stream.launch(OP, entry, &k::few_config(num_rows, hidden), &kernel_args);
    }
    let steps = rows.steps(k::STEPS, counting);
    let divisor = Divisor::new(pieces);
    let config = k::cast_config(ceil_div(num_rows, steps) * pieces);
    macro_rules! launch {
        ($kernel:ident::$entry:ident) => {{
            let (steps, warps_magic, warps_shift, sf_col_stride) = (steps, divisor.magic, divisor.shift, sf.col);
            let args = kernel_args!($kernel { steps, warps_magic, warps_shift, sf_col_stride });
            stream.launch(OP, &k::$kernel::$entry, &config, &args)
        }};
    }
    match (bf16, args.npc, clamping, counting) {
        (true, 128, false, _) => launch!(cast::g128),
        (true, 128, true, false) => launch!(cast::g128_clamp),
        (true, 128, true, true) => launch!(cast_count::g128),
        (true, _, false, _) => launch!(cast::g32),
        (true, _, true, false) => launch!(cast::g32_clamp),
        (true, _, true, true) => launch!(cast_count::g32),
        (false, 128, false, _) => launch!(cast_f32::g128),
        (false, 128, true, false) => launch!(cast_f32::g128_clamp),
        (false, 128, true, true) => launch!(cast_f32_count::g128),
        (false, _, false, _) => launch!(cast_f32::g32),
        (false, _, true, false) => launch!(cast_f32::g32_clamp),
        (false, _, true, true) => launch!(cast_f32_count::g32),
    }
}
