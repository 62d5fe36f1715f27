//! apply_rotary: reference, cases, checks and benchmark.

use crate::support::bench::{Launch, Row};
use crate::support::cases::Depth;
use crate::support::compare::{close_diff, equal};
use crate::support::rng::Rng;
use crate::support::suite::{Ctx, Report, Suite, ensure, text};
use crate::support::value::Value;
use ferrotile::half::bf16;
use ferrotile::transform::apply_rotary::{Args, apply_rotary};
use ferrotile::{Buffer, Device, Stream, TensorRef};

/// The checks of this op.
pub const SUITE: Suite = Suite { op: "apply_rotary", run };

/// Elements behind the end of each buffer.
const GUARD: u64 = 19;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Positions {
    None,
    I32,
    I64,
    /// The same for all batches, by a batch stride of 0.
    Shared,
}

/// Everything but the values.
#[derive(Clone, Copy, Debug)]
struct Problem {
    /// 0 for tensors of three dimensions.
    batch: u64,
    length: u64,
    heads: u64,
    /// Heads of the key; 0 for none.
    key_heads: u64,
    d: u64,
    /// Columns of a buffer before those that are rotated.
    columns: u64,
    /// Heads of a buffer that are not used.
    spare_heads: u64,
    /// Elements before the buffer's first.
    shift: u64,
    positions: Positions,
    interleaved: bool,
    conjugate: bool,
    offset: i64,
    rows: u64,
    /// Elements between rows of the cache, and before the first.
    cache: [u64; 2],
    /// Heads outside of tokens in memory.
    heads_outside: bool,
}

impl Problem {
    /// Contiguous, half heads.
    fn new(length: u64, heads: u64, d: u64) -> Self {
        Self {
            batch: 0,
            length,
            heads,
            key_heads: 0,
            d,
            columns: 0,
            spare_heads: 0,
            shift: 0,
            positions: Positions::I32,
            interleaved: false,
            conjugate: false,
            offset: 0,
            rows: length + 9,
            cache: [0, 0],
            heads_outside: false,
        }
    }

    fn name(&self) -> String {
        let Self { batch, length, heads, key_heads, d, columns, spare_heads, shift, positions, interleaved, .. } = *self;
        let Self { conjugate, offset, rows, cache, heads_outside, .. } = *self;
        format!(
            "b={batch},cache={cache:?},columns={columns},conjugate={},d={d},h={heads},heads_outside={},interleaved={},kh={key_heads},l={length},offset={offset},positions={positions:?},rows={rows},shift={shift},spare={spare_heads}",
            conjugate as u8, heads_outside as u8, interleaved as u8,
        )
    }

    fn batches(&self) -> u64 {
        if self.batch == 0 { 1 } else { self.batch }
    }

    /// Strides of batch, token and head, and elements of the whole.
    fn layout(&self, heads: u64) -> ([u64; 3], u64) {
        let (all, row) = (heads + self.spare_heads, self.columns + self.d);
        let batch = self.length * all * row;
        let (token, head) = if self.heads_outside { (row, self.length * row) } else { (all * row, row) };
        ([batch, token, head], self.start() + batch * self.batches() + GUARD)
    }

    fn start(&self) -> u64 {
        self.shift + self.columns
    }

    /// Shape or strides of a tensor, without batches if there are none.
    fn without_batch(&self, all: [u64; 4]) -> Vec<u64> {
        all[(self.batch == 0) as usize..].to_vec()
    }
}

/// What a problem is about.
#[derive(Clone)]
struct Data<T> {
    query: Vec<T>,
    key: Vec<T>,
    cache: Vec<f32>,
    positions: Vec<i64>,
}

impl<T: Value> Data<T> {
    /// Normal values; positions so that all rows are in the cache.
    fn new(p: &Problem) -> Self {
        let rng = Rng::named(&p.name());
        let values = |n: u64, heads: u64| -> Vec<T> {
            let data = rng.stream(n).normal_f32(p.layout(heads).1 as usize);
            data.into_iter().map(T::round).collect()
        };
        let tokens = if p.positions == Positions::Shared { p.length } else { p.length * p.batches() };
        let positions =
            if p.positions == Positions::None { Vec::new() } else { rng.stream(3).ints_i64(tokens as usize, 0, p.rows as i64) };
        Self {
            query: values(0, p.heads),
            key: values(1, p.key_heads),
            cache: rng.stream(2).normal_f32((p.cache[1] + p.rows * (p.d + p.cache[0])) as usize),
            positions: positions.into_iter().map(|m| m - p.offset).collect(),
        }
    }

    /// Rotated as section 18 says. Tokens whose row is not in the cache stay.
    fn expected(&self, p: &Problem) -> (Vec<T>, Vec<T>) {
        (self.rotated(p, &self.query, p.heads), self.rotated(p, &self.key, p.key_heads))
    }

