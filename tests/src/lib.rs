//! References, tests and benchmarks of ferrotile.
//!
//! One file per op, `src/<family>/<op>.rs`, with its reference, cases and checks, and its `SUITE`. [`suites`] lists them for the `check` binary,
//! which runs on machines without Rust; `cargo test` runs the same functions on the emulator.

pub mod device;
pub mod mhc;
pub mod moe;
#[cfg(test)]
mod numerics;
pub mod quant;
pub mod rand;
pub mod support;
pub mod transform;
pub mod transpose;

use support::bench::Row;
use support::suite::Suite;

/// The README's code, as a doc test.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
pub struct Readme;

/// The checks of every op.
pub fn suites() -> Vec<Suite> {
    vec![
        device::layer::SUITE,
        mhc::mhc_post_fwd::SUITE,
        moe::aux_fi::SUITE,
        moe::expand_to_fused::SUITE,
        moe::get_fused_mapping::SUITE,
        moe::group_count::SUITE,
        moe::inplace_unique_group_indices::SUITE,
        moe::mask_indices_by_tp::SUITE,
        moe::moe_topk_gate_backward::SUITE,
        moe::moe_topk_gate_forward::SUITE,
        moe::normalize_weight::SUITE,
        moe::reduce_fused::SUITE,
        moe::reduce_fused_backward::SUITE,
        moe::router::SUITE,
        moe::top2_sum_gate::SUITE,
        moe::topk_gate::SUITE,
        moe::topk_sum_and_topk_group_idx::SUITE,
        quant::batched_transpose_weight_sf::SUITE,
        quant::cast::SUITE,
        quant::cast_back::SUITE,
        quant::cast_back_e5m6::SUITE,
        quant::convert_sf::SUITE,
        quant::norm_backward::SUITE,
        quant::norm_forward::SUITE,
        quant::norm_forward_and_per_token_cast::SUITE,
        quant::per_block_cast::SUITE,
        quant::per_block_cast_lossless::SUITE,
        quant::per_channel_cast::SUITE,
        quant::per_channel_cast_and_transpose::SUITE,
        quant::per_channel_cast_fused::SUITE,
        quant::per_token_cast::SUITE,
        quant::per_token_cast_and_cast_back::SUITE,
        quant::per_token_cast_to_e5m6::SUITE,
        quant::swiglu_backward::SUITE,
        quant::swiglu_backward_and_per_token_cast::SUITE,
        quant::swiglu_forward::SUITE,
        quant::swiglu_forward_and_per_channel_cast_and_transpose::SUITE,
        quant::swiglu_forward_and_per_token_cast::SUITE,
        rand::randn::SUITE,
        transform::apply_rotary::SUITE,
        transpose::batched_transpose::SUITE,
    ]
}

