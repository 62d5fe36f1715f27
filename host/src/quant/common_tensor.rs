//! [`QuantTensor`]: quantised values and their scale factors, kept together.

use super::{Format, Input, Sf, SfLayout, SfMut, SfShape, sf_shape};
use super::{cast_back, cast_back_e5m6, convert_sf, per_block_cast, per_channel_cast, per_token_cast, per_token_cast_to_e5m6};
use crate::device::Backend;
use crate::{Buffer, DType, Device, Element, Error, Result, Stream, TensorMut, TensorRef, View, check, emu};
use ferrotile_kernels::device::num;
use std::fmt;
use std::ops::Range;

/// Every layout of scale factors.
pub(super) const LAYOUTS: &[SfLayout] = &[
    SfLayout::RowMajor,
    SfLayout::ColMajor,
    SfLayout::ColMajorPacked,
    SfLayout::RowMajorPacked,
    SfLayout::PerChannelPacked,
    SfLayout::RowMajorE4m3,
    SfLayout::ColMajorE4m3,
];

/// How the values of a [`QuantTensor`] are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum QuantFormat {
    /// FP8, largest value 448; one byte a value.
    E4m3,
    /// FP4, largest value 6; two values a byte, the even channel in the low nibble.
    E2m1,
    /// The upper 12 bits of an f16, largest value 65024; eight values in 12 bytes.
    E5m6,
}

impl QuantFormat {
    /// Element type of the data tensor.
    pub const fn dtype(self) -> DType {
        match self {
            QuantFormat::E4m3 => DType::E4m3,
            QuantFormat::E2m1 => DType::E2m1x2,
            QuantFormat::E5m6 => DType::U8,
        }
    }

    /// The format of a data tensor of this element type.
    pub const fn of(dtype: DType) -> Option<Self> {
        match dtype {
            DType::E4m3 => Some(QuantFormat::E4m3),
            DType::E2m1x2 => Some(QuantFormat::E2m1),
            DType::U8 => Some(QuantFormat::E5m6),
            _ => None,
        }
    }

    /// Columns, which are bytes, of the data tensor for `hidden` channels.
    pub const fn columns(self, hidden: u64) -> u64 {
        match self {
            QuantFormat::E4m3 => hidden,
            QuantFormat::E2m1 => hidden / 2,
            QuantFormat::E5m6 => (hidden / 2).saturating_mul(3),
        }
    }

    /// Channels that are stored together: the number of channels is a multiple of this.
    pub const fn channels_together(self) -> u64 {
        match self {
            QuantFormat::E4m3 => 1,
            QuantFormat::E2m1 => 2,
            QuantFormat::E5m6 => 8,
        }
    }

    /// Bytes of [`channels_together`](Self::channels_together).
    const fn bytes_together(self) -> u64 {
        match self {
            QuantFormat::E4m3 | QuantFormat::E2m1 => 1,
            QuantFormat::E5m6 => 12,
        }
    }

    /// The name used in error texts.
    pub const fn name(self) -> &'static str {
        match self {
            QuantFormat::E4m3 => "e4m3",
            QuantFormat::E2m1 => "e2m1",
            QuantFormat::E5m6 => "e5m6",
        }
    }

    /// The values of a row of data.
    fn decode(self, row: &[u8]) -> Vec<f32> {
        match self {
            QuantFormat::E4m3 => row.iter().map(|q| num::e4m3_to_f32(*q)).collect(),
            QuantFormat::E2m1 => row.iter().flat_map(|q| [q & 15, q >> 4]).map(num::e2m1_to_f32).collect(),
            QuantFormat::E5m6 => {
                let word = |w: &[u8]| w.iter().rev().fold(0, |word, byte| word << 8 | *byte as u32);
                let words = row.chunks_exact(12).map(|w| [word(&w[..4]), word(&w[4..8]), word(&w[8..])]);
                words.flat_map(num::unpack_e5m6).map(num::e5m6_to_f32).collect()
            }
        }
    }
}

impl From<Format> for QuantFormat {
    fn from(format: Format) -> Self {
        match format {
            Format::E4m3 => QuantFormat::E4m3,
            Format::E2m1 => QuantFormat::E2m1,
        }
    }
}

impl fmt::Display for QuantFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How a tensor is quantised: all that its bytes do not say themselves.
///
/// | what | usual |
/// |---|---|
/// | activations | e4m3, `(1, 128)`, column-major or column-major packed |
/// | weights | e4m3, `(128, 128)`, row-major |
/// | operands of weight gradients | e4m3, `(128, 1)`, row-major or per-channel packed |
/// | FP4 weights | e2m1, `(1, 32)`, column-major packed |
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct QuantSpec {
    /// How values are stored.
    pub format: QuantFormat,
    /// Tokens and channels that share a scale factor, `(npt, npc)`.
    pub block: (u32, u32),
    /// How scale factors are stored.
    pub layout: SfLayout,
}

impl QuantSpec {
    /// Shape of the data tensor, whose element type is [`QuantFormat::dtype`].
    pub const fn data_shape(&self, num_tokens: u64, hidden: u64) -> [u64; 2] {
        [num_tokens, self.format.columns(hidden)]
    }

    /// Element type, shape and strides of the scale factors.
    pub fn sf_shape(&self, num_tokens: u64, hidden: u64) -> SfShape {
        sf_shape(num_tokens, hidden, self.block, self.layout)
    }

    /// Scaling blocks from top to bottom and from left to right.
    fn blocks(&self, num_tokens: u64, hidden: u64) -> (u64, u64) {
        (num_tokens.div_ceil(self.block.0.max(1).into()), hidden.div_ceil(self.block.1.max(1).into()))
    }

    fn check(&self, op: &'static str, hidden: u64) -> Result<()> {
        check::in_range(op, "npt", self.block.0.into(), 1, u32::MAX.into())?;
        check::in_range(op, "npc", self.block.1.into(), 1, u32::MAX.into())?;
        check::divisible(op, "hidden", hidden, self.format.channels_together())?;
        check_per_channel(op, self.block, self.layout)
    }
}

/// Scales packed along tokens are for blocks of one channel.
fn check_per_channel(op: &'static str, block: (u32, u32), layout: SfLayout) -> Result<()> {
    if layout != SfLayout::PerChannelPacked || block.1 == 1 {
        return Ok(());
    }
    let allowed = format!("1 with {layout} scales");
    Err(Error::Value { op, arg: "npc", allowed, got: block.1.to_string() })
}

impl fmt::Display for QuantSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { format, block: (npt, npc), layout } = self;
        write!(f, "{format} in blocks of {npt}x{npc}, {layout} scales")
    }
}

/// A quantised tensor that is read: values and the scale factors without which they mean nothing.
///
/// Ops that read quantised tensors take it as [`Input`]; [`tokens`](Self::tokens) and [`channels`](Self::channels) are views of parts.
///
/// ```
/// use ferrotile::quant::{Input, QuantRef, Sf, SfLayout};
/// use ferrotile::{Device, E4m3};
///
/// let device = Device::emulator();
/// // 4 tokens of 256 channels, a scale for each token and 128 channels.
/// let data = device.upload(&[E4m3::from_f32(1.5); 4 * 256])?;
/// let sf = device.upload(&[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])?;
/// let q = QuantRef::new(data.tensor(&[4, 256])?, Sf { tensor: sf.tensor(&[4, 2])?, layout: SfLayout::RowMajor }, (1, 128))?;
/// // The right half of the last two tokens.
/// let part = q.tokens(2..4)?.channels(128..256)?;
/// assert_eq!((part.num_tokens(), part.hidden(), part.scales_to_vec()?), (2, 128, vec![6.0, 8.0]));
/// assert_eq!(part.to_f32_vec()?[..2], [9.0, 9.0]);
/// assert_eq!(Input::from(part).hidden(), 128);
/// // Scales of another shape don't go with these data.
/// let wrong = Sf { tensor: sf.tensor(&[4, 2])?, layout: SfLayout::RowMajor };
/// assert!(QuantRef::new(data.tensor(&[4, 256])?, wrong, (1, 64)).is_err());
/// # Ok::<(), ferrotile::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QuantRef<'a> {
    data: TensorRef<'a>,
    sf: Sf<'a>,
    spec: QuantSpec,
}

