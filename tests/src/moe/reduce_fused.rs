//! reduce_fused: reference, cases, checks and benchmark.

use super::common_expanded::{DeviceMaps, Maps};
use crate::support::bench::{Launch, Row};
use crate::support::cases::{Depth, HIDDENS, MoeCase, moe_bench_cases, moe_cases};
use crate::support::compare::equal;
use crate::support::inputs;
use crate::support::rng::Rng;
use crate::support::suite::{Ctx, Report, Suite, ensure, text};
use crate::support::value::Value;
use ferrotile::moe::reduce_fused::{Args, reduce_fused};
use ferrotile::{Buffer, Device, E4m3, Stream};
use ferrotile_kernels::moe::reduce_fused as kernels;
use half::bf16;
use rayon::prelude::*;

/// The checks of this op.
pub const SUITE: Suite = Suite { op: "reduce_fused", run };

/// Every byte of an output before the launch.
const FILL: u8 = 0xA5;

/// Elements before the first and after the last of the output that must stay as they are.
const GUARD: u64 = 16;

/// Which optional tensors there are.
#[derive(Clone, Copy, Debug)]
struct Options {
    weights: bool,
    x_sf: bool,
    sf: bool,
}

impl Options {
    fn all() -> Vec<Self> {
        (0..8).map(|i| Self { weights: i & 1 != 0, x_sf: i & 2 != 0, sf: i & 4 != 0 }).collect()
    }
}

/// Where rows lie.
#[derive(Clone, Copy, Debug)]
struct Place {
    h: u64,
    /// Elements from one row of `x` to the next.
    stride: u64,
    /// Elements before the first of `x` and of `out`, which changes their alignment.
    offsets: [u64; 2],
}

impl Place {
    fn dense(h: u64) -> Self {
        Self { h, stride: h, offsets: [0, 0] }
    }
}

/// Inputs on both sides.
struct Data<X> {
    maps: Maps,
    on_device: DeviceMaps,
    values: Vec<X>,
    weights: Vec<f32>,
    x_sf: Vec<f32>,
    sf: [f32; 1],
    x_buffer: Buffer<X>,
    weights_buffer: Buffer<f32>,
    x_sf_buffer: Buffer<f32>,
    sf_buffer: Buffer<f32>,
}

impl<X: Value> Data<X> {
    /// `make` gives the values of `x` from a random number and the index.
    fn new(
        device: &Device,
        maps: Maps,
        place: Place,
        name: &str,
        make: impl Fn(&Rng, u64) -> f32 + Sync,
    ) -> Result<Self, String> {
        let rng = Rng::named(name);
        let len = place.offsets[0] + maps.p.saturating_sub(1) * place.stride + place.h;
        let values = rng.fill(len as usize, |rng, i| X::round(make(rng, i)));
        let weights = rng.stream(1).fill(maps.token_topk_to_pos.len(), |rng, i| rng.unit(i));
        let x_sf = rng.stream(2).normal_f32(maps.p as usize);
        Self::with_values(device, maps, values, weights, x_sf, rng.stream(3).normal(0))
    }

    fn with_values(
        device: &Device,
        maps: Maps,
        values: Vec<X>,
        weights: Vec<f32>,
        x_sf: Vec<f32>,
        sf: f32,
    ) -> Result<Self, String> {
        Ok(Self {
            on_device: DeviceMaps::new(device, &maps)?,
            maps,
            x_buffer: device.upload(&values).map_err(text)?,
            weights_buffer: device.upload(&weights).map_err(text)?,
            x_sf_buffer: device.upload(&x_sf).map_err(text)?,
            sf_buffer: device.upload(&[sf]).map_err(text)?,
            values,
            weights,
            x_sf,
            sf: [sf],
        })
    }

    /// One token after the other, one value after the other.
    fn reference<O: Value>(&self, place: Place, options: Options) -> Vec<O> {
        let (h, k) = (place.h as usize, self.maps.k as usize);
        let mut out = vec![O::default(); self.maps.t as usize * h];
        if h == 0 {
            return out;
        }
        out.par_chunks_mut(h).enumerate().for_each(|(token, out)| {
            let mut sums = vec![0.0f32; h];
            for slot in token * k..(token + 1) * k {
                let Ok(row) = usize::try_from(self.maps.token_topk_to_pos[slot]) else { continue };
                let weight = if options.weights { self.weights[slot] } else { 1.0 };
                let factor = if options.x_sf { weight * self.x_sf[row] } else { weight };
                let start = (place.offsets[0] + row as u64 * place.stride) as usize;
                for (sum, value) in sums.iter_mut().zip(&self.values[start..start + h]) {
                    *sum = value.widen().mul_add(factor, *sum);
                }
            }
            for (out, sum) in out.iter_mut().zip(sums) {
                *out = O::round(if options.sf { sum * self.sf[0] } else { sum });
            }
        });
        out
    }
}

