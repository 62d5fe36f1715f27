//! topk_gate: reference, cases, checks and benchmark.

use crate::support::bench::Row;
use crate::support::cases::{Depth, TOKENS};
use crate::support::compare::{equal, untouched};
use crate::support::golden::{self, Case, Golden};
use crate::support::rng::Rng;
use crate::support::suite::{Ctx, Report, Suite, text};
use ferrotile::moe::topk_gate::{Args, topk_gate};
use ferrotile::{Device, Stream};
use rayon::prelude::*;
use std::cmp::Ordering;

/// The checks of this op.
pub const SUITE: Suite = Suite { op: "topk_gate", run };

/// The first `k` of a stable sort of each row in descending order, NaN last.
fn reference(scores: &[f32], e: usize, k: usize) -> Vec<i64> {
    let before = |a: f32, b: f32| b.partial_cmp(&a).unwrap_or(a.is_nan().cmp(&b.is_nan()));
    let best = |row: &[f32]| {
        let mut order: Vec<i64> = (0..e as i64).collect();
        order.sort_by(|&i, &j| -> Ordering { before(row[i as usize], row[j as usize]) });
        order.truncate(k);
        order
    };
    scores.par_chunks(e.max(1)).flat_map_iter(best).collect()
}

/// Tokens, experts, choices.
fn cases(depth: Depth) -> Vec<(u64, u64, u64)> {
    // Every length of rows the kernels distinguish, K = E, K beyond what fits a warp's candidates, rows of any alignment.
    const ODD: [(u64, u64, u64); 22] = [
        (0, 64, 6),
        (5, 64, 0),
        (1, 1, 1),
        (9, 32, 32),
        (17, 33, 7),
        (17, 37, 32),
        (11, 100, 9),
        (11, 129, 2),
        (37, 256, 8),
        (33, 256, 1),
        (10, 256, 32),
        (9, 257, 8),
        (37, 384, 6),
        (10, 384, 9),
        (9, 500, 17),
        (9, 512, 8),
        (9, 1000, 8),
        (9, 1023, 8),
        (10, 1024, 16),
        (9, 1501, 8),
        (10, 1024, 32),
        (10, 1501, 29),
    ];
    // (72,6) to (144,6) and (256,8) are the grid of moe.md.
    const GRID: [(u64, u64); 12] =
        [(72, 6), (32, 6), (64, 6), (96, 6), (16, 6), (36, 6), (108, 6), (128, 6), (144, 6), (256, 8), (384, 6), (1024, 8)];
    let tokens: &[u64] = match depth {
        Depth::Small => &[9],
        Depth::Full => &TOKENS,
    };
    let mut cases = ODD.to_vec();
    cases.extend(tokens.iter().flat_map(|t| GRID.iter().map(|(e, k)| (*t, *e, *k))));
    cases
}

/// Scores whose rows take turns: random ones, and nine kinds that a selection could trip over.
fn scores(rng: Rng, t: u64, e: u64) -> Vec<f32> {
    rng.fill((t * e) as usize, |rng, i| {
        let (row, expert) = (i / e, i % e);
        let normal = rng.normal(i);
        let draw = rng.stream(1).below(i, 1000);
        match row % 10 {
            // All equal.
            1 => 0.25,
            // Few different values: many ties, more candidates than lanes.
            2 => (draw % 4) as f32,
            // As a bf16 gate makes them: some ties.
            3 => f32::from_bits(normal.to_bits() & 0xFFFF_0000),
            // NaN of both signs, infinities, zeros of both signs, subnormals, largest finite values.
            4 => [
                f32::NAN,
                -f32::NAN,
                f32::INFINITY,
                f32::NEG_INFINITY,
                0.0,
                -0.0,
                1e-45,
                -1e-45,
                f32::MAX,
                f32::MIN,
                normal,
                normal,
            ][(draw % 12) as usize],
            // Masked: all but a few are -inf, less than any number of choices.
            5 => {
                if expert % 61 == 3 {
                    normal
                } else {
                    f32::NEG_INFINITY
                }
            }
            // No numbers at all but one.
            6 => {
                if expert == e / 2 {
                    -1.0
                } else {
                    f32::NAN
                }
            }
            // The largest in one lane of a warp.
            7 => {
                if expert % 32 == 5 {
                    10.0 + normal
                } else {
                    normal
                }
            }
            // Ascending: the largest are neighbours.
            8 => expert as f32 * 0.5 - 20.0,
            // Zeros of both signs only.
            9 => {
                if draw % 2 == 0 {
                    0.0
                } else {
                    -0.0
                }
            }
            _ => normal,
        }
    })
}

