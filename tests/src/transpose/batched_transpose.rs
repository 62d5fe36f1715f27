//! batched_transpose and transpose: bytes that move. Everything is compared bit for bit.

use crate::support::bench::{Launch, Row};
use crate::support::cases::{Depth, HIDDENS};
use crate::support::compare;
use crate::support::golden::{self, Golden};
use crate::support::rng::Rng;
use crate::support::suite::{Ctx, Report, Suite, ensure, text};
use bytemuck::cast_slice;
use ferrotile::transpose::batched_transpose::{Args, DTYPES, batched_transpose, transpose};
use ferrotile::{Buffer, DType, Device, Stream, TensorMut, TensorRef};
use ferrotile_kernels::transpose::batched_transpose::FEW_TILES;
use rayon::prelude::*;

/// The op's checks.
pub const SUITE: Suite = Suite { op: "batched_transpose", run };

/// Contents of outputs before a launch.
const FILL: u8 = 0xA5;
const FILL_WORD: u32 = u32::from_ne_bytes([FILL; 4]);

/// Bytes that are compared at a time.
const PIECE: usize = 1 << 20;

/// Words before and after an output that must stay as they are.
const GUARD: usize = 64;

/// `out[b][j][i] = x[b][i][j]`. Blocks of output rows are made in parallel, 64 so that a line of the input is used up.
pub fn reference<T: Copy + Default + Send + Sync>(x: &[T], shape: [usize; 3], strides: [usize; 2]) -> Vec<T> {
    let [batches, m, n] = shape;
    let mut out = vec![T::default(); batches * n * m];
    if out.is_empty() {
        return out;
    }
    out.par_chunks_mut(n * m).enumerate().for_each(|(b, matrix)| {
        matrix.par_chunks_mut(64 * m).enumerate().for_each(|(block, rows)| {
            for i in 0..m {
                for (k, row) in rows.chunks_exact_mut(m).enumerate() {
                    row[i] = x[b * strides[0] + i * strides[1] + block * 64 + k];
                }
            }
        });
    });
    out
}

/// One call. Strides and offsets count elements.
#[derive(Clone, Copy, Debug)]
struct Case {
    dtype: DType,
    shape: [u64; 3],
    batch_stride: u64,
    row_stride: u64,
    x_offset: u64,
    out_offset: u64,
    /// Through `transpose` instead of `batched_transpose`.
    single: bool,
}

impl Case {
    fn new(dtype: DType, shape: [u64; 3]) -> Self {
        let [_, m, n] = shape;
        Self { dtype, shape, batch_stride: m * n, row_stride: n, x_offset: 0, out_offset: 0, single: false }
    }

    /// Rows `row_stride` apart.
    fn rows(self, row_stride: u64) -> Self {
        Self { row_stride, batch_stride: self.shape[1] * row_stride, ..self }
    }

    fn name(&self) -> String {
        let Self { dtype, shape: [b, m, n], batch_stride, row_stride, x_offset, out_offset, single } = self;
        let op = if *single { "transpose" } else { "batched_transpose" };
        format!("{op} dtype={dtype},b={b},m={m},n={n},strides={batch_stride}/{row_stride},offsets={x_offset}/{out_offset}")
    }

    /// Elements of `x` from its first to its last.
    fn span(&self) -> u64 {
        let [b, m, n] = self.shape;
        if b * m * n == 0 { 0 } else { (b - 1) * self.batch_stride + (m - 1) * self.row_stride + n }
    }

    fn numel(&self) -> u64 {
        self.shape.iter().product()
    }
}

/// Random bytes on host and device, of which every case takes as many as it needs and reads them as its own type.
struct Pool {
    host: Vec<u32>,
    device: Buffer<u32>,
}

impl Pool {
    fn new(device: &Device, bytes: usize) -> Result<Self, String> {
        let host = Rng::named("batched_transpose").fill(bytes.div_ceil(4), |rng, i| rng.bits(i) as u32);
        let device = device.upload(&host).map_err(text)?;
        Ok(Self { host, device })
    }

