//! `cargo xtask bench`: the benchmark of the ops on this machine's GPU.

use crate::{Result, shell, stub};

/// Options of the command.
#[derive(clap::Args)]
pub struct Options {
    /// Ops: `cast` is all rows that contain that, `=cast` those of the op `cast` alone; all if left out
    filters: Vec<String>,
    /// More arguments for the benchmark, after `--`: `--device cuda:0`, `--json FILE`
    #[arg(last = true)]
    rest: Vec<String>,
}

/// `cargo xtask bench`.
pub fn run(options: &Options) -> Result {
    let mut cargo = shell::cargo();
    cargo.args(["run", "--release", "--package", "ferrotile-tests", "--features", "cuda", "--bin", "bench", "--"]);
    cargo.args(&options.filters).args(&options.rest);
    // `--json FILE` is meant from where the command was typed.
    cargo.current_dir(".");
    shell::run(stub::link(&mut cargo)?)
}
