//! top2_sum_gate: reference, cases, checks and benchmark.

use super::common_route::{FILL, GUARD, inside, prefilled, uploaded};
use crate::support::bench::Row;
use crate::support::cases::{Depth, rows_apart};
use crate::support::compare::{allclose, equal, untouched};
use crate::support::golden::{self, Case, Golden};
use crate::support::rng::Rng;
use crate::support::suite::{Ctx, Report, Suite, ensure, text};
use ferrotile::moe::moe_topk_gate_forward::PhysicalMap;
use ferrotile::moe::top2_sum_gate::{Args, ScoringFunc, top2_sum_gate};
use ferrotile::{Buffer, Device, Stream};
use rayon::prelude::*;

/// The checks of this op.
pub const SUITE: Suite = Suite { op: "top2_sum_gate", run };

const FUNCTIONS: [ScoringFunc; 3] = [ScoringFunc::Sigmoid, ScoringFunc::SqrtSoftplus, ScoringFunc::Softmax];

/// The peers' name.
fn function_name(function: ScoringFunc) -> &'static str {
    match function {
        ScoringFunc::Sigmoid => "sigmoid",
        ScoringFunc::SqrtSoftplus => "sqrtsoftplus",
        ScoringFunc::Softmax => "softmax",
    }
}

/// Experts and choices: groups, kept groups, experts, shared experts, choices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shape {
    groups: u64,
    kept: u64,
    e: u64,
    shared: u64,
    k: u64,
}

/// The configurations of moe.md.
const GRID: [Shape; 11] = [
    shape(0, 0, 72, 1, 6),
    shape(0, 0, 32, 2, 6),
    shape(0, 0, 64, 2, 6),
    shape(0, 0, 96, 2, 6),
    shape(0, 0, 16, 2, 6),
    shape(0, 0, 36, 2, 6),
    shape(0, 0, 108, 2, 6),
    shape(0, 0, 128, 2, 6),
    shape(0, 0, 144, 2, 6),
    shape(8, 8, 256, 2, 8),
    shape(8, 4, 256, 2, 8),
];

/// Rows of any length and alignment, as many choices as there may be, groups of any size and number.
const ODD: [Shape; 24] = [
    shape(0, 0, 1, 0, 1),
    shape(0, 0, 7, 1, 7),
    shape(0, 0, 33, 0, 32),
    shape(0, 0, 61, 2, 30),
    shape(0, 0, 64, 1, 31),
    shape(0, 0, 128, 0, 1),
    shape(0, 0, 129, 0, 3),
    shape(0, 0, 256, 0, 32),
    shape(0, 0, 257, 2, 8),
    shape(0, 0, 384, 1, 8),
    shape(0, 0, 512, 0, 10),
    shape(0, 0, 1001, 0, 17),
    shape(0, 0, 1024, 2, 8),
    shape(0, 0, 6000, 0, 8),
    shape(1, 1, 40, 0, 4),
    shape(4, 2, 72, 1, 6),
    shape(12, 4, 72, 1, 6),
    shape(3, 1, 45, 0, 15),
    shape(8, 3, 160, 2, 6),
    shape(32, 5, 64, 0, 8),
    shape(32, 31, 256, 0, 32),
    shape(31, 2, 62, 0, 4),
    shape(4, 2, 512, 0, 8),
    shape(2, 1, 516, 0, 9),
];

const fn shape(groups: u64, kept: u64, e: u64, shared: u64, k: u64) -> Shape {
    Shape { groups, kept, e, shared, k }
}

/// What else a case may have.
#[derive(Clone, Copy, Debug)]
struct Options {
    function: ScoringFunc,
    shared: bool,
    fixed: bool,
    /// A map with replicas, whose indices are anything, instead of one of the experts themselves.
    replicas: bool,
    unmapped: bool,
    /// Tokens at the end that are masked.
    pad: u64,
    ep_rank: u64,
    ep: u64,
    tp_rank: u64,
    tp: u64,
}

/// Everything that the op reads.
struct Inputs {
    logits: Vec<f32>,
    bias: Vec<f32>,
    mask: Option<Vec<u8>>,
    fixed: Option<Vec<u8>>,
    /// What `unmapped_topk_idx` holds before, if it is given.
    given: Option<Vec<i64>>,
    /// Map, number of replicas, and columns.
    map: Option<(Vec<i32>, Vec<i32>, u64)>,
    function: ScoringFunc,
    shape: Shape,
    /// As many as are routed to.
    shared: u64,
    factor: f32,
    ranks: [u64; 4],
    t: u64,
}

/// What the op writes; weights here are exact ones.
struct Outputs {
    idx: Vec<i64>,
    weights: Vec<f64>,
    unmapped: Option<Vec<i64>>,
}

impl Inputs {
    /// Scores of a row.
    fn scores(&self, x: &[f32]) -> Vec<f64> {
        let x = x.iter().map(|x| f64::from(*x));
        match self.function {
            ScoringFunc::Sigmoid => x.map(|x| 1.0 / (1.0 + (-x).exp())).collect(),
            ScoringFunc::SqrtSoftplus => x.map(|x| if x > 40.0 { x } else { x.exp().ln_1p() }.sqrt()).collect(),
            ScoringFunc::Softmax => {
                let max = x.clone().fold(f64::NEG_INFINITY, f64::max);
                let powers: Vec<f64> = x.map(|x| (x - max).exp()).collect();
                let sum: f64 = powers.iter().sum();
                powers.iter().map(|p| p / sum).collect()
            }
        }
    }

    /// What the experts of a row are ranked by.
    fn ranking(&self, x: &[f32], scores: &[f64]) -> Vec<f64> {
        let of = |i: usize| if self.function == ScoringFunc::Softmax { f64::from(x[i]) } else { scores[i] };
        (0..x.len()).map(|i| of(i) + f64::from(self.bias[i])).collect()
    }

