//! `cargo xtask COMMAND`: everything a person or CI does in this workspace, one file per command.

mod bench;
mod demo;
mod doctor;
mod driver;
mod gpu_bundle;
mod new;
mod progress;
mod ptx;
mod readme;
mod setup;
mod shell;
mod split;
mod stub;
mod test;
mod tidy;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// What can go wrong here ends the command; the text says what was wanted, what came and what to type.
#[derive(Debug)]
pub struct Failure(String);

/// Result of every command.
pub type Result<T = ()> = std::result::Result<T, Failure>;

/// A failure with this text.
pub fn fail<T>(text: impl Into<String>) -> Result<T> {
    Err(Failure(text.into()))
}

#[derive(Parser)]
#[command(name = "cargo xtask", about = "The commands of the ferrotile workspace", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Get the device compiler, ptxas and the libcuda stub into target/device; a second run is instant
    Setup,
    /// Make the libcuda stub that lets programs link without CUDA; prints the folder for CUDA_LIBRARY_PATH
    Stub,
    /// Build all PTX into host/ptx and print what each kernel needs on the GPU
    Ptx(ptx::Options),
    /// Everything CI checks; with FILTER only the tests and the PTX budget of one op or family
    Test(test::Options),
    /// Benchmark on the GPU of this machine
    Bench(bench::Options),
    /// Pack test and benchmark binaries for a CUDA machine that has no Rust
    GpuBundle(gpu_bundle::Options),
    /// Write the three files of a new op and their mod lines
    New(new::Options),
    /// Check the rules of the tree that rustc does not know
    Tidy,
    /// Write the speed table of README.md from the last run in tests/gpu
    Readme,
    /// Say which tools, drivers and GPUs are here, what is missing and what to type
    Doctor,
    /// Quantise a real checkpoint, on the GPU if there is one
    Demo(demo::Options),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Setup => setup::run(),
        Command::Stub => stub::run(),
        Command::Ptx(options) => ptx::run(&options),
        Command::Test(options) => test::run(&options),
        Command::Bench(options) => bench::run(&options),
        Command::GpuBundle(options) => gpu_bundle::run(&options),
        Command::New(options) => new::run(&options),
        Command::Tidy => tidy::run(),
        Command::Readme => readme::run(),
        Command::Doctor => doctor::run(),
        Command::Demo(options) => demo::run(&options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure(text)) => {
            eprintln!("error: {text}");
            ExitCode::FAILURE
        }
    }
}
