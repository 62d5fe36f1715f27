//! moe_topk_gate_forward: reference, cases, checks and benchmark.

use super::common_route::{FILL, GUARD, inside, prefilled, uploaded};
use crate::support::bench::Row;
use crate::support::cases::{Depth, rows_apart};
use crate::support::compare::{allclose, equal, untouched};
use crate::support::golden::{self, Case, Golden};
use crate::support::rng::{Rng, philox};
use crate::support::suite::{Ctx, Report, Suite, ensure, text};
use ferrotile::moe::moe_topk_gate_forward::{Args, ImageBias, PhysicalMap, moe_topk_gate_forward};
use ferrotile::{Buffer, Device, Stream};
use rayon::prelude::*;

/// The checks of this op.
pub const SUITE: Suite = Suite { op: "moe_topk_gate_forward", run };

const FACTOR: f32 = 1.5;

/// Columns of the maps.
const COLUMNS: u64 = 3;

/// Everything that the op reads.
struct Inputs {
    logits: Vec<f32>,
    bias: Option<Vec<f32>>,
    /// Which tokens have the other bias, and that one.
    image: Option<(Vec<u8>, Vec<f32>)>,
    mask: Option<Vec<u8>>,
    random: Option<Vec<u8>>,
    fixed: Option<Vec<u8>>,
    /// What `unmapped_topk_idx` holds before, if it is given.
    given: Option<Vec<i64>>,
    /// Map and number of replicas.
    map: Option<(Vec<i32>, Vec<i32>)>,
    shared: u64,
    factor: f32,
    ep_rank: u32,
    t: u64,
    e: u64,
    k: u64,
}

/// What the op writes, without the scores.
#[derive(Debug, PartialEq)]
struct Outputs {
    idx: Vec<i64>,
    weights: Vec<f32>,
    unmapped: Option<Vec<i64>>,
}

fn is_set(flags: &Option<Vec<u8>>, t: usize) -> bool {
    flags.as_ref().is_some_and(|flags| flags[t] != 0)
}

impl Inputs {
    fn is_masked(&self, t: usize) -> bool {
        self.mask.is_some() && !is_set(&self.mask, t)
    }

    /// The scores in f64.
    fn scores(&self) -> Vec<f64> {
        let e = self.e as usize;
        let score = |i: usize| {
            let x = f64::from(self.logits[i]);
            // For very negative logits `exp` is small beside 1, which `ln_1p` knows.
            let softplus = if x > 40.0 { x } else { x.exp().ln_1p() };
            if self.is_masked(i / e) || is_set(&self.random, i / e) { 0.0 } else { softplus.sqrt() }
        };
        (0..self.logits.len()).into_par_iter().map(score).collect()
    }

    /// All else, from the scores that the op wrote: exact.
    fn outputs(&self, scores: &[f32]) -> Outputs {
        let (e, k, s) = (self.e as usize, self.k as usize, self.shared as usize);
        let token = |t: usize| -> (Vec<i64>, Vec<f32>, Vec<i64>) {
            if self.is_masked(t) {
                return (vec![-1; k + s], vec![0.0; k + s], vec![-1; k]);
            }
            if is_set(&self.random, t) {
                let (idx, weights) = self.random_token(t);
                return (idx, weights, vec![-1; k]);
            }
            let u = &scores[t * e..(t + 1) * e];
            let chosen: Vec<i64> = if is_set(&self.fixed, t) {
                self.given.as_ref().unwrap()[t * k..(t + 1) * k].to_vec()
            } else {
                let bias = match &self.image {
                    Some((flags, bias)) if flags[t] != 0 => Some(bias),
                    _ => self.bias.as_ref(),
                };
                let rank: Vec<f32> = (0..e).map(|i| u[i] + bias.map_or(0.0, |bias| bias[i])).collect();
                let mut order: Vec<i64> = (0..e as i64).collect();
                // Stable; NaN behind everything.
                order.sort_by(|&a, &b| {
                    let (a, b) = (rank[a as usize], rank[b as usize]);
                    b.partial_cmp(&a).unwrap_or(a.is_nan().cmp(&b.is_nan()))
                });
                order.truncate(k);
                order
            };
            let mut lanes = [0.0f32; 32];
            for (lane, expert) in lanes.iter_mut().zip(&chosen) {
                *lane = if *expert < 0 { 0.0 } else { u[*expert as usize] };
            }
            let mut tree = lanes;
            for distance in [16, 8, 4, 2, 1] {
                tree = std::array::from_fn(|lane| tree[lane] + tree[lane ^ distance]);
            }
            let sum = tree[0] + 1e-20;
            // Quotients that are subnormal count as 0.
            let share = |part: f32| if part / sum < f32::MIN_POSITIVE { 0.0 } else { part / sum };
            let mut weights: Vec<f32> = (0..k).map(|slot| share(lanes[slot]) * self.factor).collect();
            weights.extend(vec![1.0; s]);
            let logical = chosen.iter().copied().chain(e as i64..(e + s) as i64);
            let physical = |logical: i64| match &self.map {
                Some((map, count)) if logical >= 0 => {
                    let turn = (u128::from(self.ep_rank) + t as u128 * 23333) % count[logical as usize] as u128;
                    i64::from(map[logical as usize * COLUMNS as usize + turn as usize])
                }
                _ => logical,
            };
            (logical.map(physical).collect(), weights, chosen)
        };
        let tokens: Vec<_> = (0..self.t as usize).into_par_iter().map(token).collect();
        Outputs {
            idx: tokens.iter().flat_map(|token| token.0.clone()).collect(),
            weights: tokens.iter().flat_map(|token| token.1.clone()).collect(),
            unmapped: self.given.is_some().then(|| tokens.iter().flat_map(|token| token.2.clone()).collect()),
        }
    }

