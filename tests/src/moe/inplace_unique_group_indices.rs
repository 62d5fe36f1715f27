//! inplace_unique_group_indices: reference, cases, checks and benchmark.

use super::common_route::{grid, inside, moe, prefilled, uploaded};
use crate::support::bench::Row;
use crate::support::cases::{Depth, MoeCase};
use crate::support::compare::equal;
use crate::support::golden::{self, Case, Golden};
use crate::support::rng::Rng;
use crate::support::suite::{Ctx, Report, Suite, text};
use ferrotile::moe::inplace_unique_group_indices::{Args, inplace_unique_group_indices};
use ferrotile::{Buffer, Device, Stream};

/// The checks of this op.
pub const SUITE: Suite = Suite { op: "inplace_unique_group_indices", run };

/// Entries that stood in their row before become -1, if they are groups.
fn reference(entries: &[i64], k: u64, groups: u64) -> Vec<i64> {
    let mut out = Vec::with_capacity(entries.len());
    for row in entries.chunks(k.max(1) as usize) {
        for (i, v) in row.iter().enumerate() {
            let repeats = *v >= 0 && (*v as u64) < groups && row[..i].contains(v);
            out.push(if repeats { -1 } else { *v });
        }
    }
    out
}

/// Everything a launch needs; with `source`, from there.
struct Buffers {
    source: Option<Buffer<i64>>,
    entries: Buffer<i64>,
    shape: [u64; 2],
    groups: u64,
    offset: u64,
}

impl Buffers {
    fn new(device: &Device, entries: &[i64], k: u64, groups: u64, offset: u64, copy: bool) -> Result<Self, String> {
        let n = entries.len() as u64;
        let (source, entries) = if copy {
            // At another offset than the output.
            (Some(uploaded(device, entries, 2 * offset)?), prefilled(device, n, offset)?)
        } else {
            (None, uploaded(device, entries, offset)?)
        };
        Ok(Self { source, entries, shape: [n.checked_div(k).unwrap_or(3), k], groups, offset })
    }

    fn call(&mut self, stream: &Stream) -> ferrotile::Result<()> {
        let ([t, k], offset) = (self.shape, self.offset);
        let args = Args {
            group_indices: self.entries.strided_mut(&[t, k], &[k.max(1), 1], offset)?,
            num_groups: self.groups,
            source: match &self.source {
                Some(source) => Some(source.strided(&[t, k], &[k, 1], 2 * offset)?),
                None => None,
            },
        };
        inplace_unique_group_indices(stream, args)
    }

    fn read(&self, name: &str) -> Result<Vec<i64>, String> {
        inside("group_indices", name, &self.entries, self.shape[0] * self.shape[1], self.offset)
    }
}

fn check_form(device: &Device, entries: &[i64], k: u64, groups: u64, offset: u64, copy: bool, name: &str) -> Result<(), String> {
    let name = format!("{name},g={groups},offset={offset},copy={copy}");
    let stream = device.stream().map_err(text)?;
    let mut buffers = Buffers::new(device, entries, k, groups, offset, copy)?;
    let expected = reference(entries, k, groups);
    // What is unique already stays.
    for _ in 0..2 {
        buffers.call(&stream).map_err(text)?;
        stream.synchronize().map_err(text)?;
        equal("group_indices", &name, &buffers.shape, &buffers.read(&name)?, &expected)?;
    }
    Ok(())
}

/// In place and from a source.
fn check(device: &Device, entries: &[i64], k: u64, groups: u64, offset: u64, name: &str) -> Result<(), String> {
    [false, true].iter().try_for_each(|copy| check_form(device, entries, k, groups, offset, *copy, name))
}

/// The groups of a case's choices, as moe.md has them: experts of all ranks divided among the groups.
fn groups_of(case: &MoeCase, groups: u64) -> Vec<i64> {
    let size = (case.num_experts * case.num_ranks / groups) as i64;
    case.topk_idx().into_iter().map(|v| v.div_euclid(size)).collect()
}

fn run(ctx: &Ctx) -> Result<Report, String> {
    let device = &ctx.device;
    for case in grid(ctx.depth) {
        if !ctx.case(&case.name()) {
            continue;
        }
        let experts = case.num_experts * case.num_ranks;
        for groups in [1, 8, 16, 72].into_iter().filter(|groups| experts.is_multiple_of(*groups)) {
            check(device, &groups_of(&case, groups), case.num_topk, groups, 0, &case.name())?;
        }
    }
    // Every kind of row: lanes of two entries and of one, rows that do not fill a warp, rows beyond a warp.
    let lengths = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 16, 17, 31, 32, 33, 34, 63, 64, 65, 66, 130];
    let rows = if ctx.depth == Depth::Full { 3001 } else { 101 };
    for k in lengths {
        let name = format!("k={k},t={rows}");
        if !ctx.case(&name) {
            continue;
        }
        let rng = Rng::named(&name);
        let len = (rows * k) as usize;
        // Few repeats, many, one group only, more than 128 groups.
        for (i, groups) in [100, 5, 1, 1 << 30].into_iter().enumerate() {
            let entries = rng.stream(i as u64).ints_i64(len, -2, groups);
            for offset in [0, 1] {
                check(device, &entries, k, groups as u64, offset, &name)?;
            }
        }
    }
    if ctx.case("out of range") {
        // Not on the checked emulator, which stops there.
        let unchecked = if device.is_emulator() { Device::emulator() } else { *device };
        let values = [8, 9, 1 << 32, (1 << 32) + 3, i64::MAX, i64::MIN, 3, 7];
        for k in [1, 8, 9, 70] {
            let entries = Rng::named("out of range").fill(630 * k, |rng, i| values[rng.below(i, 8) as usize]);
            check(&unchecked, &entries, k as u64, 8, 0, "out of range")?;
        }
    }
    let notes = golden::check_cases(ctx, &["inplace_unique_group_indices"], |golden, case| check_golden(device, golden, case))?;
    if !device.is_emulator() && ctx.case("graph") {
        check_graph(device)?;
    }
    Ok(Report { notes, ..ctx.report() })
}

