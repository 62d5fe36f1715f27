//! Cases, checks and benchmark rows of `per_channel_cast_and_transpose`; the reference is in
//! `common_channels`.

use super::common_channels::{Kind, Outputs, Quantised, SCALES, Source, reference};
use crate::support::bench::{Launch, Row};
use crate::support::cases::{Depth, HIDDENS};
use crate::support::golden::{self, Case, Golden};
use crate::support::suite::{Ctx, Report, Suite, ensure, text};
use ferrotile::quant::per_channel_cast_and_transpose::{self as op, Args};
use ferrotile::quant::{Input, SfLayout, sf_shape};
use ferrotile::{Device, Stream};
use std::cell::OnceCell;

/// What the `check` binary runs.
pub const SUITE: Suite = Suite { op: "per_channel_cast_and_transpose", run };

/// The cast of an input, not yet transposed.
fn expected(source: &Source, npt: u32, round: bool) -> Quantised {
    reference(&source.values, (source.t as usize, source.h as usize), npt, round, Some)
}

fn outputs(device: &Device, source: &Source, npt: u32, layout: SfLayout, (offset, gap): (u64, u64)) -> Result<Outputs, String> {
    let shape = Outputs::sf_shape((source.t, source.h), npt, layout, gap);
    Outputs::new(device, [source.h, source.t], offset, shape, layout)
}

fn cast(stream: &Stream, source: &Source, npt: u32, round_sf: bool, to: &mut Outputs) -> ferrotile::Result<()> {
    let (out, sf) = to.tensors()?;
    let (Input::Plain(x) | Input::Quantised { data: x, .. }) = source.input()?;
    op::per_channel_cast_and_transpose(stream, Args { x, npt, round_sf, out, sf })
}

/// All options on one input; `place` is bytes before the data and elements between rows of scales.
fn check_source(ctx: &Ctx, source: &Source, place: (u64, u64)) -> Result<(), String> {
    let stream = ctx.device.stream().map_err(text)?;
    let h = source.h as usize;
    for npt in [32, 128] {
        let plain = OnceCell::new();
        let rounded = OnceCell::new();
        for (round, layout) in SCALES {
            let name = format!(
                "h={h},input={},npt={npt},offset={},place={place:?},round_sf={round},sf={layout},stride={},t={}",
                source.kind.name(),
                source.offset,
                source.stride,
                source.t
            );
            if !ctx.case(&name) {
                continue;
            }
            let (expected, data) = if round { &rounded } else { &plain }.get_or_init(|| {
                let expected = expected(source, npt, round);
                let data = expected.transposed(h);
                (expected, data)
            });
            let words = expected.sf_words(h, layout);
            let mut out = outputs(&ctx.device, source, npt, layout, place)?;
            cast(&stream, source, npt, round, &mut out).map_err(text)?;
            out.check(&name, data, &words)?;
            if npt == 128 && !round {
                // Once more, over its own results.
                cast(&stream, source, npt, round, &mut out).map_err(text)?;
                out.check(&name, data, &words)?;
            }
        }
    }
    Ok(())
}

fn run(ctx: &Ctx) -> Result<Report, String> {
    for kind in [Kind::Bf16, Kind::F32] {
        let source = |shape, place, hard| Source::random(&ctx.device, kind, shape, place, hard);
        // Ragged in both directions; rows apart; single elements because of the sizes, of the input's and of the output's alignment.
        check_source(ctx, &source((272, 152), (152, 0), true)?, (0, 0))?;
        check_source(ctx, &source((48, 264), (272, 16), true)?, (16, 5))?;
        check_source(ctx, &source((165, 67), (70, 3), true)?, (3, 1))?;
        check_source(ctx, &source((16, 136), (136, 0), true)?, (1, 0))?;
        check_source(ctx, &source((3, 136), (136, 0), true)?, (0, 0))?;
        check_source(ctx, &source((1, 16), (16, 0), false)?, (0, 0))?;
        check_source(ctx, &source((0, 384), (384, 0), false)?, (0, 0))?;
        check_source(ctx, &source((5, 0), (0, 0), false)?, (0, 0))?;
        // An infinite value: its block means nothing, and the same everywhere.
        let (t, h) = (48u64, 16u64);
        let values = (0..t * h).map(|i| if i == 3 || i == 40 * h + 5 { f32::INFINITY } else { (i % 7) as f32 }).collect();
        check_source(ctx, &Source::plain(&ctx.device, kind, (t, h), (h, 0), values)?, (0, 0))?;
        if ctx.depth == Depth::Full {
            for h in HIDDENS {
                for t in [4096, 8064] {
                    check_source(ctx, &source((t, h), (h, 0), false)?, (0, 0))?;
                }
            }
            check_source(ctx, &source((4016, 1160), (1168, 8), true)?, (16, 3))?;
            check_source(ctx, &source((4001, 577), (577, 1), true)?, (5, 0))?;
        }
    }
    if !ctx.device.is_emulator() {
        check_graph(ctx)?;
        if ctx.depth == Depth::Full {
            check_both_backends(ctx)?;
            check_large(ctx)?;
        }
    }
    let notes = golden::check_cases(ctx, &[SUITE.op], |golden, case| check_golden(ctx, golden, case))?;
    Ok(Report { notes, ..ctx.report() })
}

