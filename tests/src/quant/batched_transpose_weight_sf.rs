//! Reference, cases, checks and benchmark rows of `batched_transpose_weight_sf`.

use crate::support::bench::{Launch, Row};
use crate::support::cases::Depth;
use crate::support::compare;
use crate::support::golden::{self, Case, Golden};
use crate::support::rng::Rng;
use crate::support::suite::{Ctx, Report, Suite, ensure, text};
use ferrotile::quant::batched_transpose_weight_sf::{Args, Weight, batched_transpose_weight_sf};
use ferrotile::{Buffer, DType, Device, Stream, Ue8m0x4};
use rayon::prelude::*;
use std::cell::OnceCell;

/// What the `check` binary runs.
pub const SUITE: Suite = Suite { op: "batched_transpose_weight_sf", run };

/// Scaling blocks of a weight, `groups` 0 for a matrix.
#[derive(Clone, Copy, Debug)]
struct Shape {
    groups: u64,
    n: u64,
    k: u64,
}

impl Shape {
    fn scales(self) -> u64 {
        self.groups.max(1) * self.n * self.k
    }

    /// With the dimension of groups, if there is one.
    fn of(self, inner: [u64; 2]) -> Vec<u64> {
        if self.groups == 0 { inner.to_vec() } else { [&[self.groups], &inner[..]].concat() }
    }
}

/// Both outputs of one weight as they lie in memory, and the number of scales that are no powers of two.
#[derive(Clone, Debug, PartialEq)]
struct Packed {
    sf0: Vec<u32>,
    sf1: Vec<u32>,
    bad: i32,
}

/// From the definition, word by word. `sf` are f32 bits.
fn reference(sf: &[u32], Shape { groups, n, k }: Shape, b: u64) -> Packed {
    let exponent = |g: u64, i: u64, j: u64| if i < n && j < k { sf[((g * n + i) * k + j) as usize] >> 23 & 255 } else { 0 };
    // Words `(p, r)` of all groups, with `along` of them for each `p`.
    let words = |along: u64, packs: u64, e: &(dyn Fn(u64, u64, u64) -> u32 + Sync)| -> Vec<u32> {
        let word = |i: u64| {
            let (g, p, r) = (i / along / packs, i / along % packs, i % along);
            (0..4).fold(0, |word, q| word | e(g, 4 * p + q, r / b) << (8 * q))
        };
        (0..groups.max(1) * packs * along).into_par_iter().map(word).collect()
    };
    let sf0 = words(n * b, k.div_ceil(4), &|g, j, i| exponent(g, i, j));
    let sf1 = words(k * b, n.div_ceil(4), &|g, i, j| exponent(g, i, j));
    let bad = sf.iter().filter(|v| **v & 0x807F_FFFF != 0).count() as i32;
    Packed { sf0, sf1, bad }
}

/// Elements behind an output that must stay as they are.
const GUARD: usize = 64;
const FILL: u8 = 0xA5;
/// What the counters hold before.
const BEFORE: i32 = 1000;

/// One weight on a device.
struct Uploaded {
    shape: Shape,
    scales: Vec<u32>,
    sf: Buffer<f32>,
    sf0: Buffer<u32>,
    sf1: Buffer<u32>,
    /// `sf1` is passed as rows of words.
    turned: bool,
    expected: OnceCell<Packed>,
}

impl Uploaded {
    /// Random scales for the weight at this place of a list. With `odd` some are no powers of two.
    fn random(device: &Device, shape: Shape, b: u64, (number, odd): (usize, bool)) -> Result<Self, String> {
        let rng = Rng::named(&format!("batched_transpose_weight_sf {shape:?} {number}"));
        let scales = rng.fill(shape.scales() as usize, |rng, i| {
            let draw = rng.bits(i);
            let exponent = if draw.is_multiple_of(7) { draw >> 8 & 255 } else { 100 + (draw >> 8) % 40 } as u32;
            let more = [0x8000_0000, 1, 0x40_0000, 0x807F_FFFF][(draw >> 20) as usize % 4];
            exponent << 23 | if odd && (draw >> 30).is_multiple_of(11) { more } else { 0 }
        });
        Self::new(device, shape, b, number, scales)
    }