    fn rotated(&self, p: &Problem, values: &[T], heads: u64) -> Vec<T> {
        let ([batch_stride, token_stride, head_stride], _) = p.layout(heads);
        let half = p.d / 2;
        let mut out = values.to_vec();
        for b in 0..p.batches() {
            for l in 0..p.length {
                let position = match p.positions {
                    Positions::None => l as i64,
                    Positions::Shared => self.positions[l as usize],
                    _ => self.positions[(b * p.length + l) as usize],
                };
                let m = p.offset + position;
                if !(0..p.rows as i64).contains(&m) {
                    continue;
                }
                for h in 0..heads {
                    for j in 0..half {
                        let row = p.cache[1] + m as u64 * (p.d + p.cache[0]);
                        let (c, s) = (self.cache[(row + j) as usize], self.cache[(row + half + j) as usize]);
                        let at = p.start() + b * batch_stride + l * token_stride + h * head_stride;
                        let (i1, i2) = if p.interleaved { (at + 2 * j, at + 2 * j + 1) } else { (at + j, at + j + half) };
                        let (x1, x2) = (values[i1 as usize].widen(), values[i2 as usize].widen());
                        let (y1, y2) = if p.conjugate {
                            (x1.mul_add(c, x2 * s), x1.mul_add(-s, x2 * c))
                        } else {
                            (x1.mul_add(c, -(x2 * s)), x1.mul_add(s, x2 * c))
                        };
                        out[i1 as usize] = T::round(y1);
                        out[i2 as usize] = T::round(y2);
                    }
                }
            }
        }
        out
    }
}

/// Everything a launch needs.
struct Buffers<T> {
    problem: Problem,
    query: Buffer<T>,
    key: Option<Buffer<T>>,
    cache: Buffer<f32>,
    positions32: Buffer<i32>,
    positions64: Buffer<i64>,
}

impl<T: Value> Buffers<T> {
    fn new(device: &Device, p: &Problem, data: &Data<T>) -> Result<Self, String> {
        let positions32: Vec<i32> = data.positions.iter().map(|m| *m as i32).collect();
        Ok(Self {
            problem: *p,
            query: device.upload(&data.query).map_err(text)?,
            key: if p.key_heads > 0 { Some(device.upload(&data.key).map_err(text)?) } else { None },
            cache: device.upload(&data.cache).map_err(text)?,
            positions32: device.upload(&positions32).map_err(text)?,
            positions64: device.upload(&data.positions).map_err(text)?,
        })
    }

    fn call(&mut self, stream: &Stream) -> ferrotile::Result<()> {
        let p = self.problem;
        let view = |buffer: &'_ mut Buffer<T>, heads: u64| {
            let ([batch, token, head], _) = p.layout(heads);
            let shape = p.without_batch([p.batch, p.length, heads, p.d]);
            // SAFETY: of the buffer, as `strided_mut` would say, which outlives the call.
            let tensor = buffer.strided_mut(&shape, &p.without_batch([batch, token, head, 1]), p.start())?;
            unsafe { ferrotile::TensorMut::from_raw(tensor.device(), tensor.ptr(), T::DTYPE, tensor.shape(), tensor.strides()) }
        };
        let shape: &[u64] = if p.batch == 0 { &[p.length] } else { &[p.batch, p.length] };
        let strides: &[u64] = match (p.batch, p.positions) {
            (0, _) => &[1],
            (_, Positions::Shared) => &[0, 1],
            _ => &[p.length, 1],
        };
        let positions: Option<TensorRef<'_>> = match p.positions {
            Positions::None => None,
            Positions::I64 => Some(self.positions64.strided(shape, strides, 0)?),
            _ => Some(self.positions32.strided(shape, strides, 0)?),
        };
        let query = view(&mut self.query, p.heads)?;
        let key = self.key.as_mut().map(|key| view(key, p.key_heads)).transpose()?;
        apply_rotary(
            stream,
            Args {
                query,
                key,
                cos_sin_cache: self.cache.strided(&[p.rows, p.d], &[p.d + p.cache[0], 1], p.cache[1])?,
                positions,
                interleaved: p.interleaved,
                conjugate: p.conjugate,
                seqlen_offset: p.offset,
            },
        )
    }

    /// Both buffers are these, with all that lies around the tensors.
    fn check(&self, name: &str, (query, key): &(Vec<T>, Vec<T>)) -> Result<(), String> {
        equal("query", name, &[query.len() as u64], &self.query.to_vec().map_err(text)?, query)?;
        match &self.key {
            Some(buffer) => equal("key", name, &[key.len() as u64], &buffer.to_vec().map_err(text)?, key),
            None => Ok(()),
        }
    }
}

