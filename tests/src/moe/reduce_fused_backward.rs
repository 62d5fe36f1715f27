//! reduce_fused_backward: reference, cases, checks and benchmark.

use super::common_expanded::{DeviceMaps, Maps};
use super::common_route::{bench_name, inside, moe, prefilled};
use super::reduce_fused::awkward;
use crate::support::bench::{Launch, Row};
use crate::support::cases::{Depth, HIDDENS, MoeCase, moe_bench_cases, moe_cases};
use crate::support::compare::equal;
use crate::support::inputs;
use crate::support::rng::Rng;
use crate::support::suite::{Ctx, Report, Suite, ensure, text};
use crate::support::value::Value;
use ferrotile::moe::reduce_fused_backward::{Args, reduce_fused_backward};
use ferrotile::{Buffer, Device, Stream};
use half::bf16;
use rayon::prelude::*;

/// The checks of this op.
pub const SUITE: Suite = Suite { op: "reduce_fused_backward", run };

/// Where rows lie.
#[derive(Clone, Copy, Debug)]
struct Place {
    h: u64,
    /// Elements from one row to the next, of `x` and of `grad_out`.
    strides: [u64; 2],
    /// Elements before the first of `x`, `grad_out` and `grad_x`, which changes their alignment.
    offsets: [u64; 3],
}

impl Place {
    fn dense(h: u64) -> Self {
        Self { h, strides: [h, h], offsets: [0; 3] }
    }
}

/// Inputs on both sides.
struct Data<X, G> {
    maps: Maps,
    place: Place,
    on_device: DeviceMaps,
    x: Vec<X>,
    grad: Vec<G>,
    weights: Option<Vec<f32>>,
    x_buffer: Buffer<X>,
    grad_buffer: Buffer<G>,
    weights_buffer: Buffer<f32>,
}

/// What comes out.
struct Gradients<X> {
    x: Vec<X>,
    weights: Vec<f32>,
}

impl<X: Value, G: Value> Data<X, G> {
    /// `make` gives the values of `x` and of `grad_out` from a random number and the index.
    fn new(
        device: &Device,
        maps: &Maps,
        place: Place,
        weights: bool,
        name: &str,
        make: impl Fn(&Rng, u64) -> f32 + Sync,
    ) -> Result<Self, String> {
        let rng = Rng::named(name);
        let len = |rows: u64, i: usize| (place.offsets[i] + rows.saturating_sub(1) * place.strides[i] + place.h) as usize;
        let x = rng.fill(len(maps.p, 0), |rng, i| X::round(make(rng, i)));
        let grad = rng.stream(1).fill(len(maps.t, 1), |rng, i| G::round(make(rng, i)));
        // Halves are exact, so that sums of whole numbers stay exact too.
        let all = rng.stream(2).fill(maps.token_topk_to_pos.len(), |rng, i| 0.5 * rng.below(i, 9) as f32);
        Ok(Self {
            on_device: DeviceMaps::new(device, maps)?,
            maps: maps.clone(),
            place,
            x_buffer: device.upload(&x).map_err(text)?,
            grad_buffer: device.upload(&grad).map_err(text)?,
            weights_buffer: device.upload(&all).map_err(text)?,
            x,
            grad,
            weights: weights.then_some(all),
        })
    }