/// A quantised tensor that an op writes, from [`QuantTensor::view_mut`] or from parts.
#[derive(Debug, PartialEq)]
pub struct QuantMut<'a> {
    data: TensorMut<'a>,
    sf: SfMut<'a>,
    spec: QuantSpec,
}

/// Checks that belong to both.
fn new_spec(op: &'static str, data: &View, layout: SfLayout, block: (u32, u32)) -> Result<(QuantSpec, u64)> {
    check::rank(op, "data", data, 2)?;
    check::dtype(op, "data", data, &[DType::E4m3, DType::E2m1x2, DType::U8])?;
    check::last_stride_1(op, "data", data)?;
    let format = QuantFormat::of(data.dtype()).unwrap_or(QuantFormat::E4m3);
    check::divisible(op, "columns of data", data.dim(1), format.bytes_together())?;
    let spec = QuantSpec { format, block, layout };
    let hidden = channels_of(format, data);
    spec.check(op, hidden)?;
    Ok((spec, hidden))
}

/// Channels of a data tensor.
fn channels_of(format: QuantFormat, data: &View) -> u64 {
    (data.dim(1) / format.bytes_together()).saturating_mul(format.channels_together())
}

impl<'a> QuantRef<'a> {
    /// Data, e4m3 `(T, H)`, e2m1x2 `(T, H / 2)` or the u8 stream of e5m6 `(T, 3 * H / 2)`, and a scale for each `block = (npt, npc)`.
    /// Rows may lie any distance apart.
    ///
    /// # Errors
    /// [`Error::Shape`] and [`Error::DType`] when data and scales do not belong together, [`Error::Layout`] for strides,
    /// [`Error::Value`] for a block of size 0 or per-channel packed scales of wider blocks, [`Error::DeviceMismatch`].
    pub fn new(data: TensorRef<'a>, sf: Sf<'a>, block: (u32, u32)) -> Result<Self> {
        let op = "QuantRef::new";
        let (spec, hidden) = new_spec(op, &data, sf.layout, block)?;
        sf.check(op, "sf", LAYOUTS, spec.blocks(data.dim(0), hidden))?;
        check::on_device(op, data.device(), "sf", sf.tensor.device())?;
        Ok(Self { data, sf, spec })
    }

    /// The values without their scales.
    pub fn data(&self) -> TensorRef<'a> {
        self.data
    }

    /// The scale factors.
    pub fn sf(&self) -> Sf<'a> {
        self.sf
    }

    /// How the tensor is quantised.
    pub fn spec(&self) -> QuantSpec {
        self.spec
    }

    /// Rows.
    pub fn num_tokens(&self) -> u64 {
        self.data.dim(0)
    }

    /// Channels of a row.
    pub fn hidden(&self) -> u64 {
        channels_of(self.spec.format, &self.data)
    }

    /// Device that holds the memory.
    pub fn device(&self) -> &Device {
        self.data.device()
    }

    /// The tokens of a range, as a view. It starts at a scaling block, per-channel packed at one whose number is a multiple of four,
    /// and ends at one or with the tensor; if all tokens share their scales, anywhere.
    ///
    /// # Errors
    /// [`Error::Value`] for another range.
    pub fn tokens(&self, range: Range<u64>) -> Result<QuantRef<'a>> {
        let part = Part::of_tokens("QuantRef::tokens", self, range, Access::Read)?;
        Ok(self.part(part))
    }

    /// The channels of a range, as a view. It starts at a scaling block, packed along channels at one whose number is a multiple of four,
    /// and ends at one or with the tensor; if all channels share a scale, between any that are not stored together.
    ///
    /// # Errors
    /// [`Error::Value`] for another range.
    pub fn channels(&self, range: Range<u64>) -> Result<QuantRef<'a>> {
        let part = Part::of_channels("QuantRef::channels", self, range, Access::Read)?;
        Ok(self.part(part))
    }

    fn part(&self, part: Part) -> QuantRef<'a> {
        // The views lie within those that they are parts of.
        QuantRef {
            data: TensorRef::new(part.data),
            sf: Sf { tensor: TensorRef::new(part.sf), layout: self.sf.layout },
            spec: part.spec,
        }
    }

    /// Dequantise into bf16 or f32 `(T, H)`: [`cast_back`](cast_back::cast_back()) or
    /// [`cast_back_e5m6`](cast_back_e5m6::cast_back_e5m6()). Asynchronous; allocates nothing.
    ///
    /// # Errors
    /// Those of the op.
    pub fn cast_back(&self, stream: &Stream, out: TensorMut<'_>) -> Result<()> {
        let Self { data: x, sf, spec: QuantSpec { format, block, .. } } = *self;
        match format {
            QuantFormat::E4m3 | QuantFormat::E2m1 => cast_back::cast_back(stream, cast_back::Args { x, sf, block, out }),
            QuantFormat::E5m6 => cast_back_e5m6::cast_back_e5m6(stream, cast_back_e5m6::Args { x, sf, block, out }),
        }
    }

    /// A copy of the data, row by row. Waits for everything that runs on the device.
    ///
    /// # Errors
    /// [`Error::Driver`], also for a kernel launched earlier that failed.
    pub fn data_to_vec(&self) -> Result<Vec<u8>> {
        let bytes = download("QuantRef::data_to_vec", &self.data)?;
        let (rows, columns) = (self.data.dim(0) as usize, self.data.dim(1) as usize);
        let mut out = Vec::with_capacity(rows * columns);
        for row in 0..if columns == 0 { 0 } else { rows } {
            let start = row * if rows == 1 { 0 } else { self.data.stride(0) as usize };
            out.extend_from_slice(&bytes[start..start + columns]);
        }
        Ok(out)
    }

    /// The scale factors as f32, one for each scaling block, block row by block row, whatever the layout. Waits for everything that
    /// runs on the device.
    ///
    /// # Errors
    /// [`Error::Driver`], also for a kernel launched earlier that failed.
    pub fn scales_to_vec(&self) -> Result<Vec<f32>> {
        let bytes = download("QuantRef::scales_to_vec", &self.sf.tensor)?;
        let (rows, columns) = self.spec.blocks(self.num_tokens(), self.hidden());
        let t = &self.sf.tensor;
        let strides = [0, 1].map(|i| if t.dim(i) == 1 { 0 } else { t.stride(i) as usize });
        let mut out = Vec::with_capacity((rows * columns) as usize);
        for m in 0..if t.is_empty() { 0 } else { rows as usize } {
            out.extend((0..columns as usize).map(|k| decode_scale(&bytes, self.sf.layout, strides, (m, k))));
        }
        Ok(out)
    }

    /// The values that the tensor stands for, `data * scale` in f32, row by row. On the host, for tests and tools; waits for everything
    /// that runs on the device.
    ///
    /// # Errors
    /// [`Error::Driver`], also for a kernel launched earlier that failed.
    pub fn to_f32_vec(&self) -> Result<Vec<f32>> {
        let (data, scales) = (self.data_to_vec()?, self.scales_to_vec()?);
        let (npt, npc) = (self.spec.block.0 as usize, self.spec.block.1 as usize);
        let columns = self.hidden().div_ceil(npc as u64) as usize;
        let mut out = Vec::with_capacity((self.num_tokens() * self.hidden()) as usize);
        for (token, row) in data.chunks_exact((self.data.dim(1) as usize).max(1)).enumerate() {
            let scales = &scales[token / npt * columns..];
            out.extend(self.spec.format.decode(row).iter().enumerate().map(|(c, q)| q * scales[c / npc]));
        }
        Ok(out)
    }

    /// A copy of the scale factors in another layout, by [`convert_sf`](convert_sf::convert_sf()). Together with the same data they are the
    /// same tensor: `QuantRef::new(q.data(), scales.sf(), q.spec().block)`. Allocates. Asynchronous where the layout can hold whatever this
    /// one can, as f32 can everything; waits for the stream otherwise, to know that it did.
    ///
    /// # Errors
    /// [`Error::Value`] when a scale cannot be held: packed layouts hold powers of two, e4m3 ones what e4m3 can hold, and the per-channel
    /// layout is for blocks of one channel. [`Error::DeviceMismatch`], [`Error::OutOfMemory`], [`Error::Driver`].
    pub fn scales_in(&self, stream: &Stream, layout: SfLayout) -> Result<Scales> {
        let op = "QuantRef::scales_in";
        check_per_channel(op, self.spec.block, layout)?;
        let size = (self.num_tokens(), self.hidden());
        let mut out = Scales::alloc(op, self.device(), size, self.spec.block, layout)?;
        let mut convert = |bad| {
            let num_blocks = self.spec.blocks(size.0, size.1);
            convert_sf::convert_sf(stream, convert_sf::Args { sf: self.sf, num_blocks, out: out.sf_mut(), bad })
        };
        if !layout.is_packed() && !layout.is_e4m3() || layout.dtype() == self.spec.layout.dtype() {
            convert(None)?;
            return Ok(out);
        }
        let mut bad = self.device().upload(&[0i32])?;
        convert(Some(bad.tensor_mut(&[1])?))?;
        stream.synchronize()?;
        if bad.to_vec()? != [0] {
            self.scales_to_vec()?.iter().try_for_each(|scale| check_scale(op, *scale, layout))?;
        }
        Ok(out)
    }
}