    /// These scales, by their bits.
    fn new(device: &Device, shape: Shape, b: u64, number: usize, scales: Vec<u32>) -> Result<Self, String> {
        let words = |along: u64, packs: u64| (shape.groups.max(1) * along * b * packs.div_ceil(4)) as usize;
        let mut uploaded = Self {
            shape,
            sf: device.upload(bytemuck::cast_slice(&scales)).map_err(text)?,
            scales,
            sf0: device.alloc(words(shape.n, shape.k) + GUARD).map_err(text)?,
            sf1: device.alloc(words(shape.k, shape.n) + GUARD).map_err(text)?,
            turned: number % 2 == 1,
            expected: OnceCell::new(),
        };
        uploaded.reset()?;
        Ok(uploaded)
    }

    fn reset(&mut self) -> Result<(), String> {
        self.sf0.fill_bytes(FILL).map_err(text)?;
        self.sf1.fill_bytes(FILL).map_err(text)
    }

    fn weight(&mut self, b: u64) -> ferrotile::Result<Weight<'_>> {
        let (n, k) = (self.shape.n * b, self.shape.k * b);
        let (n_packs, k_packs) = (self.shape.n.div_ceil(4), self.shape.k.div_ceil(4));
        let shape = self.shape;
        let strides = |inner: [u64; 2], group| if shape.groups == 0 { inner.to_vec() } else { vec![group, inner[0], inner[1]] };
        let (sf1, sf1_strides) = if self.turned { ([n_packs, k], [k, 1]) } else { ([k, n_packs], [1, k]) };
        Ok(Weight {
            sf: self.sf.tensor(&shape.of([shape.n, shape.k]))?,
            sf0: self.sf0.strided_mut(&shape.of([n, k_packs]), &strides([1, n], n * k_packs), 0)?.reinterpret(DType::Ue8m0x4)?,
            sf1: self.sf1.strided_mut(&shape.of(sf1), &strides(sf1_strides, k * n_packs), 0)?.reinterpret(DType::Ue8m0x4)?,
        })
    }

    fn check(&self, name: &str, expected: &Packed) -> Result<(), String> {
        for (what, buffer, expected) in [("sf0", &self.sf0, &expected.sf0), ("sf1", &self.sf1, &expected.sf1)] {
            let words = buffer.to_vec().map_err(text)?;
            let (words, guard) = words.split_at(words.len() - GUARD);
            ensure(guard.iter().all(|w| *w == u32::from_ne_bytes([FILL; 4])), || {
                format!("{what}: words behind the tensor were written; {name}")
            })?;
            let shape = [expected.len() as u64];
            compare::equal::<Ue8m0x4>(what, name, &shape, bytemuck::cast_slice(words), bytemuck::cast_slice(expected))?;
        }
        Ok(())
    }
}

/// A list of weights on a device.
struct List {
    weights: Vec<Uploaded>,
    b: u64,
    bad: Buffer<i32>,
}

impl List {
    fn random(device: &Device, shapes: &[Shape], b: u64, odd: bool) -> Result<Self, String> {
        let weights = shapes.iter().enumerate().map(|(i, shape)| Uploaded::random(device, *shape, b, (i, odd)));
        Self::new(device, weights.collect::<Result<_, _>>()?, b)
    }

    fn new(device: &Device, weights: Vec<Uploaded>, b: u64) -> Result<Self, String> {
        let bad = device.upload(&vec![BEFORE; weights.len() + GUARD]).map_err(text)?;
        Ok(Self { weights, b, bad })
    }

    fn reset(&mut self) -> Result<(), String> {
        self.weights.iter_mut().try_for_each(Uploaded::reset)?;
        self.bad.copy_from(&vec![BEFORE; self.bad.len()]).map_err(text)
    }

    fn call(&mut self, stream: &Stream, counts: bool) -> ferrotile::Result<()> {
        let len = self.weights.len() as u64;
        let weights = self.weights.iter_mut().map(|w| w.weight(self.b)).collect::<ferrotile::Result<Vec<_>>>()?;
        let bad = if counts { Some(self.bad.tensor_mut(&[len])?) } else { None };
        batched_transpose_weight_sf(stream, Args { weights: &weights, block_size: self.b as u32, bad })
    }

