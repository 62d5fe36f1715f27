//! Launcher of [`reduce_fused`].

#[cfg(doc)]
use crate::Error;
use crate::{DType, Result, Stream, TensorMut, TensorRef, View, check};
use ferrotile_kernels::device::In;
use ferrotile_kernels::moe::common_expanded::fills_chunks;
use ferrotile_kernels::moe::reduce_fused as kernels;
use ferrotile_kernels::quant::common::Divisor;
use kernels::{MAX_ITEMS, chunks, rows, whole};

const OP: &str = "reduce_fused";

/// The entry of a kernel for vectors of these types.
macro_rules! wide_entry {
    ($kernel:ident, $x:expr, $out:expr) => {
        match ($x, $out) {
            (DType::F32, DType::F32) => &$kernel::f32_f32,
            (DType::F32, DType::Bf16) => &$kernel::f32_bf16,
            (DType::F32, _) => &$kernel::f32_e4m3,
            (DType::Bf16, DType::F32) => &$kernel::bf16_f32,
            (DType::Bf16, DType::Bf16) => &$kernel::bf16_bf16,
            (DType::Bf16, _) => &$kernel::bf16_e4m3,
            (_, DType::F32) => &$kernel::e4m3_f32,
            (_, DType::Bf16) => &$kernel::e4m3_bf16,
            (_, _) => &$kernel::e4m3_e4m3,
        }
    };
}

/// Arguments of [`reduce_fused`].
#[derive(Debug)]
pub struct Args<'a> {
    /// The expanded buffer, f32, bf16 or e4m3 `[num_expanded_tokens, hidden]`; rows may lie any distance apart.
    pub x: TensorRef<'a>,
    /// Scale factor of each of its rows, f32 `[num_expanded_tokens]`; 1 without.
    pub x_sf: Option<TensorRef<'a>>,
    /// Weight of each choice, f32 `[num_tokens, num_topk]`; 1 without.
    pub topk_weights: Option<TensorRef<'a>>,
    /// Row of each choice, i32 `[num_tokens, num_topk]`; -1 for none.
    pub token_topk_to_pos: TensorRef<'a>,
    /// What sums are multiplied by before they are rounded, f32 `[1]`; 1 without.
    pub sf: Option<TensorRef<'a>>,
    /// f32, bf16 or e4m3 `[num_tokens, hidden]`, contiguous.
    pub out: TensorMut<'a>,
}

