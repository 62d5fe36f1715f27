//! moe_topk_gate_backward: reference, cases, checks and benchmark.

use super::common_route::{inside, prefilled, uploaded};
use crate::support::bench::Row;
use crate::support::cases::{Depth, rows_apart};
use crate::support::compare::{allclose, equal};
use crate::support::golden::{self, Case, Golden};
use crate::support::rng::Rng;
use crate::support::suite::{Ctx, Report, Suite, ensure, text};
use ferrotile::moe::moe_topk_gate_backward::{Args, AuxGrad, moe_topk_gate_backward};
use ferrotile::{Buffer, Device, Stream};
use rayon::prelude::*;

/// The checks of this op.
pub const SUITE: Suite = Suite { op: "moe_topk_gate_backward", run };

const FACTOR: f32 = 1.5;

/// Everything that the op reads.
struct Inputs {
    scores: Vec<f32>,
    topk_idx: Vec<i64>,
    topk_weights: Vec<f32>,
    grad_topk_weights: Vec<f32>,
    factor: f32,
    /// Mask, gradients of the sums and number of sequences.
    aux: Option<(Vec<u8>, Vec<f32>, u64)>,
    t: u64,
    e: u64,
    k: u64,
}

/// The definition, in f64: gradients, and the largest term that one is a difference of.
fn reference(x: &Inputs) -> (Vec<f64>, f64) {
    let (e, k) = (x.e as usize, x.k as usize);
    let row = |t: usize| {
        let u: Vec<f64> = x.scores[t * e..(t + 1) * e].iter().map(|u| f64::from(*u)).collect();
        let of = |values: &[f32], slot: usize| f64::from(values[t * k + slot]);
        let valid: Vec<(usize, usize)> =
            (0..k).filter(|slot| x.topk_idx[t * k + slot] >= 0).map(|slot| (slot, x.topk_idx[t * k + slot] as usize)).collect();
        let denominator = valid.iter().map(|&(_, expert)| u[expert]).sum::<f64>() + 1e-20;
        let dot: f64 = valid.iter().map(|&(slot, _)| of(&x.grad_topk_weights, slot) * of(&x.topk_weights, slot)).sum();
        let (mut gradient, mut terms) = (vec![0.0; e], vec![0.0; e]);
        for &(slot, expert) in &valid {
            let scaled = f64::from(x.factor) * of(&x.grad_topk_weights, slot);
            gradient[expert] += (scaled - dot) / denominator;
            terms[expert] += scaled.abs().max(dot.abs()) / denominator;
        }
        if let Some((mask, sums, sequences)) = &x.aux {
            let sequence = t / (x.t / sequences) as usize;
            let h = &sums[sequence * e..(sequence + 1) * e];
            let total: f64 = u.iter().sum();
            if mask[t] != 0 && total > 0.0 {
                let mean = u.iter().zip(h).map(|(u, h)| u * f64::from(*h)).sum::<f64>() / total;
                for ((gradient, term), h) in gradient.iter_mut().zip(&mut terms).zip(h) {
                    *gradient += (f64::from(*h) - mean) / total;
                    *term += f64::from(h.abs()) / total;
                }
            }
        }
        let slope = |u: f64| if u == 0.0 { 0.0 } else { -(-u * u).exp_m1() / (2.0 * u) };
        let terms = u.iter().zip(terms).map(|(u, term)| slope(*u) * term).fold(0.0, f64::max);
        (u.into_iter().zip(gradient).map(|(u, gradient)| slope(u) * gradient).collect::<Vec<f64>>(), terms)
    };
    let rows: Vec<_> = (0..x.t as usize).into_par_iter().map(row).collect();
    let largest = rows.iter().fold(0.0, |largest: f64, row| largest.max(row.1));
    (rows.into_iter().flat_map(|row| row.0).collect(), largest)
}

/// How the experts of a token were chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Routing {
    /// The largest scores.
    Best,
    /// Different ones at random.
    Fixed,
    /// At random with repeats, some of them -1.
    Repeats,
}

