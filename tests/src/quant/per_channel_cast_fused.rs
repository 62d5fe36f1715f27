//! Cases, checks and benchmark rows of `per_channel_cast_fused`; the reference is in `common_channels`.

use super::common_channels::{Kind, Outputs, Quantised, SCALES, Source, reference};
use crate::support::bench::{Launch, Row};
use crate::support::cases::{Depth, MoeCase, moe_bench_cases, moe_cases};
use crate::support::golden::{self, Case, Golden};
use crate::support::rng::Rng;
use crate::support::suite::{Ctx, Report, Suite, ensure, text};
use ferrotile::quant::SfLayout;
use ferrotile::quant::per_channel_cast_fused::{self as op, Args};
use ferrotile::{Buffer, Device, Stream};

/// What the `check` binary runs.
pub const SUITE: Suite = Suite { op: "per_channel_cast_fused", run };

/// Which row of the input each row of the output is, if rows are gathered.
struct Rows {
    pos: Option<(Vec<i32>, Buffer<i32>)>,
    len: u64,
}

impl Rows {
    fn all(len: u64) -> Self {
        Self { pos: None, len }
    }

    fn gathered(device: &Device, pos: Vec<i32>) -> Result<Self, String> {
        let buffer = device.upload(&pos).map_err(text)?;
        Ok(Self { len: pos.len() as u64, pos: Some((pos, buffer)) })
    }

    /// The input row of output row `r`; indices that are out of range count as none.
    fn source(&self, r: usize, num_tokens: u64) -> Option<usize> {
        match &self.pos {
            None => Some(r),
            Some((pos, _)) => usize::try_from(pos[r]).ok().filter(|token| (*token as u64) < num_tokens),
        }
    }
}

/// Tokens and the expanded rows of a routing: the tokens of one expert after the other, each padded to a multiple of `alignment`.
fn routed(case: &MoeCase, alignment: usize) -> (u64, Vec<i32>) {
    let idx = case.topk_idx();
    let topk = case.num_topk as usize;
    let mut pos = Vec::new();
    for expert in 0..case.num_experts as i64 {
        let of_expert = idx.chunks_exact(topk).enumerate().filter(|(_, experts)| experts.contains(&expert));
        pos.extend(of_expert.map(|(token, _)| token as i32));
        pos.resize(pos.len().next_multiple_of(alignment), -1);
    }
    ((idx.len() / topk) as u64, pos)
}

fn expected(source: &Source, rows: &Rows, npt: u32, round: bool) -> Quantised {
    reference(&source.values, (rows.len as usize, source.h as usize), npt, round, |r| rows.source(r, source.t))
}

fn outputs(
    device: &Device,
    h: u64,
    rows: &Rows,
    npt: u32,
    layout: SfLayout,
    (offset, gap): (u64, u64),
) -> Result<Outputs, String> {
    let shape = Outputs::sf_shape((rows.len, h), npt, layout, gap);
    Outputs::new(device, [rows.len, h], offset, shape, layout)
}

fn cast(stream: &Stream, source: &Source, rows: &Rows, npt: u32, round_sf: bool, to: &mut Outputs) -> ferrotile::Result<()> {
    let (out, sf) = to.tensors()?;
    let pos_to_token = rows.pos.as_ref().map(|(_, buffer)| buffer.tensor(&[rows.len])).transpose()?;
    op::per_channel_cast_fused(stream, Args { x: source.input()?, pos_to_token, npt, round_sf, out, sf })
}