impl<'a> From<QuantRef<'a>> for Input<'a> {
    fn from(q: QuantRef<'a>) -> Self {
        Input::Quantised { data: q.data, sf: q.sf, block: q.spec.block }
    }
}

impl<'a> From<&'a QuantTensor> for Input<'a> {
    fn from(q: &'a QuantTensor) -> Self {
        q.view().into()
    }
}

impl<'a> From<TensorRef<'a>> for Input<'a> {
    fn from(x: TensorRef<'a>) -> Self {
        Input::Plain(x)
    }
}

impl<'a> QuantMut<'a> {
    /// As [`QuantRef::new`], of tensors that may be written. Columns of column-major scales start at multiples of 16 bytes.
    ///
    /// # Errors
    /// Those of [`QuantRef::new`], and [`Error::Overlap`].
    pub fn new(data: TensorMut<'a>, sf: SfMut<'a>, block: (u32, u32)) -> Result<Self> {
        let op = "QuantMut::new";
        let (spec, hidden) = new_spec(op, &data, sf.layout, block)?;
        sf.check(op, "sf", LAYOUTS, spec.blocks(data.dim(0), hidden))?;
        check::on_device(op, data.device(), "sf", sf.tensor.device())?;
        check::no_overlap(op, ("data", &data), ("sf", &sf.tensor))?;
        Ok(Self { data, sf, spec })
    }

    /// The same tensor for reading.
    pub fn as_ref(&self) -> QuantRef<'_> {
        let sf = Sf { tensor: self.sf.tensor.as_ref(), layout: self.sf.layout };
        QuantRef { data: self.data.as_ref(), sf, spec: self.spec }
    }

    /// The same tensor for a shorter time, to pass it on and keep it.
    pub fn reborrow(&mut self) -> QuantMut<'_> {
        let sf = SfMut { tensor: self.sf.tensor.reborrow(), layout: self.sf.layout };
        QuantMut { data: self.data.reborrow(), sf, spec: self.spec }
    }

    /// Data and scale factors, for the arguments of an op that writes both.
    pub fn into_parts(self) -> (TensorMut<'a>, SfMut<'a>) {
        (self.data, self.sf)
    }

    /// Quantise `x` into this tensor, by the op that makes blocks of this kind:
    ///
    /// | block | op |
    /// |---|---|
    /// | one token | [`per_token_cast`](per_token_cast::per_token_cast()); for e5m6, which has one scale a token, [`per_token_cast_to_e5m6`](per_token_cast_to_e5m6::per_token_cast_to_e5m6()) |
    /// | one channel | [`per_channel_cast`](per_channel_cast::per_channel_cast()) |
    /// | several of both | [`per_block_cast`](per_block_cast::per_block_cast()) |
    ///
    /// `round_sf` makes every scale a power of two. Asynchronous; allocates nothing.
    ///
    /// # Errors
    /// Those of the op; [`Error::Unsupported`] for a quantised `x` where the op takes none.
    pub fn quantise<'x>(self, stream: &Stream, x: impl Into<Input<'x>>, round_sf: bool) -> Result<()> {
        let QuantSpec { format, block, .. } = self.spec;
        let (npt, npc) = block;
        let (out, sf) = self.into_parts();
        match (format, x.into()) {
            (QuantFormat::E5m6, Input::Plain(x)) => {
                per_token_cast_to_e5m6::per_token_cast_to_e5m6(stream, per_token_cast_to_e5m6::Args { x, round_sf, out, sf })
            }
            (QuantFormat::E4m3 | QuantFormat::E2m1, x) if npt == 1 => {
                per_token_cast::per_token_cast(stream, per_token_cast::Args { x, npc, round_sf, stochastic: false, out, sf })
            }
            (QuantFormat::E4m3 | QuantFormat::E2m1, x) if npc == 1 => {
                per_channel_cast::per_channel_cast(stream, per_channel_cast::Args { x, npt, round_sf, out, sf })
            }
            (QuantFormat::E4m3 | QuantFormat::E2m1, Input::Plain(x)) => {
                per_block_cast::per_block_cast(stream, per_block_cast::Args { x, block, round_sf, out, sf })
            }
            (_, Input::Quantised { .. }) => {
                let what = format!("no op casts a quantised tensor to {format} in blocks of {npt}x{npc}; dequantise it first");
                Err(Error::Unsupported { op: "QuantMut::quantise", what })
            }
        }
    }

    /// How the tensor is quantised.
    pub fn spec(&self) -> QuantSpec {
        self.spec
    }

    /// The tokens of a range, as a view: as [`QuantRef::tokens`], but the end too is one that a word of packed scales does not reach
    /// across, and columns of column-major scales start at multiples of 16 bytes.
    ///
    /// # Errors
    /// [`Error::Value`] for another range.
    pub fn tokens(self, range: Range<u64>) -> Result<QuantMut<'a>> {
        let part = Part::of_tokens("QuantMut::tokens", &self.as_ref(), range, Access::Write)?;
        self.part(part)
    }

    /// The channels of a range, as a view: as [`QuantRef::channels`], but the end too is one that a word of packed scales does not
    /// reach across.
    ///
    /// # Errors
    /// [`Error::Value`] for another range.
    pub fn channels(self, range: Range<u64>) -> Result<QuantMut<'a>> {
        let part = Part::of_channels("QuantMut::channels", &self.as_ref(), range, Access::Write)?;
        self.part(part)
    }

    fn part(self, part: Part) -> Result<QuantMut<'a>> {
        // The views lie within those that they are parts of, which this call has consumed.
        let tensor = |view| TensorMut::new("QuantMut", view);
        let sf = SfMut { tensor: tensor(part.sf)?, layout: self.sf.layout };
        Ok(QuantMut { data: tensor(part.data)?, sf, spec: part.spec })
    }
}

