//! get_fused_mapping: reference, cases, checks and benchmark.

use crate::support::bench::Row;
use crate::support::cases::{Depth, MoeCase, moe_bench_cases, moe_cases};
use crate::support::compare::equal;
use crate::support::golden::{self, Case, Golden};
use crate::support::rng::Rng;
use crate::support::suite::{Ctx, Report, Suite, ensure, text};
use ferrotile::moe::get_fused_mapping::{
    Args, ExactCounts, check_indices, get_fused_mapping, get_fused_mapping_alloc, get_fused_mapping_exact, max_expanded_tokens,
    workspace_bytes,
};
use ferrotile::{Buffer, Device, Error, Stream};

/// The checks of this op.
pub const SUITE: Suite = Suite { op: "get_fused_mapping", run };

/// The seven outputs.
#[derive(Clone, Debug, PartialEq)]
struct Mapping {
    pos_to_expert: Vec<i32>,
    pos_to_token: Vec<i32>,
    pos_to_token_topk: Vec<i32>,
    token_topk_to_pos: Vec<i32>,
    expert_start: Vec<i32>,
    expert_end: Vec<i32>,
    num_tokens_per_expert: Vec<i32>,
}

impl Mapping {
    fn tensors(&self) -> [(&'static str, &Vec<i32>); 7] {
        [
            ("pos_to_expert", &self.pos_to_expert),
            ("pos_to_token", &self.pos_to_token),
            ("pos_to_token_topk", &self.pos_to_token_topk),
            ("token_topk_to_pos", &self.token_topk_to_pos),
            ("expert_start", &self.expert_start),
            ("expert_end", &self.expert_end),
            ("num_tokens_per_expert", &self.num_tokens_per_expert),
        ]
    }
}

/// What there is to map.
#[derive(Clone, Copy)]
struct Problem<'a> {
    topk_idx: &'a [i64],
    k: u64,
    e: u64,
    alignment: u32,
}

impl Problem<'_> {
    fn tokens(&self) -> u64 {
        self.topk_idx.len() as u64 / self.k
    }

    /// Rows that are needed.
    fn rows(&self) -> u64 {
        self.layout().1.last().copied().unwrap_or(0)
    }

    /// First row of each expert, and the row after its last one.
    fn layout(&self) -> (Vec<u64>, Vec<u64>) {
        let (mut start, mut end) = (Vec::new(), Vec::new());
        let mut row = 0;
        for expert in 0..self.e {
            let count = self.topk_idx.iter().filter(|v| **v == expert as i64).count() as u64;
            start.push(row);
            row += count.next_multiple_of(self.alignment.into());
            end.push(row);
        }
        (start, end)
    }
}

/// One choice after the other, each into the next free row of its expert.
fn reference(problem: &Problem, p: u64) -> Mapping {
    let (start, end) = problem.layout();
    let absent = || vec![-1; p as usize];
    let narrow = |rows: &[u64]| rows.iter().map(|r| *r as i32).collect();
    let mut mapping = Mapping {
        pos_to_expert: absent(),
        pos_to_token: absent(),
        pos_to_token_topk: absent(),
        token_topk_to_pos: vec![-1; problem.topk_idx.len()],
        expert_start: narrow(&start),
        expert_end: narrow(&end),
        num_tokens_per_expert: start.iter().zip(&end).map(|(s, e)| (e - s) as i32).collect(),
    };
    let mut next = start;
    for (slot, expert) in problem.topk_idx.iter().enumerate() {
        if *expert < 0 || *expert >= problem.e as i64 {
            continue;
        }
        let row = next[*expert as usize];
        next[*expert as usize] += 1;
        if row < p {
            mapping.token_topk_to_pos[slot] = row as i32;
            mapping.pos_to_expert[row as usize] = *expert as i32;
            mapping.pos_to_token[row as usize] = (slot as u64 / problem.k) as i32;
            mapping.pos_to_token_topk[row as usize] = slot as i32;
        }
    }
    mapping
}