/// As a forward pass leaves them. The last `pad` tokens of each of `sequences` sequences are masked.
fn inputs(rng: Rng, (tokens, pad, sequences): (u64, u64, u64), (e, k): (u64, u64), aux: bool, routing: Routing) -> Inputs {
    let (n, t) = (tokens + pad, sequences * (tokens + pad));
    let masked = |token: u64| token % n.max(1) >= tokens;
    let scores = rng.fill((t * e) as usize, |rng, i| {
        // Every eleventh token has logits far apart: scores between 0 and 10.
        let scale = if (i / e) % 11 == 5 { 20.0 } else { 1.0 };
        let x = f64::from(rng.normal(i) * scale);
        let softplus = if x > 20.0 { x } else { x.exp().ln_1p() };
        if masked(i / e) { 0.0 } else { softplus.sqrt() as f32 }
    });
    let choose = |token: u64| -> Vec<i64> {
        let row = &scores[(token * e) as usize..((token + 1) * e) as usize];
        let mut order: Vec<i64> = (0..e as i64).collect();
        match routing {
            _ if masked(token) => return vec![-1; k as usize],
            Routing::Best => order.sort_by(|a, b| row[*b as usize].total_cmp(&row[*a as usize])),
            Routing::Fixed => order.sort_by_key(|expert| rng.stream(1).bits(token * e + *expert as u64)),
            Routing::Repeats => {
                let few = e.min(k + 2);
                let draw = |slot: u64| rng.stream(2).below(token * k + slot, few + 1) as i64 - 1;
                return (0..k).map(draw).collect();
            }
        }
        order.truncate(k as usize);
        order
    };
    let topk_idx: Vec<i64> = (0..t).into_par_iter().flat_map_iter(choose).collect();
    let score = |slot: usize| match topk_idx[slot] {
        -1 => 0.0,
        expert => scores[slot / k as usize * e as usize + expert as usize],
    };
    let weight = |slot: usize| {
        let first = slot - slot % k as usize;
        let sum: f32 = (first..first + k as usize).map(score).sum();
        score(slot) / (sum + 1e-20) * FACTOR
    };
    let topk_weights = (0..topk_idx.len()).map(weight).collect();
    let grad_topk_weights = rng.stream(3).normal_f32(topk_idx.len());
    let mask = || (0..t).map(|token| if masked(token) { 0 } else { 1 + (token % 255) as u8 }).collect();
    let aux = aux.then(|| (mask(), rng.stream(4).normal_f32((sequences * e) as usize), sequences));
    Inputs { scores, topk_idx, topk_weights, grad_topk_weights, factor: FACTOR, aux, t, e, k }
}

/// Where tensors start, and how far apart rows of choices lie beyond `k`.
#[derive(Clone, Copy, Debug)]
struct Layout {
    offset: u64,
    gap: u64,
}

const PLAIN: Layout = Layout { offset: 0, gap: 0 };

/// Everything a launch needs.
struct Buffers {
    scores: Buffer<f32>,
    topk_idx: Buffer<i64>,
    topk_weights: Buffer<f32>,
    grad_topk_weights: Buffer<f32>,
    aux: Option<(Buffer<u8>, Buffer<f32>, u64)>,
    grad_logits: Buffer<f32>,
    factor: f32,
    sizes: [u64; 3],
    layout: Layout,
}

impl Buffers {
    fn new(device: &Device, x: &Inputs, layout: Layout) -> Result<Self, String> {
        let Layout { offset, gap } = layout;
        let stride = x.k + gap;
        let choices = |values: &[f32]| device.upload(&rows_apart(values, x.k, (stride, offset), f32::NAN)).map_err(text);
        let aux = match &x.aux {
            Some((mask, sums, sequences)) => Some((uploaded(device, mask, offset)?, uploaded(device, sums, offset)?, *sequences)),
            None => None,
        };
        Ok(Self {
            scores: uploaded(device, &x.scores, offset)?,
            topk_idx: device.upload(&rows_apart(&x.topk_idx, x.k, (stride, offset), i64::MAX)).map_err(text)?,
            topk_weights: choices(&x.topk_weights)?,
            grad_topk_weights: choices(&x.grad_topk_weights)?,
            aux,
            grad_logits: prefilled(device, x.t * x.e, offset)?,
            factor: x.factor,
            sizes: [x.t, x.e, x.k],
            layout,
        })
    }

