//! norm_forward: root mean square norm of rows, with an optional residual.

use crate::{DType, Error, Result, Stream, TensorMut, TensorRef, View, check};
use ferrotile_kernels::device::{In, Out};
use ferrotile_kernels::launch::LaunchConfig;
use ferrotile_kernels::quant::norm_forward as k;

const OP: &str = "norm_forward";

/// Arguments of [`norm_forward`].
#[derive(Debug)]
pub struct Args<'a> {
    /// bf16 or f32 `(T, H)` or `(B, T, H)`, last stride 1.
    pub x: TensorRef<'a>,
    /// What is added to `x` before: of its type and shape, last stride 1.
    pub residual: Option<TensorRef<'a>>,
    /// A factor for each channel, `(H,)` of the type of `x`, contiguous.
    pub weight: Option<TensorRef<'a>>,
    /// What is added to the mean square, not negative.
    pub eps: f32,
    /// A factor for everything; 1 in most models.
    pub out_scale: f32,
    /// The norm, of the type and shape of `x`, contiguous.
    pub out: TensorMut<'a>,
    /// `x + residual`, of the type and shape of `x`, contiguous. Only with a residual: otherwise it would be `x` itself.
    pub residual_out: Option<TensorMut<'a>>,
    /// The reciprocal root mean square of each row, f32 `(T,)` or `(B, T)`, contiguous. The backward pass wants it.
    pub rstd: Option<TensorMut<'a>>,
}

/// Root mean square norm of each row: `u = x + residual`, `rstd = 1 / sqrt(mean(u^2) + eps)`, `out = (u * rstd) * (weight * out_scale)`.
///
/// | tensor | dtype | shape | layout |
/// |---|---|---|---|
/// | `x`, `residual` | bf16 or f32 | `(T, H)` or `(B, T, H)` | last stride 1, any other strides |
/// | `weight` | that of `x` | `(H,)` | contiguous |
/// | `out`, `residual_out` | that of `x` | that of `x` | contiguous |
/// | `rstd` | f32 | `(T,)` or `(B, T)` | contiguous |
///
/// `u` is rounded to the type of `x`, once; everything else is f32 arithmetic in the order written here, and `out` is rounded to the type
/// of `x` at the end. The sum of squares has a fixed order that depends on `H` and the type only, so results are the same bits whatever
/// else is in the call; `rstd` uses the GPU's approximate reciprocal root (22 bits; the emulator's is correctly rounded, so a value of
/// `out` may differ by one code). A row with a NaN, or with an infinity and its opposite in `residual`, becomes NaN in `out`, with NaN as
/// `rstd`. A row with another infinity, or whose squares exceed the range of f32, has `rstd` 0: finite values become zeros of their sign,
/// infinities NaN. Source: the specification's section 6.10.
///
/// Asynchronous; allocates nothing; an empty `x` launches nothing. Any `H` works and any alignment; it is fast when rows are whole numbers of
/// 16-byte words that start at multiples of 16 bytes, up to 16384 channels in bf16 and 8192 in f32. Longer rows are read twice, the second
/// time from L2.
///
/// # Errors
/// [`Shape`](Error::Shape), [`DType`](Error::DType) and [`Layout`](Error::Layout) when a tensor is not as in the table,
/// [`Value`](Error::Value) for an `eps` that is negative or no number, no channels, 2^31 or more of them or of rows, or a
/// `residual_out` without a residual, [`DeviceMismatch`](Error::DeviceMismatch), [`Overlap`](Error::Overlap) of an output with another
/// argument, [`Driver`](Error::Driver). The outputs are untouched then.
///
/// ```
/// use ferrotile::quant::norm_forward::{Args, norm_forward};
///
/// let device = ferrotile::Device::emulator();
/// let (x, residual) = (device.upload(&[1.0f32, 2.0, 3.0, 4.0])?, device.upload(&[2.0f32, -2.0, 1.0, 0.0])?);
/// let weight = device.upload(&[1.0f32, 2.0])?;
/// let (mut out, mut sum, mut rstd) = (device.alloc::<f32>(4)?, device.alloc::<f32>(4)?, device.alloc::<f32>(2)?);
/// let args = Args {
///     x: x.tensor(&[2, 2])?,
///     residual: Some(residual.tensor(&[2, 2])?),
///     weight: Some(weight.tensor(&[2])?),
///     eps: 0.0,
///     out_scale: 1.0,
///     out: out.tensor_mut(&[2, 2])?,
///     residual_out: Some(sum.tensor_mut(&[2, 2])?),
///     rstd: Some(rstd.tensor_mut(&[2])?),
/// };
/// norm_forward(&device.stream()?, args)?;
/// assert_eq!(sum.to_vec()?, [3.0, 0.0, 4.0, 4.0]);
/// // The root mean square of the second row is 4.
/// assert_eq!((rstd.to_vec()?[1], &out.to_vec()?[2..]), (0.25, &[1.0, 2.0][..]));
/// # Ok::<(), ferrotile::Error>(())
/// ```
pub fn norm_forward(stream: &Stream, args: Args<'_>) -> Result<()> {
    let norm = Norm {
        x: &args.x,
        residual: args.residual.as_deref(),
        weight: args.weight.as_deref(),
        eps: args.eps,
        residual_out: args.residual_out.as_deref(),
        rstd: args.rstd.as_deref(),
    };
    let rows = norm.check(OP)?;
    norm.check_like_x(OP, "out", &args.out)?;
    norm.check_memory(OP, stream, &[("out", Some(&args.out))])?;
    if args.x.is_empty() {
        return Ok(());
    }
    let way = rows.way(args.out.ptr().is_multiple_of(16));
    let config = rows.config();
    // Two kernels take the same arguments.
    macro_rules! launch {
        ($kernel:ident, $entry:expr) => {{
            let kernel_args = k::$kernel::Args {
                x: args.x.input(),
                residual: input(norm.residual),
                weight: input(norm.weight),
                out: args.out.output(),
                residual_out: output(norm.residual_out),
                rstd: output(norm.rstd),
                x_batch_stride: rows.x_strides.batch,
                x_stride: rows.x_strides.token,
                residual_batch_stride: rows.residual_strides.batch,
                residual_stride: rows.residual_strides.token,
                num_rows: rows.num_rows,
                hidden: rows.hidden,
                num_tokens: rows.num_tokens,
                tokens_magic: rows.by_tokens.magic,
                tokens_shift: rows.by_tokens.shift,
                lanes_log2: rows.lanes_log2(),
                parts: norm.parts(),
                inv_hidden: rows.inv_hidden(),
                eps: args.eps,
                out_scale: args.out_scale,
            };
            stream.launch(OP, $entry, &config, &kernel_args)
        }};
    }
    if way == Way::Held && config.num_blocks() <= stream.device().num_sms().into() {
        let entry = if rows.bf16 { &k::few_rows::bf16 } else { &k::few_rows::f32 };
        return launch!(few_rows, entry);
    }
    use k::rows as e;
    let entry = match (args.x.dtype(), way) {
        (DType::F32, Way::Held) => &e::f32,
        (DType::F32, Way::Long) => &e::f32_long,
        (DType::F32, Way::Narrow) => &e::f32_narrow,
        (_, Way::Held) => &e::bf16,
        (_, Way::Long) => &e::bf16_long,
        (_, Way::Narrow) => &e::bf16_narrow,
    };
    launch!(rows, entry)
}

