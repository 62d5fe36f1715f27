//! Launcher of `per_channel_cast`, and what the other casts with a scale for each channel share with it.

use super::{Input, SfLayout, SfMut, SfStrides};
use crate::{DType, Error, Result, Stream, TensorMut, TensorRef, View, check};
use ferrotile_kernels::device::In;
use ferrotile_kernels::launch::LaunchConfig;
use ferrotile_kernels::quant::per_channel_cast::{self as k, Element, Order, Shape};

/// Arguments of [`per_channel_cast`].
#[derive(Debug)]
pub struct Args<'a> {
    /// bf16 or f32 `(T, H)`, or an e4m3 tensor with scales for blocks of `(1, 16)`, `(1, 32)`, `(1, 64)` or `(1, 128)`; rows may lie
    /// any distance apart.
    pub x: Input<'a>,
    /// Tokens of a channel that share a scale: 32 or 128.
    pub npt: u32,
    /// Make every scale a power of two. The packed layout needs it.
    pub round_sf: bool,
    /// Quantised values: e4m3 `(T, H)`, contiguous.
    pub out: TensorMut<'a>,
    /// Scale factors, [`RowMajor`](SfLayout::RowMajor) or [`PerChannelPacked`](SfLayout::PerChannelPacked), see
    /// [`sf_shape`](super::sf_shape) with the block `(npt, 1)`.
    pub sf: SfMut<'a>,
}

/// Quantise to e4m3 with one scale factor for each channel of `npt` tokens, as the operands of a weight gradient are.
///
/// | tensor | dtype | shape | layout |
/// |---|---|---|---|
/// | `x` | bf16, f32, or e4m3 with scales | `(T, H)` | last stride 1, any row stride |
/// | scales of `x` | f32, or ue8m0x4 in a packed layout | `(T, K)`, or `(T, ceil(K / 4))`, with `K = ceil(H / npc)` | [`SfLayout::COMMON`] |
/// | `out` | e4m3 | `(T, H)` | contiguous |
/// | `sf` | f32, or ue8m0x4 | `(M, H)`, or `(ceil(M / 4), H)`, with `M = ceil(T / npt)` | last stride 1, any row stride |
///
/// With `amax` the largest magnitude of a block of one channel and `c = max(amax, 1e-4)`: `sf = c / 448` and `q = x * (448 / c)`; with
/// `round_sf`, `sf` is the smallest power of two that is not below `c / 448` and `q = x / sf`. Of a quantised input, `x` is `data * scale`, rounded
/// to f32. Each step is one f32 operation; `q` is rounded to nearest even and saturates. The last block has the tokens there are
/// (`T % npt != 0`). The sign of zero is kept. NaN does not count for a scale and becomes `0x7F`. An infinite value makes the scale of
/// its block infinite (exponent byte 255) and the block's data meaningless: what `x * 0` gives, with `round_sf` `x * -inf`
/// ([`swiglu_forward_and_per_channel_cast_and_transpose`](super::swiglu_forward_and_per_channel_cast_and_transpose()) saturates instead).
/// Bytes of a packed word whose blocks do not exist are written as 0. Source: the specification's sections 2, 3, 5.4 and 6.6; `T`, `H` and
/// the alignment may be any here.
///
/// Asynchronous; allocates nothing; an empty `x` launches nothing. It is fast when `H % 8 == 0`, rows of `x` start at multiples of 16 bytes
/// (8 for e4m3) and `out` at one of 8.
///
/// # Errors
/// [`Shape`](Error::Shape) when shapes do not belong together, [`DType`](Error::DType), [`Layout`](Error::Layout) for strides, alignment to an
/// element and layouts of scales, [`Value`](Error::Value) for `npt`, the input's block, packed scales that are not rounded, or sizes beyond
/// 31 bits, [`DeviceMismatch`](Error::DeviceMismatch), [`Overlap`](Error::Overlap) of an output with another argument,
/// [`Driver`](Error::Driver). The outputs are untouched then.
///
/// ```
/// use ferrotile::quant::{Input, SfLayout, SfMut, per_channel_cast, sf_shape};
/// use ferrotile::{Device, E4m3};
///
/// let device = Device::emulator();
/// // 40 tokens of 8 channels: two blocks of each channel.
/// let mut x = vec![0.5f32; 40 * 8];
/// x[39 * 8 + 7] = 448.0;
/// let x = device.upload(&x)?;
/// let layout = sf_shape(40, 8, (32, 1), SfLayout::RowMajor);
/// let (mut out, mut sf) = (device.alloc::<E4m3>(40 * 8)?, device.alloc::<f32>(layout.elements as usize)?);
/// per_channel_cast::per_channel_cast(
///     &device.stream()?,
///     per_channel_cast::Args {
///         x: Input::Plain(x.tensor(&[40, 8])?),
///         npt: 32,
///         round_sf: true,
///         out: out.tensor_mut(&[40, 8])?,
///         sf: SfMut { tensor: sf.tensor_mut(&layout.shape)?, layout: SfLayout::RowMajor },
///     },
/// )?;
/// // 0.5 / 448 rounded up to a power of two, and 448 / 448.
/// let sf = sf.to_vec()?;
/// assert_eq!([sf[7], sf[14], sf[15]], [2f32.powi(-9), 2f32.powi(-9), 1.0]);
/// // 0.5 * 2^9 = 256; in the last block 0.5 and the largest value.
/// let out = out.to_vec()?;
/// assert_eq!([out[7].0, out[32 * 8 + 7].0, out[39 * 8 + 7].0], [0x78, 0x30, 0x7E]);
/// # Ok::<(), ferrotile::Error>(())
/// ```
pub fn per_channel_cast(stream: &Stream, args: Args<'_>) -> Result<()> {
    let op = "per_channel_cast";
    let plan = Plan::new(op, &args.x)?;
    let scales = Scales::check(op, args.npt, args.round_sf, &args.sf, (plan.num_rows.into(), plan.hidden.into()))?;
    let wide = plan.check_out(op, &args.out, plan.num_rows)?;
    plan.check_apart(op, stream, &[("out", &args.out), ("sf", &args.sf.tensor)])?;
    if args.out.is_empty() {
        return Ok(());
    }
    plan.launch(op, stream, wide, scales, &args.out, &args.sf)
}

