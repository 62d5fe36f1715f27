//! Launcher of [`apply_rotary`].

use crate::{DType, Error, Result, Stream, TensorMut, TensorRef, View, check};
use ferrotile_kernels::device::{In, Out};
use ferrotile_kernels::entry::Entry;
use ferrotile_kernels::launch::{LaunchConfig, ceil_div};
use ferrotile_kernels::quant::common::Divisor;
use ferrotile_kernels::transform::apply_rotary as kernels;
use kernels::{HEADS, MAX_ITEMS, PLAIN_DIM, PLAIN_PAIRS, PLAIN_THREADS, plain, rotate};

const OP: &str = "apply_rotary";

/// Arguments of [`apply_rotary`].
#[derive(Debug)]
pub struct Args<'a> {
    /// f32 or bf16 `[num_tokens, num_heads, head_dim]` or `[batch, length, num_heads, head_dim]`; rotated in place.
    pub query: TensorMut<'a>,
    /// Like `query`, with a number of heads of its own.
    pub key: Option<TensorMut<'a>>,
    /// Cosines, then sines, of each row's `head_dim / 2` angles, f32 `[num_rows, head_dim]`.
    pub cos_sin_cache: TensorRef<'a>,
    /// i32 or i64 `[num_tokens]` or `[batch, length]`; without, tokens are numbered from 0 in each sequence.
    pub positions: Option<TensorRef<'a>>,
    /// Pairs are neighbours, `(2j, 2j + 1)`, instead of half a head apart, `(j, j + head_dim / 2)`.
    pub interleaved: bool,
    /// Rotate back.
    pub conjugate: bool,
    /// Added to every position.
    pub seqlen_offset: i64,
}