    /// The number of physical experts.
    fn num_physical(&self) -> u64 {
        self.map.as_ref().map_or(self.e + self.shared, |(_, count)| count.iter().map(|n| *n as u64).sum())
    }

    /// Experts and weights of a token with random ones.
    fn random_token(&self, t: usize) -> (Vec<i64>, Vec<f32>) {
        let mut free: Vec<i64> = (0..self.num_physical() as i64).collect();
        (0..self.k + self.shared)
            .map(|slot| {
                let number = 32 * t as u64 + slot;
                let words = philox([0, 0, number as u32, (number >> 32) as u32], [self.ep_rank, 0]);
                let expert = free.remove(words[1] as usize % free.len());
                (expert, words[0] as f32 * 2f32.powi(-32) + 2f32.powi(-33))
            })
            .unzip()
    }
}

/// Which options a case has.
#[derive(Clone, Copy, Debug, Default)]
struct Options {
    bias: bool,
    image: bool,
    random: bool,
    fixed: bool,
    physical: bool,
    shared: u64,
    unmapped: bool,
}

impl Options {
    /// From the bits of a number. Tokens with fixed experts are not random ones here.
    fn new(bits: u32, shared: u64) -> Self {
        let bit = |i: u32| bits >> i & 1 == 1;
        let (fixed, routed) = (bit(3), bit(4));
        Self {
            bias: bit(0),
            image: bit(1),
            random: bit(2) && !fixed,
            fixed,
            physical: routed,
            shared: if routed { shared } else { 0 },
            unmapped: fixed || bit(0) || bit(2),
        }
    }

    fn name(&self) -> String {
        let Self { bias, image, random, fixed, physical, shared, unmapped } = self;
        let names = [
            (*bias, "bias"),
            (*image, "image"),
            (*random, "random"),
            (*fixed, "fixed"),
            (*physical, "physical"),
            (*unmapped, "unmapped"),
        ];
        let given: Vec<&str> = names.iter().filter(|(given, _)| *given).map(|(_, name)| *name).collect();
        format!("s={shared},{}", given.join("+"))
    }
}

/// Logits whose rows take turns: normal ones, and kinds that a choice could trip over.
fn logits(rng: Rng, t: u64, e: u64, k: u64) -> Vec<f32> {
    rng.fill((t * e) as usize, |rng, i| {
        let (normal, draw) = (rng.normal(i), rng.stream(1).below(i, 1000));
        match (i / e) % 10 {
            // All equal.
            3 => 0.0,
            // Few different values.
            4 => (draw % 4) as f32 - 1.0,
            5 => normal * 30.0,
            // From far below, where scores vanish, to far above.
            6 => (draw as f32 - 500.0) * if draw % 7 == 0 { 1e30 } else { 0.7 },
            7 if 2 * k <= e && i % 4 == 1 => [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][(draw % 3) as usize],
            // Ascending: the best are neighbours.
            8 => (i % e) as f32 * 0.05 - 3.0,
            _ => normal,
        }
    })
}

/// Inputs as in moe.md; the last `pad` tokens are masked.
fn inputs(rng: Rng, t: u64, pad: u64, (e, k): (u64, u64), options: Options, plain: bool) -> Inputs {
    let Options { bias, image, random, fixed, physical, shared, unmapped } = options;
    let n = t + pad;
    let coin = |stream: u64| (0..n).map(|t| rng.stream(stream).below(t, 2) as u8 * (1 + (t % 255) as u8)).collect();
    let count: Vec<i32> = (0..e + shared).map(|i| 1 + rng.stream(12).below(i, COLUMNS) as i32).collect();
    let mut next = 0;
    let mut ids = |n: i32| -> Vec<i32> {
        let first = next;
        next += n;
        (0..COLUMNS as i32).map(|column| if column < n { first + column } else { -1 }).collect()
    };
    let map: Vec<i32> = count.iter().flat_map(|n| ids(*n)).collect();
    Inputs {
        logits: if plain { rng.normal_f32((n * e) as usize) } else { logits(rng, n, e, k) },
        bias: bias.then(|| rng.stream(3).normal_f32(e as usize)),
        image: image.then(|| (coin(4), rng.stream(5).normal_f32(e as usize))),
        mask: (pad > 0).then(|| (0..n).map(|token| (token < t) as u8 * 7).collect()),
        random: random.then(|| coin(6)),
        fixed: fixed.then(|| coin(7)),
        given: unmapped.then(|| rng.stream(8).ints_i64((n * k) as usize, 0, e as i64)),
        map: physical.then_some((map, count)),
        shared,
        factor: FACTOR,
        ep_rank: (rng.stream(9).bits(0) % 3) as u32 * 1000,
        t: n,
        e,
        k,
    }
}

