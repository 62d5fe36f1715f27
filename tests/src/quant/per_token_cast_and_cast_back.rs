//! Reference, cases, checks and benchmark rows of `per_token_cast_and_cast_back`: the reference of `per_token_cast`, decoded and scaled.

use super::per_token_cast::{GROUPS, Rule, Values, awkward, decode, normal};
use crate::support::bench::{Launch, Row};
use crate::support::cases::Depth;
use crate::support::compare;
use crate::support::golden::{self, Case, Golden};
use crate::support::inputs;
use crate::support::suite::{Ctx, Report, Suite, ensure, text};
use ferrotile::quant::Format;
use ferrotile::quant::per_token_cast_and_cast_back::{Args, per_token_cast_and_cast_back_in_parts};
use ferrotile::{Buffer, DType, Device, Element, Stream};
use half::bf16;
use rayon::prelude::*;

/// What the `check` binary runs.
pub const SUITE: Suite = Suite { op: "per_token_cast_and_cast_back", run };

/// Products of the codes and the scales, rounded to the type.
fn reference<T: Float>(values: &Values, format: Format, npc: u32, rule: Rule) -> Vec<T> {
    let quantised = values.cast(format, npc as usize, rule, None);
    let codes = decode(&quantised.data, format);
    let (hidden, columns) = (values.hidden.max(1), values.hidden.div_ceil(npc as usize).max(1));
    let mut out = vec![T::rounded(0.0); codes.len()];
    let rows = out.par_chunks_mut(hidden).zip(codes.par_chunks(hidden)).zip(quantised.sf.par_chunks(columns));
    rows.for_each(|((out, codes), sf)| {
        let groups = out.chunks_mut(npc as usize).zip(codes.chunks(npc as usize)).zip(sf);
        groups.for_each(|((out, codes), sf)| out.iter_mut().zip(codes).for_each(|(v, q)| *v = T::rounded(q * sf)));
    });
    out
}

/// An element type of the tensor.
trait Float: Element + compare::Bits + Send {
    /// The NaN of NVIDIA's arithmetic and conversions.
    const GPU_NAN: Self;
    fn rounded(v: f32) -> Self;
}
impl Float for f32 {
    const GPU_NAN: f32 = f32::from_bits(0x7FFF_FFFF);
    fn rounded(v: f32) -> f32 {
        if v.is_nan() { Self::GPU_NAN } else { v }
    }
}
impl Float for bf16 {
    const GPU_NAN: bf16 = bf16::from_bits(0x7FFF);
    fn rounded(v: f32) -> bf16 {
        if v.is_nan() { Self::GPU_NAN } else { bf16::from_f32(v) }
    }
}

/// How one call is made.
#[derive(Clone, Copy)]
struct Way {
    format: Format,
    npc: u32,
    rule: Rule,
    /// Elements from one row to the next, and before the first.
    at: (u64, u64),
    /// Most tokens of a launch.
    max_tokens: u32,
}

const PLAIN: Way = Way { format: Format::E4m3, npc: 32, rule: Rule::Powers, at: (0, 0), max_tokens: u32::MAX };

fn launch<T: Element>(stream: &Stream, x: &mut Buffer<T>, shape: [u64; 2], way: Way) -> ferrotile::Result<()> {
    let Way { format, npc, rule, at, max_tokens } = way;
    let x = x.strided_mut(&shape, &[at.0, 1], at.1)?;
    let args = Args { x, format, npc, round_sf: rule == Rule::Powers, e4m3_sf: rule == Rule::E4m3 };
    per_token_cast_and_cast_back_in_parts(stream, args, max_tokens)
}

/// What lies between the rows, and must stay.
const BETWEEN: f32 = 1e30;

/// The values as the device has them: rows apart.
fn place<T: Float>(values: &[T], hidden: u64, (stride, offset): (u64, u64)) -> Vec<T> {
    if (stride, offset) == (hidden, 0) {
        return values.to_vec();
    }
    let rows = (values.len() as u64).checked_div(hidden).unwrap_or(0);
    let mut all = vec![T::rounded(BETWEEN); (offset + rows * stride + 16) as usize];
    for (row, values) in values.chunks_exact(hidden.max(1) as usize).enumerate() {
        let start = (offset + row as u64 * stride) as usize;
        all[start..start + values.len()].copy_from_slice(values);
    }
    all
}