/// Room for an output.
struct Output<O> {
    buffer: Buffer<O>,
    start: u64,
}

impl<O: Value> Output<O> {
    fn new(device: &Device, numel: u64, offset: u64) -> Result<Self, String> {
        let mut buffer = device.alloc::<O>((2 * GUARD + offset + numel) as usize).map_err(text)?;
        buffer.fill_bytes(FILL).map_err(text)?;
        Ok(Self { buffer, start: GUARD + offset })
    }

    /// The contents, if nothing around them was written.
    fn read(&self, name: &str) -> Result<Vec<O>, String> {
        let mut all = self.buffer.to_vec().map_err(text)?;
        let (start, end) = (self.start as usize, all.len() - GUARD as usize);
        let fill = bytemuck::pod_read_unaligned::<O>(&[FILL; 16][..size_of::<O>()]).bits();
        let outside = all[..start].iter().chain(&all[end..]).all(|v| v.bits() == fill);
        ensure(outside, || format!("elements outside of out were written; {name}"))?;
        all.truncate(end);
        all.drain(..start);
        Ok(all)
    }
}

fn args<'a, X: Value, O: Value>(
    data: &'a Data<X>,
    out: &'a mut Output<O>,
    place: Place,
    options: Options,
) -> ferrotile::Result<Args<'a>> {
    let Place { h, stride, offsets } = place;
    let Maps { t, k, p, .. } = data.maps;
    let start = out.start;
    Ok(Args {
        x: data.x_buffer.strided(&[p, h], &[stride, 1], offsets[0])?,
        x_sf: if options.x_sf { Some(data.x_sf_buffer.tensor(&[p])?) } else { None },
        topk_weights: if options.weights { Some(data.weights_buffer.tensor(&[t, k])?) } else { None },
        token_topk_to_pos: data.on_device.token_topk_to_pos()?,
        sf: if options.sf { Some(data.sf_buffer.tensor(&[1])?) } else { None },
        out: out.buffer.strided_mut(&[t, h], &[h.max(1), 1], start)?,
    })
}

fn check<X: Value, O: Value>(stream: &Stream, data: &Data<X>, place: Place, options: Options, name: &str) -> Result<(), String> {
    let name = format!("{name},{place:?},{options:?},x={},out={}", X::DTYPE, O::DTYPE);
    let mut out = Output::<O>::new(stream.device(), data.maps.t * place.h, place.offsets[1])?;
    reduce_fused(stream, args(data, &mut out, place, options).map_err(text)?).map_err(text)?;
    let got = out.read(&name)?;
    equal("out", &name, &[data.maps.t, place.h], &got, &data.reference::<O>(place, options))
}

/// The inputs of one type for outputs of all types.
fn check_outputs<X: Value>(stream: &Stream, data: &Data<X>, place: Place, options: Options, name: &str) -> Result<(), String> {
    check::<X, f32>(stream, data, place, options, name)?;
    check::<X, bf16>(stream, data, place, options, name)?;
    check::<X, E4m3>(stream, data, place, options, name)
}

fn small_places() -> Vec<Place> {
    vec![
        Place::dense(0),
        Place::dense(1),
        Place::dense(37),
        Place::dense(72),
        // Fours but no eights.
        Place::dense(20),
        // Enough for the kernel of chunks: of some types a whole chunk and part of a second, part of one, or several.
        Place::dense(904),
        Place { h: 776, stride: 784, offsets: [16, 16] },
        // Whole chunks of 1024 values, one and two. Cases of one and two choices have at most two rows a token, for the kernel of whole
        // chunks; that of one rank has seven, for the kernel of any chunks.
        Place { h: 1024, stride: 1040, offsets: [0, 0] },
        Place { h: 2048, stride: 2064, offsets: [16, 16] },
        // Whole chunks of 512 values, the last one half full for some types.
        Place { h: 1792, stride: 1792, offsets: [16, 16] },
        Place::dense(3584),
        Place { h: 32, stride: 48, offsets: [0, 0] },
        Place { h: 32, stride: 33, offsets: [0, 0] },
        Place { h: 32, stride: 32, offsets: [1, 0] },
        Place { h: 32, stride: 32, offsets: [0, 4] },
    ]
}

