//! aux_fi: reference, cases, checks and benchmark.

use super::common_count::{Buffers, Problem, check_graph, check_shared_workspace, each, launch, out_of_range};
use super::common_route::{bench_cases, moe};
use crate::support::bench::Row;
use crate::support::cases::MoeCase;
use crate::support::compare::{close_diff, equal};
use crate::support::golden::{self, Case, Golden};
use crate::support::suite::{Ctx, Report, Suite};
use ferrotile::moe::aux_fi::{Args, aux_fi};
use ferrotile::{Device, Stream, TensorMut, TensorRef};

/// The checks of this op.
pub const SUITE: Suite = Suite { op: "aux_fi", run };

/// `(f32(count) * f32(experts)) / f32(tokens * num_aux_topk)`, or 0 for an expert that nobody chose.
fn reference(problem: &Problem, num_aux_topk: u32) -> Vec<f32> {
    let denominator = (problem.tokens() * u64::from(num_aux_topk)) as f32;
    let load = |count: u32| if count == 0 { 0.0 } else { count as f32 * problem.bins as f32 / denominator };
    problem.counts().into_iter().map(load).collect()
}

/// The same without rounding.
fn exact(problem: &Problem, num_aux_topk: u32) -> Vec<f64> {
    let denominator = (problem.tokens() * u64::from(num_aux_topk)).max(1) as f64;
    problem.counts().into_iter().map(|count| f64::from(count) * problem.bins as f64 / denominator).collect()
}

/// The call with its three tensors.
fn call(num_aux_topk: u32) -> impl Fn(&Stream, TensorRef<'_>, TensorMut<'_>, TensorMut<'_>) -> ferrotile::Result<()> {
    move |stream, topk_idx, f, workspace| aux_fi(stream, Args { topk_idx, num_aux_topk, f, workspace })
}

fn compare(problem: &Problem, num_aux_topk: u32, got: &[f32]) -> Result<(), String> {
    let name = format!("{},ka={num_aux_topk}", problem.name);
    equal("f", &name, &[problem.bins], got, &reference(problem, num_aux_topk))?;
    if problem.idx.is_empty() {
        return Ok(());
    }
    // The bound of moe.md; counts beyond 2^24 do not occur.
    close_diff("f", &name, got, &exact(problem, num_aux_topk), 2e-7)
}

fn run(ctx: &Ctx) -> Result<Report, String> {
    let device = &ctx.device;
    each(ctx, |problem| {
        // moe.md has 1 and the number of choices; a large one makes the denominator round.
        [1, problem.k as u32, 123_457].iter().try_for_each(|&ka| compare(problem, ka, &launch(device, problem, &call(ka))?))
    })?;
    if ctx.case("out of range") {
        // Not on the checked emulator, which stops there.
        let unchecked = if device.is_emulator() { Device::emulator() } else { *device };
        let problem = out_of_range();
        compare(&problem, 2, &launch(&unchecked, &problem, &call(2))?)?;
    }
    if ctx.case("workspace") {
        check_shared_workspace(device, &call(3), |problem, got| compare(problem, 3, got))?;
    }
    let notes =
        golden::check_cases(ctx, &["group_count_aux_fi_mask_indices_by_tp"], |golden, case| check_golden(device, golden, case))?;
    if !device.is_emulator() && ctx.case("graph") {
        check_graph(device, &call(8), |problem, got| compare(problem, 8, got))?;
    }
    Ok(Report { notes, ..ctx.report() })
}

fn check_golden(device: &Device, golden: &Golden, case: &Case) -> Result<(), String> {
    let input = golden.tensor(case, "in/group_idx")?;
    let expected: Vec<f32> = golden.tensor(case, "out/aux")?.to_vec()?;
    let (k, bins, ka) = (input.shape[1], case.param("num_experts")?, case.param("num_aux_topk")?);
    let problem = Problem { name: case.name(), idx: input.to_vec()?, k, bins, offset: 0 };
    equal("reference", &problem.name, &[bins], &reference(&problem, ka), &expected)?;
    equal("f", &problem.name, &[bins], &launch(device, &problem, &call(ka))?, &expected)
}

