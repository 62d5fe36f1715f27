//! `cargo xtask test`: what CI runs, in an order that finds the cheap mistakes first.

use crate::{Failure, Result, fail, ptx, shell, stub, tidy};
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::time::Instant;

/// Options of the command.
#[derive(clap::Args)]
pub struct Options {
    /// Only the tests and the PTX budget of this op or family
    filter: Option<String>,
    /// Leave out the PTX build, which needs the device compiler
    #[arg(long)]
    no_ptx: bool,
}

/// Print a header, do the step, print its time.
fn step(name: &str, work: impl FnOnce() -> Result) -> Result {
    println!("\n== {name}");
    let start = Instant::now();
    let result = work();
    println!("== {name}: {} ({:.1} s)", if result.is_ok() { "ok" } else { "FAILED" }, start.elapsed().as_secs_f32());
    result
}

/// A step that is one cargo command.
fn cargo(name: &str, args: &[&str]) -> Result {
    step(name, || shell::run(shell::cargo().args(args)))
}

/// Tests that ran.
#[derive(Debug, Default, PartialEq, Eq)]
struct Count {
    passed: u64,
    failed: u64,
    ignored: u64,
}

impl Count {
    /// Add what a line `test result: ok. 3 passed; 0 failed; 1 ignored; ...` says; other lines say nothing.
    fn add(&mut self, line: &str) {
        let Some((_, counts)) = line.strip_prefix("test result: ").and_then(|rest| rest.split_once(". ")) else { return };
        for part in counts.split("; ") {
            match part.split_once(' ').map(|(number, what)| (number.parse::<u64>().unwrap_or(0), what)) {
                Some((number, "passed")) => self.passed += number,
                Some((number, "failed")) => self.failed += number,
                Some((number, "ignored")) => self.ignored += number,
                _ => {}
            }
        }
    }
}

/// A step that is one `cargo test`; its output is shown as it comes, and counted.
fn cargo_test(name: &str, args: &[&str], count: &mut Count) -> Result {
    step(name, || {
        let mut command = shell::cargo();
        command.arg("test").args(args).stdout(Stdio::piped());
        let not_started = |e| Failure(format!("cargo could not be started: {e}"));
        let mut child = command.spawn().map_err(not_started)?;
        if let Some(stdout) = child.stdout.take() {
            for line in BufReader::new(stdout).split(b'\n') {
                let line = line.map_err(not_started)?;
                let line = String::from_utf8_lossy(&line);
                println!("{line}");
                count.add(&line);
            }
        }
        let status = child.wait().map_err(not_started)?;
        if status.success() { Ok(()) } else { fail(format!("failed ({status}): {}", shell::describe(&command))) }
    })
}

/// `cargo xtask test`.
pub fn run(options: &Options) -> Result {
    match &options.filter {
        Some(filter) => one(filter, options.no_ptx),
        None => all(options.no_ptx),
    }
}

/// The tests of one op or family.
fn one(filter: &str, no_ptx: bool) -> Result {
    let ops = tidy::ops_matching(filter);
    if ops.is_empty() {
        let known: Vec<String> = tidy::ops_matching("").into_iter().map(|(op, family)| format!("{family}/{op}")).collect();
        return fail(format!("test: `{filter}` names no op or family; there are: {}", known.join(", ")));
    }
    let mut count = Count::default();
    cargo_test("emulator tests", &["--package", "ferrotile-tests", filter], &mut count)?;
    if count.passed == 0 {
        return fail(format!("test: no test's name contains `{filter}`"));
    }
    if !no_ptx {
        let names: Vec<String> = ops.into_iter().map(|(op, _)| op).collect();
        step("PTX budget", || ptx::check_ops(&names))?;
    }
    Ok(())
}

/// Everything.
fn all(no_ptx: bool) -> Result {
    const STRICT: [&str; 3] = ["--", "-D", "warnings"];
    let start = Instant::now();
    cargo("format", &["fmt", "--all", "--check"])?;
    let clippy = ["clippy", "--workspace", "--all-targets"];
    cargo("clippy", &[&clippy[..], &STRICT].concat())?;
    step("clippy with cuda", || {
        let mut cargo = shell::cargo();
        cargo.args(clippy).args(["--features", "cuda"]).args(STRICT);
        shell::run(stub::link(&mut cargo)?)
    })?;
    step("docs", || shell::run(shell::cargo().args(["doc", "--workspace", "--no-deps"]).env("RUSTDOCFLAGS", "-D warnings")))?;
    step("tidy", tidy::run)?;
    if no_ptx {
        println!("\n== PTX: left out (--no-ptx)");
    } else {
        step("PTX", || ptx::run(&ptx::Options::check()))?;
    }
    let mut count = Count::default();
    cargo_test("emulator tests", &["--workspace", "--lib", "--bins", "--tests", "--examples"], &mut count)?;
    cargo_test("doc tests", &["--workspace", "--doc"], &mut count)?;
    println!("\n== GPU");
    println!("{}", gpu_report()?);
    println!("\nall checks passed in {:.0} s", start.elapsed().as_secs_f32());
    // CI reads this line: the last one of cargo's may be of a crate without tests.
    println!("{} passed, {} failed, {} skipped", count.passed, count.failed, count.ignored);
    Ok(())
}

