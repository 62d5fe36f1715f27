//! The example `moe_layer`, run in this process on the emulator, with small numbers.

#[path = "../examples/moe_layer/layer/mod.rs"]
mod layer;

use ferrotile::Device;
use indicatif::ProgressBar;
use layer::{BOUND, Error, Options, Report};

const SMALL: Options =
    Options { tokens: 37, hidden: 64, intermediate: 20, experts: 8, topk: 2, alignment: 8, rows: None, quantise: false, seed: 1 };

fn run(options: Options) -> Report {
    layer::run(&options, &Device::emulator().checked(), &ProgressBar::hidden()).unwrap()
}

#[test]
fn it_is_the_dense_layer() {
    for options in [
        SMALL,
        Options { quantise: true, ..SMALL },
        Options { topk: 1, tokens: 1, ..SMALL },
        Options { topk: 8, hidden: 33, alignment: 1, seed: 2, ..SMALL },
        Options { tokens: 0, ..SMALL },
    ] {
        let report = run(options);
        report.check().unwrap_or_else(|error| panic!("{options:?}: {error}\n{report}"));
        assert_eq!((report.load.rows(), report.load.dropped()), (options.tokens * options.topk, 0));
        assert_eq!(report.stages.len(), 10);
    }
}

/// What finds no room is counted, and takes no part in the reference either.
#[test]
fn dropped_choices_take_no_part() {
    let report = run(Options { rows: Some(50), ..SMALL });
    report.check().unwrap();
    assert!(report.load.dropped() > 0);
    assert_eq!(report.load.rows() + report.load.dropped(), 74);
    assert!(report.to_string().contains("50 rows, "));
}

/// A result that is not the reference's is an error: the comparison is not there for show.
#[test]
fn differences_are_found() {
    let mut report = run(SMALL);
    for wrong in [2.0 * BOUND, f64::NAN, f64::INFINITY] {
        report.errors[2].1 = wrong;
        assert!(matches!(report.check(), Err(Error::Far { what: "grad of x", .. })));
    }
    let problem = layer::Problem::new(SMALL);
    let other = layer::Problem::new(Options { seed: 2, ..SMALL });
    assert_ne!(problem.x, other.x);
}

#[test]
fn the_command_line_has_exit_codes() {
    let code = |args: &[&str]| layer::cli::main(["moe_layer"].iter().chain(args));
    let small = ["--tokens", "9", "--hidden", "32", "--intermediate", "8", "--device", "emulator"];
    assert_eq!(code(&small), 0);
    assert_eq!(code(&[&small[..], &["--quantise", "--rows", "20"]].concat()), 0);
    assert_eq!(code(&["--help"]), 0);
    assert_eq!(code(&["--device", "tpu"]), 2);
    assert_eq!(code(&["--hidden", "0"]), 2);
    // What the library refuses.
    assert_eq!(code(&[&small[..], &["--experts", "6"]].concat()), 1);
    assert_eq!(code(&[&small[..], &["--topk", "9"]].concat()), 1);
}
