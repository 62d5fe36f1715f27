//! normalize_weight: reference, cases, checks and benchmark.

use super::common_route::{PAIRS, grid, inside, moe, prefilled, uploaded};
use crate::support::bench::Row;
use crate::support::cases::{Depth, MoeCase};
use crate::support::compare::{allclose, equal};
use crate::support::golden::{self, Case, Golden, Peer};
use crate::support::rng::Rng;
use crate::support::suite::{Ctx, Report, Suite, text};
use ferrotile::moe::normalize_weight::{Args, SumOrder, normalize_weight};
use ferrotile::{Buffer, Device, Stream};
use rayon::prelude::*;

/// The checks of this op.
pub const SUITE: Suite = Suite { op: "normalize_weight", run };

const ORDERS: [SumOrder; 2] = [SumOrder::Sequential, SumOrder::Tree];

/// The sum of a row.
fn sum(row: &[f32], order: SumOrder) -> f32 {
    match order {
        SumOrder::Sequential => row.iter().fold(1e-20, |sum, w| sum + w),
        SumOrder::Tree => {
            let mut a = row.to_vec();
            for distance in [16, 8, 4, 2, 1] {
                for j in 0..a.len() {
                    if j & distance == 0 && j + distance < a.len() {
                        a[j] += a[j + distance];
                    }
                }
            }
            1e-20 + a.first().unwrap_or(&0.0)
        }
    }
}

/// Denominators and quotients, every NaN the same.
fn reference(weights: &[f32], t: u64, k: u64, order: SumOrder) -> (Vec<f32>, Vec<f32>) {
    let number = |v: f32| if v.is_nan() { f32::NAN } else { v };
    let row = |t: u64| &weights[(t * k) as usize..((t + 1) * k) as usize];
    let sums: Vec<f32> = (0..t).into_par_iter().map(|t| sum(row(t), order)).collect();
    let quotient = |i: usize| number(weights[i] / sums[i / k as usize]);
    let quotients = (0..weights.len()).into_par_iter().map(quotient).collect();
    (sums.iter().map(|sum| number(*sum)).collect(), quotients)
}

/// Weights 0, 4 and 5 of rows whose others are 0. The vector of 4 that holds the first one has no negative weight, yet its sum is
const CANCELLING: [[f32; 3]; 9] = [
    // 0 from left to right, 1e-20 in a tree;
    [1.0, -1.0, 0.0],
    // negative from left to right, 0 in a tree;
    [1.0, -1.0, -1e-20],
    // tiny from left to right;
    [1.0, -1.0, 1e-30],
    // tiny in a tree;
    [1.0, -1.0, -9.999_99e-21],
    // negative;
    [1.0, -3.0, 0.0],
    // or so small that quotients are large: the largest weight of the short division by its least sum, in a tree;
    [MOST, -MOST, 0.0],
    // a larger one;
    [2.0 * MOST, -2.0 * MOST, 1e-20],
    // quotients far above 1;
    [0.5 * MOST, -0.5 * MOST, 1e-9],
    // quotients that overflow.
    [MOST * MOST, -MOST * MOST, 1e-9],
];

/// 2^60.
const MOST: f32 = 1.152_921_5e18;

