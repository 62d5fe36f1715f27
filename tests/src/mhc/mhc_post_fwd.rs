//! mhc_post_fwd: the order of evaluation is fixed, so results are compared bit for bit.

use crate::support::bench::{Launch, Row};
use crate::support::cases::Depth;
use crate::support::compare;
use crate::support::golden::{self, Case, Golden, Peer};
use crate::support::inputs;
use crate::support::rng::Rng;
use crate::support::suite::{Ctx, Report, Suite, ensure, text};
use ferrotile::half::bf16;
use ferrotile::mhc::mhc_post_fwd::{Args, mhc_post_fwd};
use ferrotile::{Buffer, Device, Stream};
use rayon::prelude::*;

/// The op's checks.
pub const SUITE: Suite = Suite { op: "mhc_post_fwd", run };

/// Contents of outputs before a launch.
const FILL: u8 = 0xA5;

/// Elements before and after an output that must stay as they are; a multiple of 16 bytes.
const GUARD: usize = 64;

/// bf16 as the hardware rounds: to nearest even, every NaN the same.
fn round(v: f32) -> bf16 {
    if v.is_nan() { bf16::from_bits(0x7FFF) } else { bf16::from_f32(v) }
}

/// `out[o] = comb[0][o] * residual[0]`, then a multiply-add of `post[o] * x`, then of the other streams, rounded once. `round` is
/// by half's integer code, the multiply-adds by the math library.
pub fn reference(data: &Data) -> Vec<bf16> {
    let Data { shape: Shape { m, h, .. }, x, residual, post, comb } = data;
    let (m, h) = (*m as usize, *h as usize);
    let mut out = vec![bf16::ZERO; residual.len()];
    if out.is_empty() {
        return out;
    }
    out.par_chunks_exact_mut(m * h).enumerate().for_each(|(t, rows)| {
        let stream = |i: usize, col: usize| residual[(t * m + i) * h + col].to_f32();
        for (o, row) in rows.chunks_exact_mut(h).enumerate() {
            let weight = |i: usize| comb[(t * m + i) * m + o];
            for (col, value) in row.iter_mut().enumerate() {
                let first = post[t * m + o].mul_add(x[t * h + col].to_f32(), weight(0) * stream(0, col));
                *value = round((1..m).fold(first, |acc, i| weight(i).mul_add(stream(i, col), acc)));
            }
        }
    });
    out
}

/// Sizes, and how the tensors are given.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Leading dimensions; the first is left out if it is 0.
    lead: [u64; 2],
    m: u64,
    h: u64,
    /// Elements by which each tensor starts after a multiple of 16 bytes: x, residual, post, comb, out.
    offsets: [u64; 5],
}

impl Shape {
    fn new(t: u64, m: u64, h: u64) -> Self {
        Self { lead: [0, t], m, h, offsets: [0; 5] }
    }

    fn tokens(&self) -> u64 {
        self.lead[0].max(1) * self.lead[1]
    }

    /// The leading dimensions and these.
    fn dims(&self, last: &[u64]) -> Vec<u64> {
        let from = if self.lead[0] == 0 { 1 } else { 0 };
        self.lead[from..].iter().chain(last).copied().collect()
    }

    fn name(&self) -> String {
        let offsets = if self.offsets == [0; 5] { String::new() } else { format!(",offsets={:?}", self.offsets) };
        format!("h={},mult={},t={:?}{offsets}", self.h, self.m, self.dims(&[]))
    }
}

/// Inputs of a call.
pub struct Data {
    shape: Shape,
    x: Vec<bf16>,
    residual: Vec<bf16>,
    post: Vec<f32>,
    comb: Vec<f32>,
}

impl Data {
    /// Normal values.
    fn normal(shape: Shape) -> Self {
        let rng = Rng::named(&shape.name());
        let (t, m, h) = (shape.tokens() as usize, shape.m as usize, shape.h as usize);
        Self {
            shape,
            x: rng.stream(0).normal_bf16(t * h),
            residual: rng.stream(1).normal_bf16(t * m * h),
            post: rng.stream(2).normal_f32(t * m),
            comb: rng.stream(3).normal_f32(t * m * m),
        }
    }

