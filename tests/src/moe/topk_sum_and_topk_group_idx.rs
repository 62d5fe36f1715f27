//! topk_sum_and_topk_group_idx: reference, cases, checks and benchmark.

use super::common_route::{inside, prefilled};
use crate::support::bench::Row;
use crate::support::cases::{Depth, TOKENS};
use crate::support::compare::equal;
use crate::support::golden::{self, Case, Golden};
use crate::support::rng::Rng;
use crate::support::suite::{Ctx, Report, Suite, text};
use ferrotile::moe::topk_sum_and_topk_group_idx::{Args, topk_sum_and_topk_group_idx};
use ferrotile::{Buffer, Device, Stream};
use rayon::prelude::*;
use std::cmp::Ordering;

/// The checks of this op.
pub const SUITE: Suite = Suite { op: "topk_sum_and_topk_group_idx", run };

/// Sizes of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shape {
    t: u64,
    groups: u64,
    of_group: u64,
    sum: u32,
    k: u64,
}

impl Shape {
    /// Scores of a token.
    fn experts(self) -> u64 {
        self.groups * self.of_group
    }

    fn name(self) -> String {
        let Self { t, groups, sum, k, .. } = self;
        format!("e={},g={groups},kg={k},sum={sum},t={t}", self.experts())
    }
}

/// For each token a stable sort of the groups by the sum of their best scores, NaN last.
fn reference(scores: &[f32], shape: Shape) -> Vec<i64> {
    let before = |a: f32, b: f32| b.partial_cmp(&a).unwrap_or(a.is_nan().cmp(&b.is_nan()));
    let score = |group: &[f32]| {
        let mut sorted: Vec<f32> = group.iter().map(|s| if s.is_nan() { f32::NEG_INFINITY } else { *s }).collect();
        sorted.sort_by(|a, b| before(*a, *b));
        if shape.sum == 1 { sorted[0] } else { sorted[0] + sorted[1] }
    };
    let best = |token: &[f32]| {
        let sums: Vec<f32> = token.chunks(shape.of_group as usize).map(score).collect();
        let mut order: Vec<i64> = (0..shape.groups as i64).collect();
        order.sort_by(|&i, &j| -> Ordering { before(sums[i as usize], sums[j as usize]) });
        order.truncate(shape.k as usize);
        order
    };
    scores.par_chunks(shape.experts().max(1) as usize).flat_map_iter(best).collect()
}

/// Every shape that the kernels distinguish, then the grid of moe.md.
fn cases(depth: Depth) -> Vec<Shape> {
    let mut cases = Vec::new();
    // Tokens, groups, experts of a group, groups chosen: vectors of four, two and one; groups that are no power of two; one group and
    // one expert; more than a lane has in flight.
    const ODD: [(u64, u64, u64, u64); 20] = [
        (0, 8, 32, 4),
        (9, 8, 32, 0),
        (9, 8, 32, 8),
        (1, 1, 1, 1),
        (9, 1, 7, 1),
        (9, 1, 1024, 1),
        (9, 2, 3, 2),
        (9, 3, 5, 2),
        (9, 3, 6, 3),
        (9, 5, 100, 4),
        (9, 7, 1, 7),
        (9, 9, 2, 5),
        (9, 16, 4, 16),
        (9, 17, 12, 9),
        (9, 31, 3, 31),
        (9, 32, 1, 4),
        (9, 32, 8, 32),
        (9, 32, 33, 6),
        (9, 4, 2050, 2),
        (37, 8, 48, 4),
    ];
    for (t, groups, of_group, k) in ODD {
        for sum in [1, 2].into_iter().filter(|sum| u64::from(*sum) <= of_group) {
            cases.push(Shape { t, groups, of_group, sum, k });
        }
    }
    let tokens: &[u64] = match depth {
        Depth::Small => &[19],
        Depth::Full => &TOKENS,
    };
    for &t in tokens {
        for (experts, groups) in [(72, 4), (72, 8), (72, 12), (256, 4), (256, 8), (256, 16)] {
            for (sum, k) in [(1, 2), (1, 4), (2, 2), (2, 4)] {
                cases.push(Shape { t, groups, of_group: experts / groups, sum, k });
            }
        }
    }
    cases
}