    /// Groups by descending sum of their best two, and the sums in that order.
    fn groups(&self, ranking: &[f64]) -> Vec<(usize, f64)> {
        let of_group = (self.shape.e / self.shape.groups) as usize;
        let mut groups: Vec<(usize, f64)> = ranking
            .chunks(of_group)
            .map(|group| {
                let mut group = group.to_vec();
                group.sort_by(|a, b| b.total_cmp(a));
                group[0] + group[1]
            })
            .enumerate()
            .collect();
        // Stable.
        groups.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap());
        groups
    }

    fn has_groups(&self) -> bool {
        self.shape.kept < self.shape.groups
    }

    /// All experts that may be chosen, best first.
    fn order(&self, ranking: &[f64]) -> Vec<usize> {
        let of_group = self.shape.e.checked_div(self.shape.groups).unwrap_or(1) as usize;
        let mut order: Vec<usize> = (0..ranking.len()).collect();
        if self.has_groups() {
            let kept: Vec<usize> = self.groups(ranking)[..self.shape.kept as usize].iter().map(|group| group.0).collect();
            order.retain(|expert| kept.contains(&(expert / of_group)));
        }
        // Stable.
        order.sort_by(|a, b| ranking[*b].partial_cmp(&ranking[*a]).unwrap());
        order
    }

    /// Whether rounding scores to f32 can change what is chosen from a row, or the order: neighbours are neither equal because they are
    /// made of equal numbers, nor apart.
    fn is_close(&self, x: &[f32]) -> bool {
        let ranking = self.ranking(x, &self.scores(x));
        let apart = |a: f64, b: f64| a - b > 2e-6 * a.abs().max(1.0);
        let order = self.order(&ranking);
        let experts = order.windows(2).take(self.shape.k as usize).any(|pair| {
            let same = pair.iter().all(|i| x[*i] == x[pair[0]] && self.bias[*i] == self.bias[pair[0]]);
            !same && !apart(ranking[pair[0]], ranking[pair[1]])
        });
        let kept = self.shape.kept as usize;
        // Without bias equal sums are those of equal logits.
        let no_bias = self.bias.iter().all(|bias| *bias == 0.0);
        let groups = self.has_groups() && {
            let groups = self.groups(&ranking);
            let (last, next) = (groups[kept - 1].1, groups[kept].1);
            !(apart(last, next) || no_bias && last == next)
        };
        experts || groups
    }

    fn outputs(&self) -> Outputs {
        let (e, k, s) = (self.shape.e as usize, self.shape.k as usize, self.shared as usize);
        let [ep_rank, ep, tp_rank, tp] = self.ranks;
        let columns = self.map.as_ref().map_or(1, |map| map.2);
        let per_rank = ((self.shape.e + columns - 1) / ep) as i64;
        let token = |t: usize| -> (Vec<i64>, Vec<f64>, Vec<i64>) {
            if self.mask.as_ref().is_some_and(|mask| mask[t] == 0) {
                return (vec![-1; k + s], vec![0.0; k + s], vec![-1; k]);
            }
            let x = &self.logits[t * e..(t + 1) * e];
            let scores = self.scores(x);
            let chosen: Vec<i64> = if self.fixed.as_ref().is_some_and(|fixed| fixed[t] != 0) {
                self.given.as_ref().unwrap()[t * k..(t + 1) * k].to_vec()
            } else {
                self.order(&self.ranking(x, &scores))[..k].iter().map(|i| *i as i64).collect()
            };
            let of = |expert: i64| if expert < 0 { 0.0 } else { scores[expert as usize] };
            let sum = chosen.iter().fold(1e-20, |sum, expert| sum + of(*expert));
            let mut weights: Vec<f64> = chosen.iter().map(|expert| of(*expert) / sum * f64::from(self.factor)).collect();
            weights.extend(vec![1.0; s]);
            let place = |logical: i64| {
                let place = match &self.map {
                    Some((map, count, columns)) if logical >= 0 => {
                        let turn = (u128::from(ep_rank) + t as u128 * 23333) % count[logical as usize] as u128;
                        i64::from(map[logical as usize * *columns as usize + turn as usize])
                    }
                    _ => logical,
                };
                if place < 0 {
                    return -1;
                }
                let rank = place / per_rank;
                if rank % tp as i64 != tp_rank as i64 { -1 } else { rank / tp as i64 * per_rank + place % per_rank }
            };
            let idx = chosen.iter().copied().chain(e as i64..(e + s) as i64).map(place).collect();
            (idx, weights, chosen)
        };
        let tokens: Vec<_> = (0..self.t as usize).into_par_iter().map(token).collect();
        Outputs {
            idx: tokens.iter().flat_map(|token| token.0.clone()).collect(),
            weights: tokens.iter().flat_map(|token| token.1.clone()).collect(),
            unmapped: self.given.is_some().then(|| tokens.iter().flat_map(|token| token.2.clone()).collect()),
        }
    }
}