/// Given options on one input; `place` is bytes before the data and elements between rows of scales.
fn check(
    ctx: &Ctx,
    source: &Source,
    rows: &Rows,
    options: &[(u32, bool, SfLayout)],
    place: (u64, u64),
    what: &str,
) -> Result<(), String> {
    let stream = ctx.device.stream().map_err(text)?;
    let h = source.h;
    for &(npt, round, layout) in options {
        let (kind, n, len) = (source.kind.name(), source.t, rows.len);
        let name = format!("h={h},input={kind},n={n},npt={npt},place={place:?},round_sf={round},rows={what},sf={layout},t={len}");
        if ctx.case(&name) {
            let expected = expected(source, rows, npt, round);
            let words = expected.sf_words(h as usize, layout);
            let mut out = outputs(&ctx.device, h, rows, npt, layout, place)?;
            cast(&stream, source, rows, npt, round, &mut out).map_err(text)?;
            out.check(&name, &expected.data, &words)?;
        }
    }
    Ok(())
}

/// The published options: blocks of 128 rows with f32 scales, rounded or not.
const PUBLISHED: [(u32, bool, SfLayout); 2] = [(128, false, SfLayout::RowMajor), (128, true, SfLayout::RowMajor)];

/// The published input, bf16 or quantised with a scale for 128 channels, and the other ones.
const KINDS: [Kind; 6] = [
    Kind::Bf16,
    Kind::Pair(SfLayout::RowMajor, 128),
    Kind::F32,
    Kind::Pair(SfLayout::ColMajor, 32),
    Kind::Pair(SfLayout::RowMajorPacked, 32),
    Kind::Pair(SfLayout::ColMajorPacked, 128),
];

fn run(ctx: &Ctx) -> Result<Report, String> {
    small(ctx)?;
    if ctx.depth == Depth::Full {
        full(ctx)?;
    }
    if !ctx.device.is_emulator() {
        check_stray_indices(ctx)?;
        check_graph(ctx)?;
        if ctx.depth == Depth::Full {
            check_both_backends(ctx)?;
            check_large(ctx)?;
        }
    }
    let notes = golden::check_cases(ctx, &[SUITE.op], |golden, case| check_golden(ctx, golden, case))?;
    Ok(Report { notes, ..ctx.report() })
}

/// Awkward shapes and values.
fn small(ctx: &Ctx) -> Result<(), String> {
    let all: Vec<_> = [32, 128].into_iter().flat_map(|npt| SCALES.map(|(round, layout)| (npt, round, layout))).collect();
    for kind in KINDS {
        let source = |shape, place| Source::random(&ctx.device, kind, shape, place, true);
        let random = |t, n: i32| Rows::gathered(&ctx.device, Rng::named("rows").ints_i32(t, -1, n));
        // Repeated and missing rows, an odd number of them; rows apart; single elements; rows that stay where they are.
        check(ctx, &source((53, 136), (136, 0))?, &random(165, 53)?, &all, (0, 0), "random")?;
        check(ctx, &source((40, 264), (272, 16))?, &random(37, 40)?, &all, (16, 5), "random")?;
        check(ctx, &source((21, 67), (70, 3))?, &random(33, 21)?, &all, (3, 1), "random")?;
        check(ctx, &source((40, 72), (72, 0))?, &Rows::all(40), &all, (0, 0), "all")?;
        // Padding alone, also when there is no token at all; no rows.
        let padding = |t| Rows::gathered(&ctx.device, vec![-1; t]);
        check(ctx, &source((5, 72), (72, 0))?, &padding(48)?, &PUBLISHED, (0, 0), "padding")?;
        check(ctx, &source((0, 72), (72, 0))?, &padding(16)?, &PUBLISHED, (0, 0), "padding")?;
        check(ctx, &source((5, 72), (72, 0))?, &padding(0)?, &PUBLISHED, (0, 0), "none")?;
        check(ctx, &source((0, 72), (72, 0))?, &Rows::all(0), &PUBLISHED, (0, 0), "none")?;
    }
    for case in moe_cases(Depth::Small) {
        let (tokens, pos) = routed(&case, 16);
        let rows = Rows::gathered(&ctx.device, pos)?;
        for kind in &KINDS[..2] {
            check(
                ctx,
                &Source::random(&ctx.device, *kind, (tokens, 128), (128, 0), false)?,
                &rows,
                &PUBLISHED,
                (0, 0),
                &case.name(),
            )?;
        }
    }
    Ok(())
}