/// Everything a launch needs.
struct Buffers {
    logits: Buffer<f32>,
    bias: Option<Buffer<f32>>,
    image: Option<(Buffer<u8>, Buffer<f32>)>,
    mask: Option<Buffer<u8>>,
    random: Option<Buffer<u8>>,
    fixed: Option<Buffer<u8>>,
    map: Option<(Buffer<i32>, Buffer<i32>)>,
    unmapped: Option<Buffer<i64>>,
    scores: Option<Buffer<f32>>,
    idx: Buffer<i64>,
    weights: Buffer<f32>,
    /// Elements before all tensors but logits and scores, and between rows of `unmapped`.
    offset: u64,
    sizes: [u64; 4],
    factor: f32,
    ep_rank: u32,
}

impl Buffers {
    fn new(device: &Device, x: &Inputs, with_scores: bool, offset: u64) -> Result<Self, String> {
        let flags = |flags: &Option<Vec<u8>>| flags.as_ref().map(|flags| uploaded(device, flags, offset)).transpose();
        let floats = |values: &[f32]| uploaded(device, values, offset);
        let ints = |values: &[i32]| uploaded(device, values, offset);
        let slots = x.t * (x.k + x.shared);
        let fill = i64::from_ne_bytes([FILL; 8]);
        let given = x.given.as_ref().map(|given| {
            let mut all = rows_apart(given, x.k, (x.k + offset, offset), fill);
            all.resize((offset + x.t * (x.k + offset) + GUARD) as usize, fill);
            device.upload(&all).map_err(text)
        });
        Ok(Self {
            logits: uploaded(device, &x.logits, 4 * offset)?,
            bias: x.bias.as_deref().map(floats).transpose()?,
            image: match &x.image {
                Some((mask, bias)) => Some((uploaded(device, mask, offset)?, floats(bias)?)),
                None => None,
            },
            mask: flags(&x.mask)?,
            random: flags(&x.random)?,
            fixed: flags(&x.fixed)?,
            map: match &x.map {
                Some((map, count)) => Some((ints(map)?, ints(count)?)),
                None => None,
            },
            unmapped: given.transpose()?,
            scores: if with_scores { Some(prefilled(device, x.t * x.e, 4 * offset)?) } else { None },
            idx: prefilled(device, slots, offset)?,
            weights: prefilled(device, slots, offset)?,
            offset,
            sizes: [x.t, x.e, x.k, x.shared],
            factor: x.factor,
            ep_rank: x.ep_rank,
        })
    }

    fn call(&mut self, stream: &Stream) -> ferrotile::Result<()> {
        let ([t, e, k, s], o) = (self.sizes, self.offset);
        let (vector, row) = ([1], [e.max(1), 1]);
        let slots = [(k + s).max(1), 1];
        macro_rules! flags {
            ($name:ident) => {
                match &self.$name {
                    Some(flags) => Some(flags.strided(&[t], &vector, o)?),
                    None => None,
                }
            };
        }
        let args = Args {
            logits: self.logits.strided(&[t, e], &row, 4 * o)?,
            bias: match &self.bias {
                Some(bias) => Some(bias.strided(&[e], &vector, o)?),
                None => None,
            },
            image_bias: match &self.image {
                Some((mask, bias)) => {
                    Some(ImageBias { token_mask: mask.strided(&[t], &vector, o)?, bias: bias.strided(&[e], &vector, o)? })
                }
                None => None,
            },
            mask: flags!(mask),
            force_random: flags!(random),
            fix_routing_mask: flags!(fixed),
            physical_map: match &self.map {
                Some((map, count)) => Some(PhysicalMap {
                    to_physical_map: map.strided(&[e + s, COLUMNS], &[COLUMNS, 1], o)?,
                    logical_count: count.strided(&[e + s], &vector, o)?,
                }),
                None => None,
            },
            num_shared_experts: s as u32,
            routed_scaling_factor: self.factor,
            ep_rank: self.ep_rank,
            unmapped_topk_idx: match &mut self.unmapped {
                Some(unmapped) => Some(unmapped.strided_mut(&[t, k], &[(k + o).max(1), 1], o)?),
                None => None,
            },
            scores: match &mut self.scores {
                Some(scores) => Some(scores.strided_mut(&[t, e], &row, 4 * o)?),
                None => None,
            },
            topk_idx: self.idx.strided_mut(&[t, k + s], &slots, o)?,
            topk_weights: self.weights.strided_mut(&[t, k + s], &slots, o)?,
        };
        moe_topk_gate_forward(stream, args)
    }