fn check<T: Value>(device: &Device, p: &Problem, data: &Data<T>, name: &str) -> Result<(), String> {
    let stream = device.stream().map_err(text)?;
    let mut buffers = Buffers::new(device, p, data)?;
    buffers.call(&stream).map_err(|error| format!("{error}; {name}"))?;
    stream.synchronize().map_err(text)?;
    buffers.check(name, &data.expected(p))
}

fn check_both(ctx: &Ctx, p: &Problem) -> Result<(), String> {
    if ctx.case(&format!("fmt=bf16,{}", p.name())) {
        check::<bf16>(&ctx.device, p, &Data::new(p), &p.name())?;
    }
    if ctx.case(&format!("fmt=f32,{}", p.name())) {
        check::<f32>(&ctx.device, p, &Data::new(p), &p.name())?;
    }
    Ok(())
}

/// The 3-D grid of the specification; small ones for the emulator.
fn grid(depth: Depth) -> Vec<Problem> {
    let (length, rows, all_heads): (u64, u64, &[u64]) = match depth {
        Depth::Small => (7, 30, &[1, 5, 32]),
        Depth::Full => (2001, 8192, &[1, 5, 32, 128]),
    };
    let mut problems = Vec::new();
    for &heads in all_heads {
        for d in [64, 128] {
            for flags in 0..8 {
                let mut p = Problem { rows, columns: 128, key_heads: heads, ..Problem::new(length, heads, d) };
                (p.interleaved, p.conjugate, p.spare_heads) = (flags & 1 != 0, flags & 2 != 0, flags >> 2);
                problems.push(p);
            }
        }
    }
    problems
}

/// The 4-D cases of the specification, of bf16; shorter ones with fewer heads for the emulator.
fn batched(depth: Depth) -> Vec<Problem> {
    use Positions::{I32, I64, None, Shared};
    let small = depth == Depth::Small;
    let problem = |batch, heads: u64, d, positions, interleaved, conjugate, offset| {
        let (length, heads) = if small { (9, heads.div_ceil(16)) } else { (2048, heads) };
        let rows = length + 40;
        Problem { batch, positions, interleaved, conjugate, offset, rows, columns: 16, ..Problem::new(length, heads, d) }
    };
    vec![
        problem(3, 1, 64, None, true, false, 17),
        problem(1, 32, 128, I32, false, false, 0),
        problem(3, 64, 64, Shared, true, false, 0),
        problem(3, 128, 128, I64, false, true, 0),
        // Positions may lie before the offset.
        problem(2, 32, 64, I64, false, false, -40),
        problem(2, 32, 64, I32, true, true, 5),
    ]
}

/// Sizes, strides and alignments beyond those of the specification.
fn unusual() -> Vec<Problem> {
    let mut problems = Vec::new();
    // Sizes of a head: one pair, with and without whole vectors, large.
    for d in [2, 6, 8, 16, 24, 32, 48, 80, 96, 256] {
        for interleaved in [false, true] {
            problems.push(Problem { interleaved, key_heads: 1, conjugate: d % 16 == 0, ..Problem::new(5, 3, d) });
        }
    }
    // Places of the first element, of columns, and of rows of the cache.
    for (shift, columns, cache) in [
        (1, 0, [0, 0]),
        (2, 0, [0, 0]),
        (4, 0, [0, 0]),
        (8, 0, [0, 0]),
        (0, 1, [0, 0]),
        (0, 4, [4, 0]),
        (0, 8, [3, 0]),
        (0, 8, [0, 1]),
    ] {
        for interleaved in [false, true] {
            problems.push(Problem { shift, columns, cache, interleaved, key_heads: 2, ..Problem::new(6, 3, 64) });
        }
    }
    // One token; a batch of one token each, as in decoding; many tokens a block; heads outside.
    let plain = Problem::new(1, 7, 64);
    problems.push(plain);
    problems.push(Problem { batch: 33, key_heads: 1, ..plain });
    problems.push(Problem { batch: 5, positions: Positions::None, offset: 4, ..plain });
    problems.push(Problem { positions: Positions::None, key_heads: 2, ..Problem::new(130, 1, 64) });
    problems.push(Problem { batch: 2, heads_outside: true, key_heads: 3, ..Problem::new(11, 4, 64) });
    // More items than are spread over all multiprocessors; the last query head is alone.
    for interleaved in [false, true] {
        problems.push(Problem { interleaved, spare_heads: 1, key_heads: 2, ..Problem::new(280, 121, 128) });
    }
    // Of the query alone, heads of 64, as the plain kernel takes them: even and odd numbers of heads.
    for heads in [1, 2, 4, 8, 24, 33] {
        for flags in 0..8 {
            let positions = if flags & 4 == 0 { Positions::I32 } else { Positions::None };
            let p = Problem { spare_heads: heads % 2, columns: 8, offset: 3, positions, ..Problem::new(21, heads, 64) };
            problems.push(Problem { interleaved: flags & 1 != 0, conjugate: flags & 2 != 0, rows: 40, ..p });
        }
        // Sequences that follow each other, and such that share their positions.
        problems.push(Problem { batch: 3, interleaved: true, ..Problem::new(5, heads, 64) });
        problems.push(Problem { batch: 3, positions: Positions::Shared, ..Problem::new(5, heads, 64) });
    }
    // Nothing to do.
    problems.push(Problem { key_heads: 0, ..Problem::new(0, 3, 64) });
    problems.push(Problem { key_heads: 2, ..Problem::new(4, 0, 64) });
    problems
}