    /// All sorts of bits: zeros of both signs, subnormals, the largest values, infinities, NaN, and exponents from end to end.
    fn awkward(shape: Shape) -> Self {
        let mut data = Self::normal(shape);
        let rng = Rng::named("awkward");
        let special = [0, 0x8000, 0x0001, 0x807F, 0x7F7F, 0xFF7F, 0x7F80, 0xFF80, 0x7FC0, 0x0080, 0x3F80, 0xBF80u16];
        let bits = |rng: &Rng, i: u64| match rng.below(i, 3) {
            0 => special[rng.below(i + (1 << 40), 12) as usize],
            _ => rng.bits(i + (2 << 40)) as u16,
        };
        let (values, weights) = (rng.stream(0), rng.stream(1));
        data.x = values.fill(data.x.len(), |rng, i| bf16::from_bits(bits(rng, i)));
        data.residual = values.stream(1).fill(data.residual.len(), |rng, i| bf16::from_bits(bits(rng, i)));
        // Some tokens keep finite weights, or nothing but NaN would come out.
        let weight = |plain: f32, i: u64| if weights.below(i, 4) == 0 { f32::from_bits(weights.bits(i) as u32) } else { plain };
        data.post.iter_mut().enumerate().for_each(|(i, v)| *v = weight(*v, i as u64));
        data.comb.iter_mut().enumerate().for_each(|(i, v)| *v = weight(*v, 1 << 32 | i as u64));
        data
    }
}

/// A call's tensors on a device.
struct Call {
    shape: Shape,
    x: Buffer<bf16>,
    residual: Buffer<bf16>,
    post: Buffer<f32>,
    comb: Buffer<f32>,
    /// With guards.
    out: Buffer<bf16>,
}

impl Call {
    fn new(device: &Device, data: &Data) -> Result<Self, String> {
        fn upload<T: ferrotile::Element>(device: &Device, values: &[T], offset: u64) -> Result<Buffer<T>, String> {
            if offset == 0 {
                return device.upload(values).map_err(text);
            }
            let zero = <T as bytemuck::Zeroable>::zeroed();
            let values: Vec<T> = std::iter::repeat_n(zero, offset as usize).chain(values.iter().copied()).collect();
            device.upload(&values).map_err(text)
        }
        let [x, residual, post, comb, out] = data.shape.offsets;
        let len = 2 * GUARD + out as usize + data.residual.len();
        let mut out = device.alloc(len).map_err(text)?;
        out.fill_bytes(FILL).map_err(text)?;
        Ok(Self {
            shape: data.shape,
            x: upload(device, &data.x, x)?,
            residual: upload(device, &data.residual, residual)?,
            post: upload(device, &data.post, post)?,
            comb: upload(device, &data.comb, comb)?,
            out,
        })
    }

    fn args(&mut self) -> ferrotile::Result<Args<'_>> {
        let shape = self.shape;
        let (m, h, offsets) = (shape.m, shape.h, shape.offsets);
        let strides = |shape: &[u64]| -> Vec<u64> { (0..shape.len()).map(|i| shape[i + 1..].iter().product()).collect() };
        let (x, stream, matrix) = (shape.dims(&[h]), shape.dims(&[m, h]), shape.dims(&[m, m]));
        // Both forms of `post` are used.
        let post = if shape.lead[0] == 0 { shape.dims(&[m]) } else { shape.dims(&[m, 1]) };
        Ok(Args {
            x: self.x.strided(&x, &strides(&x), offsets[0])?,
            residual: self.residual.strided(&stream, &strides(&stream), offsets[1])?,
            post: self.post.strided(&post, &strides(&post), offsets[2])?,
            comb: self.comb.strided(&matrix, &strides(&matrix), offsets[3])?,
            out: self.out.strided_mut(&stream, &strides(&stream), GUARD as u64 + offsets[4])?,
        })
    }

    fn launch(&mut self, stream: &Stream) -> ferrotile::Result<()> {
        mhc_post_fwd(stream, self.args()?)
    }

    /// The output, whose guards are checked.
    fn read(&self, name: &str) -> Result<Vec<bf16>, String> {
        let all = self.out.to_vec().map_err(text)?;
        let start = GUARD + self.shape.offsets[4] as usize;
        let end = all.len() - GUARD;
        let fill = bf16::from_ne_bytes([FILL; 2]);
        let outside = all[..start].iter().chain(&all[end..]).all(|v| v.to_bits() == fill.to_bits());
        ensure(outside, || format!("elements outside of out were written; {name}"))?;
        Ok(all[start..end].to_vec())
    }
}

fn dims(shape: &Shape) -> Vec<u64> {
    shape.dims(&[shape.m, shape.h])
}

fn check(stream: &Stream, data: &Data) -> Result<(), String> {
    let mut call = Call::new(stream.device(), data)?;
    call.launch(stream).map_err(text)?;
    let name = data.shape.name();
    compare::equal("out", &name, &dims(&data.shape), &call.read(&name)?, &reference(data))
}

