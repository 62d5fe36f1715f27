//! Case lists of the specifications, as data.

use super::rng::Rng;
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

/// How much to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// Small shapes that the checked emulator runs in moments; every option of an op is still visited.
    Small,
    /// The grids of the specifications, for a GPU.
    Full,
}

/// Token counts of the specifications.
pub const TOKENS: [u64; 2] = [4001, 8001];

/// Hidden sizes of the specifications.
pub const HIDDENS: [u64; 7] = [576, 2048, 2560, 3072, 4096, 6144, 7168];

/// `values` in rows of `columns` that lie `stride` elements apart, from element `offset` on; what lies between is `between`.
pub fn rows_apart<T: Copy>(values: &[T], columns: u64, (stride, offset): (u64, u64), between: T) -> Vec<T> {
    if (stride, offset) == (columns, 0) {
        return values.to_vec();
    }
    let rows = (values.len() as u64).checked_div(columns).unwrap_or(0);
    let len = if rows == 0 { offset } else { offset + (rows - 1) * stride + columns };
    let mut all = vec![between; len as usize];
    for (row, values) in values.chunks_exact(columns.max(1) as usize).enumerate() {
        let start = (offset + row as u64 * stride) as usize;
        all[start..start + values.len()].copy_from_slice(values);
    }
    all
}

/// Pairs (num_tokens, hidden) with `hidden % divisor == 0` and num_tokens rounded up to `alignment`. Both depths have an empty and a
/// one-token case, an odd token count, and the largest hidden size.
pub fn shapes(depth: Depth, alignment: u64, divisor: u64) -> Vec<(u64, u64)> {
    let all: Vec<(u64, u64)> = match depth {
        // 384 and 2048 stand in where 576 has no such divisor.
        Depth::Small => vec![(0, 384), (1, 7168), (5, 2048), (37, 576), (37, 384)],
        Depth::Full => HIDDENS.iter().flat_map(|h| [0, 1].iter().chain(&TOKENS).map(|t| (*t, *h))).collect(),
    };
    let mut shapes: Vec<(u64, u64)> =
        all.into_iter().filter(|(_, h)| h % divisor == 0).map(|(t, h)| (t.next_multiple_of(alignment), h)).collect();
    // Rounding up makes some counts equal.
    shapes.dedup();
    shapes
}

/// One row of the MoE grid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MoeCase {
    /// Tokens each rank sends.
    pub num_send_tokens: u64,
    /// Experts a token goes to.
    pub num_topk: u64,
    /// Experts of one rank.
    pub num_experts: u64,
    /// Expert-parallel ranks.
    pub num_ranks: u64,
}

/// The grid: every top-k with every pair of expert count and rank count where the ranks divide the experts.
fn moe_grid(topks: &[u64], experts: &[u64], ranks: &[u64]) -> Vec<MoeCase> {
    let mut cases = Vec::new();
    for &num_topk in topks {
        for &global in experts {
            for &num_ranks in ranks.iter().filter(|r| global.is_multiple_of(**r)) {
                cases.push(MoeCase { num_send_tokens: 4001, num_topk, num_experts: global / num_ranks, num_ranks });
            }
        }
    }
    cases
}

/// The 12 cases of 1.0.0, which its benchmarks use.
pub fn moe_bench_cases() -> Vec<MoeCase> {
    moe_grid(&[2, 6, 8, 9], &[72, 256], &[8, 64])
}

/// The MoE grid: at full depth the empty case and the 78 cases of 1.0.0's full mode.
pub fn moe_cases(depth: Depth) -> Vec<MoeCase> {
    let empty = MoeCase { num_send_tokens: 0, num_topk: 1, num_experts: 1, num_ranks: 1 };
    let small = |num_send_tokens, num_topk, num_experts, num_ranks| MoeCase { num_send_tokens, num_topk, num_experts, num_ranks };
    let mut cases = vec![empty];
    match depth {
        // One expert, one token, more experts than tokens, more ranks than a token reaches, no `-1` at all.
        Depth::Small => cases.extend([
            small(5, 1, 1, 1),
            small(1, 8, 256, 8),
            small(61, 6, 9, 8),
            small(33, 9, 32, 8),
            small(67, 2, 4, 64),
            small(51, 7, 72, 1),
        ]),
        Depth::Full => cases.extend(moe_grid(&[1, 2, 6, 7, 8, 9], &[72, 256, 288, 384], &[1, 8, 64, 72, 256])),
    }
    cases
}

impl MoeCase {
    /// The parameters as text; also the seed of the case's data.
    pub fn name(&self) -> String {
        let Self { num_send_tokens, num_topk, num_experts, num_ranks } = self;
        format!("t={num_send_tokens},k={num_topk},e={num_experts},ep={num_ranks}")
    }

