//! Standard normal random numbers ([`randn()`]).

#[cfg(doc)]
use crate::Error;
use crate::{DType, Result, Stream, TensorMut, TensorRef, check};
use ferrotile_kernels::device::Out;
use ferrotile_kernels::rand::randn as kernels;
use kernels::{Call, MAX_ELEMENTS, count, fill, fill_counted};
use std::sync::{Mutex, PoisonError};

const OP: &str = "randn";

/// Arguments of [`randn()`] and [`randn_like`].
#[derive(Debug)]
pub struct Args<'a> {
    /// f32 or bf16 of any shape, contiguous.
    pub out: TensorMut<'a>,
}

/// Arguments of [`randn_counted`].
#[derive(Debug)]
pub struct CountedArgs<'a> {
    /// Seed and number of calls so far, i64 `[2]`, whose bits count as unsigned. Each call adds 1 to the second.
    pub state: TensorMut<'a>,
    /// f32 or bf16 of any shape, contiguous.
    pub out: TensorMut<'a>,
}

/// A source of random numbers: a seed and the number of calls so far. All threads may use it; which of them comes first is theirs to settle.
///
/// ```
/// use ferrotile::rand::{Generator, randn::Args};
///
/// let device = ferrotile::Device::emulator();
/// let (mut a, mut b) = (device.alloc::<f32>(100)?, device.alloc::<f32>(100)?);
/// let generator = Generator::new(7);
/// generator.randn(&device.stream()?, Args { out: a.tensor_mut(&[10, 10])? })?;
/// generator.randn(&device.stream()?, Args { out: b.tensor_mut(&[100])? })?;
/// assert_ne!(a.to_vec()?, b.to_vec()?);
/// // From the start again.
/// generator.set_seed(7);
/// generator.randn(&device.stream()?, Args { out: b.tensor_mut(&[100])? })?;
/// assert_eq!(a.to_vec()?, b.to_vec()?);
/// # Ok::<(), ferrotile::Error>(())
/// ```
#[derive(Debug)]
pub struct Generator(Mutex<State>);

/// Seed, and calls so far.
#[derive(Clone, Copy, Debug)]
struct State {
    seed: u64,
    calls: u64,
}

/// What [`randn()`] and [`set_seed`] are about.
static DEFAULT: Generator = Generator::new(0);

impl Generator {
    /// The generator of a seed, before its first call.
    pub const fn new(seed: u64) -> Self {
        Self(Mutex::new(State { seed, calls: 0 }))
    }

    /// Begin again with a seed.
    pub fn set_seed(&self, seed: u64) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = State { seed, calls: 0 };
    }

    /// [`randn()`] with the numbers of this generator.
    ///
    /// # Errors
    /// Those of [`randn()`]. A call that was refused, or had nothing to fill, is not counted.
    pub fn randn(&self, stream: &Stream, args: Args<'_>) -> Result<()> {
        let out = args.out;
        check_out(stream, &out)?;
        if out.is_empty() {
            return Ok(());
        }
        let state = {
            let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let now = *state;
            state.calls = state.calls.wrapping_add(1);
            now
        };
        let Call { key: [key0, key1], counter: [calls0, calls1] } = Call::new(state.seed, state.calls);
        let entry = if out.dtype() == DType::F32 { &fill::f32 } else { &fill::bf16 };
        launches(&out, |part| {
            let Part { out, num_elements, num_vectors, steps, launch } = part;
            let values = fill::Args { out, num_elements, num_vectors, steps, launch, key0, key1, calls0, calls1 };
            stream.launch(OP, entry, &kernels::config(num_elements), &values)
        })
    }
}

/// Start the numbers of [`randn()`] in this process again, with a seed. It is 0 before the first call.
pub fn set_seed(seed: u64) {
    DEFAULT.set_seed(seed);
}

/// Fills a tensor with independent standard normal values, of the generator that belongs to the process ([`set_seed`]).
///
/// | tensor | shape | dtype | layout |
/// |---|---|---|---|
/// | `out` | any, also more than 2^32 elements | f32 or bf16 | contiguous |
///
/// The same seed and the same sequence of calls give the same bits: on every GPU and on the emulator, however the work is launched, whatever
/// the alignment of `out` and the shapes of other calls. A shorter tensor is a prefix of a longer one; bf16 values are f32 values, rounded to
/// nearest even. All are finite, at most 6.67 in magnitude.
///
/// Element `i` of call number `n` (from 0) of seed `s` comes from block `i / 4` of Philox4x32-10, that is key `(hash(s + n), s >> 32)` and
/// counter `(i / 4 mod 2^32, i / 4 >> 32, n mod 2^32, n >> 32)`, where `hash` is that of the specification. Words 0 and 1 make elements 0 and 1 of the
/// block, words 2 and 3 the others, by the method of Box and Muller: with `g = i32(first) as f32`, `u = (|g| + 1/2) / 2^31` in
/// (0, 1] and `y = i32(second) / 2^31` they are `sqrt(-2 ln u) cos(pi/2 y)` with the sign of `first` and `sqrt(-2 ln u) sin(pi/2 y)`. Logarithm, sine and
/// cosine are polynomials (errors 1.1e-6 relative, 5.9e-7 and 4.7e-8 absolute) in correctly rounded arithmetic.
///
/// Asynchronous on `stream`; allocates nothing. An empty tensor launches nothing and is no call. **A captured launch gives the same numbers at
/// every replay**, because the call is counted on the host: use [`randn_counted`] in CUDA graphs. (Facts: moe.md, section 19.)
///
/// ```
/// use ferrotile::rand::{randn, randn::Args, set_seed};
///
/// let device = ferrotile::Device::emulator();
/// let mut out = device.alloc::<f32>(10_000)?;
/// set_seed(42);
/// randn(&device.stream()?, Args { out: out.tensor_mut(&[100, 100])? })?;
/// let mean = out.to_vec()?.iter().sum::<f32>() / 1e4;
/// assert!(mean.abs() < 0.05);
/// # Ok::<(), ferrotile::Error>(())
/// ```
///
/// # Errors
/// [`Error::DType`], [`Error::Layout`] when `out` is not contiguous or its address is no multiple of the element size, [`Error::DeviceMismatch`],
/// [`Error::Driver`]. `out` is untouched then.
pub fn randn(stream: &Stream, args: Args<'_>) -> Result<()> {
    DEFAULT.randn(stream, args)
}