/// Rotary position embedding: rotates pairs of a query's, and of a key's, head by angles that depend on the token's position. In place.
///
/// | tensor | shape | dtype | layout |
/// |---|---|---|---|
/// | `query` | `[num_tokens, num_heads, head_dim]` or `[batch, length, num_heads, head_dim]` | f32 or bf16 | last stride 1, others free |
/// | `key` (optional) | as `query`, heads of its own | as `query` | last stride 1, others free |
/// | `cos_sin_cache` | `[num_rows, head_dim]` | f32 | last stride 1, any row stride |
/// | `positions` (optional) | `[num_tokens]` or `[batch, length]` | i32 or i64 | last stride 1, any batch stride, also 0 |
///
/// The row of a token is `m = seqlen_offset + positions[b, l]`, or `seqlen_offset + l` without positions. For each pair `(x1, x2)` number `j`,
/// with `c = cos_sin_cache[m, j]` and `s = cos_sin_cache[m, head_dim / 2 + j]`, negated if `conjugate`:
/// `x1' = fma(x1, c, -(x2 * s))`, `x2' = fma(x1, s, x2 * c)`, where the inner product is rounded to f32; then to nearest even. NaN becomes
/// `0x7FFF` in bf16 and `0x7FFFFFFF` in f32. Both backends give the same bits.
///
/// `head_dim` is any even number; to rotate a part of each head, pass a view of it. Query and key may be views of one buffer, such as heads
/// or columns of a joint projection, if they have no element in common. Neither may have an element twice. Fast are `head_dim` in
/// multiples of 16 (f32: 8) with all tensors and strides in multiples of 16 bytes; other layouts take a slower kernel. One launch serves both.
/// A little faster still is a bf16 query alone with such a layout and `head_dim` 64, i32 positions or none, no negative `seqlen_offset`, and
/// one sequence, or several that follow each other at the distance of their tokens, as their positions do.
///
/// Without positions a row outside of the cache is refused. Positions are on the device, where the launcher does not look: **a token whose
/// row is not below `num_rows` stays as it is**, and the checked emulator reports it.
///
/// Asynchronous on `stream`; allocates nothing. Empty tensors launch nothing. (Facts: moe.md, section 18.)
///
/// ```
/// use ferrotile::transform::apply_rotary::{Args, apply_rotary};
///
/// let device = ferrotile::Device::emulator();
/// // Two tokens with one head of four values. Position 1 is a quarter turn of the first pair.
/// let mut query = device.upload(&[1.0f32, 2.0, 3.0, 4.0, 1.0, 2.0, 3.0, 4.0])?;
/// let cos_sin_cache = device.upload(&[1.0f32, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0])?;
/// apply_rotary(&device.stream()?, Args {
///     query: query.tensor_mut(&[2, 1, 4])?,
///     key: None,
///     cos_sin_cache: cos_sin_cache.tensor(&[2, 4])?,
///     positions: None,
///     interleaved: false,
///     conjugate: false,
///     seqlen_offset: 0,
/// })?;
/// assert_eq!(query.to_vec()?, [1.0, 2.0, 3.0, 4.0, -3.0, 2.0, 1.0, 4.0]);
/// # Ok::<(), ferrotile::Error>(())
/// ```
///
/// # Errors
/// [`Error::Shape`], [`Error::DType`], [`Error::Layout`] when a tensor is not as in the table or an address is no multiple of the element size;
/// [`Error::Value`] for an odd `head_dim`, a `seqlen_offset` with which positions leave the cache (without `positions`), 2^31 tokens or more,
/// 2^31 vectors of a token, token, head, row or batch strides of positions of 2^32 elements or more, 2^32 - 1 rows or more; [`Error::Overlap`],
/// [`Error::DeviceMismatch`], [`Error::Driver`]. Query and key are untouched then, except that the checked emulator may find a position that
/// is too large after some tokens were rotated.
pub fn apply_rotary(stream: &Stream, args: Args<'_>) -> Result<()> {
    let Some(plan) = check(stream, &args)? else { return Ok(()) };
    if let Some((entry, config, values)) = plain_launch(&args, &plan) {
        return stream.launch(OP, entry, &config, &values);
    }
    let Args { query, key, cos_sin_cache, positions, .. } = &args;
    let entry = entry(query.dtype(), args.interleaved, plan.wide, plan.single);
    let (items, length, vectors) = (Divisor::new(plan.token_items), Divisor::new(plan.length), Divisor::new(plan.vectors));
    let most = (MAX_ITEMS / plan.token_items as u64) as u32;
    for first in (0..plan.num_tokens).step_by(most as usize) {
        let num_items = (plan.num_tokens - first).min(most) * plan.token_items;
        let values = rotate::Args {
            query: query.output(),
            key: key.as_ref().map_or(Out::null(), |key| key.output()),
            cos_sin: cos_sin_cache.input(),
            positions: positions.as_ref().map_or(In::null(), |positions| positions.input()),
            query_batch: plan.query.batch,
            query_token: plan.query.token,
            query_head: plan.query.head,
            query_heads: plan.query.heads,
            key_batch: plan.key.batch,
            key_token: plan.key.token,
            key_head: plan.key.head,
            key_heads: plan.key.heads,
            cos_sin_row: plan.cos_sin_row,
            num_rows: plan.num_rows,
            position_batch: plan.position_batch,
            position_bytes: positions.as_ref().map_or(0, |positions| positions.dtype().size() as u32),
            seqlen_offset: args.seqlen_offset,
            flip: (args.conjugate as u32) << 31,
            first,
            num_items,
            token_items: plan.token_items,
            items_magic: items.magic,
            items_shift: items.shift,
            length: plan.length,
            length_magic: length.magic,
            length_shift: length.shift,
            vectors: plan.vectors,
            vectors_magic: vectors.magic,
            vectors_shift: vectors.shift,
        };
        stream.launch(OP, entry, &kernels::config(num_items, plan.wide), &values)?;
    }
    Ok(())
}

