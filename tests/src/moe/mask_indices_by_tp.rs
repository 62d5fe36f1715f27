//! mask_indices_by_tp: reference, cases, checks and benchmark.

use super::common_route::{PAIRS, grid, inside, moe, prefilled, uploaded};
use crate::support::bench::Row;
use crate::support::cases::{Depth, MoeCase};
use crate::support::compare::{Bits, equal};
use crate::support::golden::{self, Case, Golden};
use crate::support::rng::Rng;
use crate::support::suite::{Ctx, Report, Suite, text};
use ferrotile::moe::mask_indices_by_tp::{Args, mask_indices_by_tp};
use ferrotile::{Buffer, Device, Element, Stream};

/// The checks of this op.
pub const SUITE: Suite = Suite { op: "mask_indices_by_tp", run };

/// Which experts are where.
#[derive(Clone, Copy, Debug)]
struct Ranks {
    n: u64,
    ep: u64,
    rank: u64,
    tp: u64,
}

impl Ranks {
    /// The index on the rank, or -1.
    fn local(self, v: i64) -> i64 {
        let size = (self.n / self.ep) as i64;
        if v < 0 || v >= self.n as i64 {
            return -1;
        }
        let (group, place) = (v / size, v % size);
        if group % self.tp as i64 == self.rank as i64 { group / self.tp as i64 * size + place } else { -1 }
    }

    /// The same by subtractions, as 1.0.0 has it; for indices in range.
    #[cfg(test)]
    fn local_by_subtraction(self, v: i64) -> i64 {
        let (size, tp) = ((self.n / self.ep) as i64, self.tp as i64);
        let v = v - self.rank as i64 * size;
        // An index of a rank before this one in its round is negative from here on, or not in this rank's groups.
        if v < 0 || v % (tp * size) >= size {
            return -1;
        }
        v - v / (tp * size) * (tp - 1) * size
    }
}

fn reference(indices: &[i64], ranks: Ranks) -> Vec<i64> {
    indices.iter().map(|v| ranks.local(*v)).collect()
}

/// An element type of the indices.
trait Index: Element + Bits + TryFrom<i64> + Into<i64> {}
impl Index for i32 {}
impl Index for i64 {}

/// Everything a launch needs. The indices start at one offset, the output at another.
struct Buffers<T> {
    indices: Buffer<T>,
    out: Buffer<T>,
    shape: [u64; 2],
    offsets: [u64; 2],
}

impl<T: Index> Buffers<T> {
    fn new(device: &Device, indices: &[i64], k: u64, offsets: [u64; 2]) -> Result<Self, String> {
        let narrow: Result<Vec<T>, _> = indices.iter().map(|v| T::try_from(*v)).collect();
        let narrow = narrow.map_err(|_| "an index does not fit its type".to_owned())?;
        let n = indices.len() as u64;
        Ok(Self {
            indices: uploaded(device, &narrow, offsets[0])?,
            out: prefilled(device, n, offsets[1])?,
            shape: [n / k, k],
            offsets,
        })
    }

    fn call(&mut self, stream: &Stream, ranks: Ranks) -> ferrotile::Result<()> {
        let ([t, k], [from, to]) = (self.shape, self.offsets);
        let args = Args {
            indices: self.indices.strided(&[t, k], &[k, 1], from)?,
            num_experts: ranks.n,
            num_ep_ranks: ranks.ep,
            tp_rank: ranks.rank,
            num_tp_ranks: ranks.tp,
            out: self.out.strided_mut(&[t, k], &[k, 1], to)?,
        };
        mask_indices_by_tp(stream, args)
    }

    fn read(&self, name: &str) -> Result<Vec<i64>, String> {
        let len = self.shape[0] * self.shape[1];
        Ok(inside("out", name, &self.out, len, self.offsets[1])?.into_iter().map(Into::into).collect())
    }
}