/// Whether a part of a tensor is to be written.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Access {
    Read,
    Write,
}

/// Where a part of a tensor is.
struct Part {
    data: View,
    sf: View,
    spec: QuantSpec,
}

impl Part {
    fn of_tokens(op: &'static str, q: &QuantRef<'_>, range: Range<u64>, access: Access) -> Result<Self> {
        let (all, spec) = (q.num_tokens(), q.spec);
        let npt = spec.block.0 as u64;
        // Block rows of a word.
        let word = if spec.layout == SfLayout::PerChannelPacked { 4 } else { 1 };
        // Columns of column-major outputs start at multiples of 16 bytes.
        let aligned = if spec.layout.is_col_major() { 16 / spec.layout.dtype().size() } else { 1 };
        let units = match access {
            _ if npt >= all => [1, 1],
            Access::Read => [word * npt, npt],
            Access::Write => [word * aligned * npt, word * npt],
        };
        check_range(op, &range, all, units)?;
        let length = range.end - range.start;
        let first_row = if npt >= all { 0 } else { range.start / npt / word };
        let sf_rows = spec.layout.rows(length.div_ceil(npt));
        Ok(Self { data: slice(op, &q.data, 0, range.start, length)?, sf: slice(op, &q.sf.tensor, 0, first_row, sf_rows)?, spec })
    }

    fn of_channels(op: &'static str, q: &QuantRef<'_>, range: Range<u64>, access: Access) -> Result<Self> {
        let (all, mut spec) = (q.hidden(), q.spec);
        let npc = spec.block.1 as u64;
        let together = spec.format.channels_together();
        // Block columns of a word.
        let word = if matches!(spec.layout, SfLayout::ColMajorPacked | SfLayout::RowMajorPacked) { 4 } else { 1 };
        let (whole, end) = (least_common_multiple(word * npc, together), least_common_multiple(npc, together));
        let units = match access {
            _ if npc >= all => [together, together],
            Access::Read => [whole, end],
            Access::Write => [whole, whole],
        };
        check_range(op, &range, all, units)?;
        let length = range.end - range.start;
        let first_column = if npc >= all { 0 } else { range.start / npc / word };
        let sf_columns = spec.layout.columns(length.div_ceil(npc));
        if npc >= all && length > 0 {
            // One scale a row, of fewer channels now.
            spec.block.1 = length as u32;
        }
        let bytes = |channels: u64| channels / together * spec.format.bytes_together();
        Ok(Self {
            data: slice(op, &q.data, 1, bytes(range.start), bytes(length))?,
            sf: slice(op, &q.sf.tensor, 1, first_column, sf_columns)?,
            spec,
        })
    }
}

/// Of two numbers that are not 0, the second at most 8.
fn least_common_multiple(a: u64, b: u64) -> u64 {
    (1..=b).map(|factor| a * factor).find(|multiple| multiple.is_multiple_of(b)).unwrap_or(a * b)
}

/// The range lies in `0..all`, starts at a multiple of the first unit and ends at one of the second or at `all`.
fn check_range(op: &'static str, range: &Range<u64>, all: u64, [start, end]: [u64; 2]) -> Result<()> {
    let ends_well = range.end == all || range.end.is_multiple_of(end);
    if range.start <= range.end && range.end <= all && range.start.is_multiple_of(start) && ends_well {
        return Ok(());
    }
    let allowed = format!("ranges in 0..{all} from a multiple of {start} to a multiple of {end} or to {all}");
    Err(Error::Value { op, arg: "range", allowed, got: format!("{range:?}") })
}

/// `length` elements of a dimension from `start` on.
fn slice(op: &'static str, view: &View, dim: usize, start: u64, length: u64) -> Result<View> {
    let mut shape = [view.dim(0), view.dim(1)];
    shape[dim] = length;
    let strides = [view.stride(0), view.stride(1)];
    // An empty part may lie anywhere; the address of the first element beyond the end might not be one.
    let offset = if shape.contains(&0) { 0 } else { start * strides[dim] * view.dtype().size() };
    View::new(op, *view.device(), view.ptr() + offset, view.dtype(), &shape, &strides)
}

/// The bytes from the first to the last element.
fn download(op: &'static str, view: &View) -> Result<Vec<u8>> {
    let len = view.span_bytes() as usize;
    let mut bytes = vec![0u8; len];
    // SAFETY: both sides have that many bytes; whoever made the view has said that they may be read.
    unsafe {
        match view.device().backend {
            Backend::Emulator(_) => emu::download(bytes.as_mut_ptr(), view.ptr(), len),
            Backend::Cuda(context) => context.download(op, bytes.as_mut_ptr(), view.ptr(), len)?,
        }
    }
    Ok(bytes)
}

/// Where the scale of block row `m` and block column `k` is: offset and number of its bytes.
fn scale_place(layout: SfLayout, [row, column]: [usize; 2], (m, k): (usize, usize)) -> (usize, usize) {
    match layout {
        SfLayout::RowMajor | SfLayout::ColMajor => ((m * row + k * column) * 4, 4),
        SfLayout::ColMajorPacked | SfLayout::RowMajorPacked => ((m * row + k / 4 * column) * 4 + k % 4, 1),
        SfLayout::PerChannelPacked => ((m / 4 * row + k * column) * 4 + m % 4, 1),
        SfLayout::RowMajorE4m3 | SfLayout::ColMajorE4m3 => (m * row + k * column, 1),
    }
}

fn decode_scale(bytes: &[u8], layout: SfLayout, strides: [usize; 2], at: (usize, usize)) -> f32 {
    let (start, len) = scale_place(layout, strides, at);
    match (&bytes[start..start + len], layout.is_packed()) {
        (&[exponent], true) => f32::from_bits((exponent as u32) << 23),
        (&[code], false) => num::e4m3_to_f32(code),
        (word, _) => f32::from_bits(word.iter().rev().fold(0, |bits, byte| bits << 8 | *byte as u32)),
    }
}

/// The layout can hold this scale.
fn check_scale(op: &'static str, scale: f32, layout: SfLayout) -> Result<()> {
    let bits = scale.to_bits();
    let fits = match (layout.is_packed(), layout.is_e4m3()) {
        (true, _) => bits & 0x807F_FFFF == 0,
        (_, true) => num::e4m3_to_f32(num::f32_to_e4m3(scale)).to_bits() == bits || scale.is_nan(),
        _ => true,
    };
    if fits {
        return Ok(());
    }
    let allowed = format!("{} in {layout} scales", if layout.is_packed() { "powers of two" } else { "e4m3 values" });
    Err(Error::Value { op, arg: "scale", allowed, got: format!("{scale:e}") })
}

/// Owned scale factors of a tensor.
#[derive(Debug)]
pub struct Scales {
    bytes: Buffer<u8>,
    /// All of them; a view that may be written.
    view: View,
    layout: SfLayout,
}

impl Scales {
    fn alloc(
        op: &'static str,
        device: &Device,
        (num_tokens, hidden): (u64, u64),
        block: (u32, u32),
        layout: SfLayout,
    ) -> Result<Self> {
        let shape = sf_shape(num_tokens, hidden, block, layout);
        let bytes = shape.elements.saturating_mul(shape.dtype.size());
        Self::new(op, Buffer::alloc(op, device, usize::try_from(bytes).unwrap_or(usize::MAX))?, shape, layout)
    }