/// Weights whose rows take turns: uniform ones, and kinds at the edges of the format.
fn weights(rng: Rng, t: u64, k: u64) -> Vec<f32> {
    rng.fill((t * k) as usize, |rng, i| {
        let (row, unit, draw) = (i / k, rng.unit(i), rng.stream(1).below(i, 100));
        match row % 22 {
            1 => 0.0,
            // Of both signs, so that sums cancel.
            2 => rng.normal(i),
            3 => [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1.0, 0.0][(draw % 6) as usize],
            // One infinity in ten, the rest finite.
            4 if draw < 10 => f32::INFINITY,
            // Sums overflow.
            5 => f32::MAX * unit,
            6 => f32::from_bits(1 + draw as u32),
            // Beside the 1e-20.
            7 => 1e-20 * (unit - 0.5),
            8 => [-0.0, 0.0, -1e-20][(draw % 3) as usize],
            // Zeros among ordinary weights.
            9 if draw < 50 => 0.0,
            // The sum of two has a mantissa of ones only.
            10 => [1.0, 1.0 - f32::EPSILON][(i % k % 2) as usize] * if i % k < 2 { 1.0 } else { 0.0 },
            // Around the least weight, and the largest sum, of the short division.
            11 => 2f32.powi(-60) * [unit, 1.0, 1.0 - f32::EPSILON, 4.0][(draw % 4) as usize],
            12 => MOST / k as f32 * [unit, 1.0, 0.0, 1.0 + f32::EPSILON][(draw % 4) as usize],
            kind @ 13.. => {
                let [first, fifth, sixth] = CANCELLING[kind as usize - 13];
                match i % k {
                    0 => first,
                    4 => fifth,
                    5 => sixth,
                    _ => 0.0,
                }
            }
            _ => unit,
        }
    })
}

/// Everything a launch needs. The weights start at one offset, the outputs at another.
struct Buffers {
    weights: Buffer<f32>,
    denominator: Buffer<f32>,
    normalized: Buffer<f32>,
    shape: [u64; 2],
    offsets: [u64; 2],
}

impl Buffers {
    fn new(device: &Device, weights: &[f32], shape: [u64; 2], offsets: [u64; 2]) -> Result<Self, String> {
        Ok(Self {
            weights: uploaded(device, weights, offsets[0])?,
            denominator: prefilled(device, shape[0], offsets[1])?,
            normalized: prefilled(device, shape[0] * shape[1], offsets[1])?,
            shape,
            offsets,
        })
    }

    fn call(&mut self, stream: &Stream, order: SumOrder) -> ferrotile::Result<()> {
        let ([t, k], [from, to]) = (self.shape, self.offsets);
        let args = Args {
            topk_weights: self.weights.strided(&[t, k], &[k, 1], from)?,
            order,
            denominator: self.denominator.strided_mut(&[t], &[1], to)?,
            normalized: self.normalized.strided_mut(&[t, k], &[k.max(1), 1], to)?,
        };
        normalize_weight(stream, args)
    }

    fn read(&self, name: &str) -> Result<(Vec<f32>, Vec<f32>), String> {
        let [t, k] = self.shape;
        Ok((
            inside("denominator", name, &self.denominator, t, self.offsets[1])?,
            inside("normalized", name, &self.normalized, t * k, self.offsets[1])?,
        ))
    }
}

fn launch(
    device: &Device,
    data: &[f32],
    shape: [u64; 2],
    offsets: [u64; 2],
    order: SumOrder,
    name: &str,
) -> Result<(Vec<f32>, Vec<f32>), String> {
    let stream = device.stream().map_err(text)?;
    let mut buffers = Buffers::new(device, data, shape, offsets)?;
    buffers.call(&stream, order).map_err(text)?;
    stream.synchronize().map_err(text)?;
    buffers.read(name)
}

fn compare(name: &str, [t, k]: [u64; 2], got: &(Vec<f32>, Vec<f32>), expected: &(Vec<f32>, Vec<f32>)) -> Result<(), String> {
    equal("denominator", name, &[t], &got.0, &expected.0)?;
    equal("normalized", name, &[t, k], &got.1, &expected.1)
}

fn check(device: &Device, data: &[f32], [t, k]: [u64; 2], offsets: [u64; 2], order: SumOrder, name: &str) -> Result<(), String> {
    let got = launch(device, data, [t, k], offsets, order, name)?;
    compare(name, [t, k], &got, &reference(data, t, k, order))
}