fn check_as<T: Index>(
    device: &Device,
    indices: &[i64],
    k: u64,
    ranks: Ranks,
    offsets: [u64; 2],
    name: &str,
) -> Result<(), String> {
    let name = format!("{name},{ranks:?},{offsets:?},{}-bit", 8 * size_of::<T>());
    let stream = device.stream().map_err(text)?;
    let mut buffers = Buffers::<T>::new(device, indices, k, offsets)?;
    buffers.call(&stream, ranks).map_err(text)?;
    stream.synchronize().map_err(text)?;
    equal("out", &name, &buffers.shape, &buffers.read(&name)?, &reference(indices, ranks))
}

fn check(device: &Device, indices: &[i64], k: u64, ranks: Ranks, offsets: [u64; 2], name: &str) -> Result<(), String> {
    check_as::<i64>(device, indices, k, ranks, offsets, name)?;
    check_as::<i32>(device, indices, k, ranks, offsets, name)
}

fn run(ctx: &Ctx) -> Result<Report, String> {
    let device = &ctx.device;
    for case in grid(ctx.depth) {
        if !ctx.case(&case.name()) {
            continue;
        }
        let MoeCase { num_topk: k, num_experts, num_ranks: ep, .. } = case;
        let (n, rng) = (num_experts * ep, Rng::named(&case.name()));
        let here = case.topk_idx();
        // Indices of this rank are below its number of experts; those of all ranks below `n`.
        let everywhere = rng.ints_i64(here.len(), -1, n as i64);
        for (i, tp) in [2, 4, 8].into_iter().enumerate() {
            let ranks = Ranks { n, ep, rank: rng.stream(1).below(i as u64, tp), tp };
            check(device, &here, k, Ranks { rank: 0, ..ranks }, [0, 0], &case.name())?;
            check(device, &everywhere, k, ranks, [0, 0], &case.name())?;
        }
    }
    // Experts, their ranks and the tensor-parallel ranks at the edges, where divisions by multiplication would go wrong first.
    const MOST: u64 = i32::MAX as u64;
    let specials = [
        Ranks { n: 1, ep: 1, rank: 0, tp: 1 },
        Ranks { n: 7, ep: 7, rank: 2, tp: 3 },
        Ranks { n: 103, ep: 8, rank: 1, tp: 2 },
        Ranks { n: MOST, ep: 1, rank: 0, tp: 1 },
        Ranks { n: MOST, ep: MOST, rank: 5, tp: 7 },
        Ranks { n: MOST, ep: MOST, rank: MOST - 1, tp: MOST },
        Ranks { n: MOST, ep: 3, rank: 1, tp: 2 },
        Ranks { n: MOST, ep: (1 << 20) + 1, rank: 77, tp: 1000 },
        Ranks { n: MOST - 1, ep: 1 << 15, rank: 2, tp: 3 },
    ];
    let len = if ctx.depth == Depth::Full { 1_000_003 } else { 1_003 };
    for ranks in specials {
        let name = format!("{ranks:?}");
        if !ctx.case(&name) {
            continue;
        }
        let (rng, n) = (Rng::named(&name), ranks.n as i64);
        // Multiples of the group size and their neighbours, the largest index, and any.
        let size = n / ranks.ep as i64;
        let indices = rng.fill(len, |rng, i| {
            let any = rng.stream(1).below(i, ranks.n) as i64;
            let near = any / size * size;
            [any, near, (near - 1).max(0), n - 1, -1, 0][rng.below(i, 6) as usize]
        });
        for offsets in [[0, 0], [1, 0], [0, 3], [4, 8]] {
            check(device, &indices, 1, ranks, offsets, "special")?;
        }
    }
    for len in [0, 1, 2, 3, 4, 5, 255, 511, 513, 1025] {
        let name = format!("n={len}");
        if ctx.case(&name) {
            let indices = Rng::named(&name).ints_i64(len, -1, 64);
            check(device, &indices, 1, Ranks { n: 64, ep: 8, rank: 1, tp: 2 }, [0, 0], &name)?;
        }
    }
    if ctx.case("out of range") {
        // Not on the checked emulator, which stops there.
        let unchecked = if device.is_emulator() { Device::emulator() } else { *device };
        let ranks = Ranks { n: 64, ep: 8, rank: 0, tp: 2 };
        let wide = [64, 65, 1 << 31, 1 << 32, (1 << 32) + 3, i64::MAX, i64::MIN, -2, 3];
        check_as::<i64>(&unchecked, &wide, 3, ranks, [0, 0], "out of range")?;
        check(&unchecked, &[64, 65, i32::MAX as i64, i32::MIN as i64, -2, 3], 3, ranks, [0, 0], "out of range")?;
    }
    let notes =
        golden::check_cases(ctx, &["group_count_aux_fi_mask_indices_by_tp"], |golden, case| check_golden(device, golden, case))?;
    if !device.is_emulator() && ctx.case("graph") {
        check_graph(device)?;
    }
    Ok(Report { notes, ..ctx.report() })
}