/// Scores whose tokens take turns: normal ones, and kinds that a selection could trip over.
fn scores(rng: Rng, shape: Shape) -> Vec<f32> {
    let experts = shape.experts();
    rng.fill((shape.t * experts) as usize, |rng, i| {
        let (token, expert, normal, draw) = (i / experts, i % experts, rng.normal(i), rng.stream(1).below(i, 1000));
        match token % 8 {
            // All equal.
            1 => 0.25,
            // Few different values: sums tie.
            2 => (draw % 3) as f32,
            3 => [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, 1e-45, f32::MAX, f32::MIN, normal]
                [(draw % 10) as usize],
            // Masked: all but a few are -inf.
            4 => {
                if expert % 13 == 3 {
                    normal
                } else {
                    f32::NEG_INFINITY
                }
            }
            5 => f32::NAN,
            // Descending, so that the first of a group are the best; then the last ones.
            6 => -(expert as f32),
            7 => expert as f32 - if expert % 5 == 0 { f32::MAX } else { 0.0 },
            _ => normal,
        }
    })
}

/// Where tokens start: contiguous and aligned, or `pitch` more than their length apart from element `offset` on.
#[derive(Clone, Copy, Debug)]
struct Layout {
    pitch: u64,
    offset: u64,
}

const ALIGNED: Layout = Layout { pitch: 0, offset: 0 };

/// Everything a launch needs.
struct Buffers {
    scores: Buffer<f32>,
    idx: Buffer<i64>,
    shape: Shape,
    layout: Layout,
}

impl Buffers {
    fn new(device: &Device, scores: &[f32], shape: Shape, layout: Layout) -> Result<Self, String> {
        let (experts, stride) = (shape.experts() as usize, (shape.experts() + layout.pitch) as usize);
        let mut spread = vec![f32::INFINITY; layout.offset as usize + shape.t as usize * stride];
        let rows = spread[layout.offset as usize..].chunks_exact_mut(stride.max(1));
        for (to, from) in rows.zip(scores.chunks_exact(experts.max(1))) {
            to[..experts].copy_from_slice(from);
        }
        Ok(Self { scores: device.upload(&spread).map_err(text)?, idx: prefilled(device, shape.t * shape.k, 0)?, shape, layout })
    }

    fn call(&mut self, stream: &Stream) -> ferrotile::Result<()> {
        let Shape { t, groups, of_group, sum, k } = self.shape;
        let strides = [self.shape.experts() + self.layout.pitch, of_group, 1];
        let args = Args {
            scores: self.scores.strided(&[t, groups, of_group], &strides, self.layout.offset)?,
            num_topk_sum: sum,
            topk_group_idx: self.idx.tensor_mut(&[t, k])?,
        };
        topk_sum_and_topk_group_idx(stream, args)
    }

    fn read(&self, name: &str) -> Result<Vec<i64>, String> {
        inside("topk_group_idx", name, &self.idx, self.shape.t * self.shape.k, 0)
    }
}

fn check(device: &Device, scores: &[f32], shape: Shape, layout: Layout, name: &str) -> Result<(), String> {
    let stream = device.stream().map_err(text)?;
    let mut buffers = Buffers::new(device, scores, shape, layout)?;
    buffers.call(&stream).map_err(text)?;
    stream.synchronize().map_err(text)?;
    equal("topk_group_idx", name, &[shape.t, shape.k], &buffers.read(name)?, &reference(scores, shape))
}

fn run(ctx: &Ctx) -> Result<Report, String> {
    let device = &ctx.device;
    for shape in cases(ctx.depth) {
        let name = shape.name();
        if !ctx.case(&name) {
            continue;
        }
        let data = scores(Rng::named(&name), shape);
        // Tokens with gaps and at odd addresses, so that vectors of four and of two come to stand in for each other.
        for layout in [ALIGNED, Layout { pitch: 4, offset: 4 }, Layout { pitch: 2, offset: 2 }, Layout { pitch: 3, offset: 1 }] {
            check(device, &data, shape, layout, &format!("{name},{layout:?}"))?;
        }
    }
    let notes = golden::check_cases(ctx, &["topk_sum_and_topk_group_idx"], |golden, case| check_golden(device, golden, case))?;
    if !device.is_emulator() && ctx.case("graph") {
        check_graph(device)?;
    }
    Ok(Report { notes, ..ctx.report() })
}

fn check_golden(device: &Device, golden: &Golden, case: &Case) -> Result<(), String> {
    let input = golden.tensor(case, "in/scores")?;
    let [t, groups, of_group] = input.shape[..] else {
        return Err(format!("scores of shape {:?}; {}", input.shape, case.name()));
    };
    let shape = Shape { t, groups, of_group, sum: case.param("num_topk_sum")?, k: case.param("num_topk_groups")? };
    let (data, expected): (Vec<f32>, Vec<i64>) = (input.to_vec()?, golden.tensor(case, "out/")?.to_vec()?);
    equal("reference", &case.name(), &[t, shape.k], &reference(&data, shape), &expected)?;
    check(device, &data, shape, ALIGNED, &case.name())
}

