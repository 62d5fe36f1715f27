//! Quantisation: casts to and from FP8 (e4m3), FP4 (e2m1) and 12-bit floats (e5m6) with scale factors per token, block or channel, and
//! what is fused with them: SwiGLU, RMS norm, transposes.
//!
//! A quantised tensor is a pair: data, and scale factors `sf` with `decoded = data * sf`. A scaling block is `(npt, npc)`: that
//! many tokens by that many channels share one scale. [`QuantTensor`] keeps the pair together. For ops that are given memory piece by
//! piece, [`sf_shape`] says what to allocate for the scales of an output, [`Format`] what for its data.
//!
//! | layout of scales | tensor | element `(m, k)` |
//! |---|---|---|
//! | [`SfLayout::RowMajor`] | f32 `(M, K)`, strides `(K, 1)` | one f32 |
//! | [`SfLayout::ColMajor`] | f32 `(M, K)`, strides `(1, align(M, 4))` | one f32 |
//! | [`SfLayout::ColMajorPacked`] | ue8m0x4 `(M, ceil(K / 4))`, strides `(1, align(M, 4))` | byte `k % 4` of word `(m, k / 4)` |
//! | [`SfLayout::RowMajorPacked`] | ue8m0x4 `(M, ceil(K / 4))`, strides `(ceil(K / 4), 1)` | byte `k % 4` of word `(m, k / 4)` |
//! | [`SfLayout::PerChannelPacked`] | ue8m0x4 `(ceil(M / 4), K)`, strides `(K, 1)` | byte `m % 4` of word `(m / 4, k)` |
//! | [`SfLayout::RowMajorE4m3`] | e4m3 `(M, K)`, strides `(K, 1)` | one e4m3 |
//! | [`SfLayout::ColMajorE4m3`] | e4m3 `(M, K)`, strides `(1, align(M, 16))` | one e4m3 |
//!
//! `M` and `K` count scaling blocks. Packed scales are powers of two, one exponent byte each; unused bytes of a last word are 0.
//! The per-channel form is for blocks of one channel; e4m3 scales are those of FP4 with 16 channels a scale.

pub mod batched_transpose_weight_sf;
pub mod cast;
pub mod cast_back;
pub mod cast_back_e5m6;
mod common_swiglu;
mod common_tensor;
pub mod convert_sf;
pub mod norm_backward;
pub mod norm_forward;
pub mod norm_forward_and_per_token_cast;
pub mod per_block_cast;
pub mod per_block_cast_lossless;
pub mod per_channel_cast;
pub mod per_channel_cast_and_transpose;
pub mod per_channel_cast_fused;
pub mod per_token_cast;
pub mod per_token_cast_and_cast_back;
pub mod per_token_cast_to_e5m6;
pub mod swiglu_backward;
pub mod swiglu_backward_and_per_token_cast;
pub mod swiglu_forward;
pub mod swiglu_forward_and_per_channel_cast_and_transpose;
pub mod swiglu_forward_and_per_token_cast;

pub use batched_transpose_weight_sf::batched_transpose_weight_sf;
pub use cast::cast;
pub use cast_back::{cast_back, per_token_cast_back};
pub use cast_back_e5m6::cast_back_e5m6;
pub use common_tensor::{QuantFormat, QuantMut, QuantRef, QuantSpec, QuantTensor, Scales};
pub use convert_sf::convert_sf;
pub use norm_backward::norm_backward;
pub use norm_forward::norm_forward;
pub use norm_forward_and_per_token_cast::norm_forward_and_per_token_cast;
pub use per_block_cast::{per_block_cast, per_block_cast_with_precomputed_sf, per_block_cast_with_sf_only};
pub use per_block_cast_lossless::per_block_cast_lossless;
pub use per_channel_cast::per_channel_cast;
pub use per_channel_cast_and_transpose::per_channel_cast_and_transpose;
pub use per_channel_cast_fused::per_channel_cast_fused;
pub use per_token_cast::{per_token_cast, per_token_cast_with_precomputed_sf, per_token_cast_with_sf_only};
pub use per_token_cast_and_cast_back::per_token_cast_and_cast_back;
pub use per_token_cast_to_e5m6::per_token_cast_to_e5m6;
pub use swiglu_backward::swiglu_backward;
pub use swiglu_backward_and_per_token_cast::swiglu_backward_and_per_token_cast;
pub use swiglu_forward::swiglu_forward;
pub use swiglu_forward_and_per_channel_cast_and_transpose::swiglu_forward_and_per_channel_cast_and_transpose;
pub use swiglu_forward_and_per_token_cast::swiglu_forward_and_per_token_cast;