/// From here on a tensor is large: what else is to be seen is seen on smaller ones.
const LARGE: usize = 1 << 22;

/// One tensor and what it becomes; uploaded once for each distance of rows, and made once for ways that differ in nothing else.
fn check<T: Float>(ctx: &Ctx, values: &Values, kind: &str, ways: &[Way]) -> Result<(), String> {
    let (t, h) = (values.num_tokens() as u64, values.hidden as u64);
    let x: Vec<T> = values.values.par_iter().map(|v| if v.is_nan() { T::GPU_NAN } else { T::rounded(*v) }).collect();
    let stream = ctx.device.stream().map_err(text)?;
    let mut made: Option<(Format, u32, Rule, Vec<T>)> = None;
    let mut uploaded = None;
    for way in ways {
        let Way { format, npc, rule, at, max_tokens } = *way;
        let at = if at.0 < h { (h, at.1) } else { at };
        let name = format!(
            "dtype={},fmt={format},h={h},kind={kind},max_tokens={max_tokens},npc={npc},offset={},rule={rule:?},stride={},t={t}",
            T::DTYPE,
            at.1,
            at.0
        );
        if !ctx.case(&name) {
            continue;
        }
        if made.as_ref().is_none_or(|(f, n, r, _)| (*f, *n, *r) != (format, npc, rule)) {
            made = Some((format, npc, rule, reference(values, format, npc, rule)));
        }
        if uploaded.as_ref().is_none_or(|(there, ..): &((u64, u64), Buffer<T>, Buffer<T>)| *there != at) {
            let original = ctx.device.upload(&place(&x, h, at)).map_err(text)?;
            let len = original.len();
            uploaded = Some((at, original, ctx.device.alloc(len).map_err(text)?));
        }
        let (Some((_, _, _, expected)), Some((_, original, copy))) = (&made, &mut uploaded) else { return Err(name) };
        // Rows and what lies between them.
        let (placed, len) = (place(expected, h, at), [copy.len() as u64]);
        // Once more at full depth: from the same values the same bytes.
        for _ in 0..if ctx.depth == Depth::Small || x.len() >= LARGE { 1 } else { 2 } {
            let from = original.tensor(&len).map_err(text)?;
            stream.copy(&mut copy.tensor_mut(&len).map_err(text)?, &from).map_err(text)?;
            launch(&stream, copy, [t, h], Way { at, ..*way }).map_err(|e| format!("{e}; {name}"))?;
            compare::equal("x", &name, &len, &copy.to_vec().map_err(text)?, &placed)?;
        }
    }
    Ok(())
}

fn check_both(ctx: &Ctx, values: impl Fn(DType) -> Values, kind: &str, ways: &[Way]) -> Result<(), String> {
    check::<bf16>(ctx, &values(DType::Bf16), kind, ways)?;
    check::<f32>(ctx, &values(DType::F32), kind, ways)
}

const FORMATS: [Format; 2] = [Format::E4m3, Format::E2m1];
const RULES: [Rule; 3] = [Rule::Powers, Rule::Exact, Rule::E4m3];

/// Every format, group and rule.
fn all_ways(npcs: &[u32], at: (u64, u64)) -> Vec<Way> {
    let mut ways = Vec::new();
    for format in FORMATS {
        for &npc in npcs {
            ways.extend(RULES.map(|rule| Way { format, npc, rule, at, ..PLAIN }));
        }
    }
    ways
}