/// [`randn()`] into a tensor that must have shape and dtype of `x`; nothing of `x` is read. Asynchronous on `stream`; allocates nothing.
///
/// ```
/// use ferrotile::rand::{randn::Args, randn_like};
///
/// let device = ferrotile::Device::emulator();
/// let (x, mut out) = (device.zeros::<f32>(6)?, device.alloc::<f32>(6)?);
/// randn_like(&device.stream()?, &x.tensor(&[2, 3])?, Args { out: out.tensor_mut(&[2, 3])? })?;
/// # Ok::<(), ferrotile::Error>(())
/// ```
///
/// # Errors
/// Those of [`randn()`], and [`Error::Shape`].
pub fn randn_like(stream: &Stream, x: &TensorRef<'_>, args: Args<'_>) -> Result<()> {
    check::shape(OP, "out", &args.out, x.shape())?;
    check::dtype(OP, "out", &args.out, &[x.dtype()])?;
    DEFAULT.randn(stream, args)
}

/// [`randn()`] with a generator in device memory: every replay of a captured call gives new numbers.
///
/// | tensor | shape | dtype | layout |
/// |---|---|---|---|
/// | `state` | `[2]`: seed, calls so far | i64, whose bits count as unsigned | contiguous |
/// | `out` | any | f32 or bf16 | contiguous |
///
/// The numbers are those of a [`Generator`] of that seed after as many calls. A second, tiny launch behind the first counts the call.
/// Launches that use one `state` must be ordered, as they are on one stream. Asynchronous on `stream`; allocates nothing. An empty `out` launches
/// nothing and is no call. (Facts: moe.md, section 19.)
///
/// ```
/// use ferrotile::rand::{Generator, randn, randn::CountedArgs, randn_counted};
///
/// let device = ferrotile::Device::emulator();
/// let stream = device.stream()?;
/// // Seed 7, no calls.
/// let mut state = device.upload(&[7i64, 0])?;
/// let (mut a, mut b) = (device.alloc::<f32>(50)?, device.alloc::<f32>(50)?);
/// randn_counted(&stream, CountedArgs { state: state.tensor_mut(&[2])?, out: a.tensor_mut(&[50])? })?;
/// assert_eq!(state.to_vec()?, [7, 1]);
/// Generator::new(7).randn(&stream, randn::Args { out: b.tensor_mut(&[50])? })?;
/// assert_eq!(a.to_vec()?, b.to_vec()?);
/// # Ok::<(), ferrotile::Error>(())
/// ```
///
/// # Errors
/// Those of [`randn()`], [`Error::Shape`] and [`Error::Overlap`]. `out` and `state` are untouched then.
pub fn randn_counted(stream: &Stream, args: CountedArgs<'_>) -> Result<()> {
    let CountedArgs { state, out } = args;
    check_out(stream, &out)?;
    check::whole(OP, "state", &state, DType::I64, &[2])?;
    check::aligned(OP, "state", &state, 8)?;
    check::same_device(OP, stream, &[("state", &state)])?;
    check::no_overlap(OP, ("state", &state), ("out", &out))?;
    if out.is_empty() {
        return Ok(());
    }
    let entry = if out.dtype() == DType::F32 { &fill_counted::f32 } else { &fill_counted::bf16 };
    launches(&out, |part| {
        let Part { out, num_elements, num_vectors, steps, launch } = part;
        let values = fill_counted::Args { state: state.input(), out, num_elements, num_vectors, steps, launch };
        stream.launch(OP, entry, &kernels::config(num_elements), &values)
    })?;
    stream.launch(OP, &count::ENTRY, &kernels::COUNT_CONFIG, &count::Args { state: state.output() })
}

fn check_out(stream: &Stream, out: &TensorMut<'_>) -> Result<()> {
    check::dtype(OP, "out", out, &[DType::F32, DType::Bf16])?;
    check::contiguous(OP, "out", out)?;
    check::aligned(OP, "out", out, out.dtype().size())?;
    check::same_device(OP, stream, &[("out", out)])
}

/// What one launch fills.
struct Part {
    out: Out<u8>,
    num_elements: u64,
    num_vectors: u32,
    steps: u32,
    launch: u32,
}

/// The launches of a call, all but the last of them over [`MAX_ELEMENTS`].
fn launches(out: &TensorMut<'_>, mut launch_part: impl FnMut(Part) -> Result<()>) -> Result<()> {
    let (size, elements) = (out.dtype().size(), out.numel());
    let aligned = out.ptr().is_multiple_of(16);
    for (launch, first) in (0..elements).step_by(MAX_ELEMENTS as usize).enumerate() {
        let num_elements = (elements - first).min(MAX_ELEMENTS);
        launch_part(Part {
            out: out.output::<u8>().at(first * size),
            num_elements,
            // Without alignment elements are written one by one.
            num_vectors: if aligned { (num_elements / (16 / size)) as u32 } else { 0 },
            steps: kernels::steps(num_elements),
            launch: launch as u32,
        })?;
    }
    Ok(())
}
