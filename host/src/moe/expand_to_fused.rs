//! Launchers of [`expand_to_fused`] and [`expand_to_fused_with_sf`].

#[cfg(doc)]
use crate::Error;
use crate::quant::{Sf, SfLayout, SfMut};
use crate::{DType, Result, Stream, TensorMut, TensorRef, View, check};
use ferrotile_kernels::device::{In, Out};
use ferrotile_kernels::launch::LaunchConfig;
use ferrotile_kernels::moe::expand_to_fused as kernels;
use ferrotile_kernels::quant::common::Divisor;
use kernels::{
    CHUNK_THREADS, MAX_PIECES, THREADS, chunk_blocks, chunks, chunks_with_sf, gather_blocks, rows, rows_with_sf, scatter_blocks,
};

/// Arguments of [`expand_to_fused`].
#[derive(Debug)]
pub struct Args<'a> {
    /// Rows of the tokens, any type `[num_tokens, hidden]`; rows may lie any distance apart.
    pub x: TensorRef<'a>,
    /// Row of each choice, i32 `[num_tokens, num_topk]`, contiguous; -1 for none.
    pub token_topk_to_pos: TensorRef<'a>,
    /// Expert of each row, i32 `[num_expanded_tokens]`, contiguous; negative for padding.
    pub pos_to_expert: TensorRef<'a>,
    /// The expanded buffer, as `x` `[num_expanded_tokens, hidden]`, contiguous.
    pub out: TensorMut<'a>,
}

/// Arguments of [`expand_to_fused_with_sf`].
#[derive(Debug)]
pub struct WithSfArgs<'a> {
    /// Quantised rows of the tokens, a type of one byte `[num_tokens, hidden]` (e2m1x2: `hidden / 2`); rows may lie any distance apart.
    pub x: TensorRef<'a>,
    /// Their scale factors, f32 or packed, in any of [`SfLayout::COMMON`].
    pub x_sf: Sf<'a>,
    /// Channels that share a scale.
    pub num_per_channels: u32,
    /// Row of each choice, i32 `[num_tokens, num_topk]`, contiguous; -1 for none.
    pub token_topk_to_pos: TensorRef<'a>,
    /// Expert of each row, i32 `[num_expanded_tokens]`, contiguous; negative for padding.
    pub pos_to_expert: TensorRef<'a>,
    /// Token of each row, i32 `[num_expanded_tokens]`, contiguous; -1 for padding. Not needed, but with it column-major scales are written
    /// a column at a time and not word by word.
    pub pos_to_token: Option<TensorRef<'a>>,
    /// The expanded buffer, as `x` `[num_expanded_tokens, hidden]`, contiguous.
    pub out: TensorMut<'a>,
    /// Its scale factors, of the type of `x_sf`; see [`sf_shape`](crate::quant::sf_shape) with `block` `(1, num_per_channels)`.
    pub out_sf: SfMut<'a>,
}