    fn row<'a, V>(&self, values: &'a [V], which: usize, row: usize) -> &'a [V] {
        let start = self.place.offsets[which] as usize + row * self.place.strides[which] as usize;
        &values[start..start + self.place.h as usize]
    }

    /// `grad_x`, one row after the other: zeros unless a choice has the row.
    fn grad_x(&self) -> Vec<X> {
        let (h, k) = (self.place.h as usize, self.maps.k as usize);
        let mut slots = vec![None; self.maps.p as usize];
        for (slot, row) in self.maps.token_topk_to_pos.iter().enumerate().filter(|(_, row)| **row >= 0) {
            slots[*row as usize] = Some(slot);
        }
        let rows = slots.into_par_iter().flat_map_iter(|slot| match slot {
            None => vec![X::default(); h],
            Some(slot) => {
                let weight = self.weights.as_ref().map_or(1.0, |weights| weights[slot]);
                self.row(&self.grad, 1, slot / k).iter().map(|g| X::round(g.widen() * weight)).collect()
            }
        });
        rows.collect()
    }

    /// The dot product of each choice in f64, and the sum of the magnitudes.
    fn dots(&self) -> Vec<(f64, f64)> {
        let k = self.maps.k as usize;
        let dot = |(slot, row): (usize, &i32)| {
            let Ok(row) = usize::try_from(*row) else { return (0.0, 0.0) };
            let pairs = self.row(&self.grad, 1, slot / k).iter().zip(self.row(&self.x, 0, row));
            pairs.fold((0.0, 0.0), |(sum, size), (g, x)| {
                let product = f64::from(g.widen()) * f64::from(x.widen());
                (sum + product, size + product.abs())
            })
        };
        self.maps.token_topk_to_pos.par_iter().enumerate().map(dot).collect()
    }

    fn args<'a>(&'a self, grad_x: &'a mut Buffer<X>, grad_weights: &'a mut Buffer<f32>) -> ferrotile::Result<Args<'a>> {
        let Place { h, strides, offsets } = self.place;
        let Maps { t, k, p, .. } = self.maps;
        Ok(Args {
            x: self.x_buffer.strided(&[p, h], &[strides[0], 1], offsets[0])?,
            grad_out: self.grad_buffer.strided(&[t, h], &[strides[1], 1], offsets[1])?,
            topk_weights: if self.weights.is_some() { Some(self.weights_buffer.tensor(&[t, k])?) } else { None },
            token_topk_to_pos: self.on_device.token_topk_to_pos()?,
            pos_to_expert: self.on_device.pos_to_expert()?,
            grad_x: grad_x.strided_mut(&[p, h], &[h.max(1), 1], offsets[2])?,
            grad_topk_weights: grad_weights.tensor_mut(&[t, k])?,
        })
    }

    fn launch(&self, stream: &Stream, name: &str) -> Result<Gradients<X>, String> {
        let (device, Maps { t, k, p, .. }) = (stream.device(), &self.maps);
        let (t, k, p) = (*t, *k, *p);
        let (len, offset) = (p * self.place.h, self.place.offsets[2]);
        let (mut grad_x, mut grad_weights) = (prefilled::<X>(device, len, offset)?, prefilled::<f32>(device, t * k, 0)?);
        reduce_fused_backward(stream, self.args(&mut grad_x, &mut grad_weights).map_err(text)?).map_err(text)?;
        stream.synchronize().map_err(text)?;
        Ok(Gradients {
            x: inside("grad_x", name, &grad_x, len, offset)?,
            weights: inside("grad_topk_weights", name, &grad_weights, t * k, 0)?,
        })
    }

    /// `exact` when all sums are whole numbers below 2^24, so that no order of them rounds.
    fn check(&self, stream: &Stream, exact: bool, name: &str) -> Result<(), String> {
        let name = format!("{name},{:?},weights={},x={},grad={}", self.place, self.weights.is_some(), X::DTYPE, G::DTYPE);
        let got = self.launch(stream, &name)?;
        equal("grad_x", &name, &[self.maps.p, self.place.h], &got.x, &self.grad_x())?;
        let expected = self.dots();
        if exact {
            let expected: Vec<f32> = expected.iter().map(|(sum, _)| *sum as f32).collect();
            return equal("grad_topk_weights", &name, &[self.maps.t, self.maps.k], &got.weights, &expected);
        }
        // One rounding for each of a thread's values, five for those of a warp and three for those of the block; see the docs.
        let bound = (self.place.h / 256 + 18) as f64 * 2f64.powi(-24);
        for (slot, (got, (sum, size))) in got.weights.iter().zip(expected).enumerate() {
            let close = if sum.is_nan() {
                got.to_bits() == 0x7FFF_FFFF
            } else if sum.is_infinite() || size > f64::from(f32::MAX) {
                // A sum may pass through infinity on its way.
                f64::from(*got) == sum || !got.is_finite()
            } else {
                (f64::from(*got) - sum).abs() <= bound * size + 1e-40
            };
            ensure(close, || {
                format!("grad_topk_weights of choice {slot} is {got}, expected {sum} (of magnitude {size}); {name}")
            })?;
        }
        Ok(())
    }
}