    fn x(&self, case: &Case) -> Result<TensorRef<'_>, String> {
        let size = case.dtype.size();
        ensure((case.x_offset + case.span()) * size <= 4 * self.device.len() as u64, || {
            format!("pool is too small for {}", case.name())
        })?;
        let strides = [case.batch_stride, case.row_stride, 1];
        let from = if case.single { 1 } else { 0 };
        let ptr = self.device.as_ptr() + case.x_offset * size;
        // SAFETY: the last element was just checked to lie within the buffer, which is initialised and outlives the tensor.
        unsafe { TensorRef::from_raw(self.device.device(), ptr, case.dtype, &case.shape[from..], &strides[from..]) }.map_err(text)
    }

    /// Compare an output, or its matrix `batch` if given, with the reference.
    fn compare(&self, case: &Case, batch: Option<u64>, got: &[u8]) -> Result<(), String> {
        match case.dtype.size() {
            1 => self.compare_as::<u8>(case, batch, got),
            2 => self.compare_as::<u16>(case, batch, got),
            _ => self.compare_as::<u32>(case, batch, got),
        }
    }

    fn compare_as<T>(&self, case: &Case, batch: Option<u64>, got: &[u8]) -> Result<(), String>
    where
        T: compare::Bits + bytemuck::Pod + Default + Send,
    {
        let [batches, m, n] = case.shape;
        let batches = if batch.is_some() { 1 } else { batches };
        let first = (case.x_offset + batch.unwrap_or(0) * case.batch_stride) as usize;
        let x: &[T] = &cast_slice(&self.host)[first..];
        let expected =
            reference(x, [batches, m, n].map(|n| n as usize), [case.batch_stride, case.row_stride].map(|s| s as usize));
        let bytes: &[u8] = cast_slice(&expected);
        if bytes.len() == got.len() && bytes.par_chunks(PIECE).zip(got.par_chunks(PIECE)).all(|(a, b)| a == b) {
            return Ok(());
        }
        // As elements, so that the report has the element's coordinates; not by `cast_slice`, as an output may start at any element.
        let got: Vec<T> = got.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect();
        compare::equal("out", &case.name(), &[batches, n, m], &got, &expected)
    }
}

/// An output between two guards, as words.
struct Output {
    buffer: Buffer<u32>,
    start: u64,
    bytes: u64,
}

impl Output {
    fn new(device: &Device, case: &Case) -> Result<Self, String> {
        let size = case.dtype.size();
        let (start, bytes) = (4 * GUARD as u64 + case.out_offset * size, case.numel() * size);
        let mut buffer = device.alloc((start + bytes).div_ceil(4) as usize + GUARD).map_err(text)?;
        buffer.fill_bytes(FILL).map_err(text)?;
        Ok(Self { buffer, start, bytes })
    }

    fn tensor(&mut self, case: &Case) -> Result<TensorMut<'_>, String> {
        let [b, m, n] = case.shape;
        let (shape, strides) = ([b, n, m], [n * m, m, 1]);
        let from = if case.single { 1 } else { 0 };
        let (device, ptr) = (*self.buffer.device(), self.buffer.as_ptr() + self.start);
        // SAFETY: `new` allocated these bytes; the buffer is borrowed as long as the tensor lives.
        unsafe { TensorMut::from_raw(&device, ptr, case.dtype, &shape[from..], &strides[from..]) }.map_err(text)
    }

    /// Contents between the guards, which are checked.
    fn read(&self, name: &str) -> Result<Vec<u32>, String> {
        let words = self.buffer.to_vec().map_err(text)?;
        let bytes: &[u8] = cast_slice(&words);
        let (before, rest) = bytes.split_at(self.start as usize);
        let after = &rest[self.bytes as usize..];
        ensure(before.iter().chain(after).all(|b| *b == FILL), || format!("bytes outside of out were written; {name}"))?;
        Ok(words)
    }
}

fn launch(stream: &Stream, case: &Case, x: TensorRef<'_>, out: TensorMut<'_>) -> ferrotile::Result<()> {
    match case.single {
        true => transpose(stream, Args { x, out }),
        false => batched_transpose(stream, Args { x, out }),
    }
}

fn check(stream: &Stream, pool: &Pool, case: &Case) -> Result<(), String> {
    let name = case.name();
    let mut out = Output::new(stream.device(), case)?;
    launch(stream, case, pool.x(case)?, out.tensor(case)?).map_err(text)?;
    let words = out.read(&name)?;
    let got = &cast_slice::<u32, u8>(&words)[out.start as usize..][..out.bytes as usize];
    pool.compare(case, None, got)
}