    /// In a buffer that has room for them.
    fn new(op: &'static str, bytes: Buffer<u8>, shape: SfShape, layout: SfLayout) -> Result<Self> {
        let view = View::new(op, *bytes.device(), bytes.as_ptr(), shape.dtype, &shape.shape, &shape.strides)?;
        TensorMut::new(op, view)?;
        Ok(Self { bytes, view, layout })
    }

    /// From one f32 for each scaling block.
    fn upload(
        op: &'static str,
        device: &Device,
        scales: &[f32],
        (num_tokens, hidden): (u64, u64),
        block: (u32, u32),
        layout: SfLayout,
    ) -> Result<Self> {
        let mut out = Self::alloc(op, device, (num_tokens, hidden), block, layout)?;
        let columns = hidden.div_ceil(block.1.into()) as usize;
        let mut bytes = vec![0u8; out.bytes.len()];
        let strides = [0, 1].map(|i| out.view.stride(i) as usize);
        for (i, scale) in scales.iter().enumerate() {
            let (start, len) = scale_place(layout, strides, (i / columns, i % columns));
            let (bits, code) = (scale.to_bits(), num::f32_to_e4m3(*scale));
            check_scale(op, *scale, layout)?;
            let word = match (layout.is_packed(), layout.is_e4m3()) {
                (true, _) => bits >> 23,
                (_, true) => code.into(),
                _ => bits,
            };
            bytes[start..start + len].copy_from_slice(&word.to_le_bytes()[..len]);
        }
        out.bytes.copy_from(&bytes)?;
        Ok(out)
    }

    /// How they are stored.
    pub fn layout(&self) -> SfLayout {
        self.layout
    }

    /// For an op that reads them.
    pub fn sf(&self) -> Sf<'_> {
        Sf { tensor: TensorRef::new(self.view), layout: self.layout }
    }

    /// For an op that writes them.
    pub fn sf_mut(&mut self) -> SfMut<'_> {
        SfMut { tensor: TensorMut::of_own(self.view), layout: self.layout }
    }
}

/// Quantised values and their scale factors in memory of their own.
///
/// ```
/// use ferrotile::Device;
/// use ferrotile::quant::{QuantFormat, QuantSpec, QuantTensor, SfLayout};
///
/// let device = Device::emulator();
/// let stream = device.stream()?;
/// // A weight of 256 by 128 values, quantised as DeepSeek's checkpoints are.
/// let w = device.upload(&vec![0.25f32; 256 * 128])?;
/// let spec = QuantSpec { format: QuantFormat::E4m3, block: (128, 128), layout: SfLayout::RowMajor };
/// let mut q = QuantTensor::alloc(&device, spec, 256, 128)?;
/// q.quantise(&stream, w.tensor(&[256, 128])?, true)?;
/// assert_eq!(q.scales_to_vec()?, [2f32.powi(-10); 2]);
///
/// // Scales as TMA and the tensor cores of newer GPUs want them; the data stay where they are.
/// let q = q.into_layout(&stream, SfLayout::ColMajorPacked)?;
/// let mut back = device.alloc::<f32>(128 * 128)?;
/// q.tokens(128..256)?.cast_back(&stream, back.tensor_mut(&[128, 128])?)?;
/// assert_eq!(back.to_vec()?, vec![0.25; 128 * 128]);
///
/// // Where an op reads a quantised tensor it takes this one whole: here to finer blocks.
/// let finer = QuantSpec { block: (1, 32), layout: SfLayout::ColMajorPacked, ..spec };
/// let mut fine = QuantTensor::alloc(&device, finer, 256, 128)?;
/// fine.quantise(&stream, &q, true)?;
/// assert_eq!(fine.to_f32_vec()?, q.to_f32_vec()?);
/// # Ok::<(), ferrotile::Error>(())
/// ```
#[derive(Debug)]
pub struct QuantTensor {
    data: Buffer<u8>,
    /// All of the data; a view that may be written.
    data_view: View,
    sf: Scales,
    spec: QuantSpec,
    hidden: u64,
}

impl QuantTensor {
    /// Memory for `num_tokens` rows of `hidden` channels, with arbitrary contents.
    ///
    /// # Errors
    /// [`Error::Value`] for a block of size 0, a number of channels that the format cannot store, and per-channel packed scales of wider
    /// blocks; [`Error::OutOfMemory`], [`Error::Driver`].
    pub fn alloc(device: &Device, spec: QuantSpec, num_tokens: u64, hidden: u64) -> Result<Self> {
        let op = "QuantTensor::alloc";
        spec.check(op, hidden)?;
        let sf = Scales::alloc(op, device, (num_tokens, hidden), spec.block, spec.layout)?;
        Self::with_scales(op, device, sf, spec, (num_tokens, hidden))
    }

    /// A copy of data, row by row, and of one f32 for each scaling block, block row by block row: what checkpoints hold. Synchronises.
    ///
    /// # Errors
    /// [`Error::Shape`] when there are not as many data or scales as the sizes say, those of [`alloc`](Self::alloc), and
    /// [`Error::Value`] when the layout cannot hold a scale.
    ///
    /// ```
    /// use ferrotile::Device;
    /// use ferrotile::quant::{QuantFormat, QuantSpec, QuantTensor, SfLayout};
    ///
    /// let spec = QuantSpec { format: QuantFormat::E2m1, block: (1, 32), layout: SfLayout::RowMajorPacked };
    /// // One token of 64 channels: 1 and -0.5 in turn, with scales of 1 and 4.
    /// let q = QuantTensor::from_host(&Device::emulator(), spec, 1, 64, &[0x92; 32], &[1.0, 4.0])?;
    /// let values = q.to_f32_vec()?;
    /// assert_eq!((values[0], values[1], values[62], values[63]), (1.0, -0.5, 4.0, -2.0));
    /// // No exponent byte stands for 3.
    /// assert!(QuantTensor::from_host(&Device::emulator(), spec, 1, 64, &[0x92; 32], &[1.0, 3.0]).is_err());
    /// # Ok::<(), ferrotile::Error>(())
    /// ```
    pub fn from_host(
        device: &Device,
        spec: QuantSpec,
        num_tokens: u64,
        hidden: u64,
        data: &[u8],
        scales: &[f32],
    ) -> Result<Self> {
        let op = "QuantTensor::from_host";
        spec.check(op, hidden)?;
        let (rows, columns) = spec.blocks(num_tokens, hidden);
        let [_, bytes] = spec.data_shape(num_tokens, hidden);
        for (arg, got, [a, b]) in [("data", data.len(), [num_tokens, bytes]), ("scales", scales.len(), [rows, columns])] {
            if a.checked_mul(b) != Some(got as u64) {
                return Err(Error::Shape { op, arg, expected: format!("[{a} * {b}]"), got: format!("[{got}]") });
            }
        }
        let scales = Scales::upload(op, device, scales, (num_tokens, hidden), spec.block, spec.layout)?;
        let mut q = Self::with_scales(op, device, scales, spec, (num_tokens, hidden))?;
        q.data.copy_from(data)?;
        Ok(q)
    }