fn check_golden(device: &Device, golden: &Golden, case: &Case) -> Result<(), String> {
    let input = golden.tensor(case, "in/group_idx")?;
    let indices: Vec<i64> = input.to_vec()?;
    let (n, ep, tp) = (case.param("n")?, case.param("num_ep_ranks")?, case.param("num_tp_ranks")?);
    for rank in 0..tp {
        let ranks = Ranks { n, ep, rank, tp };
        let expected: Vec<i64> = golden.tensor(case, &format!("out/tp.{rank}"))?.to_vec()?;
        equal("reference", &case.name(), &input.shape, &reference(&indices, ranks), &expected)?;
        check(device, &indices, input.shape[1], ranks, [0, 0], &case.name())?;
    }
    Ok(())
}

/// A captured launch does its work at every replay, on the data that are there then.
fn check_graph(device: &Device) -> Result<(), String> {
    let ranks = Ranks { n: 64, ep: 8, rank: 1, tp: 2 };
    let stream = device.stream().map_err(text)?;
    let mut buffers = Buffers::<i64>::new(device, &[0; 800], 8, [0, 0])?;
    // Compiled before the capture.
    buffers.call(&stream, ranks).map_err(text)?;
    let graph = stream.capture(|stream| buffers.call(stream, ranks)).map_err(text)?;
    for seed in 0..3 {
        let (name, indices) = (format!("graph, replay {seed}"), Rng::new(seed).ints_i64(800, -1, 64));
        let mut all = buffers.indices.to_vec().map_err(text)?;
        all[..800].copy_from_slice(&indices);
        buffers.indices.copy_from(&all).map_err(text)?;
        graph.launch(&stream).map_err(text)?;
        stream.synchronize().map_err(text)?;
        equal("out", &name, &buffers.shape, &buffers.read(&name)?, &reference(&indices, ranks))?;
    }
    Ok(())
}

/// Cases of the peers' own benchmark, and small ones.
pub fn bench() -> Vec<Row> {
    let row = |case: MoeCase, tp: u64| {
        let MoeCase { num_send_tokens, num_topk, num_experts, num_ranks } = case;
        let indices = case.topk_idx();
        let ranks = Ranks { n: num_experts * num_ranks, ep: num_ranks, rank: 0, tp };
        Row {
            op: "mask_indices_by_tp",
            case: format!("e={num_experts},ep={num_ranks},k={num_topk},send={num_send_tokens},tp={tp}"),
            bytes: 16 * indices.len() as u64,
            build: Box::new(move |device, _| {
                let mut buffers = Buffers::<i64>::new(device, &indices, num_topk, [0, 0])?;
                Ok(Box::new(move |stream| buffers.call(stream, ranks)))
            }),
        }
    };
    let mut rows = Vec::new();
    for (e, ep) in PAIRS {
        rows.extend([2, 4, 8].map(|tp| row(moe(4001, 8, e, ep), tp)));
    }
    rows.extend([1, 16, 128, 65536].map(|send| row(moe(send, 8, 32, 8), 4)));
    rows
}