fn small_shapes() -> Vec<Shape> {
    let mut shapes = vec![
        // Empty, in each dimension.
        Shape::new(0, 4, 64),
        Shape::new(3, 4, 0),
        Shape::new(3, 0, 64),
        // One vector per token, an odd number of them, blocks that end within a token, and the tests' smallest hidden size.
        Shape::new(1, 4, 8),
        Shape::new(67, 4, 24),
        Shape::new(37, 4, 80),
        Shape { lead: [1, 5], ..Shape::new(0, 4, 1280) },
        Shape { lead: [2, 3], ..Shape::new(0, 4, 576) },
        Shape::new(41, 2, 40),
        Shape::new(19, 8, 72),
        // What only the plain kernel can do.
        Shape::new(11, 4, 37),
        Shape::new(1, 1, 1),
        Shape::new(5, 1, 64),
        Shape::new(7, 3, 40),
        Shape::new(2, 16, 24),
    ];
    // Each tensor unaligned by itself.
    for i in 0..5 {
        let mut shape = Shape::new(3, 4, 64);
        shape.offsets[i] = 1;
        shapes.push(shape);
    }
    shapes
}

fn run(ctx: &Ctx) -> Result<Report, String> {
    let stream = ctx.device.stream().map_err(text)?;
    for shape in small_shapes() {
        for (what, data) in [("normal", Data::normal as fn(Shape) -> Data), ("awkward", Data::awkward)] {
            if ctx.case(&format!("{},data={what}", shape.name())) {
                check(&stream, &data(shape))?;
            }
        }
    }
    if ctx.depth == Depth::Full {
        for h in [1280, 2560, 7168] {
            for n0 in [1, 2] {
                let shape = Shape { lead: [n0, 4096], ..Shape::new(0, 4, h) };
                if ctx.case(&shape.name()) {
                    check(&stream, &Data::normal(shape))?;
                }
            }
            for m in [2, 8] {
                let shape = Shape::new(1001, m, h);
                if ctx.case(&shape.name()) {
                    check(&stream, &Data::normal(shape))?;
                }
            }
        }
        // More than 2^31 elements of residual; a token count that fills no block.
        for shape in [Shape::new(75_003, 4, 7168), Shape::new(8001, 4, 577)] {
            if ctx.case(&shape.name()) {
                check(&stream, &Data::normal(shape))?;
            }
        }
    }
    if ctx.case("twice") {
        twice(&stream)?;
    }
    if !ctx.device.is_emulator() && ctx.case("graph") {
        graph(&ctx.device)?;
    }
    let notes = golden::check_cases(ctx, &["mhc_post"], |golden, case| golden_case(&stream, golden, case))?;
    Ok(Report { notes, ..ctx.report() })
}

/// Two runs give the same bytes.
fn twice(stream: &Stream) -> Result<(), String> {
    let data = Data::normal(Shape::new(9, 4, 136));
    let mut call = Call::new(stream.device(), &data)?;
    call.launch(stream).map_err(text)?;
    let first = call.read("first run")?;
    call.launch(stream).map_err(text)?;
    compare::equal("second run", &data.shape.name(), &dims(&data.shape), &call.read("second run")?, &first)
}

/// The launcher can be recorded and replayed.
fn graph(device: &Device) -> Result<(), String> {
    let stream = device.stream().map_err(text)?;
    let data = Data::normal(Shape::new(33, 4, 1280));
    let mut call = Call::new(device, &data)?;
    let graph = stream.capture(|s| call.launch(s)).map_err(text)?;
    stream.synchronize().map_err(text)?;
    let fill = bf16::from_ne_bytes([FILL; 2]);
    let untouched = call.read("captured")?.iter().all(|v| v.to_bits() == fill.to_bits());
    ensure(untouched, || "a capture ran the kernel".to_owned())?;
    graph.launch(&stream).map_err(text)?;
    compare::equal("replayed", &data.shape.name(), &dims(&data.shape), &call.read("replayed")?, &reference(&data))
}

fn golden_case(stream: &Stream, golden: &Golden, case: &Case) -> Result<(), String> {
    let name = case.name();
    let tensor = |key| golden.tensor(case, key);
    let residual = tensor("in/residual")?;
    let [n0, n1, m, h] = residual.shape[..] else { return Err(format!("{name}: residual is {:?}", residual.shape)) };
    let data = Data {
        shape: Shape { lead: [n0, n1], ..Shape::new(0, m, h) },
        x: tensor("in/x")?.to_vec()?,
        residual: residual.to_vec()?,
        post: tensor("in/post_layer_mix")?.to_vec()?,
        comb: tensor("in/comb_res_mix")?.to_vec()?,
    };
    let out = if case.peer == Peer::V1 { "out/y.0" } else { "out/fwd" };
    let expected: Vec<bf16> = tensor(out)?.to_vec()?;
    compare::equal("the reference's out", &name, &residual.shape, &reference(&data), &expected)?;
    let mut call = Call::new(stream.device(), &data)?;
    call.launch(stream).map_err(text)?;
    compare::equal("out", &name, &residual.shape, &call.read(&name)?, &expected)
}

