//! Launcher of `batched_transpose_weight_sf`.

use crate::{DType, Error, Result, Stream, TensorMut, TensorRef, View, check};
use ferrotile_kernels::device::{In, Out};
use ferrotile_kernels::launch::LaunchConfig;
use ferrotile_kernels::quant::batched_transpose_weight_sf as k;

/// The scales of one weight, and where their packed forms go. `n_s` and `k_s` count scaling blocks of `b` by `b` values, with `n = n_s * b`
/// and `k = k_s * b`.
#[derive(Debug)]
pub struct Weight<'a> {
    /// f32 `(n_s, k_s)` or `(G, n_s, k_s)`, contiguous: powers of two.
    pub sf: TensorRef<'a>,
    /// ue8m0x4 `(n, ceil(k_s / 4))` with strides `(1, n)`, or `(G, n, ceil(k_s / 4))` with `(ceil(k_s / 4) * n, 1, n)`.
    pub sf0: TensorMut<'a>,
    /// ue8m0x4 `(k, ceil(n_s / 4))` with strides `(1, k)`, or `(ceil(n_s / 4), k)` with `(k, 1)`, which is the same memory. With groups, `G`
    /// of them `ceil(n_s / 4) * k` apart.
    pub sf1: TensorMut<'a>,
}

/// Arguments of [`batched_transpose_weight_sf`].
#[derive(Debug)]
pub struct Args<'a> {
    /// The weights.
    pub weights: &'a [Weight<'a>],
    /// Side of a scaling block, `b`: 32 or 128.
    pub block_size: u32,
    /// i32, one for each weight: the number of its scales that are no powers of two is added. Zero it first.
    pub bad: Option<TensorMut<'a>>,
}

/// Power-of-two scales of many weights as packed exponents, one word for each row and one for each column of the weight: what GEMMs
/// read, with the weight as either operand.
///
/// With `e[i][j]` the exponent field of `sf[i][j]`, and 0 where there is no scale:
///
/// | output | word | byte `q` |
/// |---|---|---|
/// | `sf0` | `(r, p)` | `e[r / b][4 * p + q]` |
/// | `sf1` | `(c, p)` | `e[4 * p + q][c / b]` |
///
/// A scale with a sign or mantissa bits, NaN among them, is not refused: its exponent field is used, and it is counted in `bad`.
/// Infinity has the exponent field 255. Source: the specification's 6.12.
///
/// Asynchronous; allocates nothing, also on the device: the list travels in the kernel's parameters, so that the call can be
/// recorded in a graph. A launch takes 32 weights; more of them take more launches. An empty list launches nothing.
///
/// # Errors
/// [`Shape`](Error::Shape) when shapes do not belong together, [`DType`](Error::DType), [`Layout`](Error::Layout) for strides, and for
/// outputs that are not aligned to 16 bytes, [`Value`](Error::Value) for `block_size`, `n` or `k` that are no multiples of 128, or sizes
/// beyond 2^31 different words, [`DeviceMismatch`](Error::DeviceMismatch), [`Overlap`](Error::Overlap) of an output with another
/// argument, also of another weight, [`Driver`](Error::Driver). The outputs are untouched then. A text says which weight it is about.
///
/// ```
/// use ferrotile::quant::batched_transpose_weight_sf::{Args, Weight, batched_transpose_weight_sf};
/// use ferrotile::{Device, Ue8m0x4};
///
/// let device = Device::emulator();
/// // A weight of 256 by 128 values, with scales 2^0 and 2^3.
/// let sf = device.upload(&[1.0f32, 8.0])?;
/// let (mut sf0, mut sf1) = (device.alloc::<Ue8m0x4>(256)?, device.alloc::<Ue8m0x4>(128)?);
/// let weight = Weight {
///     sf: sf.tensor(&[2, 1])?,
///     sf0: sf0.strided_mut(&[256, 1], &[1, 256], 0)?,
///     sf1: sf1.strided_mut(&[128, 1], &[1, 128], 0)?,
/// };
/// batched_transpose_weight_sf(&device.stream()?, Args { weights: &[weight], block_size: 128, bad: None })?;
/// let (sf0, sf1) = (sf0.to_vec()?, sf1.to_vec()?);
/// assert_eq!([sf0[127], sf0[128]].map(|w| w.0.to_le_bytes()), [[127, 0, 0, 0], [130, 0, 0, 0]]);
/// assert_eq!(sf1[127].0.to_le_bytes(), [127, 130, 0, 0]);
/// # Ok::<(), ferrotile::Error>(())
/// ```
pub fn batched_transpose_weight_sf(stream: &Stream, args: Args<'_>) -> Result<()> {
    check::one_of(OP, "block_size", args.block_size, &[32, 128])?;
    for (i, weight) in args.weights.iter().enumerate() {
        check_weight(stream, weight, args.block_size.into()).map_err(|error| of_weight(error, i))?;
    }
    check_overlaps(&args)?;
    if let Some(bad) = &args.bad {
        check::whole(OP, "bad", bad, DType::I32, &[args.weights.len() as u64])?;
        check::aligned(OP, "bad", bad, 4)?;
        check::same_device(OP, stream, &[("bad", bad)])?;
    }
    // All launches are known to be possible before the first.
    for weights in args.weights.chunks(k::TASKS) {
        check::in_range(OP, "number of blocks", weights.iter().map(|w| Sizes::of(&w.sf).blocks()).sum(), 0, i32::MAX as u64)?;
    }
    let bad = args.bad.as_ref().map_or(Out::null(), |bad| bad.output::<u32>());
    for (i, weights) in args.weights.chunks(k::TASKS).enumerate() {
        let bad = if args.bad.is_some() { bad.at((i * k::TASKS) as u64) } else { bad };
        launch(stream, weights, args.block_size, bad, args.bad.is_some())?;
    }
    Ok(())
}

