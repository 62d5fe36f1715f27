//! Launcher of `swiglu_forward`.

use super::common_swiglu::{Tensors, check_clamp, check_rows, check_weights, check_x, row_bytes};
use super::{ExpertRows, RowWeights};
use crate::{DType, Result, Stream, TensorMut, TensorRef, check};
use ferrotile_kernels::entry::Entry;
use ferrotile_kernels::launch::ceil_div;
use ferrotile_kernels::quant::common::Divisor;
use ferrotile_kernels::quant::swiglu_forward as k;

const OP: &str = "swiglu_forward";

/// Arguments of [`swiglu_forward`].
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
    /// bf16 or f32 `(P, H)`, contiguous.
    pub out: TensorMut<'a>,
}

/// The activation of a gated MLP: `silu(gate) * up`, times a routing weight.
///
/// | tensor | dtype | shape | layout |
/// |---|---|---|---|
/// | `x` | bf16 or f32 | `(P, 2 H)`, `H % 8 == 0`: gates left, the other half right | last stride 1, rows at multiples of 16 bytes |
/// | `rows` | i32 | `(P,)`, or `(E,)` | contiguous |
/// | `weights` | f32, i32 | `(P,)`, or `(N, k)` and `(P,)` | contiguous |
/// | `clamped_count` | i64 | `(4,)` or `(3,)` | contiguous |
/// | `out` | bf16 or f32 | `(P, H)` | contiguous, 16-byte aligned |
///
/// For a gate `l` and its partner `r`, with clamp `c`: `l = min(l, c)`, `r = max(min(r, c), -c)`, and then
/// `((l / (1 + exp(-l))) * r) * w`. Each operation is one f32 operation, the division is IEEE's, and `exp` is CUDA's single-precision
/// function; on the emulator its last bit may differ. The result is rounded to nearest even if `out` is bf16. The weight of a row is
/// `topk_weights[row] * routed_scaling_factor`, or the one that `pos_to_token_topk` names, which must exist; without weights nothing
/// is multiplied. NaN on either side gives NaN, clamped or not. An infinite gate gives what the formula says: infinity, or NaN for
/// the negative one.
///
/// Rows without a token are not read, not written and not counted; they cost almost no time. Counts are of values beyond the clamp,
/// not of those that equal it; NaN is none of them.
/// Source: the specification's sections 1.9, 4.1, 4.2, 5.10 and 6.8.
///
/// Asynchronous; allocates nothing; an empty `x` launches nothing.
///
/// # Errors
/// [`Shape`](crate::Error::Shape) when shapes do not belong together, [`DType`](crate::Error::DType),
/// [`Layout`](crate::Error::Layout) for strides and alignment, [`Value`](crate::Error::Value) for a width that is no multiple of 16,
/// a clamp that is not positive or absent beside counts, an alignment outside `1..=2^30`, or sizes beyond 31 bits,
/// [`DeviceMismatch`](crate::Error::DeviceMismatch), [`Overlap`](crate::Error::Overlap) of an output with another argument,
/// [`Driver`](crate::Error::Driver). The outputs are untouched then.
///
/// ```
/// use ferrotile::quant::{ExpertRows, RowWeights, swiglu_forward};
///
/// let device = ferrotile::Device::emulator();
/// // Two rows of 8 channels: gates of 0 and of 100, where silu is 0 and 100.
/// let x = device.upload(&[[0.0f32; 8], [3.0; 8], [100.0; 8], [3.0; 8]].concat())?;
/// let weights = device.upload(&[1.0f32, 0.5])?;
/// let (mut out, mut counts) = (device.alloc::<f32>(16)?, device.zeros::<i64>(4)?);
/// swiglu_forward::swiglu_forward(
///     &device.stream()?,
///     swiglu_forward::Args {
///         x: x.tensor(&[2, 16])?,
///         rows: ExpertRows::All,
///         weights: RowWeights::PerRow { topk_weights: weights.tensor(&[2])?, routed_scaling_factor: 1.0 },
///         clamp_value: Some(40.0),
///         clamped_count: Some(counts.tensor_mut(&[4])?),
///         out: out.tensor_mut(&[2, 8])?,
///     },
/// )?;
/// assert_eq!(out.to_vec()?, [[0.0; 8], [40.0 * 3.0 * 0.5; 8]].concat());
/// assert_eq!(counts.to_vec()?, [8, 0, 0, 16]);
/// # Ok::<(), ferrotile::Error>(())
/// ```
pub fn swiglu_forward(stream: &Stream, args: Args<'_>) -> Result<()> {
    let (num_rows, hidden) = check_x(OP, &args.x)?;
    let rows = check_rows(OP, &args.rows, num_rows)?;
    let weights = check_weights(OP, &args.weights, num_rows)?;
    let counts = args.clamped_count.as_ref();
    let clamp = check_clamp(OP, args.clamp_value, counts)?;
    check::dtype(OP, "out", &args.out, &[DType::Bf16, DType::F32])?;
    check::shape(OP, "out", &args.out, &[num_rows.into(), hidden.into()])?;
    check::contiguous(OP, "out", &args.out)?;
    check::aligned(OP, "out", &args.out, 16)?;
    let pieces_of_row = ceil_div(hidden, k::PIECE);
    check::in_range(OP, "rows times 256-channel pieces", num_rows as u64 * pieces_of_row as u64, 0, i32::MAX as u64)?;
    let inputs = Tensors::inputs(&args.x, &args.rows, &args.weights);
    let outputs = [("out", &*args.out), ("clamped_count", counts.map_or(&*args.out, |t| &**t))];
    let outputs = if counts.is_some() { &outputs[..] } else { &outputs[..1] };
    check::same_device(OP, stream, inputs.list())?;
    check::same_device(OP, stream, outputs)?;
    check::no_overlaps(OP, inputs.list(), outputs)?;
    if args.x.is_empty() {
        return Ok(());
    }
    let steps = rows.steps(k::STEPS, counts.is_some());
    let divisor = Divisor::new(pieces_of_row);
    let kernel_args = k::activation::Args {
        x: args.x.input(),
        out: args.out.output(),
        x_stride: row_bytes(&args.x),
        num_rows,
        hidden,
        steps,
        warps_magic: divisor.magic,
        warps_shift: divisor.shift,
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
    };
    let entry = entry(args.x.dtype(), args.out.dtype(), args.clamp_value.is_some(), counts.is_some());
    stream.launch(OP, entry, &k::config(ceil_div(num_rows, steps) * pieces_of_row), &kernel_args)
}

fn entry(from: DType, to: DType, clamp: bool, count: bool) -> &'static Entry<k::activation::Args> {
    use k::activation as e;
    let [none, clamping, counting] = match (from, to) {
        (DType::Bf16, DType::Bf16) => [&e::bf16_bf16, &e::bf16_bf16_clamp, &e::bf16_bf16_count],
        (DType::Bf16, _) => [&e::bf16_f32, &e::bf16_f32_clamp, &e::bf16_f32_count],
        (_, DType::Bf16) => [&e::f32_bf16, &e::f32_bf16_clamp, &e::f32_bf16_count],
        _ => [&e::f32_f32, &e::f32_f32_clamp, &e::f32_f32_count],
    };
    match (clamp, count) {
        (_, true) => counting,
        (true, false) => clamping,
        (false, false) => none,
    }
}