fn run(ctx: &Ctx) -> Result<Report, String> {
    let mut problems = grid(Depth::Small);
    problems.extend(unusual());
    if ctx.depth == Depth::Full {
        problems.extend(grid(Depth::Full));
        // More blocks than one launch of a small problem has, all heads odd.
        problems.push(Problem { key_heads: 7, ..Problem::new(8192, 127, 64) });
    }
    for p in &problems {
        check_both(ctx, p)?;
    }
    let mut of_batches = batched(Depth::Small);
    if ctx.depth == Depth::Full {
        of_batches.extend(batched(Depth::Full));
    }
    for p in of_batches {
        let name = format!("fmt=bf16,{}", p.name());
        if ctx.case(&name) {
            check::<bf16>(&ctx.device, &p, &Data::new(&p), &name)?;
        }
    }
    check_special(ctx)?;
    check_close(ctx)?;
    check_joint(ctx)?;
    check_range(ctx)?;
    if !ctx.device.is_emulator() && ctx.case("kind=graph") {
        check_graph(&ctx.device)?;
    }
    Ok(ctx.report())
}

/// Values at the edges of the formats, NaN with and without payload among them.
fn check_special(ctx: &Ctx) -> Result<(), String> {
    let special =
        [0x7FC0_0000, 0xFFC1_0000, 0x7F80_0000, 0xFF80_0000, 0, 0x8000_0000, 0x0001_0000, 0x7F7F_0000, 0x3F80_0000, 0xBF80_0000];
    for interleaved in [false, true] {
        for d in [64, 6] {
            let p = Problem { interleaved, ..Problem::new(20, 3, d) };
            let name = format!("kind=special,{}", p.name());
            if !ctx.case(&name) {
                continue;
            }
            let rng = Rng::named(&name);
            let draw = |n: u64, len: usize| rng.stream(n).fill(len, |r, i| f32::from_bits(special[r.below(i, 10) as usize]));
            let mut data = Data::<f32>::new(&p);
            data.query = draw(0, data.query.len());
            // In the cache every other row, so that NaN is not everywhere.
            let wild = draw(1, data.cache.len());
            data.cache.iter_mut().enumerate().filter(|(i, _)| (i / d as usize).is_multiple_of(2)).for_each(|(i, v)| *v = wild[i]);
            check(&ctx.device, &p, &data, &name)?;
            let narrow = Data {
                query: data.query.iter().map(|v| bf16::from_bits((v.to_bits() >> 16) as u16)).collect(),
                key: Vec::new(),
                cache: data.cache.clone(),
                positions: data.positions.clone(),
            };
            check(&ctx.device, &p, &narrow, &name)?;
        }
    }
    Ok(())
}

/// Against a rotation in f64, and back again.
fn check_close(ctx: &Ctx) -> Result<(), String> {
    let name = "kind=close";
    if !ctx.case(name) {
        return Ok(());
    }
    let p = Problem::new(50, 2, 64);
    let mut data = Data::<f32>::new(&p);
    for (i, v) in data.cache.iter_mut().enumerate() {
        let (m, j) = (i as u64 / p.d, i as u64 % p.d);
        let angle = m as f64 * 10000f64.powf(-2.0 * (j % 32) as f64 / 64.0);
        *v = (if j < 32 { angle.cos() } else { angle.sin() }) as f32;
    }
    let stream = ctx.device.stream().map_err(text)?;
    let mut buffers = Buffers::new(&ctx.device, &p, &data)?;
    buffers.call(&stream).map_err(text)?;
    let turned = buffers.query.to_vec().map_err(text)?;
    let ([_, token, head], _) = p.layout(p.heads);
    let mut exact: Vec<f64> = data.query.iter().map(|v| *v as f64).collect();
    for (l, m) in data.positions.iter().enumerate() {
        for at in (0..p.heads).map(|h| (l as u64 * token + h * head) as usize) {
            for j in 0..32 {
                let (sin, cos) = (*m as f64 * 10000f64.powf(-2.0 * j as f64 / 64.0)).sin_cos();
                let (x1, x2) = (data.query[at + j] as f64, data.query[at + j + 32] as f64);
                (exact[at + j], exact[at + j + 32]) = (x1 * cos - x2 * sin, x1 * sin + x2 * cos);
            }
        }
    }
    close_diff("query", name, &turned, &exact, 1e-12)?;
    buffers.problem.conjugate = true;
    buffers.call(&stream).map_err(text)?;
    close_diff("query turned back", name, &buffers.query.to_vec().map_err(text)?, &data.query, 1e-12)
}