/// Copies each token's row to all its rows of the expanded buffer, and zeroes the padding rows.
///
/// | tensor | shape | dtype |
/// |---|---|---|
/// | `x` | `[num_tokens, hidden]` | any |
/// | `token_topk_to_pos` | `[num_tokens, num_topk]` | i32 |
/// | `pos_to_expert` | `[num_expanded_tokens]` | i32 |
/// | `out` | `[num_expanded_tokens, hidden]` | as `x` |
///
/// For every choice with a row `p = token_topk_to_pos[t, k] >= 0`: `out[p] = x[t]`. For every row with `pos_to_expert[p] < 0`: `out[p]` is
/// zero bytes. Both index tensors come from [`get_fused_mapping()`](super::get_fused_mapping()). A row that is neither padding nor named by a
/// choice does not occur there and is left as it is. Bytes are copied, so NaN keeps its payload. Without tokens the padding is zeroed all the same.
/// A choice whose row is not below `num_expanded_tokens` counts as none; the checked emulator reports it.
///
/// Any hidden size and alignment work; fast are rows that start at multiples of 16 bytes. Asynchronous on `stream`; allocates nothing.
/// (Facts: moe.md, sections 1.2 and 9.)
///
/// ```
/// use ferrotile::moe::expand_to_fused::{Args, expand_to_fused};
///
/// let device = ferrotile::Device::emulator();
/// let x = device.upload(&[1.0f32, 2.0, 3.0, 4.0])?;
/// // Token 0 goes to rows 2 and 0, token 1 to row 3; row 1 is padding.
/// let token_topk_to_pos = device.upload(&[2i32, 0, -1, 3])?;
/// let pos_to_expert = device.upload(&[0i32, -1, 1, 1])?;
/// let mut out = device.alloc::<f32>(8)?;
/// expand_to_fused(&device.stream()?, Args {
///     x: x.tensor(&[2, 2])?,
///     token_topk_to_pos: token_topk_to_pos.tensor(&[2, 2])?,
///     pos_to_expert: pos_to_expert.tensor(&[4])?,
///     out: out.tensor_mut(&[4, 2])?,
/// })?;
/// assert_eq!(out.to_vec()?, [1.0, 2.0, 0.0, 0.0, 1.0, 2.0, 3.0, 4.0]);
/// # Ok::<(), ferrotile::Error>(())
/// ```
///
/// # Errors
/// [`Error::Shape`], [`Error::DType`], [`Error::Layout`] when a tensor is not as in the table or an address is no multiple of the element size;
/// [`Error::Value`] for more than 2^31 - 1 tokens, choices of a token or rows, or rows of 2 GiB and more;
/// [`Error::Overlap`] of `out` with another tensor, [`Error::DeviceMismatch`], [`Error::Driver`]. `out` is untouched then.
pub fn expand_to_fused(stream: &Stream, args: Args<'_>) -> Result<()> {
    const OP: &str = "expand_to_fused";
    let Args { x, token_topk_to_pos, pos_to_expert, out } = &args;
    let plan = Plan::new(OP, x, token_topk_to_pos, pos_to_expert, out)?;
    let inputs: [(&str, &View); 3] = [("x", x), ("token_topk_to_pos", token_topk_to_pos), ("pos_to_expert", pos_to_expert)];
    check::same_device(OP, stream, &inputs)?;
    check::same_device(OP, stream, &[("out", out)])?;
    check::no_overlaps(OP, &inputs, &[("out", out)])?;
    if out.is_empty() {
        return Ok(());
    }
    let by_chunks = plan.chunks();
    let divisor = Divisor::new(by_chunks.as_ref().map_or(plan.pieces, |shape| shape.row_chunks));
    for part in plan.parts(plan.pieces) {
        macro_rules! launch {
            ($kernel:ident, $entry:expr, $config:expr $(, $field:ident: $value:expr)*) => {{
                let values = $kernel::Args {
                    x: plan.x.at(part.first as u64 * plan.x_row as u64),
                    token_topk_to_pos: plan.token_topk_to_pos.at(part.first as u64 * plan.k as u64),
                    pos_to_expert: plan.pos_to_expert.at(part.first.into()),
                    out: plan.out,
                    k: plan.k,
                    num_tokens: part.tokens,
                    num_rows: part.rows,
                    first_row: part.first,
                    all_rows: plan.p,
                    x_row: plan.x_row,
                    out_row: plan.out_row,
                    pieces: plan.pieces,
                    $($field: $value,)*
                    magic: divisor.magic,
                    shift: divisor.shift,
                };
                stream.launch(OP, $entry, &$config, &values)?;
            }};
        }
        if let Some(shape) = &by_chunks {
            let entry = if shape.vectors == kernels::WHOLE_VECTORS { &chunks::v7 } else { &chunks::v4 };
            let blocks = chunk_blocks(part.tokens, part.rows, shape.row_chunks);
            launch!(chunks, entry, LaunchConfig::new(blocks, CHUNK_THREADS), row_chunks: shape.row_chunks);
        } else {
            let entry = match plan.word {
                16 => &rows::w16,
                4 => &rows::w4,
                2 => &rows::w2,
                _ => &rows::w1,
            };
            let blocks = scatter_blocks(part.tokens, part.rows, plan.pieces, THREADS);
            launch!(rows, entry, LaunchConfig::new(blocks, THREADS));
        }
    }
    Ok(())
}