/// Output prefilled with 0xA5, some elements longer than needed.
const GUARD: u64 = 37;

/// Where rows start: contiguous and aligned, or `pitch` more than `e` apart from element `offset` on.
#[derive(Clone, Copy, Debug)]
struct Layout {
    pitch: u64,
    offset: u64,
}

/// Run the op on a copy of `scores` in this layout.
fn launch(device: &Device, scores: &[f32], shape: (u64, u64, u64), layout: Layout) -> Result<Vec<i64>, String> {
    let (t, e, k) = shape;
    let stride = e + layout.pitch;
    let mut spread = vec![f32::NAN; (layout.offset + t * stride) as usize];
    for (to, from) in
        spread[layout.offset as usize..].chunks_exact_mut(stride.max(1) as usize).zip(scores.chunks_exact(e.max(1) as usize))
    {
        to[..e as usize].copy_from_slice(from);
    }
    let stream = device.stream().map_err(text)?;
    let on_device = device.upload(&spread).map_err(text)?;
    let mut idx = device.alloc::<i64>((t * k + GUARD) as usize).map_err(text)?;
    idx.fill_bytes(0xA5).map_err(text)?;
    let args = Args {
        scores: on_device.strided(&[t, e], &[stride, 1], layout.offset).map_err(text)?,
        topk_idx: idx.tensor_mut(&[t, k]).map_err(text)?,
    };
    topk_gate(&stream, args).map_err(text)?;
    stream.synchronize().map_err(text)?;
    idx.to_vec().map_err(text)
}

fn check(device: &Device, scores: &[f32], shape: (u64, u64, u64), layout: Layout, name: &str) -> Result<(), String> {
    let (t, e, k) = shape;
    let expected = reference(scores, e as usize, k as usize);
    let got = launch(device, scores, shape, layout)?;
    untouched("topk_idx", name, &[t, k], &[k, 1], &got, 0xA5)?;
    equal("topk_idx", name, &[t, k], &got[..(t * k) as usize], &expected)
}

const ALIGNED: Layout = Layout { pitch: 0, offset: 0 };

fn run(ctx: &Ctx) -> Result<Report, String> {
    let device = &ctx.device;
    for shape in cases(ctx.depth) {
        let (t, e, k) = shape;
        let name = format!("e={e},k={k},t={t}");
        if !ctx.case(&name) {
            continue;
        }
        let data = scores(Rng::named(&name), t, e);
        check(device, &data, shape, ALIGNED, &name)?;
        // Rows with gaps, and rows at odd addresses.
        for layout in [Layout { pitch: 4, offset: 4 }, Layout { pitch: 3, offset: 1 }] {
            check(device, &data, shape, layout, &format!("{name},{layout:?}"))?;
        }
    }
    let notes = golden::check_cases(ctx, &["topk_gate"], |golden, case| check_golden(device, golden, case))?;
    if ctx.case("deterministic") {
        let (shape, data) = ((33, 256, 8), scores(Rng::new(7), 33, 256));
        let (first, second) = (launch(device, &data, shape, ALIGNED)?, launch(device, &data, shape, ALIGNED)?);
        equal("topk_idx of a second run", "deterministic", &[first.len() as u64], &second, &first)?;
    }
    if !device.is_emulator() && ctx.case("graph") {
        check_graph(device)?;
    }
    Ok(Report { notes, ..ctx.report() })
}

fn check_golden(device: &Device, golden: &Golden, case: &Case) -> Result<(), String> {
    let k: u64 = case.param("num_topk")?;
    let input = golden.tensor(case, "in/scores")?;
    let expected: Vec<i64> = golden.tensor(case, "out/")?.to_vec()?;
    let data: Vec<f32> = input.to_vec()?;
    let (t, e) = (input.shape[0], input.shape[1]);
    equal("reference", &case.name(), &[t, k], &reference(&data, e as usize, k as usize), &expected)?;
    let got = launch(device, &data, (t, e, k), ALIGNED)?;
    equal("topk_idx", &case.name(), &[t, k], &got[..(t * k) as usize], &expected)
}