fn check_golden(device: &Device, golden: &Golden, case: &Case) -> Result<(), String> {
    let input = golden.tensor(case, "in/group_indices")?;
    let (entries, k, groups): (Vec<i64>, u64, u64) = (input.to_vec()?, input.shape[1], case.param("num_groups")?);
    let expected: Vec<i64> = golden.tensor(case, "out/")?.to_vec()?;
    equal("reference", &case.name(), &input.shape, &reference(&entries, k, groups), &expected)?;
    check(device, &entries, k, groups, 0, &case.name())
}

/// A captured launch, in place and from a source, does its work at every replay, on the data that are there then.
fn check_graph(device: &Device) -> Result<(), String> {
    let stream = device.stream().map_err(text)?;
    for copy in [false, true] {
        let data = |seed| Rng::new(seed).ints_i64(800, -1, 6);
        let mut buffers = Buffers::new(device, &data(0), 8, 6, 0, copy)?;
        // Compiled before the capture.
        buffers.call(&stream).map_err(text)?;
        let graph = stream.capture(|stream| buffers.call(stream)).map_err(text)?;
        for seed in 1..4 {
            let (name, entries) = (format!("graph,copy={copy},replay {seed}"), data(seed));
            let input = buffers.source.as_mut().unwrap_or(&mut buffers.entries);
            let mut all = input.to_vec().map_err(text)?;
            all[..800].copy_from_slice(&entries);
            input.copy_from(&all).map_err(text)?;
            graph.launch(&stream).map_err(text)?;
            stream.synchronize().map_err(text)?;
            equal("group_indices", &name, &buffers.shape, &buffers.read(&name)?, &reference(&entries, 8, 6))?;
        }
    }
    Ok(())
}

/// Cases of the peers' own benchmark, which times a copy and the op in place (`clone=True`), and small ones: here from a source, which is
/// the same work in one launch. With `launches=2` as the peers do it.
pub fn bench() -> Vec<Row> {
    let row = |case: MoeCase, groups: u64, source: bool| {
        let MoeCase { num_send_tokens, num_topk, num_experts, num_ranks } = case;
        let entries = groups_of(&case, groups);
        let launches = if source { "" } else { "launches=2," };
        Row {
            op: "inplace_unique_group_indices",
            case: format!("clone=True,e={num_experts},ep={num_ranks},g={groups},k={num_topk},{launches}send={num_send_tokens}"),
            bytes: 16 * entries.len() as u64,
            build: Box::new(move |device, _| {
                if source {
                    let mut buffers = Buffers::new(device, &entries, num_topk, groups, 0, true)?;
                    return Ok(Box::new(move |stream| buffers.call(stream)));
                }
                let input = device.upload(&entries).map_err(text)?;
                let mut buffers = Buffers::new(device, &entries, num_topk, groups, 0, false)?;
                let len = entries.len() as u64;
                Ok(Box::new(move |stream| {
                    stream.copy(&mut buffers.entries.tensor_mut(&[len])?, &input.tensor(&[len])?)?;
                    buffers.call(stream)
                }))
            }),
        }
    };
    let cases = [(9, 8, 8), (9, 8, 72), (32, 8, 8), (32, 8, 16), (4, 64, 8), (4, 64, 16)];
    let mut rows = Vec::new();
    for (e, ep, groups) in cases {
        rows.extend([true, false].map(|source| row(moe(4001, 8, e, ep), groups, source)));
    }
    rows.extend([1, 16, 128].map(|send| row(moe(send, 8, 32, 8), 8, true)));
    rows
}

#[cfg(test)]
mod tests {
    use super::super::common_route::{FILL, stopped};
    use super::*;
    use ferrotile::{DType, Error};
    use proptest::prelude::{ProptestConfig, prop_assert_eq, proptest};

    #[test]
    fn suite() {
        SUITE.test();
    }

    #[test]
    fn reference_is_the_definition() {
        assert_eq!(reference(&[2, 0, 2, -1, -1, 2, 0, 1, 1, 1, -7, -7], 6, 3), [2, 0, -1, -1, -1, -1, 0, 1, -1, -1, -7, -7]);
        // Groups beyond the last one are left alone.
        assert_eq!(reference(&[3, 3, 2, 2], 4, 3), [3, 3, 2, -1]);
        assert_eq!(groups_of(&moe(5, 1, 1, 1), 1), [0; 5]);
    }