/// Small whole numbers.
fn whole(rng: &Rng, i: u64) -> f32 {
    rng.below(i, 33) as f32 - 16.0
}

type Make = fn(&Rng, u64) -> f32;

/// Whole numbers, of which all sums are exact; normal values; special ones.
const MAKES: [(bool, Make); 3] = [(true, whole), (false, |rng, i| rng.normal(i)), (false, awkward)];

/// All types on one set of maps.
fn check_types(
    stream: &Stream,
    maps: &Maps,
    place: Place,
    weights: bool,
    makes: &[(bool, Make)],
    name: &str,
) -> Result<(), String> {
    let device = stream.device();
    for (exact, make) in makes {
        Data::<f32, f32>::new(device, maps, place, weights, name, make)?.check(stream, *exact, name)?;
        Data::<f32, bf16>::new(device, maps, place, weights, name, make)?.check(stream, *exact, name)?;
        Data::<bf16, f32>::new(device, maps, place, weights, name, make)?.check(stream, *exact, name)?;
        Data::<bf16, bf16>::new(device, maps, place, weights, name, make)?.check(stream, *exact, name)?;
    }
    Ok(())
}

fn small_places() -> Vec<Place> {
    let of = |h, strides, offsets| Place { h, strides, offsets };
    vec![
        Place::dense(0),
        Place::dense(1),
        Place::dense(37),
        // Fours but no eights; more than one turn of 256 threads, of whole vectors and of single values.
        Place::dense(20),
        Place::dense(2056),
        Place::dense(515),
        of(32, [48, 40], [0; 3]),
        of(32, [33, 32], [0; 3]),
        of(32, [32, 36], [0; 3]),
        of(32, [32, 32], [1, 0, 0]),
        of(32, [32, 32], [0, 4, 0]),
        of(32, [32, 32], [0, 0, 2]),
    ]
}

/// No tokens, no choices, no rows; every choice with a row, more than are looked up at once; much padding.
fn special_maps() -> Vec<(&'static str, Maps)> {
    let maps = |t: u64, k: u64, p: u64, token_topk_to_pos: Vec<i32>| {
        let mut pos_to_expert = vec![-1; p as usize];
        token_topk_to_pos.iter().filter(|row| **row >= 0).for_each(|row| pos_to_expert[*row as usize] = 3);
        Maps { t, k, p, token_topk_to_pos, pos_to_expert, pos_to_token: vec![] }
    };
    vec![
        ("no tokens", maps(0, 3, 5, vec![])),
        ("no choices", maps(3, 0, 5, vec![])),
        ("no rows", maps(4, 2, 0, vec![-1; 8])),
        ("all choices", maps(5, 17, 85, (0..85).map(|i| 84 - i).collect())),
        ("last choice only", maps(70, 9, 70, (0..630).map(|i| if i % 9 == 8 { i / 9 } else { -1 }).collect())),
        ("padding between", maps(3, 2, 131, vec![130, 0, 64, 33, -1, 32])),
        ("one choice", maps(9, 1, 9, (0..9).collect())),
    ]
}

