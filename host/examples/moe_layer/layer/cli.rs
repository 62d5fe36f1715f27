//! The command line.

use super::{Options, Result, run};
use clap::Parser;
use ferrotile::Device;
use indicatif::{ProgressBar, ProgressStyle};
use std::ffi::OsString;
use std::io::Write;

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

#[derive(Clone, Copy)]
enum DeviceName {
    Auto,
    Emulator,
    Cuda(usize),
}

fn parse_device(text: &str) -> std::result::Result<DeviceName, String> {
    match text.split_once(':') {
        None if text == "auto" => Ok(DeviceName::Auto),
        None if text == "emulator" => Ok(DeviceName::Emulator),
        None if text == "cuda" => Ok(DeviceName::Cuda(0)),
        Some(("cuda", ordinal)) => ordinal.parse().map(DeviceName::Cuda).map_err(|_| format!("`{ordinal}` is no GPU's number")),
        _ => Err("allowed: auto, emulator, cuda:N".to_owned()),
    }
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
    let progress = ProgressBar::no_length();
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {percent:>3} %  {eta:>4} left  {wide_msg}") {
        progress.set_style(style);
    }
    let report = run(&options, &device, &progress);
    progress.finish_and_clear();
    let report = report?;
    say(&format!("{report}"));
    report.check()
}

/// The device, and a text that says which one and why.
fn device(name: DeviceName) -> Result<(Device, String)> {
    let gpu = |ordinal| {
        let device = Device::cuda(ordinal)?;
        let text = format!("{device} ({}, driver {})", device.name(), device.driver_version());
        Ok::<_, ferrotile::Error>((device, text))
    };
    match name {
        DeviceName::Emulator => Ok((Device::emulator(), "the CPU emulator".to_owned())),
        DeviceName::Cuda(ordinal) => Ok(gpu(ordinal)?),
        DeviceName::Auto => Ok(gpu(0).unwrap_or_else(|error| (Device::emulator(), format!("the CPU emulator ({error})")))),
    }
}

/// Prints. A closed pipe (`... | head`) is no reason to fail.
fn say(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}
