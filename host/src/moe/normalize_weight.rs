//! normalize_weight: routing weights divided by their sum.

use crate::{DType, Result, Stream, TensorMut, TensorRef, check};
use ferrotile_kernels::entry::Entry;
use ferrotile_kernels::moe::normalize_weight as kernels;
use kernels::{by_row, by_vector, staged};

const OP: &str = "normalize_weight";

/// Most choices with [`SumOrder::Tree`].
pub const MAX_TREE: u64 = kernels::MAX_HELD as u64;

/// Most tokens; each takes a thread.
const MAX_TOKENS: u64 = u32::MAX as u64 - 127;

/// In which order the weights of a token are added. The results differ in the last bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SumOrder {
    /// `((1e-20 + w[0]) + w[1]) + …`, as TileKernels 1.0.0 does.
    #[default]
    Sequential,
    /// `a[j] += a[j + d]` for distances `d` of 16, 8, 4, 2, 1, then `1e-20 + a[0]`, as TileKernels 2.1.0 does here and in its gate.
    Tree,
}

/// Arguments of [`normalize_weight`]. No two tensors may overlap.
pub struct Args<'a> {
    /// Weights, f32 `[num_tokens, num_topk]`, contiguous.
    pub topk_weights: TensorRef<'a>,
    /// The order of the sum.
    pub order: SumOrder,
    /// Sum of each token's weights, f32 `[num_tokens]`, contiguous.
    pub denominator: TensorMut<'a>,
    /// The quotients, f32 `[num_tokens, num_topk]`, contiguous.
    pub normalized: TensorMut<'a>,
}

/// Divides each token's weights by their sum, and returns that sum too. Asynchronous on `stream`; allocates nothing.
///
/// | tensor | shape | dtype | layout |
/// |---|---|---|---|
/// | `topk_weights` | `[num_tokens, num_topk]` | f32 | contiguous |
/// | `denominator` | `[num_tokens]` | f32 | contiguous |
/// | `normalized` | `[num_tokens, num_topk]` | f32 | contiguous |
///
/// The sum is rounded to f32 after each addition, in the order that [`SumOrder`] says, and includes 1e-20: a row of zeros has the sum 1e-20 and
/// the quotients 0. Quotients are correctly rounded. Infinities and NaN follow IEEE 754, so an infinite weight makes its row 0 and NaN; every
/// NaN that results is 0x7FC00000. Both backends give the same bits. (Facts: moe.md, section 5.)
///
/// ```
/// use ferrotile::moe::normalize_weight::{Args, SumOrder, normalize_weight};
///
/// let device = ferrotile::Device::emulator();
/// let weights = device.upload(&[1.0f32, 3.0, 0.5, 0.0])?;
/// let (mut denominator, mut normalized) = (device.alloc::<f32>(2)?, device.alloc::<f32>(4)?);
/// let args = Args {
///     topk_weights: weights.tensor(&[2, 2])?,
///     order: SumOrder::Sequential,
///     denominator: denominator.tensor_mut(&[2])?,
///     normalized: normalized.tensor_mut(&[2, 2])?,
/// };
/// normalize_weight(&device.stream()?, args)?;
/// assert_eq!(denominator.to_vec()?, [4.0, 0.5]);
/// assert_eq!(normalized.to_vec()?, [0.25, 0.75, 1.0, 0.0]);
/// # Ok::<(), ferrotile::Error>(())
/// ```
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape), [`Error::DType`](crate::Error::DType), [`Error::Layout`](crate::Error::Layout) when a tensor
/// is not as in the table; [`Error::Value`](crate::Error::Value) for more than 32 choices added in a tree, more than 2^31 - 1 choices, and
/// more than 2^32 - 128 tokens; [`Error::Overlap`](crate::Error::Overlap), [`Error::DeviceMismatch`](crate::Error::DeviceMismatch),
/// [`Error::Driver`](crate::Error::Driver).
pub fn normalize_weight(stream: &Stream, args: Args<'_>) -> Result<()> {
    let (t, k) = check_args(stream, &args)?;
    if t == 0 {
        return Ok(());
    }
    let (weights, denominator, normalized) = (args.topk_weights.input(), args.denominator.output(), args.normalized.output());
    let tree = args.order == SumOrder::Tree;
    let aligned = |bytes| args.topk_weights.ptr().is_multiple_of(bytes) && args.normalized.ptr().is_multiple_of(bytes);
    // Weights of an access.
    let wide = [4, 2, 1].into_iter().find(|n| k.is_multiple_of(*n) && aligned(4 * u64::from(*n))).unwrap_or(1);
    if wide == 4 && k > 4 && k <= kernels::MAX_HELD {
        let values = by_vector::Args { weights, denominator, normalized, t, k };
        let (entry, lanes) = match (k, tree) {
            (..=8, false) => (&by_vector::left_2, 2),
            (..=8, true) => (&by_vector::tree_2, 2),
            (..=16, false) => (&by_vector::left_4, 4),
            (..=16, true) => (&by_vector::tree_4, 4),
            (_, false) => (&by_vector::left_8, 8),
            (_, true) => (&by_vector::tree_8, 8),
        };
        stream.launch(OP, entry, &kernels::config_by_vector(t, lanes), &values)
    } else if wide == 1 && k > 4 && k <= kernels::MAX_STAGED {
        let values = staged::Args { weights, denominator, normalized, t, k };
        stream.launch(OP, if tree { &staged::tree_9 } else { &staged::left_9 }, &kernels::config_staged(t), &values)
    } else {
        let values = by_row::Args { weights, denominator, normalized, t, k };
        stream.launch(OP, by_row_entry(k, wide, tree), &kernels::config(t), &values)
    }
}