/// Inputs as in moe.md, in rows of several kinds if not `plain`.
fn inputs(rng: Rng, t: u64, shape: Shape, options: Options, plain: bool) -> Inputs {
    let Options { function, shared, fixed, replicas, unmapped, pad, ep_rank, ep, tp_rank, tp } = options;
    let (n, e, shared) = (t + pad, shape.e, if shared { shape.shared } else { 0 });
    let flags = |stream: u64| (0..n).map(|i| rng.stream(stream).below(i, 2) as u8 * (1 + (i % 255) as u8)).collect();
    let rows = e + shared;
    let map = (shared > 0 || replicas).then(|| {
        let columns = if replicas { 3 + shared } else { 33 };
        let count = |i| if replicas { 1 + rng.stream(2).below(i, columns) as i32 } else { 1 };
        let place = |i: u64| if replicas { rng.stream(3).below(i, e + columns) as i32 - 1 } else { (i / columns) as i32 };
        ((0..rows * columns).map(place).collect(), (0..rows).map(count).collect(), columns)
    });
    let zero_bias = !plain && rng.stream(4).below(0, 2) == 0;
    let mut x = Inputs {
        logits: Vec::new(),
        bias: if zero_bias { vec![0.0; e as usize] } else { rng.stream(5).normal_f32(e as usize) },
        mask: (pad > 0).then(|| (0..n).map(|i| (i < t) as u8 * 7).collect()),
        fixed: fixed.then(|| if plain { vec![1; n as usize] } else { flags(6) }),
        given: (unmapped || fixed).then(|| {
            let given = rng.stream(7).ints_i64((n * shape.k) as usize, 0, e as i64);
            // None at all is allowed too.
            given.into_iter().enumerate().map(|(i, v)| if !plain && i % 37 == 5 { -1 } else { v }).collect()
        }),
        map,
        function,
        shape,
        shared,
        factor: 1.5,
        ranks: [ep_rank, ep, tp_rank, tp],
        t: n,
    };
    let row = |r: u64| -> Vec<f32> {
        for attempt in 0..200 {
            let rng = rng.stream(1000 + attempt).stream(r);
            let draw = |rng: &Rng, i: u64| rng.stream(1).below(i, 1000);
            let kind = if plain || attempt > 3 { 0 } else { r % 8 };
            let row = rng.fill(e as usize, |rng, i| match kind {
                // Equal ones, and few different ones.
                1 => 0.0,
                2 => (draw(rng, i) % 4) as f32 - 1.0,
                3 => 20.0 * rng.normal(i),
                // From far below, where scores vanish, to far above.
                4 => draw(rng, i) as f32 - 500.0,
                // Ascending: the best are neighbours, all in a lane or two.
                5 => i as f32 * 0.25 - 5.0,
                // The best are in one lane of 32.
                6 => rng.normal(i) + if i % 32 == 5 || i / 4 % 32 == 7 { 9.0 } else { 0.0 },
                _ => rng.normal(i),
            });
            if !x.is_close(&row) {
                return row;
            }
        }
        panic!("no row of {e} experts whose scores are apart")
    };
    x.logits = (0..n).into_par_iter().flat_map_iter(row).collect();
    x
}

/// Everything a launch needs.
struct Buffers {
    logits: Buffer<f32>,
    bias: Buffer<f32>,
    mask: Option<Buffer<u8>>,
    fixed: Option<Buffer<u8>>,
    map: Option<(Buffer<i32>, Buffer<i32>, u64)>,
    unmapped: Option<Buffer<i64>>,
    idx: Buffer<i64>,
    weights: Buffer<f32>,
    /// Elements before every tensor, and between rows of `unmapped`.
    offset: u64,
    function: ScoringFunc,
    shape: Shape,
    shared: u64,
    factor: f32,
    ranks: [u64; 4],
    t: u64,
}

impl Buffers {
    fn new(device: &Device, x: &Inputs, offset: u64) -> Result<Self, String> {
        let flags = |flags: &Option<Vec<u8>>| flags.as_ref().map(|flags| uploaded(device, flags, offset)).transpose();
        let (k, slots) = (x.shape.k, x.t * (x.shape.k + x.shared));
        let fill = i64::from_ne_bytes([FILL; 8]);
        let given = x.given.as_ref().map(|given| {
            let mut all = rows_apart(given, k, (k + offset, offset), fill);
            all.resize((offset + x.t * (k + offset) + GUARD) as usize, fill);
            device.upload(&all).map_err(text)
        });
        Ok(Self {
            logits: uploaded(device, &x.logits, offset)?,
            bias: uploaded(device, &x.bias, offset)?,
            mask: flags(&x.mask)?,
            fixed: flags(&x.fixed)?,
            map: match &x.map {
                Some((map, count, columns)) => Some((uploaded(device, map, offset)?, uploaded(device, count, offset)?, *columns)),
                None => None,
            },
            unmapped: given.transpose()?,
            idx: prefilled(device, slots, offset)?,
            weights: prefilled(device, slots, offset)?,
            offset,
            function: x.function,
            shape: x.shape,
            shared: x.shared,
            factor: x.factor,
            ranks: x.ranks,
            t: x.t,
        })
    }

    fn call(&mut self, stream: &Stream) -> ferrotile::Result<()> {
        let (Shape { groups, kept, e, k, .. }, s, t, o) = (self.shape, self.shared, self.t, self.offset);
        let [ep_rank, num_ep_ranks, tp_rank, num_tp_ranks] = self.ranks;
        let one = [1];
        macro_rules! flags {
            ($name:ident) => {
                match &self.$name {
                    Some(flags) => Some(flags.strided(&[t], &one, o)?),
                    None => None,
                }
            };
        }
        let slots = [k + s, 1];
        let args = Args {
            num_groups: groups,
            num_topk_groups: kept,
            num_shared_experts: s,
            routed_scaling_factor: self.factor,
            ep_rank,
            num_ep_ranks,
            tp_rank,
            num_tp_ranks,
            mask: flags!(mask),
            fix_routing_mask: flags!(fixed),
            physical_map: match &self.map {
                Some((map, count, columns)) => Some(PhysicalMap {
                    to_physical_map: map.strided(&[e + s, *columns], &[*columns, 1], o)?,
                    logical_count: count.strided(&[e + s], &one, o)?,
                }),
                None => None,
            },
            unmapped_topk_idx: match &mut self.unmapped {
                Some(unmapped) => Some(unmapped.strided_mut(&[t, k], &[k + o, 1], o)?),
                None => None,
            },
            ..Args::new(
                self.function,
                self.logits.strided(&[t, e], &[e, 1], o)?,
                self.bias.strided(&[e], &one, o)?,
                self.idx.strided_mut(&[t, k + s], &slots, o)?,
                self.weights.strided_mut(&[t, k + s], &slots, o)?,
            )
        };
        top2_sum_gate(stream, args)
    }