/// The pointer of an input that may be absent.
pub(super) fn input<T>(t: Option<&View>) -> In<T> {
    t.map_or(In::null(), |t| t.input())
}

/// The pointer of an output that may be absent.
pub(super) fn output<T>(t: Option<&View>) -> Out<T> {
    t.map_or(Out::null(), |t| Out::new(t.ptr(), t.span_bytes()))
}

/// What all norms take, for the checks.
pub(super) struct Norm<'a> {
    pub x: &'a View,
    pub residual: Option<&'a View>,
    pub weight: Option<&'a View>,
    pub eps: f32,
    pub residual_out: Option<&'a View>,
    pub rstd: Option<&'a View>,
}

/// What the checks found out.
pub(super) struct Rows {
    pub num_rows: u32,
    pub hidden: u32,
    pub num_tokens: u32,
    pub by_tokens: k::Divisor,
    pub x_strides: k::Strides,
    pub residual_strides: k::Strides,
    bf16: bool,
    /// Whether rows of everything but the op's own outputs are whole numbers of aligned vectors.
    wide: bool,
}

/// Which entry takes rows like these.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Way {
    /// A row fits into the registers of a block.
    Held,
    /// It does not.
    Long,
    /// Channel by channel.
    Narrow,
}

impl Norm<'_> {
    /// Everything except for the op's own outputs.
    pub(super) fn check(&self, op: &'static str) -> Result<Rows> {
        let x = self.x;
        if x.rank() != 2 && x.rank() != 3 {
            let (expected, got) = ("2 or 3 dimensions".to_owned(), format!("{:?}", x.shape()));
            return Err(Error::Shape { op, arg: "x", expected, got });
        }
        check::dtype(op, "x", x, &[DType::Bf16, DType::F32])?;
        let last = x.rank() - 1;
        let hidden = x.dim(last);
        // Kernels count rows and channels, rounded up to blocks, with 32 bits.
        check::in_range(op, "hidden", hidden, 1, i32::MAX as u64)?;
        let num_rows = x.shape()[..last].iter().fold(1u64, |n, d| n.saturating_mul(*d));
        check::in_range(op, "num_tokens", num_rows, 0, i32::MAX as u64)?;
        self.check_input(op, "x", x)?;
        if let Some(residual) = self.residual {
            self.check_input(op, "residual", residual)?;
        }
        if let Some(weight) = self.weight {
            check::whole(op, "weight", weight, x.dtype(), &[hidden])?;
            check::aligned(op, "weight", weight, x.dtype().size())?;
        }
        if self.eps.is_nan() || self.eps < 0.0 || self.eps.is_infinite() {
            let allowed = "finite numbers from 0 on".to_owned();
            return Err(Error::Value { op, arg: "eps", allowed, got: self.eps.to_string() });
        }
        if let Some(sum) = self.residual_out {
            if self.residual.is_none() {
                let (allowed, got) = ("none without a residual".to_owned(), format!("{:?}", sum.shape()));
                return Err(Error::Value { op, arg: "residual_out", allowed, got });
            }
            self.check_like_x(op, "residual_out", sum)?;
        }
        if let Some(rstd) = self.rstd {
            check::whole(op, "rstd", rstd, DType::F32, &x.shape()[..last])?;
            check::aligned(op, "rstd", rstd, 4)?;
        }
        let num_tokens = x.dim(last - 1) as u32;
        let (x_strides, residual_strides) = (strides(x), self.residual.map_or(strides(x), strides));
        let bf16 = x.dtype() == DType::Bf16;
        let vector = 16 / x.dtype().size();
        let aligned = |t: &View| t.ptr().is_multiple_of(16);
        let whole = |s: k::Strides| s.batch.is_multiple_of(16) && s.token.is_multiple_of(16);
        let wide = hidden.is_multiple_of(vector)
            && [Some(x), self.residual, self.weight, self.residual_out].into_iter().flatten().all(aligned)
            && whole(x_strides)
            && whole(residual_strides);
        Ok(Rows {
            num_rows: num_rows as u32,
            hidden: hidden as u32,
            num_tokens,
            by_tokens: k::Divisor::new(num_tokens.max(1)),
            x_strides,
            residual_strides,
            bf16,
            wide,
        })
    }

    fn check_input(&self, op: &'static str, arg: &'static str, t: &View) -> Result<()> {
        check::dtype(op, arg, t, &[self.x.dtype()])?;
        check::shape(op, arg, t, self.x.shape())?;
        check::last_stride_1(op, arg, t)?;
        check::aligned(op, arg, t, t.dtype().size())
    }

    /// A contiguous output with the type and shape of `x`.
    pub(super) fn check_like_x(&self, op: &'static str, arg: &'static str, t: &View) -> Result<()> {
        check::whole(op, arg, t, self.x.dtype(), self.x.shape())?;
        check::aligned(op, arg, t, t.dtype().size())
    }

    /// Devices, and overlap; `more` are the op's own outputs, at most four.
    pub(super) fn check_memory(&self, op: &'static str, stream: &Stream, more: &[(&'static str, Option<&View>)]) -> Result<()> {
        // Absent tensors are skipped, so what is there lies without gaps.
        let inputs = [("residual", self.residual), ("weight", self.weight)];
        let outputs = [("residual_out", self.residual_out), ("rstd", self.rstd)];
        let mut tensors = [("x", self.x); 9];
        let mut all = 1;
        let mut first_output = 1;
        for (i, (name, t)) in inputs.iter().chain(&outputs).chain(more).enumerate() {
            if let Some(t) = t {
                tensors[all] = (*name, *t);
                all += 1;
            }
            if i + 1 == inputs.len() {
                first_output = all;
            }
        }
        check::same_device(op, stream, &tensors[..all])?;
        check::no_overlaps(op, &tensors[..first_output], &tensors[first_output..all])
    }

    /// The kernel's flags.
    pub(super) fn parts(&self) -> u32 {
        let flag = |present: bool, part: u32| if present { part } else { 0 };
        flag(self.residual.is_some(), k::RESIDUAL)
            | flag(self.weight.is_some(), k::WEIGHT)
            | flag(self.residual_out.is_some(), k::RESIDUAL_OUT)
            | flag(self.rstd.is_some(), k::RSTD)
    }
}