use crate::{DType, Error, Result, TensorMut, TensorRef, View, check};
use std::fmt;

/// What data are quantised to. [docs/numerics.md] says what the formats can hold, how scales are chosen, and what is lost.
///
/// [docs/numerics.md]: https://github.com/ferrotile/ferrotile/blob/main/docs/numerics.md
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// FP8, largest value 448; one byte a value.
    E4m3,
    /// FP4, largest value 6; two values a byte, the even channel in the low nibble.
    E2m1,
}

impl Format {
    /// Element type of the data tensor.
    pub const fn dtype(self) -> DType {
        match self {
            Format::E4m3 => DType::E4m3,
            Format::E2m1 => DType::E2m1x2,
        }
    }

    /// Columns of the data tensor for `hidden` channels, which must be even for FP4.
    pub const fn columns(self, hidden: u64) -> u64 {
        match self {
            Format::E4m3 => hidden,
            Format::E2m1 => hidden / 2,
        }
    }

    /// The format of a data tensor of this element type.
    pub const fn of(dtype: DType) -> Option<Self> {
        match dtype {
            DType::E4m3 => Some(Format::E4m3),
            DType::E2m1x2 => Some(Format::E2m1),
            _ => None,
        }
    }

    /// The name used in error texts and in test and benchmark cases.
    pub const fn name(self) -> &'static str {
        match self {
            Format::E4m3 => "e4m3",
            Format::E2m1 => "e2m1",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How the scale factors of a tensor lie in memory; see the table of this module.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum SfLayout {
    /// f32, the scales of a block row one after the other.
    #[default]
    RowMajor,
    /// f32, the scales of a block column one after the other, each column 16-byte aligned (what TMA loads want).
    ColMajor,
    /// Exponent bytes of four block columns in a word, words column-major.
    ColMajorPacked,
    /// Exponent bytes of four block columns in a word, words row-major.
    RowMajorPacked,
    /// Exponent bytes of four block rows in a word, words row-major; for blocks of one channel.
    PerChannelPacked,
    /// e4m3, the scales of a block row one after the other.
    RowMajorE4m3,
    /// e4m3, the scales of a block column one after the other, each column 16-byte aligned.
    ColMajorE4m3,
}

impl SfLayout {
    /// f32 and packed along channels: what every op with scales of its own takes.
    pub const COMMON: &[SfLayout] = &[SfLayout::RowMajor, SfLayout::ColMajor, SfLayout::ColMajorPacked, SfLayout::RowMajorPacked];

    /// Whether a word holds four exponent bytes.
    pub const fn is_packed(self) -> bool {
        matches!(self, SfLayout::ColMajorPacked | SfLayout::RowMajorPacked | SfLayout::PerChannelPacked)
    }

    /// Whether scales are e4m3.
    pub const fn is_e4m3(self) -> bool {
        matches!(self, SfLayout::RowMajorE4m3 | SfLayout::ColMajorE4m3)
    }

    /// Whether block rows are neighbours in memory.
    pub const fn is_col_major(self) -> bool {
        matches!(self, SfLayout::ColMajor | SfLayout::ColMajorPacked | SfLayout::ColMajorE4m3)
    }

    /// Element type of the tensor.
    pub const fn dtype(self) -> DType {
        match self {
            SfLayout::RowMajor | SfLayout::ColMajor => DType::F32,
            SfLayout::ColMajorPacked | SfLayout::RowMajorPacked | SfLayout::PerChannelPacked => DType::Ue8m0x4,
            SfLayout::RowMajorE4m3 | SfLayout::ColMajorE4m3 => DType::E4m3,
        }
    }

    /// Rows of the tensor for `num_blocks` block rows.
    pub const fn rows(self, num_blocks: u64) -> u64 {
        if matches!(self, SfLayout::PerChannelPacked) { num_blocks.div_ceil(4) } else { num_blocks }
    }

    /// Columns of the tensor for `num_blocks` block columns.
    pub const fn columns(self, num_blocks: u64) -> u64 {
        if matches!(self, SfLayout::ColMajorPacked | SfLayout::RowMajorPacked) { num_blocks.div_ceil(4) } else { num_blocks }
    }

    /// The name used in error texts and in test and benchmark cases.
    pub const fn name(self) -> &'static str {
        match self {
            SfLayout::RowMajor => "row-major",
            SfLayout::ColMajor => "col-major",
            SfLayout::ColMajorPacked => "col-major packed",
            SfLayout::RowMajorPacked => "row-major packed",
            SfLayout::PerChannelPacked => "per-channel packed",
            SfLayout::RowMajorE4m3 => "row-major e4m3",
            SfLayout::ColMajorE4m3 => "col-major e4m3",
        }
    }
}

impl fmt::Display for SfLayout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What to allocate for scale factors, from [`sf_shape`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SfShape {
    /// Element type.
    pub dtype: DType,
    /// Shape of the tensor.
    pub shape: [u64; 2],
    /// Its strides in elements.
    pub strides: [u64; 2],
    /// Elements to allocate, with the padding of column-major layouts.
    pub elements: u64,
}

/// Scale factors that an op writes for `(num_tokens, hidden)` with scaling blocks of `block = (npt, npc)`.
///
/// ```
/// use ferrotile::quant::{SfLayout, sf_shape};
///
/// let sf = sf_shape(5, 576, (1, 128), SfLayout::ColMajorPacked);
/// assert_eq!((sf.shape, sf.strides, sf.elements), ([5, 2], [1, 8], 16));
/// ```
pub fn sf_shape(num_tokens: u64, hidden: u64, block: (u32, u32), layout: SfLayout) -> SfShape {
    let rows = layout.rows(num_tokens.div_ceil(block.0.max(1) as u64));
    let columns = layout.columns(hidden.div_ceil(block.1.max(1) as u64));
    let (strides, elements) = if layout.is_col_major() {
        // Columns start at multiples of 16 bytes.
        let align = 16 / layout.dtype().size();
        let pitch = rows.saturating_add(align - 1) / align * align;
        ([1, pitch], columns.saturating_mul(pitch))
    } else {
        ([columns, 1], rows.saturating_mul(columns))
    };
    SfShape { dtype: layout.dtype(), shape: [rows, columns], strides, elements }
}

/// Scale factors that an op reads. Rows (column-major: columns) may lie any distance apart.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sf<'a> {
    /// `(M, K)`; packed `(M, ceil(K / 4))`, per-channel packed `(ceil(M / 4), K)`.
    pub tensor: TensorRef<'a>,
    /// How the strides are to be read.
    pub layout: SfLayout,
}

/// Scale factors that an op writes. Rows may lie any distance apart, columns of column-major layouts any multiple of 16 bytes.
#[derive(Debug, PartialEq)]
pub struct SfMut<'a> {
    /// `(M, K)`; packed `(M, ceil(K / 4))`, per-channel packed `(ceil(M / 4), K)`.
    pub tensor: TensorMut<'a>,
    /// How the strides are to be read.
    pub layout: SfLayout,
}