    fn call(&mut self, stream: &Stream) -> ferrotile::Result<()> {
        let ([t, e, k], Layout { offset, gap }) = (self.sizes, self.layout);
        let (dense, choices) = ([e, 1], [k + gap, 1]);
        let aux = match &self.aux {
            Some((mask, sums, sequences)) => Some(AuxGrad {
                mask: mask.strided(&[t], &[1], offset)?,
                grad_scores_sum: sums.strided(&[*sequences, e], &dense, offset)?,
            }),
            None => None,
        };
        let args = Args {
            scores: self.scores.strided(&[t, e], &dense, offset)?,
            topk_idx: self.topk_idx.strided(&[t, k], &choices, offset)?,
            topk_weights: self.topk_weights.strided(&[t, k], &choices, offset)?,
            grad_topk_weights: self.grad_topk_weights.strided(&[t, k], &choices, offset)?,
            routed_scaling_factor: self.factor,
            aux,
            grad_logits: self.grad_logits.strided_mut(&[t, e], &[e.max(1), 1], offset)?,
        };
        moe_topk_gate_backward(stream, args)
    }

    fn read(&self, name: &str) -> Result<Vec<f32>, String> {
        let [t, e, _] = self.sizes;
        inside("grad_logits", name, &self.grad_logits, t * e, self.layout.offset)
    }
}

fn launch(device: &Device, x: &Inputs, layout: Layout, name: &str) -> Result<Vec<f32>, String> {
    let stream = device.stream().map_err(text)?;
    let mut buffers = Buffers::new(device, x, layout)?;
    buffers.call(&stream).map_err(text)?;
    stream.synchronize().map_err(text)?;
    buffers.read(name)
}

/// Within the bounds that 2.1.0 holds itself to, and exactly 0 in rows of zeros. Where all gradients are differences of equal terms, those
/// bounds are 0, and a few roundings of the terms remain.
fn compare(x: &Inputs, got: &[f32], (expected, term): &(Vec<f64>, f64), name: &str) -> Result<(), String> {
    let largest = expected.iter().fold(0.0, |largest: f64, v| largest.max(v.abs()));
    let atol = (1e-5 * largest).max(5e-7 * term);
    allclose("grad_logits", name, &[x.t, x.e], got, expected, (atol, 1e-5))?;
    let e = x.e.max(1) as usize;
    for (token, (row, scores)) in got.chunks(e).zip(x.scores.chunks(e)).enumerate() {
        let bad = row.iter().position(|v| v.to_bits() == 1 << 31 || scores.iter().all(|u| *u == 0.0) && *v != 0.0);
        ensure(bad.is_none(), || format!("grad_logits: -0.0 or not 0 at [{token}, {}]; {name}", bad.unwrap_or(0)))?;
    }
    Ok(())
}

fn check(device: &Device, x: &Inputs, layout: Layout, name: &str) -> Result<(), String> {
    compare(x, &launch(device, x, layout, name)?, &reference(x), name)
}

/// Experts and choices of moe.md.
const GRID: [(u64, u64); 10] = [(256, 8), (72, 6), (32, 6), (64, 6), (96, 6), (16, 6), (36, 6), (108, 6), (128, 6), (144, 6)];

/// Others: no choice, one expert, rows of any length, rows longer than registers hold, choices beyond a few.
const ODD: [(u64, u64); 9] = [(5, 0), (1, 1), (33, 7), (37, 32), (257, 8), (260, 9), (384, 6), (1001, 8), (1024, 32)];