fn run(ctx: &Ctx) -> Result<Report, String> {
    let name = |kind: &str, t: u64, h: u64, dtype: DType| format!("{kind} {dtype} {t} {h}");
    let edge = |t: u64, h: u64| move |dtype: DType| awkward(dtype, (t, h), &name("in place", t, h, dtype));
    // A ragged last group, several warps, all that is hard.
    check_both(ctx, edge(19, 576), "awkward", &all_ways(&GROUPS, (576, 0)))?;
    // Rows apart, and in several launches.
    let mut ways = all_ways(&[32], (608, 8));
    ways.extend([1, 2, 18].map(|max_tokens| Way { max_tokens, ..PLAIN }));
    check_both(ctx, edge(19, 576), "awkward", &ways)?;
    // Channel by channel: rows that are no whole number of vectors, and tensors that start anywhere.
    check_both(ctx, edge(9, 102), "awkward", &all_ways(&[16, 128], (107, 1)))?;
    check_both(ctx, edge(9, 320), "awkward", &all_ways(&[64], (320, 1)))?;
    let odd: Vec<Way> = RULES.map(|rule| Way { rule, npc: 16, ..PLAIN }).to_vec();
    check_both(ctx, edge(9, 37), "awkward", &odd)?;
    for (t, h) in [(0, 384), (1, 7168), (1, 1), (3, 0)] {
        let values = |dtype: DType| normal(dtype, (t, h), &name("in place", t, h, dtype));
        let ways: Vec<Way> =
            all_ways(&[128], (h, 0)).into_iter().filter(|way| h % 2 == 0 || way.format == Format::E4m3).collect();
        check_both(ctx, values, "normal", &ways)?;
    }
    if !ctx.device.is_emulator() {
        check_graph(ctx)?;
    }
    if ctx.depth == Depth::Full {
        for (i, h) in [128, 576, 768, 2048, 2560, 3072, 4096, 6144, 7168].into_iter().enumerate() {
            let values = |t: u64| move |dtype: DType| normal(dtype, (t, h), &name("in place", t, h, dtype));
            check_both(ctx, values(512), "normal", &all_ways(&GROUPS, (h, 0)))?;
            // The kernel is the same for more tokens: a group and a rule for each number of channels, all of them in turn.
            let ways: [Way; 2] = std::array::from_fn(|j| Way {
                format: FORMATS[j],
                npc: GROUPS[(i + j) % 4],
                rule: RULES[(i + j) % 3],
                at: (h, 0),
                ..PLAIN
            });
            check_both(ctx, values(8001), "normal", &ways)?;
        }
        check_large(ctx)?;
    }
    let notes = golden::check_cases(ctx, &[SUITE.op], |golden, case| check_golden(ctx, golden, case))?;
    Ok(Report { notes, ..ctx.report() })
}

/// The inputs of 2.1.0's calls, which were recorded before the calls, but what they left in place was not; so these too are held to the
/// reference, whose halves the recorded results of the two ops confirm.
fn check_golden(ctx: &Ctx, golden: &Golden, case: &Case) -> Result<(), String> {
    let x = golden.tensor(case, "in/x")?;
    let x: Vec<f32> = x.floats()?;
    let hidden = golden.tensor(case, "in/x")?.shape[1];
    let rule = match (case.param("round_sf")?, case.param("use_e4m3_sf")?) {
        (true, _) => Rule::Powers,
        (_, true) => Rule::E4m3,
        _ => Rule::Exact,
    };
    let format = if case.param::<String>("fmt")? == "e4m3" { Format::E4m3 } else { Format::E2m1 };
    let way = Way { format, npc: case.param("num_per_channels")?, rule, at: (hidden, 0), ..PLAIN };
    check::<bf16>(ctx, &Values::plain(x, hidden), &format!("golden {}", case.case), &[way])
}

/// Recorded in a graph and replayed, each time on the values that the last time left: which stay as they are, as all of them are quantised
/// already and the scales are the same powers of two.
fn check_graph(ctx: &Ctx) -> Result<(), String> {
    let name = "kind=graph,h=576,t=133";
    if !ctx.case(name) {
        return Ok(());
    }
    let values = normal(DType::Bf16, (133, 576), name);
    let x: Vec<bf16> = values.values.iter().map(|v| bf16::from_f32(*v)).collect();
    let mut on_device = ctx.device.upload(&x).map_err(text)?;
    let stream = ctx.device.stream().map_err(text)?;
    let way = Way { at: (576, 0), ..PLAIN };
    let graph = stream.capture(|s| launch(s, &mut on_device, [133, 576], way)).map_err(text)?;
    let expected: Vec<bf16> = reference(&values, Format::E4m3, 32, Rule::Powers);
    for replay in 0..2 {
        on_device.copy_from(&x).map_err(text)?;
        graph.launch(&stream).map_err(text)?;
        stream.synchronize().map_err(text)?;
        compare::equal("x", &format!("{name},replay={replay}"), &[133, 576], &on_device.to_vec().map_err(text)?, &expected)?;
    }
    Ok(())
}