    /// What was written, if nothing else was.
    fn read(&self, name: &str) -> Result<(Outputs, Option<Vec<f32>>), String> {
        let ([t, e, k, s], o) = (self.sizes, self.offset);
        let unmapped = match &self.unmapped {
            Some(unmapped) => {
                let all = unmapped.to_vec().map_err(text)?;
                untouched("unmapped_topk_idx", name, &[t, k], &[k + o, 1], &all[o as usize..], FILL)?;
                let rows = all[o as usize..].chunks((k + o).max(1) as usize).take(t as usize);
                Some(rows.flat_map(|row| row[..k as usize].to_vec()).collect())
            }
            None => None,
        };
        let outputs = Outputs {
            idx: inside("topk_idx", name, &self.idx, t * (k + s), o)?,
            weights: inside("topk_weights", name, &self.weights, t * (k + s), o)?,
            unmapped,
        };
        let scores = self.scores.as_ref().map(|scores| inside("scores", name, scores, t * e, 4 * o)).transpose()?;
        Ok((outputs, scores))
    }
}

fn launch(device: &Device, x: &Inputs, scores: bool, offset: u64, name: &str) -> Result<(Outputs, Option<Vec<f32>>), String> {
    let stream = device.stream().map_err(text)?;
    let mut buffers = Buffers::new(device, x, scores, offset)?;
    buffers.call(&stream).map_err(text)?;
    stream.synchronize().map_err(text)?;
    buffers.read(name)
}

fn compare(x: &Inputs, got: &Outputs, expected: &Outputs, name: &str) -> Result<(), String> {
    let slots = [x.t, x.k + x.shared];
    if let (Some(got), Some(expected)) = (&got.unmapped, &expected.unmapped) {
        equal("unmapped_topk_idx", name, &[x.t, x.k], got, expected)?;
    }
    equal("topk_idx", name, &slots, &got.idx, &expected.idx)?;
    equal("topk_weights", name, &slots, &got.weights, &expected.weights)
}

/// Scores are within 3 units of the last place; with them everything else is exact. Scores that nobody asks for change nothing.
fn check(device: &Device, x: &Inputs, offset: u64, name: &str) -> Result<Outputs, String> {
    let (got, scores) = launch(device, x, true, offset, name)?;
    let scores = scores.unwrap_or_default();
    let exact = x.scores();
    // NaN and +inf have the score NaN.
    let number = |i: &usize| x.logits[*i] < f32::INFINITY || exact[*i] == 0.0;
    let numbers: Vec<usize> = (0..exact.len()).filter(number).collect();
    let (a, b): (Vec<f32>, Vec<f64>) = numbers.iter().map(|i| (scores[*i], exact[*i])).unzip();
    allclose("scores", name, &[a.len() as u64], &a, &b, (1e-37, 3.6e-7))?;
    let bad = a.iter().zip(&b).position(|(got, exact)| *exact == 0.0 && got.to_bits() != 0);
    ensure(bad.is_none(), || format!("scores: a score of no token or of -inf is not +0.0; {name}"))?;
    compare(x, &got, &x.outputs(&scores), name)?;
    let (again, none) = launch(device, x, false, offset, name)?;
    ensure(none.is_none(), || "scores".to_owned())?;
    compare(x, &again, &got, &format!("without scores, {name}"))?;
    Ok(got)
}

/// Experts, choices and shared experts of moe.md.
const GRID: [(u64, u64, u64); 10] =
    [(256, 8, 2), (72, 6, 1), (32, 6, 2), (64, 6, 2), (96, 6, 2), (16, 6, 2), (36, 6, 2), (108, 6, 2), (128, 6, 2), (144, 6, 2)];

/// Others: no choice, all experts, rows longer than a step, as many slots as there are.
const ODD: [(u64, u64, u64); 9] =
    [(4, 0, 1), (4, 4, 2), (8, 1, 0), (32, 32, 0), (100, 30, 2), (260, 9, 1), (384, 9, 0), (1024, 8, 1), (2052, 31, 1)];