/// A captured launch does its work at every replay, on the data that are there then.
fn check_graph(device: &Device) -> Result<(), String> {
    let shape = Shape { t: 100, groups: 8, of_group: 32, sum: 2, k: 4 };
    let stream = device.stream().map_err(text)?;
    let mut buffers = Buffers::new(device, &scores(Rng::new(0), shape), shape, ALIGNED)?;
    // Compiled before the capture.
    buffers.call(&stream).map_err(text)?;
    let graph = stream.capture(|stream| buffers.call(stream)).map_err(text)?;
    for seed in 1..4 {
        let (name, data) = (format!("graph, replay {seed}"), scores(Rng::new(seed), shape));
        buffers.scores.copy_from(&data).map_err(text)?;
        graph.launch(&stream).map_err(text)?;
        stream.synchronize().map_err(text)?;
        equal("topk_group_idx", &name, &[100, 4], &buffers.read(&name)?, &reference(&data, shape))?;
    }
    Ok(())
}

/// The peers' cases and those of the peers' own benchmark (two scores added unless the case says `sum=1`), and small ones.
pub fn bench() -> Vec<Row> {
    let row = |t: u64, experts: u64, groups: u64, k: u64, sum: u32| {
        let shape = Shape { t, groups, of_group: experts / groups, sum, k };
        let sum = if sum == 2 { "" } else { "sum=1," };
        Row {
            op: "topk_sum_and_topk_group_idx",
            case: format!("e={experts},g={groups},kg={k},{sum}t={t}"),
            bytes: 4 * t * experts + 8 * t * k,
            build: Box::new(move |device, _| {
                // Uniform, as the peers' data are.
                let data = Rng::new(t * experts).fill((t * experts) as usize, |rng, i| rng.unit(i));
                let mut buffers = Buffers::new(device, &data, shape, ALIGNED)?;
                Ok(Box::new(move |stream| buffers.call(stream)))
            }),
        }
    };
    let mut rows: Vec<Row> = [8001, 1, 16, 128].map(|t| row(t, 256, 8, 4, 2)).into_iter().collect();
    for (experts, groups, k, sum) in [
        (72, 4, 2, 1),
        (72, 4, 4, 2),
        (72, 8, 2, 2),
        (72, 12, 4, 1),
        (256, 4, 2, 1),
        (256, 4, 4, 2),
        (256, 8, 2, 2),
        (256, 16, 4, 1),
    ] {
        rows.push(row(8001, experts, groups, k, sum));
    }
    rows.push(row(65536, 256, 8, 4, 2));
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferrotile::{DType, Error};
    use proptest::prelude::{ProptestConfig, prop_assert_eq, proptest};

    #[test]
    fn suite() {
        SUITE.test();
    }

    #[test]
    fn reference_is_the_definition() {
        // Sums 1.2, 1.2, inf - inf, 1.0: a tie, and NaN behind everything.
        let data = [0.7, 0.5, 0.1, 0.6, 0.6, 0.1, f32::INFINITY, f32::NAN, f32::NAN, 0.1, 0.1, 0.9];
        let shape = Shape { t: 1, groups: 4, of_group: 3, sum: 2, k: 4 };
        assert_eq!(reference(&data, shape), [0, 1, 3, 2]);
        assert_eq!(reference(&data, Shape { sum: 1, k: 3, ..shape }), [2, 3, 0]);
    }

    #[test]
    fn bad_input_is_refused_and_nothing_is_written() {
        let (device, other) = (Device::emulator(), Device::emulator().checked());
        let stream = device.stream().unwrap();
        let (floats, words) = (device.upload(&[1f32; 640]).unwrap(), device.upload(&[1i32; 640]).unwrap());
        let (wide, elsewhere) = (device.upload(&[1i64; 64]).unwrap(), other.upload(&[1f32; 64]).unwrap());
        let refused = |what: &str, spoil: &dyn Fn(&mut Args<'_>)| {
            let mut idx = device.upload(&[-7i64; 16]).unwrap();
            let mut args = Args {
                scores: floats.tensor(&[4, 4, 4]).unwrap(),
                num_topk_sum: 2,
                topk_group_idx: idx.tensor_mut(&[4, 4]).unwrap(),
            };
            spoil(&mut args);
            let error = topk_sum_and_topk_group_idx(&stream, args).err().unwrap_or_else(|| panic!("{what} was accepted"));
            assert!(error.to_string().starts_with("topk_sum_and_topk_group_idx: "), "{what}: {error}");
            assert_eq!(idx.to_vec().unwrap(), [-7; 16], "{what}");
            error
        };
        macro_rules! refuse {
            ($what:literal, |$a:ident| $set:expr, $error:pat) => {
                let error = refused($what, &|$a: &mut Args<'_>| $set);
                assert!(matches!(error, $error), "{}: {error:?}", $what);
            };
        }
        // SAFETY: refused before anything is read.
        let from = |buffer: u64, device: &Device, dtype, shape: &[u64], strides: &[u64]| unsafe {
            ferrotile::TensorRef::from_raw(device, buffer, dtype, shape, strides).unwrap()
        };
        // SAFETY: refused before anything is written.
        let to = |buffer: u64, dtype, shape: &[u64], strides: &[u64]| unsafe {
            ferrotile::TensorMut::from_raw(&device, buffer, dtype, shape, strides).unwrap()
        };
        let (f, w, i) = (floats.as_ptr(), words.as_ptr(), wide.as_ptr());
        refuse!("a matrix", |a| a.scores = from(f, &device, DType::F32, &[4, 16], &[16, 1]), Error::Shape { arg: "scores", .. });
        refuse!(
            "integers",
            |a| a.scores = from(w, &device, DType::I32, &[4, 4, 4], &[16, 4, 1]),
            Error::DType { arg: "scores", .. }
        );
        refuse!(
            "gaps",
            |a| a.scores = from(f, &device, DType::F32, &[4, 4, 4], &[32, 8, 1]),
            Error::Layout { arg: "scores", .. }
        );
        refuse!(
            "turned",
            |a| a.scores = from(f, &device, DType::F32, &[4, 4, 4], &[16, 1, 4]),
            Error::Layout { arg: "scores", .. }
        );
        refuse!(
            "33 groups",
            |a| a.scores = from(f, &device, DType::F32, &[4, 33, 4], &[132, 4, 1]),
            Error::Value { arg: "num_groups", .. }
        );
        refuse!(
            "more groups than there are",
            |a| a.scores = from(f, &device, DType::F32, &[4, 3, 4], &[12, 4, 1]),
            Error::Value { arg: "num_topk_groups", .. }
        );
        refuse!("a sum of nothing", |a| a.num_topk_sum = 0, Error::Value { arg: "num_topk_sum", .. });
        refuse!("a sum of three", |a| a.num_topk_sum = 3, Error::Value { arg: "num_topk_sum", .. });
        refuse!(
            "a sum of two of one",
            |a| a.scores = from(f, &device, DType::F32, &[4, 4, 1], &[4, 1, 1]),
            Error::Value { arg: "num_topk_sum", .. }
        );
        refuse!("a vector", |a| a.topk_group_idx = to(i, DType::I64, &[16], &[1]), Error::Shape { arg: "topk_group_idx", .. });
        refuse!(
            "other tokens",
            |a| a.topk_group_idx = to(i, DType::I64, &[5, 4], &[4, 1]),
            Error::Shape { arg: "topk_group_idx", .. }
        );
        refuse!(
            "32 bits",
            |a| a.topk_group_idx = to(w, DType::I32, &[4, 4], &[4, 1]),
            Error::DType { arg: "topk_group_idx", .. }
        );
        refuse!(
            "spread",
            |a| a.topk_group_idx = to(i, DType::I64, &[4, 4], &[5, 1]),
            Error::Layout { arg: "topk_group_idx", .. }
        );
        refuse!(
            "elsewhere",
            |a| a.scores = from(elsewhere.as_ptr(), &other, DType::F32, &[4, 4, 4], &[16, 4, 1]),
            Error::DeviceMismatch { arg: "scores", .. }
        );
        refuse!(
            "indices over scores",
            |a| a.topk_group_idx = to(f, DType::I64, &[4, 4], &[4, 1]),
            Error::Overlap { a: "scores", b: "topk_group_idx", .. }
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn any_shape_stride_and_value(
            t in 0u64..20, groups in 1u64..33, of_group in 1u64..70, two: bool, k in 0u64..33, pitch in 0u64..6, offset in 0u64..6,
            seed: u64, levels in 1u64..300,
        ) {
            let sum = if two && of_group > 1 { 2 } else { 1 };
            let shape = Shape { t, groups, of_group, sum, k: k.min(groups) };
            let data = Rng::new(seed).fill((t * shape.experts()) as usize, |rng, i| match rng.below(i, levels) {
                0 => f32::from_bits(rng.stream(1).bits(i) as u32),
                v => v as f32 - levels as f32 / 2.0,
            });
            prop_assert_eq!(check(&Device::emulator(), &data, shape, Layout { pitch, offset }, "random"), Ok(()));
        }
    }
}