/// Adds up the rows of the expanded buffer that belong to each token, with weights.
///
/// | tensor | shape | dtype | layout |
/// |---|---|---|---|
/// | `x` | `[num_expanded_tokens, hidden]` | f32, bf16 or e4m3 | last stride 1, any row stride |
/// | `x_sf` (optional) | `[num_expanded_tokens]` | f32 | contiguous |
/// | `topk_weights` (optional) | `[num_tokens, num_topk]` | f32 | contiguous |
/// | `token_topk_to_pos` | `[num_tokens, num_topk]` | i32 | contiguous |
/// | `sf` (optional) | `[1]` | f32 | |
/// | `out` | `[num_tokens, hidden]` | f32, bf16 or e4m3 | contiguous |
///
/// `acc = 0`; for each choice `k` with a row `p = token_topk_to_pos[t, k] >= 0`, in ascending order: `acc = fma(f32(x[p]), topk_weights[t, k] * x_sf[p], acc)`,
/// where the product of the factors is rounded to f32 and the multiply-add once; then `out[t] = acc * sf` (a rounded f32 product), to
/// nearest even, saturating at 448 for e4m3. A token without rows becomes zeros. The result is deterministic.
///
/// NaN, also that of `inf - inf` and `0 * inf`, becomes `0x7FFFFFFF` in f32, `0x7FFF` in bf16 and `0x7F` in e4m3; an infinite sum stays infinite,
/// in e4m3 it becomes 448. A choice whose row is not below `num_expanded_tokens` counts as none; the checked emulator reports it.
///
/// Any hidden size and alignment work; fast are rows and outputs at multiples of 16 bytes with `hidden % 8 == 0`. Asynchronous on `stream`;
/// allocates nothing. (Facts: moe.md, sections 1.2 and 12.)
///
/// ```
/// use ferrotile::moe::reduce_fused::{Args, reduce_fused};
///
/// let device = ferrotile::Device::emulator();
/// let x = device.upload(&[1.0f32, 2.0, 10.0, 20.0, 100.0, 200.0])?;
/// // Token 0 has rows 2 and 0, token 1 has none.
/// let token_topk_to_pos = device.upload(&[2i32, 0, -1, -1])?;
/// let topk_weights = device.upload(&[0.5f32, 2.0, 1.0, 1.0])?;
/// let mut out = device.alloc::<f32>(4)?;
/// reduce_fused(&device.stream()?, Args {
///     x: x.tensor(&[3, 2])?,
///     x_sf: None,
///     topk_weights: Some(topk_weights.tensor(&[2, 2])?),
///     token_topk_to_pos: token_topk_to_pos.tensor(&[2, 2])?,
///     sf: None,
///     out: out.tensor_mut(&[2, 2])?,
/// })?;
/// assert_eq!(out.to_vec()?, [52.0, 104.0, 0.0, 0.0]);
/// # Ok::<(), ferrotile::Error>(())
/// ```
///
/// # Errors
/// [`Error::Shape`], [`Error::DType`], [`Error::Layout`] when a tensor is not as in the table or an address is no multiple of the element size;
/// [`Error::Value`] for more than 2^31 - 1 tokens, choices of a token, rows or columns, or rows of `x` 4 GiB or more apart;
/// [`Error::Overlap`] of `out` with another tensor, [`Error::DeviceMismatch`], [`Error::Driver`]. `out` is untouched then.
pub fn reduce_fused(stream: &Stream, args: Args<'_>) -> Result<()> {
    let plan = check(stream, &args)?;
    let Args { x, x_sf, topk_weights, token_topk_to_pos, sf, out } = &args;
    if out.is_empty() {
        return Ok(());
    }
    let row_items = plan.hidden / plan.values;
    let wide = plan.values > 1;
    let by_chunks = wide && fills_chunks(row_items, kernels::CHUNK);
    let whole_rows = by_chunks && kernels::is_whole(plan.hidden, plan.k, plan.p, plan.t);
    let chunk = if whole_rows { kernels::WHOLE_CHUNK / plan.values } else { kernels::CHUNK };
    let row_chunks = row_items.div_ceil(chunk);
    let divisor = Divisor::new(if by_chunks { row_chunks } else { row_items });
    let pointer = |tensor: &Option<TensorRef<'_>>| tensor.as_ref().map_or(In::null(), |tensor| tensor.input::<f32>());
    let has = |tensor: &Option<TensorRef<'_>>, bit: u32| (tensor.is_some() as u32) << bit;
    let most = (MAX_ITEMS / row_items as u64) as u32;
    for first in (0..plan.t).step_by(most as usize) {
        let num_tokens = (plan.t - first).min(most);
        let choices = first as u64 * plan.k as u64;
        macro_rules! launch {
            ($kernel:ident, $entry:expr, $config:expr, { $($field:ident: $value:expr),* }) => {{
                let values = $kernel::Args {
                    x: x.input(),
                    x_sf: pointer(x_sf),
                    topk_weights: pointer(topk_weights).at(choices),
                    token_topk_to_pos: token_topk_to_pos.input::<i32>().at(choices),
                    sf: pointer(sf),
                    out: out.output::<u8>().at(first as u64 * plan.hidden as u64 * out.dtype().size()),
                    k: plan.k,
                    num_rows: plan.p,
                    x_row: plan.x_row,
                    $($field: $value,)*
                    magic: divisor.magic,
                    shift: divisor.shift,
                    has: has(topk_weights, 0) | has(x_sf, 1) | has(sf, 2),
                };
                stream.launch(OP, $entry, &$config, &values)?;
            }};
        }
        if by_chunks {
            let num_chunks = num_tokens * row_chunks;
            let config = kernels::chunk_config(num_chunks);
            if whole_rows {
                let entry = wide_entry!(whole, x.dtype(), out.dtype());
                launch!(whole, entry, config, { num_chunks: num_chunks, row_chunks: row_chunks, row_vectors: row_items });
            } else {
                let entry = wide_entry!(chunks, x.dtype(), out.dtype());
                launch!(chunks, entry, config, { num_chunks: num_chunks, row_chunks: row_chunks, row_vectors: row_items });
            }
        } else {
            let num_items = num_tokens * row_items;
            let entry = rows_entry(x.dtype(), out.dtype(), wide);
            launch!(rows, entry, kernels::config(num_items), { num_items: num_items, row_items: row_items });
        }
    }
    Ok(())
}