/// A captured launch does its work at every replay, on the data that are there then.
fn check_graph(device: &Device) -> Result<(), String> {
    let (t, e, k) = (100, 256, 8);
    let stream = device.stream().map_err(text)?;
    let mut input = device.zeros::<f32>((t * e) as usize).map_err(text)?;
    let mut idx = device.zeros::<i64>((t * k) as usize).map_err(text)?;
    let mut run =
        |stream: &Stream| topk_gate(stream, Args { scores: input.tensor(&[t, e])?, topk_idx: idx.tensor_mut(&[t, k])? });
    // Compiled before the capture.
    run(&stream).map_err(text)?;
    let graph = stream.capture(run).map_err(text)?;
    for seed in 0..3 {
        let data = scores(Rng::new(seed), t, e);
        input.copy_from(&data).map_err(text)?;
        idx.fill_bytes(0xA5).map_err(text)?;
        graph.launch(&stream).map_err(text)?;
        stream.synchronize().map_err(text)?;
        let expected = reference(&data, e as usize, k as usize);
        equal("topk_idx", &format!("graph, replay {seed}"), &[t, k], &idx.to_vec().map_err(text)?, &expected)?;
    }
    Ok(())
}

/// The peers' cases, those of the peers' own benchmark, and small ones.
pub fn bench() -> Vec<Row> {
    let row = |t: u64, e: u64, k: u64| Row {
        op: "topk_gate",
        case: format!("e={e},k={k},t={t}"),
        bytes: 4 * t * e + 8 * t * k,
        build: Box::new(move |device, _| {
            let rng = Rng::new(t * e);
            // Uniform, as the peers' data are.
            let data = rng.fill((t * e) as usize, |rng, i| rng.unit(i));
            let input = device.upload(&data).map_err(text)?;
            let mut idx = device.zeros::<i64>((t * k) as usize).map_err(text)?;
            Ok(Box::new(move |stream| {
                let args = Args { scores: input.tensor(&[t, e])?, topk_idx: idx.tensor_mut(&[t, k])? };
                topk_gate(stream, args)
            }))
        }),
    };
    let mut rows = vec![row(8001, 256, 8), row(8001, 384, 6), row(8001, 72, 6)];
    rows.extend([1, 16, 128].map(|t| row(t, 256, 8)));
    rows.extend([row(65536, 256, 8), row(8001, 1024, 8), row(8001, 256, 32)]);
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferrotile::{Buffer, Error};
    use proptest::prelude::{ProptestConfig, prop_assert_eq, proptest};

    #[test]
    fn suite() {
        SUITE.test();
    }

    #[test]
    fn reference_is_the_definition() {
        let row = [1.0, f32::NAN, 3.0, -0.0, 3.0, 0.0, f32::NEG_INFINITY, f32::INFINITY];
        assert_eq!(reference(&row, 8, 8), [7, 2, 4, 0, 3, 5, 6, 1]);
    }

    /// A call that is given scores and room for indices.
    type Call<'a> = &'a dyn Fn(&Buffer<f32>, &mut Buffer<i64>, &Stream) -> ferrotile::Result<()>;

    /// Its error, and what the room for indices holds afterwards.
    fn call(f: Call) -> (Option<Error>, Vec<i64>) {
        let device = Device::emulator();
        let scores = device.upload(&[1.0f32; 64]).unwrap();
        let mut idx = device.upload(&[-7i64; 16]).unwrap();
        let result = f(&scores, &mut idx, &device.stream().unwrap());
        (result.err(), idx.to_vec().unwrap())
    }

    #[test]
    fn bad_input_is_refused_and_nothing_is_written() {
        let device = Device::emulator();
        let other = Device::emulator().checked();
        let refused = |what: &str, f: Call| {
            let (error, idx) = call(f);
            let error = error.unwrap_or_else(|| panic!("{what} was accepted"));
            assert!(error.to_string().starts_with("topk_gate: "), "{what}: {error}");
            assert_eq!(idx, [-7; 16], "{what}");
            error
        };
        macro_rules! shape {
            ($scores:expr, $idx:expr) => {
                &|s, i, stream| topk_gate(stream, Args { scores: s.tensor(&$scores)?, topk_idx: i.tensor_mut(&$idx)? })
            };
        }
        let e = refused("vector of scores", shape!([64], [4, 2]));
        assert!(matches!(e, Error::Shape { arg: "scores", .. }), "{e}");
        let e = refused("vector of indices", shape!([4, 16], [8]));
        assert!(matches!(e, Error::Shape { arg: "topk_idx", .. }), "{e}");
        let e = refused("another number of tokens", shape!([4, 16], [5, 2]));
        assert_eq!(e.to_string(), "topk_gate: topk_idx has shape [5, 2], expected [4, 2]");
        let e = refused("more choices than experts", shape!([8, 1], [8, 2]));
        assert_eq!(e.to_string(), "topk_gate: num_topk is 2, allowed: 0 to 1");
        let e = refused("33 choices", &|_, _, stream| {
            let s = device.zeros::<f32>(40)?;
            let mut i = device.zeros::<i64>(33)?;
            topk_gate(stream, Args { scores: s.tensor(&[1, 40])?, topk_idx: i.tensor_mut(&[1, 33])? })
        });
        assert!(matches!(e, Error::Value { arg: "num_topk", .. }), "{e}");
        let e = refused("f64 as i64", &|_, i, stream| {
            let s = device.zeros::<i32>(64)?;
            topk_gate(stream, Args { scores: s.tensor(&[4, 16])?, topk_idx: i.tensor_mut(&[4, 2])? })
        });
        assert!(matches!(e, Error::DType { arg: "scores", .. }), "{e}");
        let e = refused("32-bit indices", &|s, _, stream| {
            let mut i = device.zeros::<i32>(8)?;
            topk_gate(stream, Args { scores: s.tensor(&[4, 16])?, topk_idx: i.tensor_mut(&[4, 2])? })
        });
        assert!(matches!(e, Error::DType { arg: "topk_idx", .. }), "{e}");
        let e = refused("columns of scores", &|s, i, stream| {
            topk_gate(stream, Args { scores: s.strided(&[4, 8], &[1, 4], 0)?, topk_idx: i.tensor_mut(&[4, 2])? })
        });
        assert!(matches!(e, Error::Layout { arg: "scores", .. }), "{e}");
        let e = refused("rows of indices with gaps", &|s, i, stream| {
            topk_gate(stream, Args { scores: s.tensor(&[4, 16])?, topk_idx: i.strided_mut(&[4, 2], &[4, 1], 0)? })
        });
        assert!(matches!(e, Error::Layout { arg: "topk_idx", .. }), "{e}");
        let e = refused("scores elsewhere", &|_, i, stream| {
            let s = other.zeros::<f32>(64)?;
            topk_gate(stream, Args { scores: s.tensor(&[4, 16])?, topk_idx: i.tensor_mut(&[4, 2])? })
        });
        assert!(matches!(e, Error::DeviceMismatch { arg: "scores", .. }), "{e}");
        let e = refused("indices over scores", &|s, _, stream| {
            // SAFETY: refused before anything is written.
            let idx = unsafe { ferrotile::TensorMut::from_raw(&device, s.as_ptr(), ferrotile::DType::I64, &[4, 2], &[2, 1])? };
            topk_gate(stream, Args { scores: s.tensor(&[4, 16])?, topk_idx: idx })
        });
        assert!(matches!(e, Error::Overlap { a: "scores", b: "topk_idx", .. }), "{e}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn any_shape_stride_and_value(
            t in 0u64..20, e in 1u64..300, k in 1u64..33, pitch in 0u64..9, offset in 0u64..9, seed: u64, levels in 1u64..2000,
        ) {
            let k = k.min(e);
            let data = Rng::new(seed).fill((t * e) as usize, |rng, i| match rng.below(i, levels) {
                0 => f32::from_bits(rng.stream(1).bits(i) as u32),
                v => v as f32 - levels as f32 / 2.0,
            });
            let layout = Layout { pitch, offset };
            let name = format!("e={e},k={k},t={t},{layout:?},seed={seed},levels={levels}");
            prop_assert_eq!(check(&Device::emulator(), &data, (t, e, k), layout, &name), Ok(()));
        }
    }
}