    #[test]
    fn the_checked_emulator_reports_groups_out_of_range() {
        for (group, copy) in [(8, false), (1 << 32, true), (i64::MAX, false)] {
            let device = Device::emulator().checked();
            let mut buffers = Buffers::new(&device, &[0, 7, -1, group], 2, 8, 0, copy).unwrap();
            let stream = device.stream().unwrap();
            stopped(&format!("group {group}"), buffers.call(&stream).and_then(|()| stream.synchronize())).unwrap();
        }
    }

    #[test]
    fn bad_input_is_refused_and_nothing_is_written() {
        let (device, other) = (Device::emulator(), Device::emulator().checked());
        let stream = device.stream().unwrap();
        let (wide, narrow) = (device.upload(&[1i64; 64]).unwrap(), device.upload(&[1i32; 64]).unwrap());
        let elsewhere = other.upload(&[1i64; 64]).unwrap();
        let refused = |what: &str, spoil: &dyn Fn(&mut Args<'_>)| {
            let mut entries = device.upload(&[5i64; 64]).unwrap();
            let mut args = Args { group_indices: entries.tensor_mut(&[8, 8]).unwrap(), num_groups: 8, source: None };
            spoil(&mut args);
            let error = inplace_unique_group_indices(&stream, args).err().unwrap_or_else(|| panic!("{what} was accepted"));
            assert!(error.to_string().starts_with("inplace_unique_group_indices: "), "{what}: {error}");
            assert_eq!(entries.to_vec().unwrap(), [5; 64], "{what}");
            error
        };
        macro_rules! refuse {
            ($what:literal, |$a:ident| $set:expr, $error:pat) => {
                let error = refused($what, &|$a: &mut Args<'_>| $set);
                assert!(matches!(error, $error), "{}: {error:?}", $what);
            };
        }
        // SAFETY: refused before anything is written.
        let to = |buffer: u64, dtype, shape: &[u64], strides: &[u64]| unsafe {
            ferrotile::TensorMut::from_raw(&device, buffer, dtype, shape, strides).unwrap()
        };
        // SAFETY: refused before anything is read.
        let from = |buffer: u64, device: &Device, dtype, shape: &[u64], strides: &[u64]| unsafe {
            Some(ferrotile::TensorRef::from_raw(device, buffer, dtype, shape, strides).unwrap())
        };
        let (w, n) = (wide.as_ptr(), narrow.as_ptr());
        refuse!("a vector", |a| a.group_indices = to(w, DType::I64, &[64], &[1]), Error::Shape { arg: "group_indices", .. });
        refuse!("32 bits", |a| a.group_indices = to(n, DType::I32, &[8, 8], &[8, 1]), Error::DType { arg: "group_indices", .. });
        refuse!("gaps", |a| a.group_indices = to(w, DType::I64, &[4, 8], &[9, 1]), Error::Layout { arg: "group_indices", .. });
        refuse!("2^31 groups", |a| a.num_groups = 1 << 31, Error::Value { arg: "num_groups", .. });
        refuse!(
            "a source of 32 bits",
            |a| a.source = from(n, &device, DType::I32, &[8, 8], &[8, 1]),
            Error::DType { arg: "source", .. }
        );
        refuse!(
            "a smaller source",
            |a| a.source = from(w, &device, DType::I64, &[4, 8], &[8, 1]),
            Error::Shape { arg: "source", .. }
        );
        refuse!(
            "a source with its columns beside each other",
            |a| a.source = from(w, &device, DType::I64, &[8, 8], &[1, 8]),
            Error::Layout { arg: "source", .. }
        );
        refuse!(
            "a source elsewhere",
            |a| a.source = from(elsewhere.as_ptr(), &other, DType::I64, &[8, 8], &[8, 1]),
            Error::DeviceMismatch { arg: "source", .. }
        );
        refuse!(
            "a source that is the output",
            |a| a.source = from(a.group_indices.ptr(), &device, DType::I64, &[8, 8], &[8, 1]),
            Error::Overlap { a: "source", b: "group_indices", .. }
        );
    }

    #[test]
    fn unwritten_bytes_are_what_the_checks_take_them_for() {
        let device = Device::emulator();
        let buffer = uploaded(&device, &[1i64, 2], 1).unwrap().to_vec().unwrap();
        assert_eq!((buffer[0], buffer[1], buffer[3]), (i64::from_le_bytes([FILL; 8]), 1, i64::from_le_bytes([FILL; 8])));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn any_shape_and_place(t in 0u64..100, k in 1u64..80, groups in 1u64..200, offset in 0u64..3, copy: bool, seed: u64) {
            let entries = Rng::new(seed).ints_i64((t * k) as usize, -2, groups as i64);
            prop_assert_eq!(check_form(&Device::emulator(), &entries, k, groups, offset, copy, "random"), Ok(()));
        }
    }
}