/// The relations of moe.md section 8, which hold for any order of the choices inside an expert.
fn check_relations(problem: &Problem, got: &Mapping, name: &str) -> Result<(), String> {
    let fail = |what: String| format!("{what}; {name}");
    let mut row = 0;
    for expert in 0..problem.e as usize {
        let (start, end) = (got.expert_start[expert], got.expert_end[expert]);
        let count = problem.topk_idx.iter().filter(|v| **v == expert as i64).count() as i32;
        let length = (count as u64).next_multiple_of(problem.alignment.into()) as i32;
        ensure(start == row && end == row + length && got.num_tokens_per_expert[expert] == length, || {
            fail(format!("expert {expert} has rows {start}..{end}, expected {row}..{}", row + length))
        })?;
        for pos in start..end {
            let expected = if pos < start + count { expert as i32 } else { -1 };
            ensure(got.pos_to_expert[pos as usize] == expected, || fail(format!("row {pos} is not of expert {expected}")))?;
        }
        row = end;
    }
    for (pos, expert) in got.pos_to_expert.iter().enumerate() {
        let (token, slot) = (got.pos_to_token[pos], got.pos_to_token_topk[pos]);
        let fits = if *expert < 0 {
            (token, slot) == (-1, -1)
        } else {
            token == slot / problem.k as i32
                && problem.topk_idx[slot as usize] == *expert as i64
                && got.token_topk_to_pos[slot as usize] == pos as i32
        };
        ensure(fits, || fail(format!("row {pos}: expert {expert}, token {token}, choice {slot} contradict each other")))?;
    }
    for (slot, pos) in got.token_topk_to_pos.iter().enumerate() {
        let fits = if problem.topk_idx[slot] < 0 {
            *pos == -1
        } else {
            got.pos_to_token_topk.get(*pos as usize) == Some(&(slot as i32))
        };
        ensure(fits, || fail(format!("choice {slot} has row {pos}")))?;
    }
    Ok(())
}

/// Everything a launch needs, outputs prefilled with 0xA5.
struct Buffers {
    topk_idx: Buffer<i64>,
    rows: [Buffer<i32>; 3],
    token_topk_to_pos: Buffer<i32>,
    experts: [Buffer<i32>; 3],
    workspace: Buffer<u8>,
    shape: [u64; 2],
    e: u64,
    p: u64,
    alignment: u32,
}

/// Elements after the end of each tensor that must stay as they are.
const GUARD: u64 = 5;

/// Bytes after the end of the workspace that must stay 0.
const WORKSPACE_GUARD: u64 = 64;

impl Buffers {
    fn new(device: &Device, problem: &Problem, p: u64) -> Result<Self, String> {
        let output = |len: u64| -> Result<Buffer<i32>, String> {
            let mut buffer = device.alloc::<i32>((len + GUARD) as usize).map_err(text)?;
            buffer.fill_bytes(0xA5).map_err(text)?;
            Ok(buffer)
        };
        let (t, k, e) = (problem.tokens(), problem.k, problem.e);
        Ok(Self {
            topk_idx: device.upload(problem.topk_idx).map_err(text)?,
            rows: [output(p)?, output(p)?, output(p)?],
            token_topk_to_pos: output(t * k)?,
            experts: [output(e)?, output(e)?, output(e)?],
            workspace: device.zeros((workspace_bytes(t, k, e) + WORKSPACE_GUARD) as usize).map_err(text)?,
            shape: [t, k],
            e,
            p,
            alignment: problem.alignment,
        })
    }

    fn args(&mut self) -> ferrotile::Result<Args<'_>> {
        let [pos_to_expert, pos_to_token, pos_to_token_topk] = &mut self.rows;
        let [expert_start, expert_end, num_tokens_per_expert] = &mut self.experts;
        let workspace = self.workspace.len() as u64 - WORKSPACE_GUARD;
        Ok(Args {
            topk_idx: self.topk_idx.tensor(&self.shape)?,
            alignment: self.alignment,
            pos_to_expert: pos_to_expert.tensor_mut(&[self.p])?,
            pos_to_token: pos_to_token.tensor_mut(&[self.p])?,
            pos_to_token_topk: pos_to_token_topk.tensor_mut(&[self.p])?,
            token_topk_to_pos: self.token_topk_to_pos.tensor_mut(&self.shape)?,
            expert_start: expert_start.tensor_mut(&[self.e])?,
            expert_end: expert_end.tensor_mut(&[self.e])?,
            num_tokens_per_expert: num_tokens_per_expert.tensor_mut(&[self.e])?,
            workspace: self.workspace.tensor_mut(&[workspace])?,
        })
    }

    /// The outputs, if nothing was written beyond their ends.
    fn read(&self, name: &str) -> Result<Mapping, String> {
        let take = |what: &str, buffer: &Buffer<i32>| -> Result<Vec<i32>, String> {
            let mut values = buffer.to_vec().map_err(text)?;
            let guard = values.split_off(values.len() - GUARD as usize);
            ensure(guard.iter().all(|v| *v as u32 == 0xA5A5_A5A5), || format!("{what} was written beyond its end; {name}"))?;
            Ok(values)
        };
        let workspace = self.workspace.to_vec().map_err(text)?;
        let guard = &workspace[workspace.len() - WORKSPACE_GUARD as usize..];
        ensure(guard.iter().all(|v| *v == 0), || format!("the workspace was written beyond its end; {name}"))?;
        Ok(Mapping {
            pos_to_expert: take("pos_to_expert", &self.rows[0])?,
            pos_to_token: take("pos_to_token", &self.rows[1])?,
            pos_to_token_topk: take("pos_to_token_topk", &self.rows[2])?,
            token_topk_to_pos: take("token_topk_to_pos", &self.token_topk_to_pos)?,
            expert_start: take("expert_start", &self.experts[0])?,
            expert_end: take("expert_end", &self.experts[1])?,
            num_tokens_per_expert: take("num_tokens_per_expert", &self.experts[2])?,
        })
    }
}