    /// What was written, if nothing else was.
    fn read(&self, name: &str) -> Result<Written, String> {
        let (k, len, o) = (self.shape.k, self.t * (self.shape.k + self.shared), self.offset);
        let unmapped = match &self.unmapped {
            Some(unmapped) => {
                let all = unmapped.to_vec().map_err(text)?;
                untouched("unmapped_topk_idx", name, &[self.t, k], &[k + o, 1], &all[o as usize..], FILL)?;
                let rows = all[o as usize..].chunks((k + o) as usize).take(self.t as usize);
                Some(rows.flat_map(|row| row[..k as usize].to_vec()).collect())
            }
            None => None,
        };
        Ok(Written {
            idx: inside("topk_idx", name, &self.idx, len, o)?,
            weights: inside("topk_weights", name, &self.weights, len, o)?,
            unmapped,
        })
    }
}

/// What a launch wrote.
struct Written {
    idx: Vec<i64>,
    weights: Vec<f32>,
    unmapped: Option<Vec<i64>>,
}

impl Written {
    /// The same bytes.
    fn equal(&self, other: &Self, name: &str) -> Result<(), String> {
        let len = [self.idx.len() as u64];
        equal("topk_idx", name, &len, &self.idx, &other.idx)?;
        equal("topk_weights", name, &len, &self.weights, &other.weights)?;
        let unmapped = [&self.unmapped, &other.unmapped].map(|unmapped| unmapped.clone().unwrap_or_default());
        equal("unmapped_topk_idx", name, &[unmapped[1].len() as u64], &unmapped[0], &unmapped[1])
    }
}

fn launch(device: &Device, x: &Inputs, offset: u64, name: &str) -> Result<Written, String> {
    let mut buffers = Buffers::new(device, x, offset)?;
    let stream = device.stream().map_err(text)?;
    buffers.call(&stream).map_err(text)?;
    stream.synchronize().map_err(text)?;
    buffers.read(name)
}

/// Relative error of weights. Scores are within 3 units of the last place (2^-23 at most each), those of softmax as the op says, where the sum
/// over all experts does not matter, which divides all weights; `D` has as much, and half a unit for each of up to 32 additions.
const RELATIVE: f64 = 4e-6;

/// Weights of scores that are subnormal are far below.
const ABSOLUTE: f64 = 1e-12;

fn check(device: &Device, x: &Inputs, offset: u64, name: &str) -> Result<Written, String> {
    let got = launch(device, x, offset, name)?;
    let expected = x.outputs();
    let (slots, k) = ([x.t, x.shape.k + x.shared], [x.t, x.shape.k]);
    if let (Some(got), Some(expected)) = (&got.unmapped, &expected.unmapped) {
        equal("unmapped_topk_idx", name, &k, got, expected)?;
    }
    equal("topk_idx", name, &slots, &got.idx, &expected.idx)?;
    allclose("topk_weights", name, &slots, &got.weights, &expected.weights, (ABSOLUTE, RELATIVE))?;
    for (t, weights) in got.weights.chunks(slots[1] as usize).enumerate() {
        let masked = x.mask.as_ref().is_some_and(|mask| mask[t] == 0);
        let exact = if masked { weights } else { &weights[x.shape.k as usize..] };
        let value = if masked { 0f32 } else { 1.0 };
        ensure(exact.iter().all(|w| w.to_bits() == value.to_bits()), || {
            format!("topk_weights of token {t}: {weights:?}; {name}")
        })?;
    }
    // What a GPU computes has the bits of the emulator.
    if !device.is_emulator() && x.t * x.shape.e <= 1 << 14 {
        got.equal(&launch(&Device::emulator(), x, offset, name)?, &format!("GPU and emulator, {name}"))?;
    }
    Ok(got)
}

/// The grid of moe.md: whether a configuration can have its shared experts there.
fn shares(shape: Shape) -> bool {
    shape.k.is_multiple_of(shape.shared) && shape.e.is_multiple_of(shape.k / shape.shared)
}

fn grid(depth: Depth) -> Vec<(u64, Shape, Options)> {
    let tokens: &[u64] = match depth {
        Depth::Small => &[3],
        Depth::Full => &[0, 4001, 8001],
    };
    let mut cases = Vec::new();
    for shape in GRID {
        for function in FUNCTIONS {
            for bits in 0..16u32 {
                let bit = |i: u32| bits >> i & 1 == 1;
                let (pad, tp_rank, shared, fixed) = (10 * u64::from(bit(0)), u64::from(bit(1)), bit(2), bit(3));
                let pad = if depth == Depth::Small { pad / 5 } else { pad };
                let options =
                    Options { function, shared, fixed, replicas: false, unmapped: true, pad, ep_rank: 0, ep: 4, tp_rank, tp: 2 };
                if !shared || shares(shape) {
                    cases.extend(tokens.iter().map(|t| (*t, shape, options)));
                }
            }
        }
    }
    cases
}

/// Odd shapes, each with a choice of options that its number makes.
fn odd() -> Vec<(u64, Shape, Options)> {
    let case = |(i, shape): (usize, Shape)| {
        FUNCTIONS.into_iter().enumerate().map(move |(f, function)| {
            let n = (3 * i + f) as u64;
            let (replicas, shared) = (n.is_multiple_of(2), n.is_multiple_of(4) && shape.shared > 0);
            let ep = [1, 2, 3][n as usize % 3].min(shape.e);
            let options = Options {
                function,
                shared,
                fixed: n % 5 == 1,
                replicas,
                unmapped: !n.is_multiple_of(3),
                pad: n % 2,
                ep_rank: ep - 1,
                ep,
                tp_rank: n % 4 / 2,
                tp: 2 + n % 2,
            };
            (if shape.e > 1024 { 3 } else { 9 }, shape, options)
        })
    };
    ODD.into_iter().enumerate().flat_map(case).collect()
}

fn name((t, shape, options): &(u64, Shape, Options)) -> String {
    let Shape { groups, kept, e, shared, k } = shape;
    let Options { function, shared: with, fixed, replicas, unmapped, pad, ep_rank, ep, tp_rank, tp } = options;
    let (function, s) = (function_name(*function), if *with { *shared } else { 0 });
    format!(
        "e={e},ep={ep_rank}/{ep},fixed={fixed},g={groups},k={k},kg={kept},pad={pad},replicas={replicas},s={s},score={function},t={t},\
         tp={tp_rank}/{tp},unmapped={unmapped}"
    )
}