const OP: &str = "batched_transpose_weight_sf";

/// Groups and scaling blocks of a weight.
struct Sizes {
    groups: u64,
    n: u64,
    k: u64,
}

impl Sizes {
    fn of(sf: &View) -> Self {
        let group = sf.rank() as isize - 2;
        Self { groups: if group > 0 { sf.dim(0) } else { 1 }, n: sf.dim(group as usize), k: sf.dim(group as usize + 1) }
    }

    /// Blocks of both outputs.
    fn blocks(&self) -> u64 {
        k::blocks(self.groups, self.n, self.k) + k::blocks(self.groups, self.k, self.n)
    }
}

fn check_weight(stream: &Stream, weight: &Weight<'_>, block: u64) -> Result<()> {
    let Weight { sf, sf0, sf1 } = weight;
    if sf.rank() != 3 {
        check::rank(OP, "sf", sf, 2)?;
    }
    check::dtype(OP, "sf", sf, &[DType::F32])?;
    check::contiguous(OP, "sf", sf)?;
    check::aligned(OP, "sf", sf, 4)?;
    let Sizes { groups, n: rows, k: columns } = Sizes::of(sf);
    let most = (1 << k::SIZE_BITS) - 1;
    check::in_range(OP, "rows of sf", rows, 0, most)?;
    check::in_range(OP, "columns of sf", columns, 0, most)?;
    check::divisible(OP, "n", rows * block, 128)?;
    check::divisible(OP, "k", columns * block, 128)?;
    // Kernels count the scales of a group, and different words, with 32 bits.
    check::in_range(OP, "scales of a group", rows * columns, 0, i32::MAX as u64)?;
    check::in_range(OP, "groups of sf", groups, 0, (1 << k::GROUP_BITS) - 1)?;
    let words = groups * (rows * columns.div_ceil(4)).max(columns * rows.div_ceil(4));
    check::in_range(OP, "words", words, 0, i32::MAX as u64)?;
    check_output("sf0", sf0, sf.rank(), groups, (rows * block, columns.div_ceil(4)), false)?;
    check_output("sf1", sf1, sf.rank(), groups, (columns * block, rows.div_ceil(4)), true)?;
    check::same_device(OP, stream, &[("sf", sf), ("sf0", sf0), ("sf1", sf1)])
}

