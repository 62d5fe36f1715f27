//! Cases, checks and benchmark rows of `per_channel_cast`; the reference is in `common_channels`.

use super::common_channels::{Kind, Outputs, Quantised, SCALES, Source, reference};
use crate::support::bench::{Launch, Row};
use crate::support::cases::{Depth, HIDDENS};
use crate::support::compare;
use crate::support::golden::{self, Case, Golden};
use crate::support::suite::{Ctx, Report, Suite, ensure, text};
use ferrotile::quant::per_channel_cast::{self as op, Args};
use ferrotile::quant::{SfLayout, sf_shape};
use ferrotile::{Device, Stream};
use std::cell::OnceCell;

/// What the `check` binary runs.
pub const SUITE: Suite = Suite { op: "per_channel_cast", run };

/// The cast of an input.
fn expected(source: &Source, npt: u32, round: bool) -> Quantised {
    reference(&source.values, (source.t as usize, source.h as usize), npt, round, Some)
}

fn outputs(device: &Device, source: &Source, npt: u32, layout: SfLayout, (offset, gap): (u64, u64)) -> Result<Outputs, String> {
    let shape = Outputs::sf_shape((source.t, source.h), npt, layout, gap);
    Outputs::new(device, [source.t, source.h], offset, shape, layout)
}

fn cast(stream: &Stream, source: &Source, npt: u32, round_sf: bool, to: &mut Outputs) -> ferrotile::Result<()> {
    let (out, sf) = to.tensors()?;
    op::per_channel_cast(stream, Args { x: source.input()?, npt, round_sf, out, sf })
}

/// All options on one input; `place` is bytes before the data and elements between rows of scales.
fn check_source(ctx: &Ctx, source: &Source, place: (u64, u64), bias: bool) -> Result<(), String> {
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
            let expected = if round { &rounded } else { &plain }.get_or_init(|| expected(source, npt, round));
            let words = expected.sf_words(h, layout);
            let mut out = outputs(&ctx.device, source, npt, layout, place)?;
            cast(&stream, source, npt, round, &mut out).map_err(text)?;
            out.check(&name, &expected.data, &words)?;
            if npt == 128 && !round {
                // Once more, over its own results.
                cast(&stream, source, npt, round, &mut out).map_err(text)?;
                out.check(&name, &expected.data, &words)?;
                if bias {
                    compare::check_bias("data", &name, &expected.values(h, npt), &source.values)?;
                }
            }
        }
    }
    Ok(())
}

/// Every type of input.
const KINDS: [Kind; 6] = [
    Kind::Bf16,
    Kind::F32,
    Kind::Pair(SfLayout::RowMajor, 128),
    Kind::Pair(SfLayout::ColMajor, 32),
    Kind::Pair(SfLayout::RowMajorPacked, 32),
    Kind::Pair(SfLayout::ColMajorPacked, 128),
];

fn run(ctx: &Ctx) -> Result<Report, String> {
    small(ctx)?;
    if ctx.depth == Depth::Full {
        full(ctx)?;
        if !ctx.device.is_emulator() {
            check_both_backends(ctx)?;
            check_large(ctx)?;
        }
    }
    if !ctx.device.is_emulator() {
        check_graph(ctx)?;
    }
    let notes = golden::check_cases(ctx, &[SUITE.op], |golden, case| check_golden(ctx, golden, case))?;
    Ok(Report { notes, ..ctx.report() })
}