fn run(ctx: &Ctx) -> Result<Report, String> {
    let device = &ctx.device;
    for case in odd() {
        let name = name(&case);
        if ctx.case(&name) {
            let (t, shape, options) = case;
            let x = inputs(Rng::named(&name), t, shape, options, false);
            // Two places: vectors at multiples of 16 bytes, and nothing so.
            for offset in [0, 1] {
                check(device, &x, offset, &format!("{name},offset={offset}"))?;
            }
        }
    }
    for case in grid(ctx.depth) {
        let name = name(&case);
        if ctx.case(&name) {
            let (t, shape, options) = case;
            check(device, &inputs(Rng::named(&name), t, shape, options, true), 0, &name)?;
        }
    }
    let plain = |function| Options {
        function,
        shared: false,
        fixed: false,
        replicas: true,
        unmapped: true,
        pad: 0,
        ep_rank: 1,
        ep: 2,
        tp_rank: 0,
        tp: 2,
    };
    // Blocks of several tokens, the last one not full; `t * 23333` beyond 32 bits.
    let many = if ctx.depth == Depth::Small { 2051 } else { 200_003 };
    let case = (many, shape(0, 0, 6, 1, 2), Options { shared: true, pad: 3, ..plain(ScoringFunc::Softmax) });
    if ctx.case(&name(&case)) {
        check(device, &inputs(Rng::new(1), case.0, case.1, case.2, false), 0, &name(&case))?;
    }
    if ctx.case("zeros") {
        check_zeros(device)?;
    }
    if ctx.case("not finite") {
        check_not_finite(device)?;
    }
    if ctx.case("deterministic") {
        let x = inputs(Rng::new(7), 33, GRID[10], Options { shared: true, ..plain(ScoringFunc::SqrtSoftplus) }, false);
        let [first, second] = [0, 1].map(|_| launch(device, &x, 0, "deterministic"));
        second?.equal(&first?, "a second run")?;
    }
    let notes = golden::check_cases(ctx, &["top2_sum_gate"], |golden, case| check_golden(device, golden, case))?;
    if !device.is_emulator() && ctx.case("graph") {
        check_graph(device)?;
    }
    Ok(Report { notes, ..ctx.report() })
}

/// All logits and biases equal: the first experts, in order.
fn check_zeros(device: &Device) -> Result<(), String> {
    for shape in GRID {
        let options = Options {
            function: ScoringFunc::Sigmoid,
            shared: false,
            fixed: false,
            replicas: false,
            unmapped: true,
            pad: 1,
            ep_rank: 0,
            ep: 4,
            tp_rank: 0,
            tp: 2,
        };
        let name = name(&(3, shape, options));
        let mut x = inputs(Rng::new(0), 3, shape, options, true);
        x.logits.fill(0.0);
        x.bias.fill(0.0);
        let got = check(device, &x, 0, &name)?;
        let first: Vec<i64> = (0..(shape.e / 4).min(shape.k) as i64).collect();
        ensure(got.idx.starts_with(&first), || format!("{name}: {:?}", got.idx))?;
        // A logit of -0.0 is as good.
        x.logits.fill(-0.0);
        got.equal(&launch(device, &x, 0, &name)?, &name)?;
    }
    Ok(())
}

/// -inf counts as a small number, and NaN is never chosen.
fn check_not_finite(device: &Device) -> Result<(), String> {
    let options = Options {
        function: ScoringFunc::Sigmoid,
        shared: false,
        fixed: false,
        replicas: false,
        unmapped: true,
        pad: 0,
        ep_rank: 0,
        ep: 1,
        tp_rank: 0,
        tp: 1,
    };
    for function in FUNCTIONS {
        let mut x = inputs(Rng::new(3), 2, shape(0, 0, 70, 0, 4), Options { function, ..options }, true);
        x.bias.fill(0.0);
        for (i, logit) in x.logits.iter_mut().enumerate() {
            *logit = match i {
                // Two numbers, one -inf, and nothing else in the first row; many numbers in the second one.
                5 => 1.0,
                64 => 2.0,
                9 => f32::NEG_INFINITY,
                _ if i < 70 => f32::NAN,
                _ if i % 2 == 0 => f32::NEG_INFINITY,
                _ => (i % 7) as f32,
            };
        }
        let got = launch(device, &x, 0, "not finite")?;
        let name = function_name(function);
        equal("topk_idx", name, &[2, 4], &got.idx, &[64, 5, 9, -1, 13, 27, 41, 55])?;
        equal("unmapped_topk_idx", name, &[2, 4], got.unmapped.as_deref().unwrap_or_default(), &got.idx)?;
        if function != ScoringFunc::Softmax {
            ensure(got.weights[2] == 0.0 && got.weights[3] == 0.0, || format!("{name}: weights {:?}", got.weights))?;
        }
        ensure(got.weights[4..].iter().all(|w| *w == 0.375), || format!("{name}: weights {:?}", got.weights))?;
    }
    Ok(())
}

fn check_golden(device: &Device, golden: &Golden, case: &Case) -> Result<(), String> {
    let name = case.name();
    let number = |name: &str| case.param::<u64>(name);
    let function: String = case.param("scoring_func")?;
    let function = FUNCTIONS.into_iter().find(|f| function_name(*f) == function).ok_or_else(|| name.clone())?;
    ensure(!case.param::<bool>("use_shared_as_routed")?, || format!("{name}: shared experts"))?;
    let logits = golden.tensor(case, "in/logits")?;
    let (t, e, k) = (logits.shape[0], logits.shape[1], number("num_topk")?);
    let x = Inputs {
        logits: logits.to_vec()?,
        bias: golden.tensor(case, "in/bias")?.to_vec()?,
        mask: None,
        fixed: None,
        given: None,
        map: None,
        function,
        shape: shape(number("num_groups")?, number("num_topk_groups")?, e, 0, k),
        shared: 0,
        factor: case.param("routed_scaling_factor")?,
        ranks: [number("ep_rank")?, number("num_ep_ranks")?, number("tp_rank")?, number("num_tp_ranks")?],
        t,
    };
    let idx: Vec<i64> = golden.tensor(case, "out/0")?.to_vec()?;
    let weights: Vec<f32> = golden.tensor(case, "out/1")?.to_vec()?;
    equal("reference", &name, &[t, k], &x.outputs().idx, &idx)?;
    let got = check(device, &x, 0, &name)?;
    equal("topk_idx", &name, &[t, k], &got.idx, &idx)?;
    allclose("topk_weights", &name, &[t, k], &got.weights, &weights, (0.0, 2e-6))
}