/// What the checks of the input found out.
pub(super) struct Plan<'a> {
    x: Input<'a>,
    pub num_rows: u32,
    pub hidden: u32,
    pub stride: u32,
    pub element: Element,
    /// Where the scales of a quantised input are, and the logarithm of the channels that share one.
    pub x_sf: SfStrides,
    pub x_shift: u32,
    pub x_packed: bool,
}

impl<'a> Plan<'a> {
    pub fn new(op: &'static str, x: &Input<'a>) -> Result<Self> {
        let data = x.data();
        check::rank(op, "x", &data, 2)?;
        let plain = matches!(x, Input::Plain(_));
        check::dtype(op, "x", &data, if plain { &[DType::Bf16, DType::F32] } else { &[DType::E4m3] })?;
        let (num_rows, hidden) = (data.dim(0), data.dim(1));
        // Kernels count rows and channels, rounded up to tiles, with 32 bits.
        check::in_range(op, "num_tokens", num_rows, 0, i32::MAX as u64)?;
        check::in_range(op, "hidden", hidden, 0, i32::MAX as u64)?;
        check::last_stride_1(op, "x", &data)?;
        check::aligned(op, "x", &data, data.dtype().size())?;
        let stride = if num_rows <= 1 { 0 } else { check::fits_u32(op, "row stride of x", data.stride(0))? };
        let mut plan = Self {
            x: *x,
            num_rows: num_rows as u32,
            hidden: hidden as u32,
            stride,
            element: match data.dtype() {
                DType::Bf16 => Element::Bf16,
                DType::F32 => Element::F32,
                _ => Element::E4m3,
            },
            x_sf: SfStrides::default(),
            x_shift: 0,
            x_packed: false,
        };
        if let Input::Quantised { sf, block, .. } = x {
            check::one_of(op, "npt of the input's block", block.0, &[1])?;
            check::one_of(op, "npc of the input's block", block.1, &[16, 32, 64, 128])?;
            plan.x_sf = sf.check(op, "x_sf", SfLayout::COMMON, (num_rows, hidden.div_ceil(block.1.into())))?;
            plan.x_shift = block.1.trailing_zeros();
            plan.x_packed = sf.layout.is_packed();
        }
        Ok(plan)
    }

    /// Whether rows of `x` are whole numbers of aligned vectors.
    pub fn is_wide(&self) -> bool {
        let data = self.x.data();
        let (bytes, channels) = match self.element {
            Element::Bf16 => (16, 8),
            Element::F32 => (16, 4),
            Element::E4m3 => (8, 8),
        };
        // Kernels for whole vectors count the bytes from row to row with 32 bits.
        let pitch = self.stride as u64 * data.dtype().size();
        let fits = pitch.is_multiple_of(bytes) && pitch <= u32::MAX as u64;
        self.hidden.is_multiple_of(channels) && data.ptr().is_multiple_of(bytes) && fits
    }

    /// Checks the quantised values of `rows` rows; whether wide accesses will do for input and output.
    pub fn check_out(&self, op: &'static str, out: &View, rows: u32) -> Result<bool> {
        check::whole(op, "out", out, DType::E4m3, &[rows.into(), self.hidden.into()])?;
        let bytes = if self.element == Element::F32 { 4 } else { 8 };
        Ok(self.is_wide() && out.ptr().is_multiple_of(bytes))
    }