/// Awkward shapes and values.
fn small(ctx: &Ctx) -> Result<(), String> {
    for kind in KINDS {
        let source = |shape, place, hard| Source::random(&ctx.device, kind, shape, place, hard);
        // Ragged in both directions; rows apart; single elements because of the width, of the input's and of the output's alignment.
        check_source(ctx, &source((165, 152), (152, 0), true)?, (0, 0), false)?;
        check_source(ctx, &source((37, 264), (272, 16), true)?, (16, 5), false)?;
        check_source(ctx, &source((33, 67), (70, 3), true)?, (3, 1), false)?;
        check_source(ctx, &source((3, 136), (136, 0), true)?, (1, 0), false)?;
        check_source(ctx, &source((1, 16), (16, 0), false)?, (0, 0), false)?;
        check_source(ctx, &source((0, 384), (384, 0), false)?, (0, 0), false)?;
        check_source(ctx, &source((5, 0), (0, 0), false)?, (0, 0), false)?;
    }
    // More tiles of bf16 than an H100 has multiprocessors; whole ones and such that end early.
    check_source(ctx, &Source::random(&ctx.device, Kind::Bf16, (300, 5768), (5768, 0), true)?, (0, 3), false)?;
    check_infinity(ctx)
}

/// The grids of the specification and one with `T % 128 != 0`.
fn full(ctx: &Ctx) -> Result<(), String> {
    for h in HIDDENS {
        for t in [512, 4096, 8064] {
            for kind in [Kind::Bf16, Kind::F32] {
                check_source(ctx, &Source::random(&ctx.device, kind, (t, h), (h, 0), false)?, (0, 0), true)?;
            }
        }
    }
    for h in [128, 384, 768, 2048, 2560, 3072, 4096, 6144, 7168] {
        for t in [512, 8064] {
            for kind in &KINDS[2..] {
                check_source(ctx, &Source::random(&ctx.device, *kind, (t, h), (h, 0), false)?, (0, 0), false)?;
            }
        }
    }
    for kind in KINDS {
        check_source(ctx, &Source::random(&ctx.device, kind, (8001, 1160), (1168, 8), true)?, (8, 3), false)?;
        check_source(ctx, &Source::random(&ctx.device, kind, (4001, 577), (577, 1), true)?, (5, 0), false)?;
    }
    Ok(())
}

/// What an infinite value gives: nothing useful, but the same everywhere.
fn check_infinity(ctx: &Ctx) -> Result<(), String> {
    let (t, h) = (40u64, 16u64);
    let mut values = vec![1.5f32; (t * h) as usize];
    values[3] = f32::INFINITY;
    values[4] = f32::NEG_INFINITY;
    values[(33 * h + 5) as usize] = f32::INFINITY;
    values[5] = 0.0;
    for kind in [Kind::Bf16, Kind::F32] {
        check_source(ctx, &Source::plain(&ctx.device, kind, (t, h), (h, 0), values.clone())?, (0, 0), false)?;
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
                let source = Source::random(device, kind, (133, 264), (264, 0), true)?;
                let mut out = outputs(device, &source, npt, layout, (0, 0))?;
                cast(&device.stream().map_err(text)?, &source, npt, round, &mut out).map_err(text)?;
                results.push((out.data.to_vec().map_err(text)?, out.sf.to_vec().map_err(text)?));
            }
            ensure(results[0] == results[1], || format!("the backends differ; {name}"))?;
        }
    }
    Ok(())
}

/// Recorded in a graph and replayed.
fn check_graph(ctx: &Ctx) -> Result<(), String> {
    let name = "kind=graph,h=576,t=133";
    if !ctx.case(name) {
        return Ok(());
    }
    let stream = ctx.device.stream().map_err(text)?;
    let source = Source::random(&ctx.device, Kind::Bf16, (133, 576), (576, 0), false)?;
    let expected = expected(&source, 128, true);
    let mut out = outputs(&ctx.device, &source, 128, SfLayout::RowMajor, (0, 0))?;
    let graph = stream.capture(|s| cast(s, &source, 128, true, &mut out)).map_err(text)?;
    for replay in 0..2 {
        out.clear()?;
        graph.launch(&stream).map_err(text)?;
        stream.synchronize().map_err(text)?;
        out.check(&format!("{name},replay={replay}"), &expected.data, &expected.sf_words(576, out.layout))?;
    }
    Ok(())
}