    fn check(&self, name: &str, counts: bool) -> Result<(), String> {
        let mut bad = vec![BEFORE; self.bad.len()];
        for (i, w) in self.weights.iter().enumerate() {
            let expected = w.expected.get_or_init(|| reference(&w.scales, w.shape, self.b));
            w.check(&format!("{name},weight={i} {:?}", w.shape), expected)?;
            bad[i] += if counts { expected.bad } else { 0 };
        }
        compare::equal("bad", name, &[bad.len() as u64], &self.bad.to_vec().map_err(text)?, &bad)
    }
}

const fn matrix(n: u64, k: u64) -> Shape {
    Shape { groups: 0, n, k }
}

/// Lists for blocks of `b`, as multiples of 128 values.
fn lists(depth: Depth, b: u64) -> Vec<Vec<Shape>> {
    let one = 128 / b;
    let of = |groups, n: u64, k: u64| Shape { groups, n: n / 128 * one, k: k / 128 * one };
    let mut lists = vec![
        vec![],
        vec![of(0, 128, 128)],
        vec![of(0, 640, 384), of(3, 128, 1152), of(1, 384, 256), of(0, 0, 256), of(2, 256, 640)],
        vec![of(0, 256, 0), of(0, 128, 256), of(4, 0, 0), of(5, 384, 128), of(0, 384, 0)],
    ];
    // More than one launch holds.
    lists.push((0..70).map(|i| of(i % 3, 128 * (1 + i % 5), 128 * (1 + i % 2))).collect());
    if depth == Depth::Full {
        for (n, k) in [(128, 128), (7168, 2048), (4096, 7168), (2176, 1152)] {
            lists.extend([0, 1, 9, 32].map(|groups| vec![of(groups, n, k)]));
        }
        lists.push([0, 1, 9, 32].iter().flat_map(|g| [of(*g, 128, 128), of(*g, 7168, 2048), of(*g, 4096, 7168)]).collect());
        lists.push((0..100).map(|i| of(i % 4, 128 * (1 + i % 17), 128 * (1 + i % 23))).collect());
    }
    lists
}

fn run(ctx: &Ctx) -> Result<Report, String> {
    let stream = ctx.device.stream().map_err(text)?;
    for b in [32, 128] {
        for (i, shapes) in lists(ctx.depth, b).iter().enumerate() {
            for (odd, counts) in [(false, true), (true, true), (true, false)] {
                let name = format!("b={b},counts={counts},list={i},odd={odd},weights={}", shapes.len());
                if !ctx.case(&name) {
                    continue;
                }
                let mut list = List::random(&ctx.device, shapes, b, odd)?;
                list.call(&stream, counts).map_err(text)?;
                list.check(&name, counts)?;
                // Once more, over its own results.
                list.bad.copy_from(&vec![BEFORE; list.bad.len()]).map_err(text)?;
                list.call(&stream, counts).map_err(text)?;
                list.check(&name, counts)?;
            }
        }
    }
    if !ctx.device.is_emulator() {
        check_graph(ctx)?;
        check_both_backends(ctx)?;
    }
    let notes = golden::check_cases(ctx, &["batched_transpose_weight_sf"], |golden, case| check_golden(ctx, golden, case))?;
    Ok(Report { notes, ..ctx.report() })
}

/// The recorded call: a matrix, and a group of matrices whose `sf1` is made of rows of words.
fn check_golden(ctx: &Ctx, golden: &Golden, case: &Case) -> Result<(), String> {
    let (name, b) = (case.name(), case.param("block_size")?);
    let mut weights = Vec::new();
    for (number, key) in ["in/a", "in/c"].into_iter().enumerate() {
        let sf = golden.tensor(case, key)?;
        let shape = match sf.shape[..] {
            [n, k] => matrix(n, k),
            [groups, n, k] => Shape { groups, n, k },
            _ => return Err(format!("{key} has shape {:?}; {name}", sf.shape)),
        };
        weights.push(Uploaded::new(&ctx.device, shape, b, number, sf.to_vec()?)?);
    }
    let mut list = List::new(&ctx.device, weights, b)?;
    list.call(&ctx.device.stream().map_err(text)?, true).map_err(text)?;
    list.check(&name, true)?;
    for (i, w) in list.weights.iter().enumerate() {
        for (j, (buffer, turned)) in [(&w.sf0, false), (&w.sf1, w.turned)].into_iter().enumerate() {
            let recorded = golden.tensor(case, &format!("out/{i}.{j}"))?;
            let [rows, columns] = recorded.shape[recorded.shape.len() - 2..] else { return Err(format!("no matrix; {name}")) };
            // Rows of words lie in memory as they were recorded; else columns do, each in one piece.
            let words = buffer.to_vec().map_err(text)?;
            let ours: Vec<u32> = (0..words.len() as u64 - GUARD as u64)
                .map(|at| {
                    let (group, row, column) = (at / (rows * columns), at / columns % rows, at % columns);
                    words[(group * rows * columns + if turned { row * columns + column } else { column * rows + row }) as usize]
                })
                .collect();
            let what = format!("sf{j} of weight {i}");
            compare::equal::<Ue8m0x4>(&what, &name, &recorded.shape, bytemuck::cast_slice(&ours), &recorded.to_vec()?)?;
        }
    }
    Ok(())
}