/// As [`check`], but of the first, the middle and the last matrix only: what one large launch writes would take longer to fetch than
/// everything else together.
fn check_some(stream: &Stream, pool: &Pool, case: &Case) -> Result<(), String> {
    let mut out = Output::new(stream.device(), case)?;
    launch(stream, case, pool.x(case)?, out.tensor(case)?).map_err(text)?;
    let words = out.bytes / case.shape[0] / 4;
    let mut part = stream.device().alloc::<u32>(words as usize).map_err(text)?;
    for batch in [0, case.shape[0] / 2, case.shape[0] - 1] {
        let from = out.buffer.strided(&[words], &[1], out.start / 4 + batch * words).map_err(text)?;
        stream.copy(&mut part.tensor_mut(&[words]).map_err(text)?, &from).map_err(text)?;
        stream.synchronize().map_err(text)?;
        let got = part.to_vec().map_err(text)?;
        pool.compare(case, Some(batch), cast_slice(&got)).map_err(|e| format!("matrix {batch}: {e}"))?;
    }
    Ok(())
}

const MAIN_DTYPES: [DType; 3] = [DType::E4m3, DType::Bf16, DType::F32];

/// Shapes and layouts that visit every kernel, edge and alignment.
fn small_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for dtype in MAIN_DTYPES {
        let case = |shape| Case::new(dtype, shape);
        let wide = 16 / dtype.size();
        cases.extend([
            case([0, 64, 64]),
            case([2, 0, 64]),
            case([2, 64, 0]),
            case([1, 64, 64]),
            case([3, 128, 192]),
            // Cells that fill no tile, in one dimension or in both.
            case([2, 5 * wide, 64]),
            case([1, 64, 9 * wide]),
            case([2, wide, wide]),
            case([2, wide, 2 * wide]),
            // A tile and a bit in both dimensions.
            case([1, 17 * wide, 18 * wide]),
            case([1, 17 * wide, 18 * wide]).rows(18 * wide + 4),
            // Left half, as the peer's test has it; rows of a wider matrix at all alignments.
            Case { single: true, ..case([1, 64, 128]).rows(256) },
            Case { x_offset: 128, single: true, ..case([1, 64, 128]).rows(256) },
            case([2, 64, 128]).rows(132),
            Case { x_offset: 4, ..case([2, 64, 64]).rows(64) },
            case([2, 48, 64]).rows(65),
            Case { x_offset: 1, ..case([1, 64, 64]) },
            Case { out_offset: 1, ..case([1, 64, 64]) },
            Case { out_offset: 4, ..case([1, 64, 64]) },
            // Output rows that start anywhere: less than a piece, one piece or none by alignment, a tile and a bit, narrow rows.
            case([2, 3, 2 * wide]),
            case([3, 2 * wide - 1, 64]),
            case([2, 16 * wide + 3, 17 * wide]),
            Case { out_offset: 3, ..case([1, 32 * wide + 1, 2 * wide]).rows(3 * wide) },
            Case { out_offset: 2, single: true, ..case([1, 16 * wide, 16 * wide]) },
            case([2, 37, 64]).rows(68),
            // Gaps between matrices, and the same matrix or row again and again.
            Case { batch_stride: 64 * 64 + 16, ..case([3, 64, 64]) },
            Case { batch_stride: 64 * 64 + 1, ..case([3, 64, 64]) },
            Case { batch_stride: 0, row_stride: 0, ..case([2, 64, 64]) },
            // More large tiles than are few: one and a bit in each dimension.
            case([FEW_TILES as u64 / 2 + 1, 17 * wide, 2 * wide]),
            case([FEW_TILES as u64 / 2 + 1, 2 * wide, 18 * wide]).rows(18 * wide + 16),
            case([FEW_TILES as u64 + 1, wide, wide]),
            // Any size.
            case([1, 1, 1]),
            case([3, 1, 67]),
            Case { single: true, ..case([1, 67, 1]) },
            case([2, 37, 65]),
            case([1, 63, 130]),
        ]);
    }
    for dtype in DTYPES.into_iter().filter(|dtype| !MAIN_DTYPES.contains(dtype)) {
        cases.push(Case::new(dtype, [1, 32, 48]));
    }
    cases
}

