//! `cargo xtask gpu-bundle`: what a CUDA machine without Rust needs to test and time the ops, in the folder `bundle`.

use crate::{Failure, Result, fail, shell, stub};
use std::path::Path;
use std::process::Command;

/// Options of the command.
#[derive(clap::Args)]
pub struct Options {
    /// Also pack both releases of the peer (45 MB each, downloaded once), so that all are timed in one run
    #[arg(long)]
    peer: bool,
}

/// The script that starts everything there.
const RUN: &str = include_str!("run.sh");

/// Releases of the peer.
const PEERS: [&str; 2] = ["1.0.0", "2.1.0"];

/// `cargo xtask gpu-bundle`.
pub fn run(options: &Options) -> Result {
    let bundle = shell::root().join("bundle");
    let target = shell::target_dir()?.join("release");
    let mut cargo = shell::cargo();
    cargo.args(["build", "--release", "--features", "cuda", "--package", "ferrotile-tests", "--bin", "check", "--bin", "bench"]);
    shell::run(stub::link(&mut cargo)?)?;
    let mut cargo = shell::cargo();
    cargo.args(["build", "--release", "--features", "cuda", "--package", "ferrotile", "--example", "quantize_checkpoint"]);
    shell::run(stub::link(&mut cargo)?)?;
    for program in ["check", "bench", "examples/quantize_checkpoint"] {
        install(&target.join(program), &bundle)?;
    }
    let script = bundle.join("run.sh");
    shell::write(&script, RUN)?;
    shell::output(Command::new("chmod").arg("+x").arg(&script))?;
    golden(&bundle)?;
    if options.peer {
        peers(&bundle)?;
    }
    for path in shell::list(&bundle) {
        let bytes = path.metadata().map_or(0, |meta| meta.len());
        println!("{:>8.1} MB  {}", bytes as f64 / 1e6, path.display());
    }
    println!("on the CUDA machine: bundle/run.sh check bench sanitizer{}", if options.peer { " peer" } else { "" });
    Ok(())
}

/// Copy a program and strip it: symbols are half of it, and the bundle travels.
fn install(program: &Path, bundle: &Path) -> Result {
    shell::create_dir(bundle)?;
    let copy = bundle.join(program.file_name().unwrap_or_default());
    std::fs::copy(program, &copy)
        .map_err(|e| Failure(format!("cannot copy {} to {}: {e}", program.display(), copy.display())))?;
    if shell::has_program("strip") {
        shell::output(Command::new("strip").arg(&copy))?;
    }
    Ok(())
}

/// Pack the peers with the workspace's own script.
fn peers(bundle: &Path) -> Result {
    let shared = shell::root().join("../shared/peer");
    let script = shared.join("bundle.sh");
    if !script.is_file() {
        return fail(format!("gpu-bundle: {} is absent, which packs the peers", script.display()));
    }
    for version in PEERS {
        let packed = bundle.join(format!("peer-{version}.tar.xz"));
        if packed.is_file() {
            println!("{} is here already", packed.display());
            continue;
        }
        // Packed elsewhere first: half a file must not pass for a whole one.
        let partial = bundle.join("partial");
        println!("packing TileKernels {version} (about 45 MB, some minutes)");
        shell::run(Command::new("bash").arg(&script).arg(version).arg(&partial))?;
        let made = partial.join(format!("peer-{version}.tar.xz"));
        std::fs::rename(&made, &packed).map_err(|e| Failure(format!("cannot move {}: {e}", made.display())))?;
        shell::remove_dir(&partial)?;
    }
    shell::write(&bundle.join("time_peer.py"), &shell::read(&shell::root().join("tests/peer/time_peer.py"))?)?;
    Ok(())
}

/// Copy what the peers computed, which the checks compare with; that of 1.0.0 where it is there.
fn golden(bundle: &Path) -> Result {
    let to = bundle.join("golden");
    shell::create_dir(&to)?;
    for from in ["tests/golden", "../shared/golden"] {
        for path in
            shell::list(&shell::root().join(from)).iter().filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
        {
            let copy = to.join(path.file_name().unwrap_or_default());
            // Not `fs::copy` alone: a file that may not be written would make the next copy of it fail.
            if copy.metadata().is_ok_and(|old| path.metadata().is_ok_and(|new| old.len() == new.len())) {
                continue;
            }
            std::fs::copy(path, &copy)
                .map_err(|e| Failure(format!("cannot copy {} to {}: {e}", path.display(), copy.display())))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the script with programs of our own in place of the real ones.
    #[test]
    fn the_script_runs_its_steps_and_names_those_that_fail() {
        let dir = std::env::temp_dir().join(format!("ferrotile-bundle-{}", std::process::id()));
        let program = |name: &str, text: &str| {
            shell::write(&dir.join(name), &format!("#!/bin/sh\n{text}\n")).unwrap();
            shell::output(Command::new("chmod").arg("+x").arg(dir.join(name))).unwrap();
        };
        shell::write(&dir.join("run.sh"), RUN).unwrap();
        program("check", "echo \"check $*\" >> calls; case \"$*\" in *small*) exit 3;; esac");
        program("bench", "echo \"bench $*\" >> calls");
        program("compute-sanitizer", "shift 4; \"$@\"");
        let path = format!("{}:{}", dir.display(), std::env::var("PATH").unwrap());
        let start = |steps: &[&str]| {
            let mut bash = Command::new("bash");
            bash.current_dir(&dir)
                .arg("run.sh")
                .args(steps)
                .env("PATH", &path)
                .env("OUT", "out")
                .env("FILTER", "gate =cast")
                .env("GPU", "1");
            shell::output(&mut bash)
        };
        start(&["check", "bench"]).unwrap();
        let calls = shell::read(&dir.join("calls")).unwrap();
        assert_eq!(
            calls,
            "check gate =cast --device cuda:1 --depth full --json out/check.jsonl\nbench gate =cast --device cuda:1 --json out/bench.jsonl\n"
        );
        let Failure(text) = start(&["sanitizer", "bench"]).unwrap_err();
        assert!(text.ends_with("failed: sanitizer"), "{text}");
        assert!(shell::read(&dir.join("calls")).unwrap().matches("--depth small").count() == 2);
        let Failure(text) = start(&["peer"]).unwrap_err();
        assert!(text.contains("1.0.0: skipped") && text.contains("neither release"), "{text}");
        let Failure(text) = start(&["chek"]).unwrap_err();
        assert!(text.contains("not 'chek'"), "{text}");
        assert!(start(&[]).unwrap_err().0.contains("Usage: ./run.sh"));
        shell::remove_dir(&dir).unwrap();
    }
}