/// What a cast reads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Input<'a> {
    /// bf16 or f32.
    Plain(TensorRef<'a>),
    /// A quantised tensor: `data` e4m3 `(T, H)` or e2m1x2 `(T, H / 2)`, with one scale for each `block = (npt, npc)`.
    Quantised {
        /// The quantised values.
        data: TensorRef<'a>,
        /// Their scale factors.
        sf: Sf<'a>,
        /// Tokens and channels that share a scale.
        block: (u32, u32),
    },
}

impl<'a> Input<'a> {
    /// The tensor that is cast, without its scales.
    pub fn data(&self) -> TensorRef<'a> {
        match *self {
            Input::Plain(data) | Input::Quantised { data, .. } => data,
        }
    }

    /// Channels of the data: twice the columns of an e2m1x2 tensor.
    pub fn hidden(&self) -> u64 {
        let data = self.data();
        let columns = data.dim(1);
        if data.dtype() == DType::E2m1x2 { columns.saturating_mul(2) } else { columns }
    }
}

/// Which rows of an expanded MoE tensor hold tokens; the others are padding.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ExpertRows<'a> {
    /// All of them.
    All,
    /// i32 `(P,)`, the expert of each row; a row with a negative one is padding.
    PosToExpert(TensorRef<'a>),
    /// Experts one after the other, each from the next multiple of `alignment` on. Row counts stay on the device.
    Psum {
        /// i32 `(E,)`: one past the last row of each expert. Expert `e` starts at `align(psum[e - 1], alignment)`.
        psum_num_tokens_per_expert: TensorRef<'a>,
        /// Rows that the start of an expert is a multiple of; 128 in the published layout.
        alignment: u32,
    },
}