/// A few cases on the emulator too: the same bytes.
fn check_both_backends(ctx: &Ctx) -> Result<(), String> {
    let emulator = Device::emulator();
    for (kind, t, npt, round, layout) in
        [(Kind::Bf16, 144, 32, false, SfLayout::RowMajor), (Kind::F32, 133, 128, true, SfLayout::PerChannelPacked)]
    {
        let name = format!("kind=both backends,input={},npt={npt},h=264,t={t}", kind.name());
        if !ctx.case(&name) {
            continue;
        }
        let mut results = Vec::new();
        for device in [&ctx.device, &emulator] {
            let source = Source::random(device, kind, (t, 264), (264, 0), true)?;
            let mut out = outputs(device, &source, npt, layout, (0, 0))?;
            cast(&device.stream().map_err(text)?, &source, npt, round, &mut out).map_err(text)?;
            results.push((out.data.to_vec().map_err(text)?, out.sf.to_vec().map_err(text)?));
        }
        ensure(results[0] == results[1], || format!("the backends differ; {name}"))?;
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
    let source = Source::random(&ctx.device, Kind::Bf16, (144, 576), (576, 0), false)?;
    let expected = expected(&source, 128, true);
    let mut out = outputs(&ctx.device, &source, 128, SfLayout::RowMajor, (0, 0))?;
    let graph = stream.capture(|s| cast(s, &source, 128, true, &mut out)).map_err(text)?;
    for replay in 0..2 {
        out.clear()?;
        graph.launch(&stream).map_err(text)?;
        stream.synchronize().map_err(text)?;
        out.check(&format!("{name},replay={replay}"), &expected.transposed(576), &expected.sf_words(576, out.layout))?;
    }
    Ok(())
}

/// More than 2^31 elements. All rows are one row in memory (stride 0), so every row of the output is one value.
fn check_large(ctx: &Ctx) -> Result<(), String> {
    let (t, h) = (300_000u64, 7168u64);
    let name = "kind=large,h=7168,t=300000";
    if !ctx.case(name) {
        return Ok(());
    }
    let row = Source::random(&ctx.device, Kind::F32, (1, h), (h, 0), false)?;
    let expected = expected(&row, 128, true);
    let source = row.repeated(t);
    let mut out = outputs(&ctx.device, &source, 128, SfLayout::RowMajor, (0, 0))?;
    cast(&ctx.device.stream().map_err(text)?, &source, 128, true, &mut out).map_err(text)?;
    let data = out.data.to_vec().map_err(text)?;
    let rows = data[..(t * h) as usize].chunks_exact(t as usize);
    let bad = rows.zip(&expected.data).position(|(row, code)| row.iter().any(|q| q != code));
    ensure(bad.is_none(), || format!("data: row {bad:?} differs; {name}"))?;
    let sf = out.sf.to_vec().map_err(text)?;
    let words = expected.sf_words(h as usize, SfLayout::RowMajor);
    let bad = sf[..(t.div_ceil(128) * h) as usize].chunks_exact(h as usize).position(|row| row != words);
    ensure(bad.is_none(), || format!("sf: row {bad:?} differs; {name}"))
}

// The benchmark.

/// What 1.0.0 computed.
fn check_golden(ctx: &Ctx, golden: &Golden, case: &Case) -> Result<(), String> {
    let name = case.name();
    let (npt, round): (u32, bool) = (case.param("num_per_tokens")?, case.param("round_sf")?);
    let source = Source::recorded(&ctx.device, golden, case)?;
    let mut out = outputs(&ctx.device, &source, npt, SfLayout::RowMajor, (0, 0))?;
    let stream = ctx.device.stream().map_err(text)?;
    cast(&stream, &source, npt, round, &mut out).map_err(text)?;
    stream.synchronize().map_err(text)?;
    let sf = golden.tensor(case, "out/1")?;
    sf.check_place(&name, &sf_shape(source.t, source.h, (npt, 1), SfLayout::RowMajor))?;
    out.check(&name, golden.tensor(case, "out/0")?.bytes, &sf.to_vec::<u32>()?)
}

fn row(case: String, kind: Kind, (t, h): (u64, u64), npt: u32, round: bool) -> Row {
    let bytes = kind.bytes(t, h) + t * h + 4 * t.div_ceil(npt.into()) * h;
    let build = move |device: &Device, _: &Stream| -> Result<Launch, String> {
        let source = Source::bench(device, kind, (t, h))?;
        let mut to = outputs(device, &source, npt, SfLayout::RowMajor, (0, 0))?;
        Ok(Box::new(move |stream| cast(stream, &source, npt, round, &mut to)))
    };
    Row { op: "per_channel_cast_and_transpose", case, bytes, build: Box::new(build) }
}

/// The peer's case, those of its own benchmark, f32, and small inputs.
pub fn bench() -> Vec<Row> {
    let large = (8064, 7168);
    let mut rows = vec![row("h=7168,npt=128,t=8064".to_owned(), Kind::Bf16, large, 128, true)];
    for (npt, round, (t, h)) in [(32, true, large), (128, false, large), (32, false, large), (32, true, (4096, 2048))] {
        let rounding = if round { "" } else { "round=False," };
        rows.push(row(format!("h={h},npt={npt},{rounding}t={t}"), Kind::Bf16, (t, h), npt, round));
    }
    rows.push(row("h=7168,input=f32,npt=128,t=8064".to_owned(), Kind::F32, large, 128, true));
    for t in [1, 16, 128] {
        rows.push(row(format!("h=7168,npt=128,t={t}"), Kind::Bf16, (t, 7168), 128, true));
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::common_channels::FILL;
    use crate::support::rng::Rng;
    use ferrotile::quant::SfMut;
    use ferrotile::{Buffer, DType, Error, Result};
    use half::bf16;
    use proptest::prelude::{ProptestConfig, proptest};

    #[test]
    fn suite() {
        SUITE.test();
    }

    #[test]
    fn bad_arguments_are_named() {
        struct Call {
            x: (Vec<u64>, Vec<u64>, DType),
            npt: u32,
            round_sf: bool,
            out: (Vec<u64>, Vec<u64>, DType),
            sf: (Vec<u64>, SfLayout),
        }
        let call = || Call {
            x: (vec![40, 64], vec![64, 1], DType::Bf16),
            npt: 32,
            round_sf: true,
            out: (vec![64, 40], vec![40, 1], DType::E4m3),
            sf: (vec![2, 64], SfLayout::RowMajor),
        };
        let device = Device::emulator();
        let x: Buffer<bf16> = device.zeros(64 * 256).unwrap();
        let (mut out, mut sf) = (device.zeros::<u8>(64 * 256).unwrap(), device.zeros::<u32>(256).unwrap());
        out.fill_bytes(FILL).unwrap();
        sf.fill_bytes(FILL).unwrap();
        let mut run = |call: Call| -> Result<()> {
            let x = x.strided(&call.x.0, &call.x.1, 0)?.reinterpret(call.x.2)?;
            let tensor = sf.tensor_mut(&call.sf.0)?.reinterpret(call.sf.1.dtype())?;
            let to = SfMut { tensor, layout: call.sf.1 };
            let result = {
                let out = out.strided_mut(&call.out.0, &call.out.1, 0)?.reinterpret(call.out.2)?;
                let args = Args { x, npt: call.npt, round_sf: call.round_sf, out, sf: to };
                op::per_channel_cast_and_transpose(&device.stream()?, args)
            };
            let untouched = out.to_vec()?.iter().all(|b| *b == FILL) && sf.to_vec()?.iter().all(|v| v.to_ne_bytes() == [FILL; 4]);
            assert_eq!(untouched, result.is_err());
            result
        };
        let mut refuses = |call: Call, start: &str| {
            let text = run(call).expect_err(start).to_string();
            let start = format!("per_channel_cast_and_transpose: {start}");
            assert!(text.starts_with(&start), "{text}\nexpected {start}");
        };
        refuses(Call { x: (vec![2560], vec![1], DType::Bf16), ..call() }, "x has shape [2560], expected 2 dimensions");
        refuses(Call { x: (vec![40, 64], vec![64, 1], DType::F16), ..call() }, "x is f16, allowed: bf16, f32");
        refuses(Call { x: (vec![40, 64], vec![1, 40], DType::Bf16), ..call() }, "layout of x is");
        refuses(Call { npt: 16, ..call() }, "npt is 16, allowed: 32, 128");
        refuses(Call { out: (vec![40, 64], vec![64, 1], DType::E4m3), ..call() }, "out has shape [40, 64], expected [64, 40]");
        refuses(Call { out: (vec![64, 40], vec![48, 1], DType::E4m3), ..call() }, "layout of out is");
        refuses(Call { out: (vec![64, 40], vec![40, 1], DType::U8), ..call() }, "out is u8, allowed: e4m3");
        refuses(Call { sf: (vec![1, 64], SfLayout::RowMajor), ..call() }, "sf has shape [1, 64], expected [2, 64]");
        refuses(
            Call { sf: (vec![2, 64], SfLayout::ColMajor), ..call() },
            "layout of sf is col-major, expected row-major, per-channel",
        );
        refuses(
            Call { sf: (vec![1, 64], SfLayout::PerChannelPacked), round_sf: false, ..call() },
            "round_sf is false, allowed: true with per-channel packed scales",
        );
        run(call()).unwrap();
    }

    #[test]
    fn overlap_and_other_devices_are_refused() {
        let device = Device::emulator();
        let stream = device.stream().unwrap();
        let memory = device.zeros::<f32>(4096).unwrap();
        let (other, mut own) = (device.checked().zeros::<f32>(32 * 64).unwrap(), device.zeros::<f32>(64).unwrap());
        // SAFETY: nothing is launched on these overlapping tensors; that is what is checked.
        let tensor = |offset: u64, dtype, shape: &[u64]| unsafe {
            let strides = [shape[1], 1];
            ferrotile::TensorMut::from_raw(&device, memory.as_ptr() + offset, dtype, shape, &strides).unwrap()
        };
        let mut run = |x, out, sf_offset: Option<u64>| {
            let sf = match sf_offset {
                Some(offset) => tensor(offset, DType::F32, &[1, 64]),
                None => own.tensor_mut(&[1, 64]).unwrap(),
            };
            let sf = SfMut { tensor: sf, layout: SfLayout::RowMajor };
            op::per_channel_cast_and_transpose(&stream, Args { x, npt: 32, round_sf: false, out, sf })
        };
        let x = memory.tensor(&[32, 64]).unwrap();
        let apart = 4 * 32 * 64;
        let out = |offset| tensor(offset, DType::E4m3, &[64, 32]);
        assert!(matches!(run(x, out(apart - 16), None), Err(Error::Overlap { a: "x", b: "out", .. })));
        assert!(matches!(run(x, out(apart), Some(16)), Err(Error::Overlap { a: "x", b: "sf", .. })));
        assert!(matches!(run(x, out(apart), Some(apart + 2044)), Err(Error::Overlap { a: "out", b: "sf", .. })));
        assert!(matches!(run(other.tensor(&[32, 64]).unwrap(), out(apart), None), Err(Error::DeviceMismatch { arg: "x", .. })));
        assert!(run(x, out(apart), None).is_ok());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        /// Any shape, distance of rows, alignment and range of values.
        #[test]
        fn any_input(
            t in 0u64..300, h in 1u64..300, whole: bool, gap in 0u64..9, offset in 0u64..9, out_offset in 0u64..3, sf_gap in 0u64..3,
            f32_input: bool, npt_32: bool, scales in 0usize..3, exponent in -130i32..120, seed: u64,
        ) {
            let device = Device::emulator();
            let stream = device.stream().unwrap();
            let (t, h, gap, offset, out_offset) = match whole {
                true => (t.next_multiple_of(16), h.next_multiple_of(8), gap * 8, offset * 8, out_offset * 16),
                false => (t, h, gap, offset, out_offset),
            };
            let kind = if f32_input { Kind::F32 } else { Kind::Bf16 };
            let (npt, (round, layout)) = (if npt_32 { 32 } else { 128 }, SCALES[scales]);
            let values = Rng::new(seed).fill((t * h) as usize, |rng, i| {
                let v = (rng.normal(i) as f64 * 2f64.powi(exponent)) as f32;
                if kind == Kind::Bf16 { bf16::from_f32(v).to_f32() } else { v }
            });
            let source = Source::plain(&device, kind, (t, h), (h + gap, offset), values).unwrap();
            let expected = expected(&source, npt, round);
            let mut out = outputs(&device, &source, npt, layout, (out_offset, sf_gap)).unwrap();
            cast(&stream, &source, npt, round, &mut out).unwrap();
            out.check("any", &expected.transposed(h as usize), &expected.sf_words(h as usize, layout)).unwrap();
        }
    }
}