/// Benchmark rows: the peer's case, the specification's grid and small ones.
pub fn bench() -> Vec<Row> {
    let mut rows = Vec::new();
    for h in [7168, 1280, 2560, 4096] {
        for t in [8192, 4096, 128, 16, 1] {
            if t > 1000 || h == 7168 {
                rows.push(row(Shape::new(t, 4, h)));
            }
        }
    }
    rows
}

fn row(shape: Shape) -> Row {
    let Shape { m, h, .. } = shape;
    let t = shape.tokens();
    let build = move |device: &Device, _: &Stream| -> Result<Launch, String> {
        let mut call = Call {
            shape,
            x: inputs::normal_bf16(device, 0, t * h)?,
            residual: inputs::normal_bf16(device, 1, t * m * h)?,
            post: inputs::uniform(device, 2, t * m)?,
            comb: inputs::uniform(device, 3, t * m * m)?,
            out: device.alloc(2 * GUARD + (t * m * h) as usize).map_err(text)?,
        };
        Ok(Box::new(move |stream| call.launch(stream)))
    };
    let case = format!("h={h},mult={m},t={t}");
    Row { op: "mhc_post_fwd", case, bytes: 2 * t * h * (2 * m + 1) + 4 * t * m * (m + 1), build: Box::new(build) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferrotile::{DType, Error, TensorMut, TensorRef};
    use proptest::prelude::*;

    #[test]
    fn suite() {
        SUITE.test();
    }

    /// The order matters: with another one these values differ.
    #[test]
    fn the_first_product_is_rounded_alone() {
        // comb * residual is 1 + 2^-12 + ..., whose tail only an exact product keeps; x cancels the rest.
        let shape = Shape::new(1, 4, 1);
        let (a, b) = (1.0 + f32::EPSILON, bf16::from_f32(1.5));
        let data = Data {
            shape,
            x: vec![bf16::from_f32(-1.5)],
            residual: vec![b, bf16::ZERO, bf16::ZERO, bf16::ZERO],
            post: vec![1.0; 4],
            comb: [[a; 4], [0.0; 4], [0.0; 4], [0.0; 4]].concat(),
        };
        let product = a * 1.5;
        assert_ne!(product as f64, a as f64 * 1.5, "the product must round");
        let out = reference(&data);
        assert!(out.iter().all(|v| v.to_f32() == product - 1.5), "{out:?}");
        check(&Device::emulator().stream().unwrap(), &data).unwrap();
    }

    /// Every documented mistake is a typed error that names the argument, and leaves the output alone.
    #[test]
    fn mistakes_are_errors() {
        let device = Device::emulator().checked();
        let stream = device.stream().unwrap();
        let data = Data::normal(Shape::new(3, 4, 64));
        let mut call = Call::new(&device, &data).unwrap();
        let other = device.zeros::<f32>(4096).unwrap();
        let wide = device.zeros::<bf16>(4096).unwrap();
        let elsewhere = Device::emulator().zeros::<bf16>(4096).unwrap();

        macro_rules! refused {
            (|$a:ident| $change:expr) => {{
                let mut $a = call.args().unwrap();
                $change;
                let error = mhc_post_fwd(&stream, $a).unwrap_err();
                assert!(call.read("refused").unwrap().iter().all(|v| v.to_le_bytes() == [FILL; 2]), "{error}");
                error
            }};
        }
        let shape = |e: &Error, name: &str| matches!(e, Error::Shape { op: "mhc_post_fwd", arg, .. } if *arg == name);
        let layout = |e: &Error, name: &str| matches!(e, Error::Layout { op: "mhc_post_fwd", arg, .. } if *arg == name);

        let e = refused!(|a| a.x = wide.tensor(&[64]).unwrap());
        assert_eq!(e.to_string(), "mhc_post_fwd: x has shape [64], expected 2 or 3 dimensions");
        let e = refused!(|a| a.x = wide.tensor(&[1, 1, 3, 64]).unwrap());
        assert!(shape(&e, "x"), "{e}");
        let e = refused!(|a| a.residual = wide.tensor(&[12, 64]).unwrap());
        assert!(shape(&e, "residual"), "{e}");
        let e = refused!(|a| a.residual = wide.tensor(&[2, 4, 64]).unwrap());
        assert_eq!(e.to_string(), "mhc_post_fwd: residual has shape [2, 4, 64], expected [3, 4, 64]");
        let e = refused!(|a| a.post = other.tensor(&[4, 3]).unwrap());
        assert!(shape(&e, "post"), "{e}");
        let e = refused!(|a| a.post = other.tensor(&[3, 4, 2]).unwrap());
        assert_eq!(e.to_string(), "mhc_post_fwd: post has shape [3, 4, 2], expected [3, 4, 1]");
        let e = refused!(|a| a.comb = other.tensor(&[3, 4, 5]).unwrap());
        assert!(shape(&e, "comb"), "{e}");
        let e = refused!(|a| a.x = other.tensor(&[3, 64]).unwrap());
        assert_eq!(e.to_string(), "mhc_post_fwd: x is f32, allowed: bf16");
        let e = refused!(|a| a.comb = other.tensor(&[3, 4, 4]).unwrap().reinterpret(DType::I32).unwrap());
        assert!(matches!(e, Error::DType { arg: "comb", got: DType::I32, .. }), "{e}");
        let e = refused!(|a| a.x = wide.strided(&[3, 64], &[65, 1], 0).unwrap());
        assert!(layout(&e, "x"), "{e}");
        let e = refused!(|a| a.comb = other.strided(&[3, 4, 4], &[16, 1, 4], 0).unwrap());
        assert!(layout(&e, "comb"), "{e}");
        let e = refused!(|a| a.residual = elsewhere.tensor(&[3, 4, 64]).unwrap());
        assert!(matches!(e, Error::DeviceMismatch { arg: "residual", .. }), "{e}");

        // SAFETY: refused before anything is touched.
        let raw = |ptr, dtype, shape: &[u64]| unsafe {
            let strides: Vec<u64> = (0..shape.len()).map(|i| shape[i + 1..].iter().product()).collect();
            (
                TensorRef::from_raw(&device, ptr, dtype, shape, &strides).unwrap(),
                TensorMut::from_raw(&device, ptr, dtype, shape, &strides).unwrap(),
            )
        };
        let e = refused!(|a| a.post = raw(other.as_ptr() + 2, DType::F32, &[3, 4]).0);
        assert!(layout(&e, "post"), "{e}");
        let e = refused!(|a| a.residual = raw(a.out.ptr() + 2, DType::Bf16, &[3, 4, 64]).0);
        assert_eq!(e.to_string(), "mhc_post_fwd: residual and out overlap in memory");
        let e = refused!(|a| a.out = raw(a.x.ptr(), DType::Bf16, &[3, 4, 64]).1);
        assert!(matches!(e, Error::Overlap { a: "x", b: "out", .. }), "{e}");
        let huge = |t: u64, m: u64, h: u64, vector: u64| {
            let at = |n: u64| (n << 44) + vector;
            let tensor = |n, dtype, shape: &[u64]| raw(at(n), dtype, shape);
            let args = Args {
                x: tensor(1, DType::Bf16, &[t, h]).0,
                residual: tensor(2, DType::Bf16, &[t, m, h]).0,
                post: tensor(3, DType::F32, &[t, m]).0,
                comb: tensor(4, DType::F32, &[t, m, m]).0,
                out: tensor(5, DType::Bf16, &[t, m, h]).1,
            };
            mhc_post_fwd(&stream, args).unwrap_err()
        };
        for (error, name) in [
            (huge(1, 1025, 8, 0), "streams of residual"),
            (huge(1, 4, 1 << 30, 0), "elements of a token of residual"),
            (huge(1 << 32, 1, 1, 0), "tokens of x"),
            (huge(1 << 22, 4, 8192, 0), "elements of x"),
            (huge(1 << 20, 4, 4096, 4), "elements of x"),
        ] {
            assert!(matches!(error, Error::Value { arg, .. } if arg == name), "{error}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]
        #[test]
        fn any_shape_value_and_alignment(
            t in 0u64..20, m in 1u64..9, h in 0u64..70, round in prop::sample::select(vec![1u64, 8]), offset in 0usize..10, awkward in any::<bool>(),
        ) {
            let mut shape = Shape::new(t, m, h.next_multiple_of(round));
            if let Some(offset) = shape.offsets.get_mut(offset) {
                *offset = 1;
            }
            let data = if awkward { Data::awkward(shape) } else { Data::normal(shape) };
            let device = Device::emulator().checked().shuffled(t * 71 + h);
            prop_assert_eq!(check(&device.stream().unwrap(), &data), Ok(()));
        }
    }
}