fn rows_entry(x: DType, out: DType, wide: bool) -> &'static ferrotile_kernels::entry::Entry<rows::Args> {
    if wide {
        return wide_entry!(rows, x, out);
    }
    match (x, out) {
        (DType::F32, DType::F32) => &rows::f32_f32_narrow,
        (DType::F32, DType::Bf16) => &rows::f32_bf16_narrow,
        (DType::F32, _) => &rows::f32_e4m3_narrow,
        (DType::Bf16, DType::F32) => &rows::bf16_f32_narrow,
        (DType::Bf16, DType::Bf16) => &rows::bf16_bf16_narrow,
        (DType::Bf16, _) => &rows::bf16_e4m3_narrow,
        (_, DType::F32) => &rows::e4m3_f32_narrow,
        (_, DType::Bf16) => &rows::e4m3_bf16_narrow,
        (_, _) => &rows::e4m3_e4m3_narrow,
    }
}

/// What the kernels count with.
struct Plan {
    t: u32,
    k: u32,
    p: u32,
    hidden: u32,
    /// Bytes from one row of `x` to the next.
    x_row: u32,
    /// Values of a thread: 1 where alignment allows no more.
    values: u32,
}

fn check(stream: &Stream, Args { x, x_sf, topk_weights, token_topk_to_pos, sf, out }: &Args<'_>) -> Result<Plan> {
    const TYPES: &[DType] = &[DType::F32, DType::Bf16, DType::E4m3];
    const MOST: u64 = i32::MAX as u64;
    check::rank(OP, "x", x, 2)?;
    check::rank(OP, "token_topk_to_pos", token_topk_to_pos, 2)?;
    let (p, hidden) = (x.dim(0), x.dim(1));
    let (t, k) = (token_topk_to_pos.dim(0), token_topk_to_pos.dim(1));
    check::in_range(OP, "num_tokens", t, 0, MOST)?;
    check::in_range(OP, "num_topk", k, 0, MOST)?;
    check::in_range(OP, "num_expanded_tokens", p, 0, MOST)?;
    check::in_range(OP, "hidden", hidden, 0, MAX_ITEMS)?;
    check::dtype(OP, "x", x, TYPES)?;
    check::last_stride_1(OP, "x", x)?;
    check::aligned(OP, "x", x, x.dtype().size())?;
    check::dtype(OP, "out", out, TYPES)?;
    check::shape(OP, "out", out, &[t, hidden])?;
    check::contiguous(OP, "out", out)?;
    check::aligned(OP, "out", out, out.dtype().size())?;
    let x_row = if p <= 1 { 0 } else { x.stride(0).saturating_mul(x.dtype().size()) };
    let x_row = check::fits_u32(OP, "bytes from one row of x to the next", x_row)?;

    // An absent tensor's place is taken by one that is there, which changes nothing.
    let mut inputs: [(&str, &View); 5] = [("x", x); 5];
    let tensors = [
        ("x_sf", x_sf.as_ref(), DType::F32, [p, 1]),
        ("topk_weights", topk_weights.as_ref(), DType::F32, [t, k]),
        ("token_topk_to_pos", Some(token_topk_to_pos), DType::I32, [t, k]),
        ("sf", sf.as_ref(), DType::F32, [1, 1]),
    ];
    for (place, (arg, tensor, dtype, shape)) in inputs[1..].iter_mut().zip(tensors) {
        let Some(tensor) = tensor else { continue };
        let rank = if matches!(arg, "x_sf" | "sf") { 1 } else { 2 };
        check::whole(OP, arg, tensor, dtype, &shape[..rank])?;
        check::aligned(OP, arg, tensor, 4)?;
        *place = (arg, tensor);
    }
    check::same_device(OP, stream, &inputs)?;
    check::same_device(OP, stream, &[("out", out)])?;
    check::no_overlaps(OP, &inputs, &[("out", out)])?;

    let values = kernels::values(x.dtype().size(), out.dtype().size());
    let (x_bytes, out_bytes) = (values as u64 * x.dtype().size(), values as u64 * out.dtype().size());
    // Without rows `x` does not matter.
    let x_fits = x.is_empty() || (x.ptr() | x_row as u64).is_multiple_of(x_bytes);
    let wide = hidden.is_multiple_of(values.into()) && x_fits && out.ptr().is_multiple_of(out_bytes);
    Ok(Plan { t: t as u32, k: k as u32, p: p as u32, hidden: hidden as u32, x_row, values: if wide { values } else { 1 } })
}