/// The launch of the plain kernel, if that does for these arguments: bf16, heads of 64, no key, all aligned, i32 positions or none, tokens of
/// all sequences at one distance from each other, as are their positions, and sizes in bytes and an offset that fit its numbers. Without
/// positions there is one sequence. All else takes `rotate`, with one head its `single` entries:
/// another size, f32, a key, i64 positions.
fn plain_launch(args: &Args<'_>, plan: &Plan) -> Option<(&'static Entry<plain::Args>, LaunchConfig, plain::Args)> {
    let Args { query, cos_sin_cache: cache, positions, .. } = args;
    let position_bytes = positions.as_ref().map_or(0, |positions| positions.dtype().size());
    let one_sequence = plan.length == plan.num_tokens;
    // Tokens of all sequences lie as those of one.
    let in_a_row = positions.is_some()
        && plan.length > 1
        && plan.position_batch == plan.length
        && plan.query.batch == plan.query.token as u64 * plan.length as u64;
    let two_heads = plan.query.heads.is_multiple_of(2);
    let usual = query.dtype() == DType::Bf16
        && query.dim(query.rank() - 1) == PLAIN_DIM as u64
        && plan.wide
        && plan.key.heads == 0
        // Of an odd number one would be left, and one head a thread is slower than the general kernel.
        && (two_heads || plan.query.heads == 1)
        && position_bytes <= 4
        && (one_sequence || in_a_row)
        && plan.num_rows <= 1 << 31;
    if !usual {
        return None;
    }
    // Rows of positions below the offset are negative, which as unsigned numbers are larger than `num_rows`.
    let first_row = u32::try_from(args.seqlen_offset).ok().filter(|row| *row < 1 << 31)?;
    let groups = if two_heads { plan.query.heads / 2 } else { plan.query.heads };
    let token_items = groups.checked_mul(PLAIN_DIM / 2 / PLAIN_PAIRS)?;
    let num_items = token_items.checked_mul(plan.num_tokens).filter(|items| *items as u64 <= MAX_ITEMS)?;
    let items = Divisor::new(token_items);
    let values = plain::Args {
        x: query.output(),
        angles: cache.input(),
        positions: positions.as_ref().map_or(In::null(), |positions| positions.input()),
        token_bytes: plan.query.token.checked_mul(2)?,
        head_bytes: plan.query.head.checked_mul(2)?,
        row_bytes: plan.cos_sin_row.checked_mul(4)?,
        first_row,
        num_rows: plan.num_rows,
        flip: (args.conjugate as u32) << 31,
        num_items,
        token_items,
        items_magic: items.magic,
        items_shift: items.shift,
        groups,
    };
    let entry = match (args.interleaved, two_heads, positions.is_some()) {
        (false, false, false) => &plain::halves_1,
        (false, false, true) => &plain::halves_1_positions,
        (false, true, false) => &plain::halves_2,
        (false, true, true) => &plain::halves_2_positions,
        (true, false, false) => &plain::interleaved_1,
        (true, false, true) => &plain::interleaved_1_positions,
        (true, true, false) => &plain::interleaved_2,
        (true, true, true) => &plain::interleaved_2_positions,
    };
    Some((entry, LaunchConfig::new(ceil_div(num_items, PLAIN_THREADS), PLAIN_THREADS), values))
}

fn entry(dtype: DType, interleaved: bool, wide: bool, single: bool) -> &'static Entry<rotate::Args> {
    match (dtype == DType::F32, interleaved, wide, single) {
        (true, false, true, false) => &rotate::f32_halves,
        (true, true, true, false) => &rotate::f32_interleaved,
        (false, false, true, false) => &rotate::bf16_halves,
        (false, true, true, false) => &rotate::bf16_interleaved,
        (true, false, true, true) => &rotate::f32_halves_single,
        (true, true, true, true) => &rotate::f32_interleaved_single,
        (false, false, true, true) => &rotate::bf16_halves_single,
        (false, true, true, true) => &rotate::bf16_interleaved_single,
        (true, false, false, _) => &rotate::f32_halves_narrow,
        (true, true, false, _) => &rotate::f32_interleaved_narrow,
        (false, false, false, _) => &rotate::bf16_halves_narrow,
        (false, true, false, _) => &rotate::bf16_interleaved_narrow,
    }
}

/// Heads and strides, in elements, of query or key. Strides of dimensions of size 1 are 0.
#[derive(Clone, Copy, Default)]
struct Heads {
    heads: u32,
    batch: u64,
    token: u32,
    head: u32,
}