#[cfg(test)]
mod tests {
    use super::super::common_route::stopped;
    use super::*;
    use ferrotile::{DType, Error};
    use proptest::prelude::{ProptestConfig, prop_assert_eq, proptest};

    #[test]
    fn suite() {
        SUITE.test();
    }

    #[test]
    fn reference_is_the_definition() {
        // Groups of 9; rank 1 of 2 has the groups 1, 3, 5 and 7.
        let ranks = Ranks { n: 72, ep: 8, rank: 1, tp: 2 };
        assert_eq!(reference(&[-1, 0, 9, 17, 18, 27, 71, -5], ranks), [-1, -1, 0, 8, -1, 9, 35, -1]);
        for tp in 1..9 {
            for rank in 0..tp {
                for (n, ep) in [(72, 8), (64, 64), (103, 8), (5, 1)] {
                    let ranks = Ranks { n, ep, rank, tp };
                    assert!((-1..n as i64).all(|v| ranks.local(v) == ranks.local_by_subtraction(v)), "{ranks:?}");
                }
            }
        }
    }

    #[test]
    fn division_by_multiplication_is_exact() {
        use ferrotile_kernels::moe::mask_indices_by_tp::Divisor;
        const MOST: u32 = i32::MAX as u32;
        let powers = (0..31).flat_map(|bit| [(1u32 << bit) - 1, 1 << bit, (1 << bit) + 1]);
        let rng = Rng::named("divisors");
        let divisors = powers.chain((1..300).map(|i| 1 + (rng.bits(i) as u32 & MOST) % MOST)).chain([MOST]);
        for divisor in divisors.filter(|d| (1..=MOST).contains(d)) {
            let by = Divisor::new(divisor);
            for i in 0..300 {
                // Just below, at and above a multiple, and the ends.
                let multiple = rng.stream(1).bits(i) as u32 % (MOST / divisor + 1) * divisor;
                for n in
                    [multiple.saturating_sub(1), multiple, (multiple + 1).min(MOST), rng.stream(2).bits(i) as u32 & MOST, MOST]
                {
                    assert_eq!(by.divide(n), n / divisor, "{n} / {divisor}");
                }
            }
        }
    }

    #[test]
    fn the_checked_emulator_reports_experts_out_of_range() {
        for expert in [64, 1 << 32, i64::MAX] {
            let device = Device::emulator().checked();
            let mut buffers = Buffers::<i64>::new(&device, &[0, 63, -1, expert], 2, [0, 0]).unwrap();
            let stream = device.stream().unwrap();
            let result = buffers.call(&stream, Ranks { n: 64, ep: 8, rank: 0, tp: 2 }).and_then(|()| stream.synchronize());
            stopped(&format!("expert {expert}"), result).unwrap();
        }
    }