fn run(ctx: &Ctx) -> Result<Report, String> {
    let device = &ctx.device;
    let stream = device.stream().map_err(text)?;
    for (i, case) in moe_cases(Depth::Small).into_iter().enumerate() {
        let maps = Maps::of_moe(&case, [1, 16][i % 2], [0, 3][i % 2]);
        for (j, place) in small_places().into_iter().enumerate() {
            let name = format!("{},h={},{j}", case.name(), place.h);
            // Wide rows only where there are few.
            if (maps.p * place.h < 1 << 18 || ctx.depth == Depth::Full) && ctx.case(&name) {
                check_types(&stream, &maps, place, (i + j) % 4 != 0, &MAKES[(i + j) % 3..][..1], &name)?;
            }
        }
    }
    for (name, maps) in special_maps() {
        if ctx.case(name) {
            for (h, weights) in [(40, true), (13, false)] {
                check_types(&stream, &maps, Place::dense(h), weights, &MAKES, name)?;
            }
        }
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
    // No release has this op, so nobody has recorded it.
    Ok(ctx.report())
}

/// Every case of the forward op's grid with two hidden sizes; offsets beyond 2^31 elements.
fn grid(ctx: &Ctx, stream: &Stream) -> Result<(), String> {
    let device = stream.device();
    for (i, case) in moe_bench_cases().into_iter().enumerate() {
        for h in [HIDDENS[i % HIDDENS.len()], 7168] {
            let name = format!("{},h={h}", case.name());
            if ctx.case(&name) {
                let maps = Maps::of_moe(&case, 16, 5);
                let data = Data::<bf16, bf16>::new(device, &maps, Place::dense(h), true, &name, |rng, i| rng.normal(i))?;
                data.check(stream, false, &name)?;
                if i % 4 == 0 {
                    let data = Data::<f32, f32>::new(device, &maps, Place::dense(h), true, &name, whole)?;
                    data.check(stream, true, &name)?;
                }
            }
        }
    }
    if ctx.case("large") {
        let (t, p) = (1001, 300_100u64);
        let token_topk_to_pos: Vec<i32> = (0..t).map(|i| if i % 3 == 1 { -1 } else { p as i32 - 1 - i }).collect();
        let mut pos_to_expert = vec![-1; p as usize];
        token_topk_to_pos.iter().filter(|row| **row >= 0).for_each(|row| pos_to_expert[*row as usize] = 0);
        let maps = Maps { t: t as u64, k: 1, p, token_topk_to_pos, pos_to_expert, pos_to_token: vec![] };
        let data = Data::<bf16, bf16>::new(device, &maps, Place::dense(7168), true, "large", |_, i| (i % 7) as f32)?;
        data.check(stream, true, "large")?;
    }
    Ok(())
}

/// Two runs give the same bytes, and so do the emulator and any GPU.
fn twice(stream: &Stream) -> Result<(), String> {
    let maps = Maps::of_moe(&moe(61, 6, 9, 8), 16, 0);
    let make = |rng: &Rng, i| rng.normal(i);
    let data = Data::<bf16, bf16>::new(stream.device(), &maps, Place::dense(1160), true, "twice", make)?;
    let emulator = Device::emulator().stream().map_err(text)?;
    let twin = Data::<bf16, bf16>::new(emulator.device(), &maps, Place::dense(1160), true, "twice", make)?;
    let first = data.launch(stream, "first")?;
    for (name, again) in [("second", data.launch(stream, "second")?), ("emulator", twin.launch(&emulator, "emulator")?)] {
        equal("grad_x", name, &[maps.p, 1160], &again.x, &first.x)?;
        equal("grad_topk_weights", name, &[maps.t, maps.k], &again.weights, &first.weights)?;
    }
    Ok(())
}

/// The launcher can be recorded and replayed.
fn graph(stream: &Stream) -> Result<(), String> {
    let maps = Maps::of_moe(&moe(200, 8, 32, 8), 16, 0);
    let data = Data::<bf16, bf16>::new(stream.device(), &maps, Place::dense(1024), true, "graph", |rng, i| rng.normal(i))?;
    let expected = data.launch(stream, "graph")?;
    let len = maps.p * 1024;
    let (mut grad_x, mut weights) =
        (prefilled::<bf16>(stream.device(), len, 0)?, prefilled::<f32>(stream.device(), maps.t * maps.k, 0)?);
    let graph = stream.capture(|s| reduce_fused_backward(s, data.args(&mut grad_x, &mut weights)?)).map_err(text)?;
    graph.launch(stream).map_err(text)?;
    stream.synchronize().map_err(text)?;
    equal("grad_x", "graph", &[maps.p, 1024], &inside("grad_x", "graph", &grad_x, len, 0)?, &expected.x)?;
    let got = inside("grad_topk_weights", "graph", &weights, maps.t * maps.k, 0)?;
    equal("grad_topk_weights", "graph", &[maps.t, maps.k], &got, &expected.weights)
}

/// The forward op's cases: rows of the benchmark of 1.0.0, a layer of 256 experts on one rank, and small ones.
pub fn bench() -> Vec<Row> {
    [(4001, 32, 8), (4001, 4, 64), (4096, 256, 1), (128, 32, 8), (16, 32, 8), (1, 32, 8)]
        .into_iter()
        .map(|(send, e, ep)| row(moe(send, 8, e, ep), 7168))
        .collect()
}

fn row(case: MoeCase, h: u64) -> Row {
    let maps = Maps::of_moe(&case, 128, 0);
    let Maps { t, k, p, .. } = maps;
    // Both maps, the weights and their gradient; x where a choice has the row; all of grad_x; grad_out.
    let bytes = 12 * t * k + 4 * p + 2 * h * (maps.num_used() + p + t);
    let name = bench_name(&case).replace(",k=", &format!(",h={h},k="));
    let build = move |device: &Device, _: &Stream| -> Result<Launch, String> {
        let weights = Rng::named("bench").fill((t * k) as usize, |rng, i| rng.unit(i));
        let data = Data::<bf16, bf16> {
            on_device: DeviceMaps::new(device, &maps)?,
            maps: maps.clone(),
            place: Place::dense(h),
            x: vec![],
            grad: vec![],
            x_buffer: inputs::of_normal(device, 0, p * h, bf16::round)?,
            grad_buffer: inputs::of_normal(device, 1, t * h, bf16::round)?,
            weights_buffer: device.upload(&weights).map_err(text)?,
            weights: Some(weights),
        };
        let mut grad_x = device.alloc::<bf16>((p * h) as usize).map_err(text)?;
        let mut grad_weights = device.alloc::<f32>((t * k) as usize).map_err(text)?;
        Ok(Box::new(move |stream| reduce_fused_backward(stream, data.args(&mut grad_x, &mut grad_weights)?)))
    };
    Row { op: "reduce_fused_backward", case: name, bytes, build: Box::new(build) }
}

#[cfg(test)]
mod tests {
    use super::super::common_route::FILL;
    use super::*;
    use ferrotile::moe::reduce_fused;
    use ferrotile::{DType, Error, TensorMut, TensorRef};
    use proptest::prelude::*;

    #[test]
    fn suite() {
        SUITE.test();
    }

    /// The reference against the definition: the derivative of the forward op by differences, in numbers that f32 holds exactly.
    #[test]
    fn reference_is_the_derivative_of_the_forward_op() {
        let device = Device::emulator();
        let stream = device.stream().unwrap();
        let maps = Maps::of_moe(&moe(7, 3, 4, 2), 4, 0);
        let (t, k, p, h) = (maps.t, maps.k, maps.p, 5);
        let data = Data::<f32, f32>::new(&device, &maps, Place::dense(h), true, "derivative", whole).unwrap();
        let loss = |x: &[f32], weights: &[f32]| -> f64 {
            let (x, weights) = (device.upload(x).unwrap(), device.upload(weights).unwrap());
            let mut out = device.alloc::<f32>((t * h) as usize).unwrap();
            let args = reduce_fused::Args {
                x: x.tensor(&[p, h]).unwrap(),
                x_sf: None,
                topk_weights: Some(weights.tensor(&[t, k]).unwrap()),
                token_topk_to_pos: data.on_device.token_topk_to_pos().unwrap(),
                sf: None,
                out: out.tensor_mut(&[t, h]).unwrap(),
            };
            reduce_fused::reduce_fused(&stream, args).unwrap();
            out.to_vec().unwrap().iter().zip(&data.grad).map(|(out, grad)| f64::from(out * grad)).sum()
        };
        let weights = data.weights.clone().unwrap();
        let base = loss(&data.x, &weights);
        let grad_x = data.grad_x();
        for i in 0..data.x.len() {
            let mut x = data.x.clone();
            x[i] += 1.0;
            assert_eq!(loss(&x, &weights) - base, f64::from(grad_x[i]), "x {i}");
        }
        for (i, (dot, _)) in data.dots().iter().enumerate() {
            let mut weights = weights.clone();
            weights[i] += 1.0;
            assert_eq!(loss(&data.x, &weights) - base, *dot, "weight {i}");
        }
    }

    /// The checked emulator reports rows that do not exist; without checks they count as none.
    #[test]
    fn rows_out_of_range() {
        for device in [Device::emulator(), Device::emulator().checked()] {
            let stream = device.stream().unwrap();
            let maps = |row| Maps {
                t: 2,
                k: 2,
                p: 3,
                token_topk_to_pos: vec![0, row, 2, -1],
                pos_to_expert: vec![0, -1, 1],
                pos_to_token: vec![],
            };
            let data = |row| Data::<bf16, f32>::new(&device, &maps(row), Place::dense(16), true, "range", whole).unwrap();
            let result = data(3).launch(&stream, "range");
            if device == Device::emulator() {
                let (got, expected) = (result.unwrap(), data(-1));
                equal("grad_x", "", &[3, 16], &got.x, &expected.grad_x()).unwrap();
                let dots: Vec<f32> = expected.dots().iter().map(|(sum, _)| *sum as f32).collect();
                equal("grad_topk_weights", "", &[2, 2], &got.weights, &dots).unwrap();
            } else {
                assert!(result.err().unwrap().contains("allowed: below"));
            }
        }
    }

    /// Every documented mistake is a typed error that names the argument, and leaves the outputs alone.
    #[test]
    fn mistakes_are_errors() {
        let device = Device::emulator().checked();
        let stream = device.stream().unwrap();
        let maps = Maps::of_moe(&moe(9, 3, 4, 2), 4, 0);
        let (t, p) = (maps.t, maps.p);
        let data = Data::<bf16, bf16>::new(&device, &maps, Place::dense(64), true, "mistakes", whole).unwrap();
        let mut grad_x = prefilled::<bf16>(&device, p * 64, 0).unwrap();
        let mut grad_weights = prefilled::<f32>(&device, t * 3, 0).unwrap();
        let (ints, wide) = (device.zeros::<i32>(4096).unwrap(), device.zeros::<bf16>(65536).unwrap());
        let floats = device.zeros::<f32>(65536).unwrap();
        let (mut room, mut narrow) = (device.zeros::<u8>(65536).unwrap(), device.zeros::<f32>(65536).unwrap());
        let elsewhere = Device::emulator().zeros::<f32>(4096).unwrap();

        macro_rules! refused {
            ($kind:ident, $name:literal, |$a:ident| $change:expr) => {{
                let mut $a = data.args(&mut grad_x, &mut grad_weights).unwrap();
                $change;
                let e = reduce_fused_backward(&stream, $a).unwrap_err();
                assert!(matches!(&e, Error::$kind { arg, .. } if *arg == $name), "{e}");
                assert!(grad_x.to_vec().unwrap().iter().all(|v| v.to_le_bytes() == [FILL; 2]), "{e}");
                assert!(grad_weights.to_vec().unwrap().iter().all(|v| v.to_le_bytes() == [FILL; 4]), "{e}");
                e
            }};
        }
        refused!(Shape, "x", |a| a.x = wide.tensor(&[64]).unwrap());
        refused!(DType, "x", |a| a.x = ints.tensor(&[p, 64]).unwrap());
        refused!(Layout, "x", |a| a.x = wide.strided(&[p, 64], &[1, p], 0).unwrap());
        refused!(Shape, "grad_out", |a| a.grad_out = wide.tensor(&[t, 63]).unwrap());
        refused!(DType, "grad_out", |a| a.grad_out = ints.tensor(&[t, 64]).unwrap());
        refused!(Layout, "grad_out", |a| a.grad_out = wide.strided(&[t, 64], &[128, 2], 0).unwrap());
        refused!(Shape, "topk_weights", |a| a.topk_weights = Some(floats.tensor(&[t, 4]).unwrap()));
        refused!(DType, "topk_weights", |a| a.topk_weights = Some(ints.tensor(&[t, 3]).unwrap()));
        refused!(Shape, "token_topk_to_pos", |a| a.token_topk_to_pos = ints.tensor(&[t]).unwrap());
        refused!(DType, "token_topk_to_pos", |a| a.token_topk_to_pos = floats.tensor(&[t, 3]).unwrap());
        refused!(Layout, "token_topk_to_pos", |a| a.token_topk_to_pos = ints.strided(&[t, 3], &[4, 1], 0).unwrap());
        let e = refused!(Shape, "grad_out", |a| a.token_topk_to_pos = ints.tensor(&[t + 1, 3]).unwrap());
        assert_eq!(e.to_string(), format!("reduce_fused_backward: grad_out has shape [{t}, 64], expected [{}, 64]", t + 1));
        refused!(Shape, "pos_to_expert", |a| a.pos_to_expert = ints.tensor(&[p + 1]).unwrap());
        refused!(DType, "pos_to_expert", |a| a.pos_to_expert = floats.tensor(&[p]).unwrap());
        refused!(DType, "grad_x", |a| a.grad_x = narrow.tensor_mut(&[p, 64]).unwrap());
        refused!(Shape, "grad_x", |a| {
            a.x = wide.tensor(&[p - 1, 64]).unwrap();
            a.pos_to_expert = ints.tensor(&[p - 1]).unwrap();
        });
        refused!(DType, "grad_topk_weights", |a| a.grad_topk_weights = room.tensor_mut(&[t, 3]).unwrap());
        refused!(Layout, "grad_topk_weights", |a| a.grad_topk_weights = narrow.strided_mut(&[t, 3], &[5, 1], 0).unwrap());
        refused!(DeviceMismatch, "topk_weights", |a| a.topk_weights = Some(elsewhere.tensor(&[t, 3]).unwrap()));

        // SAFETY: refused before anything is touched.
        let raw = |ptr, dtype, shape: &[u64]| unsafe {
            let strides: Vec<u64> = (0..shape.len()).map(|i| shape[i + 1..].iter().product()).collect();
            (
                TensorRef::from_raw(&device, ptr, dtype, shape, &strides).unwrap(),
                TensorMut::from_raw(&device, ptr, dtype, shape, &strides).unwrap(),
            )
        };
        refused!(Layout, "x", |a| a.x = raw(wide.as_ptr() + 1, DType::Bf16, &[p, 64]).0);
        let address = grad_x.as_ptr();
        let mut given = data.args(&mut grad_x, &mut grad_weights).unwrap();
        given.grad_out = raw(address, DType::Bf16, &[t, 64]).0;
        let e = reduce_fused_backward(&stream, given).unwrap_err();
        assert_eq!(e.to_string(), "reduce_fused_backward: grad_out and grad_x overlap in memory");
        let huge = |t: u64, h: u64, k: u64, p: u64| {
            let at = |n: u64| n << 50;
            let args = Args {
                x: raw(at(1), DType::Bf16, &[p, h]).0,
                grad_out: raw(at(2), DType::Bf16, &[t, h]).0,
                topk_weights: None,
                token_topk_to_pos: raw(at(3), DType::I32, &[t, k]).0,
                pos_to_expert: raw(at(4), DType::I32, &[p]).0,
                grad_x: raw(at(5), DType::Bf16, &[p, h]).1,
                grad_topk_weights: raw(at(6), DType::F32, &[t, k]).1,
            };
            reduce_fused_backward(&stream, args).unwrap_err()
        };
        for (error, name) in [
            (huge((1 << 30) + 1, 1, 1, 1), "num_tokens"),
            (huge(1, 1, 1 << 31, 1), "num_topk"),
            (huge(1, 1, 1, 1 << 31), "num_expanded_tokens"),
            (huge(1, 1 << 31, 1, 1), "hidden"),
        ] {
            assert!(matches!(error, Error::Value { arg, .. } if arg == name), "{error}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
        #[test]
        fn any_shape_value_and_alignment(
            send in 0u64..12, k in 1u64..20, e in 1u64..6, h in 0u64..90, gaps in [0u64..3, 0u64..3], offsets in [0u64..3, 0u64..3, 0u64..3],
            weights: bool,
        ) {
            let case = MoeCase { num_send_tokens: send, num_topk: k.min(4 * e), num_experts: e, num_ranks: 4 };
            let maps = Maps::of_moe(&case, 3, 0);
            let place = Place { h, strides: [h + gaps[0], h + gaps[1]], offsets };
            let device = Device::emulator().checked().shuffled(send * 71 + h);
            let stream = device.stream().unwrap();
            prop_assert_eq!(check_types(&stream, &maps, place, weights, &MAKES, "prop"), Ok(()));
        }
    }
}