/// More than 2^32 bytes: the rows that lie at the beginning and at the end of them, one row of data for each.
fn check_large(ctx: &Ctx) -> Result<(), String> {
    let (t, h) = (300_001u64, 7168u64);
    let name = "kind=large,h=7168,t=300001";
    if !ctx.case(name) {
        return Ok(());
    }
    let row = normal(DType::Bf16, (1, h), name);
    let expected: Vec<bf16> = reference(&row, Format::E4m3, 32, Rule::Powers);
    let row: Vec<bf16> = row.values.iter().map(|v| bf16::from_f32(*v)).collect();
    let stream = ctx.device.stream().map_err(text)?;
    let mut x = ctx.device.zeros::<bf16>((t * h) as usize).map_err(text)?;
    let row = ctx.device.upload(&row).map_err(text)?;
    let rows = [0, 1, 149_796, 149_797, 299_593, 299_594, t - 1];
    for i in rows {
        let mut to = x.strided_mut(&[h], &[1], i * h).map_err(text)?;
        stream.copy(&mut to, &row.tensor(&[h]).map_err(text)?).map_err(text)?;
    }
    launch(&stream, &mut x, [t, h], Way { at: (h, 0), ..PLAIN }).map_err(text)?;
    let mut one = ctx.device.alloc::<bf16>(h as usize).map_err(text)?;
    for i in rows {
        stream.copy(&mut one.tensor_mut(&[h]).map_err(text)?, &x.strided(&[h], &[1], i * h).map_err(text)?).map_err(text)?;
        stream.synchronize().map_err(text)?;
        let got = one.to_vec().map_err(text)?;
        ensure(got == expected, || format!("row {i} differs; {name}"))?;
    }
    Ok(())
}

/// A row of the benchmark.
fn row(case: String, dtype: DType, (t, h): (u64, u64), way: Way) -> Row {
    let way = Way { at: (h, 0), ..way };
    let build = move |device: &Device, _: &Stream| -> Result<Launch, String> {
        // Values that are quantised already take the same time.
        Ok(if dtype == DType::Bf16 {
            let mut x = inputs::normal_bf16(device, 0, t * h)?;
            Box::new(move |stream: &Stream| launch(stream, &mut x, [t, h], way))
        } else {
            let mut x = inputs::normal_f32(device, 0, t * h)?;
            Box::new(move |stream: &Stream| launch(stream, &mut x, [t, h], way))
        })
    };
    Row { op: "per_token_cast_and_cast_back", case, bytes: 2 * t * h * dtype.size(), build: Box::new(build) }
}