/// A captured launch does its work at every replay, on the data that are there then.
fn check_graph(device: &Device) -> Result<(), String> {
    let options = Options {
        function: ScoringFunc::SqrtSoftplus,
        shared: true,
        fixed: false,
        replicas: true,
        unmapped: false,
        pad: 4,
        ep_rank: 1,
        ep: 4,
        tp_rank: 1,
        tp: 2,
    };
    let mut x = inputs(Rng::new(0), 32, GRID[10], options, true);
    let mut buffers = Buffers::new(device, &x, 0)?;
    let stream = device.stream().map_err(text)?;
    // Compiled before the capture.
    buffers.call(&stream).map_err(text)?;
    let graph = stream.capture(|stream| buffers.call(stream)).map_err(text)?;
    for seed in 1..4 {
        x.logits = inputs(Rng::new(seed), 32, GRID[10], options, true).logits;
        let bias = x.bias.clone();
        let other = inputs(Rng::new(seed), 32, GRID[10], options, true);
        x.bias = other.bias;
        let mut all = x.logits.clone();
        all.resize(all.len() + GUARD as usize, 0.0);
        buffers.logits.copy_from(&all).map_err(text)?;
        let mut all = x.bias.clone();
        all.resize(bias.len() + GUARD as usize, 0.0);
        buffers.bias.copy_from(&all).map_err(text)?;
        graph.launch(&stream).map_err(text)?;
        stream.synchronize().map_err(text)?;
        let name = format!("graph, replay {seed}");
        buffers.read(&name)?.equal(&launch(device, &x, 0, &name)?, &name)?;
    }
    Ok(())
}