/// Normal values with some that are special: both zeros, infinities, NaN, subnormals, the largest.
pub fn awkward(rng: &Rng, i: u64) -> f32 {
    let special = [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1e-40, f32::MAX, -448.0, 465.0, 2f32.powi(-10)];
    match rng.stream(9).below(i, 32) {
        n if n < special.len() as u64 => special[n as usize],
        _ => 100.0 * rng.normal(i),
    }
}

fn small<X: Value>(stream: &Stream, maps: &Maps, place: Place, number: usize, name: &str) -> Result<(), String> {
    let options = Options::all();
    let device = stream.device();
    let data = Data::<X>::new(device, maps.clone(), place, name, |rng, i| rng.normal(i))?;
    check_outputs(stream, &data, place, options[number % 8], name)?;
    let data = Data::<X>::new(device, maps.clone(), place, name, awkward)?;
    check_outputs(stream, &data, place, options[(number + 3) % 8], &format!("{name},awkward"))
}

fn run(ctx: &Ctx) -> Result<Report, String> {
    let device = &ctx.device;
    let stream = device.stream().map_err(text)?;
    for (i, case) in moe_cases(Depth::Small).into_iter().enumerate() {
        for (j, place) in small_places().into_iter().enumerate() {
            let name = format!("{},{place:?}", case.name());
            if ctx.case(&name) {
                let maps = Maps::of_moe(&case, 1, 0);
                let number = 3 * i + j;
                small::<f32>(&stream, &maps, place, number, &name)?;
                small::<bf16>(&stream, &maps, place, number + 1, &name)?;
                small::<E4m3>(&stream, &maps, place, number + 2, &name)?;
            }
        }
    }
    for (name, maps) in special_maps() {
        if ctx.case(name) {
            for (number, options) in Options::all().into_iter().enumerate() {
                let place = Place::dense([40, 13, 1024][(number + 1) % 3]);
                let data = Data::<bf16>::new(device, maps.clone(), place, name, |rng, i| rng.normal(i))?;
                check_outputs(&stream, &data, place, options, name)?;
            }
        }
    }
    if ctx.case("tokens to ask for choices ahead") {
        let t = kernels::AHEAD as u64 + 13;
        let rows = (0..9 * t as i32).map(|i| if i % 9 == i / 9 % 9 { i / 9 } else { -1 }).collect();
        let maps = Maps { t, k: 9, p: t, token_topk_to_pos: rows, pos_to_expert: vec![], pos_to_token: vec![] };
        let place = Place::dense(kernels::WHOLE_CHUNK.into());
        let options = Options { weights: true, x_sf: true, sf: true };
        let data = Data::<bf16>::new(device, maps, place, "ahead", |rng, i| rng.normal(i))?;
        check::<bf16, bf16>(&stream, &data, place, options, "tokens to ask for choices ahead")?;
    }
    if ctx.depth == Depth::Full {
        grid(ctx, &stream)?;
    }
    if ctx.case("twice") {
        twice(&stream)?;
    }
    if !device.is_emulator() && ctx.case("graph") {
        graph(&stream)?;
    }
    // 1.0.0 recorded no call of this op.
    Ok(ctx.report())
}

/// No tokens, no choices, no rows; every choice with a row, more than are looked up at once.
fn special_maps() -> Vec<(&'static str, Maps)> {
    let maps = |t, k, p, token_topk_to_pos| Maps {
        t,
        k,
        p,
        token_topk_to_pos,
        pos_to_expert: vec![0; p as usize],
        pos_to_token: vec![],
    };
    vec![
        ("no tokens", maps(0, 3, 5, vec![])),
        ("no choices", maps(3, 0, 5, vec![])),
        ("no rows", maps(4, 2, 0, vec![-1; 8])),
        ("more choices than lanes", maps(3, 70, 210, (0..210).map(|i| if i % 4 == 1 { -1 } else { 209 - i }).collect())),
        ("all choices", maps(5, 17, 85, (0..85).map(|i| 84 - i).collect())),
        // The same row in several choices, which no mapping has.
        ("one row for all", maps(9, 8, 1, vec![0; 72])),
        ("last choice only", maps(70, 9, 70, (0..630).map(|i| if i % 9 == 8 { i / 9 } else { -1 }).collect())),
    ]
}