/// More weights than a launch takes, recorded in a graph and replayed.
fn check_graph(ctx: &Ctx) -> Result<(), String> {
    let name = "kind=graph,weights=70";
    if !ctx.case(name) {
        return Ok(());
    }
    let stream = ctx.device.stream().map_err(text)?;
    let mut list = List::random(&ctx.device, &lists(Depth::Small, 32)[4], 32, true)?;
    let graph = stream.capture(|s| list.call(s, true)).map_err(text)?;
    for replay in 0..2 {
        list.reset()?;
        graph.launch(&stream).map_err(text)?;
        stream.synchronize().map_err(text)?;
        list.check(&format!("{name},replay={replay}"), true)?;
    }
    Ok(())
}

/// The emulator and this device write the same bytes.
fn check_both_backends(ctx: &Ctx) -> Result<(), String> {
    let name = "kind=both backends";
    if !ctx.case(name) {
        return Ok(());
    }
    let emulator = Device::emulator();
    let mut results = Vec::new();
    for device in [&ctx.device, &emulator] {
        let mut list = List::random(device, &lists(Depth::Small, 32)[2], 32, true)?;
        list.call(&device.stream().map_err(text)?, true).map_err(text)?;
        let read = |w: &Uploaded| Ok((w.sf0.to_vec()?, w.sf1.to_vec()?));
        let outputs: ferrotile::Result<Vec<_>> = list.weights.iter().map(read).collect();
        results.push((outputs.map_err(text)?, list.bad.to_vec().map_err(text)?));
    }
    ensure(results[0] == results[1], || format!("the backends differ; {name}"))
}

