//! `cargo xtask doctor`: what is here, what is missing and what to type.

use crate::driver::Driver;
use crate::{Failure, Result, driver, setup, shell};
use std::process::Command;

/// One line of the report.
fn line(what: &str, found: std::result::Result<String, String>) {
    match found {
        Ok(text) => println!("ok       {what:<16} {text}"),
        Err(text) => println!("missing  {what:<16} {text}"),
    }
}

/// First line that a program prints, or what to type to get the program.
fn version(program: &str, args: &[&str], to_type: &str) -> std::result::Result<String, String> {
    match shell::output(Command::new(program).args(args)) {
        Ok(text) => Ok(text.lines().next().unwrap_or_default().to_owned()),
        Err(_) => Err(format!("type: {to_type}")),
    }
}

/// `cargo xtask doctor`. Says, and changes nothing; what is missing here is not an error.
pub fn run() -> Result {
    line("rustc", version("rustc", &["--version"], "rustup toolchain install 1.95.0"));
    line("clippy", version("cargo", &["clippy", "--version"], "rustup component add clippy"));
    line("rustfmt", version("cargo", &["fmt", "--version"], "rustup component add rustfmt"));
    line("C compiler", version("cc", &["--version"], "apt-get install gcc"));
    line("python3 with pip", version("python3", &["-m", "pip", "--version"], "apt-get install python3-pip"));
    match setup::compilers() {
        Ok((found, skipped)) => {
            for compiler in &found {
                line("device compiler", Ok(format!("{} ({}, {})", compiler.version, compiler.origin, compiler.rustc.display())));
            }
            if found.is_empty() {
                line("device compiler", Err("type: cargo xtask setup".into()));
            }
            for why in skipped {
                println!("         {:<16} passed over: {}", "", why.lines().next().unwrap_or_default());
            }
        }
        Err(Failure(why)) => line("device compiler", Err(why)),
    }
    for (name, needed) in [("ptxas", "type: cargo xtask setup"), ("nvdisasm", "only for `ptx --sass`, which fetches it")] {
        let path = shell::device_dir().join("cuda/nvidia/cu13/bin").join(name);
        line(name, if path.is_file() { Ok(path.display().to_string()) } else { Err(needed.into()) });
    }
    let stub = shell::device_dir().join("cuda-stub/lib64/libcuda.so");
    line("libcuda stub", if stub.is_file() { Ok(stub.display().to_string()) } else { Err("type: cargo xtask stub".into()) });
    line(
        "CUDA driver",
        match driver::probe() {
            Driver::Works(version, gpus) => Ok(format!("CUDA {}.{}, {gpus} GPUs", version / 1000, version % 1000 / 10)),
            Driver::NoGpu(code) => {
                Err(format!("libcuda.so.1 loads, but cuInit returns {code}: is there a GPU, and may this user see it?"))
            }
            Driver::Missing => {
                Err("libcuda.so.1 cannot be loaded: install NVIDIA's driver to use a GPU; the emulator works without".into())
            }
        },
    );
    let query = ["--query-gpu=name,compute_cap,memory.total,driver_version", "--format=csv,noheader"];
    match shell::output(Command::new("nvidia-smi").args(query)) {
        Ok(gpus) => gpus.lines().for_each(|gpu| line("GPU", Ok(gpu.to_owned()))),
        Err(_) => line("GPU", Err("no nvidia-smi here".into())),
    }
    Ok(())
}