/// Routing weights of the rows of an expanded MoE tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RowWeights<'a> {
    /// Every row counts as it is.
    None,
    /// One weight a row, times a factor.
    PerRow {
        /// f32 `(P,)`.
        topk_weights: TensorRef<'a>,
        /// 1 leaves weights as they are.
        routed_scaling_factor: f32,
    },
    /// Weights by token and choice, and for each row which of them is its own.
    PerTokenTopk {
        /// f32 `(N, k)`.
        topk_weights: TensorRef<'a>,
        /// i32 `(P,)`: `token * k + choice`; a row with a negative one has weight 0.
        pos_to_token_topk: TensorRef<'a>,
    },
}

/// Strides of scale factors as kernels take them: elements from one block row, and from one column of the tensor, to the next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct SfStrides {
    pub row: u32,
    pub col: u32,
}

impl Sf<'_> {
    /// Checks that these are the scales of `rows` by `columns` scaling blocks, in one of the layouts that the op takes.
    pub(crate) fn check(
        &self,
        op: &'static str,
        arg: &'static str,
        allowed: &[SfLayout],
        (rows, columns): (u64, u64),
    ) -> Result<SfStrides> {
        check_sf(op, arg, &self.tensor, self.layout, allowed, (rows, columns))
    }
}

impl SfMut<'_> {
    /// Checks that these are the scales of `rows` by `columns` scaling blocks, in one of the layouts that the op writes, and the
    /// alignment of columns that others rely on.
    pub(crate) fn check(
        &self,
        op: &'static str,
        arg: &'static str,
        allowed: &[SfLayout],
        (rows, columns): (u64, u64),
    ) -> Result<SfStrides> {
        let strides = check_sf(op, arg, &self.tensor, self.layout, allowed, (rows, columns))?;
        let t: &View = &self.tensor;
        // TMA reads columns of scales, which must start at multiples of 16 bytes.
        let aligned = t.ptr().is_multiple_of(16) && (t.dim(1) <= 1 || (t.stride(1) * t.dtype().size()).is_multiple_of(16));
        if self.layout.is_col_major() && !t.is_empty() && !aligned {
            let got = format!("address {:#x} with strides {:?}", t.ptr(), t.strides());
            return Err(Error::Layout { op, arg, expected: "columns that start at multiples of 16 bytes".to_owned(), got });
        }
        Ok(strides)
    }
}