    /// The buffers of data and scale factors, of the sizes that [`QuantSpec::data_shape`] and [`QuantSpec::sf_shape`] say or larger.
    ///
    /// # Errors
    /// [`Error::DType`] when the elements are not those of the spec, [`Error::Shape`] for buffers that are too small,
    /// [`Error::DeviceMismatch`], [`Error::Value`] as for [`alloc`](Self::alloc).
    pub fn from_buffers<D: Element, S: Element>(
        spec: QuantSpec,
        num_tokens: u64,
        hidden: u64,
        data: Buffer<D>,
        sf: Buffer<S>,
    ) -> Result<Self> {
        let op = "QuantTensor::from_buffers";
        spec.check(op, hidden)?;
        let shape = spec.sf_shape(num_tokens, hidden);
        for (arg, got, expected) in [("data", D::DTYPE, spec.format.dtype()), ("sf", S::DTYPE, shape.dtype)] {
            if got != expected {
                return Err(Error::DType { op, arg, allowed: expected.to_string(), got });
            }
        }
        check::on_device(op, data.device(), "sf", sf.device())?;
        let [rows, columns] = spec.data_shape(num_tokens, hidden);
        for (arg, got, needed) in [("data", data.len(), rows.checked_mul(columns)), ("sf", sf.len(), Some(shape.elements))] {
            if needed.is_none_or(|needed| needed > got as u64) {
                let expected = needed.map_or("more than 2^64".to_owned(), |n| format!("at least [{n}]"));
                return Err(Error::Shape { op, arg, expected, got: format!("[{got}]") });
            }
        }
        let sf = Scales::new(op, sf.into_bytes(), shape, spec.layout)?;
        Self::new(op, data.into_bytes(), sf, spec, (num_tokens, hidden))
    }

    /// With newly allocated data.
    fn with_scales(
        op: &'static str,
        device: &Device,
        sf: Scales,
        spec: QuantSpec,
        (num_tokens, hidden): (u64, u64),
    ) -> Result<Self> {
        let [rows, columns] = spec.data_shape(num_tokens, hidden);
        let bytes = rows.checked_mul(columns).and_then(|bytes| usize::try_from(bytes).ok()).unwrap_or(usize::MAX);
        Self::new(op, Buffer::alloc(op, device, bytes)?, sf, spec, (num_tokens, hidden))
    }

    /// In a buffer that has room for the data.
    fn new(op: &'static str, data: Buffer<u8>, sf: Scales, spec: QuantSpec, (num_tokens, hidden): (u64, u64)) -> Result<Self> {
        let [rows, columns] = spec.data_shape(num_tokens, hidden);
        let strides = [columns.max(1), 1];
        let data_view = View::new(op, *data.device(), data.as_ptr(), spec.format.dtype(), &[rows, columns], &strides)?;
        Ok(Self { data, data_view, sf, spec, hidden })
    }