/// The grid of the specification; of the routings the ones with top-k 6 alone where rows are long.
fn full(ctx: &Ctx) -> Result<(), String> {
    let mut routings = Vec::new();
    for case in moe_bench_cases() {
        let (_, pos) = routed(&case, 128);
        routings.push((case, Rows::gathered(&ctx.device, pos)?));
    }
    let longest = routings.iter().map(|(_, rows)| rows.len).max().unwrap_or(0);
    for h in [2048, 2560, 3072, 4096, 6144, 7168] {
        for kind in &KINDS[..2] {
            check(
                ctx,
                &Source::random(&ctx.device, *kind, (4096, h), (h, 0), false)?,
                &Rows::all(4096),
                &PUBLISHED,
                (0, 0),
                "all",
            )?;
            // As many rows of input as of output, like the published test, which gathers from the expanded tensor.
            let source = Source::random(&ctx.device, *kind, (longest, h), (h, 0), false)?;
            for (case, rows) in routings.iter().filter(|(case, _)| h < 4096 || case.num_topk == 6) {
                check(ctx, &source, rows, &PUBLISHED, (0, 0), &case.name())?;
            }
        }
    }
    for kind in &KINDS[2..] {
        let source = Source::random(&ctx.device, *kind, (4001, 2048), (2048, 0), true)?;
        let rows = Rows::gathered(&ctx.device, Rng::named("rows").ints_i32(8003, -1, 4001))?;
        check(
            ctx,
            &source,
            &rows,
            &[(32, true, SfLayout::PerChannelPacked), (128, false, SfLayout::RowMajor)],
            (0, 0),
            "random",
        )?;
    }
    Ok(())
}

/// Indices that are out of range count as padding. The checked emulator refuses them, see `stray_indices_are_reported`.
fn check_stray_indices(ctx: &Ctx) -> Result<(), String> {
    for kind in &KINDS[..3] {
        let source = Source::random(&ctx.device, *kind, (20, 136), (136, 0), false)?;
        let rows = Rows::gathered(&ctx.device, vec![3, 19, 20, i32::MAX, i32::MIN, -2, 0])?;
        check(ctx, &source, &rows, &PUBLISHED, (0, 0), "stray")?;
    }
    Ok(())
}

/// A few cases on the emulator too: the same bytes.
fn check_both_backends(ctx: &Ctx) -> Result<(), String> {
    let emulator = Device::emulator();
    for kind in KINDS {
        for (npt, round, layout) in [(32, false, SfLayout::RowMajor), (128, true, SfLayout::PerChannelPacked)] {
            let name = format!("kind=both backends,input={},npt={npt},h=264,t=133", kind.name());
            if !ctx.case(&name) {
                continue;
            }
            let mut results = Vec::new();
            for device in [&ctx.device, &emulator] {
                let source = Source::random(device, kind, (60, 264), (264, 0), true)?;
                let rows = Rows::gathered(device, Rng::named("rows").ints_i32(133, -1, 60))?;
                let mut out = outputs(device, 264, &rows, npt, layout, (0, 0))?;
                cast(&device.stream().map_err(text)?, &source, &rows, npt, round, &mut out).map_err(text)?;
                results.push((out.data.to_vec().map_err(text)?, out.sf.to_vec().map_err(text)?));
            }
            ensure(results[0] == results[1], || format!("the backends differ; {name}"))?;
        }
    }
    Ok(())
}