/// The specification's grids.
fn full_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for m in [0, 4032, 8064] {
        for n in HIDDENS {
            for dtype in [DType::E4m3, DType::Bf16] {
                cases.push(Case { single: true, ..Case::new(dtype, [1, m, n]).rows(2 * n) });
            }
            for b in [8, 32] {
                cases.extend(MAIN_DTYPES.map(|dtype| Case::new(dtype, [b, m, n])));
            }
        }
    }
    // A ragged token count at scale, and more than 2^31 elements: in all, and before the last row of one matrix.
    cases.extend(MAIN_DTYPES.map(|dtype| Case::new(dtype, [2, 4001, 7168])));
    cases.push(Case::new(DType::E4m3, [40, 8064, 7168]));
    cases.push(Case { single: true, ..Case::new(DType::E4m3, [1, 8192, 576]).rows(400_000) });
    cases.push(Case { single: true, ..Case::new(DType::F32, [1, 8001, 577]).rows(230_001) });
    cases
}

fn run(ctx: &Ctx) -> Result<Report, String> {
    let stream = ctx.device.stream().map_err(text)?;
    let mut cases = small_cases();
    if ctx.depth == Depth::Full {
        cases.extend(full_cases());
    }
    let bytes = cases.iter().map(|case| (case.x_offset + case.span()) * case.dtype.size()).max().unwrap_or(0);
    let pool = Pool::new(&ctx.device, bytes as usize)?;
    for case in &cases {
        if ctx.case(&case.name()) {
            let bytes = case.numel() * case.dtype.size();
            let few = bytes < 64 << 20 || bytes < 4 << 30 && case.shape[0] < 32;
            if few { check(&stream, &pool, case)? } else { check_some(&stream, &pool, case)? }
        }
    }
    if ctx.case("twice") {
        twice(&stream, &pool)?;
    }
    if !ctx.device.is_emulator() && ctx.case("graph") {
        graph(&ctx.device, &pool)?;
    }
    let notes = golden::check_cases(ctx, &["batched_transpose"], |golden, case| golden_case(&stream, golden, case))?;
    Ok(Report { notes, ..ctx.report() })
}

/// Two runs give the same bytes; the second one overwrites what the first one left.
fn twice(stream: &Stream, pool: &Pool) -> Result<(), String> {
    let case = Case::new(DType::Bf16, [2, 72, 136]);
    let mut out = Output::new(stream.device(), &case)?;
    launch(stream, &case, pool.x(&case)?, out.tensor(&case)?).map_err(text)?;
    let first = out.read("first run")?;
    launch(stream, &case, pool.x(&case)?, out.tensor(&case)?).map_err(text)?;
    compare::equal("second run", &case.name(), &[first.len() as u64], &out.read("second run")?, &first)
}

/// Both launchers can be recorded and replayed.
fn graph(device: &Device, pool: &Pool) -> Result<(), String> {
    let stream = device.stream().map_err(text)?;
    for single in [false, true] {
        let case = Case { single, ..Case::new(DType::E4m3, [1, 256, 192]) };
        let mut out = Output::new(device, &case)?;
        let graph = stream.capture(|s| launch(s, &case, pool.x(&case).unwrap(), out.tensor(&case).unwrap())).map_err(text)?;
        stream.synchronize().map_err(text)?;
        ensure(out.read("captured")?.iter().all(|w| *w == FILL_WORD), || "a capture ran the kernel".to_owned())?;
        graph.launch(&stream).map_err(text)?;
        let words = out.read("replayed")?;
        let got = &cast_slice::<u32, u8>(&words)[out.start as usize..][..out.bytes as usize];
        pool.compare(&case, None, got).map_err(|e| format!("replayed graph: {e}"))?;
    }
    Ok(())
}

fn golden_case(stream: &Stream, golden: &Golden, case: &golden::Case) -> Result<(), String> {
    let device = stream.device();
    let (x, expected) = (golden.tensor(case, "in/x")?, golden.tensor(case, "out/")?);
    let dtype = if x.bytes.len() as u64 == x.shape.iter().product::<u64>() { DType::E4m3 } else { DType::Bf16 };
    let (from, to) = (device.upload(x.bytes).map_err(text)?, device.zeros::<u8>(x.bytes.len()).map_err(text)?);
    let contiguous = |shape: &[u64]| [shape[1] * shape[2], shape[2], 1];
    // SAFETY: both buffers have the bytes of their shape and outlive the launch.
    let (x_tensor, out) = unsafe {
        let x = TensorRef::from_raw(device, from.as_ptr(), dtype, &x.shape, &contiguous(&x.shape));
        (x, TensorMut::from_raw(device, to.as_ptr(), dtype, &expected.shape, &contiguous(&expected.shape)))
    };
    batched_transpose(stream, Args { x: x_tensor.map_err(text)?, out: out.map_err(text)? }).map_err(text)?;
    let got = to.to_vec().map_err(text)?;
    compare::equal("out", &case.name(), &[expected.bytes.len() as u64], &got, expected.bytes)
}