/// Query and key as heads of one buffer, as a joint projection has them.
fn check_joint(ctx: &Ctx) -> Result<(), String> {
    let name = "kind=joint";
    if !ctx.case(name) {
        return Ok(());
    }
    let (t, heads, key_heads, d) = (13, 4, 2, 64);
    let row = (heads + 2 * key_heads) * d;
    let rng = Rng::named(name);
    let (values, cache) = (rng.normal_bf16((t * row) as usize), rng.stream(1).normal_f32((t * d) as usize));
    let mut expected = values.clone();
    for l in 0..t {
        for h in 0..heads + key_heads {
            for j in 0..d / 2 {
                let (i1, i2) = ((l * row + h * d + j) as usize, (l * row + h * d + j + d / 2) as usize);
                let (c, s) = (cache[(l * d + j) as usize], cache[(l * d + d / 2 + j) as usize]);
                let (x1, x2) = (values[i1].to_f32(), values[i2].to_f32());
                expected[i1] = bf16::from_f32(x1.mul_add(c, -(x2 * s)));
                expected[i2] = bf16::from_f32(x1.mul_add(s, x2 * c));
            }
        }
    }
    let mut buffer = ctx.device.upload(&values).map_err(text)?;
    let cache = ctx.device.upload(&cache).map_err(text)?;
    let part = |buffer: &mut Buffer<bf16>, heads: u64, first: u64| {
        let tensor = buffer.strided_mut(&[t, heads, d], &[row, d, 1], first * d).map_err(text)?;
        // SAFETY: of the buffer, which outlives the call; the two parts have no element in common.
        unsafe { ferrotile::TensorMut::from_raw(tensor.device(), tensor.ptr(), tensor.dtype(), tensor.shape(), tensor.strides()) }
            .map_err(text)
    };
    let (query, key) = (part(&mut buffer, heads, 0)?, part(&mut buffer, key_heads, heads)?);
    let args = Args {
        query,
        key: Some(key),
        cos_sin_cache: cache.tensor(&[t, d]).map_err(text)?,
        positions: None,
        interleaved: false,
        conjugate: false,
        seqlen_offset: 0,
    };
    apply_rotary(&ctx.device.stream().map_err(text)?, args).map_err(text)?;
    equal("projection", name, &[t, row], &buffer.to_vec().map_err(text)?, &expected)
}

/// Positions outside of the cache: without checks their tokens stay as they are, with checks they are reported.
fn check_range(ctx: &Ctx) -> Result<(), String> {
    let of_i32 = || vec![-1, 29, i32::MAX as i64, i32::MIN as i64];
    for (positions, outside, heads, key_heads) in [
        (Positions::I32, of_i32(), 3, 1),
        (Positions::I32, of_i32(), 1, 0),
        (Positions::I32, of_i32(), 2, 0),
        (Positions::I32, of_i32(), 8, 0),
        (Positions::I64, vec![-1, 29, i64::MAX, i64::MIN, 1 << 32, (1 << 32) - 1, -(1 << 32)], 3, 1),
        (Positions::I64, vec![-1, 29, i64::MAX, i64::MIN], 1, 1),
    ] {
        let p = Problem { positions, key_heads, ..Problem::new(20, heads, 64) };
        let name = format!("kind=range,{}", p.name());
        if !ctx.case(&name) {
            continue;
        }
        let mut data = Data::<bf16>::new(&p);
        data.positions.iter_mut().step_by(2).zip(outside.iter().cycle()).for_each(|(m, wrong)| *m = *wrong);
        let unchecked = if ctx.device.is_emulator() { Device::emulator() } else { ctx.device };
        check(&unchecked, &p, &data, &name)?;
        if ctx.device.is_emulator() {
            let mut buffers = Buffers::new(&ctx.device, &p, &data)?;
            let result = buffers.call(&ctx.device.stream().map_err(text)?);
            let told = matches!(&result, Err(ferrotile::Error::Fault(fault)) if fault.to_string().contains(" in memory, allowed: below 29"));
            ensure(told, || format!("expected a fault because of a position, got {result:?}; {name}"))?;
        }
    }
    Ok(())
}

