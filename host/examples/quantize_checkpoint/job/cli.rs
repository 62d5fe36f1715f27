//! The command line.

use super::codec;
use super::error::{Result, io};
use super::shared::{DeviceName, device, parse_device, progress_bar, say};
use super::storage::Create;
use super::table::Table;
use super::{Block, Options, run, synthetic};
use clap::{Args, Parser, ValueEnum};
use ferrotile::quant::QuantFormat;
use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::time::Instant;
use std::{env, fs};

/// Quantises the matrices of a checkpoint to FP8, FP4 or e5m6 with scale factors, as DeepSeek's own FP8 checkpoints have them.
///
/// The output holds X as quantised data and X_scale_inv with an f32 for each block: weight = data * scale_inv. Integers, vectors
/// and tensors of higher rank are copied. The output is read back and compared with the input before it gets its name.
#[derive(Parser)]
#[command(name = "quantize_checkpoint")]
struct Cli {
    #[command(flatten)]
    source: Source,
    /// Where the quantised checkpoint goes [default: target/demo/INPUT-FORMAT-BLOCK.safetensors]
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Seed of the synthetic weights
    #[arg(long, default_value_t = 1, conflicts_with = "input")]
    seed: u64,
    /// Layers of the synthetic checkpoint, of about 11 million weights each
    #[arg(long, default_value_t = 1, conflicts_with = "input")]
    layers: u64,
    /// What the weights become
    #[arg(long, value_enum, default_value_t)]
    format: FormatName,
    /// Rows and columns that share a scale factor [default: 128x128, for e5m6 row]
    #[arg(long, value_enum)]
    block: Option<BlockName>,
    /// What runs the kernels: auto, emulator or cuda:N. auto is the first GPU, or the emulator where there is none
    #[arg(long, default_value = "auto", value_parser = parse_device)]
    device: DeviceName,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct Source {
    /// The checkpoint, a safetensors file
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,
    /// Make a checkpoint of random weights and take that
    #[arg(long)]
    synthetic: bool,
}

#[derive(Clone, Copy, Default, ValueEnum)]
enum FormatName {
    /// FP8: 4 exponent and 3 mantissa bits, largest value 448
    #[default]
    #[value(name = "e4m3")]
    E4m3,
    /// FP4: 2 exponent bits and 1 mantissa bit, largest value 6
    #[value(name = "e2m1")]
    E2m1,
    /// 12 bits: 5 exponent and 6 mantissa bits, largest value 65024; with a scale factor for each row
    #[value(name = "e5m6")]
    E5m6,
}

#[derive(Clone, Copy, ValueEnum)]
enum BlockName {
    /// A square, usual for weights
    #[value(name = "128x128")]
    B128x128,
    /// Part of a row
    #[value(name = "1x128")]
    B1x128,
    /// Part of a row, usual for FP4
    #[value(name = "1x32")]
    B1x32,
    /// A whole row
    #[value(name = "row")]
    Row,
    /// Part of a column; e4m3 only
    #[value(name = "128x1")]
    B128x1,
}

/// Runs the program and returns its exit code. It ends early, and cleans up, once `stop` is set.
pub fn main(args: impl IntoIterator<Item = impl Into<OsString> + Clone>, stop: &AtomicBool, create: &Create) -> u8 {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(usage) => {
            // Help is an "error" too, with exit code 0. There is nobody to tell when it cannot be printed.
            let _ = usage.print();
            return usage.exit_code() as u8;
        }
    };
    match quantise(&cli, stop, create) {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("error: {error}");
            error.exit_code()
        }
    }
}

fn quantise(cli: &Cli, stop: &AtomicBool, create: &Create) -> Result<()> {
    let begin = Instant::now();
    let format = cli.format.value();
    let block = cli.block.map_or(codec::blocks(format)[0], BlockName::value);
    codec::check(format, block)?;
    let (device, why) = device(cli.device)?;
    let input = match &cli.source.input {
        Some(path) => path.clone(),
        None => {
            let path = demo_folder()?.join(format!("synthetic-{}-{}.safetensors", cli.layers, cli.seed));
            say(&format!("writing random weights to {}\n", path.display()));
            synthetic::write(&path, cli.layers, cli.seed, stop, create)?;
            path
        }
    };
    let output = match &cli.output {
        Some(path) => path.clone(),
        None => {
            let stem = input.file_stem().unwrap_or_default().display();
            demo_folder()?.join(format!("{stem}-{format}-{block}.safetensors"))
        }
    };
    let each = if block == Block::Row { "each row".to_owned() } else { format!("{block} weights") };
    say(&format!("device: {why}\nquantising {} to {format}, a scale factor for {each}\n", input.display()));

    let piece_values = if device.is_emulator() { 1 << 21 } else { 1 << 24 };
    let options = Options { input, output, format, block, piece_values };
    let progress = progress_bar();
    let outcomes = run(&options, &device, &progress, stop, create);
    progress.finish_and_clear();
    let seconds = begin.elapsed().as_secs_f64();
    say(&format!("\n{}\nwrote {} in {seconds:.1} s, on {device}\n", Table(&outcomes?), options.output.display()));
    Ok(())
}

/// `demo` in the build folder that this program lies in, or in `target` here when it lies elsewhere.
fn demo_folder() -> Result<PathBuf> {
    let program = env::current_exe().unwrap_or_default();
    // Cargo marks its build folder, which may have any name, with this file.
    let target = program.ancestors().find(|folder| folder.join("CACHEDIR.TAG").is_file());
    let folder = target.map_or_else(|| PathBuf::from("target"), PathBuf::from).join("demo");
    fs::create_dir_all(&folder).map_err(io(&folder, "create this folder"))?;
    Ok(folder)
}

impl FormatName {
    fn value(self) -> QuantFormat {
        match self {
            FormatName::E4m3 => QuantFormat::E4m3,
            FormatName::E2m1 => QuantFormat::E2m1,
            FormatName::E5m6 => QuantFormat::E5m6,
        }
    }
}

impl BlockName {
    fn value(self) -> Block {
        match self {
            BlockName::B128x128 => Block::Of(128, 128),
            BlockName::B1x128 => Block::Of(1, 128),
            BlockName::B1x32 => Block::Of(1, 32),
            BlockName::Row => Block::Row,
            BlockName::B128x1 => Block::Of(128, 1),
        }
    }
}