/// `(along, packs)` words in columns, or, if that `may_turn`, the same in rows.
fn check_output(arg: &'static str, t: &View, rank: usize, groups: u64, (along, packs): (u64, u64), may_turn: bool) -> Result<()> {
    check::dtype(OP, arg, t, &[DType::Ue8m0x4])?;
    check::rank(OP, arg, t, rank)?;
    let (shape, turned) = ([groups, along, packs], [groups, packs, along]);
    let skipped = 3 - rank;
    // The strides say which it is, unless there are none to say it; then it does not matter.
    let is = |shape: &[u64; 3], strides: [u64; 3]| {
        t.shape() == &shape[skipped..]
            && (t.is_empty() || (skipped..3).all(|i| shape[i] == 1 || t.stride(i - skipped) == strides[i]))
    };
    let strides = [packs * along, 1, along];
    if is(&shape, strides) || (may_turn && is(&turned, [packs * along, along, 1])) {
        if t.is_empty() || t.ptr().is_multiple_of(16) {
            return Ok(());
        }
        let got = format!("address {:#x}", t.ptr());
        return Err(Error::Layout { op: OP, arg, expected: "an address that is a multiple of 16".to_owned(), got });
    }
    if t.shape() != &shape[skipped..] && !(may_turn && t.shape() == &turned[skipped..]) {
        return check::shape(OP, arg, t, &shape[skipped..]);
    }
    let got = format!("shape {:?} with strides {:?}", t.shape(), t.strides());
    Err(Error::Layout { op: OP, arg, expected: format!("strides {:?}", &strides[skipped..]), got })
}

/// No output overlaps anything else.
fn check_overlaps(args: &Args<'_>) -> Result<()> {
    for (i, w) in args.weights.iter().enumerate() {
        let outputs = [("sf0", &*w.sf0), ("sf1", &*w.sf1)];
        check::no_overlap(OP, outputs[0], outputs[1])?;
        for (j, other) in args.weights.iter().enumerate() {
            for output in outputs {
                check::no_overlap(OP, ("sf", &other.sf), output)?;
                if j > i {
                    check::no_overlap(OP, output, ("sf0", &other.sf0))?;
                    check::no_overlap(OP, output, ("sf1", &other.sf1))?;
                }
            }
        }
        if let Some(bad) = &args.bad {
            for t in [("sf", &*w.sf), ("sf0", &*w.sf0), ("sf1", &*w.sf1)] {
                check::no_overlap(OP, t, ("bad", bad))?;
            }
        }
    }
    Ok(())
}

/// The same error with the number of the weight.
fn of_weight(error: Error, number: usize) -> Error {
    let named = |text: String| format!("{text} (weight {number})");
    match error {
        Error::Shape { op, arg, expected, got } => Error::Shape { op, arg, expected: named(expected), got },
        Error::DType { op, arg, allowed, got } => Error::DType { op, arg, allowed: named(allowed), got },
        Error::Layout { op, arg, expected, got } => Error::Layout { op, arg, expected: named(expected), got },
        Error::Value { op, arg, allowed, got } => Error::Value { op, arg, allowed: named(allowed), got },
        other => other,
    }
}

/// At most [`TASKS`](k::TASKS) weights.
fn launch(stream: &Stream, weights: &[Weight<'_>], block_size: u32, bad: Out<u32>, count: bool) -> Result<()> {
    struct Task {
        sf: In<u32>,
        sf0: Out<u32>,
        sf1: Out<u32>,
        shape: u64,
        first: u32,
    }
    let mut blocks = 0;
    let mut rest = (0..).zip(weights);
    let mut next = || match rest.next() {
        Some((number, w)) => {
            let sizes = Sizes::of(&w.sf);
            let first = blocks;
            blocks += sizes.blocks() as u32;
            let shape = k::shape(number, sizes.groups, sizes.n, sizes.k);
            Task { sf: w.sf.input(), sf0: w.sf0.output(), sf1: w.sf1.output(), shape, first }
        }
        None => Task { sf: In::null(), sf0: Out::null(), sf1: Out::null(), shape: 0, first: u32::MAX },
    };
    macro_rules! args {
        ($($sf:ident $sf0:ident $sf1:ident $shape:ident $first:ident),*) => {{
            $(let Task { sf: $sf, sf0: $sf0, sf1: $sf1, shape: $shape, first: $first } = next();)*
            k::transpose::Args {
                bad,
                count: count.into(),
                block_log2: block_size.trailing_zeros(),
                $($sf, $sf0, $sf1, $shape, $first),*
            }
        }};
    }
    let args = ferrotile_kernels::with_weight_sf_tasks!(args);
    stream.launch(OP, &k::transpose::ENTRY, &LaunchConfig::new(blocks, k::THREADS), &args)
}