fn run(ctx: &Ctx) -> Result<Report, String> {
    let device = &ctx.device;
    let full = ctx.depth == Depth::Full;
    let case = |t: u64, pad: u64, (e, k, s): (u64, u64, u64), bits: u32| -> Result<(), String> {
        let options = Options::new(bits, s);
        let name = format!("e={e},k={k},t={t},pad={pad},{}", options.name());
        if !ctx.case(&name) {
            return Ok(());
        }
        let x = inputs(Rng::named(&name), t, pad, (e, k), options, false);
        check(device, &x, 0, &name)?;
        if pad > 0 && t < 1000 {
            check(device, &x, 1 + u64::from(bits % 4), &format!("{name},offset"))?;
        }
        Ok(())
    };
    for (i, sizes) in GRID.iter().chain(&ODD).enumerate() {
        for bits in 0..32 {
            // Every option with the first; of the others a seventh on the emulator, a different one each.
            if !full && i > 0 && !(bits as usize + i).is_multiple_of(7) {
                continue;
            }
            for (t, pad) in if full { [(1, 0), (512, 10)] } else { [(1, 0), (11, 3)] } {
                case(t, pad, *sizes, bits)?;
            }
            if full && i == 0 {
                case(8001, 0, *sizes, bits)?;
                case(8001, 10, *sizes, bits)?;
            }
        }
        case(0, 0, *sizes, 31)?;
        if full {
            for bits in [0, 0b10111, 0b01011] {
                case(8001, 10, *sizes, bits)?;
            }
        }
    }
    // Blocks of several warps, where logits wait for the flags of random tokens and where they don't.
    for bits in [0b00011, 0b10110] {
        case(2049, 3, (16, 6, 2), bits)?;
    }
    if full {
        // Replicas are chosen by a number beyond 32 bits.
        case(200_000, 0, (16, 2, 1), 0b10000)?;
        case(300, 0, (16384, 32, 0), 0b00001)?;
    }
    if ctx.case("zeros") {
        // Of equal experts the first ones.
        let mut x = inputs(Rng::new(3), 40, 0, (256, 8), Options::new(0, 0), true);
        x.logits.fill(0.0);
        x.given = Some(vec![0; 320]);
        let got = check(device, &x, 0, "zeros")?;
        let first: Vec<i64> = (0..320).map(|i| i % 8).collect();
        equal("unmapped_topk_idx", "zeros", &[40, 8], &got.unmapped.unwrap_or_default(), &first)?;
    }
    if ctx.case("fixed experts of none") {
        let mut x = inputs(Rng::new(4), 30, 0, (64, 6), Options::new(0b11000, 1), true);
        if let Some(given) = &mut x.given {
            given.iter_mut().step_by(5).for_each(|expert| *expert = -1);
        }
        check(device, &x, 0, "fixed experts of none")?;
    }
    if ctx.case("distribution") {
        // Random experts are uniform: the bound of moe.md, for 10 draws an expert at least.
        let t = if full { 8001 } else { 400 };
        let mut x = inputs(Rng::new(5), t, 0, (32, 6), Options::new(0b10100, 2), true);
        x.random = Some(vec![1; t as usize]);
        let got = check(device, &x, 0, "distribution")?;
        let n = x.num_physical();
        let mut counts = vec![0.0; n as usize];
        got.idx.iter().for_each(|expert| counts[*expert as usize] += 1.0);
        let mean = got.idx.len() as f64 / n as f64;
        let chi: f64 = counts.iter().map(|count| (count - mean) * (count - mean) / mean).sum();
        ensure(chi < 4.0 * (n - 1) as f64, || format!("chi-squared of random experts is {chi} for {n} experts"))?;
        let average = got.weights.iter().map(|w| f64::from(*w)).sum::<f64>() / got.weights.len() as f64;
        let range = got.weights.iter().all(|w| *w > 0.0 && *w <= 1.0);
        ensure(range && (average - 0.5).abs() < 0.03, || format!("random weights: average {average}"))?;
    }
    if ctx.case("deterministic") {
        let x = inputs(Rng::new(7), 300, 3, (256, 8), Options::new(0b10111, 2), false);
        let (first, second) = (launch(device, &x, true, 0, "first")?, launch(device, &x, true, 0, "second")?);
        compare(&x, &second.0, &first.0, "deterministic")?;
        equal("scores of a second run", "", &[x.t, x.e], &second.1.unwrap_or_default(), &first.1.unwrap_or_default())?;
    }
    let notes = golden::check_cases(ctx, &["moe_topk_gate"], |golden, case| check_golden(device, golden, case))?;
    if !device.is_emulator() && ctx.case("graph") {
        check_graph(device)?;
    }
    Ok(Report { notes, ..ctx.report() })
}