fn run(ctx: &Ctx) -> Result<Report, String> {
    let device = &ctx.device;
    let full = ctx.depth == Depth::Full;
    let tokens: &[u64] = if full { &[0, 1, 512, 8001] } else { &[0, 1, 11] };
    for &t in tokens {
        for (e, k) in GRID.iter().chain(&ODD).copied() {
            let odd = ODD.contains(&(e, k));
            if odd && t > 1000 {
                continue;
            }
            for (pad, sequences) in [(0, 1), (10, 1), (10, 2)] {
                // One padded token more than in a block would be the same again on the emulator.
                let pad = if full { pad } else { pad / 4 };
                for aux in [false, true] {
                    for routing in [Routing::Best, Routing::Fixed, Routing::Repeats] {
                        if t > 1000 && e != 256 && routing != Routing::Best {
                            continue;
                        }
                        let name = format!("e={e},k={k},t={t},pad={pad},q={sequences},aux={aux},{routing:?}");
                        if !ctx.case(&name) {
                            continue;
                        }
                        let x = inputs(Rng::named(&name), (t, pad, sequences), (e, k), aux, routing);
                        check(device, &x, PLAIN, &name)?;
                        if pad > 0 && sequences == 1 && t < 1000 {
                            for layout in [Layout { offset: 4, gap: 2 }, Layout { offset: 3, gap: 0 }] {
                                check(device, &x, layout, &format!("{name},{layout:?}"))?;
                            }
                        }
                    }
                }
            }
        }
    }
    if ctx.case("masked tokens with scores and choices") {
        // As no forward pass leaves them: the mask is about the second gradient alone.
        let mut x = inputs(Rng::new(5), (40, 0, 2), (64, 6), true, Routing::Best);
        if let Some((mask, ..)) = &mut x.aux {
            mask.iter_mut().step_by(3).for_each(|mask| *mask = 0);
        }
        check(device, &x, PLAIN, "masked tokens with scores and choices")?;
    }
    if ctx.case("counted tokens without scores") {
        // As the forward pass leaves tokens that were routed at random.
        let mut x = inputs(Rng::new(6), (20, 0, 1), (64, 6), true, Routing::Best);
        for token in (0..20).step_by(2) {
            x.scores[token * 64..(token + 1) * 64].fill(0.0);
            x.topk_idx[token * 6..(token + 1) * 6].fill(-1);
            // What stands beside -1 means nothing.
            x.grad_topk_weights[token * 6..(token + 1) * 6].fill(f32::NAN);
        }
        check(device, &x, PLAIN, "counted tokens without scores")?;
    }
    if ctx.case("deterministic") {
        for aux in [false, true] {
            let x = inputs(Rng::new(7), (300, 3, 1), (256, 8), aux, Routing::Repeats);
            let (first, second) = (launch(device, &x, PLAIN, "first")?, launch(device, &x, PLAIN, "second")?);
            equal("grad_logits of a second run", "deterministic", &[x.t, x.e], &second, &first)?;
            // Other kernels compute the same sums in another order, but without the loss there are none over a row.
            if !aux {
                let third = launch(device, &x, Layout { offset: 1, gap: 1 }, "third")?;
                equal("grad_logits of rows elsewhere", "deterministic", &[x.t, x.e], &third, &first)?;
            }
        }
    }
    let notes = golden::check_cases(ctx, &["moe_topk_gate"], |golden, case| check_golden(device, golden, case))?;
    if !device.is_emulator() && ctx.case("graph") {
        check_graph(device)?;
    }
    Ok(Report { notes, ..ctx.report() })
}