/// The peer's cases, one matrix, a list as of a layer of experts (`pair=True`: of `n` by `k` and of `k` by `n`), and many matrices.
pub fn bench() -> Vec<Row> {
    let row = |b: u64, case: &str, shapes: Vec<Shape>| {
        let words = move |s: &Shape| s.groups.max(1) * b * (s.n * s.k.div_ceil(4) + s.k * s.n.div_ceil(4));
        let bytes = shapes.iter().map(|s| 4 * s.scales() + 4 * words(s)).sum();
        let build = move |device: &Device, _: &Stream| -> Result<Launch, String> {
            let mut list = List::random(device, &shapes, b, false)?;
            Ok(Box::new(move |stream| list.call(stream, false)))
        };
        Row { op: "batched_transpose_weight_sf", case: format!("b={b},{case}"), bytes, build: Box::new(build) }
    };
    let experts = |groups| vec![Shape { groups, n: 56, k: 16 }, Shape { groups, n: 16, k: 56 }];
    vec![
        row(128, "g=32,k=7168,n=2048", vec![Shape { groups: 32, n: 16, k: 56 }]),
        row(32, "g=32,k=7168,n=2048", vec![Shape { groups: 32, n: 64, k: 224 }]),
        row(128, "k=2048,n=7168", vec![matrix(56, 16)]),
        row(128, "k=7168,n=4096", vec![matrix(32, 56)]),
        row(128, "g=32,k=2048,n=7168,pair=True", experts(32)),
        row(128, "k=2048,n=7168,weights=32", vec![matrix(56, 16); 32]),
        row(128, "k=2048,n=7168,weights=100", vec![matrix(56, 16); 100]),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferrotile::{Error, Result, TensorMut, TensorRef, View};
    use proptest::prelude::{ProptestConfig, proptest};

    #[test]
    fn suite() {
        SUITE.test();
    }

    #[test]
    fn the_reference_is_the_table_of_the_specification() {
        // Exponents 1 to 10 in two rows of five.
        let sf: Vec<u32> = (1..=10).map(|e| e << 23).collect();
        let r = reference(&sf, matrix(2, 5), 2);
        assert_eq!(r.sf0, [0x0403_0201, 0x0403_0201, 0x0908_0706, 0x0908_0706, 5, 5, 10, 10]);
        assert_eq!(r.sf1, [0x601, 0x601, 0x702, 0x702, 0x803, 0x803, 0x904, 0x904, 0xA05, 0xA05]);
        assert_eq!(r.bad, 0);
    }

    /// A tensor `offset` bytes behind another.
    fn view(t: &View, offset: u64, dtype: DType, shape: &[u64], strides: &[u64]) -> TensorMut<'static> {
        // SAFETY: in these tests the buffers outlive the calls, and tensors that overlap are refused.
        unsafe { TensorMut::from_raw(t.device(), t.ptr() + offset, dtype, shape, strides).unwrap() }
    }

    /// The same for reading.
    fn read(t: &View, offset: u64, dtype: DType, shape: &[u64], strides: &[u64]) -> TensorRef<'static> {
        // SAFETY: as in `view`.
        unsafe { TensorRef::from_raw(t.device(), t.ptr() + offset, dtype, shape, strides).unwrap() }
    }

    /// A call of two weights, right but for what a test changes.
    struct Call {
        weights: [Weight<'static>; 2],
        block_size: u32,
        bad: Option<TensorMut<'static>>,
    }

    /// Runs a changed call on fresh buffers; what is refused must leave the outputs alone.
    fn call(change: impl FnOnce(&mut Call)) -> Result<()> {
        let device = Device::emulator();
        let sf = device.zeros::<f32>(4096)?;
        let mut out = device.alloc::<Ue8m0x4>(1 << 14)?;
        let mut bad = device.alloc::<i32>(64)?;
        out.fill_bytes(FILL)?;
        bad.fill_bytes(FILL)?;
        let (s, o) = (sf.tensor(&[1])?, out.tensor(&[1])?);
        let words = |offset, shape: &[u64], strides: &[u64]| view(&o, offset, DType::Ue8m0x4, shape, strides);
        let mut c = Call {
            weights: [
                Weight {
                    sf: read(&s, 0, DType::F32, &[3, 5], &[5, 1]),
                    sf0: words(0, &[384, 2], &[1, 384]),
                    sf1: words(4096, &[640, 1], &[1, 640]),
                },
                Weight {
                    sf: read(&s, 64, DType::F32, &[2, 1, 2], &[2, 2, 1]),
                    sf0: words(8192, &[2, 128, 1], &[128, 1, 128]),
                    sf1: words(12288, &[2, 1, 256], &[256, 256, 1]),
                },
            ],
            block_size: 128,
            bad: Some(view(&*bad.tensor(&[1])?, 0, DType::I32, &[2], &[1])),
        };
        change(&mut c);
        let args = Args { weights: &c.weights, block_size: c.block_size, bad: c.bad };
        let result = batched_transpose_weight_sf(&device.stream()?, args);
        if result.is_err() {
            let fill = i32::from_ne_bytes([FILL; 4]);
            assert!(out.to_vec()?.iter().all(|v| v.0 == fill), "an output was written");
            assert!(bad.to_vec()?.iter().all(|v| *v == fill), "bad was written");
        }
        result
    }

    #[test]
    fn bad_arguments_are_named() {
        assert!(call(|_| ()).is_ok());
        assert!(call(|c| c.bad = None).is_ok());
        let refuses = |change: &dyn Fn(&mut Call), start: &str| {
            let text = call(|c| change(c)).expect_err(start).to_string();
            assert!(text.starts_with(&format!("batched_transpose_weight_sf: {start}")), "{text}\nexpected {start}");
        };
        fn sf(c: &mut Call, dtype: DType, shape: &[u64], strides: &[u64]) {
            c.weights[1].sf = read(&c.weights[1].sf, 0, dtype, shape, strides);
        }
        fn sf0(c: &mut Call, dtype: DType, shape: &[u64], strides: &[u64]) {
            c.weights[0].sf0 = view(&c.weights[0].sf0, 0, dtype, shape, strides);
        }
        refuses(&|c| c.block_size = 64, "block_size is 64, allowed: 32, 128");
        refuses(&|c| c.block_size = 32, "n is 96, allowed: multiples of 128 (weight 0)");
        refuses(&|c| sf(c, DType::F32, &[4], &[1]), "sf has shape [4], expected 2 dimensions (weight 1)");
        refuses(&|c| sf(c, DType::I32, &[2, 1, 2], &[2, 2, 1]), "sf is i32, allowed: f32 (weight 1)");
        refuses(&|c| sf(c, DType::F32, &[2, 2], &[3, 1]), "layout of sf is");
        refuses(&|c| sf(c, DType::F32, &[2, 2], &[2, 1]), "sf0 has shape [2, 128, 1], expected 2 dimensions (weight 1)");
        refuses(&|c| sf0(c, DType::U32, &[384, 2], &[1, 384]), "sf0 is u32, allowed: ue8m0x4 (weight 0)");
        refuses(&|c| sf0(c, DType::Ue8m0x4, &[384, 1], &[1, 384]), "sf0 has shape [384, 1], expected [384, 2] (weight 0)");
        refuses(
            &|c| sf0(c, DType::Ue8m0x4, &[384, 2], &[1, 400]),
            "layout of sf0 is shape [384, 2] with strides [1, 400], expected",
        );
        refuses(&|c| sf0(c, DType::Ue8m0x4, &[384, 2], &[2, 1]), "layout of sf0 is");
        // Only the other output may be seen as rows of words.
        refuses(&|c| sf0(c, DType::Ue8m0x4, &[2, 384], &[384, 1]), "sf0 has shape [2, 384], expected [384, 2]");
        let turned = |c: &mut Call| c.weights[0].sf1 = view(&c.weights[0].sf1, 0, DType::Ue8m0x4, &[1, 640], &[640, 1]);
        assert!(call(turned).is_ok());
        refuses(
            &|c| c.weights[0].sf0 = view(&c.weights[0].sf0, 4, DType::Ue8m0x4, &[384, 2], &[1, 384]),
            "layout of sf0 is address",
        );
        let bad = |c: &mut Call, dtype, shape: &[u64], strides: &[u64]| {
            let t = c.bad.take().unwrap();
            c.bad = Some(view(&t, 0, dtype, shape, strides));
        };
        refuses(&|c| bad(c, DType::I32, &[3], &[1]), "bad has shape [3], expected [2]");
        refuses(&|c| bad(c, DType::F32, &[2], &[1]), "bad is f32, allowed: i32");
        refuses(&|c| bad(c, DType::I32, &[2], &[2]), "layout of bad is");
        let same = |c: &mut Call| c.weights[1].sf0 = view(&c.weights[0].sf1, 2048, DType::Ue8m0x4, &[2, 128, 1], &[128, 1, 128]);
        refuses(&same, "sf1 and sf0 overlap");
        let own = |c: &mut Call| c.weights[0].sf1 = view(&c.weights[0].sf0, 16, DType::Ue8m0x4, &[640, 1], &[1, 640]);
        refuses(&own, "sf0 and sf1 overlap");
        refuses(
            &|c| c.weights[1].sf1 = view(&c.weights[0].sf, 0, DType::Ue8m0x4, &[2, 1, 256], &[256, 256, 1]),
            "sf and sf1 overlap",
        );
        refuses(&|c| c.bad = Some(view(&c.weights[1].sf0, 0, DType::I32, &[2], &[1])), "sf0 and bad overlap");
        let elsewhere = Device::emulator().checked().zeros::<f32>(15).unwrap();
        let error = call(|c| c.weights[0].sf = read(&elsewhere.tensor(&[1]).unwrap(), 0, DType::F32, &[3, 5], &[5, 1]));
        assert!(matches!(error, Err(Error::DeviceMismatch { arg: "sf", .. })), "{error:?}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        /// Any list.
        #[test]
        fn any_list(sizes in proptest::collection::vec((0u64..4, 0u64..7, 0u64..7), 0..40), small: bool, odd: bool) {
            let device = Device::emulator();
            let (b, one) = if small { (32, 4) } else { (128, 1) };
            let shapes: Vec<Shape> = sizes.iter().map(|(groups, n, k)| Shape { groups: *groups, n: n * one, k: k * one }).collect();
            let mut list = List::random(&device, &shapes, b, odd).unwrap();
            list.call(&device.stream().unwrap(), true).unwrap();
            list.check("any", true).unwrap();
        }
    }
}