    /// What rank 0 receives: slot indices of shape (num_tokens, num_topk), row-major. Each of the `num_send_tokens * num_ranks`
    /// tokens picks `num_topk` different experts out of all ranks' at random; experts of other ranks become -1, and tokens with no
    /// expert here are dropped. Drawn once.
    pub fn topk_idx(&self) -> Vec<i64> {
        static DRAWN: Mutex<Option<HashMap<MoeCase, Vec<i64>>>> = Mutex::new(None);
        let mut drawn = DRAWN.lock().unwrap_or_else(PoisonError::into_inner);
        drawn.get_or_insert_default().entry(*self).or_insert_with(|| self.draw()).clone()
    }

    fn draw(&self) -> Vec<i64> {
        let rng = Rng::named(&self.name());
        let total = self.num_experts * self.num_ranks;
        assert!(self.num_topk <= total, "{}: more slots than experts", self.name());
        let mut out = Vec::new();
        let mut slots = Vec::with_capacity(self.num_topk as usize);
        for token in 0..self.num_send_tokens * self.num_ranks {
            let draws = rng.stream(token);
            slots.clear();
            let mut draw = 0;
            while slots.len() < self.num_topk as usize {
                let expert = draws.below(draw, total) as i64;
                draw += 1;
                if !slots.contains(&expert) {
                    slots.push(expert);
                }
            }
            if slots.iter().any(|e| *e < self.num_experts as i64) {
                out.extend(slots.iter().map(|e| if *e < self.num_experts as i64 { *e } else { -1 }));
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_keep_divisor_alignment_and_edges() {
        for depth in [Depth::Small, Depth::Full] {
            for (alignment, divisor) in [(1, 64), (64, 64), (128, 128), (1, 256)] {
                let shapes = shapes(depth, alignment, divisor);
                assert!(shapes.iter().all(|(t, h)| t % alignment == 0 && h % divisor == 0));
                assert!(shapes.iter().any(|(t, _)| *t == 0) || divisor == 256, "{depth:?} {alignment} {divisor}");
                assert!(shapes.iter().any(|(_, h)| *h == 7168));
                assert!(shapes.iter().any(|(t, _)| *t > 0));
            }
        }
        assert_eq!(shapes(Depth::Full, 1, 64).len(), 28);
        assert_eq!(shapes(Depth::Full, 128, 128)[..4], [(0, 2048), (128, 2048), (4096, 2048), (8064, 2048)]);
    }

    #[test]
    fn moe_grid_has_the_cases_of_the_specification() {
        assert_eq!(moe_bench_cases().len(), 12);
        let full = moe_cases(Depth::Full);
        assert_eq!(full.len(), 79);
        assert!(moe_bench_cases().iter().all(|c| full.contains(c)));
        let pair = |e, ep| full.iter().filter(|c| c.num_experts == e && c.num_ranks == ep).count();
        assert_eq!((pair(4, 64), pair(1, 256), pair(288, 1), pair(1, 72)), (6, 6, 6, 6));
    }

    #[test]
    fn slots_are_distinct_and_as_many_as_the_specification_says() {
        // (experts, ranks): tokens and valid slots for top-k 2, 6, 8, 9.
        let table = [
            (9, 8, [(7551, 8002), (18088, 24006), (21651, 32008), (23107, 36009)]),
            (32, 8, [(7516, 8002), (17765, 24006), (21184, 32008), (22581, 36009)]),
            (4, 64, [(7955, 8002), (23307, 24006), (30711, 32008), (34345, 36009)]),
        ];
        for (num_experts, num_ranks, expected) in table {
            for (num_topk, (tokens, valid)) in [2, 6, 8, 9].into_iter().zip(expected) {
                let case = MoeCase { num_send_tokens: 4001, num_topk, num_experts, num_ranks };
                let idx = case.topk_idx();
                let rows = idx.chunks_exact(num_topk as usize);
                assert_eq!(rows.remainder().len(), 0);
                let near = |got: usize, mean: f64, what: &str| {
                    let bound = 6.0 * mean.sqrt();
                    assert!((got as f64 - mean).abs() < bound, "{} {what}: {got}, expected {mean} within {bound}", case.name());
                };
                near(rows.len(), tokens as f64, "tokens");
                near(idx.iter().filter(|e| **e >= 0).count(), valid as f64, "valid slots");
                for row in rows {
                    let mut kept: Vec<i64> = row.iter().copied().filter(|e| *e >= 0).collect();
                    assert!(!kept.is_empty() && row.iter().all(|e| (-1..num_experts as i64).contains(e)));
                    kept.sort_unstable();
                    assert!(kept.windows(2).all(|pair| pair[0] < pair[1]), "{row:?} repeats an expert");
                }
            }
        }
    }

    #[test]
    fn empty_and_dense_cases() {
        assert!(moe_cases(Depth::Small)[0].topk_idx().is_empty());
        let all_here = MoeCase { num_send_tokens: 51, num_topk: 7, num_experts: 72, num_ranks: 1 };
        assert_eq!(all_here.topk_idx().len(), 51 * 7);
        assert!(all_here.topk_idx().iter().all(|e| *e >= 0));
    }
}