/// Gradients of 2.1.0, which uses approximate instructions, from the scores, choices and weights that it computed.
fn check_golden(device: &Device, golden: &Golden, case: &Case) -> Result<(), String> {
    let name = case.name();
    if !golden.keys(case).iter().any(|key| key == "out/grad_logits") {
        return Ok(());
    }
    let scores = golden.tensor(case, "out/scores")?;
    let topk_idx = golden.tensor(case, "out/topk_idx")?;
    let x = Inputs {
        scores: scores.to_vec()?,
        topk_idx: topk_idx.to_vec()?,
        topk_weights: golden.tensor(case, "out/topk_weights")?.to_vec()?,
        grad_topk_weights: golden.tensor(case, "in/grad_topk_weights")?.to_vec()?,
        factor: case.param("routed_scaling_factor")?,
        aux: None,
        t: scores.shape[0],
        e: scores.shape[1],
        k: topk_idx.shape[1],
    };
    let theirs: Vec<f32> = golden.tensor(case, "out/grad_logits")?.to_vec()?;
    let expected = reference(&x);
    compare(&x, &theirs, &expected, &format!("reference, {name}"))?;
    compare(&x, &launch(device, &x, PLAIN, &name)?, &expected, &name)
}

/// A captured launch does its work at every replay, on the data that are there then.
fn check_graph(device: &Device) -> Result<(), String> {
    let stream = device.stream().map_err(text)?;
    for aux in [false, true] {
        let make = |seed| inputs(Rng::new(seed), (100, 3, 1), (256, 8), aux, Routing::Best);
        let mut buffers = Buffers::new(device, &make(0), PLAIN)?;
        // Compiled before the capture.
        buffers.call(&stream).map_err(text)?;
        let graph = stream.capture(|stream| buffers.call(stream)).map_err(text)?;
        for seed in 1..4 {
            let x = make(seed);
            let mut scores = buffers.scores.to_vec().map_err(text)?;
            scores[..x.scores.len()].copy_from_slice(&x.scores);
            buffers.scores.copy_from(&scores).map_err(text)?;
            buffers.topk_idx.copy_from(&x.topk_idx).map_err(text)?;
            buffers.topk_weights.copy_from(&x.topk_weights).map_err(text)?;
            buffers.grad_topk_weights.copy_from(&x.grad_topk_weights).map_err(text)?;
            // The mask is the same; the gradients of the sums are still those of the first inputs.
            let x = Inputs { aux: make(0).aux, ..x };
            graph.launch(&stream).map_err(text)?;
            stream.synchronize().map_err(text)?;
            let name = format!("graph,aux={aux},replay {seed}");
            compare(&x, &buffers.read(&name)?, &reference(&x), &name)?;
        }
    }
    Ok(())
}

