//! group_count: reference, cases, checks and benchmark.

use super::common_count::{Buffers, Call, Problem, check_graph, check_shared_workspace, each, launch, out_of_range};
use super::common_route::{bench_cases, bench_name, moe};
use crate::support::bench::Row;
use crate::support::cases::MoeCase;
use crate::support::compare::equal;
use crate::support::golden::{self, Case, Golden};
use crate::support::suite::{Ctx, Report, Suite};
use ferrotile::Device;
use ferrotile::moe::group_count::{Args, group_count};

/// The checks of this op.
pub const SUITE: Suite = Suite { op: "group_count", run };

/// How often each group occurs.
fn reference(problem: &Problem) -> Vec<i32> {
    problem.counts().into_iter().map(|count| count as i32).collect()
}

const CALL: Call = &|stream, group_idx, count, workspace| group_count(stream, Args { group_idx, count, workspace });

fn compare(problem: &Problem, got: &[i32]) -> Result<(), String> {
    equal("count", &problem.name, &[problem.bins], got, &reference(problem))
}

fn run(ctx: &Ctx) -> Result<Report, String> {
    let device = &ctx.device;
    each(ctx, |problem| compare(problem, &launch(device, problem, CALL)?))?;
    if ctx.case("out of range") {
        // Not on the checked emulator, which stops there.
        let unchecked = if device.is_emulator() { Device::emulator() } else { *device };
        let problem = out_of_range();
        compare(&problem, &launch(&unchecked, &problem, CALL)?)?;
    }
    if ctx.case("workspace") {
        check_shared_workspace(device, CALL, compare)?;
    }
    let notes =
        golden::check_cases(ctx, &["group_count_aux_fi_mask_indices_by_tp"], |golden, case| check_golden(device, golden, case))?;
    if !device.is_emulator() && ctx.case("graph") {
        check_graph(device, CALL, compare)?;
    }
    Ok(Report { notes, ..ctx.report() })
}

fn check_golden(device: &Device, golden: &Golden, case: &Case) -> Result<(), String> {
    let input = golden.tensor(case, "in/group_idx")?;
    let expected: Vec<i32> = golden.tensor(case, "out/count")?.to_vec()?;
    let (k, bins) = (input.shape[1], case.param("num_groups")?);
    let problem = Problem { name: case.name(), idx: input.to_vec()?, k, bins, offset: 0 };
    equal("reference", &problem.name, &[bins], &reference(&problem), &expected)?;
    equal("count", &problem.name, &[bins], &launch(device, &problem, CALL)?, &expected)
}