/// Cases of the peers' own benchmark, small and large ones.
pub fn bench() -> Vec<Row> {
    let row = |case: MoeCase, num_aux_topk: u32| {
        let problem = Problem::of(&case);
        let MoeCase { num_send_tokens, num_topk, num_experts, num_ranks } = case;
        Row {
            op: "aux_fi",
            case: format!("e={num_experts},ep={num_ranks},k={num_topk},ka={num_aux_topk},send={num_send_tokens}"),
            bytes: 8 * problem.idx.len() as u64 + 4 * problem.bins,
            build: Box::new(move |device, _| {
                let mut buffers = Buffers::<f32>::new(device, &problem)?;
                Ok(Box::new(move |stream| buffers.call(stream, &call(num_aux_topk))))
            }),
        }
    };
    let mut rows: Vec<Row> = bench_cases().into_iter().map(|case| row(case, 8)).collect();
    rows.extend(bench_cases().into_iter().filter(|case| case.num_send_tokens == 4001).map(|case| row(case, 1)));
    rows.push(row(moe(65536, 8, 32, 8), 8));
    rows
}

#[cfg(test)]
mod tests {
    use super::super::common_route::stopped;
    use super::*;
    use crate::support::rng::Rng;
    use ferrotile::Error;
    use proptest::prelude::{ProptestConfig, prop_assert_eq, proptest};

    #[test]
    fn suite() {
        SUITE.test();
    }

    #[test]
    fn reference_is_the_definition() {
        let problem = Problem { name: String::new(), idx: vec![0, 2, 2, -1, 2, 0], k: 3, bins: 4, offset: 0 };
        assert_eq!(reference(&problem, 3), [8.0 / 6.0, 0.0, 2.0, 0.0]);
    }

    #[test]
    fn the_checked_emulator_reports_experts_out_of_range() {
        let device = Device::emulator().checked();
        let problem = Problem { name: String::new(), idx: vec![0, 2, -1, 3], k: 2, bins: 3, offset: 0 };
        let mut buffers = Buffers::<f32>::new(&device, &problem).unwrap();
        let stream = device.stream().unwrap();
        let result = buffers.call(&stream, &call(2)).and_then(|()| stream.synchronize());
        stopped("expert 3", result).unwrap();
    }

    /// The error of a call that may replace each tensor, and `f` afterwards is as it was.
    fn refused(what: &str, spoil: impl for<'a> Fn(&mut Args<'a>, &'a mut Spare) -> ferrotile::Result<()>) -> Error {
        let device = Device::emulator();
        let topk_idx = device.upload(&vec![1i64; 10_000]).unwrap();
        let mut f = device.upload(&[-7f32; 8]).unwrap();
        let mut workspace = device.zeros::<u8>(4096).unwrap();
        let mut spare = Spare {
            floats: device.zeros(40_000).unwrap(),
            wide: device.zeros(40_000).unwrap(),
            bytes: device.zeros(4096).unwrap(),
            elsewhere: Device::emulator().checked().zeros(4096).unwrap(),
        };
        let mut args = Args {
            topk_idx: topk_idx.tensor(&[5000, 2]).unwrap(),
            num_aux_topk: 2,
            f: f.tensor_mut(&[8]).unwrap(),
            workspace: workspace.tensor_mut(&[4096]).unwrap(),
        };
        spoil(&mut args, &mut spare).unwrap();
        let error = aux_fi(&device.stream().unwrap(), args).err().unwrap_or_else(|| panic!("{what} was accepted"));
        assert!(error.to_string().starts_with("aux_fi: "), "{what}: {error}");
        assert_eq!(f.to_vec().unwrap(), [-7.0; 8], "{what}");
        error
    }