/// The cases of 2.1.0's own benchmark, and small ones.
pub fn bench() -> Vec<Row> {
    let row = |t: u64, pad: u64, e: u64, k: u64, aux: bool| Row {
        op: "moe_topk_gate_backward",
        case: format!("aux={},e={e},k={k},pad={pad},t={t}", aux as u32),
        bytes: 2 * 4 * (t + pad) * e + 16 * (t + pad) * k + if aux { 4 * e } else { 0 },
        build: Box::new(move |device, _| {
            let x = inputs(Rng::new(t * e), (t, pad, 1), (e, k), aux, Routing::Best);
            let mut buffers = Buffers::new(device, &x, PLAIN)?;
            Ok(Box::new(move |stream| buffers.call(stream)))
        }),
    };
    let mut rows = Vec::new();
    for aux in [false, true] {
        rows.extend([row(8001, 0, 256, 8, aux), row(8001, 10, 256, 8, aux)]);
        rows.extend([1, 16, 128].map(|t| row(t, 0, 256, 8, aux)));
        rows.extend([row(8001, 0, 384, 6, aux), row(65536, 0, 256, 8, aux)]);
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferrotile::{DType, Error, TensorMut};
    use ferrotile_kernels::moe::moe_topk_gate_backward::slope;
    use proptest::prelude::{ProptestConfig, prop_assert_eq, proptest};

    #[test]
    fn suite() {
        SUITE.test();
    }

    /// One in 97 of the floats from 0 to 2^64, so every binade and every kind of argument.
    #[test]
    fn the_derivative_of_a_score_is_within_3_units() {
        let exact = |u: f64| if u == 0.0 { 0.0 } else { -(-u * u).exp_m1() / (2.0 * u) };
        let worst = (0..0x5F80_0000u32 / 97)
            .into_par_iter()
            .map(|i| {
                let u = f32::from_bits(i * 97);
                let (got, expected) = (f64::from(slope(u)), exact(f64::from(u)));
                let nearest = expected as f32;
                let unit = f64::from(f32::from_bits(nearest.to_bits() + 1)) - f64::from(nearest);
                ((got - expected).abs() / unit, u)
            })
            .reduce(|| (0.0, 0.0), |a, b| if a.0 > b.0 { a } else { b });
        assert!(worst.0 < 3.0, "{} units at {:e}", worst.0, worst.1);
        assert_eq!(slope(0.0).to_bits(), 0);
        assert!(slope(f32::NAN).is_nan());
    }

    /// Against finite differences of the weights and of the normalised scores by the logits.
    #[test]
    fn reference_is_the_derivative() {
        let (e, k) = (8, 3);
        let logits: Vec<f64> = (0..e).map(|i| f64::from(Rng::new(9).normal(i))).collect();
        let score = |x: f64| x.exp().ln_1p().sqrt();
        let scores: Vec<f32> = logits.iter().map(|x| score(*x) as f32).collect();
        let chosen = [5usize, 1, 5];
        let (grads, h) = ([0.3f32, -1.0, 0.7], Rng::new(10).normal_f32(e as usize));
        let weights = |x: &[f64]| -> Vec<f64> {
            let u: Vec<f64> = chosen.iter().map(|j| score(x[*j])).collect();
            u.iter().map(|v| 1.5 * v / u.iter().sum::<f64>()).collect()
        };
        let loss = |x: &[f64]| -> f64 {
            let u: Vec<f64> = x.iter().map(|x| score(*x)).collect();
            let aux: f64 = u.iter().zip(&h).map(|(u, h)| u * f64::from(*h)).sum::<f64>() / u.iter().sum::<f64>();
            aux + weights(x).iter().zip(grads).map(|(w, g)| w * f64::from(g)).sum::<f64>()
        };
        let x = Inputs {
            scores,
            topk_idx: chosen.map(|j| j as i64).to_vec(),
            topk_weights: weights(&logits).iter().map(|w| *w as f32).collect(),
            grad_topk_weights: grads.to_vec(),
            factor: 1.5,
            aux: Some((vec![1], h.clone(), 1)),
            t: 1,
            e,
            k,
        };
        for (i, got) in reference(&x).0.into_iter().enumerate() {
            let moved = |by: f64| {
                let mut x = logits.clone();
                x[i] += by;
                loss(&x)
            };
            let expected = (moved(1e-5) - moved(-1e-5)) / 2e-5;
            assert!((got - expected).abs() < 1e-6, "{i}: {got} {expected}");
        }
    }

    /// What a call is made of, to be spoilt.
    struct Call {
        device: Device,
        scores: Buffer<f32>,
        idx: Buffer<i64>,
        weights: Buffer<f32>,
        grads: Buffer<f32>,
        mask: Buffer<u8>,
        sums: Buffer<f32>,
    }

    impl Call {
        fn new() -> Self {
            let device = Device::emulator();
            Self {
                scores: device.upload(&[0.5f32; 128]).unwrap(),
                idx: device.upload(&[1i64; 64]).unwrap(),
                weights: device.upload(&[0.5f32; 64]).unwrap(),
                grads: device.upload(&[0.5f32; 64]).unwrap(),
                mask: device.upload(&[1u8; 16]).unwrap(),
                sums: device.upload(&[1.0f32; 64]).unwrap(),
                device,
            }
        }

        /// Four tokens, eight experts, two choices.
        fn args<'a>(&'a self, out: &'a mut Buffer<f32>) -> Args<'a> {
            Args {
                scores: self.scores.tensor(&[4, 8]).unwrap(),
                topk_idx: self.idx.tensor(&[4, 2]).unwrap(),
                topk_weights: self.weights.tensor(&[4, 2]).unwrap(),
                grad_topk_weights: self.grads.tensor(&[4, 2]).unwrap(),
                routed_scaling_factor: 1.0,
                aux: Some(AuxGrad { mask: self.mask.tensor(&[4]).unwrap(), grad_scores_sum: self.sums.tensor(&[2, 8]).unwrap() }),
                grad_logits: out.tensor_mut(&[4, 8]).unwrap(),
            }
        }
    }

    #[test]
    fn bad_input_is_refused_and_nothing_is_written() {
        let call = Call::new();
        let elsewhere = Device::emulator().checked();
        let foreign = elsewhere.zeros::<f32>(64).unwrap();
        let narrow = call.device.zeros::<i32>(64).unwrap();
        let refused = |what: &str, spoil: &dyn Fn(&mut Args)| -> Error {
            let mut out = call.device.upload(&[-7.0f32; 64]).unwrap();
            let mut args = call.args(&mut out);
            spoil(&mut args);
            let error = moe_topk_gate_backward(&call.device.stream().unwrap(), args).expect_err(what);
            assert!(error.to_string().starts_with("moe_topk_gate_backward: "), "{what}: {error}");
            assert_eq!(out.to_vec().unwrap(), [-7.0; 64], "{what}");
            error
        };
        macro_rules! refuse {
            ($what:literal, $pattern:pat, |$args:ident| $spoil:expr) => {
                // The closure's lifetimes are those of the buffers above, which outlive every call.
                let e = refused($what, &|$args: &mut Args| {
                    let $args: &mut Args<'static> = unsafe { std::mem::transmute($args) };
                    $spoil
                });
                assert!(matches!(e, $pattern), "{}: {e}", $what);
            };
        }
        // SAFETY (of the lengthened lifetimes in `refuse`): buffers of this function only, and calls end within it.
        let call: &'static Call = unsafe { std::mem::transmute::<&Call, _>(&call) };
        let foreign: &'static Buffer<f32> = unsafe { std::mem::transmute::<&Buffer<f32>, _>(&foreign) };
        let narrow: &'static Buffer<i32> = unsafe { std::mem::transmute::<&Buffer<i32>, _>(&narrow) };
        refuse!("a vector of scores", Error::Shape { arg: "scores", .. }, |a| a.scores = call.scores.tensor(&[32]).unwrap());
        refuse!("scores of other tokens", Error::Shape { .. }, |a| a.scores = call.scores.tensor(&[5, 8]).unwrap());
        refuse!("columns of scores", Error::Layout { arg: "scores", .. }, |a| a.scores =
            call.scores.strided(&[4, 8], &[1, 4], 0).unwrap());
        refuse!("i32 as scores", Error::DType { arg: "scores", .. }, |a| a.scores = narrow.tensor(&[4, 8]).unwrap());
        refuse!("32-bit indices", Error::DType { arg: "topk_idx", .. }, |a| a.topk_idx = narrow.tensor(&[4, 2]).unwrap());
        refuse!("indices of other tokens", Error::Shape { arg: "topk_idx", .. }, |a| a.topk_idx =
            call.idx.tensor(&[5, 2]).unwrap());
        refuse!("columns of indices", Error::Layout { arg: "topk_idx", .. }, |a| a.topk_idx =
            call.idx.strided(&[4, 2], &[1, 4], 0).unwrap());
        refuse!("other weights", Error::Shape { arg: "topk_weights", .. }, |a| a.topk_weights =
            call.weights.tensor(&[4, 3]).unwrap());
        refuse!("other gradients", Error::Shape { arg: "grad_topk_weights", .. }, |a| a.grad_topk_weights =
            call.grads.tensor(&[3, 2]).unwrap());
        refuse!("a mask of other tokens", Error::Shape { arg: "mask", .. }, |a| a.aux.as_mut().unwrap().mask =
            call.mask.tensor(&[8]).unwrap());
        refuse!("a mask with gaps", Error::Layout { arg: "mask", .. }, |a| a.aux.as_mut().unwrap().mask =
            call.mask.strided(&[4], &[2], 0).unwrap());
        refuse!("f32 as mask", Error::DType { arg: "mask", .. }, |a| a.aux.as_mut().unwrap().mask =
            call.sums.tensor(&[4]).unwrap());
        refuse!("sums of other experts", Error::Shape { arg: "grad_scores_sum", .. }, |a| a
            .aux
            .as_mut()
            .unwrap()
            .grad_scores_sum =
            call.sums.tensor(&[2, 4]).unwrap());
        refuse!("three sequences of four tokens", Error::Value { arg: "num_sequences", .. }, |a| a
            .aux
            .as_mut()
            .unwrap()
            .grad_scores_sum =
            call.sums.tensor(&[3, 8]).unwrap());
        refuse!("no sequence", Error::Value { arg: "num_sequences", .. }, |a| a.aux.as_mut().unwrap().grad_scores_sum =
            call.sums.tensor(&[0, 8]).unwrap());
        refuse!("more choices than experts", Error::Value { arg: "num_topk", .. }, |a| {
            a.topk_idx = call.idx.tensor(&[4, 9]).unwrap();
            a.topk_weights = call.weights.tensor(&[4, 9]).unwrap();
            a.grad_topk_weights = call.grads.tensor(&[4, 9]).unwrap();
        });
        refuse!("weights elsewhere", Error::DeviceMismatch { arg: "topk_weights", .. }, |a| a.topk_weights =
            foreign.tensor(&[4, 2]).unwrap());
        refuse!("gradients over scores", Error::Overlap { a: "scores", b: "grad_logits", .. }, |a| a.grad_logits =
            // SAFETY: refused before anything is written.
            unsafe { TensorMut::from_raw(&call.device, call.scores.as_ptr(), DType::F32, &[4, 8], &[8, 1]).unwrap() });
        // As it is, it is accepted.
        let mut out = call.device.upload(&[-7.0f32; 64]).unwrap();
        moe_topk_gate_backward(&call.device.stream().unwrap(), call.args(&mut out)).unwrap();
        let out = out.to_vec().unwrap();
        assert!(out[..32].iter().all(|v| *v != -7.0) && out[32..] == [-7.0; 32]);
    }

    /// An index that no expert has is reported by the checked emulator, and counts as none elsewhere.
    #[test]
    fn experts_that_do_not_exist() {
        for (checked, index) in [(true, 8), (false, 8), (false, i64::MAX), (false, 1 << 32), (false, i64::MIN)] {
            let device = if checked { Device::emulator().checked() } else { Device::emulator() };
            let mut x = inputs(Rng::new(1), (4, 0, 1), (8, 2), false, Routing::Best);
            x.topk_idx[2] = index;
            let got = launch(&device, &x, PLAIN, "wrong");
            if checked {
                let error = got.unwrap_err();
                assert!(error.contains(" in memory, allowed: below 8"), "{error}");
            } else {
                x.topk_idx[2] = -1;
                assert_eq!(got, launch(&device, &x, PLAIN, "none"));
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn any_shape_and_stride(
            t in 0u64..20, e in 1u64..300, k in 0u64..33, pad in 0u64..3, sequences in 1u64..3, aux: bool, gap in 0u64..4,
            offset in 0u64..6, seed: u64, routing in 0usize..3,
        ) {
            let k = k.min(e);
            let routing = [Routing::Best, Routing::Fixed, Routing::Repeats][routing];
            let layout = Layout { offset, gap };
            let x = inputs(Rng::new(seed), (t, pad, sequences), (e, k), aux, routing);
            let name = format!("e={e},k={k},t={t},pad={pad},q={sequences},aux={aux},{routing:?},{layout:?},seed={seed}");
            prop_assert_eq!(check(&Device::emulator(), &x, layout, &name), Ok(()));
        }
    }
}
