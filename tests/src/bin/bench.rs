//! Times ops on a device: `bench [FILTER]... --device cuda:0|emulator --json FILE`.
//!
//! Prints a table and appends a JSON line per row to the file. `--launch-lab` instead compares ways to call the driver for the first row
//! of each op; best on one processor, as in `taskset -c 2 bench --launch-lab --schedule spin`.

use clap::{Parser, ValueEnum};
use ferrotile_tests::support::bench::{Bench, LAYERS, Line, Row};
use ferrotile_tests::support::suite::{self, Filter};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::collections::HashSet;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

/// Time ops.
#[derive(Parser)]
struct Cli {
    /// Which rows: `cast` is all whose `op case` contains that, `=cast` those of the op `cast` alone; after a colon, only cases that
    /// contain that (`=cast:t=128`). What any of several filters chooses is timed; without one, all.
    #[arg(value_name = "FILTER")]
    filters: Vec<String>,
    /// Where to run: `cuda:N` or `emulator`.
    #[arg(long, default_value = "cuda:0")]
    device: String,
    /// Append one JSON line per row to this file.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Compare ways to call the driver, by host time, instead of timing rows.
    #[arg(long)]
    launch_lab: bool,
    /// Time how long the driver compiles each kernel, instead of timing rows. Without the driver's cache: CUDA_CACHE_DISABLE=1.
    #[arg(long)]
    compile_times: bool,
    /// Build the rows, which makes their inputs, and print the milliseconds that each took, instead of timing rows.
    #[arg(long)]
    build_only: bool,
    /// How the driver waits for the GPU; its own choice if left out.
    #[arg(long)]
    schedule: Option<Schedule>,
    /// Print the rows and end.
    #[arg(long)]
    list: bool,
}

/// `CU_CTX_SCHED_*`.
#[derive(Clone, Copy, ValueEnum)]
enum Schedule {
    Spin = 1,
    Yield = 2,
    Blocking = 4,
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(failed) => {
            eprintln!("bench: {failed} rows failed");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

/// How many rows failed.
fn run(cli: &Cli) -> Result<usize, String> {
    let filters = Filter::all(&cli.filters);
    let chosen = |row: &Row| filters.is_empty() || filters.iter().any(|filter| filter.row(row.op, &row.case));
    let rows: Vec<Row> = ferrotile_tests::benches().into_iter().filter(chosen).collect();
    if cli.list {
        rows.iter().for_each(|row| println!("{} {}", row.op, row.case));
        return Ok(0);
    }
    if rows.is_empty() && !cli.compile_times {
        return Err(format!("no row goes by `{}`; --list shows all", cli.filters.join("`, `")));
    }
    if let (Some(schedule), Some(ordinal)) = (cli.schedule, cli.device.strip_prefix("cuda:").and_then(|n| n.parse().ok())) {
        ferrotile::set_schedule(ordinal, schedule as u32).map_err(suite::text)?;
    }
    let device = suite::device_unchecked(&cli.device)?;
    let mut file = match &cli.json {
        Some(path) => {
            let open = OpenOptions::new().create(true).append(true).open(path);
            Some(open.map_err(|e| format!("{}: {e}", path.display()))?)
        }
        None => None,
    };
    println!("{} rows on {}, driver {}", rows.len(), device.name(), device.driver_version());
    println!("{:<28} {:<62} {:>9} {:>7}  fastest to slowest", "op", "case", "us", "GB/s");
    let mut emit = |line: &Line| -> Result<(), String> {
        let gbs = line.gbs.map_or(String::new(), |gbs| format!("{gbs:.0}"));
        println!("{:<28} {:<62} {:>9.2} {gbs:>7}  {} to {}", line.op, line.case, line.us, line.spread[0], line.spread[1]);
        if let Some(file) = &mut file {
            let text = serde_json::to_string(line).map_err(suite::text)?;
            writeln!(file, "{text}").map_err(|e| format!("writing the JSON file: {e}"))?;
        }
        Ok(())
    };

    let mut bench = Bench::new(&device)?;
    if cli.compile_times {
        return bench.compile_times(&filters)?.iter().try_for_each(&mut emit).map(|()| 0);
    }
    if cli.build_only {
        for row in &rows {
            let before = bench.building();
            drop(bench.build(row)?);
            println!("{:>9.2} {} {}", (bench.building() - before).as_secs_f64() * 1e3, row.op, row.case);
        }
        println!("{:>9.2} all", bench.building().as_secs_f64() * 1e3);
        return Ok(0);
    }
    let mut failed = 0;
    // First, because "first launch" is first only once per op and process.
    let mut launched = HashSet::new();
    let begin = Instant::now();
    for row in &rows {
        if !LAYERS.contains(&row.op) && launched.insert(row.op) {
            let small = rows.iter().filter(|other| other.op == row.op).min_by_key(|other| other.bytes).unwrap_or(row);
            match if cli.launch_lab { bench.launch_lab(row) } else { bench.first_launch(row, small) } {
                Ok(lines) => lines.iter().try_for_each(&mut emit)?,
                Err(error) => {
                    failed += 1;
                    println!("{:<28} {:<62} FAILED: {error}", row.op, "first launch");
                }
            }
        }
    }
    if cli.launch_lab {
        return Ok(failed);
    }
    let launches = begin.elapsed();
    bench.limits()?.iter().try_for_each(&mut emit)?;
    let bar = ProgressBar::with_draw_target(Some(rows.len() as u64), ProgressDrawTarget::stderr());
    bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} {wide_msg}").unwrap_or(ProgressStyle::default_bar()));
    for row in &rows {
        bar.set_message(format!("{} {}", row.op, row.case));
        match bench.row(row) {
            Ok(line) => emit(&line)?,
            Err(error) => {
                failed += 1;
                println!("{:<28} {:<62} FAILED: {error}", row.op, row.case);
            }
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    println!(
        "{:.1} s: {:.1} s first launches and host times; {:.1} s building rows, those included",
        begin.elapsed().as_secs_f64(),
        launches.as_secs_f64(),
        bench.building().as_secs_f64(),
    );
    Ok(failed)
}
