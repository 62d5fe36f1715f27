//! Checks ops on a device: `check [FILTER]... --device emulator|cuda:0 --depth small|full --json FILE`.
//!
//! Prints progress per op, appends a JSON line per op to the file, and exits with 1 if any op failed.

use clap::{Parser, ValueEnum};
use ferrotile::Device;
use ferrotile_tests::support::cases::Depth;
use ferrotile_tests::support::golden;
use ferrotile_tests::support::suite::{self, Ctx, Filter, Suite};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Check ops against their references.
#[derive(Parser)]
struct Cli {
    /// Which ops: `cast` is all whose name contains that, `=cast` the op `cast` alone; after a colon, only cases whose name contains
    /// that (`=per_token_cast:h=576`). What any of several filters chooses is checked; without one, all.
    #[arg(value_name = "FILTER")]
    filters: Vec<String>,
    /// Where to run: `emulator` (all its checks on) or `cuda:N`.
    #[arg(long, default_value = "emulator")]
    device: String,
    /// How much; the default is small on the emulator and full on a GPU.
    #[arg(long)]
    depth: Option<Size>,
    /// Append one JSON line per op to this file.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Where the golden data are, on a machine without the repository; also FERROTILE_GOLDEN.
    #[arg(long)]
    golden: Option<PathBuf>,
    /// Print the names of the ops and end.
    #[arg(long)]
    list: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Size {
    /// A few small shapes.
    Small,
    /// The specifications' grids.
    Full,
}

/// A line of the JSON file.
#[derive(Serialize)]
struct Line<'a> {
    op: &'a str,
    device: &'a str,
    driver: &'a str,
    depth: &'a str,
    /// `null` where no PTX ran.
    ptx_sha: Option<String>,
    passed: bool,
    cases: u64,
    seconds: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'a str>,
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("check: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Whether all chosen ops passed.
fn run(cli: &Cli) -> Result<bool, String> {
    let filters = Filter::all(&cli.filters);
    // A word with a typing error must not go unnoticed beside others.
    let suites = ferrotile_tests::suites();
    if let Some(i) = filters.iter().position(|filter| !suites.iter().any(|suite| filter.op(suite.op))) {
        return Err(format!("no op goes by `{}`; --list shows all", cli.filters[i]));
    }
    let chosen = |suite: &Suite| filters.is_empty() || filters.iter().any(|filter| filter.op(suite.op));
    let suites: Vec<Suite> = suites.into_iter().filter(chosen).collect();
    if cli.list {
        suites.iter().for_each(|suite| println!("{}", suite.op));
        return Ok(true);
    }
    if cli.json.is_some() && filters.iter().any(|filter| filter.case().is_some()) {
        // A line says that an op passed, so it must not stand for some of the cases.
        return Err("--json records whole ops, so the filter can't choose cases".to_owned());
    }
    if let Some(folder) = &cli.golden {
        if !folder.is_dir() {
            return Err(format!("{} is no folder", folder.display()));
        }
        golden::set_folder(folder)?;
    }
    let device = suite::device(&cli.device)?;
    let depth = match cli.depth {
        Some(Size::Small) => Depth::Small,
        Some(Size::Full) => Depth::Full,
        None if device.is_emulator() => Depth::Small,
        None => Depth::Full,
    };
    let mut json = cli.json.as_deref().map(open).transpose()?;
    let (name, driver) = (device.name(), device.driver_version());
    eprintln!("{} ops on {name}, driver {driver}", suites.len());

    let mut failed = Vec::new();
    for suite in &suites {
        let checked = check(suite, &device, depth, &case_filters(&filters, suite.op));
        let line = Line {
            op: suite.op,
            device: &name,
            driver: &driver,
            depth: if depth == Depth::Full { "full" } else { "small" },
            ptx_sha: if device.is_emulator() { None } else { suite::ptx_sha(suite.op) },
            passed: checked.result.is_ok(),
            cases: checked.cases,
            seconds: checked.seconds,
            error: checked.result.as_ref().err().map(String::as_str),
        };
        match &checked.result {
            Ok(notes) => {
                println!("{}: passed, {} cases in {:.1} s", suite.op, checked.cases, checked.seconds);
                notes.iter().for_each(|note| println!("  {note}"));
            }
            Err(error) => {
                println!("{}: FAILED after {} cases in {:.1} s: {error}", suite.op, checked.cases, checked.seconds);
                failed.push(suite.op);
            }
        }
        // Written at once, so that the lines of finished ops survive whatever a later op does.
        if let Some(file) = &mut json {
            let line = serde_json::to_string(&line).map_err(suite::text)?;
            writeln!(file, "{line}").map_err(|e| format!("writing the JSON file: {e}"))?;
        }
    }
    println!("{} of {} ops passed on {name}", suites.len() - failed.len(), suites.len());
    if !failed.is_empty() {
        println!("failed: {}", failed.join(", "));
    }
    Ok(failed.is_empty())
}

/// Result of one op: the notes, or what is wrong.
struct Checked {
    result: Result<Vec<String>, String>,
    cases: u64,
    seconds: f64,
}

fn check(suite: &Suite, device: &Device, depth: Depth, case_filters: &[&str]) -> Checked {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    bar.set_style(
        ProgressStyle::with_template("{spinner} {prefix} {pos} cases, {elapsed}: {wide_msg}")
            .unwrap_or(ProgressStyle::default_spinner()),
    );
    bar.set_prefix(suite.op);
    bar.enable_steady_tick(Duration::from_millis(200));
    let shown = bar.clone();
    let mut ctx = Ctx::new(*device, depth).on_case(move |name| {
        shown.set_message(name.to_owned());
        shown.inc(1);
    });
    for filter in case_filters {
        ctx = ctx.with_filter(filter);
    }
    let start = Instant::now();
    let result = suite.check(&ctx);
    let seconds = start.elapsed().as_secs_f64();
    bar.finish_and_clear();
    // After a failure the context knows how far it came; a report may have counted more than the context's cases.
    let cases = result.as_ref().map_or(ctx.report().cases, |report| report.cases);
    Checked { result: result.map(|report| report.notes), cases, seconds }
}

/// What names of an op's cases contain, one of these; none if a filter chooses the whole op.
fn case_filters<'a>(filters: &'a [Filter], op: &str) -> Vec<&'a str> {
    filters.iter().filter(|filter| filter.op(op)).map(Filter::case).collect::<Option<_>>().unwrap_or_default()
}

