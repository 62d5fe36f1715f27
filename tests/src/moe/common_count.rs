//! What the checks of `group_count` and `aux_fi` share: what there is to count, and a workspace that serves call after call.

use super::common_route::{grid, inside, prefilled, uploaded};
use crate::support::cases::{Depth, MoeCase};
use crate::support::compare::Bits;
use crate::support::rng::Rng;
use crate::support::suite::{Ctx, ensure, text};
use ferrotile::moe::group_count::workspace_bytes;
use ferrotile::{Buffer, Device, Element, Stream, TensorMut, TensorRef};

/// What there is to count.
#[derive(Clone)]
pub struct Problem {
    /// Its parameters as text.
    pub name: String,
    /// Indices, `k` for each token.
    pub idx: Vec<i64>,
    /// Choices of a token.
    pub k: u64,
    /// Groups or experts.
    pub bins: u64,
    /// Elements before the first index: an odd number makes it no multiple of 16 bytes.
    pub offset: u64,
}

impl Problem {
    /// From a row of the MoE grid.
    pub fn of(case: &MoeCase) -> Self {
        Self { name: case.name(), idx: case.topk_idx(), k: case.num_topk, bins: case.num_experts, offset: 0 }
    }

    /// Tokens.
    pub fn tokens(&self) -> u64 {
        self.idx.len() as u64 / self.k
    }

    /// How often each index occurs, one after the other. Others count nowhere.
    pub fn counts(&self) -> Vec<u32> {
        let mut counts = vec![0; self.bins as usize];
        for index in &self.idx {
            if let Some(count) = usize::try_from(*index).ok().and_then(|i| counts.get_mut(i)) {
                *count += 1;
            }
        }
        counts
    }
}

/// Inputs beyond the MoE grid. Up to 8192 indices are counted by one block.
fn special(depth: Depth) -> Vec<Problem> {
    let rng = Rng::named("counts");
    let mut problems = Vec::new();
    let mut add = |name: &str, k: u64, bins: u64, offset: u64, idx: Vec<i64>| {
        let name = format!("{name},bins={bins},n={},offset={offset}", idx.len());
        problems.push(Problem { name, idx, k, bins, offset });
    };
    for (i, n) in [1usize, 2, 3, 4095, 8192, 8193, 9999].into_iter().enumerate() {
        for offset in [0, 1] {
            add("random", 1, 7, offset, rng.stream(i as u64).ints_i64(n, -1, 7));
        }
    }
    add("one bin takes all", 3, 5, 1, vec![4; 12_000]);
    add("nobody", 4, 9, 0, vec![-1; 12_000]);
    add("negative", 1, 3, 0, rng.stream(20).fill(500, |rng, i| [-1, -2, i64::MIN, 1, 2][rng.below(i, 5) as usize]));
    // The least bins whose words stand beside each other; more bins than threads; as many as there may be.
    add("bins that share lines", 1, 129, 1, rng.stream(21).ints_i64(10_001, -1, 129));
    add("many bins", 1, 1500, 0, rng.stream(22).ints_i64(9_000, -1, 1500));
    add("most bins", 1, 32 << 10, 0, rng.stream(23).ints_i64(500, -1, 32 << 10));
    if depth == Depth::Full {
        add("most bins", 8, 32 << 10, 1, rng.stream(24).ints_i64(800_000, -1, 32 << 10));
        add("many indices", 8, 256, 0, rng.stream(25).ints_i64(5_200_000, -1, 256));
        add("one bin takes all", 8, 4, 1, vec![2; 5_200_000]);
    }
    problems
}

/// Indices that no caller should give, with 10 bins.
pub fn out_of_range() -> Problem {
    let values = [10, 11, 1 << 31, 1 << 32, (1 << 32) + 3, i64::MAX, 3, 9];
    let idx = Rng::named("out of range").fill(2000, |rng, i| values[rng.below(i, 8) as usize]);
    Problem { name: "out of range".to_owned(), idx, k: 2, bins: 10, offset: 0 }
}

/// Call `check` with each problem that the context chooses.
pub fn each(ctx: &Ctx, mut check: impl FnMut(&Problem) -> Result<(), String>) -> Result<(), String> {
    for case in grid(ctx.depth) {
        if ctx.case(&case.name()) {
            check(&Problem::of(&case))?;
        }
    }
    special(ctx.depth).iter().filter(|problem| ctx.case(&problem.name)).try_for_each(check)
}

/// Bytes after the end of the workspace that must stay 0.
const GUARD: u64 = 64;

/// Everything a launch needs.
pub struct Buffers<T> {
    /// The indices.
    pub idx: Buffer<i64>,
    /// The output, filled with 0xA5.
    pub out: Buffer<T>,
    workspace: Buffer<u8>,
    shape: [u64; 2],
    bins: u64,
    offset: u64,
}