/// The peers' own benchmark, and other numbers of tokens.
pub fn bench() -> Vec<Row> {
    let row = |t: u64, pad: u64, shape: Shape, function: ScoringFunc| {
        let s = if shares(shape) { shape.shared } else { 0 };
        let Shape { groups, kept, e, k, .. } = shape;
        let name = function_name(function);
        let (n, slots) = (t + pad, k + s);
        Row {
            op: "top2_sum_gate",
            case: format!("e={e},g={groups},k={k},kg={kept},pad={pad},s={s},score={name},t={t}"),
            bytes: n * (4 * e + 8 * k + 12 * slots) + 4 * e,
            build: Box::new(move |device, _| {
                let options = Options {
                    function,
                    shared: s > 0,
                    fixed: false,
                    replicas: false,
                    unmapped: true,
                    pad,
                    ep_rank: 0,
                    ep: 4,
                    tp_rank: 1,
                    tp: 2,
                };
                let mut buffers = Buffers::new(device, &inputs(Rng::new(t), t, shape, options, true), 0)?;
                Ok(Box::new(move |stream| buffers.call(stream)))
            }),
        }
    };
    let mut rows: Vec<Row> = GRID.iter().flat_map(|shape| FUNCTIONS.map(|function| row(32, 4, *shape, function))).collect();
    for t in [1, 16, 128, 4001, 8001] {
        rows.extend([GRID[10], GRID[0]].map(|shape| row(t, 0, shape, ScoringFunc::Sigmoid)));
    }
    rows.extend(FUNCTIONS[1..].iter().map(|function| row(8001, 0, GRID[10], *function)));
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
    fn reference_is_the_definition() {
        let x = Inputs {
            logits: vec![0.0, 3.0, 2.5, 2.0, -9.0, 5.0, -9.0, -8.0, 0.0, 3.0, 2.5, 2.0, -9.0, 5.0, -9.0, -8.0],
            bias: vec![0.0, 0.0, 0.0, 0.0, 0.0, -4.0, 0.0, 0.0],
            mask: Some(vec![1, 0]),
            fixed: None,
            given: Some(vec![0; 4]),
            map: None,
            function: ScoringFunc::Softmax,
            shape: shape(4, 1, 8, 0, 2),
            shared: 0,
            factor: 2.0,
            ranks: [0, 4, 1, 2],
            t: 2,
        };
        // Group 1 has the largest sum, of 2.5 and 2; experts 2 and 3 are rank 1's first ones.
        let outputs = x.outputs();
        assert_eq!((outputs.idx, outputs.unmapped.unwrap()), (vec![0, 1, -1, -1], vec![2, 3, -1, -1]));
        let share = 2.5f64.exp() / (2.5f64.exp() + 2f64.exp());
        assert!((outputs.weights[0] - 2.0 * share).abs() < 1e-12 && outputs.weights[2] == 0.0);
    }

    /// Room for a call.
    struct Room {
        floats: Buffer<f32>,
        ints: Buffer<i32>,
        flags: Buffer<u8>,
        foreign: Buffer<u8>,
        idx: Buffer<i64>,
        weights: Buffer<f32>,
        unmapped: Buffer<i64>,
    }

    /// Four tokens, eight experts in four groups, two choices and a shared expert.
    #[test]
    fn bad_input_is_refused_and_nothing_is_written() {
        let device = Device::emulator();
        let room = || Room {
            floats: device.upload(&[1f32; 160]).unwrap(),
            ints: device.upload(&[1i32; 160]).unwrap(),
            flags: device.upload(&[1u8; 64]).unwrap(),
            foreign: Device::emulator().checked().upload(&[1u8; 64]).unwrap(),
            idx: device.upload(&[-7i64; 160]).unwrap(),
            weights: device.upload(&[-7f32; 160]).unwrap(),
            unmapped: device.upload(&[-7i64; 64]).unwrap(),
        };
        macro_rules! call {
            (|$room:ident, $args:ident| $spoil:expr) => {{
                let mut out = room();
                let $room = room();
                let map = PhysicalMap {
                    to_physical_map: $room.ints.tensor(&[9, 3]).unwrap(),
                    logical_count: $room.ints.tensor(&[9]).unwrap(),
                };
                let mut $args = Args {
                    num_groups: 4,
                    num_topk_groups: 2,
                    num_shared_experts: 1,
                    num_ep_ranks: 2,
                    num_tp_ranks: 2,
                    mask: Some($room.flags.tensor(&[4]).unwrap()),
                    fix_routing_mask: Some($room.flags.tensor(&[4]).unwrap()),
                    physical_map: Some(map),
                    unmapped_topk_idx: Some(out.unmapped.tensor_mut(&[4, 2]).unwrap()),
                    ..Args::new(
                        ScoringFunc::Sigmoid,
                        $room.floats.tensor(&[4, 8]).unwrap(),
                        $room.floats.tensor(&[8]).unwrap(),
                        out.idx.tensor_mut(&[4, 3]).unwrap(),
                        out.weights.tensor_mut(&[4, 3]).unwrap(),
                    )
                };
                $spoil;
                let result = top2_sum_gate(&device.stream().unwrap(), $args);
                let written = out.idx.to_vec().unwrap().iter().chain(&out.unmapped.to_vec().unwrap()).any(|v| *v != -7)
                    || out.weights.to_vec().unwrap().iter().any(|v| *v != -7.0);
                (result, written)
            }};
        }
        macro_rules! refuse {
            ($what:literal, $pattern:pat, |$room:ident, $args:ident| $spoil:expr) => {
                let (result, written) = call!(|$room, $args| $spoil);
                let error = result.expect_err($what);
                assert!(error.to_string().starts_with("top2_sum_gate: ") && !written, "{}: {error}", $what);
                assert!(matches!(error, $pattern), "{}: {error}", $what);
            };
        }
        // As it is, it is accepted.
        let (result, written) = call!(|_room, _args| _args.num_ep_ranks = 2);
        assert!(result.is_ok() && written, "{result:?}");
        refuse!("a vector of logits", Error::Shape { arg: "logits", .. }, |r, a| a.logits = r.floats.tensor(&[32]).unwrap());
        refuse!("i32 as logits", Error::DType { arg: "logits", .. }, |r, a| a.logits = r.ints.tensor(&[4, 8]).unwrap());
        refuse!("columns of logits", Error::Layout { arg: "logits", .. }, |r, a| a.logits =
            r.floats.strided(&[4, 8], &[1, 4], 0).unwrap());
        refuse!("rows of logits with gaps", Error::Layout { arg: "logits", .. }, |r, a| a.logits =
            r.floats.strided(&[4, 8], &[9, 1], 0).unwrap());
        refuse!("other tokens", Error::Shape { .. }, |r, a| a.logits = r.floats.tensor(&[5, 8]).unwrap());
        refuse!("no experts", Error::Value { arg: "num_experts", .. }, |r, a| a.logits = r.floats.tensor(&[4, 0]).unwrap());
        refuse!("other biases", Error::Shape { arg: "bias", .. }, |r, a| a.bias = r.floats.tensor(&[4]).unwrap());
        refuse!("bias with gaps", Error::Layout { arg: "bias", .. }, |r, a| a.bias = r.floats.strided(&[8], &[2], 0).unwrap());
        refuse!("seven experts in four groups", Error::Value { arg: "num_experts", .. }, |r, a| {
            a.logits = r.floats.tensor(&[4, 7]).unwrap();
        });
        refuse!("33 groups", Error::Value { arg: "num_groups", .. }, |_r, a| a.num_groups = 33);
        refuse!("groups of one", Error::Value { arg: "num_experts / num_groups", .. }, |_r, a| a.num_groups = 8);
        refuse!("more groups than there are", Error::Value { arg: "num_topk_groups", .. }, |_r, a| a.num_topk_groups = 5);
        refuse!("no group", Error::Value { arg: "num_topk_groups", .. }, |_r, a| a.num_topk_groups = 0);
        refuse!("groups to keep without groups", Error::Value { arg: "num_topk_groups", .. }, |_r, a| a.num_groups = 0);
        refuse!("more choices than the groups have", Error::Value { arg: "num_topk", .. }, |r, a| {
            a.num_topk_groups = 1;
            a.num_shared_experts = 0;
            a.physical_map = None;
            a.unmapped_topk_idx = None;
            a.fix_routing_mask = None;
        });
        refuse!("shared experts only", Error::Value { .. }, |_r, a| a.num_shared_experts = 3);
        refuse!("shared experts without a map", Error::Value { .. }, |_r, a| a.physical_map = None);
        refuse!("as many columns as shared experts", Error::Value { arg: "columns of to_physical_map", .. }, |r, a| {
            a.physical_map.as_mut().unwrap().to_physical_map = r.ints.tensor(&[9, 1]).unwrap();
        });
        refuse!("map without the shared expert", Error::Shape { arg: "to_physical_map", .. }, |r, a| {
            a.physical_map.as_mut().unwrap().to_physical_map = r.ints.tensor(&[8, 3]).unwrap();
        });
        refuse!("other counts", Error::Shape { arg: "logical_count", .. }, |r, a| {
            a.physical_map.as_mut().unwrap().logical_count = r.ints.tensor(&[8]).unwrap();
        });
        refuse!("f32 as counts", Error::DType { arg: "logical_count", .. }, |r, a| {
            a.physical_map.as_mut().unwrap().logical_count = r.floats.tensor(&[9]).unwrap();
        });
        refuse!("no ranks", Error::Value { arg: "num_ep_ranks", .. }, |_r, a| a.num_ep_ranks = 0);
        refuse!("more ranks than experts", Error::Value { arg: "num_ep_ranks", .. }, |_r, a| a.num_ep_ranks = 11);
        refuse!("a rank that is none", Error::Value { arg: "ep_rank", .. }, |_r, a| a.ep_rank = 2);
        refuse!("no tensor-parallel ranks", Error::Value { arg: "num_tp_ranks", .. }, |_r, a| a.num_tp_ranks = 0);
        refuse!("a tensor-parallel rank that is none", Error::Value { arg: "tp_rank", .. }, |_r, a| a.tp_rank = 2);
        refuse!("a mask of other tokens", Error::Shape { arg: "mask", .. }, |r, a| a.mask = Some(r.flags.tensor(&[8]).unwrap()));
        refuse!("f32 as mask", Error::DType { arg: "mask", .. }, |r, a| a.mask = Some(r.floats.tensor(&[4]).unwrap()));
        refuse!("fixed tokens with gaps", Error::Layout { arg: "fix_routing_mask", .. }, |r, a| a.fix_routing_mask =
            Some(r.flags.strided(&[4], &[2], 0).unwrap()));
        refuse!("fixed tokens without experts", Error::Value { arg: "fix_routing_mask", .. }, |_r, a| a.unmapped_topk_idx = None);
        refuse!("a mask elsewhere", Error::DeviceMismatch { arg: "mask", .. }, |r, a| a.mask =
            Some(r.foreign.tensor(&[4]).unwrap()));
        // SAFETY: refused before anything is written.
        let over = |buffer: &Buffer<f32>, dtype, shape: &[u64], strides: &[u64]| unsafe {
            TensorMut::from_raw(&device, buffer.as_ptr(), dtype, shape, strides).unwrap()
        };
        refuse!("indices over logits", Error::Overlap { a: "logits", b: "topk_idx", .. }, |r, a| a.topk_idx =
            over(&r.floats, DType::I64, &[4, 3], &[3, 1]));
        refuse!("weights over logits", Error::Overlap { a: "logits", b: "topk_weights", .. }, |r, a| a.topk_weights =
            over(&r.floats, DType::F32, &[4, 3], &[3, 1]));
        refuse!("logical indices over logits", Error::Overlap { a: "logits", b: "unmapped_topk_idx", .. }, |r, a| {
            a.unmapped_topk_idx = Some(over(&r.floats, DType::I64, &[4, 2], &[2, 1]));
        });
        refuse!("other weights", Error::Shape { arg: "topk_weights", .. }, |r, a| a.topk_weights =
            over(&r.floats, DType::F32, &[4, 2], &[2, 1]));
        refuse!("columns of logical indices", Error::Layout { arg: "unmapped_topk_idx", .. }, |r, a| a.unmapped_topk_idx =
            Some(over(&r.floats, DType::I64, &[4, 2], &[1, 4])));
        refuse!("33 slots", Error::Value { arg: "num_topk + num_shared_experts", .. }, |r, a| a.topk_idx =
            over(&r.weights, DType::I64, &[1, 33], &[33, 1]));
    }

    /// Wrong experts and counts in memory are reported by the checked emulator, and count as stated elsewhere.
    #[test]
    fn wrong_indices() {
        let options = Options {
            function: ScoringFunc::SqrtSoftplus,
            shared: false,
            fixed: true,
            replicas: true,
            unmapped: true,
            pad: 0,
            ep_rank: 0,
            ep: 1,
            tp_rank: 0,
            tp: 1,
        };
        let mut x = inputs(Rng::new(5), 2, shape(0, 0, 8, 0, 3), options, true);
        x.given = Some(vec![0, 8, 1, 2, 3, 4]);
        let got = launch(&Device::emulator(), &x, 0, "").unwrap();
        assert!(got.idx[1] == -1 && got.weights[1] == 0.0 && got.weights[0] + got.weights[2] > 1.49);
        let error = launch(&Device::emulator().checked(), &x, 0, "").err().unwrap();
        assert!(error.contains(" in memory, allowed: below "), "{error}");
        x.given = Some(vec![0, 7, 1, 2, 3, 4]);
        if let Some((_, count, columns)) = &mut x.map {
            count[3] = *columns as i32 + 1;
        }
        let got = launch(&Device::emulator(), &x, 0, "").unwrap();
        assert_eq!(got.idx[4], i64::from(x.map.as_ref().unwrap().0[9]));
        let error = launch(&Device::emulator().checked(), &x, 0, "").err().unwrap();
        assert!(error.contains(" in memory, allowed: below "), "{error}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn any_shape_and_option(
            t in 0u64..14, e in 1u64..330, k in 1u64..33, s in 0u64..3, groups in 0u64..9, kept in 1u64..9, pad in 0u64..3,
            bits in 0u32..16, ep in 1u64..6, tp in 1u64..5, function in 0usize..3, offset in 0u64..5, seed: u64,
        ) {
            let bit = |i: u32| bits >> i & 1 == 1;
            let groups = if e / groups.max(1) < 2 { 0 } else { groups };
            let (e, kept) = (e - e.checked_rem(groups).unwrap_or(0), kept.min(groups));
            let shape = shape(groups, kept, e, s, k.min(e / groups.max(1) * kept.max(1)).min(32 - s));
            let options = Options {
                function: FUNCTIONS[function],
                shared: bit(0) && s > 0,
                fixed: bit(1),
                replicas: bit(2),
                unmapped: bit(3),
                pad,
                ep_rank: ep.min(e) - 1,
                ep: ep.min(e),
                tp_rank: seed % tp,
                tp,
            };
            let name = format!("{},offset={offset},seed={seed}", name(&(t, shape, options)));
            let x = inputs(Rng::new(seed), t, shape, options, seed % 3 == 0);
            let result = check(&Device::emulator(), &x, offset, &name);
            prop_assert!(result.is_ok(), "{:?}", result.err());
        }
    }
}