    /// The tensor of data.
    pub fn data(&self) -> TensorRef<'a> {
        self.x.data()
    }

    /// Scales of the input for the kernel; nothing if it has none.
    pub fn x_sf_input(&self) -> In<u8> {
        match &self.x {
            Input::Plain(_) => In::null(),
            Input::Quantised { sf, .. } => sf.tensor.input(),
        }
    }

    /// All tensors are on the stream's device, and no output overlaps the input or another output.
    pub fn check_apart(&self, op: &'static str, stream: &Stream, outputs: &[(&'static str, &View)]) -> Result<()> {
        let data = self.data();
        let x: (&str, &View) = ("x", &data);
        // Plain input is listed twice instead, which changes nothing.
        let x_sf = match &self.x {
            Input::Plain(_) => x,
            Input::Quantised { sf, .. } => ("x_sf", &*sf.tensor),
        };
        check::same_device(op, stream, &[x, x_sf])?;
        check::same_device(op, stream, outputs)?;
        check::no_overlaps(op, &[x, x_sf], outputs)
    }

    /// Launch of `per_channel_cast` itself. There are rows and channels.
    pub fn launch(
        &self,
        op: &'static str,
        stream: &Stream,
        wide: bool,
        scales: Scales,
        out: &TensorMut<'_>,
        sf: &SfMut<'_>,
    ) -> Result<()> {
        use k::cast as e;
        let few = k::bf16_tiles(self.num_rows, self.hidden) <= stream.device().num_sms().into();
        let (entry, shape) = match (self.element, self.x_packed, wide) {
            (Element::Bf16, _, true) if few => (&e::bf16_few, k::BF16_FEW_SHAPE),
            (Element::Bf16, _, true) => (&e::bf16, k::BF16_SHAPE),
            (Element::Bf16, _, false) => (&e::bf16_narrow, k::NARROW_SHAPE),
            (Element::F32, _, true) => (&e::f32, k::F32_SHAPE),
            (Element::F32, _, false) => (&e::f32_narrow, k::NARROW_F32_SHAPE),
            (Element::E4m3, false, true) => (&e::e4m3_f32, k::E4M3_SHAPE),
            (Element::E4m3, false, false) => (&e::e4m3_f32_narrow, k::NARROW_SHAPE),
            (Element::E4m3, true, true) => (&e::e4m3_ue8m0, k::E4M3_PACKED_SHAPE),
            (Element::E4m3, true, false) => (&e::e4m3_ue8m0_narrow, k::NARROW_SHAPE),
        };
        // Whole rows of tiles: neighbours share DRAM pages.
        let order = Order::new(self.hidden, shape.0, u32::MAX);
        let config = self.config(op, shape, self.num_rows, order)?;
        let kernel_args = k::cast::Args {
            x: self.data().input(),
            x_sf: self.x_sf_input(),
            out: out.output(),
            sf: sf.tensor.output(),
            t: self.num_rows,
            h: self.hidden,
            x_stride: self.stride,
            x_sf_row: self.x_sf.row,
            x_sf_col: self.x_sf.col,
            x_shift: self.x_shift,
            sf_stride: scales.stride,
            units: scales.units,
            round: scales.round,
            packed: scales.packed,
            width: order.width,
            magic: order.divisor.magic,
            shift: order.divisor.shift,
        };
        stream.launch(op, entry, &config, &kernel_args)
    }

    /// Grid and block for `rows` rows of output.
    pub fn config(&self, op: &'static str, shape: Shape, rows: u32, order: Order) -> Result<LaunchConfig> {
        k::config(self.element, shape, rows, self.hidden, order).ok_or_else(|| too_many_tiles(op, rows))
    }
}

/// The error for a launch of 2^31 blocks.
pub(super) fn too_many_tiles(op: &'static str, rows: u32) -> Error {
    let allowed = "fewer than 2^31 tiles of 128 tokens by 32 channels".to_owned();
    Error::Value { op, arg: "num_tokens", allowed, got: rows.to_string() }
}

/// How scales are made and stored, as kernels take it.
#[derive(Clone, Copy)]
pub(super) struct Scales {
    pub units: u32,
    pub round: u32,
    pub packed: u32,
    pub stride: u32,
}

impl Scales {
    /// Checks the scales of `rows` tokens by `columns` channels in blocks of `(npt, 1)`.
    pub fn check(op: &'static str, npt: u32, round_sf: bool, sf: &SfMut<'_>, (rows, columns): (u64, u64)) -> Result<Self> {
        check::one_of(op, "npt", npt, &[32, 128])?;
        if sf.layout.is_packed() && !round_sf {
            let allowed = format!("true with {} scales", sf.layout);
            return Err(Error::Value { op, arg: "round_sf", allowed, got: "false".to_owned() });
        }
        let allowed = [SfLayout::RowMajor, SfLayout::PerChannelPacked];
        let strides = sf.check(op, "sf", &allowed, (rows.div_ceil(npt.into()), columns))?;
        let packed = sf.layout.is_packed().into();
        Ok(Self { units: npt / 32, round: round_sf.into(), packed, stride: strides.row })
    }
}