/// Recorded in a graph and replayed.
fn check_graph(ctx: &Ctx) -> Result<(), String> {
    let name = "kind=graph,h=576,t=144";
    if !ctx.case(name) {
        return Ok(());
    }
    let stream = ctx.device.stream().map_err(text)?;
    let source = Source::random(&ctx.device, Kind::Bf16, (133, 576), (576, 0), false)?;
    let rows = Rows::gathered(&ctx.device, Rng::named("rows").ints_i32(144, -1, 133))?;
    let expected = expected(&source, &rows, 128, true);
    let mut out = outputs(&ctx.device, 576, &rows, 128, SfLayout::RowMajor, (0, 0))?;
    let graph = stream.capture(|s| cast(s, &source, &rows, 128, true, &mut out)).map_err(text)?;
    for replay in 0..2 {
        out.clear()?;
        graph.launch(&stream).map_err(text)?;
        stream.synchronize().map_err(text)?;
        out.check(&format!("{name},replay={replay}"), &expected.data, &expected.sf_words(576, out.layout))?;
    }
    Ok(())
}

/// More than 2^31 elements of output: one token over and over.
fn check_large(ctx: &Ctx) -> Result<(), String> {
    let (t, h) = (300_001u64, 7168u64);
    let name = "kind=large,h=7168,t=300001";
    if !ctx.case(name) {
        return Ok(());
    }
    let source = Source::random(&ctx.device, Kind::F32, (1, h), (h, 0), false)?;
    let expected = expected(&source, &Rows::all(1), 128, true);
    let rows = Rows::gathered(&ctx.device, vec![0; t as usize])?;
    let mut out = outputs(&ctx.device, h, &rows, 128, SfLayout::RowMajor, (0, 0))?;
    cast(&ctx.device.stream().map_err(text)?, &source, &rows, 128, true, &mut out).map_err(text)?;
    let data = out.data.to_vec().map_err(text)?;
    let bad = data[..(t * h) as usize].chunks_exact(h as usize).position(|row| row != expected.data);
    ensure(bad.is_none(), || format!("data: row {bad:?} differs; {name}"))
}

// The benchmark.

/// What 1.0.0 computed.
fn check_golden(ctx: &Ctx, golden: &Golden, case: &Case) -> Result<(), String> {
    let name = case.name();
    let rows = Rows::gathered(&ctx.device, golden.tensor(case, "in/pos_to_token")?.to_vec::<i32>()?)?;
    let source = Source::recorded(&ctx.device, golden, case)?;
    let mut out = outputs(&ctx.device, source.h, &rows, 128, SfLayout::RowMajor, (0, 0))?;
    let stream = ctx.device.stream().map_err(text)?;
    cast(&stream, &source, &rows, 128, case.param("round_sf")?, &mut out).map_err(text)?;
    stream.synchronize().map_err(text)?;
    out.check(&name, golden.tensor(case, "out/0")?.bytes, &golden.tensor(case, "out/1")?.to_vec::<u32>()?)
}

/// `t` rows of input; gathered by a routing, or all of them.
fn row(case: String, kind: Kind, h: u64, routing: Option<MoeCase>) -> Row {
    let pos = routing.map(|case| routed(&case, 128).1);
    let t = pos.as_ref().map_or(4096, |pos| pos.len() as u64);
    let indices = pos.as_ref().map_or(0, |pos| 4 * pos.len() as u64);
    let bytes = kind.bytes(t, h) + indices + t * h + 4 * t.div_ceil(128) * h;
    let build = move |device: &Device, _: &Stream| -> Result<Launch, String> {
        let source = Source::bench(device, kind, (t, h))?;
        let rows = match &pos {
            None => Rows::all(t),
            Some(pos) => Rows::gathered(device, pos.clone())?,
        };
        let mut to = outputs(device, h, &rows, 128, SfLayout::RowMajor, (0, 0))?;
        Ok(Box::new(move |stream| cast(stream, &source, &rows, 128, false, &mut to)))
    };
    Row { op: "per_channel_cast_fused", case, bytes, build: Box::new(build) }
}