/// Captured launches rotate at every replay.
fn check_graph(device: &Device) -> Result<(), String> {
    let stream = device.stream().map_err(text)?;
    for interleaved in [false, true] {
        let p = Problem { interleaved, key_heads: 2, ..Problem::new(300, 5, 64) };
        let mut data = Data::<bf16>::new(&p);
        let mut buffers = Buffers::new(device, &p, &data)?;
        let graph = stream.capture(|stream| buffers.call(stream)).map_err(text)?;
        for replay in 0..3 {
            graph.launch(&stream).map_err(text)?;
            stream.synchronize().map_err(text)?;
            let expected = data.expected(&p);
            buffers.check(&format!("graph,interleaved={interleaved},replay={replay}"), &expected)?;
            (data.query, data.key) = expected;
        }
    }
    Ok(())
}

/// The 32 cases of the peers' benchmark; few tokens of query and key as in decoding; other layouts.
pub fn bench() -> Vec<Row> {
    type BuildRow = fn(&Device, &Problem) -> Result<Launch, String>;
    fn build<T: Value>(device: &Device, p: &Problem) -> Result<Launch, String> {
        let mut buffers = Buffers::<T>::new(device, p, &Data::new(p))?;
        Ok(Box::new(move |stream| buffers.call(stream)))
    }
    let mut rows = Vec::new();
    let mut row = |case: String, p: Problem, f32s: bool| {
        let tokens = p.batches() * p.length;
        let positions = if p.positions == Positions::None { 0 } else { 4 * tokens };
        let size = if f32s { 4 } else { 2 };
        let bytes = 2 * size * tokens * (p.heads + p.key_heads) * p.d + 4 * p.rows * p.d + positions;
        let build: BuildRow = if f32s { build::<f32> } else { build::<bf16> };
        rows.push(Row { op: "apply_rotary", case, bytes, build: Box::new(move |device, _| build(device, &p)) });
    };
    let length = 8192;
    let peer = |heads, positions, interleaved, spare_heads| Problem {
        batch: 1,
        rows: length,
        columns: 128,
        positions,
        interleaved,
        spare_heads,
        ..Problem::new(length, heads, 64)
    };
    for heads in [128, 64, 32, 1] {
        for (positions, name) in [(Positions::I32, "i32"), (Positions::None, "none")] {
            for interleaved in [false, true] {
                for split in [0, 1] {
                    let i = interleaved as u8;
                    let case = format!("d=64,h={heads},head_split={split},interleaved={i},l={length},positions={name}");
                    row(case, peer(heads, positions, interleaved, split), false);
                }
            }
        }
    }
    for length in [1, 16, 128] {
        let p = Problem { rows: length, columns: 128, key_heads: 1, ..Problem::new(length, 128, 64) };
        row(format!("d=64,h=128,interleaved=0,kh=1,l={length},positions=i32"), p, false);
    }
    let long = |heads, d| Problem { rows: 8192, ..Problem::new(8192, heads, d) };
    row("d=128,h=32,interleaved=0,kh=8,l=8192,positions=i32".to_owned(), Problem { key_heads: 8, ..long(32, 128) }, false);
    row("d=64,dtype=f32,h=64,interleaved=0,l=8192,positions=i32".to_owned(), long(64, 64), true);
    row("aligned=0,d=64,h=128,interleaved=0,l=8192,positions=i32".to_owned(), Problem { shift: 1, ..long(128, 64) }, false);
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
        let mut p = Problem { positions: Positions::None, rows: 1, ..Problem::new(1, 1, 4) };
        let mut query = vec![1.0f32, 2.0, 3.0, 4.0];
        query.resize(p.layout(1).1 as usize, 9.0);
        let data = Data { query, key: Vec::new(), cache: vec![0.5, 2.0, 10.0, 100.0], positions: Vec::new() };
        assert_eq!(data.expected(&p).0[..5], [0.5 - 30.0, 4.0 - 400.0, 10.0 + 1.5, 200.0 + 8.0, 9.0]);
        p.interleaved = true;
        assert_eq!(data.expected(&p).0[..4], [0.5 - 20.0, 10.0 + 1.0, 6.0 - 400.0, 300.0 + 8.0]);
        p.conjugate = true;
        assert_eq!(data.expected(&p).0[..4], [0.5 + 20.0, -10.0 + 1.0, 6.0 + 400.0, -300.0 + 8.0]);
    }

    /// Tensors to put where they do not belong.
    struct Spare {
        floats: Buffer<f32>,
        halves: Buffer<bf16>,
        words: Buffer<i32>,
        longs: Buffer<i64>,
        elsewhere: Buffer<bf16>,
        floats_elsewhere: Buffer<f32>,
        words_elsewhere: Buffer<i32>,
    }

    type Spoil = for<'a> fn(&mut Args<'a>, &'a mut Spare) -> ferrotile::Result<()>;

    /// The error of a call whose arguments were right until `spoil` changed them.
    fn refused(what: &str, spoil: Spoil) -> Error {
        let (device, other) = (Device::emulator(), Device::emulator().checked());
        let mut query = device.upload(&[bf16::ONE; 6 * 4 * 16]).unwrap();
        let mut key = device.upload(&[bf16::ONE; 6 * 2 * 16]).unwrap();
        let cache = device.upload(&[2f32; 10 * 16]).unwrap();
        let positions = device.zeros::<i32>(6).unwrap();
        let mut spare = Spare {
            floats: device.zeros(4000).unwrap(),
            halves: device.zeros(4000).unwrap(),
            words: device.zeros(4000).unwrap(),
            longs: device.zeros(4000).unwrap(),
            elsewhere: other.zeros(4000).unwrap(),
            floats_elsewhere: other.zeros(4000).unwrap(),
            words_elsewhere: other.zeros(4000).unwrap(),
        };
        let mut args = Args {
            query: query.tensor_mut(&[6, 4, 16]).unwrap(),
            key: Some(key.tensor_mut(&[6, 2, 16]).unwrap()),
            cos_sin_cache: cache.tensor(&[10, 16]).unwrap(),
            positions: Some(positions.tensor(&[6]).unwrap()),
            interleaved: false,
            conjugate: false,
            seqlen_offset: 0,
        };
        spoil(&mut args, &mut spare).unwrap();
        let result = apply_rotary(&device.stream().unwrap(), args);
        let error = result.err().unwrap_or_else(|| panic!("{what} was accepted"));
        assert!(error.to_string().starts_with("apply_rotary: "), "{what}: {error}");
        for buffer in [&query, &key, &spare.halves] {
            let first = buffer.to_vec().unwrap()[0];
            assert!(buffer.to_vec().unwrap().iter().all(|v| *v == first), "{what}");
        }
        error
    }

    /// Another view of the same memory.
    fn over<'a>(t: &View, dtype: DType, shape: &[u64], strides: &[u64], bytes: u64) -> ferrotile::Result<TensorMut<'a>> {
        // SAFETY: the call that gets it is refused before anything is written.
        unsafe { TensorMut::from_raw(t.device(), t.ptr() + bytes, dtype, shape, strides) }
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
        use Error::{DType as Type, DeviceMismatch, Layout, Overlap, Shape, Value};
        const B: DType = DType::Bf16;
        refuse!("a matrix", |a, s| a.query = s.halves.tensor_mut(&[6, 64])?, Shape { arg: "query", .. });
        refuse!("integers", |a, s| a.query = s.words.tensor_mut(&[6, 4, 16])?, Type { arg: "query", .. });
        refuse!("odd heads", |a, s| a.query = s.halves.tensor_mut(&[6, 4, 15])?, Value { arg: "head_dim", .. });
        refuse!(
            "columns apart",
            |a, s| a.query = s.halves.strided_mut(&[6, 4, 16], &[128, 32, 2], 0)?,
            Layout { arg: "query", .. }
        );
        refuse!("an odd address", |a, _| a.query = over(&a.query, B, &[6, 4, 16], &[64, 16, 1], 1)?, Layout { arg: "query", .. });
        refuse!("query elsewhere", |a, s| a.query = s.elsewhere.tensor_mut(&[6, 4, 16])?, DeviceMismatch { arg: "query", .. });
        refuse!("a key in batches", |a, s| a.key = Some(s.halves.tensor_mut(&[1, 6, 2, 16])?), Shape { arg: "key", .. });
        refuse!("a key of floats", |a, s| a.key = Some(s.floats.tensor_mut(&[6, 2, 16])?), Type { arg: "key", .. });
        refuse!("a key of 5 tokens", |a, s| a.key = Some(s.halves.tensor_mut(&[5, 2, 16])?), Shape { arg: "key", .. });
        refuse!("a key of 8 columns", |a, s| a.key = Some(s.halves.tensor_mut(&[6, 2, 8])?), Shape { arg: "key", .. });
        refuse!(
            "a key with columns apart",
            |a, s| a.key = Some(s.halves.strided_mut(&[6, 2, 16], &[64, 32, 2], 0)?),
            Layout { arg: "key", .. }
        );
        refuse!("a key elsewhere", |a, s| a.key = Some(s.elsewhere.tensor_mut(&[6, 2, 16])?), DeviceMismatch { arg: "key", .. });
        refuse!("a vector of angles", |a, s| a.cos_sin_cache = s.floats.tensor(&[160])?, Shape { arg: "cos_sin_cache", .. });
        refuse!("half angles", |a, s| a.cos_sin_cache = s.halves.tensor(&[10, 16])?, Type { arg: "cos_sin_cache", .. });
        refuse!("8 angles", |a, s| a.cos_sin_cache = s.floats.tensor(&[10, 8])?, Shape { arg: "cos_sin_cache", .. });
        refuse!("no angles", |a, s| a.cos_sin_cache = s.floats.tensor(&[0, 16])?, Shape { arg: "cos_sin_cache", .. });
        refuse!(
            "angles apart",
            |a, s| a.cos_sin_cache = s.floats.strided(&[10, 16], &[32, 2], 0)?,
            Layout { arg: "cos_sin_cache", .. }
        );
        refuse!(
            "angles elsewhere",
            |a, s| a.cos_sin_cache = s.floats_elsewhere.tensor(&[10, 16])?,
            DeviceMismatch { arg: "cos_sin_cache", .. }
        );
        refuse!("float positions", |a, s| a.positions = Some(s.floats.tensor(&[6])?), Type { arg: "positions", .. });
        refuse!("7 positions", |a, s| a.positions = Some(s.words.tensor(&[7])?), Shape { arg: "positions", .. });
        refuse!("a matrix of positions", |a, s| a.positions = Some(s.longs.tensor(&[1, 6])?), Shape { arg: "positions", .. });
        refuse!("positions apart", |a, s| a.positions = Some(s.longs.strided(&[6], &[2], 0)?), Layout { arg: "positions", .. });
        refuse!(
            "positions elsewhere",
            |a, s| a.positions = Some(s.words_elsewhere.tensor(&[6])?),
            DeviceMismatch { arg: "positions", .. }
        );
        refuse!(
            "an offset beyond the cache",
            |a, _| {
                a.positions = None;
                a.seqlen_offset = 5;
            },
            Value { arg: "seqlen_offset", .. }
        );
        refuse!(
            "a negative offset",
            |a, _| {
                a.positions = None;
                a.seqlen_offset = -1;
            },
            Value { arg: "seqlen_offset", .. }
        );
        refuse!(
            "more tokens than rows",
            |a, s| {
                a.positions = None;
                a.cos_sin_cache = s.floats.tensor(&[5, 16])?;
            },
            Shape { arg: "cos_sin_cache", .. }
        );
        refuse!(
            "a far token",
            |a, _| a.query = over(&a.query, B, &[6, 4, 16], &[1 << 32, 16, 1], 0)?,
            Value { arg: "token stride of query", .. }
        );
        refuse!(
            "a far head of the key",
            |a, _| {
                let key = over(&a.query, B, &[6, 2, 16], &[16, 1 << 32, 1], 0)?;
                a.key = Some(key);
            },
            Value { arg: "head stride of key", .. }
        );
        refuse!(
            "2^31 tokens",
            |a, s| {
                a.key = None;
                // Far from everything else.
                a.query = over(&a.query, B, &[1 << 31, 1, 2], &[2, 2, 1], 1 << 40)?;
                a.positions = None;
                a.cos_sin_cache = s.floats.tensor(&[1, 2])?;
            },
            Value { arg: "num_tokens", .. }
        );
        refuse!(
            "a key over the query",
            |a, _| {
                let key = over(&a.query, B, &[6, 2, 16], &[64, 16, 1], 2)?;
                a.key = Some(key);
            },
            Overlap { a: "query", b: "key", .. }
        );
        refuse!(
            "angles over the query",
            |a, _| a.query = over(&a.cos_sin_cache, B, &[6, 4, 16], &[64, 16, 1], 0)?,
            Overlap { a: "cos_sin_cache", b: "query", .. }
        );
        refuse!(
            "positions over the key",
            |a, s| {
                a.key = Some(over(&*s.words.tensor(&[96])?, B, &[6, 2, 16], &[32, 16, 1], 0)?);
                a.positions = Some(s.words.tensor(&[6])?);
            },
            Overlap { a: "positions", b: "key", .. }
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn any_shape_and_place(
            (batch, length, heads, key_heads) in (0u64..4, 1u64..9, 0u64..6, 0u64..4), d in 1u64..40,
            (columns, spare_heads, shift, gap) in (0u64..20, 0u64..2, 0u64..9, 0u64..6), kind in 0usize..4, flags in 0u8..16,
        ) {
            let positions = [Positions::None, Positions::I32, Positions::I64, Positions::Shared][kind];
            let whole = flags & 8 != 0;
            // Half of the cases are of whole vectors.
            let [d, columns, shift, gap] = if whole { [16 * (d % 5 + 1), 8 * columns, 8 * shift, 4 * gap] } else { [2 * d, columns, shift, gap] };
            let p = Problem {
                batch, key_heads, columns, spare_heads, shift, positions, cache: [gap, 0], offset: if batch == 2 { 3 } else { 0 },
                interleaved: flags & 1 != 0, conjugate: flags & 2 != 0, heads_outside: flags & 4 != 0, ..Problem::new(length, heads, d)
            };
            prop_assert_eq!(check::<bf16>(&Device::emulator(), &p, &Data::new(&p), "random"), Ok(()));
            prop_assert_eq!(check::<f32>(&Device::emulator(), &p, &Data::new(&p), "random"), Ok(()));
        }
    }
}