/// The grid of the specification: every case and hidden size, each with another two of its sixteen combinations of types and options; all of them
/// for the smallest one.
fn grid(ctx: &Ctx, stream: &Stream) -> Result<(), String> {
    let device = &ctx.device;
    let widest = Place::dense(7168);
    let mut turn = 0;
    for (number, case) in moe_bench_cases().into_iter().enumerate() {
        if !ctx.case(&case.name()) {
            continue;
        }
        let maps = Maps::of_moe(&case, 1, 0);
        // Narrower rows are views of the widest ones.
        let wide = Data::<f32>::new(device, maps.clone(), widest, &case.name(), |rng, i| rng.normal(i))?;
        let narrow = Data::<bf16>::new(device, maps, widest, &case.name(), |rng, i| rng.normal(i))?;
        for h in HIDDENS.into_iter().filter(|h| h % 256 == 0) {
            let place = Place { h, ..widest };
            let turns = if number == 0 && h == 2048 { 8 } else { 1 };
            for _ in 0..turns {
                let options = |sf| Options { weights: turn & 1 != 0, x_sf: turn & 2 != 0, sf };
                if turn & 4 != 0 {
                    check::<f32, E4m3>(stream, &wide, place, options(true), &case.name())?;
                    check::<bf16, bf16>(stream, &narrow, place, options(false), &case.name())?;
                } else {
                    check::<f32, f32>(stream, &wide, place, options(false), &case.name())?;
                    check::<bf16, E4m3>(stream, &narrow, place, options(true), &case.name())?;
                }
                turn += 1;
            }
        }
    }
    // Offsets beyond 2^31 elements of `x`; then a byte at a time, in two launches.
    for (h, name) in [(7168, "large"), (7167, "large, narrow")] {
        if ctx.case(name) {
            let p = 300_100;
            let t = if h == 7168 { 1001 } else { p };
            let token_topk_to_pos = (0..t as i32).map(|token| if token % 3 == 1 { -1 } else { p as i32 - 1 - token }).collect();
            let maps = Maps { t, k: 1, p, token_topk_to_pos, pos_to_expert: vec![], pos_to_token: vec![] };
            let place = Place::dense(h);
            let values: Vec<E4m3> = Rng::named(name).bytes((p * h) as usize).into_par_iter().map(E4m3).collect();
            let data = Data::with_values(device, maps, values, vec![], vec![], 1.0)?;
            check::<E4m3, E4m3>(stream, &data, place, Options { weights: false, x_sf: false, sf: false }, name)?;
        }
    }
    Ok(())
}

/// Two runs give the same bytes.
fn twice(stream: &Stream) -> Result<(), String> {
    let device = stream.device();
    let maps = Maps::of_moe(&MoeCase { num_send_tokens: 61, num_topk: 6, num_experts: 9, num_ranks: 8 }, 16, 0);
    let (place, options) = (Place::dense(136), Options { weights: true, x_sf: true, sf: true });
    let data = Data::<bf16>::new(device, maps, place, "twice", |rng, i| rng.normal(i))?;
    let mut out = Output::<E4m3>::new(device, data.maps.t * place.h, 0)?;
    let mut once = |name| -> Result<Vec<E4m3>, String> {
        reduce_fused(stream, args(&data, &mut out, place, options).map_err(text)?).map_err(text)?;
        out.read(name)
    };
    let (first, second) = (once("first")?, once("second")?);
    equal("second run", "twice", &[data.maps.t, place.h], &second, &first)
}

/// The launcher can be recorded and replayed.
fn graph(stream: &Stream) -> Result<(), String> {
    let device = stream.device();
    let maps = Maps::of_moe(&MoeCase { num_send_tokens: 200, num_topk: 8, num_experts: 32, num_ranks: 8 }, 1, 0);
    let (place, options) = (Place::dense(1024), Options { weights: true, x_sf: true, sf: true });
    let data = Data::<bf16>::new(device, maps, place, "graph", |rng, i| rng.normal(i))?;
    let mut out = Output::<bf16>::new(device, data.maps.t * place.h, 0)?;
    let graph = stream.capture(|s| reduce_fused(s, args(&data, &mut out, place, options)?)).map_err(text)?;
    stream.synchronize().map_err(text)?;
    let untouched = out.read("captured")?.iter().all(|v| v.to_le_bytes() == [FILL; 2]);
    ensure(untouched, || "a capture ran the kernel".to_owned())?;
    graph.launch(stream).map_err(text)?;
    stream.synchronize().map_err(text)?;
    equal("replayed", "graph", &[data.maps.t, place.h], &out.read("replayed")?, &data.reference::<bf16>(place, options))
}