/// What [`check()`] found.
struct Plan {
    query: Heads,
    key: Heads,
    num_tokens: u32,
    length: u32,
    /// Threads of a token.
    token_items: u32,
    /// Vectors of half a head.
    vectors: u32,
    cos_sin_row: u32,
    num_rows: u32,
    position_batch: u32,
    /// Whether all 16-byte vectors are aligned.
    wide: bool,
    /// Whether threads have one head, because there is no other.
    single: bool,
}

/// `None` when there is nothing to do.
fn check(stream: &Stream, args: &Args<'_>) -> Result<Option<Plan>> {
    let Args { query, key, cos_sin_cache: cache, positions, .. } = args;
    let rank = query.rank();
    if rank != 3 && rank != 4 {
        let (expected, got) = ("3 or 4 dimensions".to_owned(), format!("{:?}", query.shape()));
        return Err(Error::Shape { op: OP, arg: "query", expected, got });
    }
    // Dimension of the tokens of a sequence; heads and columns follow.
    let of_tokens = rank - 3;
    let (batch, length) = (if rank == 4 { query.dim(0) } else { 1 }, query.dim(of_tokens));
    let head_dim = query.dim(rank - 1);
    check::dtype(OP, "query", query, &[DType::F32, DType::Bf16])?;
    check::divisible(OP, "head_dim", head_dim, 2)?;
    check_heads(stream, "query", query)?;
    if let Some(key) = key {
        check::rank(OP, "key", key, rank)?;
        check::dtype(OP, "key", key, &[query.dtype()])?;
        let mut shape = [0; 4];
        shape[..rank].copy_from_slice(query.shape());
        shape[rank - 2] = key.dim(rank - 2);
        check::shape(OP, "key", key, &shape[..rank])?;
        check_heads(stream, "key", key)?;
    }
    check::rank(OP, "cos_sin_cache", cache, 2)?;
    check::dtype(OP, "cos_sin_cache", cache, &[DType::F32])?;
    let num_rows = cache.dim(0);
    check::shape(OP, "cos_sin_cache", cache, &[num_rows, head_dim])?;
    check::last_stride_1(OP, "cos_sin_cache", cache)?;
    check::aligned(OP, "cos_sin_cache", cache, 4)?;
    check::same_device(OP, stream, &[("cos_sin_cache", cache)])?;
    if let Some(positions) = positions {
        check::dtype(OP, "positions", positions, &[DType::I32, DType::I64])?;
        check::shape(OP, "positions", positions, if rank == 4 { &query.shape()[..2] } else { &query.shape()[..1] })?;
        check::last_stride_1(OP, "positions", positions)?;
        check::aligned(OP, "positions", positions, positions.dtype().size())?;
        check::same_device(OP, stream, &[("positions", positions)])?;
    }
    let of_query = heads(query, "query")?;
    let of_key = key.as_ref().map_or(Ok(Heads::default()), |key| heads(key, "key"))?;
    let cos_sin_row = stride(cache, 0, "row stride of cos_sin_cache")?;
    check::in_range(OP, "rows of cos_sin_cache", num_rows, 0, u32::MAX as u64 - 1)?;
    let position_batch = match positions {
        Some(positions) if rank == 4 => stride(positions, 0, "batch stride of positions")?,
        _ => 0,
    };
    for (arg, x) in [("query", Some(query)), ("key", key.as_ref())] {
        let Some(x) = x else { continue };
        check::no_overlap(OP, ("cos_sin_cache", cache), (arg, x))?;
        positions.iter().try_for_each(|positions| check::no_overlap(OP, ("positions", positions), (arg, x)))?;
    }
    if let Some(key) = key
        && !apart(query, key)
    {
        return Err(Error::Overlap { op: OP, a: "query", b: "key" });
    }

    let num_tokens = batch.saturating_mul(length);
    if num_tokens == 0 || head_dim == 0 || of_query.heads + of_key.heads == 0 {
        return Ok(None);
    }
    // Tokens are divided by the length of a sequence.
    check::in_range(OP, "num_tokens", num_tokens, 0, i32::MAX as u64)?;
    check_rows(args, length, num_rows)?;

    let values = 16 / query.dtype().size();
    let fits =
        |x: &View| (0..rank - 1).all(|i| x.dim(i) == 1 || x.stride(i).is_multiple_of(values)) && x.ptr().is_multiple_of(16);
    let wide = head_dim.is_multiple_of(2 * values)
        && [Some(query), key.as_ref()].into_iter().flatten().all(|x| x.is_empty() || fits(x))
        && cache.ptr().is_multiple_of(16)
        && cos_sin_row.is_multiple_of(4);
    let vectors = head_dim / 2 / if wide { values } else { 1 };
    let single = wide && of_query.heads.max(of_key.heads) == 1;
    let groups = |heads: u32| heads.div_ceil(if single { 1 } else { HEADS }) as u64;
    let groups = groups(of_query.heads) + groups(of_key.heads);
    let token_items = groups.saturating_mul(vectors);
    check::in_range(OP, "threads for a token of query and key", token_items, 0, MAX_ITEMS)?;
    Ok(Some(Plan {
        query: of_query,
        key: of_key,
        num_tokens: num_tokens as u32,
        length: length as u32,
        token_items: token_items as u32,
        vectors: vectors as u32,
        cos_sin_row,
        num_rows: num_rows as u32,
        position_batch,
        wide,
        single,
    }))
}