fn run(ctx: &Ctx) -> Result<Report, String> {
    let device = &ctx.device;
    for case in grid(ctx.depth) {
        if !ctx.case(&case.name()) {
            continue;
        }
        let (k, rng) = (case.num_topk, Rng::named(&case.name()));
        let t = case.topk_idx().len() as u64 / k;
        // Uniform, as in moe.md.
        let data = rng.fill((t * k) as usize, |rng, i| rng.unit(i));
        for order in ORDERS {
            check(device, &data, [t, k], [0, 0], order, &format!("{},{order:?}", case.name()))?;
        }
        // The bound that 2.1.0 holds itself to, against the plain sum and quotient.
        let (_, got) = launch(device, &data, [t, k], [0, 0], SumOrder::Tree, &case.name())?;
        let plain: Vec<f32> = data
            .chunks(k as usize)
            .flat_map(|row| {
                let sum = row.iter().map(|w| f64::from(*w)).sum::<f64>() + 1e-20;
                row.iter().map(move |w| (f64::from(*w) / sum) as f32)
            })
            .collect();
        allclose("normalized", &case.name(), &[t, k], &got, &plain, (2e-6, 0.0))?;
    }
    let lengths = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 16, 17, 20, 31, 32, 33, 70];
    let tokens: &[u64] = if ctx.depth == Depth::Full { &[0, 1, 37, 131, 8001] } else { &[0, 1, 37, 131] };
    for k in lengths {
        for &t in tokens {
            let name = format!("k={k},t={t}");
            if !ctx.case(&name) {
                continue;
            }
            let data = weights(Rng::named(&name), t, k);
            for order in ORDERS {
                if order == SumOrder::Tree && k > 32 {
                    continue;
                }
                for offsets in [[0, 0], [4, 0], [1, 4], [4, 3]] {
                    check(device, &data, [t, k], offsets, order, &format!("{name},{order:?},{offsets:?}"))?;
                }
            }
        }
    }
    let notes = golden::check_cases(ctx, &["normalize_weight"], |golden, case| check_golden(device, golden, case))?;
    if !device.is_emulator() && ctx.case("graph") {
        check_graph(device)?;
    }
    Ok(Report { notes, ..ctx.report() })
}

/// Each release adds in its own order.
fn check_golden(device: &Device, golden: &Golden, case: &Case) -> Result<(), String> {
    let name = case.name();
    let input = golden.tensor(case, "in/topk_weights")?;
    let data: Vec<f32> = input.to_vec()?;
    let (t, k) = (input.shape[0], input.shape[1]);
    let order = if case.peer == Peer::V1 { SumOrder::Sequential } else { SumOrder::Tree };
    let expected = (golden.tensor(case, "out/0")?.to_vec()?, golden.tensor(case, "out/1")?.to_vec()?);
    compare(&format!("reference, {name}"), [t, k], &reference(&data, t, k, order), &expected)?;
    compare(&name, [t, k], &launch(device, &data, [t, k], [0, 0], order, &name)?, &expected)
}

/// A captured launch of each kernel does its work at every replay, on the data that are there then.
fn check_graph(device: &Device) -> Result<(), String> {
    let stream = device.stream().map_err(text)?;
    for k in [8, 9, 20] {
        for order in ORDERS {
            let shape = [300, k];
            let mut buffers = Buffers::new(device, &weights(Rng::new(0), 300, k), shape, [0, 0])?;
            // Compiled before the capture.
            buffers.call(&stream, order).map_err(text)?;
            let graph = stream.capture(|stream| buffers.call(stream, order)).map_err(text)?;
            for seed in 1..4 {
                let (name, data) = (format!("graph,k={k},{order:?},replay {seed}"), weights(Rng::new(seed), 300, k));
                let mut all = buffers.weights.to_vec().map_err(text)?;
                all[..data.len()].copy_from_slice(&data);
                buffers.weights.copy_from(&all).map_err(text)?;
                graph.launch(&stream).map_err(text)?;
                stream.synchronize().map_err(text)?;
                compare(&name, shape, &buffers.read(&name)?, &reference(&data, 300, k, order))?;
            }
        }
    }
    Ok(())
}