/// The peers' cases, those of the peer's own benchmark, and small ones.
pub fn bench() -> Vec<Row> {
    let moe = |num_send_tokens, num_topk, num_experts, num_ranks| MoeCase { num_send_tokens, num_topk, num_experts, num_ranks };
    let weights = Options { weights: true, x_sf: false, sf: false };
    let mut rows = Vec::new();
    for (e, ep, send) in [(32, 8, 4001), (4, 64, 4001), (32, 8, 128), (32, 8, 16), (32, 8, 1)] {
        rows.push(row::<bf16, bf16>(moe(send, 8, e, ep), 7168, weights, format!("e={e},ep={ep},h=7168,k=8,send={send}")));
    }
    type Make = fn(MoeCase, u64, Options, String) -> Row;
    let types: [(&str, &str, Make); 4] = [
        ("f32", "fp32", row::<f32, f32>),
        ("f32", "e4m3", row::<f32, E4m3>),
        ("bf16", "bf16", row::<bf16, bf16>),
        ("bf16", "e4m3", row::<bf16, E4m3>),
    ];
    for (e, ep, h, combinations) in [
        (9, 8, 7168, &[(0, true), (1, false), (3, true)][..]),
        (32, 8, 7168, &[(0, false), (2, true), (3, false)]),
        (4, 64, 7168, &[(1, true), (2, false)]),
        (9, 8, 2048, &[(0, true)]),
    ] {
        for (types_idx, x_sf) in combinations {
            let (input, out, make) = types[*types_idx];
            let case = format!(
                "e={e},ep={ep},h={h},input={input},k=6,out={out},send=4001,x_sf={}",
                if *x_sf { "True" } else { "False" }
            );
            let options = Options { x_sf: *x_sf, sf: out == "e4m3", ..weights };
            rows.push(make(moe(4001, 6, e, ep), h, options, case));
        }
    }
    rows
}