/// The peer's cases, other types and rules, and small inputs. Without `input` it is bf16.
pub fn bench() -> Vec<Row> {
    let large = (8064, 7168);
    let e2m1 = Way { format: Format::E2m1, ..PLAIN };
    let mut rows = Vec::new();
    for (case, dtype, way) in [
        ("fmt=e4m3,h=7168,npc=32,t=8064", DType::Bf16, PLAIN),
        ("fmt=e2m1,h=7168,npc=32,t=8064", DType::Bf16, e2m1),
        ("fmt=e4m3,h=7168,npc=128,t=8064", DType::Bf16, Way { npc: 128, ..PLAIN }),
        ("fmt=e4m3,h=7168,npc=128,round=False,t=8064", DType::Bf16, Way { npc: 128, rule: Rule::Exact, ..PLAIN }),
        ("fmt=e2m1,h=7168,npc=16,sf=e4m3,t=8064", DType::Bf16, Way { npc: 16, rule: Rule::E4m3, ..e2m1 }),
        ("fmt=e4m3,h=7168,input=f32,npc=32,t=8064", DType::F32, PLAIN),
    ] {
        rows.push(row(case.to_owned(), dtype, large, way));
    }
    for t in [1, 16, 128] {
        rows.push(row(format!("fmt=e4m3,h=7168,npc=32,t={t}"), DType::Bf16, (t, 7168), PLAIN));
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferrotile::quant::per_token_cast_and_cast_back::per_token_cast_and_cast_back;
    use ferrotile::{Error, TensorMut};
    use proptest::prelude::{Just, ProptestConfig, any, prop_oneof, proptest};

    #[test]
    fn suite() {
        SUITE.test();
    }

    #[test]
    fn bad_arguments_are_refused() {
        let device = Device::emulator();
        let stream = device.stream().unwrap();
        let mut buffer = device.alloc::<bf16>(4096).unwrap();
        buffer.fill_bytes(0xA5).unwrap();
        let ptr = buffer.as_ptr();
        let refused = |dtype, shape: &[u64], strides: &[u64], offset: u64, edit: fn(&mut Args)| {
            // SAFETY: the call is refused and does not touch the memory.
            let x = unsafe { TensorMut::from_raw(&device, ptr + offset, dtype, shape, strides).unwrap() };
            let mut args = Args { x, format: Format::E4m3, npc: 32, round_sf: true, e4m3_sf: false };
            edit(&mut args);
            let error = per_token_cast_and_cast_back(&stream, args).expect_err("this call must be refused");
            assert!(error.to_string().starts_with("per_token_cast_and_cast_back: "), "{error}");
            error
        };
        let same: fn(&mut Args) = |_| ();
        assert!(matches!(refused(DType::Bf16, &[512], &[1], 0, same), Error::Shape { arg: "x", .. }));
        assert!(matches!(refused(DType::F16, &[4, 128], &[128, 1], 0, same), Error::DType { arg: "x", .. }));
        assert!(matches!(refused(DType::Bf16, &[4, 128], &[1, 4], 0, same), Error::Layout { arg: "x", .. }));
        assert!(matches!(refused(DType::Bf16, &[4, 128], &[128, 1], 1, same), Error::Layout { arg: "x", .. }));
        assert!(matches!(refused(DType::Bf16, &[4, 128], &[127, 1], 0, same), Error::Layout { arg: "x", .. }));
        let huge = 1 << 31;
        assert!(matches!(refused(DType::Bf16, &[huge, 0], &[1, 1], 0, same), Error::Value { arg: "num_tokens", .. }));
        assert!(matches!(refused(DType::Bf16, &[0, huge], &[1, 1], 0, same), Error::Value { arg: "hidden", .. }));
        for edit in [(|a| a.npc = 0) as fn(&mut Args), |a| a.npc = 48, |a| a.npc = 256] {
            assert!(matches!(refused(DType::Bf16, &[4, 128], &[128, 1], 0, edit), Error::Value { arg: "npc", .. }));
        }
        let both: fn(&mut Args) = |a| a.e4m3_sf = true;
        assert!(matches!(refused(DType::Bf16, &[4, 128], &[128, 1], 0, both), Error::Value { arg: "round_sf", .. }));
        let fp4: fn(&mut Args) = |a| a.format = Format::E2m1;
        assert!(matches!(refused(DType::Bf16, &[4, 33], &[33, 1], 0, fp4), Error::Value { arg: "hidden", .. }));
        let checked = Device::emulator().checked();
        let mut elsewhere = checked.zeros::<bf16>(512).unwrap();
        let args =
            Args { x: elsewhere.tensor_mut(&[4, 128]).unwrap(), format: Format::E4m3, npc: 32, round_sf: true, e4m3_sf: false };
        let error = per_token_cast_and_cast_back(&stream, args).unwrap_err();
        assert!(matches!(error, Error::DeviceMismatch { arg: "x", .. }), "{error:?}");
        assert!(buffer.to_vec().unwrap().iter().all(|v| v.to_bits() == 0xA5A5));
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

        /// Any shape, distance of rows, alignment, magnitude and option.
        #[test]
        fn any_input(
            t in 0u64..9, h in 1u64..300, gap in 0u64..20, offset in 0u64..9, f32_input in any::<bool>(), e2m1 in any::<bool>(),
            npc in prop_oneof![Just(16u32), Just(32), Just(64), Just(128)], rule in 0usize..3, max_tokens in 1u32..10,
            exponent in -120i32..120, seed in any::<u32>(),
        ) {
            let h = if e2m1 { h + h % 2 } else { h };
            let dtype = if f32_input { DType::F32 } else { DType::Bf16 };
            let mut values = normal(dtype, (t, h), &format!("{seed}"));
            values.values.iter_mut().for_each(|v| *v *= 2f32.powi(exponent));
            let ctx = Ctx::new(Device::emulator().checked(), Depth::Small);
            let way = Way { format: FORMATS[e2m1 as usize], npc, rule: RULES[rule], at: (h + gap, offset), max_tokens };
            if f32_input {
                check::<f32>(&ctx, &values, "any", &[way]).unwrap();
            } else {
                check::<bf16>(&ctx, &values, "any", &[way]).unwrap();
            }
        }
    }
}