fn launch(device: &Device, problem: &Problem, p: u64, name: &str) -> Result<Mapping, String> {
    let stream = device.stream().map_err(text)?;
    let mut buffers = Buffers::new(device, problem, p)?;
    // Twice: the workspace as the first launch left it serves the second.
    for _ in 0..2 {
        get_fused_mapping(&stream, buffers.args().map_err(text)?).map_err(text)?;
    }
    stream.synchronize().map_err(text)?;
    buffers.read(name)
}

fn same(got: &Mapping, expected: &Mapping, name: &str) -> Result<(), String> {
    got.tensors()
        .iter()
        .zip(expected.tensors())
        .try_for_each(|((what, got), (_, expected))| equal(what, name, &[expected.len() as u64], got, expected))
}

fn check(device: &Device, problem: &Problem, p: u64, name: &str) -> Result<(), String> {
    let name = format!("{name},p={p}");
    same(&launch(device, problem, p, &name)?, &reference(problem, p), &name)
}

/// Indices that no caller should give; all but three of them are -1 to the op.
fn wrong_indices(n: usize) -> Vec<i64> {
    Rng::named("wrong indices").fill(n, |rng, i| [-1, 3, 15, 16, -2, i64::MIN, i64::MAX, 1 << 32][rng.below(i, 8) as usize])
}

/// Inputs beyond the MoE grid, by name: experts, choices per token, choices.
fn special_cases(depth: Depth) -> Vec<(&'static str, u64, u64, Vec<i64>)> {
    // Blocks have 1024 threads. At small depth a single block has three runs of slots per warp, fewer than it holds in registers.
    let n = match depth {
        Depth::Small => 2500,
        Depth::Full => 200_003,
    };
    let rng = Rng::named("get_fused_mapping");
    let mut cases = vec![
        ("most experts", 1024, 1, rng.ints_i64(n, -1, 1024)),
        ("one expert takes all", 7, 1, vec![5; n]),
        ("nobody", 9, 4, vec![-1; n / 4 * 4]),
        ("between powers of two", 33, 9, rng.stream(1).ints_i64(n / 9 * 9, -1, 33)),
        // Experts beyond the last one are for the GPU: the checked emulator reports them.
        ("out of range", 16, 3, {
            let mut wrong = wrong_indices(n / 3 * 3);
            wrong.iter_mut().filter(|v| depth == Depth::Small && **v > 15).for_each(|v| *v = i64::MIN);
            wrong
        }),
        // The most that one block does alone; then the least for several blocks, that is two.
        ("largest block", 5, 1, rng.stream(3).ints_i64(1024, -1, 5)),
        ("smallest grid", 5, 3, rng.stream(4).ints_i64(1026, -1, 5)),
        ("one expert in a grid", 1, 1, vec![0; 9000]),
        // 32 blocks because of the counts, with two runs of slots per warp; with five, which is more than registers hold.
        ("most experts in a grid", 1024, 1, rng.stream(5).ints_i64(33_000, -1, 1024)),
        ("more than registers hold", 1024, 1, rng.stream(8).ints_i64(135_000, -1, 1024)),
    ];
    if depth == Depth::Full {
        // Up to 20 and up to 40 runs of slots per warp on 132 multiprocessors, and as many counts as there may be.
        cases.push(("many choices", 32, 8, rng.stream(6).ints_i64(2_600_000, -1, 32)));
        cases.push(("many choices and counts", 256, 8, rng.stream(7).ints_i64(5_200_000, -1, 256)));
    }
    cases
}