    /// The tensor for reading.
    pub fn view(&self) -> QuantRef<'_> {
        QuantRef { data: TensorRef::new(self.data_view), sf: self.sf.sf(), spec: self.spec }
    }

    /// The tensor for writing.
    pub fn view_mut(&mut self) -> QuantMut<'_> {
        QuantMut { data: TensorMut::of_own(self.data_view), sf: self.sf.sf_mut(), spec: self.spec }
    }

    /// How the tensor is quantised.
    pub fn spec(&self) -> QuantSpec {
        self.spec
    }

    /// Rows.
    pub fn num_tokens(&self) -> u64 {
        self.data_view.dim(0)
    }

    /// Channels of a row.
    pub fn hidden(&self) -> u64 {
        self.hidden
    }

    /// Device that holds the memory.
    pub fn device(&self) -> &Device {
        self.data.device()
    }

    /// Bytes of data and scale factors, with the padding of column-major layouts.
    pub fn bytes(&self) -> u64 {
        self.data.len() as u64 + self.sf.bytes.len() as u64
    }

    /// The same tensor with its scale factors in another layout, see [`QuantRef::scales_in`]. The data are not copied. The former scale
    /// factors are freed, which waits for what reads them.
    ///
    /// # Errors
    /// Those of [`QuantRef::scales_in`].
    pub fn into_layout(self, stream: &Stream, layout: SfLayout) -> Result<Self> {
        if layout == self.spec.layout {
            return Ok(self);
        }
        let sf = self.view().scales_in(stream, layout)?;
        Ok(Self { sf, spec: QuantSpec { layout, ..self.spec }, ..self })
    }

    /// See [`QuantRef::tokens`].
    ///
    /// # Errors
    /// Those of [`QuantRef::tokens`].
    pub fn tokens(&self, range: Range<u64>) -> Result<QuantRef<'_>> {
        self.view().tokens(range)
    }

    /// See [`QuantRef::channels`].
    ///
    /// # Errors
    /// Those of [`QuantRef::channels`].
    pub fn channels(&self, range: Range<u64>) -> Result<QuantRef<'_>> {
        self.view().channels(range)
    }

    /// See [`QuantMut::quantise`].
    ///
    /// # Errors
    /// Those of [`QuantMut::quantise`].
    pub fn quantise<'x>(&mut self, stream: &Stream, x: impl Into<Input<'x>>, round_sf: bool) -> Result<()> {
        self.view_mut().quantise(stream, x, round_sf)
    }

    /// See [`QuantRef::cast_back`].
    ///
    /// # Errors
    /// Those of the op.
    pub fn cast_back(&self, stream: &Stream, out: TensorMut<'_>) -> Result<()> {
        self.view().cast_back(stream, out)
    }

    /// See [`QuantRef::data_to_vec`].
    ///
    /// # Errors
    /// [`Error::Driver`], also for a kernel launched earlier that failed.
    pub fn data_to_vec(&self) -> Result<Vec<u8>> {
        self.view().data_to_vec()
    }

    /// See [`QuantRef::scales_to_vec`].
    ///
    /// # Errors
    /// [`Error::Driver`], also for a kernel launched earlier that failed.
    pub fn scales_to_vec(&self) -> Result<Vec<f32>> {
        self.view().scales_to_vec()
    }

    /// See [`QuantRef::to_f32_vec`].
    ///
    /// # Errors
    /// [`Error::Driver`], also for a kernel launched earlier that failed.
    pub fn to_f32_vec(&self) -> Result<Vec<f32>> {
        self.view().to_f32_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{E4m3, Ue8m0x4};

    const DEVICE: Device = Device::emulator();

    /// Layouts that can hold the scales of a block.
    fn layouts(block: (u32, u32)) -> impl Iterator<Item = SfLayout> {
        LAYOUTS.iter().copied().filter(move |layout| *layout != SfLayout::PerChannelPacked || block.1 == 1)
    }

    /// Powers of two that every layout can hold, and any codes.
    fn tensor(spec: QuantSpec, num_tokens: u64, hidden: u64) -> QuantTensor {
        let (rows, columns) = spec.blocks(num_tokens, hidden);
        let scales: Vec<f32> = (0..rows * columns).map(|i| 2f32.powi((i * 7 % 13) as i32 - 6)).collect();
        let [rows, bytes] = spec.data_shape(num_tokens, hidden);
        let data: Vec<u8> = (0..rows * bytes).map(|i| (i * 37 % 120) as u8).collect();
        QuantTensor::from_host(&DEVICE, spec, num_tokens, hidden, &data, &scales).unwrap()
    }

    const FORMATS: [QuantFormat; 3] = [QuantFormat::E4m3, QuantFormat::E2m1, QuantFormat::E5m6];

    #[test]
    fn values_do_not_depend_on_the_layout() {
        let stream = DEVICE.stream().unwrap();
        for (format, block) in FORMATS.iter().flat_map(|f| [(1, 16), (3, 8), (2, 1), (1, 40), (100, 200)].map(|b| (*f, b))) {
            let spec = |layout| QuantSpec { format, block, layout };
            let plain = tensor(spec(SfLayout::RowMajor), 7, 40);
            let (values, scales, data) =
                (plain.to_f32_vec().unwrap(), plain.scales_to_vec().unwrap(), plain.data_to_vec().unwrap());
            assert_eq!(values.len(), 7 * 40);
            for from in layouts(block) {
                for to in layouts(block) {
                    let q = tensor(spec(from), 7, 40).into_layout(&stream, to).unwrap();
                    assert_eq!((q.spec().layout, q.view().sf().layout), (to, to));
                    assert_eq!(q.scales_to_vec().unwrap(), scales, "{format} {block:?} {from} {to}");
                    assert_eq!(q.to_f32_vec().unwrap(), values);
                    assert_eq!(q.data_to_vec().unwrap(), data);
                    // What the type made itself passes the checks for the parts of others.
                    QuantRef::new(q.view().data(), q.view().sf(), block).unwrap();
                }
            }
        }
    }

    #[test]
    fn dequantising_on_the_device_gives_the_same_values() {
        let stream = DEVICE.stream().unwrap();
        for format in FORMATS {
            for block in [(1, 16), (3, 32), (2, 1), (1, 64)] {
                // No op reads other blocks and layouts of e5m6.
                let e5m6 = format == QuantFormat::E5m6;
                for layout in layouts(block).filter(|l| !e5m6 || block.1 > 1 && SfLayout::COMMON.contains(l)) {
                    let q = tensor(QuantSpec { format, block, layout }, 6, 64);
                    let mut out = DEVICE.zeros::<f32>(6 * 64).unwrap();
                    q.cast_back(&stream, out.tensor_mut(&[6, 64]).unwrap()).unwrap();
                    assert_eq!(out.to_vec().unwrap(), q.to_f32_vec().unwrap(), "{}", q.spec());
                }
            }
        }
    }

    #[test]
    fn every_kind_of_block_is_quantised_by_its_op() {
        let stream = DEVICE.stream().unwrap();
        let values: Vec<f32> = (0..64 * 128).map(|i| ((i * 37 % 113) as f32 - 56.0) / 8.0).collect();
        let x = DEVICE.upload(&values).unwrap();
        for (format, block, layout, worst) in [
            (QuantFormat::E4m3, (1, 128), SfLayout::ColMajorPacked, 0.07),
            (QuantFormat::E4m3, (32, 1), SfLayout::PerChannelPacked, 0.07),
            (QuantFormat::E4m3, (32, 32), SfLayout::RowMajorPacked, 0.07),
            (QuantFormat::E2m1, (1, 16), SfLayout::RowMajorPacked, 0.5),
            (QuantFormat::E5m6, (1, 128), SfLayout::RowMajor, 0.008),
        ] {
            let mut q = QuantTensor::alloc(&DEVICE, QuantSpec { format, block, layout }, 64, 128).unwrap();
            q.quantise(&stream, x.tensor(&[64, 128]).unwrap(), true).unwrap();
            let close = |(a, b): (&f32, &f32)| (a - b).abs() <= worst * b.abs().max(1.0);
            assert!(q.to_f32_vec().unwrap().iter().zip(&values).all(close), "{}", q.spec());
            // A part by itself has the same bytes.
            let mut part = QuantTensor::alloc(&DEVICE, q.spec(), 64, 128).unwrap();
            for tokens in [0..32, 32..64] {
                let x = x.strided(&[32, 128], &[128, 1], tokens.start * 128).unwrap();
                // Words of four block rows do not end there.
                if layout != SfLayout::PerChannelPacked {
                    part.view_mut().tokens(tokens).unwrap().quantise(&stream, x, true).unwrap();
                }
            }
            assert!(layout == SfLayout::PerChannelPacked || part.to_f32_vec().unwrap() == q.to_f32_vec().unwrap());
        }
        let spec = QuantSpec { format: QuantFormat::E4m3, block: (32, 32), layout: SfLayout::RowMajor };
        let (q, mut to) = (tensor(spec, 64, 128), QuantTensor::alloc(&DEVICE, spec, 64, 128).unwrap());
        assert!(matches!(to.quantise(&stream, &q, false), Err(Error::Unsupported { .. })));
    }

    /// Every range is either refused or a view with the values of the whole, for reading and for writing.
    #[test]
    fn parts_have_the_values_of_the_whole() {
        let mut taken = [0; 2];
        for (format, block) in FORMATS.iter().flat_map(|f| [(1, 8), (2, 16), (2, 1), (1, 48), (9, 48)].map(|b| (*f, b))) {
            for layout in layouts(block) {
                let (tokens, hidden) = (9, 48);
                let mut q = tensor(QuantSpec { format, block, layout }, tokens, hidden);
                let all = q.to_f32_vec().unwrap();
                for (start, end) in (0..=9).flat_map(|start| (start..=9).map(move |end| (start, end))) {
                    let expected = &all[(start * hidden) as usize..(end * hidden) as usize];
                    if let Ok(part) = q.tokens(start..end) {
                        assert_eq!((part.num_tokens(), part.hidden()), (end - start, hidden));
                        assert_eq!(part.to_f32_vec().unwrap(), expected, "{} {start}..{end}", q.spec());
                        QuantRef::new(part.data(), part.sf(), part.spec().block).unwrap();
                        taken[0] += 1;
                    }
                    if let Ok(part) = q.view_mut().tokens(start..end) {
                        assert_eq!(part.as_ref().to_f32_vec().unwrap(), expected);
                        let block = part.spec().block;
                        let (data, sf) = part.into_parts();
                        QuantMut::new(data, sf, block).unwrap();
                    }
                }
                for (start, end) in (0..=48).flat_map(|start| (start..=48).map(move |end| (start, end))) {
                    let columns = start as usize..end as usize;
                    let expected: Vec<f32> = all.chunks(48).flat_map(|row| row[columns.clone()].to_vec()).collect();
                    if let Ok(part) = q.channels(start..end) {
                        assert_eq!((part.num_tokens(), part.hidden()), (tokens, end - start));
                        assert_eq!(part.to_f32_vec().unwrap(), expected, "{} {start}..{end}", q.spec());
                        QuantRef::new(part.data(), part.sf(), part.spec().block).unwrap();
                        taken[1] += 1;
                    }
                    if let Ok(part) = q.view_mut().channels(start..end) {
                        assert_eq!(part.as_ref().to_f32_vec().unwrap(), expected);
                        let block = part.spec().block;
                        let (data, sf) = part.into_parts();
                        QuantMut::new(data, sf, block).unwrap();
                    }
                }
            }
        }
        assert!(taken.iter().all(|n| *n > 1000), "{taken:?}");
    }

    #[test]
    fn ranges_that_are_no_views_are_refused() {
        let text = |result: Result<QuantRef<'_>>| result.unwrap_err().to_string();
        let spec = QuantSpec { format: QuantFormat::E4m3, block: (128, 32), layout: SfLayout::ColMajorPacked };
        let mut q = tensor(spec, 300, 256);
        assert_eq!(
            text(q.tokens(64..256)),
            "QuantRef::tokens: range is 64..256, allowed: ranges in 0..300 from a multiple of 128 to a multiple of 128 or to 300"
        );
        assert_eq!(
            text(q.channels(32..64)),
            "QuantRef::channels: range is 32..64, allowed: ranges in 0..256 from a multiple of 128 to a multiple of 32 or to 256"
        );
        q.channels(128..160).unwrap();
        // The last word of a written part would reach into its neighbour, and its columns would not be aligned.
        assert!(q.view_mut().channels(128..160).is_err());
        assert!(q.view_mut().tokens(128..256).is_err());
        q.view_mut().tokens(0..256).unwrap();
        let backwards = Range { start: 128, end: 0 };
        for wrong in [0..301, 256..384, backwards, u64::MAX..u64::MAX] {
            assert!(matches!(q.tokens(wrong), Err(Error::Value { arg: "range", .. })));
        }
        assert_eq!(q.tokens(128..128).unwrap().to_f32_vec().unwrap(), []);
        let per_channel = QuantSpec { format: QuantFormat::E2m1, block: (32, 1), layout: SfLayout::PerChannelPacked };
        let q = tensor(per_channel, 300, 8);
        q.tokens(128..160).unwrap();
        assert!(q.tokens(32..160).is_err() && q.channels(1..3).is_err());
        q.channels(2..4).unwrap();
    }

    #[test]
    fn empty_tensors_are_fine() {
        let stream = DEVICE.stream().unwrap();
        for (tokens, hidden) in [(0, 64), (5, 0), (0, 0)] {
            for format in FORMATS {
                for layout in layouts((1, 32)) {
                    let q = tensor(QuantSpec { format, block: (1, 32), layout }, tokens, hidden);
                    assert_eq!((q.num_tokens(), q.hidden()), (tokens, hidden));
                    assert_eq!((q.to_f32_vec().unwrap().len(), q.scales_to_vec().unwrap().len()), (0, 0));
                    q.tokens(0..tokens).unwrap().channels(0..hidden).unwrap();
                    q.into_layout(&stream, SfLayout::RowMajor).unwrap();
                }
            }
        }
    }

    #[test]
    fn parts_that_do_not_belong_together_are_refused() {
        let data = DEVICE.zeros::<E4m3>(512).unwrap();
        let (mut sf, words) = (DEVICE.zeros::<f32>(64).unwrap(), DEVICE.zeros::<Ue8m0x4>(64).unwrap());
        let elsewhere = DEVICE.checked().zeros::<f32>(64).unwrap();
        let x = data.tensor(&[4, 128]).unwrap();
        let row_major = |tensor| Sf { tensor, layout: SfLayout::RowMajor };
        let fine = row_major(sf.tensor(&[4, 4]).unwrap());
        QuantRef::new(x, fine, (1, 32)).unwrap();
        let refused = |x, sf, block| QuantRef::new(x, sf, block).unwrap_err();
        assert!(matches!(refused(x, fine, (1, 64)), Error::Shape { arg: "sf", .. }));
        assert!(matches!(refused(x, fine, (0, 32)), Error::Value { arg: "npt", .. }));
        assert!(matches!(refused(x, fine, (1, 0)), Error::Value { arg: "npc", .. }));
        assert!(matches!(refused(data.tensor(&[512]).unwrap(), fine, (1, 32)), Error::Shape { arg: "data", .. }));
        assert!(matches!(refused(fine.tensor, fine, (1, 32)), Error::DType { arg: "data", .. }));
        assert!(matches!(
            refused(data.strided(&[4, 128], &[1, 4], 0).unwrap(), fine, (1, 32)),
            Error::Layout { arg: "data", .. }
        ));
        assert!(matches!(refused(x, row_major(words.tensor(&[4, 4]).unwrap()), (1, 32)), Error::DType { arg: "sf", .. }));
        let away = row_major(elsewhere.tensor(&[4, 4]).unwrap());
        assert!(matches!(refused(x, away, (1, 32)), Error::DeviceMismatch { arg: "sf", .. }));
        let per_channel = Sf { tensor: words.tensor(&[1, 4]).unwrap(), layout: SfLayout::PerChannelPacked };
        assert!(matches!(refused(x, per_channel, (1, 32)), Error::Value { arg: "npc", .. }));
        let bytes = data.tensor(&[4, 128]).unwrap().reinterpret(DType::U8).unwrap();
        assert!(matches!(refused(bytes, fine, (1, 32)), Error::Value { arg: "columns of data", .. }));
        // SAFETY: nothing reads or writes these overlapping tensors.
        let on_sf = unsafe { TensorMut::from_raw(&DEVICE, sf.as_ptr(), DType::E4m3, &[1, 128], &[128, 1]).unwrap() };
        let out = SfMut { tensor: sf.tensor_mut(&[1, 4]).unwrap(), layout: SfLayout::RowMajor };
        assert!(matches!(QuantMut::new(on_sf, out, (1, 32)), Err(Error::Overlap { a: "data", b: "sf", .. })));
    }

    #[test]
    fn memory_that_does_not_fit_is_refused() {
        let spec = |format, block, layout| QuantSpec { format, block, layout };
        let e4m3 = spec(QuantFormat::E4m3, (1, 128), SfLayout::RowMajor);
        let host = |data: &[u8], scales: &[f32]| QuantTensor::from_host(&DEVICE, e4m3, 2, 256, data, scales).unwrap_err();
        assert_eq!(host(&[0; 511], &[0.0; 4]).to_string(), "QuantTensor::from_host: data has shape [511], expected [2 * 256]");
        assert!(matches!(host(&[0; 512], &[0.0; 5]), Error::Shape { arg: "scales", .. }));
        for (bad, arg) in [
            (spec(QuantFormat::E2m1, (1, 32), SfLayout::RowMajor), "hidden"),
            (spec(QuantFormat::E5m6, (1, 31), SfLayout::RowMajor), "hidden"),
            (spec(QuantFormat::E4m3, (1, 32), SfLayout::PerChannelPacked), "npc"),
            (spec(QuantFormat::E4m3, (0, 32), SfLayout::RowMajor), "npt"),
        ] {
            let error = QuantTensor::alloc(&DEVICE, bad, 4, 31).unwrap_err();
            assert!(matches!(error, Error::Value { op: "QuantTensor::alloc", arg: got, .. } if got == arg), "{error}");
        }
        assert!(matches!(QuantTensor::alloc(&DEVICE, e4m3, 1 << 40, 1 << 40), Err(Error::OutOfMemory { .. })));

        let buffers = |data: usize, sf: usize| {
            QuantTensor::from_buffers(e4m3, 2, 256, DEVICE.zeros::<E4m3>(data).unwrap(), DEVICE.zeros::<f32>(sf).unwrap())
        };
        assert_eq!(buffers(600, 4).unwrap().to_f32_vec().unwrap(), [0.0; 512]);
        assert!(matches!(buffers(511, 4), Err(Error::Shape { arg: "data", .. })));
        assert!(matches!(buffers(512, 3), Err(Error::Shape { arg: "sf", .. })));
        let wrong = QuantTensor::from_buffers(e4m3, 2, 256, DEVICE.zeros::<u8>(512).unwrap(), DEVICE.zeros::<f32>(4).unwrap());
        assert!(matches!(wrong, Err(Error::DType { arg: "data", .. })));
    }

    #[test]
    fn scales_that_a_layout_cannot_hold_are_refused() {
        let stream = DEVICE.stream().unwrap();
        let spec = QuantSpec { format: QuantFormat::E4m3, block: (1, 32), layout: SfLayout::RowMajor };
        let q = |scale| QuantTensor::from_host(&DEVICE, spec, 1, 32, &[0x38; 32], &[scale]).unwrap();
        assert_eq!(
            q(3.0).into_layout(&stream, SfLayout::ColMajorPacked).unwrap_err().to_string(),
            "QuantRef::scales_in: scale is 3e0, allowed: powers of two in col-major packed scales"
        );
        assert!(matches!(q(-2.0).into_layout(&stream, SfLayout::RowMajorPacked), Err(Error::Value { arg: "scale", .. })));
        assert!(matches!(q(1.03).into_layout(&stream, SfLayout::RowMajorE4m3), Err(Error::Value { arg: "scale", .. })));
        assert!(matches!(q(1.0).into_layout(&stream, SfLayout::PerChannelPacked), Err(Error::Value { arg: "npc", .. })));
        for (scale, layout) in
            [(0.0, SfLayout::ColMajorPacked), (f32::INFINITY, SfLayout::RowMajorPacked), (3.0, SfLayout::ColMajorE4m3)]
        {
            assert_eq!(q(scale).into_layout(&stream, layout).unwrap().scales_to_vec().unwrap(), [scale]);
        }
    }
}