/// The benchmark rows of every op.
pub fn benches() -> Vec<Row> {
    let per_op: Vec<Vec<Row>> = vec![
        mhc::mhc_post_fwd::bench(),
        moe::aux_fi::bench(),
        moe::expand_to_fused::bench(),
        moe::get_fused_mapping::bench(),
        moe::group_count::bench(),
        moe::inplace_unique_group_indices::bench(),
        moe::mask_indices_by_tp::bench(),
        moe::moe_topk_gate_backward::bench(),
        moe::moe_topk_gate_forward::bench(),
        moe::normalize_weight::bench(),
        moe::reduce_fused::bench(),
        moe::reduce_fused_backward::bench(),
        moe::router::bench(),
        moe::top2_sum_gate::bench(),
        moe::topk_gate::bench(),
        moe::topk_sum_and_topk_group_idx::bench(),
        quant::batched_transpose_weight_sf::bench(),
        quant::cast::bench(),
        quant::cast_back::bench(),
        quant::cast_back_e5m6::bench(),
        quant::convert_sf::bench(),
        quant::norm_backward::bench(),
        quant::norm_forward::bench(),
        quant::norm_forward_and_per_token_cast::bench(),
        quant::per_block_cast::bench(),
        quant::per_block_cast_lossless::bench(),
        quant::per_channel_cast::bench(),
        quant::per_channel_cast_and_transpose::bench(),
        quant::per_channel_cast_fused::bench(),
        quant::per_token_cast::bench(),
        quant::per_token_cast_and_cast_back::bench(),
        quant::per_token_cast_to_e5m6::bench(),
        quant::swiglu_backward::bench(),
        quant::swiglu_backward_and_per_token_cast::bench(),
        quant::swiglu_forward::bench(),
        quant::swiglu_forward_and_per_channel_cast_and_transpose::bench(),
        quant::swiglu_forward_and_per_token_cast::bench(),
        rand::randn::bench(),
        transform::apply_rotary::bench(),
        transpose::batched_transpose::bench(),
    ];
    per_op.into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::path::Path;

    /// Cases are compared with the peers' by their text: `key=value` with the keys in order, but for `variant`, which comes first. A value
    /// may have commas of its own (`input=e2m1,1x32`).
    #[test]
    fn cases_of_the_benchmark_are_spelled_alike() {
        let mut seen = HashSet::new();
        for row in super::benches() {
            let keys: Vec<&str> = row.case.split(',').filter_map(|part| part.split_once('=')).map(|(key, _)| key).collect();
            let keys = keys.strip_prefix(&["variant"]).unwrap_or(&keys);
            let case = format!("{} {}", row.op, row.case);
            assert!(!keys.is_empty() && keys.windows(2).all(|two| two[0] < two[1]), "{case}");
            assert!(!row.case.contains(' ') && !row.case.contains("true") && !row.case.contains("false"), "{case}");
            assert!(seen.insert(case.clone()), "{case} stands twice");
        }
    }

    /// The smallest rows of each op run. That needs no GPU, and every row of an op is built alike.
    #[test]
    fn small_rows_of_the_benchmark_run() {
        let device = ferrotile::Device::emulator();
        let stream = device.stream().unwrap();
        let mut ops = HashSet::new();
        for row in super::benches().into_iter().filter(|row| row.bytes < 200_000) {
            let run = || -> Result<(), String> {
                let mut launch = (row.build)(&device, &stream)?;
                (0..2).try_for_each(|_| launch(&stream)).map_err(|error| error.to_string())
            };
            run().unwrap_or_else(|error| panic!("{} {}: {error}", row.op, row.case));
            ops.insert(row.op);
        }
        let without: Vec<&str> = super::benches().iter().map(|row| row.op).filter(|op| !ops.contains(op)).collect();
        assert!(without.is_empty(), "no small row: {:?}", HashSet::<&str>::from_iter(without));
    }

    /// An op's file without an entry in [`suites`](super::suites) would never run on a GPU.
    #[test]
    fn every_op_is_listed_once() {
        // The device layer's own checks are listed too but are no op.
        let mut listed: Vec<&str> = super::suites().iter().map(|suite| suite.op).filter(|op| *op != "selftest").collect();
        listed.sort_unstable();
        let mut files = Vec::new();
        for family in std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("src")).unwrap() {
            let family = family.unwrap().path();
            if !family.is_dir() || ["device", "support", "bin"].iter().any(|name| family.ends_with(name)) {
                continue;
            }
            for file in std::fs::read_dir(family).unwrap() {
                let stem = file.unwrap().path().file_stem().unwrap().to_str().unwrap().to_owned();
                if stem != "mod" && !stem.starts_with("common") {
                    files.push(stem);
                }
            }
        }
        files.sort_unstable();
        assert_eq!(listed, files, "left: suites() in src/lib.rs, right: files");
    }

    /// A user finds an op in these tables.
    #[test]
    fn every_op_is_documented() {
        let pages = [
            ("README.md", include_str!("../../README.md")),
            ("host/src/lib.rs", include_str!("../../host/src/lib.rs")),
            ("CHANGELOG.md", include_str!("../../CHANGELOG.md")),
        ];
        for (page, text) in pages {
            // The speed table has ops of an older run.
            let text = text.split("<!-- ops:begin -->").next().unwrap_or_default();
            let missing: Vec<&str> =
                super::suites().iter().map(|suite| suite.op).filter(|op| !text.contains(&format!("`{op}`"))).collect();
            assert!(missing.is_empty() || missing == ["selftest"], "{page} does not mention {missing:?}");
        }
    }
}