/// What is wanted of query and key alike.
fn check_heads(stream: &Stream, arg: &'static str, x: &View) -> Result<()> {
    check::last_stride_1(OP, arg, x)?;
    check::aligned(OP, arg, x, x.dtype().size())?;
    check::same_device(OP, stream, &[(arg, x)])
}

/// Positions that the launcher knows lie within the cache, and it has a row at all.
fn check_rows(args: &Args<'_>, length: u64, num_rows: u64) -> Result<()> {
    let needed = if args.positions.is_some() { 1 } else { length };
    if num_rows < needed {
        let expected = format!("at least {needed} row{}", if needed == 1 { "" } else { "s" });
        return Err(Error::Shape { op: OP, arg: "cos_sin_cache", expected, got: format!("{:?}", args.cos_sin_cache.shape()) });
    }
    let most = num_rows - needed;
    if args.positions.is_none() && !u64::try_from(args.seqlen_offset).is_ok_and(|offset| offset <= most) {
        let allowed = format!("0 to {most} for {length} positions and {num_rows} rows of cos_sin_cache");
        return Err(Error::Value { op: OP, arg: "seqlen_offset", allowed, got: args.seqlen_offset.to_string() });
    }
    Ok(())
}

/// A stride as the kernel takes it.
fn stride(x: &View, dim: usize, what: &'static str) -> Result<u32> {
    if x.dim(dim) <= 1 || x.is_empty() { Ok(0) } else { check::fits_u32(OP, what, x.stride(dim)) }
}

fn heads(x: &View, arg: &'static str) -> Result<Heads> {
    let (query, rank) = (arg == "query", x.rank());
    let what = |query_text, key_text| if query { query_text } else { key_text };
    // The kernel counts a few beyond the last.
    check::in_range(OP, what("heads of query", "heads of key"), x.dim(rank - 2), 0, i32::MAX as u64)?;
    Ok(Heads {
        heads: x.dim(rank - 2) as u32,
        batch: if rank == 4 && x.dim(0) > 1 { x.stride(0) } else { 0 },
        token: stride(x, rank - 3, what("token stride of query", "token stride of key"))?,
        head: stride(x, rank - 2, what("head stride of query", "head stride of key"))?,
    })
}