/// The cases of 1.0.0's own benchmark: as many rows of input as of output, as there.
pub fn bench() -> Vec<Row> {
    let mut rows = Vec::new();
    let inputs = [("bf16", Kind::Bf16), ("e4m3,1x128", Kind::Pair(SfLayout::RowMajor, 128))];
    for h in [7168, 2048] {
        for (input, kind) in inputs {
            rows.push(row(format!("h={h},input={input},npt=128,round=False,t=4096"), kind, h, None));
        }
    }
    let routings: Vec<_> = moe_bench_cases().into_iter().filter(|case| case.num_topk == 6).collect();
    for case in &routings {
        for (input, kind) in inputs {
            let MoeCase { num_send_tokens: send, num_topk: k, num_experts: e, num_ranks: ep } = case;
            let name = format!("e={e},ep={ep},h=7168,input={input},k={k},npt=128,round=False,send={send}");
            rows.push(row(name, kind, 7168, Some(*case)));
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::common_channels::FILL;
    use ferrotile::quant::{Input, SfMut};
    use ferrotile::{DType, Error, Result};
    use proptest::prelude::{ProptestConfig, proptest};

    #[test]
    fn suite() {
        SUITE.test();
    }

    #[test]
    fn stray_indices_are_reported() {
        for (pos, fault) in [(vec![0, 4, 1], Some("index 4 in memory, allowed: below 4")), (vec![-1, -7, i32::MIN], None)] {
            for (device, checked) in [(Device::emulator(), false), (Device::emulator().checked(), true)] {
                let source = Source::random(&device, Kind::F32, (4, 8), (8, 0), false).unwrap();
                let rows = Rows::gathered(&device, pos.clone()).unwrap();
                let mut out = outputs(&device, 8, &rows, 128, SfLayout::RowMajor, (0, 0)).unwrap();
                let stream = device.stream().unwrap();
                let result = cast(&stream, &source, &rows, 128, true, &mut out).and_then(|_| stream.synchronize());
                match fault.filter(|_| checked) {
                    Some(fault) => assert!(result.unwrap_err().to_string().ends_with(fault)),
                    None => {
                        result.unwrap();
                        let expected = expected(&source, &rows, 128, true);
                        out.check("stray", &expected.data, &expected.sf_words(8, SfLayout::RowMajor)).unwrap();
                    }
                }
            }
        }
    }

    #[test]
    fn bad_arguments_are_named() {
        struct Call {
            pos: (Vec<u64>, Vec<u64>, DType),
            npt: u32,
            out: Vec<u64>,
            sf: (Vec<u64>, SfLayout),
        }
        let call =
            || Call { pos: (vec![33], vec![1], DType::I32), npt: 32, out: vec![33, 64], sf: (vec![2, 64], SfLayout::RowMajor) };
        let device = Device::emulator();
        let x = device.zeros::<f32>(40 * 64).unwrap();
        let pos_to_token = device.zeros::<i32>(128).unwrap();
        let (mut out, mut sf) = (device.zeros::<u8>(64 * 64).unwrap(), device.zeros::<u32>(256).unwrap());
        out.fill_bytes(FILL).unwrap();
        sf.fill_bytes(FILL).unwrap();
        let mut run = |call: Call| -> Result<()> {
            let pos = pos_to_token.strided(&call.pos.0, &call.pos.1, 0)?.reinterpret(call.pos.2)?;
            let result = {
                let tensor = sf.tensor_mut(&call.sf.0)?.reinterpret(call.sf.1.dtype())?;
                let args = Args {
                    x: Input::Plain(x.tensor(&[40, 64])?),
                    pos_to_token: Some(pos),
                    npt: call.npt,
                    round_sf: true,
                    out: out.tensor_mut(&call.out)?.reinterpret(DType::E4m3)?,
                    sf: SfMut { tensor, layout: call.sf.1 },
                };
                op::per_channel_cast_fused(&device.stream()?, args)
            };
            let untouched = out.to_vec()?.iter().all(|b| *b == FILL) && sf.to_vec()?.iter().all(|v| v.to_ne_bytes() == [FILL; 4]);
            assert_eq!(untouched, result.is_err());
            result
        };
        let mut refuses = |call: Call, start: &str| {
            let text = run(call).expect_err(start).to_string();
            let start = format!("per_channel_cast_fused: {start}");
            assert!(text.starts_with(&start), "{text}\nexpected {start}");
        };
        refuses(
            Call { pos: (vec![33, 1], vec![1, 1], DType::I32), ..call() },
            "pos_to_token has shape [33, 1], expected 1 dimension",
        );
        refuses(Call { pos: (vec![33], vec![1], DType::U32), ..call() }, "pos_to_token is u32, allowed: i32");
        refuses(Call { pos: (vec![33], vec![2], DType::I32), ..call() }, "layout of pos_to_token is");
        refuses(Call { npt: 1, ..call() }, "npt is 1, allowed: 32, 128");
        refuses(Call { out: vec![40, 64], ..call() }, "out has shape [40, 64], expected [33, 64]");
        refuses(Call { sf: (vec![1, 64], SfLayout::RowMajor), ..call() }, "sf has shape [1, 64], expected [2, 64]");
        refuses(
            Call { sf: (vec![2, 64], SfLayout::ColMajor), ..call() },
            "layout of sf is col-major, expected row-major, per-channel",
        );
        run(call()).unwrap();
    }

    #[test]
    fn overlap_and_other_devices_are_refused() {
        let device = Device::emulator();
        let stream = device.stream().unwrap();
        let memory = device.zeros::<i32>(4096).unwrap();
        let x = device.zeros::<f32>(4 * 64).unwrap();
        let other = device.checked().zeros::<i32>(32).unwrap();
        let mut own = device.zeros::<f32>(64).unwrap();
        let mut run = |pos_to_token, offset: u64| {
            // SAFETY: nothing is launched on these overlapping tensors; that is what is checked.
            let out = unsafe {
                ferrotile::TensorMut::from_raw(&device, memory.as_ptr() + offset, DType::E4m3, &[32, 64], &[64, 1]).unwrap()
            };
            let sf = SfMut { tensor: own.tensor_mut(&[1, 64]).unwrap(), layout: SfLayout::RowMajor };
            let x = Input::Plain(x.tensor(&[4, 64]).unwrap());
            op::per_channel_cast_fused(&stream, Args { x, pos_to_token: Some(pos_to_token), npt: 32, round_sf: false, out, sf })
        };
        let pos = memory.tensor(&[32]).unwrap();
        assert!(matches!(run(pos, 112), Err(Error::Overlap { a: "pos_to_token", b: "out", .. })));
        assert!(matches!(run(other.tensor(&[32]).unwrap(), 128), Err(Error::DeviceMismatch { arg: "pos_to_token", .. })));
        assert!(run(pos, 128).is_ok());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        /// Any rows, shape, distance of rows and alignment.
        #[test]
        fn any_input(
            t in 0usize..300, n in 0u64..60, h in 1u64..300, eights: bool, gap in 0u64..9, offset in 0u64..9, out_offset in 0u64..9,
            kind in 0usize..6, npt_32: bool, scales in 0usize..3, padded in 1i32..9, seed: u64,
        ) {
            let device = Device::emulator();
            let stream = device.stream().unwrap();
            let (h, gap, offset) = if eights { (h.next_multiple_of(8), gap * 8, offset * 8) } else { (h, gap, offset) };
            let (kind, npt, (round, layout)) = (KINDS[kind], if npt_32 { 32 } else { 128 }, SCALES[scales]);
            let source = Source::random(&device, kind, (n, h), (h + gap, offset), true).unwrap();
            let rows = Rows::gathered(&device, Rng::new(seed).ints_i32(t, -padded, n.max(1) as i32)).unwrap();
            let expected = expected(&source, &rows, npt, round);
            let mut out = outputs(&device, h, &rows, npt, layout, (out_offset, 0)).unwrap();
            cast(&stream, &source, &rows, npt, round, &mut out).unwrap();
            out.check("any", &expected.data, &expected.sf_words(h as usize, layout)).unwrap();
        }
    }
}