/// Cases of the peers' own benchmark, small and large ones.
pub fn bench() -> Vec<Row> {
    let row = |case: MoeCase| {
        let problem = Problem::of(&case);
        Row {
            op: "group_count",
            case: bench_name(&case),
            bytes: 8 * problem.idx.len() as u64 + 4 * problem.bins,
            build: Box::new(move |device, _| {
                let mut buffers = Buffers::<i32>::new(device, &problem)?;
                Ok(Box::new(move |stream| buffers.call(stream, CALL)))
            }),
        }
    };
    let mut cases = bench_cases();
    cases.extend([moe(4001, 8, 256, 1), moe(65536, 8, 32, 8)]);
    cases.into_iter().map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::super::common_route::stopped;
    use super::*;
    use crate::support::rng::Rng;
    use ferrotile::moe::group_count::workspace_bytes;
    use ferrotile::{Buffer, DType, Error, TensorMut, View};
    use proptest::prelude::{ProptestConfig, prop_assert_eq, proptest};

    #[test]
    fn suite() {
        SUITE.test();
    }

    #[test]
    fn reference_is_the_definition() {
        let problem = Problem { name: String::new(), idx: vec![0, 2, 2, -1, 2, 0], k: 3, bins: 4, offset: 0 };
        assert_eq!(reference(&problem), [2, 0, 3, 0]);
    }

    #[test]
    fn the_checked_emulator_reports_groups_out_of_range() {
        for group in [3, 1 << 32, i64::MAX] {
            let device = Device::emulator().checked();
            let problem = Problem { name: String::new(), idx: vec![0, 2, -1, group], k: 2, bins: 3, offset: 0 };
            let mut buffers = Buffers::<i32>::new(&device, &problem).unwrap();
            let stream = device.stream().unwrap();
            let result = buffers.call(&stream, CALL).and_then(|()| stream.synchronize());
            stopped(&format!("group {group}"), result).unwrap();
        }
    }

    #[test]
    fn workspace_stays_small() {
        assert!((1..=32 << 10).all(|bins| workspace_bytes(1 << 20, 8, bins) <= 256 << 10));
        assert_eq!(workspace_bytes(1024, 8, 32), 0);
        assert_eq!(workspace_bytes(1025, 8, 32), 32 * 8);
        assert_eq!(
            [workspace_bytes(1 << 40, 1 << 40, 1), workspace_bytes(1 << 20, 8, 0), workspace_bytes(1 << 20, 8, 1 << 40)],
            [0; 3]
        );
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
        let group_idx = device.upload(&vec![1i64; 10_000]).unwrap();
        let mut count = device.upload(&[-7i32; 8]).unwrap();
        let mut workspace = device.zeros::<u8>(4096).unwrap();
        let mut spare = Spare {
            words: device.zeros(40_000).unwrap(),
            wide: device.zeros(40_000).unwrap(),
            bytes: device.zeros(4096).unwrap(),
            elsewhere: Device::emulator().checked().zeros(8).unwrap(),
        };
        let mut args = Args {
            group_idx: group_idx.tensor(&[5000, 2]).unwrap(),
            count: count.tensor_mut(&[8]).unwrap(),
            workspace: workspace.tensor_mut(&[4096]).unwrap(),
        };
        spoil(&mut args, &mut spare).unwrap();
        let result = group_count(&device.stream().unwrap(), args);
        let error = result.err().unwrap_or_else(|| panic!("{what} was accepted"));
        assert!(error.to_string().starts_with("group_count: "), "{what}: {error}");
        assert_eq!(count.to_vec().unwrap(), [-7; 8], "{what}");
        error
    }

    /// `len` words over the start of another tensor.
    fn over<'a>(t: &View, len: u64) -> ferrotile::Result<TensorMut<'a>> {
        // SAFETY: the call that gets it is refused before anything is written.
        unsafe { TensorMut::from_raw(t.device(), t.ptr(), DType::I32, &[len], &[1]) }
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
        refuse!("a vector", |a, s| a.group_idx = s.wide.tensor(&[6])?, Error::Shape { arg: "group_idx", .. });
        refuse!("32-bit indices", |a, s| a.group_idx = s.words.tensor(&[3, 2])?, Error::DType { arg: "group_idx", .. });
        refuse!("gaps", |a, s| a.group_idx = s.wide.strided(&[3, 2], &[4, 1], 0)?, Error::Layout { arg: "group_idx", .. });
        refuse!("a matrix of counts", |a, s| a.count = s.words.tensor_mut(&[2, 4])?, Error::Shape { arg: "count", .. });
        refuse!("64-bit counts", |a, s| a.count = s.wide.tensor_mut(&[8])?, Error::DType { arg: "count", .. });
        refuse!("counts with gaps", |a, s| a.count = s.words.strided_mut(&[8], &[2], 0)?, Error::Layout { arg: "count", .. });
        refuse!("32769 groups", |a, s| a.count = s.words.tensor_mut(&[32_769])?, Error::Value { arg: "num_groups", .. });
        refuse!("a small workspace", |a, s| a.workspace = s.bytes.tensor_mut(&[63])?, Error::Shape { arg: "workspace", .. });
        refuse!("a workspace of words", |a, s| a.workspace = s.words.tensor_mut(&[999])?, Error::DType { arg: "workspace", .. });
        refuse!(
            "an odd workspace",
            |a, s| a.workspace = s.bytes.strided_mut(&[2048], &[1], 4)?,
            Error::Layout { arg: "workspace", .. }
        );
        refuse!("counts elsewhere", |a, s| a.count = s.elsewhere.tensor_mut(&[8])?, Error::DeviceMismatch { arg: "count", .. });
        refuse!(
            "counts over indices",
            |a, _| a.count = over(&a.group_idx, 8)?,
            Error::Overlap { a: "group_idx", b: "count", .. }
        );
        refuse!(
            "counts over the workspace",
            |a, _| a.count = over(&a.workspace, 8)?,
            Error::Overlap { a: "count", b: "workspace", .. }
        );
        // More than counts can hold; nothing is read.
        refuse!(
            "2^31 indices",
            |a, _| a.group_idx = {
                // SAFETY: refused before anything is read.
                unsafe {
                    ferrotile::TensorRef::from_raw(a.group_idx.device(), a.group_idx.ptr(), DType::I64, &[1 << 30, 2], &[2, 1])?
                }
            },
            Error::Value { arg: "num_tokens * num_topk", .. }
        );
    }

    #[test]
    fn no_groups_and_no_tokens() {
        let device = Device::emulator();
        let none = Problem { name: "no groups".into(), idx: vec![-1; 4], k: 2, bins: 0, offset: 0 };
        assert_eq!(launch::<i32>(&device, &none, CALL), Ok(vec![]));
        let none = Problem { name: "no tokens".into(), idx: vec![], k: 2, bins: 600, offset: 0 };
        assert_eq!(launch(&device, &none, CALL), Ok(vec![0i32; 600]));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn any_shape_and_place(t in 0u64..2000, k in 1u64..12, bins in 1u64..300, offset in 0u64..4, seed: u64) {
            let idx = Rng::new(seed).ints_i64((t * k) as usize, -2, bins as i64);
            let problem = Problem { name: String::new(), idx, k, bins, offset };
            prop_assert_eq!(launch(&Device::emulator(), &problem, CALL), Ok(reference(&problem)));
        }
    }
}
