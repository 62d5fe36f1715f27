//! The command line.

use super::shared::{DeviceName, device, parse_device, progress_bar, say};
use super::{Options, Result, run};
use clap::Parser;
use std::ffi::OsString;

/// Routes a batch of random tokens through small experts, forward and backward, and compares with a dense layer.
///
/// Gate, mapping, casts, expanding and summing run on the device; the matrix products of the gate and of the experts on the CPU, as this
/// library has none. Ends with code 1 if a result is not that of the dense layer.
#[derive(Parser)]
#[command(name = "moe_layer")]
struct Cli {
    /// Tokens of the batch
    #[arg(long, default_value_t = 1024)]
    tokens: u64,
    /// Channels of a token
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u64).range(1..))]
    hidden: u64,
    /// Channels in the middle of an expert
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u64).range(1..))]
    intermediate: u64,
    /// Experts, a multiple of 4
    #[arg(long, default_value_t = 8)]
    experts: u64,
    /// Experts of a token
    #[arg(long, default_value_t = 2)]
    topk: u64,
    /// Each expert's rows are a multiple of this
    #[arg(long, default_value_t = 16)]
    alignment: u32,
    /// Rows of the expanded buffer; what finds no room is dropped [default: enough for the worst case]
    #[arg(long)]
    rows: Option<u64>,
    /// Quantise the experts' tokens to e4m3
    #[arg(long)]
    quantise: bool,
    /// Seed of tokens and weights
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// What runs the kernels: auto, emulator or cuda:N. auto is the first GPU, or the emulator where there is none
    #[arg(long, default_value = "auto", value_parser = parse_device)]
    device: DeviceName,
}

/// Runs the program and returns its exit code.
pub fn main(args: impl IntoIterator<Item = impl Into<OsString> + Clone>) -> u8 {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(usage) => {
            // Help is an "error" too, with exit code 0. There is nobody to tell when it cannot be printed.
            let _ = usage.print();
            return usage.exit_code() as u8;
        }
    };
    match layer(&cli) {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("error: {error}");
            1
        }
    }
}

fn layer(cli: &Cli) -> Result<()> {
    let (device, why) = device(cli.device)?;
    let options = Options {
        tokens: cli.tokens,
        hidden: cli.hidden,
        intermediate: cli.intermediate,
        experts: cli.experts,
        topk: cli.topk,
        alignment: cli.alignment,
        rows: cli.rows,
        quantise: cli.quantise,
        seed: cli.seed,
    };
    let Cli { tokens, hidden, intermediate, experts, topk, .. } = cli;
    say(&format!("device: {why}; the experts run on the CPU\n"));
    say(&format!("{tokens} tokens of {hidden} channels to {topk} of {experts} experts with {intermediate} channels inside\n\n"));
    let progress = progress_bar();
    let report = run(&options, &device, &progress);
    progress.finish_and_clear();
    let report = report?;
    say(&format!("{report}"));
    report.check()
}