/// [`expand_to_fused`] of a quantised tensor: its scale factors go the same ways.
///
/// | tensor | shape | dtype |
/// |---|---|---|
/// | `x` | `[num_tokens, hidden]` (e2m1x2: `hidden / 2`) | e4m3, e2m1x2, e5m2 or u8 |
/// | `x_sf` | `[num_tokens, s]`, any of [`SfLayout::COMMON`] | f32 with `s = ceil(hidden / num_per_channels)`, or ue8m0x4 with `ceil(s / 4)` |
/// | `token_topk_to_pos` | `[num_tokens, num_topk]` | i32 |
/// | `pos_to_expert`, `pos_to_token` | `[num_expanded_tokens]` | i32 |
/// | `out` | `[num_expanded_tokens, hidden]` | as `x` |
/// | `out_sf` | `[num_expanded_tokens, s]`, any of [`SfLayout::COMMON`] | as `x_sf` |
///
/// `out_sf` is what [`expand_to_fused`] would make of `x_sf`, words of packed scales as they are; its layout need not be that of `x_sf`.
/// The padding at the end of columns is not touched. With `pos_to_token` (which must agree with the other maps) scales by columns are read through it.
/// A token beyond `num_tokens` counts as padding there; the checked emulator reports it. Everything else is as for [`expand_to_fused`].
///
/// ```
/// use ferrotile::moe::expand_to_fused::{WithSfArgs, expand_to_fused_with_sf};
/// use ferrotile::quant::{Sf, SfLayout, SfMut, sf_shape};
/// use ferrotile::{Device, E4m3};
///
/// let device = Device::emulator();
/// // Two tokens of 64 channels, two scales each; token 0 goes to row 2, token 1 to rows 0 and 3.
/// let x: Vec<E4m3> = (0..128).map(|i| E4m3::from_f32(if i < 64 { 1.0 } else { 2.0 })).collect();
/// let (x, x_sf) = (device.upload(&x)?, device.upload(&[1.0f32, 2.0, 3.0, 4.0])?);
/// let token_topk_to_pos = device.upload(&[2i32, -1, 0, 3])?;
/// let pos_to_expert = device.upload(&[0i32, -1, 1, 1])?;
/// let layout = sf_shape(4, 64, (1, 32), SfLayout::ColMajor);
/// let (mut out, mut out_sf) = (device.alloc::<E4m3>(256)?, device.alloc::<f32>(layout.elements as usize)?);
/// expand_to_fused_with_sf(&device.stream()?, WithSfArgs {
///     x: x.tensor(&[2, 64])?,
///     x_sf: Sf { tensor: x_sf.tensor(&[2, 2])?, layout: SfLayout::RowMajor },
///     num_per_channels: 32,
///     token_topk_to_pos: token_topk_to_pos.tensor(&[2, 2])?,
///     pos_to_expert: pos_to_expert.tensor(&[4])?,
///     pos_to_token: None,
///     out: out.tensor_mut(&[4, 64])?,
///     out_sf: SfMut { tensor: out_sf.strided_mut(&layout.shape, &layout.strides, 0)?, layout: SfLayout::ColMajor },
/// })?;
/// let firsts: Vec<f32> = out.to_vec()?.chunks(64).map(|row| row[0].to_f32()).collect();
/// assert_eq!(firsts, [2.0, 0.0, 1.0, 2.0]);
/// // One column of scales after the other.
/// assert_eq!(out_sf.to_vec()?, [3.0, 0.0, 1.0, 3.0, 4.0, 0.0, 2.0, 4.0]);
/// # Ok::<(), ferrotile::Error>(())
/// ```
///
/// # Errors
/// Those of [`expand_to_fused`]; [`Error::Layout`] for other layouts of scales, [`Error::DType`] when `x_sf` and `out_sf` differ in type, [`Error::Value`] for
/// `num_per_channels` of 0 or scale factors of 4 GiB and more.
pub fn expand_to_fused_with_sf(stream: &Stream, args: WithSfArgs<'_>) -> Result<()> {
    const OP: &str = "expand_to_fused_with_sf";
    let WithSfArgs { x, x_sf, num_per_channels, token_topk_to_pos, pos_to_expert, pos_to_token, out, out_sf } = &args;
    check::rank(OP, "x", x, 2)?;
    check::dtype(OP, "x", x, &[DType::E4m3, DType::E2m1x2, DType::E5m2, DType::U8])?;
    let plan = Plan::new(OP, x, token_topk_to_pos, pos_to_expert, out)?;
    check::in_range(OP, "num_per_channels", (*num_per_channels).into(), 1, u32::MAX.into())?;
    let hidden = if x.dtype() == DType::E2m1x2 { 2 * x.dim(1) } else { x.dim(1) };
    let columns = hidden.div_ceil((*num_per_channels).into());
    let from = x_sf.check(OP, "x_sf", SfLayout::COMMON, (plan.t.into(), columns))?;
    check::dtype(OP, "out_sf", &out_sf.tensor, &[x_sf.layout.dtype()])?;
    let to = out_sf.check(OP, "out_sf", SfLayout::COMMON, (plan.p.into(), columns))?;
    if let Some(pos_to_token) = pos_to_token {
        check_index(OP, "pos_to_token", pos_to_token, &[plan.p.into()])?;
    }

    // Without `pos_to_token` its place is taken by another index tensor, which changes nothing.
    let inputs: [(&str, &View); 5] = [
        ("x", x),
        ("x_sf", &x_sf.tensor),
        ("token_topk_to_pos", token_topk_to_pos),
        ("pos_to_expert", pos_to_expert),
        ("pos_to_token", pos_to_token.as_ref().unwrap_or(pos_to_expert)),
    ];
    let outputs: [(&str, &View); 2] = [("out", out), ("out_sf", &out_sf.tensor)];
    check::same_device(OP, stream, &inputs)?;
    check::same_device(OP, stream, &outputs)?;
    check::no_overlaps(OP, &inputs, &outputs)?;
    if out.is_empty() {
        return Ok(());
    }

    // Rows of scales go the way of rows of data, which is 2 % faster than reading them by position; columns do not, which is 7 % slower.
    let pos_to_token = pos_to_token.as_ref().filter(|_| out_sf.layout.is_col_major());
    let words = x_sf.layout.columns(columns) as u32;
    // All strides are within tensors of less than 4 GiB, of 4-byte elements.
    let [x_sf_row, x_sf_col, out_sf_row, out_sf_col] = [from.row, from.col, to.row, to.col].map(|stride| 4 * stride);
    let word = if plan.word == 2 { 1 } else { plan.word };
    let vectors = word == 16
        && !x_sf.layout.is_col_major()
        && !out_sf.layout.is_col_major()
        && [x_sf_row, out_sf_row, 4 * words].iter().all(|bytes| bytes % 16 == 0)
        && (x_sf.tensor.ptr() | out_sf.tensor.ptr()).is_multiple_of(16);
    let (sf_words, sf_pieces) = if vectors { (words / 4, words / 4) } else { (words, words.div_ceil(kernels::WORDS)) };
    let entry = match word {
        16 if vectors => &rows_with_sf::w16_vectors,
        16 => &rows_with_sf::w16_words,
        4 => &rows_with_sf::w4_words,
        _ => &rows_with_sf::w1_words,
    };
    let pieces = plan.out_row / word;
    let by_chunks = plan.chunks();
    let divisor = Divisor::new(by_chunks.as_ref().map_or(pieces, |shape| shape.row_chunks));
    let threads = if by_chunks.is_some() { CHUNK_THREADS } else { THREADS };

    for part in plan.parts(pieces.max(sf_pieces)) {
        let sf_blocks = match pos_to_token {
            Some(_) => gather_blocks(part.rows, sf_pieces, threads),
            None => scatter_blocks(part.tokens, part.rows, sf_pieces, threads),
        };
        let data_blocks = match &by_chunks {
            Some(shape) => chunk_blocks(part.tokens, part.rows, shape.row_chunks),
            None => scatter_blocks(part.tokens, part.rows, pieces, threads),
        };
        let blocks = data_blocks + sf_blocks;
        let period = blocks.checked_div(sf_blocks).unwrap_or(blocks).max(1);
        let turns = Divisor::new(period);
        let by = |count: u32| Divisor::new(if vectors { sf_pieces } else { count.max(1) });
        let (tokens, places) = (by(part.tokens), by(part.rows));
        let sf_first = if pos_to_token.is_some() { 0 } else { part.first as u64 * x_sf_row as u64 };
        let config = LaunchConfig::new(blocks, threads);
        macro_rules! launch {
            ($kernel:ident, $entry:expr $(, $field:ident: $value:expr)*) => {{
                let values = $kernel::Args {
                    x: plan.x.at(part.first as u64 * plan.x_row as u64),
                    x_sf: x_sf.tensor.input::<u8>().at(sf_first),
                    token_topk_to_pos: plan.token_topk_to_pos.at(part.first as u64 * plan.k as u64),
                    pos_to_expert: plan.pos_to_expert.at(part.first.into()),
                    pos_to_token: pos_to_token.map_or(In::null(), |tensor| tensor.input::<i32>().at(part.first.into())),
                    out: plan.out,
                    out_sf: out_sf.tensor.output(),
                    k: plan.k,
                    num_tokens: part.tokens,
                    num_rows: part.rows,
                    first_row: part.first,
                    all_tokens: plan.t,
                    all_rows: plan.p,
                    x_row: plan.x_row,
                    out_row: plan.out_row,
                    pieces,
                    $($field: $value,)*
                    magic: divisor.magic,
                    shift: divisor.shift,
                    x_sf_row,
                    out_sf_row,
                    x_sf_word: if vectors { 16 } else { x_sf_col },
                    out_sf_word: if vectors { 16 } else { out_sf_col },
                    sf_words,
                    sf_pieces,
                    token_magic: tokens.magic,
                    token_shift: tokens.shift,
                    row_magic: places.magic,
                    row_shift: places.shift,
                    gathers: pos_to_token.is_some().into(),
                    sf_blocks,
                    period,
                    period_magic: turns.magic,
                    period_shift: turns.shift,
                };
                stream.launch(OP, $entry, &config, &values)?;
            }};
        }
        if let Some(shape) = &by_chunks {
            let entry = match (shape.vectors, vectors) {
                (kernels::WHOLE_VECTORS, true) => &chunks_with_sf::v7_vectors,
                (kernels::WHOLE_VECTORS, false) => &chunks_with_sf::v7_words,
                (_, true) => &chunks_with_sf::v4_vectors,
                (_, false) => &chunks_with_sf::v4_words,
            };
            launch!(chunks_with_sf, entry, row_chunks: shape.row_chunks);
        } else {
            launch!(rows_with_sf, entry);
        }
    }
    Ok(())
}