/// Strides of batches and tokens in bytes; those of dimensions of size 1 say nothing and are not used.
fn strides(t: &View) -> k::Strides {
    let stride = |i: usize| if t.is_empty() || t.dim(i) == 1 { 0 } else { t.stride(i) * t.dtype().size() };
    if t.rank() == 2 { k::Strides { batch: 0, token: stride(0) } } else { k::Strides { batch: stride(0), token: stride(1) } }
}

impl Rows {
    /// How to go about it, if the op's own outputs are `aligned` to vectors.
    pub(super) fn way(&self, aligned: bool) -> Way {
        let channels = if self.bf16 { 8 } else { 4 };
        if !self.wide || !aligned {
            Way::Narrow
        } else if self.hidden > k::MAX_THREADS * k::VECTORS as u32 * channels {
            Way::Long
        } else {
            Way::Held
        }
    }

    pub(super) fn lanes_log2(&self) -> u32 {
        if self.bf16 { k::lanes_log2::<k::Bf16>(self.hidden) } else { k::lanes_log2::<k::F32>(self.hidden) }
    }

    pub(super) fn inv_hidden(&self) -> f32 {
        1.0 / self.hidden as f32
    }

    pub(super) fn config(&self) -> LaunchConfig {
        if self.bf16 { k::config::<k::Bf16>(self.num_rows, self.hidden) } else { k::config::<k::F32>(self.num_rows, self.hidden) }
    }
}