fn open(path: &Path) -> Result<File, String> {
    OpenOptions::new().create(true).append(true).open(path).map_err(|e| format!("{}: {e}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cases_are_those_of_all_filters_that_name_the_op() {
        let filters = Filter::all(&["=cast:t=1".to_owned(), "cast:h=576".to_owned(), "cast_back".to_owned()]);
        assert_eq!(case_filters(&filters, "cast"), ["t=1", "h=576"]);
        assert_eq!(case_filters(&filters, "per_token_cast"), ["h=576"]);
        // The whole op, by the last filter.
        assert!(case_filters(&filters, "cast_back").is_empty());
    }

    #[test]
    fn a_line_has_an_error_only_when_it_failed() {
        let mut line = Line {
            op: "cast",
            device: "d",
            driver: "580",
            depth: "full",
            ptx_sha: None,
            passed: true,
            cases: 3,
            seconds: 0.5,
            error: None,
        };
        let passed =
            r#"{"op":"cast","device":"d","driver":"580","depth":"full","ptx_sha":null,"passed":true,"cases":3,"seconds":0.5}"#;
        assert_eq!(serde_json::to_string(&line).unwrap(), passed);
        line.error = Some("differs");
        assert!(serde_json::to_string(&line).unwrap().ends_with(r#""error":"differs"}"#));
    }

    #[test]
    fn command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }
}