/// The peers' case, those of the peers' own benchmark, small ones, and rows of other lengths.
pub fn bench() -> Vec<Row> {
    let row = |t: u64, k: u64, case: String, order: SumOrder| Row {
        op: "normalize_weight",
        case,
        bytes: 8 * t * k + 4 * t,
        build: Box::new(move |device, _| {
            let data = Rng::new(t * k).fill((t * k) as usize, |rng, i| rng.unit(i));
            let mut buffers = Buffers::new(device, &data, [t, k], [0, 0])?;
            Ok(Box::new(move |stream| buffers.call(stream, order)))
        }),
    };
    let routed = |case: MoeCase| {
        let MoeCase { num_send_tokens, num_topk, num_experts, num_ranks } = case;
        let t = case.topk_idx().len() as u64 / num_topk;
        let name = format!("e={num_experts},ep={num_ranks},k={num_topk},send={num_send_tokens}");
        row(t, num_topk, name, SumOrder::Sequential)
    };
    let mut rows: Vec<Row> =
        [32768, 1, 16, 128].map(|t| row(t, 8, format!("k=8,t={t}"), SumOrder::Sequential)).into_iter().collect();
    rows.push(row(32768, 8, "k=8,order=tree,t=32768".to_owned(), SumOrder::Tree));
    rows.extend([2, 6, 9, 16, 32].map(|k| row(32768, k, format!("k={k},t=32768"), SumOrder::Sequential)));
    rows.extend(PAIRS.map(|(e, ep)| routed(moe(4001, 8, e, ep))));
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferrotile::{DType, Error, TensorMut, View};
    use proptest::prelude::{ProptestConfig, prop_assert_eq, proptest};

    #[test]
    fn suite() {
        SUITE.test();
    }

    #[test]
    fn reference_is_the_definition() {
        assert_eq!(reference(&[1.0, 3.0, 0.0, 0.0], 2, 2, SumOrder::Sequential), (vec![4.0, 1e-20], vec![0.25, 0.75, 0.0, 0.0]));
        // 2^24 swallows a 1 that comes alone, not the two that come together.
        let row = [16_777_216.0, 1.0, 0.0, 1.0];
        assert_eq!((sum(&row, SumOrder::Sequential), sum(&row, SumOrder::Tree)), (16_777_216.0, 16_777_218.0));
        assert_eq!(sum(&[], SumOrder::Tree), 1e-20);
    }

    /// Tensors to put where they do not belong.
    struct Spare {
        floats: Buffer<f32>,
        words: Buffer<i32>,
        elsewhere: Buffer<f32>,
    }

    type Spoil = for<'a> fn(&mut Args<'a>, &'a mut Spare) -> ferrotile::Result<()>;

    /// The error of a call whose arguments were right until `spoil` changed them.
    fn refused(what: &str, spoil: Spoil) -> Error {
        let device = Device::emulator();
        let weights = device.upload(&[1f32; 64]).unwrap();
        let (mut denominator, mut normalized) = (device.upload(&[-7f32; 16]).unwrap(), device.upload(&[-7f32; 64]).unwrap());
        let mut spare = Spare {
            floats: device.zeros(4000).unwrap(),
            words: device.zeros(4000).unwrap(),
            elsewhere: Device::emulator().checked().zeros(64).unwrap(),
        };
        let mut args = Args {
            topk_weights: weights.tensor(&[16, 4]).unwrap(),
            order: SumOrder::Sequential,
            denominator: denominator.tensor_mut(&[16]).unwrap(),
            normalized: normalized.tensor_mut(&[16, 4]).unwrap(),
        };
        spoil(&mut args, &mut spare).unwrap();
        let result = normalize_weight(&device.stream().unwrap(), args);
        let error = result.err().unwrap_or_else(|| panic!("{what} was accepted"));
        assert!(error.to_string().starts_with("normalize_weight: "), "{what}: {error}");
        assert_eq!((denominator.to_vec().unwrap(), normalized.to_vec().unwrap()), (vec![-7.0; 16], vec![-7.0; 64]), "{what}");
        error
    }

    /// Floats over another tensor.
    fn over<'a>(t: &View, shape: &[u64], strides: &[u64]) -> ferrotile::Result<TensorMut<'a>> {
        // SAFETY: the call that gets it is refused before anything is written.
        unsafe { TensorMut::from_raw(t.device(), t.ptr(), DType::F32, shape, strides) }
    }

    #[test]
    fn bad_input_is_refused_and_nothing_is_written() {
        // `$set` spoils the arguments `$a`, with the help of the tensors `$s`.
        macro_rules! refuse {
            ($what:literal, |$a:pat_param, $s:pat_param| $set:expr, $error:pat) => {
                let spoil: Spoil = |$a, $s| {
                    $set;
                    Ok(())
                };
                let error = refused($what, spoil);
                assert!(matches!(error, $error), "{}: {error:?}", $what);
            };
        }
        refuse!("a vector", |a, s| a.topk_weights = s.floats.tensor(&[64])?, Error::Shape { arg: "topk_weights", .. });
        refuse!("integers", |a, s| a.topk_weights = s.words.tensor(&[16, 4])?, Error::DType { arg: "topk_weights", .. });
        refuse!(
            "rows with gaps",
            |a, s| a.topk_weights = s.floats.strided(&[16, 4], &[5, 1], 0)?,
            Error::Layout { arg: "topk_weights", .. }
        );
        refuse!("15 sums", |a, s| a.denominator = s.floats.tensor_mut(&[15])?, Error::Shape { arg: "denominator", .. });
        refuse!("integer sums", |a, s| a.denominator = s.words.tensor_mut(&[16])?, Error::DType { arg: "denominator", .. });
        refuse!(
            "sums with gaps",
            |a, s| a.denominator = s.floats.strided_mut(&[16], &[2], 0)?,
            Error::Layout { arg: "denominator", .. }
        );
        refuse!("5 quotients", |a, s| a.normalized = s.floats.tensor_mut(&[16, 5])?, Error::Shape { arg: "normalized", .. });
        refuse!(
            "quotients with gaps",
            |a, s| a.normalized = s.floats.strided_mut(&[16, 4], &[5, 1], 0)?,
            Error::Layout { arg: "normalized", .. }
        );
        refuse!(
            "33 choices in a tree",
            |a, s| {
                a.order = SumOrder::Tree;
                a.topk_weights = s.floats.tensor(&[16, 33])?;
                a.normalized = over(&a.topk_weights, &[16, 33], &[33, 1])?;
            },
            Error::Value { arg: "num_topk", .. }
        );
        refuse!(
            "sums elsewhere",
            |a, s| a.denominator = s.elsewhere.tensor_mut(&[16])?,
            Error::DeviceMismatch { arg: "denominator", .. }
        );
        refuse!(
            "quotients over weights",
            |a, _| a.normalized = over(&a.topk_weights, &[16, 4], &[4, 1])?,
            Error::Overlap { a: "topk_weights", b: "normalized", .. }
        );
        refuse!(
            "sums over quotients",
            |a, _| a.denominator = over(&a.normalized, &[16], &[1])?,
            Error::Overlap { a: "denominator", b: "normalized", .. }
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn any_shape_place_and_value(
            t in 0u64..200, k in 0u64..33, tree: bool, from in 0u64..6, to in 0u64..6, seed: u64, bits: bool,
        ) {
            let data = Rng::new(seed).fill((t * k) as usize, |rng, i| if bits { f32::from_bits(rng.bits(i) as u32) } else { rng.unit(i) });
            let order = ORDERS[tree as usize];
            prop_assert_eq!(check(&Device::emulator(), &data, [t, k], [from, to], order, "random"), Ok(()));
        }
    }
}