/// Benchmark rows: the peer's cases, those of its own benchmarks, small ones, and those off the fastest path.
pub fn bench() -> Vec<Row> {
    let mut rows = Vec::new();
    // As the peer's own benchmark: contiguous.
    for (dtype, t, h) in [(DType::E4m3, 8064, 7168), (DType::Bf16, 8064, 7168), (DType::E4m3, 4032, 2048)] {
        rows.push(row(&format!("dtype={dtype},h={h},t={t}"), Case { single: true, ..Case::new(dtype, [1, t, h]) }));
    }
    for (what, case) in [
        ("ragged", Case::new(DType::E4m3, [1, 8001, 7168])),
        ("ragged", Case::new(DType::Bf16, [1, 8001, 7168])),
        ("ragged", Case::new(DType::F32, [1, 8001, 7168])),
        ("ragged", Case::new(DType::E4m3, [1, 8064, 7161])),
        ("narrow", Case::new(DType::E4m3, [1, 8064, 7168]).rows(7172)),
        ("narrow", Case::new(DType::Bf16, [1, 8064, 7168]).rows(7172)),
    ] {
        let [_, t, h] = case.shape;
        rows.push(row(&format!("dtype={},h={h},layout={what},t={t}", case.dtype), Case { single: true, ..case }));
    }
    // The largest last: a buffer allocated right after those are freed has been seen to be slower to read.
    let sizes =
        [(1, 64, 7168), (1, 128, 7168), (1, 4032, 2048), (1, 8064, 7168), (8, 4032, 2048), (8, 8064, 7168), (32, 8064, 7168)];
    for (b, t, h) in sizes {
        for dtype in MAIN_DTYPES {
            rows.push(row(&format!("b={b},dtype={dtype},h={h},t={t}"), Case::new(dtype, [b, t, h])));
        }
    }
    rows
}