/// Which kernels the GPU has not seen as they are now. This command itself runs nothing on a GPU.
fn gpu_report() -> Result<String> {
    let path = shell::root().join("tests/gpu/tests.jsonl");
    let record = if path.is_file() { shell::read(&path)? } else { String::new() };
    Ok(format!("GPU: skipped (GPU tests are run with `cargo xtask gpu-bundle`)\n{}", untested(&ptx::committed_shas(), &record)?))
}

/// The ops whose PTX is not the one that passed last, from lines `{op, device, driver, ptx_sha, passed, cases}`.
fn untested(shas: &BTreeMap<String, String>, record: &str) -> Result<String> {
    let mut passed: BTreeMap<String, Value> = BTreeMap::new();
    for (i, line) in record.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let json: Value = serde_json::from_str(line).map_err(|e| Failure(format!("tests/gpu/tests.jsonl:{}: {e}", i + 1)))?;
        if let Some(op) = json["op"].as_str() {
            passed.insert(op.to_owned(), json);
        }
    }
    let mut lines = Vec::new();
    for (op, sha) in shas {
        match passed.get(op) {
            None => lines.push(format!("  {op}: has not run on a GPU")),
            Some(json) if json["passed"].as_bool() != Some(true) => {
                lines.push(format!("  {op}: failed when it last ran on a GPU"))
            }
            // Records may shorten the hash, but not to nothing.
            Some(json) if !json["ptx_sha"].as_str().is_some_and(|ran| ran.len() >= 8 && sha.starts_with(ran)) => {
                let device = json["device"].as_str().unwrap_or("a GPU");
                lines.push(format!("  {op}: PTX has changed since it last passed on {device}"));
            }
            Some(_) => {}
        }
    }
    Ok(if lines.is_empty() {
        format!("all {} ops passed on a GPU with the PTX they have now", shas.len())
    } else {
        format!(
            "{} of {} ops have not passed on a GPU with the PTX they have now:\n{}",
            lines.len(),
            shas.len(),
            lines.join("\n")
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_of_tests_are_added_up() {
        let mut count = Count::default();
        count.add("test result: ok. 31 passed; 0 failed; 2 ignored; 0 measured; 5 filtered out; finished in 0.12s");
        count.add("test result: FAILED. 1 passed; 3 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.12s");
        count.add("100 passed; 100 failed");
        assert_eq!(count, Count { passed: 32, failed: 3, ignored: 2 });
    }

    #[test]
    fn changed_kernels_are_named() {
        let sha = |letter: &str| letter.repeat(64);
        let shas = BTreeMap::from(
            [("same", "a"), ("short", "b"), ("changed", "c"), ("failed", "d"), ("new", "e")]
                .map(|(op, letter)| (op.to_owned(), sha(letter))),
        );
        let line = |op: &str, ptx_sha: &str, passed: bool| {
            format!("{{\"op\":\"{op}\",\"device\":\"H100\",\"ptx_sha\":\"{ptx_sha}\",\"passed\":{passed}}}\n")
        };
        let record = [
            line("same", &sha("0"), false),
            line("same", &sha("a"), true),
            line("short", &sha("b")[..12], true),
            line("changed", "", true),
            line("failed", &sha("d"), false),
        ]
        .concat();
        let text = untested(&shas, &record).unwrap();
        assert!(text.starts_with("3 of 5 ops"), "{text}");
        assert!(text.contains("  changed: PTX has changed since it last passed on H100"));
        assert!(text.contains("  failed: failed") && text.contains("  new: has not run"));
        assert!(untested(&BTreeMap::new(), "nonsense\n").is_err());
        assert!(untested(&BTreeMap::from([("same".to_owned(), sha("a"))]), &record).unwrap().starts_with("all 1 ops passed"));
    }
}