/// A call with indices, output and workspace.
pub type Call<'a> = &'a dyn Fn(&Stream, TensorRef<'_>, TensorMut<'_>, TensorMut<'_>) -> ferrotile::Result<()>;

impl<T: Element + Bits> Buffers<T> {
    /// For one problem.
    pub fn new(device: &Device, problem: &Problem) -> Result<Self, String> {
        let shape = [problem.tokens(), problem.k];
        let workspace = workspace_bytes(shape[0], shape[1], problem.bins) + GUARD;
        Ok(Self {
            idx: uploaded(device, &problem.idx, problem.offset)?,
            out: prefilled(device, problem.bins, 0)?,
            workspace: device.zeros(workspace as usize).map_err(text)?,
            shape,
            bins: problem.bins,
            offset: problem.offset,
        })
    }

    /// Launch.
    pub fn call(&mut self, stream: &Stream, call: Call) -> ferrotile::Result<()> {
        let bytes = self.workspace.len() as u64 - GUARD;
        call(
            stream,
            self.idx.strided(&self.shape, &[self.shape[1], 1], self.offset)?,
            self.out.tensor_mut(&[self.bins])?,
            self.workspace.tensor_mut(&[bytes])?,
        )
    }

    /// The output, if nothing was written beyond its end and the workspace is zero again.
    pub fn read(&self, name: &str) -> Result<Vec<T>, String> {
        let workspace = self.workspace.to_vec().map_err(text)?;
        ensure(workspace.iter().all(|byte| *byte == 0), || format!("the workspace is not zero; {name}"))?;
        inside("output", name, &self.out, self.bins, 0)
    }
}

/// The output of a problem. Launched three times: the workspace as one launch leaves it serves the next.
pub fn launch<T: Element + Bits>(device: &Device, problem: &Problem, call: Call) -> Result<Vec<T>, String> {
    let stream = device.stream().map_err(text)?;
    let mut buffers = Buffers::new(device, problem)?;
    for _ in 0..3 {
        buffers.out.fill_bytes(super::common_route::FILL).map_err(text)?;
        buffers.call(&stream, call).map_err(text)?;
        stream.synchronize().map_err(text)?;
    }
    buffers.read(&problem.name)
}

/// One workspace serves calls of different shapes in turn.
pub fn check_shared_workspace<T: Element + Bits>(
    device: &Device,
    call: Call,
    mut check: impl FnMut(&Problem, &[T]) -> Result<(), String>,
) -> Result<(), String> {
    let stream = device.stream().map_err(text)?;
    let rng = Rng::named("shared workspace");
    let shapes: [(u64, usize); 5] = [(40, 12_000), (3, 9_000), (200, 500), (200, 12_000), (40, 12_000)];
    let bytes = shapes.iter().map(|(bins, n)| workspace_bytes(*n as u64, 1, *bins)).max().unwrap_or(0);
    let workspace = device.zeros::<u8>(bytes as usize).map_err(text)?;
    for (i, (bins, n)) in shapes.into_iter().enumerate() {
        let idx = rng.stream(i as u64).ints_i64(n, -1, bins as i64);
        let problem = Problem { name: format!("workspace, call {i}"), idx, k: 1, bins, offset: 0 };
        let mut buffers = Buffers::<T>::new(device, &problem)?;
        buffers.call(&stream, &|stream, idx, out, _| call(stream, idx, out, workspace_of(&workspace)?)).map_err(text)?;
        stream.synchronize().map_err(text)?;
        check(&problem, &buffers.read(&problem.name)?)?;
    }
    ensure(workspace.to_vec().map_err(text)?.iter().all(|byte| *byte == 0), || "the workspace is not zero".to_owned())
}

/// All of a workspace that several calls use one after the other.
fn workspace_of(buffer: &Buffer<u8>) -> ferrotile::Result<TensorMut<'_>> {
    // SAFETY: the calls of a stream run one after the other, and the buffer outlives them.
    unsafe { TensorMut::from_raw(buffer.device(), buffer.as_ptr(), ferrotile::DType::U8, &[buffer.len() as u64], &[1]) }
}

/// Captured launches, of one block and of several, do their work at every replay, on the data that are there then.
pub fn check_graph<T: Element + Bits>(
    device: &Device,
    call: Call,
    mut check: impl FnMut(&Problem, &[T]) -> Result<(), String>,
) -> Result<(), String> {
    let stream = device.stream().map_err(text)?;
    for n in [4_000, 40_000] {
        let data = |seed| Rng::new(seed).ints_i64(n, -1, 32);
        let problem = |seed| Problem { name: format!("graph,n={n},replay {seed}"), idx: data(seed), k: 8, bins: 32, offset: 0 };
        let mut buffers = Buffers::<T>::new(device, &problem(0))?;
        // Compiled before the capture.
        buffers.call(&stream, call).map_err(text)?;
        let graph = stream.capture(|stream| buffers.call(stream, call)).map_err(text)?;
        for seed in 1..4 {
            let problem = problem(seed);
            buffers.idx = replaced(buffers.idx, &problem.idx)?;
            graph.launch(&stream).map_err(text)?;
            stream.synchronize().map_err(text)?;
            check(&problem, &buffers.read(&problem.name)?)?;
        }
    }
    Ok(())
}

/// The buffer with other elements at its start.
fn replaced(mut buffer: Buffer<i64>, data: &[i64]) -> Result<Buffer<i64>, String> {
    let mut all = buffer.to_vec().map_err(text)?;
    all[..data.len()].copy_from_slice(data);
    buffer.copy_from(&all).map_err(text)?;
    Ok(buffer)
}