    /// Tensors to put where they do not belong.
    struct Spare {
        floats: ferrotile::Buffer<f32>,
        wide: ferrotile::Buffer<i64>,
        bytes: ferrotile::Buffer<u8>,
        elsewhere: ferrotile::Buffer<u8>,
    }

    #[test]
    fn bad_input_is_refused_and_nothing_is_written() {
        macro_rules! refuse {
            ($what:literal, |$a:pat_param, $s:pat_param| $set:expr, $error:pat) => {
                let error = refused($what, |$a, $s| {
                    $set;
                    Ok(())
                });
                assert!(matches!(error, $error), "{}: {error:?}", $what);
            };
        }
        refuse!("no choices to divide by", |a, _| a.num_aux_topk = 0, Error::Value { arg: "num_aux_topk", .. });
        refuse!("a vector", |a, s| a.topk_idx = s.wide.tensor(&[6])?, Error::Shape { arg: "topk_idx", .. });
        refuse!("floats as indices", |a, s| a.topk_idx = s.floats.tensor(&[3, 2])?, Error::DType { arg: "topk_idx", .. });
        refuse!("gaps", |a, s| a.topk_idx = s.wide.strided(&[3, 2], &[4, 1], 0)?, Error::Layout { arg: "topk_idx", .. });
        refuse!("a matrix", |a, s| a.f = s.floats.tensor_mut(&[2, 4])?, Error::Shape { arg: "f", .. });
        refuse!("integers", |a, s| a.f = s.wide.tensor_mut(&[8])?, Error::DType { arg: "f", .. });
        refuse!("32769 experts", |a, s| a.f = s.floats.tensor_mut(&[32_769])?, Error::Value { arg: "num_experts", .. });
        refuse!("a small workspace", |a, s| a.workspace = s.bytes.tensor_mut(&[63])?, Error::Shape { arg: "workspace", .. });
        refuse!(
            "a workspace elsewhere",
            |a, s| a.workspace = s.elsewhere.tensor_mut(&[4096])?,
            Error::DeviceMismatch { arg: "workspace", .. }
        );
        refuse!(
            "f over the indices",
            |a, _| a.f = {
                // SAFETY: refused before anything is written.
                unsafe { TensorMut::from_raw(a.topk_idx.device(), a.topk_idx.ptr(), ferrotile::DType::F32, &[8], &[1])? }
            },
            Error::Overlap { a: "topk_idx", b: "f", .. }
        );
    }

    #[test]
    fn no_tokens_and_no_choices_are_zeros() {
        let device = Device::emulator();
        let none = Problem { name: "no tokens".into(), idx: vec![], k: 2, bins: 600, offset: 0 };
        assert_eq!(launch(&device, &none, &call(1)), Ok(vec![0f32; 600]));
        // Tokens, but no choices.
        let idx = device.zeros::<i64>(1).unwrap();
        let mut f = device.upload(&[-7f32; 8]).unwrap();
        let mut workspace = device.zeros::<u8>(0).unwrap();
        let args = Args {
            topk_idx: idx.tensor(&[5, 0]).unwrap(),
            num_aux_topk: 1,
            f: f.tensor_mut(&[8]).unwrap(),
            workspace: workspace.tensor_mut(&[0]).unwrap(),
        };
        aux_fi(&device.stream().unwrap(), args).unwrap();
        assert_eq!(f.to_vec().unwrap(), [0.0; 8]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn any_shape_place_and_divisor(t in 0u64..2000, k in 1u64..12, e in 1u64..300, ka in 1u32..100, offset in 0u64..4, seed: u64) {
            let idx = Rng::new(seed).ints_i64((t * k) as usize, -2, e as i64);
            let problem = Problem { name: String::new(), idx, k, bins: e, offset };
            prop_assert_eq!(launch(&Device::emulator(), &problem, &call(ka)), Ok(reference(&problem, ka)));
        }
    }
}