/// Whether query and key have no byte in common. Views of one buffer whose elements never meet are told by a stride of one of them: if,
/// modulo that stride, each lies in a piece of its own. So it is with heads, and with columns of heads, of a joint projection.
fn apart(query: &View, key: &View) -> bool {
    if check::no_overlap(OP, ("query", query), ("key", key)).is_ok() {
        return true;
    }
    let size = query.dtype().size();
    let rank = query.rank();
    [query, key].into_iter().flat_map(|x| (0..rank - 1).filter(|i| x.dim(*i) > 1).map(|i| x.stride(i))).any(|stride| {
        let Some(modulus) = stride.checked_mul(size) else { return false };
        // Elements from the first to the last, dimensions aside whose steps vanish modulo the stride.
        let extent = |x: &View| {
            let steps = |i: usize| if x.stride(i).is_multiple_of(stride) { 0 } else { (x.dim(i) - 1) * x.stride(i) };
            (x.dim(rank - 1) + (0..rank - 1).map(steps).sum::<u64>()) * size
        };
        let ahead = key.ptr().abs_diff(query.ptr()) % modulus;
        let from_query = if key.ptr() >= query.ptr() || ahead == 0 { ahead } else { modulus - ahead };
        from_query >= extent(query) && from_query + extent(key) <= modulus
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;

    fn view(ptr: u64, shape: &[u64], strides: &[u64]) -> View {
        View::new(OP, Device::emulator(), ptr, DType::Bf16, shape, strides).unwrap()
    }

    /// Whether any element of one is an element of the other, by looking at all.
    fn meet(a: &View, b: &View) -> bool {
        let all = |x: &View| {
            let mut all = vec![x.ptr()];
            for (n, stride) in x.shape().iter().zip(x.strides()) {
                all = all.iter().flat_map(|at| (0..*n).map(move |i| at + 2 * i * stride)).collect();
            }
            all
        };
        let (a, b) = (all(a), all(b));
        a.iter().any(|at| b.contains(at))
    }

    #[test]
    fn views_of_a_joint_projection_are_apart() {
        let base = 4096;
        // Heads of one row: 4 of the query, then 2 of the key.
        let (q, k) = (view(base, &[3, 4, 8], &[64, 8, 1]), view(base + 64, &[3, 2, 8], &[64, 8, 1]));
        assert!(apart(&q, &k) && apart(&k, &q) && !meet(&q, &k));
        // Columns of each head.
        let (q, k) = (view(base, &[3, 4, 8], &[64, 16, 1]), view(base + 16, &[3, 4, 8], &[64, 16, 1]));
        assert!(apart(&q, &k) && apart(&k, &q) && !meet(&q, &k));
        // Batches.
        let (q, k) = (view(base, &[2, 3, 4, 8], &[256, 64, 8, 1]), view(base + 64, &[2, 3, 2, 8], &[256, 64, 8, 1]));
        assert!(apart(&q, &k) && apart(&k, &q) && !meet(&q, &k));
        for (q, k) in [
            (view(base, &[3, 4, 8], &[64, 8, 1]), view(base, &[3, 4, 8], &[64, 8, 1])),
            (view(base, &[3, 5, 8], &[64, 8, 1]), view(base + 64, &[3, 2, 8], &[64, 8, 1])),
            (view(base + 64, &[3, 5, 8], &[64, 8, 1]), view(base, &[3, 2, 8], &[64, 8, 1])),
            // Another token stride.
            (view(base, &[3, 4, 8], &[64, 8, 1]), view(base + 64, &[3, 2, 8], &[48, 8, 1])),
        ] {
            assert!(!apart(&q, &k) && !apart(&k, &q) && meet(&q, &k), "{q:?} {k:?}");
        }
    }

    #[test]
    fn what_is_called_apart_never_meets() {
        let mut apart_in_one_range = 0;
        for seed in 0..4000u64 {
            let draw = |i: u64, n: u64| (seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left((7 * i) as u32 & 63) >> 40) % n;
            let strides = |i| [8 + draw(i, 24), 2 + draw(i + 1, 12), 1];
            let same = draw(9, 2) == 0;
            let a = view(4096, &[1 + draw(0, 3), 1 + draw(1, 3), 2], &strides(2));
            let b_strides = if same { strides(2) } else { strides(5) };
            let b = view(4096 + 2 * draw(4, 40), &[1 + draw(7, 3), 1 + draw(8, 3), 2], &b_strides);
            if apart(&a, &b) {
                assert!(!meet(&a, &b), "{a:?} {b:?}");
                apart_in_one_range += check::no_overlap(OP, ("query", &a), ("key", &b)).is_err() as u32;
            }
        }
        assert!(apart_in_one_range > 50, "{apart_in_one_range}");
    }
}