fn run(ctx: &Ctx) -> Result<Report, String> {
    let device = &ctx.device;
    for case in moe_cases(ctx.depth) {
        if !ctx.case(&case.name()) {
            continue;
        }
        let topk_idx = case.topk_idx();
        for alignment in [1, 64, 128] {
            let problem = Problem { topk_idx: &topk_idx, k: case.num_topk, e: case.num_experts, alignment };
            let name = format!("{},a={alignment}", case.name());
            let rows = problem.rows();
            // The exact size, and one as it is when the counts are not known.
            let bound = max_expanded_tokens(problem.tokens(), problem.k, problem.e, alignment);
            ensure(bound >= rows, || format!("{rows} rows exceed the bound of {bound}; {name}"))?;
            let sizes = if alignment == 64 { vec![rows, bound] } else { vec![rows] };
            for p in sizes {
                check(device, &problem, p, &name)?;
            }
        }
    }
    for (name, e, k, topk_idx) in special_cases(ctx.depth) {
        if !ctx.case(name) {
            continue;
        }
        let problem = Problem { topk_idx: &topk_idx, k, e, alignment: 7 };
        let rows = problem.rows();
        // The second is too small: what does not fit is left out.
        for p in [rows, rows / 2, rows + 3] {
            check(device, &problem, p, name)?;
        }
    }
    if ctx.case("alloc") {
        check_alloc(device)?;
    }
    if ctx.case("exact") {
        check_exact(device)?;
    }
    if ctx.case("check indices") {
        check_reports(device)?;
    }
    if ctx.case("workspace") {
        check_workspace(device)?;
    }
    let notes = golden::check_cases(ctx, &["get_fused_mapping"], |golden, case| check_golden(device, golden, case))?;
    if !device.is_emulator() && ctx.case("graph") {
        check_graph(device)?;
    }
    Ok(Report { notes, ..ctx.report() })
}

/// One workspace serves calls of different shapes in turn, although each leaves its counts there.
fn check_workspace(device: &Device) -> Result<(), String> {
    let stream = device.stream().map_err(text)?;
    let rng = Rng::named("get_fused_mapping workspace");
    let shapes: [(u64, usize); 5] = [(40, 12_000), (3, 9_000), (40, 500), (17, 12_000), (40, 12_000)];
    let bytes = shapes.iter().map(|(e, n)| workspace_bytes(*n as u64, 1, *e)).max().unwrap_or(0);
    let mut workspace = device.zeros::<u8>(bytes as usize).map_err(text)?;
    for (i, (e, n)) in shapes.into_iter().enumerate() {
        let topk_idx = rng.stream(i as u64).ints_i64(n, -1, e as i64);
        let problem = Problem { topk_idx: &topk_idx, k: 1, e, alignment: 16 };
        let mut buffers = Buffers::new(device, &problem, problem.rows())?;
        let mut args = buffers.args().map_err(text)?;
        args.workspace = workspace.tensor_mut(&[bytes]).map_err(text)?;
        get_fused_mapping(&stream, args).map_err(text)?;
        stream.synchronize().map_err(text)?;
        let name = format!("workspace, call {i}");
        same(&buffers.read(&name)?, &reference(&problem, problem.rows()), &name)?;
    }
    Ok(())
}

/// The form that allocates: exact size, the same contents.
fn check_alloc(device: &Device) -> Result<(), String> {
    let stream = device.stream().map_err(text)?;
    for case in moe_cases(Depth::Small) {
        let topk_idx = case.topk_idx();
        let problem = Problem { topk_idx: &topk_idx, k: case.num_topk, e: case.num_experts, alignment: 16 };
        let name = format!("alloc,{}", case.name());
        let expected = reference(&problem, problem.rows());
        let on_device = device.upload(&topk_idx).map_err(text)?;
        let shape = [problem.tokens(), problem.k];
        let got = get_fused_mapping_alloc(&stream, on_device.tensor(&shape).map_err(text)?, problem.e, 16).map_err(text)?;
        ensure(got.num_expanded_tokens == problem.rows(), || {
            format!("{} rows, expected {}; {name}", got.num_expanded_tokens, problem.rows())
        })?;
        equal("list", &name, &[problem.e], &got.num_tokens_per_expert_list, &expected.num_tokens_per_expert)?;
        let rows = got.num_expanded_tokens as usize;
        let read = |buffer: &Buffer<i32>| buffer.to_vec().map_err(text);
        let cut = |buffer: &Buffer<i32>| read(buffer).map(|values| values[..rows].to_vec());
        let got = Mapping {
            pos_to_expert: cut(&got.pos_to_expert)?,
            pos_to_token: cut(&got.pos_to_token)?,
            pos_to_token_topk: cut(&got.pos_to_token_topk)?,
            token_topk_to_pos: read(&got.token_topk_to_pos)?,
            expert_start: read(&got.expert_start)?,
            expert_end: read(&got.expert_end)?,
            num_tokens_per_expert: read(&got.num_tokens_per_expert)?,
        };
        same(&got, &expected, &name)?;
    }
    Ok(())
}