fn check_sf(
    op: &'static str,
    arg: &'static str,
    t: &View,
    layout: SfLayout,
    allowed: &[SfLayout],
    (rows, columns): (u64, u64),
) -> Result<SfStrides> {
    if !allowed.contains(&layout) {
        let names: Vec<_> = allowed.iter().map(|layout| layout.name()).collect();
        return Err(Error::Layout { op, arg, expected: names.join(", "), got: layout.to_string() });
    }
    check::dtype(op, arg, t, &[layout.dtype()])?;
    check::shape(op, arg, t, &[layout.rows(rows), layout.columns(columns)])?;
    if t.is_empty() {
        return Ok(SfStrides::default());
    }
    // The stride of a dimension of size 1 says nothing and is not used.
    let (inner, outer) = if layout.is_col_major() { (0, 1) } else { (1, 0) };
    let fine = (t.dim(inner) == 1 || t.stride(inner) == 1) && (t.dim(outer) == 1 || t.stride(outer) >= t.dim(inner));
    if !fine {
        let expected = match layout.is_col_major() {
            true => format!("{layout}: strides [1, at least {}]", t.dim(0)),
            false => format!("{layout}: strides [at least {}, 1]", t.dim(1)),
        };
        return Err(Error::Layout { op, arg, expected, got: format!("strides {:?}", t.strides()) });
    }
    let size = t.dtype().size();
    if !t.ptr().is_multiple_of(size) {
        let got = format!("address {:#x}", t.ptr());
        return Err(Error::Layout { op, arg, expected: format!("an address that is a multiple of {size}"), got });
    }
    // Kernels index scales, and bytes of packed ones, with 32 bits.
    check::fits_u32(op, arg, t.span_bytes())?;
    let stride = |i: usize| if t.dim(i) == 1 { 0 } else { t.stride(i) as u32 };
    Ok(SfStrides { row: stride(0), col: stride(1) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;

    const OP: &str = "some_cast";

    #[test]
    fn shapes_of_scales() {
        let shape = |layout| {
            let s = sf_shape(5, 576, (1, 128), layout);
            (s.dtype, s.shape, s.strides, s.elements)
        };
        assert_eq!(shape(SfLayout::RowMajor), (DType::F32, [5, 5], [5, 1], 25));
        assert_eq!(shape(SfLayout::ColMajor), (DType::F32, [5, 5], [1, 8], 40));
        assert_eq!(shape(SfLayout::ColMajorPacked), (DType::Ue8m0x4, [5, 2], [1, 8], 16));
        assert_eq!(shape(SfLayout::RowMajorPacked), (DType::Ue8m0x4, [5, 2], [2, 1], 10));
        assert_eq!(shape(SfLayout::RowMajorE4m3), (DType::E4m3, [5, 5], [5, 1], 25));
        assert_eq!(shape(SfLayout::ColMajorE4m3), (DType::E4m3, [5, 5], [1, 16], 80));
        let per_channel = sf_shape(640, 48, (128, 1), SfLayout::PerChannelPacked);
        assert_eq!((per_channel.dtype, per_channel.shape, per_channel.strides), (DType::Ue8m0x4, [2, 48], [48, 1]));
        assert_eq!(sf_shape(0, 576, (1, 32), SfLayout::ColMajor).elements, 0);
        assert_eq!(sf_shape(4001, 7168, (128, 128), SfLayout::RowMajor).shape, [32, 56]);
        // No division by zero and no overflow for senseless arguments.
        assert_eq!(sf_shape(u64::MAX, u64::MAX, (0, 0), SfLayout::ColMajor).elements, u64::MAX);
    }

    #[test]
    fn strides_are_checked() {
        let b = Device::emulator().zeros::<f32>(64).unwrap();
        let sf = |shape: [u64; 2], strides: [u64; 2], layout| Sf { tensor: b.strided(&shape, &strides, 0).unwrap(), layout };
        let row = sf([5, 3], [4, 1], SfLayout::RowMajor);
        assert_eq!(row.check(OP, "sf", SfLayout::COMMON, (5, 3)).unwrap(), SfStrides { row: 4, col: 1 });
        assert!(matches!(row.check(OP, "sf", SfLayout::COMMON, (5, 4)), Err(Error::Shape { arg: "sf", .. })));
        // Inputs may have columns of any pitch, also one that is no multiple of 4.
        let col = sf([5, 3], [1, 7], SfLayout::ColMajor);
        assert_eq!(col.check(OP, "sf", SfLayout::COMMON, (5, 3)).unwrap(), SfStrides { row: 1, col: 7 });
        for (strides, layout) in [([4, 1], SfLayout::ColMajor), ([1, 7], SfLayout::RowMajor), ([1, 4], SfLayout::ColMajor)] {
            let wrong = sf([5, 3], strides, layout);
            assert!(
                matches!(wrong.check(OP, "sf", SfLayout::COMMON, (5, 3)), Err(Error::Layout { arg: "sf", .. })),
                "{strides:?} {layout}"
            );
        }
        let packed = sf([5, 3], [3, 1], SfLayout::RowMajorPacked);
        assert!(matches!(packed.check(OP, "sf", SfLayout::COMMON, (5, 9)), Err(Error::DType { arg: "sf", .. })));
        let e4m3 = sf([5, 3], [3, 1], SfLayout::RowMajorE4m3);
        assert!(matches!(e4m3.check(OP, "sf", SfLayout::COMMON, (5, 3)), Err(Error::Layout { arg: "sf", .. })));
        // One column: its stride says nothing.
        assert_eq!(
            sf([5, 1], [1, 99], SfLayout::RowMajor).check(OP, "sf", SfLayout::COMMON, (5, 1)).unwrap(),
            SfStrides { row: 1, col: 0 }
        );
    }

    #[test]
    fn columns_of_outputs_are_aligned() {
        let mut b = Device::emulator().zeros::<f32>(64).unwrap();
        let mut check = |strides: [u64; 2], offset| {
            let tensor = b.strided_mut(&[5, 3], &strides, offset).unwrap();
            SfMut { tensor, layout: SfLayout::ColMajor }.check(OP, "sf", SfLayout::COMMON, (5, 3)).map(|s| s.col)
        };
        assert_eq!(check([1, 8], 0).unwrap(), 8);
        assert_eq!(check([1, 8], 4).unwrap(), 8);
        assert!(matches!(check([1, 7], 0), Err(Error::Layout { .. })));
        assert!(matches!(check([1, 8], 2), Err(Error::Layout { .. })));
    }
}