/// More than 2^31 elements. All rows are one row in memory (stride 0), so every row of the output is the same.
fn check_large(ctx: &Ctx) -> Result<(), String> {
    let (t, h) = (300_001u64, 7168u64);
    let name = "kind=large,h=7168,t=300001";
    if !ctx.case(name) {
        return Ok(());
    }
    let row = Source::random(&ctx.device, Kind::F32, (1, h), (h, 0), false)?;
    let expected = expected(&row, 128, true);
    let source = row.repeated(t);
    let mut out = outputs(&ctx.device, &source, 128, SfLayout::RowMajor, (0, 0))?;
    cast(&ctx.device.stream().map_err(text)?, &source, 128, true, &mut out).map_err(text)?;
    let data = out.data.to_vec().map_err(text)?;
    let bad = data[..(t * h) as usize].chunks_exact(h as usize).position(|row| row != expected.data);
    ensure(bad.is_none(), || format!("data: row {bad:?} differs; {name}"))?;
    let sf = out.sf.to_vec().map_err(text)?;
    let words = expected.sf_words(h as usize, SfLayout::RowMajor);
    let bad = sf[..(t.div_ceil(128) * h) as usize].chunks_exact(h as usize).position(|row| row != words);
    ensure(bad.is_none(), || format!("sf: row {bad:?} differs; {name}"))
}

// The benchmark.

/// What the peers computed.
fn check_golden(ctx: &Ctx, golden: &Golden, case: &Case) -> Result<(), String> {
    let name = case.name();
    let (npt, round): (u32, bool) = (case.param("num_per_tokens")?, case.param("round_sf")?);
    let packed = case.param_or("use_packed_ue8m0", false)?;
    let layout = if packed { SfLayout::PerChannelPacked } else { SfLayout::RowMajor };
    let source = Source::recorded(&ctx.device, golden, case)?;
    let mut out = outputs(&ctx.device, &source, npt, layout, (0, 0))?;
    let stream = ctx.device.stream().map_err(text)?;
    cast(&stream, &source, npt, round, &mut out).map_err(text)?;
    stream.synchronize().map_err(text)?;
    let sf = golden.tensor(case, "out/1")?;
    sf.check_place(&name, &sf_shape(source.t, source.h, (npt, 1), layout))?;
    out.check(&name, golden.tensor(case, "out/0")?.bytes, &sf.to_vec::<u32>()?)
}

fn row(case: String, kind: Kind, (t, h): (u64, u64), npt: u32, (round, layout): (bool, SfLayout)) -> Row {
    let sf = Outputs::sf_shape((t, h), npt, layout, 0);
    let bytes = kind.bytes(t, h) + t * h + 4 * sf.shape[0] * sf.shape[1];
    let build = move |device: &Device, _: &Stream| -> Result<Launch, String> {
        let source = Source::bench(device, kind, (t, h))?;
        let mut to = outputs(device, &source, npt, layout, (0, 0))?;
        Ok(Box::new(move |stream| cast(stream, &source, npt, round, &mut to)))
    };
    Row { op: "per_channel_cast", case, bytes, build: Box::new(build) }
}