/// 2.1.0's own results: the same experts; scores and weights but for roundings, since its exponential is another one.
fn check_golden(device: &Device, golden: &Golden, case: &Case) -> Result<(), String> {
    let name = case.name();
    let logits = golden.tensor(case, "in/logits")?;
    let (t, e, k) = (logits.shape[0], logits.shape[1], case.param("num_topk")?);
    let has = |key: &str| golden.keys(case).iter().any(|known| known == key);
    let x = Inputs {
        logits: logits.to_vec()?,
        bias: if has("in/bias") { Some(golden.tensor(case, "in/bias")?.to_vec()?) } else { None },
        image: None,
        mask: if has("in/mask") { Some(golden.tensor(case, "in/mask")?.to_vec()?) } else { None },
        random: None,
        fixed: None,
        given: None,
        map: None,
        // Shared experts are routed to only where the call says so.
        shared: if case.param("use_shared_as_routed")? { case.param("num_shared_experts")? } else { 0 },
        factor: case.param("routed_scaling_factor")?,
        ep_rank: case.param("ep_rank")?,
        t,
        e,
        k,
    };
    let slots = [t, k + x.shared];
    let theirs: Vec<f32> = golden.tensor(case, "out/scores")?.to_vec()?;
    let idx: Vec<i64> = golden.tensor(case, "out/topk_idx")?.to_vec()?;
    let weights: Vec<f32> = golden.tensor(case, "out/topk_weights")?.to_vec()?;
    let reference = x.outputs(&theirs);
    equal("reference's topk_idx", &name, &slots, &reference.idx, &idx)?;
    allclose("reference's topk_weights", &name, &slots, &reference.weights, &weights, (0.0, 5e-7))?;
    let got = check(device, &x, 0, &name)?;
    let (_, scores) = launch(device, &x, true, 0, &name)?;
    equal("topk_idx", &name, &slots, &got.idx, &idx)?;
    allclose("scores", &name, &[t, e], &scores.unwrap_or_default(), &theirs, (1e-8, 2e-6))?;
    allclose("topk_weights", &name, &slots, &got.weights, &weights, (0.0, 2e-6))
}

/// A captured launch does its work at every replay, on the data that are there then.
fn check_graph(device: &Device) -> Result<(), String> {
    let stream = device.stream().map_err(text)?;
    let make = |seed| inputs(Rng::new(seed), 100, 3, (256, 8), Options::new(0b00101, 0), true);
    let base = make(0);
    let mut buffers = Buffers::new(device, &base, true, 0)?;
    // Compiled before the capture.
    buffers.call(&stream).map_err(text)?;
    let graph = stream.capture(|stream| buffers.call(stream)).map_err(text)?;
    for seed in 1..4 {
        let x = Inputs { logits: make(seed).logits, ..make(0) };
        let mut logits = buffers.logits.to_vec().map_err(text)?;
        logits[..x.logits.len()].copy_from_slice(&x.logits);
        buffers.logits.copy_from(&logits).map_err(text)?;
        graph.launch(&stream).map_err(text)?;
        stream.synchronize().map_err(text)?;
        let name = format!("graph, replay {seed}");
        let (got, scores) = buffers.read(&name)?;
        compare(&x, &got, &x.outputs(&scores.unwrap_or_default()), &name)?;
    }
    Ok(())
}