fn row<X: Value, O: Value + 'static>(moe: MoeCase, h: u64, options: Options, case: String) -> Row {
    let maps = Maps::of_moe(&moe, 128, 0);
    let Maps { t, k, p, .. } = maps;
    let (x_bytes, out_bytes) = (size_of::<X>() as u64, size_of::<O>() as u64);
    let bytes = 8 * t * k + if options.x_sf { 4 * p } else { 0 } + maps.num_used() * h * x_bytes + t * h * out_bytes;
    let build = move |device: &Device, _: &Stream| -> Result<Launch, String> {
        let place = Place::dense(h);
        let rng = Rng::named("bench");
        let weights = rng.fill((t * k) as usize, |rng, i| rng.unit(i));
        let x_sf = rng.stream(1).fill(p as usize, |rng, i| rng.unit(i));
        let mut data = Data::<X>::with_values(device, maps.clone(), Vec::new(), weights, x_sf, rng.unit(0))?;
        data.x_buffer = inputs::of_normal(device, 0, p * h, X::round)?;
        let mut out = Output::<O>::new(device, t * h, 0)?;
        Ok(Box::new(move |stream| reduce_fused(stream, args(&data, &mut out, place, options)?)))
    };
    Row { op: "reduce_fused", case, bytes, build: Box::new(build) }
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

    /// What the order and the single rounding of each step decide.
    #[test]
    fn each_step_rounds_once_and_choices_go_up() {
        let device = Device::emulator().checked();
        let stream = device.stream().unwrap();
        // 2^24 + 1 is lost, 1 + 1 + 2^24 is not; an exact product keeps what a rounded one drops.
        let values = vec![1.0f32, 1.0, 16_777_216.0, 1.0 + f32::EPSILON, -1.0];
        let positions = vec![0, 1, 2, 2, 1, 0, 4, -1, 3];
        let maps = Maps { t: 3, k: 3, p: 5, token_topk_to_pos: positions, pos_to_expert: vec![], pos_to_token: vec![] };
        let weights = vec![1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0 + f32::EPSILON, 9.0, 1.0 + f32::EPSILON];
        let data = Data::with_values(&device, maps, values, weights, vec![1.0; 5], 1.0).unwrap();
        let (place, options) = (Place::dense(1), Options { weights: true, x_sf: false, sf: false });
        let out = data.reference::<f32>(place, options);
        assert_eq!(out[..2], [16_777_218.0, 16_777_216.0]);
        let e = f32::EPSILON;
        assert_eq!(out[2], ((1.0 + e) as f64 * (1.0 + e) as f64 - (1.0 + e) as f64) as f32);
        assert_ne!(out[2], (1.0 + e) * (1.0 + e) - (1.0 + e));
        check::<f32, f32>(&stream, &data, place, options, "rounding").unwrap();
    }

    /// The checked emulator reports rows that do not exist; without checks they count as none.
    #[test]
    fn rows_out_of_range() {
        let maps =
            |row| Maps { t: 2, k: 2, p: 3, token_topk_to_pos: vec![0, row, 2, -1], pos_to_expert: vec![], pos_to_token: vec![] };
        for device in [Device::emulator(), Device::emulator().checked()] {
            let stream = device.stream().unwrap();
            let (place, options) = (Place::dense(16), Options { weights: false, x_sf: true, sf: false });
            let data = |row| Data::<bf16>::new(&device, maps(row), place, "range", |rng, i| rng.normal(i)).unwrap();
            let mut out = Output::<bf16>::new(&device, 32, 0).unwrap();
            let result = reduce_fused(&stream, args(&data(3), &mut out, place, options).unwrap());
            if device == Device::emulator() {
                result.unwrap();
                equal("out", "", &[2, 16], &out.read("").unwrap(), &data(-1).reference(place, options)).unwrap();
            } else {
                assert!(matches!(result, Err(Error::Fault(_))));
            }
        }
    }

    /// Every documented mistake is a typed error that names the argument, and leaves the output alone.
    #[test]
    fn mistakes_are_errors() {
        let device = Device::emulator().checked();
        let stream = device.stream().unwrap();
        let maps = Maps::of_moe(&MoeCase { num_send_tokens: 9, num_topk: 3, num_experts: 4, num_ranks: 2 }, 4, 0);
        let (t, p) = (maps.t, maps.p);
        let (place, options) = (Place::dense(64), Options { weights: true, x_sf: true, sf: true });
        let data = Data::<bf16>::new(&device, maps, place, "mistakes", |rng, i| rng.normal(i)).unwrap();
        let mut out = Output::<E4m3>::new(&device, t * 64, 0).unwrap();
        let (ints, wide, floats) =
            (device.zeros::<i32>(4096).unwrap(), device.zeros::<bf16>(65536).unwrap(), device.zeros::<f32>(4096).unwrap());
        let mut room = device.zeros::<u8>(65536).unwrap();
        let elsewhere = Device::emulator().zeros::<f32>(4096).unwrap();

        macro_rules! refused {
            ($kind:ident, $name:literal, |$a:ident| $change:expr) => {{
                let mut $a = args(&data, &mut out, place, options).unwrap();
                $change;
                let e = reduce_fused(&stream, $a).unwrap_err();
                assert!(matches!(&e, Error::$kind { arg, .. } if *arg == $name), "{e}");
                assert!(out.read("refused").unwrap().iter().all(|v| v.0 == FILL), "{e}");
                e
            }};
        }
        refused!(Shape, "x", |a| a.x = wide.tensor(&[64]).unwrap());
        refused!(DType, "x", |a| a.x = ints.tensor(&[p, 64]).unwrap());
        refused!(Layout, "x", |a| a.x = wide.strided(&[p, 64], &[1, p], 0).unwrap());
        refused!(Shape, "token_topk_to_pos", |a| a.token_topk_to_pos = ints.tensor(&[t]).unwrap());
        refused!(DType, "token_topk_to_pos", |a| a.token_topk_to_pos = floats.tensor(&[t, 3]).unwrap());
        refused!(Layout, "token_topk_to_pos", |a| a.token_topk_to_pos = ints.strided(&[t, 3], &[4, 1], 0).unwrap());
        let e = refused!(Shape, "out", |a| a.token_topk_to_pos = ints.tensor(&[t + 1, 3]).unwrap());
        assert_eq!(e.to_string(), format!("reduce_fused: out has shape [{t}, 64], expected [{}, 64]", t + 1));
        refused!(Shape, "out", |a| a.x = wide.tensor(&[p, 63]).unwrap());
        refused!(DType, "out", |a| a.out = room.tensor_mut(&[t, 64]).unwrap());
        refused!(Shape, "x_sf", |a| a.x_sf = Some(floats.tensor(&[p + 1]).unwrap()));
        refused!(Shape, "x_sf", |a| a.x_sf = Some(floats.tensor(&[p, 1]).unwrap()));
        refused!(Layout, "x_sf", |a| a.x_sf = Some(floats.strided(&[p], &[2], 0).unwrap()));
        refused!(DeviceMismatch, "x_sf", |a| a.x_sf = Some(elsewhere.tensor(&[p]).unwrap()));
        refused!(Shape, "topk_weights", |a| a.topk_weights = Some(floats.tensor(&[t, 4]).unwrap()));
        refused!(DType, "topk_weights", |a| a.topk_weights = Some(ints.tensor(&[t, 3]).unwrap()));
        refused!(Shape, "sf", |a| a.sf = Some(floats.tensor(&[2]).unwrap()));
        refused!(DType, "sf", |a| a.sf = Some(wide.tensor(&[1]).unwrap()));

        // SAFETY: refused before anything is touched.
        let raw = |ptr, dtype, shape: &[u64]| unsafe {
            let strides: Vec<u64> = (0..shape.len()).map(|i| shape[i + 1..].iter().product()).collect();
            (
                TensorRef::from_raw(&device, ptr, dtype, shape, &strides).unwrap(),
                TensorMut::from_raw(&device, ptr, dtype, shape, &strides).unwrap(),
            )
        };
        refused!(Layout, "x", |a| a.x = raw(wide.as_ptr() + 1, DType::Bf16, &[p, 64]).0);
        refused!(Layout, "sf", |a| a.sf = Some(raw(floats.as_ptr() + 2, DType::F32, &[1]).0));
        let address = out.buffer.as_ptr() + GUARD;
        let mut given = args(&data, &mut out, place, options).unwrap();
        given.x_sf = Some(raw(address, DType::F32, &[p]).0);
        let e = reduce_fused(&stream, given).unwrap_err();
        assert_eq!(e.to_string(), "reduce_fused: x_sf and out overlap in memory");
        let huge = |t: u64, h: u64, k: u64, p: u64| {
            let at = |n: u64| n << 50;
            let args = Args {
                x: raw(at(1), DType::E4m3, &[p, h]).0,
                x_sf: None,
                topk_weights: None,
                token_topk_to_pos: raw(at(2), DType::I32, &[t, k]).0,
                sf: None,
                out: raw(at(3), DType::E4m3, &[t, h]).1,
            };
            reduce_fused(&stream, args).unwrap_err()
        };
        for (error, name) in [
            (huge(1 << 31, 1, 1, 1), "num_tokens"),
            (huge(1, 1, 1 << 31, 1), "num_topk"),
            (huge(1, 1, 1, 1 << 31), "num_expanded_tokens"),
            (huge(1, 1 << 31, 1, 1), "hidden"),
        ] {
            assert!(matches!(error, Error::Value { arg, .. } if arg == name), "{error}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]
        #[test]
        fn any_shape_value_and_alignment(
            send in 0u64..12, k in 1u64..20, e in 1u64..6, h in 0u64..90, gap in 0u64..3, offsets in [0u64..3, 0u64..3], options in 0usize..8,
        ) {
            let case = MoeCase { num_send_tokens: send, num_topk: k.min(4 * e), num_experts: e, num_ranks: 4 };
            let maps = Maps::of_moe(&case, 3, 0);
            let place = Place { h, stride: h + gap, offsets };
            let device = Device::emulator().checked().shuffled(send * 71 + h);
            let stream = device.stream().unwrap();
            let options = Options::all()[options];
            let data = Data::<f32>::new(&device, maps.clone(), place, "prop", awkward).unwrap();
            prop_assert_eq!(check_outputs(&stream, &data, place, options, "prop"), Ok(()));
            let data = Data::<bf16>::new(&device, maps.clone(), place, "prop", awkward).unwrap();
            prop_assert_eq!(check_outputs(&stream, &data, place, options, "prop"), Ok(()));
            let data = Data::<E4m3>::new(&device, maps, place, "prop", awkward).unwrap();
            prop_assert_eq!(check_outputs(&stream, &data, place, options, "prop"), Ok(()));
        }
    }
}