/// The peers' cases, the same of other inputs, and small ones. Without `input` it is bf16, without `sf` scales are f32 by rows.
pub fn bench() -> Vec<Row> {
    let large = (8064, 7168);
    let mut rows = Vec::new();
    for (t, h) in [large, (4096, 2048)] {
        let case = format!("h={h},npt=128,round=False,t={t}");
        rows.push(row(case, Kind::Bf16, (t, h), 128, (false, SfLayout::RowMajor)));
    }
    let inputs = [
        (Kind::Bf16, ""),
        (Kind::F32, "input=f32,"),
        (Kind::Pair(SfLayout::RowMajor, 128), "input=e4m3,1x128,"),
        (Kind::Pair(SfLayout::RowMajor, 32), "input=e4m3,1x32,"),
        (Kind::Pair(SfLayout::RowMajorPacked, 32), "in_sf=packed_row,input=e4m3,1x32,"),
    ];
    for (kind, input) in inputs {
        for npt in [128, 32] {
            for (layout, sf) in [(SfLayout::RowMajor, ""), (SfLayout::PerChannelPacked, "sf=packed,")] {
                rows.push(row(format!("h=7168,{input}npt={npt},{sf}t=8064"), kind, large, npt, (true, layout)));
            }
        }
    }
    for t in [1, 16, 128] {
        rows.push(row(format!("h=7168,npt=128,t={t}"), Kind::Bf16, (t, 7168), 128, (true, SfLayout::RowMajor)));
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::common_channels::FILL;
    use crate::support::rng::Rng;
    use ferrotile::quant::{Input, Sf, SfMut};
    use ferrotile::{Buffer, DType, E4m3, Error, Result, Ue8m0x4};
    use half::bf16;
    use proptest::prelude::{ProptestConfig, proptest};

    #[test]
    fn suite() {
        SUITE.test();
    }

    /// Buffers for calls that must be refused.
    struct Refused {
        device: Device,
        x: Buffer<bf16>,
        codes: Buffer<E4m3>,
        x_sf: Buffer<f32>,
        out: Buffer<u8>,
        sf: Buffer<f32>,
        packed: Buffer<Ue8m0x4>,
    }

    /// Everything that can be wrong in one call.
    struct Call {
        x: (Vec<u64>, Vec<u64>),
        x_dtype: DType,
        pair: Option<((u32, u32), [u64; 2], SfLayout)>,
        npt: u32,
        round_sf: bool,
        out: (Vec<u64>, DType),
        sf: (Vec<u64>, SfLayout),
    }

    impl Refused {
        fn new() -> Self {
            let device = Device::emulator();
            let mut out = device.zeros(64 * 256).unwrap();
            let mut sf = device.zeros(256).unwrap();
            let mut packed = device.zeros(256).unwrap();
            out.fill_bytes(FILL).unwrap();
            sf.fill_bytes(FILL).unwrap();
            packed.fill_bytes(FILL).unwrap();
            let (x, codes, x_sf) = (device.zeros(64 * 256), device.zeros(64 * 256), device.zeros(512));
            Self { device, x: x.unwrap(), codes: codes.unwrap(), x_sf: x_sf.unwrap(), out, sf, packed }
        }

        /// A call that is fine.
        fn call() -> Call {
            Call {
                x: (vec![40, 64], vec![64, 1]),
                x_dtype: DType::Bf16,
                pair: None,
                npt: 32,
                round_sf: true,
                out: (vec![40, 64], DType::E4m3),
                sf: (vec![2, 64], SfLayout::RowMajor),
            }
        }

        fn run(&mut self, call: Call) -> Result<()> {
            let x = match call.pair {
                None => Input::Plain(self.x.strided(&call.x.0, &call.x.1, 0)?.reinterpret(call.x_dtype)?),
                Some((block, shape, layout)) => {
                    let sf = Sf { tensor: self.x_sf.tensor(&shape)?, layout };
                    Input::Quantised { data: self.codes.strided(&call.x.0, &call.x.1, 0)?, sf, block }
                }
            };
            let strides: Vec<u64> = (0..call.out.0.len()).map(|i| call.out.0[i + 1..].iter().product()).collect();
            let out = self.out.strided_mut(&call.out.0, &strides, 0)?.reinterpret(call.out.1)?;
            let tensor = match call.sf.1 {
                layout if layout.is_packed() => self.packed.tensor_mut(&call.sf.0)?,
                _ => self.sf.tensor_mut(&call.sf.0)?,
            };
            let sf = SfMut { tensor, layout: call.sf.1 };
            op::per_channel_cast(&self.device.stream()?, Args { x, npt: call.npt, round_sf: call.round_sf, out, sf })
        }

        /// The call fails with a text that starts like this, and nothing was written.
        fn refuses(&mut self, call: Call, start: &str) {
            let text = self.run(call).expect_err(start).to_string();
            assert!(text.starts_with(start), "{text}\nexpected {start}");
            assert!(self.out.to_vec().unwrap().iter().all(|b| *b == FILL), "{text}: out was written");
            let fill = u32::from_ne_bytes([FILL; 4]);
            assert!(self.sf.to_vec().unwrap().iter().all(|v| v.to_bits() == fill), "{text}: sf was written");
            assert!(self.packed.to_vec().unwrap().iter().all(|v| v.0 as u32 == fill), "{text}: sf was written");
        }
    }

    #[test]
    fn bad_arguments_are_named() {
        let mut r = Refused::new();
        let call = Refused::call;
        let pair = |block, shape, layout| Call { pair: Some((block, shape, layout)), ..call() };
        r.refuses(Call { x: (vec![2560], vec![1]), ..call() }, "per_channel_cast: x has shape [2560], expected 2 dimensions");
        r.refuses(Call { x_dtype: DType::F16, ..call() }, "per_channel_cast: x is f16, allowed: bf16, f32");
        r.refuses(Call { x: (vec![40, 64], vec![1, 40]), ..call() }, "per_channel_cast: layout of x is");
        r.refuses(Call { npt: 64, ..call() }, "per_channel_cast: npt is 64, allowed: 32, 128");
        r.refuses(
            Call { out: (vec![64, 40], DType::E4m3), ..call() },
            "per_channel_cast: out has shape [64, 40], expected [40, 64]",
        );
        r.refuses(Call { out: (vec![40, 64], DType::U8), ..call() }, "per_channel_cast: out is u8, allowed: e4m3");
        r.refuses(
            Call { sf: (vec![1, 64], SfLayout::RowMajor), ..call() },
            "per_channel_cast: sf has shape [1, 64], expected [2, 64]",
        );
        r.refuses(
            Call { sf: (vec![2, 64], SfLayout::ColMajor), ..call() },
            "per_channel_cast: layout of sf is col-major, expected row-major, per-channel packed",
        );
        r.refuses(
            Call { sf: (vec![2, 64], SfLayout::PerChannelPacked), ..call() },
            "per_channel_cast: sf has shape [2, 64], expected [1, 64]",
        );
        r.refuses(
            Call { sf: (vec![1, 64], SfLayout::PerChannelPacked), round_sf: false, ..call() },
            "per_channel_cast: round_sf is false, allowed: true with per-channel packed scales",
        );
        r.refuses(pair((128, 128), [40, 1], SfLayout::RowMajor), "per_channel_cast: npt of the input's block is 128, allowed: 1");
        r.refuses(
            pair((1, 8), [40, 8], SfLayout::RowMajor),
            "per_channel_cast: npc of the input's block is 8, allowed: 16, 32, 64, 128",
        );
        r.refuses(pair((1, 32), [40, 1], SfLayout::RowMajor), "per_channel_cast: x_sf has shape [40, 1], expected [40, 2]");
        r.refuses(
            pair((1, 32), [40, 2], SfLayout::PerChannelPacked),
            "per_channel_cast: layout of x_sf is per-channel packed, expected row-major, col-major, col-major packed",
        );
        // What all of this was derived from is fine.
        r.run(pair((1, 32), [40, 2], SfLayout::RowMajor)).unwrap();
        r.run(call()).unwrap();
        assert_eq!(r.sf.to_vec().unwrap()[..128], [2f32.powi(-22); 128]);
    }

    #[test]
    fn overlap_and_other_devices_are_refused() {
        let device = Device::emulator();
        let stream = device.stream().unwrap();
        let memory = device.zeros::<f32>(4096).unwrap();
        let (other, mut own) = (device.checked().zeros::<f32>(32 * 64).unwrap(), device.zeros::<f32>(64).unwrap());
        // SAFETY: nothing is launched on these overlapping tensors; that is what is checked.
        let tensor = |offset: u64, dtype, shape: &[u64], strides: &[u64]| unsafe {
            ferrotile::TensorMut::from_raw(&device, memory.as_ptr() + offset, dtype, shape, strides).unwrap()
        };
        let mut run = |x: Input<'_>, out, sf_offset: Option<u64>| {
            let sf = match sf_offset {
                Some(offset) => tensor(offset, DType::F32, &[1, 64], &[64, 1]),
                None => own.tensor_mut(&[1, 64]).unwrap(),
            };
            let sf = SfMut { tensor: sf, layout: SfLayout::RowMajor };
            op::per_channel_cast(&stream, Args { x, npt: 32, round_sf: false, out, sf })
        };
        let x = Input::Plain(memory.tensor(&[32, 64]).unwrap());
        let apart = 4 * 32 * 64;
        let out = |offset| tensor(offset, DType::E4m3, &[32, 64], &[64, 1]);
        assert!(matches!(run(x, out(apart - 16), None), Err(Error::Overlap { a: "x", b: "out", .. })));
        assert!(matches!(run(x, out(apart), Some(16)), Err(Error::Overlap { a: "x", b: "sf", .. })));
        assert!(matches!(run(x, out(apart), Some(apart + 2044)), Err(Error::Overlap { a: "out", b: "sf", .. })));
        let elsewhere = Input::Plain(other.tensor(&[32, 64]).unwrap());
        assert!(matches!(run(elsewhere, out(apart), None), Err(Error::DeviceMismatch { arg: "x", .. })));
        let codes = device.zeros::<E4m3>(32 * 64).unwrap();
        let sf = Sf { tensor: memory.tensor(&[32, 1]).unwrap(), layout: SfLayout::RowMajor };
        let pair = Input::Quantised { data: codes.tensor(&[32, 64]).unwrap(), sf, block: (1, 64) };
        assert!(matches!(run(pair, out(64), None), Err(Error::Overlap { a: "x_sf", b: "out", .. })));
        assert!(run(x, out(apart), None).is_ok());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        /// Any shape, distance of rows, alignment and range of values.
        #[test]
        fn any_input(
            t in 0u64..300, h in 1u64..200, eights: bool, gap in 0u64..9, offset in 0u64..9, out_offset in 0u64..9, sf_gap in 0u64..3,
            kind in 0usize..6, npt_32: bool, scales in 0usize..3, exponent in -130i32..120, seed: u64,
        ) {
            let device = Device::emulator();
            let stream = device.stream().unwrap();
            let (h, gap, offset) = if eights { (h.next_multiple_of(8), gap * 8, offset * 8) } else { (h, gap, offset) };
            let (kind, npt, (round, layout)) = (KINDS[kind], if npt_32 { 32 } else { 128 }, SCALES[scales]);
            let rng = Rng::new(seed);
            let source = match kind {
                Kind::Pair(layout, npc) => {
                    let columns = sf_shape(t, h, (1, npc), SfLayout::RowMajor).shape[1];
                    let scales = rng.stream(1).fill((t * columns) as usize, |rng, i| {
                        2f32.powi(exponent.max(-126) - rng.below(i, 3) as i32 + 2)
                    });
                    Source::pair(&device, (layout, npc), (t, h), (h + gap, offset), &rng.bytes((t * h) as usize), &scales)
                }
                _ => {
                    let values = rng.fill((t * h) as usize, |rng, i| {
                        let v = (rng.normal(i) as f64 * 2f64.powi(exponent)) as f32;
                        if kind == Kind::Bf16 { bf16::from_f32(v).to_f32() } else { v }
                    });
                    Source::plain(&device, kind, (t, h), (h + gap, offset), values)
                }
            };
            let source = source.unwrap();
            let expected = expected(&source, npt, round);
            let mut out = outputs(&device, &source, npt, layout, (out_offset, sf_gap)).unwrap();
            cast(&stream, &source, npt, round, &mut out).unwrap();
            out.check("any", &expected.data, &expected.sf_words(h as usize, layout)).unwrap();
        }
    }
}