/// The cases of 2.1.0's own benchmark, the same without random tokens, and small ones.
pub fn bench() -> Vec<Row> {
    let row = |t: u64, pad: u64, random: bool, s: u64| {
        let (e, k) = (256, 8);
        // Random tokens leave their logits unread.
        let read = if random { 2 } else { 4 };
        Row {
            op: "moe_topk_gate_forward",
            case: format!("e={e},k={k},pad={pad},random={},s={s},t={t}", random as u32),
            bytes: (4 + read) * (t + pad) * e + 12 * (t + pad) * (k + s),
            build: Box::new(move |device, _| {
                let mut options = Options::new(0b00011, 0);
                (options.random, options.physical, options.shared) = (random, s > 0, s);
                let x = inputs(Rng::new(t + s), t, pad, (e, k), options, true);
                let mut buffers = Buffers::new(device, &x, true, 0)?;
                Ok(Box::new(move |stream| buffers.call(stream)))
            }),
        }
    };
    let mut rows = Vec::new();
    for random in [true, false] {
        for s in [0, 2] {
            for t in [512, 8001] {
                rows.extend([row(t, 0, random, s), row(t, 10, random, s)]);
            }
        }
    }
    rows.extend([1, 16, 128].map(|t| row(t, 0, false, 0)));
    rows.push(row(65536, 0, false, 0));
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferrotile::{DType, Error, TensorMut};
    use proptest::prelude::{ProptestConfig, prop_assert, proptest};

    #[test]
    fn suite() {
        SUITE.test();
    }

    #[test]
    fn the_reference_draws_as_random123_does() {
        let pi = philox([0x243F_6A88, 0x85A3_08D3, 0x1319_8A2E, 0x0370_7344], [0xA409_3822, 0x299F_31D0]);
        assert_eq!(pi, [0xD16C_FE09, 0x94FD_CCEB, 0x5001_E420, 0x2412_6EA1]);
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_E8D5, 0xE169_C58D, 0xBC57_AC4C, 0x9B00_DBD8]);
    }

    /// What a call is made of, to be spoilt. Leaked, so that views of it outlive every call.
    struct Call {
        device: Device,
        floats: Buffer<f32>,
        ints: Buffer<i32>,
        flags: Buffer<u8>,
        foreign: Buffer<u8>,
    }

    /// The outputs, prefilled.
    struct Out {
        idx: Buffer<i64>,
        weights: Buffer<f32>,
        unmapped: Buffer<i64>,
        scores: Buffer<f32>,
    }

    impl Out {
        fn new(device: &Device) -> Self {
            Self {
                idx: device.upload(&[-7i64; 64]).unwrap(),
                weights: device.upload(&[-7.0f32; 64]).unwrap(),
                unmapped: device.upload(&[1i64; 64]).unwrap(),
                scores: device.upload(&[-7.0f32; 64]).unwrap(),
            }
        }
    }

    /// Four tokens, eight experts, two choices, one shared expert, everything given.
    fn args<'a>(call: &'static Call, out: &'a mut Out) -> Args<'a> {
        let flags = || call.flags.tensor(&[4]).unwrap();
        let bias = call.floats.tensor(&[8]).unwrap();
        Args {
            logits: call.floats.tensor(&[4, 8]).unwrap(),
            bias: Some(bias),
            image_bias: Some(ImageBias { token_mask: flags(), bias }),
            mask: Some(flags()),
            force_random: Some(flags()),
            fix_routing_mask: Some(flags()),
            physical_map: Some(PhysicalMap {
                to_physical_map: call.ints.tensor(&[9, 3]).unwrap(),
                logical_count: call.ints.tensor(&[9]).unwrap(),
            }),
            num_shared_experts: 1,
            routed_scaling_factor: 1.0,
            ep_rank: 0,
            unmapped_topk_idx: Some(out.unmapped.tensor_mut(&[4, 2]).unwrap()),
            scores: Some(out.scores.tensor_mut(&[4, 8]).unwrap()),
            topk_idx: out.idx.tensor_mut(&[4, 3]).unwrap(),
            topk_weights: out.weights.tensor_mut(&[4, 3]).unwrap(),
        }
    }

    #[test]
    fn bad_input_is_refused_and_nothing_is_written() {
        let device = Device::emulator();
        let call: &'static Call = Box::leak(Box::new(Call {
            floats: device.upload(&[0.5f32; 128]).unwrap(),
            ints: device.upload(&[1i32; 64]).unwrap(),
            flags: device.upload(&[1u8; 64]).unwrap(),
            foreign: Device::emulator().checked().upload(&[1u8; 64]).unwrap(),
            device,
        }));
        type Spoil<'s> = &'s dyn for<'a> Fn(&mut Args<'a>);
        let refused = |what: &str, spoil: Spoil| -> Error {
            let mut out = Out::new(&device);
            let mut args = args(call, &mut out);
            spoil(&mut args);
            let error = moe_topk_gate_forward(&device.stream().unwrap(), args).expect_err(what);
            assert!(error.to_string().starts_with("moe_topk_gate_forward: "), "{what}: {error}");
            assert_eq!((out.idx.to_vec().unwrap(), out.unmapped.to_vec().unwrap()), (vec![-7; 64], vec![1; 64]), "{what}");
            let floats = (out.weights.to_vec().unwrap(), out.scores.to_vec().unwrap());
            assert_eq!(floats, (vec![-7.0; 64], vec![-7.0; 64]), "{what}");
            error
        };
        macro_rules! refuse {
            ($what:literal, $pattern:pat, |$args:ident| $spoil:expr) => {
                let e = refused($what, &|$args| $spoil);
                assert!(matches!(e, $pattern), "{}: {e}", $what);
            };
        }
        let (floats, ints, flags) = (&call.floats, &call.ints, &call.flags);
        refuse!("a vector of logits", Error::Shape { arg: "logits", .. }, |a| a.logits = floats.tensor(&[32]).unwrap());
        refuse!("i32 as logits", Error::DType { arg: "logits", .. }, |a| a.logits = ints.tensor(&[4, 8]).unwrap());
        refuse!("columns of logits", Error::Layout { arg: "logits", .. }, |a| a.logits =
            floats.strided(&[4, 8], &[1, 4], 0).unwrap());
        refuse!("logits at an odd address", Error::Layout { arg: "logits", .. }, |a| a.logits =
            floats.strided(&[4, 8], &[8, 1], 1).unwrap());
        refuse!("six experts", Error::Value { arg: "num_experts", .. }, |a| a.logits = floats.tensor(&[4, 6]).unwrap());
        refuse!("other tokens", Error::Shape { .. }, |a| a.logits = floats.tensor(&[5, 8]).unwrap());
        refuse!("three shared experts", Error::Value { arg: "num_shared_experts", .. }, |a| a.num_shared_experts = 3);
        refuse!("another number of shared experts", Error::Shape { .. }, |a| a.num_shared_experts = 2);
        refuse!("other biases", Error::Shape { arg: "bias", .. }, |a| a.bias = Some(floats.tensor(&[4]).unwrap()));
        refuse!("bias with gaps", Error::Layout { arg: "bias", .. }, |a| a.bias = Some(floats.strided(&[8], &[2], 0).unwrap()));
        refuse!("i32 as bias for images", Error::DType { arg: "image_bias", .. }, |a| a.image_bias.as_mut().unwrap().bias =
            ints.tensor(&[8]).unwrap());
        refuse!("a mask of other tokens", Error::Shape { arg: "mask", .. }, |a| a.mask = Some(flags.tensor(&[8]).unwrap()));
        refuse!("f32 as mask of images", Error::DType { arg: "image_token_mask", .. }, |a| {
            a.image_bias.as_mut().unwrap().token_mask = floats.tensor(&[4]).unwrap();
        });
        refuse!("f32 as random tokens", Error::DType { arg: "force_random", .. }, |a| a.force_random =
            Some(floats.tensor(&[4]).unwrap()));
        refuse!("fixed tokens with gaps", Error::Layout { arg: "fix_routing_mask", .. }, |a| a.fix_routing_mask =
            Some(flags.strided(&[4], &[2], 0).unwrap()));
        refuse!("fixed tokens without experts", Error::Value { arg: "fix_routing_mask", .. }, |a| a.unmapped_topk_idx = None);
        refuse!("map without the shared expert", Error::Shape { arg: "to_physical_map", .. }, |a| {
            a.physical_map.as_mut().unwrap().to_physical_map = ints.tensor(&[8, 3]).unwrap();
        });
        refuse!("map without columns", Error::Value { arg: "columns of to_physical_map", .. }, |a| {
            a.physical_map.as_mut().unwrap().to_physical_map = ints.tensor(&[9, 0]).unwrap();
        });
        refuse!("other counts", Error::Shape { arg: "logical_count", .. }, |a| {
            a.physical_map.as_mut().unwrap().logical_count = ints.tensor(&[8]).unwrap();
        });
        refuse!("a mask elsewhere", Error::DeviceMismatch { arg: "mask", .. }, |a| a.mask =
            Some(call.foreign.tensor(&[4]).unwrap()));
        // SAFETY: refused before anything is written.
        let over = |dtype, shape: &[u64], strides: &[u64]| unsafe {
            TensorMut::from_raw(&call.device, call.floats.as_ptr(), dtype, shape, strides).unwrap()
        };
        refuse!("scores over logits", Error::Overlap { a: "logits", b: "scores", .. }, |a| a.scores =
            Some(over(DType::F32, &[4, 8], &[8, 1])));
        refuse!("indices over logits", Error::Overlap { a: "logits", b: "topk_idx", .. }, |a| a.topk_idx =
            over(DType::I64, &[4, 3], &[3, 1]));
        refuse!("scores at an odd address", Error::Layout { arg: "scores", .. }, |a| {
            // SAFETY: as above.
            let odd = unsafe { TensorMut::from_raw(&call.device, call.floats.as_ptr() + 4, DType::F32, &[4, 8], &[8, 1]) };
            a.scores = Some(odd.unwrap());
        });
        refuse!("other weights", Error::Shape { arg: "topk_weights", .. }, |a| a.topk_weights =
            over(DType::F32, &[4, 2], &[2, 1]));
        refuse!("columns of logical indices", Error::Layout { arg: "unmapped_topk_idx", .. }, |a| a.unmapped_topk_idx =
            Some(over(DType::I64, &[4, 2], &[1, 4])));
        refuse!("more choices than experts", Error::Value { .. }, |a| a.topk_idx = over(DType::I64, &[4, 10], &[10, 1]));
        // As it is, it is accepted.
        let mut out = Out::new(&device);
        moe_topk_gate_forward(&device.stream().unwrap(), args(call, &mut out)).unwrap();
        assert!(out.idx.to_vec().unwrap()[..12].iter().all(|expert| (0..9).contains(expert)));
    }

    #[test]
    fn more_than_32_slots() {
        let device = Device::emulator();
        let logits = device.zeros::<f32>(64).unwrap();
        let (mut idx, mut weights) = (device.zeros::<i64>(33).unwrap(), device.zeros::<f32>(33).unwrap());
        let args = Args {
            num_shared_experts: 1,
            ..Args::new(
                logits.tensor(&[1, 64]).unwrap(),
                idx.tensor_mut(&[1, 33]).unwrap(),
                weights.tensor_mut(&[1, 33]).unwrap(),
            )
        };
        let error = moe_topk_gate_forward(&device.stream().unwrap(), args).unwrap_err();
        assert_eq!(error.to_string(), "moe_topk_gate_forward: num_topk + num_shared_experts is 33, allowed: 1 to 32");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn any_shape_and_option(
            t in 0u64..14, quads in 1u64..90, k in 0u64..33, s in 0u64..3, pad in 0u64..3, bits in 0u32..32, offset in 0u64..5, seed: u64,
        ) {
            let (e, options) = (4 * quads, Options::new(bits, s));
            let k = k.min(e).min(32 - options.shared);
            let x = inputs(Rng::new(seed), t, pad, (e, k), options, seed % 3 == 0);
            let name = format!("e={e},k={k},t={t},pad={pad},{},offset={offset},seed={seed}", options.name());
            let result = check(&Device::emulator(), &x, offset, &name);
            prop_assert!(result.is_ok(), "{:?}", result);
        }
    }
}