    #[test]
    fn bad_input_is_refused_and_nothing_is_written() {
        let (device, other) = (Device::emulator(), Device::emulator().checked());
        let stream = device.stream().unwrap();
        let indices = device.upload(&[1i64; 64]).unwrap();
        let floats = device.upload(&[1f32; 64]).unwrap();
        let narrow = device.upload(&[1i32; 64]).unwrap();
        let elsewhere = other.upload(&[1i64; 64]).unwrap();
        let refused = |what: &str, spoil: &dyn Fn(&mut Args<'_>)| {
            let mut out = device.upload(&[-7i64; 64]).unwrap();
            let mut args = Args {
                indices: indices.tensor(&[8, 8]).unwrap(),
                num_experts: 64,
                num_ep_ranks: 8,
                tp_rank: 1,
                num_tp_ranks: 2,
                out: out.tensor_mut(&[8, 8]).unwrap(),
            };
            spoil(&mut args);
            let error = mask_indices_by_tp(&stream, args).err().unwrap_or_else(|| panic!("{what} was accepted"));
            assert!(error.to_string().starts_with("mask_indices_by_tp: "), "{what}: {error}");
            assert_eq!(out.to_vec().unwrap(), [-7; 64], "{what}");
            error
        };
        macro_rules! refuse {
            ($what:literal, |$a:ident| $set:expr, $error:pat) => {
                // SAFETY of tensors from raw addresses: refused before anything is read or written.
                let error = refused($what, &|$a: &mut Args<'_>| $set);
                assert!(matches!(error, $error), "{}: {error:?}", $what);
            };
        }
        // SAFETY: see above.
        let from = |buffer: u64, device: &Device, dtype, shape: &[u64], strides: &[u64]| unsafe {
            ferrotile::TensorRef::from_raw(device, buffer, dtype, shape, strides).unwrap()
        };
        // SAFETY: see above.
        let to = |buffer: u64, dtype, shape: &[u64], strides: &[u64]| unsafe {
            ferrotile::TensorMut::from_raw(&device, buffer, dtype, shape, strides).unwrap()
        };
        let (i, f, n) = (indices.as_ptr(), floats.as_ptr(), narrow.as_ptr());
        refuse!("a vector", |a| a.indices = from(i, &device, DType::I64, &[64], &[1]), Error::Shape { arg: "indices", .. });
        refuse!("floats", |a| a.indices = from(f, &device, DType::F32, &[8, 8], &[8, 1]), Error::DType { arg: "indices", .. });
        refuse!("gaps", |a| a.indices = from(i, &device, DType::I64, &[4, 8], &[9, 1]), Error::Layout { arg: "indices", .. });
        refuse!("another type", |a| a.out = to(n, DType::I32, &[8, 8], &[8, 1]), Error::DType { arg: "out", .. });
        refuse!("another shape", |a| a.out = to(i, DType::I64, &[4, 8], &[8, 1]), Error::Shape { arg: "out", .. });
        refuse!("columns", |a| a.out = to(i, DType::I64, &[8, 8], &[1, 8]), Error::Layout { arg: "out", .. });
        refuse!("over the input", |a| a.out = to(i + 8, DType::I64, &[8, 8], &[8, 1]), Error::Overlap { .. });
        refuse!(
            "elsewhere",
            |a| a.indices = from(elsewhere.as_ptr(), &other, DType::I64, &[8, 8], &[8, 1]),
            Error::DeviceMismatch { arg: "indices", .. }
        );
        refuse!("no experts", |a| a.num_experts = 0, Error::Value { arg: "num_experts", .. });
        refuse!("2^31 experts", |a| a.num_experts = 1 << 31, Error::Value { arg: "num_experts", .. });
        refuse!("no ranks", |a| a.num_ep_ranks = 0, Error::Value { arg: "num_ep_ranks", .. });
        refuse!("ranks without experts", |a| a.num_ep_ranks = 65, Error::Value { arg: "num_ep_ranks", .. });
        refuse!("rank 2 of 2", |a| a.tp_rank = 2, Error::Value { arg: "tp_rank", .. });
        refuse!("rank 0 of 0", |a| (a.tp_rank, a.num_tp_ranks) = (0, 0), Error::Value { arg: "num_tp_ranks", .. });
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn any_ranks_and_place(
            len in 0usize..2000, n in 1u64..1 << 31, ep: u64, tp in 1u64..70, rank: u64, few: bool, from in 0u64..5, to in 0u64..5, seed: u64,
        ) {
            let n = if few { n % 500 + 1 } else { n };
            let ranks = Ranks { n, ep: ep % n + 1, rank: rank % tp, tp };
            let indices = Rng::new(seed).ints_i64(len, -2, n as i64);
            prop_assert_eq!(check(&Device::emulator(), &indices, 1, ranks, [from, to], "random"), Ok(()));
        }
    }
}