/// The form that waits: exact size, in buffers for the worst case and in exactly as many rows; an error if they are too few.
fn check_exact(device: &Device) -> Result<(), String> {
    let stream = device.stream().map_err(text)?;
    for case in moe_cases(Depth::Small) {
        let topk_idx = case.topk_idx();
        let problem = Problem { topk_idx: &topk_idx, k: case.num_topk, e: case.num_experts, alignment: 16 };
        let (needed, most) = (problem.rows(), max_expanded_tokens(problem.tokens(), problem.k, problem.e, 16));
        for p in [most, needed, needed / 2] {
            let name = format!("exact,p={p},{}", case.name());
            let expected = reference(&problem, p);
            let mut buffers = Buffers::new(device, &problem, p)?;
            let got = get_fused_mapping_exact(&stream, buffers.args().map_err(text)?);
            let list = expected.num_tokens_per_expert.clone();
            let fits = match got {
                Ok(counts) => counts == ExactCounts { num_expanded_tokens: needed, num_tokens_per_expert: list } && p >= needed,
                Err(Error::Value { arg: "num_expanded_tokens", .. }) => p < needed,
                Err(_) => false,
            };
            ensure(fits, || format!("{name}: {needed} rows are needed"))?;
            same(&buffers.read(&name)?, &expected, &name)?;
        }
    }
    Ok(())
}

/// Mistakes in a table are found wherever they are, on request.
fn check_reports(device: &Device) -> Result<(), String> {
    let stream = device.stream().map_err(text)?;
    let report = |table: &[i64], shape: [u64; 2], e: u64| -> Result<Option<String>, String> {
        let on_device = device.upload(table).map_err(text)?;
        Ok(check_indices(&stream, &on_device.tensor(&shape).map_err(text)?, e).err().map(|error| error.to_string()))
    };
    // Every table without a mistake passes; one wrong place in it does not.
    for case in moe_cases(Depth::Small) {
        let mut table = case.topk_idx();
        let (k, e) = (case.num_topk, case.num_experts);
        let shape = [table.len() as u64 / k, k];
        let said = report(&table, shape, e)?;
        ensure(said.is_none(), || format!("a table without mistakes: {said:?}"))?;
        let slot = table.len() / 2;
        let Some(old) = table.get(slot).copied() else { continue };
        for wrong in [e as i64, -2, i64::MIN, i64::MAX] {
            table[slot] = wrong;
            let said = report(&table, shape, e)?.unwrap_or_default();
            let place = format!("{wrong} for choice {} of token {}, allowed: -1 to {}", slot as u64 % k, slot as u64 / k, e - 1);
            ensure(said.contains(&place), || format!("expected `{place}`, got `{said}`"))?;
        }
        table[slot] = old;
    }
    let twice = report(&[4, 0, 4, 2, -1, -1, 2, 2, 4], [3, 3], 5)?.unwrap_or_default();
    ensure(twice.contains("4 for choice 2 of token 0, allowed: an expert not chosen before"), || twice.clone())?;
    ensure(report(&[], [0, 3], 5)?.is_none() && report(&[0], [1, 1], 0)?.is_some(), || "edges of check_indices".to_owned())
}

/// Outputs 0 and 4 to 6 are the recorded ones; 1 to 3 depend on the order inside an expert, which was another one there, so both sides
/// are held against the relations.
fn check_golden(device: &Device, golden: &Golden, case: &Case) -> Result<(), String> {
    let name = case.name();
    let input = golden.tensor(case, "in/topk_idx")?;
    let topk_idx: Vec<i64> = input.to_vec()?;
    let problem =
        Problem { topk_idx: &topk_idx, k: input.shape[1], e: case.param("num_experts")?, alignment: case.param("alignment")? };
    let out = |i: u32| -> Result<Vec<i32>, String> { golden.tensor(case, &format!("out/{i}"))?.to_vec() };
    let recorded = Mapping {
        pos_to_expert: out(0)?,
        pos_to_token: out(1)?,
        pos_to_token_topk: out(2)?,
        token_topk_to_pos: out(3)?,
        expert_start: out(4)?,
        expert_end: out(5)?,
        num_tokens_per_expert: out(6)?,
    };
    check_relations(&problem, &recorded, &name)?;
    let p = problem.rows();
    let got = launch(device, &problem, p, &name)?;
    check_relations(&problem, &got, &name)?;
    for i in [0, 4, 5, 6] {
        let ((what, got), (_, expected)) = (got.tensors()[i], recorded.tensors()[i]);
        equal(what, &name, &[expected.len() as u64], got, expected)?;
    }
    Ok(())
}