/// The kernel for rows of `k` weights, read and written `wide` at a time. Those of 8 to 32, 4 at a time, are `by_vector`'s.
fn by_row_entry(k: u32, wide: u32, tree: bool) -> &'static Entry<by_row::Args> {
    let [left, tree_entry] = match (k, wide) {
        (..=4, 4) => [&by_row::left_4_by_4, &by_row::tree_4_by_4],
        (..=4, 2) => [&by_row::left_4_by_2, &by_row::tree_4_by_2],
        (..=4, _) => [&by_row::left_4_by_1, &by_row::tree_4_by_1],
        (..=8, 2) => [&by_row::left_8_by_2, &by_row::tree_8_by_2],
        (..=12, 1) => [&by_row::left_12_by_1, &by_row::tree_12_by_1],
        (..=32, 2) => [&by_row::left_32_by_2, &by_row::tree_32_by_2],
        (..=32, _) => [&by_row::left_32_by_1, &by_row::tree_32_by_1],
        _ => [&by_row::left_any; 2],
    };
    if tree { tree_entry } else { left }
}

/// Numbers of tokens and choices, if everything is right.
fn check_args(stream: &Stream, args: &Args<'_>) -> Result<(u32, u32)> {
    let (weights, denominator, normalized) = (&args.topk_weights, &args.denominator, &args.normalized);
    check::rank(OP, "topk_weights", weights, 2)?;
    let (t, k) = (weights.dim(0), weights.dim(1));
    let tensors: [(&str, &crate::View, &[u64]); 3] = [
        ("topk_weights", weights, weights.shape()),
        ("denominator", denominator, &[t]),
        ("normalized", normalized, weights.shape()),
    ];
    for (name, tensor, shape) in tensors {
        check::whole(OP, name, tensor, DType::F32, shape)?;
    }
    let most = if args.order == SumOrder::Tree { MAX_TREE } else { i32::MAX as u64 };
    check::in_range(OP, "num_topk", k, 0, most)?;
    // Rows are counted in 32 bits.
    check::in_range(OP, "num_tokens", t, 0, MAX_TOKENS)?;
    let all = tensors.map(|(name, tensor, _)| (name, tensor));
    check::same_device(OP, stream, &all)?;
    check::no_overlaps(OP, &all[..1], &all[1..])?;
    Ok((t as u32, k as u32))
}