fn row(name: &str, case: Case) -> Row {
    let op = if case.single { "transpose" } else { "batched_transpose" };
    let build = move |device: &Device, stream: &Stream| -> Result<Launch, String> {
        // Contents do not matter to bytes that move, except to memory compression, which needs an all-zero line: none is here.
        let piece = Rng::named("batched_transpose").fill(1 << 22, |rng, i| rng.bits(i) as u32);
        let words = ((case.span() * case.dtype.size()).div_ceil(4) as usize).next_multiple_of(piece.len());
        let mut data = device.alloc::<u32>(words).map_err(text)?;
        let source = device.upload(&piece).map_err(text)?;
        let len = piece.len() as u64;
        for at in (0..words as u64).step_by(piece.len()) {
            let mut to = data.strided_mut(&[len], &[1], at).map_err(text)?;
            stream.copy(&mut to, &source.tensor(&[len]).map_err(text)?).map_err(text)?;
        }
        stream.synchronize().map_err(text)?;
        let pool = Pool { host: Vec::new(), device: data };
        let mut out = Output::new(device, &case)?;
        Ok(Box::new(move |stream| {
            let wrong = |what| ferrotile::Error::Unsupported { op: "bench", what };
            launch(stream, &case, pool.x(&case).map_err(wrong)?, out.tensor(&case).map_err(wrong)?)
        }))
    };
    Row { op, case: name.to_owned(), bytes: 2 * case.numel() * case.dtype.size(), build: Box::new(build) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferrotile::Error;
    use ferrotile_kernels::transpose::batched_transpose as k;
    use proptest::prelude::*;

    #[test]
    fn suite() {
        SUITE.test();
    }

    #[test]
    fn a_cell_is_transposed() {
        fn of<const V: usize>() {
            let size = 16 / V;
            // Each of the cell's bytes is its own number.
            let rows: [[u32; 4]; V] =
                std::array::from_fn(|i| bytemuck::cast::<[u8; 16], _>(std::array::from_fn(|at| (16 * i + at) as u8)));
            for (j, row) in k::transpose_cell(&rows).into_iter().enumerate() {
                let expected: [u8; 16] = std::array::from_fn(|at| (16 * (at / size) + size * j + at % size) as u8);
                assert_eq!(bytemuck::cast::<_, [u8; 16]>(row), expected, "V = {V}, row {j}");
            }
        }
        of::<4>();
        of::<8>();
        of::<16>();
    }

    /// 16-byte accesses go a quarter warp at a time; its eight threads must reach different groups of four banks, unless they want the
    /// same chunk. Simulated with the addresses of the kernels.
    #[test]
    fn shared_accesses_of_cells_meet_in_no_bank() {
        use std::collections::BTreeSet;
        fn of<const V: usize, const C: u32>() {
            let (threads, cell) = (C * C, V as u32);
            let free = |chunk: &dyn Fn(u32) -> u32, what: &str| {
                for quarter in (0..threads).step_by(8) {
                    let chunks: BTreeSet<u32> = (quarter..quarter + 8).map(chunk).collect();
                    let groups: BTreeSet<u32> = chunks.iter().map(|chunk| chunk % 8).collect();
                    assert_eq!(groups.len(), chunks.len(), "{what} of threads from {quarter} on, V = {V}, {C} cells");
                }
            };
            let mut used = vec![0; (threads * cell) as usize];
            for step in 0..cell {
                let write = |t: u32| k::tile_chunk::<V, C>(t % C * cell + step, t / C);
                let read = |t: u32| k::tile_chunk::<V, C>(t / C + step * C, t % C);
                let next = |t: u32| k::tile_chunk::<V, C>(t / C + step * C, (t % C + 1).min(C - 1));
                free(&write, "writes");
                free(&read, "reads");
                free(&next, "second reads of shifted pieces");
                (0..threads).for_each(|t| used[write(t) as usize] += 1);
                (0..threads).for_each(|t| used[read(t) as usize] += 1);
            }
            assert!(used.iter().all(|n| *n == 2), "every chunk is written once and read once");
        }
        of::<4, { k::CELLS }>();
        of::<8, { k::CELLS }>();
        of::<16, { k::CELLS }>();
        of::<8, { k::SMALL_CELLS }>();
        of::<16, { k::SMALL_CELLS }>();
    }

    /// Rows and columns of the tile of single elements: threads of a warp meet in a bank only if they share the word.
    #[test]
    fn shared_accesses_of_elements_meet_in_no_bank() {
        for size in [1, 2, 4] {
            let pitch = k::ANY_TILE * size + 4;
            for first in [0, 32] {
                for (step, what) in [(size, "row"), (pitch, "column")] {
                    let words: std::collections::BTreeSet<u32> = (first..first + 32).map(|lane| lane * step / 4).collect();
                    let banks: std::collections::BTreeSet<u32> = words.iter().map(|w| w % 32).collect();
                    assert_eq!(words.len(), banks.len(), "{what} of {size}-byte elements");
                }
            }
        }
    }

    /// Every documented mistake is a typed error that names the argument, and leaves the output alone.
    #[test]
    fn mistakes_are_errors() {
        let device = Device::emulator().checked();
        let stream = device.stream().unwrap();
        let x = device.zeros::<f32>(64 * 64).unwrap();
        let mut out = device.upload(&[7.0f32; 64 * 64]).unwrap();
        let mut go = |x: TensorRef<'_>, shape: &[u64], strides: &[u64]| {
            let result = batched_transpose(&stream, Args { x, out: out.strided_mut(shape, strides, 0).unwrap() });
            assert!(out.to_vec().unwrap().iter().all(|v| *v == 7.0));
            result.unwrap_err()
        };
        let fine = x.tensor(&[2, 8, 16]).unwrap();
        let error = go(x.tensor(&[8, 16]).unwrap(), &[2, 16, 8], &[128, 8, 1]);
        assert!(matches!(error, Error::Shape { op: "batched_transpose", arg: "x", .. }), "{error}");
        let error = go(fine, &[2, 8, 16], &[128, 16, 1]);
        assert_eq!(error.to_string(), "batched_transpose: out has shape [2, 8, 16], expected [2, 16, 8]");
        let error = go(fine, &[16, 8], &[8, 1]);
        assert!(matches!(error, Error::Shape { arg: "out", .. }), "{error}");
        let error = go(fine.reinterpret(DType::I32).unwrap(), &[2, 16, 8], &[128, 8, 1]);
        assert_eq!(error.to_string(), "batched_transpose: out is f32, allowed: i32");
        let error = go(x.strided(&[2, 8, 16], &[512, 32, 2], 0).unwrap(), &[2, 16, 8], &[128, 8, 1]);
        assert!(matches!(error, Error::Layout { arg: "x", .. }), "{error}");
        let error = go(fine, &[2, 16, 8], &[256, 16, 1]);
        assert!(matches!(error, Error::Layout { arg: "out", .. }), "{error}");
        let other = Device::emulator();
        let elsewhere = other.zeros::<f32>(256).unwrap();
        let error = go(elsewhere.tensor(&[2, 8, 16]).unwrap(), &[2, 16, 8], &[128, 8, 1]);
        assert!(matches!(error, Error::DeviceMismatch { arg: "x", .. }), "{error}");

        // SAFETY: refused before anything is touched.
        let raw = |ptr, dtype, shape: &[u64], strides: &[u64]| {
            unsafe { TensorRef::from_raw(&device, ptr, dtype, shape, strides) }.unwrap()
        };
        let error = go(raw(x.as_ptr() + 2, DType::F32, &[2, 8, 16], &[128, 16, 1]), &[2, 16, 8], &[128, 8, 1]);
        assert!(matches!(error, Error::Layout { arg: "x", .. }), "{error}");

        let longs = device.zeros::<i64>(4).unwrap();
        let mut to = device.zeros::<i64>(4).unwrap();
        let error =
            transpose(&stream, Args { x: longs.tensor(&[2, 2]).unwrap(), out: to.tensor_mut(&[2, 2]).unwrap() }).unwrap_err();
        assert!(matches!(error, Error::DType { op: "transpose", arg: "x", got: DType::I64, .. }), "{error}");
        let error = transpose(&stream, Args { x: fine, out: to.tensor_mut(&[2, 2]).unwrap() }).unwrap_err();
        assert!(matches!(error, Error::Shape { op: "transpose", arg: "x", .. }), "{error}");

        let mut both = device.zeros::<f32>(64).unwrap();
        let x = raw(both.as_ptr() + 4 * 16, DType::F32, &[4, 8], &[8, 1]);
        let error = transpose(&stream, Args { x, out: both.tensor_mut(&[8, 4]).unwrap() }).unwrap_err();
        assert_eq!(error.to_string(), "transpose: x and out overlap in memory");

        // Sizes that no kernel counts to. Row stride 0 keeps the span small; the addresses are never used.
        for (shape, strides, arg) in [
            ([1, 1 << 31, 1], [0, 0, 1], "rows of x"),
            ([1, 1, 1 << 31], [0, 0, 1], "columns of x"),
            ([1 << 31, 1, 1], [0, 0, 1], "tiles of x"),
        ] {
            let [b, m, n] = shape;
            let x = raw(1 << 40, DType::U8, &shape, &strides);
            // SAFETY: as above.
            let out = unsafe { TensorMut::from_raw(&device, 1 << 45, DType::U8, &[b, n, m], &[n * m, m, 1]) }.unwrap();
            let error = batched_transpose(&stream, Args { x, out }).unwrap_err();
            assert!(matches!(error, Error::Value { arg: a, .. } if a == arg), "{error}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
        #[test]
        fn any_shape_stride_and_alignment(
            dtype in 0..DTYPES.len(), b in 0u64..4, m in 0u64..300, n in 0u64..300, row_gap in 0u64..20, batch_gap in 0u64..40,
            x_offset in 0u64..9, out_offset in 0u64..17, round in prop::sample::select(vec![1u64, 4, 16]), ragged in any::<bool>(),
        ) {
            // Rounded up, the sizes reach the vector kernels; all but the number of rows and the start of out the ragged one.
            let up = |v: u64| v.next_multiple_of(round);
            let any_or_up = |v: u64| if ragged { v } else { up(v) };
            let case = Case::new(DTYPES[dtype], [b, any_or_up(m), up(n)]).rows(up(n) + up(row_gap));
            let case = Case {
                batch_stride: case.batch_stride + up(batch_gap),
                x_offset: up(x_offset),
                out_offset: any_or_up(out_offset),
                ..case
            };
            let device = Device::emulator().checked().shuffled(m * 301 + n);
            let pool = Pool::new(&device, ((case.x_offset + case.span()) * case.dtype.size()) as usize).unwrap();
            prop_assert_eq!(check(&device.stream().unwrap(), &pool, &case), Ok(()));
        }
    }
}