/// Captured launches, of one block and cooperative, do their work at every replay, on the data that are there then.
fn check_graph(device: &Device) -> Result<(), String> {
    let stream = device.stream().map_err(text)?;
    for n in [4_000, 40_000] {
        let data = |seed| Rng::new(seed).ints_i64(n, -1, 32);
        let first = data(0);
        let problem = Problem { topk_idx: &first, k: 8, e: 32, alignment: 128 };
        let p = max_expanded_tokens(problem.tokens(), 8, 32, 128);
        let mut buffers = Buffers::new(device, &problem, p)?;
        // Compiled before the capture.
        get_fused_mapping(&stream, buffers.args().map_err(text)?).map_err(text)?;
        // What waits is refused while a graph is captured, before it launches anything; that does not spoil the capture.
        let mut refused = 0;
        let graph = stream.capture(|stream| {
            let idx = buffers.topk_idx.tensor(&buffers.shape)?;
            refused += matches!(get_fused_mapping_alloc(stream, idx, 32, 128), Err(Error::Unsupported { .. })) as u32;
            refused += matches!(check_indices(stream, &idx, 32), Err(Error::Unsupported { .. })) as u32;
            refused += matches!(get_fused_mapping_exact(stream, buffers.args()?), Err(Error::Unsupported { .. })) as u32;
            get_fused_mapping(stream, buffers.args()?)
        });
        let graph = graph.map_err(text)?;
        ensure(refused == 3, || "calls that wait ran during a capture".to_owned())?;
        for seed in 1..4 {
            let topk_idx = data(seed);
            buffers.topk_idx.copy_from(&topk_idx).map_err(text)?;
            graph.launch(&stream).map_err(text)?;
            stream.synchronize().map_err(text)?;
            let name = format!("graph,n={n},replay {seed}");
            same(&buffers.read(&name)?, &reference(&Problem { topk_idx: &topk_idx, ..problem }, p), &name)?;
        }
    }
    Ok(())
}