/// What the checks of data and maps found out.
struct Plan {
    t: u32,
    p: u32,
    k: u32,
    x: In<u8>,
    out: Out<u8>,
    token_topk_to_pos: In<i32>,
    pos_to_expert: In<i32>,
    /// Bytes from one row to the next.
    x_row: u32,
    out_row: u32,
    /// Bytes that a thread copies: all rows start at a multiple of them and end at one.
    word: u32,
    /// Such words of a row.
    pieces: u32,
}

/// How warps share a row.
struct ChunkShape {
    /// Vectors of a lane.
    vectors: u32,
    row_chunks: u32,
}

/// Tokens and rows of one launch.
struct Part {
    first: u32,
    tokens: u32,
    rows: u32,
}

impl Plan {
    fn new(op: &'static str, x: &View, token_topk_to_pos: &View, pos_to_expert: &View, out: &TensorMut<'_>) -> Result<Self> {
        check::rank(op, "x", x, 2)?;
        check::rank(op, "token_topk_to_pos", token_topk_to_pos, 2)?;
        check::rank(op, "pos_to_expert", pos_to_expert, 1)?;
        let (t, hidden, k, p) = (x.dim(0), x.dim(1), token_topk_to_pos.dim(1), pos_to_expert.dim(0));
        const MOST: u64 = i32::MAX as u64;
        check::in_range(op, "num_tokens", t, 0, MOST)?;
        check::in_range(op, "num_topk", k, 0, MOST)?;
        check::in_range(op, "num_expanded_tokens", p, 0, MOST)?;
        check_index(op, "token_topk_to_pos", token_topk_to_pos, &[t, k])?;
        check_index(op, "pos_to_expert", pos_to_expert, &[p])?;

        let size = x.dtype().size();
        let bytes = hidden.saturating_mul(size);
        check::in_range(op, "bytes of a row", bytes, 0, MAX_PIECES)?;
        check::last_stride_1(op, "x", x)?;
        check::aligned(op, "x", x, size)?;
        let x_row = if t <= 1 { bytes } else { x.stride(0).saturating_mul(size) };
        let x_row = check::fits_u32(op, "bytes from one row of x to the next", x_row)?;
        check::whole(op, "out", out, x.dtype(), &[p, hidden])?;
        check::aligned(op, "out", out, size)?;

        // Without tokens `x` does not matter.
        let from = if x.is_empty() { 0 } else { x.ptr() | x_row as u64 };
        let all = from | out.ptr() | bytes;
        let word = [16, 4, 2].into_iter().find(|word| all.is_multiple_of(*word)).unwrap_or(1) as u32;
        Ok(Self {
            t: t as u32,
            p: p as u32,
            k: k as u32,
            x: x.input(),
            out: out.output(),
            token_topk_to_pos: token_topk_to_pos.input(),
            pos_to_expert: pos_to_expert.input(),
            x_row,
            out_row: bytes as u32,
            word,
            pieces: bytes as u32 / word,
        })
    }

    /// For rows of vectors that fill chunks.
    fn chunks(&self) -> Option<ChunkShape> {
        let vectors = if self.word == 16 { kernels::chunk_vectors(self.pieces) } else { 0 };
        (vectors != 0).then(|| ChunkShape { vectors, row_chunks: self.pieces.div_ceil(32 * vectors) })
    }

    /// One launch after the other, none with more than [`MAX_PIECES`] pieces if a row has `pieces` of them.
    fn parts(&self, pieces: u32) -> impl Iterator<Item = Part> {
        let (t, p) = (self.t, self.p);
        let most = MAX_PIECES.checked_div(pieces.into()).unwrap_or(MAX_PIECES).max(1) as u32;
        (0..t.max(p)).step_by(most as usize).map(move |first| Part {
            first,
            tokens: t.saturating_sub(first).min(most),
            rows: p.saturating_sub(first).min(most),
        })
    }
}

fn check_index(op: &'static str, arg: &'static str, tensor: &View, shape: &[u64]) -> Result<()> {
    check::whole(op, arg, tensor, DType::I32, shape)?;
    check::aligned(op, arg, tensor, 4)
}