/// The peers' cases, all of the grid of 1.0.0, and small ones. Rows are multiples of 128.
pub fn bench() -> Vec<Row> {
    let row = |moe: MoeCase| {
        let MoeCase { num_send_tokens: send, num_topk: k, num_experts: e, num_ranks: ep } = moe;
        let topk_idx = moe.topk_idx();
        let problem = Problem { topk_idx: &topk_idx, k: moe.num_topk, e: moe.num_experts, alignment: 128 };
        let p = problem.rows();
        let n = topk_idx.len() as u64;
        Row {
            op: "get_fused_mapping",
            case: format!("e={e},ep={ep},k={k},send={send}"),
            bytes: 12 * n + 12 * p + 12 * moe.num_experts,
            build: Box::new(move |device, _| {
                let problem = Problem { topk_idx: &topk_idx, k: moe.num_topk, e: moe.num_experts, alignment: 128 };
                let mut buffers = Buffers::new(device, &problem, p)?;
                Ok(Box::new(move |stream: &Stream| get_fused_mapping(stream, buffers.args()?)))
            }),
        }
    };
    let moe = |num_send_tokens, num_topk, num_experts, num_ranks| MoeCase { num_send_tokens, num_topk, num_experts, num_ranks };
    let first = moe(4001, 8, 32, 8);
    let mut cases = vec![first];
    cases.extend(moe_bench_cases().into_iter().filter(|case| *case != first));
    cases
        .extend([(1, 32, 8), (16, 32, 8), (128, 32, 8), (4001, 256, 1), (65536, 32, 8)].map(|(send, e, ep)| moe(send, 8, e, ep)));
    cases.into_iter().map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::super::common_route::stopped;
    use super::*;
    use ferrotile::{DType, TensorMut, View};
    use proptest::prelude::{ProptestConfig, prop_assert_eq, proptest};

    #[test]
    fn suite() {
        SUITE.test();
    }

    #[test]
    fn reference_is_the_definition() {
        let topk_idx = [1, -1, 0, 1, 1, 0];
        let problem = Problem { topk_idx: &topk_idx, k: 2, e: 3, alignment: 2 };
        let got = reference(&problem, 7);
        assert_eq!(got.expert_start, [0, 2, 6]);
        assert_eq!(got.expert_end, [2, 6, 6]);
        assert_eq!(got.num_tokens_per_expert, [2, 4, 0]);
        assert_eq!(got.token_topk_to_pos, [2, -1, 0, 3, 4, 1]);
        assert_eq!(got.pos_to_expert, [0, 0, 1, 1, 1, -1, -1]);
        assert_eq!(got.pos_to_token, [1, 2, 0, 1, 2, -1, -1]);
        assert_eq!(got.pos_to_token_topk, [2, 5, 0, 3, 4, -1, -1]);
        check_relations(&problem, &got, "").unwrap();
        // The relations are not satisfied by just anything.
        let mut wrong = got.clone();
        wrong.pos_to_token_topk.swap(2, 3);
        assert!(check_relations(&problem, &wrong, "").is_err());
    }

    #[test]
    fn workspace_stays_small_and_bounds_saturate() {
        assert_eq!(workspace_bytes(0, 8, 32), 8 * (1 + 32));
        assert!((1..=1024).all(|e| workspace_bytes(1 << 20, 8, e) <= 8 + (256 << 10)));
        assert_eq!([workspace_bytes(1, 1, 0), workspace_bytes(1, 1, 1025), workspace_bytes(1 << 40, 1 << 40, 1)], [0; 3]);
        assert_eq!(max_expanded_tokens(10, 2, 4, 8), (20 + 4 * 7) / 8 * 8);
        assert_eq!(max_expanded_tokens(u64::MAX, 2, 4, 1), u64::MAX);
        assert_eq!(max_expanded_tokens(u64::MAX, 2, u64::MAX, u32::MAX), u64::MAX / u32::MAX as u64 * u32::MAX as u64);
        // Fewer choices than experts: each of them alone with an expert.
        assert_eq!(max_expanded_tokens(1, 2, 1000, 128), 256);
        assert_eq!([max_expanded_tokens(0, 8, 32, 128), max_expanded_tokens(3, 2, 4, 0)], [0, 6]);
    }

    /// The bound is reached: no smaller one is enough for any choice of experts.
    #[test]
    fn bound_is_the_worst_case() {
        for (t, k, e, alignment) in [(1u64, 2u64, 9u64, 4u32), (5, 3, 2, 7), (10, 1, 4, 16), (7, 4, 5, 1), (3, 3, 9, 128)] {
            // Of all ways to spread n choices over experts; how they are ordered does not matter, so counts never rise.
            fn worst(n: u64, e: u64, most: u64, a: u64) -> u64 {
                match e {
                    0 => {
                        if n == 0 {
                            0
                        } else {
                            u64::MIN
                        }
                    }
                    _ => (0..=n.min(most))
                        .filter(|c| (n - c) <= (e - 1) * c.max(&0))
                        .map(|c| c.next_multiple_of(a) + worst(n - c, e - 1, c, a))
                        .max()
                        .unwrap_or(0),
                }
            }
            assert_eq!(
                max_expanded_tokens(t, k, e, alignment),
                worst(t * k, e, t * k, alignment.into()),
                "{t} {k} {e} {alignment}"
            );
        }
    }

    /// Experts beyond the last one count as -1; the checked emulator reports them.
    #[test]
    fn indices_too_large() {
        let topk_idx = wrong_indices(3000);
        let problem = Problem { topk_idx: &topk_idx, k: 3, e: 16, alignment: 7 };
        check(&Device::emulator(), &problem, problem.rows(), "too large").unwrap();
        for (expert, fine) in [(15, true), (16, false), (1 << 32, false), (i64::MAX, false), (-2, true), (i64::MIN, true)] {
            let topk_idx = [0, expert, -1];
            let problem = Problem { topk_idx: &topk_idx, k: 3, e: 16, alignment: 7 };
            let device = Device::emulator().checked();
            let mut buffers = Buffers::new(&device, &problem, problem.rows()).unwrap();
            let result = get_fused_mapping(&device.stream().unwrap(), buffers.args().unwrap());
            if fine { result.unwrap() } else { stopped(&format!("expert {expert}"), result).unwrap() }
        }
    }

    /// Tensors to put where they do not belong.
    struct Spare {
        words: Buffer<i32>,
        wide: Buffer<i64>,
        bytes: Buffer<u8>,
        elsewhere: Buffer<i32>,
    }

    type Spoil = for<'a> fn(&mut Args<'a>, &'a mut Spare) -> ferrotile::Result<()>;

    /// The error of a call whose arguments were right until `spoil` changed them.
    fn refused(what: &str, spoil: Spoil) -> Error {
        let device = Device::emulator();
        let topk_idx = [0, 1, 2, -1, 3, 3];
        let problem = Problem { topk_idx: &topk_idx, k: 2, e: 4, alignment: 4 };
        let mut buffers = Buffers::new(&device, &problem, 20).unwrap();
        let mut spare = Spare {
            words: device.zeros(2000).unwrap(),
            wide: device.zeros(2000).unwrap(),
            bytes: device.zeros(2000).unwrap(),
            elsewhere: Device::emulator().checked().zeros(2000).unwrap(),
        };
        let mut args = buffers.args().unwrap();
        spoil(&mut args, &mut spare).unwrap();
        let result = get_fused_mapping(&device.stream().unwrap(), args);
        let error = result.err().unwrap_or_else(|| panic!("{what} was accepted"));
        assert!(error.to_string().starts_with("get_fused_mapping: "), "{what}: {error}");
        for buffer in buffers.rows.iter().chain(&buffers.experts).chain([&buffers.token_topk_to_pos]) {
            assert!(buffer.to_vec().unwrap().iter().all(|v| *v as u32 == 0xA5A5_A5A5), "{what}");
        }
        error
    }

    /// `len` words that start `offset` bytes into another tensor.
    fn over<'a>(t: &View, offset: u64, len: u64) -> ferrotile::Result<TensorMut<'a>> {
        // SAFETY: the call that gets it is refused before anything is written.
        unsafe { TensorMut::from_raw(t.device(), t.ptr() + offset, DType::I32, &[len], &[1]) }
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
        refuse!("alignment 0", |a, _| a.alignment = 0, Error::Value { arg: "alignment", .. });
        refuse!("rows beyond i32", |a, _| a.alignment = u32::MAX, Error::Value { arg: "alignment", .. });
        refuse!("a vector", |a, s| a.topk_idx = s.wide.tensor(&[6])?, Error::Shape { arg: "topk_idx", .. });
        refuse!("32-bit indices", |a, s| a.topk_idx = s.words.tensor(&[3, 2])?, Error::DType { arg: "topk_idx", .. });
        refuse!(
            "rows with gaps",
            |a, s| a.topk_idx = s.wide.strided(&[3, 2], &[4, 1], 0)?,
            Error::Layout { arg: "topk_idx", .. }
        );
        refuse!("no experts", |a, s| a.expert_start = s.words.tensor_mut(&[0])?, Error::Value { arg: "num_experts", .. });
        refuse!("1025 experts", |a, s| a.expert_start = s.words.tensor_mut(&[1025])?, Error::Value { arg: "num_experts", .. });
        refuse!("ends of 5", |a, s| a.expert_end = s.words.tensor_mut(&[5])?, Error::Shape { arg: "expert_end", .. });
        refuse!(
            "64-bit counts",
            |a, s| a.num_tokens_per_expert = s.wide.tensor_mut(&[4])?,
            Error::DType { arg: "num_tokens_per_expert", .. }
        );
        refuse!("19 tokens", |a, s| a.pos_to_token = s.words.tensor_mut(&[19])?, Error::Shape { arg: "pos_to_token", .. });
        refuse!(
            "choices with gaps",
            |a, s| a.pos_to_token_topk = s.words.strided_mut(&[20], &[2], 0)?,
            Error::Layout { arg: "pos_to_token_topk", .. }
        );
        refuse!(
            "rows turned",
            |a, s| a.token_topk_to_pos = s.words.tensor_mut(&[2, 3])?,
            Error::Shape { arg: "token_topk_to_pos", .. }
        );
        refuse!("small workspace", |a, s| a.workspace = s.bytes.tensor_mut(&[39])?, Error::Shape { arg: "workspace", .. });
        refuse!("workspace of words", |a, s| a.workspace = s.words.tensor_mut(&[64])?, Error::DType { arg: "workspace", .. });
        refuse!(
            "odd workspace",
            |a, s| a.workspace = s.bytes.strided_mut(&[64], &[1], 4)?,
            Error::Layout { arg: "workspace", .. }
        );
        refuse!(
            "starts elsewhere",
            |a, s| a.expert_start = s.elsewhere.tensor_mut(&[4])?,
            Error::DeviceMismatch { arg: "expert_start", .. }
        );
        refuse!(
            "starts over ends",
            |a, _| a.expert_start = over(&a.expert_end, 0, 4)?,
            Error::Overlap { a: "expert_start", b: "expert_end", .. }
        );
        refuse!(
            "rows over choices",
            |a, _| a.pos_to_expert = over(&a.topk_idx, 40, 20)?,
            Error::Overlap { a: "topk_idx", b: "pos_to_expert", .. }
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn any_shape_and_alignment(t in 0u64..400, k in 1u64..12, e in 1u64..70, alignment in 1u32..40, off: bool, seed: u64) {
            let topk_idx = Rng::new(seed).ints_i64((t * k) as usize, -1, e as i64);
            let problem = Problem { topk_idx: &topk_idx, k, e, alignment };
            let p = if off { problem.rows() * 2 / 3 } else { problem.rows() };
            let got = launch(&Device::emulator(), &problem, p, "");
            prop_assert_eq!(got, Ok(reference(&problem, p)));
        }
    }
}
